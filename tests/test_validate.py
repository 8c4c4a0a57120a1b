"""validate.py: sound or not, does the adapter do anything, which is best; on every backbone, as a user runs it."""
import dataclasses
import importlib
import json
import math
import re
import shutil

import pytest
import torch

import lora
import models
import validate
from models.parts import audio, checkpoint, page
from tests.running import here
from tests.test_campplus import published

TEXT = "Hello there."
SHORT = ("--max_len", "4", "--min_len", "3")


class Home:
    """A tiny base, a manifest of two recordings, and adapters that do nothing, little and more."""

    def __init__(self, folder, name):
        tiny = importlib.import_module(f"tests.tiny_{name}")
        self.folder, self.base = folder, folder / "base"
        tiny.write(self.base, list(tiny.VARIANTS)[0])
        self.model = models.load(self.base)
        rows = []
        for i, text in enumerate((TEXT, "And a second one.")):
            t = torch.arange(int(0.6 * 16000)) / 16000
            audio.write(folder / f"{i}.wav", 0.3 * torch.sin(6.28 * (200 + 40 * i) * t), 16000)
            rows.append({"audio": f"{i}.wav", "text": text, "speaker": "0"})
        self.manifest = folder / "val.jsonl"
        self.manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for step, size in ((1, 0.0), (2, 0.02), (3, 0.3)):
            self.adapter(step, size)

    def adapter(self, step, size):
        lora.apply_lora_to_model(self.model, {"r": 4, "alpha": 8.0})
        g = torch.Generator().manual_seed(step)
        for module in lora.lora_modules(self.model).values():
            module.lora_B.data = size * torch.randn(module.lora_B.shape, generator=g)

        def write(folder):
            lora.save_lora_weights(self.model, folder, base=str(self.base))
            (folder / "scheduler.pth").write_bytes(b"as train.py leaves it")

        checkpoint.write_step(self.folder / "run", step, write, {"step": step})
        lora.remove_lora(self.model)

    def step(self, step):
        return self.folder / f"run/step_{step:07d}"


@pytest.fixture(scope="module", params=sorted(models.backbones()))
def home(request, tmp_path_factory):
    return Home(tmp_path_factory.mktemp("validate"), request.param)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return Home(tmp_path_factory.mktemp("validate"), sorted(models.backbones())[-1])


def run(*flags):
    """(exit code, report.json, stderr) of a call that has an output_dir."""
    code, _, err = here("validate", flags)
    folder = flags[flags.index("--output_dir") + 1]
    path = checkpoint.Path(folder) / "report.json"
    return code, json.loads(path.read_text()) if path.is_file() else None, err


def columns(report):
    return {column["name"]: column for column in report["columns"]}


def test_adapters_are_compared_with_their_base(home, tmp_path):
    # Where any adapter changes how positions are counted, as a tuned model's are, one of zeros would do something, too.
    sampling = {f.name for f in dataclasses.fields(models.backbones()[home.model.backbone].Sampling)}
    counted = ("--mel_positions", "upstream") if "mel_positions" in sampling else ()
    code, report, err = run("--lora", *map(home.step, (3, 1, 2)), "--manifest", home.manifest, "--text", "A new one.",
                            "--output_dir", tmp_path / "out", "--rank_by", "difference", "--retries", "0", *SHORT, *counted)
    assert code == 0, err
    assert [c["name"] for c in report["columns"]] == ["base", "step_0000001", "step_0000002", "step_0000003"]
    found = columns(report)
    assert sorted(report["ranking"]) == sorted(found)[1:] and report["ranking"][-1] == "step_0000001"
    assert found["step_0000001"]["numbers"]["difference"] == 0 and "this adapter does nothing" in err
    assert min(found[f"step_000000{n}"]["numbers"]["difference"] for n in (2, 3)) > 0
    assert all(len(c["cells"]) == 3 for c in report["columns"])
    first, nothing = found["base"]["numbers"], found["step_0000001"]["numbers"]
    assert {name: nothing[name] for name in first} == pytest.approx(first, rel=1e-4)
    for cell in found["step_0000003"]["cells"]:
        wave, rate = audio.read(tmp_path / "out" / cell["file"])
        assert rate == home.model.out_sample_rate and len(wave) / rate == pytest.approx(cell["seconds"])
    new, recorded, _ = found["base"]["cells"]  # what is too short has no spectrogram
    assert "mel_cepstral_distance" not in new and ("mel_cepstral_distance" in recorded) == (recorded["seconds"] > validate.SHORTEST)


