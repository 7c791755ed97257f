"""The toolkit's tests: real sockets, processes, signals and files. They need pytest and nothing else.

    python3 -m pytest -q test_session_events.py

Rooms: the stage (what several rooms use) → emit.py → server.py → session_events.py → the house (what holds the
programs together). Everything that emit.py and server.py print in any test is recorded, and the last test searches it
for anything that could name a person or a session.
"""

import argparse
import base64
import calendar
import collections
import concurrent.futures
import contextlib
import csv
import datetime
import email.utils
import fcntl
import functools
import glob
import hashlib
import hmac
import http.server
import importlib.util
import io
import ipaddress
import itertools
import json
import math
import os
import random
import re
import select
import shutil
import signal
import socket
import sqlite3
import ssl
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import warnings
from http.client import HTTPConnection
from pathlib import Path

import pytest

import emit
import server
import session_events

try:
    import resource
except ImportError:
    resource = None

ROOT = Path(__file__).resolve().parent


# ==================================================================================================
# The stage
# ==================================================================================================

PRINTED = []  # bytes: all that the programs printed
SECRETS = (
    set()
)  # text that must not be found there, in pieces of 7 or more digits for hashes, whole otherwise

EVENT = {
    "identity_hash": hashlib.sha256(b"identity").hexdigest(),
    "github_hash": hashlib.sha256(b"login").hexdigest(),
    "session_id_hash": hashlib.sha256(b"session").hexdigest(),
    "ended_at": "2026-05-22T12:34:56.000Z",
    "tool_count": 42,
    "tokens_saved": 12345,
    "branch_sha": "abc123def456",
    "discovery_refs": ["auth-jwt-flow", "rate-limit-buckets"],
    "plugin_version": "1.31.0",
}


# Known answers: shared with every other client and server of the contract.
VECTORS = {
    "identity": [
        {
            "machine_id": "3f2b8c1e-9d47-4a6b-8f10-2c5d7e9a1b34",
            "utc_date": "2026-11-22",
            "salt": "salt_2026Q4",
            "identity_hash": "c6806fc0a112b83956c6cfc9aeafea00a34cba756ec78f7ea0ca78b84df65b4a",
        },
        {
            "machine_id": "3f2b8c1e-9d47-4a6b-8f10-2c5d7e9a1b34",
            "utc_date": "2026-12-31",
            "salt": "salt_2026Q4",
            "identity_hash": "c6806fc0a112b83956c6cfc9aeafea00a34cba756ec78f7ea0ca78b84df65b4a",
        },
        {
            "machine_id": "3f2b8c1e-9d47-4a6b-8f10-2c5d7e9a1b34",
            "utc_date": "2027-01-01",
            "salt": "salt_2027Q1",
            "identity_hash": "abbaee7c39f908b0d3b0cf0d6bc7a237829ba2824a461a37d5deacb4e292bd3e",
        },
        {
            "machine_id": "3f2b8c1e-9d47-4a6b-8f10-2c5d7e9a1b34",
            "utc_date": "2026-03-31",
            "salt": "salt_2026Q1",
            "identity_hash": "960d7e513cd934e93aaeb25981ae0c09f9ce4595aba2f87679be3d8d2b89a0e8",
        },
        {
            "machine_id": "3f2b8c1e-9d47-4a6b-8f10-2c5d7e9a1b34",
            "utc_date": "2026-04-01",
            "salt": "salt_2026Q2",
            "identity_hash": "8224fa9c62f5dfd963578817e0e03c719b0bac8f3a96190cad628e158ccefb9a",
        },
    ],
    "github": [
        {
            "login": "octocat",
            "salt": "salt_2026Q4",
            "github_hash": "755dd7b916ca3c3eee9852aac136fbc26e69ba68e776fb0409fce72e00452763",
        }
    ],
    "session": [
        {
            "session_id": "deterministic-session-id-xyz",
            "session_id_hash": "09f0b7a07ce940858dbda3b5c0d06da4ab993427445feea11fcfc9807a288754",
        }
    ],
    "stats_bucket": [
        {"ppid": 4242, "HOME": "/home/dev", "bucket": "p184789d5"},
        {"ppid": 1, "HOME": "", "bucket": "pe9ceaae8"},
        {"ppid": 77, "HOME": "/home/zoë", "bucket": "p31e8963a"},
    ],
    "ended_at": [
        ["2026-05-22T12:34:56.000Z", "2026-05-22T12:34:56.000Z"],
        ["2026-05-22T12:34:56Z", "2026-05-22T12:34:56.000Z"],
        ["2026-05-22T14:34:56.5+02:00", "2026-05-22T12:34:56.500Z"],
        ["2026-05-22T12:34:56", "2026-05-22T12:34:56.000Z"],
        ["2026-05-22T12:34:56.123456789Z", "2026-05-22T12:34:56.123Z"],
        ["2026-12-31T23:30:00-01:00", "2027-01-01T00:30:00.000Z"],
    ],
    "ended_at_refused": [
        "2026/05/22",
        "2026-05-22",
        "2026-02-30T00:00:00Z",
        "2026-05-22T24:00:01Z",
        "2026-05-22T12:34:56Z\n",
        "2026-05-22T12:34:56Zgarbage",
        "٢٠٢٦-05-22T12:34:56Z",
        "2026-05-22 12:34:56Z",
        "2026-05-22T12:34:56+25:00",
        "",
    ],
}


def event(n, **changes):
    """A valid event of session `n` (any value: it is hashed), with `changes` laid over it."""
    session = hashlib.sha256(str(n).encode()).hexdigest()
    if len(SECRETS) < 1000:  # of the many that load tests send, some would be found in anything
        SECRETS.update((session, EVENT["identity_hash"], EVENT["github_hash"]))
    return dict(EVENT, **{"session_id_hash": session, **changes})


