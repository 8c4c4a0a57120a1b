"""IndexTTS2 against its own code by golden tensors and live against transformers; its text, its files, its properties."""
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lora
import models
from models import indextts2
from models.codecs import speech_chain
from models.parts import Invalid, audio, beam, checkpoint, front
from tests import tiny
from tests import tiny_indextts2 as T
from tests.conftest import ROOT
from tests.running import start

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
    endings = [ending for group in groups for ending in model._search(group, s)]
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
    assert not row["text"] or model.encode_text(row["text"]) == row["ids"]  # of nothing the original makes nothing, here it is refused
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
    assert front.normalize("say <a|b:c> now: it's") == "say <a|b:c> now, it is"


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
    assert (conformer.features, conformer.blocks, conformer.heads, config.emo_perceiver_encoder.inner) == (1024, 6, 8, 1365)


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
    with pytest.raises(Invalid, match="extra.bigvgan: no checkpoint at"):
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


# ------------------------------------------------------------------------------------------------ learning


def wave_of(i):
    return T.voice(0.6 + 0.2 * i, seed=i)


def learned_by_heart(model):
    """Train all of the model on two clips until nothing is left to learn. -> [(text, wave, codes)]"""
    spoken = [("Hello there.", wave_of(0)), ("It is me, again.", wave_of(1))]
    clips = [model.conditioned(model.encode({"audio": wave, "text": text})) for text, wave in spoken]
    batch, counts = model.collate(clips, [1, 2])
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(100):
        out = model(batch)
        optimizer.zero_grad()
        sum(out[k] / counts[k] for k in indextts2.LAMBDAS).backward()
        optimizer.step()
    return [(text, wave, clip["codes"]) for (text, wave), clip in zip(spoken, clips)]


@pytest.mark.parametrize("sampling", ({"temperature": 0.0}, {"temperature": 1.0, "top_p": 0.5}))
@pytest.mark.parametrize("num_beams", (1, 3))
def test_the_code_that_begins_is_never_spoken(model, num_beams, sampling):
    """It is the likeliest of all here, and the codec has no sound for it."""
    model.mel_head.bias.data[model.config.start_mel_token] = 50.0
    frames = list(model.frames("Hello there.", T.prompts(model), seed=1, num_beams=num_beams, max_len=6, **sampling))
    assert frames and max(int(codes.max()) for codes in frames) < model.config.start_mel_token


def test_two_clips_come_back_with_the_trained_positions(model, tmp_path):
    """Why the trained positions are the default once weights have changed: upstream's rule leaves out a position, and with
    it a code."""
    assert model.positions_rule(indextts2.Sampling()) == "upstream"
    spoken = learned_by_heart(model)
    greedy = dict(temperature=0, num_beams=1, seed=1, max_len=100)
    for text, wave, codes in spoken:
        assert torch.equal(torch.cat(list(model.frames(text, [(None, wave, None)], **greedy))), codes)
        assert model.finish == ["end"]
        skipped = torch.cat(list(model.frames(text, [(None, wave, None)], mel_positions="upstream", **greedy)))
        assert not torch.equal(skipped, codes)
    again = models.load(model.save(tmp_path / "tuned"))
    assert again.positions_rule(indextts2.Sampling()) == "training"
    assert torch.equal(torch.cat(list(again.frames(spoken[0][0], [(None, spoken[0][1], None)], **greedy))), spoken[0][2])


def test_dropout_is_for_full_tuning_unless_it_is_set(folder):
    batch, _ = models.load(folder).collate([example(0, "cached")], [1])

    def spread(model):
        model.train()
        return len({model(batch)["loss/mel"].item() for _ in range(3)})

    assert spread(models.load(folder)) == 3 and models.load(folder)._dropout() == 0
    assert spread(models.load(folder, options={"dropout": 0.0})) == 1
    adapted = models.load(folder)
    lora.apply_lora_to_model(adapted, {"r": 2})
    assert spread(adapted) == 1
    adapted.training_options.dropout = 0.3
    assert spread(adapted) == 3


def test_the_prompt_is_the_clip_another_one_or_drawn(folder):
    row = {"audio": wave_of(0), "ref_audio": wave_of(1), "text": "HELLO"}
    own, other = (models.load(folder).encode_audio(wave)["features"] for wave in (wave_of(0), wave_of(1)))
    prompts = {}
    for condition in ("same", "other", "mixed"):
        model = models.load(folder, options={"condition": condition, "mixed_ratio": 0.3})
        prompts[condition] = model.encode(row)
        assert torch.equal(model.encode({"audio": wave_of(0), "text": "HELLO"})["features"], own)
        assert torch.equal(prompts[condition]["emo_features"], own)  # the emotion is always that of the clip itself
    assert torch.equal(prompts["same"]["features"], own) and torch.equal(prompts["other"]["features"], other)
    assert torch.equal(prompts["mixed"]["features"], other) and torch.equal(prompts["mixed"]["self_features"], own)
    batch, _ = model.collate([prompts["mixed"]] * 200, list(range(200)))
    assert 35 < batch["same"].sum() < 85
    assert torch.equal(batch["same"][7:8], model.collate([prompts["mixed"]], [7])[0]["same"])
    assert not model.collate([prompts["mixed"]])[0]["same"].any()  # validation takes the other clip
    for cached in (False, True):
        examples = [model.conditioned(e) if cached else e for e in (prompts["mixed"], prompts["same"], prompts["other"])]
        mixed, _ = model.collate(examples[:1], [1])
        for same, wanted in ((True, 1), (False, 2)):
            mixed["same"] = torch.tensor([same])
            alone, _ = model.collate([examples[wanted]], [1])
            torch.testing.assert_close(model(mixed)["loss/mel"], model(alone)["loss/mel"])


