#!/usr/bin/env python3
"""The session-event server: takes events over HTTP, checks each, and keeps them in one SQLite file.

    python3 server.py --db events.db            # listens on http://127.0.0.1:8787

One file, Python 3.8 or newer, standard library only. In somebody's tests:

    with server.running() as events:            # a free loopback port, a database in memory
        client.send(events.url)
        assert events.events()[0]["tool_count"] == 42

What it promises:

- 202 means durable: the row is committed (WAL, synchronous=FULL) before the first byte of the answer leaves.
- The same event twice is one row, and both get the same bytes for an answer.
- Nothing it logs or counts names a developer, a session, a discovery or an address.
- It has no code that reads an event back over HTTP.

One turn of the loop is one transaction: read what has arrived, check it, commit once, then answer. So one fsync
serves every event of the turn, a slow client costs a buffer and no thread, and there are no locks.
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
import queue
import re
import selectors
import signal
import socket
import socketserver
import sqlite3
import ssl
import sys
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
    Union,
)

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

__version__ = "1.0.0"

# ======================================================================================================
# The contract's constants
# ======================================================================================================

ENDPOINT = "/v1/session-events"
MAX_BODY = 64 * 1024  # bytes, CONTRACT §1
SCHEMA_VERSION = 1
SCHEMA = """\
-- The session-event store: CONTRACT.md section 3, for SQLite 3.38 or newer (or an older one built with JSON1).
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

COLUMNS = (
    "identity_hash", "github_hash", "session_id_hash", "ended_at", "tool_count",
    "tokens_saved", "branch_sha", "discovery_refs_json", "plugin_version",
)

# What a stored event is, in the order of COLUMNS.
Row = Tuple[str, Optional[str], str, str, int, int, Optional[str], str, str]


# ======================================================================================================
# The event check: bytes in, a row or the faults out (CONTRACT §1)
# ======================================================================================================

Issue = Dict[str, Any]  # {"path": [field or index, ...], "message": words}

HASH = "[0-9a-f]{64}"
SHA = "[0-9a-fA-F]{7,40}"
SLUG = "[A-Za-z0-9][A-Za-z0-9._:-]{0,127}"
VERSION = "[0-9A-Za-z][0-9A-Za-z.+_-]{0,63}"
MAX_TOOLS = 1_000_000
MAX_TOKENS = 1_000_000_000
MAX_REFS = 200
MAX_ISSUES = 100  # a body of 13,000 unknown keys is not worth an answer of a megabyte


class Fault(Exception):
    """What is wrong with one field. `found`: (path below the field, words for whoever wrote the client) pairs."""

    def __init__(self, words: str, *below: Tuple[int, str]) -> None:
        super().__init__(words)
        self.found: List[Tuple[List[int], str]] = [([index], text) for index, text in below] or [([], words)]


class NotJSON(ValueError):
    """The body is not JSON text in UTF-8."""


class NotAnEvent(ValueError):
    """The body is JSON, and `issues` says what keeps it from being an event."""

    def __init__(self, issues: List[Issue]) -> None:
        super().__init__("Validation failed")
        self.issues = issues


Check = Callable[[Any], Any]  # a field's JSON value in, what is stored out; raises Fault


def text_of(shape: str, words: str) -> Check:
    """A check for strings that are `shape` from end to end. (`fullmatch`: `$` would let a newline follow.)"""
    whole = re.compile(shape, re.ASCII).fullmatch

    def check(value: Any) -> str:
        if type(value) is str and whole(value):
            return value
        raise Fault(words)
    return check


def or_null(check: Check) -> Check:
    """The same check for a field that may also be null."""
    return lambda value: None if value is None else check(value)


def whole_number(most: int) -> Check:
    """A check for whole JSON numbers, `5.0` and `5e0` among them. A bool is an int to Python, and none here."""
    def check(value: Any) -> int:
        if (type(value) is int or (type(value) is float and value.is_integer())) and 0 <= value <= most:
            return int(value)
        raise Fault("must be a whole number from 0 to %d" % most)
    return check


_moment = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2}T(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9])(?:\.([0-9]+))?"
    r"(?:Z|([+-])([01][0-9]|2[0-3]):([0-5][0-9]))?").fullmatch


def utc_milliseconds(value: Any) -> str:
    """`2026-05-22T14:34:56.5+02:00` as `2026-05-22T12:34:56.500Z`, the form in which text order is time order."""
    match = _moment(value) if type(value) is str else None
    if not match:
        raise Fault("must be an ISO 8601 date and time with seconds, such as 2026-05-22T12:34:56.000Z")
    seconds, fraction, sign, hours, minutes = match.groups()
    try:
        moment = datetime.fromisoformat(seconds)
        if sign:
            offset = timedelta(hours=int(hours), minutes=int(minutes))
            seconds = (moment - offset if sign == "+" else moment + offset).isoformat()
    except (ValueError, OverflowError):
        raise Fault("must be a date and time that exists in the calendar, years 0001 to 9999 in UTC") from None
    return "%s.%sZ" % (seconds, ((fraction or "") + "000")[:3])


_slug = re.compile(SLUG).fullmatch


def refs_json(value: Any) -> str:
    """A list of discovery references as JSON array text. A slug holds nothing that JSON would have to escape."""
    if type(value) is not list:
        raise Fault("must be an array of strings")
    if len(value) > MAX_REFS:
        raise Fault("must have at most %d entries" % MAX_REFS)
    odd = [i for i, ref in enumerate(value) if type(ref) is not str or not _slug(ref)]
    if odd:
        words = "must be a slug: 1 to 128 of A-Z a-z 0-9 . _ : -, the first a letter or digit"
        raise Fault(words, *((i, words) for i in odd))
    return '["%s"]' % '","'.join(value) if value else "[]"


_hash = text_of(HASH, "must be a SHA-256 hash: 64 lowercase hex digits")
_sha = text_of(SHA, "must be a commit hash of 7 to 40 hex digits, or null")
NEEDED = object()  # stands in for a needed field that is not there; no check takes it

# (field, its check, what an absent field counts as), in the order of COLUMNS
FIELDS: Tuple[Tuple[str, Check, Any], ...] = (
    ("identity_hash", _hash, NEEDED),
    ("github_hash", or_null(_hash), None),
    ("session_id_hash", _hash, NEEDED),
    ("ended_at", utc_milliseconds, NEEDED),
    ("tool_count", whole_number(MAX_TOOLS), NEEDED),
    ("tokens_saved", whole_number(MAX_TOKENS), NEEDED),
    ("branch_sha", or_null(lambda value: _sha(value).lower()), None),
    ("discovery_refs", refs_json, []),
    ("plugin_version", text_of(VERSION, "must be a version of 1 to 64 of A-Z a-z 0-9 . + _ -"), NEEDED),
)
NAMES = {name for name, _check, _absent in FIELDS}


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)  # NaN and Infinity, which Python's json takes and JSON does not know


_decode = json.JSONDecoder(parse_constant=_no_constant).decode
_decode_huge = json.JSONDecoder(parse_constant=_no_constant, parse_int=float).decode


