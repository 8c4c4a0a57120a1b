"""Fine-tune a text-to-speech checkpoint on rows with audio and text.

    python train.py configs/x.yaml --learning_rate 5e-5 --lora.r 16
    torchrun --nproc_per_node 4 train.py configs/x.yaml

With a `lora:` section adapters are trained, without one every weight. The same run anywhere: the order of
rows is a function of seed and epoch, every draw is a function of seed, epoch and row, and losses are sums
divided by the counts of the whole step. So neither padding, nor the number of micro-batches or ranks, nor a
restart changes what is computed. Interrupted runs go on from save_path by themselves.

`main`, at the end, is the whole story. What stands before it comes in the order in which main needs it. The
run folder, the log and all else that computes nothing are in models/parts/run.py.

One step, with two micro-batches on each of two ranks:

    rank 0   clips 4 9 | 1 7    forward, backward twice: gradients of sums add up  \
                                                                                    sum over ranks, clip, step
    rank 1   clips 0 3 | 8 2    forward, backward twice                            /

    loss = sum over k of  lambda_k * (sum of loss k over the four micro-batches) / (what k counts in all four)

The divisor is known before the first forward, since `collate` counts; so each micro-batch is weighted as it
comes, and nothing has to be kept or divided afterwards. What a run leaves in save_path:

    config.yaml         the settings as they acted; itself an argument of this script
    metrics.jsonl       every number of every step and validation; train.log has what was printed
    step_0000500/       adapter or weights, optimizer.pth, and last an index with sizes and checksums
    latest, best        links to the newest step and to the one with the lowest validation loss
    samples/, logs/     sentences as they sounded on the way; TensorBoard
"""
import dataclasses
import json
import math
import os
import random
import re
import shlex
import signal
import sys
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial, wraps
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import configs
import lora
import models
from configs import Usage, opt
from lora import LoRAConfig
from models.parts import Invalid, checkpoint, gate, listen, memory, run, sweep
from models.parts.cache import ClipCache
from models.parts.lean import Lean, Rule
from models.parts.manifests import holders, read_manifest
from models.parts.masters import Average, Masters, cut
from models.parts.ranks import attempt, others
from models.parts.shards import Shards

# ------------------------------------------------------------------------------------------------ settings


@dataclass
class Train:
    """Fine-tune a text-to-speech checkpoint: adapters with a lora section in the YAML, else every weight."""

    # What is read and written
    config: str = opt("", "YAML file of settings; flags win over it", config=True)
    pretrained_path: str = opt("", "folder of the published checkpoint, or org/name in the local hub cache")
    train_manifest: list[str] = opt([], "JSONL of rows to train on, or several; FILE@0.2: drawn from, so "
                                        "that its rows are a fifth of each epoch")
    val_manifest: list[str] = opt([], "JSONL of rows to validate on; several have losses of their own, too; empty means none")
    extra: dict[str, str] = opt({}, "places of parts kept elsewhere, as --extra.codec DIR; those not given are searched for")
    save_path: str = opt("", "run folder: checkpoints, logs, the resolved settings")
    tensorboard: str = opt("", "folder of the TensorBoard log; empty means logs/ in the run folder")
    cache_dir: str = opt("", "folder of encoded clips; empty means cache/ beside the first manifest")
    sample_rate: int = opt(0, "rate the codec reads; 0 takes the checkpoint's, anything else must equal it")
    out_sample_rate: int = opt(0, "rate the codec writes; 0 takes the checkpoint's, anything else must equal it")

    # How many clips at once: the memory of the device decides the first, the learning rate the last
    batch_size: int = opt(1, "clips per micro-batch and rank", most=65536)
    batch_tokens: int = opt(0, "positions per micro-batch, padding included, instead of batch_size clips; 0 is off")
    max_batch_tokens: int = opt(0, "drop clips longer than this divided by batch_size positions; 0 keeps all")
    max_length: int = opt(0, "drop clips longer than this many positions; 0 takes the checkpoint's limit")
    grad_accum_steps: int = opt(1, "micro-batches per step and rank", most=65536)
    num_workers: int = opt(2, "threads that collate ahead of the step; 0 collates in line", most=1024)

    # How long, and what happens on the way
    num_iters: int = opt(0, "optimizer steps; 0 takes epochs, else max_steps, else what suits the amount of data")
    max_steps: int = opt(0, "steps over which the learning rate falls to zero (see schedule); 0 means num_iters")
    epochs: float = opt(0.0, "length in passes over the data, wins over num_iters; 0 is off")
    log_interval: int = opt(10, "steps between lines in the log")
    valid_interval: int | None = opt(None, "steps between validations; empty takes a tenth of the run, 0 only the end")
    save_interval: int | None = opt(None, "steps between checkpoints; empty takes a tenth of the run, 0 only the end")
    save_epochs: float = opt(0.0, "passes over the data between checkpoints, beside save_interval; 0 is off")
    patience: int = opt(0, "end the run after so many validations without a lower loss; 0 is off")
    keep_last: int = opt(0, "newest checkpoints to keep; 0 keeps all")
    keep_every: int = opt(0, "with keep_last: also keep every checkpoint whose step this divides")
    keep_best: bool = opt(True, "with keep_last: also keep the one with the lowest validation loss")
    save_mode: str = opt("lora", "what a LoRA run saves: the adapter, the merged model, or both",
                         choices=("lora", "full", "both"))

    # The update
    learning_rate: float = opt(1e-4, "peak, reached after warmup_steps")
    weight_decay: float = opt(0.01, "on every trained tensor")
    schedule: str = opt("cosine", "after warm-up: cosine or linear to zero, constant, or wsd: constant, then linear to zero over "
                                  "the last fifth", choices=("cosine", "linear", "constant", "wsd"))
    warmup_steps: int = opt(100, "steps over which the learning rate rises from zero")
    warmup_ratio: float = opt(0.0, "warm-up as a share of the schedule instead of warmup_steps; 0 is off")
    max_grad_norm: float = opt(0.0, "longer gradients are scaled down to this norm; 0 never")
    ema: float = opt(0.0, "decay per step of an average of the trained weights, which is validated and saved then; 0 is off")
    optimizer: str = opt("adamw", "adamw, adam, sgd, or adamw8bit: moments in 2 bytes per trained weight instead of 8",
                         choices=("adamw", "adam", "sgd", "adamw8bit"))
    lambdas: dict[str, float] = opt({}, "weight of each loss; one that is not listed keeps the backbone's")
    seed: int = opt(42, "of the order of rows and of every draw")

    # The machine, and what to do with an earlier run or an unusual checkpoint
    device: str = opt("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = opt("auto", "of the weights: auto is bfloat16 on CUDA and float32 elsewhere",
                     choices=("auto", "float32", "bfloat16"))
    compile: bool = opt(False, "torch.compile every layer: faster steps after a slow start")
    checkpointing: bool | int = opt(False, "recompute activations in backward: less memory, slower steps; 2: half of the layers")
    master: str = opt("float32", "copies of bf16 weights that steps are added up in; none: rounded at random, 4 bytes less",
                      choices=("float32", "none"))
    fused_backward: bool = opt(False, "step each weight as soon as its gradient is there, so that no gradients are kept")
    shard: bool = opt(False, "each rank keeps its share of moments, float32 copies and gradients only")
    resume_from: str = opt("", "step folder to go on from; empty means the newest complete one in save_path")
    overwrite: bool = opt(False, "start anew; what save_path holds is moved aside, not deleted")
    ignore_base: bool = opt(False, "resume an adapter although it was trained on another base")
    allow_unused_tensors: bool = opt(False, "load a checkpoint although some of its tensors have no place in the model")
    base_bits: int = opt(16, "of the frozen weights under LoRA: 16 as they are; 8 or 4 take half or a quarter of the memory",
                         choices=(16, 8, 4))
    from_scratch: bool = opt(False, "draw the weights; config, tokenizer and codec come from pretrained_path")
    weights: str = opt("", "file to load where pretrained_path holds several")
    val_samples: int = opt(2, "validation texts to speak at each validation")
    sample_texts: list[str] = opt([], "further texts to speak then, in the voice of the first row", repeat=True)
    gate: str = opt("warn", "compare the base's losses with two controls before the first step: warn, stop or off",
                    choices=("warn", "stop", "off"))
    dry_run: bool = opt(False, "do everything up to the first step, try the longest micro-batch, report, write nothing")
    sweep: str = opt("", "YAML file of ranges (models/parts/sweep.py): a run for each draw of settings, and a table of them")
    trials: int = opt(12, "runs of a sweep; with more later, those that are done stay")
    hf_model_id: str = opt("", "hub id of the base, written into the adapter with distribute")
    distribute: bool = opt(False, "record hf_model_id as the base, so that the adapter can be shared")
    log_level: str = opt("info", "debug, info, warning, error or critical", choices=tuple(run.LEVELS))
    debug: bool = opt(False, "the same as log_level debug")

    # What is trained, and how it sees the data
    backbone: dict = opt({}, "options of the backbone's own, see Training in its file")
    lora: LoRAConfig | None = opt(None, "adapters, see lora.py; without this section every weight is trained")


