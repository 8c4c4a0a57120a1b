"""Files of other people, read without trust: JSON, values of a wanted type, names for a terminal; our writes.

    config = read_object(folder / "adapter_config.json")      # a Record: a dict that knows its place
    r = need(config, "r", int, at_least=1)                    # or an Invalid with file, key and value
"""
import dataclasses
import glob
import json
import math
import os
import re
import stat
import time
import types
import typing
from pathlib import Path

import yaml

from models.parts import Invalid

LARGEST_JSON = 100 << 20  # bytes: the longest tokenizer.json has 35 MB
LARGEST_YAML = 1 << 20
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
    """The JSON in a file."""
    return parse(read_bytes(path, LARGEST_JSON), path)


def read_object(path):
    """The JSON object in a file, as a Record that knows that it came from there."""
    return an_object(read_json(path), path)


def read_yaml(path):
    """The mapping in a YAML file, which may hold plain values only."""
    try:
        return an_object(yaml.safe_load(read_bytes(path, LARGEST_YAML)), path)
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as e:
        if isinstance(e, Invalid):
            raise
        raise Invalid(f"{path} is not valid YAML: {shown(e, 200)}") from None


def an_object(value, where):
    if not isinstance(value, dict):
        raise Invalid(f"{where}: expected a map of settings, found {shown(written(value))}")
    return as_record(value, where)


def read_bytes(path, most):
    """All bytes of a regular file of at most so many: a pipe never ends, a device would fill the memory."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise Invalid(f"{path} is no file, expected one")
        if status.st_size > most:
            raise Invalid(f"{path} has {status.st_size} bytes, at most {most} are read; is it the right one?")
        data = Path(path).read_bytes()
        refuse_pointer(path, data)
        return data
    except (OSError, ValueError) as e:  # ValueError: a NUL in the name
        if isinstance(e, Invalid):
            raise
        raise Invalid(f"{shown(path, 300)} cannot be read: {getattr(e, 'strerror', None) or e}") from None


POINTER = b"version https://git-lfs"  # begins what lies in the place of a file until Git LFS brings it


def refuse_pointer(path, begin):
    """Invalid for a file that begins as a pointer of Git LFS does."""
    if begin.startswith(POINTER):
        raise Invalid(f"{path} is a pointer of Git LFS, not the file itself: run git lfs pull")


class Record(dict):
    """An object of JSON, with the file and the key where it stands, for messages."""

    where = "JSON"


def as_record(values, where):
    record = Record(values)
    record.where = where
    return record


def need(record, key, kind, default=REQUIRED, **bounds):
    """record[key] as int, float, bool, str, dict, list[str], int | str, ...; null counts as absent.

    What is absent is `default`, or an error without one. bounds: at_least and at_most of a number.
    """
    where = getattr(record, "where", "JSON")
    value = record.get(key)
    if value is None and default is not REQUIRED:
        return default
    wanted = expected(kind)
    for bound, number in bounds.items():
        wanted += f", {bound.replace('_', ' ')} {number}"
    if value is None:
        raise Invalid(f"{where} does not say {shown(key)}, expected {wanted}. Copy the file again from where "
                      "it came from.")
    if not fits(value, kind) or not within(value, **bounds):
        raise Invalid(f"{where}: {shown(key)} is {shown(written(value))}, expected {wanted}. Was it changed "
                      "by hand? Copy the file again from where it came from.")
    return as_record(value, f"{where}: {key}") if isinstance(value, dict) else value


def typed(cls, record, **given):
    """A dataclass from a record: every field as its declared type; what else the record holds is left.

    given: values of fields that the caller has read.
    """
    kinds = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        default = REQUIRED if default is dataclasses.MISSING else default
        if f.name not in given:
            given[f.name] = need(record, f.name, kinds[f.name], default)
    return cls(**given)


def checked(cls, record):
    """The record, once the fields of a checkpoint's Config that it states were found to be of their types.

    A whole number is a size; that of the layers is marked by `layers`.
    """
    kinds = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        kind = dict if dataclasses.is_dataclass(kinds[f.name]) else kinds[f.name]
        is_size = int in alternatives(kind)
        bounds = {"at_least": 1, "at_most": f.metadata.get("at_most", LARGEST)} if is_size else {}
        need(record, f.name, kind, None, **bounds)
    return record


def alike(record, examples):
    """The record, once the values that it states were found to be of the types of {key: example}."""
    for key, example in examples.items():
        kind = list[type(example[0])] if isinstance(example, list) else type(example)
        need(record, key, kind, None)
    return record


def sized(cls, record, **given):
    """The Config of a record that states all of it, but what was given."""
    return typed(cls, checked(cls, record), **given)


LARGEST = 1 << 24  # of a width or a vocabulary: products of two still count as bytes
LAYERS = 1000  # of a stack: a file that says 10**9 would keep us building for hours


def layers(default=dataclasses.MISSING):
    """A field of a checkpoint's Config that is a number of layers."""
    return dataclasses.field(default=default, metadata={"at_most": LAYERS})


