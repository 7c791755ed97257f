#!/usr/bin/env python3
"""Shows the sessions that server.py stored: tables, the session graph, a replay page. One file, nothing to install.

    python3 session_events.py demo                                  try it: synthetic sessions, and the page on them
    python3 session_events.py view --db events.db --open            the page on your own
    python3 session_events.py sessions --db events.db --days 30     the same as text, JSON, CSV ...

Promises: the database is opened read-only, each command reads one moment of it (one transaction), and a running
server is not in the way. Every row is checked when it is read: what is no session is left out and counted, and what
somebody wrote into a discovery is shown as text, whatever it contains. A developer appears as the first digits of a
hash, never as the whole; the page answers this machine only, and asks nothing of any other.

Limits: Python 3.8 and newer, SQLite 3.22 and newer. Hashes of developers change with the quarter, so nobody is the
same developer on both sides of its first day. Times are UTC; a day, a week (Monday first) and a month are UTC's too.

As a library (all results are plain dicts and lists, the same as `--format json`):

    import session_events
    with session_events.reading("events.db") as reader:
        week = session_events.last_days(7)
        print(session_events.graph(reader, week)["totals"])

Rooms: the contract → a row → queries → the graph → renderers (text, CSV, DOT; HTML) → the database file → viewer
→ demo → command line.
"""
from __future__ import annotations

import argparse
import base64
import contextlib
import csv
import datetime
import errno
import hashlib
import hmac
import html
import http.server
import io
import json
import math
import os
import random
import re
import secrets
import signal
import sqlite3
import sys
import tempfile
import threading
import urllib.parse
import uuid
import webbrowser
from pathlib import Path
from typing import (Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Set, TextIO,
                    Tuple)

# ======================================================================================================
# The contract
# ======================================================================================================

SCHEMA_VERSION = 1
TABLES = {
    "session_events": ("id", "identity_hash", "github_hash", "session_id_hash", "ended_at", "tool_count",
                       "tokens_saved", "branch_sha", "discovery_refs_json", "plugin_version", "received_at"),
    "session_discoveries": ("discovery_ref", "event_id"),
}
MOST_TOOLS, MOST_TOKENS, MOST_REFS = 1_000_000, 1_000_000_000, 200
PREFIX = 8  # digits of a developer's hash that are shown
ADMIN_TOKEN_VARIABLE = "ASHLR_ADMIN_TRIGGER_TOKEN"
RELATED_DAYS, RELATED_LIMIT = 30, 50
DAYS_DEFAULT, DRAWN = 7, 2000  # DRAWN: sessions in one picture
SORTS = ("session_count", "distinct_identity_count", "recent")
END_OF_TIME = "9999"  # above every moment that can be written, below any other junk that starts with a letter

Plain = Dict[str, Any]  # what json.dumps takes

# ======================================================================================================
# A row: every cell is hostile until it has been through here
# ======================================================================================================

is_hash = re.compile(r"[0-9a-f]{64}").fullmatch
is_branch = re.compile(r"[0-9a-f]{7,40}").fullmatch
is_version = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+_-]{0,63}").fullmatch
MOMENT = re.compile(r"(\d{4})-(\d\d)-(\d\d)T(\d\d):(\d\d):(\d\d)(?:\.(\d{1,9}))?(?:Z|([+-])(\d\d):(\d\d))?", re.ASCII)
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

    @property
    def developer(self) -> str:
        """The whole key of who it was; goes through `labels` before anybody sees it."""
        return self.github or self.identity


def instant(text: object) -> Optional[int]:
    """Milliseconds since 1970 of an ISO 8601 date and time (CONTRACT §1), None if it is not one."""
    match = MOMENT.fullmatch(text) if isinstance(text, str) else None
    if not match:
        return None
    year, month, day, hour, minute, second, fraction, sign, off_hour, off_minute = match.groups()
    try:
        moment = datetime.datetime(int(year), int(month), int(day), int(hour), int(minute), int(second))
    except ValueError:
        return None
    ms = (moment - EPOCH) // datetime.timedelta(milliseconds=1) + int(((fraction or "") + "000")[:3])
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


def whole(value: object, most: int) -> int:
    """A count as the contract has it: anything else counts as 0."""
    return value if isinstance(value, int) and 0 <= value <= most else 0


