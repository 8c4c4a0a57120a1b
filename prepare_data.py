"""Recordings and transcripts, in whatever shape they lie, into rows that can be trained on.

    python prepare_data.py --input my_voice/ --output_dir data --ckpt_dir checkpoints/base

    inputs --read_rows--> rows --measure, cut, judge--> rows --split--> train.jsonl val.jsonl --encode-->
    cache/
                                       |
                                       +--> report.html report.json

Every row is checked before anything is written, and everything that is wrong is named at once, with file and
line. Killed anywhere, the same command goes on where it was. train.py uses `read_manifest` and `ClipCache`
from here.
"""
import collections
import contextlib
import copy
import csv
import dataclasses
import functools
import importlib
import io
import json
import math
import multiprocessing
import os
import random
import re
import signal
import statistics
import sys
import tempfile
import threading
import time
import unicodedata
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, NamedTuple

import torch

import configs
import models
from models.parts import Invalid, audio, clips, opt, page
from models.parts.cache import ClipCache, Progress, clock, read_memo, sha, stamp, write_file
from models.parts.clips import Clip, Cutting, Span, Speech
from models.parts.corpora import Reading, without_row, words_in
from models.parts.manifests import (
    KEYS, SHAPES, UNNAMED, Ambiguous, Fault, Place, for_encode, holders, is_own, listing, name_others,
    number_speakers, read_manifest, read_rows, read_table, say_unread, speaking, unused, voices)
from models.parts.plain import lock, say, shown, sweep
from models.parts.textfiles import check_text, is_control, is_file, one_line
from models.parts.unknown import Unknown

# ------------------------------------------------------------------------------------------------ settings


@dataclass
class Prepare:
    """Turn recordings and transcripts into train.jsonl, val.jsonl, cached codes for training, and a
    report."""

    input: list[str] = opt([], "manifests, folders of recordings, or recordings; several are one data set", repeat=True)
    output_dir: str = opt("", "folder for train.jsonl, val.jsonl, report.html, report.json and cache/")
    ckpt_dir: list[str] = opt([], "checkpoints to encode for; none only checks and splits", repeat=True)
    extra: dict[str, str] = opt({}, "places of parts kept elsewhere, as --extra.codec DIR; those not given are searched for")
    format: str = opt("auto", "shape of every input; list is file|speaker|text or file|speaker|language|text",
                      choices=("auto", *SHAPES))
    transcripts: str = opt("", "table of transcripts, or folder of text files, when they do not lie beside the recordings")
    alignment_dir: str = opt("", "folder of word times (<name>.json) when they do not lie beside the recordings")
    speaker: str = opt("", "speaker of rows that name none")
    speaker_from_folder: bool = opt(False, "the folder that tells recordings apart is their speaker; the log says which")
    speaker_level: int = opt(0, "the same, by hand: 1 is the folder that a recording lies in, 2 the one above it; 0 is off",
                             least=0)
    mic: str = opt("", "of recordings made with several microphones (_mic1, _mic2) take this one only, such as mic1")
    transcriber: str = opt("", "module:function from the path of a recording to its text, for recordings without one")
    normalizer: str = opt("", "module:function from text to text, called on every text")
    min_seconds: float = opt(0.3, "shorter clips are bad rows")
    max_seconds: float = opt(60.0, "longer clips are bad rows, told by their header; with word times they are cut instead")
    silence_db: float = opt(-40.0, "10 ms below this level (dB of full scale, RMS) are silence")
    trim: float = opt(-1.0, "cut silence at both ends down to this many seconds; negative leaves it")
    loudness: str = opt("", "bring every clip to a level by a factor: rms:-23 or peak:-1 (dB of full scale)")
    slice: bool = opt(False, "cut recordings without text at silences into clips/, and those with word times into rows")
    slice_min_seconds: float = opt(4.0, "shortest piece", least=0)
    slice_max_seconds: float = opt(15.0, "longest piece, where there is a silence to cut at", least=0)
    slice_min_interval: float = opt(0.3, "shortest silence to cut at, in seconds", least=0)
    slice_hop: float = opt(0.01, "seconds between two looks at the level", least=0.001, most=1)
    slice_max_silence: float = opt(0.5, "longest silence that is left at an end of a piece, in seconds", least=0)
    ref: str = opt("none", "write ref_audio: the clip itself, another one of the speaker, or nothing",
                   choices=("same", "other", "none"))
    val_split: float = opt(0.1, "share of each speaker's rows that goes into val.jsonl")
    seed: int = opt(42, "of the split and of --ref other")
    check: bool = opt(False, "write only the report")
    encode_only: bool = opt(False, "check and encode the manifests as they are; nothing is split, cleaned or written anew")
    skip_bad: bool = opt(False, "leave bad rows out and go on; without it they end the run")
    overwrite: bool = opt(False, "replace a train.jsonl and val.jsonl that came from elsewhere")
    batch_size: int = opt(16, "of the training to come; for the report", least=1)
    grad_accum_steps: int = opt(1, "of the training to come; for the report", least=1)
    max_batch_tokens: int = opt(8192, "of the training to come, which drops rows longer than this / batch_size; 0 none",
                               least=0)
    workers: int = opt(0, "processes that check audio; 0 takes one per core", least=0)
    device: str = opt("auto", "where the codec runs: auto, cpu, cuda, cuda:1, mps")


MANIFESTS = ("train.jsonl", "val.jsonl")


def no_changes():
    """Counts of what was done to the data; the report shows these two also when nothing was cut."""
    return collections.Counter({"recordings cut": 0, "clips to be transcribed": 0})


class Notice(NamedTuple):
    """What deserves a look, and no more."""

    row: dict
    kind: str
    what: str


@dataclass
class Work:
    """What is known of the data so far. report.json and report.html show all of it."""

    cfg: Prepare
    out: Path
    normalise: Callable | None = None  # from text to text
    hear: Callable | None = None  # from the path of a recording to its text
    device: str = "cpu"  # where the codec runs
    rows: list[dict] = field(default_factory=list)
    bad: list[Fault] = field(default_factory=list)
    notices: list[Notice] = field(default_factory=list)
    inputs: list[dict] = field(default_factory=list)  # what each of them is
    without_row: list[str] = field(default_factory=list)  # recordings that no row names
    changes: collections.Counter = field(default_factory=no_changes)
    val_ids: set[str] = field(default_factory=set)
    numbers: dict[str, int] = field(default_factory=dict)  # of the speakers
    checkpoints: list[dict] = field(default_factory=list)
    made_of: list[str] = field(default_factory=list)  # what manifests that are only encoded were made of
    written: list[str] = field(default_factory=list)  # hashes of manifests that this script wrote

    def refuse(self, row, reason):
        self.bad.append(Fault(row["at"], str(reason)))

    def sides(self):
        """{name of the manifest: its rows}"""
        train, val = [], []
        for row in self.rows:
            side = val if row["id"] in self.val_ids else train
            side.append(row)
        return dict(zip(MANIFESTS, (train, val)))


# ------------------------------------------------------------------------------------------------ measure

PROCESS_CLIPS = 100  # starting a process takes as long as measuring so many clips
CHUNK_CLIPS = 16  # given to a process at a time, so that passing them on costs nothing beside measuring them
MEMO_SECONDS = 30  # between two times that the measurements are written down; a kill loses no more


def clip_of(holder):
    return Clip(holder["audio"], holder.get("start"), holder.get("end"))