def test_the_losses_are_those_of_the_whole_set_in_one_batch(home, tmp_path):
    _, report, _ = run("--lora", home.step(3), "--manifest", home.manifest, "--rows", 0, "--text", TEXT, "--output_dir", tmp_path / "out",
                       "--batch_size", 1, *SHORT)
    model = models.load(home.base)
    lora.load_lora_weights(model, home.step(3))
    rows = validate.read_manifest([str(home.manifest)])
    with torch.no_grad():
        batch, counts = model.collate([model.encode(row) for row in rows])
        out = model(batch)
    numbers = columns(report)["step_0000003"]["numbers"]
    for name, value in out.items():
        assert numbers[name] == pytest.approx(value.item() / counts[name], rel=1e-4), name
    weights = models.backbones()[model.backbone].LAMBDAS
    assert numbers["loss/total"] == pytest.approx(sum(w * numbers[k] for k, w in weights.items()))


def test_the_size_of_an_update_is_that_of_the_whole_matrix(one):
    model = models.load(one.base)
    lora.load_lora_weights(model, one.step(3))
    lora.set_lora_strength(model, 0.5)
    groups = validate.weigh(model)
    assert sum(count for _, count, _, _ in groups) == len(lora.lora_modules(model)) and all(zero == 0 for _, _, zero, _ in groups)
    group, _, _, share = groups[0]
    updates, weights = [], []
    for name, m in lora.lora_modules(model).items():
        stack, _, rest = re.sub(r"\.\d+\.", " ", name).rpartition(".")
        if f"{stack} {rest}".strip() == group:
            updates.append((m.lora_scale * m.lora_B @ m.lora_A).flatten())
            weights.append(m.weight.flatten())
    assert share == pytest.approx((torch.cat(updates).norm() / torch.cat(weights).norm()).item(), rel=1e-5)


def test_damage_is_told_and_costs_that_column_alone(one, tmp_path):
    shutil.copytree(one.folder / "run", tmp_path / "run")
    torn, sick = tmp_path / "run/step_0000001", tmp_path / "run/step_0000002"
    beside = torn / "scheduler.pth"  # nothing that speaks reads it; the index tells
    data = bytearray(beside.read_bytes())
    data[-3] ^= 1
    beside.write_bytes(data)
    file = next(p for p in sick.iterdir() if p.suffix == ".safetensors")
    tensors = {name: t.load() for name, t in checkpoint.read(file).items()}
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name][0, 0] = math.nan
    checkpoint.save_tensors(file, tensors, checkpoint.read_metadata(file))
    (sick / checkpoint.INDEX).unlink()
    code, report, err = run("--lora", *sorted((tmp_path / "run").glob("step_*")), "--text", TEXT, "--output_dir", tmp_path / "out", *SHORT)
    found = columns(report)
    assert code == 1
    assert "checksum" in found["step_0000001"]["problems"][0] and not found["step_0000001"]["cells"]
    assert "NaN" in found["step_0000002"]["problems"][0]
    values = {"a.weight": torch.tensor([1.0, math.inf]), "b.weight": torch.ones(2)}  # as those of a full checkpoint
    assert validate.not_finite(values) == ["a.weight holds NaN or infinity"]
    assert not found["step_0000003"]["problems"] and found["step_0000003"]["cells"]


def test_the_same_command_goes_on_and_another_begins_anew(one, tmp_path, monkeypatch):
    flags = ("--lora", one.step(2), one.step(3), "--text", TEXT, "--output_dir", tmp_path / "out", *SHORT)
    spoken = []
    take = validate.take

    def interrupted(*args):
        if len(spoken) == 2:
            raise KeyboardInterrupt
        spoken.append(args)
        return take(*args)

    monkeypatch.setattr(validate, "take", interrupted)
    assert run(*flags)[0] == 130
    spoken.clear()
    monkeypatch.setattr(validate, "take", lambda *args: spoken.append(args) or take(*args))
    code, report, err = run(*flags)
    assert code == 0 and len(spoken) == 1 and err.count("as it was measured before") == 2
    assert [len(c["cells"]) for c in report["columns"]] == [1, 1, 1]
    for other in (("--seed", "7"), ("--max_len", "3")):
        spoken.clear()
        changed = [flag for flag in flags if flag not in other[:1]] if other[0] not in flags else [
            other[1] if flags[i - 1] == other[0] else flag for i, flag in enumerate(flags)]
        changed = changed if other[0] in flags else [*flags, *other]
        assert run(*changed)[0] == 0 and len(spoken) == 3


