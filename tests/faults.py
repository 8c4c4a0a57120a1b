"""Faults that people make with their data, and which of our looks tells each: python -m tests.faults [FAULT ...] [--seeds 3]

Each fault is put into 40 clips of demo/voice, which the seed chooses. Then, as a user would: prepare_data.py (told:
rows refused or noticed in its report), train.py (told: the gate warns, or the run is refused) and, after some steps, validate.py
on val.jsonl (told: problems or doubts). Prints a table in Markdown: of how many seeds each fault is told, by which of the three.
`clean` must be told by none.
"""
import argparse
import json
import random
import re
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

from demo import make_speech
from models import voxcpm
from models.parts import audio
from tests.conftest import ROOT
from tests.running import free_locks, here

BASE, VOICE, RATE = ROOT / "demo/base", ROOT / "demo/voice", 16000
ROWS = 40
STEPS = ["--num_iters", "120", "--warmup_steps", "10", "--save_interval", "120", "--valid_interval", "0", "--val_samples", "0",
         "--log_interval", "50"]
SPEAKING = ["--noise_scale", "0.5", "--cfg_value", "1.5", "--retries", "0", "--rows", "4"]
LOOKS = ("report", "gate", "validate")


class Case:
    """Clips and base before the fault; a fault changes them in place."""

    def __init__(self, folder, seed):
        self.folder, self.rng = folder, random.Random(seed)
        rows = [json.loads(line) for line in (VOICE / "voice.jsonl").read_text().splitlines()]
        self.rows = self.rng.sample(rows, ROWS)
        self.waves = [audio.read(VOICE / row["audio"])[0].numpy() for row in self.rows]
        self.rate, self.base = RATE, BASE
        self.trainer = voxcpm.VoxCPM.collate  # while it trains; everything else has the right one

    @property
    def texts(self):
        return [row["text"] for row in self.rows]

    def say(self, texts):
        self.rows = [{**row, "text": text} for row, text in zip(self.rows, texts)]

    def other_base(self):
        """A copy of the base that may be changed."""
        self.base = self.folder / "base"
        shutil.copytree(BASE, self.base)
        return self.base

    def write(self):
        (self.folder / "clips").mkdir()
        lines = []
        for i, (row, wave) in enumerate(zip(self.rows, self.waves)):
            soundfile.write(self.folder / f"clips/{i}.wav", wave, self.rate)  # (n,) or (n, channels)
            lines.append(json.dumps({"audio": f"clips/{i}.wav", "text": row["text"]}) + "\n")
        (self.folder / "data.jsonl").write_text("".join(lines))
        return self.folder / "data.jsonl"


# ------------------------------------------------------------------------------------------------ the faults


def clean(case):
    pass


def wrong_rate(case):
    case.rate = 22050  # the header says so, the samples do not


def shuffled_transcripts(case):
    texts = case.texts
    case.rng.shuffle(texts)
    case.say(texts)


def half_speed(case):
    n = np.arange
    case.waves = [np.interp(n(2 * len(wave)) / 2, n(len(wave)), wave) for wave in case.waves]


def empty_texts(case):
    case.say([""] * ROWS)


def another_tokenizer(case):
    path = case.other_base() / "tokenizer.json"
    spec = json.loads(path.read_text())
    vocab = spec["model"]["vocab"]
    words = [piece for piece in vocab if piece.startswith("\u2581")]
    ids = [vocab[word] for word in words]
    case.rng.shuffle(ids)
    vocab |= dict(zip(words, ids))
    path.write_text(json.dumps(spec))


def silent_clips(case):
    case.waves = [0 * wave for wave in case.waves]


def one_row_off(case):
    case.say(case.texts[1:] + case.texts[:1])


def duplicated_text(case):
    case.say([case.texts[0]] * ROWS)


def clipped_audio(case):
    case.waves = [(20 * wave).clip(-1, 1) for wave in case.waves]


def wrong_base(case):
    """Weights of another model of the same shapes: each tensor's values at other places."""
    path = case.other_base() / "model.safetensors"
    tensors = load_file(path)
    g = torch.Generator().manual_seed(case.rng.randrange(2**31))
    for name, value in tensors.items():
        order = torch.randperm(value.numel(), generator=g)
        tensors[name] = value.flatten()[order].view(value.shape)
    save_file(tensors, path, {"format": "pt"})


def swapped_channels(case):
    """The voice left, a soft noise right; then the other way round in half of the clips."""
    noise = np.random.RandomState(0)
    for i, wave in enumerate(case.waves):
        pair = [wave, 0.003 * noise.randn(len(wave))]
        case.waves[i] = np.stack(pair[::-1] if i % 2 else pair, 1)


