"""Fine-tune a text-to-speech checkpoint on rows with audio and text: LoRA with a `lora:` section, every weight without one.

    python train.py configs/x.yaml --learning_rate 5e-5 --lora.r 16
    torchrun --nproc_per_node 4 train.py configs/x.yaml

The same run anywhere: the order of rows is a function of seed and epoch, every draw is a function of seed, epoch and row,
and losses are sums divided by the counts of the whole step, so neither padding, nor the number of micro-batches or ranks,
nor a restart changes what is computed. Interrupted runs go on from save_path by themselves.
"""
import contextlib
import dataclasses
import json
import math
import os
import random
import re
import resource
import shlex
import signal
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import torch
import torch.distributed as dist

import configs
import lora
import models
from configs import Usage, opt
from lora import LoRAConfig
from models.parts import Invalid, audio, checkpoint
from models.parts.manifests import holders
from prepare_data import ClipCache, read_manifest

# ------------------------------------------------------------------------------------------------ settings


@dataclass
class Train:
    """Fine-tune a text-to-speech checkpoint: LoRA with a lora section in the YAML, every weight without one."""

    config: str = opt("", "YAML file of settings; flags win over it", config=True)
    pretrained_path: str = opt("", "folder of the published checkpoint, or org/name in the local hub cache")
    train_manifest: list[str] = opt([], "JSONL of rows to train on; a list of files is one data set")
    val_manifest: list[str] = opt([], "JSONL of rows to validate on; empty means no validation")
    save_path: str = opt("", "run folder: checkpoints, logs, the resolved settings")
    tensorboard: str = opt("", "folder of the TensorBoard log; empty means logs/ in the run folder")
    cache_dir: str = opt("", "folder of encoded clips; empty means cache/ beside the first manifest")
    sample_rate: int = opt(0, "rate the codec reads; 0 takes the checkpoint's, anything else must equal it")
    out_sample_rate: int = opt(0, "rate the codec writes; 0 takes the checkpoint's, anything else must equal it")

    batch_size: int = opt(1, "clips per micro-batch and rank")
    batch_tokens: int = opt(0, "positions per micro-batch, padding included, instead of batch_size clips; 0 is off")
    max_batch_tokens: int = opt(0, "drop clips longer than this divided by batch_size positions; 0 keeps all")
    max_length: int = opt(0, "drop clips longer than this many positions; 0 takes the checkpoint's limit")
    grad_accum_steps: int = opt(1, "micro-batches per step and rank")
    num_workers: int = opt(2, "threads that collate ahead of the step; 0 collates in line")

    num_iters: int = opt(0, "optimizer steps; 0 takes epochs, else max_steps, else 2000")
    max_steps: int = opt(0, "steps over which the learning rate falls to zero; 0 means num_iters")
    epochs: float = opt(0.0, "length in passes over the data instead of num_iters; 0 is off")
    log_interval: int = opt(10, "steps between lines in the log")
    valid_interval: int = opt(1000, "steps between validations; 0 only at the end")
    save_interval: int = opt(1000, "steps between checkpoints; 0 only at the end")
    save_epochs: float = opt(0.0, "passes over the data between checkpoints, beside save_interval; 0 is off")
    keep_last: int = opt(0, "newest checkpoints to keep; 0 keeps all")
    keep_every: int = opt(0, "with keep_last: also keep every checkpoint whose step this divides")
    keep_best: bool = opt(True, "with keep_last: also keep the one with the lowest validation loss")
    save_mode: str = opt("lora", "what a LoRA run saves: the adapter, the merged model, or both", choices=("lora", "full", "both"))

    learning_rate: float = opt(1e-4, "peak, reached after warmup_steps")
    weight_decay: float = opt(0.01, "on every trained tensor")
    warmup_steps: int = opt(100, "steps over which the learning rate rises from zero")
    warmup_ratio: float = opt(0.0, "warm-up as a share of the schedule instead of warmup_steps; 0 is off")
    max_grad_norm: float = opt(0.0, "longer gradients are scaled down to this norm; 0 never")
    optimizer: str = opt("adamw", "adamw, adam or sgd", choices=("adamw", "adam", "sgd"))
    lambdas: dict[str, float] = opt({}, "weight of each loss; one that is not listed keeps the backbone's")
    seed: int = opt(42, "of the order of rows and of every draw")

    device: str = opt("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = opt("auto", "of the weights: auto is bfloat16 on CUDA and float32 elsewhere",
                     choices=("auto", "float32", "bfloat16"))
    compile: bool = opt(False, "torch.compile every layer: faster steps after a slow start")
    checkpointing: bool = opt(False, "recompute activations in backward: less memory, slower steps")
    resume_from: str = opt("", "step folder to go on from; empty means the newest complete one in save_path")
    overwrite: bool = opt(False, "start anew; what save_path holds is moved aside, not deleted")
    ignore_base: bool = opt(False, "resume an adapter although it was trained on another base")
    allow_unused_tensors: bool = opt(False, "load a checkpoint although some of its tensors have no place in the model")
    from_scratch: bool = opt(False, "draw the weights instead of loading them; config, tokenizer and codec come from pretrained_path")
    weights: str = opt("", "file to load where pretrained_path holds several")
    val_samples: int = opt(2, "validation texts to speak at each validation")
    hf_model_id: str = opt("", "hub id of the base, written into the adapter with distribute")
    distribute: bool = opt(False, "record hf_model_id as the base, so that the adapter can be shared")
    log_level: str = opt("info", "debug, info, warning, error or critical", choices=("debug", "info", "warning", "error", "critical"))
    debug: bool = opt(False, "the same as log_level debug")

    backbone: dict = opt({}, "options of the backbone's own, see Training in its file")
    lora: LoRAConfig | None = opt(None, "adapters, see lora.py; without this section every weight is trained")


