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
standard output, exits 0, and is gone in milliseconds: the sender goes on alone, for 20 s at the most. What cannot be
sent waits in ~/.ashlr/session-events/pending/ (at most 500 events and 30 days) for the next session's end.
--wait does everything in the foreground within MS milliseconds (500). ASHLR_TELEMETRY_DEBUG=1 says on standard error
what a hook run did. Exit status: 0 done, 1 could not be done, 2 wrong usage (commands only).
"""
# Sections: facts, consent, identity, session, payload (pure) - disk, caller, sending (edges) - commands.
#
# Every run compiles this file and pays for every import, so the two hooks import nothing until the caller is gone:
# measured with -I -S, `import os` costs up to 0.25 of a bare start, `import json` as much as the start itself, and
# leaving without the interpreter's tidying-up wins 0.15 back.
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os as system
    from typing import Any, Callable, Dict, List, NoReturn, Optional, Sequence, Tuple
else:  # os where it is loaded already; else the built-in module beneath it, which always is
    system = sys.modules.get("os") or sys.modules.get("posix") or __import__("os")


# ======================================================================================================
# Facts (CONTRACT sections 1, 4, 5, 6)
# ======================================================================================================

DEFAULT_SERVER = "http://127.0.0.1:8787"
ENDPOINT_PATH = "/v1/session-events"
EVENT_BYTES = 64 * 1024
MAX_CALLS, MAX_TOKENS, MAX_REFS = 1000000, 1000000000, 200

LIFE_S = 20.0  # of the sender, whatever the network does
FOREGROUND_MS = 500.0  # of a run that cannot leave its caller, or was asked to --wait
ANSWER_S = 10.0  # for each step of one request
GIT_S = 0.25
INPUT_FIRST_S, INPUT_WHOLE_S = 0.25, 1.0  # for the hook's JSON to begin, and to end
INPUT_BYTES = 64 << 20
WAITING_EVENTS, WAITING_MS = 500, 30 * 86400 * 1000
LIST_S, LEFTOVER_S = 7 * 86400, 3600  # a touched list, a temporary file that a kill left behind
RETRY_S = 86400  # the longest Retry-After that is believed
FAILED_ANSWERS = 3  # in one run, before the server is left in peace

DIGITS = "0123456789"
HEX = DIGITS + "abcdef"
ALNUM = DIGITS + "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
BLANKS = " \t\n\r"  # of JSON
UNCLEAR = object()  # what a config.json says that cannot be read
DISCOVERIES = "/.ashlrcode/genome/sections/discoveries/"

COLLECTED = """\
Collected when a session ends: its time, number of tool calls, tokens saved, commit, touched discoveries, version.
Never: names, paths, code, prompts. Who and which session are one-way hashes that change with every quarter.
It goes to %s.
To stop: emit.py off (also deletes what waits). To see an event before it goes: emit.py show."""


# ======================================================================================================
# Consent
# ======================================================================================================


def consent(env: "Dict[str, str]", said: "Any") -> "Tuple[bool, str]":
    """(may it be sent, what decided): CONTRACT section 5. `said`: "telemetry" of config.json, None if not there."""
    asked = env.get("ASHLR_TELEMETRY", "").strip().lower()
    for holds, answer, why in (
        (env.get("DO_NOT_TRACK", "").strip() not in ("", "0"), False, "DO_NOT_TRACK is set"),
        (asked in ("off", "0"), False, "ASHLR_TELEMETRY says off"),
        (said == "off", False, "~/.ashlr/config.json says off"),
        (asked in ("on", "1"), True, "ASHLR_TELEMETRY says on"),
        (said == "opt-in", True, "~/.ashlr/config.json says opt-in"),
        (said is UNCLEAR, False, "~/.ashlr/config.json is not a readable JSON object, and nobody else said yes"),
    ):
        if holds:
            return answer, why
    return False, "nobody said yes (emit.py on does)"


def endpoint(env: "Dict[str, str]") -> "Tuple[str, str]":
    """(URL, what decided): CONTRACT section 6. The URL is as it was set: see `checked_url`."""
    whole, base = env.get("ASHLR_SESSION_EVENTS_URL", "").strip(), env.get("ASHLR_API_URL", "").strip()
    if whole:
        return whole, "ASHLR_SESSION_EVENTS_URL"
    if base:
        return base.rstrip("/") + ENDPOINT_PATH, "ASHLR_API_URL"
    return DEFAULT_SERVER + ENDPOINT_PATH, "the default"


def checked_url(url: str) -> "Tuple[str, str, str]":
    """(URL to ask, value for Authorization or "", text to print). ValueError, without the URL, if not http(s)."""
    from base64 import b64encode
    from urllib.parse import unquote_to_bytes, urlsplit, urlunsplit
    if not shaped(url, "".join(map(chr, range(33, 127))), 1, 4096):
        raise ValueError("the endpoint has blanks or other characters that no URL has")
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise ValueError("the endpoint is not a http:// or https:// URL")
    userinfo, _, host = parts.netloc.rpartition("@")
    basic = "Basic " + b64encode(unquote_to_bytes(userinfo)).decode() if userinfo else ""
    shown = "%s://%s%s%s" % (parts.scheme, host, parts.path, "?..." if parts.query else "")
    return urlunsplit((parts.scheme, host, parts.path or "/", parts.query, "")), basic, shown


# ======================================================================================================
# Identity
# ======================================================================================================


def encoded(text: str) -> bytes:
    """UTF-8, whatever the text: undecodable bytes of the environment come out as they went in."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


def sha256_hex(text: str) -> str:
    """64 lowercase hex digits."""
    from hashlib import sha256
    return sha256(encoded(text)).hexdigest()


