"""CSM against transformers on tiny random checkpoints, and the properties that are its own."""
import json
import math
import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import lora
import models
from models import csm
from models.parts import Invalid, audio, targets
from models.parts.depth_steps import DepthSteps
from models.parts.layers import Context
from tests import conftest, tiny_csm
from tests.running import start

LAYOUTS = Path(conftest.ROOT).parent / "shared/layouts"
K = 8


def load(folder, **options):
    return models.load(folder, options=options)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("csm")
    return {"transformers": tiny_csm.write(root / "t", shards=2), "original": tiny_csm.write(root / "o", "original", codec="moshi"),
            "mlx": tiny_csm.write(root / "m", "mlx", codec="transformers")}


@pytest.fixture(scope="session")
def model(folders):
    return load(folders["transformers"], amortize=1)


@pytest.fixture(scope="session")
def hf(folders):
    transformers = pytest.importorskip("transformers")
    return transformers.CsmForConditionalGeneration.from_pretrained(folders["transformers"], attn_implementation="sdpa").eval()


def noise(n, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)) * 0.5


def codes(T, seed=0, k=K):
    return torch.randint(0, 32, (k, T), generator=torch.Generator().manual_seed(seed), dtype=torch.int16)


ROWS = [{"audio": noise(1920 * 9 - 500), "text": "Hello there, the cat", "speaker": 1},
        {"audio": noise(1920 * 5, 1), "text": "in it", "speaker": 0}]


