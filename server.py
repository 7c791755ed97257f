#!/usr/bin/env python3
"""The session-event server: takes events over HTTP, checks each, and keeps them in one SQLite file.

    python3 server.py --db events.db            # listens on http://127.0.0.1:8787

One file, Python 3.8 or newer, standard library only. In somebody's tests:

    with server.running() as events:            # a free loopback port, a database in memory
        client.send(events.url)
        assert events.events()[0]["tool_count"] == 42

What it promises:

- 202 means durable: the row is committed (WAL, synchronous=FULL) before the first byte of the
  answer leaves.
- The same event twice is one row, and both get the same bytes for an answer.
- Nothing it logs or counts names a developer, a session, a discovery or an address.
- It has no code that reads an event back over HTTP.

One turn of the loop is one transaction: read what has arrived, check it, commit once, then answer.
So one fsync serves every event of the turn, a slow client costs a buffer and no thread, and the
loop takes no locks. One more thread moves the -wal file into the database (see Checkpoints).
"""
from __future__ import annotations

import argparse
import bisect
import collections
import contextlib
import errno
import functools
import hashlib
import hmac
import http
import http.server
import io
import ipaddress
import itertools
import json
import math
import os
import pathlib
import queue
import re
import select
import selectors
import shutil
import signal
import socket
import sqlite3
import ssl
import sys
import tempfile
import threading
import time
import traceback
from datetime import datetime, timedelta, timezone
from email.utils import formatdate
from typing import (
    Any,
    Callable,
    Deque,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    NoReturn,
    Optional,
    Sequence,
    Set,
    Tuple,
    Type,
    Union,
)

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

__version__ = "1.0.0"

# ==================================================================================================
# The contract's constants
# ==================================================================================================

ENDPOINT = "/v1/session-events"
MAX_BODY = 64 * 1024  # bytes, README, Contract 1
# The file's tables and indexes. The text of the four parts together is schema.sql, to the letter.
SCHEMA_START = """\
-- The session-event store, schema version 1 (README, Contract 3). For SQLite 3.38 or newer, or an
-- older one built with JSON1. It makes a fresh file. Run again, or on a file in which another
-- program made session_events with the same columns, it adds what is missing and changes no row.
-- Where columns are missing it changes nothing: it is one transaction, which its last check undoes.
-- server.py carries this text to the letter.

BEGIN IMMEDIATE;
CREATE TEMP TABLE schema_before AS SELECT user_version AS version FROM pragma_user_version;
PRAGMA user_version = 1;

"""
# The table itself. Another program may have made it; then the rest is added by ADOPTION.
SCHEMA_TABLE = """\
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

"""
ADOPTION = """\
CREATE UNIQUE INDEX IF NOT EXISTS idx_session_events_identity_session_unique
  ON session_events (identity_hash, session_id_hash);
CREATE INDEX IF NOT EXISTS idx_session_events_identity_ended_at
  ON session_events (identity_hash, ended_at);
CREATE INDEX IF NOT EXISTS idx_session_events_received_at ON session_events (received_at);
CREATE INDEX IF NOT EXISTS idx_session_events_ended_at ON session_events (ended_at);

-- Which session touched which discovery: the edges of the session graph.
CREATE TABLE IF NOT EXISTS session_discoveries (
  discovery_ref TEXT NOT NULL,
  event_id INTEGER NOT NULL,
  PRIMARY KEY (discovery_ref, event_id)
) WITHOUT ROWID;

-- The insert calls no SQL function (json_each is a table). A function might abort the statement,
-- and for that SQLite would copy each page first: a fifth of the whole cost of an event. So a row
-- whose refs are not JSON text is refused. The upsert clause, unlike OR IGNORE, also holds where
-- the statement that inserts the row has an OR clause of its own.
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
      AND discovery_ref IN
        (SELECT value FROM json_each(OLD.discovery_refs_json) WHERE type = 'text');
END;

-- Edges of rows that were there before the triggers. This does not fail, whatever the rows hold.
INSERT OR IGNORE INTO session_discoveries (discovery_ref, event_id)
  SELECT value, session_events.id
    FROM session_events,
         json_each(CASE WHEN json_valid(discovery_refs_json) THEN discovery_refs_json ELSE '[]' END)
    WHERE json_each.type = 'text';

"""
SCHEMA_END = """\
-- The check. It undoes all of the above where the file is not what version 1 says, or is newer. A
-- program that goes on after an error (as sqlite3 < schema.sql does) finds nothing to commit.
CREATE TEMP TABLE schema_check (
  complete INTEGER CONSTRAINT "session_events lacks columns of version 1, or is of a newer version"
    CHECK (complete)
);
INSERT OR ROLLBACK INTO schema_check SELECT
  (SELECT version FROM schema_before) <= 1
  AND (SELECT count(*) FROM pragma_table_info('session_events') WHERE name IN (
    'id', 'identity_hash', 'github_hash', 'session_id_hash', 'ended_at', 'tool_count',
    'tokens_saved', 'branch_sha', 'discovery_refs_json', 'plugin_version', 'received_at')) = 11
  AND (SELECT count(*) FROM sqlite_master WHERE name IN (
    'idx_session_events_identity_session_unique', 'idx_session_events_identity_ended_at',
    'idx_session_events_received_at', 'idx_session_events_ended_at', 'session_discoveries',
    'session_events_discoveries_insert', 'session_events_discoveries_delete')) = 7;
DROP TABLE schema_check;
DROP TABLE schema_before;
COMMIT;
"""
SCHEMA = SCHEMA_START + SCHEMA_TABLE + ADOPTION + SCHEMA_END


class Migration(NamedTuple):
    """The statements that bring a file from the version before to `version`."""
    version: int
    columns: Tuple[str, ...]  # that session_events has from this version on
    script: str  # SQL statements, without BEGIN, COMMIT and user_version


# In order, one for each version. To change the schema, edit the text above, which makes fresh
# files, and add a line here, which changes older files. A released line never changes. A file in
# which another program made session_events is version 0 with the columns of version 1.
MIGRATIONS = (
    Migration(1, (
        "id", "identity_hash", "github_hash", "session_id_hash", "ended_at", "tool_count",
        "tokens_saved", "branch_sha", "discovery_refs_json", "plugin_version", "received_at",
    ), ADOPTION),
)
SCHEMA_VERSION = MIGRATIONS[-1].version

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
COLUMN_OF = {"discovery_refs": "discovery_refs_json"}  # where it is not the field's own name
LOWERED = ("branch_sha",)  # fields that are stored in lower case
COLUMNS = tuple(COLUMN_OF.get(name, name) for name, _type, _needed, _rule in FIELDS)

# What a stored event is, in the order of COLUMNS.
Row = Tuple[str, Optional[str], str, str, int, int, Optional[str], str, str]


# ==================================================================================================
# The event check: bytes in, a row or the faults out (README, Contract 1)
# ==================================================================================================

Issue = Dict[str, Any]  # {"path": [field or index, ...], "message": words}
MAX_ISSUES = 100  # of one kind: a body of 13,000 unknown keys must not make an answer of a megabyte


class Fault(Exception):
    """What is wrong with one field.

    `found`: pairs of a path below the field and a message for the client's author.
    """

    def __init__(self, words: str, *below: Tuple[int, str]) -> None:
        super().__init__(words)
        self.found: List[Tuple[List[int], str]] = [
            ([index], text) for index, text in below] or [([], words)]


class NotJSON(ValueError):
    """The body is not JSON text in UTF-8."""


class NotAnEvent(ValueError):
    """The body is JSON, but no event. `issues` says why."""

    def __init__(self, issues: List[Issue]) -> None:
        super().__init__("Validation failed")
        self.issues = issues


Check = Callable[[Any], Any]  # a field's JSON value in, what is stored out; raises Fault


def string_check(pattern: str, lowered: bool) -> Check:
    """A check for strings that match `pattern` as a whole. (`$` allows a newline at the end.)"""
    matches = re.compile(pattern, re.ASCII).fullmatch
    words = "must be a string of the form " + pattern

    def check(value: Any) -> str:
        if type(value) is str and matches(value):
            return value.lower() if lowered else value
        raise Fault(words)
    return check


def number_check(least: int, most: int) -> Check:
    """A check for whole JSON numbers, `5.0` and `5e0` among them.

    To Python a bool is an int; here it is not a number.
    """
    words = "must be a whole number from %d to %d" % (least, most)

    def check(value: Any) -> int:
        whole = type(value) is int or (type(value) is float and value.is_integer())
        if whole and least <= value <= most:
            return int(value)
        raise Fault(words)
    return check


def array_check(most: int, pattern: str) -> Check:
    """A check for arrays of strings; what is stored is JSON text.

    `pattern` must not match anything that JSON would have to escape.
    """
    matches = re.compile(pattern, re.ASCII).fullmatch
    words = "must be a string of the form " + pattern

    def check(value: Any) -> str:
        if type(value) is not list:
            raise Fault("must be an array of strings")
        if len(value) > most:
            raise Fault("must have at most %d entries" % most)
        wrong = [i for i, item in enumerate(value) if type(item) is not str or not matches(item)]
        if wrong:
            raise Fault(words, *((i, words) for i in wrong))
        return '["%s"]' % '","'.join(value) if value else "[]"
    return check


_moment = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2}T(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9])(?:\.([0-9]+))?"
    r"(?:Z|([+-])([01][0-9]|2[0-3]):([0-5][0-9]))?").fullmatch


def utc_milliseconds(value: Any) -> str:
    """`2026-05-22T14:34:56.5+02:00` as `2026-05-22T12:34:56.500Z`: so text order is time order."""
    match = _moment(value) if type(value) is str else None
    if not match:
        raise Fault("must be an ISO 8601 date and time with seconds,"
                    " such as 2026-05-22T12:34:56.000Z")
    seconds, fraction, sign, hours, minutes = match.groups()
    try:
        moment = datetime.fromisoformat(seconds)
        if sign:
            offset = timedelta(hours=int(hours), minutes=int(minutes))
            seconds = (moment - offset if sign == "+" else moment + offset).isoformat()
    except (ValueError, OverflowError):
        raise Fault("must be a date and time that exists in the calendar,"
                    " years 0001 to 9999 in UTC") from None
    return "%s.%sZ" % (seconds, ((fraction or "") + "000")[:3])


# A moment in its stored form. Whether 29 February exists is left to utc_milliseconds.
STORED_MOMENT = (
    r"(?!0000)[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    r"|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))"
    r"T(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]\.[0-9]{3}Z")


class Field(NamedTuple):
    """What this program derives from a row of FIELDS."""
    name: str
    check: Check
    absent: Any  # the value that a field which is not there counts as
    usual: str  # a pattern for the field in JSON text as most clients write it, with one group
    convert: Optional[Callable[[Any], Any]]  # what the group's text must go through to be stored


NEEDED = object()  # stands in for a needed field that is not there; no check takes it


def derived(name: str, json_type: str, needed: bool, rule: Any) -> Field:
    """The Field of a row of FIELDS. A new kind of type or rule is added here."""
    start, end = '"%s":' % name, ""
    convert: Optional[Callable[[Any], Any]] = None
    absent: Any = NEEDED if needed else None
    if json_type == "number":
        least, most = rule
        check, convert = number_check(least, most), int
        digits = len(str(most)) - 1
        # A number with as many digits as `most` is left to check_event, unless it is `most` itself.
        shape = "(0|[1-9][0-9]{0,%d}|%d)" % (digits - 1, most)
    elif json_type == "array":
        most, pattern = rule
        check, absent = array_check(most, pattern), NEEDED if needed else []
        shape = r'(\[(?:"%s"(?:,"%s"){0,%d})?\])' % (pattern, pattern, most - 1)
    else:
        lowered = name in LOWERED
        if rule == "moment":
            check, pattern = utc_milliseconds, STORED_MOMENT
        else:
            check, pattern = string_check(rule, lowered), rule
        shape = '"(%s)"' % pattern
        if json_type == "string or null":
            check, shape = null_or(check), '(?:null|"(%s)")' % pattern
        if lowered:
            convert = lower
        if not needed:
            start, end = "(?:" + start, ",)?"
    return Field(name, check, absent, start + shape + (end or ","), convert)


def null_or(check: Check) -> Check:
    """The same check for a field that may also be null."""
    def check_or_null(value: Any) -> Any:
        if value is None:
            return None
        try:
            return check(value)
        except Fault as fault:
            raise Fault("%s, or null" % fault) from None
    return check_or_null


def lower(text: Optional[str]) -> Optional[str]:
    return text and text.lower()


EVENT_FIELDS = tuple(derived(*field) for field in FIELDS)
NAMES = {field.name for field in EVENT_FIELDS}
CHECKS = tuple((field.name, field.check, field.absent) for field in EVENT_FIELDS)
CONVERSIONS = tuple((place, field.convert) for place, field in enumerate(EVENT_FIELDS)
                    if field.convert)

# An event as emit.py and most clients write it: the fields in the table's order, no blanks, no
# escapes. What this does not match goes to check_event.
_usual_event = re.compile(
    r"\{%s\}" % "".join(field.usual for field in EVENT_FIELDS).rstrip(","), re.ASCII).fullmatch


def canonical_row(body: bytes) -> Optional[Row]:
    """The row of an event in the usual form; None if check_event has to decide.

    It takes 2.4 us where check_event takes 9.
    """
    # Latin-1 takes any byte, and the pattern takes none that is not ASCII.
    match = _usual_event(body.decode("latin-1"))
    if not match:
        return None
    row: List[Any] = list(match.groups())
    for place, convert in CONVERSIONS:
        row[place] = convert(row[place])
    return tuple(row)  # as long as FIELDS, each of its check's type


class RepeatedKeys(Dict[str, Any]):
    """A JSON object in which keys stand more than once. `repeated` has each of them once."""
    repeated: List[str]


def _object(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    odd = RepeatedKeys(found)
    counts = collections.Counter(key for key, _value in pairs)
    odd.repeated = [key for key, count in counts.items() if count > 1]
    return odd


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)  # NaN and Infinity, which Python's json takes and JSON does not know


_decode = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_constant).decode
_decode_huge = json.JSONDecoder(
    object_pairs_hook=_object, parse_constant=_no_constant, parse_int=float).decode


def parse_json(body: bytes) -> Any:
    """The JSON value in `body`. Raises NotJSON, whatever the body is.

    UTF-8 only, while json.loads would guess UTF-16 and UTF-32. Python refuses integers of more than
    4,300 digits with a plain ValueError. As floats they parse, and fail where a range is checked.
    """
    try:
        text = body.decode("utf-8")
        try:
            return _decode(text)
        except json.JSONDecodeError:
            raise
        except ValueError:
            return _decode_huge(text)
    except (ValueError, RecursionError):
        raise NotJSON from None


def check_event(event: Any) -> Row:
    """The row of a parsed event. Raises NotAnEvent: an issue for each fault, never a value."""
    if not isinstance(event, dict):
        raise NotAnEvent([{"path": [], "message": "must be a JSON object"}])
    try:
        row = [check(event.get(name, absent)) for name, check, absent in CHECKS]
        if event.keys() <= NAMES and type(event) is dict:
            return tuple(row)  # as long as FIELDS, each of its check's type
    except Fault:
        pass
    raise NotAnEvent(all_issues(event))


def all_issues(event: Dict[str, Any]) -> List[Issue]:
    """Every fault of an object that is not an event."""
    issues: List[Issue] = []
    for name, check, absent in CHECKS:
        try:
            check(event.get(name, absent))
        except Fault as fault:
            found = fault.found if name in event else [([], "is required")]
            issues += [{"path": [name, *below], "message": words} for below, words in found]
    repeated = event.repeated if isinstance(event, RepeatedKeys) else []
    return (issues + key_issues(repeated, "stands more than once")
            + key_issues([key for key in event if key not in NAMES], "is not a field of an event"))


_looks_like_a_name = re.compile("[A-Za-z0-9_-]{1,64}").fullmatch


def key_issues(keys: List[str], words: str) -> List[Issue]:
    """An issue for each of the keys. A key that does not look like a field's name is not quoted."""
    issues = [{"path": [key] if _looks_like_a_name(key) else [], "message": words}
              for key in keys[:MAX_ISSUES]]
    if len(keys) > MAX_ISSUES:
        left = len(keys) - MAX_ISSUES
        issues.append({"path": [], "message": "and %d more keys: %s" % (left, words)})
    return issues


# ==================================================================================================
# Framing: bytes in, whole requests out; answers in, bytes out. No socket, no clock.
# (README, Contract 2; RFC 9112)
# ==================================================================================================

MAX_HEAD = 16 * 1024  # bytes, request line and header lines
MAX_HEADERS = 99  # what http.server itself takes
# Two of these in one request can be read in two ways.
ONCE_ONLY = {b"content-length", b"transfer-encoding", b"host", b"expect"}
MAX_KNOWN_HEADS = 1024
MAX_KNOWN_HEAD = 1024  # bytes
# A head is remembered only if it has no other header lines: others may hold a client's address.
HARMLESS = {b"host", b"content-type", b"content-length", b"user-agent", b"accept", b"connection",
            b"accept-encoding", b"accept-language", b"expect"}


class Answer(NamedTuple):
    """An answer before it is bytes."""
    status: int
    payload: bytes
    reason: str = ""  # of a refusal, for the metrics: a word from this file, never from a client
    extra: str = ""  # further header lines, each with its CRLF
    media_type: str = "application/json"


def as_json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode("ascii")


def failure(status: int, words: str, reason: str, extra: str = "") -> Answer:
    return Answer(status, as_json({"error": words}), reason, extra)


OK = b'{"ok":true}'
ACCEPTED = Answer(202, OK)
UNAVAILABLE = failure(503, "The store cannot take events now", "store_unavailable",
                      "Retry-After: 5\r\n")
INSERT_FAILED = failure(500, "Insert failed", "insert_failed")
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Refused(Exception):
    """A request that ends its connection: it is not known where the next request begins."""

    def __init__(self, status: int, words: str, reason: str = "malformed_request") -> None:
        super().__init__(words)
        self.answer = failure(status, words, reason)


TOO_LARGE = "The body is over %d bytes" % MAX_BODY


class Head(NamedTuple):
    """What the head of a request says about its framing and its sender."""
    length: Optional[int]  # bytes of the body; None: it was not said
    chunked: bool
    keep: bool  # the connection stays open after the answer
    expects: bool  # the client waits for "100 Continue"
    hot: bool  # a POST of an event with its length: it needs nothing else from http.server
    forwarded: str  # X-Forwarded-For, its lines joined


class Request(NamedTuple):
    """A whole request."""
    head: Head
    text: bytes  # of the head: the request line and the header lines, without the empty line
    body: bytes  # without what the chunks add to it


