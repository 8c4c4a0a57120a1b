"""What backbones share. A part takes numbers and tensors, never a backbone's config; it knows no backbone."""
from dataclasses import field, fields
from typing import NamedTuple


class Invalid(ValueError):
    """Something that the user gave does not fit: a file, a row, a checkpoint, an adapter, a value.

    The message says what was found, where, what was expected, and what to do next. Scripts print it without a
    traceback and exit 1.
    """


class Part(NamedTuple):
    """A frozen model that may lie outside of a checkpoint's folder."""

    repository: str  # its hub id
    file: str = ""  # within the repository; empty: the whole of it
    names: tuple = ()  # of the file or folder elsewhere; none: the repository's
    purpose: str = ""  # "to ..", for who misses it


def opt(default, help="", **meta):
    """A dataclass field with the one sentence that --help shows; the other marks are for configs.parse.

    config=True is the settings file, positional=True a flag that needs no name, repeat=True a list flag that
    may come several times, choices=(...) the only values allowed, least=1 and most=1000 the smallest and the
    largest number.
    """
    meta = {"help": help, **meta}
    compare = not meta.get("config")  # two runs with equal settings are equal, whatever their file was called
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=meta)
    return field(default=default, metadata=meta, compare=compare)


def check(options, **least):
    """Invalid with all that is wrong: fields below their `least` (None is no value), no known choice."""
    wrong = []
    for name, minimum in least.items():
        value = getattr(options, name)
        if value is not None and not value >= minimum:  # NaN, too
            wrong.append(f"{name} is {value}, expected at least {minimum}")
    for f in fields(options):
        value, choices = getattr(options, f.name), f.metadata.get("choices")
        most = f.metadata.get("most")
        if most is not None and value is not None and not value <= most:
            wrong.append(f"{f.name} is {value}, expected at most {most}")
        if choices and value not in choices:
            wrong.append(f"{f.name} is {value!r}, expected one of {', '.join(map(repr, choices))}")
    if wrong:
        raise Invalid("; ".join(wrong))
