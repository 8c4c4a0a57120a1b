"""Adapters into a checkpoint in the published layout, or into one adapter file of another format.

    python merge_lora.py --ckpt_dir checkpoints/base --lora runs/voice/latest:0.8 --output_dir merged
    python merge_lora.py --ckpt_dir checkpoints/base --lora runs/voice/latest --to peft --output_dir voice_peft

The merged folder loads wherever the base does, at the base's speed. Sums are float32, the file has the base's dtype.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import configs
import lora
import models
from configs import Usage, opt
from infer import base_of, split_strength
from models.parts import checkpoint


@dataclass
class Merge:
    """Merge adapters into a checkpoint, or convert them to another adapter format."""

    ckpt_dir: str = opt("", "folder of the base, or org/name in the local hub cache; empty takes the adapter's record")
    lora: list[str] = opt([], "adapter folder, with :strength if not 1; several are added up", repeat=True)
    output_dir: str = opt("", "folder to write; must not hold anything yet")
    to: str = opt("", "adapter format to convert to instead of merging: native, peft, or another that the backbone's tools read")
    naming: str = opt("", "tensor names of the file where the backbone has several published ones; empty keeps the base's")
    dtype: str = opt("", "of the merged weights: float32 or bfloat16; empty keeps the base's")
    ignore_base: bool = opt(False, "merge an adapter although it was trained on another base")
    allow_unused_tensors: bool = opt(False, "load a base although some of its tensors have no place in the model")


def main():
    cfg = configs.parse(Merge, script="merge")
    if not cfg.lora or not cfg.output_dir:
        raise Usage("give --lora with at least one adapter, and --output_dir")
    out = Path(cfg.output_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise Usage(f"output_dir {out} already holds something; choose another folder")
    chosen = [split_strength(spec) for spec in cfg.lora]
    base = cfg.ckpt_dir or base_of(chosen[0][0])
    device = models.pick_device("cpu")
    model = models.load(base, device, models.pick_dtype(cfg.dtype, device) if cfg.dtype else None, allow_unused=cfg.allow_unused_tensors)
    loaded, skipped = lora.load_lora_weights(model, chosen, cfg.ignore_base)
    print(f"{len(loaded)} tensors in {len(lora.lora_modules(model))} modules, {len(skipped)} skipped", file=sys.stderr)
    tmp = out.with_name(out.name + ".tmp")
    checkpoint.remove(tmp)
    if cfg.to:
        lora.save_lora_weights(model, tmp, cfg.to, cfg.naming or None, base=str(base))
    else:
        lora.check_mergeable(model)
        model.save(tmp, cfg.naming or None, merged=True)
    checkpoint.remove(out)
    tmp.rename(out)
    print(f"{out}: {checkpoint.megabytes(out):.1f} MB", file=sys.stderr)
    print(out)


if __name__ == "__main__":
    configs.run(main)