def parse_json(body: bytes) -> Any:
    """The JSON value in `body`. Raises NotJSON, whatever the body is.

    UTF-8 only, while json.loads would guess UTF-16 and UTF-32. Python refuses integers of more than 4,300 digits with
    a plain ValueError: as floats they parse, and fail where a range is checked.
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
    """The row of a parsed event. Raises NotAnEvent with one issue for each fault, never with a value in it."""
    if type(event) is not dict:
        raise NotAnEvent([{"path": [], "message": "must be a JSON object"}])
    try:
        row = [check(event.get(name, absent)) for name, check, absent in FIELDS]
        if event.keys() <= NAMES:
            return tuple(row)  # as long as FIELDS, each of its check's type
    except Fault:
        pass
    raise NotAnEvent(all_issues(event))


def all_issues(event: Dict[str, Any]) -> List[Issue]:
    """Every fault of an object that is not an event."""
    issues: List[Issue] = []
    for name, check, absent in FIELDS:
        try:
            check(event.get(name, absent))
        except Fault as fault:
            found = fault.found if name in event else [([], "is required")]
            issues += [{"path": [name, *below], "message": words} for below, words in found]
    return issues + unknown_keys(event)


# An event as emit.py and most clients write it: the fields in the contract's order, no blanks, no escapes, the moment
# in its stored form. What cannot be seen from the shape (29 February) is left to check_event.
_stored_moment = (
    r"(?!0000)[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    r"|02-(?:0[1-9]|1[0-9]|2[0-8]))T(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]\.[0-9]{3}Z")
_canonical = re.compile(
    r'\{{"identity_hash":"({HASH})",(?:"github_hash":(?:null|"({HASH})"),)?"session_id_hash":"({HASH})",'
    r'"ended_at":"({MOMENT})","tool_count":(0|[1-9][0-9]{{0,6}}),"tokens_saved":(0|[1-9][0-9]{{0,9}}),'
    r'(?:"branch_sha":(?:null|"({SHA})"),)?"discovery_refs":(\[(?:"{SLUG}"(?:,"{SLUG}"){{0,{MORE}}})?\]),'
    r'"plugin_version":"({VERSION})"\}}'.format(
        HASH=HASH, MOMENT=_stored_moment, SHA=SHA, SLUG=SLUG, VERSION=VERSION, MORE=MAX_REFS - 1)).fullmatch


def canonical_row(body: bytes) -> Optional[Row]:
    """The row of an event in the usual form, or None for check_event to say: 2.0 us, where that takes 6.3."""
    match = _canonical(body.decode("latin-1"))  # which takes any byte, and no shape takes one that is not ASCII
    if not match:
        return None
    identity, github, session, moment, tools_text, tokens_text, sha, refs, version = match.groups()
    tools, tokens = int(tools_text), int(tokens_text)
    if tools > MAX_TOOLS or tokens > MAX_TOKENS:
        return None
    return identity, github, session, moment, tools, tokens, sha and sha.lower(), refs, version


def unknown_keys(event: Dict[str, Any]) -> List[Issue]:
    """An issue for each key that no event has; a key that does not look like a field's name is not repeated."""
    unknown = [key for key in event if key not in NAMES]
    named = re.compile("[A-Za-z0-9_-]{1,64}").fullmatch
    issues = [{"path": [key] if named(key) else [], "message": "is not a field of an event"}
              for key in unknown[:MAX_ISSUES]]
    if len(unknown) > MAX_ISSUES:
        issues.append({"path": [], "message": "has %d more unknown keys" % (len(unknown) - MAX_ISSUES)})
    return issues


# ======================================================================================================
# HTTP, the pure part: the head of a request in, bytes of an answer out
# ======================================================================================================

MAX_HEAD = 16 * 1024  # bytes, request line and headers
MAX_HEADERS = 99  # what http.server itself takes
ONCE_ONLY = {b"content-length", b"transfer-encoding", b"host", b"expect"}  # two of these can be read in two ways


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
UNAVAILABLE = failure(503, "The store cannot take events now", "store_unavailable", "Retry-After: 5\r\n")
INSERT_FAILED = failure(500, "Insert failed", "insert_failed")
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Refused(Exception):
    """A request after which its connection cannot go on: where the next one begins is not known."""

    def __init__(self, status: int, words: str, reason: str = "malformed_request") -> None:
        super().__init__(words)
        self.answer = failure(status, words, reason)


class Head(NamedTuple):
    """What the head of a request says about its framing and its sender."""
    length: int  # bytes of the body
    keep: bool  # the connection stays open after the answer
    expects: bool  # the client waits for "100 Continue"
    hot: bool  # POST of an event: needs nothing that http.server would find out
    forwarded: str  # X-Forwarded-For, its lines joined


_request_line = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([!-~]+) HTTP/1\.([01])").fullmatch
_header_line = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t -~\x80-\xff]*)").fullmatch
_hot_line = b"POST " + ENDPOINT.encode()
_bare = re.compile(rb"(?<!\r)\n|\r(?=[^\n])").search


@functools.lru_cache(maxsize=1024)
def parse_head(head: bytes) -> Head:
    """The framing that `head` (without the empty line) asks for. Raises Refused where it can be read in two ways.

    http.server's own parser is lenient, and slow: it halves the rate of ingest. Clients of one kind send one head, so
    the memo answers nearly all: 0.2 us for 9 us. (1,024 heads of up to 16 KiB bound it to some 32 MiB.)
    """
    first, *lines = head.split(b"\r\n")
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
    options = {option.strip() for option in headers.get(b"connection", b"").lower().split(b",")}
    return Head(
        length=body_length(headers),
        keep=request[3] == b"1" and b"close" not in options,
        expects=request[3] == b"1" and expects_continue(headers),
        hot=first[:-9] == _hot_line and b"content-length" in headers,
        forwarded=headers.get(b"x-forwarded-for", b"").decode("latin-1"),
    )


def body_length(headers: Dict[bytes, bytes]) -> int:
    """The bytes of the body that follows. Raises Refused: 400, 411 or 413."""
    length = headers.get(b"content-length")
    if b"transfer-encoding" in headers:
        if length is not None:
            raise Refused(400, "Content-Length and Transfer-Encoding in one request")
        raise Refused(411, "Send the body with a Content-Length; chunked is not taken", "no_length")
    if length is None:
        return 0
    if not re.fullmatch(rb"[0-9]{1,19}", length):
        raise Refused(400, "Malformed Content-Length")
    if int(length) > MAX_BODY:
        raise Refused(413, "The body is over %d bytes" % MAX_BODY, "body_too_large")
    return int(length)


def expects_continue(headers: Dict[bytes, bytes]) -> bool:
    expected = headers.get(b"expect")
    if expected is not None and expected.lower() != b"100-continue":
        raise Refused(417, "The only expectation known is 100-continue")
    return expected is not None


def find_head(data: bytes, start: int, searched: int) -> int:
    """Where the head that begins at `start` ends, or -1 when more must come. Raises Refused when none can.

    Up to `searched` an earlier call has looked already, so that a head which comes byte by byte costs no square.
    """
    end = data.find(b"\r\n\r\n", max(start, searched - 3))
    if (end if end >= 0 else len(data)) - start > MAX_HEAD:
        raise Refused(431, "The head is over %d bytes" % MAX_HEAD, "head_too_large")
    if end < 0 and _bare(data, max(start, searched - 1)):
        raise Refused(400, "A bare CR or LF in the head")
    return end


@functools.lru_cache(maxsize=1)
def http_date(second: int) -> str:
    return formatdate(second, usegmt=True)


@functools.lru_cache(maxsize=64)
def frame(answer: Answer, close: bool, second: int, bodiless: bool = False) -> bytes:
    """The bytes of an answer. The memo saves the one answer that nearly all get from being built each time (4 us)."""
    return (
        "HTTP/1.1 %d %s\r\nServer: session-events\r\nDate: %s\r\nContent-Type: %s\r\nContent-Length: %d\r\n"
        "Cache-Control: no-store\r\n%s%s\r\n" % (
            answer.status, http.HTTPStatus(answer.status).phrase, http_date(second),
            answer.media_type, len(answer.payload), answer.extra, "Connection: close\r\n" if close else "")
    ).encode("ascii") + (b"" if bodiless else answer.payload)


# ======================================================================================================
# Who may send how much: addresses in, seconds to wait out
# ======================================================================================================

MAX_BUCKETS = 65536  # about 10 MB; beyond that the one that was quiet longest is forgotten

Address = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]
Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]


class Rate(NamedTuple):
    """So many requests in so many seconds, all of them at once if need be."""
    requests: int
    seconds: float


def parse_address(text: str) -> Optional[Address]:
    """An address, its port (which some proxies add) and its zone cut, IPv4 in IPv6 clothes undressed; else None."""
    bracketed = re.fullmatch(r"\s*\[([^]]*)\](?::[0-9]+)?\s*|\s*([0-9.]+):[0-9]+\s*", text)
    bare = (bracketed[1] or bracketed[2] or "") if bracketed else text
    try:
        address = ipaddress.ip_address(bare.partition("%")[0].strip())
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def client_address(peer: str, forwarded: str, trusted: Sequence[Network]) -> Optional[Address]:
    """Who sends: the peer, or, when that is a trusted proxy, the last hop in X-Forwarded-For that is none.

    Read from the right, since whatever stands further left was written by a client. What is no address ends the walk.
    """
    client = parse_address(peer)
    hops = forwarded.split(",")
    while client and hops and any(client in network for network in trusted):
        hop = parse_address(hops.pop())
        if not hop:
            break
        client = hop
    return client


class RateLimit:
    """A token bucket for each client, kept as the moment at which it will be full again (GCRA).

    Clients are kept under a hash with a key that dies with the process: what lies in the memory, or in a core dump,
    is no list of addresses. An IPv6 client is its /64, which is what a subscriber gets.
    """

    def __init__(self, rate: Rate) -> None:
        self.interval = rate.seconds / rate.requests
        self.burst = rate.seconds - self.interval
        self.full_at: Dict[bytes, float] = {}  # in the order of last use
        self.key = os.urandom(16)

    def bucket(self, client: Optional[Address]) -> Optional[bytes]:
        """The name of a client's bucket; None for one that is not limited."""
        if client is None or client.is_loopback:
            return None
        packed = client.packed[:8] if client.version == 6 else client.packed
        return hashlib.blake2b(packed, key=self.key, digest_size=8).digest()

    def wait(self, bucket: bytes, now: float) -> float:
        """Take a token: 0.0; or the seconds until there is one. `now` never goes backwards."""
        full_at = max(self.full_at.pop(bucket, now), now)
        wait = full_at - now - self.burst
        if wait < self.interval / 1000:  # what rounding makes of none
            wait, full_at = 0.0, full_at + self.interval
        self.full_at[bucket] = full_at
        if len(self.full_at) > MAX_BUCKETS:
            del self.full_at[next(iter(self.full_at))]
        return wait


