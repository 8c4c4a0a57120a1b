"""Recordings and transcripts, in whatever shape they lie, into rows that can be trained on.

    python prepare_data.py --input my_voice/ --output_dir data --ckpt_dir checkpoints/base

    inputs ──read_rows──▶ rows ──measure──▶ cut, trim, judge ──split──▶ train.jsonl val.jsonl ──model.encode──▶ cache/
                                                       └──▶ report.html report.json

Every row is checked before anything is written, and everything that is wrong is named at once, with file and line.
Killed anywhere, the same command goes on where it was. train.py uses `read_manifest` and `ClipCache` from here.
"""
import collections
import copy
import csv
import hashlib
import importlib
import json
import math
import multiprocessing
import os
import random
import re
import signal
import statistics
import sys
import time
import unicodedata
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

import configs
import models
from models.parts import Invalid, audio, clips, opt, page
from models.parts.cache import READ, ClipCache, clock, read_memo, sha, stamp, write_file
from models.parts.manifests import (KEYS, SHAPES, Ambiguous, check_text, holders, is_file, listing, number_speakers,
                                    read_manifest, read_rows, read_table, unused, words_in)

# ------------------------------------------------------------------------------------------------ settings


@dataclass
class Prepare:
    """Turn recordings and transcripts into train.jsonl, val.jsonl, the cached codes that training reads, and a report."""

    input: list[str] = opt([], "manifests, folders of recordings, or recordings; several are one data set", repeat=True)
    output_dir: str = opt("", "folder for train.jsonl, val.jsonl, report.html, report.json and cache/")
    ckpt_dir: list[str] = opt([], "checkpoints to encode for; none only checks and splits", repeat=True)
    format: str = opt("auto", "shape of every input; list is file|speaker|text or file|speaker|language|text",
                      choices=("auto", *SHAPES))
    transcripts: str = opt("", "table of transcripts, or folder of text files, when they do not lie beside the recordings")
    alignment_dir: str = opt("", "folder of word times (<name>.json) when they do not lie beside the recordings")
    speaker: str = opt("", "speaker of rows that name none")
    speaker_from_folder: bool = opt(False, "the folder that a recording lies in is its speaker")
    normalizer: str = opt("", "module:function from text to text, called on every text")
    min_seconds: float = opt(0.3, "shorter clips are bad rows")
    max_seconds: float = opt(60.0, "longer clips are bad rows, told by their header; with word times they are cut instead")
    silence_db: float = opt(-40.0, "10 ms below this level (dB of full scale, RMS) are silence")
    trim: float = opt(-1.0, "cut silence at both ends down to this many seconds; negative leaves it")
    loudness: str = opt("", "bring every clip to a level by a factor: rms:-23 or peak:-1 (dB of full scale)")
    slice: bool = opt(False, "cut recordings without text at silences into clips/, and those with word times into rows")
    slice_min_seconds: float = opt(4.0, "shortest piece")
    slice_max_seconds: float = opt(15.0, "longest piece, where there is a silence to cut at")
    slice_min_interval: float = opt(0.3, "shortest silence to cut at, in seconds")
    slice_hop: float = opt(0.01, "seconds between two looks at the level")
    slice_max_silence: float = opt(0.5, "longest silence that is left at an end of a piece, in seconds")
    ref: str = opt("none", "write ref_audio: the clip itself, another one of the speaker, or nothing",
                   choices=("same", "other", "none"))
    val_split: float = opt(0.1, "share of each speaker's rows that goes into val.jsonl")
    seed: int = opt(42, "of the split and of --ref other")
    check: bool = opt(False, "write only the report")
    encode_only: bool = opt(False, "check and encode the manifests as they are; nothing is split, cleaned or written anew")
    skip_bad: bool = opt(False, "leave bad rows out and go on; without it they end the run")
    overwrite: bool = opt(False, "replace a train.jsonl and val.jsonl that came from elsewhere")
    batch_size: int = opt(16, "of the training to come; for the report")
    grad_accum_steps: int = opt(1, "of the training to come; for the report")
    max_batch_tokens: int = opt(8192, "of the training to come, which drops rows longer than this / batch_size; 0 none")
    workers: int = opt(0, "processes that check audio; 0 takes one per core")
    device: str = opt("auto", "where the codec runs: auto, cpu, cuda, cuda:1, mps")


# ------------------------------------------------------------------------------------------------ sound: measure, cut, judge


def say(*words):
    print(*words, file=sys.stderr, flush=True)


