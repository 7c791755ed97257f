#!/usr/bin/env python3
"""emit.py says that a coding session ended, and what shape it had: one small event, and only after a yes.

usage:
  emit.py [--dir DIR] [--wait [MS]]     the session-end hook: capture, let the caller go, send
  emit.py track [--dir DIR] [REF ...]   the after-tool hook, or: this session touched these discoveries
  emit.py show [--dir DIR]              the JSON that would be sent now (standard output), and where to
  emit.py status [--json]               consent, endpoint, what waits, how the last sending went
  emit.py on | off                      say yes | say no, and delete what waits
example:
  echo '{"session_id":"abc","cwd":"/src/app"}' | ASHLR_TELEMETRY=on python3 -I -S emit.py --wait 2000

It needs nothing but Python 3.6 or newer, as one file in any folder. A hook run never fails, prints nothing on
standard output, exits 0, and is gone in milliseconds: the sender goes on alone, for 20 s at the most. What
cannot be sent waits in ~/.ashlr/session-events/pending/ (at most 500 events, 30 days) for the next session.
--wait does everything in the foreground within MS milliseconds (500). ASHLR_TELEMETRY_DEBUG=1 says on
standard error what a hook run did. Exit status: 0 done, 1 could not be done, 2 wrong usage (commands only).
"""
# Part one is all of a tool call that touched nothing: consent, input, `track`, command line. Part two is a session's
# end until the caller is let go: caller, hook. Part three is what nobody waits for: identity, session, payload (pure);
# spool, capture, sending (edges); commands.
#
# A start costs what it compiles and imports, so part one is short and imports next to nothing, and the others are
# folded until they are needed (`unfold`). Of a bare start with -I -S, `import os` costs up to 0.25, `import json` 0.9;
# leaving by _exit wins 0.15. Types stand in comments for the same reason: as annotations they would cost 0.1.
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os as system
    from typing import Any, Callable, Dict, List, NoReturn, Optional, Sequence, Set, Tuple  # noqa: F401

    Post = Callable[[bytes], Tuple[int, Optional[str]]]  # one event's JSON to (status, Retry-After)
else:  # os where it is loaded already; else the built-in module beneath it, which always is
    system = sys.modules.get("os") or sys.modules.get("posix") or __import__("os")

DEFAULT_SERVER = "http://127.0.0.1:8787"  # CONTRACT section 6

FOREGROUND_S = 0.5  # of a run that cannot leave its caller, or was asked to --wait
INPUT_FIRST_S, INPUT_REST_S = 0.25, 1.0  # for the hook's JSON to begin, and to end
FILE_BYTES = 1 << 26  # more than any host or plugin writes
INT_DIGITS = 4300  # as in Python itself, but only since 3.11

# Paths are bytes, made from UTF-8, so that the locale, which hosts often drop, decides nothing.
ASHLR = b"/.ashlr/"
UNCLEAR = object()  # what a config.json says that cannot be read


# ======================================================================================================
# Consent
# ======================================================================================================


def consent(env, said):
    # type: (Dict[str, str], Any) -> Tuple[bool, str]
    """(may it be sent, what decided): CONTRACT section 5. `said`: "telemetry" of config.json or None."""
    asked = env.get("ASHLR_TELEMETRY", "").strip().lower()
    if env.get("DO_NOT_TRACK", "").strip() not in ("", "0"):
        return False, "DO_NOT_TRACK is set"
    if asked in ("off", "0"):
        return False, "ASHLR_TELEMETRY says off"
    if said == "off":
        return False, "~/.ashlr/config.json says off"
    if asked in ("on", "1"):
        return True, "ASHLR_TELEMETRY says on"
    if said == "opt-in":
        return True, "~/.ashlr/config.json says opt-in"
    if said is UNCLEAR:
        return False, "~/.ashlr/config.json cannot be read, and nobody else said yes"
    return False, "nobody said yes (emit.py on does)"


def telemetry_said(home):
    # type: (bytes) -> Any
    """"telemetry" of config.json; None if there is none, UNCLEAR if the file cannot be read."""
    try:
        return loads(contents(home + ASHLR + b"config.json")).get("telemetry")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, AttributeError):
        return UNCLEAR


def short_int(digits):
    # type: (str) -> int
    """A whole number of a JSON text. ValueError for thousands of digits: the time grows with their square."""
    if len(digits) > INT_DIGITS:
        raise ValueError("too many digits")
    return int(digits)


class Scanner:
    """What the C scanner beneath json wants to know: json's own defaults."""

    strict, parse_float, parse_int = True, float, short_int
    object_hook = object_pairs_hook = array_hook = None
    parse_constant = int  # of "NaN" and the infinities, which are not JSON: a ValueError


def loads(data):
    # type: (bytes) -> Any
    """`json.loads` of UTF-8 in which NaN is an error. ValueError for anything that is not JSON, or has endless numbers.

    The C scanner, asked directly, spares the import of json, 0.9 of a bare start. Where there is none, or it
    wants to be asked differently, json itself answers; a test holds the two to the same answers.
    """
    text = data.decode("utf-8-sig").strip(" \t\n\r")
    try:
        try:
            from _json import make_scanner
            value, end = make_scanner(Scanner)(text, 0)  # type: ignore[arg-type]
        except (ImportError, AttributeError):
            import json
            value, end = json.loads(text, parse_constant=int, parse_int=short_int), len(text)
    except (StopIteration, RecursionError, SystemError):  # the last in 3.10 and 3.11, as json is not there
        end = -1
    if end != len(text):
        raise ValueError("not JSON")
    return value


# No waiting for a pipe that stands where a file should, no text mode, nothing left to child processes.
SAFELY = sum(getattr(system, flag, 0) for flag in ("O_NONBLOCK", "O_BINARY", "O_CLOEXEC"))


def contents(path, most=FILE_BYTES):
    # type: (bytes, int) -> bytes
    """A file's bytes, as far as one more than `most`. OSError if it cannot be read."""
    fd = system.open(path, SAFELY)
    try:
        file = open(fd, "rb")  # noqa: SIM115
    except OSError:  # a folder, which open() refuses, but does not close
        system.close(fd)
        raise
    with file:
        return file.read(most + 1) or b""


# ======================================================================================================
# Input
# ======================================================================================================


def environment():
    # type: () -> Dict[str, str]
    """The environment as text, UTF-8 whatever the locale."""
    found = getattr(system, "environb", None) or system.environ  # type: Any
    if isinstance(next(iter(found), ""), str):
        return dict(found)
    return {name.decode("utf-8", "surrogateescape"): value.decode("utf-8", "surrogateescape")
            for name, value in found.items()}


def home_of(env):
    # type: (Dict[str, str]) -> bytes
    """The person's folder. OSError without one: a relative path would let a project's folder speak for a person."""
    home = encoded(env.get("HOME") or env.get("USERPROFILE") or __import__("os").path.expanduser("~"))
    if home[:1] not in (b"/", b"\\") and home[1:2] != b":":
        raise FileNotFoundError(2, "no home folder")
    return home


