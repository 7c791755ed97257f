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
# (-I -S) json costs 0.9, re 0.7, hashlib 0.4, subprocess and urllib.request more than 1. So imports
# stand in functions, and leaving by os._exit, which wins 0.15, is worth a line.
import os
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, List, Optional, Sequence, Set, Tuple

    # One event's JSON to (status, Retry-After, body of a 2xx).
    Post = Callable[[bytes], Tuple[int, Optional[str], bytes]]

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
DONE = -1
FAILED_ANSWERS = 10  # in one run, before the server is left in peace: a few may be about one event
DAY_S = 86400.0  # the longest Retry-After that is believed; silence after which a session has ended
WAITING_EVENTS, WAITING_DAYS = 500, 30
SESSION_DAYS = 90  # that a session's file is kept after its last line: hosts continue none after 30
LEFTOVER_S = 3600.0  # before a file that a kill left half-written goes
FILE_BYTES = 1 << 26  # more than any host or plugin writes
SESSION_BYTES = 1 << 21  # of a session's file; half of it for calls, 50,000

# Paths are bytes, made from UTF-8, so that the locale, which hosts often drop, decides nothing.
HOME = ("/." + PRODUCT + "/").encode()
OURS = HOME + b"session-events/"
PENDING, SESSIONS, LAST = OURS + b"pending/", OURS + b"sessions/", OURS + b"last.json"
MACHINE_ID = HOME + b"machine-id"

# No waiting for a pipe that stands where a file should, no text mode, nothing left to children.
SAFELY = sum(getattr(os, flag, 0) for flag in ("O_NONBLOCK", "O_BINARY", "O_CLOEXEC"))
NO_LINK = getattr(os, "O_NOFOLLOW", 0)

BEGAN = "began, and did not finish (yet)"
UNCLEAR = object()  # what a config.json says that cannot be read

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
        (said is UNCLEAR, False,
         HOME_FOLDER + "/config.json cannot be read, and nobody else said yes"),
    ):
        if decides:
            return allowed, why
    return False, "nobody said yes (emit.py on does)"


def withdrawn(home: bytes, env: "Dict[str, str]") -> str:
    """"" with consent, or why it is off.

    What waits is deleted then, but not because of a config.json alone that cannot be read.
    """
    said = telemetry_said(home)
    allowed, why = consent(env, said)
    if not allowed and (said is not UNCLEAR or not consent(env, "opt-in")[0]):
        purge(home)
    return "" if allowed else "consent is off: " + why


def telemetry_said(home: bytes) -> "Any":
    """"telemetry" of config.json; None if there is none, UNCLEAR if the file cannot be read."""
    try:
        return loads(contents(home + HOME + b"config.json")).get("telemetry")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, AttributeError):
        return UNCLEAR


# ==================================================================================================
# Hosts: what they hand over, as input, arguments and environment
# ==================================================================================================

BLANKS = " \t\n\r"
ESCAPES = (('\\"', '"'), ("\\/", "/"), ("\\n", "\n"), ("\\t", "\t"), ("\\r", "\r"), ("\\b", "\b"),
           ("\\f", "\f"))


def loads(data: bytes) -> "Any":
    """`json.loads` of UTF-8 text, with NaN and numbers of thousands of digits as errors.

    What is short and plain is read by `quick_json`, which spares the import of json. ValueError for
    anything that is not JSON.
    """
    text = (data[3:] if data[:3] == b"\xef\xbb\xbf" else data).decode().strip(BLANKS)
    try:
        if text.count('"') * len(text) < 1 << 27 and text.count(",") <= 5000:
            value, end = quick_json(text, 0)
            if end == len(text):
                return value
    except (ValueError, IndexError, RecursionError):
        pass
    import json
    try:
        return json.loads(text, parse_constant=short_int, parse_int=short_int)
    except RecursionError:
        raise ValueError("not JSON") from None


def quick_json(text: str, at: int) -> "Tuple[Any, int]":
    """(value, where it ends) of the JSON at text[at:], 0.9 of a bare start cheaper than json.

    It knows the usual: objects, arrays, whole numbers, printable text without \\u. A ValueError or
    IndexError means that json must decide; a test holds the two to the same values.
    """
    at = after_blanks(text, at)
    first = text[at]
    if first == '"':
        end = text.index('"', at + 1)
        while (end - len(text[at + 1:end].rstrip("\\")) - at) % 2 == 0:  # this quote is escaped
            end = text.index('"', end + 1)
        inside = text[at + 1:end].replace("\\\\", "\0")
        if not text[at:end].isprintable():
            raise ValueError("for json")
        for escape, character in ESCAPES:
            inside = inside.replace(escape, character)
        if "\\" in inside:
            raise ValueError("for json")
        return inside.replace("\0", "\\"), end + 1
    if first in "{[":
        values: "List[Any]" = []
        at = after_blanks(text, at + 1)
        while text[at] != ("}" if first == "{" else "]"):
            if values and text[at] != ",":
                raise ValueError("for json")
            value, at = quick_json(text, at + bool(values))
            at = after_blanks(text, at)
            if first == "{":
                if text[at] != ":" or not isinstance(value, str):
                    raise ValueError("for json")
                member, at = quick_json(text, at + 1)
                at = after_blanks(text, at)
                value = value, member
            values.append(value)
        return (dict(values) if first == "{" else values), at + 1
    for word, constant in (("true", True), ("false", False), ("null", None)):
        if text.startswith(word, at):
            return constant, at + len(word)
    end = at + len(text[at:at + 16]) - len(text[at:at + 16].lstrip("-0123456789"))
    if text[at:end] != str(int(text[at:end])) or text[end:end + 1] in tuple("-0123456789.eE"):
        raise ValueError("for json")
    return int(text[at:end]), end


