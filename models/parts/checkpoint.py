"""Weights on disk: read them, fit them strictly into a model, write them so that they appear whole or never.

    stored = read(folder / "model.safetensors")            # {name: Stored}; nothing is in memory yet
    with torch.device("meta"):
        model = Model(config)
    fill(model, stored, rename, unused, dtype=torch.bfloat16, device="cuda")

`fill` is strict in both directions: every name used or listed as unused with its reason, every hole filled,
shapes equal. Tensors are read one at a time, so loading peaks at one copy of the model in the wanted dtype.
"""
import difflib
import functools
import itertools
import json
import math
import os
import pickle
import re
import shutil
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file

from models.parts import Invalid
from models.parts.plain import (LARGEST_JSON, POINTER, TEMPORARY, an_object, need, parse, read_bytes,
                                read_json,  # noqa: F401  (of all that reads a checkpoint's JSON)
                                read_object, refuse_pointer, shown, temporary_name)

# Keys under which trainers put the state dict inside what they save.
WRAPPERS = ("state_dict", "model", "net", "generator", "module")


# ------------------------------------------------------------------------------------------------ reading


class Stored:
    """One tensor of a file: `shape` and `dtype` are known, `load()` brings the values."""

    def __init__(self, shape, dtype, load):
        self.shape, self.dtype, self.load = tuple(shape), dtype, load


def find(path, names, what):
    """The weight file at `path`: itself or, in a folder, the first of `names` there. what: for the error."""
    path = Path(path)
    if not path.is_dir():
        return path
    files = [path / name for name in names if (path / name).is_file()]
    if not files:
        raise Invalid(f"{path} holds none of {', '.join(names)}. Expected {what}.")
    return files[0]


def read(path) -> dict[str, Stored]:
    """The tensors of a safetensors file, a pickle (weights only), or the shards that an index.json names.

    Wrappers around the state dict (state_dict, model, net, generator) and what DataParallel and torch.compile
    put into names are taken off; state dicts side by side become one with names such as "part.name".
    """
    path = Path(path)
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    if not path.is_file():
        raise Invalid(f"no file at {path}")
    damage = check_file(path)  # of a step folder, which says what was written
    if damage:
        raise Invalid(f"{damage}. Take an earlier step.")
    if path.suffix == ".safetensors":
        return _plain_names(_read_safetensors(path), path)
    state = _plain_names(_unwrap(read_pickle(path), path), path)
    tensors = {name: value for name, value in state.items() if torch.is_tensor(value)}
    return {name: Stored(t.shape, t.dtype, lambda t=t: t) for name, t in tensors.items()}


COMPILED = "_orig_mod."  # torch.compile puts it in front of all that lies in a module, at any depth


def _plain_names(state, path):
    """The state under the names that it has without the wrappers of DataParallel and torch.compile."""
    out = {name.replace(COMPILED, ""): value for name, value in state.items()}
    if len(out) < len(state):
        raise Invalid(f"{path} holds tensors with and without {COMPILED} under one name; which one counts?")
    if out and all(name.startswith("module.") for name in out):
        out = {name.removeprefix("module."): value for name, value in out.items()}
    return out


def _read_shards(path):
    stored = {}
    weight_map = need(read_object(path), "weight_map", dict[str, str])
    for shard in sorted(set(weight_map.values())):
        if shard.endswith(".index.json"):  # it could name this one, and so on for ever
            raise Invalid(f"{path} names {shown(shard)} as a file of weights; an index names no other index")
        stored.update(read(path.parent / shard))
    return stored


