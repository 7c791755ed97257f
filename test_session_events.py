"""The toolkit's tests: real sockets, processes, signals and files. They need pytest and nothing else.

    python3 -m pytest -q test_session_events.py

Rooms: the stage (what several rooms use) → emit.py → server.py → session_events.py → the house (what holds the
programs together). Everything that emit.py and server.py print in any test is recorded, and the last test searches it
for anything that could name a person or a session.
"""
import base64
import contextlib
import csv
import datetime
import fcntl
import glob
import hashlib
import io
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from http.client import HTTPConnection
from pathlib import Path

import pytest

import session_events

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


def stored(db, *rows, journal="WAL"):
    """A database at `db` with schema.sql and these rows (dicts of columns, any values); returns its path as
    text."""
    with contextlib.closing(sqlite3.connect(str(db), isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode=" + journal)
        connection.execute("PRAGMA synchronous=OFF")
        connection.executescript((ROOT / "schema.sql").read_text())
        connection.execute("BEGIN")
        for row in rows:
            connection.execute("INSERT INTO session_events (%s) VALUES (%s)" % (
                ", ".join(row), ", ".join("?" * len(row))), list(row.values()))
        connection.execute("COMMIT")
    return str(db)


def sha(*words):
    return hashlib.sha256(" ".join(map(str, words)).encode()).hexdigest()


def row(n, who="ann", at="2026-05-22T12:00:00.000Z", refs=(), github=True, **changes):
    """The columns of session `n` of developer `who`."""
    return dict({"identity_hash": sha("identity", who), "github_hash": sha("login", who) if github else None,
                 "session_id_hash": sha("session", n), "ended_at": at, "tool_count": 10, "tokens_saved": 100,
                 "branch_sha": "abc123def456", "discovery_refs_json": json.dumps(list(refs)),
                 "plugin_version": "1.31.0"}, **changes)


def read(*argv, **options):
    """One command of session_events.py. Not through `run`: showing sessions and discoveries is what it is
    for."""
    done = subprocess.run([sys.executable, str(ROOT / "session_events.py"), *map(str, argv)], timeout=60,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
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
    row(4, "cay", "2026-05-12T11:00:00.000Z", ["y", "x"], github=False, tool_count=8, tokens_saved=13),
)
ANN, BOB, CAY = sha("login ann"), sha("login bob"), sha("identity cay")


def story_session(n):
    stored_row = STORY[n]
    return {"session_id_hash": sha("session", n), "identity_hash_prefix": stored_row["identity_hash"][:8],
            "github_hash_prefix": stored_row["github_hash"] and stored_row["github_hash"][:8],
            "ended_at": stored_row["ended_at"], "tool_count": stored_row["tool_count"],
            "tokens_saved": stored_row["tokens_saved"], "branch_sha": "abc123def456",
            "discovery_refs": list(dict.fromkeys(json.loads(stored_row["discovery_refs_json"])))}


def test_schema_in_the_reader():
    text = (ROOT / "schema.sql").read_text()
    assert text == session_events.SCHEMA


def test_moments():
    """Every form that an event may have, read back as the stored form; what is none is no time."""
    for text, stored_form in (
            ("2026-05-22T12:34:56.000Z", "2026-05-22T12:34:56.000Z"),
            ("2026-05-22T12:34:56Z", "2026-05-22T12:34:56.000Z"),
            ("2026-05-22T14:34:56.5+02:00", "2026-05-22T12:34:56.500Z"),
            ("2026-05-22T12:34:56", "2026-05-22T12:34:56.000Z"),
            ("2026-05-22T12:34:56.123456789Z", "2026-05-22T12:34:56.123Z"),
            ("2026-12-31T23:30:00-01:00", "2027-01-01T00:30:00.000Z"),
            ("0001-01-01T00:00:00Z", "0001-01-01T00:00:00.000Z"),
            ("2026-05-22", None), ("2026-02-30T00:00:00Z", None), ("2026-05-22T24:00:01Z", None),
            ("2026-05-22T12:34:56Z\n", None), ("٢٠٢٦-05-22T12:34:56Z", None),
            ("2026-05-22T12:34:56+25:00", None),
            ("0000-01-01T00:00:00Z", None), ("", None), (None, None), (5, None),
            (b"2026-05-22T12:34:56Z", None)):
        assert session_events.moment_or_none(text) == stored_form, text


def test_answers_worked_out_by_hand(tmp_path):
    db = stored(tmp_path / "e.db", *STORY)
    window = session_events.Window(**MAY)
    a, b, c = ANN[:8], BOB[:8], CAY[:8]
    s1, s2, s3, s4 = (sha("session", n) for n in (1, 2, 3, 4))
    with session_events.reading(db) as reader:
        assert session_events.sessions(reader, window, 2) == dict(
            MAY, sessions=[dict(story_session(4), developer=c), dict(story_session(3), developer=a)],
            total_count_in_window=4)
        assert session_events.sessions(reader, window._replace(github=False))["total_count_in_window"] == 1
        assert session_events.sessions(reader, window._replace(discovery="z"))["total_count_in_window"] == 1
        edges = window._replace(since=STORY[1]["ended_at"], until=STORY[4]["ended_at"])  # in, and not in
        assert session_events.sessions(reader, edges)["total_count_in_window"] == 3

        may_13 = session_events.instant("2026-05-13T00:00:00Z")
        assert session_events.session(reader, s1[:6], may_13) == {
            "session": dict(story_session(1), developer=a),
            "related": [dict(story_session(3), developer=a), dict(story_session(0), developer=a,
                                                                  session_id_hash=sha("session old"))]}
        assert len(session_events.session(reader, s1, may_13 + 10 * 86_400_000)["related"]) == 1

        listed = session_events.discoveries(reader, window)["discoveries"]
        assert [(d["discovery_id"], d["session_count"], d["distinct_identity_count"], d["first_seen_at"],
                 d["last_seen_at"]) for d in listed] == [
            ("x", 3, 3, STORY[1]["ended_at"], STORY[4]["ended_at"]),
            ("y", 3, 2, STORY[1]["ended_at"], STORY[4]["ended_at"]),
            ("z", 1, 1, STORY[2]["ended_at"], STORY[2]["ended_at"])]

        assert session_events.discovery(reader, "x", window) == dict(
            MAY, discovery_id="x", first_seen_at=STORY[1]["ended_at"], last_seen_at=STORY[4]["ended_at"],
            session_count=3, distinct_identity_count=3, developer_count=3,
            reached=[{"at": STORY[n]["ended_at"], "developer": who, "session_id_hash": sha("session", n)}
                     for n, who in ((1, a), (2, b), (4, c))],
            path=[{"session_id_hash": sha("session", n), "developer": who, "ended_at": STORY[n]["ended_at"],
                   "crosses": n != 1} for n, who in ((1, a), (2, b), (4, c))])

        graph = session_events.graph(reader, window)
        assert [node["id"] for node in graph["nodes"]] == [s1, s2, s3, s4]
        assert graph["edges"] == [
            {"source": s1, "target": s2, "discoveries": ["x"], "crosses": True},
            {"source": s1, "target": s3, "discoveries": ["y"], "crosses": False},
            {"source": s3, "target": s4, "discoveries": ["y"], "crosses": True},
            {"source": s2, "target": s4, "discoveries": ["x"], "crosses": True}]
        assert sorted((f["source"], f["target"], f["edges"], f["discoveries"])
                      for f in graph["developers"]) == sorted(
            [(a, b, 1, 1), (a, a, 1, 1), (a, c, 1, 1), (b, c, 1, 1)])
        assert graph["totals"] == {"sessions": 4, "developers": 3, "tool_count": 15, "tokens_saved": 36,
                                   "discoveries": 3, "hand_overs": 3}
        only_y = session_events.graph(reader, window._replace(discovery="y"))
        assert [(e["source"], e["target"]) for e in only_y["edges"]] == [(s1, s3), (s3, s4)]

        activity = session_events.activity(reader, window, may_13 - 1)
        assert [(w["period"], w["developers"], w["came_back"], w["sessions"], w["tool_count"],
                 w["tokens_saved"])
                for w in activity["weeks"]] == [("2026-W19", 2, 0, 2, 3, 12), ("2026-W20", 2, 1, 2, 12, 24)]
        assert [d["sessions"] for d in activity["days"]] == [1, 1, 0, 0, 0, 0, 0, 0, 2]
        assert [m["developers"] for m in activity["months"]] == [3]
        assert activity["active"] == [{"days": 1, "developers": 2, "came_back": 0},
                                      {"days": 7, "developers": 2, "came_back": 1},
                                      {"days": 28, "developers": 3, "came_back": 0}]


def reference_edges(rows):
    """{(source, target): discoveries} by the definition, over rows in time order, a pair at a time."""
    edges = {}
    for ref in {ref for r in rows for ref in json.loads(r["discovery_refs_json"])}:
        touched = [r["session_id_hash"] for r in rows if ref in json.loads(r["discovery_refs_json"])]
        for source, target in zip(touched, touched[1:]):
            edges.setdefault((source, target), set()).add(ref)
    return edges


def test_answers_against_a_plain_reference(tmp_path, monkeypatch):
    """Random sessions, also ended in the same moment. The ways around a missing index (newest rows, steps
    through identities, bounds on counts) are made short, so that each is taken, left half-way, and must
    agree."""
    monkeypatch.setattr(session_events, "BATCH", 3)
    monkeypatch.setattr(session_events, "NEWEST", 20)
    chance = random.Random(11)
    rows = []
    for n in range(400):
        refs = ["r%d" % int(12 * chance.random() ** 2) for _ in range(chance.randrange(4))]
        rows.append(row(n, "dev%d" % chance.randrange(9), "2026-05-%02dT%02d:00:00.000Z" % (
            chance.randrange(1, 29), chance.randrange(24)), dict.fromkeys(refs), github=chance.random() < .5))
    db = stored(tmp_path / "e.db", *rows)
    order = sorted(range(len(rows)), key=lambda i: (rows[i]["ended_at"], i))
    for since, until, github in (("2026-05-01", "2026-05-29", None), ("2026-05-07", "2026-05-15", True),
                                 ("2026-05-10T05:00:00Z", "2026-05-10T06:00:00Z", None),
                                 ("2026-05-20", "", False)):
        window = session_events.window_between(7, since, until, github, None)
        inside = [rows[i] for i in order if window.since <= rows[i]["ended_at"] < window.until
                  and github in (None, rows[i]["github_hash"] is not None)]
        with session_events.reading(db) as reader:
            listed = session_events.sessions(reader, window, 1000)["sessions"]
            assert [s["session_id_hash"] for s in listed] == [r["session_id_hash"] for r in inside][::-1]
            check_discoveries(reader, window, inside)
            graph = session_events.graph(reader, window)
            found = {(e["source"], e["target"]): set(e["discoveries"]) for e in graph["edges"]}
            assert found == reference_edges(inside)
            who = {r["session_id_hash"]: r["github_hash"] or r["identity_hash"] for r in inside}
            assert all(e["crosses"] == (who[e["source"]] != who[e["target"]]) for e in graph["edges"])
            hand_overs = sum(len(refs) for (a, b), refs in found.items() if who[a] != who[b])
            assert graph["totals"]["hand_overs"] == hand_overs
            if inside:
                _, data, left_out = session_events.figure(reader.window(window)[::-1])
                assert (sum(s[5] for s in data["sessions"]), left_out) == (hand_overs, 0)
            activity = session_events.activity(reader, window)
            for period in activity["days"]:
                day = [r for r in inside if r["ended_at"][:10] == period["period"]]
                assert (period["sessions"], period["developers"]) == (
                    len(day), len({r["github_hash"] or r["identity_hash"] for r in day}))
            exported = list(session_events.exported(reader, window))
            assert [s["session_id_hash"] for s in exported] == [r["session_id_hash"] for r in inside]
    monkeypatch.setattr(session_events, "AT_ONCE", 2)
    for identities in (0, 3, 1000):  # no step, too few, all of them
        monkeypatch.setattr(session_events, "IDENTITIES", identities)
        with session_events.reading(db) as reader:
            for r in chance.sample(rows, 20):
                for digits in (64, 12):
                    found = session_events.find_session(reader, r["session_id_hash"][:digits])
                    assert (found.session, found.identity) == (r["session_id_hash"], r["identity_hash"])
            with pytest.raises(session_events.NotFound, match="no session"):
                session_events.find_session(reader, "0" * 64)


def check_discoveries(reader, window, inside):
    expected = []
    for ref in {ref for r in inside for ref in json.loads(r["discovery_refs_json"])}:
        touched = [r for r in inside if ref in json.loads(r["discovery_refs_json"])]
        expected.append((ref, len(touched), len({r["identity_hash"] for r in touched}),
                         touched[0]["ended_at"],
                         touched[-1]["ended_at"]))
    for sort, column in (("session_count", 1), ("distinct_identity_count", 2), ("recent", 4)):
        ranked = sorted(sorted(expected), key=lambda d: d[column], reverse=True)
        for limit in (1, 4, 100):
            listed = session_events.discoveries(reader, window, limit, sort)["discoveries"]
            assert [(d["discovery_id"], d["session_count"], d["distinct_identity_count"], d["first_seen_at"],
                     d["last_seen_at"]) for d in listed] == ranked[:limit], (sort, limit)


def test_prefixes_that_look_alike():
    keys = ["ab" * 32, "ab" * 5 + "cd" * 27, "ab" * 5 + "ce" * 27, "0" * 64]
    assert session_events.labels(keys) == {keys[0]: keys[0][:11], keys[1]: keys[1][:12],
                                           keys[2]: keys[2][:12],
                                           keys[3]: "0" * 8}


HOSTILE_REFS = ["</script><script>document.title='owned'</script>",
                "\"'><img src=x onerror=\"document.title='owned'\">",
                "\u202egnp.exe\u2066", "\x1b]0;owned\x07\x1b[31m", "=HYPERLINK(\"http://example.com\")",
                "<!--", "\\",
                "a\nb\rc\x00d", "\U0001f600", "&amp;&#60;", "x" * 5000]
JUNK = (None, 5, -1, 2.5, 10 ** 18, b"\xff\x00", "", "zzzz", "</script>", "\x1b[2J",
        "2026-05-99T00:00:00.000Z")


def hostile_rows():
    """A row with every hostile discovery, and for each column and each junk a row that has it there."""
    rows = [row("hostile", "mallory", "2026-05-20T10:00:00.000Z", HOSTILE_REFS)]
    refs = ["[[[[", "{}", "[1, null, {\"a\": []}, \"kept\"]", "null", "[" * 100000, "[\"\\ud800\"]"]
    rows += [row("refs %d" % n, "mallory", "2026-05-20T11:00:00.000Z", discovery_refs_json=text)
             for n, text in enumerate(refs)]
    for column in row(0):
        for n, junk in enumerate(JUNK):
            rows.append(row("%s %d" % (column, n), "mallory", "2026-05-20T12:00:00.000Z", ["x"],
                            **{column: junk}))
    return rows


def looser(db):
    """A table like the contract's that forbids nothing: what a program that ignores the contract could
    leave."""
    with contextlib.closing(sqlite3.connect(str(db), isolation_level=None)) as connection:
        schema = (ROOT / "schema.sql").read_text().replace(" NOT NULL", "").replace("UNIQUE INDEX", "INDEX")
        connection.executescript(schema)
        connection.execute("DROP TRIGGER session_events_discoveries_insert")
        for r in hostile_rows():
            connection.execute("INSERT INTO session_events (%s) VALUES (%s)" % (
                ", ".join(r), ", ".join("?" * len(r))), list(r.values()))
        connection.executescript(schema)
        connection.execute("INSERT INTO session_discoveries VALUES (?, 1), (?, 2)", (b"\xff", 7.5))
        connection.execute("UPDATE session_events SET plugin_version = CAST(x'fffe' AS TEXT) WHERE id = 1")
    return str(db)


def commands(db, session):
    """Every reading command in every form."""
    asked = {"sessions": [], "session": [session], "discoveries": [], "discovery": ["x"], "graph": [],
             "activity": [],
             "export": []}
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


def test_hostile_rows_change_nothing(tmp_path, capfdbinary):
    """What is no session is left out and counted; a hostile discovery is shown, and is text wherever it is
    shown."""
    db = looser(tmp_path / "hostile.db")
    for name, form, argv in commands(db, sha("session hostile")):
        status, out, err = answered(capfdbinary, argv)
        assert status == 0, (name, form, err)
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u206f\ud800-\udfff]", out), (name, form)
        if form == "json":
            json.loads(out)
        if form == "jsonl":
            assert all(json.loads(line) for line in out.splitlines())
        if form == "csv":
            assert not re.search(r"(?m)(^|,)\"?[=+@]", out), name
        if form == "html":
            assert out.lower().count("<script") == out.lower().count("</script") == 2 and "<img" not in out
    filters = session_events.Filters(since="2026-05-01", until="2026-06-01")
    with session_events.reading(db) as reader:
        pages = [session_events.replay_page(reader, filters), session_events.sessions_page(reader, filters),
                 session_events.session_page(reader, sha("session hostile")),
                 session_events.discoveries_page(reader, filters, "recent"),
                 *(session_events.discovery_page(reader, ref) for ref in HOSTILE_REFS if "\0" not in ref)]
    for page in pages:
        assert "<img" not in page and "<!--" not in page and "\x1b" not in page and "\u202e" not in page
        assert page.count("<script") == page.count("</script")
    status, out, err = answered(capfdbinary,
                                ["sessions", "--db", db, *IN_MAY, "--limit", 1000, "--format", "json"])
    left = {s["session_id_hash"]: s for s in json.loads(out)["sessions"]}
    assert left[sha("session hostile")]["discovery_refs"] == HOSTILE_REFS
    assert left[sha("session refs 2")]["discovery_refs"] == ["kept"]
    assert left[sha("session tool_count 4")]["tool_count"] == 0 and "left out: " in err
    assert sha("session identity_hash 0") not in left and sha("session github_hash 8") in left


def test_what_it_refuses(tmp_path, capfdbinary):
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
    changed("column.db", "DROP TABLE session_discoveries", "CREATE TABLE session_discoveries (discovery_ref)")
    for name, says in (("none.db", "there is no file"), (".", "is not a file"),
                       ("text.db", "not an SQLite database"),
                       ("empty.db", "holds no session events"), ("other.db", "holds no session events"),
                       ("cut.db", "damaged"), ("v0.db", "start server.py on it once"),
                       ("v2.db", "schema version 2"),
                       ("lacks.db", "session_discoveries lacks discovery_ref, event_id"),
                       ("column.db", "lacks event_id")):
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
            (["sessions", "--db", good, "--since", "2026-05-02", "--until", "2026-05-01"], "must be after",
             2),
            (["sessions", "--db", good, "--since", "2020-01-01", "--until", "2020-02-01"],
             "nothing in this window", 0),
            (["export", "--db", good, "--until", "2020-02-01"], "nothing in this window", 0)):
        status, out, err = answered(capfdbinary, argv)
        assert (status, says in err) == (expected, True), (argv, err)
    for argv in ([], ["sessions"], ["sessions", "--db", good, "--days", "0"],
                 ["sessions", "--db", good, "--days", "x"],
                 ["view", "--db", good, "--port", "65536"]):
        with pytest.raises(SystemExit) as stopped:
            session_events.main(argv)
        assert stopped.value.code == 2