# Settings that may change when a run goes on: lengths, intervals, places and speed, nothing that changes the numbers.
FREE = {"config", "num_iters", "max_steps", "epochs", "log_interval", "valid_interval", "save_interval", "save_epochs", "keep_last",
        "keep_every", "keep_best", "save_path", "tensorboard", "cache_dir", "num_workers", "device", "compile", "checkpointing",
        "resume_from", "overwrite", "ignore_base", "val_samples", "log_level", "debug", "val_manifest", "train_manifest", "pretrained_path"}
HELD = []  # the lock of the run folder
LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}


def check_settings(cfg):
    for key in ("pretrained_path", "train_manifest", "save_path"):
        if not getattr(cfg, key):
            raise Usage(f"{key} is not set; give it in the YAML or as --{key}")
    at_least = dict(batch_size=1, grad_accum_steps=1, log_interval=1, batch_tokens=0, max_batch_tokens=0, max_length=0, num_workers=0,
                    num_iters=0, max_steps=0, epochs=0, valid_interval=0, save_interval=0, save_epochs=0, keep_last=0, keep_every=0,
                    warmup_steps=0, warmup_ratio=0, max_grad_norm=0, weight_decay=0, learning_rate=0, val_samples=0)
    wrong = [f"{k} is {getattr(cfg, k)}, expected at least {least}" for k, least in at_least.items() if getattr(cfg, k) < least]
    if cfg.distribute and not cfg.hf_model_id:
        wrong.append("distribute needs hf_model_id, the hub id that the adapter should name as its base")
    needed = [cfg.pretrained_path, *cfg.train_manifest, *cfg.val_manifest, cfg.cache_dir]
    inside = [p for p in needed if p and Path(cfg.save_path).resolve() in (q := Path(p).resolve(), *q.parents)]
    if cfg.overwrite and inside and Path(cfg.save_path).is_dir():
        wrong.append(f"overwrite would move {inside[0]} away, since it lies in save_path {cfg.save_path}")
    if cfg.overwrite and cfg.resume_from:
        wrong.append("overwrite starts anew and resume_from goes on; choose one")
    if cfg.save_mode != "lora" and not cfg.lora:
        wrong.append(f"save_mode {cfg.save_mode} is for LoRA runs; a full run always saves the whole model")
    if wrong:
        raise Usage("; ".join(wrong))


def learning_rate(cfg, s, span, warmup):
    """Rate of the update after s completed ones: linear up, cosine down to zero at `span`, zero from there on."""
    if s < warmup:
        return cfg.learning_rate * s / warmup
    if s >= span:
        return 0.0
    return cfg.learning_rate * 0.5 * (1 + math.cos(math.pi * (s - warmup) / (span - warmup)))


def seed_from(*numbers) -> int:
    """A seed from numbers and texts, the same on every machine."""
    return zlib.crc32(repr(numbers).encode()) & 0x7FFFFFFF


# ------------------------------------------------------------------------------------------------ data


def micro_batches(lengths, cfg, epoch) -> list[list[int]]:
    """The rows of one pass, cut into micro-batches of clips of like length, in an order that depends on seed and epoch only."""
    draw = random.Random(seed_from(cfg.seed, "order", epoch))
    order = list(range(len(lengths)))
    draw.shuffle(order)
    group = 50 * cfg.batch_size if not cfg.batch_tokens else 512
    batches = []
    for start in range(0, len(order), group):
        near = sorted(order[start : start + group], key=lambda i: lengths[i])
        batch = []
        for i in near:
            full = (len(batch) + 1) * lengths[i] > cfg.batch_tokens if cfg.batch_tokens else len(batch) == cfg.batch_size
            if batch and full:
                batches.append(batch)
                batch = []
            batch.append(i)
        batches.append(batch)
    draw.shuffle(batches)
    return batches


class Order:
    """Walks through the micro-batches of all epochs; (epoch, position) is all there is to save."""

    def __init__(self, lengths, cfg, epoch=0, position=0):
        self.lengths, self.cfg, self.epoch, self.position = lengths, cfg, epoch, position
        self.batches = micro_batches(lengths, cfg, epoch)

    def take(self, n):
        """The next n micro-batches as (epoch, rows), across epoch borders."""
        out = []
        while len(out) < n:
            if self.position == len(self.batches):
                self.epoch, self.position = self.epoch + 1, 0
                self.batches = micro_batches(self.lengths, self.cfg, self.epoch)
            out.append((self.epoch, self.batches[self.position]))
            self.position += 1
        return out

    def progress(self):
        return self.epoch + self.position / len(self.batches)


def seconds_of(row):
    """Length of a row's audio: as prepare_data.py wrote it down, else by the headers of the files."""
    if row.get("duration"):
        return row["duration"]
    return sum((h["end"] if h.get("end") is not None else audio.info(h["audio"]).seconds) - (h.get("start") or 0)
               for h in holders(row) if isinstance(h.get("audio"), str))


def positions(row, model):
    """How many positions the audio of a row takes at least, by the headers; a conversation may lose turns, so nobody knows."""
    return 0 if row.get("turns") else math.floor(seconds_of({**row, "duration": None}) * model.frame_rate)


def seed_of(cfg, epoch, row):
    return seed_from(cfg.seed, "draw", epoch, row["id"])


