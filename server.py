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
import collections
import contextlib
import errno
import functools
import http
import http.server
import io
import itertools
import json
import os
import queue
import re
import selectors
import signal
import socket
import socketserver
import sqlite3
import sys
import threading
import time
import traceback
from datetime import datetime, timedelta, timezone
from email.utils import formatdate
from typing import Any, Callable, Deque, Dict, Iterator, List, NamedTuple, NoReturn, Optional, Tuple, Union

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
        if (type(value) is int or type(value) is float and value.is_integer()) and 0 <= value <= most:
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
            return tuple(row)  # type: ignore[return-value]  # as long as FIELDS, each of its check's type
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


# An event as emit.py and most clients write it: the fields in the contract's order, no blanks, no escapes.
_canonical = re.compile(
    r'\{{"identity_hash":"({HASH})",(?:"github_hash":(?:null|"({HASH})"),)?"session_id_hash":"({HASH})",'
    r'"ended_at":"([0-9T:.Z+-]{{19,40}})","tool_count":(0|[1-9][0-9]{{0,6}}),"tokens_saved":(0|[1-9][0-9]{{0,9}}),'
    r'(?:"branch_sha":(?:null|"({SHA})"),)?"discovery_refs":(\[(?:"{SLUG}"(?:,"{SLUG}"){{0,{MORE}}})?\]),'
    r'"plugin_version":"({VERSION})"\}}'.format(
        HASH=HASH, SHA=SHA, SLUG=SLUG, VERSION=VERSION, MORE=MAX_REFS - 1)).fullmatch


def canonical_row(body: bytes) -> Optional[Row]:
    """The row of an event in the usual form, or None for check_event to say: 2.3 us, where that takes 6.3."""
    match = _canonical(body.decode("latin-1"))  # which takes any byte, and no shape takes one that is not ASCII
    if not match:
        return None
    identity, github, session, ended_at, tools, tokens, sha, refs, version = match.groups()
    if int(tools) > MAX_TOOLS or int(tokens) > MAX_TOKENS:
        return None
    try:
        moment = utc_milliseconds(ended_at)
    except Fault:
        return None
    return identity, github, session, moment, int(tools), int(tokens), sha and sha.lower(), refs, version