_request_line = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([!-~]+) HTTP/1\.([01])").fullmatch
_header_line = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t -~\x80-\xff]*)").fullmatch
# RFC 9110 §7.2, RFC 3986 §3.2.2: a name, an IPv4 address or a bracketed literal, and a port. Empty
# for a target without an authority.
_host = re.compile(rb"(?:\[[0-9A-Za-z._~!$&'()*+,;=:-]+\]|(?:[0-9A-Za-z._~!$&'()*+,;=-]"
                   rb"|%[0-9A-Fa-f]{2})*)(?::[0-9]*)?").fullmatch
_hot_line = b"POST " + ENDPOINT.encode()
_bare = re.compile(rb"(?<!\r)\n|\r(?=[^\n])").search

# Results of parse_head: a look-up takes 0.1 us for 5. Clients of one kind send the same head each
# time. Only heads of events are kept, and none with a line that may name the sender.
_known_heads: Dict[bytes, Head] = {}


def parse_head(text: bytes) -> Head:
    """The framing of a request, from its head. Raises Refused where it can be read in two ways.

    `text` is without the empty line. (http.server's own parser is lenient, and slow: it halves the
    rate of ingest.)
    """
    first, *lines = text.split(b"\r\n")
    request = _request_line(first)
    if not request:
        raise Refused(400, "Malformed request line")
    if len(lines) > MAX_HEADERS:
        raise Refused(431, "More than %d headers" % MAX_HEADERS, "head_too_large")
    headers: Dict[bytes, bytes] = {}
    for line in lines:
        header = _header_line(line)
        if not header:
            raise Refused(400, "Malformed header line")
        name, value = header[1].lower(), header[2].strip(b" \t")
        if name in headers and name in ONCE_ONLY:
            raise Refused(400, "Repeated header: " + name.decode())
        headers[name] = headers[name] + b"," + value if name in headers else value
    newer = request[3] == b"1"
    options = {option.strip() for option in headers.get(b"connection", b"").lower().split(b",")}
    check_host(headers.get(b"host"), newer)
    length, chunked = body_framing(headers, newer)
    head = Head(
        length, chunked,
        keep=newer and b"close" not in options,
        expects=newer and expects_continue(headers),
        hot=first[:-9] == _hot_line and length is not None,
        forwarded=headers.get(b"x-forwarded-for", b"").decode("latin-1"),
    )
    if head.hot and len(text) <= MAX_KNOWN_HEAD and headers.keys() <= HARMLESS:
        if len(_known_heads) >= MAX_KNOWN_HEADS:
            _known_heads.clear()
        _known_heads[text] = head
    return head


def check_host(host: Optional[bytes], newer: bool) -> None:
    """Raises Refused for what RFC 9112 §3.2 forbids. `newer`: the request says HTTP/1.1."""
    if host is None:
        if newer:
            raise Refused(400, "HTTP/1.1 without Host")
    elif not _host(host):
        raise Refused(400, "Malformed Host")


def body_framing(headers: Dict[bytes, bytes], newer: bool) -> Tuple[Optional[int], bool]:
    """The body's length, None if it was not said, and whether it is chunked. Raises Refused."""
    length, coding = headers.get(b"content-length"), headers.get(b"transfer-encoding")
    if coding is not None:
        if length is not None:
            raise Refused(400, "Content-Length and Transfer-Encoding in one request")
        if coding.lower() != b"chunked" or not newer:
            raise Refused(400, "The only Transfer-Encoding taken is chunked, once, in HTTP/1.1")
        return None, True
    if length is None:
        return None, False
    if not re.fullmatch(rb"[0-9]+", length):
        raise Refused(400, "Malformed Content-Length")
    digits = length.lstrip(b"0") or b"0"  # int() takes no more than 4,300
    if len(digits) > 9 or int(digits) > MAX_BODY:
        raise Refused(413, TOO_LARGE, "body_too_large")
    return int(digits), False


def expects_continue(headers: Dict[bytes, bytes]) -> bool:
    expected = headers.get(b"expect")
    if expected is not None and expected.lower() != b"100-continue":
        raise Refused(417, "The only expectation known is 100-continue")
    return expected is not None


_chunk_size = re.compile(rb"([0-9A-Fa-f]{1,16})\r\n").match
_half_chunk_size = re.compile(rb"(?:[0-9A-Fa-f]{1,16}\r?)?\Z").match


class RequestReader:
    """The framing of one connection. feed() takes its bytes, next_request() gives its requests.

    After Refused nothing more can be read: where the next request begins is not known.
    """

    __slots__ = ("body", "buffer", "head", "searched", "start", "text")

    def __init__(self) -> None:
        self.buffer = b""  # what was received, and
        self.start = 0  # how much of it was read
        self.searched = 0  # bytes behind `start` in which no end of a head was found
        self.head: Optional[Head] = None  # of a request whose body is not complete,
        self.text = b""  # its text, or that of one that was refused
        self.body = bytearray()  # and what its chunks have brought so far

    def feed(self, data: bytes) -> None:
        self.buffer = self.buffer[self.start:] + data if self.buffer else data
        self.start = 0

    def held(self) -> int:
        """The number of bytes that were received and not yet returned as part of a request."""
        return len(self.buffer) - self.start + len(self.text) + len(self.body)

    def next_request(self) -> Optional[Request]:
        """The request at the front; None when more must come. Raises Refused."""
        head = self.head
        if head is None:
            head = self.head = self.read_head()
            if head is None:
                return None
        body: Optional[bytes]
        if head.chunked:
            body = self.read_chunks()
            if body is None:
                return None
        else:
            end = self.start + (head.length or 0)
            if end > len(self.buffer):
                return None
            body, self.start = self.buffer[self.start:end], end
        text, self.head, self.text = self.text, None, b""
        if self.start == len(self.buffer):
            self.buffer, self.start = b"", 0
        return Request(head, text, body)

    def read_head(self) -> Optional[Head]:
        """Pass over the head at the front, which is then in `text`; None when more must come."""
        data, start = self.buffer, self.start
        if data.startswith(b"\r\n", start):
            start += 2  # RFC 9112 §2.2: an empty line before a request is passed over
        # A head that comes byte by byte is not searched from its beginning each time.
        searched = self.start + self.searched if self.searched else start
        end = data.find(b"\r\n\r\n", searched - 3 if searched > start + 3 else start)
        if (end if end >= 0 else len(data)) - start > MAX_HEAD:
            raise Refused(431, "The head is over %d bytes" % MAX_HEAD, "head_too_large")
        if end < 0:
            if _bare(data, max(start, searched - 1)):
                raise Refused(400, "A bare CR or LF in the head")
            self.searched = len(data) - self.start
            return None
        text = self.text = data[start:end]
        self.start, self.searched = end + 4, 0
        head = _known_heads.get(text)
        return head if head is not None else parse_head(text)

    def read_chunks(self) -> Optional[bytes]:
        """Pass over the chunks at the front; the body, once the last one is there.

        RFC 9112 §7.1, without its options: no extensions, no trailers.
        """
        data, at = self.buffer, self.start
        while True:
            size_line = _chunk_size(data, at)
            if not size_line:
                if not _half_chunk_size(data, at):
                    raise Refused(400, "Malformed chunk size; extensions are not taken")
                break
            size, begin = int(size_line[1], 16), size_line.end()
            if len(self.body) + size > MAX_BODY:
                raise Refused(413, TOO_LARGE, "body_too_large")
            end = begin + size
            line_end = data[end:end + 2]
            if not b"\r\n".startswith(line_end):
                raise Refused(400, "A chunk is longer than its size" if size
                              else "Trailers are not taken")
            if len(line_end) < 2:
                break
            at = end + 2
            if not size:
                body, self.body, self.start = bytes(self.body), bytearray(), at
                return body
            self.body += data[begin:end]
        self.buffer, self.start = data[at:], 0
        return None

    def request_line(self) -> bytes:
        """The first line of the request at the front, as far as it is there."""
        text = self.text or self.buffer[self.start:].lstrip(b"\r\n")
        return text.partition(b"\r\n")[0]


@functools.lru_cache(maxsize=64)
def answer_bytes(answer: Answer, close: bool, second: int, bodiless: bool = False) -> bytes:
    """The bytes of an answer. The memo saves 4 us for the one answer that nearly all get."""
    return (
        "HTTP/1.1 %d %s\r\nServer: session-events\r\nDate: %s\r\nContent-Type: %s\r\n"
        "Content-Length: %d\r\nCache-Control: no-store\r\n%s%s\r\n" % (
            answer.status, http.HTTPStatus(answer.status).phrase, formatdate(second, usegmt=True),
            answer.media_type, len(answer.payload), answer.extra,
            "Connection: close\r\n" if close else "")
    ).encode("ascii") + (b"" if bodiless else answer.payload)


# ==================================================================================================
# The rate limit: addresses in, seconds to wait out
# ==================================================================================================

MAX_BUCKETS = 65536  # about 10 MB; when it is full, the client that was quiet longest is forgotten

Address = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]
Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]


class Rate(NamedTuple):
    """A number of requests in a number of seconds. They may all come at once."""
    requests: int
    seconds: float


def parse_address(text: str) -> Optional[Address]:
    """An address, or None for text that is none. A port (some proxies add it) and a zone are cut.

    An IPv4 address in the form of an IPv6 one becomes an IPv4 address.
    """
    bracketed = re.fullmatch(r"\s*\[([^]]*)\](?::[0-9]+)?\s*|\s*([0-9.]+):[0-9]+\s*", text)
    bare = (bracketed[1] or bracketed[2] or "") if bracketed else text
    try:
        address = ipaddress.ip_address(bare.partition("%")[0].strip())
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def is_trusted(address: Optional[Address], trusted: Sequence[Network]) -> bool:
    return address is not None and any(address in network for network in trusted)


def client_address(peer: str, forwarded: str, trusted: Sequence[Network]) -> Optional[Address]:
    """Who sends: the peer, or, behind trusted proxies, the last hop in X-Forwarded-For that is no
    trusted proxy.

    It is read from the right, since a client can write what stands further left. The search ends at
    a hop that is no address.
    """
    client = parse_address(peer)
    hops = forwarded.split(",")
    while hops and is_trusted(client, trusted):
        hop = parse_address(hops.pop())
        if not hop:
            break
        client = hop
    return client


class RateLimit:
    """A token bucket for each client, kept as the moment at which it will be full again (GCRA).

    Clients are kept under a hash whose key exists only in this process, so that memory or a core
    dump holds no list of addresses. An IPv6 client is its /64, which is what a subscriber gets.
    """

    def __init__(self, rate: Rate) -> None:
        self.interval = rate.seconds / rate.requests
        self.burst = rate.seconds - self.interval
        self.rounding = self.interval / 1000  # seconds of a wait that floating point may have made
        self.full_at: Dict[bytes, float] = {}  # in the order of last use
        self.key = os.urandom(16)

    def bucket(self, client: Optional[Address]) -> Optional[bytes]:
        """The name of a client's bucket; None for one that is not limited."""
        if client is None or client.is_loopback:
            return None
        packed = client.packed[:8] if client.version == 6 else client.packed
        return hashlib.blake2b(packed, key=self.key, digest_size=8).digest()

    def take_token(self, bucket: bytes, now: float) -> float:
        """Take a token: 0.0; or the seconds until there is one. `now` never goes backwards."""
        full_at = max(self.full_at.pop(bucket, now), now)
        wait = full_at - now - self.burst
        if wait < self.rounding:
            wait, full_at = 0.0, full_at + self.interval
        self.full_at[bucket] = full_at
        if len(self.full_at) > MAX_BUCKETS:
            del self.full_at[next(iter(self.full_at))]
        return wait

    def give_back(self, bucket: bytes) -> None:
        """Put the token back that take_token() took."""
        if bucket in self.full_at:
            self.full_at[bucket] -= self.interval

    def whole_seconds(self, wait: float) -> int:
        """Seconds of a wait, rounded up."""
        return max(1, math.ceil(wait - self.rounding * 0.999))


# ==================================================================================================
# Metrics: numbers in, Prometheus text out. No label names a client, a developer or a session.
# ==================================================================================================

class Histogram:
    """Counts of values up to each bound, their sum and their number."""

    def __init__(self, *bounds: float) -> None:
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.sum += value

    def samples(self, name: str) -> Iterator[str]:
        total = 0
        for bound, count in zip((*("%g" % b for b in self.bounds), "+Inf"), self.counts):
            total += count
            yield '%s_bucket{le="%s"} %d' % (name, bound, total)
        yield "%s_sum %r" % (name, self.sum)
        yield "%s_count %d" % (name, total)


