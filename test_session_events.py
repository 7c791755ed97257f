"""The toolkit's tests: real sockets, processes, signals and files. They need pytest and nothing else.

    python3 -m pytest -q test_session_events.py

Rooms: the stage (what several rooms use) → emit.py → server.py → session_events.py → the house (what holds the
programs together). Everything that emit.py and server.py print in any test is recorded, and the last test searches it
for anything that could name a person or a session.
"""
import calendar
import concurrent.futures
import contextlib
import email.utils
import glob
import hashlib
import http.server
import importlib.util
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import emit

ROOT = Path(__file__).resolve().parent


# ======================================================================================================
# The stage
# ======================================================================================================

PRINTED = []  # bytes: all that the programs printed
SECRETS = set()  # text that must not be found there, in pieces of 7 or more digits for hashes, whole otherwise

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


def event(n, **changes):
    """A valid event of session `n` (any value: it is hashed), with `changes` laid over it."""
    session = hashlib.sha256(str(n).encode()).hexdigest()
    SECRETS.update((session, EVENT["identity_hash"], EVENT["github_hash"]))
    return dict(EVENT, session_id_hash=session, **changes)


def interpreters(oldest):
    """{(major, minor): path} of the CPythons on this machine, `oldest` and up, the running one among them."""
    found = {sys.version_info[:2]: sys.executable}
    candidates = glob.glob(os.path.expanduser("~/.pyenv/versions/3.*/bin/python3"))
    candidates += [shutil.which("python3.%d" % minor) or "" for minor in range(oldest[1], 20)]
    for path in filter(None, candidates):
        probe = subprocess.run([path, "-I", "-S", "-c", "import sys; print(*sys.version_info[:2])"],
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
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
    done = subprocess.run(list(map(str, argv)), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          timeout=options.pop("timeout", 60), **options)
    PRINTED.extend((done.stdout, done.stderr))
    done.stdout, done.stderr = done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")
    return done


class Server:
    """A real `server.py` process. `.url` is the endpoint; `.stop()` ends it and returns its exit status."""

    def __init__(self, db, *flags, python=sys.executable, **options):
        argv = [python, str(ROOT / "server.py"), "--db", str(db), "--port", "0", *map(str, flags)]
        self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, **options)
        self.errors = []  # lines of standard error so far
        self.drains = []
        first = self.process.stdout.readline()
        PRINTED.append(first)
        self.drain(self.process.stdout, [])
        self.drain(self.process.stderr, self.errors)
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
                lines.append(line.decode("utf-8", "replace").rstrip("\n"))
        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        self.drains.append(thread)

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


# ======================================================================================================
# emit.py
# ======================================================================================================

EMIT = ROOT / "emit.py"
MACHINE = "3f2b8c1e-9d47-4a6b-8f10-2c5d7e9a1b34"
PYTHONS = interpreters((3, 6))
every_python = pytest.mark.parametrize("python", PYTHONS.values(),
                                       ids=["%d.%d" % version for version in PYTHONS])


def share(cases, python, parts):
    """One interpreter's part of the cases: all of them together meet each case, and one alone meets all."""
    cases = list(cases)
    return cases[list(PYTHONS.values()).index(python) % parts::parts] if len(PYTHONS) >= parts else cases


def sha(text):
    """The hash of a text, which must never be printed."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    SECRETS.update((digest, text) if len(text) > 6 else (digest,))
    return digest


class Person:
    """A home folder, and the processes that emit.py is run in there. Consent comes from the environment."""

    def __init__(self, home, url="http://127.0.0.1:9/v1/session-events", **env):
        self.home, self.ashlr = home, home / ".ashlr"
        self.pending = self.ashlr / "session-events" / "pending"
        self.env = {"PATH": os.environ["PATH"], "HOME": str(home), "ASHLR_TELEMETRY": "on",
                    "ASHLR_SESSION_EVENTS_URL": url, "CLAUDE_PROJECT_DIR": str(home), **env}
        SECRETS.update((str(home), MACHINE))
        self.put("machine-id", MACHINE + "\n")

    def put(self, name, text):
        path = self.ashlr / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")
        return path

    def emit(self, *args, python=sys.executable, before="", recorded=True, **options):
        """Run emit.py; `before`: statements that run first, to take something away from the system."""
        options["env"] = {name: value for name, value in {**self.env, **options.pop("env",
                                                                                    {})}.items() if value}
        argv = [python, "-I", "-S", EMIT]
        if before:
            code = "import sys; sys.path[:0] = [%r]; %s; import emit; emit.run()" % (str(ROOT), before)
            argv = [python, "-I", "-S", "-c", code]
        if recorded:
            return run([*argv, *args], **options)
        return subprocess.run([*map(str, argv), *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              universal_newlines=True, timeout=60, **options)

    def hook(self, session, *args, **options):
        """A session's end, seen through to the end of its sender (debugging keeps standard error open)."""
        sha(session)
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


# --- the pure core


