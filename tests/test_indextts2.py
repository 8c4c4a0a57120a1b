"""IndexTTS2 against its own code by golden tensors and live against transformers; its text, its files, its properties."""
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file

import lora
import models
from models import indextts2
from models.codecs import speech_chain
from models.parts import Invalid, beam, checkpoint, front
from tests import tiny
from tests import tiny_indextts2 as T
from tests.conftest import ROOT

HERE = Path(__file__).parent / "golden"
GOLDEN = load_file(HERE / "indextts2.safetensors")
TEXTS = json.loads((HERE / "indextts2.json").read_text(encoding="utf-8"))
LAYOUT = Path(ROOT).parent / "shared/layouts/indextts2-gpt.json"
TOLERANCE = dict(rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return T.write(tmp_path_factory.mktemp("indextts2") / "base")


@pytest.fixture
def model(folder):
    return models.load(folder)


def example(i, kind="fresh"):
    """Row i of the golden script, with what the encoders read or with what upstream's encoders made of it."""
    row = {"text": GOLDEN[f"text.{i}"], "codes": GOLDEN[f"codes.{i}"]}
    if kind == "fresh":
        return row | {"features": GOLDEN[f"features.{i}"], "emo_features": GOLDEN[f"emotion.{i}"]}
    return row | {"spk": GOLDEN[f"spk.{i}"], "emovec": GOLDEN[f"emovec.{i}"]}


# ------------------------------------------------------------------------------------------------ the GPT and its encoders


@pytest.mark.parametrize("kind", ["fresh", "cached"])
def test_losses_are_those_of_the_original(model, kind):
    batch, counts = model.collate([example(0, kind), example(1, kind)], [1, 2])
    out = model(batch)
    assert counts == {"loss/text": 18 + 10, "loss/mel": 24 + 42, "metric/mel_accuracy": 66}
    torch.testing.assert_close(torch.stack([out["loss/text"], out["loss/mel"]]), GOLDEN["losses"], **TOLERANCE)


def test_gradients_are_those_of_the_original(model):
    with safe_open(HERE / "indextts2.safetensors", "pt") as f:
        names = json.loads(f.metadata()["gradients"])
    batch, counts = model.collate([example(0), example(1)], [1, 2])
    out = model(batch)
    sum(indextts2.LAMBDAS[k] * out[k] / counts[k] for k in indextts2.LAMBDAS).backward()
    ours = dict(model.named_parameters())
    assert set(names) == {n for n, p in ours.items() if p.grad is not None} == set(ours)
    gradients = {n: indextts2.stored_axes(n, ours[n].grad) for n in names}
    probes = tiny.fill({f"probe.{n}": tuple(g.shape) for n, g in gradients.items()})
    found = torch.tensor([[float((g * probes[f"probe.{n}"]).sum()), float(g.norm())] for n, g in gradients.items()])
    scale = GOLDEN["gradients"][:, 1:]
    assert ((found - GOLDEN["gradients"]) / scale.clamp(min=1e-4)).abs().max() < 1e-3


def test_conditioning_is_that_of_the_original(model):
    with torch.no_grad():
        for i in range(2):
            made = model.conditioned(example(i))
            torch.testing.assert_close(made["spk"], GOLDEN[f"spk.{i}"], **TOLERANCE)
            torch.testing.assert_close(made["emovec"], GOLDEN[f"emovec.{i}"], **TOLERANCE)
        clips = [GOLDEN["features.0"], GOLDEN["features.1"]]
        both = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True, padding_value=9.0)
        together = model.voice_latents(both, torch.tensor([37, 30]))
        torch.testing.assert_close(together, torch.stack([GOLDEN["spk.0"], GOLDEN["spk.1"]]), **TOLERANCE)


@torch.no_grad()
def prefix(model, i):
    spk = GOLDEN["spk.0"]
    conds = torch.cat([spk + GOLDEN["merged_emovec"], model.speed_emb.weight.flip(0)])
    return model._prefix({"conds": conds}, GOLDEN[f"text.{i}"].tolist())


def test_states_at_the_codes_are_those_of_the_original(model):
    """Row i is the state that predicts code i: upstream drops the last two rows of its own pass."""
    for i in range(2):
        conds = torch.cat([GOLDEN[f"spk.{i}"] + GOLDEN[f"emovec.{i}"], model.speed_emb.weight.detach().flip(0)])
        states = model._latents({"conds": conds}, GOLDEN[f"text.{i}"].tolist(), GOLDEN[f"codes.{i}"])
        torch.testing.assert_close(states, GOLDEN[f"latent.{i}"], **TOLERANCE)
        with torch.no_grad():
            logits = model.mel_head(states)[-4:]
        torch.testing.assert_close(logits, GOLDEN[f"mel_logits.{i}"][:4], **TOLERANCE)


