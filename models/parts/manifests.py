"""Lists of recordings and texts, in every shape that is common, as one kind of row.

    rows, bad, shape = read_rows("metadata.csv")     # all that is wrong is in bad: [(file, line, reason)]
    rows = read_manifest("train.jsonl")              # the same, but anything bad is an error that names it all

A row has an id, an absolute audio path and a text, and what else the manifest gives under the names in KEYS; or turns,
[{role, speaker, text, audio, train}], instead of one audio and text. A reader is one short function that yields
(line, raw row or Invalid) in the order of the file; line 0 is the file itself. `canonical` makes rows of what they yield.
"""
import csv
import itertools
import json
import math
import os
import re
from pathlib import Path

from models.parts import Invalid

SHAPES = ("jsonl", "json", "csv", "ljspeech", "list", "tsv", "folder")
SOUND = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".aif", ".aiff", ".m4a", ".aac", ".wma", ".mp4", ".webm")
TEXTS = (".normalized.txt", ".original.txt", ".txt", ".lab")  # beside a recording; the first that is there wins
LANGUAGES = {*"ar bn cs da de el en es fa fi fr he hi hu id it ja jp ko nl no pl pt ro ru sv th tr uk ur vi yue zh".split()}
KEYS = {  # what a row has: names that are read for it, the first one that is there wins
    "audio": ("audio", "audio_path", "audio_file", "audio_url", "audio_filepath", "path", "wav", "wav_path", "filename",
              "file_name", "file", "url"),
    "text": ("text", "transcription", "transcript", "sentence"),
    "id": ("id", "utt_id"),
    "speaker": ("speaker", "speaker_id", "source", "spk"),
    "ref_audio": ("ref_audio", "reference_audio"), "ref_text": ("ref_text", "reference_text"),
    **{key: (key,) for key in ("duration", "sample_rate", "dataset_id", "start", "end", "gain_db", "emotion", "alignment",
                               "turns", "messages")},
}
CUT = ("start", "end", "gain_db")  # seconds within the file, and a factor in dB


class Ambiguous(Invalid):
    """A file could have two shapes, and the user has to say which."""


# ------------------------------------------------------------------------------------------------ readers


def read_text(path):
    """A text file without BOM; bytes that are no UTF-8 become surrogates, which check_text names."""
    data = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise Invalid(f"{path} is UTF-16; save it as UTF-8")
    return data.decode("utf-8", "surrogateescape")


