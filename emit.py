#!/usr/bin/env python3
"""emit.py says that a coding session ended, and what shape it had, and only after a yes.

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
nothing on standard output, and exits 0. The event is on the disk before the caller is let go. The
sender goes on alone, for 20 s at the most. What cannot be sent waits in
~/.ashlr/session-events/pending/ (at most 500 events, 30 days) for the next session's end.
--wait stays until the event is answered, MS milliseconds (500) at the most; in CI and in containers
that is the default. ASHLR_SESSION_EVENTS_WAIT=MS decides otherwise (0: never).
--discoveries names a folder below the project whose files count as discoveries.
ASHLR_TELEMETRY_DEBUG=1 says on standard error what a hook run did.
Exit status: 0 done, 1 could not be done, 2 wrong usage (commands only).
"""
# A host waits for each start, so a start imports no more than its path needs. Of a bare start
# (-I -S) os costs 0.2 to 0.3, json 0.9, re 0.7, hashlib 0.4, subprocess and urllib.request more
# than 1. So imports stand in functions, and leaving by os._exit, which wins 0.15, is worth a line.
import os
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, List, Optional, Sequence, Set, Tuple

    Words = Dict[str, List[str]]  # the values of each flag of a command line
    Post = Callable[[bytes], Tuple[int, Optional[str], bytes]]  # to status, Retry-After, body

# The one line that another plugin changes. The folder in the home, the prefix of the variables and
# the default place of discoveries follow it.
PRODUCT = "ashlr"
HOME_FOLDER = "~/." + PRODUCT
PREFIX = PRODUCT.upper().replace("-", "_") + "_"
DISCOVERIES = "." + PRODUCT + "code/genome/sections/discoveries"

VERSION = "2.0.0"
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
RULES: "Dict[str, Any]" = {name: rule for name, _, _, rule in FIELDS}
REF = RULES["discovery_refs"][1]
EVENT_BYTES = 65536

# Where hosts keep what the event needs (measured; README, Contract 4).
SESSION_KEYS = ("session_id", "sessionId", "sessionID", "conversation_id")
SESSION_VARIABLES = ("CLAUDE_SESSION_ID", "CLAUDE_CODE_SESSION_ID", "GEMINI_SESSION_ID",
                     "QWEN_CODE_SESSION_ID")
PROJECT_KEYS = ("cwd", "directory")
INPUT_KEYS = ("tool_input", "toolArgs", "args")
PATH_KEYS = ("file_path", "filePath", "absolute_path", "notebook_path", "path")

# Where the home probably ends with the session: CI services and containers say so.
PASSING_VARIABLES = ("CI", "KUBERNETES_SERVICE_HOST", "container", "TF_BUILD", "JENKINS_URL")
PASSING_FILES = ("/.dockerenv", "/run/.containerenv")

LIFE_S = 20.0  # of the sender, whatever the network does
WAIT_S = 0.5  # for the answer, where the home may end with the session
INPUT_FIRST_S, INPUT_REST_S = 0.25, 1.0  # for the hook's JSON to begin, and to end
PROGRAM_S = 0.25  # for git, and for ps
ANSWER_S = 10.0  # for each step of one request
COMMIT_S = 1.0  # that other senders leave to a session's own child to add the commit
FAILED_ANSWERS = 10  # in one run, before the server is left in peace: a few may be about one event
DAY_S = 86400.0  # the longest Retry-After that is believed; silence after which a session has ended
WAITING_EVENTS, WAITING_DAYS = 500, 30
SESSION_DAYS = 90  # that a session's file is kept after its last line: hosts continue none after 30
LEFTOVER_S = 3600.0  # before a file that a kill left half-written goes
FILE_BYTES = 1 << 26  # more than any host or plugin writes
SESSION_BYTES = 1 << 21  # of a session's file; half of it for calls, 50,000

HOME = "/." + PRODUCT + "/"
OURS = HOME + "session-events/"
PENDING, SESSIONS, LAST = OURS + "pending/", OURS + "sessions/", OURS + "last.json"

# No waiting for a pipe that stands where a file should, no text mode, nothing left to children.
SAFELY = sum(getattr(os, flag, 0) for flag in ("O_NONBLOCK", "O_BINARY", "O_CLOEXEC"))
NO_LINK = getattr(os, "O_NOFOLLOW", 0)

# What this program names its files: those that wait, those of sessions, those not whole yet.
EVENT_NAME = "[0-9]{15}-[0-9a-f]{12}(-[0-9]{1,3})?[.]json"
SESSION_NAME = "([0-9a-f]{2}){1,120}|long-[0-9a-f]{64}"
LEFTOVER_NAME = "[.][0-9a-f]{16}[.]tmp"

UNCLEAR = object()  # what a config.json says that cannot be read
UNREADABLE = HOME_FOLDER + "/config.json cannot be read, and nobody else said yes"

COLLECTED = """\
Collected when a session ends: the time, tool calls and tokens saved, commit, discoveries, version.
Never: names, paths, code, prompts. Machine, login and session are one-way hashes; the first two
change every quarter. It goes to %s.
To stop: emit.py off (also deletes what waits). To see an event before it goes: emit.py show."""


class Told(ValueError):
    """An error in this file's own words, which may be printed. Others' may hold a path."""


# ==================================================================================================
# Consent
# ==================================================================================================


def consent(env: "Dict[str, str]", said: "Any") -> "Tuple[bool, str]":
    """(may it be sent, what decided): README, Contract 5. `said`: "telemetry" of config.json."""
    asked = env.get(PREFIX + "TELEMETRY", "").strip().lower()
    for decides, allowed, why in (
        (env.get("DO_NOT_TRACK", "").strip() not in ("", "0"), False, "DO_NOT_TRACK is set"),
        (asked in ("off", "0"), False, PREFIX + "TELEMETRY says off"),
        (said == "off", False, HOME_FOLDER + "/config.json says off"),
        (asked in ("on", "1"), True, PREFIX + "TELEMETRY says on"),
        (said == "opt-in", True, HOME_FOLDER + "/config.json says opt-in"),
        (said is UNCLEAR, False, UNREADABLE),
    ):
        if decides:
            return allowed, why
    return False, "nobody said yes (emit.py on does)"


def telemetry_said(home: str) -> "Any":
    """"telemetry" of config.json; None if there is none, UNCLEAR if the file cannot be read."""
    try:
        return loads(contents(home + HOME + "config.json")).get("telemetry")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, AttributeError):
        return UNCLEAR


def withdrawn(home: str, env: "Dict[str, str]") -> str:
    """"" with consent, or why it is off. What waits is deleted then.

    A config.json that cannot be read is no reason to delete anything.
    """
    allowed, why = consent(env, telemetry_said(home))
    if allowed:
        return ""
    if why != UNREADABLE:
        purge(home)
    return "consent is off: " + why


# ==================================================================================================
# Hosts: what they hand over, as input, arguments and environment
# ==================================================================================================

BLANKS = " \t\n\r"
ESCAPES = ("\\\\", '\\"', "\\n", "\\t", "\\r", "\\/")
MEANINGS = dict(enumerate('\\"\n\t\r/'))
CONSTANTS = {"true": True, "false": False, "null": None}


def loads(data: bytes) -> "Any":
    """`json.loads` of UTF-8 text, with NaN and numbers of thousands of digits as errors.

    What is short and plain is read by `quick_json`, which spares the import of json. ValueError for
    anything that is not JSON.
    """
    text = (data[3:] if data[:3] == b"\xef\xbb\xbf" else data).decode().strip(BLANKS)
    try:
        return quick_json(text)
    except (ValueError, IndexError, RecursionError):
        import json
    try:
        return json.loads(text, parse_constant=short_int, parse_int=short_int)
    except RecursionError:
        raise ValueError("not JSON") from None