def clips_in(rows):
    """Every clip that has to be measured; a reference is always a whole file."""
    found = []
    for row in rows:
        for holder in holders(row):
            if "audio" in holder:
                found.append(clip_of(holder))
            if "ref_audio" in holder:
                found.append(Clip(holder["ref_audio"]))
    return found


def measure_all(every_clip, cfg, file):
    """{Clip: facts}, by several processes; what was measured before and has not changed is in the memo."""
    memo = read_memo(file)
    facts = {clip: from_memo(memo, clip, cfg) for clip in every_clip}
    left = [clip for clip, fact in facts.items() if fact is None]
    limits = {"longest": cfg.max_seconds, "silence_db": cfg.silence_db}
    measure = functools.partial(clips.measure, **limits)
    pool = processes(cfg.workers, len(left))
    progress, saved = Progress(len(left)), time.time()
    try:
        results = pool.map(measure, left, chunksize=CHUNK_CLIPS) if pool else map(measure, left)
        for clip, result in zip(left, results):
            facts[clip] = result
            if "error" not in result:
                check = sha(json.dumps(result))
                memo[memo_key(clip, cfg)] = [stamp(clip.path), result, check]
            if progress.due(result.get("seconds", 0)):
                say(measure_line(progress))
            if time.time() - saved > MEMO_SECONDS and not cfg.check:
                saved = time.time()
                write_file(file, json.dumps(memo).encode())
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
        if left and not cfg.check:
            write_file(file, json.dumps(memo).encode())
    return facts


def memo_key(clip, cfg):
    return json.dumps([*clip, cfg.silence_db])


def from_memo(memo, clip, cfg):
    """What was measured before, or None where the file has changed since, or the memo itself."""
    entry = memo.get(memo_key(clip, cfg))
    if not isinstance(entry, list) or len(entry) != 3:
        return None
    then, facts, check = entry
    if check != sha(json.dumps(facts)) or then != stamp(clip.path):
        return None
    return facts if facts["seconds"] <= cfg.max_seconds else None


def processes(workers, count):
    """A pool for so many clips, or None where one process is as fast."""
    workers = min(workers or os.cpu_count() or 1, count // PROCESS_CLIPS)
    if workers <= 1:
        return None
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    return ProcessPoolExecutor(workers, context, live_with_the_parent)


def live_with_the_parent():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it, too, and stops the others
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=end_with_the_parent, daemon=True).start()


def end_with_the_parent():
    """A worker whose parent was killed would wait for its next clip for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def measure_line(progress):
    rate = progress.done / progress.elapsed
    left = (progress.count - progress.done) / rate
    return (f"checked {progress.done}/{progress.count} | {length_of(progress.seconds / 3600)} | "
            f"{progress.seconds / progress.elapsed:.0f} s audio/s | {rate:.0f} clips/s | {clock(left)} left")


# ------------------------------------------------------------------------------------------------ cut


def cut_long(work):
    """Rows with word times become rows of pieces; recordings without text become clips/ to be transcribed."""
    cfg, rows, table = work.cfg, [], []
    cutting = Cutting(
        shortest=cfg.slice_min_seconds,
        longest=cfg.slice_max_seconds,
        pause=cfg.slice_min_interval,
        keep=cfg.slice_max_silence,
    )
    sweep(work.out / "clips", r"\d{4,}_\d{4,}\.wav")
    for row in work.rows:
        try:
            seconds = seconds_to_cut(row, cfg)
            if not seconds:
                rows.append(row)
                continue
            work.changes["recordings cut"] += 1
            if "alignment" in row:
                rows += cut_at_words(row, seconds, cutting)
            elif work.hear and "text" not in row:
                rows += cut_to_hear(row, cfg, cutting)
            else:
                cut_at_silences(row, seconds, table, work, cutting)
        except Invalid as e:
            work.refuse(row, e)
    work.changes["clips to be transcribed"] = len(table)
    if table and not cfg.check:
        write_table(table, work)
    work.rows = rows


def seconds_to_cut(row, cfg):
    """The length of a recording that is to be cut, 0 for a row that stays as it is."""
    whole = "audio" in row and not {"messages", "start", "end"} & row.keys()
    if not whole or not (cfg.slice or "alignment" in row):
        if "text" not in row and "turns" not in row and not cfg.transcriber:
            raise Invalid("no text for this part of a recording")
        return 0
    seconds = audio.info(row["audio"]).seconds
    fits = seconds <= cfg.max_seconds and "text" in row
    cut_anyway = cfg.slice and "alignment" in row
    return 0 if fits and not cut_anyway else seconds


def cut_at_words(row, seconds, cutting):
    """A row for each piece, with the words whose middle lies within it."""
    words = words_in(row["alignment"])
    pauses = []
    for word, following in zip(words, words[1:]):
        pauses.append(Span(word.end, following.start))
    end = min(words[-1].end, seconds)
    spans = clips.pieces(Speech(words[0].start, end, pauses), cutting)
    rest = {key: value for key, value in row.items() if key != "duration"}
    rows = []
    for k, span in enumerate(spans, 1):
        # What lies outside of the speech by an error of the word times belongs to the outermost pieces.
        first = span.start if k > 1 else 0
        last = span.end if k < len(spans) else math.inf
        said = [word.text for word in words if first <= word.middle < last]
        piece = {"id": f"{row['id']}_{k:04d}", "text": " ".join(said)}
        rows.append({**rest, **piece, **span._asdict()})
    return rows


def cut_to_hear(row, cfg, cutting):
    """A row for each piece between silences; its text comes from the transcriber."""
    rest = {key: value for key, value in row.items() if key != "duration"}
    rows = []
    for k, span in enumerate(spans_of_speech(row, cfg, cutting), 1):
        rows.append({**rest, "id": f"{row['id']}_{k:04d}", **span._asdict()})
    if not rows:
        raise Invalid("no sound above --silence_db, so there is nothing to cut")
    return rows


def spans_of_speech(row, cfg, cutting):
    speech = clips.find_speech(row["audio"], cfg.silence_db, cfg.slice_hop, cutting)
    return clips.pieces(speech, cutting)


def cut_at_silences(row, seconds, table, work, cutting):
    """Write the pieces into clips/, and their names into the table to which texts will be added."""
    cfg, number = work.cfg, work.changes["recordings cut"]
    spans = spans_of_speech(row, cfg, cutting)
    folder = work.out / "clips"
    for k, (start, end) in enumerate(spans, 1):
        name = f"{number:04d}_{k:04d}.wav"  # numbers only: no text of a manifest becomes a file name
        table.append([name, "", row["audio"], start, end])
        if not cfg.check:
            folder.mkdir(parents=True, exist_ok=True)
            wave, rate = audio.read(row["audio"], None, start, end)
            audio.write(folder / name, wave, rate)
    if "text" in row:
        raise Invalid(f"{seconds:.1f} s, one text, no word times; "
                      f"{len(spans)} clips of it are to be transcribed")


def write_table(table, work):
    """clips/clips.csv, which is an --input as soon as somebody has filled in the texts."""
    path = work.out / "clips" / "clips.csv"
    lines = read_table(path, ",") if is_file(path) else ()
    texts = [raw.get("text") for _, raw in lines if isinstance(raw, dict)]
    if any(texts) and not work.cfg.overwrite:
        raise Invalid(f"{path} holds transcripts already; give it as --input, or --overwrite it")
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["filename", "text", "recording", "from", "to"])
    writer.writerows(table)
    write_file(path, text.getvalue().encode("utf-8", "surrogateescape"))
    say(f"{len(table)} clips; write what is said into the column text of {path}, then --input {path}")


# ------------------------------------------------------------------------------------------------ hear


def transcribe(work, file):
    """Let the transcriber say what is said in recordings without text. What it has heard once is in the memo.

    Such rows name it as their `transcriber`, in the manifests, too: a machine's words are not a person's.
    """
    memo, name = read_memo(file), work.cfg.transcriber
    silent = [row for row in work.rows if not {"text", "turns", "messages"} & row.keys()]
    progress, saved = Progress(len(silent)), time.time()
    if silent:
        say(f"{len(silent)} recordings without text are heard by {name} ...")
    try:
        for row in silent:
            try:
                row |= {"text": heard(row, work, memo), "transcriber": name}
            except Invalid as e:
                work.refuse(row, f"{name}: {e}")
            if progress.due(0):
                say(f"heard {progress.done}/{progress.count}, {clock(progress.elapsed)}")
            if time.time() - saved > MEMO_SECONDS and not work.cfg.check:
                saved = time.time()
                write_file(file, json.dumps(memo).encode())
    finally:
        if silent and not work.cfg.check:
            write_file(file, json.dumps(memo).encode())
    work.rows = [row for row in work.rows if row.keys() & {"text", "turns", "messages"}]


def heard(row, work, memo):
    """The text of one recording, or of its part, in one line."""
    clip, name = clip_of(row), work.cfg.transcriber
    module = sys.modules[name.partition(":")[0]]
    now = [stamp(clip.path), stamp(module.__file__)]  # another model in that file hears other words
    key = json.dumps([*clip, name])
    known = memo.get(key)
    if isinstance(known, list) and known[:2] == now:
        return known[2]
    try:
        with part_of(clip) as path:
            text = work.hear(path)
    except Exception as e:  # somebody else's function may raise anything, and one clip is not all
        raise Invalid(f"{type(e).__name__}: {e}") from None
    if not isinstance(text, str) or not text.strip():
        raise Invalid(f"it gave {text!r}, expected a text")
    text = one_line(text)
    memo[key] = [*now, text]
    return text


@contextlib.contextmanager
def part_of(clip):
    """The path of a recording; of a part of one a file is written that lives as long as it is heard."""
    if clip.start is None and clip.end is None:
        yield clip.path
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part.wav"
        audio.write(path, *audio.read(clip.path, None, clip.start, clip.end))
        yield str(path)


# ------------------------------------------------------------------------------------------------ judge

# What looks like a special token of some tokenizer.
SPECIAL = re.compile(r"<\|[^|<>]{1,40}\|>|</?s>|<(?:unk|pad|bos|eos)>|\[/?INST\]", re.I)
SILENT_DB = -60.0  # RMS; the noise of a bad microphone is louder
QUIET_DB = -45.0  # RMS; speech is recorded at about -20
LIMIT_PEAK = 1.001  # of a float file, whose samples may have been rounded
LOSSY = ("MPEG", "OGG", "MP3")
LOSSY_PEAK = 2.0  # their decoders overshoot by nature
CLIPPED_SHARE = 0.001  # of the samples; fewer are single peaks that nobody hears
LONG_SILENCE = 0.5  # seconds at an end; a model that is trained on more learns to pause
TRIM_SLACK = 0.005  # seconds: half of a frame, and silence is not known any finer
DURATION_SLACK = 0.1  # seconds: manifests round
DURATION_SHARE = 0.01  # of the clip: lengths of mp3 are estimates
HEADROOM_DB = -0.1  # of full scale, for peaks: resampling moves them a little
PACE_ROWS = 8  # a median of fewer says nothing
PACE_FACTOR = 3  # slower or faster than the others: nobody speaks so, the text is another one


def clean(text, normalise=None):
    """NFC, and what every script does to a text."""
    text = one_line(unicodedata.normalize("NFC", text))
    return clean(called(normalise, text, "normalizer")) if normalise else text


def called(function, text, flag):
    """The text that somebody's function makes of one; where it fails, that costs this text alone."""
    try:
        made = function(text)
    except Exception as e:
        raise Invalid(f"--{flag}: {type(e).__name__}: {shown(e, 200)}") from None
    if not isinstance(made, str):
        raise Invalid(f"--{flag} gave {shown(repr(made))}, expected a text")
    return made


