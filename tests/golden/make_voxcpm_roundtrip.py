"""Our half of the round trip with the voxcpm package: what our models compute, for check_voxcpm_roundtrip.py to compare.

    python tests/golden/make_voxcpm_roundtrip.py --version 1.5 --scratch DIR
        writes DIR/base (tiny, random) and trains for a few steps: DIR/adapter, DIR/merged, DIR/full; then DIR/inputs.safetensors
    python tests/golden/make_voxcpm_roundtrip.py --base B --adapter A --merged M --full F --inputs FILE.safetensors
        the same file for folders that train.py and merge_lora.py have written

Afterwards, with the package installed: python tests/golden/check_voxcpm_roundtrip.py --base B --adapter A --merged M
--full F --inputs FILE.safetensors. Fields of the file: rows/<i>/..., draws/... and noise as in make_voxcpm.py;
<kind>/losses (2,) means of diff and stop, <kind>/latents (n, P, D), kind one of base, adapter, merged, full.
"""
import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import lora  # noqa: E402
import models  # noqa: E402
from tests import tiny_voxcpm as tiny  # noqa: E402

TEXT, PATCHES = "hello, the world", 5


def rows(model):
    g = torch.Generator().manual_seed(0)
    P, D = model.config.patch_size, model.config.feat_dim
    return [{"text": torch.tensor(model.encode_text(text) + [101]), "latents": 0.8 * torch.randn(n, P, D, generator=g)}
            for text, n in (("hello world", 5), ("the thing", 8), ("an other one", 3))]


def train(model, parameters, steps, rate):
    optimizer, model = torch.optim.AdamW(parameters, lr=rate), model.train()
    for step in range(steps):
        batch, counts = model.collate(rows(model), seeds=[3 * step, 3 * step + 1, 3 * step + 2])
        out = model(batch)
        optimizer.zero_grad()
        sum(out[k] / counts[k] for k in ("loss/diff", "loss/stop")).backward()
        optimizer.step()
    return model.eval()


def make(folder, version):
    base = tiny.write(folder / "base", version)
    model = models.load(base)
    lora.apply_lora_to_model(model, {"r": 4, "alpha": 8, "enable_lm": True, "enable_dit": True, "enable_proj": True})
    train(model, [p for p in model.parameters() if p.requires_grad], 20, 0.01)
    lora.save_lora_weights(model, folder / "adapter")
    model.save(folder / "merged", merged=True)
    model = models.load(base)
    train(model, list(model.parameters()), 10, 1e-3).save(folder / "full")


@torch.no_grad()
def measure(paths):
    kinds = {"base": models.load(paths["base"]), "adapter": models.load(paths["base"])}
    lora.load_lora_weights(kinds["adapter"], paths["adapter"])
    kinds |= {k: models.load(paths[k]) for k in ("merged", "full")}
    base = kinds["base"]
    examples = rows(base)
    batch, counts = base.collate(examples, seeds=[1, 2, 3])
    noise = torch.randn(PATCHES, base.config.patch_size, base.config.feat_dim, generator=torch.Generator().manual_seed(4))
    out = {f"rows/{i}/{k}": v for i, e in enumerate(examples) for k, v in e.items()}
    out |= {"noise": noise, **{f"draws/{k}": batch[k] for k in ("noise", "time", "keep")}}
    for kind, model in kinds.items():
        means = model(batch)
        out[f"{kind}/losses"] = torch.stack([means[k] / counts[k] for k in ("loss/diff", "loss/stop")])
        out[f"{kind}/latents"] = torch.stack(list(model.frames(TEXT, noise=noise, min_len=PATCHES, max_len=PATCHES)))
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("base", "adapter", "merged", "full", "inputs", "scratch"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--version", choices=tiny.VERSIONS, default="1.5")
    args = parser.parse_args()
    torch.set_num_threads(1)
    paths = {k: getattr(args, k) for k in ("base", "adapter", "merged", "full")}
    if args.scratch:
        make(args.scratch, args.version)
        paths = {k: args.scratch / k for k in paths}
    inputs = args.inputs or args.scratch / "inputs.safetensors"
    save_file({k: v.contiguous() for k, v in measure(paths).items()}, inputs, {"text": TEXT})
    print(" ".join(f"--{k} {v}" for k, v in paths.items()), f"--inputs {inputs}")


if __name__ == "__main__":
    main()