def encoded(text):
    # type: (str) -> bytes
    """UTF-8, whatever the text: undecodable bytes of the environment come out as they went in."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


def standard_input(most_s=INPUT_FIRST_S + INPUT_REST_S):
    # type: (float) -> bytes
    """What the host wrote on standard input; b"" for a terminal, nothing, or more than anybody would write.

    It waits 0.25 s for the first byte and 1 s for the rest, `most_s` in all, and is content with an object,
    without the end: hosts that never close the pipe exist.
    """
    from time import monotonic
    last = monotonic() + most_s
    data, until = bytearray(), min(last, monotonic() + INPUT_FIRST_S)
    try:
        if system.isatty(0) or not system.fstat(0):
            return b""
        read = input_reader()
        while len(data) <= FILE_BYTES:
            left, may_be_all = until - monotonic(), data[-64:].rstrip()[-1:] == b"}"
            piece = read(min(left, 0.02) if may_be_all else left)
            if piece:
                until = until if data else min(last, until + INPUT_REST_S)
                data += piece
            elif piece is not None or left <= 0 or (may_be_all and loads_object(bytes(data))):
                break
    except OSError:
        pass
    return bytes(data)


def input_reader():
    # type: () -> Callable[[float], Optional[bytes]]
    """A function of seconds: what arrives on standard input by then, b"" at its end, None for nothing yet."""
    try:
        from select import select
        select([0], [], [], 0)
        return lambda seconds: system.read(0, 65536) if select([0], [], [], max(seconds, 0))[0] else None
    except (ImportError, OSError):  # Windows: it knows sockets only
        return unfold(3)["threaded_reader"]()  # type: ignore[no-any-return]


def loads_object(data):
    # type: (bytes) -> Dict[str, Any]
    """The JSON object in `data`, {} for whatever else may be there."""
    try:
        value = loads(data)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {}


def debugging(env):
    # type: (Dict[str, str]) -> bool
    """Does somebody want to be told what a hook run does?"""
    return env.get("ASHLR_TELEMETRY_DEBUG", "").strip() not in ("", "0")


# ======================================================================================================
# The hook after a tool call
# ======================================================================================================


def track(argv):
    # type: (Sequence[str]) -> int
    """Record the discoveries named, or (as a hook, which never fails) those that a tool call touched."""
    refs = []  # type: List[str]
    try:
        if argv and argv[:-1] != ["--dir"]:  # a hook names its project at the most
            refs = unfold(2)["options"](argv)[2]
        env, data = environment(), b""
        allowed, why = consent(env, telemetry_said(home_of(env)))
        if allowed and not (refs and unfold(2)["session_id"](env, {})):
            data = standard_input()
        # Asked after every tool call: to parse what a tool wrote may cost ms, the other parts cost a bare start.
        # (JSON may write any letter as \u00...)
        if refs or debugging(env) or b"discoveries" in data.lower() or b"\\u00" in data:
            return int(unfold(3)["record_touched"](env, argv, data, allowed, why))
        return 0
    except BaseException as error:
        return int(unfold(3)["tracking_failed"](environment(), refs, error))


# ======================================================================================================
# Command line
# ======================================================================================================


def main(argv):
    # type: (Sequence[str]) -> int
    """The exit status of a command line. A hook run's sender does not come back from here."""
    system.umask(0o077)
    if "--help" not in argv and "-h" not in argv:
        if not argv or argv[0][:1] == "-":
            return int(unfold(2)["hook"](argv))
        if argv[0] == "track":
            return track(argv[1:])
    return int(unfold(3)["command"](argv))


def run():
    # type: () -> NoReturn
    """`main` for a process: out at once afterwards, without the interpreter's tidying-up."""
    system._exit(main(sys.argv[1:]))


# ======================================================================================================
# Part two and part three, folded
# ======================================================================================================


def unfold(part):
    # type: (int) -> Dict[str, Any]
    """The names of all parts up to this one (2 or 3), which are compiled here and now if they were not.

    Parts two and three stand in strings, which Python reads at once and compiles when asked. Of a bare start,
    compiling part one costs 0.2, part two 0.2, part three 0.9; by compile(), for a file name in tracebacks, 0.15
    more. Without the lines from `def part_...` to `r'''` and the closing ones this is an ordinary program; as
    such it is linted, type-checked and tested against the folded one.
    """
    names = globals()
    for name in ("part_two", "part_three")[:part - 1]:
        folded = names.pop(name, None)
        if folded:  # compiled at its own line numbers
            exec("\n" * folded.__code__.co_firstlineno + folded(), names)
    return names


