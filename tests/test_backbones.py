"""What must hold for every backbone: a new one joins by tests/tiny_<name>.py with VARIANTS and write(folder, variant)."""
import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch

import lora
import models
from models.parts.sampling import LeftPadded, Speaking
from tests.conftest import ROOT

CASES = [(name, variant) for name in sorted(models.backbones())
         for variant in importlib.import_module(f"tests.tiny_{name}").VARIANTS]
LORA = {"r": 4, "alpha": 8.0}


@pytest.fixture(scope="module", params=CASES, ids=lambda c: "-".join(c))
def folder(request, tmp_path_factory):
    name, variant = request.param
    path = tmp_path_factory.mktemp("-".join(request.param)) / "base"
    importlib.import_module(f"tests.tiny_{name}").write(path, variant)
    return path


@pytest.fixture
def model(folder):
    return models.load(folder)


def wave(model, seconds, pitch=220):
    t = torch.arange(int(seconds * model.sample_rate)) / model.sample_rate
    g = torch.Generator().manual_seed(pitch)
    return 0.3 * torch.sin(6.2832 * pitch * t) + 0.05 * torch.randn(len(t), generator=g)


def prompts(model):
    """What every request of this backbone needs: a recording, where the voice is always taken from one."""
    needed = getattr(importlib.import_module(f"tests.tiny_{model.backbone}"), "prompts", None)
    return needed(model) if needed else ()


def examples(model, *seconds):
    texts = ["Hello there, how are you?", "Good.", "A third sentence, longer than the others are.", "Four words make this."]
    return [model.encode({"audio": model.encode_audio(wave(model, s, 200 + 30 * i)), "text": texts[i % 4]}) for i, s in enumerate(seconds)]


def losses(model, batch):
    return {k: v for k, v in model(batch).items() if k.startswith("loss/")}


def gradients(model, micro):
    """Gradients of the mean losses of micro-batches, as the training script weighs them."""
    model.zero_grad()
    total = {k: sum(c[k] for _, c in micro) for k in micro[0][1]}
    for batch, _ in micro:
        sum(v / max(total[k], 1) for k, v in losses(model, batch).items()).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(a, b, tolerance):
    assert a.keys() == b.keys() and a
    scale = max(float(v.abs().max()) for v in b.values())
    for k in a:
        assert torch.allclose(a[k], b[k], rtol=tolerance, atol=tolerance * scale), k


def perturb(model, std=0.05):
    g = torch.Generator().manual_seed(0)
    for _, m in sorted(lora.lora_modules(model).items()):
        m.lora_A.data = torch.randn(m.lora_A.shape, generator=g) * m.in_features**-0.5
        m.lora_B.data = torch.randn(m.lora_B.shape, generator=g) * std


# ------------------------------------------------------------------------------------------------ the contract


def contract():
    """{section: {name: its arguments, None for a value}} of the docstring of models/__init__.py."""
    sections = {}
    for line in models.__doc__.split("\n"):
        if head := re.match(r"The (file|model, \w+)\b.*:$", line):
            entries = sections.setdefault(head[1], {})
        elif entry := re.match(r"  (\w+)(\([\w, ]*\))?($|  +\S)", line):
            arguments = entry[2] and tuple(re.findall(r"\w+", entry[2]))
            entries[entry[1]] = arguments
    return sections


CONTRACT = contract()
FILE, OPTIONAL = CONTRACT["file"], CONTRACT["model, only"]
MODEL = {**CONTRACT["model, values"], **CONTRACT["model, calls"], **CONTRACT["model, set"]}
USERS = [Path(ROOT) / f for f in ("train.py", "infer.py", "prepare_data.py", "merge_lora.py", "validate.py", "bench.py", "lora.py")]
USERS += [p for p in sorted(Path(ROOT).glob("models/parts/*.py")) if p.stem not in ("tokenizer", "sentencepiece")]  # theirs is BPE


def assert_keeps(thing, promised, where):
    for name, arguments in promised.items():
        assert hasattr(thing, name), f"{where} lacks {name}"
        if arguments is not None:
            signature = inspect.signature(getattr(thing, name)).parameters.values()
            found = tuple(p.name for p in signature if p.kind is not p.VAR_KEYWORD)
            assert found == arguments, f"{where}: {name}{found}, the contract says {arguments}"