def test_duration_rows_tell_the_length(folder):
    model = models.load(folder, options={"duration_rows": 0.7})
    batch, _ = model.collate([example(0, "cached")] * 100, list(range(100)))
    assert 55 < (batch["duration"] > 0).sum() < 85 and set(batch["duration"].tolist()) == {0, len(GOLDEN["codes.0"])}
    with torch.no_grad():
        speed = model._speed({"duration": torch.tensor([0, 23])}, 2)
        positions = model.mel_pos_embedding.emb.weight
        assert torch.equal(speed[0], model.speed_emb.weight[[1, 0]]) and torch.equal(speed[1], positions[[11, 23]])
    assert "duration" not in models.load(folder).collate([example(0, "cached")], [1])[0]


def test_rows_too_long_for_the_tables_are_refused(folder, tmp_path):
    small = models.load(T.write(tmp_path / "small", max_mel_tokens=30, max_text_tokens=8))
    with pytest.raises(Invalid, match=r"39 codes \(0.8 s\), the table of positions holds 31"):
        small.encode({"audio": wave_of(1), "text": "A"})
    with pytest.raises(Invalid, match="pieces, the table of positions holds 8"):
        small.encode({"audio": T.voice(0.4), "text": "ABCDEFGHIJKL"})
    with pytest.raises(Invalid, match="max_len is 33; the table of positions of this checkpoint holds 32 codes"):
        list(small.frames("A", T.prompts(small), max_len=33))
    codes = list(small.frames("A", T.prompts(small), seed=1, min_len=40, num_beams=1))  # as many as there are rows, no fewer
    assert len(codes[0]) == 32 and small.finish == ["cap"]
    with pytest.raises(Invalid, match="is empty"):
        small.encode({"audio": T.voice(0.4), "text": ""})
    with pytest.raises(Invalid, match="conversations"):
        small.encode({"turns": [{"text": "A", "audio": "a.wav"}]})


# ------------------------------------------------------------------------------------------------ emotion


def test_emotion_of_a_row(model, tmp_path):
    audio.write(tmp_path / "sad.wav", T.voice(0.7, seed=9), 22050)
    row = {"audio": wave_of(0), "text": "HELLO"}
    clip = model.encode_audio(wave_of(0))
    by_file = model.encode({**row, "emotion": str(tmp_path / "sad.wav")})
    assert torch.equal(by_file["emo_features"], model.codec.features(audio.read(tmp_path / "sad.wav", 16000)[0]))
    vector = [0.2, 0, 0.3, 0, 0, 0, 0.1, 0]
    by_vector = model.encode({**row, "emotion": vector})
    voices, emotions = (t.split(T.EMOTIONS) for t in T.tables())
    wanted = sum(w * e[F.cosine_similarity(clip["style"][None], v, dim=1).argmax()] for w, v, e in zip(vector, voices, emotions))
    torch.testing.assert_close(by_vector["emo_add"], wanted)
    assert by_vector["emo_share"].item() == pytest.approx(0.4)
    own = model.conditioned(model.encode(row))["emovec"]
    torch.testing.assert_close(model.conditioned(by_vector)["emovec"], wanted + 0.4 * own)
    batch = [by_vector, by_file, model.encode(row)]
    together = model(model.collate(batch, [1, 2, 3])[0])["loss/mel"]
    alone = sum(model(model.collate([model.conditioned(e)], [1])[0])["loss/mel"] for e in batch)
    torch.testing.assert_close(together, alone)
    with pytest.raises(Invalid, match="emo_vector has 7 numbers, expected 8: happy, angry"):
        model.encode({**row, "emotion": vector[:7]})


