"""What other people's files, full disks and kills may not do: delete, hang, end in a traceback, forge a line."""
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

import configs
import infer
from models import voxcpm
from models.parts import Invalid, checkpoint, plain, run
from models.parts import cache as cache_part
from models.parts.cache import ClipCache
from models.parts.manifests import read_manifest
from tests import tiny_voxcpm
from tests.conftest import ROOT
from tests.running import here
from tests.test_prepare import Model, put, tone


def quiet(*_):
    pass


@pytest.fixture
def rows(tmp_path):
    lines = [json.dumps({"audio": str(tone(tmp_path / f"wav/{n}.wav", 0.5, 200 + 20 * n)), "text": f"number {n}"}) for n in range(3)]
    return read_manifest(put(tmp_path / "m.jsonl", "\n".join(lines)))


def tree(folder):
    """{path: bytes} of every file below, links as where they lead to."""
    out = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            out[path] = os.readlink(path)
        elif path.is_file():
            out[path] = path.read_bytes()
    return out


def usable(cache, rows):
    return cache.missing(rows) == [] and all(torch.equal(cache.get(row)["latents"], Model().encode(row)["latents"]) for row in rows)


# ------------------------------------------------------------------------------------------------ 1: nothing of a user is deleted


def safetensors_file(path, metadata=None):
    safetensors.torch.save_file({"w": torch.ones(3)}, path, metadata)


FOREIGN = {  # {name: what writes it}; none of them is ours, some are named as if
    "model.safetensors": safetensors_file,
    "model-00001-of-00002.safetensors": lambda path: safetensors_file(path, {"records": "{}"}),
    "00001-0123456789ab.safetensors": safetensors_file,
    "00002-ffffffffffff.safetensors": lambda path: path.write_bytes(b""),
    "00003-0123456789ab.safetensors": lambda path: path.write_bytes((2**63).to_bytes(8, "little") + b"{}"),
    "00004-0123456789ab.safetensors": lambda path: path.write_bytes(b"\x08" + bytes(7) + b"[[[[1]]]"),
    "00005-0123456789ab.safetensors": lambda path: path.symlink_to(path),
    "00006-0123456789ab.safetensors": lambda path: path.mkdir(),
    "files.json": lambda path: path.write_text('{"train": "a.wav"}'),
    "shards.json": lambda path: path.write_text("[1, 2]"),
    ".notes.tmp": lambda path: path.write_text("mine"),
    ".notes.1.tmp": lambda path: path.write_text("mine"),
    ".model.safetensors.99999999.tmp": lambda path: path.write_text("mine"),
    "config.json": lambda path: path.write_text("{}"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_file_in_the_cache_costs_nothing_and_is_left(tmp_path, rows, name):
    folder = tmp_path / "c"
    folder.mkdir()
    FOREIGN[name](folder / name)
    if not (folder / name).is_symlink():
        os.utime(folder / name, (1, 1))
    before = tree(folder)
    ClipCache(folder, Model()).add(rows, quiet)
    cache = ClipCache(folder, Model())
    assert usable(cache, rows) and {path: tree(folder)[path] for path in before} == before
    assert os.path.lexists(folder / name)


def test_a_pipe_that_is_named_as_a_shard_is_not_waited_for(tmp_path, rows):
    (tmp_path / "c").mkdir()
    os.mkfifo(tmp_path / "c/00001-0123456789ab.safetensors")
    cache = ClipCache(tmp_path / "c", Model())
    cache.add(rows, quiet)
    assert usable(cache, rows) and (tmp_path / "c/00001-0123456789ab.safetensors").is_fifo()


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EMFILE])
def test_an_error_of_the_disk_is_no_damage(tmp_path, rows, monkeypatch, number):
    ClipCache(tmp_path / "c", Model()).add(rows, quiet)
    (tmp_path / "c/shards.json").unlink()
    before = tree(tmp_path / "c")

    def fail(path):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(safetensors.torch, "load_file", fail)
    said = []
    cache = ClipCache(tmp_path / "c", Model())
    cache.add(rows, said.append)
    assert os.strerror(number) in said[0] and cache.missing(rows) == []
    assert {path: tree(tmp_path / "c")[path] for path in before} == before
    monkeypatch.undo()
    assert usable(ClipCache(tmp_path / "c", Model()), rows)


