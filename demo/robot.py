"""A robot's voice on a grid: a synthesiser's speech, spoken again by sounds that repeat.

Ordinary speech is hard for a small codec because of its phase: two pulses of the voice never fall on the
same place of a frame. Here they always do. Every 10 ms of the synthesiser's speech become 24 band levels
and a share of voice; a pulse train and a noise, each the same in every 40 ms, are filtered by them and
added. Blocks of 80 ms of such speech lie near a plane of low dimension, which is all the codec
(make_codec.py) has to know.

    flite at 100 Hz --analyse--> levels (T, 24), voicing (T,) --synthesise, any pitch--> wav (T * 160,)
"""
import functools
import re
import subprocess
from typing import NamedTuple

import numpy as np

from models.parts import Invalid

RATE = 16000
HOP = 160  # 10 ms: consonants change as fast as that
PERIOD = 640  # 40 ms, after which both sounds repeat; any pitch that is a multiple of 25 Hz fits
BLOCK = 1280  # 80 ms, two periods: a frame of the codec; every word lasts a whole number of them
BANDS = 24
FFT = 1024
WINDOW = 400  # 25 ms, for analysis
FLITE_PITCH = 100  # the synthesiser speaks at this constant pitch, whatever the robot's is
NYQUIST_MARGIN = 7900  # harmonics above would come back as lower ones

# A frame counts as voiced by its autocorrelation at the period: none below the first, all above the second.
VOICED_FROM, VOICED_TO = 0.45, 0.70
# Loud vowels would take all dimensions of the codec and leave none for consonants, so levels are pulled
# together.
FRAME_POWER = 0.75
BAND_POWER = 0.5
USUAL_LEVEL = 0.05
LEAST_LEVEL = 0.0015  # softer frames count as this soft, or silence would be raised to speech
ROBOT_LEVEL = 0.06  # root mean square of the band levels of a voice


class Frames(NamedTuple):
    """What is kept of speech, a row every 10 ms."""

    levels: np.ndarray  # (T, BANDS)
    voicing: np.ndarray  # (T,) in [0, 1]


class Spoken(NamedTuple):
    """What the synthesiser said: samples, and where each of its phones begins, in seconds; at last, where
    the last one ends.
    """

    wave: np.ndarray
    bounds: list

    @property
    def seconds(self):
        return self.bounds[-1] - self.bounds[0]


def mel(hertz):
    return 2595 * np.log10(1 + hertz / 700)


CENTRES = 700 * (10 ** (np.linspace(mel(80), mel(7600), BANDS) / 2595) - 1)  # Hz


# ------------------------------------------------------------------------------------- from the synthesiser


