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
    assert ((found - GOLDEN["gradients"]) / scale.clamp(min=1e-6)).abs().max() < 1e-3


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
