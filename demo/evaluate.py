"""Does the demo's base speak, and does fine-tuning move its voice? Five measures over 30 unseen sentences,
one table.

    apt-get install pocketsphinx pocketsphinx-en-us     # Debian, Ubuntu; without them no word errors
    python demo/evaluate.py --lora runs/demo/voice/latest --shuffled runs/demo/shuffled/latest

Word errors come from pocketsphinx, which none of us wrote. The distance between two renderings of a
sentence is mel-cepstral, in dB, along the best alignment in time. Everything is held against the codec's
own reconstruction of the robots, since nothing that passes through the codec can be better. Exit status 0
means that every requirement whose figures could be computed was met, 1 that one was not.
"""
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import configs
import lora
import models
from demo.make_speech import FIRST, plain, vocabulary
from demo.robot import RATE
from models.parts import Invalid, audio, opt

# What must hold; the sentences that are printed with them are in `requirements`.
POINTS_OVER_CODEC = 15  # of word errors; they are good to five points with 30 sentences
LENGTH_TOLERANCE = 0.10
PITCH_TOLERANCE = 0.03
DISTANCE_SHARE = 0.5  # what fine-tuning may leave of the distance to the target

INSTALL = "apt-get install pocketsphinx pocketsphinx-en-us"


@dataclass
class Evaluate:
    """Measure the demo's base and the adapters trained on it."""
    ckpt_dir: str = opt("demo/base", "folder of the base")
    lora: str = opt("", "adapter that was fine-tuned on the target voice")
    shuffled: str = opt("", "adapter that was fine-tuned on the same clips with shuffled texts")
    test_dir: str = opt("runs/demo/speech", "what demo/make_speech.py made: test.jsonl, test_target.jsonl and their clips")
    output_dir: str = opt("runs/demo/evaluation", "folder for the wav files, table.md and figures.json")
    cfg_value: float = opt(1.5, "guidance")
    noise_scale: float = opt(0.5, "factor of the solver's starting noise")
    inference_timesteps: int = opt(10, "steps of the solver")
    seed: int = opt(0, "sentence i is spoken with seed + i")


class Rendering(NamedTuple):
    """One way to say the sentences."""

    name: str
    waves: list  # of (n,) samples
    stopped: int | None = None  # how many ended by themselves; None where nothing was generated


@dataclass
class Figures:
    """What is measured of a rendering; None where it could not be."""

    words_wrong: float | None  # percent
    distance: float  # dB to the target's own rendering
    pitch: float  # Hz, median
    seconds: float  # median
    stopped: int | None
    sentences: int


# ------------------------------------------------------------------------------------------------ measures