def test_an_ambiguous_prefix_says_which(tmp_path, capfdbinary):
    hashes = ["abcd1" + "0" * 59, "abcd2" + "0" * 59, "abcd2" + "1" * 59]
    db = stored(tmp_path / "e.db", *[row(n, session_id_hash=h) for n, h in enumerate(hashes)])
    status, _, err = answered(capfdbinary, ["session", "abcd", "--db", db])
    assert status == 1 and "3 sessions start with these digits" in err and hashes[1][:16] in err
    status, out, _ = answered(capfdbinary, ["session", "ABCD1", "--db", db])
    assert status == 0 and hashes[0] in out


def test_forms_for_people_and_programs(tmp_path, capfdbinary):
    rows = [*STORY, row("wide", "dee", "2026-05-30T00:00:00.000Z", ["r" * 128] * 3, tool_count=10 ** 6,
                        tokens_saved=10 ** 9), *[row(100 + n, "dev%d" % n, "2026-05-25T00:00:00.000Z", ["x"])
                                                  for n in range(30)]]
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
    assert "default-src 'none'" in texts["graph", "html"] and "href=\"/" not in texts["graph", "html"]


def test_as_a_program(tmp_path):
    """Alone in a folder, without site-packages; help with an example; a reader of the output that leaves
    early."""
    shutil.copy(str(ROOT / "session_events.py"), str(tmp_path))
    for python in interpreters((3, 8)).values():
        done = subprocess.run([python, "-I", "-S", "session_events.py", "demo", "--db",
                               "demo%s.db" % abs(hash(python))],
                              cwd=str(tmp_path), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=60)
        assert done.returncode == 0 and b"synthetic" in done.stdout
    first, *others = [read("export", "--days", 60, "--db", path).stdout for path in tmp_path.glob("*.db")]
    assert len(first) > 50_000 and all(other == first for other in others)  # the same in every Python
    for command in [[], *[[name] for name in (*session_events.QUESTIONS, *session_events.ACTIONS)]]:
        assert "example: python3 session_events.py" in read(*command, "--help").stdout
    db = next(iter(tmp_path.glob("*.db")))
    again = read("demo", "--db", db)
    assert again.returncode == 1 and "is there already" in again.stderr
    process = subprocess.Popen([sys.executable, str(ROOT / "session_events.py"), "export", "--days", "60",
                                "--db", str(db)],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
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


def test_export_in_constant_memory(tmp_path):
    """Ten times the rows may not need noticeably more memory; and a terminal sees how far it is."""
    peaks = []
    for count in (5_000, 50_000):
        db = stored(tmp_path / ("%d.db" % count), *(row(n, n % 50, refs=["x"]) for n in range(count)))
        if os.path.exists("/proc/self/status"):
            done = subprocess.run([sys.executable, "-c", PEAK, str(ROOT / "session_events.py"), "export",
                                   "--db", db,
                                   *IN_MAY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=120)
            status, peak = done.stderr.split()[-2:]
            assert status == b"0" and done.stdout.count(b"\n") == count
            peaks.append(int(peak))
    assert not peaks or peaks[1] < peaks[0] + 16_000  # KiB; 45,000 rows as Python objects would be 60,000
    if hasattr(os, "openpty"):
        ours, theirs = os.openpty()
        subprocess.run([sys.executable, str(ROOT / "session_events.py"), "export", "--db", db, *IN_MAY],
                       stdout=subprocess.DEVNULL, stderr=theirs, timeout=120)
        os.close(theirs)
        assert b"50,000 of 50,000 sessions" in os.read(ours, 1 << 16)
        os.close(ours)


def test_every_condition_of_the_file(tmp_path, monkeypatch):
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


def test_queries_use_the_indexes(tmp_path):
    """What keeps the answers fast at a million rows: no plan reads the table from end to end or sorts a
    window."""
    db = stored(tmp_path / "e.db", *STORY)
    plans = []
    with session_events.reading(db) as reader:
        rows = reader.rows

        def watched(sql, values=()):
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
            assert sql.startswith(session_events.BOUNDS[:20]) or "discovery_ref = ?" in sql, sql


def http(address, path="/", headers=(), method="GET", raw=None):
    """(status, headers, body) of one exchange with a viewer; `raw`: bytes to send in place of a request."""
    with socket.create_connection(address, 60) as connection:
        lines = ["%s %s HTTP/1.1" % (method, path), *("%s: %s" % header for header in dict(
            {"Host": "127.0.0.1:%d" % address[1]}, **dict(headers)).items())]
        connection.sendall(raw or ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))
        connection.shutdown(socket.SHUT_WR)
        with connection.makefile("rb") as answer:
            data = answer.read()
    head, _, body = data.partition(b"\r\n\r\n")
    first, *fields = head.decode("latin-1").split("\r\n")
    return int(first.split()[1]), {k.lower(): v for k, v in (f.split(": ", 1) for f in fields)}, body.decode()


class View:
    """A real `session_events.py view` process. `.address` to connect to, `.url` with its one-time token."""

    def __init__(self, db, *flags, **variables):
        environment = {name: value for name, value in os.environ.items()
                       if name not in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")}
        environment.pop(session_events.ADMIN_TOKEN_VARIABLE, None)
        command = ["view", "--db", str(db)] if db else ["demo"]
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "session_events.py"), *command, "--port", "0", *flags],
            env=dict(environment, **variables), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a job in the background ignores it
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
        status, headers, _ = http(self.address, self.url[len(self.base):])
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


