"""Where the recordings of a data set lie, and the text that belongs to each.

    for path in walk("my_voice"): ...          # every file, links followed, each folder once
    rows = with_text({"audio": path}, how)     # one row, or one for each subtitle or label

A text is looked for beside its recording, in a folder of the same name, and in the tables that corpora have
for a whole folder.
"""
import functools
import itertools
import os
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from models.parts import Invalid
from models.parts.textfiles import check_text, is_file, lines, parse, one_line, read_text, refuse_foreign
from models.parts.transcripts import read_timed, speakers_of, words_of

SOUND = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".aif", ".aiff", ".m4a", ".aac", ".wma", ".mp4", ".webm",
         ".caf", ".au", ".snd", ".w64", ".rf64", ".aifc", ".oga")
TEXTS = (".normalized.txt", ".original.txt", ".txt", ".TXT", ".lab")  # the first that is beside it wins
SUBTITLES = (".srt", ".vtt")
TIMES = (".json", ".TextGrid")
HOMES = ("wavs", "wav", "audio", "clips")  # folders beside a table in which corpora keep their recordings
# Tables by which a folder is read instead of by its recordings, in this order.
TABLES = ("metadata.csv", "metadata.jsonl", "metadata.tsv", "validated.tsv", "wav.scp")
PARTS = ("metadata.csv", "metadata.jsonl")  # those that stand once in each folder of a data set
MICROPHONE = re.compile(r"_(mic\d+)$")  # in the names of recordings that were made by several at once


@dataclass(frozen=True)
class Reading:
    """How an input is read, beside what it says itself."""

    shape: str = "auto"
    transcripts: str = ""  # folder of texts that do not lie beside their recordings
    alignment_dir: str = ""  # the same of word times
    need_text: bool = True
    roots: tuple = ()  # folders in which paths are tried besides that of the manifest and the current one
    skip: tuple = ()  # real paths of folders in which nothing is looked for
    mic: str = ""  # of recordings that were made with several, the microphone to take


# ------------------------------------------------------------------------------------------------ folders


def walk(folder, skip=()):
    """Every file below a folder, in order; links are followed, and each folder is read once."""
    files, visited = [], set(skip)
    for home, folders, names in os.walk(folder, onerror=refuse_folder, followlinks=True):
        real = os.path.realpath(home)
        if real in visited or os.path.basename(home) == "__MACOSX":
            folders.clear()
            continue
        visited.add(real)
        folders.sort()
        # A Mac leaves "._a.wav" beside a.wav on foreign disks: no sound, in spite of its name.
        files += [Path(home) / name for name in names if not name.startswith("._")]
    return sorted(files)


def refuse_folder(error):
    raise Invalid(f"{error.filename} cannot be read: {error.strerror}")


def recordings_in(path, how=Reading()):
    """Raw rows of every recording below a folder, or of one recording; the text is found beside each."""
    files = [Path(path)] if is_file(path) else walk(path, how.skip)
    if not any(map(is_sound, files)):
        yield from ((0, fault) for fault in map(foreign, files) if fault)
    for sound in files:
        if not sound.exists() and sound.is_symlink():
            yield 0, Invalid(f"{sound} is a link to {os.readlink(sound)}, where nothing is")
        elif is_sound(sound) and right_microphone(sound, how.mic):
            yield 0, {"audio": os.path.abspath(sound)}


def foreign(path):
    """An Invalid that says what a file is which holds a data set in another form, or None."""
    try:
        return refuse_foreign(path) if is_file(path) else None
    except Invalid as e:
        return e


def is_sound(path):
    return str(path).lower().endswith(SOUND) and is_file(path)


def right_microphone(sound, mic):
    found = MICROPHONE.search(sound.stem)
    return not (mic and found and found[1] != mic)


def tables_in(path, how):
    """The tables that a folder is read by: its own, or those in the folders below; [path] without any."""
    if how.shape not in ("auto", "ljspeech", "csv", "jsonl") or not os.path.isdir(path):
        return [path]
    for name in TABLES:
        if is_file(Path(path) / name):
            return [Path(path) / name]
    below = [file for file in walk(path, how.skip) if file.name in PARTS]
    return below or [path]


