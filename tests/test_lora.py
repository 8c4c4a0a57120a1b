"""LoRA: what it wraps, how it switches, what it reads and refuses. Fixtures of foreign formats are written by hand here."""
import dataclasses
import gc
import importlib
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora
import models
from models.parts import Invalid, slots
from tests import tiny_voxcpm


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_voxcpm.write(folder, "1.5")
    return folder


@pytest.fixture
def model(base):
    return models.load(base)


def batch_of(model):
    g = torch.Generator().manual_seed(0)
    latents = [torch.randn(n, model.config.patch_size, model.config.feat_dim, generator=g) for n in (5, 3)]
    texts = ["Hello there.", "Good."]
    return model.collate([{"text": torch.tensor(model.encode_text(t) + [101]), "latents": x} for t, x in zip(texts, latents)], [1, 2])[0]


def loss(model):
    with torch.no_grad():
        out = model(batch_of(model))
    return (out["loss/diff"] + out["loss/stop"]).item()


def randomize(model, seed=0, std=0.1):
    g = torch.Generator().manual_seed(seed)
    for name, p in sorted(model.named_parameters()):
        if ".lora_" in name:
            p.data = torch.randn(p.shape, generator=g) * std


def adapter(model, folder, seed, **settings):
    lora.apply_lora_to_model(model, {"r": 4, "alpha": 8.0, **settings})
    randomize(model, seed)
    value = loss(model)
    lora.save_lora_weights(model, folder)
    lora.remove_lora(model)
    return value


@pytest.mark.parametrize("undo", (lora.remove_lora, lora.merge_lora_weights))
def test_an_unwrapped_layer_is_what_it_was(model, undo):
    before = {n: type(m) for n, m in model.named_modules()}
    names = lora.apply_lora_to_model(model, {"target_modules": ["q_proj", "down_proj", "stop_proj"]})
    assert len({before[n] for n in names}) == 2  # plain layers and those that know a faster way for few rows
    undo(model)
    assert {n: type(m) for n, m in model.named_modules()} == before and not any("lora" in k for n in names for k in vars(model.get_submodule(n)))


def test_the_backbone_chooses_attention_of_both_models_and_the_dit(model):
    names = lora.apply_lora_to_model(model, {})
    assert {n.split(".")[0] for n in names} == {"base_lm", "residual_lm", "feat_decoder"}
    assert {n.split(".")[-1] for n in names} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert sum(p.requires_grad for p in model.parameters()) == 2 * len(names)


@pytest.mark.parametrize("settings, expected", [
    ({"enable_lm": True}, {"base_lm", "residual_lm"}),
    ({"enable_dit": True}, {"feat_decoder"}),
    ({"enable_proj": True}, {"enc_to_lm_proj", "lm_to_dit_proj", "res_to_dit_proj"}),
    ({"target_modules": ["q_proj"]}, {"base_lm", "residual_lm", "feat_encoder", "feat_decoder"}),
    ({"target_modules": [r"base_lm\.layers\.\d+\.mlp\..*"]}, {"base_lm"}),
    ({"enable_dit": True, "target_modules_dit": ["linear_1"]}, {"feat_decoder"}),
])
def test_words_and_patterns_name_modules(model, settings, expected):
    assert {n.split(".")[0] for n in lora.apply_lora_to_model(model, settings)} == expected


def test_target_layers_keep_their_number_in_every_stack_that_has_it(model):
    names = lora.apply_lora_to_model(model, {"target_layers": [2]})
    assert {n.split(".layers.")[0] for n in names} == {"base_lm", "feat_decoder.estimator.decoder"}  # the others have two layers
    assert all(".layers.2." in n for n in names)
    with pytest.raises(Invalid, match="no targeted stack has a layer 16"):
        lora.apply_lora_to_model(model, {"target_layers": [16]})


@pytest.mark.parametrize("settings, words", [
    ({"target_modules": ["q_projj"]}, "'q_projj' matches no Linear; this model has names such as"),
    ({"enable_lm": True, "target_modules_lm": ["attn"]}, "target_modules_lm: 'attn' matches no Linear.*q_proj"),
    ({"target_modules": ["(bad"]}, "no module name and no regex"),
    ({"train_modules": ["nothing"]}, "train_modules: 'nothing' matches no module"),
    ({"target_modules": ["q_proj"], "train_modules": ["base_lm.layers.0.self_attn"]}, "both a LoRA target and trained in full"),
    ({"r": 0}, "r 0 must be at least 1"),
])
def test_wrong_targets_are_refused(model, settings, words):
    with pytest.raises(Invalid, match=words):
        lora.apply_lora_to_model(model, settings)


