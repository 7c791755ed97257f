#!/usr/bin/env python3
"""Shows the sessions that server.py stored: tables, the session graph, a replay page. One file,
no install.

    python3 session_events.py demo                                try it, on synthetic sessions
    python3 session_events.py view --db events.db --open          the page on your own
    python3 session_events.py summary --db events.db --days 7     a digest of the week, to mail
    python3 session_events.py sessions --db events.db --days 30   the same as text, JSON, CSV ...
    python3 session_events.py ship --db events.db --to URL      rows of many servers into ClickHouse

Promises: The database is opened read-only. Each command reads one moment of it, in one
transaction. A running server goes first. Every row is checked when it is read; a row that breaks a
field's rule is no session, is left out of every number, and is counted as left out. A developer is
shown as the first digits of a hash. The page answers this machine only, and asks nothing of any
other. `ship` differs: it writes how far it got into the database, takes a transaction a batch,
leaves nothing out, and moves whole hashes.

Limits: Python 3.8 and newer, SQLite 3.22 and newer. The hashes of developers change with the
quarter, so nobody is the same developer before and after its first day. Times are UTC; so are a
day, a week (from Monday), a month.

As a library (all results are plain dicts and lists, the same as `--format json`):

    import session_events
    with session_events.reading("events.db") as reader:
        week = session_events.last_days(7)
        print(session_events.graph(reader, week)["totals"])

Rooms: the contract → a row → queries → the graph → renderers (text, CSV, DOT; HTML) → the database
file → viewer → demo → ship → command line → style → script.
"""
from __future__ import annotations

import argparse
import array
import base64
import bisect
import collections
import contextlib
import csv
import datetime
import errno
import functools
import gc
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
import socket
import sqlite3
import statistics
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import urllib.parse
import uuid
import webbrowser
from pathlib import Path
from typing import (
    Any,
    Callable,
    Counter,
    Deque,
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

__version__ = "1.0.0"

# ==================================================================================================
# The contract
# ==================================================================================================

SCHEMA_VERSION = 1
TABLES = {
    "session_events": (
        "id", "identity_hash", "github_hash", "session_id_hash", "ended_at", "tool_count",
        "tokens_saved", "branch_sha", "discovery_refs_json", "plugin_version", "received_at"),
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
MOST_REFS = RULES["discovery_refs"][0]
PREFIX, LONGEST_PREFIX = 8, 12  # digits of a developer's hash that are shown
ADMIN_TOKEN_VARIABLE = "ASHLR_ADMIN_TRIGGER_TOKEN"
RELATED_DAYS, RELATED_LIMIT = 30, 50
DAYS_DEFAULT, DRAWN = 7, 2000  # DRAWN: sessions in one picture
SORTS = ("session_count", "distinct_identity_count", "recent")
# What /admin/discoveries/propagation says of a discovery.
PROPAGATION = ("discovery_id", "first_seen_at", "last_seen_at", "session_count",
               "distinct_identity_count", "last_aggregated_at")
END_OF_TIME = ":"  # the character after "9": above every moment
NO_FILTER = (None, None)  # the last two parts of a Window

# The library: what other programs may use. Everything else may change.
__all__ = [
    "EVER", "NotFound", "Reader", "Refused", "Window", "activity", "developers", "discoveries",
    "discovery", "exported", "findings", "graph", "last_days", "last_event", "reading", "session",
    "sessions", "summary", "window_between",
]

Plain = Dict[str, Any]  # what json.dumps takes
compact_json = json.JSONEncoder(separators=(",", ":")).encode

# ==================================================================================================
# A row: no cell is trusted until it has been checked here
# ==================================================================================================

is_slug = re.compile(RULES["discovery_refs"][1]).fullmatch
SECOND = r"\d{4}-\d\d-\d\dT(?:[01]\d|2[0-3])(?::[0-5]\d){2}"
# What server.py stores. Another program may leave out the fraction.
STORED = re.compile(SECOND + r"(?:\.\d{3})?Z", re.ASCII)
MOMENT = re.compile(
    SECOND + r"(?:\.(\d+))?(?:Z|([+-](?:[01]\d|2[0-3]):[0-5]\d))?", re.ASCII)
EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc)
MILLISECOND = datetime.timedelta(milliseconds=1)
DAY_MS = 86_400_000


class Session(NamedTuple):
    """One row that has been checked. `ended` is milliseconds since 1970, UTC. `developer`: who it
    was, as shown (see `developers_of`)."""

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
    developer: str = ""


def instant(text: object) -> Optional[int]:
    """Milliseconds since 1970 of an ISO 8601 date and time (README, Contract 1), else None."""
    match = MOMENT.fullmatch(text) if isinstance(text, str) else None
    if not match:
        return None
    moment, fraction, offset = match.string[:19], match[1] or "", match[2] or "+00:00"
    try:
        iso = moment + "." + (fraction + "000")[:3] + offset
        return (datetime.datetime.fromisoformat(iso) - EPOCH) // MILLISECOND
    except ValueError:  # there is no such day
        return None


def stored_instant(text: object) -> Optional[int]:
    """`instant` of a moment in stored form (with milliseconds or none), else None."""
    return instant(text) if isinstance(text, str) and STORED.fullmatch(text) else None


def moment_text(ms: int) -> str:
    """The stored form of a moment: UTC with milliseconds, so that text order is time order."""
    try:
        moment = EPOCH + ms * MILLISECOND
    except OverflowError:
        moment = datetime.datetime.min if ms < 0 else datetime.datetime.max
    return moment.replace(tzinfo=None).isoformat(timespec="milliseconds") + "Z"


def moment_or_none(text: object) -> Optional[str]:
    ms = instant(text)
    return None if ms is None else moment_text(ms)


def now_ms() -> int:
    return int(datetime.datetime.now(datetime.timezone.utc).timestamp() * 1000)


def refs_of(text: object) -> Optional[List[str]]:
    """The discoveries in `discovery_refs_json`, each once, in order; None if one breaks a rule."""
    try:
        values = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, list) or len(values) > MOST_REFS or not all(
            isinstance(value, str) and is_slug(value) for value in values):
        return None
    return list(dict.fromkeys(values))


# A row has these columns, in this order.
COLUMNS = ("id", *(name + "_json" if kind == "array" else name for name, kind, *_ in FIELDS))
ID, IDENTITY, GITHUB, SESSION_ID, ENDED_AT, TOOLS, TOKENS, BRANCH_SHA, REFS, VERSION = range(10)
WHO = len(COLUMNS)  # who it was, which `Reader.columns` adds
SELECTED = ", ".join("e." + name for name in COLUMNS)


def cell_check(kind: str, rule: Any) -> Callable[[object], bool]:
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
    return lambda cell: (
        nullable if cell is None else isinstance(cell, str) and fits(cell) is not None)


CHECKS = [cell_check(kind, rule) for _, kind, _, rule in FIELDS]


def is_session(row: Sequence[Any]) -> bool:
    """Whether a row is a session: each cell keeps the rule of its field (FIELDS). This is the one
    definition. Every question is answered from rows that passed it, one by one (`Reader.checked`)
    or many at once (`sound`)."""
    return all(check(cell) for check, cell in zip(CHECKS, row[1:]))


def plain_row(row: Sequence[Any]) -> Tuple[Any, ...]:
    """A session's row as server.py would have written it: with milliseconds, refs without blanks.
    (A ref may stand twice.)"""
    cells = list(row)
    cells[ENDED_AT] = row[ENDED_AT][:19] + (row[ENDED_AT][19:-1] or ".000") + "Z"
    cells[REFS] = compact_json(json.loads(row[REFS]))
    return tuple(cells)


# Many rows at once, in a fraction of the time that `is_session` takes: the texts of a column are
# joined, a cell a line, and looked at together. This may be stricter than `is_session`, but never
# laxer. It is exact about where cells end, because no rule allows a line end in a cell.

Cells = Sequence[Any]  # of one column
Columns = Sequence[Cells]
Lines = Callable[[bytes, int], bool]  # whether a text is so many lines that keep a rule
HEX_DIGITS = b"0123456789abcdef"
DIGITS_TO_0 = bytes.maketrans(b"123456789", b"0" * 9)


def hash_lines(text: bytes, count: int) -> bool:
    """Lines of 64 digits. (A tenth of a pattern's time.)"""
    ends = b"\n" * (count - 1)
    return (len(text) == 65 * count - 1
            and text[64::65] == ends == text.translate(None, HEX_DIGITS))


def moment_lines(text: bytes, count: int) -> bool:
    """Lines of moments with milliseconds. An hour is looked at once."""
    form = b"0000-00-00T00:00:00.000Z\n" * count
    if text.translate(DIGITS_TO_0) != form[:-1]:
        return False
    minutes_and_seconds = text[14::25] + text[17::25]  # the tens of each
    hours = {line[:13] for line in text.split(b"\n")}
    return (not minutes_and_seconds.translate(None, b"012345") and None not in (
        stored_instant(hour.decode() + ":00:00Z") for hour in hours))


def cell_pattern(kind: str, rule: Any) -> str:
    """The pattern of a text as server.py writes it."""
    if kind == "array":
        return r'\[\]|\["{0}"(?:,"{0}"){{0,{1}}}\]'.format(rule[1], rule[0] - 1)
    return "[0-9]+" if kind == "number" else rule


def pattern_lines(pattern: str) -> Lines:
    fits = re.compile(b"(?:(?:%s)\n)*" % pattern.encode()).fullmatch
    return lambda text, count: text.count(b"\n") == count - 1 and fits(text + b"\n") is not None


SPECIAL: Dict[str, Lines] = {"identity_hash": hash_lines, "github_hash": hash_lines,
                             "session_id_hash": hash_lines, "ended_at": moment_lines}
LINES = [SPECIAL.get(name) or pattern_lines(cell_pattern(kind, rule))
         for name, kind, _, rule in FIELDS]


def keep(column: Cells, kind: str, rule: Any, lines: Lines) -> bool:
    """True only if these cells, which are one or more, keep the rule of their field."""
    if kind == "number":
        return {*map(type, column)} == {int} and rule[0] <= min(column) <= max(column) <= rule[1]
    if kind == "string or null":
        column = [cell for cell in column if cell is not None]
    try:
        text = "\n".join(column).encode()
    except TypeError:  # a cell is a number, a BLOB or NULL
        return False
    return not column or lines(text, len(column))


def sound(columns: Columns) -> bool:
    """True only if all of these rows are sessions."""
    return all(keep(column, kind, rule, lines)
               for column, (_, kind, _, rule), lines in zip(columns[1:], FIELDS, LINES))


def refs_in(text: str) -> Sequence[str]:
    """`refs_of` the cell of a row that is sound or plain, in a tenth of the time."""
    if text == "[]":
        return ()
    refs = text[2:-2].split('","')
    return refs if len(set(refs)) == len(refs) else list(dict.fromkeys(refs))


def session_of(row: Sequence[Any], developer: str = "") -> Session:
    """A row that is sound or plain."""
    row_id, identity, github, name, ended_at, tools, tokens, branch, refs, version = row[:WHO]
    ended = stored_instant(ended_at)
    assert ended is not None
    return Session(row_id, identity, github, name, ended, tools, tokens, branch and branch.lower(),
                   tuple(refs_in(refs)), version, developer)


def numbered(names: Iterable[str]) -> List[str]:
    """The names, with "-2", "-3" ... where one comes again."""
    seen: Counter[str] = collections.Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(name if seen[name] == 1 else "%s-%d" % (name, seen[name]))
    return found


def labels(keys: Iterable[str]) -> Dict[str, str]:
    """{whole hash: what is shown of it}: 8 digits. Those that would look alike have up to 12, and
    no more: whoever may send events can make hashes that differ in their last digit alone. Then a
    number tells them apart, in the order in which they come. (The order of the hashes would let the
    sender of some hundred events find the whole one between them.)"""
    alike: Dict[str, List[str]] = collections.defaultdict(list)
    for key in dict.fromkeys(keys):
        alike[key[:PREFIX]].append(key)
    shown: Dict[str, str] = {}
    for same in alike.values():
        length = next((n for n in range(PREFIX, LONGEST_PREFIX)
                       if len({key[:n] for key in same}) == len(same)), LONGEST_PREFIX)
        shown.update(zip(same, numbered([key[:length] for key in same])))
    return shown


def plain_session(s: Session) -> Plain:
    """S of README, Contract 7, to the letter."""
    return {"session_id_hash": s.session, "identity_hash_prefix": s.identity[:PREFIX],
            "github_hash_prefix": s.github and s.github[:PREFIX], "ended_at": moment_text(s.ended),
            "tool_count": s.tools, "tokens_saved": s.tokens, "branch_sha": s.branch,
            "discovery_refs": list(s.refs)}


def plain_sessions(sessions: Sequence[Session]) -> List[Plain]:
    """S of each, with `developer`: the label of who it was, in the graph and on the pages."""
    return [dict(plain_session(s), developer=s.developer) for s in sessions]


# ==================================================================================================
# Queries
# ==================================================================================================


class NotFound(Exception):
    """What was asked for is not there, or is ambiguous. The text is for a person."""


class Window(NamedTuple):
    """Which sessions are asked for: those that ended from `since` on and before `until` (stored
    form). `github`: with a GitHub hash, or without one (None: both). `discovery`: those that
    touched it (None: all)."""

    since: str
    until: str = END_OF_TIME
    github: Optional[bool] = None
    discovery: Optional[str] = None


EVER = Window("")


def last_days(days: float, github: Optional[bool] = None,
              discovery: Optional[str] = None) -> Window:
    """The last `days` days, open at the end: a clock that runs ahead loses no session."""
    return Window(moment_text(now_ms() - int(days * DAY_MS)), END_OF_TIME, github, discovery)


def day_start(text: str) -> Optional[str]:
    """The stored form of a date or a moment, None if it is neither."""
    return moment_or_none(text) or moment_or_none(text + "T00:00:00")


def window_between(days: int, since: str, until: str, github: Optional[bool],
                   discovery: Optional[str]) -> Window:
    """`since` (else `days` days before the end) to `until` (else open): dates or moments."""
    end = day_start(until)
    start = day_start(since) or moment_text((instant(end) or now_ms()) - days * DAY_MS)
    return Window(start, end or END_OF_TIME, github, discovery)


def fixed(window: Window) -> Window:
    """The window with an end, so that it stays where it is."""
    return window if window.until < END_OF_TIME else window._replace(until=moment_text(now_ms()))


def passes(window: Window, github: Optional[str], refs: str) -> bool:
    """Whether a session passes the window's filters; its time is not looked at."""
    wanted = window.discovery
    return window.github in (None, github is not None) and (
        wanted is None or (wanted in refs and wanted in refs_in(refs)))


CHUNK = 100  # rows in memory at once; with 1,000, `activity` takes a third longer
IN_WINDOW = "WHERE e.ended_at >= ? AND e.ended_at < ?"
# Another program may write `...:56Z`. As text that sorts after `...:56.999Z`, which is later.
BARE_SECOND = "SELECT 1 FROM session_events e %s AND length(e.ended_at) = 20 LIMIT 1" % IN_WINDOW
INSTANT = ("CASE length(e.ended_at) WHEN 20 THEN substr(e.ended_at, 1, 19) || '.000Z'"
           " ELSE e.ended_at END")
BY_INSTANT = "{0} AND {1} >= ? AND {1} < ? ORDER BY {1}, e.id".format(IN_WINDOW, INSTANT)
# Rows that are in no window: their ended_at is NULL, a number, a BLOB, or text outside the range of
# moments. SQLite sorts numbers below every text and BLOBs above.
NO_MOMENT = ("SELECT id FROM session_events WHERE ended_at IS NULL"
             " UNION ALL SELECT id FROM session_events WHERE ended_at < '0'"
             " UNION ALL SELECT id FROM session_events WHERE ended_at >= ?")
Pair = Tuple[str, Optional[str]]  # (identity, GitHub hash)


class Look(NamedTuple):
    """What one reading of all rows of a window found. `total`: how many sessions pass its filters;
    `newest`: the last `limit` of these, as rows, oldest first."""

    limit: int
    total: int
    newest: Deque[Tuple[Any, ...]]


def lenient_text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


class Reader:
    """One read transaction. `left_out` counts the rows met so far that are no sessions."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection
        # Twice as fast as `lenient_text`, until a text is not UTF-8.
        self.text_factory: Callable[[bytes], str] = str
        self.odd: Set[int] = set()  # ids of rows that are no sessions
        self.looks: Dict[Window, Look] = {}
        self.pairs: Dict[Window, List[Pair]] = {}  # see `everybody`

    @property
    def left_out(self) -> int:
        return len(self.odd)

    def rows(self, sql: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        # A command line may hold bytes that are no text. Python makes them lone surrogates, which
        # SQLite refuses; no row has them.
        return self.connection.execute(sql, [
            v.encode("utf-8", "replace").decode() if isinstance(v, str) else v for v in values])

    def fetched(self, sql: str, values: Sequence[Any], done: int = 0
                ) -> Iterator[List[Tuple[Any, ...]]]:
        """The rows of a statement after the first `done`, up to CHUNK at a time."""
        self.connection.text_factory = self.text_factory
        try:
            cursor = self.rows(sql, values)
            for _ in itertools.islice(cursor, done):
                pass
            for rows in iter(lambda: cursor.fetchmany(CHUNK), []):
                done += len(rows)
                yield rows
        except sqlite3.OperationalError as error:
            if self.text_factory is not str or "decode" not in str(error):
                raise
            self.text_factory = lenient_text
            yield from self.fetched(sql, values, done)

    def checked(self, sql: str, values: Sequence[Any]) -> Iterator[Columns]:
        """The sessions among the rows of `FROM session_events e` + sql, some at a time: the cells
        of each of COLUMNS. The ids of the other rows go to `odd`."""
        for rows in self.fetched("SELECT %s FROM session_events e %s" % (SELECTED, sql), values):
            columns = list(zip(*rows))
            if not sound(columns):
                good = [row for row in rows if is_session(row)]
                self.odd.update({row[ID] for row in rows}.difference(row[ID] for row in good))
                columns = list(zip(*map(plain_row, good)))
            if columns:
                yield columns

    def chunks(self, window: Window) -> Iterator[Columns]:
        """All sessions of the window's time, whatever its filters, oldest first, some at a time."""
        # A row without a moment could be of any time, so every window counts it as left out.
        self.odd.update(row_id for row_id, in self.rows(NO_MOMENT, [END_OF_TIME]))
        since, until = window[:2]
        seconds = [since[:19], until[:19] + "~"]
        if self.rows(BARE_SECOND, seconds).fetchone():
            return self.checked(BY_INSTANT, [*seconds, since, until])
        return self.checked(IN_WINDOW + " ORDER BY e.ended_at, e.id", [since, until])

    def columns(self, window: Window) -> Iterator[Columns]:
        """The sessions of the window, oldest first, some at a time: the cells of each of COLUMNS,
        and last who it was, as a place in `everybody`."""
        numbers: Dict[Pair, int] = collections.defaultdict(itertools.count().__next__)
        for columns in self.chunks(window):
            github, refs = columns[GITHUB], columns[REFS]
            who = list(map(numbers.__getitem__, zip(columns[IDENTITY], github)))
            columns = [*columns, who]
            if window[2:] != NO_FILTER:
                kept = [passes(window, *cells) for cells in zip(github, refs)]
                columns = [list(itertools.compress(column, kept)) for column in columns]
            yield columns
        self.pairs[window] = list(numbers)

    def look(self, window: Window, limit: int = 0) -> Look:
        """Read every row of the window, unless that was done already with this `limit` or more."""
        found = self.looks.get(window)
        if found is None or found.limit < limit:
            total = 0
            newest: Deque[Tuple[Any, ...]] = collections.deque(maxlen=limit)
            for columns in self.columns(window):
                total += len(columns[WHO])
                newest.extend(zip(*columns))
            found = self.looks[window] = Look(limit, total, newest)
        return found

    def everybody(self, window: Window) -> List[Pair]:
        """Who had a session in the window's time, whatever its filters, each once."""
        if window not in self.pairs:
            self.look(window)
        return self.pairs[window]

    def names(self, window: Window) -> List[str]:
        """The developer of each place in `everybody`."""
        return list(developers_of(self.everybody(window)).values())

    def window(self, window: Window, limit: int = -1) -> List[Session]:
        """The sessions of a window, newest first. Of two that ended together the one that was
        stored later comes first."""
        limit = sys.maxsize if limit < 0 else limit
        newest = self.look(window, limit).newest
        names = self.names(window)
        return [session_of(row, names[row[WHO]])
                for row in itertools.islice(reversed(newest), limit)]

    def walk(self, window: Window) -> Iterator[Session]:
        """The sessions of a window, oldest first, one at a time."""
        names = self.names(window)
        for columns in self.columns(window):
            for row in zip(*columns):
                yield session_of(row, names[row[WHO]])

    def count(self, window: Window) -> int:
        return self.look(window).total

    def some(self, sql: str, values: Sequence[Any]) -> Iterator[Session]:
        """The rows of `FROM session_events e` + sql that are sessions. For a query of few rows."""
        for columns in self.checked(sql, values):
            yield from map(session_of, zip(*columns))


def hashes_of(pairs: Sequence[Pair]) -> Dict[Pair, str]:
    """{pair: the hash that stands for the developer}. It is the pair's own GitHub hash, else the
    only GitHub hash that its identity has in other pairs, else the identity."""
    logins: Dict[str, Optional[str]] = {}  # None where an identity has several
    for identity, github in pairs:
        if github is not None:
            logins[identity] = github if logins.get(identity, github) == github else None
    return {pair: pair[1] or logins.get(pair[0]) or pair[0] for pair in pairs}


def developers_of(pairs: Sequence[Pair]) -> Dict[Pair, str]:
    """{pair: the label under which the developer is shown}. Answers show this label, and never the
    whole hash. All answers about a window have the same labels, since all are made from
    everybody who was there."""
    hashes = hashes_of(pairs)
    shown = labels(hashes.values())
    return {pair: shown[who] for pair, who in hashes.items()}


def span(window: Window) -> Plain:
    return {"since": window.since, "until": None if window.until == END_OF_TIME else window.until}


def sessions(reader: Reader, window: Window, limit: int = 50) -> Plain:
    """{"since", "until", "sessions": [S with "developer" ...], "total_count_in_window"}, newest
    first."""
    found = reader.window(window, limit)
    return dict(span(window), sessions=plain_sessions(found),
                total_count_in_window=reader.count(window))


