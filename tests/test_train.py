"""train.py as a user runs it, on a tiny checkpoint: the same numbers anywhere, interruptible anywhere, honest about its input.

SAVE_KILLS=50 raises the number of runs killed while saving (10), OVERFIT_STEPS=500 the length of the run on two clips (50).
"""
import contextlib
import functools
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import configs
import lora
import models
import train
from models.parts import Invalid, adapters, audio, checkpoint, listen, masters, plain
from models.parts import run as bookkeeping
from tests import tiny_voxcpm
from tests.conftest import ROOT
from tests.running import ranks, start

SMALL = dict(lm_config={"num_hidden_layers": 2}, residual_lm_num_layers=1, encoder_config={"num_layers": 1}, dit_config={"num_layers": 1})
SETTINGS = {"pretrained_path": "base", "train_manifest": "train.jsonl", "batch_size": 2, "num_workers": 1, "warmup_steps": 2, "max_steps": 20,
            "num_iters": 20, "learning_rate": 0.01, "log_interval": 5, "valid_interval": 0, "save_interval": 0, "val_samples": 0, "gate": "off"}
LONG = ("--grad_accum_steps", 3, "--val_manifest", "val.jsonl", "--valid_interval", 4)  # what the runs of 20 steps share
HALVES = {"lora": ("lora", 1), "full": ("full", 1), "two ranks": ("lora", 2)}


def clip(path, seconds, pitch):
    t = torch.arange(int(16000 * seconds)) / 16000
    noise = torch.randn(len(t), generator=torch.Generator().manual_seed(pitch))
    audio.write(path, 0.3 * torch.sin(6.2832 * pitch * t) * torch.cos(9 * t) + 0.05 * noise, 16000)


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a base, 13 clips to train on and 3 to validate on, all of unequal length and already encoded."""
    root = tmp_path_factory.mktemp("train")
    tiny_voxcpm.write(root / "base", "0.5", **SMALL)
    words, rows = "hello there all in a world of war and the other thing".split(), []
    for i in range(16):
        clip(root / f"{i:02d}.wav", 0.3 + 0.08 * (i * 7 % 16), 110 + 13 * i)
        rows.append({"id": f"r{i:02d}", "audio": f"{i:02d}.wav", "text": " ".join(words[i % 5 : i % 5 + 2 + i % 7])})
    jsonl(root / "train.jsonl", rows[:13])
    jsonl(root / "val.jsonl", rows[13:])
    train.ClipCache(root / "cache", models.load(root / "base")).add(train.read_manifest([root / "train.jsonl", root / "val.jsonl"]), lambda _: None)
    for name, section in (("full", ""), ("lora", "lora: {r: 4, alpha: 8, dropout: 0.1}\n")):
        (root / f"{name}.yaml").write_text("".join(f"{k}: {v}\n" for k, v in SETTINGS.items()) + section)
    return root


def go(home, save, *flags, config="lora", world=1, hook=None, code=0):
    """Run train.py to its end and return what it said; with several ranks, what rank 0 said."""
    argv = [f"{config}.yaml", "--save_path", save, *flags]
    runs = ranks(world, "train", argv, home, hook) if world > 1 else [start("train", argv, home, hook=hook)]
    codes = [run.wait() for run in runs]
    assert codes == [code] * world, f"exit codes {codes}, expected {code}\n" + "\n".join(run.said for run in runs)
    assert not any("Traceback" in run.said for run in runs), runs[0].said
    return runs[0].said


def numbers(run, split="train"):
    """The lines of metrics.jsonl of one split."""
    return [line for text in (run / "metrics.jsonl").read_text().splitlines() if (line := json.loads(text))["split"] == split]


def contents(folder):
    """{name: tensor} of all that a step folder holds: weights or adapter, masters, optimizer."""
    out = {}
    for path in folder.glob("*.safetensors"):
        out |= {f"{path.name} {name}": t for name, t in load_file(path).items()}
    saved = torch.load(folder / "optimizer.pth", weights_only=True)
    out |= {f"master {name}": t for name, t in saved["values"].items()} | {f"average {i}": t for i, t in enumerate(saved["average"])}
    return out | {f"optimizer {i} {name}": t for i, state in saved["optimizer"]["state"].items() for name, t in state.items()}


def differing(a, b):
    a, b = contents(a), contents(b)
    assert a.keys() == b.keys() and len(a) > 3
    return [name for name in a if not torch.equal(a[name], b[name])]


def step(run, n):
    return run / f"step_{n:07d}"


def steps_in(run):
    return [int(p.name[5:]) for p in checkpoint.steps(run)]


@pytest.fixture(scope="module")
def straight(home):
    """20 steps at a stretch by kind, each run once."""
    @functools.cache
    def run(kind):
        config, world = HALVES[kind]
        go(home, f"{kind} 20", *LONG, config=config, world=world)
        return home / f"{kind} 20"
    return run


@pytest.fixture(scope="module")
def halfway(home):
    """The first 11 of 20 steps by kind, each run once; tests go on from copies."""
    @functools.cache
    def run(kind):
        config, world = HALVES[kind]
        go(home, f"{kind} 11", *LONG, "--num_iters", 11, config=config, world=world)
        return home / f"{kind} 11"

    def copy(kind, name):
        shutil.copytree(run(kind), home / name, symlinks=True)
        return home / name
    return copy


# ------------------------------------------------------------------------------------------------ resume


@pytest.mark.parametrize("kind", HALVES)
def test_eleven_steps_and_nine_in_a_new_process_are_twenty(home, straight, halfway, kind):
    """Bit for bit: weights or adapter, optimizer, losses, order of rows; accumulation 3, dropout 0.1, validations in between."""
    whole, run = straight(kind), halfway(kind, f"{kind} 11 and 9")
    config, world = HALVES[kind]
    said = go(home, run.name, *LONG, config=config, world=world)
    assert f"going on from {run.name}/step_0000011: 11 steps done" in said and "not those that the run began with" not in said
    assert numbers(run) == numbers(whole) and [line["step"] for line in numbers(run)] == list(range(1, 21))
    assert not differing(step(run, 20), step(whole, 20))
    assert [line["step"] for line in numbers(run, "val")] == [0, 4, 8, 11, 12, 16, 20]
    assert [line for line in numbers(run, "val") if line["step"] != 11] == numbers(whole, "val")
    assert checkpoint.read_json(step(run, 20) / checkpoint.INDEX)["epoch"] > 1  # crossed the borders of epochs


def test_without_the_optimizers_state_the_comparison_fails(home, straight, halfway):
    half = halfway("lora", "forgetful half")
    index = checkpoint.read_json(step(half, 11) / checkpoint.INDEX)

    def write(folder):
        for name in index["files"]:
            shutil.copy(step(half, 11) / name, folder / name)
        saved = torch.load(folder / "optimizer.pth", weights_only=True)
        for state in saved["optimizer"]["state"].values():
            for value in state.values():
                value.zero_()
        torch.save(saved, folder / "optimizer.pth")

    checkpoint.write_step(home / "forgetful", 11, write, {k: v for k, v in index.items() if k not in ("files", "checksum")})
    go(home, "forgetful", *LONG)
    whole = numbers(straight("lora"))[11:]
    assert numbers(home / "forgetful")[0] == whole[0]  # step 12: the weights had come back, only they
    assert all(a["loss/total"] != b["loss/total"] for a, b in zip(numbers(home / "forgetful")[2:], whole[2:]))
    assert differing(step(home / "forgetful", 20), step(straight("lora"), 20))


def test_two_ranks_save_and_one_goes_on(home, straight, halfway):
    run = halfway("two ranks", "two then one")
    said = go(home, run.name, *LONG)
    assert "20 steps of 6 micro-batches (6 per rank)" in said
    for a, b in zip(numbers(run), numbers(straight("two ranks")), strict=True):
        assert a["rows"] == b["rows"] and a["loss/total"] == pytest.approx(b["loss/total"], rel=1e-5), a["step"]


def test_ranks_that_cannot_share_a_step_are_refused(home, halfway):
    run = halfway("lora", "three micro-batches")
    said = go(home, run.name, *LONG, world=2, code=2)
    assert "trained with 3 micro-batches per step, which 2 ranks cannot share evenly; use 1 or 3 ranks" in said


def test_bf16_weights_have_float32_masters_and_resume_exactly(home):
    flags = ("--dtype", "bfloat16", "--learning_rate", 1e-4, "--save_interval", 2, "--max_steps", 4, "--num_iters")
    go(home, "bf16 4", *flags, 4, config="full")
    go(home, "bf16 2", *flags, 2, config="full")
    go(home, "bf16 2", *flags, 4, config="full")
    assert not differing(step(home / "bf16 2", 4), step(home / "bf16 4", 4)) and numbers(home / "bf16 2") == numbers(home / "bf16 4")
    held = contents(step(home / "bf16 4", 4))
    for name, t in held.items():
        assert t.dtype == (torch.bfloat16 if name.startswith("model.safetensors") else torch.float32), name
    steps = [(held[n] - contents(step(home / "bf16 4", 2))[n]).abs().max() for n in held if n.startswith("master ")]
    assert all(s > 0 for s in steps)  # what bf16 alone would have rounded away
    file = held["model.safetensors stop_head.weight"]
    assert torch.equal(file, held["master stop_head.weight"].bfloat16())


AVERAGED = {"lora": ("--lora.b_lr_ratio", 16), "full": ("--dtype", "bfloat16", "--learning_rate", 1e-3)}


@pytest.mark.parametrize("config", AVERAGED)
def test_the_average_is_what_is_saved_and_validated_and_a_run_with_it_resumes_exactly(home, config):
    """With LoRA+ and wsd in one of them, bf16 in the other; the average is computed anew from the values of each step."""
    flags = ("--ema", 0.2, "--schedule", "wsd", "--val_manifest", "val.jsonl", "--valid_interval", 1, "--save_interval", 1, "--max_steps", 4,
             *AVERAGED[config], "--num_iters")
    whole, half = home / f"average {config}", home / f"half an average {config}"
    go(home, whole.name, *flags, 4, config=config)
    for steps in (2, 4):
        go(home, half.name, *flags, steps, config=config)
    assert numbers(half) == numbers(whole) and numbers(half, "val") == numbers(whole, "val") and not differing(step(half, 4), step(whole, 4))
    model = models.load(home / "base", dtype=torch.bfloat16 if config == "full" else torch.float32)
    mean = {"base_lm.layers.0.self_attn.q_proj.lora_B": torch.zeros(())}
    if config == "full":
        mean = {name: model.get_parameter(name).detach().float() for name in ("base_lm.layers.0.self_attn.q_proj.weight", "stop_head.weight")}
    for n in range(1, 5):
        held = contents(step(whole, n))
        for name in mean:
            value = held[f"master {name}"]
            mean[name] = mean[name] + (1 - min(0.2, n / (n + 9))) * (value - mean[name])
            file = next(t for key, t in held.items() if key.endswith(f"safetensors {name}"))
            assert torch.allclose(file.float(), mean[name], rtol=1e-2 if config == "full" else 1e-5, atol=1e-7) and file.dtype == (
                torch.bfloat16 if config == "full" else torch.float32)
            assert n == 1 or not torch.allclose(value, mean[name], rtol=1e-3, atol=1e-7)
    source = step(whole, 4) if config == "full" else home / "base"
    model = models.load(source, dtype=model.dtype)
    if config == "lora":
        lora.load_lora_weights(model, step(whole, 4))
    cfg, cache = flags_of("--batch_size", 2), train.ClipCache(home / "cache", model)
    examples = [cache.get(row) for row in train.read_manifest(home / "val.jsonl")]
    means = train.evaluate(cfg, model, {"val": examples}, {"loss/diff": 1.0, "loss/stop": 1.0}, train.Place(torch.device("cpu"), 0, 1))
    assert means["loss/total"] == numbers(whole, "val")[-1]["loss/total"]


def test_what_the_average_lends_to_the_model_is_given_back_to_the_bit():
    value = torch.nn.Parameter(torch.randn(5).bfloat16())
    masters = train.Masters({"x": value})
    average, before = train.Average(masters, 0.5), value.detach().clone()
    masters.parameters[0].data += 1e-3
    exact = masters.parameters[0].detach().clone()
    masters.publish()
    average.update(9)
    held, published = average.values[0].clone(), value.detach().clone()
    assert torch.allclose(held, before.float() + 5e-4, atol=1e-6)
    with pytest.raises(KeyError), average.acting():
        assert torch.equal(value, held.bfloat16()) and torch.equal(masters.parameters[0], held)
        raise KeyError
    assert torch.equal(masters.parameters[0], exact) and torch.equal(value, published) and torch.equal(average.values[0], held)


def test_b_has_its_own_rate(home):
    """Adam's first step moves every weight that has a gradient by the rate; A has none, since B is zero."""
    flags = ("--num_iters", 1, "--warmup_steps", 0, "--weight_decay", 0, "--learning_rate", 1e-3, "--lora.b_lr_ratio", 16, "--lora.bias")
    go(home, "two rates", *flags)
    held = load_file(step(home / "two rates", 1) / "lora_weights.safetensors")
    for name, t in held.items():
        if not name.endswith("lora_A"):
            rate = 0.016 if name.endswith("lora_B") else 1e-3
            assert (t.abs().max() - rate).abs() < 1e-3 * rate, name
    assert "lora.b_lr_ratio: 16.0 there, 8.0 here" in go(home, "two rates", *flags[:-3], "--lora.b_lr_ratio", 8, "--lora.bias", code=2)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_float32_training_saves_what_it_has_whatever_the_base_was_stored_in(home, stored):
    """On the CPU a bf16 base is trained in float32; a checkpoint rounded back to bf16 would not resume exactly."""
    name = f"base {stored}"
    tiny_voxcpm.write(home / name, "0.5", stored=stored, **SMALL)
    go(home, f"{name} run", "--pretrained_path", name, "--num_iters", 1, config="full")
    assert load_file(step(home / f"{name} run", 1) / "model.safetensors")["stop_head.weight"].dtype == torch.float32