def test_emit_known_hashes():
    """`vectors.json`, of the contract."""
    november = calendar.timegm((2026, 11, 22, 0, 0, 0))
    for date, name, known in (
        ("2026-11-22", "salt_2026Q4", "c6806fc0a112b83956c6cfc9aeafea00a34cba756ec78f7ea0ca78b84df65b4a"),
        ("2026-12-31", "salt_2026Q4", "c6806fc0a112b83956c6cfc9aeafea00a34cba756ec78f7ea0ca78b84df65b4a"),
        ("2027-01-01", "salt_2027Q1", "abbaee7c39f908b0d3b0cf0d6bc7a237829ba2824a461a37d5deacb4e292bd3e"),
        ("2026-03-31", "salt_2026Q1", "960d7e513cd934e93aaeb25981ae0c09f9ce4595aba2f87679be3d8d2b89a0e8"),
        ("2026-04-01", "salt_2026Q2", "8224fa9c62f5dfd963578817e0e03c719b0bac8f3a96190cad628e158ccefb9a"),
    ):
        salt = emit.salt(calendar.timegm(time.strptime(date, "%Y-%m-%d")))
        assert (salt, emit.sha256_hex(MACHINE + salt)) == (name, known)
    assert emit.sha256_hex("octocat" + emit.salt(november)) == \
        "755dd7b916ca3c3eee9852aac136fbc26e69ba68e776fb0409fce72e00452763"
    assert emit.sha256_hex("deterministic-session-id-xyz") == \
        "09f0b7a07ce940858dbda3b5c0d06da4ab993427445feea11fcfc9807a288754"
    assert [emit.stats_bucket(*parent) for parent in ((4242, "/home/dev"), (1, ""), (77, "/home/zoë"))] == \
        ["p184789d5", "pe9ceaae8", "p31e8963a"]
    assert emit.sha256_hex("\ud800") != emit.sha256_hex("")  # a lone surrogate is no error
    assert emit.encoded(b"\xff/x".decode("utf-8", "surrogateescape")) == b"\xff/x"


def test_emit_reads_and_writes_times():
    for text, canonical in (
        ("2026-05-22T12:34:56.000Z", "2026-05-22T12:34:56.000Z"),
        ("2026-05-22T12:34:56Z", "2026-05-22T12:34:56.000Z"),
        ("2026-05-22T14:34:56.5+02:00", "2026-05-22T12:34:56.500Z"),
        ("2026-05-22T12:34:56", "2026-05-22T12:34:56.000Z"),
        ("2026-05-22T12:34:56.123456789Z", "2026-05-22T12:34:56.123Z"),
        ("2026-12-31T23:30:00-01:00", "2027-01-01T00:30:00.000Z"),
        ("1999-12-31T23:59:59.999Z", "1999-12-31T23:59:59.999Z"),
    ):
        assert emit.iso(emit.instant(text) + 0.0001) == canonical
    for text in ("2026/05/22", "2026-05-22", "2026-02-30T00:00:00Z", "2026-05-22T24:00:01Z",
                 "2026-05-22T12:34:56Z\n",
                 "2026-05-22T12:34:56Zgarbage", "٢٠٢٦-05-22T12:34:56Z", "2026-05-22 12:34:56Z",
                 "2026-05-22T12:34:56+25:00", "", None, 5, []):
        with pytest.raises(ValueError):
            emit.instant(text)


@pytest.mark.parametrize("allowed, env, said", [
    (False, {}, None), (False, {}, "on"), (False, {}, True), (False, {}, ["opt-in"]),
    (False, {}, emit.UNCLEAR),
    (True, {}, "opt-in"), (False, {"ASHLR_TELEMETRY": "perhaps"}, None),
    (True, {"ASHLR_TELEMETRY": ""}, "opt-in"),
    (True, {"ASHLR_TELEMETRY": " ON "}, None), (True, {"ASHLR_TELEMETRY": "1"}, emit.UNCLEAR),
    (False, {"ASHLR_TELEMETRY": "Off"}, "opt-in"), (False, {"ASHLR_TELEMETRY": "0"}, "opt-in"),
    (False, {"ASHLR_TELEMETRY": "on"}, "off"), (False, {"ASHLR_TELEMETRY": "on", "DO_NOT_TRACK": "1"},
                                                "opt-in"),
    (False, {"DO_NOT_TRACK": "false"}, "opt-in"), (True, {"DO_NOT_TRACK": " 0 "}, "opt-in"),
    (True, {"DO_NOT_TRACK": " "}, "opt-in"),
])
def test_emit_consent(allowed, env, said):
    assert emit.consent(env, said)[0] is allowed


def test_emit_endpoint():
    for env, url in (
        ({}, "http://127.0.0.1:8787/v1/session-events"), ({"ASHLR_API_URL": " "},
                                                          "http://127.0.0.1:8787/v1/session-events"),
        ({"ASHLR_API_URL": "https://a.example//"}, "https://a.example/v1/session-events"),
        ({"ASHLR_API_URL": "https://a.example", "ASHLR_SESSION_EVENTS_URL": "http://b/x?y"}, "http://b/x?y"),
    ):
        assert emit.checked_url(emit.endpoint(env)[0])[0] == url
    assert emit.checked_url("https://me:p%40ss@host:8443/x?token=1#f") == \
        ("https://host:8443/x?token=1", "Basic bWU6cEBzcw==", "https://host:8443/x?...")
    for url in ("", "file:///etc/passwd", "ftp://h/", "http://", "http://h:0/", "http://h:99999/",
                "http://h:x/", "h/x",
                "http://h/a b", "http://h/\r\nX: y", "http://h/é", "javascript:x", "http://[::1/",
                "http://h/" + "x" * 5000):
        with pytest.raises(ValueError) as error:
            emit.checked_url(url)
        assert len(url) < 8 or url not in str(error.value)


