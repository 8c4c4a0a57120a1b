"""Bad input to prepare_data: each fault is named with file and line, the good rows stay usable, the exit code is right."""
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile

import configs
import prepare_data
from models.parts import Invalid, cache as cache_part
from prepare_data import ClipCache, read_manifest
from tests.conftest import ROOT
from tests.test_prepare import Model, model, prepare, put, rows_of, speech, tone  # noqa: F401

GOOD = {"audio": "good.wav", "text": "a good row"}


def clean_set(folder, count=10):
    """Rows that nobody can find fault with: texts of one pace, no two alike."""
    rows = []
    for n in range(count):
        tone(folder / f"wav/{n}.wav", 1 + 0.1 * n, 300 + 20 * n)
        rows.append({"audio": f"wav/{n}.wav", "text": f"row {n} " + "la " * round(3.5 + 0.5 * n)})
    return rows


def run(tmp_path, rows, *flags):
    """Prepare these rows (dicts, or raw lines of bytes). -> (report, exit code)"""
    data = b"".join(r if isinstance(r, bytes) else json.dumps(r).encode() + b"\n" for r in rows)
    (tmp_path / "m.jsonl").write_bytes(data)
    code = 0
    try:
        prepare("--input", tmp_path / "m.jsonl", "--output_dir", tmp_path / "out", *flags)
    except Invalid:
        code = 1
    return json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8")), code


def test_a_clean_set_shows_empty_lists(tmp_path):
    report, code = run(tmp_path, clean_set(tmp_path))
    assert (report["dropped"], report["notices"], code) == ([], [], 0) and report["totals"]["rows"] == 10


# ------------------------------------------------------------------------------------------------ one fault of each kind


def cut(path, share):
    data = path.read_bytes()
    path.write_bytes(data[: round(len(data) * share)])


def changed(path, at, value):
    data = bytearray(path.read_bytes())
    data[at : at + len(value)] = value
    path.write_bytes(data)


def wave(path, samples, rate=16000, **kind):
    soundfile.write(str(path), samples, rate, **kind)


def sine(seconds=1.0, rate=16000):
    return 0.3 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate)) / rate)


def broken(sample):
    x = sine()
    x[500] = sample
    return x