def after_blanks(text: str, at: int) -> int:
    """The next place that holds no blank. IndexError at the end of the text."""
    while text[at] in BLANKS:
        at += 1
    return at


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
    """What the host wrote on standard input; b"" for a terminal or nothing.

    It waits 0.25 s for the first byte and 1 s for the rest, and is content with an object without
    the end of the input: hosts that never close the pipe exist.
    """
    from select import select
    data, until = bytearray(), time.monotonic() + INPUT_FIRST_S
    try:
        while not os.isatty(0) and len(data) <= FILE_BYTES:
            left, may_be_all = until - time.monotonic(), data[-64:].rstrip()[-1:] == b"}"
            try:
                ready = select([0], [], [], max(0, min(left, 0.02) if may_be_all else left))[0]
            except OSError:  # Windows knows sockets only; the read waits there
                ready = [0]
            if ready:
                piece = os.read(0, 65536)
                until = until if data else time.monotonic() + INPUT_REST_S
                data += piece
                if not piece:
                    break
            elif left <= 0 or (may_be_all and loads_object(bytes(data))):
                break
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
    """UTF-8, whatever the text. Undecodable bytes come out as they went in."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


def home_of(env: "Dict[str, str]") -> bytes:
    """The person's folder. OSError without one: a project's folder must not speak for a person."""
    home = env.get("HOME", env.get("USERPROFILE"))
    path = encoded(os.path.expanduser("~") if home is None else home)
    if path[:1] not in (b"/", b"\\") and path[1:2] != b":":
        raise FileNotFoundError(2, "no home folder")
    return path


def options(argv: "Sequence[str]") -> "Tuple[str, Optional[float], List[str], List[str]]":
    """(--dir or "", --wait in seconds or None, --discoveries, what is none of these)."""
    directory, folders, rest, left = "", [], [], list(argv)
    wait: "Optional[float]" = None
    while left:
        word = left.pop(0)
        if word == "--dir" and left:
            directory = left.pop(0)
        elif word == "--discoveries" and left:
            folders.append(left.pop(0))
        elif word == "--wait":
            wait = seconds_of(left[0]) if left else None
            wait = WAIT_S if wait is None or not left.pop(0) else wait
        else:
            rest.append(word)
    return directory, wait, folders, rest


def seconds_of(ms: str) -> "Optional[float]":
    """Milliseconds as seconds, no more than the sender lives; None if they are no number."""
    try:
        return min(digits(ms, 9) / 1000, LIFE_S)
    except ValueError:
        return None


def wait_of(env: "Dict[str, str]", asked: "Optional[float]",
            exists: "Callable[[str], bool]" = os.path.exists) -> float:
    """How many seconds the hook stays for the answer. `asked`: by --wait, or None."""
    if asked is None:
        asked = seconds_of(env.get(PREFIX + "SESSION_EVENTS_WAIT", "").strip())
    if asked is not None:
        return asked
    said = [env.get(name, "").strip().lower() for name in PASSING_VARIABLES]
    passing = any(word not in ("", "0", "false") for word in said)
    return WAIT_S if passing or any(map(exists, PASSING_FILES)) else 0.0


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

    def __init__(self, env: "Dict[str, str]", directory: str = "", data: bytes = b"") -> None:
        """`directory`: from --dir; `data`: from standard input. Asks the process for the rest."""
        self.env, self.home, self.hook = env, home_of(env), loads_object(data)
        named = (env.get(name, "").strip() for name in SESSION_VARIABLES)
        self.session = first_text(self.hook, SESSION_KEYS) or next(filter(None, named), "")
        self.ppid = os.getppid() if hasattr(os, "getppid") else 0
        try:
            here = decoded(os.getcwdb())
        except OSError:  # deleted
            here = "/"
        given = first_text(self.hook, PROJECT_KEYS)
        roots = self.hook.get("workspace_roots")
        if not given and isinstance(roots, list) and roots and isinstance(roots[0], str):
            given = roots[0]
        wanted = directory or env.get("CLAUDE_PROJECT_DIR", "").strip() or given
        self.base, self.project = os.path.join(here, given), os.path.join(here, wanted)

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
    h = os.urandom(16).hex()
    return "%s-%s-4%s-%s%s-%s" % (
        h[:8], h[8:12], h[13:16], "89ab"[int(h[16], 16) % 4], h[17:20], h[20:])


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
                    self.last = digits(words[0], 14)  # until the year 5138
                    self.calls += 1
                elif kind == "touch":
                    self.last = digits(words[0], 14)
                    self.refs.append(words[1])
                elif kind == "end":
                    self.end(digits(words[0], 14), *words[1:4])
                elif kind == "kept":
                    self.kept.add(words[0])
            except (IndexError, TypeError, ValueError):  # cut short by a full disk, or not ours
                pass

    def end(self, ended: int, token: str, calls: str, tokens: str) -> None:
        """Add a part, unless the end brings nothing new."""
        new_tokens = max(0, digits(tokens, 10) - self.said[1])
        new_calls = self.calls if calls == "-" else max(0, digits(calls, 10) - self.said[0])
        refs = newest_refs(self.refs)
        if not self.parts or self.calls or refs or new_calls or new_tokens:
            self.parts.append(Part(token, ended, len(self.parts) + 1, new_calls, new_tokens, refs))
            self.said = [self.said[0] + new_calls, self.said[1] + new_tokens]
            self.calls, self.refs = 0, []


def digits(text: str, most: int) -> int:
    """The number that 1 to `most` ASCII digits say, or ValueError."""
    if len(text) > most or text.strip("0123456789"):
        raise ValueError("no number")
    return int(text)


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
    mine = list(dict.fromkeys(ids))
    try:
        if 0 <= now - instant(project.get("updatedAt")) <= DAY_S:
            mine += {first_text(project, ["sessionId"]).strip()}.difference(mine)
    except ValueError:
        pass
    sessions = stats.get("sessions") if stats.get("schemaVersion", 2) == 2 else None
    found = [sessions.get(name) for name in mine if name] if isinstance(sessions, dict) else []
    buckets = [bucket for bucket in found if isinstance(bucket, dict)]
    calls, tokens = (min(RULES[field][1], sum(whole(bucket.get(name)) for bucket in buckets))
                     for field, name in (("tool_count", "calls"), ("tokens_saved", "tokensSaved")))
    return calls if buckets else None, tokens


def whole(value: "Any") -> int:
    """A number of a bucket, floored; 0 for one below 0, and for whatever is none."""
    return int(value) if type(value) in (int, float) and 0 <= value < float("inf") else 0


def touched_refs(tool: "Any", base: str, project: str, folders: "Sequence[str]") -> "List[str]":
    """The discoveries that a tool's input touched. `folders`: where they are, below the project.

    A path counts when it lies in one of the folders, by its name or by the disk's links; a shell
    command when it mentions the last two names of a folder and a file.
    """
    if isinstance(tool, str):  # one host hands over the input as JSON text
        tool = loads_object(encoded(tool))
    found: "List[str]" = []
    tool = tool if isinstance(tool, dict) else {}
    paths = [path for path in map(tool.get, PATH_KEYS)
             if isinstance(path, str) and "\0" not in path]
    command = tool.get("command")
    if isinstance(command, list):
        command = " ".join(word for word in command if isinstance(word, str))
    for folder in folders:
        for path in paths:
            ref = touched_ref(path, base, project, folder)
            if not ref and os.path.basename(folder.rstrip("/")) in path:
                # The same folder by another way: on a Mac, /tmp is /private/tmp.
                ref = touched_ref(real_path(base, path), "/", real_path(project, ""), folder)
            found.append(ref)
        if isinstance(command, str):
            found += mentioned_refs(command, folder)
    return newest_refs(found)


def real_path(base: str, path: str) -> str:
    """A path without the disk's symbolic links, whatever the locale."""
    return decoded(os.path.realpath(encoded(os.path.join(base, path))))