def test_emit_counts():
    now = emit.instant("2026-11-22T12:00:00Z")
    fresh = {"sessionId": "s2", "updatedAt": "2026-11-22T11:00:00.000Z"}
    stats = {"schemaVersion": 2, "sessions": {
        "s1": {"calls": 5, "tokensSaved": 7.9}, "s2": {"calls": 10, "tokensSaved": 100}, "p1": {"calls": 1}}}
    for known, project, expected in (
        (stats, {}, (6, 7)), (stats, fresh, (16, 107)), (stats, dict(fresh, sessionId="s1"), (6, 7)),
        (stats, dict(fresh, updatedAt="2026-11-21T12:00:00Z"), (16, 107)),
        (stats, dict(fresh, updatedAt="2026-11-21T11:59:59Z"), (6, 7)),  # older than a day
        (stats, dict(fresh, updatedAt="2026-11-22T12:00:01Z"), (6, 7)),  # of the future
        (stats, {"sessionId": ["s2"], "updatedAt": fresh["updatedAt"]}, (6, 7)),
        (dict(stats, schemaVersion=3), {}, (0, 0)), ({}, {}, (0, 0)), ({"sessions": [1]}, {}, (0, 0)),
        ({"sessions": {"s1": {"calls": -3, "tokensSaved": "9"}, "p1": None}}, {}, (0, 0)),
        ({"sessions": {"s1": {"calls": True, "tokensSaved": float("inf")}, "p1": {"calls": 1e300}}}, {},
         (1000000, 0)),
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
        (folder + "x.md", "/p", "/p", "x"), ("../" + folder + "x.md", "/p/sub", "/p", "x"),
        ("/p/" + folder + "s/x.md", "/", "/p", "x"),
        ("/p/" + folder + "../discoveries/x.md", "/", "/p", "x"),
        ("/p/" + folder + "../../secret.md", "/", "/p", ""),
        ("/p/" + folder, "/", "/p", ""), ("/p/" + folder[:-1], "/", "/p", ""), ("/p/src/x.md", "/", "/p", ""),
        ("/q/" + folder + "x.md", "/", "/p", ""), ("/pp/" + folder + "x.md", "/", "/p", ""),
        ("", "/p", "/p", ""),
        ("/p/" + folder + "my notes.md", "/", "/p", ""), ("/p/" + folder + ".hidden", "/", "/p", ""),
        ("/p/" + folder + "x" * 129 + ".md", "/", "/p", ""), ("/p/" + folder.upper() + "x.md", "/", "/p", ""),
        (windows + "Auth.md", "C:\\", "C:\\Src\\App", "Auth"),
        (windows.lower() + "x.md", "D:\\", "C:/Src/App", "x"),
        (windows.replace("\\", "/") + "x.md", "C:\\", "c:\\src\\app", "x"),
        (folder + "x.md", "C:\\Src\\App", "C:\\Src\\App", "x"),
        (windows + "x.md", "C:\\", "C:\\Src", ""), (windows + "x.md", "/p", "/p", ""),
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
        {"identity_hash": "A" * 64}, {"identity_hash": "a" * 63}, {"identity_hash": "a" * 64 + "\n"},
        {"identity_hash": None},
        {"github_hash": ""}, {"github_hash": 5}, {"session_id_hash": "٠" * 64},
        {"ended_at": "2026-02-30T00:00:00.000Z"},
        {"ended_at": "2026-05-22T12:34:56.000Z\n"}, {"ended_at": None}, {"ended_at": "2026-05-22T12:34:56Z"},
        {"tool_count": True}, {"tool_count": -1}, {"tool_count": 1000001}, {"tool_count": 1.5},
        {"tool_count": float("nan")},
        {"tokens_saved": 10 ** 9 + 1}, {"tokens_saved": "5"}, {"branch_sha": "abc123"},
        {"branch_sha": "a" * 41},
        {"branch_sha": "main"}, {"discovery_refs": None}, {"discovery_refs": ["a b"]},
        {"discovery_refs": [1]}, {"discovery_refs": "a"},
        {"discovery_refs": ["r%d" % n for n in range(201)]}, {"discovery_refs": ["\ud800"]},
        {"plugin_version": ""},
        {"plugin_version": "/home/me"}, {"plugin_version": "1" * 65}, {"extra": 1},
    ):
        assert not emit.is_event(dict(good, **changes)), changes
    assert not any(emit.is_event(value) for value in (None, [], "x", {}, 5, [good]))
    assert not emit.is_event({name: good[name] for name in good if name != "tool_count"})


def test_emit_reads_json_alike_with_and_without_the_c_scanner(monkeypatch):
    cases = [b'{"a": [1, 2.5, -0, 1e400, true, null, "\\u00e9"]}', b' \r\n\t{"a":1,"a":2}\n',
             b"\xef\xbb\xbf{}", b"", b"  ",
             b"[1,]", b"{} x", b"{}{}", b"\xff", "{}".encode("utf-16"), b'{"a": NaN}', b"Infinity",
             b"-Infinity", b"tru",
             b'"\n"', b'"\\ud800"', b"[" * 100000, b'{"a":' * 100000, b"01", b"\x0b{}", b"\xc2\xa0{}",
             b"123456789012345678901"]

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
    for header, at in ((None, 0.0), ("", 0.0), ("120", now + 120), ("0", 0.0), ("-5", 0.0), ("1.5", 0.0),
                       ("9" * 50, now + 86400),
                       ("Sun, 22 Nov 2026 12:10:00 GMT", now + 600), ("Sun, 22 Nov 2020 12:10:00 GMT", 0.0),
                       ("Sun, 22 Nov 2099 12:10:00 GMT", now + 86400), ("soon", 0.0), ("٣", 0.0)):
        assert emit.retry_at(header, now) == at, header
    for argv, parsed in (([], ("", None, [])), (["--wait"], ("", 0.5, [])),
                         (["--wait", "2000", "--dir", "/x"], ("/x", 2.0, [])),
                         (["--wait", "--dir", "/x"], ("/x", 0.5, [])), (["--wait", "999999"], ("", 20.0, [])),
                         (["--dir"], ("", None, ["--dir"])), (["a", "--b"], ("", None, ["a", "--b"]))):
        assert emit.options(argv) == parsed
    names = [b"%015d-%012x.json" % (now * 1000 - (700 - n) * 1000, n) for n in range(700)]
    assert emit.expired(names, now) == set(names[:200])
    assert emit.expired(names, now + 29 * 86400) == set(names[:200])
    assert emit.expired(names, now + 31 * 86400) == set(names)
    assert emit.expired(names[:10], now - 400 * 86400) == set()  # a clock that was a year ahead
    assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}",
                        emit.random_uuid())
    assert emit.github_login({"valid": True, "githubLogin": "octocat"}) == "octocat"
    assert not any(map(emit.github_login, ({}, {"valid": "true", "githubLogin": "o"}, {"valid": True,
                                                                                       "githubLogin": 5},
                                           {"valid": False, "githubLogin": "o"},
                                           {"valid": True, "githubLogin": " "})))