class Metrics:
    """What the loop counts as it goes."""

    def __init__(self) -> None:
        self.answers: Dict[int, int] = collections.defaultdict(int)  # by status
        self.refusals: Dict[str, int] = collections.defaultdict(int)  # by reason
        self.events = {"stored": 0, "already_there": 0}
        self.swept = 0
        self.unshipped: Optional[int] = None  # ids; None: nobody ships
        self.rows = Histogram(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
        self.commits = Histogram(.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25,
                                 .5, 1, 2.5)

    def text(self, connections: Dict[str, int], database_bytes: int) -> bytes:
        """The text format, version 0.0.4."""
        def labelled(name: str, label: str, values: Mapping[Any, int]) -> List[str]:
            return ['%s{%s="%s"} %d' % (name, label, value, values[value])
                    for value in sorted(values)]

        build = '{version="%s",python="%s",sqlite="%s"} 1' % (
            __version__, ".".join(map(str, sys.version_info[:3])), sqlite3.sqlite_version)
        families: List[Tuple[str, str, str, Callable[[str], Iterable[str]]]] = [
            ("http_requests_total", "counter", "Answers sent, by status.",
             lambda name: labelled(name, "status", self.answers)),
            ("events_total", "counter", "Events answered 202, by what became of them.",
             lambda name: labelled(name, "result", self.events)),
            ("refusals_total", "counter",
             "Requests not answered 2xx, and handshakes over the rate, by reason.",
             lambda name: labelled(name, "reason", self.refusals)),
            ("swept_rows_total", "counter", "Rows deleted because of --retain-days.",
             lambda name: ["%s %d" % (name, self.swept)]),
            ("unshipped_ids", "gauge",
             "Ids above the lowest mark of ship; --retain-days keeps their rows.",
             lambda name: [] if self.unshipped is None else ["%s %d" % (name, self.unshipped)]),
            ("turn_rows", "histogram", "Rows in a turn's transaction.", self.rows.samples),
            ("commit_seconds", "histogram", "Seconds of a turn's transaction, commit included.",
             self.commits.samples),
            ("connections", "gauge", "Open connections, by what they wait for.",
             lambda name: labelled(name, "phase", connections)),
            ("database_bytes", "gauge", "Size of the database and its WAL.",
             lambda name: ["%s %d" % (name, database_bytes)]),
            ("build_info", "gauge", "What runs.", lambda name: [name + build]),
        ]
        lines: List[str] = []
        for short, kind, words, samples in families:
            name = "session_events_" + short
            lines += ["# HELP %s %s" % (name, words), "# TYPE %s %s" % (name, kind), *samples(name)]
        return ("\n".join(lines) + "\n").encode("ascii")


# ==================================================================================================
# Retention, the pure part: clocks and stamps in, what may be deleted out
# ==================================================================================================

STEADY_SECONDS = 10.0  # during which the wall clock must agree with the monotonic one
HOUR, DAY = 3600.0, 86400.0
CLOCK_SLACK = 2.0  # seconds an hour that they may differ by: a crystal's error is under 0.4
SMALL_JUMP = 600.0  # seconds that a running clock may be corrected by without making it doubtful
AHEAD = 120.0  # seconds that the newest row may lie in the future, after a small correction
USUALLY_OFF = 7 * DAY  # a server that stood still for longer has to wait an hour
# Stamps before this were made by a clock that had lost its battery (1970, 2000, 2010).
FIRST_STAMP = "2020-01-01T00:00:00Z"


class Retention:
    """Decides whether the wall clock is good enough to delete rows. It reads no clock itself.

    `seconds`: how long rows are kept. `newest`: the table's newest `received_at` at the start, in
    seconds since 1970; None for an empty table, NaN for a stamp that is no date. `last_id`: the
    table's highest id at the start.

    In doubt rows are kept: after a jump, or a disagreement with the table, the clock is believed
    again when it has been steady for a day.
    """

    def __init__(self, seconds: float, newest: Optional[float], last_id: int,
                 wall: float, monotonic: float) -> None:
        self.seconds, self.newest = seconds, newest
        self.started = monotonic
        self.offset = wall - monotonic  # of the present steady stretch
        self.steady_since = self.renewed = monotonic
        self.believed: Optional[float] = None  # the offset of the clock that was last believed
        self.marks: Deque[Tuple[float, int]] = collections.deque([(monotonic, last_id)])

    def reason_to_wait(self, wall: float, monotonic: float) -> str:
        """Why nothing may be deleted now; an empty text when rows may be deleted.

        `wall` is in seconds since 1970. `monotonic` goes on while the machine sleeps.
        """
        offset = wall - monotonic
        if abs(offset - self.offset) > CLOCK_SLACK:
            self.offset, self.steady_since, self.renewed = offset, monotonic, monotonic
        elif monotonic - self.renewed > HOUR:
            self.offset, self.renewed = offset, monotonic
        seconds, reason = self.required_steadiness()
        if monotonic - self.steady_since < seconds:
            return reason
        self.believed = self.offset
        return ""

    def required_steadiness(self) -> Tuple[float, str]:
        """How many seconds the clock has to be steady, and why."""
        if self.believed is not None:
            if abs(self.offset - self.believed) > SMALL_JUMP:
                return DAY, "the clock jumped: it has to be steady for a day"
        elif self.newest is not None:
            behind = self.offset + self.started - self.newest  # at the start, by the present clock
            if not behind >= -AHEAD:
                return DAY, "a row is not from the past: the clock has to be steady for a day"
            if behind > self.seconds:
                return DAY, "every row would go: the clock has to be steady for a day"
            if behind > USUALLY_OFF:
                return HOUR, "no row is from the last week: the clock has to be steady for an hour"
        return STEADY_SECONDS, "the clock has to be steady for %d seconds" % STEADY_SECONDS

    def received(self, last_id: int, monotonic: float) -> None:
        """Remember that the table's highest id was `last_id` at this moment."""
        if monotonic - self.marks[-1][0] > self.seconds / 1000:
            self.marks.append((monotonic, last_id))
            while len(self.marks) > 1 and self.marks[1][0] <= monotonic - self.seconds:
                self.marks.popleft()

    def oldest_young_id(self) -> int:
        """Rows from this id on are younger than `seconds`, whatever their stamps say.

        This process received them, and its monotonic clock knows when.
        """
        return self.marks[0][1] + 1


LEAST_ID, MOST_ID = -(1 << 63), (1 << 63) - 1


class Looked(NamedTuple):
    """How far the rows of a table were examined, in the order of their ids."""
    old: int = LEAST_ID  # the last id whose own stamp says that it is old
    seen: int = LEAST_ID  # the last id before the first young row
    highest: str = FIRST_STAMP  # the highest stamp that was believed
    young: bool = False  # a young row ended the search


def old_rows(rows: Iterable[Tuple[int, Any]], before: Looked, cutoff: str, now: str) -> Looked:
    """How far `rows`, pairs of id and `received_at`, are older than `cutoff`.

    Rows arrive in the order of their ids. So a row is at least as young as each row before it, and
    at least as old as each row behind it. A stamp that is lower than the highest before it says
    nothing, nor does one from the future, from before FIRST_STAMP or that is no text. Such a row is
    taken for as young as the next row whose stamp says something. (What a client says of itself,
    `ended_at`, is not asked: with a date in the future it would keep its rows for ever.)
    """
    old, seen, highest, _young = before
    for number, stamp in rows:
        if isinstance(stamp, str) and highest <= stamp <= now:
            if stamp >= cutoff:
                return Looked(old, seen, highest, True)
            old, highest = number, stamp
        seen = number
    return Looked(old, seen, highest)


def unix_seconds(stamp: Any) -> float:
    """A `received_at` in seconds since 1970; NaN when it is no date and time."""
    try:
        moment = datetime.fromisoformat(stamp[:-1] if stamp[-1:] == "Z" else stamp)
        return moment.replace(tzinfo=timezone.utc).timestamp()
    except (TypeError, ValueError, OverflowError):
        return math.nan


@functools.lru_cache(maxsize=1)
def stamp_of(seconds: float) -> str:
    """Seconds since 1970 in the form of `received_at`."""
    try:
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
    except (OSError, OverflowError, ValueError):  # no year that the system knows
        return ""


# ==================================================================================================
# The store
# ==================================================================================================

class StartError(Exception):
    """The database, or a file beside it, cannot be used. Its text is one line for the operator."""


class Unavailable(Exception):
    """The store cannot take rows now, and stored nothing of this turn. The text is for the log."""


# SQLite's messages for faults that are not about the rows: they pass, or an operator mends them.
# (Error codes as attributes came with Python 3.11.)
PASSING = ("database is locked", "table is locked", "disk is full", "readonly database",
           "disk I/O error", "unable to open database", "disk image is malformed",
           "file is not a database")

SETTINGS = (
    # Readers never hold up the writer, and a commit is one append and one fsync.
    "journal_mode = WAL",
    # A commit is on the disk when it returns: 202 means that. WAL's usual NORMAL loses the last
    # ones with the power.
    "synchronous = FULL",
    # Pages in the WAL from which a commit moves them itself, and nobody is answered meanwhile. That
    # is the last resort: `Checkpoints` begins at CHECKPOINT_PAGES.
    "wal_autocheckpoint = 32000",
    # Deleted rows are overwritten with zeros: some builds of SQLite do so anyway, some do not.
    "secure_delete = ON",
    # Bytes: after somebody's long read, which keeps the WAL growing, it shrinks again.
    "journal_size_limit = 201326592",
)

# KiB of pages in SQLite's cache. 4 MB hold what a turn writes; with 2 MB, turns of 200 rows spill.
# No more in a file under 1 GB. After a commit in which a leaf was split, and that is nearly each,
# SQLite walks through its whole cache there, since it gives such leaves the number of the page at
# 1 GB for a moment: 64 MB cost 18% of the rate at a million rows. In a larger file there is no such
# walk, and an event needs 8 pages that 4 MB no longer hold. With ten million rows in memory, 64 MB
# made 10,100 events/s of 7,800. Where the disk is the limit it makes no difference.
SMALL_CACHE, LARGE_CACHE = 4 << 10, 64 << 10
LARGE_FILE = 1 << 30  # bytes

# For the time after the migration, which sorts whole indexes and needs a file for that. Deleting
# a row copies its pages first, since the schema's trigger calls a function. In a file that takes 29
# us a row, in memory 21.
SWEEP_SETTING = "temp_store = MEMORY"

# received_at is given, although the table has a default: the default is a function (see the
# schema's triggers).
INSERT = (
    "INSERT %%s INTO session_events (%s, received_at) VALUES (%s, ?) ON CONFLICT DO NOTHING" % (
        ", ".join(COLUMNS), ", ".join("?" * len(COLUMNS))))
# OR ROLLBACK spares the statement journal: 26 us an event become 22, at 20 events a turn.
INSERT_ALL = INSERT % "OR ROLLBACK"
INSERT_ONE = INSERT % ""


LITTLE_ROOM = 1 << 20  # bytes free; with less, the disk is why a database cannot open
REOPEN_SECONDS = 1.0  # between attempts to open a database for which the disk had no room

LARGEST_EVENT = 64  # pages, generously: its refs stand in the row, in the edges and in their index


class Written(NamedTuple):
    """The result of storing a turn's rows."""
    stored: int  # new ones; the others were there already
    refused: Dict[int, Exception]  # place in the turn: the database's message about this row
    swept: int  # old rows deleted


def statements(script: str) -> Iterator[str]:
    """The statements of an SQL script, one by one, so that all can run in one transaction.

    (Connection.executescript commits the transaction that is open before it starts.)
    """
    statement = ""
    for piece in script.split(";")[:-1]:
        statement += piece + ";"
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def pragma(db: sqlite3.Connection, name: str) -> int:
    """The number that the pragma has now. Raises sqlite3.Error."""
    return int(db.execute("PRAGMA " + name).fetchone()[0])


def shown(name: str) -> str:
    """A name out of a database or a folder, in a form that is safe to print on one line."""
    return json.dumps(name[:255])


NULLABLE = ("github_hash", "branch_sha")  # columns in which an event may have no value


class Column(NamedTuple):
    """A column of a table, as SQLite describes it."""
    name: str
    kind: str  # the declared type, in capitals
    not_null: bool
    has_default: bool
    key: int  # its place in the primary key; 0 when it is not part of it


class Store:
    """The connection that reads and writes the database. Raises StartError when it cannot be used.

    `path` may be `:memory:`. `max_bytes` bounds the database file (its WAL comes on top). With a
    `pepper` the three hash columns hold HMAC-SHA256(pepper, hash) in place of the hash.
    `retain_days` of 0 keeps all rows. Where the disk has no room for the side files, `fault` says
    so and writing tries again to open the database.
    """

    LOCK_SECONDS = 0.25  # how long a turn may wait for another process's write lock
    START_LOCK_SECONDS = 10  # the same at the start: another server may be making the tables

    def __init__(self, path: str, max_bytes: Optional[int] = None, pepper: Optional[bytes] = None,
                 retain_days: int = 0) -> None:
        self.in_memory = path == ":memory:"
        # The side files lie beside the real file.
        self.path = path if self.in_memory else os.path.realpath(path)
        self.max_bytes, self.pepper, self.retain_days = max_bytes, pepper, retain_days
        self.moved = False
        self.cache = 0  # KiB of pages, as SQLite was told
        self.pages_left_then = -1  # when rows last did not fit under `max_bytes`; -1: they fit
        self.sweep: Optional[Sweep] = None
        self.checkpoints: Optional[Checkpoints] = None
        # The open files: what was at each path when they were opened.
        self.files: Dict[str, Tuple[int, int]] = {}
        self.fault, self.reopen_at = "", 0.0
        if not path or os.path.isdir(path):
            raise StartError("%s is no file: name one for the database" % (path or "an empty text"))
        try:
            self.db = self.connect()
            try:
                self.open_at_start()
            except BaseException as error:
                if not (isinstance(error, sqlite3.Error) and self.lacks_room(error)):
                    if self.checkpoints:
                        self.checkpoints.close()
                    self.db.close()
                    raise
                self.fault = str(error)
        except (OSError, sqlite3.Error) as error:
            reason = getattr(error, "strerror", None) or error
            raise StartError("cannot use %s: %s" % (path, reason)) from None

    def open_at_start(self) -> None:
        """open(), and again while another process holds a lock."""
        end = time.monotonic() + self.START_LOCK_SECONDS
        while True:
            try:
                return self.open()
            except sqlite3.OperationalError as error:
                # SQLite's own timeout does not cover the change to WAL.
                if "is locked" not in str(error) or time.monotonic() > end:
                    raise
            time.sleep(0.05)

    def open(self) -> None:
        """Open the database, bring the file up to date, and prepare for writing.

        Raises StartError, OSError and sqlite3.Error.
        """
        if self.db.in_transaction:
            self.db.execute("ROLLBACK")  # of an attempt that failed
        self.migrate()
        self.check_writable()
        self.check_pepper()
        self.db.execute("PRAGMA " + SWEEP_SETTING)
        if not self.in_memory:
            if self.checkpoints is None:
                self.checkpoints = Checkpoints(self.path)
            self.files = {name: file_identity(name) for name in (self.path, self.path + "-wal")}
        if self.retain_days:
            self.sweep = Sweep(self.db, self.retain_days)
        self.fault = ""

    def lacks_room(self, error: sqlite3.Error) -> bool:
        """True if the database cannot be opened only because the disk is full."""
        if "disk is full" in str(error):
            return True
        if "disk I/O error" not in str(error) or not hasattr(os, "statvfs"):
            return False
        system = os.statvfs(os.path.dirname(self.path))
        return system.f_bavail * system.f_frsize < LITTLE_ROOM

    def reopen(self) -> None:
        """Try again to open a database for which there was no room. Raises Unavailable."""
        if time.monotonic() >= self.reopen_at:
            try:
                self.open()
            except (StartError, OSError, sqlite3.Error) as error:
                self.fault = getattr(error, "strerror", None) or str(error)
            self.reopen_at = time.monotonic() + REOPEN_SECONDS
        if self.fault:
            raise Unavailable(self.fault)

    def connect(self) -> sqlite3.Connection:
        if not self.in_memory:
            with contextlib.suppress(FileExistsError):
                # SQLite gives the side files the mode of the database.
                os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        return sqlite3.connect(self.path, timeout=self.LOCK_SECONDS, isolation_level=None,
                               check_same_thread=False)

    def migrate(self) -> None:
        """Bring the file to SCHEMA_VERSION. Raises StartError when that cannot be."""
        # First: a server that starts beside this one may make the tables meanwhile.
        empty = self.db.execute("SELECT 1 FROM sqlite_master").fetchone() is None
        version = pragma(self.db, "user_version")
        if version > SCHEMA_VERSION:
            raise StartError(
                "%s has schema version %d, and this server.py knows %d: use a newer server.py"
                % (self.path, version, SCHEMA_VERSION))
        fresh = version == 0 and not self.columns()
        if fresh and not empty:
            raise StartError("%s is another program's database: it has tables, and no table"
                             " session_events. Name a new file" % self.path)
        if not fresh:
            self.check_table(version)  # before anything in the file is changed
        for setting in SETTINGS:
            self.db.execute("PRAGMA " + setting)
        self.fit_cache()
        if self.max_bytes is not None:
            most = max(1, self.max_bytes // pragma(self.db, "page_size"))
            self.db.execute("PRAGMA max_page_count = %d" % most)
        if fresh:
            self.db.executescript(SCHEMA)
        elif version < SCHEMA_VERSION:
            self.run_migrations()
        self.check_rest()

    def run_migrations(self) -> None:
        """Run the missing migrations in one transaction. Closing the connection undoes a half."""
        log("updating_database", to_version=SCHEMA_VERSION)  # a million rows take about 12 s
        self.db.execute("BEGIN IMMEDIATE")
        version = pragma(self.db, "user_version")  # anew: another server may have been faster
        for migration in MIGRATIONS:
            if migration.version > version:
                for statement in statements(migration.script):
                    self.run_migration(statement)
                self.db.execute("PRAGMA user_version = %d" % migration.version)
        self.db.execute("COMMIT")

    def run_migration(self, statement: str) -> None:
        try:
            self.db.execute(statement)
        except sqlite3.IntegrityError as error:
            if "UNIQUE" not in str(error):
                raise
            raise StartError("%s has rows of the same identity_hash and session_id_hash: delete all"
                             " but one of each" % self.path) from None

    def columns(self) -> List[Column]:
        """The columns of session_events; an empty list where there is no such table."""
        return [Column(name, kind.upper(), bool(not_null), default is not None, key)
                for _, name, kind, not_null, default, key
                in self.db.execute("PRAGMA table_info(session_events)")]

    def check_table(self, version: int) -> None:
        """Raises StartError unless events fit into session_events, whoever made it.

        `version` is the file's own. The table needs the columns that this version has.
        """
        columns = self.columns()
        wanted = [name for migration in MIGRATIONS if migration.version <= max(version, 1)
                  for name in migration.columns]
        missing = set(wanted) - {column.name for column in columns}
        if missing:
            raise StartError(
                "%s has no table session_events with a column %s: it is not this program's"
                % (self.path, min(missing)))
        faults = []
        if [(column.name, column.kind) for column in columns if column.key] != [("id", "INTEGER")]:
            faults.append("in which id is not INTEGER PRIMARY KEY")
        faults += ["in which column %s is NOT NULL" % shown(column.name) for column in columns
                   if column.not_null and (column.name in NULLABLE or (
                       column.name not in wanted and not column.has_default))]
        # ON CONFLICT DO NOTHING would drop another event under it and still answer 202.
        faults += ["with a unique index on (%s)" % ", ".join(map(shown, sorted(key)))
                   for key in self.unique_keys() if not key >= {"identity_hash", "session_id_hash"}]
        if faults:
            raise StartError("%s has a table session_events %s: not every event can be stored in it"
                             % (self.path, faults[0]))

    def unique_keys(self) -> List[Set[str]]:
        """The columns of each unique index of session_events, apart from partial ones."""
        unique = [row[1] for row in self.db.execute("PRAGMA index_list(session_events)")
                  if row[2] and not row[4]]
        return [{str(row[0]) for row in self.db.execute(
            "SELECT name FROM pragma_index_info(?)", (name,))} for name in unique]

    def check_rest(self) -> None:
        """Raises StartError unless the unique index, the edges and the triggers are all there."""
        names = {row[0] for row in self.db.execute("SELECT name FROM sqlite_master")}
        wanted = re.findall(
            r"CREATE (?:TABLE|TRIGGER|INDEX|UNIQUE INDEX) IF NOT EXISTS (\w+)", SCHEMA)
        missing = [name for name in wanted if name not in names]
        if missing or {"identity_hash", "session_id_hash"} not in self.unique_keys():
            raise StartError("%s is not whole: %s is missing; sqlite3 FILE < schema.sql adds it" % (
                self.path, missing[0] if missing
                else "the unique index on (identity_hash, session_id_hash)"))

    def check_writable(self) -> None:
        """Raises sqlite3.Error where this user may only read the file."""
        try:
            self.db.execute("BEGIN IMMEDIATE")
            self.db.execute("ROLLBACK")
        except sqlite3.OperationalError as error:
            if "readonly" in str(error):
                raise  # what else it is passes, and a write will say it

    def check_pepper(self) -> None:
        """Note the pepper's fingerprint. Raises StartError where the file has another pepper.

        With another pepper, or without one, everybody would be somebody else from now on.
        """
        own = fingerprint(self.pepper) if self.pepper is not None else ""
        if own and not noted_peppers(self.db):
            self.db.execute("BEGIN IMMEDIATE")
            if not noted_peppers(self.db):  # anew: another server may have been faster
                self.db.execute(
                    "CREATE TABLE IF NOT EXISTS session_events_pepper (fingerprint TEXT)")
                self.db.execute("INSERT INTO session_events_pepper VALUES (?)", (own,))
            self.db.execute("COMMIT")
        noted = noted_peppers(self.db)
        if noted and noted[-1] != own:
            raise StartError(
                "%s was made with %s pepper: put that back as --pepper-file, or begin a new"
                " database" % (self.path, "another" if own else "a"))

    def check_files(self) -> None:
        """Raises Unavailable unless the open files are known to be those at their paths.

        What is written to a deleted file is lost.
        """
        self.moved = True  # so it is while nobody can tell
        try:
            self.moved = any(file_identity(name) != found for name, found in self.files.items())
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            raise Unavailable("cannot tell whether the database is still in its place: %s"
                              % error.strerror) from None
        if self.moved:
            raise Unavailable("the database or its -wal file was deleted, replaced or emptied while"
                              " in use: put it back, or restart the server")

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """A transaction, durable when the block ends. Otherwise it is undone: Unavailable."""
        if self.fault:
            self.reopen()
        if self.moved:
            self.check_files()
        try:
            self.db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self.db.execute("COMMIT")
            finally:
                if self.db.in_transaction:
                    self.db.execute("ROLLBACK")
        except sqlite3.Error as error:
            words = str(error)
            if "disk is full" in words and self.max_bytes is not None:
                words += ", or it has reached --max-db-bytes"
            raise Unavailable(words) from None
        # Checked after the commit: so it also covers a file that was deleted during the commit.
        self.check_files()

    def write(self, rows: List[Row], sweep: int = 0) -> Written:
        """Store the rows of a turn in one transaction, durable on return.

        Raises Unavailable when none is stored. In the same transaction up to `sweep` of the rows
        that are older than `retain_days` are deleted: that costs no fsync of its own.
        """
        received_at = stamp_of(int(time.time()))
        hidden = [self.hide(row) for row in rows] if self.pepper else rows
        try:
            with self.transaction():
                self.pages_left_then = self.pages_left()  # and so it stays when the rows do not fit
                # The deletion comes first: at the size limit, it makes the room.
                swept = self.sweep.delete(sweep) if self.sweep and sweep else 0
                stored, refused, undone = self.insert([(*row, received_at) for row in hidden])
        except Unavailable:
            if self.sweep:
                self.sweep.pause(TICK)
            raise
        if rows or swept:
            self.pages_left_then = -1
        if self.checkpoints:
            self.checkpoints.count(stored + swept)
        return Written(stored, refused, 0 if undone else swept)

    def insert(self, rows: List[Tuple[Any, ...]]) -> Tuple[int, Dict[int, Exception], bool]:
        """Insert all rows in one call or, when the database refuses one of them, each by itself.

        Returns how many were new, {place: message} of the refused rows, and whether the work before
        it in the transaction was undone.
        """
        try:
            return self.db.executemany(INSERT_ALL, rows).rowcount, {}, False
        except (sqlite3.Error, ValueError) as error:
            if passing(error):
                raise
        refused: Dict[int, Exception] = {}
        stored = None
        while stored is None:
            if self.db.in_transaction:
                self.db.execute("ROLLBACK")
            self.db.execute("BEGIN IMMEDIATE")
            stored = self.insert_each(rows, refused)
        return stored, refused, True

    def insert_each(self, rows: List[Tuple[Any, ...]],
                    refused: Dict[int, Exception]) -> Optional[int]:
        """Insert the rows that are not in `refused`, and add newly refused ones to it.

        Returns how many were new, or None when a refused row rolled back the transaction.
        """
        stored = 0
        for place, row in enumerate(rows):
            if place not in refused:
                try:
                    stored += self.db.execute(INSERT_ONE, row).rowcount
                except (sqlite3.Error, ValueError) as error:
                    if passing(error):
                        raise
                    refused[place] = error
                    if not self.db.in_transaction:
                        return None
        return stored

    def hide(self, row: Row) -> Row:
        hidden = functools.partial(peppered, self.pepper or b"")
        identity, github, session, *rest = row
        return (  # type: ignore[return-value]
            hidden(identity), github and hidden(github), hidden(session), *rest)

    def after_turn(self) -> None:
        """Work that can wait until the answers of a turn have left."""
        if self.checkpoints and not self.moved and self.checkpoints.go_on(self.db):
            self.fit_cache()

    def fit_cache(self) -> None:
        """Set the size of the page cache, which depends on the size of the file."""
        with contextlib.suppress(sqlite3.Error):  # a write will say it
            cache = LARGE_CACHE if self.pages_size() > LARGE_FILE else SMALL_CACHE
            if cache != self.cache:
                self.db.execute("PRAGMA cache_size = -%d" % cache)
                self.cache = cache

    def pages_size(self) -> int:
        """Bytes of the database without its WAL. Raises sqlite3.Error."""
        return pragma(self.db, "page_count") * pragma(self.db, "page_size")

    def size(self) -> int:
        """Bytes of the database and its WAL."""
        total = 0
        with contextlib.suppress(sqlite3.Error):  # a database that cannot be read yet
            total = self.pages_size()
        with contextlib.suppress(OSError):
            total += 0 if self.in_memory else os.stat(self.path + "-wal").st_size
        return total

    def pages_left(self) -> int:
        """Pages that may still be filled before `max_bytes` is reached; -1 without such a limit."""
        if self.max_bytes is None:
            return -1
        used = pragma(self.db, "page_count") - pragma(self.db, "freelist_count")
        return pragma(self.db, "max_page_count") - used

    def probe(self) -> None:
        """Commit a transaction that writes a page and changes nothing. Raises Unavailable."""
        with self.transaction():
            if self.max_bytes and self.pages_left() <= self.pages_left_then < LARGEST_EVENT:
                raise sqlite3.OperationalError("database or disk is full")  # SQLite's words for it
            self.db.execute("PRAGMA user_version = %d" % pragma(self.db, "user_version"))

    def close(self) -> None:
        if self.checkpoints:
            self.checkpoints.close()
        # An error here loses nothing: all is durable in the WAL, which the next start reads.
        with contextlib.suppress(sqlite3.Error):
            self.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self.db.close()
        if self.checkpoints:
            self.checkpoints.close_file()


NEXT_ROWS = ("SELECT id, received_at FROM session_events"
             " WHERE id > ? AND id <= ? ORDER BY id LIMIT ?")
NEXT_OLD_IDS = "SELECT id FROM session_events WHERE id <= ? ORDER BY id LIMIT ?"

# A turn that stores rows deletes a quarter more than it stores, so that a sweep always gains. Such
# a turn takes 1.9 times as long (a row costs 64 us to store, 45 to delete).
SWEEP_SHARE = 1.25
SWEEP_QUIET = 0.01  # seconds without a request, after which turns delete that store nothing
SWEEP_PIECE = 16  # rows that such a turn deletes, in 1 ms: a request may have to wait so long
SWEEP_ALONE = 256  # rows deleted in a turn before it tries to store rows that did not fit
SWEEP_LOOK = 256  # rows whose stamps are looked at in one turn
SWEEP_EVERY = 60.0  # seconds until the next look, once all that is due is gone
CLOCK_EVERY = 1.0  # seconds between looks at the clocks


class Sweep:
    """Deletes what was received over `days` ago, some rows in each turn.

    `db` is the store's connection, and the turn's transaction is open when rows are deleted.
    """

    def __init__(self, db: sqlite3.Connection, days: int) -> None:
        self.db = db
        newest = db.execute("SELECT max(received_at) FROM session_events").fetchone()[0]
        self.retention = Retention(
            days * DAY, None if newest is None else unix_seconds(newest), last_id(db),
            time.time(), steady_clock())
        self.next_at = self.clock_at = 0.0  # when to delete again, and to look at the clocks again
        self.waits: Optional[str] = None  # why nothing is deleted now; None: not known yet
        self.said: Set[str] = set()  # the reasons that are in the log already
        self.cutoff = self.present = ""  # stamps: rows before are old, rows behind from the future
        self.looked, self.old_to = Looked(), LEAST_ID
        self.owed = 0.0  # rows: what is left of SWEEP_SHARE of those that were stored

    def due(self, now: float, rows: int, quiet: float) -> int:
        """How many old rows a turn that stores `rows` has to delete.

        `now` is monotonic; `quiet` is the number of seconds since the last answer.
        """
        if now >= self.clock_at:
            self.clock_at = now + CLOCK_EVERY
            try:
                self.look_at_clocks()
            except sqlite3.Error:  # a write will say it
                self.waits = None
        if self.waits != "" or now < self.next_at:
            return 0
        if rows:
            self.owed += rows * SWEEP_SHARE
            whole = int(self.owed)
            self.owed -= whole
            return whole
        return SWEEP_PIECE if quiet >= SWEEP_QUIET else 0

    def waiting_time(self, now: float, most: float, quiet: float) -> float:
        """How many seconds the loop may wait for requests, at most `most`."""
        due = self.clock_at if self.waits != "" else self.next_at
        return min(most, max(due - now, SWEEP_QUIET - quiet, 0.0))

    def pause(self, seconds: float) -> None:
        """Delete nothing for some seconds. Until they are over, a further call changes nothing.

        So turns that fail one after another do not put the deletion off for ever.
        """
        now = time.monotonic()
        if now >= self.next_at:
            self.next_at = now + seconds

    def look_at_clocks(self) -> None:
        """Find out whether rows may be deleted now. Each reason against it is logged once."""
        wall, steady = time.time(), steady_clock()
        reason = self.retention.reason_to_wait(wall, steady)
        self.cutoff, self.present = stamp_of(wall - self.retention.seconds), stamp_of(wall)
        self.retention.received(last_id(self.db), steady)
        if not reason and self.waits != "":
            self.said.clear()
            log("sweep_begins")
        self.waits = reason
        if reason:
            self.say("sweep_waits", reason)

    def say(self, event: str, reason: str) -> None:
        if reason not in self.said:
            self.said.add(reason)
            log(event, reason=reason)

    def delete(self, most: int) -> int:
        """Delete up to `most` of the rows that are older than `days`; returns how many."""
        try:
            return self.delete_next(most)
        except sqlite3.Error as error:
            if passing(error):
                raise
            # For example another program's trigger. The turn's rows are not the cause.
            self.say("sweep_failed", type(error).__name__)
            self.pause(SWEEP_EVERY)
            if not self.db.in_transaction:
                self.db.execute("BEGIN IMMEDIATE")
            return 0

    def delete_next(self, most: int) -> int:
        """Delete up to `most` rows that are known to be old, and look for more when there are few.

        Rows go in the order of their ids, and so do their pages: only the two indexes that start
        with an identity have to be searched.
        """
        shipped, fault = shipped_to(self.db)  # each time: a new destination's mark begins at 0
        ids = self.db.execute(NEXT_OLD_IDS, (min(self.old_to, shipped), most)).fetchall()
        if len(ids) < most:
            ended = self.look_for_old(max(most, SWEEP_LOOK), shipped, fault)
            ids = self.db.execute(NEXT_OLD_IDS, (min(self.old_to, shipped), most)).fetchall()
            if ended and len(ids) < most:
                self.pause(SWEEP_EVERY)
        if not ids:
            return 0
        return self.db.execute("DELETE FROM session_events WHERE id <= ?", ids[-1]).rowcount

    def look_for_old(self, most: int, shipped: int, fault: str) -> bool:
        """Look at the stamps of up to `most` further rows; True when there are no more."""
        last = min(self.retention.oldest_young_id() - 1, shipped)
        rows = self.db.execute(NEXT_ROWS, (self.looked.seen, last, most)).fetchall()
        looked = self.looked = old_rows(rows, self.looked, self.cutoff, self.present)
        ended = looked.young or len(rows) < most
        # The last old row stays while rows without a usable stamp follow it: it shows, also after a
        # restart, that they are younger.
        if looked.old > LEAST_ID:
            self.old_to = looked.old if ended and looked.seen == looked.old else looked.old - 1
        if not looked.young and last == shipped:
            following = self.db.execute(NEXT_ROWS, (shipped, MOST_ID, 1)).fetchall()
            if old_rows(following, Looked(), self.cutoff, self.present).old > shipped:
                self.say("sweep_waits",
                         fault or "old rows are not shipped yet (table ship_marks)")
        return ended


def last_id(db: sqlite3.Connection) -> int:
    """The highest id of the table, 0 for an empty one."""
    return db.execute("SELECT max(id) FROM session_events").fetchone()[0] or 0


def shipped_to(db: sqlite3.Connection) -> Tuple[int, str]:
    """The last id that every destination has confirmed, and what is wrong with the marks.

    Without marks it is MOST_ID: nobody ships. Where the marks cannot be read it is LEAST_ID, so
    that nothing is deleted.
    """
    try:
        count, whole, least = db.execute(
            "SELECT count(*), total(typeof(last_id) = 'integer'), min(last_id)"
            " FROM ship_marks").fetchone()
    except sqlite3.OperationalError as error:
        if str(error) == "no such table: ship_marks":
            return MOST_ID, ""
        if passing(error):
            raise
        return LEAST_ID, "the table ship_marks cannot be read"
    if not count:
        return MOST_ID, ""
    return (least, "") if whole == count else (LEAST_ID, "a mark in ship_marks is no number")


def unshipped(db: sqlite3.Connection) -> Optional[int]:
    """How many ids wait to be shipped; None where nobody ships or nothing can be read."""
    try:
        shipped, _fault = shipped_to(db)
        first, last = db.execute(
            "SELECT (SELECT min(id) FROM session_events), (SELECT max(id) FROM session_events)"
        ).fetchone()
    except sqlite3.Error:
        return None
    if shipped == MOST_ID:
        return None
    return 0 if last is None else max(0, last - max(shipped, first - 1))


CHECKPOINT_PAGES = 12_000  # in the WAL (47 MB) when it is moved into the database
# Estimated pages that a commit appends to the WAL, and that each of its rows adds. Measured for a
# row: 10 to 12 in a commit of one, 4 of 32 in a large table, 2 of 256 in a small table. So the
# estimate is wrong by a factor of two at most.
COMMIT_PAGES, ROW_PAGES = 8, 4
PASSES = 6  # of one checkpoint: each moves what was appended during the one before it
FEW_PAGES = 500  # in the WAL that the writer moves itself, in 2 to 5 ms


class Checkpointed(NamedTuple):
    """What the thread reports of a checkpoint."""
    pages: int  # in the WAL when it began; 0: unknown
    stuck: bool  # a reader, another process or a fault keeps pages in the WAL
    fault: str  # SQLite's words, or empty


class Checkpoints:
    """Moves the WAL (the -wal file) into the database while the loop goes on.

    A thread of its own moves most pages, with PRAGMA wal_checkpoint(PASSIVE). That never waits for
    a writer and never makes one wait. The writer goes on appending meanwhile. So the writer moves
    the few pages that are left, between two turns. With the WAL empty, its next commit begins at
    the start of the file. Overwriting a file also costs a commit less than growing it: 0.23 ms and
    0.31.

    There are no locks: the thread touches its own connection, its own descriptor and the two
    queues, nothing else. It has no part in what is durable: the WAL keeps pages until SQLite has
    synced them.

    Nothing tells how long the WAL is but a checkpoint. So its length is estimated from the rows
    that were written, and corrected by what each checkpoint reports.
    """

    def __init__(self, path: str) -> None:
        self.path, self.file = path, -1
        # Opened now and not when it is needed: later another file might be at `path`. The table is
        # read so that SQLite opens the WAL as well.
        self.db = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
        try:
            self.db.execute("SELECT 1 FROM session_events LIMIT 1").fetchone()
        except BaseException:
            self.db.close()
            raise
        self.wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()  # False: end
        self.reports: queue.SimpleQueue[Checkpointed] = queue.SimpleQueue()
        self.thread: Optional[threading.Thread] = None
        self.under_way = False
        # Estimated pages: in the WAL, in it when the checkpoint began, and when the next is due.
        self.pages, self.asked, self.due = 0, 0, CHECKPOINT_PAGES
        self.emptied = True  # the WAL was empty before the rows that `pages` counts
        self.fault = ""

    def count(self, rows: int) -> None:
        """Take note of a commit of `rows` rows."""
        if rows:
            self.pages += COMMIT_PAGES + ROW_PAGES * rows

    def go_on(self, writer: sqlite3.Connection) -> bool:
        """Begin a checkpoint when it is time, or finish the one that the thread has done.

        True when one was finished.
        """
        if self.under_way:
            if not self.reports.empty():
                self.finish(writer, self.reports.get())
                return True
        elif self.pages >= self.due:
            self.asked, self.pages = self.pages, 0
            try:
                self.start()
            except RuntimeError as error:  # no more threads: the commits do it, at their 32,000
                self.note(str(error))
                return False
            self.under_way = True
            self.wanted.put(True)
        return False

    def start(self) -> None:
        """Start the thread. Raises RuntimeError when the system has none left."""
        if self.thread is None:
            thread = threading.Thread(target=self.run, name="checkpoints", daemon=True)
            thread.start()
            self.thread = thread

    def note(self, fault: str) -> None:
        """Log a line when a fault begins and when it ends."""
        if fault != self.fault:
            self.fault = fault
            log("checkpoint_failed" if fault else "checkpoint_done",
                **({"reason": fault} if fault else {}))

    def finish(self, writer: sqlite3.Connection, moved: Checkpointed) -> None:
        """Move what the thread left, and estimate when the WAL will be as long again."""
        self.under_way = False
        self.note(moved.fault)
        if moved.pages and self.emptied:
            due = self.asked * CHECKPOINT_PAGES // moved.pages
            self.due = min(max(CHECKPOINT_PAGES // 4, due), CHECKPOINT_PAGES * 2)
        self.emptied = False
        if not moved.stuck:
            with contextlib.suppress(sqlite3.Error):  # the thread will see it too, and say it
                busy, pages, done = passive_checkpoint(writer)
                self.emptied = not busy and pages == done

    # -- on the thread ---------------------------------------------------------------------------

    def run(self) -> None:
        while self.wanted.get():
            self.reports.put(self.move())

    def move(self) -> Checkpointed:
        """Move pages until few are left, or a reader is in the way."""
        first = before = 0
        last = -1
        try:
            for _ in range(PASSES):
                busy, pages, done = passive_checkpoint(self.db)
                first = first or max(pages, 0)
                if busy or last == done < pages:
                    return Checkpointed(first, True, "")
                self.sync()
                # A transaction of the writer looks like a reader, but is over by the next pass.
                if done == pages <= before + FEW_PAGES or not self.wanted.empty():
                    break
                before, last = pages, done
        except (sqlite3.Error, OSError) as error:
            return Checkpointed(0, True, getattr(error, "strerror", None) or str(error))
        return Checkpointed(first, False, "")

    def sync(self) -> None:
        """fsync what a pass wrote into the database. Raises OSError.

        SQLite does that itself only in a pass during which nothing was appended. That would be one
        of the writer's, and with 10 million rows it took 100 to 150 ms.
        """
        if self.file < 0:
            self.file = os.open(self.path, os.O_RDWR)
        os.fsync(self.file)

    # -- on the loop's thread again --------------------------------------------------------------

    def close(self) -> None:
        """Wait for the pass that is under way, and end the thread."""
        if self.thread:
            self.wanted.put(False)
            self.thread.join()
        self.db.close()

    def close_file(self) -> None:
        """Close the descriptor.

        Last of all, when every connection is closed: it ends this process's locks on the file.
        """
        if self.file >= 0:
            os.close(self.file)


def passive_checkpoint(db: sqlite3.Connection) -> Tuple[int, int, int]:
    """Move pages without waiting: (1 if another process is doing it, pages in the WAL, moved)."""
    busy, pages, moved = db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
    return busy, pages, moved


def steady_clock() -> float:
    """Seconds that go on while the machine sleeps, where the system has such a clock."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


def load_pepper(path: str) -> bytes:
    """The secret in `path`. Raises StartError."""
    try:
        with open(path, "rb") as found:
            if os.name == "posix" and os.fstat(found.fileno()).st_mode & 0o077:
                raise StartError("others can read the pepper in %s: chmod 600 it" % path)
            pepper = found.read(4096).strip()
    except OSError as error:
        raise StartError(
            "cannot use the pepper file %s: %s" % (path, error.strerror)) from None
    if len(pepper) < 32:
        raise StartError("the pepper in %s is under 32 bytes: put the right file there" % path)
    return pepper


def make_pepper(path: str) -> bytes:
    """A new secret in `path`, readable by its owner only, or the one of another process that was
    faster. Raises StartError."""
    try:
        # A folder, so that half a pepper never stands in the way of a whole one.
        with tempfile.TemporaryDirectory(
                ".partial", ".pepper-", os.path.dirname(os.path.abspath(path))) as folder:
            made = os.path.join(folder, "pepper")
            descriptor = os.open(made, os.O_WRONLY | os.O_CREAT, 0o600)
            with open(descriptor, "w", encoding="ascii") as file:
                file.write(os.urandom(32).hex() + "\n")
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):
                claim_name(made, path)
        with contextlib.suppress(OSError):  # not every system can do that to a folder
            sync(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
    except OSError as error:
        raise StartError(
            "cannot make the pepper file %s: %s" % (path, error.strerror)) from None
    return load_pepper(path)


def peppered(pepper: bytes, digest: str) -> str:
    """What is stored in place of a hash."""
    return hmac.digest(pepper, digest.encode("ascii"), "sha256").hex()


def fingerprint(pepper: bytes) -> str:
    """What a file says of its pepper: it tells nothing about a secret of 32 random bytes.

    `ship` compares it between nodes.
    """
    return peppered(pepper, "session-events pepper")[:16]


def noted_peppers(db: sqlite3.Connection) -> List[str]:
    """The fingerprints of the peppers that a file was written with. Raises sqlite3.Error."""
    try:
        return [str(row[0]) for row in db.execute(
            "SELECT fingerprint FROM session_events_pepper ORDER BY rowid")]
    except sqlite3.OperationalError as error:
        if "no such table" in str(error):
            return []
        raise


def passing(error: Exception) -> bool:
    # An IntegrityError is about a row. Its message may come from another program's trigger.
    return (isinstance(error, sqlite3.Error) and not isinstance(error, sqlite3.IntegrityError)
            and any(words in str(error) for words in PASSING))


def file_identity(path: str) -> Tuple[int, int]:
    """(device, inode). Raises OSError; a database without a byte counts as not there."""
    status = os.stat(path)
    if not status.st_size and not path.endswith("-wal"):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    return status.st_dev, status.st_ino


# ==================================================================================================
# The database file: backup and forget, beside a running server
# ==================================================================================================

SIDE_FILES = ("", "-wal", "-shm", "-journal")  # what SQLite appends to the database's name
PIECE = 16  # hex digits: so much of a hash in a file counts as a copy of it
DELETE_BATCH = 100  # rows in a transaction, during which the server cannot write: about 10 ms
READ_BATCH = 20_000  # rows read at a time
NEIGHBOURS = 50  # rows on either side of a deleted one that are written anew
BUSY_SECONDS = 30.0  # how long a command tries to get the write lock
EMPTYING_SECONDS = 60.0  # how long it tries to empty the -wal file: no reader may be in it
CHUNK = 4 << 20  # bytes of a file in memory while it is searched
FORGOTTEN = ("identity_hash IN (SELECT hash FROM forgotten)"
             " OR github_hash IN (SELECT hash FROM forgotten)")


class CommandError(Exception):
    """A command on the file could not be completed. The text is one line for the operator."""


class Interrupted(Exception):
    """A signal ended the command. Its argument is the signal's number."""


class Command:
    """A command on the file while it runs: it shows how far it is, and can be ended in order."""

    def __init__(self) -> None:
        self.received = 0  # the number of the signal that asks this process to end
        self.terminal = bool(sys.stderr) and sys.stderr.isatty()  # there, one line that changes
        self.every = 0.2 if self.terminal else 5.0  # seconds between two lines
        self.due = time.monotonic() + self.every

    def catch_signals(self) -> None:
        """From now on signals do not end the process: check() raises Interrupted instead."""
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            signum = getattr(signal, name, None)
            if signum is not None and signal.getsignal(signum) != signal.SIG_IGN:  # nohup
                signal.signal(signum, self.note_signal)

    def note_signal(self, signum: int, *_: Any) -> None:
        self.received = signum

    def check(self) -> None:
        """Raises Interrupted when a signal has come."""
        if self.received:
            raise Interrupted(self.received)

    def show(self, text: str) -> None:
        """Print `text` on standard error, unless the last line was just printed."""
        if time.monotonic() >= self.due:
            self.due = time.monotonic() + self.every
            self.write("\r\x1b[K" + text if self.terminal else text + "\n")

    def say(self, text: str) -> None:
        """Print `text` now, as a line of its own."""
        self.clear()
        self.write(text + "\n")

    def clear(self) -> None:
        """Empty the line on the terminal."""
        if self.terminal:
            self.write("\r\x1b[K")

    def write(self, text: str) -> None:
        if sys.stderr:
            with contextlib.suppress(OSError):  # nobody reads it: the command goes on
                sys.stderr.write(text)
                sys.stderr.flush()


def open_existing(path: str) -> sqlite3.Connection:
    """A connection to a database with session events. Raises StartError; makes no file."""
    if path == ":memory:":
        raise StartError("--db :memory: is no file: there is nothing to back up or to delete from")
    try:
        os.stat(path)
    except OSError as error:
        raise StartError("cannot use %s: %s" % (path, error.strerror)) from None
    uri = pathlib.Path(os.path.realpath(path)).as_uri() + "?mode=rw"
    try:
        db = sqlite3.connect(uri, uri=True, timeout=1.0, isolation_level=None)
        try:
            columns = {row[1] for row in db.execute("PRAGMA table_info(session_events)")}
            if not columns >= {"id", "identity_hash", "github_hash"}:
                raise StartError("%s holds no session events" % path)
        except BaseException:
            db.close()
            raise
    except sqlite3.Error as error:
        raise StartError("cannot use %s: %s" % (path, error)) from None
    return db


def back_up(path: str, target: str, command: Command) -> None:
    """Write a copy of the database at `path` to `target`, which must not exist.

    The copy holds one moment: every event that was answered 202 before the call. It appears under
    its name when it is complete and on the disk. Raises StartError before anything is copied,
    CommandError and Interrupted later; then nothing is left behind.
    """
    source = os.path.realpath(path)
    if os.path.realpath(target) in [source + suffix for suffix in SIDE_FILES]:
        raise StartError("%s is one of the database's own files: name another" % target)
    if os.path.lexists(target):
        raise StartError("%s is there already: name a new file, or delete that one" % target)
    started, folder = time.monotonic(), os.path.dirname(os.path.abspath(target))
    with contextlib.closing(open_existing(path)) as db:
        with scratch_folder(folder, command) as partial:
            copy = os.path.join(partial, "copy")
            try:
                os.close(os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
                vacuum_into(db, copy, command)
                sync(copy, os.O_RDWR)
                size = os.path.getsize(copy)  # now: somebody may take the copy away at once
                command.check()
                claim_name(copy, target)
            except FileExistsError:
                raise CommandError("%s appeared meanwhile: it was left as it is" % target) from None
            except (OSError, sqlite3.Error) as error:
                command.check()  # an interrupted statement is an error too
                raise CommandError("cannot copy %s to %s: %s" % (
                    path, target, getattr(error, "strerror", None) or error)) from None
    with contextlib.suppress(OSError):  # not every system can do that to a folder
        sync(folder, os.O_RDONLY)
    command.clear()
    print_line("%s: %d MB in %.1f s" % (target, size >> 20, time.monotonic() - started))


@contextlib.contextmanager
def scratch_folder(folder: str, command: Command) -> Iterator[str]:
    """A new folder in `folder`, so that whatever SQLite puts beside the copy goes together with it.

    Raises StartError. Where the disk does not let it be deleted, a line says so.
    """
    try:
        partial = tempfile.mkdtemp(".partial", ".backup-", folder)  # see is_left_behind
    except OSError as error:
        raise StartError("cannot write in %s: %s" % (folder, error.strerror)) from None
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if os.path.lexists(partial):
            command.say("%s could not be deleted: delete it" % partial)


def vacuum_into(db: sqlite3.Connection, copy: str, command: Command) -> None:
    """Copy the database of `db` into the empty file `copy`, from one read transaction.

    Connection.backup copies pages, and with them what is left of deleted rows in free pages and in
    unused parts of pages: a copy would bring back what --forget removed. VACUUM INTO copies rows.
    It takes longer: 3.6 s for a million rows under load, where Connection.backup takes 1.4 s in one
    step, and 3.2 s in steps of 2,000 pages, which can show progress and be interrupted. What comes
    in meanwhile stays in the -wal file: 0.4 GB more beside this, 0.2 GB beside the other.
    """
    pages, free, page_size = (pragma(db, name) for name in (
        "page_count", "freelist_count", "page_size"))
    megabytes = max(1, (pages - free) * page_size >> 20)

    def step() -> int:
        done = min(os.path.getsize(copy) >> 20, megabytes)
        command.show("backup: %d of %d MB (%d%%)" % (done, megabytes, 100 * done // megabytes))
        return command.received  # not 0 ends the statement

    db.set_progress_handler(step, 20_000)  # steps of SQLite's machine: about 2 ms
    db.execute("VACUUM INTO ?", (copy,))


def sync(path: str, flags: int) -> None:
    """fsync a file or folder."""
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def claim_name(path: str, target: str) -> None:
    """Give the file the name `target`. Raises FileExistsError where that is taken."""
    try:
        os.link(path, target)  # a rename would replace another process's new file
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if os.path.lexists(target):
            raise FileExistsError from None
        os.rename(path, target)


# What `emit.py mine` prints beside the hashes.
_word_of_mine = re.compile("[0-9]{4}Q[1-4]|identity_hash|github_hash").fullmatch


def read_hashes(path: str, words: Sequence[str], pepper_file: Optional[str]) -> List[str]:
    """The hashes of --forget as the database has them. Raises StartError, which quotes no hash.

    `-` stands for those on standard input: hashes alone, or the lines of `emit.py mine`.
    """
    hashes: List[str] = []
    for word in words:
        if word != "-":
            hashes.append(word)
        elif sys.stdin:
            read = sys.stdin.buffer.read().decode("ascii", "replace").split()
            hashes += [text for text in read if not _word_of_mine(text)]
    if not hashes:
        raise StartError("--forget -: there is no hash on standard input")
    for place, text in enumerate(hashes):
        if not re.fullmatch(FIELDS[0][3], text):  # an identity_hash
            raise StartError("--forget takes hashes of 64 lowercase hex digits, and number %d is"
                             " none" % (place + 1))
    pepper = load_pepper(pepper_file) if pepper_file else None
    with contextlib.closing(open_existing(path)) as db:
        noted = noted_peppers(db)
    if noted and not pepper:
        raise StartError("%s was made with a pepper: give its --pepper-file here too" % path)
    if pepper:
        if fingerprint(pepper) not in noted:
            raise StartError("%s has no rows that were stored with the pepper in %s"
                             % (path, pepper_file))
        # Rows may have been stored before there was a pepper.
        hashes = [peppered(pepper, text) for text in hashes] + hashes
    return list(dict.fromkeys(hashes))


def forget(path: str, hashes: Sequence[str], command: Command) -> None:
    """Delete every event whose identity or GitHub hash is one of `hashes`, and all copies of them.

    `hashes` are as the database has them. Standard output gets the statement that does the same in
    ClickHouse. Raises StartError, CommandError when copies are left, and Interrupted.
    """
    folder, name = os.path.split(os.path.realpath(path))
    unprinted = ""
    for rewrite in (False, True):
        with contextlib.closing(open_existing(path)) as db:
            try:
                deleted = delete_events(db, hashes, command)
                if deleted or not rewrite:
                    command.say("deleted %s" % counted(deleted, "event"))
                if not rewrite:
                    unprinted = print_line(clickhouse_statement(hashes))
                else:
                    rewrite_file(db, folder, command)
                empty_log(db, command)
            except sqlite3.Error as error:
                command.check()  # an interrupted statement is an error too
                raise CommandError(
                    "cannot write %s: %s; run the command again%s" % (
                        path, error, " (this takes twice the file's size in free disk space)"
                        if rewrite else "")) from None
        # Only now: a process that closes any descriptor of the file loses SQLite's locks on it.
        left = files_with(folder, hashes, command)
        if not any(name + suffix in left for suffix in SIDE_FILES):
            break
        if not rewrite:
            command.say("copies are left in unused parts of the file: all of it is written anew,"
                         " and meanwhile the server answers 503")
    if left:
        raise CommandError(
            "copies are left in %s. If that is a backup, delete it, or run --forget with --db on"
            " it. If it is this database, a client may still send such events, or another program's"
            " table has the hash: stop that, and run --forget again"
            % ", ".join(map(shown, left)))
    if unprinted:
        raise CommandError("the statement for ClickHouse could not be printed: %s" % unprinted)


def print_line(text: str) -> str:
    """Print on standard output. Returns the error, or "": it undoes nothing."""
    if sys.stdout is None:
        return "standard output is closed"
    encoding = sys.stdout.encoding or "ascii"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError as error:
        # Otherwise Python would try again at its end, and fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return str(error.strerror)
    return ""


def counted(count: int, word: str) -> str:
    return "%d %s%s" % (count, word, "" if count == 1 else "s")


def delete_events(db: sqlite3.Connection, hashes: Sequence[str], command: Command) -> int:
    """Delete the events of `hashes` in short transactions; returns how many there were."""
    for setting in ("temp_store = MEMORY", "secure_delete = ON"):
        db.execute("PRAGMA " + setting)
    db.execute("CREATE TEMP TABLE forgotten (hash TEXT PRIMARY KEY) WITHOUT ROWID")
    db.executemany("INSERT INTO forgotten VALUES (?)", [(text,) for text in hashes])
    found, deleted = find_events(db, command), 0
    for start in range(0, len(found), DELETE_BATCH):
        command.show("deleted %d of %d events" % (deleted, len(found)))
        with write_lock(db, command):
            deleted += db.executemany(
                "DELETE FROM session_events WHERE id = ? AND (%s)" % FORGOTTEN,
                [(event_id,) for event_id in found[start:start + DELETE_BATCH]]).rowcount
    for text in hashes:
        rewrite_neighbours(db, text, command)
    return deleted


def find_events(db: sqlite3.Connection, command: Command) -> List[int]:
    """The ids of the events whose hashes are in the table `forgotten`.

    No index has the GitHub hash, so all rows are read. That goes in many short reads, since the
    -wal file grows as long as a read lasts.
    """
    query = "SELECT id, %s FROM session_events WHERE id > ? ORDER BY id LIMIT ?" % FORGOTTEN
    found: List[int] = []
    last, looked = LEAST_ID, 0
    while True:
        command.check()
        command.show("looked at %d events" % looked)
        rows = db.execute(query, (last, READ_BATCH)).fetchall()
        if not rows:
            return found
        found += [event_id for event_id, wanted in rows if wanted]
        last, looked = rows[-1][0], looked + len(rows)


def execute_in_turn(db: sqlite3.Connection, statement: str, command: Command) -> None:
    """Execute a statement that begins with taking the write lock, when that is free.

    SQLite gives the lock out in no order, and its own timeout looks every 100 ms. A server on a
    slow disk leaves it free for about a millisecond between two commits. So this looks as often.
    """
    end, usual = time.monotonic() + BUSY_SECONDS, pragma(db, "busy_timeout")
    db.execute("PRAGMA busy_timeout = 0")
    try:
        while True:
            command.check()
            try:
                db.execute(statement)
                return
            except sqlite3.OperationalError as error:
                if "is locked" not in str(error) or time.monotonic() > end:
                    raise
            time.sleep(0.001)
    finally:
        db.execute("PRAGMA busy_timeout = %d" % usual)


@contextlib.contextmanager
def write_lock(db: sqlite3.Connection, command: Command) -> Iterator[None]:
    """One short transaction, then a pause: SQLite's lock is not given out in order."""
    execute_in_turn(db, "BEGIN IMMEDIATE", command)
    started = time.monotonic()
    try:
        yield
        db.execute("COMMIT")
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")
    # The server waits 250 ms for the lock, and looks for it every 25 to 100 ms.
    time.sleep(max(0.03, time.monotonic() - started))


def rewrite_neighbours(db: sqlite3.Connection, text: str, command: Command) -> None:
    """Write the index entries around a deleted hash anew.

    When SQLite splits a full page, the entries that move to the new page can stay in the unused
    part of the old one, also with secure_delete. So a copy of a deleted entry can be in a page
    beside its place. Here the entries around that place are moved to the end of the index and back,
    in one transaction. Pages become empty, and are overwritten, or they are filled over the copy.
    Without this, 10 of 100 identities needed the whole file written anew, with it none (200,000
    events of 4,000 identities).
    """
    around = ("SELECT id FROM session_events WHERE identity_hash %s ?"
              " ORDER BY identity_hash %s LIMIT ?")
    try:
        with write_lock(db, command):
            near = [row for side in (("<", "DESC"), (">", "ASC"))
                    for row in db.execute(around % side, (text, NEIGHBOURS)).fetchall()]
            for value in ("'~' || identity_hash", "substr(identity_hash, 2)"):
                db.executemany(
                    "UPDATE session_events SET identity_hash = %s WHERE id = ?" % value, near)
    except sqlite3.IntegrityError:
        pass  # a foreign table's rule forbids such a value: the whole file is written anew instead


def empty_log(db: sqlite3.Connection, command: Command) -> None:
    """Move all of the -wal file into the database and cut it to nothing. Raises CommandError."""
    end = time.monotonic() + EMPTYING_SECONDS
    # TRUNCATE holds the write lock while it waits for readers: less than the server waits for it.
    db.execute("PRAGMA busy_timeout = 100")
    while True:
        db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()  # most of the work, and no lock
        if not db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
            return
        command.check()
        if time.monotonic() > end:
            raise CommandError("the -wal file may hold copies and could not be emptied: another"
                               " process was reading for %d s. End it, and run the command again"
                               % EMPTYING_SECONDS)
        command.show("waiting for readers of the database to end")
        time.sleep(0.1)


def rewrite_file(db: sqlite3.Connection, folder: str, command: Command) -> None:
    """VACUUM: every page is written anew, and no free page is left. Raises sqlite3.Error."""
    # Its temporary file is as large as the database, and as private: not in memory, not in /tmp.
    db.execute("PRAGMA temp_store = FILE")
    db.execute("PRAGMA temp_store_directory = '%s'" % folder.replace("'", "''"))
    db.set_progress_handler(lambda: command.received, 20_000)
    execute_in_turn(db, "VACUUM", command)
    db.set_progress_handler(None, 0)


def files_with(folder: str, hashes: Sequence[str], command: Command) -> List[str]:
    """The names of the files in `folder` that hold a piece of one of `hashes`, or cannot be read.

    Files in a folder that a killed --backup left there are among them.
    Every PIECE digits of a hash are searched for, as a page that was overwritten halfway can hold
    the rest of one. That takes about 0.6 s per hash and gigabyte. The files from which the hashes
    were read, and to which the statement is printed, are passed over.
    """
    streams = [os.fstat(stream.fileno()) for stream in (sys.stdin, sys.stdout) if has_file(stream)]
    pieces = [text[start:start + PIECE].encode("ascii")
              for text in hashes for start in range(0, len(text), PIECE)]
    found = []
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            with contextlib.suppress(FileNotFoundError):  # gone meanwhile
                if is_left_behind(entry.name) and entry.is_dir(follow_symlinks=False):
                    try:
                        found += [os.path.join(entry.name, name)
                                  for name in files_with(entry.path, hashes, command)]
                    except PermissionError:
                        found.append(entry.name)
                elif (entry.is_file() and has_piece(entry.path, pieces, command)
                        and not any(os.path.samestat(entry.stat(), own) for own in streams)):
                    found.append(entry.name)
    return found


# The name of scratch_folder's folder, which stays there when a --backup is killed.
is_left_behind = re.compile(r"\.backup-.+\.partial").fullmatch


def has_file(stream: Any) -> bool:
    """True if a standard stream is there and has a descriptor. (That of a test has none.)"""
    try:
        return int(stream.fileno()) >= 0
    except (AttributeError, OSError, ValueError):
        return False


def has_piece(path: str, pieces: Sequence[bytes], command: Command) -> bool:
    """True if one of `pieces`, each of PIECE bytes, is in the file, or nobody can tell."""
    try:
        with open(path, "rb", buffering=0) as file:
            kept = b""
            while True:
                command.check()
                command.show("searching %s: %d MB" % (
                    shown(os.path.basename(path)), file.tell() >> 20))
                data = file.read(CHUNK)
                if not data:
                    return False
                data = kept + data
                if any(piece in data for piece in pieces):
                    return True
                kept = data[1 - PIECE:]
    except FileNotFoundError:
        raise
    except OSError:
        return True


def clickhouse_statement(hashes: Sequence[str]) -> str:
    """The SQL that deletes the events of these hashes from the table that `ship` fills."""
    among = "IN (%s)" % ", ".join("unhex('%s')" % text for text in hashes)
    return ("ALTER TABLE session_events_raw DELETE WHERE identity_hash %s OR github_hash %s;"
            % (among, among))


# ==================================================================================================
# The handler: one whole request in memory, one answer. (IngestServer.respond answers the usual
# request, a valid event, without a handler.)
# ==================================================================================================

def check_body(body: bytes) -> Union[Row, Answer]:
    """The row of the event in `body`, or the 400 that says what is wrong with it."""
    try:
        return canonical_row(body) or check_event(parse_json(body))
    except NotJSON:
        return failure(400, "Invalid JSON body", "not_json")
    except NotAnEvent as wrong:
        return Answer(400, as_json({"error": str(wrong), "issues": wrong.issues}), "not_an_event")


# {path: {method: what answers it}}
Routes = Dict[str, Dict[str, Callable[["IngestHandler"], Union[Row, Answer]]]]
METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"}


def path_of(target: str) -> str:
    """The path of a request's target (`/path?query` or `http://host/path?query`)."""
    return re.sub("^https?://[^/?]*", "", target, flags=re.IGNORECASE).partition("?")[0]


def route_of(request_line: bytes, routes: Routes) -> str:
    """A request's method and path for the access log; "-" for an unknown one."""
    method, _, rest = request_line.decode("latin-1").partition(" ")
    target, blank, _version = rest.partition(" ")
    path = path_of(target)
    if not blank or path not in routes:
        return "-"
    return "%s %s" % (method if method in METHODS else "-", path)


class IngestHandler(http.server.BaseHTTPRequestHandler):
    """One complete request. It leaves a row to store, or an answer, in `result`."""

    server: IngestServer
    request: Request
    result: Union[Row, Answer]

    def __init__(self, request: Request, routes: Routes, server: IngestServer) -> None:
        self.routes = routes
        # No address is passed on, so none can be logged.
        super().__init__(request, ("", 0), server)  # type: ignore[arg-type]

    def setup(self) -> None:
        self.rfile = io.BufferedReader(io.BytesIO(self.request.text + b"\r\n\r\n"))
        self.wfile = io.BytesIO()

    def finish(self) -> None:
        pass

    def handle(self) -> None:
        self.raw_requestline = self.rfile.readline()
        if not self.parse_request():
            return  # send_error has left the result
        # parse_request rewrites self.path, each version of Python in its own way.
        methods = self.routes.get(path_of(self.requestline.split(" ")[1]))
        if methods is None:
            self.result = failure(404, "Not found", "unknown_path")
        elif self.command not in methods:
            self.result = failure(405, "Method not allowed", "other_method",
                                  "Allow: %s\r\n" % ", ".join(methods))
        else:
            self.result = methods[self.command](self)

    def post_event(self) -> Union[Row, Answer]:
        head = self.request.head
        if head.length is None and not head.chunked:
            return failure(411, "Send the body with a Content-Length, or chunked", "no_length")
        return check_body(self.request.body)

    def get_health(self) -> Answer:
        return Answer(200, OK)

    def get_readiness(self) -> Answer:
        return Answer(200, OK) if self.server.store_is_ready() else UNAVAILABLE

    def get_metrics(self) -> Answer:
        server = self.server
        server.metrics.unshipped = unshipped(server.store.db)
        text = server.metrics.text(server.connections.by_phase(), server.store.size())
        return Answer(200, text, media_type="text/plain; version=0.0.4; charset=utf-8")

    def send_error(self, code: int, message: Optional[str] = None,
                   explain: Optional[str] = None) -> None:
        words = message or http.HTTPStatus(code).phrase
        self.result = failure(code, words, "malformed_request")

    def log_message(self, format: str, *args: Any) -> None:
        pass  # http.server would log the address and the path


PUBLIC: Routes = {
    ENDPOINT: {"POST": IngestHandler.post_event},
    "/healthz": {"GET": IngestHandler.get_health, "HEAD": IngestHandler.get_health},
    "/readyz": {"GET": IngestHandler.get_readiness, "HEAD": IngestHandler.get_readiness},
}
OPERATORS: Routes = {
    "/metrics": {"GET": IngestHandler.get_metrics, "HEAD": IngestHandler.get_metrics},
}
HOT_ROUTE = "POST " + ENDPOINT


# ==================================================================================================
# Connections. A connection changes only its own fields, and enters in `Connections` what the turn
# has to know. The turn calls a connection's methods, and changes none of its fields.
# ==================================================================================================

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
READ_SIZE = 64 * 1024  # bytes that one recv() takes at most
REQUESTS_A_TURN = 32  # of one connection, so that one that pipelines gets no larger share
MAX_UNSENT = 64 * 1024  # bytes of answers after which a connection's next request waits
MAX_HELD = 48 * 1024 * 1024  # bytes of unfinished requests and unsent answers, of all connections

# phase     | it waits for                     | watched for   | at most         | then
# ----------|----------------------------------|---------------|-----------------|------------------
# handshake | the end of the TLS handshake     | READ or WRITE | request_seconds | idle
# idle      | the first byte of a request      | READ          | idle_seconds    | any but handshake
# reading   | the last byte of a request       | READ          | request_seconds | any but handshake
# writing   | the client to take its answers   | WRITE         | write_seconds   | any but handshake
# lingering | the end of what the client sends | READ          | LINGER_SECONDS  | closed
# closed    | nothing                          |               |                 |
#
# From each phase a connection can become closed. To enter the same phase anew begins its time
# again. The rules:
#
# 1. `answers` are those of the present turn. They leave at its end, after the commit. Between two
#    turns there are none. Until they leave, the connection is not read from, and is not ended.
# 2. The backlog has connections for which a turn had no time, and new ones that have sent nothing
#    yet. They are in handshake, idle or reading. Their sockets are not read until the next turn,
#    which begins with them, and their time does not run out meanwhile.
# 3. `unsent` has bytes in writing, and in no other phase. In writing nothing is read: whoever takes
#    no answers cannot ask for more.
# 4. After `closing` was set no further request is read. When the last answer is sent, the
#    connection becomes closed; or lingering, when the client may still be sending, since closing
#    at once would reset the connection and lose the client the answer.
# 5. In lingering a connection holds nothing. What arrives is thrown away.
# 6. All connections of a phase have the same time limit. So the first to enter a phase is the first
#    whose time is over.
HANDSHAKE, IDLE, READING, WRITING, LINGERING, CLOSED = (
    "handshake", "idle", "reading", "writing", "lingering", "closed")
PHASES = HANDSHAKE, IDLE, READING, WRITING, LINGERING
NEXT_PHASES = {
    HANDSHAKE: {IDLE, CLOSED},
    IDLE: {IDLE, READING, WRITING, LINGERING, CLOSED},
    READING: {IDLE, READING, WRITING, LINGERING, CLOSED},
    WRITING: {IDLE, READING, WRITING, LINGERING, CLOSED},
    LINGERING: {CLOSED},
}
LINGER_SECONDS = 2.0


class Connections:
    """The open connections by phase, the backlog, and the number of bytes that all of them hold."""

    def __init__(self) -> None:
        # In the order in which they entered the phase.
        self.waiting: Dict[str, Dict[Connection, None]] = {phase: {} for phase in PHASES}
        self.backlog: Dict[Connection, None] = {}  # in the order in which they came
        self.answering: List[Connection] = []  # those with answers of this turn
        # Bytes received and not yet taken as a request, or answered and not yet sent.
        self.held = 0

    def __len__(self) -> int:
        return sum(map(len, self.waiting.values()))

    def by_phase(self) -> Dict[str, int]:
        return {phase: len(self.waiting[phase]) for phase in PHASES}

    def all(self) -> List[Connection]:
        return [connection for phase in PHASES for connection in self.waiting[phase]]

    def move(self, connection: Connection, phase: str) -> None:
        """Move `connection` to the end of a phase, which may be the one that it is in."""
        if phase not in NEXT_PHASES[connection.phase]:
            raise RuntimeError("from %s to %s" % (connection.phase, phase))
        del self.waiting[connection.phase][connection]
        if phase is not CLOSED:
            self.waiting[phase][connection] = None

    def overdue(self, phase: str, late: float) -> List[Connection]:
        """The connections that entered the phase before the moment `late`, oldest first."""
        return list(itertools.takewhile(lambda c: c.since < late, self.waiting[phase]))

    def close_longest_waiting(self) -> None:
        """Close one connection, an idle one if possible, and none whose answer is not sent yet."""
        for phase in (IDLE, LINGERING, HANDSHAKE, READING, WRITING):
            for connection in self.waiting[phase]:
                if not connection.answers:
                    connection.close()
                    return

    def close_until_held_is_less(self) -> None:
        """Close those that wait longest, until all together hold less than MAX_HELD bytes."""
        for phase in (READING, WRITING):
            for connection in list(self.waiting[phase]) if self.held >= MAX_HELD else []:
                if self.held >= MAX_HELD and not connection.answers:
                    connection.close()


class Connection:
    """A client's socket, the reader of its requests, and its answers. It never blocks.

    `bucket` is the client's key in the rate limit; None: the client has no limit. `proxy` is the
    peer's address if the peer is a trusted proxy, else empty, since no client's address is kept.
    """

    __slots__ = ("answers", "bucket", "closing", "continued", "held", "lingers", "mask", "others",
                 "phase", "proxy", "queued", "reader", "routes", "server", "since", "sock",
                 "unsent", "unused_handshake")

    # What the socket raises when it has nothing to read, or no room for what is written.
    not_yet: Tuple[Type[OSError], ...] = (BlockingIOError,)
    # The flag of send() for the last answer. Linux then sends it in one packet with the end of the
    # connection, which finish() adds at once: 5 to 8% more events/s where each is a connection.
    end_follows: int = getattr(socket, "MSG_MORE", 0)

    def __init__(self, server: IngestServer, sock: socket.socket, routes: Routes,
                 bucket: Optional[bytes], proxy: str) -> None:
        self.server, self.sock, self.routes = server, sock, routes
        self.others = server.connections
        self.bucket, self.proxy = bucket, proxy
        # The bucket that the TLS handshake took a token from, until a request follows.
        self.unused_handshake: Optional[bytes] = None
        self.mask = 0  # what the selector watches the socket for
        self.phase, self.since = self.first_phase(), server.now
        self.others.waiting[self.phase][self] = None
        self.reader = RequestReader()
        self.held = 0  # bytes in the reader and in `unsent`: this one's part of `others.held`
        self.continued = False  # "100 Continue" was sent for the request at the front
        # Of this turn: an answer's bytes, or the number of a row, whose answer the commit decides.
        self.answers: List[Union[bytes, int]] = []
        self.queued = 0  # bytes in `answers`
        self.unsent = b""
        self.closing = False
        self.lingers = False  # it will linger after the last answer, even if it holds no bytes

    # -- called by the turn ------------------------------------------------------------------------

    def start(self) -> None:
        """Begin: read, or try again in the next turn.

        A client that has just connected sends in a moment. Until the next turn it has mostly sent
        its request, and is never watched. To wait for it in this turn would have the server wait
        for its clients, and they for it: 20% fewer events/s at 32 clients that connect for each.
        """
        data = None if self.server.turn_is_full() else self.receive()
        if data is None:
            self.others.backlog[self] = None
        else:
            self.process(data)

    def on_ready(self, mask: int) -> None:
        """The selector saw the socket ready."""
        if self.phase is CLOSED:
            pass  # it was closed earlier in this turn
        elif mask & WRITE:
            self.flush()
        elif self.answers or self in self.others.backlog or self.others.held >= MAX_HELD:
            pass  # it is read in the next turn, since the socket stays ready
        elif not self.server.turn_is_full():
            self.receive_requests()
        elif self.phase is not LINGERING:  # what is thrown away needs no place in the backlog
            self.others.backlog[self] = None

    def resume(self) -> None:
        """Go on after a wait in the backlog: with what has been received, then with the socket."""
        if self.reader.buffer:
            self.read_requests()
        if not self.answers and not self.closing:
            self.receive_requests()

    def send_answers(self, results: List[Answer]) -> None:
        """Send this connection's answers. `results` has the answer to each row of the turn."""
        last = len(self.answers) - 1 if self.closing else None
        data = b"".join([
            answer if isinstance(answer, bytes)
            else self.server.encode(results[answer], place == last, HOT_ROUTE)
            for place, answer in enumerate(self.answers)])
        self.answers, self.queued = [], 0
        if self.phase is not CLOSED:
            self.flush(data)

    def on_timeout(self) -> None:
        """The time of this phase is over."""
        since = self.since
        if not self.answers and self.phase in (HANDSHAKE, IDLE, READING):
            # Bytes may be there that the selector has not reported, if the process was paused.
            self.on_ready(READ)
        if self.answers or self in self.others.backlog or self.since != since:
            return
        if self.phase is READING and not self.closing:
            self.refuse(failure(408, "The request took too long", "too_slow"))
        else:
            self.close()

    def close(self) -> None:
        if self.phase is not CLOSED:
            self.watch(0)
            self.others.backlog.pop(self, None)
            if self.held:
                self.reader, self.unsent = RequestReader(), b""
                self.count_held()
            self.enter(CLOSED)
            self.sock.close()

    # -- its own -----------------------------------------------------------------------------------

    def first_phase(self) -> str:
        return IDLE

    def enter(self, phase: str) -> None:
        self.others.move(self, phase)
        self.phase, self.since = phase, self.server.now

    def watch(self, mask: int) -> None:
        if mask == self.mask:
            return
        if not self.mask:
            self.server.selector.register(self.sock, mask, self.on_ready)
        elif mask:
            self.server.selector.modify(self.sock, mask, self.on_ready)
        else:
            self.server.selector.unregister(self.sock)
        self.mask = mask

    def count_held(self) -> None:
        held = self.reader.held() + len(self.unsent)
        self.others.held += held - self.held
        self.held = held

    def receive(self) -> Optional[bytes]:
        """The bytes that have arrived; None if there are none yet, b"" if the client is gone."""
        try:
            return self.sock.recv(READ_SIZE)
        except self.not_yet:
            return None
        except OSError:
            return b""

    def transmit(self, data: bytes) -> Optional[int]:
        """The number of bytes of `data` that the socket took; None if the client is gone."""
        try:
            return self.sock.send(data, self.end_follows if self.closing else 0)
        except self.not_yet:
            return 0
        except OSError:
            return None

    def receive_requests(self) -> None:
        data = self.receive()
        if data is None:
            self.watch(READ)
        else:
            self.process(data)

    def process(self, data: bytes) -> None:
        """Go on with what was received."""
        if not data:
            self.close()
        elif self.phase is not LINGERING:
            self.reader.feed(data)
            self.read_requests()

    def read_requests(self) -> None:
        """Answer the complete requests that have arrived, as many as the turn has room for."""
        reader, count = self.reader, 0
        try:
            while reader.buffer and not self.closing:
                if count and (count == REQUESTS_A_TURN or self.queued > MAX_UNSENT
                              or self.server.turn_is_full()):
                    self.others.backlog[self] = None
                    break
                request = reader.next_request()
                if request is None:
                    self.invite_body()
                    break
                self.answer(request)
                count += 1
        except Refused as refused:
            self.refuse(refused.answer)
        if reader.buffer or reader.text or self.held:
            self.count_held()
        if not self.answers:  # otherwise flush() chooses the phase, at the end of the turn
            if self.phase is IDLE and self.held:
                self.enter(READING)
            self.watch(READ)

    def invite_body(self) -> None:
        """Send "100 Continue" to a client that waits for it."""
        head = self.reader.head
        if head and head.expects and not self.continued:
            self.continued = True
            self.enter(READING)
            self.add_answer(CONTINUE)

    def answer(self, request: Request) -> None:
        self.continued = False
        self.closing = self.server.stopping or not request.head.keep
        if self.unused_handshake:
            self.server.give_back(self.unused_handshake)
            self.unused_handshake = None
        result, route = self.server.respond(request, self)
        if isinstance(result, Answer):
            if result.status == 411:  # a body may follow, and nobody knows where it ends
                self.closing = self.lingers = True
            bodiless = request.text.startswith(b"HEAD ")
            self.add_answer(self.server.encode(result, self.closing, route, bodiless))
        else:
            self.add_answer(self.server.add_row(result))

    def add_answer(self, answer: Union[bytes, int]) -> None:
        if not self.answers:
            self.others.answering.append(self)
        self.answers.append(answer)
        if isinstance(answer, bytes):
            self.queued += len(answer)

    def refuse(self, answer: Answer) -> None:
        """Answer, and end the connection, whatever else the client sends."""
        self.closing = self.lingers = True
        self.server.take_token(self.bucket)  # it counts as a request, and is never answered 429
        line = self.reader.request_line()
        route = route_of(line, self.routes)
        self.add_answer(self.server.encode(answer, True, route, line.startswith(b"HEAD ")))

    def flush(self, more: bytes = b"") -> None:
        """Send `unsent` and `more` as far as the socket takes them; enter the next phase."""
        data = self.unsent + more
        sent = self.transmit(data)
        if sent is None:
            self.close()
            return
        if self.unsent or sent < len(data):
            self.unsent = data[sent:]
            self.count_held()
        if self.unsent:
            if self.phase is not WRITING or sent:
                self.enter(WRITING)
            self.others.backlog.pop(self, None)
            self.watch(WRITE)
        elif self.closing:
            self.finish()
        else:
            if self.phase is WRITING and self.held:
                self.others.backlog[self] = None
            if not (self.continued and self.phase is READING):  # whose time runs since "continue"
                self.enter(READING if self.held else IDLE)
            self.watch(READ)

    def finish(self) -> None:
        """End the connection: all answers are sent, and no further request is read."""
        if not self.lingers and not self.held:
            self.close()
            return
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)
        self.reader = RequestReader()
        self.count_held()
        self.enter(LINGERING)
        self.watch(READ)


class TLSConnection(Connection):
    """A connection over TLS. A handshake is done in steps, between which the loop goes on.

    A TLS record has at most 16 KiB, less than READ_SIZE. So recv() takes the whole record, and
    leaves nothing in OpenSSL's buffer, which the selector does not know.
    """

    __slots__ = ("context", "shaken")
    sock: ssl.SSLSocket
    not_yet = ssl.SSLWantReadError, ssl.SSLWantWriteError
    end_follows = 0  # an SSLSocket takes no flag, and a record follows the answer

    def __init__(self, server: IngestServer, sock: socket.socket, routes: Routes,
                 bucket: Optional[bytes], proxy: str, context: ssl.SSLContext) -> None:
        super().__init__(server, sock, routes, bucket, proxy)
        self.context: Optional[ssl.SSLContext] = context  # until the handshake begins
        self.shaken = False  # the handshake is over
        # A handshake takes a token from a bucket of its own, and gives it back when a request
        # follows: the request takes one from the client's.
        self.unused_handshake = bucket and b"handshakes" + bucket

    def first_phase(self) -> str:
        return HANDSHAKE

    def start(self) -> None:
        """Begin the handshake, unless the client began too many and sent no request."""
        if self.unused_handshake and self.server.take_token(self.unused_handshake):
            self.server.metrics.refusals["handshakes_alone"] += 1
            self.close()
        else:
            self.others.backlog[self] = None

    def on_ready(self, mask: int) -> None:
        # In a handshake it does not matter for what the socket was ready.
        super().on_ready(mask if self.shaken else READ)

    def receive_requests(self) -> None:
        if self.shaken or self.shake_hands():
            super().receive_requests()

    def shake_hands(self) -> bool:
        """Go on with the handshake. True when it is over."""
        try:
            if self.context:
                self.sock = self.context.wrap_socket(
                    self.sock, server_side=True, do_handshake_on_connect=False)
                self.context = None
            self.sock.do_handshake()
        except ssl.SSLWantReadError:
            self.watch(READ)
        except ssl.SSLWantWriteError:
            self.watch(WRITE)
        except OSError:  # no TLS, no common version, gone
            self.close()
        else:
            self.shaken = True
            self.enter(IDLE)
        return self.shaken

    def close(self) -> None:
        self.say_goodbye()
        super().close()

    def finish(self) -> None:
        self.say_goodbye()
        super().finish()

    def say_goodbye(self) -> None:
        """Tell the client that nothing is missing (close_notify). Wait for no answer."""
        if self.shaken:
            with contextlib.suppress(OSError, ValueError):  # ValueError: both sides have said it
                self.sock.unwrap()


# ==================================================================================================
# Listeners: from the text of the command line to a socket that listens, and from a socket to the
# text that is shown.
# ==================================================================================================

QUEUE = 1024  # connections: a burst of them waits here while a turn commits

Place = Tuple[str, int]  # where to listen: an address or a host's name, and a port


# The next four read the value of a flag. They raise ValueError, for which `checked` has the words.


def port(text: str) -> int:
    if not re.fullmatch("[0-9]{1,5}", text) or int(text) > 65535:
        raise ValueError
    return int(text)


def not_blank(text: str) -> str:
    if not text.strip():  # as from `--tls-cert "$CERT"` where the variable is not set
        raise ValueError
    return text


def host(text: str) -> str:
    return not_blank(text.strip("[]"))  # an empty one would mean every interface


def host_and_port(text: str) -> Place:
    name, _, number = text.rpartition(":")
    return host(name), port(number)


def open_listener(place: Place) -> socket.socket:
    """A socket that listens at `place`. Raises OSError."""
    listener = socket.socket(socket.AF_INET6 if ":" in place[0] else socket.AF_INET)
    try:
        if os.name == "posix":  # on Windows it would let two servers have one port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            if ":" in place[0]:  # getaddrinfo reads the zone in fe80::1%eth0
                listener.bind(socket.getaddrinfo(*place, type=socket.SOCK_STREAM)[0][4])
            else:
                listener.bind(place)
        except (TypeError, UnicodeError):  # Python raises these for some texts
            raise OSError(errno.EINVAL, "that is no host name") from None
        listener.listen(QUEUE)
        return prepared(listener)
    except BaseException:
        listener.close()
        raise


def prepared(listener: socket.socket) -> socket.socket:
    """`listener` with the options that accepted connections inherit. Raises OSError."""
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def inherited_listener() -> Optional[socket.socket]:
    """The socket that systemd passed (sd_listen_fds(3)), or None. Raises StartError."""
    passed_on = os.environ.get("LISTEN_FDS", "")
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or not passed_on.isdigit():
        return None
    if passed_on != "1":
        raise StartError("systemd passed %s sockets (LISTEN_FDS), and the server takes exactly one:"
                         " one ListenStream= in the socket unit" % passed_on)
    passed = socket.socket(fileno=3)
    passed.set_inheritable(False)
    if passed.family not in (socket.AF_INET, socket.AF_INET6) or not passed.getsockopt(
            socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise StartError(
            "the passed socket is not a listening TCP socket (Accept=no in the socket unit)")
    return prepared(passed)


def url_of(scheme: str, listener: socket.socket) -> str:
    """The URL of the address and port at which `listener` listens."""
    host, number = listener.getsockname()[:2]
    return "%s://%s:%d" % (scheme, "[%s]" % host if ":" in host else host, number)


def peer_of(address: Any) -> str:
    """The text of a peer's address, from accept()'s second value."""
    return str(address[0])


# ==================================================================================================
# The turn: one turn of the selector loop is one transaction
# ==================================================================================================

# A turn reads no more once one of these three is reached: every client waits until its end.
ROWS_A_TURN = 1024  # of all connections
BYTES_A_TURN = 1024 * 1024  # of requests: one event of 26 KB can bring 200 discoveries to store
READING_SECONDS = 0.02  # from the start of the turn to its last recv()
ACCEPTS_A_TURN = 256  # new connections of one listener
NO_DESCRIPTORS = errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM
TICK = 0.25  # seconds that the loop sleeps at most
EXPIRE_EVERY = 0.05  # seconds from one look for overdue connections to the next; one takes 5 us
LOG_SECONDS = 1.0  # between two lines of one kind in the log


def usable_cpus() -> int:
    """How many CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# After a turn that answered somebody, look again for so long before going to sleep: being woken
# costs 60 us, so that a client which waits for each answer gets 6,500 events/s stored instead of
# 4,700. With one CPU nobody else could run.
SPIN_SECONDS = 0.00005 if usable_cpus() > 1 else 0.0


class Limits(NamedTuple):
    """The server's limits: seconds and counts."""
    request_seconds: float = 10.0  # from a request's first byte to its last; or a TLS handshake
    idle_seconds: float = 30.0  # between requests
    write_seconds: float = 10.0  # without a byte of an answer taken
    max_connections: int = 4096
    rate: Optional[Rate] = None  # None: no limit


DEFAULTS = Limits()


class IngestServer(http.server.HTTPServer):
    """The selector loop. Raises OSError when it cannot listen at `address`.

    `inherited` is a listening socket, used in place of `address`. It outlives this process: at the
    end, connections that were not accepted are left to the next process.
    """

    def __init__(self, address: Tuple[str, int], store: Store, limits: Limits = DEFAULTS, *,
                 inherited: Optional[socket.socket] = None, access_log: bool = False,
                 trusted: Sequence[Network] = (), tls: Optional[ssl.SSLContext] = None) -> None:
        self.store, self.limits, self.access_log = store, limits, access_log
        self.trusted, self.tls = trusted, tls
        self.metrics = Metrics()
        self.rate_limit = RateLimit(limits.rate) if limits.rate else None
        self.now, self.second = time.monotonic(), int(time.time())
        self.connections = Connections()
        self.taken = 0  # bytes of this turn's requests
        self.reading_until = 0.0  # on the clock of time.perf_counter: READING_SECONDS are over
        self.rows: List[Row] = []  # of this turn
        self.answered_at = self.now  # the last turn that answered a client
        self.expire_at = self.now  # the next look for overdue connections
        # From other threads and signal handlers.
        self.calls: Deque[Callable[[], None]] = collections.deque()
        self.feed_watchdog: Callable[[], None] = lambda: None
        self.feed_seconds, self.feed_at = math.inf, math.inf
        self.stopping, self.stop_at = False, 0.0
        # The store's fault, or "", and when it was learned; and what was logged, and may be next.
        self.store_fault, self.store_checked = "", self.now
        self.store_said, self.say_store_at = "", self.now
        if store.fault:
            self.note_store(store.fault)
        self.inherited = inherited is not None
        super().__init__(address, IngestHandler, bind_and_activate=False)
        self.socket.close()  # HTTPServer made it, for IPv4 alone
        self.listeners: Dict[socket.socket, Routes] = {}
        self.muted_until = 0.0  # while set, nothing is accepted: no descriptor was left
        self.selector = selectors.DefaultSelector()
        self.alarm, self.bell = socket.socketpair()  # a byte written to `bell` ends a sleep
        self.alarm.setblocking(False)
        self.bell.setblocking(False)
        self.selector.register(self.alarm, READ, self.make_calls)
        try:
            self.socket = inherited or open_listener(address)
            self.server_address = self.socket.getsockname()
            self.listen(self.socket, PUBLIC)
        except BaseException:
            self.server_close()
            raise

    def listen(self, listener: socket.socket, routes: Routes) -> None:
        """Serve `routes` to whoever connects to `listener`."""
        listener.setblocking(False)
        self.listeners[listener] = routes
        self.watch_listener(listener)

    def watch_listener(self, listener: socket.socket) -> None:
        self.selector.register(
            listener, READ, lambda _mask: self.accept(listener, ACCEPTS_A_TURN))

    def operators(self) -> List[socket.socket]:
        """The listeners for operators, apart from the public one."""
        return [listener for listener in self.listeners if listener is not self.socket]

    @property
    def url(self) -> str:
        return url_of("https" if self.tls else "http", self.socket)

    # -- called from any thread, or a signal handler -----------------------------------------------

    def call(self, function: Callable[[], None]) -> None:
        """Have the loop call `function` in its next turn."""
        self.calls.append(function)
        # An error does no harm: `bell` is full, and the loop awake, or closed, and the loop ended.
        with contextlib.suppress(OSError):
            self.bell.send(b"!")

    def shutdown(self, grace: float = 0.0) -> None:
        """Stop accepting; end when no connection is left, or after `grace` seconds."""
        self.call(lambda: self.stop(grace))

    # -- the turn ----------------------------------------------------------------------------------

    def serve_forever(self, poll_interval: float = TICK) -> None:
        """Run turns until shutdown(), then close the connections. The store stays open."""
        while not self.stopping or (self.now < self.stop_at and self.connections):
            self.turn(poll_interval)
        for connection in self.connections.all():
            connection.close()
        self.say_store_at = self.now
        self.report()
        log_left_out(math.inf)

    def turn(self, timeout: float) -> None:
        """Wait for `timeout` seconds at most; read, commit, and then answer."""
        if self.store.sweep:
            timeout = self.store.sweep.waiting_time(self.now, timeout, self.now - self.answered_at)
        ready = self.ready_sockets(timeout)
        self.now, self.second = time.monotonic(), int(time.time())
        self.taken = 0
        self.reading_until = time.perf_counter() + READING_SECONDS
        backlog = self.connections.backlog
        for connection in itertools.takewhile(lambda _: not self.turn_is_full(), list(backlog)):
            if connection in backlog:  # another may have closed it meanwhile
                del backlog[connection]
                self.guarded(connection.resume)
        self.read(ready)
        if self.now >= self.expire_at or self.connections.held >= MAX_HELD:
            self.expire_at = self.now + EXPIRE_EVERY
            self.expire()
        self.answer(self.commit())
        self.store.after_turn()
        self.report()

    def read(self, ready: List[Tuple[selectors.SelectorKey, int]]) -> None:
        """Read from the sockets that are ready, and look again while more than one event comes.

        While requests are checked, others are sent. The same commit serves them: 13% more events/s
        at 256 clients.
        """
        while ready:
            before = len(self.rows)
            for key, mask in ready:
                self.guarded(key.data, mask)
            if len(self.rows) - before < 2 or self.turn_is_full():
                break
            ready = self.selector.select(0)

    def ready_sockets(self, timeout: float) -> List[Tuple[selectors.SelectorKey, int]]:
        ready = self.selector.select(0)
        if ready or self.connections.backlog:
            return ready
        if self.answered_at == self.now:  # the turn before answered; `now` is still its time
            until = time.perf_counter() + SPIN_SECONDS
            while not ready and time.perf_counter() < until:
                ready = self.selector.select(0)
        return ready or self.selector.select(timeout)

    def turn_is_full(self) -> bool:
        """True if nothing more may be read in this turn, and no handshake continued."""
        return (len(self.rows) >= ROWS_A_TURN or self.taken >= BYTES_A_TURN
                or time.perf_counter() >= self.reading_until)

    def guarded(self, step: Callable[..., None], *arguments: Any) -> None:
        """Run a step of a connection. A fault of this program in it ends only this connection."""
        try:
            step(*arguments)
        except Exception as error:
            log_fault(error)
            owner = getattr(step, "__self__", None)
            if isinstance(owner, Connection):
                owner.close()

    def make_calls(self, mask: int) -> None:
        self.alarm.recv(4096)
        while self.calls:
            self.guarded(self.calls.popleft())

    def stop(self, grace: float) -> None:
        for listener in list(self.listeners):
            if not (listener is self.socket and self.inherited):
                # Clients that have connected already are served.
                self.accept(listener, self.limits.max_connections)
            self.mute(listener)
            listener.close()
            del self.listeners[listener]
        self.stopping, self.stop_at = True, self.now + grace

    # -- connections -------------------------------------------------------------------------------

    def accept(self, listener: socket.socket, most: int) -> None:
        for accepted in range(most):
            try:
                sock, address = listener.accept()
            except OSError as error:
                # Without a free descriptor accept() fails even when no client waits. A client does
                # wait at the first try, since the selector said so.
                if error.errno in NO_DESCRIPTORS and not accepted:
                    self.out_of_descriptors()
                return
            if len(self.connections) >= self.limits.max_connections:
                self.connections.close_longest_waiting()
            self.open_connection(sock, peer_of(address), self.listeners[listener])

    def open_connection(self, sock: socket.socket, peer: str, routes: Routes) -> None:
        sock.setblocking(False)
        bucket, proxy = None, ""
        # Loopback has no limit, but a proxy on it may be a trusted one, whose clients have.
        if self.rate_limit and (self.trusted or not peer.startswith("127.")):
            address = parse_address(peer)
            bucket = self.rate_limit.bucket(address)
            if is_trusted(address, self.trusted):
                bucket, proxy = None, peer
        if self.tls is None or routes is not PUBLIC:
            self.guarded(Connection(self, sock, routes, bucket, proxy).start)
        else:
            self.guarded(TLSConnection(self, sock, routes, bucket, proxy, self.tls).start)

    def out_of_descriptors(self) -> None:
        """Close the connection that waits longest. Accept none for TICK seconds, and sleep."""
        log_rarely("out_of_descriptors", ("", 0), connections=len(self.connections))
        self.connections.close_longest_waiting()
        self.muted_until = self.now + TICK
        for listener in self.listeners:
            self.mute(listener)

    def mute(self, listener: socket.socket) -> None:
        with contextlib.suppress(KeyError):  # it is muted already
            self.selector.unregister(listener)

    def expire(self) -> None:
        """End connections that took too long, and some if all hold too many bytes."""
        limits = self.limits
        for phase, seconds in ((HANDSHAKE, limits.request_seconds), (IDLE, limits.idle_seconds),
                               (READING, limits.request_seconds), (WRITING, limits.write_seconds),
                               (LINGERING, LINGER_SECONDS)):
            for connection in self.connections.overdue(phase, self.now - seconds):
                self.guarded(connection.on_timeout)
        self.connections.close_until_held_is_less()
        if self.muted_until and self.now >= self.muted_until:
            self.muted_until = 0.0
            for listener in self.listeners:
                self.watch_listener(listener)

    # -- the rate limit ----------------------------------------------------------------------------

    def take_token(self, bucket: Optional[bytes]) -> float:
        """Take a token from the bucket. Returns the seconds to wait: 0.0 if one was taken."""
        return self.rate_limit.take_token(bucket, self.now) if self.rate_limit and bucket else 0.0

    def give_back(self, bucket: bytes) -> None:
        if self.rate_limit:
            self.rate_limit.give_back(bucket)

    def over_rate(self, head: Head, connection: Connection) -> Optional[Answer]:
        """The 429 for a client over its rate, or None."""
        if not self.rate_limit:
            return None
        bucket = connection.bucket
        if connection.proxy:
            client = client_address(connection.proxy, head.forwarded, self.trusted)
            bucket = self.rate_limit.bucket(client)
        wait = self.take_token(bucket)
        if not wait:
            return None
        return failure(429, "Too many requests", "over_rate",
                       "Retry-After: %d\r\n" % self.rate_limit.whole_seconds(wait))

    # -- requests ----------------------------------------------------------------------------------

    def respond(self, request: Request, connection: Connection) -> Tuple[Union[Row, Answer], str]:
        """The row to store, or the answer, and the route that the access log names."""
        self.taken += len(request.text) + len(request.body)
        refusal = self.over_rate(request.head, connection) if self.rate_limit else None
        if refusal is None and request.head.hot and connection.routes is PUBLIC:
            # This short path gives the same answers as the general one, in 3 us instead of 50.
            return check_body(request.body), HOT_ROUTE
        route = route_of(request.text.partition(b"\r\n")[0], connection.routes)
        return refusal or IngestHandler(request, connection.routes, self).result, route

    def add_row(self, row: Row) -> int:
        """Have the turn's transaction store the row. Returns its number in the turn."""
        self.rows.append(row)
        return len(self.rows) - 1

    def encode(self, answer: Answer, close: bool, route: str, bodiless: bool = False) -> bytes:
        """The bytes of an answer, which is counted and logged here."""
        self.metrics.answers[answer.status] += 1
        if answer.reason:
            self.metrics.refusals[answer.reason] += 1
        if self.access_log:
            OUTPUT.write(line(route=route, status=answer.status))
        return answer_bytes(answer, close, self.second, bodiless)

    def commit(self) -> List[Answer]:
        """Store the turn's rows; the answer to each, in order."""
        rows, self.rows = self.rows, []
        sweep = self.store.sweep
        old = sweep.due(self.now, len(rows), self.now - self.answered_at) if sweep else 0
        if not rows and not old:
            return []
        started = time.perf_counter()
        try:
            if old and rows and self.store_fault:
                # By itself: rows that do not fit would undo the deletion that makes room for them.
                self.metrics.swept += self.store.write([], SWEEP_ALONE).swept
                old = 0
            written = self.store.write(rows, old)
        except Unavailable as reason:
            self.note_store(str(reason))
            return [UNAVAILABLE] * len(rows)
        except Exception as error:
            log_fault(error)
            return [INSERT_FAILED] * len(rows)
        if rows or written.swept:  # a turn that changed nothing does not show that rows fit
            self.note_store("")
        self.metrics.commits.add(time.perf_counter() - started)
        self.metrics.rows.add(len(rows))
        self.metrics.swept += written.swept
        self.metrics.events["stored"] += written.stored
        self.metrics.events["already_there"] += len(rows) - written.stored - len(written.refused)
        results = [ACCEPTED] * len(rows)
        for place, fault in written.refused.items():
            log_refused(rows[place], fault)
            results[place] = INSERT_FAILED
        return results

    def answer(self, results: List[Answer]) -> None:
        """Send the turn's answers. None left before the commit."""
        answering, self.connections.answering = self.connections.answering, []
        if answering:
            self.answered_at = self.now
        for connection in answering:
            self.guarded(connection.send_answers, results)

    # -- the store's state, and what is said of it -------------------------------------------------

    def note_store(self, fault: str) -> None:
        """Remember the store's state: its fault, or an empty text."""
        self.store_fault, self.store_checked = fault, self.now
        self.report_store()

    def report_store(self) -> None:
        """Log the store's state if it has changed, at most one line in LOG_SECONDS."""
        fault = self.store_fault
        if fault != self.store_said and self.now >= self.say_store_at:
            if fault:
                log("store_unavailable", reason=fault)
            else:
                log("store_available")
            self.store_said, self.say_store_at = fault, self.now + LOG_SECONDS

    def report(self) -> None:
        """Write log lines that had to wait, and tell the watchdog that the loop runs."""
        self.report_store()
        if _rare:
            log_left_out(self.now)
        for stream in (OUTPUT, ERRORS):
            if stream.lost:
                stream.report_lost()
        if self.now >= self.feed_at:
            self.feed_watchdog()
            self.feed_at = self.now + self.feed_seconds

    def feed(self, watchdog: Callable[[], None], seconds: float) -> None:
        """Call `watchdog` every `seconds`, as long as the loop runs."""
        self.feed_watchdog, self.feed_seconds, self.feed_at = watchdog, seconds, self.now

    def store_is_ready(self) -> bool:
        """Whether the last write succeeded or, a second after it, a new test write does."""
        if self.now - self.store_checked > 1:
            try:
                self.store.probe()
                self.note_store("")
            except Unavailable as reason:
                self.note_store(str(reason))
        return not self.store_fault

    def server_close(self) -> None:
        super().server_close()
        for listener in self.listeners:
            listener.close()
        self.selector.close()
        self.alarm.close()
        self.bell.close()


# ==================================================================================================
# The log: each entry is a line of JSON. README, Contract 8: no whole hash, no discovery's name and
# no client's address is in one.
# ==================================================================================================

MAX_REASON = 300  # characters, of up to 12 bytes in JSON; a line must be shorter than PIPE_BUF


class LineStream:
    """Standard output or standard error, for lines that must not make the server wait.

    If whoever reads the stream has stopped, lines are lost. They are counted, and the count is
    written once the stream takes lines again. The descriptor stays blocking, since other processes
    may share it. poll() says beforehand whether a write would wait: POSIX promises that for a pipe
    and PIPE_BUF bytes.
    """

    def __init__(self, name: str) -> None:
        self.name = name  # of the stream in sys
        self.lost = 0  # lines

    def write(self, text: str) -> None:
        """Write a line, which must be ASCII, or count it as lost."""
        if (self.lost and not self.report_lost()) or not self.put(text):
            self.lost += 1

    def report_lost(self) -> bool:
        """Write how many lines were lost. True if that was written."""
        if not self.put(line(event="lines_lost", stream=self.name, lines=self.lost)):
            return False
        self.lost = 0
        return True

    def put(self, text: str) -> bool:
        """Write a line, unless that would block. True if it was written."""
        stream = getattr(sys, self.name)
        if stream is None:  # there is none, as under pythonw
            return True
        try:
            descriptor = stream.fileno()
        except (AttributeError, OSError, ValueError):  # it has no descriptor, as in a test
            with contextlib.suppress(OSError, ValueError):  # it is closed
                print(text, file=stream)
            return True
        if hasattr(select, "poll"):  # not on Windows
            poll = select.poll()
            poll.register(descriptor, select.POLLOUT)
            if not poll.poll(0):
                return False
        data = text.encode("ascii") + b"\n"
        try:
            return os.write(descriptor, data) == len(data)
        except OSError:  # nobody reads it any more, or its disk is full
            return False


OUTPUT, ERRORS = LineStream("stdout"), LineStream("stderr")


def line(**fields: Any) -> str:
    """The text of a log entry: the time, and these fields."""
    moment = datetime.fromtimestamp(time.time(), timezone.utc).isoformat(timespec="milliseconds")
    return json.dumps({"time": moment.replace("+00:00", "Z"), **fields})


def log(event: str, **fields: Any) -> None:
    if "reason" in fields:
        fields["reason"] = fields["reason"][:MAX_REASON]
    ERRORS.write(line(event=event, **fields))


# Of each kind of line that came in the last LOG_SECONDS: when it was logged, and how many were left
# out since.
_rare: Dict[Tuple[str, Tuple[str, int]], Tuple[float, int]] = {}


def log_rarely(event: str, place: Tuple[str, int], **fields: Any) -> None:
    """Log a line, for each kind at most one in LOG_SECONDS; the others are counted."""
    kind = event, place
    said_at, more = _rare.get(kind, (time.monotonic(), -1))
    _rare[kind] = said_at, more + 1
    if more < 0:
        log(event, **fields)


def log_left_out(now: float) -> None:
    """Log, of each kind, how many lines were left out (`more`), when LOG_SECONDS are over."""
    for kind, (said_at, more) in list(_rare.items()):
        if now - said_at >= LOG_SECONDS:
            _rare.pop(kind, None)  # another server of this process may have done it
            if more:
                _rare[kind] = time.monotonic(), 0
                log(kind[0], more=more)


def log_fault(error: BaseException) -> None:
    """Log a fault of this program: its class and place, no text, which may hold a client's data."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    log_rarely("internal_error", (place.name, place.lineno or 0), kind=type(error).__name__,
               function=place.name, line=place.lineno)


def log_refused(row: Row, error: Exception) -> None:
    """Log a refused row. Only SQLite's own message is logged, since a trigger's may hold data."""
    known = re.fullmatch(r"[A-Z ]+ constraint failed: [\w., ]+", str(error))
    log_rarely("insert_failed", ("", 0), identity=row[0][:6],
               reason=str(error) if known else type(error).__name__)


# ==================================================================================================
# For test fixtures
# ==================================================================================================

class Running:
    """A server in a background thread. `url` is the endpoint."""

    def __init__(self, db: str) -> None:
        self._store = Store(db)
        self._server = IngestServer(("127.0.0.1", 0), self._store)
        self.url = self._server.url + ENDPOINT
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="session-events", daemon=True)
        self._thread.start()

    def events(self) -> List[Dict[str, Any]]:
        """The stored rows, oldest first: dicts of the table's columns, `discovery_refs` a list.

        Raises RuntimeError when the server was stopped.
        """
        rows: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def read() -> None:
            try:
                rows.put(self._read())
            except Exception as error:  # for the caller, in the caller's thread
                rows.put(error)

        self._server.call(read)
        while self._thread.is_alive() or not rows.empty():
            with contextlib.suppress(queue.Empty):
                found = rows.get(timeout=0.05)
                if isinstance(found, Exception):
                    raise found
                return found  # type: ignore[no-any-return]
        raise RuntimeError("the server is stopped")

    def _read(self) -> List[Dict[str, Any]]:
        cursor = self._store.db.execute("SELECT * FROM session_events ORDER BY id")
        names = [column[0] for column in cursor.description]
        events = [dict(zip(names, row)) for row in cursor]
        for stored in events:
            stored["discovery_refs"] = json.loads(stored.pop("discovery_refs_json"))
        return events

    def stop(self) -> None:
        """Finish the turn and close. A second call does nothing."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()
            self._store.close()


@contextlib.contextmanager
def running(db: str = ":memory:") -> Iterator[Running]:
    """A server on a free loopback port for the length of a `with` block, for test fixtures.

    `db`: a file, or ":memory:". Yields Running. Raises StartError when the file cannot be used.
    """
    server = Running(db)
    try:
        yield server
    finally:
        server.stop()


# ==================================================================================================
# The command line
# ==================================================================================================

GRACE_SECONDS = 2.0  # at the end, for requests that are on their way
LEAST_DATABASE = 100_000  # bytes: the empty tables take 50,000
SPARE_DESCRIPTORS = 64  # beside the connections: the database, listeners, the loop's own

EPILOG = """\
example:
  python3 server.py --db events.db --port 8787
  curl http://127.0.0.1:8787/readyz
  python3 server.py --db events.db --backup events-backup.db

SIGTERM and Ctrl-C finish what is under way and exit with 0. A server that cannot start exits with
2. SIGHUP reads the TLS files again. A server that a systemd socket unit starts takes that socket in
place of --host and --port.
"""


def rate(text: str) -> Optional[Rate]:
    if text == "off":
        return None
    number, _, unit = text.partition("/")
    return Rate(positive(number), {"s": 1.0, "min": 60.0, "h": 3600.0}[unit])


def positive(text: str) -> int:
    """A whole number from 1 up. 18 digits fit into the 64 bits of SQLite and of the system."""
    if len(text) > 18 or int(text) < 1:
        raise ValueError
    return int(text)


def database_bytes(text: str) -> int:
    """A size with room for the tables and some events."""
    if positive(text) < LEAST_DATABASE:
        raise ValueError
    return int(text)


def seconds(text: str) -> float:
    if not 0 < float(text) <= 86400:
        raise ValueError
    return float(text)


def network(text: str) -> Network:
    return ipaddress.ip_network(text, strict=False)


def checked(parse: Callable[[str], Any], wanted: str) -> Callable[[str], Any]:
    """`parse`, with a message that says "is not `wanted`" where it raises."""
    def convert(text: str) -> Any:
        try:
            return parse(text)
        except (ValueError, KeyError):
            raise argparse.ArgumentTypeError("%r is not %s" % (text, wanted)) from None
    return convert


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="server.py",
        description="Take session events over HTTP and keep them in one SQLite file. A flag's"
                    " default is in parentheses.",
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(flag: str, parse: Callable[[str], Any], wanted: str, metavar: str, default: Any,
            words: str) -> None:
        # argparse calls `type` with a default that is text, too.
        p.add_argument(flag, type=checked(parse, wanted), metavar=metavar, default=default,
                       help=words)

    p.add_argument("--db", required=True, metavar="FILE",
                   help="the database; made, with mode 0600, when it is not there")
    add("--host", host, "an address or a host's name", "ADDRESS", "127.0.0.1",
        "the address to listen on (127.0.0.1)")
    add("--port", port, "a port: 0 to 65535", "PORT", 8787, "the port; 0 takes any free one (8787)")
    add("--max-connections", positive, "a positive number", "N", DEFAULTS.max_connections,
        "open connections; beyond that the longest idle make room (4096)")
    add("--request-seconds", seconds, "seconds", "S", DEFAULTS.request_seconds,
        "longest time from a request's first byte to its last (10)")
    add("--idle-seconds", seconds, "seconds", "S", DEFAULTS.idle_seconds,
        "longest time between the requests of a connection (30)")
    add("--write-seconds", seconds, "seconds", "S", DEFAULTS.write_seconds,
        "longest time in which a client takes no byte of its answer (10)")
    add("--rate", rate, "a rate such as 600/min, 10/s, 5000/h, or off", "N/UNIT", Rate(600, 60.0),
        "requests per client address, IPv6 per /64; loopback is not limited (600/min)")
    p.add_argument("--trusted-proxy", type=checked(network, "a network such as 10.0.0.0/8"),
                   metavar="CIDR", action="append", default=[],
                   help="believe X-Forwarded-For from there; may be repeated (none)")
    add("--max-db-bytes", database_bytes, "a number of at least %d" % LEAST_DATABASE, "N", None,
        "size beyond which the database file does not grow (none)")
    add("--retain-days", positive, "a positive number", "N", 0,
        "delete events received longer ago, in small pieces (keep all)")
    task = p.add_mutually_exclusive_group()
    task.add_argument("--backup", metavar="FILE",
                      help="write a copy of the database to a new FILE, beside a running server,"
                           " and exit")
    task.add_argument("--forget", metavar="HASH", nargs="+", action="extend",
                      help="delete all events of these identity or GitHub hashes and every trace"
                           " of them, beside a running server, and exit; - reads hashes from"
                           " standard input; the statement that deletes them from ClickHouse is"
                           " printed on standard output")
    add("--pepper-file", not_blank, "a file", "FILE", None,
        "store HMAC-SHA256(pepper, hash) for each hash; the file is made when it is not there"
        " (store what was sent)")
    add("--tls-cert", not_blank, "a file", "FILE", None,
        "serve https with this certificate chain (PEM)")
    add("--tls-key", not_blank, "a file", "FILE", None, "the certificate's key (PEM)")
    add("--metrics", host_and_port, "HOST:PORT", "HOST:PORT", None,
        "serve Prometheus metrics there (nowhere)")
    p.add_argument("--access-log", action="store_true",
                   help="a line of JSON on standard output for each request: time, route, status;"
                        " no address")
    p.add_argument("--version", action="version", version="server.py " + __version__)
    return p


def main(argv: Optional[List[str]] = None) -> int:
    p = parser()
    options = p.parse_args(argv)
    if bool(options.tls_cert) != bool(options.tls_key):
        p.error("--tls-cert and --tls-key go together")
    if options.backup is not None or options.forget is not None:
        return run_command(options)
    try:
        server = build(options)
        handle_signals(server, options)
    except StartError as error:
        print("server.py: %s" % error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # SQLite undoes a migration that was not finished
        return 128 + signal.SIGINT
    OUTPUT.write("listening on " + server.url)
    for listener in server.operators():
        OUTPUT.write("metrics on %s/metrics" % url_of("http", listener))
    notify("READY=1")
    every = watchdog_seconds()
    if every:
        server.feed(lambda: notify("WATCHDOG=1"), every)
    server.serve_forever()
    server.server_close()
    server.store.close()
    return 0


def run_command(options: argparse.Namespace) -> int:
    """--backup or --forget. Returns the exit status: 0 done, 1 not completed, 2 not begun."""
    command = Command()
    try:
        if options.backup is not None:
            if hasattr(os, "nice"):
                os.nice(10)  # the server goes first
            command.catch_signals()
            back_up(options.db, options.backup, command)
        else:
            hashes = read_hashes(options.db, options.forget, options.pepper_file)
            command.catch_signals()
            forget(options.db, hashes, command)
        return 0
    except (KeyboardInterrupt, Interrupted) as error:
        status, words = 128 + (error.args[0] if error.args else signal.SIGINT), "interrupted"
    except StartError as error:
        status, words = 2, str(error)
    except CommandError as error:
        status, words = 1, str(error)
    command.say("server.py: " + words)
    return status


def build(options: argparse.Namespace) -> IngestServer:
    """The server that the command line asks for, listening. Raises StartError."""
    tls = load_tls(options) if options.tls_cert else None
    new_pepper = bool(options.pepper_file) and not os.path.lexists(options.pepper_file)
    pepper = None if new_pepper or not options.pepper_file else load_pepper(options.pepper_file)
    connections = raise_descriptor_limit(options.max_connections)
    limits = Limits(options.request_seconds, options.idle_seconds, options.write_seconds,
                    connections, options.rate)
    with contextlib.ExitStack() as undo:
        store = Store(options.db, options.max_db_bytes, pepper, options.retain_days)
        undo.callback(store.close)
        if new_pepper:  # made only now: Store() has refused a database with another pepper
            store.pepper = make_pepper(options.pepper_file)
            try:
                store.check_pepper()
            except sqlite3.Error as error:
                raise StartError("cannot use %s: %s" % (options.db, error)) from None
        inherited = inherited_listener()
        with listening("--port", (options.host, options.port)):
            server = IngestServer(
                (options.host, options.port), store, limits, inherited=inherited,
                access_log=options.access_log, trusted=options.trusted_proxy, tls=tls)
        undo.callback(server.server_close)
        if options.metrics:
            with listening("--metrics", options.metrics):
                server.listen(open_listener(options.metrics), OPERATORS)
        undo.pop_all()
    return server


@contextlib.contextmanager
def listening(flag: str, place: Place) -> Iterator[None]:
    """Turn an OSError of the block into a StartError that names the place and its flag."""
    try:
        yield
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        raise StartError("cannot listen on %s port %d (%s): %s%s" % (
            *place, flag, error.strerror,
            "; is another server running? Port 0 takes any free one" if taken else "")) from None


def handle_signals(server: IngestServer, options: argparse.Namespace) -> None:
    def end(*_: Any) -> None:
        notify("STOPPING=1")
        server.shutdown(0.0 if server.stopping else GRACE_SECONDS)

    def reload(*_: Any) -> None:
        if not server.tls:
            return
        try:
            server.tls = load_tls(options)
            log("tls_reloaded")
        except StartError as error:
            log("tls_not_reloaded", reason=str(error))

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, reload)


def load_tls(options: argparse.Namespace) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # An empty password: otherwise OpenSSL asks for one on the terminal.
        context.load_cert_chain(options.tls_cert, options.tls_key, password="")
    except (OSError, ValueError) as error:
        files = options.tls_cert, options.tls_key
        raise StartError("cannot use the TLS files %s and %s: %s" % (*files, error)) from None
    return context


def raise_descriptor_limit(connections: int) -> int:
    """Raise the descriptor limit for so many connections; the number that it allows."""
    if resource is None:
        return connections
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + SPARE_DESCRIPTORS
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return connections
    soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft < wanted:
        log("descriptor_limit", descriptors=soft, connections=max(1, soft - SPARE_DESCRIPTORS))
    return max(1, soft - SPARE_DESCRIPTORS)


def watchdog_seconds() -> float:
    """Seconds between signs of life for systemd's watchdog (sd_watchdog_enabled(3)); 0.0: none."""
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    mine = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    known = mine and re.fullmatch("[0-9]{1,15}", microseconds)
    return int(microseconds) / 1e6 / 2 if known else 0.0


def notify(state: str) -> None:
    """Send systemd a message (sd_notify(3)), if it started this process."""
    path = os.environ.get("NOTIFY_SOCKET")
    if path:
        address = "\0" + path[1:] if path.startswith("@") else path
        with contextlib.suppress(OSError), socket.socket(
                socket.AF_UNIX, socket.SOCK_DGRAM) as notices:
            notices.setblocking(False)
            notices.sendto(state.encode("ascii"), address)


if __name__ == "__main__":
    sys.exit(main())