def for_transformers(model, row, skip=()):
    """Inputs of CsmForConditionalGeneration for one row; frames in `skip` are labelled -101, so the depth decoder leaves them out."""
    ids = torch.tensor(model.encode_text(row["text"], row["speaker"]))
    T = -(-len(row["audio"]) // 1920)
    whole = F.pad(row["audio"], (0, T * 1920 - len(row["audio"])))
    ids = torch.cat([ids, torch.full((T,), 312), torch.tensor([313])])
    labels = torch.where((ids == 312) | (ids == 313), ids, -100)
    for t in skip:
        labels[len(ids) - T - 1 + t] = -101
    return dict(input_ids=ids[None], input_values=whole[None, None], input_values_cutoffs=torch.tensor([[T * 1920]]), labels=labels[None])


# ------------------------------------------------------------------------------------------------ files


@pytest.mark.skipif(not LAYOUTS.exists(), reason="the lists of published tensors are not here")
def test_every_published_tensor_has_its_place_at_real_shapes():
    flavors = csm.FLAVORS
    with torch.device("meta"):
        model = csm.CSM(csm.Config(flavors["llama-1B"], flavors["llama-100M"], 128256, 2051, 32, {}))
    for naming in csm.CSM.namings:
        layout = json.loads((LAYOUTS / f"csm-1b-{naming}.json").read_text())
        ours = {model.published_name(n, naming): list(p.shape) for n, p in model.named_parameters()}
        if naming == "transformers":
            assert ours.pop(csm.TIED[0]) == layout.pop(csm.TIED[0])[0] == layout.pop(csm.TIED[1])[0]
            assert len([n for n in layout if n.startswith("codec_model.")]) == 350
        assert ours == {n: shape for n, (shape, _) in layout.items() if not n.startswith("codec_model.")}
        shapes = {csm.renamed(csm.renamed(n, naming, back=True), "mlx"): tuple(s) for n, (s, _) in layout.items()}
        flavour_only = {"backbone_flavor": "llama-1B", "decoder_flavor": "llama-100M"}
        assert csm.read_config(flavour_only, shapes, "") == model.config or naming == "transformers"


def test_the_three_namings_are_one_model(folders, model):
    state, others = model.state_dict(), [load(folders[n]) for n in ("original", "mlx")]
    for other in others:
        assert all(torch.equal(state[n], x) for n, x in other.state_dict().items())
        assert (other.fingerprint, other.codec_key) == (model.fingerprint, model.codec_key)
        assert other.length(other.encode(ROWS[0])) == model.length(model.encode(ROWS[0]))
    assert [m.naming for m in (model, *others)] == ["transformers", "original", "mlx"]


@pytest.mark.parametrize("naming", csm.CSM.namings)
def test_published_state_is_the_file(folders, model, naming):
    c = tiny_csm.config()
    wanted = tiny_csm.main_weights(c)
    if naming == "transformers":
        wanted |= {f"codec_model.{n}": w for n, w in tiny_csm.codec_weights(c).items() if not n.endswith("initialized")}
    else:
        wanted = tiny_csm.other_naming(wanted, c, naming)
    got = {n: w for n, w in model.published_state_dict(naming).items() if not n.endswith("initialized")}
    assert got.keys() == wanted.keys() and all(torch.equal(got[n], w) for n, w in wanted.items())


@pytest.mark.parametrize("naming", csm.CSM.namings)
def test_a_saved_folder_loads_again(folders, model, naming, tmp_path):
    model.save(tmp_path, naming)
    again = load(tmp_path)
    assert again.naming == naming and (again.fingerprint, again.codec_key) == (model.fingerprint, model.codec_key)
    assert again.encode_text("the cat") == model.encode_text("the cat")
    assert all(torch.equal(x, again.state_dict()[n]) for n, x in model.state_dict().items())


def test_a_folder_that_names_only_flavours_is_saved_for_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    heads = dict(num_attention_heads=32, num_key_value_heads=8, head_dim=2, hidden_size=24,
                 depth=dict(num_attention_heads=8, num_key_value_heads=2, head_dim=4, hidden_size=16))
    one = load(tiny_csm.write(tmp_path / "o", "original", codec="moshi", stated=False, **heads))
    assert one.config.backbone.head_dim == 2 and one.config.backbone.rope_scaling["factor"] == 32 and one.config.num_codebooks == K
    one.save(tmp_path / "t", "transformers")
    hf = transformers.CsmForConditionalGeneration.from_pretrained(tmp_path / "t").eval()
    want = hf(**for_transformers(one, dict(ROWS[1], audio=F.pad(ROWS[1]["audio"], (0, 0)))))
    one.training_options.amortize = 1
    batch, counts = one.collate([one.encode(ROWS[1])])
    out = one(batch)
    # Without codec settings Mimi has eight heads and a window of 250, as the published one; transformers reads what was saved.
    assert float(out["loss/semantic"]) / counts["loss/semantic"] == pytest.approx(float(want.backbone_loss), rel=1e-5)
    assert float(out["loss/acoustic"]) / counts["loss/acoustic"] == pytest.approx(float(want.depth_decoder_loss), rel=1e-5)


MISO = {"llama-8B": (4096, 14336, 32, 32, 8), "llama-300M": (1536, 6912, 8, 24, 6)}  # width, ffn, layers, heads, groups, as MisoLabs published them


def tower_shapes(prefix, width, ffn, layers, heads, groups):
    """{mlx name: shape} of what tells the sizes of a tower."""
    size = width // heads
    out = {f"{prefix}.norm.weight": (width,)}
    for i in range(layers):
        layer = f"{prefix}.layers.{i}."
        out |= {layer + "self_attn.q_proj.weight": (heads * size, width), layer + "self_attn.k_proj.weight": (groups * size, width), layer + "mlp.gate_proj.weight": (ffn, width)}
    return out


@pytest.mark.parametrize("raw", [{}, {"backbone_flavor": "llama-8B", "decoder_flavor": "llama-300M"}])
def test_the_sizes_of_misotts_are_told_by_its_tensors_or_by_name(raw):
    backbone, decoder = MISO.values()
    shapes = {**tower_shapes("backbone", *backbone), **tower_shapes("decoder", *decoder), "audio_embeddings.weight": (32 * 2051, 4096)}
    for known in (shapes, {}) if raw else (shapes,):
        c = csm.read_config(raw, known, "config.json")
        for tower, (width, ffn, layers, heads, groups) in ((c.backbone, backbone), (c.depth_decoder_config, decoder)):
            assert (tower.hidden_size, tower.intermediate_size, tower.num_hidden_layers, tower.num_attention_heads, tower.num_key_value_heads, tower.head_dim) == \
                (width, ffn, layers, heads, groups, width // heads) and tower.rope_scaling["factor"] == 32 and tower.max_position_embeddings == 2048
        assert (c.text_vocab_size, c.vocab_size, c.num_codebooks, c.speaker_blank) == (128256, 2051, 32, True)
    fewer = csm.read_config({}, {**tower_shapes("backbone", 4096, 100, 3, 32, 8), **tower_shapes("decoder", *decoder)}, "")  # sizes are the tensors', heads the flavour's
    assert (fewer.backbone.num_hidden_layers, fewer.backbone.intermediate_size, fewer.backbone.num_attention_heads) == (3, 100, 32)


@pytest.mark.parametrize("heads, width, words", [((32, 8), 64, r"does not say backbone_flavor, and its tensors \(64 wide, 64 rows of q, 16 of k\) fit the heads of llama-1B and llama-100M"),
                                                 ((5, 5), 65, "fit the heads of none. Write a config.json there")])
def test_tensors_that_fit_two_flavours_or_none_are_refused(heads, width, words):
    with pytest.raises(Invalid, match=words):
        csm.read_config({}, tower_shapes("backbone", width, 96, 2, *heads), "config.json")


def test_a_flavour_that_is_not_that_of_the_tensors_is_refused():
    names = {"backbone_flavor": "llama-1B", "decoder_flavor": "llama-100M"}
    with pytest.raises(Invalid, match="decoder_flavor is llama-100M, but its tensors .* are those of llama-300M"):
        csm.read_config(names, tower_shapes("decoder", *MISO["llama-300M"]), "config.json")


def test_a_checkpoint_of_misotts_form_comes_without_a_config(tmp_path):
    """A tiny one in its form: one float32 file of the original naming, no config.json; only the decoder's 24 heads are told by the rows."""
    small = dict(num_attention_heads=32, num_key_value_heads=8, head_dim=2, hidden_size=24, depth=dict(num_attention_heads=24, num_key_value_heads=6, head_dim=4, hidden_size=16))
    folder = tiny_csm.write(tmp_path / "miso", "original", codec="moshi", stated=False, backbone_flavor="llama-8B", decoder_flavor="llama-300M", **small)
    one = load(folder)
    assert (one.config.depth_decoder_config.num_attention_heads, one.config.depth_decoder_config.num_key_value_heads) == (24, 6)
    plain = one.tokenizer.encode("[3] Hello.")
    assert one.encode_text("Hello.", 3) == [one.bos, *plain, one.eos]
    again = load(one.save(tmp_path / "again", "transformers"))
    assert again.config.speaker_blank and again.encode_text("Hello.", 3) == one.encode_text("Hello.", 3) and again.encode_key == one.encode_key
    assert again.fingerprint == one.fingerprint and json.loads((tmp_path / "again/config.json").read_text())["decoder_flavor"] == "llama-300M"
    other = load(tiny_csm.write(tmp_path / "sesame", "original", codec="moshi", stated=False, **{**small, "depth": dict(num_attention_heads=8, num_key_value_heads=2, head_dim=4, hidden_size=16)}))
    assert other.encode_text("Hello.", 3) != one.encode_text("Hello.", 3) and other.encode_key != one.encode_key
    (folder / "config.json").unlink()
    with pytest.raises(Invalid, match="fit the heads of llama-1B and llama-100M"):
        load(folder)
    eight = dict(num_attention_heads=8, num_key_value_heads=2, head_dim=2)  # the only heads that such narrow rows fit
    stated = load(tiny_csm.write(tmp_path / "eight", "original", codec="moshi", **eight, hidden_size=24, depth={**eight, "hidden_size": 16}))
    (tmp_path / "eight/config.json").unlink()
    bare = models.load(tmp_path / "eight")
    assert bare.fingerprint == stated.fingerprint and bare.encode_text("Hello.", 3) == stated.encode_text("Hello.", 3)
    for ours, theirs in ((bare.config.backbone, stated.config.backbone), (bare.config.depth_decoder_config, stated.config.depth_decoder_config)):
        assert (ours.hidden_size, ours.num_hidden_layers, ours.head_dim) == (theirs.hidden_size, theirs.num_hidden_layers, theirs.head_dim)


@pytest.mark.parametrize("tied", ["backbone", "depth"])
def test_one_of_the_two_tied_names_is_enough(tied, model, tmp_path):
    other = load(tiny_csm.write(tmp_path, tied=tied))
    assert other.fingerprint == model.fingerprint


def test_what_does_not_fit_is_refused(tmp_path, folders):
    from safetensors.torch import load_file, save_file

    folder = tiny_csm.write(tmp_path / "a", shards=1)
    file = folder / "transformers-00001-of-00001.safetensors"
    weights = load_file(file)
    save_file({**weights, csm.TIED[1]: weights[csm.TIED[1]] + 1}, file)
    with pytest.raises(Invalid, match="differ, but the two towers share one table"):
        load(folder)
    save_file({**weights, "bridge.weight": torch.zeros(2)}, file)
    (folder / "transformers.safetensors.index.json").unlink()
    file.rename(folder / "model.safetensors")
    with pytest.raises(Invalid, match="unexpected bridge.weight"):
        load(folder)
    with pytest.raises(Invalid, match="tie_codebooks_embeddings"):
        load(tiny_csm.write(tmp_path / "b", tie_codebooks_embeddings=False))
    with pytest.raises(Invalid, match="holds no Mimi codec.*kyutai/mimi"):
        load(tiny_csm.write(tmp_path / "c", "original", codec="none"))
    with pytest.raises(Invalid, match="no CSM weights in naming 'mlx'.*original"):
        models.load(folders["original"], weights="mlx")
    whole = models.load(tmp_path / "c", extra={"codec": folders["original"] / csm.CODEC_FILE})
    assert whole.codec_key == load(folders["original"]).codec_key


def test_the_codec_beside_the_original_may_lie_in_the_transformers_shards(tmp_path, model):
    folder = tiny_csm.write(tmp_path, "original", codec="none")
    tiny_csm.write(tmp_path)
    assert models.load(folder, weights="original").naming == "original"
    assert models.load(folder, weights="transformers").naming == "transformers"
    assert models.load(folder, weights="original").codec_key == model.codec_key


def test_scratch_draws_what_the_flavours_say(tmp_path, folders):
    one = models.load(folders["transformers"], weights="scratch")
    assert one.fingerprint != models.load(folders["transformers"]).fingerprint
    assert one.state_dict().keys() == models.load(folders["transformers"]).state_dict().keys()
    assert set(one.published_state_dict("original")) == set(models.load(folders["original"]).published_state_dict("original"))
    with torch.device("meta"):
        assert csm.CSM(csm.read_config({"backbone_flavor": "llama-1B", "decoder_flavor": "llama-100M"}, {}, "")).config.backbone.num_hidden_layers == 16


# ------------------------------------------------------------------------------------------------ rows


def test_rows_of_a_turn_are_text_frames_and_an_end_frame(model):
    ids = model.encode_text("Hello <|AUDIO|>", 7)
    plain = [310, *model.tokenizer.encode("[7]Hello <|AUDIO|>"), 311]
    assert ids == plain and 312 not in ids  # markup in the text is text
    assert model.encode_text("x") == model.encode_text("x", 0) == model.encode_text("x", "0")
    c = codes(4)
    e = model.encode({"audio": c, "text": "the cat", "speaker": 3})
    ids = model.encode_text("the cat", 3)
    S = len(ids)
    assert e["rows"][:S, K].tolist() == ids and not e["rows"][:S, :K].any()
    assert torch.equal(e["rows"][S : S + 4, :K], c.T.long()) and not e["rows"][S + 4].any() and not e["rows"][S:, K].any()
    assert e["mask"].sum(1).tolist() == [1] * S + [K] * 5 and e["mask"][:S, K].all() and e["mask"][S:, :K].all()
    assert e["train"].tolist() == [False] * S + [True] * 5
    assert e["rows"].dtype == torch.int64 and model.length(e) == S + 5
    assert model.encode_audio(noise(1000)).dtype == torch.int16


def test_clips_in_one_pass_are_what_they_are_alone(model):
    waves = [noise(n) for n in (24000, 23999, 9600, 1921, 1920, 1)]
    both = zip(model.encode_audio_batch(waves), [model.encode_audio(w) for w in waves])
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in both)


def test_audio_is_read_as_24_khz_mono_and_as_loud_as_it_is(model, tmp_path):
    soundfile = pytest.importorskip("soundfile")
    t = torch.arange(8000) / 16000
    left, right = 0.4 * torch.sin(2000 * t), 0.1 * torch.sin(900 * t)
    soundfile.write(tmp_path / "a.wav", torch.stack([left, right], 1).numpy(), 16000, subtype="FLOAT")
    wave = audio.resample((left + right) / 2, 16000, 24000)
    assert len(wave) == 12000 and torch.equal(model.encode_audio(tmp_path / "a.wav"), model.encode_audio(wave))
    whole = model.encode({"audio": str(tmp_path / "a.wav"), "text": "x"})
    assert torch.equal(whole["rows"], model.encode({"audio": wave, "text": "x"})["rows"])
    part = model.encode({"audio": str(tmp_path / "a.wav"), "text": "x", "start": 0.16, "end": 0.32})
    assert model.length(part) == model.length(whole) - 5
    assert model.encode_audio(2 * wave).ne(model.encode_audio(wave)).any()


def test_text_ids_equal_the_published_template(folders, model):
    transformers = pytest.importorskip("transformers")
    hf = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folders["transformers"] / "tokenizer.json"))
    for text in ("Hello, the cat is in it.", "  two  spaces", "Ünïcode 你好 12345", "tabs\tand\nlines"):
        assert model.encode_text(text, 3) == hf(f"[3]{text}")["input_ids"]