def test_the_door_of_the_viewer(tmp_path):
    """The token opens once; without the cookie, or under another name, nothing; no other site is allowed
    anything."""
    db = stored(tmp_path / "e.db", *STORY)
    with View(db) as view:
        inside = [(path, "x") for path in ("/", "/sessions", "/session/" + sha("session 1"),
                                           "/discovery?ref=x", "/nowhere")]
        refused = {http(view.address, path)[::2] for path, _ in inside}
        assert len(refused) == 1 and next(iter(refused))[0] == 403  # the same answer, whatever there is
        assert http(view.address, "/?token=wrong")[0] == 403
        status, headers, _ = http(view.address, view.url[len(view.base):] + "&days=30")
        assert (status, headers["location"]) == (303, "/?days=30")
        assert re.fullmatch(
            r"session_events_%d=[\w-]{32}; Path=/; HttpOnly; SameSite=Strict" % view.address[1],
                            headers["set-cookie"])
        cookie = {"Cookie": "other=1; " + headers["set-cookie"].split(";")[0]}
        assert http(view.address, view.url[len(view.base):])[0] == 403  # used
        # ... but for who is inside already
        assert http(view.address, view.url[len(view.base):], cookie)[0] == 303
        for host in ("evil.example", "evil.example:%d" % view.address[1], "127.0.0.1.evil.example", "",
                     "localhost@evil"):
            assert http(view.address, "/", dict(cookie, Host=host))[0] == 403, host
        for host in ("localhost:%d" % view.address[1], "LOCALHOST", "127.0.0.1:9000"):  # 9000: an SSH tunnel
            assert http(view.address, "/", dict(cookie, Host=host))[0] == 200, host
        status, headers, body = http(view.address, "/?days=9999", cookie)
        assert status == 200 and "<svg" in body and headers["server"] == "session-events"
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert headers["cache-control"] == "no-store" and headers["referrer-policy"] == "no-referrer"
        assert not any(name.startswith("access-control") for name in headers)
        for path, expected in (("/sessions", 200), ("/discoveries?sort=nonsense&days=x", 200),
                               ("/activity", 200),
                               ("/session/" + sha("session 1"), 200), ("/session/" + "0" * 64, 404),
                               ("/session/", 404),
                               ("/discovery?ref=x", 200), ("/discovery?ref=%ff%00", 404), ("/discovery", 404),
                               ("/nowhere", 404), ("//evil.example/", 404),
                               ("/?since=%FF&until=2026-99-99&github=3", 200),
                               ("/?" + "&".join("a%d=1" % n for n in range(99)), 200)):
            assert http(view.address, path, cookie)[0] == expected, path
        status, headers, body = http(view.address, "/sessions", cookie, "HEAD")
        assert (status, body) == (200, "") and int(headers["content-length"]) > 1000
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "PATCH"):
            status, headers, _ = http(view.address, "/", cookie, method)
            assert (status, headers["allow"]) == (405, "GET, HEAD")
        for raw in (b"\x16\x03\x01\x02\x00\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
                    b"BREW / HTTP/1.1\r\n\r\n",
                    b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\n\r\n",
                    b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n"):
            status, headers, body = http(view.address, raw=raw)
            assert status >= 400 and body == "The request is not understood.\n"
            assert headers["server"] == "session-events"
        taken = read("view", "--db", db, "--port", view.address[1])
        assert taken.returncode == 1 and "--port 0" in taken.stderr
    assert (view.status, view.complaints) == (0, "")


def test_the_endpoints_to_the_letter(tmp_path):
    """CONTRACT §7, line by line."""
    now = datetime.datetime.now(datetime.timezone.utc)

    def ago(days, **more):
        return (now - datetime.timedelta(days=days, **more)).strftime("%Y-%m-%dT%H:%M:%S.000Z")

    rows = [row(n, "ann", ago(0, minutes=n), ["x", "r%d" % n], github=n % 2 == 0) for n in range(1, 61)]
    rows += [row("d%d" % days, "bob", ago(days), ["x"]) for days in (6, 8, 29, 31, 89, 91)]
    db = stored(tmp_path / "e.db", *rows)
    secret = "a token"
    with View(db) as view:
        for path in ("/admin/sessions", "/admin/sessions/" + sha("session 1"),
                     "/admin/discoveries/propagation"):
            for headers in ({}, {"Authorization": "Bearer " + secret}, {"Cookie": view.process and "x=1"}):
                status, _, body = http(view.address, path, headers)
                assert status == 503 and sorted(json.loads(body)) == ["error", "requestId"]
                assert json.loads(body)["error"] == "Endpoint disabled (admin trigger token not configured)"
    with View(db, **{session_events.ADMIN_TOKEN_VARIABLE: secret}) as view:
        allowed = {"Authorization": "Bearer " + secret}

        def get(path, headers=allowed):
            status, _, body = http(view.address, path, headers)
            body = json.loads(body)
            assert re.fullmatch("[0-9a-f]{32}", body.pop("requestId"))
            return status, body

        for wrong in ({}, {"Authorization": "Bearer b token"}, {"Authorization": "Bearer a"},
                      {"Authorization": secret},
                      {"Authorization": "Bearer " + secret * 2}, {"Authorization": "Basic " + secret},
                      {"Authorization": "Bearer "}, {"Authorization": "Bearer \xff"},
                      {"Cookie": view.cookie()}):
            for path in ("/admin/sessions", "/admin/sessions/zzz", "/admin/nowhere"):
                assert get(path, wrong) == (401, {"error": "Unauthorized"}), wrong
        status, body = get("/admin/sessions")
        assert status == 200 and sorted(body) == ["sessions", "total_count_in_window"]
        assert body["total_count_in_window"] == 61 and len(body["sessions"]) == 50
        assert body["sessions"][0] == {
            "session_id_hash": sha("session 1"), "identity_hash_prefix": sha("identity ann")[:8],
            "github_hash_prefix": None,
            "ended_at": rows[0]["ended_at"], "tool_count": 10, "tokens_saved": 100,
            "branch_sha": "abc123def456",
            "discovery_refs": ["x", "r1"]}
        assert [s["ended_at"] for s in body["sessions"]] == sorted((s["ended_at"] for s in body["sessions"]),
                                                                   reverse=True)
        for query, total, listed in (
                ("days=90", 65, 50), ("days=91", 65, 50), ("days=" + "9" * 5000, 65, 50),
                ("days=30&limit=200", 63, 63),
                ("limit=1", 61, 1), ("limit=201", 61, 61), ("limit=0", 61, 50), ("limit=-1", 61, 50),
                ("limit=1.5", 61, 50),
                ("days=x&limit=x", 61, 50), ("days=0", 61, 50), ("days=%D9%A3", 61, 50),
                ("logged_in=true", 31, 31),
                ("logged_in=false&limit=9", 30, 9), ("logged_in=maybe", 61, 50), ("days=7&days=90", 61, 50)):
            status, body = get("/admin/sessions?" + query)
            answer = (status, body["total_count_in_window"], len(body["sessions"]))
            assert answer == (200, total, listed), query[:40]
        status, body = get("/admin/sessions/" + sha("session d8"))
        assert status == 200 and sorted(body) == ["related", "session"]
        assert body["session"]["session_id_hash"] == sha("session d8") and "developer" not in body["session"]
        assert [s["session_id_hash"] for s in body["related"]] == [sha("session d6"), sha("session d29")]
        assert len(get("/admin/sessions/" + sha("session 1"))[1]["related"]) == 50
        for unknown in ("0" * 64, "zzz", sha("session 1")[:63], sha("session 1") + "0",
                        sha("session 1").upper(), "%00",
                        sha("session 1") + "%0a", ""):
            assert get("/admin/sessions/" + unknown) == (404, {"error": "Not found"}), unknown
        status, body = get("/admin/discoveries/propagation")
        assert status == 200 and len(body["discoveries"]) == 50
        first = body["discoveries"][0]
        assert sorted(first) == ["discovery_id", "distinct_identity_count", "first_seen_at",
                                 "last_aggregated_at",
                                 "last_seen_at", "session_count"]
        assert (first["discovery_id"], first["session_count"]) == ("x", 66)
        assert first["distinct_identity_count"] == 2
        assert (first["first_seen_at"], first["last_seen_at"]) == (rows[-1]["ended_at"], rows[0]["ended_at"])
        for sort in ("session_count", "distinct_identity_count", "recent", "nonsense"):
            listed = get("/admin/discoveries/propagation?limit=501&sort=" + sort)[1]["discoveries"]
            assert len(listed) == 61 and not re.search("[0-9a-f]{64}", json.dumps(listed))
            if sort == "recent":
                assert [d["discovery_id"] for d in listed[:3]] == ["r1", "x", "r2"]
        assert http(view.address, "/admin/sessions", allowed, "POST")[0] == 405
        os.rename(db, db + ".away")
        assert get("/admin/sessions")[0] == 503
    assert (view.status, view.complaints) == (0, "")


def test_no_output_has_a_whole_developer(tmp_path, capfdbinary):
    """CONTRACT §8 for the reading side: whatever is shown of a developer is a prefix; a log is not written at
    all."""
    db = stored(tmp_path / "e.db", *STORY)
    whole = [sha(kind, who)[:9] for kind in ("identity", "login") for who in ("ann", "bob", "cay")]
    outputs = ["".join(answered(capfdbinary, argv)[1:]) for _, _, argv in commands(db, sha("session", 1))]
    with View(db, **{session_events.ADMIN_TOKEN_VARIABLE: "t"}) as view:
        headers = {"Cookie": view.cookie(), "Authorization": "Bearer t"}
        for path in ("/?days=9999", "/sessions?days=9999", "/session/" + sha("session 1"),
                     "/discoveries?days=9999",
                     "/discovery?ref=x", "/activity?days=9999", "/admin/sessions?days=90",
                     "/admin/sessions/" + sha("session 1"), "/admin/discoveries/propagation"):
            status, _, body = http(view.address, path, headers)
            assert status == 200
            outputs.append(body)
    outputs.append(view.complaints)
    assert sum(ANN[:8] in output for output in outputs) > 15  # so the prefixes were there to be seen
    for digits in whole:
        assert not any(digits in output for output in outputs)
    assert view.complaints == ""


class Chromium:
    """A headless Chromium with one tab, driven over its pipe (DevTools protocol: JSON, parted by NUL
    bytes)."""

    FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync",
             "--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-pipe")

    def __init__(self, program, profile):
        ours, theirs = os.pipe(), os.pipe()  # what the test says, what the browser says: its 3 and its 4
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (ours[0], theirs[1])]
        self.process = subprocess.Popen(
            [program, *self.FLAGS, "--user-data-dir=%s" % profile,
             "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "about:blank"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=(3, 4),
            preexec_fn=lambda: (os.dup2(ends[0], 3), os.dup2(ends[1], 4)))
        for fd in (ours[0], theirs[1], *ends):
            os.close(fd)
        self.mouth, self.ear = ours[1], theirs[0]
        self.heard, self.number, self.events, self.tab = b"", 0, [], None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.tab = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(domain + ".enable")

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

    def wait(self, method):
        while not any(event.get("method") == method for event in self.events):
            self.events.append(self.listen())

    def open(self, url):
        for address in ("about:blank", url):  # first away: another #... alone would load nothing
            self.follow(lambda address=address: self.call("Page.navigate", url=address))

    def follow(self, action):
        """Does what leads to another page, and waits until that is there."""
        self.events = [event for event in self.events if event.get("method") != "Page.loadEventFired"]
        action()
        self.wait("Page.loadEventFired")

    def js(self, expression):
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, expression):
        """Waits until the page says yes, looking at each frame."""
        self.js("new Promise(done => { const look = () => (%s) ? done() : requestAnimationFrame(look);"
                " look(); })" % expression)

    def key(self, key, code=0):
        text = {"text": key} if len(key) == 1 else {}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **text)

    def screen(self, width, height, scheme="light"):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def picture(self):
        """The whole page as a PNG file."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        return base64.b64decode(answer["data"])

    def complaints(self):
        """What the console showed: errors, refusals of the page's own policy, and anything printed."""
        return [event for event in self.events if event.get("method") in (
            "Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")]

    def asked(self):
        """The addresses that were asked for."""
        return {event["params"]["request"]["url"] for event in self.events
                if event.get("method") == "Network.requestWillBeSent"}

    def close(self):
        self.tab = None
        with contextlib.suppress(AssertionError, OSError):
            self.call("Browser.close")
        self.process.wait(60)
        os.close(self.mouth)
        os.close(self.ear)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not program:
        pytest.skip("no Chromium here: the pages were not looked at (apt-get install chromium)")
    browser = Chromium(program, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


SEEN = """({discs: document.querySelectorAll("#discs a:not(.later)").length,
  arcs: document.querySelectorAll("#arcs path:not(.later)").length,
  counters: [...document.querySelectorAll(".tiles dd")].map(dd => dd.textContent),
  moment: document.getElementById("moment").textContent, address: location.hash})"""


def test_the_replay_in_chromium(tmp_path, chromium):
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
                ("2026-05-12T11:00:00.000Z", 4, 4, ["4", "3", "36", "3", "3"])):
            chromium.js('new Promise(done => {'
                        ' addEventListener("hashchange", () => setTimeout(done), {once: true});'
                        ' location.hash = "t=%s"; })' % moment)
            seen = chromium.js(SEEN)
            assert (seen["discs"], seen["arcs"], seen["counters"]) == (discs, arcs, counters), moment
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
        chromium.until('document.querySelectorAll("#discs a:not(.later)").length == 2')
        chromium.key(" ", 32)
        paused = chromium.js(SEEN)
        assert chromium.js('document.getElementById("play").textContent') == "Play" and paused["discs"] == 2
        assert paused["address"][3:19].replace("T", " ") + " UTC" == paused["moment"]
        chromium.key("End", 35)
        assert chromium.js(SEEN)["discs"] == 4

        lit = '["arcs", "discs"].map(id => document.querySelectorAll("#" + id + " .on").length)'
        chromium.js('document.querySelector("#discs a[tabindex=\\"0\\"]").focus()')
        chromium.key("ArrowLeft", 37)
        chromium.key("ArrowLeft", 37)  # from the last to bob's, which had x from ann and gave it to cay
        assert chromium.js(lit) == [2, 3]
        panel = chromium.js('document.getElementById("panel").textContent')
        assert panel.startswith(BOB[:8]) and "2 tool calls, 7 tokens saved" in panel
        assert panel.endswith("1 other developer.xz")
        chromium.key("ArrowLeft", 37)
        assert chromium.js(lit) == [4, 4]  # everything came from ann's first
        box = chromium.js('(b => [b.x + b.width / 2, b.y + b.height / 2])'
                          '(document.querySelectorAll("#discs a")[2].getBoundingClientRect())')
        chromium.js("document.activeElement.blur()")
        chromium.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0] + 6, y=box[1] + 6)
        chromium.until(lit + " == '2,3'")
        button = {"x": box[0], "y": box[1], "button": "left", "clickCount": 1}
        chromium.call("Input.dispatchMouseEvent", type="mousePressed", **button)
        chromium.follow(lambda: chromium.call("Input.dispatchMouseEvent", type="mouseReleased", **button))
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

        names = {(node.get("role", {}).get("value"), node.get("name", {}).get("value"))
                 for node in (chromium.open(view.base + "/?" + may),
                              chromium.call("Accessibility.getFullAXTree"))[1]["nodes"]}
        assert {("slider", "Moment"), ("button", "Play"), ("combobox", "Speed"), ("navigation", "Pages"),
                ("link", "%s, 2026-05-05 10:00, 2 calls" % BOB[:8])} <= names

        for path in ("/", "/sessions", "/session/" + sha("session 1"), "/discoveries", "/discovery",
                     "/activity"):
            for width in (400, 2000):
                for scheme in ("light", "dark"):
                    chromium.screen(width, 1000, scheme)
                    chromium.open(view.base + path + "?ref=x&" + may)
                    assert chromium.js("document.documentElement.scrollWidth") == width, (path, width)
                    paper = chromium.js("getComputedStyle(document.body).backgroundColor")
                    assert (paper == "rgb(246, 246, 243)") == (scheme == "light")
                    name = "%s %d %s.png" % (path.split("/")[1] or "replay", width, scheme)
                    (tmp_path / name).write_bytes(chromium.picture())
        assert chromium.complaints() == []
        assert all(url.startswith((view.base + "/", "data:", "about:")) for url in chromium.asked())


