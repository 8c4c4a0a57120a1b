"""Every shape of data set that is read, the split, cutting and levelling, the cache, and the report of a clean set."""
import base64
import io
import json
import os
import re
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import configs
import prepare_data
from models.parts import Invalid, audio, cache as cache_part, clips as cutting, manifests
from prepare_data import ClipCache, read_manifest
from tests import running
from tests.conftest import ROOT

LJ = Path(ROOT).parent / "shared/audio/LJSpeech-24"
ARABIC = "وَمِنْ ثُمَّ قَالُوا أَنَّهُ لا يُوجَدُ إِلا أَنْ نَأْخُذَ سَيَنْسَتِيلْ."


def tone(path, seconds=1.0, hertz=440, rate=16000, level=0.3, **kind):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(str(path), level * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate), rate, **kind)
    return path


def put(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if isinstance(text, str) else json.dumps(text, ensure_ascii=False), encoding="utf-8")
    return path


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def prepare(*flags):
    prepare_data.main([str(f) for f in flags])


def prepared(tmp_path, *flags):
    """All rows that come out of --input ..., in the order of their ids, and the report."""
    out = tmp_path / "out"
    prepare("--output_dir", out, "--val_split", 0, *flags)
    return read_manifest(out / "train.jsonl"), json.loads((out / "report.json").read_text())