def test_scale_is_alpha_over_r_or_over_its_root(model):
    lora.apply_lora_to_model(model, {"r": 4, "alpha": 8.0})
    assert all(m.lora_scale == 2.0 for m in lora.lora_modules(model).values())
    lora.apply_lora_to_model(model, {"r": 4, "alpha": 8.0, "rslora": True})
    assert all(m.lora_scale == 4.0 for m in lora.lora_modules(model).values())


def test_dropout_acts_before_a_or_after_b(model):
    for after in (False, True):
        lora.apply_lora_to_model(model, {"r": 2, "dropout": 0.5, "dropout_after": after})
        randomize(model)
        m = next(iter(lora.lora_modules(model).values()))
        m.train()
        x = torch.ones(1, m.in_features)
        torch.manual_seed(0)
        z = m(x) - torch.nn.functional.linear(x, m.weight, m.bias)
        assert (z == 0).any() == after  # dropping the update leaves exact zeros, dropping the input does not
        m.eval()
        assert torch.equal(m(x), m(x))


def test_on_off_strength_and_reset(model):
    before = loss(model)
    lora.apply_lora_to_model(model, {"r": 4, "alpha": 8.0})
    randomize(model)
    on = loss(model)
    assert abs(on - before) > 1e-3
    lora.set_lora_enabled(model, False)
    assert loss(model) == before
    lora.set_lora_strength(model, 0.5)
    assert loss(model) == before, "strength does not switch on what is off"
    lora.set_lora_enabled(model, True)
    half = loss(model)
    assert half not in (before, on)
    lora.set_lora_strength(model, 1.0)
    assert loss(model) == on
    lora.reset_lora_weights(model)
    assert loss(model) == before


def test_another_adapter_replaces_the_first_entirely(model, tmp_path):
    before = loss(model)
    adapter(model, tmp_path / "wide", 1)
    narrow = adapter(model, tmp_path / "narrow", 2, enable_lm=True)
    assert loss(model) == before
    lora.load_lora_weights(model, tmp_path / "wide")
    lora.set_lora_enabled(model, False)
    loaded, skipped = lora.load_lora_weights(model, tmp_path / "narrow")
    assert loss(model) == narrow and skipped == [] and len(loaded) == 2 * len(lora.lora_modules(model))


def test_several_adapters_are_stacked_with_their_strengths(model, tmp_path):
    adapter(model, tmp_path / "a", 1)
    adapter(model, tmp_path / "b", 2, r=2, enable_lm=True)
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    expected = {n: p.clone() for n, p in base.items()}
    for folder, strength in (("a", 0.75), ("b", -0.5)):
        raw = load_file(tmp_path / folder / "lora_weights.safetensors")
        scale = 8.0 / raw[next(k for k in raw if k.endswith("lora_A"))].shape[0]
        for k in raw:
            if k.endswith(".lora_A"):
                m = k.removesuffix(".lora_A")
                expected[m + ".weight"] += strength * scale * raw[m + ".lora_B"] @ raw[k]
    lora.load_lora_weights(model, [(tmp_path / "a", 0.75), (tmp_path / "b", -0.5)])
    lora.merge_lora_weights(model)
    assert all(torch.allclose(p, expected[n], atol=1e-6) for n, p in model.named_parameters())


def test_bias_trains_and_travels_but_merges_only_where_there_is_room(model, tmp_path):
    lora.apply_lora_to_model(model, {"r": 2, "bias": True, "enable_proj": True})
    randomize(model)
    value = loss(model)
    lora.save_lora_weights(model, tmp_path / "proj")
    lora.save_lora_weights(model, tmp_path / "peft", format="peft")
    lora.merge_lora_weights(model)
    assert abs(loss(model) - value) < 1e-4 * value
    fresh = models.load(model.path)
    for folder in ("proj", "peft"):
        lora.load_lora_weights(fresh, tmp_path / folder)
        assert abs(loss(fresh) - value) < 1e-5 * value
    lora.apply_lora_to_model(fresh, {"r": 2, "bias": True, "enable_lm": True})
    for merge in (lambda: lora.merge_lora_weights(fresh), lambda: fresh.save(tmp_path / "stuck", merged=True)):
        with pytest.raises(Invalid, match="lora.bias cannot be merged"):
            merge()


