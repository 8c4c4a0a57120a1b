"""Speed and memory of a training step, of generation and of encoding, on random weights made on the spot.

    python bench.py --backbone NAME --size mid --lengths 2,3,5,8,12 --batch 8 --threads 2
    python bench.py --backbone NAME --size mid --task generate --batch 1 --seconds 3

One JSON line per run. A training step is forward, backward, clipping and AdamW on clips that are encoded already, as in
train.py. Audio seconds count what is real, never padding. tiny, mid and real are shapes that the backbone's file names:
real is what was published, mid keeps its proportions at a size for a CPU.
"""
import json
import resource
import statistics
import sys
import time
from dataclasses import dataclass

import torch

import configs
import lora
import models
from configs import Usage, opt


@dataclass
class Bench:
    """Measure one case and print it as one JSON line."""

    backbone: str = opt("", "which backbone; one of the files in models/")
    version: str = opt("", "which of its published versions; empty takes the first")
    size: str = opt("tiny", "shapes", choices=("tiny", "mid", "real"))
    task: str = opt("train", "what to measure", choices=("train", "generate", "encode"))
    batch: int = opt(2, "clips or requests at once")
    seconds: float = opt(2.0, "audio per clip")
    lengths: list[float] = opt([], "seconds of each clip instead, cycled over the batch (train and encode)")
    text: int = opt(0, "text tokens per clip; 0 means three per second")
    rank: int = opt(8, "of the adapter")
    full: bool = opt(False, "train every weight instead of an adapter")
    adapter: str = opt("none", "generation with an adapter on, or merged into the weights", choices=("none", "on", "merged"))
    timesteps: int = opt(0, "solver steps per frame where the backbone has a solver; 0 takes its default")
    steps: int = opt(5, "measured repetitions")
    warmup: int = opt(2, "repetitions before")
    device: str = opt("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = opt("auto", "of the weights: auto is bfloat16 on CUDA and float32 elsewhere")
    ckpt: bool = opt(False, "recompute activations in backward")
    compile: bool = opt(False, "torch.compile every layer")
    threads: int = opt(1, "torch's threads on the CPU")
    seed: int = opt(0, "of weights and data")


def training(cfg, model, clips, device):
    """(step, info): one optimizer step on a fixed batch."""
    if cfg.full:
        model.requires_grad_(True)
    else:
        lora.apply_lora_to_model(model, {"r": cfg.rank, "alpha": float(cfg.rank)})
    model.train()
    model.set_recompute(cfg.ckpt)
    batch, counts = model.collate(clips, seeds=list(range(len(clips))))
    batch = {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}
    weights = models.BACKBONES[model.backbone].LAMBDAS
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-4, weight_decay=0.01, fused=device.type == "cuda")

    def step():
        out = model(batch)
        loss = sum(weights[k] * out[k] / counts[k] for k in weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    positions = [model.length(c) for c in clips]
    return step, {"positions": max(positions), "fill": round(sum(positions) / len(positions) / max(positions), 4), "clip": 1.0,
                  "optimizer": "AdamW", "adapter_params": sum(p.numel() for p in trained)}


def generation(cfg, model):
    """(step, info): requests of the wanted length, forced to it by min_len and max_len."""
    if cfg.adapter != "none":
        lora.apply_lora_to_model(model, {"r": cfg.rank, "alpha": float(cfg.rank)})
        if cfg.adapter == "merged":
            lora.merge_lora_weights(model)
    frames = max(4, round(cfg.seconds * model.frame_rate))
    sampling = {"min_len": frames - 1, "max_len": frames}
    if cfg.timesteps:
        sampling["inference_timesteps"] = cfg.timesteps
    requests = [dict(text="x" * (cfg.text or max(4, frames)), seed=cfg.seed + i) for i in range(cfg.batch)]

    def step():
        made = sum(len(chunk) for _, chunk in model.generate_batch(requests, **sampling))
        if abs(made / cfg.batch / model.out_sample_rate - frames / model.frame_rate) > 1e-3:
            raise RuntimeError(f"{made} samples were made, expected {frames} frames each")

    return step, {"frames": frames, "adapter": cfg.adapter}


def measure(cfg, step, device):
    """Medians over cfg.steps of wall and CPU time, first and last loss."""
    def sync():
        if device.type == "cuda":
            torch.cuda.synchronize()

    losses = [step() for _ in range(cfg.warmup)]
    sync()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    wall, cpu = [], []
    for _ in range(cfg.steps):
        begun, spent = time.perf_counter(), time.process_time()
        losses.append(step())
        sync()
        wall.append(time.perf_counter() - begun)
        cpu.append(time.process_time() - spent)
    losses = [x.item() for x in losses if x is not None]
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"step_ms_median": round(statistics.median(wall) * 1e3, 3), "step_ms_min": round(min(wall) * 1e3, 3),
            "step_cpu_ms_median": round(statistics.median(cpu) * 1e3, 3), "peak_mem_mib": round(peak / 2**20, 1),
            "peak_mem_kind": "cuda allocated" if device.type == "cuda" else "process rss",
            **({"forward_loss": round(losses[0], 6), "last_loss": round(losses[-1], 6)} if losses else {})}


def main():
    cfg = configs.parse(Bench, script="bench")
    if cfg.backbone not in models.BACKBONES:
        raise Usage(f"--backbone {cfg.backbone!r}: known are {', '.join(models.BACKBONES)}")
    if cfg.task == "generate" and cfg.lengths:
        raise Usage("--lengths is for training and encoding; generation takes --seconds")
    torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    device = models.pick_device(cfg.device)
    dtype = models.pick_dtype(cfg.dtype, device)
    model = models.BACKBONES[cfg.backbone].blank(cfg.size, cfg.version, device, dtype)
    seconds = [(cfg.lengths or [cfg.seconds])[i % len(cfg.lengths or [0])] for i in range(cfg.batch)]
    waves = [0.1 * torch.randn(int(s * model.sample_rate)) for s in seconds]
    if cfg.compile:
        for block in model.blocks():
            block.compile()
    if cfg.task == "generate":
        step, info = generation(cfg, model)
        audio = cfg.batch * info["frames"] / model.frame_rate
    elif cfg.task == "encode":
        model.codec.to(device)
        step, info = lambda: [model.encode_audio(w) for w in waves] and None, {}
        audio = sum(seconds)
    else:
        model.codec.to(device)
        clips = [model.encode({"audio": model.encode_audio(w), "text": "x" * (cfg.text or max(4, int(3 * s)))}) for w, s in zip(waves, seconds)]
        model.codec.to("cpu")
        step, info = training(cfg, model, clips, device)
        audio = sum(seconds)
    out = measure(cfg, step, device)
    median = out["step_ms_median"] / 1e3
    print(json.dumps({
        "backbone": cfg.backbone, "version": cfg.version, "task": cfg.task, "size": cfg.size, "device": str(device), "dtype": str(dtype)[6:],
        "batch": cfg.batch, "lengths": seconds, "threads": torch.get_num_threads(), "rank": 0 if cfg.full else cfg.rank, "full": cfg.full,
        "ckpt": cfg.ckpt, "compile": cfg.compile, "steps": cfg.steps, **out, "samples_per_s": round(cfg.batch / median, 4),
        "audio_s_per_s": round(audio / median, 4), "rtf": round(median / audio, 5), "params": sum(p.numel() for p in model.parameters()), **info,
        "torch": torch.__version__, "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None}), flush=True)


if __name__ == "__main__":
    sys.exit(configs.run(main))