# ------------------------------------------------------------------------------------------------ rows


def flags_of(*argv):
    return configs.parse(train.Train, [str(a) for a in argv])


@pytest.mark.parametrize("how", [("--batch_size", 3), ("--batch_size", 20), ("--batch_tokens", 60)])
@pytest.mark.parametrize("per_step", [1, 2, 5])
def test_every_row_comes_exactly_once_per_epoch(how, per_step):
    """Any number of micro-batches per step, across the borders of epochs, resumed at every step."""
    cfg = flags_of(*how)
    lengths = [random.Random(i).randint(5, 40) for i in range(67)]
    order, seen = train.Order(lengths, cfg), []
    while order.epoch < 4:
        order = train.Order(lengths, cfg, order.epoch, order.position)  # what a new process makes of the saved numbers
        seen += order.take(per_step)
    for epoch in range(3):
        assert sorted(i for e, rows in seen if e == epoch for i in rows) == list(range(67))
    assert [rows for e, rows in seen if e == 0] != [rows for e, rows in seen if e == 1]
    one, other = train.Order(lengths, cfg), train.Order(lengths, cfg)
    assert [one.take(1)[0] for _ in range(per_step * 4)] == [m for _ in range(4) for m in other.take(per_step)]
    if cfg.batch_tokens:
        assert all(len(rows) * max(lengths[i] for i in rows) <= 60 for _, rows in seen)
        assert sum(len(rows) * max(lengths[i] for i in rows) for e, rows in seen if e == 0) < 1.3 * sum(lengths)  # of like length


def test_a_share_of_each_epoch_is_drawn_from_the_seed():
    """60 clips in full; a fifth of an epoch from 40 others, and a tenth from three, which come often then."""
    cfg, pools = flags_of("--batch_size", 4), [train.Pool(0.2, list(range(60, 100))), train.Pool(0.1, [100, 101, 102])]
    lengths, order, seen = [10] * 103, train.Order([10] * 103, flags_of("--batch_size", 4), pools=pools), []
    while order.epoch < 8:
        order = train.Order(lengths, cfg, order.epoch, order.position, pools)
        seen += order.take(3)
    epochs = [[i for e, clips in seen if e == epoch for i in clips] for epoch in range(7)]
    for clips in epochs:
        drawn = [i for i in clips if 60 <= i < 100]
        assert sorted(i for i in clips if i < 60) == list(range(60)) and len(drawn) == 17 and len(clips) == 86
    few, drawn = [i for clips in epochs for i in clips if i >= 100], [i for clips in epochs for i in clips if 60 <= i < 100]
    assert sorted(map(few.count, (100, 101, 102))) == [21, 21, 21]
    assert {drawn.count(i) for i in range(60, 100)} == {2, 3}  # 119 of 40: none is left out, none preferred
    assert len({tuple(sorted(clips)) for clips in epochs}) == 7
    other = train.clips_of_epoch(103, flags_of("--seed", 1), 0, pools)
    assert sorted(other) != sorted(epochs[0]) and sorted(train.clips_of_epoch(103, cfg, 0, pools)) == sorted(epochs[0])
    assert train.clips_of_epoch(5, cfg, 0, ()) == [0, 1, 2, 3, 4]


def test_weighted_files_train_alike_on_other_ranks_and_each_has_its_validation(home):
    """Nine rows of one file and a share of four; two ranks go on from where one stopped; the total is that of all rows together."""
    rows = [json.loads(line) for line in (home / "train.jsonl").read_text().splitlines()]
    jsonl(home / "voice.jsonl", rows[:9])
    jsonl(home / "replay@.5.jsonl", rows[9:])  # an @ in a name is no share
    flags = ("--train_manifest", "voice.jsonl", "replay@.5.jsonl@0.25", "--batch_size", 1, "--max_steps", 8)
    known = ("--val_manifest", "val.jsonl", "replay@.5.jsonl")
    said = go(home, "weighted", *flags, *known, "--grad_accum_steps", 4, "--num_iters", 4, "--save_interval", 2)
    assert "clips of an epoch: 9 of voice.jsonl, 3 of replay@.5.jsonl" in said and "4 steps of 4 micro-batches (4 per rank), 12 micro-batches" in said
    whole = numbers(home / "weighted")
    first = [row for line in whole[:3] for row in line["rows"]]
    assert {f"r{i:02d}" for i in range(9)} < set(first) and len(first) == len(set(first)) == 12
    shutil.copytree(home / "weighted", home / "weighted on two", symlinks=True)
    shutil.rmtree(step(home / "weighted on two", 4))
    go(home, "weighted on two", *flags, "--grad_accum_steps", 4, "--num_iters", 4, world=2)
    for a, b in zip(numbers(home / "weighted on two"), whole, strict=True):
        assert a["rows"] == b["rows"] and a["loss/total"] == pytest.approx(b["loss/total"], rel=1e-5)
    line = numbers(home / "weighted", "val")[0]
    counts = {"val": 3, "replay@.5": 4}
    stop = sum(counts[name] * line[f"{name}/metric/stop_frame_error"] for name in counts) / 7
    assert line["metric/stop_frame_error"] == pytest.approx(stop) and line["val/loss/total"] != line["replay@.5/loss/total"]
    assert f"| val {line['val/loss/total']:.4f}, replay@.5 {line['replay@.5/loss/total']:.4f}" in said


def test_the_log_shows_every_row_once_per_epoch(straight):
    for kind in ("lora", "two ranks"):
        rows = [row for line in numbers(straight(kind)) for row in line["rows"]]
        whole = len(rows) // 13
        assert whole >= 7
        for e in range(whole):
            assert len(set(rows[13 * e : 13 * e + 13])) == 13


def test_seven_rows_on_two_ranks_are_all_seen(home):
    rows = (home / "train.jsonl").read_text().splitlines()[:7]
    (home / "seven.jsonl").write_text("\n".join(rows))
    go(home, "seven", "--train_manifest", "seven.jsonl", "--batch_size", 1, "--num_iters", 7, world=2)
    seen = [row for line in numbers(home / "seven") for row in line["rows"]]
    assert len(set(seen[:7])) == len(set(seen[7:])) == 7 and len(seen) == 14


def test_fewer_clips_than_a_batch_work(home):
    """Two clips in a batch of 16, four micro-batches to the step; and clips of several speakers draw a warning."""
    rows = [json.loads(line) for line in (home / "train.jsonl").read_text().splitlines()[:2]]
    jsonl(home / "two.jsonl", [{**row, "speaker": who} for row, who in zip(rows, ("Ann", "Bob"))])
    said = go(home, "two", "--train_manifest", "two.jsonl", "--batch_size", 16, "--grad_accum_steps", 4, "--num_iters", 2)
    assert [sorted(line["rows"]) for line in numbers(home / "two")] == [["r00"] * 4 + ["r01"] * 4] * 2
    assert "2 speakers (Ann, Bob) and this backbone is not told who speaks" in said and "Train one adapter per speaker" in said


