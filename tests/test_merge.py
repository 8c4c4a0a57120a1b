"""merge_lora.py: the merged folder is the base with its adapters on, and a converted adapter is the same adapter."""
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lora
import models
from models import voxcpm
from models.parts import adapters
from tests import tiny_voxcpm as tiny
from tests.running import here

SMALL = {"lm_config": {"num_hidden_layers": 1}, "residual_lm_num_layers": 1, "encoder_config": {"num_layers": 1}, "dit_config": {"num_layers": 1}}
CODEC = {"codec_file": "audiovae.safetensors", **SMALL}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """base0.5, base1.5, base2 in float32, half in bfloat16; original<version> and other: adapters without a record."""
    folder = tmp_path_factory.mktemp("merge")
    for version in tiny.VERSIONS:
        tiny.write(folder / f"base{version}", version, **CODEC)
        tiny.write_adapter(folder / f"original{version}", version, base=folder / f"base{version}", **SMALL)
    tiny.write(folder / "half", "1.5", torch.bfloat16, **CODEC)
    tiny.write_adapter(folder / "other", "1.5", r=2, alpha=3, dropout=0.1, dit=(), proj=False, **SMALL)
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def merge(*flags, to="out"):
    """Run merge_lora.py; the path is all that stdout says. Returns stderr."""
    code, out, err = here("merge_lora", (*flags, "--output_dir", to))
    assert (code, out) == (0, f"{to}\n".encode()), err
    assert not Path(f"{to}.tmp").exists() and "Traceback" not in err
    return err


def fails(code, *flags, to="out"):
    """Run merge_lora.py; it ends with `code` and leaves nothing at all. Returns stderr."""
    before = sorted(Path(".").rglob("*"))
    ended, out, err = here("merge_lora", (*flags, "--output_dir", to))
    assert (ended, out) == (code, b"") and "Traceback" not in err, err
    assert sorted(Path(".").rglob("*")) == before
    return err


@torch.no_grad()
def outcome(model):
    """Losses on two clips and generated latents, as one vector."""
    c, g = model.config, torch.Generator().manual_seed(0)
    rows = [{"text": torch.tensor([200, 210, 101][:n]), "latents": torch.randn(n, c.patch_size, c.feat_dim, generator=g)} for n in (3, 2)]
    losses = [v.reshape(1) for k, v in model(model.collate(rows, [1, 2])[0]).items() if k.startswith("loss/")]
    return torch.cat([*losses, torch.stack(list(model.frames("hello", seed=3, max_len=3, inference_timesteps=4))).flatten()])


def distance(a, b):
    return float((a - b).norm() / b.norm())


def adapted(base, *adapters, dtype=torch.float32):
    model = models.load(base, dtype=dtype)
    lora.load_lora_weights(model, list(adapters))
    return model


def added(adapter, name):
    """scale B A of a module, by the files alone."""
    tensors, config = load_file(adapter / "lora_weights.safetensors"), json.loads((adapter / "lora_config.json").read_text())["lora_config"]
    if f"{name}.lora_A" not in tensors:
        return 0
    return config["alpha"] / config["r"] * tensors[f"{name}.lora_B"] @ tensors[f"{name}.lora_A"]


# ------------------------------------------------------------------------------------------------ merging


@pytest.mark.parametrize("version", tiny.VERSIONS)
def test_a_merged_folder_is_the_base_with_its_adapter(home, version):
    base, adapter = home / f"base{version}", home / f"original{version}"
    err = merge("--ckpt_dir", base, "--lora", adapter)
    assert "0 skipped" in err and " MB" in err
    names = {p.name for p in base.iterdir() if p.name != "pytorch_model.bin"} | {"model.safetensors"}
    assert {p.name for p in Path("out").iterdir()} == names
    assert all((Path("out") / n).read_bytes() == (base / n).read_bytes() for n in names - {"model.safetensors"})
    merged, plain = outcome(models.load("out")), outcome(models.load(base))
    unmerged = outcome(adapted(base, (adapter, 1.0)))
    assert distance(merged, unmerged) < 1e-5 and distance(unmerged, plain) > 100 * 1e-5
    assert not lora.lora_modules(models.load("out"))