def _read_safetensors(path):
    def load(name):  # opened anew for each tensor: an open map would keep every page it has touched
        with safetensors.safe_open(path, "pt") as f:
            return f.get_tensor(name)

    out = {}
    _check_begin(path)
    try:
        with safetensors.safe_open(path, "pt") as f:
            for name in f.keys():
                part = f.get_slice(name)
                dtype = DTYPES.get(part.get_dtype())
                out[name] = Stored(part.get_shape(), dtype, lambda name=name: load(name))
    except (OSError, safetensors.SafetensorError) as e:
        why = shown(e, 200)
        raise Invalid(f"{path} is damaged or not a safetensors file ({why}). Copy it again.") from None
    return out


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool, "C64": torch.complex64}
# What torch.load raises for bytes that are no PyTorch file; which of them depends on where they stop making
# sense.
MALFORMED = (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError,
             AssertionError, MemoryError, ArithmeticError)


def read_pickle(path):
    """What a file of torch.save holds; only tensors, numbers, texts, lists and dictionaries are unpickled."""
    is_zip = _check_begin(path).startswith(b"PK")  # as since 1.6; only those can be mapped into memory
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as e:  # torch's own text tells how to open it all the same
        raise Invalid(f"{path} holds {_foreign(e)} and was not opened, since unpickling it could run code. "
                      "Ask its author for a safetensors file, or for one of its tensors alone.") from None
    except MALFORMED as e:
        raise Invalid(f"{path} is damaged or not a PyTorch file ({_first_line(e)}). Copy it again.") from None


def _foreign(error):
    """What torch would not unpickle, by the name that its message has."""
    found = re.search(r"Unsupported (?:global: GLOBAL|class|operand) ([\w.]+)", str(error))
    if not found:
        return "more than tensors"
    if found[1].startswith("numpy."):  # a loss or a step that was saved beside the weights
        return f"numbers of numpy beside tensors ({shown(found[1])})"
    return f"{shown(found[1])} beside tensors"


def _check_begin(path):
    """The first bytes of a file that is no pointer of Git LFS."""
    with open(path, "rb") as f:
        begin = f.read(len(POINTER))
    refuse_pointer(path, begin)
    return begin


DEEPEST = 8  # wrappers around wrappers: one that holds itself would have no end


def _unwrap(state, path):
    """The state dict inside what a pickle holds."""
    for _ in range(DEEPEST):
        if not isinstance(state, dict) or any(torch.is_tensor(v) for v in state.values()):
            break
        inner = [name for name in WRAPPERS if isinstance(state.get(name), dict)]
        if inner:
            state = state[inner[0]]
            continue
        joined = _side_by_side(state)
        if not any(torch.is_tensor(v) for v in joined.values()):
            raise Invalid(f"{path} holds no tensors; its keys are {shown(list(state)[:8], 200)}")
        state = joined
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise Invalid(f"{path} holds a {type(state).__name__}, expected a dictionary of named tensors")
    if not any(torch.is_tensor(v) for v in state.values()):
        raise Invalid(f"{path} holds no tensors {DEEPEST} levels deep")
    return state


def split(stored, prefix):
    """(those under a prefix, under their names without it, all others) of {name: Stored}."""
    inside, others = {}, {}
    for name, tensor in stored.items():
        bare = name.removeprefix(prefix)
        (others if bare == name else inside)[bare] = tensor
    return inside, others


def _side_by_side(state):
    """{"part.name": value} of several state dicts in one file, as in IndexTTS2's s2mel.pth."""
    out = {}
    for part, tensors in state.items():
        if isinstance(tensors, dict):
            out |= {f"{part}.{str(name).removeprefix('module.')}": value for name, value in tensors.items()}
    return out


def _first_line(error):
    return shown(next(iter(str(error).splitlines()), type(error).__name__), 200)


def read_metadata(path) -> dict[str, str]:
    """The text entries in a safetensors header; {} where there are none."""
    try:
        with safetensors.safe_open(path, "pt") as f:
            return f.metadata() or {}
    except (OSError, safetensors.SafetensorError) as e:
        why = shown(e, 200)
        raise Invalid(f"{path} is damaged or not a safetensors file ({why}). Copy it again.") from None


