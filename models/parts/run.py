"""The bookkeeping of a training run: its folder, its clips, its log, the signals that end it.

    save_path/
        step_0000500/       a complete checkpoint, see models/parts/checkpoint.py; its index holds a Progress
        latest  best        name the newest, and the one with the lowest validation loss
        config.yaml         the settings, good for going on
        train.log  metrics.jsonl  logs/  samples/ (see models/parts/listen.py)

Nothing here computes what is trained: train.py reads the same without it.
"""
import contextlib
import json
import math
import os
import re
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

try:
    import resource
except ImportError:  # Windows
    resource = None

import torch

from models.parts import Invalid, audio, checkpoint, plain
from models.parts.manifests import holders
from models.parts.plain import (an_object, lines_of, need, parse, read_object, shown, typed,
                                write_file)
from models.parts.ranks import others

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}
STEPS_BEFORE = 2000  # of a run whose checkpoints do not say: the default that was in force then


# ------------------------------------------------------------------------------------------------ the folder


def lock(root) -> str | None:
    """Keep other runs out of a folder while this process lives. Returns what is wrong."""
    if not plain.lock(Path(root) / ".lock"):
        return f"another train.py is writing into {root}; wait for it or choose another save_path"
    return None


def claim(root) -> str | None:
    """Make a run folder, or take possession of one. Returns what is wrong. Rank 0 only."""
    root = Path(root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):  # whether one can write here
            pass
        wrong = leads_outside(root) or lock(root)
        if not wrong:  # before the lock these may be of another run
            sweep(root)
        return wrong
    except OSError as e:
        return f"save_path {root} cannot be written: {e.strerror}"


WRITTEN = (".lock", "train.log", "metrics.jsonl", "logs", "samples")


def leads_outside(root) -> str | None:
    """A run folder from elsewhere may hold links; what is written through them would change other files."""
    for name in WRITTEN:
        path = Path(root) / name
        if path.is_symlink() and Path(root).resolve() not in path.resolve().parents:
            return (f"{path} is a link to {os.readlink(path)}, outside of the run folder; nothing is written "
                    "through it. Remove the link, or choose another save_path.")
    return None


def sweep(root):
    """Delete what a killed run was writing, named as we name that."""
    for path in root.glob("step_*.tmp"):
        if re.fullmatch(r"step_\d{7,}\.tmp", path.name):
            checkpoint.remove(path)
    for name in ("latest", "config.yaml", "metrics.jsonl"):
        checkpoint.sweep(root / name)
    plain.sweep(root / "samples", r"(step_\d{7,}|recording)_\d+\.(wav|flac)|listen\.html")


def set_aside(root, say) -> None:
    """What --overwrite does to an earlier run: it gets another name, nothing is deleted. Rank 0 only."""
    if any(path.name != ".lock" for path in Path(root).iterdir()):
        try:
            place = checkpoint.put_aside(root)
            Path(root).mkdir()
        except OSError as e:  # a mount point stays where it is
            raise Invalid(f"--overwrite: {root} cannot be moved aside ({e.strerror}); choose another "
                          "save_path, such as a folder inside of it") from None
        say(f"--overwrite: moved the earlier {root} to {place}")
        lock(root)


def name_best(root, best, say) -> None:
    """Let root/best name the step folder with the lowest validation loss: a link, or a text file where links
    are refused. Without that folder there is no such name. Rank 0 only."""
    link = Path(root) / "best"
    name = f"step_{best.step:07d}"
    if not (Path(root) / name).is_dir():
        link.unlink(missing_ok=True)
        return
    if named(link) == name:
        return
    temporary = link.with_name("best.tmp")
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(name)
    except OSError:
        temporary.write_text(name)
    os.replace(temporary, link)
    say(f"{link} is now step {best.step}, validation loss {best.loss:.4f}")


def named(link) -> str:
    """What a link, or the text file in its place, names; empty where there is neither."""
    if link.is_symlink():
        return os.readlink(link)
    return link.read_text() if link.is_file() else ""


# ------------------------------------------------------------------------------------------------ progress


class Best(NamedTuple):
    """The lowest validation loss of those steps that were saved."""

    loss: float = math.inf
    step: int = -1