needs_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc and prlimit")


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def interpreters(oldest):
    """{(major, minor): path} of the CPythons on this machine, `oldest` and up, the running one among them."""
    found = {sys.version_info[:2]: sys.executable}
    candidates = glob.glob(os.path.expanduser("~/.pyenv/versions/3.*/bin/python3"))
    candidates += [shutil.which("python3.%d" % minor) or "" for minor in range(oldest[1], 20)]
    for path in filter(None, candidates):
        probe = subprocess.run(
            [path, "-I", "-S", "-c", "import sys; print(*sys.version_info[:2])"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        if probe.returncode == 0:
            version = tuple(map(int, probe.stdout.split()))
            if version >= oldest:
                found.setdefault(version, path)
    return dict(sorted(found.items()))


def run(argv, **options):
    """`subprocess.run` with both outputs recorded and returned as text, and a limit that only a hang can reach."""
    options.setdefault("stdin", None if "input" in options else subprocess.DEVNULL)
    if options["stdin"] is None:
        del options["stdin"]
    done = subprocess.run(
        list(map(str, argv)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        timeout=options.pop("timeout", 60),
        **options,
    )
    PRINTED.extend((done.stdout, done.stderr))
    done.stdout, done.stderr = (
        done.stdout.decode("utf-8", "replace"),
        done.stderr.decode("utf-8", "replace"),
    )
    return done


class Server:
    """A real `server.py` process. `.url` is the endpoint; `.stop()` ends it and returns its exit status."""

    def __init__(
        self, db, *flags, python=sys.executable, script=ROOT / "server.py", wrapper=(), **options
    ):
        argv = [*wrapper, python, str(script), "--db", str(db), "--port", "0", *map(str, flags)]
        self.db = db
        self.process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            **options,
        )
        self.output, self.errors, self.news = [], [], threading.Condition()  # lines so far
        first = self.process.stdout.readline()
        PRINTED.append(first)
        self.drains = [
            self.drain(self.process.stdout, self.output),
            self.drain(self.process.stderr, self.errors),
        ]
        match = re.fullmatch(r"listening on (https?://(.+):(\d+))\n", first.decode())
        if not match:
            self.stop()
            raise AssertionError("no address in %r; it said %r" % (first, self.errors))
        self.base, self.host, self.port = match[1], match[2], int(match[3])
        self.url = self.base + "/v1/session-events"

    def drain(self, pipe, lines):
        def read():
            for line in pipe:
                PRINTED.append(line)
                with self.news:
                    lines.append(line.decode("utf-8", "replace").rstrip("\n"))
                    self.news.notify_all()

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        return thread

    def says(self, words):
        """Wait until an error line has `words` in it."""
        with self.news:
            return self.news.wait_for(lambda: any(words in line for line in self.errors), 30)

    def stop(self, signum=signal.SIGTERM):
        if self.process.poll() is None:
            self.process.send_signal(signum)
        status = self.process.wait(30)
        for thread in self.drains:
            thread.join(30)
        self.process.stdout.close()
        self.process.stderr.close()
        return status


@contextlib.contextmanager
def serving(db, *flags, **options):
    """A `Server` for the length of a `with` block."""
    server = Server(db, *flags, **options)
    try:
        yield server
    finally:
        server.stop()


# ==================================================================================================
# emit.py
# ==================================================================================================

EMIT = ROOT / "emit.py"
MACHINE = "3f2b8c1e-9d47-4a6b-8f10-2c5d7e9a1b34"
EMIT_PYTHONS = interpreters((3, 6))
every_python = pytest.mark.parametrize(
    "python", EMIT_PYTHONS.values(), ids=["%d.%d" % version for version in EMIT_PYTHONS]
)


def share(cases, python, parts):
    """One interpreter's part of the cases: all of them together meet each case, and one alone meets all."""
    cases = list(cases)
    return (
        cases[list(EMIT_PYTHONS.values()).index(python) % parts :: parts]
        if len(EMIT_PYTHONS) >= parts
        else cases
    )


def secret_hash(text):
    """The hash of a text, which must never be printed."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    SECRETS.update((digest, text) if len(text) > 6 else (digest,))
    return digest


class Person:
    """A home folder, and the processes that emit.py is run in there. Consent comes from the environment."""

    def __init__(self, home, url="http://127.0.0.1:9/v1/session-events", **env):
        self.home, self.ashlr = home, home / ".ashlr"
        self.pending = self.ashlr / "session-events" / "pending"
        self.env = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "ASHLR_TELEMETRY": "on",
            "ASHLR_SESSION_EVENTS_URL": url,
            "CLAUDE_PROJECT_DIR": str(home),
            **env,
        }
        SECRETS.update((str(home), MACHINE))
        self.put("machine-id", MACHINE + "\n")

    def put(self, name, text):
        path = self.ashlr / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")
        return path

    def emit(self, *args, python=sys.executable, before="", recorded=True, **options):
        """Run emit.py; `before`: statements that run first, to take something away from the system."""
        options["env"] = {
            name: value for name, value in {**self.env, **options.pop("env", {})}.items() if value
        }
        argv = [python, "-I", "-S", EMIT]
        if before:
            code = "import sys; %s; import runpy; runpy.run_path(%r, run_name='__main__')" % (
                before,
                str(EMIT),
            )
            argv = [python, "-I", "-S", "-c", code]
        if recorded:
            return run([*argv, *args], **options)
        return subprocess.run(
            [*map(str, argv), *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            universal_newlines=True,
            timeout=60,
            **options,
        )

    def hook(self, session, *args, **options):
        """A session's end, seen through to the end of its sender (debugging keeps standard error open)."""
        secret_hash(session)
        env = {"CLAUDE_SESSION_ID": session, "ASHLR_TELEMETRY_DEBUG": "1", **options.pop("env", {})}
        done = self.emit(*args, env=env, **options)
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
        return done.stderr

    def kept(self):
        """What waits, oldest first."""
        files = sorted(self.pending.glob("[0-9]*")) if self.pending.exists() else []
        return [json.loads(file.read_text()) for file in files]

    def senders(self):
        """The pids of the processes that run in this home (Linux)."""
        found = []
        for path in glob.glob("/proc/[0-9]*/environ"):
            with contextlib.suppress(OSError), open(path, "rb") as file:
                if b"HOME=%s\0" % os.fsencode(self.home) in file.read():
                    found.append(int(path.split("/")[2]))
        return found


class Odd(http.server.ThreadingHTTPServer):
    """A server on loopback that answers as `answer(n, body)` says: (status, headers), or None for silence."""

    daemon_threads, request_queue_size = True, 128

    def __init__(self, answer=lambda n, body: (202, {})):
        super().__init__(("127.0.0.1", 0), OddHandler)
        self.answer, self.requests, self.over = answer, [], threading.Event()
        self.url = "http://127.0.0.1:%d/v1/session-events" % self.server_port

    def sessions(self):
        return [json.loads(body)["session_id_hash"] for _, _, body in self.requests]

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.over.set()
        self.shutdown()
        self.server_close()


class OddHandler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if len(body) < int(self.headers["Content-Length"]):
            return  # the sender was killed
        self.server.requests.append((self.path, dict(self.headers), body))
        answer = self.server.answer(len(self.server.requests), body)
        if answer is None:
            self.server.over.wait(60)
            return
        self.send_response(answer[0])
        for name, value in answer[1].items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def person(tmp_path):
    return Person(tmp_path / "home")


def until(condition, seconds=60):
    """Wait for what happens in another process, where nothing can be awaited."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen within %d s" % seconds
        time.sleep(0.02)


# -- The pure core ---------------------------------------------------------------------------------


def test_emit_known_hashes():
    """`vectors.json`, of the contract."""
    november = calendar.timegm((2026, 11, 22, 0, 0, 0))
    for date, name, known in (
        (
            "2026-11-22",
            "salt_2026Q4",
            "c6806fc0a112b83956c6cfc9aeafea00a34cba756ec78f7ea0ca78b84df65b4a",
        ),
        (
            "2026-12-31",
            "salt_2026Q4",
            "c6806fc0a112b83956c6cfc9aeafea00a34cba756ec78f7ea0ca78b84df65b4a",
        ),
        (
            "2027-01-01",
            "salt_2027Q1",
            "abbaee7c39f908b0d3b0cf0d6bc7a237829ba2824a461a37d5deacb4e292bd3e",
        ),
        (
            "2026-03-31",
            "salt_2026Q1",
            "960d7e513cd934e93aaeb25981ae0c09f9ce4595aba2f87679be3d8d2b89a0e8",
        ),
        (
            "2026-04-01",
            "salt_2026Q2",
            "8224fa9c62f5dfd963578817e0e03c719b0bac8f3a96190cad628e158ccefb9a",
        ),
    ):
        salt = emit.salt(calendar.timegm(time.strptime(date, "%Y-%m-%d")))
        assert (salt, emit.sha256_hex(MACHINE + salt)) == (name, known)
    assert (
        emit.sha256_hex("octocat" + emit.salt(november))
        == "755dd7b916ca3c3eee9852aac136fbc26e69ba68e776fb0409fce72e00452763"
    )
    assert (
        emit.sha256_hex("deterministic-session-id-xyz")
        == "09f0b7a07ce940858dbda3b5c0d06da4ab993427445feea11fcfc9807a288754"
    )
    assert [
        emit.stats_bucket(*parent) for parent in ((4242, "/home/dev"), (1, ""), (77, "/home/zoë"))
    ] == ["p184789d5", "pe9ceaae8", "p31e8963a"]
    assert emit.sha256_hex("\ud800") != emit.sha256_hex("")  # a lone surrogate is no error
    assert emit.encoded(b"\xff/x".decode("utf-8", "surrogateescape")) == b"\xff/x"


MOMENTS = (  # as an event may have them, and as they are stored
    ("2026-05-22T12:34:56.000Z", "2026-05-22T12:34:56.000Z"),
    ("2026-05-22T12:34:56Z", "2026-05-22T12:34:56.000Z"),
    ("2026-05-22T14:34:56.5+02:00", "2026-05-22T12:34:56.500Z"),
    ("2026-05-22T12:34:56", "2026-05-22T12:34:56.000Z"),
    ("2026-05-22T12:34:56.123456789Z", "2026-05-22T12:34:56.123Z"),
    ("2026-12-31T23:30:00-01:00", "2027-01-01T00:30:00.000Z"),
    ("1999-12-31T23:59:59.999Z", "1999-12-31T23:59:59.999Z"),
)


def test_emit_reads_and_writes_times():
    for text, canonical in MOMENTS:
        assert emit.iso(emit.instant(text) + 0.0001) == canonical
    for text in (
        "2026/05/22",
        "2026-05-22",
        "2026-02-30T00:00:00Z",
        "2026-05-22T24:00:01Z",
        "2026-05-22T12:34:56Z\n",
        "2026-05-22T12:34:56Zgarbage",
        "٢٠٢٦-05-22T12:34:56Z",
        "2026-05-22 12:34:56Z",
        "2026-05-22T12:34:56+25:00",
        "",
        None,
        5,
        [],
    ):
        with pytest.raises(ValueError):
            emit.instant(text)


@pytest.mark.parametrize(
    "allowed, env, said",
    [
        (False, {}, None),
        (False, {}, "on"),
        (False, {}, True),
        (False, {}, ["opt-in"]),
        (False, {}, emit.UNCLEAR),
        (True, {}, "opt-in"),
        (False, {"ASHLR_TELEMETRY": "perhaps"}, None),
        (True, {"ASHLR_TELEMETRY": ""}, "opt-in"),
        (True, {"ASHLR_TELEMETRY": " ON "}, None),
        (True, {"ASHLR_TELEMETRY": "1"}, emit.UNCLEAR),
        (False, {"ASHLR_TELEMETRY": "Off"}, "opt-in"),
        (False, {"ASHLR_TELEMETRY": "0"}, "opt-in"),
        (False, {"ASHLR_TELEMETRY": "on"}, "off"),
        (False, {"ASHLR_TELEMETRY": "on", "DO_NOT_TRACK": "1"}, "opt-in"),
        (False, {"DO_NOT_TRACK": "false"}, "opt-in"),
        (True, {"DO_NOT_TRACK": " 0 "}, "opt-in"),
        (True, {"DO_NOT_TRACK": " "}, "opt-in"),
    ],
)
def test_emit_consent(allowed, env, said):
    assert emit.consent(env, said)[0] is allowed


def test_emit_endpoint():
    for env, url in (
        ({}, "http://127.0.0.1:8787/v1/session-events"),
        ({"ASHLR_API_URL": " "}, "http://127.0.0.1:8787/v1/session-events"),
        ({"ASHLR_API_URL": "https://a.example//"}, "https://a.example/v1/session-events"),
        (
            {"ASHLR_API_URL": "https://a.example", "ASHLR_SESSION_EVENTS_URL": "http://b/x?y"},
            "http://b/x?y",
        ),
    ):
        assert emit.checked_url(emit.endpoint(env)[0])[0] == url
    assert emit.checked_url("https://me:p%40ss@host:8443/x?token=1#f") == (
        "https://host:8443/x?token=1",
        "Basic bWU6cEBzcw==",
        "https://host:8443/x?...",
    )
    for url in (
        "",
        "file:///etc/passwd",
        "ftp://h/",
        "http://",
        "http://h:0/",
        "http://h:99999/",
        "http://h:x/",
        "h/x",
        "http://h/a b",
        "http://h/\r\nX: y",
        "http://h/é",
        "javascript:x",
        "http://[::1/",
        "http://h/" + "x" * 5000,
    ):
        with pytest.raises(ValueError) as error:
            emit.checked_url(url)
        assert len(url) < 8 or url not in str(error.value)


def test_emit_counts():
    now = emit.instant("2026-11-22T12:00:00Z")
    fresh = {"sessionId": "s2", "updatedAt": "2026-11-22T11:00:00.000Z"}
    stats = {
        "schemaVersion": 2,
        "sessions": {
            "s1": {"calls": 5, "tokensSaved": 7.9},
            "s2": {"calls": 10, "tokensSaved": 100},
            "p1": {"calls": 1},
        },
    }
    for known, project, expected in (
        (stats, {}, (6, 7)),
        (stats, fresh, (16, 107)),
        (stats, dict(fresh, sessionId="s1"), (6, 7)),
        (stats, dict(fresh, updatedAt="2026-11-21T12:00:00Z"), (16, 107)),
        (stats, dict(fresh, updatedAt="2026-11-21T11:59:59Z"), (6, 7)),  # older than a day
        (stats, dict(fresh, updatedAt="2026-11-22T12:00:01Z"), (6, 7)),  # of the future
        (stats, {"sessionId": ["s2"], "updatedAt": fresh["updatedAt"]}, (6, 7)),
        (dict(stats, schemaVersion=3), {}, (0, 0)),
        ({}, {}, (0, 0)),
        ({"sessions": [1]}, {}, (0, 0)),
        ({"sessions": {"s1": {"calls": -3, "tokensSaved": "9"}, "p1": None}}, {}, (0, 0)),
        (
            {
                "sessions": {
                    "s1": {"calls": True, "tokensSaved": float("inf")},
                    "p1": {"calls": 1e300},
                }
            },
            {},
            (1000000, 0),
        ),
        ({"sessions": {"s1": {"calls": 2e6, "tokensSaved": 5e9}}}, {}, (1000000, 1000000000)),
    ):
        assert emit.counts(known, project, ["s1", "p1"], now) == expected


def test_emit_finds_discoveries_in_paths():
    """Of a path, the stem of a file in the project's discoveries, and nothing else."""
    folder = ".ashlrcode/genome/sections/discoveries/"
    windows = "C:\\Src\\App\\.ashlrcode\\genome\\sections\\discoveries\\"
    for path, base, project, ref in (
        ("/p/" + folder + "auth-jwt-flow.md", "/x", "/p", "auth-jwt-flow"),
        ("/p/" + folder + "a.b.md", "/", "/p/", "a.b"),
        (folder + "x.md", "/p", "/p", "x"),
        ("../" + folder + "x.md", "/p/sub", "/p", "x"),
        ("/p/" + folder + "s/x.md", "/", "/p", "x"),
        ("/p/" + folder + "../discoveries/x.md", "/", "/p", "x"),
        ("/p/" + folder + "../../secret.md", "/", "/p", ""),
        ("/p/" + folder, "/", "/p", ""),
        ("/p/" + folder[:-1], "/", "/p", ""),
        ("/p/src/x.md", "/", "/p", ""),
        ("/q/" + folder + "x.md", "/", "/p", ""),
        ("/pp/" + folder + "x.md", "/", "/p", ""),
        ("", "/p", "/p", ""),
        ("/p/" + folder + "my notes.md", "/", "/p", ""),
        ("/p/" + folder + ".hidden", "/", "/p", ""),
        ("/p/" + folder + "x" * 129 + ".md", "/", "/p", ""),
        ("/p/" + folder.upper() + "x.md", "/", "/p", ""),
        (windows + "Auth.md", "C:\\", "C:\\Src\\App", "Auth"),
        (windows.lower() + "x.md", "D:\\", "C:/Src/App", "x"),
        (windows.replace("\\", "/") + "x.md", "C:\\", "c:\\src\\app", "x"),
        (folder + "x.md", "C:\\Src\\App", "C:\\Src\\App", "x"),
        (windows + "x.md", "C:\\", "C:\\Src", ""),
        (windows + "x.md", "/p", "/p", ""),
    ):
        assert emit.touched_ref(path, base, project) == ref, path
    many = ["r%d" % n for n in range(250)]
    assert emit.newest_refs(["a", *many, "a", "no slug", 7]) == many[-200:]
    assert emit.newest_refs(["b", "a", "b"]) == ["b", "a"]


def test_emit_knows_its_events():
    """CONTRACT §1: what comes from the spool is checked again before it is sent."""
    good = event("knows", github_hash=None, branch_sha=None)
    assert emit.is_event(good) and emit.is_event(event("knows"))
    for changes in (
        {"identity_hash": "A" * 64},
        {"identity_hash": "a" * 63},
        {"identity_hash": "a" * 64 + "\n"},
        {"identity_hash": None},
        {"github_hash": ""},
        {"github_hash": 5},
        {"session_id_hash": "٠" * 64},
        {"ended_at": "2026-02-30T00:00:00.000Z"},
        {"ended_at": "2026-05-22T12:34:56.000Z\n"},
        {"ended_at": None},
        {"ended_at": "2026-05-22T12:34:56Z"},
        {"tool_count": True},
        {"tool_count": -1},
        {"tool_count": 1000001},
        {"tool_count": 1.5},
        {"tool_count": float("nan")},
        {"tokens_saved": 10**9 + 1},
        {"tokens_saved": "5"},
        {"branch_sha": "abc123"},
        {"branch_sha": "a" * 41},
        {"branch_sha": "main"},
        {"discovery_refs": None},
        {"discovery_refs": ["a b"]},
        {"discovery_refs": [1]},
        {"discovery_refs": "a"},
        {"discovery_refs": ["r%d" % n for n in range(201)]},
        {"discovery_refs": ["\ud800"]},
        {"plugin_version": ""},
        {"plugin_version": "/home/me"},
        {"plugin_version": "1" * 65},
        {"extra": 1},
    ):
        assert not emit.is_event(dict(good, **changes)), changes
    assert not any(emit.is_event(value) for value in (None, [], "x", {}, 5, [good]))
    assert not emit.is_event({name: good[name] for name in good if name != "tool_count"})


def test_emit_builds_what_the_server_accepts():
    """At every edge of every field, and on the server's short path."""
    for changes in (
        {},
        {"github_hash": None, "branch_sha": None, "discovery_refs": []},
        {"tool_count": 0, "tokens_saved": 0},
        {"tool_count": 1000000, "tokens_saved": 1000000000},
        {"branch_sha": "a" * 7},
        {"branch_sha": "0" * 40},
        {"discovery_refs": ["%03d" % n + "x._:-" * 25 for n in range(200)]},
        {"plugin_version": "0"},
        {"plugin_version": "1.2.3-rc.1+build_5" + "x" * 46},
        {"ended_at": "2000-12-31T23:59:59.999Z"},
    ):
        built = event("builds", **changes)
        assert emit.is_event(built)
        assert server.canonical_row(emit.as_sent(built)), changes
    with pytest.raises(ValueError):
        emit.as_sent(event("builds", tool_count=-1))


def test_emit_reads_json_alike_with_and_without_the_c_scanner(monkeypatch):
    cases = [
        b'{"a": [1, 2.5, -0, 1e400, true, null, "\\u00e9"]}',
        b' \r\n\t{"a":1,"a":2}\n',
        b"\xef\xbb\xbf{}",
        b"",
        b"  ",
        b"[1,]",
        b"{} x",
        b"{}{}",
        b"\xff",
        "{}".encode("utf-16"),
        b'{"a": NaN}',
        b"Infinity",
        b"-Infinity",
        b"tru",
        b'"\n"',
        b'"\\ud800"',
        b"[" * 100000,
        b'{"a":' * 100000,
        b"01",
        b"\x0b{}",
        b"\xc2\xa0{}",
        b"123456789012345678901",
    ]

    def read(data):
        try:
            return emit.loads(data)
        except ValueError:
            return "not JSON"

    fast = [read(data) for data in cases]
    assert fast[0] == {"a": [1, 2.5, 0, float("inf"), True, None, "é"]} and fast[1] == {"a": 2}
    monkeypatch.setitem(sys.modules, "_json", None)
    assert [read(data) for data in cases] == fast


def test_emit_small_rules():
    now = emit.instant("2026-11-22T12:00:00Z")
    for header, at in (
        (None, 0.0),
        ("", 0.0),
        ("120", now + 120),
        ("0", 0.0),
        ("-5", 0.0),
        ("1.5", 0.0),
        ("9" * 50, now + 86400),
        ("Sun, 22 Nov 2026 12:10:00 GMT", now + 600),
        ("Sun, 22 Nov 2020 12:10:00 GMT", 0.0),
        ("Sun, 22 Nov 2099 12:10:00 GMT", now + 86400),
        ("soon", 0.0),
        ("٣", 0.0),
    ):
        assert emit.retry_at(header, now) == at, header
    for argv, parsed in (
        ([], ("", None, [])),
        (["--wait"], ("", 0.5, [])),
        (["--wait", "2000", "--dir", "/x"], ("/x", 2.0, [])),
        (["--wait", "--dir", "/x"], ("/x", 0.5, [])),
        (["--wait", "999999"], ("", 20.0, [])),
        (["--dir"], ("", None, ["--dir"])),
        (["a", "--b"], ("", None, ["a", "--b"])),
    ):
        assert emit.options(argv) == parsed
    names = [b"%015d-%012x.json" % (now * 1000 - (700 - n) * 1000, n) for n in range(700)]
    assert emit.expired(names, now) == set(names[:200])
    assert emit.expired(names, now + 29 * 86400) == set(names[:200])
    assert emit.expired(names, now + 31 * 86400) == set(names)
    assert emit.expired(names[:10], now - 400 * 86400) == set()  # a clock that was a year ahead
    assert re.fullmatch(
        r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", emit.random_uuid()
    )
    assert emit.github_login({"valid": True, "githubLogin": "octocat"}) == "octocat"
    assert not any(
        map(
            emit.github_login,
            (
                {},
                {"valid": "true", "githubLogin": "o"},
                {"valid": True, "githubLogin": 5},
                {"valid": False, "githubLogin": "o"},
                {"valid": True, "githubLogin": " "},
            ),
        )
    )


def test_emit_is_the_same_program_unfolded(person, tmp_path):
    """The fold is for speed only: same names at the same lines, same event."""
    text = EMIT.read_text()
    plain, parts = re.subn(r"def part_.*\n    return r'''\n((?s:.*?))\n'''\n", r"\n\n\1\n\n", text)
    assert parts == 2 and "'''" not in plain.split("names = globals()")[1]
    (tmp_path / "emit.py").write_text(plain)
    spec = importlib.util.spec_from_file_location("plain_emit", str(tmp_path / "emit.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    lines = [
        {
            name: value.__code__.co_firstlineno
            for name, value in vars(m).items()
            if hasattr(value, "__code__")
        }
        for m in (emit, module)
    ]
    assert lines[0] == lines[1] and len(lines[0]) > 50
    shown = [
        subprocess.run(
            [sys.executable, "-I", "-S", str(file), "show"],
            env=person.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ).stdout
        for file in (EMIT, tmp_path / "emit.py")
    ]
    first, second = (re.sub(rb'"ended_at":"[^"]*"', b"", line) for line in shown)
    assert first == second and b"session_id_hash" in first


@every_python
def test_emit_refuses_endless_numbers(python, person):
    """Alike on all Pythons: without a limit, a million digits in a hook's JSON cost 4 s of work."""
    unlimited = "getattr(sys, 'set_int_max_str_digits', int)(0); "
    for digits, scanner in ((4300, "pass"), (4301, "pass"), (4301, "sys.modules['_json'] = None")):
        shown = person.emit(
            "show",
            python=python,
            before=unlimited + scanner,
            recorded=False,
            input='{"session_id": "digits", "x": [%s]}' % ("1" * digits),
        )
        assert (secret_hash("digits") in shown.stdout) == (digits == 4300), shown.stderr
    person.put("config.json", '{"telemetry": "opt-in", "x": %s}' % ("1" * 4301))
    status = person.emit(
        "status", python=python, before=unlimited + "pass", env={"ASHLR_TELEMETRY": None}
    )
    assert "config.json cannot be read" in status.stdout


@every_python
def test_emit_compiles_and_imports_no_more_than_it_needs(python, person):
    """What `track` costs when there is nothing to record, in what does not depend on the machine."""
    code = (
        "import sys; system = sys.modules.get('os') or sys.modules['posix']; names = dict(__name__='__main__')\n"
        "system._exit = lambda status: print([part for part in ('part_two', 'part_three') if part in names],"
        " [name for name in ('json', 're', 'subprocess', 'hashlib') if name in sys.modules])\n"
        "exec(open(%r, encoding='utf-8').read(), names)" % str(EMIT)
    )
    person.put("config.json", {"telemetry": "opt-in"})
    nothing = b'{"session_id": "s", "cwd": "/x", "tool_name": "Edit", "tool_input": {"file_path": "/x/a.py"}}'
    for args, data, off, folded in (
        (["track"], nothing, "", ["part_two", "part_three"]),
        (["track", "--dir", "/x"], nothing, "", ["part_two", "part_three"]),
        (["track"], nothing.replace(b"/x/", b"discoveries/"), "", []),
        ([], nothing, "1", ["part_three"]),
    ):
        done = run(
            [python, "-I", "-S", "-c", code, *args],
            input=data,
            env={**person.env, "ASHLR_TELEMETRY": "", "DO_NOT_TRACK": off},
        )
        loaded = done.stdout.strip().partition("] ")[2]
        assert done.stdout.startswith(str(folded)), (args, done.stdout, done.stderr)
        assert loaded == "[]" or not folded, loaded


# -- The hook, as a process ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """(a git repository with one commit, the commit)."""
    path = tmp_path_factory.mktemp("repository")
    git = ["git", "-C", str(path), "-c", "user.name=x", "-c", "user.email=x@example.com"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run(
            git + command, check=True, env={"PATH": os.environ["PATH"], "HOME": str(path)}
        )
    return path, subprocess.run(
        [*git, "rev-parse", "HEAD"], check=True, stdout=subprocess.PIPE
    ).stdout.decode().strip()


@pytest.fixture(scope="module")
def ingest(tmp_path_factory):
    """A real server, and a function that gives the row of a session."""
    db = tmp_path_factory.mktemp("ingest") / "events.db"

    def row(session):
        with contextlib.closing(sqlite3.connect(str(db))) as connection:
            connection.row_factory = sqlite3.Row
            found = connection.execute(
                "SELECT * FROM session_events WHERE session_id_hash = ?", [secret_hash(session)]
            )
            return [dict(line) for line in found]

    with serving(db) as server:
        yield server, row


@pytest.fixture(scope="module")
def crowd(tmp_path_factory):
    """50 sessions that end at once before a silent server, one before a server that sends a byte a second."""

    def drip(connection):
        with contextlib.suppress(OSError):
            while connection.send(b"H"):
                time.sleep(1)

    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=lambda: drip(listener.accept()[0]), daemon=True).start()
    with Odd(lambda n, body: None) as silent:
        people = [
            Person(tmp_path_factory.mktemp("crowd") / "home", silent.url),
            Person(
                tmp_path_factory.mktemp("drip") / "home",
                "http://127.0.0.1:%d/" % listener.getsockname()[1],
            ),
        ]
        hooks = [
            subprocess.Popen(
                [sys.executable, "-I", "-S", str(EMIT)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**person.env, "CLAUDE_SESSION_ID": "crowd-%d" % n},
            )
            for n, person in enumerate([people[0]] * 50 + [people[1]])
        ]
        printed = [process.communicate(timeout=60)[0] for process in hooks]
        left, gone = time.monotonic(), []

        def watch():
            until(lambda: not any(person.senders() for person in people))
            gone.append(time.monotonic() - left)

        watcher = threading.Thread(target=watch)
        watcher.start()
        yield people, printed, silent, lambda: watcher.join() or gone[0]
    listener.close()


def test_emit_of_50_sessions_at_once_leaves_its_callers(crowd):
    people, printed, _, _ = crowd
    assert printed == [b""] * 51
    until(
        lambda: len(people[0].kept()) == 50 and len(people[0].senders()) <= 1
    )  # the others gave way


@every_python
def test_emit_whole_path(python, tmp_path, repository, ingest):
    """Hook JSON in, row out; a home that is not ASCII, in an environment without a locale."""
    server, row = ingest
    login = "octocat-of-the-test"
    (tmp_path / "package.json").write_text('{"version": "1.31.0"}')
    for n in range(9):  # git has 250 ms, which a machine under load may not give it the first time
        session = "whole-path-%d-%s" % (n, python)
        person = Person(
            tmp_path / str(n) / "zoë",
            server.url,
            CLAUDE_PROJECT_DIR="",
            ASHLR_TELEMETRY="",
            CLAUDE_PLUGIN_ROOT=str(tmp_path),
        )
        person.put("config.json", {"theme": "dark", "telemetry": "opt-in"})
        person.put("pro-token-cache.json", {"valid": True, "githubLogin": login})
        bucket = emit.stats_bucket(os.getpid(), str(person.home))
        person.put(
            "stats.json",
            {
                "schemaVersion": 2,
                "sessions": {session: {"calls": 40, "tokensSaved": 9}, bucket: {"calls": 2}},
            },
        )
        person.put("session-events/touched/" + secret_hash(session), "first\nsecond")
        hook = {
            "session_id": session,
            "transcript_path": "/secret/transcript.jsonl",
            "cwd": str(repository[0]),
            "hook_event_name": "SessionEnd",
            "reason": "exit",
            "permission_mode": "default",
        }
        done = person.emit(
            python=python, input=json.dumps(hook).encode(), env={"ASHLR_TELEMETRY_DEBUG": "1"}
        )
        assert (done.returncode, done.stdout) == (0, "") and "1 answered 202" in done.stderr
        [stored] = row(session)
        if stored["branch_sha"]:
            break
    received, ended = stored.pop("received_at"), stored.pop("ended_at")
    salt = "salt_%sQ%d" % (ended[:4], (int(ended[5:7]) + 2) // 3)
    assert ended[:19] <= received and stored.pop("id")
    assert stored == {
        "identity_hash": secret_hash(MACHINE + salt),
        "github_hash": secret_hash(login + salt),
        "session_id_hash": secret_hash(session),
        "tool_count": 42,
        "tokens_saved": 9,
        "branch_sha": repository[1][:12],
        "discovery_refs_json": '["first","second"]',
        "plugin_version": "1.31.0",
    }
    assert person.kept() == [] and not list((person.ashlr / "session-events" / "touched").iterdir())


HOOKS = [  # as real hosts send them at a session's end
    {
        "session_id": "hook-a",
        "transcript_path": "/t.jsonl",
        "cwd": "/",
        "hook_event_name": "SessionEnd",
        "reason": "clear",
    },
    {
        "session_id": "hook-b",
        "transcript_path": "/t.jsonl",
        "cwd": "/",
        "permission_mode": "acceptEdits",
        "hook_event_name": "SessionEnd",
        "reason": "other",
    },
    {
        "session_id": "hook-c",
        "cwd": "C:\\Users\\me\\app",
        "hook_event_name": "SessionEnd",
        "reason": "logout",
        "later": [{}],
    },
]


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook["session_id"])
def test_emit_takes_recorded_hook_input(hook, person):
    with Odd() as server:
        done = person.emit(
            "--wait",
            "20000",
            input=json.dumps(hook).encode(),
            env={"ASHLR_SESSION_EVENTS_URL": server.url},
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert server.sessions() == [secret_hash(hook["session_id"])]
        person.hook(
            "from the environment",
            input=json.dumps(hook).encode(),
            env={"ASHLR_SESSION_EVENTS_URL": server.url},
        )
        assert server.sessions()[1:] == [secret_hash("from the environment")]


@every_python
def test_emit_waits_for_no_input(python, person):
    """A terminal's absence, rubbish, an object without an end, silence: each is one event and no hang."""
    parent = "ppid:%d:%s:%s" % (
        os.getpid(),
        Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19],
        MACHINE,
    )
    with Odd() as server:
        person.env["ASHLR_SESSION_EVENTS_URL"] = server.url
        rubbish = b"", b"{", b"[]", b"\xff\xfe", b'{"session_id": 7}', b'{"session_id": " "}'
        for data in share(rubbish, python, 3):
            person.emit("--wait", "20000", python=python, input=data)
            assert server.sessions().pop() == secret_hash(parent), data
        person.emit("--wait", "20000", python=python, preexec_fn=lambda: os.close(0))
        assert server.sessions().pop() == secret_hash(parent)
        for data, session in ((b'{"session_id": "unclosed"}\n', "unclosed"), (b"", parent)):
            read, write = os.pipe()
            os.write(write, data)
            person.emit("--wait", "20000", python=python, stdin=read)
            os.close(write)
            os.close(read)
            assert server.sessions().pop() == secret_hash(session)
        large = {"session_id": "large", "x": "}" * 3000000}
        person.emit("--wait", "20000", python=python, input=json.dumps(large).encode())
        assert server.sessions().pop() == secret_hash("large")


BREAKAGES = {  # what somebody may have done to the folder: nothing may come of it but silence
    "config is a folder": lambda person: (person.ashlr / "config.json").mkdir(),
    "config is no JSON": lambda person: person.put("config.json", "{telemetry: on"),
    "config is a pipe": lambda person: os.mkfifo(str(person.ashlr / "config.json")),
    "machine-id is a folder": lambda person: [
        (person.ashlr / "machine-id").unlink(),
        (person.ashlr / "machine-id").mkdir(),
    ],
    "machine-id is empty": lambda person: person.put("machine-id", "\n"),
    "stats and the rest are rubbish": lambda person: [
        person.put(name, "[" * 5000)
        for name in (
            "stats.json",
            "last-project.json",
            "pro-token-cache.json",
            "session-events/last.json",
        )
    ],
    "stats has numbers of thousands of digits": lambda person: person.put(
        "stats.json", '{"sessions": %s}' % ("9" * 9000)
    ),
    "the spool is a file": lambda person: person.put("session-events/pending", "x"),
    "there is no home": lambda person: (
        shutil.rmtree(str(person.home)) or person.home.write_text("a file")
    ),
    "the URL is no URL": lambda person: person.env.update(
        ASHLR_SESSION_EVENTS_URL="file:///etc/passwd"
    ),
    "the project is gone": lambda person: person.env.update(
        CLAUDE_PROJECT_DIR="/nonexistent\nfolder"
    ),
    "nobody is there": lambda person: person.env.update(
        ASHLR_SESSION_EVENTS_URL="http://nobody.invalid/"
    ),
    "PATH is empty": lambda person: person.env.update(PATH="/nonexistent"),
}


@every_python
def test_emit_hook_never_fails(python, tmp_path):
    ways = [(), ("--wait", "1"), ("--wait", "400", "--nonsense", "x"), ("track",)]
    for n, (name, breakage) in enumerate(BREAKAGES.items()):
        person = Person(tmp_path / str(n))
        breakage(person)
        way = ways[
            (n + list(EMIT_PYTHONS.values()).index(python)) % 4
        ]  # over all interpreters, each with each
        done = person.emit(
            *way, python=python, input=b'{"session_id":"s","tool_input":{"path":"discoveries"}}'
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), (name, way)
    done = person.emit(
        python=python, env={"HOME": None, "ASHLR_TELEMETRY": None}, cwd=str(tmp_path)
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@every_python
def test_emit_consent_off_does_nothing(python, person, tmp_path):
    """No file, no git, no request; what waits is deleted, also when the answer changes between two sends."""
    log = tmp_path / "ran"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "git").write_text("#!/bin/sh\necho ran >> %s\n" % log)
    (tmp_path / "bin" / "git").chmod(0o755)
    with Odd() as server:
        person.env.update(
            PATH="%s:%s" % (tmp_path / "bin", person.env["PATH"]),
            ASHLR_SESSION_EVENTS_URL=server.url,
        )
        person.put("session-events/pending/%015d-000000000000.json" % 5, event(5))
        person.put("session-events/touched/" + "a" * 64, "x")
        person.hook("off", python=python, env={"DO_NOT_TRACK": "1"})
        assert person.kept() == [] and not list(person.ashlr.glob("session-events/touched/*"))
        bare = Person(tmp_path / "bare", server.url, ASHLR_TELEMETRY="")
        (bare.ashlr / "machine-id").unlink()
        bare.hook("off", python=python)
        by_hand = bare.emit("track", "x", python=python)
        assert (by_hand.returncode, by_hand.stdout) == (
            0,
            "",
        ) and "not recorded: consent is off" in by_hand.stderr
        assert (
            list(bare.home.rglob("*")) == [bare.ashlr] and not log.exists() and not server.requests
        )

        server.answer = lambda n, body: (
            person.put("config.json", {"telemetry": "off"}),
            (202, {}),
        )[1]
        for n in range(3):
            person.put("session-events/pending/%015d-%012d.json" % (n, n), event(n))
        assert "consent is off" in person.hook("on", python=python)
        assert server.sessions() == [event(0)["session_id_hash"]] and person.kept() == []
        assert not (person.ashlr / "session-events" / "last.json").exists() and log.exists()


def test_emit_no_deletes_what_waits_also_beside_a_broken_file(person):
    """Whoever says no: a config.json that cannot be read keeps the spool only when nobody said anything else."""
    for env, stays in (
        ({"DO_NOT_TRACK": "1"}, 0),
        ({"ASHLR_TELEMETRY": "off"}, 0),
        ({"ASHLR_TELEMETRY": ""}, 1),
    ):
        person.put("config.json", "{broken")
        person.put("session-events/pending/%015d-000000000000.json" % 5, event(5))
        person.hook("no", env=env)
        assert len(person.kept()) == stays


def test_emit_prints_no_password_of_a_proxy(person):
    env = {
        "http_proxy": "http:/somebody:hunter22@127.0.0.1:9",
        "ASHLR_SESSION_EVENTS_URL": "http://example.test/x",
    }
    SECRETS.add("hunter22")
    said = person.hook("proxy", "--wait", "20000", env=env)
    status = person.emit("status", env=env).stdout
    assert "without an answer" in said and "hunter22" not in said + status
    assert "hunter22" not in (person.ashlr / "session-events" / "last.json").read_text()
    assert (
        "hunter22"
        not in person.emit(
            "status", env={"ASHLR_SESSION_EVENTS_URL": "http://somebody:12/hunter22@127.0.0.1/x"}
        ).stdout
    )


def test_emit_without_a_home_takes_no_folder_for_one(person, tmp_path):
    """A project's folder called `~` says nothing for a person, and gets nothing written into it."""
    (tmp_path / "~" / ".ashlr").mkdir(parents=True)
    (tmp_path / "~" / ".ashlr" / "config.json").write_text('{"telemetry": "opt-in"}')
    with Odd() as server:
        env = {"HOME": "~", "ASHLR_TELEMETRY": "", "ASHLR_SESSION_EVENTS_URL": server.url}
        for args in ((), ("track",), ("track", "d1")):
            person.emit(*args, env=env, cwd=str(tmp_path), input=b'{"session_id":"x"}')
        assert not server.requests and len(list((tmp_path / "~").rglob("*"))) == 2


@every_python
def test_emit_is_out_of_reach_when_its_caller_is_let_go(python, tmp_path):
    """A terminal that closes as the hook ends takes no event with it."""
    with Odd() as server:
        person = Person(tmp_path / "home", server.url)
        for n in range(8):
            hook = subprocess.Popen(
                [python, "-I", "-S", EMIT],
                env={**person.env, "CLAUDE_SESSION_ID": "hup-%d" % n},
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            hook.wait(60)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(hook.pid, signal.SIGHUP)
        until(lambda: len(set(server.sessions())) == 8)


@every_python
def test_emit_finds_its_version_when_named_by_a_relative_path(python, person, tmp_path):
    shutil.copy(EMIT, tmp_path)
    (tmp_path / "package.json").write_text('{"version": "7.7.7"}')
    with Odd() as server:
        env = {
            **person.env,
            "ASHLR_SESSION_EVENTS_URL": server.url,
            "CLAUDE_SESSION_ID": "relative",
        }
        done = run([python, "-I", "-S", "emit.py"], cwd=str(tmp_path), env=env)
        assert done.returncode == 0
        until(lambda: server.requests)
        assert json.loads(server.requests[0][2])["plugin_version"] == "7.7.7"


@every_python
def test_emit_leaves_its_caller_alone(python, person, tmp_path):
    """The parent is gone and its pipes are closed while the sender still waits for a silent server."""
    with Odd(lambda n, body: None) as server:
        with (tmp_path / "open").open("w") as extra:
            done = person.emit(
                python=python,
                input=b'{"session_id":"leaves"}',
                cwd=str(tmp_path),
                pass_fds=[extra.fileno()],
                env={"ASHLR_SESSION_EVENTS_URL": server.url},
            )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        until(lambda: server.requests)
        [sender] = person.senders()
        assert os.getsid(sender) == sender and os.readlink("/proc/%d/cwd" % sender) == "/"
        open_files = {os.readlink(path) for path in glob.glob("/proc/%d/fd/*" % sender)}
        ours = {
            path for path in open_files if path != "/dev/null" and not path.startswith("socket:")
        }
        assert ours <= {str(person.ashlr / "session-events" / "flush.lock")}
        assert [kept["session_id_hash"] for kept in person.kept()] == [secret_hash("leaves")]
        kept = [person.pending.parent, person.pending, *person.pending.iterdir()]
        assert [oct(path.stat().st_mode & 0o777) for path in kept] == ["0o700", "0o700", "0o600"]
        os.kill(sender, signal.SIGKILL)


@every_python
def test_emit_keeps_or_drops_by_the_answer(python, tmp_path):
    with Odd() as elsewhere:
        statuses = dict.fromkeys((200, 202, 204, 400, 404, 413), 0)  # how many files stay
        statuses.update(dict.fromkeys((301, 302, 307, 407, 408, 429, 500, 503), 1))
        for status, stays in share(statuses.items(), python, 3):
            with Odd(lambda n, body, code=status: (code, {"Location": elsewhere.url})) as server:
                person = Person(tmp_path / str(status), server.url)
                said = person.hook("answer-%d" % status, "--wait", "20000", python=python)
                assert "1 answered %d" % status in said and len(server.requests) == 1
                assert len(person.kept()) == stays
        assert not elsewhere.requests


@every_python
def test_emit_keeps_away_as_long_as_the_server_asks(python, tmp_path):
    later = email.utils.formatdate(time.time() + 3600, usegmt=True)
    for n, wish in share(enumerate(("3600", later)), python, 2):
        with Odd(lambda n, body, wish=wish: (503, {"Retry-After": wish})) as server:
            person = Person(tmp_path / str(n), server.url)
            person.hook("retry-1", python=python)
            assert (
                "nothing sent" in person.hook("retry-2", python=python)
                and len(server.requests) == 1
            )
            state = json.loads((person.ashlr / "session-events" / "last.json").read_text())
            assert 3500 < state["retry_at"] - time.time() < 3700
            server.answer = lambda n, body: (202, {})
            for at in (
                time.time() - 1,
                time.time() + 365 * 86400,
            ):  # over; of a clock that was a year ahead
                person.put("session-events/last.json", dict(state, retry_at=at))
                person.hook("retry-3", python=python)
                assert person.kept() == []


def test_emit_sends_all_that_is_good(person):
    """1,000 waiting events among rubbish, two of a clock that was a year off: oldest first, each once."""
    now = int(time.time() * 1000)
    year = 365 * 86400 * 1000
    times = [now - year, *range(now - 998, now), now + year]
    for n, at in enumerate(times):
        person.put("session-events/pending/%015d-%012x.json" % (at, n), event(n))
    bad = {
        "%015d-%012x.json" % (now, 5000): "",
        "%015d-%012x.json" % (now, 5001): '{"half": ',
        "%015d-%012x.json" % (now, 5002): "[" * 9000,
        "%015d-%012x.json" % (now, 5003): json.dumps(event(1, plugin_version="/home/me")),
        "%015d-%012x.json" % (now, 5004): "x" * 70000,
    }
    foreign = {"note.txt": "keep me", "new.json": json.dumps(event(2))}
    for name, text in {**bad, **foreign}.items():
        person.put("session-events/pending/" + name, text)
    (person.pending / ("%015d-%012x.json" % (now, 5005))).mkdir()
    stale, young = (
        person.put(folder + "/.0123456789abcdef.tmp", "{")
        for folder in ("session-events/pending", "session-events")
    )
    os.utime(str(stale), (1, 1))
    with Odd() as server:
        said = person.hook("thousand", env={"ASHLR_SESSION_EVENTS_URL": server.url})
        assert "1001 answered 202" in said and "5 removed" in said
        expected = [event(n)["session_id_hash"] for n in range(1000)]
        assert server.sessions() == [*expected[:-1], secret_hash("thousand"), expected[-1]]
    assert {path.name for path in person.pending.iterdir()} == {
        *foreign,
        "%015d-%012x.json" % (now, 5005),
    }
    assert young.exists()


def test_emit_lets_500_events_wait_for_30_days(person):
    now, day = int(time.time() * 1000), 86400 * 1000
    for n in range(520):
        person.put("session-events/pending/%015d-%012x.json" % (now - day - 520 + n, n), event(n))
    for n in range(600, 605):
        person.put("session-events/pending/%015d-%012x.json" % (now - 31 * day, n), event(n))
    assert "1 without an answer" in person.hook("dead")
    kept = [kept["session_id_hash"] for kept in person.kept()]
    assert kept == [event(n)["session_id_hash"] for n in range(21, 520)] + [secret_hash("dead")]


@every_python
def test_emit_without_room_sends_at_once(python, tmp_path):
    """A full disk, and a folder that cannot be written: the event goes without the spool."""
    for n, (before, options) in enumerate(
        (
            (lambda person: person.put("session-events", "a file"), {}),
            (
                lambda person: None,
                {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))},
            ),
        )
    ):
        with Odd() as server:
            person = Person(tmp_path / str(n), server.url)
            before(person)
            assert "not kept" in person.hook("no-room", python=python, **options)
            assert server.sessions() == [secret_hash("no-room")] and not list(
                person.ashlr.rglob("*.tmp")
            )


def test_emit_asks_git_for_no_favours(person, repository, tmp_path):
    """Variables of git's own hooks lead nowhere; a git that hangs, its child with the pipe, costs 250 ms."""
    with Odd() as server:
        person.env.update(
            ASHLR_SESSION_EVENTS_URL=server.url, GIT_DIR="/nonexistent", GIT_WORK_TREE="/"
        )
        for n in range(9):  # see above
            person.hook("git-%d" % n, "--dir", str(repository[0]))
            if json.loads(server.requests[-1][2])["branch_sha"]:
                break
        (tmp_path / "git").write_text("#!/bin/sh\nsleep 30 & sleep 30\n")
        (tmp_path / "git").chmod(0o755)
        person.hook("slow-git", env={"PATH": "%s:%s" % (tmp_path, os.environ["PATH"])})
        shas = [json.loads(body)["branch_sha"] for _, _, body in server.requests]
        assert shas[-2:] == [repository[1][:12], None]
        assert not any(
            "sleep" in Path("/proc/%d/cmdline" % pid).read_text() for pid in person.senders()
        )


@every_python
def test_emit_runs_no_git_of_the_projects(python, person, repository, tmp_path):
    """Of PATH, the working directory (an empty entry) and relative folders do not count; nor those of no PATH."""
    (tmp_path / "bin").mkdir()
    for name in ("git", "bin/git"):
        (tmp_path / name).write_text("#!/bin/sh\necho ran >> %s/ran\necho 1234567\n" % tmp_path)
        (tmp_path / name).chmod(0o755)
    real, found = os.environ["PATH"], []
    with Odd() as server:
        person.env["ASHLR_SESSION_EVENTS_URL"] = server.url
        for n, path in enumerate((".:" + real, ":" + real, "bin:" + real, ".:bin:", None)):
            person.emit(
                "--wait",
                "20000",
                "--dir",
                str(repository[0]),
                python=python,
                cwd=str(tmp_path),
                env={"PATH": path, "CLAUDE_SESSION_ID": "git-%d" % n},
                stdin=subprocess.DEVNULL,
            )
            found.append(json.loads(server.requests[-1][2])["branch_sha"])
    assert not (tmp_path / "ran").exists()
    assert (
        repository[1][:12] in found and found[3] is None
    )  # git may take longer than it is given, once


@every_python
def test_emit_goes_through_the_proxy_that_the_environment_names(python, person):
    """And no other: on a Mac, urllib would ask the system, which crashes after a fork."""
    with Odd() as proxy:
        person.env.update(
            ASHLR_SESSION_EVENTS_URL="http://me:secret-word@far.example/x",
            http_proxy=proxy.url.rsplit("/", 2)[0],
        )
        SECRETS.add("secret-word")
        said = person.hook("proxy", python=python, before="sys.platform = 'darwin'")
        assert "http://far.example/x" in said
        [(path, headers, _)] = proxy.requests
        assert (
            path == "http://far.example/x"
            and headers["Authorization"] == "Basic bWU6c2VjcmV0LXdvcmQ="
        )
        person.hook(
            "direct",
            python=python,
            env={"no_proxy": "far.example", "ASHLR_SESSION_EVENTS_URL": "http://far.example/x"},
        )
        assert len(proxy.requests) == 1


@every_python
def test_emit_without_what_other_systems_lack(python, person):
    """No fork: in the foreground, within 500 ms. No locks, no select on pipes, no parent: still an event."""
    took = "import os; del os.fork; "
    lacks = (
        "",
        "del os.getppid; del os.setsid",
        "sys.modules['fcntl'] = None",
        "import select; select.select = lambda *a: os.close(-1)",
        "del os.killpg; del os.O_NONBLOCK",
    )
    with Odd() as server:
        for n, before in share(enumerate(lacks), python, 2):
            session = "lacks-%d" % n
            person.env["ASHLR_SESSION_EVENTS_URL"] = server.url
            done = person.emit(
                "--wait",
                "20000",
                python=python,
                before=took + (before or "pass"),
                input=json.dumps(HOOKS[0]).encode(),
                env={"CLAUDE_SESSION_ID": session},
            )
            assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
            assert server.sessions().pop() == secret_hash(session), before
        server.answer = lambda n, body: None
        begun = time.monotonic()
        person.emit(python=python, before=took + "pass", input=b'{"session_id": "no-fork"}')
        assert time.monotonic() - begun < 8
        assert [kept["session_id_hash"] for kept in person.kept()] == [secret_hash("no-fork")]
        done = person.emit(
            python=python,
            before="import os; os.fork = lambda: (_ for _ in ()).throw(OSError(11, 'x'))",
        )
        assert done.returncode == 0 and len(person.kept()) == 2 and not person.senders()


def test_emit_of_a_parent_without_a_start_time(person):
    """Where /proc tells nothing, `ps` does; where neither, the text has an empty place."""
    hidden = (
        "import os; real = os.open; os.open = lambda path, *a, **k: "
        "real(b'/nonexistent' if str(path)[:7] == \"b'/proc\" else path, *a, **k)"
    )
    started = subprocess.run(
        ["ps", "-o", "lstart=", "-p", str(os.getpid())],
        stdout=subprocess.PIPE,
        env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
    )
    with Odd() as server:
        for path, start in (
            (os.environ["PATH"], started.stdout.decode().strip()),
            ("/nonexistent", ""),
        ):
            person.emit(
                "--wait",
                "20000",
                before=hidden,
                env={"PATH": path, "ASHLR_SESSION_EVENTS_URL": server.url},
            )
            assert server.sessions().pop() == secret_hash(
                "ppid:%d:%s:%s" % (os.getpid(), start, MACHINE)
            )


def test_emit_survives_200_kills(person):
    """Killed at a random instant, an event that was captured is whole, and arrives with the next good run."""
    moments, captured = random.Random(4), []

    def kill(n):
        session = "kill-%d" % n
        with subprocess.Popen(
            [sys.executable, "-I", "-S", str(EMIT), "--wait", "20000"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**person.env, "CLAUDE_SESSION_ID": session, "ASHLR_TELEMETRY_DEBUG": "1"},
        ) as process:
            said = b""
            if n % 2:  # at some instant after the capture
                said = process.stderr.readline() + process.stderr.readline()
                time.sleep(moments.uniform(0, 0.05))
            else:  # at any
                time.sleep(moments.uniform(0.01, whole))
            process.kill()
            said += process.stderr.read()
            PRINTED.append(said)
            if b"captured" in said:
                captured.append(secret_hash(session))

    with Odd() as server:
        person.env["ASHLR_SESSION_EVENTS_URL"] = server.url
        begun = time.monotonic()
        person.emit("--wait", "20000")
        whole = 2 * (time.monotonic() - begun)  # of a run beside the others
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            list(pool.map(kill, range(200)))
        assert all(
            emit.is_event(json.loads(path.read_text())) for path in person.pending.glob("[0-9]*")
        )
        said = person.hook("after the kills")
        assert all(emit.is_event(json.loads(body)) for _, _, body in server.requests)
        assert set(captured) <= set(server.sessions()) and person.kept() == [], said
        assert len(captured) >= 100


# -- Discoveries -----------------------------------------------------------------------------------


TOOLS = [  # as real hosts send them after a tool, the project being PROJECT
    {
        "session_id": "tool",
        "cwd": "PROJECT",
        "hook_event_name": "PostToolUse",
        "tool_name": "Edit",
        "tool_input": {
            "file_path": "PROJECT/.ashlrcode/genome/sections/discoveries/auth-jwt-flow.md",
            "old_string": "x",
        },
    },
    {
        "session_id": "tool",
        "cwd": "PROJECT/sub",
        "hook_event_name": "PostToolUse",
        "tool_name": "NotebookEdit",
        "tool_input": {"notebook_path": "../.ashlrcode/genome/sections/discoveries/rate.ipynb"},
        "tool_response": {"ok": True},
    },
    {
        "session_id": "tool",
        "cwd": "PROJECT",
        "hook_event_name": "PostToolUse",
        "tool_name": "Grep",
        "tool_input": {
            "pattern": "x",
            "path": "PROJECT/.ashlrcode/genome/sections/discoveries/other-way.md",
        },
    },
    {
        "session_id": "tool",
        "cwd": "PROJECT",
        "hook_event_name": "PostToolUse",
        "tool_name": "Read",
        "tool_input": {"file_path": "PROJECT/src/discoveries.py"},
    },
    {
        "session_id": "tool",
        "cwd": "PROJECT",
        "hook_event_name": "PostToolUse",
        "tool_name": "Bash",
        "tool_input": {"command": "ls"},
    },
    {"session_id": "tool", "cwd": "PROJECT", "tool_input": ["discoveries"]},
]


@every_python
def test_emit_track_and_the_session_it_belongs_to(python, person, tmp_path):
    person.env["CLAUDE_PROJECT_DIR"] = str(tmp_path)
    alias = tmp_path / "alias"
    alias.symlink_to(tmp_path)
    listed = person.ashlr / "session-events" / "touched" / secret_hash("tool")
    for n, tool in enumerate(TOOLS):
        text = json.dumps(tool).replace("PROJECT", str(alias if n == 2 else tmp_path))
        if n == 1:  # any letter may be written so
            text = text.replace("discoveries", "\\u0064iscoverie\\u0073")
        done = person.emit("track", python=python, input=text.encode())
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert listed.read_text().split() == ["auth-jwt-flow", "rate", "other-way"][: n + 1]
    assert str(tmp_path) not in listed.read_text() and listed.stat().st_mode & 0o777 == 0o600
    done = person.emit("track", "by-hand", "rate", python=python, input=b'{"session_id": "tool"}')
    assert done.returncode == 0
    bad = person.emit("track", "ok", "not a slug", python=python)
    assert (bad.returncode, bad.stdout, len(bad.stderr.splitlines())) == (2, "", 1)
    assert "not a slug" not in bad.stderr
    old = person.put("session-events/touched/" + "b" * 64, "x")
    os.utime(str(old), (time.time() - 8 * 86400,) * 2)
    with Odd() as server:
        person.hook("tool", python=python, env={"ASHLR_SESSION_EVENTS_URL": server.url})
        assert json.loads(server.requests[0][2])["discovery_refs"] == [
            "auth-jwt-flow",
            "rate",
            "other-way",
            "by-hand",
        ]
    assert not listed.exists() and not old.exists()
    person.put("machine-id", "")
    for refs, code, said in (
        (("x",), 1, "emit.py: could not be recorded: ~/.ashlr/machine-id is empty: remove it\n"),
        ((), 0, ""),
    ):
        done = person.emit(
            "track",
            *refs,
            python=python,
            input=json.dumps(TOOLS[0]).replace("PROJECT", str(tmp_path)).encode(),
        )
        assert (done.returncode, done.stdout, done.stderr) == (code, "", said)


def test_emit_tracks_many_at_once(person):
    """Tool hooks that run at the same moment lose nothing."""
    env = {**person.env, "CLAUDE_SESSION_ID": "many"}
    hooks = [
        subprocess.Popen([sys.executable, "-I", "-S", str(EMIT), "track", "ref-%d" % n], env=env)
        for n in range(24)
    ]
    assert [process.wait(60) for process in hooks] == [0] * 24
    listed = (person.ashlr / "session-events" / "touched" / secret_hash("many")).read_text().split()
    assert sorted(listed) == sorted("ref-%d" % n for n in range(24))


# -- What the person sees --------------------------------------------------------------------------


@every_python
def test_emit_commands(python, person, tmp_path):
    person.env.pop("ASHLR_TELEMETRY")
    person.env["ASHLR_SESSION_EVENTS_URL"] = "http://127.0.0.1:9/x?key=hidden-key"
    SECRETS.add("hidden-key")
    config = person.put("config.json", '{"theme": "dark", "n": [1.5, {"é": null}]}')
    config.chmod(0o640)

    def status():
        done = person.emit("status", "--json", python=python)
        assert done.returncode == 0
        return json.loads(done.stdout)

    assert status() == {
        "consent": {"on": False, "decided_by": "nobody said yes (emit.py on does)"},
        "endpoint": {"url": "http://127.0.0.1:9/x?...", "decided_by": "ASHLR_SESSION_EVENTS_URL"},
        "waiting": {"events": 0, "since": None},
        "last_flush": None,
    }
    on = person.emit("on", python=python)
    assert (
        on.returncode == 0
        and len(on.stdout.splitlines()) == 4
        and "http://127.0.0.1:9/x?..." in on.stdout
    )
    assert json.loads(config.read_text()) == {
        "theme": "dark",
        "n": [1.5, {"é": None}],
        "telemetry": "opt-in",
    }
    assert config.stat().st_mode & 0o777 == 0o640
    assert person.emit("on", python=python).stdout == "on, as before\n"
    person.hook("status", python=python)
    assert status()["consent"]["on"] and status()["waiting"]["events"] == 1
    assert "without an answer" in status()["last_flush"]["result"]
    text = person.emit("status", python=python).stdout
    assert "opt-in" in text and "events: 1, since 20" in text and "without an answer" in text

    before = sorted((path, path.stat().st_mtime) for path in person.home.rglob("*"))
    shown = person.emit(
        "show",
        python=python,
        recorded=False,
        env={"CLAUDE_SESSION_ID": "status"},
        stdin=subprocess.DEVNULL,
    )
    kept = person.kept()[0]
    assert {**json.loads(shown.stdout), "ended_at": ""} == {
        **kept,
        "ended_at": "",
    } and "127.0.0.1:9/x" in shown.stderr
    assert sorted((path, path.stat().st_mtime) for path in person.home.rglob("*")) == before

    off = person.emit("off", python=python)
    assert (
        off.returncode == 0
        and person.kept() == []
        and json.loads(config.read_text())["telemetry"] == "off"
    )
    assert "still off" in person.emit("on", python=python, env={"DO_NOT_TRACK": "1"}).stderr
    for text in ("{", "[]", '{"n": 1e999}', ""):
        config.write_text(text)
        done = person.emit("off", python=python)
        assert (
            done.returncode == 1
            and len(done.stderr.splitlines()) == 1
            and config.read_text() == text
        )
    for args in (("status", "x"), ("show", "x"), ("on", "x"), ("off", "--json"), ("bogus",)):
        done = person.emit(*args, python=python)
        assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    fresh = Person(tmp_path / "fresh", ASHLR_TELEMETRY="")
    (fresh.ashlr / "machine-id").unlink()
    assert (
        "passing"
        in fresh.emit("show", python=python, recorded=False, stdin=subprocess.DEVNULL).stderr
    )
    assert list(fresh.ashlr.iterdir()) == []
    done = fresh.emit("--help", python=python)
    assert done.returncode == 0 and "example:" in done.stdout


@every_python
def test_emit_makes_one_machine_id(python, person):
    """50 first sessions at once agree on one name, and nobody overwrites it."""
    (person.ashlr / "machine-id").unlink()
    with Odd() as server:
        person.env["ASHLR_SESSION_EVENTS_URL"] = server.url
        hooks = [
            subprocess.Popen(
                [python, "-I", "-S", str(EMIT), "--wait", "20000"],
                stdin=subprocess.DEVNULL,
                env={**person.env, "CLAUDE_SESSION_ID": "first-%d" % n},
            )
            for n in range(6)
        ]
        assert [process.wait(60) for process in hooks] == [0] * 6
        person.hook("first-7")
        machine = (person.ashlr / "machine-id").read_text()
        SECRETS.add(machine)
        assert (
            re.fullmatch(r"[0-9a-f-]{36}", machine)
            and (person.ashlr / "machine-id").stat().st_mode & 0o777 == 0o600
        )
        bodies = [json.loads(body) for _, _, body in server.requests]
        assert len(bodies) == 7 and {body["identity_hash"] for body in bodies} == {
            secret_hash(machine + emit.salt(emit.instant(body["ended_at"]))) for body in bodies
        }


def test_emit_of_50_sessions_at_once_leaves_no_process_and_loses_no_event(crowd):
    people, _, silent, when_gone = crowd
    assert when_gone() < 25  # s; a sender lives for 20
    silent.answer = lambda n, body: (202, {})
    del silent.requests[:]
    for n, person in enumerate(people):
        assert "answered 202" in person.hook(
            "crowd-again-%d" % n, env={"ASHLR_SESSION_EVENTS_URL": silent.url}
        )
    assert set(silent.sessions()) == {secret_hash("crowd-%d" % n) for n in range(51)} | {
        secret_hash("crowd-again-0"),
        secret_hash("crowd-again-1"),
    }


# ==================================================================================================
# server.py
# ==================================================================================================

# -- The event check -------------------------------------------------------------------------------

HEX = EVENT["identity_hash"]
SLUG = "must be a slug: 1 to 128 of A-Z a-z 0-9 . _ : -, the first a letter or digit"
ABSENT = object()
GOOD = [  # (field, value sent, value stored): CONTRACT §1, each row with its edges
    ("identity_hash", HEX, HEX),
    ("github_hash", HEX, HEX),
    ("github_hash", None, None),
    ("github_hash", ABSENT, None),
    ("session_id_hash", HEX, HEX),
    *[("ended_at", *pair) for pair in VECTORS["ended_at"]],
    ("ended_at", "0001-01-01T00:00:00Z", "0001-01-01T00:00:00.000Z"),
    ("ended_at", "2024-02-29T23:59:59.9999-00:00", "2024-02-29T23:59:59.999Z"),
    ("tool_count", 0, 0),
    ("tool_count", 1_000_000, 1_000_000),
    ("tool_count", 5.0, 5),
    ("tool_count", -0.0, 0),
    ("tokens_saved", 0, 0),
    ("tokens_saved", 1_000_000_000, 1_000_000_000),
    ("tokens_saved", 1e9, 1_000_000_000),
    ("branch_sha", "abc1234", "abc1234"),
    ("branch_sha", "ABCDEF0" * 5, "abcdef0" * 5),
    ("branch_sha", None, None),
    ("branch_sha", ABSENT, None),
    ("branch_sha", "0" * 40, "0" * 40),
    ("discovery_refs", [], "[]"),
    ("discovery_refs", ABSENT, "[]"),
    ("discovery_refs", ["b", "a", "b"], '["b","a","b"]'),
    ("discovery_refs", ["0" * 128], '["%s"]' % ("0" * 128)),
    ("discovery_refs", ["A.b_c:d-9"] * 200, None),
    ("plugin_version", "1", "1"),
    ("plugin_version", "1.2.3-rc.1+b_" + "9" * 51, "1.2.3-rc.1+b_" + "9" * 51),
]
BAD = [  # (field, value sent)
    *[
        ("identity_hash", bad)
        for bad in (
            None,
            "",
            5,
            True,
            [HEX],
            HEX[1:],
            HEX + "0",
            HEX.upper(),
            HEX + "\n",
            "g" + HEX[1:],
            HEX[:-1] + "٣",
            ABSENT,
        )
    ],
    *[("github_hash", bad) for bad in ("", False, HEX + "\n", {}, "\ud800")],
    *[("session_id_hash", bad) for bad in (None, HEX[1:], ABSENT)],
    *[("ended_at", bad) for bad in VECTORS["ended_at_refused"]],
    *[
        ("ended_at", bad)
        for bad in (
            None,
            1779453296,
            ABSENT,
            "2026-05-22T24:00:00Z",
            "2026-05-22T12:60:00Z",
            "2026-05-22T12:00:60Z",
            "0000-01-01T00:00:00Z",
            "0001-01-01T00:00:00+00:01",
            "9999-12-31T23:59:59-00:01",
            "2026-05-22T12:34:56.Z",
            "2026-05-22T12:34:56,5Z",
            "2026-05-22T12:34:56+0200",
            "2026-05-22T12:34Z",
            "2025-02-29T00:00:00Z",
            "2026-05-22T12:34:56z",
            " 2026-05-22T12:34:56Z",
            "2026-05-22T12:34:5٦Z",
        )
    ],
    *[
        ("tool_count", bad)
        for bad in (True, False, None, -1, 1_000_001, 5.5, "5", [5], 10**400, ABSENT)
    ],
    *[("tokens_saved", bad) for bad in (True, -1, 1_000_000_001, 0.1, ABSENT)],
    *[("branch_sha", bad) for bad in ("", "abc123", "a" * 41, "abcdefg", 1234567, "abc1234\n")],
    *[("discovery_refs", bad) for bad in (None, "a", {}, ["a"] * 201)],
    *[
        ("plugin_version", bad)
        for bad in ("", None, 1, "-1", "1" * 65, "1.0 beta", "1.0\n", "v/1", ABSENT)
    ],
]
NOT_JSON = [
    b"",
    b" ",
    b"{",
    b"{}}",
    b"nope",
    b'{"a":NaN}',
    b'{"a":Infinity}',
    b"[-Infinity]",
    b"\xff\xfe{\x00}\x00",
    "{}".encode("utf-16"),
    "{}".encode("utf-32"),
    b"\xef\xbb\xbf{}",
    b'{"a":"\xff"}',
    b'{"a":"\xed\xa0\x80"}',
    b"[" * 30000,
    b'{"a":' * 10000,
    b"'{}'",
    b'{"a":01}',
    b'{"a":"\n"}',
]
NO_EVENT = [
    b"[]",
    b"null",
    b"1",
    b'"text"',
    b"true",
    b"[{}]",
    b"1" * 5000,
    b"-" + b"9" * 20000,
    b"1e400",
]


def with_field(field, value):
    """A valid event with one field set, or taken away."""
    changed = dict(EVENT, **{field: value})
    if value is ABSENT:
        del changed[field]
    return changed


def as_sent(value, **options):
    """JSON as clients write it."""
    return json.dumps(value, **options).encode("utf-8", "surrogatepass")


@pytest.mark.parametrize(("field", "value", "stored"), GOOD)
def test_server_event_check_takes(field, value, stored):
    stored = (
        json.dumps(value, separators=(",", ":"))
        if stored is None and field == "discovery_refs"
        else stored
    )
    column = server.COLUMNS.index("discovery_refs_json" if field == "discovery_refs" else field)
    short = server.judge(as_sent(with_field(field, value), separators=(",", ":")))
    spaced = server.judge(as_sent(with_field(field, value), indent=1))
    assert short == spaced and type(short) is tuple
    assert short[column] == stored


@pytest.mark.parametrize(("field", "value"), BAD)
def test_server_event_check_refuses(field, value):
    for options in ({"separators": (",", ":")}, {"indent": 1}, {"ensure_ascii": False}):
        answer = server.judge(as_sent(with_field(field, value), **options))
        if isinstance(value, str) and "\ud800" in value and options.get("ensure_ascii") is False:
            assert answer.status == 400  # a lone surrogate is no UTF-8
            continue
        told = json.loads(answer.payload)
        assert answer.status == 400 and told["error"] == "Validation failed"
        assert [issue["path"] for issue in told["issues"]] == [[field]]
        assert (told["issues"][0]["message"] == "is required") == (value is ABSENT)


def test_server_event_check_names_every_fault_and_no_value():
    wrong = dict(
        EVENT, identity_hash="SECRET-1", tool_count="SECRET-2", discovery_refs=["ok", "SECRET 3", 5]
    )
    del wrong["ended_at"]
    wrong.update({"note": "SECRET-4", "SECRET key": 1})
    answer = server.judge(as_sent(wrong))
    told = json.loads(answer.payload)["issues"]
    assert [issue["path"] for issue in told] == [
        ["identity_hash"],
        ["ended_at"],
        ["tool_count"],
        ["discovery_refs", 1],
        ["discovery_refs", 2],
        ["note"],
        [],
    ]
    assert b"SECRET" not in answer.payload
    many = server.judge(as_sent(dict.fromkeys(map(str, range(9000)), 1)))
    assert len(many.payload) < 16384 and b"8900 more unknown keys" in many.payload


@pytest.mark.parametrize("body", NOT_JSON, ids=lambda body: repr(body[:20]))
def test_server_event_check_not_json(body):
    assert server.judge(body)[:2] == (400, b'{"error":"Invalid JSON body"}')


@pytest.mark.parametrize("body", NO_EVENT, ids=lambda body: repr(body[:20]))
def test_server_event_check_no_event(body):
    assert json.loads(server.judge(body).payload)["issues"] == [
        {"path": [], "message": "must be a JSON object"}
    ]


def test_server_short_check_is_the_long_one_sooner():
    """Of whatever canonical_row takes, check_event makes the same row: seeded mutations of an event."""
    rng, taken = random.Random(5), 0
    body = as_sent(EVENT, separators=(",", ":"))
    alphabet = b'0123456789abcfzTZ",:{}[]-+._ e' + bytes([0x80, 0xFF])
    for _ in range(20000):
        mutant = bytearray(body)
        for _ in range(rng.choice((1, 1, 2, 4))):
            mutant[rng.randrange(len(mutant))] = rng.choice(alphabet)
        row = server.canonical_row(bytes(mutant))
        if row is not None:
            taken += 1
            assert row == server.check_event(server.parse_json(bytes(mutant)))
    assert taken > 1000
    for year, month, day in itertools.product(
        ("0000", "0001", "1900", "2024", "9999"), range(14), range(33)
    ):
        if (month, day) != (2, 29):  # which goes the long way
            same_check("%s-%02d-%02dT23:59:59.999Z" % (year, month, day))
    for moment in ("24:00:00.000", "23:60:00.000", "23:59:60.000", "19:59:59.000", "00:00:00.000"):
        same_check("2026-05-22T%sZ" % moment)


def same_check(moment):
    body = as_sent(dict(EVENT, ended_at=moment), separators=(",", ":"))
    try:
        expected = server.check_event(server.parse_json(body))
    except server.NotAnEvent:
        expected = None
    assert server.canonical_row(body) == expected, moment


# -- The store -------------------------------------------------------------------------------------

OTHER_PROGRAM = """
    CREATE TABLE session_events (received_at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%SZ', 'now')),
      id INTEGER PRIMARY KEY AUTOINCREMENT, identity_hash TEXT NOT NULL, github_hash TEXT,
      session_id_hash TEXT NOT NULL, ended_at TEXT NOT NULL, tool_count INTEGER NOT NULL DEFAULT 0,
      tokens_saved INTEGER NOT NULL DEFAULT 0, branch_sha TEXT, discovery_refs_json TEXT NOT NULL DEFAULT '[]',
      plugin_version TEXT NOT NULL);
    CREATE UNIQUE INDEX idx_session_events_identity_session_unique ON session_events (identity_hash, session_id_hash);
    CREATE INDEX idx_session_events_identity_ended_at ON session_events (identity_hash, ended_at);
    CREATE INDEX idx_session_events_received_at ON session_events (received_at);
"""


def rows_of(db, query="SELECT * FROM session_events ORDER BY id"):
    with contextlib.closing(sqlite3.connect(str(db))) as connection:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute(query)]


def insert_rows(db, refs):
    """A row by hand for each text of refs, as some other program would."""
    with contextlib.closing(sqlite3.connect(str(db))) as connection, connection:
        connection.executemany(
            "INSERT INTO session_events (identity_hash, session_id_hash, ended_at, discovery_refs_json, plugin_version)"
            " VALUES ('i', ?, '2026-01-01T00:00:00.000Z', ?, '1')",
            list(enumerate(refs)),
        )


def edges(db):
    return [
        tuple(row.values())
        for row in rows_of(db, "SELECT * FROM session_discoveries ORDER BY 2, 1")
    ]


def test_server_schema_file_is_the_servers_to_the_letter():
    assert (ROOT / "schema.sql").read_text(encoding="utf-8") == server.SCHEMA


def test_server_migration_of_a_file_that_another_program_made(tmp_path):
    db = tmp_path / "other.db"
    with contextlib.closing(sqlite3.connect(str(db))) as connection:
        connection.executescript(OTHER_PROGRAM)
    insert_rows(db, ['["a","b","a"]', "[]", "no json", '{"k":["c"]}', '[1,"d",null]', ""])
    before = rows_of(db)
    for _ in range(2):  # opening twice changes nothing
        server.Store(str(db)).close()
        assert rows_of(db) == before
        assert edges(db) == [("a", 1), ("b", 1), ("d", 5)]
        assert rows_of(db, "PRAGMA user_version") == [{"user_version": server.SCHEMA_VERSION}]
    names = {row["name"] for row in rows_of(db, "SELECT name FROM sqlite_master")}
    assert {"idx_session_events_ended_at", "session_discoveries"} <= names


def test_server_migration_of_fresh_older_and_emptied_files(tmp_path):
    """A file of any age ends with the tables, indexes and triggers that a fresh one gets."""
    made = {}
    without_edges = server.SCHEMA.split("CREATE TABLE IF NOT EXISTS session_discoveries")[0]
    for name, script in (("fresh", None), ("empty", ""), ("older", without_edges)):
        db = tmp_path / (name + ".db")
        if script is not None:
            with contextlib.closing(sqlite3.connect(str(db))) as connection:
                connection.executescript(script)
        server.Store(str(db)).close()
        made[name] = {
            row["name"]: row["sql"] for row in rows_of(db, "SELECT name, sql FROM sqlite_master")
        }
    assert made["fresh"] == made["empty"] == made["older"]
    assert server.Store(":memory:").db.execute(
        "SELECT count(*) FROM session_events"
    ).fetchone() == (0,)


def test_server_edges_follow_the_rows_whoever_writes(tmp_path):
    db = tmp_path / "events.db"
    server.Store(str(db)).close()
    insert_rows(db, ['["a","b","a"]', "[]", '["b"]'])
    assert edges(db) == [("a", 1), ("b", 1), ("b", 3)]
    with contextlib.closing(sqlite3.connect(str(db))) as connection, connection:
        connection.execute(
            "INSERT OR REPLACE INTO session_events SELECT 9, 'j', github_hash, 's', ended_at, 0, 0,"
            " NULL, '[\"x\",\"x\"]', '1', received_at FROM session_events WHERE id = 1"
        )
        connection.execute("DELETE FROM session_events WHERE id = 1")
        with pytest.raises(sqlite3.OperationalError):
            connection.execute(
                "INSERT INTO session_events (identity_hash, session_id_hash, ended_at, plugin_version,"
                " discovery_refs_json) VALUES ('k', 'k', '', '', 'no json')"
            )
    assert edges(db) == [("b", 3), ("x", 9)]


def test_server_a_row_that_the_database_refuses_takes_no_other_with_it(tmp_path):
    store = server.Store(str(tmp_path / "events.db"))
    rows = [server.check_event(event(n)) for n in range(5)]
    rows[2] = (*rows[2][:3], None, *rows[2][4:])  # NOT NULL
    rows[3] = (*rows[3][:2], "\ud800", *rows[3][3:])  # no UTF-8
    written = store.write(rows)
    assert written.stored == 3 and sorted(written.refused) == [2, 3]
    assert store.write(rows[:2]) == (0, {}, 0)
    assert store.db.execute(
        "SELECT count(*), max(length(received_at)) FROM session_events"
    ).fetchone() == (3, 20)
    assert store.db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    assert store.db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    store.close()


def test_server_database_and_side_files_are_the_owners_only(tmp_path):
    db = tmp_path / "events.db"
    old = os.umask(0)
    (tmp_path / "link").symlink_to(db)
    try:
        with serving(tmp_path / "link") as running:
            assert post(running, event(1)).status == 202
            assert {p.name: p.stat().st_mode & 0o777 for p in tmp_path.glob("events*")} == {
                "events.db": 0o600,
                "events.db-wal": 0o600,
                "events.db-shm": 0o600,
            }
    finally:
        os.umask(old)
    assert [p.name for p in tmp_path.glob("events*")] == ["events.db"]  # checkpointed and closed


# -- HTTP over real sockets ------------------------------------------------------------------------

Reply = collections.namedtuple("Reply", "status headers body")


class Wire:
    """A plain socket to a server, and the answers that come out of it."""

    def __init__(self, running, source=None):
        self.sock = socket.create_connection((running.host, running.port), 30)
        self.file = self.sock.makefile("rb")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()
        self.sock.close()

    def send(self, data):
        """Send, and say whether the other side still took it."""
        try:
            self.sock.sendall(data)
        except OSError:
            return False
        return True

    def reply(self, bodiless=False):
        """The next answer; None when the connection ended before one."""
        try:
            first = self.file.readline()
            if not first:
                return None
            headers = {}
            for line in iter(self.file.readline, b"\r\n"):
                name, _, value = line.decode("latin-1").partition(":")
                headers[name.lower()] = value.strip()
            length = 0 if bodiless else int(headers.get("content-length", 0))
            return Reply(int(first.split()[1]), headers, self.file.read(length))
        except ConnectionError:
            return None


def request(body=None, method="POST", target="/v1/session-events", headers=(), version="HTTP/1.1"):
    """The bytes of a request; with a body comes its length."""
    lines = ["%s %s %s" % (method, target, version), "Host: localhost", *headers]
    if body is not None:
        lines.append("Content-Length: %d" % len(body))
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + (body or b"")


def post(running, value, **options):
    """One event on a connection of its own."""
    with Wire(running) as wire:
        wire.send(request(as_sent(value, separators=(",", ":")), **options))
        return wire.reply()


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A server process that many tests use."""
    with serving(tmp_path_factory.mktemp("one") / "events.db") as running:
        yield running


OK_BODY, BODY = b'{"ok":true}', as_sent(event("http"), separators=(",", ":"))
PADDED = BODY[:-1] + b" " * (65536 - len(BODY)) + b"}"
BARE = b"POST /v1/session-events HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n" % len(BODY)
ANSWERS = {  # name: (request, status, body or None, whether the connection stays)
    "event": (request(BODY), 202, OK_BODY, True),
    "event again": (request(BODY), 202, OK_BODY, True),
    "event of 64 KiB": (request(PADDED), 202, OK_BODY, True),
    "any content type": (request(BODY, headers=["Content-Type: text/plain"]), 202, OK_BODY, True),
    "close": (request(BODY, headers=["Connection: Keep-Alive, CLOSE"]), 202, OK_BODY, False),
    "HTTP/1.0": (request(BODY, version="HTTP/1.0"), 202, OK_BODY, False),
    "a query": (request(BODY, target="/v1/session-events?a=b"), 202, OK_BODY, True),
    "absolute form": (
        request(BODY, target="http://elsewhere/v1/session-events"),
        202,
        OK_BODY,
        True,
    ),
    "an empty line before": (b"\r\n" + request(BODY), 202, OK_BODY, True),
    "not JSON": (request(b"nope"), 400, b'{"error":"Invalid JSON body"}', True),
    "no event": (request(b"[]"), 400, None, True),
    "no body": (request(b""), 400, b'{"error":"Invalid JSON body"}', True),
    "over 64 KiB": (request(PADDED + b" "), 413, None, False),
    "a length beyond reason": (
        BARE.replace(b"%d" % len(BODY), b"9" * 400) + b"\r\n",
        400,
        None,
        False,
    ),
    "no length": (request(), 411, None, False),
    "chunked": (request(headers=["Transfer-Encoding: chunked"]) + b"0\r\n\r\n", 411, None, False),
    "long head": (request(BODY, headers=["X-Long: " + "x" * 17000]), 431, None, False),
    "many headers": (request(BODY, headers=["X-%d: y" % n for n in range(120)]), 431, None, False),
    "unknown path": (
        request(BODY, target="/v1/session-events/"),
        404,
        b'{"error":"Not found"}',
        True,
    ),
    "two slashes": (
        request(BODY, target="//v1/session-events"),
        404,
        b'{"error":"Not found"}',
        True,
    ),
    "other method": (request(BODY, method="PUT"), 405, None, True),
    "made-up method": (request(method="BREW"), 405, None, True),
    "GET of the endpoint": (request(method="GET"), 405, None, True),
    "OPTIONS": (request(method="OPTIONS"), 405, None, True),
    "POST to health": (request(b"", target="/healthz"), 405, None, True),
    "health": (request(method="GET", target="/healthz"), 200, OK_BODY, True),
    "readiness": (request(method="GET", target="/readyz"), 200, OK_BODY, True),
    "HEAD": (request(method="HEAD", target="/healthz"), 200, b"", True),
    "HEAD of nothing": (request(method="HEAD", target="/nothing"), 404, b"", True),
    "other expectation": (request(BODY, headers=["Expect: 200-ok"]), 417, None, False),
    "two lengths": (BARE + b"Content-Length: 5\r\n\r\n" + BODY, 400, None, False),
    "one length twice": (BARE + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY, 400, None, False),
    "a list of lengths": (BARE.replace(b"h: ", b"h: 5, ") + b"\r\n" + BODY, 400, None, False),
    "a signed length": (BARE.replace(b"h: ", b"h: +") + b"\r\n" + BODY, 400, None, False),
    "a hex length": (BARE.replace(b"h: ", b"h: 0x") + b"\r\n" + BODY, 400, None, False),
    "an empty length": (
        BARE.replace(b"h: %d" % len(BODY), b"h:") + b"\r\n" + BODY,
        400,
        None,
        False,
    ),
    "length and chunked": (BARE + b"Transfer-Encoding: chunked\r\n\r\n" + BODY, 400, None, False),
    "two hosts": (BARE + b"Host: other\r\n\r\n" + BODY, 400, None, False),
    "blank before the colon": (
        BARE.replace(b"Length:", b"Length :") + b"\r\n" + BODY,
        400,
        None,
        False,
    ),
    "blank in front": (BARE + b" X-Folded: y\r\n\r\n" + BODY, 400, None, False),
    "no colon": (BARE + b"X-Nothing\r\n\r\n" + BODY, 400, None, False),
    "no name": (BARE + b": y\r\n\r\n" + BODY, 400, None, False),
    "bare LF": (BARE.replace(b"\r\n", b"\n") + b"\n" + BODY, 400, None, False),
    "one bare LF": (BARE + b"X-A: y\nX-B: z\r\n\r\n" + BODY, 400, None, False),
    "bare CR": (BARE + b"X-A: y\rX-B: z\r\n\r\n" + BODY, 400, None, False),
    "NUL": (BARE + b"X-A: \0\r\n\r\n" + BODY, 400, None, False),
    "HTTP/0.9": (b"GET /healthz\r\n\r\n", 400, None, False),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, None, False),
    "two blanks": (b"GET  /healthz HTTP/1.1\r\n\r\n", 400, None, False),
    "small letters": (b"GET /healthz http/1.1\r\n\r\n", 400, None, False),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, None, False),
}
HEALTH = request(method="GET", target="/healthz")


def in_pieces(data):
    """Byte by byte, or, where that is thousands, in pieces of an odd size."""
    step = 1 if len(data) < 2000 else 997
    return [data[i : i + step] for i in range(0, len(data), step)]


@pytest.mark.parametrize("way", ["whole", "byte by byte", "with another behind"])
@pytest.mark.parametrize("name", ANSWERS)
def test_server_http_answers(one, name, way):
    data, status, body, stays = ANSWERS[name]
    with Wire(one) as wire:
        wire.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in (
            [data]
            if way == "whole"
            else in_pieces(data)
            if way == "byte by byte"
            else [data + HEALTH]
        ):
            if not wire.send(piece):
                break
        reply = wire.reply(bodiless=name.startswith("HEAD"))
        assert reply.status == status
        assert body is None or reply.body == body
        if status >= 400 and reply.body:
            assert set(json.loads(reply.body)) <= {"error", "issues"}
        assert (
            reply.headers["content-type"] == "application/json"
            and reply.headers["cache-control"] == "no-store"
        )
        assert (
            reply.headers["server"] == "session-events"
            and "access-control-allow-origin" not in reply.headers
        )
        assert ("allow" in reply.headers) == (status == 405)
        assert (reply.headers.get("connection") == "close") == (not stays)
        if stays and way != "with another behind":
            wire.send(HEALTH)
        after = wire.reply()
        assert (after.status, after.body) == (200, OK_BODY) if stays else after is None


def test_server_http_paths_give_the_same_answers(one):
    """The short path and the general one (a query leads there), with the same bodies: the same but for the date."""

    def answer(target, body):
        with Wire(one) as wire:
            wire.send(request(body, target=target))
            reply = wire.reply()
            return reply._replace(headers={**reply.headers, "date": ""})

    bodies = [as_sent(with_field(*case[:2])) for case in GOOD + BAD] + NOT_JSON + NO_EVENT
    for body in bodies:
        assert answer("/v1/session-events", body) == answer("/v1/session-events?", body)


def test_server_http_expect_continue(one):
    with Wire(one) as wire:
        wire.send(request(BODY, headers=["Expect: 100-Continue"])[: -len(BODY)])
        assert wire.reply().status == 100
        wire.send(
            BODY + request(BODY, headers=["Expect: 100-continue"]) + HEALTH
        )  # what is there is not asked for
        assert [wire.reply().status for _ in range(3)] == [202, 202, 200]
    with Wire(one) as wire:  # refused before the body is sent
        wire.send(request(b" " * 65537, headers=["Expect: 100-continue"])[:200])
        assert wire.reply().status == 413


def test_server_http_pipeline_is_answered_in_order(one):
    with Wire(one) as wire:
        bodies = [as_sent(event(("pipeline", n))) if n % 3 else b"nope" for n in range(300)]
        wire.send(b"".join(map(request, bodies)))
        assert [wire.reply().status for _ in bodies] == [202 if n % 3 else 400 for n in range(300)]
    assert post(one, event(("pipeline", 1))).body == OK_BODY
    stored = rows_of(
        one.db, "SELECT count(*) AS n, count(DISTINCT session_id_hash) AS d FROM session_events"
    )[0]
    assert stored["n"] == stored["d"]


def test_server_http_half_closed_client_gets_its_answers(one):
    for count in (1, 40, 100):
        with Wire(one) as wire:
            wire.send(request(BODY) * count)
            wire.sock.shutdown(socket.SHUT_WR)
            assert [wire.reply().status for _ in range(count)] == [
                202
            ] * count and wire.reply() is None


def test_server_http_refused_client_that_goes_on_sending_reads_why(one):
    """A close at once would reset the connection under it, answer and all; and it does not go on for ever."""
    with Wire(one) as wire:
        assert wire.send(request(bytes(2 << 20)))
        assert wire.reply().status == 413
        while wire.send(b"x" * 1000):
            assert not select.select([], [], [], 0.01)[0]


def test_server_http_hostile_head_takes_no_time():
    """Blanks and a fault at their end, which a careless pattern tries to split in every way: 13 s for these, once."""
    started = time.perf_counter()
    for n in range(15):
        with pytest.raises(server.Refused):
            server.parse_head(b"GET / HTTP/1.1\r\nA%d:" % n + b" " * 16000 + b"\0")
    assert time.perf_counter() - started < 5


# -- The process -----------------------------------------------------------------------------------

PYTHONS = interpreters((3, 8))


@pytest.mark.parametrize("version", PYTHONS, ids="%d.%d".__mod__)
def test_server_alone_in_a_folder(tmp_path, version):
    """With nothing else there, on each Python: an event in, a row out, SIGTERM or Ctrl-C, exit 0 within 5 s."""
    python = PYTHONS[version]
    shutil.copy(ROOT / "server.py", tmp_path)
    for n, signum in enumerate((signal.SIGTERM, signal.SIGINT)):
        running = Server(tmp_path / "events.db", python=python, script=tmp_path / "server.py")
        assert post(running, event(n)).status == 202
        started = time.monotonic()
        assert running.stop(signum) == 0 and time.monotonic() - started < 5
        assert running.errors == []
    assert [
        (row["tool_count"], row["discovery_refs_json"]) for row in rows_of(tmp_path / "events.db")
    ] == [(42, '["auth-jwt-flow","rate-limit-buckets"]')] * 2
    assert not (tmp_path / "events.db-wal").exists()


def test_server_ends_while_a_client_is_halfway(tmp_path):
    """A kept connection is told, a half-sent request is waited for, and the end comes all the same."""
    running = Server(tmp_path / "events.db")
    with Wire(running) as kept, Wire(running) as halfway:
        kept.send(request(as_sent(event(1))))
        assert kept.reply().status == 202
        halfway.send(request(as_sent(event(2)))[:-10])
        assert post(running, event(3)).status == 202  # so that the half request is read
        running.process.send_signal(signal.SIGTERM)
        refused_at = time.monotonic() + 30
        while time.monotonic() < refused_at:  # until it accepts no more
            try:
                Wire(running).__exit__()
            except ConnectionError:
                break
        halfway.send(request(as_sent(event(2)))[-10:])
        reply = halfway.reply()
        assert reply.status == 202 and reply.headers["connection"] == "close"
        assert running.stop() == 0
    assert len(rows_of(tmp_path / "events.db")) == 3


def start_faults(folder):
    """Command lines that cannot work, and what the one line says."""
    (folder / "text.db").write_text("this is no database, and long enough to be seen as none" * 100)
    with contextlib.closing(sqlite3.connect(str(folder / "newer.db"))) as connection:
        connection.execute("PRAGMA user_version = 99")
    with contextlib.closing(sqlite3.connect(str(folder / "other.db"))) as connection:
        connection.execute("CREATE TABLE session_events (id INTEGER PRIMARY KEY, name TEXT)")
    with contextlib.closing(sqlite3.connect(str(folder / "half.db"))) as connection:
        connection.executescript(OTHER_PROGRAM + "PRAGMA user_version = 1")
    with contextlib.closing(sqlite3.connect(str(folder / "twice.db"))) as connection:
        connection.executescript(OTHER_PROGRAM.replace("CREATE UNIQUE INDEX", "-- "))
        connection.executescript(
            "INSERT INTO session_events (identity_hash, session_id_hash, ended_at, plugin_version)"
            " VALUES ('i', 's', '', ''), ('i', 's', '', '')"
        )
    (folder / "open.pepper").write_text("x" * 64)
    (folder / "open.pepper").chmod(0o644)
    taken = socket.create_server(("127.0.0.1", 0))
    fresh = folder / "fresh.db"
    return taken, {
        "port taken": (["--db", fresh, "--port", taken.getsockname()[1]], "Address already in use"),
        "no such host": (["--db", fresh, "--host", "256.0.0.1"], "cannot listen on 256.0.0.1"),
        "no such folder": (["--db", folder / "missing" / "events.db"], "No such file or directory"),
        "a folder": (["--db", folder], "unable to open"),
        "not writable": (["--db", "/proc/events.db"], "cannot use /proc/events.db"),
        "not a database": (["--db", folder / "text.db"], "not a database"),
        "newer schema": (["--db", folder / "newer.db"], "schema version 99"),
        "other table": (["--db", folder / "other.db"], "not this program's"),
        "half a schema": (["--db", folder / "half.db"], "idx_session_events_ended_at is missing"),
        "the same event twice": (["--db", folder / "twice.db"], "UNIQUE constraint failed"),
        "readable pepper": (["--db", fresh, "--pepper-file", folder / "open.pepper"], "chmod 600"),
        "no certificate": (
            ["--db", fresh, "--tls-cert", folder / "no", "--tls-key", folder / "no"],
            "TLS files",
        ),
    }


def test_server_that_cannot_start_says_why_in_one_line(tmp_path):
    taken, cases = start_faults(tmp_path)
    other, twice = (
        (tmp_path / "other.db").read_bytes(),
        rows_of(tmp_path / "twice.db", "SELECT * FROM sqlite_master"),
    )
    with taken:
        for name, (flags, words) in cases.items():
            done = run([sys.executable, ROOT / "server.py", "--port", 0, *flags])
            assert (done.returncode, done.stdout) == (2, ""), name
            assert (
                done.stderr.count("\n") == 1
                and done.stderr.startswith("server.py: ")
                and words in done.stderr
            ), name
    assert (tmp_path / "other.db").read_bytes() == other, "what is refused is left as it was"
    assert rows_of(tmp_path / "twice.db", "SELECT * FROM sqlite_master") == twice
    for flags in (
        ["--port", "70000"],
        ["--rate", "5/week"],
        ["--rate", "9" * 400 + "/s"],
        ["--retain-days", "0"],
        ["--trusted-proxy", "10.0.0.0/99"],
        [],
    ):
        done = run(
            [
                sys.executable,
                ROOT / "server.py",
                *(["--db", tmp_path / "x.db"] if flags else []),
                *flags,
            ]
        )
        assert (
            done.returncode == 2
            and "Traceback" not in done.stderr
            and "server.py: error: " in done.stderr
        )


def test_server_running_for_fixtures(tmp_path):
    """Several at once in one process, in memory and on disk; what is stored comes back as Python data."""
    with contextlib.ExitStack() as stack:
        started = time.monotonic()
        several = [stack.enter_context(server.running()) for _ in range(5)]
        assert time.monotonic() - started < 5
        on_disk = stack.enter_context(server.running(str(tmp_path / "events.db")))
        for n, running in enumerate([*several, on_disk]):
            for m in range(n):
                with urllib.request.urlopen(
                    running.url, as_sent(event((n, m), tool_count=m)), timeout=30
                ) as reply:
                    assert (reply.status, reply.read()) == (202, OK_BODY)
        for n, running in enumerate([*several, on_disk]):
            stored = running.events()
            assert [row["tool_count"] for row in stored] == list(range(n))
            assert all(
                row["discovery_refs"] == EVENT["discovery_refs"] and row["id"] for row in stored
            )
        on_disk.stop()
        on_disk.stop()
        with pytest.raises(RuntimeError):
            on_disk.events()
    assert len(rows_of(tmp_path / "events.db")) == 5


def test_server_running_says_what_it_cannot_read(tmp_path):
    """Whoever asks gets an answer or an exception, also beside stop(), and also of odd rows."""
    with contextlib.closing(sqlite3.connect(str(tmp_path / "other.db"))) as connection:
        connection.executescript(OTHER_PROGRAM)
    insert_rows(tmp_path / "other.db", ["no json"])
    with server.running(str(tmp_path / "other.db")) as running:
        with pytest.raises(ValueError):
            running.events()
    for _ in range(20):
        with server.running() as running, concurrent.futures.ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(running.events) for _ in range(8)]
            running.stop()
            assert all(future.exception(30) or future.result() == [] for future in asked)


# -- Durability ------------------------------------------------------------------------------------


class Load(threading.Thread):
    """A client that sends new events until told to stop, and keeps the hashes of those that were answered 202."""

    def __init__(self, name, target, kept=True):
        super().__init__(daemon=True)
        self.name, self.target, self.headers = name, target, [] if kept else ["Connection: close"]
        self.accepted, self.failures, self.seconds = [], [], []
        self.ending = threading.Event()

    def run(self):
        serial, wire = 0, None
        while not self.ending.is_set():
            serial += 1
            value = event((self.name, serial))
            started = time.perf_counter()
            try:
                wire = wire or Wire(self.target)
                wire.sock.sendall(
                    request(as_sent(value, separators=(",", ":")), headers=self.headers)
                )
                reply = wire.reply()
                if reply is None:
                    raise ConnectionError("no answer")
            except OSError as error:
                self.failures.append(str(error))
                wire = None
                if self.target.process.poll() is not None:
                    return
                continue
            self.seconds.append(time.perf_counter() - started)
            if reply.status == 202:
                self.accepted.append(value["session_id_hash"])
            else:
                self.failures.append(reply.status)
            if reply.headers.get("connection") == "close":
                wire.__exit__()
                wire = None

    def stop(self):
        self.ending.set()
        self.join(60)


def loaded(running, name, events):
    """A client that got at least so many events accepted, and nothing else."""
    client = Load(name, running)
    client.start()
    while len(client.accepted) < events:
        assert client.is_alive() and not client.failures
        time.sleep(0.01)
    client.stop()
    return client


def p99(seconds):
    return sorted(seconds)[int(len(seconds) * 0.99)]


def test_server_sigkill_loses_nothing_that_was_accepted(tmp_path):
    """50 times under load: every 202 is a row, the file is whole, and the next start is quick."""
    db, rng, accepted, starts = tmp_path / "events.db", random.Random(50), set(), []
    for life in range(50):
        started = time.monotonic()
        running = Server(db)
        starts.append(time.monotonic() - started)
        clients = [Load((life, n), running) for n in range(3)]
        for client in clients:
            client.start()
        clients[0].ending.wait(rng.uniform(0.02, 0.15))  # the moment is what is random here
        running.stop(signal.SIGKILL)
        for client in clients:
            client.stop()
            accepted.update(client.accepted)
    stored = {row["session_id_hash"] for row in rows_of(db)}
    assert len(accepted) > 500 and accepted <= stored
    assert rows_of(db, "PRAGMA integrity_check") == [{"integrity_check": "ok"}]
    assert sum(len(json.loads(row["discovery_refs_json"])) for row in rows_of(db)) == len(edges(db))
    assert sorted(starts)[25] < 5


def test_server_restart_by_socket_activation_fails_no_request(tmp_path):
    """systemd's protocol by hand: the listening socket outlives three servers, under load all the while."""
    db = tmp_path / "events.db"
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket(
        socket.AF_UNIX, socket.SOCK_DGRAM
    ) as notices:
        notices.bind(str(tmp_path / "notify"))
        notices.settimeout(60)
        os.set_inheritable(listener.fileno(), True)
        script = 'exec 3<&%d; export LISTEN_PID=$$; exec "$@"' % listener.fileno()

        def start():
            env = dict(os.environ, LISTEN_FDS="1", NOTIFY_SOCKET=str(tmp_path / "notify"))
            running = Server(
                db,
                "--port",
                1,
                wrapper=["bash", "-c", script, "-"],
                env=env,
                pass_fds=[listener.fileno()],
            )
            assert notices.recv(100) == b"READY=1"
            return running

        running = start()
        assert running.port == listener.getsockname()[1]
        clients = [Load(n, running, kept=n % 2 == 0) for n in range(4)]
        for client in clients:
            client.start()
        for _ in range(3):
            reached = [len(client.accepted) + 20 for client in clients]
            while any(len(client.accepted) < goal for client, goal in zip(clients, reached)):
                assert all(client.is_alive() for client in clients)
                time.sleep(0.01)
            assert running.stop() == 0
            assert notices.recv(100) == b"STOPPING=1"
            running = start()
            for client in clients:
                client.target = running
        for client in clients:
            client.stop()
        assert running.stop() == 0
    assert [client.failures for client in clients] == [[]] * 4
    stored = {row["session_id_hash"] for row in rows_of(db)}
    assert {accepted for client in clients for accepted in client.accepted} == stored


# -- Limits ----------------------------------------------------------------------------------------


def test_server_slow_clients_are_ended_and_others_are_not(tmp_path):
    """408 for a request that dribbles, silence for an idle connection, an end for one that takes no answers."""
    with serving(
        tmp_path / "events.db", "--request-seconds", 1, "--idle-seconds", 2, "--write-seconds", 1
    ) as running:
        with Wire(running) as dribbling, Wire(running) as idle, Wire(running) as deaf:
            started = time.monotonic()
            idle.send(HEALTH)
            assert idle.reply().status == 200
            deaf.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.sock.settimeout(0.2)
            with contextlib.suppress(OSError):
                for _ in range(400):  # until the server reads no more
                    deaf.sock.sendall(HEALTH * 200)
            for byte in HEALTH[:-1]:
                if (
                    not dribbling.send(bytes([byte]))
                    or select.select([dribbling.sock], [], [], 0.1)[0]
                ):
                    break
            assert dribbling.reply().status == 408 and dribbling.reply() is None
            assert time.monotonic() - started >= 1
            assert idle.reply() is None and time.monotonic() - started >= 2
            deaf.sock.settimeout(30)
            with contextlib.suppress(ConnectionError):
                while deaf.sock.recv(65536):
                    pass
            assert post(running, event("slow")).status == 202


@needs_linux
def test_server_request_in_time_is_answered_however_late_the_server_is(tmp_path):
    """Stopped and woken after the deadline, it reads what came before it, and answers."""
    with serving(
        tmp_path / "events.db", "--idle-seconds", 1, "--request-seconds", 1
    ) as running, Wire(running) as idle, Wire(running) as halfway:
        halfway.send(HEALTH + request(BODY)[:-10])
        idle.send(HEALTH)
        assert idle.reply().status == halfway.reply().status == 200
        running.process.send_signal(signal.SIGSTOP)
        idle.send(request(as_sent(event("late"))))
        halfway.send(request(BODY)[-10:])
        time.sleep(1.5)  # over the deadline
        running.process.send_signal(signal.SIGCONT)
        assert idle.reply().status == halfway.reply().status == 202


def test_server_longest_idle_connection_makes_room(tmp_path):
    with serving(
        tmp_path / "events.db", "--max-connections", 10
    ) as running, contextlib.ExitStack() as stack:
        wires = [stack.enter_context(Wire(running)) for _ in range(10)]
        for wire in [*wires[5:], *wires[:5]]:
            wire.send(HEALTH)
            assert wire.reply().status == 200
        assert post(running, event("room")).status == 202
        assert wires[5].reply() is None
        for wire in [*wires[:5], *wires[6:]]:
            wire.send(HEALTH)
            assert wire.reply().status == 200


@needs_linux
def test_server_without_descriptors_it_neither_spins_nor_stops(tmp_path):
    with serving(tmp_path / "events.db") as running, contextlib.ExitStack() as stack:
        held = stack.enter_context(Wire(running))
        held.send(HEALTH)
        assert held.reply().status == 200
        pid = running.process.pid
        soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (len(os.listdir("/proc/%d/fd" % pid)), hard))
        assert post(running, event("crowd")).status == 202  # the idle one made room
        assert held.reply() is None
        assert running.says('"out_of_descriptors"')
        full = [stack.enter_context(Wire(running)) for _ in range(30)]
        used = cpu_seconds(pid)
        time.sleep(1)  # a second in which a server that spins would show
        assert cpu_seconds(pid) - used < 0.5 and len(running.errors) < 20
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
        for wire in full:
            wire.send(HEALTH)
        assert full[-1].reply().status == 200


