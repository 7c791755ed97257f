#!/usr/bin/env python3
"""Shows the sessions that server.py stored: tables, the session graph, a replay page. One file,
no install.

    python3 session_events.py demo                                try it, on synthetic sessions
    python3 session_events.py view --db events.db --open          the page on your own
    python3 session_events.py summary --db events.db --days 7     a digest of the week, to mail
    python3 session_events.py sessions --db events.db --days 30   the same as text, JSON, CSV ...
    python3 session_events.py ship --db events.db --to URL        rows of many servers into ClickHouse

Promises: the database is opened read-only (`ship` alone writes into it, once: a name for the
node), each command reads one moment of it (one transaction; `ship` one a batch), and a running
server goes first. Every row is checked when it is read: what breaks a field's rule is no session;
it is left out of every number, and counted. A developer appears as the first digits of a hash,
never as the whole; the page answers this machine only, and asks nothing of any other. (`ship`
leaves out nothing, and moves whole hashes.)

Limits: Python 3.8 and newer, SQLite 3.22 and newer. Hashes of developers change with the quarter,
so nobody is the same developer on both sides of its first day. Times are UTC; so are a day, a
week (from Monday), a month.

As a library (all results are plain dicts and lists, the same as `--format json`):

    import session_events
    with session_events.reading("events.db") as reader:
        week = session_events.last_days(7)
        print(session_events.graph(reader, week)["totals"])

Rooms: the contract → a row → queries → the graph → renderers (text, CSV, DOT; HTML) → the
database file → viewer → demo → ship → command line.
"""
from __future__ import annotations

import argparse
import base64
import bisect
import contextlib
import csv
import datetime
import email.utils
import errno
import functools
import hashlib
import heapq
import hmac
import html
import http.client
import http.server
import io
import itertools
import json
import math
import operator
import os
import random
import re
import secrets
import signal
import sqlite3
import ssl
import statistics
import struct
import sys
import tempfile
import textwrap
import threading
import time
import types
import urllib.parse
import uuid
import webbrowser
import zlib
from pathlib import Path
from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Set,
    TextIO,
    Tuple,
    Union,
)

# ==================================================================================================
# The contract
# ==================================================================================================

SCHEMA_VERSION = 1
TABLES = {
    "session_events": ("id", "identity_hash", "github_hash", "session_id_hash", "ended_at",
    "tool_count",
                       "tokens_saved", "branch_sha", "discovery_refs_json", "plugin_version",
                       "received_at"),
    "session_discoveries": ("discovery_ref", "event_id"),
}
# The fields of an event, in the order of the table's columns (README, Contract 1).
# Name, JSON type, needed, rule: a pattern, (least, most), or (most items, pattern of an item).
FIELDS = (
    ("identity_hash", "string", True, "[0-9a-f]{64}"),
    ("github_hash", "string or null", False, "[0-9a-f]{64}"),
    ("session_id_hash", "string", True, "[0-9a-f]{64}"),
    ("ended_at", "string", True, "moment"),
    ("tool_count", "number", True, (0, 1_000_000)),
    ("tokens_saved", "number", True, (0, 1_000_000_000)),
    ("branch_sha", "string or null", False, "[0-9A-Fa-f]{7,40}"),
    ("discovery_refs", "array", False, (200, "[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")),
    ("plugin_version", "string", True, "[0-9A-Za-z][0-9A-Za-z.+_-]{0,63}"),
)
RULES: Dict[str, Any] = {name: rule for name, _, _, rule in FIELDS}
MOST_TOOLS, MOST_TOKENS = RULES["tool_count"][1], RULES["tokens_saved"][1]
MOST_REFS = RULES["discovery_refs"][0]
PREFIX = 8  # digits of a developer's hash that are shown
ADMIN_TOKEN_VARIABLE = "ASHLR_ADMIN_TRIGGER_TOKEN"
RELATED_DAYS, RELATED_LIMIT = 30, 50
DAYS_DEFAULT, DRAWN = 7, 2000  # DRAWN: sessions in one picture
SORTS = ("session_count", "distinct_identity_count", "recent")
PROPAGATION = ("discovery_id", "first_seen_at", "last_seen_at", "session_count",
    "distinct_identity_count",
               "last_aggregated_at")  # what /admin/discoveries/propagation says of a discovery
END_OF_TIME = ":"  # the character after "9": above every moment

# The library: what `import session_events` is for. Everything else may change.
__all__ = [
    "EVER", "NotFound", "Reader", "Refused", "Window", "activity", "developers", "discoveries",
    "discovery", "exported", "findings", "graph", "last_days", "last_event", "reading", "session",
    "sessions", "summary", "window_between",
]

Plain = Dict[str, Any]  # what json.dumps takes

# ==================================================================================================
# A row: every cell is hostile until it has been through here
# ==================================================================================================

is_hash = re.compile(RULES["identity_hash"]).fullmatch
is_version = re.compile(RULES["plugin_version"]).fullmatch
# few are many
is_slug = functools.lru_cache(1 << 14)(re.compile(RULES["discovery_refs"][1]).fullmatch)
# What server.py stores, and the same without the fraction. Text order is the order of time, but
# that `...:56Z` stands behind `...:56.999Z`: see `bounds` and `Reader.order`.
STORED = re.compile(r"(\d{4}-\d\d-\d\d)T(?:[01]\d|2[0-3])(?::[0-5]\d){2}(?:\.\d{3})?Z", re.ASCII)
MOMENT = re.compile(r"(\d{4})-(\d\d)-(\d\d)T(\d\d):(\d\d):(\d\d)(?:\.(\d{1,9}))?"
                    r"(?:Z|([+-])(\d\d):(\d\d))?",
                    re.ASCII)
EPOCH = datetime.datetime(1970, 1, 1)
DAY_MS = 86_400_000


class Session(NamedTuple):
    """One row that has been checked. `ended` is milliseconds since 1970, UTC."""

    id: int
    identity: str
    github: Optional[str]
    session: str
    ended: int
    tools: int
    tokens: int
    branch: Optional[str]
    refs: Tuple[str, ...]
    version: str
    # the one GitHub hash of the identity in the window, if there is one
    login: Optional[str] = None

    @property
    def developer(self) -> str:
        """The whole key of who it was; goes through `labels` before anybody sees it."""
        return self.github or self.login or self.identity


def instant(text: object) -> Optional[int]:
    """Milliseconds since 1970 of an ISO 8601 date and time (README, Contract 1), else None."""
    match = MOMENT.fullmatch(text) if isinstance(text, str) else None
    if not match:
        return None
    year, month, day, hour, minute, second, fraction, sign, off_hour, off_minute = match.groups()
    try:
        moment = datetime.datetime(int(year), int(month), int(day), int(hour), int(minute),
            int(second))
    except ValueError:
        return None
    ms = (moment - EPOCH) // datetime.timedelta(milliseconds=1)
    ms += int(((fraction or "") + "000")[:3])
    if not sign:
        return ms
    if int(off_hour) > 23 or int(off_minute) > 59:
        return None
    return ms - (int(off_hour) * 60 + int(off_minute)) * 60_000 * (1 if sign == "+" else -1)


def moment_text(ms: int) -> str:
    """The stored form of a moment: UTC with milliseconds, so that text order is time order."""
    try:
        moment = EPOCH + datetime.timedelta(milliseconds=ms)
    except OverflowError:
        moment = datetime.datetime.min if ms < 0 else datetime.datetime.max
    return moment.isoformat(timespec="milliseconds") + "Z"


def moment_or_none(text: object) -> Optional[str]:
    ms = instant(text)
    return None if ms is None else moment_text(ms)


def now_ms() -> int:
    return int(datetime.datetime.now(datetime.timezone.utc).timestamp() * 1000)


@functools.lru_cache(4096)
def midnight(date: str) -> Optional[int]:
    return instant(date + "T00:00:00")


def stored_instant(text: object) -> Optional[int]:
    """Milliseconds since 1970 of a moment in stored form (with milliseconds or none), else None."""
    match = STORED.fullmatch(text) if isinstance(text, str) else None
    start = midnight(match.group(1)) if match else None
    if start is None:
        return None
    assert isinstance(text, str)
    ms = int(text[20:23]) if len(text) == 24 else 0
    return start + int(text[11:13]) * 3_600_000 + int(text[14:16]) * 60_000 + int(
        text[17:19]) * 1000 + ms


def refs_of(text: object) -> Optional[Tuple[str, ...]]:
    """The discoveries in `discovery_refs_json`, each once, in order; None if it breaks their
    rule."""
    if not isinstance(text, str):
        return None
    if text[:2] == '["' and text[-2:] == '"]':  # as server.py writes it: a third of json.loads
        values = text[2:-2].split('","')
        if len(values) <= MOST_REFS and all(map(is_slug, values)):
            return tuple(dict.fromkeys(values))
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, list) or len(values) > MOST_REFS or not all(
            isinstance(value, str) and is_slug(value) for value in values):
        return None
    return tuple(dict.fromkeys(values))


COLUMNS = ", ".join("e." + {"discovery_refs": "discovery_refs_json"}.get(name, name)
                    for name in ("id", *RULES))


def cell_check(name: str, kind: str, rule: Any) -> Callable[[object], bool]:
    """Whether a column's value keeps the rule of its field, as server.py stores it."""
    if rule == "moment":
        return lambda cell: stored_instant(cell) is not None
    if kind == "array":
        return lambda cell: refs_of(cell) is not None
    if kind == "number":
        least, most = rule
        return lambda cell: isinstance(cell, int) and least <= cell <= most
    fits = re.compile(rule).fullmatch
    nullable = kind == "string or null"
    return lambda cell: (nullable if cell is None
                         else isinstance(cell, str) and fits(cell) is not None)


CHECKS = [cell_check(name, kind, rule) for name, kind, _, rule in FIELDS]


def is_session(row: Sequence[Any]) -> bool:
    """Whether a row of COLUMNS is a session: each cell keeps the rule of its field (FIELDS). This
    is the one definition; all that asks the database goes through `Reader.chunks`, `Reader.tallies`
    or `Reader.sessions`, which let `Reader.sound` answer for many rows at once."""
    return all(check(cell) for check, cell in zip(CHECKS, row[1:]))


HEX_DIGITS = b"0123456789abcdef"
DIGITS_TO_0 = bytes.maketrans(b"123456789", b"0" * 9)


# Many cells of one field at once, joined by line ends. A rule allows no line end in a cell: where
# there is one less than there are cells, the text was cut where they join.

def hashes(text: bytes, count: int) -> bool:
    ends = b"\n" * (count - 1)
    return len(text) == 65 * count - 1 and text[64::65] == ends == text.translate(None, HEX_DIGITS)


def moments(text: bytes, count: int) -> bool:
    """Moments with milliseconds; date and hour are the caller's matter."""
    form = (b"0000-00-00T00:00:00.000Z\n" * count)[:-1]
    return text.translate(DIGITS_TO_0) == form and max(text[14::25] + text[17::25]) < ord("6")


def arrays(text: bytes, count: int) -> bool:
    """JSON arrays of slugs as server.py writes them."""
    whole = text.decode("ascii")
    texts = whole.split("\n")
    filled = "\n".join(cell for cell in texts if cell != "[]") if "[]" in texts else whole
    ends = filled.count('"]\n["') + 1 if filled else 0
    if len(texts) != count or ends + texts.count("[]") != count:
        return False
    # With its quotes and comma a slug takes 4 characters: in a shorter text there are not too many.
    return not filled or (
        filled[:2] == '["' and filled[-2:] == '"]' and max(map(len, texts)) < 4 * MOST_REFS
        and all(map(is_slug, set(filled[2:-2].replace('"]\n["', '","').split('","')))))


def of_rule(rule: str) -> Callable[[bytes, int], bool]:
    fits = re.compile(rule.encode()).fullmatch

    def few_distinct(text: bytes, count: int) -> bool:
        cells = text.split(b"\n")
        return len(cells) == count and all(map(fits, set(cells)))

    return few_distinct


def soundness() -> Tuple[str, List[Callable[[bytes, int], bool]]]:
    """What a look at many rows selects: how many there are, how many have numbers in the rules;
    then for each field of text how many are not NULL, the types of the greatest (a BLOB is above
    every text) and of the least (a number is below), and the cells joined; and their checks."""
    numbers, selected, checks = [], [], []
    for (_, kind, _, rule), column in zip(FIELDS, COLUMNS.split(", ")[1:]):
        if kind == "number":
            numbers.append("typeof({0}) = 'integer' AND {0} BETWEEN {1} AND {2}".format(
                column, *rule))
            continue
        checks.append(moments if rule == "moment" else arrays if kind == "array"
                      else hashes if rule == RULES["identity_hash"] else of_rule(str(rule)))
        least = "max" if checks[-1] in (hashes, moments, arrays) else "min"  # no number looks so
        count = "count({0})" if kind == "string or null" else "count(*)"
        selected.append((count + ", typeof(max({0})), typeof(%s({0})), group_concat({0}, '\n')"
                         % least).format(column))
    return "count(*), sum(%s), %s" % (" AND ".join(numbers), ", ".join(selected)), checks


SOUNDNESS, JOINED_CHECKS = soundness()


def refs_in(text: str) -> Sequence[str]:
    """`refs_of` of a session, in a third of the time."""
    refs = text[2:-2].split('","')
    if " " in text or "\\" in text or len(set(refs)) < len(refs) or text == "[]":
        return refs_of(text) or ()
    return refs


def session_of(row: Sequence[Any], login: Optional[str] = None) -> Session:
    """A row of COLUMNS that is a session."""
    ended, refs = stored_instant(row[4]), refs_of(row[8])
    assert ended is not None and refs is not None
    return Session(row[0], row[1], row[2], row[3], ended, row[5], row[6], row[7] and row[7].lower(),
                   refs, row[9], login)


