"""Lists of recordings and texts, in every shape that is common, as one kind of row.

    rows, bad, shape = read_rows("metadata.csv")   # everything that is wrong is in bad, with its place
    rows = read_manifest("train.jsonl")            # the same, but anything bad is an error that names it all

A row has an id, an absolute audio path and a text, and what else the manifest gives under the names in KEYS;
or turns, [{role, speaker, text, audio, train}], instead of one audio and text. A reader is one short function
that yields (line, raw row or Invalid) in the order of the file; line 0 is the file itself. `canonical` makes
rows of what they yield.
"""
import collections
import csv
import filecmp
import itertools
import json
import math
import os
import re
import sys
import unicodedata
from pathlib import Path
from typing import NamedTuple

from models.parts import Invalid, audio
from models.parts.clips import hash_file
from models.parts.corpora import (
    HOMES, SOUND, SUBTITLES, Reading, read_kaldi, read_subtitles, recordings_in, tables_in, with_text,
    words_in)
from models.parts.plain import read_object
from models.parts.textfiles import (
    check_text, is_file, lines, parse, one_line, read_text, refuse_foreign, shown)

CHAT_ROLES = ("system", "user", "assistant")
SHAPES = ("jsonl", "json", "csv", "ljspeech", "list", "tsv", "kaldi", "folder")
LANGUAGES = set("ar bn cs da de el en es fa fi fr he hi hu id it ja jp ko nl no pl pt ro ru sv th tr uk ur "
                "vi yue zh".split())
SAMPLE_LINES = 200  # by which a shape is recognised; the first rows of a table may be unlike the others
NAME_LENGTH = 200  # a longer cell is a text: no name of a file has more than 255 bytes
PATH_LENGTH = 4096  # of Linux; a longer one is refused by the system, too, in words that say less
LARGEST = 1e9  # no time, rate or level comes near it
EMOTIONS = 8  # intensities of an emotion that is given by hand, in the published order
LISTING_LINES = 50  # of bad rows: a screen. The report has them all

# What a trainer of another project made of a clip beforehand, each in a .npy file: the row is used as it is.
FEATURES = ("text_ids", "codes", "condition", "emo_vec")

# The keys of a row, each with the names that it is read under; the first one that has a value wins. This is
# the one list: a key that is added here is read from every shape, written to train.jsonl and given to
# `encode`, also within turns, unless LABELS or OF_A_ROW says otherwise.
KEYS = {
    "audio": ("audio", "audio_path", "audio_file", "audio_url", "audio_filepath", "path", "wav", "wav_path",
              "filename", "file_name", "file", "url"),
    "text": ("text", "transcription", "transcript", "sentence"),
    "id": ("id", "utt_id"),
    "speaker": ("speaker", "speaker_name", "speaker_id", "source", "spk", "client_id"),
    "ref_audio": ("ref_audio", "reference_audio"),
    "ref_text": ("ref_text", "reference_text"),
    "duration": ("duration",),
    "sample_rate": ("sample_rate",),
    "dataset_id": ("dataset_id",),
    "transcriber": ("transcriber",),
    "start": ("start", "offset", "start_time"),
    "end": ("end", "end_time"),
    "gain_db": ("gain_db",),
    "emotion": ("emotion",),
    "alignment": ("alignment",),
    "turns": ("turns",),
    "messages": ("messages",),
    **{key: (f"{key}_path",) for key in FEATURES},
}
CUT = ("start", "end", "gain_db")  # seconds within the file, and a factor in dB
# What `encode` is not given: when one of these changes, nothing is encoded anew.
LABELS = ("id", "duration", "sample_rate", "dataset_id", "transcriber", "alignment")
# What belongs to a whole row: a turn has none of these.
OF_A_ROW = (*LABELS, "ref_audio", "ref_text", "emotion", "turns", "messages", *FEATURES)
# What else is read of a row, a turn or a message.
ALSO_READ = ("speaker_id", "training_mask", "role", "train", "content", "type")
# Keys that say which sound belongs to a text in a way that is not followed: leaving them out would train on
# another sound.
REFUSED = {
    "start_ms": "give start in seconds",
    "end_ms": "give end in seconds",
    "start_sample": "give start in seconds",
    "end_sample": "give end in seconds",
    "frame_offset": "give start in seconds",
    "num_frames": "give end in seconds",
}
CHANNEL = ("channel", "channel_id")
OWN = ("train.jsonl", "val.jsonl")  # as prepare_data.py calls its manifests
# The keys of a turn are written in this order, so that a manifest made again is the same; those added later
# follow.
TURN_ORDER = ("role", "train", *CUT, "speaker", "text", "audio")


class Ambiguous(Invalid):
    """A file could have two shapes, and the user has to say which."""