def refs_of(text: object) -> Tuple[str, ...]:
    """The discoveries in `discovery_refs_json`: each string once, in order; what is no array of them gives none.

    The same as the table's triggers make of it. A string may hold anything: renderers neutralise it."""
    try:
        values = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, list):
        return ()
    strings = (value.encode("utf-8", "replace").decode() for value in values if isinstance(value, str))
    return tuple(dict.fromkeys(strings))[:MOST_REFS]


COLUMNS = ("e.id, e.identity_hash, e.github_hash, e.session_id_hash, e.ended_at, e.tool_count, e.tokens_saved,"
           " e.branch_sha, e.discovery_refs_json, e.plugin_version")


def session_of(row: Sequence[Any]) -> Optional[Session]:
    """A row of COLUMNS as a Session, or None if who, which or when is not what the contract says.

    The other columns have a harmless stand-in each: 0, None, no discoveries, version "0.0.0"."""
    identity, github, session, ended = row[1], row[2], row[3], instant(row[4])
    if not (isinstance(identity, str) and is_hash(identity) and isinstance(session, str) and is_hash(session)):
        return None
    if ended is None or ended >= 253_370_764_800_000:  # END_OF_TIME
        return None
    branch, version = row[7], row[9]
    return Session(
        row[0], identity, github if isinstance(github, str) and is_hash(github) else None, session, ended,
        whole(row[5], MOST_TOOLS), whole(row[6], MOST_TOKENS),
        branch if isinstance(branch, str) and is_branch(branch) else None,
        refs_of(row[8]), version if isinstance(version, str) and is_version(version) else "0.0.0")


def labels(keys: Iterable[str]) -> Dict[str, str]:
    """{whole hash: what is shown of it}: 8 digits, longer only where two would look alike."""
    ordered = sorted(set(keys))
    shown = {}
    for before, key, after in zip(["", *ordered], ordered, [*ordered[1:], ""]):
        alike = max(len(os.path.commonprefix([key, other])) for other in (before, after))
        shown[key] = key[:max(PREFIX, alike + 1)]
    return shown


def plain_session(s: Session) -> Plain:
    """S of CONTRACT §7, to the letter."""
    return {"session_id_hash": s.session, "identity_hash_prefix": s.identity[:PREFIX],
            "github_hash_prefix": s.github and s.github[:PREFIX], "ended_at": moment_text(s.ended),
            "tool_count": s.tools, "tokens_saved": s.tokens, "branch_sha": s.branch,
            "discovery_refs": list(s.refs)}


def plain_sessions(sessions: Sequence[Session]) -> List[Plain]:
    """S of each, with `developer`: the label under which the graph and the pages know who it was."""
    shown = labels(s.developer for s in sessions)
    return [dict(plain_session(s), developer=shown[s.developer]) for s in sessions]


# ======================================================================================================
# Queries
# ======================================================================================================


class NotFound(Exception):
    """What was asked for is not there, or is not one thing; the text says so to a person."""


class Window(NamedTuple):
    """Which sessions: `since` (included) to `until` (not) in the stored form, with or without a GitHub hash (None:
    both), touching one discovery (None: any)."""

    since: str
    until: str = END_OF_TIME
    github: Optional[bool] = None
    discovery: Optional[str] = None


def last_days(days: float, github: Optional[bool] = None, discovery: Optional[str] = None) -> Window:
    """The window of the last `days` days, open at the end: a clock that runs ahead loses no session."""
    return Window(moment_text(now_ms() - int(days * DAY_MS)), END_OF_TIME, github, discovery)


GITHUB = {None: "", True: " AND e.github_hash IS NOT NULL", False: " AND e.github_hash IS NULL"}


def where(window: Window) -> Tuple[str, List[Any]]:
    """The window as a condition on `session_events e`, and its parameters."""
    sql, values = "e.ended_at >= ? AND e.ended_at < ?" + GITHUB[window.github], [window.since, window.until]
    if window.discovery is not None:
        sql += " AND e.id IN (SELECT event_id FROM session_discoveries WHERE discovery_ref = ?)"
        values.append(window.discovery)
    return sql, values