def salt(seconds: float) -> str:
    """`salt_2026Q4`: the UTC quarter of a time in seconds since 1970 (CONTRACT section 4)."""
    from time import gmtime
    year, month = gmtime(seconds)[:2]
    return "salt_%dQ%d" % (year, (month + 2) // 3)


def github_login(cache: "Any") -> "Optional[str]":
    """The login in pro-token-cache.json's value, or None: never guessed."""
    login = cache.get("githubLogin") if isinstance(cache, dict) and cache.get("valid") is True else None
    return login if isinstance(login, str) and login.strip() else None


# ======================================================================================================
# Session
# ======================================================================================================


def session_id(env: "Dict[str, str]", hook: "Dict[str, Any]") -> str:
    """The session's raw id as the host gave it, or "" (CONTRACT section 4)."""
    given = hook.get("session_id")
    return env.get("CLAUDE_SESSION_ID", "").strip() or (given if isinstance(given, str) and given.strip() else "")


def stats_bucket(ppid: int, home: str) -> str:
    """The name that stats.json gives to a parent process: a 32-bit Java string hash (CONTRACT section 4)."""
    units = ("ppid:%d:%s" % (ppid, home)).encode("utf-16-le", "surrogatepass")
    h = 0
    for low, high in zip(units[::2], units[1::2]):
        h = (h * 31 + low + (high << 8)) & 0xFFFFFFFF
    return "p%x" % h


def instant(text: "Any") -> "Optional[float]":
    """Seconds since 1970 of an ISO 8601 date and time (CONTRACT section 1, `ended_at`); None if it is none."""
    from datetime import datetime, timedelta
    from re import fullmatch
    match = fullmatch(r"([0-9]{4})-([0-9]{2})-([0-9]{2})T([0-9]{2}):([0-9]{2}):([0-9]{2})(?:\.([0-9]{1,9}))?"
                      r"(?:Z|([+-])([01][0-9]|2[0-3]):([0-5][0-9]))?", text) if isinstance(text, str) else None
    if not match:
        return None
    try:
        at = datetime(*map(int, match.group(1, 2, 3, 4, 5, 6)))  # type: ignore[arg-type]
    except ValueError:
        return None
    sign, hours, minutes = match.group(8, 9, 10)
    zone = (int(hours) * 60 + int(minutes)) * (-1 if sign == "-" else 1) if sign else 0
    fraction = int((match.group(7) or "0").ljust(9, "0")) / 1e9
    return (at - datetime(1970, 1, 1)) / timedelta(seconds=1) - zone * 60 + fraction


def counts(stats: "Any", last_project: "Any", ids: "Sequence[str]", now: float) -> "Tuple[int, int]":
    """(tool_count, tokens_saved) summed over this session's buckets of stats.json, each once (CONTRACT section 4)."""
    mine = set(ids)
    if isinstance(last_project, dict) and isinstance(last_project.get("sessionId"), str):
        age = now - (instant(last_project.get("updatedAt")) or 0.0)
        mine.update([last_project["sessionId"]] if 0 <= age <= 86400 else [])
    sessions = stats.get("sessions") if isinstance(stats, dict) and stats.get("schemaVersion", 2) == 2 else None
    found = [sessions.get(name) for name in mine] if isinstance(sessions, dict) else []
    buckets = [bucket for bucket in found if isinstance(bucket, dict)]
    return (min(MAX_CALLS, sum(whole(bucket.get("calls")) for bucket in buckets)),
            min(MAX_TOKENS, sum(whole(bucket.get("tokensSaved")) for bucket in buckets)))


def whole(value: "Any") -> int:
    """A JSON number floored, and 0 for anything below or that is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        return 0
    return int(value)


def is_ref(text: "Any") -> bool:
    """Is it a slug that `discovery_refs` may carry (CONTRACT section 1)?"""
    return shaped(text, ALNUM + "._:-", 1, 128) and text[0] in ALNUM


def touched_ref(path: "Any", base: str, project: str) -> "Optional[str]":
    """The discovery that a path in a tool's input stands for, None if it lies elsewhere. No disk is asked.

    `base`: the absolute folder that a relative path starts from. Windows paths compare without case.
    """
    if not isinstance(path, str) or not path:
        return None
    windows = project[1:2] == ":" or project[:2] == "\\\\"
    path, base, project = (part.replace("\\", "/") if windows else part for part in (path, base, project))
    path = lexical(path if path[:1] == "/" or (windows and path[1:2] == ":") else base + "/" + path)
    folder = lexical(project).rstrip("/") + DISCOVERIES
    same = path[:len(folder)].lower() == folder.lower() if windows else path.startswith(folder)
    name = path[len(folder):].rpartition("/")[2] if same else ""
    stem = name[:name.rfind(".")] if "." in name[1:] else name
    return stem if is_ref(stem) else None


def lexical(path: str) -> str:
    """An absolute path with `.`, `..` and doubled slashes worked out; a trailing slash stays."""
    parts = []  # type: List[str]
    for part in path.split("/"):
        if part == "..":
            del parts[-1:]
        elif part not in ("", "."):
            parts.append(part)
    lead = "" if path[1:2] == ":" else "/"
    return lead + "/".join(parts) + ("/" if parts and path[-1:] == "/" else "")


def newest_refs(refs: "Sequence[str]") -> "List[str]":
    """In order of first touch, without repeats, the newest 200."""
    return list(dict.fromkeys(refs))[-MAX_REFS:]


# ======================================================================================================
# Payload
# ======================================================================================================


def shaped(text: "Any", characters: str, shortest: int, longest: int) -> bool:
    """Is it a string of these characters and no others? (`strip` leaves "" only then; re is a costly import.)"""
    return isinstance(text, str) and shortest <= len(text) <= longest and not text.strip(characters)


def is_version(text: "Any") -> bool:
    """Is it what `plugin_version` may carry (CONTRACT section 1)?"""
    return shaped(text, ALNUM + ".+_-", 1, 64) and text[0] in ALNUM


def is_count(value: "Any", most: int) -> bool:
    """Is it a whole JSON number from 0 to `most`?"""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def is_hash(text: "Any") -> bool:
    """Is it 64 lowercase hex digits?"""
    return shaped(text, HEX, 64, 64)


# Field: what its value must be. The order is the order in the event.
FIELDS = {
    "identity_hash": is_hash,
    "github_hash": lambda value: value is None or is_hash(value),
    "session_id_hash": is_hash,
    "ended_at": lambda value: instant(value) is not None,
    "tool_count": lambda value: is_count(value, MAX_CALLS),
    "tokens_saved": lambda value: is_count(value, MAX_TOKENS),
    "branch_sha": lambda value: value is None or shaped(value, HEX, 7, 40),
    "discovery_refs": lambda value: isinstance(value, list) and len(value) <= MAX_REFS and all(map(is_ref, value)),
    "plugin_version": is_version,
}  # type: Dict[str, Callable[[Any], bool]]


def faults(event: "Any") -> "List[str]":
    """The fields that this program would never have written so; [] for an event that may be sent."""
    if not isinstance(event, dict):
        return ["(not an object)"]
    bad = [name for name, good in FIELDS.items() if name not in event or not good(event[name])]
    return bad + ["(unknown)"] * (not event.keys() <= FIELDS.keys())


def iso(seconds: float) -> str:
    """`2026-05-22T12:34:56.000Z`, from seconds since 1970."""
    from time import gmtime
    milliseconds = int(seconds * 1000)
    return "%04d-%02d-%02dT%02d:%02d:%02d.%03dZ" % (gmtime(milliseconds // 1000)[:6] + (milliseconds % 1000,))


def event_bytes(event: "Dict[str, Any]") -> bytes:
    """The JSON as it is kept and sent. ValueError if it is not an event, which would be an error in this file."""
    import json
    data = json.dumps(event, separators=(",", ":")).encode()
    if faults(event) or len(data) > EVENT_BYTES:
        raise ValueError("built something that is not an event: " + ", ".join(faults(event)))
    return data


def loads(data: bytes) -> "Any":
    """`json.loads` of UTF-8, NaN and Infinity refused. ValueError for anything that is not JSON.

    The C scanner beneath json, asked directly, spares the 5 ms import of json (most of a bare start). Where it is not,
    or wants to be asked differently, json itself answers; the tests hold the two to the same answers.
    """
    text = data.decode("utf-8-sig")
    try:
        from _json import make_scanner
        scan = make_scanner(Scanner)
    except (ImportError, AttributeError, TypeError):
        return loads_slowly(text)
    text = text.strip(BLANKS)
    try:
        value, end = scan(text, 0)
    except (StopIteration, RecursionError):
        raise ValueError("not JSON, or too deep") from None
    if end != len(text):
        raise ValueError("not JSON alone")
    return value


def loads_slowly(text: str) -> "Any":
    """`loads` for where its fast path cannot be taken."""
    import json
    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("too deep") from None


def refuse(name: str) -> "NoReturn":
    """Called for NaN and the infinities, which are not JSON."""
    raise ValueError(name + " is not JSON")


class Scanner:
    """What the C scanner wants to know: json's own defaults."""

    strict = True
    object_hook = object_pairs_hook = array_hook = None
    parse_float, parse_int, parse_constant = float, int, refuse


def loads_object(data: "Optional[bytes]") -> "Optional[Dict[str, Any]]":
    """The JSON object in `data`, or None."""
    try:
        value = loads(data or b"")
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def retry_at(header: "Optional[str]", now: float) -> float:
    """When a server wants to be asked again, from `Retry-After` (seconds or a date); 0.0 if it did not say."""
    from email.utils import parsedate_to_datetime
    text = (header or "").strip()
    try:
        at = now + int(text[:10]) if shaped(text, DIGITS, 1, 100) else parsedate_to_datetime(text).timestamp()
    except (TypeError, ValueError, IndexError, OverflowError, OSError):
        return 0.0
    return min(at, now + RETRY_S) if at > now else 0.0


def captured_ms(name: bytes) -> "Optional[int]":
    """When the event in a spool file was captured, in ms since 1970, from its name; None for a foreign name."""
    text = name.decode("latin-1")
    good = len(text) == 33 and shaped(text[:15], DIGITS, 15, 15) and shaped(text[16:28], HEX, 12, 12)
    return int(text[:15]) if good and text[15] == "-" and text[28:] == ".json" else None


def expired(names: "Sequence[bytes]", now: float) -> "List[bytes]":
    """Of spool files in order: those that may wait no longer. A clock that was ahead makes none of them old."""
    old = [name for name in names if now * 1000 - (captured_ms(name) or 0) > WAITING_MS]
    return old + [name for name in names if name not in old][:-WAITING_EVENTS]


# ======================================================================================================
# Disk
# ======================================================================================================

# Paths are bytes, made from UTF-8, so that the locale, which hosts often drop, decides nothing.
CONFIG, MACHINE_ID = b"/.ashlr/config.json", b"/.ashlr/machine-id"
OURS = b"/.ashlr/session-events/"
PENDING, TOUCHED, LAST = OURS + b"pending/", OURS + b"touched/", OURS + b"last.json"

# No blocking on a pipe that stands where a file should, no text mode, nothing left to child processes.
SAFELY = sum(getattr(system, flag, 0) for flag in ("O_NONBLOCK", "O_BINARY", "O_CLOEXEC"))


def contents(path: bytes, most: int = 16 << 20) -> bytes:
    """A file's bytes; of a longer one than `most`, some more than `most`. OSError if it cannot be read."""
    fd = system.open(path, system.O_RDONLY | SAFELY)
    data = b""
    try:
        while len(data) <= most:
            piece = system.read(fd, 1 << 20)
            if not piece:
                break
            data += piece
    finally:
        system.close(fd)
    return data


def object_at(path: bytes) -> "Optional[Dict[str, Any]]":
    """The JSON object in a file; None for whatever else may be there, or not."""
    try:
        return loads_object(contents(path))
    except OSError:
        return None


def telemetry_said(home: bytes) -> "Any":
    """"telemetry" of config.json; None if there is none, UNCLEAR if the file cannot be read."""
    try:
        config = loads_object(contents(home + CONFIG))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:
        return UNCLEAR
    return UNCLEAR if config is None else config.get("telemetry")


def names_in(folder: bytes) -> "List[bytes]":
    """Sorted; [] for a folder that is not there."""
    try:
        return sorted(system.listdir(folder))
    except OSError:
        return []


def remove(path: bytes) -> bool:
    """Was it there, and is gone?"""
    try:
        system.unlink(path)
    except OSError:
        return False
    return True


def purge(home: bytes) -> int:
    """Delete all that waits or was listed, for a person who said no; how many files that was."""
    return sum(remove(home + folder + name) for folder in (PENDING, TOUCHED) for name in names_in(home + folder))


def write_whole(path: bytes, data: bytes, mode: int = 0o600, fresh: bool = False) -> None:
    """Whoever looks, and whenever the power fails, finds at `path` what was there before, or all of `data`.

    `fresh`: keep what is there already. OSError if it cannot be written; nothing is left behind then.
    """
    import os
    folder = os.path.dirname(path)
    os.makedirs(folder, 0o700, exist_ok=True)
    temporary = folder + b"/." + os.urandom(8).hex().encode() + b".tmp"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | SAFELY, mode)
    try:
        try:
            while data:
                data = data[os.write(fd, data):]
            os.fsync(fd)
        finally:
            os.close(fd)
        if fresh:
            link_fresh(temporary, path)
        else:
            os.replace(temporary, path)
    finally:
        remove(temporary)
    try:
        fd = os.open(folder, os.O_RDONLY)  # the new name, too, should survive a power cut; Windows cannot say so
    except OSError:
        return
    try:
        os.fsync(fd)
    except OSError:
        pass
    finally:
        os.close(fd)


