"""Put what base.yaml trained into demo/base: the weights in half precision, so that a clone stays small.

    python demo/pack_base.py
"""
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import configs
from models.parts import Invalid, opt

LIMIT = 12e6  # bytes of all files together
WEIGHTS = ("model.safetensors", "audiovae.safetensors")


@dataclass
class PackBase:
    """Write a trained base in half precision."""
    ckpt_dir: str = opt("runs/demo/base/latest", "step folder of the run")
    output_dir: str = opt("demo/base", "folder for the packed base; its card stays")


def main():
    cfg = configs.parse(PackBase)
    source, folder = Path(cfg.ckpt_dir), Path(cfg.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for name in WEIGHTS:
        # Three more bits of mantissa than bfloat16 has, and nothing here is large; but small lengths need
        # float32.
        tensors = load_file(source / name)
        packed = {key: t if key.endswith("weight_g") else t.to(torch.float16) for key, t in tensors.items()}
        save_file(packed, folder / name, {"format": "pt"})
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)
    size = sum(path.stat().st_size for path in folder.iterdir())
    if size > LIMIT:
        raise Invalid(f"{folder} holds {size / 1e6:.1f} MB, more than {LIMIT / 1e6:.0f}")
    print(f"{size / 1e6:.1f} MB in {folder}")


if __name__ == "__main__":
    configs.run(main)
