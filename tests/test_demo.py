"""The demo's scripts on a small scale: sentences, robots, tokenizer, the codec that is set, measures, the base itself."""
import dataclasses
import json
import os
import random
import stat
import struct
import sys

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

import infer
import models
from demo import evaluate, make_codec, make_speech, pack_base, robot
from models.codecs import audiovae
from models.parts import Invalid, measures
from models.parts.tokenizer import Tokenizer
from tests import conftest

BASE, VOICE = conftest.ROOT / "demo/base", conftest.ROOT / "demo/voice"


def run(monkeypatch, module, *flags):
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, flags)])
    return module.main()


# ------------------------------------------------------------------------------------------------ sentences


def test_sentences_are_distinct_and_the_same_every_time():
    parts = {"test": 30, "heldout": 10, "pool": 50, "base": 500}
    said = make_speech.sentences(parts)
    every = [text.lower() for texts in said.values() for text in texts]
    assert len(set(every)) == len(every) == 590
    assert make_speech.sentences({**parts, "base": 40})["base"] == said["base"][:40]
    assert make_speech.sentences(parts, seed=1)["test"] != said["test"]


def test_no_sentence_repeats_a_word_and_all_words_are_in_the_vocabulary():
    known = set(make_speech.vocabulary())
    assert 100 < len(known) < 150
    for text in make_speech.sentences({"base": 500})["base"]:
        words = make_speech.plain(text).split()
        assert len(set(words)) == len(words) and set(words) <= known, text


def test_the_sentences_of_the_voice_hold_every_word():
    said = make_speech.sentences({"pool": make_speech.POOL})["pool"]
    chosen = make_speech.covering(said, make_speech.VOICE_CLIPS)
    words = [word for text in chosen for word in make_speech.plain(text).split()]
    assert len(set(chosen)) == make_speech.VOICE_CLIPS and set(words) == set(make_speech.vocabulary())


def test_the_tokenizer_of_the_base_is_what_the_script_makes():
    spec = make_speech.tokenizer()
    assert spec == json.loads((BASE / "tokenizer.json").read_text(encoding="utf-8"))
    config = json.loads((BASE / "config.json").read_text())
    assert len(spec["model"]["vocab"]) == config["lm_config"]["vocab_size"]


def test_a_word_is_one_piece_wherever_it_stands():
    tokenizer = Tokenizer(make_speech.tokenizer())
    for text in make_speech.sentences({"base": 300})["base"]:
        words = make_speech.plain(text).split()
        pieces = [piece for piece in tokenizer.pieces(text) if piece != "\u2581,"]
        assert pieces == ["\u2581" + word for word in words]
    assert tokenizer.encode("The table.") == tokenizer.encode("the TABLE!")
    assert tokenizer.pieces("Foxtrot Yesterday, the doctor waited.")[:3] == ["\u2581foxtrot", "\u2581yesterday", "\u2581,"]


def test_a_word_that_the_base_does_not_know_is_refused_with_those_it_knows(tmp_path, monkeypatch, capsys):
    model = models.load(BASE)
    monkeypatch.setattr(model, "generate_batch", None)  # refused before anything is spoken
    monkeypatch.setattr(infer, "load_model", lambda *args: model)
    lines = ["Where is the cat?", "They carry the table \u263a", "Bananas, my lord"]
    (tmp_path / "in.txt").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(Invalid) as caught:
        run(monkeypatch, infer, "--ckpt_dir", BASE, "--input", tmp_path / "in.txt", "--output_dir", tmp_path)
    said = str(caught.value)
    assert "Where is the cat?: the tokenizer has no token for 'cat'" in said and "no token for 'lord'" in said
    assert "table, teacher, the, they" in said and "They carry" not in said
    assert "no token for \u263a: left unsaid" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ robots