def test_emit_is_the_same_program_unfolded(person, tmp_path):
    """The fold is for speed only: same names at the same lines, same event."""
    text = EMIT.read_text()
    plain = text.replace("PART_TWO = r'''\n", "\n", 1).replace("\n'''\n", "\n\n", 1)
    assert plain != text and "'''" not in plain.split("def unfold")[1]
    (tmp_path / "emit.py").write_text(plain)
    spec = importlib.util.spec_from_file_location("plain_emit", str(tmp_path / "emit.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    lines = [{name: value.__code__.co_firstlineno for name, value in vars(m).items() if hasattr(value,
                                                                                                "__code__")}
             for m in (emit, module)]
    assert lines[0] == lines[1] and len(lines[0]) > 50
    shown = [subprocess.run([sys.executable, "-I", "-S", str(file), "show"], env=person.env,
                            stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout
             for file in (EMIT, tmp_path / "emit.py")]
    first, second = (re.sub(rb'"ended_at": "[^"]*"', b"", line) for line in shown)
    assert first == second and b"session_id_hash" in first


# --- the hook, as a process


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """(a git repository with one commit, the commit)."""
    path = tmp_path_factory.mktemp("repository")
    git = ["git", "-C", str(path), "-c", "user.name=x", "-c", "user.email=x@example.com"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run(git + command, check=True, env={"PATH": os.environ["PATH"], "HOME": str(path)})
    return path, subprocess.run([*git, "rev-parse", "HEAD"], check=True,
                                stdout=subprocess.PIPE).stdout.decode().strip()


@pytest.fixture(scope="module")
def ingest(tmp_path_factory):
    """A real server, and a function that gives the row of a session."""
    db = tmp_path_factory.mktemp("ingest") / "events.db"

    def row(session):
        with contextlib.closing(sqlite3.connect(str(db))) as connection:
            connection.row_factory = sqlite3.Row
            found = connection.execute("SELECT * FROM session_events WHERE session_id_hash = ?",
                                       [sha(session)])
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
        people = [Person(tmp_path_factory.mktemp("crowd") / "home", silent.url),
                  Person(tmp_path_factory.mktemp("drip") / "home",
                         "http://127.0.0.1:%d/" % listener.getsockname()[1])]
        hooks = [subprocess.Popen([sys.executable, "-I", "-S", str(EMIT)], stdin=subprocess.DEVNULL,
                                  stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT, env={**person.env,
                                                                 "CLAUDE_SESSION_ID": "crowd-%d" % n})
                 for n, person in enumerate([people[0]] * 50 + [people[1]])]
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
    until(lambda: len(people[0].kept()) == 50 and len(people[0].senders()) <= 1, 20)  # the others gave way


@every_python
def test_emit_whole_path(python, tmp_path, repository, ingest):
    """Hook JSON in, row out; a home that is not ASCII, in an environment without a locale."""
    server, row = ingest
    session, login = "whole-path-" + python, "octocat-of-the-test"
    person = Person(tmp_path / "zoë", server.url, CLAUDE_PROJECT_DIR="", ASHLR_TELEMETRY="",
                    CLAUDE_PLUGIN_ROOT=str(tmp_path))
    (tmp_path / "package.json").write_text('{"version": "1.31.0"}')
    person.put("config.json", {"theme": "dark", "telemetry": "opt-in"})
    person.put("pro-token-cache.json", {"valid": True, "githubLogin": login})
    bucket = emit.stats_bucket(os.getpid(), str(person.home))
    person.put("stats.json", {"schemaVersion": 2, "sessions": {session: {"calls": 40, "tokensSaved": 9},
                                                               bucket: {"calls": 2}}})
    person.put("session-events/touched/" + sha(session), "first\nsecond")
    hook = {"session_id": session, "transcript_path": "/secret/transcript.jsonl", "cwd": str(repository[0]),
            "hook_event_name": "SessionEnd", "reason": "exit", "permission_mode": "default"}
    done = person.emit(python=python, input=json.dumps(hook).encode(), env={"ASHLR_TELEMETRY_DEBUG": "1"})
    assert (done.returncode, done.stdout) == (0, "") and "1 answered 202" in done.stderr
    [stored] = row(session)
    received, ended = stored.pop("received_at"), stored.pop("ended_at")
    salt = "salt_%sQ%d" % (ended[:4], (int(ended[5:7]) + 2) // 3)
    assert ended[:19] <= received and stored.pop("id")
    assert stored == {
        "identity_hash": sha(MACHINE + salt), "github_hash": sha(login + salt),
        "session_id_hash": sha(session),
        "tool_count": 42, "tokens_saved": 9, "branch_sha": repository[1][:12],
        "discovery_refs_json": '["first","second"]',
        "plugin_version": "1.31.0"}
    assert person.kept() == [] and not list((person.ashlr / "session-events" / "touched").iterdir())


HOOKS = [  # as real hosts send them at a session's end
    {"session_id": "hook-a", "transcript_path": "/t.jsonl", "cwd": "/", "hook_event_name": "SessionEnd",
     "reason": "clear"},
    {"session_id": "hook-b", "transcript_path": "/t.jsonl", "cwd": "/", "permission_mode": "acceptEdits",
     "hook_event_name": "SessionEnd", "reason": "other"},
    {"session_id": "hook-c", "cwd": "C:\\Users\\me\\app", "hook_event_name": "SessionEnd", "reason": "logout",
     "later": [{}]},
]


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook["session_id"])
def test_emit_takes_recorded_hook_input(hook, person):
    with Odd() as server:
        done = person.emit("--wait", "20000", input=json.dumps(hook).encode(),
                           env={"ASHLR_SESSION_EVENTS_URL": server.url})
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert server.sessions() == [sha(hook["session_id"])]
        person.hook("from the environment", input=json.dumps(hook).encode(),
                    env={"ASHLR_SESSION_EVENTS_URL": server.url})
        assert server.sessions()[1:] == [sha("from the environment")]


@every_python
def test_emit_waits_for_no_input(python, person):
    """A terminal's absence, rubbish, an object without an end, silence: each is one event and no hang."""
    parent = "ppid:%d:%s:%s" % (os.getpid(),
                                Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19], MACHINE)
    with Odd() as server:
        person.env["ASHLR_SESSION_EVENTS_URL"] = server.url
        rubbish = b"", b"{", b"[]", b"\xff\xfe", b'{"session_id": 7}', b'{"session_id": " "}'
        for data in share(rubbish, python, 3):
            person.emit("--wait", "20000", python=python, input=data)
            assert server.sessions().pop() == sha(parent), data
        person.emit("--wait", "20000", python=python, preexec_fn=lambda: os.close(0))
        assert server.sessions().pop() == sha(parent)
        for data, session in ((b'{"session_id": "unclosed"}\n', "unclosed"), (b"", parent)):
            read, write = os.pipe()
            os.write(write, data)
            person.emit("--wait", "20000", python=python, stdin=read)
            os.close(write)
            os.close(read)
            assert server.sessions().pop() == sha(session)
        large = {"session_id": "large", "x": "}" * 3000000}
        person.emit("--wait", "20000", python=python, input=json.dumps(large).encode())
        assert server.sessions().pop() == sha("large")


BREAKAGES = {  # what somebody may have done to the folder: nothing may come of it but silence
    "config is a folder": lambda person: (person.ashlr / "config.json").mkdir(),
    "config is no JSON": lambda person: person.put("config.json", "{telemetry: on"),
    "config is a pipe": lambda person: os.mkfifo(str(person.ashlr / "config.json")),
    "machine-id is a folder": lambda person: [(person.ashlr / "machine-id").unlink(),
                                              (person.ashlr / "machine-id").mkdir()],
    "machine-id is empty": lambda person: person.put("machine-id", "\n"),
    "stats and the rest are rubbish": lambda person: [person.put(name, "[" * 5000) for name in (
        "stats.json", "last-project.json", "pro-token-cache.json", "session-events/last.json")],
    "stats has numbers of thousands of digits": lambda person: person.put("stats.json",
                                                                          '{"sessions": %s}' % ("9" * 9000)),
    "the spool is a file": lambda person: person.put("session-events/pending", "x"),
    "there is no home": lambda person: shutil.rmtree(str(person.home)) or person.home.write_text("a file"),
    "the URL is no URL": lambda person: person.env.update(ASHLR_SESSION_EVENTS_URL="file:///etc/passwd"),
    "the project is gone": lambda person: person.env.update(CLAUDE_PROJECT_DIR="/nonexistent\nfolder"),
    "nobody is there": lambda person: person.env.update(ASHLR_SESSION_EVENTS_URL="http://nobody.invalid/"),
    "PATH is empty": lambda person: person.env.update(PATH="/nonexistent"),
}


@every_python
def test_emit_hook_never_fails(python, tmp_path):
    ways = [(), ("--wait", "1"), ("--wait", "400", "--nonsense", "x"), ("track",)]
    for n, (name, breakage) in enumerate(BREAKAGES.items()):
        person = Person(tmp_path / str(n))
        breakage(person)
        way = ways[(n + list(PYTHONS.values()).index(python)) % 4]  # over all interpreters, each with each
        done = person.emit(*way, python=python,
                           input=b'{"session_id":"s","tool_input":{"path":"discoveries"}}')
        assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), (name, way)
    done = person.emit(python=python, env={"HOME": None, "ASHLR_TELEMETRY": None}, cwd=str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@every_python
def test_emit_consent_off_does_nothing(python, person, tmp_path):
    """No file, no git, no request; what waits is deleted, also when the answer changes between two sends."""
    log = tmp_path / "ran"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "git").write_text("#!/bin/sh\necho ran >> %s\n" % log)
    (tmp_path / "bin" / "git").chmod(0o755)
    with Odd() as server:
        person.env.update(PATH="%s:%s" % (tmp_path / "bin", person.env["PATH"]),
                          ASHLR_SESSION_EVENTS_URL=server.url)
        person.put("session-events/pending/%015d-000000000000.json" % 5, event(5))
        person.put("session-events/touched/" + "a" * 64, "x")
        person.hook("off", python=python, env={"DO_NOT_TRACK": "1"})
        assert person.kept() == [] and not list(person.ashlr.glob("session-events/touched/*"))
        bare = Person(tmp_path / "bare", server.url, ASHLR_TELEMETRY="")
        (bare.ashlr / "machine-id").unlink()
        bare.hook("off", python=python)
        bare.emit("track", "x", python=python)
        assert list(bare.home.rglob("*")) == [bare.ashlr] and not log.exists() and not server.requests

        server.answer = lambda n, body: (person.put("config.json", {"telemetry": "off"}), (202, {}))[1]
        for n in range(3):
            person.put("session-events/pending/%015d-%012d.json" % (n, n), event(n))
        assert "consent is off" in person.hook("on", python=python)
        assert server.sessions() == [event(0)["session_id_hash"]] and person.kept() == []
        assert not (person.ashlr / "session-events" / "last.json").exists() and log.exists()