def unknown_keys(event: Dict[str, Any]) -> List[Issue]:
    """An issue for each key that no event has; a key that does not look like a field's name is not repeated."""
    unknown = [key for key in event if key not in NAMES]
    issues = [{"path": [key] if re.fullmatch("[A-Za-z0-9_-]{1,64}", key) else [], "message": "is not a field of an event"}
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
    """An answer before it is bytes. `extra`: further header lines, each with its CRLF."""
    status: int
    payload: bytes
    extra: str = ""
    media_type: str = "application/json"


def as_json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode("ascii")


def failure(status: int, words: str, extra: str = "") -> Answer:
    return Answer(status, as_json({"error": words}), extra)


OK = b'{"ok":true}'
ACCEPTED = Answer(202, OK)
UNAVAILABLE = failure(503, "The store cannot take events now", "Retry-After: 5\r\n")
INSERT_FAILED = failure(500, "Insert failed")
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Refused(Exception):
    """A request after which its connection cannot go on: where the next one begins is not known."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.answer = failure(status, words)


class Head(NamedTuple):
    """What the head of a request says about its framing."""
    length: int  # bytes of the body
    keep: bool  # the connection stays open after the answer
    expects: bool  # the client waits for "100 Continue"
    hot: bool  # POST of an event: needs nothing that http.server would find out


_request_line = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([!-~]+) HTTP/1\.([01])").fullmatch
_header_line = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\t -~\x80-\xff]*)").fullmatch
_hot_line = b"POST " + ENDPOINT.encode()
_bare = re.compile(rb"(?<!\r)\n|\r(?=[^\n])").search


@functools.lru_cache(maxsize=1024)
def parse_head(head: bytes) -> Head:
    """The framing that `head` (without the empty line) asks for. Raises Refused where it can be read in two ways.

    http.server's own parser is lenient, and slow: it halves the rate of ingest. Clients of one kind send one head, so
    the memo answers nearly all: 0.2 us for 9 us. (Its 1,024 heads of up to 16 KiB bound it to 16 MiB.)
    """
    first, *lines = head.split(b"\r\n")
    request = _request_line(first)
    if not request:
        raise Refused(400, "Malformed request line")
    if len(lines) > MAX_HEADERS:
        raise Refused(431, "More than %d headers" % MAX_HEADERS)
    headers: Dict[bytes, bytes] = {}
    for line in lines:
        header = _header_line(line)
        if not header:
            raise Refused(400, "Malformed header line")
        name, value = header[1].lower(), header[2].rstrip(b" \t")
        if name in headers and name in ONCE_ONLY:
            raise Refused(400, "Repeated header: " + name.decode())
        headers[name] = headers[name] + b"," + value if name in headers else value
    options = {option.strip() for option in headers.get(b"connection", b"").lower().split(b",")}
    return Head(
        length=body_length(headers),
        keep=request[3] == b"1" and b"close" not in options,
        expects=request[3] == b"1" and expects_continue(headers),
        hot=first[:-9] == _hot_line and b"content-length" in headers,
    )


def body_length(headers: Dict[bytes, bytes]) -> int:
    """The bytes of the body that follows. Raises Refused: 400, 411 or 413."""
    length = headers.get(b"content-length")
    if b"transfer-encoding" in headers:
        if length is not None:
            raise Refused(400, "Content-Length and Transfer-Encoding in one request")
        raise Refused(411, "Send the body with a Content-Length; chunked is not taken")
    if length is None:
        return 0
    if not re.fullmatch(rb"[0-9]{1,19}", length):
        raise Refused(400, "Malformed Content-Length")
    if int(length) > MAX_BODY:
        raise Refused(413, "The body is over %d bytes" % MAX_BODY)
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
        raise Refused(431, "The head is over %d bytes" % MAX_HEAD)
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
# The store
# ======================================================================================================

class StoreError(Exception):
    """The database cannot be opened. The text is one line for the operator."""


class Unavailable(Exception):
    """The store cannot take rows now, and nothing of this turn was stored. The text is for the log."""


# SQLite's words for faults that pass, or that an operator mends, without the rows being to blame. (Error codes as
# attributes came with Python 3.11.)
PASSING = ("locked", "full", "readonly", "disk I/O", "unable to open", "malformed", "not a database")

SETTINGS = (
    # Readers never hold up the writer, and a commit is one append and one fsync.
    "journal_mode = WAL",
    # A commit is on the disk when it returns: 202 means that. WAL's usual NORMAL would lose the last ones with the power.
    "synchronous = FULL",
    # 64 MB of pages instead of 2: at a million rows the leaves of the two identity indexes are written at random, and
    # with the default each event reads some of them anew.
    "cache_size = -65536",
    # Pages in the log before they are moved into the database (16 MB instead of 4): a page that many events touch is
    # moved once for all of them, while a start after a crash still reads the log in well under a second.
    "wal_autocheckpoint = 4000",
)

# received_at comes along, although the table has a default: the default is a function (see the schema's triggers).
INSERT = "INSERT %%s INTO session_events (%s, received_at) VALUES (%s, ?) ON CONFLICT DO NOTHING" % (
    ", ".join(COLUMNS), ", ".join("?" * len(COLUMNS)))
# OR ROLLBACK spares the statement journal: 26 us an event become 22, at 20 events a turn.
INSERT_ALL = INSERT % "OR ROLLBACK"
INSERT_ONE = INSERT % ""


class Store:
    """The one connection to the database. `path` may be `:memory:`. Raises StoreError when it cannot be used."""

    LOCK_SECONDS = 0.25  # how long a turn may wait for another process's write lock

    def __init__(self, path: str) -> None:
        self.path = path
        self.in_memory = path == ":memory:"
        try:
            self.db = self.connect()
            try:
                self.migrate()
            except BaseException:
                self.db.close()
                raise
        except (OSError, sqlite3.Error) as error:
            raise StoreError("cannot use %s: %s" % (path, error)) from None
        self.files = [] if self.in_memory else [(name, file_identity(name)) for name in (path, path + "-wal")]

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
            raise StoreError("%s has schema version %d, and this server.py knows %d: use a newer server.py"
                             % (self.path, version, SCHEMA_VERSION))
        for setting in SETTINGS:
            self.db.execute("PRAGMA " + setting)
        if version < SCHEMA_VERSION:
            self.check_columns()
            self.db.executescript("BEGIN IMMEDIATE;\n%s\nCOMMIT;" % SCHEMA)
        self.check_columns()

    def check_columns(self) -> None:
        """Another program's session_events is taken when it has the contract's columns."""
        there = {row[1] for row in self.db.execute("PRAGMA table_info(session_events)")}
        missing = {"id", "received_at", *COLUMNS} - there
        if there and missing:
            raise StoreError("%s has a table session_events without the column %s: it is not this program's"
                             % (self.path, min(missing)))

    def check_files(self) -> None:
        """Raises Unavailable when the open files are no longer the ones at their paths: what is written is lost."""
        for name, identity in self.files:
            if file_identity(name) != identity:
                raise Unavailable("the database or its -wal file was deleted or replaced while in use: "
                                  "put it back, or restart the server")

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """What is done inside is durable on leaving, or undone; Unavailable says why."""
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

    def write(self, rows: List[Row]) -> List[Optional[Exception]]:
        """Store the rows of a turn in one transaction, durable on return.

        Returns what the database said of each row: None (stored, or there already) or why it refused this one; the
        others are stored all the same. Raises Unavailable when none could be.
        """
        with self.transaction():
            return self.insert(rows)

    def insert(self, rows: List[Row]) -> List[Optional[Exception]]:
        """All rows in one call, or, when the database refuses one of them, each by itself."""
        received_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        dated = [(*row, received_at) for row in rows]
        try:
            self.db.executemany(INSERT_ALL, dated)
            return [None] * len(rows)
        except (sqlite3.Error, ValueError) as error:
            if passing(error):
                raise
            if not self.db.in_transaction:
                self.db.execute("BEGIN IMMEDIATE")
        return [self.insert_one(row) for row in dated]

    def insert_one(self, row: Tuple[Any, ...]) -> Optional[Exception]:
        try:
            self.db.execute(INSERT_ONE, row)
        except (sqlite3.Error, ValueError) as error:
            if passing(error) or not self.db.in_transaction:
                raise
            return error
        return None

    def probe(self) -> None:
        """Commit a transaction that writes a page and changes nothing. Raises Unavailable."""
        with self.transaction():
            version = self.db.execute("PRAGMA user_version").fetchone()[0]
            self.db.execute("PRAGMA user_version = %d" % version)

    def close(self) -> None:
        with contextlib.suppress(sqlite3.Error):  # all is durable in the log already; the next start takes it over
            self.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self.db.close()


def passing(error: Exception) -> bool:
    return isinstance(error, sqlite3.Error) and any(words in str(error) for words in PASSING)


def file_identity(path: str) -> Optional[Tuple[int, int]]:
    """(device, inode), or None where there is no file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


# ======================================================================================================
# HTTP, the general path: one request in memory, one answer
# ======================================================================================================

def judge(body: bytes) -> Union[Row, Answer]:
    """The row of the event in `body`, or the 400 that says what is wrong with it."""
    try:
        return canonical_row(body) or check_event(parse_json(body))
    except NotJSON:
        return failure(400, "Invalid JSON body")
    except NotAnEvent as wrong:
        return Answer(400, as_json({"error": str(wrong), "issues": wrong.issues}))


class IngestHandler(http.server.BaseHTTPRequestHandler):
    """One whole request, already framed by `parse_head`; leaves its result in `.result`, a row to store or an answer."""

    server: IngestServer
    result: Union[Row, Answer]
    route = "-"  # for the access log: what was asked for, where that is something known

    def setup(self) -> None:
        self.rfile = io.BufferedReader(io.BytesIO(self.request))  # type: ignore[arg-type]
        self.wfile = io.BytesIO()

    def finish(self) -> None:
        pass

    def handle(self) -> None:
        self.raw_requestline = self.rfile.readline()
        if not self.parse_request():
            return  # send_error has left the result
        target = self.requestline.split(" ")[1]  # parse_request rewrites self.path, each version in its own way
        path = re.sub("^https?://[^/?]*", "", target, flags=re.IGNORECASE).partition("?")[0]
        methods = ROUTES.get(path)
        if methods is None:
            self.result = failure(404, "Not found")
        elif self.command not in methods:
            self.result = failure(405, "Method not allowed", "Allow: %s\r\n" % ", ".join(methods))
        else:
            self.route = self.command + " " + path
            self.result = methods[self.command](self)

    def post_event(self) -> Union[Row, Answer]:
        length = self.headers["Content-Length"]
        if length is None:
            return failure(411, "Send the body with a Content-Length")
        return judge(self.rfile.read(int(length)))

    def get_health(self) -> Answer:
        return Answer(200, OK)

    def get_readiness(self) -> Answer:
        return Answer(200, OK) if self.server.store_is_ready() else UNAVAILABLE

    def handle_expect_100(self) -> bool:
        return True  # the connection has answered that before the body came

    def send_error(self, code: int, message: Optional[str] = None, explain: Optional[str] = None) -> None:
        self.result = failure(code, message or http.HTTPStatus(code).phrase)

    def log_message(self, format: str, *args: Any) -> None:
        pass  # its lines carry addresses and paths


Method = Callable[[IngestHandler], Union[Row, Answer]]
ROUTES: Dict[str, Dict[str, Method]] = {
    ENDPOINT: {"POST": IngestHandler.post_event},
    "/healthz": {"GET": IngestHandler.get_health, "HEAD": IngestHandler.get_health},
    "/readyz": {"GET": IngestHandler.get_readiness, "HEAD": IngestHandler.get_readiness},
}


# ======================================================================================================
# The loop
# ======================================================================================================

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
READ_SIZE = 64 * 1024  # bytes a connection may bring in one turn
REQUESTS_A_TURN = 32  # of one connection: one that pipelines waits its turn like the others
ROWS_A_TURN = 1024  # of all connections: bounds the time and the memory of a transaction
ACCEPTS_A_TURN = 256
HOT_ROUTE = "POST " + ENDPOINT
TICK = 0.25  # seconds: how late a deadline may be noticed
# After a turn that answered somebody, look again for so long before going to sleep: being woken costs 60 us, so that a
# client which waits for each answer gets 6,500 events/s stored instead of 4,700. With one CPU nobody else could run.
SPIN_SECONDS = 0.00005 if (os.cpu_count() or 1) > 1 else 0.0

# What a connection waits for. In each phase all have the same time, so the one that entered first times out first.
PHASES = IDLE, READING, WRITING, LINGERING = "idle", "reading", "writing", "lingering"


class Limits(NamedTuple):
    """Seconds that a connection may spend in each of PHASES."""
    idle: float = 30.0
    reading: float = 10.0
    writing: float = 10.0
    lingering: float = 2.0  # a refused client may still be sending: a close at once would lose it the answer


class Deferred(NamedTuple):
    """The place of an answer that the commit decides: the row's place in the turn."""
    row: int
    close: bool


class Connection:
    """A client's socket and its two buffers. Called by the loop; never blocks."""

    __slots__ = ("server", "sock", "mask", "phase", "since", "received", "searched", "continued", "answers",
                 "unsent", "closing")

    def __init__(self, server: IngestServer, sock: socket.socket) -> None:
        self.server, self.sock = server, sock
        self.mask = 0  # what the selector watches
        self.phase, self.since = IDLE, server.now
        server.waiting[IDLE][self] = None
        self.received = b""  # not taken yet
        self.searched = 0  # bytes of it in which no end of a head was found
        self.continued = False  # "100 Continue" was sent for the request at the front
        self.answers: List[Union[bytes, Deferred]] = []  # of this turn
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
            self.watch(0)
            self.sock.close()

    def ready(self, mask: int) -> None:
        """The selector saw the socket ready."""
        if mask & WRITE:
            self.flush()
        elif self not in self.server.backlog and self.server.has_room():
            self.read()

    def read(self) -> None:
        try:
            data = self.sock.recv(READ_SIZE)
        except BlockingIOError:
            self.watch(READ)
            return
        except OSError:
            data = b""
        if not data:
            self.close()
        elif self.phase is not LINGERING:
            self.take(self.received + data if self.received else data)

    def take(self, data: bytes) -> None:
        """Take the whole requests at the front of `data`, as many as the turn has room for; keep the rest."""
        start, budget = 0, REQUESTS_A_TURN
        try:
            while start < len(data) and not self.closing:
                if not budget or not self.server.has_room():
                    self.server.backlog[self] = None
                    break
                after = self.take_request(data, start)
                if after < 0:
                    break
                start, self.searched, self.continued = after, 0, False
                budget -= 1
        except Refused as refused:
            self.refuse(refused.answer)
        self.received = data[start:]
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
                self.add(CONTINUE)
            return -1
        self.closing = self.server.stopping or not head.keep
        self.server.serve(self, head, data, start, body, after)
        return after

    def add(self, answer: Union[bytes, Deferred]) -> None:
        if not self.answers:
            self.server.answering.append(self)
        self.answers.append(answer)

    def refuse(self, answer: Answer) -> None:
        """Answer and end the connection, whatever else it sends."""
        self.closing = True
        self.add(self.server.framed(answer, True))

    def flush(self) -> None:
        """Send what can be sent, then wait for what comes next."""
        try:
            sent = self.sock.send(self.unsent)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.close()
            return
        self.unsent = self.unsent[sent:]
        if self.unsent:
            if self.phase is not WRITING or sent:
                self.enter(WRITING)
            self.watch(WRITE)  # and not READ: who does not take answers is not read from
        elif self.closing:
            self.finish()
        else:
            if self.phase is WRITING and self.received:
                self.server.backlog[self] = None
            self.enter(READING if self.received else IDLE)
            self.watch(READ)

    def finish(self) -> None:
        if not self.received:
            self.close()
            return
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)
        self.received = b""
        self.enter(LINGERING)
        self.watch(READ)

    def expire(self) -> None:
        """The time it may spend in this phase is over."""
        if self.phase is READING and not self.closing:
            self.refuse(failure(408, "The request took too long"))
        else:
            self.close()