def test_emotion_in_speaking(model, tmp_path):
    audio.write(tmp_path / "sad.wav", T.voice(0.7, seed=9), 22050)

    def conds(**how):
        s, emotion = model._sampling(how)
        return model._request("HELLO", T.prompts(model), seed=5, s=s, **emotion)["conds"]

    vector = [0.2, 0, 0.3, 0, 0, 0, 0.1, 0]
    plain = conds()
    assert torch.equal(plain[-2:], model.speed_emb.weight[[1, 0]])
    assert torch.equal(conds(emo_audio=str(tmp_path / "sad.wav"), emo_alpha=0.0), plain)
    half, whole = (conds(emo_audio=str(tmp_path / "sad.wav"), emo_alpha=alpha) for alpha in (0.5, 1.0))
    torch.testing.assert_close(half - plain, (whole - plain) / 2)
    assert (whole - plain)[:-2].abs().max() > 0.01 and not (whole - plain)[-2:].any()
    by_vector = conds(emo_vector=vector)
    assert torch.equal(conds(emo_vector=[0.33339] + [0] * 7, emo_alpha=0.5), conds(emo_vector=[0.1666] + [0] * 7))  # cut, not rounded
    assert torch.equal(conds(emo_vector=vector, emo_audio=str(tmp_path / "sad.wav")), by_vector)  # the clip is not listened to
    torch.testing.assert_close(conds(emo_vector=vector, emo_alpha=0.5), conds(emo_vector=[x / 2 for x in vector]))
    assert torch.equal(conds(emo_vector=vector, emo_alpha=2.0), by_vector)
    assert torch.equal(conds(emo_vector=[2 * x for x in vector[:6]] + [0, 0], emo_normalize=True),
                       conds(emo_vector=indextts2.normalized([2 * x for x in vector[:6]] + [0, 0])))
    drawn = {tuple(conds(emo_vector=vector, use_random=True).flatten().tolist()) for _ in range(2)}
    assert len(drawn) == 1
    by_request = [model._request("HELLO", T.prompts(model), seed=5, emo_vector=vector)["conds"]]
    assert torch.equal(by_request[0], by_vector)
    for wrong, said in ((vector[:7], "has 7 numbers"), ([0.5] * 8, "adds up to 4, expected at most 1.*emo_normalize"),
                        ([-0.1] + vector[1:], "at least 0")):
        with pytest.raises(Invalid, match=said):
            conds(emo_vector=wrong)
    with pytest.raises(Invalid, match="emo_text: emotion in words needs a language model.*emo_vector, 8 numbers"):
        indextts2.Sampling(emo_text="very sad")


def test_a_prompts_own_emotion_is_that_of_its_file(model, monkeypatch):
    """A file is read a second time at 16 kHz for it: that reading alone counts, whatever emo_alpha says."""
    reference = model.codec.reference(T.voice())._replace(emotion=GOLDEN["emotion.0"])
    monkeypatch.setattr(model.codec, "reference", lambda source: reference)
    s = indextts2.Sampling(emo_alpha=0.3)
    conds = model._request("HELLO", T.prompts(model), seed=1, s=s)["conds"]
    with torch.no_grad():
        spk = model._alone(model.voice_latents, reference.features)
        emovec = model._alone(model.emotion_vector, reference.emotion)
    torch.testing.assert_close(conds[:-2], spk + emovec)


def test_the_published_weighing_of_a_vector():
    assert indextts2.normalized([0.1, 0.2, 0, 0, 0, 0, 0, 0]) == pytest.approx([0.09375, 0.175, 0, 0, 0, 0, 0, 0])
    assert sum(indextts2.normalized([1.0] * 8)) == pytest.approx(0.8)


# ------------------------------------------------------------------------------------------------ speaking


def requests(model):
    texts = ["Hello there.", "A longer text, with a comma. And a second sentence that is spoken as its own segment.", "No?"]
    return [dict(text=text, prompts=T.prompts(model), seed=i) for i, text in enumerate(texts)]


@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_speaks_as_each_of_its_requests_alone(model, beams):
    how = dict(num_beams=beams, max_len=30, max_text_tokens_per_segment=40)
    s = indextts2.Sampling(**how)
    together = {i: [] for i in range(3)}
    for i, codes in model._run([model._request(**r, s=s) for r in requests(model)], s):
        together[i].append(codes.tolist())
    ends = model.finish
    for i, r in enumerate(requests(model)):
        assert [codes.tolist() for codes in model.frames(**r, **how)] == together[i]
        assert model.finish == [ends[i]]
    assert len(together[1]) == 3 and len({len(codes) for group in together.values() for codes in group}) > 1


def test_sampling_fields_do_what_they_say(model):
    def codes(**how):
        return torch.cat(list(model.frames("Hello there.", T.prompts(model), **{"seed": 4, "max_len": 25, **how}))).tolist()

    for beams in (1, 3):
        assert codes(num_beams=beams, top_k=1, top_p=1.0) != codes(num_beams=beams, top_k=0, top_p=1.0, temperature=5.0)
        assert len(codes(num_beams=beams, min_len=25)) == 25 and model.finish == ["cap"]
    assert codes(num_beams=1, top_k=1, repetition_penalty=1.0) == codes(num_beams=1, temperature=0)  # greedy has no penalty
    assert codes(num_beams=1, top_k=0, top_p=1e-9, repetition_penalty=1.0) == codes(num_beams=1, temperature=0)
    free = codes(num_beams=1, temperature=0, max_len=60, min_len=60)
    bound = codes(num_beams=1, temperature=0, max_len=60, min_len=60, repetition_penalty=1e9)
    assert len(set(bound)) > 2 * len(set(free))
    assert codes(num_beams=1, mel_positions="training", temperature=0) != codes(num_beams=1, mel_positions="upstream", temperature=0)
    assert codes(seed=4) == codes(seed=4) != codes(seed=5)


def test_what_is_drawn_follows_the_probabilities():
    scores = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    g = torch.Generator().manual_seed(0)
    drawn = torch.stack([(scores + beam.gumbel(4, g)).argmax() for _ in range(4000)]).bincount(minlength=4) / 4000
    assert (drawn - scores.exp()).abs().max() < 0.02


