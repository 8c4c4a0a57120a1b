"""What can be measured of a spoken clip without a listener: level, silence, pitch, distance, words.

Each number is named for what it is; none of them is a quality. Waves are (n,) float32 in [-1, 1].
"""
import math
import re

import numpy as np
import torch

from models.parts import audio
from models.parts.clips import frame_levels

SILENCE_DB = -40.0  # below the loudest frame: breath and room are quieter, soft consonants are not
FRAME = 0.01  # seconds

# Where speech ends. It rises and falls: in 24 read sentences no 0.6 s stayed within 6 dB, as hiss, rumble,
# hum and one long tone do.
BLOCK = 0.05  # seconds
STEADY = 12  # blocks that are noise where their levels lie within SPREAD_DB
SPREAD_DB = 5.0
SLACK_DB = 1.0  # by which earlier blocks of the same noise may differ more
CLICK = 2  # blocks: what is no longer and stands apart by GAP blocks is no word
GAP = 6

# Pitch by the difference function of YIN (de Cheveigne and Kawahara 2002).
PITCH_RATE = 16000  # Hz; pitch lies far below, and one rate means one window
LONGEST, SHORTEST = 267, 32  # samples of a period: 60 Hz, a low man's voice, to 500 Hz, a child's
WINDOW = 640  # samples that are compared, 40 ms: two periods of the lowest pitch
HOP = 160  # samples between two frames, 10 ms
PERIODIC = 0.15  # normalised difference below which a frame is voiced, as in the paper
VOICED_DB = -30.0  # below the loudest frame nothing is called voiced

CEPSTRA = 13  # coefficients that describe the spectral envelope; number 0, the level, is left out
CEPSTRA_RATE = 22050  # Hz; both clips are brought to it, so that codecs of other rates can be compared
FLOOR_DB = 60.0  # what lies further below the loudest point is noise of the codec or of the room


def level(wave):
    """Root mean square in dB of full scale; -120 for silence."""
    power = float(wave.double().square().mean()) if len(wave) else 0.0
    return 10 * math.log10(max(power, 1e-12))


def silence_at_end(wave, rate):
    """Seconds behind the last frame that is louder than SILENCE_DB below the loudest one."""
    if not len(wave):
        return 0.0
    levels = frame_levels(wave.numpy(), rate, FRAME)
    loud = np.flatnonzero(levels > levels.max() + SILENCE_DB)
    return max(0.0, len(wave) / rate - (int(loud[-1]) + 1) * FRAME)


def end_of_speech(wave, rate):
    """Seconds to the end of the last speech; what is louder than silence behind it is noise.

    A clip in which nothing is like speech is left whole.
    """
    size = round(BLOCK * rate)
    first = (len(wave) - 1) % size if len(wave) else 0  # blocks are counted from the end
    sharp = np.diff(wave.numpy())[first:]  # differences, in which rumble is as even as hiss
    levels = frame_levels(sharp, rate, BLOCK)
    loud = levels > levels.max(initial=-math.inf) + SILENCE_DB
    end = len(levels)
    while end:
        end = _behind_the_last(loud[:end])
        begin = _where_noise_begins(levels[:end], loud[:end])
        if begin == end:
            break
        end = begin
    return (first + 1 + end * size) / rate if end else len(wave) / rate


def _behind_the_last(loud):
    places = np.flatnonzero(loud)
    return int(places[-1]) + 1 if len(places) else 0


def _where_noise_begins(levels, loud):
    """The block at which the noise begins that these blocks end with; their number where there is none."""
    end = len(levels)
    click = _behind_the_last(~loud)  # where the last stretch without silence begins
    gap = loud[max(0, click - GAP) : click]
    if 0 < end - click <= CLICK and not gap.any():
        return click
    tail = levels[-STEADY:]
    if end < STEADY or tail.max() - tail.min() > SPREAD_DB:
        return end
    begin, low, high = end - STEADY, tail.min() - SLACK_DB, tail.max() + SLACK_DB
    while begin and low < levels[begin - 1] < high:
        begin -= 1
    if begin and levels[begin - 1] < high:  # the block in which it sets in
        begin -= 1
    return begin


def pitch(wave, rate):
    """Hz of every voiced frame, one each 10 ms. (n,) -> (voiced frames,) float64

    In each frame the wave is compared with itself, shifted by every lag; the first lag at which the
    difference, divided by its mean over all shorter lags, falls below PERIODIC and rises again is the period.
    """
    wave = audio.resample(wave.double(), rate, PITCH_RATE)
    if len(wave) < WINDOW + LONGEST:
        return torch.zeros(0, dtype=torch.float64)
    frames = wave.unfold(0, WINDOW + LONGEST, HOP)  # (T, WINDOW + LONGEST)
    difference, energy = _differences(frames)

    # Divided by the mean over the shorter lags, a short lag is no longer better only for being short.
    lags = torch.arange(1, LONGEST + 1)
    sums = difference[:, 1:].cumsum(1).clamp(min=1e-12)
    normalised = difference[:, 1:] * lags / sums  # (T, LONGEST), lag 1 first

    loud = energy > energy.max() * 10 ** (VOICED_DB / 10)
    periods = [_period(row) for row in normalised[loud].numpy()]
    return torch.tensor([PITCH_RATE / period for period in periods if period], dtype=torch.float64)


