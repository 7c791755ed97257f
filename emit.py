#!/usr/bin/env python3
"""emit.py reports that a coding session ended, and its shape, once the person has consented.

usage:
  emit.py [--dir DIR] [--wait [MS]]       the session-end hook: capture, let the caller go, send
  emit.py track [--dir DIR] [--discoveries DIR]... [REF ...]
                                          the after-tool hook, or: discoveries touched by hand
  emit.py show [--dir DIR]                the JSON that would be sent now, and where to
  emit.py status [--json]                 consent, endpoint, what waits, why nothing can be captured
  emit.py mine                            this machine's identity in each quarter, to ask an
                                          operator for deletion
  emit.py hooks HOST [--folder TEXT]      the configuration of claude, codex, copilot, gemini, qwen
                                          or opencode
  emit.py on | off                        say yes | say no, and delete what waits
  emit.py --version | --help
example:
  echo '{"session_id":"abc","cwd":"/src/app"}' | ASHLR_TELEMETRY=on python3 emit.py --wait 2000

It needs nothing but Python 3.6 or newer, as one file in any folder. A hook run never fails, prints
nothing on standard output, and exits 0. Before the hook returns, the event is in the spool. Then a
process of its own sends it, for 20 s at the most. What cannot be sent waits in
~/.ashlr/session-events/pending/ (at most 500 events, 30 days) for the next session's end.
--wait stays until the event is answered, MS milliseconds (500) at the most; in CI and in containers
that is the default. ASHLR_SESSION_EVENTS_WAIT=MS sets another time (0: never).
--discoveries names a folder below the project whose files count as discoveries.
ASHLR_TELEMETRY_DEBUG=1 says on standard error what a hook run did.
Exit status: 0 done, 1 could not be done, 2 wrong usage (commands only).
"""
# A host waits for each start of this program, so a start imports only what its path needs: imports
# stand in functions. An import costs, in bare starts of Python (-I -S): os 0.2 to 0.3, json 0.9,
# re 0.7, hashlib 0.4, subprocess and urllib.request more than 1. Leaving by os._exit saves 0.15.
import os
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import IO, Any, Callable, Dict, List, Mapping, Optional, Sequence, Set, Tuple

    Env = Dict[str, str]  # what `environment` gives
    Json = Dict[str, Any]  # a JSON object
    Flags = Dict[str, List[str]]  # the values of each flag of a command line

# The one line that another plugin changes. The folder in the home, the prefix of the variables and
# the default place of discoveries follow it.
PRODUCT = "ashlr"
HOME_FOLDER = "~/." + PRODUCT
PREFIX = PRODUCT.upper().replace("-", "_").replace(".", "_") + "_"
DISCOVERIES = "." + PRODUCT + "code/genome/sections/discoveries"

VERSION = "2.0.0"
FILE = os.path.abspath(__file__)  # now, since the process that sends goes to another folder
DEFAULT_SERVER = "http://127.0.0.1:8787"  # README, Contract 6
ENDPOINT_PATH = "/v1/session-events"

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
RULES: "Json" = {name: rule for name, _, _, rule in FIELDS}
REF = RULES["discovery_refs"][1]
EVENT_BYTES = 65536

# Where hosts keep what the event needs (measured; README, Contract 4).
SESSION_KEYS = ("session_id", "sessionId", "sessionID", "conversation_id")
SESSION_VARIABLES = ("CLAUDE_SESSION_ID", "CLAUDE_CODE_SESSION_ID", "GEMINI_SESSION_ID",
                     "QWEN_CODE_SESSION_ID")
PROJECT_KEYS = ("cwd", "directory", "workspace_roots")  # of the last, its first member
INPUT_KEYS = ("tool_input", "toolArgs", "args")
PATH_KEYS = ("file_path", "filePath", "absolute_path", "notebook_path", "path")

# Where the home probably ends with the session: CI services and containers say so.
PASSING_VARIABLES = ("CI", "KUBERNETES_SERVICE_HOST", "container", "TF_BUILD", "JENKINS_URL")
PASSING_FILES = ("/.dockerenv", "/run/.containerenv")

LIFE_S = 20.0  # of the process that sends, whatever the network does
WAIT_S = 0.5  # for the answer, where the home may end with the session
INPUT_FIRST_S, INPUT_REST_S = 0.25, 1.0  # for the hook's JSON to begin, and to end
PROGRAM_S = 0.25  # for git, and for ps
ANSWER_S = 10.0  # for each step of one request
COMMIT_S = 1.0  # age before other processes send an event: its own child may still add the commit
FAILED_ANSWERS = 10  # in one run, before sending stops: fewer may each be about one event
DAY_S = 86400.0  # the longest Retry-After that is believed; silence after which a session has ended
WAITING_EVENTS, WAITING_DAYS = 500, 30
SESSION_DAYS = 90  # that a session's file is kept after its last line: hosts continue none after 30
LEFTOVER_S = 3600.0  # age at which a file that a kill left half-written is deleted
INPUT_BYTES = 1 << 26  # more than any host writes
FILE_BYTES = 1 << 22  # of a file in the home; what is larger counts as unreadable
SESSION_BYTES = 1 << 21  # of a session's file; half of it for calls, 50,000

FOLDER = "/." + PRODUCT + "/"
OURS = FOLDER + "session-events/"
PENDING, SESSIONS, LAST = OURS + "pending/", OURS + "sessions/", OURS + "last.json"

# O_NONBLOCK: a pipe in the place of a file must not block. Windows has O_BINARY only.
SAFELY = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
NO_LINK = getattr(os, "O_NOFOLLOW", 0)

# The names of this program's files: waiting events, sessions, files that are still being written.
EVENT_NAME = "[0-9]{15}-[0-9a-f]{12}(-[0-9]{1,3})?[.]json"
SESSION_NAME = "([0-9a-f]{2}){1,120}|long-[0-9a-f]{64}"
LEFTOVER_NAME = "[.][0-9a-f]{16}[.]tmp"

# "telemetry" of a config.json that cannot be read, and what is said of it.
UNCLEAR = HOME_FOLDER + "/config.json cannot be read, and no variable says on"

COLLECTED = """\
Collected when a session ends: the time, tool calls, tokens saved, commit, version, discoveries by
name. It goes to %s. Kept here for 90 days: the times of its tool calls. Never: your name, paths,
code, prompts. Machine, login and session are one-way hashes; the first two change every quarter.
To stop: emit.py off (also deletes what waits). To see an event before it goes: emit.py show."""


class Told(ValueError):
    """An error whose text may be printed: it holds no path. The texts of other errors may."""


# ==================================================================================================
# Consent
# ==================================================================================================


def consent(env: "Env", said: "Any") -> "Tuple[bool, str]":
    """(consent is given, what decided): README, Contract 5. `said`: "telemetry" of config.json."""
    asked = env.get(PREFIX + "TELEMETRY", "").lower()
    return next((allowed, why) for decides, allowed, why in (
        (env.get("DO_NOT_TRACK", "") not in ("", "0"), False, "DO_NOT_TRACK is set"),
        (asked in ("off", "0"), False, PREFIX + "TELEMETRY says off"),
        (said == "off", False, HOME_FOLDER + "/config.json says off"),
        (asked in ("on", "1"), True, PREFIX + "TELEMETRY says on"),
        (said == "opt-in", True, HOME_FOLDER + "/config.json says opt-in"),
        (said == UNCLEAR, False, UNCLEAR),
        (True, False, "nobody said yes (emit.py on does)"),
    ) if decides)


def telemetry_said(home: str) -> "Any":
    """"telemetry" of config.json; None if there is none, UNCLEAR if the file cannot be read."""
    try:
        return loads(contents(home + FOLDER + "config.json")).get("telemetry")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, AttributeError):
        return UNCLEAR


def consent_refused(caller: "Caller", delete: bool = True) -> str:
    """Why there is no consent, or "". `delete`: then what waits is deleted.

    An unreadable config.json alone deletes nothing.
    """
    allowed, why = consent(caller.env, telemetry_said(caller.home))
    if delete and not allowed and why != UNCLEAR:
        purge(caller.home)
    return "" if allowed else "consent is off: " + why


# ==================================================================================================
# Hosts: what they hand over, as input, arguments and environment
# ==================================================================================================

ESCAPES = ("\\\\", '\\"', "\\n", "\\t", "\\r", "\\/")
MEANINGS = dict(enumerate('\\"\n\t\r/'))
MARKS = {ord(mark): " %s " % mark for mark in "{}[],:"}
CONSTANTS = {"true": True, "false": False, "null": None}