def quick_json(text: str) -> "Any":
    """The value of a JSON text, 0.9 of a bare start cheaper than with json.

    It knows the usual: objects, arrays, whole numbers, printable text without \\u. Any error means
    that json must decide. A test holds the two to the same values.
    """
    if text.count('"') > 5000 or len(text) > 1 << 20 or not text.replace("\n", "").isprintable():
        raise ValueError("for json")
    for code, escape in enumerate(ESCAPES):
        text = text.replace(escape, chr(code))
    tokens: "List[str]" = []  # marks, words, and strings, which begin with a quote
    within = False
    for piece in text.split('"'):
        if not within:
            for mark in "{}[],:":
                piece = piece.replace(mark, " %s " % mark)
            tokens += piece.split()
        elif "\n" in piece or "\\" in piece:
            raise ValueError("for json")
        else:
            tokens.append('"' + piece.translate(MEANINGS))
        within = not within
    tokens.reverse()
    value = next_value(tokens)
    if tokens or not within:
        raise ValueError("for json")
    return value


def next_value(tokens: "List[str]") -> "Any":
    """Take the tokens of one JSON value off the end of a list. Any error: json must decide."""
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
    return dict(values) if close == "}" else values


def short_int(digits: str) -> int:
    """A whole number of a JSON text. ValueError for thousands of digits, whose cost is squared."""
    if len(digits) > 4300:  # as in Python itself, but only since 3.11
        raise ValueError("too many digits")
    return int(digits)


def loads_object(data: bytes) -> "Dict[str, Any]":
    """The JSON object in `data`, {} for whatever else may be there."""
    try:
        value = loads(data) if data else None
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {}


def standard_input() -> bytes:
    """What the host wrote on standard input, as far as it came in time; b"" for a terminal."""
    from select import select
    data, until = bytearray(), time.monotonic() + INPUT_FIRST_S
    try:
        while not os.isatty(0) and len(data) <= FILE_BYTES:
            try:
                ready = select([0], [], [], max(0.0, until - time.monotonic()))[0]
            except OSError:  # Windows knows sockets only; the read waits there
                ready = [0]
            piece = os.read(0, 65536) if ready else b""
            if not piece:
                break
            until = until if data else time.monotonic() + INPUT_REST_S
            data += piece
    except OSError:  # closed
        pass
    return bytes(data)


def environment() -> "Dict[str, str]":
    """The environment as text, UTF-8 whatever the locale."""
    if not os.supports_bytes_environ:
        return dict(os.environ)
    return {decoded(name): decoded(value) for name, value in os.environb.items()}


def decoded(data: bytes) -> str:
    """The text of UTF-8, whatever the bytes: `encoded` gives them back."""
    return data.decode("utf-8", "surrogateescape")


def encoded(text: str) -> bytes:
    """UTF-8, whatever the text. As a path it does not depend on the locale, which hosts drop."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


def home_of(env: "Dict[str, str]") -> str:
    """The person's folder. Told without one: a project's folder must not speak for a person."""
    path = os.path.expanduser("~")
    if env.get("HOME") == "" or not os.path.isabs(path):
        raise Told("there is no home folder: set HOME")
    return path


def parsed(argv: "Sequence[str]") -> "Tuple[Words, List[str]]":
    """({flag: its values}, the other words). A flag whose value is missing is such a word."""
    given: "Words" = {}
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
        given.setdefault(word, []).append(value)
    return given, words


def wait_of(env: "Dict[str, str]", given: "Words") -> float:
    """How many seconds the hook stays for the answer: as asked, or for a home that passes."""
    asked = given.get("--wait", [env.get(PREFIX + "SESSION_EVENTS_WAIT", "").strip()])[-1]
    if asked.isdecimal():
        return min(int(asked[:9]) / 1000, LIFE_S)
    said = [env.get(name, "").strip().lower() for name in PASSING_VARIABLES]
    passing = any(word not in ("", "0", "false") for word in said)
    return WAIT_S if passing or any(map(os.path.exists, PASSING_FILES)) else 0.0


def first_text(found: "Dict[str, Any]", names: "Sequence[str]") -> str:
    """The first of the named members that is text and not blank, or ""."""
    values = [found.get(name) for name in names]
    return next((value for value in values if isinstance(value, str) and value.strip()), "")


class Caller:
    """What the event owes to the process that ran the hook, and what the host told it.

    `env`, `home`; `hook`: the host's JSON, {} if none; `session`: the raw id as the host gave it,
    "" if it gave none; `ppid`; `base`: where relative paths of the tool start; `project`. Both are
    absolute.
    """

    def __init__(self, env: "Dict[str, str]", given: "Words", data: bytes) -> None:
        """`given`: with --dir or without; `data`: from standard input."""
        self.env, self.home, self.hook = env, home_of(env), loads_object(data)
        named = {name: env.get(name, "").strip() for name in SESSION_VARIABLES}
        self.session = first_text(self.hook, SESSION_KEYS) or first_text(named, SESSION_VARIABLES)
        self.ppid = os.getppid()
        roots = self.hook.get("workspace_roots")
        told = first_text(self.hook, PROJECT_KEYS)
        if not told and isinstance(roots, list) and roots and isinstance(roots[0], str):
            told = roots[0]
        try:
            here = decoded(os.getcwdb())
        except OSError:  # deleted
            here = "/"
        wanted = given.get("--dir", [env.get("CLAUDE_PROJECT_DIR", "").strip()])[-1] or told
        self.base, self.project = os.path.join(here, told), os.path.join(here, wanted)

    def session_id(self, machine: str) -> str:
        """The host's, or one made of the parent process (README, Contract 4)."""
        return self.session or "ppid:%d:%s:%s" % (self.ppid, parent_started(self.ppid), machine)


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


def github_login(cache: "Dict[str, Any]") -> str:
    """The login in pro-token-cache.json, trimmed, or "": never guessed."""
    return first_text(cache, ["githubLogin"]).strip() if cache.get("valid") is True else ""


# ==================================================================================================
# Session: its file, its parts, its counts, its discoveries (pure)
# ==================================================================================================
#
# While a session runs, its file is all the state there is. Its name is the raw session id in hex.
# Every process appends whole lines to it in one write, and nobody rewrites it:
#
#   call MS                           a tool call; MS since 1970
#   touch MS REF                      a discovery that was touched
#   end MS TOKEN CALLS TOKENS         an end: what stats.json said then (CALLS - without a bucket)
#   kept TOKEN                        the event of that end is on the disk
#   settled                           a day of silence later: all above is told
#
# Ends at the same time each append a line. The order of the lines decides: an end has what stands
# between it and the end before, and one that has nothing new is a repeat. Everybody who reads the
# file comes to the same parts, so a part whose event was lost by a kill can be made again.


class Part:
    """What one end brought: `token` of its line, `ended` in ms, `number` from 1, and the shape."""

    def __init__(self, token: str, ended: int, number: int, calls: int, tokens: int,
                 refs: "List[str]") -> None:
        self.token, self.ended, self.number = token, ended, number
        self.calls, self.tokens, self.refs = calls, tokens, refs


class Record:
    """What a session's file says. Lines that nobody here writes say nothing.

    `parts`; `kept`: tokens; since the last end: `calls`, `refs`; `last`: ms of the last call or
    touch.
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
                    self.last = number(words[0])
                    self.calls += 1
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


def end_line(ended: int, token: str, calls: "Optional[int]", tokens: int) -> str:
    """The line that an end appends."""
    return "end %d %s %s %d" % (ended, token, "-" if calls is None else calls, tokens)


def part_of(token: str, data: bytes) -> "Optional[Part]":
    """The part of an end in a session's file; None if that end brought nothing new."""
    return next((part for part in Record(data).parts if part.token == token), None)


