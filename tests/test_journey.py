"""Every backbone from recordings to a voice, by the command lines: prepare, train, resume, infer, merge, infer; then full tuning.

A new backbone joins by tests/tiny_<name>.py with VARIANTS and write(folder, variant).
"""
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import models
from models.parts import audio, checkpoint
from tests.conftest import ROOT
from tests.running import start

ROOT = Path(ROOT)
SPEECH = ROOT.parent / "shared/audio/LJSpeech-24"
CASES = [(name, variant) for name in sorted(models.backbones()) for variant in importlib.import_module(f"tests.tiny_{name}").VARIANTS]


def forked(folder):
    def run(script, *flags):
        process = start(script, flags, folder)
        assert process.wait() == 0 and "Traceback" not in process.said, f"{script} {flags}\n{process.said}"
        return process.said
    return run


def by_path(folder):
    def run(script, *flags):
        done = subprocess.run([sys.executable, str(ROOT / f"{script}.py"), *map(str, flags)], cwd=folder, capture_output=True, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0 and "Traceback" not in done.stderr, f"{script} {flags}\n{done.stderr}"
        return done.stdout + done.stderr
    return run


def tones(folder):
    """Seven clips as LJSpeech lays them out."""
    (folder / "wavs").mkdir(parents=True)
    lines = []
    for i in range(7):
        t = torch.arange(int(22050 * (0.5 + 0.13 * i))) / 22050
        audio.write(folder / "wavs" / f"a{i}.wav", 0.3 * torch.sin(6.2832 * (120 + 30 * i) * t) * (1 + 0.3 * torch.sin(40 * t)), 22050)
        lines.append(f"a{i}|Clip {i}.|{'hello there world ' * (1 + i % 3)}and {i} more.")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")


def speech(folder, n):
    """The first n clips of a real speaker."""
    (folder / "wavs").mkdir(parents=True)
    lines = (SPEECH / "metadata.csv").read_text(encoding="utf-8").splitlines()[:n]
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for line in lines:
        shutil.copy(SPEECH / "wavs" / f"{line.split('|')[0]}.wav", folder / "wavs")


def settings(folder, name, variant, method):
    """The YAML file that is shipped for this backbone, or for a backbone that has none yet, the least that names the method."""
    for file in (f"{name}{variant}_{method}.yaml", f"{name}_{method}.yaml"):
        if (ROOT / "configs" / file).exists():
            return ROOT / "configs" / file
    path = folder / f"{method}.yaml"
    path.write_text("seed: 42\n" + ("lora: {}\n" if method == "lora" else ""))
    return path


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss/total"]) for line in lines if line["split"] == "train"]


def journey(folder, run, name, variant, seconds, full=True, more=()):
    importlib.import_module(f"tests.tiny_{name}").write(folder / "base", variant)
    run("prepare_data", "--input", "talk", "--output_dir", "data", "--ckpt_dir", "base", "--val_split", 0.2, "--workers", 1)
    ready = [json.loads(line) for side in ("train", "val") for line in (folder / "data" / f"{side}.jsonl").read_text().splitlines()]
    assert sum(row["duration"] for row in ready) == pytest.approx(seconds, rel=0.01)

    common = ("--pretrained_path", "base", "--train_manifest", "data/train.jsonl", "--val_manifest", "data/val.jsonl", "--batch_size", 2,
              "--warmup_steps", 0, "--max_steps", 4, "--learning_rate", 3e-3, "--num_workers", 0, "--max_batch_tokens", 0)
    text = ("--text", "hello there.", "--seed", 3, "--max_len", 6, "--min_len", 5)

    # LoRA: train, go on, speak, merge, speak
    how = (settings(folder, name, variant, "lora"), *common, "--save_path", "voice", "--lora.r", 4, "--lora.alpha", 8, *more)
    run("train", *how, "--num_iters", 2, "--val_samples", 0)
    said = run("train", *how, "--num_iters", 4, "--val_samples", 0)
    assert "going on from voice/step_0000002" in said and "encoded" not in said  # the cache holds every clip
    assert [step for step, _ in losses(folder / "voice")] == [1, 2, 3, 4]
    run("infer", "--lora", "voice/latest", *text, "--output", "adapted.wav")
    run("merge_lora", "--ckpt_dir", "base", "--lora", "voice/latest", "--output_dir", "merged")
    run("infer", "--ckpt_dir", "merged", *text, "--output", "merged.wav")
    waves = {k: audio.read(folder / f"{k}.wav", None)[0] for k in ("adapted", "merged")}
    assert all(len(w) > 1000 and w.std() > 1e-4 for w in waves.values())
    assert torch.allclose(waves["merged"], waves["adapted"], atol=2e-3)
    base, voice = models.load(folder / "base"), models.load(folder / "merged")
    moved = [n for n, p in base.named_parameters() if not torch.equal(p, voice.get_parameter(n))]
    assert moved and len(moved) < len(list(base.parameters()))
    if not full:
        return

    # every weight: train and speak; the checkpoint is a folder like the base
    run("train", settings(folder, name, variant, "full"), *common, "--save_path", "tuned", "--num_iters", 2, "--val_samples", 1)
    assert list((folder / "tuned" / "samples").glob("*.wav"))
    assert checkpoint.check_step(folder / "tuned" / "latest") is None
    run("infer", "--ckpt_dir", "tuned/latest", *text, "--output", "tuned.wav")
    assert len(audio.read(folder / "tuned.wav", None)[0]) > 1000


@pytest.mark.parametrize("name, variant", CASES, ids=["-".join(case) for case in CASES])
def test_from_recordings_to_a_voice(tmp_path, name, variant):
    tones(tmp_path / "talk")
    journey(tmp_path, forked(tmp_path), name, variant, sum(0.5 + 0.13 * i for i in range(7)))


def test_from_recordings_to_a_voice_with_the_embeddings_trained_beside_lora(tmp_path):
    tones(tmp_path / "talk")
    journey(tmp_path, forked(tmp_path), "csm", "original", sum(0.5 + 0.13 * i for i in range(7)), full=False,
            more=("--lora.train_embeddings", "true"))
    base, voice = models.load(tmp_path / "base"), models.load(tmp_path / "merged")
    tables = [n for n, _ in base.named_parameters() if n.startswith(base.embeddings)]
    assert len(tables) == 2 and not any(torch.equal(base.get_parameter(n), voice.get_parameter(n)) for n in tables)


@pytest.mark.skipif(not SPEECH.exists(), reason="the recordings of LJSpeech-24 are not here")
def test_from_a_real_speaker_to_a_voice_with_the_scripts_started_by_their_paths(tmp_path):
    speech(tmp_path / "talk", 5)
    seconds = sum(audio.info(path).seconds for path in (tmp_path / "talk/wavs").iterdir())
    journey(tmp_path, by_path(tmp_path), "voxcpm", "1.5", seconds, full=False)


def test_what_an_option_of_the_backbone_freezes_stays_frozen_in_full_tuning(tmp_path):
    tones(tmp_path / "talk")
    importlib.import_module("tests.tiny_csm").write(tmp_path / "base", "transformers")
    forked(tmp_path)("train", "--pretrained_path", "base", "--train_manifest", "talk/metadata.csv", "--save_path", "half", "--num_iters", 1,
                     "--warmup_steps", 0, "--learning_rate", 1e-2, "--backbone.freeze", "backbone")
    base, after = models.load(tmp_path / "base"), models.load(tmp_path / "half" / "latest")
    moved = {n for n, p in base.named_parameters() if not torch.equal(p, after.get_parameter(n))}
    assert moved and all(n.startswith("depth_decoder.") for n in moved)