def test_the_contract_can_be_read():
    assert set(CONTRACT) == {"file", "model, values", "model, calls", "model, set", "model, only"}
    assert len(FILE) == 8 and len(MODEL) > 40 and MODEL["encode"] == ("row",) and MODEL["frame_rate"] is None


@pytest.mark.parametrize("name", sorted(models.backbones()))
def test_the_file_of_a_backbone_keeps_the_contract(name):
    assert_keeps(models.backbones()[name], FILE, f"models/{name}.py")


def test_a_loaded_model_keeps_the_contract(model):
    assert_keeps(model, MODEL, type(model).__name__)
    assert_keeps(model, {k: v for k, v in OPTIONAL.items() if hasattr(model, k)}, type(model).__name__)
    assert model.native_adapter in model.adapter_namings and set(model.adapter_namings.values()) <= set(model.namings)
    assert "tokenizer" in model.files and all(path.is_file() for path in model.files.values())


@pytest.mark.parametrize("name", sorted(models.backbones()))
def test_a_blank_model_keeps_the_contract(name):
    model = models.backbones()[name].blank("tiny", "", "cpu", torch.float32)
    assert_keeps(model, MODEL, f"a blank {name}")


def of_a_model(node):
    """Is this expression the model, as scripts and parts name it?"""
    return ast.unparse(node) in ("model", "self.model")


def test_what_scripts_and_parts_use_is_in_the_contract():
    known = {**MODEL, **OPTIONAL}
    foreign = []
    for path in filter(Path.exists, USERS):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            asked = None
            if isinstance(node, ast.Attribute) and of_a_model(node.value):
                asked = node.attr
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr") and of_a_model(node.args[0]):
                asked = getattr(node.args[1], "value", None)  # None: a name that the script has in a variable
            if asked and asked not in known and not hasattr(torch.nn.Module(), asked):
                foreign.append(f"{path.name} line {node.lineno}: model.{asked}")
            file = isinstance(node, ast.Attribute) and ast.unparse(node.value)
            if file == "backbone" or file and file.startswith("models.find("):
                if node.attr not in FILE:
                    foreign.append(f"{path.name} line {node.lineno}: {file}.{node.attr}")
    assert not foreign, "not in the docstring of models/__init__.py: " + "; ".join(foreign)


def test_what_is_set_from_outside_is_in_the_contract():
    """An attribute that a script sets in passing is one that a model made another way lacks."""
    allowed = {*CONTRACT["model, set"], "lora_state"}
    backbones = [Path(ROOT) / f"models/{name}.py" for name in models.backbones()]
    foreign = []
    for path in [p for p in USERS + backbones + [Path(models.__file__)] if p.exists()]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and of_a_model(node.value):
                if node.attr not in allowed:
                    foreign.append(f"{path.name} line {node.lineno}: model.{node.attr} = ..")
    assert not foreign, "; ".join(foreign)


def reads(cls):
    """Names of the attributes that the methods of a class read from self."""
    tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(cls)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and ast.unparse(node.value) == "self":
            yield node.attr


@pytest.mark.parametrize("name", sorted(models.backbones()))
def test_what_a_method_reads_exists_from_the_start(name):
    backbone = models.backbones()[name]
    family = [c for c in vars(backbone).values() if isinstance(c, type) and issubclass(c, torch.nn.Module) and c.__module__ == backbone.__name__]
    whole = [c for c in family if getattr(c, "backbone", None) == name]
    assert len(whole) == 1
    missing = set()
    for part in whole[0](backbone.TINY).modules():
        if type(part) in family:
            there = {*vars(part), *part._parameters, *part._buffers, *part._modules}
            missing |= {f"{type(part).__name__}.{n}" for n in reads(type(part)) if n not in there and not hasattr(type(part), n)}
    assert not missing, f"no value after __init__: {sorted(missing)}"


# ------------------------------------------------------------------------------------------------ speaking together


