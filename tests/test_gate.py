"""The gate: what it says of bases that read the text and of those that do not, by controls on the same rows."""
import importlib
import json
import math

import pytest
import torch

import models
from models.parts import audio, gate
from models.parts.cache import ClipCache
from models.parts.manifests import read_manifest
from models.parts.run import Clip

WORDS = "hello there all in a world of war and the other thing".split()
DEVICE = torch.device("cpu")


class Reader(torch.nn.Module):
    """The contract's calls on numbers: a recording is its loudness, a text its length, and the two belong together where they agree."""

    encode_key = codec_key = "reader"
    sample_rate, size = 16000, 8
    codec = torch.nn.Module()

    def __init__(self, reads, bias=0.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([reads, bias, 2.0]))  # how much the text counts, how good it is anyway, how unequal the rows are

    def encode_audio(self, path, start, end):
        return torch.tensor([round(float(audio.read(path)[0].abs().max()) * 10)])

    def encode(self, row):
        return {"text": torch.tensor([len(row["text"])]), "codes": row["audio"]}

    def collate(self, examples, seeds):
        [example], [seed] = examples, seeds
        noise = torch.rand(1, generator=torch.Generator().manual_seed(seed + int(example["codes"])))
        return {**example, "noise": noise}, {"loss/code": 1, "loss/text": 1}

    def forward(self, batch):
        reads, bias, unequal = self.weight
        fits = (batch["text"] == batch["codes"]).float()
        logit = reads * fits + bias + unequal * batch["noise"]
        logits = logit * torch.nn.functional.one_hot(batch["codes"], self.size)
        loss = torch.nn.functional.cross_entropy(logits, batch["codes"], reduction="sum")
        return {"loss/code": loss, "loss/text": 10 * batch["text"].float().sum(), "metric/x": loss}


@pytest.fixture
def rows(tmp_path):
    """Recordings whose loudness is the length of their text: 1 to 7."""
    lines = []
    for i in range(12):
        n = 1 + i * 5 % 7
        audio.write(tmp_path / f"{i}.wav", torch.full((1600,), n / 10), 16000)
        lines.append({"id": f"r{i}", "audio": f"{i}.wav", "text": "x" * n})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_manifest(tmp_path / "rows.jsonl")


def look(model, rows, folder, weights=None):
    cache = ClipCache(folder / "cache", model)
    cache.add(rows, lambda _: None)
    clips = [Clip(row, cache.key(row), 1, 0.1) for row in rows]
    return gate.look(model, clips, cache, weights or {"loss/code": 1.0, "loss/text": 1.0}, DEVICE)


def test_a_base_that_reads_the_text_passes_and_one_that_does_not_is_told(rows, tmp_path):
    found = look(Reader(1.0), rows, tmp_path)
    assert not found.wrong and f"better in {len(found.gains)} of {len(found.gains)} rows" in found.line, found
    deaf = look(Reader(0.0), rows, tmp_path)
    assert len(deaf.wrong) == 1 and "does no better with the right texts than with those of other rows (in 0 of 12 rows)" in deaf.wrong[0]


def test_texts_that_are_one_row_off_are_told(rows, tmp_path):
    shifted = [{**row, "text": rows[(i + 1) % len(rows)]["text"]} for i, row in enumerate(rows)]
    assert "does no better with the right texts" in look(Reader(1.0), shifted, tmp_path).wrong[0]


def test_the_constant_is_the_logarithm_of_the_number_of_codes(rows, tmp_path):
    found = look(Reader(1.0), rows, tmp_path)
    assert all(losses["loss/code"] == pytest.approx(math.log(8)) for losses in found.constant)
    unknown = look(Reader(1.0, -9.0), rows, tmp_path)  # a voice that it does not know, but it reads the text
    assert not unknown.wrong and "loss/code is above that of a constant answer although the text is heard" in unknown.note
    assert not found.note and not look(Reader(0.0, -9.0), rows, tmp_path).note
    worse = look(Reader(0.0, -9.0), rows, tmp_path)  # the true code is the least likely
    assert "loss/code of the base is" in worse.wrong[-1] and "worse than" in worse.wrong[-1] and f"{math.log(8):.4f}" in worse.wrong[-1]


