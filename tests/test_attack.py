"""What other people's files, full disks and kills may not do: delete, hang, end in a traceback, forge a line."""
import copy
import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import safetensors.torch
import torch

import configs
import infer
import lora
import models
import prepare_data
import validate
from models import csm, higgs, indextts2, voxcpm
from models.codecs import bigvgan, higgs_codec, mimi, s2mel, w2vbert
from models.parts import Invalid, adapters, audio, checkpoint, plain, run
from models.parts import cache as cache_part
from models.parts.cache import ClipCache
from models.parts.manifests import read_manifest
from models.parts.tokenizer import Tokenizer
from tests import test_bigvgan, test_higgs_codec, test_mimi, test_s2mel, test_w2vbert, tiny, tiny_csm, tiny_higgs, tiny_indextts2, tiny_voxcpm
from tests.conftest import ROOT
from tests.running import here, start
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
    (".out.99999999.tmp", True, False), (".out.99999999.tmp", False, True), (".out.PIDx.tmp", True, True),
    ("out.99999999.tmp", True, True), (".other.99999999.tmp", True, True)])
def test_a_merge_removes_what_a_killed_one_left_and_nothing_else(home, tmp_path, name, marked, stays):
    name = name.replace("PID", str(os.getpid()))
    (tmp_path / name).mkdir()
    (tmp_path / name / "model.safetensors").write_text("half")
    if marked:
        (tmp_path / name / ".merge_lora").touch()
    assert merge(home, tmp_path / "out")[0] == 0
    assert (tmp_path / name / "model.safetensors").exists() == stays
    assert not list((tmp_path / "out").glob(".*"))


def test_a_merge_that_is_ended_leaves_nothing(home, tmp_path, monkeypatch):
    remove = checkpoint.remove
    monkeypatch.setattr(voxcpm.VoxCPM, "save", lambda *_: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(60))
    monkeypatch.setattr(checkpoint, "remove", lambda path: os.kill(os.getpid(), signal.SIGTERM) or remove(path))  # a second one, in the middle of it
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
    name = name.replace("PID", str(os.getpid()))
    root.mkdir()
    other.write_text("mine")
    (root / name).symlink_to(other)
    wrong = run.claim(root)
    assert str(root / name) in wrong and "Remove the link" in wrong and other.read_text() == "mine"


@pytest.mark.parametrize("name", [".write", "config.yaml.tmp", "config.yaml", ".config.yaml.PID.tmp", "metrics.tmp"])
def test_a_link_that_lies_under_a_name_of_ours_is_not_written_through(tmp_path, name):
    root, other = tmp_path / "run", tmp_path / "other"
    name = name.replace("PID", str(os.getpid()))
    root.mkdir()
    other.write_text("mine")
    (root / name).symlink_to(other)
    (root / "metrics.jsonl").write_text('{"step": 1}\n{"step": 9}\n')
    assert run.claim(root) is None
    configs.dump(infer.Infer(text="hi"), root / "config.yaml")
    run.cut_metrics(root / "metrics.jsonl", 5)
    assert other.read_text() == "mine" and (root / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert not (root / "config.yaml").is_symlink() and "hi" in (root / "config.yaml").read_text()


# ------------------------------------------------------------------------------------------------ 2 and 5: wrong values in other people's files


@pytest.fixture(autouse=True)
def in_time():
    """What hangs is a failure, not a test run without end."""
    def late(number, frame):
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


VALUES = [None, True, -1, 0, 0.5, 3.0, 10**9, 10**400, float("nan"), float("inf"), -0.0, "", "x", "\0", "q" * 10**5, [], [[]], [1], {}, {"a": {}}]


def places(tree, prefix=()):
    """The way to every value of a nested dictionary."""
    out = []
    for key, value in tree.items():
        out.append((*prefix, key))
        if isinstance(value, dict):
            out += places(value, (*prefix, key))
    return out


def replaced(tree, place, value):
    tree = json.loads(json.dumps(tree))
    inner = tree
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return tree


EVERY = 1 if os.environ.get("ALL_VALUES") else 4  # all of them at all places take a minute more


def survives(call, tree):
    """Call it with wrong values at every place, at the next place others: a result or one Invalid of moderate length. Returns how many were refused."""
    refused = 0
    for number, place in enumerate(places(tree)):
        for value in VALUES[number % EVERY::EVERY]:
            try:
                call(replaced(tree, place, value))
            except Invalid as e:
                refused += 1
                assert len(str(e)) < 900 and all(char.isprintable() or char == "\n" for char in str(e)), (place, str(e)[:900])
            except Exception as e:
                raise AssertionError(f"{place} = {repr(value)[:50]}: {type(e).__name__} {str(e)[:200]}") from e
    return refused * EVERY


PEFT = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "use_rslora": False, "init_lora_weights": True,
        "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 8}, "target_modules": ["q_proj"], "bias": "none"}
CONFIG_FILES = {
    "peft": ("adapter_config.json", PEFT),
    "voxcpm": ("lora_config.json", {"base_model": "b", "lora_config": {"r": 4, "alpha": 8, "dropout": 0.1, "enable_lm": True, "target_modules_lm": ["q_proj"]}}),
    "mlx": ("adapter_config.json", {"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": []}}),
    "moshi": ("config.json", {"lora_rank": 4, "lora_scaling": 2.0}),
}


