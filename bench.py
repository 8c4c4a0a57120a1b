"""Speed and memory of a training step, of generation and of encoding, on random weights made on the spot.

    python bench.py --backbone NAME --size mid --lengths 2,3,5,8,12 --batch 8 --threads 2
    python bench.py --backbone NAME --size mid --task generate --batch 1 --seconds 3

One JSON line per run. A training step is forward, backward, clipping and AdamW on clips that are encoded already, as in
train.py. Audio seconds count what is real, never padding. tiny, mid and real are shapes that the backbone's file names:
real is what was published, mid keeps its proportions at a size for a CPU.
"""
import dataclasses
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
from models.parts import Invalid


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
    options: dict = opt({}, "options of the backbone's own for training, such as --options.amortize 1; see Training in its file")
    timesteps: int = opt(0, "solver steps per frame where the backbone has a solver; 0 takes its default")
    steps: int = opt(5, "measured repetitions")
    warmup: int = opt(2, "repetitions before")
    device: str = opt("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = opt("auto", "of the weights: auto is bfloat16 on CUDA and float32 elsewhere")
    ckpt: bool = opt(False, "recompute activations in backward")
    compile: bool = opt(False, "torch.compile every layer")
    threads: int = opt(1, "torch's threads on the CPU")
    seed: int = opt(0, "of weights and data")


def check(cfg):
    """Flags that cannot be measured, all at once."""
    least = dict(batch=1, steps=1, warmup=0, threads=1, rank=1, text=0, timesteps=0)
    wrong = [f"--{k} {getattr(cfg, k)}: expected at least {n}" for k, n in least.items() if getattr(cfg, k) < n]
    wrong += [f"--seconds and --lengths: expected more than 0, got {min([cfg.seconds, *cfg.lengths])}"] if min([cfg.seconds, *cfg.lengths]) <= 0 else []
    if cfg.backbone not in models.BACKBONES:
        raise Usage("\n".join([f"--backbone {cfg.backbone!r}: known are {', '.join(models.BACKBONES)}", *wrong]))
    if cfg.timesteps and "inference_timesteps" not in {f.name for f in dataclasses.fields(models.BACKBONES[cfg.backbone].Sampling)}:
        wrong.append(f"--timesteps: {cfg.backbone} has no solver")
    try:
        configs.build(models.BACKBONES[cfg.backbone].Training, cfg.options, "options")
    except Usage as e:
        wrong.append(str(e))
    only = {"train": ("full", "ckpt", "lengths", "options", "text"), "generate": ("adapter", "timesteps", "text"), "encode": ("lengths",)}
    given = [k for k in ("full", "ckpt", "lengths", "adapter", "timesteps", "options", "text") if getattr(cfg, k) not in (False, 0, [], {}, "none")]
    wrong += [f"--{k} does not go with --task {cfg.task}" for k in given if k not in only[cfg.task]]
    if wrong:
        raise Usage("\n".join(wrong))


def shapes(values):
    """The numbers of a config, without its tables."""
    return {k: shapes(v) if isinstance(v, dict) else v for k, v in values.items() if isinstance(v, (dict, int, float, str))}


def training(cfg, model, clips, device):
    """(step, info): one optimizer step on a fixed batch."""
    if not cfg.full:  # as built all is trained, but for what an option of the backbone freezes
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

    return step, {"positions": max(model.length(c) for c in clips), "clip": 1.0, "optimizer": "AdamW lr=1e-4 weight_decay=0.01",
                  "adapter_params": sum(p.numel() for p in trained)}


def generation(cfg, model, text):
    """(step, info): requests of the wanted length, forced to it by min_len and max_len."""
    if cfg.adapter != "none":
        lora.apply_lora_to_model(model, {"r": cfg.rank, "alpha": float(cfg.rank)})
        if cfg.adapter == "merged":
            lora.merge_lora_weights(model)
    frames = max(4, round(cfg.seconds * model.frame_rate))
    sampling = {"min_len": frames - 1, "max_len": frames}
    if cfg.timesteps:
        sampling["inference_timesteps"] = cfg.timesteps
    requests = [dict(text="x" * text, seed=cfg.seed + i) for i in range(cfg.batch)]

    def step():
        made = sum(len(chunk) for _, chunk in model.generate_batch(requests, **sampling))
        if abs(made / cfg.batch / model.out_sample_rate - frames / model.frame_rate) > 1e-3:
            raise Invalid(f"{made} samples were made, expected {frames} frames each: too little text for so much audio? Give more with --text")

    adapter = sum(p.numel() for n, p in model.named_parameters() if ".lora_" in n)
    return step, {"frames": frames, "adapter": cfg.adapter, "adapter_params": adapter}


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
    check(cfg)
    torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    device = models.pick_device(cfg.device)
    dtype = models.pick_dtype(cfg.dtype, device)
    try:
        backbone = models.BACKBONES[cfg.backbone]
        options = dataclasses.asdict(configs.build(backbone.Training, cfg.options, "options"))
        model = backbone.blank(cfg.size, cfg.version, device, dtype, options)
    except Invalid as e:
        raise Usage(e) from None
    seconds = [(cfg.lengths or [cfg.seconds])[i % len(cfg.lengths or [0])] for i in range(cfg.batch)]
    texts = [cfg.text or max(4, int(3 * s)) for s in seconds]
    waves = [0.1 * torch.randn(int(s * model.sample_rate)) for s in seconds]
    if cfg.compile:
        for block in model.blocks():
            block.compile()
    if cfg.task == "generate":
        step, info = generation(cfg, model, texts[0])
        audio = cfg.batch * info["frames"] / model.frame_rate
    elif cfg.task == "encode":
        model.codec.to(device)
        step, info = lambda: [model.encode_audio(w) for w in waves] and None, {}
        audio = sum(seconds)
    else:
        model.codec.to(device)
        clips = [model.encode({"audio": model.encode_audio(w), "text": "x" * n}) for w, n in zip(waves, texts)]
        model.codec.to("cpu")
        step, info = training(cfg, model, clips, device)
        audio = sum(seconds)
    out = measure(cfg, step, device)
    median = out["step_ms_median"] / 1e3
    print(json.dumps({
        "backbone": cfg.backbone, "version": cfg.version, "task": cfg.task, "size": cfg.size, "device": str(device), "dtype": str(dtype)[6:],
        "batch": cfg.batch, "lengths": seconds, "texts": texts, "fill": round(sum(seconds) / len(seconds) / max(seconds), 4),
        "threads": torch.get_num_threads(), "rank": 0 if cfg.full else cfg.rank, "full": cfg.full,
        "ckpt": cfg.ckpt, "compile": cfg.compile, "options": cfg.options, "steps": cfg.steps, **out, "samples_per_s": round(cfg.batch / median, 4),
        "audio_s_per_s": round(audio / median, 4), "rtf": round(median / audio, 5), "params": sum(p.numel() for p in model.parameters()),
        "optimizer": None, "clip": None, "adapter_params": 0, **info, "shapes": shapes(dataclasses.asdict(model.config)),
        "torch": torch.__version__, "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None}), flush=True)


if __name__ == "__main__":
    sys.exit(configs.run(main))
