"""Adapters into a checkpoint in the published layout, or into one adapter file of another format.

    python merge_lora.py --ckpt_dir checkpoints/base --lora runs/voice/latest:0.8 --output_dir merged
    python merge_lora.py --ckpt_dir checkpoints/base --lora runs/voice/latest --to peft --output_dir peft
    python merge_lora.py --lora runs/voice/latest --to native --rank 8 --output_dir small

The merged folder loads wherever the base does, at the base's speed. Sums are float32, the file has the base's
dtype.
"""
import re
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

import configs
import lora
import models
from configs import Usage, opt
from infer import base_of, parts_of, split_strength, trained_speakers
from models.parts import Invalid, adapters, checkpoint
from models.parts.plain import exactly, is_alive, say, temporary_name, writer_of


@dataclass
class Merge:
    """Merge adapters into a checkpoint, or convert them to another adapter format."""

    ckpt_dir: str = opt("", "folder of the base, or org/name in the local hub cache; empty takes the adapter's record")
    lora: list[str] = opt([], "adapter folder, with :strength if not 1; several are added up", repeat=True)
    extra: dict[str, str] = opt({}, "places of parts kept elsewhere, as --extra.codec DIR; those not given are searched for")
    output_dir: str = opt("", "folder to write; must not hold anything yet")
    to: str = opt("", "adapter format to convert to instead of merging: native, peft, or another that its tools read")
    rank: int = opt(0, "with to: shrink the adapter to this rank, keeping the most of its energy that fits; 0 leaves it")
    zero_fill: bool = opt(False, "with to: write zeros for layers that the format's settings mean and the adapter leaves alone")
    naming: str = opt("", "tensor names of the file where the backbone has several published ones; empty keeps the base's")
    dtype: str = opt("", "of the merged weights: float32 or bfloat16; empty keeps the base's")
    ignore_base: bool = opt(False, "merge an adapter although it was trained on another base")
    allow_unused_tensors: bool = opt(False, "load a base although some of its tensors have no place in the model")


