"""Speed and memory of a training step, of generation and of encoding, on random weights made on the spot.

    python bench.py --backbone NAME --size mid --lengths 2,3,5,8,12 --batch 8 --threads 2
    python bench.py --backbone NAME --size mid --task generate --batch 1 --seconds 3

One JSON line per run. A training step is forward, backward, clipping and AdamW on clips that are encoded
already, as in train.py. Audio seconds count what is real, never padding. tiny, mid and real are shapes that
the backbone's file names: real is what was published, mid keeps its proportions at a size for a CPU.
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
    options: dict = opt({}, "the backbone's own for training, such as --options.amortize 1; see Training in its file")
    timesteps: int = opt(0, "solver steps per frame where the backbone has a solver; 0 takes its default")
    steps: int = opt(5, "measured repetitions")
    warmup: int = opt(2, "repetitions before")
    device: str = opt("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = opt("auto", "of the weights: auto is bfloat16 on CUDA and float32 elsewhere")
    ckpt: bool | int = opt(False, "recompute activations in backward; 2: of every second layer only")
    compile: bool = opt(False, "torch.compile every layer")
    threads: int = opt(1, "torch's threads on the CPU")
    seed: int = opt(0, "of weights and data")


# The flags that only some tasks read; another task refuses them, since they would be measured in vain.
ONLY = {"train": ("full", "ckpt", "lengths", "options", "text"),
        "generate": ("adapter", "timesteps", "text"),
        "encode": ("lengths",)}
LEAST = dict(batch=1, steps=1, warmup=0, threads=1, rank=1, text=0, timesteps=0)
LEARNING_RATE, WEIGHT_DECAY, MAX_NORM = 1e-4, 0.01, 1.0  # as train.py's defaults; they do not change the time
TEXT_RATE = 3  # tokens per second of speech, about what people say


def check(cfg):
    """Flags that cannot be measured, all at once."""
    wrong = []
    for name, least in LEAST.items():
        if getattr(cfg, name) < least:
            wrong.append(f"--{name} {getattr(cfg, name)}: expected at least {least}")
    shortest = min([cfg.seconds, *cfg.lengths])
    if shortest <= 0:
        wrong.append(f"--seconds and --lengths: expected more than 0, got {shortest}")
    if cfg.backbone not in models.BACKBONES:
        unknown = f"--backbone {cfg.backbone!r}: known are {', '.join(models.BACKBONES)}"
        raise Usage("\n".join([unknown, *wrong]))
    backbone = models.BACKBONES[cfg.backbone]
    fields = {f.name for f in dataclasses.fields(backbone.Sampling)}
    if cfg.timesteps and "inference_timesteps" not in fields:
        wrong.append(f"--timesteps: {cfg.backbone} has no solver")
    try:
        configs.build(backbone.Training, cfg.options, "options")
    except Usage as e:
        wrong.append(str(e))
    defaults = Bench()
    for name in ("full", "ckpt", "lengths", "adapter", "timesteps", "options", "text"):
        if getattr(cfg, name) != getattr(defaults, name) and name not in ONLY[cfg.task]:
            wrong.append(f"--{name} does not go with --task {cfg.task}")
    if wrong:
        raise Usage("\n".join(wrong))


def shapes(values):
    """The numbers of a config, without its tables."""
    out = {}
    for name, value in values.items():
        if isinstance(value, dict):
            out[name] = shapes(value)
        elif isinstance(value, (int, float, str)):
            out[name] = value
    return out


def blank(cfg, device, dtype):
    """The backbone with random weights, at the size and with the options asked for."""
    backbone = models.BACKBONES[cfg.backbone]
    try:
        options = configs.build(backbone.Training, cfg.options, "options")
        return backbone.blank(cfg.size, cfg.version, device, dtype, dataclasses.asdict(options))
    except Invalid as e:
        raise Usage(e) from None


def add_adapter(cfg, model):
    lora.apply_lora_to_model(model, {"r": cfg.rank, "alpha": float(cfg.rank)})


def parameters(tensors):
    return sum(p.numel() for p in tensors)


# ------------------------------------------------------------------------------------------- what is measured


def training(cfg, model, clips, device):
    """(step, info): one optimizer step on a fixed batch."""
    if not cfg.full:  # as built all is trained, but for what an option of the backbone freezes
        add_adapter(cfg, model)
    model.train()
    model.set_recompute(int(cfg.ckpt))
    batch, counts = model.collate(clips, seeds=list(range(len(clips))))
    batch = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
    weights = models.BACKBONES[model.backbone].LAMBDAS
    trained = [p for p in model.parameters() if p.requires_grad]
    fused = device.type == "cuda"
    optimizer = torch.optim.AdamW(trained, LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=fused)

    def step():
        out = model(batch)
        loss = sum(weights[name] * out[name] / counts[name] for name in weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step, {
        "positions": max(model.length(clip) for clip in clips),
        "clip": MAX_NORM,
        "optimizer": f"AdamW lr=1e-4 weight_decay={WEIGHT_DECAY}",
        "adapter_params": parameters(trained),
    }


def generation(cfg, model, text):
    """(step, info): requests of the wanted length, forced to it by min_len and max_len."""
    if cfg.adapter != "none":
        add_adapter(cfg, model)
    if cfg.adapter == "merged":
        lora.merge_lora_weights(model)
    frames = max(4, round(cfg.seconds * model.frame_rate))  # fewer would be all start and no speech
    sampling = {"min_len": frames - 1, "max_len": frames}
    if cfg.timesteps:
        sampling["inference_timesteps"] = cfg.timesteps
    requests = [dict(text="x" * text, seed=cfg.seed + i) for i in range(cfg.batch)]
    seconds = frames / model.frame_rate

    def step():
        samples = sum(len(chunk) for _, chunk in model.generate_batch(requests, **sampling))
        missing = abs(samples / cfg.batch / model.out_sample_rate - seconds)
        if missing > 0.5 / model.frame_rate:  # a vocoder may round its frames down
            raise Invalid(f"{samples} samples were made, expected {frames} frames each: too little text for "
                          "so much audio? Give more with --text")

    adapter = lora.get_lora_state_dict(model).values()
    return step, {"frames": frames, "adapter": cfg.adapter, "adapter_params": parameters(adapter)}


def measure(cfg, step, device):
    """Medians over cfg.steps of wall and CPU time, first and last loss."""
    on_gpu = device.type == "cuda"

    def finished():
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    losses = [step() for _ in range(cfg.warmup)]
    finished()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    wall, cpu = [], []
    for _ in range(cfg.steps):
        wall_start, cpu_start = finished()
        losses.append(step())
        wall_end, cpu_end = finished()
        wall.append(wall_end - wall_start)
        cpu.append(cpu_end - cpu_start)
    peak = torch.cuda.max_memory_allocated() if on_gpu else peak_of_process()
    out = {
        "step_ms_median": round(statistics.median(wall) * 1e3, 3),
        "step_ms_min": round(min(wall) * 1e3, 3),
        "step_cpu_ms_median": round(statistics.median(cpu) * 1e3, 3),
        "peak_mem_mib": round(peak / 2**20, 1),
        "peak_mem_kind": "cuda allocated" if on_gpu else "process rss",
    }
    losses = [loss.item() for loss in losses if loss is not None]
    if losses:
        out |= {"forward_loss": round(losses[0], 6), "last_loss": round(losses[-1], 6)}
    return out


def peak_of_process():
    """Bytes; Linux counts them in kB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main():
    cfg = configs.parse(Bench, script="bench")
    check(cfg)
    torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    device = models.pick_device(cfg.device)
    dtype = models.pick_dtype(cfg.dtype, device)
    model = blank(cfg, device, dtype)
    if cfg.compile:
        for block in model.blocks():
            block.compile()

    # The data: noise of the lengths asked for, with about as much text as people say in that time.
    lengths = cfg.lengths or [cfg.seconds]
    seconds = [lengths[i % len(lengths)] for i in range(cfg.batch)]
    texts = [cfg.text or max(4, int(TEXT_RATE * s)) for s in seconds]
    waves = [0.1 * torch.randn(int(s * model.sample_rate)) for s in seconds]

    # One repetition of the task, and how much audio it makes or reads.
    info, audio = {}, sum(seconds)
    if cfg.task == "generate":
        step, info = generation(cfg, model, texts[0])
        audio = cfg.batch * info["frames"] / model.frame_rate
    elif cfg.task == "encode":
        model.codec.to(device)

        def step():
            for wave in waves:
                model.encode_audio(wave)
    else:
        model.codec.to(device)
        clips = []
        for wave, n in zip(waves, texts):
            clips.append(model.encode({"audio": model.encode_audio(wave), "text": "x" * n}))
        model.codec.to("cpu")
        step, info = training(cfg, model, clips, device)

    times = measure(cfg, step, device)
    median = times["step_ms_median"] / 1e3
    print(json.dumps({
        "backbone": cfg.backbone,
        "version": cfg.version,
        "task": cfg.task,
        "size": cfg.size,
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "batch": cfg.batch,
        "lengths": seconds,
        "texts": texts,
        "fill": round(sum(seconds) / len(seconds) / max(seconds), 4),
        "threads": torch.get_num_threads(),
        "rank": 0 if cfg.full else cfg.rank,
        "full": cfg.full,
        "ckpt": cfg.ckpt,
        "compile": cfg.compile,
        "options": cfg.options,
        "steps": cfg.steps,
        **times,
        "samples_per_s": round(cfg.batch / median, 4),
        "audio_s_per_s": round(audio / median, 4),
        "rtf": round(median / audio, 5),
        "params": parameters(model.parameters()),
        "optimizer": None,
        "clip": None,
        "adapter_params": 0,
        **info,
        "shapes": shapes(dataclasses.asdict(model.config)),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
    }), flush=True)


if __name__ == "__main__":
    sys.exit(configs.run(main))