def link_fresh(temporary: bytes, path: bytes) -> None:
    """Give a file its name unless that is taken."""
    import os
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except (AttributeError, OSError):  # a system without hard links
        if not os.path.lexists(path):
            os.rename(temporary, path)


def lock(path: bytes, patience_s: float = 0.0) -> "Optional[int]":
    """A descriptor that holds a lock until it is closed or its process dies, or None: somebody else has it."""
    import os
    from time import monotonic, sleep
    os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | SAFELY, 0o600)
    begun = monotonic()
    while not locked(fd):
        if monotonic() - begun >= patience_s:
            os.close(fd)
            return None
        sleep(0.005)
    return fd


def locked(fd: int) -> bool:
    """Take the lock of an open file, at once or not at all. Where there are no locks, everybody has it.

    That is safe: two senders at once are no more than a waste, since the server takes an event once.
    """
    try:
        import fcntl
    except ImportError:
        return locked_on_windows(fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return not isinstance(error, BlockingIOError)
    return True


def locked_on_windows(fd: int) -> bool:
    """`locked` by the C runtime's region locks, which end with the process too."""
    try:
        msvcrt = __import__("msvcrt")  # type: Any
        msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
    except ImportError:
        return True
    except OSError:
        return False
    return True


def machine_id(home: bytes, make: bool = True) -> str:
    """The machine's random name, made on first use. OSError if it cannot be read or kept, ValueError if it is empty.

    Not `make`: "" in place of one that is not there yet.
    """
    import os
    try:
        found = contents(home + MACHINE_ID)
    except FileNotFoundError:
        if not make:
            return ""
        write_whole(home + MACHINE_ID, random_uuid(os.urandom(16)).encode(), fresh=True)
        found = contents(home + MACHINE_ID)
    text = found.decode("utf-8", "surrogateescape").strip()
    if not text:
        raise ValueError("~/.ashlr/machine-id is empty: remove it")
    return text


def random_uuid(sixteen: bytes) -> str:
    """RFC 4122, version 4. (Importing `uuid` may start a compiler on old Pythons.)"""
    text = bytearray(sixteen)
    text[6], text[8] = text[6] & 0x0F | 0x40, text[8] & 0x3F | 0x80
    digits = bytes(text).hex()
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def touched_refs(home: bytes, session_hash: str) -> "List[str]":
    """This session's list of discoveries, as recorded so far."""
    try:
        lines = contents(home + TOUCHED + session_hash.encode()).decode("ascii", "replace").split("\n")
    except OSError:
        return []
    return newest_refs([line for line in lines if is_ref(line)])


def touch(home: bytes, session_hash: str, refs: "Sequence[str]") -> None:
    """Add to this session's list. OSError if it cannot be kept. Hooks that run at the same moment take turns."""
    fd = lock(home + OURS + b"touched.lock", 5.0)
    try:
        before = touched_refs(home, session_hash)
        after = newest_refs(before + list(refs))
        if after != before:
            write_whole(home + TOUCHED + session_hash.encode(), "\n".join([*after, ""]).encode())
    finally:
        if fd is not None:
            system.close(fd)


def waiting(home: bytes) -> "List[bytes]":
    """The spool's files, oldest first. Others, whoever put them there, are left alone."""
    return [name for name in names_in(home + PENDING) if captured_ms(name) is not None]


def spool(home: bytes, data: bytes, captured: float) -> None:
    """Keep one event. OSError if that cannot be. The name is the time in ms, then chance."""
    import os
    write_whole(home + PENDING + b"%015d-%s.json" % (int(captured * 1000), os.urandom(6).hex().encode()), data)


def sweep(home: bytes, now: float) -> None:
    """Remove what kills left half-written, and the lists of sessions that never ended."""
    for folder in (PENDING, TOUCHED, OURS, b"/.ashlr/"):
        for name in names_in(home + folder):
            temporary = name[:1] == b"." and len(name) == 21 and name[-4:] == b".tmp"
            if temporary or folder == TOUCHED:
                try:
                    age = now - system.stat(home + folder + name).st_mtime
                except OSError:
                    continue
                if age > (LEFTOVER_S if temporary else LIST_S):
                    remove(home + folder + name)


# ======================================================================================================
# Caller: what only the hook's own process can tell
# ======================================================================================================


def environment() -> "Dict[str, str]":
    """The environment as text, UTF-8 whatever the locale."""
    found = getattr(system, "environb", system.environ)  # type: Any
    return {name if isinstance(name, str) else name.decode("utf-8", "surrogateescape"):
            value if isinstance(value, str) else value.decode("utf-8", "surrogateescape")
            for name, value in found.items()}


def home_of(env: "Dict[str, str]") -> bytes:
    """The person's folder."""
    text = env.get("HOME") or env.get("USERPROFILE")
    if not text:
        import os
        text = os.path.expanduser("~")
    return encoded(text)


def input_reader() -> "Callable[[float], Optional[bytes]]":
    """A function of seconds: what has arrived on standard input by then, b"" at its end, None for nothing yet."""
    try:
        from select import select
        select([0], [], [], 0)
    except (ImportError, OSError):  # Windows: select knows sockets only
        from queue import Empty, Queue
        from threading import Thread
        pieces = Queue()  # type: Queue[bytes]

        def drain() -> None:
            piece = b"-"
            while piece:
                try:
                    piece = system.read(0, 1 << 16)
                except OSError:
                    piece = b""
                pieces.put(piece)

        def next_piece(seconds: float) -> "Optional[bytes]":
            try:
                return pieces.get(timeout=max(seconds, 0.001))
            except Empty:
                return None
        Thread(target=drain, daemon=True).start()
        return next_piece
    return lambda seconds: system.read(0, 1 << 16) if select([0], [], [], max(seconds, 0.0))[0] else None


def standard_input() -> bytes:
    """What the host wrote on standard input; b"" for a terminal, nothing, or more than anybody would write.

    It waits 0.25 s for the first byte, 1 s for the last, and does not insist on the end once it has an object:
    hosts that never close the pipe exist.
    """
    from time import monotonic
    data, begun = bytearray(), monotonic()
    try:
        system.fstat(0)
        if system.isatty(0):
            return b""
        next_piece = input_reader()
        while len(data) <= INPUT_BYTES:
            left = (INPUT_WHOLE_S if data else INPUT_FIRST_S) - (monotonic() - begun)
            may_be_all = data[-64:].rstrip()[-1:] == b"}"
            piece = next_piece(min(left, 0.02) if may_be_all else left)
            if piece:
                data += piece
            elif piece == b"" or left <= 0 or (may_be_all and loads_object(bytes(data)) is not None):
                return bytes(data)
    except OSError:
        pass
    return b""


def parent_started(ppid: int) -> str:
    """When the parent process started, in its system's own words; "" where nobody can tell (CONTRACT section 4)."""
    try:
        return contents(b"/proc/%d/stat" % ppid).rpartition(b")")[2].split()[19].decode()  # field 22, in ticks
    except (OSError, IndexError):
        pass
    if sys.platform == "win32":
        return parent_started_on_windows(ppid)
    return printed_by(["ps", "-o", "lstart=", "-p", str(ppid)], {"LC_ALL": "C"})


def parent_started_on_windows(ppid: int) -> str:
    """`parent_started` in 100 ns since 1601."""
    import ctypes
    kernel = ctypes.__dict__["WinDLL"]("kernel32")  # type: Any
    times = (ctypes.c_uint64 * 4)()
    kernel.OpenProcess.restype = ctypes.c_void_p
    process = ctypes.c_void_p(kernel.OpenProcess(0x1000, False, ppid))  # PROCESS_QUERY_LIMITED_INFORMATION
    good = process and kernel.GetProcessTimes(process, *(ctypes.byref(times, 8 * n) for n in range(4)))
    if process:
        kernel.CloseHandle(process)
    return str(times[0]) if good else ""


def printed_by(argv: "List[str]", changes: "Dict[str, str]") -> str:
    """What a program prints within 250 ms, stripped; "" if it fails, cannot be started or takes longer.

    It gets no GIT_* variables (a hook of git's own has them, and they point elsewhere), no input, no terminal.
    """
    import os
    import subprocess
    env = {name: value for name, value in os.environ.items() if name[:4] != "GIT_"}
    env.update(changes)
    try:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=env,
                                   stderr=subprocess.DEVNULL, start_new_session=True)
    except (OSError, ValueError):
        return ""
    try:
        printed = process.communicate(timeout=GIT_S)[0]
        return printed.decode("ascii", "replace").strip() if process.returncode == 0 else ""
    except subprocess.TimeoutExpired:  # with all that it started: one of those may hold the pipe
        if hasattr(os, "killpg"):
            os.killpg(process.pid, 9)
        else:
            process.kill()
        return ""


