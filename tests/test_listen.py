"""What a run lets one hear: which sentences, how much time they may take, the files, and the page that grows."""
import re
import types

import pytest
import torch

from models.parts import audio, listen
from tests.test_train import Heard, go, home, jsonl  # noqa: F401  (home is a fixture)

RATE = 16000


class Speaker:
    """A model that speaks chunk after chunk; `clock` goes on by a second with each."""

    out_sample_rate, codec = RATE, torch.nn.Module()

    def __init__(self, clock, chunks=2):
        self.clock, self.chunks, self.asked = clock, chunks, []

    def eval(self):
        return self

    train = eval

    def sample_request(self, row):
        return {"speaker": row.get("speaker")}

    def generate(self, text, speaker, seed):
        self.asked.append((text, speaker, seed))
        for i in range(self.chunks):
            self.clock[0] += 1
            yield torch.full((RATE // 10,), 0.1 * (i + 1))


class Writer:
    def __init__(self):
        self.tags = []

    def add_audio(self, tag, wave, step, rate):
        self.tags.append((tag, step))

    def add_image(self, tag, picture, step, dataformats):
        self.tags.append((tag, step))

    def __call__(self, method, *values, **more):
        """As the log of a run passes it on."""
        getattr(self, method)(*values, **more)


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(listen, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    return now


@pytest.fixture
def log(tmp_path):
    log = Heard()
    log.root = tmp_path
    log.writer = log.show = Writer()
    return log


def rows(folder, n):
    for i in range(n):
        audio.write(folder / f"{i}.wav", torch.linspace(-0.5, 0.5, RATE // 5), RATE)
    return [{"audio": str(folder / f"{i}.wav"), "text": f"Sentence <{i}>.", "speaker": f"s{i}"} for i in range(n)]


def test_further_texts_are_spoken_in_the_voice_of_the_first_row(tmp_path):
    found = listen.further(["New."], [{"text": "", "audio": "x"}, *rows(tmp_path, 2)])
    assert found == [listen.Sentence("New.", {"audio": str(tmp_path / "0.wav"), "text": "New.", "speaker": "s0"}, False)]
    talk = {"turns": [{"text": "A.", "audio": "a.wav"}, {"text": "B.", "audio": "b.wav"}, {"text": "C."}]}
    assert [s.text for s in listen.sentences([talk])] == ["B."] and listen.further([], []) == []


def test_samples_are_files_and_curves_with_the_recording_once(tmp_path, clock, log):
    samples = listen.Samples(listen.sentences(rows(tmp_path, 2)), 7, log)
    model = Speaker(clock)
    for step in (0, 50):
        samples.try_to_speak(model, step)
    made = {p.name for p in (tmp_path / "samples").iterdir()}
    assert made == {f"step_{s:07d}_{i}.{kind}" for s in (0, 50) for i in (0, 1) for kind in ("wav", "flac")} | {
        "recording_0.flac", "recording_1.flac", "listen.html"}
    assert model.asked == [("Sentence <0>.", "s0", 7), ("Sentence <1>.", "s1", 7)] * 2
    kinds = ("generated_audio", "mel_spectrogram")
    assert set(log.writer.tags) == {(f"val_sample_{i}/{kind}", s) for i in (0, 1) for s in (0, 50) for kind in kinds} | {
        (f"val_sample_{i}/reference_audio", 0) for i in (0, 1)}
    assert "step 50: spoke 2 of 2 samples in 4.0 s" in log.lines[-1]


def test_samples_take_a_tenth_of_the_time_and_say_what_is_missing(tmp_path, clock, log, monkeypatch):
    monkeypatch.setattr(listen, "LEAST_SECONDS", 0)
    samples = listen.Samples(listen.sentences(rows(tmp_path, 3)), 7, log)
    samples.try_to_speak(Speaker(clock, 4), 0)  # the first may take longer
    assert len(log.lines) == 1 and "spoke 3 of 3" in log.lines[0]
    clock[0] += 50  # five seconds: the first sentence takes four, the second is cut, the third left out
    samples.try_to_speak(Speaker(clock, 4), 1)
    assert "sample 1 was cut" in log.lines[1] and "1 samples were left out" in log.lines[2] and "spoke 2 of 3 samples in 6.0 s" in log.lines[3]
    assert audio.info(tmp_path / "samples/step_0000001_0.wav").seconds == pytest.approx(0.4)
    assert audio.info(tmp_path / "samples/step_0000001_1.wav").seconds == pytest.approx(0.2)
    clock[0] += 1000
    samples.try_to_speak(Speaker(clock, 4), 2)
    assert "spoke 3 of 3" in log.lines[4]


def test_the_page_has_all_sounds_in_it_and_grows(tmp_path, clock, log):
    samples = listen.Samples(listen.sentences(rows(tmp_path, 2)), 7, log)
    file = tmp_path / "samples" / "listen.html"
    for count, step in enumerate((0, 10, 20), 1):
        samples.try_to_speak(Speaker(clock), step)
        page = file.read_text(encoding="utf-8")
        assert page.count("data:audio/flac") == 2 * count + 2 and page.count("data:image/png") == 2 * count + 2
    assert 'data-name="recording"' in page and 'data-name="step 0, the base"' in page and "Sentence &lt;0&gt;." in page
    assert not re.findall(r"(?:src|href)=[\"'](?!data:)[^\"']+|url\(|https?://|@import", page)
    listen.write_page(tmp_path / "samples", samples.sentences, 10)  # an earlier run had gone further
    assert 'data-name="step 20"' not in file.read_text() and 'data-name="step 10"' in file.read_text()


def test_many_steps_are_thinned_out_evenly():
    assert listen.spread([1, 2, 3], 3) == [1, 2, 3]
    assert listen.spread(list(range(101)), 5) == [0, 25, 50, 75, 100]


def test_a_prompt_is_spoken_in_a_run_without_validation_rows(home):  # noqa: F811
    said = go(home, "prompted", "--num_iters", 2, "--valid_interval", 1, "--sample_prompt", "hello there all")
    made = {p.name for p in (home / "prompted" / "samples").glob("*.wav")}
    assert made == {f"step_{i:07d}_0.wav" for i in range(3)} and "hello there all" in (home / "prompted/samples/listen.html").read_text()
    assert "listen: prompted/samples/listen.html" in said and "| validation " not in said
