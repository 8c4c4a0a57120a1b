"""Settings: a dataclass at the top of each script, then a YAML file, then flags; the later one wins.

    @dataclass
    class Train:
        config: str = opt("", "settings file", config=True)
        learning_rate: float = opt(1e-4, "peak, reached after warmup_steps")
    cfg = parse(Train)          # python train.py configs/x.yaml --learning_rate 5e-5 lora.r=16

The declared type decides what a text means (1e-4 is a number, False is false); unknown keys, keys given twice, wrong
types are collected and refused together, each with its place and the nearest known name.
"""
import dataclasses
import difflib
import math
import os
import re
import sys
import types
import typing
from collections import namedtuple
from pathlib import Path

import yaml

from configs.aliases import ALIASES, COMPUTED, Scaling
from models.parts import Invalid, opt  # noqa: F401  (opt marks a field: its default and its sentence for --help)

NULLS = ("null", "Null", "NULL", "~", "none", "None")
BOOLS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", list: "a list",
            dict: "a map of key: value", type(None): "null"}
LIMIT = 2**20

Setting = namedtuple("Setting", "name kind meta compute")       # canonical; declared type; metadata of opt; COMPUTED


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
    base, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if len(members(kind)) > 1:
        for k in sorted(members(kind), key=lambda k: (k is not type(None), (k is str) != (type(value) is str))):
            try:
                return convert(value, k)
            except ValueError:
                pass
        raise ValueError(" or ".join(EXPECTED.get(typing.get_origin(k) or k, str(k)) for k in members(kind)))
    if base not in EXPECTED:                                    # undeclared: as YAML has it, but 1e-4 is a number
        if isinstance(value, (dict, list, tuple)):
            return convert(value, dict if isinstance(value, dict) else list)
        return convert(value, None | int | float | bool | str) if isinstance(value, Plain) else value
    if isinstance(value, Plain) and base is not str and value in ("", *NULLS):
        value = None
    number = isinstance(value, (str, int)) and not isinstance(value, bool)
    try:
        if base is str and (value is None or isinstance(value, str)):
            return str(value or "")
        if base is bool and isinstance(value, (str, bool)):
            return value if isinstance(value, bool) else BOOLS[value.lower()]
        if base is int and number:
            return int(value)
        if base is float and (number or isinstance(value, float)) and math.isfinite(float(value)):
            return float(value)
        if base is type(None) and value is None:
            return None
        value = [value] if base is list and type(value) in (int, float) else value  # one number is a list of one
        if base is list and (value is None or isinstance(value, (str, list, tuple))):
            if isinstance(value, str):                          # one text is a list of one; numbers may be 1,2,3
                numbers = inner and not holds(inner[0], str)
                value = [Plain(v) for v in value.split(",")] if numbers else [value] if value else []
            return [convert(v, inner[0] if inner else object) for v in value or ()]
        if base is dict and (value is None or isinstance(value, dict)):
            return {str(k): convert(v, inner[1] if inner else object) for k, v in (value or {}).items()}
    except (ValueError, KeyError) as error:
        if base in (list, dict):
            raise ValueError(f"{EXPECTED[base]} in which each value is {error}") from None
    raise ValueError(EXPECTED[base])


# ------------------------------------------------------------------------------------------------ names


def names(cls, script):
    """{accepted name: Setting}: "lr", "learning_rate", "lora", "lora.r", "rank", "lora.rank", ..."""
    index = {}

    def add(cls, prefix):
        hints = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            index[prefix + f.name] = Setting(prefix + f.name, hints[f.name], f.metadata, None)
            if section(hints[f.name]):
                add(section(hints[f.name]), prefix + f.name + ".")

    add(cls, "")
    others = [(a, c, None, None) for c, aliases in ALIASES.get(script, {}).items() for a in aliases]
    others += [(a, *target) for a, target in COMPUTED.get(script, {}).items()]
    for alias, canonical, kind, compute in others:
        setting = find(canonical, index)
        if setting:
            head, dot, _ = canonical.partition(".")
            for name in (alias, head + dot + alias) if dot and alias != canonical.rpartition(".")[2] else (alias,):
                index.setdefault(name, setting._replace(kind=kind or setting.kind, compute=compute))
    return index