@pytest.mark.parametrize("kind", CONFIG_FILES)
def test_every_value_of_an_adapter_config_may_be_wrong(tmp_path, kind):
    name, config = CONFIG_FILES[kind]

    def read(tree):
        (tmp_path / name).write_text(json.dumps(tree))
        meaning = adapters._read_settings(tmp_path / name, {}, kind, tmp_path / "w")
        meaning.scale("layers.0.q_proj")
        lora.LoRAConfig(**vars(plain.typed(lora.LoRAConfig, plain.as_record(meaning.settings, name)))).scale

    assert survives(read, config) > 10


def test_every_value_of_a_header_record_may_be_wrong(home, tmp_path):
    model = models.load(home / "base")
    lora.apply_lora_to_model(model, {"r": 2})
    lora.save_lora_weights(model, tmp_path / "a", speakers={"anna": 0})
    weights, config, _ = adapters.locate(tmp_path / "a")
    config.unlink()
    tensors, record = safetensors.torch.load_file(weights), adapters.read_record(weights)

    def read(tree):
        safetensors.torch.save_file(tensors, weights, {"adapter_record": json.dumps(tree)})
        lora.load_lora_weights(model, weights)
        infer.trained_speakers([(weights, 1.0)])

    assert survives(read, record) > 20
    for text in ("[" * 100_000, "1", "null", '{"backbone": ' + "9" * 5000 + "}", "\0"):
        safetensors.torch.save_file(tensors, weights, {"adapter_record": text})
        with pytest.raises(Invalid):
            lora.load_lora_weights(model, weights)


def test_every_value_of_a_voxcpm_config_may_be_wrong(home):
    config = json.loads((home / "base/config.json").read_text())

    def build(tree):
        with torch.device("meta"):
            model = voxcpm.VoxCPM(voxcpm.read_config(plain.as_record(tree, "config.json")))
        model.base_lm.make_rotary("cpu")

    assert survives(build, config) > 100
    read = lambda tree: voxcpm.read_config(voxcpm.as_published(plain.as_record(tree, "config.json")))  # noqa: E731
    assert survives(read, tiny_voxcpm.transformers_config(tiny_voxcpm.config("2", **TINY))) > 100


