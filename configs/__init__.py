"""Settings: a dataclass at the top of each script, then a YAML file, then flags; the later one wins.

    @dataclass
    class Train:
        config: str = opt("", "settings file", config=True)
        learning_rate: float = opt(1e-4, "peak, reached after warmup_steps")
    cfg = parse(Train)  # python train.py configs/x.yaml --learning_rate 5e-5 lora.r=16

The declared type decides what a text means (1e-4 is a number, False is false); unknown keys, keys given
twice, wrong types are collected and refused together, each with its place and the nearest known name.
"""
import dataclasses
import difflib
import math
import os
import re
import stat
import sys
import types
import typing
from pathlib import Path
from typing import NamedTuple

import yaml

from configs.aliases import ALIASES, COMPUTED, Scaling
from models.parts import Invalid, opt  # noqa: F401  (opt marks a field of settings: default and sentence)
from models.parts.plain import lines_of, shown, write_file, written

NULLS = ("null", "Null", "NULL", "~", "none", "None")
YAML_NULLS = NULLS[:4]  # none and None are texts to YAML, but on a command line nobody means them so
BOOLS = {"true": True, "yes": True, "on": True, "1": True,
         "false": False, "no": False, "off": False, "0": False}
EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", list: "a list",
            dict: "a map of key: value", type(None): "null"}
LARGEST_FILE = 2**20  # bytes, and keys at the top: more is a manifest or a tokenizer given by mistake
MOST_KEYS = 500
LARGEST_NUMBER = 1e30  # no setting means more, and its square is still a number


class Setting(NamedTuple):
    """What an accepted name means."""

    name: str  # the canonical one, such as lora.r
    kind: object  # its declared type
    meta: dict  # the metadata of opt
    compute: object  # from aliases.COMPUTED: turns the value given into the canonical key's


class Usage(Exception):
    """Wrong settings or flags. Scripts print the message and exit 2."""


class Plain(str):
    """A text that was not quoted: it may mean a number, true or null. The field that it fills decides."""


class Key(str):
    """A key in a YAML file; `place` says where, for messages."""


# ------------------------------------------------------------------------------------------------ types


def members(kind):
    """The alternatives of X | Y; any other type is its only one."""
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def holds(kind, base):
    return any(base in (k, typing.get_origin(k)) for k in members(kind))


def section(kind):
    """The dataclass in X or X | None, if it is one."""
    return next((k for k in members(kind) if dataclasses.is_dataclass(k)), None)


def convert(value, kind):
    """value as its declared type; ValueError says what was expected."""
    if len(members(kind)) > 1:
        return convert_union(value, kind)
    base, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if base not in EXPECTED:
        return convert_undeclared(value)
    if isinstance(value, Plain) and base is not str and value in ("", *NULLS):
        value = None
    if base is list:
        return convert_list(value, inner[0] if inner else object)
    if base is dict:
        return convert_map(value, inner[1] if inner else object)
    try:
        return convert_scalar(value, base)
    except (ValueError, KeyError, OverflowError):
        raise ValueError(EXPECTED[base]) from None


def convert_union(value, kind):
    """The first alternative of X | Y that takes the value: null before all, for a quoted text a text."""
    def rank(k):
        return k is not type(None), (k is str) != (type(value) is str)

    for k in sorted(members(kind), key=rank):
        try:
            return convert(value, k)
        except ValueError:
            pass
    wanted = [EXPECTED.get(typing.get_origin(k) or k, str(k)) for k in members(kind)]
    raise ValueError(" or ".join(wanted))


def convert_undeclared(value):
    """As YAML has it, but 1e-4 is a number."""
    if isinstance(value, dict):
        return convert(value, dict)
    if isinstance(value, (list, tuple)):
        return convert(value, list)
    return convert(value, None | int | float | bool | str) if isinstance(value, Plain) else value


def convert_scalar(value, base):
    number = isinstance(value, (str, int)) and not isinstance(value, bool)
    if base is str and (value is None or isinstance(value, str)):
        if "\0" in (value or ""):  # no path may hold it, and no text means it
            raise ValueError
        return str(value or "")
    if base is bool and isinstance(value, bool):
        return value
    if base is bool and isinstance(value, str):
        return BOOLS[value.lower()]
    if base is int and number:
        if abs(int(value)) > LARGEST_NUMBER:
            raise ValueError
        return int(value)
    if base is float and (number or isinstance(value, float)):
        if math.isfinite(float(value)) and abs(float(value)) <= LARGEST_NUMBER:
            return float(value)
    if base is type(None) and value is None:
        return None
    raise ValueError