def hook(name, flag="normalizer", example="my_text:expand"):
    """The function that a flag names, from the working directory or an installed package."""
    module, _, function = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
        if not callable(found):
            raise TypeError(f"{function} is no function")
        return found
    except Exception as e:  # somebody else's module may do anything
        what = f"expected module:function, such as {example}"
        raise configs.Usage(f"--{flag} {name}: {e}; {what}") from None
    finally:
        sys.path.remove(os.getcwd())


def judge_all(work, facts):
    """Leave good rows, clean, trimmed and levelled; the others are bad."""
    rows = []
    for row in work.rows:
        try:
            notices = judge(row, facts, work)
        except Invalid as e:
            work.refuse(row, e)
            continue
        rows.append(row)
        work.notices += notices
    work.rows = rows
    work.notices += compare(rows)


def judge(row, facts, work):
    """Clean the texts, trim and level the audio of one row, in place. -> notices; raises Invalid."""
    notices, total = [], 0.0
    for holder in holders(row):
        notices += clean_texts(holder, row, work)
        if "ref_audio" in holder:
            error = facts[Clip(holder["ref_audio"])].get("error")
            if error:
                raise Invalid(f"ref_audio {holder['ref_audio']}: {error}")
        of_message = holder.get("type") == "audio"  # looked at, and left as it is
        if "audio" not in holder or of_message and holder["audio"] == row.get("audio"):
            continue
        sound = dict(facts[clip_of(holder)])
        # A row of a folder stands where its recording is, which need not be named twice.
        name = "" if row["at"].file == holder["audio"] else f"{holder['audio']}: "
        check_sound(sound, name, work.cfg)
        if holder is row:
            notices += compare_with_manifest(row, sound)
        notices += notices_of(row, sound)
        seconds = sound["seconds"]
        if not of_message:
            seconds -= trim(holder, sound, work)
        if max(sound["head"], sound["tail"]) > LONG_SILENCE:
            what = f"{sound['head']:.2f} s before and {sound['tail']:.2f} s after the speech"
            notices.append(Notice(row, "silence", f"{what}; --trim 0.2 would cut it"))
        if not of_message:
            level(holder, sound, work)
        total += seconds
        if holder is row:
            row |= {"duration": round(seconds, 3), "sample_rate": sound["rate"], "facts": sound}
    if "audio" not in row:
        row["duration"] = round(total, 3)
    return notices


def clean_texts(holder, row, work):
    """Clean the texts of a row, a turn or a part, in place. -> notices"""
    notices = []
    for key in ("text", "ref_text"):
        if key not in holder:
            continue
        before = holder[key]
        cleaned = clean(before, work.normalise)
        if "type" in holder:  # a part of a message: its lines mean something
            cleaned = "\n".join(clean(line, work.normalise) for line in before.splitlines())
        text = holder[key] = cleaned
        check_text(text, f"{key} after cleaning")
        work.changes["texts changed"] += before != text
        controls = {f"U+{ord(c):04X}" for c in before if is_control(c)}
        if controls:
            names = ", ".join(sorted(controls))
            notices.append(Notice(row, "control characters", f"{names} taken out of the text"))
        tokens = set(SPECIAL.findall(text))
        if tokens:
            names = ", ".join(sorted(tokens))
            notices.append(Notice(row, "special token", f"{names} is kept as plain text"))
    return notices