def flite(text, voice):
    """Let flite say something at a constant pitch."""
    pitch = ["--setf", f"int_f0_target_mean={FLITE_PITCH}", "--setf", "int_f0_target_stddev=0"]
    command = ["flite", "-voice", voice, *pitch, "-psdur", "-t", text, "-o", "/dev/stdout"]
    done = subprocess.run(command, capture_output=True)
    # Audio and the list of phones come out of one pipe, in either order; the lengths in the header are not
    # to be believed, since flite cannot seek back in a pipe.
    head = done.stdout.find(b"RIFF")
    phones = re.search(rb"(?:[a-z]+:[0-9.]+\s+)+$", done.stdout)
    if done.returncode or head < 0:
        problem = done.stderr.decode(errors="replace").strip() or "no audio came out"
        raise Invalid(f"{' '.join(command)} failed: {problem}")
    if head > 0:
        listing, data = done.stdout[:head], done.stdout[head + 44:]
    else:
        listing, data = phones[0], done.stdout[44:phones.start()]
    wave = np.frombuffer(data[:len(data) // 2 * 2], "<i2") / 32768
    return Spoken(wave, phone_bounds(listing.decode().split()))


def phone_bounds(listing):
    """Seconds at which phones begin and the last one ends, of 'phone:end' entries; pauses at both ends are
    left out.
    """
    names, ends = zip(*(entry.rsplit(":", 1) for entry in listing))
    ends = [0.0, *map(float, ends)]
    spoken = [i for i, name in enumerate(names) if name != "pau"]
    return ends[spoken[0]:spoken[-1] + 2]


@functools.cache
def triangles():
    """(BANDS, bins) triangular bands on the mel scale that add up to one."""
    frequencies = np.arange(FFT // 2 + 1) * RATE / FFT
    return np.stack([np.interp(frequencies, CENTRES, row) for row in np.eye(BANDS)])


def analyse(wave, times):
    """Frames around the given seconds of the synthesiser's speech."""
    margin = 1000
    padded = np.pad(wave, 2 * margin)
    centres = np.round(np.asarray(times) * RATE).astype(int)
    centres = (centres + 2 * margin).clip(margin, len(padded) - margin)
    window = np.hanning(WINDOW)
    span = np.arange(-WINDOW // 2, WINDOW // 2)
    pieces = padded[centres[:, None] + span] * window
    power = np.abs(np.fft.rfft(pieces, FFT)) ** 2
    power /= (window**2).sum()
    bands = power @ triangles().T
    levels = np.sqrt(bands / triangles().sum(1))
    return Frames(levels, voicing(padded, centres))


def voicing(padded, centres):
    """How much each frame repeats after one period, which is known; a few samples more or less are tried."""
    period = round(RATE / FLITE_PITCH)
    span = np.arange(-200, 200)  # 25 ms
    brighter = 0.3 * np.diff(padded, prepend=0) + 0.7 * padded
    places = centres[:, None] + span - period // 2
    first = brighter[places]
    best = np.zeros(len(centres))
    for lag in range(period - 6, period + 7):
        second = brighter[places + lag]
        product = (first * second).sum(1)
        energy = (first**2).sum(1) * (second**2).sum(1)
        best = np.maximum(best, product / np.sqrt(energy + 1e-9))
    share = (best - VOICED_FROM) / (VOICED_TO - VOICED_FROM)
    return share.clip(0, 1)


# --------------------------------------------------------------------------------------------- another body


def shorten(levels, tract):
    """The bands of a vocal tract that is shorter by this factor: each takes what stood at its frequency
    divided by it.
    """
    place = np.interp(mel(CENTRES / tract), mel(CENTRES), np.arange(BANDS))
    below = np.floor(place).astype(int)
    below = below.clip(0, BANDS - 2)
    share = (place - below).clip(0, 1)
    logs = np.log(levels + 1e-6)
    lower, upper = logs[:, below], logs[:, below + 1]
    return np.exp(lower * (1 - share) + upper * share)


def compress(clips):
    """Frames of all clips of a voice with their levels pulled together: bands to their mean, frames to a
    usual level.
    """
    every = np.concatenate([clip.levels for clip in clips])
    band = np.sqrt((every**2).mean(0))
    band /= np.sqrt((band**2).mean())
    levels = [steady(clip.levels / band**BAND_POWER) for clip in clips]
    loudness = np.sqrt(np.mean(np.concatenate(levels) ** 2))
    scale = ROBOT_LEVEL / loudness
    return [Frames(level * scale, clip.voicing) for level, clip in zip(levels, clips)]


def steady(levels):
    """Each frame scaled by (its level / the usual one) ^ -FRAME_POWER, the factor smoothed over five
    frames.
    """
    power = levels**2 @ triangles().sum(1)
    level = np.sqrt(power / (FFT // 2 + 1))
    level = np.maximum(level, LEAST_LEVEL)
    change = -FRAME_POWER * np.log(level / USUAL_LEVEL)
    change = np.pad(change, 2, mode="edge")
    smooth = np.convolve(change, np.ones(5) / 5, "valid")
    return levels * np.exp(smooth)[:, None]


# ------------------------------------------------------------------------------------------------ the robot


@functools.cache
def sounds(pitch):
    """The two sounds that everything is made of, (2, PERIOD): pulses and one fixed noise, flat and equally
    strong.
    """
    n = np.arange(PERIOD)
    harmonics = np.arange(1, NYQUIST_MARGIN // pitch + 1)
    angles = 2 * np.pi * pitch / RATE * np.outer(n, harmonics)
    pulses = np.cos(angles).sum(1)
    bins = PERIOD // 2 + 1
    phases = np.random.RandomState(1).rand(bins - 8)
    spectrum = np.zeros(bins, complex)
    spectrum[4:-4] = np.exp(2j * np.pi * phases)
    pair = np.stack([pulses, np.fft.irfft(spectrum)])
    power = (pair**2).mean(1, keepdims=True)
    return pair / np.sqrt(power)


@functools.cache
def responses(pitch):
    """(2, PERIOD / HOP, BANDS, FFT): a window of 20 ms of each sound, at each place in the period, through
    each band.
    """
    window = np.hanning(2 * HOP + 1)[:-1]
    places = PERIOD // HOP
    out = np.zeros((2, places, BANDS, FFT))
    for kind, sound in enumerate(sounds(pitch)):
        for place in range(places):
            piece = np.zeros(FFT)
            samples = (place * HOP + np.arange(-HOP, HOP)) % PERIOD
            piece[FFT // 2 - HOP:FFT // 2 + HOP] = sound[samples] * window
            spectrum = np.fft.rfft(piece)
            out[kind, place] = np.fft.irfft(spectrum * triangles(), FFT)  # filtered without phase
    return out


def synthesise(frames, pitch):
    """Frames -> (T * HOP,) samples."""
    pulses, noise = responses(pitch)
    T = len(frames.levels)
    voiced = frames.levels * np.sqrt(frames.voicing)[:, None]
    unvoiced = frames.levels * np.sqrt(1 - frames.voicing)[:, None]
    wave = np.zeros(T * HOP + FFT)
    places = PERIOD // HOP
    for place in range(places):
        rows = np.arange(place, T, places)
        pieces = voiced[rows] @ pulses[place] + unvoiced[rows] @ noise[place]
        for row, piece in zip(rows, pieces):
            wave[row * HOP:row * HOP + FFT] += piece
    start = FFT // 2 - HOP // 2
    return wave[start:start + T * HOP]