def convert_list(value, inner):
    """One number or one text is a list of one; in a text, numbers may be 1,2,3."""
    if type(value) in (int, float):
        value = [value]
    if isinstance(value, str):
        if inner is not object and not holds(inner, str):
            value = [Plain(part) for part in value.split(",")]
        else:
            value = [value] if value else []
    if value is not None and not isinstance(value, (list, tuple)):
        raise ValueError(EXPECTED[list])
    return [each(v, inner, list) for v in value or ()]


def convert_map(value, inner):
    if value is not None and not isinstance(value, dict):
        raise ValueError(EXPECTED[dict])
    return {str(k): each(v, inner, dict) for k, v in (value or {}).items()}


def each(value, kind, base):
    """One value of a list or map."""
    try:
        return convert(value, kind)
    except ValueError as error:
        raise ValueError(f"{EXPECTED[base]} in which each value is {error}") from None


# ------------------------------------------------------------------------------------------------ names


def names(cls, script):
    """{accepted name: Setting}: "lr", "learning_rate", "lora", "lora.r", "rank", "lora.rank", ..."""
    index = canonical_names(cls)
    others = []  # (alias, canonical key, type it is given in, what makes the key's value of it)
    for key, aliases in ALIASES.get(script, {}).items():
        others += [(alias, key, None, None) for alias in aliases]
    for alias, target in COMPUTED.get(script, {}).items():
        others.append((alias, *target))
    for alias, key, kind, compute in others:
        setting = find(key, index)
        if not setting:
            continue
        setting = setting._replace(kind=kind or setting.kind, compute=compute)
        index.setdefault(alias, setting)
        head, dot, _ = key.partition(".")
        if dot and alias != key.rpartition(".")[2]:  # another name of lora.r counts inside of lora, too
            index.setdefault(f"{head}.{alias}", setting)
    return index


def canonical_names(cls, prefix=""):
    """{name: Setting} of the fields of a dataclass and of its sections."""
    index, hints = {}, typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        kind = hints[f.name]
        index[prefix + f.name] = Setting(prefix + f.name, kind, f.metadata, None)
        if section(kind):
            index |= canonical_names(section(kind), f"{prefix}{f.name}.")
    return index


def find(key, index):
    """The Setting of a key, an alias, or an entry of a map; None if there is none."""
    setting = index.get(key.replace("-", "_"))
    if setting:
        return setting
    head, _, entry = key.partition(".")
    setting = index.get(head.replace("-", "_"))
    if not setting or not entry or not holds(setting.kind, dict):
        return None
    inner = object
    for kind in members(setting.kind):
        if typing.get_origin(kind) is dict:
            inner = typing.get_args(kind)[1]
    return Setting(f"{setting.name}.{entry}", inner, {}, None)


class Given:
    """What one place (a file, the flags, a dict) sets, [(canonical name, value)], and what is wrong."""

    def __init__(self, index, nearby=()):
        self.index, self.nearby = index, nearby
        self.values, self.places, self.errors = [], {}, []

    def put(self, key, value, where):
        setting = find(key, self.index)
        if not setting:
            close = difflib.get_close_matches(key.replace("-", "_"), [*self.index, *self.nearby], 1, 0.0)
            nearest = close[0] if close else "none"
            self.errors.append(f"{where}: unknown; the nearest known name is {nearest}")
            return
        name, kind = setting.name, setting.kind
        if name in self.places:
            self.errors.append(f"{where}: already given by {self.places[name]}; say it once")
            return
        self.places[name] = where
        if isinstance(value, dict) and (section(kind) or holds(kind, dict)):
            self.values.append((name, {}))
            for entry, inner in value.items():
                place = getattr(entry, "place", where.removesuffix(key))
                self.put(f"{name}.{entry}", inner, f"{place}{name}.{entry}")
            return
        try:
            value = meaning(value, setting)
            check_allowed(value, setting.meta)
            self.values.append((name, value))
        except ValueError as error:
            text = shown(written(str(value) if isinstance(value, str) else value))
            self.errors.append(f"{where}: {text} is not {error}")


def meaning(value, setting):
    """The value of the canonical key, or ValueError."""
    if section(setting.kind):  # `lora:` alone means its defaults, `lora: null` none
        return {} if value == "" or convert(value, bool | None) else None
    value = convert(value, setting.kind)
    return setting.compute(value) if setting.compute else value