class Place(NamedTuple):
    """Where a row stands; line 0 is the file itself."""

    file: str
    line: int = 0

    def __str__(self):
        return f"{self.file} line {self.line}" if self.line else self.file


class Fault(NamedTuple):
    """What is wrong with a row."""

    at: Place
    reason: str


class Found(NamedTuple):
    """What an input holds."""

    rows: list[dict]
    bad: list[Fault]
    shape: str
    unread: collections.Counter  # keys that nobody reads, and how many rows have them
    sounds: set  # names of recordings that its rows gave, good or bad


# ------------------------------------------------------------------------------------------------ readers

def read_jsonl(path):
    for n, line in lines(path):
        raw = parse(line)
        if not isinstance(raw, (dict, list, Invalid)):
            raw = Invalid(f"expected {{...}}, got {shown(line)}")
        yield n, raw


def read_json(path):
    """A list of rows or of conversations (lists of turns), one row, or {"file": "text", ...}."""
    text = read_text(path)
    if text.lstrip()[:1] == "[":
        yield from read_items(text)
        return
    raw = parse(text)
    if isinstance(raw, Invalid) or is_row(raw):
        yield 0, raw
    elif isinstance(raw, dict):
        for name, value in raw.items():
            given = value if isinstance(value, dict) else {"text": value}
            yield 0, {"audio": name, **given}
    else:
        yield 0, Invalid("expected a list of rows")


SPACE = re.compile(r"\s*")  # JSON's white space is a part of it


def read_items(text):
    """The items of a JSON list with the lines they start on; what follows a fault cannot be read."""
    line, counted = 1, 0
    at = text.index("[") + 1

    def line_at(position):
        """Counted on from the last call: from the beginning each time, 100,000 rows take minutes."""
        nonlocal line, counted
        line += text.count("\n", counted, position)
        counted = position
        return line

    while True:
        at = SPACE.match(text, at).end()
        if at == len(text) or text[at] == "]":
            return
        begin = line_at(at)
        try:
            raw, at = json.JSONDecoder().raw_decode(text, at)
        except (json.JSONDecodeError, RecursionError) as e:
            wrong, fault = getattr(e, "pos", at), getattr(e, "msg", str(e))
            if text[wrong : wrong + 1] == "]":
                fault = "a comma after the last row"
            yield line_at(wrong), Invalid(f"not valid JSON: {fault}; the rest was not read")
            return
        yield begin, raw if isinstance(raw, (dict, list)) else Invalid(f"expected {{...}}, got {shown(raw)}")
        at = SPACE.match(text, at).end()
        fault = fault_behind_item(text, at)
        if fault:
            yield line_at(at), Invalid(f"not valid JSON: {fault}")
            return
        if text[at] == ",":
            at += 1


def fault_behind_item(text, at):
    """What is wrong with the text behind an item of a list, or None."""
    if text[at : at + 1] not in (",", "]"):
        return "no comma after a row; the rest was not read"
    following = SPACE.match(text, at + 1).end()
    if text[at] == "," and text[following : following + 1] == "]":
        return "a comma after the last row"
    return None


def cells_of(line, delimiter, count=None):
    """The cells of a line; `count`: how many it should have.

    Between commas, quotes count. Anywhere else a quote is a letter, unless a cell was quoted as pandas does
    it: because it holds quotes, which are doubled then, or the delimiter, or with all others of its line.
    Raises csv.Error.
    """
    if delimiter == ",":
        return [cell.strip() for cell in next(csv.reader([line], strict=True))]
    cells = [cell.strip() for cell in line.split(delimiter)]
    try:
        quoted = next(csv.reader([line], delimiter=delimiter)) if '"' in line else cells
    except csv.Error:  # a cell of more than 128 kB: no quotes that a table writer put there
        quoted = cells
    rejoined = count and len(cells) > count == len(quoted)
    if rejoined or all(len(cell) > 1 and cell[0] == cell[-1] == '"' for cell in cells):
        return [cell.strip() for cell in quoted]
    return [unquoted(cell) for cell in cells]


def unquoted(cell):
    """A cell without the quotes that were put around it because it holds quotes itself."""
    inner = cell[1:-1]
    if len(cell) < 4 or cell[0] + cell[-1] != '""' or '""' not in inner:
        return cell
    return cell if '"' in inner.replace('""', "") else inner.replace('""', '"')


def read_table(path, delimiter, columns=None):
    """A table whose first line names the columns, unless they are given."""
    for n, line in lines(path):
        try:
            cells = cells_of(line, delimiter, columns and len(columns))
        except csv.Error as e:
            yield n, Invalid(f"{e}; a quote that opens must close on the same line")
            continue
        if columns is None:
            columns = [cell.strip('"').lower() for cell in cells]
        elif len(cells) != len(columns):
            yield n, Invalid(f"{len(cells)} columns, expected {len(columns)}: {delimiter.join(columns)}")
        else:
            yield n, {column: cell for column, cell in zip(columns, cells) if cell}