def pretend_flite(folder, monkeypatch, listing_first=False):
    """A program named flite that hums for 0.3 s to everything, with the header lengths of a pipe and its list of phones."""
    t = np.arange(4800) / 16000
    hum = sum(np.sin(2 * np.pi * 100 * k * t) / k for k in range(1, 30))
    pcm = np.concatenate([np.zeros(1600), 6000 * hum, np.zeros(1600)]).astype("<i2").tobytes()
    unknown = struct.pack("<I", 0xFFFFFFFF)
    header = b"RIFF" + unknown + b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, 16000, 32000, 2, 16) + b"data" + unknown
    listing = b"pau:0.100 ah:0.250 m:0.400 pau:0.500 \n"
    (folder / "said").write_bytes(listing + header + pcm if listing_first else header + pcm + listing)
    program = folder / "flite"
    program.write_text(f"#!/bin/sh\ncat {folder / 'said'}\n")
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    for cached in (make_speech.spoken_words, make_speech.analysed_words, make_speech.word_bank):
        cached.cache_clear()


@pytest.mark.parametrize("listing_first", (False, True))
def test_speech_and_its_phones_come_out_of_one_pipe(tmp_path, monkeypatch, listing_first):
    pretend_flite(tmp_path, monkeypatch, listing_first)
    said = robot.flite("hello", "awb")
    assert len(said.wave) == 8000 and np.abs(said.wave[:1500]).max() == 0
    assert said.bounds == [0.1, 0.25, 0.4] and said.seconds == pytest.approx(0.3)


def test_a_synthesiser_that_fails_is_quoted(tmp_path, monkeypatch):
    (tmp_path / "flite").write_text("#!/bin/sh\necho no such voice >&2\nexit 1\n")
    (tmp_path / "flite").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(Invalid, match="no such voice"):
        robot.flite("hello", "nobody")


def steady_frames(T=64, voicing=1.0):
    levels = 0.05 * np.ones((T, robot.BANDS)) / np.arange(1, robot.BANDS + 1) ** 0.5
    return robot.Frames(levels, np.full(T, voicing))


def test_a_robot_repeats_exactly_every_period_and_has_its_pitch():
    for pitch in (100, 150, 200):
        wave = robot.synthesise(steady_frames(), pitch)
        middle = wave[2 * robot.BLOCK:-2 * robot.BLOCK]
        assert len(wave) == 64 * robot.HOP
        assert np.allclose(middle[robot.PERIOD:], middle[:-robot.PERIOD], atol=1e-9)
        assert abs(measures.pitch(torch.tensor(wave), 16000).median() / pitch - 1) < 0.01
    noise = robot.synthesise(steady_frames(voicing=0.0), 100)[2 * robot.BLOCK:-2 * robot.BLOCK]
    assert np.allclose(noise[robot.PERIOD:], noise[:-robot.PERIOD], atol=1e-9) and not np.allclose(noise[160:], noise[:-160], atol=1e-3)


def test_what_is_analysed_comes_back():
    frames = robot.Frames(*steady_frames())
    wave = robot.synthesise(frames, robot.FLITE_PITCH)
    again = robot.analyse(wave, np.arange(20, 40) / 100)
    assert again.voicing.min() > 0.9
    ratio = again.levels.mean(0) / frames.levels[0]
    assert ratio.std() / ratio.mean() < 0.35  # the harmonics of the lowest bands are few
    noise = robot.synthesise(steady_frames(voicing=0.0), robot.FLITE_PITCH)
    assert robot.analyse(noise, np.arange(20, 40) / 100).voicing.mean() < 0.6


def test_a_shorter_tract_moves_what_is_in_the_bands_up():
    levels = np.full((1, robot.BANDS), 0.01)
    levels[0, 10] = 1.0
    moved = robot.shorten(levels, 1.3)
    assert moved.argmax() > 10 and np.allclose(robot.shorten(levels, 1.0), levels, rtol=1e-3)


def test_compression_pulls_loud_and_soft_frames_together():
    loud, soft = steady_frames(), steady_frames()
    clips = robot.compress([robot.Frames(10 * loud.levels, loud.voicing), soft])
    levels = [float(clip.levels.mean()) for clip in clips]
    assert 1.2 < levels[0] / levels[1] < 3