def loads(data: bytes) -> "Any":
    """`json.loads` of UTF-8 text. ValueError also for NaN, thousands of digits, a key twice."""
    text = (data[3:] if data[:3] == b"\xef\xbb\xbf" else data).decode()
    try:
        return quick_json(text)
    except (ValueError, IndexError, RecursionError):
        import json
    try:
        return json.loads(text, parse_constant=short_int, parse_int=short_int,
                          object_pairs_hook=object_of)
    except RecursionError:
        raise ValueError("not JSON") from None


def quick_json(text: str) -> "Any":
    """The value of a plain JSON text. It saves the import of json, 0.9 of a bare start.

    Plain: objects, arrays, whole numbers, printable text without \\u. For anything else it raises
    an error, and json decides. A test holds that both read the same values.
    """
    plain = len(text) <= 1 << 20 and text.replace("\n", "").isprintable()
    for code, escape in enumerate(ESCAPES):
        text = text.replace(escape, chr(code))
    pieces = text.split('"')  # outside of a string, inside, outside and so on
    inside = "".join(pieces[1::2])
    if not plain or len(pieces) > 5000 or len(pieces) % 2 == 0 or set(inside) & {"\n", "\\"}:
        raise ValueError("for json")
    tokens: "List[str]" = []  # marks, words, and strings; a string begins with a quote
    for n, piece in enumerate(pieces):
        tokens += ['"' + piece.translate(MEANINGS)] if n % 2 else piece.translate(MARKS).split()
    tokens.reverse()
    value = next_value(tokens)
    if tokens:
        raise ValueError("for json")
    return value


def next_value(tokens: "List[str]") -> "Any":
    """Take the tokens of one JSON value off the end of a list. Any error: json decides."""
    token = tokens.pop()
    if token[0] == '"':
        return token[1:]
    if token in CONSTANTS:
        return CONSTANTS[token]
    if token not in "{[":
        if len(token) > 16 or token != str(int(token)):
            raise ValueError("for json")
        return int(token)
    close = "}" if token == "{" else "]"
    values: "List[Any]" = []
    while tokens[-1] != close:
        if values and tokens.pop() != ",":
            raise ValueError("for json")
        value = next_value(tokens)
        if close == "}":
            if not isinstance(value, str) or tokens.pop() != ":":
                raise ValueError("for json")
            value = value, next_value(tokens)
        values.append(value)
    tokens.pop()
    return object_of(values) if close == "}" else values


def object_of(pairs: "List[Tuple[str, Any]]") -> "Json":
    """A JSON object. ValueError if a key appears twice: nobody can tell which one is meant."""
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key appears twice")
    return value


def short_int(digits: str) -> int:
    """A whole number of a JSON text. ValueError for thousands of digits: the time grows by n**2."""
    if len(digits) > 4300:  # as in Python itself, but only since 3.11
        raise ValueError("too many digits")
    return int(digits)


def loads_object(data: bytes) -> "Json":
    """The JSON object in `data`; {} for anything else."""
    try:
        value = loads(data) if data else None
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {}


def standard_input() -> bytes:
    """What the host wrote on standard input within the time limits; b"" for a terminal."""
    from select import select
    data, until = bytearray(), time.monotonic() + INPUT_FIRST_S
    while not os.isatty(0) and len(data) <= INPUT_BYTES:
        found = quietly(select, [0], [], [], max(0.0, until - time.monotonic()))
        # None: Windows knows sockets only; the read waits there.
        piece = quietly(os.read, 0, 65536) if found is None or found[0] else b""
        if not piece:  # the end; too late; or there is no standard input
            break
        until = until if data else time.monotonic() + INPUT_REST_S
        data += piece
    return bytes(data)


def environment(variables: "Mapping[str, str]") -> "Env":
    """The environment as text: UTF-8, independent of the locale. All but HOME is trimmed."""
    env = {name: decoded(os.fsencode(value)) for name, value in variables.items()}
    return {name: env[name] if name == "HOME" else env[name].strip() for name in env}


def decoded(data: bytes) -> str:
    """The text of UTF-8. Other bytes are kept too: `encoded` gives them back."""
    return data.decode("utf-8", "surrogateescape")