# Settings that may change when a run goes on: lengths, intervals, places and speed. Any other one changes the
# numbers, and a run that mixes two of its values is neither of the two.
FREE = {
    "config", "pretrained_path", "extra", "train_manifest", "val_manifest", "save_path", "tensorboard",
    "cache_dir",
    "num_iters", "max_steps", "epochs", "log_interval", "valid_interval", "save_interval", "save_epochs",
    "patience", "keep_last", "keep_every", "keep_best", "num_workers", "device", "compile", "checkpointing",
    "resume_from", "overwrite", "ignore_base", "val_samples", "sample_texts", "gate", "dry_run", "sweep",
    "trials", "log_level", "debug", "fused_backward", "shard",
}
AT_LEAST_ONE = {"batch_size", "grad_accum_steps", "log_interval", "trials"}
AT_LEAST_ZERO = {
    "batch_tokens", "max_batch_tokens", "max_length", "num_workers", "num_iters", "max_steps", "epochs",
    "valid_interval", "save_interval", "save_epochs", "patience", "keep_last", "keep_every", "val_samples",
    "checkpointing", "learning_rate", "warmup_steps", "warmup_ratio", "weight_decay", "max_grad_norm",
}
OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}
LEAN = {"adamw8bit": ("adamw", 8), **{name: (name, 32) for name in OPTIMIZERS}}  # name and bits for lean.Rule
DECAY = 0.2  # of the steps, in which wsd falls to zero: a tenth to a fifth will do, and short runs need more
# Where no setting says how long, as README's table has it: 20 passes over a few clips, and with hours of them
# so many steps, since by then a voice is learned; but all of the data once.
USUAL_EPOCHS, USUAL_STEPS = 20, 1500
TENTH = 10  # validations and checkpoints of a run whose settings do not say how many
MANY_EPOCHS = 50  # twice what the guides advise for few clips: beyond it the log warns
BAD_STEPS = 3  # one step without a finite loss may be a bad clip, three on end are a run that has gone wrong
SCRATCH = "scratch"  # the word by which models.load draws the weights instead of reading a file


def check_settings(cfg):
    """Refuse, all at once, what cannot work whatever the files hold."""
    for key in ("pretrained_path", "train_manifest", "save_path"):
        if not getattr(cfg, key):
            raise Usage(f"{key} is not set; give it in the YAML or as --{key}")
    wrong = []
    for field in dataclasses.fields(cfg):
        name, value = field.name, getattr(cfg, field.name)
        if name in AT_LEAST_ONE and value < 1:
            wrong.append(f"{name} is {value}, expected at least 1")
        if name in AT_LEAST_ZERO and (value or 0) < 0:
            wrong.append(f"{name} is {value}, expected at least 0")
    shares = [manifest_of(word).share for word in cfg.train_manifest]
    if any(shares) and (sum(shares) >= 1 or all(shares) or len(set(paths_of(cfg))) < len(shares)):
        files = ", ".join(cfg.train_manifest)
        wrong.append(f"train_manifest is {files}: the shares must leave something of an epoch to a file "
                     "without one, and each file stands there once")
    if cfg.lora and cfg.lora.b_lr_ratio <= 0:
        wrong.append(f"lora.b_lr_ratio is {cfg.lora.b_lr_ratio:g}, expected above 0; 1 is off")
    if not 0 <= cfg.ema < 1:
        wrong.append(f"ema is {cfg.ema:g}, expected 0, which is off, or a decay below 1 such as 0.999")
    if cfg.patience and not (cfg.val_manifest and cfg.valid_interval != 0):
        wrong.append("patience counts validations: it needs val_manifest, and a valid_interval above 0")
    if cfg.distribute and not cfg.hf_model_id:
        wrong.append("distribute needs hf_model_id, the hub id that the adapter should name as its base")
    if cfg.overwrite and Path(cfg.save_path).is_dir():
        # What is moved aside must not hold what the run is about to read.
        needed = [cfg.pretrained_path, *paths_of(cfg), *cfg.val_manifest, cfg.cache_dir]
        inside = [path for path in needed if path and within(path, cfg.save_path)]
        if inside:
            wrong.append(f"overwrite would move {inside[0]} away, since it lies in save_path {cfg.save_path}")
    places = [Path(cfg.tensorboard), *Path(cfg.tensorboard).parents] if cfg.tensorboard else []
    for place in places:
        if place.exists() and not place.is_dir():
            wrong.append(f"tensorboard is {cfg.tensorboard}, but {place} is a file; give a folder")
    if cfg.overwrite and cfg.resume_from:
        wrong.append("overwrite starts anew and resume_from goes on; choose one")
    if cfg.save_mode != "lora" and not cfg.lora:
        wrong.append(f"save_mode {cfg.save_mode} is for LoRA runs; a full run always saves the whole model")
    if cfg.base_bits != 16 and not (cfg.lora and cfg.save_mode == "lora"):
        wrong.append(f"base_bits {cfg.base_bits} rounds weights that are frozen: it needs a lora section and "
                     "save_mode lora; merge_lora.py merges the adapter into the base as it was published")
    wrong += wrong_together(cfg, int(os.environ.get("WORLD_SIZE", 1)))
    if wrong:
        raise Usage("; ".join(wrong))


def wrong_together(cfg, world):
    """Ways to save memory that do not go with other settings."""
    wrong = []
    if cfg.fused_backward:
        # A gradient is gone before the next micro-batch, the norm of all, or the sum over ranks.
        needed = {"grad_accum_steps above 1": cfg.grad_accum_steps > 1,
                  "max_grad_norm": cfg.max_grad_norm > 0, "a sum over ranks": world > 1}
        for what, asked in needed.items():
            if asked:
                wrong.append(f"fused_backward keeps no gradients, and {what} needs them; "
                             "leave out one of the two")
    if cfg.master == "none":
        dtype = models.pick_dtype(cfg.dtype, models.pick_device(cfg.device))
        if cfg.lora or dtype != torch.bfloat16:
            wrong.append("master none is for full tuning in bf16 (--dtype bfloat16 and no lora section): "
                         "adapters, and weights in float32, have no copies")
        if cfg.shard:
            wrong.append("master none leaves out copies that shard shares out over the ranks; choose one")
        if cfg.ema:
            wrong.append("ema averages float32 values, which master none leaves out; choose one")
    if cfg.shard and cfg.ema:
        wrong.append("ema needs all values on each rank, which shard shares out; choose one")
    if cfg.shard and cfg.lora and cfg.lora.b_lr_ratio != 1:
        wrong.append("shard has one learning rate for all; leave lora.b_lr_ratio at 1, or leave out shard, "
                     "which saves little with adapters")
    return wrong


class Manifest(NamedTuple):
    """A file of rows, and the share of each epoch that is drawn from it; 0: every row comes once."""

    path: str
    share: float


def manifest_of(word):
    """replay.jsonl@0.2 -> that file and 0.2; a name that only looks so stays a name."""
    share = r"0?\.\d*[1-9]\d*"  # between 0 and 1
    weighted = re.fullmatch(f"(.+)@({share})", word)
    if not weighted or Path(word).exists():
        return Manifest(word, 0.0)
    return Manifest(weighted[1], float(weighted[2]))


def paths_of(cfg):
    """The files of rows to train on, without their shares."""
    return [manifest_of(word).path for word in cfg.train_manifest]


def parse_settings():
    """(settings, notes for the log). A rank without alpha keeps the scale of the file or of the defaults.

    Else four times the rank would be a quarter of the scale, in silence: the adapter would seem to learn
    nothing. With rslora the root in the scale is there for that, and alpha stays.
    """
    cfg = configs.parse(Train)
    # Only flags count: a file that says r without alpha means the default that its tool has.
    flags = configs.Given(configs.names(Train, "train"))
    configs.Flags(flags, sys.argv[1:], None).read()
    names = dict(flags.values)
    if not cfg.lora or cfg.lora.rslora or "lora.r" not in names or "lora.alpha" in names:
        return cfg, []
    file = configs.parse(Train, [cfg.config] if cfg.config else [])
    before = file.lora or LoRAConfig()
    cfg.lora.alpha = before.alpha / before.r * cfg.lora.r
    if cfg.lora.r == before.r:
        return cfg, []
    return cfg, [f"lora.r {cfg.lora.r} was given without lora.alpha: alpha goes from {before.alpha:g} to "
                 f"{cfg.lora.alpha:g}, so that the scale stays {cfg.lora.scale:g}; --lora.alpha sets it"]


def search(cfg):
    """--sweep: run this script once for each trial. -> exit code"""
    other = [key for key in ("overwrite", "resume_from", "dry_run") if getattr(cfg, key)]
    if other or "RANK" in os.environ:
        raise Usage(f"sweep starts each run by itself, without {other[0] if other else 'torchrun'}")
    if not cfg.val_manifest:
        raise Usage("sweep ranks runs by their validation: give val_manifest")
    plan = sweep.read_plan(cfg.sweep, cfg.trials, cfg.seed)
    sweep.recall(cfg.save_path, plan)
    root = Path(cfg.save_path)
    wrong = run.claim(root)
    if wrong:
        raise Usage(wrong)
    # What all of them share is written down once; another sweep does not go on in this folder.
    file = root / "settings.yaml"
    shared = dataclasses.replace(cfg, config="", sweep="", trials=Train.trials, save_path="")
    if file.exists():
        there, here = configs.parse(Train, [str(file)]), dataclasses.replace(shared, config=str(file))
        differ = "; ".join(run.differences(dataclasses.asdict(there), dataclasses.asdict(here), {}))
        if differ:
            raise Usage(f"{root} holds a sweep with other settings: {differ}. Choose another save_path.")
    configs.dump(shared, file)
    # A name or a value that one of them would refuse is told before the first begins.
    for trial in plan.trials:
        check_settings(configs.parse(Train, [str(file), "--save_path", trial.name, *trial.flags]))
    say = partial(print, file=sys.stderr, flush=True)
    code = sweep.run(root, plan, [sys.executable, __file__, str(file)], say)
    print(sweep.table(plan), end="")
    say(f"the table is in {root / sweep.TABLE}, the runs are in {root}/trial_*")
    return code