def touched_ref(path: str, base: str, project: str, folder: str) -> str:
    """The discovery that a path stands for, "" if it lies elsewhere. No disk is asked.

    `base`: the absolute folder that a relative path starts from. Windows paths have no case.
    """
    if project[1:2] == ":" or project[:2] == "\\\\":
        import ntpath as rules
    else:
        import posixpath as rules  # type: ignore[no-redef]
    inside = rules.normcase(rules.normpath(rules.join(project, folder))) + rules.sep
    path = rules.normpath(rules.join(base, path))
    stem = rules.splitext(rules.basename(path))[0]
    return stem if rules.normcase(path).startswith(inside) and fits(stem, REF) else ""


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


def instant(text: "Any") -> float:
    """Seconds since 1970 of an ISO 8601 date and time (README, Contract 1), or ValueError."""
    if not isinstance(text, str):
        raise ValueError("no text")
    from datetime import datetime
    at, rest, east = text[:19], text[19:], 0
    if rest[-1:] == "Z":
        rest = rest[:-1]
    elif rest[-6:-5] in ("+", "-"):
        hours, minutes = int(rest[-5:-3]), int(rest[-2:])
        if rest[-5:] != "%02d:%02d" % (hours, minutes) or hours > 23 or minutes > 59:
            raise ValueError("no zone")
        east, rest = int(rest[-6] + "60") * (60 * hours + minutes), rest[:-6]
    year, month, day, hour, minute, second = (
        int(at[start:start + (2 if start else 4)]) for start in (0, 5, 8, 11, 14, 17))
    moment = datetime(year, month, day, hour, minute, second)
    if moment.isoformat() != at or (rest and (rest[0] != "." or digits(rest[1:], 9) < 0)):
        raise ValueError("no date and time")
    return (moment - datetime(1970, 1, 1)).total_seconds() + float(rest or 0) - east


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
    if rule != "moment":
        return fits(value, rule)
    try:
        return bool(instant(value)) or True
    except ValueError:
        return False


def as_sent(event: "Dict[str, Any]") -> bytes:
    """The JSON of an event, without blanks. No rule of FIELDS allows what JSON would escape."""
    def text(value: "Any") -> str:
        if isinstance(value, list):
            return "[%s]" % ",".join(map(text, value))
        return "null" if value is None else ('"%s"' if isinstance(value, str) else "%d") % value

    return ("{%s}" % ",".join('"%s":%s' % (name, text(event[name])) for name in event)).encode()


def spool_name(ended: int, session: str, failed: int = 0) -> bytes:
    """A waiting event's name, always the same: ms, start of the session's hash, failed sendings."""
    return b"%015d-%s%s.json" % (max(0, ended), session[:12].encode(),
                                 b"-%d" % min(failed, 999) if failed else b"")


def name_parts(name: bytes) -> "Optional[Tuple[int, int, str]]":
    """(failed sendings, ms, chance) of a waiting event's name, as they wait; None if it is none."""
    import re
    found = re.fullmatch(rb"([0-9]{15})-([0-9a-f]{12})(?:-([0-9]{1,3}))?\.json", name)
    return (int(found[3] or 0), int(found[1]), found[2].decode()) if found else None


def is_leftover(name: bytes) -> bool:
    """True for what `write_whole` names a file that is not whole yet."""
    return fits(name.decode("latin-1"), r"\.[0-9a-f]{16}\.tmp")


def is_session(name: bytes) -> bool:
    """True for what `session_name` makes."""
    return fits(name.decode("latin-1"), "([0-9a-f]{2}){1,120}|long-[0-9a-f]{64}")


def session_name(session: str) -> bytes:
    """The name of a session's file: the raw id in hex, which spares a hash, where that fits."""
    data = encoded(session)
    return (data.hex() if len(data) <= 120 else "long-" + sha256_hex(session)).encode()