def read_tsv(path):
    """file, tab, text, without a header."""
    return read_table(path, "\t", ["audio", "text"])


def usual_columns(path):
    """How many columns most of the first lines have: one with more or less is no row of this table."""
    counts = [line.count("|") + 1 for _, line in itertools.islice(lines(path), SAMPLE_LINES)]
    return collections.Counter(counts).most_common(1)[0][0] if counts else 0


def unlike_neighbours(line, count, usual):
    return Invalid(f"{count} columns, and {usual} in most lines: {shown(line)}; "
                   "put a text that holds | into quotes")


def read_ljspeech(path):
    """id|text[|normalised text] without a header, wavs/<id>.wav. A quote is a letter: some never close."""
    home, usual = Path(os.path.abspath(path)).parent, usual_columns(path)
    folders = [home / name for name in ("wavs", "wav", "audio", "")]
    for n, line in lines(path):
        name, *texts = cells_of(line, "|", usual)
        if not 1 <= len(texts) <= 2:
            yield n, Invalid(f"{len(texts) + 1} columns, expected id|text or id|text|normalised text")
            continue
        if len(texts) + 1 != usual:
            yield n, unlike_neighbours(line, len(texts) + 1, usual)
            continue
        sound = find_sound(name, folders) or name
        if name.lower().endswith(SOUND):
            name = name[: -len(Path(name).suffix)]
        yield n, {"id": name, "audio": sound, "text": texts[-1] or texts[0]}


def find_sound(name, folders):
    """The recording of this name, which may lack its ending, in the first folder that has it, or None."""
    if not 0 < len(name) < NAME_LENGTH:
        return None
    for folder, ending in itertools.product(folders, ("", *SOUND)):
        path = folder / (name + ending)
        if is_file(path):
            return str(path)
    return None


def read_list(path):
    """file|text, file|speaker|text, file|language|text or file|speaker|language|text, without a header."""
    columns, usual = {2: (), 3: ("speaker",), 4: ("speaker", "language")}, usual_columns(path)
    for n, line in lines(path):
        cells = cells_of(line, "|", usual)
        if len(cells) not in columns:
            layouts = "file|speaker|text or file|speaker|language|text"
            yield n, Invalid(f"{len(cells)} columns, expected {layouts}")
            continue
        if len(cells) != usual:
            yield n, unlike_neighbours(line, len(cells), usual)
            continue
        middle = columns[len(cells)]
        if len(cells) == 3 and cells[1].lower() in LANGUAGES:
            middle = ("language",)
        yield n, dict(zip(("audio", *middle, "text"), cells))


READERS = {"jsonl": read_jsonl, "json": read_json, "ljspeech": read_ljspeech, "list": read_list,
           "folder": recordings_in, "tsv": read_tsv, "kaldi": read_kaldi}


def recognise(path, how=Reading()):
    """-> (name of the shape, its rows). What could be two shapes is asked for, never guessed."""
    shape = how.shape
    if not os.path.exists(path):
        raise Invalid(f"no file or folder at {path}")
    if os.path.isdir(path) or shape == "auto" and str(path).lower().endswith(SOUND):
        if shape not in ("auto", "folder"):
            raise Ambiguous(f"{path} is a folder; the format {shape} needs a file")
        return "folder", recordings_in(path, how)
    refuse_foreign(path)
    if shape == "auto" and str(path).lower().endswith(SUBTITLES):
        sound = find_sound(Path(path).stem, [Path(path).parent])
        if sound is None:
            raise Invalid(f"{path} holds subtitles, and no recording of that name lies beside it")
        return "subtitles", read_subtitles(path, sound)
    if shape == "auto" and Path(path).name == "wav.scp":
        shape = "kaldi"
    sample = [line for _, line in itertools.islice(lines(path), SAMPLE_LINES)]
    first = sample[0].strip() if sample else ""
    if shape in ("auto", "csv"):
        delimiter = delimiter_of(first)
        if delimiter:
            return "csv", read_table(path, delimiter)
        if shape == "csv":
            raise Invalid(f"{path}: the first line names no column for audio and text; known names are "
                          + ", ".join(KEYS["audio"] + KEYS["text"]))
    if shape == "auto":
        shape = recognise_text(path, first, sample)
    return shape, READERS[shape](path)


def delimiter_of(header):
    """What stands between the names of columns, or None where the line names none for audio and text."""
    for delimiter in ("\t", "|", ";", ","):
        names = {cell.strip().strip('"').lower() for cell in header.split(delimiter)}
        if names & set(KEYS["audio"]) and names & set(KEYS["text"]):
            return delimiter
    return None