def test_what_is_no_number_is_refused(model, tmp_path):
    adapter(model, tmp_path / "a", 1, enable_lm=True)
    for strength in (float("nan"), float("inf")):
        with pytest.raises(Invalid, match="expected a number"):
            lora.load_lora_weights(model, [(tmp_path / "a", strength)])
    lora.load_lora_weights(model, tmp_path / "a")
    with pytest.raises(Invalid, match="expected a number"):
        lora.set_lora_strength(model, float("nan"))
    next(iter(lora.lora_modules(model).values())).lora_B.data.fill_(3e38)
    for merge in (lambda: lora.merge_lora_weights(model), lambda: model.save(tmp_path / "merged", merged=True)):
        with pytest.raises(Invalid, match="cannot be merged"):
            merge()


def test_the_dropout_of_an_adapter_comes_with_it(model, tmp_path):
    for name, dropout in (("a", 0.0), ("b", 0.5)):
        adapter(model, tmp_path / name, 1, enable_lm=True, dropout=dropout)
    for name, dropout in (("b", 0.5), ("a", 0.0)):
        lora.load_lora_weights(model, tmp_path / name)
        assert {m.lora_dropout for m in lora.lora_modules(model).values()} == {dropout}


def test_where_dropout_acts_comes_with_an_adapter_of_the_same_shape(model, tmp_path):
    adapter(model, tmp_path / "own", 1, enable_lm=True)
    lora.load_lora_weights(model, tmp_path / "own")
    lora.save_lora_weights(model, tmp_path / "peft", format="peft")
    for name, after in (("own", True), ("peft", False), ("own", True)):
        lora.load_lora_weights(model, tmp_path / name)
        assert {m.lora_after for m in lora.lora_modules(model).values()} == {after}


@pytest.mark.parametrize("words, why", [({"init_lora_weights": "pissa"}, "moves the base weights"), ({"alora_invocation_tokens": [1]}, "aLoRA"),
                                        ({"lora_alpha": float("nan")}, "lora_alpha is nan, expected a number")])
def test_peft_adapters_that_mean_something_else_are_refused(model, tmp_path, words, why):
    lora.apply_lora_to_model(model, {"r": 2, "enable_lm": True})
    lora.save_lora_weights(model, tmp_path / "p", format="peft")
    path = tmp_path / "p/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **words}))
    with pytest.raises(Invalid, match=why):
        lora.load_lora_weights(model, tmp_path / "p")


def test_modules_trained_in_full_are_switched_and_replaced_with_the_adapter(model, tmp_path):
    before = loss(model)
    lora.apply_lora_to_model(model, {"r": 2, "enable_lm": True, "train_embeddings": True, "train_modules": ["stop_head"]})
    randomize(model)
    model.base_lm.embed_tokens.weight.data += 0.1
    model.stop_head.weight.data *= 2
    value = loss(model)
    lora.save_lora_weights(model, tmp_path / "full")
    lora.set_lora_enabled(model, False)
    assert loss(model) == before
    lora.set_lora_enabled(model, True)
    assert loss(model) == value
    fresh = models.load(model.path)
    lora.load_lora_weights(fresh, tmp_path / "full")
    assert abs(loss(fresh) - value) < 1e-6 * value and not lora.state(fresh).tuned  # float32 holds them as they are
    half = models.load(model.path, dtype=torch.bfloat16)
    lora.load_lora_weights(half, tmp_path / "full")
    assert all(torch.equal(t, lora.get_lora_state_dict(fresh)[n]) for n, t in lora.get_lora_state_dict(half).items())  # nothing is rounded
    model.save(tmp_path / "merged", merged=True)
    assert abs(loss(models.load(tmp_path / "merged")) - value) < 1e-5 * value
    lora.apply_lora_to_model(fresh, {"r": 2})
    assert loss(fresh) == before, "a new adapter starts from the base, not from what another one left"


# ------------------------------------------------------------------------------------------------ other tools' files


def peft_folder(folder, model, config=None, extra=None, r=4):
    g = torch.Generator().manual_seed(3)
    tensors = {}
    for i in range(2):
        name = f"base_model.model.base_lm.layers.{i}.self_attn.q_proj."
        q = model.base_lm.layers[i].self_attn.q_proj
        tensors[name + "lora_A.weight"] = torch.randn(r, q.in_features, generator=g) * 0.1
        tensors[name + "lora_B.weight"] = torch.randn(q.out_features, r, generator=g) * 0.1
    folder.mkdir()
    save_file({**tensors, **(extra or {})}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 8, "target_modules": ["q_proj"], **(config or {})}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return tensors