# ======================================================================================================
# Metrics: numbers in, Prometheus text out. No label names a client, a developer or a session.
# ======================================================================================================

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
        self.rows = Histogram(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
        self.commits = Histogram(.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5)

    def text(self, connections: Dict[str, int], database_bytes: int) -> bytes:
        """The text format, version 0.0.4."""
        def labelled(name: str, label: str, values: Mapping[Any, int]) -> List[str]:
            return ['%s{%s="%s"} %d' % (name, label, value, values[value]) for value in sorted(values)]

        build = '{version="%s",python="%s",sqlite="%s"} 1' % (
            __version__, ".".join(map(str, sys.version_info[:3])), sqlite3.sqlite_version)
        families: List[Tuple[str, str, str, Callable[[str], Iterable[str]]]] = [
            ("http_requests_total", "counter", "Answers sent, by status.",
             lambda name: labelled(name, "status", self.answers)),
            ("events_total", "counter", "Events answered 202, by what became of them.",
             lambda name: labelled(name, "result", self.events)),
            ("refusals_total", "counter", "Requests not answered 2xx, by reason.",
             lambda name: labelled(name, "reason", self.refusals)),
            ("swept_rows_total", "counter", "Rows deleted because of --retain-days.",
             lambda name: ["%s %d" % (name, self.swept)]),
            ("turn_rows", "histogram", "Rows in a turn's transaction.", self.rows.samples),
            ("commit_seconds", "histogram", "Seconds of a turn's transaction, commit included.", self.commits.samples),
            ("connections", "gauge", "Open connections, by what they wait for.",
             lambda name: labelled(name, "phase", connections)),
            ("database_bytes", "gauge", "Size of the database and its log.",
             lambda name: ["%s %d" % (name, database_bytes)]),
            ("build_info", "gauge", "What runs.", lambda name: [name + build]),
        ]
        lines: List[str] = []
        for short, kind, words, samples in families:
            name = "session_events_" + short
            lines += ["# HELP %s %s" % (name, words), "# TYPE %s %s" % (name, kind), *samples(name)]
        return ("\n".join(lines) + "\n").encode("ascii")


# ======================================================================================================
# The store
# ======================================================================================================

class StartError(Exception):
    """The database, or a file beside it, cannot be used. The text is one line for the operator."""


class Unavailable(Exception):
    """The store cannot take rows now, and nothing of this turn was stored. The text is for the log."""


# SQLite's words for faults that pass, or that an operator mends, without the rows being to blame. (Error codes as
# attributes came with Python 3.11.)
PASSING = ("database is locked", "table is locked", "disk is full", "readonly database", "disk I/O error",
           "unable to open database", "disk image is malformed", "file is not a database")

SETTINGS = (
    # Readers never hold up the writer, and a commit is one append and one fsync.
    "journal_mode = WAL",
    # A commit is on the disk when it returns: 202 means that. WAL's usual NORMAL loses the last ones with the power.
    "synchronous = FULL",
    # 4 MB of pages: what a turn writes. No more, for after a commit in which a leaf was split, and that is nearly each,
    # SQLite walks through its whole cache: 64 MB of it cost 4% of the rate, at a million rows 18%. Leaves that are not
    # in it come from the system's own cache, at 1 us. (With 2 MB, turns of 200 rows spill.)
    "cache_size = -4096",
    # Pages in the log before they are moved into the database (128 MB instead of 4): a page that many events touch is
    # moved once for all of them. On disk, at a million rows and 32 clients, 4,000 pages give 8,000 events/s, these
    # 11,900; while they are moved nobody is answered, 60 ms and 180 at the most. A start after a crash takes 0.1 s.
    "wal_autocheckpoint = 32000",
    # Bytes: after somebody's long read, which keeps the log growing, it shrinks again.
    "journal_size_limit = 201326592",
)

# received_at comes along, although the table has a default: the default is a function (see the schema's triggers).
INSERT = "INSERT %%s INTO session_events (%s, received_at) VALUES (%s, ?) ON CONFLICT DO NOTHING" % (
    ", ".join(COLUMNS), ", ".join("?" * len(COLUMNS)))
# OR ROLLBACK spares the statement journal: 26 us an event become 22, at 20 events a turn.
INSERT_ALL = INSERT % "OR ROLLBACK"
INSERT_ONE = INSERT % ""


DELETE_OLD = (
    "DELETE FROM session_events WHERE id IN (SELECT id FROM session_events"
    " WHERE received_at < strftime('%Y-%m-%dT%H:%M:%SZ', 'now', ?) ORDER BY received_at LIMIT ?)")


LARGEST_EVENT = 64  # pages, generously: its refs stand in the row, in the edges and in their index


class Written(NamedTuple):
    """What became of a turn's rows."""
    stored: int  # new ones; the others were there already
    refused: Dict[int, Exception]  # place in the turn: what the database said of this one
    swept: int  # old rows deleted


class Store:
    """The one connection to the database. Raises StartError when it cannot be used.

    `path` may be `:memory:`. `max_bytes` bounds the database file (its log comes on top). With a `pepper` the three
    hash columns hold HMAC-SHA256(pepper, hash) in place of the hash. `retain_days` of 0 keeps all rows.
    """

    LOCK_SECONDS = 0.25  # how long a turn may wait for another process's write lock

    def __init__(self, path: str, max_bytes: Optional[int] = None, pepper: Optional[bytes] = None,
                 retain_days: int = 0) -> None:
        self.in_memory = path == ":memory:"
        self.path = path if self.in_memory else os.path.realpath(path)  # the side files lie beside the real one
        self.max_bytes, self.pepper, self.retain_days = max_bytes, pepper, retain_days
        self.moved = False
        self.room_missed = -1  # pages that were left when rows last did not fit under `max_bytes`
        try:
            self.db = self.connect()
            try:
                self.migrate()
            except BaseException:
                self.db.close()
                raise
        except (OSError, sqlite3.Error) as error:
            raise StartError("cannot use %s: %s" % (path, getattr(error, "strerror", None) or error)) from None
        names = () if self.in_memory else (self.path, self.path + "-wal")
        self.files = [(name, file_identity(name)) for name in names]

    def connect(self) -> sqlite3.Connection:
        if not self.in_memory:
            with contextlib.suppress(FileExistsError):
                # SQLite gives the side files the mode of the database.
                os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        return sqlite3.connect(self.path, timeout=self.LOCK_SECONDS, isolation_level=None, check_same_thread=False)

    def migrate(self) -> None:
        """Bring the file to SCHEMA_VERSION: the schema's text is its own migration, from nothing or from version 0."""
        version = self.db.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise StartError("%s has schema version %d, and this server.py knows %d: use a newer server.py"
                             % (self.path, version, SCHEMA_VERSION))
        if version == SCHEMA_VERSION or self.columns("session_events"):
            self.check_table()  # before anything in the file is changed
        for setting in SETTINGS:
            self.db.execute("PRAGMA " + setting)
        if self.max_bytes is not None:
            page_size = self.db.execute("PRAGMA page_size").fetchone()[0]
            self.db.execute("PRAGMA max_page_count = %d" % max(1, self.max_bytes // page_size))
        if version < SCHEMA_VERSION:
            self.db.executescript("BEGIN IMMEDIATE;\n%s\nCOMMIT;" % SCHEMA)
        self.check_rest()

    def columns(self, table: str) -> Set[str]:
        return {row[1] for row in self.db.execute("PRAGMA table_info(%s)" % table)}

    def check_table(self) -> None:
        """Another program's session_events is taken when it has the contract's columns."""
        missing = {"id", "received_at", *COLUMNS} - self.columns("session_events")
        if missing:
            raise StartError("%s has no table session_events with a column %s: it is not this program's"
                             % (self.path, min(missing)))

    def check_rest(self) -> None:
        """What makes events idempotent and keeps their edges has to be there, whatever user_version says."""
        names = {row[0] for row in self.db.execute("SELECT name FROM sqlite_master")}
        wanted = re.findall(r"CREATE (?:TABLE|TRIGGER|INDEX|UNIQUE INDEX) IF NOT EXISTS (\w+)", SCHEMA)
        missing = [name for name in wanted if name not in names]
        unique = [row[1] for row in self.db.execute("PRAGMA index_list(session_events)") if row[2] and not row[4]]
        keys = [[row[2] for row in self.db.execute("PRAGMA index_info(%s)" % name)] for name in unique]
        if missing or ["identity_hash", "session_id_hash"] not in keys:
            raise StartError("%s is not whole: %s is missing" % (
                self.path, missing[0] if missing else "the unique index on (identity_hash, session_id_hash)"))

    def check_files(self) -> None:
        """Raises Unavailable when the open files are no longer the ones at their paths: what is written is lost."""
        self.moved = any(file_identity(name) != identity for name, identity in self.files)
        if self.moved:
            raise Unavailable("the database or its -wal file was deleted, replaced or emptied while in use: "
                              "put it back, or restart the server")

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """What is done inside is durable on leaving, or undone; Unavailable says why."""
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
            raise Unavailable(str(error)) from None
        # After the commit, so that it holds when the answers go: one check covers a deletion before and during it.
        self.check_files()

    def write(self, rows: List[Row], sweep: int = 0) -> Written:
        """Store the rows of a turn in one transaction, durable on return. Raises Unavailable when none is stored.

        In the same transaction up to `sweep` of the rows that are older than `retain_days` are deleted: that costs
        no fsync, and it keeps up with whatever comes in.
        """
        received_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        hidden = [self.hide(row) for row in rows] if self.pepper else rows
        with self.transaction():
            self.room_missed = self.room()  # and so it stays when the rows do not fit
            swept = self.delete_old(sweep) if sweep else 0  # first: at the size limit, this makes the room
            stored, refused = self.insert([(*row, received_at) for row in hidden])
        self.room_missed = -1
        return Written(stored, refused, swept)

    def insert(self, rows: List[Tuple[Any, ...]]) -> Tuple[int, Dict[int, Exception]]:
        """All rows in one call, or, when the database refuses one of them, each by itself."""
        try:
            return self.db.executemany(INSERT_ALL, rows).rowcount, {}
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
        return stored, refused

    def insert_each(self, rows: List[Tuple[Any, ...]], refused: Dict[int, Exception]) -> Optional[int]:
        """Insert those not in `refused` yet, and add to that. None: one of them rolled back what came before it."""
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
        def hmac_of(digest: str) -> str:
            return hmac.digest(self.pepper or b"", digest.encode("ascii"), "sha256").hex()
        identity, github, session, *rest = row
        return (hmac_of(identity), github and hmac_of(github), hmac_of(session), *rest)  # type: ignore[return-value]

    def delete_old(self, most: int) -> int:
        """Delete up to `most` of the oldest rows whose time is over; returns how many."""
        try:
            return self.db.execute(DELETE_OLD, ("-%d days" % self.retain_days, most)).rowcount
        except sqlite3.Error as error:  # another program's trigger, say: the turn's rows are not to blame
            if passing(error) or not self.db.in_transaction:
                raise
            log("sweep_failed", reason=type(error).__name__)
            return 0

    def size(self) -> int:
        """Bytes of the database and its log."""
        pages = self.db.execute("PRAGMA page_count").fetchone()[0]
        total: int = pages * self.db.execute("PRAGMA page_size").fetchone()[0]
        with contextlib.suppress(OSError):
            total += 0 if self.in_memory else os.stat(self.path + "-wal").st_size
        return total

    def room(self) -> int:
        """Pages that may still be filled before `max_bytes` is reached; -1 without such a limit."""
        if self.max_bytes is None:
            return -1
        pages, free, most = (self.db.execute("PRAGMA " + name).fetchone()[0] for name in (
            "page_count", "freelist_count", "max_page_count"))
        return int(most - pages + free)

    def probe(self) -> None:
        """Commit a transaction that writes a page and changes nothing. Raises Unavailable."""
        with self.transaction():
            if self.max_bytes and self.room() <= self.room_missed < LARGEST_EVENT:
                raise sqlite3.OperationalError("database or disk is full")  # SQLite's words for it
            version = self.db.execute("PRAGMA user_version").fetchone()[0]
            self.db.execute("PRAGMA user_version = %d" % version)

    def close(self) -> None:
        with contextlib.suppress(sqlite3.Error):  # all is durable in the log already; the next start takes it over
            self.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self.db.close()


def load_pepper(path: str) -> bytes:
    """The secret in `path`, which is made, readable by its owner only, when it is not there. Raises StartError."""
    try:
        with contextlib.suppress(FileExistsError):
            made = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(made, "w", encoding="ascii") as file:
                file.write(os.urandom(32).hex() + "\n")
                file.flush()
                os.fsync(file.fileno())
        with open(path, "rb") as found:
            if os.name == "posix" and os.fstat(found.fileno()).st_mode & 0o077:
                raise StartError("others can read the pepper in %s: chmod 600 it, or make a new one" % path)
            pepper = found.read(4096).strip()
    except OSError as error:
        raise StartError("cannot use the pepper file %s: %s" % (path, error.strerror)) from None
    if len(pepper) < 32:
        raise StartError("the pepper in %s is under 32 bytes: delete the file, and a good one is made" % path)
    return pepper


def note_pepper(db: sqlite3.Connection, pepper: bytes) -> None:
    """Write which pepper the hashes are made with, so that `ship` notices nodes with different ones.

    The fingerprint is HMAC-SHA256 of a fixed text under the pepper, 16 digits: it tells nothing about a secret of 32
    random bytes. Raises StartError."""
    fingerprint = hmac.new(pepper, b"session-events pepper", "sha256").hexdigest()[:16]
    try:
        db.execute("CREATE TABLE IF NOT EXISTS session_events_pepper (fingerprint TEXT)")
        db.execute("INSERT INTO session_events_pepper SELECT ?1 WHERE ?1 IS NOT (SELECT fingerprint FROM"
                   " session_events_pepper ORDER BY rowid DESC LIMIT 1)", [fingerprint])
    except sqlite3.Error as error:
        raise StartError("cannot write the pepper's fingerprint: %s" % error) from None


def passing(error: Exception) -> bool:
    # An IntegrityError is about a row, and its words may be another program's.
    return (isinstance(error, sqlite3.Error) and not isinstance(error, sqlite3.IntegrityError)
            and any(words in str(error) for words in PASSING))


def file_identity(path: str) -> Optional[Tuple[int, int]]:
    """(device, inode), or None where there is no file, or a database without a byte."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if status.st_size or path.endswith("-wal") else None


# ======================================================================================================
# HTTP, the general path: one request in memory, one answer
# ======================================================================================================

def judge(body: bytes) -> Union[Row, Answer]:
    """The row of the event in `body`, or the 400 that says what is wrong with it."""
    try:
        return canonical_row(body) or check_event(parse_json(body))
    except NotJSON:
        return failure(400, "Invalid JSON body", "not_json")
    except NotAnEvent as wrong:
        return Answer(400, as_json({"error": str(wrong), "issues": wrong.issues}), "not_an_event")


Routes = Dict[str, Dict[str, Callable[["IngestHandler"], Union[Row, Answer]]]]  # path: method: its answer


class IngestHandler(http.server.BaseHTTPRequestHandler):
    """One whole request, already framed by `parse_head`; leaves a row to store or an answer in `.result`."""

    server: IngestServer
    result: Union[Row, Answer]
    route = "-"  # for the access log: what was asked for, where that is something known

    def __init__(self, request: bytes, routes: Routes, server: IngestServer) -> None:
        self.routes = routes
        # No address: what is not there cannot leak.
        super().__init__(request, ("", 0), server)  # type: ignore[arg-type]

    def setup(self) -> None:
        self.rfile = io.BufferedReader(io.BytesIO(self.request))
        self.wfile = io.BytesIO()

    def finish(self) -> None:
        pass

    def handle(self) -> None:
        self.raw_requestline = self.rfile.readline()
        if not self.parse_request():
            return  # send_error has left the result
        target = self.requestline.split(" ")[1]  # parse_request rewrites self.path, each version in its own way
        path = re.sub("^https?://[^/?]*", "", target, flags=re.IGNORECASE).partition("?")[0]
        methods = self.routes.get(path)
        if methods is None:
            self.result = failure(404, "Not found", "unknown_path")
        elif self.command not in methods:
            self.result = failure(405, "Method not allowed", "other_method", "Allow: %s\r\n" % ", ".join(methods))
        else:
            self.route = self.command + " " + path
            self.result = methods[self.command](self)

    def post_event(self) -> Union[Row, Answer]:
        length = self.headers["Content-Length"]
        if length is None:
            return failure(411, "Send the body with a Content-Length", "no_length")
        return judge(self.rfile.read(int(length)))

    def get_health(self) -> Answer:
        return Answer(200, OK)

    def get_readiness(self) -> Answer:
        return Answer(200, OK) if self.server.store_is_ready() else UNAVAILABLE

    def get_metrics(self) -> Answer:
        server = self.server
        text = server.metrics.text({phase: len(server.waiting[phase]) for phase in PHASES}, server.store.size())
        return Answer(200, text, media_type="text/plain; version=0.0.4; charset=utf-8")

    def send_error(self, code: int, message: Optional[str] = None, explain: Optional[str] = None) -> None:
        self.result = failure(code, message or http.HTTPStatus(code).phrase, "malformed_request")

    def log_message(self, format: str, *args: Any) -> None:
        pass  # its lines carry addresses and paths


PUBLIC: Routes = {
    ENDPOINT: {"POST": IngestHandler.post_event},
    "/healthz": {"GET": IngestHandler.get_health, "HEAD": IngestHandler.get_health},
    "/readyz": {"GET": IngestHandler.get_readiness, "HEAD": IngestHandler.get_readiness},
}
OPERATORS: Routes = {
    "/metrics": {"GET": IngestHandler.get_metrics, "HEAD": IngestHandler.get_metrics},
}


# ======================================================================================================
# The loop
# ======================================================================================================

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
READ_SIZE = 64 * 1024  # bytes a connection may bring in one turn
REQUESTS_A_TURN = 32  # of one connection: one that pipelines waits its turn like the others
ROWS_A_TURN = 1024  # of all connections, and
BYTES_A_TURN = 1024 * 1024  # of requests (an event of 26 KB brings 200 edges), and
TAKING_SECONDS = 0.02  # spent on them: who waits for a turn waits for all of it
ACCEPTS_A_TURN = 256
MAX_UNSENT = 64 * 1024  # bytes of answers after which a connection's next request waits
MAX_HELD = 48 * 1024 * 1024  # bytes of unfinished requests and unsent answers, of all connections together
HOT_ROUTE = "POST " + ENDPOINT
TICK = 0.25  # seconds: how late a deadline may be noticed
# After a turn that answered somebody, look again for so long before going to sleep: being woken costs 60 us, so that a
# client which waits for each answer gets 6,500 events/s stored instead of 4,700. With one CPU nobody else could run.
SPIN_SECONDS = 0.00005 if (os.cpu_count() or 1) > 1 else 0.0

# What a connection waits for. In each phase all have the same time, so the one that entered first times out first.
PHASES = IDLE, READING, WRITING, LINGERING = "idle", "reading", "writing", "lingering"
LINGER_SECONDS = 2.0  # a refused client may still be sending: a close at once would lose it the answer

SWEEP_MORE = 1  # old rows that a turn deletes beyond as many as it stores: sweeping is always a little faster
SWEEP_IDLE = 64  # that a turn deletes when nobody was served for a second: 2 ms, which is what a request may wait
SWEEP_EVERY = 60.0  # seconds, once all that is due is gone


class Limits(NamedTuple):
    """What the server grants: seconds, and counts. `None`: no limit."""
    request_seconds: float = 10.0  # from a request's first byte to its last; a TLS handshake likewise
    idle_seconds: float = 30.0  # between requests
    write_seconds: float = 10.0  # without a byte of an answer taken
    max_connections: int = 4096
    rate: Optional[Rate] = None


DEFAULTS = Limits()


class Connection:
    """A client's socket and its two buffers. Called by the loop; never blocks."""

    __slots__ = ("answers", "bucket", "closing", "continued", "mask", "peer", "phase", "queued", "received",
                 "routes", "searched", "server", "since", "sock", "unsent")

    def __init__(self, server: IngestServer, sock: socket.socket, peer: str, routes: Routes) -> None:
        self.server, self.sock, self.routes = server, sock, routes
        self.peer = peer  # its address, for the rate limit and nothing else
        self.bucket = server.bucket(peer, "")
        self.mask = 0  # what the selector watches
        self.phase, self.since = IDLE, server.now
        server.waiting[IDLE][self] = None
        self.received = b""  # not taken yet
        self.searched = 0  # bytes of it in which no end of a head was found
        self.continued = False  # "100 Continue" was sent for the request at the front
        self.answers: List[Union[bytes, int]] = []  # of this turn: bytes, or the row whose answer the commit decides,
        self.queued = 0  # and their bytes
        self.unsent = b""
        self.closing = False  # no request is taken after those that were

    def enter(self, phase: str) -> None:
        del self.server.waiting[self.phase][self]
        self.phase, self.since = phase, self.server.now
        self.server.waiting[phase][self] = None

    def watch(self, mask: int) -> None:
        if mask == self.mask:
            return
        if not self.mask:
            self.server.selector.register(self.sock, mask, self.ready)
        elif mask:
            self.server.selector.modify(self.sock, mask, self.ready)
        else:
            self.server.selector.unregister(self.sock)
        self.mask = mask

    def close(self) -> None:
        if self in self.server.waiting[self.phase]:
            del self.server.waiting[self.phase][self]
            self.server.backlog.pop(self, None)
            self.hold(b"", b"")
            self.watch(0)
            self.sock.close()

    def receive(self) -> Optional[bytes]:
        """What has arrived; None when that is nothing yet, no bytes when the connection is over."""
        try:
            return self.sock.recv(READ_SIZE)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def transmit(self, data: bytes) -> Optional[int]:
        """How much of `data` was taken; None when the connection is over."""
        try:
            return self.sock.send(data)
        except BlockingIOError:
            return 0
        except OSError:
            return None

    def start(self) -> None:
        """The connection was accepted. The request is often there already: a short one is never watched."""
        self.read()

    def ready(self, mask: int) -> None:
        """The selector saw the socket ready."""
        if mask & WRITE:
            self.flush()
        elif self.answers or self in self.server.backlog or self.server.held >= MAX_HELD:
            pass  # in the next turn: its socket stays ready
        elif self.server.has_room():
            self.read()
        else:
            self.server.backlog[self] = None

    def resume(self) -> None:
        """There was no room for it in an earlier turn."""
        if self.received:
            self.take(self.received)
        if not self.answers and not self.closing:
            self.read()

    def read(self) -> None:
        data = self.receive()
        if data is None:
            self.watch(READ)
        elif not data:
            self.close()
        elif self.phase is not LINGERING:
            self.take(self.received + data if self.received else data)

    def hold(self, received: bytes, unsent: bytes) -> None:
        """Set both buffers."""
        self.server.held += len(received) - len(self.received) + len(unsent) - len(self.unsent)
        self.received, self.unsent = received, unsent

    def take(self, data: bytes) -> None:
        """Take the whole requests at the front of `data`, as many as the turn has room for; keep the rest."""
        start = taken = 0
        try:
            while start < len(data) and not self.closing:
                if taken and (taken == REQUESTS_A_TURN or self.queued > MAX_UNSENT or not self.server.has_room()):
                    self.server.backlog[self] = None
                    break
                after = self.take_request(data, start)
                if after < 0:
                    break
                start, self.searched, self.continued = after, 0, False
                taken += 1
        except Refused as refused:
            self.refuse(refused.answer)
        if self.received or start < len(data):
            self.hold(data[start:], self.unsent)
        if not self.answers:  # else flush() decides, at the end of the turn
            if self.phase is IDLE:
                self.enter(READING)
            self.watch(READ)

    def take_request(self, data: bytes, start: int) -> int:
        """Take the request at `start`. Returns where the next one begins, or -1 when this one is not all there."""
        if data.startswith(b"\r\n", start):
            start += 2  # RFC 9112 §2.2: an empty line before a request is passed over
        end = find_head(data, start, start + self.searched)
        if end < 0:
            self.searched = len(data) - start
            return -1
        head = parse_head(data[start:end])
        body, after = end + 4, end + 4 + head.length
        if len(data) < after:
            if head.expects and not self.continued:
                self.continued = True
                self.enter(READING)
                self.add(CONTINUE)
            return -1
        self.closing = self.server.stopping or not head.keep
        self.server.serve(self, head, data, start, body, after)
        return after

    def add(self, answer: Union[bytes, int]) -> None:
        if not self.answers:
            self.server.answering.append(self)
        self.answers.append(answer)
        if isinstance(answer, bytes):
            self.queued += len(answer)

    def refuse(self, answer: Answer) -> None:
        """Answer and end the connection, whatever else it sends."""
        self.closing = True
        self.server.charge(self.bucket)
        self.add(self.server.framed(answer, True))

    def flush(self, more: bytes = b"") -> None:
        """Send what waits, and `more`, as far as that goes, then wait for what comes next."""
        data = self.unsent + more
        sent = self.transmit(data)
        if sent is None:
            self.close()
            return
        if self.unsent or sent < len(data):
            self.hold(self.received, data[sent:])
        if self.unsent:
            if self.phase is not WRITING or sent:
                self.enter(WRITING)
            self.watch(WRITE)  # and not READ: who does not take answers is not read from
        elif self.closing:
            self.finish()
        else:
            if self.phase is WRITING and self.received:
                self.server.backlog[self] = None
            if not (self.continued and self.phase is READING):  # "100 Continue" starts no new clock
                self.enter(READING if self.received else IDLE)
            self.watch(READ)

    def finish(self) -> None:
        if not self.received:
            self.close()
            return
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)
        self.hold(b"", b"")
        self.enter(LINGERING)
        self.watch(READ)

    def expire(self) -> None:
        """The time it may spend in this phase is over."""
        if self.phase is READING and self.received and not self.closing:
            self.refuse(failure(408, "The request took too long", "too_slow"))
        else:
            self.close()


class TLSConnection(Connection):
    """The same over TLS. The handshake has the time of a request, and holds up nobody."""

    __slots__ = ("shaken",)
    sock: ssl.SSLSocket

    def __init__(self, server: IngestServer, sock: ssl.SSLSocket, peer: str, routes: Routes) -> None:
        super().__init__(server, sock, peer, routes)
        self.shaken = False  # the handshake is over

    def start(self) -> None:
        self.enter(READING)
        self.ready(READ)

    def ready(self, mask: int) -> None:
        if self.shaken:
            super().ready(mask)
            return
        try:
            self.sock.do_handshake()
        except ssl.SSLWantReadError:
            self.watch(READ)
        except ssl.SSLWantWriteError:
            self.watch(WRITE)
        except (OSError, ValueError):  # no TLS, no common version, gone
            self.close()
        else:
            self.shaken = True
            self.enter(IDLE)
            self.read()

    def close(self) -> None:
        self.say_goodbye()
        super().close()

    def finish(self) -> None:
        self.say_goodbye()
        super().finish()

    def say_goodbye(self) -> None:
        """Tell the client that nothing is missing (close_notify); its own goodbye is not waited for."""
        if self.shaken:
            with contextlib.suppress(OSError, ValueError):
                self.sock.unwrap()

    def receive(self) -> Optional[bytes]:
        # A TLS record is at most 16 KiB, so that one call leaves nothing in OpenSSL's buffer, where no selector looks.
        try:
            return self.sock.recv(READ_SIZE)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return None
        except (OSError, ValueError):
            return b""

    def transmit(self, data: bytes) -> Optional[int]:
        try:
            return self.sock.send(data)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return 0
        except (OSError, ValueError):
            return None


class IngestServer(http.server.HTTPServer):
    """The selector loop: one turn is one transaction. Raises OSError when the address cannot be had.

    `inherited` is a listening socket to use instead of binding `address`; it is left open for the next process.
    """

    request_queue_size = 1024  # a burst of connections waits here while a turn commits
    allow_reuse_address = os.name == "posix"  # on Windows it would let two servers have one port, as this would:
    allow_reuse_port = False

    def __init__(self, address: Tuple[str, int], store: Store, limits: Limits = DEFAULTS, *,
                 inherited: Optional[socket.socket] = None, access_log: bool = False,
                 trusted: Sequence[Network] = (), tls: Optional[ssl.SSLContext] = None) -> None:
        self.store, self.limits, self.access_log, self.trusted, self.tls = store, limits, access_log, trusted, tls
        self.metrics = Metrics()
        self.rate_limit = RateLimit(limits.rate) if limits.rate else None
        self.now, self.second = time.monotonic(), int(time.time())
        self.waiting: Dict[str, Dict[Connection, None]] = {phase: {} for phase in PHASES}
        self.backlog: Dict[Connection, None] = {}  # those for which a turn had no room, first come first served
        self.held = 0  # bytes received and not taken, or answered and not sent, of all connections
        self.taken, self.taking_until = 0, 0.0  # this turn's requests in bytes, and when their time is over
        self.rows: List[Row] = []  # of this turn
        self.answering: List[Connection] = []  # connections with answers of this turn
        self.answered_at = self.now  # when somebody was
        self.calls: Deque[Callable[[], None]] = collections.deque()  # from other threads and signal handlers
        self.stopping, self.stop_at = False, 0.0
        self.store_fault, self.store_checked = "", self.now  # what the store last said, and when
        self.sweep_at = self.now if store.retain_days else float("inf")
        self.inherited = inherited is not None
        self.address_family = inherited.family if inherited else family_of(address[0])
        super().__init__(address, IngestHandler, bind_and_activate=False)
        self.listeners: Dict[socket.socket, Routes] = {}
        self.muted_until = 0.0  # no descriptor is left for who connects
        self.selector = selectors.DefaultSelector()
        self.alarm, self.bell = socket.socketpair()
        self.alarm.setblocking(False)
        self.bell.setblocking(False)
        self.selector.register(self.alarm, READ, self.take_calls)
        try:
            if inherited:
                self.socket.close()
                self.socket = inherited
                self.name_address()
            else:
                self.server_bind()
                self.server_activate()
            self.listen(self.socket, PUBLIC)
        except BaseException:
            self.server_close()
            raise

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's own looks the host's name up: seconds, at worst
        self.name_address()

    def name_address(self) -> None:
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def listen(self, listener: socket.socket, routes: Routes) -> None:
        """Serve `routes` to who connects to `listener`."""
        listener.setblocking(False)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # accepted sockets inherit it
        self.listeners[listener] = routes
        self.selector.register(listener, READ, functools.partial(self.accept, listener))

    def listen_for_operators(self, address: Tuple[str, int]) -> None:
        """Serve the metrics on an address of their own. Raises OSError."""
        listener = socket.socket(family_of(address[0]))
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(self.allow_reuse_address))
            listener.bind(address)
            listener.listen()
            self.listen(listener, OPERATORS)
        except BaseException:
            listener.close()
            raise

    @property
    def url(self) -> str:
        name = "[%s]" % self.server_name if ":" in self.server_name else self.server_name
        return "%s://%s:%d" % ("https" if self.tls else "http", name, self.server_port)

    # -- called from any thread, or a signal handler ----------------------------------------------------

    def call(self, function: Callable[[], None]) -> None:
        """Have the loop call `function` in its next turn."""
        self.calls.append(function)
        with contextlib.suppress(OSError):  # the bell is full, so the loop is awake; or closed, and nobody is there
            self.bell.send(b"!")

    def shutdown(self, grace: float = 0.0) -> None:
        """Stop accepting, and end when no connection is left or `grace` seconds are over."""
        self.call(lambda: self.stop(grace))

    # -- the turn ---------------------------------------------------------------------------------------

    def serve_forever(self, poll_interval: float = TICK) -> None:
        """Turn until shutdown() is called, then close the connections that are left. The store stays open."""
        while not self.stopping or (self.now < self.stop_at and any(self.waiting.values())):
            self.turn(poll_interval)
        for connection in [c for phase in PHASES for c in self.waiting[phase]]:
            connection.close()

    def turn(self, timeout: float) -> None:
        ready = self.wait(0 if self.old_rows_due(0) else timeout)
        self.now, self.second = time.monotonic(), int(time.time())
        self.taken, self.taking_until = 0, time.perf_counter() + TAKING_SECONDS
        waiting = list(self.backlog)
        for connection in itertools.takewhile(lambda _: self.has_room(), waiting):
            del self.backlog[connection]
            if not connection.unsent:  # else flush() brings it back
                self.guarded(connection.resume)
        while ready:
            before = len(self.rows)
            for key, mask in ready:
                self.guarded(key.data, mask)
            # While these were checked others have sent: the same commit serves them (9% more events/s at 32 clients).
            ready = self.selector.select(0) if len(self.rows) > before + 1 and self.has_room() else []
        self.expire()
        self.answer(self.commit())

    def wait(self, timeout: float) -> List[Tuple[selectors.SelectorKey, int]]:
        ready = self.selector.select(0)
        if ready or self.backlog:
            return ready
        if self.answered_at == self.now:
            until = time.perf_counter() + SPIN_SECONDS
            while not ready and time.perf_counter() < until:
                ready = self.selector.select(0)
        return ready or self.selector.select(timeout)

    def guarded(self, step: Callable[..., None], *arguments: Any) -> None:
        """A fault of this program in one connection's step ends that connection and no other."""
        try:
            step(*arguments)
        except Exception as error:
            log_fault(error)
            owner = getattr(step, "__self__", None)
            if isinstance(owner, Connection):
                owner.close()

    def take_calls(self, mask: int) -> None:
        self.alarm.recv(4096)
        while self.calls:
            self.guarded(self.calls.popleft())

    def stop(self, grace: float) -> None:
        for listener in list(self.listeners):
            if not (listener is self.socket and self.inherited):
                self.accept(listener, READ)  # who has connected already is served
            self.mute(listener)
            listener.close()
            del self.listeners[listener]
        self.stopping, self.stop_at = True, self.now + grace

    # -- connections ------------------------------------------------------------------------------------

    def has_room(self) -> bool:
        """May this turn take another request?"""
        return (len(self.rows) < ROWS_A_TURN and self.taken < BYTES_A_TURN
                and time.perf_counter() < self.taking_until)

    def accept(self, listener: socket.socket, mask: int) -> None:
        for accepted in range(ACCEPTS_A_TURN):
            try:
                sock, address = listener.accept()
            except OSError as error:
                # Without descriptors accept() fails even when nobody waits; at first somebody does.
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM) and not accepted:
                    self.out_of_descriptors()
                return
            if sum(map(len, self.waiting.values())) >= self.limits.max_connections:
                self.make_room()
            self.open_connection(sock, str(address[0]), self.listeners[listener])

    def open_connection(self, sock: socket.socket, peer: str, routes: Routes) -> None:
        sock.setblocking(False)
        if self.tls is None or routes is not PUBLIC:
            Connection(self, sock, peer, routes).start()
            return
        try:
            wrapped = self.tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        except (OSError, ValueError):  # gone before it began
            sock.close()
            return
        TLSConnection(self, wrapped, peer, routes).start()

    def make_room(self) -> None:
        """Close the connection that has waited longest, an idle one if there is any; none with an answer under way."""
        for phase in (IDLE, LINGERING, READING, WRITING):
            for connection in self.waiting[phase]:
                if not connection.answers:
                    connection.close()
                    return

    def out_of_descriptors(self) -> None:
        """The one that waits longest makes room; and nobody is accepted for a tick, so that this does not spin."""
        log("out_of_descriptors", connections=sum(map(len, self.waiting.values())))
        self.make_room()
        self.muted_until = self.now + TICK
        for listener in self.listeners:
            self.mute(listener)

    def mute(self, listener: socket.socket) -> None:
        with contextlib.suppress(KeyError):  # it is already
            self.selector.unregister(listener)

    def expire(self) -> None:
        """End what took too long, and what holds too much."""
        limits = self.limits
        for phase, seconds in ((IDLE, limits.idle_seconds), (READING, limits.request_seconds),
                               (WRITING, limits.write_seconds), (LINGERING, LINGER_SECONDS)):
            late = self.now - seconds
            for connection in list(itertools.takewhile(lambda c: c.since < late, self.waiting[phase])):  # noqa: B023
                self.guarded(self.expire_unless_heard, connection)
        for phase in (READING, WRITING):
            while self.held >= MAX_HELD and self.waiting[phase]:
                next(iter(self.waiting[phase])).close()
        if self.muted_until and self.now >= self.muted_until:
            self.muted_until = 0.0
            for listener in self.listeners:
                self.selector.register(listener, READ, functools.partial(self.accept, listener))

    def expire_unless_heard(self, connection: Connection) -> None:
        """Look once more before ending it: after a pause of the whole process the selector may not have yet."""
        if not connection.answers and connection.phase in (IDLE, READING):
            connection.ready(READ)
        if not connection.answers and connection not in self.backlog:
            connection.expire()

    def bucket(self, peer: str, forwarded: str) -> Optional[bytes]:
        """The rate limit's bucket of who sends, None for one who is not limited."""
        if self.rate_limit is None or (peer.startswith("127.") and not self.trusted):
            return None
        return self.rate_limit.bucket(client_address(peer, forwarded, self.trusted))

    # -- requests ---------------------------------------------------------------------------------------

    def serve(self, connection: Connection, head: Head, data: bytes, start: int, body: int, after: int) -> None:
        """Check the whole request `data[start:after]`, and leave its row and its answer to the end of the turn."""
        self.taken += after - start
        route = "-"
        result: Union[Row, Answer, None] = self.too_many(connection, head) if self.rate_limit else None
        if result is None and head.hot and connection.routes is PUBLIC:
            # The short path gives the answers of the general one, and takes 3 us where that takes 50.
            result, route = judge(data[body:after]), HOT_ROUTE
        elif result is None:
            handler = IngestHandler(data[start:after], connection.routes, self)
            result, route = handler.result, handler.route
        if isinstance(result, Answer):
            if result.status == 411:
                connection.closing = True  # a body may follow, and nobody knows where it ends
            bodiless = data.startswith(b"HEAD ", start)
            connection.add(self.framed(result, connection.closing, route, bodiless))
        else:
            connection.add(len(self.rows))
            self.rows.append(result)

    def charge(self, bucket: Optional[bytes]) -> float:
        """Take a token from the bucket; the seconds to wait when there is none."""
        return self.rate_limit.wait(bucket, self.now) if self.rate_limit and bucket else 0.0

    def too_many(self, connection: Connection, head: Head) -> Optional[Answer]:
        """The 429 for a client over its rate, or None."""
        wait = self.charge(self.bucket(connection.peer, head.forwarded) if self.trusted else connection.bucket)
        if not wait:
            return None
        return failure(429, "Too many requests", "over_rate", "Retry-After: %d\r\n" % math.ceil(wait))

    def framed(self, answer: Answer, close: bool, route: str = "-", bodiless: bool = False) -> bytes:
        """The bytes of an answer. Every answer comes through here, once."""
        self.metrics.answers[answer.status] += 1
        if answer.reason:
            self.metrics.refusals[answer.reason] += 1
        if self.access_log:
            with contextlib.suppress(OSError):  # nobody reads it any more, or its disk is full
                print(line(route=route, status=answer.status), flush=True)
        return frame(answer, close, self.second, bodiless)

    def commit(self) -> List[Answer]:
        """Store the turn's rows; the answer to each, in order."""
        rows, self.rows = self.rows, []
        sweep = self.old_rows_due(len(rows))
        if not rows and not sweep:
            return []
        started = time.perf_counter()
        try:
            written = self.store.write(rows, sweep)
        except Unavailable as reason:
            self.note_store(str(reason))
            self.sweep_at = max(self.sweep_at, self.now + TICK)
            return [UNAVAILABLE] * len(rows)
        except Exception as error:
            log_fault(error)
            return [INSERT_FAILED] * len(rows)
        self.note_store("")
        self.metrics.commits.add(time.perf_counter() - started)
        self.metrics.rows.add(len(rows))
        self.metrics.swept += written.swept
        if written.swept < sweep:
            self.sweep_at = self.now + SWEEP_EVERY
        self.metrics.events["stored"] += written.stored
        self.metrics.events["already_there"] += len(rows) - written.stored - len(written.refused)
        results = [ACCEPTED] * len(rows)
        for place, fault in written.refused.items():
            log_refused(rows[place], fault)
            results[place] = INSERT_FAILED
        return results

    def answer(self, results: List[Answer]) -> None:
        """Send the turn's answers: nothing has left before, so nothing is acknowledged that is not durable."""
        answering, self.answering = self.answering, []
        if answering:
            self.answered_at = self.now
        for connection in answering:
            last = len(connection.answers) - 1 if connection.closing else None
            answers = b"".join([
                answer if isinstance(answer, bytes) else self.framed(results[answer], place == last, HOT_ROUTE)
                for place, answer in enumerate(connection.answers)])
            connection.answers, connection.queued = [], 0
            self.guarded(connection.flush, answers)

    # -- the store's state ------------------------------------------------------------------------------

    def note_store(self, fault: str) -> None:
        """Remember what the store said. The log has a line when that changes, not one for each event it turns away."""
        if fault != self.store_fault:
            log("store_unavailable" if fault else "store_available", **({"reason": fault} if fault else {}))
        self.store_fault, self.store_checked = fault, self.now

    def store_is_ready(self) -> bool:
        """What the last write showed, or, when that is over a second ago, what a write shows now."""
        if self.now - self.store_checked > 1:
            try:
                self.store.probe()
                self.note_store("")
            except Unavailable as reason:
                self.note_store(str(reason))
        return not self.store_fault

    def old_rows_due(self, rows: int) -> int:
        """How many old rows a turn that stores so many is to delete."""
        if self.now < self.sweep_at:
            return 0
        if rows:
            return rows + SWEEP_MORE
        return SWEEP_IDLE if self.now - self.answered_at > 1 else 0

    def server_close(self) -> None:
        super().server_close()
        for listener in self.listeners:
            listener.close()
        self.selector.close()
        self.alarm.close()
        self.bell.close()