KINDS = {"greedy": dict(num_beams=1), "penalty": dict(num_beams=1, repetition_penalty=10.0), "beams": dict(num_beams=3),
         "beams_penalty": dict(num_beams=3, repetition_penalty=10.0),
         "beams_length": dict(num_beams=4, repetition_penalty=2.0, length_penalty=1.0)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("together", [False, True], ids=["alone", "side by side"])
def test_codes_are_those_of_the_original(model, kind, together):
    s = indextts2.Sampling(temperature=0, **KINDS[kind])
    jobs = [indextts2.Job(prefix(model, i), torch.Generator(), 24) for i in range(2)]
    groups = [jobs] if together else [[job] for job in jobs]
    endings = [ending for group in groups for ending in model._search(group, s, "upstream")]
    for i, ending in enumerate(endings):
        wanted = GOLDEN[f"{kind}.{i}"].tolist()
        stop = model.config.stop_mel_token
        assert ending.by_itself == (stop in wanted)
        assert ending.codes == wanted[: wanted.index(stop)] if ending.by_itself else ending.codes == wanted


def test_the_golden_codes_tell_the_settings_apart():
    """What the searches of the original found differs, some end and some do not: else the test above would prove little."""
    found = {tuple(GOLDEN[f"{kind}.{i}"].tolist()) for kind in KINDS for i in range(2)}
    assert len(found) >= 7
    assert len({len(codes) for codes in found}) > 1


def test_emotion_between_two_clips(model):
    base, other = (model._alone(model.emotion_vector, GOLDEN[name]) for name in ("features.0", "emotion.0"))
    torch.testing.assert_close(base + 0.6 * (other - base), GOLDEN["merged_emovec"], **TOLERANCE)


# ------------------------------------------------------------------------------------------------ the chain


RUNS = {"plain": dict(), "audio": dict(emo_audio="other", emo_alpha=0.6),
        "vector": dict(emo_vector=[0.3, 0, 0.2, 0, 0.1, 0, 0, 0.05], emo_alpha=0.7)}


@pytest.mark.parametrize("run", RUNS)
def test_the_wave_is_that_of_the_original(model, run, monkeypatch):
    reference = speech_chain.Reference(GOLDEN["features.0"], GOLDEN["emotion_of_prompt"], GOLDEN["style"], GOLDEN["condition"], GOLDEN["ref_mel"])
    monkeypatch.setattr(model.codec, "reference", lambda source: reference)
    monkeypatch.setattr(model.codec, "emotion", lambda source: GOLDEN["emotion.0"])
    noise = [GOLDEN[f"noise.{run}.{k}"] for k in range(3)]
    chunks = list(model.generate("Hello there. How are you? It's me, again.", T.prompts(model), noise=noise, num_beams=1, top_k=1, max_len=9,
                                 max_text_tokens_per_segment=16, diffusion_steps=4, **RUNS[run]))
    wave = torch.cat(chunks)
    assert sum(1 for chunk in chunks if len(chunk) == 4410 and not chunk.any()) == 2  # between segments, none at the end
    ours = (32767 * wave).clamp(-32767, 32767)
    assert len(ours) == len(GOLDEN[f"wave.{run}"])
    assert (ours - GOLDEN[f"wave.{run}"]).abs().max() < 1 + 1e-3 * 32767  # int16 cuts off what stands behind the point
    assert GOLDEN[f"wave.{run}"].float().std() > 1000 and model.finish == ["cap"]


def test_the_runs_of_the_original_differ():
    waves = [GOLDEN[f"wave.{run}"].float() for run in RUNS]
    assert all((a - b).abs().max() > 1000 for a, b in zip(waves, waves[1:]))


# ------------------------------------------------------------------------------------------------ text


@pytest.mark.parametrize("row", TEXTS, ids=[repr(row["text"])[:30] for row in TEXTS])
def test_text_is_cut_as_the_original_cuts_it(model, row):
    assert model.encode_text(row["text"]) == row["ids"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for most, segments in row["segments"].items():
            pieces = [[model.tokenizer.id(piece) for piece in segment] for segment in segments]
            assert model.segments(row["text"], int(most)) == pieces


def test_the_texts_reach_every_rule():
    whole = " ".join(row["text"] for row in TEXTS)
    assert all(mark in whole for mark in front.MARKS)
    assert any(len(row["segments"]["12"]) > 3 for row in TEXTS) and any(2 in row["ids"] for row in TEXTS)
    duplicated = [row for row in TEXTS if sum(map(len, row["segments"]["120"])) > len(row["pieces"])]
    assert duplicated, "a quote behind a mark opens the next segment as well"


def test_unknown_characters_are_named(model):
    with pytest.raises(Invalid, match="has no piece that the vocabulary"):
        list(model.frames("§§", T.prompts(model), seed=1))
    with pytest.raises(Invalid, match="has no piece"):
        model.encode({"audio": T.voice(), "text": "§§"})
    with pytest.warns(UserWarning, match="no piece for § Ж"):
        list(model.frames("Hello § there Ж.", T.prompts(model), seed=1, max_len=2, num_beams=1))


def test_a_glossary_in_the_folder_is_read(folder, tmp_path):
    there = shutil.copytree(folder, tmp_path / "base")
    (there / "glossary.yaml").write_text("M.2:\n  en: M dot two\n  zh: M 二\nNVMe: N V M E\n", encoding="utf-8")
    model = models.load(there)
    assert model.encode_text("an m.2 nvme") == model.encode_text("an M dot two N V M E")
    assert model.encode_text("好 M.2") == model.encode_text("好 M 二")
    assert model.encode_key != models.load(folder).encode_key


# ------------------------------------------------------------------------------------------------ files


@pytest.mark.skipif(not LAYOUT.exists(), reason="the published layout is not here")
def test_every_published_tensor_has_its_place():
    layout = {name: (tuple(shape), dtype) for name, (shape, dtype) in json.loads(LAYOUT.read_text()).items()}
    stored = {name: checkpoint.Stored(shape, torch.float32, lambda: None) for name, (shape, _) in layout.items()}
    stored = indextts2.tidy(stored, "gpt.pth")
    gpt = dict(model_dim=1280, layers=24, heads=20, max_mel_tokens=1815, max_text_tokens=600, number_text_tokens=12000, number_mel_codes=8194,
               start_text_token=0, stop_text_token=1, start_mel_token=8192, stop_mel_token=8193)
    config = indextts2.read_config({"gpt": gpt}, {n: indextts2.stored_shape(n, t) for n, t in stored.items()}, "config.yaml")
    with torch.device("meta"):
        model = indextts2.IndexTTS2(config)
    ours = {name: tuple(t.shape) for name, t in model.published_state_dict().items()}
    assert ours == {name: shape for name, (shape, _) in layout.items()} and len(ours) == 665
    assert config.most_codes == 1817 and model.max_length == 34 + 602 + 1817
    assert sum(p.numel() for p in model.parameters()) == 865_980_639
    conformer = config.conditioning_encoder
    assert (conformer["features"], conformer["blocks"], conformer["heads"], config.emo_perceiver_encoder["inner"]) == (1024, 6, 8, 1365)


def test_what_is_published_is_gpt_pth(model, folder):
    state = torch.load(folder / "gpt.pth", weights_only=True)
    ours = model.published_state_dict()
    assert ours.keys() == state.keys() and all(torch.equal(ours[n], state[n]) for n in state)
    assert all(model.published_name(n) in state for n, _ in model.named_parameters())


def test_what_trainers_leave_in_the_file_is_known_and_said(folder, tmp_path, capsys):
    there = shutil.copytree(folder, tmp_path / "base")
    state = torch.load(folder / "gpt.pth", weights_only=True)
    plain = models.load(folder).published_state_dict()
    left = {"inference_model.transformer.h.0.ln_1.weight": state["gpt.h.0.ln_1.weight"], "gpt.wte.weight": state["mel_embedding.weight"]}
    wrapped = {n.replace(".c_attn.", ".c_attn.base_layer."): w for n, w in state.items()}
    lora_left = {"gpt.h.0.attn.c_attn.lora_A.default.weight": torch.zeros(2, T.WIDTH)}
    torch.save({"model": {**wrapped, **left, **lora_left}}, there / "gpt.pth")
    model = models.load(there)
    assert set(model.left_unused) == {*left, *lora_left}
    said = capsys.readouterr().err
    assert "base_layer" in said and "3 tensors are left out" in said
    assert all(torch.equal(plain[n], w) for n, w in model.published_state_dict().items())
    torch.save({**state, "something.else": torch.zeros(3)}, there / "gpt.pth")
    with pytest.raises(Invalid, match="unexpected something.else.*allow_unused_tensors"):
        models.load(there)
    state.pop("speed_emb.weight")
    torch.save(state, there / "gpt.pth")
    with pytest.raises(Invalid, match="missing speed_emb.weight"):
        models.load(there)


def test_s2mel_saved_by_several_processes_loads(folder, tmp_path):
    there = shutil.copytree(folder, tmp_path / "base")
    parts = {part: {"module." + n: w for n, w in values.items()} for part, values in T.s2mel_parts().items()}
    torch.save({"net": parts, "optimizer": {"state": {}}}, there / "s2mel.pth")
    a, b = (models.load(path).codec.part("s2mel") for path in (folder, there))
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def test_the_extra_models_are_found_in_every_usual_place(folder, tmp_path, monkeypatch):
    def found(path, **extra):
        model = models.load(path, extra=extra)
        return {key: model.codec.places.part(key) for key in speech_chain.PARTS}

    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    assert all(path.is_relative_to(folder / "hf_cache") for path in found(folder).values())
    hub = T.write(tmp_path / "hub", "hub")
    assert all("snapshots" in str(path) for path in found(hub).values())
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("hf_cache"))
    with pytest.raises(Invalid, match=r"(?s)w2v-bert-2.0 of facebook/w2v-bert-2.0 is missing.*features and codes.*hf download facebook/w2v-bert-2.0 "
                                      r"--local-dir.*extra.w2v_bert"):
        models.load(bare).encode({"audio": T.voice(), "text": "HELLO"})
    given = {key: path for key, path in found(folder).items()}
    assert found(bare, **given) == given
    shutil.copytree(folder / "hf_cache/bigvgan", tmp_path / "bigvgan_v2_22khz_80band_256x")  # a folder beside the checkpoint
    shutil.copytree(hub / "hf_cache", tmp_path / "home/hub")
    places = found(bare)
    assert places["bigvgan"].parent == tmp_path and places["campplus"].is_relative_to(tmp_path / "home/hub")
    with pytest.raises(Invalid, match="extra.bigvgan: nothing at"):
        models.load(bare, extra={"bigvgan": tmp_path / "nowhere"}).codec.part("bigvgan")


@pytest.mark.parametrize("missing, role", [("campplus_cn_common.bin", "take the voice"), ("bigvgan", "make sound of a mel"),
                                           ("semantic_codec_model.safetensors", "features into codes")])
def test_one_missing_model_is_named_when_it_is_needed(folder, tmp_path, missing, role):
    there = shutil.copytree(folder, tmp_path / "base")
    checkpoint.remove(there / "hf_cache" / missing)
    model = models.load(there)  # the GPT trains without it
    with pytest.raises(Invalid, match=rf"(?s){missing} of .* is missing, which is needed to .*{role}.*hf download"):
        list(model.generate("HELLO", T.prompts(model), seed=1, max_len=3))


def test_training_from_cached_rows_opens_the_weights_alone(folder, monkeypatch):
    opened = []
    read = checkpoint.read
    monkeypatch.setattr(checkpoint, "read", lambda path: opened.append(Path(path).name) or read(path))
    model = models.load(folder)
    batch, _ = model.collate([example(0, "cached"), example(1, "cached")], [1, 2])
    model(batch)["loss/mel"].backward()
    assert opened == ["gpt.pth"] and not model.codec.parts and model.codec_key


@pytest.mark.parametrize("change, said", [
    ({"version": 2.5}, "IndexTTS 2.5.*Only IndexTTS 2.0"), ({"s2mel": None, "version": 1.5}, "IndexTTS 1.5.*Only IndexTTS 2.0"),
    ({"s2mel": None, "version": None}, "IndexTTS 1.0 or 1.5.*Only"), ({"condition_type": "perceiver"}, "never published.*condition_type 'perceiver'")])
def test_other_versions_are_told_what_they_are(folder, tmp_path, change, said):
    there = shutil.copytree(folder, tmp_path / "base")
    config = T.config()
    for key, value in change.items():
        (config["gpt"] if key in config["gpt"] else config)[key] = value
    config = {k: v for k, v in config.items() if v is not None}
    (there / "config.yaml").write_text(json.dumps(config))
    with pytest.raises(Invalid, match=said):
        models.load(there)


def test_a_folder_without_a_file_is_told_which(folder, tmp_path):
    for name, said in (("gpt.pth", "has no gpt.pth.*hf download IndexTeam/IndexTTS-2 gpt.pth"), ("bpe.model", "no bpe.model.*hf download")):
        there = shutil.copytree(folder, tmp_path / name)
        (there / name).unlink()
        with pytest.raises(Invalid, match=f"(?s){said}"):
            models.load(there)
    there = shutil.copytree(folder, tmp_path / "config")
    (there / "config.yaml").unlink()
    with pytest.raises(Invalid, match="has no config.yaml"):
        indextts2.load(there)
    with pytest.raises(Invalid, match="from_scratch"):
        models.load(folder, weights="scratch")


def test_a_saved_folder_holds_everything_and_copies_nothing(model, folder, tmp_path):
    there = model.save(tmp_path / "copy")
    model = models.load(there)
    assert (there / "s2mel.pth").samefile(folder / "s2mel.pth")
    assert all(model.codec.places.part(key).is_relative_to(there) for key in speech_chain.PARTS)
    assert len(list(model.generate("HELLO.", T.prompts(model), seed=1, max_len=4))) > 0
    assert not model.tuned