def measure_all(places, cfg, file):
    """{(path, start, end): facts}, by several processes; what was measured before and has not changed is in the memo."""
    memo, facts = read_memo(file), {}
    places = list(dict.fromkeys(places))
    for p in places:
        then, known, check = (*(memo.get(json.dumps([*p, cfg.silence_db])) or ()), None, None, None)[:3]
        if check and check == sha(json.dumps(known)) and then == stamp(p[0]) and known["seconds"] <= cfg.max_seconds:
            facts[p] = known
    left = [p for p in places if p not in facts]
    jobs = [(*p, cfg.max_seconds, cfg.silence_db) for p in left]
    workers = min(cfg.workers or os.cpu_count() or 1, len(jobs) // 100)  # a process costs as much as a hundred clips
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(workers, context, quiet_worker) if workers > 1 else None
    begun = spoken = saved = time.time()
    heard = 0.0
    try:
        found = pool.map(clips.measure, jobs, chunksize=16) if pool else map(clips.measure, jobs)
        for n, (p, known) in enumerate(zip(left, found), 1):
            facts[p] = known
            heard += known.get("seconds", 0)
            if "error" not in known:
                memo[json.dumps([*p, cfg.silence_db])] = [stamp(p[0]), known, sha(json.dumps(known))]
            now = time.time()
            if now - spoken > 5 or n == len(jobs):
                spoken, rate = now, n / max(now - begun, 1e-9)
                say(f"checked {n}/{len(jobs)} | {heard / 3600:.2f} h | {heard / max(now - begun, 1e-9):.0f} s audio/s | "
                    f"{rate:.0f} clips/s | {clock((len(jobs) - n) / rate)} left")
            if now - saved > 30 and not cfg.check:
                saved = now
                write_file(file, json.dumps(memo).encode())
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
        if left and not cfg.check:
            write_file(file, json.dumps(memo).encode())
    return facts


def quiet_worker():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it and stops the others
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def cut_long(rows, bad, cfg, out):
    """Rows with word times become rows of pieces; recordings without text become clips/ to be transcribed."""
    kept, table, cut = [], [], 0
    lengths = (cfg.slice_min_seconds, cfg.slice_max_seconds, cfg.slice_min_interval, cfg.slice_max_silence)
    for row in rows:
        try:
            plain = "audio" in row and "messages" not in row and "start" not in row and "end" not in row
            total = audio.info(row["audio"]).seconds if plain and (cfg.slice or "alignment" in row) else 0
            if total == 0 and "text" not in row and "turns" not in row:
                raise Invalid("no text for this part of a recording")
            if total == 0 or total <= cfg.max_seconds and "text" in row and not (cfg.slice and "alignment" in row):
                kept.append(row)
                continue
            cut += 1
            if "alignment" in row:
                words = words_in(row["alignment"])
                pauses = [(a[2], b[1]) for a, b in zip(words, words[1:])]
                spans = clips.pieces(words[0][1], min(words[-1][2], total), pauses, *lengths)
                for k, (start, end) in enumerate(spans, 1):
                    first, last = start if k > 1 else 0, end if k < len(spans) else math.inf
                    said = " ".join(w for w, a, b in words if first <= (a + b) / 2 < last)
                    kept.append({**{k: v for k, v in row.items() if k != "duration"}, "id": f"{row['id']}_{k:04d}",
                                 "start": start, "end": end, "text": said})
                continue
            sounding = clips.silences(row["audio"], total, cfg.silence_db, cfg.slice_hop, *lengths[2:])
            spans = clips.pieces(*sounding, *lengths)
            for k, (start, end) in enumerate(spans, 1):
                name = f"{cut:04d}_{k:04d}.wav"  # numbers only: no text of a manifest becomes a file name
                table.append([name, "", row["audio"], start, end])
                if not cfg.check:
                    (out / "clips").mkdir(parents=True, exist_ok=True)
                    audio.write(out / "clips" / name, *audio.read(row["audio"], None, start, end))
            if "text" in row:
                raise Invalid(f"{total:.1f} s, one text, no word times; {len(spans)} clips of it are to be transcribed")
        except Invalid as e:
            bad.append((*row["at"], str(e)))
    if table and not cfg.check:
        where = out / "clips" / "clips.csv"
        there = [raw for _, raw in read_table(where, ",") if isinstance(raw, dict)] if is_file(where) else []
        if any(raw.get("text") for raw in there) and not cfg.overwrite:
            raise Invalid(f"{where} holds transcripts already; give it as --input, or --overwrite it")
        with open(where, "w", encoding="utf-8", newline="") as f:
            csv.writer(f).writerows([["filename", "text", "recording", "from", "to"], *table])
        say(f"{len(table)} clips; write what is said into the column text of {where}, then --input {where}")
    return kept, {"recordings cut": cut, "clips to be transcribed": len(table)}


ODD = re.compile(r"<\|[^|<>]{1,40}\|>|</?s>|<(?:unk|pad|bos|eos)>|\[/?INST\]", re.I)  # looks like a special token


def clean(text, normalise=None):
    """NFC, without BOM and control characters; line breaks and tabs are spaces."""
    text = unicodedata.normalize("NFC", text).replace("\ufeff", "")
    text = "".join(" " if c.isspace() else c for c in text if c.isspace() or unicodedata.category(c) != "Cc").strip()
    return clean(normalise(text)) if normalise else text


def hook(name):
    """The function that --normalizer names, from the working directory or an installed package."""
    module, _, function = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as e:
        raise configs.Usage(f"--normalizer {name}: {e}; expected module:function, such as my_text:expand") from None
    finally:
        sys.path.remove(os.getcwd())


def judge(row, facts, cfg, normalise, done):
    """Clean the texts, trim and level the audio of one row, in place. -> notices [(kind, words)]; raises Invalid."""
    notices, total = [], 0.0
    for holder in holders(row):
        for key in [k for k in ("text", "ref_text") if k in holder]:
            before, holder[key] = holder[key], clean(holder[key], normalise)
            check_text(holder[key], f"{key} after cleaning")
            done["texts changed"] += before != holder[key]
            odd = sorted({f"U+{ord(c):04X}" for c in before if unicodedata.category(c) == "Cc" and not c.isspace()})
            notices += [("control characters", f"{', '.join(odd)} taken out of the text")] if odd else []
            odd = sorted(set(ODD.findall(holder[key])))
            notices += [("special token", f"{', '.join(odd)} is kept as plain text")] if odd else []
        if "ref_audio" in holder and "error" in (f := facts[holder["ref_audio"], None, None]):
            raise Invalid(f"ref_audio {holder['ref_audio']}: {f['error']}")
        part = holder.get("type") == "audio"  # of a message: checked, and left as it is
        if "audio" not in holder or part and holder["audio"] == row.get("audio"):
            continue
        path, start = holder["audio"], holder.get("start", 0)
        f, named = facts[path, holder.get("start"), holder.get("end")], "" if row["at"][0] == path else f"{path}: "
        if "error" in f:
            raise Invalid(f"{named}{f['error']}" + ("; --max_seconds" if "longer than" in f["error"] else ""))
        seconds, head, tail = f["seconds"], f["head"], f["tail"]
        if seconds < cfg.min_seconds:
            raise Invalid(f"{named}{seconds:.2f} s is shorter than --min_seconds {cfg.min_seconds:g}")
        if f["rms"] < -60:
            raise Invalid(f"{named}silence (RMS {f['rms']:.0f} dB of full scale)")
        lossy = re.match("MPEG|OGG|MP3", f["format"])  # their decoders overshoot by nature
        if f["peak"] > (2 if lossy else 1.001) and not cfg.loudness:
            raise Invalid(f"{named}the peak is {f['peak']:.3g}, above 1; --loudness peak:-1 would bring every clip down")
        if holder is row and abs(row.get("duration", seconds) - seconds) > 0.1 + 0.01 * seconds:
            notices.append(("duration", f"{row['duration']:g} s in the manifest, {seconds:.2f} s in the file"))
        if holder is row and row.get("sample_rate", f["rate"]) != f["rate"]:
            notices.append(("sample rate", f"{row['sample_rate']:g} in the manifest, {f['rate']} in the file"))
        if f["clipped"] > 0.001:
            notices.append(("clipping", f"{100 * f['clipped']:.1f} % of the samples are at full scale"))
        if f["rms"] < -45:
            notices.append(("level", f"{f['rms']:.0f} dB of full scale is very quiet"))
        if cfg.trim >= 0 and not part and max(head, tail) > cfg.trim + 0.005:
            off = [max(0.0, s - cfg.trim) for s in (head, tail)]
            holder |= {"start": round(start + off[0], 3), "end": round(start + seconds - off[1], 3)}
            seconds, head, tail = seconds - sum(off), min(head, cfg.trim), min(tail, cfg.trim)
            done["clips trimmed"] += 1
            done["seconds trimmed"] += sum(off)
        if max(head, tail) > 0.5:
            notices.append(("silence", f"{head:.2f} s before and {tail:.2f} s after the speech; --trim 0.2 would cut it"))
        if cfg.loudness and not part:
            kind, target = cfg.loudness.split(":")
            peak = float(clips.decibels(f["peak"] ** 2))
            gain = float(target) - (f["rms"] if kind == "rms" else peak)
            holder["gain_db"] = round(min(gain, -0.1 - peak), 2)  # never above full scale
            done["clips levelled"] += 1
        total += seconds
        if holder is row:
            row |= {"duration": round(seconds, 3), "sample_rate": f["rate"], "facts": {**f, "head": head, "tail": tail}}
    if "audio" not in row:
        row["duration"] = round(total, 3)
    return notices


def compare(rows):
    """Notices that need all rows: the same audio, the same text of one speaker, a pace far from the others'."""
    notices, first = [], {}
    for row in rows:
        keys = [("duplicate audio", row["facts"]["sha"], row.get("start"), row.get("end"))] if "facts" in row else []
        keys += [("duplicate text", row.get("speaker"), row["text"])] if "text" in row else []
        for key in keys:
            if (other := first.setdefault(key, row)) is not row:
                notices.append((row, key[0], f"the same as {other['id']} ({place(other)})"))
    paced = [(len(r["text"]) / r["duration"], r) for r in rows if "text" in r]
    middle = statistics.median(p for p, _ in paced) if len(paced) >= 8 else math.nan
    return notices + [(r, "pace", f"{p:.1f} characters per second, the others about {middle:.1f}: is this the right text?")
                      for p, r in paced if p > middle * 3 or p < middle / 3]


def place(row):
    file, line = row["at"]
    return f"{file} line {line}" if line else file


# ------------------------------------------------------------------------------------------------ splitting


def split(rows, share, seed):
    """-> ids of the validation rows: of each speaker about `share`, and never a recording on both sides.

    Rows of one file, with the same bytes or with the same text are one recording. Which ones are chosen depends on the
    seed and on their own ids, so that a new row moves no other.
    """
    group = {}

    def root(x):
        while group.setdefault(x, x) != x:
            group[x] = x = group[group[x]]
        return x

    for i, row in enumerate(rows):
        keys = {("audio", h["audio"]) for h in (row, *row.get("turns", ())) if "audio" in h}
        keys |= {("text", " ".join(row["text"].casefold().split()))} if "text" in row else set()
        keys |= {("bytes", row["facts"]["sha"])} if "facts" in row else set()
        for key in keys:
            group[root(key)] = root(i)
    together = collections.defaultdict(list)
    for i, row in enumerate(rows):
        together[root(i)].append(row)
    speakers, chosen = collections.defaultdict(list), set()
    for members in together.values():
        speakers[str(members[0].get("speaker"))].append((sha(seed, min(r["id"] for r in members)), members))
    for groups in speakers.values():
        left = round(share * sum(len(m) for _, m in groups))
        for _, members in sorted(groups, key=lambda g: g[0])[:-1]:  # one recording always stays to train on
            if len(members) <= left:
                left -= len(members)
                chosen.update(r["id"] for r in members)
    if share > 0 and not chosen and len(together) > 1:  # too few of every speaker; one recording is better than none
        groups = max(speakers.values(), key=len) if max(map(len, speakers.values())) > 1 else sum(speakers.values(), [])
        chosen.update(r["id"] for r in min(groups, key=lambda g: (len(g[1]), g[0]))[1])
    return chosen


def references(rows, chosen, cfg, done):
    """Write ref_audio: the clip itself, or another one of its speaker from the same side of the split."""
    whole = [r for r in rows if "audio" in r and r["facts"]["whole"] <= cfg.max_seconds]
    pools = collections.defaultdict(list)
    for r in whole:
        pools[str(r.get("speaker")), r["id"] in chosen].append(r)
    for row in rows:
        if "audio" not in row or "ref_audio" in row:
            continue
        speaker = str(row.get("speaker"))
        for pool in (pools[speaker, row["id"] in chosen], pools[speaker, False]) if cfg.ref == "other" else ([row],):
            two = random.Random(f"{cfg.seed} {row['id']}").sample(pool, min(2, len(pool)))
            other = [r for r in two if r is not row or cfg.ref == "same"]
            if other and other[0]["facts"]["whole"] <= cfg.max_seconds:
                row["ref_audio"] = other[0]["audio"]
                if "start" not in other[0]:
                    row["ref_text"] = other[0]["text"]
                break
        else:
            done["rows without another clip of the speaker"] += 1


# ------------------------------------------------------------------------------------------------ report


def for_checkpoint(model, cache, rows, cfg):
    """What this checkpoint makes of the rows: tokens, unknown characters, steps per epoch, hours that training keeps.

    Without a cache (--check) the audio positions of all rows are told from those of one clip. -> (facts, notices)
    """
    spoken = [(r, " ".join(h["text"] for h in ((r,) if "text" in r else holders(r)) if "text" in h)) for r in rows]
    # Two characters for private use: a tokenizer that knows neither and cannot spell them in bytes gives both one id.
    probes = [model.encode_text(c) for c in "\ue123\uf8a7"]
    letters = {c for _, text in spoken for c in text if unicodedata.category(c)[0] in "LMNPS"}
    unknown = {c for c in letters if probes[0] == probes[1] == model.encode_text(c)}
    tokens = [len(model.encode_text(text)) for _, text in spoken]
    if cache is not None:
        lengths = [model.length(cache.get(r)) for r in rows]
    else:
        middle = statistics.median(r["duration"] for r in rows)
        one = min(range(len(rows)), key=lambda i: abs(rows[i]["duration"] - middle))
        with torch.inference_mode():
            example = model.encode({k: rows[one][k] for k in READ if k in rows[one]})
        rate = (model.length(example) - tokens[one]) / rows[one]["duration"]
        lengths = [t + math.ceil(rate * r["duration"]) for t, r in zip(tokens, rows)]
    most = cfg.max_batch_tokens // cfg.batch_size if cfg.max_batch_tokens else math.inf
    kept = [r for r, n in zip(rows, lengths) if n <= most]
    notices = []
    for r, text in spoken:
        if odd := sorted(set(text) & unknown):
            share = 100 * sum(c in unknown for c in text) / len(text)
            names = ", ".join(f"{c} (U+{ord(c):04X})" for c in odd)
            notices.append((r, "unknown tokens", f"no token for {names}: {share:.1f} % of the text"))
    notices += [(r, "too many tokens", f"{n} positions, training drops more than max_batch_tokens / batch_size = {most}")
                for r, n in zip(rows, lengths) if n > most]
    counted = collections.Counter(c for _, text in spoken for c in text if c in unknown)
    return {"backbone": model.backbone, "sample_rate": model.sample_rate, "text tokens": sum(tokens),
            "positions": sum(lengths), "longest": max(lengths, default=0),
            "rows dropped by max_batch_tokens": len(rows) - len(kept),
            "hours kept": round(sum(r["duration"] for r in kept) / 3600, 4),
            "steps per epoch": round(len(kept) / (cfg.batch_size * cfg.grad_accum_steps), 2),
            "clips with a lower sample rate": sum(r.get("sample_rate", math.inf) < model.sample_rate for r in rows),
            "unknown characters": dict(counted.most_common())}, notices


def worst(rows, notices, count=20):
    """The clips that stand out most, whatever the reason: listen to these first. -> [(how far, row, reasons)]"""
    said = collections.defaultdict(list)
    for row, kind, _ in notices:
        said[row["id"]].append(kind)
    single = [r for r in rows if "facts" in r and "text" in r]
    if not single:
        return []
    pace = statistics.median(len(r["text"]) / r["duration"] for r in single)
    level = statistics.median(r["facts"]["rms"] for r in single)
    far = [(abs(math.log(len(r["text"]) / r["duration"] / pace)) + abs(r["facts"]["rms"] - level) / 10 + r["facts"]["head"]
            + r["facts"]["tail"] + 50 * r["facts"]["clipped"] + len(said[r["id"]]), r) for r in single]
    return [(round(f, 2), r, said[r["id"]]) for f, r in sorted(far, key=lambda x: (-x[0], x[1]["id"]))[:count]]


def write_report(out, cfg, rows, chosen, bad, notices, about, done, checkpoints, written, numbers):
    """report.json and report.html: the same facts, for programs and for people."""
    val = [r for r in rows if r["id"] in chosen]
    single = [r for r in rows if "facts" in r]
    speakers = {name: {"clips": 0, "hours": 0.0, "number": n} for name, n in numbers.items()}
    for r in rows:
        for name in {str(t["speaker"]) for t in (r, *r.get("turns", ())) if "speaker" in t} or {""}:
            s = speakers.setdefault(name, {"clips": 0, "hours": 0.0})
            s["clips"], s["hours"] = s["clips"] + 1, round(s["hours"] + r["duration"] / 3600, 5)

    def hours(some):
        return round(sum(r["duration"] for r in some) / 3600, 4)

    values = {"duration in seconds": [r["duration"] for r in single],
              "characters per second": [len(r["text"]) / r["duration"] for r in single if "text" in r],
              "level in dB of full scale (RMS)": [r["facts"]["rms"] for r in single],
              "samples at full scale in %": [100 * r["facts"]["clipped"] for r in single],
              "silence before the speech in seconds": [r["facts"]["head"] for r in single],
              "silence after the speech in seconds": [r["facts"]["tail"] for r in single]}
    order = {r["id"]: i for i, r in enumerate(rows)}
    inputs = {a["input"]: i for i, a in enumerate(about)}
    bad = sorted(bad, key=lambda b: (inputs.get(b[0], -1), b[1]))
    notices = sorted(notices, key=lambda n: order.get(n[0]["id"], -1))
    last = worst(rows, notices)
    data = {"inputs": about,
            "totals": {"rows": len(rows), "hours": hours(rows), "speakers": len(speakers), "dropped": len(bad),
                       "train rows": len(rows) - len(val), "train hours": round(hours(rows) - hours(val), 4),
                       "val rows": len(val), "val hours": hours(val)},
            "speakers": speakers, "dropped": [{"file": f, "line": n, "reason": why} for f, n, why in bad],
            "notices": [{"file": r["at"][0], "line": r["at"][1], "id": r["id"], "kind": kind, "what": what}
                        for r, kind, what in notices],
            "formats": dict(collections.Counter(r["facts"]["format"] for r in single)),
            "sample rates": dict(collections.Counter(str(r["facts"]["rate"]) for r in single)),
            "channels": dict(collections.Counter(str(r["facts"]["channels"]) for r in single)), "changed": done,
            "histograms": {name: dict(zip(("edges", "counts"), page.bins(v))) for name, v in values.items()},
            "worst": [{"id": r["id"], "file": r["at"][0], "line": r["at"][1], "score": far, "why": why}
                      for far, r, why in last],
            "checkpoints": checkpoints, "inputs_of": sorted(os.path.realpath(p) for p in cfg.input), "written": written}
    told = ",\n".join(f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in data.items())  # one fact per line
    write_file(out / "report.json", ("{" + told + "}\n").encode("utf-8", "backslashreplace"))

    def heard(row):
        start = row.get("start", 0)
        wave, rate = audio.read(row["audio"], None, start, min(row.get("end", math.inf), start + 8, row["facts"]["whole"]))
        return page.player(audio.resample(wave, rate, min(rate, 16000)), min(rate, 16000))

    def short(file, line):
        return Path(file).name + (f" line {line}" if line else "")

    def pairs(title, counts):
        return page.section(title, page.table(["", "clips"], list(counts.items())))

    kinds = collections.Counter(kind for _, kind, _ in notices)
    html = page.page(
        "Data report", page.facts(data["totals"] | {k: round(v, 2) for k, v in done.items() if v}),
        page.section("Inputs", page.table(["input", "shape", "rows", "bad"], [list(a.values()) for a in about])),
        page.section(f"Rows left out: {len(bad)}", page.table(
            ["where", "reason"], [[short(f, n), why] for f, n, why in bad], "No bad rows.")),
        page.section(f"Worth a look: {len(notices)}", page.facts(kinds), page.table(
            ["where", "id", "what"],
            [[short(*r["at"]), r["id"], f"{kind}: {what}"] for r, kind, what in notices], "Nothing.")),
        page.section("How the clips are spread", page.grid(*(page.histogram(v, name) for name, v in values.items()))),
        page.grid(*(pairs(name.capitalize(), data[name]) for name in ("formats", "sample rates", "channels"))),
        page.section("Speakers", page.table(
            ["speaker", "number", "clips", "hours"],
            [[k or "(none named)", v.get("number", ""), v["clips"], v["hours"]] for k, v in speakers.items()])),
        *(page.section(f"For {c['checkpoint']}",
                       page.facts({k: v for k, v in c.items() if not isinstance(v, dict) and k != "checkpoint"}),
                       page.table(["unknown character", "times"], list(c["unknown characters"].items()),
                                  "Every character has a token."))
          for c in checkpoints),
        page.section("The clips that stand out most: listen to these first", page.table(
            ["id", "the first 8 seconds, and the text", "length", "why"],
            [[r["id"], page.Piece(heard(r) + page.text(r["text"][:300])), r["duration"],
              ", ".join(why) or "pace, level or silence"] for _, r, why in last])))
    write_file(out / "report.html", html.encode("utf-8", "replace"))


# ------------------------------------------------------------------------------------------------ the script


def relative(path, folder):
    """Relative to the folder of the manifest where the two share more than the root."""
    path = os.path.realpath(path)
    try:
        shared = os.path.commonpath([path, folder])
    except ValueError:  # other drives
        return path
    return path if os.path.dirname(shared) == shared else os.path.relpath(path, folder)


def manifest(rows, folder):
    """The text of a manifest in `folder`."""
    out, folder = [], os.path.realpath(folder)
    for row in rows:
        row = copy.deepcopy({k: row[k] for k in ("id", *KEYS, "speaker_id") if k in row})
        for holder in holders(row):
            holder.update({k: relative(holder[k], folder) for k in ("audio", "ref_audio", "alignment") if k in holder})
        if isinstance(row.get("emotion"), str):
            row["emotion"] = relative(row["emotion"], folder)
        out.append(json.dumps(row, ensure_ascii=False) + "\n")
    return "".join(out).encode("utf-8", "backslashreplace")  # a file name need not be UTF-8; JSON spells it with escapes


def gather(cfg):
    """The rows of all inputs, with unique ids, data set numbers and speakers. -> (rows, bad, [what each input is])"""
    rows, bad, about, ids = [], [], [], set()
    table = cfg.transcripts if is_file(cfg.transcripts) else ""
    for k, path in enumerate([table] if table else cfg.input):
        try:
            found, wrong, shape = read_rows(path, cfg.format, "" if table else cfg.transcripts, cfg.alignment_dir,
                                            not cfg.slice, cfg.input if table else ())
        except Ambiguous as e:
            raise configs.Usage(str(e)) from None
        say(f"{path}: read as {shape}, {len(found)} rows" + (f", {len(wrong)} bad" if wrong else ""))
        about.append({"input": str(path), "shape": shape, "rows": len(found), "bad": len(wrong)})
        bad += wrong if found or wrong else [(str(path), 0, "holds no rows")]
        for row in found:
            row["id"] = unused(row["id"], ids, k + 1)
            ids.add(row["id"])
            if len(cfg.input) > 1 and not table:
                row.setdefault("dataset_id", k)
            if cfg.speaker_from_folder and "audio" in row:
                row.setdefault("speaker", Path(row["audio"]).parent.name)
            elif cfg.speaker and "turns" not in row:
                row.setdefault("speaker", cfg.speaker)
        rows += found
    return rows, bad, about


def refuse_foreign(out, cfg, own):
    """Output that is there already is only replaced when it came from the same inputs. -> hashes of what was written"""
    before = read_memo(out / "report.json")
    written = list(before.get("written", []))
    for name in ("train.jsonl", "val.jsonl") if not (own or cfg.check or cfg.overwrite) else ():
        if is_file(out / name) and clips.hash_file(out / name) not in written:
            raise Invalid(f"{out / name} is there already and was not written by this script, or was edited since; "
                          "choose another --output_dir, give it as --input, or --overwrite it")
        if is_file(out / name) and before.get("inputs_of") != sorted(os.path.realpath(p) for p in cfg.input):
            raise Invalid(f"{out / name} is there already and was made of {', '.join(before.get('inputs_of', []))}; "
                          "choose another --output_dir or --overwrite it")
    return written


def main(argv=None):
    cfg = configs.parse(Prepare, argv, script="prepare")
    if not cfg.input or not cfg.output_dir:
        raise configs.Usage("--input and --output_dir are needed; --help lists every setting")
    if cfg.loudness and not re.fullmatch(r"(rms|peak):-?\d+(\.\d+)?", cfg.loudness):
        raise configs.Usage(f"--loudness {cfg.loudness}: expected rms:-23 or peak:-1")
    if not 0 <= cfg.val_split < 1:
        raise configs.Usage(f"--val_split {cfg.val_split}: expected a share from 0 up to, but not including, 1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    out, normalise = Path(cfg.output_dir), hook(cfg.normalizer) if cfg.normalizer else None
    outputs = [os.path.realpath(out / name) for name in ("train.jsonl", "val.jsonl")]
    own = [p for p in cfg.input if os.path.realpath(p) in outputs or cfg.encode_only]  # what was split is not split again
    changes = cfg.slice or cfg.loudness or cfg.normalizer or cfg.skip_bad or cfg.trim >= 0 or cfg.ref != "none"
    if own and (own != cfg.input or changes):
        raise configs.Usage(f"{own[0]} is encoded as it is; to change its rows, prepare it into another --output_dir")
    written = refuse_foreign(out, cfg, own)
    write_file(out / ".writable", b"")
    (out / ".writable").unlink()

    # ---- read, cut, measure, judge
    rows, bad, about = gather(cfg)
    done = collections.Counter()
    rows, cut = cut_long(rows, bad, cfg, out)
    done.update(cut)
    places = [(h[k], *((h.get("start"), h.get("end")) if k == "audio" else (None, None)))
              for r in rows for h in holders(r) for k in ("audio", "ref_audio") if k in h]
    facts = measure_all(places, cfg, out / "cache" / "facts.json")
    kept, notices = [], []
    for row in rows:
        try:
            notices += [(row, *n) for n in judge(row, facts, cfg, normalise, done)]
            kept.append(row)
        except Invalid as e:
            bad.append((*row["at"], str(e)))
    rows = kept
    notices += compare(rows)
    if own:
        chosen = {r["id"] for r in rows if Path(r["at"][0]).name == "val.jsonl"}
    else:
        chosen = split(rows, cfg.val_split, cfg.seed)
    if cfg.ref != "none":
        references(rows, chosen, cfg, done)

    numbers = {k: v["number"] for k, v in read_memo(out / "report.json").get("speakers", {}).items() if "number" in v}
    number_speakers(rows, numbers)
    for t in (t for row in rows for t in (row, *row.get("turns", ())) if isinstance(t.get("speaker"), str)):
        t["speaker_id"] = numbers[t["speaker"]]

    # ---- report, manifests
    checkpoints = []

    def report():
        write_report(out, cfg, rows, chosen, bad, notices, about, dict(done), checkpoints, written, numbers)

    def manifests():
        sides = {"train.jsonl": [r for r in rows if r["id"] not in chosen],
                 "val.jsonl": [r for r in rows if r["id"] in chosen]}
        say(", ".join(f"{out / name}: {len(side)} rows" if side else f"no {name}: too few recordings" for name, side in sides.items()))
        sides = {name: manifest(side, out) for name, side in sides.items()}
        written[:] = sorted({*written, *(hashlib.sha256(text).hexdigest()[:32] for text in sides.values())})
        report()  # first, so that a kill in between leaves no manifest that looks foreign
        for name, text in sides.items():
            write_file(out / name, text) if text else (out / name).unlink(missing_ok=True)

    if own or cfg.check or not rows or bad and not cfg.skip_bad:
        report()
    if bad and not cfg.skip_bad:
        raise Invalid(f"{listing(bad)}\n{len(bad)} bad rows, all in {out / 'report.html'}. Nothing else was written. "
                      "Mend them, or leave them out with --skip_bad.")
    if not rows:
        if done["clips to be transcribed"]:
            return
        raise Invalid(f"no rows left of {', '.join(map(str, cfg.input))}; {out / 'report.html'} says why")
    if bad:
        say(f"{listing(bad, 10)}\n{len(bad)} bad rows left out")
    if not own and not cfg.check:
        manifests()

    # ---- encode
    device = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    for folder in cfg.ckpt_dir:
        model, cache = models.load(folder, device=device), None
        model.codec.to(device)
        if not cfg.check:
            there = [out / n for n in ("train.jsonl", "val.jsonl") if is_file(out / n)] if not own else own
            by_id, encoded = {r["id"]: r for r in rows}, read_manifest(there)
            cache = ClipCache(out / "cache", model)
            cache.memo |= {r["audio"]: [*stamp(r["audio"]), r["facts"]["sha"]] for r in rows if "facts" in r}
            try:
                cache.add(encoded, say)
            except Invalid:
                if not cfg.skip_bad or len(cache.failed) == len(rows):
                    raise
                bad += [(*by_id[name]["at"], f"{folder}: {why}") for name, why in cache.failed.items()]
                rows = [r for r in rows if r["id"] not in cache.failed]
                manifests()
                encoded = [r for r in encoded if r["id"] not in cache.failed]
            encoded = [{k: by_id[r["id"]][k] for k in ("at", "duration", "sample_rate") if k in by_id[r["id"]]} | r
                       for r in encoded]
            say(f"{out / 'cache'}: {len(encoded)} rows ready for {folder}")
        about_it, more = for_checkpoint(model, cache, rows if cfg.check else encoded, cfg)
        notices += more
        checkpoints.append({"checkpoint": str(folder), **about_it})
        report()
        del model, cache  # before the next one is read
    hours = sum(r["duration"] for r in rows) / 3600
    say(f"{len(rows)} rows, {hours:.2f} hours, {len(bad)} left out, {len(notices)} worth a look")
    print(out / "report.html")


if __name__ == "__main__":
    configs.run(main)