def test_what_a_killed_process_was_writing_goes(tmp_path, rows):
    folder = tmp_path / "c"
    folder.mkdir()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    names = [f".00001-0123456789ab.safetensors.{gone.pid}.tmp", f".files.json.{gone.pid}.tmp"]
    alive = f".00001-0123456789ab.safetensors.{os.getpid()}.tmp"
    for name in (*names, alive):
        (folder / name).write_bytes(b"half")
        os.utime(folder / name, (1, 1))
    ClipCache(folder, Model()).add(rows, quiet)
    assert [name for name in os.listdir(folder) if name.endswith(".tmp")] == [alive]


def test_a_shard_is_never_written_over_another(tmp_path, rows):
    folder = tmp_path / "c"
    ClipCache(folder, Model()).add(rows[:1], quiet)
    ClipCache(folder, Model()).add(rows[1:], quiet)
    first, *_, last = sorted(folder.glob("*.safetensors"))
    first.unlink()
    before = last.read_bytes()
    ClipCache(folder, Model()).add(rows, quiet)
    assert last.read_bytes() == before and len(set(map(cache_part.shard_number, folder.glob("*.safetensors")))) == len(list(folder.glob("*.safetensors")))
    assert usable(ClipCache(folder, Model()), rows)


@pytest.mark.parametrize("at", [0, 1, 7, 9, 40, 100, 200])
def test_a_flipped_bit_of_a_header_costs_that_shard_alone(tmp_path, rows, at):
    folder = tmp_path / "c"
    ClipCache(folder, Model()).add(rows, quiet)
    shard = min(folder.glob("*.safetensors"))
    status, data = shard.stat(), bytearray(shard.read_bytes())
    data[at] ^= 1
    shard.write_bytes(data)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))  # size and time as before
    for _ in range(2):  # the first may find it only on reading and say so; the second mends it
        cache = ClipCache(folder, Model())
        cache.add(rows, quiet)
        try:
            assert usable(cache, rows)
        except Invalid as e:
            assert "run" in str(e)
    assert usable(ClipCache(folder, Model()), rows)


TINY = {"lm_config": {"num_hidden_layers": 1}, "residual_lm_num_layers": 1, "encoder_config": {"num_layers": 1},
        "dit_config": {"num_layers": 1}}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """base: a tiny checkpoint; adapter: one of it."""
    folder = tmp_path_factory.mktemp("attack")
    tiny_voxcpm.write(folder / "base", "1.5", codec_file="audiovae.safetensors", **TINY)
    tiny_voxcpm.write_adapter(folder / "adapter", "1.5", base=folder / "base", **TINY)
    return folder


def merge(home, out):
    return here("merge_lora", ("--ckpt_dir", home / "base", "--lora", home / "adapter", "--output_dir", out))


def test_a_folder_that_was_filled_meanwhile_is_not_removed(home, tmp_path, monkeypatch):
    out = tmp_path / "out"
    save = voxcpm.VoxCPM.save

    def fill(model, folder, *rest):
        save(model, folder, *rest)
        out.mkdir()
        (out / "thesis.txt").write_text("mine")

    monkeypatch.setattr(voxcpm.VoxCPM, "save", fill)
    code, _, said = merge(home, out)
    assert code == 1 and len(said.splitlines()) < 4 and "cannot be written" in said
    assert tree(tmp_path) == {out / "thesis.txt": b"mine"}


@pytest.mark.parametrize("name, marked, stays", [
    (".out.99999999.tmp", True, False), (".out.99999999.tmp", False, True), (f".out.{os.getpid()}x.tmp", True, True),
    ("out.99999999.tmp", True, True), (".other.99999999.tmp", True, True)])