def verdict(status: int, body: bytes) -> str:
    """What an answer says of an event: "arrived", "given up" or "waits" (README, Contract 6)."""
    if status == 202 or (200 <= status < 300 and loads_object(body).get("ok") is True):
        return "arrived"
    return "given up" if status in (400, 413, 422) else "waits"


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


def expired(names: "Sequence[bytes]", now: float) -> "Set[bytes]":
    """Of waiting events, those that may wait no longer. A clock that was ahead ages none."""
    young = [name for name in sorted(names) if now - int(name[:15]) / 1000 <= WAITING_DAYS * DAY_S]
    return set(names).difference(young[-WAITING_EVENTS:])


# ==================================================================================================
# Spool: files in the home
# ==================================================================================================


def contents(path: bytes, most: int = FILE_BYTES, flags: int = 0) -> bytes:
    """A file's bytes, as far as one more than `most`. OSError if it cannot be read."""
    fd = os.open(path, os.O_RDONLY | SAFELY | flags)
    try:
        found = piece = os.read(fd, most + 1)
        while piece and len(found) <= most:
            piece = os.read(fd, most + 1 - len(found))
            found += piece
        return found
    finally:
        os.close(fd)


def object_at(path: bytes) -> "Dict[str, Any]":
    """The JSON object in a file; {} for whatever else may be there, or not."""
    try:
        return loads_object(contents(path))
    except OSError:
        return {}


def names_in(home: bytes, folder: bytes) -> "List[bytes]":
    """The sorted names in one of our folders; [] if it is not there, or a symbolic link."""
    try:
        return sorted(os.listdir(own(home, folder)))
    except OSError:
        return []


def own(home: bytes, folder: bytes, make: bool = False) -> bytes:
    """The path of one of our folders. OSError if it, or what it is in, is a symbolic link.

    Only the product's own folder may be one: that is how a person keeps it elsewhere.
    """
    for path in ([OURS, folder] if folder != HOME else []):
        if os.path.islink((home + path)[:-1]):
            raise OSError(40, "a folder of emit.py is a symbolic link")
    if make:
        os.makedirs(home + folder, 0o700, exist_ok=True)
    return home + folder


def remove(path: bytes) -> bool:
    """Delete; True if it existed."""
    try:
        os.unlink(path)
        return True
    except OSError:
        return False


def sync(path: bytes) -> None:
    """Ask the disk to keep a file or folder through a power cut; some systems cannot be asked."""
    try:
        fd = os.open(path, os.O_RDONLY | SAFELY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError:
        pass


def write_whole(path: bytes, data: bytes, mode: int = 0o600, fresh: bool = False) -> None:
    """Whoever looks finds at `path` what was there before, or all of `data`.

    `fresh`: FileExistsError if something was. OSError if it cannot be written; nothing stays then.
    """
    temporary = temporary_name(os.path.dirname(path))
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | SAFELY, mode)
        try:
            if os.write(fd, data) < len(data):
                raise OSError(28, "no room")
            if mode != 0o600:
                os.chmod(temporary, mode)  # whatever the umask
        finally:
            os.close(fd)
        if fresh and hasattr(os, "link"):
            os.link(temporary, path)
        else:
            os.replace(temporary, path)
    finally:
        remove(temporary)


def temporary_name(folder: bytes) -> bytes:
    """The path of a file that is not whole yet."""
    return b"%s/.%s.tmp" % (folder, os.urandom(8).hex().encode())


def machine_id(home: bytes, make: bool = True) -> str:
    """The machine's random name, made on first use; "" if there is none and none is to be made.

    OSError if it cannot be kept, Told if its file is empty.
    """
    path = home + MACHINE_ID
    if make and not os.path.lexists(path):
        try:
            own(home, HOME, make=True)
            write_whole(path, random_uuid().encode(), fresh=True)
        except FileExistsError:  # another session was quicker
            pass
    try:
        name = decoded(contents(path)).strip()
    except FileNotFoundError:
        return ""
    if not name:
        raise Told(HOME_FOLDER + "/machine-id is empty: remove it")
    return name


def append(home: bytes, session: str, lines: "Sequence[str]", most: int = SESSION_BYTES) -> None:
    """Add whole lines to a session's file, in one write. OSError if they cannot be kept.

    Lines of writers at the same moment do not mix: O_APPEND. The blank line in front keeps what a
    full disk cut short from spoiling the next line. `most`: bytes that the file may have had.
    """
    path = own(home, SESSIONS, make=True) + session_name(session)
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | NO_LINK | SAFELY, 0o600)
    try:
        if os.fstat(fd).st_size > most:
            raise OSError(27, "the session's file is full")
        data = ("\n%s\n" % "\n".join(lines)).encode("latin-1")
        if os.write(fd, data) < len(data):
            raise OSError(28, "no room")
    finally:
        os.close(fd)


def session_data(home: bytes, name: bytes) -> bytes:
    """A session's file, b"" for whatever else may be there, or not."""
    try:
        return contents(own(home, SESSIONS) + name, SESSION_BYTES + 4096, NO_LINK)
    except OSError:
        return b""


def end_session(home: bytes, session: str, ended: int, calls: "Optional[int]",
                tokens: int) -> "Optional[Part]":
    """Append an end, and return the part that is this end's; None if it brings nothing new.

    `ended`: ms since 1970; `calls`, `tokens`: of stats.json. Where the file cannot be written, the
    end is added to what it holds, and only the claim against others is lost.
    """
    token = os.urandom(4).hex()
    line = "end %d %s %s %d" % (ended, token, "-" if calls is None else calls, tokens)
    missing = ""
    try:
        append(home, session, [line])
    except OSError:
        missing = "\n" + line
    record = Record(session_data(home, session_name(session)) + missing.encode())
    return next((part for part in record.parts if part.token == token), None)


def waiting(home: bytes) -> "List[bytes]":
    """The waiting events' names, in the order in which they are sent. Others are left alone."""
    return sorted(filter(name_parts, names_in(home, PENDING)), key=name_parts)  # type: ignore


