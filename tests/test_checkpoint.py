"""Weights on disk: strict filling, safe reading, step folders that are whole or not there."""
import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from models.parts import Invalid, checkpoint
from tests.conftest import ROOT


class Two(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(3, 2), torch.nn.Linear(2, 2, bias=False)


def meta():
    with torch.device("meta"):
        return Two()


STATE = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2), "b.weight": torch.eye(2)}


PREFIXES = [lambda s: {"module." + k: v for k, v in s.items()}, lambda s: {"_orig_mod." + k: v for k, v in s.items()}, lambda s: {k.replace(".", "._orig_mod."): v for k, v in s.items()},
            lambda s: {"module._orig_mod." + k: v for k, v in s.items()}, lambda s: {"_orig_mod.module." + k: v for k, v in s.items()}]


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s}, lambda s: {"model": {"net": s}}, lambda s: {"generator": s}, *PREFIXES])
def test_wrappers_are_taken_off(tmp_path, wrap):
    torch.save(wrap(STATE), tmp_path / "x.pth")
    files = [tmp_path / "x.pth"]
    if wrap in PREFIXES:
        files.append(tmp_path / "x.safetensors")
        save_file(wrap(STATE), files[-1])
    for file in files:
        model = meta()
        checkpoint.fill(model, checkpoint.read(file))
        assert all(torch.equal(v, STATE[k]) for k, v in model.state_dict().items())


def test_a_tensor_with_and_without_its_wrapper_is_refused(tmp_path):
    save_file({**STATE, "_orig_mod.a.bias": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(Invalid, match="with and without _orig_mod."):
        checkpoint.read(tmp_path / "x.safetensors")


def test_nothing_of_a_file_that_fits_nowhere_is_counted_twice(tmp_path):
    save_file({f"other.{k}": v for k, v in STATE.items()}, tmp_path / "x.safetensors")
    with pytest.raises(Invalid, match="x: 3 of its 3 tensors do not fit, 3 are missing: missing a.weight"):
        checkpoint.fill(meta(), checkpoint.read(tmp_path / "x.safetensors"), what="x")


@pytest.mark.parametrize("value, words", [(np.float64(1.5), r"numbers of numpy beside tensors \(numpy[\w.]*\.scalar\)"), (np.ones(2), "numbers of numpy beside tensors"),
                                          (argparse.Namespace(a=1), "holds argparse.Namespace beside tensors")])
@pytest.mark.parametrize("is_zip", [True, False])
def test_what_a_pickle_holds_beside_tensors_is_named(tmp_path, value, words, is_zip):
    torch.save({"model": STATE, "loss": value}, tmp_path / "x.pth", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(Invalid, match=words) as e:
        checkpoint.read(tmp_path / "x.pth")
    assert str(e.value).isprintable() and "was not opened" in str(e.value)


def test_a_pointer_of_git_lfs_is_no_damage(tmp_path):
    for name in ("x.safetensors", "x.pth", "x.json", "x.index.json"):
        (tmp_path / name).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 134\n")
        with pytest.raises(Invalid, match=f"{name} is a pointer of Git LFS, not the file itself: run git lfs pull"):
            checkpoint.read_json(tmp_path / name) if name == "x.json" else checkpoint.read(tmp_path / name)


def test_shards_are_read_through_their_index(tmp_path):
    save_file({"a.weight": STATE["a.weight"]}, tmp_path / "m-1.safetensors")
    save_file({k: STATE[k] for k in ("a.bias", "b.weight")}, tmp_path / "m-2.safetensors")
    weight_map = {"a.weight": "m-1.safetensors", "a.bias": "m-2.safetensors", "b.weight": "m-2.safetensors"}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert set(checkpoint.read(tmp_path / "m.safetensors.index.json")) == set(STATE)


@pytest.mark.parametrize("change, words", [
    (lambda s: s.pop("a.bias"), "0 of its 2 tensors do not fit, 1 are missing: missing a.bias"),
    (lambda s: s.update({"c.weight": torch.ones(1)}), "unexpected c.weight.*--allow_unused_tensors"),
    (lambda s: s.update({"a.bias": torch.ones(3)}), r"a.bias is \[3\], the model has \[2\]"),
    (lambda s: s.update({"a.biass": s.pop("a.bias")}), r"missing a.bias; unexpected a.biass.*did you mean a.bias"),
])
def test_filling_is_strict_both_ways(tmp_path, change, words):
    state = dict(STATE)
    change(state)
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(Invalid, match=words):
        checkpoint.fill(meta(), checkpoint.read(tmp_path / "x.safetensors"))


def test_unused_tensors_can_be_listed_or_allowed(tmp_path):
    save_file({**STATE, "old.weight": torch.ones(1)}, tmp_path / "x.safetensors")
    assert checkpoint.fill(meta(), checkpoint.read(tmp_path / "x.safetensors"), unused={r"old\..*": "dead"}) == ["old.weight"]
    assert checkpoint.fill(meta(), checkpoint.read(tmp_path / "x.safetensors"), allow_unused=True) == ["old.weight"]


class More(torch.nn.Linear):
    """A layer that carries something beyond what it was published with, whatever that is."""

    added = ("extra",)

    def __init__(self):
        super().__init__(2, 2, bias=False)
        self.extra = torch.nn.Parameter(torch.ones(2, 2))

    def merged(self, leaf):
        return getattr(self, leaf) + self.extra


def test_what_a_module_has_added_is_no_part_of_the_published_weights():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), More())
    before = checkpoint.fingerprint(model)
    plain, merged = checkpoint.weights(model), checkpoint.weights(model, merged=True)
    assert list(plain) == list(merged) == ["0.weight", "1.weight"]
    assert torch.equal(plain["0.weight"], merged["0.weight"]) and torch.equal(merged["1.weight"], plain["1.weight"] + 1)
    model[1].extra.data += 1
    assert checkpoint.fingerprint(model) == before
    model[0].weight.published_dtype = torch.bfloat16
    assert checkpoint.weights(model)["0.weight"].dtype == torch.bfloat16
    model[0].weight.data += 0.5
    assert checkpoint.fingerprint(model) != before
    assert "lora" not in Path(checkpoint.__file__).read_text(encoding="utf-8").lower()


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["EVIL_FOLDER"],)