def test_turns_are_context_and_targets(folders):
    turn = [{"role": "user", "speaker": i % 2, "text": f"turn {i}", "audio": codes(3 + i, i)} for i in range(5)]

    def encoded(turns, **options):
        m = load(folders["transformers"], **options)
        return m, m.encode({"turns": turns})

    def trained(e):  # frames of each trained stretch
        return [len(x) for x in re.findall("1+", "".join(map(str, e["train"].int().tolist())))]

    m, e = encoded(turn)
    whole = torch.cat([m.encode(t)["rows"] for t in turn])
    assert torch.equal(e["rows"], whole) and trained(e) == [4, 5, 6, 7, 8]
    m, e = encoded(turn, train_on="last")
    assert torch.equal(e["rows"], torch.cat([m.encode(t)["rows"] for t in turn[2:]])) and trained(e) == [8]
    m, e = encoded(turn, train_on="last", context_turns=0)
    assert torch.equal(e["rows"], m.encode(turn[4])["rows"])
    m, e = encoded(turn, mask_speakers=[1])
    assert torch.equal(e["rows"], whole) and trained(e) == [4, 6, 8]  # heard, not trained
    m, e = encoded(turn, mask_speakers=["0"])
    assert trained(e) == [5, 7]
    m, e = encoded([dict(t, train=i == 3) for i, t in enumerate(turn)])
    assert torch.equal(e["rows"], torch.cat([m.encode(t)["rows"] for t in turn[1:]])) and trained(e) == [7]
    m, e = encoded([{"speaker": 1, "text": "silent"}, turn[0]])
    assert trained(e) == [4] and e["rows"][: len(m.encode_text("silent", 1)), K].tolist() == m.encode_text("silent", 1)
    m, e = encoded([*turn, {"speaker": 1, "text": "silent"}], train_on="last")
    assert trained(e) == [8]  # the last one that is spoken
    m, e = encoded(turn, mask_speakers=[0, 1])
    assert trained(e) == []  # a row of masked speakers only is no mistake; it counts nothing
    assert m.collate([e])[1]["loss/semantic"] == 0
    with pytest.raises(Invalid, match="has no audio"):
        encoded([{"speaker": 1, "text": "silent"}])
    with pytest.raises(Invalid, match="is empty"):
        encoded([{"speaker": 1, "audio": codes(2)}])


def test_speakers_may_have_names_and_numbers(folders):
    m = load(folders["transformers"], mask_speakers=["anna"])
    row = {"text": "x", "audio": codes(2), "speaker": "ben", "speaker_id": 4}
    assert torch.equal(m.encode(row)["rows"], m.encode({**row, "speaker": 4})["rows"]) and m.encode_text("x", 4) == m.encode_text("x", "4")
    assert m.encode(row)["train"].any() and not m.encode({**row, "speaker": "anna"})["train"].any()
    with pytest.raises(Invalid, match="whole numbers"):
        m.encode_text("x", "ben")
    m.speakers = {"ben": 4}
    assert m.encode_text("x", "ben") == m.encode_text("x", 4)
    with pytest.raises(Invalid, match="these names: ben"):
        m.encode_text("x", "carl")


def test_long_rows_lose_turns_from_the_left_and_never_their_end(folders):
    m = load(folders["transformers"])
    turn = [{"speaker": 0, "text": f"turn {i}", "audio": codes(60, i)} for i in range(5)]
    e = m.encode({"turns": turn})
    assert torch.equal(e["rows"], torch.cat([m.encode(t)["rows"] for t in turn[2:]])) and m.length(e) <= 256
    alone = m.encode({"turns": [{"speaker": 0, "text": "long", "audio": codes(300)}]})
    assert m.length(alone) > 256 and not alone["rows"][-1].any() and alone["train"][-1]  # for the caller to drop


# ------------------------------------------------------------------------------------------------ training


def states(model, batch):
    """Backbone states (1, L - 1, H) of a batch of one row, which is packed as it stands."""
    x = model._embed(batch["rows"][0, :-1], batch["text"], batch["audio"])[None]
    return causal(model.backbone_model, x)


def causal(tower, x):
    return tower(x, Context(tower.rope(torch.arange(x.shape[1])), causal=True))