@pytest.mark.parametrize("content", ["[]", "1", "null", "[" * 10**5, "{", '{"model_type": [], "sampling_rates": 1}'])
@pytest.mark.parametrize("codec", [w2vbert, higgs_codec])
def test_a_bad_config_beside_a_codec_is_one_paragraph(tmp_path, codec, content):
    safetensors_file(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(Invalid):
        codec.load(tmp_path / "model.safetensors")


def test_every_value_of_a_csm_config_may_be_wrong():
    def build(tree):
        with torch.device("meta"):
            csm.CSM(csm.read_config(tree, {}, "config.json"))

    assert survives(build, {**tiny_csm.config(), "codec_config": {}}) > 100
    assert survives(build, {"backbone_flavor": "llama-100M", "decoder_flavor": "llama-100M", "text_vocab_size": 9, "audio_vocab_size": 9, "audio_num_codebooks": 2}) > 20


def shapes_of(tensors):
    return {name: checkpoint.Stored(t.shape, t.dtype, lambda t=t: t) for name, t in tensors.items()}


def bigvgan_reader(tmp_path, monkeypatch):
    folder = test_bigvgan.published(tmp_path / "vocoder")
    stored = checkpoint.read(folder / "bigvgan_generator.pt")
    monkeypatch.setattr(checkpoint, "read", lambda path: stored)

    def read(tree):
        (folder / "config.json").write_text(json.dumps(tree))
        bigvgan.load(folder)

    return read, test_bigvgan.CONFIG


def mimi_reader(*_):
    config = test_mimi.settings()
    stored = shapes_of(test_mimi.weights(config))
    return lambda tree: mimi.load(stored, tree), {key: config[key] for key in config if key in (*mimi.FIXED, *mimi.SIZES, "norm_eps", "num_attention_heads")} | {
        "rope_parameters": {"rope_theta": 10000.0}, "dilation_growth_rate": 2, "rope_theta": 10000.0}


def higgs_codec_reader(*_):
    sizes = test_higgs_codec.SMALL
    stored = checkpoint.fold_weight_norm(shapes_of(test_higgs_codec.weights(**sizes)))
    config = test_higgs_codec.config(sizes["ratios"], semantic_model_config={"conv_stride": [5, 2, 2, 2, 2, 2, 2], "num_attention_heads": 12, "layer_norm_eps": 1e-5, "hidden_act": "gelu"},
                                     strides=[1], block_dilations=[1, 1], acoustic_model_config={"downsampling_ratios": sizes["ratios"], "upsampling_ratios": sizes["ratios"]},
                                     semantic_sample_rate=16000, downsample_factor=320)
    read = ("ratios", "strides", "block_dilations", "sample_rate", "semantic_sample_rate", "downsample_factor", "semantic_model_config", "acoustic_model_config")
    return lambda tree: higgs_codec.build(stored, tree, "the codec"), {key: config[key] for key in read if key in config}


def w2vbert_reader(*_):
    stored = shapes_of(tiny.fill(test_w2vbert.shapes(**test_w2vbert.SMALL)))
    return lambda tree: w2vbert.build(stored, tree, 3, "w2v-BERT"), {**test_w2vbert.CONFIG, "layer_norm_eps": 1e-5, "hidden_act": "silu", "add_adapter": False}


def s2mel_reader(*_):
    stored = shapes_of(test_s2mel.weights())
    stored = checkpoint.fold_weight_norm(stored)
    section = tiny_indextts2.config()["s2mel"] | copy.deepcopy(test_s2mel.SECTION)

    def read(tree):
        s2mel.mel_settings(tree)
        s2mel.config_of(stored, tree)

    read(section)
    return read, section


def indextts2_reader(tmp_path, _):
    folder = tiny_indextts2.write(tmp_path / "base")
    stored = indextts2.tidy(checkpoint.read(folder / "gpt.pth"), "gpt.pth")
    shapes = {name: indextts2.stored_shape(name, t) for name, t in stored.items()}
    config = plain.read_yaml(folder / "config.yaml")

    def read(tree):
        (folder / "config.yaml").write_text(json.dumps(tree))
        if indextts2.recognizes(tree):
            tree = plain.as_record(tree, "config.yaml")
            indextts2.check_version(tree, "config.yaml")
            indextts2.read_config(tree, shapes, "config.yaml")
            indextts2.IndexPlaces(folder, tree, {}).files()

    read(config)
    return read, {key: config[key] for key in config if key not in ("s2mel", "semantic_codec", "vocoder")} | {"s2mel": {}, "semantic_codec": {}}


def higgs_reader(*_):
    config = tiny_higgs.config("original")
    shapes = {name: t.shape for name, t in tiny_higgs.weights(config).items()}
    return lambda tree: higgs.recognizes(tree) and higgs.read_config(tree, shapes, "config.json"), config


@pytest.mark.parametrize("reader", [mimi_reader, bigvgan_reader, higgs_codec_reader, w2vbert_reader, s2mel_reader, indextts2_reader, higgs_reader])
def test_every_value_of_a_further_config_may_be_wrong(tmp_path, monkeypatch, reader):
    read, config = reader(tmp_path, monkeypatch)
    read(json.loads(json.dumps(config)))
    assert survives(read, config) > 20


def test_every_value_of_a_tokenizer_may_be_wrong():
    steps = {"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "_"},
             "pre_tokenizer": {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": True},
             "decoder": {"type": "Strip", "content": " ", "start": 1, "stop": 0},
             "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "a"}}, {"Sequence": {"id": "A"}}], "special_tokens": {"a": {"id": "a", "ids": [0], "tokens": ["a"]}}}}
    byte_level = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]},
                  "normalizer": {"type": "Prepend", "prepend": "_"}, "decoder": {"type": "ByteLevel"}}
    bpe = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"], "unk_token": "a", "byte_fallback": False, "fuse_unk": False, "ignore_merges": False, "dropout": None}
    added = {"id": 3, "content": "<s>", "special": True, "normalized": False, "single_word": False, "lstrip": False, "rstrip": False}

    def use(tree):
        tokenizer = Tokenizer(tree)
        tokenizer.decode(tokenizer.encode("ab <s> ba", template=True))

    assert survives(use, {"model": bpe, "added_tokens": [added], **steps}) > 100
    assert survives(use, {"model": bpe, "added_tokens": [], **byte_level}) > 50
    assert survives(lambda token: use({"model": bpe, "added_tokens": [token]}), added) > 50
    assert survives(lambda tree: use({"model": bpe, "pre_tokenizer": tree["p"]}), {"p": byte_level["pre_tokenizer"]["pretokenizers"][0]}) > 10


@pytest.mark.parametrize("ids", [[-1], [0.5], ["a"], [None], [10**30]])
def test_ids_are_whole_numbers_of_the_table(ids):
    with pytest.raises(Invalid):
        Tokenizer({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}).decode(ids)


def test_an_id_beyond_the_table_is_named(home, tmp_path):
    with pytest.raises(Invalid, match="table has 9 rows"):
        Tokenizer({"model": {"type": "BPE", "vocab": {"a": 0, "b": 9}, "merges": []}}, 9).encode("ab")
    shutil.copytree(home / "base", tmp_path / "base")
    spec = json.loads((tmp_path / "base/tokenizer.json").read_text())
    spec["added_tokens"].append({"id": 10**9, "content": "hello", "special": False, "normalized": False, "single_word": False, "lstrip": False, "rstrip": False})
    (tmp_path / "base/tokenizer.json").write_text(json.dumps(spec))
    code, _, said = here("infer", ("--ckpt_dir", tmp_path / "base", "--text", "hello", "--output", tmp_path / "o.wav"))
    assert code == 1 and "gives the id 1000000000" in said and "Traceback" not in said


@pytest.mark.parametrize("tiny, rows", [(tiny_csm, lambda c: c.text_vocab_size), (tiny_higgs, lambda c: c.vocab_size)])
def test_every_backbone_tells_its_tokenizer_how_many_rows_it_has(tmp_path, tiny, rows):
    tiny.write(tmp_path / "base")
    model = models.load(tmp_path / "base")
    assert model.tokenizer.rows == rows(model.config) > 60


