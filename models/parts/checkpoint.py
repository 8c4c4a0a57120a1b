"""Weights on disk: read them, fit them strictly into a model, write them so that they appear whole or not at all.

    stored = read(folder / "model.safetensors")            # {name: Stored}; nothing is in memory yet
    with torch.device("meta"):
        model = Model(config)
    fill(model, stored, rename, unused, dtype=torch.bfloat16, device="cuda")

`fill` is strict in both directions: every name used or listed as unused with its reason, every hole filled, shapes
equal. Tensors are read one at a time, so loading peaks at one copy of the model in the wanted dtype.
"""
import difflib
import json
import math
import os
import pickle
import re
import shutil
import zlib
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file

from models.parts import Invalid

WRAPPERS = ("state_dict", "model", "net", "generator", "module")


# ------------------------------------------------------------------------------------------------ reading


class Stored:
    """One tensor of a file: `shape` and `dtype` are known, `load()` brings the values."""

    def __init__(self, shape, dtype, load):
        self.shape, self.dtype, self.load = tuple(shape), dtype, load


def find(path, names, what):
    """The weight file at `path`: the file itself or, in a folder, the first of `names` that is there. what: for the message."""
    path = Path(path)
    if not path.is_dir():
        return path
    found = [path / name for name in names if (path / name).is_file()]
    if not found:
        raise Invalid(f"{path} holds none of {', '.join(names)}. Expected {what}.")
    return found[0]


def read(path) -> dict[str, Stored]:
    """The tensors of a safetensors file, a pickle (weights only), an index.json, or the shards that an index names.

    Wrappers around the state dict (state_dict, model, net, generator) and a common prefix "module." are taken off;
    state dicts side by side become one with names such as "part.name".
    """
    path = Path(path)
    if path.name.endswith(".index.json"):
        shards = sorted(set(read_json(path)["weight_map"].values()))
        stored = {}
        for shard in shards:
            stored.update(read(path.parent / shard))
        return stored
    if not path.is_file():
        raise Invalid(f"no file at {path}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError as e:
        raise Invalid(f"{path} holds more than tensors and was not opened, since unpickling it could run code "
                      f"({_first_line(e)}). Ask its author for a safetensors file.") from None
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError) as e:
        raise Invalid(f"{path} is damaged or not a PyTorch file ({_first_line(e)}). Copy it again.") from None
    while isinstance(state, dict) and not any(torch.is_tensor(v) for v in state.values()):
        inner = [w for w in WRAPPERS if isinstance(state.get(w), dict)]
        parts = {f"{part}.{str(k).removeprefix('module.')}": v for part, tensors in state.items() if isinstance(tensors, dict)
                 for k, v in tensors.items()}  # several state dicts side by side, as in IndexTTS2's s2mel.pth
        if not inner and not any(torch.is_tensor(v) for v in parts.values()):
            raise Invalid(f"{path} holds no tensors; its keys are {', '.join(map(str, list(state)[:8]))}")
        state = state[inner[0]] if inner else parts
    if not isinstance(state, dict):
        raise Invalid(f"{path} holds a {type(state).__name__}, expected a dictionary of tensors")
    if all(k.startswith("module.") for k in state):
        state = {k.removeprefix("module."): v for k, v in state.items()}
    tensors = {k: v for k, v in state.items() if torch.is_tensor(v)}
    return {k: Stored(v.shape, v.dtype, lambda v=v: v) for k, v in tensors.items()}


def _first_line(error):
    return next(iter(str(error).splitlines()), type(error).__name__)


def _is_zip(path):
    with open(path, "rb") as f:
        return f.read(2) == b"PK"


