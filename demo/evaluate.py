"""Does the demo's base speak, and does fine-tuning move its voice? Four measures over 30 unseen sentences, one table.

    python demo/evaluate.py --lora runs/demo/voice/latest --shuffled runs/demo/shuffled/latest

Word errors come from pocketsphinx, which none of us wrote. The distance between two renderings of a sentence is mel-cepstral, in dB, along
the best alignment in time. Everything is held against the codec's own reconstruction of the synthesiser's speech, since
nothing that passes through the codec can be better; the synthesiser's raw figures stand beside it. Exit status 0 means
that every requirement whose figures could be computed was met, 1 that one was not.
"""
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import configs
import lora
import models
from demo.make_speech import RATE, TARGET, VOICES, plain, vocabulary
from models.parts import Invalid, audio, opt


@dataclass
class Evaluate:
    """Measure the demo's base and the adapters trained on it."""
    ckpt_dir: str = opt("demo/base", "folder of the base")
    lora: str = opt("", "adapter that was fine-tuned on the target voice")
    shuffled: str = opt("", "adapter that was fine-tuned on the same clips with shuffled texts")
    test_dir: str = opt("runs/demo/test", "what demo/make_speech.py --part test made")
    output_dir: str = opt("runs/demo/evaluation", "folder for the wav files, table.md and figures.json")
    cfg_value: float = opt(2.0, "guidance")
    inference_timesteps: int = opt(10, "steps of the sampler")
    seed: int = opt(0, "sentence i is spoken with seed + i")


# ------------------------------------------------------------------------------------------------ measures