def test_words_last_whole_blocks_and_unknown_ones_are_named(tmp_path, monkeypatch):
    pretend_flite(tmp_path, monkeypatch)
    first = make_speech.ROBOTS[make_speech.FIRST]
    wave = make_speech.speak("The teacher, waited.", first)
    blocks_per_word = round(0.3 / make_speech.SPEED / 0.08)
    assert wave.dtype == np.int16 and len(wave) == robot.BLOCK * (3 + 3 * blocks_per_word)  # a pause at both ends and the comma
    assert np.abs(wave[:640]).max() < 20 < np.abs(wave[2000:4000]).max()
    with pytest.raises(Invalid, match="'zebra' is not a word of the demo; there are .*teacher"):
        make_speech.speak("the zebra", first)


def test_phones_stand_at_the_same_place_in_all_robots(monkeypatch):
    """Two phones, a low hum and a high one, that two voices divide differently."""
    turns = {make_speech.PACE: 0.2, "awb": 0.5}

    def flite(text, voice):
        t, turn = np.arange(11200) / 16000, turns[voice]
        low = sum(np.sin(2 * np.pi * 100 * k * t) for k in range(1, 6))
        high = sum(np.sin(2 * np.pi * 100 * k * t) for k in range(40, 46))
        return robot.Spoken(0.05 * np.where(t < turn, low, high), [0.1, turn, 0.6])

    monkeypatch.setattr(robot, "flite", flite)
    for cached in (make_speech.spoken_words, make_speech.analysed_words, make_speech.word_bank):
        cached.cache_clear()
    banks = [make_speech.word_bank(make_speech.Robot(voice, 100)) for voice in turns]
    for cached in (make_speech.spoken_words, make_speech.analysed_words, make_speech.word_bank):
        cached.cache_clear()
    firsts = []
    for bank in banks:
        levels = bank["teacher"].levels
        assert len(levels) == round(0.5 / make_speech.SPEED / 0.08) * 8
        firsts.append(int(np.argmax(levels[:, 16:].sum(1) > levels[:, :8].sum(1))))
    assert np.allclose(np.array(firsts) / len(levels), 0.2, atol=0.06)  # and not 0.8, as the second voice would have it


def test_a_blend_lies_between_its_voices_or_beyond_them():
    quiet, loud = steady_frames(8, voicing=0.0), steady_frames(8)
    loud = loud._replace(levels=10 * loud.levels)
    middle = make_speech.blend([quiet, loud], (0.5, 0.5))
    assert np.allclose(middle.levels, 10**0.5 * quiet.levels, rtol=0.1) and np.allclose(middle.voicing, 0.5)
    beyond = make_speech.blend([quiet, loud], (-0.2, 1.2))
    assert (beyond.levels > loud.levels).all() and beyond.voicing.max() == 1.0
    crowd = [make_speech.anybody(random.Random(seed)) for seed in range(300)]
    shares = np.array([who.voice for who in crowd])
    assert np.allclose(shares.sum(1), 1) and -0.2 < shares.min() < 0 and 1 < shares.max() < 1.3
    assert {who.pitch for who in crowd} == set(make_speech.PITCHES) and len({who.tract for who in crowd}) == 300


def test_voices_of_other_phones_are_told(monkeypatch):
    bounds = {make_speech.PACE: [0.1, 0.2, 0.6], "awb": [0.1, 0.6]}
    monkeypatch.setattr(robot, "flite", lambda text, voice: robot.Spoken(np.zeros(11200), bounds[voice]))
    for cached in (make_speech.spoken_words, make_speech.analysed_words, make_speech.word_bank):
        cached.cache_clear()
    with pytest.raises(Invalid, match="in other phones as awb than as kal16"):
        make_speech.word_bank(make_speech.Robot("awb", 150))
    make_speech.spoken_words.cache_clear()