def _read_safetensors(path):
    def load(name):  # opened anew for each tensor: an open map would keep every page it has touched
        with safetensors.safe_open(path, "pt") as f:
            return f.get_tensor(name)

    try:
        with safetensors.safe_open(path, "pt") as f:
            parts = {name: f.get_slice(name) for name in f.keys()}
            return {name: Stored(p.get_shape(), DTYPES.get(p.get_dtype()), lambda name=name: load(name))
                    for name, p in parts.items()}
    except safetensors.SafetensorError as e:
        raise Invalid(f"{path} is damaged or not a safetensors file ({e}). Copy it again.") from None


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


def read_metadata(path) -> dict[str, str]:
    """The text entries in a safetensors header; {} where there are none."""
    try:
        with safetensors.safe_open(path, "pt") as f:
            return f.metadata() or {}
    except safetensors.SafetensorError as e:
        raise Invalid(f"{path} is damaged or not a safetensors file ({e}). Copy it again.") from None


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise Invalid(f"{path} is not valid JSON: {e}") from None


def fold_weight_norm(stored) -> dict[str, Stored]:
    """Replace each pair weight_g, weight_v (or parametrizations.weight.original0/1) by the weight it stands for.

    weight = g * v / |v|, the norm over every axis along which g has size one (arXiv 1602.07868). A transposed
    convolution keeps its input axis, since that is axis 0 of its weight.
    """
    pairs = ((r"(.*)weight_g$", "{}weight_v"), (r"(.*)parametrizations\.weight\.original0$", "{}parametrizations.weight.original1"))
    out = dict(stored)
    for name in stored:
        for pattern, other in pairs:
            m = re.match(pattern, name)
            if not m or other.format(m[1]) not in stored:
                continue
            g, v = out.pop(name), out.pop(other.format(m[1]))
            axes = [i for i, size in enumerate(g.shape) if size == 1]

            def load(g=g, v=v, axes=axes):
                v = v.load().float()
                return g.load().float() * v / torch.linalg.vector_norm(v, dim=axes, keepdim=True)

            out[m[1] + "weight"] = Stored(v.shape, torch.float32, load)
    return out


def fill(model, stored, rename=None, unused=None, dtype=torch.float32, device="cpu", allow_unused=False, what="checkpoint"):
    """Put every stored tensor into the parameter or persistent buffer of that name. Returns the names left unused.

    rename(published) -> name in `model`. unused: {regex over published names: why nobody needs it}. Floating tensors
    take `dtype`, others keep theirs. A name that is neither known nor listed is an error unless allow_unused.
    """
    unused = unused or {}
    wanted = {**dict(model.named_parameters()), **{k: v for k, v in model.state_dict(keep_vars=True).items()}}
    left, unexpected, shapes, filled = [], [], [], {}
    for name, tensor in stored.items():
        own = rename(name) if rename else name
        if any(re.fullmatch(p, name) for p in unused):
            left.append(name)
        elif own not in wanted:
            unexpected.append(name)
        elif tuple(wanted[own].shape) != tensor.shape:
            shapes.append(f"{name} is {list(tensor.shape)}, the model has {list(wanted[own].shape)}")
        elif own in filled:
            shapes.append(f"{name} and {filled[own]} are the same tensor of the model")
        else:
            filled[own] = name
    missing = [name for name in wanted if name not in filled and not any(name in s for s in shapes)]
    if missing or shapes or (unexpected and not allow_unused):
        raise Invalid(_does_not_fit(what, len(stored), missing, unexpected, shapes))
    for own, name in filled.items():
        holder, _, leaf = own.rpartition(".")
        holder = model.get_submodule(holder)
        value = stored[name].load()
        # copy: on the CPU the same dtype would otherwise stay a window into the file and follow what happens to it
        value = value.to(device=device, dtype=dtype if value.is_floating_point() else value.dtype, copy=True).contiguous()
        if leaf in holder._parameters:
            holder._parameters[leaf] = torch.nn.Parameter(value, requires_grad=value.is_floating_point())
        else:
            holder._buffers[leaf] = value
    return left + unexpected