def recognise_text(path, first, sample):
    """The shape of a file that has no header, from its first lines."""
    if is_array(first, sample):
        return "json"
    if str(path).lower().endswith((".jsonl", ".ndjson")) or first[:1] == "{" and is_row(parse(first)):
        return "jsonl"
    if first[:1] in ("[", "{"):
        return "json"
    table = [[cell.strip() for cell in line.split("|")] for line in sample]
    columns = {len(cells) for cells in table}
    tabs = collections.Counter(line.count("\t") for line in sample)
    if columns == {1} and tabs.most_common(1)[0][0] == 1:  # a line with another number is named as it is read
        return "tsv"
    if columns <= {2, 3}:
        alike = sum(len(cells) < 3 or not cells[2] or same_words(cells[1], cells[2]) for cells in table)
        if 2 * alike >= len(table):
            return "ljspeech"
    if columns in ({3}, {4}) and all(cells[-2].lower() in LANGUAGES for cells in table):
        return "list"
    if columns == {3}:
        what = "could be id|text|normalised text (ljspeech) or file|speaker|text (list)"
    else:
        what = f"has no shape that is recognised; it begins with {shown(first)}"
    raise Ambiguous(f"{path} {what}. Say which with --format {', '.join(SHAPES)}")


def is_array(first, sample):
    """Whether a file is one JSON list of rows, whatever its name; a list of turns is one row of JSONL."""
    if first[:1] != "[" or len(sample) == 1 and not first.endswith("]"):
        return first == "["
    items = parse(first) if len(sample) == 1 else None
    if not isinstance(items, list) or not items:
        return first == "["
    turns = [item for item in items if not is_row(item) or {"role", "train"} & item.keys()]
    return not turns


def is_row(raw):
    if not isinstance(raw, dict):
        return False
    return any(isinstance(raw.get(key), (str, list, dict)) for key in ("messages", "turns", *KEYS["audio"]))


def same_words(a, b):
    """Whether one is the other normalised, rather than a speaker and a text: half of the words are shared."""
    a, b = (set(re.findall(r"\w+", text.lower())) for text in (a, b))
    return 2 * len(a & b) >= max(len(a), 1)


# -------------------------------------------------------------------------------------------- canonical rows


def voices(row):
    """The row and its turns: whatever can have a speaker."""
    return [row, *row.get("turns", ())]


def holders(row):
    """The row, its turns and the parts of its messages: whatever can hold audio and text of its own."""
    parts = [message["content"] for message in row.get("messages", ())]
    return [*voices(row), *itertools.chain(*parts)]


def for_encode(row):
    """What `encode` is given of a row, and what the key of its example hangs on."""
    keys = {*KEYS, "speaker_id"}.difference(LABELS)
    return {key: value for key, value in row.items() if key in keys}


def pick(raw, key):
    """The first value that a raw row has under the names of a key."""
    for name in KEYS.get(key, (key,)):
        value = raw.get(name)
        if value is not None:
            return value
    return None


def pick_all(raw, keys):
    """The values of those keys that have one."""
    row = {}
    for key in keys:
        value = pick(raw, key)
        if value is not None:
            row[key] = value
    return row


def canonical(raw, roots):
    """A raw row under the names of KEYS, its paths absolute. Raises Invalid with the reason."""
    if isinstance(raw, list):
        raw = {"turns": raw}
    row = pick_all(raw, KEYS)
    for key in ("audio", "text", "start", "end"):
        refuse_two_values(raw, key)
    find_end(raw, row)
    for key in ("turns", "messages"):
        if key in row:
            row[key] = masked(check_objects(row[key], key), raw.get("training_mask"))
    if "messages" in row:
        row["messages"] = [message(m) for m in row["messages"]]
        roles = dict.fromkeys(str(m["role"]) for m in row["messages"])
        unknown = [role for role in roles if role not in CHAT_ROLES]
        if unknown and "assistant" in roles:
            expected = f"{', '.join(CHAT_ROLES)}, or a speaker as the role of every message"
            raise Invalid(f"the role {unknown[0]!r} beside assistant: expected {expected}")
        if not unknown:
            row = {**from_messages(row["messages"]), **row}
        else:  # roles that are speakers: a conversation
            row["turns"] = [as_turn(m) for m in row.pop("messages")]
    if "turns" in row:
        row["turns"] = [turn(t) for t in row["turns"]]
        if not any("audio" in t for t in row["turns"]):
            raise Invalid("no turn has audio")
    elif "audio" not in row and "codes" not in row:
        found = ", ".join(map(str, list(raw)[:8])) or "none"
        raise Invalid(f"no audio: expected one of {', '.join(KEYS['audio'][:6])}; the keys here are {found}")
    for key in FEATURES:
        if key in row:
            row[key] = resolve(row[key], roots, key)
    if "codes" in row and "audio" in row and not is_somewhere(row["audio"], roots):
        del row["audio"]  # the recording may have stayed on another machine: it is only needed to listen to
    for holder in holders(row):
        check_holder(holder, roots)
    for voice in voices(row):
        refuse_times(voice)
    refuse_cuts(raw, row)
    if "emotion" in row:
        row["emotion"] = emotion(row["emotion"], roots)
    return with_number(raw, row)