@dataclass
class Progress:
    """How far a run has come and what it is, as the index of a step folder has it."""

    step: int = 0  # updates done, skipped ones included
    epoch: int = 0
    position: int = 0  # micro-batches of the epoch that are done
    best: Best = Best()
    lowest: Best = Best()  # of all validations, saved or not
    stale: int = 0  # validations since then
    skipped: int = 0
    steps: int = 0  # the length of the run, where settings do not say it anew
    micro_per_step: int = 1  # over all ranks; stays what it was when the number of ranks changes
    settings: dict = field(default_factory=dict)  # those that must agree for a run to go on
    speakers: dict = field(default_factory=dict)  # name -> number
    resumed_from: str = ""
    data: int = 0  # seed_from ids and lengths of the rows
    base: str | None = None  # fingerprint of the base of an adapter
    folder: Path | None = None  # the step folder that says so

    @classmethod
    def read(cls, folder):
        index = read_object(folder / checkpoint.INDEX)
        bests = {}
        for key, default in (("best", []), ("lowest", list(Best()))):
            best = need(index, key, list, default)
            if len(best) != len(Best._fields):
                raise Invalid(f"{index.where}: {key} is {best}, expected a loss and a step")
            bests[key] = Best(*best)
        steps = need(index, "steps", int, STEPS_BEFORE)
        return typed(cls, index, **bests, folder=folder, steps=steps)

    def index(self):
        values = asdict(self)
        del values["folder"]
        return values

    def after(self, past):
        """This run with the counters of `past`, from which it goes on.

        Settings are equal; but speakers may have been added, and rows and base may be others by intent.
        """
        names = ("step", "epoch", "position", "best", "lowest", "stale", "skipped",
                 "steps", "micro_per_step", "folder")
        return replace(self, **{name: getattr(past, name) for name in names})


    def judge(self, loss):
        """Count the validations in a row that were not the lowest so far, once there is one."""
        if loss < self.lowest.loss:
            self.lowest, self.stale = Best(loss, self.step), 0
        elif self.lowest != Best():
            self.stale += 1

    def is_out_of(self, patience):
        return bool(patience) and self.stale >= patience


def find(root, resume_from, say) -> Progress | None:
    """Where to go on from: the step `resume_from`, else the newest complete one in `root`. None: a new run.

    Every rank looks for itself and comes to the same answer; nothing is changed on disk.
    """
    if resume_from:
        chosen = Path(resume_from)
        newest = checkpoint.newest_step(root, lambda text: None)
        # The same command once more: what it has made since then counts, or it would start over each time.
        own = newest and Progress.read(newest)
        return own if own and own.resumed_from == str(chosen.resolve()) else Progress.read(chosen)
    newest = checkpoint.newest_step(root, lambda text: say(text, "warning"))
    if newest:
        return Progress.read(newest)
    damaged = checkpoint.steps(root)
    if damaged:
        raise Invalid(f"none of the {len(damaged)} checkpoints in {root} is complete; "
                      "--overwrite starts anew and keeps them aside")
    return None


def flat(settings, prefix="") -> dict:
    """{"lora": {"r": 8}} -> {"lora": "given", "lora.r": 8}; a section that is absent stays {"lora": None}."""
    values = {}
    for name, value in settings.items():
        key = prefix + name
        values[key] = "given" if isinstance(value, dict) else value
        if isinstance(value, dict):
            values |= flat(value, key + ".")
    return values


def differences(there, here, defaults) -> list[str]:
    """Lines such as `lora.r: 16 there, 8 here`: the settings of an earlier run against those of now.

    A key that the earlier run does not have is newer than the run, which therefore had the default.
    """
    usual = flat(defaults)
    there, here = {**usual, **flat(there)}, {**usual, **flat(here)}
    lines = []
    for key in sorted(there | here):
        # Where one of the two has no such section, the section's own name says so, once.
        section = key.partition(".")[0]
        if key != section and there.get(section) != here.get(section):
            continue
        old, new = there.get(key), here.get(key)
        if old != new and [old] != new:  # an old index may have its only value for a list of one
            lines.append(f"{key}: {old!r} there, {new!r} here")
    return lines


def clear_the_way(past, root, say) -> None:
    """Leave nothing in the folder that is newer than what the run goes on from. Rank 0 only."""
    root, folder = Path(root), past.folder.resolve()
    for path in checkpoint.steps(root):
        # Damaged, or about to be made again: left in place it would pass for the newest.
        if int(path.name[5:]) > past.step:
            place = checkpoint.put_aside(path)
            say(f"moved {path}, which lies after step {past.step}, to {place}", "warning")
    stale = folder.parent == root.resolve() and (root / "latest").resolve() != folder
    if stale:  # the run was killed before it could name it, or what it named was moved
        checkpoint.point(root, folder.name)