def test_pages_without_script_and_without_the_viewer(tmp_path, chromium):
    db = stored(tmp_path / "e.db", *STORY)
    with View(db) as view:
        chromium.events = []
        chromium.screen(1280, 900)
        chromium.call("Emulation.setScriptExecutionDisabled", value=True)
        try:
            chromium.open(view.url + "&since=2026-05-01&until=2026-06-01")
            assert chromium.js('document.documentElement.className') == ""
            assert chromium.js('[...document.querySelectorAll("#discs circle")].every('
                               'c => c.getBoundingClientRect().width > 0)')
            assert chromium.js('document.querySelectorAll("#arcs path").length') == 4
            assert chromium.js('document.querySelector(".controls").offsetHeight') == 0
            assert BOB[:8] in chromium.js('document.querySelector("table").textContent')
            first = chromium.js('document.querySelector("#discs a").href.baseVal')
            assert first == "/session/" + sha("session 1")
        finally:
            chromium.call("Emulation.setScriptExecutionDisabled", value=False)
    (tmp_path / "page.html").write_text(read("graph", "--db", db, *IN_MAY, "--format", "html").stdout)
    chromium.open((tmp_path / "page.html").as_uri())
    assert chromium.js("document.documentElement.className") == "live"
    chromium.key("Home", 36)
    assert chromium.js(SEEN)["discs"] == 1
    assert chromium.complaints() == []