# {pattern of the length g's name: name of the direction v}, as torch wrote them before and since 2.0
WEIGHT_NORM = {
    r"(.*)weight_g$": "{}weight_v",
    r"(.*)parametrizations\.weight\.original0$": "{}parametrizations.weight.original1",
}


def fold_weight_norm(stored) -> dict[str, Stored]:
    """Replace each pair weight_g, weight_v (or parametrizations.weight.original0/1) by the weight it makes.

    weight = g * v / |v|, the norm over every axis along which g has size one (arXiv 1602.07868). A transposed
    convolution keeps its input axis, since that is axis 0 of its weight.
    """
    out = dict(stored)
    for name in stored:
        for pattern, other in WEIGHT_NORM.items():
            m = re.match(pattern, name)
            if not m or other.format(m[1]) not in stored:
                continue
            g, v = out.pop(name), out.pop(other.format(m[1]))
            axes = [axis for axis, size in enumerate(g.shape) if size == 1]

            def load(g=g, v=v, axes=axes):
                v = v.load().float()
                return g.load().float() * v / torch.linalg.vector_norm(v, dim=axes, keepdim=True)

            out[m[1] + "weight"] = Stored(v.shape, torch.float32, load)
    return out


# ------------------------------------------------------------------------------------------------ filling


@dataclass
class Form:
    """How stored tensors are taken: the further keywords of `fill`."""

    dtype: torch.dtype = torch.float32  # of floating tensors; others keep theirs
    device: str = "cpu"
    allow_unused: bool = False  # names that are neither known nor listed are passed over
    what: str = "checkpoint"  # whose tensors they are, for the message


@dataclass
class Match:
    """Which stored tensor goes where, and what fits nowhere."""

    filled: dict = field(default_factory=dict)  # {own name: name in the file}
    listed: list = field(default_factory=list)  # names that are known to be unused
    unexpected: list = field(default_factory=list)
    misfits: list = field(default_factory=list)  # texts: tensors of another shape, or two for one place
    missing: list = field(default_factory=list)


def fill(model, stored, rename=None, unused=None, **form):
    """Put every stored tensor into the parameter or persistent buffer of that name. Returns the unused names.

    rename(published) -> name in `model`. unused: {regex over published names: why nobody needs it}. form: see
    Form. A name that is neither known nor listed is an error unless allow_unused.
    """
    form = Form(**form)
    match = _match(model, stored, rename or str, unused or {})
    if match.missing or match.misfits or (match.unexpected and not form.allow_unused):
        raise Invalid(_does_not_fit(form.what, len(stored), match))
    for place, name in match.filled.items():
        value = stored[name].load()
        dtype = form.dtype if value.is_floating_point() else value.dtype
        # copy: on the CPU the same dtype would otherwise stay a window into the file and follow what happens
        # to it
        value = value.to(device=form.device, dtype=dtype, copy=True).contiguous()
        module, leaf = holder(model, place)
        if leaf in module._parameters:
            module._parameters[leaf] = torch.nn.Parameter(value, requires_grad=value.is_floating_point())
        else:
            module._buffers[leaf] = value
    return match.listed + match.unexpected


def _match(model, stored, rename, unused):
    match = Match()
    # named_parameters has those that state_dict leaves out, state_dict the persistent buffers.
    places = {**dict(model.named_parameters()), **model.state_dict(keep_vars=True)}
    for name, tensor in stored.items():
        place = rename(name)
        if any(re.fullmatch(pattern, name) for pattern in unused):
            match.listed.append(name)
        elif place not in places:
            match.unexpected.append(name)
        elif tuple(places[place].shape) != tensor.shape:
            shapes = f"{list(tensor.shape)}, the model has {list(places[place].shape)}"
            match.misfits.append(f"{name} is {shapes}")
        elif places[place].is_floating_point() and not _is_floating(tensor):
            match.misfits.append(f"{name} is {tensor.dtype}, the model has {places[place].dtype}")
        elif place in match.filled:
            match.misfits.append(f"{name} and {match.filled[place]} are the same tensor of the model")
        else:
            match.filled[place] = name
    for place in places:
        if place not in match.filled and not any(place in text for text in match.misfits):
            match.missing.append(place)
    return match