@pytest.mark.parametrize("steps", [
    [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 60,
    [{"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 10**6}] * 3,
    [{"type": "Prepend", "prepend": "a" * 10**5}, {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10**5}]])
def test_a_normalizer_that_multiplies_text_is_refused(steps):
    spec = {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "normalizer": {"type": "Sequence", "normalizers": steps}}
    with pytest.raises(Invalid, match="normalizer makes"):
        Tokenizer(spec).encode("a" * 1000)


def test_a_text_of_a_whole_library_is_refused():
    with pytest.raises(Invalid, match="52428800 characters"):
        Tokenizer({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}).encode("a" * (50 << 20))


BAD_JSON = {"deep": "[" * 100_000, "deep object": '{"a":' * 100_000, "digits": '{"a": ' + "1" * 5000 + "}", "cut": '{"a": ', "latin": b'{"a": "\xe9"}', "nothing": "",
            "list": "[]", "text": '"a"', "null": "null", "half a character": b"\xff\xfe{\0}\0{"}


@pytest.mark.parametrize("content", BAD_JSON.values(), ids=BAD_JSON)
@pytest.mark.parametrize("name", ["base/config.json", "base/tokenizer.json", "adapter/lora_config.json"])
def test_bad_json_of_a_checkpoint_is_one_paragraph(home, tmp_path, name, content):
    shutil.copytree(home, tmp_path / "h")
    (tmp_path / "h" / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    code, _, said = here("infer", ("--ckpt_dir", tmp_path / "h/base", "--lora", tmp_path / "h/adapter", "--text", "a", "--output", tmp_path / "o.wav"))
    assert code == 1 and Path(name).name in said and "Traceback" not in said and len(said) < 1500, said


@pytest.mark.parametrize("kind", ["pipe", "folder", "huge", "loop"])
@pytest.mark.parametrize("name", ["base/config.json", "base/tokenizer.json", "base/model.safetensors", "adapter/lora_config.json"])
def test_what_is_no_file_is_not_opened(home, tmp_path, name, kind):
    shutil.copytree(home, tmp_path / "h")
    path = tmp_path / "h" / name
    path.unlink()
    {"pipe": lambda: os.mkfifo(path), "folder": path.mkdir, "loop": lambda: path.symlink_to(path), "huge": lambda: (path.touch(), os.truncate(path, 1 << 40))}[kind]()
    code, _, said = here("infer", ("--ckpt_dir", tmp_path / "h/base", "--lora", tmp_path / "h/adapter", "--text", "a", "--output", tmp_path / "o.wav"))
    assert code in (1, 2) and "Traceback" not in said and len(said) < 1500, said


YAMLS = ["a: [", "!!python/object/apply:os.system ['true']", "[1, 2]", "a: &a [*a]", "{" * 5000, "? [1]\n: 2", "\0", "a: " + "9" * 5000, "x: 2001-99-99", "a: *b", "- " * 3000]


@pytest.mark.parametrize("text", YAMLS, ids=range(len(YAMLS)))
def test_a_bad_config_yaml_of_a_checkpoint_is_one_paragraph(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(Invalid) as e:
        models.find(tmp_path)
    assert len(str(e.value)) < 900


INDEXES = [{"weight_map": None}, {"weight_map": []}, {"weight_map": {"a": 1}}, {"weight_map": {"a": "m.index.json"}}, {"weight_map": {"a": "\0"}}, {}, [],
           {"weight_map": {"a": "none.safetensors"}}, {"weight_map": {"a": "../../../etc"}}, {"weight_map": {"a": ""}}]


@pytest.mark.parametrize("content", INDEXES, ids=str)
def test_a_bad_weight_map_is_one_paragraph(tmp_path, content):
    (tmp_path / "m.index.json").write_text(json.dumps(content))
    with pytest.raises(Invalid):
        checkpoint.read(tmp_path / "m.index.json")


def knot():
    state = {}
    state["model"] = state
    return state


def long_knot():
    state = {"a": {}}
    state["a"]["b"] = state["a"]
    return {"net": {"state_dict": state}}


@pytest.mark.parametrize("state", [knot(), long_knot(), {0: torch.ones(1)}, {"a": None}, {}, [], torch.ones(2), {"model": {"model": {}}}, {("a",): torch.ones(1)}], ids=range(9))
def test_a_pickle_of_another_form_is_one_paragraph(tmp_path, state):
    torch.save(state, tmp_path / "m.pth")
    with pytest.raises(Invalid) as e:
        checkpoint.read(tmp_path / "m.pth")
    assert len(str(e.value)) < 600


def test_the_advice_of_torch_to_open_it_all_the_same_is_not_passed_on(tmp_path):
    torch.save({"a": Path("x")}, tmp_path / "m.pth")
    with pytest.raises(Invalid, match="beside tensors") as e:
        checkpoint.read(tmp_path / "m.pth")
    assert "weights_only" not in str(e.value).lower() and "Weights only" not in str(e.value)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool, torch.uint8])
def test_weights_of_another_kind_are_refused(tmp_path, dtype):
    safetensors.torch.save_file({"weight": torch.ones(2, 2).to(dtype), "bias": torch.ones(2)}, tmp_path / "m.safetensors")
    with torch.device("meta"):
        model = torch.nn.Linear(2, 2)
    with pytest.raises(Invalid, match="weight is torch"):
        checkpoint.fill(model, checkpoint.read(tmp_path / "m.safetensors"))


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**62, 2**64 - 1])
def test_the_length_of_a_header_is_not_believed(tmp_path, length):
    (tmp_path / "m.safetensors").write_bytes(length.to_bytes(8, "little") + b'{"a": 1}')
    with pytest.raises(Invalid):
        checkpoint.read(tmp_path / "m.safetensors")


def sealed(index):
    """The text of a step index with a right checksum."""
    text = json.dumps({**index, "checksum": checkpoint.NO_SUM})
    return text.replace(checkpoint.NO_SUM, f"{zlib.crc32(text.encode()):08x}")


def test_every_value_of_a_sealed_step_index_may_be_wrong(tmp_path):
    folder = tmp_path / "step_0000001"
    folder.mkdir()
    (folder / "w").write_bytes(b"w")
    index = {"files": {"w": {"bytes": 1, "crc32": zlib.crc32(b"w")}}, **{k: v for k, v in run.Progress().index().items()}}
    index["best"] = [1.0, 2]

    def read(tree):
        (folder / checkpoint.INDEX).write_text(sealed(tree))
        wrong = checkpoint.check_step(folder)
        checkpoint.check_file(folder / "w")
        if wrong is None:
            run.find(tmp_path, "", lambda *_: None)
        else:
            raise Invalid(wrong)

    read(index)
    assert survives(read, index) > 50
    for text in BAD_JSON.values():
        (folder / checkpoint.INDEX).write_bytes(text if isinstance(text, bytes) else text.encode())
        assert checkpoint.check_step(folder) and checkpoint.newest_step(tmp_path, lambda text: None) is None


HOSTILE = ["(a+)+$", "(a|a)*$", "(a|ab)+c", "((a*)*)*", "(?:a?){40}a{40}", "a?" * 30 + "a" * 30, ".*" * 12 + "x", "(.*a){12}", r"(\w+\s?)+$", "([a-z]+)*!", "(a{1,9}){1,9}{1,9}b",
           "(?P<x>a+)+b", "(a" * 500, "[", "(?<=a", "a" * 10**6, "(a+)*?b", "(?:(?:a|b)|c+)*d", r"\1(a)", "*", "a**", "(" * 5000 + ")" * 5000]


@pytest.mark.parametrize("pattern", HOSTILE, ids=range(len(HOSTILE)))
def test_a_pattern_that_could_take_for_ever_is_refused(pattern):
    try:
        compiled = plain.pattern_of(pattern, "somewhere")
    except Invalid as e:
        assert "somewhere" in str(e) and len(str(e)) < 500
    else:
        began = time.process_time()
        compiled.fullmatch("a" * 60)
        assert time.process_time() - began < 30


@pytest.mark.parametrize("pattern", [r"backbone\.layers\.\d+\.(self_attn|mlp)\..*_proj", r".*(q|k|v|o)_proj", r"layers\.([0-9]|1[0-5])\..*", r"(?:.*?(?:language|text).*?(?:attn|mlp).*?(?:q_proj|v_proj).*?)",
                                     r"(.*\.)?(q_proj)", "decoder.3"])
def test_patterns_that_people_write_are_taken(pattern):
    assert plain.pattern_of(pattern, "").pattern == pattern


# ------------------------------------------------------------------------------------------------ 4, 6, 7, 9


def test_a_full_disk_of_tensorboard_is_a_warning(tmp_path, monkeypatch, capsys):
    class Full:
        def __init__(self, *_, **__):
            pass

        def __getattr__(self, name):
            def fail(*_, **__):
                raise OSError(errno.ENOSPC, "No space left on device")
            return fail

    import torch.utils.tensorboard as board
    monkeypatch.setattr(board, "SummaryWriter", Full)
    log = run.Log("info", 0)
    log.open(tmp_path, "", 0)
    for step in range(3):
        log.numbers("train", step, {"loss": 1.0})
    log.show("add_image", "a", None, 1)
    log.close()
    assert capsys.readouterr().err.count("No space left on device); going on without") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    monkeypatch.setattr(board, "SummaryWriter", lambda *_, **__: Full().anything())
    log = run.Log("info", 0)
    log.open(tmp_path, "", 0)
    log.numbers("train", 3, {"loss": 1.0})
    log.close()


NASTY = ["a\n2026-01-01 00:00:00 error forged", "\x1b[2J\x1b]0;title\x07", "a\rb", "\u202egnp.exe", "\udce9", "x" * 10**5, "\x9b31m"]


@pytest.mark.parametrize("name", NASTY, ids=range(len(NASTY)))
def test_no_name_of_others_rules_the_terminal_or_forges_a_line(tmp_path, name, capsys):
    log = run.Log("info", 0)
    log.file = open(tmp_path / "train.log", "w", encoding="utf-8")
    log.say(f"dropped {name}")
    for text in (capsys.readouterr().err, (tmp_path / "train.log").read_text(encoding="utf-8")):
        assert all(char.isprintable() or char == "\n" for char in text) and len(text) < 5000
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert not any(line.startswith("2026-01-01 00:00:00") for line in lines)
    with pytest.raises(SystemExit):
        configs.run(lambda: (_ for _ in ()).throw(Invalid(f"no file at {name}")))
    assert all(char.isprintable() or char == "\n" for char in capsys.readouterr().err)
    shown = plain.shown(name)
    assert shown.isprintable() and len(shown) <= 5 * plain.SHOWN and cache_part.name_of({"id": name}).isprintable()


def test_tensor_names_are_shown_without_control_characters(tmp_path):
    safetensors.torch.save_file({f"{name[:200]}{i}".encode("utf-8", "replace").decode(): torch.ones(1) for i, name in enumerate(NASTY)}, tmp_path / "m.safetensors")
    with torch.device("meta"):
        model = torch.nn.Linear(2, 2)
    with pytest.raises(Invalid) as e:
        checkpoint.fill(model, checkpoint.read(tmp_path / "m.safetensors"))
    assert str(e.value).isprintable() and len(str(e.value)) < 1600


FLAGS = [("train", ["--learning_rate", "1e308"]), ("train", ["--learning_rate", "1e300"]), ("train", ["--batch_size", "1" + "0" * 400]), ("train", ["--save_path", "a\0b"]),
         ("train", ["--grad_accum_steps", "9" * 5000]), ("train", ["--grad_accum_steps", "1000000000"]), ("train", ["--num_workers", "1000000000"]), ("train", ["--batch_size", "1000000000"]), ("infer", ["--text", "a", "--ckpt_dir", "x\0y"]), ("infer", ["--text", "a", "--ckpt_dir", "x", "--output", "x\0.wav"]),
         ("infer", ["--text", "a", "--ckpt_dir", "x", "--output", "x.wav/"]), ("infer", ["--text", "a", "--ckpt_dir", "x", "--output", "x\x1b.wav"]), ("infer", ["--text", "  ", "--ckpt_dir", "x"]),
         ("infer", ["--text", "a", "--ckpt_dir", "x", "--max_audio_length_ms", "1" + "0" * 400]), ("merge_lora", ["--lora", "a\0b", "--output_dir", "o"]), ("merge_lora", ["--lora", "a", "--output_dir", "o\0"])]


@pytest.mark.parametrize("script, flags", FLAGS, ids=range(len(FLAGS)))
def test_values_that_no_flag_can_mean_are_wrong_use(tmp_path, monkeypatch, script, flags):
    monkeypatch.chdir(tmp_path)
    code, _, said = here(script, flags)
    assert code == 2 and "Traceback" not in said and len(said) < 900 and "\0" not in said, (code, said[:500])


LINES = ['{"text": "  "}', '{"text": "\\ufeff\\u0007 "}', '{"text": "' + "a" * (1 << 20) + 'b"}', '{"text": "a", "output": "x.wav/"}', '{"text": "a", "output": "x\\u0000.wav"}', '{"text": "a", "output": "x\\n.wav"}', '{"text": 1}', '{"text": "a", "seed": 1e300}', '{"text": "a", "seed": ' + "1" * 5000 + "}",
         "[" * 100_000, '{"text": "a", "prompt_audio": "\\u0000", "prompt_text": "b"}', '{"text": "a", "speaker": {}}', '{"text": "a", "context": 3}', '{"text": "a", "context": [[]]}', '{"text": "\\u001b"}', '{"text": ["a"]}', "nothing"]


@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
def test_a_line_that_cannot_be_spoken_is_named(tmp_path, monkeypatch, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text('{"text": "good"}\n' + line)
    code, _, said = here("infer", ("--ckpt_dir", "none", "--input", "in.jsonl", "--output_dir", "o"))
    assert "Traceback" not in said and len(said) < 900 and (code == 2 and "line 2" in said or "speaker" in line), said[:500]


def test_weights_of_a_full_step_are_checked_once_when_they_are_loaded(tmp_path, monkeypatch):
    def write(folder):
        safetensors.torch.save_file({"w": torch.ones(100)}, folder / "model.safetensors")

    step = checkpoint.write_step(tmp_path, 1, write, {"step": 1})
    calls, checksum = [], checkpoint.checksum
    monkeypatch.setattr(checkpoint, "checksum", lambda path: calls.append(path) or checksum(path))
    for _ in range(3):
        checkpoint.read(step / "model.safetensors")
    assert len(calls) == 1
    data = bytearray((step / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (step / "model.safetensors").write_bytes(data)
    with pytest.raises(Invalid, match="checksum.*earlier step"):
        checkpoint.read(step / "model.safetensors")


@pytest.mark.parametrize("line", ["[" * 100_000, '{"step": 1e400}', '{"step": ' + "9" * 5000 + "}", '{"step": null}', "[1]", "", '{"step": "1"}', '{"step": true}'])
def test_a_damaged_line_of_metrics_has_no_step(line):
    assert run.step_of(line) == -1


@pytest.mark.parametrize("error, said", [(PermissionError(13, "Permission denied", "a\x1b/b"), "a\\x1b/b: Permission denied\n"), (OSError(28, "No space left on device"), "a file: No space left on device\n")])
def test_what_cannot_be_written_is_one_line_of_every_script(capsys, error, said):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        configs.run(main)
    assert ended.value.code == 1 and capsys.readouterr().err == said


REPORTS = ["[" * 100_000, "{", "[]", '{"columns": 1}', '{"columns": [1, null, [], {}]}'] + [
    json.dumps({"columns": [{**dataclasses.asdict(validate.Column("a", key="k")), name: value}]})
    for name, value in (("cells", 11), ("cells", [1]), ("cells", [{"file": 1}]), ("cells", [{"file": "a\0b"}]), ("cells", [{"file": "none.flac"}]), ("numbers", {"a": "b"}), ("groups", 1), ("notes", [1]), ("key", 1), ("key", ""))]


@pytest.mark.parametrize("text", REPORTS, ids=range(len(REPORTS)))
def test_a_damaged_report_is_made_anew_or_refused(tmp_path, text):
    (tmp_path / "report.json").write_text(text)
    try:
        assert validate.earlier_columns(validate.Validate(output_dir=str(tmp_path))) == {}
    except (Invalid, configs.Usage) as e:
        assert "report.json" in str(e)
    (tmp_path / checkpoint.INDEX).write_text(text)
    assert validate.step_of(tmp_path / "step_0000007") == 7


@pytest.mark.parametrize("script, flags", [("train", ["pipe"]), ("infer", ["--text", "a", "--config", "pipe"]), ("infer", ["--text", "a", "--ckpt_dir", "x", "--lora", "a:1e308"]),
                                           ("infer", ["--text", "a", "--ckpt_dir", "x", "--lora", "a:-1e7"]), ("merge_lora", ["--lora", "a:nan", "--output_dir", "o"])])
def test_neither_a_pipe_nor_a_strength_without_measure_is_taken(tmp_path, monkeypatch, script, flags):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    code, _, said = here(script, flags)
    assert code == 2 and ("is no file" in said or "the strength is" in said)


def test_ids_speakers_and_keys_of_others_forge_no_line_of_a_training(home, tmp_path):
    name = "\x1b[2J\n2026-01-01 00:00:00 error forged\x9b31m"
    lines = [json.dumps({"id": f"{n}{name}", "audio": str(tone(tmp_path / f"{n}.wav", 0.5 + n, 200 + 20 * n)), "text": f"number {n}", "speaker": f"{n}{name}", name: 1}) for n in range(3)]
    put(tmp_path / "m.jsonl", "\n".join(lines))
    flags = ("--num_iters", 1, "--gate", "off", "--val_samples", 0, "--num_workers", 0, "--lora.r", 2, "--max_length", 16, "--debug", "true")
    ended = start("train", ("--pretrained_path", home / "base", "--train_manifest", "m.jsonl", "--save_path", "run", *flags), tmp_path)
    assert ended.wait() == 0, ended.said
    for text in (ended.said, (tmp_path / "run/train.log").read_text()):
        assert "forged" in text and all(char.isprintable() or char == "\n" for char in text)
        assert not any(line.startswith("2026-01-01 00:00:00") for line in text.splitlines())


def test_a_tensor_name_in_an_adapter_forges_no_line(home, tmp_path):
    shutil.copytree(home / "adapter", tmp_path / "a")
    weights = next((tmp_path / "a").glob("*.safetensors"))
    safetensors.torch.save_file({**safetensors.torch.load_file(weights), "x\x1b[2J\ndone: all good": torch.zeros(1)}, weights)
    for script, *flags in (("infer", "--text", "a", "--output", tmp_path / "o.wav"), ("merge_lora", "--output_dir", tmp_path / "m")):
        code, _, said = here(script, ("--ckpt_dir", home / "base", "--lora", tmp_path / "a", *flags))
        assert code == 1 and "\\ndone" in said and not any(line.startswith("done") for line in said.splitlines()) and "\x1b" not in said


def test_an_earlier_run_on_a_mount_point_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "mine").touch()

    def busy(path, target):
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(Path, "rename", busy)
    with pytest.raises(Invalid, match="cannot be moved aside .Device or resource busy.; choose another"):
        run.set_aside(tmp_path, quiet)
    assert (tmp_path / "mine").exists()


@pytest.mark.parametrize("name", ["a" * 251 + ".wav", "é" * 125 + ".wav", "a.flac"])
def test_a_name_as_long_as_names_may_be_is_written(tmp_path, name):
    audio.write(tmp_path / name, torch.zeros(1600), 16000)
    plain.write_file(tmp_path / (name + "x")[-200:], b"x")
    assert (tmp_path / name).is_file() and not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


def test_a_disk_that_is_full_keeps_no_half_of_a_file(tmp_path, monkeypatch):
    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "f").write_bytes(b"before")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Invalid, match="No space left"):
        plain.write_file(tmp_path / "f", b"after")
    assert os.listdir(tmp_path) == ["f"] and (tmp_path / "f").read_bytes() == b"before"


def test_a_sound_on_a_disk_that_may_only_be_read_costs_that_sound_alone(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(audio.soundfile, "write", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    assert infer.write(infer.Take(str(tmp_path / "a.wav"), torch.zeros(9), "end", None), 16000) is False


@pytest.mark.parametrize("value", ["1001", "1000000000", "-1", "1e300"])
def test_a_solver_of_a_thousand_million_steps_is_wrong_use(home, tmp_path, value):
    code, _, said = here("infer", ("--ckpt_dir", home / "base", "--text", "a", "--inference_timesteps", value, "--output", tmp_path / "o.wav"))
    assert code == 2 and "inference_timesteps" in said and len(said) < 400


@pytest.mark.parametrize("name, stays", [(".f.json.99999999.tmp", False), (".f.json.PID.tmp", True), (".f.json.notes.tmp", True), (".g.json.99999999.tmp", True), ("f.json.99999999.tmp", True)])
def test_the_next_write_removes_what_a_killed_one_left(tmp_path, name, stays):
    name = name.replace("PID", str(os.getppid()))  # somebody else's that runs
    (tmp_path / name).write_text("half")
    os.utime(tmp_path / name, (1, 1))
    plain.write_file(tmp_path / "f.json", b"new")
    assert (tmp_path / name).exists() == stays and (tmp_path / "f.json").read_bytes() == b"new"


LONG = "é" * 125 + ".wav"
GONE = 9_999_999  # no process: Linux counts to 4,194,304


def leave(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text("half")
        os.utime(folder / name, (1, 1))


def test_speaking_removes_what_a_killed_run_was_writing(tmp_path):
    stay = [f".b.wav.{GONE}.tmp", ".a.wav.tmp", f".a.wav.{os.getppid()}.tmp"]
    leave(tmp_path, *stay, f".a.wav.{GONE}.tmp", plain.temporary_name(LONG).replace(str(os.getpid()), str(GONE)))
    infer.make_folders([infer.Request(str(tmp_path / name), {}) for name in ("a.wav", "c.wav", LONG)])
    assert sorted(os.listdir(tmp_path)) == sorted(stay)


def test_every_script_removes_what_a_killed_one_was_writing_and_nothing_else(tmp_path, rows):
    """In the folder of a run, of prepared data, of a comparison: names of ours go, others stay."""
    stay = [f".mine.wav.{GONE}.tmp", f".notes.html.{GONE}.tmp", f".mine.flac.{GONE}.tmp"]
    folders = {"run/samples": [f".step_0000010_0.wav.{GONE}.tmp", f".recording_1.flac.{GONE}.tmp", f".listen.html.{GONE}.tmp"],
               "out/clips": [f".0001_0002.wav.{GONE}.tmp"], "out/cache": [f".facts.json.{GONE}.tmp", f".00001-0123456789ab.safetensors.{GONE}.tmp"],
               "out": [f".{name}.{GONE}.tmp" for name in ("train.jsonl", "val.jsonl", "report.json", "report.html", ".writable")],
               "report": [f".report.json.{GONE}.tmp", f".report.html.{GONE}.tmp"], "report/clips/key": [f".000.flac.{GONE}.tmp"]}
    for folder, names in folders.items():
        leave(tmp_path / folder, *names, *stay)
    run.claim(tmp_path / "run")
    here("prepare_data", ("--input", tmp_path / "m.jsonl", "--output_dir", tmp_path / "out"))
    ClipCache(tmp_path / "out/cache", Model()).add(rows, quiet)
    cfg, column = validate.Validate(output_dir=str(tmp_path / "report")), validate.Column("a", key="key")
    validate.speak(None, column, validate.Plan([], {}, [], None, None, None, None, None), cfg)
    validate.write_report(cfg, [column])
    validate.write_page(cfg, [column], validate.Plan([], {}, [], None, None, None, None, None))
    for folder in folders:
        assert sorted(name for name in os.listdir(tmp_path / folder) if name.endswith(".tmp")) == sorted(stay), folder


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the process to be killed is forked")
def test_two_preparations_share_no_folder_and_a_killed_one_leaves_neither_lock_nor_workers(tmp_path, rows):
    ready, pipe = os.pipe()
    child = os.fork()
    if not child:
        prepare_data.claim(tmp_path / "out")
        pool = prepare_data.processes(2, 1000)
        assert list(pool.map(abs, range(-2, 0))) == [2, 1]
        os.write(pipe, b".")
        signal.pause()
    os.close(pipe)
    assert os.read(ready, 1) == b"."
    flags = ("--input", tmp_path / "m.jsonl", "--output_dir", tmp_path / "out")
    code, _, said = here("prepare_data", flags)
    assert code == 2 and "another prepare_data.py is writing into" in said and os.listdir(tmp_path / "out") == [".lock"]
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert os.read(ready, 1) == b""  # no worker has the pipe open any more
    os.close(ready)
    assert here("prepare_data", flags)[0] == here("prepare_data", flags)[0] == 0


@pytest.mark.parametrize("kind", ["pipe", "link", "folder"])
def test_what_lies_under_the_name_of_a_lock_is_neither_waited_for_nor_changed(tmp_path, kind):
    (tmp_path / "mine").write_text("mine")
    {"pipe": os.mkfifo, "link": lambda path: os.symlink(tmp_path / "mine", path), "folder": os.mkdir}[kind](tmp_path / ".lock")
    assert plain.lock(tmp_path / ".lock") and (tmp_path / "mine").read_text() == "mine"