def last_event(reader: Reader) -> Optional[str]:
    """When the newest session of the database ended, None if there is none."""
    newest = reader.some("WHERE e.ended_at < ? ORDER BY e.ended_at DESC", [END_OF_TIME])
    # Among moments of one second, one without a fraction sorts wrong as text (see BARE_SECOND).
    seconds = itertools.groupby(newest, lambda s: s.ended // 1000)
    return next((moment_text(max(s.ended for s in same)) for _, same in seconds), None)


MOST_MATCHES = 1000  # rows that are read for a prefix; a short one can fit many more
# No index starts with the session's hash. The unique index has it behind the identity. With few
# identities it is faster to look in the index once for each of them (4,000: 13 ms) than to read the
# whole index (a million rows: 65 ms).
MOST_IDENTITIES = 15_000  # that are looked at; then the whole index is read
AMONG_IDENTITIES = """WHERE e.id IN (WITH RECURSIVE each_one (identity) AS (
    SELECT min(identity_hash) FROM session_events
    UNION ALL
    SELECT (SELECT identity_hash FROM session_events WHERE identity_hash > identity
        ORDER BY identity_hash, session_id_hash LIMIT 1)
      FROM each_one WHERE identity IS NOT NULL LIMIT ?)
  SELECT s.id FROM each_one CROSS JOIN session_events s
    ON s.identity_hash = identity AND s.session_id_hash = ? LIMIT 1)"""
AMONG_ALL = """WHERE e.id IN (SELECT id FROM session_events
  WHERE session_id_hash >= ? AND session_id_hash < ?)"""


def find_session(reader: Reader, prefix: str) -> Session:
    """The session whose hash is, or starts with, `prefix`. Two identities can have sent the same
    session, as at the end of a quarter: then one of the two rows. Raises NotFound when there is
    none, or when the prefix fits several sessions."""
    prefix = prefix.lower()
    if not re.fullmatch(r"[0-9a-f]{4,64}", prefix):
        raise NotFound("a session is named by 4 to 64 hex digits of its hash")
    ways: List[Tuple[str, List[Any]]] = [
        (AMONG_ALL, [prefix, prefix + "g"])]  # "g" is above every digit
    if len(prefix) == 64:
        ways.insert(0, (AMONG_IDENTITIES, [MOST_IDENTITIES, prefix]))
    each_way = (list(itertools.islice(reader.some(*way), MOST_MATCHES)) for way in ways)
    found: List[Session] = next(filter(None, each_way), [])
    if not found:
        raise NotFound("no session starts with these digits")
    names = sorted({s.session for s in found})
    if len(names) > 1:
        raise NotFound("%s%d sessions start with these digits, give more of them: %s%s" % (
            "at least " if len(found) == MOST_MATCHES else "", len(names),
            ", ".join(name[:16] for name in names[:4]), " ..." if names[4:] else ""))
    return max(found, key=lambda s: (s.ended, s.id))


def session(reader: Reader, prefix: str, now: Optional[int] = None) -> Plain:
    """{"session": S, "related": [S ...]} with "developer": the same identity's other sessions of
    the last 30 days, newest first, at most 50. Raises NotFound."""
    one = find_session(reader, prefix)
    since = (now_ms() if now is None else now) - RELATED_DAYS * DAY_MS
    same_identity = list(reader.some("WHERE e.identity_hash = ?", [one.identity]))
    names = developers_of([(s.identity, s.github) for s in same_identity])
    related = sorted((s for s in same_identity if s.id != one.id and s.ended >= since),
                     key=lambda s: (s.ended, s.id), reverse=True)[:RELATED_LIMIT]
    first, *rest = plain_sessions([
        s._replace(developer=names[s.identity, s.github]) for s in [one, *related]])
    return {"session": first, "related": rest}


SPARKS = 24  # parts of a window in which a discovery's sessions are counted


class Timeline:
    """The sessions of a window as columns, in the order of time (by `ended_at`, then `id`).

    The columns: `ended` (stored form), `who` (a place in `people`), and in `more` those at the
    places of COLUMNS that were asked for. `people`: (developer, identity) of each place.
    `touched`: {discovery: the places of the sessions that touched it}; if the window has a
    discovery, only that one."""

    def __init__(self, reader: Reader, window: Window, more: Sequence[int] = ()) -> None:
        self.who = array.array("I")
        self.ended: List[str] = []
        self.more: List[List[Any]] = [[] for _ in more]
        self.touched: Dict[str, array.array[int]] = collections.defaultdict(
            lambda: array.array("I"))
        for columns in reader.columns(window):
            for place, cell in enumerate(columns[REFS], len(self.ended)):
                for ref in refs_in(cell):
                    if window.discovery in (None, ref):
                        self.touched[ref].append(place)
            self.who.extend(columns[WHO])
            self.ended.extend(columns[ENDED_AT])
            for whole, column in zip(self.more, more):
                whole.extend(columns[column])
        developers = developers_of(reader.everybody(window))
        self.people = [(who, identity) for (identity, _), who in developers.items()]

    def developer(self, place: int) -> str:
        return self.people[self.who[place]][0]

    def trails(self) -> Dict[str, "Trail"]:
        return {ref: Trail(self, places) for ref, places in self.touched.items()}


class Trail(NamedTuple):
    """One discovery in a window: the places of the sessions that touched it, in order of time."""

    within: Timeline
    places: Sequence[int]

    def ended(self) -> List[str]:
        return [self.within.ended[place] for place in self.places]

    def people(self) -> List[Tuple[str, str]]:
        """(developer, identity), each once."""
        return [self.within.people[who] for who in {self.within.who[n] for n in self.places}]

    def identities(self) -> int:
        return len({identity for _, identity in self.people()})

    def reach(self) -> int:
        """How many developers it reached."""
        return len({developer for developer, _ in self.people()})

    def reached(self) -> Dict[str, int]:
        """{developer: the place of their first session that touched it}, in the order of time."""
        first: Dict[str, int] = {}
        for place in self.places:
            first.setdefault(self.within.developer(place), place)
        return first

    def hours_until(self, place: int) -> float:
        """Hours from its first session to the one at `place`, rounded to hundredths."""
        start, end = (stored_instant(self.within.ended[n]) or 0 for n in (self.places[0], place))
        return round((end - start) / 3_600_000, 2)

    def hours_to_second(self) -> Optional[float]:
        """Hours until it reached a second developer; None if it did not."""
        first = self.within.developer(self.places[0])
        second = next((n for n in self.places if self.within.developer(n) != first), None)
        return None if second is None else self.hours_until(second)

    def half_life(self) -> Optional[float]:
        """Hours until half of its sessions had ended; None if it has fewer than 4."""
        count = len(self.places)
        return self.hours_until(self.places[(count + 1) // 2 - 1]) if count >= 4 else None


class Story:
    """A window in figures: `trails` {discovery: its trail}, `developers` {who: as the function
    `developers` says, without "new"}, `flows` {(giver, receiver): hand-overs}, and `saved`: the
    tokens saved by each session that built on others (True) or did not (False)."""

    def __init__(self, reader: Reader, window: Window) -> None:
        timeline = Timeline(reader, window, (TOOLS, TOKENS))
        self.trails = timeline.trails()
        self.developers: Dict[str, Plain] = {}
        self.saved: Dict[bool, List[int]] = {True: [], False: []}
        names = [timeline.people[who][0] for who in timeline.who]
        built: Set[int] = set()
        steps: Counter[Tuple[str, str]] = collections.Counter()
        for places in timeline.touched.values():
            path = [names[place] for place in places]
            steps.update(zip(path, path[1:]))
            # From the second developer on, every session builds on another's.
            alone = next((n for n, who in enumerate(path) if who != path[0]), len(path))
            built.update(places[alone:])
        rows = zip(names, timeline.ended, *timeline.more)
        for place, (who, ended, tools, tokens) in enumerate(rows):
            self.add(who, ended, tools, tokens, place in built)
        for who in self.developers:  # from one developer to the same is no hand-over
            del steps[who, who]
        self.flows = steps
        for (giver, receiver), count in steps.items():
            self.developers[giver]["given"] += count
            self.developers[receiver]["received"] += count

    def add(self, who: str, ended: str, tools: int, tokens: int, built: bool) -> None:
        """One session more."""
        sums = self.developers.get(who)
        if sums is None:
            sums = self.developers[who] = {
                "developer": who, "sessions": 0, "tool_count": 0, "tokens_saved": 0, "given": 0,
                "received": 0, "new": None, "sessions_before_inherited": None,
                "first_seen_at": ended}
        if built and sums["sessions_before_inherited"] is None:
            sums["sessions_before_inherited"] = sums["sessions"]
        sums["sessions"] += 1
        sums["tool_count"] += tools
        sums["tokens_saved"] += tokens
        sums["last_seen_at"] = ended
        self.saved[built].append(tokens)


def middle(values: Sequence[float]) -> Optional[float]:
    """The median; None of an empty list."""
    return round(statistics.median(values), 2) if values else None


def ends_of(window: Window, now: Optional[int] = None) -> Tuple[Optional[int], int]:
    """(the first millisecond of a window, the first after it). Without a start the one is None;
    without an end the other is now."""
    start, end = instant(window.since), instant(window.until)
    if end is None:
        end = max(now_ms() if now is None else now, (start or 0) + 1)
    return start, end


def before_of(window: Window, now: Optional[int] = None) -> Optional[Window]:
    """The window of the same length right before a window; None if the window has no start."""
    start, end = ends_of(window, now)
    if start is None:
        return None
    return window._replace(since=moment_text(start - (end - start)), until=window.since)


def newcomers(reader: Reader, window: Window, story: Story, before: Optional[Window]
              ) -> Dict[str, Plain]:
    """The developers of a window who were not there in as many days before. All hashes of a
    developer are looked for, so that nobody is new only because of logging in."""
    if before is None:
        return story.developers
    there = {key for pair in reader.everybody(before) for key in pair if key}
    known = {who for pair, who in developers_of(reader.everybody(window)).items()
             if not there.isdisjoint(pair)}
    return {who: sums for who, sums in story.developers.items() if who not in known}


def cold_start(fresh: Mapping[str, Plain]) -> Plain:
    """{"developers": how many are new, "sessions": the median of their own sessions before the
    first that built on others, "never": how many have none that did}."""
    waits = [wait for wait in (sums["sessions_before_inherited"] for sums in fresh.values())
             if wait is not None]
    return {"developers": len(fresh), "sessions": middle(waits), "never": len(fresh) - len(waits)}


def summary(reader: Reader, window: Window, now: Optional[int] = None) -> Plain:
    """The figures of a window, and under "before" those of as many days before it (None for a
    window without a start): {"since", "until", "sessions", "developers", "tool_count",
    "tokens_saved", "discoveries", "shared_discoveries" (that reached two developers or more),
    "hand_overs", "furthest": {"discovery_id", "developers", "hours"}, "built_on_others":
    {"sessions", "share"}, "tokens_saved_median": {"built_on_others", "others"},
    "hours_to_second_developer" (median), "cold_start": {"developers", "sessions", "never"}}. A
    median or share of no values is None; hours are rounded to hundredths, the share to
    ten-thousandths."""
    now = now_ms() if now is None else now
    earlier = before_of(window, now)
    before = earlier and figures(reader, earlier, before_of(earlier, now))
    return dict(figures(reader, window, earlier), before=before)


def figures(reader: Reader, window: Window, before: Optional[Window]) -> Plain:
    """`summary` without the window before; `before` decides who is new."""
    found = Story(reader, window)
    everybody = found.developers.values()
    waits = [wait for wait in (trail.hours_to_second() for trail in found.trails.values())
             if wait is not None]
    built, others = found.saved[True], found.saved[False]
    count = len(built) + len(others)
    return dict(
        span(window), sessions=count, developers=len(found.developers),
        tool_count=sum(d["tool_count"] for d in everybody),
        tokens_saved=sum(d["tokens_saved"] for d in everybody),
        discoveries=len(found.trails), shared_discoveries=len(waits),
        hand_overs=sum(found.flows.values()), furthest=furthest(found.trails),
        built_on_others={
            "sessions": len(built), "share": round(len(built) / count, 4) if count else None},
        tokens_saved_median={"built_on_others": middle(built), "others": middle(others)},
        hours_to_second_developer=middle(waits),
        cold_start=cold_start(newcomers(reader, window, found, before)))


def furthest(trails: Mapping[str, Trail]) -> Optional[Plain]:
    """The discovery that reached most developers, then with most sessions, then first by name."""
    if not trails:
        return None
    name = min(trails, key=lambda ref: DISCOVERY_SORTS["developer_count"](ref, trails[ref]))
    reached = trails[name].reached()
    return {"discovery_id": name, "developers": len(reached),
            "hours": trails[name].hours_until(max(reached.values()))}


def developers(reader: Reader, window: Window, now: Optional[int] = None) -> Plain:
    """{"since", "until", "developers": [{"developer", "sessions", "tool_count", "tokens_saved",
    "given", "received" (hand-overs), "new" (not there in as many days before),
    "sessions_before_inherited" (own sessions before the first that built on others, None if none
    did), "first_seen_at", "last_seen_at"} ...] those who give most more than they receive first,
    then by first session, "matrix": [{"source", "target", "hand_overs"} ...] most first,
    "cold_start": of the new ones, as in `summary`}."""
    found = Story(reader, window)
    fresh = newcomers(reader, window, found, before_of(window, now))
    ranked = sorted(found.developers.values(), key=lambda d: (
        d["received"] - d["given"], d["first_seen_at"], d["developer"]))
    flows = sorted(found.flows.items(), key=lambda flow: (-flow[1], flow[0]))
    return dict(
        span(window),
        developers=[dict(d, new=d["developer"] in fresh) for d in ranked],
        matrix=[{"source": giver, "target": receiver, "hand_overs": count}
                for (giver, receiver), count in flows],
        cold_start=cold_start(fresh))


def discovery_figures(name: str, trail: Trail, ends: Tuple[Optional[int], int]) -> Plain:
    """The figures of one discovery, as in `discoveries`. `ends`: see `ends_of`; a window without a
    start begins with the discovery's first session."""
    (start, end), ended = ends, trail.ended()
    if start is None:
        start = stored_instant(trail.within.ended[0]) or 0
    edges = [moment_text(start - (start - end) * part // SPARKS) for part in range(1, SPARKS)]
    cuts = [0, *(bisect.bisect_left(ended, edge) for edge in edges), len(ended)]
    return {"discovery_id": name, "first_seen_at": ended[0],
            "last_seen_at": ended[-1], "session_count": len(ended),
            "distinct_identity_count": trail.identities(),
            "last_aggregated_at": moment_text(now_ms()),
            "developer_count": trail.reach(),
            "hours_to_second_developer": trail.hours_to_second(),
            "half_life_hours": trail.half_life(),
            "counts": [after - before for before, after in zip(cuts, cuts[1:])]}


def none_last(value: Optional[float]) -> Tuple[bool, float]:
    return value is None, value or 0.0


DISCOVERY_SORTS: Dict[str, Callable[[str, Trail], Tuple[Any, ...]]] = {
    "session_count": lambda name, t: (-len(t.places), name),
    "distinct_identity_count": lambda name, t: (-t.identities(), name),
    "recent": lambda name, t: (-(stored_instant(t.within.ended[t.places[-1]]) or 0), name),
    "developer_count": lambda name, t: (-t.reach(), -len(t.places), name),
    "hours_to_second_developer": lambda name, t: (none_last(t.hours_to_second()), name),
    "half_life": lambda name, t: (none_last(t.half_life()), name),
    "first_seen": lambda name, t: (t.within.ended[t.places[0]], name),
    "name": lambda name, t: (name,),
}


def discoveries(reader: Reader, window: Window, limit: int = 50, sort: str = "session_count",
                now: Optional[int] = None) -> Plain:
    """{"since", "until", "discoveries": [{"discovery_id", "first_seen_at", "last_seen_at",
    "session_count", "distinct_identity_count", "last_aggregated_at", "developer_count",
    "hours_to_second_developer" (None: it reached nobody else), "half_life_hours" (None: under 4
    sessions), "counts": sessions in each of SPARKS equal parts of the window} ...],
    "discoveries_in_window": n}, the first `limit` by `sort` (one of DISCOVERY_SORTS). Only the
    window's sessions count; its `discovery` is not looked at."""
    timeline = Timeline(reader, window._replace(discovery=None))
    trails = timeline.trails()
    rank = DISCOVERY_SORTS[sort]
    chosen = heapq.nsmallest(limit, trails.items(), key=lambda item: rank(*item))
    ends = ends_of(window, now)
    return dict(
        span(window), discoveries_in_window=len(trails),
        discoveries=[discovery_figures(name, trail, ends) for name, trail in chosen])


def discovery(reader: Reader, ref: str, window: Window, limit: int = 200,
              now: Optional[int] = None) -> Plain:
    """How one discovery went round in the window: its figures as in `discoveries`, and "reached":
    [{"at", "developer", "session_id_hash"} ...] each developer's first session, "path":
    [{"session_id_hash", "developer", "ended_at", "crosses"} ...] in time order; both lists cut
    after `limit`. Raises NotFound when no session of the window touched it."""
    timeline = Timeline(reader, window._replace(discovery=ref), [SESSION_ID])
    if not timeline.ended:
        raise NotFound("no session of this window touched this discovery")
    trail = timeline.trails()[ref]
    reached = trail.reached()
    path = [(timeline.more[0][n], timeline.developer(n), timeline.ended[n]) for n in trail.places]
    return dict(
        span(window), **discovery_figures(ref, trail, ends_of(window, now)),
        reached=[{"at": path[n][2], "developer": path[n][1], "session_id_hash": path[n][0]}
                 for n in list(reached.values())[:limit]],
        path=[{"session_id_hash": name, "developer": developer, "ended_at": ended,
               "crosses": developer != before}
              for (name, developer, ended), (_, before, _) in zip(path[:limit], path[:1] + path)])


ACTIVE_DAYS = (1, 7, 28)


class Day:
    """The sums of one day, and its developers."""

    __slots__ = ("sessions", "tokens", "tools", "who")

    def __init__(self) -> None:
        self.sessions = self.tools = self.tokens = 0
        self.who: Set[int] = set()  # places in `everybody`


Days = Dict[int, Day]  # by `datetime.date.toordinal`


def runs(moments: Sequence[str], length: int) -> Iterator[Tuple[str, int, int]]:
    """Moments in order, by their first characters: (these, first place, place after the last)."""
    start = 0
    while start < len(moments):
        same = moments[start][:length]
        end = bisect.bisect_left(moments, same + "~", start)
        yield same, start, end
        start = end


def days_of(reader: Reader, window: Window) -> Days:
    """The window's sessions by day."""
    days: Dict[str, Day] = collections.defaultdict(Day)
    for columns in reader.columns(window):
        for date, start, end in runs(columns[ENDED_AT], 10):
            day = days[date]
            day.sessions += end - start
            day.tools += sum(columns[TOOLS][start:end])
            day.tokens += sum(columns[TOKENS][start:end])
            day.who.update(columns[WHO][start:end])
    return {datetime.date.fromisoformat(date).toordinal(): day for date, day in days.items()}


def activity(reader: Reader, window: Window, now: Optional[int] = None) -> Plain:
    """{"since", "until", "days": [P ...], "weeks": [P ...], "months": [P ...], "active":
    [{"days", "developers", "came_back"} ...], "before": {"since", "until", "days": [P ...]} or
    None}, P = {"period", "developers", "came_back", "sessions", "tool_count", "tokens_saved"}.

    `came_back`: how many of the developers were also there in the period before (None where that
    is before the window); for the active, in as many days before theirs. The active are those of
    the last 1, 7 and 28 days of the window. Its last day is listed even when it is empty. "before"
    is the window of the same length right before it."""
    now = now_ms() if now is None else now
    end = min(window.until, moment_text(now + 1))
    last_day = max(1, ((instant(end) or 1) - 1) // DAY_MS + EPOCH.toordinal())
    first_day = last_day - 2 * max(ACTIVE_DAYS) + 1
    earlier = window._replace(
        since=moment_text((first_day - EPOCH.toordinal()) * DAY_MS), until=window.since)
    inside, outside = days_of(reader, window), days_of(reader, earlier)
    here, there = reader.everybody(window), reader.everybody(earlier)
    # Of both together, so that who logged in between the two windows is one developer.
    names = developers_of([*here, *there])
    recent = active([(inside, [names[pair] for pair in here]),
                     (outside, [names[pair] for pair in there])], last_day)
    previous = before_of(window, now)
    before = previous and dict(span(previous), days=periods(
        previous, days_of(reader, previous), reader.names(previous))["days"])
    return dict(span(window), active=recent, before=before,
                **periods(window, inside, reader.names(window), last_day))


def active(parts: Sequence[Tuple[Days, Sequence[str]]], last_day: int) -> List[Plain]:
    """How many developers were there in the last 1, 7 and 28 days up to `last_day`, and how many of
    them also in as many days before. `parts`: days, and the developer of each place in them."""
    def between(first: int, last: int) -> Set[str]:
        return {names[place] for days, names in parts for day in range(first, last + 1)
                if day in days for place in days[day].who}

    found = []
    for days in ACTIVE_DAYS:
        here = between(last_day - days + 1, last_day)
        before = between(last_day - 2 * days + 1, last_day - days)
        found.append({"days": days, "developers": len(here), "came_back": len(here & before)})
    return found


def week_name(day: int) -> str:
    year, week, _ = datetime.date.fromordinal(day).isocalendar()
    return "%04d-W%02d" % (year, week)


# {name: (what a day's period is called, a day of the period before)}; days as ordinals.
PERIODS: Dict[str, Tuple[Callable[[int], str], Callable[[int], int]]] = {
    "days": (lambda day: datetime.date.fromordinal(day).isoformat(), lambda day: day - 1),
    "weeks": (week_name, lambda day: day - 7),
    "months": (lambda day: datetime.date.fromordinal(day).isoformat()[:7],
               lambda day: day - datetime.date.fromordinal(day).day),
}
FILLED_DAYS = 400  # empty periods are listed too, in a span of at most this many days


def periods(window: Window, sums: Days, names: Sequence[str], last_day: Optional[int] = None
            ) -> Dict[str, List[Plain]]:
    """The sums of a window by day, week and month: {"days": [P ...], "weeks": ..., "months": ...}
    (see `activity`), in order. `last_day` is listed even if it is empty."""
    first = datetime.date.fromisoformat(window.since[:10] or "0001-01-01").toordinal()
    days = sorted(sums.keys() | ({last_day} if last_day is not None else set()))
    if days and days[-1] - days[0] <= FILLED_DAYS:
        days = list(range(days[0], days[-1] + 1))
    return {kind: list(rolled_up(sums, names, days, first, *calendar))
            for kind, calendar in PERIODS.items()}


def rolled_up(sums: Days, names: Sequence[str], days: Sequence[int], first: int,
              name: Callable[[int], str], before: Callable[[int], int]) -> Iterator[Plain]:
    """P (see `activity`) of each period of these days, in order. `first`: the window's first day.
    `name` and `before` are a line of PERIODS."""
    last = ""  # the period before
    there: Set[str] = set()  # its developers
    for period, group in itertools.groupby(days, name):
        numbers = list(group)
        found = [sums[day] for day in numbers if day in sums]
        who = {names[place] for place in set().union(*(day.who for day in found))}
        previous = name(max(1, before(numbers[0])))
        if last != previous:
            there = set()
        yield {"period": period, "developers": len(who),
               "came_back": len(who & there) if previous >= name(first) else None,
               "sessions": sum(day.sessions for day in found),
               "tool_count": sum(day.tools for day in found),
               "tokens_saved": sum(day.tokens for day in found)}
        last, there = period, who


def exported(reader: Reader, window: Window) -> Iterator[Plain]:
    """Every session of the window, oldest first: S with "developer" and "plugin_version"."""
    for s in reader.walk(window):
        yield dict(plain_session(s), developer=s.developer, plugin_version=s.version)


# ==================================================================================================
# The graph (pure: sessions in, plain data out)
# ==================================================================================================


class Edge(NamedTuple):
    """The discoveries that one session carried on from another. `source` and `target` are the
    places of the two sessions in a list in time order. `crosses`: the two are of two developers."""

    source: int
    target: int
    refs: Tuple[str, ...]
    crosses: bool


def edges_of(ordered: Sequence[Session], only: Optional[str] = None) -> List[Edge]:
    """For each discovery, an edge from each session that touched it to the next one that did. All
    edges between the same two sessions are one edge. `ordered` is in time order, and the edges are
    in the order of their targets. `only`: for this discovery alone."""
    last: Dict[str, int] = {}
    carried: Dict[Tuple[int, int], List[str]] = {}
    for target, s in enumerate(ordered):
        for ref in s.refs if only is None else {only}.intersection(s.refs):
            source = last.get(ref)
            if source is not None:
                carried.setdefault((source, target), []).append(ref)
            last[ref] = target
    return [Edge(source, target, tuple(refs),
                 ordered[source].developer != ordered[target].developer)
            for (source, target), refs in carried.items()]


def graph_of(ordered: Sequence[Session], only: Optional[str] = None) -> Plain:
    """The session graph of sessions in time order (see `graph` for the shape). `only`: with the
    edges of this discovery alone."""
    # The sessions of two machines, or of two quarters, can have the same hash.
    names = numbered(s.session for s in ordered)
    who = [s.developer for s in ordered]
    count: Counter[Tuple[str, str]] = collections.Counter()
    carried: Counter[Tuple[str, str]] = collections.Counter()
    edges = []
    for e in edges_of(ordered, only):
        giver, taker = who[e.source], who[e.target]
        edges.append({"source": names[e.source], "target": names[e.target],
                      "discoveries": list(e.refs), "crosses": e.crosses})
        count[giver, taker] += 1
        carried[giver, taker] += len(e.refs)
    developers = [
        {"source": giver, "target": taker, "edges": count[giver, taker], "discoveries": refs,
         "crosses": giver != taker}
        for (giver, taker), refs in sorted(carried.items(), key=lambda flow: (-flow[1], flow[0]))]
    return {
        "nodes": [dict(id=name, developer=developer, **plain_session(s))
                  for name, developer, s in zip(names, who, ordered)],
        "edges": edges,
        "developers": developers,
        "totals": {
            "sessions": len(ordered), "developers": len(set(who)),
            "tool_count": sum(s.tools for s in ordered),
            "tokens_saved": sum(s.tokens for s in ordered),
            "discoveries": len({ref for s in ordered for ref in s.refs if only in (None, ref)}),
            "hand_overs": sum(flow["discoveries"] for flow in developers if flow["crosses"])},
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
    """The text with everything but printable ASCII as \\u escapes. What the contract allows stays
    as it is. Terminal commands and right-to-left marks, which another program's row can hold, have
    no effect."""
    return UNSEEN.sub(lambda match: match.group().encode("unicode_escape").decode(), text)


def fit(text: str, width: int) -> str:
    return text if len(text) <= width else text[:max(0, width - 3)] + "..."


def minute(moment: Optional[str]) -> str:
    return "-" if moment is None else moment[:16].replace("T", " ")


def digits(value: int) -> str:
    return "{:,}".format(value)


def value_text(value: object) -> str:
    """A number with thousands separators; "-" for None; any other value as visible text."""
    if value is None:
        return "-"
    return digits(value) if isinstance(value, int) else visible(str(value))


def counted(count: int, thing: str, things: str = "") -> str:
    return "%s %s" % (digits(count), thing if count == 1 else things or thing + "s")


def lasting(length: Optional[float]) -> str:
    """A number of hours for people: in minutes, hours or days."""
    if length is None:
        return "-"
    if length < 1:
        return "%d min" % round(length * 60)
    return "%.0f h" % length if length < 48 else "{:,.0f} days".format(length / 24)


SPARK_DIGITS = " .:-=+*#"


def sparkline(counts: Sequence[int]) -> str:
    """Pairs of counts as characters; a larger sum has a darker one."""
    pairs = [a + b for a, b in zip(counts[::2], counts[1::2])]
    steps = (len(SPARK_DIGITS) - 1) / max(pairs)
    return "".join(SPARK_DIGITS[math.ceil(n * steps - 1e-9)] for n in pairs).rstrip()


class Column(NamedTuple):
    """One column of a table, as text and as HTML.

    `cell`: its value, a number or text. `html`: the cell's HTML where that is more than the value.
    `kind`: CSS classes: n a number (aligned right), m a hash or time, d discoveries, wide what text
    and a narrow screen leave out. `sort`: the order that the title links to. `short`: the title in
    text, where that differs."""

    title: str
    cell: Callable[[Plain], Any]
    kind: str = ""
    html: Optional[Callable[[Plain], str]] = None
    sort: str = ""
    short: str = ""


def text_table(columns: Sequence[Column], rows: Sequence[Plain]) -> str:
    """A table for a terminal. Where a line would be too long, the widest column of text is cut."""
    columns = [c for c in columns if "wide" not in c.kind]
    cells = [[c.short or c.title for c in columns]]
    cells += [[value_text(c.cell(row)) for c in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    widest = max((w, i) for i, w in enumerate(widths) if columns[i].kind != "n")[1]
    over = max(0, sum(widths) + 2 * (len(widths) - 1) - COLUMNS_OF_A_TERMINAL)
    widths[widest] = max(len(cells[0][widest]), widths[widest] - over)
    return "".join("  ".join(
        fit(cell, w).rjust(w) if c.kind == "n" else fit(cell, w).ljust(w)
        for c, cell, w in zip(columns, line, widths)).rstrip() + "\n" for line in cells)


def number_column(title: str, key: str, sort: str = "", short: str = "") -> Column:
    return Column(title, operator.itemgetter(key), "n", None, sort, short)


def refs_cell(s: Plain) -> str:
    refs = s["discovery_refs"]
    return (refs[0] if refs else "-") + (" +%d" % (len(refs) - 1) if len(refs) > 1 else "")


def cold_cell(d: Plain) -> Any:
    """Own sessions of a new developer before the first that built on somebody else's discovery."""
    cold = d["sessions_before_inherited"]
    return "-" if not d["new"] else "not yet" if cold is None else cold


# The columns of all tables. Functions that give HTML stand further down, hence the lambdas.
ENDED = Column("Ended (UTC)", lambda s: minute(s["ended_at"]), "m")
SESSION = Column("Session", lambda s: s["session_id_hash"][:12], "m", lambda s: session_link(s))
DEVELOPER = Column("Developer", lambda s: s["developer"], "m")
GITHUB_USED = Column("GitHub", lambda s: "yes" if s["github_hash_prefix"] else "no", "wide")
BRANCH = Column("Branch", lambda s: s["branch_sha"] or "-", "m wide")
SESSIONS = number_column("Sessions", "sessions")
DEVELOPERS = number_column("Developers", "developers")
CALLS = number_column("Calls", "tool_count")
SAVED = number_column("Tokens saved", "tokens_saved", short="Saved")
SESSION_COLUMNS = (
    ENDED, SESSION, DEVELOPER, GITHUB_USED, CALLS, SAVED, BRANCH,
    Column("Discoveries", refs_cell, "d", lambda s: discovery_links(s["discovery_refs"])))
DISCOVERY = Column("Discovery", lambda d: d["discovery_id"], sort="name")
DISCOVERY_COLUMNS = (
    DISCOVERY,
    Column("In the window", lambda d: sparkline(d["counts"]), "", lambda d: spark_svg(d["counts"]),
           short="Over time"),
    number_column("Reach", "developer_count", "developer_count"),
    number_column("Sessions", "session_count", "session_count"),
    Column("To the second developer", lambda d: lasting(d["hours_to_second_developer"]), "n",
           sort="hours_to_second_developer", short="To 2nd"),
    Column("Half-life", lambda d: lasting(d["half_life_hours"]), "n", sort="half_life"),
    Column("First seen", lambda d: minute(d["first_seen_at"]), "m wide", sort="first_seen"),
    Column("Last seen", lambda d: d["last_seen_at"][:10], "m late",
           lambda d: minute(d["last_seen_at"]), "recent"))
DEVELOPER_COLUMNS = (
    DEVELOPER, SESSIONS, CALLS, SAVED, number_column("Given", "given"),
    number_column("Received", "received"),
    Column("Cold start", cold_cell, "n"))
GIVER = Column("From", lambda f: f["source"], "m")
TAKER = Column("To", lambda f: f["target"], "m to")
HAND_OVERS = number_column("Hand-overs", "hand_overs")
FLOW_COLUMNS = (GIVER, TAKER, number_column("Hand-overs", "discoveries"))  # of `graph`, which cross
REACHED_COLUMNS = (Column("Reached (UTC)", lambda r: minute(r["at"]), "m"), DEVELOPER,
                   SESSION._replace(title="In session"))
PATH_COLUMNS = (ENDED, SESSION, DEVELOPER,
                Column("How", lambda s: "from another developer" if s["crosses"] else "-"))
CAME_BACK = number_column("Came back", "came_back")
PERIOD_COLUMNS = (Column("Period", lambda p: p["period"], "m"), SESSIONS, DEVELOPERS, CAME_BACK,
                  CALLS, SAVED)
ACTIVE_COLUMNS = (Column("Active in", lambda a: counted(a["days"], "day")), DEVELOPERS, CAME_BACK)
SESSION_FACTS = (
    DEVELOPER, GITHUB_USED, Column("Ended", lambda s: s["ended_at"]),
    CALLS._replace(title="Calls of tools"), SAVED, BRANCH._replace(title="Commit"))


def wrapped(sentences: Iterable[str]) -> str:
    """A paragraph of each. Names stay whole."""
    return "".join(textwrap.fill(sentence, COLUMNS_OF_A_TERMINAL, break_long_words=False,
                                 break_on_hyphens=False) + "\n" for sentence in sentences)


def rest_line(words: str, shown: int, total: int) -> str:
    """A line about rows that are not shown, if there are any."""
    return "\n%s\n" % words.format(shown, total) if total > shown else ""


def sessions_text(result: Plain) -> str:
    found = result["sessions"]
    return text_table(SESSION_COLUMNS, found) + rest_line(
        "the newest {:,} of {:,}; --limit shows more", len(found), result["total_count_in_window"])


def session_text(result: Plain) -> str:
    s, related = result["session"], result["related"]
    facts = [("Session", s["session_id_hash"])]
    facts += [(c.title, value_text(c.cell(s))) for c in SESSION_FACTS]
    facts += [("" if i else "Discoveries", fit(visible(ref), 64))
              for i, ref in enumerate(s["discovery_refs"])]
    text = "".join("%-14s %s\n" % fact for fact in facts)
    if not related:
        return text + "\nno other session of this identity in the last %d days\n" % RELATED_DAYS
    return text + "\nthe same identity, last %d days\n" % RELATED_DAYS + text_table(
        SESSION_COLUMNS, related)


def discovery_text(result: Plain) -> str:
    second, half = result["hours_to_second_developer"], result["half_life_hours"]
    return "".join([
        fit(visible(result["discovery_id"]), COLUMNS_OF_A_TERMINAL),
        "\n%s to %s: " % (minute(result["first_seen_at"]), minute(result["last_seen_at"])),
        "%s, " % counted(result["session_count"], "session"),
        "%s\n" % counted(result["developer_count"], "developer"),
        "it reached no second developer\n" if second is None
        else "it reached a second developer within %s\n" % lasting(second),
        "" if half is None else "half of its sessions ended within %s\n" % lasting(half),
        "\n", text_table(REACHED_COLUMNS, result["reached"]),
        "\n", text_table(PATH_COLUMNS, result["path"]),
        rest_line("the first {:,} steps of {:,}", len(result["path"]), result["session_count"])])


def discoveries_text(result: Plain) -> str:
    return (
        text_table(DISCOVERY_COLUMNS, result["discoveries"])
        + "\nReach: developers with a session that touched it. To 2nd: from its first session\n"
        "to the first of a second developer. Half-life: until half of its sessions ended.\n"
        + rest_line("{:,} of {:,}; --limit shows more", len(result["discoveries"]),
               result["discoveries_in_window"]))


def flows_text(title: str, columns: Sequence[Column], flows: Sequence[Plain]) -> str:
    """Pairs of developers (from, to), the largest first."""
    if not flows:
        return "\nno discovery went from one developer to another\n"
    return "\n%s\n%s" % (title, text_table(columns, flows[:LISTED_FLOWS])) + rest_line(
        "the first {:,} of {:,}; --format json has all", LISTED_FLOWS, len(flows))


def developers_text(result: Plain) -> str:
    return (
        text_table(DEVELOPER_COLUMNS, result["developers"])
        + "\nGiven, received: hand-overs of a discovery to and from other developers.\n"
        "Cold start: for developers who were not there in as many days before, how many\n"
        "sessions came before the first that built on somebody else's discovery.\n"
        + wrapped(renamed(result))
        + flows_text("who hands over to whom", (GIVER, TAKER, HAND_OVERS), result["matrix"]))


def findings(figures: Plain) -> List[str]:
    """What a window's figures (see `summary`) say, a sentence each."""
    if not figures["sessions"]:
        return ["No session ended in this window."]
    shared, far = figures["shared_discoveries"], figures["furthest"]
    built, saved = figures["built_on_others"], figures["tokens_saved_median"]
    cold = figures["cold_start"]
    if not figures["discoveries"]:
        lines = ["No session touched a discovery."]
    elif not shared:
        lines = ["No discovery reached a second developer."]
    else:
        lines = [
            "%s of %s reached a second developer, half of them within %s." % (
                digits(shared), counted(figures["discoveries"], "discovery", "discoveries"),
                lasting(figures["hours_to_second_developer"])),
            "%s went furthest: %s of %s in %s." % (
                far["discovery_id"], digits(far["developers"]),
                counted(figures["developers"], "developer"), lasting(far["hours"]))]
    if not built["sessions"]:
        lines.append("No session built on somebody else's discovery.")
    else:
        others = "" if saved["others"] is None else ", the others {:,.0f}".format(saved["others"])
        lines.append(
            "{:.0f} % of sessions built on somebody else's discovery. Together with that they"
            " saved {:,.0f} tokens (median){}.".format(
                100 * built["share"], saved["built_on_others"], others))
    if cold["developers"]:
        lines.append(cold_start_words(cold))
    return lines + renamed(figures)


def renamed(result: Plain) -> List[str]:
    """A sentence, if a quarter begins within the window of a result (what `span` says) or the one
    before it. Then everybody's hash changes (README, Contract 4)."""
    window = Window(result["since"], result["until"] or END_OF_TIME)
    start = instant((before_of(window) or window).since) or 0
    edges = [at for at, _, _ in month_starts(start + 1, ends_of(window)[1] - 1, 3)]
    if not edges:
        return []
    return ["Everybody is renamed %s (UTC): who was there before and after that counts as two"
            " developers." % ("on " + moment_text(edges[0])[:10] if len(edges) == 1
                              else "at the start of each quarter")]


def cold_start_words(cold: Plain) -> str:
    """How long a new developer works before the first inherited discovery."""
    if not cold["developers"]:
        return "No developer was new in this window."
    words = counted(cold["developers"], "developer was", "developers were") + " new in this window"
    if cold["sessions"] is None:
        return words + ". None of their sessions built on somebody else's discovery."
    words += (". Own sessions before the first that built on somebody else's discovery: %s"
              " (median)." % median_text(cold["sessions"]))
    return words + (" %s never built on one." % digits(cold["never"]) if cold["never"] else "")


def nothing_words(reader: Reader, window: Window) -> str:
    """What is said of a window without a session, or without one that touched a discovery."""
    if reader.count(window):
        return "No session of this window touched a discovery."
    kind = " of this kind" if window[2:] != NO_FILTER else ""
    last = last_event(reader)
    return "No session%s ended in this window. %s" % (
        kind, "None was ever stored here." if last is None else "The last one%s ended %s UTC." % (
            kind and " of any kind", minute(last)))


def percent(share: Optional[float]) -> str:
    return "-" if share is None else "%.0f %%" % (100 * share)


def median_text(value: Optional[float]) -> str:
    return "-" if value is None else "{:,}".format(int(value) if value % 1 == 0 else value)


SUMMARY_ROWS: Tuple[Tuple[str, Callable[[Plain], object]], ...] = (
    ("sessions", lambda f: f["sessions"]),
    ("developers", lambda f: f["developers"]),
    ("tool calls", lambda f: f["tool_count"]),
    ("tokens saved", lambda f: f["tokens_saved"]),
    ("discoveries", lambda f: f["discoveries"]),
    ("  that reached a 2nd developer", lambda f: f["shared_discoveries"]),
    ("  time until they did (median)", lambda f: lasting(f["hours_to_second_developer"])),
    ("hand-overs", lambda f: f["hand_overs"]),
    ("sessions built on others", lambda f: f["built_on_others"]["sessions"]),
    ("  share of all sessions", lambda f: percent(f["built_on_others"]["share"])),
    ("  tokens saved together with that",
     lambda f: median_text(f["tokens_saved_median"]["built_on_others"])),
    ("  tokens saved by the others", lambda f: median_text(f["tokens_saved_median"]["others"])),
    ("new developers", lambda f: f["cold_start"]["developers"]),
    ("  sessions before they built (median)", lambda f: median_text(f["cold_start"]["sessions"])),
    ("  never built on others", lambda f: f["cold_start"]["never"]),
)


def summary_text(result: Plain) -> str:
    """The findings in words, then the window and the one before it side by side."""
    before = result["before"]
    until = minute(result["until"]) if result["until"] else "now"
    lines = ["\n%-36s %14s %14s" % ("", "this window", "the one before" if before else "")]
    lines += ["%-36s %14s %14s" % (
        name, value_text(cell(result)), value_text(cell(before)) if before else "")
              for name, cell in SUMMARY_ROWS]
    return "".join([
        "Sessions from %s to %s (UTC)\n\n" % (minute(result["since"]) or "the start", until),
        wrapped(findings(result)), *(line.rstrip(" ") + "\n" for line in lines),
        "\nBuilt on others: a session with a discovery that another developer's session,\n"
        "ended earlier in the window, had touched. The figures say what came together,\n"
        "not what caused it. A developer is a GitHub hash, or else the hash of a machine.\n"])


LISTED_FLOWS = 20
COUNTERS = (("sessions", "sessions"), ("developers", "developers"),
            ("tokens saved", "tokens_saved"), ("discoveries", "discoveries"),
            ("hand-overs", "hand_overs"))


def graph_text(result: Plain) -> str:
    totals = result["totals"]
    flows = [flow for flow in result["developers"] if flow["crosses"]]
    text = "".join("%-16s %12s\n" % (name, digits(totals[key])) for name, key in COUNTERS)
    text += rest_line("of the newest {:,} of {:,} sessions; --limit takes more",
                 totals["sessions"], result["total_count_in_window"])
    return text + flows_text("from developer to developer", FLOW_COLUMNS, flows)


def activity_text(result: Plain) -> str:
    text = text_table(ACTIVE_COLUMNS, result["active"]) + "\n"
    if result["before"]:
        here, before = (sum(day["sessions"] for day in part["days"])
                        for part in (result, result["before"]))
        text += "in this window %s, in as many days before %s\n" % (
            counted(here, "session"), digits(before))
    text += wrapped(renamed(result))
    for kind in PERIODS:
        most = max((row["sessions"] for row in result[kind]), default=0) or 1
        bar = Column("", lambda p, most=most: "#" * math.ceil(  # type: ignore[misc]
            16 * p["sessions"] / most))
        text += "\n" + text_table((*PERIOD_COLUMNS, bar), result[kind])
    return text


FORMULA = re.compile(r"[=+\-@]")  # what makes a spreadsheet compute a cell


def csv_cell(value: object) -> object:
    if isinstance(value, list):
        value = " ".join(map(str, value))
    if not isinstance(value, str):
        return value
    shown = visible(value)
    return "'" + shown if FORMULA.match(shown) else shown


def csv_lines(rows: Iterable[Plain]) -> Iterator[str]:
    """CSV with a header line; a list is one cell, its items parted by blanks."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for n, row in enumerate(rows):
        if n == 0:
            writer.writerow(row)
        writer.writerow(map(csv_cell, row.values()))
        yield out.getvalue()
        out.seek(0)
        out.truncate()


def json_lines(rows: Iterable[Plain]) -> Iterator[str]:
    return (compact_json(row) + "\n" for row in rows)


def json_array(rows: Iterable[Plain]) -> Iterator[str]:
    before = "[\n"
    for row in rows:
        yield before + json.dumps(row)
        before = ",\n"
    yield "[]\n" if before == "[\n" else "\n]\n"


def dot_string(text: str) -> str:
    return '"' + visible(text).replace("\\", "\\\\").replace('"', '\\"') + '"'


def dot_text(result: Plain) -> str:
    """For Graphviz (`dot -Tsvg`): a box of sessions for each developer, hand-overs in orange."""
    boxes: Dict[str, List[Plain]] = {}
    for node in result["nodes"]:
        boxes.setdefault(node["developer"], []).append(node)
    lines = ["digraph sessions {",
             "  rankdir=LR; node [shape=circle fontsize=9]; edge [fontsize=8 color=gray60]"]
    for developer, nodes in boxes.items():
        lines.append("  subgraph %s { label=%s" % (
            dot_string("cluster_" + developer), dot_string(developer)))
        lines += ["    %s [label=%s]" % (
            dot_string(n["id"]), dot_string(n["session_id_hash"][:PREFIX])) for n in nodes]
        lines.append("  }")
    for edge in result["edges"]:
        label = ", ".join(edge["discoveries"][:2]) + (", ..." if edge["discoveries"][2:] else "")
        color = ' color="#d55e00" penwidth=2' if edge["crosses"] else ""
        lines.append("  %s -> %s [label=%s%s]" % (
            *map(dot_string, (edge["source"], edge["target"], label)), color))
    return "\n".join(lines) + "\n}\n"


# ==================================================================================================
# Renderers: HTML (pure). Every value goes through `esc`; nothing on a page comes from elsewhere
# ==================================================================================================

@functools.lru_cache(maxsize=None)
def policy() -> str:
    """The Content-Security-Policy of every page: only STYLE and SCRIPT style or run it. data: is
    the empty icon, which keeps browsers from asking for one."""
    def source(text: str) -> str:
        digest = hashlib.sha256(text.encode()).digest()
        return "'sha256-%s'" % base64.b64encode(digest).decode()

    return ("default-src 'none'; script-src %s; style-src %s; img-src data:; base-uri 'none';"
            " form-action 'self'" % (source(SCRIPT), source(STYLE)))


def esc(text: object) -> str:
    """Text for an HTML text or a quoted attribute, made visible first."""
    return html.escape(visible(str(text)), quote=True)


def embedded(value: object) -> str:
    """JSON in a <script>: ASCII, without the three characters that could end or change it."""
    text = compact_json(value)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def document(title: str, body: str, head: str = "") -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">%s<title>%s</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="referrer" content="no-referrer"><link rel="icon" href="data:,">'
        '<style>%s</style></head>\n<body><div class="wrap">%s</div></body></html>\n' % (
            head, esc(title), STYLE, body))


def forwarding(address: str) -> str:
    """A page that goes on to another address at once, also where no script runs."""
    to = esc(address)
    body = '<main><h1>Opening the pages</h1><p><a href="%s">Go on</a></p></main>' % to
    return document("Opening", body, '<meta http-equiv="refresh" content="0;url=%s">' % to)


def cell_html(column: Column, row: Plain, query: str = "") -> str:
    """A cell; developers and discoveries are links to their pages on a window (`query`)."""
    if column in (DEVELOPER, DISCOVERY):
        return link("developer" if column == DEVELOPER else "discovery", column.cell(row), query)
    return column.html(row) if column.html else esc(value_text(column.cell(row)))


def html_table(caption: str, columns: Sequence[Column], rows: Sequence[Plain], query: str = "",
               sorts: str = "", sort: str = "") -> str:
    """A table that becomes a card for each row where the screen is narrow; "" without rows.
    `query`: see cell_html. `sorts`: the beginning of an address, which a column's order makes
    whole; `sort`: the order of these rows."""
    if not rows:
        return ""
    titles, body = [], []
    for c in columns:
        text, order = esc(c.title), ""
        if sorts and c.sort:
            text = '<a href="%s">%s</a>' % (esc(sorts + c.sort), text)
            if c.sort == sort:
                text, order = text + " &#9662;", ' aria-sort="other"'
        titles.append('<th scope="col" class="%s"%s>%s</th>' % (c.kind, order, text))
    for row in rows:
        body.append("<tr>%s</tr>\n" % "".join('<td class="%s" data-t="%s">%s</td>' % (
            c.kind, esc((c.short or c.title).lower()), cell_html(c, row, query)) for c in columns))
    return ('<div class="scroll"><table class="%s"><caption>%s</caption><thead><tr>%s</tr></thead>'
            '<tbody>\n%s</tbody></table></div>' % (
                "cards sorts" if sorts else "cards", esc(caption), "".join(titles), "".join(body)))


def link(kind: str, name: str, query: str = "", shown: str = "") -> str:
    """A link to the page of a session, developer or discovery. `query`: the window, as "?days=30";
    without one a discovery's page shows all there ever was."""
    return '<a href="/%s/%s%s">%s</a>' % (
        kind, urllib.parse.quote(name, safe=""), esc(query), esc(shown or name))


def session_link(s: Plain) -> str:
    return link("session", s["session_id_hash"], shown=s["session_id_hash"][:12])


def discovery_links(refs: Sequence[str], most: int = 3) -> str:
    more = " +%d" % (len(refs) - most) if len(refs) > most else ""
    return ", ".join(link("discovery", ref) for ref in refs[:most]) + more


def tiles(values: Iterable[Tuple[str, str, str]], kind: str = "") -> str:
    """Counters: (title, HTML, id or "")."""
    return '<dl class="tiles %s">%s</dl>' % (kind, "".join(
        "<div><dt>%s</dt><dd%s>%s</dd></div>" % (
            esc(title), ' id="%s"' % name if name else "", value)
        for title, value, name in values))


# The picture of the replay. Heights are in px. Across, a moment is a share of the width. So the
# same picture fits every screen, and the script has nothing to lay out.

CROWDED_ARCS, MOST_LANES = 300, 40  # beyond either, lanes show density in place of each session
MOST_ARCS = 6000  # in one page, which says so if there are more
MOST_CELLS = 40  # of one lane
LANES_PX, PICTURE_PX = (42, 30, 20, 15), 600  # heights of a lane; most of all lanes
PHONE_LANES = 12  # that a narrow screen shows at first: STYLE has their height for each of LANES_PX
HOUR_MS = 3_600_000
TICK_HOURS = (1, 3, 6, 12, 24, 48, 168)  # between two ticks; 168 is a week, from Monday
TICK_MONTHS = (1, 3, 12, 60, 120, 1200, 12_000)
MOST_TICKS = 12
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def month_starts(start: int, end: int, step: int) -> Iterator[Tuple[int, int, int]]:
    """(ms since 1970, year, month from 1) of each `step`-th month's first moment in start..end."""
    first = moment_text(start)
    months = int(first[:4]) * 12 + int(first[5:7]) - 1
    for index in range(-(-months // step) * step, 12 * 10_000, step):
        year, month = index // 12, index % 12 + 1
        at = instant("%04d-%02d-01T00:00:00Z" % (year, month)) if year else None
        if at is not None and at > end:
            return
        if at is not None and at >= start:
            yield at, year, month


def ticks_of(start: int, span: int) -> List[Tuple[int, str]]:
    """(ms since 1970, label) of at most MOST_TICKS + 1 round moments: hours to weeks, or months,
    quarters and years where the span is long."""
    hours = next((h for h in TICK_HOURS if span <= MOST_TICKS * h * HOUR_MS), 0)
    if hours:
        step = hours * HOUR_MS
        monday = 4 * DAY_MS if hours == 168 else 0  # 1970 began on a Thursday
        moments = range(-((monday - start) // step) * step + monday, start + span + 1, step)
        return [(at, day_words(moment_text(at)) if at % DAY_MS == 0 else moment_text(at)[11:16])
                for at in moments]
    step = next((m for m in TICK_MONTHS if span <= MOST_TICKS * m * 30 * DAY_MS), TICK_MONTHS[-1])
    return [(at, "%d" % year if step >= 12 else "Q%d %d" % (month // 3 + 1, year) if step == 3
             else "%s %d" % (MONTHS[month - 1], year))
            for at, year, month in month_starts(start, start + span, step)]


def day_words(moment: str) -> str:
    return "%d %s" % (int(moment[8:10]), MONTHS[int(moment[5:7]) - 1])


def numbers_of(keys: Iterable[str]) -> Dict[str, int]:
    return {key: n for n, key in enumerate(keys)}


def stretched(height: float, shapes: str) -> str:
    """Shapes whose x is in thousandths of the width."""
    return ('<svg width="100%%" height="%g" viewBox="0 0 1000 %g" preserveAspectRatio="none">%s'
            '</svg>' % (height, height, shapes))


class Picture:
    """Sessions in time order as an SVG, and the data that the script plays. `only`: arcs of this
    discovery alone; `links`: there are pages to go to; `query`: the window, for these."""

    def __init__(self, ordered: Sequence[Session], only: Optional[str] = None, links: bool = True,
                 query: str = "") -> None:
        self.ordered, self.only, self.links, self.query = ordered, only, links, query
        self.start, self.span = ordered[0].ended, ordered[-1].ended - ordered[0].ended
        if self.span < 60_000:  # one session, or a few at once: an hour around them
            self.start, self.span = self.start - HOUR_MS // 2, HOUR_MS
        self.numbers = numbers_of(dict.fromkeys(
            ref for s in ordered for ref in s.refs if only in (None, ref)))
        self.every = edges_of(ordered, only)
        self.arcs = self.every[-MOST_ARCS:]
        balance = dict.fromkeys((s.developer for s in ordered), 0)  # given minus received
        for e in self.every:
            balance[ordered[e.source].developer] += len(e.refs)
            balance[ordered[e.target].developer] -= len(e.refs)
        self.developers = sorted(balance, key=lambda key: -balance[key])  # then by first session
        self.rows = rows = min(len(balance), MOST_LANES)
        self.lanes = {key: min(n, rows - 1) for n, key in enumerate(self.developers)}
        alone = rows if len(balance) == rows else rows - 1
        self.own, self.others = self.developers[:alone], self.developers[alone:]
        self.crowded = len(self.every) > CROWDED_ARCS or bool(self.others)
        self.lane = next(px for px in LANES_PX if rows * px <= PICTURE_PX)
        end = self.start + self.span
        self.quarters = list(month_starts(self.start + 1, end, 3))[:40]
        self.top = 40 if self.quarters else 26
        self.height = round(self.top + self.lane * rows + 6, 1)

    def x(self, ms: int) -> float:
        """Thousandths of the width."""
        return round((ms - self.start) / self.span * 1000, 1)

    def y(self, lane: int) -> float:
        """The middle of a lane, in px."""
        return round(self.top + (lane + .5) * self.lane, 1)

    def svg(self) -> str:
        words = "Replay: %s of %s over time; the tables say the same" % (
            counted(len(self.ordered), "session"), counted(len(self.developers), "developer"))
        return ('<svg id="chart" height="%g" role="group" aria-label="%s"%s>%s<g class="lanes">%s'
                '</g>%s<g id="discs">%s</g>%s</svg>' % (
                    self.height, words, ' class="dense"' if self.crowded else "", self.axis(),
                    self.lane_lines(self.own),
                    stretched(self.height, '%s<g id="arcs">%s</g>' % (
                        self.cells(self.lanes) if self.crowded else "", self.arc_paths())),
                    self.discs(),
                    stretched(self.height, '<g id="later"><rect y="%g" width="1100" height="%g"/>'
                              '<path d="M0 %gV%g"/></g>' % (
                                  self.top, self.height - self.top, self.top - 6, self.height))))

    def axis(self) -> str:
        line = ('<g class="%s"><line x1="%g%%" x2="%g%%" y1="%g" y2="%g"/>'
                '<text x="%g%%" y="%g">%s</text></g>')
        parts = ['<g id="ticks">']
        ticks = ticks_of(self.start, self.span)
        mixed = {":" in label for _, label in ticks} == {True, False}  # hours between days
        for n, (at, label) in enumerate(ticks):
            x, odd = self.x(at) / 10, ":" in label if mixed else n % 2
            parts.append(line % ("odd" if odd else "", x, x, 20, self.height, x, 14, label))
        for at, _, month in self.quarters:
            x, words = self.x(at) / 10, "Q%d | Q%d" % ((month + 8) // 3 % 4 + 1, month // 3 + 1)
            words = words if len(self.quarters) <= MOST_TICKS // 2 else ""  # no room
            parts.append(line % ("q", x, x, 36, self.height, x, 32, words))
        return "".join([*parts, "</g>"])

    def lane_lines(self, keys: Sequence[str]) -> str:
        """A line and a name for each of these developers, and in the picture for the rest."""
        line = '<line x2="100%%" y1="%g" y2="%g"/><text x="-20" y="%g">%s</text>'
        names = [link("developer", key, self.query) if self.links else esc(key) for key in keys]
        if keys is self.own and self.others:
            names.append("%d others" % len(self.others))
        return "".join(line % (self.y(n), self.y(n), self.y(n) + 4, name)
                       for n, name in enumerate(names))

    def cells(self, lanes: Mapping[str, int]) -> str:
        """A bar for each fortieth of the window with sessions in a lane. Its height says how many:
        1, 2 or 3, or more."""
        step = self.span // MOST_CELLS + 1
        counts = collections.Counter((lanes[s.developer], (s.ended - self.start) // step)
                                     for s in self.ordered if s.developer in lanes)
        width = round(step / self.span * 1000 - 1.5, 1)
        return '<path class="cells" d="%s"/>' % "".join("M%g %gh%gv%gh%gz" % (
            round(n * step / self.span * 1000, 1), self.y(lane) + self.lane / 2 - 1.5, width,
            -round(min(3, count.bit_length()) / 3 * (self.lane - 3), 1), -width)
            for (lane, n), count in sorted(counts.items()))

    def arc_path(self, edge: Edge) -> str:
        """Within a lane a bow above it; between two lanes a curve that starts and ends level."""
        (x1, y1), (x2, y2) = ((self.x(s.ended), self.y(self.lanes[s.developer])) for s in (
            self.ordered[edge.source], self.ordered[edge.target]))
        if y1 == y2:
            bow = round(y1 - min(self.lane * 1.1, 8 + (x2 - x1) / 2), 1)
            return "M%g %gQ%g %g %g %g" % (x1, y1, round((x1 + x2) / 2, 1), bow, x2, y2)
        bend = max(12, (x2 - x1) / 2)
        return "M%g %gC%g %g %g %g %g %g" % (
            x1, y1, round(x1 + bend, 1), y1, round(x2 - bend, 1), y2, x2, y2)

    def arc_paths(self) -> str:
        return "".join('<path%s d="%s"/>' % (
            ' class="x"' if e.crosses else "", self.arc_path(e)) for e in self.arcs)

    def discs(self) -> str:
        largest = max(s.tools for s in self.ordered) or 1
        most = min(17.0, self.lane * .62)
        return "".join(
            '<a%s aria-label="%s, %s, %s"><circle cx="%g%%" cy="%g" r="%g"%s/></a>' % (
                ' href="/session/%s"' % s.session if self.links else "", esc(s.developer),
                minute(moment_text(s.ended)), counted(s.tools, "call"),
                round(self.x(s.ended) / 10, 2),
                self.y(self.lanes[s.developer]),
                round(max(2.0, most * math.sqrt(s.tools / largest)), 1),
                ' class="g"' if s.github else "") for s in self.ordered)

    def others_html(self) -> str:
        """The lanes that stand as one in the picture."""
        height, lanes = self.top + self.lane * len(self.others) + 6, numbers_of(self.others)
        return ('<details class="others"><summary>%s more developers, a lane each</summary>'
                '<div class="stage"><svg height="%g" role="img" aria-label="The lanes of %s more'
                ' developers"><g class="lanes">%s</g>%s</svg></div></details>' % (
                    digits(len(lanes)), height, digits(len(lanes)), self.lane_lines(self.others),
                    stretched(height, self.cells(lanes))))

    def data(self) -> Plain:
        """For the script: `sessions` are [ms after start, developer, tool calls, tokens, [refs],
        hand-overs received], `edges` [source, target, [refs], crosses 0|1]; refs and developers are
        numbers into `refs` and `developers`."""
        received = [0] * len(self.ordered)
        for e in self.every:
            received[e.target] += len(e.refs) if e.crosses else 0
        numbers = self.numbers
        rows = [[numbers[ref] for ref in s.refs if ref in numbers] for s in self.ordered]
        who = numbers_of(self.developers)
        return {
            "start": self.start, "span": self.span, "links": self.links, "query": self.query,
            "developers": self.developers,
            "refs": list(map(visible, numbers)),
            "sessions": [[s.ended - self.start, who[s.developer], s.tools, s.tokens, refs, n]
                         for s, refs, n in zip(self.ordered, rows, received)],
            "edges": [[e.source, e.target, [numbers[ref] for ref in e.refs], int(e.crosses)]
                      for e in self.arcs]}


CONTROLS = (
    '<div class="controls" role="group" aria-label="Replay"><button id="play" type="button">Play'
    '</button><input id="slider" type="range" max="500" aria-label="Moment"><span id="moment">'
    '</span><label>Speed <select id="speed"><option value="0.5">&#189;&#215;</option>'
    '<option value="1" selected>1&#215;</option><option value="2">2&#215;</option>'
    '<option value="4">4&#215;</option><option value="8">8&#215;</option></select></label>'
    '<p id="caption" aria-live="polite"></p></div>')
PANEL = (
    '<div id="panel" role="region" aria-label="What is chosen" aria-live="polite" tabindex="0">'
    '<p class="note">Point at a session, tap it, or reach it with Tab and the arrow keys, to see'
    ' what it knew and where that went. Choose a discovery to see its path alone. Space plays and'
    ' pauses, &larr; and &rarr; step from session to session.</p></div>')
SIGN = '<span><svg width="%d" height="14" aria-hidden="true">%s</svg>%s</span>'
DISC_SIGNS = (
    SIGN % (14, '<circle class="g" cx="7" cy="7" r="5.5"/>', "session, with GitHub")
    + SIGN % (14, '<circle cx="7" cy="7" r="5.5"/>', "without")
    + "<span>area: calls of tools</span>")
CELL_SIGNS = (
    SIGN % (18, '<path d="M0 14V9H5V14zM7 14V1H12V14z"/>', "sessions: the taller, the more")
    + "<span>arcs: of what is chosen, alone</span>")
ARC_SIGNS = (
    SIGN % (26, '<line x2="26" y1="7" y2="7"/>', "discovery carried on")
    + SIGN % (26, '<line class="x" x2="26" y1="7" y2="7"/>', "handed over to another developer"))
QUARTER_SIGN = (
    "<span>Q3 | Q4: the quarter's edge, where everybody is renamed: nobody is the same developer"
    " before and after it</span>")
EVERY_LANE = '<label class="every"><input type="checkbox">Show all %d lanes</label>'
LISTED = 30  # discoveries beside the picture
IN_MATRIX, PAIRS = 20, 10  # developers each way; pairs in the list that a phone shows in its place


def replay(picture: Picture, total: int, ranked: Sequence[Plain], said: str = "",
           at: str = "") -> str:
    """The body of the replay of a picture's sessions, of `total` in the window: what was found out
    (`said`, HTML), controls, picture, the `ranked` discoveries, and who learned from whom. `at`:
    what to start with, as behind the # of the page's address."""
    ordered, result = picture.ordered, graph_of(picture.ordered, picture.only)
    flows = [flow for flow in result["developers"] if flow["crosses"]]
    notes = []
    if total > len(ordered):
        notes.append("Shown are the newest %s of %s sessions in this window, from %s UTC on." % (
            digits(len(ordered)), digits(total), minute(moment_text(ordered[0].ended))))
    if len(picture.every) > len(picture.arcs):
        notes.append("Of the arcs the newest %s can be shown; %s older ones are only counted." % (
            digits(MOST_ARCS), digits(len(picture.every) - len(picture.arcs))))
    legend = '<div class="legend">%s</div>' % "".join([
        CELL_SIGNS if picture.crowded else DISC_SIGNS, ARC_SIGNS,
        QUARTER_SIGN if picture.quarters else ""])
    return "".join([
        said, note_html(" ".join(notes)),
        '<div class="card">', CONTROLS,
        tiles((title.capitalize(), digits(result["totals"][key]), "count%d" % i)
              for i, (title, key) in enumerate(COUNTERS)),
        '<div class="board%s"><div>' % ("" if ranked else " alone"),
        '<div class="stage lane%d" id="stage">%s</div>' % (picture.lane, picture.svg()),
        EVERY_LANE % picture.rows if picture.rows > PHONE_LANES else "",
        picture.others_html() if picture.others else "", legend, PANEL, "</div>",
        ranking(ranked, picture) if ranked else "", "</div></div>",
        matrix(flows, picture) if flows else "",
        '<script type="application/json" id="data">%s</script>' % embedded(
            dict(picture.data(), at=at)),
        "<script>%s</script>" % SCRIPT])


def ranking(ranked: Sequence[Plain], picture: Picture) -> str:
    """The list of discoveries from which one is chosen. A button works with the script alone."""
    rows = "".join(
        '<li><button type="button" data-ref="%d" aria-pressed="false">%s</button>%s<span>%s</span>'
        '</li>' % (picture.numbers[d["discovery_id"]], esc(d["discovery_id"]),
                   spark_svg(d["counts"]), esc(reach_words(d)))
        for d in ranked if d["discovery_id"] in picture.numbers)
    more = max(0, len(picture.numbers) - LISTED)
    words = counted(more, "more discovery", "more discoveries")
    if picture.links:
        words = '<a href="/discoveries%s">%s</a>' % (esc(picture.query), words)
    return '<div class="side"><h2>Discoveries, by reach</h2><ul class="ranking">%s</ul>%s</div>' % (
        rows, '<p class="note">%s</p>' % words if more else "")


def reach_words(d: Plain) -> str:
    words = [counted(d["developer_count"], "developer")]
    if d["hours_to_second_developer"] is not None:
        words.append("second after " + lasting(d["hours_to_second_developer"]))
    if d["half_life_hours"] is not None:
        words.append("half-life " + lasting(d["half_life_hours"]))
    return ", ".join(words)


def bars(values: Sequence[int], most: int, width: float, height: int, gap: float) -> str:
    """The path of a bar for each value. `width`: of one bar and its gap; `height`: of `most`."""
    return "".join("M%g %dV%gh%gV%dz" % (
        round(i * width, 1), height, round(height - height * value / most, 1),
        round(max(gap / 2, width - gap), 1), height) for i, value in enumerate(values) if value)


def spark_svg(values: Sequence[int]) -> str:
    return ('<svg class="spark" viewBox="0 0 100 12" preserveAspectRatio="none" aria-hidden="true">'
            '<path d="%s"/></svg>' % bars(values, max(values), 100 / len(values), 12, 1))


def matrix(flows: Sequence[Plain], picture: Picture) -> str:
    """Who learned from whom: rows give, columns receive. A narrow screen has the largest pairs."""
    carried = {(f["source"], f["target"]): f["discoveries"] for f in flows}

    def largest(end: str) -> List[str]:
        """The developers at this end of most hand-overs, in the order of the lanes."""
        count: Counter[str] = collections.Counter()
        for flow in flows:
            count[flow[end]] += flow["discoveries"]
        among = dict(count.most_common(IN_MATRIX))
        return [who for who in picture.developers if who in among]

    givers, takers = largest("source"), largest("target")
    most = max(carried.values())
    rows = "".join('<tr><th scope="row">%s</th>%s</tr>' % (esc(a), "".join(
        '<td class="h%d">%s</td>' % (math.ceil(4 * carried[a, b] / most), digits(carried[a, b]))
        if (a, b) in carried else "<td></td>" for b in takers)) for a in givers)
    head = "".join('<th scope="col"><span>%s</span></th>' % esc(name) for name in takers)
    caption = ("Hand-overs from a developer (row) to another (column): how often a discovery that"
               " one had touched was next touched by the other")
    return ('<h2>Who learned from whom</h2><div class="scroll matrix" tabindex="0" role="region"'
            ' aria-label="Who learned from whom"><table><caption>%s%s</caption><thead><tr>'
            '<th scope="col">gives &#8595; receives &#8594;</th>%s</tr></thead><tbody>%s</tbody>'
            '</table></div><div class="pairs">%s</div>' % (
                caption, "; the %d who gave and received most" % IN_MATRIX
                if max(len(givers), len(takers)) == IN_MATRIX else "", head, rows,
                html_table("The %d largest of %s" % (min(PAIRS, len(flows)), counted(
                    len(flows), "pair")), FLOW_COLUMNS, flows[:PAIRS])))


def replay_of(reader: Reader, window: Window, query: str = "", links: bool = True,
              limit: int = DRAWN, at: str = "") -> str:
    """The replay (see there, and Picture) of a window's newest sessions; "" if it has none. A
    window of one discovery has no findings and no list, since the page is about that one."""
    newest = reader.window(window, limit)
    if not newest:
        return ""
    ranked, said = [], ""
    if window.discovery is None:
        ranked = discoveries(reader, window, LISTED, "developer_count")["discoveries"]
        said = findings_html(findings(summary(reader, window)))
    picture = Picture(newest[::-1], window.discovery, links, query)
    return replay(picture, reader.count(window), ranked, said, at)


def replay_file(reader: Reader, window: Window, limit: int = DRAWN, at: str = "") -> str:
    """The replay of a window's newest sessions as one self-contained file: it opens without this
    program and asks nobody. `at`: where it starts (see `replay`)."""
    window = fixed(window)
    body = replay_of(reader, window, "", False, limit, at) or nothing(reader, window)
    head = '<meta http-equiv="Content-Security-Policy" content="%s">' % policy()
    return document("Session replay", '<main><h1>Session replay</h1>%s%s%s</main>' % (
        note_html(window_words(window)), words_of(*WORDS), body), head)


def findings_html(sentences: Sequence[str]) -> str:
    return '<ul class="findings">%s</ul>' % "".join("<li>%s</li>" % esc(text) for text in sentences)


# The pages of `view`.

PAGES = (("/", "Replay"), ("/discoveries", "Discoveries"), ("/developers", "Developers"),
         ("/activity", "Activity"), ("/sessions", "Sessions"))
DAY_CHOICES = (1, 7, 14, 30, 90)
GITHUB_CHOICES = {"": "with and without", "true": "with GitHub", "false": "without GitHub"}
WORDS = {  # what a word means; each page says it of the words that stand on it
    "session": "A session is one run of a coding assistant, recorded when it ended.",
    "calls": "Calls: how often the session used a tool.",
    "saved": "Tokens saved: what the plugin counted as spared.",
    "developer": "A developer is a GitHub account, or else a machine. It is shown as the first"
                 " digits of a hash, which changes with the quarter.",
    "discovery": "A discovery is something worth knowing, under a short name. A session touches"
                 " it.",
    "hand-over": "A hand-over: one developer's session touched a discovery, and the next session"
                 " that touched it was another developer's.",
}


class Filters(NamedTuple):
    """What the address of a page asks for, as it came in but checked; "" where nothing was said.
    `discovery` is None on a page that cannot be narrowed to one."""

    days: int = DAYS_DEFAULT
    since: str = ""
    until: str = ""
    github: str = ""
    discovery: Optional[str] = ""

    def window(self) -> Window:
        github = {"": None, "true": True, "false": False}[self.github]
        return window_between(self.days, self.since, self.until, github, self.discovery or None)

    def query(self) -> str:
        """The window, in an address."""
        said = {name: value for name, value in self._asdict().items() if value}
        if self.since:
            del said["days"]
        return "?" + urllib.parse.urlencode(said, errors="replace")


Query = Dict[str, str]  # the parameters of an address, the first of each name


def number_in(query: Query, name: str, default: int, most: int) -> int:
    """A number that is too large is the largest, nonsense is the default (README, Contract 7)."""
    text = query.get(name, "")
    digits = text.lstrip("0")
    if not re.fullmatch(r"[0-9]+", text) or not digits:
        return default
    return most if len(digits) > 9 else min(int(digits), most)


def filters_of(query: Query) -> Filters:
    github = query.get("github", "")
    since, until = (query[name] if day_start(query.get(name, "")) else ""
                    for name in ("since", "until"))
    return Filters(number_in(query, "days", DAYS_DEFAULT, 36_500), since, until,
                   github if github in GITHUB_CHOICES else "",
                   query.get("discovery", "").strip()[:1000])


def select(name: str, choices: Iterable[Tuple[str, str]], chosen: str) -> str:
    return '<select name="%s">%s</select>' % (name, "".join('<option value="%s"%s>%s</option>' % (
        esc(value), " selected" if value == chosen else "", esc(text)) for value, text in choices))


def filter_form(path: str, filters: Filters) -> str:
    """The form that chooses the window; on a narrow screen it is folded."""
    days = [(str(n), "last %s" % counted(n, "day")) for n in sorted({*DAY_CHOICES, filters.days})]
    date = '<input type="date" name="%s" value="%s">'
    fields = [("Window", select("days", days, str(filters.days))),
              ("or since (UTC)", date % ("since", filters.since[:10])),
              ("until before", date % ("until", filters.until[:10])),
              ("GitHub", select("github", GITHUB_CHOICES.items(), filters.github))]
    if filters.discovery is not None:
        fields.append(("Discovery", '<input name="discovery" size="22" maxlength="200"'
                       ' placeholder="any" value="%s">' % html.escape(filters.discovery)))
    return ('<details class="filters"><summary>Choose the window</summary><form method="get"'
            ' action="%s">%s<button>Show</button></form></details>' % (
                esc(path), "".join("<label>%s%s</label>" % field for field in fields)))


def window_words(window: Window) -> str:
    until = "now" if window.until == END_OF_TIME else "%s UTC" % minute(window.until)
    words = "From %s UTC until %s" % (minute(window.since), until)
    if window.github is not None:
        words += ", sessions %s GitHub" % ("with" if window.github else "without")
    if window.discovery is not None:
        words += ", sessions that touched " + window.discovery
    return words + "."


def words_of(*names: str) -> str:
    text = " ".join(WORDS[name] for name in names)
    return text and ('<details class="words"><summary>What the words mean</summary><p>%s</p>'
                     '</details>' % text)


def note_html(text: str) -> str:
    return '<p class="note">%s</p>' % esc(text) if text else ""


def page(reader: Reader, path: str, title: str, filters: Optional[Filters], main: str,
         window: Optional[Window] = None, words: Iterable[str] = (), beside: str = "") -> str:
    """A page of the viewer: links to the others, the title with what stands `beside` it, the
    window and what the `words` mean, the form that chooses the window (none without `filters`),
    `main` or else that there is nothing, and what was left out."""
    query = esc(filters.query()) if filters else ""
    nav = "".join('<a href="%s%s"%s>%s</a>' % (
        to, query, ' aria-current="page"' if to == path else "", name) for to, name in PAGES)
    left_out = "%s left out: not sessions as the contract has them." % counted(
        reader.left_out, "row was", "rows were") if reader.left_out else ""
    return document(title + " - sessions", "".join([
        '<a class="skip" href="#main">Skip to the content</a><header><b>Session events</b>'
        '<nav aria-label="Pages">%s</nav></header><main id="main"><div class="top"><h1>%s</h1>%s'
        '</div>' % (nav, esc(title), beside), note_html(window_words(window) if window else ""),
        words_of(*words), filter_form(path, filters) if filters else "",
        main or nothing(reader, window or EVER), note_html(left_out), "</main>"]))


def empty(text: str) -> str:
    return '<p class="card empty">%s</p>' % esc(text)


def nothing(reader: Reader, window: Window) -> str:
    return empty(nothing_words(reader, window))


def replay_page(reader: Reader, filters: Filters) -> str:
    window = filters.window()
    body = replay_of(reader, window, filters.query())
    since, until = fixed(window)[:2]
    save = body and '<a id="save" class="button" href="/save%s" download>Save as a file</a>' % esc(
        filters._replace(since=since, until=until).query())
    return page(reader, "/", "Replay", filters, body, window, WORDS, beside=save)


def saved_replay(reader: Reader, filters: Filters, query: Query) -> str:
    """The replay as a file, with the moment and the discovery that the page's script asks for."""
    at = [(name, query[name]) for name in ("t", "d") if name in query]
    return replay_file(
        reader, filters.window(), at=urllib.parse.urlencode(at, errors="replace"))


def sessions_page(reader: Reader, filters: Filters) -> str:
    window = filters.window()
    result = sessions(reader, window, LISTED_ROWS)
    caption = "The newest %s of %s in this window" % (
        digits(len(result["sessions"])), counted(result["total_count_in_window"], "session"))
    return page(reader, "/sessions", "Sessions", filters,
                html_table(caption, SESSION_COLUMNS, result["sessions"], filters.query()),
                window, ("session", "calls", "saved", "developer"))


def session_page(reader: Reader, prefix: str) -> str:
    """Raises NotFound."""
    result = session(reader, prefix)
    s, related = result["session"], result["related"]
    ended = stored_instant(s["ended_at"]) or 0
    half = 45 * DAY_MS  # a developer's name lasts for a quarter
    query = Filters(since=moment_text(ended - half), until=moment_text(ended + half)).query()
    facts = ['<dt>%s</dt><dd class="%s">%s</dd>' % (c.title, "m" if "m" in c.kind else "",
                                                    cell_html(c, s, query))
             for c in SESSION_FACTS]
    chips = "".join("<li>%s</li>" % link("discovery", ref) for ref in s["discovery_refs"])
    facts.append("<dt>Discoveries</dt><dd>%s</dd>" % (
        '<ul class="chips">%s</ul>' % chips if chips else "-"))
    table = html_table("Other sessions of the same machine, last %d days" % RELATED_DAYS,
                       SESSION_COLUMNS, related, query)
    table = table or note_html("No other session of this machine in the last %d days."
                               % RELATED_DAYS)
    return page(reader, "/session", "Session " + s["session_id_hash"][:12], None,
                '<p class="m">%s</p><dl class="card facts">%s</dl><h2>Related</h2>%s' % (
                    esc(s["session_id_hash"]), "".join(facts), table))


def discoveries_page(reader: Reader, filters: Filters, sort: str) -> str:
    filters = filters._replace(discovery=None)  # all are listed
    window, query, path = filters.window(), filters.query(), "/discoveries"
    result = discoveries(reader, window, LISTED_ROWS, sort)
    rows, total = result["discoveries"], result["discoveries_in_window"]
    caption = "%s touched in this window%s; a title sorts by it" % (
        counted(total, "discovery", "discoveries"),
        ", %s shown" % digits(len(rows)) if total > len(rows) else "")
    body = html_table(caption, DISCOVERY_COLUMNS, rows, query, path + query + "&sort=", sort)
    if body:
        body += note_html("Reach: how many developers had a session that touched it. Half-life:"
                          " until half of its sessions had ended; said of four sessions or more.")
    return page(reader, path, "Discoveries", filters, body, window, ("discovery", "developer"))


def discovery_page(reader: Reader, ref: str, filters: Filters, all_time: bool) -> str:
    """One discovery in a window, or since ever. Raises NotFound if no session ever touched it."""
    filters = filters._replace(discovery=None)
    window = EVER if all_time else filters.window()
    try:
        result = discovery(reader, ref, window)
    except NotFound:
        last = discovery(reader, ref, EVER, 1)["last_seen_at"]
        body = empty("No session of this window touched it; the last one that did ended %s UTC."
                     % minute(last))
    else:
        count = result["session_count"]
        facts = "First seen %s, last %s UTC, in %s of %s." % (
            minute(result["first_seen_at"]), minute(result["last_seen_at"]),
            counted(count, "session"), counted(result["developer_count"], "developer"))
        last = stored_instant(result["last_seen_at"]) or 0
        around = Filters(since=result["first_seen_at"], until=moment_text(last + 1))
        query = (around if all_time else filters).query()
        body = "".join([
            "<p>%s</p>" % esc(facts),
            replay_of(reader, window._replace(discovery=ref), query),
            html_table("Whom it reached, and when", REACHED_COLUMNS, result["reached"], query),
            html_table("Its path: the first %s of %s" % (
                digits(len(result["path"])), counted(count, "session")),
                       PATH_COLUMNS, result["path"], query)])
    return page(reader, "/discovery/" + ref, ref, filters, body, None if all_time else window)


def developers_page(reader: Reader, filters: Filters) -> str:
    window, query = filters.window(), filters.query()
    result = developers(reader, window)
    rows = result["developers"]
    caption = "%s, by given minus received%s" % (
        counted(len(rows), "developer"),
        "; %d shown" % LISTED_ROWS if len(rows) > LISTED_ROWS else "")
    body = html_table(caption, DEVELOPER_COLUMNS, rows[:LISTED_ROWS], query)
    if body:
        body = note_html(" ".join([
            cold_start_words(result["cold_start"]), "Cold start: for developers who were not there"
            " in as many days before, how many sessions came before the first that built on"
            " somebody else's discovery.", *renamed(result)])) + body
    return page(reader, "/developers", "Developers", filters, body, window,
                ("developer", "hand-over", "calls", "saved"))


LISTED_ROWS = 200  # of a table
MOST_DAYS = 800  # in a chart


def developer_page(reader: Reader, label: str, filters: Filters) -> str:
    """What one developer did in the window, and learned from whom. Raises NotFound."""
    if not re.fullmatch("[0-9a-f]{%d,%d}(-[0-9]{1,9})?" % (PREFIX, LONGEST_PREFIX), label):
        raise NotFound("there is no such developer")
    window, query = filters.window(), filters.query()
    result = developers(reader, window)
    names = labels(hashes_of(reader.everybody(window)).values())
    # A link from another window may have more digits or fewer than the label here.
    fitting = {label} & set(names.values()) or {
        name for key, name in names.items() if key.startswith(label)}
    rows = [row for row in result["developers"] if row["developer"] in fitting]
    body = empty("Nobody of this name had a session in this window. The names change with the"
                 " quarter.")
    if len(rows) > 1:
        body = html_table("Developers whose hashes begin with these digits",
                          DEVELOPER_COLUMNS, rows, query)
    elif rows:
        body = html_table("In this window", DEVELOPER_COLUMNS[1:], rows)
        who = rows[0]["developer"]
        for title, own, other in (("Learned from", "target", "source"),
                                  ("Handed on to", "source", "target")):
            flows = [dict(flow, developer=flow[other]) for flow in result["matrix"]
                     if flow[own] == who]
            table = html_table(
                "The most hand-overs first", (DEVELOPER, HAND_OVERS), flows, query)
            body += "<h2>%s</h2>%s" % (title, table or note_html("Nobody in this window."))
        newest = collections.deque(
            (s for s in reader.walk(window) if s.developer == who), LISTED_ROWS)
        body += "<h2>Sessions</h2>" + html_table(
            "The newest %s of %s" % (digits(len(newest)), digits(rows[0]["sessions"])),
            SESSION_COLUMNS, plain_sessions(list(newest)[::-1]), query)
    return page(reader, "/developer/" + label, "Developer " + label, filters, body, window)


def plot(title: str, now: Sequence[int], before: Sequence[int], ends: str) -> str:
    """A chart of two lists of numbers, one a day: bars, and the period before as a pale line."""
    most, n = max([1, *now, *before]), max(1, len(now), len(before))
    line = "M" * bool(before) + "L".join(
        "%g %g" % (round((i + .5) * 1000 / n, 1), round(100 - 100 * value / most, 1))
        for i, value in enumerate(before))
    words = "%s by day: up to %s" % (title, digits(max(now, default=0)))
    if any(before):
        words += "; in as many days before up to %s" % digits(max(before))
    return ('<figure class="card"><figcaption>%s</figcaption><svg viewBox="0 0 1000 100"'
            ' preserveAspectRatio="none" role="img" aria-label="%s"><path d="%s"/>'
            '<path class="before" d="%s"/></svg><p class="ends">%s</p></figure>' % (
                words, words, bars(now, most, 1000 / n, 100, 2), line, ends))


def days_drawn(window: Window) -> List[str]:
    """The last MOST_DAYS days of a window."""
    start, end = ends_of(window)
    last = (end - 1) // DAY_MS
    first = max(last - MOST_DAYS + 1, (start or 0) // DAY_MS)
    return [moment_text(day * DAY_MS)[:10] for day in range(first, last + 1)]


def by_day(rows: Sequence[Plain], window: Window, column: Column) -> List[int]:
    """A column's figure of each day that is drawn, 0 where none is listed; [] without rows."""
    figures = {row["period"]: column.cell(row) for row in rows}
    return [figures.get(day, 0) for day in days_drawn(window) if figures]


def activity_page(reader: Reader, filters: Filters) -> str:
    window = filters.window()
    result = activity(reader, window)
    days, before = result["days"], result["before"]
    earlier = Window(before["since"], before["until"])
    body = tiles(
        [("Active in %s" % counted(row["days"], "day"), "%s <small>%s came back</small>" % (
            digits(row["developers"]), digits(row["came_back"])), "") for row in result["active"]],
        "large")
    if any(day["sessions"] for day in days):
        drawn = days_drawn(window)
        ends = "<span>%s</span><span>%s</span>" % (drawn[0], drawn[-1])
        body += '<div class="plots">%s</div>' % "".join(
            plot(c.title, by_day(days, window, c), by_day(before["days"], earlier, c), ends)
            for c in (SESSIONS, DEVELOPERS, SAVED))
        body += note_html(" ".join([
            "Bars: this window%s. Pale line: as many days before it. Came back: developers who were"
            " also there in the period before." % (
                ", its last %s" % counted(MOST_DAYS, "day") if len(drawn) == MOST_DAYS else ""),
            cold_start_words(developers(reader, window)["cold_start"]), *renamed(result)]))
        for kind in PERIODS:
            body += html_table("Per " + kind[:-1] + ", the newest first", PERIOD_COLUMNS,
                               result[kind][-400:][::-1])
    else:
        body += nothing(reader, window)
    return page(reader, "/activity", "Activity", filters, body, window,
                ("session", "developer", "calls", "saved"))


# ==================================================================================================
# The database file
# ==================================================================================================


class Refused(Exception):
    """The database cannot be read; the text says why and what to do."""


REASONS = (  # what SQLite says, what a person wants to know
    ("file is not a database", "it is not an SQLite database"),
    ("file is encrypted", "it is not an SQLite database"),
    ("malformed",
     "it is damaged: restore a copy, or save what can be read with sqlite3's .recover"),
    ("locked", "another program keeps it locked: try again when that is done"),
    ("unable to open",
     "SQLite cannot open it: its folder must be readable, and writable too while a server's last"
     " changes wait in the -wal file (run this as the server's user)"),
    ("readonly",
     "its -wal file holds changes that only a user who may write there can take in (run this as"
     " the server's user)"),
    ("disk i/o error", "the disk answers with errors"),
    ("no such table", "it does not hold the tables of a session-event store"),
    ("no such column", "its tables are not those of a session-event store"),
)


BUSY_SECONDS = 5.0  # how long another program's lock is waited for


def connected(path: str) -> sqlite3.Connection:
    """A read-only connection inside a transaction; sqlite3.Error if the file gives none."""
    uri = Path(path).absolute().as_uri() + "?mode=ro"
    try:
        return begun(uri)
    except sqlite3.OperationalError as error:
        # A WAL database whose server has ended, in a folder where this user may not write: there
        # is no -shm file, and none can be made. Where no -wal file holds changes, the database
        # file alone is complete.
        waiting = os.path.exists(path + "-wal") and os.path.getsize(path + "-wal") > 0
        if waiting or not re.search("unable to open|readonly", str(error)):
            raise
        return begun(uri + "&immutable=1")


def begun(uri: str) -> sqlite3.Connection:
    connection = sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None)
    try:
        # A row may hold any bytes. The cache stays at 2 MB: with 64, steps take twice as long.
        connection.text_factory = lenient_text
        for pragma in ("query_only = 1", "trusted_schema = 0"):
            connection.execute("PRAGMA " + pragma)
        connection.execute("BEGIN")
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()  # takes the snapshot
    except BaseException:
        connection.close()
        raise
    return connection


KEY = ("INTEGER", 1)  # type and place in the key of a column that SQLite numbers itself


def check_schema(connection: sqlite3.Connection, path: str) -> None:
    """Raises Refused where a table or column is missing, or the version is not known here."""
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    tables = {row[0] for row in connection.execute(
        "SELECT name FROM sqlite_master WHERE type = 'table'")}
    if "session_events" not in tables:
        raise Refused("%s holds no session events: it is another program's database, or no server"
                      " has opened it yet" % path)
    if version > SCHEMA_VERSION:
        raise Refused("%s has schema version %d and this program knows up to %d: use the"
                      " session_events.py that came with its server.py" % (
                          path, version, SCHEMA_VERSION))
    # An older file must have the columns of version 1, which TABLES lists: see `widened`.
    for table, columns in TABLES.items():
        there = {row[1]: (row[2].upper(), row[5])
                 for row in connection.execute("PRAGMA table_info(%s)" % table)}
        missing = [column for column in columns if column not in there]
        if there.get("id", KEY) != KEY:
            raise Refused("%s is not a session-event store: the column id of its table %s is no"
                          " INTEGER PRIMARY KEY" % (path, table))
        if missing:
            raise Refused(
                "%s is not a session-event store: its table %s lacks %s. If server.py never opened"
                " this file, start server.py on it once" % (path, table, ", ".join(missing)))


def widened(connection: sqlite3.Connection) -> sqlite3.Connection:
    """The same connection. A column that came after the file's version reads as NULL: a view of
    this connection stands before the table."""
    there = {row[1] for row in connection.execute("PRAGMA table_info(session_events)")}
    later = ["NULL AS " + name for name in COLUMNS if name not in there]
    if later:
        for statement in ("PRAGMA query_only = 0", "CREATE TEMP VIEW session_events AS SELECT *, %s"
                          " FROM main.session_events" % ", ".join(later), "PRAGMA query_only = 1"):
            connection.execute(statement)
    return connection


@contextlib.contextmanager
def reading(path: str) -> Iterator[Reader]:
    """One read transaction on the database file, as a Reader. Raises Refused, also in place of the
    sqlite3.Error of any query in the block."""
    try:
        os.stat(path)
    except OSError as error:
        raise Refused("cannot read %s: %s" % (path, error.strerror)) from None
    if not os.path.isfile(path):
        raise Refused("%s is not a file" % path)
    if not os.access(path, os.R_OK):
        raise Refused("%s may not be read by this user" % path)
    try:
        with contextlib.closing(connected(path)) as connection:
            check_schema(connection, path)
            yield Reader(widened(connection))
    except sqlite3.Error as error:
        said = str(error)
        reason = next((why for sign, why in REASONS if sign in said.lower()), said)
        raise Refused("cannot read %s: %s" % (path, reason)) from error


# ==================================================================================================
# Viewer: the pages and the reading endpoints over HTTP, for this machine only
# ==================================================================================================

LOCAL_NAMES = {"127.0.0.1", "localhost"}
PROTECTION = (
    ("Cache-Control", "no-store"),
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


def equal_secrets(given: str, secret: str) -> bool:
    """True if they are equal. The time that it takes tells nothing about the secret."""
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
    way = '<p><a href="/">To the replay</a></p>' if status == 404 else ""
    return Answer(status, HTML_TYPE, document(
        title, "<main><h1>%s</h1><p>%s</p>%s</main>" % (esc(title), esc(text), way)))


def page_answer(db: str, path: str, query: Query) -> Answer:
    """The page at an address, for a browser that has the cookie."""
    filters = filters_of(query)
    sort = query.get("sort", "")
    sort = sort if sort in DISCOVERY_SORTS else "developer_count"
    all_time = not {"days", "since", "until", "github"} & set(query)
    top, _, rest = urllib.parse.unquote(path[1:]).partition("/")
    pages: Dict[str, Callable[[Reader], str]] = {
        "/": lambda reader: replay_page(reader, filters),
        "/save": lambda reader: saved_replay(reader, filters, query),
        "/discoveries": lambda reader: discoveries_page(reader, filters, sort),
        "/developers": lambda reader: developers_page(reader, filters),
        "/activity": lambda reader: activity_page(reader, filters),
        "/sessions": lambda reader: sessions_page(reader, filters),
        "session": lambda reader: session_page(reader, rest),
        "discovery": lambda reader: discovery_page(reader, rest, filters, all_time),
        "developer": lambda reader: developer_page(reader, rest, filters),
    }
    show = pages.get(top if rest else path)
    if show is None:
        return message_page(404, "Not found", "There is no such page.")
    try:
        with reading(db) as reader:
            name = 'attachment; filename="session-replay.html"'
            headers = [("Content-Disposition", name)] if path == "/save" else []
            return Answer(200, HTML_TYPE, show(reader), headers)
    except NotFound as error:
        return message_page(404, "Not found", str(error)[:1].upper() + str(error)[1:] + ".")
    except Refused as error:
        return message_page(503, "The database cannot be read now", str(error))


def admin_answer(db: str, path: str, query: Query, authorization: str, secret: str) -> Answer:
    """The reading endpoints (README, Contract 7). `secret` "" means that no token is configured."""
    request_id = uuid.uuid4().hex

    def answer(status: int, headers: Sequence[Tuple[str, str]] = (), **body: Any) -> Answer:
        return Answer(status, JSON_TYPE, json.dumps(dict(body, requestId=request_id)), headers)

    scheme, _, given = authorization.partition(" ")
    if not secret:
        return answer(503, error="Endpoint disabled (admin trigger token not configured)")
    if not (equal_secrets(given.strip(), secret) and scheme.lower() == "bearer"):
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
        return {"sessions": list(map(plain_session, found)),
                "total_count_in_window": reader.count(window)}
    if path == "/admin/discoveries/propagation":
        sort = query.get("sort", "")
        limit = number_in(query, "limit", 50, 500)
        result = discoveries(reader, EVER, limit, sort if sort in SORTS else SORTS[0])
        return {"discoveries": [
            {name: d[name] for name in PROPAGATION} for d in result["discoveries"]]}
    match = re.fullmatch(r"/admin/sessions/([0-9a-f]{64})", path)
    if not match:
        return None
    try:
        result = session(reader, match.group(1))
    except NotFound:
        return None
    for s in (result["session"], *result["related"]):
        del s["developer"]
    return result


class Viewer(http.server.ThreadingHTTPServer):
    """The pages on one database file. `ticket` opens them once, in exchange for the cookie."""

    daemon_threads = True

    def __init__(self, db: str, port: int, admin_token: str) -> None:
        super().__init__(("127.0.0.1", port), ViewerHandler)
        self.db, self.admin_token = db, admin_token
        self.ticket: Optional[str] = secrets.token_urlsafe(24)
        self.cookie = secrets.token_urlsafe(24)
        # Cookies do not tell ports apart, so its name does.
        self.cookie_name = "session_events_%d" % self.server_address[1]
        self.lock = threading.Lock()
        self.way_in: Optional[Path] = None  # see `write_way_in`

    def redeem(self, given: str) -> bool:
        """True if `given` is the ticket, which can be used once."""
        with self.lock:
            good = self.ticket is not None and equal_secrets(given, self.ticket)
            if good:
                self.ticket = None
                if self.way_in:
                    with contextlib.suppress(FileNotFoundError):
                        self.way_in.unlink()
            return good

    def write_way_in(self, folder: str, address: str) -> str:
        """The address of a new file in `folder` that sends a browser on to `address`.

        A browser's command line can be seen by every user of the machine, and its address is the
        ticket. So the command line names this file (0600), which goes when the ticket is used."""
        self.way_in = Path(folder, "open.html")
        with open(os.open(self.way_in, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
            file.write(forwarding(address))
        return self.way_in.as_uri()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Prints one line, without anything of the request; nothing where a browser went away."""
        error = sys.exc_info()[1]
        if error and not isinstance(error, (ConnectionError, TimeoutError)):
            line = traceback.extract_tb(error.__traceback__)[-1].lineno
            print("session_events: a request failed: %s in line %s" % (type(error).__name__, line),
                  file=sys.stderr, flush=True)


class ViewerHandler(http.server.BaseHTTPRequestHandler):
    server: Viewer
    timeout = 30  # s that a silent connection is kept

    def version_string(self) -> str:
        return "session-events"

    def log_message(self, format: str, *args: Any) -> None:
        """Logs nothing, because the address of a page names sessions."""

    def do_GET(self) -> None:
        host = re.fullmatch(r"(.+?)(:\d+)?", self.headers.get("Host", ""))
        if not host or host.group(1).lower() not in LOCAL_NAMES:
            # DNS rebinding: another site's name was made to point to this machine.
            self.send(Answer(403, "text/plain",
                             "This server answers to 127.0.0.1 and localhost only.\n"))
            return
        try:
            answer = self.answer()
        except Exception:
            self.server.handle_error(self.request, self.client_address)
            answer = message_page(500, "This page failed", "The terminal shows a line about it.")
        self.send(answer)

    do_HEAD = do_GET

    def answer(self) -> Answer:
        address = urllib.parse.urlsplit(
            "http://local" + self.path if self.path.startswith("/") else "")
        query = query_of(address.query)
        if address.path == "/admin" or address.path.startswith("/admin/"):
            return admin_answer(self.server.db, address.path, query,
                                self.headers.get("Authorization", ""), self.server.admin_token)
        if "token" in query:
            return self.exchange(query)
        if not self.may_see():
            return message_page(
                403, "Closed", "Open the address that the terminal shows; it works once.")
        return page_answer(self.server.db, address.path, query)

    def exchange(self, query: Query) -> Answer:
        """The one-time token for a cookie, and a page that goes on to the address without it. After
        a redirect, a browser that came from a file sends no SameSite=Strict cookie."""
        rest = {name: value for name, value in query.items() if name != "token"}
        to = "/" + ("?" + urllib.parse.urlencode(rest, errors="replace") if rest else "")
        page = Answer(200, HTML_TYPE, forwarding(to))
        if self.command == "GET" and self.server.redeem(query["token"]):  # HEAD leaves it unused
            cookie = "%s=%s" % (self.server.cookie_name, self.server.cookie)
            return page._replace(headers=[
                ("Set-Cookie", cookie + "; Path=/; HttpOnly; SameSite=Strict")])
        if self.may_see():
            return page
        return message_page(403, "Closed", "This address was used already, or it is another"
                            " viewer's. Start the viewer again for a new one.")

    def may_see(self) -> bool:
        cookies = [part.strip().partition("=")
                   for part in self.headers.get("Cookie", "").split(";")]
        return any(name == self.server.cookie_name and equal_secrets(value, self.server.cookie)
                   for name, _, value in cookies)

    def send(self, answer: Answer) -> None:
        body = answer.body.encode("utf-8", "replace")
        self.send_response(answer.status)
        for name, value in (("Content-Type", answer.type), ("Content-Length", str(len(body))),
                            ("Content-Security-Policy", policy() + "; frame-ancestors 'none'"),
                            *PROTECTION, *answer.headers):
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(self, code: int, message: Optional[str] = None,
                   explain: Optional[str] = None) -> None:
        """What `http.server` itself refuses (a malformed or huge head, another method), repeating
        none of it."""
        self.command = self.command or ""
        self.request_version = "HTTP/1.0"  # a head that names none would get no head in answer
        self.send(Answer(405, "text/plain", "Only GET and HEAD.\n", [("Allow", "GET, HEAD")])
                  if code == 501 else
                  Answer(code, "text/plain", "The request is not understood.\n"))


def can_open_browser() -> bool:
    """True if there is a screen. Without one `webbrowser` starts a browser inside the terminal."""
    named = any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")))
    return named or sys.platform in ("win32", "darwin")


def serve(db: str, port: int, open_it: bool, path: str = "") -> int:
    """Runs the viewer until Ctrl-C or SIGTERM; the exit status. `path` ends the shown address."""
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
    own_port = viewer.server_address[1]
    address = "http://127.0.0.1:%d/?token=%s%s" % (own_port, viewer.ticket, path)
    with tempfile.TemporaryDirectory(prefix="session-events-") as folder, viewer:
        print("open %s" % address)
        print("It works once, in a browser on this machine; Ctrl-C ends. From another machine, run")
        print("  ssh -L {0}:127.0.0.1:{0} HOST".format(own_port))
        print("there, with this machine's name for HOST, and open the same address.", flush=True)
        if open_it:
            # In a thread: a browser in the foreground returns only when the person leaves it.
            threading.Thread(target=show_in_browser, daemon=True,
                             args=[viewer.write_way_in(folder, address)]).start()
        with contextlib.suppress(KeyboardInterrupt):
            viewer.serve_forever()
    return 0


def show_in_browser(address: str) -> None:
    if not webbrowser.open(address):
        print("session_events: no browser could be started; open the address above yourself",
              file=sys.stderr, flush=True)


# ==================================================================================================
# Demo: synthetic sessions, the same every time
# ==================================================================================================

# The tables alone. server.py adds indexes and triggers when it opens such a file.
DEMO_TABLES = """
    CREATE TABLE session_events (id INTEGER PRIMARY KEY AUTOINCREMENT, %s);
    CREATE TABLE session_discoveries (discovery_ref TEXT NOT NULL, event_id INTEGER NOT NULL,
      PRIMARY KEY (discovery_ref, event_id)) WITHOUT ROWID;
"""
DEMO_EDGES = """
    INSERT OR IGNORE INTO session_discoveries
      SELECT value, session_events.id FROM session_events, json_each(discovery_refs_json)
"""

DEMO_DAYS, DEMO_DEVELOPERS, DEMO_TEAM = 21, 12, 4
DEMO_REFS = """
    auth-jwt-flow rate-limit-buckets sqlite-wal-checkpoint flaky-login-test ci-cache-key
    retry-with-jitter pagination-cursor n-plus-one-orders timezone-dst-bug webhook-signature
    s3-multipart-upload grpc-deadlines idempotency-key blue-green-switch css-grid-overflow
    schema-codegen vector-index-recall utf8-truncation docker-layer-order terraform-state-lock
    oauth-refresh-race worker-memory-leak trace-context-loss lock-order-deadlock search-ranking-tie
    email-bounce-loop audit-log-shape mobile-deep-links feature-flag-ramp cold-start-imports
    backfill-in-batches queue-visibility-timeout""".split()  # noqa: SIM905


def demo_hash(*words: object) -> str:
    return hashlib.sha256(("demo " + " ".join(map(str, words))).encode()).hexdigest()


def demo_starts(chance: Callable[[], float]) -> List[Tuple[int, int]]:
    """(minute since the first midnight, developer) of each session's end, in time order. Each
    developer has hours, a pace, and days off."""
    moments = []
    for developer in range(DEMO_DEVELOPERS):
        morning, pace = 60 * (6 + 4 * (developer // DEMO_TEAM) + 2 * chance()), .8 + 2.4 * chance()
        for day in range(DEMO_DAYS):
            if chance() < (.55 if day % 7 in (5, 6) else .18):
                continue
            for _ in range(1 + int(pace * chance() + chance())):
                at = int(day * 1440 + morning + chance() * 540) % (DEMO_DAYS * 1440)
                moments.append((at, developer))
    return sorted(moments)


def demo_touch(known: Dict[str, List[Tuple[int, int]]], at: int, developer: int,
               chance: Callable[[], float], fresh: List[str]) -> Tuple[List[str], int]:
    """The discoveries of one session, and how many of them others had touched before. A recent one
    is likelier; one that the same team touched is likelier still. `known` {ref: [(minute,
    developer) ...]} is added to; `fresh` are names not yet in use."""
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
    """The rows of session_events without `id`, oldest first, all before `end` (ms). Only `random()`
    is used, because it gives the same numbers in every Python."""
    chance = random.Random("session events").random
    known: Dict[str, List[Tuple[int, int]]] = {}
    fresh = list(DEMO_REFS)
    for n, (at, developer) in enumerate(demo_starts(chance)):
        refs, found = demo_touch(known, at, developer, chance, fresh)
        tools = int(math.exp(1.6 + 2.9 * chance()) + 6 * len(refs))
        tokens = int(tools * 40 * chance() + found * (1500 + 6000 * chance()))
        ended = end - DEMO_DAYS * DAY_MS + at * 60_000 + int(chance() * 59_000)
        yield (demo_hash("identity", developer),
               demo_hash("login", developer) if developer % 3 else None,
               demo_hash("session", n), moment_text(ended), tools, tokens,
               demo_hash("branch", n // 3)[:12],
               json.dumps(refs, separators=(",", ":")), "1.%d.0" % (28 + at // 10_080),
               moment_text(ended + 700)[:19] + "Z")


def write_demo(path: str) -> int:
    """Makes a database of synthetic sessions, up to the last midnight; returns how many. Raises
    Refused if the file exists or cannot be made."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        raise Refused(
            "%s is there already; the synthetic sessions want a new file" % path) from None
    except OSError as error:
        raise Refused("cannot make %s: %s" % (path, error.strerror)) from error
    rows = list(demo_rows(now_ms() // DAY_MS * DAY_MS))
    names = ", ".join(TABLES["session_events"][1:])
    try:
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.executescript("BEGIN;" + DEMO_TABLES % names)
            connection.executemany(
                "INSERT INTO session_events (%s) VALUES (?,?,?,?,?,?,?,?,?,?)" % names, rows)
            connection.execute(DEMO_EDGES)
            connection.execute("COMMIT")
    except sqlite3.Error as error:
        raise Refused("cannot write %s: %s" % (path, error)) from error
    return len(rows)


def demo(options: argparse.Namespace) -> int:
    """Synthetic sessions in a file that is asked for, or in one that lives as long as its page."""
    if options.db:
        print("%d synthetic sessions written to %s" % (write_demo(options.db), visible(options.db)))
        return 0
    with tempfile.TemporaryDirectory(prefix="session-events-") as folder:
        db = os.path.join(folder, "demo.db")
        print("%d synthetic sessions of %d developers who do not exist" % (
            write_demo(db), DEMO_DEVELOPERS), flush=True)
        return serve(db, options.port, can_open_browser(), "&days=14")


# ==================================================================================================
# Ship: the rows into ClickHouse, over its HTTP interface (18.16 and newer)
# ==================================================================================================

SHIP_ROWS, SHIP_BYTES = 20_000, 16 << 20  # most of one batch; a row can have 26 KB of discoveries
SHIP_LATE, SHIP_EARLY = 366, 1  # days by which `ended` may lie before and after the arrival
SHIP_LEAST = -1 << 63  # the mark of a destination that holds nothing: below every id
SHIP_UNSYNCED = 600_000  # ms: ClickHouse answers before it syncs; what is older is on its disk
SHIP_SILENCE, SHIP_CHECK_SILENCE = 30.0, 300.0  # seconds without a byte, then the peer is given up
FOLLOW_SECONDS, BACK_OFF_SECONDS, SHIP_STATUS_SECONDS = 5.0, 300.0, 60.0


class Unfit(Refused):
    """A row cannot be shipped. Those after it wait until somebody has corrected or deleted it.
    Everything else that is Refused may pass by itself."""


class RowsRefused(Refused):
    """ClickHouse finds fault with the rows of an INSERT."""


# -- Rows: each is checked, and becomes a line of text --

SHIP_SQL = "SELECT %s, e.received_at FROM session_events e WHERE e.id " % SELECTED
ShipRow = Tuple[int, str]  # a row on its way: its id; received_at and the fields, with tabs between


@functools.lru_cache(4096)
def arrival(received: object) -> bool:
    """Whether it is a moment that ClickHouse's DateTime has: 1970 to 2105. The last of these years
    is for the nodes' own rows (see OWN_LINE)."""
    return stored_instant(received) is not None and "1970" <= str(received) < "2105"


def fit_row(row: Sequence[Any]) -> Sequence[Any]:
    """A row of SHIP_SQL as server.py would have written it. Raises Unfit if it is no session; the
    text names the column, never a value."""
    wrong = [name for name, fits, cell in zip(COLUMNS[1:], CHECKS, row[1:]) if not fits(cell)]
    if not arrival(row[-1]):
        wrong.append("received_at")
    if wrong:
        raise Unfit("row id %s is no event: its %s breaks its rule (README, Contract 1). Nothing "
                    "from it on is shipped: correct the row, or delete it, and run this again"
                    % (row[ID], wrong[0]))
    return plain_row(row)


def ship_rows(reader: Reader, condition: str, value: int, most: int) -> Iterator[ShipRow]:
    """At most `most` rows whose id meets the condition. Raises Unfit at one that is no session."""
    for rows in reader.fetched(SHIP_SQL + condition + " LIMIT ?", [value, most]):
        *columns, received = zip(*rows)
        usual = sound(columns) and all(map(arrival, received))
        for row in rows if usual else map(fit_row, rows):
            yield row[ID], "\t".join(["" if cell is None else str(cell)
                                      for cell in (row[-1], *row[1:-1])])


def ship_batch(reader: Reader, condition: str, value: int, most: int) -> List[ShipRow]:
    """At most `most` rows whose id meets the condition, no more than about SHIP_BYTES, of one year
    of arrival. (So `ended` has 26 months; ClickHouse takes 100 partitions in one INSERT.) The list
    ends before a row that is no session. Raises Unfit if that is the first one."""
    rows: List[ShipRow] = []
    size = 0
    try:
        for row in ship_rows(reader, condition, value, most):
            if rows and (size > SHIP_BYTES or row[1][:4] != rows[0][1][:4]):
                break
            rows.append(row)
            size += len(row[1])
    except Unfit:
        if not rows:
            raise
    return rows


# -- ClickHouse's table, views, statements --

SHIP_RAW, SHIP_LOCAL = "session_events_raw", "session_events_local"  # LOCAL: on each shard
SHIP_KEY = "identity_hash, session_id_hash"
# The rows of a statement travel beside it, as its table `mine` (ClickHouse's "external data").
MINE = "id Int64, received_at String, " + ", ".join(
    "%s %s" % (column, {"number": "UInt32", "array": "Array(String)"}.get(kind, "String"))
    for column, (_, kind, *_) in zip(COLUMNS[1:], FIELDS))
SHIP_MOMENT = "toDateTime(replaceOne(substring(%s, 1, 19), 'T', ' '), 'UTC')"
SHIP_HASH = "toFixedString(unhex(%s), 32)"
# Of the rows of one session, the one with the largest seniority stays, whatever was sent first. It
# is the one that was received first. Of two in the same second, it is the one of the node whose
# name comes first (8 digits are compared).
SENIORITY = "bitNot(bitOr(bitShiftLeft(toUInt64(toUInt32(%s)), 32), toUInt64({tie})))"
# `ended` is for charts and months: ended_at, or the nearer of two ends, some days before and after
# the arrival. So invented dates make no partitions.
ARRIVAL_DAY = "toInt32(toDate(substring(toString(received_at), 1, 10)))"
ENDED_NEAR = SHIP_MOMENT % "if({0} < {1}, {1}, if({0} > {2}, {2}, {0}))".format(
    "toString(ended_at)",
    "concat(toString(toDate(greatest(%s - %d, 1))), 'T00:00:00')" % (ARRIVAL_DAY, SHIP_LATE),
    "concat(toString(toDate(%s + %d)), 'T23:59:59')" % (ARRIVAL_DAY, SHIP_EARLY))
# Name, type, how it is made of `mine`, how the view shows it. `ended_at` is text, since no type of
# 18.16 has all years.
RAW_COLUMNS = (
    ("identity_hash", "FixedString(32)", SHIP_HASH % "identity_hash", "lower(hex(%s))"),
    ("github_hash", "Nullable(FixedString(32))", SHIP_HASH % "nullIf(github_hash, '')",
     "lower(hex(%s))"),
    ("session_id_hash", "FixedString(32)", SHIP_HASH % "session_id_hash", "lower(hex(%s))"),
    ("ended_at", "FixedString(24)", "toFixedString(ended_at, 24)", "toString(%s)"),
    ("ended", "DateTime('UTC')", ENDED_NEAR, "%s"),
    ("tool_count", "UInt32", "tool_count", "%s"),
    ("tokens_saved", "UInt32", "tokens_saved", "%s"),
    ("branch_sha", "Nullable(String)", "nullIf(lower(branch_sha), '')", "%s"),
    ("discovery_refs", "Array(String)", "discovery_refs_json", "arrayDistinct(%s)"),
    ("plugin_version", "String", "plugin_version", "%s"),
    ("received_at", "DateTime('UTC')", SHIP_MOMENT % "received_at", "%s"),
    ("node", "String", "'{node}'", "%s"),
    ("id", "Int64", "id", "%s"),
    ("seniority", "UInt64", SENIORITY % SHIP_MOMENT % "received_at", ""))
RAW_NAMES = ", ".join(name for name, *_ in RAW_COLUMNS)
INSERT = "INSERT INTO %s (%s) SELECT %s FROM mine" % (
    SHIP_RAW, RAW_NAMES, ", ".join(made for _, _, made, _ in RAW_COLUMNS))
MISSING = """SELECT id, {month} FROM mine WHERE ({mine}) GLOBAL NOT IN (
  SELECT {key} FROM {raw} WHERE ({key}) GLOBAL IN (SELECT {mine} FROM mine){{months}})""".format(
      month="toYYYYMM(%s)" % ENDED_NEAR, raw=SHIP_RAW, key=SHIP_KEY,
      mine=", ".join(SHIP_HASH % name for name in SHIP_KEY.split(", ")))
SAME_MONTHS = " AND toYYYYMM(ended) GLOBAL IN (SELECT toYYYYMM(%s) FROM mine)" % ENDED_NEAR
FIRST = "SELECT 1 FROM " + SHIP_RAW + " WHERE toYYYYMM(ended) = %s LIMIT 1"
# Each node has a row of its own in the table, at a moment that no session has. While it is there,
# the table is the one that the node filled, and what is missing was dropped on purpose. Where it is
# not, the table was emptied or made anew. Its `plugin_version` is a fingerprint of the pepper.
OWN_LINE = "2105-12-31T00:00:00Z\t\t\t{0}\t2105-12-31T00:00:00.000Z\t0\t0\t\t[]\t{1}"
OWN_MOMENT = "toDateTime('2105-12-31 00:00:00', 'UTC')"
LOOK = """SELECT uptime(), groupArray(concat(node, ':', plugin_version))
  FROM %s FINAL WHERE ended = %s""" % (SHIP_RAW, OWN_MOMENT)
# ClickHouse merges the rows of one key if they are on one shard and in one partition. FINAL answers
# as if all were merged. In the view it works before any WHERE, so that no condition can bring back
# a row that another one has replaced.
BY_MONTH = "PARTITION BY toYYYYMM(ended)"
SHIP_ENGINE = "ReplacingMergeTree({}seniority) %s ORDER BY (%s)" % (BY_MONTH, SHIP_KEY)
SHIP_ON = " ON CLUSTER '%s'"
# {0} is the database. Where a name has none, 18.16 takes the other host's default database.
SHIP_VIEWS = {"session_events": """
SELECT %s
FROM (SELECT * FROM {0}.session_events_raw FINAL) AS r
WHERE r.ended != %s""" % (
    ",\n  ".join("%s AS %s" % (shown % ("r." + name), name)
                 for name, _, _, shown in RAW_COLUMNS if shown), OWN_MOMENT),
              "discovery_propagation": """
SELECT discovery_id, min(ended_at) AS first_seen_at, max(ended_at) AS last_seen_at,
  count() AS session_count, uniqExact(identity_hash) AS distinct_identity_count,
  now() AS last_aggregated_at
FROM {0}.session_events ARRAY JOIN discovery_refs AS discovery_id GROUP BY discovery_id"""}


def ship_ddl(cluster: Optional[str], database: str) -> List[str]:
    """The statements that make the table and the views; with `cluster` (a name in ClickHouse's
    remote_servers) a replicated table on each shard, and one that spreads over them."""
    on, engines = SHIP_ON % cluster if cluster else "", {SHIP_RAW: SHIP_ENGINE.format("")}
    if cluster:
        engines = {
            SHIP_LOCAL: "Replicated" + SHIP_ENGINE.format(
                "'/clickhouse/tables/{shard}/%s/%s_by_month', '{replica}', " % (
                    database, SHIP_LOCAL)),
            SHIP_RAW: "Distributed('%s', '%s', %s, cityHash64(%s))" % (
                cluster, database, SHIP_LOCAL, SHIP_KEY)}
    columns = ", ".join("%s %s" % column[:2] for column in RAW_COLUMNS)
    return ["CREATE TABLE IF NOT EXISTS %s.%s%s (%s) ENGINE = %s" % (
        database, table, on, columns, engine) for table, engine in engines.items()
    ] + ["CREATE VIEW IF NOT EXISTS %s.%s%s AS%s" % (
        database, name, on, select.format(database)) for name, select in SHIP_VIEWS.items()]


def ship_migration(cluster: Optional[str], database: str) -> str:
    """The statements that take over the rows of a table without months. In a cluster they are for
    each shard."""
    table, on = (SHIP_LOCAL, SHIP_ON % cluster) if cluster else (SHIP_RAW, "")
    return """RENAME TABLE {0}.{1} TO {0}.{1}_old{2};
{3};
INSERT INTO {0}.{1} ({4}) SELECT {5} FROM {0}.{1}_old;
DROP TABLE {0}.{1}_old{2};
DROP TABLE IF EXISTS {0}.session_events{2};
""".format(database, table, on, ship_ddl(cluster, database)[0], RAW_NAMES,
           RAW_NAMES.replace(" ended,", " %s," % ENDED_NEAR))


# -- ClickHouse over HTTP --

TO = "http://host:8123/?database=analytics"
SETTINGS_SENT = {
    "insert_distributed_sync": "1",  # an answer means stored, on whichever shard
    "insert_deduplicate": "0",  # else a replica drops a block it remembers, though its rows be lost
    "wait_end_of_query": "1"}  # an answer's status is about all of it
# As a file of a form. No row has a carriage return, so that none can end the form.
SHIP_FORM = ('--rows\r\nContent-Disposition: form-data; name="mine"; filename="mine"\r\n\r\n'
             '%s\r\n--rows--\r\n')
# ClickHouse's error numbers (ErrorCodes.cpp) that speak of the data of an INSERT: a text, number,
# date or array, a type, a constraint. Any other says nothing about a row.
DATA_ERRORS = {6, 25, 26, 27, 38, 41, 53, 69, 70, 72, 117, 128, 130, 131, 153, 190, 321, 349, 376,
               395, 407, 441, 467, 469}
# Those whose words quote no row: the disk, the memory, a table that is read-only, too many parts.
HOUSE_ERRORS = {75, 241, 242, 243, 252}


class ClickHouse:
    """One ClickHouse over HTTP. Each request has a connection of its own: there are few requests,
    and an old connection can be dead. `destination` is the name of its mark, without user and
    password, which come from the environment alone: a URL is seen in process lists."""

    def __init__(self, url: str, environment: Mapping[str, str]) -> None:
        """Raises Usage for what --to cannot be."""
        try:
            parts = urllib.parse.urlsplit(url)
            self.parameters = {"database": "default", **dict(
                urllib.parse.parse_qsl(parts.query, keep_blank_values=True))}
            self.tls, self.path = parts.scheme == "https", parts.path or "/"
            self.place = (parts.hostname or "", parts.port or (8443 if self.tls else 8123))
        except ValueError:
            self.place = ("", 0)
        if not (self.place[0] and re.fullmatch("https?://[!-~]+", url) and not set("@#") & set(url)
                and not {"user", "password", "query"} & set(self.parameters)
                and re.fullmatch("[A-Za-z_][A-Za-z0-9_]{0,63}", self.parameters["database"])):
            raise Usage("--to takes an http or https URL such as %s, a database of letters, digits "
                        "and _; user and password come from CLICKHOUSE_USER and "
                        "CLICKHOUSE_PASSWORD" % TO)
        self.database = self.parameters["database"]
        self.name = "ClickHouse at %s:%d" % self.place
        self.destination = "%s://%s:%d%s/%s.%s" % (
            parts.scheme, *self.place, self.path.rstrip("/"), self.database, SHIP_RAW)
        user, password = map(environment.get, ("CLICKHOUSE_USER", "CLICKHOUSE_PASSWORD"))
        login = "%s:%s" % (user or "default", password or "")
        self.headers = {"Authorization": "Basic " + base64.b64encode(
            login.encode("utf-8", "surrogateescape")).decode()}
        self.silence = SHIP_SILENCE  # seconds without a byte until the peer is given up

    def ask(self, sql: str, rows: Sequence[ShipRow] = ()) -> str:
        """The answer to a statement; `rows` are its table `mine`. Raises RowsRefused, Refused."""
        parameters = {**SETTINGS_SENT, **self.parameters, "query_id": str(uuid.uuid4())}
        headers, body = self.headers, sql
        if rows:  # beside the statement: what is in it stands in ClickHouse's query log
            parameters.update(query=sql, mine_structure=MINE)
            headers = {**headers, "Content-Type": "multipart/form-data; boundary=rows"}
            lines = "".join(["%d\t%s\n" % row for row in rows])
            body = SHIP_FORM % lines.replace('"', "'")  # as ClickHouse quotes the texts of an array
        status, said = self.posted(urllib.parse.urlencode(parameters), body.encode(), headers)
        if status == 200:
            return said
        error = re.match(r"\s*Code: ([0-9]{1,6})[.,]\s*(.{,300})", said)
        if error is None:
            raise Refused("%s answers with status %d, and not as ClickHouse does" % (
                self.name, status))
        number, words = int(error[1]), error[2]
        if rows and number not in HOUSE_ERRORS:  # they could quote a row
            words = "its log has the words under query_id " + parameters["query_id"]
        raise (RowsRefused if number in DATA_ERRORS else Refused)(
            "%s refuses that with its error %d (%s)" % (self.name, number, words))

    def posted(self, query: str, body: bytes, headers: Mapping[str, str]) -> Tuple[int, str]:
        """(status, text) of the answer to a POST. Raises Refused. No redirect, no proxy."""
        protocol = http.client.HTTPSConnection if self.tls else http.client.HTTPConnection
        try:
            with contextlib.closing(protocol(*self.place, timeout=self.silence)) as connection:
                connection.connect()
                with contextlib.suppress(ConnectionError):
                    # It may have refused before it read everything, and then says why.
                    connection.request("POST", self.path + "?" + query, body, dict(headers))
                answer = connection.getresponse()
                return answer.status, answer.read().decode("utf-8", "replace")
        except (OSError, http.client.HTTPException) as error:
            raise Refused("cannot reach %s: %s" % (
                self.name, str(error) or type(error).__name__)) from None

    def prepare(self, cluster: Optional[str]) -> None:
        """Makes the table and the views that are missing. Raises Refused where there is a table of
        an older layout."""
        made = dict(re.findall("(.+)\t(.*)", self.ask(
            "SELECT name, create_table_query FROM system.tables"
            " WHERE database = currentDatabase()")))
        if any("MergeTree" in made.get(table, "") and BY_MONTH not in made[table]
               for table in (SHIP_RAW, SHIP_LOCAL)):
            raise Refused("%s has a table of an older layout. These statements keep its rows "
                          "(stop every ship first):\n%s" % (
                              self.name, ship_migration(cluster, self.database)))
        if not {SHIP_RAW, *SHIP_VIEWS} <= set(made):
            for statement in ship_ddl(cluster, self.database):
                self.ask(statement)

    def look(self) -> Tuple[int, Dict[str, str]]:
        """Seconds since it was started, and {node: its pepper} of the nodes' own rows. Only a
        ClickHouse answers this. Another server may answer an INSERT with 200 and keep nothing."""
        found = re.fullmatch("([0-9]{1,9})\t(.*)\n", self.ask(LOOK))
        if not found:
            raise Refused(self.name + " answers what was not asked; is it one?")
        return int(found[1]), dict(re.findall("([0-9a-f]{16}):([0-9a-f]*)", found[2]))

    def insert(self, node: str, rows: Sequence[ShipRow]) -> None:
        """One INSERT. Raises RowsRefused, Refused."""
        self.ask(INSERT.format(node=node, tie=int(node[:8], 16)), rows)

    def missing(self, rows: Sequence[ShipRow]) -> Dict[int, str]:
        """{id: month of `ended`, such as 202605} of the rows whose session is not in the table, and
        therefore not in the view. The months of these rows are searched first. A session that is
        not there may be in another month, if another node received it too. Raises Refused."""
        said = (self.ask(MISSING.format(months=SAME_MONTHS), rows)
                and self.ask(MISSING.format(months=""), rows))
        if not re.fullmatch("(?:-?[0-9]{1,19}\t[0-9]{6}\n)*", said):
            raise Refused(self.name + " answers what was not asked; is it one?")
        return {int(row_id): month for row_id, month in map(str.split, said.splitlines())}


# -- The mark, in the file; one step --

class Mark(NamedTuple):
    """A row of ship_marks: how far one destination has got. Time is cut into turns of
    SHIP_UNSYNCED; the turn of confirmed_at is the last one."""

    destination: str
    node: str  # the file's name at this destination, until the table is emptied; "" where none yet
    last_id: int  # the last row that was confirmed
    confirmed_at: int  # when it was sent: milliseconds since 1970
    synced_id: int  # what stands up to it was confirmed before the last turn but one began
    next_id: int  # the same of the last turn: the synced_id to be


SHIP_MARKS = """ship_marks (destination TEXT PRIMARY KEY,
  node TEXT NOT NULL CHECK (length(node) = 16 AND node NOT GLOB '*[^0-9a-f]*'),
  %s) WITHOUT ROWID""" % ",\n  ".join(
      "{0} INTEGER NOT NULL CHECK (typeof({0}) = 'integer')".format(name)
      for name in Mark._fields[2:])
SHIP_MARK = "SELECT %s FROM ship_marks WHERE destination = ?" % ", ".join(Mark._fields)


def moved_on(mark: Mark, to: int, sent: int) -> Mark:
    """The mark when the rows up to `to` are confirmed. `sent`: milliseconds since 1970."""
    turns = sent // SHIP_UNSYNCED - mark.confirmed_at // SHIP_UNSYNCED
    synced_id, next_id = (
        (mark.synced_id, mark.next_id) if turns == 0 else
        (mark.next_id, mark.last_id) if turns == 1 else
        (mark.last_id, mark.last_id) if turns > 1 else
        (mark.synced_id, mark.synced_id))  # the clock was put back
    return mark._replace(last_id=to, confirmed_at=sent, synced_id=synced_id, next_id=next_id)


def moved_back(mark: Mark, to: int) -> Mark:
    """The mark when the rows above `to` (at most its synced_id) shall go once more."""
    return mark._replace(last_id=to, confirmed_at=now_ms(), synced_id=to, next_id=to)


def doubted(mark: Mark, uptime: int, nodes: Mapping[str, str]) -> Tuple[Mark, str]:
    """The mark as it should be where ClickHouse says this (see `ClickHouse.look`), and why it is
    another one; "" where it is the same."""
    if mark.node not in nodes and (mark.last_id > SHIP_LEAST or not mark.node):
        return moved_back(mark, SHIP_LEAST)._replace(node=secrets.token_hex(8)), (
            "ClickHouse's table was emptied or made anew")
    # The start seems up to a second early: if it seemed late, rows would go again for a second.
    if not -2000 <= now_ms() - mark.confirmed_at <= (uptime + 1) * 1000:
        return moved_back(mark, mark.synced_id), (
            "ClickHouse was started after the last rows were confirmed, or the mark lies in the"
            " future")
    return mark, ""


def first_row(reader: Reader, table: str, sql: str, values: Sequence[Any] = ()) -> Sequence[Any]:
    """The first row of a query on this table; empty without one, or without the table."""
    there = reader.rows("SELECT 1 FROM sqlite_master WHERE name = ?", [table]).fetchone()
    return (there and reader.rows(sql, values).fetchone()) or ()


def pepper_in(reader: Reader) -> str:
    """The fingerprint of the file's pepper, which server.py notes there; "" without one."""
    noted, = first_row(reader, "session_events_pepper", "SELECT fingerprint FROM "
                       "session_events_pepper ORDER BY rowid DESC") or ("",)
    return re.sub("[^0-9a-f]", "", str(noted))


def begin_in_turn(connection: sqlite3.Connection) -> None:
    """Begins a write transaction when the lock is free. Raises sqlite3.Error if that takes more
    than BUSY_SECONDS. SQLite gives the lock out in no order, and its own timeout looks every
    100 ms. A server on a slow disk leaves it free for about a millisecond between two commits."""
    end = time.monotonic() + BUSY_SECONDS
    while not connection.in_transaction:
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            if "is locked" not in str(error) or time.monotonic() > end:
                raise
            time.sleep(0.001)


def ship_log(event: str, **details: Any) -> None:
    """One line of JSON on standard error. A log that takes nothing (a full disk) stops no ship."""
    line = json.dumps({"time": moment_text(now_ms()), "event": event, **details})
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


class Shipment:
    """One database file and one destination. What was confirmed stands in the file. Each step opens
    the file anew, so that a restored file, a copy, or two ships at once are no special cases."""

    def __init__(self, path: str, house: ClickHouse) -> None:
        self.path, self.house = path, house
        self.rows_shipped = 0
        self.trouble: Optional[str] = None  # what --follow waits for; None before it has begun
        self.warned = False  # that the nodes have different peppers

    def mark(self, reader: Reader) -> Mark:
        return Mark(*first_row(reader, "ship_marks", SHIP_MARK, [self.house.destination]) or (
            self.house.destination, "", SHIP_LEAST, 0, SHIP_LEAST, SHIP_LEAST))

    def write(self, before: Mark, after: Mark, row: Optional[ShipRow] = None) -> bool:
        """Replaces a mark, in a short transaction beside a running server. It does so only if the
        file still has the mark `before`, and the row that was confirmed: the file may have been
        replaced, and a second ship may have been faster. Raises Refused."""
        with reading(self.path) as holder:
            # The last user of a database syncs, and then deletes its -wal by name. If the database
            # was replaced meanwhile, that is the -wal of the new one, with what a server stored. A
            # reader deletes nothing. It is open until the writer has closed.
            holder.rows("COMMIT")
            try:
                with contextlib.closing(sqlite3.connect(
                        Path(self.path).absolute().as_uri() + "?mode=rw", uri=True, timeout=0,
                        isolation_level=None)) as file:
                    file.execute("PRAGMA synchronous = NORMAL")  # a lost mark: rows go again
                    file.execute("PRAGMA wal_autocheckpoint = 0")  # that is the server's
                    begin_in_turn(file)
                    file.execute("CREATE TABLE IF NOT EXISTS " + SHIP_MARKS)
                    found = file.execute(SHIP_MARK, [after.destination]).fetchone()
                    there = not row or file.execute(
                        "SELECT 1 FROM session_events WHERE id = ? AND session_id_hash = ?",
                        [row[0], row[1].split("\t")[SESSION_ID]]).fetchone()
                    same = there and found == (before if before.node else None)
                    if same:
                        file.execute("REPLACE INTO ship_marks VALUES (?, ?, ?, ?, ?, ?)", after)
                    file.execute("COMMIT")
                    return bool(same)
            except sqlite3.Error as error:
                raise Refused("cannot write the mark of what was shipped into %s (%s). It takes "
                              "the server's user, who may write the file and its folder"
                              % (self.path, error)) from error

    def step(self) -> bool:
        """Sends one batch, or mends the mark. True if that leaves something to do. Raises Unfit for
        a row that cannot go, Refused."""
        with reading(self.path) as reader:
            mark, pepper = self.mark(reader), pepper_in(reader)
        uptime, nodes = self.house.look()
        right, why = doubted(mark, uptime, nodes)
        if why:
            self.write(mark, right)
            if mark.last_id > SHIP_LEAST:
                ship_log("again", why="rows go once more: " + why)
            return True
        if nodes.get(mark.node) != pepper:
            self.house.insert(mark.node, [(0, OWN_LINE.format(mark.node, pepper))])
            nodes[mark.node] = pepper
        if len(set(nodes.values())) > 1 and not self.warned:
            self.warned = True
            ship_log("warning", why="the nodes of this ClickHouse have different peppers "
                     "(server.py --pepper-file): a developer is somebody else on each of them")
        with reading(self.path) as reader:
            rows = ship_batch(reader, "> ? ORDER BY id", mark.last_id, SHIP_ROWS)
            newest, = reader.rows("SELECT max(id) FROM session_events").fetchone()
        return bool(rows) and self.send(mark, rows) < newest

    def send(self, mark: Mark, rows: Sequence[ShipRow]) -> int:
        """Inserts these rows and moves the mark; the id where it is now. If they are refused, the
        first half of them is sent, until the row at fault is alone. Before it is blamed, the row
        before it goes once more: if that is refused too, it is ClickHouse. Raises Unfit,
        Refused."""
        sent = now_ms()
        try:
            self.house.insert(mark.node, rows)
        except RowsRefused as refused:
            if len(rows) > 1:
                return self.send(mark, rows[:len(rows) // 2])
            with reading(self.path) as reader:
                before = ship_batch(reader, "<= ? ORDER BY id DESC", mark.last_id, 1)
            if before:
                self.house.insert(mark.node, before)
            raise Unfit("row id %d cannot be shipped, and nothing after it is: %s" % (
                rows[0][0], refused)) from None
        self.rows_shipped += len(rows)
        moved = moved_on(mark, rows[-1][0], sent)
        return (moved if self.write(mark, moved, rows[-1]) else mark).last_id

    def status(self) -> Dict[str, int]:
        """How far it is. Raises Refused."""
        with reading(self.path) as reader:
            last = self.mark(reader).last_id
            waiting, oldest = reader.rows("SELECT count(*), min(received_at) FROM session_events "
                                          "WHERE id > ?", [last]).fetchone()
        now = now_ms()
        return {"last_id": max(last, 0), "rows_waiting": waiting,
                "oldest_waiting_seconds": max(0, now - (stored_instant(oldest) or now)) // 1000,
                "waiting": int(bool(self.trouble))}


# -- The commands: once, --follow, --check --

def serve_metrics(address: str, shipment: Shipment) -> None:
    """Answers GET /metrics at this HOST:PORT, in a thread, in Prometheus' text format. Raises
    Usage."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")

    class Server(http.server.ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

        def handle_error(self, *_: Any) -> None:
            """Nothing: the client has gone, and its address stands in no log."""

    class Handler(ViewerHandler):
        def answer(self) -> Answer:
            if self.path != "/metrics":
                return Answer(404, "text/plain", "Not found\n")
            try:
                status = shipment.status()
            except Refused as error:
                return Answer(503, "text/plain; charset=utf-8", visible(str(error)) + "\n")
            return Answer(200, "text/plain; version=0.0.4; charset=utf-8", "".join(
                "# TYPE session_events_ship_{0} gauge\nsession_events_ship_{0} {1}\n".format(*one)
                for one in status.items()))

        def do_GET(self) -> None:
            self.send(self.answer())

        do_HEAD = do_GET

    try:
        if not host:  # it would mean every interface
            raise ValueError("no host")
        server = Server((host, int(port)), Handler)
    except (OSError, OverflowError, ValueError) as error:
        raise Usage("--metrics takes an address to listen on, such as 127.0.0.1:9101: %s"
                    % error) from None
    threading.Thread(target=server.serve_forever, daemon=True).start()


def follow(shipment: Shipment, cluster: Optional[str]) -> None:
    """Ships for ever. Raises Unfit. All else that cannot be done is tried again, after a pause that
    doubles up to BACK_OFF_SECONDS. Chance takes off up to half of it, so that nodes do not come
    back together."""
    pause, noted = FOLLOW_SECONDS, time.monotonic()
    while True:
        before = shipment.trouble
        try:
            if before != "":
                shipment.house.prepare(cluster)
            wait = 0.0 if shipment.step() else FOLLOW_SECONDS
            pause, shipment.trouble = FOLLOW_SECONDS, ""
            if before != "":
                ship_log("recovered" if before else "shipping", to=shipment.house.destination,
                         **shipment.status())
        except Unfit:
            raise
        except Refused as error:
            pause, shipment.trouble = min(2 * pause, BACK_OFF_SECONDS), str(error)
            wait = pause * random.uniform(0.5, 1)
            if not before:
                ship_log("waiting", why=str(error), again_in_seconds=round(wait, 1))
        if time.monotonic() - noted >= SHIP_STATUS_SECONDS:
            noted = time.monotonic()
            why = {"why": shipment.trouble} if shipment.trouble else {}
            with contextlib.suppress(Refused):  # the reason is in the line before
                ship_log("status", **why, **shipment.status())
        time.sleep(wait)


def ship_check(shipment: Shipment) -> int:
    """Prints which sessions of the file are not in the view; 1 if some are missing, or wait since
    yesterday. They are counted by the day of arrival. What was confirmed and lies in a month that
    was dropped is no fault. Raises Unfit, Refused."""
    house = shipment.house
    house.silence = SHIP_CHECK_SILENCE
    _, nodes = house.look()
    dropped = functools.lru_cache(None)(lambda month: not house.ask(FIRST % month))
    counts: Dict[str, Counter[str]] = {what: collections.Counter() for what in (
        "in the view", "missing", "waiting to be shipped", "in dropped months")}  # by day or month
    last = SHIP_LEAST
    while True:
        with reading(shipment.path) as reader:
            mark = shipment.mark(reader)
            rows = ship_batch(reader, "> ? ORDER BY id", last, SHIP_ROWS)
        if not rows:
            break
        last, lines, missing = rows[-1][0], dict(rows), house.missing(rows)
        counts["in the view"][""] += len(rows) - len(missing)
        for row_id, month in missing.items():
            if row_id > mark.last_id:
                counts["waiting to be shipped"][lines[row_id][:10]] += 1
            elif mark.node in nodes and dropped(month):
                counts["in dropped months"]["%s-%s" % (month[:4], month[4:])] += 1
            else:
                counts["missing"][lines[row_id][:10]] += 1
    for when, n, what in sorted((when, n, what) for what, found in counts.items()
                                for when, n in found.items() if when):
        print("{}  {:,} {}".format(when, n, what))
    sums = {what: sum(found.values()) for what, found in counts.items()}
    print("{:,} sessions in the file: {}{}".format(
        sum(sums.values()), ", ".join("{:,} {}".format(n, what) for what, n in sums.items()),
        "; ship --again sends all once more" if sums["missing"] else ""))
    today = moment_text(now_ms())[:10]
    return int(sums["missing"] > 0 or any(day < today for day in counts["waiting to be shipped"]))


def ship(options: argparse.Namespace) -> int:
    """The command; returns its exit status. Raises Usage, Refused."""
    house = ClickHouse(options.to or TO, os.environ)
    if options.print_ddl:
        print(";\n\n".join(ship_ddl(options.cluster, house.database)) + ";")
        return 0
    if not options.db or not options.to:
        raise Usage("ship takes --db FILE and --to URL")
    if options.check + options.follow + options.again > 1:
        raise Usage("--check, --follow and --again are three different things; give one")
    gc.set_threshold(1_000_000)  # a batch is made of tuples without cycles: a tenth less time
    shipment = Shipment(options.db, house)
    if options.metrics:
        serve_metrics(options.metrics, shipment)
    if options.check:
        return ship_check(shipment)
    if options.follow:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with contextlib.suppress(KeyboardInterrupt):
            follow(shipment, options.cluster)
        return 0
    house.prepare(options.cluster)
    if options.again:
        with reading(options.db) as reader:
            mark = shipment.mark(reader)
        if mark.node:
            shipment.write(mark, moved_back(mark, SHIP_LEAST))
    while shipment.step():
        if sys.stderr.isatty():
            print("{:,} rows shipped".format(shipment.rows_shipped), end="\r", file=sys.stderr,
                  flush=True)
    print("{:,} rows shipped".format(shipment.rows_shipped))
    return 0


# ==================================================================================================
# Command line
# ==================================================================================================


class Usage(Exception):
    """A wrong command line. The text says what is wrong."""


GITHUB_FLAGS = {"any": None, "with": True, "without": False}


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


def asked_graph(reader: Reader, window: Window, options: argparse.Namespace) -> Plain:
    limit = options.limit or DRAWN
    if options.format == "html":
        return {"nodes": reader.count(window), "html": replay_file(reader, window, limit)}
    return graph(reader, window, limit)


def asked_developers(reader: Reader, window: Window, options: argparse.Namespace) -> Plain:
    result = developers(reader, window)
    return dict(result, developers=result["developers"][:options.limit])


def asked_export(reader: Reader, window: Window, options: argparse.Namespace) -> Plain:
    rows = exported(reader, window)
    if sys.stderr.isatty():
        rows = with_progress(rows, reader.count(window), sys.stderr)
    first = list(itertools.islice(rows, 1))
    return {"rows": itertools.chain(first, rows), "first": first}


def with_progress(rows: Iterator[Plain], total: int, screen: TextIO) -> Iterator[Plain]:
    n = 0
    for n, row in enumerate(rows, 1):
        if n % 5000 == 0:
            screen.write("\r{:,} of {:,} sessions".format(n, total))
            screen.flush()
        yield row
    screen.write("\r{:,} of {:,} sessions\n".format(n, total))


Format = Callable[[Plain], Iterable[str]]  # a command's result to pieces of text


def forms(text: Callable[[Plain], str], rows: str = "") -> Dict[str, Format]:
    """The forms of a command; a result with a list of `rows` has those of a table, too."""
    every: Dict[str, Format] = {
        "text": lambda r: [text(r)], "json": lambda r: [json.dumps(r, indent=2), "\n"],
        "csv": lambda r: csv_lines(r[rows]), "jsonl": lambda r: json_lines(r[rows])}
    return every if rows else {name: every[name] for name in ("text", "json")}


class Question(NamedTuple):
    """A command that asks the database: its arguments (names in ARGUMENTS), its forms (the first
    is the default), and which part of the result is empty when nothing was found."""

    help: str
    example: str
    arguments: Sequence[str]
    ask: Callable[[Reader, Window, argparse.Namespace], Plain]
    forms: Dict[str, Format]
    found: str


class Action(NamedTuple):
    """A command that asks no question of the database."""

    help: str
    example: str
    arguments: Sequence[str]
    run: Callable[[argparse.Namespace], int]


def flag(name: str, metavar: str, help: str, **more: Any) -> Tuple[str, Plain]:
    return name, dict(more, metavar=metavar, help=help)


ARGUMENTS: Dict[str, Tuple[str, Plain]] = {
    "db": flag("--db", "FILE", "the database that server.py writes", required=True),
    "days": flag("--days", "N", "the last N days (%d)" % DAYS_DEFAULT,
                 type=whole_number(1, 36_500)),
    "since": flag("--since", "TIME", "from this date or moment on (UTC), instead of --days"),
    "until": flag("--until", "TIME", "before this date or moment"),
    "github": ("--github", {"choices": list(GITHUB_FLAGS), "default": "any",
                            "help": "only sessions with a GitHub hash, or without one (any)"}),
    "discovery": flag("--discovery", "REF", "sessions that touched this discovery"),
    "limit": flag("--limit", "N", "at most N rows", type=whole_number(1, 999_999_999)),
    "sort": ("--sort", {"choices": list(DISCOVERY_SORTS), "default": SORTS[0],
                        "help": "what comes first"}),
    "session": flag("session", "HASH", "a session's hash, or its first digits (4 or more)"),
    "ref": flag("ref", "REF", "the discovery"),
    "port": flag("--port", "N", "the port to listen on (8788); 0 is any free one",
                 type=whole_number(0, 65_535), default=8788),
    "open": ("--open", {"action": "store_true", "help": "open the page in a browser"}),
    "ship_db": flag("--db", "FILE", "the database that server.py writes"),
    "to": flag("--to", "URL", "ClickHouse's HTTP interface; user and password come from"
               " CLICKHOUSE_USER and CLICKHOUSE_PASSWORD in the environment"),
    "follow": ("--follow", {"action": "store_true",
                            "help": "go on with what comes in, every %d s" % FOLLOW_SECONDS}),
    "check": ("--check", {"action": "store_true", "help": "ship nothing; is every session of the"
                          " file in the view? Exit with 1 if not"}),
    "again": ("--again", {"action": "store_true", "help": "send every row once more, where a check"
                          " found that some are missing"}),
    "print_ddl": ("--print-ddl", {"action": "store_true",
                                  "help": "only print what makes the table and the views"}),
    "metrics": flag("--metrics", "HOST:PORT",
                    "answer GET /metrics here, for Prometheus"),
    "cluster": flag("--cluster", "NAME",
                    "make the table and the views on every host of this ClickHouse cluster"),
    "demo_db": flag("--db", "FILE", "only write the sessions into this new file, and show no page"),
}
WINDOWED = ("db", "days", "since", "until", "github")
QUESTIONS = {
    "sessions": Question(
        "the sessions, newest first", "sessions --db events.db --days 30",
        (*WINDOWED, "discovery", "limit"),
        lambda reader, window, o: sessions(reader, window, o.limit or 50),
        forms(sessions_text, "sessions"), "sessions"),
    "session": Question(
        "one session, with the same identity's others",
        "session %s --db demo.db" % demo_hash("session", 0)[:8], ("session", "db"),
        lambda reader, window, o: session(reader, o.session), forms(session_text), "session"),
    "discoveries": Question(
        "how far discoveries went round", "discoveries --db events.db --days 30 --sort recent",
        (*WINDOWED, "limit", "sort"),
        lambda reader, window, o: discoveries(reader, window, o.limit or 50, o.sort),
        forms(discoveries_text, "discoveries"), "discoveries"),
    "discovery": Question(
        "one discovery: whom it reached, and its path",
        "discovery rate-limit-buckets --db demo.db --days 30", ("ref", *WINDOWED, "limit"),
        lambda reader, window, o: discovery(reader, o.ref, window, o.limit or 200),
        forms(discovery_text, "path"), "path"),
    "graph": Question(
        "who carried knowledge on to whom", "graph --db events.db --format html > replay.html",
        (*WINDOWED, "discovery", "limit"), asked_graph,
        dict(forms(graph_text, "edges"), dot=lambda r: [dot_text(r)], html=lambda r: [r["html"]]),
        "nodes"),
    "developers": Question(
        "who gives and who receives: sessions, calls, tokens saved, hand-overs",
        "developers --db events.db --days 30", (*WINDOWED, "limit"), asked_developers,
        forms(developers_text, "developers"), "developers"),
    "summary": Question(
        "the findings of a window in words, and the window before it beside them: a digest to mail",
        "summary --db events.db --days 7 | mail -s 'Sessions' team@example.org", WINDOWED,
        lambda reader, window, o: summary(reader, window), forms(summary_text), "sessions"),
    "activity": Question(
        "developers, sessions, tokens saved by day, week and month",
        "activity --db events.db --days 90", (*WINDOWED, "discovery"),
        lambda reader, window, o: activity(reader, window), forms(activity_text, "days"), "days"),
    "export": Question(
        "every session of a window, oldest first",
        "export --db events.db --days 365 --format csv > sessions.csv", (*WINDOWED, "discovery"),
        asked_export, {"jsonl": lambda r: json_lines(r["rows"]),
                       "csv": lambda r: csv_lines(r["rows"]),
                       "json": lambda r: json_array(r["rows"])}, "first"),
}
ACTIONS = {
    "view": Action("the replay page and the tables, in a browser", "view --db events.db --open",
                   ("db", "port", "open"), lambda o: serve(o.db, o.port, o.open)),
    "ship": Action("move the rows into a ClickHouse, and on from where it stopped",
                   "ship --db events.db --to 'http://host:8123/?database=analytics' --follow",
                   ("ship_db", "to", "follow", "metrics", "check", "again", "print_ddl", "cluster"),
                   ship),
    "demo": Action("try it: synthetic sessions and the page on them", "demo", ("demo_db", "port"),
                   demo),
}


def parser() -> argparse.ArgumentParser:
    shape = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(
        "session_events.py", formatter_class=shape,
        description="Shows the sessions that server.py stored.",
        epilog="example: python3 session_events.py demo\n\n"
               "exit status: 0 answered (also when there is nothing in the window),\n"
               "1 not found or not readable, 2 the command line is wrong")
    top.add_argument("--version", action="version", version="session_events.py " + __version__)
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    every: Dict[str, Union[Question, Action]] = {**QUESTIONS, **ACTIONS}
    for name, command in every.items():
        sub = commands.add_parser(
            name, help=command.help, description=command.help, formatter_class=shape,
            epilog="example: python3 session_events.py " + command.example)
        for argument in command.arguments:
            spelled, details = ARGUMENTS[argument]
            sub.add_argument(spelled, **details)
        if isinstance(command, Question):
            sub.add_argument("--format", choices=list(command.forms),
                             default=next(iter(command.forms)),
                             help="the form of the answer (%(default)s)")
    return top


def print_answer(question: Question, options: argparse.Namespace,
                 out: Callable[[str], Any]) -> None:
    """Prints the answer; notes about it go to standard error."""
    with reading(options.db) as reader:
        window = window_of(options) if "days" in question.arguments else EVER
        result = question.ask(reader, window, options)
        for piece in question.forms[options.format](result):
            out(piece)
        found = result[question.found]
        if question.found == "days":  # an empty day is listed
            found = any(day["sessions"] for day in found)
        if not found:
            print(nothing_words(reader, window), file=sys.stderr)
        if reader.left_out:
            print("left out: %s" % counted(reader.left_out, "row that is no session",
                                        "rows that are no sessions"), file=sys.stderr)


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Runs one command; the exit status."""
    options = parser().parse_args(arguments)

    def out(text: str) -> None:
        sys.stdout.buffer.write(text.encode("utf-8", "replace"))

    try:
        if sys.stdout is None:
            raise Refused("standard output is closed")
        if options.command in ACTIONS:
            return ACTIONS[options.command].run(options)
        print_answer(QUESTIONS[options.command], options, out)
        sys.stdout.flush()
        return 0
    except (NotFound, Refused, Usage) as error:
        print("session_events: %s" % visible(str(error)), file=sys.stderr)
        return 2 if isinstance(error, Usage) else 1
    except OSError as error:
        # The flush at exit must not fail as well.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # whoever read the output has closed it (`| head`)
            return 128 + getattr(signal, "SIGPIPE", 13)
        # A disk is full: that of standard output, or of the temporary files.
        print("session_events: cannot go on: %s" % error.strerror, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def step_back() -> None:
    """Lets a server on the same machine go first. A loop of queries took a third of the rate of a
    server under full load on 2 cores. At this priority it takes nothing that can be measured."""
    if hasattr(os, "nice"):
        os.nice(10)


# ==================================================================================================
# Style
# ==================================================================================================

STYLE = r"""
:root { color-scheme: light dark; --paper: #f6f6f3; --card: #ffffff; --ink: #1b2430;
  --soft: #566270; --line: #dfe2e0; --disc: #1f6fb2; --own: #74899d; --cross: #b84c00;
  --pale: #7b8794; --lit: #1b2430; --h1: #e4eef7; --h2: #b9d5ec; --h3: #2a76b5; --h4: #134a7c;
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace }
@media (prefers-color-scheme: dark) { :root { --paper: #0f1318; --card: #171d25; --ink: #e8ecf1;
  --soft: #a2aebc; --line: #2b3440; --disc: #63b3f4; --own: #68819b; --cross: #ff9a3c;
  --pale: #6d7b8a; --lit: #ffffff; --h1: #1d3146; --h2: #234a6e; --h3: #6db6f3; --h4: #b4dbff } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); overflow-wrap: anywhere;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans",
  sans-serif }
.wrap { max-width: 1680px; margin: 0 auto; padding: 0 clamp(12px, 2vw, 36px) 40px }
header, nav, form, .top, .tiles, .controls, .legend, .chips { display: flex; flex-wrap: wrap }
ul { margin: 0; padding: 0; list-style: none } dd, figure { margin: 0 }
h1 { font-size: 22px; line-height: 1.3; letter-spacing: -.01em; margin: 8px 0 0 }
h2 { font-size: 16px; margin: 22px 0 6px }
p { margin: 4px 0 10px; max-width: 80ch } a { color: var(--disc) }
.note, .words, .tiles, .legend, .ends, .ranking span, label, caption, dt, th, small, nav a {
  color: var(--soft) }
.note, .words, .tiles, figcaption { font-size: 14px }
.legend, .ends, .ranking span, label, th, small, .chips, .matrix table { font-size: 13px }
:focus-visible { outline: 2px solid var(--cross); outline-offset: 2px }
.skip { position: absolute; left: -999px }
.skip:focus { left: 12px; top: 8px; background: var(--card); padding: 4px 10px }
header { align-items: baseline; gap: 4px 28px; padding: 14px 0 8px }
header b { font-size: 17px; letter-spacing: -.01em }
nav { gap: 2px 18px }
nav a { text-decoration: none; padding: 3px 0; border-bottom: 2px solid transparent }
nav a[aria-current] { color: var(--ink); border-color: var(--cross) }
.top { justify-content: space-between; align-items: start; gap: 4px 16px }
.card, .large div { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 12px 16px; margin: 0 0 14px }
.empty { padding: 22px 18px; font-size: 16px }
summary { cursor: pointer } .words { margin-bottom: 6px }
.filters { margin: 0 0 4px } .filters > summary { padding: 4px 0 8px; font-weight: 600 }
form { gap: 8px 14px; align-items: end; padding: 0 0 12px; font-size: 13px }
form label { display: grid; gap: 2px }
input, select, button, .button { font: inherit; color: var(--ink); background: var(--card);
  border: 1px solid var(--pale); border-radius: 7px; padding: 5px 10px; min-height: 34px;
  max-width: 100% }
button, .button { cursor: pointer; font-weight: 600; text-decoration: none }
.findings { margin: 8px 0 14px; font-size: 16px }
.findings li { max-width: 100ch; padding: 2px 0 2px 14px; border-left: 3px solid var(--cross) }
.tiles { gap: 2px 24px; margin: 4px 0 10px }
.tiles div { display: flex; gap: 6px; align-items: baseline }
.tiles dd { color: var(--ink); font-weight: 650; font-variant-numeric: tabular-nums }
.tiles small { font-weight: 400 }
.large { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr));
  gap: 10px; margin: 12px 0 14px }
.large div { display: block; padding: 8px 14px; margin: 0 } .large dd { font-size: 21px }
.controls { display: none; align-items: center; gap: 6px 12px; position: sticky; top: 0;
  z-index: 2; background: var(--card); padding: 8px 0 2px; border-bottom: 1px solid var(--line) }
.live .controls { display: flex }
#play { min-width: 96px; background: var(--h3); border-color: var(--h3); color: var(--card) }
#slider { flex: 1 1 180px; padding: 0; min-width: 100px; accent-color: var(--disc); border: 0 }
#moment { font-variant-numeric: tabular-nums; min-width: 11em; font-weight: 600 }
#caption { flex: 1 0 100%; margin: 0; height: 26px; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; max-width: none; font-weight: 600; color: var(--cross) }
.board { display: grid; grid-template-columns: minmax(0, 1fr) minmax(280px, 380px); gap: 0 28px }
.board.alone { grid-template-columns: minmax(0, 1fr) }
.board h2 { margin: 10px 0 4px }
.side { display: flex; flex-direction: column; height: 0; min-height: 100%; min-width: 0 }
svg { display: block; overflow: visible } path, line { vector-effect: non-scaling-stroke }
.cells, .spark, .legend, .plots svg { fill: var(--disc) }
.stage { padding: 0 18px 0 86px; overflow-x: clip }
.stage svg { width: 100% }
.stage text { fill: var(--soft); font: 11px var(--mono) }
.lanes line, #ticks line { stroke: var(--line) } .lanes text { text-anchor: end }
#ticks text { text-anchor: middle } #ticks line { stroke-dasharray: 2 4 }
#ticks .q line { stroke: var(--cross); stroke-dasharray: none } #ticks .q text { fill: var(--ink) }
circle { fill: var(--card); stroke: var(--disc); stroke-width: 1.8 }
circle.g { fill: var(--disc); stroke: var(--card); stroke-width: 1 }
#arcs { fill: none; pointer-events: none }
#arcs path, .legend line { stroke: var(--own); stroke-width: 1.3; stroke-dasharray: 3 3 }
#arcs .x, .legend .x { stroke: var(--cross); stroke-width: 1.6; stroke-dasharray: none }
.live #arcs path:not(.there), .dense #arcs path { display: none }
#arcs .old { opacity: .16 }
#later { display: none } .live #later { display: inline }
#later rect { fill: var(--card); opacity: .84 }
#later path { stroke: var(--cross); stroke-width: 1.5; pointer-events: none }
#discs a { outline: none } .dense #discs a { opacity: 0 } .dense .lanes line { stroke: none }
.lit #arcs path { opacity: .06 } .lit #discs a, .lit .cells { opacity: .2 }
.dense.lit #discs a { opacity: 0 }
#chart #arcs .on.there, #chart #arcs .new { opacity: 1; display: inline }
#chart #arcs .on { stroke-width: 2.4 }
#chart #discs .on, #chart #discs .new { opacity: 1 }
#discs .at circle { stroke: var(--lit); stroke-width: 3 }
.dense #discs .on circle { r: 4px }
@keyframes pulse { from { stroke: var(--cross); stroke-width: 6 } }
#arcs .new, #discs .new circle { animation: pulse .6s }
@media (prefers-reduced-motion: reduce) { * { animation: none !important } }
.legend { gap: 4px 20px; margin: 8px 0 }
.legend span { display: flex; align-items: center; gap: 7px }
.legend svg { flex: none }
#panel { display: none; height: 118px; overflow-y: auto; border-top: 1px solid var(--line);
  padding: 6px 2px 0 }
.live #panel { display: block }
#panel p { max-width: none; margin: 2px 0 6px } .chips { gap: 5px }
.chips a, .chips span { display: block; border: 1px solid var(--pale); border-radius: 99px;
  padding: 1px 11px; text-decoration: none }
.ranking { overflow-y: auto }
.ranking li { display: grid; grid-template-columns: minmax(0, 1fr) 90px; gap: 0 10px;
  align-items: center; padding: 3px 6px 4px 0; border-bottom: 1px solid var(--line) }
.ranking button { border: 0; background: none; padding: 2px 0; text-align: left; min-height: 26px;
  font-weight: 500; cursor: default }
.live .ranking button { color: var(--disc); cursor: pointer; text-decoration: underline }
.ranking [aria-pressed=true] { font-weight: 700 }
.ranking [aria-pressed=true]::before { content: "\25b8  "; color: var(--cross) }
.ranking span { grid-column: 1 / -1 } .spark { width: 90px; height: 20px }
.scroll { overflow-x: auto; margin-top: 12px }
table { border-collapse: collapse; min-width: min(100%, 620px); font-variant-numeric: tabular-nums }
caption { text-align: left; padding: 0 0 6px; max-width: 100ch }
th, td { padding: 5px 18px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top }
th { text-align: left; font-weight: 600; white-space: nowrap } th a { color: inherit }
.n { text-align: right; white-space: nowrap } .d { min-width: 180px }
.m, .matrix th { font-family: var(--mono); font-size: 13px }
td.m { white-space: nowrap } th.m { font-family: inherit } .matrix table { min-width: 0 }
.matrix th, .matrix td { padding: 3px 5px; border: 1px solid var(--line); text-align: center;
  min-width: 30px }
.matrix th { font-weight: 400; font-size: 12px } .matrix span { writing-mode: vertical-rl }
.h1 { background: var(--h1) } .h2 { background: var(--h2) }
.h3 { background: var(--h3); color: var(--card) } .h4 { background: var(--h4); color: var(--card) }
.pairs, .every { display: none }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 14px }
.plots .card { margin: 0 } .plots svg { width: 100%; height: 120px }
.plots .before { fill: none; stroke: var(--pale); stroke-width: 2 }
.plots figcaption { margin-bottom: 8px }
.ends { display: flex; justify-content: space-between; margin: 4px 0 0; max-width: none }
.others { margin: 4px 0 } .others summary { color: var(--disc) }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: 3px 22px; margin: 0 }
@media (max-width: 1020px) {
  .board { grid-template-columns: minmax(0, 1fr) }
  .side { height: auto } .ranking { max-height: 340px }
}
@media (min-width: 641px) { @supports selector(::details-content) {
  .filters > summary { display: none }
  .filters::details-content { content-visibility: visible; block-size: auto }
} }
@media (max-width: 640px) {
  input, select, button, .button, summary, nav a, .live .ranking button { min-height: 44px }
  nav a, .filters > summary, summary { padding: 10px 0 } .button { padding-top: 10px }
  nav { gap: 0 9px; font-size: 14px }
  form { display: grid; grid-template-columns: 1fr 1fr }
  td.wide, td.late, .matrix { display: none } .pairs { display: block }
  .card { padding: 8px 10px } .controls { gap: 4px 10px } #slider { flex-basis: 60% }
  #caption { font-size: 14px; height: 40px; line-height: 20px; white-space: normal }
  .stage { padding: 0 12px 0 72px; scroll-margin-top: 160px; overflow: hidden }
  .lane42 { max-height: 530px } .lane30 { max-height: 386px }
  .lane20 { max-height: 266px } .lane15 { max-height: 206px }
  .board:has(.every :checked) .stage { max-height: none }
  .every { display: flex; align-items: center; gap: 8px; min-height: 44px; color: var(--disc) }
  .every input { min-height: 20px }
  #discs circle { transform: scale(.65); transform-box: fill-box; transform-origin: center }
  .stage text { font-size: 10px } #ticks .odd text { display: none }
  #panel { height: 190px } .chips a { padding: 9px 12px } .ranking { max-height: 410px }
  .cards, .cards caption, .cards tbody { display: block }
  .cards tr { display: flex; flex-wrap: wrap; gap: 0 9px; padding: 8px 0; line-height: 1.9;
    border-bottom: 1px solid var(--line); font-size: 13px }
  .cards tr:has(> :nth-child(2):not(.n))::after { content: ""; width: 100%; order: 1 }
  .cards th, .cards td { padding: 0; border: 0 } .cards td.n, .cards td.d { order: 2 }
  .cards td.n::after { content: " " attr(data-t); color: var(--soft) }
  .cards td.d { flex: 1 1 0; min-width: 0; overflow: hidden; white-space: nowrap;
    text-overflow: ellipsis }
  .cards .to::before { content: "\2192 " }
  .cards thead { position: absolute; left: -9999px } .sorts thead { position: static }
  .sorts th { padding: 8px 5px 8px 0 } .sorts th:not(:has(a)) { display: none }
  .cards .spark { width: 60px; height: 14px }
  .facts { grid-template-columns: 1fr; gap: 0 } .facts dd { margin-bottom: 7px }
}
"""

# ==================================================================================================
# Script
# ==================================================================================================

SCRIPT = r"""
"use strict";
(() => {
  const $ = id => document.getElementById(id), all = what => [...document.querySelectorAll(what)];
  const D = JSON.parse($("data").textContent), discs = all("#discs a"), arcs = all("#arcs path");
  const S = D.sessions.map(([time, who, calls, tokens, refs, received], place) =>
    ({place, time, who, calls, tokens, refs, received, shape: discs[place]}));
  const E = D.edges.map(([source, target, refs, crosses], j) =>
    ({source: S[source], target: S[target], refs, crosses, shape: arcs[j]}));
  const chart = $("chart"), slider = $("slider"), play = $("play"), caption = $("caption");
  const panel = $("panel"), hint = [...panel.childNodes], buttons = all("[data-ref]");
  const still = matchMedia("(prefers-reduced-motion: reduce)");

  // The state: the moment (ms after the start) with the sessions that ended by then; the session
  // that is lit (pointed at, or in focus) and the discovery that is chosen, or null; while it
  // plays, the frame that was asked for.
  let moment, seen, lit = null, chosen = null, frame = 0;

  // Each time that a discovery reaches a developer, and of each discovery whom it reaches where.
  const news = [], reached = D.refs.map(() => new Map());
  for (const s of S) for (const ref of s.refs) if (!reached[ref].has(s.who)) {
    reached[ref].set(s.who, s);
    news.push({time: s.time, ref, count: reached[ref].size});
  }

  // Words.
  const number = n => n.toLocaleString("en-US");
  const some = (n, thing) => `${number(n)} ${thing}${n === 1 ? "" : "s"}`;
  const clock = t => new Date(D.start + t).toISOString();
  const minute = t => clock(t).slice(0, 16).replace("T", " ") + " UTC";
  const ORDINALS = ["", "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth",
    "ninth", "tenth"];
  const ordinal = n => ORDINALS[n] ||
    n + (n % 100 > 10 && n % 100 < 14 ? "th" : ["th", "st", "nd", "rd"][n % 10] || "th");
  const sentence = ({ref, count}) => D.refs[ref] + (count === 1 ? " is met for the first time" :
    count === D.developers.length ? " has reached everybody" :
    ` reaches its ${ordinal(count)} developer`);
  const perSecond = () => D.span / 40 * $("speed").value;  // at speed 1 the window takes 40 s
  const say = () => {
    const past = news.filter(n => n.time <= moment && (chosen === null || n.ref === chosen));
    const since = moment - perSecond();
    let now = past.filter(n => n.time > since);
    if (!now.length) now = past.slice(-1);  // nothing in the last second: the last thing before
    const far = now.reduce((a, b) => b.count > a.count ? b : a, {count: 0});
    const several = new Set(now.map(n => n.ref)).size;
    const large = far.count === 5 || far.count % 10 === 0 || far.count === D.developers.length;
    const text = several > 1 && !large ? `${several} discoveries reach somebody new` :
      several ? sentence(far) : "";
    if (caption.textContent !== text) caption.textContent = text;
  };

  // The moment.
  const mark = (item, name, value) => {  // a class of its shape; asking the document costs more
    if (item[name] !== value) item.shape.classList.toggle(name, value);
    item[name] = value;
  };
  const sum = (rows, name) => rows.reduce((total, row) => total + row[name], 0);
  const show = t => {
    moment = Math.min(D.span, Math.max(0, t));
    seen = S.filter(s => s.time <= moment);
    [seen.length, new Set(seen.map(s => s.who)).size, sum(seen, "tokens"),
      news.filter(n => n.time <= moment && n.count === 1).length, sum(seen, "received"),
    ].forEach((value, i) => { $("count" + i).textContent = number(value); });
    for (const e of E) {
      mark(e, "there", e.target.time <= moment);
      mark(e, "old", frame > 0 && e.target.time <= moment - D.span / 10);
    }
    slider.value = slider.max * moment / D.span;
    slider.setAttribute("aria-valuetext", `${minute(moment)}, ${some(seen.length, "session")}`);
    $("moment").textContent = minute(moment);
    $("later").setAttribute("transform", `translate(${1000 * moment / D.span} 0)`);
    say();
    rove(focused() || seen[seen.length - 1] || S[0]);
  };
  const write = () => {
    const at = "t=" + clock(moment) +
      (chosen === null ? "" : "&d=" + encodeURIComponent(D.refs[chosen]));
    history.replaceState(null, "", "#" + at);
    const save = $("save");
    if (save) save.href = save.href.replace(/(&t=.*)?$/, "&" + at);
  };
  const read = () => {  // false: the address names no moment and no discovery
    const said = new URLSearchParams(location.hash.slice(1) || D.at);
    const t = Date.parse(said.get("t")) - D.start, ref = D.refs.indexOf(said.get("d"));
    const timed = !Number.isNaN(t), known = timed || ref >= 0 || S.length === 1;
    chosen = ref < 0 ? null : ref;
    stop();
    show(timed ? t : known ? D.span : 0);
    paint();
    return known;
  };

  // Playing.
  const stop = () => {
    cancelAnimationFrame(frame);
    frame = 0;
    caption.setAttribute("aria-live", "polite");
    play.textContent = "Play";
  };
  const go = t => { stop(); show(t); write(); };
  const toggle = () => {
    if (frame) { go(moment); return; }
    if (moment >= D.span) show(0);
    caption.setAttribute("aria-live", "off");  // each second would be too much to listen to
    play.textContent = "Pause";
    let before = performance.now();
    const tick = time => {
      const passed = Math.min(250, time - before);  // ms; a page out of sight goes on where it was
      const first = seen.length;
      before = time;
      show(moment + passed / 1000 * perSecond());
      pulse(seen.slice(first));
      if (moment < D.span) frame = requestAnimationFrame(tick); else go(moment);
    };
    frame = requestAnimationFrame(tick);
  };
  const pulse = fresh => {
    if (still.matches || !fresh.length) return;
    const edges = E.filter(e => e.crosses && fresh.includes(e.target) &&
      (chosen === null || e.refs.includes(chosen))).slice(0, 12);  // more cost 20 ms a frame
    const items = edges.flatMap(e => [e.shape, e.source.shape, e.target.shape]);
    items.forEach(item => item.classList.add("new"));
    setTimeout(() => items.forEach(item => item.classList.remove("new")), 600);
  };
  const step = by => {
    const to = by > 0 ? S[seen.length] : seen.filter(s => s.time < moment).pop();
    if (to) go(to.time);
  };

  // What is lit: a session with what it knew and where that went, or else the chosen discovery.
  const paint = () => {
    const refs = lit ? lit.refs : chosen === null ? [] : [chosen];
    const into = E.filter(e => e.target === lit);
    const went = E.filter(e =>
      (!lit || e.source.place >= lit.place) && e.refs.some(ref => refs.includes(ref)));
    const on = new Set(lit ? [lit] : S.filter(s => s.refs.includes(chosen)));
    for (const e of [...into, ...went]) on.add(e).add(e.source).add(e.target);
    for (const item of [...S, ...E]) mark(item, "on", on.has(item));
    for (const s of S) mark(s, "at", s === lit);
    chart.classList.toggle("lit", Boolean(lit) || chosen !== null);
    buttons.forEach(b => b.setAttribute("aria-pressed", Number(b.dataset.ref) === chosen));
    panel.replaceChildren(...lit ? session(lit, into, went) : chosen === null ? hint : path());
  };
  const light = s => { if (s !== lit) { lit = s; paint(); } };
  const choose = ref => {
    chosen = ref === chosen ? null : ref;
    lit = null;
    paint();
    say();
    write();
  };
  const element = (name, ...inside) => {
    const made = document.createElement(name);
    made.append(...inside);
    return made;
  };
  const link = (ref, otherwise) => {
    const made = element(D.links ? "a" : otherwise, D.refs[ref]);
    if (D.links) made.href = "/discovery/" + encodeURIComponent(D.refs[ref]) + D.query;
    return made;
  };
  const chips = (items, most) => {
    const list = element("ul", ...items.slice(0, most).map(item => element("li", item)));
    list.className = "chips";
    if (items.length > most) list.append(element("li", `and ${items.length - most} more`));
    return list;
  };
  const session = (s, into, went) => {
    const others = new Set(went.map(e => e.target.who).filter(who => who !== s.who)).size;
    return [element("p", element("strong", D.developers[s.who]),
      `, ended ${minute(s.time)}: ${some(s.calls, "call")}, ${some(s.tokens, "token")} saved. ` +
      (s.refs.length ? `Built on ${some(into.length, "earlier session")}; ` +
      `${some(others, "other developer")} built on it.` : "No discoveries.")),
    chips(s.refs.map(ref => link(ref, "span")), 6)];
  };
  const path = () => {
    const who = [...reached[chosen].values()].map(s =>
      element("span", `${D.developers[s.who]}, ${minute(s.time).slice(5, 16)}`));
    return [element("p", link(chosen, "strong"),
      ` reached ${number(who.length)} of ${some(D.developers.length, "developer")}. ` +
      "Escape, or choosing it again, shows everything."),
    chips(who, 10)];
  };

  // Pointing, touching, keys.
  const spots = all("#discs circle").map(({cx, cy}) =>
    [cx.baseVal.valueInSpecifiedUnits / 100, cy.baseVal.value]);  // a share of the width, px
  const nearest = event => {
    let best = null, least = 24;  // px
    const box = chart.getBoundingClientRect();
    for (const s of seen) {
      const [x, y] = spots[s.place];
      const far = Math.hypot(x * box.width + box.x - event.clientX, y + box.y - event.clientY);
      if (far < least) { least = far; best = s; }
    }
    return best;
  };
  const focused = () => S[discs.indexOf(document.activeElement)] || null;
  let stops = null;
  const rove = s => {  // Tab stops at one session: the one in focus, else the last that is there
    if (stops) stops.shape.tabIndex = -1;
    stops = s;
    s.shape.tabIndex = 0;
  };
  chart.addEventListener("pointermove", event => {
    if (event.pointerType !== "touch" && !frame) light(nearest(event) || focused());
  });
  chart.addEventListener("pointerleave", event => {
    if (event.pointerType !== "touch") light(focused());
  });
  chart.addEventListener("mousedown", event => event.preventDefault());  // focus stays where it is
  chart.addEventListener("click", event => {
    const own = event.target.closest("a"), s = event.detail ? nearest(event) : focused();
    if (own && !discs.includes(own) || s && s === lit && s.shape === own) return;  // a plain link
    event.preventDefault();
    if (s && s === lit && D.links) location.href = s.shape.href.baseVal;
    else light(s);  // a finger cannot point: its first touch does
  });
  document.addEventListener("focusin", event => {
    if (panel.contains(event.target)) return;  // the panel stays as it is while somebody is in it
    if (focused()) rove(focused());
    light(focused());
  });
  document.addEventListener("keydown", event => {
    const at = event.target, by = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (event.ctrlKey || event.metaKey || event.altKey || at.closest("input, select")) return;
    if (by && focused()) (seen[focused().place + by] || focused()).shape.focus();
    else if (by) step(by);
    else if (event.key === "Escape") choose(chosen);
    else if (event.key === " " && !at.closest("button, a, summary")) toggle();
    else return;
    event.preventDefault();
  });
  play.addEventListener("click", toggle);
  slider.addEventListener("input", () => { stop(); show(slider.value / slider.max * D.span); });
  slider.addEventListener("change", write);
  buttons.forEach(b => b.addEventListener("click", () => {
    choose(Number(b.dataset.ref));
    chart.parentNode.scrollIntoView({block: "nearest"});
  }));
  window.addEventListener("hashchange", read);

  document.documentElement.classList.add("live");
  all("#chart a").forEach(a => { a.tabIndex = -1; });
  if (!read()) {
    caption.textContent = "Press Play to see how the discoveries travel.";
    play.focus({preventScroll: true});
  }
})();
"""


if __name__ == "__main__":
    step_back()
    sys.exit(main())