def test_hostile_pages_in_chromium(tmp_path, chromium):
    """Nothing that a row holds runs, closes an element or changes a page; each discovery still has its own
    page."""
    window = "since=2026-05-01&until=2026-06-01"
    with View(looser(tmp_path / "hostile.db")) as view:
        chromium.events = []
        chromium.open(view.url + "&" + window)
        for path in ("/", "/sessions", "/session/" + sha("session hostile"), "/discoveries", "/activity"):
            chromium.open(view.base + path + "?" + window)
            assert chromium.js("document.title").endswith(" - sessions")
            assert chromium.js('document.querySelectorAll("img").length') == 0
            text = chromium.js("document.body.innerText")
            assert not re.search("[\x00-\x08\x0e-\x1f\x7f-\x9f\u200b-\u206f]", text)
        chromium.open(view.base + "/?" + window)
        chromium.js('document.querySelectorAll("#discs a")[0].focus()')
        assert "document.title='owned'" in chromium.js('document.getElementById("panel").textContent')
        found = chromium.js('[...document.querySelectorAll(".chips a")].map(a => a.href)')
        assert len(found) == len(HOSTILE_REFS)
        for address in found:
            if "%00" in address:  # SQLite's json_each ends the text there, Python's json does not
                continue
            chromium.open(address)
            assert chromium.js('document.querySelectorAll("#discs a").length') == 1, address
        assert chromium.complaints() == []
        assert all(url.startswith((view.base + "/", "data:", "about:")) for url in chromium.asked())


