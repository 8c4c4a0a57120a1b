"""Recordings and transcripts, in whatever shape they lie, into rows that can be trained on.

    python prepare_data.py --input my_voice/ --output_dir data --ckpt_dir checkpoints/base

    input ──reader──▶ raw rows ──canonical──▶ rows ──measure──▶ cut, trim, check ──split──▶ train.jsonl val.jsonl
                                                          └──▶ report.html report.json        └──model.encode──▶ cache/

Every row is checked before anything is written, and everything that is wrong is named at once, with file and line.
Killed anywhere, the same command goes on where it was. train.py uses `read_manifest` and `Cache` from here.
"""
import collections
import copy
import csv
import hashlib
import importlib
import itertools
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
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch

import configs
import models
from configs import opt
from models.parts import Invalid, audio, page

# ------------------------------------------------------------------------------------------------ settings

SHAPES = ("jsonl", "json", "csv", "ljspeech", "list", "tsv", "folder")


@dataclass
class Prepare:
    """Turn recordings and transcripts into train.jsonl, val.jsonl, the cached codes that training reads, and a report."""

    input: list = opt([], "manifests, folders of recordings, or recordings; several are one data set", repeat=True)
    output_dir: str = opt("", "folder for train.jsonl, val.jsonl, report.html, report.json and cache/")
    ckpt_dir: list = opt([], "checkpoints to encode for; none only checks and splits", repeat=True)
    format: str = opt("auto", "shape of every input; list is file|speaker|text or file|speaker|language|text", choices=("auto", *SHAPES))
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
    slice: bool = opt(False, "cut recordings without transcript at silences into clips/, and those with word times into rows")
    slice_min_seconds: float = opt(4.0, "shortest piece")
    slice_max_seconds: float = opt(15.0, "longest piece, where there is a silence to cut at")
    slice_min_interval: float = opt(0.3, "shortest silence to cut at, in seconds")
    slice_hop: float = opt(0.01, "seconds between two looks at the level")
    slice_max_silence: float = opt(0.5, "longest silence that is left at an end of a piece, in seconds")
    ref: str = opt("none", "write ref_audio: the clip itself, another one of the speaker, or nothing", choices=("same", "other", "none"))
    val_split: float = opt(0.1, "share of each speaker's rows that goes into val.jsonl")
    seed: int = opt(42, "of the split and of --ref other")
    check: bool = opt(False, "write only the report")
    skip_bad: bool = opt(False, "leave bad rows out and go on; without it they end the run")
    overwrite: bool = opt(False, "replace a train.jsonl and val.jsonl that came from elsewhere")
    batch_size: int = opt(16, "of the training to come; for the report")
    grad_accum_steps: int = opt(1, "of the training to come; for the report")
    max_batch_tokens: int = opt(8192, "of the training to come: rows longer than this / batch_size are dropped there; 0 none")
    workers: int = opt(0, "processes that check audio; 0 takes one per core")
    device: str = opt("auto", "where the codec runs: auto, cpu, cuda, cuda:1, mps")


# ------------------------------------------------------------------------------------------------ reading: files to raw rows
# A reader yields (line, raw row or Invalid) in the order of the file. Line 0 means the file itself.

SOUND = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".aif", ".aiff", ".m4a", ".aac", ".wma", ".mp4", ".webm")
TEXTS = (".normalized.txt", ".original.txt", ".txt", ".lab")  # the first that is there wins
LANGUAGES = set("zh en ja jp ko yue fr de es it pt ru ar hi tr pl nl cs sv da fi no el he hu ro uk vi th id fa ur bn".split())


def read_text(path):
    """A text file; bytes that are no UTF-8 become surrogates, which check_text names."""
    data = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise Invalid(f"{path} is UTF-16; save it as UTF-8")
    return data.decode("utf-8", "surrogateescape")