def cpu_seconds(pid):
    fields = Path("/proc/%d/stat" % pid).read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_megabytes(pid):
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/%d/status" % pid).read_text())[1]) / 1024


@needs_linux
def test_server_crowd_of_slow_clients_does_not_slow_a_good_one(tmp_path):
    """4,000 silent connections and 200 that send a byte a second beside one that behaves."""
    resource.setrlimit(
        resource.RLIMIT_NOFILE,
        (
            min(8192, resource.getrlimit(resource.RLIMIT_NOFILE)[1]),
            resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        ),
    )
    with serving(
        tmp_path / "events.db", "--max-connections", 4400
    ) as running, contextlib.ExitStack() as stack:
        alone = p99(loaded(running, "alone", 2500).seconds)
        crowd = [
            stack.enter_context(socket.create_connection((running.host, running.port)))
            for _ in range(4200)
        ]
        stopped = threading.Event()

        def dribble():
            for byte in itertools.cycle(b"P"):
                for sock in crowd[:200]:
                    with contextlib.suppress(OSError):
                        sock.send(bytes([byte]))
                if stopped.wait(1):
                    return

        dribbler = threading.Thread(target=dribble)
        dribbler.start()
        beside = p99(loaded(running, "beside", 2500).seconds)
        stopped.set()
        dribbler.join()
        peak = peak_megabytes(running.process.pid)
        print(
            "p99 alone %.2f ms, beside the crowd %.2f ms; %d MB" % (alone * 1e3, beside * 1e3, peak)
        )
        assert beside < 2 * alone + 0.02  # 20 ms for what else this machine does
        assert peak < 120