def stop_at_the_wrong_end(case):
    """Not of the data: a trainer that labels the first patch of each clip as the last."""
    right = voxcpm.VoxCPM.collate

    def collate(self, *args):
        batch, counts = right(self, *args)
        first = batch["ends"].cumsum(0) - batch["ends"]
        batch["stop"] = torch.zeros_like(batch["stop"]).index_fill_(0, first, 1)
        return batch, counts

    case.trainer = collate


def truncated_clips(case):
    case.waves = [wave[:int(0.6 * len(wave))] for wave in case.waves]


def wrong_speaker_order(case):
    """Two named speakers, each under the other's name."""
    names = list(make_speech.ROBOTS)[1:3]
    texts = case.texts
    for i in range(ROWS):
        case.waves[i] = make_speech.speak(texts[i], make_speech.ROBOTS[names[i % 2]]) / 32768
        texts[i] = f"{names[(i + 1) % 2]} {texts[i]}"
    case.say(texts)


FAULTS = [clean, wrong_rate, shuffled_transcripts, half_speed, empty_texts, another_tokenizer, silent_clips, one_row_off,
          duplicated_text, clipped_audio, wrong_base, swapped_channels, stop_at_the_wrong_end, truncated_clips,
          wrong_speaker_order]


# ------------------------------------------------------------------------------------------------ the three looks


def look(fault, seed, folder):
    """{look: what it said}; a look that a refusal of an earlier one made needless is missing."""
    case = Case(folder, seed)
    fault(case)
    data, prepared, run, page = case.write(), folder / "data", folder / "run", folder / "page"
    said = {}
    code, _, err = here("prepare_data", ["--input", data, "--output_dir", prepared, "--ckpt_dir", case.base,
                                         "--seed", seed, "--val_split", "0.2", "--skip_bad"])
    told = told_by_report(prepared, code, err)
    if told:
        said["report"] = told
    if code:
        return said
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(voxcpm.VoxCPM, "collate", case.trainer)
        flags = ["--pretrained_path", case.base, "--train_manifest", prepared / "train.jsonl", "--val_manifest",
                 prepared / "val.jsonl", "--save_path", run, "--seed", seed, "--cache_dir", prepared / "cache", *STEPS]
        code, _, err = here("train", [ROOT / "demo/voice.yaml", *flags])
    free_locks()
    told = re.findall("warning (gate: .*)", (run / "train.log").read_text()) if run.is_dir() else []
    if code or told:
        said["gate"] = (told or err.splitlines()[-1:])[0]
    if code:
        return said
    flags = ["--lora", run / "latest", "--manifest", prepared / "val.jsonl", "--output_dir", page, *SPEAKING]
    code, _, err = here("validate", flags)
    free_locks()
    tuned = json.loads((page / "report.json").read_text())["columns"][-1]
    told = tuned["problems"] + tuned["doubts"]
    if code or told:
        said["validate"] = "; ".join(told)
    return said


def told_by_report(prepared, code, err):
    """The kinds of notices and refusals of prepare_data.py, with how many rows have them."""
    path = prepared / "report.json"
    if not path.is_file():
        return err.strip().splitlines()[-1] if code else ""
    report = json.loads(path.read_text())
    kinds = defaultdict(int)
    for notice in report["notices"]:
        kinds[notice["kind"]] += 1
    for fault in report["dropped"]:
        kinds["refused: " + fault["reason"].rpartition(": ")[2][:60]] += 1
    return ", ".join(f"{kind} ({n})" for kind, n in kinds.items())


def main():
    parser = argparse.ArgumentParser(description="Which faults of data are told, and by what.")
    parser.add_argument("faults", nargs="*", default=[fault.__name__ for fault in FAULTS])
    parser.add_argument("--seeds", type=int, default=3)
    cfg = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    lines = []
    for fault in FAULTS:
        if fault.__name__ not in cfg.faults:
            continue
        times, words = defaultdict(int), {}
        for seed in range(cfg.seeds):
            with tempfile.TemporaryDirectory() as folder:
                said = look(fault, seed, Path(folder))
            for name, text in said.items():
                times[name] += 1
                words[name] = text
            print(f"{time.monotonic() - began:.0f} s {fault.__name__} {seed}: {said}", file=sys.stderr, flush=True)
        counts = " | ".join(str(times[name]) for name in LOOKS)
        lines.append(f"| {fault.__name__.replace('_', ' ')} | {counts} |")
        print(lines[-1], flush=True)
    print(f"\n| fault, of {cfg.seeds} seeds told by | {' | '.join(LOOKS)} |\n|---|---|---|---|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