def find(key, index):
    """The Setting of a key, an alias, or an entry of a map; None if there is none."""
    head, dot, entry = key.partition(".")
    whole, head = index.get(key.replace("-", "_")), index.get(head.replace("-", "_"))
    if whole or not (head and entry and holds(head.kind, dict)):
        return whole
    inner = next((typing.get_args(k) for k in members(head.kind) if typing.get_origin(k) is dict), None)
    return Setting(f"{head.name}.{entry}", inner[1] if inner else object, {}, None)


class Given:
    """What one place (a file, the flags, a dict) sets: [(canonical name, value)], and what is wrong with it."""

    def __init__(self, index, nearby=()):
        self.index, self.nearby, self.values, self.places, self.errors = index, nearby, [], {}, []

    def put(self, key, value, where):
        setting = find(key, self.index)
        if not setting:
            close = difflib.get_close_matches(key.replace("-", "_"), [*self.index, *self.nearby], 1, 0.0)
            self.errors.append(f"{where}: unknown; the nearest known name is {close[0] if close else 'none'}")
            return
        name, kind, meta, compute = setting
        if name in self.places:
            self.errors.append(f"{where}: already given by {self.places[name]}; say it once")
            return
        self.places[name] = where
        if isinstance(value, dict) and (section(kind) or holds(kind, dict)):
            self.values.append((name, {}))
            for k, v in value.items():
                self.put(f"{name}.{k}", v, f"{getattr(k, 'place', where.removesuffix(key))}{name}.{k}")
            return
        try:
            if section(kind):                                   # `lora:` alone means its defaults, `lora: null` none
                value = {} if value == "" or convert(value, bool | None) else None
            else:
                value = convert(value, kind)
                value = compute(value) if compute else value
            choices = meta.get("choices", ())
            if choices and not set(value if isinstance(value, list) else [value]) <= set(choices):
                raise ValueError("one of " + ", ".join(map(str, choices)))
            self.values.append((name, value))
        except ValueError as error:
            text = repr(str(value)) if isinstance(value, str) else repr(value)
            self.errors.append(f"{where}: {text if len(text) < 80 else text[:76] + ' ...'} is not {error}")


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
            if isinstance(value.get("alpha"), Scaling):
                value["alpha"] *= value.get("r", inner.r)
            tree[f.name] = inner(**value)
        elif isinstance(value, dict) and f.default_factory is not dataclasses.MISSING:
            tree[f.name] = {**f.default_factory(), **value}
    return cls(**tree)


# ------------------------------------------------------------------------------------------------ YAML


class Loader(yaml.SafeLoader):
    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "anchors (& and *) are not read here; write the value out",
                                              self.peek_event().start_mark)
        return super().compose_node(parent, index)


def read(path):
    """A YAML file -> (map, errors). Keys know their place; values stay texts until a field decides what they mean."""
    path, errors = Path(path), []
    try:
        size = path.stat().st_size
        if size > LIMIT:
            return {}, [f"{path}: {size} bytes is too long for settings (at most {LIMIT}); is it the right file?"]
        node = Loader(path.read_bytes()).get_single_node()
        tree = {} if node is None else plain(node, path, errors)
        if not isinstance(tree, dict):
            return {}, [*errors, f"{path}: holds no map of key: value; is it a YAML file of settings?"]
        if len(tree) > 500:
            return {}, [f"{path}: holds {len(tree)} keys; is it a YAML file of settings?"]
        return tree, errors
    except OSError as error:
        return {}, [f"{path}: {error.strerror}; expected a YAML file of settings, such as those in configs/"]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path} line {mark.line + 1}" if mark else f"{path}"
        return {}, [f"{place}: {getattr(error, 'problem', None) or error}; is it YAML?"]
    except RecursionError:
        return {}, [f"{path}: nested too deeply; is it a YAML file of settings?"]