def check_allowed(value, meta):
    """What opt says of a field besides its type."""
    values = value if isinstance(value, list) else [value]
    choices, least, most = meta.get("choices"), meta.get("least"), meta.get("most")
    if choices and not set(values) <= set(choices):
        raise ValueError("one of " + ", ".join(map(str, choices)))
    if least is not None and value is not None and value < least:
        raise ValueError(f"at least {least}")
    if most is not None and value is not None and value > most:
        raise ValueError(f"at most {most}")


def make(cls, values):
    """[(canonical name, value)], the later one wins -> an instance of cls."""
    tree, hints = {}, typing.get_type_hints(cls)
    for name, value in values:
        head, dot, entry = name.partition(".")
        value = {entry: value} if dot else value
        tree[head] = {**(tree.get(head) or {}), **value} if isinstance(value, dict) else value
    for f in dataclasses.fields(cls):
        inner, value = section(hints[f.name]), tree.get(f.name)
        if inner and value is not None:
            if isinstance(value.get("alpha"), Scaling):  # now that r is known, too
                value["alpha"] *= value.get("r", inner.r)
            tree[f.name] = inner(**value)
        elif isinstance(value, dict) and f.default_factory is not dataclasses.MISSING:
            tree[f.name] = {**f.default_factory(), **value}
    return cls(**tree)


# ------------------------------------------------------------------------------------------------ YAML


class Loader(yaml.SafeLoader):
    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            place = self.peek_event().start_mark
            what = "anchors (& and *) are not read here; write the value out"
            raise yaml.composer.ComposerError(None, None, what, place)
        return super().compose_node(parent, index)


def read(path):
    """A YAML file -> (map, errors). Keys know their place; values stay texts until a field decides."""
    path, errors = Path(path), []
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
            return {}, [f"{path}: is no file; expected a YAML file of settings, such as those in configs/"]
        size = status.st_size
        if size > LARGEST_FILE:
            most = f"at most {LARGEST_FILE}"
            return {}, [f"{path}: {size} bytes is too long for settings ({most}); is it the right file?"]
        node = Loader(path.read_bytes()).get_single_node()
        tree = {} if node is None else plain(node, path, errors)
    except OSError as error:
        return {}, [f"{path}: {error.strerror}; expected a YAML file of settings, such as those in configs/"]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path} line {mark.line + 1}" if mark else f"{path}"
        return {}, [f"{place}: {getattr(error, 'problem', None) or error}; is it YAML?"]
    except RecursionError:
        return {}, [f"{path}: nested too deeply; is it a YAML file of settings?"]
    if not isinstance(tree, dict):
        return {}, [*errors, f"{path}: holds no map of key: value; is it a YAML file of settings?"]
    if len(tree) > MOST_KEYS:
        return {}, [f"{path}: holds {len(tree)} keys; is it a YAML file of settings?"]
    return tree, errors


# YAML's own tags; others make Python objects.
KINDS = ("str", "int", "float", "bool", "null", "timestamp", "seq", "map", "merge", "value")


def plain(node, path, errors):
    """A YAML node -> dict, list, str (quoted), Plain (not quoted) or None."""
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    if kind not in KINDS:
        place = f"{path} line {node.start_mark.line + 1}"
        errors.append(f"{place}: the tag {kind} is refused; write a text, number, list or map")
        return None
    if isinstance(node, yaml.ScalarNode):
        if node.style:  # quoted, so a text
            return node.value
        return None if node.value in YAML_NULLS else Plain(node.value)
    if isinstance(node, yaml.SequenceNode):
        return [plain(n, path, errors) for n in node.value]
    out = {}
    for key_node, value_node in node.value:
        key = Key(key_node.value if isinstance(key_node, yaml.ScalarNode) else "?")
        key.place = f"{path} line {key_node.start_mark.line + 1}: "
        if key in out:
            first = next(k for k in out if k == key)
            errors.append(f"{key.place}{key}: already given by {first.place}{key}; say it once")
        else:
            out[key] = plain(value_node, path, errors)
    return out


def dump(cfg, path):
    """Write settings as YAML that parse accepts and that gives the same settings."""
    values = dataclasses.asdict(cfg)
    for f in dataclasses.fields(cfg):
        if f.metadata.get("config"):
            del values[f.name]
    text = yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)
    write_file(Path(path), text.encode())


class Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data):
        return True


# ------------------------------------------------------------------------------------------------ flags