def lines(path):
    """(number, line) without BOM, line ends and blank lines."""
    with open(path, "rb") as f:
        for n, line in enumerate(f, 1):
            line = line.removeprefix(b"\xef\xbb\xbf") if n == 1 else line
            if n == 1 and line[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise Invalid(f"{path} is UTF-16; save it as UTF-8")
            if line.strip():
                yield n, line.rstrip(b"\r\n").decode("utf-8", "surrogateescape")


def parse_json(text):
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        return Invalid(f"not valid JSON: {e.msg} at column {e.colno}")
    except (RecursionError, ValueError) as e:
        return Invalid(f"not valid JSON: {e}")


def read_jsonl(path):
    for n, line in lines(path):
        raw = parse_json(line)
        yield n, raw if isinstance(raw, (dict, list, Invalid)) else Invalid(f"expected an object {{...}}, got {shown(line)}")


def read_json(path):
    """A list of rows or of conversations (lists of turns), one row, or {"file": "text"}; rows of a list keep their line."""
    text, skip = read_text(path), re.compile(r"\s*")
    at = skip.match(text).end()
    if text[at : at + 1] != "[":
        raw = parse_json(text)
        if isinstance(raw, dict) and not any(isinstance(raw.get(k), (str, list)) for k in ("messages", "turns", *KEYS["audio"])):
            yield from ((0, {"audio": k, **(v if isinstance(v, dict) else {"text": v})}) for k, v in raw.items())
        else:
            yield 0, raw if isinstance(raw, (dict, Invalid)) else Invalid("expected a list of rows")
        return
    decoder, line, counted, at = json.JSONDecoder(), 1, 0, at + 1
    while (at := skip.match(text, at).end()) < len(text) and text[at] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            raw, at = decoder.raw_decode(text, at)
            at = skip.match(text, at).end()
            follows = text[at : at + 1]
            at += follows == ","
            if follows not in (",", "]") or follows == "," and text[skip.match(text, at).end() :][:1] == "]":
                line, follows = line + text.count("\n", counted, at), "a comma after the last row" if follows == "," else "no comma after this row"
                yield line, Invalid(f"not valid JSON: {follows}; the rest of the file was not read")
                return
        except (json.JSONDecodeError, RecursionError) as e:
            n = line + text.count("\n", counted, getattr(e, "pos", at))
            yield n, Invalid(f"not valid JSON: {getattr(e, 'msg', e)}; the rest of the file was not read")
            return
        yield line, raw if isinstance(raw, (dict, list)) else Invalid(f"expected an object {{...}}, got {shown(raw)}")


def read_table(path, delimiter, columns=None):
    """A table; the first line names the columns unless they are given. Quotes count only between commas."""
    for n, line in lines(path):
        try:
            cells = next(csv.reader([line], strict=True)) if delimiter == "," else line.split(delimiter)
        except csv.Error as e:
            yield n, Invalid(f"{e}; a quote that opens must close on the same line")
            continue
        cells = [c.strip() for c in cells]
        if columns is None:
            columns = [c.strip('"').lower() for c in cells]
        elif len(cells) != len(columns):
            yield n, Invalid(f"{len(cells)} columns, expected {len(columns)}: {delimiter.join(columns)}")
        else:
            yield n, {c: v for c, v in zip(columns, cells) if v}


def read_ljspeech(path):
    """id|text[|normalised text] without a header, wavs/<id>.wav. A quote is a letter here: some are never closed."""
    folders = [Path(path).parent / sub for sub in ("wavs", "wav", "audio", "")]
    for n, line in lines(path):
        name, *texts = [cell.strip() for cell in line.split("|")]
        if not 1 <= len(texts) <= 2:
            yield n, Invalid(f"{len(texts) + 1} columns, expected id|text or id|text|normalised text")
            continue
        tried = [f / (name + end) for f in folders for end in ("", *SOUND)] if name and "\0" not in name and len(name) < 200 else []
        found = next((t for t in tried if is_file(t)), f"wavs/{name}.wav")
        yield n, {"id": Path(name).stem if name.lower().endswith(SOUND) else name, "audio": str(found), "text": texts[-1] or texts[0]}


def read_list(path):
    for n, line in lines(path):
        cells = [c.strip() for c in line.split("|")]
        known = {2: ("audio", "text"), 3: ("audio", "speaker", "text"), 4: ("audio", "speaker", "language", "text")}.get(len(cells))
        if len(cells) == 3 and cells[1].lower() in LANGUAGES:
            known = ("audio", "language", "text")
        yield n, dict(zip(known, cells)) if known else Invalid(f"{len(cells)} columns, expected file|speaker|text or file|speaker|language|text")


def read_folder(path):
    """Every recording below a folder, or one recording; `beside` finds the text."""
    found = [path] if is_file(path) else sorted(p for p in Path(path).rglob("*") if p.suffix.lower() in SOUND and is_file(p))
    for sound in found:
        yield 0, {"audio": os.path.abspath(sound)}


def is_file(path):
    try:
        return os.path.isfile(path)
    except (OSError, ValueError):
        return False


def recognise(path, shape="auto"):
    """-> (name of the shape, reader). What could be two shapes is asked for, never guessed."""
    path = Path(path)
    if not path.exists():
        raise Invalid(f"no file or folder at {path}")
    if path.is_dir() and shape in ("auto", "ljspeech") and (path / "metadata.csv").is_file():
        path = path / "metadata.csv"
    if path.is_dir() or (shape == "auto" and path.suffix.lower() in SOUND):
        if shape not in ("auto", "folder"):
            raise configs.Usage(f"--format {shape} needs a file, {path} is a folder")
        return "folder", lambda: read_folder(path)
    sample = [line for _, line in itertools.islice(lines(path), 200)]
    first = sample[0].strip() if sample else ""
    if shape == "auto" and first[:1] in ("[", "{"):
        shape = "jsonl" if first[0] == "{" and not isinstance(parse_json(first), Invalid) or path.suffix.lower() == ".jsonl" else "json"
    if shape in ("auto", "csv"):
        for delimiter in ("\t", "|", ";", ","):
            names = [c.strip().strip('"').lower() for c in first.split(delimiter)]
            if all(any(k in names for k in KEYS[key]) for key in ("audio", "text")):
                return "csv", lambda: read_table(path, delimiter)
        if shape == "csv":
            raise Invalid(f"{path}: the first line names no column for audio and text; known are {', '.join(KEYS['audio'] + KEYS['text'])}")
    if shape == "auto":
        tabs, bars = ({line.count(c) + 1 for line in sample} for c in "\t|")
        cells = [[c.strip() for c in line.split("|")] for line in sample]
        if path.suffix.lower() in (".jsonl", ".ndjson"):
            shape = "jsonl"
        elif tabs == {2} and bars == {1}:
            shape = "tsv"
        elif bars <= {2, 3} and 2 * sum(len(c) < 3 or not c[2] or same_words(c[1], c[2]) for c in cells) >= len(cells):
            shape = "ljspeech"
        elif bars == {3} and all(c[1].lower() in LANGUAGES for c in cells) or bars == {4} and all(c[2].lower() in LANGUAGES for c in cells):
            shape = "list"
        else:
            what = "could be id|text|normalised text or file|speaker|text" if bars == {3} else f"is of no shape that is recognised ({shown(first)})"
            raise configs.Usage(f"{path} {what}; say which with --format {', '.join(SHAPES)} (ljspeech is the first, list the second)")
    readers = {"jsonl": read_jsonl, "json": read_json, "ljspeech": read_ljspeech, "list": read_list, "folder": read_folder,
               "tsv": lambda p: read_table(p, "\t", ["audio", "text"])}
    return shape, lambda: readers[shape](path)


def same_words(a, b):
    """Whether one is the normalised form of the other, rather than a speaker and a text: half of the words are shared."""
    a, b = (set(re.findall(r"\w+", t.lower())) for t in (a, b))
    return 2 * len(a & b) >= max(len(a), 1)


# ------------------------------------------------------------------------------------------------ rows: raw to canonical

KEYS = {  # canonical key: names that are read for it; the first that is there wins
    "audio": ("audio", "audio_path", "audio_file", "audio_url", "audio_filepath", "path", "wav", "wav_path", "filename", "file_name",
              "file", "url"),
    "text": ("text", "transcription", "transcript", "sentence"),
    "id": ("id", "utt_id"), "speaker": ("speaker", "speaker_id", "source", "spk"), "duration": ("duration",),
    "sample_rate": ("sample_rate",), "dataset_id": ("dataset_id",), "start": ("start",), "end": ("end",), "gain_db": ("gain_db",),
    "ref_audio": ("ref_audio", "reference_audio"), "ref_text": ("ref_text", "reference_text"),
    "emotion": ("emotion",), "alignment": ("alignment",), "turns": ("turns",), "messages": ("messages",),
}
CUT = ("start", "end", "gain_db")


def holders(row):
    """The row, its turns and the parts of its messages: whatever can hold audio and text of its own."""
    return [row, *row.get("turns", ()), *(p for m in row.get("messages", ()) for p in m["content"])]


def pick(raw, key):
    return next((raw[n] for n in KEYS[key] if raw.get(n) is not None), None)


def canonical(raw, roots):
    """A raw row under canonical keys, its paths absolute. Raises Invalid with the reason."""
    raw = {"turns": raw} if isinstance(raw, list) else raw
    row = {key: value for key in KEYS if (value := pick(raw, key)) is not None}
    for key in ("audio", "text"):
        given = {n: raw[n] for n in KEYS[key] if raw.get(n) is not None}
        if len({json.dumps(v) for v in given.values()}) > 1:
            raise Invalid(" and ".join(given) + f" differ; which one is the {key}?")
    mask = raw.get("training_mask")
    for key in ("turns", "messages"):
        if key in row and not (isinstance(row[key], list) and row[key] and all(isinstance(t, dict) for t in row[key])):
            raise Invalid(f"{key} must be a list of objects")
        if key in row and isinstance(mask, list) and len(mask) == len(row[key]):
            row[key] = [{**t, "train": m} for t, m in zip(row[key], mask)]
    if "messages" in row:
        row["messages"] = [message(m) for m in row["messages"]]
        if all(m["role"] in ("system", "user", "assistant") for m in row["messages"]):
            row = {**from_messages(row["messages"]), **row}
        else:  # roles that are speakers: a conversation
            row["turns"] = [as_turn(m) for m in row.pop("messages")]
    if "turns" in row:
        row["turns"] = [{**{k: v for k, v in t.items() if k in ("role", "train", *CUT)},
                         **{k: v for k in ("speaker", "text", "audio") if (v := pick(t, k)) is not None}} for t in row["turns"]]
        if not any("audio" in t for t in row["turns"]):
            raise Invalid("no turn has audio")
    elif "audio" not in row:
        raise Invalid(f"no audio: expected one of {', '.join(KEYS['audio'][:6])}; the keys here are {', '.join(map(str, list(raw)[:8])) or 'none'}")
    for holder in holders(row):
        for key in ("audio", "ref_audio", "alignment"):
            if key in holder:
                holder[key] = resolve(holder[key], roots, key)
        for key in ("text", "ref_text"):
            if key in holder:
                check_text(holder[key], key)
        for key in (*CUT, "duration", "sample_rate"):
            value = number_in(holder.get(key))
            if key in holder and (value is None or value < 0 and key != "gain_db"):
                raise Invalid(f"{key} must be a number that is not negative, got {shown(holder[key])}")
            holder.update({key: value} if key in holder else {})
        if holder.get("end", math.inf) <= holder.get("start", 0):
            raise Invalid(f"end {holder['end']} is not after start {holder.get('start', 0)}")
        for key in ("speaker", "dataset_id", "id"):
            if key in holder and (not isinstance(holder[key], (str, int)) or isinstance(holder[key], bool)):
                raise Invalid(f"{key} must be a text or a whole number, got {shown(holder[key])}")
            if isinstance(holder.get(key), str):
                check_text(holder[key], key)
    if isinstance(row.get("emotion"), str):
        row["emotion"] = resolve(row["emotion"], roots, "emotion")
    elif "emotion" in row and not (isinstance(row["emotion"], list) and len(row["emotion"]) == 8 and None not in map(number_in, row["emotion"])):
        raise Invalid("emotion must be a path or 8 numbers")
    return row


def message(raw):
    """One ChatML message with its content as a list of {"type": "text", "text"} and {"type": "audio", "audio"}."""
    parts = raw.get("content")
    parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
    if not isinstance(raw.get("role"), (str, int)) or not isinstance(parts, list):
        raise Invalid(f"a message needs a role and a content, got {shown(raw)}")
    content = []
    for p in parts:
        kind = p.get("type") if isinstance(p, dict) else None
        if kind not in ("text", "audio", "audio_url"):
            raise Invalid(f"a part of a message must have the type text or audio, got {shown(p)}")
        kind = "text" if kind == "text" else "audio"
        content.append({"type": kind, kind: pick(p, kind)})
    train = raw.get("train", raw.get("training_mask"))
    return {"role": raw["role"], **({} if train is None else {"train": bool(train)}), "content": content}


def as_turn(m):
    out = {"speaker": m["role"], **({"train": m["train"]} if "train" in m else {})}
    words = " ".join(str(p["text"]) for p in m["content"] if p["type"] == "text")
    sounds = [p["audio"] for p in m["content"] if p["type"] == "audio"]
    return {**out, **({"text": words} if words else {}), **({"audio": sounds[0]} if sounds else {})}


def from_messages(messages):
    """What other backbones read out of ChatML: the last assistant audio with its text; the first audio before it as reference."""
    parts = [(m["role"], p) for m in messages for p in m["content"] if m["role"] != "system" or p["type"] == "audio"]
    said = [i for i, (role, p) in enumerate(parts) if role == "assistant" and p["type"] == "audio"]
    if not said:
        raise Invalid("no assistant message has audio")
    texts = [p["text"] for _, p in parts[: said[-1]] if p["type"] == "text"] or [p["text"] for _, p in parts if p["type"] == "text"]
    row = {"audio": parts[said[-1]][1]["audio"], **({"text": texts[-1]} if texts else {})}
    first = next((i for i, (_, p) in enumerate(parts[: said[-1]]) if p["type"] == "audio"), None)
    if first is not None:
        before = [p["text"] for _, p in parts[:first] if p["type"] == "text"]
        row |= {"ref_audio": parts[first][1]["audio"], **({"ref_text": before[-1]} if before else {})}
    return row


def number_in(value):
    """A finite number, also when it was written as text (a table has nothing else); otherwise None."""
    try:
        value = float(value) if isinstance(value, str) else value
    except ValueError:
        return None
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) else None