def stats_bucket(ppid: int, home: str) -> str:
    """The name that stats.json gives to a parent process (README, Contract 4)."""
    units = ("ppid:%d:%s" % (ppid, home)).encode("utf-16-le", "surrogatepass")
    h = 0
    for low, high in zip(units[::2], units[1::2]):
        h = (h * 31 + low + 256 * high) & 0xFFFFFFFF
    return "p%x" % h


def counts(stats: "Dict[str, Any]", project: "Dict[str, Any]", ids: "Sequence[str]",
           now: float) -> "Tuple[Optional[int], int]":
    """(calls, tokens saved) over this session's buckets of stats.json, each once.

    Calls are None without a bucket. `project`: last-project.json; `ids`: the session's raw id, its
    parent's bucket; `now`: seconds since 1970 (README, Contract 4).
    """
    mine = set(ids)
    try:
        if 0 <= now - instant(project.get("updatedAt")) <= DAY_S:
            mine.add(first_text(project, ["sessionId"]).strip())
    except ValueError:
        pass
    sessions = stats.get("sessions") if stats.get("schemaVersion", 2) == 2 else None
    found = [sessions.get(name) for name in mine if name] if isinstance(sessions, dict) else []
    buckets = [bucket for bucket in found if isinstance(bucket, dict)]
    calls, tokens = (sum(whole(bucket.get(name)) for bucket in buckets)
                     for name in ("calls", "tokensSaved"))
    return calls if buckets else None, tokens


def whole(value: "Any") -> int:
    """A number of a bucket, floored, 10**9 at most; 0 for one below 0, and for what is none."""
    return int(min(value, 1e9)) if type(value) in (int, float) and value >= 0 else 0


def touched_refs(tool: "Any", base: str, project: str, folders: "Sequence[str]") -> "List[str]":
    """The discoveries that a tool's input touched. `folders`: where they are, below the project.

    A path counts when it lies in one of the folders, by its name or by the disk's links; a shell
    command when it mentions the last two names of a folder and a file.
    """
    if isinstance(tool, str):  # one host hands over the input as JSON text
        tool = loads_object(encoded(tool))
    tool = tool if isinstance(tool, dict) else {}
    command = tool.get("command")
    if isinstance(command, list):
        command = " ".join(word for word in command if isinstance(word, str))
    found: "List[str]" = []
    for folder in folders:
        if not folder.strip("./\\"):  # every file would be a discovery
            continue
        for path in map(tool.get, PATH_KEYS):
            if not isinstance(path, str) or "\0" in path:
                continue
            ref = touched_ref(path, base, project, folder)
            if not ref and os.path.basename(folder.rstrip("/")) in path:
                # The same folder by another way: on a Mac, /tmp is /private/tmp.
                ref = touched_ref(real_path(base, path), "/", real_path(project, ""), folder)
            found.append(ref)
        if isinstance(command, str):
            found += mentioned_refs(command, folder)
    return newest_refs(found)


def real_path(base: str, path: str) -> str:
    """A path without the disk's symbolic links."""
    return decoded(os.path.realpath(encoded(os.path.join(base, path))))


def touched_ref(path: str, base: str, project: str, folder: str) -> str:
    """The discovery that a path stands for, "" if it lies elsewhere. No disk is asked.

    `base`: the absolute folder that a relative path starts from. On Windows case is no difference.
    """
    at = os.path
    inside = at.normcase(at.normpath(at.join(project, folder))) + os.sep
    path = at.normpath(at.join(base, path))
    stem = at.splitext(at.basename(path))[0]
    return stem if at.normcase(path).startswith(inside) and fits(stem, REF) else ""


def mentioned_refs(command: str, folder: str) -> "List[str]":
    """The discoveries that a shell command mentions as `…/sections/discoveries/NAME`."""
    text = command.replace("\\", "/")
    mark = "/".join(folder.replace("\\", "/").strip("/").split("/")[-2:]) + "/"
    if mark not in text:
        return []
    import re  # `x-sections/…` is another folder
    names = re.findall(r"(?<![\w.-])%s([\w.:/-]*)" % re.escape(mark), text, re.ASCII)
    return [touched_ref(name, "/x/y", "/x", "y") for name in names]


def newest_refs(refs: "Sequence[str]") -> "List[str]":
    """The slugs among them in order of first touch, without repeats, the newest 200."""
    slugs = [ref for ref in dict.fromkeys(refs) if ref and fits(ref, REF)]
    return slugs[-RULES["discovery_refs"][0]:]


# ==================================================================================================
# Payload (pure)
# ==================================================================================================


def fits(text: "Any", pattern: str) -> bool:
    """True if all of a text matches. (`re` costs 0.7 of a bare start: not for every call.)"""
    import re
    return isinstance(text, str) and re.fullmatch(pattern, text) is not None


def iso(seconds: float) -> str:
    """`2026-05-22T12:34:56.000Z`, from seconds since 1970."""
    ms = int(seconds * 1000 + 0.01)  # what a float lost
    return "%04d-%02d-%02dT%02d:%02d:%02d" % time.gmtime(ms // 1000)[:6] + ".%03dZ" % (ms % 1000)


MOMENT = (r"([0-9]{4})-([0-9]{2})-([0-9]{2})T([0-9]{2}):([0-9]{2}):([0-9]{2})([.][0-9]+)?"
          r"(?:Z|([+-])([01][0-9]|2[0-3]):([0-5][0-9]))?")


def instant(text: "Any") -> float:
    """Seconds since 1970 of an ISO 8601 date and time (README, Contract 1), or ValueError."""
    if not isinstance(text, str):
        raise ValueError("no text")
    import re
    from datetime import datetime
    found = re.fullmatch(MOMENT, text)
    if not found:
        raise ValueError("no date and time")
    *date, fraction, sign, hours, minutes = found.groups("0")
    year, month, day, hour, minute, second = map(int, date)
    moment = datetime(year, month, day, hour, minute, second) - datetime(1970, 1, 1)
    east = int(sign + "60") * (60 * int(hours) + int(minutes))
    return moment.total_seconds() + float(fraction) - east


def is_event(event: "Any") -> bool:
    """True for what FIELDS allows: all that is needed, good, and nothing unknown."""
    return isinstance(event, dict) and not unknown_keys(event) and all(
        is_value(event[name], kind, rule) if name in event else not needed
        for name, kind, needed, rule in FIELDS)


def unknown_keys(event: "Dict[str, Any]") -> "Set[str]":
    """What another version of the program may know."""
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


def as_sent(event: "Dict[str, Any]") -> bytes:
    """The JSON of an event, without blanks. No rule of FIELDS allows what JSON would escape."""
    def text(value: "Any") -> str:
        if isinstance(value, list):
            return "[%s]" % ",".join(map(text, value))
        return "null" if value is None else ('"%s"' if isinstance(value, str) else "%d") % value

    return ("{%s}" % ",".join('"%s":%s' % (name, text(event[name])) for name in event)).encode()


def failures(name: str) -> int:
    """How often a waiting event was sent in vain: what follows that in its name."""
    return int(name[29:-5] or 0)


def session_name(session: str) -> str:
    """The name of a session's file: the raw id in hex, which spares a hash, where that fits."""
    data = encoded(session)
    return data.hex() if len(data) <= 120 else "long-" + sha256_hex(session)


def is_settled(status: int, body: bytes) -> bool:
    """True if an answer is the last word on an event (README, Contract 6): arrived or given up."""
    arrived = status == 202 or (200 <= status < 300 and loads_object(body).get("ok") is True)
    return arrived or status in (400, 413, 422)


def retry_at(header: "Optional[str]", now: float) -> float:
    """When a server wants to be asked again (`Retry-After`: s or a date), a day at most; or 0.0."""
    from email.utils import parsedate_to_datetime
    text = (header or "").strip()
    try:
        seconds = fits(text, "[0-9]{1,99}")
        at = now + int(text[:9]) if seconds else parsedate_to_datetime(text).timestamp()
    except (TypeError, ValueError, IndexError, OverflowError):
        return 0.0
    return min(at, now + DAY_S) if at > now else 0.0


# ==================================================================================================
# Spool: files in the home
# ==================================================================================================


def contents(path: "Any", most: int = FILE_BYTES, flags: int = 0) -> bytes:
    """The bytes of a file, but at most one more than `most`. OSError if it cannot be read."""
    with open(os.open(path, os.O_RDONLY | SAFELY | flags), "rb") as file:
        return file.read(most + 1) or b""


def object_at(path: "Any") -> "Dict[str, Any]":
    """The JSON object in a file; {} for whatever else may be there, or not."""
    try:
        return loads_object(contents(path))
    except OSError:
        return {}


def names_in(home: str, folder: str, pattern: str) -> "List[str]":
    """The sorted names of a pattern in one of our folders; [] if it is none, or a symbolic link."""
    try:
        return [name for name in sorted(os.listdir(own(home, folder))) if fits(name, pattern)]
    except OSError:
        return []


def own(home: str, folder: str, make: bool = False) -> str:
    """The path of one of our folders. OSError if it, or what it is in, is a symbolic link.

    Only the product's own folder may be one: that is how a person keeps it elsewhere.
    """
    for path in ([OURS, folder] if folder != HOME else []):
        if os.path.islink((home + path)[:-1]):
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
    """Ask the disk to keep a file or folder through a power cut; some systems cannot be asked."""
    try:
        fd = os.open(path, os.O_RDONLY | SAFELY)
        os.fsync(fd)
        os.close(fd)
    except OSError:
        pass


def write_whole(path: str, data: bytes, mode: int = 0o600, fresh: bool = False) -> None:
    """Whoever looks finds at `path` what was there before, or all of `data`.

    `fresh`: FileExistsError if something was. OSError if it cannot be written; nothing stays then.
    """
    temporary = "%s/.%s.tmp" % (os.path.dirname(path), os.urandom(8).hex())
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | SAFELY, 0o600)
        with open(fd, "wb") as file:
            file.write(data)
        if mode != 0o600:
            os.chmod(temporary, mode)
        if fresh:
            os.link(temporary, path)
        else:
            os.replace(temporary, path)
    finally:
        remove(temporary)