def part_two():  # type: () -> str
    return r'''

LIFE_S = 20.0  # of the sender, whatever the network does
OURS = b"/.ashlr/session-events/"
PENDING, TOUCHED, LAST = OURS + b"pending/", OURS + b"touched/", OURS + b"last.json"


# ======================================================================================================
# Caller: what only the hook's own process, and its command line, can tell
# ======================================================================================================


def options(argv):
    # type: (Sequence[str]) -> Tuple[str, Optional[float], List[str]]
    """(--dir or "", --wait in seconds or None, what is neither)."""
    directory, wait, rest = "", None, []  # type: str, Optional[float], List[str]
    left = list(argv)
    while left:
        word = left.pop(0)
        if word == "--dir" and left:
            directory = left.pop(0)
        elif word == "--wait":
            wait = FOREGROUND_S
            if left and left[0] and not left[0].strip("0123456789"):
                wait = min(float(left.pop(0)) / 1000, LIFE_S)
        else:
            rest.append(word)
    return directory, wait, rest


def session_id(env, hook):
    # type: (Dict[str, str], Dict[str, Any]) -> str
    """The session's raw id as the host gave it, or "" (CONTRACT section 4)."""
    named, given = env.get("CLAUDE_SESSION_ID", "").strip(), hook.get("session_id")
    return named or (given if isinstance(given, str) and given.strip() else "")


class Caller:
    """What the event owes to the process that ran the hook, and what the host told it.

    `env`, `home`; `hook`: the host's JSON, {} if none; `session`: the raw id, "" if it gave none; `ppid`
    and `started`, asked for only then; `here`: working directory; `base`, `project`, from there: where
    relative paths start, and what was worked on; `ended`: seconds since 1970.
    """

    def __init__(self, env, directory="", data=b""):
        # type: (Dict[str, str], str, bytes) -> None
        """`directory`: from --dir; `data`: from standard input. Asks the process for the rest."""
        from time import time
        self.env, self.home, self.ended, self.hook = env, home_of(env), time(), loads_object(data)
        self.session = session_id(env, self.hook)
        self.ppid = getattr(system, "getppid", int)()
        self.started = "" if self.session else parent_started(self.ppid)
        try:
            self.here = system.getcwdb().decode("utf-8", "surrogateescape")
        except OSError:  # deleted
            self.here = "/"
        given = self.hook.get("cwd")
        self.base = given if isinstance(given, str) else ""
        self.project = directory or env.get("CLAUDE_PROJECT_DIR", "").strip() or self.base


def parent_started(ppid):
    # type: (int) -> str
    """When a process started, in its system's own words; "" where nobody can tell (CONTRACT section 4)."""
    try:
        fields = contents(b"/proc/%d/stat" % ppid).rpartition(b")")[2].split()
        return fields[19].decode()  # the 22nd of all, in ticks since the system started
    except (OSError, IndexError):
        return str(unfold(3)["printed_by"](["ps", "-o", "lstart=", "-p", str(ppid)], {"LC_ALL": "C"}))


# ======================================================================================================
# The hook at a session's end
# ======================================================================================================


def hook(argv):
    # type: (Sequence[str]) -> int
    """The end of a session. It returns 0 to the caller, whatever happens; what it starts never returns."""
    from time import monotonic
    begun, child, caller, error = monotonic(), -1, None, None
    env, why, wait, rest = {}, "", None, []  # type: Dict[str, str], str, Optional[float], List[str]
    try:
        env = environment()
        directory, wait, rest = options(argv)
        if wait is None and not hasattr(system, "fork"):
            wait = FOREGROUND_S
        said = telemetry_said(home_of(env))
        allowed, why = consent(env, said)
        if refused(env, said):
            purge(home_of(env))
        if allowed:
            # In the foreground, half of the time is for capturing and sending.
            caller = Caller(env, directory, standard_input() if wait is None else standard_input(wait / 2))
        elif not debugging(env):
            return 0
        if wait is None:
            try:
                child = leave()
            except OSError:  # no room for another process: do it here
                pass
        if child > 0:
            return 0
        if child == 0:
            detach(debugging(env))
    except BaseException as fault:  # a hook never fails
        error = fault
    life = LIFE_S if child == 0 else (FOREGROUND_S if wait is None else wait) - (monotonic() - begun)
    unfold(3)["alone"](env, caller, why, rest, error, life)
    return 0


def leave():
    # type: () -> int
    """Fork, into a session of its own. The parent goes on only when that is made: what a host signals to its
    process group, or a terminal that closes, as soon as the hook has ended, no longer reaches the child."""
    ours, theirs = system.pipe()
    child = system.fork()
    if child:
        system.close(theirs)
        system.read(ours, 1)  # its end
        system.close(ours)
    else:
        system.setsid()
        system.close(theirs)
    return child


def detach(keep_errors):
    # type: (bool) -> None
    """Let go of everything else of the caller's: directory, descriptors."""
    system.chdir("/")
    null = system.open("/dev/null", system.O_RDWR)
    for fd in (0, 1) if keep_errors else (0, 1, 2):
        system.dup2(null, fd)
    for fd in [int(name) for name in names_in(b"/proc/self/fd") or names_in(b"/dev/fd")] or range(3, 4096):
        if fd > 2:
            try:
                system.close(fd)
            except OSError:  # the listing's own
                pass


def refused(env, said):
    # type: (Dict[str, str], Any) -> bool
    """Did anybody say no, or nobody yes? Then what waits goes; not when all there is is a file nobody can read."""
    return not consent(env, said)[0] and (said is not UNCLEAR or not consent(env, "opt-in")[0])


def purge(home):
    # type: (bytes) -> int
    """Delete what waits and what was noted, for a person who said no; how many files that was."""
    gone = 0
    for folder in (PENDING, TOUCHED):
        for name in names_in(home + folder):
            gone += remove(home + folder + name)
    remove(home + LAST)
    return gone


def names_in(folder):
    # type: (bytes) -> List[bytes]
    """Sorted; [] for a folder that is not there."""
    try:
        return sorted(system.listdir(folder))
    except OSError:
        return []


def remove(path):
    # type: (bytes) -> bool
    """Was it there, and is gone?"""
    try:
        system.unlink(path)
        return True
    except OSError:
        return False
'''