def shown(value):
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def check_text(text, key):
    if not isinstance(text, str):
        raise Invalid(f"{key} must be text, got {shown(text)}")
    if not text.strip():
        raise Invalid(f"{key} is empty")
    at = next((m.start() for m in re.finditer("[\ud800-\udfff]", text)), None)
    if at is not None:
        code = ord(text[at])
        what = f"the byte 0x{code - 0xDC00:02x}, which is not UTF-8" if 0xDC80 <= code <= 0xDCFF else f"a lone surrogate U+{code:04X}"
        raise Invalid(f"{key} holds {what}, at character {at + 1}; save the file as UTF-8")


def resolve(name, roots, key):
    """A path of a row, tried against the manifest's folder and the working directory, as an absolute path."""
    name = (name.get("path") or name.get("url")) if isinstance(name, dict) else name  # {"path": ...} of a data set library
    if not isinstance(name, str) or not name.strip():
        raise Invalid(f"{key} must be a path, got {shown(name)}")
    if "\0" in name or len(name) > 4096:
        raise Invalid(f"{key} is no path: " + ("it holds a NUL" if "\0" in name else f"{len(name)} characters") + f" ({shown(name[:40])})")
    if "://" in name or re.match("(?i)(file|data|https?):", name):
        raise Invalid(f"{key} {shown(name)} is a URL; nothing is downloaded here: fetch it yourself and give its path")
    found = [p for p in dict.fromkeys(os.path.abspath(os.path.join(root, name)) for root in roots) if is_file(p)]
    if not found:
        looked = "" if os.path.isabs(name) else " (looked in " + " and ".join(dict.fromkeys(map(str, roots))) + ")"
        raise Invalid(f"no file at {name if len(name) <= 200 else name[:100] + '...'}{looked}")
    if any(not os.path.samefile(found[0], other) for other in found[1:]):
        raise Invalid(f"{name} could be {' or '.join(found)}; write an absolute path")
    return found[0]


def beside(sound, folder, endings, kind):
    """The file that belongs to a recording: in `folder`, beside it, or in transcripts/ where it lies in audio/."""
    sound = Path(sound)
    places = [Path(folder)] if folder else []
    places += [sound.parent] + [p.parent / kind / sound.parent.relative_to(p) for p in sound.parents if p.name == "audio"][:1]
    return next((t for p in places for end in endings if is_file(t := p / (sound.stem + end))), None)


def words_in(path):
    """[(word, start, end)] of a file of word times: {"words": [{"word", "start", "end"}]}, that list, or {"alignments": [[word, [s, e], ...]]}."""
    raw = parse_json(read_text(path))
    raw = raw.get("words", raw.get("alignments")) if isinstance(raw, dict) else raw
    try:
        out = [(str(w.get("word", w.get("text"))), float(w["start"]), float(w["end"])) if isinstance(w, dict)
               else (str(w[0]), float(w[1][0]), float(w[1][1])) for w in raw]
    except (TypeError, KeyError, IndexError, ValueError):
        raise Invalid(f"{path} holds no word times; expected {{\"words\": [{{\"word\", \"start\", \"end\"}}]}}") from None
    if not out or any(not a <= b for _, a, b in out) or any(a[1] > b[1] for a, b in zip(out, out[1:])):
        raise Invalid(f"{path}: the word times are empty or not in order")
    return [(w.strip(), a, b) for w, a, b in out if w.strip()]


def read_rows(path, shape="auto", transcripts="", alignment_dir="", need_text=True, roots=()):
    """-> (rows, bad [(file, line, reason)], name of the shape). A row says under "at" where it stands, and has an id."""
    rows, bad, ids = [], [], {}
    shape, reader = recognise(path, shape)
    path = str(Path(path) / "metadata.csv") if shape == "ljspeech" and os.path.isdir(path) else str(path)
    roots = [path if os.path.isdir(path) else os.path.dirname(path) or ".", *roots, "."]
    for n, (line, raw) in enumerate(reader(), 1):
        at = (raw["audio"], 0) if shape == "folder" else (path, line)
        try:
            if isinstance(raw, Invalid):
                raise raw
            row = {**canonical(raw, roots), "at": at}
            if "text" not in row and "turns" not in row:
                texts, times = (beside(row["audio"], f, ends, kind) for f, ends, kind in (
                    (transcripts, TEXTS, "transcripts"), (alignment_dir, (".json",), "alignments")))
                if times and "alignment" not in row:
                    row["alignment"] = str(times)
                if texts:
                    row["text"] = read_text(texts)
                    check_text(row["text"], f"the text in {texts}")
                elif "alignment" in row:
                    row["text"] = " ".join(w for w, _, _ in words_in(row["alignment"]))
                elif need_text:
                    name = Path(row["audio"]).stem
                    raise Invalid("no text, and no transcript beside the recording (" + ", ".join(name + end for end in TEXTS) + ")")
            given, name = row.pop("id", None), ""
            name = str(given) if given is not None else Path(next(h["audio"] for h in holders(row) if "audio" in h)).stem
            if name in ids:
                if given is not None and ids[name]:
                    raise Invalid(f"the id {shown(name)} is also that of line {ids[name]}")
                name = unused(name, ids, line or n)
            ids[name] = line if given is not None else 0
            rows.append({"id": name, **row})
        except Invalid as e:
            bad.append((*at, str(e)))
    return rows, bad, shape