class Model:
    """A stand-in with the calls that prepare_data uses: it frames the audio and knows the characters of `alphabet`."""

    backbone, sample_rate, codec_key, encode_key, alphabet = "stand-in", 16000, "codec 1", "rest 1", None
    codec = torch.nn.Identity()

    def __init__(self):
        self.encode_calls, self.codec_calls = 0, 0

    def encode_audio(self, source, start=None, end=None):
        self.codec_calls += 1
        wave = source if torch.is_tensor(source) else audio.read(source, self.sample_rate, start, end)[0]
        return wave[: len(wave) // 640 * 640].view(-1, 640)[:, ::80].contiguous()

    def encode(self, row):
        self.encode_calls += 1
        codes = row["audio"] if torch.is_tensor(row["audio"]) else self.encode_audio(row["audio"], row.get("start"), row.get("end"))
        out = {"text": torch.tensor(self.encode_text(row["text"])), "latents": codes.view(-1, 2, 4), "on": torch.tensor(True)}
        if "ref_audio" in row:
            out["ref"] = row["ref_audio"].bfloat16()
        return out

    def encode_text(self, text, speaker=None):
        return [ord(c) + 1 if not self.alphabet or c in self.alphabet else 0 for c in text]

    def length(self, example):
        return len(example["text"]) + len(example["latents"])


@pytest.fixture
def model(monkeypatch):
    made = Model()
    monkeypatch.setattr(prepare_data.models, "load", lambda path, device, extra: made, raising=False)
    return made


# ------------------------------------------------------------------------------------------------ shapes


def test_jsonl_of_the_voxcpm_guide(tmp_path):
    for n in range(1, 5):
        tone(tmp_path / f"path/to/audio{n}.wav", 3.5)
    put(tmp_path / "train.jsonl", """{"audio": "path/to/audio1.wav", "text": "Transcript of audio 1."}
{"audio": "path/to/audio2.wav", "text": "Transcript of audio 2."}
{"audio": "path/to/audio3.wav", "text": "Optional duration field.", "duration": 3.5}
{"audio": "path/to/audio4.wav", "text": "Optional dataset_id for multi-dataset.", "dataset_id": 1}
""")
    rows = read_manifest(tmp_path / "train.jsonl")
    assert [r["id"] for r in rows] == ["audio1", "audio2", "audio3", "audio4"]
    assert rows[2]["duration"] == 3.5 and rows[3]["dataset_id"] == 1
    assert rows[0]["audio"] == str(tmp_path / "path/to/audio1.wav")


@pytest.mark.parametrize("key", ["audio", "audio_path", "audio_url", "path", "wav", "filename", "audio_file"])
def test_every_spelling_of_the_keys(tmp_path, key):
    tone(tmp_path / "a.wav")
    for speaker in ("speaker", "speaker_id", "source", "spk"):
        put(tmp_path / "m.jsonl", {key: "a.wav", "text": "x", speaker: "anna"})
        assert read_manifest(tmp_path / "m.jsonl") == [{"id": "a", "audio": str(tmp_path / "a.wav"), "text": "x", "speaker": "anna"}]


def test_json_list_of_the_csm_mlx_guide(tmp_path):
    tone(tmp_path / "audio1.wav"), tone(tmp_path / "audio2.wav")
    put(tmp_path / "dataset.json", """[
  {
    "text": "This is an example.",
    "audio_path": "%s",
    "speaker_id": 0
  },
  {
    "text": "Another example with a different speaker.",
    "audio_path": "audio2.wav",
    "speaker_id": 1
  }
]
""" % (tmp_path / "audio1.wav"))
    rows, report = prepared(tmp_path, "--input", tmp_path / "dataset.json")
    assert [(r["text"], r["speaker"]) for r in rows] == [("This is an example.", 0), ("Another example with a different speaker.", 1)]
    assert report["inputs"][0]["shape"] == "json" and report["dropped"] == []


def test_conversations_become_turns(tmp_path):
    tone(tmp_path / "a.wav"), tone(tmp_path / "b.wav", 2)
    put(tmp_path / "talk.json", [[{"text": "hello", "audio_path": "a.wav", "speaker": 0},
                                  {"text": "good day", "audio_path": "b.wav", "speaker": 1, "train": False}]])
    rows, _ = prepared(tmp_path, "--input", tmp_path / "talk.json")
    assert [(t["speaker"], t["text"], t.get("train")) for t in rows[0]["turns"]] == [(0, "hello", None), (1, "good day", False)]
    assert rows[0]["duration"] == 3 and rows[0]["turns"][1]["audio"] == str(tmp_path / "b.wav")


def test_roles_that_are_speakers_are_a_conversation(tmp_path):
    tone(tmp_path / "a.wav"), tone(tmp_path / "b.wav")
    put(tmp_path / "m.jsonl", {"training_mask": [False, True], "messages": [
        {"role": "0", "content": [{"type": "text", "text": "hello"}, {"type": "audio", "path": "a.wav"}]},
        {"role": "1", "content": [{"type": "text", "text": "yes"}, {"type": "audio", "url": "b.wav"}]}]})
    row, = read_manifest(tmp_path / "m.jsonl", {})
    assert row["turns"] == [{"speaker": 0, "train": False, "text": "hello", "audio": str(tmp_path / "a.wav")},
                            {"speaker": 1, "train": True, "text": "yes", "audio": str(tmp_path / "b.wav")}]


CHATML = {"messages": [
    {"role": "system", "content": "You are a helpful assistant capable of generating speech in the voice of the provided reference audio."},
    {"role": "user", "content": [
        {"type": "text", "text": "حلو لو سميته حاجة ممكن الأهالي يسمعوه"},
        {"type": "audio", "audio_url": "reference_audio.wav"},
        {"type": "text", "text": "Please generate speech for: " + ARABIC}]},
    {"role": "assistant", "content": [{"type": "text", "text": ARABIC}, {"type": "audio", "audio_url": "target_audio.wav"}]}],
    "speaker": "speaker_001"}


@pytest.mark.parametrize("name", ["train.json", "one.json", "train.jsonl"])
def test_chatml_of_the_higgs_guide(tmp_path, name):
    tone(tmp_path / "reference_audio.wav"), tone(tmp_path / "target_audio.wav", 2)
    put(tmp_path / name, json.dumps([CHATML], ensure_ascii=False, indent=2) if name == "train.json" else CHATML)
    (row,), _ = prepared(tmp_path, "--input", tmp_path / name)
    assert row["text"] == ARABIC and row["speaker"] == "speaker_001" and row["duration"] == 2
    assert row["ref_text"] == "حلو لو سميته حاجة ممكن الأهالي يسمعوه" and Path(row["ref_audio"]).name == "reference_audio.wav"
    assert [m["role"] for m in row["messages"]] == ["system", "user", "assistant"]
    assert row["messages"][1]["content"][1] == {"type": "audio", "audio": str(tmp_path / "reference_audio.wav")}


def test_chatml_without_a_system_turn(tmp_path):
    tone(tmp_path / "ref_audio.wav"), tone(tmp_path / "target_audio.wav")
    put(tmp_path / "a.json", [{"messages": [
        {"role": "user", "content": [{"type": "text", "text": "Arabic text"}, {"type": "audio", "audio_url": "ref_audio.wav"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Target Arabic text"}, {"type": "audio", "audio_url": "target_audio.wav"}]}]}])
    row, = read_manifest(tmp_path / "a.json")
    assert (row["text"], row["ref_text"]) == ("Target Arabic text", "Arabic text") and row["audio"].endswith("target_audio.wav")


def test_ljspeech_takes_the_third_column_and_leaves_quotes_alone(tmp_path):
    for n in (1, 2, 3):
        tone(tmp_path / f"wavs/LJ00{n}.wav")
    put(tmp_path / "metadata.csv", 'LJ001|"I said 5, he began.|"I said five, he began.\nLJ002|and left|and left\nLJ003|No. 3|Number three\n')
    for path in (tmp_path, tmp_path / "metadata.csv"):
        rows = read_manifest(path)
        assert [(r["id"], r["text"]) for r in rows] == [("LJ001", '"I said five, he began.'), ("LJ002", "and left"), ("LJ003", "Number three")]


@pytest.mark.parametrize("header, line", [("filename,text", 'a.wav,"one, two"'), ("audio,transcription", 'a.wav,"one, two"'),
                                          ("audio_file|text", "a.wav|one, two"), ("path\ttext", "a.wav\tone, two"),
                                          ("text;filename", "one, two;a.wav"), (None, "a.wav\tone, two"), (None, "a.wav|one, two")])
def test_tables_with_and_without_a_header(tmp_path, header, line):
    tone(tmp_path / "a.wav")
    put(tmp_path / "table.csv", "\ufeff" + (header + "\r\n" if header else "") + line + "\r\n\r\n")
    row, = read_manifest(tmp_path / "table.csv")
    assert (row["text"], row["audio"]) == ("one, two", str(tmp_path / "a.wav"))


def test_three_columns_are_asked_for_and_four_with_a_language_are_known(tmp_path):
    tone(tmp_path / "a.wav")
    put(tmp_path / "v.list", "a.wav|anna|so it is\n")
    with pytest.raises(configs.Usage, match="--format"):
        prepare("--input", tmp_path / "v.list", "--output_dir", tmp_path / "out")
    rows, _ = prepared(tmp_path, "--input", tmp_path / "v.list", "--format", "list")
    assert [(r["speaker"], r["text"]) for r in rows] == [("anna", "so it is")]
    put(tmp_path / "v.list", "a.wav|anna|EN|so it is\n")
    assert [(r["speaker"], r["text"]) for r in read_manifest(tmp_path / "v.list")] == [("anna", "so it is")]


def test_a_table_beside_a_folder_of_audio(tmp_path):
    tone(tmp_path / "my_voice/audio/x1.wav"), tone(tmp_path / "my_voice/audio/x2.wav")
    put(tmp_path / "lists/transcripts.csv", "filename,text\nx1.wav,first\nx2.wav,second\n")
    rows, _ = prepared(tmp_path, "--audio-dir", tmp_path / "my_voice/audio", "--transcripts", tmp_path / "lists/transcripts.csv")
    assert [r["text"] for r in rows] == ["first", "second"]


def test_segments_of_a_long_file(tmp_path):
    tone(tmp_path / "long.wav", 30)
    put(tmp_path / "m.jsonl", '{"path": "long.wav", "text": "one", "start": 1.5, "end": 4, "speaker": 2}\n'
        '{"path": "long.wav", "text": "two", "start": 4, "end": 6}\n')
    rows, _ = prepared(tmp_path, "--input", tmp_path / "m.jsonl")
    assert [(r["start"], r["end"], r["duration"]) for r in rows] == [(1.5, 4, 2.5), (4, 6, 2)] and len({r["id"] for r in rows}) == 2


def test_moshi_lines_find_their_text_and_keep_the_alignment_as_a_pointer(tmp_path):
    tone(tmp_path / "data/a.wav", 2), tone(tmp_path / "data/b.wav", 2)
    put(tmp_path / "data/a.txt", "hello there"), put(tmp_path / "data/a.json", {"alignments": [["hello", [0.1, 0.5], "SPEAKER_MAIN"]]})
    put(tmp_path / "data/b.json", {"alignments": [["good", [0.1, 0.5], "SPEAKER_MAIN"], ["day", [0.6, 0.9], "SPEAKER_MAIN"]]})
    put(tmp_path / "data.jsonl", '{"path": "data/a.wav", "duration": 2.0}\n{"path": "data/b.wav", "duration": 2.0}\n')
    rows, _ = prepared(tmp_path, "--input", tmp_path / "data.jsonl")
    assert [(r["text"], Path(r["alignment"]).name) for r in rows] == [("hello there", "a.json"), ("good day", "b.json")]


@pytest.mark.parametrize("endings, said", [((".txt",), 0), ((".lab",), 0), ((".original.txt", ".normalized.txt"), 1), ((".txt", ".original.txt"), 1)])
def test_folder_with_the_text_beside_the_audio(tmp_path, endings, said):
    tone(tmp_path / "in/sub/x.flac")
    for n, end in enumerate(endings):
        put(tmp_path / f"in/sub/x{end}", f" text {n}\n")
    rows, report = prepared(tmp_path, "--input", tmp_path / "in")
    assert [r["text"] for r in rows] == [f"text {said}"] and report["inputs"][0]["shape"] == "folder"


def test_audio_transcripts_and_alignments_folders(tmp_path):
    tone(tmp_path / "data/audio/sample1.wav", 2), tone(tmp_path / "data/audio/sample2.wav", 2)
    for n in (1, 2):
        put(tmp_path / f"data/transcripts/sample{n}.txt", f"sample {n}")
    put(tmp_path / "data/alignments/sample1.json", {"words": [{"word": "sample", "start": 0, "end": 1}, {"word": "1", "start": 1, "end": 2}]})
    for flags in (["--input", tmp_path / "data"], ["--audio-dir", tmp_path / "data/audio", "--transcript-dir", tmp_path / "data/transcripts",
                                                   "--alignment-dir", tmp_path / "data/alignments", "--speaker-id", "0"]):
        rows, _ = prepared(tmp_path, "--overwrite", *flags)
        assert [(r["text"], "alignment" in r) for r in rows] == [("sample 1", True), ("sample 2", False)]
    assert {r["speaker"] for r in rows} == {"0"} and {r["speaker"] for r in read_manifest(tmp_path / "out/train.jsonl", {})} == {0}


def test_one_folder_per_speaker_when_asked(tmp_path):
    for who in ("anna", "bo"):
        put(tone(tmp_path / f"in/{who}/1.wav").with_suffix(".lab"), f"I am {who}")
    assert all("speaker" not in r for r in prepared(tmp_path, "--input", tmp_path / "in")[0])
    rows, report = prepared(tmp_path, "--input", tmp_path / "in", "--speaker_from_folder")
    assert [(r["speaker"], r["text"]) for r in rows] == [("anna", "I am anna"), ("bo", "I am bo")] and len(report["speakers"]) == 2


def test_a_dictionary_from_file_to_text(tmp_path):
    tone(tmp_path / "a.wav")
    put(tmp_path / "m.json", {"a.wav": "one"})
    assert read_manifest(tmp_path / "m.json")[0]["text"] == "one"


def test_speakers_are_numbered_once(tmp_path):
    tone(tmp_path / "a.wav")
    put(tmp_path / "m.jsonl", "".join(json.dumps({"audio": "a.wav", "text": "x", "speaker": s}) + "\n" for s in ("anna", 0, "bo", "anna", "7")))
    speakers = {}
    assert [r["speaker"] for r in read_manifest(tmp_path / "m.jsonl", speakers)] == [1, 0, 2, 1, 7]
    assert speakers == {"0": 0, "7": 7, "anna": 1, "bo": 2}


def test_what_was_measured_once_is_taken_only_whole(tmp_path):
    tone(tmp_path / "in/a.wav")
    put(tmp_path / "in/m.jsonl", {"audio": "a.wav", "text": "x"})
    before, _ = prepared(tmp_path, "--input", tmp_path / "in/m.jsonl")
    memo = next(tmp_path.rglob("facts.json"))
    for old, new in ((b'"seconds"', b'"sekunden"'), (b'"rms": -', b'"rms": -7'), (b'[[', b'["')):
        data = memo.read_bytes()
        assert old in data
        memo.write_bytes(data.replace(old, new))
        again, _ = prepared(tmp_path, "--input", tmp_path / "in/m.jsonl", "--overwrite")
        assert again == before and json.loads(memo.read_bytes())


def test_two_names_with_one_number_become_two_speakers(tmp_path):
    """As where two data sets were prepared apart and each counted from 0."""
    tone(tmp_path / "a.wav")
    put(tmp_path / "m.jsonl", "".join(json.dumps({"audio": "a.wav", "text": "x", "speaker": s, "speaker_id": 0}) + "\n" for s in ("ann", "bob", "ann")))
    speakers = {}
    assert [r["speaker"] for r in read_manifest(tmp_path / "m.jsonl", speakers)] == [0, 1, 0] and speakers == {"ann": 0, "bob": 1}
    stored = {"bob": 5}
    assert [r["speaker"] for r in read_manifest(tmp_path / "m.jsonl", stored)] == [0, 5, 0] and stored == {"bob": 5, "ann": 0}


def test_several_manifests_in_one_run(tmp_path):
    for name in "ab":
        tone(tmp_path / f"{name}/x.wav", hertz=300 if name == "a" else 500)
        put(tmp_path / f"{name}/m.jsonl", {"audio": "x.wav", "text": f"text {name}"})
    rows, _ = prepared(tmp_path, "--input", tmp_path / "a/m.jsonl", tmp_path / "b/m.jsonl")
    assert [r["dataset_id"] for r in rows] == [0, 1] and len({r["id"] for r in rows}) == 2
    assert [r["text"] for r in read_manifest([tmp_path / "a/m.jsonl", tmp_path / "b/m.jsonl"])] == ["text a", "text b"]


def test_paths_are_tried_against_the_manifest_and_the_working_directory(tmp_path, monkeypatch):
    tone(tmp_path / "cwd/in_cwd.wav"), tone(tmp_path / "m/in_m.wav")
    manifest = put(tmp_path / "m/m.jsonl", '{"audio": "in_cwd.wav", "text": "x"}\n{"audio": "../m/in_m.wav", "text": "y"}\n')
    monkeypatch.chdir(tmp_path / "cwd")
    assert [r["audio"] for r in read_manifest(manifest)] == [str(tmp_path / "cwd/in_cwd.wav"), str(tmp_path / "m/in_m.wav")]
    tone(tmp_path / "m/in_cwd.wav")  # a copy: either will do
    assert [r["audio"] for r in read_manifest(manifest)][0] == str(tmp_path / "m/in_cwd.wav")
    tone(tmp_path / "m/in_cwd.wav", hertz=300)
    with pytest.raises(Invalid, match=r"m.jsonl line 1: .* could be .* or "):
        read_manifest(manifest)


def test_written_paths_are_relative_and_the_tree_can_move(tmp_path):
    put(tone(tmp_path / "a/in/x.wav").with_suffix(".txt"), "hello")
    prepare("--input", tmp_path / "a/in", "--output_dir", tmp_path / "a/out", "--val_split", 0)
    assert rows_of(tmp_path / "a/out/train.jsonl")[0]["audio"] == "../in/x.wav"
    (tmp_path / "a").rename(tmp_path / "b")
    assert read_manifest(tmp_path / "b/out/train.jsonl")[0]["audio"] == str(tmp_path / "b/in/x.wav")


# ------------------------------------------------------------------------------------------------ text and sound


def test_text_is_cleaned_and_the_normaliser_is_called(tmp_path, monkeypatch):
    tone(tmp_path / "a.wav")
    put(tmp_path / "m.jsonl", {"audio": "a.wav", "text": "\ufeff Cafe\u0301\tat\r\n5\x07 <|eot_id|> " + ARABIC})
    put(tmp_path / "hooks.py", "def five(text):\n    return text.replace('5', 'five')\n")
    monkeypatch.chdir(tmp_path)
    (row,), report = prepared(tmp_path, "--input", tmp_path / "m.jsonl", "--normalizer", "hooks:five")
    import unicodedata
    assert row["text"] == "Café at  five <|eot_id|> " + unicodedata.normalize("NFC", ARABIC)
    assert {n["kind"] for n in report["notices"]} == {"control characters", "special token"}


def speech(path, *parts, rate=16000):
    """Tone and silence in turn: seconds of each."""
    wave = np.concatenate([(0.3 if i % 2 == 0 else 0) * np.sin(np.arange(round(s * rate)) * 0.2) for i, s in enumerate(parts)])
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(str(path), wave, rate)
    return path


def test_trim_and_loudness_change_what_is_encoded_and_not_the_file(tmp_path, model):
    put(speech(tmp_path / "in/x.wav", 0, 1.0, 2.0, 1.5).with_suffix(".txt"), "hello there")
    before = (tmp_path / "in/x.wav").read_bytes()
    (row,), report = prepared(tmp_path, "--input", tmp_path / "in", "--trim", 0.2, "--loudness", "peak:-6", "--ckpt_dir", "any")
    assert (row["start"], row["end"], row["duration"]) == (0.8, 3.2, 2.4) and (tmp_path / "in/x.wav").read_bytes() == before
    assert report["changed"]["clips trimmed"] == 1 and report["changed"]["seconds trimmed"] == pytest.approx(2.1, abs=0.02)
    latents = ClipCache(tmp_path / "out/cache", model).get(row)["latents"]
    assert latents.numel() == 2.4 * 16000 / 80 and latents.abs().max() == pytest.approx(10 ** (-6 / 20), rel=0.02)
    report = prepared(tmp_path, "--input", tmp_path / "in")[1]
    assert [n["kind"] for n in report["notices"]] == ["silence"] and not report["changed"].get("clips trimmed")


@pytest.mark.parametrize("kind, want", [("rms:-20", -20), ("rms:0", None)])
def test_loudness_to_an_rms_level_stays_below_full_scale(tmp_path, kind, want):
    put(tone(tmp_path / "in/x.wav", level=0.1).with_suffix(".txt"), "hello")
    (row,), _ = prepared(tmp_path, "--input", tmp_path / "in", "--loudness", kind)
    rms = 20 * np.log10(0.1 / np.sqrt(2)) + row["gain_db"]
    assert rms == pytest.approx(want if want is not None else -0.1 - 3.01, abs=0.05)


def test_slice_cuts_untranscribed_recordings_into_clips(tmp_path):
    speech(tmp_path / "in/long.wav", 5, 1, 6, 2, 5)
    prepare("--input", tmp_path / "in", "--output_dir", tmp_path / "out", "--slice")
    clips = sorted((tmp_path / "out/clips").glob("*.wav"))
    assert [c.name for c in clips] == ["0001_0001.wav", "0001_0002.wav", "0001_0003.wav"]
    assert [round(soundfile.info(str(c)).duration, 1) for c in clips] == [5.5, 7.0, 5.5]  # half a second of silence at each end
    assert not (tmp_path / "out/train.jsonl").exists()
    table = tmp_path / "out/clips/clips.csv"
    table.write_text(re.sub(r"\.wav,,", ".wav,said,", table.read_text()))
    assert len(read_manifest(table)) == 3


EARS = """
import soundfile, sys
calls = []
def transcribe(path):
    calls.append(path)
    if len(calls) == 3 and interrupted:
        raise KeyboardInterrupt
    seconds = soundfile.info(path).duration
    if seconds > 8:
        raise OSError("too long for me")
    return f" it lasts {seconds:.1f}\\n" if seconds > 0.6 else "  "
interrupted = True
"""


def test_a_transcriber_hears_what_has_no_text_and_its_rows_say_so(tmp_path, monkeypatch):
    """One has a text, three have none, of which one is noise; a part of a file is heard alone; what was heard is not heard again."""
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "ears_one.py", EARS)
    for n, seconds in enumerate((1.0, 2.0, 3.0, 0.5, 9.0)):
        tone(tmp_path / f"in/{n}.wav", seconds, 300 + 50 * n)
    put(tmp_path / "rows.csv", "audio,text,start,end\nin/0.wav,said by hand,,\nin/1.wav,,,\nin/2.wav,,1.0,2.5\nin/3.wav,,,\nin/4.wav,,,\n")
    flags = ("--input", tmp_path / "rows.csv", "--output_dir", tmp_path / "out", "--val_split", 0, "--skip_bad", "--transcriber", "ears_one:transcribe")
    with pytest.raises(KeyboardInterrupt):
        prepare(*flags)
    ears = sys.modules["ears_one"]
    assert len(ears.calls) == 3 and ears.calls[0] == str(tmp_path / "in/1.wav") and not os.path.exists(ears.calls[1])
    ears.interrupted = False
    for _ in range(2):
        prepare(*flags)
    assert len(ears.calls) == 3 + 2 + 2  # the two that gave nothing are asked again
    rows = read_manifest(tmp_path / "out/train.jsonl")
    assert [(row["text"], row.get("transcriber")) for row in rows] == [
        ("said by hand", None), ("it lasts 2.0", "ears_one:transcribe"), ("it lasts 1.5", "ears_one:transcribe")]
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["totals"]["rows with a text that a machine heard"] == 2
    assert [fault["reason"] for fault in report["dropped"]] == ["ears_one:transcribe: it gave '  ', expected a text",
                                                                "ears_one:transcribe: OSError: too long for me"]
    assert "transcriber" not in manifests.for_encode(rows[1])
    os.utime(tmp_path / "ears_one.py", (1, 1))  # another model, perhaps
    prepare(*flags)
    assert len(ears.calls) == 11
    with pytest.raises(configs.Usage, match="--transcriber ears_one:hear: .*such as my_ears:transcribe"):
        prepare(*flags[:-1], "ears_one:hear")


def test_slices_go_to_the_transcriber_and_not_into_a_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "ears_two.py", EARS.replace("interrupted = True", "interrupted = False"))
    speech(tmp_path / "in/long.wav", 5, 1, 6, 2, 5)
    rows, _ = prepared(tmp_path, "--input", tmp_path / "in", "--slice", "--transcriber", "ears_two:transcribe")
    assert [(row["id"], row["text"]) for row in rows] == [("long_0001", "it lasts 5.5"), ("long_0002", "it lasts 7.0"), ("long_0003", "it lasts 5.5")]
    assert not (tmp_path / "out/clips").exists() and rows[1]["start"] == pytest.approx(5.5, abs=0.02)


def test_pieces_begin_and_end_where_they_should(tmp_path):
    how = cutting.Cutting(shortest=4, longest=15, pause=0.3, keep=0.5)
    pauses = [cutting.Span(1, 1.5), cutting.Span(6, 6.5), cutting.Span(12, 13)]
    assert cutting.pieces(cutting.Speech(0, 20, pauses), how) == [(0, 6.25), (6.25, 12.5), (12.5, 20)]
    path = speech(tmp_path / "long.wav", 40, 1, 24, rate=2000)  # longer than what is read at a time
    begin, end, found = cutting.find_speech(path, -40, 0.01, how)
    assert (begin, end) == (0, 65) and found == [(pytest.approx(40, abs=0.02), pytest.approx(41, abs=0.02))]


def test_word_times_cut_a_long_clip_with_its_text(tmp_path):
    speech(tmp_path / "in/audio/long.wav", *[0.8, 0.2] * 30)
    words = [{"word": f"w{i}", "start": float(i), "end": i + 0.8} for i in range(30)]
    put(tmp_path / "in/transcripts/long.txt", " ".join(w["word"] for w in words)), put(tmp_path / "in/alignments/long.json", {"words": words})
    rows, report = prepared(tmp_path, "--input", tmp_path / "in", "--max_seconds", 20)
    assert " ".join(r["text"] for r in rows) == " ".join(w["word"] for w in words) and len(rows) > 1
    for r in rows:
        assert r["duration"] <= 15.5 and r["start"] <= int(r["text"].split()[0][1:]) + 0.01
        assert r["end"] >= int(r["text"].split()[-1][1:]) + 0.79
    assert len({r["id"] for r in rows}) == len(rows) and report["changed"]["recordings cut"] == 1


def test_references(tmp_path):
    for n in range(6):
        put(tone(tmp_path / f"in/s{n % 2}/{n}.wav", hertz=300 + 50 * n).with_suffix(".txt"), f"text number {n}")
    flags = ("--input", tmp_path / "in", "--speaker_from_folder", "--ref")
    assert all(r["ref_audio"] == r["audio"] for r in prepared(tmp_path, *flags, "same")[0])
    rows, _ = prepared(tmp_path, *flags, "other")
    assert all(r["ref_audio"] != r["audio"] and Path(r["ref_audio"]).parent == Path(r["audio"]).parent for r in rows)
    assert all(r["ref_text"] == f"text number {Path(r['ref_audio']).stem}" for r in rows)
    assert rows == prepared(tmp_path, *flags, "other")[0]


# ------------------------------------------------------------------------------------------------ split


def fake_rows(n, speakers=1):
    return [{"id": f"{i:04d}", "audio": f"/a/{i}.wav", "text": f"text {i}", "speaker": f"s{i % speakers}"} for i in range(n)]


def test_the_split_is_seeded_stratified_and_stable():
    rows = fake_rows(400, speakers=4)
    chosen = prepare_data.split(rows, 0.1, 1)
    assert chosen == prepare_data.split(rows[::-1], 0.1, 1) != prepare_data.split(rows, 0.1, 2)
    assert [sum(r["id"] in chosen for r in rows if r["speaker"] == f"s{k}") for k in range(4)] == [10] * 4
    more = prepare_data.split(rows + [{"id": "new", "audio": "/a/new.wav", "text": "new", "speaker": "s0"}], 0.1, 1)
    assert len(chosen ^ more) <= 2


def test_a_recording_is_never_on_both_sides():
    rows = fake_rows(60)
    for i, row in enumerate(rows):
        row["audio"] = f"/a/{i // 3}.wav"  # three cuts of one file
        row["text"] = f"text {i % 20}" if i < 30 else row["text"]  # and some texts twice
        row["facts"] = {"sha": "same" if i in (40, 55) else str(row["audio"])}
    chosen = prepare_data.split(rows, 0.3, 7)
    assert 5 < len(chosen) <= 18
    for key in (lambda r: r["audio"], lambda r: r["text"], lambda r: r["facts"]["sha"]):
        assert not {key(r) for r in rows if r["id"] in chosen} & {key(r) for r in rows if r["id"] not in chosen}


def test_copies_under_other_names_stay_together():
    rows = [{**row, "facts": {"sha": str(i // 2)}} for i, row in enumerate(fake_rows(40))]
    chosen = prepare_data.split(rows, 0.4, 3)
    assert len(chosen) == 16 and all((a["id"] in chosen) == (b["id"] in chosen) for a, b in zip(rows[::2], rows[1::2]))


def test_a_small_set_still_has_a_validation_row_and_one_recording_has_none():
    assert len(prepare_data.split(fake_rows(3), 0.1, 1)) == 1
    assert len(prepare_data.split(fake_rows(1), 0.5, 1)) == 0 == len(prepare_data.split(fake_rows(9), 0.0, 1))


# ------------------------------------------------------------------------------------------------ cache


@pytest.fixture
def clips(tmp_path):
    """A manifest of twelve clips of unequal length."""
    return put(tmp_path / "m.jsonl", "".join(
        json.dumps({"audio": str(tone(tmp_path / f"wav/{n}.wav", 0.5 + 0.1 * n, 200 + 20 * n)), "text": f"number {n}"}) + "\n" for n in range(12)))


def same(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def test_the_cache_returns_what_encode_makes(tmp_path, clips):
    model, rows = Model(), read_manifest(clips)
    cache = ClipCache(tmp_path / "c", model)
    assert cache.missing(rows) == list(range(12))
    with pytest.raises(Invalid, match="prepare_data"):
        cache.get(rows[0])
    cache.add(rows, say=lambda *_: None)
    assert (model.codec_calls, model.encode_calls, cache.missing(rows)) == (12, 12, [])
    again = ClipCache(tmp_path / "c", model)
    for row in rows:
        assert same(again.get(row), model.encode(row))
    again.add(rows)
    assert model.codec_calls == 24 and model.encode_calls == 24  # only by the comparison above


@pytest.mark.parametrize("at", [5, 14])  # 12 clips have a tensor each, then 12 rows three
def test_a_signal_in_the_middle_of_a_record_leaves_no_half_of_it(tmp_path, clips, monkeypatch, at):
    model, rows, calls = Model(), read_manifest(clips), []

    def interrupted(flat):
        calls.extend([flat] * (threading.current_thread() is threading.main_thread()))  # the others check what they read
        if len(calls) == at:
            raise KeyboardInterrupt
        return hash_of(flat)

    hash_of = cache_part.hash_of
    monkeypatch.setattr(cache_part, "hash_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ClipCache(tmp_path / "c", model).add(rows, say=lambda *_: None)
    monkeypatch.undo()
    cache = ClipCache(tmp_path / "c", model)
    cache.add(rows, say=lambda *_: None)
    assert cache.missing(rows) == [] and all(same(cache.get(r), Model().encode(r)) for r in rows)


def test_a_gain_that_overflows_is_refused(tmp_path, clips):
    rows = read_manifest(clips)
    with pytest.raises(Invalid, match="gain_db 800.0 makes it louder than a number can be"):
        ClipCache(tmp_path / "c", Model()).add([{**rows[0], "gain_db": 800.0}], say=lambda *_: None)


def test_a_shard_whose_records_changed_is_not_taken(tmp_path, clips):
    model, rows = Model(), read_manifest(clips)
    ClipCache(tmp_path / "c", model).add(rows, say=lambda *_: None)
    for shard in (tmp_path / "c").glob("*.safetensors"):
        data = shard.read_bytes()
        shard.write_bytes(data.replace(b"latents", b"lavents"))
        if shard.read_bytes() != data:
            break
    else:
        raise AssertionError("no record names latents")
    cache = ClipCache(tmp_path / "c", model)
    assert cache.bad == [shard] and cache.missing(rows)


def test_only_what_changed_is_encoded_again(tmp_path, clips):
    model, rows = Model(), read_manifest(clips)
    ClipCache(tmp_path / "c", model).add(rows, say=lambda *_: None)
    counts = []
    for change in ({"text": "mended"}, {"text": "mended", "start": 0.1}, {"text": "mended", "start": 0.1, "gain_db": -3.0},
                   {"text": "mended", "start": 0.1, "gain_db": -3.0, "duration": 9.0, "id": "other"},
                   {"text": "mended", "speaker": 3}, {"text": "mended", "ref_audio": rows[5]["audio"]}):
        before = model.codec_calls, model.encode_calls
        cache = ClipCache(tmp_path / "c", model)
        cache.add([{**rows[3], **change}, *rows], say=lambda *_: None)
        counts.append((model.codec_calls - before[0], model.encode_calls - before[1]))
    assert counts == [(0, 1), (1, 1), (1, 1), (0, 0), (0, 1), (1, 1)] or counts == [(0, 1), (1, 1), (1, 1), (0, 0), (0, 1), (0, 1)]
    tone(rows[3]["audio"], 0.9, 999)  # other bytes under the same name
    before = model.codec_calls, model.encode_calls
    cache = ClipCache(tmp_path / "c", model)
    assert cache.missing(rows) == [3]
    cache.add(rows, say=lambda *_: None)
    assert (model.codec_calls - before[0], model.encode_calls - before[1]) == (1, 1)
    os.utime(rows[4]["audio"], (1, 1))  # touched, not changed
    assert ClipCache(tmp_path / "c", model).missing(rows) == []


def test_another_codec_or_tokenizer_asks_for_its_own_examples(tmp_path, clips):
    model, rows = Model(), read_manifest(clips)
    ClipCache(tmp_path / "c", model).add(rows, say=lambda *_: None)
    model.encode_key = "rest 2"
    cache = ClipCache(tmp_path / "c", model)
    cache.add(rows, say=lambda *_: None)
    assert (model.codec_calls, model.encode_calls) == (12, 24)
    model.codec_key = "codec 2"
    ClipCache(tmp_path / "c", model).add(rows, say=lambda *_: None)
    assert (model.codec_calls, model.encode_calls) == (24, 36)
    model.codec_key, model.encode_key = "codec 1", "rest 1"
    assert ClipCache(tmp_path / "c", model).missing(rows) == []


def test_turns_messages_and_dictionaries_of_codes(tmp_path):
    class Talker(Model):
        def encode_audio(self, source, start=None, end=None):
            return {"a": super().encode_audio(source, start, end), "b": torch.tensor([1.5])}

        def encode(self, row):
            sounds = [h["audio"] for h in prepare_data.holders(row) if "audio" in h]
            assert all(s.keys() == {"a", "b"} for s in sounds)
            return {"n": torch.tensor([len(s["a"]) for s in sounds])}

    tone(tmp_path / "a.wav", 1), tone(tmp_path / "b.wav", 2)
    tone(tmp_path / "reference_audio.wav", 1), tone(tmp_path / "target_audio.wav", 3)
    put(tmp_path / "m.jsonl", json.dumps({"turns": [{"text": "x", "audio": "a.wav"}, {"text": "y", "audio": "b.wav", "speaker": 1}]}) + "\n"
        + json.dumps(CHATML) + "\n")
    rows, cache = read_manifest(tmp_path / "m.jsonl"), ClipCache(tmp_path / "c", Talker())
    cache.add(rows, say=lambda *_: None)
    assert cache.get(rows[0])["n"].tolist() == [25, 50]
    assert cache.get(rows[1])["n"].tolist() == [75, 25, 75]  # the row's own, the reference and the answer
    assert cache.model.codec_calls == 3  # one of them has the bytes of another


EARLIER_KEYS = {  # of examples, as the first caches have them: a change would throw every cache away
    "54d1ce9fccacec3e1715a444a7632a12": {"audio": "a.wav", "text": "hello"},
    "538564433e407f1cbe8583ec0ab02c97": {"audio": "a.wav", "text": "hello", "start": 0.5, "end": 1.25, "gain_db": -3.5},
    "18c16731e39435ed56b75271018af01b": {"audio": "a.wav", "text": "hello", "speaker": "ann"},
    "3ac37ef27991c66ac64427aa4bcbdb27": {"audio": "a.wav", "text": "hello", "speaker": "ann", "speaker_id": 4},
    "7ef6a9fa734d9621940f98a7c502ff3f": {"audio": "a.wav", "text": "hello", "ref_audio": "b.wav", "ref_text": "said before"},
    "4d8925022b217d9baec48967f8fdb161": {"audio": "a.wav", "text": "hello", "emotion": "b.wav"},
    "a3c3ccd0d220cbf706cef1588679a6a5": {"audio": "a.wav", "text": "hello", "emotion": [0, 0, 1, 0, 0, 0, 0, 0.5]},
    "20511023e5cd8dc16af611dd886033fd": {"turns": [
        {"text": "hello", "audio": "a.wav", "speaker": "ann", "speaker_id": 1, "role": "user", "start": 0.1, "end": 0.9,
         "gain_db": 2, "id": "t", "duration": 1.0, "ref_audio": "b.wav", "emotion": "b.wav", "style": "no key of a row"},
        {"text": "only text", "speaker": 0},
        {"text": "good day", "audio": "b.wav", "spk": "bob", "train": False}]},
    "277cac58125aa1aa12407746fb20d041": {"start": 0.25, "end": 2, "messages": [
        {"role": "system", "content": "Speak."},
        {"role": "user", "content": [{"type": "text", "text": "before"}, {"type": "audio", "audio_url": "b.wav"},
                                     {"type": "text", "text": "say it"}]},
        {"role": "assistant", "train": True, "content": [{"type": "text", "text": "it"}, {"type": "audio", "audio": "a.wav"}]}]},
}
EARLIER_SOUND_KEYS = ["2e802699d0e04520d42bedea22ae48f5", "ad85d287fe1d90c861c2302dd5546ccb"]  # of the first two rows


def test_keys_of_earlier_caches_are_found(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.wav").write_bytes(b"the bytes of " + name.encode())
    labels = {"id": "x", "duration": 2.0, "sample_rate": 16000, "dataset_id": 3}  # they are no part of a key
    put(tmp_path / "m.jsonl", "".join(json.dumps(row) + "\n" for row in EARLIER_KEYS.values())
        + json.dumps({"audio_path": "a.wav", "transcription": "hello", **labels}))
    cache, rows = ClipCache(tmp_path / "c", Model()), read_manifest(tmp_path / "m.jsonl")
    plans = [cache._plan(row) for row in rows]
    assert [plan.key for plan in plans] == [*EARLIER_KEYS, next(iter(EARLIER_KEYS))]
    assert [list(plan.sounds) for plan in plans[:2]] == [[key] for key in EARLIER_SOUND_KEYS]


def test_a_key_that_is_added_to_the_list_reaches_encode(tmp_path, model, monkeypatch):
    monkeypatch.setitem(manifests.KEYS, "style", ("style", "mood"))
    rows = []
    monkeypatch.setattr(model, "encode", lambda row: rows.append(row) or {"text": torch.zeros(1), "latents": torch.zeros(1)})
    tone(tmp_path / "a.wav"), tone(tmp_path / "b.wav", 2)
    put(tmp_path / "m.jsonl", json.dumps({"audio": "a.wav", "text": "one", "mood": "glad"}) + "\n" + json.dumps({"style": "of all", "turns": [
        {"text": "two", "audio": "a.wav", "mood": "sad"}, {"text": "three", "audio": "b.wav"}]}) + "\n"
        + json.dumps({"style": "of all", "messages": [
            {"role": "0", "mood": "sad", "content": [{"type": "text", "text": "hi"}, {"type": "audio", "audio": "a.wav"}]},
            {"role": "1", "content": [{"type": "text", "text": "ho"}, {"type": "audio", "audio": "b.wav"}]}]}) + "\n")
    written, _ = prepared(tmp_path, "--input", tmp_path / "m.jsonl", "--ckpt_dir", "any")
    for single, *talks in (written, rows):
        assert single["style"] == "glad" and [talk["style"] for talk in talks] == ["of all"] * 2
        assert [[turn.get("style") for turn in talk["turns"]] for talk in talks] == [["sad", None]] * 2
    cache = ClipCache(tmp_path / "out/cache", model)
    assert cache.missing(written) == []
    written[0]["style"] = written[1]["turns"][1]["style"] = "angry"
    assert cache.missing(written) == [0, 1]
    prepare("--input", tmp_path / "m.jsonl", "--output_dir", tmp_path / "check", "--ckpt_dir", "any", "--check")
    assert rows[-1].get("style") in ("glad", "of all")  # the row by which --check estimates


@pytest.mark.parametrize("harm", ["flip", "cut", "header", "empty", "lost"])
def test_a_damaged_shard_is_noticed_and_encoded_again(tmp_path, clips, harm):
    model, rows = Model(), read_manifest(clips)
    ClipCache(tmp_path / "c", model).add(rows, say=lambda *_: None)
    shard = max((tmp_path / "c").glob("*.safetensors"), key=lambda p: p.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[-9 if harm == "flip" else 20] ^= 0x10
    shard.write_bytes(data if harm in ("flip", "header") else data[: len(data) // 2 if harm == "cut" else 0])
    if harm == "lost":
        shard.unlink()
    said = []
    cache = ClipCache(tmp_path / "c", model)
    assert cache.missing(rows)
    cache.add(rows, say=said.append)
    assert harm == "lost" or "damaged" in said[0]
    cache = ClipCache(tmp_path / "c", model)
    assert cache.missing(rows) == [] and all(same(cache.get(r), Model().encode(r)) for r in rows)


def test_damage_behind_our_back_stops_the_read(tmp_path, clips):
    model, rows = Model(), read_manifest(clips)
    ClipCache(tmp_path / "c", model).add(rows, say=lambda *_: None)
    shard = max((tmp_path / "c").glob("*.safetensors"), key=lambda p: p.stat().st_size)
    stat, data = shard.stat(), bytearray(shard.read_bytes())
    data[-9] ^= 1
    shard.write_bytes(data)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # size and time say that nothing happened
    cache = ClipCache(tmp_path / "c", model)
    assert cache.missing(rows) == []
    with pytest.raises(Invalid, match="damaged"):
        for row in rows:
            cache.get(row)
    assert ClipCache(tmp_path / "c", model).missing(rows)  # the next start looks at every byte


def test_threads_encode_what_one_thread_encodes(tmp_path, clips):
    rows, before = read_manifest(clips), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        cache = ClipCache(tmp_path / "c", Model())
        cache.add(rows, say=lambda *_: None)
        assert torch.get_num_threads() == 3 and all(same(cache.get(r), Model().encode(r)) for r in rows)
    finally:
        torch.set_num_threads(before)


def test_rows_that_fail_are_named_and_the_others_are_kept(tmp_path, clips):
    class Picky(Model):
        def encode(self, row):
            if "7" in row["text"]:
                raise Invalid("I do not like 7")
            return super().encode(row)

    rows, cache = read_manifest(clips), ClipCache(tmp_path / "c", Picky())
    with pytest.raises(Invalid, match="^7: I do not like 7$"):
        cache.add(rows, say=lambda *_: None)
    assert cache.missing(rows) == [7]


def encode_and_tell(folder, clips, pipe):
    """Each record is a shard of its own, and each clip that is encoded a byte in the pipe."""
    class Telling(Model):
        def encode_audio(self, *source):
            os.write(pipe, b".")
            return super().encode_audio(*source)

    cache_part.SHARD_SECONDS = -1
    ClipCache(folder, Telling()).add(read_manifest(clips), lambda *_: None)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the process to be killed is forked")
def test_killed_at_random_moments_it_goes_on_where_it_was(tmp_path, clips):
    kills = int(os.environ.get("KILLS", 4))
    rows, random, counts = read_manifest(clips), np.random.default_rng(0), []
    for _ in range(kills):
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            encode_and_tell(tmp_path / "c", clips, writer)
            os._exit(0)
        os.close(writer)
        for _ in range(random.integers(0, 4)):
            os.read(reader, 1)  # nothing more comes when the child has ended
        os.close(reader)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        cache = ClipCache(tmp_path / "c", Model())
        there = [i for i in range(12) if i not in cache.missing(rows)]
        assert all(same(cache.get(rows[i]), Model().encode(rows[i])) for i in there)
        counts.append(sum(len(r) == 1 and "" in r for r in cache.records.values()))
    assert counts == sorted(counts)  # nothing that was there is lost
    model = Model()
    cache = ClipCache(tmp_path / "c", model)
    cache.add(rows, say=lambda *_: None)
    assert all(same(cache.get(r), Model().encode(r)) for r in rows) and model.codec_calls == 12 - counts[-1]


def telling_model():
    """A hook: the model of the script says what it does, and each record is a shard of its own."""
    class Telling(Model):
        def encode_audio(self, *source):
            print("encoding a clip", file=sys.stderr, flush=True)
            return super().encode_audio(*source)

        def encode(self, row):
            print("encoding a row", file=sys.stderr, flush=True)
            return super().encode(row)

    cache_part.SHARD_SECONDS = -1
    prepare_data.models.load = lambda path, device, extra: Telling()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the process to be killed is forked")
def test_the_whole_script_killed_at_random_moments_ends_as_if_it_never_was(tmp_path, clips):
    random, command = np.random.default_rng(1), ["--input", clips, "--ckpt_dir", "any", "--output_dir"]

    def wanted(out):
        return {p.name: p.read_bytes() for p in Path(out).iterdir() if p.suffix == ".jsonl"}

    whole = running.start("prepare_data", [*command, "whole"], tmp_path, hook=telling_model)
    assert whole.wait() == 0, whole.said
    met, number, least = [], 0, 0
    for _ in range(int(os.environ.get("KILLS", 4))):
        run = running.start("prepare_data", [*command, f"out{number}"], tmp_path, hook=telling_model)
        moment = random.uniform(0, len(whole.said))  # what a script has said tells how far it is
        run.until(lambda run: len(run.said) >= moment)
        if run.process.exitcode is None:
            os.kill(run.pid, signal.SIGKILL)
        assert run.wait() in (0, -9), run.said
        out = tmp_path / f"out{number}"
        there = wanted(out) if out.is_dir() else {}
        assert all(text == wanted(tmp_path / "whole")[name] for name, text in there.items())  # whole, or not there
        cache = ClipCache(out / "cache", Model())
        assert not cache.bad and len(cache.records) >= least  # nothing that was there is lost
        for row in (row for name in there for row in read_manifest(out / name)):
            assert cache.missing([row]) or same(cache.get(row), Model().encode(row))
        met.append((number, len(there), len(cache.records)))
        number, least = (number + 1, 0) if len(cache.records) == 24 else (number, len(cache.records))
    print(f"folder, manifests and records of the cache after each kill: {met}")
    for out in {f"out{n}" for n, *_ in met}:
        last = running.start("prepare_data", [*command, out], tmp_path, hook=telling_model)
        assert last.wait() == 0, last.said
        rows = read_manifest([tmp_path / out / "train.jsonl", tmp_path / out / "val.jsonl"])
        cache = ClipCache(tmp_path / out / "cache", Model())
        assert wanted(tmp_path / out) == wanted(tmp_path / "whole") and len(rows) == 12 and cache.missing(rows) == []
        assert all(same(cache.get(row), Model().encode(row)) for row in rows)
        assert json.loads((tmp_path / out / "report.json").read_text())["checkpoints"]


class Batches(Model):
    """A stand-in whose codec takes several clips; it knows which sizes of batch it was given."""

    codec = torch.nn.Linear(1, 1)

    def __init__(self):
        super().__init__()
        self.sizes = []

    def encode_audio_batch(self, waves):
        self.sizes.append([len(w) / self.sample_rate for w in waves])
        if any(len(w) == 16000 for w in waves):
            raise Invalid("not one second, please")
        return [super(Batches, self).encode_audio(w) for w in waves]

    def encode_audio(self, source, start=None, end=None):
        wave = source if torch.is_tensor(source) else audio.read(source, self.sample_rate, start, end)[0]
        return self.encode_audio_batch([wave])[0]


def test_clips_of_similar_length_share_a_pass(tmp_path, clips, monkeypatch):
    monkeypatch.setitem(cache_part.BATCH_SECONDS, "cpu", 4)
    rows = [{**r, "gain_db": -6.0} if i == 11 else r for i, r in enumerate(read_manifest(clips))]  # 0.5, 0.6 ... 1.6 s
    cache = ClipCache(tmp_path / "c", Batches())
    with pytest.raises(Invalid, match="^5: not one second, please$"):
        cache.add(rows, say=lambda *_: None)
    assert cache.missing(rows) == [5]
    one_by_one = ClipCache(tmp_path / "d", Model())
    one_by_one.add(rows, say=lambda *_: None)
    assert all(same(cache.get(r), one_by_one.get(r)) for i, r in enumerate(rows) if i != 5)
    assert cache.model.sizes == [[1.6, 1.5], [1.4, 1.3], [1.2, 1.1, 1.0], [1.2], [1.1], [1.0], [0.9, 0.8, 0.7, 0.6], [0.5]]
    monkeypatch.setitem(cache_part.BATCH_SECONDS, "cpu", 0)
    alone = ClipCache(tmp_path / "e", Batches())
    with pytest.raises(Invalid):
        alone.add(rows, say=lambda *_: None)
    assert {len(s) for s in alone.model.sizes} == {1}


def test_one_changed_row_of_a_thousand_is_one_encode_call(tmp_path):
    tone(tmp_path / "a.wav")
    rows = [{"id": str(n), "audio": str(tmp_path / "a.wav"), "text": f"row {n}"} for n in range(1000)]
    model = Model()
    ClipCache(tmp_path / "c", model).add(rows, say=lambda *_: None)
    assert (model.codec_calls, model.encode_calls) == (1, 1000)
    rows[500]["text"] = "mended"
    shards = len(list((tmp_path / "c").glob("*.safetensors")))
    ClipCache(tmp_path / "c", model).add(rows, say=lambda *_: None)
    assert (model.codec_calls, model.encode_calls) == (1, 1001)
    assert len(list((tmp_path / "c").glob("*.safetensors"))) == shards + 1


# ------------------------------------------------------------------------------------------------ the whole script


@pytest.mark.skipif(not LJ.is_dir(), reason="the real recordings are not here")
def test_real_speech_is_clean(tmp_path, model, capsys):
    prepare("--input", LJ, "--output_dir", tmp_path / "out", "--ckpt_dir", "any")
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert (report["dropped"], report["notices"]) == ([], [])
    assert report["totals"]["train rows"] == 22 and report["totals"]["val rows"] == 2 and report["totals"]["hours"] == pytest.approx(0.0456, abs=1e-3)
    about = report["checkpoints"][0]
    assert about["unknown characters"] == {} and about["hours kept"] == report["totals"]["hours"] and about["steps per epoch"] == 2
    assert about["clips with a lower sample rate"] == 0 and report["sample rates"] == {"22050": 24}
    assert "22 rows" in capsys.readouterr().err
    before = model.codec_calls
    prepare("--input", LJ, "--output_dir", tmp_path / "out", "--ckpt_dir", "any")
    assert model.codec_calls == before
    rows = read_manifest([tmp_path / "out/train.jsonl", tmp_path / "out/val.jsonl"])
    assert ClipCache(tmp_path / "out/cache", model).missing(rows) == []


def test_unknown_characters_and_long_rows_are_reported(tmp_path, model):
    model.alphabet = set("abcdefghijklmnopqrstuvwxyz ")
    for n, text in enumerate(["abc def", "abc ü def ü", "xyz"]):
        put(tone(tmp_path / f"in/{n}.wav", 1 + n, 300 + 50 * n).with_suffix(".txt"), text)
    flags = ("--input", tmp_path / "in", "--ckpt_dir", "any", "--batch_size", 2, "--max_batch_tokens", 70)
    for check in ((), ("--check", "--output_dir", tmp_path / "check")):
        out = tmp_path / ("check" if check else "out")
        prepare("--output_dir", out, *flags, *check[:1])
        report = json.loads((out / "report.json").read_text())
        about = report["checkpoints"][0]
        assert about["unknown characters"] == {"ü": 2} and about["rows dropped by max_batch_tokens"] == 2
        assert [(n["id"], n["kind"]) for n in report["notices"]] == [("1", "unknown tokens"), ("1", "too many tokens"), ("2", "too many tokens")]
        assert about["positions"] == pytest.approx(7 + 11 + 3 + 25 * 6, abs=3)
    assert sorted(p.name for p in (tmp_path / "check").iterdir()) == ["report.html", "report.json"]


def test_channels_that_are_swapped_change_nothing_and_those_that_cancel_are_told(tmp_path):
    """Several channels are averaged: the order is no fault, and the report has their number; opposite phases are silence."""
    left, right = np.random.default_rng(0).uniform(-0.3, 0.3, (2, 16000))
    for name, channels in (("a", (left, right)), ("b", (right, left)), ("c", (left, -left))):
        soundfile.write(str(tmp_path / f"{name}.wav"), np.stack(channels, 1), 16000)
        put(tmp_path / f"{name}.txt", f"text {name}")
    assert torch.equal(audio.read(tmp_path / "a.wav", None)[0], audio.read(tmp_path / "b.wav", None)[0])
    flags = ("--input", tmp_path, "--output_dir", tmp_path / "out", "--val_split", 0, "--skip_bad")
    prepare(*flags)
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["channels"] == {"2": 2} and [(Path(f["file"]).name, f["reason"][:7]) for f in report["dropped"]] == [("c.wav", "silence")]


def test_each_speaker_can_be_heard_under_the_name_that_its_rows_give(tmp_path):
    """Which voice a name belongs to no number tells: swapped names are another naming. So the report lets one listen."""
    for n, name in enumerate(("anna", "ben", "anna", "ben")):
        put(tone(tmp_path / f"in/{name}/{n}.wav", 1, 200 + 300 * (name == "ben") + n).with_suffix(".txt"), f"text {n}")
    prepare("--input", tmp_path / "in", "--output_dir", tmp_path / "out", "--speaker_from_folder")
    section = (tmp_path / "out/report.html").read_text().split("<h2>Speakers</h2>")[1].split("<h2>")[0]
    pitches = []
    for name, sound in re.findall(r"<td >(anna|ben)</td>.*?base64,([^\"]+)", section):
        wave, rate = soundfile.read(io.BytesIO(base64.b64decode(sound)))
        pitches.append((name, round(np.abs(np.fft.rfft(wave)).argmax() * rate / len(wave), -2)))
    assert pitches == [("anna", 200), ("ben", 500)]


def test_scripts_that_the_tokenizer_spells_in_bytes_are_told(tmp_path, model, monkeypatch):
    texts = ["abc def", "ghi ABC", ARABIC, "123"]
    for n, text in enumerate(texts):
        put(tone(tmp_path / f"in/{n}.wav", 1, 300 + 50 * n).with_suffix(".txt"), text)
    monkeypatch.setattr(Model, "encode_text", lambda self, text, speaker=None: list(text.encode()))
    prepare("--input", tmp_path / "in", "--output_dir", tmp_path / "out", "--ckpt_dir", "any", "--check")
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["checkpoints"][0]["tokens per character"] == {"ARABIC": round(len(ARABIC.encode()) / len(ARABIC), 3), "LATIN": 1.0, "no letters": 1.0}
    assert [(n["id"], n["what"]) for n in report["notices"] if n["kind"] == "foreign script"] == [
        ("2", "1.9 tokens per character of ARABIC text: the tokenizer has hardly met it")]
    assert [prepare_data.script_of(text) for text in ("漢字かな漢", "ひらがな漢", "Ünï", "Привет you")] == ["CJK", "HIRAGANA", "LATIN", "CYRILLIC"]


def test_its_own_manifests_are_encoded_as_they_are(tmp_path, model):
    for n in range(5):
        put(tone(tmp_path / f"in/{n}.wav", hertz=300 + 50 * n).with_suffix(".txt"), f"text number {n}")
    prepare("--input", tmp_path / "in", "--output_dir", tmp_path / "out", "--val_split", 0.4)
    manifests = [tmp_path / "out/train.jsonl", tmp_path / "out/val.jsonl"]
    before = [m.read_bytes() for m in manifests]
    prepare("--input", *manifests, "--output_dir", tmp_path / "out", "--ckpt_dir", "any")
    assert [m.read_bytes() for m in manifests] == before and model.encode_calls == 5
    assert ClipCache(tmp_path / "out/cache", model).missing(read_manifest(manifests)) == []
    with pytest.raises(configs.Usage):
        prepare("--input", manifests[0], "--output_dir", tmp_path / "out", "--trim", 0)


def test_other_manifests_are_encoded_as_they_are_when_asked(tmp_path, model):
    tone(tmp_path / "a.wav"), put(tmp_path / "mine.jsonl", {"audio": "a.wav", "text": " not  cleaned ", "speaker": "anna"})
    prepare("--input", tmp_path / "mine.jsonl", "--output_dir", tmp_path, "--ckpt_dir", "any", "--encode_only")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.wav", "cache", "mine.jsonl", "report.html", "report.json"]
    assert ClipCache(tmp_path / "cache", model).missing(read_manifest(tmp_path / "mine.jsonl")) == []


def test_named_speakers_keep_their_number_when_others_come(tmp_path, model):
    for who in ("anna", "bo"):
        put(tone(tmp_path / f"in/{who}/1.wav", hertz=300 + len(who)).with_suffix(".txt"), f"I am {who}")
    flags = ("--input", tmp_path / "in", "--speaker_from_folder", "--ckpt_dir", "any")
    rows, report = prepared(tmp_path, *flags)
    assert [(r["speaker"], r["speaker_id"]) for r in rows] == [("anna", 0), ("bo", 1)]
    put(tone(tmp_path / "in/aa/1.wav", hertz=700).with_suffix(".txt"), "I am the first in the list")
    rows, report = prepared(tmp_path, *flags)
    assert {name: s["number"] for name, s in report["speakers"].items()} == {"anna": 0, "bo": 1, "aa": 2} and model.encode_calls == 3
    speakers = {}
    assert [r["speaker"] for r in read_manifest(tmp_path / "out/train.jsonl", speakers)] == [2, 0, 1]
    assert speakers == {"aa": 2, "anna": 0, "bo": 1}
    cache = ClipCache(tmp_path / "out/cache", model)
    assert cache.missing(read_manifest(tmp_path / "out/train.jsonl")) == [] == cache.missing(read_manifest(tmp_path / "out/train.jsonl", {}))


def test_one_command_prepares_for_several_checkpoints(tmp_path, monkeypatch):
    loaded = []

    def load(path, device, extra):
        loaded.append(Model())
        loaded[-1].encode_key = f"rest of {path}"
        return loaded[-1]

    monkeypatch.setattr(prepare_data.models, "load", load)
    for n in range(3):
        put(tone(tmp_path / f"in/{n}.wav", hertz=300 + 50 * n).with_suffix(".txt"), f"text number {n}")
    rows, report = prepared(tmp_path, "--input", tmp_path / "in", "--ckpt_dir", "one", "two")
    assert [(m.codec_calls, m.encode_calls) for m in loaded] == [(3, 3), (0, 3)]  # one codec, two tokenizers
    assert [c["checkpoint"] for c in report["checkpoints"]] == ["one", "two"]
    assert all(ClipCache(tmp_path / "out/cache", m).missing(rows) == [] for m in loaded)


def test_emotion_is_carried_and_part_of_the_key(tmp_path, model):
    tone(tmp_path / "a.wav"), tone(tmp_path / "sad.wav", 1, 200)
    put(tmp_path / "m.jsonl", "".join(json.dumps({"audio": "a.wav", "text": "x y z", "emotion": e}) + "\n" for e in (
        "sad.wav", [0, 0, 1, 0, 0, 0, 0, 0.5])))
    rows, _ = prepared(tmp_path, "--input", tmp_path / "m.jsonl", "--ckpt_dir", "any")
    assert rows[0]["emotion"] == str(tmp_path / "sad.wav") and rows[1]["emotion"][2] == 1 and model.encode_calls == 2
    tone(tmp_path / "sad.wav", 1, 250)
    assert ClipCache(tmp_path / "out/cache", model).missing(rows) == [0]


def test_several_processes_find_what_one_finds(tmp_path):
    put(tmp_path / "m.jsonl", "".join(json.dumps({"audio": str(tone(tmp_path / f"wav/{n}.wav", 0.4, 200 + n)), "text": f"text of row {n}"})
                                      + "\n" for n in range(220)))
    rows = [prepared(tmp_path / str(workers), "--input", tmp_path / "m.jsonl", "--workers", workers)[0] for workers in (1, 2)]
    assert len(rows[0]) == 220 and rows[0] == rows[1]


def test_a_mended_transcript_is_taken_in_by_the_same_command(tmp_path, model):
    for n in range(5):
        put(tone(tmp_path / f"in/{n}.wav", hertz=300 + 50 * n).with_suffix(".txt"), f"text number {n}")
    for _ in range(2):
        prepare("--input", tmp_path / "in", "--output_dir", tmp_path / "out", "--ckpt_dir", "any")
    put(tmp_path / "in/2.txt", "mended text")
    prepare("--input", tmp_path / "in", "--output_dir", tmp_path / "out", "--ckpt_dir", "any")
    assert (model.codec_calls, model.encode_calls) == (5, 6)
    assert "mended text" in {r["text"] for r in rows_of(tmp_path / "out/train.jsonl") + rows_of(tmp_path / "out/val.jsonl")}