def test_a_minimal_peft_folder_loads_with_its_patterns(model, tmp_path):
    tensors = peft_folder(tmp_path / "p", model, {"use_rslora": True, "alpha_pattern": {"layers.1.self_attn.q_proj": 2}})
    lora.load_lora_weights(model, tmp_path / "p")
    m = lora.lora_modules(model)
    assert list(m) == [f"base_lm.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert [float(x.lora_scale) for x in m.values()] == [4.0, 1.0]
    assert torch.equal(m["base_lm.layers.0.self_attn.q_proj"].lora_A, tensors["base_model.model.base_lm.layers.0.self_attn.q_proj.lora_A.weight"])


@pytest.mark.parametrize("config, extra, words", [
    ({"use_dora": True}, {}, "DoRA adapter"),
    ({}, {"base_model.model.base_lm.layers.0.self_attn.q_proj.lora_magnitude_vector": torch.ones(3)}, "DoRA magnitudes"),
    ({}, {"base_model.model.base_lm.embed_tokens.lora_embedding_A": torch.ones(3, 3)}, "LoRA on an embedding"),
    ({}, {"base_model.model.base_lm.layers.9.self_attn.q_proj.lora_A.weight": torch.ones(4, 48)}, "no such module"),
    ({}, {"base_model.model.base_lm.layers.2.self_attn.q_proj.lora_A.weight": torch.ones(4, 48)}, "only one of lora_A and lora_B"),
    ({"r": 8}, {}, "has rank 4, adapter_config.json says 8"),
    ({"lora_alpha": None}, {}, "does not say lora_alpha"),
    ({"peft_type": "LOHA"}, {}, "type LOHA"),
])
def test_what_is_not_plain_lora_is_refused_by_name_before_anything_changes(model, tmp_path, config, extra, words):
    before = loss(model)
    peft_folder(tmp_path / "p", model, config, extra)
    with pytest.raises(Invalid, match=words):
        lora.load_lora_weights(model, tmp_path / "p")
    assert loss(model) == before and not lora.lora_modules(model)


def test_an_adapter_without_its_config_is_refused_since_alpha_is_unknown(model, tmp_path):
    tiny_voxcpm.write_adapter(tmp_path / "a", "1.5")
    (tmp_path / "a" / "lora_config.json").unlink()
    with pytest.raises(Invalid, match="without lora_config.json, so its alpha is unknown"):
        lora.load_lora_weights(model, tmp_path / "a")


def test_an_adapter_records_its_base_and_another_base_is_an_error(model, base, tmp_path, capsys):
    adapter(model, tmp_path / "a", 1)
    other = models.load(base)
    other.fingerprint = "00000000"
    with pytest.raises(Invalid, match="trained on another base.*--ignore_base"):
        lora.load_lora_weights(other, tmp_path / "a")
    lora.load_lora_weights(other, tmp_path / "a", ignore_base=True)
    other.backbone = "another"
    with pytest.raises(Invalid, match="is an adapter for voxcpm, the model is another"):
        lora.load_lora_weights(other, tmp_path / "a")
    tiny_voxcpm.write_adapter(tmp_path / "foreign", "1.5")
    capsys.readouterr()
    lora.load_lora_weights(model, tmp_path / "foreign")
    assert "does not record its base" in capsys.readouterr().err


def test_nan_in_an_adapter_is_refused(model, tmp_path):
    tensors = peft_folder(tmp_path / "p", model)
    name = next(iter(tensors))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, tmp_path / "p" / "adapter_model.safetensors")
    with pytest.raises(Invalid, match="NaN or infinity"):
        lora.load_lora_weights(model, tmp_path / "p")


def test_peft_itself_gives_the_same_update_from_our_file(model, tmp_path):
    """PEFT around a plain module with the same names: its merged weights equal ours, and its file loads here."""
    peft = pytest.importorskip("peft")
    lora.apply_lora_to_model(model, {"r": 4, "alpha": 8.0, "enable_lm": True})
    randomize(model)
    lora.save_lora_weights(model, tmp_path / "ours", format="peft")
    plain = models.load(model.path)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    merged = theirs.merge_and_unload().state_dict()
    ours = model.published_state_dict(merged=True)
    assert all(torch.allclose(merged[k], v, atol=1e-5) for k, v in ours.items())
    changed = sum(float((v - plain.published_state_dict()[k]).abs().max()) > 0 for k, v in models.load(model.path).published_state_dict().items())
    assert changed == len(lora.lora_modules(model))
    again = models.load(model.path)
    lora.load_lora_weights(again, tmp_path / "theirs")
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(again.published_state_dict(merged=True).values(), ours.values()))