def unused(name, taken, n):
    return next(c for k in itertools.count(1) if (c := f"{name}-{n}" + (f"-{k}" if k > 1 else "")) not in taken)


def read_manifest(path, speakers=None) -> list[dict]:
    """The canonical rows of a manifest or of several; everything that is wrong with them in one Invalid.

    With speakers = {} (or {name: number}) each row's speaker becomes a number: a number stays what it is, a name takes
    the lowest number that is free, and the map is filled so that it can be stored.
    """
    rows, bad, ids = [], [], set()
    for k, one in enumerate([path] if isinstance(path, (str, os.PathLike)) else path):
        found, wrong, _ = read_rows(one)
        bad += wrong if found or wrong else [(str(one), 0, 'holds no rows; expected {"audio": ..., "text": ...} per line')]
        for row in found:
            row["id"] = row["id"] if row["id"] not in ids else unused(row["id"], ids, k + 1)
            ids.add(row["id"])
            rows.append({key: value for key, value in row.items() if key != "at"})
    if bad:
        raise Invalid(listing(bad))
    if speakers is not None:
        number_speakers(rows, speakers)
    return rows


def number_speakers(rows, speakers):
    spoken = [t for row in rows for t in (row, *row.get("turns", ())) if "speaker" in t]
    for t in spoken:
        if isinstance(t["speaker"], int) or t["speaker"].isdecimal():
            speakers.setdefault(str(t["speaker"]), int(t["speaker"]))
    free = (n for n in itertools.count() if n not in speakers.values())
    for t in spoken:
        if str(t["speaker"]) not in speakers:
            speakers[str(t["speaker"])] = next(free)
        t["speaker"] = speakers[str(t["speaker"])]


def listing(bad, limit=50):
    """file, line and reason of bad rows, one per line."""
    said = [(f"{file} line {line}" if line else str(file)) + f": {reason}" for file, line, reason in bad[:limit]]
    return "\n".join(said + ([f"... and {len(bad) - limit} more"] if len(bad) > limit else []))


# ------------------------------------------------------------------------------------------------ sound: measure, cut, judge


def decibels(power):
    return 10 * np.log10(np.maximum(power, 1e-12))


def frame_levels(wave, rate, hop):
    """The level of each `hop` seconds in dB of full scale; what is left at the end is a frame of its own."""
    size = max(1, round(rate * hop))
    padded = np.pad(wave, (0, -len(wave) % size)).reshape(-1, size)
    return decibels(np.square(padded, dtype=np.float64).mean(1))


def measure(job):
    """(path, start, end, longest, silence) -> what is known of that sound, or {"error": why it cannot be used}."""
    path, start, end, longest, silence = job
    try:
        head = audio.info(path)
        length = (head.seconds if end is None else end) - (start or 0)
        facts = {"seconds": round(length, 4), "whole": head.seconds, "rate": head.rate, "channels": head.channels,
                 "format": f"{head.format} {head.subtype}"}
        if length > longest:
            return {**facts, "error": f"{length:.1f} s is longer than --max_seconds {longest:g}"}
        wave, rate = audio.read(path, None, start, end)
    except Invalid as e:
        return {"error": str(e).removeprefix(f"{path}: ")}
    wave = wave.numpy()
    loud = np.flatnonzero(frame_levels(wave, rate, 0.01) > silence)
    ends = (loud[0] * 0.01, max(0.0, len(wave) / rate - (loud[-1] + 1) * 0.01)) if len(loud) else (0.0, 0.0)
    size = np.abs(wave)
    return {**facts, "seconds": round(len(wave) / rate, 4), "rms": round(float(decibels(np.square(wave, dtype=np.float64).mean())), 2),
            "peak": float(size.max()), "clipped": float((size >= 0.999).mean()), "head": round(ends[0], 3), "tail": round(ends[1], 3),
            "sha": hash_file(path)}


def hash_file(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:32]


def stamp(path):
    stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns]


def measure_all(places, cfg, memo_file):
    """{(path, start, end): facts}; what was measured before and has not changed is taken from the memo."""
    memo, facts = read_memo(memo_file), {}
    for path, start, end in places:
        known = memo.get(json.dumps([path, start, end, cfg.silence_db]))
        if known and known[0] == stamp(path) and known[1]["seconds"] <= cfg.max_seconds:
            facts[path, start, end] = known[1]
    left = [p for p in dict.fromkeys(places) if p not in facts]
    jobs = [(*p, cfg.max_seconds, cfg.silence_db) for p in left]
    workers = min(cfg.workers or os.cpu_count() or 1, len(jobs) // 100)  # a process costs more than a hundred clips
    begun = spoken = saved = time.time()
    heard = 0.0

    def save():
        if not cfg.check:
            write_file(memo_file, json.dumps(memo).encode("utf-8", "surrogatepass"))

    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn"),
                               quiet_worker) if workers > 1 else None
    try:
        found = pool.map(measure, jobs, chunksize=16) if pool else map(measure, jobs)
        for n, (place, known) in enumerate(zip(left, found), 1):
            facts[place] = known
            heard += known.get("seconds", 0)
            if "error" not in known:
                memo[json.dumps([*place, cfg.silence_db])] = [stamp(place[0]), known]
            now = time.time()
            if now - spoken > 5 or n == len(jobs):
                spoken, rate = now, n / max(now - begun, 1e-9)
                say(f"checked {n}/{len(jobs)} | {heard / 3600:.2f} h | {heard / max(now - begun, 1e-9):.0f} s audio/s | "
                    f"{rate:.0f} clips/s | {clock((len(jobs) - n) / rate)} left")
            if now - saved > 30:
                saved = now
                save()
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
        if left:
            save()
    return facts


def quiet_worker():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it and stops the others
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)


def read_memo(path):
    try:
        known = json.loads(Path(path).read_bytes())
        return known if isinstance(known, dict) else {}
    except (OSError, ValueError):  # a memo only saves time
        return {}


def silences(path, total, cfg):
    """-> (where sound begins, where it ends, [(start, end) of each silence between]), read 30 seconds at a time."""
    levels = [frame_levels(audio.read(path, None, at, min(at + 30, total))[0].numpy(), rate, cfg.slice_hop)
              for rate in [audio.info(path).rate] for at in np.arange(0, total - 0.001, 30)]
    quiet = np.concatenate([[True], np.concatenate(levels) < cfg.silence_db, [True]])
    edges = np.flatnonzero(np.diff(quiet)) * cfg.slice_hop  # sound begins, ends, begins, ends ...
    if not len(edges):
        return 0.0, 0.0, []
    gaps = [(a, b) for a, b in zip(edges[1:-1:2].tolist(), edges[2::2].tolist()) if b - a >= cfg.slice_min_interval]
    keep = cfg.slice_max_silence
    return max(0.0, float(edges[0]) - keep), min(total, float(edges[-1]) + keep), gaps