def encoded(text: str) -> bytes:
    """UTF-8 of any text. As a path it is independent of the locale, which some hosts do not set."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


def parsed(argv: "Sequence[str]") -> "Tuple[Flags, List[str]]":
    """({flag: its values}, the other words). A flag without its value is one of the other words."""
    flags: "Flags" = {}
    words, left = [], list(argv)
    while left:
        word, value = left.pop(0), ""
        if word == "--wait":
            value = left.pop(0) if left and left[0].isdecimal() else "%d" % (1000 * WAIT_S)
        elif word in ("--dir", "--discoveries", "--folder") and left:
            value = left.pop(0)
        elif word != "--json":
            words.append(word)
            continue
        flags.setdefault(word, []).append(value)
    return flags, words


def wait_of(env: "Env", flags: "Flags") -> float:
    """Seconds that the hook stays for the answer: as asked, or where the home may end with it."""
    asked = flags.get("--wait", [env.get(PREFIX + "SESSION_EVENTS_WAIT", "")])[-1]
    if asked.isdecimal():
        return min(int(asked[:9]) / 1000, LIFE_S)
    passing = {env.get(name, "").lower() for name in PASSING_VARIABLES} - {"", "0", "false"}
    return WAIT_S if passing or any(map(os.path.exists, PASSING_FILES)) else 0.0


def texts(found: "Json", names: "Sequence[str]") -> "List[str]":
    """Those of the named members that are text, not blank and without NUL."""
    values = map(found.get, names)
    return [value for value in values
            if isinstance(value, str) and value.strip() and "\0" not in value]


def first_text(found: "Json", names: "Sequence[str]") -> str:
    """The first of these `texts`, or ""."""
    return (texts(found, names) or [""])[0]


class Caller:
    """The process that started this one, and what it said.

    `flags`, `words`: the command line; `env`; `debug`: hook runs shall say what they do.
    From `listen` on, `hook`: the host's JSON, {} if none; `session`: the raw id as the host gave
    it, "" if it gave none; `base`: the folder of the tool's relative paths; `project`. Both folders
    are absolute. From `identify` on, `machine`, and `session` in any case.
    """

    def __init__(self, flags: "Flags", words: "Sequence[str]") -> None:
        self.flags, self.words, self.ppid = flags, words, os.getppid()
        self.env: "Env" = {}
        self.debug = False

    @property
    def home(self) -> str:
        """The home folder. Told if there is none; the working folder never takes its place."""
        path = os.path.expanduser("~")
        if self.env.get("HOME") == "" or not os.path.isabs(path):
            raise Told("there is no home folder: set HOME")
        return path

    def listen(self, data: bytes) -> None:
        """Take in what the host wrote on standard input."""
        self.hook = loads_object(data)
        self.session = (first_text(self.hook, SESSION_KEYS)
                        or first_text(self.env, SESSION_VARIABLES))
        roots = self.hook.get("workspace_roots")
        root = roots[0] if isinstance(roots, list) and roots else ""
        told = first_text(dict(self.hook, workspace_roots=root), PROJECT_KEYS)
        here = decoded(quietly(os.getcwdb) or b"/")  # None: it was deleted
        wanted = self.flags.get("--dir", [self.env.get("CLAUDE_PROJECT_DIR", "")])[-1] or told
        self.base, self.project = os.path.join(here, told), os.path.join(here, wanted)

    def identify(self, machine: str) -> None:
        """Note the `machine`, and name a session that the host did not (README, Contract 4)."""
        self.machine = machine
        self.session = self.session or "ppid:%d:%s:%s" % (
            self.ppid, parent_started(self.ppid), machine)


# ==================================================================================================
# Identity
# ==================================================================================================


def sha256_hex(text: str) -> str:
    """64 lowercase hex digits."""
    from hashlib import sha256
    return sha256(encoded(text)).hexdigest()


def salt(seconds: float) -> str:
    """`salt_2026Q4`: the UTC quarter of a time in seconds since 1970 (README, Contract 4)."""
    year, month = time.gmtime(seconds)[:2]
    return "salt_%dQ%d" % (year, (month + 2) // 3)


def random_uuid() -> str:
    """RFC 4122, version 4, lower case. (Importing `uuid` starts programs on old Pythons.)"""
    text = os.urandom(16).hex()
    return "-".join((text[:8], text[8:12], "4" + text[13:16], "8" + text[17:20], text[20:]))


def github_login(cache: "Json") -> str:
    """The login in pro-token-cache.json, trimmed, or "": never guessed."""
    return first_text(cache, ["githubLogin"]).strip() if cache.get("valid") is True else ""


# ==================================================================================================
# Session: its file, its parts, its counts, its discoveries (pure)
# ==================================================================================================
#
# While a session runs, its file is the only state. Its name is the raw session id in hex. Every
# process appends whole lines to it in one write, and none rewrites it:
#
#   call MS                           a tool call; MS since 1970
#   touch MS REF                      a discovery that was touched
#   end MS TOKEN CALLS TOKENS         an end, and what stats.json said (CALLS is - without a bucket)
#   kept TOKEN                        the event of that end is on the disk
#   settled                           after a day of silence: all lines above are in events
#
# Each end appends a line, also when several come at once. The order of the lines decides: a part is
# what stands between one end and the next, and an end with nothing new is a repeat. Every reader of
# the file finds the same parts, so a part whose event was lost by a kill can be made again.


class Part:
    """One part: `token` of its line, `ended` in ms, `number` from 1; calls, tokens saved, refs."""

    def __init__(self, token: str, ended: int, number: int, calls: int, tokens: int,
                 refs: "List[str]") -> None:
        self.token, self.ended, self.number = token, ended, number
        self.calls, self.tokens, self.refs = calls, tokens, refs


class Record:
    """What a session's file says. Lines of another form are left out.

    `parts`; `kept`: the tokens of parts whose event is on the disk; since the last end: `calls`,
    `refs`; `last`: ms of the last call or touch.
    """

    def __init__(self, data: bytes) -> None:
        self.calls, self.last, self.said = 0, 0, [0, 0]  # said: calls and tokens of all parts
        self.parts: "List[Part]" = []
        self.refs: "List[str]" = []
        self.kept: "Set[str]" = set()
        for line in data.decode("latin-1").split("\n"):
            kind, *words = line.split(" ")
            try:
                if kind == "call":
                    self.last, self.calls = number(words[0]), self.calls + 1
                elif kind == "touch":
                    self.last = number(words[0])
                    self.refs.append(words[1])
                elif kind == "end":
                    self.end(number(words[0]), *words[1:4])
                elif kind == "kept":
                    self.kept.add(words[0])
            except (IndexError, TypeError, ValueError):  # cut short by a full disk, or not ours
                pass

    def end(self, ended: int, token: str, calls: str, tokens: str) -> None:
        """Add a part, unless the end brings nothing new."""
        new_tokens = max(0, number(tokens) - self.said[1])
        new_calls = self.calls if calls == "-" else max(0, number(calls) - self.said[0])
        refs = newest_refs(self.refs)
        if not self.parts or self.calls or refs or new_calls or new_tokens:
            self.parts.append(Part(token, ended, len(self.parts) + 1, new_calls, new_tokens, refs))
            self.said = [self.said[0] + new_calls, self.said[1] + new_tokens]
            self.calls, self.refs = 0, []


def number(text: str) -> int:
    """The number that 1 to 14 digits say (ms until the year 5138), or ValueError."""
    if len(text) > 14 or not text.isdecimal():
        raise ValueError("no number")
    return int(text)


def stats_bucket(ppid: int, home: str) -> str:
    """The name that stats.json gives to a parent process (README, Contract 4)."""
    units = ("ppid:%d:%s" % (ppid, home)).encode("utf-16-le", "surrogatepass")
    h = 0
    for low, high in zip(units[::2], units[1::2]):
        h = (h * 31 + low + 256 * high) & 0xFFFFFFFF
    return "p%x" % h


def counts(stats: "Json", project: "Json", ids: "List[str]",
           now: float) -> "Tuple[Optional[int], int]":
    """(calls, tokens saved): sums over this session's buckets of stats.json, each counted once.

    Calls are None without a bucket. `project`: last-project.json; `ids`: the session's raw id and
    the bucket of its parent process; `now`: seconds since 1970 (README, Contract 4).
    """
    mine, updated = set(ids), first_text(project, ["updatedAt"])
    try:
        if updated and 0 <= now - instant(updated) <= DAY_S:
            mine.add(first_text(project, ["sessionId"]).strip())
    except ValueError:
        pass
    sessions = stats.get("sessions") if stats.get("schemaVersion", 2) == 2 else None
    known = sessions if isinstance(sessions, dict) else {}
    buckets = [known[name] for name in mine if name and isinstance(known.get(name), dict)]
    calls = sum(whole(bucket.get("calls")) for bucket in buckets)
    tokens = sum(whole(bucket.get("tokensSaved")) for bucket in buckets)
    return calls if buckets else None, tokens


def whole(value: "Any") -> int:
    """A number of a bucket, floored, 10**9 at most; 0 for a negative one and for no number."""
    return int(min(value, 1e9)) if type(value) in (int, float) and value >= 0 else 0


def touched_refs(tool: "Any", base: str, project: str, folders: "Sequence[str]") -> "List[str]":
    """The discoveries that a tool's input touched. `folders`: where they are, below the project.

    A path counts when it lies in one of the folders, as written or after the disk's links are
    followed; a shell command when it mentions the last two names of a folder and a file.
    """
    if isinstance(tool, str):  # one host gives the input as JSON text
        tool = loads_object(encoded(tool))
    tool = tool if isinstance(tool, dict) else {}
    command = tool.get("command")
    command = " ".join(map(str, command)) if isinstance(command, list) else str(command)
    found: "List[str]" = []
    for folder in folders:
        if not folder.strip("./\\"):  # the project itself: every file would be a discovery
            continue
        for path in texts(tool, PATH_KEYS):
            ref = touched_ref(path, base, project, folder)
            if not ref and os.path.basename(folder.rstrip("/")) in path:
                # The folder may have two paths: on a Mac, /tmp is /private/tmp.
                path, root = (decoded(os.path.realpath(encoded(given)))
                              for given in (os.path.join(base, path), project))
                ref = touched_ref(path, "/", root, folder)
            found.append(ref)
        found += mentioned_refs(command, folder)
    return newest_refs(found)


def touched_ref(path: str, base: str, project: str, folder: str) -> str:
    """The discovery that a path names, "" if it lies elsewhere. The disk is not read.

    `base`: the absolute folder that a relative path starts from. On Windows case is no difference.
    """
    at = os.path
    project = at.normcase(at.normpath(project))
    inside = at.normcase(at.normpath(at.join(project, folder))) + os.sep
    path = at.normpath(at.join(base, path))
    stem = at.splitext(at.basename(path))[0]
    found = at.normcase(path).startswith(inside) and inside.startswith(at.join(project, ""))
    return stem if found and fits(stem, REF) else ""


def mentioned_refs(command: str, folder: str) -> "List[str]":
    """The discoveries that a shell command mentions as `…/sections/discoveries/NAME`."""
    text = command.replace("\\", "/")
    mark = "/".join(folder.replace("\\", "/").strip("/").split("/")[-2:]) + "/"
    if mark not in text:
        return []
    import re  # `x-sections/…` is another folder; `a*` and `a/` are no names
    names = re.findall(r"(?<![\w.-])%s([\w.:/-]*[\w.:-])(?=/?['\"]|[\s`;|&()<>,]|$)"
                       % re.escape(mark), text, re.ASCII)
    return [touched_ref(name, "/project/folder", "/project", "folder") for name in names]


def newest_refs(refs: "Sequence[str]") -> "List[str]":
    """The slugs among them in order of first touch, without repeats, the newest 200."""
    slugs = [ref for ref in dict.fromkeys(refs) if ref and fits(ref, REF)]
    return slugs[-RULES["discovery_refs"][0]:]


# ==================================================================================================
# Payload (pure)
# ==================================================================================================


def fits(text: "Any", pattern: str) -> bool:
    """True if it is a text and all of it matches."""
    if not isinstance(text, str):
        return False
    import re  # 0.7 of a bare start: not for every call
    return re.fullmatch(pattern, text) is not None


def iso(seconds: float) -> str:
    """`2026-05-22T12:34:56.000Z`, from seconds since 1970."""
    ms = int(seconds * 1000 + 0.01)  # a float may be just below the millisecond that was meant
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(ms // 1000)) + ".%03dZ" % (ms % 1000)


MOMENT = (r"([0-9]{4})-([0-9]{2})-([0-9]{2})T([0-9]{2}):([0-9]{2}):([0-9]{2})([.][0-9]+)?"
          r"(?:Z|([+-])([01][0-9]|2[0-3]):([0-5][0-9]))?")


def instant(text: str) -> float:
    """Seconds since 1970 of an ISO 8601 date and time (README, Contract 1), or ValueError."""
    import re
    from datetime import datetime
    found = re.fullmatch(MOMENT, text)
    if not found:
        raise ValueError("no date and time")
    *date, fraction, sign, hours, minutes = found.groups("0")
    year, month, day, hour, minute, second = map(int, date)
    moment = datetime(year, month, day, hour, minute, second) - datetime(1970, 1, 1)
    east = int(sign + "60") * (60 * int(hours) + int(minutes))  # s; without a zone all are "0"
    return moment.total_seconds() + float(fraction) - east


def is_event(event: "Any") -> bool:
    """True if FIELDS allows it: all needed fields, good values, no other key."""
    return isinstance(event, dict) and not unknown_keys(event) and all(
        is_value(event[name], kind, rule) if name in event else not needed
        for name, kind, needed, rule in FIELDS)


def unknown_keys(event: "Json") -> "Set[str]":
    """The keys that FIELDS has not. Another version of the program may know them."""
    return set(event).difference(RULES)


def is_value(value: "Any", kind: str, rule: "Any") -> bool:
    """True if a value keeps a row of FIELDS."""
    if value is None:
        return kind.endswith("null")
    if kind == "number":
        return type(value) is int and rule[0] <= value <= rule[1]
    if kind == "array":
        return (isinstance(value, list) and len(value) <= rule[0]
                and all(fits(item, rule[1]) for item in value))
    return fits(value, MOMENT if rule == "moment" else rule)


def as_sent(event: "Json") -> bytes:
    """The JSON of an event, without blanks. No rule of FIELDS allows what JSON would escape."""
    def text(value: "Any") -> str:
        if isinstance(value, list):
            return "[%s]" % ",".join(map(text, value))
        return "null" if value is None else ('"%s"' if isinstance(value, str) else "%d") % value

    return ("{%s}" % ",".join('"%s":%s' % (name, text(event[name])) for name in event)).encode()


def failures(name: str) -> int:
    """How often a waiting event was sent before: the number after the second `-` of its name."""
    return int(name[29:-5] or 0)


def is_new(name: str, now: float) -> bool:
    """True if a waiting event's own child may still add the commit; `now` in s since 1970."""
    return 0 <= now - int(name[:15]) / 1000 < COMMIT_S and not failures(name)