def word_errors(said, heard):
    """Substitutions, deletions and insertions between two lists of words."""
    row = list(range(len(heard) + 1))
    for i, a in enumerate(said, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(heard, 1):
            diagonal, row[j] = row[j], min(diagonal + (a != b), row[j] + 1, row[j - 1] + 1)
    return row[-1]


def cepstrum(wave, rate, order=24):
    """(n,) -> mel cepstrum without its level, (T, order), a frame every 10 ms."""
    mel = audio.mel_spectrogram(wave, rate, n_fft=1024, hop=rate // 100, win=rate // 40, n_mels=60)  # (M, T), natural log
    M = mel.shape[0]
    basis = torch.cos(math.pi * torch.arange(1, order + 1)[:, None] * (torch.arange(M) + 0.5) / M) * (2 / M)
    return (basis @ mel).T.numpy()


def cepstral_distance(a, b):
    """Mean distance in dB of two (T, order) cepstra along the path that minimises its sum (dynamic time warping)."""
    cost = 10 / math.log(10) * np.sqrt(2 * np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T, 0))
    total, steps = np.full(cost.shape, np.inf), np.zeros(cost.shape)
    for d in range(sum(cost.shape) - 1):  # along antidiagonals, each of which depends on the two before
        i = np.arange(max(0, d - cost.shape[1] + 1), min(d, cost.shape[0] - 1) + 1)
        j = d - i
        best, length = np.where(d == 0, 0.0, np.full(len(i), np.inf)), np.zeros(len(i))
        for di, dj in ((1, 1), (1, 0), (0, 1)):
            inside = (i >= di) & (j >= dj)
            before = np.where(inside, total[i - di, j - dj], np.inf)
            better = before < best
            best, length = np.where(better, before, best), np.where(better, steps[i - di, j - dj], length)
        total[i, j], steps[i, j] = best + cost[i, j], length + 1
    return total[-1, -1] / steps[-1, -1]


def pitches(wave, rate, low=60, high=400):
    """F0 in Hz of the voiced frames, one every 10 ms: highest peak of the autocorrelation, corrected for the window's own.

    Twice the period repeats just as well as the period, so each octave down has to be better by 0.02 (as in Praat).
    """
    size = rate // 16
    if len(wave) < size:
        return np.zeros(0)
    frames = np.lib.stride_tricks.sliding_window_view(wave.numpy().astype(np.float64), size)[::rate // 100]
    frames = frames[(frames**2).mean(1) > 1e-5]
    window = np.hanning(size)
    power = np.abs(np.fft.rfft((frames - frames.mean(1, keepdims=True)) * window, 4 * size)) ** 2
    own = np.fft.irfft(np.abs(np.fft.rfft(window, 4 * size)) ** 2)
    lags = np.arange(rate // high, rate // low)
    r = np.fft.irfft(power)
    r = (r / np.maximum(r[:, :1], 1e-12))[:, lags] / (own / own[0])[lags]
    return rate / lags[(r - 0.02 * np.log2(lags)).argmax(1)][r.max(1, initial=0) > 0.5]


# ------------------------------------------------------------------------------------------------ renderings


def spoken(test_dir, voice):
    """Texts and waves of one voice."""
    path = Path(test_dir) / f"test_{voice}.jsonl"
    if not path.is_file():
        raise Invalid(f"no file at {path}; demo/make_speech.py --part test --output_dir {test_dir} makes it")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [r["text"] for r in rows], [audio.read(path.parent / r["audio"])[0] for r in rows]


def generate(model, texts, cfg):
    """Waves, and whether each stopped by itself."""
    chunks = [[] for _ in texts]
    requests = [dict(text=t, seed=cfg.seed + i) for i, t in enumerate(texts)]
    for i, chunk in model.generate_batch(requests, cfg_value=cfg.cfg_value, inference_timesteps=cfg.inference_timesteps):
        chunks[i].append(chunk)
    return [torch.cat(c) for c in chunks], [f == "end" for f in model.finish]


def recognise(paths):
    """Words heard in each 16 kHz wav file, or None without the recogniser.

    pocketsphinx with its own American English model and a loop over the demo's vocabulary, every word as likely as any
    other after any other: it knows nothing of the grammar that made the sentences, so what it gets right was audible.
    """
    program = shutil.which("pocketsphinx_batch")
    if not program:
        print("no word errors: the program pocketsphinx_batch was not found; apt-get install pocketsphinx pocketsphinx-en-us", file=sys.stderr)
        return None
    words = vocabulary()
    chance = -math.log10(len(words) + 1)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        lines = ["\\data\\", f"ngram 1={len(words) + 2}", "", "\\1-grams:", "-99 <s> 0", f"{chance:.4f} </s>"]
        (folder / "loop.arpa").write_text("\n".join(lines + [f"{chance:.4f} {w}" for w in words] + ["", "\\end\\", ""]))
        for i, path in enumerate(paths):  # a quarter second of silence around each: it adapts to the level at the start
            audio.write(folder / f"{i}.wav", torch.nn.functional.pad(audio.read(path, RATE)[0], (RATE // 4, RATE // 4)), RATE)
        (folder / "list").write_text("".join(f"{i}\n" for i in range(len(paths))))
        done = subprocess.run([program, "-adcin", "yes", "-cepdir", folder, "-cepext", ".wav", "-ctl", folder / "list", "-lm", folder / "loop.arpa",
                               "-hyp", folder / "heard", "-logfn", os.devnull], capture_output=True, text=True)
        if done.returncode:
            raise Invalid(f"{program} failed with status {done.returncode}: {done.stderr.strip()}; is pocketsphinx-en-us installed?")
        heard = (folder / "heard").read_text().splitlines()  # "words of the sentence (number score)"
    return [line.rpartition("(")[0].split() for line in heard]


def measure(name, texts, waves, rate, target, folder, stopped=None):
    """All figures of one way to render the sentences; target: cepstra of the target's own rendering."""
    paths = []
    for i, wave in enumerate(waves):
        paths.append(folder / name / f"{i:02d}.wav")
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        audio.write(paths[-1], wave, rate)
    heard = recognise(paths)
    words = [plain(t).split() for t in texts]
    out = {"words_wrong": None if heard is None else 100 * sum(map(word_errors, words, heard)) / sum(map(len, words)),
           "distance": float(np.mean([cepstral_distance(cepstrum(w, rate), t) for w, t in zip(waves, target)])),
           "pitch": float(np.median(np.concatenate([pitches(w, rate) for w in waves]))) if waves else 0.0,
           "seconds": float(np.median([len(w) / rate for w in waves])),
           "stopped": None if stopped is None else sum(stopped), "sentences": len(waves)}
    shown = {k: "-" if v is None else f"{v:.1f}" if isinstance(v, float) else str(v) for k, v in out.items()}
    print(f"{name:28} | {shown['words_wrong']:>6} | {shown['distance']:>6} | {shown['pitch']:>6} | {out['seconds']:>6.2f} | {shown['stopped']:>4}", flush=True)
    return out


def requirements(f):
    """[(sentence, met)] for the figures that are there."""
    out = []

    def need(text, *values, met):
        if all(v is not None for v in values):
            out.append((text, bool(met(*values))))

    def of(name, key):
        return f.get(name, {}).get(key)

    n = of("base", "sentences")
    wrong, limit = of("base", "words_wrong"), of("base voices, codec", "words_wrong")
    need(f"base: at most 15 points more word errors than the codec ({wrong and round(wrong, 1)} against {limit and round(limit, 1)})", wrong, limit, met=lambda a, b: a <= b + 15)
    need(f"base: stops by itself on 28 of 30 ({of('base', 'stopped')} of {n})", of("base", "stopped"), met=lambda a: a >= 28 / 30 * n)
    need("base: median duration within 15 % of the synthesiser's", of("base", "seconds"), of("base voices", "seconds"), met=lambda a, b: abs(a / b - 1) <= 0.15)
    if "fine-tuned" in f:
        wrong, limit = of("fine-tuned", "words_wrong"), of(f"{TARGET}, codec", "words_wrong")
        need(f"fine-tuned: at most 15 points more word errors than the codec ({wrong and round(wrong, 1)} against {limit and round(limit, 1)})", wrong, limit, met=lambda a, b: a <= b + 15)
        far, near, here = (of(k, "distance") for k in ("base", f"{TARGET}, codec", "fine-tuned"))
        need(f"fine-tuned: closes half of the gap to the target, {100 * (far - here) / (far - near):.0f} % ({far:.1f} to {here:.1f}, codec {near:.1f})",
             far, met=lambda _: far > near and far - here >= 0.5 * (far - near))
        need(f"fine-tuned: median pitch within 8 % ({of('fine-tuned', 'pitch'):.0f} against {of(TARGET, 'pitch'):.0f} Hz)", here, met=lambda _: abs(of("fine-tuned", "pitch") / of(TARGET, "pitch") - 1) <= 0.08)
        need(f"fine-tuned: stops by itself on 28 of 30 ({of('fine-tuned', 'stopped')} of {n})", of("fine-tuned", "stopped"), met=lambda a: a >= 28 / 30 * n)
        need("fine-tuned: median duration within 15 % of the synthesiser's", of("fine-tuned", "seconds"), of(TARGET, "seconds"), met=lambda a, b: abs(a / b - 1) <= 0.15)
        need("an adapter trained on shuffled texts makes at least 15 points more word errors", of("shuffled", "words_wrong"), of("fine-tuned", "words_wrong"), met=lambda a, b: a >= b + 15)
    return out


def main():
    cfg = configs.parse(Evaluate)
    model = models.load(cfg.ckpt_dir)
    rate, folder, figures, started = model.sample_rate, Path(cfg.output_dir), {}, time.time()
    texts, own = spoken(cfg.test_dir, TARGET)
    target = [cepstrum(w, rate) for w in own]
    mixed = []  # the base chooses one of its voices by chance, so it is compared with a mixture of them
    for i, waves in enumerate(zip(*(spoken(cfg.test_dir, voice)[1] for voice in VOICES))):
        mixed.append(waves[i % len(VOICES)])

    def through(waves):
        return [model.codec.decode(model.codec.encode(w))[:len(w)] for w in waves]

    def add(name, waves, stopped=None):
        figures[name] = measure(name, texts, waves, rate, target, folder, stopped)

    print(f"{'':28} | words  | to {TARGET} | pitch  | median |      \n{'':28} | wrong% |   (dB) |   (Hz) |    (s) | stopped")
    add("base voices", mixed)
    add("base voices, codec", through(mixed))
    add(TARGET, own)
    add(f"{TARGET}, codec", through(own))
    add("base", *generate(model, texts, cfg))
    for name, path in (("fine-tuned", cfg.lora), ("shuffled", cfg.shuffled)):
        if path:
            lora.load_lora_weights(model, path)
            add(name, *generate(model, texts, cfg))
    checks = requirements(figures)
    lines = [f"{'met   ' if met else 'NOT MET'} {text}" for text, met in checks]
    print("\n".join(lines) + f"\n{time.time() - started:.0f} s")
    keys = ("words_wrong", "distance", "pitch", "seconds", "stopped")
    table = ["| rendering | word errors (%) | distance to target (dB) | median pitch (Hz) | median length (s) | stopped |", "|---|---|---|---|---|---|"]
    table += ["| " + " | ".join([name, *("-" if v[k] is None else f"{v[k]:.2f}" if k == "seconds" else f"{v[k]:.0f}" if k == "stopped" else f"{v[k]:.1f}" for k in keys)]) + " |"
              for name, v in figures.items()]
    (folder / "table.md").write_text("\n".join(table + ["", *lines]) + "\n", encoding="utf-8")
    (folder / "figures.json").write_text(json.dumps({"figures": figures, "requirements": checks}, indent=1) + "\n")
    return 0 if all(met for _, met in checks) else 1


if __name__ == "__main__":
    configs.run(main)