def test_a_merged_folder_keeps_the_dtype_of_its_base(home):
    merge("--ckpt_dir", home / "half", "--lora", home / "original1.5")
    before, after = load_file(home / "half/model.safetensors"), load_file("out/model.safetensors")
    assert before.keys() == after.keys()
    for name, w in before.items():
        expected = (w.float() + added(home / "original1.5", name.removesuffix(".weight"))).bfloat16()  # summed in float32, rounded once
        assert after[name].dtype == torch.bfloat16 and (after[name] - expected).abs().max() <= 0.01 * expected.abs().max(), name
        assert (after[name] == expected).float().mean() > 0.999, name
    merged = outcome(models.load("out", dtype=torch.bfloat16))
    assert distance(merged, outcome(adapted(home / "half", (home / "original1.5", 1.0), dtype=torch.bfloat16))) < 2e-2
    merge("--ckpt_dir", home / "half", "--lora", home / "original1.5", "--dtype", "float32", to="wide")
    assert {t.dtype for t in load_file("wide/model.safetensors").values()} == {torch.float32}


def test_several_adapters_are_added_with_their_strengths(home):
    base, a, b = home / "base1.5", home / "original1.5", home / "other"
    merge("--ckpt_dir", base, "--lora", f"{a}:0.75", "--lora", f"{b}:-0.5")
    before, after = load_file(base / "model.safetensors"), load_file("out/model.safetensors")
    moved = 0
    for name, w in before.items():
        module = name.removesuffix(".weight")
        expected = w + 0.75 * added(a, module) - 0.5 * added(b, module)
        assert torch.allclose(after[name], expected, atol=1e-6), name
        moved += not torch.equal(expected, w)
    assert moved == 15
    assert distance(outcome(models.load("out")), outcome(adapted(base, (a, 0.75), (b, -0.5)))) < 1e-5
    merge("--lora", f"{a}:0.25", to="quarter")  # the base by lora_config.json
    module = "base_lm.layers.0.self_attn.q_proj"
    assert torch.allclose(load_file("quarter/model.safetensors")[module + ".weight"], before[module + ".weight"] + 0.25 * added(a, module), atol=1e-6)


def test_modules_trained_in_full_are_merged_at_their_strength_and_in_the_dtype_of_the_base(home):
    model = models.load(home / "half", dtype=torch.bfloat16)
    lora.apply_lora_to_model(model, {"r": 2, "enable_proj": True, "train_modules": ["stop_head"]})
    base = model.stop_head.weight.detach().float().clone()
    model.stop_head.weight.data += 0.5
    moved = model.stop_head.weight.detach().float() - base  # 0.5, but for bf16
    lora.save_lora_weights(model, "full")
    for strength in (1, 0.5):
        merge("--ckpt_dir", home / "half", "--lora", f"full:{strength}", to=f"out{strength}")
        after = load_file(f"out{strength}/model.safetensors")
        assert {t.dtype for t in after.values()} == {torch.bfloat16}
        assert torch.equal(after["stop_head.weight"], (base + strength * moved).bfloat16())
    assert "more than LoRA pairs" in fails(1, "--ckpt_dir", home / "half", "--lora", "full:0.5", "--to", "native")
    assert "cannot be stacked" in fails(1, "--ckpt_dir", home / "half", "--lora", "full", "--lora", home / "other")


def test_a_bias_is_merged_where_the_layer_has_one_and_refused_elsewhere(home):
    model = models.load(home / "base1.5")
    for name, words in (("room", {"enable_proj": True}), ("none", {"enable_lm": True})):
        lora.apply_lora_to_model(model, {"r": 2, "bias": True, **words})
        for m in lora.lora_modules(model).values():
            m.lora_bias.data += 0.25
        lora.save_lora_weights(model, name)
    merge("--lora", "room")
    before, after = load_file(home / "base1.5/model.safetensors"), load_file("out/model.safetensors")
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved == {"enc_to_lm_proj.bias", "lm_to_dit_proj.bias", "res_to_dit_proj.bias"}
    assert torch.allclose(after["enc_to_lm_proj.bias"], before["enc_to_lm_proj.bias"] + 0.25)
    shutil.rmtree("out")
    assert "lora.bias cannot be merged: base_lm.layers.0" in fails(1, "--lora", "none")
    merge("--lora", "none", "--to", "peft")
    assert torch.allclose(outcome(adapted(home / "base1.5", ("out", 1.0))), outcome(adapted(home / "base1.5", ("none", 1.0))), rtol=0, atol=1e-6)
    shutil.rmtree("out")
    merge("--lora", "none", "--to", "native")
    assert outcome(adapted(home / "base1.5", ("out", 1.0))).equal(outcome(adapted(home / "base1.5", ("none", 1.0))))