def find_end(raw, row):
    """Where a row gives the offset and the duration of its part of a recording, as NeMo does."""
    offset, seconds = number(raw.get("offset")), number(raw.get("duration"))
    if None not in (offset, seconds) and "end" not in row:
        row["end"] = round(offset + seconds, 6)


TIMES_IN_TEXT = re.compile(r"\d:\d\d[.,]\d+\s*-->\s*\d")


def refuse_times(voice):
    """Invalid for a text in which subtitles were pasted together with their times."""
    text = voice.get("text", "")
    if TIMES_IN_TEXT.search(text):
        raise Invalid(f"text holds times of subtitles, which are no words: {shown(text)}")


def clean_texts(row):
    """The texts of a row and its turns as every script reads them; in messages, lines mean something."""
    for voice in voices(row):
        for key in ("text", "ref_text"):
            if key in voice:
                voice[key] = one_line(voice[key])
                check_text(voice[key], f"{key} after cleaning")


def refuse_cuts(raw, row):
    """Invalid for keys that choose a part of a recording and cannot be followed."""
    for holder, key in itertools.product(raw_holders(raw), REFUSED):
        if holder.get(key) not in (None, ""):
            raise Invalid(f"{key} is {shown(holder[key])}, which is not read: {REFUSED[key]}")
    pairs = [(raw, row), *zip(raw.get("turns") or (), row.get("turns", ()))]
    for (holder, voice), key in itertools.product(pairs, CHANNEL):
        given = holder.get(key) not in (None, "") and "audio" in voice
        if given and audio.info(voice["audio"]).channels > 1:
            what = "channels are averaged here; write this one as a file"
            raise Invalid(f"{key} is {shown(holder[key])}: {what}")


def refuse_two_values(raw, key):
    given = {name: raw[name] for name in KEYS[key] if raw.get(name) is not None}
    if len({json.dumps(value) for value in given.values()}) > 1:
        raise Invalid(" and ".join(given) + f" differ; which one is the {key}?")


def check_objects(value, key):
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise Invalid(f"{key} must be a list of objects")
    return value


def masked(turns, mask):
    """Turns or messages that say themselves whether they are trained, where the row says it in one list."""
    if not isinstance(mask, list):
        return turns
    mask = mask + [None] * len(turns)
    return [{**raw, "train": train} for raw, train in zip(turns, mask)]


def turn(raw):
    """One turn of a conversation; train: false where it is only context."""
    train = raw.get("train")
    if not isinstance(train, (bool, type(None))) and train not in (0, 1):
        raise Invalid(f"train of a turn must be true or false, got {shown(train)}")
    sound = pick(raw, "audio")
    if sound is not None and pick(raw, "text") is None:
        raise Invalid(f"a turn has audio ({shown(sound)}) and no text")
    found = pick_all(raw, [*TURN_ORDER, *added_keys()])
    find_end(raw, found)
    return with_number(raw, found)


def added_keys():
    """Those of KEYS that a turn or a message has beyond what both have had from the first version on."""
    return [key for key in KEYS if key not in (*TURN_ORDER, *OF_A_ROW)]


def with_number(raw, voice):
    """Beside a speaker's name, the number that was given to it once."""
    if isinstance(voice.get("speaker"), str) and type(raw.get("speaker_id")) is int:
        voice["speaker_id"] = raw["speaker_id"]
    return voice


def emotion(value, roots):
    """A recording that has the emotion, or its intensities."""
    if isinstance(value, str):
        return resolve(value, roots, "emotion")
    if not isinstance(value, list) or len(value) != EMOTIONS or None in map(number, value):
        raise Invalid(f"emotion must be a path or {EMOTIONS} numbers, got {shown(value)}")
    return value


def check_holder(holder, roots):
    """Paths become absolute and numbers numbers, in place."""
    for key in ("audio", "ref_audio", "alignment"):
        if key in holder:
            holder[key] = resolve(holder[key], roots, key)
    for key in ("text", "ref_text"):
        if key in holder:
            check_text(holder[key], key)
    for key in (*CUT, "duration", "sample_rate"):
        if key in holder:
            holder[key] = positive(holder[key], key)
    start, end = holder.get("start", 0), holder.get("end", math.inf)
    if end <= start:
        raise Invalid(f"end {end} is not after start {start}")
    for key in ("speaker", "dataset_id", "id", "transcriber"):
        value = holder.get(key)
        if isinstance(value, str):
            check_text(value, key)
        elif key in holder and type(value) is not int:
            raise Invalid(f"{key} must be a text or a whole number, got {shown(value)}")