def test_two_thousand_sessions_in_chromium(tmp_path, chromium):
    """The page says which it shows, is less than 1 MB, and draws at once."""
    chance = random.Random(3)
    rows = [row(n, chance.randrange(60),
                "2026-05-%02dT%02d:%02d:00.000Z" % (1 + n // 1440 % 28, n // 60 % 24, n % 60),
                {"disc-%d" % (300 * chance.random() ** 2), "disc-%d" % (300 * chance.random() ** 2)})
            for n in range(2010)]
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


def test_the_demo(tmp_path):
    """It says that its sessions are synthetic, shows them, and leaves nothing behind."""
    with View(None, TMPDIR=str(tmp_path)) as view:
        assert re.fullmatch(r"\d+ synthetic sessions of \d+ developers who do not exist", view.said[0])
        assert len(list(tmp_path.iterdir())) == 1
        status, _, body = http(view.address, "/?days=14", {"Cookie": view.cookie()})
        assert status == 200 and body.count("<circle") > 100
    assert (view.status, view.complaints, list(tmp_path.iterdir())) == (0, "", [])


def test_beside_a_server_under_load_and_a_sweep(tmp_path):
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
                    connection.request("POST", "/v1/session-events", json.dumps(dict(
                        EVENT, session_id_hash=sha("load", n),
                        ended_at="2026-05-22T12:%02d:%02d.000Z" % (n // 60 % 60, n % 60))))
                    answer = connection.getresponse()
                    if answer.status != 202 or answer.read() != b'{"ok":true}':
                        failures.append(answer.status)
            finally:
                connection.close()

        def sweep():
            with contextlib.closing(sqlite3.connect(str(db), timeout=60, isolation_level=None)) as connection:
                while not stop.is_set():
                    connection.execute("DELETE FROM session_events WHERE id IN (SELECT id FROM session_events"
                                       " ORDER BY id LIMIT 3)")
                    stop.wait(.01)

        threads = [threading.Thread(target=job) for job in (post, sweep)]
        for thread in threads:
            thread.start()
        try:
            totals = set()
            end = time.monotonic() + 4
            while time.monotonic() < end:
                with session_events.reading(str(db)) as reader:
                    window = session_events.Window(**MAY)
                    listed = session_events.sessions(reader, window, 10 ** 6)
                    graph = session_events.graph(reader, window, 10 ** 6)
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