def test_narrow_is_that_of_transformers(model):
    transformers = pytest.importorskip("transformers")
    scores = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * 3
    for least, top_k, top_p in ((1, 7, 0.8), (2, 1, 0.01), (2, 0, 0.5), (1, 30, 1.0)):
        wanted = scores / 0.7
        wanted = transformers.TopKLogitsWarper(top_k, min_tokens_to_keep=least)(None, wanted) if top_k else wanted
        wanted = transformers.TopPLogitsWarper(top_p, min_tokens_to_keep=least)(None, wanted) if top_p < 1 else wanted
        assert torch.equal(beam.narrow(scores, 0.7, top_k, top_p, least), wanted)
    used = torch.zeros(5, 40, dtype=torch.bool)
    ids = torch.randint(0, 40, (5, 6), generator=torch.Generator().manual_seed(1))
    used.scatter_(1, ids, True)
    theirs = transformers.RepetitionPenaltyLogitsProcessor(3.0)
    assert torch.equal(beam.penalise(scores, used, 3.0), theirs(ids, scores))
    scores = torch.randn(5, model.config.number_mel_codes, generator=torch.Generator().manual_seed(2)) * 3
    used = torch.zeros(scores.shape, dtype=torch.bool).scatter_(1, ids, True)
    for beams, raw in ((1, scores), (5, scores.log_softmax(-1))):  # of one beam the logits, of several the probabilities
        s = indextts2.Sampling(temperature=0, num_beams=beams, repetition_penalty=3.0)
        wanted = theirs(ids, raw)
        wanted[:, model.config.start_mel_token] = -torch.inf  # which upstream may take, and then fails
        assert torch.equal(model._scores(scores, used, s), wanted)


def test_beams_end_as_those_of_transformers():
    """Two beams, stop code 9: a stop counts if it ranks among the first two, and the search is over when two have ended
    and what still runs is no better."""
    search = beam.Beams(2, 9, 0.0)
    assert search.scores == [0.0, -1e9] and not search.done
    assert search.choose([-1.0, -2.0, -3.0, -4.0], [5, 6, 9, 7], [0, 0, 0, 0]) == [(0, 5), (0, 6)]
    assert not search.endings and search.codes == [[5], [6]]
    assert search.choose([-1.5, -2.5, -3.5, -4.5], [9, 8, 4, 3], [1, 0, 0, 1]) == [(0, 8), (0, 4)]
    assert search.endings == [(-1.5, [6], True)] and search.codes == [[5, 8], [5, 4]] and not search.done
    assert search.choose([-2.6, -3.0, -3.6, -4.0], [1, 9, 2, 9], [0, 1, 1, 0]) == [(0, 1), (1, 2)]
    assert [ending.score for ending in search.endings] == [-1.5, -3.0] and not search.done  # one that runs may still do better
    search.choose([-3.1, -3.2, -5.0, -6.0], [1, 2, 9, 9], [0, 1, 1, 0])
    assert search.done and search.best() == (-1.5, [6], True)
    low = beam.Beams(2, 9, 0.0)
    assert low.choose([-1.0, -2.0, -3.0, -4.0], [9, 5, 9, 6], [0, 0, 1, 1]) == [(0, 5), (1, 6)]
    assert [ending.score for ending in low.endings] == [-1.0]
    unfinished = beam.Beams(2, 9, 1.0)
    unfinished.choose([-1.0, -2.0, -9.0, -9.0], [5, 9, 6, 7], [0, 0, 0, 0])
    unfinished.choose([-3.0, -5.0, -9.0, -9.0], [5, 6, 7, 8], [0, 1, 0, 0])
    assert unfinished.best() == (-1.5, [5, 5], False)  # a sum of -3 over two codes, against -2 over one
    assert {ending.score for ending in unfinished.endings} == {-1.5, -2.0}


def test_a_take_without_an_end_is_tried_again(model):
    once = list(model.frames("Hello there.", T.prompts(model), seed=1, max_len=4, min_len=4))
    assert model.finish == ["cap"]
    tried = list(model.frames("Hello there.", T.prompts(model), seed=1, max_len=4, min_len=4, retries=2))
    assert not torch.equal(once[0], tried[0])
    assert torch.equal(tried[0], list(model.frames("Hello there.", T.prompts(model), seed=3, max_len=4, min_len=4))[0])


def test_noise_is_replayed_and_checked(model):
    how = dict(prompts=T.prompts(model), seed=1, max_len=5, min_len=5, num_beams=1, diffusion_steps=2)
    frames = model.codec.reference(how["prompts"][0][1]).mel.shape[-1] + 8
    noise = torch.randn(T.MELS, frames, generator=torch.Generator().manual_seed(0))
    a, b, c = (torch.cat(list(model.generate("HELLO", noise=n, **how))) for n in ([noise], [noise], [noise + 1]))
    assert torch.equal(a, b) and not torch.allclose(a, c, atol=1e-3) and len(a) == 8 * 256
    assert not torch.allclose(torch.cat(list(model.generate("HELLO", **{**how, "seed": 2}))), torch.cat(list(model.generate("HELLO", **how))), atol=1e-3)
    with pytest.raises(Invalid, match=rf"noise of segment 1 is \[80, 5\], expected \[80, {frames}\]"):
        list(model.generate("HELLO", noise=[noise[:, :5]], **how))
    with pytest.raises(Invalid, match="noise holds 0 segments and segment 1 is asked for"):
        list(model.generate("HELLO", noise=[], **how))
    slow = torch.cat(list(model.generate("HELLO", duration_factor=2.0, **how)))
    assert len(slow) == int(5 * 1.72 * 2.0) * 256