def machine_id(home: str, make: bool = True) -> str:
    """The machine's random name, made on first use; "" if there is none and none is to be made.

    OSError if it cannot be kept, Told if its file is empty or a link that leads nowhere.
    """
    path = home + HOME + "machine-id"
    if make and not os.path.lexists(path):
        try:
            own(home, HOME, make=True)
            write_whole(path, random_uuid().encode(), fresh=True)
        except FileExistsError:  # another session was quicker
            pass
    try:
        name = decoded(contents(path)).strip()
    except FileNotFoundError:
        if not os.path.lexists(path):
            return ""
        raise Told(HOME_FOLDER + "/machine-id is a link that leads nowhere: remove it") from None
    if not name:
        raise Told(HOME_FOLDER + "/machine-id is empty: remove it")
    return name


def append(home: str, session: str, lines: "Sequence[str]", most: int = SESSION_BYTES) -> None:
    """Add whole lines to a session's file, in one write. OSError if they cannot be kept.

    Lines of writers at the same moment do not mix: O_APPEND. The blank line in front keeps what a
    full disk cut short from spoiling the next line. `most`: bytes that the file may have had.
    """
    path = own(home, SESSIONS, make=True) + session_name(session)
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | NO_LINK | SAFELY, 0o600)
    with open(fd, "wb", 0) as file:
        if os.fstat(fd).st_size > most:
            raise OSError(27, "the session's file is full")
        data = ("\n%s\n" % "\n".join(lines)).encode("latin-1")
        if file.write(data) < len(data):
            raise OSError(28, "no room")


def session_data(home: str, name: str) -> bytes:
    """A session's file, b"" for whatever else may be there, or not."""
    try:
        return contents(own(home, SESSIONS) + name, SESSION_BYTES + 4096, NO_LINK)
    except OSError:
        return b""


def end_session(home: str, session: str, ended: int, calls: "Optional[int]",
                tokens: int) -> "Optional[Part]":
    """Append an end, and return the part that is this end's; None if it brings nothing new.

    `ended`: ms since 1970; `calls`, `tokens`: of stats.json. Where the file cannot be written, the
    end is added to what it holds, and only the claim against others is lost.
    """
    token = os.urandom(4).hex()
    line = end_line(ended, token, calls, tokens)
    missing = ""
    try:
        append(home, session, [line])
    except OSError:
        missing = "\n" + line
    return part_of(token, session_data(home, session_name(session)) + missing.encode())


def waiting(home: str) -> "List[str]":
    """The waiting events' names, in the order in which they are sent. Others are left alone."""
    return sorted(names_in(home, PENDING, EVENT_NAME), key=lambda name: (failures(name), name))


def purge(home: str) -> int:
    """Delete what waits and what was noted, for a person who said no; how many files that was.

    Only names that this program makes go, and only in folders that are no symbolic links.
    """
    gone = 0
    for folder, pattern in ((PENDING, EVENT_NAME), (SESSIONS, SESSION_NAME)):
        for name in names_in(home, folder, pattern + "|" + LEFTOVER_NAME):
            gone += remove(home + folder + name)
    try:
        return gone + remove(own(home, OURS) + "last.json")
    except OSError:
        return gone


def expire(home: str, now: float) -> None:
    """Remove the oldest of too many events, and those that are too old at `now`.

    A clock that was ahead ages none. What another version of the program wrote stays.
    """
    oldest = (now - WAITING_DAYS * DAY_S) * 1000
    for later, name in enumerate(reversed(names_in(home, PENDING, EVENT_NAME))):
        over = later >= WAITING_EVENTS or int(name[:15]) < oldest
        if over and not unknown_keys(object_at(home + PENDING + name)):
            remove(home + PENDING + name)


def sweep(home: str, env: "Dict[str, str]", machine: str) -> None:
    """Capture the sessions that fell silent without an end; remove what is old or half-written."""
    leftovers = [(folder, LEFTOVER_NAME, LEFTOVER_S) for folder in (HOME, OURS, PENDING, SESSIONS)]
    for folder, pattern, most in [*leftovers, (SESSIONS, SESSION_NAME, SESSION_DAYS * DAY_S)]:
        for name in names_in(home, folder, pattern):
            path = home + folder + name
            try:
                age = time.time() - os.lstat(path).st_mtime
                silent = pattern == SESSION_NAME and age > DAY_S
                if not (silent and settle(home, env, machine, name)) and age > most:
                    remove(path)
            except OSError:  # gone by itself, or no room: the next session's end tries again
                pass


def settle(home: str, env: "Dict[str, str]", machine: str, name: str) -> bool:
    """Capture ends that never came, or whose event a kill prevented; True if there was any."""
    data = session_data(home, name)
    if not data or data.endswith(b"\nsettled\n") or name[:5] == "long-":
        return False  # each file is read once; and a hash does not tell the id
    record, session = Record(data), decoded(bytes.fromhex(name))
    if session[:5] == "ppid:":  # its parent may have been the shell of one call
        return False
    if record.calls or record.refs:
        stats = counts(object_at(home + HOME + "stats.json"), {}, [session], time.time())
        end_session(home, session, record.last, *stats)
        record = Record(session_data(home, name))
    missing = [part for part in record.parts if part.token not in record.kept]
    for part in missing:
        keep(home, part, compose(env, home, machine, session, part))
    append(home, session, ["kept " + part.token for part in missing] + ["settled"])
    return bool(missing)