class Block(torch.nn.Module):
    """The least that adapters need of a model."""

    embeddings, lora_dropout_after, namings, backbone = (), False, ("published",), "block"
    fingerprint, native_adapter, adapter_namings = "1", "peft", {"peft": "published"}
    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))

    def published_name(self, name, naming=None):
        return name

    def published_rows(self, name, naming=None):
        return None


def block_with(folder, **ranks):
    """A Block and a folder for each adapter of it, {name: path}."""
    block, paths = Block(), {}
    for seed, (name, r) in enumerate(ranks.items()):
        lora.apply_lora_to_model(block, {"r": r, "target_modules": ["a", "b"]})
        randomize(block, seed)
        lora.save_lora_weights(block, folder / name)
        paths[name] = folder / name
    return block, paths


class Counter:
    """A backend of torch.compile that counts what it is given."""

    def __init__(self):
        torch.compiler.reset()
        self.compiled = 0

    def __call__(self, graph, inputs):
        self.compiled += 1
        return graph.forward


def test_switching_never_recompiles_and_another_rank_does_so_once(tmp_path):
    counter, x = Counter(), torch.randn(3, 8)
    block, paths = block_with(tmp_path, two=2, other=2, three=3)
    lora.load_lora_weights(block, paths["two"])
    block.requires_grad_(False)
    run = torch.compile(block, backend=counter)
    with torch.no_grad():
        run(x)
        first = counter.compiled
        lora.set_lora_enabled(block, False)
        off = run(x)
        lora.set_lora_enabled(block, True)
        lora.set_lora_strength(block, 0.3)
        assert not torch.equal(run(x), off)
        lora.reset_lora_weights(block)
        assert torch.equal(run(x), off)
        lora.load_lora_weights(block, paths["other"])
        assert not torch.equal(run(x), off)
        assert counter.compiled == first, "on, off, strength, reset and an adapter of the same shape"
        lora.load_lora_weights(block, paths["three"])
        block.requires_grad_(False)
        run(x)
        assert counter.compiled <= first + 1


# ------------------------------------------------------------------------------------------------ side by side