def test_losses_states_and_logits_equal_transformers(model, hf):
    for row in ROWS:
        batch, counts = model.collate([model.encode(row)])
        with torch.no_grad():
            want = hf(**for_transformers(model, row), output_hidden_states=True)
            out = model(batch)
            h = states(model, batch)
            c = batch["rows"].flatten(0, 1)[batch["trained"]][:, :-1]
            logits = model._depth(h[0, batch["before"]], c)
        mean = {k: float(v) / counts[k] for k, v in out.items()}
        assert mean["loss/semantic"] == pytest.approx(float(want.backbone_loss), rel=1e-5)
        assert mean["loss/acoustic"] == pytest.approx(float(want.depth_decoder_loss), rel=1e-5)
        torch.testing.assert_close(h, want.hidden_states[-1][:, :-1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits.transpose(0, 1), want.depth_decoder_logits, rtol=1e-4, atol=1e-4)
        assert mean["loss/acoustic"] == pytest.approx(sum(mean[f"metric/codebook_{k:02d}"] for k in range(1, K)) / (K - 1), rel=1e-6)


def test_a_subset_of_frames_and_the_forms_of_other_trainers_equal_transformers(model, hf):
    row = ROWS[0]  # nine frames and the end frame
    batch, _ = model.collate([model.encode(row)])
    batch["frames"] = torch.tensor([0, 3, 9])
    counts = model.counts(batch)
    assert counts["loss/acoustic"] == 3 * (K - 1) and counts["loss/semantic"] == 10
    out = model(batch)
    semantic, acoustic = (float(out[f"loss/{k}"]) / counts[f"loss/{k}"] for k in ("semantic", "acoustic"))
    inputs = for_transformers(model, row, skip=[1, 2, 4, 5, 6, 7, 8])
    plain = hf(**inputs)
    assert semantic == pytest.approx(float(plain.backbone_loss), rel=1e-5)
    assert acoustic == pytest.approx(float(plain.depth_decoder_loss), rel=1e-5)
    trainer = hf(**inputs, num_items_in_batch=torch.tensor(counts["loss/semantic"]))  # what transformers' Trainer passes
    assert semantic + (K - 1) * 3 / 10 * acoustic == pytest.approx(float(trainer.loss), rel=1e-5)


def test_the_form_of_csm_mlx_is_a_choice_of_weights(model):
    batch, counts = model.collate([model.encode(r) for r in ROWS])
    mean = {k: float(v) / counts[k] for k, v in model(batch).items()}
    theirs = sum(mean[f"metric/codebook_{k:02d}"] for k in range(K)) / K
    assert mean["loss/semantic"] / K + mean["loss/acoustic"] * (K - 1) / K == pytest.approx(theirs, rel=1e-6)


def test_gradients_equal_transformers_under_every_naming(folders, model, hf):
    row = ROWS[1]
    hf.zero_grad()
    hf(**for_transformers(model, row)).loss.backward()
    wanted = {n: p.grad for n, p in hf.named_parameters() if p.grad is not None}
    wanted = {n: g for n, g in wanted.items() if not n.startswith("codec_model.")}
    tied = [n for n in wanted if n in csm.TIED]
    assert len(tied) == 1  # one memory under two names, with the gradient of both uses
    wanted[csm.TIED[0]] = wanted.pop(tied[0])
    published = {}
    for naming in csm.CSM.namings:
        m = load(folders[naming], amortize=1)
        batch, counts = m.collate([m.encode(row)])
        out = m(batch)
        sum(out[k] / counts[k] for k in csm.LAMBDAS).backward()
        grads = {n: p.grad for n, p in m.named_parameters()}
        assert grads.keys() == wanted.keys()
        for n, g in grads.items():
            torch.testing.assert_close(g, wanted[n], rtol=1e-4, atol=1e-5 * float(g.abs().max()), msg=lambda s, n=n: f"{n}: {s}")
        published[naming] = {m.published_name(n, "original"): g if (r := m.published_rows(n, "original")) is None else g[r] for n, g in grads.items()}
    assert all(torch.equal(published["original"][n], g) for p in published.values() for n, g in p.items())


def test_frames_for_the_depth_decoder_are_drawn_per_row(folders):
    m = load(folders["transformers"], amortize=4)
    e = [m.encode({"audio": codes(T, T), "text": "x"}) for T in (19, 2, 11)]  # 20, 3 and 12 with the end frame
    batch, counts = m.collate(e, seeds=[5, 6, 7])
    assert counts["loss/acoustic"] == (5 + 1 + 3) * (K - 1) and counts["loss/semantic"] == 35
    alone = [m.collate([x], seeds=[s])[0]["frames"] for x, s in zip(e, (5, 6, 7))]
    assert torch.equal(batch["frames"], torch.cat([alone[0], alone[1] + 20, alone[2] + 23]))
    assert not torch.equal(m.collate(e[:1], seeds=[8])[0]["frames"], alone[0])
    assert torch.equal(m.collate(e)[0]["frames"], m.collate(e)[0]["frames"])
    m.training_options.amortize = 1
    assert torch.equal(m.collate(e)[0]["frames"], torch.arange(35))
    m.training_options.amortize = 1000
    assert len(m.collate(e)[0]["frames"]) == 3


def test_a_batch_is_the_sum_of_its_rows(model):
    e = [model.encode(r) for r in ROWS]
    both, counts = model.collate(e, seeds=[1, 2])
    out, parts = model(both), [model.collate([x], seeds=[s]) for x, s in zip(e, (1, 2))]
    for k in counts:
        assert counts[k] == sum(c[k] for _, c in parts)
        assert float(out[k]) == pytest.approx(sum(float(model(b)[k]) for b, _ in parts), rel=1e-5)


def test_rows_without_a_trained_frame_are_no_accident(model):
    e = model.encode(ROWS[1])
    e["train"] = torch.zeros_like(e["train"])
    batch, counts = model.collate([e])
    out = model(batch)
    assert counts["loss/semantic"] == counts["loss/acoustic"] == 0 and float(out["loss/semantic"]) == float(out["loss/acoustic"]) == 0


@pytest.mark.parametrize("what, moves", [("backbone", "depth_decoder."), ("decoder", "backbone_model.")])
def test_freezing_keeps_the_rest_trainable(folders, what, moves):
    m = load(folders["transformers"], freeze=what)
    trained = {n for n, p in m.named_parameters() if p.requires_grad}
    assert trained and all(n.startswith("depth_decoder.") == (what == "backbone") for n in trained) and any(n.startswith(moves) for n in trained)
    batch, counts = m.collate([m.encode(ROWS[0])])
    sum(m(batch)[k] for k in csm.LAMBDAS).backward()
    assert {n for n, p in m.named_parameters() if p.grad is not None} == trained


def test_half_precision_runs_and_stays_close(folders, model):
    m = models.load(folders["original"], dtype=torch.bfloat16, options={"amortize": 1})
    assert m.codec.downsample.conv.weight.dtype == torch.float32 and m.dtype == torch.bfloat16
    assert mean_losses(m) == pytest.approx(mean_losses(model), rel=0.05)
    assert len(list(m.frames("Hello", prompts=CONTEXT, seed=1, max_len=4))) == 4
    lora.apply_lora_to_model(m, {"r": 2, "train_embeddings": True})  # float32 beside bfloat16
    assert mean_losses(m) == pytest.approx(mean_losses(model), rel=0.05)
    assert len(list(m.frames("Hello", prompts=CONTEXT, seed=1, max_len=4))) == 4


def test_recomputing_activations_changes_nothing(folders):
    grads = []
    for on in (False, True):
        m = load(folders["transformers"]).train()
        m.set_recompute(on)
        sum(m(m.collate([m.encode(ROWS[0])])[0])[k] for k in csm.LAMBDAS).backward()
        grads.append({n: p.grad for n, p in m.named_parameters()})
    assert all(torch.equal(g, grads[1][n]) for n, g in grads[0].items())


# ------------------------------------------------------------------------------------------------ generation

CONTEXT = [("the cat", codes(6, 3), 1), ("in there", codes(5, 4), 0)]


def greedy(model, text, n, prompts=(), **more):
    return list(model.frames(text, prompts=prompts, speaker=0, temperature=0, max_len=n, **more))


def test_greedy_frames_with_context_equal_transformers(model, hf):
    turns = [(model.encode_text(t, who), c) for t, c, who in CONTEXT]
    embeds = []
    with torch.no_grad():
        for ids, c in turns + [(model.encode_text("Hello in the cat", 0), None)]:
            embeds.append(hf.embed_text_tokens(torch.tensor(ids))[None])
            if c is not None:
                embeds.append(hf.backbone_model.embed_tokens(F.pad(c.long(), (0, 1)).T[None]))
        embeds = torch.cat(embeds, 1)
        hf.generation_config.do_sample = hf.depth_decoder.generation_config.do_sample = False
        want = hf.generate(inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long), do_sample=False,
                           max_new_tokens=30, depth_decoder_do_sample=False, output_audio=False)[0]
    got = torch.stack(greedy(model, "Hello in the cat", 30, CONTEXT, mask_special=False))
    assert got.shape == (30, K) and torch.equal(got, want[-30:])
    assert len(got.unique(dim=0)) > 20  # no loop that would hide a mistake
    assert not torch.equal(torch.stack(greedy(model, "Hello in the cat", 30, CONTEXT[1:], mask_special=False)), got)


def test_cached_and_uncached_generation_agree(model):
    """The training forward on what was generated predicts it: every row by the argmax of its own prediction."""
    got = torch.stack(greedy(model, "Hello", 12, CONTEXT, mask_special=False))
    turns = [{"text": t, "audio": c, "speaker": who} for t, c, who in CONTEXT] + [{"text": "Hello", "audio": got.T.short(), "speaker": 0}]
    batch, _ = model.collate([model.encode({"turns": turns})])
    with torch.no_grad():
        h = states(model, batch)[0, batch["before"]]
        c = batch["rows"].flatten(0, 1)[batch["trained"]][:, :-1]
        again = torch.cat([model.lm_head(h).argmax(-1)[:, None], model._depth(h, c).argmax(-1).T], 1)
    assert torch.equal(again[-13:-1], got)


def test_rows_of_a_batch_equal_single_runs(model):
    requests = [dict(text="Hello in the cat", prompts=CONTEXT, speaker=0, seed=5), dict(text="x", speaker=3, seed=6), dict(text="it is", seed=7)]
    single = [list(model.frames(**r, max_len=9)) for r in requests]
    together = [[], [], []]
    for i, frame in model._run([model._request(**r) for r in requests], csm.Sampling(max_len=9)):
        together[i].append(frame)
    for a, b in zip(single, together):
        assert torch.equal(torch.stack(a), torch.stack(b))
    assert not torch.equal(torch.stack(single[1]), torch.stack(list(model.frames("x", speaker=3, seed=8, max_len=9))))


def test_nothing_waits_for_the_device_within_a_frame(model, monkeypatch):
    frames = model.frames("Hello", seed=1, max_len=4)
    next(frames)  # the prompt is read

    def forbidden(*_):
        raise AssertionError("the host waits for the device")

    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, forbidden)
    rest = list(frames)
    monkeypatch.undo()
    assert len(rest) == 3