class Caller:
    """What the event owes to the process that ran the hook, and what the host told it.

    `env`, `home`; `hook`: the host's JSON, {} if none; `session`: the raw id, "" if the host gave none; `ppid` and
    `started` (only then asked for); `base`: absolute folder of relative paths; `project`; `ended`: seconds since 1970.
    """

    def __init__(self, env: "Dict[str, str]", directory: str = "", data: bytes = b"") -> None:
        """`directory`: from --dir; `data`: from standard input. Asks the process for the rest."""
        from time import time
        self.env, self.home, self.ended = env, home_of(env), time()
        self.hook = loads_object(data) or {}
        self.session = session_id(env, self.hook)
        self.ppid = system.getppid() if hasattr(system, "getppid") else 0
        self.started = "" if self.session else parent_started(self.ppid)
        try:
            here = system.getcwdb().decode("utf-8", "surrogateescape")
        except OSError:  # deleted
            here = "/"
        given = self.hook.get("cwd")
        self.base = given if isinstance(given, str) and given.strip() else here
        self.project = directory or env.get("CLAUDE_PROJECT_DIR", "").strip() or self.base
        if self.project[:1] not in "/\\" and self.project[1:2] != ":":
            self.project = here + "/" + self.project

    def session_hash(self, machine: str) -> str:
        """CONTRACT section 4, `session_id_hash`."""
        return sha256_hex(self.session or "ppid:%d:%s:%s" % (self.ppid, self.started, machine))

    def touched(self) -> "List[str]":
        """The discoveries that the tool call in `hook` touched."""
        tool_input = self.hook.get("tool_input")
        found = []
        for path in map(tool_input.get, ("file_path", "notebook_path", "path")) if isinstance(tool_input, dict) else ():
            ref = touched_ref(path, self.base, self.project)
            if not ref and isinstance(path, str) and DISCOVERIES[1:] in path:
                import os  # the same folder by another way: /tmp is /private/tmp on a Mac
                ref = touched_ref(os.path.realpath(os.path.join(self.base, path)), "/", os.path.realpath(self.project))
            found += [ref] if ref else []
        return found