def family_of(host: str) -> int:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


# ======================================================================================================
# The log: a line of JSON each. CONTRACT §8: no hash, no ref, no address of a client is in one.
# ======================================================================================================

def line(**fields: Any) -> str:
    moment = datetime.fromtimestamp(time.time(), timezone.utc).isoformat(timespec="milliseconds")
    return json.dumps({"time": moment.replace("+00:00", "Z"), **fields})


def log(event: str, **fields: Any) -> None:
    if sys.stderr:  # else print() would take standard output
        with contextlib.suppress(OSError):  # nobody reads it any more: that must not stop the server
            print(line(event=event, **fields), file=sys.stderr, flush=True)


def log_fault(error: BaseException) -> None:
    """A fault of this program: its kind and its place. Not its text, which can hold what a client sent."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    log("internal_error", kind=type(error).__name__, function=place.name, line=place.lineno)


def log_refused(row: Row, error: Exception) -> None:
    """SQLite names the constraint that failed; another program's trigger might say anything, so that stays out."""
    reason = str(error) if re.fullmatch(r"[A-Z ]+ constraint failed: [\w., ]+", str(error)) else type(error).__name__
    log("insert_failed", identity=row[0][:6], reason=reason)


# ======================================================================================================
# For test fixtures
# ======================================================================================================