def check_sound(sound, name, cfg):
    """Invalid where the sound cannot be trained on; the message begins with the name."""
    error = sound.get("error")
    if error:
        raise Invalid(name + error + ("; --max_seconds" if "longer than" in error else ""))
    seconds = sound["seconds"]
    if seconds < cfg.min_seconds:
        raise Invalid(f"{name}{seconds:.2f} s is shorter than --min_seconds {cfg.min_seconds:g}")
    if sound["rms"] < SILENT_DB:
        raise Invalid(f"{name}silence (RMS {sound['rms']:.0f} dB of full scale)")
    peak = sound["peak"]
    limit = LOSSY_PEAK if sound["format"].startswith(LOSSY) else LIMIT_PEAK
    if peak > limit and not cfg.loudness:
        remedy = "--loudness peak:-1 would bring every clip down"
        raise Invalid(f"{name}the peak is {peak:.3g}, above 1; {remedy}")


def compare_with_manifest(row, sound):
    """Notices where the manifest says something else than the file."""
    notices = []
    seconds, rate = sound["seconds"], sound["rate"]
    error = abs(row.get("duration", seconds) - seconds)
    if error > DURATION_SLACK + DURATION_SHARE * seconds:
        what = f"{row['duration']:g} s in the manifest, {seconds:.2f} s in the file"
        notices.append(Notice(row, "duration", what))
    if row.get("sample_rate", rate) != rate:
        what = f"{row['sample_rate']:g} in the manifest, {rate} in the file"
        notices.append(Notice(row, "sample rate", what))
    return notices


def notices_of(row, sound):
    notices = []
    if sound["clipped"] > CLIPPED_SHARE:
        what = f"{100 * sound['clipped']:.1f} % of the samples are at full scale"
        notices.append(Notice(row, "clipping", what))
    if sound["rms"] < QUIET_DB:
        notices.append(Notice(row, "level", f"{sound['rms']:.0f} dB of full scale is very quiet"))
    return notices


def trim(holder, sound, work):
    """Cut the silence at both ends down to --trim. -> seconds that are gone"""
    keep, head, tail = work.cfg.trim, sound["head"], sound["tail"]
    if keep < 0 or max(head, tail) <= keep + TRIM_SLACK:
        return 0.0
    before = max(0.0, head - keep)
    behind = max(0.0, tail - keep)
    start = holder.get("start", 0)
    holder["start"] = round(start + before, 3)
    holder["end"] = round(start + sound["seconds"] - behind, 3)
    sound["head"] = min(head, keep)
    sound["tail"] = min(tail, keep)
    work.changes["clips trimmed"] += 1
    work.changes["seconds trimmed"] += before + behind
    return before + behind


def level(holder, sound, work):
    """A gain that brings the clip to --loudness, but never above full scale."""
    if not work.cfg.loudness:
        return
    kind, target = work.cfg.loudness.split(":")
    peak = float(clips.decibels(sound["peak"] ** 2))
    gain = float(target) - (sound["rms"] if kind == "rms" else peak)
    holder["gain_db"] = round(min(gain, HEADROOM_DB - peak), 2)
    work.changes["clips levelled"] += 1


def compare(rows):
    """Notices that need all rows: the same audio, the same text of one speaker, an odd pace."""
    notices, first = [], {}
    for row in rows:
        for key in twin_keys(row):
            other = first.setdefault(key, row)
            if other is not row:
                notices.append(Notice(row, key[0], f"the same as {other['id']} ({other['at']})"))
    single = [row for row in rows if "text" in row]
    if len(single) < PACE_ROWS:
        return notices
    middle = statistics.median(map(pace, single))
    for row in single:
        if not middle / PACE_FACTOR <= pace(row) <= middle * PACE_FACTOR:
            what = f"{pace(row):.1f} characters per second, the others about {middle:.1f}"
            notices.append(Notice(row, "pace", f"{what}: is this the right text?"))
    return notices


def twin_keys(row):
    """What no two rows should share, behind the name of the notice."""
    keys = []
    if "facts" in row:
        cut = row.get("start"), row.get("end")
        keys.append(("duplicate audio", row["facts"]["sha"], cut))
    if "text" in row:
        keys.append(("duplicate text", row.get("speaker"), row["text"]))
    return keys


def pace(row):
    """Characters per second."""
    return len(row["text"]) / row["duration"]


# ------------------------------------------------------------------------------------------------ split


def split(rows, share, seed):
    """-> ids of the validation rows: of each speaker about `share`, and never a recording on both sides.

    Rows of one file, with the same bytes or with the same text are one recording. Which ones are chosen
    depends on the seed and on their own ids, so that a new row moves no other.
    """
    recordings = recordings_of(rows)
    by_speaker, val_ids = collections.defaultdict(list), set()
    for members in recordings:
        first_id = min(row["id"] for row in members)
        speaker = speaker_of(members[0])
        by_speaker[speaker].append((sha(seed, first_id), members))
    for groups in by_speaker.values():
        left = round(share * sum(len(members) for _, members in groups))
        in_order = sorted(groups, key=lambda group: group[0])
        for _, members in in_order[:-1]:  # one recording always stays to train on
            if len(members) <= left:
                left -= len(members)
                val_ids.update(row["id"] for row in members)
    if share > 0 and not val_ids and len(recordings) > 1:  # too few of every speaker; one is better than none
        groups = max(by_speaker.values(), key=len)
        if len(groups) == 1:
            groups = sum(by_speaker.values(), [])
        _, members = min(groups, key=lambda group: (len(group[1]), group[0]))
        val_ids.update(row["id"] for row in members)
    return val_ids


def speaker_of(row):
    return str(row.get("speaker"))


def recordings_of(rows):
    """Lists of rows that have to stay on one side of the split."""
    parent = {}  # of a row's number or a key; what has one root belongs together

    def root(x):
        while parent.setdefault(x, x) != x:
            parent[x] = x = parent[parent[x]]
        return x

    for i, row in enumerate(rows):
        for key in recording_keys(row):
            parent[root(key)] = root(i)
    together = collections.defaultdict(list)
    for i, row in enumerate(rows):
        together[root(i)].append(row)
    return list(together.values())


def recording_keys(row):
    """What rows of one recording share."""
    keys = [("audio", voice["audio"]) for voice in voices(row) if "audio" in voice]
    if "text" in row:
        keys.append(("text", " ".join(row["text"].casefold().split())))
    if "facts" in row:
        keys.append(("bytes", row["facts"]["sha"]))
    return keys


def add_references(work):
    """Write ref_audio: the clip itself, or another one of its speaker from the same side of the split."""
    # (speaker, whether of validation) -> rows. A validation row that is alone takes one of the training rows.
    pools = collections.defaultdict(list)
    longest = work.cfg.max_seconds
    for row in work.rows:
        if "audio" in row and row["facts"]["whole"] <= longest:
            side = row["id"] in work.val_ids
            pools[speaker_of(row), side].append(row)
    for row in work.rows:
        if "audio" not in row or "ref_audio" in row:
            continue
        choices = [[row]]
        if work.cfg.ref == "other":
            speaker, side = speaker_of(row), row["id"] in work.val_ids
            choices = [pools[speaker, side], pools[speaker, False]]
        found = (reference_from(pool, row, work.cfg) for pool in choices)
        other = next(filter(None, found), None)
        if other is None:
            work.changes["rows without another clip of the speaker"] += 1
            continue
        row["ref_audio"] = other["audio"]
        if "start" not in other:
            row["ref_text"] = other["text"]