# ------------------------------------------------------------------------------------------------ gradients


@pytest.fixture(scope="module")
def gradients(home):
    """gradients(name, flags): what one SGD step took from each weight, divided by the rate."""
    jsonl(home / "eight.jsonl", [json.loads(line) for line in (home / "train.jsonl").read_text().splitlines()[:8]])
    rate, before = 1e4, load_file(home / "base" / "model.safetensors") if (home / "base" / "model.safetensors").exists() else None
    before = before or torch.load(home / "base" / "pytorch_model.bin", weights_only=True)

    @functools.cache
    def run(batch_size, accum, world=1, *flags):
        name = f"sgd {batch_size} {accum} {world} {' '.join(map(str, flags))}".replace("/", "")
        go(home, name, "--train_manifest", "eight.jsonl", "--batch_size", batch_size, "--grad_accum_steps", accum, "--optimizer", "sgd", "--num_iters",
           1, "--warmup_steps", 0, "--weight_decay", 0, "--learning_rate", rate, *flags, config="full", world=world)
        after = load_file(step(home / name, 1) / "model.safetensors")
        return {k: (before[k] - after[k]) / rate for k in after}, numbers(home / name)[0]
    return run


def gap(a, b):
    scale = max(v.abs().max() for v in b.values())
    return max(((a[k] - b[k]).abs().max() / scale).item() for k in b)


def test_micro_batches_and_ranks_do_not_change_the_gradient(gradients):
    """One batch of 8, four of 2, two ranks with 4: equal to 1e-5 with clips of unequal length."""
    (whole, line) = gradients(8, 1)
    assert all(v.abs().max() > 0 for k, v in whole.items() if "delta_time" not in k)
    for other, other_line in (gradients(2, 4), gradients(4, 1, 2)):
        assert gap(other, whole) < 1e-5
        assert sorted(other_line["rows"]) == sorted(line["rows"]) and other_line["loss/total"] == pytest.approx(line["loss/total"], rel=1e-5)
        assert other_line["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-5)


def test_recomputing_activations_changes_no_gradient(gradients):
    assert gap(gradients(8, 1, 1, "--checkpointing")[0], gradients(8, 1)[0]) < 1e-6


def test_long_gradients_are_cut_to_the_norm(gradients):
    whole, line = gradients(8, 1)
    cut, cut_line = gradients(8, 1, 1, "--max_grad_norm", 0.01)
    assert cut_line["grad_norm"] == line["grad_norm"] > 0.01  # the log has the norm before
    assert gap({k: v * line["grad_norm"] / 0.01 for k, v in cut.items()}, whole) < 1e-4


def test_adam_and_adamw_differ_by_the_decay_only(home):
    """After one step Adam has moved every weight by the rate; AdamW first shrinks it, Adam adds the decay to the gradient."""
    base = torch.load(home / "base" / "pytorch_model.bin", weights_only=True)
    after = {}
    for kind in ("adam", "adamw"):
        go(home, kind, "--optimizer", kind, "--num_iters", 1, "--warmup_steps", 0, "--weight_decay", 0.5, "--learning_rate", 1e-3, config="full")
        after[kind] = load_file(step(home / kind, 1) / "model.safetensors")
    name = "lm_to_dit_proj.weight"
    for kind, shrunk in (("adam", 1.0), ("adamw", 1 - 1e-3 * 0.5)):
        moved = (after[kind][name] - base[name] * shrunk).abs()
        assert (moved - 1e-3).abs().max() < 1e-5, kind


def test_weights_of_the_losses_act(gradients):
    stop_only = gradients(8, 1, 1, "--lambdas.loss/diff", 0)[0]
    assert stop_only["feat_decoder.estimator.out_proj.weight"].abs().max() == 0 < stop_only["stop_head.weight"].abs().max()


def eager_compile():
    """No C++ compiler is needed to see that the compiled layers are those that train."""
    plain = torch.nn.Module.compile
    torch.nn.Module.compile = lambda self: plain(self, backend="eager")


def test_compiled_layers_train_alike(gradients, home):
    name = "compiled"
    said = go(home, name, "--train_manifest", "eight.jsonl", "--batch_size", 8, "--optimizer", "sgd", "--num_iters", 1, "--warmup_steps", 0, "--compile",
              "--weight_decay", 0, "--learning_rate", 1e4, config="full", hook=eager_compile)
    assert "layers are compiled as the first validation and the first step come to them" in said
    assert re.search(r"step 1: \d+\.\d s, compiling included", said)
    assert numbers(home / name)[0]["grad_norm"] == pytest.approx(gradients(8, 1)[1]["grad_norm"], rel=1e-5)


def same_draws():
    """All that collate draws is the same in every step."""
    train.seed_of = lambda *_: 7


def test_dropout_is_drawn_anew_in_every_step(home):
    """The rate is zero after the first update, rows and draws are the same: only dropout can change the loss."""
    rows = (home / "train.jsonl").read_text().splitlines()[:2]
    (home / "pair.jsonl").write_text("\n".join(rows))
    go(home, "dropout", "--train_manifest", "pair.jsonl", "--max_steps", 1, "--num_iters", 5, "--warmup_steps", 0, hook=same_draws)
    assert len({line["loss/total"] for line in numbers(home / "dropout")[1:]}) == 4
    go(home, "no dropout", "--train_manifest", "pair.jsonl", "--max_steps", 1, "--num_iters", 5, "--warmup_steps", 0, "--lora.dropout", 0, hook=same_draws)
    assert len({line["loss/total"] for line in numbers(home / "no dropout")[1:]}) == 1


# ------------------------------------------------------------------------------------------------ schedule, log, validation


def test_the_learning_rate_rises_falls_and_stays_at_zero(straight):
    cfg = flags_of("--learning_rate", 2.0)
    got = [train.learning_rate(cfg, s, 10, 4) for s in range(13)]
    half = [1 + math.cos(math.pi * (s - 4) / 6) for s in range(4, 10)]
    assert got == pytest.approx([0, 0.5, 1.0, 1.5, *half, 0, 0, 0])
    logged = [line["lr"] for line in numbers(straight("lora"))]  # the rate of the update after s completed ones
    assert logged == [train.learning_rate(flags_of("--learning_rate", 0.01), s, 20, 2) for s in range(20)]


SHAPES = {  # of ten steps with four of warm-up, then three after the end
    "linear": [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0, 0, 0],
    "constant": [1] * 9,
    "wsd": [1, 1, 1, 1, 1, 0.5, 0, 0, 0],
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_schedule_has_its_shape_and_says_how_it_ends(name):
    cfg, heard = flags_of("--learning_rate", 2.0, "--schedule", name), Heard()
    assert [train.learning_rate(cfg, s, 10, 4) / 2 for s in range(13)] == pytest.approx([0, 0.25, 0.5, 0.75, *SHAPES[name]])
    train.announce_length(cfg, train.Place(torch.device("cpu"), 0, 1), schedule(), heard)
    assert ("reaches zero at the last" in heard.lines[1]) == (name != "constant")


def test_validation_and_its_samples_do_not_disturb_training(home, straight):
    flags = ("--grad_accum_steps", 3, "--num_iters", 4)
    go(home, "validated", *flags, "--val_manifest", "val.jsonl", "--valid_interval", 1, "--val_samples", 1)
    assert numbers(home / "validated") == numbers(straight("lora"))[:4]  # which validated at 0 and 4 and spoke never
    go(home, "unvalidated", *flags)
    assert numbers(home / "unvalidated") == numbers(home / "validated") and not numbers(home / "unvalidated", "val")
    assert not differing(step(home / "unvalidated", 4), step(home / "validated", 4))
    assert [line["step"] for line in numbers(home / "validated", "val")] == [0, 1, 2, 3, 4]
    made = {f"step_{i:07d}_0.{kind}" for i in range(5) for kind in ("wav", "flac")} | {"recording_0.flac", "listen.html"}
    assert {p.name for p in (home / "validated" / "samples").iterdir()} == made
    shown = EventAccumulator(str(home / "validated" / "logs"), {"scalars": 0, "audio": 0, "images": 0}).Reload().Tags()
    assert {"train/loss/diff", "train/loss/stop", "train/lr", "train/epoch", "train/grad_norm", "val/loss/total"} <= set(shown["scalars"])
    assert set(shown["audio"]) == {"val_sample_0/generated_audio", "val_sample_0/reference_audio"}
    assert shown["images"] == ["val_sample_0/mel_spectrogram"]


def test_validation_is_the_mean_over_the_whole_set_on_any_number_of_ranks(home, straight):
    model = models.load(home / "base")
    cache, sums, counts = train.ClipCache(home / "cache", model), {}, {}
    for row in train.read_manifest(home / "val.jsonl"):
        batch, n = model.collate([cache.get(row)])
        for k, v in model(batch).items():
            sums[k], counts[k] = sums.get(k, 0) + v.item(), counts.get(k, 0) + n[k]
    for kind in ("lora", "two ranks"):
        line = numbers(straight(kind), "val")[0]
        assert line["step"] == 0 and all(line[k] == pytest.approx(sums[k] / counts[k], rel=1e-5) for k in sums)
        assert line["loss/total"] == pytest.approx(line["loss/diff"] + line["loss/stop"], rel=1e-6)


def test_tensorboard_has_each_step_once_after_a_resume(home, halfway):
    run = halfway("lora", "logged twice")
    go(home, run.name, *LONG, "--num_iters", 14)
    shutil.rmtree(step(run, 14))  # as if killed in step 15, after the save at 11
    with open(run / "metrics.jsonl", "a") as f:
        f.write('{"step": 15, "los')
    go(home, run.name, *LONG, "--num_iters", 13)
    assert [line["step"] for line in numbers(run)] == list(range(1, 14))
    events = EventAccumulator(str(run / "logs"), {"scalars": 0}).Reload()
    assert [e.step for e in events.Scalars("train/loss/total")] == list(range(1, 14))
    assert [e.step for e in events.Scalars("val/loss/total")] == [0, 4, 8, 11, 12, 13]


def test_epochs_and_saves_by_epoch(home):
    """13 clips in batches of 2 are 7 micro-batches; 2.5 epochs of 2 per step are 9 steps, and the borders lie in steps 4 and 7."""
    said = go(home, "epochs", "--epochs", 2.5, "--save_epochs", 1, "--grad_accum_steps", 2, "--max_steps", 0)
    assert "epochs 2.5 means 9 steps" in said and steps_in(home / "epochs") == [9, 7, 4]
    assert numbers(home / "epochs")[6]["epoch"] == pytest.approx(2.0)
    assert "9 steps, 0 of them warm-up; the learning rate reaches zero at the last" in said and "(max_steps)" not in said
    short = go(home, "epochs of a recipe", "--epochs", 2.5, "--warmup_steps", 30, "--max_steps", 100)  # a YAML's numbers are for its own length
    assert "18 steps, 1 of them warm-up" in short and numbers(home / "epochs of a recipe")[-1]["lr"] < 1e-3


def test_the_start_says_what_will_happen_and_the_end_what_did(home):
    said = go(home, "told", "--num_iters", 2, "--max_steps", 5, "--max_length", 20)
    for words in ("voxcpm on cpu in float32, 1 rank", "parameters trained", "LoRA: r 4, alpha 8, scale 2, ", " in base_lm.layers",
                  "longer than 20 positions (max_length): r", "2 steps of 1 micro-batches", "reaches zero at step 5", "step 2/2 | loss ",
                  "s audio/s", "ETA", "saved told/step_0000002: ", "done: 2 steps, 0 skipped, peak memory"):
        assert words in said, words
    assert "data: " in said and ", 0.00 h; dropped" in said
    assert "step 2/2 | loss" in (home / "told" / "train.log").read_text()
    assert not go(home, "quiet", "--num_iters", 1, "--max_steps", 0, "--log_level", "error")


def test_hours_come_from_the_headers_where_rows_do_not_tell(home):
    rows = train.read_manifest(home / "train.jsonl")
    wave, rate = audio.read(home / "03.wav", None)
    assert bookkeeping.seconds_of(rows[3]) == pytest.approx(len(wave) / rate) and bookkeeping.seconds_of({**rows[3], "duration": 5.0}) == 5.0
    assert bookkeeping.seconds_of({**rows[3], "start": 0.1, "end": 0.3}) == pytest.approx(0.2)
    assert bookkeeping.seconds_of({"turns": [rows[3], rows[3]]}) == pytest.approx(2 * len(wave) / rate)


# ------------------------------------------------------------------------------------------------ before the first step


def settings_of(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, argv)])
    cfg, notes = train.parse_settings()
    return cfg.lora.alpha, " ".join(notes)