def positive(value, key):
    """A number that is not negative, unless it is a level."""
    found = number(value)
    if found is None or found < 0 and key != "gain_db":
        raise Invalid(f"{key} must be a number that is not negative, got {shown(value)}")
    return found


PART_KINDS = {"text": "text", "audio": "audio", "audio_url": "audio"}


def message(raw):
    """One ChatML message, its content a list of {"type": "text", "text"} and {"type": "audio", "audio"}."""
    parts = raw.get("content")
    if isinstance(parts, str):
        parts = [{"type": "text", "text": parts}]
    if not isinstance(raw.get("role"), (str, int)) or not isinstance(parts, list):
        raise Invalid(f"a message needs a role and a content, got {shown(raw)}")
    content = []
    for part in parts:
        kind = PART_KINDS.get(part.get("type")) if isinstance(part, dict) else None
        if kind is None:
            raise Invalid(f"a part of a message must have the type text or audio, got {shown(part)}")
        content.append({"type": kind, kind: pick(part, kind)})
    train = raw.get("train", raw.get("training_mask"))
    trained = {} if train is None else {"train": bool(train)}
    return {"role": raw["role"], **trained, **pick_all(raw, added_keys()), "content": content}


def as_turn(entry):
    """A message whose role is a speaker, as a turn."""
    texts = [str(part["text"]) for part in entry["content"] if part["type"] == "text"]
    sounds = [part["audio"] for part in entry["content"] if part["type"] == "audio"]
    return {
        **pick_all(entry, added_keys()),
        "speaker": entry["role"],
        "train": entry.get("train"),
        "text": " ".join(texts) or None,
        "audio": sounds[0] if sounds else None,
    }


def from_messages(messages):
    """What a model reads that knows no ChatML: the last assistant audio and its text, the first audio before
    it as the reference."""
    parts = []  # (role, part)
    for m in messages:
        for part in m["content"]:
            # What a system message says is no transcript.
            if m["role"] != "system" or part["type"] == "audio":
                parts.append((m["role"], part))
    answers = [i for i, (role, part) in enumerate(parts) if role == "assistant" and part["type"] == "audio"]
    if not answers:
        raise Invalid("no assistant message has audio")
    before = parts[: answers[-1]]
    row = {"audio": parts[answers[-1]][1]["audio"]}
    texts = texts_of(before) or texts_of(parts)
    if texts:
        row["text"] = texts[-1]
    sounds = [i for i, (_, part) in enumerate(before) if part["type"] == "audio"]
    if sounds:
        row["ref_audio"] = before[sounds[0]][1]["audio"]
        ref_texts = texts_of(before[: sounds[0]])
        if ref_texts:
            row["ref_text"] = ref_texts[-1]
    return row


def texts_of(parts):
    return [part["text"] for _, part in parts if part["type"] == "text"]


def number(value):
    """A number, also when it was written as text (a table has nothing else); None for anything else."""
    try:
        value = float(value) if isinstance(value, str) else value
        return value if type(value) in (int, float) and abs(value) < LARGEST else None
    except (ValueError, OverflowError):
        return None


def resolve(name, roots, key):
    """A path of a row, tried against each of the roots, as an absolute path."""
    if isinstance(name, dict):  # {"path": ...}, as libraries of data sets write it
        name = name.get("path") or name.get("url")
    check_path(name, key)
    for places, spelling in spellings(name, roots):
        paths = dict.fromkeys(os.path.abspath(os.path.join(root, spelling)) for root in places)
        found = [path for path in paths if is_file(path)]
        if found:
            break
    else:
        places = dict.fromkeys("the current folder" if root == "." else str(root) for root in roots)
        looked = "" if os.path.isabs(name) else f" (looked in {' and in '.join(places)})"
        short = name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH // 2] + "..."
        raise Invalid(f"no file at {short}{looked}")
    if any(not same_file(found[0], other) for other in found[1:]):
        raise Invalid(f"{name} could be {' or '.join(found)}; write an absolute path")
    return found[0]


def same_file(path, other):
    """One file under two names, or a copy of it."""
    return os.path.samefile(path, other) or filecmp.cmp(path, other, shallow=False)


def spellings(name, roots):
    """(roots, a way to write the name): first as it stands; then as Windows and Mac write it, without its
    ending, and in the folders that corpora have for recordings."""
    yield roots, name
    slashed = name.replace("\\", "/")
    names = [slashed, *(unicodedata.normalize(form, slashed) for form in ("NFC", "NFD"))]
    names = list(dict.fromkeys(names))
    yield from ((roots, other) for other in names[name == slashed :])
    if len(name) > NAME_LENGTH or os.path.isabs(slashed):
        return
    homes = [os.path.join(root, home) for root in roots for home in HOMES]
    for places in (homes, roots):
        yield from ((places, other) for other in names)
        if not slashed.lower().endswith(SOUND):
            for other, ending in itertools.product(names, SOUND):
                yield places, other + ending
                yield places, other + ending.upper()