class Running:
    """A server in a background thread. `url` is the endpoint."""

    def __init__(self, db: str) -> None:
        self._store = Store(db)
        self._server = IngestServer(("127.0.0.1", 0), self._store)
        self.url = self._server.url + ENDPOINT
        self._thread = threading.Thread(target=self._server.serve_forever, name="session-events", daemon=True)
        self._thread.start()

    def events(self) -> List[Dict[str, Any]]:
        """The stored rows, oldest first, as dicts of the table's columns, with `discovery_refs` as a list."""
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
    """A server on a free loopback port for the length of a `with` block, for other people's test fixtures."""
    server = Running(db)
    try:
        yield server
    finally:
        server.stop()


# ======================================================================================================
# The command line
# ======================================================================================================

GRACE_SECONDS = 2.0  # at the end, for requests that are on their way
SPARE_DESCRIPTORS = 64  # beside the connections: the database, listeners, the loop's own

EPILOG = """\
example:
  python3 server.py --db events.db --port 8787
  curl http://127.0.0.1:8787/readyz

SIGTERM and Ctrl-C finish what is under way and exit with 0; SIGHUP reads the TLS files again. Started by a systemd
socket unit, it takes that socket in place of --host and --port.
"""


def port(text: str) -> int:
    number = int(text)
    if not 0 <= number <= 65535:
        raise ValueError
    return number


