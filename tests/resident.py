"""Memory that this process really holds between steps, beside what bench.py --memory computes: python -m tests.resident [BACKBONE ...].

At mid shapes in bf16 on the CPU, one process for each way to train: resident memory after a step, less that before the
model was made, against weights, copies and moments (no gradients and no activations are left then), and the codec.
"""
import argparse
import ctypes
import gc
import os
import subprocess
import sys
from pathlib import Path

import torch

import bench
from models.parts import memory

WAYS = {
    "LoRA, base_bits 16": dict(), "LoRA, base_bits 8": dict(base_bits=8), "LoRA, base_bits 4": dict(base_bits=4),
    "full, float32 copies": dict(full=True), "full, master none": dict(full=True, master="none"),
    "full, master none, adamw8bit": dict(full=True, master="none", optimizer="adamw8bit"),
}


def resident():
    """Bytes, after everything that is free has been given back."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def after_a_step(cfg):
    """(model, what else must stay alive) after one step of training on a clip."""
    torch.manual_seed(0)
    device = torch.device("cpu")
    model = bench.blank(cfg, device, torch.bfloat16)
    clips = [model.blank_example(1.0, 4)]
    step, info = bench.training(cfg, model, clips, device)
    step()
    return model, step


def measure(backbone, way):
    cfg = bench.Bench(backbone=backbone, size="mid", batch=1, **WAYS[way])
    first = after_a_step(cfg)  # what libraries make for themselves, for these shapes, is there from then on
    del first
    before = resident()
    model, alive = after_a_step(cfg)
    found = resident() - before
    plan = memory.Plan(cfg.base_bits, cfg.optimizer, cfg.master)
    trained = [p for p in model.parameters() if p.requires_grad]
    copies, _, moments = memory.state_bytes(trained, plan)
    codec = sum(t.numel() * t.element_size() for t in [*model.codec.parameters(), *model.codec.buffers()])
    computed = memory.weight_bytes(model, cfg.base_bits) + copies + moments + codec
    print(f"| {backbone} | {way} | {found / 2**20:.0f} | {computed / 2**20:.0f} | {100 * (found / computed - 1):+.1f} % |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("backbones", nargs="*", default=["voxcpm", "csm"])
    parser.add_argument("--way", choices=WAYS)
    cfg = parser.parse_args()
    if cfg.way:
        return measure(cfg.backbones[0], cfg.way)
    print("| backbone | way | resident, MiB | computed, MiB | more |\n|---|---|---|---|---|", flush=True)
    for backbone in cfg.backbones:
        for way in WAYS:
            subprocess.run([sys.executable, "-m", "tests.resident", backbone, "--way", way], check=True)


if __name__ == "__main__":
    main()