def _is_floating(tensor):
    """Also of a dtype that has no name here: those are the smaller floating ones."""
    return tensor.dtype is None or tensor.dtype.is_floating_point


NAMED = 6  # names of each kind in a message: enough to see the pattern, few enough to read


def _does_not_fit(what, total, match):
    parts = []
    if match.missing:
        parts.append(f"missing {_some(match.missing)}")
    if match.unexpected:
        parts.append(f"unexpected {_some(match.unexpected)}")
    if match.misfits:
        parts.append(_some(match.misfits))
    odd = len(match.unexpected) + len(match.misfits)
    hint = ""
    for name in match.unexpected[:1]:  # one example shows which naming the file is in
        close = difflib.get_close_matches(name, match.missing, 1, 0.8)
        hint += f" Closest: {name} (did you mean {close[0]}?)." if close else ""
    if match.unexpected and not match.missing and not match.misfits:
        hint += " To load it without the unexpected names: --allow_unused_tensors."
    counts = f"{odd} of its {total} tensors do not fit, {len(match.missing)} are missing"
    return (f"{what}: {counts}: {'; '.join(parts)}.{hint} "
            "Is this the original checkpoint or a converted one?")


def _some(names):
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(shown(name, 160) for name in names[:NAMED]) + more


def main_dtype(stored):
    """The floating dtype that most of the values of a file have."""
    sizes = {}
    for tensor in stored.values():
        if tensor.dtype is not None and tensor.dtype.is_floating_point:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + math.prod(tensor.shape)
    if not sizes:
        raise Invalid("the checkpoint has no floating weights at all; is it the right file?")
    return max(sizes, key=sizes.get)


# ----------------------------------------------------------------------------------------- weights of a model


def holder(model, name):
    """(module, last name) of a parameter or buffer."""
    module, _, leaf = name.rpartition(".")
    return model.get_submodule(module), leaf


def published(model):
    """[(name, parameter, module, last name)] of what a published file of the model holds.

    A module that carries more than it was published with names those parameters in `added`, and puts them
    into a published one by its method `merged`.
    """
    out = []
    for name, p in model.named_parameters():
        module, leaf = holder(model, name)
        if leaf not in getattr(module, "added", ()):
            out.append((name, p, module, leaf))
    return out


def weights(model, merged=False) -> dict[str, torch.Tensor]:
    """{name: tensor} for a published file. merged puts in what modules have added, in float32, one at a time.

    A parameter that is kept in another dtype than it was published in says so by `published_dtype`.
    """
    out = {}
    for name, p, module, leaf in published(model):
        if hasattr(module, "code_scale"):
            raise Invalid(f"{name} was rounded to a few bits when the model was loaded, and rounded weights "
                          "are never saved. Load the base with base_bits 16, as merging does.")
        value = module.merged(leaf) if merged and hasattr(module, "added") else p.detach()
        out[name] = value.to(getattr(p, "published_dtype", value.dtype))
    return out


FINGERPRINT_VALUES = 64  # of each weight: training moves all of them, and so few are read in no time


