"""Sound files in and out, resampling, and the spectral features that the frozen encoders were trained on.

    wave, rate = read("clip.flac", rate=16000)      # (n,) float32 mono in [-1, 1]
    write("out.wav", wave, rate)                    # PCM 16

wav, flac, ogg and mp3 go through soundfile. A file that is cut, empty or holds NaN is refused with its name,
because libsndfile would read the first half of a cut WAV, or a NaN, without a word; see containers.py.
Features are computed on the CPU in float64 and returned as float32: they are logarithms of small numbers, and
are made once per clip.
"""
import functools
import io
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F

from models.parts import Invalid, containers
from models.parts.plain import forget, temporary_name

# ------------------------------------------------------------------------------------------------ files

END_SLACK = 0.1  # seconds that an end may lie behind the file: manifests round the length of a clip
MP3_SHARE = 0.99  # of the samples that the header promises; without an index, mp3 lengths are estimates
PCM_SCALE = 32768  # 2^15; +1.0 itself has no sample and becomes 32767


@dataclass
class Info:
    rate: int
    frames: int
    seconds: float
    channels: int
    format: str
    subtype: str

    def __str__(self):
        return f"rate {self.rate}, {self.frames} samples found"


def info(path) -> Info:
    """What a sound file says of itself; nothing is decoded. One that ends early is refused."""
    path = Path(path)
    try:
        if not path.is_file():
            what = "this is a folder, not a sound file" if path.is_dir() else "no such file"
            raise Invalid(f"{path}: {what}")
        size = path.stat().st_size
        sound = containers.look(path)
        if sound.problem:
            raise Invalid(f"{path}: {sound.problem}. Copy or export it again.")
        parts = [soundfile.info(source) for source in _sources(path, sound)]
    except Invalid:
        raise
    except (OSError, ValueError) as e:
        raise Invalid(f"{path}: cannot be opened ({e})") from None
    except (soundfile.LibsndfileError, TypeError) as e:  # TypeError: soundfile asks for the layout of a .raw
        what = "is empty (0 bytes)" if size == 0 else f"is not a sound file that can be read ({e})"
        raise Invalid(f"{path}: {what}. wav, flac, ogg and mp3 are read; convert it first.") from None
    found = parts[0]
    rate, frames = found.samplerate, sum(part.frames for part in parts)
    kinds = {(part.samplerate, part.channels) for part in parts}
    if len(kinds) > 1:
        said = " and ".join(f"{rate} Hz with {channels} channels" for rate, channels in sorted(kinds))
        raise Invalid(f"{path}: recordings of {said} are joined in it; export them as one, or apart")
    if frames <= 0:
        raise Invalid(f"{path}: holds no samples (rate {rate}, {frames} samples found)")
    return Info(rate, frames, frames / rate, found.channels, found.format, found.subtype)


def _sources(path, sound):
    """What libsndfile should open for a file: the file, or the bytes that its container was mended to."""
    return [io.BytesIO(part) for part in sound.parts] or [str(path)]


def _decode(path, first, last):
    """Samples first .. last of all channels, (n, channels) float32."""
    sources = _sources(path, containers.look(path))
    if len(sources) == 1:
        return soundfile.read(sources[0], start=first, stop=last, dtype="float32", always_2d=True)[0]
    parts = [soundfile.read(source, dtype="float32", always_2d=True)[0] for source in sources]
    return np.concatenate(parts)[first:last]


def read(path, rate=None, start=None, end=None, max_seconds=None):
    """Samples of a file, channels averaged. -> ((n,) float32, rate)

    rate: resample to this one. start, end: seconds within the file; only they are decoded. max_seconds is
    compared with the header before anything is decoded, so that ten hours in a small FLAC cost nothing.
    """
    header = info(path)
    first = 0 if start is None else round(start * header.rate)
    last = header.frames if end is None else round(end * header.rate)
    if last - header.frames <= int(END_SLACK * header.rate):
        last = min(last, header.frames)
    if not 0 <= first < last <= header.frames:
        raise Invalid(f"{path}: start {start} and end {end} do not lie in order within its "
                      f"{header.seconds:.3f} s ({header})")
    count = last - first
    if max_seconds is not None and count > max_seconds * header.rate:
        raise Invalid(f"{path}: {count / header.rate:.1f} s are wanted, the limit is {max_seconds:g} s "
                      f"({header}). Cut it, or give start and end.")
    try:
        data = _decode(path, first, last)
    except soundfile.LibsndfileError as e:
        raise Invalid(f"{path}: damaged or cut off ({e}; {header}). Copy or export it again.") from None
    if len(data) < count * (MP3_SHARE if header.format == "MP3" else 1):
        share = f"{len(data)} of {count} samples could be decoded"
        raise Invalid(f"{path}: damaged or cut off: {share} ({header})")
    finite = np.isfinite(data)
    if not finite.all():
        at = int(np.argmin(finite.all(1)))
        value = data[at][~finite[at]][0]
        raise Invalid(f"{path}: sample {first + at} is {value} ({header}). "
                      "A float file with NaN or infinity was exported wrongly; export it again.")
    wave = torch.from_numpy(data.mean(1, dtype=np.float32))
    return (wave, header.rate) if rate is None else (resample(wave, header.rate, rate), rate)