@every_python
def test_emit_leaves_its_caller_alone(python, person, tmp_path):
    """The parent is gone and its pipes are closed while the sender still waits for a silent server."""
    with Odd(lambda n, body: None) as server:
        with (tmp_path / "open").open("w") as extra:
            done = person.emit(python=python, input=b'{"session_id":"leaves"}', cwd=str(tmp_path),
                               pass_fds=[extra.fileno()],
                               env={"ASHLR_SESSION_EVENTS_URL": server.url})
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        until(lambda: server.requests)
        [sender] = person.senders()
        assert os.getsid(sender) == sender and os.readlink("/proc/%d/cwd" % sender) == "/"
        open_files = {os.readlink(path) for path in glob.glob("/proc/%d/fd/*" % sender)}
        ours = {path for path in open_files if path != "/dev/null" and not path.startswith("socket:")}
        assert ours <= {str(person.ashlr / "session-events" / "flush.lock")}
        assert [kept["session_id_hash"] for kept in person.kept()] == [sha("leaves")]
        assert [oct(path.stat().st_mode & 0o777) for path in (person.pending,
                                                              *person.pending.iterdir())] == ["0o700",
                                                                                              "0o600"]
        os.kill(sender, signal.SIGKILL)


@every_python
def test_emit_keeps_or_drops_by_the_answer(python, tmp_path):
    with Odd() as elsewhere:
        statuses = dict.fromkeys((200, 202, 204, 400, 404, 413), 0)  # how many files stay
        statuses.update(dict.fromkeys((301, 302, 307, 408, 429, 500, 503), 1))
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
            assert "nothing sent" in person.hook("retry-2", python=python) and len(server.requests) == 1
            state = json.loads((person.ashlr / "session-events" / "last.json").read_text())
            assert 3500 < state["retry_at"] - time.time() < 3700
            server.answer = lambda n, body: (202, {})
            for at in (time.time() - 1, time.time() + 365 * 86400):  # over; of a clock that was a year ahead
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
    bad = {"%015d-%012x.json" % (now, 5000): "", "%015d-%012x.json" % (now, 5001): '{"half": ',
           "%015d-%012x.json" % (now, 5002): "[" * 9000,
           "%015d-%012x.json" % (now, 5003): json.dumps(event(1, plugin_version="/home/me")),
           "%015d-%012x.json" % (now, 5004): "x" * 70000}
    foreign = {"note.txt": "keep me", "new.json": json.dumps(event(2))}
    for name, text in {**bad, **foreign}.items():
        person.put("session-events/pending/" + name, text)
    (person.pending / ("%015d-%012x.json" % (now, 5005))).mkdir()
    stale, young = (person.put(folder + "/.0123456789abcdef.tmp",
                               "{") for folder in ("session-events/pending", "session-events"))
    os.utime(str(stale), (1, 1))
    with Odd() as server:
        said = person.hook("thousand", env={"ASHLR_SESSION_EVENTS_URL": server.url})
        assert "1001 answered 202" in said and "5 removed" in said
        expected = [event(n)["session_id_hash"] for n in range(1000)]
        assert server.sessions() == [*expected[:-1], sha("thousand"), expected[-1]]
    assert {path.name for path in person.pending.iterdir()} == {*foreign, "%015d-%012x.json" % (now, 5005)}
    assert young.exists()