# ------------------------------------------------------------------------------------------------ ranks and gradients


def all_sum(values: dict, device) -> dict:
    """Sums of numbers over all ranks. All ranks call it with the same keys."""
    if not dist.is_initialized():
        return values
    t = torch.tensor([float(v) for v in values.values()], dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
    dist.all_reduce(t)
    return dict(zip(values, t.tolist()))


def reduce_gradients(parameters, bucket=64 * 2**20):
    """Sum gradients over ranks, in flat float32 buckets of at most 256 MB; a missing gradient counts as zeros. All ranks."""
    if not dist.is_initialized():
        return
    waiting, size = [], 0
    for p in [*parameters, None]:
        if p is None or size + p.numel() > bucket:
            if waiting:
                flat = torch.cat([q.grad.flatten() for q in waiting])
                dist.all_reduce(flat)
                for q, g in zip(waiting, flat.split([q.numel() for q in waiting])):
                    q.grad = g.view_as(q)
            waiting, size = [], 0
        if p is not None:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            waiting, size = waiting + [p], size + p.numel()


class Masters:
    """What the optimizer steps on: the trained parameters, or float32 copies of those that are kept in bf16.

    Gradients of a bf16 parameter are added up in its copy as backward makes them, so accumulation is float32 too.
    """

    def __init__(self, named):
        self.named = named
        self.copies = {n: torch.nn.Parameter(p.detach().float()) for n, p in named.items() if p.dtype != torch.float32}
        self.parameters = [self.copies.get(n, p) for n, p in named.items()]
        for n, copy in self.copies.items():
            named[n].register_post_accumulate_grad_hook(lambda p, copy=copy: self._move(p, copy))

    @staticmethod
    def _move(p, copy):
        copy.grad = p.grad.float() if copy.grad is None else copy.grad.add_(p.grad)
        p.grad = None

    @torch.no_grad()
    def publish(self):
        for n, copy in self.copies.items():
            self.named[n].copy_(copy)


def gradient_norm(parameters):
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm([p.grad for p in parameters if p.grad is not None])))


# ------------------------------------------------------------------------------------------------ files