def word_errors(said, heard):
    """Substitutions, deletions and insertions between two lists of words."""
    row = list(range(len(heard) + 1))
    for i, a in enumerate(said, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(heard, 1):
            cheapest = min(diagonal + (a != b), row[j] + 1, row[j - 1] + 1)
            diagonal, row[j] = row[j], cheapest
    return row[-1]


def cepstrum(wave, rate, order=24):
    """(n,) -> mel cepstrum without its level, (T, order), a frame every 10 ms."""
    M = 60
    mel = audio.mel_spectrogram(wave, rate, n_fft=1024, hop=rate // 100, win=rate // 40, n_mels=M)  # (M, T)
    angle = math.pi * torch.arange(1, order + 1)[:, None] * (torch.arange(M) + 0.5) / M
    return (torch.cos(angle) * (2 / M) @ mel).T.numpy()


def cepstral_distance(a, b):
    """Mean distance in dB of two (T, order) cepstra along the path that minimises its sum (dynamic time
    warping).
    """
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1)
    squares = np.maximum(squares - 2 * a @ b.T, 0)
    cost = 10 / math.log(10) * np.sqrt(2 * squares)
    total, steps = np.full(cost.shape, np.inf), np.zeros(cost.shape)
    for d in range(sum(cost.shape) - 1):  # along antidiagonals, each of which depends on the two before
        first = max(0, d - cost.shape[1] + 1)
        last = min(d, cost.shape[0] - 1)
        i = np.arange(first, last + 1)
        j = d - i
        best = np.full(len(i), np.inf if d else 0.0)
        length = np.zeros(len(i))
        for di, dj in ((1, 1), (1, 0), (0, 1)):
            inside = (i >= di) & (j >= dj)
            before = np.where(inside, total[i - di, j - dj], np.inf)
            better = before < best
            best = np.where(better, before, best)
            length = np.where(better, steps[i - di, j - dj], length)
        total[i, j], steps[i, j] = best + cost[i, j], length + 1
    return total[-1, -1] / steps[-1, -1]


def pitches(wave, rate, low=60, high=400):
    """F0 in Hz of the voiced frames, one every 10 ms: highest peak of the autocorrelation, corrected for
    the window's own.

    Twice the period repeats just as well as the period, so each octave down has to be better by 0.02 (as in
    Praat).
    """
    size = rate // 16
    if len(wave) < size:
        return np.zeros(0)
    samples = wave.numpy().astype(np.float64)
    frames = np.lib.stride_tricks.sliding_window_view(samples, size)[::rate // 100]
    frames = frames[(frames**2).mean(1) > 1e-5]
    frames = frames - frames.mean(1, keepdims=True)
    window = np.hanning(size)
    lags = np.arange(rate // high, rate // low)
    r = autocorrelation(frames * window)[:, lags] / autocorrelation(window[None])[:, lags]
    voiced = r.max(1, initial=0) > 0.5
    best = (r - 0.02 * np.log2(lags)).argmax(1)
    return rate / lags[best][voiced]


def autocorrelation(frames):
    """(T, n) -> (T, 4 n), one at lag zero."""
    power = np.abs(np.fft.rfft(frames, 4 * frames.shape[1])) ** 2
    r = np.fft.irfft(power)
    return r / np.maximum(r[:, :1], 1e-12)


def recognise(paths):
    """Words heard in each 16 kHz wav file, or None without the recogniser.

    pocketsphinx with its own American English model and a loop over the demo's vocabulary, every word as
    likely as any other after any other: it knows nothing of the grammar that made the sentences, so what it
    gets right was audible.
    """
    program = shutil.which("pocketsphinx_batch")
    if not program:
        print(f"no word errors: the program pocketsphinx_batch was not found; {INSTALL}", file=sys.stderr)
        return None
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "loop.arpa").write_text(word_loop())
        # A quarter second of silence around each: the recogniser adapts to the level at the start.
        for i, path in enumerate(paths):
            wave = audio.read(path, RATE)[0]
            audio.write(folder / f"{i}.wav", torch.nn.functional.pad(wave, (RATE // 4, RATE // 4)), RATE)
        (folder / "list").write_text("".join(f"{i}\n" for i in range(len(paths))))
        files = ["-cepdir", folder, "-cepext", ".wav", "-ctl", folder / "list", "-hyp", folder / "hypotheses"]
        command = [program, "-adcin", "yes", *files, "-lm", folder / "loop.arpa", "-logfn", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            problem = done.stderr.strip()
            what = f"{program} failed with status {done.returncode}: {problem}"
            raise Invalid(f"{what}; is its model there? {INSTALL}")
        lines = (folder / "hypotheses").read_text().splitlines()  # "words of the sentence (number score)"
    return [line.rpartition("(")[0].split() for line in lines]


def word_loop():
    """A language model in ARPA's format in which any word of the vocabulary may follow any other."""
    words = vocabulary()
    chance = f"{-math.log10(len(words) + 1):.4f}"
    entries = ["-99 <s> 0", f"{chance} </s>"] + [f"{chance} {word}" for word in words]
    return "\n".join(["\\data\\", f"ngram 1={len(entries)}", "", "\\1-grams:", *entries, "", "\\end\\", ""])


# ------------------------------------------------------------------------------------------------ renderings


def spoken(test_dir, manifest):
    """Texts and waves of a manifest."""
    path = Path(test_dir) / manifest
    if not path.is_file():
        raise Invalid(f"no file at {path}; demo/make_speech.py --output_dir {test_dir} makes it")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row["text"] for row in rows], [audio.read(path.parent / row["audio"])[0] for row in rows]


def through(codec, waves):
    """What the codec makes of the waves."""
    return [codec.decode(codec.encode(wave))[:len(wave)] for wave in waves]


def generate(name, model, texts, cfg):
    chunks = [[] for _ in texts]
    requests = [dict(text=text, seed=cfg.seed + i) for i, text in enumerate(texts)]
    sampling = {key: getattr(cfg, key) for key in ("cfg_value", "noise_scale", "inference_timesteps")}
    for i, chunk in model.generate_batch(requests, **sampling):
        chunks[i].append(chunk)
    return Rendering(name, [torch.cat(parts) for parts in chunks], model.finish.count("end"))


class Measure:
    """Figures of renderings of the same sentences; writes each as wav files."""

    def __init__(self, texts, target, folder):
        self.words = [plain(text).split() for text in texts]
        self.target = [cepstrum(wave, RATE) for wave in target]
        self.folder = Path(folder)

    def __call__(self, rendering):
        name, waves, stopped = rendering
        paths = [self.folder / name / f"{i:02d}.wav" for i in range(len(waves))]
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        for path, wave in zip(paths, waves):
            audio.write(path, wave, RATE)
        away = [cepstral_distance(cepstrum(wave, RATE), target) for wave, target in zip(waves, self.target)]
        voiced = np.concatenate([pitches(wave, RATE) for wave in waves])
        pitch = float(np.median(voiced)) if len(voiced) else 0.0
        seconds = float(np.median([len(wave) / RATE for wave in waves]))
        return Figures(self.words_wrong(paths), float(np.mean(away)), pitch, seconds, stopped, len(waves))

    def words_wrong(self, paths):
        results = recognise(paths)
        if results is None:
            return None
        errors = sum(map(word_errors, self.words, results))
        return 100 * errors / sum(map(len, self.words))


# --------------------------------------------------------------------------------------------- requirements


def requirements(figures):
    """[(sentence, met)] for the figures that are there; {rendering: Figures}."""
    out = []
    if "base" in figures:
        out += speaks("base", figures["base"], figures["first robot, codec"])
    if "fine-tuned" in figures:
        out += speaks("fine-tuned", figures["fine-tuned"], figures["target, codec"])
        out += moved(figures["base"], figures["fine-tuned"], figures["target, codec"])
    shuffled = figures.get("shuffled")
    if shuffled and shuffled.words_wrong is not None:
        more = shuffled.words_wrong - figures["fine-tuned"].words_wrong
        what = f"shuffled texts: at least {POINTS_OVER_CODEC} points more word errors than fine-tuned"
        out.append((f"{what} ({more:.1f})", more >= POINTS_OVER_CODEC))
    return out


def speaks(name, figures, codec):
    """What is asked of any model that speaks, held against the robot through the codec."""
    out = []
    wrong, limit = figures.words_wrong, codec.words_wrong
    if wrong is not None:
        what = f"{name}: at most {POINTS_OVER_CODEC} points more word errors than the codec"
        out.append((f"{what} ({wrong:.1f} against {limit:.1f} %)", wrong <= limit + POINTS_OVER_CODEC))
    stopped, all_of_them = figures.stopped, figures.sentences
    what = f"{name}: every sentence ends by itself"
    out.append((f"{what} ({stopped} of {all_of_them})", stopped == all_of_them))
    length, usual = figures.seconds, codec.seconds
    what = f"{name}: median length within {LENGTH_TOLERANCE:.0%}"
    out.append((f"{what} ({length:.2f} against {usual:.2f} s)", abs(length / usual - 1) <= LENGTH_TOLERANCE))
    return out


def moved(base, tuned, target):
    """What is asked of the voice after fine-tuning."""
    off = abs(tuned.pitch / target.pitch - 1)
    what = f"fine-tuned: median pitch within {PITCH_TOLERANCE:.0%}"
    pitch = f"{what} ({tuned.pitch:.0f} against {target.pitch:.0f} Hz)"
    what = "fine-tuned: distance to the target falls by half"
    distance = f"{what} ({base.distance:.1f} to {tuned.distance:.1f} dB)"
    return [(pitch, off <= PITCH_TOLERANCE), (distance, tuned.distance <= DISTANCE_SHARE * base.distance)]


def cells(figures):
    """A row of the table."""
    wrong = "-" if figures.words_wrong is None else f"{figures.words_wrong:.1f}"
    stopped = "-" if figures.stopped is None else str(figures.stopped)
    return [wrong, f"{figures.distance:.1f}", f"{figures.pitch:.1f}", f"{figures.seconds:.2f}", stopped]


COLUMNS = ["rendering", "word errors (%)", "distance to target (dB)", "pitch (Hz)", "length (s)", "stopped"]


def main():
    cfg = configs.parse(Evaluate)
    started, folder = time.time(), Path(cfg.output_dir)
    model = models.load(cfg.ckpt_dir)
    if model.sample_rate != RATE:
        raise Invalid(f"{cfg.ckpt_dir} speaks at {model.sample_rate} Hz, the robots at {RATE}")
    texts, first = spoken(cfg.test_dir, "test.jsonl")
    _, target = spoken(cfg.test_dir, "test_target.jsonl")
    measure, figures = Measure(texts, target, folder), {}
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---|---|---|---|---|---|"]
    print("\n".join(lines))

    def add(rendering):
        figures[rendering.name] = measure(rendering)
        lines.append("| " + " | ".join([rendering.name, *cells(figures[rendering.name])]) + " |")
        print(lines[-1], flush=True)

    add(Rendering("first robot", first))
    add(Rendering("first robot, codec", through(model.codec, first)))
    add(Rendering("target", target))
    add(Rendering("target, codec", through(model.codec, target)))
    add(generate("base", model, [f"{FIRST} {text}" for text in texts], cfg))
    for name, path in (("fine-tuned", cfg.lora), ("shuffled", cfg.shuffled)):
        if path:
            lora.load_lora_weights(model, path)
            add(generate(name, model, texts, cfg))
    checks = requirements(figures)
    verdicts = [f"{'met    ' if met else 'NOT MET'} {text}" for text, met in checks]
    print("\n".join(verdicts) + f"\n{time.time() - started:.0f} s")
    (folder / "table.md").write_text("\n".join(lines + ["", *verdicts]) + "\n", encoding="utf-8")
    record = {"figures": {name: asdict(f) for name, f in figures.items()}, "requirements": checks}
    (folder / "figures.json").write_text(json.dumps(record, indent=1) + "\n")
    return 0 if all(met for _, met in checks) else 1


if __name__ == "__main__":
    configs.run(main)