def keep(home: str, part: Part, event: "Dict[str, Any]") -> str:
    """Put a part's event into the spool; its path there. OSError if it cannot be kept.

    Its name is always the same: ms since 1970, start of the session's hash.
    """
    name = "%015d-%s.json" % (part.ended, event["session_id_hash"][:12])
    path = own(home, PENDING, make=True) + name
    write_whole(path, as_sent(event))
    return path


# ==================================================================================================
# Capture
# ==================================================================================================


def track(argv: "Sequence[str]") -> int:
    """Record a tool call and the discoveries that it touched (a hook, which never fails).

    Or, by hand, the discoveries named.
    """
    env: "Dict[str, str]" = {}
    given, named = parsed(argv)
    try:
        env = environment()
        if not all(fits(ref, REF) for ref in named):
            return complain("a discovery's name is a letter or digit, then at most 127 of those "
                            "and . _ : -", 2)
        allowed, why = consent(env, telemetry_said(home_of(env)))
        if not allowed:
            said = "not recorded: consent is off: " + why
            return complain(said) if named else say(env, said)
        by_hand = named and any(env.get(name, "").strip() for name in SESSION_VARIABLES)
        caller = Caller(env, given, b"" if by_hand else standard_input())
        lines = touched_lines(caller, named, given.get("--discoveries", [DISCOVERIES]))
        if lines:
            session = caller.session or caller.session_id(machine_id(caller.home))
            append(caller.home, session, lines, SESSION_BYTES // 2)
        return say(env, "consent is on: %s; lines recorded: %d" % (why, len(lines)))
    except BaseException as error:
        said = "could not be recorded: " + reason(error)
        return complain(said, 1) if named else say(env, said + place_of(error))


def touched_lines(caller: Caller, named: "Sequence[str]", folders: "Sequence[str]") -> "List[str]":
    """What a call adds to its session's file, or (`named`) a person by hand."""
    now = "%d" % (time.time() * 1000)
    if named:
        return ["touch %s %s" % (now, ref) for ref in named]
    tool = next(filter(None, map(caller.hook.get, INPUT_KEYS)), None)
    refs = touched_refs(tool, caller.base, caller.project, folders)
    # Without an id each call would look like a session of its own.
    calls = ["call " + now] if caller.session and caller.hook else []
    return calls + ["touch %s %s" % (now, ref) for ref in refs]


def compose(env: "Dict[str, str]", home: str, machine: str, session: str,
            part: Part) -> "Dict[str, Any]":
    """The event of a part (README, Contract 1 and 4), without the commit."""
    login = github_login(object_at(home + HOME + "pro-token-cache.json"))
    quarter = salt(part.ended / 1000)
    named = session if part.number == 1 else "%s:part:%d" % (session, part.number)
    return {
        "identity_hash": sha256_hex(machine + quarter),
        "github_hash": sha256_hex(login + quarter) if login else None,
        "session_id_hash": sha256_hex(named),
        "ended_at": iso(part.ended / 1000),
        "tool_count": min(part.calls, RULES["tool_count"][1]),
        "tokens_saved": min(part.tokens, RULES["tokens_saved"][1]),
        "branch_sha": None,
        "discovery_refs": part.refs,
        "plugin_version": plugin_version(env),
    }


def plugin_version(env: "Dict[str, str]") -> str:
    """Of the plugin around this file (README, Contract 4, `plugin_version`)."""
    beside = os.path.dirname(os.path.abspath(__file__))
    for root in (env.get("CLAUDE_PLUGIN_ROOT", "").strip(), beside, os.path.dirname(beside)):
        for name in ("package.json", ".claude-plugin/plugin.json") if root else ():
            version = object_at(encoded(os.path.join(root, name))).get("version")
            if isinstance(version, str) and fits(version, RULES["plugin_version"]):
                return version
    return "0.0.0"


def caller_counts(caller: Caller, session: str) -> "Tuple[Optional[int], int]":
    """`counts` of the session that a caller ends."""
    stats, project = (object_at(caller.home + HOME + name)
                      for name in ("stats.json", "last-project.json"))
    bucket = stats_bucket(caller.ppid, caller.env.get("HOME", ""))
    return counts(stats, project, [session, bucket], time.time())


def parent_started(ppid: int) -> str:
    """When a process started, in its system's own words; "" where nobody can tell."""
    try:
        fields = contents("/proc/%d/stat" % ppid, 4096).rpartition(b")")[2].split()
        return fields[19].decode()  # the 22nd of all, in ticks since the system started
    except (OSError, IndexError):
        return printed_by(["ps", "-o", "lstart=", "-p", str(ppid)], b"/", {"LC_ALL": "C"})


def branch_sha(project: str) -> "Optional[str]":
    """The commit of a folder. A hostile repository runs nothing: no hooks, fetching, prompts."""
    sha = printed_by(["git", "rev-parse", "--short=12", "HEAD"], encoded(project), {
        "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0",
        "GIT_NO_LAZY_FETCH": "1", "GIT_ALLOW_PROTOCOL": ""})
    return sha if fits(sha, RULES["branch_sha"]) else None


def printed_by(argv: "List[str]", folder: bytes, changes: "Dict[str, str]") -> str:
    """What a program prints within 250 ms, stripped; "" if it fails or takes longer.

    It is looked for in the absolute folders of PATH: others lead into a project. It gets no GIT_*
    variables (a hook of git's own has them, pointing elsewhere), no input, no terminal.
    """
    from subprocess import DEVNULL, PIPE, Popen, TimeoutExpired
    env = {name: value for name, value in os.environ.items() if name[:4] != "GIT_"}
    paths = [path for path in (env.get("PATH") or os.defpath).split(os.pathsep)
             if os.path.isabs(path)]
    env.update(changes, PATH=os.pathsep.join(paths))
    files = [os.path.join(path, argv[0] + ".exe" * (os.name == "nt")) for path in paths]
    try:
        program = next(file for file in files if os.path.isfile(file) and os.access(file, os.X_OK))
        process = Popen([program, *argv[1:]], stdin=DEVNULL, stdout=PIPE, stderr=DEVNULL, env=env,
                        cwd=folder, start_new_session=True)
    except (OSError, ValueError, StopIteration):
        return ""
    try:
        printed = process.communicate(timeout=PROGRAM_S)[0]
    except TimeoutExpired:
        try:  # and all that it started: one of those may hold the pipe
            getattr(os, "killpg", os.kill)(process.pid, 9)
        except OSError:  # gone
            pass
        return ""
    return printed.decode("ascii", "replace").strip() if process.returncode == 0 else ""


# ==================================================================================================
# Send
# ==================================================================================================


def endpoint(env: "Dict[str, str]") -> "Tuple[str, str]":
    """(URL, what decided): README, Contract 6. The URL is as it was set: see `checked_url`."""
    names = PREFIX + "SESSION_EVENTS_URL", PREFIX + "API_URL"
    whole_url, base = (env.get(name, "").strip() for name in names)
    if whole_url:
        return whole_url, names[0]
    if base:
        return base.rstrip("/") + ENDPOINT_PATH, names[1]
    return DEFAULT_SERVER + ENDPOINT_PATH, "the default"


def checked_url(url: str) -> "Tuple[str, str, str]":
    """(URL to ask, Authorization or "", text to print). Told, without the URL, if not http(s)."""
    from base64 import b64encode
    from urllib.parse import unquote_to_bytes, urlsplit
    try:
        parts = urlsplit(url)
        good = (parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
                and "@" not in parts.path and fits(url, "[!-~]{1,4096}"))
    except ValueError:
        good = False
    if not good:
        raise Told("the endpoint is not a http:// or https:// URL")
    login, _, host = parts.netloc.rpartition("@")
    bare = "%s://%s%s" % (parts.scheme, host, parts.path or "/")
    return (bare + "?" * bool(parts.query) + parts.query,
            "Basic " + b64encode(unquote_to_bytes(login)).decode() if login else "",
            bare + "?..." * bool(parts.query))


def shown_endpoint(env: "Dict[str, str]") -> str:
    """Where it goes, without credentials."""
    try:
        return checked_url(endpoint(env)[0])[2]
    except ValueError as error:
        return "nowhere: " + str(error)


def reason(error: BaseException) -> str:
    """An error in words that hold no path and no URL."""
    inner = getattr(error, "reason", None)
    if isinstance(inner, Exception):
        return reason(inner)
    if isinstance(error, Told):
        return str(error)
    words = getattr(error, "strerror", None)
    return "%s: %s" % (type(error).__name__, words) if words else type(error).__name__


def place_of(error: BaseException) -> str:
    """` (in FUNCTION, line N)`: where in this file an error came up."""
    from traceback import extract_tb
    own_file = place_of.__code__.co_filename
    found = [frame for frame in extract_tb(error.__traceback__) if frame.filename == own_file]
    return " (in %s, line %d)" % (found[-1].name, found[-1].lineno or 0) if found else ""


def poster(url: str, authorization: str) -> "Post":
    """A function that posts one event: OSError, ValueError, HTTPException.

    Of urllib's ways it has two: HTTP(S), and the proxies that the environment names. It follows no
    redirect.
    """
    if sys.platform == "darwin":  # urllib would load _scproxy, and crash after a fork
        sys.modules["_scproxy"] = stub = type(sys)("_scproxy")
        stub.__dict__.update(_get_proxies=dict, _get_proxy_settings=dict)
    import urllib.request as u
    opener = u.OpenerDirector()
    for way in (u.ProxyHandler(u.getproxies_environment()), u.HTTPHandler(), u.HTTPSHandler()):
        opener.add_handler(way)
    headers = {"Content-Type": "application/json", "User-Agent": "emit.py"}
    if authorization:
        headers["Authorization"] = authorization

    def post(data: bytes) -> "Tuple[int, Optional[str], bytes]":
        answer: "Any" = opener.open(u.Request(url, data, headers), timeout=ANSWER_S)
        if not answer:
            raise Told("a proxy of an unknown kind")
        with answer:
            wanted = 200 <= answer.status < 300 and answer.status != 202
            body = answer.read(EVENT_BYTES) if wanted else b""
            return answer.status, answer.headers.get("Retry-After"), body
    return post


def attempt(post: "Post", event: "Dict[str, Any]") -> "Tuple[str, bool, bool, float]":
    """Send one event: (what happened, it must wait, the server wants peace, until when or 0.0)."""
    from http.client import HTTPException
    try:
        status, after, body = post(as_sent(event))
    except (OSError, ValueError, HTTPException) as error:
        return "without an answer (%s)" % reason(error), True, True, 0.0
    again = retry_at(after, time.time())
    peace = again > 0 or status in (429, 503)
    return "answered %d" % status, not is_settled(status, body), peace, again


class Sender:
    """Sends what waits to the endpoint `shown`, and keeps how that went.

    `stop`: why no more is sent, or ""; `tried`: how the names of the events begin that were sent.
    """

    def __init__(self, home: str, env: "Dict[str, str]") -> None:
        self.home, self.env, self.stop = home, env, ""
        self.tried: "Set[str]" = set()
        url, authorization, self.shown = checked_url(endpoint(env)[0])
        self.post = poster(url, authorization)
        say(env, "sending to %s, for 20 s at most: if no line follows, time ran out" % self.shown)

    def barred(self) -> str:
        """Why nothing may be sent now, or ""."""
        again = wishes_at(self.home).get(self.shown)
        return withdrawn(self.home, self.env) or (
            "the server asked for nothing before " + iso(again) if again else "")

    def flush(self, own_name: str) -> None:
        """Send what waits. One sender works at a time, and the others wait for their turn.

        A new event of another session is left alone while its own child may still add the commit.
        """
        fd = -1
        try:
            import fcntl
            path = own(self.home, OURS, make=True) + "flush.lock"
            fd = os.open(path, os.O_RDWR | os.O_CREAT | NO_LINK | SAFELY, 0o600)
            fcntl.flock(fd, fcntl.LOCK_EX)
        except (ImportError, OSError):  # no lock to be had: the server takes an event only once
            pass
        while not self.stop:
            now = time.time()
            left = [name for name in waiting(self.home) if name[:28] not in self.tried]
            ready = [name for name in left if name == own_name or failures(name)
                     or not 0 <= now - int(name[:15]) / 1000 < COMMIT_S]
            if ready:
                self.round(ready)
            elif left:
                time.sleep(0.05)
            else:
                break
        if fd >= 0:
            os.close(fd)

    def round(self, names: "Sequence[str]") -> None:
        """Send these, in this order, until the server or the person says stop."""
        tally: "Dict[str, int]" = {}
        failed, again = 0, 0.0
        for name in names:
            self.stop = self.stop or self.barred()
            if self.stop:
                break
            self.tried.add(name[:28])
            if not tally:
                self.record("began, and did not finish (yet)", 0.0)
            try:
                words, fails, peace, again = self.send(name)
            except OSError:  # another sender was quicker, or it cannot be read
                continue
            tally[words] = tally.get(words, 0) + 1
            failed += fails
            if peace or failed == FAILED_ANSWERS:
                self.stop = "stopped" + (" until " + iso(again) if again else "")
                break
        counted = ["%d %s" % (n, words) for words, n in tally.items()]
        result = ", ".join(counted + [self.stop] * bool(self.stop))
        if result and not withdrawn(self.home, self.env):
            self.record(result, again)
        say(self.env, result or "nothing waits")

    def send(self, name: str) -> "Tuple[str, bool, bool, float]":
        """`attempt` one waiting event. OSError if it is not there.

        It goes when it has arrived, is given up on, or is no event. One that fails goes behind the
        others; one that another version of the program wrote stays.
        """
        path = self.home + PENDING + name
        event = loads_object(contents(path, EVENT_BYTES, NO_LINK))
        if unknown_keys(event):
            return "left to another version of emit.py", False, False, 0.0
        if not is_event(event):
            remove(path)
            return "removed, being no event", False, False, 0.0
        outcome = attempt(self.post, event)
        later = "%s-%d.json" % (name[:28], min(failures(name) + 1, 999))
        try:
            if outcome[1]:
                os.rename(path, self.home + PENDING + later)
            else:
                os.unlink(path)
        except OSError:  # another sender was quicker
            pass
        return outcome

    def record(self, result: str, again: float) -> None:
        """Keep how the sending went, for `status`, and when the server wants to be asked again."""
        import json
        wishes = wishes_at(self.home)
        if again:
            wishes[self.shown] = again
        last = {"at": iso(time.time()), "result": result, "retry_at": wishes}
        try:
            own(self.home, OURS, make=True)
            write_whole(self.home + LAST, json.dumps(last).encode())
        except OSError:  # a full disk must not keep from sending
            pass


def wishes_at(home: str) -> "Dict[str, float]":
    """When servers want to be asked again, by endpoint; not what a clock that was ahead wrote."""
    kept, now = object_at(home + LAST).get("retry_at"), time.time()
    wishes = kept.items() if isinstance(kept, dict) else ()
    return {shown: at for shown, at in wishes if type(at) is float and 0 < at - now <= DAY_S}


# ==================================================================================================
# The end of a session
# ==================================================================================================


def hook(argv: "Sequence[str]") -> int:
    """The end of a session. It returns 0 to the caller, whatever happens.

    The process that the caller waits for asks for consent, reads the input and forks. The child
    captures, says so through a pipe, and goes on alone. So whatever is signalled to the caller's
    process group, or kills the parent, does not reach what is being written.
    """
    # The caller waits for the child's capture too, hashlib included: about one bare start of wall
    # time. That is the price of an event that is on the disk before anybody is let go.
    begun, child = time.monotonic(), -1
    env: "Dict[str, str]" = {}
    try:
        env = environment()
        given, ignored = parsed(argv)
        off = withdrawn(home_of(env), env)
        if off:
            return say(env, off)
        caller, wait = Caller(env, given, standard_input()), wait_of(env, given)
        child, pipe = fork()
        if child > 0:
            if os.read(pipe, 1) and wait:
                from select import select
                select([pipe], [], [], max(0.0, wait - (time.monotonic() - begun)))
            return 0
    except BaseException as error:
        if child > 0:  # Ctrl-C while it stays for the answer: the child goes on
            return 0
        return say(env, "failed: " + reason(error) + place_of(error))
    try:
        end(caller, wait, pipe, "; arguments ignored: see --help" if ignored else "")
    except BaseException as error:
        say(env, "failed: " + reason(error) + place_of(error))
    finally:
        os._exit(0)


def fork() -> "Tuple[int, int]":
    """(child's pid, 0 in the child, end of a pipe); (-1, -1) where no process can be had.

    The child is in a session of its own: what a host signals to its process group, or a terminal
    that closes, does not reach it. It writes a byte into the pipe when the event is in the spool,
    and closes it when the event is answered.
    """
    for fd in (0, 1, 2):  # a number that the caller closed must not become the pipe's
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    try:
        ours, theirs = os.pipe()
        child = os.fork()
    except (AttributeError, OSError):
        return -1, -1
    if child:
        os.close(theirs)
        return child, ours
    os.setsid()
    return child, theirs


def end(caller: Caller, wait: float, pipe: int, note: str) -> None:
    """Capture, let the caller go, then all that nobody waits for: the commit, the disk, sending.

    `wait`: seconds that the caller stays for the answer; `pipe`: to it, -1 if this process is it.
    """
    home, env, path = caller.home, caller.env, ""
    machine = machine_id(home)
    session = caller.session_id(machine)
    part = end_session(home, session, int(time.time() * 1000), *caller_counts(caller, session))
    event = compose(env, home, machine, session, part) if part else {}
    result = "captured" if part else "nothing new since this session's last end, so no event"
    try:
        path = keep(home, part, event) if part else ""
    except OSError as error:
        result += ", but not kept (%s)" % reason(error)
    if pipe >= 0:
        let_go(pipe, bool(wait), debugging(env))
    leave_in(LIFE_S if pipe >= 0 else (wait or WAIT_S), home)
    # Not before: a standard error that nobody reads may hold its writer for good.
    say(env, "consent is on" + note)
    say(env, result)
    if part:
        event["branch_sha"] = branch_sha(caller.project)
    if part and path:
        secure(home, session, part, event, path)
    try:
        sender, own_name = Sender(home, env), os.path.basename(path)
        if part and not path:
            said = sender.barred() or "1 " + attempt(sender.post, event)[0]
            say(env, "the event that is not kept: " + said)
        elif path and wait:  # before what waits
            sender.round([own_name])
        if pipe >= 0 and wait:
            os.close(pipe)
        if not withdrawn(home, env):
            sweep(home, env, machine)
            sender.flush(own_name)
    finally:  # also where the endpoint is no URL
        if not withdrawn(home, env):
            expire(home, time.time())


def secure(home: str, session: str, part: Part, event: "Dict[str, Any]", path: str) -> None:
    """Add the commit to a waiting event, and ask the disk to keep it through a power cut."""
    try:
        if event["branch_sha"] and os.path.exists(path):
            write_whole(path, as_sent(event))
        for kept in (path, os.path.dirname(path), home + HOME + "machine-id"):
            sync(kept)
        append(home, session, ["kept " + part.token])
    except OSError:  # no room: the event waits without its commit
        pass


def let_go(pipe: int, stays: bool, keep_errors: bool) -> None:
    """Let the caller go, and go of all that is its: directory and descriptors.

    `stays`: the caller stays for the answer, until the pipe closes.
    """
    try:
        os.write(pipe, b".")
    except OSError:  # it was killed
        pass
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1) if keep_errors else (0, 1, 2):
        os.dup2(null, fd)
    os.closerange(3, pipe)
    os.closerange(pipe + 1 if stays else pipe, 1 << 16)