def pieces(begin, finish, gaps, cfg):
    """Cut at the first gap that is long enough after slice_min_seconds; where none comes in time, at the longest one."""
    out, i, keep = [], 0, cfg.slice_max_silence
    while True:
        while i < len(gaps) and gaps[i][0] - begin < cfg.slice_min_seconds:
            i += 1
        later = [g for g in itertools.takewhile(lambda g: g[0] - begin <= cfg.slice_max_seconds, gaps[i:])] or gaps[i : i + 1]
        if not later or finish - later[0][1] < cfg.slice_min_seconds and finish - begin <= cfg.slice_max_seconds:
            return out + [(round(begin, 3), round(finish, 3))] if finish > begin else out
        a, b = next((g for g in later if g[1] - g[0] >= cfg.slice_min_interval), max(later, key=lambda g: g[1] - g[0]))
        out.append((round(begin, 3), round(a + min(keep, (b - a) / 2), 3)))
        begin = b - min(keep, (b - a) / 2)


def cut_long(rows, bad, cfg, out):
    """Rows with word times become rows of pieces; recordings without text become clips/ to be transcribed."""
    kept, table, sliced = [], [], 0
    for row in rows:
        whole = "turns" in row or "messages" in row or "start" in row or "end" in row
        try:
            total = audio.info(row["audio"]).seconds if not whole else 0
            if whole or not (cfg.slice or "alignment" in row) or "text" in row and total <= cfg.max_seconds and not (
                    cfg.slice and "alignment" in row):
                kept.append(row)
                continue
            sliced += 1
            if "text" in row and "alignment" in row:
                words = words_in(row["alignment"])
                gaps = [(a[2], b[1]) for a, b in zip(words, words[1:])]
                for k, (start, end) in enumerate(pieces(words[0][1], min(words[-1][2], total), gaps, cfg), 1):
                    said = " ".join(w for w, a, b in words if start <= (a + b) / 2 < end or end == round(words[-1][2], 3) and a >= start)
                    kept.append({**{k: v for k, v in row.items() if k != "duration"}, "id": f"{row['id']}_{k:04d}", "start": start,
                                 "end": end, "text": said})
                continue
            spans = pieces(*silences(row["audio"], total, cfg), cfg)
            for k, (start, end) in enumerate(spans, 1):
                name = f"{sliced:04d}_{k:04d}.wav"  # numbers, so that no text of a manifest becomes a file name
                table.append([name, "", row["audio"], start, end])
                if not cfg.check:
                    (out / "clips").mkdir(parents=True, exist_ok=True)
                    audio.write(out / "clips" / name, *audio.read(row["audio"], None, start, end))
            if "text" in row:
                bad.append((*row["at"], f"{total:.1f} s with one text and no word times; cut into {len(spans)} clips to be transcribed"))
        except Invalid as e:
            bad.append((*row["at"], str(e)))
    if table and not cfg.check:
        where = out / "clips" / "clips.csv"
        if is_file(where) and not cfg.overwrite and any(raw.get("text") for _, raw in read_table(where, ",") if isinstance(raw, dict)):
            raise Invalid(f"{where} holds transcripts already; give it as --input, or --overwrite it")
        with open(where, "w", encoding="utf-8", newline="") as f:
            csv.writer(f).writerows([["filename", "text", "recording", "from", "to"], *table])
        say(f"{len(table)} clips in {out / 'clips'}; write what is said into the column text of {where}, then --input {where}")
    return kept, {"recordings cut": sliced, "clips to be transcribed": len(table)}


ODD = re.compile(r"<\|[^|<>]{1,40}\|>|</?s>|<(?:unk|pad|bos|eos)>|\[/?INST\]", re.I)


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
        for key in ("text", "ref_text"):
            if key in holder:
                before, holder[key] = holder[key], clean(holder[key], normalise)
                check_text(holder[key], f"{key} after cleaning")
                done["texts changed"] += before != holder[key]
                if odd := [c for c in before if unicodedata.category(c) == "Cc" and not c.isspace()]:
                    notices.append(("control characters", ", ".join(sorted({f"U+{ord(c):04X}" for c in odd})) + " taken out of the text"))
                if found := ODD.findall(holder[key]):
                    notices.append(("special token", f"{', '.join(sorted(set(found)))} in the text is kept as plain text"))
        if "ref_audio" in holder and "error" in facts[holder["ref_audio"], None, None]:
            raise Invalid(f"ref_audio {holder['ref_audio']}: {facts[holder['ref_audio'], None, None]['error']}")
        if "audio" not in holder or holder.get("type") == "audio" and holder["audio"] == row.get("audio"):
            continue
        f = facts[holder["audio"], holder.get("start"), holder.get("end")]
        if "error" in f:
            raise Invalid(f"{holder['audio']}: {f['error']}")
        if f["seconds"] < cfg.min_seconds:
            raise Invalid(f"{holder['audio']}: {f['seconds']:.2f} s is shorter than --min_seconds {cfg.min_seconds:g}")
        if f["rms"] < -60:
            raise Invalid(f"{holder['audio']}: silence (RMS {f['rms']:.0f} dB of full scale)")
        exact = not re.match("MPEG|OGG|MP3", f["format"])  # lossy decoders overshoot by nature
        if f["peak"] > (1.001 if exact else 2) and not cfg.loudness:
            raise Invalid(f"{holder['audio']}: the peak is {f['peak']:.3g}, above 1; --loudness peak:-1 would bring every clip down")
        notices += [("duration", f"{row['duration']:g} s in the manifest, {f['seconds']:.2f} s in the file")
                    for d in [row.get("duration")] if holder is row and d and abs(d - f["seconds"]) > 0.1 + 0.01 * f["seconds"]]
        notices += [("sample rate", f"{row['sample_rate']:g} in the manifest, {f['rate']} in the file")
                    for r in [row.get("sample_rate")] if holder is row and r and r != f["rate"]]
        if f["clipped"] > 0.001:
            notices.append(("clipping", f"{100 * f['clipped']:.1f} % of the samples are at full scale"))
        if f["rms"] < -45:
            notices.append(("level", f"{f['rms']:.0f} dB of full scale is very quiet"))
        head, tail, seconds = f["head"], f["tail"], f["seconds"]
        if cfg.trim >= 0 and "type" not in holder and max(head, tail) > cfg.trim + 0.005:
            off = [max(0.0, s - cfg.trim) for s in (head, tail)]
            start = holder.get("start", 0)
            holder |= {"start": round(start + off[0], 3), "end": round(start + seconds - off[1], 3)}
            head, tail, seconds = min(head, cfg.trim), min(tail, cfg.trim), seconds - sum(off)
            done["clips trimmed"] += 1
            done["seconds trimmed"] += sum(off)
        if max(head, tail) > 0.5:
            notices.append(("silence", f"{head:.2f} s before and {tail:.2f} s after the speech; --trim 0.2 would cut it"))
        if cfg.loudness and "type" not in holder:
            kind, target = cfg.loudness.split(":")
            gain = min(float(target) - (f["rms"] if kind == "rms" else decibels(f["peak"] ** 2)), -0.1 - decibels(f["peak"] ** 2))
            done["clips levelled"] += 1
            holder["gain_db"] = round(float(gain), 2)
        total += seconds
        if holder is row:
            row |= {"duration": round(seconds, 3), "sample_rate": f["rate"], "facts": {**f, "head": head, "tail": tail}}
    if "audio" not in row:
        row["duration"] = round(total, 3)
    return notices


def compare(rows):
    """Notices that need all rows: equal audio, equal text of one speaker, a pace far from the others'."""
    notices, first = [], {}
    for row in rows:
        for kind, key in (("duplicate audio", (row["facts"]["sha"], row.get("start"), row.get("end")) if "audio" in row else None),
                          ("duplicate text", (row.get("speaker"), row["text"]) if "text" in row else None)):
            other = first.setdefault((kind, key), row) if key else row
            if other is not row:
                notices.append((row, kind, f"the same as {other['id']}" + (f" ({place(other)})" if place(other) != place(row) else "")))
    paced = [(len(r["text"]) / r["duration"], r) for r in rows if "text" in r]
    if len(paced) >= 8:
        middle = statistics.median(p for p, _ in paced)
        notices += [(r, "pace", f"{p:.1f} characters per second, the others about {middle:.1f}: is this the right text?")
                    for p, r in paced if not middle / 3 < p < middle * 3]
    return notices


