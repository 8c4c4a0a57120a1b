"""Files of other people, read without trust: JSON, values of a wanted type, names for a terminal; and our writes.

    config = read_json(folder / "adapter_config.json")        # a Record: a dict that knows its place
    r = need(config, "r", int, at_least=1)                    # or an Invalid with file, key, value, expectation
"""
import json
import math
import os
import stat
import typing
from pathlib import Path

from models.parts import Invalid

LARGEST_JSON = 100 << 20  # bytes: the longest tokenizer.json has 35 MB
SHOWN = 80  # characters of somebody else's text in one of our lines: more would hide the line
REQUIRED = object()
EXPECTED = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", dict: "a map",
            list: "a list"}


# ------------------------------------------------------------------------------------------------ reading


def parse(text, where):
    """JSON of a text or of bytes, or an Invalid that names the place."""
    try:
        return json.loads(text)
    except RecursionError:
        raise Invalid(f"{where} is not valid JSON: it is nested too deeply") from None
    except (ValueError, MemoryError) as e:
        raise Invalid(f"{where} is not valid JSON: {shown(e, 200)}") from None


def read_json(path):
    """The JSON in a file, Records knowing that they came from it."""
    value = parse(read_bytes(path, LARGEST_JSON), path)
    return as_record(value, path) if isinstance(value, dict) else value


def read_bytes(path, most):
    """All bytes of a regular file of at most so many: a pipe would never end, a device would fill the memory."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise Invalid(f"{path} is no file, expected one")
        if status.st_size > most:
            raise Invalid(f"{path} has {status.st_size} bytes, at most {most} are read; is it the right file?")
        return Path(path).read_bytes()
    except (OSError, ValueError) as e:  # ValueError: a NUL in the name
        if isinstance(e, Invalid):
            raise
        raise Invalid(f"{shown(path, 300)} cannot be read: {getattr(e, 'strerror', None) or e}") from None


class Record(dict):
    """An object of JSON, with the file and the key where it stands, for messages."""

    where = "JSON"


def as_record(values, where):
    record = Record(values)
    record.where = where
    return record


def need(record, key, kind, default=REQUIRED, at_least=None):
    """record[key] as int, float, bool, str, dict, list[str], ...; null counts as absent.

    What is absent is `default`, or an error without one.
    """
    where = getattr(record, "where", "JSON")
    value = record.get(key)
    if value is None and default is not REQUIRED:
        return default
    low = f" of at least {at_least}" if at_least is not None else ""
    if not fits(value, kind) or (low and not value >= at_least):
        found = "is missing" if value is None else f"is {shown(repr(value))}"
        raise Invalid(f"{where}: {shown(key)} {found}, expected {expected(kind)}{low}. Was the file changed by "
                      "hand? Copy it again from where it came from.")
    return as_record(value, f"{where}: {key}") if isinstance(value, dict) else value


def fits(value, kind):
    """Whether a value of JSON has a type: true is no number, 2 is a float, infinity and 10**400 are none."""
    base, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if base is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and is_finite(value)
    if base is int and isinstance(value, bool) or not isinstance(value, base):
        return False
    entries = value.values() if base is dict else value
    return not inner or all(fits(entry, inner[-1]) for entry in entries)


def is_finite(number):
    try:
        return math.isfinite(number)
    except OverflowError:  # a whole number that no float can hold
        return False


def expected(kind):
    base, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    return EXPECTED[base] + (f" in which each value is {EXPECTED[inner[-1]]}" if inner else "")


# ------------------------------------------------------------------------------------------------ showing


def shown(text, most=SHOWN):
    """Somebody else's text inside a line of ours: no control character can forge a line, none goes on for ever."""
    text = str(text)
    text = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text[:most + 1])
    return text if len(text) <= most else text[:most - 4] + " ..."


# ------------------------------------------------------------------------------------------------ writing


def write_file(path, data):
    """Bytes that appear whole or not at all, and are on the disk when this returns.

    The temporary file is made anew ("x"): a link that lies there under its name is not followed.
    """
    temporary = path.with_name(temporary_name(path.name))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        with open(temporary, "xb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        forget(temporary)
        raise Invalid(f"{path} cannot be written: {e.strerror}. Free space or choose another folder; "
                      "what was written before is whole.") from None


LONGEST_NAME = 255  # bytes that file systems take
TEMPORARY = r"\.{name}\.(\d+)\.tmp"  # the number is the process


def temporary_name(name):
    """Where a process writes what will be `name`; a name that is as long as names may be is cut for it."""
    behind = f".{os.getpid()}.tmp"
    kept = os.fsencode(name)[:LONGEST_NAME - len(behind) - 1]
    return "." + os.fsdecode(kept) + behind


def forget(path):
    """Delete a temporary file of this process, if it is there and can be deleted."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        pass


def is_alive(process):
    """Whether a process of this number runs on this machine."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it is somebody else's
        return True
    return True