SOUNDS = {  # name: (how the file is made, what is said about it)
    "cut10.wav": (lambda p: (wave(p, sine()), cut(p, 0.10)), "cut off"),
    "cut50.wav": (lambda p: (wave(p, sine()), cut(p, 0.50)), "cut off"),
    "cut99.wav": (lambda p: (wave(p, sine()), cut(p, 0.99)), "cut off"),
    "claims.wav": (lambda p: (wave(p, sine()), changed(p, 40, (2**31 - 1).to_bytes(4, "little"))), "cut off"),
    "header.wav": (lambda p: wave(p, sine(0)), "no samples"),
    "zero.wav": (lambda p: p.write_bytes(b""), "empty (0 bytes)"),
    "text.wav": (lambda p: p.write_text("this is a text, not sound"), "not a sound file"),
    "short_header.wav": (lambda p: (wave(p, sine()), cut(p, 20 / 32044)), "."),
    "half.flac": (lambda p: (wave(p, np.random.default_rng(0).normal(0, 0.1, 16000)), cut(p, 0.5)), "cut off"),
    "flipped.flac": (lambda p: (wave(p, np.random.default_rng(0).normal(0, 0.1, 16000)), changed(p, p.stat().st_size // 2, b"\x55" * 40)), "damaged"),
    "nan.wav": (lambda p: wave(p, broken(np.nan), subtype="FLOAT"), "sample 500 is nan"),
    "inf.wav": (lambda p: wave(p, broken(np.inf), subtype="FLOAT"), "sample 500 is inf"),
    "loud.wav": (lambda p: wave(p, sine() * 13, subtype="FLOAT"), "the peak is 3.9, above 1"),
    "silent.wav": (lambda p: wave(p, sine() * 1e-4), "silence"),
    "short.wav": (lambda p: wave(p, sine(0.2)), "0.20 s is shorter than --min_seconds 0.3"),
    "long.wav": (lambda p: wave(p, sine(61)), "61.0 s is longer than the limit of 60 s"),
    "rate.wav": (lambda p: (wave(p, sine()), changed(p, 24, (0).to_bytes(4, "little"))), "."),
    "music.m4a": (lambda p: p.write_bytes(b"\0\0\0\x20ftypM4A " + bytes(100)), "convert it"),
}
LINES = {  # line of a manifest: what is said about it
    b'{"audio": "good.wav", "text": "trailing comma",}': "not valid JSON",
    b'["not", "an", "object"]': "turns must be a list of objects",
    b'"just text"': "expected {...}",
    b'{"audio": "good.wav", "text": "caf\xe9"}': "byte 0xe9, which is not UTF-8, at character 4",
    b'{"audio": "good.wav", "text": "half a pair \\ud83d"}': "lone surrogate U+D83D, at character 13",
    b'{"audio": "good.wav"}': "no text, and no transcript beside",
    b'{"text": "no audio here"}': "no audio: expected one of audio, audio_path",
    b'{"audio": "good.wav", "text": ""}': "text is empty",
    b'{"audio": "good.wav", "text": " \\u0007\\ufeff "}': "text after cleaning is empty",
    b'{"audio": "good.wav", "text": 5}': "text must be text, got 5",
    b'{"audio": "missing.wav", "text": "x"}': "no file at missing.wav (looked in ",
    b'{"audio": "/no/such/place.wav", "text": "x"}': "no file at /no/such/place.wav",
    b'{"audio": "https://example.org/a.wav", "text": "x"}': "is a URL",
    b'{"audio": "file:///etc/passwd", "text": "x"}': "is a URL",
    b'{"audio": "s3://bucket/a.wav", "text": "x"}': "is a URL",
    b'{"audio": "a\\u0000b.wav", "text": "x"}': "it holds a NUL",
    b'{"audio": "' + b"a" * 5000 + b'.wav", "text": "x"}': "it has 5004 characters",
    b'{"audio": "' + b"a" * 3000 + b'.wav", "text": "x"}': "no file at aaaa",
    b'{"audio": "good.wav", "path": "other.wav", "text": "x"}': "audio and path differ",
    b'{"audio": "good.wav", "text": "x", "start": 0.5, "end": 0.2}': "end 0.2 is not after start 0.5",
    b'{"audio": "good.wav", "text": "x", "start": 3, "end": 4}': "do not lie in order within its 1.000 s",
    b'{"audio": "good.wav", "text": "x", "start": NaN}': "start must be a number",
    b'{"audio": "good.wav", "text": "x", "speaker": [1]}': "speaker must be",
    b'{"audio": "good.wav", "text": "x", "emotion": [1, 2]}': "emotion must be a path or 8 numbers",
    b'{"messages": [{"role": "user", "content": [{"type": "video"}]}]}': "must have the type text or audio",
    b'{"messages": [{"role": "user", "content": "hello"}]}': "no assistant message has audio",
    b'{"turns": [{"text": "x"}]}': "no turn has audio",
    b"[" * 100000: "not valid JSON",
}


def test_every_fault_is_named_with_file_and_line_and_nothing_else_is(tmp_path):
    rows, said = clean_set(tmp_path), {}
    tone(tmp_path / "good.wav", 1, 333)
    for line, what in LINES.items():
        rows.append(line + b"\n")
        said[len(rows)] = what
    for name, (make, what) in SOUNDS.items():
        make(tmp_path / name)
        rows.append({"audio": name, "text": "some words as text"})
        said[len(rows)] = what
    rows += [{"id": "twice", "audio": "wav/0.wav", "text": "one thing " * 2}, {"id": "twice", "audio": "wav/1.wav", "text": "other things"}]
    said[len(rows)] = f"the id 'twice' is also that of line {len(rows) - 1}"
    rows.append({"audio": "good.wav", "text": "with a bad ref", "ref_audio": "nan.wav"})
    said[len(rows)] = "ref_audio"
    report, code = run(tmp_path, rows)
    found = {d["line"]: d["reason"] for d in report["dropped"]}
    assert code == 1 and set(found) == set(said) and {d["file"] for d in report["dropped"]} == {str(tmp_path / "m.jsonl")}
    assert [(n, found[n]) for n, what in said.items() if what not in found[n]] == []
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [".lock", "cache", "report.html", "report.json"]
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "lone surrogate U+D83D" in page and "cut off" in page
    report, code = run(tmp_path, rows, "--skip_bad", "--val_split", "0")
    assert code == 0 and {d["line"] for d in report["dropped"]} == set(said)
    kept = read_manifest(tmp_path / "out/train.jsonl")
    assert len(kept) == 11 and report["totals"]["dropped"] == len(said)


def test_every_fault_that_only_deserves_a_look_is_named(tmp_path):
    rows = clean_set(tmp_path)
    rows[2]["text"] += " <|eot_id|>"
    rows[3]["text"] += "\x07"
    rows[4]["duration"] = 9.0
    rows[5]["sample_rate"] = 8000
    wave(tmp_path / "clip.wav", np.clip(sine(1.5) * 9, -1, 1)), wave(tmp_path / "quiet.wav", sine(1.5) * 0.01)
    speech(tmp_path / "pause.wav", 0, 1, 1.2, 0.8)
    rows += [{"audio": "clip.wav", "text": "this one is clipped"}, {"audio": "quiet.wav", "text": "this one is quiet"},
             {"audio": "pause.wav", "text": "pauses before and after"},
             {"audio": "wav/6.wav", "text": "another text for six"}, {"audio": str(tone(tmp_path / "x.wav", 1.2, 999)), "text": rows[0]["text"]},
             {"audio": str(tone(tmp_path / "y.wav", 1.2, 888)), "text": "far too much text for such a short clip " * 3}]
    report, code = run(tmp_path, rows)
    assert code == 0 and report["dropped"] == []
    assert [(n["line"], n["kind"]) for n in report["notices"]] == [
        (3, "special token"), (4, "control characters"), (5, "duration"), (6, "sample rate"), (11, "clipping"), (12, "level"),
        (13, "silence"), (14, "duplicate audio"), (15, "duplicate text"), (16, "pace")]
    assert report["worst"][0]["line"] == 13 or report["worst"][0]["line"] in (11, 16)
    kept = {r["id"]: r["text"] for r in rows_of(tmp_path / "out/train.jsonl") + rows_of(tmp_path / "out/val.jsonl")}
    assert kept["2"].endswith("<|eot_id|>") and not kept["3"].endswith("\x07")


def test_what_is_fine_is_left_alone(tmp_path):
    """BOM, CRLF, blank lines, right-to-left text with diacritics, absolute paths, `..`, and every sample format."""
    rows, kinds = [], [("PCM_U8", 1, "wav"), ("PCM_16", 2, "wav"), ("PCM_24", 1, "wav"), ("PCM_32", 1, "wav"), ("DOUBLE", 1, "wav"),
                       ("ULAW", 1, "wav"), ("PCM_24", 2, "flac"), ("VORBIS", 1, "ogg"), ("MPEG_LAYER_III", 1, "mp3")]
    for n, (kind, channels, end) in enumerate(kinds):
        rate = (8000, 16000, 22050, 44100, 48000)[n % 5] if end != "mp3" else 44100
        wave(tmp_path / f"{n}.{end}", np.repeat(sine(1 + 0.1 * n, rate)[:, None], channels, 1), rate, subtype=kind)
        name = f"{n}.{end}" if n % 3 == 0 else f"../{tmp_path.name}/{n}.{end}" if n % 3 == 1 else str(tmp_path / f"{n}.{end}")
        rows.append({"audio": name, "text": f"وَمِنْ ثُمَّ قَالُوا {n} " + "لا " * n})
    data = b"\xef\xbb\xbf" + b"\r\n\r\n".join(json.dumps(r, ensure_ascii=n % 2 == 0).encode() for n, r in enumerate(rows))
    report, code = run(tmp_path, [data])
    assert (code, report["dropped"], report["notices"]) == (0, [], [])
    assert len(report["formats"]) == 9 and report["channels"] == {"1": 7, "2": 2}
    assert report["sample rates"] == {"8000": 2, "16000": 2, "22050": 2, "44100": 2, "48000": 1}


def test_file_names_need_not_be_utf8_nor_short(tmp_path, model):  # noqa: F811
    folder = os.fsencode(tmp_path / "in")
    os.mkdir(folder)
    for n, name in enumerate((b"\xff\xfe", "\u0645\u0631 '\"&<b>".encode(), b"x" * 200, b"a\nb")):
        data = tone(tmp_path / "a.wav", 1, 300 + n).read_bytes()
        for end, content in ((b".wav", data), (b".txt", b"some words")):
            with open(os.path.join(folder, name + end), "wb") as f:
                f.write(content)
    prepare("--input", tmp_path / "in", "--output_dir", tmp_path / "out", "--val_split", 0, "--ckpt_dir", "any", "--skip_bad")
    rows, report = read_manifest(tmp_path / "out/train.jsonl"), json.loads((tmp_path / "out/report.json").read_text())
    assert all("cannot be opened" in d["reason"] for d in report["dropped"]) and len(rows) + len(report["dropped"]) == 4
    assert len(rows) >= 3 and ClipCache(tmp_path / "out/cache", model).missing(rows) == []


def test_a_rate_is_never_reinterpreted(tmp_path, model):  # noqa: F811
    class Listens(Model):
        sample_rate = 24000

        def encode_audio(self, source, start=None, end=None):
            return prepare_data.audio.read(source, self.sample_rate, start, end)[0]

        def encode(self, row):
            return {"wave": row["audio"]}

    tone(tmp_path / "a.wav", 1, 440, 16000)
    put(tmp_path / "m.jsonl", {"audio": "a.wav", "text": "x"})
    rows = read_manifest(tmp_path / "m.jsonl")
    cache = ClipCache(tmp_path / "c", Listens())
    cache.add(rows, lambda *_: None)
    wave = cache.get(rows[0])["wave"].numpy()
    assert np.argmax(np.abs(np.fft.rfft(wave))) / (len(wave) / 24000) == pytest.approx(440, abs=1)


def test_broken_json_lists_and_tables_are_named(tmp_path):
    tone(tmp_path / "good.wav")
    good = json.dumps(GOOD)
    for text, line, what in ((f"[\n{good},\n]", 2, "a comma after the last row"), (f"[\n{good}\n{good}\n]", 3, "no comma after a row"),
                             (f"[\n{good},\n{{\"audio\": }}]", 3, "not valid JSON"), (f"[{good},\n5]", 2, "expected {...}"),
                             ('{"audio": "good.wav", "text": ["a"]}', 1, "text must be text")):
        put(tmp_path / "m.json", text)
        with pytest.raises(Invalid, match=f"m.json line {line}: .*{what}"):
            read_manifest(tmp_path / "m.json")
    put(tmp_path / "t.csv", 'filename,text\ngood.wav,fine\ngood.wav,"never closed\ngood.wav,one,two\ngood.wav,\n')
    with pytest.raises(Invalid) as error:
        read_manifest(tmp_path / "t.csv")
    said = str(error.value).splitlines()
    assert len(said) == 3 and "t.csv line 3" in said[0] and "quote" in said[0] and "3 columns, expected 2: filename,text" in said[1] and "line 5" in said[2]
    put(tmp_path / "l.csv", "good|fine text\ngood\n|no name\nno_such|text\n")
    with pytest.raises(Invalid) as error:
        prepare("--input", tmp_path / "l.csv", "--output_dir", tmp_path / "out", "--format", "ljspeech")
    assert [n for n in (1, 2, 3, 4) if f"l.csv line {n}:" in str(error.value)] == [2, 3, 4]
    (tmp_path / "u16.csv").write_text("filename,text\ngood.wav,x\n", encoding="utf-16")
    for path, what in ((tmp_path / "u16.csv", "UTF-16"), (tmp_path / "none.jsonl", "no file or folder")):
        with pytest.raises(Invalid, match=what):
            read_manifest(path)
    with pytest.raises(Invalid, match="m.jsonl line 4: text is empty"):  # blank lines count, as in an editor
        read_manifest(put(tmp_path / "m.jsonl", '\n\r\n\n{"audio": "good.wav", "text": " "}\n'))
    for empty in ("", "\n\n", "\ufeff"):
        with pytest.raises(Invalid, match="holds no rows"):
            read_manifest(put(tmp_path / "e.jsonl", empty))


def test_all_bad_rows_are_named_at_once(tmp_path):
    put(tmp_path / "m.jsonl", "".join(json.dumps({"audio": f"{n}.wav", "text": "x"}) + "\n" for n in range(200)))
    with pytest.raises(Invalid) as error:
        read_manifest(tmp_path / "m.jsonl")
    assert str(error.value).count("no file at") == 50 and "and 150 more" in str(error.value)
    os.chdir(tmp_path)
    try:
        with pytest.raises(Invalid, match="m.jsonl line 38: no file at 37.wav"):
            read_manifest("m.jsonl")
    finally:
        os.chdir(ROOT)


@pytest.mark.parametrize("harm", ["word times", "order"])
def test_bad_word_times_are_named(tmp_path, harm):
    put(tone(tmp_path / "in/a.wav", 5).with_suffix(".txt"), "one two")
    times = [{"word": "two", "start": 3, "end": 4}, {"word": "one", "start": 1, "end": 2}]
    put(tmp_path / "in/a.json", {"lines": 1} if harm == "word times" else {"words": times})
    with pytest.raises(Invalid, match=harm):
        prepare("--input", tmp_path / "in", "--output_dir", tmp_path / "out", "--slice")


# ------------------------------------------------------------------------------------------------ outputs


def test_output_that_came_from_elsewhere_is_not_replaced(tmp_path):
    rows = clean_set(tmp_path, 4)
    put(tmp_path / "out/train.jsonl", "mine\n")
    report = None
    with pytest.raises(Invalid, match="was not written by this script"):
        prepare("--input", put(tmp_path / "m.jsonl", rows[0]), "--output_dir", tmp_path / "out")
    assert (tmp_path / "out/train.jsonl").read_text() == "mine\n"
    report, code = run(tmp_path, rows, "--overwrite")
    assert code == 0 and len(rows_of(tmp_path / "out/train.jsonl")) == 3
    before = (tmp_path / "out/train.jsonl").read_bytes()
    with pytest.raises(Invalid, match="was made of"):
        prepare("--input", put(tmp_path / "other.jsonl", rows[0]), "--output_dir", tmp_path / "out")
    report, code = run(tmp_path, [*rows, {"audio": "missing.wav", "text": "x"}])
    assert code == 1 and (tmp_path / "out/train.jsonl").read_bytes() == before
    assert run(tmp_path, rows)[1] == 0  # the same inputs: taken in


def test_output_that_cannot_be_written_is_said_before_the_work(tmp_path, monkeypatch):
    rows = clean_set(tmp_path, 3)
    put(tmp_path / "file", "x")
    monkeypatch.setattr(prepare_data, "read_rows", lambda *a: pytest.fail("too late"))
    with pytest.raises(Invalid, match="cannot be written"):
        prepare("--input", put(tmp_path / "m.jsonl", rows[0]), "--output_dir", tmp_path / "file/out")


def test_output_names_never_come_from_the_manifest(tmp_path, model):  # noqa: F811
    speech(tmp_path / "in/..%2f..%2fevil.wav", 5, 1, 5)
    rows = [{**r, "id": f"../../escape{n}", "speaker": "../../s"} for n, r in enumerate(clean_set(tmp_path, 3))]
    before = {p for p in tmp_path.rglob("*")}
    assert run(tmp_path, rows, "--ckpt_dir", "any")[1] == 0
    prepare("--input", tmp_path / "in", "--output_dir", tmp_path / "out2", "--slice")
    new = {p for p in tmp_path.rglob("*")} - before - {tmp_path / "m.jsonl"}
    assert all(p.is_relative_to(tmp_path / "out") or p.is_relative_to(tmp_path / "out2") for p in new)
    assert not [p for p in new if "evil" in p.name or "escape" in p.name]


def test_rows_that_the_checkpoint_refuses(tmp_path, model, monkeypatch):  # noqa: F811
    def picky(row):
        if "row 2" in row["text"]:
            raise Invalid("no tokens")
        return Model.encode(model, row)

    monkeypatch.setattr(model, "encode", picky)
    rows = clean_set(tmp_path, 5)
    report, code = run(tmp_path, rows, "--ckpt_dir", "any")
    assert code == 1
    report, code = run(tmp_path, rows, "--ckpt_dir", "any", "--skip_bad")
    assert code == 0 and [(d["line"], d["reason"]) for d in report["dropped"]] == [(3, "any: no tokens")]
    kept = rows_of(tmp_path / "out/train.jsonl") + rows_of(tmp_path / "out/val.jsonl")
    assert len(kept) == 4 and not any("row 2" in r["text"] for r in kept)


@pytest.mark.parametrize("flags, what", [((), "--input and --output_dir"), (("--loudness", "loud"), "rms:-23"), (("--val_split", "1"), "share"),
                                         (("--normalizer", "no_such:thing"), "module:function"), (("--format", "xml"), "jsonl"),
                                         (("--ref", "some"), "other"), (("--max_second", "3"), "max_seconds"),
                                         (("--batch_size", "0"), "at least 1"), (("--grad_accum_steps", "0"), "at least 1"), (("--workers", "-1"), "at least 0"),
                                         (("--slice_min_seconds", "-1e30"), "at least 0"), (("--slice_hop", "0"), "at least"), (("--slice_hop", "1e30"), "at most"),
                                         (("--loudness", "rms:-" + "9" * 400), "rms:-23"), (("--max_seconds", "1e308"), "a number"), (("--min_seconds", "1e300"), "a number"),
                                         (("--input", "a\0b"), "a text"), (("--normalizer", "os:sep"), "no function"),
                                         (("--transcripts", "/dev/null"), "no such file or folder")])
def test_wrong_use(tmp_path, flags, what):
    with pytest.raises(configs.Usage, match=what):
        prepare(*(("--input", tmp_path, "--output_dir", tmp_path / "o") if flags else ()), *flags)


def hurt(text):
    if "row 1" in text:
        raise KeyError("a\x1b[2Jb")
    return None if "row 2" in text else text


def test_a_normalizer_that_fails_costs_its_row_alone(tmp_path):
    flags = ("--normalizer", f"{__name__}:hurt")
    report, code = run(tmp_path, clean_set(tmp_path, 5), *flags, "--skip_bad")
    assert code == 0 and [(d["line"], d["reason"]) for d in report["dropped"]] == [
        (2, "--normalizer: KeyError: 'a\\x1b[2Jb'"), (3, "--normalizer gave None, expected a text")]
    assert run(tmp_path, clean_set(tmp_path, 5), *flags)[1] == 1


BAD_TEXTS = {"latin": lambda p: p.write_bytes(b"caf\xe9"), "utf-16": lambda p: p.write_text("words", encoding="utf-16"), "folder": os.mkdir, "pipe": os.mkfifo,
             "loop": lambda p: p.symlink_to(p), "empty": Path.touch, "gzip": lambda p: p.write_bytes(b"\x1f\x8b\x08\xff"), "a library": lambda p: p.write_text("a " * (25 << 20)),
             "sparse": lambda p: (p.touch(), os.truncate(p, 1 << 38)), "no right": lambda p: p.write_text("secret")}


@pytest.mark.parametrize("kind, end", [(kind, ".txt") for kind in BAD_TEXTS] + [(kind, end) for kind in ("pipe", "no right", "latin") for end in (".srt", ".json", ".TextGrid")])
def test_a_transcript_that_cannot_be_read_costs_its_row_alone(tmp_path, monkeypatch, kind, end):
    for n in range(3):
        put(tone(tmp_path / f"in/{n}.wav", 1, 300 + 20 * n).with_suffix(".txt"), f"words of number {n}")
    (tmp_path / "in/1.txt").unlink()
    BAD_TEXTS[kind](tmp_path / f"in/1{end}")
    whole = Path.read_bytes

    def read_bytes(path):
        if kind == "no right" and path.name == f"1{end}":  # root has every right, so the test asks nobody
            raise PermissionError(13, "Permission denied")
        return whole(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    prepare("--input", tmp_path / "in", "--output_dir", tmp_path / "out", "--skip_bad", "--val_split", 0)
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert {row["id"] for row in rows_of(tmp_path / "out/train.jsonl")} == {"0", "2"}
    assert report["dropped"] and all("1." in d["file"] + d["reason"] for d in report["dropped"])


@pytest.mark.parametrize("name", ["m.jsonl", "wav/metadata.csv"])
def test_a_pipe_is_not_read_as_a_table(tmp_path, name):
    tone(tmp_path / "wav/0.wav")
    os.mkfifo(tmp_path / name)
    with pytest.raises(Invalid, match="no file"):
        prepare("--input", tmp_path / name if name == "m.jsonl" else (tmp_path / name).parent, "--output_dir", tmp_path / "out")


@pytest.mark.parametrize("name", ["a\x1b[2Jb", "a\x9b31m", "\u202egnp", "a\n0 rows"])
def test_names_of_others_rule_no_terminal(tmp_path, capsys, name):
    folder = tmp_path / name / "wav"
    for n in range(2):
        put(tone(folder / f"{n}{name}.wav", 1, 300 + 50 * n).with_suffix(".txt"), f"words of number {n}")
    tone(folder / f"{name}.wav", 1)
    put(tmp_path / "m.jsonl", json.dumps({"audio": str(folder / f"0{name}.wav"), "text": "words", "id": name, "speaker": name, name: 1}))
    for source in (tmp_path / name, tmp_path / "m.jsonl"):
        prepare("--input", source, "--output_dir", tmp_path / f"out{name}", "--skip_bad", "--speaker_from_folder", "--overwrite")
    said = capsys.readouterr().err
    assert all(char.isprintable() or char == "\n" for char in said) and not [line for line in said.splitlines() if line.startswith("0 rows")]


# ------------------------------------------------------------------------------------------------ size, signals, the command line


def peak_memory(*flags):
    """Run the script in a process of its own. -> (exit code, megabytes, stderr)"""
    code = ("import resource, sys; sys.path.insert(0, sys.argv.pop(1)); import prepare_data, configs\n"
            "start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "try:\n    configs.run(prepare_data.main)\n"
            "finally:\n    print('grown', (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) // 1024, file=sys.stderr)")
    done = subprocess.run([sys.executable, "-c", code, str(ROOT), *map(str, flags)], capture_output=True, text=True)
    return done.returncode, int(done.stderr.rsplit("grown ", 1)[1]), done.stderr


def test_ten_hours_and_many_lines_in_little_memory(tmp_path):
    """A FLAC bomb is refused by its header; 5,000 lines (or MANY_LINES of them) with 1 % bad are reported exactly."""
    count = int(os.environ.get("MANY_LINES", 5000))
    with soundfile.SoundFile(str(tmp_path / "bomb.flac"), "w", 2000, 1, "PCM_16") as f:
        for _ in range(60):
            f.write(np.zeros(2000 * 600, np.int16))
    tone(tmp_path / "a.wav", 2)
    lines = [json.dumps({"audio": "a.wav" if n % 100 else "missing.wav", "text": f"row {n} of many", "id": str(n)}) for n in range(count)]
    lines.append(json.dumps({"audio": "bomb.flac", "text": "ten hours"}))
    put(tmp_path / "m.jsonl", "\n".join(lines))
    code, grown, said = peak_memory("--input", tmp_path / "m.jsonl", "--output_dir", tmp_path / "out", "--skip_bad")
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert code == 0 and [d["line"] for d in report["dropped"]] == [*range(1, count, 100), count + 1]
    assert "36000.0 s is longer than the limit of 60 s" in report["dropped"][-1]["reason"] and grown < 300
    assert report["totals"]["rows"] == count - count // 100


def test_the_command_line_from_another_folder(tmp_path):
    rows = clean_set(tmp_path, 4)
    put(tmp_path / "data/m.jsonl", "".join(json.dumps({**r, "audio": "../" + r["audio"]}) + "\n" for r in rows) + '{"audio": "no.wav", "text": "x"}')
    command = [sys.executable, str(ROOT / "prepare_data.py"), "--input", "data/m.jsonl", "--output-dir", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr and not (tmp_path / "out/train.jsonl").exists()
    assert "data/m.jsonl line 5: no file at no.wav (looked in data and in the current folder)" in done.stderr


def encode_three_clips_and_wait(flags, pipe):
    """The fourth clip takes until a signal stops the work; a byte in the pipe says that three are done and none is written."""
    calls, stopped = [], threading.Event()

    class Waiting(Model):
        def encode_audio(self, *source):
            calls.append(source)
            if len(calls) > 3:
                stopped.wait(60)
            return super().encode_audio(*source)

    class Shard(cache_part.Shard):
        def put(self, *record):
            super().put(*record)
            if len(self.records) == 3:
                os.write(pipe, b".")

    class Pool(cache_part.ThreadPoolExecutor):
        def shutdown(self, wait=True, *, cancel_futures=False):
            super().shutdown(False, cancel_futures=cancel_futures)  # from here on no other clip is begun
            stopped.set()
            super().shutdown(wait)

    cache_part.Shard, cache_part.ThreadPoolExecutor = Shard, Pool
    signal.signal(signal.SIGINT, signal.default_int_handler)
    prepare_data.models.load = lambda path, device, extra: Waiting()
    configs.run(lambda: prepare_data.main(flags))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the process that gets the signal is forked")
@pytest.mark.parametrize("sent, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_keep_what_is_done(tmp_path, sent, code):
    rows = [{**row, "audio": str(tmp_path / row["audio"])} for row in clean_set(tmp_path, 10)]
    put(tmp_path / "m.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    ready, pipe = os.pipe()
    child = os.fork()
    if not child:
        ended = 0
        try:
            encode_three_clips_and_wait(["--input", str(tmp_path / "m.jsonl"), "--output_dir", str(tmp_path / "out"), "--ckpt_dir", "any"], pipe)
        except SystemExit as e:
            ended = e.code
        os._exit(ended)
    os.close(pipe)
    assert os.read(ready, 1) == b"."
    os.close(ready)
    os.kill(child, sent)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code
    cache = ClipCache(tmp_path / "out/cache", Model())
    assert [set(record) for record in cache.records.values()] == [{""}] * 3