@needs_linux
def test_server_client_that_pipelines_without_reading_starves_nobody(tmp_path):
    with serving(tmp_path / "events.db", "--write-seconds", 60) as running, Wire(running) as greedy:
        sent = []
        requests = b"".join(request(as_sent(event(("greedy", n)))) for n in range(1000))

        def flood():
            for _ in range(100):
                if not greedy.send(requests):
                    return
                sent.append(1000)

        flooder = threading.Thread(target=flood, daemon=True)
        flooder.start()
        assert p99(loaded(running, "modest", 500).seconds) < 2
        costly = (
            request(as_sent(dict.fromkeys(map(str, range(100)), 1))) * 32
        )  # 1 KB in, 8 KB out, each
        with contextlib.ExitStack() as stack:
            deaf = [stack.enter_context(Wire(running)) for _ in range(100)]
            for wire in deaf:
                wire.send(costly)
            assert p99(loaded(running, "beside the deaf", 200).seconds) < 2
            assert peak_megabytes(running.process.pid) < 120
        assert peak_megabytes(running.process.pid) < 120
        greedy.sock.shutdown(socket.SHUT_RDWR)
        flooder.join(30)


# -- Faults ----------------------------------------------------------------------------------------


def ready(running):
    with Wire(running) as wire:
        wire.send(request(method="GET", target="/readyz") + HEALTH)
        readiness, health = wire.reply(), wire.reply()
        assert health.status == 200
        return readiness.status


def refused_until_it_works(running, mend, tag):
    """Post events until one is refused, see what the server says of itself, mend it, and see it go on by itself."""
    accepted = []
    for n in range(20000):
        reply = post(running, event((tag, n), discovery_refs=["r" * 100] * 100))
        if reply.status != 202:
            break
        accepted.append(event((tag, n))["session_id_hash"])
    assert reply.status == 503 and int(reply.headers["retry-after"]) > 0
    assert ready(running) == 503
    assert running.says('"store_unavailable"')
    mend()
    assert post(running, event((tag, n))).status == 202
    assert ready(running) == 200
    running.stop()
    assert '"store_available"' in running.errors[-1] and len(running.errors) < 20
    stored = [row["session_id_hash"] for row in rows_of(running.db)]
    assert sorted(stored) == sorted([*accepted, event((tag, n))["session_id_hash"]])
    assert rows_of(running.db, "PRAGMA integrity_check") == [{"integrity_check": "ok"}]


@needs_linux
def test_server_disk_full_limited_file_size(tmp_path):
    with serving(tmp_path / "events.db") as running:
        pid = running.process.pid
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))
        unlimited = resource.RLIM_INFINITY, resource.RLIM_INFINITY
        refused_until_it_works(
            running, lambda: resource.prlimit(pid, resource.RLIMIT_FSIZE, unlimited), "size"
        )


@contextlib.contextmanager
def mounted(folder, *options):
    """A file system of its own at `folder`, for as long as the block lasts."""
    folder.mkdir()
    if run(["mount", *options, folder]).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        yield folder
    finally:
        run(["umount", "-l", folder])


@needs_linux
def test_server_disk_full_file_system(tmp_path):
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=1m", "tmpfs") as disk, serving(
        disk / "events.db"
    ) as running:
        refused_until_it_works(
            running, lambda: run(["mount", "-o", "remount,size=64m", disk]), "disk"
        )


@needs_linux
def test_server_file_system_turned_read_only(tmp_path):
    """As a disk error does it: a real ext4, told to have seen one."""
    image = tmp_path / "image"
    image.write_bytes(bytes(16 << 20))
    if not shutil.which("mkfs.ext4") or run(["mkfs.ext4", "-q", image]).returncode:
        pytest.skip("mkfs.ext4 makes the file system")
    with mounted(tmp_path / "disk", "-o", "loop,errors=remount-ro", image) as disk, serving(
        disk / "events.db"
    ) as running:
        device = os.path.realpath(
            "/sys/dev/block/%d:%d" % (os.major(disk.stat().st_dev), os.minor(disk.stat().st_dev))
        )
        trigger = Path("/sys/fs/ext4", os.path.basename(device), "trigger_fs_error")
        if not trigger.exists():
            pytest.skip("this kernel has no way to provoke an ext4 error")
        assert post(running, event("rw")).status == 202
        trigger.write_text("1")
        for _ in range(3):
            assert post(running, event("ro")).status == 503
        assert ready(running) == 503 and running.says('"store_unavailable"')
        assert len(running.errors) < 5
        assert running.stop() == 0


def test_server_database_at_its_size_limit(tmp_path):
    with serving(tmp_path / "events.db", "--max-db-bytes", 200_000) as running:

        def mend():
            with contextlib.closing(sqlite3.connect(str(running.db))) as connection, connection:
                connection.execute("DELETE FROM session_events WHERE id > 1 AND id % 2")

        statuses = [
            post(running, event(n, discovery_refs=["r" * 100] * 100)).status for n in range(40)
        ]
        assert statuses[0] == 202 and statuses[-1] == 503 and sorted(statuses) == statuses
        until = time.monotonic() + 1.5  # longer than the last write is remembered
        while time.monotonic() < until:
            assert ready(running) == 503
            time.sleep(0.1)
        mend()
        assert post(running, event("small")).status == 202 and ready(running) == 200
        assert (tmp_path / "events.db").stat().st_size <= 200_000


def test_server_sweep_makes_room_at_the_size_limit(tmp_path):
    db = tmp_path / "events.db"
    with serving(db, "--max-db-bytes", 200_000) as running:
        while (
            post(
                running, event(("old", time.monotonic_ns()), discovery_refs=["r" * 100] * 100)
            ).status
            == 202
        ):
            pass
    with contextlib.closing(sqlite3.connect(str(db))) as connection, connection:
        connection.execute("UPDATE session_events SET received_at = '2020-01-01T00:00:00Z'")
    with serving(db, "--max-db-bytes", 200_000, "--retain-days", 1) as running:
        assert post(running, event("new")).status == 202