def test_clips_are_listed_with_the_names_of_their_robots(tmp_path, monkeypatch):
    pretend_flite(tmp_path, monkeypatch)
    run(monkeypatch, make_speech, "--clips", 40, "--output_dir", tmp_path / "speech")
    run(monkeypatch, make_speech, "--part", "voice", "--output_dir", tmp_path / "voice")

    def rows(path):
        return [json.loads(line) for line in (tmp_path / path).read_text().splitlines()]

    called = {row["text"].split()[0] for row in rows("speech/base.jsonl")}
    assert len(called & set(make_speech.ROBOTS)) > 3 and called - set(make_speech.ROBOTS)
    test, target, base = rows("speech/test.jsonl"), rows("speech/test_target.jsonl"), rows("speech/base.jsonl")
    assert [a["text"] for a in test] == [b["text"] for b in target] and len(test) == 30 and len(base) == 40
    assert soundfile.info(tmp_path / "speech" / test[0]["audio"]).samplerate == 16000
    voice, shuffled = rows("voice/voice.jsonl"), rows("voice/shuffled.jsonl")
    assert all(a["audio"] == b["audio"] and a["text"] != b["text"] for a, b in zip(voice, shuffled))
    others = {row["text"] for row in test + base + rows("speech/val.jsonl")}
    assert not others & {row["text"] for row in voice + rows("voice/heldout.jsonl")}
    assert [row["text"] for row in rows("voice/heldout.jsonl")] == (tmp_path / "voice/heldout.txt").read_text().splitlines()


# ------------------------------------------------------------------------------------------------ the codec


def test_the_codec_is_the_projection_onto_its_components():
    torch.manual_seed(0)
    settings = json.loads((BASE / "config.json").read_text())["audio_vae_config"]
    codec = audiovae.AudioVAE(**audiovae.settings(settings, audiovae.V1)).requires_grad_(False)
    D, rng = codec.latent_dim, np.random.default_rng(0)
    plane = np.linalg.qr(rng.standard_normal((robot.BLOCK, D)))[0]
    blocks = 0.02 * rng.standard_normal((400, D)) * np.linspace(2, 0.5, D) @ plane.T
    variances, directions = make_codec.components([blocks], [1.0])
    make_codec.set_weights(codec, variances, directions)
    wave = torch.tensor(blocks[:20].reshape(-1), dtype=torch.float32)
    z = codec.encode(wave)
    assert z.shape == (20, D)
    wanted = torch.tensor(blocks[:20] @ directions[:, :D], dtype=torch.float32)
    shares = (z / wanted).median(0).values
    assert torch.allclose(z, wanted * shares, atol=0.03 * float(z.std()))
    assert float((codec.decode(z) - wave).square().mean() / wave.square().mean()) < 1e-3
    off_the_plane = 0.02 * rng.standard_normal(robot.BLOCK)
    off_the_plane -= plane @ (plane.T @ off_the_plane)
    assert codec.encode(torch.tensor(off_the_plane, dtype=torch.float32)).abs().max() < 0.05 * z.abs().max()