def test_emit_lets_500_events_wait_for_30_days(person):
    now, day = int(time.time() * 1000), 86400 * 1000
    for n in range(520):
        person.put("session-events/pending/%015d-%012x.json" % (now - day - 520 + n, n), event(n))
    for n in range(600, 605):
        person.put("session-events/pending/%015d-%012x.json" % (now - 31 * day, n), event(n))
    assert "1 without an answer" in person.hook("dead")
    kept = [kept["session_id_hash"] for kept in person.kept()]
    assert kept == [event(n)["session_id_hash"] for n in range(21, 520)] + [sha("dead")]


@every_python
def test_emit_without_room_sends_at_once(python, tmp_path):
    """A full disk, and a folder that cannot be written: the event goes without the spool."""
    for n, (before, options) in enumerate((
        (lambda person: person.put("session-events", "a file"), {}),
        (lambda person: None, {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))}),
    )):
        with Odd() as server:
            person = Person(tmp_path / str(n), server.url)
            before(person)
            assert "not kept" in person.hook("no-room", python=python, **options)
            assert server.sessions() == [sha("no-room")] and not list(person.ashlr.rglob("*.tmp"))


def test_emit_asks_git_for_no_favours(person, repository, tmp_path):
    """Variables of git's own hooks lead nowhere; a git that hangs, its child with the pipe, costs 250 ms."""
    with Odd() as server:
        person.env.update(ASHLR_SESSION_EVENTS_URL=server.url, GIT_DIR="/nonexistent", GIT_WORK_TREE="/")
        person.hook("git", "--dir", str(repository[0]))
        (tmp_path / "git").write_text("#!/bin/sh\nsleep 30 & sleep 30\n")
        (tmp_path / "git").chmod(0o755)
        person.hook("slow-git", env={"PATH": "%s:%s" % (tmp_path, os.environ["PATH"])})
        assert [json.loads(body)["branch_sha"] for _, _, body in server.requests] == [repository[1][:12],
                                                                                      None]
        assert not any("sleep" in Path("/proc/%d/cmdline" % pid).read_text() for pid in person.senders())


@every_python
def test_emit_goes_through_the_proxy_that_the_environment_names(python, person):
    """And no other: on a Mac, urllib would ask the system, which crashes after a fork."""
    with Odd() as proxy:
        person.env.update(ASHLR_SESSION_EVENTS_URL="http://me:secret-word@far.example/x",
                          http_proxy=proxy.url.rsplit("/", 2)[0])
        SECRETS.add("secret-word")
        said = person.hook("proxy", python=python, before="sys.platform = 'darwin'")
        assert "http://far.example/x" in said
        [(path, headers, _)] = proxy.requests
        assert path == "http://far.example/x" and headers["Authorization"] == "Basic bWU6c2VjcmV0LXdvcmQ="
        person.hook("direct", python=python, env={"no_proxy": "far.example",
                                                  "ASHLR_SESSION_EVENTS_URL": "http://far.example/x"})
        assert len(proxy.requests) == 1