# ------------------------------------------------------------------------------------------------ clips


class Clip(NamedTuple):
    """One row of a manifest, ready to be trained on."""

    row: dict
    key: str  # by which the cache finds its example; empty while nobody has looked
    length: int  # positions of the trained network; while there is no key, what its audio takes at least
    seconds: float  # of audio
    file: str = ""  # the manifest


def seconds_of(row):
    """Length of a row's audio: as prepare_data.py wrote it down, else by the headers of the files."""
    if row.get("duration"):
        return row["duration"]
    total = 0
    for holder in holders(row):
        if isinstance(holder.get("audio"), str):
            end = holder.get("end")
            end = audio.info(holder["audio"]).seconds if end is None else end
            total += end - (holder.get("start") or 0)
    return total


def positions(row, rate):
    """How many positions of `rate` per second a row takes at least, by the headers of its files.

    A conversation may lose turns as it is encoded, so of its length nothing is known before.
    """
    if row.get("turns"):
        return 0
    return math.floor(seconds_of({**row, "duration": None}) * rate)


def outlines(rows, rate, files) -> list[Clip]:
    """Clips of which only the headers of the files were read; files: {id of a row: its manifest}."""
    return [Clip(row, "", positions(row, rate), seconds_of(row), files[row["id"]]) for row in rows]


def short(path, paths):
    """A name for one of several files: without folder and ending, unless two are then called the same."""
    stems = [Path(one).stem for one in paths]
    stem = Path(path).stem
    return stem if stems.count(stem) == 1 else str(path)


def measured(clips, model, cache, limit) -> list[Clip]:
    """The same clips with key and true length. What is too long by its audio was not encoded and stays."""
    done = []
    for clip in clips:
        if clip.length <= limit:
            key = cache.key(clip.row)
            clip = clip._replace(key=key, length=model.length(cache.load(key)))
        done.append(clip)
    return done


def hours(clips):
    return sum(clip.seconds for clip in clips) / 3600


class Limit(NamedTuple):
    """How long a clip may be, what sets that, and what helps."""

    positions: int
    cause: str
    remedy: str

    def __str__(self):
        return f"longer than {self.positions} positions ({self.cause})"


NOTHING = Limit(0, "nothing in them is trained", "Train more of the rows: see the backbone's own settings.")


def drop_long(clips, limits, say) -> list[Clip]:
    """The clips that hold something to train and fit all limits. The rest is said, with its reason."""
    kept, dropped = [], {}
    for clip in clips:
        reasons = [limit for limit in limits if clip.length > limit.positions]
        if not clip.length:
            reasons = [NOTHING]
        if reasons:
            dropped.setdefault(reasons[0], []).append(clip)
        else:
            kept.append(clip)
    gone = sum(dropped.values(), [])
    say(f"data: {len(kept)} clips, {hours(kept):.2f} h; dropped {len(gone)} clips, {hours(gone):.2f} h")
    for limit, part in dropped.items():
        names = ", ".join(shown(clip.row["id"]) for clip in part[:5])
        say(f"  {len(part)} {reason_of(limit)}: {names}{' ...' if part[5:] else ''}", "warning")
    if not kept:
        reasons = "; ".join(f"{len(part)} {reason_of(limit)}" for limit, part in dropped.items())
        remedies = " ".join(limit.remedy for limit in dropped)
        raise Invalid(f"no clip is left to train on of {len(clips)}: {reasons}. {remedies}")
    return kept


def reason_of(limit):
    """Why clips are dropped, in the words of the log."""
    return "with nothing that is trained in them" if limit is NOTHING else str(limit)


# ------------------------------------------------------------------------------------------------ log


def step_of(line) -> int:
    """The step of a line of metrics.jsonl; -1 where it was cut off or damaged."""
    try:
        return need(an_object(parse(line, "the line"), "the line"), "step", int)
    except Invalid:
        return -1


def cut_metrics(path, step) -> None:
    """Take out of metrics.jsonl what will be made again; with no step done that is all, step 0 included."""
    lines = path.read_text(errors="replace").splitlines()
    kept = [line for line in lines if step and 0 <= step_of(line) <= step]
    write_file(path, "".join(line + "\n" for line in kept).encode())