def test_a_rank_without_alpha_keeps_the_scale(home, monkeypatch):
    """From the file, else from the defaults; whoever says alpha, or its root by rslora, gets that."""
    file = home / "lora.yaml"  # r 4, alpha 8
    alpha, note = settings_of(monkeypatch, file, "--lora.r", 64)
    assert alpha == 128 and "lora.r 64 was given without lora.alpha: alpha goes from 8 to 128, so that the scale stays 2" in note
    assert settings_of(monkeypatch, file, "--lora_rank", 2)[0] == 4 and settings_of(monkeypatch, "--lora.r", 64)[0] == 128
    assert settings_of(monkeypatch, file, "--lora", "{r: 64}")[0] == 128
    for flags in (("--lora.r", 64, "--lora.alpha", 8), ("--lora.r", 64, "--lora.rslora"), ("--lora.r", 4), ()):
        assert settings_of(monkeypatch, file, *flags) == (8, "")
    assert settings_of(monkeypatch, file, "--lora.r", 64, "--scaling", 0.5) == (32, "")


def schedule(*flags, per_epoch=10, per_step=1, steps=0):
    return train.schedule_of(flags_of(*flags), bookkeeping.Progress(micro_per_step=per_step, steps=steps), per_epoch)


def test_the_length_and_the_intervals_follow_the_data(home, halfway):
    assert [schedule(per_epoch=n).steps for n in (1, 10, 100, 1000, 5000)] == [20, 200, 1500, 1500, 5000]  # 20 passes, 1500 steps, one pass
    assert schedule(per_epoch=22, per_step=16).steps == 28 and schedule(per_epoch=22, per_step=16).epochs == pytest.approx(20, rel=0.02)
    short = schedule(per_epoch=1)
    assert (short.warmup, short.span, short.validate_every, short.save_every) == (2, 20, 2, 2)
    assert schedule("--num_iters", 7)[5:] == (1, 1) and schedule("--num_iters", 2000)[5:] == (200, 200)
    assert schedule("--valid_interval", 3, "--save_interval", 0)[5:] == (3, 0) and schedule("--save_epochs", 1)[5:] == (20, 0)
    assert schedule("--max_steps", 30).steps == 30 and schedule("--epochs", 2, "--num_iters", 5).steps == 20
    # A run that goes on keeps its length although there is more data; and one that is older than this, what was the default then.
    assert schedule(per_epoch=99, steps=200).steps == 200 and schedule("--epochs", 1, per_epoch=99, steps=200).steps == 99
    run = halfway("lora", "before lengths")
    index = checkpoint.read_json(step(run, 11) / checkpoint.INDEX)
    assert index.pop("steps") == 0  # num_iters was given, so nothing is to be remembered
    with_index(step(run, 11), index)
    assert bookkeeping.Progress.read(step(run, 11)).steps == 2000


@pytest.mark.parametrize("flags, words", [(("--num_iters", 20), "the learning rate reaches 1.9e-05 of 0.0001. Say --warmup_steps 2"), (("--max_steps", 200, "--warmup_ratio", 0.2), ""),
                                          (("--num_iters", 20, "--max_steps", 200, "--warmup_ratio", 0.2), "of 40 steps is no shorter than the run: the learning rate reaches 4.75e-05 of 0.0001")])
def test_a_warm_up_that_outlives_the_run_is_said_with_the_rate_that_it_reaches(flags, words):
    said = []
    log = types.SimpleNamespace(say=lambda text, level="info": said.append(f"{level}: {text}"))
    train.announce_length(flags_of(*flags), types.SimpleNamespace(world=1), schedule(*flags), log)
    found = [line for line in said if "warm-up of" in line]
    assert len(found) == bool(words) and all(line.startswith("warning: ") and words in line for line in found)


def test_a_run_without_a_length_has_the_one_of_its_data_and_names_its_best(home):
    """13 clips in one micro-batch: 20 steps, ten validations after the first, ten checkpoints; `best` is the lowest of them."""
    free = ("--num_iters", 0, "--max_steps", 0, "--valid_interval", "null", "--save_interval", "null", "--val_manifest", "val.jsonl")
    said = go(home, "free", *free, "--batch_size", 13)
    assert "no length is set; for this much data it is 20 steps, 2 of them warm-up" in said and "validation every 2 steps, checkpoint every 2" in said
    assert sorted(steps_in(home / "free")) == list(range(2, 21, 2))
    losses = {line["step"]: line["loss/total"] for line in numbers(home / "free", "val") if line["step"]}
    best = min(losses, key=losses.get)
    assert list(losses) == list(range(2, 21, 2)) and os.readlink(home / "free" / "best") == f"step_{best:07d}"
    assert f"free/best is now step {best}, validation loss {losses[best]:.4f}" in said
    assert "speak:  python infer.py --lora free/latest" in said and "choose: python validate.py --lora free/step_* --manifest val.jsonl" in said
    lora.load_lora_weights(models.load(home / "base"), home / "free" / "best")