def test_a_pickle_that_runs_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("EVIL_FOLDER", str(tmp_path / "ran"))
    torch.save({"a": Evil()}, tmp_path / "x.pth")
    with pytest.raises(Invalid, match="unpickling it could run code"):
        checkpoint.read(tmp_path / "x.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_torn_files_are_named(tmp_path, name, share):
    path = tmp_path / name
    (save_file if name.endswith("safetensors") else torch.save)(STATE, path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(Invalid, match=f"{name} is damaged"):
        checkpoint.fill(meta(), checkpoint.read(path))


def test_weight_norm_is_multiplied_out():
    conv = torch.nn.utils.parametrizations.weight_norm(torch.nn.ConvTranspose1d(3, 5, 4), dim=0)
    state = {k: checkpoint.Stored(v.shape, v.dtype, lambda v=v: v.detach()) for k, v in conv.state_dict().items()}
    folded = checkpoint.fold_weight_norm(state)
    assert set(folded) == {"weight", "bias"} and torch.allclose(folded["weight"].load(), conv.weight, atol=1e-6)
    old = {"weight_g": state["parametrizations.weight.original0"], "weight_v": state["parametrizations.weight.original1"]}
    assert torch.allclose(checkpoint.fold_weight_norm(old)["weight"].load(), conv.weight, atol=1e-6)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to read the peak")
def test_loading_peaks_at_one_copy_of_the_model(tmp_path):
    """200 MB of weights in bf16 into float32: 400 MB stay, and no more than a tenth on top of it was ever there."""
    big = {f"l{i}.weight": torch.zeros(1000, 5000, dtype=torch.bfloat16) for i in range(20)}
    save_file(big, tmp_path / "x.safetensors")
    code = r"""
import re, sys, torch
from models.parts import checkpoint
def memory(what):
    return int(re.search(what + r":\s+(\d+) kB", open("/proc/self/status").read())[1]) / 1024
with torch.device("meta"):
    model = torch.nn.Module()
    for i in range(20):
        setattr(model, f"l{i}", torch.nn.Linear(5000, 1000, bias=False))
open("/proc/self/clear_refs", "w").write("5")  # forget the peak of the imports
before = memory("VmRSS")
checkpoint.fill(model, checkpoint.read(sys.argv[1]), dtype=torch.float32)
print(memory("VmHWM") - before)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.safetensors")], cwd=ROOT, capture_output=True, text=True, check=True)
    model = 20 * 1000 * 5000 * 4 / 2**20
    assert 0.95 * model < float(done.stdout) < 1.1 * model + 20


# ------------------------------------------------------------------------------------------------ step folders


def write(value):
    def fill(folder):
        save_file({"x": torch.full((100,), float(value))}, folder / "model.safetensors")
        torch.save({"m": torch.full((50,), float(value))}, folder / "optimizer.pth")
    return fill


def test_a_save_killed_at_any_file_operation_leaves_the_last_complete_step(tmp_path):
    """The process dies before each operation of a save in turn; what can be resumed is the old step or the new one, whole."""
    checkpoint.write_step(tmp_path, 1, write(1), {"step": 1})
    operations, n = ["mkdir", "fsync", "rename", "replace", "symlink", "open", "unlink"], 0
    while True:
        pid = os.fork()
        if pid == 0:
            left = [n]

            def dying(f):
                def call(*args, **kwargs):
                    if left[0] == 0:
                        os._exit(9)
                    left[0] -= 1
                    return f(*args, **kwargs)
                return call

            for name in operations:
                setattr(os, name, dying(getattr(os, name)))
            checkpoint.save_file_ = dying(save_file)
            checkpoint.write_step(tmp_path, 2, write(2), {"step": 2})
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        said = []
        found = checkpoint.newest_step(tmp_path, said.append)
        assert found is not None and checkpoint.check_step(found) is None and not said
        assert json.loads((found / checkpoint.INDEX).read_text())["step"] == int(found.name[5:])
        assert (tmp_path / "latest").resolve().is_dir()
        if status == 0:
            break
        n += 1
        checkpoint.remove(tmp_path / "step_0000002")
        checkpoint.point(tmp_path, "step_0000001")
    assert n >= 10, "as many operations were interrupted"
    assert found.name == "step_0000002" and not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("harm", ["cut to nothing", "cut in half", "cut by a byte", "flipped", "gone"])
def test_damage_to_any_file_is_noticed_and_the_step_before_is_used(tmp_path, harm):
    checkpoint.write_step(tmp_path, 1, write(1), {"step": 1})
    files = [p.name for p in checkpoint.write_step(tmp_path, 2, write(2), {"step": 2}).iterdir()]
    assert set(files) == {"model.safetensors", "optimizer.pth", checkpoint.INDEX}
    for name in files:
        newest = checkpoint.write_step(tmp_path, 2, write(2), {"step": 2})
        path = newest / name
        data = path.read_bytes()
        if harm == "gone":
            path.unlink()
        elif harm == "flipped":
            i = len(data) // 2
            path.write_bytes(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :])
        else:
            path.write_bytes(data[: {"cut to nothing": 0, "cut in half": len(data) // 2, "cut by a byte": len(data) - 1}[harm]])
        said = []
        assert checkpoint.newest_step(tmp_path, said.append).name == "step_0000001", name
        assert "damaged checkpoint" in said[0] and "step_0000002" in said[0]


def test_a_full_disk_leaves_earlier_checkpoints_and_names_the_place(tmp_path):
    checkpoint.write_step(tmp_path, 1, write(1), {"step": 1})
    code = r"""
import resource, signal, sys, torch
from models.parts import Invalid, checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
def write(folder):
    torch.save({"m": torch.ones(100000)}, folder / "optimizer.pth")
try:
    checkpoint.write_step(sys.argv[1], 2, write, {"step": 2})
except Invalid as e:
    print(e)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "could not save" in done.stdout and "step_0000002" in done.stdout and "Earlier checkpoints are untouched" in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_0000001"]


def test_old_steps_go_but_best_last_and_every_kth_stay(tmp_path):
    for step in range(1, 8):
        checkpoint.write_step(tmp_path, step, write(step), {"step": step})
        checkpoint.prune(tmp_path, 2, keep_every=3, stay=[1])
    assert [p.name[-1] for p in checkpoint.steps(tmp_path)] == ["7", "6", "3", "1"]
    assert os.readlink(tmp_path / "latest") == "step_0000007"


def test_latest_is_a_text_file_where_links_are_refused(tmp_path, monkeypatch):
    def refuse(self, target):
        raise OSError("no links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    checkpoint.write_step(tmp_path, 1, write(1), {"step": 1})
    assert (tmp_path / "latest").read_text() == "step_0000001"


def test_a_latest_that_a_copy_made_a_folder_is_put_aside(tmp_path):
    first = checkpoint.write_step(tmp_path, 1, write(1), {"step": 1})
    (tmp_path / "latest").unlink()
    shutil.copytree(first, tmp_path / "latest")
    checkpoint.write_step(tmp_path, 2, write(2), {"step": 2})
    assert os.readlink(tmp_path / "latest") == "step_0000002" and (tmp_path / "latest.before-1" / "model.safetensors").exists()