def is_somewhere(name, roots):
    return isinstance(name, str) and any(is_file(os.path.join(root, name)) for root in roots)


def check_path(name, key):
    if not isinstance(name, str) or not name.strip():
        raise Invalid(f"{key} must be a path, got {shown(name)}")
    if "\0" in name:
        raise Invalid(f"{key} is no path: it holds a NUL ({shown(name[:40])})")
    if len(name) > PATH_LENGTH:
        raise Invalid(f"{key} is no path: it has {len(name)} characters ({shown(name[:40])})")
    if "://" in name or re.match("(?i)(file|data|https?):", name):
        raise Invalid(f"{key} {shown(name)} is a URL; nothing is downloaded here: "
                      "fetch it yourself and give its path")


# -------------------------------------------------------------------------------------------- whole manifests


def read_rows(path, how=Reading()) -> Found:
    """What an input holds. A row says under "at" where it stands."""
    tables = tables_in(path, how)
    if len(tables) == 1:
        return read_table_rows(tables[0], how)
    whole = Found([], [], "", collections.Counter(), set())
    ids, shapes = set(), {}
    for k, table in enumerate(tables, 1):
        found = read_table_rows(table, how)
        for row in found.rows:
            row["id"] = unused(row["id"], ids, k)
            ids.add(row["id"])
        whole.rows.extend(found.rows)
        whole.bad.extend(found.bad)
        whole.unread.update(found.unread)
        whole.sounds.update(found.sounds)
        shapes[found.shape] = None
    return whole._replace(shape=" and ".join(shapes))


def read_table_rows(path, how):
    shape, reader = recognise(path, how)
    line_of = {}  # id -> where a manifest gave it; 0 where it was made here
    found = Found([], [], shape, collections.Counter(), set())
    roots = roots_of(path, how)
    for n, (line, raw) in enumerate(reader, 1):
        from_folder = shape == "folder" and isinstance(raw, dict)
        at = Place(raw["audio"]) if from_folder else Place(str(path), line)
        try:
            if isinstance(raw, Invalid):
                raise raw
            found.unread.update(unread_keys(raw))
            found.sounds.update(sounds_of(raw))
            for row in whole_rows(raw, roots, how):
                row["at"] = at
                given = row.pop("id", None)
                name = stem(row) if given is None else str(given)
                if given is not None and line_of.get(name):
                    raise Invalid(f"the id {shown(name)} is also that of line {line_of[name]}")
                name = unused(name, line_of, line or n)
                line_of[name] = 0 if given is None else line
                found.rows.append({"id": name, **row})
        except Invalid as e:
            found.bad.append(Fault(at, str(e)))
    return found


def whole_rows(raw, roots, how):
    """The canonical rows of a raw one: several where its text is subtitles."""
    row = canonical(raw, roots)
    if "text" in row or "turns" in row or "audio" not in row:
        return [row]
    return with_text(row, how)


def roots_of(path, how):
    """The folders from which the paths of an input count: those of our own manifests from theirs alone,
    whatever else has the same name in the working directory."""
    home = str(path) if os.path.isdir(path) else os.path.dirname(path) or "."
    return [home] if is_own(path) else [home, *map(str, how.roots), "."]


def is_own(path):
    """Whether a manifest is one that prepare_data.py wrote: the report beside it knows its bytes."""
    report = Path(path).parent / "report.json"
    if Path(path).name not in OWN or not is_file(report) or not is_file(path):
        return False
    try:
        return hash_file(path) in read_object(report).get("written", [])
    except (Invalid, OSError, TypeError):  # no report of ours
        return False


def raw_holders(raw):
    """A raw row, its turns, its messages and their parts: every object that has keys."""
    found = [raw] if isinstance(raw, dict) else list(raw)
    for row in found[:]:
        for key in ("turns", "messages"):
            items = row.get(key) if isinstance(row, dict) else None
            found += items if isinstance(items, list) else []
    for item in found[:]:
        parts = item.get("content") if isinstance(item, dict) else None
        found += parts if isinstance(parts, list) else []
    return [holder for holder in found if isinstance(holder, dict)]


def unread_keys(raw):
    """Keys of a raw row, and of all within it, that nobody reads."""
    read = {*ALSO_READ, *CHANNEL, *REFUSED, *itertools.chain(*KEYS.values())}
    keys = set()
    for holder in raw_holders(raw):
        keys.update(str(key) for key in holder.keys() - read)
    return keys


