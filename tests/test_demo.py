"""The demo's scripts on a small scale: sentences, speech, tokenizer, codec training that resumes, measures, the base itself."""
import json
import os
import stat
import struct
import sys

import numpy as np
import pytest
import soundfile
import torch

from demo import evaluate, make_speech, train_audiovae
from models.codecs import audiovae
from models.parts import Invalid
from models.parts.tokenizer import Tokenizer
from tests import conftest

RECIPE = conftest.ROOT / "demo/recipe"


def run(monkeypatch, module, *flags):
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, flags)])
    return module.main()


# ------------------------------------------------------------------------------------------------ sentences and speech


def test_sentences_are_distinct_and_the_same_every_time():
    parts = {"test": 30, "heldout": 10, "voice": 50, "base": 500}
    said = make_speech.sentences(parts)
    every = [t.lower() for texts in said.values() for t in texts]
    assert len(set(every)) == len(every) == 590
    assert make_speech.sentences({**parts, "base": 40})["base"] == said["base"][:40]
    assert make_speech.sentences(parts, seed=1)["test"] != said["test"]
    words = set(make_speech.vocabulary())
    assert {w for t in every for w in make_speech.plain(t).split()} <= words and 250 < len(words) < 400
    assert not any(" a " + v in t for t in every for v in "aeio")


def test_the_tokenizer_in_the_base_is_what_the_script_makes():
    spec = make_speech.tokenizer(make_speech.sentences({"base": 12000})["base"], 200)
    assert spec == json.loads((RECIPE / "tokenizer.json").read_text(encoding="utf-8"))
    config = json.loads((RECIPE / "config.json").read_text())
    assert len(spec["model"]["vocab"]) == config["lm_config"]["vocab_size"]
    tokenizer = Tokenizer(spec)
    for text in make_speech.sentences({"base": 300})["base"]:
        ids = [tokenizer.vocab[p] for p in tokenizer.pieces(text)]
        assert len(ids) < len(text) and not set(ids) & {0, 101, 102, 103, 104}


def pretend_flite(folder, monkeypatch):
    """A program named flite that says the same tone to everything, with the header lengths of a pipe."""
    tone = (8000 * np.sin(2 * np.pi * 170 * np.arange(12000) / 16000)).astype("<i2")
    pcm = np.concatenate([np.zeros(4000, "<i2"), tone, np.zeros(4000, "<i2")]).tobytes()
    header = b"RIFF" + struct.pack("<I", 0xFFFFFFFF) + b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, 16000, 32000, 2, 16) + b"data" + struct.pack("<I", 0xFFFFFFFF)
    (folder / "said.wav").write_bytes(header + pcm)
    program = folder / "flite"
    program.write_text(f"#!/bin/sh\ncat {folder / 'said.wav'}\n")
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_speech_is_trimmed_and_listed(tmp_path, monkeypatch):
    pretend_flite(tmp_path, monkeypatch)
    plain, shorter = make_speech.speak("hello", "awb"), make_speech.speak("hello", "awb", pitch=200, shift=1.25)
    assert plain.dtype == np.int16 and abs(len(plain) - 12000 - 1600) < 40  # 50 ms of silence stay at both ends
    assert abs(len(shorter) - 12000 / 1.25 - 1600) < 40
    assert abs(np.median(evaluate.pitches(torch.tensor(shorter / 32768, dtype=torch.float32), 16000)) / (170 * 1.25) - 1) < 0.02
    run(monkeypatch, make_speech, "--part", "voice", "--output_dir", tmp_path / "voice", "--workers", 1)
    rows = {n: [json.loads(line) for line in open(tmp_path / "voice" / f"{n}.jsonl")] for n in ("voice", "heldout", "shuffled")}
    assert [len(rows[n]) for n in rows] == [50, 10, 50] and soundfile.info(tmp_path / "voice" / rows["voice"][0]["audio"]).samplerate == 16000
    assert all(a["audio"] == b["audio"] and a["text"] != b["text"] for a, b in zip(rows["voice"], rows["shuffled"]))


def test_a_synthesiser_that_fails_is_quoted(tmp_path, monkeypatch):
    (tmp_path / "flite").write_text("#!/bin/sh\necho no such voice >&2\nexit 1\n")
    (tmp_path / "flite").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(Invalid, match="no such voice"):
        make_speech.speak("hello", "nobody")


# ------------------------------------------------------------------------------------------------ the codec