def test_an_empty_segment_is_silence_and_said(model):
    model.mel_head.bias.data[model.config.stop_mel_token] = 100.0
    with pytest.warns(UserWarning, match="segment 1 ended before its first code"):
        wave = torch.cat(list(model.generate("HELLO", T.prompts(model), seed=1)))
    assert model.finish == ["end"] and len(wave) == 256 and not wave.any()


def test_segments_are_joined_with_silence(model):
    how = dict(prompts=T.prompts(model), seed=1, max_len=3, min_len=3, num_beams=1, diffusion_steps=1, max_text_tokens_per_segment=14)
    wave = torch.cat(list(model.generate("Hello there. How are you?", interval_silence=100, **how)))
    assert len(wave) == 2 * 5 * 256 + 2205 and not wave[5 * 256 : 5 * 256 + 2205].any() and wave[-256:].any()
    assert len(torch.cat(list(model.generate("Hello there. How are you?", interval_silence=0, **how)))) == 2 * 5 * 256


@pytest.mark.parametrize("prompts, said", [
    ((), "0 prompts: this backbone takes the voice from exactly one recording"),
    ([(None, "a.wav", None)] * 2, "2 prompts"), ([("Hi.", "a.wav", None)], "a prompt with a transcript"),
    ([(None, None, None)], "the prompt has no audio"), ([(None, torch.zeros(22050), None)], "the prompt is silent"),
    ([(None, torch.randn(900), None)], "lasts 0.041 s; at least 0.1 s are needed"),
    ([(None, torch.zeros(1, 40), None)], r"of shape \[1, 40\]; expected a path or samples"),
    ([(None, "nowhere.wav", None)], "nowhere.wav: no such file")])
def test_wrong_prompts_are_named(model, prompts, said):
    with pytest.raises(Invalid, match=said):
        list(model.generate("HELLO", prompts, seed=1))


def test_a_long_prompt_is_cut_and_said(model):
    long, short = T.voice(15.5), T.voice(15.5)[: 15 * 22050]
    with pytest.warns(UserWarning, match="lasts 15.5 s; only its first 15 s"):
        a = model._request("HELLO", [(None, long, None)], seed=1)
    assert torch.equal(a["conds"], model._request("HELLO", [(None, short, None)], seed=1)["conds"])
    assert torch.equal(model.encode_audio(long)["features"], model.encode_audio(short)["features"])
    assert len(model.encode_audio(long)["codes"]) > len(model.encode_audio(short)["codes"])


def test_references_are_kept_by_content(model, tmp_path):
    for name in ("a", "b"):
        audio.write(tmp_path / f"{name}.wav", T.voice(), 22050)
    kept = model.codec.reference(tmp_path / "a.wav")
    assert model.codec.reference(tmp_path / "b.wav") is kept
    audio.write(tmp_path / "b.wav", T.voice(seed=8), 22050)
    assert model.codec.reference(tmp_path / "b.wav") is not kept
    assert not torch.equal(kept.emotion, kept.features) or len(kept.features)  # a file's emotion is read straight at 16 kHz


@pytest.mark.parametrize("wrong, said", [(dict(temperature=-1), "temperature is -1"), (dict(top_p=0.0), "top_p is 0.0, expected more than 0"),
                                         (dict(num_beams=0), "num_beams is 0"), (dict(mel_positions="both"), "mel_positions is 'both'"),
                                         (dict(duration_factor=0.0), "duration_factor is 0.0"), (dict(max_len=0), "max_len is 0")])
def test_wrong_sampling_is_refused(wrong, said):
    with pytest.raises(Invalid, match=said):
        indextts2.Sampling(**wrong)


# ------------------------------------------------------------------------------------------------ GPT-2 and adapters


def gpt2(model):
    """transformers' GPT-2 with the weights of the model's blocks, and no tables."""
    transformers = pytest.importorskip("transformers")
    c = model.config
    config = transformers.GPT2Config(vocab_size=4, n_positions=64, n_embd=c.model_dim, n_layer=c.layers, n_head=c.heads, attn_implementation="eager")
    reference = transformers.GPT2Model(config).eval()
    state = {n.removeprefix("gpt."): w for n, w in model.published_state_dict().items() if n.startswith("gpt.")}
    missing, unexpected = reference.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) == {"wte.weight", "wpe.weight"}
    reference.wpe.weight.data.zero_()
    return reference


def states(model, x):
    """The GPT's output for rows (B, L, C) without padding."""
    B, L, _ = x.shape
    packing = indextts2.Packing(torch.arange(B * L), B, L)
    return model.gpt(x.flatten(0, 1)[None], packing).view(B, L, -1)


def test_blocks_are_those_of_gpt2(model):
    x = torch.randn(2, 19, T.WIDTH, generator=torch.Generator().manual_seed(0))
    reference = gpt2(model)
    with torch.no_grad():
        torch.testing.assert_close(states(model, x), reference(inputs_embeds=x).last_hidden_state, rtol=1e-4, atol=1e-5)


TARGETS = ["c_attn", "c_proj", "c_fc"]