# ------------------------------------------------------------------------------------------------ converting


@pytest.mark.parametrize("alpha, r", [(8, 4), (10, 3)])
def test_there_and_back_an_adapter_is_bit_equal(home, alpha, r):
    tiny.write_adapter("given", "1.5", r=r, alpha=alpha, dropout=0.05, **SMALL)
    merge("--ckpt_dir", home / "base1.5", "--lora", "given", "--to", "peft", to="there")
    merge("--lora", "there", "--to", "native", to="back")  # the base by the record
    given, there, back = (load_file(p) for p in ("given/lora_weights.safetensors", "there/adapter_model.safetensors", "back/lora_weights.safetensors"))
    assert {f"base_model.model.{k}.weight": v.numpy().tobytes() for k, v in given.items()} == {k: v.numpy().tobytes() for k, v in there.items()}
    assert {k: v.numpy().tobytes() for k, v in given.items()} == {k: v.numpy().tobytes() for k, v in back.items()}
    config = json.loads(Path("there/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"], config["base_model_name_or_path"]) == (r, alpha, 0.05, str(home / "base1.5"))
    theirs, ours = (json.loads(Path(p, "lora_config.json").read_text())["lora_config"] for p in ("given", "back"))
    assert {k: sorted(v) if isinstance(v, list) else v for k, v in ours.items()} == {k: sorted(v) if isinstance(v, list) else v for k, v in theirs.items()}


def test_a_strength_goes_into_alpha_and_several_become_one(home):
    base, a, b = home / "base1.5", home / "original1.5", home / "other"
    merge("--ckpt_dir", base, "--lora", f"{a}:0.5", "--to", "peft", to="weaker")
    given, weaker = load_file(a / "lora_weights.safetensors"), load_file("weaker/adapter_model.safetensors")
    assert all(torch.equal(given[k], weaker[f"base_model.model.{k}.weight"]) for k in given)
    assert json.loads(Path("weaker/adapter_config.json").read_text())["lora_alpha"] == 4
    assert distance(outcome(adapted(base, ("weaker", 1.0))), outcome(adapted(base, (a, 0.5)))) < 1e-6
    tiny.write_adapter("same", "1.5", r=2, alpha=1, **SMALL)
    merge("--ckpt_dir", base, "--lora", f"{a}:0.5", "--lora", "same:-1", "--to", "native", to="both")
    config = json.loads(Path("both/lora_config.json").read_text())["lora_config"]
    assert config["r"] == config["alpha"] == 6
    assert distance(outcome(adapted(base, ("both", 1.0))), outcome(adapted(base, (a, 0.5), ("same", -1.0)))) < 1e-5
    assert "a file holds one of each. Merge it instead" in fails(1, "--ckpt_dir", base, "--lora", a, "--lora", b, "--to", "peft")


def test_a_record_outlives_a_conversion(home):
    model = models.load(home / "base1.5")
    lora.apply_lora_to_model(model, {"r": 2, "rslora": True, "enable_dit": True})
    lora.save_lora_weights(model, "own", speakers={"anna": None, "ben": 3})
    merge("--lora", "own", "--to", "peft")
    with safe_open("out/adapter_model.safetensors", "pt") as f:
        record = json.loads(f.metadata()["adapter_record"])
    assert record["speakers"] == {"anna": None, "ben": 3} and record["base"] == str(home / "base1.5") and record["fingerprint"] == model.fingerprint
    config = json.loads(Path("out/adapter_config.json").read_text())
    assert config["lora_alpha"] / config["r"] == pytest.approx(16 / 2**0.5) and not config["use_rslora"]


# ------------------------------------------------------------------------------------------------ shrinking, filling up


def updates(model):
    return {name: m.lora_full_scale * (m.lora_B @ m.lora_A).detach().double() for name, m in lora.lora_modules(model).items()}