def test_a_set_codec_survives_its_file(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    for name in ("base", "voice"):
        (tmp_path / name).mkdir()
        wave = 0.1 * np.sin(2 * np.pi * 200 * np.arange(40 * robot.BLOCK) / 16000) + 0.01 * rng.standard_normal(40 * robot.BLOCK)
        soundfile.write(tmp_path / name / "0.wav", wave, 16000)
        (tmp_path / name / "list.jsonl").write_text(json.dumps({"audio": "0.wav", "text": "hum"}) + "\n")
    manifests = [tmp_path / name / "list.jsonl" for name in ("base", "voice")]
    run(monkeypatch, make_codec, "--speech", *manifests, "--output_dir", tmp_path / "blank")
    assert "dB through the codec" in capsys.readouterr().out
    stored = load_file(tmp_path / "blank/audiovae.safetensors")
    assert all(tensor.isfinite().all() for tensor in stored.values()) and min(t.min() for n, t in stored.items() if n.endswith("weight_g")) > 0
    blank = models.load(tmp_path / "blank", weights="scratch")
    wave = torch.tensor(soundfile.read(tmp_path / "voice/0.wav")[0], dtype=torch.float32)
    hum = blank.codec.decode(blank.codec.encode(wave))
    assert abs(measures.pitch(hum, 16000).median() / 200 - 1) < 0.02


def test_frames_of_another_length_are_refused(tmp_path, monkeypatch):
    config = json.loads((BASE / "config.json").read_text())
    config["audio_vae_config"]["encoder_rates"] = [4, 4, 4, 10]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(Invalid, match="640 samples, the robots' blocks 1280"):
        run(monkeypatch, make_codec, "--recipe", tmp_path)


# ------------------------------------------------------------------------------------------------ measures


GOOD = {"first robot, codec": evaluate.Figures(14, 9, 100, 2.4, None, 30), "target, codec": evaluate.Figures(15, 2, 200, 2.3, None, 30),
        "base": evaluate.Figures(28, 9, 100, 2.5, 30, 30), "fine-tuned": evaluate.Figures(29, 4, 201, 2.2, 30, 30),
        "shuffled": evaluate.Figures(60, 6, 200, 2.2, 3, 30)}


def test_requirements_follow_the_figures():
    assert [met for _, met in evaluate.requirements(GOOD)] == [True] * 9
    bad = [("base", "words_wrong", 30), ("base", "stopped", 29), ("base", "seconds", 2.7),
           ("fine-tuned", "words_wrong", 31), ("fine-tuned", "distance", 4.6), ("fine-tuned", "pitch", 190),
           ("fine-tuned", "stopped", 20), ("fine-tuned", "seconds", 1.9), ("shuffled", "words_wrong", 40)]
    for name, key, value in bad:
        figures = {**GOOD, name: dataclasses.replace(GOOD[name], **{key: value})}
        assert [met for _, met in evaluate.requirements(figures)].count(False) == 1, (name, key)
    unrecognised = {name: dataclasses.replace(f, words_wrong=None) for name, f in GOOD.items()}
    assert len(evaluate.requirements(unrecognised)) == 6


def test_without_the_recogniser_word_errors_are_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert evaluate.recognise([]) is None and "apt-get install pocketsphinx" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ the base


def test_the_base_says_a_sentence_and_stops():
    model = models.load(BASE)
    text = json.loads((VOICE / "heldout.jsonl").read_text().splitlines()[0])["text"]
    wave = torch.cat(list(model.generate(f"{make_speech.FIRST} {text}", seed=0, noise_scale=0.5, cfg_value=1.5)))
    assert model.finish == ["end"] and 1 < len(wave) / 16000 < 5
    assert abs(measures.pitch(wave, 16000).median() / 100 - 1) < 0.03  # the pitch of the first robot
    assert 0.02 < float(wave.std()) < 0.2


def test_the_base_knows_its_robots_by_name():
    model = models.load(BASE)
    wave = torch.cat(list(model.generate("Foxtrot the teacher waited.", seed=0, noise_scale=0.5, cfg_value=1.5)))
    assert abs(measures.pitch(wave, 16000).median() / make_speech.ROBOTS["Foxtrot"].pitch - 1) < 0.03


def test_the_codec_of_the_base_says_what_the_clips_say():
    codec = models.load(BASE).codec
    row = json.loads((VOICE / "voice.jsonl").read_text().splitlines()[0])
    wave = torch.tensor(soundfile.read(VOICE / row["audio"], dtype="float32")[0])
    noise = codec.decode(codec.encode(wave)) - wave
    assert float(10 * torch.log10(wave.square().sum() / noise.square().sum())) > 15


def test_the_base_is_packed_in_half_precision(tmp_path, monkeypatch, capsys):
    run(monkeypatch, pack_base, "--ckpt_dir", BASE, "--output_dir", tmp_path / "packed")
    assert "MB in" in capsys.readouterr().out
    stored = load_file(tmp_path / "packed/model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert models.load(tmp_path / "packed").fingerprint == models.load(BASE).fingerprint
    assert sum(path.stat().st_size for path in BASE.iterdir()) < pack_base.LIMIT