def without_row(rows, names, inputs, skip):
    """Recordings that lie among those of the rows, or in an input that is a folder, and that no row names.

    names: of files that a row gave, good or bad; they are compared without their folders.
    """
    named = {stem_of(name) for name in names}
    folders = {os.path.dirname(row["audio"]) for row in rows if "audio" in row}
    found = set()
    for folder in folders:
        found.update(Path(folder) / name for name in os.listdir(folder) if not name.startswith("._"))
    for path in inputs:
        if os.path.isdir(path):
            found.update(file.absolute() for file in walk(path, skip))
    left = [str(file) for file in found if is_sound(file) and stem_of(file) not in named]
    return sorted(left)


def stem_of(name):
    """The name of a file without folders and ending, in one Unicode form."""
    stem = Path(str(name).replace("\\", "/")).name
    if stem.lower().endswith(SOUND):
        stem = Path(stem).stem
    return unicodedata.normalize("NFC", stem)


def read_kaldi(path):
    """wav.scp with text, and segments and utt2spk where they are: raw rows."""
    home = Path(path).parent
    sounds, texts = dict(pairs(path)), dict(pairs(home / "text"))
    speakers = dict(pairs(home / "utt2spk"))
    segments = {}
    for name, rest in pairs(home / "segments"):
        segments[name] = rest.split()
    number_of = {line.split(maxsplit=1)[0]: n for n, line in lines(home / "segments" if segments else path)}
    for name in texts.keys() - (segments or sounds).keys():
        yield 0, Invalid(f"{name} has a text, and no line in {'segments' if segments else 'wav.scp'}")
    for name in segments or sounds:
        recording, *times = segments.get(name, [name])
        sound = sounds.get(recording)
        if sound is None:
            yield number_of[name], Invalid(f"segments names {recording}, which wav.scp does not have")
        elif sound.endswith("|"):
            what = f"{name} is a command ({sound}); run it, and give the file that it makes"
            yield number_of[name], Invalid(what)
        elif name not in texts:
            yield number_of[name], Invalid(f"{name} has no line in {home / 'text'}")
        else:
            yield number_of[name], {"id": name, "audio": sound, "text": texts[name],
                                    "speaker": speakers.get(name), **dict(zip(("start", "end"), times))}


def pairs(path):
    """(first word, the rest) of each line of a file; nothing where there is no file."""
    if not is_file(path):
        return
    for _, line in lines(path):
        name, *rest = line.split(maxsplit=1)
        yield name, " ".join(rest).strip()


# ------------------------------------------------------------------------------------------------ texts


def with_text(row, how):
    """Rows of a recording whose row names no text, from the files that belong to it.

    A plain text is one row. Subtitles and labels are one row each. Word times give the text where there is no
    other, and the cuts where the recording is too long.
    """
    sound = Path(row["audio"])
    text_file = beside(sound, how.transcripts, TEXTS, "transcripts")
    times = beside(sound, how.alignment_dir, TIMES, "alignments")
    subtitles = beside(sound, how.transcripts, SUBTITLES, "transcripts")
    spans = times and spans_of(times)
    if times and not spans:
        row.setdefault("alignment", os.path.abspath(times))
    if text_file:
        text = read_text(text_file)
        check_text(text, f"the text in {text_file}")
        timed = timed_text(text, text_file)
        spans = timed.spans if timed else None
        row["text"] = text
    elif subtitles:
        timed = timed_text(read_text(subtitles), subtitles)
        spans = timed.spans if timed else None
    if spans:
        return row_for_each(row, spans)
    if text_file:
        return [row]
    if "alignment" in row:
        row["text"] = " ".join(word.text for word in words_in(row["alignment"]))
        return [row]
    said = line_for(sound)
    if said:
        row["text"] = said
    elif how.need_text:
        names = ", ".join(sound.stem + ending for ending in (*TEXTS, *SUBTITLES, *TIMES))
        raise Invalid(f"no text, and no transcript beside the recording ({names})")
    return [row]