def _differences(frames):
    """Sum (x[j] - x[j + lag])^2 for lags 0 .. LONGEST, (T, LONGEST + 1), and the window's energy (T,)."""
    size = 1 << (2 * WINDOW + LONGEST - 1).bit_length()
    here = torch.fft.rfft(frames[:, :WINDOW], size)
    there = torch.fft.rfft(frames, size)
    correlation = torch.fft.irfft(there * here.conj(), size)[:, : LONGEST + 1]
    sums = torch.nn.functional.pad(frames.square().cumsum(1), (1, 0))
    energy = sums[:, WINDOW:] - sums[:, : LONGEST + 1]  # of the window, shifted by each lag
    return energy[:, :1] + energy - 2 * correlation, energy[:, 0]


def _period(row):
    """The period in samples by the normalised differences (LONGEST,) of one frame, None where it has none."""
    below = np.flatnonzero(row[SHORTEST - 1 :] < PERIODIC)
    if not len(below):
        return None
    at = int(below[0]) + SHORTEST - 1
    while at + 1 < len(row) and row[at + 1] < row[at]:
        at += 1
    return at + 1 + _vertex(row, at)


def _vertex(row, at):
    """Where a parabola through three neighbours is lowest, relative to the middle one."""
    if not 0 < at < len(row) - 1:
        return 0.0
    left, middle, right = row[at - 1 : at + 2]
    bend = left - 2 * middle + right
    return float((left - right) / (2 * bend)) if bend > 0 else 0.0


def pitch_facts(wave, rate):
    """(median in Hz, semitones from the 10th to the 90th percentile), (nan, nan) where nothing is voiced."""
    hertz = pitch(wave, rate)
    if not len(hertz):
        return math.nan, math.nan
    low, median, high = (hertz.quantile(share).item() for share in (0.1, 0.5, 0.9))
    return median, 12 * math.log2(high / low)


# ------------------------------------------------------------------------------------------------ distance


def cepstra(wave, rate):
    """Mel cepstral coefficients 1 to 13 of the power spectrum. (n,) -> (T, 13) float64"""
    mel = audio.mel_spectrogram(audio.resample(wave, rate, CEPSTRA_RATE)).double()  # (80, T), natural log
    mel = mel.clamp(min=float(mel.max()) - FLOOR_DB * math.log(10) / 20)
    bins = torch.arange(len(mel), dtype=torch.float64)
    order = torch.arange(1, CEPSTRA + 1, dtype=torch.float64)
    cosines = torch.cos(math.pi / len(mel) * order[:, None] * (bins + 0.5))
    return (2 / len(mel) * cosines @ mel).T  # the logarithm of a power is twice that of its amplitude


def aligned(costs):
    """Mean cost along the cheapest monotonic path through a table of costs (A, B): dynamic time warping.

    Worked out one anti-diagonal at a time, since all its cells depend on the two before only.
    """
    A, B = costs.shape
    total = np.full((A + 1, B + 1), np.inf)
    steps = np.zeros((A + 1, B + 1))
    total[0, 0] = 0.0
    for diagonal in range(2, A + B + 1):
        first = max(1, diagonal - B)
        last = min(A, diagonal - 1)
        i = np.arange(first, last + 1)
        j = diagonal - i
        before = (i - 1, j - 1), (i - 1, j), (i, j - 1)  # both go on, only the first, only the second
        totals = np.stack([total[place] for place in before])
        lengths = np.stack([steps[place] for place in before])
        best = totals.argmin(0)[None]
        total[i, j] = totals.min(0) + costs[i - 1, j - 1]
        steps[i, j] = 1 + np.take_along_axis(lengths, best, 0)[0]
    return float(total[A, B] / steps[A, B])


def mel_cepstral_distance(wave, rate, other, other_rate):
    """Mean distance of spectral envelopes in dB after time alignment, levels left out (Kubichek 1993)."""
    a = cepstra(wave, rate)
    b = cepstra(other, other_rate)
    decibels = 10 / math.log(10) * math.sqrt(2)
    return decibels * aligned(torch.cdist(a, b).numpy())


# ------------------------------------------------------------------------------------------------ words


def errors(wanted, got):
    """Insertions, deletions and substitutions that turn one sequence into the other (Levenshtein)."""
    row = list(range(len(got) + 1))
    for i, item in enumerate(wanted, 1):
        diagonal = row[0]
        row[0] = i
        for j, other in enumerate(got, 1):
            cheapest = min(row[j] + 1, row[j - 1] + 1, diagonal + (item != other))
            diagonal = row[j]
            row[j] = cheapest
    return row[-1]


def words(text):
    """Words in lower case without punctuation, in every script that separates them by blanks."""
    return re.findall(r"[^\W_]+(?:['\u2019][^\W_]+)*", text.lower())


def word_error_rate(wanted, got):
    return errors(words(wanted), words(got)) / max(1, len(words(wanted)))


def character_error_rate(wanted, got):
    wanted, got = ("".join(words(text)) for text in (wanted, got))
    return errors(wanted, got) / max(1, len(wanted))