def pcm16(wave):
    """(n,) samples in [-1, 1] -> int16 numpy array; what reading divided by 32768 comes back as it was."""
    return (wave * PCM_SCALE).round().clamp(-PCM_SCALE, PCM_SCALE - 1).to(torch.int16).numpy()


def write(path, wave, rate):
    """Write (n,) samples in [-1, 1] as PCM 16, wav or flac by the file's name. Returns how many samples were
    clipped.

    The file appears whole or not at all. A PCM 16 file that was read is written back bit for bit.
    """
    path = Path(path)
    wave = torch.as_tensor(wave).detach().to("cpu", torch.float32)
    kind = {".wav": "WAV", ".flac": "FLAC"}.get(path.suffix.lower())
    if kind is None:
        ending = path.suffix or "a name without an ending"
        raise Invalid(f"{path}: sound is written as .wav or .flac, not as {ending}")
    finite = wave.isfinite()
    if not finite.all():
        at = int((~finite).int().argmax())
        raise Invalid(f"{path}: not written, sample {at} is {float(wave[at])}")
    data = pcm16(wave)
    temporary = path.with_name(temporary_name(path.name))
    try:
        soundfile.write(str(temporary), data, int(rate), subtype="PCM_16", format=kind)
        os.replace(temporary, path)
    except (OSError, soundfile.LibsndfileError) as e:
        raise Invalid(f"{path}: cannot be written ({e})") from None
    finally:
        forget(temporary)
    return int((wave.abs() > 1).sum())


# ------------------------------------------------------------------------------------------------ resampling

# torchaudio's defaults: the encoders downstream were trained on what it makes.
ZEROS = 6  # zero crossings of the sinc on each side
ROLLOFF = 0.99  # cut-off as a part of the lower Nyquist frequency
PHASES = 32  # output samples that one small matrix makes: dense enough, and small for every pair of rates