def test_an_end_frame_ends_and_is_not_kept(model, monkeypatch):
    monkeypatch.setattr(csm.CSM, "_frame", lambda self, h, u, s, n, st: torch.full((len(h), K), 3 if n < 5 else 0))
    assert len(list(model.frames("x"))) == 5 and model.finish == ["end"]
    assert len(list(model.frames("x", max_len=4))) == 4 and model.finish == ["cap"]
    audio = torch.cat(list(model.generate("x")))
    torch.testing.assert_close(audio, model.codec.decode(torch.full((K, 5), 3)), rtol=0, atol=1e-5)


def test_two_generations_do_not_share_how_they_end(model, monkeypatch):
    monkeypatch.setattr(csm.CSM, "_frame", lambda self, h, u, s, n, st: torch.full((len(h), K), int(s.max_len < 9 or n < 2)))
    ends, capped = model.frames("x", max_len=9), model.frames("Hello", max_len=4)
    next(ends), next(capped)
    assert len(list(ends)) == 1 and model.finish == ["end"]
    together = model._run([model._request("x", seed=i) for i in range(3)], csm.Sampling(max_len=2))
    next(together)
    assert len(list(capped)) == 3 and model.finish == ["cap"]


def test_an_empty_take_is_silence_and_says_so(model, monkeypatch):
    monkeypatch.setattr(csm.CSM, "_frame", lambda self, h, u, s, n, st: torch.zeros(len(h), K, dtype=torch.long))
    with pytest.warns(UserWarning, match="only silence"):
        audio = torch.cat(list(model.generate("x")))
    assert len(audio) == 1920 and not audio.any()
    seeds = []
    run = csm.CSM._run
    monkeypatch.setattr(csm.CSM, "_run", lambda self, r, s: seeds.append(r[0]["seed"]) or run(self, r, s))
    assert list(model.frames("x", seed=4, retries=2)) == [] and seeds == [4, 5, 6]


def test_sampling_follows_the_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, 1.0]]).repeat(20000, 1)
    u = 1 - torch.rand(20000, 1, generator=torch.Generator().manual_seed(0))
    got = torch.bincount(csm.pick(logits, u, 0.7, 2), minlength=5) / 20000  # the two 1.0 tie for the second place
    p = torch.tensor([2.0, 1.0, -math.inf, -math.inf, 1.0]).div(0.7).softmax(0)
    torch.testing.assert_close(got, p, rtol=0, atol=0.01)
    assert csm.pick(torch.tensor([[2.0, 1.0, 2.5]]), u[:1], 0, 0).tolist() == [2]
    assert csm.pick(torch.tensor([[-math.inf, 1.0]]), torch.tensor([[2.0**-24]]), 1.0, 0).tolist() == [1]
    assert csm.pick(torch.tensor([[1.0, -math.inf]]), torch.ones(1, 1), 1.0, 0).tolist() == [0]


def test_a_draw_is_never_zero(model, monkeypatch):
    """The generator may give 0, which would pick an id that was left out."""
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, generator: self.zero_())
    seen = []
    frame = csm.CSM._frame
    monkeypatch.setattr(csm.CSM, "_frame", lambda self, h, u, *rest: seen.append(u) or frame(self, h, u, *rest))
    list(model.frames("x", seed=0, max_len=2))
    assert all((u == 1).all() for u in seen)


@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-5), (torch.bfloat16, 6e-2)])
@pytest.mark.parametrize("adapter, bits", [(None, 16), ("decoder", 16), (None, 8), ("q_proj", 4)])
def test_depth_steps_are_the_depth_decoder(folders, dtype, near, adapter, bits):
    """Position by position, rows leaving on the way, with and without adapters and rounding: what the training forward computes."""
    m = models.load(folders["transformers"], dtype=dtype, bits=bits)
    if adapter:
        lora.apply_lora_to_model(m, {"r": 2, "target_modules": [adapter, "projection"]})
        randomize(m)
    decoder, table = m.depth_decoder.model, m.backbone_model.embed_tokens.embed_audio_tokens.weight
    with torch.no_grad():
        for layer in decoder.layers:  # ones would hide a norm's weight in the wrong place
            for norm in (layer.input_layernorm, layer.post_attention_layernorm, decoder.norm):
                norm.weight.copy_(torch.linspace(0.5, 2.0, len(norm.weight)))
        x = table[:3 * K].view(3, K, -1)
        want = causal(decoder, decoder.inputs_embeds_projector(x))
        steps, rows = DepthSteps(decoder, 3, K), torch.arange(3)
        for j in range(1, K):
            if j == 3:
                rows = torch.tensor([0, 2])
                steps.keep(rows)
            got = steps(x[rows, j] if j > 1 else torch.cat([x[:, 0], x[:, 1]]), j if j > 1 else 0)
            assert got.dtype == dtype
            assert (got - want[rows, j]).norm() < near * want[rows, j].norm()


def test_the_depth_decoder_has_its_own_sampling(model):
    one = torch.stack(list(model.frames("x", seed=3, max_len=3, depth_temperature=0.0)))
    other = torch.stack(list(model.frames("x", seed=3, max_len=3)))
    assert one[0, 0] == other[0, 0] and not torch.equal(one[0, 1:], other[0, 1:])
    assert torch.equal(other, torch.stack(list(model.frames("x", seed=3, max_len=3, depth_temperature=0.9, depth_top_k=50))))


def test_special_ids_are_not_sampled_and_speech_can_be_kept_from_ending(model, monkeypatch):
    with torch.no_grad():
        head, heads = model.lm_head.weight.clone(), model.depth_decoder.codebooks_head.weight.clone()
        model.lm_head.weight[33] *= 50
        model.depth_decoder.codebooks_head.weight[:, :, 34] *= 50
    try:
        free = torch.stack(list(model.frames("Hello", seed=0, max_len=12, mask_special=False, temperature=5.0)))
        kept = torch.stack(list(model.frames("Hello", seed=0, max_len=12, temperature=5.0)))
        assert (free[:, 0] == 33).any() and (free[:, 1:] == 34).any() and (kept < 32).all()
        with pytest.raises(Invalid, match="mask_special"):
            list(model.generate("Hello", seed=0, max_len=12, mask_special=False, temperature=5.0))
    finally:
        model.lm_head.weight.data, model.depth_decoder.codebooks_head.weight.data = head, heads
    frame = torch.stack(list(model.frames("Hello", seed=0, max_len=20, min_len=20, temperature=30.0, top_k=0)))
    assert len(frame) == 20 and (frame[:, 0] != 0).all()


