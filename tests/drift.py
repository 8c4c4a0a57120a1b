"""How far each way to save memory drifts from float32: python -m tests.drift [demo|csm] [--steps 200].

Trains demo/base on demo/voice, or a tiny CSM on the same clips, once for each option, with the same rows and draws. Prints
how far the losses of the steps are from those of float32 (mean of the differences over the mean loss), where the
validation loss ends, and the same for another seed: what chance alone makes.
"""
import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import torch

import configs
import train
from tests import tiny_csm
from tests.conftest import ROOT
from tests.running import free_locks

BF16 = ["--dtype", "bfloat16"]
LEAN = ["--optimizer", "adamw8bit"]
FULL = {
    "float32": [],
    "bf16, master none, adamw8bit, fused_backward": [*BF16, "--master", "none", *LEAN, "--fused_backward"],
    "adamw8bit": LEAN,
    "bf16, master none": [*BF16, "--master", "none"],
    "bf16, float32 copies": BF16,
    "another seed": ["--seed", "1"],
}
LORA = {
    "float32": [],
    "base_bits 4, adamw8bit": ["--base_bits", "4", *LEAN],
    "base_bits 4": ["--base_bits", "4"],
    "base_bits 8": ["--base_bits", "8"],
    "adamw8bit": LEAN,
    "another seed": ["--seed", "1"],
}
COMMON = ["--gate", "off", "--val_samples", "0", "--valid_interval", "0", "--save_interval", "0", "--log_interval", "1000",
          "--max_grad_norm", "0", "--log_level", "error"]


def losses(argv, folder):
    """(loss of each step, validation loss at the end) of one run."""
    sys.argv = ["train.py", *argv, "--save_path", str(folder)]
    train.main()
    free_locks()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line["loss/total"] for line in lines if line["split"] == "train"]
    return torch.tensor(steps), [line["loss/total"] for line in lines if line["split"] == "val"][-1]


def compare(kind, options, argv, folder):
    first = None
    for number, (name, flags) in enumerate(options.items()):
        steps, last = losses([*argv, *COMMON, *flags], folder / f"{kind} {number}")
        first = steps if first is None else first
        apart = ((steps - first).abs().mean() / first.mean()).item()
        fell = f"{steps[:10].mean():.4f} -> {steps[-10:].mean():.4f}"
        print(f"| {kind} | {name} | {100 * apart:.2f} % | {fell} | {last:.4f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("models", nargs="*", default=["demo", "csm"])
    parser.add_argument("--steps", type=int, default=200)
    cfg = parser.parse_args()
    os.chdir(ROOT)
    print("| run | option | losses apart | training loss | validation |\n|---|---|---|---|---|")
    for model in cfg.models:
        with tempfile.TemporaryDirectory() as tmp:
            folder = Path(tmp)
            length = ["--num_iters", str(cfg.steps), "--max_steps", str(cfg.steps), "--warmup_steps", "20"]
            length += ["--cache_dir", str(folder / "cache")]
            (folder / "full.yaml").write_text((ROOT / "demo/voice.yaml").read_text().split("\nlora:")[0] + "\n")
            base, lora = ["demo/base"], ["--lora.r", "32", "--lora.alpha", "64"]
            if model == "csm":
                base = [str(tiny_csm.write(folder / "base"))]
                text = (folder / "full.yaml").read_text()
                (folder / "full.yaml").write_text(text.split("\nbackbone:")[0] + "\n")
            argv = [str(folder / "full.yaml"), "--pretrained_path", *base, *length]
            compare(f"{model}, full", FULL, [*argv, "--learning_rate", "2e-4"], folder)
            compare(f"{model}, LoRA", LORA, [*argv, "--learning_rate", "5e-4", *lora], folder)


if __name__ == "__main__":
    configs.run(main)
