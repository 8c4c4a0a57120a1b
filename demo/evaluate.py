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
from models.parts import Invalid, audio, measures, opt

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
    test_dir: str = opt("runs/demo/speech", "what demo/make_speech.py made: manifests and their clips")
    part: str = opt("test", "the 30 sentences of the test, or dev: 60 others, to choose settings by", choices=("test", "dev"))
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
        self.target = target
        self.folder = Path(folder)

    def __call__(self, rendering):
        name, waves, stopped = rendering
        paths = [self.folder / name / f"{i:02d}.wav" for i in range(len(waves))]
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        for path, wave in zip(paths, waves):
            audio.write(path, wave, RATE)
        pairs = zip(waves, self.target)
        away = [measures.mel_cepstral_distance(wave, RATE, target, RATE) for wave, target in pairs]
        voiced = torch.cat([measures.pitch(wave, RATE) for wave in waves])
        pitch = float(voiced.median()) if len(voiced) else 0.0
        seconds = float(np.median([len(wave) / RATE for wave in waves]))
        return Figures(self.words_wrong(paths), float(np.mean(away)), pitch, seconds, stopped, len(waves))

    def words_wrong(self, paths):
        results = recognise(paths)
        if results is None:
            return None
        errors = sum(map(measures.errors, self.words, results))
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
    texts, first = spoken(cfg.test_dir, f"{cfg.part}.jsonl")
    _, target = spoken(cfg.test_dir, f"{cfg.part}_target.jsonl")
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
