"""Texts that come with times: word times, subtitles, label tracks, TextGrids.

    timed = read_timed(text)         # Timed, or None where the text is a plain one
    words = words_of(json)           # of Whisper, WhisperX, and of the two layouts of alignments

Subtitles are SRT, WebVTT and what Whisper prints; label tracks are Audacity's. A text that holds times which
cannot be read is refused: times are no words, and a model that is trained on them speaks digits.
"""
import html
import re
from typing import NamedTuple

from models.parts import Invalid


class Word(NamedTuple):
    """A word of an alignment, or a longer text, in seconds of the recording."""

    text: str
    start: float
    end: float
    speaker: str | None = None

    @property
    def middle(self):
        return (self.start + self.end) / 2


class Timed(NamedTuple):
    """What a file with times holds: single words, or texts that are rows of their own."""

    are_words: bool
    spans: list[Word]


LARGEST = 1e9  # seconds; no time comes near it
CLOCK = r"(?:(\d{1,3}):)?(\d{1,2}):(\d{2}(?:[.,]\d{1,3})?)"
CUE = re.compile(rf"\[?\s*{CLOCK}\s*-->\s*{CLOCK}(\]?)(.*)")
LYRICS = re.compile(r"\s*\[\d+:\d\d([.:]\d+)?\]")
LABEL = re.compile(r"\s*(\d+[.,]\d+)\t(\d+[.,]\d+)(?:\t(.*))?$")
MARKUP = re.compile(r"<[^<>]*>|\{\\[^{}]*\}")  # of WebVTT, and of subtitles that say where they stand
VOICE = re.compile(r"<v(?:\.\S+)? ([^<>]+)>")
WORD_TIERS = re.compile(r"(?:.* - )?words?$", re.I)  # aligners put the speaker in front


def read_timed(text):
    """Timed, or None for a plain text; raises Invalid where times cannot be read."""
    rows = text.splitlines()
    if "ooTextFile" in text[:200]:
        return read_textgrid(text)
    if any(CUE.match(row) for row in rows):
        return Timed(False, in_order(read_subtitles(rows)))
    if any(LABEL.match(row) for row in rows):
        return Timed(False, in_order(read_labels(rows)))
    if rows and any(LYRICS.match(row) for row in rows):
        raise Invalid("it holds times in brackets, which are no words; save it as SRT or as plain text")
    return None


def in_order(spans):
    """The same, or an Invalid that names the first without length, text, or order."""
    if not spans:
        raise Invalid("it holds times and no text")
    for span in spans:
        if not span.text:
            raise Invalid(f"the text at {span.start:g} s is empty")
        if not 0 <= span.start < span.end < LARGEST:  # NaN, too
            raise Invalid(f"the text at {span.start:g} s ends at {span.end:g} s: it has no length")
    return spans


def seconds(hours, minutes, rest):
    return 3600 * int(hours or 0) + 60 * int(minutes) + float(rest.replace(",", "."))


def read_subtitles(rows):
    """[Word] of SRT, WebVTT, or Whisper's lines "[00:00.000 --> 00:02.000]  text"."""
    spans, collecting = [], False
    for n, row in enumerate(rows):
        cue = CUE.match(row)
        if cue:
            start, end = seconds(*cue.groups()[:3]), seconds(*cue.groups()[3:6])
            bracket, rest = cue.groups()[6:]
            spans.append(Word(rest.strip() if bracket else "", round(start, 3), round(end, 3)))
            collecting = not bracket  # what follows the times on their line is a place on the screen
            continue
        number_of_next = row.strip().isdecimal() and n + 1 < len(rows) and CUE.match(rows[n + 1])
        if not row.strip() or number_of_next:
            collecting = False
        elif collecting:
            spans[-1] = with_line(spans[-1], row)
    return spans


def with_line(span, row):
    """A subtitle with one more line."""
    voice = VOICE.search(row)
    if voice:
        span = span._replace(speaker=voice[1].strip())
    line = html.unescape(MARKUP.sub("", row)).strip()
    return span._replace(text=f"{span.text} {line}".strip())