def session_name(session: str) -> str:
    """The name of a session's file: the raw id in hex, or its hash where that is too long."""
    data = encoded(session)  # hex saves `track` the import of hashlib
    return data.hex() if len(data) <= 120 else "long-" + sha256_hex(session)


def is_settled(status: int, body: "IO[bytes]") -> bool:
    """True if an event has arrived or is given up (README, Contract 6). It may read the body."""
    return status in (202, 400, 413, 422) or (
        200 <= status < 300 and loads_object(body.read(EVENT_BYTES)).get("ok") is True)


def retry_at(header: "Optional[str]", now: float) -> float:
    """The time that `Retry-After` names, in seconds since 1970, at most a day ahead, or 0.0."""
    from email.utils import parsedate_to_datetime
    text = (header or "").strip()  # seconds or a date
    try:
        at = (now + int(text[:9]) if fits(text, "[0-9]+")
              else parsedate_to_datetime(text).timestamp())
    except (TypeError, ValueError, IndexError, OverflowError):
        return 0.0
    return min(at, now + DAY_S) if at > now else 0.0


# ==================================================================================================
# Spool: files in the home
# ==================================================================================================


def quietly(function: "Callable[..., Any]", *args: "Any") -> "Any":
    """What a call returns, but None after an OSError: for what may fail without harm."""
    try:
        return function(*args)
    except OSError:
        return None


def contents(path: "Any", most: int = FILE_BYTES, flags: int = 0) -> bytes:
    """The bytes of a file, but at most one more than `most`. OSError if it cannot be read."""
    with open(os.open(path, os.O_RDONLY | SAFELY | flags), "rb") as file:
        return file.read(most + 1) or b""


def object_at(path: "Any") -> "Json":
    """The JSON object in a file; {} for anything else, and without a file."""
    return loads_object(quietly(contents, path) or b"")


def names_in(home: str, folder: str, pattern: str) -> "List[str]":
    """The sorted names in a `safe_folder` that match; [] if it cannot be used."""
    names = quietly(lambda: sorted(os.listdir(safe_folder(home, folder)))) or []
    return [name for name in names if fits(name, pattern)]


def safe_folder(home: str, folder: str, make: bool = False) -> str:
    """The path of one of our folders. OSError if the folder or its parent is a symbolic link.

    Only ~/.ashlr itself may be a link: a person may keep it on another disk.
    """
    if folder != FOLDER and any(os.path.islink((home + path)[:-1]) for path in (OURS, folder)):
        raise OSError(40, "a folder of emit.py is a symbolic link")
    if make:
        os.makedirs(home + folder, 0o700, exist_ok=True)
    return home + folder


def remove(path: str) -> bool:
    """Delete; True if it existed."""
    try:
        os.unlink(path)
        return True
    except OSError:
        return False


def sync(path: str) -> None:
    """fsync of a file or folder, for power cuts. OSError where the system has none for folders."""
    fd = os.open(path, os.O_RDONLY | SAFELY)
    os.fsync(fd)
    os.close(fd)


def write_whole(path: str, data: bytes, mode: int = 0o600, fresh: bool = False) -> None:
    """Write a file so that a reader sees the old content or all of `data`, and nothing between.

    `fresh`: FileExistsError if `path` exists. OSError if it cannot be written; no file stays then.
    """
    temporary = "%s/.%s.tmp" % (os.path.dirname(path), os.urandom(8).hex())
    try:
        with open(temporary, "xb") as file:
            file.write(data)
        os.chmod(temporary, mode)
        try:
            (os.link if fresh else os.replace)(temporary, path)
        except OSError:
            if not fresh or os.path.lexists(path):
                raise
            # A file system without hard links. Two first sessions at once may then differ, once.
            os.replace(temporary, path)
    finally:
        remove(temporary)


def machine_id(home: str, make: bool = True) -> str:
    """The machine's random name. `make`: on first use it is made; otherwise it is then "".

    OSError if it cannot be written or read, Told if its file is empty or a dangling link.
    """
    path = home + FOLDER + "machine-id"
    if not os.path.lexists(path):
        if not make:
            return ""
        try:
            safe_folder(home, FOLDER, make=True)
            write_whole(path, random_uuid().encode(), fresh=True)
        except FileExistsError:  # another session was quicker
            pass
    there = os.path.exists(path)
    name = decoded(contents(path)).strip() if there else ""
    if not name:
        fault = "empty" if there else "a link that leads nowhere"
        raise Told("%s/machine-id is %s: remove it" % (HOME_FOLDER, fault))
    return name


def append(home: str, session: str, lines: "Sequence[str]", most: int = SESSION_BYTES) -> None:
    """Add whole lines to a session's file, in one write. OSError if they cannot be written.

    O_APPEND: lines of simultaneous writers do not mix. The blank line in front ends a line that a
    full disk cut short. `most`: the file's largest size, in bytes, before the write.
    """
    path = safe_folder(home, SESSIONS, make=True) + session_name(session)
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | NO_LINK | SAFELY, 0o600)
    with open(fd, "wb", 0) as file:
        data = ("\n%s\n" % "\n".join(lines)).encode("latin-1")
        if os.fstat(fd).st_size > most or file.write(data) < len(data):
            raise OSError(28, "no room in the session's file")


def session_data(home: str, name: str) -> bytes:
    """The bytes of a session's file; b"" if it cannot be read."""
    try:
        return contents(safe_folder(home, SESSIONS) + name, SESSION_BYTES + 4096, NO_LINK)
    except OSError:
        return b""


def end_session(home: str, session: str, ended: int, calls: "Optional[int]", tokens: int,
                written: bool = True) -> "Optional[Part]":
    """The part that an end of a session closes; None if it brings nothing new.

    `ended`: ms since 1970; `calls`, `tokens`: of stats.json; `written`: the end is appended to the
    session's file. Where that fails, the part is made all the same: an end at the same time may
    then report it too.
    """
    token = os.urandom(4).hex()
    line = "end %d %s %s %d" % (ended, token, "-" if calls is None else calls, tokens)
    if written:
        quietly(append, home, session, [line])
    data = session_data(home, session_name(session))
    if token.encode() not in data:  # it shall not be written, or could not be
        data += b"\n" + line.encode()
    return next((part for part in Record(data).parts if part.token == token), None)


def waiting(home: str) -> "List[str]":
    """The names of the waiting events in sending order: least often sent first, then oldest."""
    return sorted(names_in(home, PENDING, EVENT_NAME), key=lambda name: (failures(name), name))


