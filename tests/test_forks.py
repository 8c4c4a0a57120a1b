"""Five changes that people ask for stay small: each is a patch of a few lines that applies, does what it
says, and lets runs that were made before it go on with the same numbers. What must hold is in the file beside
the patch.
"""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.parts import audio
from tests import tiny_csm, tiny_voxcpm
from tests.conftest import ROOT
from tests.running import start

ROOT = Path(ROOT)
PATCHES = sorted((ROOT / "tests" / "forks").glob("*.patch"))
FILES, LINES = 2, 15  # what a fork may touch, and how many lines it may take out or put in
HEAVY = (".git", ".venv", "__pycache__", "runs", "demo", "golden", "*.pyc")
SETTINGS = {"train_manifest": "rows.jsonl", "batch_size": 2, "num_workers": 0, "max_steps": 4, "warmup_steps": 1,
            "learning_rate": 0.01, "valid_interval": 0, "save_interval": 0, "device": "cpu", "lora": "{r: 4, alpha: 8}"}
SMALL = {"lm_config": {"num_hidden_layers": 2}, "residual_lm_num_layers": 1, "encoder_config": {"num_layers": 1},
         "dit_config": {"num_layers": 1}}


def go(folder, backbone, steps):
    flags = [f"{backbone}.yaml", "--save_path", f"{backbone}_before", "--num_iters", steps]
    process = start("train", flags, folder)
    assert process.wait() == 0 and "Traceback" not in process.said, process.said


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Tiny checkpoints, four clips, and for each backbone a run of two steps and the same one of four."""
    root = tmp_path_factory.mktemp("forks")
    tiny_csm.write(root / "csm_base")
    tiny_voxcpm.write(root / "voxcpm_base", "1.5", **SMALL)
    rows = []
    for i in range(4):
        t = torch.arange(int(16000 * (0.4 + 0.1 * i))) / 16000
        wave = 0.3 * torch.sin(6.2832 * (150 + 30 * i) * t) * torch.cos(9 * t)
        audio.write(root / f"a{i}.wav", wave, 16000)
        rows.append({"id": f"r{i}", "audio": f"a{i}.wav", "text": "hello there all"[: 5 + 3 * i]})
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for backbone in ("csm", "voxcpm"):
        settings = {**SETTINGS, "pretrained_path": f"{backbone}_base", "cache_dir": f"cache_{backbone}"}
        (root / f"{backbone}.yaml").write_text("".join(f"{k}: {v}\n" for k, v in settings.items()))
        go(root, backbone, 2)
        shutil.copytree(root / f"{backbone}_before", root / "kept")
        go(root, backbone, 4)
        (root / f"{backbone}_before").rename(root / f"{backbone}_whole")
        (root / "kept").rename(root / f"{backbone}_before")
    return root


def changed(patch):
    """(files, lines taken out or put in) of a patch."""
    text = patch.read_text(encoding="utf-8")
    files = set(re.findall(r"^\+\+\+ b/(\S+)", text, re.M))
    lines = [line for line in text.splitlines() if re.match(r"[+-](?!\+\+ |-- )", line)]
    return files, lines


def test_there_are_five():
    assert [patch.stem for patch in PATCHES] == ["inverse_sqrt", "lora_fa", "manifest_key", "min_p", "z_loss"]
    assert all(patch.with_suffix(".py").is_file() for patch in PATCHES)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_a_fork_is_small(patch):
    files, lines = changed(patch)
    assert 0 < len(files) <= FILES and 0 < len(lines) <= LINES, f"{len(files)} files, {len(lines)} lines"
    assert not [name for name in files if name.startswith("tests/")]


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_a_fork_applies_and_does_what_it_says(patch, home, tmp_path):
    tree, folder = tmp_path / "tree", tmp_path / "home"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*HEAVY))
    shutil.copytree(home, folder, symlinks=True)
    # Inside of another repository git would say nothing and apply nothing.
    alone = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path)}
    done = subprocess.run(["git", "apply", str(patch)], cwd=tree, env=alone, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stderr}\nMake the change anew, then git diff > {patch.name}"
    for name in changed(patch)[0]:
        assert (tree / name).read_bytes() != (ROOT / name).read_bytes(), f"{name} is what it was"
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", f"tests.forks.{patch.stem}"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
