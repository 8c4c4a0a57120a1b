"""Speed and memory of a training step, of generation and of encoding, on random weights made on the spot.

    python bench.py --backbone NAME --size mid --lengths 2,3,5,8,12 --batch 8 --threads 2
    python bench.py --backbone NAME --size mid --task generate --batch 1 --seconds 3
    python bench.py --memory --size real --batch 1 --seconds 10

One JSON line per run; with --memory tables of what training takes, by arithmetic. A training step is forward,
backward, clipping and the update on clips that are encoded already, as in train.py. Audio seconds count what
is real, never padding. tiny, mid and real are shapes that the backbone's file names: real is what was
published, mid keeps its proportions at a size for a CPU.
"""
import dataclasses
import json
import resource
import statistics
import sys
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch

import configs
import lora
import models
import train
from configs import Usage, opt
from models.parts import Invalid, memory, quant
from models.parts.memory import Plan


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
    memory: bool = opt(False, "measure nothing: tables of the bytes that training takes, of all backbones or of --backbone")
    rank: int = opt(8, "of the adapter")
    full: bool = opt(False, "train every weight instead of an adapter")
    base_bits: int = opt(16, "of the frozen weights under the adapter", choices=(16, 8, 4))
    optimizer: str = opt("adamw", "as in train.py", choices=tuple(train.LEAN))
    master: str = opt("float32", "copies of bf16 weights, as in train.py", choices=("float32", "none"))
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
# What the tables of --memory depend on.
COUNTED = {"memory", "backbone", "version", "size", "batch", "seconds", "text", "rank", "dtype", "options"}
LEAST_MEMORY = ("base_bits", "optimizer", "master")
ONLY = {"train": ("full", "ckpt", "lengths", "options", "text", *LEAST_MEMORY),
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
    every = cfg.memory and not (cfg.backbone or cfg.version or cfg.options)
    if cfg.backbone not in models.BACKBONES and not every:
        unknown = f"--backbone {cfg.backbone!r}: known are {', '.join(models.BACKBONES)}"
        raise Usage("\n".join([unknown, *wrong]))
    backbone = models.BACKBONES[cfg.backbone or next(iter(models.BACKBONES))]
    fields = {f.name for f in dataclasses.fields(backbone.Sampling)}
    if cfg.timesteps and "inference_timesteps" not in fields:
        wrong.append(f"--timesteps: {cfg.backbone} has no solver")
    try:
        configs.build(backbone.Training, cfg.options, "options")
    except Usage as e:
        wrong.append(str(e))
    defaults = Bench()
    given = {name for name in vars(defaults) if getattr(cfg, name) != getattr(defaults, name)}
    for name in ("full", "ckpt", "lengths", "adapter", "timesteps", "options", "text", *LEAST_MEMORY):
        if name in given and name not in ONLY[cfg.task]:
            wrong.append(f"--{name} does not go with --task {cfg.task}")
    if cfg.memory:
        for name in sorted(given - COUNTED):
            wrong.append(f"--{name} does not go with --memory, whose tables have all ways to train")
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


# ------------------------------------------------------------------------------------------- what is counted


class Way(NamedTuple):
    """One way to train, the flags of train.py that ask for it, and its name in the table of cards."""

    lora: bool
    plan: Plan
    flags: str
    short: str


CHECKPOINTED = Plan(checkpointing=1)
WAYS = (  # the ones that ask for more first, of full tuning and of adapters
    Way(False, CHECKPOINTED, "--checkpointing", "full"),
    Way(False, CHECKPOINTED._replace(optimizer="adamw8bit", master="none", fused_backward=True),
        "--checkpointing --optimizer adamw8bit --master none --fused_backward", "full in few bytes"),
    Way(True, Plan(), "", "LoRA"),
    Way(True, CHECKPOINTED, "--checkpointing", "LoRA c"),
    Way(True, CHECKPOINTED._replace(base_bits=8), "--checkpointing --base_bits 8", "LoRA c8"),
    Way(True, CHECKPOINTED._replace(base_bits=4), "--checkpointing --base_bits 4", "LoRA c4"),
)
SHARDED = Way(False, CHECKPOINTED._replace(ranks=4), "--checkpointing --shard, each of 4 ranks", "")
CARDS = (8, 12, 16, 24, 80)  # GB


def counted(cfg, ways):
    """{way: memory.Use} of the backbone in cfg, on the meta device."""
    meta = torch.device("meta")
    dtype = torch.bfloat16 if cfg.dtype == "auto" else models.pick_dtype(cfg.dtype, meta)
    with meta:  # the codec, too
        model = blank(cfg, meta, dtype)
    tokens = cfg.text or max(4, int(TEXT_RATE * cfg.seconds))
    out = {}
    # Every weight is trained until there are adapters.
    for way in sorted(ways, key=lambda way: way.lora):
        if way.lora and not list(lora.lora_modules(model)):
            add_adapter(cfg, model)
        examples = [model.blank_example(cfg.seconds, tokens)] * cfg.batch
        out[way] = memory.use(model, examples, way.plan._replace(batch_size=cfg.batch))
    return out


def fitting(uses, card):
    """The first ways, of full tuning and of adapters, that leave room on a card of so many GB."""
    fits = [way for way, use in uses.items() if use.total + memory.LEAVE <= card * 1e9]
    first = {}
    for way in fits:
        first.setdefault(way.lora, way.short)
    return ", ".join(first.values()) or "-"


def published(cfg):
    """A copy of the settings for each version of each backbone that is asked for."""
    names = [cfg.backbone] if cfg.backbone else list(models.BACKBONES)
    for name in names:
        versions = [cfg.version] if cfg.version else getattr(models.BACKBONES[name], "VERSIONS", [""])
        for version in versions:
            yield dataclasses.replace(cfg, backbone=name, version=version)


def tell_memory(cfg):
    """Two tables: each way to train with its bytes, and what leaves room on which card."""
    print(f"Computed, in GB, for {cfg.batch} clips of {cfg.seconds:g} s, size {cfg.size}. On top come CUDA, "
          f"scratch and codec: leave {memory.LEAVE / 1e9:g} GB.\n")
    names = ("checkpoint", "train.py", *memory.Use._fields, "all")
    print(row_of(names))
    print(row_of(["---"] * len(names)))
    summary = []
    for case in published(cfg):
        name = f"{case.backbone} {case.version}".strip()
        uses = counted(case, [*WAYS, SHARDED])
        for way, use in uses.items():
            kind = "LoRA" if way.lora else "full"
            what = f"{kind} {way.flags}".strip()
            sizes = [f"{size / 1e9:.2f}" for size in (*use, use.total)]
            print(row_of([name, what, *sizes]), flush=True)
        del uses[SHARDED]
        summary.append(row_of([name, *(fitting(uses, card) for card in CARDS)]))
    names = ("what leaves room on", *(f"{card} GB" for card in CARDS))
    print()
    print(row_of(names))
    print(row_of(["---"] * len(names)))
    print("\n".join(summary))


def row_of(cells):
    return f"| {' | '.join(cells)} |"


# ------------------------------------------------------------------------------------------- what is measured


def training(cfg, model, clips, device):
    """(step, info): one optimizer step on a fixed batch."""
    if not cfg.full:  # as built all is trained, but for what an option of the backbone freezes
        if cfg.base_bits != 16:
            quant.quantise(model, cfg.base_bits)
        add_adapter(cfg, model)
    plan = Plan(cfg.base_bits, cfg.optimizer, cfg.master, False, int(cfg.ckpt), cfg.batch)
    computed = memory.use(memory.on_meta(model), clips, plan)
    model.train()
    model.set_recompute(int(cfg.ckpt))
    batch, counts = model.collate(clips, seeds=list(range(len(clips))))
    batch = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
    weights = models.BACKBONES[model.backbone].LAMBDAS
    masters = train.Masters({name: p for name, p in model.named_parameters() if p.requires_grad}, cfg.master)
    settings = train.Train(learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY, optimizer=cfg.optimizer,
                           master=cfg.master)
    optimizer = train.make_optimizer(settings, masters, device)

    def step():
        out = model(batch)
        loss = sum(weights[name] * out[name] / counts[name] for name in weights)
        masters.backward(loss)
        train.cut(masters.parameters, masters.norm(), MAX_NORM)
        optimizer.step()
        masters.publish()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    name = "AdamW" if cfg.optimizer == "adamw" else cfg.optimizer
    longest = max(model.length(clip) for clip in clips)
    return step, {
        "positions": longest,
        "clip": MAX_NORM,
        "optimizer": f"{name} lr=1e-4 weight_decay={WEIGHT_DECAY}",
        "master": cfg.master,
        "base_bits": cfg.base_bits,
        "computed_mem_mib": round(computed.total / 2**20, 1),
        "adapter_params": parameters(masters.named.values()),
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
    if cfg.memory:
        return tell_memory(cfg)
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