def purge(home: str) -> int:
    """Delete waiting events, session files and last result; the number of files deleted.

    Only names that this program makes are deleted, and only in folders that are no symbolic links.
    """
    paths = [home + folder + name
             for folder, pattern in ((PENDING, EVENT_NAME), (SESSIONS, SESSION_NAME))
             for name in names_in(home, folder, pattern + "|" + LEFTOVER_NAME)]
    if quietly(safe_folder, home, OURS):
        paths.append(home + LAST)
    return sum(map(remove, paths))


def expire(home: str, now: float) -> None:
    """Remove events over the limits of number and age (`now`: seconds since 1970).

    An event that is dated in the future stays, and so does one of another version of the program.
    """
    oldest = (now - WAITING_DAYS * DAY_S) * 1000
    for later, name in enumerate(reversed(names_in(home, PENDING, EVENT_NAME))):
        over = later >= WAITING_EVENTS or int(name[:15]) < oldest
        if over and not unknown_keys(object_at(home + PENDING + name)):
            remove(home + PENDING + name)


def sweep(caller: Caller) -> None:
    """Capture sessions that fell silent without an end; remove old and half-written files."""
    home = caller.home
    for name in names_in(home, SESSIONS, SESSION_NAME):
        if age_of(home + SESSIONS + name) > DAY_S:
            quietly(settle, caller, name)  # no room: the next session's end tries again
        if age_of(home + SESSIONS + name) > SESSION_DAYS * DAY_S:  # and not settled now
            remove(home + SESSIONS + name)
    for folder in (FOLDER, OURS, PENDING, SESSIONS):
        for name in names_in(home, folder, LEFTOVER_NAME):
            if age_of(home + folder + name) > LEFTOVER_S:
                remove(home + folder + name)


def age_of(path: str) -> float:
    """Seconds since the last change of a file; 0.0 if it is gone."""
    found = quietly(os.lstat, path)
    return time.time() - found.st_mtime if found else 0.0


def settle(caller: Caller, name: str) -> None:
    """Capture the parts of a silent session that have no event yet. This makes its file new."""
    home, data = caller.home, session_data(caller.home, name)
    # A hash does not tell the session id. A parent process may have been the shell of one call.
    if not data or data.endswith(b"\nsettled\n") or name.startswith(("long-", b"ppid:".hex())):
        return
    record, session = Record(data), decoded(bytes.fromhex(name))
    if record.calls or record.refs:
        stats = counts(object_at(home + FOLDER + "stats.json"), {}, [session], time.time())
        end_session(home, session, record.last, *stats)
        record = Record(session_data(home, name))
    missing = [part for part in record.parts if part.token not in record.kept]
    for part in missing:
        keep(home, part, compose(caller, session, part))
    append(home, session, ["kept " + part.token for part in missing] + ["settled"])


def keep(home: str, part: Part, event: "Json") -> str:
    """Put a part's event into the spool; its path there. OSError if it cannot be written.

    The name is ms since 1970 and the start of the session's hash: the same each time.
    """
    name = "%015d-%s.json" % (part.ended, event["session_id_hash"][:12])
    path = safe_folder(home, PENDING, make=True) + name
    write_whole(path, as_sent(event))
    return path


# ==================================================================================================
# Capture
# ==================================================================================================