def plain(node, path, errors):
    """A YAML node -> dict, list, str (quoted), Plain (not quoted) or None."""
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    if kind not in ("str", "int", "float", "bool", "null", "timestamp", "seq", "map", "merge", "value"):
        place = f"{path} line {node.start_mark.line + 1}"
        errors.append(f"{place}: the tag {kind} is refused; write a text, number, list or map")
        return None
    if isinstance(node, yaml.ScalarNode):
        return node.value if node.style else None if node.value in NULLS[:4] else Plain(node.value)
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
    temporary = Path(f"{path}.tmp")
    text = yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


class Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data):
        return True


# ------------------------------------------------------------------------------------------------ flags


def flag(token, index):
    """'--key', '--key=value', '-o', 'key=value' -> (key, value or None); anything else is a value: (None, None)."""
    if re.fullmatch(r"--[^\s=].*", token, re.S):
        key, equal, value = token[2:].partition("=")
        return key, Plain(value) if equal else None
    if re.fullmatch(r"-[A-Za-z]\w?", token):
        return token[1:], None
    key, equal, value = token.partition("=")
    if equal and re.fullmatch(r"[A-Za-z][\w.-]*", key) or equal and find(key, index):
        return key, Plain(value)
    return None, None


def command_line(given, argv, extra):
    """Fill `given` from the flags, and `extra`, if it is a dict, with those that the dataclass does not have."""
    index, tokens, repeated = given.index, list(argv), {}
    places = dict.fromkeys(s.name for s in index.values() if s.meta.get("config") or s.meta.get("positional"))
    config = next((name for name in places if index[name].meta.get("config")), None)
    while tokens:
        token = tokens.pop(0)
        key, value = flag(token, index)
        if key is None and not places:
            given.errors.append(f"{token!r}: unexpected; write --key value or key=value")
            continue
        if key is None:
            key, value = next(iter(places)), Plain(token)
        setting = find(key, index) or Setting(key.replace("-", "_"), object, {}, None)
        is_list, is_switch = holds(setting.kind, list), holds(setting.kind, bool) or section(setting.kind)
        if not is_list:
            places.pop(setting.name, None)
        if value is None:
            values = []
            while tokens and flag(tokens[0], index)[0] is None and (is_list or not values) and (
                    not is_switch or tokens[0].lower() in (*BOOLS, *NULLS) or tokens[0].startswith("{")):
                if values and config in places and tokens[0].endswith((".yaml", ".yml")):
                    break                                       # the settings file, not one more value
                values.append(Plain(tokens.pop(0)))
            needs = not is_switch and setting.kind is not object
            if needs and not values and tokens and not is_list and not tokens[0].startswith("--"):
                values.append(Plain(tokens.pop(0)))             # a text may look like key=value or start with a dash
            if needs and not values:
                hint = f"; if it is {tokens[0]}, write --{key}={tokens[0]}" if tokens else ""
                given.errors.append(f"--{key}: needs a value{hint}")
                continue
            value = values if is_list else values[0] if values else Plain("true")
        if is_list and (setting.meta.get("repeat") or setting.meta.get("positional")):
            repeated.setdefault(setting.name, (key, []))[1].extend(value if isinstance(value, list) else [value])
        elif extra is not None and not find(key, index):
            if setting.name in extra:
                given.errors.append(f"--{key}: already given; say it once")
            extra[setting.name] = value
        else:
            value = listed(value, f"--{key}", given.errors) if is_list else value
            takes_map = holds(setting.kind, dict) or section(setting.kind)
            if isinstance(value, str) and (takes_map and value.startswith("{") or setting.kind is object and value.startswith("[")):
                value = flow(value, f"--{key}", given.errors)
            given.put(key, value, f"--{key}")
    for key, values in repeated.values():
        given.put(key, values, f"--{key}")


