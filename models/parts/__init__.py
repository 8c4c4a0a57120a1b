"""What backbones share. A part takes numbers and tensors, never a backbone's config, and knows no backbone."""


from dataclasses import field, fields


class Invalid(ValueError):
    """Something that the user gave does not fit: a file, a row, a checkpoint, an adapter, a value.

    The message says what was found, where, what was expected, and what to do next. Scripts print it without a
    traceback and exit 1.
    """


def opt(default, help="", **meta):
    """A dataclass field with the one sentence that --help shows; the other marks are for configs.parse.

    config=True is the settings file, positional=True a flag that needs no name, repeat=True a list flag that may come
    several times, choices=(...) the only values allowed.
    """
    meta, compare = {"help": help, **meta}, not meta.get("config")
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=meta)
    return field(default=default, metadata=meta, compare=compare)


def check(options, **least):
    """Invalid, with everything that is wrong, where a field has less than its `least` or none of its choices; None is no value."""
    wrong = [f"{k} is {getattr(options, k)}, expected at least {n}" for k, n in least.items()
             if getattr(options, k) is not None and not getattr(options, k) >= n]
    wrong += [f"{f.name} is {getattr(options, f.name)!r}, expected one of {', '.join(map(repr, f.metadata['choices']))}" for f in fields(options)
              if f.metadata.get("choices") and getattr(options, f.name) not in f.metadata["choices"]]
    if wrong:
        raise Invalid("; ".join(wrong))