def host_and_port(text: str) -> Tuple[str, int]:
    host, _, number = text.rpartition(":")
    if not host:
        raise ValueError
    return host.strip("[]"), port(number)


def rate(text: str) -> Optional[Rate]:
    if text == "off":
        return None
    number, _, unit = text.partition("/")
    return Rate(positive(number), {"s": 1.0, "min": 60.0, "h": 3600.0}[unit])


def positive(text: str) -> int:
    if not 1 <= int(text[:19]) == int(text):
        raise ValueError
    return int(text)


def seconds(text: str) -> float:
    if not 0 < float(text) <= 86400:
        raise ValueError
    return float(text)


def network(text: str) -> Network:
    return ipaddress.ip_network(text, strict=False)


def checked(parse: Callable[[str], Any], wanted: str) -> Callable[[str], Any]:
    """`parse` with an error message that says what is wanted."""
    def convert(text: str) -> Any:
        try:
            return parse(text)
        except (ValueError, KeyError):
            raise argparse.ArgumentTypeError("%r is not %s" % (text, wanted)) from None
    return convert


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="server.py", description="Take session events over HTTP and keep them in one SQLite file.",
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(flag: str, wanted: Callable[[str], Any], kind: str, metavar: str, default: Any, words: str) -> None:
        p.add_argument(flag, type=checked(wanted, kind), metavar=metavar, default=default, help=words)

    p.add_argument("--db", required=True, metavar="FILE",
                   help="the database; made, with mode 0600, when it is not there")
    p.add_argument("--host", default="127.0.0.1", help="the address to listen on (127.0.0.1)")
    add("--port", port, "a port: 0 to 65535", "PORT", 8787, "the port; 0 takes any free one (8787)")
    add("--max-connections", positive, "a positive number", "N", DEFAULTS.max_connections,
        "open connections; beyond that the longest idle make room (4096)")
    add("--request-seconds", seconds, "seconds", "S", DEFAULTS.request_seconds,
        "from a request's first byte to its last (10)")
    add("--idle-seconds", seconds, "seconds", "S", DEFAULTS.idle_seconds, "between the requests of a connection (30)")
    add("--write-seconds", seconds, "seconds", "S", DEFAULTS.write_seconds,
        "that a client may take nothing of its answer (10)")
    add("--rate", rate, "a rate such as 600/min, 10/s, 5000/h, or off", "N/UNIT", Rate(600, 60.0),
        "requests per client address, IPv6 per /64; loopback is not limited (600/min)")
    p.add_argument("--trusted-proxy", type=checked(network, "a network such as 10.0.0.0/8"), metavar="CIDR",
                   action="append", default=[], help="believe X-Forwarded-For from there; may be repeated (none)")
    add("--max-db-bytes", positive, "a positive number", "N", None, "size at which the database takes no more (none)")
    add("--retain-days", positive, "a positive number", "N", 0,
        "delete events received longer ago, in small pieces (keep all)")
    p.add_argument("--pepper-file", metavar="FILE",
                   help="store HMAC-SHA256(pepper, hash) for each hash; made when not there (store what was sent)")
    p.add_argument("--tls-cert", metavar="FILE", help="serve https with this certificate chain (PEM)")
    p.add_argument("--tls-key", metavar="FILE", help="the certificate's key (PEM)")
    add("--metrics", host_and_port, "HOST:PORT", "HOST:PORT", None, "serve Prometheus metrics there (nowhere)")
    p.add_argument("--access-log", action="store_true",
                   help="a line of JSON on standard output for each request: time, route, status; no address")
    p.add_argument("--version", action="version", version="server.py " + __version__)
    return p