def test_best_is_a_text_file_where_links_are_refused_and_goes_with_its_folder(tmp_path, monkeypatch):
    heard = Heard()
    for n in (1, 2):
        (tmp_path / f"step_000000{n}").mkdir()
    bookkeeping.name_best(tmp_path, bookkeeping.Best(), heard.say)
    assert not heard.lines and not (tmp_path / "best").exists()
    bookkeeping.name_best(tmp_path, bookkeeping.Best(0.5, 1), heard.say)
    bookkeeping.name_best(tmp_path, bookkeeping.Best(0.5, 1), heard.say)
    assert len(heard.lines) == 1 and (tmp_path / "best").resolve().name == "step_0000001"

    def refuse(*_):
        raise OSError("not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    for _ in range(2):
        bookkeeping.name_best(tmp_path, bookkeeping.Best(0.4, 2), heard.say)
    assert len(heard.lines) == 2 and (tmp_path / "best").read_text() == "step_0000002"
    shutil.rmtree(tmp_path / "step_0000002")
    bookkeeping.name_best(tmp_path, bookkeeping.Best(0.4, 2), heard.say)
    assert not (tmp_path / "best").exists()


def test_many_epochs_draw_a_warning_with_the_number():
    for steps, warned in ((500, False), (1000, True)):
        heard, cfg = Heard(), flags_of("--num_iters", steps)
        train.announce_length(cfg, train.Place(torch.device("cpu"), 0, 1), schedule("--num_iters", steps), heard)
        assert any("each clip comes 100 times, more than 50" in line for line in heard.lines) == warned, heard.lines


def test_a_dry_run_tells_what_the_run_will_take_and_writes_nothing(home):
    said = go(home, "rehearsed", "--dry_run", "--epochs", 40)
    for words in ("data: 13 clips", "LoRA: r 4, alpha 8, scale 2, ", "epochs 40 means 280 steps", "dry run: the longest micro-batch has 2 clips and ",
                  "peak memory ", "dry run: a step takes ", "the 280 steps 0:", "Nothing was written"):
        assert words in said, words
    assert {p.name for p in (home / "rehearsed").iterdir()} <= {".lock"}
    go(home, "rehearsed", "--num_iters", 1)
    before = {p: p.read_bytes() for p in (home / "rehearsed").rglob("*") if p.is_file()}
    assert "going on from" in go(home, "rehearsed", "--dry_run")
    assert {p: p.read_bytes() for p in (home / "rehearsed").rglob("*") if p.is_file()} == before
    assert "smaller batch_size" in go(home, "rehearsed 2", "--dry_run", hook=out_of_memory, code=1)
    assert "the loss is not finite" in go(home, "rehearsed 3", "--dry_run", hook=poisoned, code=1)


@pytest.mark.parametrize("world", [1, 2])
def test_the_gate_warns_and_can_stop(home, world):
    """The base is a random one, which is no better with the right text. Nothing is begun where it stops, and a run that goes on is not asked again."""
    stopped = go(home, f"gated {world}", "--gate", "stop", world=world, code=1)
    assert "gate: loss/diff of the base is " in stopped and "--gate off" in stopped and not (home / f"gated {world}" / "config.yaml").exists()
    said = go(home, f"gated {world}", "--gate", "warn", "--num_iters", 1, world=world)
    assert "gate: loss " in said and "gate: training all the same; --gate stop would have ended here, --gate off does not look" in said
    assert "done: 1 steps" in said and "gate: " not in go(home, f"gated {world}", "--gate", "warn", "--num_iters", 2, world=world)


def test_two_ranks_tell_an_error_once(home):
    """Before they meet, after they have met, and where one of them fails while the other is in the middle of a sum."""
    cases = {"settings": (("--batch_size", 0), None, "batch_size is 0", 2), "rows": (("--max_length", 3), None, "no clip is left", 1),
             "rank 0": ((), only_rank_0_fails, "the disk is on fire", 1), "rank 1": ((), only_rank_1_fails, "no such number", 1)}
    for name, (flags, hook, words, code) in cases.items():
        both = ranks(2, "train", ["lora.yaml", "--save_path", f"once {name}", "--num_iters", 2, *flags], home, hook)
        codes = [run.wait() for run in both]
        said = both[0].said + both[1].said
        assert said.count(words) == 1 and "Traceback" not in said, (name, said)
        assert code in codes and 0 not in codes, (name, codes)


def test_the_block_that_torchrun_ends_with_has_the_reason(tmp_path, monkeypatch):
    """As torchrun reads it from the file that it names to each rank."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))

    @train.told_once
    def main():
        raise configs.Usage("batch_size is 0\nand more")

    with pytest.raises(configs.Usage):
        main()
    failure = ProcessFailure(0, 1, 2, str(tmp_path / "error.json"))
    assert "traceback : batch_size is 0\n" in ChildFailedError("train", {0: failure}).format_msg() + "\n" and failure.timestamp > 1e9


def only_rank_0_fails():
    def fail(*_):
        raise Invalid("the disk is on fire")

    train.save = fail  # which rank 0 does alone


def only_rank_1_fails():
    reduce = masters.reduce_gradients

    def fail(parameters):
        if os.environ["RANK"] == "1":
            raise Invalid("no such number")
        reduce(parameters)

    masters.reduce_gradients = fail


# ------------------------------------------------------------------------------------------------ checkpoints


def test_save_modes(home):
    """lora: the adapter; full: the merged model; both: both. What is merged loads as a base and equals base plus adapter."""
    flags = ("--num_iters", 4, "--max_steps", 4, "--save_interval", 2, "--save_mode")
    go(home, "mode both", *flags, "both")
    go(home, "mode full", *flags, "full")
    shutil.rmtree(step(home / "mode full", 4))
    go(home, "mode full", *flags, "full")  # resumes from 2: the adapter comes out of optimizer.pth
    both, full = step(home / "mode both", 4), step(home / "mode full", 4)
    assert (both / "model.safetensors").exists() and (both / "lora_weights.safetensors").exists()
    adapter = load_file(both / "lora_weights.safetensors")  # nothing but the adapter, in a file of its size
    assert all(name.endswith((".lora_A", ".lora_B")) for name in adapter)
    assert (both / "lora_weights.safetensors").stat().st_size < 4 * sum(t.numel() for t in adapter.values()) + 200 * len(adapter) + 2000
    assert (full / "model.safetensors").exists() and not (full / "lora_weights.safetensors").exists()
    merged, again = load_file(both / "model.safetensors"), load_file(full / "model.safetensors")
    assert all(torch.equal(merged[k], again[k]) for k in merged) and merged.keys() == again.keys()
    model = models.load(home / "base")
    lora.load_lora_weights(model, both)
    lora.merge_lora_weights(model)
    own = models.load(both).published_state_dict()
    assert all(torch.equal(v, own[k]) for k, v in model.published_state_dict().items())
    assert steps_in(home / "mode both") == [4, 2]  # and none of step 0
    assert os.readlink(home / "mode both" / "latest") == "step_0000004"


def test_what_is_kept_and_that_a_full_run_outlives_the_folder_it_came_from(home):
    """The last 2, every 4th, and the best among those that were saved; codec and tokenizer survive the pruning of their source."""
    flags = ("--save_interval", 1, "--keep_last", 2, "--keep_every", 4, "--val_manifest", "val.jsonl", "--valid_interval", 1, "--num_iters")
    go(home, "kept", *flags, 3, config="full")
    go(home, "kept", *flags, 7, config="full")
    losses = {line["step"]: line["loss/total"] for line in numbers(home / "kept", "val") if line["step"]}
    best = min(losses, key=losses.get)
    assert set(steps_in(home / "kept")) == {7, 6, 4, best}
    assert set(p.name for p in step(home / "kept", 7).iterdir()) == set(p.name for p in step(home / "kept", 4).iterdir())
    models.load(step(home / "kept", 7))


def told_losses():
    """Validation losses at steps 0, 1, 2 ..; the odd ones are the lowest."""
    values = iter([9.0, 1.0, 5.0, 1.0, 6.0, 1.0, 7.0])
    train.evaluate = lambda *_: {"loss/total": next(values)}


def test_the_best_is_one_that_was_saved(home):
    flags = ("--keep_last", 1, "--val_manifest", "val.jsonl", "--valid_interval", 1, "--save_interval", 2, "--num_iters")
    go(home, "best", *flags, 6, hook=told_losses)
    assert steps_in(home / "best") == [6, 2]
    assert checkpoint.read_json(step(home / "best", 6) / checkpoint.INDEX)["best"] == [5.0, 2]


def losses_by_step():
    train.Validation.losses = lambda self, step, steps, epoch: [9.0, 2.0, 5.0, 2.0, 1.0, 3.0, 4.0, 0.0][step]


def test_patience_ends_a_run_and_counts_on_when_it_resumes(home):
    """Two validations in a row that are no better: at step 3; with three it goes to its end."""
    flags = ("--val_manifest", "val.jsonl", "--valid_interval", 1, "--num_iters")
    for steps in (2, 7, 7):  # interrupted between the two that count; and the third time nothing is left to do
        said = go(home, "patient", *flags, steps, "--patience", 2, hook=losses_by_step)
    assert "patience: 2 validations in a row were not below the 2.0000 of step 1, so the run ends at step 3" in said
    assert "done: 3 steps" in said and steps_in(home / "patient") == [3, 2] and len(numbers(home / "patient")) == 3
    said = go(home, "patient", *flags, 7, "--patience", 3, hook=losses_by_step)
    assert "done: 7 steps" in said and "patience" not in said
    nothing = bookkeeping.Progress()
    for loss in (math.inf, math.nan):  # no rows, or nothing but NaN: neither is a loss that could be lower
        nothing.judge(loss)
    assert not nothing.is_out_of(1) and not bookkeeping.Progress(stale=9).is_out_of(0)


def test_a_run_stays_what_it_is_under_its_own_config(home):
    """--overwrite moves aside and is not remembered; config.yaml, given as it is, goes on with the run."""
    (home / "mine").mkdir()
    (home / "mine" / "notes.txt").write_text("precious")
    said = go(home, "mine", "--overwrite", "--num_iters", 1)
    assert "moved the earlier mine to mine.before-1" in said and (home / "mine.before-1" / "notes.txt").read_text() == "precious"
    run = start("train", ["mine/config.yaml", "--num_iters", 2], home)
    assert run.wait() == 0 and "going on from mine/step_0000001" in run.said
    run = start("train", ["mine/config.yaml", "--num_iters", 2], home)
    assert run.wait() == 0 and "done: 2 steps" in run.said  # nothing left to do, nothing done
    assert [line["step"] for line in numbers(home / "mine")] == [1, 2] and steps_in(home / "mine") == [2, 1]


class Heard:
    def __init__(self):
        self.lines = []

    def say(self, text, level="info"):
        self.lines.append(text)


def damage(path, harm):
    data = path.read_bytes()
    if harm == "gone":
        path.unlink()
    elif harm == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        i = random.Random(str(path.name)).randrange(len(data))
        path.write_bytes(data[:i] + bytes([data[i] ^ 4]) + data[i + 1 :])


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_damage_to_any_file_of_a_checkpoint_is_noticed(home, halfway, monkeypatch, kind):
    """Each file cut, gone, or with one bit flipped: train.py names it and takes the step before."""
    monkeypatch.chdir(home)
    run = halfway(kind, f"damaged {kind}")
    shutil.copytree(step(run, 11), home / "intact")
    shutil.copytree(step(run, 11), step(run, 10))
    names = sorted(p.name for p in (home / "intact").iterdir())
    assert {"optimizer.pth", "scheduler.pth", checkpoint.INDEX} < set(names)
    for name in names:
        for harm in ("cut", "flipped", "gone"):
            for other in home.glob(f"{run.name}/step_*"):
                if other.name != "step_0000010":
                    shutil.rmtree(other)
            shutil.copytree("intact", step(run, 11))
            damage(step(run, 11) / name, harm)
            heard = Heard()
            assert bookkeeping.find(run.name, "", heard.say).folder.name == "step_0000010", (name, harm)
            assert name in heard.lines[0] and "damaged" in heard.lines[0]
    shutil.rmtree("intact")


def test_one_flipped_byte_anywhere_in_the_index_is_noticed(halfway):
    index = step(halfway("lora", "index"), 11) / checkpoint.INDEX
    data = index.read_bytes()
    for i in range(0, len(data), 11):
        index.write_bytes(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :])
        assert checkpoint.check_step(index.parent), data[max(0, i - 20) : i + 20]


def test_a_run_goes_on_from_before_the_damage_and_ends_alike(home, straight):
    """The damaged folder is moved aside, so that keep_last 1 does not take it for the newest and delete what is newer in truth."""
    shutil.copytree(straight("lora"), home / "mended", symlinks=True)
    run = home / "mended"
    go(home, "mended half", *LONG, "--num_iters", 11)
    shutil.copytree(step(home / "mended half", 11), step(run, 11))
    damage(step(run, 20) / "optimizer.pth", "cut")
    said = go(home, "mended", *LONG, "--save_interval", 3, "--keep_last", 1, "--keep_best", "false")
    assert "passing over a damaged checkpoint: mended/step_0000020/optimizer.pth has" in said and "going on from mended/step_0000011" in said
    assert "moved mended/step_0000020, which lies after step 11, to mended/step_0000020.before-1" in said
    assert not differing(step(run, 20), step(straight("lora"), 20)) and numbers(run)[11:] == numbers(straight("lora"))[11:]
    assert steps_in(run) == [20] and os.readlink(run / "latest") == "step_0000020"


def test_resume_from_takes_a_step_and_refuses_a_damaged_one(home, straight, halfway):
    run = halfway("lora", "chosen")
    go(home, "elsewhere", *LONG, "--resume_from", "chosen/latest")
    assert not differing(step(home / "elsewhere", 20), step(straight("lora"), 20))
    assert [line["step"] for line in numbers(home / "elsewhere")] == list(range(12, 21))
    damage(step(run, 11) / "optimizer.pth", "flipped")
    said = go(home, "elsewhere", *LONG, "--resume_from", "chosen/step_0000011", code=2)
    assert "resume_from: chosen/step_0000011/optimizer.pth does not have the checksum" in said
    said = go(home, "chosen", *LONG, code=1)  # the only step is damaged: not silently a fresh start
    assert "none of the 1 checkpoints in chosen is complete; --overwrite starts anew" in said
    said = go(home, "chosen", *LONG, "--resume_from", "nowhere", code=2)
    assert "no folder nowhere" in said


def test_the_same_command_goes_on_from_what_it_made_after_resume_from(home, straight, halfway):
    first = halfway("lora", "branch of")
    flags = (*LONG, "--resume_from", str(step(first, 11)), "--save_interval", 3)
    go(home, "branched", *flags, "--num_iters", 14)
    said = go(home, "branched", *flags)
    assert "going on from" in said and "14 steps done" in said and not differing(step(home / "branched", 20), step(straight("lora"), 20))
    assert "choose one" in go(home, "branched", *flags, "--overwrite", code=2)


def test_latest_is_mended_where_a_kill_left_it_behind(home):
    go(home, "behind", "--num_iters", 4, "--save_interval", 2)
    checkpoint.point(home / "behind", "step_0000002")
    go(home, "behind", "--num_iters", 4, "--save_interval", 2)
    assert (home / "behind/latest").resolve().name == "step_0000004"


def test_a_damaged_adapter_in_a_step_folder_is_named_when_it_is_loaded(home):
    go(home, "flipped", "--num_iters", 1)
    path = home / "flipped/latest/lora_weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(Invalid, match="does not have the checksum"):
        lora.load_lora_weights(models.load(home / "base"), home / "flipped/latest")


def test_debug_tells_of_every_step(home):
    said = go(home, "debugged", "--num_iters", 2, "--debug")
    assert "trained: base_lm.layers.0" in said and said.count(" s for the data") == 2
    assert "for the data" not in go(home, "not debugged", "--num_iters", 1)


def test_overwrite_moves_nothing_for_a_run_that_cannot_start(home):
    go(home, "precious", "--num_iters", 2)
    go(home, "precious", "--num_iters", 2, "--overwrite", "--pretrained_path", "nobase", code=1)
    assert steps_in(home / "precious") == [2] and not (home / "precious.before-1").exists()
    assert "overwrite would move precious/latest away" in go(home, "precious", "--overwrite", "--pretrained_path", "precious/latest", code=2)
    go(home, "precious", "--num_iters", 1, "--overwrite")
    assert steps_in(home / "precious") == [1] and steps_in(home / "precious.before-1") == [2]


def test_two_runs_do_not_share_a_folder(home):
    (home / "held").mkdir()
    assert bookkeeping.lock(home / "held") is None
    assert "another train.py is writing into held" in go(home, "held", "--num_iters", 1, code=2)
    os.close(plain.LOCKS.pop())
    go(home, "held", "--num_iters", 1)


def test_a_speaker_keeps_the_number_it_had_when_the_run_began(home):
    rows = [json.loads(line) for line in (home / "train.jsonl").read_text().splitlines()]
    for n, names in ((1, ("Bob", "Ann")), (2, ("Carl", "Bob", "Ann"))):
        jsonl(home / "named.jsonl", [{**row, "speaker": names[i % len(names)]} for i, row in enumerate(rows)])
        go(home, "named", "--train_manifest", "named.jsonl", "--num_iters", n)
    assert adapters.read_record(home / "named/latest")["speakers"] == {"Bob": 0, "Ann": 1, "Carl": 2}


def deaf():
    """Nobody reads what the run says, and no sample can be spoken."""
    class Closed:
        def write(self, text):
            raise BrokenPipeError

        flush = write

    bookkeeping.sys = types.SimpleNamespace(**{**vars(sys), "stderr": Closed()})

    def broken(*_):
        raise OSError("no space")

    listen.Samples.take = broken


def test_neither_a_closed_pipe_nor_a_sample_ends_a_run(home):
    go(home, "deaf", *LONG, "--num_iters", 4, "--val_samples", 1, hook=deaf)
    assert steps_in(home / "deaf") == [4] and "no sample of the validation texts: no space" in (home / "deaf/train.log").read_text()


def test_rows_too_long_by_their_audio_are_not_encoded(home):
    clip(home / "long.wav", 40, 200)
    jsonl(home / "long.jsonl", [{"id": "long", "audio": "long.wav", "text": "x"}, *map(json.loads, (home / "train.jsonl").read_text().splitlines())])
    said = go(home, "long", "--train_manifest", "long.jsonl", "--val_manifest", "long.jsonl", "--num_iters", 1, "--max_length", 60)
    assert "longer than 60 positions (max_length): long" in said and "validation: " in said and "rows are left out" in said and "encoded" not in said


def small_disk():
    """No file may grow beyond 20 kB from the third step on."""
    reduce, calls = masters.reduce_gradients, []
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limit(parameters):
        calls.append(0)
        if len(calls) == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
        reduce(parameters)

    masters.reduce_gradients = limit


@pytest.mark.parametrize("config", ["lora", "full"])
def test_a_full_disk_ends_the_run_and_leaves_the_checkpoints_that_were(home, config):
    name = f"full disk {config}"
    said = go(home, name, "--num_iters", 8, "--save_interval", 2, config=config, hook=small_disk, code=1)
    assert f"could not save {name}/step_0000004" in said and "Earlier checkpoints are untouched" in said and "MB are free" in said
    assert sorted(p.name for p in (home / name).glob("step*")) == ["step_0000002"]
    assert f"going on from {name}/step_0000002" in go(home, name, "--num_iters", 8, "--save_interval", 2, config=config)


# ------------------------------------------------------------------------------------------------ kills and signals


SAVING = ((os, "mkdir"), (os, "fsync"), (os, "rename"), (os, "replace"), (os, "symlink"), (os, "open"), (os, "unlink"), (torch, "save"),
          (checkpoint, "save_file"), (Path, "write_text"), (shutil, "copyfile"))


def dying(n):
    """kill -9 before the n-th file operation of the first save, or with its file half written; says how many there were."""
    count, saving = [0], [False]

    def counted(call):
        def operation(*args, **kwargs):
            if not saving[0]:
                return call(*args, **kwargs)
            count[0] += 1
            if count[0] == n + 1:
                if call.__name__ in ("save", "save_file", "write_text", "copyfile"):  # os.open is also below these
                    saving[0] = False
                    call(*args, **kwargs)
                    path = next(a for a in args if isinstance(a, (str, Path)))
                    os.truncate(path, os.path.getsize(path) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)
        operation.__name__ = call.__name__
        return operation

    for owner, name in SAVING:
        setattr(owner, name, counted(getattr(owner, name)))
    whole = train.checkpoint.write_step

    def write_step(*args):
        saving[0] = True
        out = whole(*args)
        saving[0] = False
        print(f"operations {count[0]}", flush=True)
        return out

    train.checkpoint.write_step = write_step


def dying_by_chance(seconds):
    """kill -9 so long after the first save began, whatever is being done then."""
    whole = train.checkpoint.write_step

    def write_step(*args):
        threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return whole(*args)

    train.checkpoint.write_step = write_step


def test_killed_while_saving_it_goes_on_from_the_last_complete_step(home, straight, halfway):
    """kill -9 at chosen file operations and at random moments of saves, process after process; then the run ends like the unbroken one."""
    flags, n = (*LONG, "--save_interval", 1), int(os.environ.get("SAVE_KILLS", 10))
    said = go(home, halfway("lora", "counted").name, *flags, "--num_iters", 12, hook=functools.partial(dying, 10**9))
    total, hit = int(said.split("operations ")[1].split()[0]), set()
    run = halfway("lora", "killed")
    for k in range(n):
        newest, by_chance = checkpoint.newest_step(run), k % 5 == 4
        at = round(k * (total - 1) / (n - 1)) if n <= total else len(hit) % total
        hook = functools.partial(dying_by_chance, 0.03 * random.Random(k).random()) if by_chance else functools.partial(dying, at)
        died = start("train", ["lora.yaml", "--save_path", run.name, *flags], home, hook=hook)
        hit |= set() if by_chance else {at}
        assert died.wait() == -9, died.said
        assert f"going on from {run.name}/{newest.name}: " in died.said and "passing over" not in died.said
        found, wrong = checkpoint.newest_step(run, print), checkpoint.check_step(run / "latest")
        assert int(found.name[5:]) - int(newest.name[5:]) in ((0, 1, 2, 3) if by_chance else (0, 1)) and not wrong, (found, wrong)
        if k == n - 1 or int(found.name[5:]) > 16:
            go(home, run.name, *flags)
            assert not differing(step(run, 20), step(straight("lora"), 20)) and numbers(run) == numbers(straight("lora"))
            assert not list(run.glob("*.tmp")) and not list(run.glob("*.before-*"))
            run = halfway("lora", f"killed {k}")
    print(f"{n} kills, {len(hit)} of {total} file operations of a save hit")
    assert total > 20 and (n < 50 or len(hit) == total)


def lines_in(run, n):
    """A condition: metrics.jsonl of a run has n training lines."""
    return lambda _: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text().count('"train"') >= n


def test_sigterm_and_sigint_finish_the_step_save_and_resume_exactly(home, straight):
    """SIGTERM in the first process, SIGINT in the second, the third ends; SIGTERM exits 143, SIGINT 130."""
    run = home / "signalled"
    for number, code, lines in ((signal.SIGTERM, 143, 3), (signal.SIGINT, 130, 9)):
        process = start("train", ["lora.yaml", "--save_path", run.name, *LONG], home)
        assert process.until(lines_in(run, lines)), process.said
        os.kill(process.pid, number)
        begun = time.monotonic()
        assert process.wait() == code, process.said
        assert time.monotonic() - begun < 20 and "asked to stop: saved step" in process.said
        assert steps_in(run)[0] == numbers(run)[-1]["step"] < 20
    go(home, run.name, *LONG)
    assert not differing(step(run, 20), step(straight("lora"), 20)) and numbers(run) == numbers(straight("lora"))
    assert len(steps_in(run)) == 3


def slow(name):
    """The named function, of train.py or of its masters, never ends, and says of each signal that it has come."""
    def wait(*args):
        came, tell = os.pipe()
        os.set_blocking(tell, False)
        signal.set_wakeup_fd(tell)  # so that a signal which comes before the next line is not missed either
        print("waiting", flush=True)
        while os.read(came, 1):
            print("a signal came", flush=True)

    setattr(masters if hasattr(masters, name) else train, name, wait)


def test_a_second_sigint_leaves_at_once_and_before_the_first_step_so_does_the_first(home):
    for name, signals, code in (("reduce_gradients", [signal.SIGINT, signal.SIGINT], 130), ("load_clips", [signal.SIGINT], 130),
                                ("load_clips", [signal.SIGTERM], 143)):
        process = start("train", ["lora.yaml", "--save_path", f"slow {name}", "--num_iters", 3, "--overwrite"], home, hook=functools.partial(slow, name))
        assert process.until(lambda r: "waiting" in r.said), process.said
        for number in signals:
            assert process.process.exitcode is None
            os.kill(process.pid, number)
            process.until(lambda r: "a signal came" in r.said)  # or it has ended
        assert process.wait() == code and "Traceback" not in process.said
        assert not steps_in(home / f"slow {name}")


def test_a_signal_to_one_rank_stops_both_at_the_same_step(home):
    run = home / "one of two"
    both = ranks(2, "train", ["lora.yaml", "--save_path", run.name, "--num_iters", 500, "--max_steps", 500], home)
    assert both[0].until(lines_in(run, 3)), both[0].said
    os.kill(both[1].pid, signal.SIGTERM)
    assert [process.wait() for process in both] == [143, 143], both[0].said + both[1].said
    assert steps_in(run) == [numbers(run)[-1]["step"]]


def children(pid):
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has ended meanwhile
            found += map(int, task.read_text().split())
    return found


def wait_for(condition, alive=None):
    """Wait for a condition, for 90 s at most and no longer than a process lives."""
    end = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < end and (alive is None or alive.poll() is None)
        time.sleep(0.01)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the ranks in /proc")
def test_under_torchrun_a_killed_rank_restarts_the_group_or_ends_the_job(home):
    """kill -9 of one rank: the group restarts and goes on from the last save; the second time no restart is left, and the job fails soon."""
    run = home / "torchrun"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    heard = open(home / "torchrun.txt", "w+")
    job = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--max_restarts", "1", "--master_port", str(port),
                            str(Path(ROOT) / "train.py"), "lora.yaml", "--save_path", run.name, "--num_iters", "5000", "--save_interval", "2"],
                           cwd=home, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=heard, stderr=heard)
    try:
        for lines in (3, None):
            ready = lines_in(run, lines) if lines else lambda _: numbers(run)[-1]["step"] > reached
            wait_for(lambda: steps_in(run) and ready(None), job)
            group = children(job.pid)
            os.kill(group[-1], signal.SIGKILL)
            begun = time.monotonic()
            wait_for(lambda: not set(group) & set(children(job.pid)))  # the others are ended, too
            reached = max(numbers(run)[-1]["step"], steps_in(run)[0])
        job.wait(60)
        assert time.monotonic() - begun < 60 and job.returncode not in (0, None)
    finally:
        job.kill()
        heard.close()
    assert "going on from torchrun/step_" in (home / "torchrun.txt").read_text()
    found = [line["step"] for line in numbers(run)]
    assert found == list(range(1, found[-1] + 1)) and checkpoint.newest_step(run) is not None


# ------------------------------------------------------------------------------------------------ numbers that are none


def poisoned(ids=None):
    """The cached latents of some rows, or of all, are NaN."""
    key, load, sick = train.ClipCache.key, train.ClipCache.load, set()

    def noted(self, row):
        found = key(self, row)
        sick.update({found} if ids is None or row["id"] in ids else ())
        return found

    def bad(self, found):
        return {k: v * math.nan if v.is_floating_point() and found in sick else v for k, v in load(self, found).items()}

    train.ClipCache.key, train.ClipCache.load = noted, bad


def finite(folder):
    return all(t.isfinite().all() for t in contents(folder).values())


@pytest.mark.parametrize("world", [1, 2])
def test_a_step_with_nan_is_skipped_and_its_rows_are_named(home, world):
    """On two ranks such a row lies now on one, now on the other; both skip, and rank 0 names it. Good steps between do not add up to three."""
    run, bad = home / f"nan {world}", ["r05", "r09"]
    said = go(home, run.name, "--num_iters", 13, "--batch_size", 1, "--grad_accum_steps", 2 // world, world=world,
              hook=functools.partial(poisoned, bad))
    hit = {line["step"]: [row for row in line["rows"] if row in bad] for line in numbers(run) if set(bad) & set(line["rows"])}
    lines = [line for line in said.splitlines() if "update skipped" in line]
    assert [f"step {s}: loss nan, gradient norm nan: update skipped; rows {', '.join(rows)}" for s, rows in hit.items()] == lines
    places = {line["rows"].index(row) for line in numbers(run) for row in hit.get(line["step"], ())}
    assert len(hit) >= 3 and places == {0, 1} and f"{len(hit)} skipped" in said
    assert [line["step"] for line in numbers(run) if line["loss/total"] is None] == list(hit)
    assert finite(step(run, 13)) and checkpoint.read_json(step(run, 13) / checkpoint.INDEX)["skipped"] == len(hit)


def test_three_in_a_row_end_the_run_with_the_last_good_state(home, halfway, straight):
    run = halfway("lora", "all nan")
    said = go(home, run.name, *LONG, hook=poisoned, code=1)
    assert said.count("update skipped") == 3 and "three steps in a row gave no finite loss and gradient; stopped at step 14" in said
    assert "lower learning_rate" in said and steps_in(run) == [14, 11]
    assert finite(step(run, 14)) and not differing(step(run, 14), step(run, 11))
    model = models.load(home / "base")
    assert lora.load_lora_weights(model, step(run, 14))


def infinite_gradient():
    """The loss is fine, one value of one gradient is not, in steps 2 and 4."""
    calls = []

    def reduce(parameters):
        calls.append(0)
        if len(calls) in (2, 4):
            parameters[3].grad.view(-1)[0] = math.inf

    masters.reduce_gradients = reduce


def test_an_infinite_gradient_is_caught_although_the_loss_is_finite(home):
    said = go(home, "inf", "--num_iters", 5, "--max_grad_norm", 1.0, hook=infinite_gradient)
    assert said.count("update skipped; rows") == 2 and "done: 5 steps, 2 skipped" in said and finite(step(home / "inf", 5))


def out_of_memory():
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore")

    train.to_device = full


def test_out_of_memory_names_the_batch_and_what_to_change(home):
    said = go(home, "oom", "--num_iters", 2, hook=out_of_memory, code=1)
    for words in ("out of memory at step 1", "[2] clips, the longest r", "positions", "smaller batch_size or batch_tokens", "--checkpointing",
                  "Tried to allocate 20.00 GiB"):
        assert words in said, words


# ------------------------------------------------------------------------------------------------ bad input


def no_weights():
    def refuse(*args, **kwargs):
        raise AssertionError("a checkpoint was loaded")

    models.load = refuse


def test_a_run_folder_of_another_run_is_refused_with_the_keys_that_differ(home, halfway):
    """Each key in a line of its own, before any weight is read."""
    run = halfway("lora", "another")
    said = go(home, run.name, *LONG, "--seed", 7, "--lora.r", 2, "--lora.alpha", 8, "--batch_size", 3, "--lambdas.loss/stop", 2, code=2, hook=no_weights)
    assert "made with other settings" in said and "--overwrite" in said
    differ = ["batch_size: 2 there, 3 here", "lambdas.loss/stop: 1.0 there, 2.0 here", "lora.r: 4 there, 2 here", "seed: 42 there, 7 here"]
    assert [line.strip() for line in said.splitlines()[1:-1]] == differ
    said = go(home, run.name, *LONG, config="full", code=2, hook=no_weights)
    assert [line.strip() for line in said.splitlines()[1:-1]] == ["lora: 'given' there, None here"]
    assert "going on from" in go(home, run.name, *LONG, "--num_iters", 12, "--log_interval", 1, "--save_interval", 7, "--num_workers", 0)


def with_settings(folder, change):
    """Write the index of a step folder anew, after change(its settings)."""
    index = checkpoint.read_json(folder / checkpoint.INDEX)
    change(index["settings"])
    with_index(folder, index)


def with_index(folder, index):
    names = list(index["files"])
    kept = folder.with_name("kept")
    folder.rename(kept)

    def write(to):
        for name in names:
            shutil.copy(kept / name, to / name)

    checkpoint.write_step(folder.parent, int(folder.name[5:]), write, {k: v for k, v in index.items() if k not in ("files", "checksum")})
    shutil.rmtree(kept)


NEWER = {"LoRAConfig": ("lora", "rslora", "false", "true"), "Training": ("backbone", "training_cfg_rate", "0.1", "0.2"),
         "LAMBDAS": ("lambdas", "loss/stop", "1.0", "0.5")}  # section, a name in it, its default, another value


@pytest.mark.parametrize("where", NEWER)
def test_a_run_that_is_older_than_a_setting_had_its_default(home, halfway, where):
    """One more field in LoRAConfig, in a backbone's Training or in LAMBDAS makes no earlier run another one."""
    section, name, usual, other = NEWER[where]
    run = halfway("lora", f"older than {where}")
    with_settings(step(run, 11), lambda settings: settings[section].pop(name, None))
    flag = f"--{section}.{name}"
    said = go(home, run.name, *LONG, flag, other, "--num_iters", 12, code=2)
    shown = {"false": "False", "true": "True"}
    assert f"\n  {section}.{name}: {shown.get(usual, usual)} there, {shown.get(other, other)} here\n" in said
    go(home, run.name, *LONG, "--num_iters", 12)
    assert "going on from" in go(home, run.name, *LONG, flag, usual, "--num_iters", 13)


def test_a_run_whose_settings_were_recorded_as_they_were_written_goes_on(home, halfway, straight):
    """Earlier indexes hold of `backbone` and `lambdas` only what the user had given, one value perhaps for a list of one."""
    run = halfway("lora", "as written")
    with_settings(step(run, 11), lambda settings: settings.update(backbone={}, lambdas={}))
    go(home, run.name, *LONG)
    assert not differing(step(run, 20), step(straight("lora"), 20)) and numbers(run) == numbers(straight("lora"))
    assert bookkeeping.differences({"b": {"s": "anna"}}, {"b": {"s": ["anna"]}}, {}) == []
    assert bookkeeping.differences({"b": {"s": "anna"}}, {"b": {"s": ["ben"]}}, {}) == ["b.s: 'anna' there, ['ben'] here"]
    assert bookkeeping.differences({}, {"b": {"s": 2}}, {"b": {"s": 1}}) == ["b.s: 1 there, 2 here"]  # a whole section is newer


def test_a_default_that_a_later_version_changes_is_a_difference(halfway):
    """What acted is recorded, not only what was written."""
    settings = checkpoint.read_json(step(halfway("lora", "recorded"), 11) / checkpoint.INDEX)["settings"]
    assert settings["lambdas"] == {"loss/diff": 1.0, "loss/stop": 1.0} and settings["backbone"]["training_cfg_rate"] == 0.1


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_another_base_is_refused_on_resume(home, mode):
    if not (home / "base 2").exists():
        shutil.copytree(home / "base", home / "base 2")
        weights = torch.load(home / "base" / "pytorch_model.bin", weights_only=True)
        weights["stop_proj.weight"] += 1
        torch.save(weights, home / "base 2" / "pytorch_model.bin")
    flags = (f"based {mode}", "--save_mode", mode, "--num_iters")
    go(home, *flags, 1)
    said = go(home, *flags, 2, "--pretrained_path", "base 2", code=1)
    assert f"based {mode}/step_0000001 was trained on another base" in said and "--ignore_base" in said
    go(home, *flags, 2, "--pretrained_path", "base 2", "--ignore_base")


def test_changed_rows_are_noticed_on_resume(home, halfway):
    run = halfway("lora", "other rows")
    said = go(home, run.name, *LONG, "--num_iters", 12, "--train_manifest", "val.jsonl", code=2)
    assert "the data set changed" in said  # its epoch is too short for where the run stands
    rows = (home / "train.jsonl").read_text().splitlines()
    (home / "swapped.jsonl").write_text("\n".join(rows[1:] + rows[:1]))
    assert "not those that the run began with" in go(home, run.name, *LONG, "--num_iters", 12, "--train_manifest", "swapped.jsonl")


REFUSED = {  # flags, exit code, words
    "no save_path": (("--save_path", ""), 2, "save_path is not set"),
    "save_path below a file": (("--save_path", "train.jsonl/run", "--pretrained_path", "nobase"), 2, "save_path train.jsonl/run cannot be written"),
    "save_path is a file": (("--save_path", "train.jsonl", "--overwrite"), 2, "save_path train.jsonl cannot be written"),
    "sample_rate": (("--sample_rate", 44100), 2, "sample_rate is 44100, the checkpoint's is 16000"),
    "lambdas": (("--lambdas.loss/dif", 1), 2, "unknown loss loss/dif; this backbone has loss/diff, loss/stop"),
    "backbone option": (("--backbone.training_cfg", 1), 2, "backbone.training_cfg: unknown; the nearest known name is training_cfg_rate"),
    "batch_size": (("--batch_size", 0), 2, "batch_size is 0, expected at least 1"),
    "ema": (("--ema", 1), 2, "ema is 1, expected 0, which is off, or a decay below 1"),
    "patience": (("--patience", 2), 2, "patience counts validations: it needs val_manifest, and a valid_interval above 0"),
    "a ratio of zero": (("--lora.b_lr_ratio", 0), 2, "lora.b_lr_ratio is 0, expected above 0"),
    "shares that leave nothing": (("--train_manifest", "a.jsonl", "b.jsonl@0.6", "c.jsonl@.4"), 2, "the shares must leave something of an epoch"),
    "nothing but shares": (("--train_manifest", "b.jsonl@0.6"), 2, "train_manifest is b.jsonl@0.6: the shares must leave"),
    "distribute": (("--distribute",), 2, "distribute needs hf_model_id"),
    "no manifest": (("--train_manifest", "none.jsonl"), 1, "none.jsonl"),
    "empty manifest": (("--train_manifest", "empty.jsonl"), 1, "holds no rows"),
    "no base": (("--pretrained_path", "nobase"), 1, "no checkpoint at nobase"),
    "all too long": (("--max_batch_tokens", 8), 1, "no clip is left to train on of 13: 13 longer than 4 positions (max_batch_tokens / batch_size). "
                     "Raise max_batch_tokens 8, or lower batch_size 2."),
    "all longer than max_length": (("--max_length", 3), 1, "13 longer than 3 positions (max_length). Raise max_length, up to the checkpoint's "),
    "no target": (("--lora.target_modules", "q_projj"), 2, "lora.target_modules: 'q_projj' matches no Linear"),
    "a torn recording": (("--train_manifest", "torn.jsonl"), 1, "torn.wav"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_work_is_said_before_the_first_step(home, what):
    (home / "empty.jsonl").write_text("\n")
    (home / "torn.wav").write_bytes((home / "00.wav").read_bytes()[:20])
    jsonl(home / "torn.jsonl", [{"audio": "torn.wav", "text": "hello"}])
    flags, code, words = REFUSED[what]
    save = () if "--save_path" in flags else ("--save_path", f"refused {what}")
    run = start("train", ["lora.yaml", *save, *flags], home)
    assert run.wait() == code and words in run.said and "Traceback" not in run.said, run.said
    assert len(run.said.splitlines()) < 8 and not list(home.glob(f"refused {what}/step_*"))


def test_a_bias_that_cannot_be_merged_is_refused_before_training(home):
    said = go(home, "biased", "--lora.bias", "true", "--save_mode", "both", code=2)
    assert "save_mode both: lora.bias cannot be merged" in said and not list((home / "biased").glob("step_*"))


def test_save_mode_needs_a_lora_section(home):
    assert "save_mode both is for LoRA runs" in go(home, "no section", "--save_mode", "both", config="full", code=2)


def test_a_missing_cache_under_torchrun_prints_the_command_that_fills_it(home, tmp_path):
    shutil.copytree(home / "base", tmp_path / "base")
    for name in ("00.wav", "01.wav", "02.wav"):
        shutil.copy(home / name, tmp_path)
    (tmp_path / "my data").mkdir()
    rows = [json.loads(line) for line in (home / "train.jsonl").read_text().splitlines()[:3]]
    jsonl(tmp_path / "my data" / "mine.jsonl", rows[:2])
    jsonl(tmp_path / "my data" / "val.jsonl", rows[2:])
    shutil.copy(home / "lora.yaml", tmp_path)
    flags = ("--train_manifest", "my data/mine.jsonl", "--val_manifest", "my data/val.jsonl", "--num_iters", 1)
    said = go(tmp_path, "run", *flags, world=2, code=2)
    assert "3 of 3 clips are not in the cache my data/cache. Encode them once, in one process:" in said
    command = shlex.split(said.split("\n")[-2])
    assert command[:2] == ["python", "prepare_data.py"]
    done = start("prepare_data", command[2:], tmp_path)
    assert done.wait() == 0, done.said
    assert "done: 1 steps" in go(tmp_path, "run", *flags, world=2)
    assert sorted(p.name for p in (tmp_path / "my data").iterdir() if p.suffix == ".jsonl") == ["mine.jsonl", "val.jsonl"]
    shutil.rmtree(tmp_path / "my data" / "cache")
    assert "encoded 3/3" in go(tmp_path, "alone", *flags)  # one process encodes by itself


# ------------------------------------------------------------------------------------------------ learning


def learn(model, clips, steps, rate):
    """Losses on two clips with fixed draws, with AdamW and the script's schedule."""
    cfg = flags_of("--learning_rate", rate)
    masters = train.Masters({n: p for n, p in model.named_parameters() if p.requires_grad})
    optimizer = torch.optim.AdamW(masters.parameters, rate, weight_decay=0.01)
    model.train()
    batch, counts = model.collate(clips, [1, 2])
    seen = []
    for s in range(steps + 1):
        out = model(batch)
        loss = sum(out[k] / counts[k] for k in out if k.startswith("loss/"))
        seen.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(cfg, s, steps, 5)
        optimizer.step()
    return seen


def test_two_clips_are_learned(home):
    """Full tuning: 0.7 x the first loss in 50 steps (0.35 x in 500); LoRA: 0.9 x in 50 (200), and no base weight changes."""
    rows = train.read_manifest(home / "train.jsonl")[:2]
    model = models.load(home / "base")
    cache = train.ClipCache(home / "cache", model)
    clips = [cache.get(row) for row in rows]
    steps = int(os.environ.get("OVERFIT_STEPS", 50))
    full = learn(model, clips, steps, 3e-3)
    print(f"full: {full[-1] / full[0]:.3f} x after {steps} steps")
    assert full[-1] <= (0.35 if steps >= 500 else 0.7) * full[0]
    model = models.load(home / "base")
    before = {n: p.clone() for n, p in model.named_parameters()}
    lora.apply_lora_to_model(model, {"r": 8, "alpha": 16.0})
    adapter = learn(model, clips, min(steps, 200), 1e-2)
    print(f"LoRA: {adapter[-1] / adapter[0]:.3f} x after {min(steps, 200)} steps")
    assert adapter[-1] <= 0.9 * adapter[0]
    assert all(torch.equal(p, model.get_parameter(n)) for n, p in before.items())