def test_an_adapter_acts_as_pefts_on_gpt2(model, tmp_path):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, fan_in_fan_out=True)
    reference = peft.get_peft_model(gpt2(model), settings)
    assert lora.apply_lora_to_model(model, {"r": 4, "alpha": 8.0, "target_modules": TARGETS}) == model.lora_targets(lora.LoRAConfig())
    g = torch.Generator().manual_seed(3)
    ours = dict(model.named_parameters())
    for name, p in reference.named_parameters():
        if "lora_" in name:
            p.data = 0.2 * torch.randn(p.shape, generator=g)
            ours["gpt." + name.removeprefix("base_model.model.").removesuffix(".default.weight")].data.copy_(p.data)
    x = torch.randn(2, 19, T.WIDTH, generator=g)
    with torch.no_grad():
        wanted = reference(inputs_embeds=x).last_hidden_state
        torch.testing.assert_close(states(model, x), wanted, rtol=1e-4, atol=1e-5)
    (states(model, x) ** 2).sum().backward()
    (reference(inputs_embeds=x).last_hidden_state ** 2).sum().backward()
    for name, p in reference.named_parameters():
        if "lora_" in name:
            mine = ours["gpt." + name.removeprefix("base_model.model.").removesuffix(".default.weight")]
            torch.testing.assert_close(mine.grad, p.grad, rtol=1e-3, atol=1e-4)
    merged = reference.merge_and_unload().state_dict()
    state = model.published_state_dict(merged=True)
    for name in (n for n in merged if ".c_" in n):
        torch.testing.assert_close(state["gpt." + name], merged[name], rtol=1e-5, atol=1e-6)


def test_features_are_normalised_with_the_stored_statistics(model, monkeypatch):
    wave = T.voice(0.5, 16000)
    inputs = audio.w2vbert_features(wave)
    state = model.codec.part("w2v_bert")(inputs[None], [audio.w2vbert_valid(len(wave))])[0]
    stored = T.statistics()
    torch.testing.assert_close(model.codec.features(wave), (state - stored["mean"]) / stored["var"].sqrt())
    high = T.voice(0.5)
    codes = model.codec.part("semantic_codec").quantize(model.codec.features(audio.resample(high, 22050, 16000))[None])[0]
    assert torch.equal(model.codec.encode(high), codes) and torch.equal(model.encode_audio(high)["codes"].long(), codes[0])


ENCODERS = ["linear_q", "w_1", "pointwise_conv1", "to_kv", "proj_context", "emo_layer"]


def test_an_adapter_on_the_encoders_needs_what_they_read(model):
    row = {"audio": wave_of(0), "text": "HELLO"}
    lora.apply_lora_to_model(model, {"r": 2, "target_modules": ["c_attn"]})
    assert not model.live and "spk" in model.encode(row)
    key = model.encode_key
    lora.apply_lora_to_model(model, {"r": 2, "target_modules": ["c_attn", *ENCODERS]})
    assert model.live and "features" in model.encode(row) and model.encode_key != key
    model(model.collate([model.encode(row)], [1])[0])["loss/mel"].backward()
    trained = [n for n, p in model.named_parameters() if p.grad is not None and n.endswith("lora_B") and p.grad.any()]
    assert all(any(f".{word}." in n or n.startswith(word) for n in trained) for word in ENCODERS)
    assert not any("w2v" in n for n, _ in model.named_parameters())
    with pytest.raises(Invalid, match="the adapter reaches into the conditioning encoders, but these rows hold spk.*never be trained"):
        model.collate([example(0, "cached")], [1])
    with pytest.raises(Invalid, match="some rows of a batch hold spk and others features"):
        model.collate([example(0, "cached"), example(1)], [1, 2])
    with pytest.raises(Invalid, match="neither spk nor features"):
        model.collate([{"text": GOLDEN["text.0"], "codes": GOLDEN["codes.0"]}], [1])


def stand_in(model):
    """A module with the published names and layers: Conv1D in the GPT, convolutions of kernel 1, Linears, tables."""
    conv1d = pytest.importorskip("transformers").pytorch_utils.Conv1D
    root = torch.nn.Module()
    for name, module in model.named_modules():
        if not name:
            continue
        holder, _, leaf = name.rpartition(".")
        place = root.get_submodule(holder)
        made = torch.nn.Module()
        if isinstance(module, torch.nn.Linear) and model.published_axes(name + ".weight") == "turned":
            made = conv1d(module.out_features, module.in_features)
        elif isinstance(module, torch.nn.Linear) and model.published_axes(name + ".weight") == "kernel":
            made = torch.nn.Conv1d(module.in_features, module.out_features, 1)
        elif isinstance(module, torch.nn.Linear):
            made = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        elif isinstance(module, torch.nn.Embedding):
            made = torch.nn.Embedding(*module.weight.shape)
        place.add_module(leaf, made)
    missing, _ = root.load_state_dict(model.published_state_dict(), strict=False)
    assert not missing
    return root


def linear_weights(state):
    return {n: w for n, w in state.items() if n.endswith(".weight") and w.ndim > 1 and "depthwise" not in n and "embed.conv" not in n}


WIDE = [*TARGETS, "text_head", "mel_head", *ENCODERS, "linear_out", "to_out", "pointwise_conv2", "emovec_layer"]


