"""Kinds of input that people brought to tools like this one: data sets of the layouts that corpora have, and rows that used to
lose their sound, their text or their speaker without a word. Each is made here, small, and its right reading is written beside it."""
import json
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import configs
import prepare_data
from models.parts import Invalid, clips as measuring, corpora, manifests, textfiles, transcripts
from models.parts.manifests import read_manifest, read_rows
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
    for one in (row, {"turns": [row]})[: 1 if key == "channel" else 2]:
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
                                        ('"I said', '"I said'), ('"Hello."', '"Hello."'), ('"""Hello."""', '"Hello."')])
@pytest.mark.parametrize("delimiter, header", [("|", "audio|text\n"), ("\t", "path\tsentence\n"), (";", "audio;text\n"), ("\t", ""), ("|", "")])
def test_quotes_of_pandas_and_quotes_of_authors(tmp_path, cell, text, delimiter, header):
    tone(tmp_path / "a.wav")
    path = put(tmp_path / "t.csv", f"{header}a.wav{delimiter}{cell}\n")
    assert said(read_manifest(path), "text") == [(text,)]


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


def test_words_of_a_textgrid_are_an_alignment(tmp_path):
    two = GRID % "phones" + (GRID % "anna - words").split("item []:\n")[1]
    put(tone(tmp_path / "in/a.wav", 3).with_suffix(".TextGrid"), two)
    row, = prepared(tmp_path, "--input", tmp_path / "in")[0]
    assert row["text"] == "One two. Three." and row["alignment"].endswith("a.TextGrid")
    put(tmp_path / "in/a.TextGrid", GRID % "anna" + (GRID % "bob").split("item []:\n")[1])
    with pytest.raises(Invalid, match="this TextGrid has: anna, bob"):
        prepared(tmp_path, "--input", tmp_path / "in", "--overwrite")