class Reader:
    """One read transaction. `left_out` counts the rows met so far that were no sessions."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection
        self.left_out = 0

    def rows(self, sql: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        return self.connection.execute(sql, values)

    def sessions(self, sql: str, values: Sequence[Any]) -> Iterator[Session]:
        """The checked rows of `SELECT COLUMNS FROM session_events e` + `sql`."""
        for row in self.rows("SELECT " + COLUMNS + " FROM session_events e " + sql, values):
            session = session_of(row)
            if session is None:
                self.left_out += 1
            else:
                yield session

    def window(self, window: Window, limit: int = -1) -> List[Session]:
        """The sessions of a window, newest first (the later stored first where two ended together)."""
        sql, values = where(window)
        return list(self.sessions("WHERE " + sql + " ORDER BY e.ended_at DESC, e.id DESC LIMIT ?", [*values, limit]))

    def count(self, window: Window) -> int:
        sql, values = where(window)
        return int(self.rows("SELECT count(*) FROM session_events e WHERE " + sql, values).fetchone()[0])


def span(window: Window) -> Plain:
    return {"since": window.since, "until": None if window.until == END_OF_TIME else window.until}


def sessions(reader: Reader, window: Window, limit: int = 50) -> Plain:
    """{"since", "until", "sessions": [S with "developer" ...] newest first, "total_count_in_window"}."""
    found = reader.window(window, limit)
    return dict(span(window), sessions=plain_sessions(found), total_count_in_window=reader.count(window))


NEWEST = 2000  # rows looked at first: most of the sessions that people ask for are recent
IDENTITIES = 5000  # identities looked through one by one
NEWEST_IDS = """SELECT id FROM (SELECT id, session_id_hash FROM session_events ORDER BY ended_at DESC LIMIT ?)
    WHERE session_id_hash >= ? AND session_id_hash < ?"""
IDENTITY_IDS = """WITH RECURSIVE one (identity) AS (
    SELECT min(identity_hash) FROM session_events
    UNION ALL
    SELECT (SELECT min(identity_hash) FROM session_events WHERE identity_hash > identity) FROM one
      WHERE identity IS NOT NULL LIMIT ?)
  SELECT e.id, identity IS NULL FROM one LEFT JOIN session_events e
    ON e.identity_hash = identity AND e.session_id_hash >= ? AND e.session_id_hash < ?
    WHERE e.id IS NOT NULL OR identity IS NULL"""
ALL_IDS = "SELECT id FROM session_events WHERE session_id_hash >= ? AND session_id_hash < ?"


def session_ids(reader: Reader, prefix: str) -> List[int]:
    """The ids of the rows whose session starts with `prefix`; for a whole hash, the newest ones may be enough.

    No index starts with the session. So, for a whole hash, first the newest rows (2 ms); then a step per identity
    through the unique index, as far as that pays (4,000 identities: 14 ms); then all of it (a million rows: 50 ms)."""
    bounds = [prefix, prefix + "g"]  # "g" is above every digit
    if len(prefix) == 64:
        found = [row[0] for row in reader.rows(NEWEST_IDS, [NEWEST, *bounds])]
        if found:
            return found
    steps = reader.rows(IDENTITY_IDS, [IDENTITIES, *bounds]).fetchall()
    if any(at_end for _, at_end in steps):
        return [row_id for row_id, _ in steps if row_id is not None]
    return [row[0] for row in reader.rows(ALL_IDS, bounds)]


def find_session(reader: Reader, prefix: str) -> Session:
    """The session whose hash is, or starts with, `prefix`; the newest where two machines or quarters share the hash.

    Raises NotFound when there is none, or when the prefix fits several sessions."""
    prefix = prefix.lower()
    if not re.fullmatch(r"[0-9a-f]{4,64}", prefix):
        raise NotFound("a session is named by 4 to 64 hex digits of its hash")
    ids = session_ids(reader, prefix)
    found = []
    for row_id in ids[:1000]:
        found += reader.sessions("WHERE e.id = ?", [row_id])
    if not found:
        raise NotFound("no session starts with these digits")
    names = sorted({s.session for s in found})
    if len(names) > 1:
        raise NotFound("%s%d sessions start with these digits, give more of them: %s%s" % (
            "at least " if len(ids) > 1000 else "", len(names), ", ".join(name[:16] for name in names[:4]),
            " ..." if names[4:] else ""))
    return max(found, key=lambda s: (s.ended, s.id))


def session(reader: Reader, prefix: str, now: Optional[int] = None) -> Plain:
    """{"session": S, "related": [S ...]} with "developer": the same identity's other sessions of the last 30 days,
    newest first, at most 50. Raises NotFound."""
    one = find_session(reader, prefix)
    since = moment_text((now_ms() if now is None else now) - RELATED_DAYS * DAY_MS)
    related = list(reader.sessions(
        "WHERE e.identity_hash = ? AND e.ended_at >= ? AND e.ended_at < ? AND e.id <> ?"
        " ORDER BY e.ended_at DESC, e.id DESC LIMIT ?",
        [one.identity, since, END_OF_TIME, one.id, RELATED_LIMIT]))
    first, *rest = plain_sessions([one, *related])
    return {"session": first, "related": rest}


AGGREGATE = """SELECT d.discovery_ref, count(*), count(DISTINCT e.identity_hash), min(e.ended_at), max(e.ended_at)
  FROM session_discoveries d CROSS JOIN session_events e ON e.id = d.event_id
  WHERE d.discovery_ref IN (%s) AND d.event_id BETWEEN ? AND ? AND e.ended_at >= ? AND e.ended_at < ?%s GROUP BY 1"""
BOUNDS = """SELECT discovery_ref, count(*) FROM session_discoveries
  WHERE event_id BETWEEN ? AND ? AND typeof(discovery_ref) = 'text' GROUP BY 1 ORDER BY 2 DESC, 1"""
BATCH = 100


def by_bound(reader: Reader, window: Window, limit: int, column: int, ids: Tuple[int, int]) -> List[Tuple[Any, ...]]:
    """The `limit` rows of AGGREGATE with the largest `column` (1 sessions, 2 identities).

    Looking up every session of every discovery costs 1 s for the 670,000 edges of a month; counting edges in their
    own table costs 0.1 s and can only be too high. So discoveries are looked at in the order of that bound, until
    none that is left can still be among the first: 0.2 s where a few discoveries lead, as they do."""
    found: List[Tuple[Any, ...]] = []

    def rank(row: Tuple[Any, ...]) -> Tuple[int, str]:
        return -row[column], row[0]

    bounds = reader.rows(BOUNDS, ids)
    batch = bounds.fetchmany(BATCH)
    while batch:
        names = [name for name, _ in batch]
        found += reader.rows(AGGREGATE % (",".join("?" * len(names)), GITHUB[window.github]),
                             [*names, *ids, window.since, window.until])
        found.sort(key=rank)
        del found[limit:]
        batch = bounds.fetchmany(BATCH)
        if batch and len(found) == limit and rank(found[-1]) < (-batch[0][1], batch[0][0]):
            break
    return found


def by_recency(reader: Reader, window: Window, limit: int, ids: Tuple[int, int]) -> List[Tuple[Any, ...]]:
    """The `limit` rows of AGGREGATE that were seen last: walking back in time, their names come in that order."""
    sql, values = where(window._replace(discovery=None))
    names: Dict[str, None] = {}
    full_at = ""
    for ended_at, refs in reader.rows("SELECT e.ended_at, e.discovery_refs_json FROM session_events e WHERE " + sql
                                      + " ORDER BY e.ended_at DESC", values):
        if full_at and ended_at != full_at:
            break
        names.update(dict.fromkeys(refs_of(refs)))
        full_at = full_at or (ended_at if len(names) >= limit else "")
    found: List[Tuple[Any, ...]] = []
    every = list(names)
    for start in range(0, len(every), BATCH):
        some = every[start:start + BATCH]
        found += reader.rows(AGGREGATE % (",".join("?" * len(some)), GITHUB[window.github]),
                             [*some, *ids, window.since, window.until])
    found.sort(key=lambda row: str(row[0]))
    found.sort(key=lambda row: str(row[4]), reverse=True)
    return found[:limit]


def discoveries(reader: Reader, window: Window, limit: int = 50, sort: str = "session_count") -> Plain:
    """{"since", "until", "discoveries": [{"discovery_id", "first_seen_at", "last_seen_at", "session_count",
    "distinct_identity_count", "last_aggregated_at"} ...]}, the first `limit` by `sort` (one of SORTS), all within
    the window; its `discovery` is not looked at. A time that is no time is None."""
    now = moment_text(now_ms())
    ids = reader.rows("SELECT min(id), max(id) FROM session_events WHERE ended_at >= ? AND ended_at < ?",
                      [window.since, window.until]).fetchone()
    if ids[0] is None:
        found = []
    elif sort == "recent":
        found = by_recency(reader, window, limit, ids)
    else:
        found = by_bound(reader, window, limit, 1 + SORTS.index(sort), ids)
    return dict(span(window), discoveries=[
        {"discovery_id": name, "first_seen_at": moment_or_none(first), "last_seen_at": moment_or_none(last),
         "session_count": count, "distinct_identity_count": identities, "last_aggregated_at": now}
        for name, count, identities, first, last in found])


def discovery(reader: Reader, ref: str, window: Window, limit: int = 200) -> Plain:
    """How one discovery went round in the window: {"discovery_id", "first_seen_at", "last_seen_at", "session_count",
    "distinct_identity_count", "developer_count", "reached": [{"at", "developer", "session_id_hash"} ...] each
    developer's first session, "path": [{"session_id_hash", "developer", "ended_at", "crosses"} ...] in time order},
    both lists cut after `limit`. Raises NotFound when no session of the window touched it."""
    sql, values = where(window._replace(discovery=None))
    identities: Set[str] = set()
    reached: Dict[str, Session] = {}
    path: List[Session] = []
    count = 0
    last = None
    for last in reader.sessions("JOIN session_discoveries d ON d.event_id = e.id WHERE d.discovery_ref = ? AND " + sql
                                + " ORDER BY e.ended_at, e.id", [ref, *values]):
        count += 1
        identities.add(last.identity)
        reached.setdefault(last.developer, last)
        if len(path) < limit:
            path.append(last)
    if last is None:
        raise NotFound("no session of this window touched this discovery")
    shown = labels(reached)
    return dict(
        span(window), discovery_id=ref, first_seen_at=moment_text(path[0].ended),
        last_seen_at=moment_text(last.ended), session_count=count, distinct_identity_count=len(identities),
        developer_count=len(reached),
        reached=[{"at": moment_text(s.ended), "developer": shown[s.developer], "session_id_hash": s.session}
                 for s in list(reached.values())[:limit]],
        path=[{"session_id_hash": s.session, "developer": shown[s.developer], "ended_at": moment_text(s.ended),
               "crosses": s.developer != before.developer} for before, s in zip([path[0], *path], path)])


COUNTED = "CASE WHEN {0} BETWEEN 0 AND {1} THEN CAST({0} AS INTEGER) ELSE 0 END"
BY_DAY = """SELECT substr(e.ended_at, 1, 10), coalesce(e.github_hash, e.identity_hash), e.ended_at >= ?, count(*),
    sum(%s), sum(%s) FROM session_events e WHERE %%s GROUP BY 1, 2, 3""" % (
    COUNTED.format("e.tool_count", MOST_TOOLS), COUNTED.format("e.tokens_saved", MOST_TOKENS))
ACTIVE_DAYS = (1, 7, 28)


class Tally(NamedTuple):
    """What one developer did on one day (`datetime.date.toordinal`)."""

    day: int
    developer: str
    sessions: int
    tools: int
    tokens: int


def activity(reader: Reader, window: Window, now: Optional[int] = None) -> Plain:
    """{"since", "until", "days": [P ...], "weeks": [P ...], "months": [P ...], "active": [{"days", "developers",
    "came_back"} ...]}, P = {"period", "developers", "came_back", "sessions", "tool_count", "tokens_saved"}.

    `came_back` of a period: how many of its developers were there in the period before it, too (within the window);
    of the active: in as many days before. The active are counted to the end of the window, its last day included."""
    end = min(window.until, moment_text((now_ms() if now is None else now) + 1))
    last_day = datetime.date.fromisoformat(moment_text((instant(end) or 1) - 1)[:10]).toordinal()
    early = datetime.date.fromordinal(max(1, last_day - 2 * max(ACTIVE_DAYS) + 1)).isoformat()
    sql, values = where(window._replace(since=min(window.since, early)))
    inside, every = [], []
    for day, developer, in_window, *counts in reader.rows(BY_DAY % sql, [window.since, *values]):
        ordinal = instant(str(day) + "T00:00:00")
        if ordinal is None or not (isinstance(developer, str) and is_hash(developer)):
            reader.left_out += counts[0]
            continue
        tally = Tally(ordinal // DAY_MS + EPOCH.toordinal(), developer, *counts)
        every.append(tally)
        if in_window:
            inside.append(tally)
    return dict(span(window), active=active(every, last_day), **periods(inside))


def active(tallies: Sequence[Tally], last_day: int) -> List[Plain]:
    """Who was there in the last 1, 7, 28 days up to `last_day`, and how many of them in as many days before."""
    def who(first: int, last: int) -> Set[str]:
        return {t.developer for t in tallies if first <= t.day <= last}

    spans = [(days, who(last_day - days + 1, last_day), who(last_day - 2 * days + 1, last_day - days))
             for days in ACTIVE_DAYS]
    return [{"days": days, "developers": len(here), "came_back": len(here & before)} for days, here, before in spans]


def week_name(day: int) -> str:
    year, week, _ = datetime.date.fromordinal(day).isocalendar()
    return "%04d-W%02d" % (year, week)


PERIODS: Dict[str, Tuple[Callable[[int], str], Callable[[int], int]]] = {  # name of the period, a day of the one before
    "days": (lambda day: datetime.date.fromordinal(day).isoformat(), lambda day: day - 1),
    "weeks": (week_name, lambda day: day - 7),
    "months": (lambda day: datetime.date.fromordinal(day).isoformat()[:7],
               lambda day: day - datetime.date.fromordinal(day).day),
}
FILLED_DAYS = 400  # empty periods are listed too, in a span of at most this many days


def periods(tallies: Sequence[Tally]) -> Dict[str, List[Plain]]:
    """The tallies rolled up: {"days": [P ...], "weeks": ..., "months": ...} (see `activity`), oldest first."""
    days = sorted({t.day for t in tallies})
    if days and days[-1] - days[0] <= FILLED_DAYS:
        days = list(range(days[0], days[-1] + 1))
    rolled = {}
    for kind, (name, before) in PERIODS.items():
        totals: Dict[str, List[Any]] = {name(day): [set(), 0, 0, 0, name(max(1, before(day)))] for day in days}
        for t in tallies:
            total = totals[name(t.day)]
            total[0].add(t.developer)
            total[1] += t.sessions
            total[2] += t.tools
            total[3] += t.tokens
        rolled[kind] = [
            {"period": period, "developers": len(who),
             "came_back": len(who & totals[previous][0]) if previous in totals and previous != period else 0,
             "sessions": count, "tool_count": tools, "tokens_saved": tokens}
            for period, (who, count, tools, tokens, previous) in totals.items()]
    return rolled


def exported(reader: Reader, window: Window) -> Iterator[Plain]:
    """Every session of the window, oldest first, one at a time: S with "developer" and "plugin_version".

    All labels have one length, the least at which no two developers of the window look alike; finding it reads the
    developers once, in order, and remembers one of them."""
    sql, values = where(window)
    length, before = PREFIX, ""
    for (key,) in reader.rows("SELECT DISTINCT coalesce(e.github_hash, e.identity_hash) FROM session_events e WHERE "
                              + sql + " ORDER BY 1", values):
        if isinstance(key, str) and is_hash(key):
            length = max(length, len(os.path.commonprefix([before, key])) + 1)
            before = key
    for s in reader.sessions("WHERE " + sql + " ORDER BY e.ended_at, e.id", values):
        yield dict(plain_session(s), developer=s.developer[:length], plugin_version=s.version)


# ======================================================================================================
# The graph (pure: sessions in, plain data out)
# ======================================================================================================


class Edge(NamedTuple):
    """Knowledge carried on: positions of two sessions in a list in time order, and the discoveries."""

    source: int
    target: int
    refs: Tuple[str, ...]


def edges_of(ordered: Sequence[Session]) -> List[Edge]:
    """For each discovery, an edge from each session that touched it to the next one that did; edges between the
    same two are one edge. `ordered` is in time order; so are the edges, by their target."""
    last: Dict[str, int] = {}
    carried: Dict[Tuple[int, int], List[str]] = {}
    for target, s in enumerate(ordered):
        for ref in s.refs:
            source = last.get(ref)
            if source is not None:
                carried.setdefault((source, target), []).append(ref)
            last[ref] = target
    return [Edge(source, target, tuple(refs)) for (source, target), refs in carried.items()]


def node_ids(ordered: Sequence[Session]) -> List[str]:
    """What names each node: its session's hash; "-2" is added where a second machine or quarter has the same one."""
    seen: Dict[str, int] = {}
    names = []
    for s in ordered:
        seen[s.session] = seen.get(s.session, 0) + 1
        names.append(s.session if seen[s.session] == 1 else "%s-%d" % (s.session, seen[s.session]))
    return names


def graph_of(ordered: Sequence[Session]) -> Plain:
    """The session graph of sessions in time order (see `graph` for the shape)."""
    shown = labels(s.developer for s in ordered)
    names = node_ids(ordered)
    found = edges_of(ordered)
    who = [s.developer for s in ordered]
    flows: Dict[Tuple[str, str], List[int]] = {}
    hand_overs = 0
    for edge in found:
        flow = flows.setdefault((shown[who[edge.source]], shown[who[edge.target]]), [0, 0])
        flow[0] += 1
        flow[1] += len(edge.refs)
        hand_overs += len(edge.refs) if who[edge.source] != who[edge.target] else 0
    return {
        "nodes": [dict(id=name, developer=shown[s.developer], **plain_session(s)) for name, s in zip(names, ordered)],
        "edges": [{"source": names[e.source], "target": names[e.target], "discoveries": list(e.refs),
                   "crosses": who[e.source] != who[e.target]} for e in found],
        "developers": [{"source": a, "target": b, "edges": edges, "discoveries": refs, "crosses": a != b}
                       for (a, b), (edges, refs) in sorted(flows.items(), key=lambda item: (-item[1][1], item[0]))],
        "totals": {"sessions": len(ordered), "developers": len(shown), "tool_count": sum(s.tools for s in ordered),
                   "tokens_saved": sum(s.tokens for s in ordered),
                   "discoveries": len({ref for s in ordered for ref in s.refs}), "hand_overs": hand_overs},
    }


def graph(reader: Reader, window: Window, limit: int = DRAWN) -> Plain:
    """The session graph of the newest `limit` sessions of a window (negative: of all):

    {"since", "until", "total_count_in_window", "nodes": [S with "id" and "developer" ...] oldest first,
    "edges": [{"source", "target" (node ids), "discoveries", "crosses": from one developer to another} ...],
    "developers": [{"source", "target" (developers), "edges", "discoveries" (how often one was carried), "crosses"}
    ...] most carried first, "totals": {"sessions", "developers", "tool_count", "tokens_saved", "discoveries",
    "hand_overs": how often a discovery went from one developer to another}}."""
    newest = reader.window(window, limit)
    return dict(span(window), total_count_in_window=reader.count(window), **graph_of(newest[::-1]))


# ======================================================================================================
# Renderers: text, CSV, DOT (pure: plain data in, text out)
# ======================================================================================================

COLUMNS_OF_A_TERMINAL = 80
UNSEEN = re.compile(r"[^ -~]")


def visible(text: str) -> str:
    """The text with everything but printable ASCII as \\u escapes. All that the contract allows comes out as it is;
    what a stranger's row can hold besides (terminal commands, right-to-left marks, look-alikes) loses its power."""
    return UNSEEN.sub(lambda match: match.group().encode("unicode_escape").decode(), text)


def fit(text: str, width: int) -> str:
    return text if len(text) <= width else text[:max(0, width - 3)] + "..."


def minute(moment: Optional[str]) -> str:
    return "-" if moment is None else moment[:16].replace("T", " ")


def refs_cell(refs: Sequence[str], width: int = 20) -> str:
    first = fit(visible(refs[0]), width) if refs else "-"
    return first + (" +%d" % (len(refs) - 1) if len(refs) > 1 else "")


class Column(NamedTuple):
    """One column of a text table: numbers stand right; the one that is `elastic` gives way to the line's length."""

    title: str
    cell: Callable[[Plain], Any]
    elastic: bool = False


def text_table(columns: Sequence[Column], rows: Sequence[Plain]) -> str:
    values = [[column.cell(row) for column in columns] for row in rows]
    cells = [["{:,}".format(v) if isinstance(v, int) else visible(str(v)) for v in line] for line in values]
    widths = [max(map(len, column)) for column in zip([c.title for c in columns], *cells)]
    right = [any(isinstance(line[i], int) for line in values) for i in range(len(columns))]
    for i, column in enumerate(columns):
        if column.elastic:
            others = sum(widths) - widths[i] + 2 * (len(widths) - 1)
            widths[i] = max(len(column.title), min(widths[i], COLUMNS_OF_A_TERMINAL - others))
    lines = []
    for line in [[c.title for c in columns], *cells]:
        padded = [(fit(cell, w).rjust if r else fit(cell, w).ljust)(w) for cell, w, r in zip(line, widths, right)]
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
    Column("sessions", lambda row: row["session_count"]),
    Column("identities", lambda row: row["distinct_identity_count"]),
    Column("first seen", lambda row: minute(row["first_seen_at"])[:10]),
    Column("last seen", lambda row: minute(row["last_seen_at"])[:10]),
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
    more = "\nthe newest {:,} of {:,}; --limit shows more\n".format(shown, total) if total > shown else ""
    return text_table(SESSION_COLUMNS, result["sessions"]) + more


def session_text(result: Plain) -> str:
    s = result["session"]
    lines = [("session", s["session_id_hash"]), ("developer", s["developer"]),
             ("with GitHub", "yes" if s["github_hash_prefix"] else "no"), ("ended", s["ended_at"]),
             ("tool calls", "{:,}".format(s["tool_count"])), ("tokens saved", "{:,}".format(s["tokens_saved"])),
             ("branch", s["branch_sha"] or "-")]
    lines += [("discoveries" if i == 0 else "", fit(visible(ref), 64)) for i, ref in enumerate(s["discovery_refs"])]
    text = "".join("%-13s %s\n" % line for line in lines)
    if not result["related"]:
        return text + "\nno other session of this identity in the last %d days\n" % RELATED_DAYS
    return text + "\nthe same identity, last %d days\n" % RELATED_DAYS + text_table(SESSION_COLUMNS,
                                                                                    result["related"])


def discovery_text(result: Plain) -> str:
    text = "%s\n%s to %s: %s sessions, %s developers\n\n" % (
        fit(visible(result["discovery_id"]), COLUMNS_OF_A_TERMINAL), minute(result["first_seen_at"]),
        minute(result["last_seen_at"]), "{:,}".format(result["session_count"]),
        "{:,}".format(result["developer_count"]))
    text += text_table(REACHED_COLUMNS, result["reached"]) + "\n" + text_table(PATH_COLUMNS, result["path"])
    if result["session_count"] > len(result["path"]):
        text += "\nthe first {:,} steps of {:,}\n".format(len(result["path"]), result["session_count"])
    return text


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
        row["days"], "{:,}".format(row["developers"]), "{:,}".format(row["came_back"])) for row in result["active"]]
    tables = [text_table(period_columns(result[kind]), result[kind]) for kind in PERIODS]
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