def listed(values, where, errors):
    """The values of a list flag: a b c, or a,b,c, or [a, b, c]."""
    values = values if isinstance(values, list) else [values]
    if len(values) > 1:
        return values
    if values[0].startswith("[") and values[0].endswith("]"):   # [qk]_proj is a regex
        return flow(values[0], where, errors)
    return [Plain(v.strip()) for v in values[0].split(",")] if values[0] else []


def flow(text, where, errors):
    """A list or map in YAML's one-line syntax; the text itself where it is none."""
    try:
        return plain(yaml.compose(text, Loader=Loader), where, errors)
    except (yaml.YAMLError, RecursionError):
        return text


# ------------------------------------------------------------------------------------------------ the calls


def parse(cls, argv=None, script="train", extra=False):
    """Defaults < YAML < flags -> an instance of cls; with extra=True also {flag that cls does not have: text}."""
    argv = sys.argv[1:] if argv is None else list(argv)
    index, others = names(cls, script), {} if extra else None
    if {"--help", "-h"} & set(argv):
        print(describe(cls, index))
        sys.exit(0)
    filed, given = Given(index), Given(index)
    command_line(given, argv, others)
    config = next((s.name for s in index.values() if s.meta.get("config")), None)
    path = dict(given.values).get(config)
    if path:
        tree, filed.errors = read(path)
        for key, value in tree.items():
            setting = find(key, index)
            if setting and setting.name == config:
                filed.errors.append(f"{key.place}{key}: a settings file names no other; give it on the command line")
            else:
                filed.put(key, value, f"{key.place}{key}")
    if filed.errors or given.errors:
        raise Usage("\n".join(filed.errors + given.errors))
    cfg = make(cls, filed.values + given.values)
    return (cfg, others) if extra else cfg


def build(cls, values, where="", nearby=()):
    """The same strictness for a dict: a section of a YAML file, sampling flags, a JSON record. nearby: names that may be meant too."""
    given = Given(names(cls, None), nearby)
    for key, value in values.items():
        given.put(str(key), value, f"{where}{'.' if where.strip('-') else ''}{key}")
    if given.errors:
        raise Usage("\n".join(given.errors))
    try:
        return make(cls, given.values)
    except Invalid as e:                                        # a value that the dataclass itself refuses
        raise Usage(f"{where}: {e}" if where.strip("-") else e) from None


def describe(cls, index):
    """The text of --help: every field with its sentence, default and other names."""
    lines, defaults = [(cls.__doc__ or "").strip(), ""], {}
    for accepted, setting in index.items():
        if accepted != setting.name or setting.compute:
            continue
        owner = section(index[accepted.rpartition(".")[0]].kind) if "." in accepted else cls
        field = next(f for f in dataclasses.fields(owner) if f.name == accepted.rpartition(".")[2])
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        text = f"{setting.meta.get('help', '')} (default: {'none' if default in ('', None) else default})"
        if setting.meta.get("choices"):
            text += f"; one of {', '.join(map(str, setting.meta['choices']))}"
        also = [a for a, s in index.items() if s.name == accepted and a != accepted and "." not in a]
        if also:
            text += "; also " + ", ".join(("-" if len(a) < 2 else "--") + a for a in also)
        lines.append(f"  --{accepted}\n        {text}")
    return "\n".join([*lines, "", "--key value, --key=value and key=value are the same, and so are - and _ in a key."])


def run(main):
    """Call main; what a user can cause becomes a message and an exit code: 2 wrong use, 1 failure, 130 Ctrl-C, 141 a closed pipe."""
    try:
        code = main()
    except Usage as error:
        code = 2
        print(error, file=sys.stderr)
    except Invalid as error:
        code = 1
        print(error, file=sys.stderr)
    except KeyboardInterrupt:
        code = 130
        print("interrupted", file=sys.stderr)
    except BrokenPipeError:                                     # `| head` has what it wanted; nothing is left to flush to
        code = 141
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if code:
        sys.exit(code)