@pytest.fixture(scope="module")
def tones(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("tones"), np.random.default_rng(0)
    rows = []
    for i in range(18):
        wave = 0.3 * np.sin(2 * np.pi * rng.uniform(100, 300) * np.arange(rng.integers(3000, 6000)) / 4000)
        soundfile.write(folder / f"{i}.wav", wave, 4000)
        rows.append({"audio": f"{i}.wav", "text": "tone"})
    (folder / "tones.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    vae = dict(encoder_dim=4, encoder_rates=[2, 5, 4, 4], latent_dim=4, decoder_dim=32, decoder_rates=[4, 4, 5, 2], sample_rate=4000)
    (folder / "config.json").write_text(json.dumps({"audio_vae_config": vae}))
    return folder, vae


def test_a_codec_run_killed_again_and_again_ends_the_same(tones, tmp_path, monkeypatch, capsys):
    folder, vae = tones
    monkeypatch.setattr(train_audiovae.MelDistance, "RESOLUTIONS", ((256, 20), (64, 5)))

    def go(where, *flags):
        run(monkeypatch, train_audiovae, "--speech", folder / "tones.jsonl", "--config", folder / "config.json", "--save_path", tmp_path / where,
            "--minutes", 0, "--num_iters", 4, "--batch_size", 2, "--seconds", 0.25, "--adversarial", "on", "--adversarial_from", 0.5,
            "--learning_rate", 0.01, "--log_interval", 1, *flags)

    go("whole")
    for _ in range(3):
        go("parts", "--pause_minutes", 1e-6)
        assert not (tmp_path / "parts/audiovae.safetensors").exists()
    assert "paused at step 3" in capsys.readouterr().out
    go("parts", "--pause_minutes", 1e-6)  # the last step was taken, nothing is left to pause
    assert (tmp_path / "parts/audiovae.safetensors").read_bytes() == (tmp_path / "whole/audiovae.safetensors").read_bytes()
    lines = [json.loads(line) for line in open(tmp_path / "whole/metrics.jsonl")]
    assert len(lines) == 4 and "judges" not in lines[1] and lines[-1]["judges"] > 0 and lines[-1]["skipped"] == 0
    with pytest.raises(Invalid, match="other settings"):
        go("whole", "--capacity", 2)
    go("clipped", "--max_grad_norm", 1e-12)
    steps = [torch.load(tmp_path / where / "state.pth", weights_only=True)["optimizers"][0]["state"][0]["exp_avg"] for where in ("whole", "clipped")]
    assert steps[1].abs().max() < 1e-9 < steps[0].abs().max()
    codec = audiovae.load(tmp_path / "whole", vae)
    assert codec.encode(torch.zeros(801)).shape == (6, 4)


@pytest.mark.parametrize("depthwise", (True, False))
def test_the_normalisation_of_training_ends_up_in_the_codec(depthwise):
    settings = dict(encoder_dim=4, encoder_rates=[2, 5], latent_dim=4, decoder_dim=8, decoder_rates=[5, 2], depthwise=depthwise)
    codec = audiovae.AudioVAE(**audiovae.settings(settings, audiovae.V1)).requires_grad_(False)
    wav, noise = 0.1 * torch.randn(1, 1, 400), torch.zeros(1, 4, 40)
    train_audiovae.level(codec, wav)
    made, (z,) = train_audiovae.forward(codec, wav, noise)[0], codec.encode(wav[:, 0])
    assert abs(made.std() / torch.tanh(torch.randn(10000) * wav.std()).std() - 1) < 0.2  # as loud as speech from the first step
    train_audiovae.fold(codec, z.mean(0), z.std(0, correction=0))
    assert torch.allclose(codec.encode(wav[0, 0]), (z - z.mean(0)) / z.std(0, correction=0), atol=1e-4)
    assert torch.allclose(codec.decode(codec.encode(wav[0, 0])), made[0, 0], atol=1e-4)


def test_a_silent_codec_still_feels_which_way_is_louder():
    mel, speech = train_audiovae.MelDistance(16000), 0.1 * torch.randn(1, 1, 4096)
    silence = (1e-7 * torch.randn(1, 1, 4096)).requires_grad_()
    distance = mel(speech, silence)
    distance.backward()
    assert float(mel(speech, (silence - 1e-4 * silence.grad / silence.grad.abs().max()).detach())) < distance.item()
    assert float(mel(torch.zeros(1, 1, 4096), 1e-6 * torch.randn(1, 1, 4096))) < 0.01  # far below the floor nothing counts


def test_levelling_brings_every_layer_to_variance_one():
    codec = audiovae.AudioVAE(**audiovae.settings(dict(encoder_dim=4, encoder_rates=[2, 5], latent_dim=4, decoder_dim=8, decoder_rates=[5, 2]), audiovae.V1))
    wav, sizes = 0.1 * torch.randn(2, 1, 400), []
    train_audiovae.level(codec, wav)
    for layer in codec.modules():
        if isinstance(layer, (torch.nn.Conv1d, torch.nn.ConvTranspose1d)):
            layer.register_forward_hook(lambda layer, _, out: sizes.append(float(out.detach().std())))
    train_audiovae.forward(codec, wav, torch.zeros(()))
    assert len(sizes) > 20 and sizes[:-1] == pytest.approx([1] * (len(sizes) - 1), abs=1e-3) and sizes[-1] == pytest.approx(float(wav.std()), abs=1e-3)


# ------------------------------------------------------------------------------------------------ measures


def test_word_errors_count_substitutions_deletions_insertions():
    said = "the cat is in the kitchen".split()
    for heard, errors in (("the cat is in the kitchen", 0), ("the dog is in kitchen", 2), ("the the cat is in the kitchen now", 2), ("", 6)):
        assert evaluate.word_errors(said, heard.split()) == errors


def voice(pitch, seconds, formants=(500, 1500, 2500), rate=16000):
    """Harmonics under moving resonances, enough like speech for the measures."""
    t, out = np.arange(int(seconds * rate)) / rate, 0.0
    drift = 1 + 0.3 * np.sin(2 * np.pi * 1.5 * t / seconds)
    for k in range(1, int(7000 / pitch)):
        gain = sum(np.exp(-((k * pitch - f * drift) / 200) ** 2) for f in formants) + 0.01
        out = out + gain * np.sin(2 * np.pi * k * pitch * t)
    return torch.tensor(0.05 * out, dtype=torch.float32)


def test_cepstral_distance_forgives_tempo_and_level_but_not_timbre():
    a = evaluate.cepstrum(voice(120, 1.0), 16000)
    same, slower, louder = evaluate.cepstral_distance(a, a), *(evaluate.cepstral_distance(a, evaluate.cepstrum(w, 16000)) for w in (voice(120, 1.4), 2 * voice(120, 1.0)))
    other = evaluate.cepstral_distance(a, evaluate.cepstrum(voice(120, 1.0, (700, 1900, 3000)), 16000))
    assert same < 1e-3 and louder < 1 and slower < 0.4 * other and other > 3


def test_pitch_is_found_from_low_to_high():
    for pitch in (85, 120, 172, 240):
        assert abs(np.median(evaluate.pitches(voice(pitch, 0.5), 16000)) / pitch - 1) < 0.03
    assert len(evaluate.pitches(torch.zeros(9000), 16000)) == len(evaluate.pitches(torch.zeros(10), 16000)) == 0


def test_requirements_follow_the_figures():
    def figures(words, distance, pitch, seconds, stopped):
        return {"words_wrong": words, "distance": distance, "pitch": pitch, "seconds": seconds, "stopped": stopped, "sentences": 30}

    good = {"base voices": figures(10, 9, 110, 2.4, None), "base voices, codec": figures(14, 9, 110, 2.4, None), "slt": figures(12, 0, 170, 2.3, None),
            "slt, codec": figures(15, 4, 170, 2.3, None), "base": figures(28, 9, 105, 2.5, 29), "fine-tuned": figures(29, 6, 165, 2.2, 28),
            "shuffled": figures(60, 6, 165, 2.2, 3)}
    assert [met for _, met in evaluate.requirements(good)] == [True] * 9
    for name, key, value in (("base", "words_wrong", 30), ("base", "stopped", 27), ("base", "seconds", 3.0), ("fine-tuned", "words_wrong", 31),
                             ("fine-tuned", "distance", 6.6), ("fine-tuned", "pitch", 150), ("fine-tuned", "stopped", 20),
                             ("fine-tuned", "seconds", 1.9), ("shuffled", "words_wrong", 40)):
        assert [met for _, met in evaluate.requirements({**good, name: {**good[name], key: value}})].count(False) == 1, (name, key)
    unheard = {k: {**v, "words_wrong": None} for k, v in good.items()}
    assert len(evaluate.requirements(unheard)) == 6


def test_without_the_recogniser_word_errors_are_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert evaluate.recognise([]) is None and "apt-get install pocketsphinx" in capsys.readouterr().err