@pytest.mark.parametrize("targets, turned", [(TARGETS, True), (WIDE, False)], ids=["gpt", "seed"])
def test_our_adapters_load_in_peft(model, folder, tmp_path, targets, turned):
    peft = pytest.importorskip("peft")
    lora.apply_lora_to_model(model, {"r": 4, "alpha": 8.0, "target_modules": targets})
    g = torch.Generator().manual_seed(3)
    for m in lora.lora_modules(model).values():
        m.lora_B.data = 0.3 * torch.randn(m.lora_B.shape, generator=g)
    lora.save_lora_weights(model, tmp_path / "adapter", format="peft")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is turned and config["inference_mode"] is True
    stored = load_file(tmp_path / "adapter/adapter_model.safetensors")
    for name, tensor in stored.items():
        kernel = "pointwise" in name
        assert tensor.ndim == (3 if kernel else 2) and (not kernel or tensor.shape[2] == 1)
    theirs = peft.PeftModel.from_pretrained(stand_in(models.load(folder)), str(tmp_path / "adapter")).merge_and_unload().state_dict()
    ours = linear_weights(model.published_state_dict(merged=True))
    for name, w in ours.items():
        torch.testing.assert_close(theirs[name], w, rtol=1e-4, atol=1e-5, msg=name)
    base = models.load(folder).published_state_dict()
    assert any((ours[n] - base[n]).abs().max() > 0.01 for n in ours)