def track(caller: Caller) -> int:
    """Record a tool call and the discoveries that it touched, or those that the words name."""
    words = caller.words
    if not all(fits(ref, REF) for ref in words):
        return to_stderr("a discovery's name is a letter or digit, then at most 127 of those "
                         "and . _ : -", 2)
    refused = consent_refused(caller, delete=False)
    if refused:
        said = "not recorded: " + refused
        return to_stderr(said) if words else say(caller, said)
    by_hand = words and first_text(caller.env, SESSION_VARIABLES)
    caller.listen(b"" if by_hand else standard_input())
    tool = next(filter(None, map(caller.hook.get, INPUT_KEYS)), None)
    folders = caller.flags.get("--discoveries", [DISCOVERIES])
    now = "%d" % (time.time() * 1000)
    refs = words or touched_refs(tool, caller.base, caller.project, folders)
    lines = ["touch %s %s" % (now, ref) for ref in refs]
    # A call without a session id cannot be counted: its parent may have been a shell of its own.
    if caller.session and caller.hook and not words:
        lines.insert(0, "call " + now)
    if lines:
        caller.identify("" if caller.session else machine_id(caller.home))
        append(caller.home, caller.session, lines, SESSION_BYTES // 2)
    return say(caller, "consent is on; lines recorded: %d" % len(lines))


def compose(caller: Caller, session: str, part: Part) -> "Json":
    """The event of a part (README, Contract 1 and 4), without the commit."""
    login = github_login(object_at(caller.home + FOLDER + "pro-token-cache.json"))
    quarter = salt(part.ended / 1000)
    named = session if part.number == 1 else "%s:part:%d" % (session, part.number)
    return {
        "identity_hash": sha256_hex(caller.machine + quarter),
        "github_hash": sha256_hex(login + quarter) if login else None,
        "session_id_hash": sha256_hex(named),
        "ended_at": iso(part.ended / 1000),
        "tool_count": min(part.calls, RULES["tool_count"][1]),
        "tokens_saved": min(part.tokens, RULES["tokens_saved"][1]),
        "branch_sha": None,
        "discovery_refs": part.refs,
        "plugin_version": plugin_version(caller.env.get("CLAUDE_PLUGIN_ROOT", "")),
    }


def plugin_version(named: str) -> str:
    """The version of the plugin around this file, whose folder may be `named` (Contract 4)."""
    beside = os.path.dirname(os.fsencode(FILE))
    for root in filter(None, (encoded(named), beside, os.path.dirname(beside))):
        for name in (b"package.json", b".claude-plugin/plugin.json"):
            version = object_at(os.path.join(root, name)).get("version")
            if fits(version, RULES["plugin_version"]):
                return str(version)
    return "0.0.0"


def close_part(caller: Caller, machine: str,
               written: bool = True) -> "Tuple[Optional[Part], Json]":
    """(the part that the session's end closes now, its event): see `end_session`."""
    home, now = caller.home, time.time()
    caller.identify(machine)
    stats, project = (
        object_at(home + FOLDER + name) for name in ("stats.json", "last-project.json"))
    bucket = stats_bucket(caller.ppid, caller.env.get("HOME", ""))
    numbers = counts(stats, project, [caller.session, bucket], now)
    part = end_session(home, caller.session, int(now * 1000), *numbers, written=written)
    return part, compose(caller, caller.session, part) if part else {}


def parent_started(ppid: int) -> str:
    """When a process started, as the system writes it; "" if that is not known."""
    stat = quietly(contents, "/proc/%d/stat" % ppid) or b""
    ticks = stat.rpartition(b")")[2].split()[19:20]  # the 22nd field, since the system started
    return ticks[0].decode() if ticks else printed_by(
        ["ps", "-o", "lstart=", "-p", str(ppid)], b"/", {"LC_ALL": "C"})


def branch_sha(project: str) -> "Optional[str]":
    """The commit of a folder, or None. No hook, fetch or prompt of a hostile repository runs."""
    sha = printed_by(["git", "rev-parse", "--short=12", "HEAD"], encoded(project), {
        "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0",
        "GIT_NO_LAZY_FETCH": "1", "GIT_ALLOW_PROTOCOL": ""})
    return sha if fits(sha, RULES["branch_sha"]) else None


def printed_by(argv: "List[str]", folder: bytes, changes: "Env") -> str:
    """What a program prints within 250 ms, stripped; "" if it fails or takes longer.

    It is looked for in the absolute folders of PATH only: a relative one may lead into a project.
    It gets no input, no terminal and no GIT_* variables, which name another repository in a git
    hook.
    """
    from shutil import which
    from subprocess import DEVNULL, PIPE, Popen, TimeoutExpired
    path = os.pathsep.join(filter(os.path.isabs, os.get_exec_path()))
    program = which(argv[0], path=path) or ""
    if not os.path.isabs(program):  # not there; or Windows found it in the working folder
        return ""
    env = {name: value for name, value in os.environ.items() if name[:4] != "GIT_"}
    env.update(changes, PATH=path)
    try:
        process = Popen([program, *argv[1:]], stdin=DEVNULL, stdout=PIPE, stderr=DEVNULL, env=env,
                        cwd=folder, start_new_session=True)
        printed = process.communicate(timeout=PROGRAM_S)[0]
    except (OSError, ValueError):
        return ""
    except TimeoutExpired:  # its children end too: they may hold the pipe
        quietly(getattr(os, "killpg", os.kill), process.pid, 9)
        return ""
    return printed.decode("ascii", "replace").strip() if process.returncode == 0 else ""


# ==================================================================================================
# Send
# ==================================================================================================


def endpoint(env: "Env") -> "Tuple[str, str, str, str]":
    """(URL to ask, Authorization or "", URL to print, what decided): README, Contract 6.

    The URL to print has no credentials and no query. What is no http(s) URL is not asked: the
    first is "", and the third says why.
    """
    from base64 import b64encode
    from urllib.parse import unquote_to_bytes, urlsplit
    base = env.get(PREFIX + "API_URL", "")
    url, decided = next((url, decided) for url, decided in (
        (env.get(PREFIX + "SESSION_EVENTS_URL", ""), PREFIX + "SESSION_EVENTS_URL"),
        (base and base.rstrip("/") + ENDPOINT_PATH, PREFIX + "API_URL"),
        (DEFAULT_SERVER + ENDPOINT_PATH, "the default")) if url)
    try:
        parts = urlsplit(url)
        good = (parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
                and "@" not in parts.path and fits(url, "[!-~]{1,4096}"))
    except ValueError:
        good = False
    if not good:
        return "", "", "nowhere: the endpoint is not a http:// or https:// URL", decided
    login, _, host = parts.netloc.rpartition("@")
    bare = "%s://%s%s" % (parts.scheme, host, parts.path or "/")
    return (bare + "?" * bool(parts.query) + parts.query,
            "Basic " + b64encode(unquote_to_bytes(login)).decode() if login else "",
            bare + "?..." * bool(parts.query), decided)


def reason(error: BaseException) -> str:
    """The text of an error, without URLs, and of paths only that they lie in ~/.ashlr."""
    inner = getattr(error, "reason", None)
    error = inner if isinstance(inner, Exception) else error  # urllib wraps
    if isinstance(error, Told):
        return str(error)
    words = ": %s" % error.strerror if isinstance(error, OSError) and error.strerror else ""
    place = " in " + HOME_FOLDER if FOLDER in str(getattr(error, "filename", "")) else ""
    return type(error).__name__ + words + place


def place_of(error: BaseException) -> str:
    """` (in FUNCTION, line N)`: the innermost function of this file that an error passed."""
    file, place, trace = place_of.__code__.co_filename, "", error.__traceback__
    while trace:  # without an import: it would fail where no descriptor is left
        if trace.tb_frame.f_code.co_filename == file:
            place = " (in %s, line %s)" % (trace.tb_frame.f_code.co_name, trace.tb_lineno)
        trace = trace.tb_next
    return place


def poster(url: str, authorization: str) -> "Callable[[bytes], Any]":
    """A function that posts bytes to a URL and returns the answer. It follows no redirect.

    It goes through the environment's proxies, but to this machine itself directly. Told if the
    proxy is of no known kind.
    """
    if sys.platform == "darwin":  # urllib would load _scproxy, which crashes after a fork
        sys.modules["_scproxy"] = stub = type(sys)("_scproxy")
        stub.__dict__.update(_get_proxies=dict, _get_proxy_settings=dict)
    import urllib.request as u
    from urllib.parse import urlsplit
    parts, proxies = urlsplit(url), u.getproxies_environment()
    if parts.hostname in ("127.0.0.1", "localhost", "::1"):
        proxies = {}
    kind, mark, _ = proxies.get(parts.scheme, "").partition("://")
    if mark and kind not in ("http", "https"):
        raise Told("a proxy of an unknown kind")
    director = u.OpenerDirector()
    for way in (u.ProxyHandler(proxies), u.HTTPHandler(), u.HTTPSHandler()):
        director.add_handler(way)
    headers = {"Content-Type": "application/json", "User-Agent": "emit.py"}
    if authorization:
        headers["Authorization"] = authorization
    return lambda data: director.open(u.Request(url, data, headers), timeout=ANSWER_S)


class Sender:
    """Sends waiting events to the endpoint, and records the result for `status`.

    `failed`: how many events were answered and still wait; `stop`: why no more is sent, or "";
    `again`: when the server wants to be asked again, in s since 1970, or 0.0.
    """

    def __init__(self, caller: Caller) -> None:
        self.caller, self.home = caller, caller.home
        self.url, self.authorization, self.shown, _ = endpoint(caller.env)
        self.post: "Any" = None  # made when it is needed: urllib costs more than all else
        self.failed, self.stop, self.again = 0, "" if self.url else self.shown, 0.0
        say(caller, self.stop or "sending to %s, for 20 s at most: if no line follows, time ran out"
            % self.shown)

    def barred(self) -> str:
        """Why nothing may be sent (any more), or ""."""
        again = wishes_at(self.home).get(self.shown)
        wish = "the server asked for nothing before " + iso(again) if again else ""
        return self.stop or consent_refused(self.caller) or wish

    def flush(self, own_name: str) -> None:
        """Send what waits, once no other process of this program is sending.

        A new event of another session gets a second, in which its own child may add the commit.
        `own_name`: of the event that this process captured, or "". Once it was sent in vain, its
        name ends in another way: then it is left to the next session's end.
        """
        try:
            import fcntl
            path = safe_folder(self.home, OURS, make=True) + "flush.lock"
            lock = os.open(path, os.O_RDWR | os.O_CREAT | NO_LINK | SAFELY, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX)  # until this process ends
        except (ImportError, OSError):  # without a lock: the server stores an event only once
            pass
        if any(is_new(name, time.time()) for name in waiting(self.home) if name != own_name):
            time.sleep(COMMIT_S)
        self.round([name for name in waiting(self.home) if name == own_name
                    or (name[:28] != own_name[:28] and not is_new(name, time.time()))])

    def round(self, names: "Sequence[str]") -> None:
        """Send these, in this order, until the server or the person stops it."""
        said: "List[str]" = []
        if self.stop:  # in the round before
            return
        for name in names:
            self.stop = self.barred()
            if self.stop:
                break
            if not said:
                self.record("began, and did not finish (yet)")
            words = quietly(self.send, name)  # None: another process has sent it
            said += [words] if words else []
        counted = ["%d %s" % (said.count(words), words) for words in dict.fromkeys(said)]
        result = ", ".join(filter(None, [*counted, self.stop]))
        if result and not consent_refused(self.caller):
            self.record(result)
        say(self.caller, result or "nothing waits")

    def send(self, name: str) -> str:
        """What happened to a waiting event. OSError if it is not there.

        It is deleted when it has arrived, is given up, or is no event. Before it is sent it moves
        behind the others, so that no event, however it fails, holds them up. An event of another
        version of the program stays as it is.
        """
        path = self.home + PENDING + name
        event = loads_object(contents(path, EVENT_BYTES, NO_LINK))
        if unknown_keys(event):
            return "left to another version of emit.py"
        if not is_event(event):
            remove(path)
            return "removed, being no event"
        later = "%s%s-%d.json" % (self.home + PENDING, name[:28], min(failures(name) + 1, 999))
        os.replace(path, later)
        words, settled = self.attempt(event)
        if settled:
            remove(later)
        return words

    def attempt(self, event: "Json") -> "Tuple[str, bool]":
        """Send one event: (what happened, it has arrived or is given up). It may set `stop`."""
        from http.client import HTTPException
        try:
            self.post = self.post or poster(self.url, self.authorization)
            with self.post(as_sent(event)) as answer:
                status, settled = answer.status, is_settled(answer.status, answer)
        except (OSError, ValueError, HTTPException) as error:
            self.stop = "stopped"
            return "without an answer (%s)" % reason(error), False
        self.again = retry_at(answer.headers.get("Retry-After"), time.time())
        self.failed += not settled
        if self.again or status in (429, 503) or self.failed == FAILED_ANSWERS:
            self.stop = "stopped" + (" until " + iso(self.again) if self.again else "")
        return "answered %d" % status, settled

    def record(self, result: str) -> None:
        """Write the result of sending, for `status`, and the server's Retry-After, if any."""
        import json
        wishes = wishes_at(self.home)
        if self.again:
            wishes[self.shown] = self.again
        last = {"at": iso(time.time()), "result": result, "retry_at": wishes}
        # A full disk must not stop the sending.
        quietly(write_whole, self.home + LAST, json.dumps(last).encode())


def wishes_at(home: str) -> "Dict[str, float]":
    """{endpoint: when it may be asked again}. A time over a day ahead came from a wrong clock."""
    kept, now = object_at(home + LAST).get("retry_at"), time.time()
    wishes = kept.items() if isinstance(kept, dict) else ()
    return {shown: at for shown, at in wishes if type(at) is float and 0 < at - now <= DAY_S}


# ==================================================================================================
# The end of a session
# ==================================================================================================


def hook(caller: Caller) -> int:
    """The end of a session.

    The process that the caller waits for asks for consent, reads the input and forks. The child
    captures, reports that through a pipe, and goes on alone. So a signal to the caller's process
    group, or a kill of the parent, does not interrupt the writing.
    """
    # The caller also waits for the child's capture, hashlib included: about one bare start of wall
    # time. In return the event is on the disk before the hook returns.
    begun, off = time.monotonic(), consent_refused(caller)
    if off:
        return say(caller, off)
    caller.listen(standard_input())
    wait = wait_of(caller.env, caller.flags)
    child, pipe = fork()
    if child <= 0:
        end(caller, wait, pipe, LIFE_S if child == 0 else wait or WAIT_S)
    elif os.read(pipe, 1) and wait:
        from select import select
        select([pipe], [], [], max(0.0, wait - (time.monotonic() - begun)))
    return 0


def fork() -> "Tuple[int, int]":
    """(child's pid, 0 in the child, end of a pipe); (-1, /dev/null) where no process can be had.

    The child is in a session of its own: signals to the host's process group do not reach it, nor
    does a terminal that closes. It writes a byte into the pipe when the event is in the spool, and
    closes it when the event is answered.
    """
    null = 0
    while null < 3:  # the pipe must not get a number that the caller closed
        null = os.open(os.devnull, os.O_RDWR)
    try:
        ours, theirs = os.pipe()
        child = os.fork()
    except (AttributeError, OSError):
        return -1, null
    os.close(theirs if child else ours)  # the child may need that descriptor: there may be few
    if child:
        return child, ours
    os.setsid()
    return child, theirs


def end(caller: Caller, wait: float, pipe: int, life: float) -> None:
    """Capture, release the caller, then add the commit, sync and send.

    `wait`: seconds that the caller stays for the answer; `pipe`: to it; `life`: seconds that this
    process goes on after the capture.
    """
    home, path = caller.home, ""
    part, event = close_part(caller, machine_id(home))
    result = "captured" if part else "nothing new since this session's last end, so no event"
    try:
        path = keep(home, part, event) if part else ""
    except OSError as error:
        result += ", but not kept (%s)" % reason(error)
    let_go(pipe, caller.debug)
    from threading import Timer
    Timer(life, leave, [home]).start()
    # Only now: writing to a standard error that nobody reads may block for ever.
    say(caller, "consent is on")
    say(caller, result)
    if part:
        event["branch_sha"] = branch_sha(caller.project)
    if part and path:  # without room, the event waits without its commit
        quietly(secure, home, caller.session, part, event, path)
    if consent_refused(caller):  # meanwhile
        return
    try:
        sender, own_name = Sender(caller), os.path.basename(path)
        if part and not path:
            said = sender.barred() or "1 " + sender.attempt(event)[0]
            say(caller, "the event that is not kept: " + said)
        elif path and wait:  # the caller stays for this one, so it is sent before the others
            sender.round([own_name])
        os.close(pipe)
        if not consent_refused(caller):
            sweep(caller)
            sender.flush(own_name)
    finally:
        expire(home, time.time())


def secure(home: str, session: str, part: Part, event: "Json", path: str) -> None:
    """Add the commit to a waiting event, and ask the disk to keep it through a power cut."""
    if event["branch_sha"] and os.path.exists(path):
        write_whole(path, as_sent(event))
    for kept in (path, os.path.dirname(path), home + FOLDER + "machine-id"):
        quietly(sync, kept)
    append(home, session, ["kept " + part.token])


def let_go(pipe: int, keep_errors: bool) -> None:
    """Release the caller, and its working folder and descriptors, but the pipe."""
    quietly(os.write, pipe, b".")  # the caller may have been killed
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1) if keep_errors else (0, 1, 2):
        os.dup2(null, fd)
    os.closerange(3, pipe)
    os.closerange(pipe + 1, 1 << 16)