def alternatives(kind):
    """The types of X | Y but None; of any other type the type."""
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return [one for one in typing.get_args(kind) if one is not type(None)] if union else [kind]


def fits(value, kind):
    """Whether a value of JSON has a type: true is no number, 2 is a float, infinity and 10**400 are none."""
    if value is None:
        return type(None) in typing.get_args(kind)
    several = alternatives(kind)
    if len(several) > 1:
        return any(fits(value, one) for one in several)
    base, inner = typing.get_origin(several[0]) or several[0], typing.get_args(several[0])
    if base in (int, float) and isinstance(value, bool):
        return False
    if base is float:
        return isinstance(value, (int, float)) and is_finite(value)
    if not isinstance(value, base):
        return False
    entries = value.values() if base is dict else value
    return not inner or all(fits(entry, inner[-1]) for entry in entries)


def within(value, at_least=None, at_most=None):
    low = at_least is None or value >= at_least
    return low and (at_most is None or value <= at_most)


def is_finite(number):
    try:
        return math.isfinite(number)
    except OverflowError:  # a whole number that no float can hold
        return False


def written(value):
    """A value for a message; a number may have more digits than Python writes out."""
    try:
        return repr(value)
    except ValueError:
        return "a number of thousands of digits"


def expected(kind):
    names = []
    for one in alternatives(kind):
        base, inner = typing.get_origin(one) or one, typing.get_args(one)
        names.append(EXPECTED[base] + (f" in which each value is {expected(inner[-1])}" if inner else ""))
    return " or ".join(names)


# ------------------------------------------------------------------------------------------------ patterns

LONGEST_PATTERN = 1000  # characters
MOST_REPEATS = 5  # of *, + and {} in one pattern: on names of 60 letters that many end within a second
MOST_OPTIONS = 8  # of ?, each of which may double the ways


def pattern_of(text, where):
    """A regex of somebody else, compiled; refused where a name could keep it busy for hours.

    That takes a repetition of what itself can match in several ways, as (a+)+ and (a|a)*, or many in a row.
    """
    wrong = None
    tokens = re.findall(r"\\.|\[\^?\]?[^\]]*\]|\(\?[:=!]|[*+?}][?+]|.", text, re.DOTALL)
    if len(text) > LONGEST_PATTERN:
        wrong = f"it has {len(text)} characters, at most {LONGEST_PATTERN} are read"
    elif sum(token[0] in "*+{" for token in tokens) > MOST_REPEATS or tokens.count("?") > MOST_OPTIONS:
        wrong = f"it has more than {MOST_REPEATS} repetitions or {MOST_OPTIONS} options"
    elif repeats_a_choice(tokens):
        wrong = "it repeats a group that itself repeats or chooses"
    try:
        if not wrong:
            return re.compile(text)
    except (re.error, RecursionError, OverflowError) as e:
        wrong = str(e)
    raise Invalid(f"{where}: {shown(repr(text))} is no module name and no regex that is tried: {wrong}")


def repeats_a_choice(tokens):
    """Whether a group in which something repeats, is optional or chosen is itself repeated."""
    open_groups, closed = [False], False  # whether each holds such a thing; closed: the one that ends here
    for token in tokens:
        if token[0] in "*+{" and closed:
            return True
        closed = False
        if token[0] == "(":
            open_groups.append(False)
        elif token == ")" and len(open_groups) > 1:
            closed = open_groups.pop()
            open_groups[-1] |= closed
        elif token[0] in "*+{?|":
            open_groups[-1] = True
    return False


# ------------------------------------------------------------------------------------------------ showing


def shown(text, most=SHOWN):
    """Somebody else's text inside a line of ours: no control character forges a line, none is endless."""
    text = str(text)
    text = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text[:most + 1])
    return text if len(text) <= most else text[:most - 4] + " ..."


LONGEST_LINE = 4000  # characters of a message: a path has at most as many


def lines_of(text):
    """A message of several lines for a terminal or a log: what a terminal would obey is written out."""
    return "\n".join(shown(line, LONGEST_LINE) for line in str(text).split("\n"))


# ------------------------------------------------------------------------------------------------ writing


def write_file(path, data):
    """Bytes that appear whole or not at all, and are on the disk when this returns.

    The temporary file is made anew ("x"): a link that lies there under its name is not followed.
    """
    temporary = path.with_name(temporary_name(path.name))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path)
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
    while len(os.fsencode(name)) > LONGEST_NAME - len(behind) - 1:
        name = name[:-1]
    return f".{name}{behind}"


STALE_SECONDS = 60  # without a byte written, by a process that does not run here: it was killed


def sweep(path):
    """Delete what killed processes were writing in place of a file."""
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        sweep_one(temporary, re.escape(path.name))


def sweep_one(temporary, names):
    """Delete a file if it is the temporary one of a killed process for a name of that pattern."""
    match = re.fullmatch(TEMPORARY.format(name=names), temporary.name)
    if match and not is_alive(int(match.groups()[-1])):
        try:
            if time.time() - temporary.lstat().st_mtime > STALE_SECONDS:
                temporary.unlink()
        except OSError:  # another process has swept it, or it cannot be deleted
            pass


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