def purge(home: bytes) -> int:
    """Delete what waits and what was noted, for a person who said no; how many files that was.

    Only names that this program makes go, and only in folders that are no symbolic links.
    """
    gone = 0
    for folder, is_ours in ((PENDING, name_parts), (SESSIONS, is_session)):
        for name in names_in(home, folder):
            if is_ours(name) or is_leftover(name):
                gone += remove(home + folder + name)
    if names_in(home, OURS):
        remove(home + LAST)
    return gone


def expire(home: bytes, now: float) -> None:
    """Remove what may wait no longer, but nothing that another version of the program wrote."""
    for name in expired(waiting(home), now):
        if not unknown_keys(object_at(home + PENDING + name)):
            remove(home + PENDING + name)


def sweep(home: bytes, env: "Dict[str, str]", machine: str) -> None:
    """Capture the sessions that fell silent without an end; remove what is old or half-written."""
    now = time.time()
    for folder in (HOME, OURS, PENDING, SESSIONS):
        for name in names_in(home, folder):
            path = home + folder + name
            try:
                age = now - os.lstat(path).st_mtime
                over = is_leftover(name) and age > LEFTOVER_S
                if folder == SESSIONS and is_session(name) and age > DAY_S:
                    over = not settle(home, env, machine, name) and age > SESSION_DAYS * DAY_S
                if over:
                    remove(path)
            except OSError:  # gone by itself, or no room: the next session's end tries again
                pass


def settle(home: bytes, env: "Dict[str, str]", machine: str, name: bytes) -> bool:
    """Capture ends that never came, or whose event a kill prevented; True if there was any."""
    data = session_data(home, name)
    if not data or data.endswith(b"\nsettled\n") or name[:5] == b"long-":
        return False  # each file is read once; and a hash does not tell the id
    record, session = Record(data), decoded(bytes.fromhex(name.decode()))
    if session[:5] == "ppid:":  # its parent may have been the shell of one call
        return False
    if record.calls or record.refs:
        stats = counts(object_at(home + HOME + b"stats.json"), {}, [session], time.time())
        end_session(home, session, record.last, *stats)
        record = Record(session_data(home, name))
    missing = [part for part in record.parts if part.token not in record.kept]
    for part in missing:
        keep(home, part, compose(env, home, machine, session, part))
    append(home, session, ["kept " + part.token for part in missing] + ["settled"])
    return bool(missing)


def keep(home: bytes, part: Part, event: "Dict[str, Any]") -> bytes:
    """Put a part's event into the spool; its path there. OSError if it cannot be kept."""
    path = own(home, PENDING, make=True) + spool_name(part.ended, event["session_id_hash"])
    write_whole(path, as_sent(event))
    return path


# ==================================================================================================
# Capture
# ==================================================================================================


def track(argv: "Sequence[str]") -> int:
    """Record a tool call and the discoveries that it touched (a hook, which never fails).

    Or, by hand, the discoveries named.
    """
    env = environment()
    directory, _, folders, named = options(argv)
    refs = list(named)
    try:
        if refs and not all(fits(ref, REF) for ref in refs):
            return complain("a discovery's name is a letter or digit, then at most 127 of those "
                            "and . _ : -", 2)
        allowed, why = consent(env, telemetry_said(home_of(env)))
        if not allowed:
            said = "not recorded: consent is off: " + why
            return complain(said) if refs else say(env, said)
        by_hand = refs and any(env.get(name, "").strip() for name in SESSION_VARIABLES)
        caller = Caller(env, directory, b"" if by_hand else standard_input())
        now = "%d" % (time.time() * 1000)
        # Without an id each call would look like a session of its own.
        lines = ["call " + now] if caller.session and caller.hook and not refs else []
        if not refs:
            tool = next(filter(None, map(caller.hook.get, INPUT_KEYS)), None)
            refs = touched_refs(tool, caller.base, caller.project, folders or [DISCOVERIES])
        lines += ["touch %s %s" % (now, ref) for ref in refs]
        if lines:
            session = caller.session or caller.session_id(machine_id(caller.home))
            append(caller.home, session, lines, SESSION_BYTES // 2)
        return say(env, "consent is on: %s; lines recorded: %d" % (why, len(lines)))
    except BaseException as error:
        said = "could not be recorded: " + reason(error)
        return complain(said, 1) if named else say(env, said + place_of(error))


def compose(env: "Dict[str, str]", home: bytes, machine: str, session: str,
            part: Part) -> "Dict[str, Any]":
    """The event of a part (README, Contract 1 and 4), without the commit."""
    login = github_login(object_at(home + HOME + b"pro-token-cache.json"))
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
                      for name in (b"stats.json", b"last-project.json"))
    bucket = stats_bucket(caller.ppid, caller.env.get("HOME", ""))
    return counts(stats, project, [session, bucket], time.time())


def parent_started(ppid: int) -> str:
    """When a process started, in its system's own words; "" where nobody can tell."""
    try:
        fields = contents(b"/proc/%d/stat" % ppid, 4096).rpartition(b")")[2].split()
        return fields[19].decode()  # the 22nd of all, in ticks since the system started
    except (OSError, IndexError):
        return printed_by(["ps", "-o", "lstart=", "-p", str(ppid)], b"/", {"LC_ALL": "C"})