def within(path, folder):
    """Whether a path is a folder or lies in it, links followed: `latest` is one."""
    path = Path(path).resolve()
    return Path(folder).resolve() in (path, *path.parents)


def resolve(cfg, backbone):
    """The backbone's options and the weights of its losses, with defaults for what the settings leave out.

    A loss that the backbone does not have is refused: a slip of the pen would train with the usual weights.
    """
    options = dataclasses.asdict(configs.build(backbone.Training, cfg.backbone, "backbone"))
    unknown = ", ".join(sorted(set(cfg.lambdas) - set(backbone.LAMBDAS)))
    if unknown:
        raise Usage(f"lambdas: unknown loss {unknown}; this backbone has {', '.join(backbone.LAMBDAS)}")
    lambdas = {**backbone.LAMBDAS, **cfg.lambdas}
    if min(lambdas.values()) < 0 or not any(lambdas.values()):
        raise Usage(f"lambdas: {lambdas}; expected weights of at least 0, and one above")
    if cfg.lora and options.get("freeze"):
        raise Usage(f"backbone.freeze is {options['freeze']!r} and there is a lora section, which freezes "
                    "all but the adapters; say with lora.target_modules what they adapt")
    return options, lambdas


def binding(cfg, options, lambdas):
    """The settings that must agree for a run to go on, as JSON will give them back.

    They are resolved: to write out a default makes no other run, but a changed default does.
    """
    values = {**dataclasses.asdict(cfg), "backbone": options, "lambdas": lambdas}
    values = {k: v for k, v in values.items() if k not in FREE}
    return json.loads(json.dumps(values))


class Schedule(NamedTuple):
    """How long the run is and how the learning rate moves, in steps."""

    steps: int
    span: int  # the learning rate reaches zero here
    warmup: int
    per_step: int  # micro-batches of a step, over all ranks
    per_epoch: int  # micro-batches of an epoch
    validate_every: int  # 0: only at the end
    save_every: int

    @property
    def epochs(self):
        return self.steps * self.per_step / self.per_epoch