def leave(home: str) -> None:
    """End this process when its time is over, also in a name look-up, which has no time limit."""
    try:
        expire(home, time.time())
    finally:
        os._exit(0)


def say(caller: Caller, text: str) -> int:
    """A line for ASHLR_TELEMETRY_DEBUG: no hash, path or credential. A hook's exit status."""
    return to_stderr(text) if caller.debug else 0


# ==================================================================================================
# Hooks: what a host's configuration has to say
# ==================================================================================================

START = "import sys; sys.path.insert(0, sys.argv.pop(1)); import %s; %s.run()"
CLAUDE_EVENTS = (("SessionEnd", ""), ("PostToolUse", " track"), ("PostToolUseFailure", " track"))
# For each host: its events, with what each adds to the command; where the text goes, and a remark.
HOSTS: "Dict[str, Tuple[Sequence[Tuple[str, str]], str]]" = {
    "claude": (CLAUDE_EVENTS, "~/.claude/settings.json, or a plugin's hooks/hooks.json. "
               "Claude Code ends its session-end hooks after 1.5 s."),
    "codex": (CLAUDE_EVENTS[:2], "~/.codex/hooks.json. Codex asks in its terminal whether to trust "
              "hooks. Until then, and so in `codex exec`, it skips them without a word. A daemon "
              "ends a session a minute after its terminal is left, and knows only the variables "
              "that stood when it started: consent by `emit.py on`."),
    "copilot": (CLAUDE_EVENTS, "~/.copilot/hooks/session-events.json. The names of the events "
                "stay in PascalCase: with others Copilot hands over other keys."),
    "gemini": ((("SessionEnd", ""), ("AfterTool", " track")), "~/.gemini/settings.json. Gemini's "
               "event after a tool is AfterTool; it warns of PostToolUse."),
    "qwen": (CLAUDE_EVENTS, "~/.qwen/settings.json. `qwen -p` fires no SessionEnd: what it did is "
             "sent a day later, when another session ends."),
    "opencode": ((), "~/.config/opencode/plugin/session-events.js. It is a plugin: opencode has no "
                 "shell hooks."),
}

OPENCODE = """\
import { spawnSync } from "node:child_process"

const command = %s

export const SessionEvents = async ({ directory }) => {
  const sessions = new Set()
  const parents = new Map()  // of the sessions that opencode makes for subagents
  const counted = new Set()  // calls, since opencode tells of most of them twice
  const run = (more, input) =>
    spawnSync(command[0], [...command.slice(1), ...more], {
      input: JSON.stringify({ cwd: directory, ...input }), stdio: ["pipe", "ignore", "inherit"] })
  const begin = (id) => {
    while (parents.has(id)) id = parents.get(id)
    sessions.add(id)
    return id
  }
  const track = (call, args) => {
    const session = begin(call.sessionID)
    if (!counted.has(call.callID)) run(["track"], { session_id: session, tool_input: args })
    if (call.callID) counted.add(call.callID)
  }
  const end = () => {
    for (const id of sessions) run([], { session_id: id })
    sessions.clear()
  }
  process.on("exit", end)
  for (const [signal, number] of [["SIGHUP", 1], ["SIGINT", 2], ["SIGTERM", 15]])
    process.on(signal, () => { end(); process.exit(128 + number) })
  return {
    event: async ({ event: { type, properties } }) => {
      const { id, parentID } = (type === "session.created" && properties?.info) || {}
      if (parentID) parents.set(id, parentID)
    },
    "chat.message": async (message) => { begin(message.sessionID) },
    // A call that fails has no tool.execute.after.
    "tool.execute.before": async (call, { args }) => track(call, args),
    "tool.execute.after": async (call, result) => track(call, call.args ?? result?.args),
    dispose: async () => end(),
  }
}
"""


def hooks(caller: Caller) -> int:
    """Print the configuration of a host, and on standard error where it goes."""
    import json
    from shlex import quote
    if caller.words[0] not in HOSTS:
        return to_stderr("no such host; there are " + ", ".join(HOSTS), 2)
    events, where = HOSTS[caller.words[0]]
    folder, name = os.path.split(decoded(os.fsencode(FILE)))
    module = os.path.splitext(name)[0]
    if not module.isidentifier():
        return to_stderr("Python can import no file of this name: call it emit.py", 1)
    python, shell_folder = sys.executable or "python3", quote(folder)
    if "--folder" in caller.flags:  # printed as it stands: the host or its shell expands it
        python, folder = "python3", caller.flags["--folder"][-1]
        shell_folder = folder if '"' in folder or "'" in folder else '"%s"' % folder
    if folder[:1] == "~" or not (events or os.path.isabs(folder)):
        return to_stderr("--folder: nothing expands this; give an absolute folder, or $HOME/... "
                         "for a host with shell hooks", 2)
    code = START % (module, module)
    if not events:
        print(OPENCODE % json.dumps([python, "-I", "-S", "-c", code, folder], indent=2), end="")
    else:
        start = '%s -I -S -c "%s" %s' % (quote(python), code, shell_folder)
        entries = {event: [{"hooks": [{"type": "command", "command": start + more}]}]
                   for event, more in events}
        print(json.dumps({"hooks": entries}, indent=2))
    return to_stderr("goes to %s Keep what is there already. Set no `timeout`: its unit differs."
                     % where)