def read_labels(rows):
    """[Word] of a label track: start, tab, end, tab, text."""
    spans = []
    for n, row in enumerate(rows, 1):
        if not row.strip() or row.startswith("\\"):  # the frequencies of a label
            continue
        label = LABEL.match(row)
        if not label:
            raise Invalid(f"line {n} has no times, unlike others; it is neither a text nor a label track")
        start, end = (float(time.replace(",", ".")) for time in label.groups()[:2])
        spans.append(Word((label[3] or "").strip(), start, end))
    return spans


TOKEN = re.compile(r'"(?:[^"]|"")*"|-?\d+(?:\.\d+)?(?:[eE]-?\d+)?')


def read_textgrid(text):
    """Timed of Praat's TextGrid, long or short: the tier of words, else the only tier of texts."""
    tokens = TOKEN.findall(re.sub(r"\[\d*\]", "", text))
    tiers = {}
    for at, token in enumerate(tokens):
        if token == '"IntervalTier"':
            try:
                name, count = tokens[at + 1].strip('"'), int(tokens[at + 4])
            except (IndexError, ValueError):
                raise Invalid("the TextGrid is cut off, or damaged") from None
            triples = tokens[at + 5 : at + 5 + 3 * count]
            if len(triples) < 3 * count:
                raise Invalid(f"the TextGrid is cut off: its tier {name} should have {count} intervals")
            tiers[name] = read_tier(triples)
    tiers = {name: spans for name, spans in tiers.items() if spans}
    words = [name for name in tiers if WORD_TIERS.match(name)]
    chosen = words or list(tiers)
    if len(chosen) != 1:
        names = ", ".join(tiers) or "none"
        raise Invalid(f"one tier of words or of texts is needed, this TextGrid has: {names}")
    return Timed(bool(words), in_order(tiers[chosen[0]]))


def read_tier(triples):
    """[Word] of start, end, text, start ...; an interval without text is a pause."""
    spans = []
    for start, end, quoted in zip(triples[::3], triples[1::3], triples[2::3]):
        said = " ".join(quoted[1:-1].replace('""', '"').split())
        if said:
            spans.append(Word(said, float(start), float(end)))
    return spans


# ------------------------------------------------------------------------------------------------ JSON


def words_of(raw):
    """[Word] of {"words": [{"word", "start", "end"}]}, that list, {"alignments": [[word, [s, e]]]}, or of
    Whisper's segments; raises a TypeError, KeyError, IndexError or ValueError for anything else."""
    if isinstance(raw, dict) and isinstance(raw.get("segments"), list):
        raw = words_of_segments(raw["segments"])
    elif isinstance(raw, dict):
        raw = raw.get("words", raw.get("alignments"))
    return [read_word(item) for item in raw]


def words_of_segments(segments):
    """The words of Whisper's segments; a segment without word times is one long word.

    WhisperX has no times for what its aligner cannot spell, such as digits: such a word lies between its
    neighbours.
    """
    found = []
    for segment in segments:
        words = segment.get("words") or [segment]
        at = segment["start"]
        for k, word in enumerate(words):
            later = [other["start"] for other in words[k + 1 :] if "start" in other]
            end = later[0] if later else segment["end"]
            word = {"start": at, "end": max(at, end), **word}
            at = word["end"]
            found.append(word)
    return found


def speakers_of(raw):
    """Timed of segments that name who speaks, which are rows of their own; None for anything else."""
    segments = raw.get("segments") if isinstance(raw, dict) else None
    if not isinstance(segments, list) or not all(isinstance(segment, dict) for segment in segments):
        return None
    if not any("speaker" in segment for segment in segments):
        return None
    spans = []
    for segment in segments:
        word = read_word(segment)
        spans.append(word._replace(speaker=segment.get("speaker")))
    return Timed(False, in_order(spans))


def read_word(item):
    if isinstance(item, dict):
        text, start, end = item.get("word", item.get("text")), item["start"], item["end"]
    else:
        text, start, end = item[0], item[1][0], item[1][1]
    if not isinstance(text, str):
        raise TypeError(f"{text!r} is no word")
    return Word(text.strip(), float(start), float(end))