def reference_from(pool, row, cfg):
    """A row of the pool, drawn for this one, or None; with --ref other never the row itself."""
    draw = random.Random(f"{cfg.seed} {row['id']}")
    two = draw.sample(pool, min(2, len(pool)))  # one of them is another row
    others = [other for other in two if other is not row or cfg.ref == "same"]
    if others and others[0]["facts"]["whole"] <= cfg.max_seconds:
        return others[0]
    return None


# ------------------------------------------------------------------------------------------------ report

# Two characters for private use: a tokenizer that has neither and cannot spell bytes gives both one id.
WORST = 20  # clips to listen to: three minutes
PLAYER_SECONDS, PLAYER_RATE = 8, 16000  # of each, so that the page stays below 7 MB and can be mailed
# Tokens per character from which a script is told: English takes a quarter, Chinese about one, and what a
# tokenizer spells in bytes two or three.
FOREIGN_TOKENS = 1.5
SPEAKER_PLAYERS = 12  # speakers that can be heard: as many as anybody compares, and 3 MB
PLAYER_TEXT = 300  # characters: about twice as many as are spoken in that time


def for_checkpoint(model, cache, rows, work):
    """What this checkpoint makes of the rows: tokens, unknown pieces, steps per epoch, hours to train on.

    Without a cache (--check) the audio positions of all rows are estimated from one clip. -> (facts, notices)
    """
    cfg = work.cfg
    texts = [text_of(row) for row in rows]
    unknown = Unknown(model)
    tokens = [len(model.encode_text(text)) for text in texts]
    if cache is not None:
        lengths = [model.length(cache.get(row)) for row in rows]
    else:
        lengths = estimate(model, rows, tokens)
    most = cfg.max_batch_tokens // cfg.batch_size if cfg.max_batch_tokens else math.inf
    notices, kept = [], []
    for row, text in zip(rows, texts):
        if unknown.pieces(text):
            notices.append(unknown_notice(row, text, unknown.pieces(text)))
    for row, length in zip(rows, lengths):
        if length <= most:
            kept.append(row)
            continue
        what = f"{length} positions, training drops more than max_batch_tokens / batch_size = {most}"
        notices.append(Notice(row, "too many tokens", what))
    counts = collections.Counter(piece for text in texts for piece in unknown.pieces(text))
    scripts = tokens_by_script(texts, tokens)
    for script, ratio in scripts.items():
        if ratio > FOREIGN_TOKENS:
            one = next(row for row, text in zip(rows, texts) if script_of(text) == script)
            what = f"{ratio:.1f} tokens per character of {script} text: the tokenizer has hardly met it"
            notices.append(Notice(one, "foreign script", what))
    lower = [row for row in rows if row.get("sample_rate", math.inf) < model.sample_rate]
    if lower:  # one line for all: a data set has mostly one rate
        what = f"{len(lower)} clips lie below the codec's {model.sample_rate} Hz; what is above stays silent"
        notices.append(Notice(lower[0], "sample rate", what))
    to_train = [row for row in kept if row["id"] not in work.val_ids]
    micro_batches = math.ceil(len(to_train) / cfg.batch_size)
    facts = {
        "backbone": model.backbone,
        "sample_rate": model.sample_rate,
        "text tokens": sum(tokens),
        "positions": sum(lengths),
        "longest": max(lengths, default=0),
        "rows dropped by max_batch_tokens": len(rows) - len(kept),
        "hours kept": hours(kept),
        "steps per epoch": round(micro_batches / cfg.grad_accum_steps, 2),
        "clips with a lower sample rate": len(lower),
        "tokens per character": scripts,
        "unknown pieces": dict(counts.most_common()),
    }
    return facts, notices


def script_of(text):
    """The script that most letters of a text are of, as Unicode calls it: LATIN, ARABIC, CJK, HIRAGANA."""
    letters = [c for c in text if unicodedata.category(c)[0] == "L"]
    names = [re.split("[ -]", unicodedata.name(c, "UNNAMED"))[0] for c in letters]
    return collections.Counter(names).most_common(1)[0][0] if names else "no letters"


def tokens_by_script(texts, tokens):
    """{script: tokens per character} of the texts that are written in it, the most used script first."""
    characters, ids = collections.Counter(), collections.Counter()
    for text, count in zip(texts, tokens):
        script = script_of(text)
        characters[script] += len(text)
        ids[script] += count
    return {script: round(ids[script] / max(1, n), 3) for script, n in characters.most_common()}


def text_of(row):
    """All that is said in a row, or in a conversation."""
    parts = [row] if "text" in row else holders(row)
    return " ".join(part["text"] for part in parts if "text" in part)


def spelled_out(piece):
    """A character with its number, since a font may lack it."""
    return f"{piece} (U+{ord(piece):04X})" if len(piece) == 1 else piece


def unknown_notice(row, text, pieces):
    names = ", ".join(map(spelled_out, sorted(set(pieces))))
    share = 100 * sum(map(len, pieces)) / len(text)
    return Notice(row, "unknown tokens", f"no token for {names}: {share:.1f} % of the text")


def estimate(model, rows, tokens):
    """Lengths by the positions per second of the clip that lies nearest to the median."""
    seconds = [row["duration"] for row in rows]
    middle = statistics.median(seconds)
    one = min(range(len(rows)), key=lambda i: abs(seconds[i] - middle))
    with torch.inference_mode():
        example = model.encode(for_encode(rows[one]))
    rate = (model.length(example) - tokens[one]) / seconds[one]
    return [count + math.ceil(rate * s) for count, s in zip(tokens, seconds)]


def hours(rows):
    return round(sum(row["duration"] for row in rows) / 3600, 4)


class Standout(NamedTuple):
    """A clip that is unlike the others."""

    score: float
    row: dict
    why: list[str]


def worst(rows, notices):
    """The clips that stand out most, of those that have a notice: listen to these first."""
    kinds = collections.defaultdict(list)
    for notice in notices:
        kinds[notice.row["id"]].append(notice.kind)
    single = [row for row in rows if "facts" in row and "text" in row]
    noticed = [row for row in single if kinds[row["id"]]]
    if not noticed:
        return []
    usual_pace = statistics.median(map(pace, single))
    usual_level = statistics.median(row["facts"]["rms"] for row in single)
    found = []
    for row in noticed:
        facts, why = row["facts"], kinds[row["id"]]
        # One point is a factor of e in pace, 10 dB, a second of silence, 2 % of clipped samples, or a notice.
        score = abs(math.log(pace(row) / usual_pace))
        score += abs(facts["rms"] - usual_level) / 10
        score += facts["head"] + facts["tail"]
        score += 50 * facts["clipped"] + len(why)
        found.append(Standout(score, row, why))
    found.sort(key=lambda one: (-one.score, one.row["id"]))
    return found[:WORST]


def write_report(work):
    """report.json and report.html: the same facts, for programs and for people."""
    work = in_order(work)
    standouts = worst(work.rows, work.notices)
    data = report_data(work, standouts)
    facts = [f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in data.items()]
    text = "{" + ",\n".join(facts) + "}\n"  # one fact per line
    write_file(work.out / "report.json", text.encode("utf-8", "backslashreplace"))
    html = report_page(work, standouts, data)
    page.write(work.out / "report.html", html)


def in_order(work):
    """The same, with its faults and notices in the order of the inputs."""
    file_rank = {about["input"]: i for i, about in enumerate(work.inputs)}
    row_rank = {row["id"]: i for i, row in enumerate(work.rows)}

    def rank_of_fault(fault):
        return file_rank.get(fault.at.file, -1), fault.at.line

    def rank_of_notice(notice):
        return row_rank.get(notice.row["id"], -1)

    bad = sorted(work.bad, key=rank_of_fault)
    notices = sorted(work.notices, key=rank_of_notice)
    return dataclasses.replace(work, bad=bad, notices=notices)