@pytest.mark.parametrize("form", ["safetensors", "bin", "fork of 1.5"])
def test_pefts_adapters_load_here(model, folder, tmp_path, form):
    peft = pytest.importorskip("peft")
    targets = TARGETS if form == "fork of 1.5" else WIDE
    reference = peft.get_peft_model(stand_in(model), peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    g = torch.Generator().manual_seed(3)
    for name, p in reference.named_parameters():
        if "lora_B" in name:
            p.data = 0.3 * torch.randn(p.shape, generator=g)
    reference.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    path = tmp_path / "adapter/adapter_model.safetensors"
    stored = load_file(path)
    if form == "bin":
        path.unlink()
        torch.save(stored, path.with_suffix(".bin"))
    elif form == "fork of 1.5":
        save_file({n.replace("base_model.model.gpt.", "base_model.model.transformer."): t for n, t in stored.items()}, path)
    loaded, skipped = lora.load_lora_weights(model, tmp_path / "adapter")
    assert len(loaded) == len(stored) and not skipped
    theirs = reference.merge_and_unload().state_dict()
    for name, w in linear_weights(model.published_state_dict(merged=True)).items():
        torch.testing.assert_close(theirs[name], w, rtol=1e-4, atol=1e-5, msg=name)
    assert model.positions_rule(indextts2.Sampling()) == "training"
    lora.set_lora_enabled(model, False)
    assert model.positions_rule(indextts2.Sampling()) == "upstream"


def test_layers_trained_in_full_keep_the_files_axes(model, folder, tmp_path):
    lora.apply_lora_to_model(model, {"r": 2, "target_modules": ["c_fc"], "train_modules": [r"gpt\.h\.0\.attn\.c_proj", r".*pointwise_conv1"]})
    for name in ("gpt.h.0.attn.c_proj", "conditioning_encoder.encoders.0.conv_module.pointwise_conv1"):
        model.get_submodule(name).weight.data += 0.1
    lora.save_lora_weights(model, tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter/adapter_model.safetensors")
    state = model.published_state_dict()
    for name in ("gpt.h.0.attn.c_proj.weight", "conditioning_encoder.encoders.0.conv_module.pointwise_conv1.weight"):
        assert torch.equal(stored["base_model.model." + name], state[name])
    again = models.load(folder)
    lora.load_lora_weights(again, tmp_path / "adapter")
    assert all(torch.equal(state[n], w) for n, w in again.published_state_dict().items())


# ------------------------------------------------------------------------------------------------ data of other trainers


def features_folder(folder, model):
    """What index-tts-full-lora-finetuning makes of two clips: a manifest and four .npy files for each."""
    (folder / "features").mkdir(parents=True)
    lines = []
    for i in range(2):
        clip = model.conditioned(model.encode({"audio": wave_of(i), "text": "HELLO THERE" * (i + 1)}))
        arrays = {"text_ids": clip["text"].int(), "codes": clip["codes"].int(), "condition": clip["spk"], "emo_vec": clip["emovec"]}
        row = {"id": f"clip{i}", "text": "Hello there", "audio_path": f"elsewhere/clip{i}.wav", "duration": 0.6 + 0.2 * i,
               "text_len": len(clip["text"]), "code_len": len(clip["codes"]), "condition_len": 32}
        for name, array in arrays.items():
            np.save(folder / f"features/clip{i}_{name}.npy", array.numpy())
            row[f"{name}_path"] = f"features/clip{i}_{name}.npy"
        lines.append(json.dumps(row))
    for name in ("train", "val"):
        (folder / f"{name}_manifest.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_a_prepared_data_set_of_another_trainer_is_used_as_it_is(model, folder, tmp_path):
    data = features_folder(tmp_path / "data", model)
    flags = ("--pretrained_path", folder, "--train_manifest", data / "train_manifest.jsonl", "--val_manifest", data / "val_manifest.jsonl",
             "--save_path", tmp_path / "run", "--num_iters", 2, "--batch_size", 2, "--warmup_steps", 0, "--max_batch_tokens", 0)
    process = start("train", (Path(ROOT) / "configs/indextts2_lora.yaml", *flags, "--grad_accum_steps", 1), tmp_path)
    assert process.wait() == 0, process.said
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    batch, counts = model.collate([model.conditioned(model.encode({"audio": wave_of(i), "text": "HELLO THERE" * (i + 1)})) for i in range(2)])
    out = model(batch)
    assert lines[0]["step"] == 0 and lines[0]["loss/mel"] == pytest.approx(out["loss/mel"].item() / counts["loss/mel"], rel=1e-4)
    lora_on_encoders = start("train", (Path(ROOT) / "configs/indextts2_lora.yaml", *flags, "--overwrite", "true", "--lora.target_modules", "linear_q"),
                             tmp_path)
    assert lora_on_encoders.wait() != 0 and "the adapter reaches into the conditioning encoders" in lora_on_encoders.said


def test_wrong_prepared_rows_are_named(model, tmp_path):
    data = features_folder(tmp_path / "data", model)
    row = json.loads((data / "train_manifest.jsonl").read_text().splitlines()[0])
    row = {key: str(data / row[f"{key}_path"]) for key in ("text_ids", "codes", "condition", "emo_vec")}
    assert set(model.encode(row)) == {"text", "codes", "spk", "emovec"}
    with pytest.raises(Invalid, match="lacks emo_vec_path"):
        model.encode({key: row[key] for key in ("text_ids", "codes", "condition")})
    np.save(tmp_path / "wide.npy", np.zeros((32, 1280), np.float32))
    with pytest.raises(Invalid, match=r"wide.npy is \[32, 1280\], this model needs \[32, 32\]"):
        model.encode({**row, "condition": str(tmp_path / "wide.npy")})
    np.save(tmp_path / "stop.npy", np.array([3, 65], np.int32))
    with pytest.raises(Invalid, match="stop.npy holds 3 to 65, expected 0 to 63, without start and stop"):
        model.encode({**row, "codes": str(tmp_path / "stop.npy")})
    (tmp_path / "text.npy").write_text("no array")
    with pytest.raises(Invalid, match="text.npy cannot be read"):
        model.encode({**row, "codes": str(tmp_path / "text.npy")})


# ------------------------------------------------------------------------------------------------ scripts


def test_the_flags_of_index_tts_speak(folder, tmp_path):
    """Its names for prompt, emotion and output; what cannot work here is wrong use."""
    for name in ("voice", "sad"):
        audio.write(tmp_path / f"{name}.wav", T.voice(seed=len(name)), 22050)
    flags = ("--model_path", folder, "--text", "HELLO.", "--spk_audio_prompt", "voice.wav", "--max_len", 4, "--min_len", 4, "--retries", 0,
             "--diffusion_steps", 2)
    emotions = {"plain": (), "clip": ("--emo_audio_prompt", "sad.wav", "--emo_alpha", 0.6),
                "vector": ("--emo_vector", "0.3,0,0.2,0,0,0,0,0", "--use_random", "--interval_silence", 100, "--max_text_tokens_per_segment", 50)}
    waves = {}
    for name, more in emotions.items():
        process = start("infer", (*flags, *more, "--output_path", f"{name}.out.wav"), tmp_path)
        assert process.wait() == 0, process.said
        waves[name] = audio.read(tmp_path / f"{name}.out.wav")[0]
        assert len(waves[name]) == 6 * 256
    assert not torch.equal(waves["plain"], waves["clip"]) and not torch.equal(waves["plain"], waves["vector"])
    for wrong, said, code in ((("--emo_text", "sad"), "emotion in words needs a language model", 2), (("--emo_vector", "0.5,0.5"), "has 2 numbers", 1)):
        process = start("infer", (*flags, *wrong, "--output_path", "wrong.wav"), tmp_path)
        assert process.wait() == code and said in process.said and not (tmp_path / "wrong.wav").exists()
    process = start("infer", ("--ckpt_dir", folder, "--text", "HELLO.", "--output", "wrong.wav"), tmp_path)
    assert process.wait() == 1 and "takes the voice from exactly one recording" in process.said


def test_prepare_names_the_characters_that_have_no_piece(folder, tmp_path):
    (tmp_path / "talk/wavs").mkdir(parents=True)
    for i, text in enumerate(("hello there", "hello § there", "lower and UPPER, all known")):
        audio.write(tmp_path / f"talk/wavs/a{i}.wav", T.voice(0.5, seed=i), 22050)
        (tmp_path / f"talk/wavs/a{i}.txt").write_text(text)
    process = start("prepare_data", ("--input", "talk", "--output_dir", "data", "--ckpt_dir", folder, "--val_split", 0, "--workers", 1), tmp_path)
    assert process.wait() == 0, process.said
    report = json.loads((tmp_path / "data/report.json").read_text())
    assert report["checkpoints"][0]["unknown characters"] == {"§": 1}
    assert [notice["id"] for notice in report["notices"] if notice["kind"] == "unknown tokens"] == ["a1"]