def test_server_lock_held_by_another_process(tmp_path):
    """503 for the turns meanwhile, each after 250 ms; then it goes on."""
    with serving(tmp_path / "events.db") as running:
        assert post(running, event(0)).status == 202
        hold = (
            "import sqlite3, sys; db = sqlite3.connect(sys.argv[1], isolation_level=None);"
            "db.execute('BEGIN IMMEDIATE'); print('held', flush=True); sys.stdin.read()"
        )
        other = subprocess.Popen(
            [sys.executable, "-c", hold, str(running.db)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert other.stdout.readline() == b"held\n"
        started = time.monotonic()
        assert post(running, event(1)).status == 503
        assert 0.2 < time.monotonic() - started < 5
        other.communicate()
        assert post(running, event(1)).status == 202
        assert len(rows_of(running.db)) == 2


@pytest.mark.parametrize(
    "words", ["ABORT, 'no'", "ABORT, 'that one is locked'", "ROLLBACK, 'no'", "FAIL, 'no'"]
)
def test_server_row_refused_by_another_programs_trigger(tmp_path, words):
    """The others of its turn are stored; the log names no more than six digits."""
    db = tmp_path / "events.db"
    rows = [event(n, identity_hash=hashlib.sha256(b"who %d" % n).hexdigest()) for n in range(5)]
    SECRETS.update(row["identity_hash"] for row in rows)
    port = free_port()
    with serving(db, "--metrics", "127.0.0.1:%d" % port) as running:
        with contextlib.closing(sqlite3.connect(str(db))) as connection, connection:
            connection.execute(
                "CREATE TRIGGER other BEFORE INSERT ON session_events WHEN NEW.identity_hash = '%s'"
                " BEGIN SELECT RAISE(%s); END" % (rows[2]["identity_hash"], words)
            )
        with Wire(running) as wire:
            wire.send(b"".join(request(as_sent(row)) for row in rows))
            replies = [wire.reply() for _ in rows]
        assert [reply.status for reply in replies] == [202, 202, 500, 202, 202]
        assert replies[2].body == b'{"error":"Insert failed"}'
        with urllib.request.urlopen("http://127.0.0.1:%d/metrics" % port, timeout=30) as page:
            counted = parse_metrics(page.read().decode())["session_events_events_total"]
        assert counted == {'result="already_there"': 0, 'result="stored"': 4}
        running.stop()
        assert len(rows_of(db)) == 4
        logged = [json.loads(line) for line in running.errors]
        assert [entry["identity"] for entry in logged] == [rows[2]["identity_hash"][:6]]
        assert logged[0]["reason"] == "IntegrityError"


@pytest.mark.parametrize("how", ["deleted", "replaced", "emptied", "log deleted"])
def test_server_file_taken_away_from_under_it(tmp_path, how):
    """503 and a line that says why, not a 202 for what went into a deleted file; put back, it goes on."""
    with serving(tmp_path / "events.db") as running:
        assert post(running, event(0)).status == 202
        victim = tmp_path / ("events.db-wal" if how == "log deleted" else "events.db")
        victim.rename(tmp_path / "aside")
        if how in ("replaced", "emptied"):
            victim.write_bytes((tmp_path / "aside").read_bytes() if how == "replaced" else b"")
        for n in (1, 2):
            assert post(running, event(n)).status == 503
        assert ready(running) == 503
        assert running.says("deleted, replaced or emptied")
        (tmp_path / "aside").replace(victim)
        assert post(running, event(1)).status == 202
        assert running.stop() == 0
        stored = {row["session_id_hash"] for row in rows_of(running.db)}
        assert {event(0)["session_id_hash"], event(1)["session_id_hash"]} <= stored


# -- Abuse and privacy -----------------------------------------------------------------------------

TRUSTED = [ipaddress.ip_network(net) for net in ("10.0.0.0/8", "::1/128", "127.0.0.0/8")]


@pytest.mark.parametrize(
    ("peer", "forwarded", "client"),
    [
        ("192.0.2.1", "", "192.0.2.1"),
        ("192.0.2.1", "198.51.100.7", "192.0.2.1"),  # not from a trusted proxy: not believed
        ("10.0.0.1", "198.51.100.7", "198.51.100.7"),
        (
            "10.0.0.1",
            "203.0.113.9, 198.51.100.7",
            "198.51.100.7",
        ),  # what is further left, anybody could have written
        ("10.0.0.1", "203.0.113.9, 198.51.100.7, 10.9.9.9", "198.51.100.7"),
        ("10.0.0.1", "10.1.1.1, 10.2.2.2", "10.1.1.1"),
        ("10.0.0.1", "198.51.100.7, junk", "10.0.0.1"),
        ("10.0.0.1", "", "10.0.0.1"),
        ("::1", "2001:db8::5", "2001:db8::5"),
        ("::ffff:10.0.0.1", "198.51.100.7", "198.51.100.7"),
        ("fe80::1%eth0", "", "fe80::1"),
        ("10.0.0.1", "198.51.100.7:4711", "198.51.100.7"),
        ("10.0.0.1", "[2001:db8::5]:4711", "2001:db8::5"),
        ("10.0.0.1", "198.51.100.7:x", "10.0.0.1"),
    ],
)
def test_server_client_address(peer, forwarded, client):
    assert server.client_address(peer, forwarded, TRUSTED) == ipaddress.ip_address(client)


def test_server_rate_limit_is_a_token_bucket():
    limit = server.RateLimit(server.Rate(10, 60.0))
    one, other = (limit.bucket(ipaddress.ip_address(a)) for a in ("192.0.2.1", "192.0.2.2"))
    assert [limit.wait(one, 100.0) for _ in range(10)] == [0.0] * 10
    assert limit.wait(one, 100.0) == pytest.approx(6.0) and limit.wait(one, 103.0) == pytest.approx(
        3.0
    )
    assert limit.wait(other, 103.0) == 0.0
    assert limit.wait(one, 106.0) == 0.0 and limit.wait(one, 106.0) > 0
    assert [limit.wait(one, 1000.0) for _ in range(11)].count(0.0) == 10
    same = {
        limit.bucket(ipaddress.ip_address(a)) for a in ("2001:db8:1:2::1", "2001:db8:1:2:ffff::")
    }
    assert len(same) == 1 and limit.bucket(ipaddress.ip_address("2001:db8:1:3::1")) not in same
    assert (
        limit.bucket(ipaddress.ip_address("127.8.8.8"))
        is limit.bucket(ipaddress.ip_address("::1"))
        is None
    )
    many = server.RateLimit(server.Rate(600, 60.0))
    for now in (0.1, 12345.678, 1e6 / 3):  # all at once, whatever the floats make of it
        assert [many.wait(b"%r" % now, now) for _ in range(600)] == [0.0] * 600 and many.wait(
            b"%r" % now, now
        ) > 0
    for n in range(server.MAX_BUCKETS + 10):
        limit.wait(b"%d" % n, 1000.0)
    assert len(limit.full_at) == server.MAX_BUCKETS
    assert server.RateLimit(server.Rate(1, 1.0)).bucket(ipaddress.ip_address("192.0.2.1")) != one


def test_server_rate_limit_answers_429_with_retry_after(tmp_path):
    flags = ["--rate", "5/h", "--trusted-proxy", "127.0.0.0/8"]
    with serving(tmp_path / "events.db", *flags) as running, Wire(running) as wire:

        def statuses(client, count):
            for n in range(count):
                wire.send(
                    request(
                        as_sent(event((client, n))),
                        headers=["X-Forwarded-For: 203.0.113.1, " + client],
                    )
                )
            return [wire.reply() for _ in range(count)]

        replies = statuses("198.51.100.7", 8)
        assert [reply.status for reply in replies] == [202] * 5 + [429] * 3
        assert 600 < int(replies[-1].headers["retry-after"]) <= 720
        assert [reply.status for reply in statuses("198.51.100.8", 5)] == [202] * 5
        assert post(running, event("loopback")).status == 202
    with serving(
        tmp_path / "events.db", "--rate", "1/h"
    ) as running:  # nobody is trusted: the header is just text
        for n in range(5):
            assert post(running, event(n), headers=["X-Forwarded-For: 198.51.100.7"]).status == 202
    SECRETS.update(("198.51.100.7", "198.51.100.8", "203.0.113.1"))


def test_server_pepper_hides_the_hashes_and_keeps_idempotency(tmp_path):
    pepper, db = tmp_path / "pepper", tmp_path / "events.db"
    for _ in range(2):
        with serving(db, "--pepper-file", pepper) as running:
            assert post(running, event("pepper")).body == OK_BODY
            assert post(running, event("plain", github_hash=None)).status == 202
    assert pepper.stat().st_mode & 0o777 == 0o600
    key = pepper.read_bytes().strip()

    def hidden(text):
        return hmac.new(key, text.encode(), "sha256").hexdigest()

    stored = rows_of(db)
    assert [(r["identity_hash"], r["github_hash"], r["session_id_hash"]) for r in stored] == [
        (
            hidden(e["identity_hash"]),
            e["github_hash"] and hidden(e["github_hash"]),
            hidden(e["session_id_hash"]),
        )
        for e in (event("pepper"), event("plain", github_hash=None))
    ]
    assert EVENT["identity_hash"].encode() not in db.read_bytes()


def test_server_access_log_only_when_asked_and_without_names(tmp_path):
    with serving(tmp_path / "events.db", "--access-log") as running, Wire(running) as wire:
        last = request(method="GET", target="/healthz", headers=["Connection: close"])
        wire.send(
            request(as_sent(event("log")))
            + request(method="GET", target="/home/somebody/secret-path")
            + last
        )
        assert [wire.reply().status for _ in range(3)] == [202, 404, 200]
        running.stop()
        logged = [json.loads(line) for line in running.output]
    assert [(entry["route"], entry["status"]) for entry in logged] == [
        ("-", 404),
        ("GET /healthz", 200),
        ("POST /v1/session-events", 202),
    ]
    assert all(set(entry) == {"time", "route", "status"} for entry in logged)
    SECRETS.add("secret-path")


def test_server_logs_that_nobody_reads_stop_nothing(tmp_path):
    """Standard output and error closed on the other side; and SIGHUP where there is nothing to read again."""
    argv = [
        sys.executable,
        ROOT / "server.py",
        "--db",
        tmp_path / "events.db",
        "--port",
        "0",
        "--access-log",
    ]
    process = subprocess.Popen(list(map(str, argv)), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    address = process.stdout.readline().decode().rpartition("//")[2].split(":")
    process.stdout.close()
    process.stderr.close()
    process.send_signal(signal.SIGHUP)
    where = argparse.Namespace(host=address[0], port=int(address[1]))
    for n in range(5):
        assert post(where, event(n)).status == 202
    process.terminate()
    assert process.wait(30) == 0


# -- Operations ------------------------------------------------------------------------------------


def certificate(folder, name):
    """A self-signed certificate for 127.0.0.1 and its key, as paths."""
    cert, key = folder / (name + ".crt"), folder / (name + ".key")
    done = run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-days",
            "2",
            "-subj",
            "/CN=" + name,
            "-addext",
            "subjectAltName=IP:127.0.0.1",
            "-keyout",
            key,
            "-out",
            cert,
        ]
    )
    assert done.returncode == 0, done.stderr
    return cert, key


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl makes the certificates")
def test_server_tls_in_the_loop(tmp_path):
    """Events over https while a handshake is stalled; SIGHUP takes a new certificate, and leaves a bad one alone."""
    cert, key = certificate(tmp_path, "first")
    with serving(
        tmp_path / "events.db", "--tls-cert", cert, "--tls-key", key, "--request-seconds", 2
    ) as running:

        def https(n, **options):
            context = ssl.create_default_context(cafile=str(cert))
            for option, value in options.items():
                setattr(context, option, value)
            with socket.create_connection(
                (running.host, running.port), 30
            ) as plain, context.wrap_socket(
                plain, server_hostname="127.0.0.1", suppress_ragged_eofs=False
            ) as sock:
                shaken = sock.getpeercert()["subject"][0][0][1], sock.version()
                last = request(b"nope", headers=["Connection: close"])
                sock.sendall(request(PADDED) + request(as_sent(event(n))) + last)
                data = b"".join(iter(lambda: sock.recv(65536), b""))
                assert re.findall(rb"HTTP/1.1 (\d+)", data) == [b"202", b"202", b"400"]
                return shaken

        assert running.base.startswith("https://")
        with Wire(running) as stalled, Wire(running) as plain:
            stalled.send(b"\x16\x03\x01")
            assert https(1) == ("first", "TLSv1.3")
            assert https(2, maximum_version=ssl.TLSVersion.TLSv1_2) == ("first", "TLSv1.2")
            with pytest.raises((ssl.SSLError, ConnectionError)), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                https(
                    3,
                    minimum_version=ssl.TLSVersion.TLSv1_1,
                    maximum_version=ssl.TLSVersion.TLSv1_1,
                )
            plain.send(HEALTH)
            with contextlib.suppress(ConnectionError):
                assert b"HTTP" not in plain.sock.recv(1000)
            with contextlib.suppress(ConnectionError):
                assert stalled.sock.recv(1000) == b""  # its time was over
        new_cert, new_key = certificate(tmp_path, "second")
        new_cert.replace(cert)
        new_key.replace(key)
        running.process.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + 30
        while https(4)[0] != "second":
            assert time.monotonic() < deadline
        key.write_text("no key")
        running.process.send_signal(signal.SIGHUP)
        while not running.errors:
            assert https(5)[0] == "second" and time.monotonic() < deadline
        assert json.loads(running.errors[0])["event"] == "tls_not_reloaded"
        assert https(6)[0] == "second"


def parse_metrics(text):
    """{name: {labels: value}} of a page in Prometheus's text format, its rules checked on the way."""
    assert text.endswith("\n")
    families, samples, open_family = {}, {}, None
    for line in text.splitlines():
        if line.startswith("#"):
            mark, kind, name, words = line.split(" ", 3)
            assert mark == "#" and kind in ("HELP", "TYPE") and words
            if kind == "HELP":
                assert name not in families, "a family stands in one piece"
                families[name], open_family = None, name
            else:
                assert name == open_family and words in ("counter", "gauge", "histogram")
                families[name] = words
            continue
        label = r'[a-zA-Z_]\w*="(?:[^"\\\n]|\\[\\"n])*"'
        match = re.fullmatch(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{((?:%s,?)+)\})? (\S+)" % label, line)
        name, labels, value = match.groups()
        base = (
            re.sub("_(bucket|sum|count)$", "", name)
            if families[open_family] == "histogram"
            else name
        )
        assert base == open_family and (families[base] != "counter" or name.endswith("_total"))
        assert labels not in samples.setdefault(name, {})
        samples[name][labels] = float(value)
    for name, kind in families.items():
        if kind == "histogram":
            buckets = samples[name + "_bucket"]
            assert (
                list(buckets.values()) == sorted(buckets.values())
                and list(buckets)[-1] == 'le="+Inf"'
            )
            assert buckets['le="+Inf"'] == samples[name + "_count"][None]
    return samples


def test_server_metrics_on_their_own_listener(tmp_path):
    port = free_port()
    with serving(tmp_path / "events.db", "--metrics", "127.0.0.1:%d" % port) as running:
        for n in (1, 1, 2):
            assert post(running, event(n)).status == 202
        assert post(running, {"a": 1}).status == 400
        with Wire(running) as public:
            public.send(request(method="GET", target="/metrics"))
            assert public.reply().status == 404
        url = "http://127.0.0.1:%d/metrics" % port
        with urllib.request.urlopen(url, timeout=30) as reply:
            assert reply.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
            page = reply.read().decode()
        PRINTED.append(page.encode())
        samples = parse_metrics(page)
        prefix = "session_events_"
        assert samples[prefix + "http_requests_total"] == {
            'status="202"': 3,
            'status="400"': 1,
            'status="404"': 1,
        }
        assert samples[prefix + "events_total"] == {
            'result="already_there"': 1,
            'result="stored"': 2,
        }
        assert samples[prefix + "refusals_total"] == {
            'reason="not_an_event"': 1,
            'reason="unknown_path"': 1,
        }
        assert (
            samples[prefix + "turn_rows_sum"][None] == 3
            and samples[prefix + "commit_seconds_count"][None] == 3
        )
        assert samples[prefix + "database_bytes"][None] > 10000
        assert sum(samples[prefix + "connections"].values()) >= 1
        with Wire(running) as wire:
            wire.send(b"".join(request(as_sent(event(("turn", n)))) for n in range(500)))
            assert [wire.reply().status for _ in range(500)] == [202] * 500
        with urllib.request.urlopen(url, timeout=30) as reply:
            turns = parse_metrics(reply.read().decode())[prefix + "turn_rows_bucket"]
        assert (
            turns['le="64"'] == turns['le="+Inf"']
        )  # one client's 32 a turn, twice where it was held up
        assert any(server.__version__ in labels for labels in samples[prefix + "build_info"])
        with pytest.raises(urllib.error.HTTPError):  # events are not taken there
            urllib.request.urlopen("http://127.0.0.1:%d/v1/session-events" % port, BODY, timeout=30)


def test_server_retention_sweeps_old_rows_and_their_edges(tmp_path):
    """What is older goes, a piece at a time, while events come in; what is younger stays."""
    db = tmp_path / "events.db"
    server.Store(str(db)).close()
    count = int(os.environ.get("TEST_ROWS", "10000"))
    with contextlib.closing(sqlite3.connect(str(db))) as connection, connection:
        connection.executemany(
            server.INSERT_ONE,
            (
                (
                    "%064x" % (n % 999),
                    None,
                    "%064x" % n,
                    "2026-01-01T00:00:00.000Z",
                    1,
                    1,
                    None,
                    '["old","r%d"]' % (n % 50),
                    "1",
                    "2020-01-01T00:00:00Z",
                )
                for n in range(count)
            ),
        )
        connection.execute(
            "UPDATE session_events SET received_at = strftime('%Y-%m-%dT%H:%M:%SZ', 'now', '-2 days')"
            " WHERE id <= 10"
        )
    with serving(db) as running:
        usual = loaded(running, "usual", 1000)
    with serving(db, "--retain-days", 3) as running:
        during = loaded(running, "during", 1000)
        assert len(rows_of(db, "SELECT id FROM session_events WHERE received_at < '2021'")) > 0
        deadline = time.monotonic() + 60 + count / 2000
        while rows_of(db, "SELECT id FROM session_events WHERE received_at < '2021' LIMIT 1"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    print(
        "p99 usual %.2f ms, during the sweep %.2f ms"
        % (p99(usual.seconds) * 1e3, p99(during.seconds) * 1e3)
    )
    assert (
        p99(during.seconds) < 2 * p99(usual.seconds) + 0.02
    )  # 20 ms for what else this machine does
    stay = len(usual.accepted) + len(during.accepted) + 10
    assert (
        rows_of(db, "SELECT count(*) AS n FROM session_events") == [{"n": stay}]
        and running.errors == []
    )
    assert rows_of(db, "SELECT count(*) AS n FROM session_discoveries") == [{"n": 2 * stay}]


# -- Hostile input ---------------------------------------------------------------------------------

SPLICES = (
    b"\r\n",
    b"\n",
    b"\0",
    b"\r\n\r\n",
    b'"',
    b"{",
    b"[" * 5000,
    b"9" * 5000,
    b"\xff\xfe",
    b": ",
)


def mutated(rng, valid):
    """A request made from a valid one: bytes flipped, cut, doubled, spliced, re-ordered, huge, or nothing at all."""
    data = bytearray(valid)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at, to = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
        how = rng.randrange(8)
        if how == 0 and data:
            data[rng.randrange(len(data))] = rng.randrange(256)
        elif how == 1:
            del data[at:to]
        elif how == 2:
            data[at:at] = data[at:to]
        elif how == 3:
            data[at:at] = rng.choice(SPLICES)
        elif how == 4:
            lines = bytes(data).split(b"\r\n")
            rng.shuffle(lines)
            data = bytearray(b"\r\n".join(lines))
        elif how == 5:
            data[at:to] = valid[rng.randrange(len(valid)) :]
        elif how == 6:
            other = rng.choice((b"Content-Length: 1", b"Transfer-Encoding: ", b"Expect: "))
            data = bytearray(bytes(data).replace(b"Content-Length: ", other))
        elif rng.random() < 0.02:
            data[at:at] = bytes([rng.randrange(256)]) * 100_000
    return bytes(data)


@needs_linux
def test_server_fuzz(tmp_path):
    """20,000 seeded mutants, each cut across packets: no 5xx, no hang, no descriptor and no good event lost."""
    rng, answered, good = random.Random(20), collections.Counter(), 0
    valid = [
        request(BODY),
        request(b"{}"),
        HEALTH,
        request(BODY, headers=["Connection: close", "Expect: 100-continue"]),
    ]
    with serving(tmp_path / "events.db", "--request-seconds", 5) as running:
        descriptors = len(os.listdir("/proc/%d/fd" % running.process.pid))
        for hundred in range(200):
            wires = []
            for _ in range(100):
                data = mutated(rng, rng.choice(valid))
                cut = rng.randrange(len(data) + 1)
                wire = Wire(running)
                wire.sock.settimeout(30)
                wires.append(wire)
                if wire.send(data[:cut]):
                    wire.send(data[cut:])
                with contextlib.suppress(OSError):
                    wire.sock.shutdown(socket.SHUT_WR)
            for wire in wires:
                with wire:
                    while True:
                        try:
                            reply = wire.reply()
                        except ValueError:
                            raise AssertionError("an answer that is no HTTP") from None
                        if reply is None:
                            break
                        answered[reply.status] += 1
            assert post(running, event(("fuzz", hundred))).status == 202
            good += 1
        print(dict(answered))
        assert (
            not [status for status in answered if status >= 500]
            and answered[400] > 1000
            and answered[202] > 500
        )
        deadline = time.monotonic() + 30
        while len(os.listdir("/proc/%d/fd" % running.process.pid)) > descriptors:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert running.stop() == 0 and running.errors == []
    stored = {row["session_id_hash"] for row in rows_of(tmp_path / "events.db")}
    assert {event(("fuzz", n))["session_id_hash"] for n in range(200)} <= stored


# ==================================================================================================
# session_events.py
# ==================================================================================================


def stored(db, *rows, journal="WAL"):
    """A database at `db` with schema.sql and these rows (dicts of columns, any values); returns its path as
    text."""
    with contextlib.closing(sqlite3.connect(str(db), isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode=" + journal)
        connection.execute("PRAGMA synchronous=OFF")
        connection.executescript((ROOT / "schema.sql").read_text())
        connection.execute("BEGIN")
        for row in rows:
            connection.execute(
                "INSERT INTO session_events (%s) VALUES (%s)"
                % (", ".join(row), ", ".join("?" * len(row))),
                list(row.values()),
            )
        connection.execute("COMMIT")
    return str(db)


def sha(*words):
    return hashlib.sha256(" ".join(map(str, words)).encode()).hexdigest()


def row(n, who="ann", at="2026-05-22T12:00:00.000Z", refs=(), github=True, **changes):
    """The columns of session `n` of developer `who`."""
    return dict(
        {
            "identity_hash": sha("identity", who),
            "github_hash": sha("login", who) if github else None,
            "session_id_hash": sha("session", n),
            "ended_at": at,
            "tool_count": 10,
            "tokens_saved": 100,
            "branch_sha": "abc123def456",
            "discovery_refs_json": json.dumps(list(refs), separators=(",", ":")),
            "plugin_version": "1.31.0",
        },
        **changes,
    )


def read(*argv, **options):
    """One command of session_events.py. Not through `run`: showing sessions and discoveries is what it is
    for."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "session_events.py"), *map(str, argv)],
        timeout=60,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )
    done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
    assert "Traceback" not in done.stderr
    return done


MAY = {"since": "2026-05-01T00:00:00.000Z", "until": "2026-06-01T00:00:00.000Z"}
IN_MAY = ("--since", "2026-05-01", "--until", "2026-06-01")
# Four sessions of three developers (cay has no GitHub), and one from before the window. x goes from ann to
# bob to cay, y from ann to ann to cay; z stays with bob.
STORY = (
    row("old", "ann", "2026-04-20T10:00:00.000Z", ["x"]),
    row(1, "ann", "2026-05-04T10:00:00.000Z", ["x", "y"], tool_count=1, tokens_saved=5),
    row(2, "bob", "2026-05-05T10:00:00.000Z", ["x", "z", "x"], tool_count=2, tokens_saved=7),
    row(3, "ann", "2026-05-12T10:00:00.000Z", ["y"], tool_count=4, tokens_saved=11),
    row(
        4,
        "cay",
        "2026-05-12T11:00:00.000Z",
        ["y", "x"],
        github=False,
        tool_count=8,
        tokens_saved=13,
    ),
)
ANN, BOB, CAY = sha("login ann"), sha("login bob"), sha("identity cay")


def story_session(n):
    stored_row = STORY[n]
    return {
        "session_id_hash": sha("session", n),
        "identity_hash_prefix": stored_row["identity_hash"][:8],
        "github_hash_prefix": stored_row["github_hash"] and stored_row["github_hash"][:8],
        "ended_at": stored_row["ended_at"],
        "tool_count": stored_row["tool_count"],
        "tokens_saved": stored_row["tokens_saved"],
        "branch_sha": "abc123def456",
        "discovery_refs": list(dict.fromkeys(json.loads(stored_row["discovery_refs_json"]))),
    }


def test_reader_schema_in_the_reader():
    text = (ROOT / "schema.sql").read_text()
    assert text == session_events.SCHEMA


def test_reader_moments():
    """Every form that an event may have, read back as the stored form; what is none is no time."""
    for text, stored_form in (
        *MOMENTS,
        ("0001-01-01T00:00:00Z", "0001-01-01T00:00:00.000Z"),
        ("2026-05-22", None),
        ("2026-02-30T00:00:00Z", None),
        ("2026-05-22T24:00:01Z", None),
        ("2026-05-22T12:34:56Z\n", None),
        ("٢٠٢٦-05-22T12:34:56Z", None),
        ("2026-05-22T12:34:56+25:00", None),
        ("0000-01-01T00:00:00Z", None),
        ("", None),
        (None, None),
        (5, None),
        (b"2026-05-22T12:34:56Z", None),
    ):
        assert session_events.moment_or_none(text) == stored_form, text


def test_reader_answers_worked_out_by_hand(tmp_path):
    db = stored(tmp_path / "e.db", *STORY)
    window = session_events.Window(**MAY)
    a, b, c = ANN[:8], BOB[:8], CAY[:8]
    s1, s2, s3, s4 = (sha("session", n) for n in (1, 2, 3, 4))
    with session_events.reading(db) as reader:
        assert session_events.sessions(reader, window, 2) == dict(
            MAY,
            sessions=[dict(story_session(4), developer=c), dict(story_session(3), developer=a)],
            total_count_in_window=4,
        )
        assert (
            session_events.sessions(reader, window._replace(github=False))["total_count_in_window"]
            == 1
        )
        assert (
            session_events.sessions(reader, window._replace(discovery="z"))["total_count_in_window"]
            == 1
        )
        edges = window._replace(
            since=STORY[1]["ended_at"], until=STORY[4]["ended_at"]
        )  # in, and not in
        assert session_events.sessions(reader, edges)["total_count_in_window"] == 3

        may_13 = session_events.instant("2026-05-13T00:00:00Z")
        assert session_events.session(reader, s1[:6], may_13) == {
            "session": dict(story_session(1), developer=a),
            "related": [
                dict(story_session(3), developer=a),
                dict(story_session(0), developer=a, session_id_hash=sha("session old")),
            ],
        }
        assert len(session_events.session(reader, s1, may_13 + 10 * 86_400_000)["related"]) == 1

        listed = session_events.discoveries(reader, window)["discoveries"]
        assert [
            (
                d["discovery_id"],
                d["session_count"],
                d["distinct_identity_count"],
                d["first_seen_at"],
                d["last_seen_at"],
            )
            for d in listed
        ] == [
            ("x", 3, 3, STORY[1]["ended_at"], STORY[4]["ended_at"]),
            ("y", 3, 2, STORY[1]["ended_at"], STORY[4]["ended_at"]),
            ("z", 1, 1, STORY[2]["ended_at"], STORY[2]["ended_at"]),
        ]

        found = session_events.discovery(reader, "x", window)
        assert found.pop("counts")[2:9] == [1, 1, 0, 0, 0, 0, 1] and found.pop("last_aggregated_at")
        assert found == dict(
            MAY,
            hours_to_second_developer=24.0,
            half_life_hours=None,
            discovery_id="x",
            first_seen_at=STORY[1]["ended_at"],
            last_seen_at=STORY[4]["ended_at"],
            session_count=3,
            distinct_identity_count=3,
            developer_count=3,
            reached=[
                {"at": STORY[n]["ended_at"], "developer": who, "session_id_hash": sha("session", n)}
                for n, who in ((1, a), (2, b), (4, c))
            ],
            path=[
                {
                    "session_id_hash": sha("session", n),
                    "developer": who,
                    "ended_at": STORY[n]["ended_at"],
                    "crosses": n != 1,
                }
                for n, who in ((1, a), (2, b), (4, c))
            ],
        )

        graph = session_events.graph(reader, window)
        assert [node["id"] for node in graph["nodes"]] == [s1, s2, s3, s4]
        assert graph["edges"] == [
            {"source": s1, "target": s2, "discoveries": ["x"], "crosses": True},
            {"source": s1, "target": s3, "discoveries": ["y"], "crosses": False},
            {"source": s3, "target": s4, "discoveries": ["y"], "crosses": True},
            {"source": s2, "target": s4, "discoveries": ["x"], "crosses": True},
        ]
        assert sorted(
            (f["source"], f["target"], f["edges"], f["discoveries"]) for f in graph["developers"]
        ) == sorted([(a, b, 1, 1), (a, a, 1, 1), (a, c, 1, 1), (b, c, 1, 1)])
        assert graph["totals"] == {
            "sessions": 4,
            "developers": 3,
            "tool_count": 15,
            "tokens_saved": 36,
            "discoveries": 3,
            "hand_overs": 3,
        }
        only_y = session_events.graph(reader, window._replace(discovery="y"))
        assert [(e["source"], e["target"]) for e in only_y["edges"]] == [(s1, s3), (s3, s4)]

        activity = session_events.activity(reader, window, may_13 - 1)
        assert [
            (
                w["period"],
                w["developers"],
                w["came_back"],
                w["sessions"],
                w["tool_count"],
                w["tokens_saved"],
            )
            for w in activity["weeks"]
        ] == [("2026-W19", 2, 0, 2, 3, 12), ("2026-W20", 2, 1, 2, 12, 24)]
        assert [d["sessions"] for d in activity["days"]] == [1, 1, 0, 0, 0, 0, 0, 0, 2]
        assert [m["developers"] for m in activity["months"]] == [3]
        assert activity["active"] == [
            {"days": 1, "developers": 2, "came_back": 0},
            {"days": 7, "developers": 2, "came_back": 1},
            {"days": 28, "developers": 3, "came_back": 0},
        ]


def reference_developers(rows):
    """{session: developer} by the definition, over all rows of a window, whatever its filters."""
    logins = {}
    for r in rows:
        logins.setdefault(r["identity_hash"], set()).update({r["github_hash"]} - {None})
    return {
        r["session_id_hash"]: r["github_hash"]
        or (
            min(logins[r["identity_hash"]])
            if len(logins[r["identity_hash"]]) == 1
            else r["identity_hash"]
        )
        for r in rows
    }


def reference_edges(rows):
    """{(source, target): discoveries} by the definition, over rows in time order, a pair at a time."""
    edges = {}
    for ref in {ref for r in rows for ref in json.loads(r["discovery_refs_json"])}:
        touched = [
            r["session_id_hash"] for r in rows if ref in json.loads(r["discovery_refs_json"])
        ]
        for source, target in zip(touched, touched[1:]):
            edges.setdefault((source, target), set()).add(ref)
    return edges


def test_reader_answers_against_a_plain_reference(tmp_path, monkeypatch):
    """Random sessions, also ended in the same moment. The ways around a missing index (newest rows, steps
    through identities, bounds on counts) are made short, so that each is taken, left half-way, and must
    agree."""
    monkeypatch.setattr(session_events, "CHUNK", 7)
    monkeypatch.setattr(session_events, "MOST_TOGETHER", 9)
    monkeypatch.setattr(session_events, "NEWEST", 20)
    chance = random.Random(11)
    rows = []
    for n in range(400):
        refs = ["r%d" % int(12 * chance.random() ** 2) for _ in range(chance.randrange(4))]
        rows.append(
            row(
                n,
                "dev%d" % chance.randrange(9),
                "2026-05-%02dT%02d:00:00.000Z" % (chance.randrange(1, 29), chance.randrange(24)),
                dict.fromkeys(refs),
                github=chance.random() < 0.5,
            )
        )
    db = stored(tmp_path / "e.db", *rows)
    order = sorted(range(len(rows)), key=lambda i: (rows[i]["ended_at"], i))
    for since, until, github in (
        ("2026-05-01", "2026-05-29", None),
        ("2026-05-07", "2026-05-15", True),
        ("2026-05-10T05:00:00Z", "2026-05-10T06:00:00Z", None),
        ("2026-05-20", "", False),
    ):
        window = session_events.window_between(7, since, until, github, None)
        inside = [
            rows[i]
            for i in order
            if window.since <= rows[i]["ended_at"] < window.until
            and github in (None, rows[i]["github_hash"] is not None)
        ]
        with session_events.reading(db) as reader:
            listed = session_events.sessions(reader, window, 1000)["sessions"]
            assert [s["session_id_hash"] for s in listed] == [r["session_id_hash"] for r in inside][
                ::-1
            ]
            who = reference_developers(
                [r for r in rows if window.since <= r["ended_at"] < window.until]
            )
            check_discoveries(reader, window, inside, who)
            check_figures(reader, window, rows, inside, who)
            graph = session_events.graph(reader, window)
            found = {(e["source"], e["target"]): set(e["discoveries"]) for e in graph["edges"]}
            assert found == reference_edges(inside)
            assert all(
                e["crosses"] == (who[e["source"]] != who[e["target"]]) for e in graph["edges"]
            )
            hand_overs = sum(len(refs) for (a, b), refs in found.items() if who[a] != who[b])
            assert graph["totals"]["hand_overs"] == hand_overs
            if inside:
                _, data, left_out = session_events.figure(reader.window(window)[::-1])
                assert (sum(s[5] for s in data["sessions"]), left_out) == (hand_overs, 0)
            activity = session_events.activity(reader, window)
            for period in activity["days"]:
                day = [r for r in inside if r["ended_at"][:10] == period["period"]]
                assert (period["sessions"], period["developers"]) == (
                    len(day),
                    len({who[r["session_id_hash"]] for r in day}),
                )
            exported = list(session_events.exported(reader, window))
            assert [s["session_id_hash"] for s in exported] == [
                r["session_id_hash"] for r in inside
            ]
    monkeypatch.setattr(session_events, "SAMPLE", 2)
    for newest, steps in (
        (1000, 0),
        (3, 0),
        (3, 1 << 60),
    ):  # found among the newest, in the whole index, step by step
        monkeypatch.setattr(session_events, "NEWEST", newest)
        monkeypatch.setattr(session_events, "MOST_STEPS", steps)
        with session_events.reading(db) as reader:
            for r in chance.sample(rows, 20):
                for digits in (64, 12):
                    found = session_events.find_session(reader, r["session_id_hash"][:digits])
                    assert (found.session, found.identity) == (
                        r["session_id_hash"],
                        r["identity_hash"],
                    )
            with pytest.raises(session_events.NotFound, match="no session"):
                session_events.find_session(reader, "0" * 64)


def test_reader_rows_that_are_no_session_hide_none(tmp_path, monkeypatch):
    """Another program's rows, of the same session: one that sorts before it in every order, and the newest."""
    good = row(1, "dev", "2026-05-01T00:00:00.000Z", ["r"])
    db = stored(tmp_path / "e.db", good)
    with contextlib.closing(sqlite3.connect(str(db))) as connection, connection:
        connection.executemany(
            "INSERT INTO session_events (id, identity_hash, session_id_hash, ended_at, plugin_version)"
            " VALUES (?, ?, ?, ?, '1')",
            [
                (-3, "", good["session_id_hash"], "2026-05-01T00:00:00.000Z"),
                (-2, "!", good["session_id_hash"], "2026-05-01T00:00:00.000Z"),
                (-1, "0" * 64, good["session_id_hash"], "never"),
            ],
        )
    for newest, steps in itertools.product((1, 1000), (0, 1 << 60)):
        monkeypatch.setattr(session_events, "NEWEST", newest)
        monkeypatch.setattr(session_events, "MOST_STEPS", steps)
        with session_events.reading(db) as reader:
            for digits in (64, 12):
                assert (
                    session_events.find_session(reader, good["session_id_hash"][:digits]).identity
                    == good["identity_hash"]
                )


def test_reader_one_definition_of_a_session(tmp_path, monkeypatch):
    """Hostile cells and seeded mutations of good ones, in a table without types: checked one by one,
    a chunk at a time, and through the database, in which text is not UTF-8 for once."""
    good = list(row("good", discovery_refs_json='["a","b.c:d-e_f"]').values())
    assert session_events.is_session([0, *good])
    cells = [
        None,
        5,
        -1,
        2.5,
        1e400,
        1 << 62,
        True,
        "",
        "5",
        b"",
        "\n",
        "a" * 65,
        "A" * 64,
        "g" * 64,
    ]
    cells += ["0" * 64, "0" * 63, b"0" * 64, "0" * 64 + "\0", "\u0660" * 64, "1\n", "-", "é"]
    cells += [
        "[]",
        '["a"]',
        '["a", "b"]',
        '["a"',
        '["a",]',
        '["a","a"]',
        '[["a"]]',
        '{"a":"b"}',
        "null",
    ]
    cells += [json.dumps(["a"] * n) for n in (200, 201)] + [
        '["a\\n"]',
        '["%s"]' % ("a" * 129),
        '[ "a" ]',
    ]
    moments = [
        "2026-05-22T12:34:56Z",
        "2026-05-22T12:34:56.000Z",
        "2026-05-22T12:34:56.5Z",
        "2026-05-22",
    ]
    moments += ["2026-05-22T12:34:56.000z", "2026-05-22T12:34:56.000", "2026-02-30T00:00:00.000Z"]
    moments += [
        "2026-05-22T14:34:56.000+02:00",
        "2026-05-22T24:00:00.000Z",
        "0000-01-01T00:00:00.000Z",
    ]
    moments += ["2024-02-29T23:59:59.999Z", "2026-05-22 12:34:56.000Z", "2026-05-22T12:60:00.000Z"]
    every = session_events.EVER
    tried = [[*good[:n], cell, *good[n + 1 :]] for n in range(9) for cell in [*cells, *moments]]
    chance = random.Random(5)
    for _ in range(2000):
        n = chance.randrange(9)
        text = list(str(good[n]))
        for _ in range(chance.choice((1, 1, 2))):
            at = chance.randrange(len(text) + 1)
            text[at : at + chance.randrange(2)] = chance.choice(["", *'0a9zAZ-.:_ \0\n"[],é'])
        cell = "".join(text)
        tried.append(
            [*good[:n], int(cell) if n in (4, 5) and cell.isdigit() else cell, *good[n + 1 :]]
        )
    expected = [plain_check(r) for r in tried]
    assert expected == [session_events.is_session([0, *r]) for r in tried]
    assert 200 < sum(expected) < len(tried) - 500

    db = stored(tmp_path / "e.db")
    with contextlib.closing(sqlite3.connect(db)) as connection, connection:
        connection.executescript(
            "DROP TABLE session_events; CREATE TABLE session_events (id INTEGER"
            " PRIMARY KEY, %s, received_at)" % ", ".join(row(0))
        )
        connection.executemany(
            "INSERT INTO session_events (%s) VALUES (?,?,?,?,?,?,?,?,?)" % ", ".join(row(0)), tried
        )
        # The look at many rows at once may be too strict, never too lax: each row between two good.
        connection.execute("CREATE INDEX moments ON session_events (ended_at)")
    with session_events.reading(db) as reader, contextlib.closing(
        sqlite3.connect(":memory:", isolation_level=None)
    ) as one:
        one.execute("CREATE TABLE session_events (id, %s)" % ", ".join(row(0)))
        careful = session_events.Reader(one)
        taken = 0
        for r, fine in zip(tried, expected):
            one.execute("DELETE FROM session_events")
            sql = "INSERT INTO session_events VALUES (0, ?,?,?,?,?,?,?,?,?)"
            one.executemany(sql, [good, r, good])
            found = careful.looks_sound("0", "2026-05-22T24")
            beside = isinstance(r[3], str) and "0" <= r[3] < "2026-05-22T24"
            assert fine or not beside or not found, r
            taken += found and beside
        assert taken > sum(expected) // 2
        assert all(map(reader.sound, *zip(*reader.pieces(every)))) is False
    for chunk, together in ((1, 0), (50, 7), (2000, 20_000)):
        monkeypatch.setattr(session_events, "CHUNK", chunk)
        monkeypatch.setattr(session_events, "MOST_TOGETHER", together)
        with session_events.reading(db) as reader:
            assert reader.count(every) == sum(expected) == len(list(reader.walk(every)))
            assert reader.left_out == len(tried) - sum(expected)
            activity = session_events.activity(reader, every)
            assert sum(day["sessions"] for day in activity["days"]) == sum(expected)
            assert len(list(session_events.exported(reader, every))) == sum(expected)
            assert session_events.graph(reader, every, -1)["totals"]["sessions"] == sum(expected)
    with contextlib.closing(sqlite3.connect(db)) as connection, connection:
        sql = "UPDATE session_events SET plugin_version = CAST(x'31fe' AS TEXT) WHERE id = ?"
        connection.execute(sql, [expected.index(True) + 1])
    with session_events.reading(db) as reader:
        assert reader.count(every) == sum(expected) - 1
        assert expected.index(True) + 1 in reader.odd


def plain_check(cells):
    """The contract's rules once more, by hand."""
    identity, github, session, ended, tools, tokens, branch, refs, version = cells

    def text(cell, pattern):
        return isinstance(cell, str) and re.match("(?:%s)\\Z" % pattern, cell, re.ASCII) is not None

    try:
        refs = json.loads(refs) if isinstance(refs, str) else None
        form = "%Y-%m-%dT%H:%M:%S.%fZ" if len(ended) == 24 else "%Y-%m-%dT%H:%M:%SZ"
        datetime.datetime.strptime(ended, form)
    except (ValueError, TypeError):
        return False
    return (
        text(identity, "[0-9a-f]{64}")
        and text(session, "[0-9a-f]{64}")
        and (github is None or text(github, "[0-9a-f]{64}"))
        and len(ended) in (20, 24)
        and ended[10] + ended[-1] == "TZ"
        and isinstance(tools, int)
        and 0 <= tools <= 10**6
        and isinstance(tokens, int)
        and 0 <= tokens <= 10**9
        and (branch is None or text(branch, "[0-9A-Fa-f]{7,40}"))
        and isinstance(refs, list)
        and len(refs) <= 200
        and all(text(ref, "[A-Za-z0-9][A-Za-z0-9._:-]{0,127}") for ref in refs)
        and text(version, "[0-9A-Za-z][0-9A-Za-z.+_-]{0,63}")
    )


def test_reader_the_fast_way_answers_like_the_careful_one(tmp_path, monkeypatch):
    """The same sessions with and without rows beside them that are none, and with nothing sound."""
    chance = random.Random(3)
    rows = [
        row(
            n,
            chance.randrange(9),
            "2026-05-%02dT%02d:00:00.%03dZ"
            % (chance.randrange(1, 20), chance.randrange(24), chance.randrange(3)),
            ["r%d" % k for k in range(5) if chance.random() < 0.3],
            github=chance.random() < 0.5,
        )
        for n in range(200)
    ]
    clean = stored(tmp_path / "clean.db", *rows)
    beside = stored(tmp_path / "beside.db", *rows)
    with contextlib.closing(sqlite3.connect(beside)) as connection, connection:
        connection.executemany(
            "INSERT INTO session_events (identity_hash, session_id_hash, ended_at, tool_count,"
            " plugin_version) VALUES (?, ?, ?, ?, '1')",
            [
                ("a" * 64, "%064x" % n, ended, tools)
                for n, (ended, tools) in enumerate(
                    (
                        ("2026-05-03T00:00:00.000Z", 2.5),
                        ("2026-05-07T10:00:00.000+02:00", 1),
                        ("2026-05-09T24:00:00.000Z", 1),
                        ("2026-05-1", 1),
                        ("2026-05-15T00:00:00.000Z", -1),
                    )
                )
            ],
        )
    may = session_events.Window("2026-05-01T00:00:00.000Z", "2026-05-30T00:00:00.000Z")
    part = session_events.Window("2026-05-03T05:00:00.001Z", "2026-05-15T10:00:00.001Z")

    def answers(path, window):
        found = []
        with session_events.reading(path) as reader:
            for answer in ("sessions", "graph", "activity", "summary", "developers", "exported"):
                found.append(getattr(session_events, answer)(reader, window))
            found[-1] = list(found[-1])
            for sort in session_events.DISCOVERY_SORTS:
                found.append(session_events.discoveries(reader, window, 50, sort))
                for one in found[-1]["discoveries"]:
                    del one["last_aggregated_at"]
            sound = {reader.sound(*piece) for piece in reader.pieces(window)}
        return found, sound

    for window in [
        only._replace(github=github, discovery=discovery)
        for only in (may, part)
        for github in (None, True, False)
        for discovery in (None, "r1")
    ]:
        fast, sound = answers(clean, window)
        assert sound == {True}
        mixed, sound = answers(beside, window)
        assert (mixed, sound) == (fast, {True, False})
        with monkeypatch.context() as patch:
            patch.setattr(session_events.Reader, "looks_sound", lambda *_: False)
            assert answers(clean, window) == (fast, {False})


def test_reader_moments_without_a_fraction(tmp_path):
    """They stand where their instant is, in lists, cuts, first and last seen, and at a window's edges."""
    ended = [
        "12:00:00.500Z",
        "12:00:00Z",
        "12:00:00.000Z",
        "12:00:01Z",
        "11:59:59.999Z",
        "12:00:00Z",
    ]
    rows = [row(n, "d%d" % n, "2026-05-22T" + at, ["x"]) for n, at in enumerate(ended)]
    db = stored(tmp_path / "e.db", *rows)
    right = [sha("session", n) for n in (4, 1, 2, 5, 0, 3)]
    key = {
        n: "2026-05-22T" + (at if len(at) == 13 else at[:-1] + ".000Z")
        for n, at in enumerate(ended)
    }
    with session_events.reading(db) as reader:
        window = session_events.Window(**MAY)
        assert [s["session_id_hash"] for s in session_events.exported(reader, window)] == right
        for limit in range(1, 7):
            listed = session_events.sessions(reader, window, limit)["sessions"]
            assert [s["session_id_hash"] for s in listed] == right[::-1][:limit]
        path = session_events.discovery(reader, "x", window)["path"]
        assert [s["session_id_hash"] for s in path] == right
        edges = session_events.graph(reader, window)["edges"]
        assert [e["target"] for e in edges] == right[1:]
        assert (
            session_events.discoveries(reader, window)["discoveries"][0]["last_seen_at"] == key[3]
        )
        times = [*key.values(), "2026-05-22T12:00:00.250Z", "2026-05-22T12:00:00.001Z"]
        for since, until in itertools.product(times, times):
            inside = {sha("session", n) for n in key if since <= key[n] < until}
            window = session_events.Window(since, until)
            found = [
                s["session_id_hash"] for s in session_events.sessions(reader, window)["sessions"]
            ]
            assert set(found) == inside and reader.count(window) == len(inside), (since, until)


def check_discoveries(reader, window, inside, who):
    expected = []
    for ref in {ref for r in inside for ref in json.loads(r["discovery_refs_json"])}:
        touched = [r for r in inside if ref in json.loads(r["discovery_refs_json"])]
        firsts = {}
        for r in touched:
            firsts.setdefault(who[r["session_id_hash"]], r["ended_at"])
        second = sorted(firsts.values())[1] if len(firsts) > 1 else None
        half = touched[math.ceil(len(touched) / 2) - 1]["ended_at"] if len(touched) > 3 else None
        expected.append(
            {
                "discovery_id": ref,
                "session_count": len(touched),
                "distinct_identity_count": len({r["identity_hash"] for r in touched}),
                "first_seen_at": touched[0]["ended_at"],
                "last_seen_at": touched[-1]["ended_at"],
                "developer_count": len(firsts),
                "hours_to_second_developer": hours_between(touched[0]["ended_at"], second),
                "half_life_hours": hours_between(touched[0]["ended_at"], half),
            }
        )
    for sort, column in (
        ("session_count", "session_count"),
        ("distinct_identity_count", "distinct_identity_count"),
        ("recent", "last_seen_at"),
    ):
        ranked = sorted(expected, key=lambda d: d["discovery_id"])
        ranked.sort(key=lambda d: d[column], reverse=True)
        for limit in (1, 4, 100):
            listed = session_events.discoveries(reader, window, limit, sort)["discoveries"]
            assert all(sum(d["counts"]) == d["session_count"] for d in listed)
            assert [{k: d[k] for k in expected[0]} for d in listed] == ranked[:limit], (sort, limit)
    for sort in session_events.DISCOVERY_SORTS:
        listed = session_events.discoveries(reader, window, 100, sort)["discoveries"]
        assert {d["discovery_id"] for d in listed} == {d["discovery_id"] for d in expected}


def hours_between(start, end):
    if end is None:
        return None
    start, end = (datetime.datetime.strptime(t, "%Y-%m-%dT%H:%M:%S.%fZ") for t in (start, end))
    return round((end - start).total_seconds() / 3600, 2)


def check_figures(reader, window, rows, inside, who):
    """`summary` and `developers` by the definitions, every session with every one before it."""
    found = session_events.summary(reader, window)
    developers = {who[r["session_id_hash"]] for r in inside}
    refs = [set(json.loads(r["discovery_refs_json"])) for r in inside]
    names = [who[r["session_id_hash"]] for r in inside]
    built = [
        any(names[j] != names[i] and refs[i] & refs[j] for j in range(i))
        for i in range(len(inside))
    ]
    reach, firsts, given, received = {}, {}, collections.Counter(), collections.Counter()
    for i, r in enumerate(inside):
        for ref in refs[i]:
            firsts.setdefault(ref, r["ended_at"])
            reach.setdefault(ref, {}).setdefault(names[i], r["ended_at"])
            before = [j for j in range(i) if ref in refs[j]]
            if before and names[before[-1]] != names[i]:
                given[names[before[-1]], names[i]] += 1
                received[names[i]] += 1

    def middle(values):
        return round(statistics.median(values), 2) if values else None

    tokens = [r["tokens_saved"] for r in inside]
    waits = [
        hours_between(firsts[ref], sorted(d.values())[1]) for ref, d in reach.items() if len(d) > 1
    ]
    far = min(
        reach, key=lambda ref: (-len(reach[ref]), -sum(ref in r for r in refs), ref), default=None
    )
    assert (found["sessions"], found["developers"]) == (len(inside), len(developers))
    assert (found["discoveries"], found["shared_discoveries"]) == (len(reach), len(waits))
    assert (found["tokens_saved"], found["tool_count"]) == (
        sum(tokens),
        sum(r["tool_count"] for r in inside),
    )
    assert found["hand_overs"] == sum(given.values())
    assert found["furthest"] == (
        {
            "discovery_id": far,
            "developers": len(reach[far]),
            "hours": hours_between(firsts[far], max(reach[far].values())),
        }
        if far
        else None
    )
    share = round(sum(built) / len(inside), 4) if inside else None
    assert found["built_on_others"] == {"sessions": sum(built), "share": share}
    assert found["tokens_saved_median"] == {
        "built_on_others": middle([t for t, b in zip(tokens, built) if b]),
        "others": middle([t for t, b in zip(tokens, built) if not b]),
    }
    assert found["hours_to_second_developer"] == middle(waits)
    earlier = found["before"]
    there = {
        key
        for r in rows
        if earlier["since"] <= r["ended_at"] < earlier["until"]
        for key in (r["identity_hash"], r["github_hash"])
    }
    window_rows = [r for r in rows if window.since <= r["ended_at"] < window.until]
    everybody = reference_developers(window_rows)
    known = {
        everybody[r["session_id_hash"]]
        for r in window_rows
        if there & {r["identity_hash"], r["github_hash"]} - {None}
    }
    alone = {}
    for developer in developers:
        own = [b for b, name in zip(built, names) if name == developer]
        alone[developer] = own.index(True) if True in own else None
    fresh = {d: alone[d] for d in developers - known}
    cold = [n for n in fresh.values() if n is not None]
    expected = {"developers": len(fresh), "sessions": middle(cold), "never": len(fresh) - len(cold)}
    assert found["cold_start"] == expected
    listed = session_events.developers(reader, window)
    shown = session_events.labels(developers)
    assert {
        d["developer"]: (
            d["sessions"],
            d["given"],
            d["received"],
            d["sessions_before_inherited"],
            d["new"],
        )
        for d in listed["developers"]
    } == {
        shown[d]: (
            names.count(d),
            sum(n for (a, _), n in given.items() if a == d),
            received[d],
            alone[d],
            d in fresh,
        )
        for d in developers
    }
    assert {(m["source"], m["target"]): m["hand_overs"] for m in listed["matrix"]} == {
        (shown[a], shown[b]): n for (a, b), n in given.items()
    }


def stranger(chance, path):
    """A small database of another program: columns without types under another collation, two GitHub
    hashes of one identity, cells that break a rule. (its path, the sessions in it in time order)."""
    rows = []
    for n in range(chance.randrange(25)):
        ended = "2026-05-%02dT%02d:00:00" % (chance.choice((1, 2, 3, 9, 20)), chance.randrange(24))
        refs = dict.fromkeys("r%d" % chance.randrange(4) for _ in range(chance.randrange(4)))
        who, tokens = chance.randrange(4), chance.randrange(1000)
        ended += chance.choice((".000Z", ".500Z", "Z"))
        one = row(n, who, ended, refs, tokens_saved=tokens)
        one["github_hash"] = chance.choice((None, None, sha("login", who), sha("other", who)))
        if chance.random() < 0.2:
            one[chance.choice(list(one))] = chance.choice((*STRANGE, None))
        rows.append(one)
    db = stored(path)
    with contextlib.closing(sqlite3.connect(db)) as connection, connection:
        columns = ", ".join("%s COLLATE NOCASE" % name for name in row(0))
        connection.executescript(
            "DROP TABLE session_events; CREATE TABLE session_events (id INTEGER PRIMARY KEY, %s)"
            % (columns + ", received_at")
        )
        for n, one in enumerate(rows):
            sql = "INSERT INTO session_events (id, %s) VALUES (?,?,?,?,?,?,?,?,?,?)" % ", ".join(
                one
            )
            connection.execute(sql, [n, *one.values()])
            if plain_check(list(one.values())):
                refs = [(ref, n) for ref in json.loads(one["discovery_refs_json"])]
                connection.executemany("INSERT INTO session_discoveries VALUES (?, ?)", refs)
    good = [one for one in rows if plain_check(list(one.values()))]
    for one in good:
        if len(one["ended_at"]) == 20:
            one["ended_at"] = one["ended_at"][:-1] + ".000Z"
    return db, sorted(good, key=lambda one: one["ended_at"])


STRANGE = (b"x", -1, "zz", "2026-05-02T10:00:00+02:00", "2026-02-30T00:00:00.000Z", 1e400, "null")
STRANGE += ("A" * 64, b"0" * 64, '["a b"]', '{"a": "b"}', "2026-05-02t10:00:00z", "5", 10**12)


def test_reader_databases_of_other_programs(tmp_path):
    """Every figure of random small ones against the reference, which sees the sessions alone."""
    for seed in range(15):
        db, rows = stranger(random.Random(seed), tmp_path / ("%d.db" % seed))
        for since, until, github in (
            ("2026-05-01", "2026-05-31", None),
            ("2026-05-02", "2026-05-04", True),
            ("2026-05-01T05:00:00.250Z", "2026-05-09T10:00:00.500Z", False),
        ):
            window = session_events.window_between(7, since, until, github, None)
            timed = [r for r in rows if window.since <= r["ended_at"] < window.until]
            inside = [r for r in timed if github in (None, r["github_hash"] is not None)]
            who = reference_developers(timed)
            with session_events.reading(db) as reader:
                exported = [s["session_id_hash"] for s in session_events.exported(reader, window)]
                assert exported == [r["session_id_hash"] for r in inside], seed
                assert session_events.sessions(reader, window, 1)["total_count_in_window"] == len(
                    inside
                )
                if inside:
                    check_discoveries(reader, window, inside, who)
                check_figures(reader, window, rows, inside, who)


def test_reader_prefixes_that_look_alike():
    keys = ["ab" * 32, "ab" * 5 + "cd" * 27, "ab" * 5 + "ce" * 27, "0" * 64]
    assert session_events.labels(keys) == {
        keys[0]: keys[0][:11],
        keys[1]: keys[1][:12],
        keys[2]: keys[2][:12],
        keys[3]: "0" * 8,
    }


HOSTILE_REFS = [
    "</script><script>document.title='owned'</script>",
    "\"'><img src=x onerror=\"document.title='owned'\">",
    "\u202egnp.exe\u2066",
    "\x1b]0;owned\x07\x1b[31m",
    '=HYPERLINK("http://example.com")',
    "<!--",
    "\\",
    "a\nb\rc\x00d",
    "\U0001f600",
    "&amp;&#60;",
    "x" * 5000,
]
JUNK = (
    None,
    5,
    -1,
    2.5,
    10**18,
    b"\xff\x00",
    "",
    "zzzz",
    "</script>",
    "\x1b[2J",
    "2026-05-99T00:00:00.000Z",
)


def hostile_rows():
    """A row with every hostile discovery, and for each column and each junk a row that has it there."""
    rows = [row("hostile", "mallory", "2026-05-20T10:00:00.000Z", HOSTILE_REFS)]
    refs = ["[[[[", "{}", '[1, null, {"a": []}, "kept"]', "null", "[" * 100000, '["\\ud800"]']
    refs += ['[ "x", "\\u0079" ]', json.dumps(["x"] * 201)]
    rows += [
        row("refs %d" % n, "mallory", "2026-05-20T11:00:00.000Z", discovery_refs_json=text)
        for n, text in enumerate(refs)
    ]
    for column in row(0):
        for n, junk in enumerate(JUNK):
            rows.append(
                row(
                    "%s %d" % (column, n),
                    "mallory",
                    "2026-05-20T12:00:00.000Z",
                    ["x"],
                    **{column: junk},
                )
            )
    return rows


# Those of them that are sessions: NULL where it may be, and numbers, which the column turns into text.
KEPT = (
    "refs 6",
    "github_hash 0",
    "branch_sha 0",
    "tool_count 1",
    "tokens_saved 1",
    "plugin_version 1",
)
KEPT += ("plugin_version 3", "plugin_version 4", "plugin_version 7", "branch_sha 4")


def looser(db):
    """A table like the contract's that forbids nothing: what a program that ignores the contract could
    leave."""
    with contextlib.closing(sqlite3.connect(str(db), isolation_level=None)) as connection:
        schema = (
            (ROOT / "schema.sql")
            .read_text()
            .replace(" NOT NULL", "")
            .replace("UNIQUE INDEX", "INDEX")
        )
        connection.executescript(schema)
        connection.execute("DROP TRIGGER session_events_discoveries_insert")
        for r in hostile_rows():
            connection.execute(
                "INSERT INTO session_events (%s) VALUES (%s)"
                % (", ".join(r), ", ".join("?" * len(r))),
                list(r.values()),
            )
        connection.executescript(schema)
        connection.execute("INSERT INTO session_discoveries VALUES (?, 1), (?, 2)", (b"\xff", 7.5))
        connection.execute(
            "UPDATE session_events SET plugin_version = CAST(x'fffe' AS TEXT) WHERE id = 1"
        )
    return str(db)


def commands(db, session):
    """Every reading command in every form."""
    asked = {
        "sessions": [],
        "session": [session],
        "discoveries": [],
        "discovery": ["x"],
        "graph": [],
        "activity": [],
        "developers": [],
        "summary": [],
        "export": [],
    }
    assert sorted(asked) == sorted(session_events.QUESTIONS)
    for name, arguments in asked.items():
        window = [] if name == "session" else IN_MAY
        for form in session_events.QUESTIONS[name].forms:
            yield name, form, [name, *arguments, "--db", db, *window, "--format", form]


def answered(capfdbinary, argv):
    """(exit status, standard output, standard error) of a command run in this process."""
    capfdbinary.readouterr()
    status = session_events.main(list(map(str, argv)))
    out, err = capfdbinary.readouterr()
    return status, out.decode(), err.decode()


def test_reader_hostile_rows_change_nothing(tmp_path, capfdbinary):
    """What is no session is left out of every command and counted; what a hostile row holds is never shown."""
    db = looser(tmp_path / "hostile.db")
    for name, form, argv in commands(db, sha("session refs 6")):
        status, out, err = answered(capfdbinary, argv)
        assert status == 0, (name, form, err)
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u206f\ud800-\udfff]", out), (
            name,
            form,
        )
        if form == "json":
            json.loads(out)
        if form == "jsonl":
            assert all(json.loads(line) for line in out.splitlines())
        if form == "csv":
            assert not re.search(r"(?m)(^|,)\"?[=+@]", out), name
        if form == "html":
            assert (
                out.lower().count("<script") == out.lower().count("</script") == 2
                and "<img" not in out
            )
    filters = session_events.Filters(since="2026-05-01", until="2026-06-01")
    with session_events.reading(db) as reader:
        pages = [
            session_events.replay_page(reader, filters),
            session_events.sessions_page(reader, filters),
            session_events.discoveries_page(reader, filters, "recent"),
        ]
        for ref in HOSTILE_REFS:
            with pytest.raises(session_events.NotFound):
                session_events.discovery(reader, ref, filters.window())
    for page in pages:
        assert "<img" not in page and "owned" not in page and "\x1b" not in page
        assert "\u202e" not in page and page.count("<script") == page.count("</script")
    status, out, err = answered(
        capfdbinary, ["sessions", "--db", db, *IN_MAY, "--limit", 1000, "--format", "json"]
    )
    left = {s["session_id_hash"] for s in json.loads(out)["sessions"]}
    assert {s: n for s, n in ((sha("session", n), n) for n in KEPT) if s not in left} == {}
    assert len(left) == len(KEPT)
    # "5", "2.5" and "1000000000000000000" are no moments, but as text they stand outside of May.
    assert "left out: %d rows" % (len(hostile_rows()) - len(KEPT) - 3) in err


def test_reader_what_it_refuses(tmp_path, capfdbinary):
    """Each way in which a file is no session-event store: one line that says which, exit status 1."""
    good = stored(tmp_path / "good.db", *STORY)
    other = tmp_path / "other.db"
    sqlite3.connect(str(other)).execute("CREATE TABLE t (x)").connection.close()
    (tmp_path / "text.db").write_bytes(b"not a database, but long enough to look like one" * 40)
    (tmp_path / "empty.db").write_bytes(b"")
    shutil.copy(good, str(tmp_path / "cut.db"))
    with open(str(tmp_path / "cut.db"), "r+b") as file:
        file.seek(5000)
        file.write(b"\xee" * 40000)

    def changed(name, *statements):
        with contextlib.closing(sqlite3.connect(stored(tmp_path / name))) as connection:
            for statement in statements:
                connection.execute(statement)
            connection.commit()

    changed("v0.db", "PRAGMA user_version = 0")
    changed("v2.db", "PRAGMA user_version = 2")
    changed("lacks.db", "DROP TABLE session_discoveries")
    changed(
        "column.db",
        "DROP TABLE session_discoveries",
        "CREATE TABLE session_discoveries (discovery_ref)",
    )
    for name, says in (
        ("none.db", "there is no file"),
        (".", "is not a file"),
        ("text.db", "not an SQLite database"),
        ("empty.db", "holds no session events"),
        ("other.db", "holds no session events"),
        ("cut.db", "damaged"),
        ("v0.db", "start server.py on it once"),
        ("v2.db", "schema version 2"),
        ("lacks.db", "session_discoveries lacks discovery_ref, event_id"),
        ("column.db", "lacks event_id"),
    ):
        for command in ("sessions", "graph"):
            status, out, err = answered(capfdbinary, [command, "--db", tmp_path / name, *IN_MAY])
            assert (status, out, err.count("\n")) == (1, "", 1) and says in err, (name, err)
    assert not (tmp_path / "none.db").exists()
    for argv, says, expected in (
        (["session", "ffff", "--db", good], "no session starts", 1),
        (["session", "xyz", "--db", good], "4 to 64 hex digits", 1),
        (["discovery", "nobody", "--db", good, *IN_MAY], "no session of this window", 1),
        (["discovery", "\udcff", "--db", good, *IN_MAY], "no session of this window", 1),
        (["sessions", "--db", good, "--since", "yesterday"], "--since takes a date", 2),
        (["sessions", "--db", good, "--since", "2026-05-01", "--days", "3"], "give one", 2),
        (
            ["sessions", "--db", good, "--since", "2026-05-02", "--until", "2026-05-01"],
            "must be after",
            2,
        ),
        (
            ["sessions", "--db", good, "--since", "2020-01-01", "--until", "2020-02-01"],
            "nothing in this window",
            0,
        ),
        (["export", "--db", good, "--until", "2020-02-01"], "nothing in this window", 0),
    ):
        status, out, err = answered(capfdbinary, argv)
        assert (status, says in err) == (expected, True), (argv, err)
    for argv in (
        [],
        ["sessions"],
        ["sessions", "--db", good, "--days", "0"],
        ["sessions", "--db", good, "--days", "x"],
        ["view", "--db", good, "--port", "65536"],
    ):
        with pytest.raises(SystemExit) as stopped:
            session_events.main(argv)
        assert stopped.value.code == 2


def test_reader_an_ambiguous_prefix_says_which(tmp_path, capfdbinary):
    hashes = ["abcd1" + "0" * 59, "abcd2" + "0" * 59, "abcd2" + "1" * 59]
    db = stored(tmp_path / "e.db", *[row(n, session_id_hash=h) for n, h in enumerate(hashes)])
    status, _, err = answered(capfdbinary, ["session", "abcd", "--db", db])
    assert status == 1 and "3 sessions start with these digits" in err and hashes[1][:16] in err
    status, out, _ = answered(capfdbinary, ["session", "ABCD1", "--db", db])
    assert status == 0 and hashes[0] in out


def test_reader_forms_for_people_and_programs(tmp_path, capfdbinary):
    rows = [
        *STORY,
        row(
            "wide",
            "dee",
            "2026-05-30T00:00:00.000Z",
            ["r" * 128] * 3,
            tool_count=10**6,
            tokens_saved=10**9,
        ),
        *[row(100 + n, "dev%d" % n, "2026-05-25T00:00:00.000Z", ["x"]) for n in range(30)],
    ]
    db = stored(tmp_path / "e.db", *rows)
    texts = {}
    for name, form, argv in commands(db, sha("session", 1)):
        status, texts[name, form], err = answered(capfdbinary, argv)
        assert (status, err) == (0, ""), (name, form)
        if form == "text":
            assert max(map(len, texts[name, form].splitlines())) <= 80, name
    exported = [json.loads(line) for line in texts["export", "jsonl"].splitlines()]
    assert exported == json.loads(texts["export", "json"]) and len(exported) == len(rows) - 1
    assert exported[0] == dict(story_session(1), developer=ANN[:8], plugin_version="1.31.0")
    listed = list(csv.DictReader(io.StringIO(texts["export", "csv"])))
    assert [r["session_id_hash"] for r in listed] == [r["session_id_hash"] for r in exported]
    assert listed[0]["discovery_refs"] == "x y"
    assert next(csv.DictReader(io.StringIO(texts["graph", "csv"])))["discoveries"] == "x"
    dot = texts["graph", "dot"]
    assert '"%s" -> "%s" [label="x" color' % (sha("session 1"), sha("session 2")) in dot
    assert dot.count("{") == dot.count("}")
    assert (
        "default-src 'none'" in texts["graph", "html"] and 'href="/' not in texts["graph", "html"]
    )


def test_reader_as_a_program(tmp_path):
    """Alone in a folder, without site-packages; help with an example; a reader of the output that leaves
    early."""
    shutil.copy(str(ROOT / "session_events.py"), str(tmp_path))
    for python in interpreters((3, 8)).values():
        done = subprocess.run(
            [
                python,
                "-I",
                "-S",
                "session_events.py",
                "demo",
                "--db",
                "demo%s.db" % abs(hash(python)),
            ],
            cwd=str(tmp_path),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            timeout=60,
        )
        assert done.returncode == 0 and b"synthetic" in done.stdout
    first, *others = [
        read("export", "--days", 60, "--db", path).stdout for path in tmp_path.glob("*.db")
    ]
    assert len(first) > 50_000 and all(
        other == first for other in others
    )  # the same in every Python
    for command in [[], *[[name] for name in (*session_events.QUESTIONS, *session_events.ACTIONS)]]:
        assert "example: python3 session_events.py" in read(*command, "--help").stdout
    db = next(iter(tmp_path.glob("*.db")))
    again = read("demo", "--db", db)
    assert again.returncode == 1 and "is there already" in again.stderr
    process = subprocess.Popen(
        [
            sys.executable,
            str(ROOT / "session_events.py"),
            "export",
            "--days",
            "60",
            "--db",
            str(db),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 128 + signal.SIGPIPE and process.stderr.read() == b""
    process.stderr.close()


PEAK = """import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(end.code, peak.split()[1], file=sys.stderr)
"""


def test_reader_export_in_constant_memory(tmp_path):
    """Ten times the rows may not need noticeably more memory; and a terminal sees how far it is."""
    peaks = []
    for count in (5_000, 50_000):
        db = stored(
            tmp_path / ("%d.db" % count), *(row(n, n % 50, refs=["x"]) for n in range(count))
        )
        if os.path.exists("/proc/self/status"):
            done = subprocess.run(
                [
                    sys.executable,
                    "-c",
                    PEAK,
                    str(ROOT / "session_events.py"),
                    "export",
                    "--db",
                    db,
                    *IN_MAY,
                ],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                timeout=120,
            )
            status, peak = done.stderr.split()[-2:]
            assert status == b"0" and done.stdout.count(b"\n") == count
            peaks.append(int(peak))
    assert (
        not peaks or peaks[1] < peaks[0] + 16_000
    )  # KiB; 45,000 rows as Python objects would be 60,000
    if hasattr(os, "openpty"):
        ours, theirs = os.openpty()
        subprocess.run(
            [sys.executable, str(ROOT / "session_events.py"), "export", "--db", db, *IN_MAY],
            stdout=subprocess.DEVNULL,
            stderr=theirs,
            timeout=120,
        )
        os.close(theirs)
        shown = os.read(ours, 1 << 16)
        assert b"\r5,000 of 50,000 sessions\r10,000 of" in shown
        assert shown.endswith(b"\r50,000 of 50,000 sessions\r\n")
        os.close(ours)


def test_reader_every_condition_of_the_file(tmp_path, monkeypatch):
    """A server in the middle of writing, gone cleanly, killed; a folder where nobody may write; a lock."""
    folder = tmp_path / "a folder? with #odd%20 characters"
    folder.mkdir()
    db = stored(folder / "e.db", *STORY)

    def count():
        with session_events.reading(db) as reader:
            return reader.count(session_events.EVER)

    assert count() == 5  # closed cleanly, no -wal there
    writer = sqlite3.connect(db, isolation_level=None)
    writer.execute("PRAGMA wal_autocheckpoint=0")
    writer.execute("BEGIN IMMEDIATE")
    writer.execute("DELETE FROM session_events WHERE tool_count = 1")
    assert count() == 5  # not committed
    with session_events.reading(db) as reader:
        assert reader.count(session_events.EVER) == 5
        writer.execute("COMMIT")
        assert reader.count(session_events.EVER) == 5  # one moment for the whole command
    assert count() == 4
    copied = tmp_path / "copied"  # as after a kill: changes wait in the -wal file
    shutil.copytree(str(folder), str(copied))
    writer.close()
    for suffix in ("-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(db + suffix)
    os.unlink(str(copied / "e.db-shm"))
    sealed = [forked_count(folder), forked_count(copied)]
    assert sealed[0] == "4", sealed
    assert "-wal file" in sealed[1], sealed  # never the old state as if it were the new one

    monkeypatch.setattr(session_events, "BUSY_SECONDS", 0.1)
    locked = stored(tmp_path / "locked.db", *STORY, journal="DELETE")
    with contextlib.closing(sqlite3.connect(locked, isolation_level=None)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        with pytest.raises(session_events.Refused, match="keeps it locked"):
            with session_events.reading(locked):
                pass


def forked_count(folder):
    """What a user who may only read there gets: the number of rows, or what the refusal says."""
    for path in (folder, *folder.iterdir(), *folder.parents):
        with contextlib.suppress(PermissionError):
            path.chmod(0o755 if path in folder.parents else 0o555 if path.is_dir() else 0o444)
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        said = "the child failed"
        try:
            if os.getuid() == 0:
                os.setuid(65534)
            with session_events.reading(str(folder / "e.db")) as reader:
                said = str(reader.count(session_events.EVER))
        except session_events.Refused as error:
            said = str(error)
        finally:
            os.write(theirs, said.encode())
            os._exit(0)
    os.close(theirs)
    with open(ours, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(child, 0)
    folder.chmod(0o755)
    return said


def test_reader_queries_use_the_indexes(tmp_path):
    """What keeps the answers fast at a million rows: no plan reads the table from end to end or sorts a
    window."""
    db = stored(tmp_path / "e.db", *STORY)
    plans = []
    with session_events.reading(db) as reader:
        rows = reader.rows

        def watched(sql, values=()):
            with reader.texts(str):
                plans.extend((sql, line[3]) for line in rows("EXPLAIN QUERY PLAN " + sql, values))
            return rows(sql, values)

        reader.rows = watched
        window = session_events.Window(**MAY)
        session_events.sessions(reader, window)
        session_events.graph(reader, window)
        session_events.session(reader, sha("session", 1)[:8])
        session_events.session(reader, sha("session", 1))
        session_events.discoveries(reader, window)
        session_events.discoveries(reader, window, sort="recent")
        session_events.discovery(reader, "x", window)
    assert len(plans) > 8
    for sql, step in plans:
        assert not re.fullmatch(r"SCAN (TABLE )?(session_events|e)", step), sql
        if "TEMP B-TREE FOR ORDER BY" in step:
            assert "discovery_ref = ?" in sql, sql


def http(address, path="/", headers=(), method="GET", raw=None):
    """(status, headers, body) of one exchange with a viewer; `raw`: bytes to send in place of a request."""
    with socket.create_connection(address, 60) as connection:
        lines = [
            "%s %s HTTP/1.1" % (method, path),
            *(
                "%s: %s" % header
                for header in dict({"Host": "127.0.0.1:%d" % address[1]}, **dict(headers)).items()
            ),
        ]
        connection.sendall(raw or ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))
        connection.shutdown(socket.SHUT_WR)
        with connection.makefile("rb") as answer:
            data = answer.read()
    head, _, body = data.partition(b"\r\n\r\n")
    first, *fields = head.decode("latin-1").split("\r\n")
    return (
        int(first.split()[1]),
        {k.lower(): v for k, v in (f.split(": ", 1) for f in fields)},
        body.decode(),
    )


class View:
    """A real `session_events.py view` process. `.address` to connect to, `.url` with its one-time token."""

    def __init__(self, db, *flags, **variables):
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")
        }
        environment.pop(session_events.ADMIN_TOKEN_VARIABLE, None)
        command = ["view", "--db", str(db)] if db else ["demo"]
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "session_events.py"), *command, "--port", "0", *flags],
            env=dict(environment, **variables),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # a job in the background ignores it
        self.said = []
        while not self.said or not self.said[-1].startswith("open "):
            line = self.process.stdout.readline().decode()
            assert line, self.process.stderr.read()
            self.said.append(line.strip())
        self.url = self.said[-1].split()[1]
        self.base = self.url.partition("/?")[0]
        self.address = ("127.0.0.1", int(self.base.rpartition(":")[2]))

    def __enter__(self):
        return self

    def cookie(self):
        status, headers, _ = http(self.address, self.url[len(self.base) :])
        assert status == 303
        return headers["set-cookie"].split(";")[0]

    def __exit__(self, *error):
        self.process.send_signal(signal.SIGINT)
        try:
            self.status = self.process.wait(60)
        finally:
            self.process.kill()
        self.complaints = self.process.stderr.read().decode()
        self.process.stdout.close()
        self.process.stderr.close()


def test_reader_the_door_of_the_viewer(tmp_path):
    """The token opens once; without the cookie, or under another name, nothing; no other site is allowed
    anything."""
    db = stored(tmp_path / "e.db", *STORY)
    with View(db) as view:
        inside = [
            (path, "x")
            for path in (
                "/",
                "/sessions",
                "/session/" + sha("session 1"),
                "/discovery?ref=x",
                "/nowhere",
            )
        ]
        refused = {http(view.address, path)[::2] for path, _ in inside}
        assert (
            len(refused) == 1 and next(iter(refused))[0] == 403
        )  # the same answer, whatever there is
        assert http(view.address, "/?token=wrong")[0] == 403
        status, headers, _ = http(view.address, view.url[len(view.base) :] + "&days=30")
        assert (status, headers["location"]) == (303, "/?days=30")
        assert re.fullmatch(
            r"session_events_%d=[\w-]{32}; Path=/; HttpOnly; SameSite=Strict" % view.address[1],
            headers["set-cookie"],
        )
        cookie = {"Cookie": "other=1; " + headers["set-cookie"].split(";")[0]}
        for guess in ("=", "=x", "=" + "A" * 32, ""):
            assert (
                http(
                    view.address, "/", {"Cookie": "session_events_%d%s" % (view.address[1], guess)}
                )[0]
                == 403
            )
        assert http(view.address, view.url[len(view.base) :])[0] == 403  # used
        # ... but for who is inside already
        assert http(view.address, view.url[len(view.base) :], cookie)[0] == 303
        for host in (
            "evil.example",
            "evil.example:%d" % view.address[1],
            "127.0.0.1.evil.example",
            "",
            "localhost@evil",
        ):
            assert http(view.address, "/", dict(cookie, Host=host))[0] == 403, host
        for host in (
            "localhost:%d" % view.address[1],
            "LOCALHOST",
            "127.0.0.1:9000",
        ):  # 9000: an SSH tunnel
            assert http(view.address, "/", dict(cookie, Host=host))[0] == 200, host
        status, headers, body = http(view.address, "/?days=9999", cookie)
        assert status == 200 and "<svg" in body and headers["server"] == "session-events"
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert (
            headers["cache-control"] == "no-store" and headers["referrer-policy"] == "no-referrer"
        )
        assert not any(name.startswith("access-control") for name in headers)
        for path, expected in (
            ("/sessions", 200),
            ("/discoveries?sort=nonsense&days=x", 200),
            ("/activity", 200),
            ("/session/" + sha("session 1"), 200),
            ("/session/" + "0" * 64, 404),
            ("/session/", 404),
            ("/discovery?ref=x", 200),
            ("/discovery?ref=%ff%00", 404),
            ("/discovery", 404),
            ("/nowhere", 404),
            ("//evil.example/", 404),
            ("/?since=%FF&until=2026-99-99&github=3", 200),
            ("/?" + "&".join("a%d=1" % n for n in range(99)), 200),
        ):
            assert http(view.address, path, cookie)[0] == expected, path
        status, headers, body = http(view.address, "/sessions", cookie, "HEAD")
        assert (status, body) == (200, "") and int(headers["content-length"]) > 1000
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "PATCH"):
            status, headers, _ = http(view.address, "/", cookie, method)
            assert (status, headers["allow"]) == (405, "GET, HEAD")
        for raw in (
            b"\x16\x03\x01\x02\x00\r\n\r\n",
            b"GET\r\n\r\n",
            b"GET / HTTP/9.9\r\n\r\n",
            b"BREW / HTTP/1.1\r\n\r\n",
            b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\n\r\n",
            b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n",
        ):
            status, headers, body = http(view.address, raw=raw)
            assert status >= 400 and body == "The request is not understood.\n"
            assert headers["server"] == "session-events"
        taken = read("view", "--db", db, "--port", view.address[1])
        assert taken.returncode == 1 and "--port 0" in taken.stderr
    assert (view.status, view.complaints) == (0, "")


def test_reader_the_endpoints_to_the_letter(tmp_path):
    """CONTRACT §7, line by line."""
    now = datetime.datetime.now(datetime.timezone.utc)

    def ago(days, **more):
        return (now - datetime.timedelta(days=days, **more)).strftime("%Y-%m-%dT%H:%M:%S.000Z")

    rows = [
        row(n, "ann", ago(0, minutes=n), ["x", "r%d" % n], github=n % 2 == 0) for n in range(1, 61)
    ]
    rows += [row("d%d" % days, "bob", ago(days), ["x"]) for days in (6, 8, 29, 31, 89, 91)]
    db = stored(tmp_path / "e.db", *rows)
    secret = "a token"
    with View(db) as view:
        for path in (
            "/admin/sessions",
            "/admin/sessions/" + sha("session 1"),
            "/admin/discoveries/propagation",
        ):
            for headers in (
                {},
                {"Authorization": "Bearer " + secret},
                {"Cookie": view.process and "x=1"},
            ):
                status, _, body = http(view.address, path, headers)
                assert status == 503 and sorted(json.loads(body)) == ["error", "requestId"]
                assert (
                    json.loads(body)["error"]
                    == "Endpoint disabled (admin trigger token not configured)"
                )
    with View(db, **{session_events.ADMIN_TOKEN_VARIABLE: secret}) as view:
        allowed = {"Authorization": "Bearer " + secret}

        def get(path, headers=allowed):
            status, _, body = http(view.address, path, headers)
            body = json.loads(body)
            assert re.fullmatch("[0-9a-f]{32}", body.pop("requestId"))
            return status, body

        for wrong in (
            {},
            {"Authorization": "Bearer b token"},
            {"Authorization": "Bearer a"},
            {"Authorization": secret},
            {"Authorization": "Bearer " + secret * 2},
            {"Authorization": "Basic " + secret},
            {"Authorization": "Bearer "},
            {"Authorization": "Bearer \xff"},
            {"Cookie": view.cookie()},
        ):
            for path in ("/admin/sessions", "/admin/sessions/zzz", "/admin/nowhere"):
                assert get(path, wrong) == (401, {"error": "Unauthorized"}), wrong
        status, body = get("/admin/sessions")
        assert status == 200 and sorted(body) == ["sessions", "total_count_in_window"]
        assert body["total_count_in_window"] == 61 and len(body["sessions"]) == 50
        assert body["sessions"][0] == {
            "session_id_hash": sha("session 1"),
            "identity_hash_prefix": sha("identity ann")[:8],
            "github_hash_prefix": None,
            "ended_at": rows[0]["ended_at"],
            "tool_count": 10,
            "tokens_saved": 100,
            "branch_sha": "abc123def456",
            "discovery_refs": ["x", "r1"],
        }
        assert [s["ended_at"] for s in body["sessions"]] == sorted(
            (s["ended_at"] for s in body["sessions"]), reverse=True
        )
        for query, total, listed in (
            ("days=90", 65, 50),
            ("days=91", 65, 50),
            ("days=" + "9" * 5000, 65, 50),
            ("days=30&limit=200", 63, 63),
            ("limit=1", 61, 1),
            ("limit=201", 61, 61),
            ("limit=0", 61, 50),
            ("limit=-1", 61, 50),
            ("limit=1.5", 61, 50),
            ("days=x&limit=x", 61, 50),
            ("days=0", 61, 50),
            ("days=%D9%A3", 61, 50),
            ("logged_in=true", 31, 31),
            ("logged_in=false&limit=9", 30, 9),
            ("logged_in=maybe", 61, 50),
            ("days=7&days=90", 61, 50),
        ):
            status, body = get("/admin/sessions?" + query)
            answer = (status, body["total_count_in_window"], len(body["sessions"]))
            assert answer == (200, total, listed), query[:40]
        status, body = get("/admin/sessions/" + sha("session d8"))
        assert status == 200 and sorted(body) == ["related", "session"]
        assert (
            body["session"]["session_id_hash"] == sha("session d8")
            and "developer" not in body["session"]
        )
        assert [s["session_id_hash"] for s in body["related"]] == [
            sha("session d6"),
            sha("session d29"),
        ]
        assert len(get("/admin/sessions/" + sha("session 1"))[1]["related"]) == 50
        for unknown in (
            "0" * 64,
            "zzz",
            sha("session 1")[:63],
            sha("session 1") + "0",
            sha("session 1").upper(),
            "%00",
            sha("session 1") + "%0a",
            "",
        ):
            assert get("/admin/sessions/" + unknown) == (404, {"error": "Not found"}), unknown
        status, body = get("/admin/discoveries/propagation")
        assert status == 200 and len(body["discoveries"]) == 50
        first = body["discoveries"][0]
        assert sorted(first) == [
            "discovery_id",
            "distinct_identity_count",
            "first_seen_at",
            "last_aggregated_at",
            "last_seen_at",
            "session_count",
        ]
        assert (first["discovery_id"], first["session_count"]) == ("x", 66)
        assert first["distinct_identity_count"] == 2
        assert (first["first_seen_at"], first["last_seen_at"]) == (
            rows[-1]["ended_at"],
            rows[0]["ended_at"],
        )
        for sort in ("session_count", "distinct_identity_count", "recent", "nonsense"):
            listed = get("/admin/discoveries/propagation?limit=501&sort=" + sort)[1]["discoveries"]
            assert len(listed) == 61 and not re.search("[0-9a-f]{64}", json.dumps(listed))
            if sort == "recent":
                assert [d["discovery_id"] for d in listed[:3]] == ["r1", "x", "r2"]
        assert http(view.address, "/admin/sessions", allowed, "POST")[0] == 405
        os.rename(db, db + ".away")
        assert get("/admin/sessions")[0] == 503
    assert (view.status, view.complaints) == (0, "")


def test_reader_no_output_has_a_whole_developer(tmp_path, capfdbinary):
    """CONTRACT §8 for the reading side: whatever is shown of a developer is a prefix; a log is not written at
    all."""
    db = stored(tmp_path / "e.db", *STORY)
    whole = [sha(kind, who)[:9] for kind in ("identity", "login") for who in ("ann", "bob", "cay")]
    outputs = [
        "".join(answered(capfdbinary, argv)[1:]) for _, _, argv in commands(db, sha("session", 1))
    ]
    with View(db, **{session_events.ADMIN_TOKEN_VARIABLE: "t"}) as view:
        headers = {"Cookie": view.cookie(), "Authorization": "Bearer t"}
        for path in (
            "/?days=9999",
            "/sessions?days=9999",
            "/session/" + sha("session 1"),
            "/discoveries?days=9999",
            "/discovery?ref=x",
            "/activity?days=9999",
            "/admin/sessions?days=90",
            "/admin/sessions/" + sha("session 1"),
            "/admin/discoveries/propagation",
        ):
            status, _, body = http(view.address, path, headers)
            assert status == 200
            outputs.append(body)
    outputs.append(view.complaints)
    assert (
        sum(ANN[:8] in output for output in outputs) > 15
    )  # so the prefixes were there to be seen
    for digits in whole:
        assert not any(digits in output for output in outputs)
    assert view.complaints == ""


class Chromium:
    """A headless Chromium with one tab, driven over its pipe (DevTools protocol: JSON, parted by NUL
    bytes)."""

    FLAGS = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        "--remote-debugging-pipe",
    )

    def __init__(self, program, profile):
        ours, theirs = (
            os.pipe(),
            os.pipe(),
        )  # what the test says, what the browser says: its 3 and its 4
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (ours[0], theirs[1])]
        self.process = subprocess.Popen(
            [
                program,
                *self.FLAGS,
                "--user-data-dir=%s" % profile,
                "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
                "about:blank",
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(3, 4),
            preexec_fn=lambda: (os.dup2(ends[0], 3), os.dup2(ends[1], 4)),
        )
        for fd in (ours[0], theirs[1], *ends):
            os.close(fd)
        self.mouth, self.ear = ours[1], theirs[0]
        self.heard, self.number, self.events, self.tab = b"", 0, [], None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.tab = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(domain + ".enable")
        self.call("Page.setLifecycleEventsEnabled", enabled=True)

    def listen(self):
        while b"\0" not in self.heard:
            assert select.select([self.ear], [], [], 120)[0], "Chromium says nothing"
            data = os.read(self.ear, 1 << 20)
            assert data, "Chromium is gone"
            self.heard += data
        message, self.heard = self.heard.split(b"\0", 1)
        return json.loads(message.decode())

    def call(self, method, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.tab:
            message["sessionId"] = self.tab
        os.write(self.mouth, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.listen()
            if answer.get("id") == self.number:
                assert "error" not in answer, (method, answer)
                return answer["result"]
            self.events.append(answer)

    def loaded(self, wanted):
        """Waits until a page is there: the first whose loader's id is `wanted`."""
        while True:
            for event in self.events:
                at = event["params"] if event.get("method") == "Page.lifecycleEvent" else {}
                if at.get("name") == "load" and wanted(at["loaderId"]):
                    return
            self.events.append(self.listen())

    def open(self, url):
        for address in ("about:blank", url):  # first away: another #... alone would load nothing
            self.loaded(self.call("Page.navigate", url=address)["loaderId"].__eq__)

    def follow(self, action):
        """Does what leads to another page, and waits until that is there."""
        known = {
            event["params"]["loaderId"]
            for event in self.events
            if event.get("method") == "Page.lifecycleEvent"
        }
        action()
        self.loaded(lambda loader: loader not in known)

    def js(self, expression):
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, expression):
        """Waits until the page says yes, looking at each frame."""
        self.js(
            "new Promise(done => { const look = () => (%s) ? done() : requestAnimationFrame(look);"
            " look(); })" % expression
        )

    def key(self, key, code=0):
        text = {"text": key} if len(key) == 1 else {}
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **text
            )

    def screen(self, width, height, scheme="light"):
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        self.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": scheme}],
        )

    def picture(self):
        """The whole page as a PNG file."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        return base64.b64decode(answer["data"])

    def complaints(self):
        """What the console showed: errors, refusals of the page's own policy, and anything printed."""
        return [
            event
            for event in self.events
            if event.get("method")
            in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        ]

    def asked(self):
        """The addresses that were asked for."""
        return {
            event["params"]["request"]["url"]
            for event in self.events
            if event.get("method") == "Network.requestWillBeSent"
        }

    def close(self):
        self.tab = None
        with contextlib.suppress(AssertionError, OSError):
            self.call("Browser.close")
        self.process.wait(60)
        os.close(self.mouth)
        os.close(self.ear)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    program = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if not program:
        pytest.skip("no Chromium here: the pages were not looked at (apt-get install chromium)")
    browser = Chromium(program, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


SEEN = """({discs: document.querySelectorAll("#discs a:not(.later)").length,
  arcs: document.querySelectorAll("#arcs path:not(.later)").length,
  counters: [...document.querySelectorAll(".tiles dd")].map(dd => dd.textContent),
  moment: document.getElementById("moment").textContent, address: location.hash})"""


def test_reader_the_replay_in_chromium(tmp_path, chromium):
    """The picture at three moments; playing, stepping and pointing by keyboard; filters; nothing asked
    elsewhere."""
    with View(stored(tmp_path / "e.db", *STORY)) as view:
        may = "since=2026-05-01&until=2026-06-01"
        chromium.events = []
        chromium.screen(1280, 900)
        chromium.open(view.url + "&" + may)
        assert chromium.js("location.search") == "?" + may  # the token is gone from the address
        for moment, discs, arcs, counters in (
            ("2026-05-04T10:00:00.000Z", 1, 0, ["1", "1", "5", "2", "0"]),
            ("2026-05-08T00:00:00.000Z", 2, 1, ["2", "2", "12", "3", "1"]),
            ("2026-05-12T11:00:00.000Z", 4, 4, ["4", "3", "36", "3", "3"]),
        ):
            chromium.js(
                "new Promise(done => {"
                ' addEventListener("hashchange", () => setTimeout(done), {once: true});'
                ' location.hash = "t=%s"; })' % moment
            )
            seen = chromium.js(SEEN)
            assert (seen["discs"], seen["arcs"], seen["counters"]) == (discs, arcs, counters), (
                moment
            )
            assert seen["moment"] == moment[:16].replace("T", " ") + " UTC"
        chromium.open(view.base + "/?" + may + "#t=2026-05-08T00:00:00.000Z")
        assert chromium.js(SEEN)["discs"] == 2  # a moment can be shared
        assert chromium.js('document.querySelectorAll("#arcs .x").length') == 3

        chromium.key("Home", 36)
        assert chromium.js(SEEN)["address"] == "#t=2026-05-04T10:00:00.000Z"
        chromium.key("ArrowRight", 39)
        assert chromium.js(SEEN)["address"] == "#t=2026-05-05T10:00:00.000Z"
        chromium.key("ArrowLeft", 37)
        assert chromium.js(SEEN)["discs"] == 1
        chromium.key("+")
        assert chromium.js('document.getElementById("speed").value') == "2"
        chromium.js('document.getElementById("speed").value = "8"')
        chromium.key(" ", 32)
        assert chromium.js('document.getElementById("play").textContent') == "Pause"
        chromium.until('document.querySelectorAll("#discs a:not(.later)").length >= 2')
        chromium.key(" ", 32)
        paused = chromium.js(SEEN)
        assert (
            chromium.js('document.getElementById("play").textContent') == "Play"
            and paused["discs"] >= 2
        )
        assert paused["address"][3:19].replace("T", " ") + " UTC" == paused["moment"]
        chromium.key("End", 35)
        assert chromium.js(SEEN)["discs"] == 4

        lit = '["arcs", "discs"].map(id => document.querySelectorAll("#" + id + " .on").length)'
        chromium.js('document.querySelector("#discs a[tabindex=\\"0\\"]").focus()')
        chromium.key("ArrowLeft", 37)
        chromium.key(
            "ArrowLeft", 37
        )  # from the last to bob's, which had x from ann and gave it to cay
        assert chromium.js(lit) == [2, 3]
        panel = chromium.js('document.getElementById("panel").textContent')
        assert panel.startswith(BOB[:8]) and "2 tool calls, 7 tokens saved" in panel
        assert panel.endswith("1 other developer.xz")
        chromium.key("ArrowLeft", 37)
        assert chromium.js(lit) == [4, 4]  # everything came from ann's first
        box = chromium.js(
            "(b => [b.x + b.width / 2, b.y + b.height / 2])"
            '(document.querySelectorAll("#discs a")[2].getBoundingClientRect())'
        )
        chromium.js("document.activeElement.blur()")
        chromium.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0] + 6, y=box[1] + 6)
        chromium.until(lit + " == '2,3'")
        button = {"x": box[0], "y": box[1], "button": "left", "clickCount": 1}
        chromium.call("Input.dispatchMouseEvent", type="mousePressed", **button)
        chromium.follow(
            lambda: chromium.call("Input.dispatchMouseEvent", type="mouseReleased", **button)
        )
        assert chromium.js("location.pathname") == "/session/" + sha("session", 3)
        assert ANN[:8] in chromium.js("document.body.textContent")

        chromium.open(view.base + "/?" + may)
        chromium.js('document.querySelector("[name=github]").value = "false"')
        chromium.follow(lambda: chromium.js('document.querySelector("form button").click()'))
        assert chromium.js(SEEN)["counters"] == ["1", "1", "13", "2", "0"]
        chromium.open(view.base + "/?discovery=y&" + may)
        assert (chromium.js(SEEN)["discs"], chromium.js(SEEN)["arcs"]) == (3, 2)
        chromium.open(view.base + "/?since=2020-01-01&until=2020-02-01")
        assert "No session ended in this window" in chromium.js("document.body.textContent")

        names = {
            (node.get("role", {}).get("value"), node.get("name", {}).get("value"))
            for node in (
                chromium.open(view.base + "/?" + may),
                chromium.call("Accessibility.getFullAXTree"),
            )[1]["nodes"]
        }
        assert {
            ("slider", "Moment"),
            ("button", "Play"),
            ("combobox", "Speed"),
            ("navigation", "Pages"),
            ("link", "%s, 2026-05-05 10:00, 2 calls" % BOB[:8]),
        } <= names

        for path in (
            "/",
            "/sessions",
            "/session/" + sha("session 1"),
            "/discoveries",
            "/discovery",
            "/activity",
        ):
            for width in (400, 2000):
                for scheme in ("light", "dark"):
                    chromium.screen(width, 1000, scheme)
                    chromium.open(view.base + path + "?ref=x&" + may)
                    assert chromium.js("document.documentElement.scrollWidth") == width, (
                        path,
                        width,
                    )
                    paper = chromium.js("getComputedStyle(document.body).backgroundColor")
                    assert (paper == "rgb(246, 246, 243)") == (scheme == "light")
                    name = "%s %d %s.png" % (path.split("/")[1] or "replay", width, scheme)
                    (tmp_path / name).write_bytes(chromium.picture())
        assert chromium.complaints() == []
        assert all(url.startswith((view.base + "/", "data:", "about:")) for url in chromium.asked())