def report_data(work, standouts):
    rows = work.rows
    speakers = speaker_totals(work)
    train, val = work.sides().values()
    totals = {
        "rows": len(rows),
        "hours": hours(rows),
        "speakers": len(speakers),
        "dropped": len(work.bad),
        "train rows": len(train),
        "train hours": round(hours(rows) - hours(val), 4),
        "val rows": len(val),
        "val hours": hours(val),
    }
    by_machine = sum("transcriber" in row for row in rows)
    if by_machine:
        totals["rows with a text that a machine heard"] = by_machine
    dropped = []
    for fault in work.bad:
        dropped.append({**fault.at._asdict(), "reason": fault.reason})
    notices = []
    for row, kind, what in work.notices:
        at = row["at"]._asdict()
        notices.append({**at, "id": row["id"], "kind": kind, "what": what})
    strangest = []
    for score, row, why in standouts:
        at = row["at"]._asdict()
        strangest.append({"id": row["id"], **at, "score": round(score, 2), "why": why})
    histograms = {}
    for name, values in spread_of(rows).items():
        edges, counts = page.bins(values)
        histograms[name] = {"edges": edges, "counts": counts}
    return {
        "inputs": work.inputs,
        "recordings without a row": work.without_row,
        "totals": totals,
        "speakers": speakers,
        "dropped": dropped,
        "notices": notices,
        "formats": clips_by(rows, "format"),
        "sample rates": clips_by(rows, "rate"),
        "channels": clips_by(rows, "channels"),
        "changed": dict(work.changes),
        "histograms": histograms,
        "worst": strangest,
        "checkpoints": work.checkpoints,
        "inputs_of": work.made_of or real_paths(work.cfg.input),
        "written": work.written,
    }


def clips_by(rows, fact):
    """{value of a fact, as text: clips that have it}"""
    values = [str(row["facts"][fact]) for row in rows if "facts" in row]
    return dict(collections.Counter(values))


def speaker_totals(work):
    """{speaker: {clips, hours, number}}; a conversation counts for each one who speaks in it."""
    totals = {}
    for name, number in work.numbers.items():
        totals[name] = {"clips": 0, "hours": 0.0, "number": number}
    for row in work.rows:
        names = {str(voice["speaker"]) for voice in speaking([row])}
        for name in names or {""}:
            total = totals.setdefault(name, {"clips": 0, "hours": 0.0})
            total["clips"] += 1
            total["hours"] = round(total["hours"] + row["duration"] / 3600, 5)
    return totals


def spread_of(rows):
    """{what: its value for each clip}"""
    single = [row for row in rows if "facts" in row]
    facts = [row["facts"] for row in single]
    return {
        "duration in seconds": [row["duration"] for row in single],
        "characters per second": [pace(row) for row in single if "text" in row],
        "level in dB of full scale (RMS)": [fact["rms"] for fact in facts],
        "samples at full scale in %": [100 * fact["clipped"] for fact in facts],
        "silence before the speech in seconds": [fact["head"] for fact in facts],
        "silence after the speech in seconds": [fact["tail"] for fact in facts],
    }


def length_of(hours_of_audio):
    """As people say it: minutes below an hour."""
    if hours_of_audio < 1:
        return f"{60 * hours_of_audio:.1f} min"
    return f"{hours_of_audio:.2f} h"


def spelled(facts):
    """Facts with hours as people say them: {"train hours": 0.5} is {"train length": "30.0 min"}."""
    found = {}
    for name, value in facts.items():
        if "hours" in name:
            found[name.replace("hours", "length")] = length_of(value)
        else:
            found[name] = value
    return found


def report_page(work, standouts, data):
    changes = {name: round(value, 2) for name, value in work.changes.items() if value}
    inputs = []
    for about in work.inputs:
        *cells, unread = about.values()
        inputs.append([*cells, ", ".join(unread)])
    histograms = []
    for name, values in spread_of(work.rows).items():
        histograms.append(page.histogram(values, name))
    counts = [counts_section(name, data[name]) for name in ("formats", "sample rates", "channels")]
    pieces = [
        page.facts(spelled(data["totals"]) | changes),
        page.section("Inputs", page.table(["input", "shape", "rows", "bad", "nobody reads"], inputs)),
        without_row_section(work.without_row),
        bad_section(work.bad),
        notices_section(work.notices),
        page.section("How the clips are spread", page.grid(*histograms)),
        page.grid(*counts),
        speakers_section(data["speakers"], work.rows),
        *map(checkpoint_section, work.checkpoints),
        standouts_section(standouts),
    ]
    return page.page("Data report", *pieces)


def without_row_section(paths):
    rows = [[path] for path in paths]
    table = page.table(["recording"], rows, "Every recording has a row.")
    return page.section(f"Recordings that no row names: {len(paths)}", table)


def bad_section(bad):
    rows = [[short(fault.at), fault.reason] for fault in bad]
    table = page.table(["where", "reason"], rows, "No bad rows.")
    return page.section(f"Rows left out: {len(bad)}", table)


def notices_section(notices):
    kinds = collections.Counter(notice.kind for notice in notices)
    rows = []
    for row, kind, what in notices:
        rows.append([short(row["at"]), row["id"], f"{kind}: {what}"])
    table = page.table(["where", "id", "what"], rows, "Nothing.")
    return page.section(f"Worth a look: {len(notices)}", page.facts(kinds), table)


def speakers_section(speakers, clips_of_all):
    """With a clip of each of the first: whether a name is the right voice's is told by ear alone."""
    first = {}
    for row in clips_of_all:
        if "facts" in row:
            first.setdefault(str(row.get("speaker", "")), row)
    rows = []
    for k, (name, total) in enumerate(speakers.items()):
        heard = player(first[name]) if name in first and k < SPEAKER_PLAYERS else ""
        number = total.get("number", "")
        rows.append([name or "(none named)", number, total["clips"], length_of(total["hours"]), heard])
    return page.section("Speakers", page.table(["speaker", "number", "clips", "length", "a clip"], rows))


def standouts_section(standouts):
    rows = []
    for _, row, why in standouts:
        text = page.text(row["text"][:PLAYER_TEXT])
        rows.append([row["id"], page.Piece(player(row) + text), row["duration"], ", ".join(why)])
    heads = ["id", f"the first {PLAYER_SECONDS} seconds, and the text", "length", "why"]
    title = "The clips that stand out most: listen to these first"
    return page.section(title, page.table(heads, rows, "Nothing stands out."))


def short(at):
    """A place by the name of the file alone: paths are long, and a telephone is 400 pixels wide."""
    return str(at._replace(file=Path(at.file).name))


def counts_section(name, counts):
    rows = list(counts.items())
    return page.section(name.capitalize(), page.table(["", "clips"], rows))


def checkpoint_section(about):
    facts = dict(about)
    folder = facts.pop("checkpoint")
    unknown = list(facts.pop("unknown pieces").items())
    scripts = list(facts.pop("tokens per character").items())
    foreign = page.table(["script of the text", "tokens per character"], scripts)
    table = page.table(["no token for", "times"], unknown, "Every character has a token.")
    return page.section(f"For {folder}", page.facts(spelled(facts)), foreign, table)