def alike(a: str, b: str) -> int:
    """How many characters two texts have in common from the start."""
    return next((n for n, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def labels(keys: Iterable[str]) -> Dict[str, str]:
    """{whole hash: what is shown of it}: 8 digits, longer only where two would look alike."""
    ordered = sorted(set(keys))
    shown = {}
    for before, key, after in zip(["", *ordered], ordered, [*ordered[1:], ""]):
        shown[key] = key[:max(PREFIX, alike(before, key) + 1, alike(key, after) + 1)]
    return shown


def plain_session(s: Session) -> Plain:
    """S of README, Contract 7, to the letter."""
    return {"session_id_hash": s.session, "identity_hash_prefix": s.identity[:PREFIX],
            "github_hash_prefix": s.github and s.github[:PREFIX], "ended_at": moment_text(s.ended),
            "tool_count": s.tools, "tokens_saved": s.tokens, "branch_sha": s.branch,
            "discovery_refs": list(s.refs)}


def plain_sessions(sessions: Sequence[Session]) -> List[Plain]:
    """S of each, with `developer`: the label under which the graph and the pages know who it
    was."""
    shown = labels(s.developer for s in sessions)
    return [dict(plain_session(s), developer=shown[s.developer]) for s in sessions]


# ==================================================================================================
# Queries
# ==================================================================================================


class NotFound(Exception):
    """What was asked for is not there, or is not one thing; the text says so to a person."""


class Window(NamedTuple):
    """Which sessions: `since` (included) to `until` (not) in the stored form, with or without a
    GitHub hash (None: both), touching one discovery (None: any)."""

    since: str
    until: str = END_OF_TIME
    github: Optional[bool] = None
    discovery: Optional[str] = None


EVER = Window("")


def last_days(days: float, github: Optional[bool] = None,
              discovery: Optional[str] = None) -> Window:
    """The window of the last `days` days, open at the end: a clock that runs ahead loses no
    session."""
    return Window(moment_text(now_ms() - int(days * DAY_MS)), END_OF_TIME, github, discovery)


def day_start(text: str) -> Optional[str]:
    """The stored form of a date or a moment, None if it is neither."""
    return moment_or_none(text) or moment_or_none(text + "T00:00:00")


def window_between(days: int, since: str, until: str, github: Optional[bool],
                   discovery: Optional[str]) -> Window:
    """`since` to `until` (dates or moments); without `since`, the `days` days before `until` (or
    now)."""
    end = day_start(until)
    start = day_start(since) or moment_text((instant(end) or now_ms()) - days * DAY_MS)
    return Window(start, end or END_OF_TIME, github, discovery)


GITHUB = {None: "1", True: "e.github_hash IS NOT NULL", False: "e.github_hash IS NULL"}


def bounds(since: str, until: str) -> Tuple[str, List[Any]]:
    """`since` <= ended_at < `until` as a condition, and its parameters. Where a bound has a
    fraction, a row of the same second without one is on the other side of it than its text
    says."""
    sql, values = "e.ended_at >= ? AND e.ended_at < ?", [since, until]
    if since[20:23].strip("0"):
        sql, values = sql + " AND e.ended_at <> ?", [*values, since[:19] + "Z"]
    if until[20:23].strip("0"):
        second = until[:19] + "Z"
        sql = sql.replace("e.ended_at < ?",
            "e.ended_at <= ? AND NOT (e.ended_at >= ? AND e.ended_at < ?)")
        values = [since, second, until, second, *values[2:]]
    return sql, values


def whole_seconds(since: str, until: str) -> Tuple[str, str]:
    """The bounds, widened to whole seconds: then no row without a fraction is on another side."""
    return (since[:19] if since[20:23].strip("0") else since,
            until[:19] + "~" if until[20:23].strip("0") else until)


def where(window: Window) -> Tuple[str, List[Any]]:
    """The window as a condition on `session_events e`, and its parameters."""
    sql, values = bounds(window.since, window.until)
    sql += " AND " + GITHUB[window.github]
    if window.discovery is not None:
        sql += " AND e.id IN (SELECT event_id FROM session_discoveries WHERE discovery_ref = ?)"
        values.append(window.discovery)
    return sql, values


CHUNK = 2000  # rows in memory at once
# The rows that `Reader.sound` looks at together are those of a day, or where these are more, of an
# hour, a minute, a second: how many characters of `ended_at` these have in common.
MOST_TOGETHER, PREFIXES = 20_000, (13, 16, 19)
DATED = re.compile("[0-9-]{1,10}")
NO_MOMENT = ("SELECT id FROM session_events WHERE ended_at IS NULL"
             " UNION ALL SELECT id FROM session_events WHERE ended_at < '0'"
             " UNION ALL SELECT id FROM session_events WHERE ended_at >= ?")
INSTANT = ("CASE length(e.ended_at) WHEN 20 THEN substr(e.ended_at, 1, 19) || '.000Z'"
           " ELSE e.ended_at END")
IDENTITY_HASH, GITHUB_HASH, ENDED_AT, TOOLS, TOKENS, REFS = 1, 2, 4, 5, 6, 8  # places in COLUMNS
PAIR = operator.itemgetter(IDENTITY_HASH, GITHUB_HASH)
Pair = Tuple[str, Optional[str]]  # (identity, GitHub hash)


def above(prefix: str) -> str:
    """The least text above all that start with `prefix`, which ends in ASCII."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1)


class Pairs(Dict[str, Pair]):
    """{identity and GitHub hash as one text: the pair}, each made once."""

    def __missing__(self, text: str) -> Pair:
        return self.setdefault(text, (text[:64], text[64:] or None))


class Tally(NamedTuple):
    """Some sessions of one day: those that pass the window's filters, and who was there at all."""

    date: str
    sessions: int
    tools: int
    tokens: int
    here: Set[Pair]
    everybody: Set[Pair]


TALLY = ("SELECT min(e.ended_at), sum({0}), sum(({0}) * e.tool_count), sum(({0}) * e.tokens_saved),"
         " group_concat(e.identity_hash || ifnull(e.github_hash, ''))"
         " FROM session_events e WHERE {1}")


class Facts(NamedTuple):
    """What one look at all rows of a window tells. `total`: the sessions that pass its filters;
    `logins`: {identity: its one GitHub hash} (None: it has several) over the window's time."""

    total: int
    logins: Dict[str, Optional[str]]
    developers: Set[str]


class Reader:
    """One read transaction. `left_out` counts the rows met so far that are no sessions."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection
        self.odd: Set[int] = set()  # ids of rows that are no sessions
        self.known: Dict[Window, Facts] = {}
        self.found_sound: Dict[Tuple[str, str], bool] = {}
        self.pairs = Pairs()

    @property
    def left_out(self) -> int:
        return len(self.odd)

    def rows(self, sql: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        # A command line may hold bytes that are no text (lone surrogates in Python); no row is
        # meant by them.
        return self.connection.execute(sql, [
            v.encode("utf-8", "replace").decode() if isinstance(v, str) else v for v in values])

    def order(self, window: Window) -> str:
        """ORDER BY's key for the time: the column, which has an index, unless a row without a
        fraction is there. (0.1 us a row of the window, all in the index.)"""
        sql, values = bounds(window.since, window.until)
        mixed = self.rows("SELECT 1 FROM session_events e WHERE %s AND length(e.ended_at) <> 24"
                          " LIMIT 1" % sql, values).fetchone()
        return INSTANT if mixed else "e.ended_at"

    def checked(self, rows: Iterable[Sequence[Any]]) -> List[Sequence[Any]]:
        """The sessions among rows of COLUMNS; the ids of the others go to `odd`."""
        good = []
        for row in rows:
            if is_session(row):
                good.append(row)
            else:
                self.odd.add(row[0])
        return good

    @contextlib.contextmanager
    def texts(self, factory: Any) -> Iterator[None]:
        """Text comes as `factory` makes it: bytes, or str (twice as fast, for text known to be
        ASCII)."""
        lenient, self.connection.text_factory = self.connection.text_factory, factory
        try:
            yield
        finally:
            self.connection.text_factory = lenient

    def pieces(self, window: Window) -> Iterator[Tuple[str, str]]:
        """The window's time as (since, until) of pieces in order, leaving out only time without
        rows. Rows whose time is no time belong to every window, as left out."""
        self.odd.update(row_id for row_id, in self.rows(NO_MOMENT, [END_OF_TIME]))
        place, last = whole_seconds(max(window.since, "0"), window.until)
        while True:
            (first,) = self.rows("SELECT e.ended_at FROM session_events e WHERE e.ended_at >= ?"
                                 " AND e.ended_at < ? ORDER BY e.ended_at LIMIT 1",
                                 [place, last]).fetchone() or (None,)
            if first is None:
                return
            ends = [above(match.group()) for match in [DATED.match(first)] if match]
            if stored_instant(first) is not None:
                ends = [first[:10] + "T24", *(above(first[:length]) for length in PREFIXES)]
            end = next((end for end in ends if not self.too_many(place, end)), None)
            piece = max(place, window.since), min(end or ends[-1], window.until)
            if end is None:  # more in one second: their text would take too much memory
                self.found_sound[piece] = False
            yield piece
            place = end or ends[-1]

    def too_many(self, since: str, until: str) -> bool:
        """Whether there are more than MOST_TOGETHER rows."""
        return self.rows("SELECT 1 FROM session_events e WHERE e.ended_at >= ? AND e.ended_at < ?"
                         " LIMIT 1 OFFSET ?", [since, until, MOST_TOGETHER]).fetchone() is not None

    def sound(self, since: str, until: str) -> bool:
        """True only if every row of this time is a session; False means that each must be looked
        at. SQLite joins the cells of a column (1 us a row), where `is_session` takes
        6. `since` to `until` is one of `pieces`; remembered."""
        if (since, until) not in self.found_sound:
            self.found_sound[since, until] = self.looks_sound(*whole_seconds(since, until))
        return self.found_sound[since, until]

    def looks_sound(self, since: str, until: str) -> bool:
        where_sql = "FROM session_events e WHERE e.ended_at >= ? AND e.ended_at < ?"
        first = self.rows("SELECT e.ended_at %s ORDER BY e.ended_at LIMIT 1" % where_sql,
                          [since, until]).fetchone()
        # The first row has a date and an hour that exist; so do all below this bound.
        if not first:
            return True
        if stored_instant(first[0]) is None or until > first[0][:10] + "T24":
            return False
        try:
            with self.texts(bytes):
                count, right, *found = self.rows("SELECT %s %s" % (SOUNDNESS, where_sql),
                                                 [since, until]).fetchone()
            return right == count and all(
                number == 0 or (most == least == b"text" and check(text, number))
                for check, number, most, least, text in zip(
                    JOINED_CHECKS, *(found[n::4] for n in range(4))))
        except (UnicodeDecodeError, sqlite3.DataError):  # not ASCII; too much for one text
            return False

    def chunks(self, window: Window, places: Sequence[int] = ()) -> Iterator[List[Sequence[Any]]]:
        """All sessions in the window's time, whatever its filters, some at a time, oldest first:
        of each the columns at these places of COLUMNS (two or more; none given: all)."""
        names = COLUMNS.split(", ")
        columns = ", ".join(names[place] for place in places) or COLUMNS
        picked = operator.itemgetter(*places) if places else None
        for since, until in self.pieces(window):
            sql, values = bounds(since, until)
            if self.sound(since, until):
                sql = "SELECT %s FROM session_events e WHERE %s ORDER BY e.ended_at, e.id" % (
                    columns, sql)
                yield from self.fetched(str, sql, values)
                continue
            order = self.order(window._replace(since=since, until=until))
            sql = "SELECT %s FROM session_events e WHERE %s ORDER BY %s, e.id" % (
                COLUMNS, sql, order)
            for rows in self.fetched(self.connection.text_factory, sql, values):
                good = self.checked(rows)
                yield list(map(picked, good)) if picked else good

    def fetched(self, factory: Any, sql: str,
                values: Sequence[Any]) -> Iterator[List[Sequence[Any]]]:
        with self.texts(factory):
            cursor = self.rows(sql, values)
        while True:
            with self.texts(factory):  # another query may run between two chunks
                rows = cursor.fetchmany(CHUNK)
            if not rows:
                return
            yield rows

    def tallies(self, window: Window) -> Iterator[Tally]:
        """The sessions of the window added up, a day or less at a time."""
        keep = GITHUB[window.github]
        for since, until in self.pieces(window):
            if window.discovery is None and self.sound(since, until):
                # 0.6 us a row; only to fetch the five columns takes 0.9.
                sql, values = bounds(since, until)
                with self.texts(str):
                    date, *sums, pairs = self.rows(TALLY.format(keep, sql), values).fetchone()
                if date is not None:
                    everybody = set(map(self.pairs.__getitem__, set(pairs.split(","))))
                    here = everybody if window.github is None else {
                        pair for pair in everybody if window.github == (pair[1] is not None)}
                    yield Tally(date[:10], sums[0], sums[1], sums[2], here, everybody)
                continue
            for rows in self.chunks(window._replace(since=since, until=until)):
                for date, group in itertools.groupby(rows, lambda row: str(row[ENDED_AT])[:10]):
                    day = list(group)
                    some = [row for row in day if passes(window, row[GITHUB_HASH], row[REFS])]
                    yield Tally(date, len(some), sum(row[TOOLS] for row in some),
                                sum(row[TOKENS] for row in some), set(map(PAIR, some)),
                                set(map(PAIR, day)))

    def facts(self, window: Window) -> Facts:
        """One look at every row of the window; remembered."""
        if window not in self.known:
            count, pairs = 0, set()
            for tally in self.tallies(window):
                count += tally.sessions
                pairs |= tally.everybody
            logins = logins_of(pairs)
            self.known[window] = Facts(count, logins, {
                github or logins.get(identity) or identity for identity, github in pairs})
        return self.known[window]

    def sessions(self, sql: str, values: Sequence[Any],
                 logins: Mapping[str, Optional[str]] = types.MappingProxyType({})
                 ) -> Iterator[Session]:
        """The checked rows of `SELECT COLUMNS FROM session_events e` + `sql`."""
        cursor = self.rows("SELECT " + COLUMNS + " FROM session_events e " + sql, values)
        for rows in iter(lambda: cursor.fetchmany(50), []):
            for row in self.checked(rows):
                yield session_of(row, logins.get(row[1]))

    def window(self, window: Window, limit: int = -1) -> List[Session]:
        """The sessions of a window, newest first (the later stored first where two ended
        together)."""
        sql, values = where(window)
        found = self.sessions("WHERE %s ORDER BY %s DESC, e.id DESC" % (sql, self.order(window)),
                              values, self.facts(window).logins)
        touched = (s for s in found if window.discovery is None or window.discovery in s.refs)
        return list(itertools.islice(touched, limit if limit >= 0 else None))

    def walk(self, window: Window) -> Iterator[Session]:
        """The sessions of a window, oldest first, one at a time."""
        logins = self.facts(window).logins
        for rows in self.chunks(window):
            for row in rows:
                if passes(window, row[GITHUB_HASH], row[REFS]):
                    yield session_of(row, logins.get(row[1]))

    def count(self, window: Window) -> int:
        return self.facts(window).total


def passes(window: Window, github: Optional[str], refs: str) -> bool:
    """Whether a session passes the window's filters; its time is not looked at."""
    return window.github in (None, github is not None) and (
        window.discovery is None or window.discovery in refs_in(refs))


def logins_of(pairs: Iterable[Pair]) -> Dict[str, Optional[str]]:
    """{identity: its one GitHub hash, or None where it has several} of (identity, GitHub hash)."""
    logins: Dict[str, Optional[str]] = {}
    for identity, github in pairs:
        if github is not None:
            logins[identity] = github if logins.get(identity, github) == github else None
    return logins


def span(window: Window) -> Plain:
    return {"since": window.since, "until": None if window.until == END_OF_TIME else window.until}


def sessions(reader: Reader, window: Window, limit: int = 50) -> Plain:
    """{"since", "until", "sessions": [S with "developer" ...] newest first,
    "total_count_in_window"}."""
    found = reader.window(window, limit)
    return dict(span(window), sessions=plain_sessions(found),
                total_count_in_window=reader.count(window))


def last_event(reader: Reader) -> Optional[str]:
    """When the newest session of the whole database ended, None if there is none."""
    newest = reader.sessions("WHERE e.ended_at < ? ORDER BY e.ended_at DESC", [END_OF_TIME])
    return next((moment_text(s.ended) for s in newest), None)


NEWEST = 1000  # rows looked at first: most of the sessions that people ask for are recent
MOST_MATCHES = 1000  # of a prefix that fits many
# identities: where more are likely, the whole index is read sooner than walked
SAMPLE, MOST_STEPS = 64, 15_000
SESSION_IS = {True: "{0}session_id_hash = ?",
    False: "{0}session_id_hash >= ? AND {0}session_id_hash < ?"}
NEWEST_IDS = """SELECT id
  FROM (SELECT id, session_id_hash FROM session_events ORDER BY ended_at DESC LIMIT ?)
  WHERE session_id_hash = ?"""
# In the order of the unique index, whose pages the look-up needs too: through the other it takes
# half as long again.
EACH_IDENTITY = """WITH RECURSIVE one (identity) AS (
  SELECT min(identity_hash) FROM session_events
  UNION ALL
  SELECT (SELECT identity_hash FROM session_events WHERE identity_hash > identity
      ORDER BY identity_hash, session_id_hash LIMIT 1)
    FROM one WHERE identity IS NOT NULL)
SELECT """
SAMPLED = EACH_IDENTITY + "identity FROM one LIMIT 1 OFFSET ?"
IDENTITY_IDS = EACH_IDENTITY + """e.id
  FROM one CROSS JOIN session_events e ON e.identity_hash = identity AND """
ALL_IDS = "SELECT id FROM session_events WHERE "


def identities(reader: Reader) -> float:
    """About how many identities there are: hashes lie evenly, so the place of one of the first
    tells."""
    (sample,) = reader.rows(SAMPLED, [SAMPLE]).fetchone() or (None,)
    if not isinstance(sample, str) or not is_hash(sample):
        return SAMPLE
    return SAMPLE * 16.0 ** 8 / (int(sample[:8], 16) + 1)


def session_ids(reader: Reader, prefix: str) -> Iterator[int]:
    """The ids of the rows whose session starts with `prefix`, one by one: who looks for a whole
    hash stops early.

    No index starts with the session. So, for a whole hash, first the newest rows (1 ms); then two
    steps per identity through the unique index (all of 4,000 identities: 17 ms); or, where there
    are too many of them, all of that index (of a million rows: 65 ms)."""
    whole_hash = len(prefix) == 64
    given = [prefix] if whole_hash else [prefix, prefix + "g"]  # "g" is above every digit
    if whole_hash:
        yield from (row_id for row_id, in reader.rows(NEWEST_IDS, [NEWEST, prefix]))
    sql, name = (IDENTITY_IDS, "e.") if identities(reader) <= MOST_STEPS else (ALL_IDS, "")
    sql += SESSION_IS[whole_hash].format(name) + " LIMIT ?"
    first = reader.rows(sql, [*given, 1 if whole_hash else -1]).fetchall()
    yield from (row_id for row_id, in first)
    if whole_hash and first:  # who still asks has found that one to be no session
        yield from (row_id for row_id, in reader.rows(sql, [*given, -1]))


def find_session(reader: Reader, prefix: str) -> Session:
    """The session whose hash is, or starts with, `prefix` (where two identities share a hash, as
    over the end of a quarter, one of the two rows). Raises NotFound when there is none, or when
    the prefix fits several sessions."""
    prefix = prefix.lower()
    if not re.fullmatch(r"[0-9a-f]{4,64}", prefix):
        raise NotFound("a session is named by 4 to 64 hex digits of its hash")
    matching = (s for row_id in session_ids(reader, prefix)
        for s in reader.sessions("WHERE e.id = ?", [row_id]))
    found = list(itertools.islice(matching, 1 if len(prefix) == 64 else MOST_MATCHES))
    if not found:
        raise NotFound("no session starts with these digits")
    names = sorted({s.session for s in found})
    if len(names) > 1:
        raise NotFound("%s%d sessions start with these digits, give more of them: %s%s" % (
            "at least " if len(found) == MOST_MATCHES else "", len(names),
            ", ".join(name[:16] for name in names[:4]),
            " ..." if names[4:] else ""))
    return max(found, key=lambda s: (s.ended, s.id))


def session(reader: Reader, prefix: str, now: Optional[int] = None) -> Plain:
    """{"session": S, "related": [S ...]} with "developer": the same identity's other sessions of
    the last 30 days, newest first, at most 50. Raises NotFound."""
    one = find_session(reader, prefix)
    since = moment_text((now_ms() if now is None else now) - RELATED_DAYS * DAY_MS)
    same_identity = list(reader.sessions("WHERE e.identity_hash = ?", [one.identity]))
    login = logins_of((s.identity, s.github) for s in same_identity).get(one.identity)
    related = sorted((s for s in same_identity if s.id != one.id
        and s.ended >= (instant(since) or 0)),
                     key=lambda s: (s.ended, s.id), reverse=True)[:RELATED_LIMIT]
    first, *rest = plain_sessions([s._replace(login=login) for s in [one, *related]])
    return {"session": first, "related": rest}


TOLD = (IDENTITY_HASH, GITHUB_HASH, ENDED_AT, TOOLS, TOKENS, REFS)
SPARKS = 24  # parts of a window in which a discovery's sessions are counted
NEITHER = (None, None)


class Trail:
    """One discovery in a window: the moments of its sessions in order (stored form), each
    developer's first, its identities, and who touched it last."""

    __slots__ = ("ended", "identities", "last", "reached")

    def __init__(self) -> None:
        self.ended: List[str] = []
        self.reached: Dict[str, str] = {}
        self.identities: Set[str] = set()
        self.last = ""

    def hours_to_second(self) -> Optional[float]:
        return hours(self.ended[0], sorted(self.reached.values())[1]) if len(
            self.reached) > 1 else None

    def half_life(self) -> Optional[float]:
        """Until half of its sessions, 4 or more, had ended."""
        count = len(self.ended)
        return hours(self.ended[0], self.ended[(count + 1) // 2 - 1]) if count >= 4 else None


class Deeds:
    """What one developer did in a window."""

    __slots__ = ("cold", "first", "given", "last", "received", "sessions", "tokens", "tools")

    def __init__(self, first: str) -> None:
        self.first = self.last = first
        self.sessions = self.tools = self.tokens = self.given = self.received = 0
        self.cold: Optional[int] = None  # own sessions before the first that built on others


class Story:
    """A window's sessions, taken in by `take` in the order of time (by `ended_at`, then `id`)."""

    def __init__(self, window: Window, logins: Mapping[str, Optional[str]]) -> None:
        self.window, self.logins = window, logins
        self.trails: Dict[str, Trail] = {}
        self.developers: Dict[str, Deeds] = {}
        self.flows: Dict[Tuple[str, str], int] = {}  # hand-overs from one developer to another
        self.saved: Dict[bool, List[int]] = {True: [], False: []}  # tokens: built on others, or not
        # {(identity, GitHub hash): (developer, identity)} of every session; developers by name
        self.pairs: Dict[Pair, Tuple[str, str]] = {}
        self.names: Dict[str, str] = {}

    def take(self, rows: Iterable[Sequence[Any]]) -> None:
        """Sessions as rows of TOLD. (A Session of each would take as long again.)"""
        every, trails, flows = self.window[2:] == NEITHER, self.trails, self.flows
        people = self.pairs
        for identity, github, ended, tools, tokens, refs in rows:
            person = people.get((identity, github))
            if person is None:
                who = github or self.logins.get(identity) or identity
                person = people[identity, github] = self.names.setdefault(who, who), identity
            if not every and not passes(self.window, github, refs):
                continue
            if len(ended) == 20:
                ended = ended[:19] + ".000Z"
            # One object for each text: with a new one a row, sets and dictionaries take twice as
            # long.
            who, identity = person
            deeds = self.developers.get(who) or self.developers.setdefault(who, Deeds(ended))
            built = False
            for ref in refs_in(refs) if refs != "[]" else ():
                trail = trails.get(ref)
                if trail is None:
                    trail = trails[ref] = Trail()
                elif trail.last != who:
                    built = True
                    flow = trail.last, who
                    flows[flow] = flows.get(flow, 0) + 1
                elif len(trail.reached) > 1:
                    built = True
                trail.ended.append(ended)
                if who not in trail.reached:
                    trail.reached[who] = ended
                trail.identities.add(identity)
                trail.last = who
            if built and deeds.cold is None:
                deeds.cold = deeds.sessions
            deeds.last = ended
            deeds.sessions += 1
            deeds.tools += tools
            deeds.tokens += tokens
            self.saved[built].append(tokens)


def hours(start: str, end: str) -> float:
    """From one moment in stored form to another, to a hundredth of an hour."""
    return round(((stored_instant(end) or 0) - (stored_instant(start) or 0)) / 3_600_000, 2)


def middle(values: Sequence[float]) -> Optional[float]:
    """The median, None of nothing."""
    return round(statistics.median(values), 2) if values else None


def story(reader: Reader, window: Window) -> Story:
    """The window's story. Who logged in within the window is known at its end only; if somebody
    did, it is told again."""
    logins: Dict[str, Optional[str]] = {}
    while True:
        told = Story(window, logins)
        for rows in reader.chunks(window, TOLD):
            told.take(rows)
        found = logins_of(told.pairs)
        if logins or not any(github is None and found.get(identity)
                             for identity, github in told.pairs):
            for (giver, receiver), count in told.flows.items():
                told.developers[giver].given += count
                told.developers[receiver].received += count
            return told
        logins = found


def ends_of(window: Window, now: Optional[int] = None) -> Tuple[Optional[int], int]:
    """(first ms, ms after the last) of a window; None where it has no start, now where it has no
    end."""
    start, end = instant(window.since), instant(window.until)
    return start, end if end is not None else max(now_ms() if now is None else now,
        (start or 0) + 1)


def before_of(window: Window, now: Optional[int] = None) -> Optional[Window]:
    """The window of the same length right before a window, None where there can be none."""
    start, end = ends_of(window, now)
    if start is None:
        return None
    return window._replace(since=moment_text(start - (end - start)), until=window.since)


def newcomers(reader: Reader, told: Story, before: Optional[Window]) -> Dict[str, Deeds]:
    """The developers of a window who were not there in as many days before. (An identity that
    logged in meanwhile was there: developers are looked for by all their hashes.)"""
    if before is None:
        return dict(told.developers)
    there: Set[str] = set()
    for tally in reader.tallies(before):
        there.update(key for pair in tally.everybody for key in pair if key)
    known = {github or told.logins.get(identity) or identity
             for identity, github in told.pairs if identity in there or github in there}
    return {who: deeds for who, deeds in told.developers.items() if who not in known}


def cold_start(fresh: Mapping[str, Deeds]) -> Plain:
    """{"developers": how many are new, "sessions": the median of their own sessions before the
    first that built on others, "never": how many have none that did}."""
    waits = [deeds.cold for deeds in fresh.values() if deeds.cold is not None]
    return {"developers": len(fresh), "sessions": middle(waits), "never": len(fresh) - len(waits)}


def summary(reader: Reader, window: Window, now: Optional[int] = None) -> Plain:
    """The figures of a window, and under "before" those of as many days before it (None for a
    window without a start): {"since", "until", "sessions", "developers", "tool_count",
    "tokens_saved", "discoveries", "shared_discoveries" (that reached two developers or more),
    "hand_overs", "furthest": {"discovery_id", "developers", "hours"}, "built_on_others":
    {"sessions", "share"}, "tokens_saved_median": {"built_on_others", "others"},
    "hours_to_second_developer" (median), "cold_start": {"developers", "sessions", "never"}}. A
    figure of nothing is None; hours are rounded to hundredths, the share to ten-thousandths."""
    now = now_ms() if now is None else now
    earlier = before_of(window, now)
    return dict(figures(reader, window, earlier),
                before=earlier and figures(reader, earlier, before_of(earlier, now)))


def figures(reader: Reader, window: Window, before: Optional[Window]) -> Plain:
    """`summary` without the window before; `before` decides who is new."""
    told = story(reader, window)
    everybody = told.developers.values()
    seconds = [wait for wait in (t.hours_to_second() for t in told.trails.values())
        if wait is not None]
    built, others = told.saved[True], told.saved[False]
    count = len(built) + len(others)
    return dict(
        span(window), sessions=count, developers=len(told.developers),
        tool_count=sum(d.tools for d in everybody), tokens_saved=sum(d.tokens for d in everybody),
        discoveries=len(told.trails), shared_discoveries=len(seconds),
        hand_overs=sum(told.flows.values()), furthest=furthest(told.trails),
        built_on_others={"sessions": len(built), "share": round(len(built) / count, 4) if count
        else None},
        tokens_saved_median={"built_on_others": middle(built), "others": middle(others)},
        hours_to_second_developer=middle(seconds),
        cold_start=cold_start(newcomers(reader, told, before)))


def furthest(trails: Mapping[str, Trail]) -> Optional[Plain]:
    """The discovery that reached most developers (then: with most sessions, then the first by
    name)."""
    if not trails:
        return None
    name, trail = min(trails.items(), key=lambda t: (-len(t[1].reached), -len(t[1].ended), t[0]))
    return {"discovery_id": name, "developers": len(trail.reached),
            "hours": hours(trail.ended[0], max(trail.reached.values()))}


def developers(reader: Reader, window: Window, now: Optional[int] = None) -> Plain:
    """{"since", "until", "developers": [{"developer", "sessions", "tool_count", "tokens_saved",
    "given", "received" (hand-overs), "new" (not there in as many days before),
    "sessions_before_inherited" (own sessions before the first that built on others, None if none
    did), "first_seen_at", "last_seen_at"} ...] those who give most more than they receive first,
    then by first session, "matrix": [{"source", "target", "hand_overs"} ...] most first,
    "cold_start": of the new ones, as in `summary`}."""
    told = story(reader, window)
    fresh = newcomers(reader, told, before_of(window, now))
    shown = labels(told.developers)
    ranked = sorted(told.developers.items(), key=lambda d: (d[1].received - d[1].given, d[1].first,
        d[0]))
    return dict(
        span(window),
        developers=[{
            "developer": shown[who], "sessions": d.sessions, "tool_count": d.tools,
            "tokens_saved": d.tokens, "given": d.given, "received": d.received, "new": who in fresh,
            "sessions_before_inherited": d.cold, "first_seen_at": d.first,
            "last_seen_at": d.last} for who, d in ranked],
        matrix=[{"source": shown[a], "target": shown[b], "hand_overs": count} for (a, b),
        count in sorted(
            told.flows.items(), key=lambda f: (-f[1], shown[f[0][0]], shown[f[0][1]]))],
        cold_start=cold_start(fresh))


def discovery_figures(name: str, trail: Trail, ends: Tuple[int, int], now: str) -> Plain:
    start, end = ends
    edges = [moment_text(start - start_of_part // SPARKS)  # rounded up: minus, floor, minus
             for start_of_part in range(start - end, (start - end) * SPARKS, start - end)]
    cuts = [0, *(bisect.bisect_left(trail.ended, edge) for edge in edges), len(trail.ended)]
    counts = [after - before for before, after in zip(cuts, cuts[1:])]
    return {"discovery_id": name, "first_seen_at": trail.ended[0],
            "last_seen_at": trail.ended[-1], "session_count": len(trail.ended),
            "distinct_identity_count": len(trail.identities), "last_aggregated_at": now,
            "developer_count": len(trail.reached),
            "hours_to_second_developer": trail.hours_to_second(),
            "half_life_hours": trail.half_life(), "counts": counts}


DISCOVERY_SORTS: Dict[str, Callable[[str, Trail], Tuple[Any, ...]]] = {
    "session_count": lambda name, t: (-len(t.ended), name),
    "distinct_identity_count": lambda name, t: (-len(t.identities), name),
    "recent": lambda name, t: (-(stored_instant(t.ended[-1]) or 0), name),
    "developer_count": lambda name, t: (-len(t.reached), -len(t.ended), name),
    "hours_to_second_developer": lambda name, t: (none_last(t.hours_to_second()), name),
    "half_life": lambda name, t: (none_last(t.half_life()), name),
    "first_seen": lambda name, t: (t.ended[0], name),
    "name": lambda name, t: (name,),
}


def none_last(value: Optional[float]) -> Tuple[bool, float]:
    return value is None, value or 0.0


class Touches:
    """The sessions of a window that touched a discovery, and {discovery: which of these}. (Of 30
    days with 333,333 sessions: 80 MB; as a Story 176.)"""

    def __init__(self, reader: Reader, window: Window) -> None:
        self.ended: List[str] = []
        self.by_ref: Dict[str, List[int]] = {}
        self.who: List[Pair] = []
        pairs: Dict[Pair, Pair] = {}
        for rows in reader.chunks(window, (IDENTITY_HASH, GITHUB_HASH, ENDED_AT, REFS)):
            for identity, github, ended, refs in rows:
                pair = identity, github
                pair = pairs.get(pair) or pairs.setdefault(pair, pair)
                if refs == "[]" or window.github not in (None, github is not None):
                    continue
                place = len(self.ended)
                self.ended.append(ended if len(ended) == 24 else ended[:19] + ".000Z")
                self.who.append(pair)
                for ref in refs_in(refs):
                    if ref in self.by_ref:
                        self.by_ref[ref].append(place)
                    else:
                        self.by_ref[ref] = [place]
        logins = logins_of(pairs)
        self.developers = {pair: pair[1] or logins.get(pair[0]) or pair[0] for pair in pairs}

    def trails(self) -> Iterator[Tuple[str, Trail]]:
        return ((ref, Touched(self, places)) for ref, places in self.by_ref.items())


class Touched(Trail):
    """A Trail made from `Touches`; what is not asked for is not made."""

    __slots__ = ("places", "touches")

    def __init__(self, touches: Touches, places: Sequence[int]) -> None:
        self.touches, self.places = touches, places
        self.ended = [touches.ended[place] for place in places]

    def __getattr__(self, name: str) -> Any:
        if name not in ("identities", "reached"):
            raise AttributeError(name)
        touches = self.touches
        first = {touches.who[place]: place for place in reversed(self.places)}
        self.identities = {identity for identity, _ in first}
        # The earliest comes last, and stays.
        self.reached = {touches.developers[pair]: touches.ended[place] for pair, place in sorted(
            first.items(), key=operator.itemgetter(1), reverse=True)}
        return getattr(self, name)


def discoveries(reader: Reader, window: Window, limit: int = 50, sort: str = "session_count",
                now: Optional[int] = None) -> Plain:
    """{"since", "until", "discoveries": [{"discovery_id", "first_seen_at", "last_seen_at",
    "session_count", "distinct_identity_count", "last_aggregated_at", "developer_count",
    "hours_to_second_developer" (None: it reached nobody else), "half_life_hours" (None: under 4
    sessions), "counts": sessions in each of SPARKS equal parts of the window} ...],
    "discoveries_in_window": n}, the first `limit` by `sort` (one of DISCOVERY_SORTS), all within
    the window; its `discovery` is not looked at."""
    touches = Touches(reader, window._replace(discovery=None))
    rank = DISCOVERY_SORTS[sort]
    chosen = heapq.nsmallest(limit, touches.trails(), key=lambda item: rank(*item))
    start, end = ends_of(window, now)
    if start is None:
        start = stored_instant(touches.ended[0]) or 0 if touches.ended else 0
    stamp = moment_text(now_ms())
    return dict(span(window), discoveries=[
        discovery_figures(name, trail, (start, end), stamp) for name, trail in chosen],
        discoveries_in_window=len(touches.by_ref))


def discovery(reader: Reader, ref: str, window: Window, limit: int = 200,
        now: Optional[int] = None) -> Plain:
    """How one discovery went round in the window: its figures as in `discoveries`, and "reached":
    [{"at", "developer", "session_id_hash"} ...] each developer's first session, "path":
    [{"session_id_hash", "developer", "ended_at", "crosses"} ...] in time order; both lists cut
    after `limit`. Raises NotFound when no session of the window touched it."""
    trail = Trail()
    reached: Dict[str, Session] = {}
    path: List[Session] = []
    window = window._replace(discovery=ref)
    sql, values = where(window)
    for s in reader.sessions("WHERE %s ORDER BY %s, e.id" % (sql, reader.order(window)), values,
                             reader.facts(window).logins):
        if ref not in s.refs:
            continue
        trail.ended.append(moment_text(s.ended))
        trail.reached.setdefault(s.developer, moment_text(s.ended))
        trail.identities.add(s.identity)
        reached.setdefault(s.developer, s)
        if len(path) < limit:
            path.append(s)
    if not path:
        raise NotFound("no session of this window touched this discovery")
    shown = labels(reached)
    start, end = ends_of(window, now)
    return dict(
        span(window),
        **discovery_figures(ref, trail, (path[0].ended if start is None else start, end),
        moment_text(now_ms())),
        reached=[{"at": moment_text(s.ended), "developer": shown[s.developer],
        "session_id_hash": s.session}
                 for s in list(reached.values())[:limit]],
        path=[{"session_id_hash": s.session, "developer": shown[s.developer],
               "ended_at": moment_text(s.ended), "crosses": s.developer != before.developer}
              for before, s in zip([path[0], *path], path)])


ACTIVE_DAYS = (1, 7, 28)


class Day:
    """The sums of one day, and who was there."""

    __slots__ = ("sessions", "tokens", "tools", "who")

    def __init__(self) -> None:
        self.sessions = self.tools = self.tokens = 0
        self.who: Set[str] = set()


Days = Dict[int, Day]  # by `datetime.date.toordinal`


def days_of(reader: Reader, window: Window) -> Days:
    """The window's sessions by day: in 40 MB, whatever the window."""
    sums: Dict[str, Day] = {}
    every: Set[Pair] = set()
    there: Dict[str, Set[Pair]] = {}
    for tally in reader.tallies(window):
        every |= tally.everybody
        if tally.sessions:
            day = sums.setdefault(tally.date, Day())
            day.sessions += tally.sessions
            day.tools += tally.tools
            day.tokens += tally.tokens
            there.setdefault(tally.date, set()).update(tally.here)
    logins = logins_of(every)
    who = {pair: pair[1] or logins.get(pair[0]) or pair[0] for pair in every}
    for date, pairs in there.items():
        sums[date].who = {who[pair] for pair in pairs}
    return {datetime.date.fromisoformat(date).toordinal(): day for date, day in sums.items()}


def activity(reader: Reader, window: Window, now: Optional[int] = None) -> Plain:
    """{"since", "until", "days": [P ...], "weeks": [P ...], "months": [P ...], "active":
    [{"days", "developers", "came_back"} ...], "before": {"since", "until", "days": [P ...]} or
    None}, P = {"period", "developers", "came_back", "sessions", "tool_count", "tokens_saved"}.

    `came_back` of a period: how many of its developers were there in the period before it, too
    (within the window); of the active: in as many days before. The active are counted to the end
    of the window, its last day included, which is listed even when it is empty. "before": as many
    days before the window."""
    now = now_ms() if now is None else now
    end = min(window.until, moment_text(now + 1))
    last_day = ((instant(end) or 1) - 1) // DAY_MS + EPOCH.toordinal()
    first_day = last_day - 2 * max(ACTIVE_DAYS) + 1
    previous = before_of(window, now)
    inside = days_of(reader, window)
    earlier = window._replace(since=moment_text((first_day - EPOCH.toordinal()) * DAY_MS),
        until=window.since)
    before = days_of(reader, earlier) if earlier.since < earlier.until else {}
    everybody = {day: (inside[day].who if day in inside else set()) | (
        before[day].who if day in before else set()) for day in {*inside, *before}}
    return dict(
        span(window), active=active(everybody, last_day), **periods(inside, last_day),
        before=previous and dict(span(previous), days=periods(days_of(reader, previous))["days"]))


def active(everybody: Mapping[int, Set[str]], last_day: int) -> List[Plain]:
    """Who was there in the last 1, 7, 28 days up to `last_day`; how many of them in as many days
    before."""
    def who(first: int, last: int) -> Set[str]:
        return set().union(*(everybody.get(day, ()) for day in range(first, last + 1)))

    spans = [(days, who(last_day - days + 1, last_day),
        who(last_day - 2 * days + 1, last_day - days))
             for days in ACTIVE_DAYS]
    return [{"days": days, "developers": len(here), "came_back": len(here & before)}
            for days, here, before in spans]


def week_name(day: int) -> str:
    year, week, _ = datetime.date.fromordinal(day).isocalendar()
    return "%04d-W%02d" % (year, week)


# its name, a day of the one before
PERIODS: Dict[str, Tuple[Callable[[int], str], Callable[[int], int]]] = {
    "days": (lambda day: datetime.date.fromordinal(day).isoformat(), lambda day: day - 1),
    "weeks": (week_name, lambda day: day - 7),
    "months": (lambda day: datetime.date.fromordinal(day).isoformat()[:7],
               lambda day: day - datetime.date.fromordinal(day).day),
}
FILLED_DAYS = 400  # empty periods are listed too, in a span of at most this many days


def periods(sums: Days, last_day: Optional[int] = None) -> Dict[str, List[Plain]]:
    """Days rolled up: {"days": [P ...], "weeks": ..., "months": ...} (see `activity`), in order,
    `last_day` among them."""
    days = sorted(sums.keys() | ({last_day} if last_day is not None else set()))
    if days and days[-1] - days[0] <= FILLED_DAYS:
        days = list(range(days[0], days[-1] + 1))
    rolled = {}
    for kind, (name, before) in PERIODS.items():
        totals: Dict[str, List[Any]] = {name(day): [set(), 0, 0, 0, name(max(1, before(day)))]
                                        for day in days}
        for number, day in sums.items():
            total = totals[name(number)]
            total[0] |= day.who
            total[1] += day.sessions
            total[2] += day.tools
            total[3] += day.tokens
        rolled[kind] = [
            {"period": period, "developers": len(who),
             "came_back": len(who & totals[previous][0]) if previous in totals
             and previous != period else 0,
             "sessions": count, "tool_count": tools, "tokens_saved": tokens}
            for period, (who, count, tools, tokens, previous) in totals.items()]
    return rolled


def exported(reader: Reader, window: Window) -> Iterator[Plain]:
    """Every session of the window, oldest first, one at a time: S with "developer" and
    "plugin_version".

    All labels have one length, the least at which no two developers of the window look alike."""
    ordered = sorted(reader.facts(window).developers)
    length = max([PREFIX, *(alike(a, b) + 1 for a, b in zip(ordered, ordered[1:]))])
    for s in reader.walk(window):
        yield dict(plain_session(s), developer=s.developer[:length], plugin_version=s.version)


# ==================================================================================================
# The graph (pure: sessions in, plain data out)
# ==================================================================================================


class Edge(NamedTuple):
    """Knowledge carried on: positions of two sessions in a list in time order, and the
    discoveries."""

    source: int
    target: int
    refs: Tuple[str, ...]


def edges_of(ordered: Sequence[Session], only: Optional[str] = None) -> List[Edge]:
    """For each discovery (or for `only` that one), an edge from each session that touched it to
    the next one that did; edges between the same two are one edge. `ordered` is in time order; so
    are the edges, by target."""
    last: Dict[str, int] = {}
    carried: Dict[Tuple[int, int], List[str]] = {}
    for target, s in enumerate(ordered):
        for ref in s.refs if only is None else {only}.intersection(s.refs):
            source = last.get(ref)
            if source is not None:
                carried.setdefault((source, target), []).append(ref)
            last[ref] = target
    return [Edge(source, target, tuple(refs)) for (source, target), refs in carried.items()]


def node_ids(ordered: Sequence[Session]) -> List[str]:
    """What names each node: its session's hash, with "-2" where a second machine or quarter has
    the same."""
    seen: Dict[str, int] = {}
    names = []
    for s in ordered:
        seen[s.session] = seen.get(s.session, 0) + 1
        names.append(s.session if seen[s.session] == 1 else "%s-%d" % (s.session, seen[s.session]))
    return names


def graph_of(ordered: Sequence[Session], only: Optional[str] = None) -> Plain:
    """The session graph of sessions in time order (see `graph` for the shape), or `only` one
    discovery's."""
    shown = labels(s.developer for s in ordered)
    names = node_ids(ordered)
    found = edges_of(ordered, only)
    who = [s.developer for s in ordered]
    flows: Dict[Tuple[str, str], List[int]] = {}
    hand_overs = 0
    for edge in found:
        flow = flows.setdefault((shown[who[edge.source]], shown[who[edge.target]]), [0, 0])
        flow[0] += 1
        flow[1] += len(edge.refs)
        hand_overs += len(edge.refs) if who[edge.source] != who[edge.target] else 0
    return {
        "nodes": [dict(id=name, developer=shown[s.developer], **plain_session(s))
                  for name, s in zip(names, ordered)],
        "edges": [{"source": names[e.source], "target": names[e.target],
        "discoveries": list(e.refs),
                   "crosses": who[e.source] != who[e.target]} for e in found],
        "developers": [{"source": a, "target": b, "edges": edges, "discoveries": refs,
        "crosses": a != b}
                       for (a, b), (edges, refs) in sorted(flows.items(),
                               key=lambda f: (-f[1][1], f[0]))],
        "totals": {"sessions": len(ordered), "developers": len(shown),
                   "tool_count": sum(s.tools for s in ordered),
                   "tokens_saved": sum(s.tokens for s in ordered),
                   "discoveries": len({ref for s in ordered for ref in s.refs
                   if only in (None, ref)}),
                   "hand_overs": hand_overs},
    }


def graph(reader: Reader, window: Window, limit: int = DRAWN) -> Plain:
    """The session graph of the newest `limit` sessions of a window (negative: of all):

    {"since", "until", "total_count_in_window", "nodes": [S with "id" and "developer" ...] oldest
    first, "edges": [{"source", "target" (node ids), "discoveries", "crosses": from one developer
    to another} ...], "developers": [{"source", "target" (developers), "edges", "discoveries" (how
    often one was carried), "crosses"} ...] most carried first, "totals": {"sessions",
    "developers", "tool_count", "tokens_saved", "discoveries", "hand_overs": how often a discovery
    went from one developer to another}}."""
    newest = reader.window(window, limit)
    return dict(span(window), total_count_in_window=reader.count(window),
                **graph_of(newest[::-1], window.discovery))


# ==================================================================================================
# Renderers: text, CSV, DOT (pure: plain data in, text out)
# ==================================================================================================

COLUMNS_OF_A_TERMINAL = 80
UNSEEN = re.compile(r"[^ -~]")


def visible(text: str) -> str:
    """The text with everything but printable ASCII as \\u escapes. All that the contract allows
    comes out as it is; what else a stranger's row can hold (terminal commands, right-to-left
    marks) loses its power."""
    return UNSEEN.sub(lambda match: match.group().encode("unicode_escape").decode(), text)


def fit(text: str, width: int) -> str:
    return text if len(text) <= width else text[:max(0, width - 3)] + "..."


def minute(moment: Optional[str]) -> str:
    return "-" if moment is None else moment[:16].replace("T", " ")


def refs_cell(refs: Sequence[str], width: int = 20) -> str:
    first = fit(visible(refs[0]), width) if refs else "-"
    return first + (" +%d" % (len(refs) - 1) if len(refs) > 1 else "")


class Column(NamedTuple):
    """One column of a text table: numbers stand right; the `elastic` one gives way to the line's
    length."""

    title: str
    cell: Callable[[Plain], Any]
    elastic: bool = False


def text_table(columns: Sequence[Column], rows: Sequence[Plain]) -> str:
    values = [[column.cell(row) for column in columns] for row in rows]
    cells = [["{:,}".format(v) if isinstance(v, int) else visible(str(v)) for v in line]
        for line in values]
    widths = [max(map(len, column)) for column in zip([c.title for c in columns], *cells)]
    right = [any(isinstance(line[i], int) for line in values) for i in range(len(columns))]
    for i, column in enumerate(columns):
        if column.elastic:
            others = sum(widths) - widths[i] + 2 * (len(widths) - 1)
            widths[i] = max(len(column.title), min(widths[i], COLUMNS_OF_A_TERMINAL - others))
    lines = []
    for line in [[c.title for c in columns], *cells]:
        padded = [(fit(cell, w).rjust if r else fit(cell, w).ljust)(w)
                  for cell, w, r in zip(line, widths, right)]
        lines.append("  ".join(padded).rstrip() + "\n")
    return "".join(lines)


ENDED = Column("ended (UTC)", lambda row: minute(row["ended_at"]))
SESSION = Column("session", lambda row: row["session_id_hash"][:12])
DEVELOPER = Column("developer", lambda row: row["developer"])
SESSION_COLUMNS = (
    ENDED, SESSION, DEVELOPER,
    Column("calls", lambda row: row["tool_count"]),
    Column("saved", lambda row: row["tokens_saved"]),
    Column("discoveries", lambda row: refs_cell(row["discovery_refs"], 128), elastic=True),
)
DISCOVERY_COLUMNS = (
    Column("discovery", lambda row: row["discovery_id"], elastic=True),
    Column("reach", lambda row: row["developer_count"]),
    Column("sessions", lambda row: row["session_count"]),
    Column("to 2nd", lambda row: lasting(row["hours_to_second_developer"])),
    Column("half-life", lambda row: lasting(row["half_life_hours"])),
    Column("last seen", lambda row: minute(row["last_seen_at"])[:10]),
    Column("over time", lambda row: sparkline(row["counts"])),
)
DEVELOPER_COLUMNS = (
    DEVELOPER,
    Column("sessions", lambda row: row["sessions"]),
    Column("calls", lambda row: row["tool_count"]),
    Column("saved", lambda row: row["tokens_saved"]),
    Column("given", lambda row: row["given"]),
    Column("received", lambda row: row["received"]),
    Column("alone first", lambda row: (
        "never built" if row["sessions_before_inherited"] is None
        else row["sessions_before_inherited"])),
    Column("new", lambda row: "new" if row["new"] else ""),
)
MATRIX_COLUMNS = (
    Column("from", lambda row: row["source"]),
    Column("to", lambda row: row["target"]),
    Column("hand-overs", lambda row: row["hand_overs"]),
)
FLOW_COLUMNS = (
    Column("from", lambda row: row["source"]),
    Column("to", lambda row: row["target"]),
    Column("discoveries", lambda row: row["discoveries"]),
    Column("sessions", lambda row: row["edges"]),
)
REACHED_COLUMNS = (Column("reached (UTC)", lambda row: minute(row["at"])), DEVELOPER, SESSION)
PATH_COLUMNS = (ENDED, SESSION, DEVELOPER,
                Column("", lambda row: "from another developer" if row["crosses"] else ""))


SPARK_DIGITS = " .:-=+*#"


def sparkline(counts: Sequence[int]) -> str:
    """Pairs of counts as characters, the darker the more; neighbours are added up to fit a line."""
    pairs = [a + b for a, b in zip(counts[::2], counts[1::2])]
    most = max(pairs) or 1
    return "".join(SPARK_DIGITS[math.ceil(n * (len(SPARK_DIGITS) - 1) / most)]
        for n in pairs).rstrip()


def lasting(length: Optional[float]) -> str:
    """A number of hours for people: in minutes, hours or days."""
    if length is None:
        return "-"
    if length < 1:
        return "%d min" % round(length * 60)
    return "%.0f h" % length if length < 48 else "%.0f days" % (length / 24)


def period_columns(rows: Sequence[Plain]) -> Tuple[Column, ...]:
    most = max((row["sessions"] for row in rows), default=0) or 1
    return (
        Column("period", lambda row: row["period"]),
        Column("developers", lambda row: row["developers"]),
        Column("came back", lambda row: row["came_back"]),
        Column("sessions", lambda row: row["sessions"]),
        Column("calls", lambda row: row["tool_count"]),
        Column("saved", lambda row: row["tokens_saved"]),
        Column("", lambda row: "#" * math.ceil(16 * row["sessions"] / most), elastic=True),
    )


def sessions_text(result: Plain) -> str:
    shown, total = len(result["sessions"]), result["total_count_in_window"]
    more = "\nthe newest {:,} of {:,}; --limit shows more\n".format(shown,
        total) if total > shown else ""
    return text_table(SESSION_COLUMNS, result["sessions"]) + more


def session_text(result: Plain) -> str:
    s = result["session"]
    lines = [("session", s["session_id_hash"]), ("developer", s["developer"]),
             ("with GitHub", "yes" if s["github_hash_prefix"] else "no"), ("ended", s["ended_at"]),
             ("tool calls", digits(s["tool_count"])), ("tokens saved", digits(s["tokens_saved"])),
             ("branch", s["branch_sha"] or "-")]
    lines += [("" if i else "discoveries", fit(visible(ref), 64))
              for i, ref in enumerate(s["discovery_refs"])]
    text = "".join("%-13s %s\n" % line for line in lines)
    if not result["related"]:
        return text + "\nno other session of this identity in the last %d days\n" % RELATED_DAYS
    return text + "\nthe same identity, last %d days\n" % RELATED_DAYS + text_table(SESSION_COLUMNS,
                                                                                    result["related"])


def discovery_text(result: Plain) -> str:
    text = "%s\n%s to %s: %s sessions, %s developers\n" % (
        fit(visible(result["discovery_id"]), COLUMNS_OF_A_TERMINAL),
            minute(result["first_seen_at"]),
        minute(result["last_seen_at"]), digits(result["session_count"]),
            digits(result["developer_count"]))
    second, half = result["hours_to_second_developer"], result["half_life_hours"]
    text += "it reached no second developer\n" if second is None else (
        "it reached a second developer within %s\n" % lasting(second))
    text += "" if half is None else "half of its sessions ended within %s\n" % lasting(half)
    text += "\n" + text_table(REACHED_COLUMNS, result["reached"])
    text += "\n" + text_table(PATH_COLUMNS, result["path"])
    if result["session_count"] > len(result["path"]):
        text += "\nthe first {:,} steps of {:,}\n".format(len(result["path"]),
            result["session_count"])
    return text


def discoveries_text(result: Plain) -> str:
    shown, every = len(result["discoveries"]), result["discoveries_in_window"]
    text = text_table(DISCOVERY_COLUMNS, result["discoveries"])
    text += "\nreach: developers with a session that touched it; to 2nd: from its first session\n"
    text += "to the first of a second developer; half-life: until half of its sessions ended\n"
    return text + ("\n{:,} of {:,}; --limit shows more\n".format(shown, every) if every > shown
        else "")


def developers_text(result: Plain) -> str:
    text = text_table(DEVELOPER_COLUMNS, result["developers"])
    text += "\ngiven, received: hand-overs of a discovery to and from other developers;\n"
    text += "alone first: own sessions before the first that built on others;\n"
    text += "new: not there in as many days before the window\n"
    flows = result["matrix"]
    if flows:
        text += "\nwho hands over to whom\n" + text_table(MATRIX_COLUMNS, flows[:FLOWS_SHOWN])
    else:
        text += "\nno discovery went from one developer to another\n"
    if len(flows) > FLOWS_SHOWN:
        text += "and {:,} more; --format json has all\n".format(len(flows) - FLOWS_SHOWN)
    return text


def some(count: int, thing: str, things: str = "") -> str:
    return "%s %s" % (digits(count), thing if count == 1 else things or thing + "s")


def findings(figures: Plain) -> List[str]:
    """What a window's figures (see `summary`) say, a sentence each."""
    if not figures["sessions"]:
        return ["No session ended in this window."]
    shared, far = figures["shared_discoveries"], figures["furthest"]
    wait, built = figures["hours_to_second_developer"], figures["built_on_others"]
    saved, cold = figures["tokens_saved_median"], figures["cold_start"]
    if not figures["discoveries"]:
        lines = ["No session touched a discovery."]
    elif not shared:
        lines = ["No discovery reached a second developer."]
    else:
        lines = ["%s of %s reached a second developer, half of them within %s." % (
                     digits(shared), some(figures["discoveries"], "discovery", "discoveries"),
                         lasting(wait)),
                 "%s went furthest: %s of %s in %s." % (
                     far["discovery_id"], digits(far["developers"]),
                     some(figures["developers"], "developer"),
                     lasting(far["hours"]))]
    if not built["sessions"]:
        lines.append("No session built on somebody else's discovery.")
    else:
        rest = "" if saved["others"] is None else ", the others {:,.0f}".format(saved["others"])
        lines.append("{:.0f} % of sessions built on somebody else's discovery. Together with that they saved"
                     " {:,.0f} tokens (median){}.".format(100 * built["share"],
                     saved["built_on_others"], rest))
    if cold["developers"]:
        lines.append("%s: %s." % (some(cold["developers"], "new developer"),
            "none built on others" if (
            cold["sessions"] is None)
            else "%g own sessions (median) before the first that built on others%s" % (
                cold["sessions"], ", %d never did" % cold["never"] if cold["never"] else "")))
    return lines


SUMMARY_ROWS: Tuple[Tuple[str, Callable[[Plain], str]], ...] = (
    ("sessions", lambda f: digits(f["sessions"])),
    ("developers", lambda f: digits(f["developers"])),
    ("tool calls", lambda f: digits(f["tool_count"])),
    ("tokens saved", lambda f: digits(f["tokens_saved"])),
    ("discoveries", lambda f: digits(f["discoveries"])),
    ("  that reached a 2nd developer", lambda f: digits(f["shared_discoveries"])),
    ("  time until they did (median)", lambda f: lasting(f["hours_to_second_developer"])),
    ("hand-overs", lambda f: digits(f["hand_overs"])),
    ("sessions built on others", lambda f: digits(f["built_on_others"]["sessions"])),
    ("  share of all sessions", lambda f: percent(f["built_on_others"]["share"])),
    ("  tokens saved together with that", lambda f: median_text(
    f["tokens_saved_median"]["built_on_others"])),
    ("  tokens saved by the others", lambda f: median_text(f["tokens_saved_median"]["others"])),
    ("new developers", lambda f: digits(f["cold_start"]["developers"])),
    ("  own sessions before they built", lambda f: median_text(f["cold_start"]["sessions"])),
    ("  never built on others", lambda f: digits(f["cold_start"]["never"])),
)


def percent(share: Optional[float]) -> str:
    return "-" if share is None else "%.0f %%" % (100 * share)


def median_text(value: Optional[float]) -> str:
    return "-" if value is None else "{:,g}".format(value)


def summary_text(result: Plain) -> str:
    """The findings in words, then the window and the one before it side by side."""
    before = result["before"]
    until = minute(result["until"]) if result["until"] else "now"
    text = "Sessions from %s to %s (UTC)\n\n" % (minute(result["since"]) or "the start", until)
    text += "\n".join(textwrap.fill(line, COLUMNS_OF_A_TERMINAL)
        for line in findings(result)) + "\n\n"
    text += "%-36s %14s %s\n" % ("", "this window", "%14s" % "the one before" if before else "")
    for name, cell in SUMMARY_ROWS:
        text += ("%-36s %14s %14s" % (name, cell(result),
            cell(before) if before else "")).rstrip() + "\n"
    return text + (
        "\nBuilt on others: a session with a discovery that another developer's session,\n"
        "ended earlier in the window, had touched. The figures say what came together,\n"
        "not what caused it. A developer is a GitHub hash, or else the hash of a machine.\n")


FLOWS_SHOWN = 20


def graph_text(result: Plain) -> str:
    totals = result["totals"]
    flows = [flow for flow in result["developers"] if flow["crosses"]]
    text = "".join("%-16s %12s\n" % (name, "{:,}".format(totals[key])) for name, key in COUNTERS)
    if result["total_count_in_window"] > totals["sessions"]:
        text += "\nof the newest {:,} sessions of {:,}; --limit takes more\n".format(
            totals["sessions"], result["total_count_in_window"])
    if flows:
        text += "\nfrom developer to developer\n" + text_table(FLOW_COLUMNS, flows[:FLOWS_SHOWN])
    if len(flows) > FLOWS_SHOWN:
        text += "and {:,} more; --format json has all\n".format(len(flows) - FLOWS_SHOWN)
    return text


def activity_text(result: Plain) -> str:
    active_lines = ["last %2d days   %9s developers, %9s came back\n" % (
        row["days"], digits(row["developers"]), digits(row["came_back"]))
        for row in result["active"]]
    tables = [text_table(period_columns(result[kind]), result[kind]) for kind in PERIODS]
    before = result["before"]
    if before:
        active_lines.append("in this window %s sessions, in as many days before %s\n" % tuple(
            digits(sum(day["sessions"] for day in days))
                for days in (result["days"], before["days"])))
    return "".join(active_lines) + "\n" + "\n".join(tables)


FORMULA = re.compile(r"[=+\-@]")  # what makes a spreadsheet compute a cell


def csv_cell(value: object) -> object:
    if isinstance(value, list):
        value = " ".join(map(str, value))
    if not isinstance(value, str):
        return value
    shown = visible(value)
    return "'" + shown if FORMULA.match(shown) else shown


def csv_text(rows: Iterable[Plain], header: bool = True) -> str:
    """CSV with a header line; a list is one cell, its items parted by blanks."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for row in rows:
        if header:
            writer.writerow(row)
            header = False
        writer.writerow(map(csv_cell, row.values()))
    return out.getvalue()


def json_text(result: Plain) -> str:
    return json.dumps(result, indent=2) + "\n"


compact_json = json.JSONEncoder(separators=(",", ":")).encode


def jsonl_text(rows: Iterable[Plain]) -> str:
    return "".join(compact_json(row) + "\n" for row in rows)


def dot_string(text: str) -> str:
    return '"' + visible(text).replace("\\", "\\\\").replace('"', '\\"') + '"'


def dot_text(result: Plain) -> str:
    """The graph for Graphviz (`dot -Tsvg`): a box of sessions for each developer, hand-overs in
    orange."""
    boxes: Dict[str, List[Plain]] = {}
    for node in result["nodes"]:
        boxes.setdefault(node["developer"], []).append(node)
    lines = ["digraph sessions {",
             "  rankdir=LR; node [shape=circle fontsize=9]; edge [fontsize=8 color=gray60]"]
    for developer, nodes in boxes.items():
        lines.append("  subgraph %s { label=%s" % (dot_string("cluster_" + developer),
            dot_string(developer)))
        lines += ["    %s [label=%s]" % (dot_string(n["id"]),
            dot_string(n["session_id_hash"][:PREFIX]))
                  for n in nodes]
        lines.append("  }")
    for edge in result["edges"]:
        label = ", ".join(edge["discoveries"][:2]) + (", ..." if edge["discoveries"][2:] else "")
        color = ' color="#d55e00" penwidth=2' if edge["crosses"] else ""
        lines.append("  %s -> %s [label=%s%s]" % (dot_string(edge["source"]),
            dot_string(edge["target"]),
                                                  dot_string(label), color))
    return "\n".join(lines) + "\n}\n"


# ======================================================================================================
# Renderers: HTML (pure). Every value goes through `esc`; nothing on a page comes from elsewhere
# ======================================================================================================

STYLE = """
:root { color-scheme: light dark; --paper: #f6f6f3; --card: #ffffff; --ink: #1b2430; --soft: #5a6675;
  --line: #e2e4e2; --disc: #1f6fb2; --own: #8fa6bb; --cross: #d55e00; --lit: #1b2430; }
@media (prefers-color-scheme: dark) { :root { --paper: #0f1318; --card: #171d25; --ink: #e8ecf1;
  --soft: #9aa7b6; --line: #29313c; --disc: #63b3f4; --own: #55708a; --cross: #ff9a3c; --lit: #ffffff; } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, -apple-system,
  "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
.wrap { max-width: 1880px; margin: 0 auto; padding: 0 clamp(12px, 2vw, 36px) 40px }
header { display: flex; flex-wrap: wrap; align-items: baseline; gap: 4px 28px; padding: 16px 0 12px }
header b { font-size: 17px; letter-spacing: -.01em }
nav { display: flex; flex-wrap: wrap; gap: 2px 18px }
nav a { color: var(--soft); text-decoration: none; padding: 3px 0; border-bottom: 2px solid transparent }
nav a[aria-current] { color: var(--ink); border-color: var(--cross) }
a { color: var(--disc) }
a:focus-visible, button:focus-visible, input:focus-visible, select:focus-visible, summary:focus-visible {
  outline: 2px solid var(--cross); outline-offset: 2px }
h1 { font-size: 21px; line-height: 1.3; letter-spacing: -.01em; margin: 10px 0 2px; overflow-wrap: anywhere }
h1.m { font-size: 15px; white-space: normal; margin-bottom: 10px }
h2 { font-size: 16px; margin: 28px 0 8px }
p { margin: 4px 0 12px; max-width: 75ch }
.note { color: var(--soft) }
form { display: flex; flex-wrap: wrap; gap: 8px 14px; align-items: end; padding: 0 0 14px; font-size: 13px }
form label { display: grid; gap: 2px; color: var(--soft) }
input, select, button { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line);
  border-radius: 7px; padding: 5px 9px; min-height: 34px; max-width: 100% }
button { cursor: pointer; font-weight: 600 }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 14px 16px;
  margin: 0 0 14px }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(128px, 1fr)); gap: 10px;
  margin: 12px 0 14px }
.tiles div { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 9px 14px 10px }
.tiles dt { color: var(--soft); font-size: 13px }
.tiles dd { margin: 0; font-size: 23px; line-height: 1.25; font-weight: 650; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums }
.tiles dd small { font-size: 13px; font-weight: 400; letter-spacing: 0; color: var(--soft) }
.controls { display: none; align-items: center; flex-wrap: wrap; gap: 8px 12px; margin-bottom: 10px }
.live .controls { display: flex }
.controls button { min-width: 82px; background: var(--disc); border-color: var(--disc); color: var(--card) }
.controls input { flex: 1 1 220px; padding: 0; min-width: 120px; accent-color: var(--disc); border: 0 }
.controls output { font-variant-numeric: tabular-nums; min-width: 10.5em; font-weight: 600 }
.stage { overflow-x: auto }
#chart { display: block; width: 100%; min-width: 760px; height: auto }
.live #chart { min-width: 0 }
#panel .note { font-size: 14px }
#chart text { fill: var(--soft);
  font: 11px ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace }
#lanes line { stroke: var(--line) }
#ticks line { stroke: var(--line); stroke-dasharray: 2 4 }
#ticks text { text-anchor: middle }
#now { stroke: var(--cross); stroke-width: 1.5 }
#arcs { fill: none; pointer-events: none }
#arcs path { stroke: var(--own); stroke-width: 1.1; stroke-dasharray: 3 3; opacity: .75 }
#arcs .x { stroke: var(--cross); stroke-width: 1.5; stroke-dasharray: none; opacity: .62 }
.dense #arcs path { opacity: .28; stroke-width: .8 }
.dense #arcs .x { opacity: .3 }
#discs circle { fill: var(--card); stroke: var(--disc); stroke-width: 1.8; transition: opacity .25s }
#discs .g { fill: var(--disc); fill-opacity: .82; stroke: var(--card); stroke-width: 1 }
#discs a { cursor: pointer; outline: none }
#discs .later { opacity: .12; pointer-events: none }
#arcs .later { display: none }
.lit #arcs path { opacity: .06 }
.lit #arcs .on { opacity: 1; stroke-width: 2.2 }
.lit #discs a:not(.on) { opacity: .16 }
#discs .at circle { stroke: var(--lit); stroke-width: 2.5; fill-opacity: 1 }
.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; color: var(--soft); font-size: 13px;
  margin-top: 8px }
.legend span { display: inline-flex; align-items: center; gap: 7px }
.legend svg { overflow: visible }
.legend circle { fill: none; stroke: var(--disc); stroke-width: 1.8 }
.legend .g { fill: var(--disc) }
.legend line { stroke: var(--own); stroke-width: 1.5; stroke-dasharray: 3 3 }
.legend .x { stroke: var(--cross); stroke-width: 2; stroke-dasharray: none }
#panel { display: none; min-height: 84px; margin-bottom: 6px }
.live #panel { display: block }
#panel strong { font-weight: 650 }
.chips { display: flex; flex-wrap: wrap; gap: 6px; margin: 6px 0 0; padding: 0; list-style: none }
.chips li { max-width: 100% }
.chips a, .chips span { display: inline-block; border: 1px solid var(--line); border-radius: 99px;
  padding: 1px 11px; font-size: 13px; text-decoration: none; overflow-wrap: anywhere }
.scroll { overflow-x: auto; margin-top: 18px }
table { border-collapse: collapse; min-width: min(100%, 620px); font-variant-numeric: tabular-nums }
caption { text-align: left; color: var(--soft); padding: 0 0 6px }
th { text-align: left; font-weight: 600; font-size: 13px; color: var(--soft); white-space: nowrap }
th, td { padding: 5px 18px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top }
td { overflow-wrap: anywhere }
.n { text-align: right; white-space: nowrap; overflow-wrap: normal }
.m { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 13px;
  white-space: nowrap }
.d { min-width: 180px }
.bar { width: 50vw; min-width: 60px; padding-right: 0 }
.bar svg { display: block; width: 100%; height: 16px; margin-top: 3px }
.bar rect { fill: var(--disc) }
summary { cursor: pointer }
dl.facts { display: grid; grid-template-columns: max-content 1fr; gap: 3px 22px; margin: 0 }
dl.facts dt { color: var(--soft) }
dl.facts dd { margin: 0; overflow-wrap: anywhere }
.skip { position: absolute; left: -999px }
.skip:focus { left: 12px; top: 8px; background: var(--card); padding: 4px 10px }
@media (max-width: 640px) {
  form { display: grid; grid-template-columns: 1fr 1fr }
  form input, form select { width: 100% }
  .wide { display: none }
  th, td { padding-right: 12px }
  .tiles { grid-template-columns: 1fr 1fr 1fr; gap: 6px }
  .tiles div { padding: 6px 9px }
  .tiles dd { font-size: 18px }
  .card { padding: 10px 11px }
  dl.facts { grid-template-columns: 1fr; gap: 0 }
  dl.facts dd { margin-bottom: 7px }
}
@media (prefers-reduced-motion: reduce) { * { transition: none !important } }
"""

SCRIPT = r"""
"use strict";
(() => {
  const $ = id => document.getElementById(id);
  const D = JSON.parse($("data").textContent), S = D.sessions, E = D.edges;
  const chart = $("chart"), slider = $("slider"), play = $("play"), speed = $("speed"), panel = $("panel");
  const links = [...chart.querySelectorAll("#discs a")], arcs = [...chart.querySelectorAll("#arcs path")];
  const discs = links.map(a => a.firstElementChild), radii = discs.map(disc => disc.r.baseVal.value);
  const lanes = [...chart.querySelectorAll("#lanes line")];
  const ticks = [...chart.querySelectorAll("#ticks g")], hint = panel.innerHTML;
  const number = n => n.toLocaleString("en-US");
  const clock = t => new Date(D.start + t).toISOString();

  // What the counters say after the first n sessions, and how many arcs there are by then.
  const totals = [[0, 0, 0, 0, 0]], arcsBy = [0], developers = new Set(), refs = new Set();
  S.forEach((s, i) => {
    const last = totals[i];
    developers.add(s[1]);
    s[4].forEach(ref => refs.add(ref));
    totals.push([i + 1, developers.size, last[2] + s[3], refs.size, last[4] + s[5]]);
    let n = arcsBy[i];
    while (n < E.length && E[n][1] <= i) n++;
    arcsBy.push(n);
  });
  const arcsOf = new Map();
  E.forEach((e, j) => e[2].forEach(ref => arcsOf.has(ref) ? arcsOf.get(ref).push(j) : arcsOf.set(ref, [j])));

  // The moment.
  let moment = D.span, sessions = S.length, written = 0, frame = 0, before = 0;
  const endedBy = t => {
    let low = 0, high = S.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (S[middle][0] <= t) low = middle + 1; else high = middle;
    }
    return low;
  };
  const reveal = (items, from, to) => {
    for (let i = from; i < to; i++) items[i].classList.remove("later");
    for (let i = to; i < from; i++) items[i].classList.add("later");
  };
  const show = t => {
    moment = Math.min(D.span, Math.max(0, t));
    const n = endedBy(moment), text = clock(moment);
    reveal(links, sessions, n);
    reveal(arcs, arcsBy[sessions], arcsBy[n]);
    sessions = n;
    totals[n].forEach((value, i) => { $("count" + i).textContent = number(value); });
    slider.value = moment;
    slider.setAttribute("aria-valuetext", text.slice(0, 16).replace("T", " ") + " UTC, " + n + " sessions");
    $("moment").textContent = text.slice(0, 16).replace("T", " ") + " UTC";
    $("now").setAttribute("x1", x(moment));
    $("now").setAttribute("x2", x(moment));
  };
  const write = () => { written = Date.now(); history.replaceState(null, "", "#t=" + clock(moment)); };
  const read = () => {
    const match = /^#t=(\d{4}-\d\d-\d\dT[\d:.]+Z)$/.exec(location.hash);
    const t = match ? Date.parse(match[1]) : NaN;
    if (!isNaN(t)) { stop(); show(t - D.start); }
  };
  const stop = () => {
    if (frame) cancelAnimationFrame(frame);
    frame = 0;
    play.textContent = "Play";
  };
  const tick = time => {
    const all = 40000;  // ms for the whole window at speed 1
    const passed = Math.min(250, time - before);  // a page that was out of sight goes on where it was
    show(moment + passed / all * D.span * Number(speed.value));
    before = time;
    if (Date.now() - written > 500) write();  // browsers refuse more than some hundred in half a minute
    if (moment < D.span) frame = requestAnimationFrame(tick);
    else { stop(); write(); }
  };
  const toggle = () => {
    if (frame) { stop(); write(); return; }
    if (moment >= D.span) show(0);
    play.textContent = "Pause";
    before = performance.now();
    frame = requestAnimationFrame(tick);
  };
  const go = t => { stop(); show(t); write(); };
  const step = by => {
    const n = Math.min(S.length, Math.max(1, by > 0 ? sessions + 1 : S.length && endedBy(moment - 1)));
    go(S[n - 1][0]);
  };
  const faster = by => {
    speed.selectedIndex = Math.min(speed.length - 1, Math.max(0, speed.selectedIndex + by));
  };

  // Geometry: the still picture's, with the width that there is. The same formulas as in `figure`.
  let width = D.width, left = D.left;
  const x = t => Math.round((left + t / D.span * (width - left - D.right)) * 10) / 10;
  const y = lane => D.top + (lane + 0.5) * D.lane;
  const arc = (a, b) => {
    const x1 = x(a[0]), x2 = x(b[0]), y1 = y(a[1]), y2 = y(b[1]), run = x2 - x1;
    if (a[1] === b[1])
      return `M${x1} ${y1}Q${(x1 + x2) / 2} ${y1 - Math.min(D.lane * 1.1, 8 + run / 2)} ${x2} ${y2}`;
    const bend = Math.max(12, run / 2);
    return `M${x1} ${y1}C${x1 + bend} ${y1} ${x2 - bend} ${y2} ${x2} ${y2}`;
  };
  const layout = () => {
    const room = Math.round(chart.parentNode.clientWidth);
    if (room === width || !room) return;
    width = room;
    left = Math.min(D.left, Math.max(70, width * 0.1));
    chart.setAttribute("viewBox", `0 0 ${width} ${D.height}`);
    const scale = Math.min(1, Math.max(0.45, width / 1000));
    S.forEach((s, i) => {
      discs[i].setAttribute("cx", x(s[0]));
      discs[i].setAttribute("r", Math.max(1.5, radii[i] * scale));
    });
    E.forEach((e, j) => arcs[j].setAttribute("d", arc(S[e[0]], S[e[1]])));
    lanes.forEach(line => { line.setAttribute("x1", left); line.setAttribute("x2", width); });
    let free = left - 30;
    ticks.forEach((tick, i) => {
      const at = x(D.ticks[i]), fits = at - 28 >= free && at < width - 26;
      tick.firstElementChild.setAttribute("x1", at);
      tick.firstElementChild.setAttribute("x2", at);
      tick.lastElementChild.setAttribute("x", at);
      tick.lastElementChild.setAttribute("visibility", fits ? "visible" : "hidden");
      if (fits) free = at + 34;
    });
    show(moment);
  };

  // One session: what it knew, where that went, what it was.
  let lit = -1;
  const unlight = () => {
    if (lit < 0) return;
    lit = -1;
    chart.classList.remove("lit");
    chart.querySelectorAll(".on, .at").forEach(item => item.classList.remove("on", "at"));
    panel.innerHTML = hint;
  };
  const light = i => {
    if (i === lit) return;
    unlight();
    lit = i;
    const went = new Set(), into = new Set();
    S[i][4].forEach(ref => (arcsOf.get(ref) || []).forEach(j => { if (E[j][0] >= i) went.add(j); }));
    E.forEach((e, j) => { if (e[1] === i) into.add(j); });
    [...went, ...into].forEach(j => {
      arcs[j].classList.add("on");
      links[E[j][0]].classList.add("on");
      links[E[j][1]].classList.add("on");
    });
    links[i].classList.add("on", "at");
    chart.classList.add("lit");
    describe(i, went, into);
  };
  const element = (name, text, parent) => {
    const made = parent.appendChild(document.createElement(name));
    made.textContent = text;
    return made;
  };
  const describe = (i, went, into) => {
    const s = S[i], reached = new Set([...went].map(j => S[E[j][1]][1]));
    reached.delete(s[1]);
    panel.textContent = "";
    const line = panel.appendChild(document.createElement("div"));
    element("strong", D.developers[s[1]], line);
    const some = (n, thing) => `${number(n)} ${thing}${n === 1 ? "" : "s"}`;
    line.append(` ended ${clock(s[0]).slice(0, 16).replace("T", " ")} UTC: ${some(s[2], "tool call")}, ` +
      `${some(s[3], "token")} saved. ` + (s[4].length ? `Built on ${some(into.size, "earlier session")}; ` +
      `what it touched went on to ${some(reached.size, "other developer")}.` : "No discoveries."));
    const chips = panel.appendChild(document.createElement("ul"));
    chips.className = "chips";
    s[4].slice(0, 40).forEach(ref => {
      const chip = element(D.links ? "a" : "span", D.refs[ref], element("li", "", chips));
      if (D.links) chip.href = "/discovery?ref=" + encodeURIComponent(D.names[ref] || D.refs[ref]);
    });
    if (s[4].length > 40) element("li", `and ${s[4].length - 40} more`, chips);
  };

  // Pointing, touching, keys.
  const index = new Map(links.map((a, i) => [a, i]));
  const nearest = event => {
    const box = chart.getBoundingClientRect(), scale = width / box.width;
    const px = (event.clientX - box.left) * scale, py = (event.clientY - box.top) * scale;
    let best = -1, least = 20;
    for (let i = 0; i < sessions; i++) {
      const distance = Math.hypot(x(S[i][0]) - px, y(S[i][1]) - py);
      if (distance < least) { least = distance; best = i; }
    }
    return best;
  };
  let touched = false;
  const focused = () => index.has(document.activeElement) ? index.get(document.activeElement) : -1;
  const rest = () => { if (focused() >= 0) light(focused()); else unlight(); };
  const stops = i => { links.forEach((a, k) => a.setAttribute("tabindex", k === i ? "0" : "-1")); };
  chart.addEventListener("pointermove", event => {
    if (event.pointerType === "touch") return;
    const i = nearest(event);
    if (i >= 0) light(i); else rest();
  });
  chart.addEventListener("pointerleave", event => { if (event.pointerType !== "touch") rest(); });
  chart.addEventListener("pointerdown", event => { touched = event.pointerType === "touch"; });
  chart.addEventListener("click", event => {
    const direct = index.get(event.target.closest("a")), i = direct === undefined ? nearest(event) : direct;
    if (i < 0) { unlight(); return; }
    const first = touched && i !== lit;  // a finger cannot point: its first touch does
    if (first || !D.links) event.preventDefault();
    light(i);
    if (!first && D.links && direct === undefined) location.href = links[i].href.baseVal;
  });
  chart.addEventListener("focusin", event => {
    const i = index.get(event.target);
    if (i !== undefined) { stops(i); light(i); }
  });
  chart.addEventListener("focusout", unlight);
  chart.addEventListener("keydown", event => {
    const i = focused(), lane = by => {
      for (let k = i + by; k >= 0 && k < sessions; k += by) if (S[k][1] === S[i][1]) return k;
      return i;
    };
    const moves = {ArrowLeft: i - 1, ArrowRight: i + 1, ArrowUp: lane(-1), ArrowDown: lane(1)};
    if (i < 0 || !(event.key in moves)) return;
    event.preventDefault();
    event.stopPropagation();
    const to = Math.min(sessions - 1, Math.max(0, moves[event.key]));
    if (to >= 0) { stops(to); links[to].focus(); }
  });
  const keys = {" ": toggle, ArrowLeft: () => step(-1), ArrowRight: () => step(1), Home: () => go(0),
    End: () => go(D.span), "+": () => faster(1), "-": () => faster(-1), Escape: unlight};
  document.addEventListener("keydown", event => {
    const at = event.target, typing = at.closest("select, input:not(#slider)");
    if (typing || event.ctrlKey || event.metaKey || event.altKey || !(event.key in keys)) return;
    if (event.key === " " && at.closest("button, a, summary")) return;
    if (at === slider && event.key !== " " && event.key !== "+" && event.key !== "-") return;
    event.preventDefault();
    keys[event.key]();
  });
  play.addEventListener("click", toggle);
  slider.addEventListener("input", () => { stop(); show(Number(slider.value)); });
  slider.addEventListener("change", write);
  window.addEventListener("hashchange", read);
  new ResizeObserver(layout).observe(chart.parentNode);

  document.documentElement.classList.add("live");
  slider.max = D.span;
  slider.step = Math.max(1, Math.round(D.span / 500));
  stops(S.length - 1);
  layout();
  show(moment);
  read();
})();
"""


def source_hash(text: str) -> str:
    return "'sha256-%s'" % base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


# Only these two texts run or style a page; data: is the empty icon, which keeps browsers from asking for one.
POLICY = ("default-src 'none'; script-src %s; style-src %s; img-src data:; base-uri 'none';"
          " form-action 'self'" % (source_hash(SCRIPT), source_hash(STYLE)))


def esc(text: object) -> str:
    """Text for an HTML text or a quoted attribute, made visible first."""
    return html.escape(visible(str(text)), quote=True)


def embedded(value: object) -> str:
    """JSON inside a <script>: ASCII only, without the three characters that could end or change the
    element."""
    return compact_json(value).replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def document(title: str, body: str, head: str = "") -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">%s<title>%s</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="referrer" content="no-referrer"><link rel="icon" href="data:,"><style>%s</style>'
        '</head>\n<body><div class="wrap">%s</div></body></html>\n' % (head, esc(title), STYLE, body))


class HtmlColumn(NamedTuple):
    """One column of an HTML table: `cell` gives HTML; `kind` is a CSS class: n number, m hash or
    time, d discoveries, wide what a narrow screen leaves out."""

    title: str
    cell: Callable[[Plain], str]
    kind: str = ""


def html_table(caption: str, columns: Sequence[HtmlColumn], rows: Sequence[Plain]) -> str:
    head = "".join('<th scope="col" class="%s">%s</th>' % (c.kind, esc(c.title)) for c in columns)
    body = "".join(
        "<tr>%s</tr>\n" % "".join('<td class="%s">%s</td>' % (c.kind, c.cell(row)) for c in columns)
        for row in rows)
    return ('<div class="scroll"><table><caption>%s</caption><thead><tr>%s</tr></thead><tbody>\n%s</tbody>'
            '</table></div>' % (esc(caption), head, body))


def digits(value: int) -> str:
    return "{:,}".format(value)


def session_link(s: Plain) -> str:
    return '<a href="/session/%s">%s</a>' % (esc(s["session_id_hash"]), esc(s["session_id_hash"][:12]))


def discovery_link(ref: str, words: str = "") -> str:
    return '<a href="/discovery?ref=%s">%s</a>' % (
        urllib.parse.quote(ref.encode("utf-8", "replace"), safe=""), esc(words or fit(visible(ref), 128)))


def discovery_links(refs: Sequence[str], most: int = 3) -> str:
    more = " +%d" % (len(refs) - most) if len(refs) > most else ""
    return ", ".join(map(discovery_link, refs[:most])) + more


def tiles(values: Iterable[Tuple[str, str, str]]) -> str:
    """Counters: (title, HTML, id or "")."""
    return '<dl class="tiles">%s</dl>' % "".join(
        "<div><dt>%s</dt><dd%s>%s</dd></div>" % (esc(title), ' id="%s"' % name if name else "", value)
        for title, value, name in values)


COUNTERS = (("sessions", "sessions"), ("developers", "developers"), ("tokens saved", "tokens_saved"),
            ("discoveries", "discoveries"), ("hand-overs", "hand_overs"))
HTML_SESSIONS = (
    HtmlColumn("Ended (UTC)", lambda s: esc(minute(s["ended_at"])), "m"),
    HtmlColumn("Session", session_link, "m"),
    HtmlColumn("Developer", lambda s: esc(s["developer"]), "m"),
    HtmlColumn("GitHub", lambda s: "yes" if s["github_hash_prefix"] else "no", "wide"),
    HtmlColumn("Tool calls", lambda s: digits(s["tool_count"]), "n"),
    HtmlColumn("Tokens saved", lambda s: digits(s["tokens_saved"]), "n"),
    HtmlColumn("Branch", lambda s: esc(s["branch_sha"] or "-"), "m wide"),
    HtmlColumn("Discoveries", lambda s: discovery_links(s["discovery_refs"]), "d"),
)
HTML_DISCOVERIES = (
    HtmlColumn("Discovery", lambda d: discovery_link(d["discovery_id"])),
    HtmlColumn("Sessions", lambda d: digits(d["session_count"]), "n"),
    HtmlColumn("Identities", lambda d: digits(d["distinct_identity_count"]), "n"),
    HtmlColumn("First seen", lambda d: esc(minute(d["first_seen_at"])), "m wide"),
    HtmlColumn("Last seen", lambda d: esc(minute(d["last_seen_at"])), "m"),
)
HTML_FLOWS = (
    HtmlColumn("From", lambda f: esc(f["source"]), "m"),
    HtmlColumn("To", lambda f: esc(f["target"]), "m"),
    HtmlColumn("Discoveries", lambda f: digits(f["discoveries"]), "n"),
    HtmlColumn("Sessions", lambda f: digits(f["edges"]), "n"),
)
HTML_PATH = (
    HtmlColumn("Ended (UTC)", lambda s: esc(minute(s["ended_at"])), "m"),
    HtmlColumn("Session", session_link, "m"),
    HtmlColumn("Developer", lambda s: esc(s["developer"]), "m"),
    HtmlColumn("", lambda s: "from another developer" if s["crosses"] else ""),
)


# The picture. Lengths are px of a picture WIDE wide; the script lays it out again for the width there is.

WIDE, LEFT, RIGHT, TOP = 1200, 92, 16, 26
TICK_STEPS = [step * 3_600_000 for step in (1, 3, 6, 12, 24, 48, 168, 720, 2160, 8760)]  # ms
MOST_ARCS = 6000  # drawn; a page that has more says so

Figure = Tuple[str, Plain, int]  # the picture, the data for the script, arcs left out


def ticks_of(start: int, span: int) -> List[Tuple[int, str]]:
    """(ms after `start`, label) of at most 10 round moments."""
    step = next((step for step in TICK_STEPS if span <= 10 * step), 10 * TICK_STEPS[-1])
    moments = range(-(-start // step) * step, start + span + 1, step)
    return [(at - start, tick_label(at, step)) for at in moments[:12]]


def tick_label(at: int, step: int) -> str:
    text = moment_text(at)
    return text[5:10] if step >= DAY_MS else text[5:10] + " " + text[11:16]


def figure(ordered: Sequence[Session], only: Optional[str] = None, links: bool = True) -> Figure:
    """One or more sessions in time order as an SVG and the data that brings it to life. `only`: arcs of this
    discovery alone; `links`: the sessions have pages to go to. The script's `layout` knows the same
    formulas."""
    start = ordered[0].ended
    span_ms = max(1, ordered[-1].ended - start)
    shown = labels(s.developer for s in ordered)
    lanes = {key: n for n, key in enumerate(dict.fromkeys(s.developer for s in ordered))}
    lane = max(14.0, min(42.0, round(600 / len(lanes), 1)))
    height = round(TOP + lane * len(lanes) + 6, 1)
    largest = max(s.tools for s in ordered) or 1
    at = [(round(LEFT + (s.ended - start) / span_ms * (WIDE - LEFT - RIGHT), 1),
           round(TOP + (lanes[s.developer] + .5) * lane, 1)) for s in ordered]
    radius = [round(max(1.5, min(17.0, lane * .62) * math.sqrt(s.tools / largest)), 1) for s in ordered]
    every = edges_of(ordered, only)
    crosses = [ordered[e.source].developer != ordered[e.target].developer for e in every]
    hand_overs = [0] * len(ordered)
    for edge, crossing in zip(every, crosses):
        hand_overs[edge.target] += len(edge.refs) if crossing else 0
    drawn = [(e, crossing) for e, crossing in zip(every, crosses)][-MOST_ARCS:]
    marks = ticks_of(start, span_ms)
    svg = figure_svg(ordered, shown, lanes, (height, lane), at, radius, drawn, marks, links)
    return svg, figure_data(ordered, only, shown, lanes, drawn, hand_overs, links, {
        "start": start, "span": span_ms, "width": WIDE, "left": LEFT, "right": RIGHT, "top": TOP,
        "lane": lane, "height": height, "ticks": [offset for offset, _ in marks]}), len(every) - len(drawn)


def figure_svg(ordered: Sequence[Session], shown: Dict[str, str], lanes: Dict[str, int],
               size: Tuple[float, float], at: Sequence[Tuple[float, float]], radius: Sequence[float],
               drawn: Sequence[Tuple[Edge, bool]], marks: Sequence[Tuple[int, str]], links: bool) -> str:
    height, lane = size
    span_ms = max(1, ordered[-1].ended - ordered[0].ended)
    parts = ['<svg id="chart" viewBox="0 0 %d %g" role="group" aria-label="%s"%s>' % (
        WIDE, height, esc("Replay: %d sessions of %d developers over time; the tables say the same" % (
            len(ordered), len(lanes))), ' class="dense"' if len(drawn) > 700 else "")]
    parts.append('<g id="ticks">')
    for offset, label in marks:
        x = round(LEFT + offset / span_ms * (WIDE - LEFT - RIGHT), 1)
        parts.append('<g><line x1="%g" x2="%g" y1="%d" y2="%g"/><text x="%g" y="14">%s</text></g>' % (
            x, x, TOP - 6, height, x, esc(label)))
    parts.append('</g><g id="lanes">')
    for key, n in lanes.items():
        y = round(TOP + (n + .5) * lane, 1)
        parts.append('<line x1="%d" x2="%d" y1="%g" y2="%g"/><text x="0" y="%g">%s</text>' % (
            LEFT, WIDE, y, y, y + 4, esc(shown[key])))
    parts.append('</g><g id="arcs">')
    for edge, crossing in drawn:
        parts.append('<path%s d="%s"/>' % (' class="x"' if crossing else "",
                                           arc_path(at[edge.source], at[edge.target], lane)))
    parts.append('</g><g id="discs">')
    for s, (x, y), r in zip(ordered, at, radius):
        parts.append('<a%s aria-label="%s, %s, %d calls"><circle cx="%g" cy="%g" r="%g"%s/></a>' % (
            ' href="/session/%s"' % s.session if links else "", shown[s.developer],
            minute(moment_text(s.ended)), s.tools, x, y, r, ' class="g"' if s.github else ""))
    return "".join([*parts, '</g><line id="now" x1="%d" x2="%d" y1="%d" y2="%g"/></svg>' % (
        WIDE - RIGHT, WIDE - RIGHT, TOP - 6, height)])


def arc_path(a: Tuple[float, float], b: Tuple[float, float], lane: float) -> str:
    """Within a lane a bow over it; from lane to lane a flow that leaves and arrives level."""
    (x1, y1), (x2, y2) = a, b
    run = x2 - x1
    if y1 == y2:
        bow = round(y1 - min(lane * 1.1, 8 + run / 2), 1)
        return "M%g %gQ%g %g %g %g" % (x1, y1, round((x1 + x2) / 2, 1), bow, x2, y2)
    bend = max(12, run / 2)
    return "M%g %gC%g %g %g %g %g %g" % (x1, y1, round(x1 + bend, 1), y1, round(x2 - bend, 1), y2, x2, y2)


def figure_data(ordered: Sequence[Session], only: Optional[str], shown: Dict[str, str], lanes: Dict[str, int],
                drawn: Sequence[Tuple[Edge, bool]], hand_overs: Sequence[int], links: bool,
                shape: Plain) -> Plain:
    """What the script needs: `sessions` are [ms after start, lane, tool calls, tokens, [refs], hand-overs
    received], `edges` [source, target, [refs], crosses 0|1], refs and lanes numbers into `refs` and
    `developers`. `refs` are as shown; `names` {number: ref} holds those that look otherwise."""
    numbers: Dict[str, int] = {}
    if only is None:
        rows = [[numbers.setdefault(ref, len(numbers)) for ref in s.refs] for s in ordered]
    else:
        rows = [[numbers.setdefault(ref, len(numbers)) for ref in s.refs if ref == only] for s in ordered]
    return dict(
        shape, links=links, developers=[shown[key] for key in lanes],
        refs=[fit(visible(ref), 128) for ref in numbers],
        names={n: ref for ref, n in numbers.items() if fit(visible(ref), 128) != ref},
        sessions=[[s.ended - shape["start"], lanes[s.developer], s.tools, s.tokens, refs, received]
                  for s, refs, received in zip(ordered, rows, hand_overs)],
        edges=[[e.source, e.target, [numbers[ref] for ref in e.refs], int(crossing)]
               for e, crossing in drawn])


LEGEND = (
    '<div class="legend" aria-hidden="true">'
    '<span><svg width="14" height="14"><circle class="g" cx="7" cy="7" r="5.5"/></svg>session, with GitHub'
    '</span>'
    '<span><svg width="14" height="14"><circle cx="7" cy="7" r="5.5"/></svg>without</span>'
    '<span>area = tool calls</span>'
    '<span><svg width="26" height="8"><line x2="26" y1="4" y2="4"/></svg>discovery carried on</span>'
    '<span><svg width="26" height="8"><line class="x" x2="26" y1="4" y2="4"/></svg>'
    'handed over to another developer</span></div>')
CONTROLS = (
    '<div class="controls" role="group" aria-label="Replay"><button id="play" type="button">Play</button>'
    '<input id="slider" type="range" min="0" aria-label="Moment"><output id="moment"></output>'
    '<label>Speed <select id="speed" aria-label="Speed"><option value="0.5">&#189;&#215;</option>'
    '<option value="1" selected>1&#215;</option><option value="2">2&#215;</option>'
    '<option value="4">4&#215;</option><option value="8">8&#215;</option></select></label></div>')
PANEL = (
    '<div id="panel" aria-live="polite"><span class="note">Point at a session, or reach it with Tab and the '
    'arrow keys, to see what it knew and where that went. Space plays and pauses, &larr; and &rarr; step '
    'from session to session, Home and End go to the ends, + and &minus; change the speed.</span></div>')


def replay(ordered: Sequence[Session], total: int, only: Optional[str] = None, links: bool = True) -> str:
    """The body of the replay: counters, controls, the picture, hand-overs. Sessions in time order."""
    if not ordered:
        return '<p class="card">No session ended in this window. A longer one may have some.</p>'
    svg, data, left_out = figure(ordered, only, links)
    result = graph_of(ordered, only)
    notes = []
    if total > len(ordered):
        notes.append("Shown are the newest %s of %s sessions in this window, from %s UTC on." % (
            digits(len(ordered)), digits(total), minute(moment_text(ordered[0].ended))))
    if left_out:
        notes.append("Drawn are the newest %s arcs; %s older ones are only counted." % (
            digits(MOST_ARCS), digits(left_out)))
    flows = [flow for flow in result["developers"] if flow["crosses"]]
    table = html_table("Who handed over to whom: the first %d of %s pairs of developers" % (
        min(FLOWS_SHOWN, len(flows)), digits(len(flows))), HTML_FLOWS, flows[:FLOWS_SHOWN]) if flows else ""
    return "".join([
        tiles((title.capitalize(), digits(result["totals"][key]), "count%d" % i)
              for i, (title, key) in enumerate(COUNTERS)),
        '<p class="note">%s</p>' % esc(" ".join(notes)) if notes else "",
        '<div class="card">', CONTROLS, PANEL, '<div class="stage">', svg, "</div>", LEGEND, "</div>", table,
        '<script type="application/json" id="data">%s</script>' % embedded(data),
        "<script>%s</script>" % SCRIPT])


def graph_html(ordered: Sequence[Session], total: int, only: Optional[str] = None) -> str:
    """The replay as one self-contained file: it opens without this program and asks nobody."""
    policy = '<meta http-equiv="Content-Security-Policy" content="%s">' % POLICY
    return document("Session replay", "<header><b>Session replay</b></header><main>%s</main>" % replay(
        ordered, total, only, links=False), policy)


# The pages of `view`.

PAGES = (("/", "Replay"), ("/sessions", "Sessions"), ("/discoveries", "Discoveries"),
         ("/activity", "Activity"))
DAY_CHOICES = (1, 7, 14, 30, 90)
GITHUB_CHOICES = {"": "with and without", "true": "with GitHub", "false": "without GitHub"}


class Filters(NamedTuple):
    """What the address of a page asks for, as it came in but checked; "" where nothing was said."""

    days: int = DAYS_DEFAULT
    since: str = ""
    until: str = ""
    github: str = ""
    discovery: str = ""

    def window(self) -> Window:
        github = {"": None, "true": True, "false": False}[self.github]
        return window_between(self.days, self.since, self.until, github, self.discovery or None)

    def query(self) -> str:
        said = {name: value for name, value in self._asdict().items()
                if value != Filters._field_defaults[name]}
        return "?" + urllib.parse.urlencode(said, errors="replace") if said else ""


Query = Dict[str, str]  # the parameters of an address, the first of each name


def number_in(query: Query, name: str, default: int, most: int) -> int:
    """CONTRACT §7: a number that is too large is the largest, nonsense is the default."""
    text = query.get(name, "")
    if not re.fullmatch(r"[0-9]+", text) or not text.strip("0"):
        return default
    return most if len(text) > 9 else min(int(text), most)


def filters_of(query: Query) -> Filters:
    github = query.get("github", "")
    since, until = (query[name] if day_start(query.get(name, "")) else "" for name in ("since", "until"))
    return Filters(number_in(query, "days", DAYS_DEFAULT, 36_500), since, until,
                   github if github in GITHUB_CHOICES else "", query.get("discovery", "").strip()[:1000])


def options(choices: Iterable[Tuple[str, str]], chosen: str) -> str:
    return "".join('<option value="%s"%s>%s</option>' % (
        esc(value), " selected" if value == chosen else "", esc(text)) for value, text in choices)


def filter_form(path: str, filters: Filters, names: Sequence[str] = Filters._fields) -> str:
    days = sorted({*DAY_CHOICES, filters.days})
    fields = {
        "days": '<label>Window<select name="days">%s</select></label>' % options(
            [(str(n), "last %d day%s" % (n, "" if n == 1 else "s")) for n in days], str(filters.days)),
        "since": '<label>or since (UTC)<input type="date" name="since" value="%s"></label>' % (
            esc(filters.since[:10])),
        "until": '<label>until before<input type="date" name="until" value="%s"></label>' % (
            esc(filters.until[:10])),
        "github": '<label>GitHub<select name="github">%s</select></label>' % options(
            GITHUB_CHOICES.items(), filters.github),
        "discovery": '<label>Discovery<input name="discovery" size="22" maxlength="200" placeholder="any"'
                     ' value="%s"></label>' % html.escape(filters.discovery, quote=True),
    }
    return '<form method="get" action="%s">%s<button>Show</button></form>' % (
        esc(path), "".join(fields[name] for name in names))


def page(title: str, path: str, filters: Filters, main: str, left_out: int = 0) -> str:
    nav = "".join('<a href="%s%s"%s>%s</a>' % (
        to, esc(filters.query()), ' aria-current="page"' if to == path else "", name) for to, name in PAGES)
    note = '<p class="note">%s left out: not sessions as the contract has them.</p>' % (
        "1 row was" if left_out == 1 else digits(left_out) + " rows were") if left_out else ""
    header = ('<a class="skip" href="#main">Skip to the content</a><header><b>Session events</b>'
              '<nav aria-label="Pages">%s</nav></header>' % nav)
    return document(title + " - sessions", '%s<main id="main">%s%s</main>' % (header, main, note))


def replay_page(reader: Reader, filters: Filters) -> str:
    window = filters.window()
    newest = reader.window(window, DRAWN)
    body = filter_form("/", filters) + replay(newest[::-1], reader.count(window), window.discovery)
    return page("Replay", "/", filters, body, reader.left_out)


def sessions_page(reader: Reader, filters: Filters) -> str:
    result = sessions(reader, filters.window(), 200)
    caption = "The newest %s of %s sessions in this window" % (
        digits(len(result["sessions"])), digits(result["total_count_in_window"]))
    return page("Sessions", "/sessions", filters, filter_form("/sessions", filters)
                + html_table(caption, HTML_SESSIONS, result["sessions"]), reader.left_out)


def session_page(reader: Reader, prefix: str) -> str:
    """Raises NotFound."""
    result = session(reader, prefix)
    s = result["session"]
    facts = [("Developer", '<span class="m">%s</span>' % esc(s["developer"])),
             ("GitHub", "yes" if s["github_hash_prefix"] else "no"), ("Ended", esc(s["ended_at"])),
             ("Tool calls", digits(s["tool_count"])), ("Tokens saved", digits(s["tokens_saved"])),
             ("Branch", '<span class="m">%s</span>' % esc(s["branch_sha"] or "-")),
             ("Discoveries", '<ul class="chips">%s</ul>' % "".join(
                 "<li>%s</li>" % discovery_link(ref) for ref in s["discovery_refs"]) or "-")]
    listed = "".join("<dt>%s</dt><dd>%s</dd>" % fact for fact in facts)
    related = html_table("Other sessions of the same identity, last %d days" % RELATED_DAYS, HTML_SESSIONS,
                         result["related"]) if result["related"] else (
        '<p class="note">No other session of this identity in the last %d days.</p>' % RELATED_DAYS)
    return page("Session " + s["session_id_hash"][:12], "/session", Filters(),
                '<h1 class="m">%s</h1><dl class="card facts">%s</dl><h2>Related</h2>%s' % (
                    esc(s["session_id_hash"]), listed, related), reader.left_out)


def discoveries_page(reader: Reader, filters: Filters, sort: str) -> str:
    result = discoveries(reader, filters.window(), 200, sort)
    choice = '<label>Sorted by<select name="sort">%s</select></label><button>' % options(
        zip(SORTS, ("sessions", "identities", "last seen")), sort)
    form = filter_form("/discoveries", filters, Filters._fields[:4]).replace("<button>", choice)
    return page("Discoveries", "/discoveries", filters, form + html_table(
        "%d discoveries touched in this window" % len(result["discoveries"]), HTML_DISCOVERIES,
        result["discoveries"]), reader.left_out)


def discovery_page(reader: Reader, ref: str) -> str:
    """One discovery since ever. Raises NotFound."""
    result = discovery(reader, ref, EVER)
    newest = reader.window(EVER._replace(discovery=ref), DRAWN)
    facts = "First seen %s, last %s UTC, in %s sessions of %s developers under %s identities." % (
        minute(result["first_seen_at"]), minute(result["last_seen_at"]), digits(result["session_count"]),
        digits(result["developer_count"]), digits(result["distinct_identity_count"]))
    path = html_table("Its path: the first %s of %s sessions" % (
        digits(len(result["path"])), digits(result["session_count"])), HTML_PATH, result["path"])
    return page(fit(visible(ref), 80), "/discovery", Filters(), "<h1>%s</h1><p>%s</p>%s<h2>Path</h2>%s" % (
        esc(ref), esc(facts), replay(newest[::-1], result["session_count"], ref), path), reader.left_out)


def bar(value: int, most: int) -> str:
    return ('<svg viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
            '<rect width="%g" height="10"/></svg>' % round(100 * value / (most or 1), 2))


def period_table(title: str, rows: Sequence[Plain]) -> str:
    most = max((row["sessions"] for row in rows), default=0)
    return html_table(title, (
        HtmlColumn("", lambda p: esc(p["period"]), "m"),
        HtmlColumn("Sessions", lambda p: digits(p["sessions"]), "n"),
        HtmlColumn("", lambda p: bar(p["sessions"], most), "bar"),
        HtmlColumn("Developers", lambda p: digits(p["developers"]), "n"),
        HtmlColumn("Came back", lambda p: digits(p["came_back"]), "n wide"),
        HtmlColumn("Tool calls", lambda p: digits(p["tool_count"]), "n wide"),
        HtmlColumn("Tokens saved", lambda p: digits(p["tokens_saved"]), "n wide"),
    ), rows)


def activity_page(reader: Reader, filters: Filters) -> str:
    result = activity(reader, filters.window())
    counters = tiles(
        ("Active in %d day%s" % (row["days"], "" if row["days"] == 1 else "s"),
         '%s <small>%s came back</small>' % (digits(row["developers"]), digits(row["came_back"])), "")
        for row in result["active"])
    tables = "".join(period_table("Per " + kind[:-1], result[kind][-400:]) for kind in PERIODS)
    note = '<p class="note">Came back: developers who were also there in the period before.</p>'
    main = filter_form("/activity", filters) + counters + note + tables
    return page("Activity", "/activity", filters, main, reader.left_out)


# ======================================================================================================
# The database file
# ======================================================================================================


class Refused(Exception):
    """The database cannot be read; the text says why and what to do."""


REASONS = (  # what SQLite says, what a person wants to know
    ("file is not a database", "it is not an SQLite database"),
    ("file is encrypted", "it is not an SQLite database"),
    ("malformed", "it is damaged: restore a copy, or save what can be read with sqlite3's .recover"),
    ("locked", "another program keeps it locked: try again when that is done"),
    ("unable to open", "SQLite cannot open it: its folder must be readable, and writable too while a server's"
                       " last changes wait in the -wal file (run this as the server's user)"),
    ("readonly", "its -wal file holds changes that only a user who may write there can take in (run this as"
                 " the server's user)"),
    ("disk i/o error", "the disk answers with errors"),
    ("no such table", "it does not hold the tables of a session-event store"),
    ("no such column", "its tables are not those of a session-event store"),
)


BUSY_SECONDS = 5.0  # how long another program's lock is waited for


def explained(error: sqlite3.Error, path: str) -> Refused:
    said = str(error).lower()
    reason = next((why for sign, why in REASONS if sign in said), str(error))
    return Refused("cannot read %s: %s" % (path, reason))


def connected(path: str) -> sqlite3.Connection:
    """A read-only connection inside a transaction; sqlite3.Error if the file gives none."""
    uri = Path(path).absolute().as_uri() + "?mode=ro"
    try:
        return begun(uri)
    except sqlite3.OperationalError as error:
        # A WAL database in a folder where nobody may write, its server gone: there is no -shm file and none
        # can be made. With no changes waiting in a -wal file, the database file alone is the whole truth.
        waiting = os.path.exists(path + "-wal") and os.path.getsize(path + "-wal") > 0
        if waiting or not re.search("unable to open|readonly", str(error)):
            raise
        return begun(uri + "&immutable=1")


def begun(uri: str) -> sqlite3.Connection:
    connection = sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None)
    try:
        connection.text_factory = lambda raw: raw.decode("utf-8", "replace")  # a row may hold any bytes
        for pragma in ("query_only = 1", "trusted_schema = 0"):  # and 2 MB of cache: with 64, steps take twice as long
            connection.execute("PRAGMA " + pragma)
        connection.execute("BEGIN")
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()  # takes the snapshot
    except BaseException:
        connection.close()
        raise
    return connection


def check_schema(connection: sqlite3.Connection, path: str) -> None:
    """Raises Refused unless the tables are those that this program knows."""
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if "session_events" not in tables:
        raise Refused("%s holds no session events: it is another program's database, or no server has opened"
                      " it yet" % path)
    if version > SCHEMA_VERSION:
        raise Refused("%s has schema version %d and this program knows up to %d: use the session_events.py"
                      " that came with its server.py" % (path, version, SCHEMA_VERSION))
    if version < SCHEMA_VERSION:
        raise Refused("%s has schema version %d, older than %d: start server.py on it once, which brings it"
                      " up to date" % (path, version, SCHEMA_VERSION))
    for table, columns in TABLES.items():
        there = {row[1] for row in connection.execute("PRAGMA table_info(%s)" % table)}
        missing = [column for column in columns if column not in there]
        if missing:
            raise Refused("%s is not a session-event store: its table %s lacks %s" % (
                path, table, ", ".join(missing)))


@contextlib.contextmanager
def reading(path: str) -> Iterator[Reader]:
    """One read transaction on the database file, as a Reader. Raises Refused, also in place of the
    sqlite3.Error of any query in the block."""
    if not os.path.exists(path):
        raise Refused("there is no file %s" % path)
    if not os.path.isfile(path):
        raise Refused("%s is not a file" % path)
    if not os.access(path, os.R_OK):
        raise Refused("%s may not be read by this user" % path)
    try:
        with contextlib.closing(connected(path)) as connection:
            check_schema(connection, path)
            yield Reader(connection)
    except sqlite3.Error as error:
        raise explained(error, path) from error


# ======================================================================================================
# Viewer: the pages and CONTRACT §7 over HTTP, for this machine only
# ======================================================================================================

LOCAL_NAMES = {"127.0.0.1", "localhost", "[::1]"}
PROTECTION = (
    ("Cache-Control", "no-store"),
    ("Content-Security-Policy", POLICY + "; frame-ancestors 'none'"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Referrer-Policy", "no-referrer"),
    ("X-Content-Type-Options", "nosniff"),
)
HTML_TYPE, JSON_TYPE = "text/html; charset=utf-8", "application/json"


class Answer(NamedTuple):
    status: int
    type: str
    body: str
    headers: Sequence[Tuple[str, str]] = ()


def same(given: str, secret: str) -> bool:
    """Equal? In a time that tells nothing about the secret, its length neither."""
    return hmac.compare_digest(hashlib.sha256(given.encode("latin-1", "replace")).digest(),
                               hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest())


def query_of(text: str) -> Query:
    try:
        pairs = urllib.parse.parse_qsl(text, max_num_fields=50)
    except ValueError:
        return {}
    query: Query = {}
    for name, value in pairs:
        query.setdefault(name, value)
    return query


def message_page(status: int, title: str, text: str) -> Answer:
    return Answer(status, HTML_TYPE, document(
        title, "<main><h1>%s</h1><p>%s</p></main>" % (esc(title), esc(text))))


def page_answer(db: str, path: str, query: Query) -> Answer:
    """A page for somebody who may see it."""
    filters = filters_of(query)
    sort = query.get("sort", "")
    pages: Dict[str, Callable[[Reader], str]] = {
        "/": lambda reader: replay_page(reader, filters),
        "/sessions": lambda reader: sessions_page(reader, filters),
        "/discoveries": lambda reader: discoveries_page(reader, filters, sort if sort in SORTS else SORTS[0]),
        "/discovery": lambda reader: discovery_page(reader, query.get("ref", "")),
        "/activity": lambda reader: activity_page(reader, filters),
    }
    top, _, rest = path[1:].partition("/")
    if top == "session" and rest:
        pages[path] = lambda reader: session_page(reader, rest)
    show = pages.get(path)
    if show is None:
        return message_page(404, "Not found", "There is no such page.")
    try:
        with reading(db) as reader:
            return Answer(200, HTML_TYPE, show(reader))
    except NotFound as error:
        return message_page(404, "Not found", str(error)[:1].upper() + str(error)[1:] + ".")
    except Refused as error:
        return message_page(503, "The database cannot be read now", str(error))


def admin_answer(db: str, path: str, query: Query, authorization: str, secret: str) -> Answer:
    """CONTRACT §7, to the letter. `secret` "" means that no token is configured."""
    request_id = uuid.uuid4().hex

    def answer(status: int, headers: Sequence[Tuple[str, str]] = (), **body: Any) -> Answer:
        return Answer(status, JSON_TYPE, json.dumps(dict(body, requestId=request_id)), headers)

    scheme, _, given = authorization.partition(" ")
    if not secret:
        return answer(503, error="Endpoint disabled (admin trigger token not configured)")
    if not (same(given.strip(), secret) and scheme.lower() == "bearer"):
        return answer(401, [("WWW-Authenticate", "Bearer")], error="Unauthorized")
    try:
        with reading(db) as reader:
            body = admin_body(reader, path, query)
    except Refused:
        return answer(503, [("Retry-After", "5")], error="The database cannot be read now")
    return answer(404, error="Not found") if body is None else answer(200, **body)


def admin_body(reader: Reader, path: str, query: Query) -> Optional[Plain]:
    if path == "/admin/sessions":
        github = {"true": True, "false": False}.get(query.get("logged_in", ""))
        window = last_days(number_in(query, "days", 7, 90), github)
        found = reader.window(window, number_in(query, "limit", 50, 200))
        return {"sessions": list(map(plain_session, found)), "total_count_in_window": reader.count(window)}
    if path == "/admin/discoveries/propagation":
        sort = query.get("sort", "")
        limit = number_in(query, "limit", 50, 500)
        result = discoveries(reader, EVER, limit, sort if sort in SORTS else SORTS[0])
        return {"discoveries": [{name: d[name] for name in PROPAGATION} for d in result["discoveries"]]}
    match = re.fullmatch(r"/admin/sessions/([0-9a-f]{64})", path)
    if not match:
        return None
    try:
        result = session(reader, match.group(1))
    except NotFound:
        return None
    return {"session": without_developer(result["session"]),
            "related": list(map(without_developer, result["related"]))}


def without_developer(s: Plain) -> Plain:
    return {name: value for name, value in s.items() if name != "developer"}


class Viewer(http.server.ThreadingHTTPServer):
    """The pages on one database file. `ticket` opens them once, in exchange for the cookie."""

    daemon_threads = True

    def __init__(self, db: str, port: int, admin_token: str) -> None:
        super().__init__(("127.0.0.1", port), ViewerHandler)
        self.db, self.admin_token = db, admin_token
        self.ticket: Optional[str] = secrets.token_urlsafe(24)
        self.cookie = secrets.token_urlsafe(24)
        self.cookie_name = "session_events_%d" % self.server_address[1]  # cookies do not tell ports apart
        self.lock = threading.Lock()

    @property
    def address(self) -> str:
        return "http://127.0.0.1:%d/?token=%s" % (self.server_address[1], self.ticket)

    def redeem(self, given: str) -> bool:
        with self.lock:
            good = self.ticket is not None and same(given, self.ticket)
            if good:
                self.ticket = None
            return good

    def handle_error(self, request: Any, client_address: Any) -> None:
        """One line, and nothing of the request: a browser that went away is not worth even that."""
        error = sys.exc_info()[1]
        if not isinstance(error, (ConnectionError, TimeoutError)):
            print("session_events: a request failed: %s" % type(error).__name__, file=sys.stderr, flush=True)


class ViewerHandler(http.server.BaseHTTPRequestHandler):
    server: Viewer
    timeout = 30  # s that a silent connection is kept

    def version_string(self) -> str:
        return "session-events"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: an address line names sessions."""

    def do_GET(self) -> None:
        host = re.fullmatch(r"(.+?)(:\d+)?", self.headers.get("Host", ""))
        if not host or host.group(1).lower() not in LOCAL_NAMES:
            # A page elsewhere whose name was made to point here comes with that name (DNS rebinding).
            self.send(Answer(403, "text/plain", "This server answers to 127.0.0.1 and localhost only.\n"))
            return
        try:
            answer = self.answer()
        except Exception as error:
            where_from = error.__traceback__
            while where_from and where_from.tb_next:
                where_from = where_from.tb_next
            line = where_from.tb_lineno if where_from else 0
            print("session_events: a page failed: %s in line %d" % (type(error).__name__, line),
                  file=sys.stderr, flush=True)
            answer = message_page(500, "This page failed", "The terminal shows a line about it.")
        self.send(answer)

    do_HEAD = do_GET

    def refuse(self) -> None:
        self.send(Answer(405, "text/plain", "Only GET and HEAD.\n", [("Allow", "GET, HEAD")]))

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = do_CONNECT = refuse

    def answer(self) -> Answer:
        address = urllib.parse.urlsplit("http://local" + self.path if self.path.startswith("/") else "")
        query = query_of(address.query)
        if address.path == "/admin" or address.path.startswith("/admin/"):
            return admin_answer(self.server.db, address.path, query, self.headers.get("Authorization", ""),
                                self.server.admin_token)
        if "token" in query:
            return self.exchange(query)
        if not self.may_see():
            return message_page(403, "Closed", "Open the address that the terminal shows; it works once.")
        return page_answer(self.server.db, address.path, query)

    def exchange(self, query: Query) -> Answer:
        """The one-time token for a cookie, and on to the address without the token."""
        rest = {name: value for name, value in query.items() if name != "token"}
        to = [("Location", "/" + ("?" + urllib.parse.urlencode(rest, errors="replace") if rest else ""))]
        if self.server.redeem(query["token"]):
            cookie = "%s=%s" % (self.server.cookie_name, self.server.cookie)
            return Answer(303, "text/plain", "", [
                *to, ("Set-Cookie", cookie + "; Path=/; HttpOnly; SameSite=Strict")])
        if self.may_see():
            return Answer(303, "text/plain", "", to)
        return message_page(403, "Closed", "This address was used already, or is not this viewer's. Start it"
                                           " again for a new one.")

    def may_see(self) -> bool:
        cookies = [part.strip().partition("=") for part in self.headers.get("Cookie", "").split(";")]
        return any(name == self.server.cookie_name and same(value, self.server.cookie)
                   for name, _, value in cookies)

    def send(self, answer: Answer) -> None:
        body = answer.body.encode("utf-8", "replace")
        self.send_response(answer.status)
        for name, value in (("Content-Type", answer.type), ("Content-Length", str(len(body))), *PROTECTION,
                            *answer.headers):
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(self, code: int, message: Optional[str] = None, explain: Optional[str] = None) -> None:
        """What `http.server` itself refuses (a malformed or huge head), without repeating any of it."""
        self.close_connection = True
        self.command = self.command or ""
        self.request_version = "HTTP/1.0"  # a head that names none would get no head in answer
        self.send(Answer(code, "text/plain", "The request is not understood.\n"))


def can_open_browser() -> bool:
    """Is there a screen? Without one `webbrowser` would start a browser inside the terminal."""
    named = any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")))
    return named or sys.platform in ("win32", "darwin")


def serve(db: str, port: int, open_it: bool, path: str = "") -> int:
    """The viewer until Ctrl-C or SIGTERM; its exit status. `path` is added to the address that is shown."""
    def stop(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    with reading(db):
        pass  # refuses now rather than on the first page
    try:
        viewer = Viewer(db, port, os.environ.get(ADMIN_TOKEN_VARIABLE, ""))
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        raise Refused("cannot listen on port %d: %s" % (
            port, "it is taken; --port 0 finds a free one" if taken else error.strerror)) from error
    signal.signal(signal.SIGTERM, stop)
    with viewer:
        print("open %s%s" % (viewer.address, path), flush=True)
        print("it works once and on this machine only; Ctrl-C ends", flush=True)
        if open_it:
            webbrowser.open(viewer.address + path)
        with contextlib.suppress(KeyboardInterrupt):
            viewer.serve_forever()
    return 0


# ======================================================================================================
# Demo: synthetic sessions, the same every time
# ======================================================================================================

SCHEMA = r"""-- The session-event store: CONTRACT.md section 3, for SQLite 3.38 or newer (or an older one built with JSON1).
-- Runs on a fresh file, and brings a file that holds session_events already up to this version: every statement
-- may run again without changing anything. server.py carries this text to the letter.

CREATE TABLE IF NOT EXISTS session_events (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  identity_hash TEXT NOT NULL,
  github_hash TEXT,
  session_id_hash TEXT NOT NULL,
  ended_at TEXT NOT NULL,
  tool_count INTEGER NOT NULL DEFAULT 0,
  tokens_saved INTEGER NOT NULL DEFAULT 0,
  branch_sha TEXT,
  discovery_refs_json TEXT NOT NULL DEFAULT '[]',
  plugin_version TEXT NOT NULL,
  received_at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%SZ', 'now'))
);

CREATE UNIQUE INDEX IF NOT EXISTS idx_session_events_identity_session_unique
  ON session_events (identity_hash, session_id_hash);
CREATE INDEX IF NOT EXISTS idx_session_events_identity_ended_at ON session_events (identity_hash, ended_at);
CREATE INDEX IF NOT EXISTS idx_session_events_received_at ON session_events (received_at);
CREATE INDEX IF NOT EXISTS idx_session_events_ended_at ON session_events (ended_at);

-- Which session touched which discovery: the edges of the session graph.
CREATE TABLE IF NOT EXISTS session_discoveries (
  discovery_ref TEXT NOT NULL,
  event_id INTEGER NOT NULL,
  PRIMARY KEY (discovery_ref, event_id)
) WITHOUT ROWID;

-- No SQL function is called while a row is inserted (json_each is a table): a function might abort the statement, and
-- for that SQLite would copy each page first, a fifth of the whole cost of an event. So a row whose refs are not JSON
-- text is refused. The upsert clause, unlike OR IGNORE, holds under any OR clause of the statement that inserts.
CREATE TRIGGER IF NOT EXISTS session_events_discoveries_insert AFTER INSERT ON session_events
WHEN NEW.discovery_refs_json <> '[]'
BEGIN
  INSERT INTO session_discoveries (discovery_ref, event_id)
    SELECT value, NEW.id FROM json_each(NEW.discovery_refs_json) WHERE type = 'text'
    ON CONFLICT DO NOTHING;
END;

CREATE TRIGGER IF NOT EXISTS session_events_discoveries_delete AFTER DELETE ON session_events
WHEN OLD.discovery_refs_json <> '[]' AND json_valid(OLD.discovery_refs_json)
BEGIN
  DELETE FROM session_discoveries
    WHERE event_id = OLD.id
      AND discovery_ref IN (SELECT value FROM json_each(OLD.discovery_refs_json) WHERE type = 'text');
END;

-- Rows that were there before the triggers; whatever they hold, this does not fail.
INSERT OR IGNORE INTO session_discoveries (discovery_ref, event_id)
  SELECT value, session_events.id
    FROM session_events,
         json_each(CASE WHEN json_valid(discovery_refs_json) THEN discovery_refs_json ELSE '[]' END)
    WHERE json_each.type = 'text';

PRAGMA user_version = 1;
"""

DEMO_DAYS, DEMO_DEVELOPERS, DEMO_TEAM = 21, 12, 4
DEMO_REFS = """
    auth-jwt-flow rate-limit-buckets sqlite-wal-checkpoint flaky-login-test ci-cache-key retry-with-jitter
    pagination-cursor n-plus-one-orders timezone-dst-bug webhook-signature s3-multipart-upload grpc-deadlines
    idempotency-key blue-green-switch css-grid-overflow schema-codegen vector-index-recall utf8-truncation
    docker-layer-order terraform-state-lock oauth-refresh-race worker-memory-leak trace-context-loss
    lock-order-deadlock search-ranking-tie email-bounce-loop audit-log-shape mobile-deep-links
    feature-flag-ramp cold-start-imports backfill-in-batches queue-visibility-timeout""".split()  # noqa: SIM905


def demo_hash(*words: object) -> str:
    return hashlib.sha256(("demo " + " ".join(map(str, words))).encode()).hexdigest()


def demo_starts(chance: Callable[[], float]) -> List[Tuple[int, int]]:
    """(minute since the first midnight, developer) of each session's end, in time order. Each developer has
    hours, a pace, and days off."""
    moments = []
    for developer in range(DEMO_DEVELOPERS):
        morning, pace = 60 * (6 + 4 * (developer // DEMO_TEAM) + 2 * chance()), .8 + 2.4 * chance()
        for day in range(DEMO_DAYS):
            if chance() < (.55 if day % 7 in (5, 6) else .18):
                continue
            for _ in range(1 + int(pace * chance() + chance())):
                moments.append((int(day * 1440 + morning + chance() * 540) % (DEMO_DAYS * 1440), developer))
    return sorted(moments)


def demo_touch(known: Dict[str, List[Tuple[int, int]]], at: int, developer: int, chance: Callable[[], float],
               fresh: List[str]) -> Tuple[List[str], int]:
    """The discoveries of one session and how many of them it found there. What is recent is likelier, what
    one's own team touched likelier still. `known` {ref: [(minute, developer) ...]} learns them; `fresh` gives
    up new ones."""
    touched = []
    for ref, visits in known.items():
        near = any(developer // DEMO_TEAM == who // DEMO_TEAM for _, who in visits[-3:])
        heat = math.exp((visits[-1][0] - at) / 2400) * (.2 if near else .028)
        if chance() < heat:
            touched.append(ref)
    found = len(touched)
    if fresh and chance() < .09:
        touched.append(fresh.pop(0))
    for ref in touched:
        known.setdefault(ref, []).append((at, developer))
    return touched[:6], found


def demo_rows(end: int) -> Iterator[Tuple[Any, ...]]:
    """The rows of session_events without `id`, oldest first, all before `end` (ms). Only `random()` is used:
    what it gives is the same in every Python."""
    chance = random.Random("session events").random
    known: Dict[str, List[Tuple[int, int]]] = {}
    fresh = list(DEMO_REFS)
    for n, (at, developer) in enumerate(demo_starts(chance)):
        refs, found = demo_touch(known, at, developer, chance, fresh)
        tools = int(math.exp(1.6 + 2.9 * chance()) + 6 * len(refs))
        tokens = int(tools * 40 * chance() + found * (1500 + 6000 * chance()))
        ended = end - DEMO_DAYS * DAY_MS + at * 60_000 + int(chance() * 59_000)
        yield (demo_hash("identity", developer), demo_hash("login", developer) if developer % 3 else None,
               demo_hash("session", n), moment_text(ended), tools, tokens, demo_hash("branch", n // 3)[:12],
               json.dumps(refs, separators=(",", ":")), "1.%d.0" % (28 + at // 10_080),
               moment_text(ended + 700)[:19] + "Z")


def write_demo(path: str) -> int:
    """A new database of synthetic sessions, up to the last midnight; returns how many. Refused if the file is
    there or cannot be made."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        raise Refused("%s is there already; the synthetic sessions want a new file" % path) from None
    except OSError as error:
        raise Refused("cannot make %s: %s" % (path, error.strerror)) from error
    rows = list(demo_rows(now_ms() // DAY_MS * DAY_MS))
    names = ", ".join(TABLES["session_events"][1:])
    try:
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.executescript("BEGIN;" + SCHEMA)
            connection.executemany(
                "INSERT INTO session_events (%s) VALUES (?,?,?,?,?,?,?,?,?,?)" % names, rows)
            connection.execute("COMMIT")
    except sqlite3.Error as error:
        raise Refused("cannot write %s: %s" % (path, error)) from error
    return len(rows)


def demo(options: argparse.Namespace) -> int:
    """The synthetic sessions in a file that is asked for, or in one that lives as long as the page on it."""
    if options.db:
        print("%d synthetic sessions written to %s" % (write_demo(options.db), visible(options.db)))
        return 0
    with tempfile.TemporaryDirectory(prefix="session-events-") as folder:
        db = os.path.join(folder, "demo.db")
        print("%d synthetic sessions of %d developers who do not exist" % (write_demo(db), DEMO_DEVELOPERS),
              flush=True)
        return serve(db, options.port, can_open_browser(), "&days=14")


# ======================================================================================================
# Ship: the rows into ClickHouse, over its HTTP interface (18.16 and newer)
# ======================================================================================================

NODE_TABLE = "session_events_node"  # in the database file, one row: the name under which its rows are shipped
RAW = "session_events_raw"
SHIP_ROWS, SHIP_BYTES = 50_000, 16 << 20  # most of one batch; a row can have 26 KB of discoveries
ANSWER_BYTES, ANSWER_SECONDS = 64 << 20, 300.0  # most of ClickHouse's answer, and of its silence
FOLLOW_SECONDS, BACK_OFF_SECONDS = 5.0, 300.0
WHOLE_SECONDS = 1 << 32  # what a DateTime holds: 1970 to 2106
YEARS = (-62_135_596_800_000, 253_402_300_799_999)  # ms: 0001 to 9999
REFS_TEXT = 1 << 16  # an event is not longer

is_ref = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}").fullmatch
is_any_branch = re.compile(r"[0-9A-Fa-f]{7,40}").fullmatch
is_node = re.compile(r"[0-9a-f]{16}").fullmatch
is_number = re.compile(r"-?[0-9]{1,20}").fullmatch


class Unfit(Refused):
    """A row that is no event: it cannot be shipped, and what comes after it must wait."""


class Later(Refused):
    """ClickHouse cannot be reached or is too busy; `after` is its Retry-After in seconds, if it gave one."""

    def __init__(self, text: str, after: Optional[float] = None) -> None:
        super().__init__(text)
        self.after = after


class InsertRefused(Refused):
    """ClickHouse does not take these rows. The text holds its error's number, never its words, which may quote
    a row."""


def checked(fits: Callable[[str], object]) -> Callable[[object], str]:
    def convert(cell: object) -> str:
        if not isinstance(cell, str) or not fits(cell):
            raise ValueError
        return cell
    return convert


def or_null(convert: Callable[[object], str]) -> Callable[[object], Optional[str]]:
    return lambda cell: None if cell is None else convert(cell)


def between(convert: Callable[[object], Optional[int]], least: int, most: int) -> Callable[[object], int]:
    def limited(cell: object) -> int:
        number = convert(cell)
        if number is None or not least <= number <= most:
            raise ValueError
        return number
    return limited


def integer(cell: object) -> Optional[int]:
    return cell if isinstance(cell, int) else None


def refs_list(cell: object) -> List[str]:
    refs = json.loads(cell) if isinstance(cell, str) and len(cell) <= REFS_TEXT else None
    if not isinstance(refs, list) or len(refs) > MOST_REFS:
        raise ValueError
    return [checked(is_ref)(ref) for ref in refs]


CELLS: Tuple[Tuple[str, Callable[[Any], Any], str], ...] = (  # column, its value or ValueError, the rule
    ("id", between(integer, -1 << 63, (1 << 63) - 1), "a whole number"),
    ("received_at", between(instant, 0, WHOLE_SECONDS * 1000 - 1), "a moment from 1970 to 2105"),
    ("identity_hash", checked(is_hash), "64 lowercase hex digits"),
    ("github_hash", or_null(checked(is_hash)), "64 lowercase hex digits, or NULL"),
    ("session_id_hash", checked(is_hash), "64 lowercase hex digits"),
    ("ended_at", between(instant, *YEARS), "an ISO 8601 date and time"),
    ("tool_count", between(integer, 0, MOST_TOOLS), "a whole number from 0 to %d" % MOST_TOOLS),
    ("tokens_saved", between(integer, 0, MOST_TOKENS), "a whole number from 0 to %d" % MOST_TOKENS),
    ("branch_sha", or_null(checked(is_any_branch)), "7 to 40 hex digits, or NULL"),
    ("discovery_refs_json", refs_list, "a JSON array of at most %d slugs" % MOST_REFS),
    ("plugin_version", checked(is_version), "at most 64 letters, digits, and . + _ -"),
)


class Shipped(NamedTuple):
    """A row as it is shipped. `received` is seconds, `ended` the stored form (CONTRACT §1)."""

    id: int
    received: int
    identity: str
    github: Optional[str]
    session: str
    ended: str
    ended_seconds: int
    tools: int
    tokens: int
    branch: Optional[str]
    refs: List[str]
    version: str


def shippable(row: Sequence[Any]) -> Shipped:
    """A row of CELLS as it is shipped. Raises Unfit, which names the row and the column, never the value."""
    cells = []
    for (column, convert, rule), cell in zip(CELLS, row):
        try:
            cells.append(convert(cell))
        except (ValueError, RecursionError):
            raise Unfit("row id %s is no event: its %s is not %s. Nothing from it on is shipped: correct the row, or"
                        " delete it, and run this again" % (row[0], column, rule)) from None
    row_id, received, identity, github, session, ended, tools, tokens, branch, refs, version = cells
    return Shipped(row_id, received // 1000, identity, github, session, moment_text(ended),
                   min(max(ended // 1000, 0), WHOLE_SECONDS - 1), tools, tokens, branch and branch.lower(), refs,
                   version)


def row_sum(s: Shipped) -> int:
    """64 bits that stand for all of the row; ROW_SUM is the same in ClickHouse."""
    text = "%d\n%d\n%s\n%s\n%s\n%s\n%d\n%d\n%s\n%s\n%s" % (
        s.id, s.received, s.identity, s.github or "", s.session, s.ended, s.tools, s.tokens, s.branch or "", s.version,
        "\n".join(s.refs))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


ROW_SUM = r"""reinterpretAsUInt64(substring(SHA256(arrayStringConcat([toString(id), toString(toUInt32(received_at)),
  lower(hex(identity_hash)), ifNull(lower(hex(github_hash)), ''), lower(hex(session_id_hash)), toString(ended_at),
  toString(tool_count), toString(tokens_saved), ifNull(branch_sha, ''), toString(plugin_version),
  arrayStringConcat(discovery_refs, '\n')], '\n')), 1, 8))"""

LENGTHS = [bytes([n]) if n < 128 else bytes([n & 127 | 128, n >> 7]) for n in range(1 << 8)]  # LEB128


def string(text: str) -> bytes:
    return LENGTHS[len(text)] + text.encode("ascii")  # every text of a Shipped is ASCII and shorter than 256


def seniority(node: str, received: int) -> int:
    """64 bits by which the rows of one session are compared: the largest was received first, or in the same second by
    the node whose name (its first 8 digits, which are random) comes first. Nothing else decides, so that shipping in
    another order, or twice, changes nothing."""
    return (1 << 64) - 1 - (received << 32 | int(node[:8], 16))


HEAD, MIDDLE = struct.Struct("<QqI32s"), struct.Struct("<32s24sIII")


def row_binary(node: str, s: Shipped) -> bytes:
    """The row in ClickHouse's RowBinary, in the order of RAW_COLUMNS.

    Two fifths of the bytes of JSONEachRow (217 of 530), and a third of the time it takes to write."""
    return b"".join((
        string(node), HEAD.pack(seniority(node, s.received), s.id, s.received, bytes.fromhex(s.identity)),
        b"\1" if s.github is None else b"\0" + bytes.fromhex(s.github),
        MIDDLE.pack(bytes.fromhex(s.session), s.ended.encode(), s.ended_seconds, s.tools, s.tokens),
        b"\1" if s.branch is None else b"\0" + string(s.branch),
        LENGTHS[len(s.refs)], *map(string, s.refs), string(s.version)))


KEY = struct.Struct("<qQ32s32s")
KEY_COLUMNS = "id Int64, seniority UInt64, identity_hash FixedString(32), session_id_hash FixedString(32)"


def key_binary(node: str, s: Shipped) -> bytes:
    """What ClickHouse needs to say who holds the row's session: KEY_COLUMNS in RowBinary."""
    return KEY.pack(s.id, seniority(node, s.received), bytes.fromhex(s.identity), bytes.fromhex(s.session))


# The same text for 18.16 and today's. Where they differ:
# - LowCardinality is an experiment in 18.16: there `prepare` leaves it out. In RowBinary it makes no difference.
# - ON CLUSTER: 18.16 takes a name without a database, inside a view, for one of the other hosts' default database.
# - DateTime64 is not in 18.16. It would also end in 2299, and an event may have ended in any year up to 9999: so
#   ended_at is the contract's text (its order is the order of time), and ended the nearest DateTime, for charts.
RAW_COLUMNS = (
    ("node", "LowCardinality(String)"), ("seniority", "UInt64"), ("id", "Int64"), ("received_at", "DateTime('UTC')"),
    ("identity_hash", "FixedString(32)"), ("github_hash", "Nullable(FixedString(32))"),
    ("session_id_hash", "FixedString(32)"), ("ended_at", "FixedString(24)"), ("ended", "DateTime('UTC')"),
    ("tool_count", "UInt32"), ("tokens_saved", "UInt32"), ("branch_sha", "Nullable(String)"),
    ("discovery_refs", "Array(String)"), ("plugin_version", "LowCardinality(String)"))
# A session is kept once, whichever nodes received it: rows of one key are merged, and of these the largest seniority
# stays (of two that are equal, one row sent twice, the last). Only rows of one partition and one shard ever meet, so
# there are no partitions, and the shard is the key's. FINAL answers at any moment as if all were merged already; in the
# view it stands below any WHERE, so that no condition can bring back a row that must give way.
RAW_DDL = """CREATE TABLE IF NOT EXISTS {0}.{1} (
  %s
)
ENGINE = {2}""" % ",\n  ".join(map(" ".join, RAW_COLUMNS))
KEPT = "%sReplacingMergeTree(%sseniority)\nORDER BY (identity_hash, session_id_hash)"
VIEWS_DDL = ("""CREATE VIEW IF NOT EXISTS {0}.session_events{1} AS
SELECT lower(hex(r.identity_hash)) AS identity_hash, lower(hex(r.github_hash)) AS github_hash,
  lower(hex(r.session_id_hash)) AS session_id_hash, toString(r.ended_at) AS ended_at, r.ended AS ended,
  r.tool_count AS tool_count, r.tokens_saved AS tokens_saved, r.branch_sha AS branch_sha,
  arrayDistinct(r.discovery_refs) AS discovery_refs, r.plugin_version AS plugin_version,
  r.received_at AS received_at, r.node AS node, r.id AS id
FROM (SELECT * FROM {0}.session_events_raw FINAL) AS r""", """CREATE VIEW IF NOT EXISTS {0}.discovery_propagation{1} AS
SELECT discovery_id, min(ended_at) AS first_seen_at, max(ended_at) AS last_seen_at, count() AS session_count,
  uniqExact(identity_hash) AS distinct_identity_count, now() AS last_aggregated_at
FROM {0}.session_events ARRAY JOIN discovery_refs AS discovery_id
GROUP BY discovery_id""")
LOW_CARDINALITY = re.compile(r"LowCardinality\((\w+)\)")
SETTINGS_SENT = {"insert_distributed_sync": "1",  # an answer means stored, on whichever shard
                 "insert_deduplicate": "0",  # a replica would drop a block that it remembers, though its rows be lost
                 "wait_end_of_query": "1"}  # an answer's status is about all of it


def ddl(cluster: Optional[str], database: str) -> List[str]:
    """The statements that make the table and the views; with `cluster` (a name in ClickHouse's remote_servers) a
    replicated table on each shard, and the one that spreads over them."""
    if cluster is None:
        return [RAW_DDL.format(database, RAW, KEPT % ("", "")), *(view.format(database, "") for view in VIEWS_DDL)]
    on = " ON CLUSTER '%s'" % cluster
    place = "'/clickhouse/tables/{shard}/%s/session_events_local', '{replica}', " % database
    spread = "Distributed('%s', '%s', session_events_local, cityHash64(identity_hash, session_id_hash))" % (
        cluster, database)
    return [RAW_DDL.format(database, "session_events_local" + on, KEPT % ("Replicated", place)),
            RAW_DDL.format(database, RAW + on, spread), *(view.format(database, on) for view in VIEWS_DDL)]


class House(NamedTuple):
    """Where ClickHouse is: what --to says, checked."""

    tls: bool
    host: str
    port: int
    path: str
    parameters: Dict[str, str]


TO = "http://host:8123/?database=analytics"


def house_of(url: str) -> House:
    """Raises Usage. User and password come from the environment alone: a URL is seen in process lists."""
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
        parameters = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
    except ValueError:
        raise Usage("--to takes a URL such as %s" % TO) from None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.fragment or not re.fullmatch(
            "[!-~]+", url):
        raise Usage("--to takes an http or https URL such as %s" % TO)
    if "@" in parts.netloc or {"user", "password", "quota_key", "query"} & set(parameters):
        raise Usage("--to holds no user, password or query: set CLICKHOUSE_USER and CLICKHOUSE_PASSWORD")
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", parameters.setdefault("database", "default")):
        raise Usage("--to names a database of letters, digits and _")
    tls = parts.scheme == "https"
    return House(tls, parts.hostname, port or (8443 if tls else 8123), parts.path or "/", parameters)


def credentials(environment: Mapping[str, str]) -> Dict[str, str]:
    """The headers that carry user and password. Raises Usage."""
    headers = {}
    for variable, header in (("CLICKHOUSE_USER", "X-ClickHouse-User"), ("CLICKHOUSE_PASSWORD", "X-ClickHouse-Key")):
        value = environment.get(variable, "")
        if not re.fullmatch("[ -~]*", value):
            raise Usage("%s may hold printable ASCII only: it travels in a header" % variable)
        if value:
            headers[header] = value
    return headers


def retry_after(text: Optional[str], now: float) -> Optional[float]:
    """Seconds to wait by a Retry-After header (a number, or an HTTP date), a day at most; None without a usable one."""
    if text is None:
        return None
    try:
        seconds = float(text) if is_number(text) else email.utils.parsedate_to_datetime(text).timestamp() - now
    except (TypeError, ValueError, IndexError, OverflowError):
        return None
    return min(max(0.0, seconds), DAY_MS / 1000)


def back_off(failures: int, chance: float) -> float:
    """Seconds to wait after so many failures in a row: doubled each time up to BACK_OFF_SECONDS, at least half of
    that; `chance` (0 to 1) is the jitter that keeps many nodes from coming back together."""
    return min(BACK_OFF_SECONDS, FOLLOW_SECONDS * 2.0 ** min(failures, 30)) * (0.5 + chance / 2)


# ClickHouse's error numbers (ErrorCodes.cpp) that say nothing about the rows and pass by themselves: time-outs, too
# many queries or parts, network, memory, disk space, a replica or its keeper away, a query cancelled by a shutdown.
# 33 and 354: the body did not arrive whole.
PASSING = {33, 159, 160, 198, 202, 203, 209, 210, 225, 236, 241, 242, 243, 252, 279, 285, 286, 319, 354, 394, 439, 999}
SAID = {  # number: what it means here; ClickHouse's own words could name the user
    **dict.fromkeys((192, 193, 194, 516), "does not know this user or password: set CLICKHOUSE_USER and"
                                          " CLICKHOUSE_PASSWORD"),
    164: "lets this user only read",
    497: "does not let this user do that: grant SELECT and INSERT, and CREATE for the first time",
    60: "has no table %s here: nothing was shipped to it yet, or it was dropped meanwhile" % RAW,
    81: "has no such database: make it, or name another in --to (?database=...)",
}


HELD_SQL = """SELECT id, held > seniority AND (holder != '{1}' OR holder_id < {2}) FROM mine ALL INNER JOIN (
  SELECT identity_hash, session_id_hash, max(seniority) AS held, argMax(node, seniority) AS holder,
    argMax(id, seniority) AS holder_id
  FROM {0} WHERE (identity_hash, session_id_hash) GLOBAL IN (SELECT identity_hash, session_id_hash FROM mine)
  GROUP BY identity_hash, session_id_hash
) AS them USING (identity_hash, session_id_hash) WHERE held >= seniority"""


class ClickHouse:
    """One ClickHouse over HTTP. A connection for each request: there are few, and none can have gone stale."""

    def __init__(self, house: House, headers: Dict[str, str]) -> None:
        self.house = house
        self.headers = headers
        self.name = "ClickHouse at %s:%d" % (house.host, house.port)

    def ask(self, sql: str) -> List[List[str]]:
        """The rows of a SELECT, or none. Raises Later, Refused."""
        return self.selected(*self.posted({}, sql.encode(), {}))

    def selected(self, status: int, headers: http.client.HTTPMessage, said: bytes) -> List[List[str]]:
        if status != 200:
            raise self.refusal(status, headers, said, quote=True)
        return [line.split("\t") for line in said.decode("utf-8", "replace").splitlines()]

    def numbers(self, sql: str, width: int) -> List[List[int]]:
        """The rows of a SELECT of so many numbers."""
        return self.numeric(self.ask(sql), width)

    def numeric(self, rows: List[List[str]], width: int) -> List[List[int]]:
        if any(len(row) != width or not all(map(is_number, row)) for row in rows):
            raise Refused(self.name + " answers what was not asked; is it one?")
        return [list(map(int, row)) for row in rows]

    def held(self, node: str, first: int, keys: Iterable[bytes]) -> Dict[int, bool]:
        """{id: is that one of another node, or swept} of the key_binary rows whose session ClickHouse holds, as this
        row or as one that this row gives way to. A session that it holds only as a younger row is not held. `first` is
        the node's first row that is not swept (a session can end again after that).

        The keys go as a table beside the query (ClickHouse's "external data"): in its text they would be in
        ClickHouse's query log, whole, and would not fit it (256 KiB)."""
        rows = b"".join(keys)
        if not rows:
            return {}
        mark = uuid.uuid4().hex
        return {row_id: bool(older) for row_id, older in self.numeric(self.selected(*self.posted(
            {"query": HELD_SQL.format(RAW, node, first), "mine_structure": KEY_COLUMNS, "mine_format": "RowBinary"},
            b'--%s\r\nContent-Disposition: form-data; name="mine"; filename="mine"\r\n\r\n%s\r\n--%s--\r\n' % (
                mark.encode(), rows, mark.encode()),
            {"Content-Type": "multipart/form-data; boundary=" + mark})), 2)}

    def highest(self, node: str) -> Optional[int]:
        """The highest id of a node's rows, None if it has none."""
        found = self.numbers("SELECT max(id) FROM %s WHERE node = '%s' GROUP BY node" % (RAW, node), 1)
        return found[0][0] if found else None

    def insert(self, rows: bytes) -> None:
        """One INSERT of rows in RowBinary. Raises Later, InsertRefused, Refused."""
        packer = zlib.compressobj(1, zlib.DEFLATED, 31)  # level 6 takes twice the time for 3 % less
        query = str(uuid.uuid4())
        status, headers, said = self.posted(
            {"query": "INSERT INTO %s (%s) FORMAT RowBinary" % (RAW, ", ".join(name for name, _ in RAW_COLUMNS)),
             "query_id": query}, packer.compress(rows) + packer.flush(), {"Content-Encoding": "gzip"})
        if status != 200 or said:
            error = self.refusal(status, headers, said, quote=not rows)
            if not rows or isinstance(error, Later):
                raise error
            raise InsertRefused("%s; ClickHouse's log has its words under query_id %s" % (error, query))

    def refusal(self, status: int, headers: http.client.HTTPMessage, said: bytes, quote: bool) -> Refused:
        """What to make of an answer that is no success; its words only if they cannot be about a row."""
        words = said[:2000].decode("utf-8", "replace")
        match = re.match(r"\s*Code: ([0-9]{1,6})[.,]", words)
        number = headers.get("X-ClickHouse-Exception-Code") or (match and match[1]) or ""
        code = int(number) if re.fullmatch("[0-9]{1,6}", number) else None
        after = retry_after(headers.get("Retry-After"), time.time())
        if code in PASSING or (code is None and status in (408, 429, 500, 502, 503, 504)):
            return Later("%s cannot take it now (status %d%s)" % (
                self.name, status, "" if code is None else ", its error %d" % code), after)
        if 300 <= status < 400:
            return Refused("%s sends elsewhere (status %d), which is not followed; name the right place in --to" % (
                self.name, status))
        if code in SAID:
            return Refused("%s %s (its error %d)" % (self.name, SAID[code], code))
        if code is None:
            return Refused("%s answers with status %d and no error of its own: is it ClickHouse's HTTP port?" % (
                self.name, status))
        cut = re.sub(r",? e\.(displayText\(\) =|what\(\).*)", "", words.split("\n")[0])[:300]
        return Refused("%s refuses: %s" % (self.name, cut if quote else "its error %d" % code))

    def posted(self, parameters: Mapping[str, str], body: bytes, headers: Dict[str, str]) -> Tuple[
            int, http.client.HTTPMessage, bytes]:
        """(status, headers, body) of the answer to a POST. Raises Later, Refused. No redirect, no proxy."""
        query = urllib.parse.urlencode({**SETTINGS_SENT, **self.house.parameters, **parameters})
        place = (self.house.host, self.house.port)
        connection = http.client.HTTPSConnection(
            *place, timeout=ANSWER_SECONDS, context=ssl.create_default_context()
        ) if self.house.tls else http.client.HTTPConnection(*place, timeout=ANSWER_SECONDS)
        try:
            connection.connect()
            try:
                connection.request("POST", self.house.path + "?" + query, body, {**self.headers, **headers})
            except ConnectionError:
                pass  # it may have refused before it read everything, and then says why
            answer = connection.getresponse()
            said = answer.read(ANSWER_BYTES + 1)
            if answer.length and len(said) <= ANSWER_BYTES:
                raise http.client.IncompleteRead(said)
        except ssl.SSLCertVerificationError as error:
            raise Refused("%s has a certificate that cannot be trusted: %s" % (
                self.name, error.verify_message)) from None
        except OSError as error:
            raise Later("cannot reach %s: %s" % (
                self.name, error.strerror or str(error) or type(error).__name__)) from None
        except http.client.HTTPException as error:
            raise Later("%s broke off its answer, or it is no HTTP (%s)" % (self.name, type(error).__name__)) from None
        finally:
            connection.close()
        if len(said) > ANSWER_BYTES:
            raise Refused("%s answers without end" % self.name)
        return answer.status, answer.headers, said


def prepare(house: ClickHouse, cluster: Optional[str]) -> None:
    """Makes what is not there yet, and raises Refused where the table is not the one that is written to: RowBinary
    has no names in it, so that another type would be filled with nonsense."""
    version = house.ask("SELECT version()")
    if len(version) != 1 or not re.fullmatch(r"[0-9]+\.[0-9.]+", version[0][0]):
        raise Refused("%s is no ClickHouse: it does not know its version" % house.name)
    there = {row[0]: row[-1] for row in house.ask(
        "SELECT name, type FROM system.columns WHERE database = currentDatabase() AND table = '%s'"
        " FORMAT TabSeparatedRaw" % RAW)}
    for column, kind in RAW_COLUMNS if there else ():
        if LOW_CARDINALITY.sub(r"\1", there.get(column, "")) != LOW_CARDINALITY.sub(r"\1", kind):
            raise Refused("%s has a table %s whose column %s is not %s; rename that table, or see --print-ddl" % (
                house.name, RAW, column, kind))
    views = house.ask("SELECT name FROM system.tables WHERE database = currentDatabase() AND name IN"
                      " ('session_events', 'discovery_propagation')")
    if not there or len(views) < 2:
        for statement in ddl(cluster, house.house.parameters["database"]):
            house.ask(LOW_CARDINALITY.sub(r"\1", statement) if version[0][0].startswith("18.") else statement)


def node_of(path: str) -> str:
    """The name of the database file as a node: random, made once, and kept in the file, so that a copy of the program,
    a new address or another machine does not change it."""
    with reading(path) as reader:
        name = node_in(reader)
    if name is None:
        try:
            with contextlib.closing(sqlite3.connect(Path(path).absolute().as_uri() + "?mode=rw", uri=True,
                                                    timeout=BUSY_SECONDS, isolation_level=None)) as connection:
                connection.executescript("BEGIN IMMEDIATE; CREATE TABLE IF NOT EXISTS %s (one INTEGER PRIMARY KEY"
                                         " CHECK (one = 1), name TEXT NOT NULL);" % NODE_TABLE)
                connection.execute("INSERT OR IGNORE INTO %s VALUES (1, ?)" % NODE_TABLE, [secrets.token_hex(8)])
                connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise Refused("cannot write the node's name into %s, which is done once: %s" % (path, (
                "only a user who may write the file and its folder can (run this once as the server's user)"
                if re.search("readonly|unable to open", str(error)) else explained(error, path)))) from error
        with reading(path) as reader:
            name = node_in(reader)
    if name is None or not is_node(name):
        raise Refused("the table %s in %s does not hold a node's name; drop it, and a new one is made" % (
            NODE_TABLE, path))
    return name


def node_in(reader: Reader) -> Optional[str]:
    if not reader.rows("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?", [NODE_TABLE]).fetchone():
        return None
    found = reader.rows("SELECT name FROM " + NODE_TABLE).fetchone()
    return str(found[0]) if found else None


SHIP_SQL = "SELECT %s FROM session_events WHERE id " % ", ".join(column for column, _, _ in CELLS)


def batch_after(path: str, after: int) -> List[Shipped]:
    """The next rows in the order of their ids, up to SHIP_ROWS or about SHIP_BYTES; none at the end.

    Each batch is a read of its own, so that a slow ClickHouse never keeps the server from emptying its -wal file.
    Raises Unfit only when nothing stands before the row."""
    rows: List[Shipped] = []
    size = 0
    with reading(path) as reader:
        for row in reader.rows(SHIP_SQL + "> ? ORDER BY id LIMIT ?", [after, SHIP_ROWS]):
            try:
                rows.append(shippable(row))
            except Unfit:
                if not rows:
                    raise
                break
            size += 256 + sum(map(len, rows[-1].refs))
            if size >= SHIP_BYTES:
                break
    return rows


LEAST_ID = -1 << 63


def resume_point(path: str, house: ClickHouse, node: str) -> int:
    """The id after which to go on: everything up to it is in ClickHouse. Raises Refused if what is there under this
    node's name is not this file's.

    Rows are sent in the order of their ids, and each batch only when the one before it was answered. So what may be
    missing below the highest id there (a batch can be in by halves, on one of two shards) is among the last SHIP_ROWS
    rows, and these are compared one by one. Two that ship at once change nothing of that: each sends without a gap.

    A row that gave way to another node's is gone after a merge, and nothing is missing: what is not there by its id is
    looked for by its session. The highest id that is left can be less than what was sent, so that goes on behind it,
    up to the first row that is nowhere."""
    top = house.highest(node)
    after = LEAST_ID
    if top is not None:
        with reading(path) as reader:
            highest = reader.rows("SELECT max(id) FROM session_events").fetchone()[0]
            if reader.rows("SELECT 1 FROM sqlite_master WHERE name = 'sqlite_sequence'").fetchone():  # maybe swept
                sequence = reader.rows("SELECT max(seq) FROM sqlite_sequence WHERE name = 'session_events'").fetchone()
                highest = max((n for n in (highest, sequence[0]) if n is not None), default=None)
            if highest is None or highest < top:
                raise other_file(house, path)
            before = reader.rows("SELECT id FROM session_events WHERE id <= ? ORDER BY id DESC LIMIT 1 OFFSET ?",
                                 [top, SHIP_ROWS]).fetchone()
            after = before[0] if before else after
    while True:
        rows = batch_after(path, after)
        if not rows:
            return after
        ours = {s.id: s for s in rows}
        theirs = house.numbers("SELECT id, %s FROM %s WHERE node = '%s' AND id >= %d AND id <= %d" % (
            ROW_SUM, RAW, node, rows[0].id, rows[-1].id), 2) if top is not None and rows[0].id <= top else []
        if any(row_id in ours and row_sum(ours[row_id]) != total for row_id, total in theirs):
            raise other_file(house, path)
        gone = ours.keys() - {row_id for row_id, _ in theirs}
        held = house.held(node, rows[0].id, (key_binary(node, ours[row_id]) for row_id in gone))
        if gone - held.keys():
            return min(gone - held.keys()) - 1
        after = rows[-1].id


def other_file(house: ClickHouse, path: str) -> Refused:
    return Refused("%s holds other rows under this node's name than %s: the file is an old copy, or was copied to a"
                   " second node. Give it a name of its own (sqlite3 FILE 'DROP TABLE %s') and run this again: it is"
                   " shipped anew, and no session counts twice" % (house.name, path, NODE_TABLE))


def store(house: ClickHouse, node: str, rows: Sequence[Shipped]) -> None:
    """One batch. Raises Refused with the row's id when there is one that ClickHouse does not take; what comes before
    it is stored then."""
    try:
        house.insert(b"".join(row_binary(node, s) for s in rows))
    except InsertRefused as error:
        house.insert(b"")  # if it refuses that too, it is not about a row, and says so
        if len(rows) == 1:
            raise Refused("row id %d cannot be shipped, and nothing after it is: %s" % (rows[0].id, error)) from None
        middle = len(rows) // 2
        store(house, node, rows[:middle])
        store(house, node, rows[middle:])


def ship_rows(path: str, house: ClickHouse, node: str, after: int, told: Callable[[int], object]) -> int:
    """Ships what comes after an id; the last id. `told` hears how many rows each batch had."""
    while True:
        rows = batch_after(path, after)
        if not rows:
            return after
        store(house, node, rows)
        after = rows[-1].id
        told(len(rows))


class Progress:
    """How many rows were shipped; on a terminal, while it goes on."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, rows: int) -> None:
        self.count += rows
        if sys.stderr.isatty():
            sys.stderr.write("\r{:,} rows shipped".format(self.count))
            sys.stderr.flush()

    def end(self) -> None:
        if self.count and sys.stderr.isatty():
            sys.stderr.write("\n")


def follow(path: str, house: ClickHouse, node: str, cluster: Optional[str], told: Callable[[int], object]) -> int:
    """Ships until SIGTERM or Ctrl-C; 0. Where to go on is asked of ClickHouse at first and after each fault."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    after: Optional[int] = None
    failures = 0
    try:
        while True:
            try:
                if after is None:
                    prepare(house, cluster)
                    after = resume_point(path, house, node)
                after = ship_rows(path, house, node, after, told)
                failures, wait = 0, FOLLOW_SECONDS
            except Later as error:
                after, failures = None, failures + 1
                wait = back_off(failures, random.random()) if error.after is None else error.after
                print("session_events: %s; again in %.0f s" % (visible(str(error)), wait), file=sys.stderr, flush=True)
            time.sleep(wait)
    except KeyboardInterrupt:
        return 0


DaySums = Dict[int, List[int]]  # {day since 1970: [rows, sum of their row sums]}


def day_sums(path: str, after: int, last: int, chosen: Callable[[List[Shipped]], Iterable[Shipped]]) -> Tuple[
        DaySums, DaySums, Dict[int, int], int]:
    """(the file's rows up to the id `last`, those behind it, the first id) by the day on which they were received, and
    the last id; of the rows after an id, as far as `chosen` takes them from their batch."""
    shipped: DaySums = {}
    waiting: DaySums = {}
    starts: Dict[int, int] = {}
    while True:
        rows = batch_after(path, after)
        if not rows:
            return shipped, waiting, starts, after
        for s in chosen(rows):
            starts.setdefault(day_of(s), s.id)
            day = (shipped if s.id <= last else waiting).setdefault(day_of(s), [0, 0])
            day[:] = day[0] + 1, (day[1] + row_sum(s)) % (1 << 64)
        after = rows[-1].id


def day_of(s: Shipped) -> int:
    return s.received // 86_400


def without(sums: DaySums, taken: DaySums) -> DaySums:
    """The days that are left, with what is left of them."""
    left = {day: [rows - taken.get(day, [0, 0])[0], (total - taken.get(day, [0, 0])[1]) % (1 << 64)]
            for day, (rows, total) in sums.items()}
    return {day: rest for day, rest in left.items() if rest != [0, 0]}


def check(path: str, house: ClickHouse, node: str) -> int:
    """Compares the file's rows with ClickHouse's, day by day; 0 if all are there, else 1. Rows of today that wait to be
    shipped are no difference, those of earlier days are.

    A session that another node received first (or this one, before a sweep) is held as that row. Where a day differs,
    the file's rows of it are looked for by their sessions, and those held so are taken out of the comparison."""
    last = house.highest(node)
    top = LEAST_ID if last is None else last
    shipped, waiting, starts, end = day_sums(path, LEAST_ID, top, lambda rows: rows)
    first = min(starts.values(), default=top)
    theirs = {day: [rows, total] for day, rows, total in house.numbers(
        "SELECT toUInt32(toDate(received_at)) AS day, count(), sum(%s) FROM %s FINAL WHERE node = '%s' AND id >= %d"
        " AND id <= %d GROUP BY day" % (ROW_SUM, RAW, node, first, top), 3)
    } if last is not None else {}
    days = {day for day in {*shipped, *theirs} if shipped.get(day) != theirs.get(day)}

    def elsewhere(rows: List[Shipped]) -> Iterable[Shipped]:
        asked = [s for s in rows if s.id <= end and (s.id > top or day_of(s) in days)]
        held = house.held(node, first, (key_binary(node, s) for s in asked))
        return (s for s in asked if held.get(s.id))

    begin = min([top + 1, *(starts[day] for day in days if day in starts)]) - 1
    lost, lost_waiting = day_sums(path, begin, top, elsewhere)[:2]
    shipped, waiting = without(shipped, lost), without(waiting, lost_waiting)
    today = now_ms() // DAY_MS
    differ = 0
    for day in sorted({*shipped, *theirs, *waiting}):
        here, there, later = shipped.get(day, [0, 0]), theirs.get(day, [0, 0]), waiting.get(day, [0, 0])[0]
        if here != there or (later and day < today):
            differ += 1
            print("%s  differs: %d rows in the file, %d in ClickHouse%s" % (
                moment_text(day * DAY_MS)[:10], here[0] + later, there[0],
                "" if here[0] + later != there[0] else ", not the same"))
    compared, late, given = (sum(rows for sums in kinds for rows, _ in sums.values()) for kinds in (
        (shipped,), (waiting,), (lost, lost_waiting)))
    before = ", {:,} stand as received before (by another node, or before a sweep)".format(given) if given else ""
    print("{:,} rows compared{}, {:,} wait to be shipped: {}".format(
        compared, before, late, "the same on every day" if not differ else "%d days differ; %s" % (
            differ, "ship, and check again" if late else "ship --again sends all of them once more")))
    return 1 if differ else 0


def ship(options: argparse.Namespace) -> int:
    if options.cluster is not None and not re.fullmatch(r"[A-Za-z0-9_.{}-]{1,64}", options.cluster):
        raise Usage("--cluster takes the name of a cluster in ClickHouse's configuration")
    if options.print_ddl:
        print(";\n\n".join(ddl(options.cluster, house_of(options.to or TO).parameters["database"])) + ";")
        return 0
    if not options.db or not options.to:
        raise Usage("ship takes --db FILE and --to URL")
    if options.check + options.follow + options.again > 1:
        raise Usage("--check, --follow and --again are three different things; give one")
    house = ClickHouse(house_of(options.to), credentials(os.environ))
    node = node_of(options.db)
    if options.check:
        return check(options.db, house, node)
    progress = Progress()
    try:
        if options.follow:
            return follow(options.db, house, node, options.cluster, progress)
        prepare(house, options.cluster)
        ship_rows(options.db, house, node,
                  LEAST_ID if options.again else resume_point(options.db, house, node), progress)
    finally:
        progress.end()
    print("{:,} rows shipped as node {}".format(progress.count, node))
    return 0


# ==================================================================================================
# Command line
# ==================================================================================================


class Usage(Exception):
    """The command line asks for what cannot be; the text says so."""


def window_of(options: argparse.Namespace) -> Window:
    for name in ("since", "until"):
        if getattr(options, name) is not None and day_start(getattr(options, name)) is None:
            raise Usage("--%s takes a date (2026-05-22) or a moment (2026-05-22T12:34:56Z)" % name)
    if options.since and options.days:
        raise Usage("--days and --since say the same twice; give one")
    window = window_between(options.days or DAYS_DEFAULT, options.since or "", options.until or "",
                            GITHUB_FLAGS[options.github], getattr(options, "discovery", None))
    if window.since >= window.until:
        raise Usage("--until must be after --since")
    return window


def whole_number(least: int, most: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError("a whole number from %d to %d" % (least, most))
        return int(text)
    return convert


def ran_sessions(reader: Reader, options: argparse.Namespace) -> Plain:
    return sessions(reader, window_of(options), options.limit or 50)


def ran_session(reader: Reader, options: argparse.Namespace) -> Plain:
    return session(reader, options.session)


def ran_discoveries(reader: Reader, options: argparse.Namespace) -> Plain:
    return discoveries(reader, window_of(options), options.limit or 50, options.sort)


def ran_discovery(reader: Reader, options: argparse.Namespace) -> Plain:
    return discovery(reader, options.ref, window_of(options), options.limit or 200)


def ran_graph(reader: Reader, options: argparse.Namespace) -> Plain:
    window = window_of(options)
    if options.format != "html":
        return graph(reader, window, options.limit or DRAWN)
    newest = reader.window(window, options.limit or DRAWN)
    return {"nodes": newest, "html": graph_html(newest[::-1], reader.count(window),
        window.discovery)}


def ran_activity(reader: Reader, options: argparse.Namespace) -> Plain:
    return activity(reader, window_of(options))


def ran_summary(reader: Reader, options: argparse.Namespace) -> Plain:
    return summary(reader, window_of(options))


def ran_developers(reader: Reader, options: argparse.Namespace) -> Plain:
    result = developers(reader, window_of(options))
    return dict(result, developers=result["developers"][:options.limit])


def ran_export(reader: Reader, options: argparse.Namespace) -> Plain:
    window = window_of(options)
    rows = exported(reader, window)
    if sys.stderr.isatty():
        rows = with_progress(rows, reader.count(window), sys.stderr)
    return {"rows": rows}


def with_progress(rows: Iterator[Plain], total: int, screen: TextIO) -> Iterator[Plain]:
    n = 0
    for n, row in enumerate(rows, 1):
        if n % 5000 == 0:
            screen.write("\r{:,} of {:,} sessions".format(n, total))
            screen.flush()
        yield row
    screen.write("\r{:,} of {:,} sessions\n".format(n, total))


def json_stream(rows: Iterable[Plain]) -> Iterator[str]:
    before = "[\n"
    for row in rows:
        yield before + json.dumps(row)
        before = ",\n"
    yield "[]\n" if before == "[\n" else "\n]\n"


def csv_stream(rows: Iterable[Plain]) -> Iterator[str]:
    return (csv_text([row], header=n == 0) for n, row in enumerate(rows))


Format = Callable[[Plain], Iterable[str]]  # a command's result to pieces of text


def forms(key: str, text: Callable[[Plain], str]) -> Dict[str, Format]:
    """The forms of a command whose result has a list of rows under `key`."""
    return {"text": lambda r: [text(r)], "json": lambda r: [json_text(r)],
            "csv": lambda r: [csv_text(r[key])], "jsonl": lambda r: [jsonl_text(r[key])]}


class Question(NamedTuple):
    """A command that asks the database: its arguments (names in ARGUMENTS), its forms (the first
    is the default), and which part of the result is empty when nothing was found."""

    help: str
    example: str
    arguments: Sequence[str]
    ask: Callable[[Reader, argparse.Namespace], Plain]
    forms: Dict[str, Format]
    found: str


class Action(NamedTuple):
    """A command that does something else."""

    help: str
    example: str
    arguments: Sequence[str]
    run: Callable[[argparse.Namespace], int]


def view(options: argparse.Namespace) -> int:
    return serve(options.db, options.port, options.open)


GITHUB_FLAGS = {"any": None, "with": True, "without": False}
ARGUMENTS: Dict[str, Tuple[str, Plain]] = {
    "db": ("--db", {"metavar": "FILE", "required": True,
              "help": "the database that server.py writes"}),
    "days": ("--days", {"metavar": "N", "type": whole_number(1, 36_500),
                        "help": "the last N days (%d)" % DAYS_DEFAULT}),
    "since": ("--since",
              {"metavar": "TIME", "help": "from this date or moment on (UTC), instead of --days"}),
    "until": ("--until", {"metavar": "TIME", "help": "before this date or moment"}),
    "github": ("--github", {"choices": list(GITHUB_FLAGS), "default": "any",
                            "help": "only sessions with GitHub, or without"}),
    "discovery": ("--discovery", {"metavar": "REF",
              "help": "sessions that touched this discovery"}),
    "limit": ("--limit", {"metavar": "N", "type": whole_number(1, 999_999_999),
              "help": "at most N rows"}),
    "sort": ("--sort", {"choices": list(DISCOVERY_SORTS), "default": SORTS[0],
              "help": "what comes first"}),
    "session": ("session",
              {"metavar": "HASH", "help": "a session's hash, or its first digits (4 or more)"}),
    "ref": ("ref", {"metavar": "REF", "help": "the discovery"}),
    "port": ("--port", {"metavar": "N", "type": whole_number(0, 65_535), "default": 8788,
                        "help": "the port to listen on (8788); 0 is any free one"}),
    "open": ("--open", {"action": "store_true", "help": "open the page in a browser"}),
    "ship_db": ("--db", {"metavar": "FILE", "help": "the database that server.py writes"}),
    "to": ("--to", {"metavar": "URL", "help": "ClickHouse's HTTP interface; CLICKHOUSE_USER and CLICKHOUSE_PASSWORD"
                                              " in the environment say who"}),
    "follow": ("--follow", {"action": "store_true", "help": "go on with what comes in, every %d s" % FOLLOW_SECONDS}),
    "check": ("--check", {"action": "store_true", "help": "ship nothing; compare counts and a checksum for each day,"
                                                          " and exit with 1 if a day differs"}),
    "again": ("--again", {"action": "store_true", "help": "every row once more, where a check found days that differ"}),
    "print_ddl": ("--print-ddl", {"action": "store_true", "help": "only print what makes the table and the views"}),
    "cluster": ("--cluster", {"metavar": "NAME", "help": "make them on every host of this ClickHouse cluster,"
                                                         " replicated"}),
    "demo_db": ("--db", {"metavar": "FILE", "help": "only write them into this new file"}),
}
WINDOWED = ("db", "days", "since", "until", "github")
QUESTIONS = {
    "sessions": Question(
        "the sessions, newest first", "sessions --db events.db --days 30",
        (*WINDOWED, "discovery", "limit"),
        ran_sessions, forms("sessions", sessions_text), "sessions"),
    "session": Question(
        "one session, with the same identity's others",
        "session %s --db demo.db" % demo_hash("session", 0)[:8], ("session", "db"),
        ran_session, {"text": lambda r: [session_text(r)], "json": lambda r: [json_text(r)]},
        "session"),
    "discoveries": Question(
        "how far discoveries went round", "discoveries --db events.db --days 30 --sort recent",
        (*WINDOWED, "limit", "sort"), ran_discoveries,
        forms("discoveries", discoveries_text), "discoveries"),
    "discovery": Question(
        "one discovery: whom it reached, and its path",
        "discovery rate-limit-buckets --db demo.db --days 30",
        ("ref", *WINDOWED, "limit"), ran_discovery, forms("path", discovery_text), "path"),
    "graph": Question(
        "who carried knowledge on to whom", "graph --db events.db --format html > replay.html",
        (*WINDOWED, "discovery", "limit"), ran_graph,
        dict(forms("edges", graph_text), dot=lambda r: [dot_text(r)], html=lambda r: [r["html"]]),
            "nodes"),
    "developers": Question(
        "who gives and who receives: sessions, calls, tokens saved, hand-overs",
        "developers --db events.db --days 30", (*WINDOWED, "limit"), ran_developers,
        forms("developers", developers_text), "developers"),
    "summary": Question(
        "the findings of a window in words, and the window before it beside them: a digest to mail",
        "summary --db events.db --days 7 | mail -s 'Sessions' team@example.org", WINDOWED,
        ran_summary,
        {"text": lambda r: [summary_text(r)], "json": lambda r: [json_text(r)]}, "sessions"),
    "activity": Question(
        "developers, sessions, tokens saved by day, week and month",
        "activity --db events.db --days 90",
        (*WINDOWED, "discovery"), ran_activity, forms("days", activity_text), "days"),
    "export": Question(
        "every session of a window, oldest first",
        "export --db events.db --days 365 --format csv > sessions.csv",
        (*WINDOWED, "discovery"), ran_export,
        {"jsonl": lambda r: (jsonl_text([row]) for row in r["rows"]),
        "csv": lambda r: csv_stream(r["rows"]),
         "json": lambda r: json_stream(r["rows"])}, "rows"),
}
ACTIONS = {
    "view": Action("the replay page and the tables, in a browser", "view --db events.db --open",
                   ("db", "port", "open"), view),
    "ship": Action("move the rows into a ClickHouse, and on from where it stopped",
                   "ship --db events.db --to 'http://host:8123/?database=analytics' --follow",
                   ("ship_db", "to", "follow", "check", "again", "print_ddl", "cluster"), ship),
    "demo": Action("try it: synthetic sessions and the page on them", "demo", ("demo_db", "port"),
    demo),
}


def parser() -> argparse.ArgumentParser:
    shape = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(
        "session_events.py", formatter_class=shape,
        description="Shows the sessions that server.py stored.",
        epilog="example: python3 session_events.py demo\n\nexit status: 0 answered (also when there is"
               " nothing in the window), 1 not found or\nnot readable, 2 the command line is wrong")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    every: Dict[str, Union[Question, Action]] = {**QUESTIONS, **ACTIONS}
    for name, command in every.items():
        sub = commands.add_parser(name, help=command.help, description=command.help,
            formatter_class=shape,
                                  epilog="example: python3 session_events.py " + command.example)
        for argument in command.arguments:
            flag, details = ARGUMENTS[argument]
            sub.add_argument(flag, **details)
        if isinstance(command, Question):
            sub.add_argument("--format", choices=list(command.forms),
                default=next(iter(command.forms)),
                             help="the form of the answer (%(default)s)")
    return top


def ask(question: Question, options: argparse.Namespace, out: Callable[[str], Any]) -> None:
    """Prints the answer; what is said about it goes to standard error."""
    with reading(options.db) as reader:
        result = question.ask(reader, options)
        written = 0
        for piece in question.forms[options.format](result):
            out(piece)
            written += 1
        if question.found == "rows" and options.format != "json":
            found = written > 0
        elif question.found == "days":
            found = any(day["sessions"] for day in result["days"])
        else:
            found = bool(result[question.found])
        left_out = reader.left_out
        if not found:
            newest = last_event(reader)
            print("nothing in this window; %s" % (
                "the last session ended %s UTC (--days and --since look further back)"
                % minute(newest)
                if newest else "there is no session at all"), file=sys.stderr)
        if left_out:
            print("left out: %d rows that are no sessions" % left_out, file=sys.stderr)


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Runs one command; the exit status."""
    options = parser().parse_args(arguments)

    def out(text: str) -> None:
        sys.stdout.buffer.write(text.encode("utf-8", "replace"))

    try:
        if options.command in ACTIONS:
            return ACTIONS[options.command].run(options)
        ask(QUESTIONS[options.command], options, out)
        sys.stdout.flush()
        return 0
    except (NotFound, Refused, Usage) as error:
        print("session_events: %s" % visible(str(error)), file=sys.stderr)
        return 2 if isinstance(error, Usage) else 1
    except BrokenPipeError:
        # Whoever read the output has seen enough (`| head`). Nothing can be written there, at exit
        # neither.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + getattr(signal, "SIGPIPE", 13)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def step_back() -> None:
    """Lets a server on the same machine go first. A loop of queries beside one under full load on
    2 cores took a third of its rate, and takes nothing that can be measured since it does
    this."""
    if hasattr(os, "nice"):
        os.nice(10)


if __name__ == "__main__":
    step_back()
    sys.exit(main())