def lines(path):
    """(number, line) without BOM, line ends and blank lines; one line is in memory at a time."""
    with open(path, "rb") as f:
        for n, line in enumerate(f, 1):
            line = line.removeprefix(b"\xef\xbb\xbf") if n == 1 else line
            if n == 1 and line[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise Invalid(f"{path} is UTF-16; save it as UTF-8")
            if line.strip():
                yield n, line.rstrip(b"\r\n").decode("utf-8", "surrogateescape")


def parse(text):
    """JSON, or an Invalid that says where it ends being JSON."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        return Invalid(f"not valid JSON: {e.msg} at column {e.colno}")
    except (RecursionError, ValueError) as e:
        return Invalid(f"not valid JSON: {e}")


def read_jsonl(path):
    for n, line in lines(path):
        raw = parse(line)
        yield n, raw if isinstance(raw, (dict, list, Invalid)) else Invalid(f"expected {{...}}, got {shown(line)}")


def read_json(path):
    """A list of rows or of conversations (lists of turns), one row, or {"file": "text", ...}."""
    text = read_text(path)
    if text.lstrip()[:1] == "[":
        yield from items(text)
        return
    raw = parse(text)
    if isinstance(raw, dict) and not is_row(raw):
        yield from ((0, {"audio": k, **(v if isinstance(v, dict) else {"text": v})}) for k, v in raw.items())
    else:
        yield 0, raw if isinstance(raw, (dict, Invalid)) else Invalid("expected a list of rows")


def items(text):
    """The items of a JSON list with the lines they start on; what follows a fault cannot be read."""
    decoder, skip = json.JSONDecoder(), re.compile(r"\s*")
    line, counted, at = 1, 0, text.index("[") + 1
    while (at := skip.match(text, at).end()) < len(text) and text[at] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            raw, at = decoder.raw_decode(text, at)
        except (json.JSONDecodeError, RecursionError) as e:
            wrong = getattr(e, "pos", at)
            fault = "a comma after the last row" if text[wrong : wrong + 1] == "]" else getattr(e, "msg", str(e))
            yield line + text.count("\n", counted, wrong), Invalid(f"not valid JSON: {fault}; the rest was not read")
            return
        yield line, raw if isinstance(raw, (dict, list)) else Invalid(f"expected {{...}}, got {shown(raw)}")
        at = skip.match(text, at).end()
        if text[at : at + 1] == "," and text[skip.match(text, at + 1).end() :][:1] == "]":
            yield line + text.count("\n", counted, at), Invalid("not valid JSON: a comma after the last row")
            return
        if text[at : at + 1] not in (",", "]"):
            yield line + text.count("\n", counted, at), Invalid("not valid JSON: no comma after a row; the rest was not read")
            return
        at += text[at] == ","


def read_table(path, delimiter, columns=None):
    """A table whose first line names the columns, unless they are given. Quotes count only between commas."""
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
    """id|text[|normalised text] without a header, wavs/<id>.wav. A quote is a letter: some are never closed."""
    folders = [Path(os.path.abspath(path)).parent / sub for sub in ("wavs", "wav", "audio", "")]
    for n, line in lines(path):
        name, *texts = [cell.strip() for cell in line.split("|")]
        if not 1 <= len(texts) <= 2:
            yield n, Invalid(f"{len(texts) + 1} columns, expected id|text or id|text|normalised text")
            continue
        tried = [f / (name + end) for f in folders for end in ("", *SOUND)] if name and len(name) < 200 else []
        found = next((str(t) for t in tried if is_file(t)), f"wavs/{name}.wav")
        name = name[: -len(Path(name).suffix)] if name.lower().endswith(SOUND) else name
        yield n, {"id": name, "audio": found, "text": texts[-1] or texts[0]}


def read_list(path):
    """file|text, file|speaker|text, file|language|text or file|speaker|language|text, without a header."""
    for n, line in lines(path):
        cells = [c.strip() for c in line.split("|")]
        middle = {2: (), 3: ("speaker",), 4: ("speaker", "language")}.get(len(cells))
        middle = ("language",) if len(cells) == 3 and cells[1].lower() in LANGUAGES else middle
        wrong = Invalid(f"{len(cells)} columns, expected file|speaker|text or file|speaker|language|text")
        yield n, wrong if middle is None else dict(zip(("audio", *middle, "text"), cells))


def read_folder(path):
    """Every recording below a folder, or one recording; the text is found beside it."""
    found = [path] if is_file(path) else sorted(p for p in Path(path).rglob("*") if is_file(p))
    for sound in (p for p in found if str(p).lower().endswith(SOUND)):
        yield 0, {"audio": os.path.abspath(sound)}


READERS = {"jsonl": read_jsonl, "json": read_json, "ljspeech": read_ljspeech, "list": read_list, "folder": read_folder,
           "tsv": lambda path: read_table(path, "\t", ["audio", "text"])}


def recognise(path, shape="auto"):
    """-> (name of the shape, its rows). What could be two shapes is asked for, never guessed."""
    if not os.path.exists(path):
        raise Invalid(f"no file or folder at {path}")
    if os.path.isdir(path) or shape == "auto" and str(path).lower().endswith(SOUND):
        if shape not in ("auto", "folder"):
            raise Ambiguous(f"{path} is a folder; the format {shape} needs a file")
        return "folder", read_folder(path)
    sample = [line for _, line in itertools.islice(lines(path), 200)]
    first = sample[0].strip() if sample else ""
    if shape in ("auto", "csv"):
        for delimiter in ("\t", "|", ";", ","):
            names = {c.strip().strip('"').lower() for c in first.split(delimiter)}
            if names & set(KEYS["audio"]) and names & set(KEYS["text"]):
                return "csv", read_table(path, delimiter)
        if shape == "csv":
            raise Invalid(f"{path}: the first line names no column for audio and text; known names are "
                          + ", ".join(KEYS["audio"] + KEYS["text"]))
    shape = recognise_text(path, first, sample) if shape == "auto" else shape
    return shape, READERS[shape](path)


def recognise_text(path, first, sample):
    """The shape of a file that has no header, from its first lines."""
    if str(path).lower().endswith((".jsonl", ".ndjson")) or first[:1] == "{" and is_row(parse(first)):
        return "jsonl"
    if first[:1] in ("[", "{"):
        return "json"
    cells = [[c.strip() for c in line.split("|")] for line in sample]
    columns = {len(c) for c in cells}
    if columns == {1} and {line.count("\t") for line in sample} == {1}:
        return "tsv"
    if columns <= {2, 3} and 2 * sum(len(c) < 3 or not c[2] or same_words(c[1], c[2]) for c in cells) >= len(cells):
        return "ljspeech"
    if columns in ({3}, {4}) and all(c[-2].lower() in LANGUAGES for c in cells):
        return "list"
    what = ("could be id|text|normalised text (ljspeech) or file|speaker|text (list)" if columns == {3} else
            f"has no shape that is recognised; it begins with {shown(first)}")
    raise Ambiguous(f"{path} {what}. Say which with --format {', '.join(SHAPES)}")


def is_row(raw):
    keys = ("messages", "turns", *KEYS["audio"])
    return isinstance(raw, dict) and any(isinstance(raw.get(k), (str, list, dict)) for k in keys)


def same_words(a, b):
    """Whether one is the other normalised, rather than a speaker and a text: half of the words are shared."""
    a, b = (set(re.findall(r"\w+", t.lower())) for t in (a, b))
    return 2 * len(a & b) >= max(len(a), 1)


def is_file(path):
    try:
        return os.path.isfile(path)
    except (OSError, ValueError):  # no name that a file could have
        return False


# ------------------------------------------------------------------------------------------------ canonical rows


def holders(row):
    """The row, its turns and the parts of its messages: whatever can hold audio and text of its own."""
    return [row, *row.get("turns", ()), *(p for m in row.get("messages", ()) for p in m["content"])]


def pick(raw, key):
    return next((raw[n] for n in KEYS[key] if raw.get(n) is not None), None)


def canonical(raw, roots):
    """A raw row under the names of KEYS, its paths absolute. Raises Invalid with the reason."""
    raw = {"turns": raw} if isinstance(raw, list) else raw
    row = {key: value for key in KEYS if (value := pick(raw, key)) is not None}
    for key in ("audio", "text"):
        given = {n: raw[n] for n in KEYS[key] if raw.get(n) is not None}
        if len({json.dumps(v) for v in given.values()}) > 1:
            raise Invalid(" and ".join(given) + f" differ; which one is the {key}?")
    for key in ("turns", "messages"):
        if key in row and not (isinstance(row[key], list) and row[key] and all(isinstance(t, dict) for t in row[key])):
            raise Invalid(f"{key} must be a list of objects")
        if key in row and isinstance(raw.get("training_mask"), list):
            mask = raw["training_mask"] + [None] * len(row[key])
            row[key] = [{**t, "train": m} for t, m in zip(row[key], mask)]
    if "messages" in row:
        row["messages"] = [message(m) for m in row["messages"]]
        if all(m["role"] in ("system", "user", "assistant") for m in row["messages"]):
            row = {**from_messages(row["messages"]), **row}
        else:  # roles that are speakers: a conversation
            row["turns"] = [as_turn(m) for m in row.pop("messages")]
    if "turns" in row:
        row["turns"] = [turn(t) for t in row["turns"]]
        if not any("audio" in t for t in row["turns"]):
            raise Invalid("no turn has audio")
    elif "audio" not in row:
        there = ", ".join(map(str, list(raw)[:8])) or "none"
        raise Invalid(f"no audio: expected one of {', '.join(KEYS['audio'][:6])}; the keys here are {there}")
    for holder in holders(row):
        check_holder(holder, roots)
    if isinstance(row.get("emotion"), str):
        row["emotion"] = resolve(row["emotion"], roots, "emotion")
    elif "emotion" in row and not (isinstance(row["emotion"], list) and len(row["emotion"]) == 8
                                   and None not in map(number, row["emotion"])):
        raise Invalid(f"emotion must be a path or 8 numbers, got {shown(row['emotion'])}")
    return numbered(raw, row)


def turn(raw):
    """One turn of a conversation; train: false where it is only context."""
    if not isinstance(raw.get("train"), (bool, type(None))) and raw["train"] not in (0, 1):
        raise Invalid(f"train of a turn must be true or false, got {shown(raw['train'])}")
    if pick(raw, "audio") is not None and pick(raw, "text") is None:
        raise Invalid(f"a turn has audio ({shown(pick(raw, 'audio'))}) and no text")
    out = {k: raw[k] for k in ("role", "train", *CUT) if raw.get(k) is not None}
    return numbered(raw, out | {k: v for k in ("speaker", "text", "audio") if (v := pick(raw, k)) is not None})


def numbered(raw, out):
    """Beside a speaker's name, the number that was given to it once."""
    if isinstance(out.get("speaker"), str) and type(raw.get("speaker_id")) is int:
        out["speaker_id"] = raw["speaker_id"]
    return out


def check_holder(holder, roots):
    for key in ("audio", "ref_audio", "alignment"):
        if key in holder:
            holder[key] = resolve(holder[key], roots, key)
    for key in ("text", "ref_text"):
        if key in holder:
            check_text(holder[key], key)
    for key in (*CUT, "duration", "sample_rate"):
        if key in holder:
            value, holder[key] = holder[key], number(holder[key])
            if holder[key] is None or holder[key] < 0 and key != "gain_db":
                raise Invalid(f"{key} must be a number that is not negative, got {shown(value)}")
    if holder.get("end", math.inf) <= holder.get("start", 0):
        raise Invalid(f"end {holder['end']} is not after start {holder.get('start', 0)}")
    for key in ("speaker", "dataset_id", "id"):
        if isinstance(holder.get(key), str):
            check_text(holder[key], key)
        elif key in holder and type(holder[key]) is not int:
            raise Invalid(f"{key} must be a text or a whole number, got {shown(holder[key])}")


def message(raw):
    """One ChatML message with its content as a list of {"type": "text", "text"} and {"type": "audio", "audio"}."""
    parts = raw.get("content")
    parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
    if not isinstance(raw.get("role"), (str, int)) or not isinstance(parts, list):
        raise Invalid(f"a message needs a role and a content, got {shown(raw)}")
    content = []
    for p in parts:
        kind = {"text": "text", "audio": "audio", "audio_url": "audio"}.get(p.get("type")) if isinstance(p, dict) else None
        if kind is None:
            raise Invalid(f"a part of a message must have the type text or audio, got {shown(p)}")
        content.append({"type": kind, kind: pick(p, kind)})
    train = raw.get("train", raw.get("training_mask"))
    return {"role": raw["role"], **({} if train is None else {"train": bool(train)}), "content": content}


def as_turn(m):
    """A message whose role is a speaker, as a turn."""
    words = [str(p["text"]) for p in m["content"] if p["type"] == "text"]
    sounds = [p["audio"] for p in m["content"] if p["type"] == "audio"]
    return {"speaker": m["role"], "train": m.get("train"), "text": " ".join(words) or None, "audio": (sounds or [None])[0]}


def from_messages(messages):
    """What is read out of ChatML without it: the last assistant audio and its text; the first audio before as reference."""
    parts = [(m["role"], p) for m in messages for p in m["content"] if m["role"] != "system" or p["type"] == "audio"]
    said = [i for i, (role, p) in enumerate(parts) if role == "assistant" and p["type"] == "audio"]
    if not said:
        raise Invalid("no assistant message has audio")

    def last_text(before):
        return next(({"text": p["text"]} for _, p in reversed(before) if p["type"] == "text"), {})

    row = {"audio": parts[said[-1]][1]["audio"], **(last_text(parts[: said[-1]]) or last_text(parts))}
    first = next((i for i, (_, p) in enumerate(parts[: said[-1]]) if p["type"] == "audio"), None)
    if first is not None:
        row |= {"ref_audio": parts[first][1]["audio"], **{"ref_text": t for t in last_text(parts[:first]).values()}}
    return row


def number(value):
    """A number below a billion, also when it was written as text (a table has nothing else); otherwise None."""
    try:
        value = float(value) if isinstance(value, str) else value
        return value if type(value) in (int, float) and abs(value) < 1e9 else None
    except (ValueError, OverflowError):
        return None


def shown(value):
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def check_text(text, key):
    if not isinstance(text, str):
        raise Invalid(f"{key} must be text, got {shown(text)}")
    if not text.strip():
        raise Invalid(f"{key} is empty")
    bad = re.search("[\ud800-\udfff]", text)
    if bad:
        code = ord(bad[0])
        byte = 0xDC80 <= code <= 0xDCFF  # what lines() made of it
        what = f"the byte 0x{code - 0xDC00:02x}, which is not UTF-8" if byte else f"a lone surrogate U+{code:04X}"
        raise Invalid(f"{key} holds {what}, at character {bad.start() + 1}; save the file as UTF-8")


def resolve(name, roots, key):
    """A path of a row, tried against each of the roots, as an absolute path."""
    name = (name.get("path") or name.get("url")) if isinstance(name, dict) else name  # {"path": ...} of a data set library
    if not isinstance(name, str) or not name.strip():
        raise Invalid(f"{key} must be a path, got {shown(name)}")
    if "\0" in name or len(name) > 4096:
        what = "it holds a NUL" if "\0" in name else f"it has {len(name)} characters"
        raise Invalid(f"{key} is no path: {what} ({shown(name[:40])})")
    if "://" in name or re.match("(?i)(file|data|https?):", name):
        raise Invalid(f"{key} {shown(name)} is a URL; nothing is downloaded here: fetch it yourself and give its path")
    found = [p for p in dict.fromkeys(os.path.abspath(os.path.join(root, name)) for root in roots) if is_file(p)]
    if not found:
        places = dict.fromkeys("the current folder" if r == "." else str(r) for r in roots)
        looked = "" if os.path.isabs(name) else f" (looked in {' and in '.join(places)})"
        raise Invalid(f"no file at {name if len(name) <= 200 else name[:100] + '...'}{looked}")
    if any(not os.path.samefile(found[0], other) for other in found[1:]):
        raise Invalid(f"{name} could be {' or '.join(found)}; write an absolute path")
    return found[0]


# ------------------------------------------------------------------------------------------------ whole manifests


def beside(sound, folder, endings, kind):
    """What belongs to a recording: in `folder`, beside it, or in transcripts/ (`kind`) where it lies in audio/."""
    sound = Path(sound)
    places = [Path(folder)] if folder else []
    places.append(sound.parent)
    places += [p.parent / kind / sound.parent.relative_to(p) for p in sound.parents if p.name == "audio"][:1]
    return next((t for p in places for end in endings if is_file(t := p / (sound.stem + end))), None)


def words_in(path):
    """[(word, start, end)] of {"words": [{"word", "start", "end"}]}, that list, or {"alignments": [[word, [s, e]]]}."""
    raw = parse(read_text(path))
    raw = raw.get("words", raw.get("alignments")) if isinstance(raw, dict) else raw
    try:
        out = [(str(w.get("word", w.get("text"))), float(w["start"]), float(w["end"])) if isinstance(w, dict)
               else (str(w[0]), float(w[1][0]), float(w[1][1])) for w in raw]
    except (TypeError, KeyError, IndexError, ValueError):
        raise Invalid(f'{path} holds no word times; expected {{"words": [{{"word", "start", "end"}}]}}') from None
    if not out or any(not 0 <= a <= b for _, a, b in out) or any(a[1] > b[1] for a, b in zip(out, out[1:])):
        raise Invalid(f"{path}: the word times are empty or not in order")
    return [(w.strip(), a, b) for w, a, b in out if w.strip()]


def read_rows(path, shape="auto", transcripts="", alignment_dir="", need_text=True, roots=()):
    """-> (rows, bad [(file, line, reason)], name of the shape). A row says under "at" where it stands: (file, line)."""
    rows, bad, ids = [], [], {}
    if os.path.isdir(path) and shape in ("auto", "ljspeech") and is_file(Path(path) / "metadata.csv"):
        path = Path(path) / "metadata.csv"
    shape, reader = recognise(path, shape)
    roots = [str(path) if os.path.isdir(path) else os.path.dirname(path) or ".", *map(str, roots), "."]
    for n, (line, raw) in enumerate(reader, 1):
        at = (raw["audio"], 0) if shape == "folder" else (str(path), line)
        try:
            if isinstance(raw, Invalid):
                raise raw
            row = {**canonical(raw, roots), "at": at}
            if "text" not in row and "turns" not in row:
                find_text(row, transcripts, alignment_dir, need_text)
            given = row.pop("id", None)
            name = str(given) if given is not None else stem(row)
            if given is not None and ids.get(name):
                raise Invalid(f"the id {shown(name)} is also that of line {ids[name]}")
            name = unused(name, ids, line or n)
            ids[name] = line if given is not None else 0
            rows.append({"id": name, **row})
        except Invalid as e:
            bad.append((*at, str(e)))
    return rows, bad, shape


def stem(row):
    """The name of a row's first recording; where that is no UTF-8, with question marks."""
    return Path(next(h["audio"] for h in holders(row) if "audio" in h)).stem.encode("utf-8", "replace").decode()


def find_text(row, transcripts, alignment_dir, need_text):
    """The text of a row that names none, from the files that belong to its recording."""
    texts = beside(row["audio"], transcripts, TEXTS, "transcripts")
    times = beside(row["audio"], alignment_dir, (".json",), "alignments")
    if times:
        row.setdefault("alignment", os.path.abspath(times))
    if texts:
        row["text"] = read_text(texts)
        check_text(row["text"], f"the text in {texts}")
    elif "alignment" in row:
        row["text"] = " ".join(w for w, _, _ in words_in(row["alignment"]))
    elif need_text:
        name = Path(row["audio"]).stem
        raise Invalid("no text, and no transcript beside the recording (" + ", ".join(name + end for end in TEXTS) + ")")


def unused(name, taken, n):
    """name, or name-n where it is taken."""
    names = itertools.chain([name, f"{name}-{n}"], (f"{name}-{n}-{k}" for k in itertools.count(2)))
    return next(c for c in names if c not in taken)


def read_manifest(path, speakers=None) -> list[dict]:
    """The canonical rows of a manifest or of several; everything that is wrong with them in one Invalid.

    With speakers = {} (or {name: number}) each row's speaker becomes a number: a number stays what it is, a name keeps
    its speaker_id or takes the lowest number that is free, and the map is filled so that it can be stored.
    """
    rows, bad, ids = [], [], set()
    for k, one in enumerate([path] if isinstance(path, (str, os.PathLike)) else path, 1):
        found, wrong, _ = read_rows(one)
        bad += wrong if found or wrong else [(str(one), 0, 'holds no rows; expected {"audio": ..., "text": ...} per line')]
        for row in found:
            ids.add(name := unused(row["id"], ids, k))
            rows.append({key: value for key, value in {**row, "id": name}.items() if key != "at"})
    if bad:
        raise Invalid(listing(bad))
    if speakers is not None:
        number_speakers(rows, speakers)
        for t in (t for row in rows for t in (row, *row.get("turns", ())) if "speaker" in t):
            t["speaker"] = speakers[str(t["speaker"])]
            t.pop("speaker_id", None)
    return rows


def number_speakers(rows, speakers):
    """Fill {name: number} with the speakers of the rows."""
    spoken = {}  # {name: number, None where no row gives one}
    for t in (t for row in rows for t in (row, *row.get("turns", ())) if "speaker" in t):
        known = str(t.get("speaker_id", t["speaker"]))
        if spoken.get(str(t["speaker"])) is None:
            spoken[str(t["speaker"])] = int(known) if known.isdecimal() else None
    taken, free = set(speakers.values()), itertools.count()
    for name in sorted(spoken, key=lambda name: not name.isdecimal()):  # numbers stay what they are, so they come first
        known = spoken[name]
        if name not in speakers and known is not None and (name.isdecimal() or known not in taken):
            speakers[name] = known  # two data sets may have given one number to two names: the first one keeps it
            taken.add(known)
    for name in spoken:
        if name not in speakers:
            speakers[name] = next(n for n in free if n not in taken)


def listing(bad, limit=50):
    """file, line and reason of bad rows, one per line."""
    said = [(f"{file} line {line}" if line else str(file)) + f": {reason}" for file, line, reason in bad[:limit]]
    return "\n".join(said + ([f"... and {len(bad) - limit} more"] if len(bad) > limit else []))