def test_a_shrunk_adapter_is_the_best_of_its_rank_and_says_what_it_keeps(home):
    base, a, b = home / "base1.5", home / "original1.5", home / "other"
    err = merge("--ckpt_dir", base, "--lora", f"{a}:0.5", "--lora", f"{b}:-1", "--to", "native", "--rank", 3)  # ranks 4 and 6
    before, after = updates(adapted(base, (a, 0.5), (b, -1.0))), updates(adapted(base, ("out", 1.0)))
    assert json.loads(Path("out/lora_config.json").read_text())["lora_config"]["r"] == 3 and {m.shape[0] for n, m in load_file("out/lora_weights.safetensors").items() if n.endswith("A")} == {3}
    told = {m[1]: (float(m[2]), int(m[3]), float(m[4])) for m in re.finditer(r"(\S+): rank 3 keeps (\S+) % of the energy of (\d+) layers, least in \S+, (\S+) %", err)}
    groups = {}
    for name, whole in before.items():
        U, values, Vt = torch.linalg.svd(whole)  # of the full matrix
        assert torch.allclose(after[name], U[:, :3] * values[:3] @ Vt[:3], atol=1e-5), name
        groups.setdefault(re.sub(r"\d+", "*", name), []).append((values[:3].square().sum(), values.square().sum()))
    assert told.keys() == groups.keys() and min(share for share, _, _ in told.values()) < 95
    for group, rows in groups.items():
        kept, total = (float(sum(column)) for column in zip(*rows))
        assert told[group][0] == pytest.approx(100 * kept / total, abs=0.01) and told[group][1] == len(rows)
        assert told[group][2] == pytest.approx(min(100 * float(k / t) for k, t in rows), abs=0.01)
    merge("--ckpt_dir", base, "--lora", a, "--lora", b, "--to", "peft", "--rank", 6, to="both")  # a thin pair is filled up
    same, both = updates(adapted(base, (a, 1.0), (b, 1.0))), updates(adapted(base, ("both", 1.0)))
    assert all(torch.allclose(same[name], both[name], atol=1e-5) for name in same)
    merge("--ckpt_dir", base, "--lora", f"{a}:0.75", "--to", "native", "--rank", 4, to="one")  # of its own rank, with its scale and strength
    one, whole = updates(adapted(base, ("one", 1.0))), updates(adapted(base, (a, 1.0)))
    assert all(torch.allclose(one[name], 0.75 * whole[name], atol=1e-5) for name in whole)
    assert "--rank 5: the adapter has rank 4; only a smaller one says less" in fails(2, "--ckpt_dir", base, "--lora", a, "--to", "native", "--rank", 5, to="x")


def strict_load(folder, model):
    """A tool that builds its layers from the settings and wants all their pairs, and nothing besides."""
    words, names = json.loads((folder / "lora_config.json").read_text())["lora_config"], []
    roots = [(words["enable_lm"], ("base_lm.", "residual_lm."), words["target_modules_lm"]), (words["enable_dit"], ("feat_decoder.estimator.",), words["target_modules_dit"])]
    for name, module in model.named_modules():
        inside = any(on and name.startswith(root) and name.split(".")[-1] in leaves for on, root, leaves in roots)
        if isinstance(module, torch.nn.Linear) and (inside or words["enable_proj"] and name in words["target_proj_modules"]):
            names += [f"{name}.lora_{letter}" for letter in "AB"]
            assert module.in_features and words["r"]
    tensors = load_file(folder / "lora_weights.safetensors")
    assert sorted(tensors) == sorted(names)
    return tensors


def test_partial_layers_are_said_and_zeros_make_a_strict_loader_take_them(tmp_path, capsys):
    tiny.write("base", "1.5", **CODEC | {"lm_config": {"num_hidden_layers": 2}})
    model = models.load("base")
    lora.apply_lora_to_model(model, {"r": 2, "alpha": 6.0, "target_modules": ["q_proj"], "target_layers": ["base_lm.1"]})
    for m in lora.lora_modules(model).values():
        m.lora_B.data += 0.1
    for _ in range(2):
        lora.save_lora_weights(model, "partial")
    said = "strict servers refuse this adapter: it has no pair for 2 layers that its settings mean, base_lm.layers.0.self_attn.q_proj among them"
    assert capsys.readouterr().err.count(said) == 1, "once in a process"
    with pytest.raises(AssertionError):
        strict_load(Path("partial"), models.load("base"))
    err = merge("--lora", "partial", "--to", "voxcpm", "--zero_fill")
    assert "2 layers filled up with zeros" in err and "strict servers" not in err
    tensors, given = strict_load(Path("out"), models.load("base")), load_file("partial/lora_weights.safetensors")
    assert all(torch.equal(tensors[name], given[name]) if name in given else not tensors[name].any() for name in tensors)
    config = json.loads(Path("out/lora_config.json").read_text())["lora_config"]
    assert (config["r"], config["alpha"]) == (2, 6)
    assert outcome(adapted("base", ("out", 1.0))).equal(outcome(adapted("base", ("partial", 1.0))))