class IngestServer(http.server.HTTPServer):
    """The selector loop: one turn is one transaction. Raises OSError when the address cannot be had."""

    request_queue_size = 1024  # a burst of connections waits here while a turn commits
    allow_reuse_address = os.name == "posix"  # on Windows it would let two servers have one port

    def __init__(self, address: Tuple[str, int], store: Store, limits: Limits = Limits(),
                 access_log: bool = False) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.store, self.limits, self.access_log = store, limits, access_log
        self.now, self.second = time.monotonic(), int(time.time())
        self.waiting: Dict[str, Dict[Connection, None]] = {phase: {} for phase in PHASES}
        self.backlog: Dict[Connection, None] = {}  # with whole requests that had no room in the last turn
        self.rows: List[Row] = []  # of this turn
        self.answering: List[Connection] = []  # connections with answers of this turn
        self.answered = False  # somebody, in the last turn
        self.calls: Deque[Callable[[], None]] = collections.deque()  # from other threads and signal handlers
        self.stopping, self.stop_at = False, 0.0
        self.store_fault, self.store_checked = "", self.now  # what the store last said, and when
        super().__init__(address, IngestHandler)
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # accepted sockets inherit it
        self.alarm, self.bell = socket.socketpair()
        self.alarm.setblocking(False)
        self.bell.setblocking(False)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.socket, READ, self.accept)
        self.selector.register(self.alarm, READ, self.take_calls)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's own looks the host's name up: seconds, at worst
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    @property
    def url(self) -> str:
        name = "[%s]" % self.server_name if ":" in self.server_name else self.server_name
        return "http://%s:%d" % (name, self.server_port)

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

    def wait(self, timeout: float) -> List[Tuple[selectors.SelectorKey, int]]:
        ready = self.selector.select(0)
        if ready or self.backlog:
            return ready
        if self.answered:
            until = time.perf_counter() + SPIN_SECONDS
            while not ready and time.perf_counter() < until:
                ready = self.selector.select(0)
        return ready or self.selector.select(timeout)

    def turn(self, timeout: float) -> None:
        ready = self.wait(timeout)
        self.now, self.second = time.monotonic(), int(time.time())
        backlog, self.backlog = self.backlog, {}
        for connection in backlog:
            if not connection.unsent:  # else flush() brings it back
                self.guarded(connection.take, connection.received)
        for key, mask in ready:
            self.guarded(key.data, mask)
        self.expire()
        self.answer(self.commit())

    def guarded(self, step: Callable[[Any], None], argument: Any) -> None:
        """A fault of this program in one connection's step ends that connection and no other."""
        try:
            step(argument)
        except Exception as error:
            log_fault(error)
            owner = getattr(step, "__self__", None)
            if isinstance(owner, Connection):
                owner.close()

    def take_calls(self, mask: int) -> None:
        self.alarm.recv(4096)
        while self.calls:
            self.calls.popleft()()

    def stop(self, grace: float) -> None:
        if not self.stopping:
            self.accept(READ)  # who has connected already is served
            self.selector.unregister(self.socket)
            self.socket.close()
        self.stopping, self.stop_at = True, self.now + grace

    def has_room(self) -> bool:
        return len(self.rows) < ROWS_A_TURN

    def accept(self, mask: int) -> None:
        for _ in range(ACCEPTS_A_TURN):
            try:
                sock, _address = self.socket.accept()
            except OSError:
                return
            sock.setblocking(False)
            Connection(self, sock).read()  # the request is often there already: saves watching a short connection

    def expire(self) -> None:
        for phase, seconds in zip(PHASES, self.limits):
            queue = self.waiting[phase]
            if queue:
                late = self.now - seconds
                for connection in list(itertools.takewhile(lambda c: c.since < late, queue)):  # noqa: B023
                    connection.expire()

    def serve(self, connection: Connection, head: Head, data: bytes, start: int, body: int, after: int) -> None:
        """Check the whole request `data[start:after]`, and leave its row and its answer to the end of the turn."""
        # The short path gives the answers of the general one, @@GAIN@@ sooner.
        if head.hot:
            result, route = judge(data[body:after]), HOT_ROUTE
        else:
            handler = IngestHandler(data[start:after], ("", 0), self)
            result, route = handler.result, handler.route
        if isinstance(result, Answer):
            if result.status == 411:
                connection.closing = True  # a body may follow, and nobody knows where it ends
            bodiless = data.startswith(b"HEAD ", start)
            connection.add(self.framed(result, connection.closing, route, bodiless))
        else:
            connection.add(Deferred(len(self.rows), connection.closing))
            self.rows.append(result)

    def framed(self, answer: Answer, close: bool, route: str = "-", bodiless: bool = False) -> bytes:
        """The bytes of an answer. Every answer comes through here, once."""
        if self.access_log:
            print(line(route=route, status=answer.status), flush=True)
        return frame(answer, close, self.second, bodiless)

    def commit(self) -> List[Answer]:
        """Store the turn's rows; the answer to each, in order."""
        rows, self.rows = self.rows, []
        if not rows:
            return []
        try:
            outcome = self.store.write(rows)
        except Unavailable as reason:
            self.note_store(str(reason))
            return [UNAVAILABLE] * len(rows)
        except Exception as error:
            log_fault(error)
            return [INSERT_FAILED] * len(rows)
        self.note_store("")
        for row, error in zip(rows, outcome):
            if error:
                log_refused(row, error)
        return [INSERT_FAILED if error else ACCEPTED for error in outcome]

    def answer(self, results: List[Answer]) -> None:
        """Send the turn's answers: nothing has left before, so nothing is acknowledged that is not durable."""
        answering, self.answering = self.answering, []
        self.answered = bool(answering)
        for connection in answering:
            connection.unsent += b"".join([
                answer if isinstance(answer, bytes) else self.framed(results[answer.row], answer.close, HOT_ROUTE)
                for answer in connection.answers])
            connection.answers = []
            self.guarded(Connection.flush, connection)

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

    def server_close(self) -> None:
        super().server_close()
        self.selector.close()
        self.alarm.close()
        self.bell.close()