def main(argv: Optional[List[str]] = None) -> int:
    p = parser()
    options = p.parse_args(argv)
    if bool(options.tls_cert) != bool(options.tls_key):
        p.error("--tls-cert and --tls-key go together")
    try:
        server = build(options)
    except StartError as error:
        print("server.py: %s" % error, file=sys.stderr)
        return 2
    handle_signals(server, options)
    print("listening on " + server.url, flush=True)
    notify("READY=1")
    server.serve_forever()
    server.server_close()
    server.store.close()
    return 0


def build(options: argparse.Namespace) -> IngestServer:
    """The server that the command line asks for, listening. Raises StartError."""
    tls = load_tls(options) if options.tls_cert else None
    pepper = load_pepper(options.pepper_file) if options.pepper_file else None
    connections = raise_descriptor_limit(options.max_connections)
    store = Store(options.db, options.max_db_bytes, pepper, options.retain_days)
    if pepper is not None:
        note_pepper(store.db, pepper)
    limits = Limits(options.request_seconds, options.idle_seconds, options.write_seconds, connections, options.rate)
    address = options.host, options.port
    try:
        server = IngestServer(address, store, limits, inherited=inherited_socket(), access_log=options.access_log,
                              trusted=options.trusted_proxy, tls=tls)
        if options.metrics:
            address = options.metrics
            server.listen_for_operators(address)
    except OSError as error:
        store.close()
        hint = "; is another server running? --port 0 takes any free one" if error.errno == errno.EADDRINUSE else ""
        raise StartError("cannot listen on %s port %d: %s%s" % (*address, error.strerror, hint)) from None
    return server