# ==================================================================================================
# Commands
# ==================================================================================================


def show(caller: Caller) -> int:
    """Print the event as it would be sent now; on standard error where to, and what is not real."""
    refused = consent_refused(caller, delete=False)
    caller.listen(standard_input())
    known = machine_id(caller.home, make=False)
    event = close_part(caller, known or random_uuid(), written=False)[1]
    if event:
        event["branch_sha"] = None if refused else branch_sha(caller.project)
        print(as_sent(event).decode())
    else:
        to_stderr("no event: nothing is new since this session's last end")
    to_stderr("goes to: " + endpoint(caller.env)[2])
    if refused:
        to_stderr("but nothing is sent, nor git asked for the commit: " + refused)
    if not known:
        to_stderr("there is no machine-id yet: the identity_hash shown is made up")
    return 0


def obstacle(home: str, allowed: bool) -> "Optional[str]":
    """Why nothing can be captured, or None. With consent it tries to write."""
    try:
        machine_id(home, make=False)
        for folder in (FOLDER, PENDING, SESSIONS) if allowed else ():
            probe = "%s.%s.tmp" % (safe_folder(home, folder, make=True), os.urandom(8).hex())
            write_whole(probe, b"x" * 4096)
            remove(probe)
    except (OSError, ValueError) as error:
        return "%s cannot be used: %s" % (HOME_FOLDER, reason(error))
    return None


def status(caller: Caller) -> int:
    """Print consent, endpoint, what waits and the last result, as text or (--json) as JSON."""
    import json
    home = caller.home
    allowed, why = consent(caller.env, telemetry_said(home))
    names, last, fault = waiting(home), object_at(home + LAST), obstacle(home, allowed)
    _, _, url, chosen_by = endpoint(caller.env)
    again = wishes_at(home).get(url)
    report: "Json" = {
        "consent": "on" if allowed else "off", "decided_by": why,
        "capture": "impossible: " + fault if fault else "possible",
        "endpoint": url, "chosen_by": chosen_by,
        "waiting": len(names), "since": iso(int(min(names)[:15]) / 1000) if names else None,
        "last_run": last.get("at"), "result": last.get("result"),
        "retry_at": iso(again) if again else None,
    }
    if "--json" in caller.flags:
        print(json.dumps(report))
    else:
        for name, value in report.items():
            if value is not None:
                print("%-11s%s" % (name.replace("_", " "), ascii(str(value))[1:-1]))
    return 1 if fault else 0


def mine(caller: Caller) -> int:
    """Print this machine's hashes of each quarter since machine-id was made, newest last."""
    home = caller.home
    machine = machine_id(home, make=False)
    if not machine:
        return to_stderr("there is no machine-id, so nothing was ever captured here", 1)
    login = github_login(object_at(home + FOLDER + "pro-token-cache.json"))
    now = time.time()
    written = os.stat(home + FOLDER + "machine-id").st_mtime
    made = min(now, max(written, 1577836800.0))  # from 2020 on
    days = range(int(made // DAY_S), int(now // DAY_S) + 1)
    for quarter in dict.fromkeys(salt(day * DAY_S) for day in days):
        print("%s identity_hash %s%s" % (quarter[5:], sha256_hex(machine + quarter),
              " github_hash " + sha256_hex(login + quarter) if login else ""))
    return 0


def on(caller: Caller) -> int:
    """Give consent."""
    changed = switch(caller.home, "opt-in")
    print(COLLECTED % endpoint(caller.env)[2] if changed else "on, as before")
    allowed, why = consent(caller.env, "opt-in")
    return 0 if allowed else to_stderr("but still off here: " + why)


def off(caller: Caller) -> int:
    """Refuse consent, and delete what waits."""
    gone = purge(caller.home)
    switch(caller.home, "off")
    gone += purge(caller.home)  # once more: a session may have ended meanwhile
    print("off: nothing is collected or sent any more; files deleted: %d" % gone)
    return 0


def switch(home: str, value: str) -> bool:
    """Set "telemetry" in config.json and keep all else in it; True if that changed it."""
    import json
    path, mode = os.path.realpath(home + FOLDER + "config.json"), 0o600
    config: "Json" = {}
    try:
        if os.path.lexists(path):
            config, mode = dict(loads(contents(path)).items()), os.stat(path).st_mode & 0o777
        data = json.dumps(dict(config, telemetry=value), indent=2, allow_nan=False).encode() + b"\n"
    except (ValueError, AttributeError, RecursionError):
        word = "off" if value == "off" else "on"
        raise Told("%s/config.json is not a JSON object, and is left alone: mend it, or set "
                   "%sTELEMETRY=%s" % (HOME_FOLDER, PREFIX, word)) from None
    if config.get("telemetry") == value:
        return False
    safe_folder(home, FOLDER, make=True)
    write_whole(path, data, mode)
    quietly(sync, path)
    return True


def usage(caller: Caller) -> int:
    """Print what stands at the head of this file."""
    print((__doc__ or "").replace("~/.ashlr", HOME_FOLDER).replace("ASHLR_", PREFIX))
    return 0


def version(caller: Caller) -> int:
    """Print the version."""
    print("emit.py " + VERSION)
    return 0


# For each command: its function, the flags that it takes, and the number of other words.
COMMANDS: "Dict[str, Tuple[Callable[[Caller], int], str, Optional[int]]]" = {
    "": (hook, "--dir --wait", 0),
    "track": (track, "--dir DIR --discoveries DIR REF", None),
    "show": (show, "--dir DIR", 0),
    "status": (status, "--json", 0),
    "mine": (mine, "", 0),
    "hooks": (hooks, "HOST --folder TEXT", 1),
    "on": (on, "", 0),
    "off": (off, "", 0),
    "--help": (usage, "", 0),
    "-h": (usage, "", 0),
    "--version": (version, "", 0),
}


def to_stderr(text: str, code: int = 0) -> int:
    """Write one line to standard error, and return `code`."""
    if sys.stderr:  # None, or broken, where the caller closed it
        quietly(lambda: print("emit.py: %s\n" % text, end="", file=sys.stderr, flush=True))
    return code


def main(argv: "Sequence[str]") -> int:
    """Run a command line; its exit status. A hook run never fails, and says why if it is asked."""
    os.umask(0o077)
    asked = [flag for flag in ("--help", "-h", "--version") if flag in argv]
    name, *rest = asked[:1] or (argv if argv and argv[0][:1] != "-" else ["", *argv])
    if name not in COMMANDS:
        return to_stderr("no such command; see emit.py --help", 2)
    function, takes, number = COMMANDS[name]
    caller = Caller(*parsed(rest))
    is_hook = not name or (name == "track" and not caller.words)
    misused = number not in (None, len(caller.words)) or set(caller.flags) - set(takes.split())
    if misused and (not is_hook or os.isatty(0)):  # at a terminal it is a person's slip
        return to_stderr("%s takes %s; see emit.py --help" % (
            name or "emit.py", takes or "nothing"), 2)
    try:
        caller.env = environment(os.environ)
        caller.debug = caller.env.get(PREFIX + "TELEMETRY_DEBUG", "") not in ("", "0")
        if misused:
            say(caller, "arguments ignored: see --help")
        return function(caller)
    except BaseException as error:
        if is_hook:
            return say(caller, "failed: " + reason(error) + place_of(error))
        done = "recorded" if name == "track" else "done"
        return to_stderr("could not be %s: %s" % (done, reason(error)), 1)


def run() -> None:
    """`main`, then leave the process at once, without the interpreter's clean-up."""
    if os.path.dirname(os.path.realpath(__file__)) in map(os.path.realpath, sys.path[:1]):
        del sys.path[0]  # a json.py beside this file must not be used
    code = main(sys.argv[1:])
    try:
        if sys.stdout:  # None where the caller closed it
            sys.stdout.flush()
    except OSError as error:  # a full disk, or nobody reads
        code = to_stderr("could not be printed: " + reason(error), 1)
    os._exit(code)


if __name__ == "__main__":
    run()