def place(row):
    return f"{row['at'][0]} line {row['at'][1]}" if row["at"][1] else row["at"][0]


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


def references(rows, chosen, cfg):
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
            other = [r for r in random.Random(f"{cfg.seed} {row['id']}").sample(pool, min(2, len(pool))) if r is not row or cfg.ref == "same"]
            if other and other[0]["facts"]["whole"] <= cfg.max_seconds:
                row["ref_audio"] = other[0]["audio"]
                if "start" not in other[0]:
                    row["ref_text"] = other[0]["text"]
                break


# ------------------------------------------------------------------------------------------------ cache

READ = ("audio", "text", "speaker", "ref_audio", "ref_text", "emotion", "turns", "messages", *CUT)  # what encode may look at
SHARD_BYTES, SHARD_SECONDS, SHARD_RECORDS = 64 << 20, 20, 4096  # what a kill can lose, at most


def sha(*parts):
    h = hashlib.sha256()
    for part in parts:
        h.update(part if isinstance(part, memoryview) else str(part).encode("utf-8", "surrogatepass"))
    return h.hexdigest()[:32]


def hash_of(flat):
    return sha(flat.dtype, memoryview(flat.contiguous().view(torch.uint8).numpy())) if flat.numel() else sha(flat.dtype)


def write_file(path, data):
    """Bytes that appear whole or not at all, and are on the disk when this returns."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        raise Invalid(f"{path} cannot be written: {e.strerror}. Free space or choose another folder; what was written before is whole.") from None


class Cache:
    """What `encode` made of each row, in safetensors shards in one folder, for any number of checkpoints and manifests.

    A tensor is stored flat under the hash of its bytes, so that equal tensors are stored once and damage shows. The
    header of a shard holds the records: key -> {name: [tensor, shape]}. There are two kinds of key. The codec's output
    hangs on the bytes of the sound file, the cut, the gain and model.codec_key; an example on every other key that
    encode reads, and on model.encode_key: a corrected transcript does not run the codec again.
    """

    def __init__(self, folder, model):
        self.folder, self.model = Path(folder), model
        self.records, self.where, self.handles, self.sound, self.bad, self.failed = {}, {}, {}, set(), [], {}
        self.memo = read_memo(self.folder / "files.json")  # path -> [size, time, hash]: saves reading every sound file again
        whole = read_memo(self.folder / "shards.json")  # shard -> [size, time] at which all of its hashes were right
        for shard in sorted(self.folder.glob("*.safetensors")):
            try:
                self._open(shard, whole.get(shard.name))
            except (OSError, ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError):
                self.bad.append(shard)
        self.records = {k: r for k, r in self.records.items() if all(t in self.where for t, _ in r.values())}

    def _open(self, shard, whole):
        found = stamp(shard)
        with open(shard, "rb") as f:
            header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
            begin = f.tell()
        records = json.loads(header.pop("__metadata__")["records"])
        if found[0] != begin + max((t["data_offsets"][1] for t in header.values()), default=0):
            raise ValueError("cut")
        if whole != found:  # copied, restored or touched since it was written
            if any(hash_of(t) != name for name, t in safetensors.torch.load_file(shard).items()):
                raise ValueError("damaged")
            self._remember(shard)
        self.where.update(dict.fromkeys(header, shard))
        self.records.update(records)

    def _remember(self, shard):
        self._note("shards.json", read_memo(self.folder / "shards.json") | {shard.name: stamp(shard)})

    def _note(self, name, memo):
        try:
            write_file(self.folder / name, json.dumps(memo).encode("utf-8", "surrogatepass"))
        except Invalid:  # a cache that may only be read is still a cache
            pass

    def _hash(self, path):
        try:
            now = stamp(path)
            if self.memo.get(path, ())[:2] != now:
                self.memo[path] = [*now, hash_file(path)]
        except OSError as e:
            raise Invalid(f"{path} cannot be read: {e.strerror}") from None
        return self.memo[path][2]

    def _plan(self, row):
        """-> (key of the example, {key of a codec output: (path, start, end, gain)}, the row with those keys for its audio)"""
        told, wanted = copy.deepcopy({k: row[k] for k in READ if k in row}), {}
        own = [told.get(k) for k in ("audio", *CUT)]
        for holder in holders(told):
            cut = [holder.pop(k, None) for k in CUT]
            cut = own[1:] if holder.get("type") == "audio" and holder["audio"] == own[0] else cut
            for name, cut in (("audio", cut), ("ref_audio", [None] * 3)):
                if name in holder:
                    path = holder[name]
                    holder[name] = sha("codec", self._hash(path), json.dumps(cut), self.model.codec_key)
                    wanted[holder[name]] = (path, *cut)
        heard = {"emotion": self._hash(told["emotion"])} if isinstance(told.get("emotion"), str) else {}
        return sha("example", self.model.encode_key, json.dumps({**told, **heard}, sort_keys=True)), wanted, told

    def missing(self, rows) -> list[int]:
        """Which rows have no example yet. Reads sound files only where their size or time is new."""
        before = len(self.memo)
        out = [i for i, row in enumerate(rows) if self._plan(row)[0] not in self.records]
        if len(self.memo) != before:
            self._note("files.json", self.memo)
        return out

    def get(self, row) -> dict[str, torch.Tensor]:
        """The example of a row, as windows into the shard."""
        key = self._plan(row)[0]
        if key not in self.records:
            raise Invalid(f"{row.get('id', row.get('audio'))} is not in {self.folder}; run prepare_data.py for this checkpoint")
        return self._load(key)

    def _load(self, key):
        out = {}
        for name, (tensor, shape) in self.records[key].items():
            shard = self.where[tensor]
            try:
                if shard not in self.handles:
                    self.handles[shard] = safetensors.safe_open(shard, "pt")
                flat = self.handles[shard].get_tensor(tensor)
            except (OSError, safetensors.SafetensorError) as e:
                raise Invalid(f"{shard} cannot be read ({e}); run prepare_data.py again") from None
            if tensor not in self.sound:  # looked at once per process
                if hash_of(flat) != tensor:
                    (self.folder / "shards.json").unlink(missing_ok=True)  # so that the next start looks at every byte
                    raise Invalid(f"{shard} is damaged; run the same command again, and its rows will be encoded again")
                self.sound.add(tensor)
            out[name] = flat.view(shape)
        return out

    def add(self, rows, say=print) -> None:
        """Encode the rows that are missing, and only the audio that is new, with a line of progress every few seconds."""
        for stale in self.folder.glob(".*.tmp"):
            if time.time() - stale.stat().st_mtime > 600:  # of a process that was killed; no write takes that long
                stale.unlink(missing_ok=True)
        if self.bad:
            say(f"{len(self.bad)} damaged shards in {self.folder} ({', '.join(b.name for b in self.bad[:3])}): encoding their rows again")
        plans = {}
        for row in rows:
            key, wanted, told = self._plan(row)
            if key not in self.records:
                plans.setdefault(key, (row, wanted, told))
        self._note("files.json", self.memo)
        sounds = {k: source for _, wanted, _ in plans.values() for k, source in wanted.items() if k not in self.records}
        length = {k: (audio.info(path).seconds if end is None else end) - (start or 0) for k, (path, start, end, _) in sounds.items()}
        order = sorted(sounds, key=length.get, reverse=True)  # the longest first: whoever runs out of memory learns it at once
        failed = self._work("clips", order, lambda k: self._codec(*sounds[k]), length, say)
        ready = [k for k, (_, wanted, _) in plans.items() if all(s in self.records for s in wanted)]
        failed |= self._work("rows", ready, lambda k: self._example(*plans[k][1:]), {}, say)
        for shard in self.bad:
            shard.unlink(missing_ok=True)
        self.bad = []
        self.failed = {str(row.get("id", row.get("audio"))): str(failed[k]) for key, (row, wanted, _) in plans.items()
                       for k in (*wanted, key) if k in failed}
        if self.failed:
            raise Invalid(listing([(name, 0, why) for name, why in self.failed.items()]))

    def _codec(self, path, start, end, gain):
        with torch.inference_mode():
            if gain is None:
                out = self.model.encode_audio(path, start, end)
            else:
                out = self.model.encode_audio(audio.read(path, self.model.sample_rate, start, end)[0] * 10 ** (gain / 20))
        return out if isinstance(out, dict) else {"": out}

    def _example(self, wanted, told):
        codes = {k: c[""] if list(c) == [""] else c for k, c in ((k, self._load(k)) for k in wanted)}
        told = copy.deepcopy(told)
        for holder in holders(told):
            holder.update({name: codes[holder[name]] for name in ("audio", "ref_audio") if name in holder})
        with torch.inference_mode():
            return self.model.encode(told)

    def _work(self, what, keys, make, length, say):
        """make(key) for every key, on as many threads as torch may use, one each; shards are written on the way. -> {key: error}"""
        if not keys:
            return {}
        cores, total, done, failed = torch.get_num_threads(), sum(length.values()), 0.0, {}
        threads = max(1, min(cores, int(240 / max(length.values(), default=1))))  # so many minutes of audio fit into memory
        pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(max(1, cores // threads),))
        batch, tensors, begun, spoken, written = {}, {}, time.time(), time.time(), time.time()
        try:
            for n, (key, out) in enumerate(zip(keys, pool.map(lambda k: attempt(make, k), keys)), 1):
                done += length.get(key, 0)
                if isinstance(out, Invalid):
                    failed[key] = out
                else:
                    batch[key] = {}
                    for name, t in out.items():
                        flat = t.detach().to("cpu").reshape(-1)
                        batch[key][name] = [hash_of(flat), list(t.shape)]
                        if batch[key][name][0] not in self.where:
                            tensors.setdefault(batch[key][name][0], flat.clone())
                now = time.time()
                if now - written > SHARD_SECONDS or len(batch) >= SHARD_RECORDS or sum(t.nbytes for t in tensors.values()) > SHARD_BYTES:
                    self._write(batch, tensors)
                    batch, tensors, written = {}, {}, now
                if now - spoken > 5 or n == len(keys):
                    spoken, past = now, max(now - begun, 1e-9)
                    rate = f" | {done / 60:.1f} of {total / 60:.1f} min | {done / past:.0f} s audio/s" if total else ""
                    left = past * ((total - done) / max(done, 1e-9) if total else (len(keys) - n) / n)
                    say(f"encoded {n}/{len(keys)} {what}{rate} | {n / past:.1f} {what}/s | {clock(left)} left")
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(cores)
            self._write(batch, tensors)
        return failed

    def _write(self, records, tensors):
        if not records:
            return
        header = {"records": json.dumps(records)}
        number = len(list(self.folder.glob("*.safetensors"))) + 1
        shard = self.folder / f"{number:05d}-{sha(header['records'])[:12]}.safetensors"
        write_file(shard, safetensors.torch.save(tensors, header))
        self._remember(shard)
        self.where.update(dict.fromkeys(tensors, shard))
        self.records.update(records)


def attempt(make, key):
    try:
        return make(key)
    except Invalid as e:
        return e


def clock(s):
    return f"{int(s) // 3600}:{int(s) // 60 % 60:02d}:{int(s) % 60:02d}"


# ------------------------------------------------------------------------------------------------ report


def for_checkpoint(model, cache, rows, cfg):
    """What this checkpoint makes of the rows: tokens, unknown characters, steps per epoch, hours that training keeps.

    Without a cache (--check) the audio positions of all rows are told from those of one clip. -> (facts, notices)
    """
    spoken = [(r, " ".join(h["text"] for h in holders(r) if "text" in h and (h is not r or "turns" not in r))) for r in rows]
    probes = [model.encode_text(c) for c in "\ue123\uf8a7"]  # private characters: a tokenizer that knows neither gives both one id
    letters = {c for _, text in spoken for c in text if unicodedata.category(c)[0] in "LMNPS"}
    unknown = {c for c in letters if probes[0] == probes[1] == model.encode_text(c)}
    tokens = [len(model.encode_text(text)) for _, text in spoken]
    if cache is not None:
        lengths = [model.length(cache.get(r)) for r in rows]
    else:
        one = min((r for r in rows), key=lambda r: abs(r["duration"] - statistics.median(x["duration"] for x in rows)))
        rate = (model.length(model.encode({k: one[k] for k in READ if k in one})) - tokens[rows.index(one)]) / one["duration"]
        lengths = [t + math.ceil(rate * r["duration"]) for t, r in zip(tokens, rows)]
    most = cfg.max_batch_tokens // cfg.batch_size if cfg.max_batch_tokens else math.inf
    kept = [r for r, n in zip(rows, lengths) if n <= most]
    notices = [(r, "unknown tokens", "no token for " + ", ".join(f"{c} (U+{ord(c):04X})" for c in sorted(set(text) & unknown))
                + f": {100 * sum(c in unknown for c in text) / len(text):.1f} % of the text") for r, text in spoken if set(text) & unknown]
    notices += [(r, "too many tokens", f"{n} positions, training drops more than max_batch_tokens / batch_size = {most}")
                for r, n in zip(rows, lengths) if n > most]
    counted = collections.Counter(c for _, text in spoken for c in text if c in unknown)
    return {"backbone": model.backbone, "sample_rate": model.sample_rate, "text tokens": sum(tokens), "positions": sum(lengths),
            "longest": max(lengths, default=0), "rows dropped by max_batch_tokens": len(rows) - len(kept),
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


def write_report(out, cfg, rows, chosen, bad, notices, about, done, checkpoints, written):
    """report.json and report.html: the same facts, for programs and for people."""
    val = [r for r in rows if r["id"] in chosen]
    single = [r for r in rows if "facts" in r]
    speakers = {}
    for r in rows:
        s = speakers.setdefault(str(r.get("speaker", "")), {"clips": 0, "hours": 0.0})
        s["clips"], s["hours"] = s["clips"] + 1, round(s["hours"] + r["duration"] / 3600, 5)

    def hours(some):
        return round(sum(r["duration"] for r in some) / 3600, 4)

    values = {"duration in seconds": [r["duration"] for r in single],
              "characters per second": [len(r["text"]) / r["duration"] for r in single if "text" in r],
              "level in dB of full scale (RMS)": [r["facts"]["rms"] for r in single],
              "samples at full scale in %": [100 * r["facts"]["clipped"] for r in single],
              "silence before the speech in seconds": [r["facts"]["head"] for r in single],
              "silence after the speech in seconds": [r["facts"]["tail"] for r in single]}
    last = worst(rows, notices)
    data = {"inputs": about, "totals": {"rows": len(rows), "hours": hours(rows), "speakers": len(speakers), "dropped": len(bad),
                                        "train rows": len(rows) - len(val), "train hours": round(hours(rows) - hours(val), 4),
                                        "val rows": len(val), "val hours": hours(val)},
            "speakers": speakers, "dropped": [{"file": f, "line": n, "reason": why} for f, n, why in bad],
            "notices": [{"file": r["at"][0], "line": r["at"][1], "id": r["id"], "kind": kind, "what": what} for r, kind, what in notices],
            "formats": dict(collections.Counter(r["facts"]["format"] for r in single)),
            "sample rates": dict(collections.Counter(str(r["facts"]["rate"]) for r in single)),
            "channels": dict(collections.Counter(str(r["facts"]["channels"]) for r in single)), "changed": done,
            "histograms": {name: dict(zip(("edges", "counts"), page.bins(v))) for name, v in values.items()},
            "worst": [{"id": r["id"], "file": r["at"][0], "line": r["at"][1], "score": far, "why": why} for far, r, why in last],
            "checkpoints": checkpoints, "inputs_of": sorted(os.path.realpath(p) for p in cfg.input), "written": written}
    write_file(out / "report.json", json.dumps(data, indent=1, ensure_ascii=False).encode("utf-8", "backslashreplace"))

    def heard(row):
        start = row.get("start", 0)
        wave, rate = audio.read(row["audio"], None, start, min(row.get("end", math.inf), start + 8, row["facts"]["whole"]))
        return page.player(audio.resample(wave, rate, min(rate, 16000)), min(rate, 16000))

    def pairs(title, counts):
        return page.section(title, page.table(["", "clips"], list(counts.items())))

    kinds = collections.Counter(kind for _, kind, _ in notices)
    html = page.page(
        "Data report", page.facts(data["totals"]), page.facts({k: round(v, 2) for k, v in done.items() if v}),
        page.section("Inputs", page.table(["input", "shape", "rows", "bad"], [list(a.values()) for a in about])),
        page.section(f"Rows left out: {len(bad)}", page.table(["file", "line", "reason"], [[f, n or "", why] for f, n, why in bad], "No bad rows.")),
        page.section(f"Worth a look: {len(notices)}", page.facts(kinds), page.table(
            ["file", "line", "id", "what"], [[r["at"][0], r["at"][1] or "", r["id"], f"{kind}: {what}"] for r, kind, what in notices], "Nothing.")),
        page.section("How the clips are spread", page.grid(*(page.histogram(v, name) for name, v in values.items()))),
        page.grid(pairs("Formats", data["formats"]), pairs("Sample rates", data["sample rates"]), pairs("Channels", data["channels"])),
        page.section("Speakers", page.table(["speaker", "clips", "hours"], [[k or "(none named)", *v.values()] for k, v in speakers.items()])),
        *(page.section(f"For {c['checkpoint']}", page.facts({k: v for k, v in c.items() if not isinstance(v, dict) and k != "checkpoint"}),
                       page.table(["unknown character", "times"], list(c["unknown characters"].items()), "Every character has a token."))
          for c in checkpoints),
        page.section("The clips that stand out most: listen to these first", page.table(
            ["id", "sound (8 s at most)", "text", "s", "why"],
            [[r["id"], heard(r), r["text"][:300], r["duration"], ", ".join(why) or "pace, level or silence"] for _, r, why in last])))
    write_file(out / "report.html", html.encode("utf-8", "replace"))


# ------------------------------------------------------------------------------------------------ the script


def say(*words):
    print(*words, file=sys.stderr, flush=True)


def relative(path, folder):
    """Relative to the manifest where the two share more than the root."""
    path, folder = os.path.realpath(path), os.path.realpath(folder)
    try:
        shared = os.path.commonpath([path, folder])
    except ValueError:  # other drives
        return path
    return path if os.path.dirname(shared) == shared else os.path.relpath(path, folder)


def manifest(rows, folder):
    """The text of a manifest in `folder`."""
    out = []
    for row in rows:
        row = copy.deepcopy({k: row[k] for k in ("id", *KEYS) if k in row})
        for holder in holders(row):
            holder.update({k: relative(holder[k], folder) for k in ("audio", "ref_audio", "alignment") if k in holder})
        if isinstance(row.get("emotion"), str):
            row["emotion"] = relative(row["emotion"], folder)
        out.append(json.dumps(row, ensure_ascii=False) + "\n")
    return "".join(out).encode()


def gather(cfg):
    """The rows of all inputs, with unique ids, data set numbers and speakers. -> (rows, bad, [what each input is])"""
    rows, bad, about, ids = [], [], [], set()
    table = cfg.transcripts if is_file(cfg.transcripts) else ""
    for k, path in enumerate([table] if table else cfg.input):
        found, wrong, shape = read_rows(path, cfg.format, "" if table else cfg.transcripts, cfg.alignment_dir, not cfg.slice,
                                        cfg.input if table else ())
        say(f"{path}: read as {shape}, {len(found)} rows" + (f", {len(wrong)} bad" if wrong else ""))
        about.append({"input": str(path), "shape": shape, "rows": len(found), "bad": len(wrong)})
        bad += wrong if found or wrong else [(str(path), 0, "holds no rows")]
        for row in found:
            row["id"] = row["id"] if row["id"] not in ids else unused(row["id"], ids, k + 1)
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
    """Output that is there already is only replaced when it came from the same inputs. -> hashes of what was written before"""
    before = read_memo(out / "report.json")
    written = list(before.get("written", []))
    for name in ("train.jsonl", "val.jsonl") if not (own or cfg.check or cfg.overwrite) else ():
        if is_file(out / name) and hash_file(out / name) not in written:
            raise Invalid(f"{out / name} is there already and was not written by this script, or was edited since; choose another "
                          "--output_dir, give it as --input, or --overwrite it")
        if is_file(out / name) and before.get("inputs_of") != sorted(os.path.realpath(p) for p in cfg.input):
            raise Invalid(f"{out / name} is there already and was made of {', '.join(before.get('inputs_of', []))}; choose another "
                          "--output_dir or --overwrite it")
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
    own = [p for p in cfg.input if Path(p).name in ("train.jsonl", "val.jsonl") and os.path.realpath(Path(p).parent) == os.path.realpath(out)]
    if own and (len(own) < len(cfg.input) or cfg.slice or cfg.loudness or cfg.normalizer or cfg.skip_bad or cfg.trim >= 0 or cfg.ref != "none"):
        raise configs.Usage(f"{own[0]} is what this script writes; alone it is checked and encoded as it is, to change rows give the first input")
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
        references(rows, chosen, cfg)

    # ---- report, manifests
    checkpoints = []

    def report():
        write_report(out, cfg, rows, chosen, bad, notices, about, dict(done), checkpoints, written)

    def manifests():
        sides = {name: manifest([r for r in rows if (r["id"] in chosen) == side], out) for name, side in (("train.jsonl", False), ("val.jsonl", True))}
        written[:] = sorted({*written, *(hashlib.sha256(text).hexdigest()[:32] for text in sides.values())})
        report()  # first, so that a kill in between leaves no manifest that looks foreign
        for name, text in sides.items():
            write_file(out / name, text) if text else (out / name).unlink(missing_ok=True)
            say(f"{out / name}: {text.count(b'{') and len(text.splitlines())} rows")

    report()
    if bad and not cfg.skip_bad:
        raise Invalid(f"{listing(bad)}\n{len(bad)} bad rows, all in {out / 'report.html'}. Nothing else was written. Mend them, or leave them "
                      "out with --skip_bad.")
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
        if not cfg.check:
            there = [out / n for n in ("train.jsonl", "val.jsonl") if is_file(out / n)] if not own else own
            by_id, encoded = {r["id"]: r for r in rows}, read_manifest(there, {})
            cache = Cache(out / "cache", model)
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
            encoded = [{**r, "at": by_id[r["id"]]["at"]} for r in encoded]
            say(f"{out / 'cache'}: {len(encoded)} rows ready for {folder}")
        about_it, more = for_checkpoint(model, cache, rows if cfg.check else encoded, cfg)
        notices += more
        checkpoints.append({"checkpoint": str(folder), **about_it})
        report()
    hours = sum(r["duration"] for r in rows) / 3600
    say(f"{len(rows)} rows, {hours:.2f} hours, {len(bad)} left out, {len(notices)} worth a look")
    print(out / "report.html")


if __name__ == "__main__":
    configs.run(main)