def test_reader_pages_without_script_and_without_the_viewer(tmp_path, chromium):
    db = stored(tmp_path / "e.db", *STORY)
    with View(db) as view:
        chromium.events = []
        chromium.screen(1280, 900)
        chromium.call("Emulation.setScriptExecutionDisabled", value=True)
        try:
            chromium.open(view.url + "&since=2026-05-01&until=2026-06-01")
            assert chromium.js("document.documentElement.className") == ""
            assert chromium.js(
                '[...document.querySelectorAll("#discs circle")].every('
                "c => c.getBoundingClientRect().width > 0)"
            )
            assert chromium.js('document.querySelectorAll("#arcs path").length') == 4
            assert chromium.js('document.querySelector(".controls").offsetHeight') == 0
            assert BOB[:8] in chromium.js('document.querySelector("table").textContent')
            first = chromium.js('document.querySelector("#discs a").href.baseVal')
            assert first == "/session/" + sha("session 1")
        finally:
            chromium.call("Emulation.setScriptExecutionDisabled", value=False)
    (tmp_path / "page.html").write_text(
        read("graph", "--db", db, *IN_MAY, "--format", "html").stdout
    )
    chromium.open((tmp_path / "page.html").as_uri())
    assert chromium.js("document.documentElement.className") == "live"
    chromium.key("Home", 36)
    assert chromium.js(SEEN)["discs"] == 1
    assert chromium.complaints() == []