def branch_sha(project: str) -> "Optional[str]":
    """The commit of a folder. A hostile repository runs nothing: no hooks, fetching, prompts."""
    folder = encoded(project)
    up, last = folder, b""
    while not any(os.path.exists(os.path.join(up, name)) for name in (b".git", b"HEAD")):
        up, last = os.path.dirname(up), up
        if up == last:  # not in a repository: git costs more than all else
            return None
    sha = printed_by(["git", "rev-parse", "--short=12", "HEAD"], folder, {
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
    userinfo, _, host = parts.netloc.rpartition("@")
    bare = "%s://%s%s" % (parts.scheme, host, parts.path or "/")
    return (bare + "?" + parts.query if parts.query else bare,
            "Basic " + b64encode(unquote_to_bytes(userinfo)).decode() if userinfo else "",
            bare + "?..." if parts.query else bare)


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
    trace, found = error.__traceback__, ""
    while trace:
        code = trace.tb_frame.f_code
        if code.co_filename == poster.__code__.co_filename:
            found = " (in %s, line %d)" % (code.co_name, trace.tb_lineno)
        trace = trace.tb_next
    return found


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
    proxies = u.ProxyHandler(u.getproxies_environment())
    for way in (proxies, u.HTTPHandler(), u.HTTPSHandler(), u.UnknownHandler()):
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


def attempt(post: "Post", data: bytes) -> "Tuple[str, str, int, Optional[str]]":
    """(verdict, in words, status or 0, Retry-After) of one event that is sent."""
    from http.client import HTTPException
    try:
        status, after, body = post(data)
    except (OSError, ValueError, HTTPException) as error:
        return "waits", "without an answer (%s)" % reason(error), 0, None
    return verdict(status, body), "answered %d" % status, status, after


def attempt_file(post: "Post", home: bytes, name: bytes) -> "Tuple[str, int, Optional[str]]":
    """Send one waiting event: (what happened in words, status if it failed, Retry-After).

    The status is 0 if nobody answered, and DONE if nothing failed. The event goes when it has
    arrived, is given up on, or is no event. One that fails goes behind the others; one that another
    version of the program wrote stays. OSError if it is not there.
    """
    path = home + PENDING + name
    data = contents(path, EVENT_BYTES, NO_LINK)
    event = loads_object(data) if len(data) <= EVENT_BYTES else {}
    if unknown_keys(event):
        return "left to another version of emit.py", DONE, None
    if not is_event(event):
        remove(path)
        return "removed, being no event", DONE, None
    result, text, status, after = attempt(post, data)
    if result != "waits":
        remove(path)
        return text, DONE, None
    failed, ended, chance = name_parts(name) or (0, 0, "")
    try:
        os.rename(path, home + PENDING + spool_name(ended, chance, failed + 1))
    except OSError:  # answered by another sender
        pass
    return text, status, after


class Sender:
    """Sends what waits, and keeps how that went.

    `stop`: why nothing is sent, or no more; `seen`: how the names of tried events begin.
    """

    def __init__(self, home: bytes, env: "Dict[str, str]") -> None:
        self.home, self.env = home, env
        self.seen: "Set[bytes]" = set()
        url, authorization, shown = checked_url(endpoint(env)[0])
        self.key = sha256_hex(url)[:16]
        self.wishes = wishes_at(home)
        self.stop = withdrawn(home, env)
        if self.key in self.wishes and not self.stop:
            self.stop = "the server asked for nothing before " + iso(self.wishes[self.key])
        if self.stop:
            say(env, "nothing sent; " + self.stop)
            return
        say(env, "sending to %s, for 20 s at most: if no line follows, time ran out" % shown)
        self.post = poster(url, authorization)

    def flush(self, own_name: bytes) -> None:
        """Send what waits, until there is no more, or the server or the person says stop.

        Other sessions' events are left alone while their own child may still add the commit.
        """
        while not self.stop:
            # Listed without the lock: whoever did not get it must be seen after it is free again.
            fresh = [name for name in waiting(self.home) if name[:28] not in self.seen]
            ready = [name for name in fresh if name == own_name
                     or not 0 <= time.time() - int(name[:15]) / 1000 < COMMIT_S]
            if not fresh:
                return
            if not ready:
                time.sleep(0.05)
                continue
            fd = lock(self.home)
            if fd is None:
                say(self.env, "another sender is at work, and takes this event along")
                return
            self.round(ready)
            os.close(fd)

    def round(self, names: "Sequence[bytes]") -> None:
        """Send these, in this order, and keep how it went."""
        self.record(BEGAN)
        tally: "Dict[str, int]" = {}
        failures = 0
        for name in names:
            self.stop = withdrawn(self.home, self.env)
            if self.stop:
                break
            self.seen.add(name[:28])
            try:
                text, status, after = attempt_file(self.post, self.home, name)
            except OSError:  # another sender was quicker, or it cannot be read
                continue
            tally[text] = tally.get(text, 0) + 1
            retry = retry_at(after, time.time())
            failures += status != DONE
            if retry:
                self.wishes[self.key] = retry
            if retry or status in (0, 429, 503) or failures == FAILED_ANSWERS:
                self.stop = "stopped until " + iso(retry) if retry else "stopped"
                break
        counted = ["%d %s" % (n, text) for text, n in tally.items()]
        result = ", ".join(counted + [self.stop] * bool(self.stop))
        if not withdrawn(self.home, self.env):
            self.record(result)
        say(self.env, result)

    def record(self, result: str) -> None:
        """Keep how the sending went, for `status`, and when servers want to be asked again."""
        import json
        last = {"at": iso(time.time()), "result": result, "retry_at": self.wishes}
        try:
            write_whole(own(self.home, OURS, make=True) + b"last.json", json.dumps(last).encode())
        except OSError:  # a full disk must not keep from sending
            pass


def wishes_at(home: bytes) -> "Dict[str, float]":
    """When servers want to be asked again, by endpoint; not what a clock that was ahead wrote."""
    kept, now = object_at(home + LAST).get("retry_at"), time.time()
    wishes = kept.items() if isinstance(kept, dict) else ()
    return {key: at for key, at in wishes if type(at) is float and 0 < at - now <= DAY_S}


def lock(home: bytes) -> "Optional[int]":
    """A descriptor that holds a lock until it is closed or its process dies; None: others have it.

    Where a system has no locks everybody gets it. That is safe: the server takes an event once.
    """
    path = own(home, OURS, make=True) + b"flush.lock"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | NO_LINK | SAFELY, 0o600)
    try:
        import fcntl
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        os.close(fd)
        return None
    except (ImportError, OSError):
        pass
    return fd


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
        directory, asked, _, rest = options(argv)
        off = withdrawn(home_of(env), env)
        if off:
            return say(env, off)
        caller, wait = Caller(env, directory, standard_input()), wait_of(env, asked)
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
        end(caller, wait, pipe, "; arguments ignored: see --help" if rest else "")
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
    home, env, path = caller.home, caller.env, b""
    machine = machine_id(home)
    session = caller.session_id(machine)
    part = end_session(home, session, int(time.time() * 1000), *caller_counts(caller, session))
    event = compose(env, home, machine, session, part) if part else None
    result = "captured" if part else "nothing new since this session's last end, so no event"
    try:
        path = keep(home, part, event) if part and event else b""
    except OSError as error:
        result += ", but not kept (%s)" % reason(error)
    if pipe >= 0:
        let_go(pipe, bool(wait), debugging(env))
    leave_in(LIFE_S if pipe >= 0 else (wait or WAIT_S))
    # Not before: a standard error that nobody reads may hold its writer for good.
    say(env, "consent is on" + note)
    say(env, result)
    if part and event:
        event["branch_sha"] = branch_sha(caller.project)
        try:
            if path and event["branch_sha"] and os.path.exists(path):
                write_whole(path, as_sent(event))
            if path:
                for kept in (path, os.path.dirname(path), home + MACHINE_ID):
                    sync(kept)
                append(home, session, ["kept " + part.token])
        except OSError as error:  # the event waits as it is
            say(env, "the commit could not be added: " + reason(error))
    sender, own_name = Sender(home, env), os.path.basename(path)
    if event and not path and not sender.stop:
        say(env, "the event that is not kept: 1 " + attempt(sender.post, as_sent(event))[1])
    elif path and wait and not sender.stop:  # before what waits
        sender.round([own_name])
    if pipe >= 0 and wait:
        os.close(pipe)
    if not withdrawn(home, env):
        if object_at(home + LAST).get("result") == BEGAN:  # cut off, and so never came to this
            expire(home, 0.0)  # by number alone: a wrong clock must not age what was not tried
        sweep(home, env, machine)
        sender.flush(own_name)
        expire(home, time.time())


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


def leave_in(seconds: float) -> None:
    """End this process when its time is over, wherever it hangs: a name look-up has no limit."""
    from threading import Timer
    timer = Timer(seconds, os._exit, [0])
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


def hooks(argv: "Sequence[str]") -> int:
    """Print the configuration of a host; on standard error where it goes."""
    import json
    from shlex import quote
    if not argv or argv[0] not in HOSTS or (argv[1:] and (argv[1] != "--folder" or len(argv) != 3)):
        return complain("hooks takes %s; then --folder TEXT or nothing" % " or ".join(HOSTS), 2)
    folder, name = os.path.split(os.path.abspath(__file__))
    module = os.path.splitext(name)[0]
    start = [sys.executable or "python3", "-I", "-S", "-c", START % (module, module), folder]
    if len(argv) == 3:
        start[0], start[-1] = "python3", argv[2]
    events, where = HOSTS[argv[0]]
    words = [quote(start[0]), *start[1:4], '"%s"' % start[4], quote(folder)]
    if len(argv) == 3:  # as it stands: the host or its shell puts the folder in
        words[-1] = argv[2] if '"' in argv[2] or "'" in argv[2] else '"%s"' % argv[2]
    command = " ".join(words)
    entries = {event: [{"hooks": [{"type": "command", "command": command + more}]}]
               for event, more in events}
    print(json.dumps({"hooks": entries}, indent=2) if events
          else OPENCODE % json.dumps(start, indent=2), end="\n" if events else "")
    complain("goes to %s Keep what is there already. Set no `timeout`: its unit differs." % where)
    return 0


# ==================================================================================================
# Commands
# ==================================================================================================


def show(argv: "Sequence[str]") -> int:
    """Print the event as it would be sent now; where to, and what is made up, on standard error."""
    directory, wait, folders, rest = options(argv)
    if rest or folders or wait is not None:
        return complain("show takes --dir DIR and nothing else; see emit.py --help", 2)
    env = environment()
    allowed, why = consent(env, telemetry_said(home_of(env)))
    caller = Caller(env, directory, standard_input())
    known = machine_id(caller.home, make=False)
    machine = known or random_uuid()
    session = caller.session_id(machine)
    calls, tokens = caller_counts(caller, session)
    line = "\nend %d now %s %d" % (time.time() * 1000, "-" if calls is None else calls, tokens)
    record = Record(session_data(caller.home, session_name(session)) + line.encode())
    part = next((part for part in record.parts if part.token == "now"), None)
    if part:
        event = compose(env, caller.home, machine, session, part)
        event["branch_sha"] = branch_sha(caller.project) if allowed else None
        print(as_sent(event).decode())
    else:
        complain("no event: this session has ended %d times, and nothing is new since the last"
                 % len(record.parts))
    complain("goes to: " + shown_endpoint(env))
    if not allowed:
        complain("but nothing is sent, nor git asked for the commit: consent is off: " + why)
    if not known:
        complain("there is no machine-id yet: identity_hash is that of a passing one")
    return 0


def shown_endpoint(env: "Dict[str, str]") -> str:
    """Where it goes, without credentials."""
    try:
        return checked_url(endpoint(env)[0])[2]
    except ValueError as error:
        return "nowhere: " + str(error)


def obstacle(home: bytes, allowed: bool) -> str:
    """Why nothing can be captured, or "". It tries to write, but not without consent."""
    try:
        machine_id(home, make=False)
        if allowed:
            for folder in (HOME, PENDING, SESSIONS):
                probe = temporary_name(own(home, folder, make=True)[:-1])
                write_whole(probe, b"x" * 4096)
                remove(probe)
    except (OSError, ValueError) as error:
        return "%s cannot be used: %s" % (HOME_FOLDER, reason(error))
    return ""


def status(argv: "Sequence[str]") -> int:
    """Print consent, endpoint, what waits, the last result, for people or (--json) programs."""
    import json
    if argv and list(argv) != ["--json"]:
        return complain("status takes --json and nothing else; see emit.py --help", 2)
    env = environment()
    home = home_of(env)
    allowed, why = consent(env, telemetry_said(home))
    names, last, fault = waiting(home), object_at(home + LAST), obstacle(home, allowed)
    at, result = last.get("at"), last.get("result")
    since = iso(int(min(names)[:15]) / 1000) if names else None
    set_url, chosen_by = endpoint(env)
    url, again = shown_endpoint(env), 0.0
    if url[:7] != "nowhere":
        again = wishes_at(home).get(sha256_hex(checked_url(set_url)[0])[:16], 0.0)
    until = iso(again) if again else None
    if argv:
        print(json.dumps({
            "consent": {"on": allowed, "decided_by": why},
            "capture": {"possible": not fault, "fault": fault or None},
            "endpoint": {"url": url, "decided_by": chosen_by},
            "waiting": {"events": len(names), "since": since},
            "last_flush": {"at": at, "result": result, "retry_at": until} if last else None,
        }))
    else:
        print("consent   %s: %s" % ("on" if allowed else "off", why))
        print("capture   " + ("impossible: " + fault if fault else "possible"))
        print("endpoint  %s (%s)" % (url, chosen_by))
        print("waiting   events: %d%s" % (len(names), ", since " + since if since else ""))
        print("last run  %s" % (ascii("%s: %s" % (at, result))[1:-1] if last else "none yet"))
        if until:
            print("retry     the server wants to be asked again at " + until)
    return 1 if fault else 0


def mine(argv: "Sequence[str]") -> int:
    """Print what this machine is called in each quarter, newest last, since machine-id was made."""
    if argv:
        return complain("mine takes nothing; see emit.py --help", 2)
    home = home_of(environment())
    machine = machine_id(home, make=False)
    if not machine:
        return complain("there is no machine-id, so nothing was ever captured here", 1)
    login = github_login(object_at(home + HOME + b"pro-token-cache.json"))
    now = time.time()
    made = min(now, max(os.stat(home + MACHINE_ID).st_mtime, instant("2020-01-01T00:00:00Z")))
    days = range(int(made // DAY_S), int(now // DAY_S) + 1)
    for quarter in dict.fromkeys(salt(day * DAY_S) for day in days):
        print("%s identity_hash %s%s" % (quarter[5:], sha256_hex(machine + quarter),
              " github_hash " + sha256_hex(login + quarter) if login else ""))
    return 0


def switch(argv: "Sequence[str]", value: str) -> int:
    """Write the person's word into config.json, all else in it kept."""
    import json
    if argv:
        return complain("on and off take nothing; see emit.py --help", 2)
    env = environment()
    home = home_of(env)
    path, mode = os.path.realpath(home + HOME + b"config.json"), 0o600
    config: "Dict[str, Any]" = {}
    gone = purge(home) if value == "off" else 0
    try:
        if os.path.lexists(path):
            config, mode = dict(loads(contents(path)).items()), os.stat(path).st_mode & 0o777
        before = config.get("telemetry")
        data = json.dumps(dict(config, telemetry=value), indent=2, allow_nan=False).encode() + b"\n"
    except (ValueError, AttributeError, RecursionError):
        word = "off" if value == "off" else "on"
        return complain("%s/config.json is not a JSON object, and is left alone: mend it, or set "
                        "%sTELEMETRY=%s" % (HOME_FOLDER, PREFIX, word), 1)
    if before != value:
        own(home, HOME, make=True)
        write_whole(path, data, mode)
        sync(path)
    if value == "off":
        gone += purge(home)  # of a session that ended meanwhile
        print("off: nothing is collected or sent any more; files deleted: %d" % gone)
    else:
        print(COLLECTED % shown_endpoint(env) if before != value else "on, as before")
    allowed, why = consent(env, value)
    if allowed != (value == "opt-in"):
        complain("but still off here: " + why)
    return 0


COMMANDS: "Dict[str, Callable[[Sequence[str]], int]]" = {
    "show": show,
    "status": status,
    "mine": mine,
    "hooks": hooks,
    "on": lambda argv: switch(argv, "opt-in"),
    "off": lambda argv: switch(argv, "off"),
}


def command(argv: "Sequence[str]") -> int:
    """The exit status of a command other than the hooks."""
    try:
        if "--help" in argv or "-h" in argv:
            print((__doc__ or "").replace("~/.ashlr", HOME_FOLDER).replace("ASHLR_", PREFIX))
            code = 0
        elif argv[0] == "--version":
            print("emit.py " + VERSION)
            code = 0
        elif argv[0] in COMMANDS:
            code = COMMANDS[argv[0]](argv[1:])
        else:
            code = complain("no such command; see emit.py --help", 2)
        if sys.stdout:
            sys.stdout.flush()  # before `run` leaves
        return code
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
    if not {"--help", "-h", "--version"}.intersection(argv):
        if not argv or argv[0][:1] == "-":
            return hook(argv)
        if argv[0] == "track":
            return track(argv[1:])
    return command(argv)


def run() -> None:
    """`main` for a process: out at once afterwards, without the interpreter's tidying-up."""
    folder = os.path.dirname(os.path.abspath(__file__))
    if folder in map(os.path.abspath, sys.path[:1]):  # a json.py beside this file is not Python's
        del sys.path[0]
    os._exit(main(sys.argv[1:]))


if __name__ == "__main__":
    run()
