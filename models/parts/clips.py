"""What a recording is like, and where to cut it: level, clipping, silence at the ends, pauses.

Everything is told from the level of short frames. Long files are read half a minute at a time, so that ten hours cost
no more memory than one minute.
"""
import hashlib
import itertools

import numpy as np

from models.parts import Invalid, audio

FRAME = 0.01  # seconds


def decibels(power):
    return 10 * np.log10(np.maximum(power, 1e-12))


def frame_levels(wave, rate, hop):
    """The level of each `hop` seconds in dB of full scale. (n,) -> (frames,); the last frame may be a part of one."""
    size = max(1, round(rate * hop))
    return decibels(np.square(np.pad(wave, (0, -len(wave) % size)), dtype=np.float64).reshape(-1, size).mean(1))


def hash_file(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:32]


def measure(job):
    """(path, start, end, longest, silence) -> what is known of that sound, or {"error": why it cannot be used}.

    The length is compared with `longest` before anything is decoded. head and tail are seconds below `silence` dB.
    """
    path, start, end, longest, silence = job
    try:
        about = audio.info(path)
        length = (about.seconds if end is None else end) - (start or 0)
        facts = {"seconds": round(length, 4), "whole": about.seconds, "rate": about.rate, "channels": about.channels,
                 "format": f"{about.format} {about.subtype}"}
        if length > longest:
            return {**facts, "error": f"{length:.1f} s is longer than the limit of {longest:g} s"}
        wave = audio.read(path, None, start, end)[0].numpy()
    except Invalid as e:
        return {"error": str(e).removeprefix(f"{path}: ")}
    loud = np.flatnonzero(frame_levels(wave, about.rate, FRAME) > silence)
    head, tail = (loud[0] * FRAME, max(0.0, len(wave) / about.rate - (loud[-1] + 1) * FRAME)) if len(loud) else (0.0, 0.0)
    return {**facts, "seconds": round(len(wave) / about.rate, 4), "head": round(float(head), 3),
            "tail": round(float(tail), 3), "rms": round(float(decibels(np.square(wave, dtype=np.float64).mean())), 2),
            "peak": float(np.abs(wave).max()), "clipped": float((np.abs(wave) >= 0.999).mean()), "sha": hash_file(path)}


def silences(path, seconds, silence, hop, interval, keep):
    """-> (where sound begins, where it ends, [(start, end) of each pause of `interval` s or more]), with `keep` s around."""
    rate = audio.info(path).rate
    levels = [frame_levels(audio.read(path, None, at, min(at + 30, seconds))[0].numpy(), rate, hop)
              for at in np.arange(0, seconds - 0.001, 30)]
    quiet = np.concatenate([[True], np.concatenate(levels) < silence, [True]])
    edges = (np.flatnonzero(np.diff(quiet)) * hop).tolist()  # sound begins, ends, begins, ends ...
    if not edges:
        return 0.0, 0.0, []
    pauses = [(a, b) for a, b in zip(edges[1:-1:2], edges[2::2]) if b - a >= interval]
    return max(0.0, edges[0] - keep), min(seconds, edges[-1] + keep), pauses


def pieces(begin, finish, pauses, shortest, longest, interval, keep):
    """Cut at the first pause of `interval` s after `shortest` s; where none comes before `longest`, at the longest pause
    there is. At most `keep` s of it stay on each side. -> [(start, end)]"""
    out, i = [], 0
    while True:
        while i < len(pauses) and pauses[i][0] - begin < shortest:
            i += 1
        near = list(itertools.takewhile(lambda p: p[0] - begin <= longest, pauses[i:])) or pauses[i : i + 1]
        if not near or finish - near[0][1] < shortest and finish - begin <= longest:
            return out + [(round(begin, 3), round(finish, 3))] if finish > begin else out
        a, b = next((p for p in near if p[1] - p[0] >= interval), max(near, key=lambda p: p[1] - p[0]))
        out.append((round(begin, 3), round(a + min(keep, (b - a) / 2), 3)))
        begin = b - min(keep, (b - a) / 2)