def test_a_clip_that_was_deleted_is_made_again(one, tmp_path):
    flags = ("--lora", one.step(2), "--text", TEXT, "--output_dir", tmp_path / "out", *SHORT)
    report = run(*flags)[1]
    clip = tmp_path / "out" / report["columns"][1]["cells"][0]["file"]
    before = clip.read_bytes()
    clip.unlink()
    assert run(*flags)[0] == 0 and clip.read_bytes() == before


def test_what_no_good_fine_tune_shows_is_told_in_words():
    numbers = {"loss/total": 1.0, "mel_cepstral_distance": 6.0, "length_ratio": 1.0, "ended": 1.0}
    base = validate.Column("base", is_base=True, numbers=numbers)
    better = {**numbers, "loss/total": 0.9, "mel_cepstral_distance": 5.0}

    def doubts(**changed):
        return validate.doubts_of(validate.Column("tuned", numbers={**better, **changed}), base)

    assert doubts() == [] and doubts(length_ratio=0.85) == []
    for changed, words in (({"loss/total": 1.1}, "1.1, is no lower than the base's, 1"),
                           ({"mel_cepstral_distance": 6.5}, "no more like the recordings"),
                           ({"length_ratio": 1.6}, "1.60 times as long"), ({"length_ratio": 0.5}, "0.50 times"),
                           ({"ended": 0.6}, "40% of its sentences do not end by themselves, of the base's 0%")):
        told = doubts(**changed)
        assert len(told) == 1 and words in told[0], changed
    # A base that seldom ends either is no reason to doubt the adapter.
    base.numbers["ended"] = 0.5
    assert doubts(ended=0.6) == []
    assert validate.doubts_of(validate.Column("mute"), base) == []


def test_doubts_stand_on_the_page_and_in_the_report(one, tmp_path):
    adapters = "--lora", str(one.step(3)), "--manifest", str(one.manifest), *SHORT
    code, report, err = run(*adapters, "--output_dir", str(tmp_path))
    tuned = columns(report)["step_0000003"]
    # Four steps at the most are far shorter than the recordings.
    assert code == 0 and any("times as long" in doubt for doubt in tuned["doubts"])
    assert all(doubt in err and doubt.split(",")[0] in (tmp_path / "report.html").read_text() for doubt in tuned["doubts"])
    assert columns(report)["base"]["doubts"] == []


def test_ties_go_to_the_earlier_step_and_the_best_is_copied(one, tmp_path):
    flags = ("--lora", one.step(3), one.step(2), one.step(1), "--text", TEXT, "--output_dir", tmp_path / "out", *SHORT,
             "--rank_by", "takes", "--retries", "0", "--compare_base", "false")
    code, report, err = run(*flags, "--copy_best", tmp_path / "best")
    assert code == 0 and report["ranking"] == ["step_0000001", "step_0000002", "step_0000003"], err
    assert checkpoint.check_step(tmp_path / "best") is None
    assert (tmp_path / "best/training_state.json").read_text() == (one.step(1) / "training_state.json").read_text()
    code, _, err = here("validate", [*flags, "--copy_best", tmp_path / "best"])
    assert code == 2 and "exists already" in err


def test_full_checkpoints_are_columns_too(one, tmp_path):
    model = models.load(one.base)
    lora.load_lora_weights(model, one.step(3))
    model.save(tmp_path / "merged", merged=True)
    code, report, err = run("--ckpt_dir", one.base, tmp_path / "merged", "--text", TEXT, "--manifest", one.manifest, "--output_dir",
                            tmp_path / "out", *SHORT)
    assert code == 0, err
    _, adapters, _ = run("--lora", one.step(3), "--text", TEXT, "--manifest", one.manifest, "--output_dir", tmp_path / "two", *SHORT)
    merged, adapted = columns(report)["merged"]["numbers"], columns(adapters)["step_0000003"]["numbers"]
    assert merged["loss/total"] == pytest.approx(adapted["loss/total"], rel=1e-4) and merged["difference"] > 0


def test_words_are_counted_where_a_transcriber_is_given(one, tmp_path, monkeypatch):
    (tmp_path / "my_ears.py").write_text("def listen(path):\n    return 'hello where'\n")
    monkeypatch.chdir(tmp_path)
    code, report, err = run("--lora", one.step(3), "--text", TEXT, "--output_dir", tmp_path / "out", "--transcriber", "my_ears:listen", *SHORT)
    assert code == 0, err
    assert columns(report)["step_0000003"]["numbers"]["word_error_rate"] == 0.5


