"""What a recording is like, and where to cut it: level, clipping, silence at the ends, pauses.

Everything is judged by the level of short frames. Long files are read half a minute at a time, so that ten
hours cost no more memory than one minute.
"""
import hashlib
import itertools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from models.parts import Invalid, audio
from models.parts.textfiles import is_file, refuse_foreign

FRAME_SECONDS = 0.01  # one period of the deepest voice: the level of shorter frames follows the wave itself
READ_SECONDS = 30  # of a long file at a time: 6 MB at 48 kHz
HASH_BYTES = 1 << 20  # of a file at a time: so large that the calls do not count, and little beside the audio
HASH_DIGITS = 32  # of 64: 128 bits never meet by accident
LEAST_POWER = 1e-12  # -120 dB: digital silence needs a level, too, and 16 bits end at about -96 dB
FULL_SCALE = 0.999  # the largest sample of PCM 16 is 32767 / 32768; a lossy copy of it lies a little lower


class Clip(NamedTuple):
    """A recording, or the part of it from start to end, in seconds."""

    path: str
    start: float | None = None
    end: float | None = None


class Span(NamedTuple):
    """A stretch of a recording, in seconds."""

    start: float
    end: float

    @property
    def seconds(self):
        return self.end - self.start


class Speech(NamedTuple):
    """Where a recording begins and ends, and the pauses in between."""

    start: float
    end: float
    pauses: list[Span]


@dataclass
class Cutting:
    """How recordings are cut, in seconds."""

    shortest: float  # piece
    longest: float  # piece, where there is a pause to cut at
    pause: float  # the shortest one to cut at
    keep: float  # of a pause, at each end of a piece


def decibels(power):
    return 10 * np.log10(np.maximum(power, LEAST_POWER))


def centred(wave):
    """Without the constant offset of a cheap sound card, which nobody hears and every level would count."""
    return wave - wave.mean(dtype=np.float64).astype(np.float32)


def frame_levels(wave, rate, hop):
    """The level of each `hop` seconds in dB of full scale. (n,) -> (frames,)"""
    size = max(1, round(rate * hop))
    padded = np.pad(wave, (0, -len(wave) % size))  # zeros only lower the level of the last frame
    power = np.square(padded, dtype=np.float64)
    return decibels(power.reshape(-1, size).mean(1))


def hash_file(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(HASH_BYTES):
            digest.update(block)
    return digest.hexdigest()[:HASH_DIGITS]


def hash_bytes(data):
    """What hash_file says of a file that holds these bytes."""
    return hashlib.sha256(data).hexdigest()[:HASH_DIGITS]


def measure(clip, longest, silence_db):
    """What there is to say about a clip as a dictionary of numbers, or {"error": why it cannot be used}.

    The length is compared with `longest` before anything is decoded. head and tail are the seconds before and
    after the first frame above silence_db.
    """
    try:
        header = audio.info(clip.path)
        end = header.seconds if clip.end is None else clip.end
        length = end - (clip.start or 0)
        facts = {"seconds": round(length, 4), "whole": header.seconds, "rate": header.rate,
                 "channels": header.channels, "format": f"{header.format} {header.subtype}"}
        if length > longest:
            return {**facts, "error": f"{length:.1f} s is longer than the limit of {longest:g} s"}
        wave = audio.read(clip.path, None, clip.start, clip.end)[0].numpy()
    except Invalid as e:
        return {"error": fault_of(clip.path, e)}
    seconds = len(wave) / header.rate
    head = tail = 0.0
    sound = centred(wave)
    loud = np.flatnonzero(frame_levels(sound, header.rate, FRAME_SECONDS) > silence_db)
    if len(loud):
        head = loud[0] * FRAME_SECONDS
        tail = max(0.0, seconds - (loud[-1] + 1) * FRAME_SECONDS)
    level = decibels(np.square(sound, dtype=np.float64).mean())
    height = np.abs(wave)
    return {**facts, "seconds": round(seconds, 4),
            "head": round(float(head), 3), "tail": round(float(tail), 3),
            "rms": round(float(level), 2), "peak": float(height.max()),
            "clipped": float((height >= FULL_SCALE).mean()),
            "sha": hash_file(clip.path)}


def fault_of(path, fault):
    """Why a recording cannot be read: what the file is, where it is something else altogether."""
    try:
        if is_file(path):
            refuse_foreign(path)
    except Invalid as e:
        return str(e)
    return str(fault).removeprefix(f"{path}: ")


def find_speech(path, silence_db, hop, cutting):
    """Where the sound of a whole recording begins and ends, and its pauses; both are 0 without any sound."""
    header = audio.info(path)
    levels = []
    last = header.seconds - 0.001  # a block of less than a millisecond could be an empty one
    for start in np.arange(0, last, READ_SECONDS):
        wave, rate = audio.read(path, None, start, min(start + READ_SECONDS, header.seconds))
        levels.append(frame_levels(centred(wave.numpy()), rate, hop))
    quiet = np.concatenate([[True], np.concatenate(levels) < silence_db, [True]])
    edges = (np.flatnonzero(np.diff(quiet)) * hop).tolist()  # sound begins, ends, begins, ends ...
    if not edges:
        return Speech(0.0, 0.0, [])
    gaps = [Span(end, start) for end, start in zip(edges[1:-1:2], edges[2::2])]
    pauses = [gap for gap in gaps if gap.seconds >= cutting.pause]
    return Speech(max(0.0, edges[0] - cutting.keep), min(header.seconds, edges[-1] + cutting.keep), pauses)


def pieces(speech, cutting):
    """Cut at the first pause that is long enough and leaves a piece of the shortest length; where none comes
    before the longest, at the longest pause there is. -> [Span]"""
    spans, i, begin = [], 0, speech.start
    while True:
        while i < len(speech.pauses) and speech.pauses[i].start - begin < cutting.shortest:
            i += 1
        left = speech.pauses[i:]
        near = list(itertools.takewhile(lambda p: p.start - begin <= cutting.longest, left)) or left[:1]
        # A rest that would be too short stays with the piece in front of it, where the two are not too long.
        short_rest = near and speech.end - near[0].end < cutting.shortest
        if not near or short_rest and speech.end - begin <= cutting.longest:
            break
        enough = [pause for pause in near if pause.seconds >= cutting.pause]
        pause = enough[0] if enough else max(near, key=lambda p: p.seconds)
        kept = min(cutting.keep, pause.seconds / 2)
        spans.append(Span(round(begin, 3), round(pause.start + kept, 3)))
        begin = pause.end - kept
    if speech.end > begin:
        spans.append(Span(round(begin, 3), round(speech.end, 3)))
    return spans