def test_prompts_end_at_the_same_column_and_go_on_from_there():
    batch = LeftPadded([3, 5], steps=2, device=torch.device("cpu"))
    rows = batch.stack([torch.tensor([[1], [2], [3]]), torch.tensor([[4], [5], [6], [7], [8]])])
    assert rows[..., 0].tolist() == [[0, 0, 1, 2, 3], [4, 5, 6, 7, 8]] and batch.columns == 7
    prompt = batch.prompt()
    assert prompt.positions[:, 0].tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]] and prompt.column.tolist() == [0, 1, 2, 3, 4]
    assert prompt.mask[0, 0].int().tolist() == [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert torch.equal(prompt.mask[1, 0], torch.ones(5, 5).tril().bool())
    step = batch.step(1)
    assert step.positions.flatten().tolist() == [4, 6] and step.column.tolist() == [6]
    assert step.mask[:, 0, 0].int().tolist() == [[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]]
    batch.keep(torch.tensor([1]))
    step = batch.step(0)
    assert step.positions.flatten().tolist() == [5] and step.mask[:, 0, 0].int().tolist() == [[1, 1, 1, 1, 1, 1, 0]]


def test_who_ends_or_meets_the_cap_leaves():
    speaking = Speaking([9, 2, 9])
    assert speaking.after(0, [False, False, False]) is None and speaking.requests == [0, 1, 2]
    assert speaking.after(1, [False, False, True]) == [0] and speaking.requests == [0]
    assert speaking.after(2, [True]) == [] and not speaking.requests
    assert speaking.finish == ["end", "cap", "end"]


# ------------------------------------------------------------------------------------------------ properties


def test_who_speaks_in_inference_mode_can_train_afterwards(model):
    with torch.inference_mode():
        spoken = list(model.generate("Hello there.", prompts(model), seed=1, max_len=3))
    assert sum(map(len, spoken)) > 100
    sum(losses(model, model.collate(examples(model, 0.9), seeds=[7])[0]).values()).backward()
    assert any(p.grad is not None for p in model.parameters())


def test_padding_changes_nothing(model):
    short = examples(model, 0.9)[0]
    alone, counts = model.collate([short], seeds=[7])
    alone = model(alone)
    for more in (1, 7, 64):
        other = examples(model, 0.9 + more * 0.16)[0]
        both, both_counts = model.collate([short, other], seeds=[7, 8])
        both, second = model(both), model(model.collate([other], seeds=[8])[0])
        for k in alone:
            assert torch.allclose(both[k], alone[k] + second[k], rtol=1e-5), k
        assert both_counts["loss/" + list(counts)[0].split("/")[1]] > counts[list(counts)[0]]


def test_one_batch_equals_four_micro_batches(model):
    model.requires_grad_(True)
    clips, seeds = examples(model, 0.5, 1.3, 0.8, 2.0, 0.6, 1.1, 0.9, 1.6), list(range(8))
    whole = gradients(model, [model.collate(clips, seeds)])
    parts = gradients(model, [model.collate(clips[i : i + 2], seeds[i : i + 2]) for i in range(0, 8, 2)])
    assert_same(parts, whole, 1e-5)


def test_counts_of_a_batch_are_the_sums_of_its_parts(model):
    clips = examples(model, 0.7, 1.4)
    _, both = model.collate(clips, [1, 2])
    parts = [model.collate([c], [s])[1] for c, s in zip(clips, (1, 2))]
    assert both == {k: parts[0][k] + parts[1][k] for k in both}


def test_draws_depend_on_the_row_and_its_seed_only(model):
    a, b = examples(model, 0.7, 1.4)
    first = losses(model, model.collate([a], [5])[0])
    assert first == losses(model, model.collate([a], [5])[0])
    fixed, again = (losses(model, model.collate([a, b])[0]) for _ in range(2))
    assert fixed == again


def test_what_is_saved_is_what_was_loaded(model, tmp_path):
    again = models.load(model.save(tmp_path / "copy"))
    a, b = model.published_state_dict(), again.published_state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert again.fingerprint == model.fingerprint


def test_a_fresh_adapter_changes_nothing(model):
    batch, _ = model.collate(examples(model, 0.8), [1])
    before = model(batch)
    assert lora.apply_lora_to_model(model, LORA)
    after = model(batch)
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_only_adapter_parameters_get_gradients(model):
    lora.apply_lora_to_model(model, LORA)
    perturb(model)
    got = gradients(model, [model.collate(examples(model, 0.8, 1.5), [1, 2])])
    assert set(got) == {n for n, _ in model.named_parameters() if ".lora_" in n}
    assert all(g.abs().max() > 0 for g in got.values())


def test_merged_equals_unmerged(model, tmp_path):
    batch, _ = model.collate(examples(model, 0.8, 1.5), [1, 2])
    base = losses(model, batch)
    lora.apply_lora_to_model(model, LORA)
    perturb(model)
    adapted = losses(model, batch)
    model.save(tmp_path / "merged", merged=True)
    saved = losses(models.load(tmp_path / "merged"), batch)
    assert losses(model, batch) == adapted  # saving left the model as it was
    lora.merge_lora_weights(model)
    merged = losses(model, batch)
    assert not lora.lora_modules(model)
    for k in base:
        assert torch.allclose(merged[k], adapted[k], rtol=1e-5) and torch.allclose(saved[k], adapted[k], rtol=1e-5)
    assert max(float((adapted[k].detach() / base[k].detach() - 1).abs()) for k in base) > 100 * 1e-5


def test_adapters_survive_saving_in_every_format(model, folder, tmp_path):
    batch, _ = model.collate(examples(model, 0.8), [1])
    lora.apply_lora_to_model(model, LORA)
    perturb(model)
    adapted = losses(model, batch)
    for kind in ("native", *model.adapter_namings):
        lora.save_lora_weights(model, tmp_path / kind, format=kind)
        other = models.load(folder)
        loaded, skipped = lora.load_lora_weights(other, tmp_path / kind)
        assert len(loaded) == 2 * len(lora.lora_modules(model)) and not skipped
        now = losses(other, batch)
        assert all(torch.allclose(now[k], adapted[k], rtol=1e-6) for k in now), kind


def test_chunks_joined_are_the_whole(model):
    n = 9 + getattr(model.codec, "context", (0, 0))[1]  # some codecs look so many frames ahead
    whole = torch.cat(list(model.generate("Hello there.", prompts(model), seed=1, max_len=n, min_len=n - 1)))
    batch = {0: [], 1: []}
    texts = {1: "Hello there.", 2: "Another sentence that is longer."}
    requests = [dict(text=text, prompts=prompts(model), seed=seed) for seed, text in texts.items()]
    for i, chunk in model.generate_batch(requests, max_len=n, min_len=n - 1):
        batch[i].append(chunk)
    assert len(batch[0]) > 1, "the first chunk comes before the end"
    assert torch.allclose(torch.cat(batch[0]), whole, atol=1e-4)
    assert len(model.finish) == 2 and set(model.finish) <= {"end", "cap"}


def test_frames_replay_with_a_seed(model):
    a, b, c = (torch.stack([f.float() for f in model.frames("Hello there.", prompts(model), seed=s, max_len=5, min_len=4)]) for s in (3, 3, 4))
    assert torch.equal(a, b) and 5 in (a.shape[0], a.numel())  # frames, or one segment of codes
    assert not torch.equal(a, c)


def test_encoding_and_decoding_keep_the_length(model):
    n = int(1.03 * model.sample_rate)
    back = model.codec.decode(model.codec.encode(wave(model, 1.03)))
    seconds = len(back) / model.out_sample_rate
    assert n / model.sample_rate <= seconds + 1e-6 < n / model.sample_rate + 0.1


def test_overfits_two_clips(model):
    """Three steps lower the loss, fifty bring it far below its start."""
    model.requires_grad_(True)
    model.train()
    clips = examples(model, 0.6, 0.9)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    seen = []
    for _ in range(50):
        batch, counts = model.collate(clips, [1, 2])
        loss = sum(v / counts[k] for k, v in losses(model, batch).items())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert seen[3] < seen[0] and seen[-1] < 0.7 * seen[0]


def test_every_tensor_of_the_checkpoint_acts(model, folder):
    """Noise on any one weight changes a loss or what is generated; what changes nothing would be on the known-unused list."""
    clips = examples(model, 0.8)
    batch, _ = model.collate(clips, [1])

    def outcome():
        with torch.no_grad():
            return [v.item() for v in losses(model, batch).values()]

    before = outcome()
    idle = []
    for name, p in model.named_parameters():
        kept = p.detach().clone()
        p.data += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) * (kept.std() if kept.numel() > 1 else 1)
        if outcome() == before:
            idle.append(name)
        p.data = kept
    assert not [n for n in idle if not any(n.startswith(k) for k in getattr(model, "idle_in_losses", ()))]


def test_foreign_folders_are_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "something_else", "hidden": 3}')
    with pytest.raises(models.Invalid, match="no backbone recognizes it.*model_type"):
        models.load(tmp_path)
    with pytest.raises(models.Invalid, match="no checkpoint at"):
        models.load(Path(tmp_path) / "nowhere")
    with pytest.raises(models.Invalid, match="hf download org/none"):
        models.load("org/none")