@every_python
def test_emit_without_what_other_systems_lack(python, person):
    """No fork: in the foreground, within 500 ms. No locks, no select on pipes, no parent: still an event."""
    took = "import os; del os.fork; "
    lacks = ("", "del os.getppid; del os.setsid", "sys.modules['fcntl'] = None",
             "import select; select.select = lambda *a: os.close(-1)",
             "del os.killpg; del os.O_NONBLOCK")
    with Odd() as server:
        for n, before in share(enumerate(lacks), python, 2):
            session = "lacks-%d" % n
            person.env["ASHLR_SESSION_EVENTS_URL"] = server.url
            done = person.emit("--wait", "20000", python=python, before=took + (before or "pass"),
                               input=json.dumps(HOOKS[0]).encode(),
                               env={"CLAUDE_SESSION_ID": session})
            assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
            assert server.sessions().pop() == sha(session), before
        server.answer = lambda n, body: None
        begun = time.monotonic()
        person.emit(python=python, before=took + "pass", input=b'{"session_id": "no-fork"}')
        assert time.monotonic() - begun < 8
        assert [kept["session_id_hash"] for kept in person.kept()] == [sha("no-fork")]
        done = person.emit(python=python,
                           before="import os; os.fork = lambda: (_ for _ in ()).throw(OSError(11, 'x'))")
        assert done.returncode == 0 and len(person.kept()) == 2 and not person.senders()


def test_emit_of_a_parent_without_a_start_time(person):
    """Where /proc tells nothing, `ps` does; where neither, the text has an empty place."""
    hidden = ("import os; real = os.open; os.open = lambda path, *a, **k: "
              "real(b'/nonexistent' if str(path)[:7] == \"b'/proc\" else path, *a, **k)")
    started = subprocess.run(["ps", "-o", "lstart=", "-p", str(os.getpid())], stdout=subprocess.PIPE,
                             env={"PATH": os.environ["PATH"], "LC_ALL": "C"})
    with Odd() as server:
        for path, start in ((os.environ["PATH"], started.stdout.decode().strip()), ("/nonexistent", "")):
            person.emit("--wait", "20000", before=hidden, env={"PATH": path,
                                                               "ASHLR_SESSION_EVENTS_URL": server.url})
            assert server.sessions().pop() == sha("ppid:%d:%s:%s" % (os.getpid(), start, MACHINE))


def test_emit_survives_200_kills(person):
    """Killed at a random instant, an event that was captured is whole, and arrives with the next good run."""
    moments, captured = random.Random(4), []

    def kill(n):
        session = "kill-%d" % n
        with subprocess.Popen([sys.executable, "-I", "-S", str(EMIT), "--wait", "20000"],
                              stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              env={**person.env, "CLAUDE_SESSION_ID": session,
                                   "ASHLR_TELEMETRY_DEBUG": "1"}) as process:
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
                captured.append(sha(session))
    with Odd() as server:
        person.env["ASHLR_SESSION_EVENTS_URL"] = server.url
        begun = time.monotonic()
        person.emit("--wait", "20000")
        whole = 2 * (time.monotonic() - begun)  # of a run beside the others
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            list(pool.map(kill, range(200)))
        assert all(emit.is_event(json.loads(path.read_text())) for path in person.pending.glob("[0-9]*"))
        said = person.hook("after the kills")
        assert all(emit.is_event(json.loads(body)) for _, _, body in server.requests)
        assert set(captured) <= set(server.sessions()) and person.kept() == [], said
        assert len(captured) >= 100


# --- discoveries


TOOLS = [  # as real hosts send them after a tool, the project being PROJECT
    {"session_id": "tool", "cwd": "PROJECT", "hook_event_name": "PostToolUse", "tool_name": "Edit",
     "tool_input": {"file_path": "PROJECT/.ashlrcode/genome/sections/discoveries/auth-jwt-flow.md",
                    "old_string": "x"}},
    {"session_id": "tool", "cwd": "PROJECT/sub", "hook_event_name": "PostToolUse",
     "tool_name": "NotebookEdit",
     "tool_input": {"notebook_path": "../.ashlrcode/genome/sections/discoveries/rate.ipynb"},
     "tool_response": {"ok": True}},
    {"session_id": "tool", "cwd": "PROJECT", "hook_event_name": "PostToolUse", "tool_name": "Grep",
     "tool_input": {"pattern": "x",
                    "path": "PROJECT/.ashlrcode/genome/sections/discoveries/auth-jwt-flow.md"}},
    {"session_id": "tool", "cwd": "PROJECT", "hook_event_name": "PostToolUse", "tool_name": "Read",
     "tool_input": {"file_path": "PROJECT/src/discoveries.py"}},
    {"session_id": "tool", "cwd": "PROJECT", "hook_event_name": "PostToolUse", "tool_name": "Bash",
     "tool_input": {"command": "ls"}},
    {"session_id": "tool", "cwd": "PROJECT", "tool_input": ["discoveries"]},
]


@every_python
def test_emit_track_and_the_session_it_belongs_to(python, person, tmp_path):
    person.env["CLAUDE_PROJECT_DIR"] = str(tmp_path)
    alias = tmp_path / "alias"
    alias.symlink_to(tmp_path)
    listed = person.ashlr / "session-events" / "touched" / sha("tool")
    for n, tool in enumerate(TOOLS):
        text = json.dumps(tool).replace("PROJECT", str(alias if n == 2 else tmp_path))
        if n == 1:  # any letter may be written so
            text = text.replace("discoveries", "\\u0064iscoverie\\u0073")
        done = person.emit("track", python=python, input=text.encode())
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert listed.read_text().split() == (["auth-jwt-flow"] if n == 0 else ["auth-jwt-flow", "rate"])
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
        assert json.loads(server.requests[0][2])["discovery_refs"] == ["auth-jwt-flow", "rate", "by-hand"]
    assert not listed.exists() and not old.exists()