class Log:
    """Lines to stderr and train.log, numbers to metrics.jsonl and TensorBoard. Silent but on rank 0."""

    def __init__(self, level, rank):
        self.rank, self.level = rank, LEVELS[level]
        self.file = self.metrics = self.writer = None
        self.root = None
        self.early = []  # lines that were said before there was a folder
        self.full = False  # the disk

    def open(self, root, tensorboard, step):
        """From here on there are files. What they say of steps after `step` will be made again and goes."""
        if self.rank:
            return
        self.root = root = Path(root)
        metrics = root / "metrics.jsonl"
        if metrics.exists():
            cut_metrics(metrics, step)
        self.file = open(root / "train.log", "a", encoding="utf-8")
        self.metrics = open(metrics, "a")
        # Imported here, since that takes longer than all the rest.
        from torch.utils.tensorboard import SummaryWriter

        try:
            self.writer = SummaryWriter(tensorboard or str(root / "logs"), purge_step=step + 1 if step else 0)
        except OSError as e:
            self.go_on_without("TensorBoard's folder", e)
        for line in self.early:
            self.file.write(line)

    def close(self):
        self.show("close")

    def put(self, file, line):
        try:
            file.write(line)
            file.flush()
        except OSError as e:
            self.go_on_without(file.name, e)

    def show(self, method, *values, **more):
        """A call of TensorBoard's writer."""
        try:
            if self.writer:
                getattr(self.writer, method)(*values, **more)
        except OSError as e:
            self.go_on_without("TensorBoard's folder", e)

    def go_on_without(self, name, error):
        """A full disk is told once and ends no run here; the checkpoints will say what it means."""
        if not self.full:
            self.full = True
            self.say(f"{name} cannot be written ({error.strerror or error}); going on without", "warning")

    def say(self, text, level="info"):
        if self.rank or LEVELS[level] < self.level:
            return
        # Further lines are set in, so that no name with a line break passes for a line of ours.
        text = lines_of(text).replace("\n", "\n    ")
        with contextlib.suppress(OSError):  # nobody is listening any more: no reason to stop
            print(text, file=sys.stderr, flush=True)
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {level} {text}\n"
        if self.file:
            self.put(self.file, line)
        else:
            self.early.append(line)

    def numbers(self, split, step, values, **more):
        """One line of metrics.jsonl, and a curve in TensorBoard of each value; `more` is for the line."""
        if self.rank:
            return
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}  # JSON has no NaN
        self.put(self.metrics, json.dumps({"step": step, "split": split, **more, **finite}) + "\n")
        for name, value in values.items():
            self.show("add_scalar", f"{split}/{name}", value, step)


class Clock:
    """How fast the training itself goes: time spent on validation and on saving is not counted."""

    def __init__(self):
        self.started = time.perf_counter()
        self.steps, self.audio, self.waited = 0, 0.0, 0.0

    def count(self, audio, waited):
        """One more step, with so many seconds of audio, after so many seconds of waiting for its data."""
        self.steps += 1
        self.audio += audio
        self.waited += waited

    @contextlib.contextmanager
    def paused(self):
        began = time.perf_counter()
        yield
        self.started += time.perf_counter() - began

    def line(self, steps_left):
        spent = time.perf_counter() - self.started
        each = spent / self.steps
        share = 100 * self.waited / spent
        left = timedelta(seconds=round(each * steps_left))
        return f"{each:.2f} s | {self.audio / spent:.0f} s audio/s | waited {share:.0f} % | ETA {left}"


def peak_memory(device) -> float:
    """Bytes, of the GPU or else of this process; 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit if resource else 0


def all_memory(device) -> float:
    """Bytes of the GPU, or else of this machine; infinite where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return math.inf


def memory_line(device) -> str:
    """The peak, and on a GPU of how much."""
    text = f"{peak_memory(device) / 2**30:.2f} GiB"
    if device.type == "cuda":
        text += f" of {all_memory(device) / 2**30:.0f} GiB"
    return text


# ------------------------------------------------------------------------------------------------ signals


def catch_signals() -> list[int]:
    """From now on SIGINT, SIGTERM and SIGHUP only go into the list that this returns; the loop looks at it.

    Who sends SIGINT a second time does not want to wait for the end of the step.
    """
    caught = []

    def on_signal(number, frame):
        if caught and number == signal.SIGINT:
            os._exit(130)
        caught.append(number)

    numbers = [signal.SIGINT, signal.SIGTERM]
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none
    if hangup and signal.getsignal(hangup) != signal.SIG_IGN:  # nohup has it ignored
        numbers.append(hangup)
    for number in numbers:
        signal.signal(number, on_signal)
    others.longest = 0.0  # what was waited for before the first step says nothing of steps
    return caught
