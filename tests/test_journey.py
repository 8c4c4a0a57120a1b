"""Every backbone from recordings to a voice, by the command lines: prepare, train, resume, infer, merge, infer.

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
METHODS = {"lora": (), "full": (), "embeddings": ("--lora.train_embeddings", "true")}  # flags beside those of every run
CASES = [(name, variant, tuple(METHODS) if i == 0 else ("lora", "full")) for name in sorted(models.backbones())
         for i, variant in enumerate(importlib.import_module(f"tests.tiny_{name}").VARIANTS)]


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
    """The n shortest clips of a real speaker; tiny checkpoints have few positions."""
    (folder / "wavs").mkdir(parents=True)
    place = {line: SPEECH / "wavs" / f"{line.split('|')[0]}.wav" for line in (SPEECH / "metadata.csv").read_text(encoding="utf-8").splitlines()}
    lines = sorted(place, key=lambda line: place[line].stat().st_size)[:n]
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for line in lines:
        shutil.copy(place[line], folder / "wavs")


def chatml(folder):
    """Seed H's own example, voices and texts of its form: a reference and what is to be said in the user's turn."""
    folder.mkdir(parents=True)
    rows, said = [], ["وَمِنْ ثُمَّ قَالُوا", "حلو لو سميته", "مرحبا بكم", "صباح الخير", "إلى اللقاء"]
    for i, text in enumerate(said):
        for kind, pitch in (("ref", 110), ("target", 170)):
            t = torch.arange(int(24000 * (0.5 + 0.1 * i))) / 24000
            audio.write(folder / f"{kind}{i}.wav", 0.3 * torch.sin(6.2832 * (pitch + 9 * i) * t) * (1 + 0.3 * torch.sin(40 * t)), 24000)
        asked = [{"type": "text", "text": said[i - 1]}, {"type": "audio", "audio_url": f"ref{i}.wav"},
                 {"type": "text", "text": f"Please generate speech for: {text}"}]
        answer = [{"type": "text", "text": text}, {"type": "audio", "audio_url": f"target{i}.wav"}]
        rows.append({"messages": [{"role": "system", "content": "You speak in the voice of the provided reference audio."},
                                  {"role": "user", "content": asked}, {"role": "assistant", "content": answer}], "speaker": "speaker_001"})
    (folder / "train.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")


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


def journey(folder, run, name, variant, seconds, methods, rows="talk"):
    """One preparation; then with each method train, go on and speak, and with adapters merge and speak the same again."""
    importlib.import_module(f"tests.tiny_{name}").write(folder / "base", variant)
    run("prepare_data", "--input", rows, "--output_dir", "data", "--ckpt_dir", "base", "--val_split", 0.2, "--workers", 1)
    ready = [json.loads(line) for side in ("train", "val") for line in (folder / "data" / f"{side}.jsonl").read_text().splitlines()]
    assert sum(row["duration"] for row in ready) == pytest.approx(seconds, rel=0.01)
    base = models.load(folder / "base")
    names = {n for n, _ in base.named_parameters()}
    tables = {n for n in names if n.startswith(base.embeddings)}
    assert tables

    common = ("--pretrained_path", "base", "--train_manifest", "data/train.jsonl", "--val_manifest", "data/val.jsonl", "--batch_size", 2,
              "--warmup_steps", 0, "--max_steps", 4, "--learning_rate", 3e-3, "--num_workers", 0, "--max_batch_tokens", 0)
    text = ("--text", "hello there.", "--seed", 3, "--max_len", 6, "--min_len", 5)
    if hasattr(importlib.import_module(f"tests.tiny_{name}"), "prompts"):  # its voice is always taken from a recording
        text += ("--reference_audio", sorted((folder / "talk/wavs").iterdir())[-1])
    for method in methods:
        adapter = method != "full"
        how = (settings(folder, name, variant, "lora" if adapter else "full"), *common, "--save_path", method, *METHODS[method],
               *(("--lora.r", 4, "--lora.alpha", 8) if adapter else ()))
        run("train", *how, "--num_iters", 2, "--val_samples", 0)
        said = run("train", *how, "--num_iters", 4, "--val_samples", 0 if adapter else 1)
        assert f"going on from {method}/step_0000002" in said and "encoded" not in said  # the cache holds every clip
        assert [step for step, _ in losses(folder / method)] == [1, 2, 3, 4]
        assert checkpoint.check_step(folder / method / "latest") is None
        run("infer", "--lora" if adapter else "--ckpt_dir", f"{method}/latest", *text, "--output", f"{method}.wav")
        wave = audio.read(folder / f"{method}.wav", None)[0]
        assert len(wave) > 1000 and wave.std() > 1e-4
        if adapter:
            run("merge_lora", "--ckpt_dir", "base", "--lora", f"{method}/latest", "--output_dir", f"{method}_merged")
            run("infer", "--ckpt_dir", f"{method}_merged", *text, "--output", "merged.wav")
            assert torch.allclose(audio.read(folder / "merged.wav", None)[0], wave, atol=2e-3)
        else:
            assert list((folder / method / "samples").glob("*.wav"))
        voice = models.load(folder / (f"{method}_merged" if adapter else f"{method}/latest"))
        moved = {n for n in names if not torch.equal(base.get_parameter(n), voice.get_parameter(n))}
        if adapter:
            assert moved and moved < names and moved & tables == (tables if method == "embeddings" else set())
        else:
            assert moved == names


@pytest.mark.parametrize("name, variant, methods", CASES, ids=["-".join(case[:2]) for case in CASES])
def test_from_recordings_to_a_voice(tmp_path, name, variant, methods):
    tones(tmp_path / "talk")
    journey(tmp_path, forked(tmp_path), name, variant, sum(0.5 + 0.13 * i for i in range(7)), methods)


@pytest.mark.skipif(not SPEECH.exists(), reason="the recordings of LJSpeech-24 are not here")
@pytest.mark.parametrize("name, variant, start_script, methods", [("voxcpm", "1.5", by_path, ("lora",)), ("csm", "transformers", forked, tuple(METHODS)),
                                                                    ("higgs", "original", forked, ("lora",)), ("indextts2", "flat", forked, ("lora",))],
                         ids=["voxcpm, scripts started by their paths", "csm", "higgs", "indextts2"])
def test_from_a_real_speaker_to_a_voice(tmp_path, name, variant, start_script, methods):
    speech(tmp_path / "talk", 5)
    seconds = sum(audio.info(path).seconds for path in (tmp_path / "talk/wavs").iterdir())
    journey(tmp_path, start_script(tmp_path), name, variant, seconds, methods)


def test_from_conversations_with_a_reference_to_a_voice(tmp_path):
    chatml(tmp_path / "talk")
    journey(tmp_path, forked(tmp_path), "higgs", "transformers", sum(0.5 + 0.1 * i for i in range(5)), ("lora", "full"), "talk/train.json")


def test_what_an_option_of_the_backbone_freezes_stays_frozen_in_full_tuning(tmp_path):
    tones(tmp_path / "talk")
    importlib.import_module("tests.tiny_csm").write(tmp_path / "base", "transformers")
    forked(tmp_path)("train", "--pretrained_path", "base", "--train_manifest", "talk/metadata.csv", "--save_path", "half", "--num_iters", 1,
                     "--warmup_steps", 0, "--learning_rate", 1e-2, "--backbone.freeze", "backbone")
    base, after = models.load(tmp_path / "base"), models.load(tmp_path / "half" / "latest")
    moved = {n for n, p in base.named_parameters() if not torch.equal(p, after.get_parameter(n))}
    assert moved and all(n.startswith("depth_decoder.") for n in moved)