@pytest.mark.parametrize("settings, words", [
    ({"enable_proj": True, "bias": True}, "it has biases (lora.bias)"),
    ({"enable_proj": True, "train_modules": ["stop_head"]}, "it has 1 tensors trained in full, such as stop_head.weight"),
    ({"target_modules": ["feat_encoder.*q_proj"]}, "it has pairs of 1 layers that its settings cannot name, such as feat_encoder"),
    ({"enable_proj": True}, None),
])
def test_what_strict_servers_refuse_is_said_with_every_file(home, capsys, settings, words):
    model = models.load(home / "base1.5")
    adapters._say_once.cache_clear()
    lora.apply_lora_to_model(model, {"r": 2, **settings})
    lora.save_lora_weights(model, "own")
    lora.save_lora_weights(model, "peft", format="peft")
    err = capsys.readouterr().err
    assert words in err if words else "strict" not in err
    assert err.count("strict servers refuse") <= 1


# ------------------------------------------------------------------------------------------------ refusing


def test_what_is_there_is_never_overwritten(home):
    Path("taken").mkdir()
    Path("taken/mine.txt").write_text("x")
    Path("file").write_text("x")
    for name in ("taken", "file"):
        err = fails(2, "--ckpt_dir", home / "base1.5", "--lora", home / "original1.5", to=name)
        assert f"output_dir {name} already holds something; choose another folder" in err
    Path("empty").mkdir()
    merge("--ckpt_dir", home / "base1.5", "--lora", home / "original1.5", to="empty")
    assert (Path("empty") / "model.safetensors").is_file()


@pytest.mark.parametrize("flags, code, words", [
    ((), 2, "give --lora with at least one adapter, and --output_dir"),
    (("--lora", "A", "--to", "gguf"), 2, "--to gguf: for this backbone native or voxcpm or peft"),
    (("--lora", "A", "--to", "mlx"), 2, "--to mlx: for this backbone native or voxcpm or peft"),
    (("--lora", "A", "--naming", "transformers"), 2, "--naming transformers: this backbone has published"),
    (("--lora", "A", "--to", "peft", "--dtype", "bfloat16"), 2, "--dtype is of merged weights"),
    (("--lora", "A", "--rank", "2"), 2, "--rank and --zero_fill are of adapters that are written: say --to native"),
    (("--lora", "A", "--to", "peft", "--rank", "-1"), 2, "rank is -1, expected at least 1"),
    (("--lora", "A", "--dtype", "int4"), 1, "dtype 'int4' is not known"),
    (("--lora", "A", "--sterngth", "1"), 2, "--sterngth: unknown; the nearest known name is"),
    (("--lora", "gone"), 1, "no adapter at gone"),
    (("--lora", "A", "--ckpt_dir", "gone"), 1, "no checkpoint at gone"),
    (("--lora", "nobase"), 2, "nobase does not say which base it belongs to; give it with --ckpt_dir"),
    (("--lora", "A", "--ckpt_dir", "TWO"), 1, "do not fit this voxcpm model"),
])
def test_wrong_use_leaves_nothing(home, flags, code, words):
    tiny.write_adapter("nobase", "1.5", **SMALL)
    flags = [{"A": home / "original1.5", "TWO": home / "base2"}.get(f, f) for f in flags]
    assert words in fails(code, *flags)


@pytest.mark.parametrize("error, code", [(OSError(28, "No space left on device"), 1), (RuntimeError("unexpected pos 64 vs 0"), 1), (KeyboardInterrupt(), 130)])
def test_a_failure_while_writing_leaves_nothing(home, monkeypatch, error, code):
    save = voxcpm.VoxCPM.save

    def full(model, folder, *rest, **how):
        save(model, folder, *rest, **how)
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(voxcpm.VoxCPM, "save", full)
    err = fails(code, "--ckpt_dir", home / "base1.5", "--lora", home / "original1.5")
    assert "out: cannot be written" in err or code == 130 and "interrupted" in err


def test_an_adapter_that_diverged_is_not_merged(home):
    shutil.copytree(home / "original1.5", "nan")
    tensors = load_file("nan/lora_weights.safetensors")
    tensors[next(iter(tensors))][0, 0] = float("nan")
    save_file(tensors, "nan/lora_weights.safetensors")
    assert "hold NaN or infinity" in fails(1, "--ckpt_dir", home / "base1.5", "--lora", "nan")