def check(cfg):
    """What can be said before anything is loaded."""
    if not cfg.lora or not cfg.output_dir:
        raise Usage("give --lora with at least one adapter, and --output_dir")
    out = Path(cfg.output_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise Usage(f"output_dir {out} already holds something; choose another folder")
    if cfg.to and cfg.dtype:
        raise Usage("--dtype is of merged weights; converted adapters (--to) are float32")
    if (cfg.rank or cfg.zero_fill) and not cfg.to:
        raise Usage("--rank and --zero_fill are of adapters that are written: say --to native")
    if cfg.rank < 0:
        raise Usage(f"rank is {cfg.rank}, expected at least 1, or 0 to leave it")


def load_base(cfg, base, extra):
    """The base on the CPU, in the dtype of its file unless another is asked for."""
    device = models.pick_device("cpu")
    dtype = models.pick_dtype(cfg.dtype, device) if cfg.dtype else None
    model = models.load(base, device, dtype, extra=extra, allow_unused=cfg.allow_unused_tensors)
    if cfg.to and cfg.to not in ("native", *model.adapter_namings):
        raise Usage(f"--to {cfg.to}: for this backbone native or {' or '.join(model.adapter_namings)}")
    if cfg.naming and cfg.naming not in model.namings:
        raise Usage(f"--naming {cfg.naming}: this backbone has {', '.join(model.namings)}")
    return model


def keep_strength(model):
    """A file says nothing of a strength, so it goes into alpha, which scales B A and nothing else."""
    strength, modules = lora.state(model).strength, lora.lora_modules(model)
    if strength == 1:
        return
    if lora.state(model).base or any(module.lora_bias is not None for module in modules.values()):
        raise Invalid(f"strength {strength:g}: the adapter holds more than LoRA pairs, which no other "
                      "strength can be written for; merge it instead")
    for module in modules.values():
        module.lora_full_scale *= strength


@torch.no_grad()
def shrink(model, rank):
    """Every pair becomes the best of this rank, by the singular values of what it adds to its layer.

    Prints how much of the energy, the sum of their squares, is left in each group of layers.
    """
    modules = lora.lora_modules(model)
    largest = max((len(module.lora_A) for module in modules.values()), default=0)
    if rank > largest:
        raise Usage(f"--rank {rank}: the adapter has rank {largest}; only a smaller one says less")
    groups = {}  # {name without layer numbers: [(energy that is left, energy, name)]}
    for name, module in modules.items():
        A, B, values = shrunk(module, rank)
        module.lora_A = nn.Parameter(A)
        module.lora_B = nn.Parameter(B)
        module.lora_full_scale = 1.0
        energies = values.square()
        row = float(energies[:rank].sum()), float(energies.sum()), name
        groups.setdefault(re.sub(r"\.\d+", ".*", name), []).append(row)
    settings = lora.state(model).settings
    lora.state(model).settings = replace(settings, r=rank, alpha=float(rank), rslora=False)
    for group, rows in groups.items():
        report(group, rank, rows)


def report(group, rank, rows):
    """How much energy is left in a group of layers, and where it is least."""
    kept = sum(row[0] for row in rows)
    total = sum(row[1] for row in rows)
    least, name = min((percent(left, all_of_it), name) for left, all_of_it, name in rows)
    print(f"{group}: rank {rank} keeps {percent(kept, total):.2f} % of the energy of {len(rows)} layers, "
          f"least in {name}, {least:.2f} %", file=sys.stderr)


def percent(part, whole):
    return 100 * part / whole if whole else 100.0


def shrunk(module, rank):
    """(A, B, singular values) of the best pair of this rank, with the scale inside.

    B A = Qb Rb Ra^T Qa^T, and the Q keep lengths: the values are those of the small product in the middle,
    so that the large one is never made.
    """
    B = module.lora_full_scale * module.lora_B.double()
    Qa, Ra = torch.linalg.qr(module.lora_A.double().T)
    Qb, Rb = torch.linalg.qr(B)
    U, values, Vt = torch.linalg.svd(Rb @ Ra.T)
    root = values[:rank].sqrt()  # one half in each
    A = root[:, None] * (Vt[:rank] @ Qa.T)
    B = Qb @ U[:, :rank] * root
    more = rank - len(root)  # where the pair was thinner: a file has one rank for all
    A = nn.functional.pad(A, (0, 0, 0, more))
    B = nn.functional.pad(B, (0, more))
    return A.float(), B.float(), values


def fill_with_zeros(model, to):
    """A pair that does nothing for each layer that the settings of this format mean beyond the adapter's."""
    kind = model.native_adapter if to == "native" else to
    modules, settings = lora.lora_modules(model), lora.state(model).settings
    missing, _ = adapters.unfilled(model, settings, kind, modules)
    like = next(iter(modules.values()), None)
    for name in missing:
        lora.wrap(model, name, replace(settings, r=len(like.lora_A), bias=False))
        module = model.get_submodule(name)
        nn.init.zeros_(module.lora_A)
        module.lora_full_scale = like.lora_full_scale
    print(f"{len(missing)} layers filled up with zeros", file=sys.stderr)


# In the folder of a merge that goes on. The next one deletes what a killed one left, and nothing without it.
MARK = ".merge_lora"


def sweep(out):
    """Delete the folders of merges into `out` that were killed."""
    for folder in out.parent.glob(".*.tmp"):
        process = writer_of(folder, exactly([out.name]))
        if process and (folder / MARK).is_file() and not is_alive(process):
            checkpoint.remove(folder)


def end(number, frame):
    """SIGTERM ends the script as an exception does, so that what was begun goes; a second is not heard."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


def write(cfg, model, folder, record):
    """The merged checkpoint, or the adapter in another format."""
    naming = cfg.naming or None
    if cfg.to:
        keep_strength(model)
        if cfg.rank:
            shrink(model, cfg.rank)
        if cfg.zero_fill:
            fill_with_zeros(model, cfg.to)
        lora.save_lora_weights(model, folder, cfg.to, naming, **record)
    else:
        lora.merge_lora_weights(model)
        model.save(folder, naming)


def main():
    cfg = configs.parse(Merge, script="merge")
    check(cfg)
    chosen = [split_strength(spec) for spec in cfg.lora]
    base = cfg.ckpt_dir or base_of(chosen[0][0])
    extra = parts_of(cfg, chosen)
    model = load_base(cfg, base, extra)
    loaded, skipped = lora.load_lora_weights(model, chosen, cfg.ignore_base)
    modules = lora.lora_modules(model)
    say(f"{len(loaded)} tensors in {len(modules)} modules, {len(skipped)} skipped")
    speakers = trained_speakers(chosen)
    model.speakers = {**getattr(model, "speakers", {}), **speakers}

    # Under another name until it is whole: what stands at output_dir can be used.
    out = Path(cfg.output_dir).absolute()
    tmp = out.with_name(temporary_name(out.name))
    before = signal.signal(signal.SIGTERM, end)
    try:
        sweep(out)
        tmp.mkdir(parents=True)
    except OSError as e:
        raise Invalid(f"{out}: cannot be written ({e}); nothing was changed") from None
    try:
        (tmp / MARK).touch()
        record = dict(base=str(base), speakers=speakers, extra=models.parts_elsewhere(base, extra))
        write(cfg, model, tmp, record)
        (tmp / MARK).unlink()
        if out.exists():
            out.rmdir()  # fails if somebody has put something there since
        tmp.rename(out)
    except (OSError, RuntimeError, SafetensorError) as e:  # torch says a full disk by a RuntimeError
        raise Invalid(f"{out}: cannot be written ({e}); nothing is left of it") from None
    finally:
        checkpoint.remove(tmp)
        signal.signal(signal.SIGTERM, before)
    out = cfg.output_dir
    say(f"{out}: {checkpoint.megabytes(out):.1f} MB")
    print(out)


if __name__ == "__main__":
    configs.run(main)