def test_reader_hostile_pages_in_chromium(tmp_path, chromium):
    """Nothing that a row holds runs, closes an element or changes a page."""
    window = "since=2026-05-01&until=2026-06-01"
    with View(looser(tmp_path / "hostile.db")) as view:
        chromium.events = []
        chromium.open(view.url + "&" + window)
        for path in (
            "/",
            "/sessions",
            "/session/" + sha("session refs 6"),
            "/discoveries",
            "/activity",
        ):
            chromium.open(view.base + path + "?" + window)
            assert chromium.js("document.title").endswith(" - sessions")
            assert chromium.js('document.querySelectorAll("img").length') == 0
            text = chromium.js("document.body.innerText")
            assert not re.search("[\x00-\x08\x0e-\x1f\x7f-\x9f\u200b-\u206f]", text)
        for ref in HOSTILE_REFS:
            chromium.open(view.base + "/discovery?ref=" + urllib.parse.quote(ref))
            assert chromium.js("document.title") == "Not found"
        assert all("404 (Not Found)" in json.dumps(said) for said in chromium.complaints())
        assert all(url.startswith((view.base + "/", "data:", "about:")) for url in chromium.asked())


def test_reader_two_thousand_sessions_in_chromium(tmp_path, chromium):
    """The page says which it shows, is less than 1 MB, and draws at once."""
    chance = random.Random(3)
    rows = [
        row(
            n,
            chance.randrange(60),
            "2026-05-%02dT%02d:%02d:00.000Z" % (1 + n // 1440 % 28, n // 60 % 24, n % 60),
            {"disc-%d" % (300 * chance.random() ** 2), "disc-%d" % (300 * chance.random() ** 2)},
        )
        for n in range(2010)
    ]
    with View(stored(tmp_path / "e.db", *rows)) as view:
        chromium.events = []
        chromium.open(view.url + "&since=2026-05-01&until=2026-06-01")
        size = chromium.js('performance.getEntriesByType("navigation")[0].transferSize')
        assert 300_000 < size < 1_000_000
        seen = chromium.js(SEEN)
        assert seen["discs"] == 2000 and seen["arcs"] > 3000
        assert "newest 2,000 of 2,010" in chromium.js("document.body.textContent")
        paint = chromium.js('performance.getEntriesByName("first-contentful-paint")[0].startTime')
        assert paint < 20_000  # ms; about 300 on a machine with nothing else to do
        assert chromium.complaints() == []


def test_reader_the_demo(tmp_path):
    """It says that its sessions are synthetic, shows them, and leaves nothing behind."""
    with View(None, TMPDIR=str(tmp_path)) as view:
        assert re.fullmatch(
            r"\d+ synthetic sessions of \d+ developers who do not exist", view.said[0]
        )
        assert len(list(tmp_path.iterdir())) == 1
        own = os.getpriority(os.PRIO_PROCESS, 0)  # and it lets a server go first
        assert os.getpriority(os.PRIO_PROCESS, view.process.pid) == min(19, own + 10)
        status, _, body = http(view.address, "/?days=14", {"Cookie": view.cookie()})
        assert status == 200 and body.count("<circle") > 100
    assert (view.status, view.complaints, list(tmp_path.iterdir())) == (0, "", [])


def test_reader_beside_a_server_under_load_and_a_sweep(tmp_path):
    """While a server writes and old rows are swept away, every answer is right for one moment, and none
    fails."""
    db = tmp_path / "e.db"
    stop = threading.Event()
    failures = []
    with serving(db) as server:

        def post():
            connection = HTTPConnection(server.host, server.port, timeout=60)
            n = 0
            try:
                while not stop.is_set():
                    n += 1
                    connection.request(
                        "POST",
                        "/v1/session-events",
                        json.dumps(
                            dict(
                                EVENT,
                                session_id_hash=sha("load", n),
                                ended_at="2026-05-22T12:%02d:%02d.000Z" % (n // 60 % 60, n % 60),
                            )
                        ),
                    )
                    answer = connection.getresponse()
                    if answer.status != 202 or answer.read() != b'{"ok":true}':
                        failures.append(answer.status)
            finally:
                connection.close()

        def sweep():
            with contextlib.closing(
                sqlite3.connect(str(db), timeout=60, isolation_level=None)
            ) as connection:
                while not stop.is_set():
                    connection.execute(
                        "DELETE FROM session_events WHERE id IN (SELECT id FROM session_events"
                        " ORDER BY id LIMIT 3)"
                    )
                    stop.wait(0.01)

        threads = [threading.Thread(target=job) for job in (post, sweep)]
        for thread in threads:
            thread.start()
        try:
            totals = set()
            end = time.monotonic() + 4
            while time.monotonic() < end:
                with session_events.reading(str(db)) as reader:
                    window = session_events.Window(**MAY)
                    listed = session_events.sessions(reader, window, 10**6)
                    graph = session_events.graph(reader, window, 10**6)
                    found = session_events.discoveries(reader, window)["discoveries"]
                    total = listed["total_count_in_window"]
                    assert total == len(listed["sessions"]) == len(graph["nodes"])
                    assert {d["session_count"] for d in found} <= {total}
                    assert len(graph["edges"]) == max(0, total - 1)
                    totals.add(total)
        finally:
            stop.set()
            for thread in threads:
                thread.join(60)
        assert failures == [] and len(totals) > 3
    newest = read("sessions", "--db", db, *IN_MAY, "--format", "json")
    assert newest.returncode == 0 and json.loads(newest.stdout)["sessions"][0]["tool_count"] == 42


# -- Ship ------------------------------------------------------------------------------------------


class ClickHouse:
    """A real clickhouse-server on a free loopback port, in a folder of its own."""

    CONFIG = """<yandex>
<logger><level>warning</level><log>{0}/log</log><errorlog>{0}/errors</errorlog></logger>
<http_port>{1}</http_port><tcp_port>{2}</tcp_port><listen_host>127.0.0.1</listen_host>
<path>{0}/data/</path><tmp_path>{0}/tmp/</tmp_path><users_config>{0}/users.xml</users_config>
<default_profile>default</default_profile><default_database>default</default_database>
<mark_cache_size>67108864</mark_cache_size><uncompressed_cache_size>0</uncompressed_cache_size>
</yandex>"""
    USER = (
        "<{0}><password>{1}</password><networks><ip>127.0.0.1</ip></networks><profile>{2}</profile>"
        "<quota>default</quota></{0}>"
    )

    def __init__(self, folder):
        self.folder, self.port, self.count = folder, free_port(), 0
        (folder / "config.xml").write_text(self.CONFIG.format(folder, self.port, free_port()))
        (folder / "users.xml").write_text(
            "<yandex><profiles><default/><looks><readonly>1</readonly></looks></profiles><quotas><default/></quotas>"
            "<users>%s%s%s</users></yandex>"
            % (
                self.USER.format("default", "", "default"),
                self.USER.format("shipper", "open sesame", "default"),
                self.USER.format("visitor", "", "looks"),
            )
        )
        self.start()

    def start(self):
        with open(str(self.folder / "output"), "ab") as output:
            self.process = subprocess.Popen(
                ["clickhouse-server", "--config-file=%s/config.xml" % self.folder],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=str(self.folder),
            )
        end = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
                return
            except OSError:
                assert self.process.poll() is None and time.monotonic() < end, (
                    self.folder / "output"
                ).read_text()
                time.sleep(0.05)  # it says nowhere that it listens

    def stop(self, signum=signal.SIGKILL):
        self.process.send_signal(signum)
        self.process.wait(60)

    def database(self):
        """The URL of a new database."""
        self.count += 1
        self.ask("CREATE DATABASE d%d" % self.count)
        return "http://127.0.0.1:%d/?database=d%d" % (self.port, self.count)

    def ask(self, sql, url=None):
        """The rows of an answer, as lists of text; AssertionError with ClickHouse's words."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        query = urllib.parse.urlsplit(url).query if url else ""
        connection.request("POST", "/?allow_experimental_low_cardinality_type=1&" + query, sql)
        answer = connection.getresponse()
        said = answer.read().decode()
        connection.close()
        assert answer.status == 200, said
        return [line.split("\t") for line in said.splitlines()]


@pytest.fixture(scope="module")
def clickhouse(tmp_path_factory):
    if not shutil.which("clickhouse-server"):
        pytest.skip("no clickhouse-server on this machine: shipping is not tested")
    house = ClickHouse(tmp_path_factory.mktemp("clickhouse"))
    yield house
    house.stop()


SMALL = """import sys, session_events as s
s.SHIP_ROWS, s.FOLLOW_SECONDS = %d, .2
try:
    sys.exit(s.main())
finally:
    peak = [line for line in open("/proc/self/status") if line.startswith("VmHWM")] if %d else []
    print(*peak, file=sys.stderr)
"""
NAMES_NOBODY = re.compile(r"[0-9a-f]{17,}|auth-jwt-flow|open sesame").search


def shipper(db, url, *flags, rows=200, env=(), peak=False):
    """A `ship` process, in batches of `rows`."""
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            SMALL % (rows, peak),
            "ship",
            "--db",
            str(db),
            "--to",
            url,
            *map(str, flags),
        ],
        cwd=str(ROOT),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=dict(os.environ, **dict(env)),
    )


def finished(process):
    """(exit status, standard output, standard error) of a process that ends by itself."""
    out, err = process.communicate(timeout=120)
    assert b"Traceback" not in err, err
    assert not NAMES_NOBODY((out + err).decode()), (out, err)
    return process.returncode, out.decode(), err.decode().strip()


def ship(db, url, *flags, **options):
    return finished(shipper(db, url, *flags, **options))


def shipped(db, url, *flags, **options):
    """How many rows one `ship` sent; it has nothing to complain of."""
    status, out, err = ship(db, url, *flags, **options)
    assert (status, err) == (0, ""), err
    return int(re.match(r"([\d,]+) rows shipped as node [0-9a-f]{16}\n$", out)[1].replace(",", ""))


def sessions_of(*nodes):
    """The rows that there are over several nodes, worked out here: of each session the one received first."""
    first = {}
    for node, rows in enumerate(nodes):
        for n, r in enumerate(rows):
            key = r["identity_hash"], r["session_id_hash"]
            first.setdefault(key, []).append((r["received_at"], node, n, r))
    return [min(found, key=lambda f: f[:3])[3] for found in first.values()]


VIEW = """SELECT identity_hash, github_hash, session_id_hash, ended_at, tool_count, tokens_saved, branch_sha,
  arrayStringConcat(discovery_refs, ' '), plugin_version, toString(received_at) FROM session_events"""


def as_viewed(r):
    return [
        r["identity_hash"],
        r["github_hash"] or r"\N",
        r["session_id_hash"],
        r["ended_at"],
        str(r["tool_count"]),
        str(r["tokens_saved"]),
        r["branch_sha"] or r"\N",
        " ".join(dict.fromkeys(json.loads(r["discovery_refs_json"]))),
        r["plugin_version"],
        r["received_at"].replace("T", " ")[:19],
    ]


def whole(clickhouse, url, *nodes):
    """Each session of the nodes is in the view once, as it was received first, and the raw table holds nothing else
    once it is merged; it may be now."""
    expected = sorted(map(as_viewed, sessions_of(*nodes)))
    assert sorted(clickhouse.ask(VIEW, url)) == expected
    assert clickhouse.ask("SELECT count() FROM session_events_raw FINAL", url) == [
        [str(len(expected))]
    ]


def merge(clickhouse, url):
    clickhouse.ask("OPTIMIZE TABLE session_events_raw FINAL", url)


def name_of(db):
    return session_events.node_of(str(db))


def make_tables(clickhouse, url):
    for statement in read("ship", "--print-ddl", "--to", url).stdout.split(";\n"):
        if statement.strip():
            clickhouse.ask(statement, url)


def many(count, start=0, **changes):
    """Rows of all shapes: without GitHub, without branch, with many discoveries, in any year, over three months of
    arrival."""
    rng = random.Random(count + start)
    rows = []
    for n in range(start, start + count):
        refs = ["auth-jwt-flow", "a", "r" * 128, *("d%d" % (n % k) for k in (3, 7, 50))][
            : rng.randrange(7)
        ]
        rows.append(
            dict(
                row(
                    n,
                    "who %d" % (n % 40),
                    "2026-05-%02dT10:%02d:00.%03dZ" % (1 + n % 28, n % 60, n % 1000),
                    refs * (1 + n % 2),
                    n % 3 != 0,
                    tool_count=n % 1_000_001,
                    tokens_saved=10**9 - n,
                    branch_sha=None if n % 5 == 0 else "%040x" % n if n % 5 == 1 else "abc123d",
                    received_at="2026-%02d-15T00:%02d:%02dZ" % (4 + n % 3, n // 60 % 60, n % 60),
                ),
                **changes,
            )
        )
    rows[0].update(
        ended_at="9999-12-31T23:59:59.999Z",
        discovery_refs_json=json.dumps(["x%d" % k for k in range(200)]),
    )
    rows[1].update(ended_at="0001-01-01T00:00:00.000Z", tool_count=1_000_000, tokens_saved=0)
    return rows


def test_ship_two_nodes_at_once(tmp_path, clickhouse):
    """Two nodes, each shipped by two processes at once, with sessions that both nodes received: every row is there
    once, and the views answer what SQLite answers on the same sessions."""
    url = clickhouse.database()
    one, two = many(3000), [*many(2000, 2500), *many(100, 9000)]
    for n, r in enumerate(
        two[:500]
    ):  # a retry that went to the other node: sooner, later, or in the same second
        r.update(
            received_at=one[2500 + n]["received_at"]
            if n % 3 == 0
            else "2026-0%d-15T00:00:00Z" % (3 + n % 3 * 2),
            tool_count=7,
        )
    a, b = stored(tmp_path / "a.db", *one), stored(tmp_path / "b.db", *two)
    ends = [finished(process) for process in [shipper(db, url) for db in (a, b, a, b)]]
    assert all((status, err) == (0, "") for status, _, err in ends), ends
    nodes = (
        [one, two] if name_of(a) < name_of(b) else [two, one]
    )  # in the same second, the node's name decides
    whole(clickhouse, url, *nodes)
    merged = stored(tmp_path / "merged.db", *sessions_of(*nodes))
    with session_events.reading(merged) as reader:
        expected = session_events.discoveries(reader, session_events.Window("", "A"), 10**6)[
            "discoveries"
        ]
    listed = clickhouse.ask(
        "SELECT * FROM discovery_propagation ORDER BY session_count DESC, discovery_id", url
    )
    assert [r[:5] for r in listed] == [
        [
            str(d[key])
            for key in (
                "discovery_id",
                "first_seen_at",
                "last_seen_at",
                "session_count",
                "distinct_identity_count",
            )
        ]
        for d in expected
    ]
    names = clickhouse.ask(
        "SELECT name FROM system.columns WHERE table = 'discovery_propagation'"
        " AND database = currentDatabase()",
        url,
    )
    assert [name for (name,) in names] == list(expected[0])
    assert ship(a, url, "--check")[0] == ship(b, url, "--check")[0] == 0
    assert shipped(a, url) == shipped(b, url) == 0
    assert shipped(a, url, "--again") == len(one)
    assert ship(a, url, "--check")[0] == 0  # also before the repeats are merged
    merge(clickhouse, url)
    whole(clickhouse, url, *nodes)
    assert clickhouse.ask("SELECT count() FROM session_events_raw", url) == [["4600"]]


def retold(rows, received, **changes):
    """What another node keeps of the same sessions: received at other times, with other content."""
    return [
        dict(
            r,
            received_at=received(n, r),
            ended_at="2026-01-%02dT00:00:00.000Z" % (1 + n % 28),
            tokens_saved=n,
            discovery_refs_json='["from-%d"]' % n,
            **changes,
        )
        for n, r in enumerate(rows)
    ]


def sooner(n, r):
    return "2026-02-0%dT00:00:00Z" % (1 + n % 9)


def later(n, r):
    return "2026-08-0%dT00:00:00Z" % (1 + n % 9)


SAME = (
    "%d rows compared, %d stand as received before (by another node, or before a sweep), 0 wait to be shipped: the"
    " same on every day\n"
)


@pytest.mark.parametrize("order", ("ab", "ba"))
def test_ship_keeps_what_was_received_first(tmp_path, clickhouse, order):
    """A session that two nodes received, months apart and with other content, ends up once in the raw table, the one
    received first, whichever is shipped first; the view and --check say so before and after it is merged."""
    url = clickhouse.database()
    rows = {"a": many(600)}
    same_second = retold(rows["a"][200:250], lambda n, r: r["received_at"], branch_sha=None)
    rows["b"] = [
        *retold(rows["a"][:100], sooner),
        *many(50, 5000),
        *retold(rows["a"][100:200], later),
        *same_second,
        *retold(rows["a"][250:260], sooner),
        *retold(rows["a"][300:400], later),
    ]
    dbs = {node: stored(tmp_path / (node + ".db"), *rows[node]) for node in "ab"}
    nodes = [rows[node] for node in sorted("ab", key=lambda node: name_of(dbs[node]))]
    tied = 0 if nodes[0] is rows["a"] else 50  # of the same second
    checks = {"a": SAME % (490 - tied, 110 + tied), "b": SAME % (160 + tied, 250 - tied)}

    def agrees():
        whole(clickhouse, url, *nodes)
        return {node: ship(dbs[node], url, "--check") for node in "ab"} == {
            node: (0, text, "") for node, text in checks.items()
        }

    sent = [shipped(dbs[node], url) for node in order]
    assert sent == (
        [600, 410] if order == "ab" else [410, 500]
    )  # of a, the first 100 are there already, as b's
    assert agrees()
    late = (
        "SELECT count() FROM session_events WHERE node = '%s' AND toMonth(received_at) = 8"
        % name_of(dbs["b"])
    )
    assert clickhouse.ask(late, url) == [["0"]]  # a condition brings nothing back that gave way
    merge(clickhouse, url)
    assert clickhouse.ask("SELECT count() FROM session_events_raw", url) == [["650"]]
    assert agrees() and clickhouse.ask(late, url) == [["0"]]
    assert (
        shipped(dbs["a"], url) == shipped(dbs["b"], url) == 0
    )  # of b, the newest 100 rows are gone
    more = many(30, 7000)
    with contextlib.closing(sqlite3.connect(dbs["b"])) as connection:
        insert(connection, more)
    rows["b"] += more
    assert shipped(dbs["b"], url) == 30
    checks["b"] = SAME % (190 + tied, 250 - tied)
    assert agrees()
    for node in order:
        assert shipped(dbs[node], url, "--again") == len(rows[node])
    assert agrees()
    merge(clickhouse, url)
    assert clickhouse.ask("SELECT count() FROM session_events_raw", url) == [["680"]] and agrees()

    none = stored(tmp_path / "c.db", *retold(rows["a"], later))  # nothing of it is left
    for flags, sent in (((), 0), (("--again",), 600), ((), 0)):
        assert shipped(none, url, *flags) == sent
        merge(clickhouse, url)
        assert ship(none, url, "--check")[:2] == (0, SAME % (0, 600))
    assert agrees()


@pytest.mark.parametrize(
    "other, sent, differ", ((sooner, 31, ["2026-04-15"]), (later, 71, ["2026-04-15", "2026-06-15"]))
)
def test_ship_and_a_session_that_another_node_holds(tmp_path, clickhouse, other, sent, differ):
    """A row that is not there is no loss if its session was received earlier by another node. Else it is sent, also
    if another node's younger row is there; and --check names its day until then."""
    source, url = clickhouse.database(), clickhouse.database()
    rows = many(100)
    db, beside = (
        stored(tmp_path / "a.db", *rows),
        stored(tmp_path / "b.db", *retold([rows[29]], other)),
    )
    assert shipped(db, source) == 100
    make_tables(clickhouse, url)
    clickhouse.ask(
        "INSERT INTO session_events_raw SELECT * FROM %s.session_events_raw WHERE id NOT IN (30, 70)"
        % (urllib.parse.urlsplit(source).query.split("=")[1]),
        url,
    )
    assert shipped(beside, url) == 1
    status, out, _ = ship(db, url, "--check")
    assert status == 1 and [line[:10] for line in out.splitlines()[:-1]] == differ
    assert shipped(db, url) == sent
    whole(clickhouse, url, rows, retold([rows[29]], other))
    assert ship(db, url, "--check")[0] == 0
    merge(clickhouse, url)
    whole(clickhouse, url, rows, retold([rows[29]], other))
    assert shipped(db, url) == 0
    house = session_events.ClickHouse(session_events.house_of(url), {})
    asked = [session_events.key_binary(name_of(db), s) for s in session_events.batch_after(db, 0)]
    assert house.held(name_of(db), 1, asked) == {
        n: n == 30 and other is sooner for n in range(1, 101)
    }


class Relay:
    """Between a ship and ClickHouse. Once `limit` more bytes have gone to ClickHouse it calls `then` and cuts the
    connection; or, with `late`, it does so in place of passing the next answer on."""

    def __init__(self, port):
        self.target, self.limit, self.then, self.late = port, None, None, False
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def serve(self):
        while True:
            client, _ = self.listener.accept()
            if self.target is None:
                client.close()
                return
            with client, contextlib.suppress(OSError):
                with socket.create_connection(("127.0.0.1", self.target)) as upstream:
                    self.between(client, upstream)

    def between(self, client, upstream):
        while True:
            for ready in select.select([client, upstream], [], [])[0]:
                data = ready.recv(4096)
                if not data:
                    return
                due = self.limit is not None and self.limit <= 0
                if ready is client:
                    upstream.sendall(data)
                    self.limit = self.limit and self.limit - len(data)
                    due = not self.late and self.limit is not None and self.limit <= 0
                if due:
                    self.limit = None
                    self.then()
                    return
                if ready is upstream:
                    client.sendall(data)

    def stop(self):
        self.target = None
        socket.create_connection(("127.0.0.1", self.port)).close()
        self.thread.join(30)
        self.listener.close()


def test_ship_killed_cut_and_restarted(tmp_path, clickhouse):
    """SIGKILL in the middle of a batch, a connection cut there, an answer that does not arrive, ClickHouse killed and
    started again, and in between another node's rows, which take the place of some: afterwards every session is there,
    once, as it was received first."""
    url = clickhouse.database()
    rows = many(4000)
    beside = [*retold(rows[::5], sooner), *retold(rows[1::5], later)]
    db, other = stored(tmp_path / "a.db", *rows), stored(tmp_path / "b.db", *beside)
    relay = Relay(clickhouse.port)
    by_relay = url.replace(str(clickhouse.port), str(relay.port))
    count = "SELECT count() FROM session_events_raw"
    running = []
    try:
        for limit in (6_000, 25_000, 60_000):  # the handshake is 3,000, a batch 20,000 bytes
            relay.limit, relay.then = limit, lambda: running[-1].kill()
            running.append(shipper(db, by_relay))
            assert running[-1].wait(60) == -signal.SIGKILL
            running[-1].communicate()
        seen = int(clickhouse.ask(count, url)[0][0])
        for relay.late in (False, True):
            relay.limit, relay.then = 30_000, lambda: None
            status, _, err = ship(db, by_relay)
            assert status == 1 and "cannot reach" in err
        relay.late = False
        assert (
            0 < seen < int(clickhouse.ask(count, url)[0][0]) < 4000
        )  # there is still something to do
        assert shipped(other, url) == 1600
        merge(clickhouse, url)  # of rows that were sent, some are no longer there
        relay.limit, relay.then = 40_000, lambda: clickhouse.stop(signal.SIGKILL)
        process = shipper(db, by_relay, "--follow")
        line = process.stderr.readline().decode()
        assert "cannot reach ClickHouse" in line and "again in" in line
        clickhouse.process.wait(60)
        clickhouse.start()
        end = time.monotonic() + 60
        while sorted(clickhouse.ask(VIEW, url)) != sorted(
            map(as_viewed, sessions_of(rows, beside))
        ):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert finished(process)[0] == 0
    finally:
        relay.stop()
        if clickhouse.process.poll() is not None:
            clickhouse.start()
    whole(clickhouse, url, rows, beside)
    assert ship(db, url, "--check")[0] == ship(other, url, "--check")[0] == 0


def test_ship_follows_a_server(tmp_path, clickhouse):
    """What a running server stores arrives while it runs; Ctrl-C ends the ship with 0; both programs share the file."""
    url, db = clickhouse.database(), tmp_path / "events.db"
    with serving(db) as server:
        process = shipper(db, url, "--follow")
        for n in range(3):
            assert post(server, event("ship %d" % n))[0] == 202
            end = time.monotonic() + 60
            while True:
                with contextlib.suppress(AssertionError):  # until the table is there
                    if clickhouse.ask("SELECT count() FROM session_events", url) == [[str(n + 1)]]:
                        break
                assert process.poll() is None and time.monotonic() < end
                time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert finished(process) == (0, "", "")
    with serving(db):
        assert shipped(db, url) == 0
    assert ship(db, url, "--check")[0] == 0


def test_ship_goes_on_from_what_is_there(tmp_path, clickhouse):
    """A batch that is in by halves is completed; a file that is not the one whose rows are there is refused, and
    counts no session twice under a name of its own."""
    url = clickhouse.database()
    rows = many(1000)
    db = stored(tmp_path / "a.db", *rows)
    assert shipped(db, url) == 1000
    halves = clickhouse.database()
    make_tables(clickhouse, halves)
    source = urllib.parse.urlsplit(url).query.split("=")[1]
    clickhouse.ask(
        "INSERT INTO session_events_raw SELECT * FROM %s.session_events_raw WHERE id <= 900 AND"
        " (id <= 700 OR toMonth(received_at) != 5)" % source,
        halves,
    )
    assert 290 <= shipped(db, halves) <= 300
    whole(clickhouse, halves, rows)
    shutil.copy(db, str(tmp_path / "old.db"))
    newer = many(50, 2000)
    with contextlib.closing(sqlite3.connect(db)) as connection:
        connection.execute("DELETE FROM session_events WHERE id > 990 OR id < 10")
        connection.commit()
        assert shipped(db, url) == 0
        insert(connection, newer)
    assert shipped(db, url) == 50  # the ids of rows that are gone are not used again
    status, _, err = ship(tmp_path / "old.db", url)
    assert status == 1 and "old copy" in err
    other = many(80, 3000)
    with contextlib.closing(sqlite3.connect(str(tmp_path / "old.db"))) as connection:
        insert(connection, other)
    status, _, err = ship(tmp_path / "old.db", url)
    assert status == 1 and "DROP TABLE session_events_node" in err
    with contextlib.closing(sqlite3.connect(str(tmp_path / "old.db"))) as connection:
        connection.execute("DROP TABLE session_events_node")
        name_of(tmp_path / "old.db")
        connection.execute(
            "UPDATE session_events_node SET name = '%s'" % ("f" * 16)
        )  # else chance decides, for it is
        connection.commit()  # the same second; a name before the first one would send all 1080
    assert shipped(tmp_path / "old.db", url) == 80
    assert sorted(clickhouse.ask(VIEW, url)) == sorted(
        map(as_viewed, sessions_of(rows, newer, other))
    )


def insert(connection, rows):
    for r in rows:
        connection.execute(
            "INSERT INTO session_events (%s) VALUES (%s)" % (", ".join(r), ", ".join("?" * len(r))),
            list(r.values()),
        )
    connection.commit()


UNFIT = (
    ("identity_hash", "f" * 63),
    ("identity_hash", "F" * 64),
    ("session_id_hash", b"f" * 64),
    ("github_hash", ""),
    ("ended_at", "2026-02-30T00:00:00.000Z"),
    ("ended_at", 5),
    ("received_at", "1969-12-31T23:59:59Z"),
    ("received_at", "2106-02-07T06:28:16Z"),
    ("tool_count", -1),
    ("tool_count", 1.5),
    ("tool_count", 1_000_001),
    ("tokens_saved", "many"),
    ("branch_sha", "main"),
    ("plugin_version", "1.0\n"),
    ("discovery_refs_json", "{}"),
    ("discovery_refs_json", "[" * 100_000),
    ("discovery_refs_json", '["a b"]'),
    ("discovery_refs_json", '["\\ud800"]'),
    ("discovery_refs_json", json.dumps(["a"] * 201)),
)


def test_ship_stops_at_a_row_that_is_no_event(tmp_path, clickhouse):
    """It is named by its id and column; what stands before it is shipped, it and what comes after it wait."""
    url = clickhouse.database()
    for column, value in UNFIT:
        with pytest.raises(session_events.Unfit, match="row id 7 is no event: its " + column):
            session_events.shippable(
                [
                    dict(many(2)[0], id=7, **{column: value})[name]
                    for name, _, _ in session_events.CELLS
                ]
            )
    rows = many(300)
    looser_db = str(tmp_path / "a.db")
    with contextlib.closing(sqlite3.connect(looser_db)) as connection:
        connection.executescript((ROOT / "schema.sql").read_text().replace(" NOT NULL", ""))
        connection.execute("DROP TRIGGER session_events_discoveries_insert")
        insert(connection, rows)
        connection.execute(
            "UPDATE session_events SET identity_hash = 'auth-jwt-flow' WHERE id = 251"
        )
        connection.commit()
        status, out, err = ship(looser_db, url)
        assert (status, out) == (1, "") and "row id 251 is no event: its identity_hash" in err
        assert clickhouse.ask("SELECT count(), max(id) FROM session_events_raw", url) == [
            ["250", "250"]
        ]
        assert ship(looser_db, url)[0] == ship(looser_db, url, "--check")[0] == 1
        connection.execute("DELETE FROM session_events WHERE id = 251")
        connection.commit()
    assert shipped(looser_db, url) == 49
    del rows[250]
    whole(clickhouse, url, rows)


def test_ship_names_the_row_that_clickhouse_refuses(tmp_path, clickhouse):
    """Whatever the cluster's owner has put behind the table: the row is found, and ClickHouse's words, which could
    quote it, are not printed."""
    url = clickhouse.database()
    rows = many(600)
    db = stored(tmp_path / "a.db", *rows)
    make_tables(clickhouse, url)
    clickhouse.ask(
        "ALTER TABLE session_events_raw ADD COLUMN picky UInt64 MATERIALIZED toUInt64(if(tokens_saved = %d,"
        " concat('x', lower(hex(identity_hash))), '1'))" % rows[442]["tokens_saved"],
        url,
    )
    status, out, err = ship(db, url)
    assert (
        (status, out) == (1, "") and "row id 443 cannot be shipped" in err and "query_id" in err
    ), err
    assert clickhouse.ask("SELECT uniqExact(id), max(id) FROM session_events_raw", url) == [
        ["442", "442"]
    ]
    clickhouse.ask("ALTER TABLE session_events_raw DROP COLUMN picky", url)
    assert shipped(db, url) == 158
    whole(clickhouse, url, rows)
    clickhouse.ask("ALTER TABLE session_events_raw MODIFY COLUMN tool_count UInt64", url)
    status, _, err = ship(db, url)
    assert status == 1 and "column tool_count is not UInt32" in err
    clickhouse.ask("DROP TABLE session_events_raw", url)
    status, _, err = ship(db, url, "--check")
    assert status == 1 and "has no table" in err


def test_ship_check_names_the_days(tmp_path, clickhouse):
    url = clickhouse.database()
    today = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    db = stored(tmp_path / "a.db", *many(900))
    assert shipped(db, url) == 900

    def checked(*statements):
        """(status, days that differ, summary) of a copy of the file after some statements."""
        copy = str(tmp_path / "copy.db")
        shutil.copy(db, copy)
        with contextlib.closing(sqlite3.connect(copy)) as connection:
            for statement in statements:
                connection.execute(statement)
            connection.commit()
        status, out, err = ship(copy, url, "--check")
        *days, summary = out.splitlines()
        assert err == ""
        return status, [line[:10] for line in days], summary

    add = (
        "INSERT INTO session_events SELECT 5000, 'f' || substr(identity_hash, 2), github_hash, session_id_hash,"
        " ended_at, 1, 1, branch_sha, '[]', plugin_version, '%s' FROM session_events WHERE id = 3"
    )
    same = (0, [], "900 rows compared, 0 wait to be shipped: the same on every day")
    assert checked() == same
    for column, value in (
        ("tool_count", "tool_count + 1"),
        ("github_hash", "NULL"),
        ("branch_sha", "'abcdef0'"),
        ("ended_at", "'2026-05-22T12:34:56.001Z'"),
        ("discovery_refs_json", "'[\"q\"]'"),
        ("session_id_hash", "'%s'" % ("0" * 64)),
        ("plugin_version", "'2'"),
    ):
        status, days, _ = checked(
            "UPDATE session_events SET %s = %s WHERE id = 602" % (column, value)
        )
        assert (status, days) == (1, ["2026-05-15"]), column
    assert checked("DELETE FROM session_events WHERE id = 601")[:2] == (1, ["2026-04-15"])
    assert (
        checked("DELETE FROM session_events WHERE id < 100")[0] == 0
    )  # swept: what is left is compared
    assert checked(add % "2026-05-15T23:59:59Z")[:2] == (1, ["2026-05-15"])
    assert checked(add % today) == (
        0,
        [],
        "900 rows compared, 1 wait to be shipped: the same on every day",
    )
    assert checked(
        "UPDATE session_events SET received_at = '2026-06-16' || substr(received_at, 11) WHERE id = 603"
    )[:2] == (1, ["2026-06-15", "2026-06-16"])
    keep, sweep = (
        "CREATE TEMP TABLE kept AS SELECT * FROM session_events WHERE id = 5",
        "DELETE FROM session_events WHERE id %s 5",
    )
    again = (
        (add % "2026-07-01T00:00:00Z")
        .replace("'f' || substr(identity_hash, 2)", "identity_hash")
        .replace("session_events WHERE id = 3", "kept")
    )  # the session ends once more
    assert checked(keep, sweep % "<=", again) == (0, [], SAME.strip() % (895, 1))
    assert checked(keep, sweep % "=", again)[:2] == (
        1,
        ["2026-05-15", "2026-07-01"],
    )  # that was no sweep


def test_ship_asks_for_sessions_without_naming_them(tmp_path):
    """Whole hashes travel as a table, not in the query's text, which ClickHouse writes into its logs."""
    shape = session_events.batch_after(stored(tmp_path / "a.db", *many(3)), 0)
    with Pretender(reply(200, b"1\t0\n3\t1\n")) as pretender:
        house = session_events.ClickHouse(session_events.house_of(pretender.url), {})
        assert house.held("ab" * 8, 1, [session_events.key_binary("ab" * 8, s) for s in shape]) == {
            1: False,
            3: True,
        }
        assert house.held("ab" * 8, 1, []) == {}
    head, body = pretender.asked[0][1].split(b"\r\n\r\n", 1)
    for digest in {s.session for s in shape} | {s.identity for s in shape}:
        assert bytes.fromhex(digest) in body and digest.encode() not in head + body
        assert urllib.parse.quote_from_bytes(bytes.fromhex(digest)).encode() not in head


def test_ship_seniority():
    """Sooner comes before later, then the node whose name is less; all moments and names fit into 64 bits."""
    moments, names = (
        (0, 1, 1_800_000_000, (1 << 32) - 1),
        ("0" * 16, "00000001" + "f" * 8, "f" * 16),
    )
    listed = [session_events.seniority(name, moment) for moment in moments for name in names]
    assert (
        listed == sorted(set(listed), reverse=True)
        and listed[0] == (1 << 64) - 1
        and listed[-1] == 0
    )


class Pretender(threading.Thread):
    """An HTTP server that gives prepared answers (bytes), one a connection, and keeps what it was asked and when."""

    def __init__(self, *answers, tls=None, patient=True):
        super().__init__(
            daemon=True
        )  # a request that does not come may not keep the tests from ending
        self.patient = patient  # else it closes without reading what is still sent
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.answers, self.tls, self.asked = answers, tls, []
        self.url = "%s://127.0.0.1:%d/" % (
            "https" if tls else "http",
            self.listener.getsockname()[1],
        )

    def run(self):
        for answer in self.answers:
            client, _ = self.listener.accept()
            with contextlib.suppress(OSError), client:
                if self.tls:
                    client = self.tls.wrap_socket(client, server_side=True)
                self.asked.append((time.monotonic(), client.recv(1 << 16)))
                client.sendall(answer)
                if self.patient:
                    client.shutdown(socket.SHUT_WR)
                    for more in iter(functools.partial(client.recv, 1 << 16), b""):
                        self.asked[-1] = (self.asked[-1][0], self.asked[-1][1] + more)
        self.listener.close()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.join(60)


def reply(status, body=b"", *headers):
    return b"\r\n".join(
        [b"HTTP/1.1 %d X" % status, b"Content-Length: %d" % len(body), *headers, b"", body]
    )


def test_ship_and_servers_that_are_no_clickhouse(tmp_path, clickhouse):
    db = stored(tmp_path / "a.db", *many(10))
    secret = {"CLICKHOUSE_USER": "shipper", "CLICKHOUSE_PASSWORD": "open sesame"}
    version = reply(200, b"99.1\n")
    for answers, says in (
        ([reply(302, b"", b"Location: http://127.0.0.1:9/")], "not followed"),
        ([reply(200, b"<html>")], "no ClickHouse"),
        ([reply(200)], "no ClickHouse"),
        ([reply(404, b"nothing here")], "is it ClickHouse's HTTP port"),
        ([b"SSH-2.0-x\r\n"], "no HTTP"),
        ([b"HTTP/1.1 200 X\r\nContent-Length: 50\r\n\r\nshort"], "broke off"),
        ([reply(503, b"busy")], "cannot take it now (status 503"),
        ([reply(500, b"Code: 241, e.displayText() = memory")], "its error 241"),
        (
            [reply(500, b"Code: 62. DB::Exception: \x1b[2J wrong")],
            "Code: 62. DB::Exception: \\x1b[2J wrong",
        ),
        ([version, reply(200, b"x\ty\n")], "whose column node is not"),
        (
            [
                version,
                reply(200, "".join("%s\t%s\n" % c for c in session_events.RAW_COLUMNS).encode()),
                reply(200, b"a\nb\n"),
                reply(200, b"1" * 30 + b"\n"),
            ],
            "answers what was not asked",
        ),
        (
            [
                version,
                reply(200, "".join("%s\t%s\n" % c for c in session_events.RAW_COLUMNS).encode()),
                reply(200, b"a\nb\n"),
                reply(200),
                reply(200, b"surprise"),
            ],
            "answers what was not asked",
        ),
        (
            [
                version,
                reply(200, "".join("%s\t%s\n" % c for c in session_events.RAW_COLUMNS).encode()),
                reply(200, b"a\nb\n"),
                reply(200),
                reply(200),
                *[reply(200, b"surprise")] * 2,
            ],
            "is it ClickHouse's HTTP port",
        ),
    ):
        with Pretender(*answers) as pretender:
            status, out, err = ship(db, pretender.url, env=secret)
        assert (status, out) == (1, "") and says in err and err.count("\n") <= 1, (says, err)
        assert len(pretender.asked) == len(answers)
        for _, request in pretender.asked:
            head = request.split(b"\r\n\r\n")[0]
            assert (
                b"X-ClickHouse-User: shipper" in head and b"X-ClickHouse-Key: open sesame" in head
            )
            assert b"sesame" not in head.split(b"\r\n")[0]
    assert "cannot reach" in ship(db, "http://127.0.0.1:%d/" % free_port())[2]
    busy = reply(503, b"", b"Retry-After: 2")
    with Pretender(
        busy, reply(401, b"Code: 516. DB::Exception: shipper: Authentication failed")
    ) as pretender:
        status, _, err = ship(
            db, pretender.url, "--follow", env=secret
        )  # a password does not mend itself
    assert (
        status == 1
        and "again in 2 s" in err
        and "CLICKHOUSE_PASSWORD" in err
        and "shipper" not in err
    )
    assert 2 <= pretender.asked[1][0] - pretender.asked[0][0] < 60
    with Pretender(busy, patient=False) as pretender:  # refused before it was all sent
        house = session_events.ClickHouse(session_events.house_of(pretender.url), {})
        with pytest.raises(session_events.Later, match="status 503") as refused:
            house.insert(os.urandom(16 << 20))
    assert refused.value.after == 2
    url = clickhouse.database()
    wrong = dict(secret, CLICKHOUSE_PASSWORD="open barley")
    assert "does not know this user" in ship(db, url, env=wrong)[2]
    assert "only read" in ship(db, url, env={"CLICKHOUSE_USER": "visitor"})[2]
    assert "no such database" in ship(db, url + "x")[2]
    assert shipped(db, url, env=secret) == 10


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl makes the certificates")
def test_ship_checks_certificates(tmp_path):
    db = stored(tmp_path / "a.db", *many(2))
    cert, key = certificate(tmp_path, "house")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(str(cert), str(key))
    with Pretender(reply(503), tls=tls) as pretender:
        status, _, err = ship(db, pretender.url)
    assert status == 1 and "cannot be trusted" in err and pretender.asked == []
    with Pretender(reply(503), tls=tls) as pretender:
        status, _, err = ship(db, pretender.url, env={"SSL_CERT_FILE": str(cert)})
    assert status == 1 and "status 503" in err and len(pretender.asked) == 1


def test_ship_command_line_and_waiting(tmp_path, capfdbinary, monkeypatch):
    db = stored(tmp_path / "a.db", *many(2))
    for to in (
        "ftp://h/",
        "http://",
        "h:8123",
        "http://u@h/",
        "http://u:p@h/",
        "http://h:99999/",
        "http://h/?user=u",
        "http://h/?password=p",
        "http://h/?database=a;b",
        "http://h/?database",
        "http://h/ x",
        "http://h/#f",
        "http://h/\u00e9",
    ):
        status, out, err = answered(capfdbinary, ["ship", "--db", db, "--to", to])
        assert (status, out) == (2, "") and "--to" in err, to
    for argv in (
        [],
        ["--db", db],
        ["--to", "http://h/"],
        ["--db", db, "--to", "http://h/", "--check", "--follow"],
        ["--print-ddl", "--cluster", "a'b"],
    ):
        assert answered(capfdbinary, ["ship", *argv])[0] == 2
    monkeypatch.setenv("CLICKHOUSE_PASSWORD", "two\nlines")
    status, _, err = answered(capfdbinary, ["ship", "--db", db, "--to", "http://h/"])
    assert status == 2 and "CLICKHOUSE_PASSWORD" in err and "two" not in err
    out = answered(
        capfdbinary, ["ship", "--print-ddl", "--cluster", "main", "--to", "http://h/?database=x"]
    )[1]
    assert (
        out.count(" ON CLUSTER 'main'") == 4
        and "_local, cityHash64(identity_hash, session_id_hash))" in out
    )
    assert (
        "ReplicatedReplacingMergeTree('/clickhouse/tables/{shard}/x/session_events_local', '{replica}', sen"
        in out
    )
    for made in (out, answered(capfdbinary, ["ship", "--print-ddl"])[1]):
        assert (
            "seniority)\nORDER BY (identity_hash, session_id_hash);" in made
            and "PARTITION" not in made
        )

    monkeypatch.setattr(
        session_events, "SHIP_BYTES", 20_000
    )  # a batch ends early where rows are large
    wide = many(30, discovery_refs_json=json.dumps(["r" * 128] * 200))
    db = stored(tmp_path / "wide.db", *wide)
    assert [s.id for s in session_events.batch_after(db, 0)] == [
        1,
        2,
    ] and session_events.batch_after(db, 30) == []

    now = 1_800_000_000.0
    for text, seconds in (
        (None, None),
        ("7", 7.0),
        ("-7", 0.0),
        ("soon", None),
        ("\u0667", None),
        ("9" * 20, 86_400.0),
        ("9" * 40, None),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 86_400.0),
        ("Fri, 15 Jan 2027 08:00:30 GMT", 30.0),
        ("Fri, 15 Jan 2027 07:00:00 GMT", 0.0),
    ):
        assert session_events.retry_after(text, now) == seconds, text
    assert [session_events.back_off(n, 1.0) for n in (1, 2, 6, 7, 10**6)] == [
        10.0,
        20.0,
        300.0,
        300.0,
        300.0,
    ]
    assert session_events.back_off(3, 0.0) == 20.0


def test_ship_names_the_node_once(tmp_path, monkeypatch):
    """The node's name is written once; where that cannot be, it says so, and afterwards a reader's rights are
    enough."""
    db = stored(tmp_path / "a.db", *many(2), journal="DELETE")
    with contextlib.closing(sqlite3.connect(db, isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        monkeypatch.setattr(session_events, "BUSY_SECONDS", 0.1)
        with pytest.raises(
            session_events.Refused, match=r"cannot write the node's name .* keeps it locked"
        ):
            session_events.node_of(db)
    name = session_events.node_of(db)
    assert re.fullmatch("[0-9a-f]{16}", name) and session_events.node_of(db) == name
    assert session_events.node_of(stored(tmp_path / "b.db")) != name
    with contextlib.closing(sqlite3.connect(db)) as connection:
        connection.execute("UPDATE session_events_node SET name = 'a''b'")
        connection.commit()
    with pytest.raises(session_events.Refused, match="does not hold a node's name"):
        session_events.node_of(db)


@needs_linux
def test_ship_in_constant_memory(tmp_path, clickhouse):
    """Ten times the rows may not need noticeably more memory; and a terminal sees how far it is."""
    peaks = []
    for count in (4_000, 40_000):
        db = stored(
            tmp_path / ("%d.db" % count),
            *(row(n, n % 50, refs=["x"], received_at="2026-05-22T12:00:00Z") for n in range(count)),
        )
        url = clickhouse.database()
        status, out, err = ship(db, url, rows=2000, peak=True)
        assert status == 0 and out.startswith("{:,} rows shipped".format(count)), err
        assert ship(db, url, "--check", rows=2000)[0] == 0
        peaks.append(int(err.split()[1]))
    assert peaks[1] < peaks[0] + 8_000  # KiB; 36,000 rows as Python objects would be 40,000
    ours, theirs = os.openpty()
    url = clickhouse.database()
    subprocess.run(
        [sys.executable, str(ROOT / "session_events.py"), "ship", "--db", db, "--to", url],
        stdout=subprocess.DEVNULL,
        stderr=theirs,
        timeout=120,
    )
    os.close(theirs)
    assert b"40,000 rows shipped" in os.read(ours, 1 << 16)
    os.close(ours)


# ==================================================================================================
# The house
# ==================================================================================================


def pieces(secret):
    """What of a secret must not be printed: any 7 digits in a row of a hash or UUID, else the whole of it.

    (Pieces without a letter are left out: any large number might hold one.)
    """
    if re.fullmatch(r"[0-9a-f]{64}|[0-9a-f-]{36}", secret):
        return {
            secret[i : i + 7] for i in range(len(secret) - 6) if not secret[i : i + 7].isdigit()
        }
    return {secret}


def test_house_nothing_printed_names_anybody():
    """CONTRACT §8, over all that emit.py and server.py printed in every test before this one."""
    printed = b"\n".join(PRINTED).decode("utf-8", "replace")
    windows = {printed[i : i + 7] for i in range(len(printed) - 6)}
    assert len(SECRETS) > 10 and len(printed) > 1000
    for secret in SECRETS:
        for piece in pieces(secret):
            assert piece not in (windows if len(piece) == 7 else printed)