def player(row):
    start = row.get("start", 0)
    end = min(row.get("end", math.inf), start + PLAYER_SECONDS, row["facts"]["whole"])
    wave, rate = audio.read(row["audio"], None, start, end)
    new_rate = min(rate, PLAYER_RATE)
    return page.player(audio.resample(wave, rate, new_rate), new_rate)


# ------------------------------------------------------------------------------------------------ manifests


def real_paths(paths):
    return sorted(os.path.realpath(path) for path in paths)


def relative(path, folder):
    """Relative to the folder of the manifest where the two share more than the root."""
    path = os.path.realpath(path)
    try:
        shared = os.path.commonpath([path, folder])
    except ValueError:  # other drives
        return path
    return path if os.path.dirname(shared) == shared else os.path.relpath(path, folder)


def manifest(rows, folder):
    """The bytes of a manifest in `folder`."""
    lines, folder = [], os.path.realpath(folder)
    keys = dict.fromkeys(("id", *KEYS, "speaker_id"))  # in this order, the id first
    for row in rows:
        row = copy.deepcopy({key: row[key] for key in keys if key in row})
        for holder in holders(row):
            for key in ("audio", "ref_audio", "alignment"):
                if key in holder:
                    holder[key] = relative(holder[key], folder)
        if isinstance(row.get("emotion"), str):
            row["emotion"] = relative(row["emotion"], folder)
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    # A file name need not be UTF-8; JSON spells it with escapes.
    return "".join(lines).encode("utf-8", "backslashreplace")


def write_manifests(work):
    """train.jsonl and val.jsonl, and the report that says that they are ours."""
    sides, said = work.sides(), []
    for name, side in sides.items():
        # An empty val.jsonl, so that a command that names it runs with a single recording, too.
        many = f"{work.out / name}: {len(side)} rows"
        said.append(many if side else f"{name} is empty: nothing to validate on")
    say(", ".join(said))
    texts = {name: manifest(side, work.out) for name, side in sides.items()}
    hashes = {clips.hash_bytes(text) for text in texts.values()}
    work.written = sorted({*work.written, *hashes})
    write_report(work)  # first, so that a kill in between leaves no manifest that looks foreign
    for name, text in texts.items():
        write_file(work.out / name, text)


def claim(out):
    """Make the output folder and keep others out of it; what is wrong with it is said before the work."""
    probe = out / ".writable"
    write_file(probe, b"")
    probe.unlink(missing_ok=True)
    if not lock(out / ".lock"):
        raise configs.Usage(f"another prepare_data.py is writing into {out}; wait for it or choose another "
                            "--output_dir")


def refuse_foreign(work):
    """Output that exists is only replaced when it came from the same inputs."""
    before = read_memo(work.out / "report.json")
    made_of = before.get("inputs_of")
    for path in (work.out / name for name in MANIFESTS):
        if not is_file(path):
            continue
        if clips.hash_file(path) not in work.written:
            raise Invalid(f"{path} is there already and was not written by this script, or was edited since; "
                          "choose another --output_dir, give it as --input, or --overwrite it")
        if made_of != real_paths(work.cfg.input):
            raise Invalid(f"{path} is there already and was made of {', '.join(made_of or [])}; "
                          "choose another --output_dir or --overwrite it")


# ------------------------------------------------------------------------------------------------ the script


def gather(work):
    """The rows of all inputs, with unique ids, data set numbers and speakers."""
    cfg, ids, names = work.cfg, set(), set()
    inputs, texts, roots = cfg.input, cfg.transcripts, ()
    for flag, place in (("transcripts", texts), ("alignment_dir", cfg.alignment_dir)):
        if place and not os.path.isfile(place) and not os.path.isdir(place):
            raise configs.Usage(f"--{flag} {place}: no such file or folder")
    if is_file(texts):  # a table names the recordings, and the inputs say where they lie
        inputs, texts, roots = [texts], "", tuple(cfg.input)
    for k, path in enumerate(inputs):
        skip = folders_to_skip(work, path)
        need_text = not (cfg.slice or cfg.transcriber)
        how = Reading(cfg.format, texts, cfg.alignment_dir, need_text, roots, skip, cfg.mic)
        try:
            found = read_rows(path, how)
        except Ambiguous as e:
            raise configs.Usage(str(e)) from None
        rows, bad = found.rows, found.bad
        say(f"{path}: read as {found.shape}, {len(rows)} rows" + (f", {len(bad)} bad" if bad else ""))
        say_unread(path, found.unread)
        names |= found.sounds
        about = {"input": str(path), "shape": found.shape, "rows": len(rows), "bad": len(bad)}
        work.inputs.append({**about, "unread": dict(sorted(found.unread.items()))})
        nothing = is_own(path) and not os.path.getsize(path)  # validation rows of a single recording
        if not rows and not bad and not nothing:
            bad = [Fault(Place(str(path)), "holds no rows")]
        work.bad += bad
        for row in rows:
            row["id"] = unused(row["id"], ids, k + 1)
            ids.add(row["id"])
            if len(inputs) > 1:
                row.setdefault("dataset_id", k)
        work.rows += rows
    if not all(map(is_own, inputs)):
        find_recordings_without_row(work, names)
    name_speakers(work)


def folders_to_skip(work, path):
    """What this script writes is no input, unless it is asked for: pieces would be cut once more."""
    own = [os.path.realpath(work.out / name) for name in ("clips", "cache")]
    inside = Path(os.path.realpath(path))
    return tuple(folder for folder in own if not inside.is_relative_to(folder))


def find_recordings_without_row(work, names):
    """Recordings beside those of the rows that no row names: a line lost from a table shows here."""
    skip = folders_to_skip(work, "/")
    work.without_row = without_row(work.rows, names, work.cfg.input, skip)
    if work.without_row:
        count, first = len(work.without_row), work.without_row[0]
        say(f"{count} recordings have no row, such as {first}; all of them are in the report")


# Folders that are called for what lies in them, and not for who speaks.
OF_NOBODY = re.compile(
    r"(wavs?|wav48.*|audios?|clips|data|flac|mp3|sounds?|recordings?|segments|raw|processed)"
    r"|(train|dev|test|valid|val|validation)([-_].*)?", re.I)


def name_speakers(work):
    """Give a speaker to rows that name none: their folder's, or the one that was given."""
    cfg = work.cfg
    unnamed = [row for row in work.rows if "speaker" not in row and "turns" not in row]
    single = [row for row in unnamed if "audio" in row]
    if single and (cfg.speaker_from_folder or cfg.speaker_level):
        names = folder_speakers(single, cfg)
        for row, name in zip(single, names):
            row["speaker"] = name
        some = ", ".join(list(dict.fromkeys(names))[:SOME_SPEAKERS])
        say(f"{len(set(names))} speakers by their folders: {some}; --speaker_level N takes another level")
    elif cfg.speaker:
        for row in unnamed:
            row["speaker"] = cfg.speaker
    count = name_others(work.rows)
    if count:
        say(f"{count} rows name no speaker, unlike others: they are the speaker {UNNAMED!r}; "
            "--speaker NAME gives them another")


SOME_SPEAKERS = 8  # in the log: as many as a line holds