def _does_not_fit(what, total, missing, unexpected, shapes):
    def some(names):
        return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")

    said = [f"missing {some(missing)}"] if missing else []
    said += [f"unexpected {some(unexpected)}"] if unexpected else []
    said += [some(shapes)] if shapes else []
    count = len(missing) + len(unexpected) + len(shapes)
    near = [f"{m} (did you mean {d[0]}?)" for m in unexpected[:1] if (d := difflib.get_close_matches(m, missing, 1, 0.8))]
    hint = f" Closest: {near[0]}." if near else ""
    hint += " To load it without the unexpected names: --allow_unused_tensors." if unexpected and not missing and not shapes else ""
    return f"{what}: {count} of {total} tensors do not fit: {'; '.join(said)}.{hint} Is this the original checkpoint or a converted one?"


def main_dtype(stored):
    """The floating dtype that most of the values of a file have."""
    sizes = {}
    for t in stored.values():
        if t.dtype is not None and t.dtype.is_floating_point:
            sizes[t.dtype] = sizes.get(t.dtype, 0) + math.prod(t.shape)
    return max(sizes, key=sizes.get)


def remove(path):
    """Delete a file or folder if it is there."""
    if Path(path).is_dir():
        shutil.rmtree(path)
    else:
        Path(path).unlink(missing_ok=True)


def weights(model, merged=False) -> dict[str, torch.Tensor]:
    """{name: tensor} of a model without its adapters; merged adds them, tensor by tensor, in float32. In the base's dtypes."""
    trained_in_full = getattr(getattr(model, "lora_state", None), "base", {})  # float32 while they are trained
    out = {}
    for name, p in model.named_parameters():
        if ".lora_" not in name:
            holder, _, leaf = name.rpartition(".")
            holder = model.get_submodule(holder)
            if merged and getattr(holder, "lora_bias", None) is not None and holder.bias is None:
                raise Invalid(f"lora.bias cannot be merged: {name.removesuffix('.weight')} has no bias in the published layout")
            w = holder.merged(leaf) if merged and hasattr(holder, "merged") else p.detach()
            out[name] = w.to(trained_in_full[name].dtype) if name in trained_in_full else w
    return out


def fingerprint(model) -> str:
    """Names a base by 64 values of each of its weights, rounded to bf16 so that every dtype of one base agrees."""
    crc = 0
    for name, p in sorted(model.named_parameters()):
        if ".lora_" in name:
            continue
        flat = p.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // 64)][:64].to(torch.bfloat16).float().cpu()
        crc = zlib.crc32(f"{name}{tuple(p.shape)}".encode() + some.numpy().tobytes(), crc)
    return f"{crc:08x}"


# ------------------------------------------------------------------------------------------------ step folders

INDEX = "training_state.json"
NO_SUM = "checksum of all the rest"  # stands in the index where its own checksum will be


def write_step(root, step, write, state) -> Path:
    """root/step_0000500, complete or not there at all; then `latest` names it.

    write(folder) fills a temporary folder; the index with `state` and every file's size and checksum goes in last; all
    is flushed to disk before the rename. Nothing older is touched before the new one is durable.
    """
    root = Path(root)
    name = f"step_{step:07d}"
    tmp = root / f"{name}.tmp"
    if tmp.exists():
        shutil.rmtree(tmp)
    tmp.mkdir(parents=True)
    try:
        write(tmp)
        files = sorted(p for p in tmp.rglob("*") if p.is_file())
        index = {str(p.relative_to(tmp)): {"bytes": p.stat().st_size, "crc32": checksum(p)} for p in files}
        text = json.dumps({**state, "files": index, "checksum": NO_SUM}, indent=1)
        (tmp / INDEX).write_text(text.replace(NO_SUM, f"{zlib.crc32(text.encode()):08x}"))
        for path in files + [tmp / INDEX, tmp]:
            _flush(path)
        if (root / name).exists():  # the same step again: the old one stays readable under another name until the new is in place
            old = root / f"{name}.old"
            shutil.rmtree(old, ignore_errors=True)
            os.rename(root / name, old)
            os.rename(tmp, root / name)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(tmp, root / name)
    except (OSError, RuntimeError, safetensors.SafetensorError) as e:  # torch.save tells of a full disk by a RuntimeError
        free = shutil.disk_usage(root).free
        need = sum(p.stat().st_size for p in tmp.rglob("*") if p.is_file())
        shutil.rmtree(tmp, ignore_errors=True)
        raise Invalid(f"could not save {root / name}: {_first_line(e)}. {need / 1e6:.1f} MB were written, {free / 1e6:.1f} MB are free. "
                      "Earlier checkpoints are untouched.") from e
    _flush(root)
    point(root, name)
    return root / name