def handle_signals(server: IngestServer, options: argparse.Namespace) -> None:
    def end(*_: Any) -> None:
        notify("STOPPING=1")
        server.shutdown(0.0 if server.stopping else GRACE_SECONDS)

    def reload(*_: Any) -> None:
        if not server.tls:
            return
        try:
            server.tls = load_tls(options)
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
        # An empty password, where OpenSSL would ask the terminal for one.
        context.load_cert_chain(options.tls_cert, options.tls_key, password="")
    except (OSError, ValueError) as error:
        files = options.tls_cert, options.tls_key
        raise StartError("cannot use the TLS files %s and %s: %s" % (*files, error)) from None
    return context


def raise_descriptor_limit(connections: int) -> int:
    """Make room for so many connections among the descriptors; returns how many there is room for."""
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


def inherited_socket() -> Optional[socket.socket]:
    """The listening socket that systemd passed (sd_listen_fds(3)), if it did. Raises StartError."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or not os.environ.get("LISTEN_FDS", "").isdigit():
        return None
    if os.environ["LISTEN_FDS"] != "1":
        raise StartError("one socket is wanted from LISTEN_FDS, not %s" % os.environ["LISTEN_FDS"])
    passed = socket.socket(fileno=3)
    passed.set_inheritable(False)
    if passed.family not in (socket.AF_INET, socket.AF_INET6) or not passed.getsockopt(
            socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise StartError("the passed socket is not a listening TCP socket (Accept=no in the socket unit)")
    return passed


def notify(state: str) -> None:
    """Tell systemd (sd_notify(3)), where it wants to know."""
    path = os.environ.get("NOTIFY_SOCKET")
    if path:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notices:
            notices.sendto(state.encode("ascii"), "\0" + path[1:] if path.startswith("@") else path)


if __name__ == "__main__":
    sys.exit(main())