def step_of(line):
    """The step of a line of metrics.jsonl; -1 where it was cut off or damaged."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return -1


class Log:
    """Lines to stderr and train.log, numbers to metrics.jsonl and TensorBoard. Does nothing on other ranks than 0."""

    def __init__(self, cfg, rank):
        self.rank, self.level, self.file, self.metrics, self.writer = rank, LEVELS["debug" if cfg.debug else cfg.log_level], None, None, None
        self.early, self.full = [], False

    def open(self, cfg, step):
        """After the run folder is known. Numbers of steps that will be made again are taken out first."""
        if self.rank:
            return
        from_here = Path(cfg.save_path)
        metrics = from_here / "metrics.jsonl"
        if metrics.exists():  # without a checkpoint everything is made again, the validation at step 0 too
            kept = [line for line in metrics.read_text(errors="replace").splitlines() if step and 0 <= step_of(line) <= step]
            tmp = metrics.with_suffix(".tmp")
            tmp.write_text("".join(line + "\n" for line in kept))
            os.replace(tmp, metrics)
        self.file, self.metrics = open(from_here / "train.log", "a", encoding="utf-8"), open(metrics, "a")
        from torch.utils.tensorboard import SummaryWriter  # here, since importing it takes longer than all the rest

        self.writer = SummaryWriter(cfg.tensorboard or str(from_here / "logs"), purge_step=step + 1 if step else 0)
        for line in self.early:
            self.file.write(line)

    def put(self, file, line):
        """A full disk is told once; the checkpoints will say what it means."""
        try:
            file.write(line)
            file.flush()
        except OSError as e:
            if not self.full:
                self.full = True
                self.say(f"{file.name} cannot be written ({e.strerror}); going on without", "warning")

    def say(self, text, level="info"):
        if self.rank or LEVELS[level] < self.level:
            return
        with contextlib.suppress(OSError):  # nobody is listening any more: no reason to stop
            print(text, file=sys.stderr, flush=True)
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {level} {text}\n"
        if self.file:
            self.put(self.file, line)
        else:
            self.early.append(line)

    def numbers(self, split, step, values, **more):
        if self.rank:
            return
        known = {k: v if math.isfinite(v) else None for k, v in values.items()}  # JSON has no NaN
        self.put(self.metrics, json.dumps({"step": step, "split": split, **more, **known}) + "\n")
        with contextlib.suppress(OSError):
            for name, value in values.items():
                self.writer.add_scalar(f"{split}/{name}", value, step)


def picked(cfg):
    """The settings that must be the same for a run to go on."""
    out = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in FREE}
    return json.loads(json.dumps(out))


def hold(root):
    """Keep other runs out of a folder as long as this process lives, where the system can."""
    try:
        Path(root).mkdir(parents=True, exist_ok=True)
        HELD.append(open(Path(root) / ".lock", "w"))
        fcntl.flock(HELD[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Usage(f"another train.py is writing into {root}; wait for it or choose another save_path") from None
    except (AttributeError, OSError):  # not on this system, not on this file system, or nothing can be written, of which more is said later
        pass


def run_folder(cfg, rank, log):
    """Make or recognize save_path. Returns the step folder to go on from, or None. All ranks come to the same answer."""
    root = Path(cfg.save_path)
    if rank == 0:
        try:
            root.mkdir(parents=True, exist_ok=True)
            (root / ".write").write_text("")
            (root / ".write").unlink()
            for torn in root.glob("step_*.tmp"):  # of a save that was killed
                checkpoint.remove(torn)
        except OSError as e:
            raise Usage(f"save_path {root} cannot be written: {e.strerror}") from None
    if dist.is_initialized():
        dist.barrier()
    if cfg.overwrite:
        return None
    if cfg.resume_from:
        wrong = checkpoint.check_step(cfg.resume_from)
        if wrong:
            raise Usage(f"resume_from: {wrong}. To start from its weights alone, give it as pretrained_path (full) or merge it (LoRA).")
        found, own = Path(cfg.resume_from), checkpoint.newest_step(root, lambda text: None)
        if own and checkpoint.read_json(own / checkpoint.INDEX).get("resumed_from") == str(found.resolve()):
            found = own  # the same command once more: what it made since then counts
    else:
        found = checkpoint.newest_step(root, lambda text: log.say(text, "warning"))
        if found is None and (damaged := checkpoint.steps(root)):
            raise Invalid(f"none of the {len(damaged)} checkpoints in {root} is complete; --overwrite starts anew and keeps them aside")
    if found is not None:
        index = checkpoint.read_json(found / checkpoint.INDEX)
        there, here = index["settings"], picked(cfg)
        usual = picked(Train())  # a setting that is newer than the run had its default
        there = {**usual, **there}
        differ = [f"{k}: {there.get(k)!r} there, {here.get(k)!r} here" for k in sorted(there | here) if there.get(k) != here.get(k)]
        if differ:
            raise Usage(f"{found} was made with other settings, so going on would mix two runs:\n  " + "\n  ".join(differ)
                        + "\nChoose another save_path, or --overwrite to move that run aside.")
        if dist.is_initialized():
            dist.barrier()  # every rank has looked
        later = [p for p in checkpoint.steps(root) if int(p.name[5:]) > index["step"]] if rank == 0 else []
        for path in later:  # damaged, or about to be made again: left in place it would pass for the newest
            log.say(f"moved {path}, which lies after step {index['step']}, to {checkpoint.put_aside(path)}", "warning")
        if rank == 0 and found.resolve().parent == root.resolve() and (root / "latest").resolve() != found.resolve():
            checkpoint.point(root, found.resolve().name)  # the run was killed before it could, or what it named was moved
    return found


def save(cfg, model, masters, optimizer, names, state, log, speakers, held=None):
    """Write step_N with weights or adapter, optimizer, schedule and the index of them all; delete what need not be kept
    except step `held`. Rank 0 only."""
    def write(folder):
        record = {"base": cfg.hf_model_id if cfg.distribute else str(cfg.pretrained_path), "speakers": speakers}
        exact = not masters.copies and not (cfg.lora and cfg.lora.bias)  # PEFT's file holds a bias over the scale
        if cfg.lora and cfg.save_mode != "full":
            lora.save_lora_weights(model, folder, **record)
        elif cfg.lora:
            exact = False
        if not cfg.lora or cfg.save_mode != "lora":
            model.save(folder, merged=bool(cfg.lora))
        values = {} if exact else {n: p.detach().cpu() for n, p in zip(names, masters.parameters)}
        torch.save({"optimizer": optimizer.state_dict(), "values": values}, folder / "optimizer.pth")
        torch.save({"last_step": state["step"]}, folder / "scheduler.pth")

    started = time.perf_counter()
    folder = checkpoint.write_step(cfg.save_path, state["step"], write, state)
    log.say(f"saved {folder}: {checkpoint.megabytes(folder):.1f} MB in {time.perf_counter() - started:.1f} s")
    stay = [state["best"][1]] if cfg.keep_best else []
    checkpoint.prune(cfg.save_path, cfg.keep_last, cfg.keep_every, [*stay, held], log.say)


def restore(cfg, folder, model, masters, optimizer, names):
    """Bring trained values and optimizer state back from a step folder. Every rank reads it."""
    saved = torch.load(folder / "optimizer.pth", map_location="cpu", weights_only=True)
    if saved["values"]:
        if list(saved["values"]) != names:
            raise Invalid(f"{folder / 'optimizer.pth'} holds other trained parameters than this run has")
        for n, p in zip(names, masters.parameters):
            p.data.copy_(saved["values"][n])
        masters.publish()
    elif cfg.lora:
        lora.restore_lora_weights(model, folder, cfg.ignore_base)
    optimizer.load_state_dict(saved["optimizer"])


# ------------------------------------------------------------------------------------------------ validation


@torch.no_grad()
def evaluate(cfg, model, examples, lambdas, device, rank, world):
    """Means over the whole validation set, with fixed draws and nothing dropped; total weighs the losses. All ranks."""
    model.eval()
    order = sorted(range(len(examples)), key=lambda i: model.length(examples[i]))
    batches = [order[i : i + cfg.batch_size] for i in range(0, len(order), cfg.batch_size)]
    sums, counts = {}, {}
    for rows in batches[rank::world]:
        batch, n = model.collate([examples[i] for i in rows])
        for k, v in model(to_device(batch, device)).items():
            sums[k], counts[k] = sums.get(k, 0.0) + v.item(), counts.get(k, 0) + n[k]
    known = model.counts(model.collate([examples[0]])[0])  # a rank without a batch still takes part in the sum
    sums = all_sum({k: sums.get(k, 0.0) for k in known}, device)
    counts = all_sum({k: counts.get(k, 0) for k in known}, device)
    means = {k: sums[k] / max(counts[k], 1) for k in sums}
    model.train()
    return {"loss/total": sum(lambdas[k] * means[k] for k in lambdas), **means}


@torch.no_grad()
def speak(cfg, model, rows, step, log):
    """The first validation texts as wav files and in TensorBoard, with the recording beside; of a conversation the text of
    its last spoken turn. Rank 0 only."""
    model.eval()
    spoken = [next((t for t in reversed(row.get("turns", [row])) if t.get("audio")), row) for row in rows]
    for i, row in enumerate([row for row in spoken if row.get("text")][: cfg.val_samples]):
        chunks = list(model.generate(row["text"], **model.sample_request(row), seed=cfg.seed))
        wave = torch.cat(chunks) if chunks else torch.zeros(1)
        path = Path(cfg.save_path) / "samples" / f"step_{step:07d}_{i}.wav"
        path.parent.mkdir(exist_ok=True)
        audio.write(path, wave, model.out_sample_rate)
        log.writer.add_audio(f"val_sample_{i}/generated_audio", wave[None], step, model.out_sample_rate)
        log.writer.add_image(f"val_sample_{i}/mel_spectrogram", audio.mel_picture(wave, model.out_sample_rate), step, dataformats="CHW")
        if step == 0 and isinstance(row["audio"], str):
            recording, rate = audio.read(row["audio"], None, row.get("start"), row.get("end"))
            log.writer.add_audio(f"val_sample_{i}/reference_audio", recording[None], step, rate)


def to_device(batch, device):
    pin = device.type == "cuda"
    return {k: (v.pin_memory() if pin else v).to(device, non_blocking=pin) if torch.is_tensor(v) else v for k, v in batch.items()}


# ------------------------------------------------------------------------------------------------ the run


def pick_rows(cfg, rows, lengths, limit, log):
    """Numbers of the rows that fit `limit` positions and the budgets; what is dropped is said by reason."""
    budget = cfg.max_batch_tokens // cfg.batch_size if cfg.max_batch_tokens else 0
    kept, dropped = [], {}
    for i, n in enumerate(lengths):
        why = "with nothing that is trained in them" if not n else \
            f"longer than {limit} positions (max_length)" if n > limit else \
            f"longer than {budget} positions (max_batch_tokens / batch_size)" if budget and n > budget else \
            f"longer than {cfg.batch_tokens} positions (batch_tokens)" if cfg.batch_tokens and n > cfg.batch_tokens else None
        if why:
            dropped.setdefault(why, []).append(i)
        else:
            kept.append(i)
    hours = [sum(seconds_of(rows[i]) for i in part) / 3600 for part in (kept, sum(dropped.values(), []))]
    log.say(f"data: {len(kept)} clips, {hours[0]:.2f} h; dropped {len(rows) - len(kept)} clips, {hours[1]:.2f} h")
    for why, part in dropped.items():
        log.say(f"  {len(part)} {why}: {', '.join(rows[i]['id'] for i in part[:5])}{' ...' if len(part) > 5 else ''}", "warning")
    if not kept:
        raise Invalid(f"no clip is left to train on of {len(rows)}: {'; '.join(f'{len(part)} {why}' for why, part in dropped.items())}. "
                      "Raise max_batch_tokens, batch_tokens or max_length, or train more of the rows.")
    return kept


def main():
    cfg = configs.parse(Train)
    check_settings(cfg)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # at once, until there is a step to finish

    # ------------------------------------------------------------------------------------------------ distributed
    rank, world, local_rank = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = models.pick_device(cfg.device, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun restarts all ranks when one died
    if "RANK" in os.environ:
        limit = timedelta(minutes=30)
        store, *_ = next(dist.rendezvous("env://", timeout=limit))
        store = dist.PrefixStore(attempt, store)  # else the addresses of the dead still stand there
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world, timeout=limit)
    cfg.overwrite = cfg.overwrite and attempt == "0"
    log = Log(cfg, rank)
    if rank == 0:
        hold(cfg.save_path)
    found = run_folder(cfg, rank, log)

    # ------------------------------------------------------------------------------------------------ checkpoint and LoRA
    backbone = models.find(cfg.pretrained_path)
    options = dataclasses.asdict(configs.build(backbone.Training, cfg.backbone, "backbone"))
    unknown = set(cfg.lambdas) - set(backbone.LAMBDAS)
    if unknown:
        raise Usage(f"lambdas: unknown loss {', '.join(sorted(unknown))}; this backbone has {', '.join(backbone.LAMBDAS)}")
    lambdas = {**backbone.LAMBDAS, **cfg.lambdas}
    if min(lambdas.values()) < 0 or not any(lambdas.values()):
        raise Usage(f"lambdas: {lambdas}; expected weights of at least 0, and one above")
    dtype = models.pick_dtype(cfg.dtype, device)
    torch.manual_seed(seed_from(cfg.seed, "init"))
    source = found if found is not None and not cfg.lora else cfg.pretrained_path
    scratch = "scratch" if cfg.from_scratch and source is cfg.pretrained_path else cfg.weights if source is cfg.pretrained_path else ""
    model = models.load(source, device, dtype, options, weights=scratch or None, allow_unused=cfg.allow_unused_tensors)
    for key in ("sample_rate", "out_sample_rate"):
        if getattr(cfg, key) not in (0, getattr(model, key)):
            raise Usage(f"{key} is {getattr(cfg, key)}, the checkpoint's is {getattr(model, key)}; leave it out, audio is resampled")
    if cfg.lora and options.get("freeze"):
        raise Usage(f"backbone.freeze is {options['freeze']!r} and there is a lora section, which freezes all but the adapters; "
                    "say with lora.target_modules what they adapt")
    if cfg.lora:
        try:
            wrapped = lora.apply_lora_to_model(model, cfg.lora)
        except Invalid as e:
            raise Usage(e) from None
        if cfg.save_mode != "lora":
            try:
                lora.check_mergeable(model)
            except Invalid as e:  # now, not at the first save
                raise Usage(f"save_mode {cfg.save_mode}: {e}") from None
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    masters = Masters({n: model.get_parameter(n) for n in names})
    if cfg.checkpointing:
        model.set_recompute(True)
    if cfg.compile:
        for block in model.blocks():
            block.compile()

    # ------------------------------------------------------------------------------------------------ data
    # name -> number, filled by the manifests and kept in the adapter; who had a number when the run began keeps it
    speakers = dict(checkpoint.read_json(found / checkpoint.INDEX).get("speakers", {})) if found is not None else {}
    rows = read_manifest(cfg.train_manifest, speakers)
    val_rows = read_manifest(cfg.val_manifest, speakers) if cfg.val_manifest else []
    model.speakers, most = speakers, model.max_length
    limit = min(cfg.max_length or most, most)
    if any("turns" in row for row in rows + val_rows):
        model.max_length = limit  # encode cuts conversations to it, so it is part of what the cache holds
    least = {id(row): positions(row, model) for row in rows + val_rows}
    wanted = [row for row in rows + val_rows if least[id(row)] <= limit]  # what is too long by its audio alone is not encoded
    cache = ClipCache(cfg.cache_dir or Path(cfg.train_manifest[0]).parent / "cache", model)
    missing = cache.missing(wanted)
    if missing and world > 1:
        command = "this command without torchrun encodes before it trains"
        if cache.folder.name == "cache" and not cfg.backbone and model.max_length == most:  # where and as prepare_data.py encodes
            command = "python prepare_data.py --encode_only --input " + shlex.join(
                [*cfg.train_manifest, *cfg.val_manifest, "--output_dir", str(cache.folder.parent), "--ckpt_dir", cfg.pretrained_path])
        raise Usage(f"{len(missing)} of {len(wanted)} clips are not in the cache {cache.folder}. Encode them once, in one process:\n"
                    f"    {command}")
    if missing:
        model.codec.to(device)
        cache.add([wanted[i] for i in missing], log.say)
        model.codec.to("cpu")  # not needed again but to speak
    keys = [cache.key(row) if least[id(row)] <= limit else None for row in rows]  # from here on no recording is needed
    lengths = [model.length(cache.load(key)) if key else least[id(row)] for row, key in zip(rows, keys)]
    kept = pick_rows(cfg, rows, lengths, limit, log)
    rows, lengths, keys = ([x[i] for i in kept] for x in (rows, lengths, keys))
    val_examples = [cache.get(row) if least[id(row)] <= limit else None for row in val_rows]
    fits = [e is not None and 0 < model.length(e) <= limit for e in val_examples]
    if not all(fits):
        log.say(f"validation: {fits.count(False)} of {len(fits)} rows are left out: longer than {limit} positions, or nothing is trained in them",
                "warning")
        val_rows, val_examples = ([x for x, fit in zip(part, fits) if fit] for part in (val_rows, val_examples))
    if len(speakers) > 1 and not model.speaker_input:
        log.say(f"the rows name {len(speakers)} speakers ({', '.join(list(speakers)[:5])}) and this backbone is not told who speaks: each sentence would "
                "get one of them by chance. Train one adapter per speaker, or give rows a ref_audio where the checkpoint takes one.", "warning")
    seconds = [seconds_of(row) for row in rows]

    # ------------------------------------------------------------------------------------------------ optimizer
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}[cfg.optimizer]
    more = {} if cfg.optimizer == "sgd" else {"betas": (0.9, 0.999), "eps": 1e-8}
    optimizer = kind(masters.parameters, lr=cfg.learning_rate, weight_decay=cfg.weight_decay, fused=device.type == "cuda", **more)
    per_step = cfg.grad_accum_steps * world  # micro-batches of one step, over all ranks
    per_epoch = len(micro_batches(lengths, cfg, 0))

    # ------------------------------------------------------------------------------------------------ resume
    state = {"step": 0, "epoch": 0, "position": 0, "best": [math.inf, -1], "skipped": 0, "micro_per_step": per_step, "settings": picked(cfg),
             "speakers": speakers, "resumed_from": str(Path(cfg.resume_from).resolve()) if cfg.resume_from else "",
             "data": seed_from([(row["id"], n) for row, n in zip(rows, lengths)]), "base": model.fingerprint if cfg.lora else None}
    came_from = None
    if found is not None:
        index = checkpoint.read_json(found / checkpoint.INDEX)
        came_from = index["step"]
        if state["base"] != index["base"] and not cfg.ignore_base:
            raise Invalid(f"{found} was trained on another base (fingerprint {index['base']}) than {cfg.pretrained_path} (fingerprint "
                          f"{state['base']}). If you want that, say --ignore_base.")
        state |= {k: index[k] for k in ("step", "epoch", "position", "best", "skipped", "micro_per_step")}
        per_step = state["micro_per_step"]
        if per_step % world:
            raise Usage(f"{found} was trained with {per_step} micro-batches per step, which {world} ranks cannot share evenly; "
                        f"use {' or '.join(str(n) for n in range(1, per_step + 1) if per_step % n == 0)} ranks")
        restore(cfg, found, model, masters, optimizer, names)
        log.say(f"going on from {found}: {state['step']} steps done")
        if index["data"] != state["data"]:
            log.say("the rows are not those that the run began with, so in this epoch some may come twice and others not at all", "warning")
    accum = per_step // world
    steps = math.ceil(cfg.epochs * per_epoch / per_step) if cfg.epochs else cfg.num_iters or cfg.max_steps or 2000
    span = steps if cfg.epochs else cfg.max_steps or steps  # the YAMLs' max_steps and warmup_steps are for their num_iters
    warmup = round(cfg.warmup_ratio * span) if cfg.warmup_ratio else min(cfg.warmup_steps, span // 10) if cfg.epochs else cfg.warmup_steps
    order = Order(lengths, cfg, state["epoch"], state["position"])
    if order.position > len(order.batches):
        raise Usage(f"{found} stands at micro-batch {order.position} of its epoch, the data now has {len(order.batches)}; the data set changed")

    # ------------------------------------------------------------------------------------------------ say what is going to happen
    if rank == 0 and cfg.overwrite and any(p.name != ".lock" for p in Path(cfg.save_path).iterdir()):  # now that nothing is wrong with the new run
        log.say(f"--overwrite: moved the earlier {cfg.save_path} to {checkpoint.put_aside(cfg.save_path)}")
        hold(cfg.save_path)
    if rank == 0:
        again = dataclasses.replace(cfg, overwrite=False, resume_from="")  # so that the file, given as it is, goes on with the run
        configs.dump(again, Path(cfg.save_path) / "config.yaml")
    log.open(cfg, state["step"])
    total, trained = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in masters.parameters)
    log.say(f"{model.backbone} on {device} in {str(dtype)[6:]}, {world} rank{'s' * (world > 1)}: {trained:,} of {total:,} parameters "
            f"trained ({100 * trained / total:.2f} %)")
    if cfg.lora:
        stacks = {}
        for n in wrapped:
            stacks.setdefault(re.split(r"\.\d+\.", n)[0], []).append(n)
        log.say(f"LoRA: r {cfg.lora.r}, alpha {cfg.lora.alpha:g}, scale {cfg.lora.scale:g}, {len(wrapped)} modules: "
                + ", ".join(f"{len(v)} in {k}" for k, v in stacks.items()))
    log.say(f"{steps} steps of {per_step} micro-batches ({accum} per rank), {per_epoch} micro-batches and {per_epoch / per_step:.1f} steps "
            f"per epoch, {steps * per_step / per_epoch:.1f} epochs in all")
    if cfg.epochs:
        log.say(f"epochs {cfg.epochs:g} means {steps} steps, {warmup} of them warm-up; the learning rate reaches zero at the last")
    if span != steps:
        log.say(f"the learning rate reaches zero at step {span} (max_steps), the run ends at step {steps} (num_iters)", "warning")

    # ------------------------------------------------------------------------------------------------ loop
    pool = ThreadPoolExecutor(cfg.num_workers) if cfg.num_workers else None
    log.say("trained: " + ", ".join(names), "debug")

    def collate(epoch, members):
        return model.collate([cache.load(keys[i]) for i in members], [seed_of(cfg, epoch, rows[i]) for i in members])

    def prepare():
        """The micro-batches of the next step: all of them by rows, this rank's own as (global number, rows, batch)."""
        taken = order.take(per_step)
        mine = [(i, m, pool.submit(collate, e, m) if pool else None) for i, (e, m) in enumerate(taken) if i % world == rank]
        return taken, [(i, m, f or collate(taken[i][0], m)) for i, m, f in mine], (order.epoch, order.position, order.progress())

    def step_loss(micro, weight):
        sums = {}
        for number, members, (batch, _) in micro:
            torch.manual_seed(seed_from(cfg.seed, "dropout", state["step"], number))  # dropout is all that still draws
            out = model(to_device(batch, device))
            sum(weight[k] * out[k] for k in weight).backward()
            for k, v in out.items():
                v = v.detach().float()
                sums.setdefault(k, []).append(v)
        return {k: torch.stack(v) for k, v in sums.items()}

    def save_now():
        if rank == 0:  # a full run copies codec and tokenizer from the folder it came from, so that stays until the end
            save(cfg, model, masters, optimizer, names, state, log, speakers, came_from if not cfg.lora and state["step"] < steps else None)
        if dist.is_initialized():
            dist.barrier()

    def validate(saving):
        if not val_examples:
            return
        means = evaluate(cfg, model, val_examples, lambdas, device, rank, world)
        log.numbers("val", state["step"], means, epoch=passed)
        log.say(f"step {state['step']}/{steps} | validation {means['loss/total']:.4f} ("
                + ", ".join(f"{k.split('/', 1)[1]} {v:.4f}" for k, v in means.items() if k != "loss/total") + ")")
        if saving and means["loss/total"] < state["best"][0]:
            state["best"] = [means["loss/total"], state["step"]]
        if rank == 0 and cfg.val_samples:
            try:
                speak(cfg, model, val_rows, state["step"], log)
            except (Invalid, OSError, RuntimeError) as e:  # a sample is no reason to lose a run
                log.say(f"step {state['step']}: no sample of the validation texts: {str(e).splitlines()[0]}", "warning")
            model.codec.to("cpu")
            model.train()

    signals = []

    def on_signal(number, frame):
        if signals and number == signal.SIGINT:
            os._exit(130)
        signals.append(number)

    hangup = [signal.SIGHUP] if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []  # nohup ignores it
    for number in (signal.SIGINT, signal.SIGTERM, *hangup):
        signal.signal(number, on_signal)
    model.train()
    passed = order.progress()  # epochs done
    if state["step"] == 0:
        validate(saving=False)
    bad, stop, started, waited, heard, first = 0, 0, time.perf_counter(), 0.0, 0.0, state["step"]
    upcoming = prepare() if state["step"] < steps else None
    while state["step"] < steps:
        begun = time.perf_counter()
        taken, micro, after = upcoming
        micro = [(i, m, b if isinstance(b, tuple) else b.result()) for i, m, b in micro]
        wait = time.perf_counter() - begun
        if pool and state["step"] + 1 < steps:
            upcoming = prepare()
        counts = all_sum({k: sum(c[k] for _, _, (_, c) in micro) for k in micro[0][2][1]}, device)
        weight = {k: lambdas[k] / max(counts[k], 1) for k in lambdas}
        try:
            sums = step_loss(micro, weight)
        except torch.OutOfMemoryError as e:
            longest = max((i for _, m, _ in micro for i in m), key=lambda i: lengths[i])
            raise Invalid(f"out of memory at step {state['step'] + 1}: micro-batches of {[len(m) for _, m, _ in micro]} clips, the longest "
                          f"{rows[longest]['id']} with {lengths[longest]} positions. Set a smaller batch_size or batch_tokens (and a larger "
                          f"grad_accum_steps), --checkpointing, or a smaller max_length. Checkpoints are untouched. ({str(e).splitlines()[0]})") from None
        reduce_gradients(masters.parameters)
        norm = gradient_norm(masters.parameters).item()
        local = {k: v.sum().item() for k, v in sums.items()}
        means = all_sum({**local, "signals": len(signals)}, device)
        stop = means.pop("signals")
        means = {k: v / max(counts[k], 1) for k, v in means.items()}
        loss = sum(lambdas[k] * means[k] for k in lambdas)
        rate = learning_rate(cfg, state["step"], span, warmup)
        good = math.isfinite(norm) and math.isfinite(loss)  # reduced over ranks, so all decide alike
        if good:
            if cfg.max_grad_norm and norm > cfg.max_grad_norm:
                torch._foreach_mul_([p.grad for p in masters.parameters if p.grad is not None], cfg.max_grad_norm / (norm + 1e-6))
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            masters.publish()
            bad = 0
        else:
            bad, state["skipped"] = bad + 1, state["skipped"] + 1
            fine = torch.stack(list(sums.values()), 1).isfinite().all(1).tolist()
            flags = all_sum(dict.fromkeys(range(per_step), 0) | {n: not f for (n, _, _), f in zip(micro, fine)}, device)
            worst = [m for n, (_, m) in enumerate(taken) if flags[n]]
            ids = [rows[i]["id"] for m in worst or [m for _, m in taken] for i in m]
            log.say(f"step {state['step'] + 1}: loss {loss}, gradient norm {norm}: update skipped; rows {', '.join(ids)}", "error")
        optimizer.zero_grad(set_to_none=True)
        state |= {"step": state["step"] + 1, "epoch": after[0], "position": after[1]}
        step = state["step"]

        log.say(f"step {step}: loss {loss:.6f}, {[[rows[i]['id'] for i in m] for _, m in taken]}, {wait:.3f} s for the data", "debug")
        heard += sum(seconds[i] for _, m in taken for i in m)
        waited += wait
        log.numbers("train", step, {"loss/total": loss, **means, "lr": rate, "grad_norm": norm, "epoch": after[2]},
                    rows=[rows[i]["id"] for _, m in taken for i in m])
        if step % cfg.log_interval == 0 or step == steps:
            spent = time.perf_counter() - started
            each = spent / (step - first)
            parts = ", ".join(f"{k[5:]} {v:.4f}" for k, v in means.items() if k in lambdas)
            log.say(f"step {step}/{steps} | loss {loss:.4f} ({parts}) | lr {rate:.2e} | grad {norm:.3f} | epoch {after[2]:.2f} | {each:.2f} s | "
                    f"{heard / spent:.0f} s audio/s | waited {100 * waited / spent:.0f} % | ETA {timedelta(seconds=round(each * (steps - step)))}")
        if bad == 3:
            save_now()
            raise Invalid(f"three steps in a row gave no finite loss and gradient; stopped at step {step} with the last good weights saved. Look at "
                          "the rows named above, lower learning_rate, or set max_grad_norm.")
        full = cfg.save_epochs and math.floor(after[2] / cfg.save_epochs + 1e-9) > math.floor(passed / cfg.save_epochs + 1e-9)
        passed = after[2]
        saving = bool(stop or full or step == steps or (cfg.save_interval and step % cfg.save_interval == 0))
        paused, best = time.perf_counter(), state["best"]
        if stop:
            save_now()  # at once; who asked may not wait for a validation
        if step == steps or (cfg.valid_interval and step % cfg.valid_interval == 0):
            validate(saving)
        if saving and not stop or state["best"] != best:
            save_now()
        started += time.perf_counter() - paused  # the time per step is that of training
        if stop:
            same = "the same command without --overwrite" if cfg.overwrite else "the same command"
            log.say(f"asked to stop: saved step {step}; {same} goes on from here", "warning")
            break
        if not pool and step < steps:
            upcoming = prepare()

    # ------------------------------------------------------------------------------------------------ end
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else \
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    log.say(f"done: {state['step']} steps, {state['skipped']} skipped, peak memory {peak / 2**30:.2f} GiB")
    if rank == 0:
        log.writer.close()
    if dist.is_initialized():
        dist.destroy_process_group()
    if signals or stop:
        sys.exit(128 + (signals[0] if signals else signal.SIGTERM))


if __name__ == "__main__":
    configs.run(main)