def flag(token, index):
    """'--key', '--key=value', '-o', 'key=value' -> (key, value or None); a value: (None, None)."""
    if re.fullmatch(r"--[^\s=].*", token, re.S):
        key, equal, value = token[2:].partition("=")
        return key, Plain(value) if equal else None
    if re.fullmatch(r"-[A-Za-z]\w?", token):
        return token[1:], None
    key, equal, value = token.partition("=")
    if equal and re.fullmatch(r"[A-Za-z][\w.-]*", key) or equal and find(key, index):
        return key, Plain(value)
    return None, None


class Flags:
    """A command line, read from left to right into `given`; `extra` gets what the dataclass does not have.

    Not argparse: that stops at the first error, needs to be told each spelling, and cannot know where the
    value of a flag that it does not have ends.
    """

    def __init__(self, given, argv, extra):
        self.given, self.extra = given, extra
        self.index, self.errors, self.tokens = given.index, given.errors, list(argv)
        settings = self.index.values()
        bare = [s.name for s in settings if s.meta.get("config") or s.meta.get("positional")]
        self.places = dict.fromkeys(bare)  # the fields that words without a flag fill, in order
        self.config = next((name for name in bare if self.index[name].meta.get("config")), None)
        self.repeated = {}  # {name: (key, values)} of list flags that may come several times

    def read(self):
        while self.tokens:
            token = self.tokens.pop(0)
            key, value = flag(token, self.index)
            if key is None and not self.places:
                self.errors.append(f"{token!r}: unexpected; write --key value or key=value")
                continue
            if key is None:
                key, value = next(iter(self.places)), Plain(token)
            setting = find(key, self.index) or Setting(key.replace("-", "_"), object, {}, None)
            if not holds(setting.kind, list):
                self.places.pop(setting.name, None)
            if value is None:
                value = self.value_behind(key, setting)
            if value is not None:
                self.put(key, value, setting)
        for key, values in self.repeated.values():
            self.given.put(key, values, f"--{key}")

    def value_behind(self, key, setting):
        """The value of a flag in the words behind it, a list for a list; None and an error without."""
        is_list, values = holds(setting.kind, list), []
        while self.tokens and self.is_value(self.tokens[0], setting, values):
            values.append(Plain(self.tokens.pop(0)))
        needs = setting.kind is not object and not is_switch(setting)
        if needs and not values and self.tokens and not is_list and not self.tokens[0].startswith("--"):
            values.append(Plain(self.tokens.pop(0)))  # a text may look like key=value or start with a dash
        if needs and not values:
            hint = f"; if it is {self.tokens[0]}, write --{key}={self.tokens[0]}" if self.tokens else ""
            self.errors.append(f"--{key}: needs a value{hint}")
            return None
        if is_list:
            return values
        return values[0] if values else Plain("true")

    def is_value(self, word, setting, values):
        """Whether the next word is one more value of a flag that has `values` already."""
        if flag(word, self.index)[0] is not None:
            return False
        number = holds(setting.kind, int) and word.isdecimal()
        if is_switch(setting) and not (number or word.lower() in (*BOOLS, *NULLS) or word.startswith("{")):
            return False
        if not values:
            return True
        settings_file = self.config in self.places and word.endswith((".yaml", ".yml"))
        return holds(setting.kind, list) and not settings_file

    def put(self, key, value, setting):
        kind, meta = setting.kind, setting.meta
        if holds(kind, list) and (meta.get("repeat") or meta.get("positional")):
            _, values = self.repeated.setdefault(setting.name, (key, []))
            values.extend(value if isinstance(value, list) else [value])
            return
        if self.extra is not None and not find(key, self.index):
            if setting.name in self.extra:
                self.errors.append(f"--{key}: already given; say it once")
            self.extra[setting.name] = value
            return
        if holds(kind, list):
            value = listed(value, f"--{key}", self.errors)
        starts = ("{",) if holds(kind, dict) or section(kind) else ()
        if kind is object:
            starts = ("[",)
        if isinstance(value, str) and value.startswith(starts):
            value = flow(value, f"--{key}", self.errors)
        self.given.put(key, value, f"--{key}")


def is_switch(setting):
    """Whether a flag may stand alone, meaning true or, for a section, its defaults."""
    return bool(holds(setting.kind, bool) or section(setting.kind))