def point(root, name):
    """Let root/latest name a step folder: a link, or a text file where links are refused."""
    tmp, latest = root / "latest.tmp", root / "latest"
    tmp.unlink(missing_ok=True)
    try:
        tmp.symlink_to(name)
    except OSError:
        tmp.write_text(name)
    if latest.is_dir() and not latest.is_symlink():  # a copy that followed the link
        put_aside(latest)
    os.replace(tmp, latest)
    _flush(root)


def put_aside(path) -> Path:
    """Rename a file or folder to the first free of <name>.before-1, -2, ..."""
    path = Path(path)
    return path.rename(next(p for n in range(1, 10**6) if not (p := path.with_name(f"{path.name}.before-{n}")).exists()))


def checksum(path):
    crc = 0
    with open(path, "rb") as f:
        while block := f.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


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
        text = (folder / INDEX).read_text()
        index = json.loads(text)
        files, told = index["files"], index["checksum"]
        if f"{zlib.crc32(text.replace(told, NO_SUM).encode()):08x}" != told:
            return f"{folder / INDEX} does not have the checksum it was written with"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{folder / INDEX} is damaged"
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{path} has {path.stat().st_size} bytes, {entry['bytes']} were written"
        if checksum(path) != entry["crc32"]:
            return f"{path} does not have the checksum it was written with"
    return None


def check_file(path) -> str | None:
    """What is wrong with one file of a step folder, by the index beside it; None where it is right or no index is there."""
    path = Path(path)
    try:
        entry = json.loads((path.parent / INDEX).read_text())["files"][path.name]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return None if checksum(path) == entry["crc32"] else f"{path} does not have the checksum it was written with"


def steps(root) -> list[Path]:
    """Step folders below root, newest first, complete or not."""
    found = [(int(m[1]), p) for p in Path(root).glob("step_*") if (m := re.fullmatch(r"step_(\d+)", p.name)) and p.is_dir()]
    return [p for _, p in sorted(found, reverse=True)]


def newest_step(root, say=print) -> Path | None:
    """The newest complete step folder; what is damaged is named and passed over."""
    for folder in steps(root):
        wrong = check_step(folder)
        if wrong is None:
            return folder
        say(f"passing over a damaged checkpoint: {wrong}")
    return None


def prune(root, keep_last, keep_every=0, stay=(), say=print):
    """Delete step folders except the newest keep_last (0: all stay), every keep_every-th step and the steps in `stay`."""
    if not keep_last:
        return
    for folder in steps(root)[keep_last:]:
        step = int(folder.name[5:])
        if step in stay or (keep_every and step % keep_every == 0):
            continue
        try:
            shutil.rmtree(folder)
        except OSError as e:
            say(f"could not delete {folder}: {e}")


def megabytes(folder) -> float:
    return sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file()) / 1e6


def save_tensors(path, tensors, metadata=None):
    """A safetensors file from tensors on any device, flushed to disk under a temporary name and then renamed."""
    path = Path(path)
    tmp = path.with_name(path.name + ".tmp")
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, tmp, metadata={"format": "pt", **(metadata or {})})
    os.chmod(tmp, 0o666 & ~_umask())  # safetensors writes files that only their owner can read
    _flush(tmp)
    os.replace(tmp, path)


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
