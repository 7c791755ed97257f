"""The toolkit's tests: real sockets, processes, signals and files. They need pytest and nothing else.

    python3 -m pytest -q test_session_events.py

Rooms: the stage (what several rooms use) → emit.py → server.py → session_events.py → the house (what holds the
programs together). Everything that emit.py and server.py print in any test is recorded, and the last test searches it
for anything that could name a person or a session.
"""
import contextlib
import glob
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

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
