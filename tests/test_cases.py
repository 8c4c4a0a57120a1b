"""Kinds of input that people brought to tools like this one: data sets of the layouts that corpora have, and rows that used to
lose their sound, their text or their speaker without a word. Each is made here, small, and its right reading is written beside it."""
import importlib
import io
import json
import os
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import save_file

import configs
import infer
import models
import prepare_data
import train
import validate
from models.parts import Invalid, adapters, checkpoint, clips as measuring, corpora, listen
from models.parts.manifests import read_manifest, read_rows
from models.parts.plain import as_record
from prepare_data import ClipCache
from tests.test_prepare import Model, model, prepare, prepared, put, rows_of, tone  # noqa: F401


def said(rows, *keys):
    return [tuple(row.get(key) for key in keys) for row in rows]


def lines_of(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# ------------------------------------------------------------------------------------------------ keys


@pytest.mark.parametrize("row, span", [({"offset": 1.0, "duration": 1.5}, (1, 2.5)), ({"offset": 0.0, "duration": 2.0}, (0, 2)), ({"offset": "0.5"}, (0.5, None)),
                                       ({"start_time": 1, "end_time": 2}, (1, 2)), ({"offset": 1, "duration": 9, "end": 2}, (1, 2)), ({"duration": 3.0}, (None, None))])
def test_a_part_of_a_recording_is_that_part(tmp_path, row, span):
    tone(tmp_path / "long.wav", 3)
    put(tmp_path / "m.jsonl", lines_of({"audio_filepath": "long.wav", "text": "one", **row}))
    found = read_manifest(tmp_path / "m.jsonl") + prepared(tmp_path, "--input", tmp_path / "m.jsonl")[0]
    assert said(found, "start", "end") == [span] * 2


def test_the_same_part_within_a_turn(tmp_path):
    tone(tmp_path / "long.wav", 3)
    put(tmp_path / "m.jsonl", lines_of({"turns": [{"audio": "long.wav", "text": "a", "offset": 1, "duration": 1}]}))
    assert said(read_manifest(tmp_path / "m.jsonl")[0]["turns"], "start", "end") == [(1, 2)]


@pytest.mark.parametrize("key, value", [("start_ms", 500), ("end_sample", 16000), ("frame_offset", 1), ("channel", 1)])
def test_a_key_that_chooses_the_sound_is_refused_where_it_cannot_be_followed(tmp_path, key, value):
    soundfile.write(tmp_path / "two.wav", np.random.default_rng(0).normal(0, 0.1, (16000, 2)), 16000)
    row = {"audio": "two.wav", "text": "x", key: value}
    for one in (row, {"turns": [row]}):
        with pytest.raises(Invalid, match=rf"m.jsonl line 1: {key} is {value}"):
            read_manifest(put(tmp_path / "m.jsonl", lines_of(one)))
    tone(tmp_path / "one.wav")
    assert read_manifest(put(tmp_path / "m.jsonl", lines_of({"audio": "one.wav", "text": "x", "channel": 0})))


def test_keys_that_nobody_reads_are_said_once(tmp_path, capsys):
    for n in range(3):
        tone(tmp_path / f"{n}.wav")
    put(tmp_path / "m.jsonl", lines_of(*({"audio": f"{n}.wav", "text": f"t {n}", "mood": "glad", **({"snr": 3} if n else {})} for n in range(3))))
    _, report = prepared(tmp_path, "--input", tmp_path / "m.jsonl")
    assert report["inputs"][0]["unread"] == {"mood": 3, "snr": 2}
    assert capsys.readouterr().err.count("nobody reads 'mood' (3 rows), 'snr' (2 rows)") == 1
    assert "mood" in (tmp_path / "out/report.html").read_text()
    read_manifest(tmp_path / "m.jsonl", {})  # as train.py does
    assert "nobody reads 'mood' (3 rows)" in capsys.readouterr().err
    read_manifest(tmp_path / "out/train.jsonl")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("header, cell", [("audio_file|text|speaker_name", "a.wav|x|anna"), ("client_id\tpath\tsentence", "anna\ta.wav\tx")])
def test_speakers_by_the_names_that_tables_have(tmp_path, header, cell):
    tone(tmp_path / "a.wav")
    assert said(read_manifest(put(tmp_path / "t.csv", f"{header}\n{cell}\n")), "speaker") == [("anna",)]


# ------------------------------------------------------------------------------------------------ texts


@pytest.mark.parametrize("cell, text", [('"He said ""hi"""', 'He said "hi"'), ('"Hello," she said', '"Hello," she said'), ('"Hello," she said "so"', '"Hello," she said "so"'),
                                        ('"A ""b"" c" d"', '"A ""b"" c" d"'), ('"I said', '"I said'), ('"Hello."', '"Hello."'), ('"""Hello."""', '"Hello."')])
@pytest.mark.parametrize("delimiter, header", [("|", "audio|text\n"), ("\t", "path\tsentence\n"), (";", "audio;text\n"), ("\t", ""), ("|", "")])
def test_quotes_of_pandas_and_quotes_of_authors(tmp_path, cell, text, delimiter, header):
    tone(tmp_path / "a.wav")
    path = put(tmp_path / "t.csv", f"{header}a.wav{delimiter}{cell}\n")
    assert said(read_manifest(path), "text") == [(text,)]


def test_a_line_that_is_too_long_for_quotes(tmp_path):
    tone(tmp_path / "0.wav"), tone(tmp_path / "1.wav")
    found = read_rows(put(tmp_path / "t.csv", f'0|"short"\n1|"{"long " * 40000}"|x\n'), corpora.Reading("ljspeech"))
    assert said(found.rows, "id") == [("0",)] and [fault.at.line for fault in found.bad] == [2]


def test_a_delimiter_within_quotes(tmp_path):
    tone(tmp_path / "a.wav"), tone(tmp_path / "b.wav"), tone(tmp_path / "c.wav")
    path = put(tmp_path / "t.csv", 'a.wav|"either this|or that"\nb.wav|plain\nc.wav|plain, too\n')
    assert said(read_manifest(path), "text") == [("either this|or that",), ("plain",), ("plain, too",)]


@pytest.mark.parametrize("usual, odd", [("{}.wav|text {}", "{}.wav|either this|or that {}"), ("{}|text {}|text {}", "{}|text {}"), ("{}.wav\ttext {}", "{}.wav\teither\tor {}")])
def test_a_line_unlike_its_neighbours_is_named(tmp_path, usual, odd):
    for n in range(4):
        tone(tmp_path / f"{n}.wav")
    path = put(tmp_path / "t.csv", "".join((odd if n == 2 else usual).replace("{}", str(n)) + "\n" for n in range(4)))
    found = read_rows(path)
    assert len(found.rows) == 3 and [fault.at.line for fault in found.bad] == [3] and "columns" in found.bad[0].reason


LABELS = "0.100000\t0.900000\tOne two.\n\\\t100.0\t200.0\n1.0\t2.5\tThree.\n"
SRT = "1\n00:00:00,100 --> 00:00:00,900\n<i>One</i>\ntwo.\n\n2\n00:00:01,000 --> 00:00:02,500\nThree.\n"
VTT = "WEBVTT\n\nNOTE by hand\n\n00:00.100 --> 00:00.900 align:start\nOne two.\n\nlast\n00:01.000 --> 00:02.500\nThree.\n"
PRINTED = "[00:00.100 --> 00:00.900]  One two.\n[00:01.000 --> 00:02.500]  Three.\n"
GRID = ('File type = "ooTextFile"\nObject class = "TextGrid"\n\nxmin = 0\nxmax = 3\ntiers? <exists>\nsize = 1\nitem []:\n    item [1]:\n        class = "IntervalTier"\n'
        '        name = "%s"\n        xmin = 0\n        xmax = 3\n        intervals: size = 4\n        intervals [1]:\n            xmin = 0\n            xmax = 0.1\n            text = ""\n'
        '        intervals [2]:\n            xmin = 0.1\n            xmax = 0.9\n            text = "One two."\n        intervals [3]:\n            xmin = 0.9\n            xmax = 1.0\n'
        '            text = ""\n        intervals [4]:\n            xmin = 1.0\n            xmax = 2.5\n            text = "Three."\n')
SHORT_GRID = 'File type = "ooTextFile"\n"TextGrid"\n0\n3\n<exists>\n1\n"IntervalTier"\n"said"\n0\n3\n2\n0.1\n0.9\n"One two."\n1.0\n2.5\n"Three."\n'
TWO = [("One two.", 0.1, 0.9), ("Three.", 1.0, 2.5)]


@pytest.mark.parametrize("ending, text", [(".txt", LABELS), (".txt", SRT), (".txt", PRINTED), (".srt", SRT), (".srt", SRT.replace("\n\n", "\n")), (".srt", SRT.replace("\n", "\r\n")),
                                          (".vtt", VTT), (".TextGrid", GRID % "said"), (".TextGrid", SHORT_GRID), (".lab", LABELS)])
def test_texts_with_times_are_rows_of_their_own(tmp_path, ending, text):
    put(tone(tmp_path / "in/talk.wav", 3).with_suffix(ending), text)
    rows, _ = prepared(tmp_path, "--input", tmp_path / "in")
    assert said(rows, "text", "start", "end") == TWO and [row["id"] for row in rows] == ["talk_0001", "talk_0002"]


@pytest.mark.parametrize("text, what", [("0.1\t0.9\tOne.\nand so on\n", "line 2 has no times"), ("0.5\t0.5\tpoint\n", "has no length"), ("0.1\t0.9\t\n", "the text at 0.1 s is empty"),
                                        ("[00:12.00]So it goes\n", "times in brackets")])
def test_times_that_cannot_be_read_are_refused(tmp_path, text, what):
    put(tone(tmp_path / "in/a.wav").with_suffix(".txt"), text)
    with pytest.raises(Invalid, match=f"a.wav: .*a.txt: .*{what}"):
        prepared(tmp_path, "--input", tmp_path / "in")


def test_times_within_a_text_of_a_table_are_refused(tmp_path):
    tone(tmp_path / "a.wav")
    with pytest.raises(Invalid, match="line 1: text holds times of subtitles"):
        read_manifest(put(tmp_path / "m.jsonl", lines_of({"audio": "a.wav", "text": "00:00:01,000 --> 00:00:02,000 hello"})))


WORDS = [{"word": " One", "start": 0.1, "end": 0.4}, {"word": " 2", "score": 0.1}, {"word": " three.", "start": 1.0, "end": 1.4}]


@pytest.mark.parametrize("segments, text", [([{"start": 0.1, "end": 1.4, "text": " One 2 three.", "words": WORDS}], "One 2 three."),
                                            ([{"start": 0.1, "end": 1.0, "text": " One two."}, {"start": 1.2, "end": 2, "text": " Three."}], "One two. Three.")])
def test_whisper(tmp_path, segments, text):
    put(tone(tmp_path / "in/a.wav", 3).with_suffix(".json"), {"text": "x", "segments": segments, "language": "en"})
    rows, _ = prepared(tmp_path, "--input", tmp_path / "in")
    assert said(rows, "text") == [(text,)]
    pieces, _ = prepared(tmp_path, "--input", tmp_path / "in", "--slice", "--slice_min_seconds", 0.5, "--slice_max_seconds", 1.2, "--slice_min_interval", 0.1, "--overwrite")
    assert " ".join(row["text"] for row in pieces) == text and len(pieces) == 2


def test_whisper_with_speakers(tmp_path):
    segments = [{"start": 0, "end": 1, "text": " Hi.", "speaker": "S0"}, {"start": 1, "end": 2, "text": " Ho.", "speaker": "S1"}]
    put(tone(tmp_path / "in/a.wav", 3).with_suffix(".json"), {"segments": segments})
    assert said(prepared(tmp_path, "--input", tmp_path / "in")[0], "text", "speaker", "start", "end") == [("Hi.", "S0", 0, 1), ("Ho.", "S1", 1, 2)]


HOSTILE = [[1, 2], [None], [{"start": 0, "end": 10**400, "text": "x"}], [{"start": 0, "end": "x", "text": "x"}], [{"words": 5, "start": 0, "end": 1}], [{"words": ["a"], "start": 0, "end": 1}],
           [{"start": 0, "end": float("nan"), "text": "x"}], [{"start": -1, "end": 1, "text": "x"}], {"a": 1}, "x"]


@pytest.mark.parametrize("speaker", [{}, {"speaker": "S"}, {"speaker": [1]}])
@pytest.mark.parametrize("segments", HOSTILE)
def test_word_times_that_are_none_are_told(tmp_path, segments, speaker):
    if isinstance(segments, list):
        segments = [{**segment, **speaker} if isinstance(segment, dict) else segment for segment in segments]
    put(tone(tmp_path / "in/a.wav", 3).with_suffix(".json"), {"segments": segments})
    with pytest.raises(Invalid, match="a.wav: "):
        prepared(tmp_path, "--input", tmp_path / "in")


def test_a_speaker_that_is_no_text_is_told(tmp_path):
    put(tone(tmp_path / "in/a.wav", 3).with_suffix(".json"), {"segments": [{"start": 0, "end": 1, "text": "x", "speaker": [1]}]})
    with pytest.raises(Invalid, match="the speaker of the text at 0 s must be text"):
        prepared(tmp_path, "--input", tmp_path / "in")


def test_words_of_a_textgrid_are_an_alignment(tmp_path):
    two = GRID % "phones" + (GRID % "anna - words").split("item []:\n")[1]
    put(tone(tmp_path / "in/a.wav", 3).with_suffix(".TextGrid"), two)
    row, = prepared(tmp_path, "--input", tmp_path / "in")[0]
    assert row["text"] == "One two. Three." and row["alignment"].endswith("a.TextGrid")
    put(tmp_path / "in/a.TextGrid", GRID % "anna" + (GRID % "bob").split("item []:\n")[1])
    with pytest.raises(Invalid, match="this TextGrid has: anna, bob"):
        prepared(tmp_path, "--input", tmp_path / "in", "--overwrite")


@pytest.mark.parametrize("delimiter", ["|", "\t", ";"])
def test_tables_in_which_every_cell_is_quoted(tmp_path, delimiter):
    tone(tmp_path / "a.wav")
    path = put(tmp_path / "t.csv", f'"audio"{delimiter}"text"\n"a.wav"{delimiter}"One two"\n"a.wav"{delimiter}"He said ""hi{delimiter}"""\n')
    assert said(read_manifest(path), "text") == [("One two",), (f'He said "hi{delimiter}"'.replace("\t", " "),)]


@pytest.mark.parametrize("share", [0.2, 0.35, 0.6, 0.9])
def test_a_textgrid_that_is_cut_off(tmp_path, share):
    text = GRID % "said"
    put(tone(tmp_path / "in/a.wav", 3).with_suffix(".TextGrid"), text[: round(len(text) * share)])
    with pytest.raises(Invalid, match="a.wav: .*a.TextGrid: .*(cut off|has: none)"):
        prepared(tmp_path, "--input", tmp_path / "in")


@pytest.mark.parametrize("flag", ["--transcripts", "--alignment_dir"])
def test_a_place_of_texts_that_is_not_there(tmp_path, flag):
    put(tone(tmp_path / "in/a.wav").with_suffix(".txt"), "Words.")
    with pytest.raises(configs.Usage, match=f"{flag} .*gone: no such"):
        prepared(tmp_path, "--input", tmp_path / "in", flag, tmp_path / "gone")


# ------------------------------------------------------------------------------------------------ folders


def folder_of_three(folder, ending=".wav"):
    for n in range(3):
        put(tone(folder / f"{n}{ending}", 1, 300 + 50 * n).with_suffix(".txt"), f"Number {n}.")


def test_links_are_followed_once_and_a_link_to_nothing_is_named(tmp_path):
    folder_of_three(tmp_path / "store")
    put(tone(tmp_path / "in/own/x.wav").with_suffix(".txt"), "Not linked.")
    os.symlink("../store", tmp_path / "in/linked")
    os.symlink("..", tmp_path / "in/own/loop")
    assert len(prepared(tmp_path, "--input", tmp_path / "in")[0]) == 4
    os.symlink("../gone.wav", tmp_path / "in/lost.wav")
    found = read_rows(tmp_path / "in")
    assert len(found.rows) == 4 and [str(f.reason) for f in found.bad] == [f"{tmp_path}/in/lost.wav is a link to ../gone.wav, where nothing is"]


@pytest.mark.parametrize("ending, kind", [(".caf", "CAF"), (".au", "AU"), (".w64", "W64"), (".aiff", "AIFF"), (".aif", "AIFF"), (".opus", "OGG"), (".rf64", "RF64")])
def test_every_ending_that_can_be_read_is_looked_for(tmp_path, ending, kind):
    sub = {"subtype": "OPUS"} if kind == "OGG" else {}
    for n in range(3):
        put(tone(tmp_path / f"in/{n}{ending}", 1, 300 + 50 * n, format=kind, **sub).with_suffix(".txt"), f"Number {n}.")
    assert len(prepared(tmp_path, "--input", tmp_path / "in")[0]) == 3


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    folder_of_three(tmp_path / "in/closed"), folder_of_three(tmp_path / "in/open")
    list_folder = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return list_folder(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(Invalid, match="in/closed cannot be read: Permission denied"):
        read_rows(tmp_path / "in")


def test_the_current_folder(tmp_path, monkeypatch):
    folder_of_three(tmp_path / "in/anna")
    monkeypatch.chdir(tmp_path / "in")
    rows, report = prepared(tmp_path, "--input", ".", "--speaker_from_folder")
    assert said(rows, "speaker") == [("anna",)] * 3 and report["recordings without a row"] == []
    monkeypatch.chdir(tmp_path / "out")
    assert len(prepared(tmp_path, "--input", "train.jsonl", "--encode_only")[0]) == 3


def test_what_a_mac_leaves_is_no_recording(tmp_path):
    folder_of_three(tmp_path / "in")
    for name in ("in/._0.wav", "in/__MACOSX/in/._0.wav", "in/__MACOSX/0.wav"):
        put(tmp_path / name, "resource fork")
    assert len(prepared(tmp_path, "--input", tmp_path / "in")[0]) == 3


def test_recordings_without_a_row_are_counted_and_listed(tmp_path, capsys):
    for n in range(4):
        tone(tmp_path / f"in/wavs/{n}.wav", 1, 300 + 50 * n)
    tone(tmp_path / "in/extra/e.flac")
    put(tmp_path / "in/metadata.csv", "0|Zero.\n1|One.\n")
    _, report = prepared(tmp_path, "--input", tmp_path / "in")
    left = [str(tmp_path / name) for name in ("in/extra/e.flac", "in/wavs/2.wav", "in/wavs/3.wav")]
    assert report["recordings without a row"] == left and f"3 recordings have no row, such as {left[0]}" in capsys.readouterr().err
    assert "wavs/3.wav" in (tmp_path / "out/report.html").read_text()
    put(tmp_path / "in/metadata.csv", "0|Zero.\n1|One.\n2|Two.\n3|Three.\nextra/e|Extra.\n")
    assert prepared(tmp_path, "--input", tmp_path / "in")[1]["recordings without a row"] == []


def test_slice_does_not_cut_its_own_pieces_again(tmp_path):
    wave = np.concatenate([part for n in range(3) for part in (0.3 * np.sin(np.arange(32000) * (0.1 + 0.02 * n)), np.zeros(16000))])
    (tmp_path / "in").mkdir()
    soundfile.write(tmp_path / "in/long.wav", wave, 16000)
    flags = ("--slice", "--slice_min_seconds", 1, "--slice_max_seconds", 3, "--overwrite")
    for _ in range(2):
        prepare("--input", tmp_path / "in", "--output_dir", tmp_path / "in/out", *flags)
        assert len(list((tmp_path / "in/out/clips").glob("*.wav"))) == 3
    table = tmp_path / "in/out/clips/clips.csv"
    put(table, "".join(line.replace(",,", f",Piece {n}.,") + "\n" for n, line in enumerate(table.read_text().splitlines())))
    assert len(prepared(tmp_path, "--input", table)[0]) == 3


# ------------------------------------------------------------------------------------------------ speakers

LAYOUTS = {  # what lies below the inputs: who speaks
    "anna/wavs/0.wav bob/wavs/0.wav": "anna bob",
    "anna/session1/0.wav anna/session2/1.wav bob/session1/0.wav": "anna anna bob",
    "train-clean-100/19/198/19_198_0.wav train-clean-360/26/495/26_495_0.wav": "19 26",
    "19/198/19_198_0.wav 19/227/19_227_0.wav": "19 19",
    "wav48/p225/p225_001.wav wav48/p226/p226_001.wav": "p225 p226",
    "english/anna/0.wav english/bob/1.wav": "anna bob",
    "anna/0.wav": "anna",
    "train/anna/0.wav test/anna/1.wav test/bob/2.wav": "anna anna bob",
}


@pytest.mark.parametrize("names", LAYOUTS)
def test_the_folder_that_tells_speakers_apart(tmp_path, names, capsys):
    for n, name in enumerate(names.split()):
        put(tone(tmp_path / "in" / name, 1, 300 + 50 * n).with_suffix(".txt"), f"Number {n}.")
    rows, _ = prepared(tmp_path, "--input", tmp_path / "in", "--speaker_from_folder")
    want = dict(zip(names.split(), LAYOUTS[names].split()))
    assert {str(Path(row["audio"]).relative_to(tmp_path / "in")): row["speaker"] for row in rows} == want
    assert f"{len(set(want.values()))} speakers by their folders: {rows[0]['speaker']}" in capsys.readouterr().err


def test_the_level_of_speakers_by_hand_and_over_several_inputs(tmp_path):
    for n, who in enumerate(("anna", "bob")):
        for take in "ab":
            put(tone(tmp_path / f"in/{who}/{take}/0.wav", 1, 300 + 50 * n + 10 * ord(take)).with_suffix(".txt"), f"{who} {take}.")
    both = ("--input", tmp_path / "in/anna", tmp_path / "in/bob")
    for flags, names in ((("--speaker_level", 1), "abab"), (("--speaker_level", 2), ["anna", "anna", "bob", "bob"]), (("--speaker_from_folder",), ["anna", "anna", "bob", "bob"])):
        assert [row["speaker"] for row in prepared(tmp_path, *both, *flags, "--overwrite")[0]] == list(names)
    assert {row["speaker"] for row in prepared(tmp_path, "--input", tmp_path / "in/anna", "--speaker_from_folder", "--overwrite")[0]} == {"a", "b"}
    with pytest.raises(configs.Usage, match="speaker_level 90"):
        prepared(tmp_path, *both, "--speaker_level", 90, "--overwrite")


def test_rows_without_a_speaker_are_nobody_elses(tmp_path, capsys):
    tone(tmp_path / "a.wav")
    row = {"audio": "a.wav", "text": "x"}
    put(tmp_path / "m.jsonl", lines_of({**row, "speaker": "anna"}, row, {**row, "speaker": "bob"}, {"turns": [{**row, "speaker": "bob"}, row]}))
    speakers = {}
    rows = read_manifest(tmp_path / "m.jsonl", speakers)
    assert [r.get("speaker") for r in rows] == [0, 1, 2, None] and said(rows[3]["turns"], "speaker") == [(2,), (1,)]
    assert speakers == {"anna": 0, "unnamed": 1, "bob": 2}
    rows, report = prepared(tmp_path, "--input", tmp_path / "m.jsonl")
    assert said(rows[:3], "speaker") == [("anna",), ("unnamed",), ("bob",)] and set(report["speakers"]) == {"anna", "unnamed", "bob"}
    assert "2 rows name no speaker" in capsys.readouterr().err
    put(tmp_path / "m.jsonl", lines_of(row))
    assert "speaker" not in read_manifest(tmp_path / "m.jsonl", speakers)[0]


# ------------------------------------------------------------------------------------------------ cleaning


@pytest.mark.parametrize("raw", [" hello there\n", "hello\u00a0there", "\ufeffhello there\r\n", "hello\tthere", "hello there\x07"])
def test_one_text_however_it_is_brought(tmp_path, raw):
    put(tone(tmp_path / "0.wav").with_suffix(".txt"), raw)
    put(tmp_path / "beside.jsonl", lines_of({"audio": "0.wav"}))
    put(tmp_path / "within.jsonl", lines_of({"audio": "0.wav", "text": raw}))
    put(tmp_path / "turns.jsonl", lines_of({"turns": [{"audio": "0.wav", "text": raw}]}))
    put(tmp_path / "clean.jsonl", lines_of({"audio": "0.wav", "text": "hello there"}))
    cache = ClipCache(tmp_path / "c", Model())
    rows = [read_manifest(tmp_path / f"{name}.jsonl")[0] for name in ("beside", "within", "clean")]
    assert len({cache._plan(row).key for row in rows}) == 1 and read_manifest(tmp_path / "turns.jsonl")[0]["turns"][0]["text"] == "hello there"
    for name in ("beside", "within"):
        assert said(prepared(tmp_path, "--input", tmp_path / f"{name}.jsonl", "--overwrite")[0], "text") == [("hello there",)]


def test_only_prepare_chooses_a_unicode_form_and_messages_keep_their_lines(tmp_path):
    tone(tmp_path / "0.wav")
    apart = unicodedata.normalize("NFD", "Café")
    put(tmp_path / "m.jsonl", lines_of({"audio": "0.wav", "text": apart}))
    assert said(read_manifest(tmp_path / "m.jsonl"), "text") == [(apart,)] and said(prepared(tmp_path, "--input", tmp_path / "m.jsonl")[0], "text") == [("Café",)]
    talk = {"messages": [{"role": "system", "content": "One.\n\nTwo."}, {"role": "user", "content": "Say\nit."},
                         {"role": "assistant", "content": [{"type": "audio", "audio": "0.wav"}]}]}
    put(tmp_path / "t.jsonl", lines_of(talk))
    for row in (read_manifest(tmp_path / "t.jsonl")[0], prepared(tmp_path, "--input", tmp_path / "t.jsonl", "--overwrite")[0][0]):
        assert row["messages"][0]["content"][0]["text"] == "One.\n\nTwo." and row["text"] == "Say it."


TYPED = ["\ufeff Hello\u00a0there,\thow are\r\nyou?\n", "Hello there,\x07 how are  you? ", "\u2003Hello there, how are\u2028 you?"]


@pytest.fixture(scope="module", params=[(name, next(iter(importlib.import_module(f"tests.tiny_{name}").VARIANTS))) for name in sorted(models.backbones())], ids=lambda c: c[0])
def backbone(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param[0]) / "base"
    importlib.import_module(f"tests.tiny_{request.param[0]}").write(folder, request.param[1])
    return models.load(folder)


def test_the_same_text_has_the_same_ids_in_every_script(tmp_path, backbone):
    tone(tmp_path / "0.wav")
    for typed in TYPED:
        row = read_manifest(put(tmp_path / "m.jsonl", lines_of({"audio": "0.wav", "text": typed})))[0]
        prepared_row, = prepared(tmp_path, "--input", tmp_path / "m.jsonl", "--overwrite")[0]
        put(tmp_path / "say.jsonl", lines_of({"text": typed}))
        request = infer.read_requests(infer.Infer(input=str(tmp_path / "say.jsonl")))[0]
        alone = infer.read_requests(infer.Infer(text=typed))[0]
        pieces = infer.pieces_of(alone, 1000)
        texts = [row["text"], prepared_row["text"], *(infer.to_generate(one.item)["text"] for one in (request, alone, *pieces))]
        texts.append(listen.further([typed], [])[0].text)
        texts.append(validate.sentences(validate.Validate(text=[typed]), backbone, [])[0].request["text"])
        assert len(texts) == 7 and all(backbone.encode_text(text) == backbone.encode_text("Hello there, how are  you?") for text in texts), texts


@pytest.mark.parametrize("blank", ["", " \n", "\ufeff", "\x07", "\u00a0"])
def test_a_blank_text_is_refused_by_every_backbone(backbone, blank):
    with pytest.raises(Invalid, match="is empty"):
        backbone.encode_text(blank)


@pytest.mark.parametrize("blank", ["", " \n", "\ufeff", "\x07", "\u00a0"])
def test_a_blank_text_is_refused_where_it_is_read(tmp_path, blank):
    tone(tmp_path / "a.wav")
    for row in ({"audio": "a.wav", "text": blank}, {"turns": [{"audio": "a.wav", "text": blank}]}):
        with pytest.raises(Invalid, match="m.jsonl line 1: text.* is empty"):
            read_manifest(put(tmp_path / "m.jsonl", lines_of(row)))


# ------------------------------------------------------------------------------------------------ sound


def test_a_constant_offset_is_neither_level_nor_sound(tmp_path):
    wave = np.concatenate([np.zeros(8000), 0.2 * np.sin(0.3 * np.arange(16000)), np.zeros(8000)])
    facts, speech = [], []
    for name, offset in (("plain", 0), ("offset", 0.1)):
        soundfile.write(tmp_path / f"{name}.wav", wave + offset, 16000)
        facts.append(measuring.measure(measuring.Clip(str(tmp_path / f"{name}.wav")), 60, -40))
        speech.append(measuring.find_speech(tmp_path / f"{name}.wav", -40, 0.01, measuring.Cutting(1, 9, 0.3, 0.1)))
    assert facts[1]["rms"] == pytest.approx(facts[0]["rms"], abs=0.05)
    assert [facts[1][key] for key in ("head", "tail")] == pytest.approx([0.5, 0.5], abs=0.02) and speech[0] == speech[1]
    soundfile.write(tmp_path / "only.wav", np.full(16000, 0.1), 16000)
    put(tmp_path / "only.txt", "Nothing.")
    with pytest.raises(Invalid, match="silence"):
        prepared(tmp_path, "--input", tmp_path / "only.wav")


# ------------------------------------------------------------------------------------------------ lists


@pytest.mark.parametrize("text, count", [('[{"audio": "a.wav", "text": "x"}, {"audio": "a.wav", "text": "y"}]', 2), ('[\n{"audio": "a.wav", "text": "x"},\n{"audio": "a.wav", "text": "y"}\n]', 2),
                                         ('[{"audio": "a.wav", "text": "x", "role": "user"}, {"audio": "a.wav", "text": "y", "role": "assistant"}]', 1),
                                         ('[{"text": "x"}, {"audio": "a.wav", "text": "y"}]', 1), ('[{"audio": "a.wav", "text": "x"}]\n[{"audio": "a.wav", "text": "y"}]', 2)])
def test_a_list_that_is_called_jsonl(tmp_path, text, count):
    tone(tmp_path / "a.wav")
    rows = read_manifest(put(tmp_path / "m.jsonl", text))
    assert len(rows) == count and ("turns" in rows[0]) == (count == 1 or "]\n[" in text)


# ------------------------------------------------------------------------------------------------ our own manifests


def test_our_own_manifest_is_never_refused(tmp_path, monkeypatch):
    folder_of_three(tmp_path / "a/in")
    prepare("--input", tmp_path / "a/in", "--output_dir", tmp_path / "a/out", "--val_split", 0.4)
    for n in range(3):
        tone(tmp_path / f"b/in/{n}.wav", 2, 900)  # others of the same relative path
    (tmp_path / "b/sub").mkdir()
    monkeypatch.chdir(tmp_path / "b/sub")
    for name in ("train.jsonl", "val.jsonl"):
        for row in read_manifest(tmp_path / "a/out" / name):
            assert row["audio"].startswith(str(tmp_path / "a/in"))
    prepare("--input", tmp_path / "a/out/train.jsonl", tmp_path / "a/out/val.jsonl", "--output_dir", tmp_path / "a/out")
    prepare("--input", tmp_path / "a/out/train.jsonl", "--output_dir", tmp_path / "c")


def test_one_recording_leaves_an_empty_val_jsonl_that_is_read(tmp_path, model):
    put(tone(tmp_path / "in/a.wav").with_suffix(".txt"), "Alone.")
    prepare("--input", tmp_path / "in", "--output_dir", tmp_path / "out", "--ckpt_dir", "any")
    both = [tmp_path / "out/train.jsonl", tmp_path / "out/val.jsonl"]
    assert len(read_manifest(both[0])) == 1 and read_manifest(both[1]) == [] and both[1].read_bytes() == b""
    prepare("--input", *both, "--output_dir", tmp_path / "out", "--ckpt_dir", "any")
    prepare("--input", tmp_path / "in", "--output_dir", tmp_path / "out", "--ckpt_dir", "any")
    put(tmp_path / "elsewhere/val.jsonl", "")
    with pytest.raises(Invalid, match="holds no rows"):
        read_manifest(tmp_path / "elsewhere/val.jsonl")


def test_a_cache_that_cannot_be_written_is_told_before_encoding(tmp_path):
    put(tone(tmp_path / "a.wav").with_suffix(".txt"), "Alone.")
    put(tmp_path / "cache", "a file where the folder should be")
    made = Model()
    with pytest.raises(Invalid, match=r"cache cannot be written \(.*1 rows are not encoded yet.*--cache_dir"):
        ClipCache(tmp_path / "cache", made).add(read_manifest(put(tmp_path / "m.jsonl", lines_of({"audio": "a.wav"}))))
    assert made.codec_calls == 0


# ------------------------------------------------------------------------------------------------ corpora


@pytest.mark.parametrize("table, name", [("{}.wav|Number {}.", "t.csv"), ("{}|Number {}.", "t.csv"), ("{}\tNumber {}.", "t.tsv"), ("{}.wav\tNumber {}.", "t.tsv"),
                                         ('{"audio": "{}", "text": "Number {}."}', "t.jsonl")])
def test_a_table_of_transcripts_that_lies_elsewhere(tmp_path, table, name):
    for n in range(3):
        tone(tmp_path / f"mine/{n}.wav", 1, 300 + 50 * n)
    put(tmp_path / "meta" / name, "".join(table.replace("{}", str(n)) + "\n" for n in range(3)))
    rows, _ = prepared(tmp_path, "--input", tmp_path / "mine", "--transcripts", tmp_path / "meta" / name)
    assert said(rows, "text") == [("Number 0.",), ("Number 1.",), ("Number 2.",)]
    (tmp_path / "mine/2.wav").unlink()
    with pytest.raises(Invalid, match=r"line 3: no file at 2(\.wav)? \(looked in "):
        prepared(tmp_path, "--input", tmp_path / "mine", "--transcripts", tmp_path / "meta" / name)


def test_common_voice(tmp_path):
    for n in range(2):
        tone(tmp_path / f"cv/clips/c{n}.wav", 1, 300 + 50 * n)
    put(tmp_path / "cv/validated.tsv", 'client_id\tpath\tsentence\tage\nff\tc0.wav\t"Hello," she said.\t\nee\tc1.wav\tSo.\tteens\n')
    for path in (tmp_path / "cv", tmp_path / "cv/validated.tsv"):
        rows, _ = prepared(tmp_path, "--input", path, "--overwrite")
        assert said(rows, "speaker", "text") == [("ff", '"Hello," she said.'), ("ee", "So.")]


@pytest.mark.parametrize("flags, count", [((), 4), (("--mic", "mic2"), 2)])
def test_vctk(tmp_path, flags, count):
    for who in ("p225", "p226"):
        for mic in "12":
            tone(tmp_path / f"vctk/wav48/{who}/{who}_001_mic{mic}.flac", 1, 300 + ord(who[-1]))
        put(tmp_path / f"vctk/txt/{who}/{who}_001.txt", f"I am {who}.\n")
    for where in (("--input", tmp_path / "vctk/wav48", "--transcripts", tmp_path / "vctk/txt"), ("--input", tmp_path / "vctk")):
        rows, _ = prepared(tmp_path, *where, "--speaker_from_folder", "--overwrite", *flags)
        assert [row["text"] for row in rows] == [f"I am {row['speaker']}." for row in rows] and len(rows) == count


@pytest.mark.parametrize("name, line", [("metadata.jsonl", '{"file_name": "{}.wav", "text": "{}."}\n'), ("metadata.csv", "{}.wav,{}.\n")])
def test_audiofolder(tmp_path, name, line):
    for part in ("train", "test"):
        for n in range(2):
            tone(tmp_path / f"af/{part}/{n}.wav", 1, 300 + 50 * n + len(part))
        head = "file_name,transcription\n" if name.endswith("csv") else ""
        put(tmp_path / f"af/{part}" / name, head + "".join(line.replace("{}", str(n)) for n in range(2)))
    assert [len(prepared(tmp_path, "--input", tmp_path / path, "--overwrite")[0]) for path in ("af/train", "af")] == [2, 4]
    put(tmp_path / "af/test" / name, (head or "") + line.replace("{}", "9"))
    with pytest.raises(Invalid, match=rf"test/{name} line \d: no file at 9.wav"):
        prepared(tmp_path, "--input", tmp_path / "af", "--overwrite")


def test_kaldi(tmp_path):
    tone(tmp_path / "k/wav/r1.wav", 3), tone(tmp_path / "k/wav/r2.wav", 2, 600)
    put(tmp_path / "k/wav.scp", "r1 wav/r1.wav\nr2 wav/r2.wav\n"), put(tmp_path / "k/text", "r1 one two\nr2 three\n"), put(tmp_path / "k/utt2spk", "r1 anna\nr2 bob\n")
    assert said(prepared(tmp_path, "--input", tmp_path / "k")[0], "text", "speaker", "id") == [("one two", "anna", "r1"), ("three", "bob", "r2")]
    put(tmp_path / "k/segments", "u1 r1 0.5 1.5\nu2 r2 0 1\nu3 r9 0 1\n"), put(tmp_path / "k/text", "u1 one\nu2 two\nu4 lost\n"), put(tmp_path / "k/utt2spk", "u1 anna\n")
    found = read_rows(tmp_path / "k/wav.scp")
    assert said(found.rows, "text", "start", "end") == [("one", 0.5, 1.5), ("two", 0, 1)]
    assert sorted(fault.reason for fault in found.bad) == ["segments names r9, which wav.scp does not have", "u4 has a text, and no line in segments"]
    (tmp_path / "k/segments").unlink()
    put(tmp_path / "k/wav.scp", "u1 sph2pipe -f wav r1.sph |\nu2 wav/r2.wav\n")
    assert "u1 is a command" in " ".join(fault.reason for fault in read_rows(tmp_path / "k").bad)


def test_librispeech(tmp_path):
    for n in range(2):
        tone(tmp_path / f"ls/19/198/19-198-000{n}.flac", 1, 300 + 50 * n)
    put(tmp_path / "ls/19/198/19-198.trans.txt", "19-198-0000 NORTHANGER ABBEY\n19-198-0001 THIS LITTLE WORK\n")
    rows, _ = prepared(tmp_path, "--input", tmp_path / "ls", "--speaker_from_folder")
    assert said(rows, "text", "speaker") == [("NORTHANGER ABBEY", "19"), ("THIS LITTLE WORK", "19")]


def test_names_as_windows_and_mac_write_them(tmp_path):
    tone(tmp_path / "wavs/0.wav"), tone(tmp_path / "wavs" / (unicodedata.normalize("NFD", "é") + ".wav"))
    put(tmp_path / "rows.jsonl", lines_of({"audio": "wavs\\0.wav", "text": "x"}, {"audio": unicodedata.normalize("NFC", "wavs/é.wav"), "text": "y"}))
    put(tmp_path / "metadata.csv", "wavs\\0.wav|Zero.\r\n")
    assert len(read_manifest(tmp_path / "rows.jsonl")) == 2 and len(read_manifest(tmp_path / "metadata.csv")) == 1
    tone(tmp_path / "wavs\\0.wav", 2)  # a file of that very name comes first
    assert read_manifest(tmp_path / "rows.jsonl")[0]["audio"] == str(tmp_path / "wavs\\0.wav")


@pytest.mark.parametrize("data, what", [(b"PAR1" + bytes(20), "is Parquet: export it as JSONL"), (b"PK\3\4" + bytes(20), "a zip archive or a spreadsheet: unpack"),
                                        (b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS.*git lfs pull"), (b"\x1f\x8b" + bytes(9), "gzip")])
def test_files_that_are_no_tables_are_named(tmp_path, data, what):
    for name in ("train.parquet", "rows.jsonl"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(Invalid, match=f"{name} is .*{what}" if "is " not in what else f"{name} {what}"):
            read_manifest(tmp_path / name)


def test_a_data_set_in_another_form_is_named_within_a_folder(tmp_path):
    put(tmp_path / "in/data/train-0.parquet", "PAR1...")
    with pytest.raises(Invalid, match="train-0.parquet is Parquet"):
        prepared(tmp_path, "--input", tmp_path / "in")
    put(put(tmp_path / "lfs/a.wav", "version https://git-lfs.github.com/spec/v1\n").with_suffix(".txt"), "Words.")
    with pytest.raises(Invalid, match="a.wav is a pointer of Git LFS.*git lfs pull"):
        prepared(tmp_path, "--input", tmp_path / "lfs")


def test_subtitles_are_an_input_by_themselves(tmp_path):
    put(tone(tmp_path / "in/talk.flac", 3).with_suffix(".srt"), SRT)
    put(tmp_path / "in/talk.txt", "One two. Three.")
    assert said(prepared(tmp_path, "--input", tmp_path / "in/talk.srt")[0], "text", "start", "end") == TWO
    (tmp_path / "in/talk.flac").unlink()
    with pytest.raises(Invalid, match="no recording of that name"):
        read_manifest(tmp_path / "in/talk.srt")


def test_texts_whose_names_were_typed_otherwise(tmp_path):
    tone(tmp_path / "in" / (unicodedata.normalize("NFD", "é") + ".wav")), tone(tmp_path / "in/B.WAV", 1, 600)
    put(tmp_path / "in/é.txt", "Accent."), put(tmp_path / "in/B.TXT", "Capitals.")
    assert sorted(said(prepared(tmp_path, "--input", tmp_path / "in")[0], "text")) == [("Accent.",), ("Capitals.",)]
    assert len(read_manifest(put(tmp_path / "in/m.jsonl", lines_of({"audio": "B", "text": "x"})))) == 1


# ------------------------------------------------------------------------------------------------ the report


def test_the_report_says_minutes_and_names_a_reason_for_every_clip_to_listen_to(tmp_path, model):
    model.sample_rate = 24000
    folder_of_three(tmp_path / "in")
    _, report = prepared(tmp_path, "--input", tmp_path / "in", "--ckpt_dir", "any", "--batch_size", 2)
    html = (tmp_path / "out/report.html").read_text()
    assert [notice["what"][:47] for notice in report["notices"]] == ["3 clips lie below the codec's 24000 Hz; what is"]
    assert report["checkpoints"][0]["steps per epoch"] == 2 and "0.1 min" in html and "hours" not in html
    assert [entry["why"] for entry in report["worst"]] in ([], [["sample rate"]])
    model.sample_rate = 16000
    _, report = prepared(tmp_path, "--input", tmp_path / "in", "--ckpt_dir", "any")
    html = (tmp_path / "out/report.html").read_text()
    assert report["worst"] == [] and "Nothing stands out." in html and "samples at full scale" not in html


@pytest.mark.parametrize("variables, place", [({"HUGGINGFACE_HUB_CACHE": "{}"}, ""), ({"XDG_CACHE_HOME": "{}"}, "huggingface/hub"), ({"HF_HOME": "{}", "XDG_CACHE_HOME": "x"}, "hub"),
                                              ({"HF_HUB_CACHE": "{}", "HUGGINGFACE_HUB_CACHE": "x"}, ""), ({"HOME": "{}"}, ".cache/huggingface/hub")])
def test_the_variables_of_the_hub(tmp_path, monkeypatch, variables, place):
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    folder = tmp_path / place / "models--org--voice/snapshots/abc"
    folder.mkdir(parents=True)
    assert models.folder_of("org/voice") == folder


def test_a_terminal_that_is_not_utf8(tmp_path, monkeypatch, capsysbinary):
    folder_of_three(tmp_path / "in")
    monkeypatch.setattr(prepare_data.sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    prepare("--input", tmp_path / "in", "--output_dir", tmp_path / "größe")
    prepare_data.sys.stdout.seek(0)
    assert prepare_data.sys.stdout.read().endswith("gr\\xf6\\xdfe/report.html\n")


@pytest.mark.parametrize("below", ["", "deeper/logs"])
def test_a_tensorboard_that_is_a_file_is_refused_at_once(tmp_path, below):
    file = put(tmp_path / "log", "somebody's")
    with pytest.raises(configs.Usage, match="tensorboard is .*log is a file; give a folder"):
        train.check_settings(train.Train(pretrained_path="x", train_manifest=["x"], save_path="x", tensorboard=str(file / below)))


@pytest.mark.parametrize("kind, said, words", [("voxcpm", {"r": 4, "alpha": "16"}, "f.json: alpha is '16', expected a number"), ("voxcpm", {"r": 4}, "f.json does not say alpha, expected a number"),
                                               ("voxcpm", {"rank": "4", "lora_alpha": 8}, "f.json: rank is '4', expected a whole number"), ("peft", {"r": 4, "lora_alpha": "16"}, "f.json: lora_alpha is '16', expected a number"),
                                               ("mlx", {"lora_parameters": {"rank": 4, "scale": "2"}}, "lora_parameters: scale is '2', expected a number")])
def test_an_alpha_that_is_no_number_is_told_by_its_key(kind, said, words):
    with pytest.raises(Invalid, match=words):
        adapters.SETTINGS[kind](as_record(said, "f.json"))


def weights_of(folder):
    return next(folder / name for name in ("model.safetensors", "pytorch_model.bin", "gpt.pth") if (folder / name).exists())


def write_weights(path, state):
    (save_file if path.suffix == ".safetensors" else torch.save)(state, path)


def test_names_of_wrappers_and_marks_of_editors_change_no_checkpoint(backbone, tmp_path):
    folder = Path(shutil.copytree(Path(backbone.path).parent, tmp_path / "copy"), "base")
    for file in [*folder.glob("*.json"), *folder.glob("*.yaml")]:
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    file = weights_of(folder)
    state = {name: tensor.load().clone() for name, tensor in checkpoint.read(file).items()}
    write_weights(file, {f"module._orig_mod.{name.replace('layers.', 'layers._orig_mod.')}": tensor for name, tensor in state.items()})
    assert models.load(folder).fingerprint == backbone.fingerprint
    if backbone.backbone == "indextts2":  # gpt.pth was never published in parts
        return
    file.unlink()
    names = [f"{file.stem}-{part:05d}-of-00002{file.suffix}" for part in (1, 2)]
    for n, name in enumerate(names):
        write_weights(folder / name, {f"module.{key}": state[key] for key in list(state)[n::2]})
    (folder / f"{file.name}.index.json").write_text(json.dumps({"weight_map": {f"module.{key}": names[n % 2] for n, key in enumerate(state)}}))
    assert models.load(folder).fingerprint == backbone.fingerprint


def test_a_file_of_a_checkpoint_given_as_the_checkpoint(backbone):
    folder = Path(backbone.path)
    for name in ("config.json", "config.yaml", "tokenizer.json"):
        if (folder / name).exists():
            with pytest.raises(Invalid, match=f"{name} is no file of weights; give the folder of the checkpoint, here {folder}"):
                models.load(folder / name)
    assert models.load(weights_of(folder)).fingerprint == backbone.fingerprint
    if backbone.backbone == "voxcpm":
        with pytest.raises(Invalid, match="audiovae.pth is the codec of a checkpoint; give the folder of it"):
            models.load(folder / "audiovae.pth")


def test_latest_as_a_text_file_is_followed_by_every_reader(tmp_path):
    step = tmp_path / "run/step_0000002"
    weights = put(step / "lora_weights.safetensors", "")
    put(tmp_path / "run/latest", "step_0000002")
    assert adapters.locate(tmp_path / "run/latest")[0] == weights and models.folder_of(tmp_path / "run/latest") == step
    with pytest.raises(Invalid, match="this is a run, give .*run/latest"):
        adapters.locate(tmp_path / "run")
    (tmp_path / "run/latest").unlink()
    with pytest.raises(Invalid, match="this is a run, give .*run/step_0000002"):
        adapters.locate(tmp_path / "run")
    put(tmp_path / "other/latest", "a file of somebody's")
    with pytest.raises(Invalid, match="no adapter at"):
        adapters.locate(tmp_path / "other/latest")