def sounds_of(raw):
    """Names of the recordings that a raw row gives."""
    names = set()
    for holder in raw_holders(raw):
        for key in ("audio", "ref_audio"):
            name = pick(holder, key)
            name = name.get("path") if isinstance(name, dict) else name
            names.add(str(name))
    return names


def say_unread(path, unread):
    """One line for an input: what it holds that nobody reads."""
    if unread:
        names = ", ".join(f"{shown(key)} ({count} rows)" for key, count in sorted(unread.items()))
        print(f"{path}: nobody reads {names}", file=sys.stderr, flush=True)


def stem(row):
    """The name of a row's first recording; where that is no UTF-8, with question marks."""
    sounds = [holder["audio"] for holder in holders(row) if "audio" in holder]
    sounds.append(row.get("codes", ""))  # of a clip that was encoded elsewhere, and may lie there
    return Path(sounds[0]).stem.encode("utf-8", "replace").decode()


def unused(name, taken, n):
    """name, or name-n where it is taken."""
    if name not in taken:
        return name
    endings = itertools.chain([n], (f"{n}-{k}" for k in itertools.count(2)))
    return next(f"{name}-{ending}" for ending in endings if f"{name}-{ending}" not in taken)


def read_manifest(path, speakers=None, files=None) -> list[dict]:
    """The canonical rows of a manifest or of several; everything that is wrong with them in one Invalid.

    With speakers = {} (or {name: number}) each row's speaker becomes a number: a number stays what it is, a
    name keeps its speaker_id or takes the lowest number that is free, and the map is filled so that it can be
    stored. With files = {} that becomes {id: the manifest that the row is of}.
    """
    rows, bad, ids = [], [], set()
    paths = [path] if isinstance(path, (str, os.PathLike)) else path
    for k, one in enumerate(paths, 1):
        found = read_rows(one)
        bad += found.bad
        # Of a single recording none is left for validation: its manifest is empty, and no fault.
        if not found.rows and not found.bad and not (is_own(one) and not os.path.getsize(one)):
            what = 'holds no rows; expected {"audio": ..., "text": ...} per line'
            bad.append(Fault(Place(str(one)), what))
        if os.environ.get("RANK", "0") == "0":  # once, not from every process of a run
            say_unread(one, found.unread)
        for row in found.rows:
            at = row.pop("at")
            try:
                clean_texts(row)
            except Invalid as e:
                bad.append(Fault(at, str(e)))
            row["id"] = unused(row["id"], ids, k)
            ids.add(row["id"])
            if files is not None:
                files[row["id"]] = str(one)
        rows += found.rows
    if bad:
        raise Invalid(listing(bad))
    if speakers is not None:
        name_others(rows)
        number_speakers(rows, speakers)
        for voice in speaking(rows):
            voice["speaker"] = speakers[str(voice["speaker"])]
            voice.pop("speaker_id", None)
    return rows


def speaking(rows):
    """Every row and turn that names a speaker."""
    found = itertools.chain(*map(voices, rows))
    return [voice for voice in found if "speaker" in voice]


UNNAMED = "unnamed"  # the speaker of rows that name none, where others do


def name_others(rows):
    """Give rows without speaker one of their own where others have one. -> how many

    A backbone that is told who speaks takes no speaker for number 0, which is somebody else's.
    """
    if not speaking(rows):
        return 0
    single = [row for row in rows if "audio" in row and not {"turns", "messages"} & row.keys()]
    of_talks = itertools.chain(*(row.get("turns", ()) for row in rows))
    turns = [turn for turn in of_talks if "role" not in turn]
    others = [voice for voice in single + turns if "speaker" not in voice]
    for voice in others:
        voice["speaker"] = UNNAMED
    return len(others)


def number_speakers(rows, speakers):
    """Fill {name: number} with the speakers of the rows."""
    numbers = {}  # {name: number, None where no row gives one}
    for voice in speaking(rows):
        name = str(voice["speaker"])
        given = str(voice.get("speaker_id", name))
        if numbers.get(name) is None:
            numbers[name] = int(given) if given.isdecimal() else None
    used, free = set(speakers.values()), itertools.count()
    names = sorted(numbers, key=lambda name: not name.isdecimal())  # numbers first: they stay what they are
    for name in names:
        given = numbers[name]
        # Two data sets may have given one number to two names: the first one keeps it.
        if name not in speakers and given is not None and (name.isdecimal() or given not in used):
            speakers[name] = given
            used.add(given)
    for name in numbers:
        if name not in speakers:
            speakers[name] = next(n for n in free if n not in used)


def listing(bad, limit=LISTING_LINES):
    """file, line and reason of bad rows, one per line."""
    said = [f"{fault.at}: {fault.reason}" for fault in bad[:limit]]
    if len(bad) > limit:
        said.append(f"... and {len(bad) - limit} more")
    return "\n".join(said)