def test_emit_tracks_many_at_once(person):
    """Tool hooks that run at the same moment lose nothing."""
    env = {**person.env, "CLAUDE_SESSION_ID": "many"}
    hooks = [subprocess.Popen([sys.executable, "-I", "-S", str(EMIT), "track", "ref-%d" % n],
                              env=env) for n in range(24)]
    assert [process.wait(60) for process in hooks] == [0] * 24
    listed = (person.ashlr / "session-events" / "touched" / sha("many")).read_text().split()
    assert sorted(listed) == sorted("ref-%d" % n for n in range(24))


# --- what the person sees


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
        "waiting": {"events": 0, "since": None}, "last_flush": None}
    on = person.emit("on", python=python)
    assert on.returncode == 0 and len(on.stdout.splitlines()) == 4 and "http://127.0.0.1:9/x?..." in on.stdout
    assert json.loads(config.read_text()) == {"theme": "dark", "n": [1.5, {"é": None}], "telemetry": "opt-in"}
    assert config.stat().st_mode & 0o777 == 0o640
    assert person.emit("on", python=python).stdout == "on, as before\n"
    person.hook("status", python=python)
    assert status()["consent"]["on"] and status()["waiting"]["events"] == 1
    assert "without an answer" in status()["last_flush"]["result"]
    text = person.emit("status", python=python).stdout
    assert "opt-in" in text and "events: 1, since 20" in text and "without an answer" in text

    before = sorted((path, path.stat().st_mtime) for path in person.home.rglob("*"))
    shown = person.emit("show", python=python, recorded=False, env={"CLAUDE_SESSION_ID": "status"},
                        stdin=subprocess.DEVNULL)
    kept = person.kept()[0]
    assert {**json.loads(shown.stdout), "ended_at": ""} == {**kept,
                                                            "ended_at": ""} and "127.0.0.1:9/x" in shown.stderr
    assert sorted((path, path.stat().st_mtime) for path in person.home.rglob("*")) == before

    off = person.emit("off", python=python)
    assert off.returncode == 0 and person.kept() == [] and json.loads(config.read_text())["telemetry"] == "off"
    assert "still off" in person.emit("on", python=python, env={"DO_NOT_TRACK": "1"}).stderr
    for text in ("{", "[]", '{"n": 1e999}', ""):
        config.write_text(text)
        done = person.emit("off", python=python)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and config.read_text() == text
    for args in (("status", "x"), ("show", "x"), ("on", "x"), ("off", "--json"), ("bogus",)):
        done = person.emit(*args, python=python)
        assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    fresh = Person(tmp_path / "fresh", ASHLR_TELEMETRY="")
    (fresh.ashlr / "machine-id").unlink()
    assert "passing" in fresh.emit("show", python=python, recorded=False, stdin=subprocess.DEVNULL).stderr
    assert list(fresh.ashlr.iterdir()) == []
    done = fresh.emit("--help", python=python)
    assert done.returncode == 0 and "example:" in done.stdout


@every_python
def test_emit_makes_one_machine_id(python, person):
    """50 first sessions at once agree on one name, and nobody overwrites it."""
    (person.ashlr / "machine-id").unlink()
    with Odd() as server:
        person.env["ASHLR_SESSION_EVENTS_URL"] = server.url
        hooks = [subprocess.Popen([python, "-I", "-S", str(EMIT), "--wait", "20000"],
                                  stdin=subprocess.DEVNULL,
                                  env={**person.env, "CLAUDE_SESSION_ID": "first-%d" % n}) for n in range(6)]
        assert [process.wait(60) for process in hooks] == [0] * 6
        person.hook("first-7")
        machine = (person.ashlr / "machine-id").read_text()
        SECRETS.add(machine)
        assert re.fullmatch(r"[0-9a-f-]{36}",
                            machine) and (person.ashlr / "machine-id").stat().st_mode & 0o777 == 0o600
        bodies = [json.loads(body) for _, _, body in server.requests]
        assert len(bodies) == 7 and {body["identity_hash"] for body in bodies} == \
            {sha(machine + emit.salt(emit.instant(body["ended_at"]))) for body in bodies}


def test_emit_of_50_sessions_at_once_leaves_no_process_and_loses_no_event(crowd):
    people, _, silent, when_gone = crowd
    assert when_gone() < 25  # s; a sender lives for 20
    silent.answer = lambda n, body: (202, {})
    del silent.requests[:]
    for n, person in enumerate(people):
        assert "answered 202" in person.hook("crowd-again-%d" % n,
                                             env={"ASHLR_SESSION_EVENTS_URL": silent.url})
    assert set(silent.sessions()) == {sha("crowd-%d" % n) for n in range(51)} | {sha("crowd-again-0"),
                                                                                 sha("crowd-again-1")}


# ======================================================================================================
# server.py
# ======================================================================================================


# ======================================================================================================
# session_events.py
# ======================================================================================================


# ======================================================================================================
# The house
# ======================================================================================================


def pieces(secret):
    """What of a secret must not be printed: any 7 digits in a row of a hash or UUID, else the whole of it."""
    if re.fullmatch(r"[0-9a-f]{64}|[0-9a-f-]{36}", secret):
        return {secret[i:i + 7] for i in range(len(secret) - 6)}
    return {secret}


def test_nothing_printed_names_anybody():
    """CONTRACT §8, over all that emit.py and server.py printed in every test before this one."""
    printed = b"\n".join(PRINTED).decode("utf-8", "replace")
    windows = {printed[i:i + 7] for i in range(len(printed) - 6)}
    for secret in SECRETS:
        for piece in pieces(secret):
            assert piece not in (windows if len(piece) == 7 else printed)