def resample(x, rate, new_rate):
    """Windowed-sinc resampling. (..., n) -> (..., ceil(n * new_rate / rate)). Exact identity for equal rates.

    Low-pass at 0.99 of the lower Nyquist frequency, sinc with 6 zero crossings each way under a Hann window:
    what torchaudio.functional.resample does by default, its modest stop band with it: a tone at 10 kHz in
    44.1 kHz comes out of 16 kHz 45 dB down, at 14 kHz 58 dB. librosa and VoxCPM2's upstream use soxr instead,
    which cannot be reproduced by hand; on speech the two differ by about 1.5 % rms, all of it near the
    cut-off.
    """
    rate, new_rate = int(rate), int(new_rate)
    if min(rate, new_rate) <= 0:
        raise Invalid(f"sample rates must be positive, got {rate} and {new_rate}")
    if rate == new_rate:
        return x
    common = math.gcd(rate, new_rate)
    o, n = rate // common, new_rate // common
    length = x.shape[-1]
    width, groups = _sinc_kernels(o, n, x.dtype)
    blocks = length // o + 1  # each block takes o samples in and gives n out
    padded = F.pad(x, (width, width + o + 1))
    out = []
    for first, kernel in groups:
        windows = padded[..., first:].unfold(-1, kernel.shape[0], o)[..., :blocks, :]
        out.append(windows @ kernel.to(x.device))
    return torch.cat(out, -1).flatten(-2)[..., : -(-length * n // o)]


@functools.lru_cache(maxsize=16)
def _sinc_kernels(o, n, dtype):
    """Width of the padding, and for each group of output phases (first input sample, (taps, phases)).

    Output p of a block lies at input position p·o/n and reaches `width` samples each way. Taking neighbouring
    phases together keeps the matrices dense; one matrix for all phases would be nearly all zeros, and for a
    pair of rates such as 44101 and 16000 would take gigabytes. Computed in the dtype of the signal, as
    torchaudio does: in float32 that moves white noise of full scale by up to 3e-5, which the encoders
    downstream were trained with.
    """
    cutoff = min(o, n) * ROLLOFF
    width = math.ceil(ZEROS * o / cutoff)
    groups = []
    for p in range(0, n, PHASES):
        q = min(p + PHASES, n)
        first = p * o // n  # counted in the padded signal, as last is
        last = (q - 1) * o // n + 1 + 2 * width
        at = torch.arange(first - width, last + 1 - width, dtype=dtype)[:, None] / o
        phases = torch.arange(p, q, dtype=dtype) / n
        t = ((at - phases) * cutoff).clamp(-ZEROS, ZEROS)
        window = torch.cos(t * math.pi / ZEROS / 2) ** 2
        groups.append((first, torch.sinc(t) * (window * (cutoff / o))))
    return width, groups


# ------------------------------------------------------------------------------------------------ spectra
# F = n_fft // 2 + 1 frequencies.


def stft(x, n_fft, hop, win=None):
    """Short-time Fourier transform, periodic Hann window, not centred. (..., n) -> complex (..., F, T)"""
    win = win or n_fft
    left = (n_fft - win) // 2
    window = F.pad(torch.hann_window(win, dtype=x.dtype, device=x.device), (left, n_fft - win - left))
    return torch.fft.rfft(x.unfold(-1, n_fft, hop) * window).transpose(-1, -2)


@dataclass
class MelSettings:
    """The defaults are IndexTTS2's and BigVGAN's features of 22 kHz."""

    n_fft: int = 1024
    hop: int = 256
    win: int = 1024
    n_mels: int = 80
    fmin: float = 0.0
    fmax: float | None = None  # None is the Nyquist frequency


# As the models that read these features were trained.
MEL_EPSILON = 1e-9  # within the root of the magnitude
MEL_FLOOR = 1e-5


def mel_spectrogram(wave, rate=22050, **settings):
    """Natural logarithm of a Slaney mel spectrogram of magnitudes. (..., n) -> (..., n_mels, T) float32, T =
    n // hop

    settings: those of MelSettings. Reflected at both ends so that frame i lies around sample i·hop + hop/2,
    magnitudes sqrt(re² + im² + 1e-9), floor 1e-5.
    """
    mel = MelSettings(**settings)
    pad = (mel.n_fft - mel.hop) // 2
    x = wave.detach().to("cpu", torch.float64)
    if x.shape[-1] <= pad:
        raise Invalid(f"a spectrogram needs more than {pad} samples at {rate} Hz, "
                      f"the audio has {x.shape[-1]}")
    x = F.pad(x.reshape(-1, 1, x.shape[-1]), (pad, pad), mode="reflect").view(*x.shape[:-1], -1)
    spectrum = stft(x, mel.n_fft, mel.hop, mel.win)
    magnitude = (spectrum.real**2 + spectrum.imag**2 + MEL_EPSILON).sqrt()
    bank = _slaney_mel(rate, mel.n_fft, mel.n_mels, mel.fmin, mel.fmax or rate / 2)
    return (bank @ magnitude).clamp(min=MEL_FLOOR).log().float()


@functools.lru_cache(maxsize=16)
def _slaney_mel(rate, n_fft, n_mels, fmin, fmax):
    """Triangles of equal area on Slaney's scale: linear below 1 kHz, logarithmic above. (n_mels, F)"""
    step = 200 / 3  # Hz per mel below 1 kHz
    ratio = math.log(6.4) / 27  # above it, 27 mels are a factor of 6.4

    def mel(f):
        return f / step if f < 1000 else 15 + math.log(f / 1000) / ratio

    m = torch.linspace(mel(fmin), mel(fmax), n_mels + 2, dtype=torch.float64)
    edges = torch.where(m < 15, m * step, 1000 * torch.exp((m - 15) * ratio))
    bins = torch.linspace(0, rate / 2, n_fft // 2 + 1, dtype=torch.float64)
    heights = 2 / (edges[2:] - edges[:-2])
    return _triangles(bins, edges) * heights[:, None]


def _triangles(at, edges):
    """Triangle i rises from edge i to i+1 and falls to i+2. (F,), (M+2,) -> (M, F)"""
    low, middle, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising = (at - low) / (middle - low)
    falling = (high - at) / (high - middle)
    return torch.minimum(rising, falling).clamp(min=0)


# Kaldi's defaults.
PREEMPHASIS = 0.97
POVEY_POWER = 0.85  # of a Hann window
LOWEST_HERTZ = 20.0


def kaldi_fbank(wave, rate=16000, n_mels=80):
    """Kaldi's log mel filter bank without dither, 25 ms every 10 ms. (..., n) -> (..., T, n_mels) float32

    T = 1 + (n - 400) // 160 at 16 kHz: only whole frames. Each frame loses its mean, is pre-emphasised by
    itself (its first sample against itself), and gets the Povey window.
    """
    x = wave.detach().to("cpu", torch.float64)
    size, hop = rate * 25 // 1000, rate // 100
    if x.shape[-1] < size:
        raise Invalid(f"a filter bank needs at least {size} samples at {rate} Hz, "
                      f"the audio has {x.shape[-1]}")
    frames = x.unfold(-1, size, hop)
    frames = frames - frames.mean(-1, keepdim=True)
    before = torch.cat([frames[..., :1], frames[..., :-1]], -1)
    frames = frames - PREEMPHASIS * before
    povey = torch.hann_window(size, periodic=False, dtype=torch.float64) ** POVEY_POWER
    n_fft = 1 << (size - 1).bit_length()
    power = torch.fft.rfft(frames * povey, n_fft).abs() ** 2
    mel = power @ _kaldi_mel(rate, n_fft, n_mels).T
    return mel.clamp(min=torch.finfo(torch.float32).eps).log().float()


@functools.lru_cache(maxsize=4)
def _kaldi_mel(rate, n_fft, n_mels):
    """Triangles of height one on the mel scale 1127 ln(1 + f/700), from 20 Hz to Nyquist. (n_mels, F)"""
    def mel(f):
        return 1127 * torch.log1p(torch.as_tensor(f, dtype=torch.float64) / 700)

    lowest, highest = float(mel(LOWEST_HERTZ)), float(mel(rate / 2))
    edges = torch.linspace(lowest, highest, n_mels + 2, dtype=torch.float64)
    bins = torch.linspace(0, rate / 2, n_fft // 2 + 1, dtype=torch.float64)
    return _triangles(mel(bins), edges)


def w2vbert_features(wave):
    """Input of w2v-BERT 2.0. (n,) at 16 kHz -> (T, 160) float32, T = ceil(frames / 2)

    Filter bank of the 16-bit scale, each bin normalised over the clip, two frames side by side. An odd number
    of frames is filled up with one frame of ones; that last pair is masked in attention: see w2vbert_valid.
    """
    x = kaldi_fbank(wave * 32768)  # (frames, 80)
    if len(x) < 2:
        raise Invalid(f"w2v-BERT needs at least 560 samples at 16 kHz, the audio has {wave.shape[-1]}")
    x = x.double()
    x = (x - x.mean(0)) / (x.var(0) + 1e-7).sqrt()
    return F.pad(x, (0, 0, 0, len(x) % 2), value=1.0).view(-1, 2 * x.shape[1]).float()


def w2vbert_valid(samples):
    """How many rows of w2vbert_features attention may look at: T, one less where the frames are odd."""
    return (1 + (samples - 400) // 160) // 2


# ------------------------------------------------------------------------------------------------ pictures


PICTURE_RATE = 86.13  # frames per second: a hop of 256 at 22.05 kHz


def mel_picture(wave, rate, n_mels=80, decibels=80.0):
    """A mel spectrogram as a grey picture, low frequencies at the bottom. (n,) -> (1, n_mels, T) float32 in
    [0, 1]

    White is the loudest point, black `decibels` below it. T is about 86 per second whatever the rate.
    """
    hop = max(1, round(rate / PICTURE_RATE))
    n_fft = 1 << (4 * hop - 1).bit_length()
    wave = F.pad(wave, (0, max(0, n_fft - wave.shape[-1])))
    mel = mel_spectrogram(wave, rate, n_fft=n_fft, hop=hop, win=n_fft, n_mels=n_mels)
    level = mel * (20 / math.log(10))
    return ((level - level.max()) / decibels + 1).clamp(0, 1).flip(0)[None]