def test_the_likelihood_of_the_text_itself_does_not_count(rows, tmp_path):
    """With other texts loss/text is another number in any case; alone it would make every base look as if it listened."""
    assert look(Reader(0.0), rows, tmp_path, {"loss/code": 1.0, "loss/text": 1.0}).gains == [0.0] * 12


def test_rows_of_one_text_are_told_and_too_few_rows_are_not_judged(rows, tmp_path):
    same = look(Reader(1.0), [{**row, "text": "all the same"} for row in rows], tmp_path)
    assert "all have the same text" in same.wrong[0] and len(same.wrong) == 1
    few = look(Reader(0.0, -9.0), rows[:3], tmp_path)
    assert not few.wrong and "too few" in few.line


def test_no_recording_is_encoded_again_and_nothing_is_stored(rows, tmp_path, monkeypatch):
    model = Reader(1.0)
    cache = ClipCache(tmp_path / "cache", model)
    cache.add(rows, lambda _: None)
    clips = [Clip(row, cache.key(row), 1, 0.1) for row in rows]
    before = sorted(p.name for p in (tmp_path / "cache").iterdir()), set(cache.records)

    def refuse(*_):
        raise AssertionError("the codec ran")

    monkeypatch.setattr(Reader, "encode_audio", refuse)
    assert len(gate.look(model, clips, cache, {"loss/code": 1.0}, DEVICE).gains) == 12
    assert before == (sorted(p.name for p in (tmp_path / "cache").iterdir()), set(cache.records))


def test_one_wild_row_does_not_decide():
    assert gate.signed_ranks([1.0] * 15 + [-1000.0]) > gate.SURE
    assert gate.signed_ranks([-1.0] * 15 + [1000.0]) < 0
    assert gate.signed_ranks([1.0, -1.1] * 8) < gate.SURE
    assert gate.signed_ranks([0.1] * gate.LEAST_ROWS) > gate.SURE  # the fewest rows can pass


def test_a_conversation_says_other_words_in_every_turn():
    row = {"turns": [{"text": "a", "audio": "1"}, {"text": "b", "audio": "2"}, {"audio": "3"}]}
    other = gate.with_texts(row, ["x"])
    assert [turn.get("text") for turn in other["turns"]] == ["x", "x", None] and row["turns"][0]["text"] == "a"


@pytest.mark.parametrize("name", sorted(models.backbones()))
def test_every_backbone_can_be_looked_at(name, tmp_path):
    """Losses with zero weights are those of a constant: ln V of codes, and no random base is taken for a good one."""
    tiny = importlib.import_module(f"tests.tiny_{name}")
    tiny.write(tmp_path / "base", list(tiny.VARIANTS)[0])
    model = models.load(tmp_path / "base")
    lines = []
    for i in range(5):
        t = torch.arange(int(16000 * (0.4 + 0.1 * i))) / 16000
        audio.write(tmp_path / f"{i}.wav", 0.3 * torch.sin(6.2832 * (120 + 30 * i) * t), 16000)
        lines.append({"id": f"r{i}", "audio": f"{i}.wav", "text": " ".join(WORDS[i : i + 3])})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    before = {n: p.clone() for n, p in model.named_parameters()}
    found = look(model, read_manifest(tmp_path / "rows.jsonl"), tmp_path, models.backbones()[name].LAMBDAS)
    assert len(found.gains) == 5 and all(math.isfinite(gain) for gain in found.gains) and found.line
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    for losses in found.constant:
        for loss, value in losses.items():
            size = math.exp(value)  # a whole number of codes, of one vocabulary for every row
            assert loss == "loss/diff" or size == pytest.approx(round(size), rel=1e-4), (loss, size)
            assert loss == "loss/diff" or value == pytest.approx(found.constant[0][loss], rel=1e-5)