def test_chunks_joined_are_the_whole(model):
    frames = torch.stack(list(model.frames("Hello", prompts=CONTEXT, seed=2, max_len=30)), 1)
    whole = model.codec.decode(frames)
    for limit, sizes in ((16, [1, 2, 4, 8, 15]), (1, [1] * 30)):
        chunks = list(model.generate("Hello", prompts=CONTEXT, seed=2, max_len=30, chunk_frames=limit))
        assert [len(c) // 1920 for c in chunks] == sizes
        torch.testing.assert_close(torch.cat(chunks), whole, rtol=0, atol=1e-5)


def test_prompts_are_turns(model):
    wave = noise(1920 * 4)
    by_wave = list(model.frames("x", prompts=[("the cat", wave, 1)], seed=1, max_len=3))
    by_codes = list(model.frames("x", prompts=[("the cat", model.encode_audio(wave), 1)], seed=1, max_len=3))
    assert all(torch.equal(a, b) for a, b in zip(by_wave, by_codes))
    with pytest.raises(Invalid, match="give its text"):
        list(model.frames("x", prompts=[(None, wave, 1)]))
    with pytest.raises(Invalid, match="takes a seed, no noise"):
        list(model.frames("x", noise=torch.zeros(1)))
    with pytest.raises(Invalid, match="whole numbers"):
        list(model.frames("x", speaker="anna"))
    with pytest.raises(Invalid, match="codes of 5 codebooks"):
        list(model.frames("x", prompts=[("the cat", codes(4, k=5), 1)]))
    with pytest.raises(Invalid, match="this model has 0 to 34"):
        list(model.frames("x", prompts=[("the cat", codes(4) + 35, 1)]))
    with pytest.raises(Invalid, match="is empty"):
        list(model.frames("  "))


def test_context_that_does_not_fit_is_dropped_from_the_left(model):
    long = [(f"turn {i}", codes(90, i), 0) for i in range(3)]
    with pytest.warns(UserWarning, match="2 of 3 earlier turns were left out"):
        got = list(model.frames("x", prompts=long, seed=1, max_len=60))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        want = list(model.frames("x", prompts=long[2:], seed=1, max_len=60))
    assert len(got) == len(want) == 60 and torch.equal(torch.stack(got), torch.stack(want))
    assert len(list(model.frames("x", prompts=long[2:], seed=1, min_len=500))) == 256 - len(model._segment(dict(zip(("text", "audio", "speaker"), long[2]))).rows) - len(model.encode_text("x"))
    with pytest.raises(Invalid, match="the model has 256 positions"):
        list(model.frames("too long " * 60))


# ------------------------------------------------------------------------------------------------ used means used


def test_every_tensor_does_something(folders):
    m = load(folders["transformers"], amortize=1)
    batch, _ = m.collate([m.encode(r) for r in ROWS])
    with torch.no_grad():
        before = m(batch)
        for name, p in m.named_parameters():
            kept = p.clone()
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
            after = m(batch)
            assert any(float(before[k]) != float(after[k]) for k in csm.LAMBDAS), name
            p.copy_(kept)


# ------------------------------------------------------------------------------------------------ adapters


def test_targets_without_a_word_are_all_linears_of_both_towers(folders):
    m = load(folders["transformers"])
    names = lora.apply_lora_to_model(m, {"r": 2})
    assert len(names) == 7 * (3 + 2) and all(".layers." in n for n in names)
    with pytest.raises(Invalid, match="enable_dit.*target_modules"):
        lora.apply_lora_to_model(m, {"r": 2, "enable_dit": True})


def randomize(model):
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for m in lora.lora_modules(model).values():
            m.lora_B.copy_(torch.randn(m.lora_B.shape, generator=g) * 0.2)


def mean_losses(m, row=ROWS[0]):
    batch, counts = m.collate([m.encode(row)])
    with torch.no_grad():
        return [float(v) / counts[k] for k, v in m(batch).items() if k in csm.LAMBDAS]


def test_an_adapter_trained_here_acts_in_peft(folders, model, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    m = load(folders["original"], amortize=1)
    lora.apply_lora_to_model(m, {"r": 2, "alpha": 4, "target_modules": ["q_proj", "k_proj", "down_proj", "lm_head", "inputs_embeds_projector"]})
    randomize(m)
    lora.save_lora_weights(m, tmp_path)
    ours, base = mean_losses(m), mean_losses(model)
    assert all(abs(a - b) > 1e-3 for a, b in zip(ours, base))  # 100 x the tolerance
    hf = transformers.CsmForConditionalGeneration.from_pretrained(folders["transformers"]).eval()
    wrapped = peft.PeftModel.from_pretrained(hf, tmp_path)
    out = wrapped.base_model.model(**for_transformers(m, ROWS[0]))
    assert [float(out.backbone_loss), float(out.depth_decoder_loss)] == pytest.approx(ours, rel=1e-5)
    assert not any("lora" in n for n, _ in wrapped.named_modules() if "codec_model" in n)


def test_a_peft_adapter_acts_here_in_every_naming(folders, model, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    hf = transformers.CsmForConditionalGeneration.from_pretrained(folders["transformers"]).eval()
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]  # suffixes: the codec is wrapped, too
    wrapped = peft.get_peft_model(hf, peft.LoraConfig(r=2, lora_alpha=8, target_modules=names))
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for n, p in wrapped.named_parameters():
            if "lora_B" in n and "codec_model" not in n:
                p.copy_(torch.randn(p.shape, generator=g) * 0.2)
    wrapped.save_pretrained(tmp_path)
    out = wrapped.base_model.model(**for_transformers(model, ROWS[0]))
    want = [float(out.backbone_loss), float(out.depth_decoder_loss)]
    assert all(abs(a - b) > 1e-3 for a, b in zip(want, mean_losses(model)))
    for naming in csm.CSM.namings:
        m = load(folders[naming], amortize=1)
        loaded, skipped = lora.load_lora_weights(m, tmp_path)
        assert mean_losses(m) == pytest.approx(want, rel=1e-5)
        assert skipped and all("codec_model" in n or "base_layer" in n for n in skipped)
        lora.merge_lora_weights(m)
        assert mean_losses(m) == pytest.approx(want, rel=1e-5)


def test_merged_folders_load_in_transformers(folders, tmp_path):
    transformers = pytest.importorskip("transformers")
    m = load(folders["original"], amortize=1)
    lora.apply_lora_to_model(m, {"r": 2})
    randomize(m)
    with pytest.raises(Invalid, match="merged=True"):
        m.save(tmp_path)
    m.save(tmp_path, "transformers", merged=True)
    hf = transformers.CsmForConditionalGeneration.from_pretrained(tmp_path).eval()
    out = hf(**for_transformers(m, ROWS[0]))
    assert [float(out.backbone_loss), float(out.depth_decoder_loss)] == pytest.approx(mean_losses(m), rel=1e-5)


@pytest.mark.parametrize("naming", ["original", "transformers"])
def test_fully_tuned_folders_load_in_transformers(folders, model, tmp_path, naming):
    transformers = pytest.importorskip("transformers")
    m = load(folders[naming], amortize=1)
    optimizer = torch.optim.AdamW(m.parameters(), 3e-3)
    for _ in range(3):
        batch, counts = m.collate([m.encode(r) for r in ROWS])
        optimizer.zero_grad()
        sum(v / counts[k] for k, v in m(batch).items() if k in csm.LAMBDAS).backward()
        optimizer.step()
    assert all((p != model.get_parameter(n)).any() for n, p in m.named_parameters())
    ours = mean_losses(m)
    assert all(abs(a - b) > 1e-2 for a, b in zip(ours, mean_losses(model)))
    m.save(tmp_path, "transformers")
    hf, told = transformers.CsmForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told.values())  # nothing missing, unexpected or of another shape
    out = hf.eval()(**for_transformers(m, ROWS[0]))
    assert [float(out.backbone_loss), float(out.depth_decoder_loss)] == pytest.approx(ours, rel=1e-5)


def test_words_that_users_of_other_tools_know(folders):
    m = load(folders["transformers"])

    def hit(*words, **more):
        return set(targets.linears(m, lora.LoRAConfig(target_modules=list(words), **more)))

    assert hit("attn") == hit("q_proj", "k_proj", "v_proj", "o_proj") and len(hit("attn")) == 4 * 5
    assert hit("codebook0_head") == {"lm_head"} and hit("projection") == {"depth_decoder.model.inputs_embeds_projector"}
    assert hit("w1", "w2", "w3") == hit("mlp") == hit("gate_proj", "up_proj", "down_proj") and hit("output_proj") == hit("o_proj")
    assert len(hit("backbone")) == 7 * 3 and len(hit("decoder")) == 7 * 2 and hit("backbone", "decoder") == set(m.lora_targets(lora.LoRAConfig()))
    assert hit(r"decoder\.layers\.\d+\.attn\.q_proj") == {f"depth_decoder.model.layers.{i}.self_attn.q_proj" for i in range(2)}
    assert hit("v_proj", target_layers=[1]) == {"backbone_model.layers.1.self_attn.v_proj", "depth_decoder.model.layers.1.self_attn.v_proj"}
    assert hit("v_proj", "projection", target_layers=["backbone.2", "decoder.0"]) == {
        "backbone_model.layers.2.self_attn.v_proj", "depth_decoder.model.layers.0.self_attn.v_proj", "depth_decoder.model.inputs_embeds_projector"}
    with pytest.raises(Invalid, match="no targeted stack has a layer 16"):
        hit("v_proj", target_layers=[16, 17])
    with pytest.raises(Invalid, match="no targeted stack has a layer decoder.2"):
        hit("v_proj", target_layers=["decoder.2"])
    with pytest.raises(Invalid, match="'q_projj' matches no Linear"):
        hit("q_projj")


def test_trained_tables_are_saved_in_the_adapter_and_act_in_peft(folders, model, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    m = load(folders["transformers"], amortize=1)
    lora.apply_lora_to_model(m, {"r": 2, "target_modules": ["attn"], "train_embeddings": True})
    randomize(m)
    trained = {n for n, p in m.named_parameters() if p.requires_grad and ".lora_" not in n}
    assert trained == {"embed_text_tokens.weight", csm.TIED[0]}
    optimizer = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 0.03)
    for _ in range(3):
        batch, counts = m.collate([m.encode(r) for r in ROWS])
        optimizer.zero_grad()
        sum(v / counts[k] for k, v in m(batch).items() if k in csm.LAMBDAS).backward()
        optimizer.step()
    assert all((m.get_parameter(n) != model.get_parameter(n)).any() for n in trained)
    ours = mean_losses(m)
    assert all(abs(a - b) > 1e-2 for a, b in zip(ours, mean_losses(model)))
    for kind in m.adapter_namings:
        lora.save_lora_weights(m, tmp_path / kind, format=kind)
        for naming in ("original", "transformers"):
            other = load(folders[naming], amortize=1)
            lora.load_lora_weights(other, tmp_path / kind)
            assert mean_losses(other) == pytest.approx(ours, rel=1e-6), kind
    hf = transformers.CsmForConditionalGeneration.from_pretrained(folders["transformers"]).eval()
    out = peft.PeftModel.from_pretrained(hf, tmp_path / "peft").base_model.model(**for_transformers(m, ROWS[0]))
    assert [float(out.backbone_loss), float(out.depth_decoder_loss)] == pytest.approx(ours, rel=1e-5)


def test_the_mlx_form_is_what_csm_mlx_reads(folders, tmp_path):
    """Names, orientation and scale of its adapters.safetensors, merged by its own rule y = W x + scale (x a) b in the interleaved order."""
    from safetensors.torch import load_file

    m = load(folders["transformers"], amortize=1)
    lora.apply_lora_to_model(m, {"r": 2, "alpha": 6.0, "target_modules": ["q_proj", "k_proj", "v_proj", "projection", "codebook0_head"]})
    randomize(m)
    lora.save_lora_weights(m, tmp_path / "a", format="mlx")
    pairs = load_file(tmp_path / "a" / "adapters.safetensors")
    scale = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["lora_parameters"]["scale"]
    base = load_file(folders["mlx"] / "ckpt.safetensors")
    assert scale == 3 and pairs["projection.lora_a"].shape == (48, 2) and pairs["codebook0_head.lora_b"].shape == (2, 35)
    for name in {n.rpartition(".")[0] for n in pairs}:
        base[name + ".weight"] += scale * (pairs[name + ".lora_a"] @ pairs[name + ".lora_b"]).T
    merged = m.published_state_dict("mlx", merged=True)
    assert all(torch.allclose(merged[n], w, atol=1e-6) for n, w in base.items())


def test_the_single_file_of_csm_mlx_is_read_when_its_strength_is_known(folders, model, tmp_path):
    from safetensors.torch import load_file, save_file

    m = load(folders["transformers"], amortize=1)
    lora.apply_lora_to_model(m, {"r": 2, "target_modules": ["attn"]})
    randomize(m)
    lora.save_lora_weights(m, tmp_path / "ours", format="voxcpm")
    tensors = load_file(tmp_path / "ours" / "lora_weights.safetensors")
    assert tensors["backbone.layers.0.self_attn.q_proj.lora_A"].shape == (2, 48)
    (tmp_path / "theirs").mkdir()
    save_file(tensors, tmp_path / "theirs" / "lora_ckpt_epoch_1.safetensors")  # no record, no settings
    other = load(folders["mlx"], amortize=1)
    with pytest.raises(Invalid, match="alpha is unknown.*lora_config.json|lora_config.json.*alpha is unknown"):
        lora.load_lora_weights(other, tmp_path / "theirs" / "lora_ckpt_epoch_1.safetensors")
    (tmp_path / "theirs" / "lora_config.json").write_text(json.dumps({"r": 2, "alpha": 16}))
    lora.load_lora_weights(other, tmp_path / "theirs" / "lora_ckpt_epoch_1.safetensors")
    assert mean_losses(other) == pytest.approx(mean_losses(m), rel=1e-6)
    moved = tmp_path / "moved.safetensors"
    (tmp_path / "ours" / "lora_weights.safetensors").rename(moved)  # ours records its settings, so the file alone is enough
    lora.load_lora_weights(other, moved)
    assert mean_losses(other) == pytest.approx(mean_losses(m), rel=1e-6)


def test_adapters_that_cannot_be_right_are_refused(folders, tmp_path):
    from safetensors.torch import save_file

    m = load(folders["transformers"])
    pair = {"lora_A": torch.zeros(2, 48), "lora_B": torch.zeros(64, 2)}
    save_file({f"layers.0.attn.q_proj.{k}": v for k, v in pair.items()}, tmp_path / "fine_tuned_model.safetensors")
    with pytest.raises(Invalid, match="without the name of its tower"):  # whatever else is missing
        lora.load_lora_weights(m, tmp_path / "fine_tuned_model.safetensors")
    (tmp_path / "lora_config.json").write_text(json.dumps({"r": 2, "alpha": 4}))
    save_file({**{f"lm_head.{k}": v for k, v in {"lora_A": torch.zeros(2, 48), "lora_B": torch.zeros(35, 2)}.items()},
               "lm_head.base_layer.weight": m.lm_head.weight.detach() + 1}, tmp_path / "head.safetensors")
    with pytest.raises(Invalid, match="is not this base's lm_head.weight"):
        lora.load_lora_weights(m, tmp_path / "head.safetensors")


def test_a_table_that_peft_trained_apart_from_its_twin_is_refused(folders, tmp_path):
    """transformers ties the two tables of the audio codes; PEFT trains a copy of each that is named, and only that one."""
    from safetensors.torch import load_file, save_file

    m = load(folders["transformers"])
    lora.apply_lora_to_model(m, {"r": 2, "train_embeddings": True})
    lora.save_lora_weights(m, tmp_path / "both")
    lora.load_lora_weights(m, tmp_path / "both")
    stored = load_file(tmp_path / "both/adapter_model.safetensors")
    for gone in csm.TIED:
        save_file({n: t for n, t in stored.items() if not n.endswith(gone)}, tmp_path / "both/adapter_model.safetensors")
        with pytest.raises(Invalid, match="was trained apart from .*" + re.escape(gone)):
            lora.load_lora_weights(m, tmp_path / "both")


def test_a_bias_travels_in_pefts_own_form(folders, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    m = load(folders["transformers"], amortize=1)
    lora.apply_lora_to_model(m, {"r": 3, "alpha": 4.0, "bias": True, "target_modules": ["q_proj", "codebook0_head"]})
    randomize(m)
    for module in lora.lora_modules(m).values():
        module.lora_bias.data.normal_(generator=torch.Generator().manual_seed(1))
    value = mean_losses(m)
    lora.save_lora_weights(m, tmp_path / "a")
    fresh = load(folders["transformers"], amortize=1)
    plain = mean_losses(fresh)
    lora.load_lora_weights(fresh, tmp_path / "a")
    assert mean_losses(fresh) == pytest.approx(value, rel=1e-6) and abs(plain[0] - value[0]) > 1e-2
    hf = transformers.CsmForConditionalGeneration.from_pretrained(folders["transformers"])
    hf = peft.PeftModel.from_pretrained(hf, tmp_path / "a").eval()
    with torch.no_grad():
        out = hf(**for_transformers(m, ROWS[0]))
    assert float(out.backbone_loss) == pytest.approx(value[0], rel=1e-5)
    with pytest.raises(Invalid, match="lora.bias cannot be merged"):
        m.save(tmp_path / "merged", merged=True)


@pytest.mark.parametrize("part", ["lm_head", "codebooks_head", "inputs_embeds_projector", "norm", "layers.0.mlp"])
def test_modules_trained_in_full_work_in_bfloat16(folders, part):
    """bf16 is what a GPU gets by default."""
    m = models.load(folders["transformers"], dtype=torch.bfloat16, options={"amortize": 1})
    name = next(n for n, _ in m.named_modules() if n.endswith(part))
    lora.apply_lora_to_model(m, {"r": 2, "target_modules": ["attn"], "train_modules": [re.escape(name)]})
    batch, counts = m.collate([m.encode(ROWS[0])])
    sum(m(batch)[k] / counts[k] for k in csm.LAMBDAS).backward()
    assert all(p.grad is not None for n, p in m.named_parameters() if n.startswith(name + "."))
    assert m.dtype == torch.bfloat16 and len(list(m.frames("x", seed=0, max_len=2))) > 0


# ------------------------------------------------------------------------------------------------ from the command line


@pytest.fixture(scope="module")
def talk(folders, tmp_path_factory):
    """A folder with two named speakers in conversation and one by herself."""
    root = tmp_path_factory.mktemp("talk")
    for i in range(4):
        audio.write(root / f"{i}.wav", noise(1920 * (5 + i), i) * 0.2, 24000)
    said = [{"text": f"the cat {i}", "audio": f"{i}.wav", "speaker": ("anna", "ben")[i % 2]} for i in range(4)]
    (root / "talk.jsonl").write_text(json.dumps({"turns": said[:3]}) + "\n" + json.dumps(said[3]) + "\n")
    (root / "run.yaml").write_text(f"pretrained_path: {folders['transformers']}\ntrain_manifest: talk.jsonl\nnum_iters: 1\nbatch_size: 2\n"
                                   "warmup_steps: 0\nlora: {r: 2}\n")
    return root


def first_loss(root, name, *flags, code=0):
    run = start("train", ["run.yaml", "--save_path", name, *flags], root)
    assert run.wait() == code and "Traceback" not in run.said, run.said
    return run.said if code else json.loads((root / name / "metrics.jsonl").read_text().splitlines()[0])["loss/total"]


def test_speakers_are_masked_by_name_and_by_number(talk):
    free, anna, ben = (first_loss(talk, f"m{i}", *flags) for i, flags in enumerate(
        ((), ("--backbone.mask_speakers", "anna"), ("--mask-speaker-ids", "1"))))
    assert len({free, anna, ben}) == 3
    assert anna == first_loss(talk, "m3", "--backbone.mask_speakers", "[0]") and ben == first_loss(talk, "m4", "--backbone.mask_speakers", "ben")
    assert "nobody is called carl; the rows name anna (0), ben (1)" in first_loss(talk, "m5", "--backbone.mask_speakers", "carl", code=1)
    assert "2 with nothing that is trained in them" in first_loss(talk, "m6", "--backbone.mask_speakers", "[anna, ben]", code=1)


def test_wrong_options_are_wrong_use(talk):
    for flags, words in ((("--backbone.amortize", 0), "amortize is 0, expected at least 1"), (("--context-turns", -1), "context_turns is -1"),
                         (("--backbone.freeze", "decoder"), "which freezes all but the adapters"), (("--semantic-weight", -1), "expected weights of at least 0")):
        assert words in first_loss(talk, "wrong", *flags, code=2)
    for values in ({"temperature": -1}, {"top_k": -3}, {"depth_temperature": -2}, {"max_len": 0}, {"retries": -1}, {"chunk_frames": 0}):
        with pytest.raises(Invalid, match=next(iter(values))):
            csm.Sampling(**values)


def test_a_conversation_is_cut_to_the_length_that_is_asked_for(talk):
    said = start("train", ["run.yaml", "--save_path", "cut", "--max_length", "34"], talk)
    assert said.wait() == 0 and "data: 2 clips" in said.said, said.said  # whole, the first row has more


def test_speakers_stay_with_a_folder_and_a_conversation_is_heard_from_files(talk, folders):
    start("train", ["run.yaml", "--save_path", "voices"], talk).wait()
    merge = start("merge_lora", ["--lora", "voices/latest", "--output_dir", "merged"], talk)
    assert merge.wait() == 0, merge.said
    assert models.load(talk / "merged").speakers == {"anna": 0, "ben": 1}
    (talk / "context.json").write_text(json.dumps([{"text": "the cat", "audio": "0.wav", "speaker": "anna"}]))
    waves = []
    for more in ((), ("--context", "context.json")):
        run = start("infer", ["--ckpt_dir", "merged", "--speaker", "ben", "--text", "Hello", "--max_len", "3", "--min_len", "3", "--retries", "0", *more], talk)
        assert run.wait() == 0, run.said
        waves.append(audio.read(talk / "output.wav", None)[0])
    assert len(waves[0]) == len(waves[1]) and not torch.equal(*waves)
    (talk / "context.json").write_text('[{"text": "the cat", "audio": "none.wav"}]')
    run = start("infer", ["--ckpt_dir", "merged", "--text", "Hello", "--context", "context.json"], talk)
    assert run.wait() == 2 and "context: no file at none.wav" in run.said


# ------------------------------------------------------------------------------------------------ floors


@pytest.mark.parametrize("amortize", [1, 16])
@pytest.mark.parametrize("clips", [[(125, 30)], [(125, 30), (25, 200), (50, 120), (100, 80)]], ids=["reference", "padded"])
def test_a_lora_step_at_real_shapes_does_no_more_than_it_must(amortize, clips):
    """Counted on the meta device: 4 FLOPs per weight and real position (2 where nothing below is trained), and the bytes kept for backward.

    Attention is taken apart there into float32 matrices that fused kernels do not keep; they are left out.
    """
    c, _ = csm.shape("real")
    with torch.device("meta"):
        m = csm.CSM(c)
    m.to(torch.bfloat16)
    for tower in m.stacks():
        tower.make_rotary("meta")
    m.register_buffer("offsets", torch.arange(32, device="meta") * 2051, persistent=False)
    lora.apply_lora_to_model(m, {"r": 8, "alpha": 16.0})
    m.train().training_options.amortize = amortize
    examples = []
    for frames, text in clips:
        rows = torch.zeros(text + frames + 1, 33, dtype=torch.long)
        heard = torch.arange(len(rows)) >= text
        mask = heard[:, None].repeat(1, 33)
        mask[:, 32] = ~heard
        examples.append({"rows": rows, "mask": mask, "train": heard})
    batch, counts = m.collate(examples, list(range(len(clips))))
    N, M = counts["loss/semantic"], counts["loss/acoustic"] // 31
    P = sum(frames + text for frames, text in clips)
    own, kept = {p.untyped_storage()._cdata for p in m.parameters()}, {}

    def keep(t):
        matrix = t.dtype == torch.float32 and (t.ndim == 4 and t.shape[2] == t.shape[3] or t.ndim == 3 and t.shape[0] in (32 * len(clips), 8 * M))
        if t.untyped_storage()._cdata not in own and not matrix:
            kept[t.untyped_storage()._cdata] = t.untyped_storage().nbytes(), t
        return t

    with FlopCounterMode(display=False) as flops:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            out = m({k: v.to("meta") for k, v in batch.items()})
        sum(out[k] for k in csm.LAMBDAS).backward()
    linear = sum(v for k, v in flops.get_flop_counts()["Global"].items() if k in (torch.ops.aten.mm, torch.ops.aten.addmm))

    def weights(module):
        return sum(x.weight.numel() for x in module.modules() if isinstance(x, torch.nn.Linear))

    def adapters(module):
        return sum(p.numel() for n, p in module.named_parameters() if ".lora_" in n)

    def width(t):
        return 8 * t.hidden_size + 4 * (t.num_attention_heads + t.num_key_value_heads) * t.head_dim + 6 * t.intermediate_size

    depth, backbone, head = m.depth_decoder.model, m.backbone_model, weights(m.lm_head)
    most = P * (4 * weights(backbone) + 6 * adapters(backbone)) + 4 * N * head
    most += 32 * M * (4 * weights(depth.layers) + 6 * adapters(depth) + 2 * weights(depth.inputs_embeds_projector))
    assert 0.97 * most < linear <= 1.03 * most, f"{linear / most:.3f} of the floor"
    least = width(c.backbone) * P * 16 + width(c.depth_decoder_config) * 4 * 32 * M + (31 * M + N) * 2051 * 6
    assert sum(n for n, _ in kept.values()) <= 1.4 * least, f"{sum(n for n, _ in kept.values()) / least:.3f} of the bytes"


# ------------------------------------------------------------------------------------------------ learning


def test_two_clips_are_learnt_by_heart(tmp_path):
    """All weights, all 32 codebooks, two clips of 2 and 2.4 seconds: greedy frames give their codes back and then end."""
    m = load(tiny_csm.write(tmp_path, num_codebooks=32), amortize=1).train()
    rows = [{"audio": codes(25, 1, 32), "text": "the cat", "speaker": 0}, {"audio": codes(30, 2, 32), "text": "in it", "speaker": 1}]
    batch, counts = m.collate([m.encode(r) for r in rows])
    optimizer = torch.optim.Adam(m.parameters(), 6e-3)
    for _ in range(60):
        out = m(batch)
        loss = sum(out[k] / counts[k] for k in csm.LAMBDAS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    m.eval()
    for row in rows:
        got = list(m.frames(row["text"], speaker=row["speaker"], temperature=0, max_len=2 * row["audio"].shape[1]))
        assert m.finish == ["end"] and torch.equal(torch.stack(got, 1), row["audio"].long())