def fingerprint(model) -> str:
    """Names a base by some values of each weight, rounded to bf16 so that every dtype of one base agrees."""
    crc = 0
    for name, p, _, _ in sorted(published(model), key=lambda entry: entry[0]):
        flat = p.detach().reshape(-1)
        stride = max(1, flat.numel() // FINGERPRINT_VALUES)
        values = flat[::stride][:FINGERPRINT_VALUES].to(torch.bfloat16).float().cpu()
        crc = zlib.crc32(f"{name}{tuple(p.shape)}".encode() + values.numpy().tobytes(), crc)
    return f"{crc:08x}"


# ----------------------------------------------------------------------------------------------- step folders

INDEX = "training_state.json"
NO_SUM = "checksum of all the rest"  # stands in the index where its own checksum will be


def write_step(root, step, write, state) -> Path:
    """root/step_0000500, complete or not there at all; then `latest` names it.

    write(folder) fills a temporary folder; the index with `state` and every file's size and checksum goes in
    last; all is flushed to disk before the rename. Nothing older is touched before the new one is durable.
    """
    root = Path(root)
    name = f"step_{step:07d}"
    tmp = root / f"{name}.tmp"
    try:
        remove(tmp)  # of an earlier try
        tmp.mkdir(parents=True)
        write(tmp)
        files = sorted(p for p in tmp.rglob("*") if p.is_file())
        index = {str(p.relative_to(tmp)): {"bytes": p.stat().st_size, "crc32": checksum(p)} for p in files}
        text = json.dumps({**state, "files": index, "checksum": NO_SUM}, indent=1)
        (tmp / INDEX).write_text(text.replace(NO_SUM, f"{zlib.crc32(text.encode()):08x}"))
        for path in [*files, tmp / INDEX, tmp]:
            _flush(path)
        _replace(tmp, root / name)
    except (OSError, RuntimeError, safetensors.SafetensorError) as e:  # a full disk is torch's RuntimeError
        free, need = shutil.disk_usage(root).free / 1e6, megabytes(tmp)
        shutil.rmtree(tmp, ignore_errors=True)
        raise Invalid(f"could not save {root / name}: {_first_line(e)}. {need:.1f} MB were written, "
                      f"{free:.1f} MB are free. Earlier checkpoints are untouched.") from e
    _flush(root)
    point(root, name)
    return root / name


def _replace(tmp, folder):
    """Rename tmp to folder; an old one stays readable under another name until the new one is in place."""
    # A free name: what lies under others may be a user's.
    old = put_aside(folder) if os.path.lexists(folder) else None
    os.rename(tmp, folder)
    if old:
        shutil.rmtree(old, ignore_errors=True)


def point(root, name):
    """Let root/latest name a step folder: a link, or a text file where links are refused."""
    tmp, latest = root / temporary_name("latest"), root / "latest"
    sweep(latest)
    try:
        tmp.symlink_to(name)
    except OSError:
        tmp.write_text(name)
    if not latest.is_symlink() and os.path.lexists(latest) and not _names_a_step(latest):
        put_aside(latest)
    os.replace(tmp, latest)
    _flush(root)


def sweep(path):
    """Delete what killed processes were writing in place of `path`; call it where no other can be writing."""
    for temporary in path.parent.glob(f".{path.name}.*.tmp"):
        if re.fullmatch(TEMPORARY.format(name=re.escape(path.name)), temporary.name):
            remove(temporary)


def follow(path):
    """The step folder that a text file `latest` names, as where links are refused; else the path."""
    path = Path(path)
    if path.name == "latest" and _names_a_step(path):
        return path.with_name(path.read_text().strip())
    return path


def _names_a_step(latest):
    """Whether it is the text file of `point`; a folder is a copy that followed the link, others a user's."""
    return latest.is_file() and re.fullmatch(rb"step_\d+", latest.read_bytes()[:30]) is not None


def put_aside(path) -> Path:
    """Rename a file or folder to the first free of <name>.before-1, -2, ..."""
    path = Path(path)
    for n in itertools.count(1):
        aside = path.with_name(f"{path.name}.before-{n}")
        if not os.path.lexists(aside):
            return path.rename(aside)


BLOCK = 1 << 22  # bytes read at once: 4 MB keep a disk busy and no memory


def checksum(path):
    crc = 0
    with open(path, "rb") as f:
        while block := f.read(BLOCK):
            crc = zlib.crc32(block, crc)
    return crc


def stamp(path):
    """Size and time of change: while both stay, a file is taken to be the same."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


@functools.lru_cache(64)
def _checksum(path, stamp):
    """The checksum of a file that has this stamp: read once, however often it is loaded."""
    return checksum(path)


def _flush(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_step(folder) -> str | None:
    """None for a step folder whose index agrees with its files, otherwise what is wrong with it."""
    folder = Path(folder)
    if not folder.is_dir():
        return f"no folder {folder}"
    if not (folder / INDEX).is_file():
        return f"{folder} has no {INDEX}: it was not completed"
    try:
        files = _read_index(folder / INDEX)
    except (Invalid, UnicodeDecodeError):
        return f"{folder / INDEX} is damaged"
    if files is None:
        return f"{folder / INDEX} does not have the checksum it was written with"
    for name, (size, crc) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size} bytes, {size} were written"
        if checksum(path) != crc:
            return f"{path} does not have the checksum it was written with"
    return None


def _read_index(path):
    """{file: (bytes, checksum)} of an index, None if its own checksum is wrong."""
    text = read_bytes(path, LARGEST_JSON).decode()
    index = an_object(parse(text, path), path)
    files, stated = need(index, "files", dict), need(index, "checksum", str)
    if len(stated) != 8 or f"{zlib.crc32(text.replace(stated, NO_SUM).encode()):08x}" != stated:
        return None
    out = {}
    for name in files:
        entry = need(files, name, dict)
        out[name] = need(entry, "bytes", int), need(entry, "crc32", int)
    return out


def check_file(path) -> str | None:
    """What is wrong with a file of a step folder by the index beside it; None if nothing or without one."""
    path = Path(path)
    try:
        files = _read_index(path.parent / INDEX) or {}
    except (Invalid, UnicodeDecodeError):
        return None
    if path.name not in files or _checksum(path, stamp(path)) == files[path.name][1]:
        return None
    return f"{path} does not have the checksum it was written with"


def steps(root) -> list[Path]:
    """Step folders below root, newest first, complete or not."""
    folders = [path for path in Path(root).glob("step_*") if path.is_dir()]
    named = [path for path in folders if re.fullmatch(r"step_\d+", path.name)]  # not step_0000500.tmp
    return sorted(named, key=lambda path: (step_number(path), path), reverse=True)


def step_number(folder) -> int:
    return int(folder.name.removeprefix("step_"))


def newest_step(root, say=print) -> Path | None:
    """The newest complete step folder; what is damaged is named and passed over."""
    for folder in steps(root):
        wrong = check_step(folder)
        if wrong is None:
            return folder
        say(f"passing over a damaged checkpoint: {wrong}")
    return None


def prune(root, keep_last, keep_every=0, stay=(), say=print):
    """Delete step folders but the newest keep_last (0: all), each keep_every-th and the steps in `stay`."""
    if not keep_last:
        return
    for folder in steps(root)[keep_last:]:
        step = step_number(folder)
        if step in stay or (keep_every and step % keep_every == 0):
            continue
        try:
            shutil.rmtree(folder)
        except OSError as e:
            say(f"could not delete {folder}: {e}")


def remove(path):
    """Delete a file or folder if it is there; of a link the link, never what it leads to."""
    if Path(path).is_dir() and not Path(path).is_symlink():
        shutil.rmtree(path)
    else:
        Path(path).unlink(missing_ok=True)


def megabytes(folder) -> float:
    sizes = [path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()]
    return sum(sizes) / 1e6


def save_tensors(path, tensors, metadata=None):
    """A safetensors file from tensors on any device, flushed to disk under another name and then renamed."""
    path = Path(path)
    tmp = path.with_name(path.name + ".tmp")
    values = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    save_file(values, tmp, metadata={"format": "pt", **(metadata or {})})
    os.chmod(tmp, 0o666 & ~_umask())  # safetensors writes files that only their owner can read
    _flush(tmp)
    os.replace(tmp, path)


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