def jsonl_text(rows: Iterable[Plain]) -> str:
    return "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)


def dot_string(text: str) -> str:
    return '"' + visible(text).replace("\\", "\\\\").replace('"', '\\"') + '"'


def dot_text(result: Plain) -> str:
    """The graph for Graphviz (`dot -Tsvg`): a box of sessions for each developer, hand-overs in orange."""
    boxes: Dict[str, List[Plain]] = {}
    for node in result["nodes"]:
        boxes.setdefault(node["developer"], []).append(node)
    lines = ["digraph sessions {", "  rankdir=LR; node [shape=circle fontsize=9]; edge [fontsize=8 color=gray60]"]
    for developer, nodes in boxes.items():
        lines.append("  subgraph %s { label=%s" % (dot_string("cluster_" + developer), dot_string(developer)))
        lines += ["    %s [label=%s]" % (dot_string(n["id"]), dot_string(n["session_id_hash"][:PREFIX]))
                  for n in nodes]
        lines.append("  }")
    for edge in result["edges"]:
        label = ", ".join(edge["discoveries"][:2]) + (", ..." if edge["discoveries"][2:] else "")
        color = ' color="#d55e00" penwidth=2' if edge["crosses"] else ""
        lines.append("  %s -> %s [label=%s%s]" % (dot_string(edge["source"]), dot_string(edge["target"]),
                                                  dot_string(label), color))
    return "\n".join(lines) + "\n}\n"