def part_three():  # type: () -> str
    return r'''

EVENT_BYTES = 65536
MAX_CALLS, MAX_TOKENS, MAX_REFS = 1000000, 1000000000, 200
ENDPOINT_PATH = "/v1/session-events"

PROGRAM_S = 0.25  # for git, and for ps
ANSWER_S = 10.0  # for each step of one request
FAILED_ANSWERS = 10  # in one run, before the server is left in peace: a few may be about one event each
DAY_S = 86400.0  # also the longest Retry-After that is believed
WAITING_EVENTS, WAITING_DAYS, LIST_DAYS = 500, 30, 7
LEFTOVER_S = 3600.0  # before a file that a kill left half-written goes

DIGITS = "0123456789"
HEX = DIGITS + "abcdef"
ALNUM = DIGITS + "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
MACHINE_ID = ASHLR + b"machine-id"
BEGAN = "began, and did not finish (yet)"

COLLECTED = """\
Collected when a session ends: the time, tool calls and tokens saved, commit, discoveries touched, version.
Never: names, paths, code, prompts. Machine, login, session are one-way hashes; two of them change quarterly.
It goes to %s.
To stop: emit.py off (also deletes what waits). To see an event before it goes: emit.py show."""


# ======================================================================================================
# Identity
# ======================================================================================================


def sha256_hex(text):
    # type: (str) -> str
    """64 lowercase hex digits."""
    from hashlib import sha256
    return sha256(encoded(text)).hexdigest()


def salt(seconds):
    # type: (float) -> str
    """`salt_2026Q4`: the UTC quarter of a time in seconds since 1970 (CONTRACT section 4)."""
    from time import gmtime
    year, month = gmtime(seconds)[:2]
    return "salt_%dQ%d" % (year, (month + 2) // 3)


def random_uuid():
    # type: () -> str
    """RFC 4122, version 4, lower case. (To import `uuid` starts other programs on old Pythons.)"""
    from os import urandom
    h = urandom(16).hex()
    return "%s-%s-4%s-%s%s-%s" % (h[:8], h[8:12], h[13:16], "89ab"[int(h[16], 16) % 4], h[17:20], h[20:])


def github_login(cache):
    # type: (Dict[str, Any]) -> str
    """The login in pro-token-cache.json, or "": never guessed."""
    login = cache.get("githubLogin")
    return login if cache.get("valid") is True and isinstance(login, str) and login.strip() else ""


def session_hash(caller, machine):
    # type: (Caller, str) -> str
    """CONTRACT section 4, `session_id_hash`."""
    return sha256_hex(caller.session or "ppid:%d:%s:%s" % (caller.ppid, caller.started, machine))


# ======================================================================================================
# Session
# ======================================================================================================


def stats_bucket(ppid, home):
    # type: (int, str) -> str
    """The name that stats.json gives to a parent process: a 32-bit Java string hash (CONTRACT section 4)."""
    units = ("ppid:%d:%s" % (ppid, home)).encode("utf-16-le", "surrogatepass")
    h = 0
    for low, high in zip(units[::2], units[1::2]):
        h = (h * 31 + low + 256 * high) & 0xFFFFFFFF
    return "p%x" % h


def instant(text):
    # type: (Any) -> float
    """Seconds since 1970 of an ISO 8601 date and time (CONTRACT section 1, `ended_at`), or ValueError."""
    from calendar import timegm
    from datetime import datetime
    from re import ASCII, fullmatch
    match = fullmatch(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d{1,9})?(Z|([+-])([01]\d|2[0-3]):([0-5]\d))?",
                      str(text), ASCII)
    if not match:
        raise Told("not a date and time")
    at, fraction, _, sign, hours, minutes = match.groups()
    east = int(sign + "1") * (3600 * int(hours) + 60 * int(minutes)) if sign else 0
    return timegm(datetime.strptime(at, "%Y-%m-%dT%H:%M:%S").timetuple()) + float(fraction or 0) - east


def counts(stats, project, ids, now):
    # type: (Dict[str, Any], Dict[str, Any], Sequence[str], float) -> Tuple[int, int]
    """(tool_count, tokens_saved) over this session's buckets of stats.json, each once (CONTRACT section 4).

    `project`: last-project.json; `ids`: the session's raw id and its parent's bucket; `now`: s since 1970.
    """
    mine = list(dict.fromkeys(ids))  # type: List[Any]
    try:
        if 0 <= now - instant(project.get("updatedAt")) <= DAY_S:
            mine += [name for name in [project.get("sessionId")] if name not in mine]
    except ValueError:
        pass
    sessions = stats.get("sessions") if stats.get("schemaVersion", 2) == 2 else None
    named = [name for name in mine if name and isinstance(name, str)]
    found = [sessions.get(name) for name in named] if isinstance(sessions, dict) else []
    return (min(MAX_CALLS, sum(whole(bucket, "calls") for bucket in found)),
            min(MAX_TOKENS, sum(whole(bucket, "tokensSaved") for bucket in found)))


def whole(bucket, name):
    # type: (Any, str) -> int
    """A number in a bucket, floored; 0 for one below 0, and for whatever is none."""
    value = bucket.get(name) if isinstance(bucket, dict) else 0  # type: Any
    return int(value) if type(value) in (int, float) and 0 <= value < float("inf") else 0


def touched_ref(path, base, project):
    # type: (str, str, str) -> str
    """The discovery that a path in a tool's input stands for, "" if it lies elsewhere. No disk is asked.

    `base`: the absolute folder that a relative path starts from. Windows paths compare without case.
    """
    import ntpath
    import posixpath
    rules = ntpath if project[1:2] == ":" or project[:2] == "\\\\" else posixpath  # type: Any
    folder = rules.normcase(rules.normpath(project + "/.ashlrcode/genome/sections/discoveries")) + rules.sep
    path = rules.normpath(rules.join(base, path))
    stem = rules.splitext(rules.basename(path))[0]
    return stem if rules.normcase(path).startswith(folder) and is_ref(stem) else ""


def newest_refs(refs):
    # type: (Sequence[Any]) -> List[str]
    """The slugs among them in order of first touch, without repeats, the newest 200."""
    return list(dict.fromkeys(filter(is_ref, refs)))[-MAX_REFS:]


# ======================================================================================================
# Payload
# ======================================================================================================


def shaped(text, characters, shortest, longest):
    # type: (Any, str, int, int) -> bool
    """Is it a string of these characters and no others? (Of such, `strip` leaves nothing.)"""
    return isinstance(text, str) and shortest <= len(text) <= longest and not text.strip(characters)


def is_ref(text):
    # type: (Any) -> bool
    """Is it a slug that `discovery_refs` may carry (CONTRACT section 1)?"""
    return shaped(text, ALNUM + "._:-", 1, 128) and text[0] in ALNUM


def is_version(text):
    # type: (Any) -> bool
    """Is it what `plugin_version` may carry (CONTRACT section 1)?"""
    return shaped(text, ALNUM + ".+_-", 1, 64) and text[0] in ALNUM


# Field: what its value must be, to be one that this program wrote.
FIELDS = {
    "identity_hash": lambda value: shaped(value, HEX, 64, 64),
    "github_hash": lambda value: value is None or shaped(value, HEX, 64, 64),
    "session_id_hash": lambda value: shaped(value, HEX, 64, 64),
    "ended_at": lambda value: value == iso(instant(value) + 0.0001),
    "tool_count": lambda value: type(value) is int and 0 <= value <= MAX_CALLS,
    "tokens_saved": lambda value: type(value) is int and 0 <= value <= MAX_TOKENS,
    "branch_sha": lambda value: value is None or shaped(value, HEX, 7, 40),
    "discovery_refs": lambda value: isinstance(value, list) and value == newest_refs(value),
    "plugin_version": is_version,
}  # type: Dict[str, Callable[[Any], bool]]


def is_event(value):
    # type: (Any) -> bool
    """Is it an event that this program could have written: all fields, good, and no other?"""
    try:
        return value.keys() == FIELDS.keys() and all(good(value[name]) for name, good in FIELDS.items())
    except (AttributeError, TypeError, ValueError, OverflowError, OSError):
        return False


def as_sent(event):
    # type: (Dict[str, Any]) -> bytes
    """The JSON of an event, without blanks: so the server reads it fastest. ValueError if it is none."""
    import json
    data = json.dumps(event, separators=(",", ":")).encode()
    if not is_event(event) or len(data) > EVENT_BYTES:
        raise Told("what was built is no event, which is an error in emit.py")
    return data


def iso(seconds):
    # type: (float) -> str
    """`2026-05-22T12:34:56.000Z`, from seconds since 1970."""
    from time import gmtime
    return "%04d-%02d-%02dT%02d:%02d:%02d" % gmtime(seconds // 1)[:6] + ".%03dZ" % (seconds % 1 * 1000)


def retry_at(header, now):
    # type: (Optional[str], float) -> float
    """When a server wants to be asked again, from `Retry-After` (s or a date), at most a day on; else 0.0."""
    from email.utils import parsedate_to_datetime
    text = (header or "").strip()
    try:
        at = now + int(text[:9]) if shaped(text, DIGITS, 1, 99) else parsedate_to_datetime(text).timestamp()
    except (TypeError, ValueError, IndexError, OverflowError):
        return 0.0
    return min(at, now + DAY_S) if at > now else 0.0


def expired(names, now):
    # type: (Sequence[bytes], float) -> Set[bytes]
    """Of the spool's files, oldest first, those that may wait no longer. A clock that was ahead ages none."""
    old = {name for name in names if now - int(name[:15]) / 1000 > WAITING_DAYS * DAY_S}
    return old.union([name for name in names if name not in old][:-WAITING_EVENTS])


# ======================================================================================================
# Spool
# ======================================================================================================


def object_at(path):
    # type: (bytes) -> Dict[str, Any]
    """The JSON object in a file; {} for whatever else may be there, or not."""
    try:
        return loads_object(contents(path))
    except OSError:
        return {}


def place_fresh(temporary, path):
    # type: (bytes, bytes) -> None
    """Give a file its name if nobody has it; FileExistsError if somebody has."""
    import os
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except (AttributeError, OSError):  # a system, or a file system, without links
        if os.path.lexists(path):
            raise FileExistsError from None
        os.rename(temporary, path)


def write_whole(path, data, mode=0o600, fresh=False):
    # type: (bytes, bytes, int, bool) -> None
    """Whoever looks, and whenever the power fails, finds at `path` what was there before, or all of `data`.

    `fresh`: FileExistsError if something was. OSError if it cannot be written; nothing is left behind then.
    """
    import os
    folder = os.path.dirname(path)
    os.makedirs(folder, 0o700, exist_ok=True)
    temporary = folder + b"/." + os.urandom(8).hex().encode() + b".tmp"
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | SAFELY, mode)
        with open(fd, "wb") as file:
            os.chmod(temporary, mode)  # whatever the umask
            file.write(data)
            file.flush()
            os.fsync(fd)
        if fresh:
            place_fresh(temporary, path)
        else:
            os.replace(temporary, path)
    finally:
        remove(temporary)
    try:  # the name, too, should survive a power cut; Windows cannot be asked for that
        fd = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(fd)
    except OSError:
        pass
    finally:
        os.close(fd)


def lock(path, patience_s=0.0):
    # type: (bytes, float) -> Optional[int]
    """A descriptor that holds a lock until it is closed or its process dies, or None: somebody else has it.

    Where a system has no locks everybody gets it. That is safe: the server takes an event once.
    """
    import os
    from time import monotonic, sleep
    os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
    fd, until = os.open(path, os.O_RDWR | os.O_CREAT | SAFELY, 0o600), monotonic() + patience_s
    while True:
        try:
            take_lock(fd)
        except (BlockingIOError, PermissionError):
            if monotonic() < until:
                sleep(0.005)
                continue
            os.close(fd)
            return None
        except (ImportError, OSError):
            pass
        return fd


def take_lock(fd):
    # type: (int) -> None
    """At once, or BlockingIOError (PermissionError on Windows). ImportError where there are no locks."""
    try:
        import fcntl
    except ImportError:
        __import__("msvcrt").locking(fd, 2, 1)  # LK_NBLCK, the first byte
    else:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def machine_id(home, make=True):
    # type: (bytes, bool) -> str
    """The machine's random name, made on first use: OSError if it cannot be kept, Told if there is none in its file;
    "" for both if not to `make`."""
    import os
    if make and not os.path.lexists(home + MACHINE_ID):
        try:
            write_whole(home + MACHINE_ID, random_uuid().encode(), fresh=True)
        except FileExistsError:  # another session was quicker
            pass
    try:
        name = contents(home + MACHINE_ID).decode("utf-8", "surrogateescape").strip()
    except FileNotFoundError:
        name = ""
    if make and not name:
        raise Told("~/.ashlr/machine-id is empty: remove it")
    return name


def touched_refs(home, session):
    # type: (bytes, str) -> List[str]
    """The list of discoveries of a session (its hash), as recorded so far."""
    try:
        return newest_refs(contents(home + TOUCHED + session.encode()).decode("latin-1").split("\n"))
    except OSError:
        return []


def touch(home, session, refs):
    # type: (bytes, str, Sequence[str]) -> None
    """Add to a session's list. OSError if it cannot be kept. Hooks that run at the same moment take turns."""
    fd = lock(home + OURS + b"touched.lock", 5.0)
    try:
        before = touched_refs(home, session)
        after = newest_refs([*before, *refs])
        if after != before:
            write_whole(home + TOUCHED + session.encode(), "\n".join(after).encode())
    finally:
        if fd is not None:
            system.close(fd)


def waiting(home):
    # type: (bytes) -> List[bytes]
    """The spool's files, oldest first. Others, whoever put them there, are left alone."""
    from re import fullmatch
    return [name for name in names_in(home + PENDING) if fullmatch(rb"[0-9]{15}-[0-9a-f]{12}\.json", name)]


def spool(home, data, captured):
    # type: (bytes, bytes, float) -> None
    """Keep one event. OSError if that cannot be. The name is the time in ms, then chance."""
    from os import urandom
    name = "%015d-%s.json" % (max(0, captured * 1000), urandom(6).hex())
    write_whole(home + PENDING + name.encode(), data)


def event_in(path):
    # type: (bytes) -> bytes
    """What a spool file holds, b"" if it is no event. OSError if it cannot be read."""
    data = contents(path, EVENT_BYTES)
    return data if len(data) <= EVENT_BYTES and is_event(loads_object(data)) else b""


def sweep(home, now):
    # type: (bytes, float) -> None
    """Remove what kills left half-written, and the lists of sessions that never ended."""
    for folder in (ASHLR, OURS, PENDING, TOUCHED):
        for name in names_in(home + folder):
            leftover = len(name) == 21 and name[:1] == b"." and name[-4:] == b".tmp"
            if leftover or folder == TOUCHED:
                try:
                    age = now - system.lstat(home + folder + name).st_mtime
                except OSError:  # gone by itself
                    continue
                if age > (LEFTOVER_S if leftover else LIST_DAYS * DAY_S):
                    remove(home + folder + name)


def expire(home, now):
    # type: (bytes, float) -> None
    """Remove what may wait no longer."""
    for name in expired(waiting(home), now):
        remove(home + PENDING + name)


# ======================================================================================================
# Capture
# ======================================================================================================


def threaded_reader():
    # type: () -> Callable[[float], Optional[bytes]]
    """`input_reader` where nobody can say whether something has arrived."""
    from _thread import start_new_thread
    from queue import Empty, Queue
    pieces = Queue()  # type: Queue[bytes]

    def drain():
        # type: () -> None
        piece = b"-"
        while piece:
            try:
                piece = system.read(0, 65536)
            except OSError:
                piece = b""
            pieces.put(piece)

    def read(seconds):
        # type: (float) -> Optional[bytes]
        try:
            return pieces.get(True, max(seconds, 0.001))
        except Empty:
            return None
    start_new_thread(drain, ())
    return read


def printed_by(argv, changes):
    # type: (List[str], Dict[str, str]) -> str
    """What a program prints within 250 ms, stripped; "" if it fails, cannot be started or takes longer.

    It gets no GIT_* variables (a hook of git's own has them, pointing elsewhere), no input, no terminal.
    """
    import os
    from subprocess import DEVNULL, PIPE, Popen, TimeoutExpired
    env = {name: value for name, value in os.environ.items() if name[:4] != "GIT_"}
    folders = absolute_folders(env.get("PATH") or os.defpath)
    env.update(changes, PATH=os.pathsep.join(folders))
    try:
        process = Popen([program(argv[0], folders), *argv[1:]], stdin=DEVNULL, stdout=PIPE, stderr=DEVNULL,
                        env=env, start_new_session=True)
    except (OSError, ValueError):
        return ""
    RUNNING.append(process.pid)
    try:
        printed = process.communicate(timeout=PROGRAM_S)[0]
    except TimeoutExpired:
        kill_running()
        return ""
    finally:
        del RUNNING[:]
    return printed.decode("ascii", "replace").strip() if process.returncode == 0 else ""


def absolute_folders(path):
    # type: (str) -> List[str]
    """Of a PATH: the others lead to the working directory, which is a project's, who knows whose."""
    import os
    return [folder for folder in path.split(os.pathsep) if os.path.isabs(folder)]


def program(name, folders):
    # type: (str, Sequence[str]) -> str
    """Where a program is. FileNotFoundError if it is in none. (Windows itself looks in the working directory.)"""
    import os
    for folder in folders:
        file = os.path.join(folder, name + ".exe" * (os.name == "nt"))
        if os.path.isfile(file) and os.access(file, os.X_OK):
            return file
    raise FileNotFoundError(2, "no such program")


RUNNING = []  # type: List[int]  # the program being waited for


def kill_running():
    # type: () -> None
    """And all that it started: one of those may hold the pipe."""
    import os
    for pid in RUNNING:
        try:
            getattr(os, "killpg", os.kill)(pid, 9)
        except OSError:  # gone
            pass


def branch_sha(project):
    # type: (str) -> Optional[str]
    """The commit of a folder. A hostile repository gets to run nothing: no hooks, no fetching, no prompts."""
    from os import fsdecode
    sha = printed_by(["git", "-C", fsdecode(encoded(project)), "rev-parse", "--short=12", "HEAD"], {
        "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0",
        "GIT_NO_LAZY_FETCH": "1", "GIT_ALLOW_PROTOCOL": ""})
    return sha if shaped(sha, HEX, 7, 40) else None


def plugin_version(env, here):
    # type: (Dict[str, str], str) -> str
    """CONTRACT section 4, `plugin_version`. `here`: where relative paths start."""
    from os import fsencode
    from os.path import dirname, join, normpath
    beside = dirname(normpath(join(encoded(here), fsencode(__file__))))
    plugin = encoded(env.get("CLAUDE_PLUGIN_ROOT", "").strip())
    for root in (plugin and join(encoded(here), plugin), beside, dirname(beside)):
        for name in (b"/package.json", b"/.claude-plugin/plugin.json") if root else ():
            version = object_at(root + name).get("version")
            if is_version(version):
                return str(version)
    return "0.0.0"


def compose(caller, machine, run_git=True):
    # type: (Caller, str, bool) -> Dict[str, Any]
    """The event of the session that the caller ends (CONTRACT sections 1 and 4)."""
    from os.path import join
    env, ashlr, now = caller.env, caller.home + ASHLR, caller.ended
    login = github_login(object_at(ashlr + b"pro-token-cache.json"))
    session = session_hash(caller, machine)
    calls, tokens = counts(object_at(ashlr + b"stats.json"), object_at(ashlr + b"last-project.json"),
                           (caller.session, stats_bucket(caller.ppid, env.get("HOME", ""))), now)
    return {
        "identity_hash": sha256_hex(machine + salt(now)),
        "github_hash": sha256_hex(login + salt(now)) if login else None,
        "session_id_hash": session,
        "ended_at": iso(now),
        "tool_count": calls,
        "tokens_saved": tokens,
        "branch_sha": branch_sha(join(caller.here, caller.project)) if run_git else None,
        "discovery_refs": touched_refs(caller.home, session),
        "plugin_version": plugin_version(env, caller.here),
    }


def touched_by(caller):
    # type: (Caller) -> List[str]
    """The discoveries that the tool call in the host's JSON touched."""
    from os.path import join, realpath
    found, given = [], caller.hook.get("tool_input")
    base, project = join(caller.here, caller.base), join(caller.here, caller.project)
    for name in ("file_path", "notebook_path", "path"):
        path = given.get(name) if isinstance(given, dict) else None
        if isinstance(path, str) and "\0" not in path:
            # The second: the same folder by another way. On a Mac, /tmp is /private/tmp.
            found.append(touched_ref(path, base, project)
                         or touched_ref(realpath(join(base, path)), "/", realpath(project)))
    return newest_refs(found)


def record_touched(env, argv, data, allowed, why):
    # type: (Dict[str, str], Sequence[str], bytes, bool, str) -> int
    """Add to the session's list what `argv` names, or what the tool call in `data` touched. The exit status."""
    directory, _, refs = options(argv)
    if not all(map(is_ref, refs)):
        return complain("a reference is a letter or digit, then at most 127 of those and . _ : -", 2)
    if not allowed and refs:
        return complain("not recorded: consent is off: " + why)
    if allowed:
        caller = Caller(env, directory, data)
        refs = refs or touched_by(caller)
        if refs:
            touch(caller.home, session_hash(caller, machine_id(caller.home)), refs)
    tell(env, ["consent is %s: %s; discoveries touched: %d" % ("on" if allowed else "off", why, len(refs))])
    return 0


def tracking_failed(env, refs, error):
    # type: (Dict[str, str], Sequence[str], BaseException) -> int
    """The exit status then: a hook, which names no references, never fails."""
    said = "could not be recorded: " + reason(error)
    if refs:
        return complain(said, 1)
    tell(env, [said])
    return 0


# ======================================================================================================
# Sending
# ======================================================================================================


def endpoint(env):
    # type: (Dict[str, str]) -> Tuple[str, str]
    """(URL, what decided): CONTRACT section 6. The URL is as it was set: see `checked_url`."""
    whole_url, base = env.get("ASHLR_SESSION_EVENTS_URL", "").strip(), env.get("ASHLR_API_URL", "").strip()
    if whole_url:
        return whole_url, "ASHLR_SESSION_EVENTS_URL"
    if base:
        return base.rstrip("/") + ENDPOINT_PATH, "ASHLR_API_URL"
    return DEFAULT_SERVER + ENDPOINT_PATH, "the default"


def checked_url(url):
    # type: (str) -> Tuple[str, str, str]
    """(URL to ask, Authorization or "", text to print). ValueError, without the URL, if it is not http(s)."""
    from base64 import b64encode
    from urllib.parse import unquote_to_bytes, urlsplit
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and "@" not in parts.path
    except ValueError:
        good = False
    if not good or not shaped(url, "".join(map(chr, range(33, 127))), 1, 4096):
        raise Told("the endpoint is not a http:// or https:// URL")
    userinfo, _, host = parts.netloc.rpartition("@")
    bare = "%s://%s%s" % (parts.scheme, host, parts.path or "/")
    return (bare + "?" + parts.query if parts.query else bare,
            "Basic " + b64encode(unquote_to_bytes(userinfo)).decode() if userinfo else "",
            bare + "?..." if parts.query else bare)


class Told(ValueError):
    """An error in this file's own words, which may be printed. Others' words may hold a path or a password."""


def reason(error):
    # type: (BaseException) -> str
    """An error in words that hold no path and no URL."""
    inner = getattr(error, "reason", None)
    if isinstance(inner, Exception):
        return reason(inner)
    if isinstance(error, Told):
        return str(error)
    words = getattr(error, "strerror", None)
    return "%s: %s" % (type(error).__name__, words) if words else type(error).__name__


def poster(url, authorization):
    # type: (str, str) -> Post
    """A function that posts one event and gives (status, Retry-After): OSError, ValueError, HTTPException.

    Of urllib's ways it has two: HTTP(S), and the proxies that the environment names. It follows no redirect.
    """
    if sys.platform == "darwin":  # urllib would load _scproxy, for more proxies, and crash after a fork
        sys.modules["_scproxy"] = stub = type(sys)("_scproxy")
        stub.__dict__.update(_get_proxies=dict, _get_proxy_settings=dict)
    import urllib.request as u
    opener = u.OpenerDirector()
    proxies = u.ProxyHandler(u.getproxies_environment())
    for way in (proxies, u.HTTPHandler(), u.HTTPSHandler(), u.UnknownHandler()):
        opener.add_handler(way)
    headers = {"Content-Type": "application/json", "User-Agent": "emit.py"}
    if authorization:
        headers["Authorization"] = authorization

    def post(data):
        # type: (bytes) -> Tuple[int, Optional[str]]
        answer = opener.open(u.Request(url, data, headers), timeout=ANSWER_S)  # type: Any
        if not answer:
            raise Told("a proxy of an unknown kind")
        with answer:
            return answer.status, answer.headers.get("Retry-After")
    return post


def send(post, data):
    # type: (Post, bytes) -> Tuple[int, str, Optional[str]]
    """(status or 0, what happened in words, Retry-After) of one event."""
    from http.client import HTTPException
    try:
        status, after = post(data)
    except (OSError, ValueError, HTTPException) as error:
        return 0, "without an answer (%s)" % reason(error), None
    return status, "answered %d" % status, after


def is_final(status):
    # type: (int) -> bool
    """Does an answer mean that the event need not come again: accepted, or refused for ever?"""
    return 200 <= status < 300 or (400 <= status < 500 and status not in (407, 408, 429))


def withdrawn(home, env):
    # type: (bytes, Dict[str, str]) -> str
    """Consent, asked anew: "", or why it is off; what waits is deleted then."""
    said = telemetry_said(home)
    allowed, why = consent(env, said)
    if refused(env, said):
        purge(home)
    return "" if allowed else "consent is off: " + why


def record(home, result, again=0.0):
    # type: (bytes, str, float) -> None
    """Keep how the sending went, for `status`, and when the server wants to be asked again."""
    import json
    from time import time
    try:
        last = {"at": iso(time()), "result": result, "retry_at": again}
        write_whole(home + LAST, json.dumps(last).encode())
    except OSError:  # a full disk must not keep from sending
        pass


def flush(home, env, log, unkept=b""):
    # type: (bytes, Dict[str, str], List[str], bytes) -> None
    """Send what waits, oldest first, until there is no more, or the server or the person says stop.

    `unkept`: an event that the spool could not keep. OSError for a lack of locks, ValueError for a bad URL.
    """
    from time import time
    last, stop = object_at(home + LAST), withdrawn(home, env)
    again = last.get("retry_at")
    if not stop and type(again) is float and 0 < again - time() <= DAY_S:
        stop = "the server asked for nothing before " + iso(again)
    if stop:
        log.append("nothing sent; " + stop)
        return
    url, authorization, shown = checked_url(endpoint(env)[0])
    log.append("sending to %s, for 20 s at most: if this is the last line, time ran out" % shown)
    tell(env, log)
    post = poster(url, authorization)
    seen = set()  # type: Set[bytes]
    if unkept:
        log.append("the event that could not be kept: " + send(post, unkept)[1])
    # Asked again after each round: the sender of what came meanwhile did not get the lock, and left.
    while not stop and not seen.issuperset(waiting(home)):
        fd = lock(home + OURS + b"flush.lock")
        if fd is None:
            log.append("another sender is at work, and takes this event along")
            return
        if last.get("result") == BEGAN:  # cut off, and so never came to this
            expire(home, 0.0)  # by number alone: the clock may be wrong, and these were not tried yet
        record(home, BEGAN)
        tally, stop, retry = send_round(home, env, post, seen)
        log.append(", ".join(["%d %s" % (n, text) for text, n in tally.items()] + [stop] * bool(stop)))
        if not withdrawn(home, env):
            record(home, log[-1], retry)
        system.close(fd)


def send_round(home, env, post, seen):
    # type: (bytes, Dict[str, str], Post, Set[bytes]) -> Tuple[Dict[str, int], str, float]
    """Send the files not in `seen` yet: ({what happened: how often}, why it stopped or "", next try)."""
    from time import time
    tally, failures = {}, 0  # type: Dict[str, int], int
    for name in waiting(home):
        stop = withdrawn(home, env)
        if stop:
            return tally, stop, 0.0
        if name in seen:
            continue
        seen.add(name)
        try:
            data = event_in(home + PENDING + name)
        except OSError:
            continue
        status, text, after = send(post, data) if data else (400, "removed, being no event", None)
        tally[text] = tally.get(text, 0) + 1
        if is_final(status):
            remove(home + PENDING + name)
            continue
        failures, retry = failures + 1, retry_at(after, time())
        if retry or status in (0, 429, 503) or failures == FAILED_ANSWERS:
            return tally, "stopped until " + iso(retry) if retry else "stopped", retry
    return tally, "", 0.0


def leave_in(seconds):
    # type: (float) -> None
    """End this process when its time is over, wherever it hangs: nothing else stops a name look-up."""
    from _thread import start_new_thread
    from time import sleep

    def watch():
        # type: () -> None
        sleep(max(seconds, 0.0))
        kill_running()
        system._exit(0)
    try:
        start_new_thread(watch, ())
    except RuntimeError:  # no room for a thread
        import signal
        signal.alarm(max(1, int(seconds)))


def tell(env, log):
    # type: (Dict[str, str], List[str]) -> None
    """Say what a hook run did, if ASHLR_TELEMETRY_DEBUG wants it: no hash, path or credential.

    Not at once, but when the event is safe: a standard error that nobody reads may hold its writer for good.
    """
    if debugging(env):
        try:
            system.write(2, "".join("emit.py: %s\n" % line for line in log).encode())
        except OSError:
            pass
    del log[:]


def alone(env, caller, why, rest, error, life):
    # type: (Dict[str, str], Optional[Caller], str, Sequence[str], Optional[BaseException], float) -> NoReturn
    """What a hook run does when its caller has gone, or would not: within `life` seconds, and never failing.

    `caller`: None if consent, by `why`, is off, or with an `error` from what came before; `rest`: unknown arguments.
    """
    log = [] if error and not caller else ["consent is %s: %s" % ("on" if caller else "off", why)]
    log.extend(["arguments ignored: see --help"] * bool(rest))
    try:
        leave_in(life)
        if error:
            raise error
        if caller:
            work(caller, log)
    except BaseException as fault:
        log.append("failed: " + reason(fault))
    finally:
        tell(env, log)
        system._exit(0)


def work(caller, log):
    # type: (Caller, List[str]) -> None
    """Capture, keep, send. OSError or ValueError if that cannot be."""
    home, unkept = caller.home, b""
    event = compose(caller, machine_id(home))
    data = as_sent(event)
    try:
        spool(home, data, caller.ended)
        remove(home + TOUCHED + event["session_id_hash"].encode())
        log.append("captured")
    except OSError as error:
        unkept = data
        log.append("captured, but not kept (%s)" % reason(error))
    tell(caller.env, log)
    sweep(home, caller.ended)
    try:
        flush(home, caller.env, log, unkept)
    finally:
        expire(home, caller.ended)


# ======================================================================================================
# Commands
# ======================================================================================================


def show(argv):
    # type: (Sequence[str]) -> int
    """Print the event as it would be sent now; where to, and what is made up in it, on standard error."""
    directory, wait, rest = options(argv)
    if rest or wait is not None:
        return complain("show takes --dir DIR and nothing else; see emit.py --help", 2)
    env = environment()
    allowed, why = consent(env, telemetry_said(home_of(env)))
    caller = Caller(env, directory, standard_input())
    known = machine_id(caller.home, make=False)
    print(as_sent(compose(caller, known or random_uuid(), run_git=allowed)).decode())
    complain("goes to: " + shown_endpoint(env))
    if not allowed:
        complain("but nothing is sent, nor git asked for the commit: consent is off: " + why)
    if not known:
        complain("there is no ~/.ashlr/machine-id yet: identity_hash is that of a passing one")
    return 0


def shown_endpoint(env):
    # type: (Dict[str, str]) -> str
    """Where it goes, without credentials."""
    try:
        return checked_url(endpoint(env)[0])[2]
    except ValueError as error:
        return "nowhere: " + str(error)


def status(argv):
    # type: (Sequence[str]) -> int
    """Print consent, endpoint, what waits and the last result, for people or (--json) for programs."""
    import json
    if argv and list(argv) != ["--json"]:
        return complain("status takes --json and nothing else; see emit.py --help", 2)
    env = environment()
    home = home_of(env)
    allowed, why = consent(env, telemetry_said(home))
    names, last = waiting(home), object_at(home + LAST)
    at, result, again = last.get("at"), last.get("result"), last.get("retry_at")
    since = iso(int(names[0][:15]) / 1000) if names else None
    until = iso(again) if type(again) is float and 0 < again < 1e11 else None
    url, chosen_by = shown_endpoint(env), endpoint(env)[1]
    if argv:
        print(json.dumps({
            "consent": {"on": allowed, "decided_by": why},
            "endpoint": {"url": url, "decided_by": chosen_by},
            "waiting": {"events": len(names), "since": since},
            "last_flush": {"at": at, "result": result, "retry_at": until} if last else None,
        }))
        return 0
    print("consent   %s: %s" % ("on" if allowed else "off", why))
    print("endpoint  %s (%s)" % (url, chosen_by))
    print("waiting   events: %d%s" % (len(names), ", since " + since if since else ""))
    print("last run  %s" % (ascii("%s: %s" % (at, result))[1:-1] if last else "none yet"))
    if until:
        print("retry     the server wants to be asked again at " + until)
    return 0


def switch(argv, value):
    # type: (Sequence[str], str) -> int
    """Write the person's word into config.json, all else in it kept."""
    import json
    from os.path import lexists, realpath
    if argv:
        return complain("on and off take nothing; see emit.py --help", 2)
    env = environment()
    home = home_of(env)
    path, mode = realpath(home + ASHLR + b"config.json"), 0o600
    config = {}  # type: Dict[str, Any]
    gone = purge(home) if value == "off" else 0
    try:
        if lexists(path):
            config, mode = dict(loads(contents(path)).items()), system.stat(path).st_mode & 0o777
        before = config.get("telemetry")
        data = json.dumps(dict(config, telemetry=value), indent=2, allow_nan=False).encode() + b"\n"
    except (ValueError, AttributeError, RecursionError):
        return complain("~/.ashlr/config.json is not a JSON object, and is left alone: mend it, or set "
                        "ASHLR_TELEMETRY=" + ("off" if value == "off" else "on"), 1)
    if before != value:
        write_whole(path, data, mode)
    if value == "off":
        gone += purge(home)  # of a session that ended meanwhile
        print("off: nothing is collected or sent any more; files that waited, and are deleted: %d" % gone)
    else:
        print(COLLECTED % shown_endpoint(env) if before != value else "on, as before")
    allowed, why = consent(env, value)
    if allowed != (value == "opt-in"):
        complain("but still off here: " + why)
    return 0


COMMANDS = {
    "show": show,
    "status": status,
    "on": lambda argv: switch(argv, "opt-in"),
    "off": lambda argv: switch(argv, "off"),
}  # type: Dict[str, Callable[[Sequence[str]], int]]


def command(argv):
    # type: (Sequence[str]) -> int
    """The exit status of a command other than the hooks."""
    if "--help" in argv or "-h" in argv:
        print(__doc__)
        return flushed(0)
    if argv[0] not in COMMANDS:
        return complain("no such command; see emit.py --help", 2)
    try:
        return flushed(COMMANDS[argv[0]](argv[1:]))
    except (OSError, ValueError) as error:
        return complain("could not be done: " + reason(error), 1)


def flushed(code):
    # type: (int) -> int
    """What was printed must be out before `run` leaves; `code` again."""
    if sys.stdout:
        sys.stdout.flush()
    return code


def complain(text, code=0):
    # type: (str, int) -> int
    """One line on standard error; `code` again."""
    try:
        sys.stderr.write("emit.py: %s\n" % text)
        sys.stderr.flush()
    except (AttributeError, OSError):  # closed by whoever called
        pass
    return code
'''


if __name__ == "__main__":
    run()
else:
    unfold(3)