@pytest.mark.parametrize("flags, words", (
    ((), "output_dir is not set"),
    (("--output_dir", "out"), "give --lora with adapters, or --ckpt_dir"),
    (("--output_dir", "out", "--lora", "nowhere"), "--text with sentences"),
    (("--output_dir", "out", "--lora", "nowhere", "--text", "a", "--ckpt_dir", "base"), "nothing at nowhere"),
    (("--output_dir", "out", "--lora", "a", "--text", "a", "--ckpt_dir", "b", "c"), "their one base; 2 were given"),
    (("--output_dir", "out", "--lora", "a", "--text", "a", "--copy_best", "best"), "copy_best needs rank_by"),
    (("--output_dir", "out", "--lora", "a", "--text", "a", "--rank_by", "beauty"), "rank_by is 'beauty'; known are"),
    (("--output_dir", "out", "--lora", "a", "--text", "a", "--rank_by", "level"), "level is neither better high nor low"),
    (("--output_dir", "out", "--lora", "a", "--text", "a", "--rows", "-1"), "rows is -1, expected at least 0"),
))
def test_wrong_use_is_told_before_anything_is_loaded(flags, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    code, _, err = here("validate", flags)
    assert code == 2 and words in err


def test_a_number_that_nobody_has_cannot_rank(one, tmp_path):
    code, _, err = run("--lora", one.step(3), "--text", TEXT, "--output_dir", tmp_path / "out", "--rank_by", "loss/total", *SHORT)
    assert code == 1 and "no column has loss/total" in err


def test_the_page_needs_nothing_but_itself(one, tmp_path):
    (tmp_path / "<b>run&").mkdir()
    evil = tmp_path / "<b>run&/step_0000003"
    shutil.copytree(one.step(3), evil)
    run("--lora", evil, "--manifest", one.manifest, "--text", "</script><b>x", "--output_dir", tmp_path / "out", "--ckpt_dir", one.base, *SHORT)
    text = (tmp_path / "out/report.html").read_text()
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", text) and "http" not in text
    assert text.count("data:audio/flac") == 6 and text.count("data:image/png") == 8  # two columns, three sentences, two recordings
    assert text.count("</script>") == 1 and "<b>x" not in text


def test_a_picture_is_a_png_of_its_values(tmp_path):
    import base64
    import struct
    import zlib
    values = torch.tensor([[0.0, 0.5, 1.0], [1.0, 0.25, 0.0]])
    data = base64.b64decode(re.search(r"base64,([^\"]+)", page.picture(values))[1])
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", data[16:24]) == (3, 2)
    at = data.index(b"IDAT")
    rows = zlib.decompress(data[at + 4 : at + 4 + struct.unpack(">I", data[at - 4 : at])[0]])
    assert list(rows) == [0, 0, 128, 255, 0, 255, 64, 0]
    assert struct.unpack(">I", data[at + 4 + len(zlib.compress(rows)) :][:4])[0] == zlib.crc32(b"IDAT" + zlib.compress(rows))


def test_voices_are_told_apart_where_the_weights_of_campplus_are_given(one, tmp_path):
    """Each clip against the recordings' voice, as the cosine of CAM++'s embeddings; without the weights there is no such number."""
    published(tmp_path / "campplus_cn_common.bin")
    flags = ("--lora", one.step(3), "--manifest", one.manifest, *SHORT, "--output_dir", tmp_path / "out")
    code, report, err = run(*flags)
    assert code == 0 and "campplus_similarity" not in columns(report)["base"]["numbers"], err
    code, report, err = run(*flags, "--extra.campplus", tmp_path)
    assert code == 0 and "as it was measured before" not in err, err
    ears = validate.campplus.load(tmp_path / "campplus_cn_common.bin")

    def direction(path):
        wave, rate = audio.read(path)
        seen = ears.embed(audio.resample(wave, rate, 16000))
        return seen / seen.norm()

    voice = sum(direction(one.folder / f"{i}.wav") for i in range(2))
    for column in report["columns"]:
        for cell in column["cells"]:
            found = float(direction(tmp_path / "out" / cell["file"]) @ voice / voice.norm())
            assert cell["campplus_similarity"] == pytest.approx(found, abs=2e-3)
        mean = sum(cell["campplus_similarity"] for cell in column["cells"]) / len(column["cells"])
        assert column["numbers"]["campplus_similarity"] == pytest.approx(mean)
    assert "CAM++ similarity to the recordings" in (tmp_path / "out/report.html").read_text()
    assert "at nowhere" in run(*flags, "--extra.campplus", "nowhere")[2]