def leave_in(seconds: float, home: str) -> None:
    """End this process when its time is over, wherever it hangs: a name look-up has no limit."""
    from threading import Timer

    def leave() -> None:
        try:
            expire(home, time.time())
        finally:
            os._exit(0)

    timer = Timer(seconds, leave)
    timer.daemon = True
    timer.start()


def debugging(env: "Dict[str, str]") -> bool:
    """True if somebody wants to be told what a hook run does."""
    return env.get(PREFIX + "TELEMETRY_DEBUG", "").strip() not in ("", "0")


def say(env: "Dict[str, str]", text: str) -> int:
    """A line for ASHLR_TELEMETRY_DEBUG: no hash, path or credential. A hook's exit status."""
    return complain(text) if debugging(env) else 0


# ==================================================================================================
# Hooks: what a host's configuration has to say
# ==================================================================================================

START = "import sys; sys.path.insert(0, sys.argv.pop(1)); import %s; %s.run()"
CLAUDE_EVENTS = (("SessionEnd", ""), ("PostToolUse", " track"), ("PostToolUseFailure", " track"))
# Of each host: events, with what is added to the command; where it goes, and what the host wants.
HOSTS: "Dict[str, Tuple[Sequence[Tuple[str, str]], str]]" = {
    "claude": (CLAUDE_EVENTS, "~/.claude/settings.json, or a plugin's hooks/hooks.json. "
               "Claude Code ends its session-end hooks after 1.5 s."),
    "codex": (CLAUDE_EVENTS[:2], "~/.codex/hooks.json. Codex skips hooks that nobody trusts, "
              "without a word: trust them in its dialog, /hooks."),
    "copilot": (CLAUDE_EVENTS[:2], "~/.copilot/hooks/session-events.json. The names of the events "
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
  const run = (more, input) =>
    spawnSync(command[0], [...command.slice(1), ...more], {
      input: JSON.stringify({ cwd: directory, ...input }), stdio: ["pipe", "ignore", "inherit"] })
  const end = () => {
    for (const id of sessions) run([], { session_id: id })
    sessions.clear()
  }
  process.on("exit", end)
  for (const [signal, number] of [["SIGHUP", 1], ["SIGINT", 2], ["SIGTERM", 15]])
    process.on(signal, () => { end(); process.exit(128 + number) })
  return {
    "tool.execute.after": async (call, result) => {
      sessions.add(call.sessionID)
      run(["track"], { session_id: call.sessionID, tool_input: call.args ?? result?.args })
    },
    dispose: async () => end(),
  }
}
"""


def hooks(env: "Dict[str, str]", given: "Words", words: "Sequence[str]") -> int:
    """Print the configuration of a host; on standard error where it goes."""
    import json
    from shlex import quote
    if words[0] not in HOSTS:
        return complain("no such host; there are " + ", ".join(HOSTS), 2)
    events, where = HOSTS[words[0]]
    folder, name = os.path.split(os.path.abspath(__file__))
    code = START % ((os.path.splitext(name)[0],) * 2)
    python, shell_folder = sys.executable or "python3", quote(folder)
    if "--folder" in given:  # as it stands: the host or its shell puts the folder in
        python, folder = "python3", given["--folder"][-1]
        shell_folder = folder if '"' in folder or "'" in folder else '"%s"' % folder
    if not events:
        print(OPENCODE % json.dumps([python, "-I", "-S", "-c", code, folder], indent=2), end="")
    else:
        start = '%s -I -S -c "%s" %s' % (quote(python), code, shell_folder)
        entries = {event: [{"hooks": [{"type": "command", "command": start + more}]}]
                   for event, more in events}
        print(json.dumps({"hooks": entries}, indent=2))
    complain("goes to %s Keep what is there already. Set no `timeout`: its unit differs." % where)
    return 0


# ==================================================================================================
# Commands
# ==================================================================================================


def show(env: "Dict[str, str]", given: "Words", words: "Sequence[str]") -> int:
    """Print the event as it would be sent now; where to, and what is made up, on standard error."""
    allowed, why = consent(env, telemetry_said(home_of(env)))
    caller = Caller(env, given, standard_input())
    known = machine_id(caller.home, make=False)
    machine = known or random_uuid()
    session = caller.session_id(machine)
    line = end_line(int(time.time() * 1000), "now", *caller_counts(caller, session))
    data = session_data(caller.home, session_name(session))
    part = part_of("now", data + b"\n" + line.encode())
    if part:
        event = compose(env, caller.home, machine, session, part)
        event["branch_sha"] = branch_sha(caller.project) if allowed else None
        print(as_sent(event).decode())
    else:
        complain("no event: nothing is new since this session's last end")
    complain("goes to: " + shown_endpoint(env))
    if not allowed:
        complain("but nothing is sent, nor git asked for the commit: consent is off: " + why)
    if not known:
        complain("there is no machine-id yet: identity_hash is that of a passing one")
    return 0


def obstacle(home: str, allowed: bool) -> "Optional[str]":
    """Why nothing can be captured, or None. It tries to write, but not without consent."""
    try:
        machine_id(home, make=False)
        for folder in (HOME, PENDING, SESSIONS) if allowed else ():
            probe = "%s.%s.tmp" % (own(home, folder, make=True), os.urandom(8).hex())
            write_whole(probe, b"x" * 4096)
            remove(probe)
    except (OSError, ValueError) as error:
        return "%s cannot be used: %s" % (HOME_FOLDER, reason(error))
    return None


def status(env: "Dict[str, str]", given: "Words", words: "Sequence[str]") -> int:
    """Print consent, endpoint, what waits, the last result, for people or (--json) programs."""
    import json
    home = home_of(env)
    allowed, why = consent(env, telemetry_said(home))
    names, last, fault = waiting(home), object_at(home + LAST), obstacle(home, allowed)
    since = iso(int(min(names)[:15]) / 1000) if names else None
    url, chosen_by = shown_endpoint(env), endpoint(env)[1]
    again = wishes_at(home).get(url)
    report: "Dict[str, Any]" = {
        "consent": "on" if allowed else "off", "decided_by": why,
        "capture": "impossible: " + fault if fault else "possible",
        "endpoint": url, "chosen_by": chosen_by,
        "waiting": len(names), "since": since,
        "last_run": last.get("at"), "result": last.get("result"),
        "retry_at": iso(again) if again else None,
    }
    if "--json" in given:
        print(json.dumps(report))
    else:
        for name, value in report.items():
            if value is not None:
                print("%-11s%s" % (name.replace("_", " "), ascii(str(value))[1:-1]))
    return 1 if fault else 0


def mine(env: "Dict[str, str]", given: "Words", words: "Sequence[str]") -> int:
    """Print what this machine is called in each quarter, newest last, since machine-id was made."""
    home = home_of(env)
    machine = machine_id(home, make=False)
    if not machine:
        return complain("there is no machine-id, so nothing was ever captured here", 1)
    login = github_login(object_at(home + HOME + "pro-token-cache.json"))
    now = time.time()
    made = min(now, max(os.stat(home + HOME + "machine-id").st_mtime, 1577836800.0))  # from 2020 on
    days = range(int(made // DAY_S), int(now // DAY_S) + 1)
    for quarter in dict.fromkeys(salt(day * DAY_S) for day in days):
        print("%s identity_hash %s%s" % (quarter[5:], sha256_hex(machine + quarter),
              " github_hash " + sha256_hex(login + quarter) if login else ""))
    return 0


def on(env: "Dict[str, str]", given: "Words", words: "Sequence[str]") -> int:
    """Say yes."""
    changed = switch(home_of(env), "opt-in")
    print(COLLECTED % shown_endpoint(env) if changed else "on, as before")
    allowed, why = consent(env, "opt-in")
    return 0 if allowed else complain("but still off here: " + why)


def off(env: "Dict[str, str]", given: "Words", words: "Sequence[str]") -> int:
    """Say no, and delete what waits."""
    home = home_of(env)
    gone = purge(home)
    switch(home, "off")
    gone += purge(home)  # of a session that ended meanwhile
    print("off: nothing is collected or sent any more; files deleted: %d" % gone)
    return 0


def switch(home: str, value: str) -> bool:
    """Write the person's word into config.json, all else in it kept; True if it was another."""
    import json
    path, mode = os.path.realpath(home + HOME + "config.json"), 0o600
    config: "Dict[str, Any]" = {}
    try:
        if os.path.lexists(path):
            config, mode = dict(loads(contents(path)).items()), os.stat(path).st_mode & 0o777
        before = config.get("telemetry")
        data = json.dumps(dict(config, telemetry=value), indent=2, allow_nan=False).encode() + b"\n"
    except (ValueError, AttributeError, RecursionError):
        word = "off" if value == "off" else "on"
        raise Told("%s/config.json is not a JSON object, and is left alone: mend it, or set "
                   "%sTELEMETRY=%s" % (HOME_FOLDER, PREFIX, word)) from None
    if before == value:
        return False
    own(home, HOME, make=True)
    write_whole(path, data, mode)
    sync(path)
    return True


# Of each command: its function, the flags that it takes, and how many other words.
COMMANDS: "Dict[str, Tuple[Callable[..., int], str, int]]" = {
    "show": (show, "--dir DIR", 0),
    "status": (status, "--json", 0),
    "mine": (mine, "", 0),
    "hooks": (hooks, "HOST --folder TEXT", 1),
    "on": (on, "", 0),
    "off": (off, "", 0),
}


def command(argv: "Sequence[str]") -> int:
    """The exit status of a command other than the hooks."""
    if argv[0] not in COMMANDS:
        return complain("no such command; see emit.py --help", 2)
    function, takes, number_of_words = COMMANDS[argv[0]]
    given, words = parsed(argv[1:])
    if len(words) != number_of_words or not set(given).issubset(takes.split()):
        return complain("%s takes %s; see emit.py --help" % (argv[0], takes or "nothing"), 2)
    try:
        return function(environment(), given, words)
    except (OSError, ValueError) as error:
        return complain("could not be done: " + reason(error), 1)


def complain(text: str, code: int = 0) -> int:
    """One line on standard error; `code` again."""
    try:
        sys.stderr.write("emit.py: %s\n" % text)
        sys.stderr.flush()
    except (AttributeError, OSError):  # closed by whoever called
        pass
    return code


def main(argv: "Sequence[str]") -> int:
    """The exit status of a command line. A hook run's sender does not come back from here."""
    os.umask(0o077)
    if "--help" in argv or "-h" in argv:
        print((__doc__ or "").replace("~/.ashlr", HOME_FOLDER).replace("ASHLR_", PREFIX))
    elif "--version" in argv:
        print("emit.py " + VERSION)
    elif not argv or argv[0][:1] == "-":
        return hook(argv)
    elif argv[0] == "track":
        return track(argv[1:])
    else:
        return command(argv)
    return 0


def run() -> None:
    """`main` for a process: out at once afterwards, without the interpreter's tidying-up."""
    folder = os.path.dirname(os.path.abspath(__file__))
    if folder in map(os.path.abspath, sys.path[:1]):  # a json.py beside this file is not Python's
        del sys.path[0]
    code = main(sys.argv[1:])
    try:
        sys.stdout.flush()
    except (AttributeError, OSError):  # closed by whoever called
        pass
    os._exit(code)


if __name__ == "__main__":
    run()