def schedule_of(cfg, progress, per_epoch):
    """The length in steps, from what the settings say in steps or in epochs, else from the data.

    Where it follows from the data, what a YAML says of steps was meant for another length: max_steps does not
    count, and a warm-up is cut to a tenth of the run. A run that goes on keeps the length that it has.
    """
    per_step = progress.micro_per_step
    epoch = per_epoch / per_step
    given = cfg.num_iters or cfg.max_steps
    by_data = bool(cfg.epochs) or not given
    # New clips in a run that goes on make it no longer: the learning rate is on its way to zero already.
    steps = given or progress.steps or usual_steps(epoch)
    if cfg.epochs:
        steps = math.ceil(cfg.epochs * epoch)
    span = steps if by_data else cfg.max_steps or steps
    warmup = cfg.warmup_steps
    if cfg.warmup_ratio:
        warmup = round(cfg.warmup_ratio * span)
    elif by_data:
        warmup = min(warmup, span // 10)
    validate_every, save_every = intervals(cfg, steps)
    return Schedule(steps, span, warmup, per_step, per_epoch, validate_every, save_every)


def usual_steps(epoch):
    """How long a run is whose settings do not say it; epoch: steps of a pass over the data."""
    return math.ceil(max(epoch, min(USUAL_EPOCHS * epoch, USUAL_STEPS)))


def intervals(cfg, steps):
    """Steps between validations and between checkpoints: as they are set, else a tenth of the run."""
    # A tenth shows where a short run turns, and is rare enough that neither costs much of a long one.
    tenth = math.ceil(steps / TENTH)
    validate_every = tenth if cfg.valid_interval is None else cfg.valid_interval
    save_every = cfg.save_interval
    if save_every is None:  # who counts checkpoints in epochs wants no others
        save_every = 0 if cfg.save_epochs else tenth
    return validate_every, save_every


def learning_rate(cfg, s, span, warmup):
    """Rate of the update after s completed ones: linear up, then by `schedule`, most of which are zero from
    `span` on.

    The first update has rate zero: it fills the optimizer's moments and moves nothing.
    """
    if s < warmup:
        return cfg.learning_rate * s / warmup
    if cfg.schedule == "constant":
        return cfg.learning_rate
    if s >= span:
        return 0.0
    if cfg.schedule == "linear":
        return cfg.learning_rate * (span - s) / (span - warmup)
    if cfg.schedule == "wsd":
        return cfg.learning_rate * min(1.0, (span - s) / (DECAY * span))
    return cfg.learning_rate * 0.5 * (1 + math.cos(math.pi * (s - warmup) / (span - warmup)))


def set_rate(optimizer, rate):
    """Before backward, which with fused_backward takes the step."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("ratio", 1.0)


def seed_from(*numbers) -> int:
    """A seed from numbers and texts, the same on every machine.

    Every draw starts from one, so no state of a generator is ever saved. Python's hash() differs by process.
    """
    return zlib.crc32(repr(numbers).encode()) & 0x7FFFFFFF


def leave(number, frame):
    """A signal before the first step: nothing is worth finishing yet."""
    sys.exit(128 + number)


def due(every, step):
    """Whether something that is done every so many steps falls due; 0 is never."""
    return bool(every) and step % every == 0


def epochs_due(every, before, after):
    """Whether a multiple of `every` epochs lies in (before, after]."""
    if not every:
        return False
    hair = 1e-9  # ten tenths may add up to a little less than one
    return math.floor(after / every + hair) > math.floor(before / every + hair)


# ------------------------------------------------------------------------------------------------ distributed


class Place(NamedTuple):
    """Where this process computes, and which of how many it is."""

    device: torch.device
    rank: int
    world: int


def join_ranks(device):
    """Meet the other processes that torchrun has started. Without RANK in the environment there are none.

    gloo on a CPU makes two ranks testable on any laptop.
    """
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = models.pick_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Without torchrun nobody waits for anybody, and no port is opened.
    if "RANK" in os.environ:
        others.meet(rank, world, "nccl" if device.type == "cuda" else "gloo")
    return Place(device, rank, world)


ERROR_SECONDS = 5  # how far apart two ranks may meet the same error
LOST = re.compile("connection (was )?(closed|reset|refused)|broken pipe|by peer|timed out|aborted", re.I)


def told_once(main):
    """Under torchrun, what goes wrong is printed once: not by each rank, nor because another one ended.

    A person looks for the first message, and finds it last where every rank adds a traceback of its own.
    """
    @wraps(main)
    def wrapped():
        try:
            return main()
        except (Usage, Invalid) as error:
            leave_word(error)
            if mine_to_say(error):
                raise
            sys.exit(2 if isinstance(error, Usage) else 1)
        except RuntimeError as error:
            # A rank that has failed leaves the others in the middle of a sum.
            alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
            if alone or isinstance(error, torch.OutOfMemoryError) or not LOST.search(str(error)):
                raise
            sys.exit(1)
    return wrapped


def leave_word(error):
    """torchrun ends with a block of its own, which has the reason if it lies in this file, else a link."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        reason = str(error).split("\n")[0]  # the block says it for each rank
        more = {"timestamp": str(int(time.time())), "py_callstack": reason}
        Path(path).write_text(json.dumps({"message": {"message": reason, "extraInfo": more}}))


def mine_to_say(error):
    """Whether this rank prints an error: rank 0 always does, another one what rank 0 did not meet, too."""
    if not others.store:  # before the ranks meet: settings and files, of which each machine has one set
        return int(os.environ.get("LOCAL_RANK", 0)) == 0
    key = f"error {attempt()} {zlib.crc32(str(error).encode())}"
    try:
        if dist.get_rank() == 0:
            others.store.set(key, "said")
        else:
            others.store.wait([key], timedelta(seconds=ERROR_SECONDS))
    except dist.DistNetworkError:  # rank 0 has ended, not without saying why
        return dist.get_rank() == 0
    except dist.DistStoreError:  # nobody else has said it
        return True
    return dist.get_rank() == 0


def wait_for_all(for_rank_0=False):
    """What follows finds everything done that any rank did before. All ranks.

    for_rank_0: it saves or speaks meanwhile, which a signal to another rank must not break off.
    """
    if dist.is_initialized():
        with others.waiting(patient=for_rank_0):
            dist.barrier()


def all_sum(values: dict, device) -> dict:
    """Sums of numbers over all ranks. All ranks call it with the same keys."""
    if not dist.is_initialized():
        return values
    dtype = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    sums = torch.tensor([float(v) for v in values.values()], dtype=dtype, device=device)
    with others.waiting():
        dist.all_reduce(sums)
        return dict(zip(values, sums.tolist()))


# ---------------------------------------------------------------------------------------- checkpoint and LoRA


class Trainee(NamedTuple):
    """What is trained and saved together, and how its losses are weighed."""

    model: Any
    masters: Masters
    optimizer: torch.optim.Optimizer
    lambdas: dict[str, float]
    average: Average


def find_run(cfg, settings, defaults, place, log):
    """The Progress of the run that goes on here; None for one that begins. All ranks.

    What is looked at is decided by the folders alone, so all ranks come to the same answer without talking.
    """
    if cfg.overwrite:
        return None
    wrong = checkpoint.check_step(cfg.resume_from) if cfg.resume_from else None
    if wrong:
        raise Usage(f"resume_from: {wrong}. To start from its weights alone, give it as pretrained_path "
                    "(full) or merge it (LoRA).")
    past = run.find(cfg.save_path, cfg.resume_from, log.say)
    if past is None:
        return None
    differ = "\n  ".join(run.differences(past.settings, settings, defaults))
    if differ:
        raise Usage(f"{past.folder} was made with other settings, so going on would mix two runs:\n"
                    f"  {differ}\n"
                    "Choose another save_path, or --overwrite to move that run aside.")
    # The step stays what it was: with another number of ranks each takes more or fewer of its micro-batches.
    n = past.micro_per_step
    if n % place.world:
        possible = " or ".join(str(ranks) for ranks in range(1, n + 1) if n % ranks == 0)
        raise Usage(f"{past.folder} was trained with {n} micro-batches per step, which {place.world} ranks "
                    f"cannot share evenly; use {possible} ranks")
    wait_for_all()  # before every rank has looked, nothing may be moved
    if place.rank == 0 and not cfg.dry_run:
        run.clear_the_way(past, cfg.save_path, log.say)
    return past


def load_model(cfg, past, options, device, dtype):
    """The checkpoint. A full run that goes on is its own; an adapter is trained on its base again."""
    source, weights, extra = cfg.pretrained_path, cfg.weights or None, cfg.extra
    if cfg.from_scratch:
        weights = SCRATCH
    if past and not cfg.lora:
        source, weights = past.folder, None
    if past:  # the run has recorded where its parts were; one that was moved is searched for
        extra = models.present(extra)
    # For weights from scratch, and for the adapter that comes next.
    torch.manual_seed(seed_from(cfg.seed, "init"))
    unused = cfg.allow_unused_tensors
    model = models.load(source, device, dtype, options, extra, weights, unused, cfg.base_bits)
    # Recorded in the run and in its adapters, so that both find again what they were made with.
    cfg.extra = models.parts_elsewhere(cfg.pretrained_path, extra)
    for key in ("sample_rate", "out_sample_rate"):
        if getattr(cfg, key) not in (0, getattr(model, key)):
            raise Usage(f"{key} is {getattr(cfg, key)}, the checkpoint's is {getattr(model, key)}; "
                        "leave it out, audio is resampled")
    return model


def prepare(cfg, model, lambdas, log):
    """The Trainee: adapters where there is a lora section, masters, optimizer, and how layers compute."""
    if cfg.lora:
        add_adapters(cfg, model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if cfg.shard and dist.is_initialized() and dist.get_world_size() > 1:
        masters = Shards(trained, log.say)
    else:
        masters = Masters(trained, cfg.master)
    model.set_recompute(int(cfg.checkpointing))
    if cfg.compile:
        log.say("layers are compiled as the first validation and the first step come to them, which may take "
                "minutes; both say how long")
        for block in model.blocks():
            block.compile()
    optimizer = make_optimizer(cfg, masters, model.device)
    if cfg.fused_backward:
        masters.step_in_backward(optimizer)
    return Trainee(model, masters, optimizer, lambdas, Average(masters, cfg.ema))


def make_optimizer(cfg, masters, device):
    """It steps on the masters, which are float32 also where the model computes in bf16."""
    # betas and eps are those that PyTorch has by default, written out so that no other default changes a run
    # that goes on.
    rates = {} if cfg.optimizer == "sgd" else {"betas": (0.9, 0.999), "eps": 1e-8}
    rates |= {"lr": cfg.learning_rate, "weight_decay": cfg.weight_decay}
    parameters = parameter_groups(cfg, masters)
    if cfg.optimizer == "adamw8bit" or cfg.master == "none" or cfg.fused_backward:
        rule = Rule(*LEAN[cfg.optimizer], cfg.weight_decay, seed_from(cfg.seed, "rounding"))
        return Lean(parameters, rule, cfg.learning_rate)
    return OPTIMIZERS[cfg.optimizer](parameters, fused=device.type == "cuda", **rates)


def parameter_groups(cfg, masters):
    """What the optimizer steps on. With lora.b_lr_ratio the B of all adapters are a group with a rate of its
    own: `ratio` times that of the others."""
    ratio = cfg.lora.b_lr_ratio if cfg.lora else 1.0
    if ratio == 1.0:
        return masters.parameters
    named = list(zip(masters.named, masters.parameters))
    slow = [p for name, p in named if not name.endswith(".lora_B")]
    fast = [p for name, p in named if name.endswith(".lora_B")]
    return [{"params": slow, "ratio": 1.0}, {"params": fast, "ratio": ratio}]


def add_adapters(cfg, model):
    """Freeze the model and put fresh adapters into the layers that the lora section means."""
    try:
        lora.apply_lora_to_model(model, cfg.lora)
    except Invalid as e:
        raise Usage(e) from None
    if cfg.save_mode != "lora":
        try:
            lora.check_mergeable(model)
        except Invalid as e:  # now, not at the first save
            raise Usage(f"save_mode {cfg.save_mode}: {e}") from None


def resume(cfg, past, trainee, progress, log):
    """Bring trained values and optimizer back, and return where the run stands. All ranks.

    Changed rows are no reason to refuse: who adds clips to a running project wants just that.
    """
    if past.base != progress.base and not cfg.ignore_base:
        raise Invalid(f"{past.folder} was trained on another base (fingerprint {past.base}) than "
                      f"{cfg.pretrained_path} (fingerprint {progress.base}). "
                      "If you want that, say --ignore_base.")
    restore(cfg, past.folder, trainee)
    log.say(f"going on from {past.folder}: {past.step} steps done")
    if past.data != progress.data:
        log.say("the rows are not those that the run began with, so in this epoch some may come twice "
                "and others not at all", "warning")
    return progress.after(past)


def restore(cfg, folder, trainee):
    """The counterpart of `save`. The weights of a full run are there already: load_model has read them."""
    model, masters, optimizer, _, average = trainee
    path = folder / "optimizer.pth"
    saved = torch.load(path, map_location="cpu", weights_only=True)
    # Values beside the optimizer are there because the files of the model hold something less exact.
    if saved["values"]:
        if list(saved["values"]) != list(masters.named):
            raise Invalid(f"{path} holds other trained parameters than this run has")
        masters.set(saved["values"])
    elif cfg.lora:
        lora.restore_lora_weights(model, folder, cfg.ignore_base)
        masters.set(masters.named)
    masters.load_state(optimizer, saved["optimizer"])
    average.restore(saved.get("average", []))


def begin_folder(cfg, log):
    """Make room, with --overwrite, and write config.yaml. Rank 0 only.

    The file, given as it is, goes on with this run; so it must not say --overwrite again.
    """
    if cfg.overwrite:
        run.set_aside(cfg.save_path, log.say)
    again = dataclasses.replace(cfg, overwrite=False, resume_from="")
    configs.dump(again, Path(cfg.save_path) / "config.yaml")


def save(cfg, write, progress, log, held=None):
    """Write step_N with weights or adapter, optimizer, schedule and the index of them all. Rank 0 only.

    write(folder) writes all but the index. Then delete what need not be kept, except step `held`.
    """
    started = time.perf_counter()
    folder = checkpoint.write_step(cfg.save_path, progress.step, write, progress.index())
    seconds = time.perf_counter() - started
    log.say(f"saved {folder}: {checkpoint.megabytes(folder):.1f} MB in {seconds:.1f} s")
    stay = [held, progress.best.step] if cfg.keep_best else [held]
    checkpoint.prune(cfg.save_path, cfg.keep_last, cfg.keep_every, stay, log.say)
    run.name_best(cfg.save_path, progress.best, log.say)


def state_of(cfg, trainee):
    """What lets training go on from exactly what it had, beside the files of model or adapter. All ranks."""
    # Files that round, merge or rescale do not hold that (a bias is stored divided by the scale, as PEFT has
    # it); then the values stand beside the optimizer's state.
    _, masters, optimizer, _, average = trainee
    exact = masters.exact and not cfg.ema
    if cfg.lora:
        exact = exact and cfg.save_mode != "full" and not cfg.lora.bias
    values = {} if exact else masters.values()
    return {"optimizer": masters.state(optimizer), "values": values, "average": average.values}


def write_files(cfg, trainee, progress, state, folder):
    """What a step folder holds beside its index, which checkpoint.write_step puts in last."""
    model, *_, average = trainee
    adapter = bool(cfg.lora) and cfg.save_mode != "full"
    whole = not cfg.lora or cfg.save_mode != "lora"
    with average.acting():
        if adapter:
            base = cfg.hf_model_id if cfg.distribute else str(cfg.pretrained_path)
            extra = {} if cfg.distribute else cfg.extra  # places on this machine are nobody else's
            lora.save_lora_weights(model, folder, base=base, speakers=progress.speakers, extra=extra)
        if whole:
            model.save(folder, merged=bool(cfg.lora))
    torch.save(state, folder / "optimizer.pth")
    # For tools that look for this file. The rate is a function of the step, which stands in the index.
    torch.save({"last_step": progress.step}, folder / "scheduler.pth")


# ------------------------------------------------------------------------------------------------ data


class Data(NamedTuple):
    """Clips that fit, and the cache in which their examples lie."""

    train: list[run.Clip]
    val: list[run.Clip]
    cache: ClipCache
    pools: list["Pool"]


def load_clips(cfg, model, speakers, place, log):
    """The rows of the manifests as clips, encoded if need be. `speakers` grows by the names in the rows.

    One process encodes by itself. Several would each encode everything, or wait for one; so that is refused,
    with the command that does it.
    """
    files, val_files = {}, {}
    rows = read_manifest(paths_of(cfg), speakers, files)
    val_rows = read_manifest(cfg.val_manifest, speakers, val_files) if cfg.val_manifest else []
    model.speakers = speakers
    # Single clips that are longer are dropped, conversations are cut as they are encoded: for them, and only
    # for them, the limit is part of what the cache holds.
    longest = model.max_length
    limit = min(cfg.max_length or longest, longest)
    if any("turns" in row for row in rows + val_rows):
        model.max_length = limit
    cache = ClipCache(cfg.cache_dir or Path(paths_of(cfg)[0]).parent / "cache", model)
    train = run.outlines(rows, model.frame_rate, files)
    val = run.outlines(val_rows, model.frame_rate, val_files)
    # What is too long by its audio alone is not worth encoding.
    wanted = [clip.row for clip in train + val if clip.length <= limit]
    missing = [wanted[i] for i in cache.missing(wanted)]
    if missing and place.world > 1:
        usual = cache.folder.name == "cache" and not cfg.backbone and model.max_length == longest
        usual = usual and all("audio" in row or "turns" in row for row in missing)
        command = command_to_encode(cfg, cache.folder.parent, usual)
        raise Usage(f"{len(missing)} of {len(wanted)} clips are not in the cache {cache.folder}. "
                    f"Encode them once, in one process:\n    {command}")
    if missing:
        model.codec.to(place.device)
        cache.add(missing, log.say)
        model.codec.to("cpu")  # not needed again but to speak
    # From here on no recording is needed.
    limits = limits_of(cfg, limit, longest)
    train = run.drop_long(run.measured(train, model, cache, limit), limits, log.say)
    val = run.measured(val, model, cache, limit)
    fits = [clip for clip in val if 0 < clip.length <= limit]
    if len(fits) < len(val):
        log.say(f"validation: {len(val) - len(fits)} of {len(val)} rows are left out: "
                f"longer than {limit} positions, or nothing is trained in them", "warning")
    return Data(train, fits, cache, pools_of(cfg, train, log))


def limits_of(cfg, limit, longest):
    """How long a clip may be; the first limit that it exceeds is the reason why it is dropped."""
    # Each remedy is one that works: nothing raises the checkpoint's own limit, and a budget that is divided
    # by the clips of a batch has two ways out.
    cut = "cut longer recordings: prepare_data.py has --slice and --max_seconds"
    remedy = f"Raise max_length, up to the checkpoint's {longest}, or {cut}."
    limits = [run.Limit(limit, "max_length", remedy)]
    if limit == longest:
        cause = "max_length, the checkpoint's own limit"
        limits = [run.Limit(limit, cause, f"No setting raises it; {cut}.")]
    if cfg.max_batch_tokens:
        budget = cfg.max_batch_tokens // cfg.batch_size
        remedy = f"Raise max_batch_tokens {cfg.max_batch_tokens}, or lower batch_size {cfg.batch_size}."
        limits.append(run.Limit(budget, "max_batch_tokens / batch_size", remedy))
    if cfg.batch_tokens:
        limits.append(run.Limit(cfg.batch_tokens, "batch_tokens", "Raise batch_tokens."))
    return limits


def command_to_encode(cfg, folder, usual):
    """What to run before torchrun; `usual`: the cache lies and is made as prepare_data.py would do it."""
    if not usual:
        return "this command without torchrun encodes before it trains"
    flags = [*paths_of(cfg), *cfg.val_manifest, "--output_dir", str(folder)]
    flags += ["--ckpt_dir", cfg.pretrained_path]
    for key, place in cfg.extra.items():
        flags += [f"--extra.{key}", place]
    return "python prepare_data.py --encode_only --input " + shlex.join(flags)


def samples_of(cfg, data, log):
    """What is spoken at each validation."""
    rows = [clip.row for clip in data.val]
    spoken = listen.sentences(rows)[: cfg.val_samples]
    # Texts that nobody has recorded are spoken in the voice of the first row.
    rows += [clip.row for clip in data.train]
    return listen.Samples(spoken + listen.further(cfg.sample_texts, rows), cfg.seed, log)


def warn_of_speakers(model, log):
    """Voices that a model cannot tell apart come out mixed, and no loss would show it."""
    names = list(model.speakers)
    if len(names) > 1 and not model.speaker_input:
        some = ", ".join(names[:5])
        log.say(f"the rows name {len(names)} speakers ({some}) and this backbone is not told who speaks: "
                "each sentence would get one of them by chance. Train one adapter per speaker, or give rows "
                "a ref_audio where the checkpoint takes one.", "warning")


class Pool(NamedTuple):
    """The clips of a file, by number, that are drawn from in each epoch until they are a share of it."""

    share: float
    clips: list[int]


def pools_of(cfg, clips, log):
    """A Pool for each file of rows that has a share."""
    pools = []
    manifests = [manifest_of(word) for word in cfg.train_manifest]
    if not any(manifest.share for manifest in manifests):
        return pools
    for path, share in manifests:
        numbers = [i for i, clip in enumerate(clips) if clip.file == path]
        if not numbers:
            raise Invalid(f"train_manifest: no clip of {path} is left to train on; take it out of the list")
        if share:
            pools.append(Pool(share, numbers))
    counts = Counter(clips[i].file for i in clips_of_epoch(len(clips), cfg, 0, pools))
    log.say("clips of an epoch: " + ", ".join(f"{n} of {path}" for path, n in counts.items()))
    return pools


def clips_of_epoch(count, cfg, epoch, pools) -> list[int]:
    """What comes in one pass: every clip that is in no pool, and of each pool as many as its share takes."""
    pooled = {i for pool in pools for i in pool.clips}
    numbers = [i for i in range(count) if i not in pooled]
    whole = len(numbers) / (1 - sum(pool.share for pool in pools))
    for pool in pools:
        numbers += drawn(pool.clips, max(1, round(pool.share * whole)), cfg.seed, epoch)
    return numbers


def drawn(clips, n, seed, epoch):
    """The n clips of a pool whose turn it is. They come in one random order after the other, over the borders
    of epochs, so none comes again before all others have come."""
    begin, end = epoch * n, (epoch + 1) * n
    first = begin // len(clips)
    orders = []
    for number in range(first, (end - 1) // len(clips) + 1):
        draw = random.Random(seed_from(seed, "share", number))
        orders += draw.sample(clips, len(clips))
    skipped = first * len(clips)
    return orders[begin - skipped : end - skipped]


# Clips of like length share a micro-batch, which saves padding. They are sorted within groups of so many
# batches, or with batch_tokens of so many clips: enough to find like lengths, few enough for a random order.
GROUP_BATCHES, GROUP_CLIPS = 50, 512


def micro_batches(lengths, cfg, epoch, pools=()) -> list[list[int]]:
    """The clips of one pass, by number, cut into micro-batches.

    A function of lengths, settings and epoch only, so that a restart, or any rank, finds the same.
    """
    draw = random.Random(seed_from(cfg.seed, "order", epoch))
    order = clips_of_epoch(len(lengths), cfg, epoch, pools)
    draw.shuffle(order)
    group = GROUP_CLIPS if cfg.batch_tokens else GROUP_BATCHES * cfg.batch_size
    batches = []
    for start in range(0, len(order), group):
        near = sorted(order[start : start + group], key=lambda i: lengths[i])
        batch = []
        for i in near:
            full = len(batch) == cfg.batch_size
            if cfg.batch_tokens:  # lengths rise, so all would be padded to this one
                full = (len(batch) + 1) * lengths[i] > cfg.batch_tokens
            if batch and full:
                batches.append(batch)
                batch = []
            batch.append(i)
        batches.append(batch)
    draw.shuffle(batches)
    return batches


class Slot(NamedTuple):
    """One micro-batch in the order of the run, not yet loaded: its epoch and its clips, by number."""

    epoch: int
    clips: list[int]


class Order:
    """Walks through the micro-batches of all epochs; (epoch, position) is all there is to save.

    Ranks share one order and take from it in turns: of four slots of a step, rank 0 of two computes the first
    and the third. So another number of ranks goes on from the same place.
    """

    def __init__(self, lengths, cfg, epoch=0, position=0, pools=()):
        self.lengths, self.cfg, self.epoch, self.position = lengths, cfg, epoch, position
        self.pools = pools
        self.batches = micro_batches(lengths, cfg, epoch, pools)

    def take(self, n) -> list[Slot]:
        """The next n micro-batches, across the borders of epochs: none is cut short, none is dropped."""
        slots = []
        while len(slots) < n:
            if self.position == len(self.batches):
                self.epoch, self.position = self.epoch + 1, 0
                self.batches = micro_batches(self.lengths, self.cfg, self.epoch, self.pools)
            slots.append(Slot(self.epoch, self.batches[self.position]))
            self.position += 1
        return slots

    def progress(self):
        """Epochs done, with their fraction."""
        return self.epoch + self.position / len(self.batches)


def order_from(progress, lengths, cfg, pools):
    """The order of rows, from where the run stands."""
    order = Order(lengths, cfg, progress.epoch, progress.position, pools)
    if order.position > len(order.batches):  # only where rows were taken out since
        raise Usage(f"{progress.folder} stands at micro-batch {order.position} of its epoch, the data now "
                    f"has {len(order.batches)}; the data set changed")
    return order


def seed_of(cfg, epoch, row):
    """The seed of all that collate draws for a row: another one in each epoch, wherever the row comes."""
    return seed_from(cfg.seed, "draw", epoch, row["id"])


def numbers_of(slots) -> list[int]:
    """The clips of several micro-batches."""
    return [i for slot in slots for i in slot.clips]


class MicroBatch(NamedTuple):
    """What one forward takes, and how many of each thing its losses are sums over."""

    number: int  # in the step, over all ranks
    clips: list[int]
    batch: dict[str, torch.Tensor]
    counts: dict[str, int]


class StepData(NamedTuple):
    """What one step sees, and where the order of rows stands after it."""

    slots: list[Slot]  # of all ranks
    micro: list[MicroBatch]  # of this rank
    epoch: int
    position: int
    progress: float


class Loader:
    """Collates micro-batches in threads: those of the next step while the device computes this one.

    Threads and not processes, since all that is slow in it (reading a cache, filling tensors) lets go of the
    interpreter, and nothing has to be copied from one memory to another.
    """

    def __init__(self, cfg, model, data, place, order):
        self.cfg, self.model, self.place = cfg, model, place
        self.data, self.order = data, order
        self.pool = ThreadPoolExecutor(cfg.num_workers) if cfg.num_workers else None

    def steps(self, n, per_step):
        """The data of the next n steps, one after the other."""
        ahead = self.begin(per_step) if n else None
        for left in reversed(range(n)):
            step, calls = ahead
            micro = [call() for call in calls]  # waits for the threads or, without any, does their work
            if left:
                ahead = self.begin(per_step)
            yield step._replace(micro=micro)

    def begin(self, per_step):
        """A step whose micro-batches are on the way, and the calls that bring them."""
        order, calls = self.order, []
        slots = order.take(per_step)
        # The ranks take turns, so a micro-batch has the same number, and the same dropout, whoever takes it.
        for number in range(self.place.rank, per_step, self.place.world):
            call = partial(self.collate, number, slots[number])
            calls.append(self.pool.submit(call).result if self.pool else call)
        return StepData(slots, [], order.epoch, order.position, order.progress()), calls

    def collate(self, number, slot):
        """In a thread: it reads the cache and draws from seeds, and changes nothing that others use."""
        clips = [self.data.train[i] for i in slot.clips]
        examples = [self.data.cache.load(clip.key) for clip in clips]
        seeds = [seed_of(self.cfg, slot.epoch, clip.row) for clip in clips]
        batch, counts = self.model.collate(examples, seeds)
        return MicroBatch(number, slot.clips, batch, counts)


def to_device(batch, device):
    """A batch where the model is; what is no tensor stays."""
    pin = device.type == "cuda"  # a copy from pinned memory runs beside the computation
    moved = dict(batch)
    for name, value in batch.items():
        if torch.is_tensor(value):
            value = value.pin_memory() if pin else value
            moved[name] = value.to(device, non_blocking=pin)
    return moved


# -------------------------------------------------------------------------------------- what is not finite


def suspects(data, sums, device) -> list[Slot]:
    """The micro-batches whose losses are not finite; all of the step where only a gradient is not. All ranks.

    `sums` has one value per micro-batch of this rank, for each loss.
    """
    bad = dict.fromkeys(range(len(data.slots)), 0)
    losses = torch.stack(list(sums.values()), 1)  # (micro-batches, losses)
    finite = losses.isfinite().all(1).tolist()
    for micro, fine in zip(data.micro, finite):
        bad[micro.number] = not fine
    bad = all_sum(bad, device)
    found = [slot for number, slot in enumerate(data.slots) if bad[number]]
    return found or data.slots


# ------------------------------------------------------------------------------------------------ validation


class Sums(NamedTuple):
    """Of each loss and metric over many clips, and of how many things it is the sum."""

    sums: dict[str, float]
    counts: dict[str, int]


@torch.no_grad()
def evaluate(cfg, model, sets, lambdas, place):
    """Means over all validation rows; loss/total weighs them. All ranks.

    sets: {name: examples}; of several each also has its own means, as name/loss/total. Draws are fixed and
    nothing is dropped, so that two validations differ by the weights alone.
    """
    model.eval()
    parts = {name: add_up(cfg, model, examples, place) for name, examples in sets.items()}
    model.train()
    means = weighed(parts.values(), lambdas)
    if len(sets) > 1:
        for name, part in parts.items():
            means |= {f"{name}/{k}": v for k, v in weighed([part], lambdas).items()}
    return means


def add_up(cfg, model, examples, place) -> Sums:
    """Over the examples, which the ranks share. All ranks."""
    lengths = [model.length(example) for example in examples]
    order = sorted(range(len(examples)), key=lambda i: lengths[i])
    batches = [order[i : i + cfg.batch_size] for i in range(0, len(order), cfg.batch_size)]
    # With few clips a rank may get no batch, and still takes part in the sums: names come from one example.
    names = model.counts(model.collate([examples[0]])[0])
    sums, counts = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
    for numbers in batches[place.rank :: place.world]:
        batch, n = model.collate([examples[i] for i in numbers])
        for name, value in model(to_device(batch, place.device)).items():
            sums[name] += value.item()
            counts[name] += n[name]
    return Sums(all_sum(sums, place.device), all_sum(counts, place.device))


def weighed(parts, lambdas):
    """Means over several Sums, and their weighted total."""
    means = {}
    for name in next(iter(parts)).sums:
        total = sum(part.sums[name] for part in parts)
        means[name] = total / max(sum(part.counts[name] for part in parts), 1)
    return {"loss/total": sum(lambdas[k] * means[k] for k in lambdas), **means}


class Validation:
    """What is asked on the way: the losses of rows that are not trained, and sentences to hear."""

    def __init__(self, cfg, trainee, data, place, log):
        self.cfg, self.trainee, self.place, self.log = cfg, trainee, place, log
        self.sets = {}
        for clip in data.val:
            name = run.short(clip.file, cfg.val_manifest)
            self.sets.setdefault(name, []).append(data.cache.load(clip.key))
        self.samples = samples_of(cfg, data, log)

    def run(self, step, steps, epoch):
        """The weighted loss, infinite without rows. All ranks."""
        total = math.inf
        with self.trainee.average.acting():
            if self.sets:
                total = self.losses(step, steps, epoch)
            if self.place.rank == 0 and self.samples.sentences:
                self.samples.try_to_speak(self.trainee.model, step)
        wait_for_all(for_rank_0=True)
        return total

    def losses(self, step, steps, epoch):
        began = time.perf_counter()
        model, lambdas = self.trainee.model, self.trainee.lambdas
        means = evaluate(self.cfg, model, self.sets, lambdas, self.place)
        self.log.numbers("val", step, means, epoch=epoch)
        total = means.pop("loss/total")
        parts = parts_of({k: v for k, v in means.items() if k.count("/") == 1})
        line = f"step {step}/{steps} | validation {total:.4f} ({parts})"
        if len(self.sets) > 1:
            line += " | " + ", ".join(f"{name} {means[f'{name}/loss/total']:.4f}" for name in self.sets)
        self.log.say(f"{line} | {time.perf_counter() - began:.1f} s")
        return total


# ------------------------------------------------------------------------------------ before the first step


def pass_gate(cfg, trainee, data, place, log):
    """Compare the base with two controls, and say or refuse what does not look right. All ranks.

    Rank 0 looks alone, for it is a few rows only; all of them must know whether the run ends here.
    """
    if cfg.gate == "off" or cfg.from_scratch:  # drawn weights know nothing of texts
        return
    wrong = []
    if place.rank == 0:
        log.say("gate: losses of the first rows, beside those of shuffled texts and of a constant answer ...")
        found = gate.look(trainee.model, data.train, data.cache, trainee.lambdas, place.device)
        log.say(found.line)
        if found.note:
            log.say(found.note)
        wrong = found.wrong
    # A sum over ranks, although only one has looked: else the others would go on without it.
    refused = all_sum({"wrong": len(wrong)}, place.device)["wrong"] and cfg.gate == "stop"
    for text in wrong:
        log.say(text, "error" if refused else "warning")
    if refused:
        raise Invalid("the gate was told to stop such a run; with --gate off, or --gate warn, it trains")
    if wrong:
        log.say("gate: training all the same; --gate stop would have ended here, --gate off does not look. "
                "If you know why (a language that is new to the base, say), go on.", "warning")


def rehearse(cfg, trainee, data, schedule, log):
    """--dry_run: train on the longest micro-batch and say what the run will take. -> exit code. All ranks.

    The weights that move here are thrown away: nothing is written.
    """
    model, masters, optimizer, lambdas, _ = trainee
    clips = data.train
    batches = micro_batches([clip.length for clip in clips], cfg, 0, data.pools)
    sizes = [size_of(batch, clips) for batch in batches]
    longest = batches[sizes.index(max(sizes))]
    examples = [data.cache.load(clips[i].key) for i in longest]
    # What a message about memory looks at.
    ready = StepData([], [MicroBatch(0, longest, {}, {})], 0, 0, 0.0)
    model.train()
    try:
        # The first time also makes what all later ones find: kernels, compiled code, the optimizer's state.
        for _ in range(2):
            began = time.perf_counter()
            batch, counts = model.collate(examples, longest)
            out = model(to_device(batch, model.device))
            loss = sum(lambdas[k] * out[k] / max(counts[k], 1) for k in lambdas)
            masters.backward(loss)
            masters.reduce()
            optimizer.step()
            masters.publish()
            optimizer.zero_grad(set_to_none=True)
            value = loss.item()  # waits for the device
            seconds = time.perf_counter() - began
    except torch.OutOfMemoryError as e:
        raise Invalid(f"out of memory at step 1: {why(cfg, model, data, ready, e)}") from None
    # All steps together take about what their positions do; the longest one is what memory has to hold.
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    each = seconds * schedule.per_step / ranks
    mean = each * sum(sizes) / len(sizes) / max(sizes)
    left = timedelta(seconds=round(mean * schedule.steps))
    log.say(f"dry run: the longest micro-batch has {len(longest)} clips and {max(sizes)} positions, loss "
            f"{value:.4f}; peak memory {run.memory_line(model.device)}")
    use = memory.use(memory.on_meta(model), examples, memory.plan_of(cfg, len(longest)))
    log.say(f"dry run: by arithmetic a step on it takes {use}; CUDA, scratch and the codec come on top")
    log.say(f"dry run: a step takes {each:.2f} s at most and some {mean:.2f} s in the mean, the "
            f"{schedule.steps} steps {left} beside validation, samples and saving. Nothing was written.")
    if math.isfinite(value):
        return 0
    log.say("dry run: the loss is not finite. Look at those clips; try --dtype float32", "error")
    return 1


# ------------------------------------------------------------------------------------------------ messages


def announce(cfg, trainee, place, schedule, log):
    """What is going to happen, before it does: where, what is trained, for how long."""
    model, masters, *_ = trainee
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in masters.named.values())
    dtype = str(models.pick_dtype(cfg.dtype, place.device)).removeprefix("torch.")
    ranks = f"{place.world} rank{'s' * (place.world > 1)}"
    log.say(f"{model.backbone} on {place.device} in {dtype}, {ranks}: {trained:,} of {total:,} parameters "
            f"trained ({100 * trained / total:.2f} %)")
    if cfg.lora:
        stacks = {}  # base_lm.layers -> how many of its layers have an adapter
        layers = list(lora.lora_modules(model))
        for name in layers:
            stack = re.split(r"\.\d+\.", name)[0]
            stacks[stack] = stacks.get(stack, 0) + 1
        counted = ", ".join(f"{n} in {stack}" for stack, n in stacks.items())
        log.say(f"LoRA: r {cfg.lora.r}, alpha {cfg.lora.alpha:g}, scale {cfg.lora.scale:g}, "
                f"{len(layers)} modules: {counted}")
    announce_length(cfg, place, schedule, log)
    log.say("trained: " + ", ".join(masters.named), "debug")


def announce_length(cfg, place, schedule, log):
    """For how long, and what is odd about it."""
    steps, span, warmup, per_step, per_epoch, *_ = schedule
    log.say(f"{steps} steps of {per_step} micro-batches ({per_step // place.world} per rank), {per_epoch} "
            f"micro-batches and {per_epoch / per_step:.1f} steps per epoch, "
            f"{schedule.epochs:.1f} epochs in all")
    told = f"epochs {cfg.epochs:g} means" if cfg.epochs else "no length is set; for this much data it is"
    falls = cfg.schedule != "constant"
    if cfg.epochs or not (cfg.num_iters or cfg.max_steps):
        end = "the learning rate reaches zero at the last" if falls else "then the learning rate is constant"
        log.say(f"{told} {steps} steps, {warmup} of them warm-up; {end}")
    log.say(f"validation every {schedule.validate_every} steps, checkpoint every {schedule.save_every}; "
            "0 is only at the end")
    if schedule.epochs > MANY_EPOCHS:
        log.say(f"each clip comes {schedule.epochs:.0f} times, more than {MANY_EPOCHS}: a model then often "
                "knows the clips by heart and reads other texts worse. Compare early checkpoints with late "
                f"ones, or say --epochs {USUAL_EPOCHS}.", "warning")
    if warmup >= steps:
        most = learning_rate(cfg, steps - 1, span, warmup)
        log.say(f"the warm-up of {warmup} steps is no shorter than the run: the learning rate reaches "
                f"{most:.3g} of {cfg.learning_rate:g}. Say --warmup_steps {steps // 10}.", "warning")
    if span != steps and falls:
        log.say(f"the learning rate reaches zero at step {span} (max_steps), the run ends at step {steps} "
                "(num_iters)", "warning")


def parts_of(means):
    """{"loss/diff": 0.5} -> diff 0.5000"""
    return ", ".join(f"{name.split('/', 1)[1]} {mean:.4f}" for name, mean in means.items())


def skipped(step, loss, norm, names):
    """That nothing was learned in a step, and whose fault it may be."""
    return f"step {step}: loss {loss}, gradient norm {norm}: update skipped; rows {names}"


def why(cfg, model, data, ready, error):
    """Which clips were too much at once, and which settings would have been enough."""
    clips = data.train
    number = max(numbers_of(ready.micro), key=lambda i: clips[i].length)
    longest = clips[number]
    sizes = [len(micro.clips) for micro in ready.micro]
    cause = str(error).splitlines()[0]
    name, length = longest.row["id"], longest.length
    batches = [micro.clips for micro in ready.micro]
    largest = max(batches, key=lambda batch: size_of(batch, clips))
    return (f"micro-batches of {sizes} clips, the longest {name} with {length} positions. "
            f"{memory.advice(cfg, model, examples_of(data, largest))} Or set a smaller batch_size or "
            "batch_tokens (and a larger grad_accum_steps), --checkpointing, or a smaller max_length. "
            f"Checkpoints are untouched. ({cause})")


def examples_of(data, batch):
    """Of clips by number, the longest first."""
    numbers = sorted(batch, key=lambda i: data.train[i].length, reverse=True)
    return [data.cache.load(data.train[i].key) for i in numbers]


def size_of(batch, clips):
    """Positions of a micro-batch, with padding."""
    return len(batch) * max(clips[i].length for i in batch)


def say_what_next(cfg, log):
    """How to hear, and how to choose."""
    # Whole commands, quoted, that can be copied: most people look for them right here.
    root = Path(cfg.save_path)
    samples = root / "samples" / "listen.html"
    if samples.is_file():
        log.say(f"listen: {samples}")
    kind = "--lora" if cfg.lora and cfg.save_mode != "full" else "--ckpt_dir"
    newest = shlex.quote(str(root / "latest"))
    log.say(f'speak:  python infer.py {kind} {newest} --text "Hello." --output hello.wav')
    steps = f"{shlex.quote(str(root))}/step_*"
    if kind == "--ckpt_dir":
        steps = f"{shlex.quote(cfg.pretrained_path)} {steps}"  # the base comes first
    rows = shlex.join(cfg.val_manifest or paths_of(cfg)[:1])
    report = shlex.quote(str(root / "report"))
    log.say(f"choose: python validate.py {kind} {steps} --manifest {rows} --output_dir {report}")


def asked_to_stop(cfg, step):
    """How to go on after a signal."""
    same = "the same command without --overwrite" if cfg.overwrite else "the same command"
    return f"asked to stop: saved step {step}; {same} goes on from here"


def out_of_patience(cfg, progress):
    """Why a run ended before its last step."""
    lowest = progress.lowest
    return (f"patience: {progress.stale} validations in a row were not below the {lowest.loss:.4f} of step "
            f"{lowest.step}, so the run ends at step {progress.step}; with another --patience it goes on")


def no_good_step(step):
    """Why a run ends although nothing failed."""
    return (f"three steps in a row gave no finite loss and gradient; stopped at step {step} with the last "
            "good weights saved. Look at the rows named above, lower learning_rate, or set max_grad_norm.")


# ------------------------------------------------------------------------------------------------ the run


@told_once
def main():
    cfg, notes = parse_settings()
    check_settings(cfg)
    signal.signal(signal.SIGTERM, leave)  # until there is a step to finish
    if cfg.sweep:
        return search(cfg)

    # -------------------------------------------------------------------------------------------- distributed
    # torchrun sets RANK; without it the same lines run with one rank. What the first attempt has saved must
    # not be moved aside by the second.
    place = device, rank, world = join_ranks(cfg.device)
    cfg.overwrite = cfg.overwrite and attempt() == "0"
    log = run.Log("debug" if cfg.debug else cfg.log_level, rank)
    for note in notes:
        log.say(note)

    # One run per folder; and whether it can be written is known before anything slow begins.
    wrong = run.claim(cfg.save_path) if rank == 0 else None
    if wrong:
        raise Usage(wrong)
    wait_for_all()

    # ------------------------------------------------------------------------------------ checkpoint and LoRA
    # What goes on must be the same run: settings are compared as they act, with all defaults filled in.
    backbone = models.find(cfg.pretrained_path)
    options, lambdas = resolve(cfg, backbone)
    settings = binding(cfg, options, lambdas)
    defaults = binding(Train(lora=LoRAConfig()), dataclasses.asdict(backbone.Training()), backbone.LAMBDAS)
    past = find_run(cfg, settings, defaults, place, log)

    # To this script LoRA is a model with fewer trained parameters. Below here only files differ.
    began = time.perf_counter()
    model = load_model(cfg, past, options, device, models.pick_dtype(cfg.dtype, device))
    log.say(f"loaded {cfg.pretrained_path} in {time.perf_counter() - began:.1f} s")
    trainee = _, masters, optimizer, _, average = prepare(cfg, model, lambdas, log)

    # -------------------------------------------------------------------------------------------- data
    # Speakers are numbered as they come; who had a number when the run began keeps it.
    speakers = dict(past.speakers) if past else {}
    data = load_clips(cfg, model, speakers, place, log)
    warn_of_speakers(model, log)
    clips, lengths = data.train, [clip.length for clip in data.train]
    validation = Validation(cfg, trainee, data, place, log)

    # -------------------------------------------------------------------------------------------- resume
    # What each checkpoint will say of the run. Where it goes on, the counters are those of the last one.
    progress = run.Progress(
        micro_per_step=cfg.grad_accum_steps * world,
        settings=settings,
        speakers=speakers,
        resumed_from=str(Path(cfg.resume_from).resolve()) if cfg.resume_from else "",
        data=seed_from([(clip.row["id"], clip.length) for clip in clips], *data.pools),
        base=model.fingerprint if cfg.lora else None,
    )
    if past:
        progress = resume(cfg, past, trainee, progress, log)
    order = order_from(progress, lengths, cfg, data.pools)
    schedule = schedule_of(cfg, progress, len(micro_batches(lengths, cfg, 0, data.pools)))
    steps, span, warmup, per_step, *_ = schedule
    # What the settings say is not remembered: without it the run has the length of its data again.
    progress.steps = 0 if cfg.epochs or cfg.num_iters or cfg.max_steps else steps

    # What can be known of a run is said before it costs time, and before anything is written.
    announce(cfg, trainee, place, schedule, log)
    if progress.step == 0:
        pass_gate(cfg, trainee, data, place, log)
    if cfg.dry_run:
        return rehearse(cfg, trainee, data, schedule, log)

    # Nothing is wrong with the new run: now, and not before, an earlier one may be moved aside.
    if rank == 0:
        begin_folder(cfg, log)
    log.open(cfg.save_path, cfg.tensorboard, progress.step)

    # -------------------------------------------------------------------------------------------- loop
    def over():
        return progress.step >= steps or progress.is_out_of(cfg.patience)

    def save_now():
        # A full run copies codec and tokenizer from the folder it came from: that one stays until the end.
        held = past.step if past and not cfg.lora and not over() else None
        state = state_of(cfg, trainee) if rank == 0 or cfg.shard else {}
        if rank == 0:
            save(cfg, partial(write_files, cfg, trainee, progress, state), progress, log, held)
        wait_for_all(for_rank_0=True)

    # From here on a signal lets the step finish. What the run has to improve on is the validation at step 0.
    signals = run.catch_signals()
    model.train()
    passed = order.progress()  # epochs done
    if progress.step == 0:
        progress.judge(validation.run(0, steps, passed))
    bad, stop, clock = 0, 0, run.Clock()
    loader = Loader(cfg, model, data, place, order).steps(steps - progress.step, per_step)
    while not over():
        asked = time.perf_counter()
        ready = next(loader)
        waited = time.perf_counter() - asked

        # Losses are sums. Divided by the counts of the whole step, over all micro-batches and ranks, they
        # have a gradient that does not depend on how the clips were cut into batches.
        counts = {k: sum(micro.counts[k] for micro in ready.micro) for k in ready.micro[0].counts}
        counts = all_sum(counts, device)
        weight = {k: lambdas[k] / max(counts[k], 1) for k in lambdas}
        rate = learning_rate(cfg, progress.step, span, warmup)
        set_rate(optimizer, rate)
        outs = []
        try:
            for micro in ready.micro:
                # Dropout is all that still draws; everything else is in the batch.
                torch.manual_seed(seed_from(cfg.seed, "dropout", progress.step, micro.number))
                out = model(to_device(micro.batch, device))
                masters.backward(sum(weight[k] * out[k] for k in weight))
                outs.append({k: v.detach().float() for k, v in out.items()})
        except torch.OutOfMemoryError as e:
            reason = why(cfg, model, data, ready, e)
            raise Invalid(f"out of memory at step {progress.step + 1}: {reason}") from None

        # Sums of all ranks from here on: the same update everywhere, so the weights stay the same everywhere.
        masters.reduce()
        norm = masters.norm().item()

        # The true means of this step, over all ranks. A signal to one counts for all, or they would part.
        sums = {k: torch.stack([out[k] for out in outs]) for k in outs[0]}
        totals = {k: v.sum().item() for k, v in sums.items()}
        totals = all_sum({**totals, "signals": len(signals)}, device)
        stop = totals.pop("signals")
        means = {k: v / max(counts[k], 1) for k, v in totals.items()}
        loss = sum(lambdas[k] * means[k] for k in lambdas)

        # One bad clip must not spoil the weights. Norm and loss are those of all ranks, so all decide alike.
        if math.isfinite(norm) and math.isfinite(loss):
            cut(masters.parameters, norm, cfg.max_grad_norm)
            optimizer.step()
            masters.publish()
            average.update(progress.step + 1)
            bad = 0
        else:
            bad += 1
            progress.skipped += 1
            names = ", ".join(clips[i].row["id"] for i in numbers_of(suspects(ready, sums, device)))
            log.say(skipped(progress.step + 1, loss, norm, names), "error")
        optimizer.zero_grad(set_to_none=True)

        # `order` is ahead by what the threads already load; the step knows where the rows stand after it.
        progress.step += 1
        progress.epoch, progress.position = ready.epoch, ready.position
        step, before, passed = progress.step, passed, ready.progress

        if cfg.compile and not clock.steps:
            log.say(f"step {step}: {time.perf_counter() - asked:.1f} s, compiling included")
        # metrics.jsonl has every step, the log one in so many.
        rows = [[clips[i].row["id"] for i in slot.clips] for slot in ready.slots]
        values = {"loss/total": loss, **means, "lr": rate, "grad_norm": norm, "epoch": passed}
        log.say(f"step {step}: loss {loss:.6f}, {rows}, {waited:.3f} s for the data", "debug")
        log.numbers("train", step, values, rows=sum(rows, []))
        clock.count(sum(clips[i].seconds for i in numbers_of(ready.slots)), waited)
        if due(cfg.log_interval, step) or step == steps:
            parts = parts_of({k: v for k, v in means.items() if k in lambdas})
            log.say(f"step {step}/{steps} | loss {loss:.4f} ({parts}) | lr {rate:.2e} | grad {norm:.3f} | "
                    f"epoch {passed:.2f} | {clock.line(steps - step)}")

        # All that decides on validating, saving and stopping. In a hurry the checkpoint comes first: who
        # asked to stop may not have the time for a validation. Best is only what was saved.
        broken, last = bad == BAD_STEPS, step == steps
        hurry = bool(stop) or broken
        saving = hurry or last or due(schedule.save_every, step)
        saving = saving or epochs_due(cfg.save_epochs, before, passed)
        validating = not broken and (last or due(schedule.validate_every, step))
        with clock.paused():
            if hurry:
                save_now()
            total = validation.run(step, steps, passed) if validating else math.inf
            if validating and due(schedule.validate_every, step):
                progress.judge(total)
                saving = saving or over()
            better = saving and total < progress.best.loss
            if better:
                progress.best = run.Best(total, step)
            if saving and (validating or not hurry):
                save_now()
        if broken:
            raise Invalid(no_good_step(step))
        if stop:
            log.say(asked_to_stop(cfg, step), "warning")
            break

    # -------------------------------------------------------------------------------------------- end
    peak = run.peak_memory(device) / 2**30
    if progress.step < steps and progress.is_out_of(cfg.patience):
        log.say(out_of_patience(cfg, progress))
    log.say(f"done: {progress.step} steps, {progress.skipped} skipped, peak memory {peak:.2f} GiB")
    if rank == 0 and not stop:
        say_what_next(cfg, log)
    log.close()
    others.part()
    if signals or stop:
        sys.exit(128 + (signals[0] if signals else signal.SIGTERM))


if __name__ == "__main__":
    configs.run(main)