def live_tensors():
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def test_two_hundred_switches_between_resident_adapters_compile_nothing_and_leave_memory_flat(tmp_path):
    counter, x = Counter(), torch.randn(4, 8)
    block, paths = block_with(tmp_path, **{f"v{i}": 2 + i % 2 for i in range(8)})
    expected = []
    with torch.no_grad():
        for path in paths.values():
            lora.load_lora_weights(block, path)
            expected.append(block(x))
        lora.load_lora_slots(block, {**paths, "twice": [(paths["v0"], 0.5), (paths["v0"], 0.5)]})
        run = torch.compile(block, backend=counter, fullgraph=True)
        for places in ([0] * 4, [0, 1, 0, 1]):  # all rows alike, and two side by side
            with slots.acting(block, places):
                run(x)
        gc.collect()
        first, tensors = counter.compiled, live_tensors()
        for n in range(200):
            one, two = n % 8, (n // 8 + 3) % 8
            places = [one] * 4 if n % 3 else [one, two, two, one]
            with slots.acting(block, places):
                y = run(x)
            assert torch.allclose(y, torch.stack([expected[p][i] for i, p in enumerate(places)]), atol=1e-6)
        gc.collect()
        assert counter.compiled == first and live_tensors() <= tensors + 4 * slots.KEPT
        with slots.acting(block, [8]):
            assert torch.allclose(run(x), expected[0], atol=1e-6), "several folders under one name are added up"


def test_what_is_meant_for_one_adapter_is_refused_where_several_stand(tmp_path):
    block, paths = block_with(tmp_path, one=2, two=2)
    lora.load_lora_slots(block, paths)
    for act in (lambda: lora.set_lora_strength(block, 0.5), lambda: lora.save_lora_weights(block, tmp_path / "x"),
                lambda: lora.reset_lora_weights(block), lambda: lora.merge_lora_weights(block), lambda: block.a.merged("weight")):
        with pytest.raises(Invalid, match=r"several adapters side by side \(one, two\)"):
            act()
    lora.load_lora_weights(block, paths["one"])  # one takes their place
    assert slots.of(block) is None and block.a.lora_A.shape == (2, 8)
    lora.apply_lora_to_model(block, {"target_modules": ["a"], "bias": True})
    lora.save_lora_weights(block, tmp_path / "bias")
    with pytest.raises(Invalid, match="holds more than LoRA pairs, which cannot differ from row to row"):
        lora.load_lora_slots(block, {"x": tmp_path / "bias"})


NAMES = ("anna", None, "ben")
TEXTS = ("Hello there, good morning.", "Good.", "Hello.")
STEPS = {"diffusion_steps": 2, "inference_timesteps": 3}  # of a flow, where there is one


def voices(model, requests, **how):
    """What each request sounds like, and how often the first block of the model ran."""
    out, calls = [[] for _ in requests], []
    hook = model.blocks()[0].register_forward_hook(lambda *_: calls.append(1))
    for i, chunk in model.generate_batch(requests, **how):
        out[i].append(chunk)
    hook.remove()
    return [torch.cat(chunks) for chunks in out], len(calls)


def requests_of(model, tiny):
    """Of different lengths, with and without recordings where the backbone takes both."""
    asked = []
    for seed, text in enumerate(TEXTS):
        clip = torch.sin(torch.arange(round(model.sample_rate * (0.3 + 0.2 * seed))) / 20)
        prompts = [("Good.", clip, None)] if seed % 2 else []
        if hasattr(tiny, "prompts"):
            prompts = tiny.prompts(model)
        asked.append(dict(text=text, prompts=prompts, seed=seed))
    return asked


@pytest.mark.parametrize("name", sorted(models.backbones()))
def test_a_batch_that_mixes_adapters_equals_single_runs_with_one_forward_per_step(tmp_path, name):
    tiny = importlib.import_module(f"tests.tiny_{name}")
    tiny.write(tmp_path / "base", sorted(tiny.VARIANTS)[-1])
    model = models.load(tmp_path / "base")
    every = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    for seed, who in enumerate(("anna", "ben")):  # on every layer, so that no row of any shape can be mistaken
        lora.apply_lora_to_model(model, {"r": 4, "target_modules": every[seed:]})
        randomize(model, seed)
        lora.save_lora_weights(model, tmp_path / who)
    fields = [f.name for f in dataclasses.fields(models.backbones()[name].Sampling)]
    how = dict(max_len=4, min_len=4, **{key: steps for key, steps in STEPS.items() if key in fields})
    asked = requests_of(model, tiny)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a take met its cap
        single = []
        for request, who in zip(asked, NAMES):
            lora.remove_lora(model) if who is None else lora.load_lora_weights(model, tmp_path / who)
            single += voices(model, [request], **how)[0]
        lora.load_lora_slots(model, {who: tmp_path / who for who in ("anna", "ben")})
        mixed, forwards = voices(model, [dict(r, lora=who) for r, who in zip(asked, NAMES)], **how)
        uniform = {who: voices(model, [dict(r, lora=who) for r in asked], **how) for who in set(NAMES)}
    assert {count for _, count in uniform.values()} == {forwards}, "a mixed batch runs as often as one of a single adapter"
    for i, who in enumerate(NAMES):
        assert torch.equal(mixed[i], uniform[who][0][i]), "no row depends on its neighbours"
        assert not torch.equal(mixed[i], uniform["ben" if who is None else None][0][i])
        if name == "voxcpm":  # no codes, so the last bits hang on how many rows a product has, adapters or not
            assert torch.allclose(mixed[i], single[i], atol=1e-3)
        else:
            assert torch.equal(mixed[i], single[i])
    with pytest.raises(Invalid, match="lora 'carl': no adapter is loaded under this name; there are anna, ben"):
        voices(model, [dict(asked[0], lora="carl")])


def test_a_merged_folder_has_the_dtypes_of_the_base(base, tmp_path):
    model = models.load(base, dtype=torch.bfloat16)
    lora.apply_lora_to_model(model, {"r": 2, "enable_lm": True, "train_embeddings": True})
    model.save(tmp_path / "merged", merged=True)
    assert {v.dtype for v in load_file(tmp_path / "merged" / "model.safetensors").values()} == {torch.bfloat16}