def branch_sha(project: str) -> "Optional[str]":
    """The commit of a folder. A hostile repository gets to run nothing: no hooks, no fetching, no prompts."""
    import os
    sha = printed_by(["git", "-C", os.fsdecode(encoded(project)), "rev-parse", "--short=12", "HEAD"], {
        "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "GIT_NO_LAZY_FETCH": "1", "GIT_ALLOW_PROTOCOL": ""})
    return sha if shaped(sha, HEX, 7, 40) else None


def plugin_version(env: "Dict[str, str]") -> str:
    """CONTRACT section 4, `plugin_version`."""
    import os
    beside = os.path.dirname(os.path.abspath(os.fsencode(__file__)))
    for root in (encoded(env.get("CLAUDE_PLUGIN_ROOT", "").strip()), beside, os.path.dirname(beside)):
        for name in (b"package.json", b".claude-plugin/plugin.json") if root else ():
            version = (object_at(root + b"/" + name) or {}).get("version")
            if is_version(version):
                return str(version)
    return "0.0.0"


def compose(caller: Caller, machine: str, run_git: bool = True) -> "Dict[str, Any]":
    """The event of the session that the caller ends (CONTRACT sections 1 and 4)."""
    env, home, now = caller.env, caller.home, caller.ended
    login = github_login(object_at(home + b"/.ashlr/pro-token-cache.json"))
    session = caller.session_hash(machine)
    calls, tokens = counts(object_at(home + b"/.ashlr/stats.json"), object_at(home + b"/.ashlr/last-project.json"),
                           (caller.session, stats_bucket(caller.ppid, env.get("HOME", ""))), now)
    return {
        "identity_hash": sha256_hex(machine + salt(now)),
        "github_hash": sha256_hex(login + salt(now)) if login else None,
        "session_id_hash": session,
        "ended_at": iso(now),
        "tool_count": calls,
        "tokens_saved": tokens,
        "branch_sha": branch_sha(caller.project) if run_git else None,
        "discovery_refs": touched_refs(home, session),
        "plugin_version": plugin_version(env),
    }


# ======================================================================================================
# Sending
# ======================================================================================================


class Log:
    """What a run says with ASHLR_TELEMETRY_DEBUG=1: no hash, path or credential. It keeps lines until `out`, since a
    standard error that nobody reads may hold the writer for good, and the event comes first."""

    def __init__(self, env: "Dict[str, str]") -> None:
        """Says nothing unless the environment wants it."""
        self.wanted = env.get("ASHLR_TELEMETRY_DEBUG", "").strip() not in ("", "0")
        self.lines = []  # type: List[str]

    def say(self, line: str) -> None:
        """Keep a line."""
        self.lines.append(line)

    def out(self) -> None:
        """Print what is kept, if anybody wants and can have it."""
        text = "".join("emit.py: %s\n" % line for line in self.lines) if self.wanted else ""
        self.lines = []
        try:
            system.write(2, text.encode("ascii", "replace"))
        except OSError:
            pass


def reason(error: BaseException) -> str:
    """An error in words that hold no path and no URL."""
    inner = getattr(error, "reason", None)
    if isinstance(inner, Exception):
        return reason(inner)
    return "%s%s" % (type(error).__name__, ": %s" % error.strerror if isinstance(error, OSError) else "")


def poster(url: str, authorization: str) -> "Callable[[bytes], Tuple[int, Optional[str]]]":
    """A function that posts one event and gives (status, Retry-After). It raises OSError, ValueError, HTTPException.

    Of urllib's habits it has only two: it speaks HTTP(S), and it uses the proxies that the environment names. It
    follows no redirect and reads no body.
    """
    if sys.platform == "darwin":  # urllib would load _scproxy, which crashes after a fork, to ask for other proxies
        sys.modules["_scproxy"] = stub = type(sys)("_scproxy")
        stub.__dict__.update(_get_proxies=dict, _get_proxy_settings=dict)
    import urllib.request as u
    opener = u.OpenerDirector()
    for handler in (u.ProxyHandler(u.getproxies_environment()), u.HTTPHandler(), u.HTTPSHandler(), u.UnknownHandler()):
        opener.add_handler(handler)
    headers = {"Content-Type": "application/json", "User-Agent": "emit.py"}
    headers.update({"Authorization": authorization} if authorization else {})

    def post(data: bytes) -> "Tuple[int, Optional[str]]":
        answer = opener.open(u.Request(url, data, headers, method="POST"), timeout=ANSWER_S)  # type: Any
        if answer is None:
            raise ValueError("a proxy of a kind that urllib does not know")
        try:
            return answer.status, answer.headers.get("Retry-After")
        finally:
            answer.close()
    return post


class Flush:
    """One run over what waits, oldest first, until there is no more, or the server or the person says stop."""

    def __init__(self, home: bytes, env: "Dict[str, str]", log: Log) -> None:
        """`stopped` says why, once it did; `retry`: when the server wants to be asked again, 0.0 if it did not say."""
        self.home, self.env, self.log = home, env, log
        self.sent = self.refused = self.failed = self.spoiled = 0
        self.stopped, self.retry = "", 0.0
        self.post = None  # type: Optional[Callable[[bytes], Tuple[int, Optional[str]]]]

    def run(self, unkept: bytes = b"") -> None:
        """Send what waits, and before it an event that the spool could not keep."""
        from time import time
        if not self.allowed():
            return
        try:
            url, authorization, shown = checked_url(endpoint(self.env)[0])
        except ValueError as error:
            self.stopped = str(error)
            return self.record()
        retry = (object_at(self.home + LAST) or {}).get("retry_at")
        if isinstance(retry, (int, float)) and 0 < retry - time() <= RETRY_S:
            return self.log.say("nothing sent: the server asks to be left alone until " + iso(retry))
        self.post = poster(url, authorization)
        self.log.say("sending to %s, for 20 s at the most; without a line after this one, time ran out" % shown)
        self.log.out()
        if unkept and not self.offer(unkept):
            self.log.say("the event that could not be kept is lost")
        self.drain()
        if unkept:
            self.record()
        return None

    def drain(self) -> None:
        """Send what waits. What came while the lock was held is taken too: its own sender did not get the lock."""
        seen = set()  # type: set[bytes]
        while not self.stopped and not seen.issuperset(waiting(self.home)):
            fd = lock(self.home + OURS + b"flush.lock")
            if fd is None:
                return self.log.say("another sender is at work: it takes this event along")
            try:
                self.record("began, and did not finish (yet)")
                for name in waiting(self.home):
                    if name not in seen and not self.stopped:
                        self.take(self.home + PENDING + name)
                        seen.add(name)
                from time import time
                for name in expired(waiting(self.home), time()):
                    remove(self.home + PENDING + name)
                self.record()
            finally:
                system.close(fd)
        return None

    def take(self, path: bytes) -> None:
        """Send one file, and remove it if it need not come again, or never was an event."""
        try:
            data = contents(path, EVENT_BYTES)
        except OSError:
            return
        event = loads_object(data)
        if len(data) > EVENT_BYTES or faults(event):
            self.spoiled += 1
            remove(path)
        elif self.offer(data):
            remove(path)

    def offer(self, data: bytes) -> bool:
        """Send one event. Is it dealt with: accepted, or refused for ever?"""
        from http.client import HTTPException
        from time import time
        if self.post is None or not self.allowed():
            return False
        try:
            status, retry = self.post(data)
        except (OSError, ValueError, HTTPException) as error:
            self.stopped = "the server cannot be reached (%s)" % reason(error)
            return False
        good, refused = 200 <= status < 300, 400 <= status < 500 and status not in (408, 429)
        self.sent += good
        self.refused += refused
        if not good and not refused:
            self.failed += 1
            self.retry = retry_at(retry, time())
            if self.retry or status in (429, 503) or self.failed == FAILED_ANSWERS:
                self.stopped = "the server answered %d" % status
        return good or refused

    def allowed(self) -> bool:
        """Consent, asked anew; what waits goes if it was withdrawn."""
        said = telemetry_said(self.home)
        answer, why = consent(self.env, said)
        if not answer:
            self.stopped = "consent is off: " + why
            if said is not UNCLEAR:
                purge(self.home)
            self.log.say(self.stopped)
        return answer

    def record(self, result: str = "") -> None:
        """Keep the result for `status`, and the server's wish for the next runs."""
        import json
        from time import time
        if not result:
            counted = ((self.sent, "sent"), (self.refused, "refused for good"), (self.failed, "failed"),
                       (self.spoiled, "removed as no event"))
            words = ["%d %s" % pair for pair in counted if pair[0] or pair[1] == "sent"]
            result = ", ".join(words) + ("; stopped: " + self.stopped if self.stopped else "")
            self.log.say(result)
        last = {"at": iso(time()), "result": result, "retry_at": self.retry or None}
        try:
            write_whole(self.home + LAST, json.dumps(last).encode())
        except OSError:
            pass


def detach(keep_errors: bool) -> None:
    """Let go of everything of the caller's: terminal, process group, directory, descriptors."""
    system.setsid()
    system.chdir("/")
    null = system.open("/dev/null", system.O_RDWR)
    for fd in (0, 1) if keep_errors else (0, 1, 2):
        system.dup2(null, fd)
    numbers = [int(name) for name in names_in(b"/proc/self/fd") or names_in(b"/dev/fd")] or range(3, 4096)
    for fd in numbers:
        if fd > 2:
            try:
                system.close(fd)
            except OSError:  # the listing's own
                pass


def leave_at(seconds: float) -> None:
    """End this process when its time is over, wherever it hangs: a name look-up cannot be interrupted otherwise."""
    from _thread import start_new_thread
    from time import sleep

    def watch() -> None:
        sleep(max(seconds, 0.0))
        system._exit(0)
    start_new_thread(watch, ())


def work(caller: Caller, log: Log) -> None:
    """Capture, keep, send. It raises OSError or ValueError if there is no machine id to be had."""
    machine = machine_id(caller.home)
    event = compose(caller, machine)
    data, unkept = event_bytes(event), b""
    try:
        spool(caller.home, data, caller.ended)
        remove(caller.home + TOUCHED + event["session_id_hash"].encode())
        log.say("captured")
    except OSError as error:
        unkept = data
        log.say("captured, but not kept (%s)" % reason(error))
    log.out()
    sweep(caller.home, caller.ended)
    Flush(caller.home, caller.env, log).run(unkept)


# ======================================================================================================
# Commands
# ======================================================================================================


def options(argv: "Sequence[str]") -> "Tuple[str, Optional[float], List[str]]":
    """(--dir or "", --wait in ms or None, what is neither)."""
    directory, wait, rest = "", None, []  # type: str, Optional[float], List[str]
    left = [part for word in argv for part in (word.split("=", 1) if word[:6] in ("--dir=", "--wait="[:6]) else [word])]
    while left:
        word = left.pop(0)
        if word == "--dir" and left:
            directory = left.pop(0)
        elif word == "--wait":
            number = left[0] if left and shaped(left[0], DIGITS, 1, 9) else ""
            wait = min(float(left.pop(0)), LIFE_S * 1000) if number else FOREGROUND_MS
        else:
            rest.append(word)
    return directory, wait, rest


def hook(argv: "Sequence[str]") -> int:
    """The end of a session. It returns 0 to the caller, whatever happens; what it starts never returns."""
    from time import monotonic
    begun = monotonic()
    try:
        env = environment()
        directory, wait, rest = options(argv)
        log = Log(env)
        home, child = home_of(env), -1
        said = telemetry_said(home)
        allowed, why = consent(env, said)
        if not allowed and said is not UNCLEAR:
            purge(home)
        if not allowed and not log.wanted:
            return 0
        log.say("consent is %s: %s" % ("on" if allowed else "off", why))
        log.say("ignored: arguments that are none of --dir and --wait" if rest else "arguments understood")
        caller = Caller(env, directory, standard_input()) if allowed else None
        if wait is None and hasattr(system, "fork"):
            try:
                child = system.fork()
            except OSError:  # no room for another process: do it here
                pass
        if child > 0:
            return 0
    except BaseException:  # a hook never fails, and there is nobody to tell
        return 0
    try:
        if child == 0:
            detach(log.wanted)
        leave_at(LIFE_S if child == 0 else (wait or FOREGROUND_MS) / 1000 - (monotonic() - begun))
        if caller:
            work(caller, log)
    except BaseException as error:
        log.say("failed: " + (str(error) if type(error) is ValueError else reason(error)))
    finally:
        log.out()
        system._exit(0)
    return 0


def track(argv: "Sequence[str]") -> int:
    """Record the discoveries named, or those that the tool call on standard input touched (a hook: never fails)."""
    directory, _, refs = options(argv)
    wrong = [str(n) for n, ref in enumerate(refs, 1) if not is_ref(ref)]
    if wrong:
        return complain("not a discovery reference (a letter or digit, then at most 127 of those and . _ : -): "
                        "number " + ", ".join(wrong), 2)
    try:
        env = environment()
        log, home = Log(env), home_of(env)
        allowed, why = consent(env, telemetry_said(home))
        log.say("consent is %s: %s" % ("on" if allowed else "off", why))
        if allowed:
            data = standard_input() if not refs or not env.get("CLAUDE_SESSION_ID", "").strip() else b""
            # Of a large file that a tool wrote, parsing alone costs ms; JSON may write any letter as \u00...
            if refs or b"discoveries" in data.lower() or b"\\u00" in data:
                caller = Caller(env, directory, data)
                refs = refs or caller.touched()
                if refs:
                    touch(home, caller.session_hash(machine_id(home)), refs)
            log.say("%d recorded" % len(refs))
    except (OSError, ValueError) as error:
        if argv:
            return complain("could not be recorded: %s" % reason(error), 1)
        log.say("could not be recorded: %s" % reason(error))
    log.out()
    return 0


def show(argv: "Sequence[str]") -> int:
    """Print the event as it would be sent now; where to, and what is made up in it, on standard error."""
    directory, wait, rest = options(argv)
    if rest or wait is not None:
        return complain("show takes --dir DIR and nothing else; see emit.py --help", 2)
    import os
    env = environment()
    allowed, why = consent(env, telemetry_said(home_of(env)))
    caller = Caller(env, directory, standard_input())
    known = machine_id(caller.home, make=False)
    event = compose(caller, known or random_uuid(os.urandom(16)), run_git=allowed)
    print(event_bytes(event).decode())
    try:
        where = checked_url(endpoint(env)[0])[2]
    except ValueError as error:
        where = "nowhere: " + str(error)
    complain("goes to: " + where)
    if not allowed:
        complain("but nothing is sent, and git is not asked for the commit: consent is off: " + why)
    if not known:
        complain("there is no ~/.ashlr/machine-id yet: identity_hash is that of a passing one")
    return 0


def status(argv: "Sequence[str]") -> int:
    """Print consent, endpoint, what waits and the last result, for people or (--json) for programs."""
    if list(argv) not in ([], ["--json"]):
        return complain("status takes --json and nothing else; see emit.py --help", 2)
    import json
    env = environment()
    home = home_of(env)
    allowed, why = consent(env, telemetry_said(home))
    url, chosen_by = endpoint(env)
    try:
        url = checked_url(url)[2]
    except ValueError as error:
        url, chosen_by = "", "%s, but %s" % (chosen_by, error)
    names, last = waiting(home), object_at(home + LAST) or {}
    at, result, retry = last.get("at"), last.get("result"), last.get("retry_at")
    since = iso((captured_ms(names[0]) or 0) / 1000.0) if names else None
    until = iso(retry) if isinstance(retry, (int, float)) and 0 < retry < 1e11 else None
    if argv:
        print(json.dumps({
            "consent": {"on": allowed, "decided_by": why}, "endpoint": {"url": url or None, "decided_by": chosen_by},
            "waiting": {"events": len(names), "since": since},
            "last_flush": {"at": at, "result": result} if last else None, "retry_at": until}))
        return 0
    print("consent   %s: %s" % ("on" if allowed else "off", why))
    print("endpoint  %s (%s)" % (url or "none", chosen_by))
    print("waiting   %d event%s%s" % (len(names), "" if len(names) == 1 else "s", ", since " + since if since else ""))
    print("last run  " + (ascii("%s: %s" % (at, result))[1:-1] if last else "none yet"))
    if until:
        print("retry     the server asked for nothing before " + until)
    return 0


def switch(argv: "Sequence[str]", value: str) -> int:
    """Write the person's word into config.json, all else in it kept."""
    import json
    import os
    if argv:
        return complain("on and off take nothing; see emit.py --help", 2)
    env = environment()
    home = home_of(env)
    gone = purge(home) if value == "off" else 0
    path, mode = os.path.realpath(home + CONFIG), 0o600
    try:
        config = loads_object(contents(path))
        mode = os.stat(path).st_mode & 0o777
    except FileNotFoundError:
        config = {}
    try:
        if config is None:
            raise ValueError
        before = config.get("telemetry")
        data = json.dumps(dict(config, telemetry=value), indent=2, allow_nan=False).encode() + b"\n"
    except (ValueError, RecursionError):
        return complain("~/.ashlr/config.json is left as it is, since it is not a JSON object: mend or remove it, or "
                        "set ASHLR_TELEMETRY=" + value, 1)
    if before != value:
        write_whole(path, data, mode)
    if value == "off":
        print("off: nothing is collected or sent any more; %d waiting file%s deleted" % (gone, "" if gone == 1 else "s"))
    elif before == value:
        print("on, as before")
    else:
        try:
            print(COLLECTED % checked_url(endpoint(env)[0])[2])
        except ValueError as error:
            print(COLLECTED % ("nowhere yet: %s" % error))
    allowed, why = consent(env, value)
    if allowed != (value == "opt-in"):
        complain("but still %s here: %s" % ("on" if allowed else "off", why))
    return 0


def complain(text: str, status: int = 0) -> int:
    """One line on standard error; `status` again."""
    sys.stderr.write("emit.py: %s\n" % text)
    return status


COMMANDS = {
    "track": track,
    "show": show,
    "status": status,
    "on": lambda argv: switch(argv, "opt-in"),
    "off": lambda argv: switch(argv, "off"),
}  # type: Dict[str, Callable[[Sequence[str]], int]]


def main(argv: "Sequence[str]") -> int:
    """The exit status of a command line. A hook run's sender does not come back from here."""
    system.umask(0o077)
    if "--help" in argv or "-h" in argv:
        print(__doc__)
        return 0
    if not argv or argv[0][:1] == "-":
        return hook(argv)
    if argv[0] not in COMMANDS:
        return complain("no such command; see emit.py --help", 2)
    try:
        return COMMANDS[argv[0]](argv[1:])
    except (OSError, ValueError) as error:
        return complain("could not be done: " + (str(error) if type(error) is ValueError else reason(error)), 1)


def run() -> "NoReturn":
    """`main` for a process: out at once afterwards, without the interpreter's tidying-up."""
    code = main(sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, OSError):  # closed by whoever called
            pass
    system._exit(code)


if __name__ == "__main__":
    run()