def listed(values, where, errors):
    """The values of a list flag: a b c, or a,b,c, or [a, b, c]."""
    values = values if isinstance(values, list) else [values]
    if len(values) > 1:
        return values
    if values[0].startswith("[") and values[0].endswith("]"):  # [qk]_proj is a regex
        return flow(values[0], where, errors)
    if not values[0]:
        return []
    return [Plain(value.strip()) for value in values[0].split(",")]


def flow(text, where, errors):
    """A list or map in YAML's one-line syntax; the text itself where it is none."""
    try:
        return plain(yaml.compose(text, Loader=Loader), where, errors)
    except (yaml.YAMLError, RecursionError):
        return text


# ------------------------------------------------------------------------------------------------ the calls


def parse(cls, argv=None, script="train", extra=False):
    """Defaults < YAML < flags -> an instance of cls; with extra=True also {flag that cls lacks: text}."""
    argv = sys.argv[1:] if argv is None else list(argv)
    index, others = names(cls, script), {} if extra else None
    if {"--help", "-h"} & set(argv):
        print(describe(cls, index))
        sys.exit(0)
    filed, given = Given(index), Given(index)
    Flags(given, argv, others).read()
    config = next((s.name for s in index.values() if s.meta.get("config")), None)
    path = dict(given.values).get(config)
    if path:
        tree, filed.errors = read(path)
        for key, value in tree.items():
            setting = find(key, index)
            if setting and setting.name == config:
                where = f"{key.place}{key}"
                filed.errors.append(f"{where}: a settings file names no other; give it on the command line")
            else:
                filed.put(key, value, f"{key.place}{key}")
    if filed.errors or given.errors:
        raise Usage("\n".join(filed.errors + given.errors))
    cfg = make(cls, filed.values + given.values)
    return (cfg, others) if extra else cfg


def build(cls, values, where="", nearby=(), script=None):
    """The same strictness for a dict: a section of a YAML file, sampling flags, a JSON record.

    where: its name in messages, -- for flags. nearby: further names that may be meant by a wrong one. script:
    whose other names count as well.
    """
    given = Given(names(cls, script), nearby)
    is_name = bool(where.strip("-"))
    dot = "." if is_name else ""
    for key, value in values.items():
        given.put(str(key), value, f"{where}{dot}{key}")
    if given.errors:
        raise Usage("\n".join(given.errors))
    try:
        return make(cls, given.values)
    except Invalid as e:  # a value that the dataclass itself refuses
        raise Usage(f"{where}: {e}" if is_name else e) from None


def describe(cls, index):
    """The text of --help: every field with its sentence, default and other names."""
    lines = [(cls.__doc__ or "").strip(), "", *describe_flags(cls, index), ""]
    lines.append("--key value, --key=value and key=value are the same, and so are - and _ in a key.")
    return "\n".join(lines)


def describe_flags(cls, index):
    """Two lines for each field."""
    lines = []
    for accepted, setting in index.items():
        if accepted != setting.name or setting.compute:
            continue
        head, dot, last = accepted.rpartition(".")
        owner = section(index[head].kind) if dot else cls
        field = next(f for f in dataclasses.fields(owner) if f.name == last)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        default = "none" if default in ("", None) else default
        text = f"{setting.meta.get('help', '')} (default: {default})"
        if setting.meta.get("choices"):
            text += f"; one of {', '.join(map(str, setting.meta['choices']))}"
        names_of_it = [name for name, s in index.items() if s.name == accepted]
        also = [name for name in names_of_it if name != accepted and "." not in name]
        if also:
            text += "; also " + ", ".join(("-" if len(name) < 2 else "--") + name for name in also)
        lines.append(f"  --{accepted}\n        {text}")
    return lines


def run(main):
    """Call main; what a user can cause becomes a message and an exit code.

    2 wrong use, 1 failure, 130 Ctrl-C, 141 a closed pipe.
    """
    # A terminal that cannot show a name gets escapes: the work is done, and the rest of it is still to come.
    if getattr(sys.stdout, "errors", "") == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = main()
    except Usage as error:
        code = 2
        print(lines_of(error), file=sys.stderr)
    except Invalid as error:
        code = 1
        print(lines_of(error), file=sys.stderr)
    except KeyboardInterrupt:
        code = 130
        print("interrupted", file=sys.stderr)
    except BrokenPipeError:  # `| head` has what it wanted; nothing is left to flush to
        code = 141
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # a full disk, a folder without rights; what more there is to say, others say
        code = 1
        print(lines_of(f"{error.filename or 'a file'}: {error.strerror or error}"), file=sys.stderr)
    if code:
        sys.exit(code)