# ======================================================================================================
# The log: a line of JSON each. CONTRACT §8: no hash, ref, address or path is in one.
# ======================================================================================================

def line(**fields: Any) -> str:
    moment = datetime.fromtimestamp(time.time(), timezone.utc).isoformat(timespec="milliseconds")
    return json.dumps({"time": moment.replace("+00:00", "Z"), **fields})


def log(event: str, **fields: Any) -> None:
    with contextlib.suppress(OSError):  # nobody reads standard error any more: that must not stop the server
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
        if not self._thread.is_alive():
            raise RuntimeError("the server is stopped")
        answer: queue.SimpleQueue[List[Dict[str, Any]]] = queue.SimpleQueue()
        self._server.call(lambda: answer.put(self._read()))
        return answer.get()

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


def port(text: str) -> int:
    number = int(text)
    if not 0 <= number <= 65535:
        raise ValueError
    return number


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="server.py", description="Take session events over HTTP and keep them in one SQLite file.",
        epilog="example: python3 server.py --db events.db --port 8787")
    p.add_argument("--db", required=True, metavar="FILE", help="the database; made, with mode 0600, when it is not there")
    p.add_argument("--host", default="127.0.0.1", help="the address to listen on (%(default)s)")
    p.add_argument("--port", default=8787, type=port, help="the port; 0 takes any free one (%(default)s)")
    p.add_argument("--access-log", action="store_true",
                   help="a line of JSON on standard output for each request: time, route, status; no address")
    p.add_argument("--version", action="version", version="server.py " + __version__)
    return p


def main(argv: Optional[List[str]] = None) -> int:
    options = parser().parse_args(argv)
    try:
        store = Store(options.db)
    except StoreError as error:
        return refuse_to_start(str(error))
    try:
        server = IngestServer((options.host, options.port), store, access_log=options.access_log)
    except OSError as error:
        store.close()
        hint = "; --port 0 takes any free one" if error.errno == errno.EADDRINUSE else ""
        return refuse_to_start("cannot listen on %s port %d: %s%s" % (options.host, options.port, error.strerror, hint))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.shutdown(0.0 if server.stopping else GRACE_SECONDS))
    print("listening on " + server.url, flush=True)
    server.serve_forever()
    server.server_close()
    store.close()
    return 0


def refuse_to_start(reason: str) -> int:
    print("server.py: " + reason, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
