"""infer.py as a user starts it, and what the model promises about generation beyond equality with the original."""
import dataclasses
import gc
import json
import os
import random
import re
import shutil
import subprocess
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

import infer
import lora
import models
from models import voxcpm
from models.parts import Invalid, audio
from tests import tiny_csm
from tests import tiny_voxcpm as tiny
from tests.conftest import ROOT
from tests.running import here
from tests.test_measures import speech_like

FOUR = ("--min_len", "3", "--max_len", "4")  # patches, whatever the stop head says
SHORT = (*FOUR, "--inference_timesteps", "3")
ONE_LAYER = {"lm_config": {"num_hidden_layers": 1}, "residual_lm_num_layers": 1, "encoder_config": {"num_layers": 1}, "dit_config": {"num_layers": 1}}


class Home:
    """Tiny checkpoints, adapters of this project (with a record) and of the original (without), and recordings."""

    def __init__(self, folder):
        self.folder = folder
        for version in tiny.VERSIONS:
            tiny.write(folder / f"base{version}", version, codec_file="audiovae.safetensors", **ONE_LAYER)  # loads fast
        self.base, self.v2 = folder / "base1.5", folder / "base2"
        self.model = models.load(self.base)
        self.own("first", 1, enable_lm=True, speakers={"anna": 0, "ben": 1})
        self.own("second", 2, enable_dit=True, r=2)
        tiny.write_adapter(folder / "original", "1.5", base=self.base, **ONE_LAYER)
        self.speech, self.other = folder / "speech.wav", folder / "other.flac"
        audio.write(self.speech, 0.5 * tiny.wave(9000), 22050)
        audio.write(self.other, 0.5 * tiny.wave(14000).flip(0), 44100)

    def own(self, name, seed, speakers=None, **settings):
        lora.apply_lora_to_model(self.model, {"r": 4, "alpha": 8.0, **settings})
        g = torch.Generator().manual_seed(seed)
        for m in lora.lora_modules(self.model).values():
            m.lora_B.data = 0.3 * torch.randn(m.lora_B.shape, generator=g)
        lora.save_lora_weights(self.model, self.folder / name, speakers=speakers or {})
        lora.remove_lora(self.model)

    def __truediv__(self, name):
        return self.folder / name


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return Home(tmp_path_factory.mktemp("infer"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Each test works in a folder of its own, and no cache of the machine is seen."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


def speak(*flags):
    """Run infer.py; its exit code is 0 and stdout holds the paths of existing files only. Returns (those paths, stderr)."""
    code, out, err = here("infer", flags)
    assert code == 0, err
    paths = out.decode().splitlines()
    assert paths and all(Path(p).is_file() for p in paths)
    return paths, err


def said(path="output.wav"):
    return torch.from_numpy(soundfile.read(str(path), dtype="int16")[0])


def fails(code, *flags):
    """Run infer.py; it ends with `code`, without a traceback and without a word on stdout. Returns stderr."""
    ended, out, err = here("infer", flags)
    assert (ended, out) == (code, b""), err
    assert "Traceback" not in err
    return err


def direct(model, text="hello", prompts=(), seed=42, **sampling):
    """The same from the model itself, as 16-bit samples."""
    sampling = {"min_len": 3, "max_len": 4, "inference_timesteps": 3, **sampling}
    return torch.from_numpy(audio.pcm16(torch.cat(list(model.generate(text, prompts=prompts, seed=seed, **sampling)))))


def close(a, b):
    """Equal up to a rounding step: batches and chunks add up in another order."""
    return a.shape == b.shape and (a.int() - b.int()).abs().max() <= 2


# ------------------------------------------------------------------------------------------------ one sentence


@pytest.mark.parametrize("version, rate", [("0.5", 16000), ("1.5", 44100), ("2", 48000)])
def test_a_sentence_becomes_a_file_of_pcm16_at_the_models_rate(home, version, rate):
    paths, err = speak("--ckpt_dir", home / f"base{version}", "--text", "hello", "--output", "deep/in/a.wav", *SHORT)
    assert paths == ["deep/in/a.wav"]
    head = soundfile.info("deep/in/a.wav")
    assert (head.samplerate, head.channels, head.subtype, head.format) == (rate, 1, "PCM_16", "WAV")
    model = models.load(home / f"base{version}")
    assert head.frames == round(4 * rate / model.frame_rate) and torch.equal(said("deep/in/a.wav"), direct(model))
    assert re.search(r"1/1 \| 0\.\d s of audio in \d+\.\d s \| real-time factor \d+\.\d\d", err)
    assert "stopped at the length cap" in err


def test_the_seed_decides(home):
    waves = []
    for seed in (5, 5, 6):
        speak("--ckpt_dir", home.base, "--text", "hello", "--seed", seed, *SHORT)
        waves.append(said())
    assert torch.equal(waves[0], waves[1]) and not torch.equal(waves[0], waves[2])
    assert torch.equal(waves[0], direct(home.model, seed=5))


def test_streaming_gives_the_samples_of_the_file(home):
    flags = ("--ckpt_dir", home.base, "--text", "hello", "--min_len", "6", "--max_len", "7", "--retries", "0")
    speak(*flags)
    code, raw, err = here("infer", (*flags, "--output", "-"))
    assert code == 0 and np.array_equal(np.frombuffer(raw, "<i2"), said().numpy())
    assert "real-time factor" in err and "44100 Hz" in err and "length cap" in err


def test_sampling_fields_are_flags(home):
    base = ("--ckpt_dir", home.base, "--text", "hello", *FOUR)
    waves = {}
    for flags in ((), ("--cfg-value", "3"), ("--inference_timesteps=4",)):
        speak(*base, *flags)
        waves[flags] = said()
    assert len({w.numpy().tobytes() for w in waves.values()}) == 3
    assert torch.equal(waves["--cfg-value", "3"], direct(home.model, cfg_value=3.0, inference_timesteps=10))
    assert torch.equal(waves["--inference_timesteps=4",], direct(home.model, inference_timesteps=4))


def test_help_lists_the_flags_of_the_backbone_that_is_meant(home):
    for flags in (("--ckpt_dir", home.base), ("--lora", home / "first"), ("--lora", f"{home / 'first'}:0.5")):
        code, out, err = here("infer", ("--help", *flags))
        assert (code, err) == (0, "") and "--output_dir" in out.decode()
        own = out.decode().split("Flags of this backbone (voxcpm):")[1]
        told = dict(re.findall(r"--(\w+)\n .*\(default: (.*?)\)", own))
        assert told == {f.name: "none" if f.default is None else str(f.default) for f in dataclasses.fields(voxcpm.Sampling)}
        assert own.strip().endswith("retries is 3 where files are written, if it is not given.")
    code, out, _ = here("infer", ("-h",))
    assert code == 0 and "Flags of this backbone" not in out.decode() and "--help with --ckpt_dir DIR or --lora DIR" in out.decode()
    code, _, err = here("infer", ("--help", "--ckpt_dir", "nowhere"))
    assert code == 1 and "no checkpoint at nowhere" in err


def test_the_length_in_milliseconds_is_never_exceeded(home):
    for ms, patches in ((1000, 6), (160, 1), (640, 4), (10, 1)):  # a patch is 160 ms
        speak("--ckpt_dir", home.base, "--text", "hello", "--min_len", "99", "--inference_timesteps", "3", "--max_audio_length_ms", ms)
        assert len(said()) == patches * 7056, ms


def test_a_runaway_take_is_tried_again_with_the_next_seeds(home):
    """At this ratio every take is too long, so the last of four is kept; a user's own number of tries wins."""
    flags = ("--ckpt_dir", home.base, "--text", "hello there world", "--length_ratio", "0.1", "--inference_timesteps", "3")
    waves = []
    for more in (("--seed", "7"), ("--seed", "10", "--retries", "0"), ("--seed", "7", "--retries", "1"), ("--seed", "8", "--retries", "0")):
        speak(*flags, *more)
        waves.append(said())
    assert torch.equal(waves[0], waves[1]) and torch.equal(waves[2], waves[3]) and not torch.equal(waves[0], waves[2])


def test_weights_can_be_bfloat16(home):
    speak("--ckpt_dir", home.base, "--text", "hello", "--dtype", "bfloat16", *SHORT)
    wave = said()
    assert torch.equal(wave, direct(models.load(home.base, dtype=torch.bfloat16))) and not torch.equal(wave, direct(home.model))


# ------------------------------------------------------------------------------------------------ adapters


def adapted(home, *chosen):
    lora.load_lora_weights(home.model, [(home / name, strength) for name, strength in chosen])
    wave = direct(home.model)
    lora.remove_lora(home.model)
    return wave


def test_adapters_act_with_their_strength_and_add_up(home):
    flags = ("--ckpt_dir", home.base, "--text", "hello", *SHORT)
    waves = [direct(home.model)]
    for chosen in ([("first", 1.0)], [("first", 0.5)], [("first", 0.5), ("second", 1.0)], [("original", 1.0)]):
        given = [word for name, x in chosen for word in ("--lora", home / name if x == 1 else f"{home / name}:{x}")]
        _, err = speak(*flags, *given)
        waves.append(said())
        assert close(waves[-1], adapted(home, *chosen))
        modules = {"first": 8, "second": 4, "original": 15}
        assert f" in {sum(modules[n] for n, _ in chosen)} modules, 0 skipped" in err
        assert "r 4, alpha 8, scale 2" in err or len(chosen) > 1 and "rank 4 together" in err
    assert len({w.numpy().tobytes() for w in waves}) == len(waves)


def test_every_warning_is_printed_with_its_file(capsys):
    class Mute:
        finish = ["end", "end"]

        def generate_batch(self, requests):
            warnings.warn("request 1: only silence")
            yield from ((i, torch.zeros(2)) for i in range(2))

    for n in range(2):  # Python itself says the same words once
        item = dict(text="x", reference_audio="", prompt_audio="", context=[], speaker="", seed=0)
        infer.speak(Mute(), [infer.Request(f"{name}{n}.wav", item) for name in "ab"], {})
    assert capsys.readouterr().err.splitlines() == ["b0.wav: only silence", "b1.wav: only silence"]


def test_a_relative_base_is_looked_for_above_the_adapter(home, tmp_path, monkeypatch):
    project = tmp_path / "project"
    (project / "runs").mkdir(parents=True)
    (project / "checkpoints").symlink_to(home.base.parent)
    monkeypatch.chdir(project)
    model = models.load(f"checkpoints/{home.base.name}")
    lora.apply_lora_to_model(model, {"r": 2})
    lora.save_lora_weights(model, "runs/a")
    monkeypatch.chdir(tmp_path)
    assert infer.base_of("project/runs/a") == str(project / "checkpoints" / home.base.name)


def test_a_strength_that_is_no_number_is_wrong_use(home):
    assert "the strength is nan" in fails(2, "--ckpt_dir", home.base, "--lora", "somewhere:nan", "--text", "hello")


def test_the_base_is_found_through_the_adapter_or_the_training_config(home):
    peft = home.folder / "peft"
    lora.load_lora_weights(home.model, home / "first")
    lora.save_lora_weights(home.model, peft, format="peft")
    lora.remove_lora(home.model)
    save_file(load_file(peft / "adapter_model.safetensors"), peft / "adapter_model.safetensors")  # without our record
    Path("train.yaml").write_text(f"pretrained_path: {home.base}\nsave_path: runs/x\nlora:\n  r: 4\n")
    Path("theirs.yaml").write_text(f"base_model: {home.base}\n")
    shutil.copytree(home / "first", "bare")
    (Path("bare") / "lora_config.json").unlink()  # the record alone says base and alpha
    wave = adapted(home, ("first", 1.0))
    for flags in (("--lora", home / "first"), ("--lora", peft), ("--lora", "bare"),
                  ("--config", "train.yaml", "--lora", home / "first"), ("--config_path", "theirs.yaml", "--lora_ckpt", home / "first")):
        speak(*flags, "--text", "hello", *SHORT)
        assert torch.equal(said(), wave), flags
    speak("--lora", home / "original", "--text", "hello", *SHORT)  # lora_config.json's base_model
    assert torch.equal(said(), adapted(home, ("original", 1.0)))
    speak("--config", "train.yaml", "--text", "hello", *SHORT)
    assert torch.equal(said(), direct(home.model))


def test_a_base_named_by_its_hub_id_is_found_in_the_cache(home, tmp_path, monkeypatch):
    cache = tmp_path / "hub" / "models--some--voice"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("abc123")
    (cache / "snapshots" / "zzz").mkdir(parents=True)  # a newer one that main does not name
    (cache / "snapshots" / "abc123").symlink_to(home.base)
    shutil.copytree(home / "first", "shared")
    weights = load_file("shared/lora_weights.safetensors")
    config = json.loads(Path("shared/lora_config.json").read_text())
    Path("shared/lora_config.json").write_text(json.dumps({**config, "base_model": "some/voice"}))
    save_file(weights, "shared/lora_weights.safetensors")
    speak("--ckpt_dir", "some/voice", "--text", "hello", *SHORT)
    assert torch.equal(said(), direct(home.model))
    speak("--lora", "shared", "--text", "hello", *SHORT)
    assert torch.equal(said(), adapted(home, ("first", 1.0)))
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    speak("--ckpt_dir", "some/voice", "--text", "hello", *SHORT)
    assert torch.equal(said(), direct(home.model))
    err = fails(1, "--ckpt_dir", "some/other", "--text", "hello")
    assert "no copy of it in the hub cache" in err and "hf download some/other" in err


def test_an_unknown_speaker_is_answered_with_the_known(home):
    err = fails(1, "--lora", home / "first", "--text", "hello", "--speaker", "carla")
    assert "'carla' is not one of those trained: anna, ben" in err
    err = fails(1, "--lora", home / "first", "--text", "hello", "--speaker", "ben")
    assert "this backbone has no speaker input; train one adapter per speaker" in err and not Path("output.wav").exists()


@pytest.mark.parametrize("damage, words", [
    (lambda a: (a / "lora_config.json").write_text('{"lora_config": {"r": 4}}'), "does not say alpha"),
    (lambda a: (a / "lora_config.json").write_text('{"lora_config": {"r": "4", "alpha": 8}}'), "r is '4', expected a whole number"),
    (lambda a: (a / "lora_config.json").write_text("[1]"), "expected a map of settings"),
    (lambda a: (a / "lora_config.json").write_text('{"lora_config"'), "not valid JSON"),
    (lambda a: (a / "lora_config.json").unlink(), "alpha is unknown"),
    (lambda a: (a / "lora_weights.safetensors").unlink(), "no adapter at"),
    (lambda a: (a / "lora_weights.safetensors").write_bytes((a / "lora_weights.safetensors").read_bytes()[:999]), "damaged.*Copy it again"),
    (lambda a: save_file({"speaker.lora_A": torch.ones(4, 3), "speaker.lora_B": torch.ones(3, 4)}, a / "lora_weights.safetensors"),
     "2 of 2 tensors do not fit this voxcpm model: speaker.lora_A"),
])
def test_a_broken_adapter_is_named(home, damage, words):
    shutil.copytree(home / "original", "broken")
    damage(Path("broken"))
    err = fails(1, "--ckpt_dir", home.base, "--lora", "broken", "--text", "hello")
    assert "broken" in err and re.search(words, err), err
    code, out, err = here("infer", ("--lora", "broken", "--text", "hello"))  # here the base has to come out of the same files
    assert code in (1, 2) and "broken" in err and "Traceback" not in err


def test_an_adapter_of_another_base_or_of_unsafe_make_is_refused(home):
    shutil.copytree(home.base, "near")
    save_file({k: 1.1 * v for k, v in load_file("near/model.safetensors").items()}, "near/model.safetensors")
    err = fails(1, "--ckpt_dir", "near", "--lora", home / "first", "--text", "hello")
    assert "trained on another base" in err and "--ignore_base" in err and str(home.base) in err
    speak("--ckpt_dir", "near", "--lora", home / "first", "--ignore_base", "--text", "hello", *SHORT)
    assert fails(1, "--ckpt_dir", home.v2, "--lora", home / "first", "--ignore_base", "--text", "hello").count("do not fit") == 1
    shutil.copytree(home / "original", "unsafe")
    (Path("unsafe") / "lora_weights.safetensors").unlink()
    torch.save({"state_dict": {"a": Trap("ran")}}, "unsafe/lora_weights.ckpt")
    assert "was not opened, since unpickling it could run code" in fails(1, "--ckpt_dir", home.base, "--lora", "unsafe", "--text", "hello")
    assert not Path("ran").exists()


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


# ------------------------------------------------------------------------------------------------ cloning


def test_a_recording_is_continued(home):
    speak("--ckpt_dir", home.base, "--text", "world", "--prompt_audio", home.speech, "--prompt_text", "the hello ", *SHORT)
    wave = said()
    assert torch.equal(wave, direct(home.model, "world", [("the hello ", str(home.speech), None)]))
    assert len(wave) == 4 * 7056, "the recording itself is not in the output"
    assert not torch.equal(wave, direct(home.model, "world"))


def test_a_reference_gives_its_voice_where_the_checkpoint_takes_one(home):
    model = models.load(home.v2)
    speak("--ckpt_dir", home.v2, "--text", "world", "--reference_audio", home.speech, *SHORT)
    wave = said()
    assert torch.equal(wave, direct(model, "world", [(None, str(home.speech), None)])) and not torch.equal(wave, direct(model, "world"))
    speak("--ckpt_dir", home.v2, "--text", "world", "--ref-audio", home.other, "--pa", home.speech, "--pt", "the hello ", *SHORT)
    assert torch.equal(said(), direct(model, "world", [(None, str(home.other), None), ("the hello ", str(home.speech), None)]))
    Path("output.wav").unlink()
    err = fails(1, "--ckpt_dir", home.base, "--text", "world", "--reference_audio", home.speech)
    assert "architecture voxcpm) has no place for it; use VoxCPM2" in err and "1 of 1 failed" in err and not Path("output.wav").exists()


# ------------------------------------------------------------------------------------------------ many sentences


def test_a_text_file_becomes_one_file_per_line(home):
    Path("lines.txt").write_bytes("\ufeffhello\r\n\r\n  the world  \nline\u2028break\n".encode())
    paths, err = speak("--ckpt_dir", home.base, "--input", "lines.txt", "--output_dir", "out", "--batch_size", "2", *SHORT)
    assert paths == ["out/output_001.wav", "out/output_002.wav", "out/output_003.wav"]
    for path, text in zip(paths, ("hello", "the world", "line\u2028break")):
        assert close(said(path), direct(home.model, text)), text
    assert "2/3 | " in err and "3/3 | " in err and err.count("real-time factor") == 2


def test_a_line_of_jsonl_says_all_that_a_flag_says(home):
    rows = [{"text": "hello", "output": "a/one.wav", "seed": 5},
            {"text": "world", "prompt_audio": str(home.speech), "prompt_text": "the hello "},
            {"text": "world", "reference_audio": str(home.other), "output": "three.flac"},
            {"text": "world", "reference_audio": None, "seed": None}]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    paths, _ = speak("--ckpt_dir", home.v2, "--input", "rows.jsonl", "--output_dir", "out", "--reference_audio", home.speech, "--seed", "9", *SHORT)
    assert paths == ["out/a/one.wav", "out/output_002.wav", "out/three.flac", "out/output_004.wav"]
    model, voice = models.load(home.v2), (None, str(home.speech), None)
    expected = [direct(model, "hello", [voice], 5), direct(model, "world", [voice, ("the hello ", str(home.speech), None)], 9),
                direct(model, "world", [(None, str(home.other), None)], 9), direct(model, "world", [voice], 9)]
    for path, wave in zip(paths, expected):
        assert close(said(path), wave), path


def test_lines_name_adapters_of_their_own_and_one_batch_mixes_them(home, monkeypatch):
    chosen = [[("second", 1.0)], [("first", 0.5)], [("first", 1.0), ("second", 0.5)], [], [("first", 1.0)]]
    rows = [{"text": "hello"}, {"text": "hello", "lora": f"{home / 'first'}:0.5"}, {"text": "hello", "lora": [str(home / "first"), f"{home / 'second'}:0.5"]},
            {"text": "hello", "lora": ""}, {"text": "hello", "lora": str(home / "first")}]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sizes, generate = [], voxcpm.VoxCPM.generate_batch
    with monkeypatch.context() as patch:
        patch.setattr(voxcpm.VoxCPM, "generate_batch", lambda model, requests, **how: sizes.append(len(requests)) or generate(model, requests, **how))
        paths, err = speak("--lora", home / "second", "--input", "rows.jsonl", "--batch_size", 3, *SHORT)
    assert sizes == [3, 2] and err.count("; one of 4 side by side") == 4
    for path, adapters in zip(paths, chosen):
        assert close(said(path), adapted(home, *adapters) if adapters else direct(home.model)), adapters
    assert len({said(path).numpy().tobytes() for path in paths}) == 5


def test_adapters_of_lines_are_looked_for_first_and_each_has_its_own_speakers(home, tmp_path):
    lines = [{"text": "a", "lora": "gone"}, {"text": "a", "lora": 5}, {"text": "a", "lora": [""]}, {"text": "a", "lora": f"{home / 'first'}:inf"},
             {"text": "a", "lora": "a\0b"}]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    err = fails(2, "--ckpt_dir", "nowhere", "--input", "rows.jsonl").splitlines()
    assert len(err) == len(lines)
    for line, words in zip(err, ("no adapter at gone", "lora is 5, expected an adapter folder", "lora is \\[''\\]", "the strength is inf",
                                "lora is \\['a.x00b'\\], expected")):
        assert re.search(words, line) and "rows.jsonl line" in line
    item = dict(lora=["x"], speaker="", context=[{"text": "t", "audio": "a", "speaker": "ben"}])
    requests = [infer.Request("a.wav", dict(item, lora=[str(home / "first")], speaker="ben")), infer.Request("b.wav", dict(item, lora=[], speaker="ben"))]
    voices = infer.voices_of(requests)
    with pytest.raises(Invalid, match="speaker 'carl' is not one of those trained: anna, ben"):
        infer.check_speakers([infer.Request("a.wav", dict(requests[0].item, speaker="carl"))], voices)
    csm = types.SimpleNamespace(speaker_input=True, speakers={"ben": 7, "dora": None})
    infer.name_speakers(requests, voices, csm)
    assert [(r.item["speaker"], r.item["context"][0]["speaker"]) for r in requests] == [("1", "1"), ("7", "7")]


def test_a_line_that_fails_is_counted_and_the_others_are_written(home):
    rows = [{"text": "hello"}, {"text": "world", "prompt_audio": "gone.wav", "prompt_text": "x"}, {"text": "the"},
            {"text": "world", "reference_audio": str(home.speech)}]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, out, err = here("infer", ("--ckpt_dir", home.base, "--input", "rows.jsonl", "--output_dir", "out", *SHORT))
    assert code == 1 and out.decode().split() == ["out/output_001.wav", "out/output_003.wav"]
    assert sorted(p.name for p in Path("out").iterdir()) == ["output_001.wav", "output_003.wav"]
    assert "out/output_002.wav: " in err and "gone.wav" in err and "out/output_004.wav: reference audio" in err and "2 of 4 failed" in err
    assert close(said("out/output_003.wav"), direct(home.model, "the"))


def test_a_take_that_is_not_a_number_is_a_failure_of_its_line(home, monkeypatch):
    generate = voxcpm.VoxCPM.generate_batch

    def broken(model, requests, **sampling):
        for i, chunk in generate(model, requests, **sampling):
            yield i, chunk * float("nan") if requests[i]["text"] == "world" else chunk

    monkeypatch.setattr(voxcpm.VoxCPM, "generate_batch", broken)
    Path("lines.txt").write_text("hello\nworld\nthe\n")
    code, out, err = here("infer", ("--ckpt_dir", home.base, "--input", "lines.txt", *SHORT))
    assert code == 1 and out.decode().split() == ["output_001.wav", "output_003.wav"]
    assert "output_002.wav: not written, sample 0 is nan" in err and "1 of 3 failed" in err


def test_every_wrong_line_is_named_before_anything_is_loaded(home):
    lines = ['{"text": "hello"', '["text"]', '{"output": "a.wav"}', '{"text": "a", "outptu": "a.wav"}', '{"text": 5}', '{"text": "a", "seed": "x"}',
             '{"text": "a", "prompt_audio": "a.wav"}', '{"text": "a", "output": "../a.wav"}', '{"text": "a", "output": "/a.wav"}',
             '{"text": "a", "output": "a.mp3"}', '{"text": "a", "output": "same.wav"}', '{"text": "a", "output": "x/../same.wav"}',
             '{"text": "a", "output": ""}', '{"text": "a", "output": 3}']
    Path("rows.jsonl").write_text("\n".join(lines))
    err = fails(2, "--ckpt_dir", "nowhere", "--input", "rows.jsonl", "--output_dir", "out").splitlines()
    words = ["not valid JSON", "expected an object with text and any of", "expected an object", "expected an object", "text is 5, expected a text",
             "seed is 'x', expected a whole number", "prompt_audio and prompt_text go together", "'out/../a.wav' lies outside out",
             "'/a.wav' lies outside out", "'out/a.mp3': sound is written as .wav or .flac", None, None, "lies outside out", "written as .wav or .flac"]
    told = {int(re.search(r"line (\d+)", line)[1]): line for line in err if " line " in line}
    assert sorted(told) == [n for n, w in enumerate(words, 1) if w]
    for n, line in told.items():
        assert words[n - 1] in line, line
    assert sum("same.wav is named twice" in line for line in err) == 1 and not Path("out").exists()


def test_a_line_with_its_own_recording_does_not_take_the_words_of_another(home):
    Path("rows.jsonl").write_text(json.dumps({"text": "a", "prompt_audio": str(home.other)}))
    err = fails(2, "--ckpt_dir", home.base, "--input", "rows.jsonl", "--prompt_audio", home.speech, "--prompt_text", "the hello ")
    assert "line 1: prompt_audio and prompt_text go together" in err


def test_speakers_may_be_numbers(tmp_path, home):
    tiny_csm.write(tmp_path / "csm", tiny_csm.VARIANTS[0])
    Path("rows.jsonl").write_text('{"text": "hi", "speaker": 0}\n{"text": "hi", "speaker": "0"}\n{"text": "hi", "speaker": 1}\n{"text": "hi"}')
    paths, _ = speak("--ckpt_dir", tmp_path / "csm", "--input", "rows.jsonl", "--max_len", "3", "--min_len", "3", "--speaker", "1")
    waves = [said(p) for p in paths]
    assert torch.equal(waves[0], waves[1]) and torch.equal(waves[2], waves[3]) and not torch.equal(waves[0], waves[2])


# ------------------------------------------------------------------------------------------------ wrong use and broken checkpoints


@pytest.mark.parametrize("flags, words", [
    (("--text", "a", "--input", "x.txt"), "give either --text or --input"),
    ((), "give either --text or --input"),
    (("--text", "a"), "give --ckpt_dir"),
    (("--text", "a", "--ckpt_dir", "BASE", "--cfg_vlaue", "2"), "--cfg_vlaue: unknown; the nearest known name is cfg_value"),
    (("--text", "a", "--ckpt_dir", "BASE", "--promt_audio", "x"), "--promt_audio: unknown; the nearest known name is prompt_audio"),
    (("--text", "a", "--ckpt_dir", "BASE", "--temperature", "1", "--cfg_rate", "1"),
     "--temperature: a flag of csm and higgs and indextts2\n--cfg_rate: a flag of indextts2\nvoxcpm has cfg_value, inference_timesteps, "),
    (("--text", "a", "--ckpt_dir", "BASE", "--cfg_value", "much"), "--cfg_value: 'much' is not a number"),
    (("--text", "a", "--ckpt_dir", "BASE", "--inference_timesteps", "0"), "inference_timesteps is 0, expected at least 1"),
    (("--text", "a", "--ckpt_dir", "BASE", "--max_len", "0"), "max_len is 0, expected at least 1"),
    (("--text", "a", "--ckpt_dir", "BASE", "--retries=-1"), "retries is -1"),
    (("--text", "a", "--ckpt_dir", "BASE", "--prompt_text", "b"), "prompt_audio and prompt_text go together"),
    (("--text", "a", "--ckpt_dir", "BASE", "--output", "a.mp3"), "written as .wav or .flac"),
    (("--text", "a", "--ckpt_dir", "BASE", "--output_dir", "out"), "--output names the file of --text"),
    (("--input", "x.txt", "--ckpt_dir", "BASE", "--output", "-"), "--output names the file of --text"),
    (("--input", "gone.txt", "--ckpt_dir", "BASE"), "--input: no file at gone.txt"),
    (("--input", "empty.txt", "--ckpt_dir", "BASE"), "empty.txt holds no sentence"),
    (("--input", "latin.txt", "--ckpt_dir", "BASE"), "latin.txt is not UTF-8"),
    (("--text", "a", "--ckpt_dir", "BASE", "--batch_size", "0"), "batch_size is 0, expected at least 1"),
    (("--text", "a", "--config", "gone.yaml"), "gone.yaml: No such file"),
    (("--text", "a", "--config", "empty.txt"), "empty.txt has no pretrained_path"),
])
def test_wrong_use_exits_2_and_says_what_to_do(home, flags, words):
    Path("empty.txt").write_text("\n\n")
    Path("latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    assert words in fails(2, *(home.base if f == "BASE" else f for f in flags))
    assert sorted(p.name for p in Path(".").iterdir()) == ["empty.txt", "latin.txt"]


@pytest.mark.parametrize("flags, words", [
    (("--ckpt_dir", "gone"), "no checkpoint at gone"),
    (("--ckpt_dir", "BASE", "--device", "cuda:7"), "device cuda:7 is not there on this machine; use auto or cpu"),
    (("--ckpt_dir", "BASE", "--device", "gpu"), "device 'gpu' is not known; use auto, cpu"),
    (("--ckpt_dir", "BASE", "--device", "xpu"), "device xpu is not there"),
    (("--ckpt_dir", "BASE", "--device", "meta"), "device 'meta' is not known"),
    (("--ckpt_dir", "BASE", "--dtype", "float8"), "dtype 'float8' is not known; use auto, float32 or bfloat16"),
    (("--ckpt_dir", "BASE", "--output", "file/a.wav"), "file: cannot be made"),
    (("--ckpt_dir", "BASE", "--lora", "gone"), "no adapter at gone"),
    (("--ckpt_dir", "ADAPTER"), "is an adapter; give its base as the checkpoint and this folder as --lora"),
    (("--lora", "MOVED"), "belongs to the base /gone/base: no checkpoint at /gone/base; expected the folder of one, or org/name of one in the local hub cache. If that lies elsewhere now, give it with --ckpt_dir"),
])
def test_what_is_not_there_exits_1(home, flags, words):
    if torch.cuda.device_count() > 7 and "cuda:7" in flags:
        pytest.skip("this machine has it")
    Path("file").write_text("x")
    tiny.write_adapter("moved", "1.5", base="/gone/base")
    names = {"BASE": home.base, "ADAPTER": home / "first", "MOVED": "moved"}
    assert words in fails(1, "--text", "a", *(names.get(f, f) for f in flags))
    assert not Path("output.wav").exists()


@pytest.mark.parametrize("name, share, words", [
    ("model.safetensors", 0.5, "model.safetensors is damaged"),
    ("model.safetensors", 0.0, "model.safetensors is damaged"),
    ("model.safetensors", None, "has no model.safetensors or "),
    ("audiovae.pth", 0.5, "audiovae.pth is damaged"),
    ("audiovae.pth", None, "has no audiovae.safetensors or audiovae.pth, so the codec cannot be loaded"),
    ("config.json", 0.5, "config.json is not valid JSON"),
    ("config.json", None, "no backbone recognizes it (without config.json"),
    ("tokenizer.json", 0.5, "tokenizer.json is not valid JSON"),
    ("tokenizer.json", None, "has no tokenizer.json"),
])
def test_a_torn_checkpoint_names_the_file(home, name, share, words):
    tiny.write("torn", "1.5")
    data = (Path("torn") / name).read_bytes()
    (Path("torn") / name).unlink() if share is None else (Path("torn") / name).write_bytes(data[: int(share * len(data))])
    err = fails(1, "--ckpt_dir", "torn", "--text", "hello")
    assert words in err and "torn" in err


def test_a_pickle_in_a_checkpoint_runs_nothing(home):
    tiny.write("unsafe", "1.5")
    torch.save({"state_dict": {"a": Trap("ran")}}, "unsafe/audiovae.pth")
    assert "unpickling it could run code" in fails(1, "--ckpt_dir", "unsafe", "--text", "hello")
    (Path("unsafe") / "model.safetensors").unlink()
    torch.save({"a": Trap("ran")}, "unsafe/pytorch_model.bin")
    assert "unpickling it could run code" in fails(1, "--ckpt_dir", "unsafe", "--text", "hello")
    assert not Path("ran").exists()


def test_a_tensor_that_nobody_knows_is_used_only_when_asked_for(home):
    shutil.copytree(home.base, "more")
    save_file({**load_file("more/model.safetensors"), "speaker.weight": torch.ones(2)}, "more/model.safetensors")
    assert "unexpected speaker.weight" in fails(1, "--ckpt_dir", "more", "--text", "hello")
    speak("--ckpt_dir", "more", "--allow_unused_tensors", "--text", "hello", *SHORT)
    assert torch.equal(said(), direct(home.model))


def test_a_terminal_that_is_not_utf8_loses_nothing_of_a_batch(home):
    Path("rows.jsonl").write_text('{"text": "hello", "output": "größe.wav"}\n{"text": "hello", "output": "b.wav"}\n', encoding="utf-8")
    code, out, err = here("infer", ["--ckpt_dir", home.base, "--input", "rows.jsonl", "--batch_size", 1, *SHORT], "ascii")
    assert (code, out) == (0, b"gr\\xf6\\xdfe.wav\nb.wav\n"), err
    assert torch.equal(said("größe.wav"), direct(home.model)) and torch.equal(said("b.wav"), direct(home.model))


# ------------------------------------------------------------------------------------------------ in a process of its own


def test_as_a_command_paths_go_to_stdout_and_all_else_to_stderr(home):
    """Started in another folder: one good line, one bad; then samples streamed into a pipe that closes early."""
    Path("rows.jsonl").write_text('{"text": "hello", "output": "a.wav"}\n{"text": "hello", "reference_audio": "gone.wav"}\n')
    command = [sys.executable, str(Path(ROOT, "infer.py")), "--ckpt_dir", str(home.base)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--input", "rows.jsonl", *SHORT], capture_output=True, text=True, env=env)
    assert (done.returncode, done.stdout) == (1, "a.wav\n") and "1 of 2 failed" in done.stderr and "Traceback" not in done.stderr
    assert torch.equal(said("a.wav"), direct(home.model))
    with subprocess.Popen([*command, "--text", "hello", "--output", "-", "--min_len", "400", "--max_len", "400", "--length_ratio", "400"],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env) as process:
        assert len(process.stdout.read(1000)) == 1000
        process.stdout.close()
        err = process.stderr.read().decode()
    assert process.returncode == 141 and "Traceback" not in err, err


# ------------------------------------------------------------------------------------------------ generation


ENDLESS = {"min_len": 10**6, "length_ratio": 10.0**6}


@pytest.fixture(params=tiny.VERSIONS)
def model(request, home):
    return models.load(home / f"base{request.param}")


def stops(model, monkeypatch, when):
    """The stop head says 1 for row k at its n-th question where when(n, k)."""
    asked = []

    def logits(lm_h):
        asked.append(len(lm_h))
        return torch.tensor([[0.5, float(when(len(asked), k))] for k in range(len(lm_h))])

    monkeypatch.setattr(model, "_stop_logits", logits)
    return asked


def frames(model, text="hello", **how):
    return torch.stack(list(model.frames(text, **{"seed": 0, **how})))


def test_the_first_chunk_comes_before_the_first_step_and_later_ones_grow_to_sixteen(model, monkeypatch):
    steps, sizes, step = [], [], model._step
    monkeypatch.setattr(model, "_step", lambda *a: steps.append(len(a[0])) or step(*a))
    for chunk in model.generate("hello", seed=0, max_len=70, inference_timesteps=2, **ENDLESS):
        sizes.append((len(chunk) // (model.config.patch_size * model.codec.out_hop), len(steps)))
    assert sizes == [(1, 0), (2, 2), (4, 6), (8, 14), (16, 30), (16, 46), (16, 62), (7, 69)]


def test_a_step_feeds_one_position_per_row(model, monkeypatch):
    fed = {name: [] for name in ("base_lm", "residual_lm", "feat_encoder")}
    for name, shapes in fed.items():
        module, inner = getattr(model, name), getattr(model, name).forward
        monkeypatch.setattr(module, "forward", lambda x, *a, shapes=shapes, inner=inner, **how: shapes.append(tuple(x.shape[:2])) or inner(x, *a, **how))
    list(model.generate_batch([dict(text="hello", seed=1), dict(text="the hello world", seed=2)], max_len=6, min_len=6))
    prefill = len(model.encode_text("the hello world")) + 1
    assert fed["base_lm"] == fed["residual_lm"] == [(2, prefill)] + [(2, 1)] * 5
    assert fed["feat_encoder"] == [(0, model.config.patch_size)] + [(2, model.config.patch_size)] * 5


def test_memory_does_not_grow_while_speech_streams(home, monkeypatch):
    """Tensors alive, and what the codec remembers, after each chunk of sixteen patches."""
    model, streams = models.load(home / "base0.5"), []
    stream = model.codec.stream
    monkeypatch.setattr(model.codec, "stream", lambda: streams.append(stream()) or streams[-1])
    alive, past = [], []
    for n, chunk in enumerate(model.generate("hello", seed=0, max_len=127, inference_timesteps=1, **ENDLESS)):
        if n in (5, 6, 9):
            del chunk
            tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
            alive.append((len(tensors), sum(t.nbytes for t in tensors)))
            past.append(sum(t.untyped_storage().nbytes() for t in streams[0].past.values()))
            del tensors
    assert len(alive) == 3 and len(set(alive)) == 1 and len(set(past)) == 1 and past[0] > 0


def test_the_cap_is_the_least_of_text_length_max_len_and_what_the_model_holds(home):
    model, long = models.load(home.base), 10**6
    tokens = len(model.encode_text("the hello world"))
    prompt = ("the the the", torch.zeros(8, 8), None)  # spoken already: its words do not lengthen the speech
    for prompts in ((), [prompt]):
        assert len(frames(model, "the hello world", prompts=prompts, min_len=long, inference_timesteps=1)) == 6 * tokens + 10
        assert model.finish == ["cap"]
    assert len(frames(model, "the hello world", min_len=long, length_ratio=0.5, inference_timesteps=1)) == int(0.5 * tokens + 10)
    assert len(frames(model, min_len=long, max_len=5)) == 5
    model.config.max_length = tokens + 1 + 7
    assert len(frames(model, "the hello world", min_len=long)) == 7
    model.config.max_length = tokens + 1
    with pytest.raises(Invalid, match=f"prompt and text take {tokens + 1} positions, the model has {tokens + 1}; split it, as --max_chars"):
        frames(model, "the hello world")


def test_the_stop_head_is_first_asked_after_min_len(home, monkeypatch):
    model = models.load(home.base)
    asked = stops(model, monkeypatch, lambda n, k: True)
    for how, patches in (({}, 4), ({"min_len": 0}, 2), ({"min_len": 5}, 7), ({"max_len": 3}, 3)):
        asked.clear()
        assert len(frames(model, **how)) == patches
        assert len(asked) == (0 if "max_len" in how else 1) and model.finish == ["cap" if "max_len" in how else "end"]


def test_noise_is_used_row_by_row_and_running_out_is_an_error(home, monkeypatch):
    model = models.load(home.base)
    noise = torch.randn(5, 4, 8, generator=torch.Generator().manual_seed(3))
    told = frames(model, noise=noise, min_len=9, max_len=5)
    assert not torch.equal(told, frames(model, noise=noise.flip(0), min_len=9, max_len=5))
    assert torch.allclose(frames(model, noise=noise[:2], min_len=9, max_len=2), told[:2])
    stream = model.frames("hello", noise=noise, min_len=9)
    for n in range(5):
        assert torch.allclose(next(stream), told[n], atol=1e-5)
    with pytest.raises(Invalid, match="noise holds 5 patches and patch 5 is asked for; give more, or set max_len"):
        next(stream)
    with pytest.raises(Invalid, match=r"noise has shape \[5, 2, 8\], expected \(patches, 4, 8\)"):
        frames(model, noise=noise.view(10, 2, 8)[:5])
    stops(model, monkeypatch, lambda n, k: True)
    again = frames(model, noise=noise[:4], length_ratio=0.1, retries=2)  # each try starts at the first row
    assert torch.allclose(again, told[:4], atol=1e-5) and model.finish == ["end"]


def test_only_takes_that_ran_away_are_tried_again(home, monkeypatch):
    """Row 1 of the batch never ends in its first two tries; row 0 keeps its first take."""
    model = models.load(home.base)
    calls, run = [], model._run

    def counted(requests, s):
        calls.append([r["seed"] for r in requests])
        return run(requests, s)

    monkeypatch.setattr(model, "_run", counted)
    stops(model, monkeypatch, lambda n, k: n == 1 and k == 0 or len(calls) == 3)
    takes = {0: [], 1: []}
    for i, chunk in model.generate_batch([dict(text="hello", seed=5), dict(text="the", seed=8)], length_ratio=6.0, max_len=8, retries=4):
        takes[i].append(chunk)
    assert calls == [[5, 8], [9], [10]] and model.finish == ["end", "end"]
    monkeypatch.setattr(model, "_run", run)
    stops(model, monkeypatch, lambda n, k: True)
    for i, (text, seed) in enumerate((("hello", 5), ("the", 10))):
        assert torch.allclose(torch.cat(takes[i]), torch.cat(list(model.generate(text, seed=seed))), atol=1e-4)


def test_finished_rows_leave_the_batch_and_disturb_nobody(model, monkeypatch):
    texts = ["hello", "the hello world in the", "in"]
    how = {"inference_timesteps": 4}
    alone = [frames(model, text, seed=i, min_len=99, max_len=9, **how) for i, text in enumerate(texts)]
    steps, step = [], model._step
    monkeypatch.setattr(model, "_step", lambda *a: steps.append(len(a[0])) or step(*a))
    stops(model, monkeypatch, lambda n, k: (n, k) in ((1, 1), (4, 0)))  # the second row after 4 patches, the first after 7
    rows = [[], [], []]
    for i, chunk in model.generate_batch([dict(text=t, seed=i) for i, t in enumerate(texts)], max_len=9, **how):
        rows[i].append(chunk)
    assert steps == [3] * 3 + [2] * 3 + [1] * 2 and model.finish == ["end", "end", "cap"]
    for chunks, patches, n in zip(rows, alone, (7, 4, 9)):
        whole = model.codec.decode(patches[:n].flatten(0, 1))
        assert torch.allclose(torch.cat(chunks), whole, atol=2e-4)


def test_prompts_may_be_latents_and_wrong_ones_are_refused(home):
    model = models.load(home.base)
    codes = model.codec.encode(tiny.wave(3 * 4 * model.codec.hop))
    assert codes.shape == (12, 8)
    told = frames(model, prompts=[("the", codes, None)], max_len=2)
    odd = torch.cat([torch.ones(3, 8), codes])  # a prompt ends where the speech begins: odd frames are dropped in front
    assert torch.equal(frames(model, prompts=[("the", odd, None)], max_len=2), told)
    assert not torch.equal(frames(model, prompts=[("the", codes[:8], None)], max_len=2), told)
    for wrong in (torch.zeros(12, 7), torch.zeros(3, 8)):
        with pytest.raises(Invalid, match=r"expected \(T, 8\) with at least 4 frames"):
            frames(model, prompts=[("the", wrong, None)])
    with pytest.raises(Invalid, match="2 reference clips: this backbone takes one"):
        frames(models.load(home.v2), prompts=[(None, codes, None)] * 2)


def test_without_a_seed_every_take_is_another(home):
    model = models.load(home.base)
    a, b = (frames(model, seed=None, max_len=1) for _ in range(2))
    torch.manual_seed(0)
    c = frames(model, seed=None, max_len=1)
    torch.manual_seed(0)
    assert len({x.numpy().tobytes() for x in (a, b, c, frames(model, seed=None, max_len=1))}) == 4, "the script's own seed plays no part"


def test_a_long_text_is_spoken_in_pieces_with_pauses(home, tmp_path):
    """The same sound as its sentences one by one, silence between them, whatever the batches."""
    parts = ["One two three.", "Four five.", "Six seven eight nine."]
    (tmp_path / "texts.txt").write_text(" ".join(parts) + "\nShort.\n")
    common = ("--ckpt_dir", home.base, *SHORT, "--retries", 0)
    for size in (2, 8):
        flags = ("--input", tmp_path / "texts.txt", "--output_dir", tmp_path / f"out{size}", "--batch_size", size)
        paths, _ = speak(*common, *flags, "--max_chars_per_piece", 22, "--pause", 0.1)
        assert len(paths) == 2
    (tmp_path / "parts.txt").write_text("\n".join([*parts, "Short."]))
    single, _ = speak(*common, "--input", tmp_path / "parts.txt", "--output_dir", tmp_path / "single", "--batch_size", 1)
    waves = [audio.read(path)[0] for path in single]
    silence = torch.zeros(round(0.1 * audio.read(single[0])[1]))
    whole = torch.cat([waves[0], silence, waves[1], silence, waves[2]])
    for size in (2, 8):
        long, short = (audio.read(tmp_path / f"out{size}/output_00{i}.wav")[0] for i in (1, 2))
        assert len(long) == len(whole) and (long - whole).abs().max() < 2e-3
        assert (short - waves[3]).abs().max() < 2e-3
    code, out, err = here("infer", [*map(str, common), "--text", " ".join(parts), "--output", "-", "--max_chars_per_piece", "22", "--pause", "0.1"])
    assert code == 0 and len(out) == 2 * len(whole)


SCRIPTS = ("The cat, Dr. Lee said, cost 3.50. ", "\u4f60\u597d\u5417\uff1f\u5f88\u597d\u3002", "\u0928\u092e\u0938\u094d\u0924\u0947\u0964 \u0915\u0948\u0938\u0947 \u0939\u094b? ")


def test_a_text_of_fifty_thousand_characters_is_spoken_whole_and_tells_how_far_it_is(home, monkeypatch):
    draw, text = random.Random(1), ""
    while len(text) < 50000:
        text += draw.choice(SCRIPTS)
    heard = []

    def generate_batch(model, requests, **how):
        model.finish = ["end"] * len(requests)
        for i, request in enumerate(requests):
            heard.append(request["text"])
            yield i, torch.full((2,), 0.5)

    monkeypatch.setattr(voxcpm.VoxCPM, "generate_batch", generate_batch)
    Path("book.jsonl").write_text(json.dumps({"text": text}))
    common = ("--ckpt_dir", home.base, "--max_chars_per_piece", 150, "--pause", 0)
    _, err = speak(*common, "--input", "book.jsonl", "--batch_size", 8)
    pieces, done = list(heard), [int(n) for n in re.findall(rf"(\d+)/{len(heard)} \| .*ETA", err)]
    assert "".join("".join(pieces).split()) == "".join(text.split()) and len(said("output_001.wav")) == 2 * len(pieces)
    assert 334 <= len(pieces) < 450 and max(map(len, pieces)) <= 150, "as few as whole sentences allow"
    assert all(piece.endswith((".", "?", "\u3002", "\uff1f", "\u0964")) and not piece.endswith("Dr.") for piece in pieces)
    assert done == [*range(8, len(pieces), 8), len(pieces)]
    heard.clear()
    code, out, err = here("infer", (*common, "--text", text, "--output", "-"))
    assert code == 0 and heard == pieces and len(out) == 4 * len(pieces)
    assert len(re.findall(rf"\d+/{len(pieces)} \| .* Hz", err)) == len(pieces)


def test_what_is_behind_the_last_speech_is_cut_when_asked_for_and_counted(home, monkeypatch):
    rate = models.load(home.base).out_sample_rate
    speech, hiss = speech_like(rate), 0.02 * torch.randn(2 * rate, generator=torch.Generator().manual_seed(0))
    ends = {"long": torch.cat([torch.zeros(rate), hiss]), "none": torch.zeros(rate // 20), "bad": torch.full((rate,), float("nan"))}

    def generate_batch(model, requests, **how):
        model.finish = ["end"] * len(requests)
        yield from ((i, torch.cat([speech, ends[request["text"]]])) for i, request in enumerate(requests))

    monkeypatch.setattr(voxcpm.VoxCPM, "generate_batch", generate_batch)
    Path("lines.txt").write_text("long\nnone\n")
    flags = ("--ckpt_dir", home.base, "--input", "lines.txt")
    paths, err = speak(*flags)
    assert [len(said(path)) for path in paths] == [len(speech) + len(ends[text]) for text in ("long", "none")] and "behind" not in err
    paths, err = speak(*flags, "--trim_end", 0.25)
    assert len(said(paths[0])) == pytest.approx(len(speech) + 0.25 * rate, abs=0.06 * rate) and len(said(paths[1])) == len(speech) + rate // 20
    assert re.search(r"1 of 2 takes had more than 0.25 s behind their last speech; 2\.[78] s are cut", err)
    assert "not written, sample" in fails(1, "--ckpt_dir", home.base, "--text", "bad", "--trim_end", 0.25)
    assert "--trim_end hears a sound to its end" in fails(2, "--ckpt_dir", home.base, "--text", "a", "--output", "-", "--trim_end", 0)


@pytest.mark.parametrize("flags, words", ((("--max_chars_per_piece", "-1"), "max_chars_per_piece is -1"), (("--pause", "1e9"), "pause is")))
def test_wrong_pieces_are_refused(home, flags, words):
    code, _, err = here("infer", ["--ckpt_dir", home.base, "--text", "a", *flags])
    assert code == 2 and words in err
