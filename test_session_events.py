"""The toolkit's tests, with real sockets, processes, signals and files. They need only pytest.

    python3 -m pytest -q test_session_events.py
    python3 -m pytest -q -m quick test_session_events.py  # no process, no sleep

Rooms: the stage (what several rooms use) → emit.py → server.py → session_events.py → the house
(what holds the programs together). Everything that emit.py and server.py print in any test is
recorded. The last test searches it for anything that could name a person or a session.
"""

import argparse
import array
import ast
import base64
import calendar
import collections
import concurrent.futures
import contextlib
import csv
import datetime
import email.utils
import errno
import fcntl
import functools
import gc
import glob
import hashlib
import hmac
import html
import http.server
import importlib.util
import io
import ipaddress
import itertools
import json
import math
import ntpath
import os
import py_compile
import random
import re
import select
import shlex
import shutil
import signal
import socket
import socketserver
import sqlite3
import ssl
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import warnings
from http.client import HTTPConnection, HTTPException
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
# Texts that must not be found there. A hash is found where 7 of its digits stand in a row, any
# other text where it stands whole.
SECRETS = set()

EVENT = {"identity_hash": hashlib.sha256(b"identity").hexdigest(),
         "github_hash": hashlib.sha256(b"login").hexdigest(),
         "session_id_hash": hashlib.sha256(b"session").hexdigest(),
         "ended_at": "2026-05-22T12:34:56.000Z", "tool_count": 42, "tokens_saved": 12345,
         "branch_sha": "abc123def456",
         "discovery_refs": ["auth-jwt-flow", "rate-limit-buckets"], "plugin_version": "1.31.0"}


MACHINE = "3f2b8c1e-9d47-4a6b-8f10-2c5d7e9a1b34"
# The known answers, which every client and server of the contract shares.
IDENTITIES = (  # of MACHINE: date, its quarter, hash
    ("2026-11-22", "2026Q4", "c6806fc0a112b83956c6cfc9aeafea00a34cba756ec78f7ea0ca78b84df65b4a"),
    ("2026-12-31", "2026Q4", "c6806fc0a112b83956c6cfc9aeafea00a34cba756ec78f7ea0ca78b84df65b4a"),
    ("2027-01-01", "2027Q1", "abbaee7c39f908b0d3b0cf0d6bc7a237829ba2824a461a37d5deacb4e292bd3e"),
    ("2026-03-31", "2026Q1", "960d7e513cd934e93aaeb25981ae0c09f9ce4595aba2f87679be3d8d2b89a0e8"),
    ("2026-04-01", "2026Q2", "8224fa9c62f5dfd963578817e0e03c719b0bac8f3a96190cad628e158ccefb9a"),
)
OCTOCAT = "755dd7b916ca3c3eee9852aac136fbc26e69ba68e776fb0409fce72e00452763"  # in salt_2026Q4
SESSION = "deterministic-session-id-xyz"
SESSION_HASH = "09f0b7a07ce940858dbda3b5c0d06da4ab993427445feea11fcfc9807a288754"
BUCKETS = (  # parent's pid, HOME, bucket
    (4242, "/home/dev", "p184789d5"), (1, "", "pe9ceaae8"), (77, "/home/zoë", "p31e8963a"),
    (77, "/home/☃😀", "p32907c8a"))
MOMENTS = (  # as an event may have them, and as they are stored
    ("2026-05-22T12:34:56.000Z", "2026-05-22T12:34:56.000Z"),
    ("2026-05-22T12:34:56Z", "2026-05-22T12:34:56.000Z"),
    ("2026-05-22T14:34:56.5+02:00", "2026-05-22T12:34:56.500Z"),
    ("2026-05-22T12:34:56", "2026-05-22T12:34:56.000Z"),
    ("2026-05-22T12:34:56.123456789Z", "2026-05-22T12:34:56.123Z"),
    ("2026-12-31T23:30:00-01:00", "2027-01-01T00:30:00.000Z"),
    ("1999-12-31T23:59:59.999Z", "1999-12-31T23:59:59.999Z"),
    ("2026-05-22T12:34:56.12345678901234Z", "2026-05-22T12:34:56.123Z"),
    ("2026-05-22T12:34:56-23:59", "2026-05-23T12:33:56.000Z"),
)
NO_MOMENTS = ("2026/05/22", "2026-05-22", "2026-02-30T00:00:00Z", "2026-05-22T24:00:01Z",
              "2026-05-22T12:34:56Z\n", "2026-05-22T12:34:56Zgarbage", "٢٠٢٦-05-22T12:34:56Z",
              "2026-05-22 12:34:56Z", "2026-05-22T12:34:56+24:00", "2026-05-22T12:34:56+01:60", "")


def event(n, **changes):
    """A valid event of session `n` (any value: it is hashed), with `changes` laid over it."""
    session = hashlib.sha256(str(n).encode()).hexdigest()
    if len(SECRETS) < 1000:  # pieces of the thousands that load tests send would match by chance
        SECRETS.update((session, EVENT["identity_hash"], EVENT["github_hash"]))
    return dict(EVENT, **{"session_id_hash": session, **changes})


quick = pytest.mark.quick  # a test that needs no process and no sleep
needs_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc and prlimit")


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def interpreters(oldest):
    """{(major, minor): path} of the CPythons here from `oldest` on, the running one included."""
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


def at_once(function, cases, most=0):
    """What `function` returns for each case, in order. As many run at once as there are CPUs.

    Where they do little but wait, it may be `most`.
    """
    with concurrent.futures.ThreadPoolExecutor(most or os.cpu_count()) as pool:
        return list(pool.map(function, cases))


def run(argv, **options):
    """`subprocess.run` with both outputs recorded and returned as text.

    Only a hang can reach the time limit.
    """
    options.setdefault("stdin", None if "input" in options else subprocess.DEVNULL)
    if options["stdin"] is None:
        del options["stdin"]
    done = subprocess.run(list(map(str, argv)), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          timeout=options.pop("timeout", 60), **options)
    return recorded_texts(done)


def recorded_texts(done):
    """A process that has ended; both outputs are recorded, and become text."""
    PRINTED.extend((done.stdout, done.stderr))
    done.stdout = done.stdout.decode("utf-8", "replace")
    done.stderr = done.stderr.decode("utf-8", "replace")
    return done


def program(module, *flags, before=""):
    """The command line that runs a program of this folder, after the statements `before`.

    Python keeps what it compiled, and looks for no installed packages: so a start is quick.
    """
    code = "import os, signal, sys; sys.path.insert(0, sys.argv.pop(1)); import %s\n%s\n"
    code = code % (module, before) + "sys.exit(%s.main())" % module
    return [sys.executable, "-I", "-S", "-c", code, str(ROOT), *map(str, flags)]


def fork_for_each_request():
    """What `starter`'s process does. It ends with the tests.

    A request is a line of JSON, and beside it come the descriptors of the three streams and of a
    pipe. Into that pipe go the pid and, later, how the program ended.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    asked = socket.socket(fileno=os.dup(0))
    gc.freeze()
    while True:
        line, fds = b"", array.array("i")
        while line[-1:] != b"\n":
            piece, beside, _, _ = asked.recvmsg(65536, socket.CMSG_SPACE(4 * fds.itemsize))
            if not piece:
                return
            line += piece
            for _, _, numbers in beside:
                fds.frombytes(numbers)
        if not os.fork():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            child = os.fork()
            if not child:
                asked.close()
                become(json.loads(line.decode()), fds)
            for fd in fds[:3]:
                os.close(fd)
            os.write(fds[3], b"%d\n" % child)
            os.write(fds[3], b"%d\n" % os.waitpid(child, 0)[1])
            os._exit(0)
        for fd in fds:
            os.close(fd)


def become(request, fds):
    """Run a program in this process, with these streams."""
    for number, fd in enumerate(fds):
        if number < 3:
            os.dup2(fd, number)
        os.close(fd)
    sys.stdin, sys.stdout = os.fdopen(0, encoding="utf-8"), os.fdopen(1, "w", encoding="utf-8")
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1)
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv = [request["module"] + ".py", *request["flags"]]
    module = {"server": server, "session_events": session_events}[request["module"]]
    names = {"os": os, "signal": signal, "sys": sys, module.__name__: module}
    exec(request["before"], names)
    sys.exit(module.main())


STARTING = threading.Lock()


@functools.lru_cache(maxsize=None)
def starter():
    """(the socket to a process, the process). A program that is started is a fork of that process.

    It has imported the programs, so a start takes 0.02 s, and not the 0.2 s of the imports.
    """
    ours, theirs = socket.socketpair()
    code = "import test_session_events; test_session_events.fork_for_each_request()"
    with theirs:
        return ours, subprocess.Popen([sys.executable, "-c", code], stdin=theirs, cwd=str(ROOT))


class Forked:
    """A process that the starter forked, in the ways of `subprocess.Popen`."""

    def __init__(self, module, *flags, before="", env=None, cwd=None, **streams):
        theirs = []
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            where, ours = streams.get(name), None
            if where == subprocess.PIPE:
                ends = os.pipe()
                theirs.append(ends[number > 0])
                ours = os.fdopen(ends[number == 0], "rb" if number else "wb")
            elif where == subprocess.DEVNULL:
                theirs.append(os.open(os.devnull, os.O_RDWR))
            else:
                theirs.append(os.dup(where if isinstance(where, int) else where.fileno()))
            setattr(self, name, ours)
        report, end = os.pipe()
        theirs.append(end)
        self.args, self.returncode, self.report = (module, *flags), None, os.fdopen(report, "rb", 0)
        self.waiting = threading.Lock()
        request = {"module": module, "flags": list(map(str, flags)), "before": before}
        request.update(env=dict(os.environ if env is None else env), cwd=str(cwd or os.getcwd()))
        beside = socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", theirs)
        with STARTING:
            starter()[0].sendmsg([json.dumps(request).encode() + b"\n"], [beside])
        for fd in theirs:
            os.close(fd)
        self.pid = int(self.report.readline())

    def wait(self, timeout=None):
        waits = self.returncode is None  # read without the lock: a long wait may not hold it
        if waits and not select.select([self.report], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(self.args, timeout)
        with self.waiting:
            if self.returncode is None:
                status = int(self.report.readline())
                killed = os.WIFSIGNALED(status)
                self.returncode = -os.WTERMSIG(status) if killed else os.WEXITSTATUS(status)
        return self.returncode

    def poll(self):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, signum):
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def communicate(self, text=b"", timeout=180):
        """What it said in both streams. It is killed when the time is over."""
        limit = threading.Timer(timeout, self.kill)
        limit.start()
        if self.stdin:
            with contextlib.suppress(BrokenPipeError), self.stdin:
                self.stdin.write(text)
        said = at_once(lambda pipe: pipe and pipe.read(), (self.stdout, self.stderr), 2)
        self.wait()
        limit.cancel()
        return tuple(said)


def start(module, *flags, before="", **options):
    """A process of a program of this folder, after the statements `before`."""
    if {"preexec_fn", "pass_fds"} & set(options) or "LD_PRELOAD" in (options.get("env") or ()):
        return subprocess.Popen(program(module, *flags, before=before), **options)
    return Forked(module, *flags, before=before, **options)


def ended(module, *flags, text=b"", timeout=180, **options):
    """What `start` starts, when it has ended, as `subprocess.run` returns it, with bytes."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = start(module, *flags, **pipes, **options)
    out, err = process.communicate(text, timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def constants(module, **values):
    """Statements that give constants of a program other values."""
    assert all(hasattr(module, name) for name in values)
    return "".join("%s.%s = %r\n" % (module.__name__, *item) for item in values.items())


class Server:
    """A real `server.py` process. `.url` is the endpoint. `.stop()` returns its exit status.

    `argv` begins its command line where that is not this Python's with server.py from here.
    """

    def __init__(self, db, *flags, before="", argv=(), wrapper=(), **options):
        flags = ["--db", str(db), "--port", "0", *map(str, flags)]
        options.update(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.db = db
        if wrapper or argv:
            argv = [*wrapper, *(argv or program("server", before=before)), *flags]
            self.process = subprocess.Popen(argv, **options)
        else:
            self.process = start("server", *flags, before=before, **options)
        self.output, self.errors, self.news = [], [], threading.Condition()  # lines so far
        first = self.process.stdout.readline()
        PRINTED.append(first)
        self.drains = [self.drain(self.process.stdout, self.output),
                       self.drain(self.process.stderr, self.errors)]
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
# As hosts start it: so Python keeps the compiled program.
CACHED = "import sys; sys.path.insert(0, sys.argv.pop(1)); import emit; emit.run()"
HOOK = ["-I", "-S", "-c", CACHED, str(ROOT)]  # behind the Python that runs it
# A sender gives the new events of others 0.1 s, and not a second, before it sends them.
SOON = CACHED.replace("emit.run()", constants(emit, COMMIT_S=0.1) + "emit.run()")
EMIT_PYTHONS = interpreters((3, 6))
every_python = pytest.mark.parametrize(
    "python", EMIT_PYTHONS.values(), ids=["%d.%d" % version for version in EMIT_PYTHONS])
EDGES = {version: EMIT_PYTHONS[version] for version in (min(EMIT_PYTHONS), max(EMIT_PYTHONS))}
# Every Python meets one whole way of each kind. What depends on no version meets these two.
oldest_and_newest = pytest.mark.parametrize(
    "python", EDGES.values(), ids=["%d.%d" % version for version in EDGES])


def share(cases, python):
    """The cases of one of the EDGES. Together they meet each case, and one alone meets all."""
    return list(cases)[list(EDGES.values()).index(python) :: len(EDGES)]


def secret_hash(text):
    """The hash of a text, which must never be printed."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    SECRETS.update((digest, text) if len(text) > 6 else (digest,))
    return digest


class Person:
    """A home folder, and the emit.py processes that run in it. The environment gives consent."""

    def __init__(self, home, url="http://127.0.0.1:9/v1/session-events", **env):
        self.home, self.ashlr = home, home / ".ashlr"
        self.pending = self.ashlr / "session-events" / "pending"
        self.env = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "ASHLR_TELEMETRY": "on",
            "ASHLR_SESSION_EVENTS_URL": url,
            "ASHLR_SESSION_EVENTS_WAIT": "0",  # also where the tests run in a container
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
        """Run emit.py. The statements `before` run first and take something from the system."""
        options["env"] = {
            name: value for name, value in {**self.env, **options.pop("env", {})}.items() if value}
        argv = [python, *HOOK]
        if before:
            argv[4] = "import sys; " + before + CACHED.replace("import sys", "")
        if recorded:
            return run([*argv, *args], **options)
        return subprocess.run(
            [*map(str, argv), *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            universal_newlines=True, timeout=60, **options)

    def hook(self, session, *args, **options):
        """End a session and wait for its sender, which keeps standard error open for debugging."""
        secret_hash(session)
        env = {"CLAUDE_SESSION_ID": session, "ASHLR_TELEMETRY_DEBUG": "1", **options.pop("env", {})}
        done = self.emit(*args, env=env, **options)
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
        return done.stderr

    def starts(self, session, *args, python=sys.executable, code=CACHED, **options):
        """The process of a session's end, which nobody has waited for."""
        env = {**self.env, "CLAUDE_SESSION_ID": session, **options.pop("env", {})}
        options.setdefault("stdin", subprocess.DEVNULL)
        argv = [python, *HOOK, *args]
        argv[argv.index(CACHED)] = code
        return subprocess.Popen(argv, env=env, **options)

    def session_file(self, session):
        secret_hash(session)
        name = emit.session_name(session)
        SECRETS.update([name] if len(name) > 12 else [])
        return self.ashlr / "session-events" / "sessions" / name

    def tool(self, session, path="", **options):
        """An after-tool hook of a session."""
        secret_hash(session)
        call = {"session_id": session, "cwd": str(self.home), "tool_input": {"file_path": path}}
        done = self.emit("track", input=json.dumps(call).encode(), **options)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    def discovery(self, name):
        return str(self.home / ".ashlrcode/genome/sections/discoveries" / (name + ".md"))

    def waits(self, at, n, text=None):
        """Put what waits into the spool since `at` (ms): event `n`, or another text."""
        name = "session-events/pending/%015d-%012x.json" % (at, n)
        return self.put(name, event(n) if text is None else text)

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
    """A server on loopback. `answer(n, body)` gives (status, headers), or None for silence."""

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
        status, headers, page = (*answer, b"")[:3]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, *args):
        pass


@pytest.fixture
def person(tmp_path):
    return Person(tmp_path / "home")


@pytest.fixture
def received(person):
    """The server to which the person sends. It takes everything."""
    with Odd() as server:
        person.env["ASHLR_SESSION_EVENTS_URL"] = server.url
        yield server


def until(condition, seconds=60):
    """Wait for what happens in another process, where nothing can be awaited."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen within %d s" % seconds
        time.sleep(0.02)


# -- The pure core ---------------------------------------------------------------------------------


@quick
def test_emit_known_hashes():
    """The answers that every client and server of the contract has to give."""
    for date, quarter, digest in IDENTITIES:
        salt = emit.salt(calendar.timegm(time.strptime(date, "%Y-%m-%d")))
        assert (salt, emit.sha256_hex(MACHINE + salt)) == ("salt_" + quarter, digest)
    assert emit.sha256_hex("octocat" + "salt_2026Q4") == OCTOCAT
    assert emit.sha256_hex(SESSION) == SESSION_HASH
    for ppid, home, bucket in BUCKETS:
        assert emit.stats_bucket(ppid, home) == bucket
    assert emit.sha256_hex("\ud800") != emit.sha256_hex("")  # a lone surrogate is no error
    assert emit.encoded(b"\xff/x".decode("utf-8", "surrogateescape")) == b"\xff/x"


@quick
def test_emit_reads_and_writes_times():
    for text, canonical in MOMENTS:
        assert emit.iso(emit.instant(text)) == canonical
    for ms in range(0, 1000000, 977):  # no millisecond is lost in a float
        assert emit.iso((1795468789000 + ms) / 1000)[20:23] == "%03d" % (ms % 1000)
    for text in (*NO_MOMENTS, "2026-05-22T12:34:56.Z", "2026-05-22T12:34:56+5:00",
                 "2026-05-22T12:34:56-00:60", "2026-5-22T12:34:56", "2026-05-22T12:34:6",
                 "2026-05-22T1٢:34:56Z"):
        with pytest.raises(ValueError):
            emit.instant(text)


@quick
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
    ])
def test_emit_consent(allowed, env, said):
    assert emit.consent(emit.environment(env), said)[0] is allowed


@quick
def test_emit_endpoint():
    for env, url in (
        ({}, "http://127.0.0.1:8787/v1/session-events"),
        ({"ASHLR_API_URL": " "}, "http://127.0.0.1:8787/v1/session-events"),
        ({"ASHLR_API_URL": "https://a.example//"}, "https://a.example/v1/session-events"),
        ({"ASHLR_API_URL": "https://a.example", "ASHLR_SESSION_EVENTS_URL": "http://b/x?y"},
         "http://b/x?y"),
    ):
        assert emit.endpoint(emit.environment(env))[0] == url
    secret = {"ASHLR_SESSION_EVENTS_URL": "https://me:p%40ss@host:8443/x?token=1#f"}
    assert emit.endpoint(secret) == (
        "https://host:8443/x?token=1", "Basic bWU6cEBzcw==", "https://host:8443/x?...",
        "ASHLR_SESSION_EVENTS_URL")
    for url in ("file:///etc/passwd", "ftp://h/", "http://", "http://h:0/", "http://h:99999/",
                "http://h:x/", "h/x", "http://h/a b", "http://h/\r\nX: y", "http://h/é",
                "javascript:x", "http://[::1/", "http://h/" + "x" * 5000):
        asked, authorization, shown, _ = emit.endpoint({"ASHLR_SESSION_EVENTS_URL": url})
        assert (asked, authorization) == ("", "") and shown.startswith("nowhere: "), url
        assert len(url) < 8 or url not in shown


@quick
def test_emit_counts():
    """Calls and tokens are summed over the buckets that can be this session's."""
    now = emit.instant("2026-11-22T12:00:00Z")
    fresh = {"sessionId": "s2", "updatedAt": "2026-11-22T11:00:00.000Z"}
    stats = {
        "schemaVersion": 2,
        "sessions": {
            "s1": {"calls": 5, "tokensSaved": 7.9},
            "s2": {"calls": 10, "tokensSaved": 100},
            "p1": {"calls": 1},
        }}
    for known, project, expected in (
        (stats, {}, (6, 7)),
        (stats, fresh, (16, 107)),
        (stats, dict(fresh, sessionId="s1"), (6, 7)),
        (stats, dict(fresh, updatedAt="2026-11-21T12:00:00Z"), (16, 107)),
        (stats, dict(fresh, updatedAt="2026-11-21T11:59:59Z"), (6, 7)),  # older than a day
        (stats, dict(fresh, updatedAt="2026-11-22T12:00:01Z"), (6, 7)),  # of the future
        (stats, {"sessionId": ["s2"], "updatedAt": fresh["updatedAt"]}, (6, 7)),
        (stats, dict(fresh, sessionId=" s2\n"), (16, 107)),  # trimmed
        (dict(stats, schemaVersion=3), {}, (None, 0)),
        ({}, {}, (None, 0)),
        ({"sessions": [1]}, {}, (None, 0)),
        ({"sessions": {"s1": 5, "s3": {"calls": 9}}}, {}, (None, 0)),  # no bucket of this session
        ({"sessions": {"s1": {"calls": -3, "tokensSaved": "9"}, "p1": None}}, {}, (0, 0)),
        ({"sessions": {"s1": {"calls": True, "tokensSaved": float("nan")}, "p1": {"calls": 1e300}}},
         {},
         (1000000000, 0)),
        ({"sessions": {"s1": {"calls": 2e6, "tokensSaved": 5e9}}}, {}, (2000000, 1000000000)),
    ):
        assert emit.counts(known, project, ["s1", "p1"], now) == expected


@quick
def test_emit_finds_discoveries_in_paths():
    """A path gives the stem of a file in the project's discoveries, and nothing else of it."""
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
    ):
        place = ".ashlrcode/genome/sections/discoveries"
        with pytest.MonkeyPatch.context() as patch:
            if project[1:2] == ":":  # as on Windows
                patch.setattr(os, "path", ntpath)
                patch.setattr(os, "sep", "\\")
            assert emit.touched_ref(path, base, project, place) == ref, path
    for outside in ("/etc", "../etc", "."):
        assert emit.touched_ref("/etc/passwd", "/", "/p", outside) == ""
    for command, refs in (
        ("cat .ashlrcode/genome/sections/discoveries/auth-jwt.md", ["auth-jwt"]),
        ("cat '/p/x/sections/discoveries/a.md' sections/discoveries/s/b.md;ls", ["a", "b"]),
        ("type C:\\p\\sections\\discoveries\\c.md", ["c"]),
        ("rg x sections/discoveries/ sections/discoveries", []),
        ("cat sections/discoveries/a*.md sections/discoveries/x-$N.md", []),
        ("ls sections/discoveries/sub/ sections/discoveries/john@corp.example", []),
        ('sh -c "cat \\"sections/discoveries/e.md\\""; f(sections/discoveries/g.md)', ["e", "g"]),
        ("ls sections/discoveries/*.md my-sections/discoveries/d.md", []),
        ("cat sections/discoveries/../../secret.md", []),
        ("cat src/discoveries/e.md discoveries/f.md", []),
    ):
        assert emit.touched_refs({"command": command}, "/p", "/p", [place]) == refs, command
    for tool, refs in (
        ({"filePath": "/p/notes/a.md", "path": "/p/%s/b.md" % place}, ["a", "b"]),
        ('{"path": "notes/c.md"}', ["c"]),
        ({"absolute_path": "/p/notes/d.md", "notebook_path": 5, "command": ["cat", 5]}, ["d"]),
        ({"command": "cat x/notes/e.md"}, ["e"]),
        ({"command": ["cat", "x/notes/e.md"]}, ["e"]),
        ({"content": "/p/notes/f.md", "url": "notes/g.md"}, []),
        (["/p/notes/h.md"], []),
        ("[", []),
        (None, []),
        ({"path": "/p/notes/\0.md"}, []),
    ):
        assert emit.touched_refs(tool, "/p", "/p", ["x/notes", "notes", place]) == refs, tool
    for folder in ("", "/", "."):  # not every file is a discovery
        tool = {"path": "/p/secret.md", "command": "cat /etc/passwd"}
        assert emit.touched_refs(tool, "/p", "/p", [folder]) == [], folder
    many = ["r%d" % n for n in range(250)]
    assert emit.newest_refs(["a", *many, "a", "no slug", 7]) == many[-200:]
    assert emit.newest_refs(["b", "a", "b"]) == ["b", "a"]


@quick
def test_emit_knows_its_events():
    """README, Contract 1: what comes from the spool is checked again before it is sent."""
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
        {"ended_at": "2026-05-22"},  # whether the day exists is for the server to say
        {"ended_at": "2026-05-22T12:34:56.000Z\n"},
        {"ended_at": None},
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


@quick
def test_emit_builds_what_the_server_accepts():
    """The server's short path takes an event with a field at any edge of its rule."""
    for changes in ({},
                    {"github_hash": None, "branch_sha": None, "discovery_refs": []},
                    {"tool_count": 0, "tokens_saved": 0},
                    {"tool_count": 1000000, "tokens_saved": 1000000000}, {"branch_sha": "a" * 7},
                    {"branch_sha": "0" * 40},
                    {"discovery_refs": ["%03d" % n + "x._:-" * 25 for n in range(200)]},
                    {"plugin_version": "0"}, {"plugin_version": "1.2.3-rc.1+build_5" + "x" * 46},
                    {"ended_at": "2000-12-31T23:59:59.999Z"}):
        built = event("builds", **changes)
        assert emit.is_event(built)
        assert json.loads(emit.as_sent(built)) == built
        assert server.canonical_row(emit.as_sent(built)), changes


@quick
def test_emit_reads_json_like_json():
    """The quick reader says what json says, or leaves it to json."""

    def endless(text):
        raise ValueError("not JSON")

    def read(data):
        try:
            return emit.loads(data)
        except ValueError:
            return "not JSON"

    def slow(data):
        try:
            text = data.decode("utf-8-sig").strip(" \t\r\n")
            return json.loads(text, parse_constant=endless, object_pairs_hook=unique)
        except (ValueError, RecursionError):
            return "not JSON"

    def unique(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key appears twice")
        return dict(pairs)

    cases = [b'{"a": [1, 2.5, -0, 1e400, true, null, "\\u00e9"]}', b' \r\n\t{"a":1,"a":2}\n',
             b' {"b": {"a": 2.5, "a": 1}}',
             b"\xef\xbb\xbf{}", b"{} x", b"{}{}", b"\xff", "{}".encode("utf-16"), b'{"a": NaN}',
             b"-Infinity", b'"\\ud800"', b"[" * 100000, b'{"a":' * 100000, b"\x0b{}", b"\xc2\xa0{}",
             b"123456789012345678901", b'"no end', b'{"a": "' + b'\\"' * 9000 + b'"}',
             '{"a": "\u2028\xa0é", "b": "\\\\n\\\\\\" \\/ \\b\\f\\n\\r\\t"}'.encode()]
    seeds = (b'{"a": [1, -20, 0], "b": {"c": "x\\"y\\\\", "d": true}, "e": null, "": ""}',
             b'[{"session_id": "s\\n", "n": 1764000000000}, "\\u0041", [[], {}], 1.5e3, false]')
    chance = random.Random(10)
    for _ in range(4000):  # what one or two changed bytes make of them
        text = bytearray(chance.choice(seeds))
        for _ in range(chance.randrange(1, 3)):
            at = chance.randrange(len(text))
            text[at : at + chance.randrange(2)] = chance.choice(
                b'"\\{}[],: 01-.e\nntu').to_bytes(1, "big")
        cases.append(bytes(text))
    for data in cases:
        assert repr(read(data)) == repr(slow(data)), data
    usual = json.dumps({"session_id": "s", "x": ['a\n"b\\c', 5, True, None, {}]}).encode()
    assert emit.quick_json(usual.decode()) == json.loads(usual.decode())


def replayed(*lines):
    """(number, calls, tokens, refs) of each part that a session's file has."""
    record = emit.Record("\n".join(lines).encode())
    return [(part.number, part.calls, part.tokens, part.refs) for part in record.parts]


@quick
def test_emit_parts():
    """README, Contract 4, "Parts": what each end of a session's file brings."""
    call, touch = "call 1795468789000", "touch 1795468789001 "
    for lines, parts in (
        ([], []),
        ([call, call], []),
        (["end 5 a - 0"], [(1, 0, 0, [])]),  # nothing happened, but it ended
        (["end 5 a - 0", "end 6 b - 0", "end 7 c - 0"], [(1, 0, 0, [])]),
        ([call, touch + "x", "end 5 a - 0", "end 6 b - 0"], [(1, 1, 0, ["x"])]),
        ([call, call, "end 5 a - 0", call, touch + "x", touch + "x", "end 6 b - 0"],
         [(1, 2, 0, []), (2, 1, 0, ["x"])]),
        (["end 5 a 40 900", "end 6 b 42 950"], [(1, 40, 900, []), (2, 2, 50, [])]),
        ([call, "end 5 a 40 900", "end 6 b 40 900"], [(1, 40, 900, [])]),
        # stats.json was tidied: nothing is reported twice, and calls are counted again.
        (["end 5 a 40 9", "end 6 b - 0", call, "end 7 c - 0"], [(1, 40, 9, []), (2, 1, 0, [])]),
        (["end 5 a 40 9", "end 6 b 3 1"], [(1, 40, 9, [])]),
        # Its bucket came later: the calls that track saw are not reported twice.
        ([call, "end 5 a - 0", "end 6 b 3 1"], [(1, 1, 0, []), (2, 2, 1, [])]),
        # A discovery is news in each part that touched it.
        ([touch + "x", "end 5 a - 0", touch + "x", "end 6 b - 0"],
         [(1, 0, 0, ["x"]), (2, 0, 0, ["x"])]),
    ):
        assert replayed(*lines) == parts, lines
    rubbish = ["", "call", "call x", "call -5", "call 99999999999999999", "touch 5",
               "touch 5 not/a/slug", "touch 5 " + "x" * 500, "end", "end 5 a", "end 5 a x 0",
               "end 5 a -3 0", "end 5 a %s 0" % ("9" * 5000), "id zz", "kept", "\0\xff", "rm -rf /"]
    assert replayed(call, *rubbish, "end 5 a - 0") == [(1, 1, 0, [])]
    assert emit.Record(b"\nkept a\n").kept == {"a"}
    for session in ("s", "☃ é", b"\xff/x".decode("utf-8", "surrogateescape"), "x" * 120):
        name = emit.session_name(session)
        assert bytes.fromhex(name).decode("utf-8", "surrogateescape") == session
        assert emit.fits(name, emit.SESSION_NAME) and len(name) <= 255
    for session in ("x" * 121, "x" * 32, "long " * 200000):
        assert emit.fits(emit.session_name(session), emit.SESSION_NAME)
    assert emit.session_name("x" * 121) == "long-" + secret_hash("x" * 121)
    for name in ("", "abc", "AB", "ab/", "ab\n", "long-ab", "a" * 242, "note.txt"):
        assert not emit.fits(name, emit.SESSION_NAME)


@quick
def test_emit_verdicts():
    """README, Contract 6: what an answer means for the event."""
    for status, body, found in (
        (202, b"", True),
        (202, b"<html>", True),
        (200, b'{"ok": true}', True),
        (201, b' {"ok":true,"x":1}\n', True),
        (200, b'{"ok": 1}', False),
        (200, b'{"ok": false}', False),
        (200, b"<html>Log in to this network</html>", False),
        (200, b"", False),
        (204, b"", False),
        (200, b"[true]", False),
        (400, b"", True),
        (413, b"", True),
        (422, b"", True),
        (400, b'{"ok":true}', True),
        *((status, b'{"ok":true}', False) for status in (301, 302, 401, 403, 404, 405, 407, 408)),
        *((status, b'{"ok":true}', False) for status in (410, 429, 500, 502, 503, 199)),
    ):
        assert emit.is_settled(status, io.BytesIO(body)) is found, (status, body)


@quick
def test_emit_knows_where_a_home_passes(monkeypatch):
    """The hook waits 0.5 s for the answer where the home may end with the session."""
    nowhere, everywhere = (lambda path: False), (lambda path: True)
    for env, exists, seconds in (
        ({}, nowhere, 0.0),
        ({}, everywhere, 0.5),
        ({}, lambda path: path == "/run/.containerenv", 0.5),
        ({"CI": "true"}, nowhere, 0.5),
        ({"CI": "false"}, nowhere, 0.0),
        ({"CI": ""}, nowhere, 0.0),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, nowhere, 0.5),
        ({"container": "podman"}, nowhere, 0.5),
        ({"ASHLR_SESSION_EVENTS_WAIT": "0", "CI": "1"}, everywhere, 0.0),
        ({"ASHLR_SESSION_EVENTS_WAIT": " 1200 "}, nowhere, 1.2),
        ({"ASHLR_SESSION_EVENTS_WAIT": "99999999"}, nowhere, 20.0),
        ({"ASHLR_SESSION_EVENTS_WAIT": "soon"}, nowhere, 0.0),
        ({"ASHLR_SESSION_EVENTS_WAIT": "\u00b2"}, nowhere, 0.0),
        ({"ASHLR_SESSION_EVENTS_WAIT": "-1"}, everywhere, 0.5),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(os.path, "exists", exists)
            known = emit.environment(env)
            found = emit.wait_of(known, {}), emit.wait_of(known, {"--wait": ["2000"]})
        assert found == (seconds, 2.0), env


@quick
def test_emit_reads_retry_after_arguments_logins_and_file_names():
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
    for argv, given, words in (
        ([], {}, []),
        (["--wait"], {"--wait": ["500"]}, []),
        (["--wait", "2000", "--dir", "/x"], {"--wait": ["2000"], "--dir": ["/x"]}, []),
        (["--wait", "--dir", "/x"], {"--wait": ["500"], "--dir": ["/x"]}, []),
        (["--dir"], {}, ["--dir"]),
        (["a", "--b", "--json"], {"--json": [""]}, ["a", "--b"]),
        (["--discoveries", "a", "--discoveries", "b", "x"], {"--discoveries": ["a", "b"]}, ["x"]),
    ):
        assert emit.parsed(argv) == (given, words)
    assert emit.environment({"HOME": " /x ", "A": " b\n"}) == {"HOME": " /x ", "A": "b"}
    assert re.fullmatch(
        r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", emit.random_uuid())
    assert emit.github_login({"valid": True, "githubLogin": " octocat\n"}) == "octocat"
    name = "000000000000009-abababababab.json"
    assert emit.failures(name) == 0
    assert emit.failures(name.replace(".json", "-12.json")) == 12
    for text, ours in (
        (name, True),
        (name.replace(".json", "-999.json"), True),
        ("new.json", False),
        ("1-ab.json", False),
        ("", False),
        (name + ".tmp", False),
        (name.replace("-", "_"), False),
    ):
        assert emit.fits(text, emit.EVENT_NAME) is ours
        assert not emit.fits(text, emit.LEFTOVER_NAME)
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


def test_emit_is_plain(tmp_path):
    """It has no code in strings and no private modules, and importing it does nothing.

    A line that is no Python is found when the file is compiled.
    """
    text = EMIT.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = (
                [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
            assert not any(name.startswith("_") for name in names), names
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("exec", "eval", "compile", "__import__"), node.lineno
    before = sorted(os.listdir(str(tmp_path)))
    done = run(
        [sys.executable, "-I", "-S", "-B", "-c",
         "import sys; sys.path.insert(0, %r); import emit; "
         "print(sorted({'json', 're', 'subprocess', 'hashlib', 'select'} & set(sys.modules)))"
         % str(ROOT)], cwd=str(tmp_path), env={"HOME": str(tmp_path)})
    assert (done.stdout, done.stderr, sorted(os.listdir(str(tmp_path)))) == ("[]\n", "", before)
    for line in ("def broken(:", "  (]"):
        (tmp_path / "emit.py").write_text(text.replace("def say(", line + "\ndef tell(", 1))
        with pytest.raises(py_compile.PyCompileError):
            py_compile.compile(str(tmp_path / "emit.py"), cfile=str(tmp_path / "x"), doraise=True)


@oldest_and_newest
def test_emit_starts_from_a_folder_that_cannot_be_written(python, person, tmp_path):
    """`python3 emit.py` works where no compiled program can be kept, beside a plugin's json.py."""
    folder = tmp_path / "plugin"
    folder.mkdir()
    shutil.copy(str(EMIT), str(folder))
    (folder / "json.py").write_text("raise SystemExit('not this one')")
    (folder / "__pycache__").write_text("no folder")
    for argv in (["-I", "-S", folder / "emit.py"], ["-I", "-S", "-c", CACHED, "%s/" % folder]):
        shown = run([python, *argv, "status", "--json"], env=person.env)
        assert json.loads(shown.stdout)["consent"] == "on", shown.stderr
    with Odd() as server:
        env = {**person.env, "ASHLR_SESSION_EVENTS_URL": server.url}
        hook = b'{"session_id": "read-only"}'
        done = run([python, "-I", "-S", folder / "emit.py", "--wait", "20000"], env=env, input=hook)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert server.sessions() == [secret_hash("read-only")]


@every_python
def test_emit_refuses_endless_numbers(python, person):
    """Every Python refuses a number of more than 4,300 digits. A million would cost 4 s of work."""
    unlimited = "getattr(sys, 'set_int_max_str_digits', int)(0)"
    for digits in (4300, 4301):
        shown = person.emit("show", python=python, before=unlimited, recorded=False,
                            input='{"session_id": "digits", "x": [%s]}' % ("1" * digits))
        assert (secret_hash("digits") in shown.stdout) == (digits == 4300), shown.stderr
    person.put("config.json", '{"telemetry": "opt-in", "x": %s}' % ("1" * 4301))
    status = person.emit("status", python=python, before=unlimited, env={"ASHLR_TELEMETRY": None})
    assert "config.json cannot be read" in status.stdout


@every_python
def test_emit_imports_no_more_than_it_needs(python, person):
    """The modules that are loaded when the caller is let go. They are the cost of a start."""
    watch = (
        "import sys, os; known = ('json', 're', 'subprocess', 'hashlib', 'datetime', 'select')\n"
        "def leave(*status):\n"
        "  print([n for n in known if n in sys.modules]); sys.stdout.flush(); real(0)\n"
        "real, os._exit, os.fork = os._exit, leave, leave\n")
    person.put("config.json", {"telemetry": "opt-in", "theme": "dark"})
    person.put("last-project.json", {"sessionId": "x"})
    person.put("pro-token-cache.json", {"valid": True, "githubLogin": "somebody-else"})
    person.put("stats.json", {"schemaVersion": 2, "sessions": {"s": {"calls": 5}}})
    call = {"session_id": "s", "cwd": "/x", "tool_input": {"file_path": "/x/a.py"}, "r": 'a\n"b"'}
    for args, off, loaded in (
        (["track"], "", "['select']"),
        ([], "", "['select']"),
        ([], "1", "['re']"),  # something is there to delete
        ([], "1", "[]"),
        (["track"], "1", "[]"),
    ):
        env = {**person.env, "ASHLR_TELEMETRY": "", "DO_NOT_TRACK": off}
        argv = [python, "-I", "-S", "-c", watch + CACHED, ROOT, *args]
        done = run(argv, input=json.dumps(call).encode(), env=env)
        assert (done.stdout, done.stderr) == (loaded + "\n", ""), args
    # The child, when the event is in the spool.
    watch = watch.replace("os.fork = os._exit, leave, leave", "os.chdir = os._exit, leave, leave")
    watch += "os.fork = os.setsid = lambda: 0\n"
    argv = [python, "-I", "-S", "-c", watch + CACHED, ROOT]
    done = run(argv, input=json.dumps(call).encode(), env={**env, "DO_NOT_TRACK": ""})
    assert (done.stdout, done.stderr) == ("['hashlib', 'select']\n", "")


# -- The hook, as a process ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """(a git repository with one commit, the commit)."""
    path = tmp_path_factory.mktemp("repository")
    git = ["git", "-C", str(path), "-c", "user.name=x", "-c", "user.email=x@example.com"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run(
            git + command, check=True, env={"PATH": os.environ["PATH"], "HOME": str(path)})
    return path, subprocess.run(
        [*git, "rev-parse", "HEAD"], check=True, stdout=subprocess.PIPE).stdout.decode().strip()


@pytest.fixture(scope="module")
def ingest(tmp_path_factory):
    """A real server, and a function that gives the row of a session."""
    db = tmp_path_factory.mktemp("ingest") / "events.db"

    def row(session):
        with contextlib.closing(sqlite3.connect(str(db))) as connection:
            connection.row_factory = sqlite3.Row
            found = connection.execute(
                "SELECT * FROM session_events WHERE session_id_hash = ?", [secret_hash(session)])
            return [dict(line) for line in found]

    with serving(db) as server:
        yield server, row


@pytest.fixture(scope="module")
def crowd(tmp_path_factory):
    """50 sessions that end at once before a silent server, and one before a dripping server.

    The dripping server sends a byte a second.
    """

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
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        hooks = [
            person.starts("crowd-%d" % n, **pipes)
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
    assert printed == [b""] * 51 and len(people[0].kept()) == 50


def test_emit_sends_from_one_process_at_a_time(person):
    """Eight sessions end at once. Each event is sent once, and no two at the same time."""
    inside, most, gate = [], [], threading.Lock()

    def answer(n, body):
        with gate:
            inside.append(n)
            most.append(len(inside))
        time.sleep(0.05)  # an answer that takes no time would hide two senders
        with gate:
            inside.remove(n)
        return 202, {}

    with Odd(answer) as server:
        person.env["ASHLR_SESSION_EVENTS_URL"] = server.url
        hooks = [person.starts("turn-%d" % n, code=SOON) for n in range(8)]
        assert [process.wait(60) for process in hooks] == [0] * 8
        until(lambda: not person.senders())
        assert sorted(server.sessions()) == sorted(secret_hash("turn-%d" % n) for n in range(8))
    assert max(most) == 1 and person.kept() == []


@every_python
def test_emit_whole_path(python, tmp_path, repository, ingest):
    """A hook's JSON goes in, a row comes out. The home is not ASCII, and there is no locale."""
    server, row = ingest
    login = "octocat-of-the-test"
    (tmp_path / "package.json").write_text('{"version": "1.31.0"}')
    for n in range(9):  # git has 250 ms, which a loaded machine may not give it
        session = "whole-path-%d-%s" % (n, python)
        person = Person(tmp_path / str(n) / "zoë", server.url, CLAUDE_PROJECT_DIR="",
                        ASHLR_TELEMETRY="", CLAUDE_PLUGIN_ROOT=str(tmp_path))
        person.put("config.json", {"theme": "dark", "telemetry": "opt-in"})
        person.put("pro-token-cache.json", {"valid": True, "githubLogin": login})
        bucket = emit.stats_bucket(os.getpid(), str(person.home))
        person.put("stats.json",
                   {"schemaVersion": 2,
                    "sessions": {session: {"calls": 40, "tokensSaved": 9}, bucket: {"calls": 2}}})
        for name in ("first", "second"):
            person.emit("track", name, python=python, env={"CLAUDE_SESSION_ID": session})
        hook = {"session_id": session, "transcript_path": "/secret/transcript.jsonl",
                "cwd": str(repository[0]), "hook_event_name": "SessionEnd", "reason": "exit",
                "permission_mode": "default"}
        done = person.emit(
            python=python, input=json.dumps(hook).encode(), env={"ASHLR_TELEMETRY_DEBUG": "1"})
        assert (done.returncode, done.stdout) == (0, "") and "1 answered 202" in done.stderr
        [stored] = row(session)
        if stored["branch_sha"]:
            break
    received, ended = stored.pop("received_at"), stored.pop("ended_at")
    salt = "salt_%sQ%d" % (ended[:4], (int(ended[5:7]) + 2) // 3)
    assert ended[:19] <= received and stored.pop("id")
    assert stored == {
        "identity_hash": secret_hash(MACHINE + salt), "github_hash": secret_hash(login + salt),
        "session_id_hash": secret_hash(session), "tool_count": 42, "tokens_saved": 9,
        "branch_sha": repository[1][:12], "discovery_refs_json": '["first","second"]',
        "plugin_version": "1.31.0"}
    assert person.kept() == []


KEYS = json.loads(  # what six hosts were recorded to hand over, a value being its type's name
    """{"claude": [
      {"session_id": "str", "transcript_path": "str", "cwd": "str", "prompt_id": "str",
       "permission_mode": "str", "effort": {"level": "str"}, "hook_event_name": "str",
       "tool_name": "str", "tool_input": {"file_path": "str"}, "tool_response": {"type": "str",
       "file": {"filePath": "str", "content": "str", "numLines": "int", "startLine": "int",
       "totalLines": "int"}}, "tool_use_id": "str", "duration_ms": "int"},
      {"session_id": "str", "transcript_path": "str", "cwd": "str", "prompt_id": "str",
       "hook_event_name": "str", "reason": "str"}],
    "gemini": [
      {"session_id": "str", "transcript_path": "str", "cwd": "str", "hook_event_name": "str",
       "timestamp": "str", "tool_name": "str", "tool_input": {"file_path": "str"},
       "tool_response": {"llmContent": "str", "returnDisplay": "str"}},
      {"session_id": "str", "transcript_path": "str", "cwd": "str", "hook_event_name": "str",
       "timestamp": "str", "reason": "str"}],
    "qwen": [
      {"session_id": "str", "transcript_path": "str", "cwd": "str", "hook_event_name": "str",
       "timestamp": "str", "permission_mode": "str", "tool_use_id": "str", "tool_name": "str",
       "tool_input": {"file_path": "str"}, "error": "str", "is_interrupt": "bool"},
      {"session_id": "str", "transcript_path": "str", "cwd": "str", "hook_event_name": "str",
       "timestamp": "str", "reason": "str"}],
    "codex": [
      {"session_id": "str", "turn_id": "str", "transcript_path": "str", "cwd": "str",
       "hook_event_name": "str", "model": "str", "permission_mode": "str", "tool_name": "str",
       "tool_input": {"command": "str"}, "tool_response": "str", "tool_use_id": "str"},
      {"session_id": "str", "transcript_path": "str", "cwd": "str", "hook_event_name": "str",
       "reason": "str"}],
    "copilot": [
      {"hook_event_name": "str", "session_id": "str", "timestamp": "str", "cwd": "str",
       "tool_name": "str", "tool_input": {"path": "str"}, "tool_result": {"result_type": "str",
       "text_result_for_llm": "str"}},
      {"hook_event_name": "str", "session_id": "str", "timestamp": "str", "cwd": "str",
       "reason": "str"}],
    "copilot, failed": [
      {"hook_event_name": "str", "session_id": "str", "timestamp": "str", "cwd": "str",
       "tool_name": "str", "tool_input": {"path": "str"}, "error": "str"},
      {"hook_event_name": "str", "session_id": "str", "timestamp": "str", "cwd": "str",
       "reason": "str"}],
    "copilot, camelCase": [
      {"sessionId": "str", "timestamp": "int", "cwd": "str", "toolName": "str",
       "toolArgs": {"path": "str"}, "toolResult": {"resultType": "str",
       "textResultForLlm": "str"}},
      {"sessionId": "str", "timestamp": "int", "cwd": "str", "reason": "str"}],
    "copilot, JSON text": [
      {"sessionId": "str", "timestamp": "int", "cwd": "str", "toolName": "str",
       "toolArgs": "json"}, {"sessionId": "str", "cwd": "str"}],
    "cursor": [
      {"conversation_id": "str", "workspace_roots": ["str"], "tool_input": {"path": "str"}},
      {"conversation_id": "str", "workspace_roots": ["str"]}],
    "opencode": [
      {"sessionID": "str", "directory": "str", "args": {"filePath": "str"}},
      {"sessionID": "str", "directory": "str"}]}"""
)


def recorded(shape, session, project, path, name=""):
    """What a host hands over, from the recorded types: the values that matter are filled in."""
    known = {"session_id": session, "sessionId": session, "sessionID": session, "cwd": project}
    known.update(conversation_id=session, directory=project, command="cd x; cat " + path)
    known.update(dict.fromkeys(("file_path", "filePath", "path"), path))
    if isinstance(shape, dict) and name not in ("tool_response", "toolResult"):
        return {key: recorded(inner, session, project, path, key) for key, inner in shape.items()}
    if name == "workspace_roots":
        return [project]
    values = {"str": 'said "x"\n\u001b[0m' + name, "int": 1764000000000, "bool": False}
    values["json"] = json.dumps({"path": path})
    return known.get(name) or values.get(str(shape), "x" * 3000)


def test_emit_understands_every_host(person, received):
    """Each host's recorded input gives the session, the project, the discovery and the calls."""
    person.env.update(CLAUDE_PROJECT_DIR="", CLAUDE_SESSION_ID="of the session outside")
    project = str(person.home / "app")
    path = project + "/.ashlrcode/genome/sections/discoveries/auth-flow.md"
    for host, (tool, end) in KEYS.items():
        for shape, args in ((tool, ["track"]), (tool, ["track"]), (end, ["--wait", "20000"])):
            hook = json.dumps(recorded(shape, "host: " + host + "!", project, path))
            done = person.emit(*args, input=hook.encode())
            assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), host
        sent = json.loads(received.requests.pop()[2])
        assert sent["session_id_hash"] == secret_hash("host: " + host + "!"), host
        assert (sent["tool_count"], sent["discovery_refs"]) == (2, ["auth-flow"]), host
    person.emit("--wait", "20000", input=b"{}")  # only the environment speaks
    assert received.sessions() == [secret_hash("of the session outside")]


def test_emit_prints_hooks_that_work(person, tmp_path):
    """A shell runs each command that `hooks HOST` prints, with that host's recorded input.

    README and the help name each host.
    """
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (others,) = re.findall("emit.py hooks claude +# or (.*)", readme)
    assert {"claude", *others.split(", ")} == set(emit.HOSTS)
    assert not [host for host in emit.HOSTS if host not in emit.__doc__]
    person.env["CLAUDE_PROJECT_DIR"] = ""
    project, plugin = str(person.home / "app"), tmp_path / "it's a plugin"
    path = project + "/.ashlrcode/genome/sections/discoveries/by-hook.md"
    (plugin / "scripts").mkdir(parents=True)
    shutil.copy(str(EMIT), str(plugin / "scripts" / "emit.py"))
    folder = "${CLAUDE_PLUGIN_ROOT}/scripts"
    both = "PostToolUse", "PostToolUseFailure"  # else a host leaves its failed calls out
    after_tool = {"codex": both[:1], "gemini": ("AfterTool",)}
    with Odd() as server:
        env = {
            **person.env, "ASHLR_SESSION_EVENTS_URL": server.url, "CLAUDE_PLUGIN_ROOT": str(plugin)}
        env["ASHLR_SESSION_EVENTS_WAIT"] = "20000"
        for host in (host for host, (events, _) in emit.HOSTS.items() if events):
            for more in ([], ["--folder", folder]):
                argv = [sys.executable, "-I", "-S", plugin / "scripts" / "emit.py", "hooks", host]
                done = run([*argv, *more], env=person.env)
                assert done.returncode == 0 and emit.HOSTS[host][1] in done.stderr, done.stderr
                assert "timeout" not in done.stdout
                assert (folder in done.stdout) == bool(more)
                assert (" a plugin/scripts" in done.stdout) != bool(more)
                events = json.loads(done.stdout)["hooks"]
                assert set(events) == {"SessionEnd", *after_tool.get(host, both)}
                session = "hooks %s %s" % (host, bool(more))
                for event in sorted(events, key=lambda event: event == "SessionEnd"):
                    [entry] = events[event]
                    [command] = entry["hooks"]
                    assert set(command) == {"type", "command"}
                    failed = event == "PostToolUseFailure"
                    shapes = KEYS.get(host + ", failed" * failed, KEYS[host])
                    shape = shapes[event == "SessionEnd"]
                    hook = json.dumps(recorded(shape, session, project, path)).encode()
                    ran = run(["sh", "-c", command["command"]], env=env, input=hook)
                    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", ""), command
                sent = json.loads(server.requests.pop()[2])
                assert sent["session_id_hash"] == secret_hash(session)
                assert (sent["tool_count"], sent["discovery_refs"]) == (
                    len(events) - 1, ["by-hook"])
    for args in ((), ("vim",),
                 ("claude", "x"),
                 ("claude", "--folder"),
                 ("claude", "--folder", "a", "b"),
                 ("claude", "--folder", "~/plugin"),
                 ("opencode", "--folder", folder)):
        done = person.emit("hooks", *args)
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    renamed = shutil.copy(str(EMIT), str(tmp_path / "session-end.py"))
    done = run([sys.executable, "-I", "-S", renamed, "hooks", "claude"], env=person.env)
    assert (done.returncode, done.stdout) == (1, "") and "call it emit.py" in done.stderr


OPENCODE_CALLS = """\
import { SessionEvents } from "./session-events.mjs"
const [session, directory, filePath, wait] = process.argv.slice(2)
const hooks = await SessionEvents({ directory })
const created = (info) =>
  hooks.event({ event: { type: "session.created", properties: { sessionID: info.id, info } } })
const said = (sessionID) => hooks["chat.message"]({ sessionID }, { message: {}, parts: [] })
const call = (sessionID, tool) =>
  hooks["tool.execute.before"]({ tool, sessionID, callID: tool }, { args: { filePath } })
await created({ id: session, directory })
await said(session)
await hooks.event({ event: { type: "catalog.updated", properties: {} } })
await call(session, "task")  // no tool.execute.after follows where the tool fails
await created({ id: "of a subagent", parentID: session })
await said("of a subagent")
await call("of a subagent", "read")
const after = { tool: "read", sessionID: "of a subagent", callID: "read", args: { filePath } }
await hooks["tool.execute.after"](after, {})  // the same call
await said("silent " + session)
if (wait === "0") await hooks.dispose()
else process.kill(process.pid)
await new Promise((done) => setTimeout(done, Number(wait)))
"""


@pytest.mark.skipif(not shutil.which("node"), reason="node runs the plugin of opencode")
def test_emit_prints_a_plugin_for_opencode(person, tmp_path):
    """Calls are tracked, a subagent's too, and each session ends once, also on a signal.

    The calls are those that opencode 1.18 was recorded to make.
    """
    done = person.emit("hooks", "opencode")
    assert "~/.config/opencode/plugin/" in done.stderr
    (tmp_path / "session-events.mjs").write_text(done.stdout)
    (tmp_path / "host.mjs").write_text(OPENCODE_CALLS)
    path = person.discovery("by-plugin")
    for session, wait, code in (("disposed", "0", 0), ("killed", "20000", 143)):
        argv = ["node", tmp_path / "host.mjs", session, person.home, path, wait]
        ran = run(argv, env=person.env)
        assert (ran.returncode, ran.stdout, ran.stderr) == (code, "", "")
    found = {kept["session_id_hash"]: kept for kept in person.kept()}
    assert len(found) == len(person.kept()) == 4
    for session in "disposed", "killed":
        kept, silent = (found[secret_hash(name)] for name in (session, "silent " + session))
        assert (kept["tool_count"], kept["discovery_refs"]) == (2, ["by-plugin"])
        assert (silent["tool_count"], silent["discovery_refs"]) == (0, [])


@oldest_and_newest
def test_emit_waits_for_no_input(python, tmp_path):
    """A closed input, rubbish, an endless input and silence make one event each. None hangs."""
    started = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    parent = "ppid:%d:%s:%s" % (os.getpid(), started, MACHINE)
    rubbish = b"", b"{", b"[]", b"\xff\xfe", b'{"session_id": 7}', b'{"session_id": " "}'
    large = json.dumps({"session_id": "large", "x": "}" * 3000000}).encode()

    number = itertools.count()

    def ends(case):
        session, options = case
        with Odd() as server:
            person = Person(tmp_path / str(next(number)), server.url)
            person.emit("--wait", "20000", python=python, **options)
            assert server.sessions() == [secret_hash(session)]

    cases = [(parent, {"input": data}) for data in share(rubbish, python)] + [
        (parent, {"preexec_fn": lambda: os.close(0)}),
        ("large", {"input": large})]
    with contextlib.ExitStack() as stack, open("/dev/zero", "rb") as endless:
        memory = 1 << 29, 1 << 29
        limit = functools.partial(resource.setrlimit, resource.RLIMIT_AS, memory)
        cases.append((parent, {"stdin": endless, "preexec_fn": limit}))
        for data, session in ((b'{"session_id": "unclosed"}\n', "unclosed"), (b"", parent)):
            read, write = os.pipe()
            for end in (read, write):
                stack.callback(os.close, end)
            os.write(write, data)
            cases.append((session, {"stdin": read}))
        at_once(ends, cases, 4)  # most of them wait
    read, write = os.pipe()  # the first byte has to come soon; the rest may come later
    os.write(write, b'{"session_id": ')
    rest = threading.Timer(0.4, lambda: (os.write(write, b'"in two"}'), os.close(write)))
    rest.start()
    ends(("in two", {"stdin": read}))
    rest.join()
    os.close(read)


def folder_for(name):
    """Put a folder where one of the person's files should be."""

    def breakage(person):
        path = person.ashlr / name
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        path.mkdir()

    return breakage


def text_for(text, *names):
    return lambda person: [person.put(name, text) for name in names]


def pipe_for(name):
    return lambda person: os.mkfifo(str(person.ashlr / name))


def variable(name, value):
    return lambda person: person.env.update({name: value})


BREAKAGES = {  # what somebody may have done to the folder; the hook stays silent all the same
    "config is a folder": folder_for("config.json"),
    "config is no JSON": text_for("{telemetry: on", "config.json"),
    "config is a pipe": pipe_for("config.json"),
    "machine-id is a folder": folder_for("machine-id"),
    "machine-id is empty": text_for("\n", "machine-id"),
    "the rest is rubbish": text_for(
        "[" * 5000, "stats.json", "last-project.json", "pro-token-cache.json",
        "session-events/last.json"),
    "numbers of thousands of digits": text_for('{"sessions": %s}' % ("9" * 9000), "stats.json"),
    "stats has no end": lambda person: (person.ashlr / "stats.json").symlink_to("/dev/zero"),
    "stats is a pipe": pipe_for("stats.json"),
    "the spool is a file": text_for("x", "session-events/pending"),
    "there is no home": lambda person: (
        shutil.rmtree(str(person.home)) or person.home.write_text("a file")),
    "the URL is no URL": variable("ASHLR_SESSION_EVENTS_URL", "file:///etc/passwd"),
    "the project is gone": variable("CLAUDE_PROJECT_DIR", "/nonexistent\nfolder"),
    "nobody is there": variable("ASHLR_SESSION_EVENTS_URL", "http://nobody.invalid/"),
    "PATH is empty": variable("PATH", "/nonexistent"),
}


@oldest_and_newest
def test_emit_hook_never_fails(python, tmp_path):
    ways = [(), ("--wait", "1"), ("--wait", "400", "--nonsense", "x"), ("track",)]
    hook = b'{"session_id":"s","tool_input":{"path":"discoveries"}}'

    def run_broken(case):
        n, name = case
        person = Person(tmp_path / str(n))
        BREAKAGES[name](person)
        way = ways[(n + 2 * list(EDGES.values()).index(python)) % 4]  # two ways for each breakage
        done = person.emit(*way, python=python, input=hook)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), (name, way)

    at_once(run_broken, enumerate(BREAKAGES))
    person = Person(tmp_path / "homeless")
    done = person.emit(
        python=python, env={"HOME": None, "ASHLR_TELEMETRY": None}, cwd=str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@oldest_and_newest
def test_emit_consent_off_does_nothing(python, person, tmp_path):
    """Without consent there is no file, no git and no request, and what waits is deleted.

    That holds also when the answer changes between two sends.
    """
    log = tmp_path / "ran"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "git").write_text("#!/bin/sh\necho ran >> %s\n" % log)
    (tmp_path / "bin" / "git").chmod(0o755)
    with Odd() as server:
        person.env.update(PATH="%s:%s" % (tmp_path / "bin", person.env["PATH"]),
                          ASHLR_SESSION_EVENTS_URL=server.url)
        (person.home / ".git").mkdir()
        person.waits(5, 5)
        person.put("session-events/sessions/" + "a" * 64, "call 5\n")
        person.hook("off", python=python, env={"DO_NOT_TRACK": "1"})
        assert person.kept() == [] and not list(person.ashlr.glob("session-events/sessions/*"))
        bare = Person(tmp_path / "bare", server.url, ASHLR_TELEMETRY="")
        (bare.ashlr / "machine-id").unlink()
        bare.hook("off", python=python)
        by_hand = bare.emit("track", "x", python=python)
        assert (by_hand.returncode, by_hand.stdout) == (0, "")
        assert "not recorded: consent is off" in by_hand.stderr
        assert (
            list(bare.home.rglob("*")) == [bare.ashlr] and not log.exists() and not server.requests
        )

        server.answer = lambda n, body: (
            person.put("config.json", {"telemetry": "off"}),
            (202, {}),
        )[1]
        for n in range(3):
            person.waits(n, n)
        assert "consent is off" in person.hook("on", python=python)
        assert server.sessions() == [event(0)["session_id_hash"]] and person.kept() == []
        assert not (person.ashlr / "session-events" / "last.json").exists() and log.exists()


def test_emit_no_deletes_what_waits_also_beside_a_broken_file(person):
    """Beside an unreadable config.json the spool is kept, unless the environment says no."""
    for env, stays in (
        ({"DO_NOT_TRACK": "1"}, 0),
        ({"ASHLR_TELEMETRY": "off"}, 0),
        ({"ASHLR_TELEMETRY": ""}, 1),
    ):
        # Twice is broken too: nobody can tell which of the two the person means.
        person.put("config.json", '{"telemetry": "off", "telemetry": "opt-in"}')
        person.waits(5, 5)
        person.hook("no", env=env)
        assert len(person.kept()) == stays


def test_emit_prints_no_password_of_a_proxy(person):
    env = {"http_proxy": "http:/somebody:hunter22@127.0.0.1:9",
           "ASHLR_SESSION_EVENTS_URL": "http://example.test/x"}
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


@oldest_and_newest
def test_emit_is_out_of_reach_when_its_caller_is_let_go(python, tmp_path):
    """A terminal that closes as the hook ends takes no event with it."""
    with Odd() as server:
        person = Person(tmp_path / "home", server.url)

        def hangs_up(n):
            hook = person.starts("hup-%d" % n, python=python, code=SOON, start_new_session=True)
            hook.wait(60)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(hook.pid, signal.SIGHUP)

        at_once(hangs_up, range(5))
        until(lambda: len(set(server.sessions())) == 5)


@oldest_and_newest
def test_emit_finds_its_version_when_named_by_a_relative_path(python, person, tmp_path):
    shutil.copy(EMIT, tmp_path)
    (tmp_path / "package.json").write_text('{"version": "7.7.7"}')
    with Odd() as server:
        env = {
            **person.env, "ASHLR_SESSION_EVENTS_URL": server.url, "CLAUDE_SESSION_ID": "relative"}
        done = run([python, "-I", "-S", "emit.py"], cwd=str(tmp_path), env=env)
        assert done.returncode == 0
        until(lambda: server.requests)
        assert json.loads(server.requests[0][2])["plugin_version"] == "7.7.7"


@oldest_and_newest
def test_emit_leaves_its_caller_alone(python, person, tmp_path):
    """The sender waits for a silent server. It holds no pipe, terminal or folder of its caller."""
    with Odd(lambda n, body: None) as server:
        with (tmp_path / "open").open("w") as extra:
            done = person.emit(
                python=python, input=b'{"session_id":"leaves"}', cwd=str(tmp_path),
                pass_fds=[extra.fileno()], env={"ASHLR_SESSION_EVENTS_URL": server.url})
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        until(lambda: server.requests)
        [sender] = person.senders()
        assert os.getsid(sender) == sender and os.readlink("/proc/%d/cwd" % sender) == "/"
        open_files = {os.readlink(path) for path in glob.glob("/proc/%d/fd/*" % sender)}
        ours = {
            path for path in open_files if path != "/dev/null" and not path.startswith("socket:")}
        assert ours <= {str(person.ashlr / "session-events" / "flush.lock")}
        assert [kept["session_id_hash"] for kept in person.kept()] == [secret_hash("leaves")]
        kept = [person.pending.parent, person.pending, *person.pending.iterdir()]
        assert [oct(path.stat().st_mode & 0o777) for path in kept] == ["0o700", "0o700", "0o600"]
        os.kill(sender, signal.SIGKILL)


@oldest_and_newest
def test_emit_keeps_or_drops_by_the_answer(python, tmp_path):
    """An event goes when it arrived or is at fault. After any other answer it stays."""
    with Odd() as elsewhere:
        answers = [(status, b"", 0) for status in (202, 400, 413, 422)]  # how many files stay
        answers += [(200, b'{"ok":true}', 0), (200, b"<html>a captive portal</html>", 1)]
        answers += [(status, b"", 1) for status in (204, 301, 307, 401, 403, 404, 405, 410, 500)]

        def sends(case):
            status, body, stays = case
            answer = status, {"Location": elsewhere.url}, body
            with Odd(lambda n, _: answer) as server:
                person = Person(tmp_path / ("%d%d" % (status, stays)), server.url)
                said = person.hook("answer-%d" % status, "--wait", "20000", python=python)
                assert "1 answered %d" % status in said and len(server.requests) == 1
                assert len(person.kept()) == stays

        at_once(sends, share(answers, python))
        assert not elsewhere.requests


@pytest.mark.parametrize("status", [401, 200])
def test_emit_empties_no_backlog(status, person):
    """A wrong token and a portal's page say nothing about an event, so each event is kept."""
    now = int(time.time() * 1000) - 60000
    for n in range(15):
        person.waits(now + n, n)
    with Odd(lambda n, body: (status, {}, b"<html>Log in</html>")) as server:
        person.env["ASHLR_SESSION_EVENTS_URL"] = server.url
        person.hook("backlog")
        assert len(person.kept()) == 16 and len(server.requests) == 10  # then it stops
        server.answer = lambda n, body: (202, {})
        del server.requests[:]
        assert "answered 202" in person.hook("backlog-2") and person.kept() == []
        # What failed is behind the others.
        late = [event(n)["session_id_hash"] for n in range(10)]
        assert [hash for hash in server.sessions() if hash in late] == late
        early = [event(n)["session_id_hash"] for n in range(10, 15)]
        assert set(server.sessions()[:5]) == set(early) and len(server.requests) == 17


def test_emit_lets_no_failing_event_hold_up_the_rest(person):
    """Events that are answered 500 go behind the others, which the next session's end sends."""
    bad = {event(n)["session_id_hash"] for n in range(12)}
    now = int(time.time() * 1000) - 60000
    for n in range(20):
        person.waits(now + n, n)

    def answer(n, body):
        return (500 if json.loads(body)["session_id_hash"] in bad else 202), {}

    with Odd(answer) as server:
        person.env["ASHLR_SESSION_EVENTS_URL"] = server.url
        person.hook("first")
        assert len(person.kept()) == 21
        person.hook("second")
        kept = {kept["session_id_hash"] for kept in person.kept()}
        assert bad <= kept and not kept & {event(n)["session_id_hash"] for n in range(12, 20)}


def test_emit_moves_an_event_behind_the_others_before_it_is_sent(person):
    """A silent server may cost a sender all its time. The next sender begins with another event."""
    for n in range(2):
        person.waits(1000 + n, n)
    arrived = threading.Event()
    with Odd(lambda n, body: (arrived.set(), None)[1]) as server:
        env = {**person.env, "ASHLR_SESSION_EVENTS_URL": server.url, "CLAUDE_SESSION_ID": "drip"}
        run([sys.executable, *HOOK], env=env)
        assert arrived.wait(60)
        for pid in person.senders():
            os.kill(pid, signal.SIGKILL)
        until(lambda: not person.senders())
    waiting = emit.waiting(str(person.home))
    assert [emit.failures(name) for name in waiting] == [0, 0, 1]
    assert waiting[-1].startswith("%015d" % 1000)


def test_emit_leaves_events_of_another_version(person):
    """An event with an unknown key is neither sent nor deleted, whatever its age and number."""
    for n in range(3):
        later = dict(event(n), schema_of_the_future=1)
        person.waits(n + 1, n, later)
    now = int(time.time() * 1000)
    for n in range(10, 515):
        person.waits(now - 60000 + n, n)
    assert "without an answer" in person.hook("dead")
    assert len(person.kept()) == 503
    assert all("schema_of_the_future" in kept for kept in person.kept()[:3])
    with Odd() as server:
        said = person.hook("newer", env={"ASHLR_SESSION_EVENTS_URL": server.url})
        assert "3 left to another version" in said and len(server.requests) == 501
    assert len(person.kept()) == 3
    assert person.emit("off").returncode == 0 and person.kept() == []


def test_emit_gives_retry_after_to_the_endpoint_that_said_it(person):
    with Odd(lambda n, body: (503, {"Retry-After": "3600"})) as busy, Odd() as free:
        for n, (server, sent) in enumerate(((busy, 1), (free, 2), (busy, 0))):
            del server.requests[:]
            person.hook("endpoint-%d" % n, env={"ASHLR_SESSION_EVENTS_URL": server.url})
            assert len(server.requests) == sent
        env = {"ASHLR_SESSION_EVENTS_URL": busy.url}
        assert "retry at" in person.emit("status", env=env).stdout
        assert "retry at" not in person.emit("status").stdout


def test_emit_keeps_away_as_long_as_the_server_asks(tmp_path):
    later = email.utils.formatdate(time.time() + 3600, usegmt=True)

    def obeys(wish):
        with Odd(lambda n, body: (503, {"Retry-After": wish})) as server:
            person = Person(tmp_path / wish, server.url)
            person.hook("retry-1")
            assert "asked for nothing before" in person.hook("retry-2")
            assert len(server.requests) == 1
            path = person.ashlr / "session-events" / "last.json"
            state = json.loads(path.read_text())
            [(key, at)] = state["retry_at"].items()
            assert 3500 < at - time.time() < 3700
            server.answer = lambda n, body: (202, {})
            year = 365 * 86400
            # A wish whose time is over, and one of a clock that was ahead.
            for n, at in enumerate((time.time() - 1, time.time() + year)):
                path.write_text(json.dumps(dict(state, retry_at={key: at})))
                person.hook("retry-%d" % (3 + n))
                assert person.kept() == []

    at_once(obeys, ("3600", later), 2)


def test_emit_sends_all_that_is_good(person):
    """1,000 events wait among rubbish. Each is sent once, the oldest first.

    Two of them come from a clock that was a year off.
    """
    now = int(time.time() * 1000) - 60000
    year = 365 * 86400 * 1000
    times = [now - year, *range(now - 998, now), now + year]
    for n, at in enumerate(times):
        path = person.waits(at, n)
    bad = {
        # A key that stands twice makes it no event.
        "%015d-%012x.json" % (now, 4999): '{"plugin_version": "a secret", ' + path.read_text()[1:],
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
    theirs = person.put("an event of somebody else", event("theirs"))
    (person.pending / ("%015d-%012x.json" % (now, 5006))).symlink_to(theirs)
    stale, young = (
        person.put(folder + "/.0123456789abcdef.tmp", "{")
        for folder in ("session-events/pending", "session-events")
    )
    os.utime(str(stale), (1, 1))
    with Odd() as server:
        said = person.hook("thousand", env={"ASHLR_SESSION_EVENTS_URL": server.url})
        assert "1001 answered 202" in said and "6 removed" in said
        expected = [event(n)["session_id_hash"] for n in range(1000)]
        assert server.sessions() == [*expected[:-1], secret_hash("thousand"), expected[-1]]
        assert "secret" not in str(server.requests)
    assert {path.name for path in person.pending.iterdir()} == {
        *foreign, "%015d-%012x.json" % (now, 5005), "%015d-%012x.json" % (now, 5006)}
    assert young.exists()


def test_emit_lets_500_events_wait_for_30_days(person):
    now, day = int(time.time() * 1000), 86400 * 1000
    for n in range(520):
        person.waits(now - day - 520 + n, n)
    for n in range(600, 605):
        person.waits(now - 31 * day, n)
    assert "1 without an answer" in person.hook("dead")
    kept = [kept["session_id_hash"] for kept in person.kept()]
    assert kept == [event(n)["session_id_hash"] for n in range(21, 520)] + [secret_hash("dead")]


@oldest_and_newest
def test_emit_without_room_sends_at_once(python, tmp_path):
    """On a full disk, or beside a folder that cannot be written, the event needs no spool."""
    for n, (before, options) in enumerate(
            ((lambda person: person.put("session-events", "a file"), {}),
             (lambda person: None,
              {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))}))):
        with Odd() as server:
            person = Person(tmp_path / str(n), server.url)
            before(person)
            assert "not kept" in person.hook("no-room", python=python, **options)
            assert server.sessions() == [secret_hash("no-room")]
            assert not list(person.ashlr.rglob("*.tmp"))


def test_emit_asks_git_for_no_favours(person, repository, tmp_path):
    """Variables of git's own hooks change nothing. A git that hangs costs 250 ms, no more."""
    with Odd() as server:
        person.env.update(
            ASHLR_SESSION_EVENTS_URL=server.url, GIT_DIR="/nonexistent", GIT_WORK_TREE="/")
        for n in range(9):  # git has 250 ms, which a loaded machine may not give it
            person.hook("git-%d" % n, "--dir", str(repository[0]))
            if json.loads(server.requests[-1][2])["branch_sha"]:
                break
        (tmp_path / "git").write_text("#!/bin/sh\nsleep 30 & sleep 30\n")
        (tmp_path / "git").chmod(0o755)
        person.hook("slow-git", env={"PATH": "%s:%s" % (tmp_path, os.environ["PATH"])})
        shas = [json.loads(body)["branch_sha"] for _, _, body in server.requests]
        assert shas[-2:] == [repository[1][:12], None]
        assert not any(
            "sleep" in Path("/proc/%d/cmdline" % pid).read_text() for pid in person.senders())


@oldest_and_newest
def test_emit_runs_no_git_of_the_projects(python, person, repository, tmp_path):
    """Empty and relative entries of PATH are skipped, also by `show`, which runs in the project."""
    project = tmp_path / "project"
    shutil.copytree(str(repository[0]), str(project))
    (project / "bin").mkdir()
    for name in ("git", "bin/git"):
        (project / name).write_text("#!/bin/sh\necho ran >> %s/ran\necho 1234567\n" % tmp_path)
        (project / name).chmod(0o755)
    real, found = os.environ["PATH"], []
    for path in (".:" + real, ":" + real, "bin:" + real, ".:bin:", None):
        shown = person.emit("show", "--dir", str(project), python=python, cwd=str(project),
                            env={"PATH": path}, stdin=subprocess.DEVNULL, recorded=False)
        found.append(json.loads(shown.stdout)["branch_sha"])
    assert not (tmp_path / "ran").exists()
    assert (
        repository[1][:12] in found and found[3] is None
    )  # git may take longer than it is given, once


def test_emit_asks_for_consent_again_after_the_capture(person, tmp_path):
    """`off` while the commit is looked for, and an endpoint that is no URL: nothing stays."""
    person.put("config.json", '{"telemetry": "opt-in"}')
    (tmp_path / "git").write_text("#!/bin/sh\necho '{\"telemetry\": \"off\"}' >%s\n" % (
        person.ashlr / "config.json"))
    (tmp_path / "git").chmod(0o755)
    for url in ("htp://127.0.0.1/", "http://127.0.0.1:9/"):
        said = person.hook("off meanwhile", env={
            "ASHLR_TELEMETRY": "", "ASHLR_SESSION_EVENTS_URL": url, "PATH": str(tmp_path)})
        assert "captured" in said and person.kept() == []
        assert not person.session_file("off meanwhile").exists()
        person.put("config.json", '{"telemetry": "opt-in"}')


@oldest_and_newest
def test_emit_goes_through_the_proxy_that_the_environment_names(python, person):
    """No other proxy is asked for: a Mac's urllib would ask the system, and crash after a fork."""
    with Odd() as proxy:
        person.env.update(ASHLR_SESSION_EVENTS_URL="http://me:secret-word@far.example/x",
                          http_proxy=proxy.url.rsplit("/", 2)[0])
        SECRETS.add("secret-word")
        said = person.hook("proxy", python=python, before="sys.platform = 'darwin'")
        assert "http://far.example/x" in said
        [(path, headers, _)] = proxy.requests
        assert path == "http://far.example/x"
        assert headers["Authorization"] == "Basic bWU6c2VjcmV0LXdvcmQ="
        person.hook(
            "direct", python=python,
            env={"no_proxy": "far.example", "ASHLR_SESSION_EVENTS_URL": "http://far.example/x"})
        with Odd() as server:
            person.hook("near", python=python, env={"ASHLR_SESSION_EVENTS_URL": server.url})
            assert secret_hash("near") in server.sessions()
        assert len(proxy.requests) == 1
        said = person.hook(
            "by socks", python=python, env={"http_proxy": proxy.url.replace("http:", "socks5:")})
        assert "a proxy of an unknown kind" in said and len(proxy.requests) == 1
        assert secret_hash("by socks") in [kept["session_id_hash"] for kept in person.kept()]


@oldest_and_newest
def test_emit_without_what_other_systems_lack(python, person):
    """Without fork the hook sends in the foreground, for 500 ms at most.

    Without locks or select on pipes there is still an event.
    """
    took = "import os; del os.fork; "
    lacks = ("", "del os.setsid", "sys.modules['fcntl'] = None",
             "import select; select.select = lambda *a: os.close(-1)",
             "del os.killpg; del os.O_NONBLOCK")
    with Odd() as server:
        for n, before in share(enumerate(lacks), python):
            session = "lacks-%d" % n
            person.env["ASHLR_SESSION_EVENTS_URL"] = server.url
            done = person.emit("--wait", "20000", python=python, before=took + (before or "pass"),
                               input=b'{"cwd": "/"}', env={"CLAUDE_SESSION_ID": session})
            assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
            assert server.sessions().pop() == secret_hash(session), before
        server.answer = lambda n, body: None
        begun = time.monotonic()
        person.emit(python=python, before=took + "pass", input=b'{"session_id": "no-fork"}')
        assert time.monotonic() - begun < 8
        assert [kept["session_id_hash"] for kept in person.kept()] == [secret_hash("no-fork")]
        done = person.emit(
            python=python,
            before="import os; os.fork = lambda: (_ for _ in ()).throw(OSError(11, 'x'))")
        assert done.returncode == 0 and len(person.kept()) == 2 and not person.senders()


def test_emit_of_a_parent_without_a_start_time(tmp_path):
    """`ps` tells the start time where /proc does not. Without both, its place stays empty."""
    hidden = ("import os; real = os.open; os.open = lambda path, *a, **k: "
              "real('/nonexistent' if str(path)[:5] == '/proc' else path, *a, **k)")
    started = subprocess.run(
        ["ps", "-o", "lstart=", "-p", str(os.getpid())], stdout=subprocess.PIPE,
        env={"PATH": os.environ["PATH"], "LC_ALL": "C"})
    with Odd() as server:

        def session(path, n):
            person = Person(tmp_path / str(n), server.url, PATH=path)
            person.emit("--wait", "20000", before=hidden)
            return server.sessions().pop()

        text = "ppid:%d:%s:%s"
        expected = secret_hash(text % (os.getpid(), started.stdout.decode().strip(), MACHINE))
        tries = (session(os.environ["PATH"], n) for n in range(9))  # ps has 250 ms, as git has
        assert expected in tries
        assert session("/nonexistent", 9) == secret_hash(text % (os.getpid(), "", MACHINE))


def test_emit_survives_kills(person, received):
    """A captured event survives a kill at a random instant: the next good run delivers it."""
    moments, captured = random.Random(4), []

    def kill(n):
        session, pipes = "kill-%d" % n, dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
        said = {"ASHLR_TELEMETRY_DEBUG": "1"}
        with person.starts(session, "--wait", "20000", code=SOON, env=said, **pipes) as process:
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

    begun = time.monotonic()
    person.emit("--wait", "20000")
    whole = 2 * (time.monotonic() - begun)  # of a run beside the others
    at_once(kill, range(30), 6)
    assert all(
        emit.is_event(json.loads(path.read_text())) for path in person.pending.glob("[0-9]*"))
    said = person.hook("after the kills")
    assert all(emit.is_event(json.loads(body)) for _, _, body in received.requests)
    assert set(captured) <= set(received.sessions()) and person.kept() == [], said
    assert len(captured) >= 15


# -- Discoveries -----------------------------------------------------------------------------------


def tool_call(name, tool_input, cwd="PROJECT", **more):
    """What a real host sends after a tool, the project being PROJECT."""
    call = {"session_id": "tool", "cwd": cwd, "hook_event_name": "PostToolUse"}
    return {**call, "tool_name": name, "tool_input": tool_input, **more}


FOLDER = ".ashlrcode/genome/sections/discoveries/"
TOOLS = [
    tool_call("Edit", {"file_path": "PROJECT/" + FOLDER + "auth-jwt-flow.md", "old_string": "x"}),
    tool_call("NotebookEdit", {"notebook_path": "../" + FOLDER + "rate.ipynb"}, "PROJECT/sub",
              tool_response={"ok": True}),
    tool_call("Grep", {"pattern": "x", "path": "PROJECT/" + FOLDER + "other-way.md"}),
    tool_call("Read", {"file_path": "PROJECT/src/discoveries.py"}),
    tool_call("Bash", {"command": "ls"}),
    {"session_id": "tool", "cwd": "PROJECT", "tool_input": ["discoveries"]}]


@oldest_and_newest
def test_emit_track_and_the_session_it_belongs_to(python, person, tmp_path):
    """A call and its discovery go to the session of the hook's input, or of the environment."""
    person.env["CLAUDE_PROJECT_DIR"] = str(tmp_path)
    alias = tmp_path / "alias"
    alias.symlink_to(tmp_path)
    file, found = person.session_file("tool"), []
    for n, tool in enumerate(TOOLS):
        text = json.dumps(tool).replace("PROJECT", str(alias if n == 2 else tmp_path))
        if n == 1:  # any letter may be written so
            text = text.replace("discoveries", "\\u0064iscoverie\\u0073")
        done = person.emit("track", python=python, input=text.encode())
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        found = emit.Record(file.read_bytes())
        assert found.refs == ["auth-jwt-flow", "rate", "other-way"][: n + 1]
        assert found.calls == n + 1
    assert str(tmp_path) not in file.read_text() and file.stat().st_mode & 0o777 == 0o600
    done = person.emit("track", "by-hand", "rate", python=python, input=b'{"session_id": "tool"}')
    assert done.returncode == 0
    other = b'{"session_id": "of whoever owns the input"}'
    by_hand = {"CLAUDE_SESSION_ID": "tool"}
    person.emit("track", "by-variable", python=python, input=other, env=by_hand)
    bad = person.emit("track", "ok", "not a slug", python=python)
    assert (bad.returncode, bad.stdout, len(bad.stderr.splitlines())) == (2, "", 1)
    assert "not a slug" not in bad.stderr
    # Without a session's id, each call would make a session of its own.
    person.emit("track", python=python, input=b'{"tool_input": {"path": "x"}}')
    assert os.listdir(str(file.parent)) == [file.name]
    with Odd() as server:
        person.hook("tool", python=python, env={"ASHLR_SESSION_EVENTS_URL": server.url})
        sent = json.loads(server.requests[0][2])
        named = ["by-hand", "by-variable"]
        assert sent["discovery_refs"] == ["auth-jwt-flow", "rate", "other-way", *named]
        assert sent["tool_count"] == len(TOOLS)
    person.put("machine-id", "")
    for refs, code, said in (
        (("x",), 1, "emit.py: could not be recorded: ~/.ashlr/machine-id is empty: remove it\n"),
        ((), 0, ""),
    ):
        hook = json.dumps(dict(TOOLS[0], session_id="")).replace("PROJECT", str(tmp_path))
        done = person.emit("track", *refs, python=python, input=hook.encode())
        assert (done.returncode, done.stdout, done.stderr) == (code, "", said)


def test_emit_tracks_64_at_once(person):
    """Tool hooks that run at the same moment lose no call and no discovery."""
    env = {**person.env, "CLAUDE_SESSION_ID": "many"}
    argv = [sys.executable, *HOOK, "track"]
    call = person.put("call", {"cwd": "/", "tool_name": "x"})
    hooks = []
    for n in range(64):
        with call.open() as stdin:
            named = [*argv, *["ref-%d" % n] * (n % 2)]
            hooks.append(subprocess.Popen(named, env=env, stdin=stdin, stdout=subprocess.PIPE))
    assert [(process.wait(60), process.stdout.read()) for process in hooks] == [(0, b"")] * 64
    person.hook("many")
    [kept] = person.kept()
    assert kept["tool_count"] == 32
    assert sorted(kept["discovery_refs"]) == sorted("ref-%d" % n for n in range(1, 64, 2))


# -- Parts: sessions that end more than once, or never ---------------------------------------------


def test_emit_of_three_ends_at_once_is_one_event(person):
    """gemini fires three ends on `/quit`. They make one event with every discovery."""
    home, now = str(person.home), 1000 * int(time.time())
    news = ["call %d" % now] * 5 + ["touch %d ref-%d" % (now, n) for n in range(3)]
    told = 5, ["ref-0", "ref-1", "ref-2"]
    for n in range(300):  # threads come closer to each other than processes do
        session, together = "threads-%d" % n, threading.Barrier(3)
        emit.append(home, session, news)

        def end(_, session=session, together=together):
            together.wait()
            return emit.end_session(home, session, now, None, 0)

        parts = [part for part in at_once(end, range(3), 3) if part]
        assert [(part.calls, part.refs) for part in parts] == [told], n
    env = {"ASHLR_SESSION_EVENTS_URL": "nowhere"}  # the senders have nothing to do
    sessions = ["processes-%d" % n for n in range(8)]
    for session in sessions:
        emit.append(home, session, news)
        ends = [person.starts(session, stdin=subprocess.PIPE, env=env) for _ in range(3)]
        for process in ends:
            process.stdin.close()
        assert [process.wait(60) for process in ends] == [0, 0, 0]
    until(lambda: not person.senders())
    found = {kept["session_id_hash"]: kept for kept in person.kept()}
    assert len(person.kept()) == len(found) and set(found) == set(map(secret_hash, sessions))
    for kept in found.values():
        assert (kept["tool_count"], kept["discovery_refs"]) == told


@oldest_and_newest
def test_emit_sends_a_part_for_each_end_that_meant_something(python, person, received):
    """Each end of a session sends what is new since the end before, by stats.json or by track."""

    def end(session):
        del received.requests[:]
        said = person.hook(session, python=python)
        sent = [json.loads(body) for _, _, body in received.requests]
        assert ("nothing new" in said) == (sent == [])
        names = ("session_id_hash", "tool_count", "tokens_saved", "discovery_refs")
        return [tuple(event[name] for name in names) for event in sent]

    part = [secret_hash("again")] + [secret_hash("again:part:%d" % n) for n in range(2, 6)]
    person.tool("again", python=python)
    person.tool("again", person.discovery("one"), python=python)
    assert end("again") == [(part[0], 2, 0, ["one"])]
    assert end("again") == []
    shown = person.emit("show", python=python, env={"CLAUDE_SESSION_ID": "again"})
    assert shown.stdout == "" and "nothing is new" in shown.stderr and shown.returncode == 0
    person.tool("again", person.discovery("two"), python=python)
    shown = person.emit("show", python=python, recorded=False, env={"CLAUDE_SESSION_ID": "again"})
    assert json.loads(shown.stdout)["session_id_hash"] == part[1]
    assert end("again") == [(part[1], 1, 0, ["two"])]
    stats = {"schemaVersion": 2, "sessions": {"again": {"calls": 10, "tokensSaved": 500}}}
    person.put("stats.json", stats)
    assert end("again") == [(part[2], 7, 500, [])]  # 3 of the 10 were sent before
    assert end("again") == []
    stats["sessions"]["again"] = {"calls": 12, "tokensSaved": 500}
    person.put("stats.json", stats)
    person.tool("again", python=python)
    assert end("again") == [(part[3], 2, 0, [])]
    person.put("stats.json", {})  # tidied
    assert end("again") == []
    person.tool("again", python=python)
    assert end("again") == [(part[4], 1, 0, [])]
    record = emit.Record(person.session_file("again").read_bytes())
    assert record.kept == {made.token for made in record.parts} and len(record.parts) == 5
    assert person.emit("status", python=python).returncode == 0


@quick
def test_emit_names_a_part_by_its_own_quarter(person, monkeypatch):
    """What ended in one quarter is not sent under the name of the next."""
    november, january = 1795468789000, 1799500000000
    part = emit.Part("a", november, 1, 5, 0, [])
    monkeypatch.setenv("HOME", str(person.home))
    caller = emit.Caller({}, [])
    caller.machine = MACHINE
    built = [emit.compose(caller, "q", emit.Part("a", at, n, 1, 0, []))
             for n, at in ((1, november), (2, january))]
    salts = ["salt_2026Q4", "salt_2027Q1"]
    assert [made["identity_hash"] for made in built] == [
        secret_hash(MACHINE + salt) for salt in salts]
    assert [made["session_id_hash"] for made in built] == [
        secret_hash("q"), secret_hash("q:part:2")]
    assert built[0]["ended_at"] == emit.iso(november / 1000) and part.number == 1


def test_emit_sends_sessions_that_never_ended(person, received):
    """A session that was silent for a day is sent once, when another one ends.

    It ended at its last call.
    """
    day, now = 86400, time.time()

    def silent(session, age, *lines):
        home = str(person.home)
        emit.append(
            home, session, [line.replace("%d", "%d" % (1000 * (now - age))) for line in lines])
        os.utime(str(person.session_file(session)), (now - age,) * 2)

    silent("sid-killed", 2 * day, "call %d", "touch %d of-the-killed", "call %d")
    silent("sid-running", day / 2, "call %d")
    silent("sid-ended", 2 * day, "call %d", "end %d a - 0", "kept a", "call %d")
    silent("sid-lost", 3 * day, "call %d", "end %d b - 0")  # a kill took its event
    silent("sid-crossed", 2 * day, "call %d", "end %d e - 0", "call %d", "end %d f - 0", "kept e")
    silent("sid-done", 4 * day, "call %d", "end %d c - 0", "kept c")
    silent("ppid:5:77:" + MACHINE, 2 * day, "touch %d x")  # its parent may have lived for one call
    silent("sid-forgotten", 91 * day, "call %d", "end %d d - 0", "kept d", "settled")
    silent("sid-old", 91 * day, "call %d")
    os.mkfifo(str(person.session_file("sid-a pipe")))
    person.session_file("sid-a folder").mkdir()
    person.session_file("sid-a link").symlink_to(person.put("somebody's", "call 5\n"))
    for name in ("sid-a pipe", "sid-a folder", "sid-a link"):
        os.utime(str(person.session_file(name)), (now - 2 * day,) * 2)
    person.hook("sid-another")
    person.hook("sid-and-another")
    sent = {}
    for _, _, body in received.requests:
        made = json.loads(body)
        assert sent.setdefault(made["session_id_hash"], made) is made
    hashes = [
        secret_hash(name) for name in ("sid-killed", "sid-ended:part:2", "sid-lost", "sid-old")]
    others = [
        secret_hash(name) for name in ("sid-another", "sid-and-another", "sid-crossed:part:2")]
    assert set(sent) == {*hashes, *others}
    killed, ended, lost, old = (sent[name] for name in hashes)
    assert (killed["tool_count"], killed["discovery_refs"]) == (2, ["of-the-killed"])
    assert emit.instant(killed["ended_at"]) == pytest.approx(now - 2 * day, abs=0.01)
    assert (ended["tool_count"], lost["tool_count"], old["tool_count"]) == (1, 1, 1)
    salt = emit.salt(now - 91 * day)
    assert old["identity_hash"] == secret_hash(MACHINE + salt)
    assert not person.session_file("sid-forgotten").exists()
    assert person.session_file("sid-old").exists()
    assert person.session_file("sid-done").exists()
    # What is settled is not read again, and so grows no younger.
    file = person.session_file("sid-lost")
    text = file.read_text()
    assert emit.Record(text.encode()).kept == {"b"} and text.count("settled") == 1
    os.utime(str(file), (now - 2 * day,) * 2)
    person.hook("sid-third")
    assert file.read_text() == text


@quick
def test_emit_expires_by_age_and_overwrites_no_name(person):
    home, day, now = str(person.home), 86400, time.time()
    young, old, ahead = (
        person.waits(1000 * (now - age * day), n, "{}") for n, age in enumerate((29, 31, -400)))
    emit.expire(home, now - 400 * day)
    assert young.exists() and old.exists() and ahead.exists()
    emit.expire(home, now)
    assert young.exists() and not old.exists() and ahead.exists()
    with pytest.raises(FileExistsError):
        emit.write_whole(str(young), b"another's", fresh=True)
    assert young.read_text() == "{}" and len(list(young.parent.iterdir())) == 2


@quick
def test_emit_loses_no_line_to_one_that_was_cut_short(person):
    """A full disk may leave half a line. The next line is whole all the same."""
    home = str(person.home)
    emit.append(home, "cut short", ["call 5"])
    with person.session_file("cut short").open("a") as file:
        file.write("call 17")
    emit.append(home, "cut short", ["touch 6 x"])
    part = emit.end_session(home, "cut short", 7, None, 0)
    assert (part.number, part.calls, part.refs) == (1, 2, ["x"])


def test_emit_ends_a_session_with_an_endless_id(person):
    for _ in range(2):  # the second has nothing new
        call = {"session_id": "long " * 200000, "cwd": "/", "tool_input": {}}
        person.emit("track", input=json.dumps(call).encode())
    said = [person.emit("--wait", "20000", input=json.dumps(call).encode()) for _ in range(2)]
    [kept] = person.kept()
    assert kept["session_id_hash"] == secret_hash("long " * 200000) and kept["tool_count"] == 2
    assert sum(path.stat().st_size for path in person.ashlr.rglob("*") if path.is_file()) < 10000
    assert [done.returncode for done in said] == [0, 0]


HOSTILE = {  # what may stand where a session's file should
    "a pipe": lambda path: os.mkfifo(str(path)),
    "a folder": lambda path: path.mkdir(),
    "a link": lambda path: path.symlink_to(path.parent.parent / "a person's"),
    "endless lines": lambda path: path.write_text("call 1764000000000\n" * 200000),
    "no lines": lambda path: path.write_bytes(b"\0" * 3000000),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_emit_ends_a_session_whose_file_is_hostile(kind, person, received):
    """The session's event is sent all the same, and so are the events that wait."""
    path = person.session_file("sid-hostile")
    path.parent.mkdir(parents=True)
    theirs = person.put("session-events/a person's", "untouched")
    HOSTILE[kind](path)
    person.waits(5, 5)
    person.tool("sid-hostile", person.discovery("x"))
    said = person.hook("sid-hostile")
    assert set(received.sessions()) == {secret_hash("sid-hostile"), event(5)["session_id_hash"]}
    assert person.kept() == [] and "failed" not in said, said
    assert theirs.read_text() == "untouched"


@oldest_and_newest
def test_emit_whatever_the_locale(python, tmp_path, repository):
    """The project's name is not ASCII, and the locale knows only ASCII. Python 3.6 is strict."""
    project = tmp_path / "zoë ☃"
    project.symlink_to(repository[0])
    with Odd() as server:
        for n in range(9):  # git has 250 ms, which a loaded machine may not give it
            person = Person(tmp_path / ("é%d" % n), server.url, LC_ALL="C", CLAUDE_PROJECT_DIR="")
            session = "locale-%d ☃" % n
            path = str(project) + "/sub/../.ashlrcode/genome/sections/discoveries/x.md"
            call = {"session_id": session, "cwd": str(project), "tool_input": {"path": path}}
            for args in (["track"], ["--wait", "20000"]):
                hook = json.dumps(call, ensure_ascii=False).encode()
                done = person.emit(*args, python=python, input=hook)
                assert (done.returncode, done.stderr) == (0, "")
            sent = json.loads(server.requests[-1][2])
            assert sent["session_id_hash"] == secret_hash(session)
            assert (sent["tool_count"], sent["discovery_refs"]) == (1, ["x"])
            if sent["branch_sha"]:
                break
        assert sent["branch_sha"] == repository[1][:12]


def test_emit_adds_the_commit_to_the_waiting_event(person, repository, tmp_path):
    """The event is in the spool when the hook returns, and its commit follows.

    No other sender takes the event before.
    """
    (tmp_path / "git").write_text('#!/bin/sh\nsleep 0.1\nexec %s "$@"\n' % shutil.which("git"))
    (tmp_path / "git").chmod(0o755)
    with Odd() as server:
        for n in range(9):  # git has 250 ms, which a loaded machine may not give it
            home = Person(tmp_path / str(n), server.url)
            home.env["CLAUDE_PROJECT_DIR"] = str(repository[0])
            slow = {"PATH": "%s:%s" % (tmp_path, os.environ["PATH"]), "CLAUDE_SESSION_ID": "slow"}
            secret_hash("slow")
            home.emit(env=slow)
            [before] = home.kept()
            assert before["branch_sha"] is None
            home.hook("quick", env={"CLAUDE_PROJECT_DIR": str(tmp_path)})
            until(lambda home=home: not home.senders() and not home.kept())
            shas = {
                json.loads(b)["session_id_hash"]: json.loads(b)["branch_sha"]
                for _, _, b in server.requests
            }
            assert set(shas) == {secret_hash("slow"), secret_hash("quick")}
            if shas[secret_hash("slow")]:
                break
        assert shas[secret_hash("slow")] == repository[1][:12]


@quick
def test_emit_leaves_a_new_event_to_its_own_child():
    """A new event waits for its own child, which adds the commit. Later any process sends it."""
    name = "001764000000000-%012x%s.json"
    for after, attempts, new in (
        (0, "", True),
        (emit.COMMIT_S - 0.01, "", True),
        (emit.COMMIT_S, "", False),
        (-0.01, "", False),  # the clock was ahead then
        (0, "-1", False),  # its own child has sent it once
    ):
        assert emit.is_new(name % (1, attempts), 1764000000 + after) == new, (after, attempts)


# -- Where the home may end with the session -------------------------------------------------------


def has_unshare():
    """True if this user may make a process namespace, as a container has one."""
    with contextlib.suppress(OSError):
        return subprocess.run(["unshare", "-pf", "true"], stderr=subprocess.DEVNULL).returncode == 0
    return False


@pytest.mark.skipif(not has_unshare(), reason="unshare -pf")
def test_emit_captures_before_everything_ends(person):
    """All that runs in the namespace ends as soon as the hook returns. 20 of 20 events stay."""
    command = "%s -I -S -c '%s' %s" % (sys.executable, CACHED, ROOT)

    def unshared(n):
        env = {**person.env, "CLAUDE_SESSION_ID": "unshared-%d" % n}
        done = run(["unshare", "-pf", "sh", "-c", command], env=env)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    at_once(unshared, range(20))
    found = {kept["session_id_hash"] for kept in person.kept()}
    assert found == {secret_hash("unshared-%d" % n) for n in range(20)}
    assert all(emit.is_event(kept) for kept in person.kept())


@oldest_and_newest
def test_emit_stays_for_the_answer_where_the_home_passes(python, tmp_path):
    """The hook returns after the answer. It waits for a silent server as long as it was told."""
    with Odd() as server, Odd(lambda n, body: None) as silent:
        for n, env in enumerate(({"ASHLR_SESSION_EVENTS_WAIT": "20000"}, {"CI": "true"})):
            person = Person(tmp_path / str(n), server.url)
            if n:
                person.env.pop("ASHLR_SESSION_EVENTS_WAIT")
            hook = b'{"session_id": "passing-%d"}' % n
            person.waits(5, 5)
            person.emit(python=python, input=hook, env=env)
            if not n:  # before what waits; 500 ms may be too short for a loaded machine
                assert server.sessions()[0] == secret_hash("passing-0")
        person = Person(tmp_path / "silent", silent.url)
        begun = time.monotonic()
        person.emit(python=python, env={"ASHLR_SESSION_EVENTS_WAIT": "700"})
        assert 0.65 < time.monotonic() - begun < 8 and len(person.kept()) == 1
        for pid in person.senders():
            os.kill(pid, signal.SIGKILL)


@oldest_and_newest
def test_emit_without_standard_streams(python, person):
    """The pipe by which the sender says that it is done gets no number of a standard stream."""
    with Odd() as server:
        env = {"ASHLR_SESSION_EVENTS_WAIT": "20000", "ASHLR_SESSION_EVENTS_URL": server.url}
        closed = {"preexec_fn": lambda: os.closerange(0, 3), "stdin": None}
        hook = person.starts("closed", python=python, env=env, **closed)
        assert hook.wait(60) == 0
        assert server.sessions() == [secret_hash("closed")]


def test_emit_is_interrupted_in_silence(person):
    """Ctrl-C while the hook waits for the answer prints nothing. The event is in the spool."""
    with Odd(lambda n, body: None) as silent:
        env = {"ASHLR_SESSION_EVENTS_WAIT": "20000", "ASHLR_SESSION_EVENTS_URL": silent.url}
        pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
        with person.starts("ctrl-c", env=env, **pipes) as hook:
            until(lambda: silent.requests)
            hook.send_signal(signal.SIGINT)
            assert (hook.communicate(timeout=60), hook.returncode) == ((b"", b""), 0)
        assert [kept["session_id_hash"] for kept in person.kept()] == [secret_hash("ctrl-c")]
        for pid in person.senders():
            os.kill(pid, signal.SIGKILL)


def test_emit_takes_the_numbers_before_a_plugin_tidies_them(person):
    """What stats.json said when the hook returned is in the spool."""
    stats = {"schemaVersion": 2, "sessions": {"tidied": {"calls": 7, "tokensSaved": 70}}}
    path = person.put("stats.json", stats)
    person.emit(env={"CLAUDE_SESSION_ID": "tidied"})
    path.unlink()
    [kept] = person.kept()
    assert (kept["tool_count"], kept["tokens_saved"]) == (7, 70)


# -- Another product, and what is not ours ---------------------------------------------------------


def test_emit_as_another_product(person, tmp_path):
    """One changed line gives another folder, variables and discoveries. Consent is not shared."""
    text = EMIT.read_text(encoding="utf-8")
    assert text.count('\nPRODUCT = "ashlr"\n') == 1
    copy = tmp_path / "acme-tool" / "emit.py"
    copy.parent.mkdir()
    copy.write_text(text.replace('PRODUCT = "ashlr"', 'PRODUCT = "acme-tool"'), encoding="utf-8")
    home = str(person.home)

    def acme(*args, **env):
        names = {"PATH": os.environ["PATH"], "HOME": str(person.home), **env}
        call = {"session_id": "acme", "cwd": str(person.home), "tool_input": {"path": path}}
        argv = [sys.executable, "-I", "-S", copy, *args]
        return run(argv, env=names, input=json.dumps(call).encode())

    path = str(person.home / ".acme-toolcode/genome/sections/discoveries/of-acme.md")
    acme("track", ASHLR_TELEMETRY="on")
    acme(ASHLR_TELEMETRY="on")
    assert not (person.home / ".acme-tool").exists()
    on = {"ACME_TOOL_TELEMETRY": "on", "ACME_TOOL_SESSION_EVENTS_WAIT": "0"}
    acme("track", **on)
    acme(ACME_TOOL_API_URL="http://127.0.0.1:9", **on)
    assert person.kept() == [] and not (person.ashlr / "session-events").exists()
    folder = person.home / ".acme-tool" / "session-events" / "pending"
    [kept] = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    assert (kept["discovery_refs"], kept["tool_count"]) == (["of-acme"], 1)
    machine = (person.home / ".acme-tool" / "machine-id").read_text()
    SECRETS.add(machine)
    assert machine.strip() != MACHINE
    said = acme("--help").stdout + acme("status").stdout
    assert "ACME_TOOL_TELEMETRY" in said and "~/.acme-tool/" in said
    assert "ashlr" not in said.lower() and emit.waiting(home) == []
    person.hook("of ashlr")
    assert acme("off").returncode == 0
    assert not list(folder.glob("*.json")) and len(person.kept()) == 1


def test_emit_deletes_nothing_that_is_not_its_own(person, tmp_path):
    """`off` and a missing consent delete only names that it makes, and follow no symbolic link."""
    names = "%015d-%012x.json" % (5, 5), "%015d-%012x-3.json" % (5, 5), ".0123456789abcdef.tmp"
    foreign = ("note.txt", "5-5.json", "0123456789abcdef.tmp", "%015d-%012x.json.bak" % (5, 5))
    for n, way in enumerate(("off", "DO_NOT_TRACK")):
        theirs = tmp_path / ("theirs-%d" % n)
        theirs.mkdir()
        for name in (*names, "a" * 64):
            (theirs / name).write_text("a person's")

        def stop(someone, way=way):
            if way == "off":
                assert someone.emit("off").returncode == 0
            else:
                someone.hook("no", env={"DO_NOT_TRACK": "1"})

        for link in ("pending", "sessions", ""):
            home = Person(tmp_path / ("home-%d-%s" % (n, link)))
            if link:
                (home.ashlr / "session-events").mkdir()
            (home.ashlr / "session-events" / link).symlink_to(theirs)
            if not link:
                (theirs / "pending").mkdir()
                (theirs / "pending" / names[0]).write_text("a person's")
            stop(home)
            assert len([path for path in theirs.rglob("*") if path.is_file()]) >= 4
            assert (theirs / "pending" / names[0]).exists() == (not link)
        home = Person(tmp_path / ("home-%d" % n))
        for name in (*names, *foreign):
            home.put("session-events/pending/" + name, "{}")
            home.put("session-events/sessions/" + name, "{}")
        home.put("session-events/sessions/" + "a" * 64, "call 5\n")
        home.put("session-events/sessions/" + "A" * 64, "x")
        stop(home)
        left = {path.name for path in (home.pending).iterdir()}
        assert left == set(foreign)
        left = {path.name for path in (home.pending.parent / "sessions").iterdir()}
        assert left == {*foreign, "A" * 64, *names[:2]}


def test_emit_writes_through_no_link(person, tmp_path, received):
    """A spool that is a link is not used. The event is sent at once, and `status` says why."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (person.ashlr / "session-events").mkdir()
    for link in ("pending", "sessions"):
        (person.ashlr / "session-events" / link).symlink_to(theirs)
    person.tool("linked", person.discovery("x"))
    assert "not kept" in person.hook("linked")
    assert received.sessions() == [secret_hash("linked")]
    assert list(theirs.iterdir()) == []
    done = person.emit("status")
    assert done.returncode == 1 and "symbolic link" in done.stdout
    shutil.rmtree(str(person.ashlr / "session-events"))
    (person.ashlr / "session-events").symlink_to(theirs)
    person.tool("linked", person.discovery("x"))
    person.hook("linked")
    assert list(theirs.iterdir()) == []


def test_emit_sends_where_no_lock_can_be_had(person, received):
    """A folder stands in the place of the lock. The event arrives all the same."""
    (person.ashlr / "session-events" / "flush.lock").mkdir(parents=True)
    assert "failed" not in person.hook("lockless")
    assert received.sessions() == [secret_hash("lockless")]


def test_emit_keeps_no_more_than_its_limit_without_an_endpoint(person):
    """The oldest of too many events go, also while the endpoint is no URL."""
    for n in range(emit.WAITING_EVENTS + 10):
        person.waits(time.time() * 1000 - n, n, "{}")
    person.env["ASHLR_SESSION_EVENTS_URL"] = "htp://127.0.0.1/"
    assert "is not a http" in person.hook("sent to no URL")
    assert len(os.listdir(str(person.pending))) == emit.WAITING_EVENTS
    kept = {found.get("session_id_hash") for found in person.kept()}
    assert secret_hash("sent to no URL") in kept


OBSTACLES = {  # why nothing can be captured, in words of `status`
    "machine-id is empty": text_for(" \n", "machine-id"),
    "leads nowhere": lambda person: [
        (person.ashlr / "machine-id").unlink(),
        (person.ashlr / "machine-id").symlink_to("nowhere")],
    "Is a directory": folder_for("machine-id"),
    "Not a directory in ~/.ashlr": text_for("a file", "session-events"),
    "no home folder": variable("HOME", ""),
}


@pytest.mark.parametrize("words", OBSTACLES)
def test_emit_says_why_nothing_can_be_captured(words, person):
    OBSTACLES[words](person)
    # An empty variable is dropped by `emit`, and an empty HOME is what is meant here.
    done = run([sys.executable, "-I", "-S", EMIT, "status"], env=person.env)
    assert done.returncode == 1 and words in done.stdout + done.stderr, done
    assert str(person.home) not in done.stdout + done.stderr
    if words != "no home folder":
        done = person.emit("status", "--json")
        assert done.returncode == 1 and words in json.loads(done.stdout)["capture"]


def test_emit_says_that_the_disk_is_full(person):
    full = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))}
    done = person.emit("status", **full)
    assert done.returncode == 1 and "cannot be used: OSError: File too large" in done.stdout
    assert not list(person.ashlr.rglob("*.tmp"))


@needs_linux
@pytest.mark.parametrize("command", ["--help", "--version", "status", "hooks claude"])
def test_emit_says_that_its_output_cannot_be_printed(command, person):
    for options in ((), ("-u",)):
        argv = [sys.executable, *options, "-I", "-S", EMIT, *command.split()]
        with open("/dev/full", "wb") as full:
            done = subprocess.run(
                list(map(str, argv)), env=person.env, stdout=full, stderr=subprocess.PIPE)
        *_, said = done.stderr.splitlines()
        assert done.returncode == 1 and said.startswith(b"emit.py: could not be ")
        assert said.endswith(b"No space left on device") and b"Traceback" not in done.stderr


@needs_linux
def test_emit_takes_a_slip_at_a_terminal_for_no_end_of_a_session(person):
    """A host's hook has no terminal. What it gives too much is passed over, and said if asked."""
    person.env.update(CLAUDE_SESSION_ID="slip", ASHLR_TELEMETRY_DEBUG="1")
    ours, terminal = os.openpty()
    done = person.emit("--hlep", stdin=terminal)
    os.close(ours)
    os.close(terminal)
    assert (done.returncode, done.stdout) == (2, "") and "emit.py takes --dir" in done.stderr
    assert person.kept() == [] and not person.pending.exists()
    assert "arguments ignored" in person.hook("slip", "--hlep")
    assert [event["session_id_hash"] for event in person.kept()] == [secret_hash("slip")]


def test_emit_with_an_empty_home_writes_nowhere(person, tmp_path):
    """An empty HOME stands for no folder: not the root, not the user's own, not a relative one."""
    for argv in ([], ["track"], ["track", "x"], ["off"], ["status"]):
        env = {**person.env, "HOME": "", "ASHLR_TELEMETRY_DEBUG": "1"}
        done = run([sys.executable, "-I", "-S", EMIT, *argv], env=env, cwd=str(tmp_path))
        assert "no home folder" in done.stderr or argv == ["track", "x"], (argv, done)
    assert os.listdir(str(tmp_path)) == ["home"] and not os.path.exists("/.ashlr")


def test_emit_shows_the_folder_to_nobody(person, tmp_path):
    """Git gets the project as its working directory, not in an argument that `ps` shows."""
    (tmp_path / "git").write_text(
        '#!/bin/sh\nprintf "%s\\n" "$PWD" "$@" > ' + str(tmp_path / "ran"))
    (tmp_path / "git").chmod(0o755)
    (person.home / ".git").mkdir()
    person.hook("folder", env={"PATH": "%s:%s" % (tmp_path, os.environ["PATH"])})
    said = (tmp_path / "ran").read_text().splitlines()
    assert said == [str(person.home), "rev-parse", "--short=12", "HEAD"]


def test_emit_mine_and_version(person):
    """`mine` prints each quarter's hashes. Who wants them deleted gives them to an operator."""
    person.put("pro-token-cache.json", {"valid": True, "githubLogin": " octocat "})
    made = emit.instant("2026-05-22T12:00:00Z")
    os.utime(str(person.ashlr / "machine-id"), (made, made))
    done = person.emit("mine", recorded=False)
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    quarters = [*lines]
    assert quarters[0] == "2026Q2" and quarters[-1] == emit.salt(time.time())[5:]
    assert len(quarters) == len(set(quarters)) and quarters == sorted(quarters)
    for quarter, text in lines.items():
        salt = "salt_" + quarter
        known = secret_hash(MACHINE + salt), secret_hash("octocat" + salt)
        assert text == "identity_hash %s github_hash %s" % known
    os.utime(str(person.ashlr / "machine-id"))  # made today: today's quarter is there
    lines = person.emit("mine", recorded=False).stdout.splitlines()
    assert [line.split()[0] for line in lines] == [emit.salt(time.time())[5:]]
    (person.ashlr / "pro-token-cache.json").unlink()
    assert "github" not in person.emit("mine", recorded=False).stdout
    (person.ashlr / "machine-id").unlink()
    done = person.emit("mine")
    assert done.returncode == 1 and "no machine-id" in done.stderr
    assert re.fullmatch(r"emit.py \d+\.\d+\.\d+\n", person.emit("--version").stdout)


def test_emit_show_says_that_nothing_is_sent(person):
    person.env["ASHLR_TELEMETRY"] = ""
    (person.home / ".git").mkdir()
    done = person.emit("show", recorded=False)
    assert json.loads(done.stdout)["branch_sha"] is None
    assert "but nothing is sent, nor git asked for the commit: consent is off" in done.stderr


def test_emit_takes_other_folders_for_discoveries(person):
    call = {"session_id": "sid-elsewhere", "cwd": str(person.home)}
    for path, refs in (
        ("docs/notes/a.md", ["a"]),
        (person.discovery("b"), ["a"]),
        ("adr/c.md", ["a", "c"]),
    ):
        hook = json.dumps(dict(call, tool_input={"file_path": path})).encode()
        person.emit("track", "--discoveries", "docs/notes", "--discoveries", "./adr/", input=hook)
        record = emit.Record(person.session_file("sid-elsewhere").read_bytes())
        assert record.refs == refs


def test_emit_hook_that_cannot_read_its_environment_is_silent(person):
    """A hook that fails before it knows anything returns 0 and prints nothing."""
    done = person.emit(before="import os; os.environ = None",
                       env={"ASHLR_TELEMETRY_DEBUG": "1", "CLAUDE_SESSION_ID": "no environment"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert person.kept() == []


def test_emit_names_the_line_of_a_fault(person):
    """ASHLR_TELEMETRY_DEBUG shows the line, and not the error's words, which may hold a path."""
    broken = "import os; os.urandom = lambda n: {}['/secret/path']"
    env = {"ASHLR_TELEMETRY_DEBUG": "1", "CLAUDE_SESSION_ID": "fault"}
    done = person.emit(before=broken, env=env)
    assert re.search(r"failed: KeyError \(in end_session, line \d+\)\n", done.stderr), done.stderr
    assert done.returncode == 0 and "secret" not in done.stderr


def test_emit_without_descriptors_says_so_in_one_line(person):
    few = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (4, 4))"
    done = person.emit(before=few, env={"ASHLR_TELEMETRY_DEBUG": "1", "CLAUDE_SESSION_ID": "few"})
    assert re.search(r"failed: OSError: .* \(in \w+, line \d+\)\n$", done.stderr), done.stderr
    assert done.returncode == 0 and "Traceback" not in done.stderr


@oldest_and_newest
def test_emit_captures_with_few_descriptors(python, person):
    """Two more than the standard streams are enough. The child holds no end of the pipe for two."""
    for n in range(5, 9):
        few = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (%d, %d))" % (n, n)
        done = person.emit(python=python, before=few, env={"CLAUDE_SESSION_ID": "few %d" % n})
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    found = {kept["session_id_hash"] for kept in person.kept()}
    assert found == {secret_hash("few %d" % n) for n in range(5, 9)}


# -- What the person sees --------------------------------------------------------------------------


@oldest_and_newest
def test_emit_commands(python, person, tmp_path):
    """What `on`, `off`, `status`, `show` and `--help` print, change and return."""
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
        "consent": "off", "decided_by": "nobody said yes (emit.py on does)", "capture": "possible",
        "endpoint": "http://127.0.0.1:9/x?...", "chosen_by": "ASHLR_SESSION_EVENTS_URL",
        "waiting": 0, "since": None, "last_run": None, "result": None, "retry_at": None}
    on = person.emit("on", python=python)
    assert on.returncode == 0
    assert len(on.stdout.splitlines()) == 4
    assert "http://127.0.0.1:9/x?..." in on.stdout
    assert json.loads(config.read_text()) == {"theme": "dark",
                                              "n": [1.5, {"é": None}], "telemetry": "opt-in"}
    assert config.stat().st_mode & 0o777 == 0o640
    assert person.emit("on", python=python).stdout == "on, as before\n"
    person.hook("status", python=python)
    assert status()["consent"] == "on" and status()["waiting"] == 1
    assert "without an answer" in status()["result"]
    text = person.emit("status", python=python).stdout
    assert "opt-in" in text and "without an answer" in text
    assert re.search(r"^waiting    1\nsince      20", text, re.MULTILINE), text

    before = sorted((path, path.stat().st_mtime) for path in person.home.rglob("*"))
    shown = person.emit("show", python=python, recorded=False,
                        env={"CLAUDE_SESSION_ID": "status-2"}, stdin=subprocess.DEVNULL)
    kept = dict(person.kept()[0], session_id_hash=secret_hash("status-2"), ended_at="")
    assert {**json.loads(shown.stdout), "ended_at": ""} == kept
    assert "127.0.0.1:9/x" in shown.stderr and "consent is off" not in shown.stderr
    assert sorted((path, path.stat().st_mtime) for path in person.home.rglob("*")) == before

    off = person.emit("off", python=python)
    assert off.returncode == 0
    assert person.kept() == []
    assert json.loads(config.read_text())["telemetry"] == "off"
    assert "still off" in person.emit("on", python=python, env={"DO_NOT_TRACK": "1"}).stderr
    for text in ("{", "[]", '{"n": 1e999}', ""):
        config.write_text(text)
        done = person.emit("off", python=python)
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1
        assert config.read_text() == text
    for args in (("status", "x"), ("show", "x"), ("on", "x"), ("off", "--json"), ("bogus",)):
        done = person.emit(*args, python=python)
        assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    fresh = Person(tmp_path / "fresh", ASHLR_TELEMETRY="")
    (fresh.ashlr / "machine-id").unlink()
    assert ("made up"
            in fresh.emit("show", python=python, recorded=False, stdin=subprocess.DEVNULL).stderr)
    assert list(fresh.ashlr.iterdir()) == []
    done = fresh.emit("--help", python=python)
    assert done.returncode == 0 and "example:" in done.stdout


def test_emit_makes_a_machine_id_where_there_are_no_hard_links(tmp_path, monkeypatch):
    def no_link(*_, **__):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_link)
    home = str(tmp_path)
    machine = emit.machine_id(home)
    assert machine and emit.machine_id(home) == machine
    with pytest.raises(OSError):
        emit.write_whole(home + "/.ashlr/machine-id", b"another", fresh=True)
    assert emit.machine_id(home) == machine and os.listdir(home + "/.ashlr") == ["machine-id"]


@oldest_and_newest
def test_emit_makes_one_machine_id(python, person, received):
    """First sessions at once agree on one machine-id, and nobody overwrites it."""
    (person.ashlr / "machine-id").unlink()
    for n in range(50):  # as threads, which come closer to each other than processes do
        home, together = str(person.home / str(n)), threading.Barrier(4)

        def first(_, home=home, together=together):
            together.wait()
            return emit.machine_id(home)

        os.makedirs(home)
        assert len(set(at_once(first, range(4), 4))) == 1
    waits = "--wait", "20000"
    hooks = [person.starts("first-%d" % n, *waits, python=python, code=SOON) for n in range(6)]
    assert [process.wait(60) for process in hooks] == [0] * 6
    person.hook("first-7")
    # Some may come twice: the hook that stays sends its event beside the sender of another one.
    until(lambda: len(set(received.sessions())) == 7)
    machine = (person.ashlr / "machine-id").read_text()
    SECRETS.add(machine)
    assert re.fullmatch(r"[0-9a-f-]{36}", machine)
    assert (person.ashlr / "machine-id").stat().st_mode & 0o777 == 0o600
    bodies = [json.loads(body) for _, _, body in received.requests]
    assert {body["identity_hash"] for body in bodies} == {
        secret_hash(machine + emit.salt(emit.instant(body["ended_at"]))) for body in bodies}


def test_emit_of_50_sessions_at_once_leaves_no_process_and_loses_no_event(crowd):
    people, _, silent, when_gone = crowd
    assert when_gone() < 25  # s; a sender lives for 20
    silent.answer = lambda n, body: (202, {})
    del silent.requests[:]
    for n, person in enumerate(people):
        assert "answered 202" in person.hook(
            "crowd-again-%d" % n, env={"ASHLR_SESSION_EVENTS_URL": silent.url})
    assert set(silent.sessions()) == {secret_hash("crowd-%d" % n) for n in range(51)} | {
        secret_hash("crowd-again-0"), secret_hash("crowd-again-1")}


# ==================================================================================================
# server.py
# ==================================================================================================

# -- The event check -------------------------------------------------------------------------------

HEX = EVENT["identity_hash"]
ABSENT = object()
GOOD = [  # (field, value sent, value stored): README, Contract 1, each row with its edges
    ("identity_hash", HEX, HEX),
    ("github_hash", HEX, HEX),
    ("github_hash", None, None),
    ("github_hash", ABSENT, None),
    ("session_id_hash", HEX, HEX),
    *[("ended_at", *pair) for pair in MOMENTS],
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
REFUSED = {  # field: values that break its rule
    "identity_hash": (
        None, "", 5, True, [HEX], HEX[1:], HEX + "0", HEX.upper(), HEX + "\n", "g" + HEX[1:],
        HEX[:-1] + "٣", ABSENT),
    "github_hash": ("", False, HEX + "\n", {}, "\ud800"),
    "session_id_hash": (None, HEX[1:], ABSENT),
    "ended_at": (
        *NO_MOMENTS, None, 1779453296, ABSENT, "2026-05-22T24:00:00Z", "2026-05-22T12:60:00Z",
        "2026-05-22T12:00:60Z", "0000-01-01T00:00:00Z", "0001-01-01T00:00:00+00:01",
        "9999-12-31T23:59:59-00:01", "2026-05-22T12:34:56.Z", "2026-05-22T12:34:56,5Z",
        "2026-05-22T12:34:56+0200", "2026-05-22T12:34Z", "2025-02-29T00:00:00Z",
        "2026-05-22T12:34:56z", " 2026-05-22T12:34:56Z", "2026-05-22T12:34:5٦Z"),
    "tool_count": (True, False, None, -1, 1_000_001, 5.5, "5", [5], 10**400, ABSENT),
    "tokens_saved": (True, -1, 1_000_000_001, 0.1, ABSENT),
    "branch_sha": ("", "abc123", "a" * 41, "abcdefg", 1234567, "abc1234\n"),
    "discovery_refs": (None, "a", {}, ["a"] * 201),
    "plugin_version": ("", None, 1, "-1", "1" * 65, "1.0 beta", "1.0\n", "v/1", ABSENT),
}
BAD = [(field, value) for field, values in REFUSED.items() for value in values]
NOT_JSON = [b"", b" ", b"{", b"{}}", b"nope", b'{"a":NaN}', b'{"a":Infinity}', b"[-Infinity]",
            b"\xff\xfe{\x00}\x00", "{}".encode("utf-16"), "{}".encode("utf-32"), b"\xef\xbb\xbf{}",
            b'{"a":"\xff"}', b'{"a":"\xed\xa0\x80"}', b"[" * 30000, b'{"a":' * 10000, b"'{}'",
            b'{"a":01}', b'{"a":"\n"}']
NO_EVENT = [
    b"[]", b"null", b"1", b'"text"', b"true", b"[{}]", b"1" * 5000, b"-" + b"9" * 20000, b"1e400"]


def with_field(field, value):
    """A valid event with one field set, or taken away."""
    changed = dict(EVENT, **{field: value})
    if value is ABSENT:
        del changed[field]
    return changed


def as_sent(value, **options):
    """JSON as clients write it."""
    return json.dumps(value, **options).encode("utf-8", "surrogatepass")


@quick
@pytest.mark.parametrize(("field", "value", "stored"), GOOD)
def test_server_event_check_takes(field, value, stored):
    stored = (json.dumps(value, separators=(",", ":"))
              if stored is None and field == "discovery_refs"
              else stored)
    column = server.COLUMNS.index("discovery_refs_json" if field == "discovery_refs" else field)
    short = server.check_body(as_sent(with_field(field, value), separators=(",", ":")))
    spaced = server.check_body(as_sent(with_field(field, value), indent=1))
    assert short == spaced and type(short) is tuple
    assert short[column] == stored


@quick
@pytest.mark.parametrize(("field", "value"), BAD)
def test_server_event_check_refuses(field, value):
    for options in ({"separators": (",", ":")}, {"indent": 1}, {"ensure_ascii": False}):
        answer = server.check_body(as_sent(with_field(field, value), **options))
        if isinstance(value, str) and "\ud800" in value and options.get("ensure_ascii") is False:
            assert answer.status == 400  # a lone surrogate is no UTF-8
            continue
        told = json.loads(answer.payload)
        assert answer.status == 400 and told["error"] == "Validation failed"
        assert [issue["path"] for issue in told["issues"]] == [[field]]
        assert (told["issues"][0]["message"] == "is required") == (value is ABSENT)


@quick
def test_server_event_check_names_every_fault_and_no_value():
    wrong = dict(EVENT, identity_hash="SECRET-1", tool_count="SECRET-2",
                 discovery_refs=["ok", "SECRET 3", 5])
    del wrong["ended_at"]
    wrong.update({"note": "SECRET-4", "SECRET key": 1})
    answer = server.check_body(as_sent(wrong))
    told = json.loads(answer.payload)["issues"]
    assert [issue["path"] for issue in told] == [["identity_hash"], ["ended_at"], ["tool_count"],
                                                 ["discovery_refs", 1],
                                                 ["discovery_refs", 2], ["note"], []]
    assert b"SECRET" not in answer.payload
    many = server.check_body(as_sent(dict.fromkeys(map(str, range(9000)), 1)))
    assert len(many.payload) < 16384 and b"8900 more keys" in many.payload


@quick
def test_server_event_check_says_the_rules_of_the_table():
    """Each field's message and column come from its row of FIELDS."""
    told = {name: server.check_body(as_sent(with_field(name, {}))) for name, *_ in server.FIELDS}
    told = {name: json.loads(answer.payload)["issues"] for name, answer in told.items()}
    for name, json_type, _needed, rule in server.FIELDS:
        words = told[name][0]["message"]
        assert words.endswith(", or null") == ("null" in json_type)
        if json_type == "number":
            assert words == "must be a whole number from %d to %d" % rule
        elif json_type == "array":
            assert words == "must be an array of strings"
        else:
            assert ("ISO 8601" if rule == "moment" else "of the form " + rule) in words
        assert server.COLUMNS.count(name) + server.COLUMNS.count(name + "_json") == 1
    assert server.FIELDS[7][3][1] in server.check_body(
        as_sent(with_field("discovery_refs", ["a b"]))
    ).payload.decode().replace("\\\\", "\\")


@quick
def test_server_event_check_names_a_key_that_stands_twice():
    """Most parsers take the last of two values, some the first. The server stores neither."""
    for name, value in EVENT.items():
        for other in (value, 1, "x"):
            twice = as_sent(EVENT)[:-1] + b", " + as_sent({name: other})[1:]
            told = json.loads(server.check_body(twice).payload)
            assert {"path": [name], "message": "stands more than once"} in told["issues"], name
    secret = as_sent(EVENT)[:-1] + b', "SECRET key": 1, "SECRET key": {"a": 1, "a": 2}}'
    told = server.check_body(secret)
    assert told.status == 400 and b"SECRET" not in told.payload
    assert [issue["path"] for issue in json.loads(told.payload)["issues"]] == [[], []]
    many = b"{%s}" % b",".join(b'"%d":1' % (n % 6000) for n in range(12000))
    assert len(server.check_body(many).payload) < 32768


@quick
@pytest.mark.parametrize("body", NOT_JSON, ids=lambda body: repr(body[:20]))
def test_server_event_check_not_json(body):
    assert server.check_body(body)[:2] == (400, b'{"error":"Invalid JSON body"}')


@quick
@pytest.mark.parametrize("body", NO_EVENT, ids=lambda body: repr(body[:20]))
def test_server_event_check_no_event(body):
    assert json.loads(server.check_body(body).payload)["issues"] == [
        {"path": [], "message": "must be a JSON object"}]


@quick
def test_server_short_check_is_the_long_one_sooner():
    """Whatever canonical_row takes, check_event makes the same row of it. Seeded mutants."""
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
            ("0000", "0001", "1900", "2024", "9999"), range(14), range(33)):
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

ITS_UNIQUE_INDEX = """CREATE UNIQUE INDEX idx_session_events_identity_session_unique
      ON session_events (identity_hash, session_id_hash);"""
OTHER_PROGRAM = """
    CREATE TABLE session_events (
      received_at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%SZ', 'now')),
      id INTEGER PRIMARY KEY AUTOINCREMENT, identity_hash TEXT NOT NULL, github_hash TEXT,
      session_id_hash TEXT NOT NULL, ended_at TEXT NOT NULL, tool_count INTEGER NOT NULL DEFAULT 0,
      tokens_saved INTEGER NOT NULL DEFAULT 0, branch_sha TEXT,
      discovery_refs_json TEXT NOT NULL DEFAULT '[]', plugin_version TEXT NOT NULL);
    %s
    CREATE INDEX idx_session_events_identity_ended_at ON session_events (identity_hash, ended_at);
    CREATE INDEX idx_session_events_received_at ON session_events (received_at);
""".replace("%s", ITS_UNIQUE_INDEX)


def rows_of(db, query="SELECT * FROM session_events ORDER BY id"):
    with contextlib.closing(sqlite3.connect(str(db))) as connection:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute(query)]


def insert_rows(db, refs):
    """A row by hand for each text of refs, as some other program would."""
    with contextlib.closing(sqlite3.connect(str(db))) as connection, connection:
        connection.executemany(
            "INSERT INTO session_events (identity_hash, session_id_hash, ended_at,"
            " discovery_refs_json, plugin_version)"
            " VALUES (?, ?, '2026-01-01T00:00:00.000Z', ?, '1')",
            [(EVENT["identity_hash"], "%064x" % n, text) for n, text in enumerate(refs)])


def edges(db):
    return [
        tuple(row.values())
        for row in rows_of(db, "SELECT * FROM session_discoveries ORDER BY 2, 1")
    ]


@quick
def test_server_schema_file_is_the_servers_to_the_letter():
    assert (ROOT / "schema.sql").read_text(encoding="utf-8") == server.SCHEMA


@quick
def test_server_migration_of_a_file_that_another_program_made(tmp_path):
    db = tmp_path / "other.db"
    scripted(db, OTHER_PROGRAM)
    insert_rows(db, ['["a","b","a"]', "[]", "no json", '{"k":["c"]}', '[1,"d",null]', ""])
    before = rows_of(db)
    for _ in range(2):  # opening twice changes nothing
        server.Store(str(db)).close()
        assert rows_of(db) == before
        assert edges(db) == [("a", 1), ("b", 1), ("d", 5)]
        assert rows_of(db, "PRAGMA user_version") == [{"user_version": server.SCHEMA_VERSION}]
    names = {row["name"] for row in rows_of(db, "SELECT name FROM sqlite_master")}
    assert {"idx_session_events_ended_at", "session_discoveries"} <= names


@quick
def test_server_migration_of_fresh_older_and_emptied_files(tmp_path):
    """A file of any age ends with the tables, indexes and triggers that a fresh one gets."""
    made = {}
    without_edges = server.SCHEMA.split("CREATE TABLE IF NOT EXISTS session_discoveries")[0]
    for name, script in (("fresh", None), ("empty", ""), ("older", without_edges)):
        db = tmp_path / (name + ".db")
        if script is not None:
            scripted(db, script)
        server.Store(str(db)).close()
        made[name] = {
            row["name"]: row["sql"] for row in rows_of(db, "SELECT name, sql FROM sqlite_master")}
    assert made["fresh"] == made["empty"] == made["older"]
    assert server.Store(":memory:").db.execute(
        "SELECT count(*) FROM session_events"
    ).fetchone() == (0,)


FILE_OF_VERSION_1 = """
    CREATE TABLE session_events (id INTEGER PRIMARY KEY AUTOINCREMENT, identity_hash TEXT NOT NULL,
      github_hash TEXT, session_id_hash TEXT NOT NULL, ended_at TEXT NOT NULL,
      tool_count INTEGER NOT NULL DEFAULT 0, tokens_saved INTEGER NOT NULL DEFAULT 0,
      branch_sha TEXT, discovery_refs_json TEXT NOT NULL DEFAULT '[]', plugin_version TEXT NOT NULL,
      received_at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%SZ', 'now')));
    CREATE UNIQUE INDEX idx_session_events_identity_session_unique
      ON session_events (identity_hash, session_id_hash);
    CREATE INDEX idx_session_events_identity_ended_at ON session_events (identity_hash, ended_at);
    CREATE INDEX idx_session_events_received_at ON session_events (received_at);
    CREATE INDEX idx_session_events_ended_at ON session_events (ended_at);
    CREATE TABLE session_discoveries (discovery_ref TEXT NOT NULL, event_id INTEGER NOT NULL,
      PRIMARY KEY (discovery_ref, event_id)) WITHOUT ROWID;
    CREATE TRIGGER session_events_discoveries_insert AFTER INSERT ON session_events
    WHEN NEW.discovery_refs_json <> '[]' BEGIN
      INSERT INTO session_discoveries (discovery_ref, event_id)
        SELECT value, NEW.id FROM json_each(NEW.discovery_refs_json) WHERE type = 'text'
        ON CONFLICT DO NOTHING;
    END;
    CREATE TRIGGER session_events_discoveries_delete AFTER DELETE ON session_events
    WHEN OLD.discovery_refs_json <> '[]' AND json_valid(OLD.discovery_refs_json) BEGIN
      DELETE FROM session_discoveries WHERE event_id = OLD.id AND discovery_ref IN
        (SELECT value FROM json_each(OLD.discovery_refs_json) WHERE type = 'text');
    END;
    PRAGMA user_version = 1;
"""  # as released; never edit it


def edited(module, folder, *changes):
    """A copy of a program with parts of its text replaced, imported. Each part has to be there."""
    text = Path(module.__file__).read_text(encoding="utf-8")
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    path = folder / ("edited_%s.py" % module.__name__)
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, str(path))
    copy = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = copy
    spec.loader.exec_module(copy)
    return copy


def version_2(folder):
    """server.py as it would be after a column was added."""
    return edited(
        server, folder,
        ("  plugin_version TEXT NOT NULL,\n", "  plugin_version TEXT NOT NULL,\n  host TEXT,\n"),
        ("PRAGMA user_version = 1;", "PRAGMA user_version = 2;"),
        ("FROM schema_before) <= 1", "FROM schema_before) <= 2"),
        ("'received_at')) = 11", "'received_at', 'host')) = 12"),
        ("    ), ADOPTION),\n",
         "    ), ADOPTION),\n    Migration(2, ('host',),"
         " 'ALTER TABLE session_events ADD COLUMN host TEXT;'),\n"))


def scripted(db, *scripts):
    with contextlib.closing(sqlite3.connect(str(db), timeout=30)) as connection:
        for script in scripts:
            connection.executescript(script)
    return db


def user_version(db):
    return rows_of(db, "PRAGMA user_version")[0]["user_version"]


def column_names(db):
    return [row["name"] for row in rows_of(db, "PRAGMA table_info(session_events)")]


@quick
def test_server_migrations_bring_every_older_file_to_a_later_version(tmp_path):
    """A file of version 1, another program's and a fresh one, opened by a pretended version 2."""
    later = version_2(tmp_path)
    fields = '    ("plugin_version", "string", True, "[0-9A-Za-z][0-9A-Za-z.+_-]{0,63}"),\n'
    reader = edited(session_events, tmp_path,
                    ("SCHEMA_VERSION = 1\n", "SCHEMA_VERSION = 2\n"),
                    (fields, fields + '    ("host", "string or null", False, "[a-z]{1,16}"),\n'),
                    ("VERSION = range(10)", "VERSION, HOST = range(11)"),
                    ("branch, refs, version = row", "branch, refs, version, _ = row"))

    def listed(program, path):
        """What a reader's program lists, and what it would ship."""
        with program.reading(str(path)) as opened:
            found = program.sessions(opened, program.EVER)["sessions"]
            return found, len(program.ship_batch(opened, "> ? ORDER BY id", 0, 9))

    for name, script in (("one", FILE_OF_VERSION_1), ("other", OTHER_PROGRAM), ("none", "")):
        db = scripted(tmp_path / (name + ".db"), script)
        if script:
            insert_rows(db, ['["a","b"]', "[]"])
        if name == "one":
            server.Store(str(db)).close()  # today's server leaves it as it is
            assert user_version(db) == 1 and "host" not in column_names(db)
            assert listed(session_events, db) == listed(reader, db)  # both readers take it
            assert len(listed(reader, db)[0]) == listed(reader, db)[1] == 2
        before = rows_of(db) if script else []
        for _ in range(2):
            later.Store(str(db)).close()
            assert user_version(db) == 2 and column_names(db).count("host") == 1
            assert rows_of(db) == [dict(row, host=None) for row in before]
            assert edges(db) == ([("a", 1), ("b", 1)] if script else [])
        assert len(listed(reader, db)[0]) == listed(reader, db)[1] == len(before)
        with pytest.raises(session_events.Refused, match="schema version 2"):
            with session_events.reading(str(db)):
                pass
        with pytest.raises(server.StartError, match="schema version 2"):
            server.Store(str(db))
        store = later.Store(str(db))
        store.run_migrations()  # as a second server that saw the old version
        store.close()
    # A version's own columns are asked for: 1 needs no host, 2 does.
    claims = scripted(tmp_path / "claims.db", FILE_OF_VERSION_1, "PRAGMA user_version = 2")
    with pytest.raises(later.StartError, match="column host"):
        later.Store(str(claims))


@quick
def test_server_migration_that_fails_changes_nothing(tmp_path):
    later = edited(
        server, tmp_path,
        ("    ), ADOPTION),\n",
         "    ), ADOPTION),\n    Migration(2, (), 'CREATE TABLE a (b); CREATE TABLE a (b);'),\n"))
    for name, script in (("one", FILE_OF_VERSION_1), ("other", OTHER_PROGRAM)):
        db = scripted(tmp_path / (name + ".db"), script)
        before = rows_of(db, "SELECT * FROM sqlite_master"), user_version(db)
        with pytest.raises(later.StartError, match="already exists"):
            later.Store(str(db))
        assert (rows_of(db, "SELECT * FROM sqlite_master"), user_version(db)) == before


def by_hand(db, script):
    """Run a script as `sqlite3 FILE < script` does: it goes on after an error."""
    with contextlib.closing(sqlite3.connect(str(db), isolation_level=None)) as connection:
        for statement in server.statements(script):
            with contextlib.suppress(sqlite3.Error):
                connection.execute(statement)


@quick
def test_server_schema_file_by_hand_stamps_no_version_that_the_columns_lack(tmp_path):
    columns = server.MIGRATIONS[0].columns
    fresh = tmp_path / "fresh.db"
    for _ in range(2):
        by_hand(fresh, server.SCHEMA)
        assert user_version(fresh) == server.SCHEMA_VERSION and set(column_names(fresh)) == {
            name for migration in server.MIGRATIONS for name in migration.columns
        }
    by_hand(scripted(tmp_path / "other.db", OTHER_PROGRAM), server.SCHEMA)
    assert user_version(tmp_path / "other.db") == 1
    for missing in columns:
        there = ", ".join(name for name in columns if name != missing)
        db = scripted(tmp_path / (missing + ".db"), "CREATE TABLE session_events (x, %s)" % there)
        before = rows_of(db, "SELECT * FROM sqlite_master")
        by_hand(db, server.SCHEMA)
        assert user_version(db) == 0, missing
        assert rows_of(db, "SELECT * FROM sqlite_master") == before, missing
    twice = scripted(tmp_path / "twice.db", OTHER_PROGRAM.replace(ITS_UNIQUE_INDEX, ""))
    insert_rows(twice, ["[]", "[]"])
    scripted(twice, "UPDATE session_events SET session_id_hash = 's'")
    by_hand(twice, server.SCHEMA)  # the unique index cannot be made
    assert user_version(twice) == 0
    newer = scripted(tmp_path / "newer.db", FILE_OF_VERSION_1, "PRAGMA user_version = 2")
    by_hand(newer, server.SCHEMA)
    assert user_version(newer) == 2


@quick
def test_server_takes_the_demos_file(tmp_path):
    """The demo's small table is one more file that another program made."""
    db = tmp_path / "demo.db"
    count = session_events.write_demo(str(db))
    assert db.stat().st_mode & 0o777 == 0o600
    by_demo = edges(db)
    server.Store(str(db)).close()
    assert len(rows_of(db)) == count > 100 and user_version(db) == server.SCHEMA_VERSION
    assert edges(db) == by_demo != []


@quick
def test_server_edges_follow_the_rows_whoever_writes(tmp_path):
    db = tmp_path / "events.db"
    server.Store(str(db)).close()
    insert_rows(db, ['["a","b","a"]', "[]", '["b"]'])
    assert edges(db) == [("a", 1), ("b", 1), ("b", 3)]
    with contextlib.closing(sqlite3.connect(str(db))) as connection, connection:
        connection.execute(
            "INSERT OR REPLACE INTO session_events SELECT 9, 'j', github_hash, 's', ended_at, 0, 0,"
            " NULL, '[\"x\",\"x\"]', '1', received_at FROM session_events WHERE id = 1")
        connection.execute("DELETE FROM session_events WHERE id = 1")
        with pytest.raises(sqlite3.OperationalError):
            connection.execute(
                "INSERT INTO session_events (identity_hash, session_id_hash, ended_at,"
                " plugin_version, discovery_refs_json) VALUES ('k', 'k', '', '', 'no json')")
    assert edges(db) == [("b", 3), ("x", 9)]


@quick
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


@quick
def test_server_transaction_that_fails_is_undone_and_the_next_goes_through():
    row = server.check_event(event(0))
    with contextlib.closing(server.Store(":memory:")) as store:
        with pytest.raises(server.Unavailable, match="disk I/O error"), store.transaction():
            store.db.execute(server.INSERT_ONE, (*row, "2026-01-01T00:00:00Z"))
            raise sqlite3.OperationalError("disk I/O error")
        assert store.write([row]) == (1, {}, 0)


@quick
def test_server_database_emptied_in_place_takes_nothing(tmp_path):
    """The path still leads to the same file, which has no byte left."""
    with contextlib.closing(server.Store(str(tmp_path / "events.db"))) as store:
        os.truncate(tmp_path / "events.db", 0)
        with pytest.raises(server.Unavailable, match="emptied"):
            store.write([server.check_event(event(0))])


@quick
def test_server_disk_that_fails_once_is_no_file_that_is_gone(tmp_path, monkeypatch):
    """A look at a file that fails is reported as what it is, and the server goes on after it."""
    db, log, faults, look = tmp_path / "events.db", tmp_path / "events.db-wal", [], os.stat
    rows = [server.check_event(event(0))]

    def stat(path, *args, **options):
        if faults and path == str(log):
            raise OSError(faults.pop(), "the disk failed", path)
        return look(path, *args, **options)

    def refused(store, words):
        with pytest.raises(server.Unavailable, match=words):
            store.write(rows)

    monkeypatch.setattr(server.os, "stat", stat)
    faults.append(errno.EIO)
    with pytest.raises(server.StartError, match="db: the disk failed"):
        server.Store(str(db))
    with contextlib.closing(server.Store(str(db))) as store:
        store.fault = "the disk is full"  # as when it started without room for the side files
        faults.append(errno.EIO)
        refused(store, "^the disk failed$")
        store.reopen_at = 0.0
        assert store.write(rows).stored == 1
        faults.append(errno.EACCES)
        refused(store, "cannot tell whether .*: the disk failed$")
        assert store.write(rows).stored == 0
        faults.append(errno.EIO)
        log.rename(tmp_path / "aside")
        refused(store, "the disk failed$")
        refused(store, "was deleted")  # a look that failed hides no file that is gone
        (tmp_path / "aside").rename(log)
        assert store.write(rows)


def test_server_database_and_side_files_are_the_owners_only(tmp_path):
    db = tmp_path / "events.db"
    old = os.umask(0)
    (tmp_path / "link").symlink_to(db)
    try:
        with serving(tmp_path / "link") as running:
            assert post(running, event(1)).status == 202
            assert {p.name: p.stat().st_mode & 0o777 for p in tmp_path.glob("events*")} == {
                "events.db": 0o600, "events.db-wal": 0o600, "events.db-shm": 0o600}
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
CHUNKED = request(headers=["Transfer-Encoding: chunked"])


def chunks(body, size):
    """A body in chunks of so many bytes, and the last chunk."""
    pieces = [body[i : i + size] for i in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in pieces) + b"0\r\n\r\n"


HEALTH = request(method="GET", target="/healthz")
COSTLY = request(as_sent(dict.fromkeys(map(str, range(100)), 1)))  # 1 KB in, 8 KB out
NOT_FOUND, NO_JSON = b'{"error":"Not found"}', b'{"error":"Invalid JSON body"}'


def headed(text, more):
    """The request of BARE and BODY with `more` in place of a text of its head."""
    assert text in BARE
    return BARE.replace(text, more) + b"\r\n" + BODY


OUTCOMES = {  # (status, body or None, whether the connection stays): {name: request}
    (202, OK_BODY, True): {
        "event": request(BODY),
        "event again": request(BODY),
        "event of 64 KiB": request(PADDED),
        "any content type": request(BODY, headers=["Content-Type: text/plain"]),
        "a query": request(BODY, target="/v1/session-events?a=b"),
        "absolute form": request(BODY, target="http://elsewhere/v1/session-events"),
        "an empty line before": b"\r\n" + request(BODY),
        "a length with many zeros": headed(b"%d" % len(BODY), b"0" * 5000 + b"%d" % len(BODY)),
        "chunked": CHUNKED + chunks(BODY, 100),
        "chunks of a byte": CHUNKED + chunks(BODY, 1),
        "chunks of 64 KiB": CHUNKED + chunks(PADDED, 50000),
        **{
            "Host %r" % host: headed(b"localhost", host)
            for host in (
                b"", b"events.example.org", b"192.0.2.1:8787", b"[2001:db8::1]:8787", b"a_b:",
                b"%61")
        },
    },
    (202, OK_BODY, False): {
        "close": request(BODY, headers=["Connection: Keep-Alive, CLOSE"]),
        "HTTP/1.0": request(BODY, version="HTTP/1.0"),
        "no Host in HTTP/1.0": headed(b"1.1\r\nHost: localhost", b"1.0"),
    },
    (200, OK_BODY, True): {
        "health": HEALTH,
        "readiness": request(method="GET", target="/readyz"),
        "a GET with chunks": CHUNKED.replace(b"POST /v1/session-events", b"GET /healthz")
        + chunks(b"x" * 9, 5),
    },
    (200, b"", True): {"HEAD": request(method="HEAD", target="/healthz")},
    (400, NO_JSON, True): {
        "not JSON": request(b"nope"),
        "no body": request(b""),
        "chunks of nothing": CHUNKED + b"000\r\n\r\n",
    },
    (400, None, True): {"no event": request(b"[]")},
    (404, NOT_FOUND, True): {
        "unknown path": request(BODY, target="/v1/session-events/"),
        "two slashes": request(BODY, target="//v1/session-events"),
    },
    (404, b"", True): {"HEAD of nothing": request(method="HEAD", target="/nothing")},
    (405, None, True): {
        "other method": request(BODY, method="PUT"),
        "made-up method": request(method="BREW"),
        "GET of the endpoint": request(method="GET"),
        "OPTIONS": request(method="OPTIONS"),
        "POST to health": request(b"", target="/healthz"),
    },
    (411, None, False): {"no length": request()},
    (413, None, False): {
        "over 64 KiB": request(PADDED + b" "),
        "a length beyond reason": headed(b"%d" % len(BODY), b"9" * 5000)[: -len(BODY)],
        "chunks over 64 KiB": CHUNKED + chunks(PADDED + b" ", 4096),
        "a chunk over 64 KiB": CHUNKED + b"10001\r\n",
    },
    (417, None, False): {"other expectation": request(BODY, headers=["Expect: 200-ok"])},
    (431, None, False): {
        "long head": request(BODY, headers=["X-Long: " + "x" * 17000]),
        "many headers": request(BODY, headers=["X-%d: y" % n for n in range(120)]),
    },
    (400, None, False): {
        "two lengths": BARE + b"Content-Length: 5\r\n\r\n" + BODY,
        "one length twice": BARE + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY,
        "a list of lengths": headed(b"h: ", b"h: 5, "),
        "a signed length": headed(b"h: ", b"h: +"),
        "a hex length": headed(b"h: ", b"h: 0x"),
        "an empty length": headed(b"h: %d" % len(BODY), b"h:"),
        "length and chunked": BARE + b"Transfer-Encoding: chunked\r\n\r\n" + BODY,
        "no Host": headed(b"Host: localhost\r\n", b""),
        "two hosts": BARE + b"Host: other\r\n\r\n" + BODY,
        **{
            "Host %r" % host: headed(b"localhost", host)
            for host in (
                b"a b", b"a/b", b"user@a", b"a:b", b"a:1:2", b"[::1", b"::1", b"%6", b"\xe4",
                b'"a"')
        },
        "blank before the colon": headed(b"Length:", b"Length :"),
        "blank in front": BARE + b" X-Folded: y\r\n\r\n" + BODY,
        "no colon": BARE + b"X-Nothing\r\n\r\n" + BODY,
        "no name": BARE + b": y\r\n\r\n" + BODY,
        "bare LF": BARE.replace(b"\r\n", b"\n") + b"\n" + BODY,
        "one bare LF": BARE + b"X-A: y\nX-B: z\r\n\r\n" + BODY,
        "bare CR": BARE + b"X-A: y\rX-B: z\r\n\r\n" + BODY,
        "NUL": BARE + b"X-A: \0\r\n\r\n" + BODY,
        "HTTP/0.9": b"GET /healthz\r\n\r\n",
        "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "two blanks": b"GET  /healthz HTTP/1.1\r\n\r\n",
        "small letters": b"GET /healthz http/1.1\r\n\r\n",
        "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        "chunked in HTTP/1.0": CHUNKED.replace(b"1.1", b"1.0") + chunks(BODY, 100),
        "a chunk's extension": CHUNKED + b"2;a=b\r\n{}\r\n0\r\n\r\n",
        "an extension of the last chunk": CHUNKED + b"2\r\n{}\r\n0;a\r\n\r\n",
        "a blank behind a chunk's size": CHUNKED + b"2 \r\n{}\r\n0\r\n\r\n",
        "a blank before a chunk's size": CHUNKED + b" 2\r\n{}\r\n0\r\n\r\n",
        "a chunk's size in hex with 0x": CHUNKED + b"0x2\r\n{}\r\n0\r\n\r\n",
        "a signed chunk's size": CHUNKED + b"+2\r\n{}\r\n0\r\n\r\n",
        "an endless chunk's size": CHUNKED + b"0" * 17 + b"\r\n\r\n",
        "a chunk without a size": CHUNKED + b"\r\n{}\r\n0\r\n\r\n",
        "a chunk's size with a bare LF": CHUNKED + b"2\n{}\r\n0\r\n\r\n",
        "a chunk with a bare LF": CHUNKED + b"2\r\n{}\n0\r\n\r\n",
        "a chunk's size with two CRs": CHUNKED + b"2\r\r\n{}\r\n0\r\n\r\n",
        "a chunk longer than its size": CHUNKED + b"1\r\n{}\r\n0\r\n\r\n",
        "a chunk shorter than its size": CHUNKED + b"3\r\n{}\r\n0\r\n\r\n",
        "a trailer": CHUNKED + b"2\r\n{}\r\n0\r\nX-A: b\r\n\r\n",
        "a trailer with a length": CHUNKED + b"0\r\nContent-Length: 5\r\n\r\n",
        **{
            "codings %r" % (lines,): request(headers=lines) + b"0\r\n\r\n"
            for lines in (
                ["Transfer-Encoding: chunked, chunked"],
                ["Transfer-Encoding: chunked", "Transfer-Encoding: chunked"],
                ["Transfer-Encoding: gzip"],
                ["Transfer-Encoding: gzip, chunked"],
                ["Transfer-Encoding: identity"],
                ["Transfer-Encoding: chunked;q=1"],
                ["Transfer-Encoding:"],
                ["Transfer-Encoding: xchunked"],
                ["Transfer-Encoding: \x0bchunked"],
                ["Transfer-Encoding: chunked", "Content-Length: 5"],
                ["Transfer-Encoding: chunked", "Content-Length: 0"],
            )
        },
    },
}
ANSWERS = {
    name: (data, *outcome)
    for outcome, requests in OUTCOMES.items()
    for name, data in requests.items()
}


def in_pieces(data):
    """Byte by byte, or, where that is thousands, in pieces of an odd size."""
    step = 1 if len(data) < 2000 else 997
    return [data[i : i + step] for i in range(0, len(data), step)]


@pytest.mark.parametrize("way", ["whole", "byte by byte", "with another behind"])
@pytest.mark.parametrize("name", ANSWERS)
def test_server_http_answers(one, name, way):
    """Each request of OUTCOMES is answered as told there, in whatever pieces it arrives."""
    data, status, body, stays = ANSWERS[name]
    with Wire(one) as wire:
        wire.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in ([data]
                      if way == "whole"
                      else in_pieces(data)
                      if way == "byte by byte"
                      else [data + HEALTH]):
            if not wire.send(piece):
                break
        reply = wire.reply(bodiless=name.startswith("HEAD"))
        assert reply.status == status
        assert body is None or reply.body == body
        if status >= 400 and reply.body:
            assert set(json.loads(reply.body)) <= {"error", "issues"}
        assert reply.headers["content-type"] == "application/json"
        assert reply.headers["cache-control"] == "no-store"
        assert reply.headers["server"] == "session-events"
        assert "access-control-allow-origin" not in reply.headers
        assert ("allow" in reply.headers) == (status == 405)
        assert (reply.headers.get("connection") == "close") == (not stays)
        if stays and way != "with another behind":
            wire.send(HEALTH)
        after = wire.reply()
        assert (after.status, after.body) == (200, OK_BODY) if stays else after is None


def test_server_http_paths_give_the_same_answers(one):
    """The short path and the general one give each body the same answer, apart from the date.

    A query in the target leads to the general path.
    """

    def answer(target, body, chunked=False):
        with Wire(one) as wire:
            wire.send(CHUNKED + chunks(body, 999) if chunked else request(body, target=target))
            reply = wire.reply()
            return reply._replace(headers={**reply.headers, "date": ""})

    bodies = [as_sent(with_field(*case[:2])) for case in GOOD + BAD] + NOT_JSON + NO_EVENT
    bodies += [
        as_sent(EVENT)[:-1] + b', "tool_count": 1}', as_sent(EVENT)[:-1] + b', "a": 1, "a": 1}']
    for body in bodies:
        short = answer("/v1/session-events", body)
        assert short == answer("/v1/session-events?", body)
        assert short == answer("/v1/session-events", body, chunked=True)


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
        one.db, "SELECT count(*) AS n, count(DISTINCT session_id_hash) AS d FROM session_events")[0]
    assert stored["n"] == stored["d"]


def test_server_http_half_closed_client_gets_its_answers(one):
    for count in (1, 40, 100):
        with Wire(one) as wire:
            wire.send(request(BODY) * count)
            wire.sock.shutdown(socket.SHUT_WR)
            assert [wire.reply().status for _ in range(count)] == [202] * count
            assert wire.reply() is None


def test_server_http_refused_client_that_goes_on_sending_reads_why(tmp_path):
    """The refused client reads its answer, which an immediate close would reset.

    The server reads on for LINGER_SECONDS, and not for ever.
    """
    before = constants(server, LINGER_SECONDS=1.0)
    with serving(tmp_path / "events.db", before=before) as running, Wire(running) as wire:
        assert wire.send(request(bytes(2 << 20)))
        assert wire.reply().status == 413
        answered = time.monotonic()
        while wire.send(b"x" * 1000):
            assert not select.select([], [], [], 0.01)[0]
        assert time.monotonic() - answered > 0.5


@quick
def test_server_http_hostile_head_takes_no_time():
    """Many blanks with a fault at their end cost no more than their length.

    A pattern that splits them in every way took 13 s for these.
    """
    started = time.perf_counter()
    for n in range(15):
        with pytest.raises(server.Refused):
            server.parse_head(b"GET / HTTP/1.1\r\nA%d:" % n + b" " * 16000 + b"\0")
    assert time.perf_counter() - started < 5


# -- Framing, without a socket ---------------------------------------------------------------------


def framed(pieces):
    """What the reader makes of the pieces: (first line, body) of each request, or a status."""
    reader, found = server.RequestReader(), []
    try:
        for piece in pieces:
            reader.feed(piece)
            while True:
                request_found = reader.next_request()
                if request_found is None:
                    break
                found.append((request_found.text.partition(b"\r\n")[0], request_found.body))
        found.append(reader.held())
    except server.Refused as refused:
        found.append((reader.request_line(), refused.answer.status))
    return found


POST_LINE, GET_LINE = b"POST /v1/session-events HTTP/1.1", b"GET /healthz HTTP/1.1"
FRAMES = {  # name: (bytes, requests found and what is held, or refused, at their end)
    "nothing": (b"", [0]),
    "an empty line": (b"\r\n", [2]),
    "half a head": (request(b"{}")[:30], [30]),
    "a head": (request(b"{}")[:-2], [len(request(b"{}")) - 6]),
    "length": (request(b"{}"), [(POST_LINE, b"{}"), 0]),
    "no body": (HEALTH, [(GET_LINE, b""), 0]),
    "three": (
        HEALTH + request(b"{}") + HEALTH,
        [(GET_LINE, b""), (POST_LINE, b"{}"), (GET_LINE, b""), 0],
    ),
    "empty lines between": (b"\r\n" + HEALTH + b"\r\n" + HEALTH, [(GET_LINE, b"")] * 2 + [0]),
    "two empty lines": (b"\r\n\r\n" + HEALTH, [(b"", 400)]),
    "chunks": (CHUNKED + chunks(b"0123456789" * 9, 16), [(POST_LINE, b"0123456789" * 9), 0]),
    "large and small digits": (
        CHUNKED + b"00A\r\n0123456789\r\n0a\r\n0123456789\r\n0000\r\n\r\n",
        [(POST_LINE, b"0123456789" * 2), 0],
    ),
    "a chunk that looks like the end": (
        CHUNKED + b"5\r\n0\r\n\r\n\r\n0\r\n\r\n",
        [(POST_LINE, b"0\r\n\r\n"), 0],
    ),
    "a request inside a chunk": (
        CHUNKED + chunks(HEALTH, 1000) + HEALTH,
        [(POST_LINE, HEALTH), (GET_LINE, b""), 0],
    ),
    "a request behind chunks": (
        (CHUNKED + chunks(b"{}", 1) + request(b"[]")) * 2,
        [(POST_LINE, b"{}"), (POST_LINE, b"[]")] * 2 + [0],
    ),
    "half a chunk": (CHUNKED + b"3\r\n{}", [len(CHUNKED) - 4 + 5]),
    "no last chunk": (CHUNKED + b"2\r\n{}\r\n", [len(CHUNKED) - 4 + 2]),
    "no end of the last chunk": (CHUNKED + b"2\r\n{}\r\n0\r\n", [len(CHUNKED) - 4 + 5]),
    "a good one, then a bad one": (HEALTH + b"\0\r\n\r\n", [(GET_LINE, b""), (b"\0", 400)]),
    "a refusal behind a memo": (
        request(b"{}") * 2 + CHUNKED + b"x",
        [(POST_LINE, b"{}")] * 2 + [(POST_LINE, 400)],
    ),
}


@quick
@pytest.mark.parametrize("name", FRAMES)
def test_server_framing_does_not_depend_on_how_bytes_arrive(name):
    """A request arrives whole, byte by byte, cut at every place, or with the next one's start."""
    data, expected = FRAMES[name]
    assert framed([data]) == framed([data[i : i + 1] for i in range(len(data))]) == expected
    for cut in range(len(data)):
        assert framed([data[:cut], data[cut:]]) == expected
    if expected[-1] == 0:
        assert framed([data + b"POST"]) == [*expected[:-1], 4]


def test_server_framing_of_mutated_chunks_is_the_same_however_they_arrive():
    """Seeded mutants give the same requests or refusal in any pieces. Only strict chunks pass."""

    def outcome(pieces):
        *found, last = framed(pieces)
        return [*found, last if isinstance(last, int) else ("refused", last[1])]

    rng, outcomes = random.Random(11), collections.Counter()
    strict = re.compile(rb"((?:0*[1-9a-fA-F][0-9a-fA-F]*\r\n.*\r\n)*?)0+\r\n\r\n", re.DOTALL)
    for _ in range(1200):
        tail = bytearray(chunks(bytes(rng.randrange(256) for _ in range(30)), rng.randrange(1, 31)))
        for _ in range(rng.choice((0, 1, 1, 2))):
            at = rng.randrange(len(tail))
            how = rng.randrange(3)
            if how == 0:
                tail[at] = rng.choice(b"\r\n0129afAF;= x\0")
            elif how == 1:
                del tail[at : at + rng.randrange(1, 4)]
            else:
                tail[at:at] = rng.choice((b"\r\n", b"\n", b"0", b";", b" ", b"1\r\nx\r\n", b"\r"))
        data = CHUNKED + bytes(tail) + HEALTH
        whole = outcome([data])
        cuts = sorted(rng.sample(range(len(data)), 4))
        assert whole == outcome([data[i : i + 1] for i in range(len(data))])
        assert whole == outcome([data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)])])
        outcomes[type(whole[-1]).__name__, len(whole)] += 1
        if len(whole) == 3 and whole[-1] == 0:
            assert strict.match(bytes(tail)) and whole[1] == (GET_LINE, b"")
    assert outcomes["int", 3] > 120 and outcomes["tuple", 1] > 120, outcomes


@quick
def test_server_framing_holds_no_more_than_a_request():
    """A chunk of one byte with a long size takes 21 bytes on the wire, and one in memory."""
    reader = server.RequestReader()
    reader.feed(CHUNKED)
    for _ in range(64):
        reader.feed(b"0000000000000001\r\nx\r\n" * 1024)
        assert reader.next_request() is None and reader.held() <= 66 * 1024
    reader.feed(b"1\r\n")
    with pytest.raises(server.Refused) as refused:
        reader.next_request()
    assert refused.value.answer.status == 413
    for length in (server.MAX_HEAD - 1, server.MAX_HEAD, server.MAX_HEAD + 1):
        text = b"GET /" + b"a" * (length - 28) + b" HTTP/1.1\r\nHost: locals"
        assert len(text) == length
        assert (framed([text + b"\r\n\r\n"])[0][1] == 431) == (length > server.MAX_HEAD)


# -- Connections, turn by turn ---------------------------------------------------------------------


@contextlib.contextmanager
def turning(address=("127.0.0.1", 0), limits=server.DEFAULTS, **options):
    """A server in this process that turns only when the test says so."""
    with contextlib.closing(server.Store(":memory:")) as store:
        turned = server.IngestServer(address, store, limits, **options)
        try:
            yield turned
        finally:
            for connection in turned.connections.all():
                connection.close()
            turned.server_close()


@quick
def test_server_fault_in_a_connection_ends_only_that_one(monkeypatch):
    """Also in its first step, before anything watches its socket."""
    monkeypatch.setattr(server.ERRORS, "write", lambda text: None)
    read_requests = server.Connection.read_requests
    for broken in ("start", "later"):
        with turning() as turned, socket.create_connection(turned.server_address) as kept:
            turned.turn(1.0)
            (well,) = turned.connections.all()

            def read(connection, well=well):
                if connection is not well:
                    raise ZeroDivisionError
                read_requests(connection)

            with socket.create_connection(turned.server_address) as bad:
                if broken == "later":
                    turned.turn(1.0)
                monkeypatch.setattr(server.Connection, "read_requests", read)
                bad.sendall(HEALTH)
                turned.turn(1.0)
                assert turned.connections.all() == [well]
                with contextlib.suppress(ConnectionResetError):
                    assert bad.recv(1) == b""
            kept.sendall(HEALTH)
            turned.turn(1.0)
            assert kept.recv(12) == b"HTTP/1.1 200"
            monkeypatch.undo()
            monkeypatch.setattr(server.ERRORS, "write", lambda text: None)


def check_rules(turned):
    """The rules above the table of phases, between two turns."""
    crowd, listed = turned.connections, collections.Counter()
    for phase, members in crowd.waiting.items():
        assert [c.since for c in members] == sorted(c.since for c in members)
        for c in members:
            listed[c] += 1
            assert c.phase == phase
            assert not c.answers and not c.queued
            assert bool(c.unsent) == (phase == server.WRITING)
            assert c not in crowd.backlog or phase in (
                server.HANDSHAKE, server.IDLE, server.READING)
            assert c.held == c.reader.held() + len(c.unsent)
            assert phase != server.LINGERING or (c.closing and not c.held)
            assert c.mask or c in crowd.backlog
            assert phase != server.IDLE or not c.held or c in crowd.backlog
    assert set(listed.values()) <= {1} and set(crowd.backlog) <= set(listed)
    assert crowd.held == sum(c.held for c in listed) and not crowd.answering


@quick
def test_server_answers_a_new_connection_like_a_watched_one(monkeypatch):
    """One client has sent when it is accepted, one a turn later, one when it is watched.

    Only the last is ever watched. All get the same answer.
    """
    monkeypatch.setattr(server, "READING_SECONDS", 60.0)
    sends = [request(as_sent(event(n)), headers=["Connection: close"]) for n in range(3)]
    with turning() as turned, contextlib.ExitStack() as stack:
        at_once, later, last = clients = [
            stack.enter_context(socket.create_connection(turned.server_address, timeout=30))
            for _ in sends
        ]
        register, watched = turned.selector.register, []
        monkeypatch.setattr(turned.selector, "register", lambda sock, mask, data: (
            watched.append(sock.getpeername()), register(sock, mask, data)))
        for stored, client, backlog in ((1, at_once, 2), (2, later, 0), (3, last, 0)):
            client.sendall(sends[stored - 1])
            turned.turn(10)
            check_rules(turned)
            assert turned.metrics.rows.sum == stored
            assert len(turned.connections.backlog) == backlog
        assert watched == [last.getsockname()]
        assert not turned.connections
        replies = [client.makefile("rb").read() for client in clients]
    assert all(reply.startswith(b"HTTP/1.1 202 ") for reply in replies)
    assert len({re.sub(rb"Date: [^\r]+", b"", reply) for reply in replies}) == 1


@quick
def test_server_takes_32_requests_of_one_connection_in_a_turn(monkeypatch):
    most = server.REQUESTS_A_TURN
    monkeypatch.setattr(server, "READING_SECONDS", 60.0)  # a loaded machine may need over 0.02 s
    with turning() as turned, socket.create_connection(turned.server_address) as sock:
        sock.sendall(request(method="GET", target="/healthz") * (2 * most + 1))
        answers = turned.metrics.answers
        until(lambda: turned.turn(0.01) or answers[200])
        turned.turn(0.01)
        assert answers[200] == 2 * most
        turned.turn(0.01)
        assert answers[200] == 2 * most + 1


@quick
def test_server_connections_keep_the_rules_of_their_table():
    """Seeded clients that send good and bad requests in pieces, stop reading, half-close and go."""
    rng, seen = random.Random(7), set()
    valid = [request(BODY), CHUNKED + chunks(BODY, 99), HEALTH, request(BODY) * 40, b"\0\r\n\r\n"]
    valid += [request(BODY, headers=["Expect: 100-continue"]), request(b"[" * 60000)]
    valid += [COSTLY * 4 + end for end in (b"", b"\0\n")]
    limits = server.Limits(request_seconds=0.05, idle_seconds=0.05, write_seconds=0.05)
    with turning(limits=limits) as turned, pytest.MonkeyPatch.context() as patched:
        move = turned.connections.move

        def recorded(connection, phase):
            seen.add((connection.phase, phase))
            move(connection, phase)

        turned.connections.move = recorded
        # A turn takes 0.7 ms on the server's clock, whatever it takes on a loaded machine.
        clock, moment = argparse.Namespace(**vars(time)), [turned.now]
        clock.monotonic = lambda: moment[0]
        patched.setattr(server, "time", clock)
        turned.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # accepted ones too
        clients = []
        for _ in range(1500):
            if len(clients) < 12:
                sock = socket.create_connection(turned.server_address)
                sock.setblocking(False)
                if rng.random() < 0.3:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
                clients.append([sock, b""])
            client = rng.choice(clients)
            client[1] = (client[1] or mutated(rng, rng.choice(valid))
                         if rng.random() < 0.3
                         else (client[1] or rng.choice(valid) * rng.choice((1, 1, 300))))
            how = rng.random()
            with contextlib.suppress(OSError):
                if how < 0.7:
                    sent = client[0].send(client[1][: rng.choice((1, 50, 70000, 500000))])
                    client[1] = client[1][sent:]
                elif how < 0.9:
                    client[0].recv(rng.choice((10, 1 << 20)))
                elif how < 0.95:
                    client[0].shutdown(socket.SHUT_WR)
                else:
                    client[0].close()
                    clients.remove(client)
            patched.setattr(server, "READING_SECONDS", rng.choice((0.0, 0.02, 0.02)))
            moment[0] += 0.0007
            turned.turn(0)
            check_rules(turned)
        for sock, _ in clients:
            sock.close()
        patched.setattr(server, "READING_SECONDS", 0.02)
        while turned.connections:
            moment[0] += 0.01
            turned.turn(0.01)
            check_rules(turned)
    ways = {(a, b) for a, to in server.NEXT_PHASES.items() for b in to if a != server.HANDSHAKE}
    assert seen <= ways and len(ways - seen) <= 2, ways - seen


@quick
def test_server_connection_that_ended_earlier_in_the_turn_stays_ended():
    """The selector saw a connection ready, and then the backlog's turn ended it.

    Nothing may come of the readiness, whether the turn has time left or not.
    """
    with turning() as turned, socket.create_connection(turned.server_address) as client:
        turned.turn(10)
        [connection] = turned.connections.all()
        for full in (0.0, math.inf):
            turned.reading_until = full
            client.close()
            connection.close()
            for mask in (server.READ, server.WRITE):
                connection.on_ready(mask)
            check_rules(turned)
            assert not turned.connections and not turned.connections.backlog


@quick
def test_server_first_read_of_a_connection_asks_for_the_turns_time():
    """250 clients connect and send a costly body. No turn takes much longer than its 20 ms."""
    body = b'{"a":' + b"[" * 500 + b"1," * 32000 + b"1" + b"]" * 500 + b"}"
    costly = request(body[:65000].rstrip(b",") + b"]" * 500 + b"}")
    with turning() as turned, contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(socket.create_connection(turned.server_address)) for _ in range(250)
        ]
        for client in clients:
            client.setblocking(False)
            client.send(costly)
        longest = total = 0.0
        while turned.metrics.answers[400] < 250:
            started = time.thread_time()
            turned.turn(1)
            spent = time.thread_time() - started
            longest, total = max(longest, spent), total + spent
            check_rules(turned)
    assert total > 4 * longest, (total, longest)
    assert longest < 0.1


def test_server_drains_its_own_listener_and_leaves_an_inherited_one():
    """A client that has connected is served by this process, or by the socket's next owner."""
    for inherits in (False, True):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.settimeout(30)
            handed = listener.dup() if inherits else None
            with turning(inherited=handed) as turned:
                address = turned.server_address
                with socket.create_connection(address) as client:
                    client.sendall(request(BODY, headers=["Connection: close"]))
                    turned.stop(30.0)
                    assert len(turned.connections) == (0 if inherits else 1)
                    turned.serve_forever()
                    assert turned.metrics.answers[202] == (0 if inherits else 1)
                    if inherits:
                        listener.accept()[0].close()  # the next process gets it


@quick
@pytest.mark.parametrize(
    ("host", "shown"), [("127.0.0.1", "127.0.0.1"), ("localhost", "127.0.0.1"), ("::1", "[::1]")]
)
def test_server_listens_and_says_where(host, shown):
    with contextlib.ExitStack() as stack:
        try:
            turned = stack.enter_context(turning((host, 0)))
        except OSError as error:
            assert ":" in host and error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)
            pytest.skip("this machine has no IPv6")
        number = turned.socket.getsockname()[1]
        assert turned.url == "http://%s:%d" % (shown, number)
        # Without it a client with a small answer waits for the acknowledgement of the one before.
        assert turned.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        crowd = [
            stack.enter_context(socket.create_connection((host, number), timeout=30))
            for _ in range(200)
        ]
        assert len(crowd) == 200  # they wait in the system's queue: nobody has accepted one


@needs_linux
def test_server_that_cannot_bind_leaves_no_descriptor():
    with socket.create_server(("127.0.0.1", 0)) as taken, contextlib.closing(
        server.Store(":memory:")
    ) as store:
        before = set(os.listdir("/proc/self/fd"))
        with pytest.raises(OSError) as kept:  # and with it all that the failed server held
            server.IngestServer(taken.getsockname(), store)
        assert set(os.listdir("/proc/self/fd")) == before and kept.value.errno == errno.EADDRINUSE


@needs_linux
def test_server_spins_only_where_another_cpu_is_its_own():
    script = "import os, server; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
    script += "print(server.usable_cpus())"
    assert run([sys.executable, "-c", script], cwd=ROOT).stdout == "1\n"
    assert server.usable_cpus() == len(os.sched_getaffinity(0))
    assert (server.SPIN_SECONDS > 0) == (server.usable_cpus() > 1)


# -- The process -----------------------------------------------------------------------------------

PYTHONS = {version: path for version, path in EMIT_PYTHONS.items() if version >= (3, 8)}


def test_server_alone_in_a_folder(tmp_path):
    """The one file serves on each Python. An event goes in, a row comes out.

    SIGTERM and Ctrl-C end it within 5 s with status 0.
    """

    def serves(python):
        folder = tmp_path / hashlib.sha256(python.encode()).hexdigest()
        folder.mkdir()
        shutil.copy(ROOT / "server.py", folder)
        for n, signum in enumerate((signal.SIGTERM, signal.SIGINT)):
            running = Server(folder / "events.db", argv=[python, str(folder / "server.py")])
            assert post(running, event(n)).status == 202
            started = time.monotonic()
            assert running.stop(signum) == 0 and time.monotonic() - started < 5
            assert running.errors == []
        assert not (folder / "events.db-wal").exists()
        rows = rows_of(folder / "events.db")
        return [(row["tool_count"], row["discovery_refs_json"]) for row in rows]

    expected = [(42, '["auth-jwt-flow","rate-limit-buckets"]')] * 2
    assert dict(zip(PYTHONS, at_once(serves, PYTHONS.values()))) == dict.fromkeys(PYTHONS, expected)


def test_server_ends_while_a_client_is_halfway(tmp_path):
    """A kept connection is closed, a half-sent request is waited for, and the server ends."""
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
    scripted(folder / "newer.db", "PRAGMA user_version = 99")
    scripted(folder / "other.db", "CREATE TABLE session_events (id INTEGER PRIMARY KEY, name TEXT)")
    scripted(folder / "foreign.db", "CREATE TABLE users (name TEXT)")
    scripted(folder / "half.db", OTHER_PROGRAM, "PRAGMA user_version = 1")
    scripted(folder / "twice.db", OTHER_PROGRAM.replace(ITS_UNIQUE_INDEX, ""),
             "INSERT INTO session_events (identity_hash, session_id_hash, ended_at, plugin_version)"
             " VALUES ('i', 's', '', ''), ('i', 's', '', '')")
    for name, old, new in (
        ("tenant", "branch_sha TEXT,", "branch_sha TEXT, tenant TEXT NOT NULL,"),
        ("branch", "branch_sha TEXT,", "branch_sha TEXT NOT NULL DEFAULT '',"),
        ("alone", "session_id_hash TEXT", "session_id_hash TEXT UNIQUE"),
        ("no-id", "id INTEGER PRIMARY KEY AUTOINCREMENT", "id INTEGER"),
    ):
        scripted(folder / (name + ".db"), OTHER_PROGRAM.replace(old, new))
    (folder / "open.pepper").write_text("x" * 64)
    (folder / "open.pepper").chmod(0o644)
    server.make_pepper(str(folder / "other.pepper"))
    server.Store(str(folder / "hidden.db"), pepper=b"p" * 32).close()
    taken = socket.create_server(("127.0.0.1", 0))
    fresh = folder / "fresh.db"
    return taken, {
        "port taken": (["--db", fresh, "--port", taken.getsockname()[1]], "Address already in use"),
        "no such host": (["--db", fresh, "--host", "256.0.0.1"], "cannot listen on 256.0.0.1"),
        "no such folder": (["--db", folder / "missing" / "events.db"], "No such file or directory"),
        "a folder": (["--db", folder], "is no file"),
        "no name": (["--db", ""], "is no file"),
        "no host's name": (["--db", fresh, "--host", "\u00e9..x"], "no host name"),
        "metrics port taken": (
            ["--db", fresh, "--metrics", "127.0.0.1:%d" % taken.getsockname()[1]], "(--metrics)"),
        "another program's tables": (["--db", folder / "foreign.db"], "another program's database"),
        "not writable": (["--db", "/proc/events.db"], "cannot use /proc/events.db"),
        "not a database": (["--db", folder / "text.db"], "not a database"),
        "newer schema": (["--db", folder / "newer.db"], "schema version 99"),
        "other table": (["--db", folder / "other.db"], "not this program's"),
        "a column to fill": (["--db", folder / "tenant.db"], 'column "tenant" is NOT NULL'),
        "a column that is never null": (["--db", folder / "branch.db"], 'column "branch_sha" is'),
        "one more unique index": (["--db", folder / "alone.db"], 'index on ("session_id_hash")'),
        "no key": (["--db", folder / "no-id.db"], "id is not INTEGER PRIMARY KEY"),
        "half a schema": (["--db", folder / "half.db"], "idx_session_events_ended_at is missing"),
        "the same event twice": (["--db", folder / "twice.db"], "delete all but one of each"),
        "another pepper": (
            ["--db", folder / "hidden.db", "--pepper-file", folder / "other.pepper"],
            "made with another pepper"),
        "no pepper any more": (["--db", folder / "hidden.db"], "made with a pepper"),
        "its pepper is gone": (
            ["--db", folder / "hidden.db", "--pepper-file", folder / "gone.pepper"],
            "made with a pepper: put that back"),
        "readable pepper": (["--db", fresh, "--pepper-file", folder / "open.pepper"], "chmod 600"),
        "no certificate": (
            ["--db", fresh, "--tls-cert", folder / "no", "--tls-key", folder / "no"], "TLS files"),
    }


def test_server_that_cannot_start_says_why_in_one_line(tmp_path):
    def start(flags):
        return recorded_texts(ended("server", "--port", 0, *flags))

    taken, cases = start_faults(tmp_path)
    kept = {name: (tmp_path / name).read_bytes() for name in ("other.db", "foreign.db")}
    twice = rows_of(tmp_path / "twice.db", "SELECT * FROM sqlite_master")
    with taken:
        starts = at_once(start, [flags for flags, _words in cases.values()])
    for (name, (_flags, words)), done in zip(cases.items(), starts):
        assert (done.returncode, done.stdout) == (2, ""), name
        lines = done.stderr.splitlines()
        if name == "the same event twice":  # it began to bring the file up to date
            assert json.loads(lines.pop(0))["event"] == "updating_database"
        assert len(lines) == 1 and lines[0].startswith("server.py: ") and words in lines[0], name
    assert {name: (tmp_path / name).read_bytes() for name in kept} == kept, "it is left as it was"
    assert not (tmp_path / "gone.pepper").exists()
    assert rows_of(tmp_path / "twice.db", "SELECT * FROM sqlite_master") == twice
    wrong = (
        ["--port", "70000"],
        ["--rate", "5/week"],
        ["--rate", "9" * 400 + "/s"],
        ["--retain-days", "0"],
        ["--retain-days", "9" * 19],
        ["--max-db-bytes", "99999"],
        ["--host", ""],
        ["--port", "1_0"],
        ["--pepper-file", ""],
        ["--tls-cert", "", "--tls-key", ""],
        ["--trusted-proxy", "10.0.0.0/99"],
    )
    for done in at_once(start, [[], *(["--db", tmp_path / "x.db", *flags] for flags in wrong)]):
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert "server.py: error: " in done.stderr


@needs_linux
def test_server_goes_on_where_nobody_takes_its_first_line(tmp_path):
    """Standard output is a full disk, a pipe that nobody reads, or closed. It serves all the same.

    The port is that of a socket that was open before, since nothing can say it.
    """
    for redirection in (">/dev/full", "| true", ">&-"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            where = argparse.Namespace(host="127.0.0.1", port=free.getsockname()[1])
        argv = program("server", "--db", tmp_path / "events.db", "--port", where.port)
        shell = "%s %s" % (" ".join(map(shlex.quote, argv)), redirection)
        process = subprocess.Popen(
            ["bash", "-c", shell], stderr=subprocess.PIPE, start_new_session=True)
        until(lambda where=where: accepts(where))
        assert post(where, event(redirection)).status == 202
        os.killpg(process.pid, signal.SIGINT)
        assert process.communicate(timeout=60)[1] == b""
    assert len(rows_of(tmp_path / "events.db")) == 3


def accepts(where):
    try:
        socket.create_connection((where.host, where.port), 5).close()
    except OSError:
        return False
    return True


def test_server_that_may_only_read_its_database_does_not_start(tmp_path):
    db = tmp_path / "events.db"
    server.Store(str(db)).close()
    db.chmod(0o444)
    if os.geteuid() == 0:  # whom no mode keeps out
        with contextlib.closing(sqlite3.connect(str(db))) as connection:
            connection.execute("PRAGMA query_only = 1")
            with pytest.MonkeyPatch.context() as patched, pytest.raises(server.StartError) as said:
                patched.setattr(server.Store, "connect", lambda self: connection)
                server.Store(str(db))
    else:
        with pytest.raises(server.StartError) as said:
            server.Store(str(db))
    assert "readonly" in str(said.value)


def test_server_running_for_fixtures(tmp_path):
    """Several servers run in one process, in memory and on disk. Rows come back as Python data."""
    with contextlib.ExitStack() as stack:
        started = time.monotonic()
        several = [stack.enter_context(server.running()) for _ in range(5)]
        assert time.monotonic() - started < 5
        on_disk = stack.enter_context(server.running(str(tmp_path / "events.db")))
        for n, running in enumerate([*several, on_disk]):
            for m in range(n):
                with urllib.request.urlopen(
                        running.url, as_sent(event((n, m), tool_count=m)), timeout=30) as reply:
                    assert (reply.status, reply.read()) == (202, OK_BODY)
        for n, running in enumerate([*several, on_disk]):
            stored = running.events()
            assert [row["tool_count"] for row in stored] == list(range(n))
            assert all(
                row["discovery_refs"] == EVENT["discovery_refs"] and row["id"] for row in stored)
        on_disk.stop()
        on_disk.stop()
        with pytest.raises(RuntimeError):
            on_disk.events()
    assert len(rows_of(tmp_path / "events.db")) == 5


def test_server_running_says_what_it_cannot_read(tmp_path):
    """Whoever asks for events gets rows or an exception, also beside stop() and of odd rows."""
    scripted(tmp_path / "other.db", OTHER_PROGRAM)
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

# A checkpoint after every few rows.
OFTEN = constants(server, CHECKPOINT_PAGES=100, FEW_PAGES=5)


class Load(threading.Thread):
    """A client that sends new events until told to stop. It keeps the hashes answered 202."""

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
                    request(as_sent(value, separators=(",", ":")), headers=self.headers))
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


def quantile(seconds, part):
    return sorted(seconds)[int(len(seconds) * part)]


# p90 is compared: on a loaded machine the slowest of a hundred answers tell nothing. p99 is printed
# for the figures of README, which come from a quiet machine.
p90, p99 = (functools.partial(quantile, part=part) for part in (0.9, 0.99))


@pytest.mark.parametrize(
    ("lives", "often"), [(12, False), (6, True)], ids=["usual", "in checkpoints"])
def test_server_sigkill_loses_nothing_that_was_accepted(tmp_path, lives, often):
    """After a kill under load every 202 is a row, the file is whole and the next start quick."""
    db, rng, accepted, starts = tmp_path / "events.db", random.Random(50), set(), []
    for life in range(lives):
        started = time.monotonic()
        running = Server(db, before=OFTEN * often)
        starts.append(time.monotonic() - started)
        clients = [Load((life, n), running) for n in range(3)]
        for client in clients:
            client.start()
        until(lambda sent=clients: sum(len(client.accepted) for client in sent) > 8)
        clients[0].ending.wait(rng.uniform(0.0, 0.1))  # the moment is what is random here
        running.stop(signal.SIGTERM if often and life % 3 == 0 else signal.SIGKILL)
        for client in clients:
            client.stop()
            accepted.update(client.accepted)
    stored = {row["session_id_hash"] for row in rows_of(db)}
    assert len(accepted) > 8 * lives and accepted <= stored
    assert rows_of(db, "PRAGMA integrity_check") == [{"integrity_check": "ok"}]
    assert sum(len(json.loads(row["discovery_refs_json"])) for row in rows_of(db)) == len(edges(db))
    assert sorted(starts)[lives // 2] < 5


def test_server_restart_by_socket_activation_fails_no_request(tmp_path):
    """By systemd's protocol the listening socket outlives three servers, all under load."""
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
            running = Server(db, "--port", 1, wrapper=["bash", "-c", script, "-"], env=env,
                             pass_fds=[listener.fileno()])
            assert notices.recv(100) == b"READY=1"
            return running

        running = start()
        assert running.port == listener.getsockname()[1]
        assert listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
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


def test_server_feeds_the_watchdog_as_long_as_its_loop_turns(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notices:
        notices.bind(str(tmp_path / "notify"))
        notices.settimeout(30)
        env = dict(os.environ, NOTIFY_SOCKET=str(tmp_path / "notify"), WATCHDOG_USEC="200000")
        env.pop("WATCHDOG_PID", None)
        started = time.monotonic()
        with serving(tmp_path / "events.db", env=env) as running:
            assert notices.recv(100) == b"READY=1"
            assert [notices.recv(100) for _ in range(3)] == [b"WATCHDOG=1"] * 3
            fed = 3
            with Wire(running) as wire:
                for _ in range(60):  # as many turns
                    wire.send(HEALTH)
                    assert wire.reply().status == 200
                    while select.select([notices], [], [], 0)[0]:
                        fed += notices.recv(100) == b"WATCHDOG=1"
            assert fed <= 1 + (time.monotonic() - started) / 0.1  # by the time, not by the turns
            running.process.send_signal(signal.SIGSTOP)
            notices.settimeout(0.3)
            with pytest.raises(socket.timeout):
                while notices.recv(100):  # one may have been under way
                    pass
            running.process.send_signal(signal.SIGCONT)
            notices.settimeout(30)
            assert notices.recv(100) == b"WATCHDOG=1"
        env["WATCHDOG_PID"] = "1"  # another's
        with serving(tmp_path / "events.db", env=env) as running:
            while notices.recv(100) != b"READY=1":
                pass
            notices.settimeout(0.3)
            with pytest.raises(socket.timeout):
                notices.recv(100)


# -- Limits ----------------------------------------------------------------------------------------


def test_server_slow_clients_are_ended_and_others_are_not(tmp_path):
    """A request that dribbles gets 408. An idle connection is closed without a word.

    A connection that takes no answers is closed, too.
    """
    flags = ("--request-seconds", 0.7, "--idle-seconds", 1, "--write-seconds", 0.3)
    with serving(tmp_path / "events.db", *flags) as running:
        with Wire(running) as dribbling, Wire(running) as idle, Wire(running) as deaf:
            started = time.monotonic()
            idle.send(HEALTH)
            assert idle.reply().status == 200
            deaf.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.sock.settimeout(0.2)
            with contextlib.suppress(OSError):
                for _ in range(2500):  # until the server reads no more
                    deaf.sock.sendall(COSTLY)
            for byte in HEALTH[:-1]:
                if (
                    not dribbling.send(bytes([byte]))
                    or select.select([dribbling.sock], [], [], 0.1)[0]
                ):
                    break
            assert dribbling.reply().status == 408 and dribbling.reply() is None
            assert time.monotonic() - started >= 0.7
            assert idle.reply() is None and time.monotonic() - started >= 1
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
        time.sleep(1.1)  # over the deadlines, of which the first began before
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
        time.sleep(0.5)  # in this time a server that spins would show
        assert cpu_seconds(pid) - used < 0.25 and len(running.errors) < 20
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
    resource.setrlimit(resource.RLIMIT_NOFILE,
                       (min(8192, resource.getrlimit(resource.RLIMIT_NOFILE)[1]),
                        resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    with serving(
        tmp_path / "events.db", "--max-connections", 4400
    ) as running, contextlib.ExitStack() as stack:
        alone = loaded(running, "alone", 400).seconds
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
        beside = loaded(running, "beside", 400).seconds
        stopped.set()
        dribbler.join()
        peak = peak_megabytes(running.process.pid)
        print("p99 alone %.2f ms, beside the crowd %.2f ms; %d MB"
              % (p99(alone) * 1e3, p99(beside) * 1e3, peak))
        assert p90(beside) < 2 * p90(alone) + 0.02  # 20 ms for what else runs here
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
        assert p90(loaded(running, "modest", 100).seconds) < 2
        with contextlib.ExitStack() as stack:
            deaf = [stack.enter_context(Wire(running)) for _ in range(100)]
            for wire in deaf:
                wire.send(COSTLY * 32)
            assert p90(loaded(running, "beside the deaf", 100).seconds) < 2
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
    """Post events until one is refused, read what the server says, mend it, see it go on."""
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
@pytest.mark.parametrize(("size", "often"), [("1m", False), ("2m", True)])
def test_server_disk_full_file_system(tmp_path, size, often):
    """Every 202 holds, and the fault is logged once, also where only the log can still grow."""
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=" + size, "tmpfs") as disk:
        with serving(disk / "events.db", before=OFTEN * often) as running:
            more = ["mount", "-o", "remount,size=64m", disk]
            refused_until_it_works(running, lambda: run(more), "disk")


@needs_linux
def test_server_starts_on_a_disk_without_room_for_its_side_files(tmp_path):
    """It answers 503 until there is room, and then goes on by itself."""
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=1m", "tmpfs") as disk:
        server.Store(str(disk / "events.db")).close()
        with open(disk / "ballast", "wb", buffering=0) as ballast, contextlib.suppress(OSError):
            while True:
                ballast.write(bytes(4096))
        port = free_port()
        with serving(disk / "events.db", "--metrics", "127.0.0.1:%d" % port) as running:
            assert running.says("store_unavailable")
            assert ready(running) == 503
            for n in range(5):
                assert post(running, event(n)).status == 503
            assert metrics_at(port)
            (disk / "ballast").unlink()
            until(lambda: post(running, event(1)).status == 202)
            assert ready(running) == 200
            assert running.stop() == 0
            assert [json.loads(line)["event"] for line in running.errors] == [
                "store_unavailable", "store_available"]
        assert len(rows_of(disk / "events.db")) == 1


@needs_linux
def test_server_file_system_turned_read_only(tmp_path):
    """A real ext4 is told that its disk had an error, and turns read-only."""
    image = tmp_path / "image"
    image.write_bytes(bytes(16 << 20))
    if not shutil.which("mkfs.ext4") or run(["mkfs.ext4", "-q", image]).returncode:
        pytest.skip("mkfs.ext4 makes the file system")
    with mounted(tmp_path / "disk", "-o", "loop,errors=remount-ro", image) as disk, serving(
        disk / "events.db"
    ) as running:
        device = os.path.realpath(
            "/sys/dev/block/%d:%d" % (os.major(disk.stat().st_dev), os.minor(disk.stat().st_dev)))
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
        statuses = [
            post(running, event(n, discovery_refs=["r" * 100] * 100)).status for n in range(40)]
        assert statuses[0] == 202 and statuses[-1] == 503 and sorted(statuses) == statuses
        remembered = time.monotonic() + 1.2  # s; the last write's result counts for one
        while time.monotonic() < remembered:
            assert ready(running) == 503
            time.sleep(0.1)
        scripted(running.db, "DELETE FROM session_events WHERE id > 1 AND id % 2")
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
    scripted(
        db, "UPDATE session_events SET received_at = '2020-01-01T00:00:00Z', ended_at = '2019'",
        "UPDATE session_events SET received_at = strftime('%Y-%m-%dT%H:%M:%SZ', 'now')"
        " WHERE id = (SELECT max(id) FROM session_events)")
    with contextlib.closing(server.Store(str(db), 200_000, retain_days=1)) as store:
        rows = [server.check_event(event("new", discovery_refs=["r" * 100] * 100))]
        started = time.monotonic()
        with pytest.raises(server.Unavailable):
            store.write(rows)
        assert store.sweep.next_at > started  # a store at its limit is not asked in each turn
        store.sweep.look_at_clocks()
        assert store.write(rows, 2).stored == 1


def test_server_sweep_makes_room_at_the_size_limit_under_load(tmp_path):
    """Turns whose rows do not fit follow one another. Rows fit again when old ones are gone."""
    db = tmp_path / "events.db"
    old_and_new(db, (600, "-40 days"), (1, "-1 hour"))
    limit = db.stat().st_size + 40_000  # bytes
    with contextlib.closing(server.Store(str(db), limit, retain_days=30)) as store:
        with turning() as turned:
            turned.store, accepted = store, 0

            def turn(*rows):
                turned.now = time.monotonic()
                turned.rows = [server.check_event(event((turned.now, n))) for n in rows]
                return {answer.status for answer in turned.commit()}

            def fill():
                count = 0
                while turn(*range(20)) == {202}:
                    turned.answered_at, count = turned.now, count + 20
                return count

            accepted += fill()
            store.sweep.retention.steady_since -= 60  # the clock is believed from now on
            end = time.monotonic() + 10
            while turn(*range(20)) == {503} and time.monotonic() < end:
                turned.answered_at = turned.now
                time.sleep(0.02)
            accepted += 20 + fill()
            assert accepted > 400 and store.max_bytes >= db.stat().st_size
            assert store.sweep.next_at > turned.now + 10  # no old row is left
            left = 601 + accepted - turned.metrics.swept
            assert rows_of(db, "SELECT count(*) AS n FROM session_events") == [{"n": left}]
            # A look that finds no old row does not show that rows fit again.
            store.sweep.next_at, turned.answered_at = 0.0, turned.now - 1
            assert turn() == set() and store.sweep.next_at and turned.store_fault
            turned.now += 2
            assert not turned.store_is_ready()


def test_server_lock_held_by_another_process(tmp_path):
    """Each turn meanwhile is answered 503 after 250 ms. Then the server goes on."""
    with serving(tmp_path / "events.db") as running:
        assert post(running, event(0)).status == 202
        hold = ("import sqlite3, sys; db = sqlite3.connect(sys.argv[1], isolation_level=None);"
                "db.execute('BEGIN IMMEDIATE'); print('held', flush=True); sys.stdin.read()")
        other = subprocess.Popen([sys.executable, "-I", "-S", "-c", hold, str(running.db)],
                                 stdin=subprocess.PIPE, stdout=subprocess.PIPE)
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
    """The other rows of its turn are stored. The log has six digits of the identity, no more."""
    db = tmp_path / "events.db"
    rows = [event(n, identity_hash=hashlib.sha256(b"who %d" % n).hexdigest()) for n in range(5)]
    SECRETS.update(row["identity_hash"] for row in rows)
    port = free_port()
    with serving(db, "--metrics", "127.0.0.1:%d" % port) as running:
        trigger = "CREATE TRIGGER other BEFORE INSERT ON session_events"
        trigger += " WHEN NEW.identity_hash = '%s' BEGIN SELECT RAISE(%s); END"
        scripted(db, trigger % (rows[2]["identity_hash"], words))
        with Wire(running) as wire:
            wire.send(b"".join(request(as_sent(row)) for row in rows))
            replies = [wire.reply() for _ in rows]
        assert [reply.status for reply in replies] == [202, 202, 500, 202, 202]
        assert replies[2].body == b'{"error":"Insert failed"}'
        counted = metrics_at(port)["session_events_events_total"]
        assert counted == {'result="already_there"': 0, 'result="stored"': 4}
        running.stop()
        assert len(rows_of(db)) == 4
        logged = [json.loads(line) for line in running.errors]
        assert [entry["identity"] for entry in logged] == [rows[2]["identity_hash"][:6]]
        assert logged[0]["reason"] == "IntegrityError"


@pytest.mark.parametrize("how", ["deleted", "replaced", "emptied", "log deleted"])
def test_server_file_taken_away_from_under_it(tmp_path, how):
    """The server answers 503 and says why. It gives no 202 for what goes into a deleted file.

    It goes on when the file is put back.
    """
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


@quick
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


@quick
def test_server_rate_limit_is_a_token_bucket():
    limit = server.RateLimit(server.Rate(10, 60.0))
    one, other = (limit.bucket(ipaddress.ip_address(a)) for a in ("192.0.2.1", "192.0.2.2"))
    assert [limit.take_token(one, 100.0) for _ in range(10)] == [0.0] * 10
    assert limit.take_token(one, 100.0) == pytest.approx(6.0)
    assert limit.take_token(one, 103.0) == pytest.approx(3.0)
    assert limit.take_token(other, 103.0) == 0.0
    assert limit.take_token(one, 106.0) == 0.0 and limit.take_token(one, 106.0) > 0
    assert [limit.take_token(one, 1000.0) for _ in range(11)].count(0.0) == 10
    same = {
        limit.bucket(ipaddress.ip_address(a)) for a in ("2001:db8:1:2::1", "2001:db8:1:2:ffff::")}
    assert len(same) == 1 and limit.bucket(ipaddress.ip_address("2001:db8:1:3::1")) not in same
    assert (limit.bucket(ipaddress.ip_address("127.8.8.8"))
            is limit.bucket(ipaddress.ip_address("::1"))
            is None)
    many = server.RateLimit(server.Rate(600, 60.0))
    for now in (0.1, 12345.678, 1e6 / 3):  # all at once, whatever the floats make of it
        assert [many.take_token(b"%r" % now, now) for _ in range(600)] == [0.0] * 600
        assert many.take_token(b"%r" % now, now) > 0
    rng = random.Random(6)
    for per_hour, seconds in (
        (5, 720),
        (60, 60),
        (7, None),
    ):  # Retry-After is the least that is enough
        hourly = server.RateLimit(server.Rate(per_hour, 3600.0))
        for now in [rng.uniform(0, 1e7) for _ in range(300)]:
            name = b"%r" % now
            assert [hourly.take_token(name, now) for _ in range(per_hour)] == [0.0] * per_hour
            after = hourly.whole_seconds(hourly.take_token(name, now))
            assert seconds in (None, after)
            assert hourly.take_token(name, now + after - 1) > 0
            assert hourly.take_token(name, now + after) == 0.0
    limit.give_back(b"unknown")
    before = limit.take_token(b"back", 1000.0)
    limit.give_back(b"back")
    assert before == 0 and [limit.take_token(b"back", 1000.0) for _ in range(11)].count(0.0) == 10
    for n in range(server.MAX_BUCKETS + 10):
        limit.take_token(b"%d" % n, 1000.0)
    assert len(limit.full_at) == server.MAX_BUCKETS
    assert server.RateLimit(server.Rate(1, 1.0)).bucket(ipaddress.ip_address("192.0.2.1")) != one


def test_server_rate_limit_answers_429_with_retry_after(tmp_path):
    flags = ["--rate", "5/h", "--trusted-proxy", "127.0.0.0/8"]
    with serving(tmp_path / "events.db", *flags) as running, Wire(running) as wire:

        def statuses(client, count):
            for n in range(count):
                wire.send(request(as_sent(event((client, n))),
                                  headers=["X-Forwarded-For: 203.0.113.1, " + client]))
            return [wire.reply() for _ in range(count)]

        replies = statuses("198.51.100.7", 8)
        assert [reply.status for reply in replies] == [202] * 5 + [429] * 3
        assert 700 < int(replies[-1].headers["retry-after"]) <= 720
        assert [reply.status for reply in statuses("198.51.100.8", 5)] == [202] * 5
        assert post(running, event("loopback")).status == 202
    with serving(
        tmp_path / "events.db", "--rate", "1/h"
    ) as running:  # nobody is trusted: the header is just text
        for n in range(5):
            assert post(running, event(n), headers=["X-Forwarded-For: 198.51.100.7"]).status == 202
    SECRETS.update(("198.51.100.7", "198.51.100.8", "203.0.113.1"))


def test_server_start_waits_for_a_lock_of_another_process(tmp_path):
    class Patient(server.Store):
        tries = 0

        def open(self):
            self.tries += 1
            if self.tries == 2:
                other.execute("ROLLBACK")
            super().open()

    class Hasty(server.Store):
        START_LOCK_SECONDS = 0

    db = str(tmp_path / "events.db")
    with contextlib.closing(sqlite3.connect(db, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")  # as while another server makes the tables
        with pytest.raises(server.StartError, match="database is locked"):
            Hasty(db)
        store = Patient(db)
        assert store.tries == 2
        store.close()


def test_server_pepper_that_cannot_be_noted_is_one_line(tmp_path):
    db = tmp_path / "events.db"
    server.Store(str(db)).close()
    with contextlib.closing(sqlite3.connect(str(db), isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        done = recorded_texts(
            ended("server", "--port", 0, "--db", db, "--pepper-file", tmp_path / "new"))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "database is locked" in done.stderr
    with serving(db, "--pepper-file", tmp_path / "new") as running:
        assert post(running, event("noted")).status == 202


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
    """A line has the route, also of a refused request, if it is one that the server knows."""
    bad_host = request(BODY, headers=["Host: again"])
    cases = [  # (bytes, route, status)
        (request(as_sent(event("log"))), "POST /v1/session-events", 202),
        (CHUNKED + chunks(BODY, 9), "POST /v1/session-events", 202),
        (request(method="GET", target="/healthz"), "GET /healthz", 200),
        (request(method="GET", target="/home/somebody/secret-path"), "-", 404),
        (request(b"nope", target="/v1/session-events?secret-query"), "POST /v1/session-events",
         400),
        (request(BODY, method="PUT"), "PUT /v1/session-events", 405),
        (request(method="SECRET"), "- /v1/session-events", 405),
        (request(), "POST /v1/session-events", 411),
        (request(PADDED + b" "), "POST /v1/session-events", 413),
        (CHUNKED + b"2;\r\n", "POST /v1/session-events", 400),
        (CHUNKED + b"fffff\r\n", "POST /v1/session-events", 413),
        (bad_host, "POST /v1/session-events", 400),
        (request(headers=["X-Long: " + "x" * 17000]), "POST /v1/session-events", 431),
        (b"GET /home/secret-path\r\n\r\n", "-", 400),
        (request(BODY)[:60], "POST /v1/session-events", 408),
        (request(BODY)[:-1], "POST /v1/session-events", 408),
        (CHUNKED + chunks(BODY, 9)[:-3], "POST /v1/session-events", 408),
        (b"POST /v1/sess", "-", 408),
    ]
    flags = "--access-log", "--request-seconds", 0.3
    with serving(tmp_path / "events.db", *flags) as running:
        with contextlib.ExitStack() as stack:
            wires = [stack.enter_context(Wire(running)) for _ in cases]
            for wire, (data, _, _) in zip(wires, cases):
                wire.send(data)
            assert [wire.reply().status for wire in wires] == [status for _, _, status in cases]
        running.stop()
        logged = [json.loads(line) for line in running.output]
    said = sorted((entry["route"], entry["status"]) for entry in logged)
    assert said == sorted(case[1:] for case in cases)
    assert all(set(entry) == {"time", "route", "status"} for entry in logged)
    SECRETS.update(("secret-path", "secret-query", "SECRET"))


@needs_linux
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_server_log_whose_reader_stopped_costs_lines_and_no_answers(tmp_path, stream):
    """With a full pipe everything is answered. The count of lost lines is logged afterwards."""
    before = constants(server, LOG_SECONDS=0.0)
    if stream == "stderr":  # a store whose fault is another one each time, and a line for each
        before += (
            "import itertools\nserial = itertools.count()\n"
            "def write(*_): raise server.Unavailable('fault %d' % next(serial) + ' ' * 300)\n"
            "server.Store.write = write")
    argv = program("server", "--db", tmp_path / "events.db", "--port", "0", before=before)
    argv += ["--access-log"] * (stream == "stdout")
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    address = process.stdout.readline().decode().rpartition("//")[2].split(":")
    pipe = getattr(process, stream)
    where = argparse.Namespace(host=address[0], port=int(address[1]))
    fcntl.fcntl(pipe, getattr(fcntl, "F_SETPIPE_SZ", 1031), 4096)
    for n in range(200):
        assert post(where, event(n)).status == (202 if stream == "stdout" else 503)
    found = b""
    while b"lines_lost" not in found or not found.endswith(b"\n"):
        assert select.select([pipe], [], [], 30)[0], "it must say so without a further request"
        found += os.read(pipe.fileno(), 65536)
    PRINTED.append(found)
    lines = [json.loads(line) for line in found.decode().splitlines()]
    told = [line["lines"] for line in lines if line.get("event") == "lines_lost"]
    assert len(told) == 1 and told[0] > 100 and told[0] + len(lines) - 1 == 200
    for n in range(100):  # and it stops while nobody reads
        assert post(where, event(n)).status in (202, 503)
    process.terminate()
    assert process.wait(30) == 0
    process.stdout.close()
    process.stderr.close()


@quick
def test_server_store_that_fails_in_changing_ways_is_a_line_a_second():
    """The store's last state is logged too, at the latest when the server ends."""
    said = []
    with turning() as turned, pytest.MonkeyPatch.context() as patched:
        patched.setattr(server.ERRORS, "write", lambda text: said.append(json.loads(text)))
        started = turned.now
        for n in range(1000):
            turned.now = started + n / 100
            turned.note_store("fault %d" % (n // 2) if n % 2 else "")
        assert 9 <= len(said) <= 11 and said[0]["reason"] == "fault 0"
        turned.note_store("")
        turned.stop(0.0)
        turned.serve_forever()
        assert said[-1]["event"] == "store_available" and len(said) <= 12
        del said[:]
        patched.setattr(server, "_rare", {})
        for _ in range(1000):
            turned.guarded(lambda: 1 / 0)
            server.log_refused(("0" * 64,), ValueError())
        assert [line["event"] for line in said] == ["internal_error", "insert_failed"]
        assert said[-1]["identity"] == "000000"
        server.log_left_out(time.monotonic() + server.LOG_SECONDS)
        assert [(line["event"], line["more"]) for line in said[2:]] == [
            ("internal_error", 999), ("insert_failed", 999)]
        for more in (0, 5):  # the end of one server of this process mutes no other one
            server.log_left_out(math.inf)
            patched.setattr(server, "LOG_SECONDS", 0.0)
            server.log_left_out(time.monotonic())
            patched.undo()
            patched.setattr(server.ERRORS, "write", lambda text: said.append(json.loads(text)))
            del said[:]
            for _ in range(more + 1):
                server.log_refused(("0" * 64,), ValueError())
            assert len(said) == 1 and "more" not in said[0]


def referred(roots):
    """All that can be reached from the objects, in whatever container."""
    seen, found = {id(roots)}, list(roots)
    while found:
        thing = found.pop()
        if id(thing) not in seen:
            seen.add(id(thing))
            yield thing
            found.extend(gc.get_referents(thing))


def test_server_no_address_survives_its_request():
    """No object holds an address of 250 clients behind a proxy, whose requests took each path."""
    addresses = ["198.18.%d.%d" % divmod(n + 1000, 250) for n in range(250)]
    options = {"limits": server.Limits(rate=server.Rate(600, 60.0))}
    options["trusted"] = [ipaddress.ip_network("127.0.0.0/8")]
    with turning(**options) as turned:
        with socket.create_connection(turned.server_address) as client, client.makefile(
            "rb"
        ) as file:
            for n, address in enumerate(addresses):
                sender = ["X-Forwarded-For: " + address, "X-Real-IP: " + address]
                sender.append("Forwarded: for=" + address)
                data = [request(as_sent(event(n)), headers=sender),
                        request(as_sent(event(n)), headers=sender, target="/v1/session-events?"),
                        request(headers=[*sender, "Transfer-Encoding: chunked"]) + chunks(BODY, 99),
                        request(b"nope", headers=sender)][n % 4]
                client.sendall(data)
                turned.turn(10)
                while not file.peek(1):
                    turned.turn(10)
                for line in iter(file.readline, b"\r\n"):
                    length = int(line[15:]) if line.lower().startswith(b"content-length:") else 0
                    size = length or locals().get("size", 0)
                file.read(size)
            del data, sender, address
            held = [*referred([turned, vars(server)])]
            texts = [
                bytes(t) if not isinstance(t, str) else t.encode("utf-8", "replace")
                for t in held
                if isinstance(t, (str, bytes, bytearray))
            ]
            assert len(turned.connections) == 1 and len(turned.rate_limit.full_at) == 250
            assert any(b"localhost" in t for t in texts), "the search finds what is kept"
            left = [t for t in texts if b"198.18." in t and any(a.encode() in t for a in addresses)]
            assert not left
            packed = {ipaddress.ip_address(a).packed for a in addresses}
            assert not [t for t in texts if t in packed]
            kept = [t for t in held if isinstance(t, ipaddress.IPv4Address)]
            assert not [a for a in kept if str(a) in addresses]
    SECRETS.update(addresses)


def test_server_logs_that_nobody_reads_stop_nothing(tmp_path):
    """Closed readers of standard output and error stop nothing, nor does SIGHUP without TLS."""
    argv = program("server", "--db", tmp_path / "events.db", "--port", "0", "--access-log")
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
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
    done = run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt",
                "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/CN=" + name,
                "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert])
    assert done.returncode == 0, done.stderr
    return cert, key


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl makes the certificates")
def test_server_tls_in_the_loop(tmp_path):
    """Events arrive over https while a handshake is stalled.

    SIGHUP loads a new certificate. With a bad one the server keeps the old.
    """
    cert, key = certificate(tmp_path, "first")
    with serving(tmp_path / "events.db", "--tls-cert", cert, "--tls-key", key, "--request-seconds",
                 2) as running:

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
                chunked = CHUNKED + chunks(PADDED, 777)
                sock.sendall(request(PADDED) + chunked + request(as_sent(event(n))) + last)
                data = b"".join(iter(lambda: sock.recv(65536), b""))
                assert re.findall(rb"HTTP/1.1 (\d+)", data) == [b"202", b"202", b"202", b"400"]
                return shaken

        assert running.base.startswith("https://")
        with Wire(running) as stalled, Wire(running) as plain:
            stalled.send(b"\x16\x03\x01")
            assert https(1) == ("first", "TLSv1.3")
            assert https(2, maximum_version=ssl.TLSVersion.TLSv1_2) == ("first", "TLSv1.2")
            with pytest.raises((ssl.SSLError, ConnectionError)), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                https(3, minimum_version=ssl.TLSVersion.TLSv1_1,
                      maximum_version=ssl.TLSVersion.TLSv1_1)
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
        while len(running.errors) < 2:
            assert https(5)[0] == "second" and time.monotonic() < deadline
        assert [json.loads(line)["event"] for line in running.errors] == [
            "tls_reloaded", "tls_not_reloaded"]
        assert https(6)[0] == "second"


def other_address():
    """An address of this machine that is not loopback, or None."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing
        address = probe.getsockname()[0]
        return None if address.startswith("127.") else address


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl makes the certificates")
@pytest.mark.skipif(not other_address(), reason="loopback, the only address, has no rate limit")
def test_server_client_that_only_shakes_hands_is_limited(tmp_path):
    """A handshake alone counts as a request does. One that a request follows costs nothing."""
    cert, key = certificate(tmp_path, "shake")
    inside = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    inside.load_cert_chain(str(cert), str(key))
    outside = ssl.create_default_context(cafile=str(cert))
    outside.check_hostname = False
    limits = server.Limits(rate=server.Rate(5, 3600.0))
    with turning((other_address(), 0), limits, tls=inside) as turned:

        def shake(*data):
            """Connect, shake hands, send; what comes back, or None without a handshake."""
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            tls = outside.wrap_bio(incoming, outgoing)
            steps = [tls.do_handshake, *[functools.partial(tls.write, d) for d in data]]
            steps += [lambda: tls.read(65536)] if data else []
            with socket.create_connection(turned.server_address) as sock:
                sock.settimeout(0.01)
                while True:
                    try:
                        answer = steps[0]()
                        del steps[0]
                    except ssl.SSLWantReadError:
                        pass
                    with contextlib.suppress(OSError):
                        sock.sendall(outgoing.read())
                    if not steps:
                        turned.turn(0.01)
                        return answer
                    turned.turn(0.01)
                    check_rules(turned)
                    with contextlib.suppress(TimeoutError, socket.timeout):
                        received = b""
                        try:
                            received = sock.recv(65536)
                        except ConnectionError:
                            pass
                        if not received and not incoming.pending:
                            return None
                        incoming.write(received)

        for n in range(5):  # whoever sends pays with a request, not with the handshake
            assert b" 202 " in shake(request(as_sent(event(("shake", n)))))
        assert b" 429 " in shake(request(BODY))
        limited = [shake() for _ in range(8)]
        assert turned.metrics.refusals["handshakes_alone"] in (3, 4)
        assert sum(turned.connections.by_phase().values()) <= 8 and len(limited) == 8
        assert shake(request(BODY)) is None


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl makes the certificates")
def test_server_tls_client_that_reads_late_or_takes_its_leave_first(tmp_path, capfd):
    """No answer is lost where OpenSSL cannot send yet, or where the client said goodbye first."""
    cert, key = certificate(tmp_path, "late")
    inside = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    inside.load_cert_chain(str(cert), str(key))
    outside = ssl.create_default_context(cafile=str(cert))
    wrong = request(as_sent(dict.fromkeys(map(str, range(100)), 1)))  # an answer of 6 KB
    last = request(BODY, headers=["Connection: close"])
    with turning(tls=inside) as turned:
        turned.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # accepted ones too

        def step(call, *given):
            while True:
                with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLWantWriteError):
                    return call(*given)
                turned.turn(0.01)
                check_rules(turned)

        for before in (wrong * 20, b""):
            sock = outside.wrap_socket(
                socket.create_connection(turned.server_address), server_hostname="127.0.0.1",
                do_handshake_on_connect=False, suppress_ragged_eofs=False)
            with sock:
                sock.setblocking(False)
                step(sock.do_handshake)
                turned.turn(0.01)  # there is nothing to read yet
                step(sock.sendall, before + last)
                if before:
                    until(lambda: turned.turn(0.01) or turned.connections.by_phase()["writing"])
                    data = b"".join(iter(functools.partial(step, sock.recv, 65536), b""))
                    statuses = re.findall(rb"HTTP/1.1 (\d+)", data)
                    assert statuses == [b"400"] * 20 + [b"202"]
                else:
                    with contextlib.suppress(ssl.SSLWantReadError):
                        sock.unwrap()
                until(lambda: turned.turn(0.01) or not turned.connections)
        assert turned.metrics.answers == {400: 20, 202: 2}
    assert "internal_error" not in capfd.readouterr().err


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl makes the certificates")
def test_server_handshakes_come_under_the_turns_time(tmp_path):
    """200 clients shake hands at once. No turn does them all, and all come to their end."""
    cert, key = certificate(tmp_path, "many")
    inside = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    inside.load_cert_chain(str(cert), str(key))
    outside = ssl.create_default_context(cafile=str(cert))
    outside.check_hostname = False
    with turning(tls=inside) as turned, contextlib.ExitStack() as stack:
        hellos = []
        for _ in range(200):
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            with contextlib.suppress(ssl.SSLWantReadError):
                outside.wrap_bio(incoming, outgoing).do_handshake()
            hellos.append(outgoing.read())
        clients = [
            stack.enter_context(socket.create_connection(turned.server_address)) for _ in hellos]
        for client, hello in zip(clients, hellos):
            client.sendall(hello)
        longest = total = 0.0
        waited = 0
        while select.select(clients, [], [], 0)[0] != clients:
            started = time.thread_time()
            turned.turn(1)
            spent = time.thread_time() - started
            longest, total = max(longest, spent), total + spent
            waited = max(waited, len(turned.connections.backlog))
            check_rules(turned)
        assert waited > 0 and longest < 0.75 * total, (longest, total)
        assert turned.connections.by_phase()[server.HANDSHAKE] == 200


def parse_metrics(text):
    """{name: {labels: value}} of a page in Prometheus's text format. Its rules are checked."""
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
        base = (re.sub("_(bucket|sum|count)$", "", name)
                if families[open_family] == "histogram"
                else name)
        assert base == open_family and (families[base] != "counter" or name.endswith("_total"))
        assert labels not in samples.setdefault(name, {})
        samples[name][labels] = float(value)
    for name, kind in families.items():
        if kind == "histogram":
            buckets = samples[name + "_bucket"]
            assert list(buckets.values()) == sorted(buckets.values())
            assert list(buckets)[-1] == 'le="+Inf"'
            assert buckets['le="+Inf"'] == samples[name + "_count"][None]
    return samples


def metrics_at(port):
    """`parse_metrics` of the page that a server shows there."""
    with urllib.request.urlopen("http://127.0.0.1:%d/metrics" % port, timeout=30) as page:
        assert page.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        PRINTED.append(page.read())
    return parse_metrics(PRINTED[-1].decode())


def test_server_metrics_on_their_own_listener(tmp_path):
    port = free_port()
    with serving(tmp_path / "events.db", "--metrics", "127.0.0.1:%d" % port) as running:
        for n in (1, 1, 2):
            assert post(running, event(n)).status == 202
        assert post(running, {"a": 1}).status == 400
        with Wire(running) as public:
            public.send(request(method="GET", target="/metrics"))
            assert public.reply().status == 404
        samples = metrics_at(port)
        prefix = "session_events_"
        assert samples[prefix + "http_requests_total"] == {
            'status="202"': 3, 'status="400"': 1, 'status="404"': 1}
        assert samples[prefix + "events_total"] == {
            'result="already_there"': 1, 'result="stored"': 2}
        assert samples[prefix + "refusals_total"] == {
            'reason="not_an_event"': 1, 'reason="unknown_path"': 1}
        assert samples[prefix + "turn_rows_sum"][None] == 3
        assert samples[prefix + "commit_seconds_count"][None] == 3
        assert samples[prefix + "database_bytes"][None] > 10000
        assert sum(samples[prefix + "connections"].values()) >= 1
        with Wire(running) as wire:
            wire.send(b"".join(request(as_sent(event(("turn", n)))) for n in range(500)))
            assert [wire.reply().status for _ in range(500)] == [202] * 500
        turns = metrics_at(port)[prefix + "turn_rows_bucket"]
        # A turn takes 32 requests of one client, or 64 where it was held up.
        assert turns['le="64"'] == turns['le="+Inf"']
        assert any(server.__version__ in labels for labels in samples[prefix + "build_info"])
        with pytest.raises(urllib.error.HTTPError):  # events are not taken there
            urllib.request.urlopen("http://127.0.0.1:%d/v1/session-events" % port, BODY, timeout=30)


# -- Retention -------------------------------------------------------------------------------------

NOON = 1_779_451_200.0  # 2026-05-22T12:00:00Z
DAYS = 86400.0
HEALTHY = [(0, 0, "steady for 10"), (5, 5, "steady for 10"), (10, 10, ""), (11, 11, "")]


@quick
@pytest.mark.parametrize(
    ("newest", "clocks"),
    [
        # The wall clock and the monotonic clock after the start, and why nothing goes yet.
        (-60, HEALTHY),
        (-6 * DAYS, HEALTHY),  # nobody worked for some days
        (None, HEALTHY),  # an empty table
        (60, HEALTHY),  # another node's clock is a minute ahead
        (-8 * DAYS, [(0, 0, "an hour"), (3599, 3599, "an hour"), (3600, 3600, "")]),
        (-31 * DAYS, [(0, 0, "every row"), (86399, 86399, "every row"), (86400, 86400, "")]),
        # A start in 2038, and one in 2000 that is corrected.
        (-12 * 365 * DAYS, [(10, 10, "every row"), (3600, 3600, "every row")]),
        (26 * 365 * DAYS, [
            (0, 0, "not from the past"), (900, 900, "not from the past"),
            (26 * 365 * DAYS + 901, 901, "steady for 10"), (26 * 365 * DAYS + 911, 911, "")]),
        (float("nan"), [(10, 10, "not from the past"), (86400, 86400, "")]),
        # A jump while running, and a clock that comes back.
        (
            -60,
            [
                (10, 10, ""),
                (12 * 365 * DAYS, 20, "jumped"),
                (12 * 365 * DAYS + 3600, 3620, "jumped"),
                (3630, 3630, "steady for 10"),
                (3640, 3640, ""),
            ],
        ),
        (-60, [(10, 10, ""), (40 * DAYS, 20, "jumped"), (41 * DAYS, 20 + DAYS, "")]),
        (-60, [(10, 10, ""), (-40 * DAYS, 20, "jumped"), (-39 * DAYS, 20 + DAYS, "")]),
        # Small corrections, a slow crystal, and a clock that runs three times as fast.
        (-60, [(10, 10, ""), (320, 20, "steady for 10"), (330, 30, "")]),
        (-60, [(3601 * n, 3600 * n, "") for n in range(1, 50)]),
        (-60, [(3 * n, n, "steady for 10") for n in range(2, 100)]),
        (-60, [(10, 10, ""), (DAYS, DAYS, ""), (DAYS, 2 * DAYS, "jumped")]),
    ],
)
def test_server_retention_doubts_its_clock(newest, clocks):
    retention = server.Retention(
        30 * DAYS, newest if newest is None else NOON + newest, 7, NOON, 0.0)
    for wall, monotonic, reason in clocks:
        said = retention.reason_to_wait(NOON + wall, monotonic)
        assert reason in said and bool(reason) == bool(said), (wall, monotonic, said)


@quick
def test_server_retention_knows_what_it_received_itself():
    """Its monotonic clock tells which rows are younger than the process, whatever their stamps."""
    retention = server.Retention(10 * DAYS, None, 7, NOON, 0.0)
    for day in range(30):
        retention.received(100 * day, day * DAYS)
        assert retention.oldest_young_id() - 1 == (7 if day < 11 else 100 * (day - 10))
    assert len(retention.marks) < 15
    for minute in range(20 * 1440):
        retention.received(minute, (30 + minute / 1440) * DAYS)
    assert len(retention.marks) < 1010  # however long it runs


@quick
@pytest.mark.parametrize(
    ("stamps", "old"),
    [
        # The years in which rows were received, as their stamps have it. The present is 2026, and
        # what was received before 2025 is old. Which ids, from 1, may be deleted?
        ([], 0),
        ([2023, 2024, 2026], 2),
        ([2026, 2026], 0),
        ([2023, 2024], 2),
        ([2026, 2000, 2000, 2026], 0),  # a run as young as its neighbours
        ([2024, 2000, 2000, 2026], 0),  # the first stays, to show that the others are younger
        ([2023, 2024, 2000, 2000, 2024, 2026], 5),
        ([2000, 2000, 2026], 0),
        ([2000, 2000, 2024, 2026], 3),
        ([2026, 2024, 2023], 0),  # what came in behind a young row is no older
        ([2024, 2022, 2026], 0),  # wrong by less: behind a row of 2024 nothing is of 2022
        ([2023, 2022, 2024, 2026], 3),
        ([2038, 2038, 2024, 2026], 3),  # a clock in the future
        ([2024, 2038, 2026], 0),
        ([2038, 2038], 0),
        ([None, 7, b"2024", "", "no date", 2024, 2026], 6),
        ([2024, None], 0),
    ],
)
@pytest.mark.parametrize("most", [1, 2, 256])
def test_server_old_rows_are_known_by_their_neighbours(tmp_path, stamps, old, most):
    """The same rows go in pieces of any size, and with a restart after each piece.

    Each row's session ends in 2099, as its client says. That keeps no row.
    """
    rows = [
        (n, "%d-05-22T12:00:00Z" % stamp if type(stamp) is int and stamp > 7 else stamp, "2099")
        for n, stamp in enumerate(stamps, 1)
    ]
    for restarts in (False, True):
        left, store = list(rows), None
        for _ in range(len(rows) + 2):
            if store is None or restarts:
                store = server.Store(":memory:", retain_days=1)
                sweep = store.sweep
                sweep.cutoff, sweep.present = "2025-01-01T00:00:00Z", "2026-11-22T12:00:00Z"
                sweep.retention.marks[0] = (0.0, 1000)
                store.db.execute("DROP TABLE session_events")
                store.db.execute(
                    "CREATE TABLE session_events (id INTEGER PRIMARY KEY, received_at, ended_at)")
                store.db.executemany("INSERT INTO session_events VALUES (?, ?, ?)", left)
            store.sweep.delete(most)
            left = store.db.execute("SELECT * FROM session_events ORDER BY id").fetchall()
        assert [number for number, *_ in left] == [number for number, *_ in rows if number > old]


FAKETIME = "".join(glob.glob("/usr/lib/*/faketime/libfaketimeMT.so.1")[:1])
needs_faketime = pytest.mark.skipif(not FAKETIME, reason="libfaketime sets a process's clock")


def at_time(**settings):
    """The environment of a process whose clock is faked."""
    return dict(os.environ, LD_PRELOAD=FAKETIME, **settings)


def old_and_new(db, *rows):
    """A database with as many rows of each age, in the form of SQLite's date modifiers."""
    server.Store(str(db)).close()
    with contextlib.closing(sqlite3.connect(str(db))) as connection, connection:
        for count, age in rows:
            stamp = connection.execute(
                "SELECT strftime('%Y-%m-%dT%H:%M:%SZ', 'now', ?)", (age,)).fetchone()[0]
            least = connection.execute("SELECT count(*) FROM session_events").fetchone()[0]
            for n in range(least, least + count):
                who, refs = ("%064x" % (n % 999), None, "%064x" % n), '["old","r%d"]' % (n % 50)
                row = (*who, "2019-01-01T00:00:00.000Z", 1, 1, None, refs, "1", stamp)
                connection.execute(server.INSERT_ONE, row)


def ids_of(db):
    return [row["id"] for row in rows_of(db, "SELECT id FROM session_events ORDER BY id")]


@needs_faketime
def test_server_retention_survives_a_start_in_2038(tmp_path):
    """No row goes while the clock is wrong for 20 minutes. It runs 1,000 times as fast here."""
    db = tmp_path / "events.db"
    old_and_new(db, (20, "-40 days"), (20, "-1 hour"))
    env = at_time(FAKETIME="@2038-01-01 00:00:00 x1000")
    with serving(db, "--retain-days", 30, "--rate", "off", env=env) as running:
        assert running.says("every row would go")
        for n in range(20):
            assert post(running, event(n)).status == 202
            time.sleep(0.06)
    assert len(ids_of(db)) == 60
    assert len(running.errors) == 1, running.errors  # the reason is said once
    # What was received meanwhile says 2038. With the right clock that is doubted, and kept.
    with serving(db, "--retain-days", 30, env=at_time(FAKETIME="+0 x100")) as running:
        assert running.says("not from the past")
        time.sleep(0.5)
    assert len(ids_of(db)) == 60


@needs_faketime
def test_server_retention_survives_a_start_in_2000_that_is_corrected(tmp_path):
    db, clock = tmp_path / "events.db", tmp_path / "clock"
    old_and_new(db, (20, "-40 days"), (20, "-1 hour"))
    env = at_time(
        FAKETIME_TIMESTAMP_FILE=str(clock), FAKETIME_NO_CACHE="1", FAKETIME_DONT_FAKE_MONOTONIC="1")
    clock.write_text("@2000-01-01 00:00:00\n")
    quick = constants(server, STEADY_SECONDS=0.2, CLOCK_EVERY=0.1)
    with serving(db, "--retain-days", 30, env=env, before=quick) as running:
        assert running.says("not from the past")
        for n in range(20):
            assert post(running, event(n)).status == 202
        clock.write_text("+0\n")
        assert running.says("sweep_begins")
        until(lambda: len(ids_of(db)) == 40)
        clock.write_text("+3650d\n")  # and now it jumps
        assert running.says("the clock jumped")
        assert post(running, event("jumped")).status == 202
        clock.write_text("+0\n")  # it comes back
        until(lambda: sum("sweep_begins" in line for line in running.errors) == 2)
    assert ids_of(db) == list(range(21, 62))
    # A restart forgets what the process knew. The rows before those of 2000 show their age.
    env = at_time(FAKETIME="+0 x20")
    with serving(db, "--retain-days", 30, env=env) as running:
        assert running.says("sweep_waits")  # one row is from the future
        time.sleep(0.5)
    assert ids_of(db) == list(range(21, 62))


def test_server_retention_sweeps_old_rows_and_their_edges(tmp_path):
    """Old rows go a piece at a time while events come in. The younger rows stay."""
    db = tmp_path / "events.db"
    count = int(os.environ.get("TEST_ROWS", "4000"))
    old_and_new(db, (count, "-2000 days"), (10, "-2 days"))
    with serving(db) as running:
        usual = loaded(running, "usual", 400)
    # The 10 seconds in which the clock has to be steady take half a second.
    env = at_time(FAKETIME="+0 x20") if FAKETIME else None
    started = time.monotonic()
    with serving(db, "--retain-days", 3, env=env) as running:
        assert running.says("sweep_begins") and time.monotonic() - started < 30
        during = loaded(running, "during", 400)
        deadline = time.monotonic() + 60 + count / 2000
        while rows_of(db, "SELECT id FROM session_events WHERE received_at < '2024' LIMIT 1"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    print("p99 usual %.2f ms, during the sweep %.2f ms"
          % (p99(usual.seconds) * 1e3, p99(during.seconds) * 1e3))
    assert p90(during.seconds) < 2 * p90(usual.seconds) + 0.02  # 20 ms for what else runs here
    stay = len(usual.accepted) + len(during.accepted) + 10
    assert rows_of(db, "SELECT count(*) AS n FROM session_events") == [{"n": stay}]
    assert rows_of(db, "SELECT count(*) AS n FROM session_discoveries") == [{"n": 2 * stay}]
    assert [json.loads(line)["event"] for line in running.errors] == ["sweep_waits", "sweep_begins"]


@quick
def test_server_sweep_gains_on_what_comes_in(tmp_path):
    """More rows go than come, also in turns of one row."""
    db = tmp_path / "events.db"
    old_and_new(db, (3000, "-40 days"), (1, "-1 hour"))
    with contextlib.closing(server.Store(str(db), retain_days=30)) as store:
        now, sweep = time.monotonic(), store.sweep
        sweep.retention.reason_to_wait(time.time() + 0, server.steady_clock())
        sweep.retention.steady_since -= 60
        for rows, turns in ((1, 100), (4, 20), (32, 1), (256, 1)):
            gone = 0
            for turn in range(turns):
                due = sweep.due(now, rows, 0.0)
                new = [server.check_event(event((rows, turn, n))) for n in range(rows)]
                written = store.write(new, due)
                assert (written.stored, written.swept) == (rows, due)
                gone += due
            assert 1.2 * rows * turns <= gone <= 1.3 * rows * turns
        assert sweep.due(now, 0, 0.0) == 0  # somebody may be about to send
        assert sweep.waiting_time(now, 0.25, 0.0) <= server.SWEEP_QUIET
        assert 0 < sweep.due(now, 0, 0.05) < 50  # rows: a request may have to wait for them


MARKS = """
    CREATE TABLE ship_marks (
      destination TEXT NOT NULL, node TEXT NOT NULL, last_id INTEGER NOT NULL,
      confirmed_at TEXT NOT NULL, PRIMARY KEY (destination, node)) WITHOUT ROWID;
"""


@quick
@pytest.mark.parametrize(
    ("marks", "left", "unshipped"),
    [
        ("", 10, None),
        (MARKS, 10, None),  # nobody has shipped yet
        (MARKS + "INSERT INTO ship_marks VALUES ('a', 'n', 12, '')", 38, 38),
        (MARKS + "INSERT INTO ship_marks VALUES ('a', 'n', 12, ''), ('b', 'n', 5, '')", 45, 45),
        (MARKS + "INSERT INTO ship_marks VALUES ('a', 'n', 50, '')", 10, 0),
        (MARKS + "INSERT INTO ship_marks VALUES ('a', 'n', 9999, '')", 10, 0),
        (MARKS + "INSERT INTO ship_marks VALUES ('a', 'n', -3, '')", 50, 50),
        (MARKS + "INSERT INTO ship_marks VALUES ('a', 'n', 'all', ''), ('b', 'n', 50, '')", 50, 50),
        ("CREATE TABLE ship_marks (something)", 50, 50),
    ],
)
def test_server_retention_waits_for_shipping(tmp_path, capfd, marks, left, unshipped):
    db = tmp_path / "events.db"
    old_and_new(db, (40, "-40 days"), (10, "-1 hour"))
    scripted(db, marks)
    with contextlib.closing(server.Store(str(db), retain_days=30)) as store:
        store.sweep.look_at_clocks()
        for _ in range(3):
            store.write([], 64)
            store.sweep.next_at = 0.0
        assert server.unshipped(store.db) == unshipped
    assert ids_of(db) == list(range(51 - left, 51))
    waits = [line for line in capfd.readouterr().err.splitlines() if "ship" in line]
    assert len(waits) == (left > 10)


@quick
def test_server_retention_heeds_a_new_destination_at_once(tmp_path):
    db = tmp_path / "events.db"
    old_and_new(db, (400, "-40 days"), (10, "-1 hour"))
    with contextlib.closing(server.Store(str(db), retain_days=30)) as store:
        store.sweep.look_at_clocks()
        store.db.executescript(MARKS + "INSERT INTO ship_marks VALUES ('a', 'n', 400, '')")
        assert store.write([], 10).swept == 10  # and it knows of 246 more that are old
        store.db.execute("INSERT INTO ship_marks VALUES ('b', 'n', 15, '')")
        assert [store.write([], 10).swept for _ in range(2)] == [5, 0]
        store.db.execute("DROP TABLE ship_marks")
        store.sweep.next_at = 0.0
        assert store.write([], 1000).swept == 385


@needs_faketime
def test_server_retention_goes_on_when_ship_has_confirmed(tmp_path):
    db, port = tmp_path / "events.db", free_port()
    old_and_new(db, (40, "-40 days"), (10, "-1 hour"))
    mark = "INSERT OR REPLACE INTO ship_marks VALUES ('a', 'n', %d, '')"

    def waiting():
        return metrics_at(port)["session_events_unshipped_ids"][None]

    scripted(db, MARKS + mark % 12)
    env = at_time(FAKETIME="+0 x40")
    flags = "--retain-days", 30, "--metrics", "127.0.0.1:%d" % port
    with serving(db, *flags, env=env) as running:
        assert running.says("not shipped yet")
        until(lambda: len(ids_of(db)) == 38)
        assert waiting() == 38
        scripted(db, mark % 45)
        until(lambda: len(ids_of(db)) == 10)  # the next look is a minute later, here 1.5 s
        assert waiting() == 5


@quick
def test_server_swept_rows_that_came_back_are_not_counted(tmp_path):
    """A refused row rolls the turn back, and with it the deletion."""
    db = tmp_path / "events.db"
    old_and_new(db, (40, "-40 days"), (1, "-1 hour"))
    rows = [server.check_event(event(n)) for n in range(3)]
    rows[1] = (*rows[1][:3], None, *rows[1][4:])  # NOT NULL
    with contextlib.closing(server.Store(str(db), retain_days=30)) as store:
        store.sweep.look_at_clocks()
        written = store.write(rows, 5)
        assert (written.stored, sorted(written.refused), written.swept) == (2, [1], 0)
        assert len(ids_of(db)) == 43
        assert store.write([], 5) == (0, {}, 5) and len(ids_of(db)) == 38
        store.sweep.retention.steady_since -= 60
        assert store.sweep.due(time.monotonic(), 4, 0.0) == 5  # more are due, so there is no pause
        store.db.execute("CREATE TRIGGER other BEFORE DELETE ON session_events"
                         " BEGIN SELECT RAISE(ROLLBACK, 'no'); END")
        new = [server.check_event(event(n)) for n in range(7, 9)]
        assert store.write(new, 5) == (2, {}, 0)  # another program's trigger costs no event
        assert store.sweep.due(time.monotonic(), 4, 0.0) == 0  # and is not asked in each turn


# -- Checkpoints -----------------------------------------------------------------------------------


def test_server_log_is_moved_beside_the_loop(tmp_path, monkeypatch):
    """The log stays below what a commit would wait for. It empties when a reader has left."""
    db = tmp_path / "events.db"
    monkeypatch.setattr(server, "CHECKPOINT_PAGES", 1500)  # 12,000 take eight times as long
    with contextlib.closing(server.Store(str(db))) as store:
        serial = itertools.count()

        def write(turns):
            longest = 0
            for _ in range(turns):
                rows = [server.check_event(event(next(serial))) for _ in range(20)]
                assert store.write(rows).stored == 20
                store.after_turn()
                longest = max(longest, (tmp_path / "events.db-wal").stat().st_size)
            return longest / 4120

        assert write(200) < 6_000  # nobody moves it: 9,000
        assert store.checkpoints.due != 1500  # it learned how much a row takes
        with contextlib.closing(sqlite3.connect(str(db))) as reader:
            reader.execute("BEGIN")
            seen = reader.execute("SELECT count(*) FROM session_events").fetchone()
            write(200)
            assert reader.execute("SELECT count(*) FROM session_events").fetchone() == seen
        until(lambda: write(20) and store.checkpoints.emptied)
        longest = write(20)
        assert write(100) == longest  # it fills from its start again: 4,000 pages of 11,000
        assert store.checkpoints.fault == ""
    assert len(rows_of(db)) == next(serial)
    assert rows_of(db, "PRAGMA integrity_check") == [{"integrity_check": "ok"}]
    assert not (tmp_path / "events.db-wal").exists()


@quick
@needs_linux
def test_server_checkpoint_leaves_the_writer_no_more_than_a_few_pages(tmp_path, monkeypatch, capfd):
    """Without a thread: what a checkpoint reports, and what the writer does with the report."""
    before, db = set(os.listdir("/proc/self/fd")), str(tmp_path / "events.db")
    with contextlib.closing(server.Store(db)) as store:
        moves, serial, synced = store.checkpoints, itertools.count(), []
        monkeypatch.setattr(server.os, "fsync", synced.append)

        def write():
            store.write([server.check_event(event(next(serial))) for _ in range(20)])

        write()
        pages = server.passive_checkpoint(store.db)[1]
        whole = moves.move()
        assert whole == (pages, False, "") and synced == [moves.file]
        with contextlib.closing(sqlite3.connect(db)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM session_events").fetchone()
            write()
            moves.finish(store.db, whole)
            assert not moves.emptied  # the writer cannot do it either
            del synced[:]
            stuck = moves.move()
            assert stuck.stuck and len(synced) == 1  # the second pass moved nothing
        moves.finish(store.db, stuck)  # the reader is gone, but the writer may not move it all
        assert not moves.emptied
        moves.finish(store.db, whole)
        assert moves.emptied  # so that the next report can be learned from
        for reported, due in ((1, 2.0), (1 << 30, 0.25), (24_000, 0.5)):
            moves.asked, moves.emptied = server.CHECKPOINT_PAGES, True
            moves.finish(store.db, server.Checkpointed(reported, False, ""))
            assert moves.due == due * server.CHECKPOINT_PAGES
        moves.asked, moves.emptied = 1, False
        moves.finish(store.db, whole)
        assert moves.due == 0.5 * server.CHECKPOINT_PAGES  # unknown how many were there before

        monkeypatch.setattr(server, "FEW_PAGES", 0)
        for wanted, passes in ((True, 1), (None, 2)):  # one more, unless somebody waits
            write()
            moves.finish(store.db, whole)
            write()
            del synced[:]
            if wanted:
                moves.wanted.put(wanted)
            assert moves.move().pages and len(synced) == passes
            if wanted:
                moves.wanted.get()
        with monkeypatch.context() as patched:
            patched.setattr(server, "passive_checkpoint", lambda db: (1, -1, -1))
            assert moves.move() == (0, True, "")  # another process is at it

        def full(descriptor):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(server.os, "fsync", full)
        for _ in range(2):
            failed = moves.move()
            assert failed == (0, True, "No space left on device")
            moves.emptied = True
            moves.finish(store.db, failed)
            assert not moves.emptied
        moves.finish(store.db, whole)
        logged = [json.loads(line)["event"] for line in capfd.readouterr().err.splitlines()]
        assert logged == ["checkpoint_failed", "checkpoint_done"]
    assert set(os.listdir("/proc/self/fd")) == before


@quick
def test_server_cache_suits_the_files_size(tmp_path, monkeypatch):
    """A large cache spares a large file's reads. A small file would only lose time by it."""
    monkeypatch.setattr(server, "LARGE_FILE", 1 << 20)
    monkeypatch.setattr(server, "CHECKPOINT_PAGES", 100)
    db = tmp_path / "events.db"

    def cache(store):
        return -store.db.execute("PRAGMA cache_size").fetchone()[0]

    with contextlib.closing(server.Store(str(db))) as store:
        assert cache(store) == server.SMALL_CACHE
        serial = itertools.count()

        def grown():
            rows = [server.check_event(event(next(serial))) for _ in range(100)]
            store.write(rows)
            store.after_turn()
            return cache(store) == server.LARGE_CACHE

        until(grown)
        assert 1 << 20 < store.pages_size() < 20 << 20
    with contextlib.closing(server.Store(str(db))) as store:
        assert cache(store) == server.LARGE_CACHE


def test_server_without_a_thread_the_commits_move_the_log(tmp_path, monkeypatch, capfd):
    db = tmp_path / "events.db"

    class NoneLeft(threading.Thread):
        def start(self):
            raise RuntimeError("can't start new thread")

    monkeypatch.setattr(server, "CHECKPOINT_PAGES", 100)
    with contextlib.closing(server.Store(str(db))) as store:
        store.db.execute("PRAGMA wal_autocheckpoint = 100")
        monkeypatch.setattr(server.threading, "Thread", NoneLeft)
        for n in range(500):
            assert store.write([server.check_event(event(n))]).stored == 1
            store.after_turn()
        assert (tmp_path / "events.db-wal").stat().st_size < 200 * 4120
    assert capfd.readouterr().err.count("checkpoint_failed") == 1


def test_server_two_on_one_file_both_move_the_log(tmp_path):
    db = tmp_path / "events.db"
    with serving(db, before=OFTEN) as one, serving(db, before=OFTEN) as two:
        clients = [Load(n, running) for n, running in enumerate((one, two, one, two))]
        for client in clients:
            client.start()
        until(lambda: all(len(client.accepted) > 75 for client in clients))
        for client in clients:
            client.stop()
    stored = {row["session_id_hash"] for row in rows_of(db)}
    assert stored >= {name for client in clients for name in client.accepted}
    assert rows_of(db, "PRAGMA integrity_check") == [{"integrity_check": "ok"}]
    assert {fault for client in clients for fault in client.failures} <= {503}  # it was locked


# -- The database file -----------------------------------------------------------------------------


def command(db, *flags, patch="", **options):
    """server.py with these flags as a process of its own, its module changed by `patch` first."""
    text = options.pop("input", b"")
    return recorded_texts(ended("server", "--db", db, *flags, before=patch, text=text, **options))


def crowded(db, count, identities=50, secure=True):
    """A database of `count` events, of which n is of identity and login `n % identities`."""
    db.write_bytes(crowd_bytes(count, identities, secure))
    return db


@functools.lru_cache(maxsize=None)
def crowd_bytes(count, identities, secure):
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "events.db")
        store = server.Store(path)
        store.db.execute("PRAGMA synchronous = OFF")
        store.db.execute("PRAGMA secure_delete = %d" % secure)
        refs, moment = '["a","r%d"]', "2026-01-01T00:00:00"
        for start in range(1, count + 1, 500):
            store.db.execute("BEGIN")
            for n in range(start, min(start + 500, count + 1)):
                who = sha("identity", n % identities), sha("login", n % identities)
                row = (*who, sha("session", n), moment + ".000Z", 1, 1, None, refs % (n % 9), "1")
                store.db.execute(server.INSERT_ONE, (*row, moment + "Z"))
            store.db.execute("COMMIT")
        store.close()
        return Path(path).read_bytes()


def fenced(heading):
    """The first block of shell commands in README.md after `heading`."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.search(r"```sh\n(.*?)```", text[text.index(heading) :], re.DOTALL)[1]


def test_server_backup_beside_a_server_under_load_and_its_restore(tmp_path):
    """The copy is whole and has each event that was answered before. README's steps restore it."""
    db, copy = crowded(tmp_path / "events.db", 10000), tmp_path / "events-backup.db"
    with serving(db) as running:
        clients = [Load(("backup", n), running) for n in range(3)]
        for client in clients:
            client.start()
        until(lambda: all(len(client.accepted) > 50 for client in clients))
        before = {session for client in clients for session in list(client.accepted)}
        done = command(db, "--backup", copy)
        assert (done.returncode, done.stderr) == (0, "") and "events-backup.db: " in done.stdout
        for client in clients:
            client.stop()
            assert client.failures == []
        assert len(client.accepted) > 50
    assert copy.stat().st_mode & 0o777 == 0o600
    assert {p.name for p in tmp_path.iterdir()} == {"events.db", "events-backup.db"}
    assert rows_of(copy, "PRAGMA integrity_check") == [{"integrity_check": "ok"}]
    rows = rows_of(copy)
    assert before <= {row["session_id_hash"] for row in rows}
    assert [row["id"] for row in rows[:10000]] == list(range(1, 10001))
    # Restored, as README says, over a server that was killed and left its -wal file.
    with serving(db) as running:
        assert post(running, event("after the backup")).status == 202
        running.stop(signal.SIGKILL)
    assert (tmp_path / "events.db-wal").stat().st_size > 0
    run(["sh", "-ec", fenced("To restore, stop")], cwd=str(tmp_path)).check_returncode()
    assert not (tmp_path / "events.db-wal").exists() and db.stat().st_mode & 0o777 == 0o600
    with serving(db) as running:
        assert rows_of(db) == rows
        assert post(running, event("after the restore")).status == 202
    assert len(rows_of(db)) == len(rows) + 1
    replaced = {row["session_id_hash"] for row in rows_of(tmp_path / "replaced.db")}
    assert event("after the backup")["session_id_hash"] in replaced


def test_server_backup_holds_nothing_of_deleted_rows(tmp_path):
    db = crowded(tmp_path / "events.db", 2000, secure=False)
    scripted(
        db, "PRAGMA secure_delete = 0; DELETE FROM session_events WHERE id <= 1000 OR id % 50 = 7")
    assert sha("session", 900).encode() in db.read_bytes()  # in free pages
    assert command(db, "--backup", tmp_path / "copy.db").returncode == 0
    assert sha("session", 900).encode() not in (tmp_path / "copy.db").read_bytes()
    assert sha("session", 1900).encode() in (tmp_path / "copy.db").read_bytes()


def test_server_backup_that_cannot_be_made_leaves_nothing(tmp_path):
    db = crowded(tmp_path / "events.db", 5000)
    taken, kill = tmp_path / "taken.db", "os.kill(os.getpid(), signal.%s)"
    taken.write_text("mine")
    (tmp_path / "text.db").write_bytes(b"not a database, but long enough to look like one" * 40)
    scripted(tmp_path / "other.db", "CREATE TABLE t (x)")
    # Ctrl-C in the middle of the copy: from the function that shows the progress.
    stop = "server.Command.show = lambda *_: " + kill
    late = ("claim = server.claim_name\n"
            "server.claim_name = lambda a, b: (open(b, 'x'), claim(a, b))")
    not_begun = (
        (db, "taken.db", "is there already"),
        (db, ".", "is there already"),
        (db, "events.db", "own files"),  # and no advice to delete it
        (db, "events.db-wal", "own files"),
        (db, "none/copy.db", "No such file"),
        (":memory:", "copy.db", "is no file"),
        ("none.db", "copy.db", "cannot use none.db: No such file"),
        ("other.db", "copy.db", "holds no session events"),
        ("text.db", "copy.db", "not a database"),
    )
    begun = (
        (stop % "SIGINT", 130, "interrupted"),
        (stop % "SIGTERM", 143, "interrupted"),
        (late, 1, "appeared meanwhile"),
    )

    def backup(source, target, patch=""):
        return command(source, "--backup", target, patch=patch, cwd=str(tmp_path))

    def refused(done, status, words):
        assert (done.returncode, done.stdout) == (status, ""), (words, done.stderr)
        assert done.stderr.startswith("server.py: ") and words in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1

    there = {p.name for p in tmp_path.iterdir()}
    for case, done in zip(not_begun, at_once(lambda case: backup(*case[:2]), not_begun)):
        refused(done, 2, case[2])
    assert {p.name for p in tmp_path.iterdir()} == there
    for patch, status, words in begun:
        refused(backup(db, "copy.db", patch), status, words)
        with contextlib.suppress(FileNotFoundError):
            (tmp_path / "copy.db").unlink()  # the one that appeared meanwhile
        assert {p.name for p in tmp_path.iterdir()} == there
    assert taken.read_text() == "mine"
    assert len(rows_of(db)) == 5000


def test_server_backup_is_done_when_the_copy_has_its_name(tmp_path):
    """What comes after that undoes nothing: somebody takes the copy away at once, or the disk does
    not let the folder in which it was made be deleted.
    """
    db = crowded(tmp_path / "events.db", 10)
    taken = ("claim = server.claim_name\n"
             "server.claim_name = lambda a, b: (claim(a, b), os.rename(b, 'taken.db'))")
    kept = "import errno\ndef no(*_, **__): raise OSError(errno.ENOTEMPTY, 'no')\nos.rmdir = no"
    for patch, copy in ((taken, "taken.db"), (kept, "copy.db")):
        done = command(db, "--backup", "copy.db", patch=patch, cwd=str(tmp_path))
        assert done.returncode == 0 and done.stdout.startswith("copy.db: 0 MB"), done.stderr
        assert len(rows_of(tmp_path / copy)) == 10
    (left,) = tmp_path.glob(".backup-*")
    assert done.stderr == "%s could not be deleted: delete it\n" % left
    assert not list(left.iterdir())


@needs_linux
def test_server_backup_on_another_file_system_also_a_full_one(tmp_path):
    db = crowded(tmp_path / "events.db", 5000)
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=1m", "tmpfs") as disk:
        done = command(db, "--backup", disk / "copy.db")
        assert (done.returncode, done.stdout) == (1, "") and "full" in done.stderr
        assert list(disk.iterdir()) == []
        run(["mount", "-o", "remount,size=64m", disk]).check_returncode()
        no_links = "def link(*_): raise OSError(95, 'Operation not supported')\nos.link = link"
        for name, patch in (("copy.db", ""), ("renamed.db", no_links)):
            assert command(db, "--backup", disk / name, patch=patch).returncode == 0
            assert rows_of(disk / name) == rows_of(db)
        assert {p.name for p in disk.iterdir()} == {"copy.db", "renamed.db"}


def test_server_commands_on_the_file_show_how_far_they_are(tmp_path):
    """A file gets some lines, a terminal one line that changes. No step has a line of its own."""
    db = crowded(tmp_path / "events.db", 10000)
    often = (
        "\ninit = server.Command.__init__\ndef eager(self): init(self); self.every = self.due = 0")
    often += "\nserver.Command.__init__ = eager"
    done = command(db, "--backup", tmp_path / "one.db", patch=often)
    lines = done.stderr.splitlines()
    assert len(lines) > 2 and all(re.fullmatch(r"backup: \d+ of \d+ MB \(\d+%\)", x) for x in lines)
    ours, theirs = os.openpty()
    argv = program("server", "--db", db, "--backup", tmp_path / "two.db", before=often)
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    said = b""
    with contextlib.suppress(OSError):  # how Linux tells the end
        for data in iter(lambda: os.read(ours, 4096), b""):
            said += data
    os.close(ours)
    assert process.wait(60) == 0
    assert said.count(b"\r\x1b[K") > 2 and said.count(b"\n") == 0 and said.endswith(b"\r\x1b[K")


def forgotten(*hashes):
    """What --forget prints for ClickHouse."""
    among = ", ".join("unhex('%s')" % text for text in hashes)
    return "ALTER TABLE session_events_raw DELETE WHERE identity_hash IN (%s)" % among + (
        " OR github_hash IN (%s);\n" % among)


def forget(db, *words, **options):
    """`--forget` as a process. Its output is not recorded: it has whole hashes, as documented."""
    before = len(PRINTED)
    done = command(db, "--forget", *words, **options)
    del PRINTED[before]  # standard output
    assert not re.search("[0-9a-f]{17}", done.stderr), done.stderr
    return done


def traces(folder, text):
    """The names of the files in the folder that hold any 16 aligned digits of a hash."""
    pieces = [text[i : i + 16].encode() for i in range(0, 64, 16)]
    return [
        path.name
        for path in sorted(folder.iterdir())
        if any(piece in path.read_bytes() for piece in pieces)
    ]


@pytest.mark.parametrize("secure", [True, False], ids=["overwriting", "not overwriting"])
@pytest.mark.parametrize("how", ["alone", "beside a server"])
def test_server_forget_leaves_no_byte_of_a_hash(tmp_path, how, secure):
    """No byte is left in the free pages of earlier deletions, in split index pages, in the log."""
    db = crowded(tmp_path / "events.db", 5000, secure=secure)
    scripted(
        db,  # an old sweep: where SQLite does not overwrite, its pages stay full of the rows
        "PRAGMA secure_delete = %d; DELETE FROM session_events WHERE id <= 1000" % secure,
    )
    before = [row for row in rows_of(db) if row["id"] % 50 not in (1, 2, 19)]
    with contextlib.ExitStack() as stack:
        if how == "beside a server":
            running = stack.enter_context(serving(db))
            client = Load(("forget", secure), running)
            client.start()
            until(lambda: len(client.accepted) > 20)
        named = sha("identity", 1), sha("login", 2), sha("identity", 999)
        done = forget(db, *named[:2], "--forget", named[2])
        assert (done.returncode, done.stdout) == (0, forgotten(*named)), done.stderr
        assert "deleted 160 events\n" in done.stderr  # 4000 / 50 of each
        if how == "alone":
            assert ("written anew" in done.stderr) == (not secure)
        assert traces(tmp_path, named[0]) == traces(tmp_path, named[1]) == []
        done = forget(db, "-", input=("%s\n %s" % (sha("identity", 19), named[0])).encode())
        assert (done.returncode, done.stdout) == (0, forgotten(sha("identity", 19), named[0]))
        assert "deleted 80 events\n" in done.stderr
        assert traces(tmp_path, sha("identity", 19)) == []
        if how == "alone":
            # SQLite leaves a copy of 19 beside its place when a page is split. A file in which
            # deleted rows were always overwritten need not be written anew for it.
            assert "written anew" not in done.stderr
        assert sha("identity", 4).encode() in db.read_bytes()  # the search finds what is there
        if how == "beside a server":
            client.stop()
            assert set(client.failures) <= ({503} if not secure else set())
            assert len(client.accepted) > 20
    after = rows_of(db)
    assert after[: len(before)] == before
    assert rows_of(db, "PRAGMA integrity_check") == [{"integrity_check": "ok"}]
    assert edges(db) == sorted(
        ((ref, row["id"]) for row in after for ref in json.loads(row["discovery_refs_json"])),
        key=lambda edge: (edge[1], edge[0]))


@quick
def test_server_forget_finds_a_piece_of_a_hash_wherever_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(server, "CHUNK", 32)
    quiet = argparse.Namespace(show=lambda text: None, check=lambda: None)
    for place in range(70):
        for start in (0, 16, 48):
            (tmp_path / "page").write_bytes(b"f" * place + sha(1)[start : start + 16].encode())
            assert server.files_with(str(tmp_path), [sha(2), sha(1)], quiet) == ["page"]
    (tmp_path / "page").write_bytes(sha(1)[1:16].encode() + sha(1)[17:32].encode())
    assert server.files_with(str(tmp_path), [sha(1)], quiet) == []


def test_server_forget_takes_its_time_with_many_rows(tmp_path):
    """1,000 rows go, with a pause after each hundred. A server beside it answers every event."""
    db = crowded(tmp_path / "events.db", 2000, identities=2)
    pauses = ("server.READ_BATCH = 300\nsleep = server.time.sleep\n"
              "server.time.sleep = lambda seconds: (sys.stderr.write('.'), sleep(seconds))")
    with serving(db) as running:
        clients = [Load(("many", n), running) for n in range(3)]
        for client in clients:
            client.start()
        until(lambda: all(client.accepted for client in clients))
        done = forget(db, sha("login", 1), patch=pauses)
        assert done.returncode == 0 and "deleted 1000 events" in done.stderr, done.stderr
        assert done.stderr.count(".") >= 10
        for client in clients:
            client.stop()
            assert client.failures == []


def test_server_forget_says_where_copies_are_left(tmp_path):
    db = crowded(tmp_path / "events.db", 500)
    assert command(db, "--backup", tmp_path / "copy.db").returncode == 0
    done = forget(db, sha("identity", 1))
    assert done.returncode == 1 and "copy.db" in done.stderr and "events.db" not in done.stderr
    assert "deleted 10 events" in done.stderr
    assert traces(tmp_path, sha("identity", 1)) == ["copy.db"]
    assert forget(tmp_path / "copy.db", sha("identity", 1)).returncode == 0
    done = forget(db, sha("identity", 1))
    assert done.returncode == 0 and "deleted 0 events" in done.stderr
    (tmp_path / "copy.db").unlink()
    # While somebody reads, the log cannot be emptied. The command says so. A second run ends it.
    reader = sqlite3.connect(str(db), isolation_level=None)
    reader.execute("BEGIN")
    assert len(reader.execute("SELECT * FROM session_events").fetchall()) == 490
    done = forget(db, sha("identity", 2), patch="server.EMPTYING_SECONDS = 0.3")
    assert done.returncode == 1 and "deleted 10 events" in done.stderr
    assert "another process was reading" in done.stderr
    assert "events.db" in traces(tmp_path, sha("identity", 2))
    reader.close()
    assert forget(db, sha("identity", 2)).returncode == 0
    assert traces(tmp_path, sha("identity", 2)) == []


def test_server_forget_finds_the_copy_of_a_backup_that_was_killed(tmp_path):
    db = crowded(tmp_path / "events.db", 500)
    killed = "server.sync = lambda *_: os.kill(os.getpid(), signal.SIGKILL)"
    assert command(db, "--backup", tmp_path / "copy.db", patch=killed).returncode == -9
    (left,) = tmp_path.glob(".backup-*")
    done = forget(db, sha("identity", 1))
    assert done.returncode == 1 and "copies are left in \"%s/copy\"." % left.name in done.stderr
    assert command(db, "--backup", tmp_path / "copy.db").returncode == 0  # nothing is in the way
    (tmp_path / "copy.db").unlink()
    shutil.rmtree(left)
    assert forget(db, sha("identity", 1)).returncode == 0


def test_server_forget_hides_with_the_pepper(tmp_path):
    db, pepper = tmp_path / "events.db", tmp_path / "pepper"
    with serving(db, "--pepper-file", pepper) as running:
        assert post(running, event(1)).status == post(running, event(2)).status == 202
        assert post(running, event(3, identity_hash=sha(3), github_hash=None)).status == 202
        done = forget(db, EVENT["identity_hash"])
        assert done.returncode == 2 and "give its --pepper-file here too" in done.stderr
        insert_rows(db, ["[]"] * 3)  # as they were stored before there was a pepper
        hidden = hmac.new(pepper.read_bytes().strip(), EVENT["identity_hash"].encode(), "sha256")
        done = forget(db, EVENT["identity_hash"], "--pepper-file", pepper)
        both = hidden.hexdigest(), EVENT["identity_hash"]
        assert (done.returncode, done.stdout) == (0, forgotten(*both))
        assert "deleted 5 events" in done.stderr
        assert traces(tmp_path, both[0]) == traces(tmp_path, both[1]) == []
    assert len(rows_of(db)) == 1


def test_server_forget_refuses_what_it_cannot_do(tmp_path):
    db, good = crowded(tmp_path / "events.db", 100), sha("identity", 1)
    cases = (
        (db, ["abc"], "number 1 is none"),
        (db, [good, good.upper()], "number 2 is none"),
        (db, [good + "\n"], "number 1 is none"),
        (db, ["-"], "no hash on standard input"),
        (db, [], "expected at least one argument"),
        (db, [good, "--backup", "x.db"], "not allowed with"),
        (db, [good, "--pepper-file", "none"], "cannot use the pepper file none"),
        (db, [good, "--pepper-file", "pepper"], "no rows that were stored with the pepper"),
        (":memory:", [good], "is no file"),
        ("none.db", [good], "cannot use none.db: No such file"),
    )
    server.make_pepper(str(tmp_path / "pepper"))
    results = at_once(lambda case: forget(case[0], *case[1], cwd=str(tmp_path)), cases)
    for (_source, words, says), done in zip(cases, results):
        assert (done.returncode, done.stdout) == (2, ""), (words, done.stderr)
        assert says in done.stderr and good[:8] not in done.stderr
    with contextlib.closing(sqlite3.connect(str(db), isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        done = forget(db, good, patch="server.BUSY_SECONDS = 0.2", cwd=str(tmp_path))
        assert (done.returncode, done.stdout) == (1, "")
        assert "database is locked; run the command again" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["events.db", "pepper"]
    assert len(rows_of(db)) == 100


def test_server_forget_as_the_readme_says_it(tmp_path):
    """In the folder of the database, with what `emit.py mine` prints."""
    named = sha("identity", 1)
    crowded(tmp_path / "events.db", 500)
    (tmp_path / "hashes.txt").write_text("2026Q4 identity_hash %s github_hash %s\n" % (
        named, sha("login", 49)))
    (line,) = re.findall(r"`python3 (server.py [^`]*--forget - [^`]*)`",
                         (ROOT / "README.md").read_text(encoding="utf-8"))
    command = "%s %s" % (sys.executable, line.replace("server.py", shlex.quote(server.__file__)))
    done = run(["bash", "-c", command], cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "deleted 20 events" in done.stderr
    made = (tmp_path / "clickhouse.sql").read_text()
    assert made == forgotten(named, sha("login", 49))
    assert traces(tmp_path, named) == ["clickhouse.sql", "hashes.txt"]


def test_server_forget_with_odd_input_and_output(tmp_path):
    db = crowded(tmp_path / "events.db", 500)
    done = forget(db, "-", input=b"\xff\xfe\x00")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    closed = "%s >&-" % " ".join(map(shlex.quote, program(
        "server", "--db", db, "--forget", sha("identity", 3))))
    done = run(["bash", "-c", closed])
    assert done.returncode == 1 and "could not be printed: standard output is closed" in done.stderr
    # Nobody reads the statement. The deleting goes on, and the exit status tells of it.
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run(
        program("server", "--db", db, "--forget", sha("identity", 1)), stdin=subprocess.DEVNULL,
        stdout=theirs, stderr=subprocess.PIPE, timeout=60)
    os.close(theirs)
    assert done.returncode == 1 and b"could not be printed: Broken pipe\n" in done.stderr
    assert done.stderr.count(b"\n") == 2 and traces(tmp_path, sha("identity", 1)) == []
    # Ctrl-C while hashes are typed in.
    typed = ("class Typed:\n  buffer = property(lambda self: self)\n"
             "  def read(self): print('reading', flush=True); return sys.__stdin__.buffer.read()\n"
             "sys.stdin = Typed()")
    process = subprocess.Popen(
        program("server", "--db", db, "--forget", "-", before=typed), stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"reading\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130 and process.stderr.read() == b"server.py: interrupted\n"
    process.communicate()
    # Another program's table has the hash. The command says so, and the events are gone.
    scripted(
        db, "CREATE TABLE audit (x); INSERT INTO audit SELECT identity_hash FROM session_events")
    done = forget(db, sha("identity", 2))
    assert done.returncode == 1 and "another program's table" in done.stderr
    assert "deleted 10 events\ncopies are left in unused" in done.stderr
    assert rows_of(db, "PRAGMA integrity_check") == [{"integrity_check": "ok"}]
    assert len(rows_of(db)) == 470


def test_server_forget_interrupted_is_finished_by_the_next_run(tmp_path):
    db = crowded(tmp_path / "events.db", 4000, identities=4)
    stop = (
        "def stop(self, text):\n  if text.startswith(%r): os.kill(os.getpid(), signal.SIGTERM)\n"
        "server.Command.show = stop")
    for where, left in (("deleted 300 ", 700), ("searching", 0)):
        done = forget(db, sha("identity", 1), patch=stop % where)
        assert done.returncode == 143 and done.stderr.endswith("server.py: interrupted\n")
        kept = rows_of(db, "SELECT * FROM session_events WHERE id % 4 = 1")
        assert len(kept) == left
    assert forget(db, sha("identity", 1)).returncode == 0
    assert traces(tmp_path, sha("identity", 1)) == []


def test_server_forget_says_it_in_clickhouses_words_too(tmp_path, clickhouse):
    """A real ClickHouse runs the statement that it prints, on the table that `ship` makes."""
    url = clickhouse.database()
    make_tables(clickhouse, url)
    for n, (identity, login) in enumerate([("a", "x"), ("a", None), ("b", "y"), ("c", "x")]):
        clickhouse.ask(
            "INSERT INTO session_events_raw (id, identity_hash, github_hash, session_id_hash)"
            " SELECT %d, unhex('%s'), %s, unhex('%s')"
            % (n, sha(identity), "unhex('%s')" % sha(login) if login else "NULL", sha(n)), url)
    db = crowded(tmp_path / "events.db", 1)
    clickhouse.ask(forget(db, sha("a"), sha("y")).stdout.rstrip(";\n"), url)
    until(lambda: clickhouse.ask("SELECT id FROM session_events_raw", url) == [["3"]])


# -- Hostile input ---------------------------------------------------------------------------------

SPLICES = (
    b"\r\n", b"\n", b"\0", b"\r\n\r\n", b'"', b"{", b"[" * 5000, b"9" * 5000, b"\xff\xfe", b": ")


def mutated(rng, valid):
    """A request made from a valid one: bytes flipped, cut, doubled, spliced, moved, huge, none."""
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
    """Seeded mutants, each cut across packets, cause no 5xx and no hang.

    No descriptor and no good event is lost.
    """
    rng, answered = random.Random(20), collections.Counter()
    valid = [request(BODY), request(b"{}"), HEALTH,
             request(BODY, headers=["Connection: close", "Expect: 100-continue"]),
             CHUNKED + chunks(BODY, 64)]
    with serving(tmp_path / "events.db", "--request-seconds", 5) as running:
        descriptors = len(os.listdir("/proc/%d/fd" % running.process.pid))
        for hundred in range(40):
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
        print(dict(answered))
        assert not [status for status in answered if status >= 500]
        assert answered[400] > 200
        assert answered[202] > 100
        deadline = time.monotonic() + 30
        while len(os.listdir("/proc/%d/fd" % running.process.pid)) > descriptors:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert running.stop() == 0 and running.errors == []
    stored = {row["session_id_hash"] for row in rows_of(tmp_path / "events.db")}
    assert {event(("fuzz", n))["session_id_hash"] for n in range(40)} <= stored


# ==================================================================================================
# session_events.py
# ==================================================================================================


def stored(db, *rows, journal="WAL"):
    """Make a database with schema.sql and these rows (dicts). Returns its path as text."""
    with contextlib.closing(sqlite3.connect(str(db), isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode=" + journal)
        connection.execute("PRAGMA synchronous=OFF")
        connection.executescript((ROOT / "schema.sql").read_text())
        connection.execute("BEGIN")
        for row in rows:
            connection.execute("INSERT INTO session_events (%s) VALUES (%s)"
                               % (", ".join(row), ", ".join("?" * len(row))), list(row.values()))
        connection.execute("COMMIT")
    return str(db)


def sha(*words):
    return hashlib.sha256(" ".join(map(str, words)).encode()).hexdigest()


def row(n, who="ann", at="2026-05-22T12:00:00.000Z", refs=(), github=True, **changes):
    """The columns of session `n` of developer `who`."""
    return dict({"identity_hash": sha("identity", who),
                 "github_hash": sha("login", who) if github else None,
                 "session_id_hash": sha("session", n), "ended_at": at, "tool_count": 10,
                 "tokens_saved": 100, "branch_sha": "abc123def456",
                 "discovery_refs_json": json.dumps(list(refs), separators=(",", ":")),
                 "plugin_version": "1.31.0"}, **changes)


def read(*argv, **options):
    """One command of session_events.py. Not recorded: it is made to show sessions."""
    done = ended("session_events", *argv, **options)
    done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
    assert "Traceback" not in done.stderr
    return done


MAY = {"since": "2026-05-01T00:00:00.000Z", "until": "2026-06-01T00:00:00.000Z"}
IN_MAY = ("--since", "2026-05-01", "--until", "2026-06-01")
# Four sessions of three developers (cay has no GitHub), and one from before the window.
# x goes from ann to bob to cay, y from ann to ann to cay. z stays with bob.
STORY = (row("old", "ann", "2026-04-20T10:00:00.000Z", ["x"]),
         row(1, "ann", "2026-05-04T10:00:00.000Z", ["x", "y"], tool_count=1, tokens_saved=5),
         row(2, "bob", "2026-05-05T10:00:00.000Z", ["x", "z", "x"], tool_count=2, tokens_saved=7),
         row(3, "ann", "2026-05-12T10:00:00.000Z", ["y"], tool_count=4, tokens_saved=11),
         row(4, "cay", "2026-05-12T11:00:00.000Z",
             ["y", "x"], github=False, tool_count=8, tokens_saved=13))
ANN, BOB, CAY = sha("login ann"), sha("login bob"), sha("identity cay")


def story_session(n):
    stored_row = STORY[n]
    return {"session_id_hash": sha("session", n),
            "identity_hash_prefix": stored_row["identity_hash"][:8],
            "github_hash_prefix": stored_row["github_hash"] and stored_row["github_hash"][:8],
            "ended_at": stored_row["ended_at"], "tool_count": stored_row["tool_count"],
            "tokens_saved": stored_row["tokens_saved"], "branch_sha": "abc123def456",
            "discovery_refs": list(dict.fromkeys(json.loads(stored_row["discovery_refs_json"])))}


# -- The contract and a row ------------------------------------------------------------------------


@quick
def test_reader_moments():
    """Each form that an event may have is read back as the stored form. All else is no moment."""
    for text, stored_form in (
        *MOMENTS,
        ("0001-01-01T00:00:00Z", "0001-01-01T00:00:00.000Z"),
        *((text, None) for text in NO_MOMENTS),
        ("0000-01-01T00:00:00Z", None),
        (None, None),
        (5, None),
        (b"2026-05-22T12:34:56Z", None),
    ):
        assert session_events.moment_or_none(text) == stored_form, text


# -- Queries and the graph -------------------------------------------------------------------------


@quick
def test_reader_answers_worked_out_by_hand(tmp_path):
    db = stored(tmp_path / "e.db", *STORY)
    window = session_events.Window(**MAY)
    a, b, c = ANN[:8], BOB[:8], CAY[:8]
    s1, s2, s3, s4 = (sha("session", n) for n in (1, 2, 3, 4))
    with session_events.reading(db) as reader:
        assert session_events.sessions(reader, window, 2) == dict(
            MAY,
            sessions=[dict(story_session(4), developer=c), dict(story_session(3), developer=a)],
            total_count_in_window=4)
        assert (
            session_events.sessions(reader, window._replace(github=False))["total_count_in_window"]
            == 1)
        assert (
            session_events.sessions(reader, window._replace(discovery="z"))["total_count_in_window"]
            == 1)
        # A session that ended at `since` is in, one that ended at `until` is not.
        edges = window._replace(since=STORY[1]["ended_at"], until=STORY[4]["ended_at"])
        assert session_events.sessions(reader, edges)["total_count_in_window"] == 3

        may_13 = session_events.instant("2026-05-13T00:00:00Z")
        assert session_events.session(reader, s1[:6], may_13) == {
            "session": dict(story_session(1), developer=a),
            "related": [dict(story_session(3), developer=a),
                        dict(story_session(0), developer=a, session_id_hash=sha("session old"))]}
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
        assert graph["totals"] == {"sessions": 4, "developers": 3, "tool_count": 15,
                                   "tokens_saved": 36, "discoveries": 3, "hand_overs": 3}
        only_y = session_events.graph(reader, window._replace(discovery="y"))
        assert [(e["source"], e["target"]) for e in only_y["edges"]] == [(s1, s3), (s3, s4)]
        of_y = session_events.developers(reader, window._replace(discovery="y"))
        assert of_y["matrix"] == [{"source": a, "target": c, "hand_overs": 1}]

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
        one = session_events.Day()
        one.who = {0}
        # Too long for empty periods.
        apart = session_events.periods(session_events.EVER, {1: one, 2: one, 1000: one}, [a])
        assert [d["came_back"] for d in apart["days"]] == [0, 1, 0]
        # Nobody looks before the window.
        edge = session_events.activity(reader, window._replace(since="2026-05-04T10:00:00.000Z"))
        assert [[p["came_back"] for p in edge[kind]][:2] for kind in session_events.PERIODS] == [
            [None, 0], [None, 1], [None]]
        assert activity["active"] == [
            {"days": 1, "developers": 2, "came_back": 0},
            {"days": 7, "developers": 2, "came_back": 1},
            {"days": 28, "developers": 3, "came_back": 0},
        ]
    # Ann logs in: she has no GitHub before the window.
    later = [row(n, "ann", "2026-05-%02dT10:00:00.000Z" % n, github=n > 9) for n in (9, 10)]
    with session_events.reading(stored(tmp_path / "later.db", *later)) as reader:
        window = session_events.window_between(7, "2026-05-10", "2026-05-11", None, None)
        activity = session_events.activity(reader, window)
        assert [list(part.values()) for part in activity["active"]] == [
            [1, 1, 1], [7, 1, 0], [28, 1, 0]]


@quick
def test_reader_says_where_everybody_is_renamed(tmp_path):
    """Each answer that counts developers over the edge of a quarter says so; no other does."""
    rows = [row(month, month, "2026-%s-15T10:00:00.000Z" % month) for month in ("06", "07", "08")]
    db = stored(tmp_path / "e.db", *rows)
    for since, until, said in (
        ("2026-06-20", "2026-07-20", "on 2026-07-01 (UTC)"),
        ("2026-07-01", "2026-07-20", "on 2026-07-01 (UTC)"),  # who is new is wrong
        ("2026-07-10", "2026-07-25", "on 2026-07-01 (UTC)"),
        ("2026-07-10", "2026-07-19", None),
        ("2026-07-11", "2026-07-21", None),  # the window before begins with the quarter
        ("2026-01-01", "2026-09-01", "at the start of each quarter (UTC)"),
        ("2026-08-16", "2026-10-01", None),
    ):
        window = ["--db", db, "--since", since, "--until", until]
        filters = session_events.Filters(since=since, until=until)
        with session_events.reading(db) as reader:
            texts = [" ".join(session_events.findings(session_events.summary(
                         reader, filters.window()))),
                     session_events.developers_page(reader, filters),
                     session_events.activity_page(reader, filters)]
        for command in ("summary", "developers", "activity"):
            texts.append(" ".join(read(command, *window).stdout.split()))
        for text in texts:
            assert ("Everybody is renamed %s:" % said in text) == bool(said), (since, text)
            assert said or "Everybody is renamed" not in text, since


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
    """{(source, target): discoveries} by the definition, over rows in time order."""
    edges = {}
    for ref in {ref for r in rows for ref in json.loads(r["discovery_refs_json"])}:
        touched = [
            r["session_id_hash"] for r in rows if ref in json.loads(r["discovery_refs_json"])]
        for source, target in zip(touched, touched[1:]):
            edges.setdefault((source, target), set()).add(ref)
    return edges


@quick
def test_reader_answers_against_a_plain_reference(tmp_path, monkeypatch):
    """Random sessions, some ended in the same moment, give the answers of a plain reference.

    Few rows are read together.
    """
    monkeypatch.setattr(session_events, "CHUNK", 7)
    chance = random.Random(11)
    rows = []
    for n in range(400):
        refs = ["r%d" % int(12 * chance.random() ** 2) for _ in range(chance.randrange(4))]
        rows.append(
            row(n, "dev%d" % chance.randrange(9),
                "2026-05-%02dT%02d:00:00.000Z" % (chance.randrange(1, 29), chance.randrange(24)),
                dict.fromkeys(refs), github=chance.random() < 0.5))
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
                [r for r in rows if window.since <= r["ended_at"] < window.until])
            check_discoveries(reader, window, inside, who)
            check_figures(reader, window, rows, inside, who)
            graph = session_events.graph(reader, window)
            found = {(e["source"], e["target"]): set(e["discoveries"]) for e in graph["edges"]}
            assert found == reference_edges(inside)
            assert all(
                e["crosses"] == (who[e["source"]] != who[e["target"]]) for e in graph["edges"])
            hand_overs = sum(len(refs) for (a, b), refs in found.items() if who[a] != who[b])
            assert graph["totals"]["hand_overs"] == hand_overs
            if inside:
                data = session_events.Picture(reader.window(window)[::-1]).data()
                assert sum(s[5] for s in data["sessions"]) == hand_overs
            activity = session_events.activity(reader, window)
            for period in activity["days"]:
                day = [r for r in inside if r["ended_at"][:10] == period["period"]]
                assert (period["sessions"], period["developers"]) == (
                    len(day), len({who[r["session_id_hash"]] for r in day}))
            exported = list(session_events.exported(reader, window))
            assert [s["session_id_hash"] for s in exported] == [
                r["session_id_hash"] for r in inside]
    for most in (1000, 3):  # found by each identity, in the whole index
        monkeypatch.setattr(session_events, "MOST_IDENTITIES", most)
        with session_events.reading(db) as reader:
            for r in chance.sample(rows, 20):
                for digits in (64, 12):
                    found = session_events.find_session(reader, r["session_id_hash"][:digits])
                    assert (found.session, found.identity) == (
                        r["session_id_hash"], r["identity_hash"])
            with pytest.raises(session_events.NotFound, match="no session"):
                session_events.find_session(reader, "0" * 64)


# -- Rows that are no sessions, many rows at once --------------------------------------------------


@quick
def test_reader_rows_that_are_no_session_hide_none(tmp_path, monkeypatch):
    """Another program's rows of the same session hide no good row, whatever their order."""
    good = row(1, "dev", "2026-05-01T00:00:00.000Z", ["r"])
    db = stored(tmp_path / "e.db", good)
    with contextlib.closing(sqlite3.connect(str(db))) as connection, connection:
        connection.executemany(
            "INSERT INTO session_events (id, identity_hash, session_id_hash, ended_at,"
            " plugin_version) VALUES (?, ?, ?, ?, '1')",
            [
                (-3, "", good["session_id_hash"], "2026-05-01T00:00:00.000Z"),
                (-2, "!", good["session_id_hash"], "2026-05-01T00:00:00.000Z"),
                (-1, "0" * 64, good["session_id_hash"], "never"),
            ])
    for most in (1, 1000):
        monkeypatch.setattr(session_events, "MOST_IDENTITIES", most)
        with session_events.reading(db) as reader:
            for digits in (64, 12):
                assert (
                    session_events.find_session(reader, good["session_id_hash"][:digits]).identity
                    == good["identity_hash"])


@quick
def test_reader_one_definition_of_a_session(tmp_path, monkeypatch):
    """Hostile and mutated cells are judged alike one by one, in chunks and by the database.

    The table has no types, and some text in it is not UTF-8.
    """
    good = list(row("good", discovery_refs_json='["a","b.c:d-e_f"]').values())
    assert session_events.is_session([0, *good])
    cells = [
        None, 5, -1, 2.5, 1e400, 1 << 62, True, "", "5", b"", "\n", "a" * 65, "A" * 64, "g" * 64]
    cells += [0, 10**6, 10**6 + 1, 10**9, 10**9 + 1]
    cells += ["0" * 64, "0" * 63, b"0" * 64, "0" * 64 + "\0", "\u0660" * 64, "1\n", "-", "é"]
    cells += [
        "[]", '["a"]', '["a", "b"]', '["a"', '["a",]', '["a","a"]', '[["a"]]', '{"a":"b"}', "null"]
    cells += [json.dumps(["a"] * n) for n in (200, 201)] + [
        '["a\\n"]', '["%s"]' % ("a" * 129), '[ "a" ]']
    moments = [
        "2026-05-22T12:34:56Z", "2026-05-22T12:34:56.000Z", "2026-05-22T12:34:56.5Z", "2026-05-22"]
    moments += ["2026-05-22T12:34:56.000z", "2026-05-22T12:34:56.000", "2026-02-30T00:00:00.000Z"]
    moments += [
        "2026-05-22T14:34:56.000+02:00", "2026-05-22T24:00:00.000Z", "0000-01-01T00:00:00.000Z"]
    moments += ["2026-05-22T12:34:60.000Z", "2026-06-31T00:00:00.000Z"]
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
            [*good[:n], int(cell) if n in (4, 5) and cell.isdigit() else cell, *good[n + 1 :]])
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
            "INSERT INTO session_events (%s) VALUES (?,?,?,?,?,?,?,?,?)" % ", ".join(row(0)), tried)
        # The look at many rows at once may be too strict, never too lax.
        connection.execute("CREATE INDEX moments ON session_events (ended_at)")
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as one:
        one.execute("CREATE TABLE session_events (id INTEGER PRIMARY KEY, %s)" % ", ".join(row(0)))
        sql = "INSERT INTO session_events VALUES (NULL, ?,?,?,?,?,?,?,?,?)"

        def sound(rows):
            one.execute("DELETE FROM session_events")
            one.executemany(sql, rows)
            return session_events.sound(list(zip(*one.execute("SELECT * FROM session_events"))))

        taken = 0
        for (r, fine), last in itertools.product(zip(tried, expected), ([good], [])):
            found = sound([good, r, *last])
            assert fine or not found, r
            taken += found
        assert taken > sum(expected) // 2
        short, long = (["0" * n, *good[1:]] for n in (63, 65))  # together as long as two
        assert not sound([short, long]) and not sound([long, short])
    for chunk in (1, 50, 1000):
        monkeypatch.setattr(session_events, "CHUNK", chunk)
        with session_events.reading(db) as reader:
            assert reader.count(every) == sum(expected) == len(list(reader.walk(every)))
            assert reader.left_out == len(tried) - sum(expected)
            activity = session_events.activity(reader, every)
            assert sum(day["sessions"] for day in activity["days"]) == sum(expected)
            assert len(list(session_events.exported(reader, every))) == sum(expected)
            assert session_events.graph(reader, every, -1)["totals"]["sessions"] == sum(expected)
            for listed in session_events.discoveries(reader, every, 3)["discoveries"]:
                one = session_events.discovery(reader, listed["discovery_id"], every)
                assert one["session_count"] == listed["session_count"]
    with contextlib.closing(sqlite3.connect(db)) as connection, connection:
        sql = "UPDATE session_events SET plugin_version = CAST(x'31fe' AS TEXT) WHERE id = ?"
        odd = max(n for n, fine in enumerate(expected, 1) if fine)
        connection.execute(sql, [odd])
    monkeypatch.setattr(session_events, "CHUNK", 50)
    with session_events.reading(db) as reader:
        assert reader.count(every) == sum(expected) - 1
        assert odd in reader.odd


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
    return (text(identity, "[0-9a-f]{64}")
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
            and text(version, "[0-9A-Za-z][0-9A-Za-z.+_-]{0,63}"))


def test_reader_the_fast_way_answers_like_the_careful_one(tmp_path, monkeypatch):
    """The answers are the same with and without rows that are no sessions.

    They are the same where each row is looked at alone, and without the index.
    """
    monkeypatch.setattr(session_events, "CHUNK", 20)
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
    bare = stored(tmp_path / "bare.db", *rows)
    with contextlib.closing(sqlite3.connect(bare)) as connection, connection:
        connection.execute("DROP INDEX idx_session_events_ended_at")
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

    judge = session_events.sound

    def answers(path, window, judge=judge):
        found, sound = [], set()

        def watched(*columns):
            sound.add(judge(*columns))
            return judge(*columns)

        monkeypatch.setattr(session_events, "sound", watched)
        with session_events.reading(path) as reader:
            for answer in ("sessions", "graph", "activity", "summary", "developers", "exported"):
                found.append(getattr(session_events, answer)(reader, window))
            found[-1] = list(found[-1])
            for sort in session_events.DISCOVERY_SORTS:
                found.append(session_events.discoveries(reader, window, 50, sort))
                for one in found[-1]["discoveries"]:
                    del one["last_aggregated_at"]
        return found, sound

    # Each filter meets each other one.
    for only, github, discovery in ((may, None, None), (may, True, "r1"), (may, False, None),
                                    (part, None, "r1"), (part, True, None), (part, False, "r1")):
        window = only._replace(github=github, discovery=discovery)
        fast, sound = answers(clean, window)
        assert sound == {True}
        mixed, sound = answers(beside, window)
        assert (mixed, sound) == (fast, {True, False})
        assert answers(clean, window, lambda *_: False) == (fast, {False})
        assert answers(bare, window) == (fast, {True})


@quick
def test_reader_files_with_other_indexes_and_types(tmp_path):
    """What another program declared changes neither the order nor what a session is."""
    rows = [row(n, who, refs=["a"]) for n, who in enumerate(("bob", "ann", "bob"))]
    for number, index in enumerate(
            ("(ended_at, %s)" % ", ".join(name for name in row(0) if name != "ended_at"),
             "(ended_at DESC, identity_hash DESC)", "(ended_at DESC)",
             "(ended_at) WHERE github_hash IS NULL", "(ended_at COLLATE NOCASE)")):
        db = stored(tmp_path / ("index%d.db" % number), *rows)
        for change in ("CREATE INDEX other ON session_events " + index,
                       "DROP INDEX idx_session_events_ended_at"):
            with contextlib.closing(sqlite3.connect(db)) as connection:
                connection.execute(change)
            with session_events.reading(db) as reader:
                listed = [s["session_id_hash"] for s in session_events.exported(
                    reader, session_events.EVER)]
                assert listed == [sha("session", n) for n in range(3)], (index, change)
                graph = session_events.graph(reader, session_events.EVER)
                assert graph["totals"]["hand_overs"] == 2
    db = str(tmp_path / "text.db")
    with contextlib.closing(sqlite3.connect(db)) as connection, connection:
        schema = (ROOT / "schema.sql").read_text(encoding="utf-8")
        connection.executescript(schema.replace("tool_count INTEGER", "tool_count TEXT"))
        for found in rows:
            connection.execute(
                "INSERT INTO session_events (%s) VALUES (%s)"
                % (", ".join(found), ", ".join("?" * len(found))), list(found.values()))
    with session_events.reading(db) as reader:
        found = session_events.sessions(reader, session_events.EVER)
        assert (found["total_count_in_window"], reader.left_out) == (0, 3)


@quick
def test_reader_counts_as_left_out_only_what_is_in_the_window(tmp_path):
    """A moment without a fraction widens what is read, and what is left out stays the same."""
    db = stored(tmp_path / "edge.db", row(1, at="2026-09-04T00:00:00Z"),
                row(2, at="2026-09-05T00:00:00.900Z", tool_count=-1))
    for until, left_out in (("2026-09-05T00:00:00.000Z", 0), ("2026-09-05T00:00:01.000Z", 1)):
        window = session_events.Window("2026-09-03T00:00:00.000Z", until)
        with session_events.reading(db) as reader:
            found = session_events.sessions(reader, window)
            assert (found["total_count_in_window"], reader.left_out) == (1, left_out)
            session_events.activity(reader, session_events.Window("", "0001-01-01T00:00:00.000Z"))


@quick
def test_reader_moments_without_a_fraction(tmp_path):
    """They sort by their instant in lists, cuts, first and last seen, and at a window's edges."""
    ended = [
        "12:00:00.500Z", "12:00:00Z", "12:00:00.000Z", "12:00:01Z", "11:59:59.999Z", "12:00:00Z",
        "12:00:01.250Z"]
    rows = [row(n, "d%d" % n, "2026-05-22T" + at, ["x"]) for n, at in enumerate(ended)]
    db = stored(tmp_path / "e.db", *rows)
    right = [sha("session", n) for n in (4, 1, 2, 5, 0, 3, 6)]
    key = {
        n: "2026-05-22T" + (at if len(at) == 13 else at[:-1] + ".000Z")
        for n, at in enumerate(ended)
    }
    with session_events.reading(db) as reader:
        window = session_events.Window(**MAY)
        assert [s["session_id_hash"] for s in session_events.exported(reader, window)] == right
        assert session_events.last_event(reader) == key[6]
        for limit in range(1, 8):
            listed = session_events.sessions(reader, window, limit)["sessions"]
            assert [s["session_id_hash"] for s in listed] == right[::-1][:limit]
        path = session_events.discovery(reader, "x", window)["path"]
        assert [s["session_id_hash"] for s in path] == right
        edges = session_events.graph(reader, window)["edges"]
        assert [e["target"] for e in edges] == right[1:]
        assert (
            session_events.discoveries(reader, window)["discoveries"][0]["last_seen_at"] == key[6])
        times = [*key.values(), "2026-05-22T12:00:00.250Z", "2026-05-22T12:00:00.001Z"]
        for since, until in itertools.product(times, times):
            inside = {sha("session", n) for n in key if since <= key[n] < until}
            window = session_events.Window(since, until)
            found = [
                s["session_id_hash"] for s in session_events.sessions(reader, window)["sessions"]]
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
        expected.append({"discovery_id": ref, "session_count": len(touched),
                         "distinct_identity_count": len({r["identity_hash"] for r in touched}),
                         "first_seen_at": touched[0]["ended_at"],
                         "last_seen_at": touched[-1]["ended_at"], "developer_count": len(firsts),
                         "hours_to_second_developer": hours_between(touched[0]["ended_at"], second),
                         "half_life_hours": hours_between(touched[0]["ended_at"], half)})
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
        hours_between(firsts[ref], sorted(d.values())[1]) for ref, d in reach.items() if len(d) > 1]
    far = min(reach,
              key=lambda ref: (-len(reach[ref]), -sum(ref in r for r in refs), ref), default=None)
    assert (found["sessions"], found["developers"]) == (len(inside), len(developers))
    assert (found["discoveries"], found["shared_discoveries"]) == (len(reach), len(waits))
    assert (found["tokens_saved"], found["tool_count"]) == (
        sum(tokens), sum(r["tool_count"] for r in inside))
    assert found["hand_overs"] == sum(given.values())
    assert found["furthest"] == ({"discovery_id": far, "developers": len(reach[far]),
                                  "hours": hours_between(firsts[far], max(reach[far].values()))}
                                 if far
                                 else None)
    share = round(sum(built) / len(inside), 4) if inside else None
    assert found["built_on_others"] == {"sessions": sum(built), "share": share}
    assert found["tokens_saved_median"] == {
        "built_on_others": middle([t for t, b in zip(tokens, built) if b]),
        "others": middle([t for t, b in zip(tokens, built) if not b])}
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
        (shown[a], shown[b]): n for (a, b), n in given.items()}


def stranger(chance, path):
    """(path of a small database of another program, the sessions in it in time order).

    Its columns have no types and another collation. One identity has two GitHub hashes.
    Some cells break a rule.
    """
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
            % (columns + ", received_at"))
        for n, one in enumerate(rows):
            sql = "INSERT INTO session_events (id, %s) VALUES (?,?,?,?,?,?,?,?,?,?)" % ", ".join(
                one)
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


@quick
def test_reader_databases_of_other_programs(tmp_path):
    """Random small ones give the reference's figures. The reference sees only the sessions."""
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
                    inside)
                if inside:
                    check_discoveries(reader, window, inside, who)
                check_figures(reader, window, rows, inside, who)


@quick
def test_reader_ticks_are_round_moments():
    """A time axis has hours, days, Mondays, months, quarters or years, as its span asks for."""
    day = 86_400_000
    for start, days, first, second, count in (
        ("2026-05-20T10:20:00Z", 1 / 3, "11:00", "12:00", 8),
        ("2026-05-20T10:20:00Z", 10, "21 May", "22 May", 10),
        ("2026-05-20T10:20:00Z", 30, "25 May", "1 Jun", 4),  # Mondays
        ("2026-05-25T00:00:00Z", 28, "25 May", "1 Jun", 5),  # both ends
        ("2026-05-20T10:20:00Z", 200, "Jun 2026", "Jul 2026", 7),
        ("2026-05-20T10:20:00Z", 900, "Q3 2026", "Q4 2026", 10),
        ("2026-05-20T10:20:00Z", 4000, "2027", "2028", 11),
    ):
        begun = session_events.instant(start)
        ticks = session_events.ticks_of(begun, int(days * day))
        labels = [label for _, label in ticks]
        assert (labels[0], labels[1], len(labels)) == (first, second, count), days
        assert begun <= ticks[0][0] and ticks[-1][0] <= begun + days * day


@quick
def test_reader_words_and_numbers():
    for found, expected in (
        (session_events.lasting(24 * 26_334), "26,334 days"),
        (session_events.median_text(12_345_678.0), "12,345,678"),
        (session_events.median_text(12_345_678.5), "12,345,678.5"),
        (session_events.median_text(None), "-"),
        (session_events.wrapped(["a-" * 30 + " " + "b-c" * 40]), "%s\n%s\n" % (
            "a-" * 30, "b-c" * 40)),
        (session_events.cold_start_words({"developers": 1, "sessions": 1234567.0, "never": 0}),
         "1 developer was new in this window. Own sessions before the first that built on"
         " somebody else's discovery: 1,234,567 (median)."),
    ):
        assert found == expected


@quick
def test_reader_links_keep_the_window(tmp_path):
    """Every link to a developer or a discovery leads to the window that its page stands for."""
    filters = session_events.Filters
    for asked, query in (
        (filters(), "?days=7"),
        (filters(30, github="true"), "?days=30&github=true"),
        (filters(30, until="2026-05-05"), "?days=30&until=2026-05-05"),
        (filters(30, "2026-05-01"), "?since=2026-05-01"),
        (filters(7, "2026-05-01", "2026-06-01", "", "x"),
         "?since=2026-05-01&until=2026-06-01&discovery=x"),
    ):
        assert asked.query() == query
    may = filters(since="2026-05-01", until="2026-06-01", discovery="x")
    said, every = may.query(), may._replace(discovery="").query()
    around = "?since=2026-03-28T11:00:00.000Z&until=2026-06-26T11:00:00.000Z"
    between = "?since=%s&until=%s" % (STORY[0]["ended_at"], STORY[4]["ended_at"].replace(
        ".000", ".001"))
    with session_events.reading(stored(tmp_path / "e.db", *STORY)) as reader:
        for page, to, expected in (
            (session_events.sessions_page(reader, may), "developer", said),
            (session_events.developers_page(reader, may), "developer", said),
            (session_events.developer_page(reader, ANN[:8], may), "developer", said),
            (session_events.replay_page(reader, may), "developer", said),
            (session_events.session_page(reader, sha("session 4")), "developer", around),
            (session_events.discoveries_page(reader, may, "name"), "discovery", every),
            (session_events.discovery_page(reader, "x", may, False), "developer", every),
            (session_events.discovery_page(reader, "x", may, True), "developer", between),
        ):
            links = re.findall('href="/%s[/?][^?"]*?([?&][^"]*)"' % to, page)
            links = {"?" + html.unescape(link).replace("%3A", ":")[1:] for link in links}
            assert links == {expected}
        page = session_events.discoveries_page(reader, may, "name")
        assert "discovery=" not in page and "sessions that touched" not in page


@quick
def test_reader_charts_have_the_last_days(tmp_path):
    rows = [row(n, at="%s-01T10:00:00.000Z" % month, tokens_saved=n)
            for n, month in enumerate(("2020-01", "2024-01", "2026-05"), 5)]
    with session_events.reading(stored(tmp_path / "e.db", *rows)) as reader:
        for since, until, first, last, bars in (
            ("2020-01-01", "2026-05-02", "2024-02-22", "2026-05-01", ["M998.8 100V0h1V100z"]),
            ("2026-05-01", "2026-05-03", "2026-05-01", "2026-05-02", ["M0 100V0h498V100z"]),
            ("2026-05-01T05:00:00Z", "2026-05-02T05:00:00Z", "2026-05-01", "2026-05-02",
             ["M0 100V0h498V100z"]),
        ):
            page = session_events.activity_page(
                reader, session_events.Filters(since=since, until=until))
            ends = re.findall('class="ends"><span>(.*?)</span><span>(.*?)</span>', page)
            assert ends == [(first, last)] * 3
            assert re.findall('aria-label="[^"]*"><path d="([^"]*)"', page) == bars * 3


@quick
def test_reader_lists_three_discoveries_and_counts_the_rest():
    for count, rest in ((0, ""), (3, ""), (4, " +1"), (9, " +6")):
        shown = session_events.discovery_links(["r%d" % n for n in range(count)])
        assert (shown.count("<a "), shown.rpartition("</a>")[2]) == (min(count, 3), rest)


@quick
def test_reader_developers_that_look_alike(tmp_path):
    """No label has more than 12 digits, however many a sender's hash shares with a victim's.

    Each label is one developer's, in an export, in a table and in the address of its page.
    """
    for tails, expected in (
        (("0", "1"), ("00000000", "10000000")),
        (("000000000", "000000001"), ("000000000", "000000001")),
        (("0" * 11 + "1", "0" * 11 + "2", "0" * 10 + "1"),
         ("0" * 11 + "1", "0" * 11 + "2", "0" * 10 + "10")),
        (("0" * 12, "0" * 11 + "1", "0" * 63 + "1"), ("0" * 12, "0" * 11 + "1", "0" * 12 + "-2")),
        (("0" * 63 + "3", "0" * 63 + "1", "0" * 63 + "2"),
         ("0" * 12, "0" * 12 + "-2", "0" * 12 + "-3")),  # as they come: their order tells nothing
    ):
        keys = [tail.ljust(64, "0") for tail in tails]
        assert session_events.labels(keys) == dict(zip(keys, expected))
    twins = [ANN[:63] + digit for digit in "0123456789abcdef"]
    assert ANN in twins
    rows = [row(n, n, "2026-05-10T10:00:00.000Z", ["x"], github_hash=twin, tool_count=1000 + n)
            for n, twin in enumerate(twins)]
    db = stored(tmp_path / "e.db", *rows, row("z", "z", "2026-05-11T10:00:00.000Z"))
    filters = session_events.Filters(since="2026-05-01", until="2026-06-01")
    with session_events.reading(db) as reader:
        listed = session_events.exported(reader, filters.window())
        names = {s["tool_count"]: s["developer"] for s in listed}
        assert names.pop(10) == sha("login z")[:8] and len(set(names.values())) == 16
        for answer, rows_of in ((session_events.sessions, "sessions"),
                                (session_events.graph, "nodes"),
                                (session_events.developers, "developers")):
            for found in answer(reader, filters.window())[rows_of]:
                assert found["developer"] == names.get(found["tool_count"], sha("login z")[:8])
        for filtered in (filters, filters._replace(discovery="x")):
            for calls, label in names.items():
                page = session_events.developer_page(reader, label, filtered)
                assert re.findall('data-t="calls">([^<]*)<', page) == ["{:,}".format(calls)] * 2
        page = session_events.developer_page(reader, ANN[:8], filters)
        assert page.count('data-t="calls"') == 16 == len(set(re.findall("/developer/[^?]*", page)))
        for unknown in (ANN[:13], ANN, ANN[:12] + "-", ANN[:12] + "-2x", ANN[:7]):
            with pytest.raises(session_events.NotFound):
                session_events.developer_page(reader, unknown, filters)


# -- Hostile rows ----------------------------------------------------------------------------------


HOSTILE_REFS = ["</script><script>document.title='owned'</script>",
                "\"'><img src=x onerror=\"document.title='owned'\">", "\u202egnp.exe\u2066",
                "\x1b]0;owned\x07\x1b[31m", '=HYPERLINK("http://example.com")', "<!--", "\\",
                "a\nb\rc\x00d", "\U0001f600", "&amp;&#60;", "x" * 5000]
JUNK = (None, 5, -1, 2.5, 10**18, b"\xff\x00", "", "zzzz", "</script>", "\x1b[2J",
        "2026-05-99T00:00:00.000Z")


def hostile_rows():
    """A row with every hostile discovery, and a row for each junk in each column."""
    rows = [row("hostile", "mallory", "2026-05-20T10:00:00.000Z", HOSTILE_REFS)]
    refs = ["[[[[", "{}", '[1, null, {"a": []}, "kept"]', "null", "[" * 100000, '["\\ud800"]']
    refs += ['[ "x", "\\u0079" ]', json.dumps(["x"] * 201)]
    rows += [
        row("refs %d" % n, "mallory", "2026-05-20T11:00:00.000Z", discovery_refs_json=text)
        for n, text in enumerate(refs)
    ]
    for column in row(0):
        for n, junk in enumerate(JUNK):
            rows.append(row("%s %d" % (column, n), "mallory", "2026-05-20T12:00:00.000Z", ["x"],
                            **{column: junk}))
    return rows


# Those of them that are sessions: NULL where it may be, and numbers that the column makes text.
KEPT = (
    "refs 6", "github_hash 0", "branch_sha 0", "tool_count 1", "tokens_saved 1", "plugin_version 1")
KEPT += ("plugin_version 3", "plugin_version 4", "plugin_version 7", "branch_sha 4")


def looser(db):
    """A table like the contract's without its constraints, as a careless program could make it."""
    with contextlib.closing(sqlite3.connect(str(db), isolation_level=None)) as connection:
        schema = ((ROOT / "schema.sql").read_text().replace(
                      " NOT NULL", "").replace("UNIQUE INDEX", "INDEX"))
        connection.executescript(schema)
        connection.execute("DROP TRIGGER session_events_discoveries_insert")
        for r in hostile_rows():
            connection.execute("INSERT INTO session_events (%s) VALUES (%s)"
                               % (", ".join(r), ", ".join("?" * len(r))), list(r.values()))
        connection.executescript(schema)
        connection.execute("INSERT INTO session_discoveries VALUES (?, 1), (?, 2)", (b"\xff", 7.5))
        connection.execute(
            "UPDATE session_events SET plugin_version = CAST(x'fffe' AS TEXT) WHERE id = 1")
    return str(db)


def commands(db, session):
    """Every reading command in every form."""
    asked = {"sessions": [], "session": [session], "discoveries": [], "discovery": ["x"],
             "graph": [], "activity": [], "developers": [], "summary": [], "export": []}
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


@quick
def test_reader_hostile_rows_change_nothing(tmp_path, capfdbinary):
    """Every command leaves out what is no session, and counts it. It shows no hostile cell."""
    db = looser(tmp_path / "hostile.db")
    for name, form, argv in commands(db, sha("session refs 6")):
        status, out, err = answered(capfdbinary, argv)
        assert status == 0, (name, form, err)
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u206f\ud800-\udfff]", out), (
            name, form)
        if form == "json":
            json.loads(out)
        if form == "jsonl":
            assert all(json.loads(line) for line in out.splitlines())
        if form == "csv":
            assert not re.search(r"(?m)(^|,)\"?[=+@]", out), name
        if form == "html":
            assert out.lower().count("<script") == out.lower().count("</script") == 2
            assert "<img" not in out
    filters = session_events.Filters(since="2026-05-01", until="2026-06-01")
    with session_events.reading(db) as reader:
        pages = [session_events.replay_page(reader, filters),
                 session_events.sessions_page(reader, filters),
                 session_events.discoveries_page(reader, filters, "recent")]
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


# -- Command line and forms ------------------------------------------------------------------------


@quick
def test_reader_what_it_refuses(tmp_path, capfdbinary):
    """A file that is no session-event store gets one line that says why, and exit status 1."""
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

    changed("v0.db", "PRAGMA user_version = 0", "DROP TABLE session_discoveries")
    changed("v2.db", "PRAGMA user_version = 2")
    changed("lacks.db", "DROP TABLE session_discoveries")
    changed("column.db", "DROP TABLE session_discoveries",
            "CREATE TABLE session_discoveries (discovery_ref)")
    columns = ", ".join(row(0))
    keyless = "CREATE TABLE session_events (id, %s, received_at)" % columns
    changed("key.db", "DROP TABLE session_events", keyless)
    for name, says in (
        ("key.db", "the column id of its table session_events is no INTEGER PRIMARY KEY"),
        ("none.db", "No such file"),
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
        (["sessions", "--db", good, "--since", "2026-05-02", "--until", "2026-05-01"],
         "must be after", 2),
        (["sessions", "--db", good, "--since", "2020-01-01", "--until", "2020-02-01"],
         "No session ended in this window. The last one ended", 0),
        (["discoveries", "--db", stored(tmp_path / "bare.db", row(1)), *IN_MAY],
         "No session of this window touched a discovery.", 0),
        (["export", "--db", good, "--until", "2020-02-01"], "No session ended", 0),
        (["sessions", "--db", good, "--discovery", "nobody", *IN_MAY],
         "No session of this kind ended in this window. The last one of any kind", 0),
    ):
        status, out, err = answered(capfdbinary, argv)
        assert (status, says in err) == (expected, True), (argv, err)
    for argv in ([], ["sessions"],
                 ["sessions", "--db", good, "--days", "0"],
                 ["sessions", "--db", good, "--days", "x"],
                 ["view", "--db", good, "--port", "65536"]):
        with pytest.raises(SystemExit) as stopped:
            session_events.main(argv)
        assert stopped.value.code == 2


@quick
def test_reader_an_ambiguous_prefix_says_which(tmp_path, capfdbinary):
    hashes = ["abcd1" + "0" * 59, "abcd2" + "0" * 59, "abcd2" + "1" * 59]
    db = stored(tmp_path / "e.db", *[row(n, session_id_hash=h) for n, h in enumerate(hashes)])
    status, _, err = answered(capfdbinary, ["session", "abcd", "--db", db])
    assert status == 1 and "3 sessions start with these digits" in err and hashes[1][:16] in err
    status, out, _ = answered(capfdbinary, ["session", "ABCD1", "--db", db])
    assert status == 0 and hashes[0] in out


@quick
def test_reader_forms_for_people_and_programs(tmp_path, capfdbinary):
    rows = [*STORY,
            row("wide", "dee", "2026-05-30T00:00:00.000Z", ["r" * 128] * 3, tool_count=10**6,
                tokens_saved=10**9),
            *[row(100 + n, "dev%d" % n, "2026-05-25T00:00:00.000Z", ["x"]) for n in range(30)]]
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
    assert "in this window 35 sessions, in as many days before 1" in texts["activity", "text"]
    dot = texts["graph", "dot"]
    assert '"%s" -> "%s" [label="x" color' % (sha("session 1"), sha("session 2")) in dot
    assert dot.count("{") == dot.count("}")
    assert "default-src 'none'" in texts["graph", "html"]
    assert 'href="/' not in texts["graph", "html"]


@quick
def test_reader_dot_of_a_graph_without_nodes(tmp_path, capfdbinary):
    """Graphviz can read what comes out as an empty drawing. It is no error and no empty file."""
    db = stored(tmp_path / "e.db")
    status, out, err = answered(capfdbinary, ["graph", "--db", db, "--format", "dot"])
    first, settings, last = out.splitlines()
    assert (status, first, last) == (0, "digraph sessions {", "}"), err
    assert settings.endswith("]")


def test_reader_as_a_program(tmp_path):
    """The one file runs alone, without site-packages. Its help has an example.

    A reader of its output may leave early.
    """
    shutil.copy(str(ROOT / "session_events.py"), str(tmp_path))
    for python in {PYTHONS[min(PYTHONS)], PYTHONS[max(PYTHONS)]}:
        done = subprocess.run([python, "-I", "-S", "session_events.py", "demo", "--db",
                               "demo%s.db" % abs(hash(python))], cwd=str(tmp_path),
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=60)
        assert done.returncode == 0 and b"synthetic" in done.stdout
    first, *others = [
        read("export", "--days", 60, "--db", path).stdout for path in tmp_path.glob("*.db")]
    assert len(first) > 50_000 and all(
        other == first for other in others
    )  # the same in each Python
    commands = [[], *([name] for name in (*session_events.QUESTIONS, *session_events.ACTIONS))]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for done in pool.map(lambda command: read(*command, "--help"), commands):
            assert "example: python3 session_events.py" in done.stdout
    db = next(iter(tmp_path.glob("*.db")))
    again = read("demo", "--db", db)
    assert again.returncode == 1 and "is there already" in again.stderr
    process = subprocess.Popen(program("session_events", "export", "--days", 60, "--db", db),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 128 + signal.SIGPIPE and process.stderr.read() == b""
    process.stderr.close()
    for end, said in ((">/dev/full", "cannot go on: No space left on device"),
                      (">&-", "standard output is closed")):
        for command in ("sessions", "export") if os.path.exists("/dev/full") else ():
            argv = program("session_events", command, "--days", 60, "--db", db)
            done = run(["bash", "-c", " ".join([*map(shlex.quote, argv), end])])
            assert (done.returncode, done.stderr) == (1, "session_events: %s\n" % said)


# -- The database file -----------------------------------------------------------------------------


# A program that says at its end how much memory it took at most, in KiB.
PEAK = """import atexit
def said():
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(peak.split()[1], file=sys.stderr)
atexit.register(said)
"""


def test_reader_export_in_constant_memory(tmp_path):
    """Six times the rows need hardly more memory. A terminal sees how far the command is."""
    peaks = []
    for count in (2_500, 15_000):
        db = stored(
            tmp_path / ("%d.db" % count),
            *(
                row(n, n % 50, "2026-05-22T%02d:%02d:%02d.000Z" % (n // 3600, n // 60 % 60, n % 60))
                for n in range(count)
            ),
        )
        if os.path.exists("/proc/self/status"):
            done = subprocess.run(
                program("session_events", "export", "--db", db, *IN_MAY, before=PEAK),
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=120)
            assert done.returncode == 0 and done.stdout.count(b"\n") == count
            peaks.append(int(done.stderr))
    assert (
        not peaks or peaks[1] < peaks[0] + 7_000
    )  # KiB; 12,500 rows as Python objects would be 17,000
    if hasattr(os, "openpty"):
        ours, theirs = os.openpty()
        subprocess.run(program("session_events", "export", "--db", db, *IN_MAY),
                       stdout=subprocess.DEVNULL, stderr=theirs, timeout=120)
        os.close(theirs)
        shown = os.read(ours, 1 << 16)
        assert b"\r5,000 of 15,000 sessions\r10,000 of" in shown
        assert shown.endswith(b"\r15,000 of 15,000 sessions\r\n")
        os.close(ours)


def test_reader_every_condition_of_the_file(tmp_path, monkeypatch):
    """The server writes, has ended or was killed; the folder is read-only; the file is locked."""
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
    emptied = tmp_path / "emptied"  # a -wal file without a change in it
    shutil.copytree(str(folder), str(emptied))
    (emptied / "e.db-wal").touch()
    sealed = [forked_count(path) for path in (folder, emptied, copied)]
    assert sealed[:2] == ["4", "4"], sealed
    assert "-wal file" in sealed[2], sealed  # never the old state as if it were the new one

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


@quick
def test_reader_queries_use_the_indexes(tmp_path):
    """No plan reads the whole table or sorts a window, so answers stay fast at a million rows."""
    db = stored(tmp_path / "e.db", *STORY)
    plans = []
    with session_events.reading(db) as reader:
        rows = reader.rows

        def watched(sql, values=()):
            steps = [line[3] for line in rows("EXPLAIN QUERY PLAN " + sql, values)]
            plans.extend((sql, s.decode() if isinstance(s, bytes) else s) for s in steps)
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
        assert "TEMP B-TREE" not in step, sql


# -- The viewer ------------------------------------------------------------------------------------


def http(address, path="/", headers=(), method="GET", raw=None):
    """(status, headers, body) of one exchange with a viewer. `raw` bytes replace the request."""
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
    return (int(first.split()[1]),
            {k.lower(): v for k, v in (f.split(": ", 1) for f in fields)}, body.decode())


class View:
    """A real `session_events.py view` process: its `.address`, its `.url` with a one-time token."""

    def __init__(self, db, *flags, **variables):
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")
        }
        environment.pop(session_events.ADMIN_TOKEN_VARIABLE, None)
        command = program("session_events", "view", "--db", db)
        if not db:  # as a person starts it
            command = [sys.executable, str(ROOT / "session_events.py"), "demo"]
        self.process = subprocess.Popen(
            [*command, "--port", "0", *flags],
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
        assert status == 200
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
    """The token opens once. Without the cookie or under another name nothing is shown.

    No other site is allowed anything.
    """
    db = stored(tmp_path / "e.db", *STORY)
    with View(db) as view:
        inside = [
            (path, "x")
            for path in (
                "/",
                "/sessions",
                "/session/" + sha("session 1"),
                "/discovery/x",
                "/nowhere",
            )
        ]
        refused = {http(view.address, path)[::2] for path, _ in inside}
        # The same answer, whether the page exists or not.
        assert len(refused) == 1 and next(iter(refused))[0] == 403
        assert http(view.address, "/?token=wrong")[0] == 403
        # A HEAD, as link previews and proxies send it, does not use the ticket up.
        status, headers, _ = http(view.address, view.url[len(view.base) :], (), "HEAD")
        assert status == 403 and "set-cookie" not in headers
        status, headers, body = http(view.address, view.url[len(view.base) :] + "&days=30")
        assert status == 200 and 'content="0;url=/?days=30"' in body
        assert re.fullmatch(r"session_events_%d=[\w-]{32}; Path=/; HttpOnly; SameSite=Strict"
                            % view.address[1], headers["set-cookie"])
        cookie = {"Cookie": "other=1; " + headers["set-cookie"].split(";")[0]}
        for guess in ("=", "=x", "=" + "A" * 32, ""):
            assert (http(view.address, "/",
                         {"Cookie": "session_events_%d%s" % (view.address[1], guess)})[0]
                    == 403)
        assert http(view.address, view.url[len(view.base) :])[0] == 403  # the ticket was used
        # ... but for who is inside already
        assert http(view.address, view.url[len(view.base) :], cookie)[0] == 200
        for host in ("[::1]", "evil.example", "evil.example:%d" % view.address[1],
                     "127.0.0.1.evil.example", "", "localhost@evil"):
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
        assert headers["cache-control"] == "no-store"
        assert headers["referrer-policy"] == "no-referrer"
        assert not any(name.startswith("access-control") for name in headers)
        for path, expected in (
            ("/sessions", 200),
            ("/discoveries?sort=nonsense&days=x", 200),
            ("/activity", 200),
            ("/session/" + sha("session 1"), 200),
            ("/session/" + "0" * 64, 404),
            ("/session/", 404),
            ("/discovery/x", 200),
            ("/discovery/%ff%00", 404),
            ("/discovery", 404),
            ("/nowhere", 404),
            ("//evil.example/", 404),
            ("/?since=%FF&until=2026-99-99&github=3", 200),
            ("/?" + "&".join("a%d=1" % n for n in range(99)), 200),
        ):
            assert http(view.address, path, cookie)[0] == expected, path
        status, headers, body = http(view.address, "/sessions", cookie, "HEAD")
        assert (status, body) == (200, "") and int(headers["content-length"]) > 1000
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "PATCH", "PROPFIND", "BREW"):
            status, headers, _ = http(view.address, "/", cookie, method)
            assert (status, headers["allow"]) == (405, "GET, HEAD")
        for raw in (b"\x16\x03\x01\x02\x00\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
                    b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\n\r\n",
                    b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n"):
            status, headers, body = http(view.address, raw=raw)
            assert status >= 400 and body == "The request is not understood.\n"
            assert headers["server"] == "session-events"
        taken = read("view", "--db", db, "--port", view.address[1])
        assert taken.returncode == 1 and "--port 0" in taken.stderr
    assert (view.status, view.complaints) == (0, "")


def tunnel(address):
    """The port of a relay to `address`, as `ssh -L` makes one; it lives as long as the tests."""

    class Through(socketserver.BaseRequestHandler):
        def handle(self):
            with socket.create_connection(address) as far:
                ends = {self.request: far, far: self.request}
                while True:
                    for ready in select.select(list(ends), [], [])[0]:
                        data = ready.recv(1 << 16)
                        if not data:
                            return
                        ends[ready].sendall(data)

    relay = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Through)
    relay.daemon_threads = True
    threading.Thread(target=relay.serve_forever, daemon=True).start()
    return relay.server_address[1]


# A browser in the foreground. It notes its arguments and the file modes, and stays until told.
FOREGROUND = """import os, sys, time, urllib.request
said, file = sys.argv[1], urllib.request.url2pathname(sys.argv[2].partition("://")[2])
with open(said + ".new", "w") as out:
    print(" ".join(sys.argv), oct(os.stat(file).st_mode), file=out)
    print(oct(os.stat(os.path.dirname(file)).st_mode), file=out)
os.rename(said + ".new", said)
parent = os.getppid()
while not os.path.exists(said + ".go") and os.getppid() == parent:
    time.sleep(0.02)
"""


def test_reader_opens_a_browser_that_nobody_can_forestall(tmp_path, chromium):
    """No command line holds the ticket: a private file does, until the ticket is used.

    The pages answer while the browser is in the foreground. The address works through a tunnel.
    """
    db = stored(tmp_path / "e.db", *STORY)
    (tmp_path / "browser.py").write_text(FOREGROUND)
    said = tmp_path / "said"
    browser = "%s %s %s %%s" % (sys.executable, tmp_path / "browser.py", said)
    with View(db, "--open", BROWSER=browser, TMPDIR=str(tmp_path)) as view:
        until(said.exists)
        first, folder = said.read_text().splitlines()
        address, mode = first.split()[-2:]
        assert address.startswith("file://") and (mode, folder) == ("0o100600", "0o40700")
        assert view.url.partition("token=")[2] not in first
        chromium.events = []
        chromium.enter(address)
        assert chromium.js("location.href") == view.base + "/"
        assert not os.path.exists(urllib.request.url2pathname(address.partition("://")[2]))
        assert chromium.complaints() == []
        Path(str(said) + ".go").touch()
    assert (view.status, view.complaints) == (0, "")
    assert [path for path in tmp_path.iterdir() if path.name.startswith("session-events")] == []
    with View(db) as view:
        hint = "".join(view.process.stdout.readline().decode() for _ in range(3))
        assert "ssh -L {0}:127.0.0.1:{0} HOST".format(view.address[1]) in hint
        port = tunnel(view.address)
        chromium.enter(view.url.replace(str(view.address[1]), str(port)) + "&days=9999")
        assert chromium.js("location.href") == "http://127.0.0.1:%d/?days=9999" % port
        chromium.follow(lambda: chromium.js("document.querySelectorAll('nav a')[1].click()"))
        assert chromium.js("location.pathname") != "/" and chromium.complaints() == []


def test_reader_the_endpoints_to_the_letter(tmp_path):
    """They answer as README, Contract 7 says, line by line."""
    now = datetime.datetime.now(datetime.timezone.utc)

    def ago(days, **more):
        return (now - datetime.timedelta(days=days, **more)).strftime("%Y-%m-%dT%H:%M:%S.000Z")

    rows = [
        row(n, "ann", ago(0, minutes=n), ["x", "r%d" % n], github=n % 2 == 0) for n in range(1, 61)]
    rows += [row("d%d" % days, "bob", ago(days), ["x"]) for days in (6, 8, 29, 31, 89, 91)]
    db = stored(tmp_path / "e.db", *rows)
    secret = "a token"
    with View(db) as view:
        for path in ("/admin/sessions", "/admin/sessions/" + sha("session 1"),
                     "/admin/discoveries/propagation"):
            for headers in (
                    {}, {"Authorization": "Bearer " + secret}, {"Cookie": view.process and "x=1"}):
                status, _, body = http(view.address, path, headers)
                assert status == 503 and sorted(json.loads(body)) == ["error", "requestId"]
                assert (json.loads(body)["error"]
                        == "Endpoint disabled (admin trigger token not configured)")
    with View(db, **{session_events.ADMIN_TOKEN_VARIABLE: secret}) as view:
        allowed = {"Authorization": "Bearer " + secret}

        def get(path, headers=allowed):
            status, _, body = http(view.address, path, headers)
            body = json.loads(body)
            assert re.fullmatch("[0-9a-f]{32}", body.pop("requestId"))
            return status, body

        for wrong in ({}, {"Authorization": "Bearer b token"}, {"Authorization": "Bearer a"},
                      {"Authorization": secret}, {"Authorization": "Bearer " + secret * 2},
                      {"Authorization": "Basic " + secret}, {"Authorization": "Bearer "},
                      {"Authorization": "Bearer \xff"}, {"Cookie": view.cookie()}):
            for path in ("/admin/sessions", "/admin/sessions/zzz", "/admin/nowhere"):
                assert get(path, wrong) == (401, {"error": "Unauthorized"}), wrong
        status, body = get("/admin/sessions")
        assert status == 200 and sorted(body) == ["sessions", "total_count_in_window"]
        assert body["total_count_in_window"] == 61 and len(body["sessions"]) == 50
        assert body["sessions"][0] == {
            "session_id_hash": sha("session 1"), "identity_hash_prefix": sha("identity ann")[:8],
            "github_hash_prefix": None, "ended_at": rows[0]["ended_at"], "tool_count": 10,
            "tokens_saved": 100, "branch_sha": "abc123def456",
            "discovery_refs": ["x", "r1"]}
        assert [s["ended_at"] for s in body["sessions"]] == sorted(
            (s["ended_at"] for s in body["sessions"]), reverse=True)
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
            ("days=0000000007&limit=0000000003", 61, 3),
        ):
            status, body = get("/admin/sessions?" + query)
            answer = (status, body["total_count_in_window"], len(body["sessions"]))
            assert answer == (200, total, listed), query[:40]
        status, body = get("/admin/sessions/" + sha("session d8"))
        assert status == 200 and sorted(body) == ["related", "session"]
        assert body["session"]["session_id_hash"] == sha("session d8")
        assert "developer" not in body["session"]
        assert [s["session_id_hash"] for s in body["related"]] == [
            sha("session d6"), sha("session d29")]
        assert len(get("/admin/sessions/" + sha("session 1"))[1]["related"]) == 50
        for unknown in ("0" * 64, "zzz", sha("session 1")[:63], sha("session 1") + "0",
                        sha("session 1").upper(), "%00", sha("session 1") + "%0a", ""):
            assert get("/admin/sessions/" + unknown) == (404, {"error": "Not found"}), unknown
        status, body = get("/admin/discoveries/propagation")
        assert status == 200 and len(body["discoveries"]) == 50
        first = body["discoveries"][0]
        assert sorted(first) == ["discovery_id", "distinct_identity_count", "first_seen_at",
                                 "last_aggregated_at", "last_seen_at", "session_count"]
        assert (first["discovery_id"], first["session_count"]) == ("x", 66)
        assert first["distinct_identity_count"] == 2
        assert (first["first_seen_at"], first["last_seen_at"]) == (
            rows[-1]["ended_at"], rows[0]["ended_at"])
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
    """README, Contract 8, for the reading side: no output has more than 12 digits of a developer.

    No log is written.
    """
    other = min(set("012") - {ANN[-1], CAY[-1]})
    near = [  # neighbours of ann and cay, who would lengthen their labels
        row("near", "eve", STORY[2]["ended_at"], ["x"], github_hash=ANN[:63] + other),
        row("nearer", "eve", STORY[2]["ended_at"], ["x"], False, identity_hash=CAY[:63] + other)]
    db = stored(tmp_path / "e.db", *STORY, *near)
    whole = [sha(kind, who)[:13] for kind in ("identity", "login") for who in ("ann", "bob", "cay")]
    outputs = [
        "".join(answered(capfdbinary, argv)[1:]) for _, _, argv in commands(db, sha("session", 1))]
    with View(db, **{session_events.ADMIN_TOKEN_VARIABLE: "t"}) as view:
        headers = {"Cookie": view.cookie(), "Authorization": "Bearer t"}
        for path in ("/?days=9999", "/sessions?days=9999", "/session/" + sha("session 1"),
                     "/discoveries?days=9999", "/discovery/x", "/developers?days=9999",
                     "/developer/%s?days=9999" % ANN[:12], "/save?days=9999&t=x&d=x",
                     "/activity?days=9999", "/admin/sessions?days=90",
                     "/admin/sessions/" + sha("session 1"), "/admin/discoveries/propagation"):
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


# -- The pages in a browser ------------------------------------------------------------------------


class Chromium:
    """A headless Chromium with one tab, driven over its pipe.

    The DevTools protocol there is JSON, parted by NUL bytes.
    """

    FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync",
             "--disable-extensions", "--disable-default-apps", "--metrics-recording-only",
             "--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-pipe")

    def __init__(self, program, profile):
        ours, theirs = (
            os.pipe(),
            os.pipe(),
        )  # what the test says, what the browser says: its 3 and its 4
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (ours[0], theirs[1])]
        self.process = subprocess.Popen(
            [program, *self.FLAGS, "--user-data-dir=%s" % profile,
             "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "about:blank"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            pass_fds=(3, 4),
            preexec_fn=lambda: (os.dup2(ends[0], 3), os.dup2(ends[1], 4)))
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
        # First away: where only the part behind # is another, nothing would be loaded.
        for address in ("about:blank", url) if "#" in url else (url,):
            self.loaded(self.call("Page.navigate", url=address)["loaderId"].__eq__)

    def enter(self, url):
        """Opens the address with the ticket, and waits for the page to which that goes on."""
        self.open(url)

        def inside():
            with contextlib.suppress(AssertionError):  # a question of a page that went on
                return self.js('Boolean(document.querySelector("nav")) && document.readyState') == (
                    "complete")

        until(inside)

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
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, expression):
        """Waits until the page says yes, looking at each frame."""
        self.js(
            "new Promise(done => { const look = () => (%s) ? done() : requestAnimationFrame(look);"
            " look(); })" % expression
        )

    def key(self, key, code=0):
        text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **text)

    def tap(self, x, y):
        for kind, points in (("touchStart", [{"x": x, "y": y}]), ("touchEnd", [])):
            self.call("Input.dispatchTouchEvent", type=kind, touchPoints=points)

    def screen(self, width, height, scheme="light", motion="no-preference", touch=False):
        self.call("Emulation.setTouchEmulationEnabled", enabled=touch)
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia",
                  features=[{"name": "prefers-color-scheme", "value": scheme},
                            {"name": "prefers-reduced-motion", "value": motion}])

    def picture(self):
        """The whole page as a PNG file."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        return base64.b64decode(answer["data"])

    def complaints(self):
        """What the console showed: errors, refusals of the page's policy, anything printed."""
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
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not program:
        pytest.skip("no Chromium here: the pages were not looked at (apt-get install chromium)")
    browser = Chromium(program, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


SEEN = """({sessions: Number(document.getElementById("count0").textContent),
  arcs: document.querySelectorAll("#arcs .there").length,
  counters: [...document.querySelectorAll(".tiles dd")].map(dd => dd.textContent),
  caption: document.getElementById("caption").textContent,
  play: document.getElementById("play").textContent,
  moment: document.getElementById("moment").textContent, address: location.hash})"""
LIT = '["arcs", "discs"].map(id => document.querySelectorAll("#" + id + " .on").length)'
MAY_QUERY = "since=2026-05-01&until=2026-06-01"
PANEL = 'document.getElementById("panel").textContent'


def middle(chromium, which):
    """The middle of an element, in px of the window."""
    return chromium.js(
        "(b => [b.x + b.width / 2, b.y + b.height / 2])(document.querySelectorAll(%s)[%d]"
        ".getBoundingClientRect())" % which
    )


def fetched(chromium, view, url):
    """The body of a page, asked for with the browser's cookie, beside the browser."""
    cookies = chromium.call("Network.getCookies")["cookies"]
    cookie = "; ".join("%s=%s" % (c["name"], c["value"]) for c in cookies)
    status, headers, body = http(view.address, url[len(view.base) :], {"Cookie": cookie})
    assert status == 200 and headers["content-disposition"].startswith("attachment")
    return body


def on_slider(chromium, key, code):
    chromium.js('document.getElementById("slider").focus()')
    chromium.key(key, code)
    chromium.js("document.activeElement.blur()")


def disc(n):
    return ('"#discs circle"', n)


def test_reader_the_replay_in_chromium(tmp_path, chromium):
    """The picture is right at three moments. The keyboard plays, steps and points.

    Filters work. Nothing is requested elsewhere.
    """
    with View(stored(tmp_path / "e.db", *STORY)) as view:
        chromium.events = []
        chromium.screen(1280, 900)
        chromium.enter(view.url + "&" + MAY_QUERY)
        assert chromium.js("location.search") == "?" + MAY_QUERY  # the token is gone
        seen = chromium.js(SEEN)  # a first visit: at the start, paused, Play in focus
        assert (seen["sessions"], seen["play"], seen["address"]) == (1, "Play", "")
        assert chromium.js("document.activeElement.id") == "play"
        assert "Press Play" in seen["caption"]
        for moment, count, arcs, counters, caption in (
            ("2026-05-04T10:00:00.000Z", 1, 0, ["1", "1", "5", "2", "0"], None),
            ("2026-05-05T10:00:00.000Z", 2, 1, ["2", "2", "12", "3", "1"], None),
            ("2026-05-08T00:00:00.000Z", 2, 1, ["2", "2", "12", "3", "1"], None),
            ("2026-05-12T11:00:00.000Z", 4, 4,
             ["4", "3", "36", "3", "3"], "x has reached everybody"),
        ):
            chromium.js("new Promise(done => {"
                        ' addEventListener("hashchange", () => setTimeout(done), {once: true});'
                        ' location.hash = "t=%s"; })'
                        % moment)
            seen = chromium.js(SEEN)
            assert (seen["sessions"], seen["arcs"]) == (count, arcs), moment
            assert seen["counters"] == counters and caption in (None, seen["caption"]), seen
            assert seen["moment"] == moment[:16].replace("T", " ") + " UTC"
        chromium.open(view.base + "/?" + MAY_QUERY + "#t=2026-05-08T00:00:00.000Z")
        assert chromium.js(SEEN)["sessions"] == 2  # a moment can be shared
        assert chromium.js('document.querySelectorAll("#arcs .x").length') == 3

        on_slider(chromium, "Home", 36)
        assert chromium.js(SEEN)["address"] == "#t=2026-05-04T10:00:00.000Z"
        chromium.key("ArrowRight", 39)
        assert chromium.js(SEEN)["address"] == "#t=2026-05-05T10:00:00.000Z"
        assert chromium.js(SEEN)["caption"] == "2 discoveries reach somebody new"
        chromium.key("ArrowLeft", 37)
        assert chromium.js(SEEN)["sessions"] == 1
        chromium.js('document.getElementById("speed").focus()')
        chromium.key("ArrowDown", 40)
        assert chromium.js('document.getElementById("speed").value') == "2"
        chromium.js('document.getElementById("speed").value = "8"; document.activeElement.blur()')
        chromium.key(" ", 32)
        assert chromium.js(SEEN)["play"] == "Pause"
        chromium.until(
            'document.querySelectorAll("#arcs .new, #discs .new").length == 3'
        )  # a pulse
        chromium.until('document.querySelectorAll("#arcs .old").length == 1')
        chromium.key(" ", 32)
        paused = chromium.js(SEEN)
        assert paused["play"] == "Play" and paused["sessions"] >= 2
        assert paused["address"][3:19].replace("T", " ") + " UTC" == paused["moment"]
        chromium.until('document.querySelectorAll(".new, .old").length == 0')
        on_slider(chromium, "End", 35)
        assert chromium.js(SEEN)["sessions"] == 4

        chromium.js('document.querySelector("#discs a[tabindex=\\"0\\"]").focus()')
        chromium.key("ArrowLeft", 37)
        chromium.key(
            "ArrowLeft", 37
        )  # from the last to bob's, which had x from ann, and gave it to cay
        assert chromium.js(LIT) == [2, 3]
        panel = chromium.js(PANEL)
        assert panel.startswith(BOB[:8]) and "2 calls, 7 tokens saved" in panel
        assert panel.endswith("1 other developer built on it.xz")
        chromium.key("ArrowLeft", 37)
        assert chromium.js(LIT) == [4, 4]  # everything came from ann's first
        for key in (
            "ArrowLeft",
            "ArrowRight",
            "Enter",
            "x",
        ):  # on the picture: nothing throws
            chromium.js("document.activeElement.blur()")
            chromium.js('document.getElementById("chart").dispatchEvent('
                        'new KeyboardEvent("keydown", {key: "%s", bubbles: true}))'
                        % key)
        chromium.js('document.getElementById("speed").focus()')
        stops = []
        for _ in range(3):  # one Tab stop in the picture, and it is a session
            chromium.key("Tab", 9)
            stops.append(chromium.js("document.activeElement.tagName + document.activeElement.id"))
        assert stops == ["a", "DIVpanel", "A"]  # the last is what the session knew
        on_slider(chromium, "End", 35)
        x, y = middle(chromium, disc(2))
        chromium.call("Input.dispatchMouseEvent", type="mouseMoved", x=x + 6, y=y + 6)
        chromium.until("String(%s) == '2,3'" % LIT)
        button = {"x": x, "y": y, "button": "left", "clickCount": 1}
        chromium.call("Input.dispatchMouseEvent", type="mousePressed", **button)
        chromium.follow(
            lambda: chromium.call("Input.dispatchMouseEvent", type="mouseReleased", **button))
        assert chromium.js("location.pathname") == "/session/" + sha("session", 3)
        assert ANN[:8] in chromium.js("document.body.textContent")

        chromium.open(view.base + "/?" + MAY_QUERY)
        chromium.js('document.querySelector("[name=github]").value = "false"')
        chromium.follow(lambda: chromium.js('document.querySelector("form button").click()'))
        assert chromium.js(SEEN)["counters"] == ["1", "1", "13", "2", "0"]
        chromium.open(view.base + "/?discovery=y&" + MAY_QUERY + "#t=2027-01-01T00:00:00.000Z")
        assert (chromium.js(SEEN)["sessions"], chromium.js(SEEN)["arcs"]) == (3, 2)
        for path in ("/", "/sessions", "/discoveries", "/developers", "/activity"):
            chromium.open(view.base + path + "?since=2020-01-01&until=2020-02-01")
            text = chromium.js("document.body.textContent")
            assert "The last one ended 2026-05-12 11:00 UTC." in text, path

        names = {
            (node.get("role", {}).get("value"), node.get("name", {}).get("value"))
            for node in (
                chromium.open(view.base + "/?" + MAY_QUERY),
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
        assert chromium.complaints() == []
        assert all(url.startswith((view.base + "/", "data:", "about:")) for url in chromium.asked())


def test_reader_a_chosen_discovery_and_the_saved_file_in_chromium(tmp_path, chromium):
    """Choosing draws one path and says whom it reached. Escape ends that.

    The saved file starts with the moment and the discovery of the screen. It needs no server.
    """
    db = stored(tmp_path / "e.db", *STORY)
    with View(db) as view:
        chromium.events = []
        chromium.screen(1280, 900)
        chromium.enter(view.url + "&" + MAY_QUERY + "#t=2026-05-12T11:00:00.000Z")
        chromium.js('location.hash = "t=2026-05-12T11:00:00.000Z"')
        x = '[...document.querySelectorAll("[data-ref]")].find(b => b.textContent == "x")'
        chromium.js(x + ".focus()")
        chromium.key("Enter", 13)
        assert chromium.js(x + '.getAttribute("aria-pressed")') == "true"
        assert chromium.js(LIT) == [2, 3]  # ann to bob to cay
        assert "x reached 3 of 3 developers" in chromium.js(PANEL)
        assert "%s, 05-05 10:00" % BOB[:8] in chromium.js(PANEL)
        assert chromium.js("location.hash") == "#t=2026-05-12T11:00:00.000Z&d=x"
        chromium.key("Escape", 27)
        assert chromium.js(LIT) == [0, 0] and chromium.js("location.hash").endswith("00.000Z")
        chromium.key("Enter", 13)
        chromium.key("ArrowLeft", 37)
        saved = chromium.js('document.getElementById("save").href')
        body = fetched(chromium, view, saved)
    (tmp_path / "saved.html").write_text(body)
    assert sorted(set(re.findall(r'(?:href|src|action)="([^"#]*)', body)) - {"data:,"}) == []
    chromium.open((tmp_path / "saved.html").as_uri())
    seen = chromium.js(SEEN)
    assert (seen["sessions"], seen["moment"]) == (3, "2026-05-12 10:00 UTC")
    assert chromium.js(LIT) == [2, 3] and "x reached 3 of 3" in chromium.js(PANEL)
    assert "From 2026-05-01 00:00 UTC until 2026-06-01 00:00 UTC." in body
    (tmp_path / "page.html").write_text(
        read("graph", "--db", db, *IN_MAY, "--format", "html").stdout)
    same = [
        re.sub('"at":"[^"]*"', "", text) for text in (body, (tmp_path / "page.html").read_text())]
    assert same[0] == same[1]
    chromium.open((tmp_path / "page.html").as_uri())
    assert chromium.js("document.documentElement.className") == "live"
    assert chromium.js(SEEN)["sessions"] == 1
    assert chromium.complaints() == []


def test_reader_by_touch_in_chromium(tmp_path, chromium):
    """At 390 px a tap selects the session under the finger. A second tap opens it.

    What is to be tapped is 44 px high. Nothing is wider than the screen. Nothing pulses when
    reduced motion is asked for.
    """
    with View(stored(tmp_path / "e.db", *STORY)) as view:
        chromium.events = []
        chromium.screen(390, 844, "dark", "reduce", touch=True)
        chromium.enter(view.url + "&" + MAY_QUERY)
        chromium.js('location.hash = "t=2026-05-12T11:00:00.000Z"')
        chromium.until("document.getElementById('count0').textContent == '4'")
        chromium.js('document.getElementById("stage").scrollIntoView({block: "center"})')
        chromium.js("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        height = chromium.js("document.documentElement.scrollHeight")
        for n, who in ((0, ANN), (1, BOB), (3, CAY), (2, ANN)):
            before = middle(chromium, disc(n))
            chromium.tap(*before)
            chromium.until("document.querySelector('#discs .at')")
            assert (
                chromium.js(
                    "[...document.querySelectorAll('#discs a')].findIndex(a => a.matches('.at'))")
                == n)
            assert chromium.js(PANEL).startswith(who[:8])
            assert middle(chromium, disc(n)) == before
            assert chromium.js("document.documentElement.scrollHeight") == height
        chromium.follow(lambda: chromium.tap(*middle(chromium, disc(2))))
        assert chromium.js("location.pathname") == "/session/" + sha("session", 3)
        chromium.open(view.base + "/?" + MAY_QUERY)
        assert (chromium.js(
                    '[...document.querySelectorAll("button, input, select, nav a, summary, #save")]'
                    ".filter(e => e.offsetParent && e.getBoundingClientRect().height < 44)"
                    ".map(e => e.outerHTML)")
                == [])
        assert not chromium.js('document.querySelector("form").checkVisibility()')  # folded
        assert chromium.js('document.querySelector(".cards td.n").checkVisibility()')
        chromium.js('document.getElementById("speed").value = "8"')
        chromium.tap(*middle(chromium, ('"#play"', 0)))
        chromium.until("document.getElementById('count0').textContent == '2'")
        assert chromium.js('document.querySelectorAll(".new").length') == 0
        assert chromium.complaints() == []


def axe_core():
    """The text of axe.min.js, from $AXE_CORE or `npm install -g axe-core`. None without it."""
    named = os.environ.get("AXE_CORE")
    npm = None if named else shutil.which("npm")
    if npm:
        root = subprocess.run(
            [npm, "root", "-g"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        named = os.path.join(root.stdout.decode().strip(), "axe-core", "axe.min.js")
    return Path(named).read_text(encoding="utf-8") if named and os.path.exists(named) else None


EVERY_PAGE = ("/", "/sessions", "/session/" + sha("session 1"), "/discoveries", "/discovery/x",
              "/developers", "/developer/" + ANN[:8], "/activity")


def test_reader_every_page_in_chromium(tmp_path, chromium):
    """Each page at three widths in both themes is as wide as the screen, and has one h1.

    No column lacks a title. axe-core finds no fault (npm install -g axe-core, or $AXE_CORE).
    """
    axe = axe_core()
    with View(stored(tmp_path / "e.db", *STORY)) as view:
        chromium.events = []
        chromium.enter(view.url)
        for path in EVERY_PAGE:
            chromium.screen(390, 900, "dark")
            chromium.open(view.base + path + "?" + MAY_QUERY)
            if axe:
                chromium.js(axe + "; 0")
            for width, scheme in ((390, "dark"), (1024, "dark"), (1440, "light"), (390, "light")):
                chromium.screen(width, 900, scheme)  # a window that is resized, a theme that turns
                where = (path, width, scheme)
                assert chromium.js("document.documentElement.scrollWidth") == width, where
                paper = chromium.js("getComputedStyle(document.body).backgroundColor")
                assert (paper == "rgb(246, 246, 243)") == (scheme == "light")
                assert chromium.js('document.querySelectorAll("h1").length') == 1, where
                if width == 390:  # a card has two lines
                    tall = """[...document.querySelectorAll(".cards tbody tr")].filter(
                        row => row.offsetHeight > 2 * parseFloat(getComputedStyle(row).lineHeight)
                        + 18).map(row => row.innerText)"""
                    assert chromium.js(tall) == [], where
                assert (
                    chromium.js(
                        '[...document.querySelectorAll("th")].filter(th => !th.textContent).length')
                    == 0), where
                if axe and (width, scheme) in ((390, "dark"), (1440, "light")):
                    found = chromium.js(
                        "axe.run({resultTypes: ['violations']}).then(r => r.violations.map("
                        "v => v.id + ': ' + v.nodes.map("
                        "n => n.target + ' ' + n.failureSummary).join(' | ')))")
                    assert found == [], where
        assert chromium.complaints() == []
        assert all(url.startswith((view.base + "/", "data:", "about:")) for url in chromium.asked())
    if not axe:
        pytest.skip("no axe-core here: the pages were looked at without it")


def test_reader_pages_without_script(tmp_path, chromium):
    """Where no script runs, each page has its picture, its table and its links."""
    with View(stored(tmp_path / "e.db", *STORY)) as view:
        chromium.events = []
        chromium.screen(1280, 900)
        chromium.call("Emulation.setScriptExecutionDisabled", value=True)
        try:
            chromium.enter(view.url + "&" + MAY_QUERY)
            assert chromium.js("document.documentElement.className") == ""
            assert chromium.js('[...document.querySelectorAll("#discs circle")].every('
                               "c => c.getBoundingClientRect().width > 0)")
            assert (chromium.js('[...document.querySelectorAll("#arcs path")].filter('
                                'p => getComputedStyle(p).display != "none").length')
                    == 4)
            assert chromium.js('document.querySelector(".controls").offsetHeight') == 0
            assert BOB[:8] in chromium.js('document.querySelector("table").textContent')
            first = chromium.js('document.querySelector("#discs a").href.baseVal')
            assert first == "/session/" + sha("session 1")
            chromium.open(view.base + "/activity?" + MAY_QUERY)
            assert chromium.js('document.querySelectorAll(".plots svg path").length') == 6
            chromium.open(view.base + "/discoveries?" + MAY_QUERY)
            names = '[...document.querySelectorAll("td:first-child")].map(td => td.textContent)'
            assert chromium.js(names) == ["x", "y", "z"]
            for title, first in (("Last seen", "x"), ("Discovery", "x"), ("Sessions", "x")):
                chromium.follow(
                    lambda title=title: chromium.js(
                        '[...document.querySelectorAll("th a")].find('
                        'a => a.textContent == "%s").click()' % title
                    )
                )
                assert chromium.js("location.search").startswith("?since=2026-05-01")
                assert chromium.js(names)[0] == first, title
        finally:
            chromium.call("Emulation.setScriptExecutionDisabled", value=False)
        assert chromium.complaints() == []


def test_reader_style_and_script():
    """In both themes the contrast of text is at least 4.5 to 1, of what is drawn 3 to 1.

    Node can parse the script, where there is a node.
    """

    def light(color):
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    def contrast(a, b):
        low, high = sorted((light(a), light(b)))
        return (high + 0.05) / (low + 0.05)

    themes = re.findall(r":root \{(.*?)\}", session_events.STYLE, re.DOTALL)
    assert len(themes) == 2
    for theme in themes:
        colors = dict(re.findall(r"--(\w+):\s+(#[0-9a-f]{6})", theme))
        pairs = [
            (text, ground, 4.5)
            for text in ("ink", "soft", "disc", "cross")
            for ground in ("card", "paper")
        ]
        pairs += [
            (mark, ground, 3) for mark in ("own", "pale", "lit") for ground in ("card", "paper")]
        pairs += [("ink", "h1", 4.5), ("ink", "h2", 4.5), ("card", "h3", 4.5), ("card", "h4", 4.5)]
        for front, back, least in pairs:
            found = contrast(colors[front], colors[back])
            assert found >= least, (front, back, found)
    for text in (session_events.STYLE, session_events.SCRIPT):
        assert "</" not in text and "<!--" not in text  # it stands in an element of HTML
        assert max(map(len, text.splitlines())) <= 100
    node = shutil.which("node")
    if not node:
        pytest.skip("no node here: the script was not looked at by itself")
    checked = subprocess.run(
        [node, "--check", "-"], input=session_events.SCRIPT.encode(), stderr=subprocess.PIPE)
    assert checked.returncode == 0, checked.stderr.decode()


def test_reader_hostile_pages_in_chromium(tmp_path, chromium):
    """Nothing that a row holds runs, closes an element or changes a page.

    Rows that break a rule are left out. If one gets through, it is plain text in findings,
    captions, panels, buttons and titles.
    """

    def harmless():
        assert chromium.js("document.title").endswith((" - sessions", "Session replay"))
        assert chromium.js('document.querySelectorAll("img").length') == 0
        text = chromium.js("document.body.innerText")
        assert not re.search("[\x00-\x08\x0e-\x1f\x7f-\x9f\u200b-\u206f]", text)

    with View(looser(tmp_path / "hostile.db")) as view:
        chromium.events = []
        chromium.screen(1280, 900)
        chromium.enter(view.url + "&" + MAY_QUERY)
        mallory = chromium.js('document.querySelector(".lanes a").href.baseVal').split("?")[0]
        for path in ("/", "/sessions", "/discoveries", "/developers", mallory, "/activity"):
            chromium.open(view.base + path + "?" + MAY_QUERY)
            harmless()
            assert "rows were left out" in chromium.js("document.body.textContent"), path
    fields = {"identity": sha("a"), "github": None, "tools": 1, "tokens": 1, "branch": None}
    hostile = session_events.Session(
        id=1, session=sha("s"), ended=10**12, refs=tuple(HOSTILE_REFS), version="1",
        developer="a" * 8, **fields)
    ranked = [
        {
            "discovery_id": ref,
            "developer_count": 1,
            "hours_to_second_developer": None,
            "half_life_hours": None,
            "counts": [1],
        }
        for ref in HOSTILE_REFS
    ]
    found = session_events.findings_html(["%s went furthest" % HOSTILE_REFS[0]])
    page = tmp_path / "page.html"
    for links in (False, True):
        session = hostile._replace(ended=hostile.ended + 9)
        picture = session_events.Picture([hostile, session], links=links)
        body = session_events.replay(picture, 2, ranked, found, "t=x&d=</script>")
        head = '<meta http-equiv="Content-Security-Policy" content="%s">' % session_events.policy()
        page.write_text(session_events.document("Session replay", "<h1>x</h1>" + body, head))
        chromium.open(page.as_uri())
        harmless()
        chromium.js('document.querySelectorAll("#discs a")[0].dispatchEvent(new Event("focusin"))')
        on_slider(chromium, "End", 35)
        chromium.js('document.querySelector("#discs a[tabindex=\\"0\\"]").focus()')
        panel = chromium.js(PANEL)
        assert "document.title='owned'" in panel
        assert "and %d more" % (len(HOSTILE_REFS) - 6) in panel
        for n, ref in enumerate(HOSTILE_REFS):
            chromium.js('document.querySelectorAll("[data-ref]")[%d].click()' % n)
            harmless()
            caption = chromium.js(SEEN)["caption"]
            assert caption == session_events.visible(ref) + " is met for the first time"
            assert chromium.js(LIT)[1] == 2
            if links:
                link = session_events.link("discovery", session_events.visible(ref)).split('"')[1]
                href = chromium.js('document.querySelector("#panel a").getAttribute("href")')
                assert urllib.parse.unquote(href) == urllib.parse.unquote(html.unescape(link))
        address = chromium.js("location.hash")
        chromium.open(page.as_uri() + address)
        assert chromium.js(LIT)[1] == 2 and chromium.js("location.hash") == address
    assert chromium.complaints() == []
    assert all(
        url.startswith((view.base + "/", "data:", "about:", page.as_uri()))
        for url in chromium.asked()
    )


FRAME_TIMES = """new Promise(done => {
  const spent = [], frame = window.requestAnimationFrame;
  window.requestAnimationFrame = f => frame(time => {
    const start = performance.now();
    f(time);
    spent.push(performance.now() - start);
    if (document.getElementById("play").textContent == "Play") {
      window.requestAnimationFrame = frame;
      done(spent.sort((a, b) => a - b));
    }
  });
  const slider = document.getElementById("slider");
  slider.value = slider.max * 0.6;  // enough frames, however slow the machine is
  slider.dispatchEvent(new Event("input"));
  document.getElementById("speed").value = "8";
  document.getElementById("play").click();
})"""


def test_reader_two_thousand_sessions_in_chromium(tmp_path, chromium):
    """A page of 300 developers has less than 1 MB, 4 screens and at most 40 lanes.

    Arcs are drawn only for what is chosen. A frame takes less than 20 ms of script.
    """
    chance = random.Random(3)
    rows = [
        row(
            n,
            n if n < 300 else chance.randrange(300),
            # The last one stands off the slider's steps, most of a step after the last but one.
            "2026-05-%02dT%02d:%02d:00.%03dZ" % (1 + n // 72, n // 3 % 24, n % 60, n // 2009 * 499),
            {"disc-%d" % (300 * chance.random() ** 2), "disc-%d" % (300 * chance.random() ** 2)},
        )
        for n in range(2010)
    ]
    with View(stored(tmp_path / "e.db", *rows)) as view:
        chromium.events = []
        chromium.screen(1440, 900)
        chromium.enter(view.url + "&" + MAY_QUERY)
        size = chromium.js('performance.getEntriesByType("navigation")[0].transferSize')
        assert 300_000 < size < 1_000_000
        assert "newest 2,000 of 2,010" in chromium.js("document.body.textContent")
        assert chromium.js("document.documentElement.scrollHeight") < 4 * 900
        assert chromium.js('document.querySelectorAll("#chart .lanes text").length') == 40
        chromium.until('performance.getEntriesByName("first-contentful-paint").length')
        paint = chromium.js('performance.getEntriesByName("first-contentful-paint")[0].startTime')
        assert paint < 20_000  # ms; about 300 on a machine with nothing else to do
        spent = chromium.js(FRAME_TIMES)
        assert len(spent) > 10 and spent[len(spent) // 2] < 20, spent[-10:]
        assert chromium.js(SEEN)["counters"][:2] == ["2,000", "300"]
        chromium.js('document.getElementById("slider").focus()')
        for key, code, seen in (("Home", 36, "1"), ("End", 35, "2,000")):
            chromium.key(key, code)
            assert chromium.js(SEEN)["counters"][0] == seen
        drawn = """[...document.querySelectorAll("#arcs path")].filter(
            p => getComputedStyle(p).display != "none").length"""
        chromium.until('document.querySelectorAll(".new").length == 0')
        assert chromium.js(drawn) == 0
        chromium.js('document.querySelector("[data-ref]").click()')
        reach = int(chromium.js(PANEL).split(" reached ")[1].split()[0])
        assert chromium.js(drawn) >= reach - 1 > 10
        chromium.key("Escape", 27)
        chromium.js('document.querySelector("#discs a[tabindex=\\"0\\"]").focus()')
        assert 0 < chromium.js(drawn) < 10
        chromium.js('document.querySelector(".others summary").click()')
        assert chromium.js('document.querySelectorAll(".others text").length') == 261
        assert chromium.js('document.querySelector(".others svg").checkVisibility()')
        chromium.screen(390, 844, touch=True)
        seen = """(bottom => [...document.querySelectorAll("#chart .lanes text")].filter(
            t => t.getBoundingClientRect().bottom <= bottom).length)(
            document.getElementById("stage").getBoundingClientRect().bottom)"""
        assert 10 < chromium.js(seen) <= 12
        chromium.js('document.querySelector(".every input").click()')
        assert chromium.js(seen) == 40
        assert chromium.complaints() == []


# -- The demo, and all of it beside a server -------------------------------------------------------


def test_reader_the_demo(tmp_path):
    """It says that its sessions are synthetic, shows them, and leaves nothing behind."""
    with View(None, TMPDIR=str(tmp_path)) as view:
        assert re.fullmatch(
            r"\d+ synthetic sessions of \d+ developers who do not exist", view.said[0])
        assert len(list(tmp_path.iterdir())) == 2  # of the database, and of the way in
        own = os.getpriority(os.PRIO_PROCESS, 0)  # and it lets a server go first
        assert os.getpriority(os.PRIO_PROCESS, view.process.pid) == min(19, own + 10)
        status, _, body = http(view.address, "/?days=14", {"Cookie": view.cookie()})
        assert status == 200 and body.count("<circle") > 100
    assert (view.status, view.complaints, list(tmp_path.iterdir())) == (0, "", [])


def test_reader_beside_a_server_under_load_and_a_sweep(tmp_path):
    """While a server writes and old rows are swept, no answer fails.

    Each answer is right for one moment.
    """
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
                    connection.request("POST", "/v1/session-events",
                                       json.dumps(dict(EVENT, session_id_hash=sha("load", n),
                                                       ended_at="2026-05-22T12:%02d:%02d.000Z"
                                                       % (n // 60 % 60, n % 60))))
                    answer = connection.getresponse()
                    if answer.status != 202 or answer.read() != b'{"ok":true}':
                        failures.append(answer.status)
            finally:
                connection.close()

        def sweep():
            with contextlib.closing(
                    sqlite3.connect(str(db), timeout=60, isolation_level=None)) as connection:
                while not stop.is_set():
                    connection.execute(
                        "DELETE FROM session_events WHERE id IN (SELECT id FROM session_events"
                        " ORDER BY id LIMIT 3)")
                    stop.wait(0.01)

        threads = [threading.Thread(target=job) for job in (post, sweep)]
        for thread in threads:
            thread.start()
        try:
            totals = set()
            end = time.monotonic() + 60
            while len(totals) < 12 and time.monotonic() < end:
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
        "<quota>default</quota></{0}>")

    def __init__(self, folder):
        self.folder, self.port, self.count = folder, free_port(), 0
        (folder / "config.xml").write_text(self.CONFIG.format(folder, self.port, free_port()))
        (folder / "users.xml").write_text(
            "<yandex><profiles><default/><looks><readonly>1</readonly></looks></profiles>"
            "<quotas><default/></quotas>"
            "<users>%s%s%s</users></yandex>"
            % (
                self.USER.format("default", "", "default"),
                self.USER.format("shipper", "open sesame", "default"),
                self.USER.format("visitor", "", "looks"),
            )
        )
        self.start()

    def settle(self):
        """Wait: a mark that was confirmed within a second of ClickHouse's start is doubted."""
        eventually(lambda: int(self.ask("SELECT uptime()")[0][0]) >= 2)

    def start(self):
        with open(str(self.folder / "output"), "ab") as output:
            self.process = subprocess.Popen(
                ["clickhouse-server", "--config-file=%s/config.xml" % self.folder],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=str(self.folder))
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
        connection.request("POST", "/?" + query, sql)
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
    house.settle()
    yield house
    house.stop()


NAMES_NOBODY = re.compile(r"[0-9a-f]{17,}|auth-jwt-flow|open sesame").search


def shipper(db, url, *flags, rows=200, env=(), peak=False):
    """A `ship` process, in batches of `rows`."""
    small = constants(session_events, SHIP_ROWS=rows, FOLLOW_SECONDS=0.2) + PEAK * peak
    flags = "--db", db, "--to", url, *flags
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    env = dict(os.environ, **dict(env))
    return start("session_events", "ship", *flags, before=small, env=env, **streams)


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
    return int(re.match(r"([\d,]+) rows shipped\n$", out)[1].replace(",", ""))


def sessions_of(*nodes):
    """The rows over several nodes, worked out here: of each session the one received first."""
    first = {}
    for node, rows in enumerate(nodes):
        for n, r in enumerate(rows):
            key = r["identity_hash"], r["session_id_hash"]
            first.setdefault(key, []).append((r["received_at"], node, n, r))
    return [min(found, key=lambda f: f[:3])[3] for found in first.values()]


VIEW = """SELECT identity_hash, github_hash, session_id_hash, ended_at, tool_count,
  tokens_saved, branch_sha, arrayStringConcat(discovery_refs, ' '), plugin_version,
  toString(received_at) FROM session_events"""


def as_viewed(r):
    return [r["identity_hash"], r["github_hash"] or r"\N", r["session_id_hash"], r["ended_at"],
            str(r["tool_count"]), str(r["tokens_saved"]), r["branch_sha"] or r"\N",
            " ".join(dict.fromkeys(json.loads(r["discovery_refs_json"]))), r["plugin_version"],
            r["received_at"].replace("T", " ")[:19]]


def whole(clickhouse, url, *nodes):
    """The view has each session of the nodes once, as it was received first.

    The raw table holds nothing else when it is merged (FINAL).
    """
    expected = sorted(map(as_viewed, sessions_of(*nodes)))
    assert sorted(clickhouse.ask(VIEW, url)) == expected
    assert clickhouse.ask(
        "SELECT count() FROM session_events_raw FINAL WHERE plugin_version != ''", url) == [
            [str(len(expected))]]


def merge(clickhouse, url):
    clickhouse.ask("OPTIMIZE TABLE session_events_raw FINAL", url)


def mark_of(shipment):
    with session_events.reading(shipment.path) as reader:
        return shipment.mark(reader)


def begun(shipment):
    """The mark of a file, made if it has none."""
    mark = mark_of(shipment)
    if not mark.node:
        now = session_events.now_ms()
        shipment.write(mark, mark._replace(node=os.urandom(8).hex(), confirmed_at=now))
    return mark_of(shipment)


def name_of(db, url):
    """The file's name as a node at this destination, made if it has none."""
    return begun(session_events.Shipment(str(db), session_events.ClickHouse(url, {}))).node


def marks(db):
    """[last id] of the file's marks."""
    with contextlib.closing(sqlite3.connect(str(db))) as connection:
        return [r[0] for r in connection.execute("SELECT last_id FROM ship_marks")]


def eventually(condition, process=None):
    """Waits until `condition` holds; AssertionError after a minute, or if the process has ended."""
    end = time.monotonic() + 60
    while True:
        with contextlib.suppress(AssertionError, OSError, HTTPException, sqlite3.Error):
            if condition():
                return
        assert time.monotonic() < end and (process is None or process.poll() is None), (
            process and process.poll() is not None and process.communicate())
        time.sleep(0.05)


def make_tables(clickhouse, url):
    for statement in read("ship", "--print-ddl", "--to", url).stdout.split(";\n"):
        if statement.strip():
            clickhouse.ask(statement, url)


def many(count, start=0, **changes):
    """Rows of all shapes: without GitHub, without branch, with many discoveries, in any year.

    They were received over three months.
    """
    rng = random.Random(count + start)
    rows = []
    for n in range(start, start + count):
        refs = ["auth-jwt-flow", "a", "r" * 128,
                *("d%d" % (n % k) for k in (3, 7, 50))][: rng.randrange(7)]
        rows.append(
            dict(row(n, "who %d" % (n % 40),
                     "2026-05-%02dT10:%02d:00.%03dZ" % (1 + n % 28, n % 60, n % 1000),
                     refs * (1 + n % 2), n % 3 != 0, tool_count=n % 1_000_001,
                     tokens_saved=10**9 - n,
                     branch_sha=None if n % 5 == 0 else "%040x" % n if n % 5 == 1 else "abc123d",
                     received_at="2026-%02d-15T00:%02d:%02dZ" % (4 + n % 3, n // 60 % 60, n % 60)),
                 **changes))
    rows[0].update(ended_at="9999-12-31T23:59:59.999Z",
                   discovery_refs_json=json.dumps(["x%d" % k for k in range(200)]))
    rows[1].update(ended_at="0001-01-01T00:00:00.000Z", tool_count=1_000_000, tokens_saved=0)
    return rows


def test_ship_two_nodes_at_once(tmp_path, clickhouse):
    """Two processes at once ship each of two nodes. Some sessions were received by both nodes.

    Every session is there once. The views answer what SQLite answers on the same sessions.
    """
    url = clickhouse.database()
    one, two = many(1200), [*many(800, 1000), *many(100, 9000)]
    for n, r in enumerate(
        two[:200]
    ):  # a retry that went to the other node: sooner, later, or in the same second
        r.update(received_at=one[1000 + n]["received_at"]
                 if n % 3 == 0
                 else "2026-0%d-15T00:00:00Z" % (3 + n % 3 * 2), tool_count=7)
    a, b = stored(tmp_path / "a.db", *one), stored(tmp_path / "b.db", *two)
    ends = [finished(process) for process in [shipper(db, url) for db in (a, b, a, b)]]
    assert all((status, err) == (0, "") for status, _, err in ends), ends
    assert marks(a) == [1200] and marks(b) == [900]
    # A row of each node, which nobody drops or deletes with what is old.
    own = ("SELECT count() FROM session_events_raw FINAL WHERE plugin_version = '' AND"
           " toYear(ended) = 2105 AND toYear(received_at) = 2105 AND substring(ended_at, 1, 4) ="
           " '2105'")
    assert clickhouse.ask(own, url) == [["2"]]
    # In the same second, the node's name decides.
    nodes = [one, two] if name_of(a, url) < name_of(b, url) else [two, one]
    whole(clickhouse, url, *nodes)
    merged = stored(tmp_path / "merged.db", *sessions_of(*nodes))
    with session_events.reading(merged) as reader:
        expected = session_events.discoveries(
            reader, session_events.Window("", "A"), 10**6)["discoveries"]
    listed = clickhouse.ask(
        "SELECT * FROM discovery_propagation ORDER BY session_count DESC, discovery_id", url)
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
    names = clickhouse.ask("SELECT name FROM system.columns WHERE table = 'discovery_propagation'"
                           " AND database = currentDatabase()", url)
    assert [name for (name,) in names] == list(session_events.PROPAGATION)
    assert ship(a, url, "--check")[0] == ship(b, url, "--check")[0] == 0
    assert shipped(a, url) == shipped(b, url) == 0
    assert shipped(a, url, "--again") == len(one)
    assert ship(a, url, "--check")[0] == 0  # also before the repeats are merged
    merge(clickhouse, url)
    whole(clickhouse, url, *nodes)
    assert viewed(clickhouse, url) == 1900


def retold(rows, received, **changes):
    """The same sessions on another node: received at other times, with other content."""
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


SAME = ("%d sessions in the file: %d in the view, 0 missing, 0 waiting to be shipped,"
        " 0 in dropped months\n")


@pytest.mark.parametrize("order", ("ab", "ba"))
def test_ship_keeps_what_was_received_first(tmp_path, clickhouse, order):
    """Two nodes received a session, months apart and with other content.

    The raw table ends up with the one received first, whichever is shipped first. The view and
    --check say so before and after the table is merged.
    """
    url = clickhouse.database()
    rows = {"a": many(600)}
    same_second = retold(rows["a"][200:250], lambda n, r: r["received_at"], branch_sha=None)
    rows["b"] = [
        *retold(rows["a"][:100], sooner), *many(50, 5000), *retold(rows["a"][100:200], later),
        *same_second, *retold(rows["a"][250:260], sooner), *retold(rows["a"][300:400], later)]
    dbs = {node: stored(tmp_path / (node + ".db"), *rows[node]) for node in "ab"}
    nodes = [rows[node] for node in sorted("ab", key=lambda node: name_of(dbs[node], url))]
    checks = {node: SAME % (len(rows[node]), len(rows[node])) for node in "ab"}

    def agrees():
        whole(clickhouse, url, *nodes)
        found = at_once(lambda node: ship(dbs[node], url, "--check"), "ab")
        return found == [(0, checks[node], "") for node in "ab"]

    assert [shipped(dbs[node], url) for node in order] == [len(rows[node]) for node in order]
    assert agrees()
    late = ("SELECT count() FROM session_events WHERE node = '%s' AND toMonth(received_at) = 8"
            % name_of(dbs["b"], url))
    assert clickhouse.ask(late, url) == [["0"]]  # no condition brings back a row that gave way
    merge(clickhouse, url)
    assert viewed(clickhouse, url) == 650
    assert agrees() and clickhouse.ask(late, url) == [["0"]]
    if order == "ba":
        return  # what follows does not depend on the order
    # Of b, the newest 100 rows gave way to those of a.
    assert shipped(dbs["a"], url) == shipped(dbs["b"], url) == 0
    more = many(30, 7000)
    with contextlib.closing(sqlite3.connect(dbs["b"])) as connection:
        insert(connection, more)
    rows["b"] += more
    assert shipped(dbs["b"], url) == 30
    checks["b"] = SAME % (440, 440)
    assert agrees()
    for node in order:
        assert shipped(dbs[node], url, "--again") == len(rows[node])
    merge(clickhouse, url)
    assert viewed(clickhouse, url) == 680 and agrees()

    none = stored(tmp_path / "c.db", *retold(rows["a"], later))  # all its rows give way
    for flags, sent in (((), 600), (("--again",), 600)):
        assert shipped(none, url, *flags) == sent
        merge(clickhouse, url)
        assert ship(none, url, "--check")[:2] == (0, SAME % (600, 600))
    assert agrees()


class Relay:
    """Between a ship and ClickHouse. Once `limit` more bytes have gone to ClickHouse it calls
    `then` and cuts the connection; or, with `late`, it does so in place of passing the next answer
    on.
    """

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
                    if self.late != "pass":
                        return
                if ready is upstream:
                    client.sendall(data)

    def stop(self):
        self.target = None
        socket.create_connection(("127.0.0.1", self.port)).close()
        self.thread.join(30)
        self.listener.close()


def test_ship_killed_cut_and_restarted(tmp_path, clickhouse):
    """A ship is killed in a batch, its connection is cut, an answer is lost, ClickHouse is killed.

    In between come another node's rows, some of which were received first. Afterwards every session
    is there once, as it was received first.
    """
    url = clickhouse.database()
    rows = many(4000)
    beside = [*retold(rows[::5], sooner), *retold(rows[1::5], later)]
    db, other = stored(tmp_path / "a.db", *rows), stored(tmp_path / "b.db", *beside)
    relay = Relay(clickhouse.port)
    by_relay = url.replace(str(clickhouse.port), str(relay.port))
    count = "SELECT count() FROM session_events_raw"
    running = []
    try:
        for limit in (20_000, 80_000, 200_000):  # the start is 3,000, a batch 43,000 bytes
            relay.limit, relay.then = limit, lambda: running[-1].kill()
            running.append(shipper(db, by_relay))
            assert running[-1].wait(60) == -signal.SIGKILL
            running[-1].communicate()
        seen = int(clickhouse.ask(count, url)[0][0])
        for relay.late in (False, True):
            relay.limit, relay.then = 70_000, lambda: None
            status, _, err = ship(db, by_relay)
            assert status == 1 and "cannot reach" in err
        relay.late = False
        # Each ship got further, and the last has still something to do.
        assert 0 < seen < int(clickhouse.ask(count, url)[0][0]) < 4000
        assert shipped(other, url) == 1600
        merge(clickhouse, url)  # of rows that were sent, some are no longer there
        relay.limit, relay.then = 70_000, lambda: clickhouse.stop(signal.SIGKILL)
        process = shipper(db, by_relay, "--follow")
        line = next(said for said in map(json.loads, process.stderr) if said["event"] == "waiting")
        assert "cannot reach ClickHouse" in line["why"] and line["again_in_seconds"] > 0
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
    """What a running server stores arrives while it runs. The two programs share the file.

    Ctrl-C ends the ship with 0.
    """
    url, db = clickhouse.database(), tmp_path / "events.db"
    clickhouse.settle()  # the test before may have started it
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
        eventually(lambda: marks(db) == [3], process)  # what was sent goes again without it
        process.send_signal(signal.SIGINT)
        status, out, err = finished(process)
        assert (status, out) == (0, "")
        assert [json.loads(line)["event"] for line in err.splitlines()] == ["shipping"]
    with serving(db):
        assert shipped(db, url) == 0
    assert ship(db, url, "--check")[0] == 0


def restored(backup, db):
    """Puts the backup in the place of the file, in README's order: the file is moved first, so that
    nobody makes a new -wal for it.
    """
    for end in ("", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            os.rename(str(db) + end, str(db) + ".replaced" + end)
    shutil.copy(str(backup), str(db) + ".new")
    os.replace(str(db) + ".new", str(db))


def viewed(clickhouse, url):
    return int(clickhouse.ask("SELECT count() FROM session_events", url)[0][0])


def test_ship_file_restored_while_it_follows(tmp_path, clickhouse):
    """The file goes back to a backup while --follow runs: the rows that come afterwards, whose ids
    were shipped before as other rows, arrive; so do those that follow, up to far beyond the old
    ids.
    """
    url, db, backup = clickhouse.database(), tmp_path / "a.db", tmp_path / "backup.db"
    first, lost, later = many(200), many(300, 1000), many(40, 5000)
    stored(db, *first, journal="DELETE")
    assert shipped(db, url) == 200
    shutil.copy(str(db), str(backup))
    with contextlib.closing(sqlite3.connect(str(db))) as connection:
        insert(connection, lost)
    process = shipper(db, url, "--follow")
    try:
        eventually(lambda: viewed(clickhouse, url) == 500, process)
        eventually(lambda: marks(db) == [500], process)
        restored(backup, db)
        with contextlib.closing(sqlite3.connect(str(db))) as connection:
            insert(connection, later)
        eventually(lambda: viewed(clickhouse, url) == 540, process)
        rest = many(5000, 100_000)
        with contextlib.closing(sqlite3.connect(str(db))) as connection:
            insert(connection, rest)
        eventually(lambda: viewed(clickhouse, url) == 5540, process)
    finally:
        process.send_signal(signal.SIGTERM)
        assert finished(process)[0] == 0
    whole(clickhouse, url, first, lost, later, rest)
    assert ship(db, url, "--check")[0] == 0
    # A batch that is under way while the file is exchanged may not move the mark of the new file.
    relay = Relay(clickhouse.port)
    try:
        with contextlib.closing(sqlite3.connect(str(db))) as connection:
            insert(connection, many(100, 300_000))
            connection.execute(
                "UPDATE ship_marks SET destination = replace(destination, '%d', '%d')"
                % (clickhouse.port, relay.port))
            connection.commit()
        before = tmp_path / "before.db"
        shutil.copy(str(db), str(before))
        with contextlib.closing(sqlite3.connect(str(before))) as connection:
            connection.execute("DELETE FROM session_events WHERE id > 5240")
            connection.execute("UPDATE sqlite_sequence SET seq = 5240")
            connection.commit()
            insert(connection, many(150, 400_000))
        relay.limit, relay.then, relay.late = 20_000, lambda: restored(before, db), "pass"
        status, out, err = ship(db, url.replace(str(clickhouse.port), str(relay.port)))
        assert relay.limit is None and status == 0, err
        assert out == "150 rows shipped\n" or out == "250 rows shipped\n"
    finally:
        relay.stop()
    assert ship(db, url, "--check")[0] == 0
    assert viewed(clickhouse, url) == 5540 + 250


def test_ship_copies_overlaps_and_many_destinations(tmp_path, clickhouse):
    """A copy of the file on a second node goes on from its own mark; another destination has
    another mark; a name that was dropped means all over again; nothing counts twice.
    """
    url, other = clickhouse.database(), clickhouse.database()
    rows, here, there = many(300), many(50, 2000), many(60, 3000)
    db, copy = stored(tmp_path / "a.db", *rows, journal="DELETE"), str(tmp_path / "copy.db")
    assert shipped(db, url) == 300
    shutil.copy(db, copy)
    for path, more in ((db, here), (copy, there)):
        with contextlib.closing(sqlite3.connect(path)) as connection:
            insert(connection, more)
    assert (shipped(db, url), shipped(copy, url)) == (50, 60)
    whole(clickhouse, url, rows, here, there)
    assert ship(db, url, "--check")[0] == ship(copy, url, "--check")[0] == 0
    assert shipped(db, other) == 350 and shipped(db, url) == shipped(db, other) == 0
    whole(clickhouse, other, rows, here)
    with contextlib.closing(sqlite3.connect(db)) as connection:
        found = connection.execute("SELECT destination, last_id FROM ship_marks").fetchall()
        assert sorted(found) == sorted(
            (
                "http://127.0.0.1:%d/%s.session_events_raw"
                % (clickhouse.port, to.split("database=")[1]),
                350,
            )
            for to in (url, other)
        )
        connection.execute("DROP TABLE ship_marks")
        connection.execute("DELETE FROM session_events WHERE id < 100")  # swept
        connection.commit()
    assert shipped(db, url) == 251
    whole(clickhouse, url, rows, here, there)
    # Two copies have one name. Each sees for itself that the table was emptied.
    with contextlib.closing(sqlite3.connect(copy)) as connection:
        insert(connection, many(8, 6000))
    assert shipped(copy, url) == 8
    second = str(tmp_path / "second.db")
    shutil.copy(copy, second)
    clickhouse.ask("TRUNCATE TABLE session_events_raw", url)
    for path in (copy, second):
        status, out, err = ship(path, url)
        assert (status, out) == (0, "368 rows shipped\n") and "emptied" in err, err


def test_ship_starts_anew_where_the_table_is_empty(tmp_path, clickhouse):
    """While --follow runs, the table is dropped, emptied, or filled anew by another node.

    The ship fills it from the beginning.
    """
    url = clickhouse.database()
    db, beside = stored(tmp_path / "a.db", *many(300)), stored(tmp_path / "b.db", *many(90, 900))
    process = shipper(db, url, "--follow")
    try:
        eventually(lambda: marks(db) == [300], process)
        for broken in ("DROP", "TRUNCATE"):
            clickhouse.ask(broken + " TABLE session_events_raw", url)
            eventually(lambda: viewed(clickhouse, url) == 300 and marks(db) == [300], process)
        process.send_signal(signal.SIGSTOP)
        clickhouse.ask("DROP TABLE session_events_raw", url)
        assert shipped(beside, url) == 90
        process.send_signal(signal.SIGCONT)
        eventually(lambda: viewed(clickhouse, url) == 390, process)
    finally:
        process.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGTERM)
        status, _, err = finished(process)
    events = [json.loads(line)["event"] for line in err.splitlines()]
    assert status == 0 and events.count("again") == 3 and events[0] == "shipping", err
    # Rows that arrive right after it was emptied do not hide that those before are gone.
    house = session_events.ClickHouse(url, {})
    with contextlib.closing(sqlite3.connect(db)) as connection:
        connection.execute("UPDATE ship_marks SET synced_id = 200")
        connection.commit()
    with session_events.reading(db) as reader:
        last = session_events.ship_batch(reader, "> ? ORDER BY id", 290, 10)
    clickhouse.ask("TRUNCATE TABLE session_events_raw", url)
    house.insert("ab" * 8, last)
    status, out, err = ship(db, url)
    assert (status, out) == (0, "300 rows shipped\n") and "emptied or made anew" in err, err


def test_ship_sends_the_last_minutes_again_after_a_restart(tmp_path, clickhouse):
    """Where ClickHouse was started after the mark, what was confirmed in the ten minutes before
    goes once more, and nothing older; a mark in the future is doubted, too.
    """
    url = clickhouse.database()
    db = stored(tmp_path / "a.db", *many(900))
    assert shipped(db, url) == 900

    def aged(*statements):
        with contextlib.closing(sqlite3.connect(db)) as connection:
            for statement in statements:
                connection.execute(statement)
            connection.commit()

    # What ClickHouse lost goes once more, and no month that was dropped.
    clickhouse.ask("ALTER TABLE session_events_raw DELETE WHERE id > 600", url)
    eventually(lambda: viewed(clickhouse, url) == 600)
    assert shipped(db, url) == 0
    for at, synced, why in (
        ("2026-05-01T11:09:00Z", 600, "ClickHouse was started after"),
        ("2026-05-01T11:09:00Z", session_events.SHIP_LEAST, "ClickHouse was started after"),
        ("2999-01-01T00:00:00Z", 700, "the mark lies in the future"),
    ):
        aged("UPDATE ship_marks SET synced_id = %d, next_id = 700, confirmed_at = %d"
             % (synced, session_events.instant(at)))
        status, out, err = ship(db, url)
        sent = 900 - max(synced, 0)
        assert (status, out) == (0, "%d rows shipped\n" % sent) and why in err, (at, out, err)
        assert shipped(db, url) == 0 and viewed(clickhouse, url) == 900
    for column, value in (("last_id", "'x'"), ("node", "'a''b'"), ("synced_id", "1.5")):
        with pytest.raises(sqlite3.IntegrityError):
            aged("UPDATE ship_marks SET %s = %s" % (column, value))
    aged("DELETE FROM ship_marks")
    assert shipped(db, url) == 900


@quick
def test_ship_mark_knows_what_was_confirmed_ten_minutes_before():
    """That becomes the place to go back to, and nothing that was confirmed later does. A clock that
    was put back, or ahead for a while, does not hold that place for ever.
    """
    def minute(n):
        return session_events.instant("2026-05-01T12:00:00Z") + n * 60_000

    # Of these turns of ten minutes, the mark knows the end of the last two.
    mark = session_events.Mark("d", "n", 100, minute(9), 50, 70)
    for at, expected in ((9.99, (50, 70)), (10, (70, 100)), (19.99, (70, 100)), (20, (100, 100)),
                         (5000, (100, 100)), (-0.01, (50, 50)), (-5000, (50, 50))):
        moved = session_events.moved_on(mark, 110, int(minute(at)))
        assert moved == ("d", "n", 110, int(minute(at)), *expected), at
    rng = random.Random(3)
    for _ in range(200):
        at, sent = 0, {}
        mark = session_events.Mark("d", "n", session_events.SHIP_LEAST, minute(0),
                                   session_events.SHIP_LEAST, session_events.SHIP_LEAST)
        for n in range(1, 60):
            at += rng.choice((0.1, 1, 3, 15))
            mark, sent[n] = session_events.moved_on(mark, n, int(minute(at))), at
            assert all(at - sent[k] >= 10 for k in sent if k <= mark.synced_id)
            assert all(k <= mark.synced_id for k in sent if at - sent[k] > 35), (mark, sent)
    back = session_events.moved_back(mark._replace(synced_id=40, next_id=50), 40)
    assert (back.last_id, back.synced_id, back.next_id) == (40, 40, 40)
    assert abs(back.confirmed_at - session_events.now_ms()) < 60_000


def test_ship_mark_is_replaced_only_where_it_was_read(tmp_path):
    """A mark is not written over one that another ship has moved, nor into a file that has another
    row under this id.
    """
    db = stored(tmp_path / "a.db", *many(20))
    shipment = session_events.Shipment(db, session_events.ClickHouse("http://127.0.0.1:9/", {}))
    mark = begun(shipment)
    assert mark.last_id == session_events.SHIP_LEAST and begun(shipment) == mark
    with session_events.reading(db) as reader:
        rows = session_events.ship_batch(reader, "> ? ORDER BY id", 0, 20)
    for wrong in ((10, rows[8][1]), (21, rows[9][1])):
        assert not shipment.write(mark, mark._replace(last_id=wrong[0]), wrong)
        assert mark_of(shipment) == mark
    moved = mark._replace(last_id=10)
    assert shipment.write(mark, moved, rows[9])
    assert mark_of(shipment) == moved
    assert not shipment.write(mark, mark._replace(last_id=12), rows[11])
    assert mark_of(shipment) == moved


def test_ship_looks_for_the_lock_between_two_commits(tmp_path, monkeypatch):
    """A server on a slow disk leaves the lock free for about a millisecond. SQLite's own timeout
    would look for it every 100 ms.
    """
    db = stored(tmp_path / "a.db", *many(5))
    shipment = session_events.Shipment(db, session_events.ClickHouse("http://127.0.0.1:9/", {}))
    mark = begun(shipment)
    with contextlib.closing(sqlite3.connect(db, isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        pauses = []

        def pause(seconds):
            pauses.append(seconds)
            if len(pauses) == 3:
                holder.execute("ROLLBACK")

        monkeypatch.setattr(session_events.time, "sleep", pause)
        shipment.write(mark, mark._replace(last_id=1))
    assert len(pauses) == 3 and max(pauses) <= 0.001
    assert marks(db) == [1]


def test_ship_ends_where_rows_keep_coming(tmp_path, clickhouse, monkeypatch, capfd):
    db = stored(tmp_path / "a.db", *many(5))
    coming = iter(many(20, 700))
    step = session_events.Shipment.step

    def step_while_one_comes(shipment):
        did = step(shipment)
        with contextlib.closing(sqlite3.connect(db)) as connection:
            insert(connection, itertools.islice(coming, 1))
        return did

    monkeypatch.setattr(session_events.Shipment, "step", step_while_one_comes)
    assert session_events.main(["ship", "--db", db, "--to", clickhouse.database()]) == 0
    assert capfd.readouterr().out == "6 rows shipped\n"


def test_ship_deletes_no_wal(tmp_path):
    """SQLite deletes a -wal file by its name when the last user of the database closes it. While it
    syncs before that, another file can take the place of the database, and a server can store
    events in a -wal of the same name. So a ship never closes a database as its last user.
    """
    db = stored(tmp_path / "a.db", *many(10))
    with contextlib.closing(sqlite3.connect(db)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
    shipment = session_events.Shipment(db, session_events.ClickHouse("http://127.0.0.1:9/", {}))
    mark = begun(shipment)
    shipment.write(mark, mark._replace(last_id=1))
    assert os.path.getsize(db + "-wal") > 0 and mark_of(shipment).last_id == 1


def test_ship_the_mark_and_a_file_that_cannot_be_written(tmp_path, clickhouse, monkeypatch):
    """A locked file is waited for, and what was sent meanwhile goes again.

    A file that may not be written is a clear error.
    """
    url = clickhouse.database()
    db = stored(tmp_path / "a.db", *many(50))
    monkeypatch.setattr(session_events, "BUSY_SECONDS", 0.1)
    house = session_events.ClickHouse(url, {})
    shipment = session_events.Shipment(db, house)
    house.prepare(None)
    begun(shipment)
    with contextlib.closing(sqlite3.connect(db, isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(session_events.Refused, match=r"cannot write the mark .* locked"):
            shipment.step()
        assert marks(db) == [session_events.SHIP_LEAST] and viewed(clickhouse, url) == 50
        holder.execute("ROLLBACK")
    assert not shipment.step() and marks(db) == [50]
    with contextlib.closing(sqlite3.connect(db)) as connection:
        connection.execute("CREATE TRIGGER no BEFORE INSERT ON ship_marks"
                           " BEGIN SELECT RAISE(ABORT, 'readonly'); END")
        insert(connection, many(5, 700))
    status, _, err = ship(db, url)
    assert status == 1 and "cannot write the mark" in err and "server's user" in err


def insert(connection, rows):
    for r in rows:
        connection.execute("INSERT INTO session_events (%s) VALUES (%s)"
                           % (", ".join(r), ", ".join("?" * len(r))), list(r.values()))
    connection.commit()


UNFIT = (
    ("identity_hash", "f" * 63),
    ("identity_hash", "F" * 64),
    ("session_id_hash", b"f" * 64),
    ("github_hash", ""),
    ("ended_at", "2026-02-30T00:00:00.000Z"),
    ("ended_at", 5),
    ("received_at", "1969-12-31T23:59:59Z"),
    ("received_at", "2105-01-01T00:00:00Z"),
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
    """It is named by its id and column; what stands before it is shipped, it and what comes after
    it wait.
    """
    url = clickhouse.database()
    rows = many(300)
    looser_db = str(tmp_path / "a.db")
    with contextlib.closing(sqlite3.connect(looser_db)) as connection:
        connection.executescript((ROOT / "schema.sql").read_text().replace(" NOT NULL", ""))
        connection.execute("DROP TRIGGER session_events_discoveries_insert")
        insert(connection, rows)
        connection.execute(
            "UPDATE session_events SET identity_hash = 'auth-jwt-flow' WHERE id = 251")
        connection.commit()
        status, out, err = ship(looser_db, url)
        assert (status, out) == (1, "") and "row id 251 is no event: its identity_hash" in err
        assert clickhouse.ask("SELECT count(), max(id) FROM session_events", url) == [
            ["250", "250"]]
        assert ship(looser_db, url)[0] == ship(looser_db, url, "--check")[0] == 1
        # It has a mark although nothing can go, so that no server deletes what was not shipped.
        other = clickhouse.database()
        connection.execute("UPDATE session_events SET branch_sha = 'auth-jwt-flow' WHERE id = 1")
        connection.commit()
        status, out, err = ship(looser_db, other)
        assert (status, out) == (1, "") and "row id 1 is no event: its branch_sha" in err
        assert sorted(marks(looser_db)) == [session_events.SHIP_LEAST, 250]
        connection.execute("DELETE FROM session_events WHERE id = 251")
        connection.commit()
    assert shipped(looser_db, url) == 49
    del rows[250]
    whole(clickhouse, url, rows)


def test_ship_names_the_row_that_clickhouse_refuses(tmp_path, clickhouse):
    """Whatever the cluster's owner has put behind the table: the row is found, and ClickHouse's
    words, which could quote it, are not printed.
    """
    url = clickhouse.database()
    rows = many(600)
    db = stored(tmp_path / "a.db", *rows)
    make_tables(clickhouse, url)
    clickhouse.ask("ALTER TABLE session_events_raw ADD COLUMN picky UInt64 MATERIALIZED"
                   " toUInt64(if(tokens_saved = %d,"
                   " concat('x', lower(hex(identity_hash))), '1'))"
                   % rows[442]["tokens_saved"], url)
    status, out, err = ship(db, url)
    assert (
        (status, out) == (1, "") and "row id 443 cannot be shipped" in err and "query_id" in err
    ), err
    assert clickhouse.ask("SELECT count(), max(id) FROM session_events", url) == [
        ["442", "442"]]
    clickhouse.ask("ALTER TABLE session_events_raw DROP COLUMN picky", url)
    assert shipped(db, url) == 158
    whole(clickhouse, url, rows)
    clickhouse.ask("DROP TABLE session_events_raw", url)
    status, _, err = ship(db, url, "--check")
    assert status == 1 and "session_events_raw doesn't exist" in err


def test_ship_check_names_the_days(tmp_path, clickhouse):
    """--check is about sessions: it names the days of which some are not in the view, what waits,
    and what lies in a month that was dropped; other nodes and repeats make no difference.
    """
    url = clickhouse.database()
    rows = [
        dict(r, ended_at="2026-%02d-1%s" % (4 + n % 3, r["ended_at"][9:]))
        for n, r in enumerate(many(900, 10))
    ]
    db = stored(tmp_path / "a.db", *rows)
    status, _, err = ship(db, url, "--check")
    assert status == 1 and "session_events_raw doesn't exist" in err
    assert shipped(db, url) == 900
    assert ship(db, url, "--check") == (0, SAME % (900, 900), "")
    assert shipped(stored(tmp_path / "b.db", *retold(rows[:300], sooner)), url) == 300
    assert ship(db, url, "--check") == (0, SAME % (900, 900), "")
    today = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    with contextlib.closing(sqlite3.connect(db)) as connection:
        insert(connection, many(5, 5000, received_at=today))
        assert ship(db, url, "--check")[0] == 0  # they came today
        insert(connection, many(6, 6000, received_at="2026-05-20T00:00:00Z"))
    status, out, _ = ship(db, url, "--check")
    assert status == 1 and out.splitlines()[0] == "2026-05-20  6 waiting to be shipped"
    assert "0 missing, 11 waiting to be shipped" in out
    assert shipped(db, url) == 11 and ship(db, url, "--check")[0] == 0
    # What was taken out there: some sessions of two days, then a whole month.
    kept = "CREATE TABLE kept AS session_events_raw"
    clickhouse.ask(kept
                   + " ENGINE = ReplacingMergeTree(seniority) PARTITION BY toYYYYMM(ended) ORDER BY"
                   " (identity_hash, session_id_hash)", url)
    some = "id % 10 = 5 AND node = '{}' AND id > 300 AND id <= 900".format(name_of(db, url))
    clickhouse.ask("INSERT INTO kept SELECT * FROM session_events_raw WHERE NOT (%s)" % some, url)
    gone = int(clickhouse.ask("SELECT count() FROM session_events_raw WHERE " + some, url)[0][0])
    clickhouse.ask("RENAME TABLE session_events_raw TO first, kept TO session_events_raw", url)
    status, out, _ = ship(db, url, "--check")
    *days, summary = out.splitlines()
    assert status == 1 and "%d missing" % gone in summary and "--again" in summary
    assert [line[:10] for line in days] == ["2026-04-15", "2026-05-15", "2026-06-15"], out
    assert sum(int(re.match(r"\S+  (\d+) missing$", line)[1]) for line in days) == gone
    assert shipped(db, url, "--again") == 911 and ship(db, url, "--check")[0] == 0
    clickhouse.ask("ALTER TABLE session_events_raw DROP PARTITION 202604", url)
    status, out, _ = ship(db, url, "--check")
    assert status == 0 and "2026-04  " in out and " in dropped months" in out, out
    assert shipped(db, url) == 0  # it stays dropped
    late = stored(
        tmp_path / "c.db",
        *many(7, 7000, received_at="2027-01-15T00:00:00Z", ended_at="2027-01-10T00:00:00.000Z")[2:])
    assert shipped(late, url) == 5
    clickhouse.ask("ALTER TABLE session_events_raw DROP PARTITION 202701", url)
    assert shipped(late, url) == 0  # also where none of the file's last rows is left
    status, out, _ = ship(late, url, "--check")
    assert status == 0 and "2027-01  5 in dropped months\n" in out, out
    clickhouse.ask("TRUNCATE TABLE session_events_raw", url)
    # An empty table is no table without old months, also when another node was faster.
    for more in ([], many(3, 9000)):
        if more:
            assert shipped(stored(tmp_path / "d.db", *more), url) == 3
        status, out, _ = ship(late, url, "--check")
        assert status == 1 and "2027-01-15  5 missing\n" in out, out
    status, out, err = ship(late, url)
    assert (status, out) == (0, "5 rows shipped\n") and "emptied or made anew" in err, err
    assert ship(late, url, "--check")[0] == 0


def test_ship_a_dropped_month_stays_dropped(tmp_path, clickhouse):
    """Also where it was the only one, and where a node has nothing else."""
    url = clickhouse.database()
    rows = many(20, 10, received_at="2026-05-15T00:00:00Z", ended_at="2026-05-10T00:00:00.000Z")[2:]
    db = stored(tmp_path / "a.db", *rows)
    assert shipped(db, url) == 18
    clickhouse.ask("ALTER TABLE session_events_raw DROP PARTITION 202605", url)
    assert viewed(clickhouse, url) == shipped(db, url) == 0
    assert ship(db, url, "--check")[1].startswith("2026-05  18 in dropped months\n")
    with contextlib.closing(sqlite3.connect(db)) as connection:
        insert(connection, many(7, 900, received_at="2026-08-15T00:00:00Z")[2:])
    assert shipped(db, url) == viewed(clickhouse, url) == 5
    assert shipped(db, url, "--again") == viewed(clickhouse, url) == 23


@needs_linux
def test_ship_full_disk_of_clickhouse(tmp_path):
    """Where ClickHouse's disk is full, --follow blames no row, waits, and goes on by itself when
    there is room.
    """
    if not shutil.which("clickhouse-server"):
        pytest.skip("no clickhouse-server on this machine: shipping is not tested")
    rows = many(1500)
    db = stored(tmp_path / "a.db", *rows)
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=24m", "tmpfs") as disk:
        house = ClickHouse(disk)
        process = None
        try:
            url = house.database()
            shutil.copy(str(db), str(tmp_path / "b.db"))
            fill = disk / "fill"
            with contextlib.suppress(OSError), open(str(fill), "wb") as file:
                make_tables(house, url)
                while True:
                    file.write(bytes(4096))
                    file.flush()
            status, _, err = ship(db, url)
            assert status == 1 and "row id" not in err, err
            assert re.search(r"its error (75|243) \(.*(space|write)", err), err
            process = shipper(db, url, "--follow")
            line = json.loads(process.stderr.readline())
            assert line["event"] == "waiting" and "row id" not in line["why"], line
            fill.unlink()
            eventually(lambda: viewed(house, url) == 1500, process)
            process.send_signal(signal.SIGTERM)
            status, _, err = finished(process)
            assert status == 0 and '"event": "recovered"' in err, err
            whole(house, url, rows)
        finally:
            if process and process.poll() is None:
                process.kill()
                process.communicate()
            house.stop()


def test_ship_blames_no_row_for_what_clickhouse_refuses_of_all(tmp_path, clickhouse):
    """If a row that was taken before is refused too, then no row is at fault."""
    url = clickhouse.database()
    db = stored(tmp_path / "a.db", *many(30))
    assert shipped(db, url) == 30
    clickhouse.ask(
        "ALTER TABLE session_events_raw ADD COLUMN picky UInt64 MATERIALIZED toUInt64(concat('x',"
        " plugin_version))", url)
    with contextlib.closing(sqlite3.connect(db)) as connection:
        insert(connection, many(40, 800))
    status, _, err = ship(db, url)
    assert status == 1 and "row id" not in err and "its error" in err, err
    assert marks(db) == [30]
    clickhouse.ask("ALTER TABLE session_events_raw DROP COLUMN picky", url)
    assert shipped(db, url) == 40


def test_ship_gives_a_silent_peer_up(tmp_path):
    assert session_events.SHIP_SILENCE == 30
    db = stored(tmp_path / "a.db", *many(2))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = "http://127.0.0.1:%d/" % silent.getsockname()[1]
        impatient = constants(session_events, SHIP_SILENCE=0.5)
        flags = "ship", "--db", db, "--to", url
        done = recorded_texts(ended("session_events", *flags, before=impatient, timeout=25))
    assert done.returncode == 1 and "timed out" in done.stderr


@needs_linux
def test_ship_goes_on_where_its_log_takes_nothing(tmp_path, clickhouse):
    """A log on a full disk is no reason to stop."""
    url, db = clickhouse.database(), stored(tmp_path / "a.db", *many(30))
    with open("/dev/full", "wb") as full:
        process = subprocess.Popen(
            program("session_events", "ship", "--db", db, "--to", url, "--follow"),
            stdin=subprocess.DEVNULL, stdout=full, stderr=full)
    try:
        eventually(lambda: marks(db) == [30], process)
        clickhouse.ask("DROP TABLE session_events_raw", url)
        eventually(lambda: viewed(clickhouse, url) == 30, process)
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) in (0, 120)  # 120: Python could not write the rest


TOLD = ["last_id", "rows_waiting", "oldest_waiting_seconds", "waiting"]


def ship_metrics(text):
    """{name: value} of the follower's page: a type and a value of each, and nothing else."""
    found = re.findall(
        r"# TYPE session_events_ship_(\w+) gauge\nsession_events_ship_\1 (\d+)\n", text)
    assert text.count("\n") == 2 * len(found)
    return {name: int(value) for name, value in found}


def test_ship_is_watched(tmp_path, clickhouse):
    """Each state is logged once as a line of JSON with the time; once a minute (here: faster) how
    far it is; the metrics say the same; no password, no hash.
    """
    url, port = clickhouse.database(), free_port()
    db = stored(tmp_path / "a.db", *many(300))
    relay = Relay(clickhouse.port)
    by_relay = url.replace(str(clickhouse.port), str(relay.port))
    flags = "--db", db, "--to", by_relay, "--follow", "--metrics", "127.0.0.1:%d" % port
    quick = constants(session_events, FOLLOW_SECONDS=0.1, SHIP_STATUS_SECONDS=0.3)
    process = subprocess.Popen(
        program("session_events", "ship", *flags, before=quick), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=dict(os.environ, CLICKHOUSE_USER="shipper", CLICKHOUSE_PASSWORD="open sesame"))

    def metrics():
        with urllib.request.urlopen("http://127.0.0.1:%d/metrics" % port, timeout=30) as answer:
            text = answer.read().decode()
        assert not NAMES_NOBODY(text) and "shipper" not in text
        return ship_metrics(text)

    try:
        eventually(
            lambda: (
                metrics()
                == {
                    "last_id": 300,
                    "rows_waiting": 0,
                    "oldest_waiting_seconds": 0,
                    "waiting": 0,
                }
            ),
            process,
        )
        target, relay.target = relay.target, free_port()
        eventually(lambda: metrics()["waiting"] == 1, process)
        with contextlib.closing(sqlite3.connect(db)) as connection:
            insert(connection, many(7, 4000, received_at="2026-05-20T00:00:00Z"))
        time.sleep(0.5)  # several tries
        assert metrics()["rows_waiting"] == 7 and metrics()["oldest_waiting_seconds"] > 10**6
        relay.target = target
        eventually(lambda: metrics()["last_id"] == 307 and metrics()["waiting"] == 0, process)
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen("http://127.0.0.1:%d/" % port, timeout=30)
    finally:
        process.send_signal(signal.SIGTERM)
        status, out, err = finished(process)
        relay.stop()
    lines = [json.loads(line) for line in err.splitlines()]
    states = [line["event"] for line in lines if line["event"] != "status"]
    assert (status, out, states) == (0, "", ["shipping", "waiting", "recovered"]), err
    status = [line for line in lines if line["event"] == "status"]
    assert status
    for line in status:
        why = ["why"] if line["waiting"] else []
        assert list(line) == ["time", "event", *why, *TOLD]
    assert all(
        re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"]) for line in lines)


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_ship_metrics_and_clients_that_go_away(tmp_path, capfd, host):
    """The metrics are served on IPv6, too. A file that cannot be read is a 503 that says why,
    whatever its name. A client that goes away leaves no line, least of all with its address.
    """
    family, bare = (socket.AF_INET6 if ":" in host else socket.AF_INET), host.strip("[]")
    try:
        with socket.socket(family) as probe:
            probe.bind((bare, 0))
            port = probe.getsockname()[1]
    except OSError as error:
        assert error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)
        pytest.skip("this machine has no IPv6")
    db = stored(tmp_path / "\u6570.db", *many(3))
    shipment = session_events.Shipment(db, session_events.ClickHouse("http://127.0.0.1:9/", {}))
    session_events.serve_metrics("%s:%d" % (host, port), shipment)
    url, threads = "http://%s:%d/metrics" % (host, port), threading.active_count()
    with urllib.request.urlopen(url, timeout=30) as answer:
        assert list(ship_metrics(answer.read().decode())) == TOLD
    with socket.socket(family) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.connect((bare, port))
        client.sendall(b"GET ")
    os.unlink(db)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(url, timeout=30)
    assert refused.value.code == 503 and b"No such file" in refused.value.read()
    eventually(lambda: threading.active_count() == threads)
    assert capfd.readouterr() == ("", "")


def test_ship_notices_different_peppers(tmp_path, clickhouse):
    """server.py notes a fingerprint of its pepper, of which the pepper cannot be told; nodes with
    different ones are noticed, nodes with the same are not.
    """
    url = clickhouse.database()
    said = {}
    for name, pepper in (("a", "one"), ("b", "one"), ("c", "two"), ("d", "one")):
        db, file = tmp_path / (name + ".db"), tmp_path / pepper
        with serving(db, "--pepper-file", file) as server:
            assert post(server, event("pepper " + name))[0] == 202
        with serving(db, "--pepper-file", file):
            pass
        status, _, said[name] = ship(db, url)
        assert status == 0
        with contextlib.closing(sqlite3.connect(str(db))) as connection:
            (fingerprint,) = connection.execute("SELECT * FROM session_events_pepper").fetchall()
        assert re.fullmatch("[0-9a-f]{16}", fingerprint[0])
        secret = file.read_text().strip()
        assert fingerprint[0] not in secret
        assert fingerprint[0] not in hashlib.sha256(secret.encode()).hexdigest()
    assert said["a"] == said["b"] == ""
    assert "different peppers" in said["c"]
    assert "different" in said["d"]
    for name in "abcda":  # as new files with one pepper
        with contextlib.closing(sqlite3.connect(str(tmp_path / (name + ".db")))) as connection:
            connection.execute("UPDATE session_events_pepper SET fingerprint = 'feed'")
            connection.commit()
        status, _, last = ship(tmp_path / (name + ".db"), url)
        assert status == 0
    assert last == ""
    # One node that had none at first.
    db = stored(tmp_path / "e.db", *many(3))
    alone = clickhouse.database()
    assert shipped(db, alone) == 3
    with contextlib.closing(sqlite3.connect(db)) as connection:
        connection.execute("CREATE TABLE session_events_pepper AS SELECT 'feed' AS fingerprint")
        connection.commit()
    assert shipped(db, alone) == 0


def test_ship_months(tmp_path, clickhouse):
    """A table of the older layout is refused with the statements that migrate it, which lose
    nothing; invented dates make no more than some months; a month is dropped, and what came twice
    appears as the other node has it.
    """
    url = clickhouse.database()
    rows = [
        dict(r, ended_at="%04d-0%d-01T00:00:00.000Z" % (1900 + n % 400, 1 + n % 9))
        for n, r in enumerate(many(800))
    ]
    db = stored(tmp_path / "a.db", *rows)
    make_tables(clickhouse, url)
    made = (clickhouse.ask("SHOW CREATE TABLE session_events_raw",
                           url)[0][0].replace("\\n", " ").replace("\\'", "'"))
    clickhouse.ask("DROP TABLE session_events_raw", url)
    clickhouse.ask(re.sub(r"PARTITION BY \S+", "", made), url)
    status, _, err = ship(db, url)
    assert status == 1 and "older layout" in err
    clickhouse.ask("INSERT INTO session_events_raw (seniority, id, received_at, identity_hash,"
                   " session_id_hash, ended_at, ended)"
                   " SELECT 1, number, toDateTime('2026-05-01 00:00:00', 'UTC'),"
                   " toFixedString(toString(number), 32), toFixedString('s', 32),"
                   " toFixedString('2200-01-01T00:00:00.000Z', 24), toDateTime("
                   "number * 4000000) FROM system.numbers LIMIT 1000", url)
    for statement in err.split("):", 1)[1].replace("\\n", "\n").split(";"):
        if statement.strip():
            clickhouse.ask(statement, url)
    assert clickhouse.ask("SELECT count() FROM session_events_raw FINAL", url) == [["1000"]]
    assert shipped(db, url, rows=20_000) == 800 and viewed(clickhouse, url) == 1800
    assert ship(db, url, "--check")[0] == 0
    assert len(clickhouse.ask("SELECT DISTINCT toYYYYMM(ended) FROM session_events", url)) <= 20
    # Twenty years of one row a month, in one file: more months than one INSERT may have.
    slow = stored(
        tmp_path / "slow.db",
        *(
            row(
                n,
                "slow",
                "%04d-%02d-01T00:00:00.000Z" % (1990 + n // 12, n % 12 + 1),
                received_at="%04d-%02d-01T00:00:00Z" % (1990 + n // 12, n % 12 + 1),
            )
            for n in range(240)
        ),
    )
    assert shipped(slow, url, rows=20_000) == 240 and ship(slow, url, "--check")[0] == 0
    # The same of a clock that was wrong: ClickHouse since 19 takes 100 months in one INSERT.
    wide = stored(
        tmp_path / "wide.db",
        *(row(n, "wide", "%04d-%02d-%02dT00:00:00.000Z" % (1985 + n % 40, 1 + n % 12, 1 + n % 28),
              received_at="%04d-%02d-%02dT00:00:00Z" % (
                  (1990, 2000, 2010, 2020)[n // 800], 1 + n % 12, 1 + n % 28))
          for n in range(3200)))
    other = clickhouse.database()
    house = session_events.ClickHouse(other, {})
    house.prepare(None)
    with session_events.reading(wide) as reader:
        batch = session_events.ship_batch(reader, "> ? ORDER BY id", 0, 20_000)
    assert len(batch) == 800
    house.insert("ab" * 8, batch)
    months = clickhouse.ask("SELECT uniqExact(toYYYYMM(ended)) FROM session_events", other)
    assert 12 < int(months[0][0]) <= 26, months
    # The same session on two nodes, received at times so different that `ended` is in two months.
    one = many(2, 50_000)[:1]
    two = [dict(one[0], received_at="2030-01-01T00:00:00Z", tool_count=3)]
    assert (shipped(stored(tmp_path / "one.db", *one), url)
            == shipped(stored(tmp_path / "two.db", *two), url)
            == 1)
    mine = ("SELECT tool_count, toYYYYMM(ended) FROM session_events WHERE session_id_hash = '%s'"
            % one[0]["session_id_hash"])
    (first,) = clickhouse.ask(mine, url)
    assert first[0] == str(one[0]["tool_count"])
    clickhouse.ask("ALTER TABLE session_events_raw DROP PARTITION " + first[1], url)
    (second,) = clickhouse.ask(mine, url)
    assert second[0] == "3" and second[1] != first[1]
    assert ship(tmp_path / "one.db", url, "--check")[:2] == (0, SAME % (1, 1))


def test_ship_rows_by_the_rules(tmp_path):
    """Unusual rows are shipped in the usual form, among others and alone; a row that is no event is
    named by its column, and ends the batch before it.
    """
    odd = [
        ("ended_at", "2026-05-22T12:34:56Z", "2026-05-22T12:34:56.000Z"),
        ("ended_at", "0001-01-01T00:00:00Z", "0001-01-01T00:00:00.000Z"),
        ("ended_at", "9999-12-31T23:59:59.999Z", "9999-12-31T23:59:59.999Z"),
        ("ended_at", "2024-02-29T00:00:00.000Z", "2024-02-29T00:00:00.000Z"),
        ("received_at", "2026-05-22T12:34:56.500Z", "2026-05-22T12:34:56.500Z"),
        ("received_at", "1970-01-01T00:00:00Z", "1970-01-01T00:00:00Z"),
        ("received_at", "2104-12-31T23:59:59Z", "2104-12-31T23:59:59Z"),
        ("received_at", "2024-02-29T23:59:59Z", "2024-02-29T23:59:59Z"),
        ("branch_sha", "ABCDEF0", "ABCDEF0"),
        ("branch_sha", None, ""),
        ("github_hash", None, ""),
        ("discovery_refs_json", '["\\u0061b", "c"]', '["ab","c"]'),
        ("discovery_refs_json", " [ ] ", "[]"),
        ("discovery_refs_json", '["b","a","b"]', '["b","a","b"]'),
        ("discovery_refs_json", '["b", "a", "b"]', '["b","a","b"]'),
    ]
    bad = [
        *UNFIT,
        ("identity_hash", "f" * 64 + "\0x"),
        ("identity_hash", None),
        ("branch_sha", "abcdef0\0z"),
        ("plugin_version", "1\0"),
        ("discovery_refs_json", '["a"'),
        ("discovery_refs_json", '["a"],["b"]'),
        ("discovery_refs_json", '"[]"'),
        ("discovery_refs_json", '[["a"]]'),
        ("ended_at", "0000-01-01T00:00:00.000Z"),
        ("ended_at", "0001-01-01T00:00:00+02:00"),
        ("ended_at", "2023-02-29T00:00:00.000Z"),
        ("ended_at", "2026-04-31T00:00:00.000Z"),
        ("received_at", "2026-02-30T00:00:00Z"),
        ("received_at", "now"),
        ("received_at", b"2026-05-22T12:34:56Z"),
        ("github_hash", r"\N"),
        ("plugin_version", None),
        ("discovery_refs_json", "['a']"),
        ("ended_at", "2026-05-22T24:00:00.000Z"),
        ("ended_at", "now"),
        ("received_at", None),
        ("tool_count", b"1"),
        ("discovery_refs_json", '["a\\u0000"]'),
        ("discovery_refs_json", None),
    ]
    db, places = str(tmp_path / "x.db"), ["received_at", *session_events.COLUMNS[1:]]
    with contextlib.closing(sqlite3.connect(db)) as connection:
        connection.executescript((ROOT / "schema.sql").read_text().replace(" NOT NULL", ""))
        connection.execute("DROP TRIGGER session_events_discoveries_insert")
        connection.execute("DROP TRIGGER session_events_discoveries_delete")
        rows = many(20)

        def batch(*change):
            connection.execute("DELETE FROM session_events")
            connection.execute("DELETE FROM sqlite_sequence")
            insert(connection, rows)
            if change:
                connection.execute(
                    "UPDATE session_events SET %s = ? WHERE id = 9" % change[0], change[1:])
            connection.commit()
            with session_events.reading(db) as reader:
                return session_events.ship_batch(reader, "> ? ORDER BY id", 0, 100)

        usual = batch()
        assert [row_id for row_id, _ in usual] == list(range(1, 21))
        for column, value, expected in odd:
            found = batch(column, value)
            with session_events.reading(db) as reader:
                ((row_id, line),) = session_events.ship_batch(reader, "= ?", 9, 1)
            assert row_id == 9 and line.split("\t")[places.index(column)] == expected
            if line[:4] == "2026":
                assert found == [*usual[:8], (9, line), *usual[9:]], (column, value)
            else:  # a batch is of one year
                assert found == usual[:8], (column, value)
        for column, value in bad:
            assert batch(column, value) == usual[:8], (column, value)
            with session_events.reading(db) as reader:
                with pytest.raises(
                        session_events.Unfit, match="row id 9 is no event: its " + column):
                    session_events.ship_batch(reader, "> ? ORDER BY id", 8, 100)


def test_ship_chaos(tmp_path, clickhouse):
    """A server, a ship and ClickHouse are killed in turn, and a file goes back to a backup.

    There are two servers, each with its follower. Every event that was answered 202 is in the view
    once. TEST_SECONDS=60 makes it longer.
    """
    url, rng = clickhouse.database(), random.Random(5)
    dbs = [tmp_path / "0.db", tmp_path / "1.db"]
    servers = [Server(db) for db in dbs]
    ships = [shipper(db, url, "--follow") for db in dbs]
    answered202, stop = set(), threading.Event()

    def send(who):
        for n in itertools.count():
            value = event("chaos %d %d" % (who, n))
            while not stop.is_set():
                with contextlib.suppress(Exception):
                    if post(servers[rng.randrange(2)], value)[0] == 202:
                        answered202.add(value["session_id_hash"])
                        break
                time.sleep(0.01)
            if stop.is_set():
                return
            time.sleep(0.005)

    def everything():
        seen = [r[0] for r in clickhouse.ask("SELECT session_id_hash FROM session_events", url)]
        return len(seen) == len(set(seen)) and answered202 <= set(seen)

    threads = [threading.Thread(target=send, args=(who,)) for who in range(3)]
    for thread in threads:
        thread.start()
    try:
        end = time.monotonic() + float(os.environ.get("TEST_SECONDS", "1"))
        for turn in itertools.count():
            if turn > 3 and time.monotonic() > end:
                break
            node, reached = turn % 2, len(answered202)
            until(lambda at_least=reached + 20: len(answered202) > at_least)
            if turn % 4 == 0:
                servers[node].stop(signal.SIGKILL)
                servers[node] = Server(dbs[node])
            elif turn % 4 == 1:
                ships[node].kill()
                ships[node].communicate()
                ships[node] = shipper(dbs[node], url, "--follow")
            elif turn % 4 == 2:
                clickhouse.stop()
                clickhouse.start()
            else:  # a backup; what it lacks has arrived before it is put back
                servers[node].stop()
                shutil.copy(str(dbs[node]), str(tmp_path / "backup.db"))
                servers[node] = Server(dbs[node])
                time.sleep(0.3)
                servers[node].stop()
                with contextlib.closing(sqlite3.connect(str(dbs[node]))) as connection:
                    last = connection.execute("SELECT max(id) FROM session_events").fetchone()[0]
                eventually(lambda at=dbs[node], to=last: marks(at) == [to])
                restored(tmp_path / "backup.db", dbs[node])
                servers[node] = Server(dbs[node])
        stop.set()
        for thread in threads:
            thread.join(60)
        assert len(answered202) > 80
        eventually(everything)
    finally:
        stop.set()
        for server in servers:
            server.stop()
        for process in ships:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)
        if clickhouse.process.poll() is not None:
            clickhouse.start()
    for db in dbs:
        status, out, err = ship(db, url, "--check")
        assert status == 0, (out, err)


def test_ship_unit_of_the_readme(tmp_path):
    """The systemd unit for `ship` in the README is one that systemd takes."""
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze checks the unit")
    units = re.findall(r"(?s)```ini\n(.*?)```", (ROOT / "README.md").read_text())
    (unit,) = [text for text in units if "session_events.py ship" in text]
    file = tmp_path / "session-events-ship.service"
    file.write_text(
        unit.replace("/opt/session-events/session_events.py",
                     str(ROOT / "session_events.py")).replace("/usr/bin/python3", sys.executable))
    done = run(["systemd-analyze", "verify", "--man=no", file])
    assert done.returncode == 0 and "session-events-ship" not in done.stderr, done.stderr


def test_ship_asks_for_sessions_without_naming_them(tmp_path):
    """Whole hashes travel as a table. ClickHouse writes the query's text into its logs."""
    with session_events.reading(stored(tmp_path / "a.db", *many(3))) as reader:
        rows = session_events.ship_batch(reader, "> ? ORDER BY id", 0, 10)
    some = reply(200, b"1\t202605\n3\t202604\n"), reply(200, b"3\t202604\n"), reply(200)
    with Pretender(*some) as pretender:
        house = session_events.ClickHouse(pretender.url, {})
        assert house.missing(rows) == {3: "202604"} and house.missing(rows) == {}
    head, body = pretender.asked[0][1].split(b"\r\n\r\n", 1)
    for digest in [cell for _, line in rows for cell in line.split("\t")[1:4:2]]:
        assert digest.encode() in body and digest.encode() not in head


@quick
@pytest.mark.parametrize("said", [b"<html>", b"1\t202605", b"1\t1 OR 1\n", b"x\t202605\n"])
def test_ship_check_believes_no_other_answer(tmp_path, said):
    """What is no list of ids and months is not taken for "nothing is missing"."""
    with session_events.reading(stored(tmp_path / "a.db", *many(3))) as reader:
        rows = session_events.ship_batch(reader, "> ? ORDER BY id", 0, 10)
    with Pretender(reply(200, b"1\t202605\n"), reply(200, said)) as pretender:
        with pytest.raises(session_events.Refused, match="answers what was not asked"):
            session_events.ClickHouse(pretender.url, {}).missing(rows)


def test_ship_seniority(clickhouse):
    """Sooner comes before later, then the node whose name is less; all moments and names fit into
    64 bits.
    """
    least = session_events.SENIORITY % "toDateTime(toUInt32(%d))"
    asked = [
        least.format(tie=tie) % moment
        for moment in (0, 1, 1_800_000_000, (1 << 32) - 1)
        for tie in (0, 1, (1 << 32) - 1)
    ]
    listed = [int(n) for n in clickhouse.ask("SELECT " + ", ".join(asked))[0]]
    assert listed == sorted(set(listed), reverse=True)
    assert listed[0] == (1 << 64) - 1 and listed[-1] == 0


class Pretender(threading.Thread):
    """An HTTP server that gives one prepared answer (bytes) to each connection.

    It keeps what it was asked and when.
    """

    def __init__(self, *answers, tls=None, patient=True):
        super().__init__(
            daemon=True
        )  # a request that does not come may not keep the tests from ending
        self.patient = patient  # else it closes without reading what is still sent
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.answers, self.tls, self.asked = answers, tls, []
        self.url = "%s://127.0.0.1:%d/" % (
            "https" if tls else "http", self.listener.getsockname()[1])

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
        [b"HTTP/1.1 %d X" % status, b"Content-Length: %d" % len(body), *headers, b"", body])


def test_ship_and_servers_that_are_no_clickhouse(tmp_path, clickhouse, capfdbinary, monkeypatch):
    """One line says what is wrong with the other side. It has no password."""
    db = stored(tmp_path / "a.db", *many(10))
    secret = {"CLICKHOUSE_USER": "shipper", "CLICKHOUSE_PASSWORD": "open sesame"}
    login = b"Authorization: Basic " + base64.b64encode(b"shipper:open sesame")
    engine = b"session_events_raw\tReplacingMergeTree PARTITION BY toYYYYMM(ended)\n"
    made = reply(200, engine + b"session_events\t\ndiscovery_propagation\t\n")
    look = reply(200, b"99\t[]\n")
    ready = (made, look, look, reply(200))
    for answers, says in (
        ([reply(302, b"", b"Location: http://127.0.0.1:9/")], "status 302, and not as ClickHouse"),
        # Else every row would seem shipped.
        ([reply(200), reply(200), reply(200), reply(200), reply(200)], "what was not asked"),
        ([reply(404, b"nothing here")], "status 404, and not as ClickHouse"),
        ([b"SSH-2.0-x\r\n"], "SSH-2.0-x"),
        ([b"HTTP/1.1 200 X\r\nContent-Length: 50\r\n\r\nshort"], "45 more expected"),
        ([reply(503, b"busy")], "answers with status 503"),
        ([reply(500, b"Code: 241, e.displayText() = memory")],
         "its error 241 (e.displayText() = memory)"),
        ([reply(500, b"Code: 62. DB::Exception: \x1b[2J wrong")],
         "its error 62 (DB::Exception: \\x1b[2J wrong)"),
        ([reply(200, b"session_events_raw\tMergeTree\n")], "RENAME TABLE"),
        ([made, reply(200, b"1" * 30 + b"\t[]\n")], "not asked"),
        # What it says where rows go could quote one, unless it is about the house.
        ([*ready, reply(500, b"Code: 210, e.x %s" % (b"f" * 64))],
         "its error 210 (its log has the words"),
        ([*ready, reply(500, b"Code: 75, e.x")], "its error 75 (e.x)"),
    ):
        with Pretender(*answers) as pretender, monkeypatch.context() as changed:
            for name, value in secret.items():
                changed.setenv(name, value)
            status, out, err = answered(capfdbinary, ["ship", "--db", db, "--to", pretender.url])
        assert (status, out) == (1, "") and says in err and not NAMES_NOBODY(err), (says, err)
        assert len(pretender.asked) == len(answers)
        for _, request in pretender.asked:
            head = request.split(b"\r\n\r\n")[0].split(b"\r\n")
            assert login in head and b"shipper" not in head[0]
    with Pretender(reply(200)) as pretender:  # in the place of a ClickHouse that was there before
        shipment = session_events.Shipment(db, session_events.ClickHouse(pretender.url, {}))
        mark = begun(shipment)
        shipment.write(mark, mark._replace(last_id=5))
        with pytest.raises(session_events.Refused, match="not asked"):
            shipment.step()
        assert mark_of(shipment).last_id == 5
    nowhere = "http://127.0.0.1:%d/" % free_port()
    assert "cannot reach" in ship(db, nowhere)[2]
    # A destination that never answered has no mark, for which --retain-days would wait.
    shipment = session_events.Shipment(db, session_events.ClickHouse(nowhere, {}))
    assert mark_of(shipment).node == ""
    with Pretender(reply(503), reply(401, b"Code: 516. DB::Exception: no such user")) as pretender:
        process = shipper(db, pretender.url, "--follow", env=secret)
    with pytest.raises(subprocess.TimeoutExpired):  # it waits for a password, too
        process.wait(1)
    process.send_signal(signal.SIGTERM)
    status, _, err = finished(process)
    assert status == 0 and err.count('"event": "waiting"') == err.count("\n") + 1 == 1, err
    wide_db = stored(tmp_path / "b.db",
                     dict(row(1, refs=["r"]), discovery_refs_json=json.dumps(["r" * 128] * 200)))
    with session_events.reading(wide_db) as reader:
        wide = session_events.ship_batch(reader, "> ? ORDER BY id", 0, 1)
    with Pretender(reply(503), patient=False) as pretender:  # refused before it was all sent
        house = session_events.ClickHouse(pretender.url, {})
        with pytest.raises(session_events.Refused, match="status 503"):
            house.insert("ab" * 8, wide * 800)
    url = clickhouse.database()
    wrong = dict(secret, CLICKHOUSE_PASSWORD="open barley")
    # Its own words, where no row is in the request.
    assert "Wrong password" in ship(db, url, env=wrong)[2]
    assert "readonly" in ship(db, url, env={"CLICKHOUSE_USER": "visitor"})[2]
    assert "doesn't exist" in ship(db, url + "x")[2]
    assert "no_such" in ship(db, url + "&no_such=1")[2]
    assert "cluster 'nowhere'" in ship(db, url, "--cluster", "nowhere")[2]
    assert shipped(db, url, env=secret) == 10


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl makes the certificates")
def test_ship_checks_certificates(tmp_path):
    db = stored(tmp_path / "a.db", *many(2))
    cert, key = certificate(tmp_path, "house")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(str(cert), str(key))
    with Pretender(reply(503), tls=tls) as pretender:
        status, _, err = ship(db, pretender.url)
    assert status == 1 and "certificate verify failed" in err and pretender.asked == []
    with Pretender(reply(503), tls=tls) as pretender:
        status, _, err = ship(db, pretender.url, env={"SSL_CERT_FILE": str(cert)})
    assert status == 1 and "status 503" in err and len(pretender.asked) == 1


def test_ship_command_line_and_waiting(tmp_path, capfdbinary, monkeypatch):
    """What `ship` refuses and prints, where a batch ends, and how long it waits after failures."""
    db = stored(tmp_path / "a.db", *many(2))
    for to in ("ftp://h/", "http://", "h:8123", "http://u@h/", "http://u:p@h/", "http://h:99999/",
               "http://h/?user=u", "http://h/?password=p", "http://h/?database=a;b",
               "http://h/?database", "http://h/ x", "http://h/#f", "http://h/\u00e9"):
        status, out, err = answered(capfdbinary, ["ship", "--db", db, "--to", to])
        assert (status, out) == (2, "") and "--to" in err, to
    for argv in (
        [],
        ["--db", db],
        ["--to", "http://h/"],
        ["--db", db, "--to", "http://h/", "--check", "--follow"],
        ["--db", db, "--to", "http://h/", "--follow", "--metrics", "127.0.0.1"],
        ["--db", db, "--to", "http://h/", "--follow", "--metrics", ":0"],
        ["--db", db, "--to", "http://h/", "--follow", "--metrics", "127.0.0.1:99999"],
    ):
        assert answered(capfdbinary, ["ship", *argv])[0] == 2
    house = session_events.ClickHouse("http://h/", {"CLICKHOUSE_PASSWORD": "two\nl\u00efnes"})
    login = base64.b64encode(b"default:two\nl\xc3\xafnes").decode()
    assert house.headers == {"Authorization": "Basic " + login}
    out = answered(capfdbinary,
                   ["ship", "--print-ddl", "--cluster", "main", "--to", "http://h/?database=x"])[1]
    assert out.count(" ON CLUSTER 'main'") == 4
    assert "_local, cityHash64(identity_hash, session_id_hash))" in out
    assert ("ReplicatedReplacingMergeTree("
            "'/clickhouse/tables/{shard}/x/session_events_local_by_month', '{replica}', sen"
            in out)
    for made in (out, answered(capfdbinary, ["ship", "--print-ddl"])[1]):
        assert "PARTITION BY toYYYYMM(ended) ORDER BY (identity_hash, session_id_hash);" in made

    monkeypatch.setattr(
        session_events, "SHIP_BYTES", 20_000
    )  # a batch ends early where rows are large
    refs = json.dumps(["r%d" % n + "r" * 120 for n in range(200)], separators=(",", ":"))
    db = stored(tmp_path / "wide.db", *many(300, discovery_refs_json=refs))
    with session_events.reading(db) as reader:
        ids = [row_id for row_id, _ in session_events.ship_batch(reader, "> ? ORDER BY id", 0, 300)]
        assert ids == [1, 2]  # the first is short
        assert session_events.ship_batch(reader, "> ? ORDER BY id", 300, 300) == []

    pauses = []

    def sleep(seconds):
        pauses.append(seconds)
        if len(pauses) == 8:
            raise KeyboardInterrupt

    monkeypatch.setattr(session_events.time, "sleep", sleep)
    nobody = session_events.ClickHouse("http://127.0.0.1:%d/" % free_port(), {})
    for share, expected in ((1.0, [10, 20, 40, 80, 160, 300, 300, 300]),
                            (0.5, [5, 10, 20, 40, 80, 150, 150, 150])):  # chance takes half
        pauses.clear()
        monkeypatch.setattr(session_events.random, "uniform", lambda *ends, share=share: (
            share if share in ends else None))
        with pytest.raises(KeyboardInterrupt):
            session_events.follow(session_events.Shipment(db, nobody), None)
        assert pauses == expected


@needs_linux
def test_ship_in_constant_memory(tmp_path, clickhouse):
    """Six times the rows need hardly more memory. A terminal sees how far the command is."""
    peaks = []
    for count in (2_000, 12_000):
        db = stored(
            tmp_path / ("%d.db" % count),
            *(row(n, n % 50, refs=["x"], received_at="2026-05-22T12:00:00Z") for n in range(count)))
        url = clickhouse.database()
        status, out, err = ship(db, url, rows=1000, peak=True)
        assert status == 0 and out.startswith("{:,} rows shipped".format(count)), err
        assert ship(db, url, "--check", rows=1000)[0] == 0
        peaks.append(int(err))
    assert peaks[1] < peaks[0] + 6_000  # KiB; 10,000 rows as Python objects would be 11,000
    ours, theirs = os.openpty()
    db, url = str(tmp_path / "2000.db"), clickhouse.database()
    small = constants(session_events, SHIP_ROWS=700)
    subprocess.run(program("session_events", "ship", "--db", db, "--to", url, before=small),
                   stdout=subprocess.DEVNULL, stderr=theirs, timeout=120)
    os.close(theirs)
    assert b"\r700 rows shipped\r1,400 rows shipped\r" in os.read(ours, 1 << 16)
    os.close(ours)


# ==================================================================================================
# The house
# ==================================================================================================


# -- README is the contract ------------------------------------------------------------------------


def readme_part(heading):
    """README's text from a heading's line to the next heading of the same level or a higher one."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    start = text.index("\n%s\n" % heading) + 1
    level = heading.split(" ")[0]
    end = re.compile(r"^#{1,%d} " % len(level), re.MULTILINE).search(text, start + len(heading))
    return text[start : end.start() if end else len(text)]


def readme_table(heading, first_cell):
    """The rows, without the head, of the table below `heading` whose head begins with this cell."""
    for block in re.findall(r"(?:^\|.*\n)+", readme_part(heading), re.MULTILINE):
        rows = [
            [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            for line in block.splitlines()
        ]
        if rows[0][0] == first_cell:
            return rows[2:]
    raise AssertionError("README has no such table: %s, %s" % (heading, first_cell))


def ticked(text):
    """What stands between backticks."""
    return re.findall(r"`([^`]*)`", text)


def rule_in_words(rule):
    """A rule of FIELDS as README writes it."""
    if isinstance(rule, str):
        return rule if rule == "moment" else "`%s`" % rule
    least, most = rule
    if isinstance(most, str):
        return "at most %d of `%s`" % (least, most)
    return "whole, {:,} to {:,}".format(least, most)


def test_house_fields_are_the_same_in_every_program_and_in_the_readme():
    """One table of fields: emit.py, server.py, session_events.py and README, cell by cell."""
    assert emit.FIELDS == server.FIELDS == session_events.FIELDS
    rows = readme_table("### 1. The event", "field")
    assert [row[:4] for row in rows] == [
        ["`%s`" % name, kind, "yes" if needed else "no", rule_in_words(rule)]
        for name, kind, needed, rule in server.FIELDS
    ]
    with sqlite3.connect(":memory:") as db:
        db.executescript((ROOT / "schema.sql").read_text(encoding="utf-8"))
        types = {row[1]: row[2] for row in db.execute("PRAGMA table_info(session_events)")}
    whole = [row[0].strip("`") for row in rows if row[4] == "INTEGER"]
    assert whole == [name for name, kind in types.items() if kind == "INTEGER" and name != "id"]


def test_house_flags_and_defaults_of_the_server_are_in_the_readme():
    """README's table of flags has each flag of server.py, and its default."""
    rows = readme_table("## On a server: `server.py`", "flag")
    told = {}
    for flags, default, _ in rows:
        names = [name.split(" ")[0] for name in ticked(flags)]
        defaults = default.split(", ")
        told.update(zip(names, defaults + defaults[-1:] * len(names)))
    parser = server.parser()
    known = {
        action.option_strings[-1]: action.default
        for action in parser._actions
        if action.option_strings[-1] not in ("--help", "--version")
    }
    assert set(told) == set(known)
    for flag, default in known.items():
        if isinstance(default, server.Rate):
            assert told[flag] == "%d/min" % default[0] and default[1] == 60
        elif default and default is not True:
            assert float(told[flag]) == default if flag != "--host" else told[flag] == default, flag
        else:
            assert told[flag] in ("none", "keep all", "off", "required", ""), flag


def test_house_statuses_of_the_server_are_in_the_readme():
    """README, Contract 2 lists the statuses of POST that server.py can give, and no other."""
    source = (ROOT / "server.py").read_text(encoding="utf-8")
    given = set(re.findall(r"(?:Answer|failure|Refused)\((\d{3})\b", source)) - {"200"}
    rows = readme_table("### 2. Sending: `POST /v1/session-events`", "status")
    assert given == {status for row in rows for status in row[0].split(", ")}
    for status, _, body in rows:
        for text in re.findall(r'"error":"([A-Z][^"]*)"', body):
            assert '%s, "%s"' % (status, text) in source or '"%s"' % text in source


def test_house_environment_variables_are_in_the_readme():
    """README names each variable that a program reads, and no other."""
    sources = {
        name: (ROOT / name).read_text(encoding="utf-8") for name in ("emit.py", "session_events.py")
    }
    prefixed = set(re.findall(r'PREFIX \+ "([A-Z_]+)"', sources["emit.py"]))
    read = {emit.PREFIX + name for name in prefixed} | set(emit.SESSION_VARIABLES)
    read |= set(re.findall(r'"(CLAUDE_P[A-Z_]+|DO_NOT_TRACK)"', sources["emit.py"]))
    read |= {"http_proxy", "https_proxy", "no_proxy"}  # urllib reads these
    table = readme_table("## In a coding host: `emit.py`", "environment")
    assert {name for row in table for name in ticked(row[0])} == read
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in re.findall(r'"((?:ASHLR|CLICKHOUSE)_[A-Z_]+)"', sources["session_events.py"]):
        assert "`%s`" % name in text, name
    for name in emit.PASSING_VARIABLES + emit.PASSING_FILES:
        assert "`%s`" % name in readme_part("## In a coding host: `emit.py`"), name


def test_house_flags_of_the_others_are_in_the_readme():
    """README names each flag of emit.py and of ship, and no flag that no program has."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    helps = {name: read(name, "--help").stdout for name in ("ship", "view", "graph", "discoveries")}
    helps["server"] = recorded_texts(ended("server", "--help")).stdout
    helps["emit"] = run([sys.executable, *HOOK, "--help"]).stdout
    flags = {name: set(re.findall(r"--[a-z][a-z-]+", words)) for name, words in helps.items()}
    for name in ("emit", "ship"):
        for flag in flags[name] - {"--help", "--version", "--json"}:
            assert flag in text, "%s %s" % (name, flag)
    others = {"--short", "--database", "--strict"}  # of git, clickhouse-client and mypy
    told = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
    assert told <= set().union(*flags.values()) | others


def test_house_numbers_of_the_contract_are_the_programs():
    """Limits that README names are the constants of the programs."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for words, value in (
        ("at most %d KiB", server.MAX_BODY // 1024),
        ("the head is over %d KiB", server.MAX_HEAD // 1024),
        ("has over %d fields", server.MAX_HEADERS),
        ("at most %d and 30 days", emit.WAITING_EVENTS),
        ("at most 500 and %d days", emit.WAITING_DAYS),
        ("until %d days after its last line", emit.SESSION_DAYS),
        ("goes on alone for %d s at most", emit.LIFE_S),
        ("%d ms at the most", emit.WAIT_S * 1000),
        ("`--days` (%d where nothing is said)", session_events.DAYS_DEFAULT),
        ("others of %d days", session_events.RELATED_DAYS),
        ("shown as its first %d digits", session_events.PREFIX),
        ("`" + emit.DEFAULT_SERVER + "%s`", emit.ENDPOINT_PATH),
    ):
        assert words % value in text, words % value
    assert emit.EVENT_BYTES == server.MAX_BODY and emit.ENDPOINT_PATH == server.ENDPOINT


def test_house_known_answers_of_the_readme():
    """README, Contract 4: its examples are what emit.py computes."""
    part = readme_part("### 4. Identity")
    for known in (MACHINE, IDENTITIES[0][2], OCTOCAT, SESSION_HASH, BUCKETS[0][2]):
        assert known in part
    keys = ", ".join("`%s`" % name for name in emit.SESSION_KEYS)
    assert keys in part.replace("\n", " ")
    assert all("`%s`" % name in part for name in emit.SESSION_VARIABLES)


def test_house_tests_that_the_readme_names_are_there():
    """README sends whoever changes something to tests by name, and each of them exists."""
    named = {name for name in ticked(readme_part("## Changing it")) if name.startswith("test_")}
    rooms = {"test_%s_" % room for room in ("emit", "server", "reader", "ship", "house")}
    assert len(named - rooms) >= 8
    assert [
        name for name in named - rooms - {"test_session_events.py"} if name not in globals()
    ] == []


def test_house_the_code_cites_the_readme():
    """Each "README, Contract N" has its section, and the contract has no other name."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    sections = set(re.findall(r"^### (\d)\. ", text, re.MULTILINE))
    assert sections == set("12345678") and text.count("\n") <= 400
    for name in ("emit.py", "server.py", "session_events.py", "schema.sql"):
        source = (ROOT / name).read_text(encoding="utf-8")
        cited = set(re.findall(r"README,\s+(?:#\s+|--\s+)?Contract\s+(\d)", source))
        assert cited and cited <= sections and "CONTRACT" not in source, name


@quick
def test_house_no_name_is_defined_twice():
    """In a file of 300 names, a second definition would replace the first without a word."""
    for program in ("emit.py", "server.py", "session_events.py", "test_session_events.py"):
        names = collections.Counter()
        for node in ast.parse((ROOT / program).read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names[node.name] += 1
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                for target in getattr(node, "targets", None) or [node.target]:
                    names.update([target.id] if isinstance(target, ast.Name) else [])
        assert [name for name, times in names.items() if times > 1] == [], program


def pieces(secret):
    """What must not be printed of a secret: any 7 digits in a row of a hash or UUID, else all.

    Pieces without a letter are left out: any large number might hold one.
    """
    if re.fullmatch(r"[0-9a-f]{64}|[0-9a-f-]{36}", secret):
        return {
            secret[i : i + 7] for i in range(len(secret) - 6) if not secret[i : i + 7].isdigit()}
    return {secret}


def test_house_nothing_printed_names_anybody(request):
    """README, Contract 8: no secret is in what emit.py and server.py printed in earlier tests.

    A run of a part of the tests may print too little: then this test skips. A whole run never does.
    """
    printed = b"\n".join(PRINTED).decode("utf-8", "replace")
    windows = {printed[i : i + 7] for i in range(len(printed) - 6)}
    for secret in SECRETS:
        for piece in pieces(secret):
            assert piece not in (windows if len(piece) == 7 else printed)
    tests = {name for name in globals() if name.startswith("test_")}
    chosen = tests & {item.function.__name__ for item in request.session.items}
    enough = len(SECRETS) > 10 and len(printed) > 1000
    if chosen != tests and not enough:
        pytest.skip("only %d of %d tests ran and printed too little" % (len(chosen), len(tests)))
    assert enough