def read_subtitles(path, sound):
    """Raw rows of a file of subtitles for a recording."""
    timed = timed_text(read_text(path), path)
    if timed is None:
        raise Invalid(f"{path} holds no times, such as 00:00:01,000 --> 00:00:02,500")
    yield from ((0, row) for row in row_for_each({"audio": os.path.abspath(sound)}, timed.spans))


def timed_text(text, path):
    try:
        return read_timed(text)
    except Invalid as e:
        raise Invalid(f"{path}: {e}") from None


def spans_of(path):
    """The texts of a file with times that are rows of their own; None where it holds single words."""
    text = read_text(path)
    if path.suffix == ".json":
        try:
            timed = speakers_of(parse(text))
        except (KeyError, TypeError, OverflowError, ValueError):
            timed = None  # no segments as Whisper has them; words_in says what is wrong where it matters
    else:
        timed = timed_text(text, path)
    return timed.spans if timed and not timed.are_words else None


def row_for_each(row, spans):
    """A row for each stretch of a recording."""
    if {"start", "end"} & row.keys():
        raise Invalid("the row is a part of a recording whose text has times of its own; give it its text")
    rows = []
    rest = {key: value for key, value in row.items() if key not in ("duration", "alignment")}
    name = row.get("id", Path(row["audio"]).stem)
    for k, span in enumerate(spans, 1):
        piece = {"text": one_line(span.text), "start": span.start, "end": span.end, "id": f"{name}_{k:04d}"}
        if span.speaker is not None:
            check_text(span.speaker, f"the speaker of the text at {span.start:g} s")
            piece["speaker"] = span.speaker
        rows.append({**rest, **piece})
    return rows


def beside(sound, folder, endings, kind):
    """What belongs to a recording: in `folder`, beside it, or in `kind`/ where the recording is in audio/.

    Below `folder`, and in txt/ above, it may lie in a folder of the same name as the recording's. Several
    microphones share one text.
    """
    home = sound.parent
    places = [Path(folder), Path(folder) / home.name] if folder else []
    places.append(home)
    above = [parent for parent in sound.parents if parent.name == "audio"]
    if above:
        places.append(above[0].parent / kind / home.relative_to(above[0]))
    places.append(home.parent.parent / "txt" / home.name)
    forms = [unicodedata.normalize(form, sound.stem) for form in ("NFC", "NFD")]
    stems = dict.fromkeys([sound.stem, *forms, MICROPHONE.sub("", sound.stem)])
    for stem, place, ending in itertools.product(stems, places, endings):
        path = place / (stem + ending)
        if is_file(path):
            return path
    return None


def line_for(sound):
    """The text of a recording in the table that LibriSpeech has for each folder, or None."""
    return lines_of_folder(str(sound.parent)).get(sound.stem)


@functools.lru_cache(maxsize=16)  # recordings come folder by folder
def lines_of_folder(folder):
    texts = {}
    for table in sorted(Path(folder).glob("*.trans.txt")):
        texts.update(pairs(table))
    return texts


def words_in(path):
    """[Word] of a file with word times."""
    try:
        if str(path).endswith(".TextGrid"):
            timed = timed_text(read_text(path), path)
            words = timed.spans if timed and timed.are_words else None
        else:
            words = words_of(parse(read_text(path)))
        words = list(words)
    except (TypeError, KeyError, IndexError, AttributeError, OverflowError, ValueError) as e:
        if isinstance(e, Invalid):
            raise
        layout = '{"words": [{"word", "start", "end"}]}'
        raise Invalid(f"{path} holds no word times; expected {layout}") from None
    backwards = any(not 0 <= word.start <= word.end for word in words)
    backwards |= any(word.start > following.start for word, following in zip(words, words[1:]))
    if not words or backwards:
        raise Invalid(f"{path}: the word times are empty or not in order")
    return [word for word in words if word.text]