def folder_speakers(rows, cfg):
    """The name of the folder that tells speakers apart, for each row."""
    if cfg.speaker_level:
        return [folder_above(row["audio"], cfg.speaker_level) for row in rows]
    homes = [path if os.path.isdir(path) else os.path.dirname(path) for path in cfg.input]
    homes = [os.path.abspath(home) for home in homes]
    try:
        base = Path(os.path.commonpath(homes))
    except ValueError:  # on several drives
        base = Path(homes[0])
    folders = [folders_below(base, row["audio"]) for row in rows]
    # Corpora begin the names of their files with the speaker, 19_198_000001.wav: that settles it.
    by_file = [folder_in_name(names, row["audio"]) for names, row in zip(folders, rows)]
    if all(by_file):
        return by_file
    level = 0
    for level in range(max(map(len, folders))):
        at_level = {tuple(names[level : level + 1]) for names in folders}
        if len(at_level) > 1:
            break
    else:
        level = 0  # one speaker
    own_name = next((name for name in base.parts[::-1] if not OF_NOBODY.fullmatch(name)), base.name)
    found = []
    for names in folders:
        found.append(names[min(level, len(names) - 1)] if names else own_name)
    return found


def folder_above(path, level):
    above = Path(path).parents
    if level > len(above) or not above[level - 1].name:
        raise configs.Usage(f"--speaker_level {level}: {path} does not lie so deep")
    return above[level - 1].name


def folders_below(base, path):
    """Names of the folders from base down to a recording that may be a speaker's."""
    home = Path(path).parent
    names = home.relative_to(base).parts if home.is_relative_to(base) else (home.name,)
    return [name for name in names if not OF_NOBODY.fullmatch(name)]


def folder_in_name(folders, path):
    """The first of the folders that the name of the file begins with, or None."""
    stem = Path(path).stem
    return next((name for name in folders if stem.startswith((f"{name}_", f"{name}-"))), None)


def encode(folder, work, as_is):
    """Fill the cache for a checkpoint, and report what it makes of the rows."""
    model = models.load(folder, device=work.device, extra=work.cfg.extra)
    model.codec.to(work.device)
    if work.cfg.check:
        cache, rows = None, work.rows
    else:
        cache = ClipCache(work.out / "cache", model)
        rows = fill(cache, folder, work, as_is)
        say(f"{work.out / 'cache'}: {len(rows)} rows ready for {folder}")
    about, notices = for_checkpoint(model, cache, rows, work)
    work.notices += notices
    work.checkpoints.append({"checkpoint": str(folder), **about})
    write_report(work)


def fill(cache, folder, work, as_is):
    """Encode what the manifests hold, as train.py will read it. -> the rows, with what was measured"""
    outputs = [work.out / name for name in MANIFESTS]
    rows = read_manifest(as_is or [path for path in outputs if is_file(path)])
    by_id = {row["id"]: row for row in work.rows}
    for row in work.rows:
        if "facts" in row:  # its bytes have just been read: they are not read again for the key
            path = row["audio"]
            cache.memo[path] = [*stamp(path), row["facts"]["sha"]]
    try:
        cache.add(rows, say)
    except Invalid:
        if not work.cfg.skip_bad or len(cache.failed) == len(work.rows):
            raise
        for name, why in cache.failed.items():
            work.refuse(by_id[name], f"{folder}: {why}")
        work.rows = [row for row in work.rows if row["id"] not in cache.failed]
        write_manifests(work)
        rows = [row for row in rows if row["id"] not in cache.failed]
    for row in rows:
        source = by_id[row["id"]]
        for key in ("at", "duration", "sample_rate"):
            if key in source:
                row.setdefault(key, source[key])
    return rows


def settings(argv):
    cfg = configs.parse(Prepare, argv, script="prepare")
    if not cfg.input or not cfg.output_dir:
        raise configs.Usage("--input and --output_dir are needed; --help lists every setting")
    if cfg.loudness and not re.fullmatch(r"(rms|peak):-?\d{1,3}(\.\d+)?", cfg.loudness):
        raise configs.Usage(f"--loudness {cfg.loudness}: expected rms:-23 or peak:-1")
    if not 0 <= cfg.val_split < 1:
        what = "expected a share from 0 up to, but not including, 1"
        raise configs.Usage(f"--val_split {cfg.val_split}: {what}")
    return cfg


def main(argv=None):
    cfg = settings(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is encoded is written first
    work = Work(cfg, Path(cfg.output_dir))
    if cfg.normalizer:
        work.normalise = hook(cfg.normalizer)
    if cfg.transcriber:
        work.hear = hook(cfg.transcriber, "transcriber", "my_ears:transcribe")
    if cfg.device != "auto":
        work.device = str(models.pick_device(cfg.device))
    elif torch.cuda.is_available():
        work.device = "cuda"

    # ---- what was split once is not split again, and what is not ours is not replaced
    outputs = [os.path.realpath(work.out / name) for name in MANIFESTS]
    as_is = [path for path in cfg.input if cfg.encode_only or os.path.realpath(path) in outputs]
    changes_sound = cfg.slice or cfg.loudness or cfg.trim >= 0
    changes_rows = cfg.normalizer or cfg.transcriber or cfg.skip_bad or cfg.ref != "none"
    if as_is and (as_is != cfg.input or changes_sound or changes_rows):
        raise configs.Usage(f"{as_is[0]} is encoded as it is; "
                            "to change its rows, prepare it into another --output_dir")
    claim(work.out)
    before = read_memo(work.out / "report.json")
    work.written = list(before.get("written", []))
    if as_is:  # so that the command that made them is not refused afterwards
        work.made_of = list(before.get("inputs_of", []))
    if not (as_is or cfg.check or cfg.overwrite):
        refuse_foreign(work)

    # ---- read, cut, measure, judge
    gather(work)
    cut_long(work)
    if work.hear:
        transcribe(work, work.out / "cache" / "heard.json")
    facts = measure_all(clips_in(work.rows), cfg, work.out / "cache" / "facts.json")
    judge_all(work, facts)
    if as_is:
        for row in work.rows:
            if Path(row["at"].file).name == "val.jsonl":
                work.val_ids.add(row["id"])
    else:
        work.val_ids = split(work.rows, cfg.val_split, cfg.seed)
    if cfg.ref != "none":
        add_references(work)
    # A speaker keeps its number when others come.
    for name, about in before.get("speakers", {}).items():
        if "number" in about:
            work.numbers[name] = about["number"]
    number_speakers(work.rows, work.numbers)
    for voice in speaking(work.rows):
        if isinstance(voice["speaker"], str):
            voice["speaker_id"] = work.numbers[voice["speaker"]]

    # ---- report, manifests
    bad, rows, report = work.bad, work.rows, work.out / "report.html"
    refused = bad and not cfg.skip_bad
    if as_is or cfg.check or not rows or refused:
        write_report(work)
    if refused:
        raise Invalid(f"{listing(bad)}\n{len(bad)} bad rows, all in {report}. Nothing else was written. "
                      "Mend them, or leave them out with --skip_bad.")
    if not rows and work.changes["clips to be transcribed"]:
        return
    if not rows:
        raise Invalid(f"no rows left of {', '.join(cfg.input)}; {report} says why")
    if bad:
        say(*listing(bad, 10).split("\n"), f"{len(bad)} bad rows left out")
    if not as_is and not cfg.check:
        write_manifests(work)

    # ---- encode
    for folder in cfg.ckpt_dir:
        encode(folder, work, as_is)
    seconds = sum(row["duration"] for row in work.rows)
    say(f"{len(work.rows)} rows, {length_of(seconds / 3600)}, {len(work.bad)} left out, "
        f"{len(work.notices)} worth a look")
    # A terminal that is not UTF-8 gets escapes: the work is done, and a name must not end it in a fault.
    encoding = sys.stdout.encoding or "utf-8"
    print(str(report).encode(encoding, "backslashreplace").decode(encoding))


if __name__ == "__main__":
    configs.run(main)