def test_a_merge_removes_what_a_killed_one_left_and_nothing_else(home, tmp_path, name, marked, stays):
    (tmp_path / name).mkdir()
    (tmp_path / name / "model.safetensors").write_text("half")
    if marked:
        (tmp_path / name / ".merge_lora").touch()
    assert merge(home, tmp_path / "out")[0] == 0
    assert (tmp_path / name / "model.safetensors").exists() == stays
    assert not list((tmp_path / "out").glob(".*"))


def test_a_merge_that_is_ended_leaves_nothing(home, tmp_path, monkeypatch):
    monkeypatch.setattr(voxcpm.VoxCPM, "save", lambda *_: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(60))
    before = signal.getsignal(signal.SIGTERM)
    assert merge(home, tmp_path / "out")[0] == 143
    assert tree(tmp_path) == {} and not os.listdir(tmp_path) and signal.getsignal(signal.SIGTERM) == before


def test_a_place_where_nothing_can_be_made_is_one_line(home, tmp_path):
    (tmp_path / "file").touch()
    code, _, said = merge(home, tmp_path / "file" / "out")
    assert code == 1 and "cannot be written" in said and "Traceback" not in said


@pytest.mark.parametrize("name", ["step_notes.tmp", "step_1.tmp", "step_0000500.tmp.txt", "notes.tmp", "step_0000500.old", "latest.tmp"])
def test_a_run_folder_keeps_what_is_not_ours(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine").write_text("x")
    assert run.claim(tmp_path) is None
    for _ in range(2):  # the second replaces the first
        checkpoint.write_step(tmp_path, 500, lambda folder: (folder / "w").write_text("w"), {})
    assert (tmp_path / name / "mine").read_text() == "x"
    assert sorted(path.name for path in checkpoint.steps(tmp_path)) == ["step_0000500"] and not list(tmp_path.glob("*.before-*"))


def test_a_torn_step_goes_and_a_link_in_its_place_is_only_unlinked(tmp_path):
    root, other = tmp_path / "run", tmp_path / "other"
    other.mkdir()
    (other / "mine").write_text("x")
    (root / "step_0000500.tmp").mkdir(parents=True)
    (root / "step_0000600.tmp").symlink_to(other)
    assert run.claim(root) is None
    assert (other / "mine").read_text() == "x" and sorted(os.listdir(root)) == [".lock"]
    (root / "step_0000500.tmp").symlink_to(other)
    checkpoint.write_step(root, 500, lambda folder: (folder / "w").write_text("w"), {})
    assert os.listdir(other) == ["mine"]


def test_a_file_named_latest_is_put_aside(tmp_path):
    (tmp_path / "latest").write_text("my notes")
    checkpoint.write_step(tmp_path, 1, lambda folder: (folder / "w").write_text("w"), {})
    assert (tmp_path / "latest.before-1").read_text() == "my notes" and (tmp_path / "latest").resolve().name == "step_0000001"


@pytest.mark.parametrize("name", [".lock", "train.log", "metrics.jsonl", "logs", "samples"])
def test_a_link_out_of_a_run_folder_is_refused(tmp_path, name):
    root, other = tmp_path / "run", tmp_path / "other"
    root.mkdir()
    other.write_text("mine")
    (root / name).symlink_to(other)
    wrong = run.claim(root)
    assert str(root / name) in wrong and "Remove the link" in wrong and other.read_text() == "mine"


@pytest.mark.parametrize("name", [".write", "config.yaml.tmp", "config.yaml", f".config.yaml.{os.getpid()}.tmp", "metrics.tmp"])
def test_a_link_that_lies_under_a_name_of_ours_is_not_written_through(tmp_path, name):
    root, other = tmp_path / "run", tmp_path / "other"
    root.mkdir()
    other.write_text("mine")
    (root / name).symlink_to(other)
    (root / "metrics.jsonl").write_text('{"step": 1}\n{"step": 9}\n')
    assert run.claim(root) is None
    configs.dump(infer.Infer(text="hi"), root / "config.yaml")
    run.cut_metrics(root / "metrics.jsonl", 5)
    assert other.read_text() == "mine" and (root / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert not (root / "config.yaml").is_symlink() and "hi" in (root / "config.yaml").read_text()
