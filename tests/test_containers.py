"""models/parts/containers.py: no file of any format ends early, or is read to half, without a word."""
import io
import struct

import numpy as np
import pytest
import soundfile

from models.parts import Invalid, containers
from models.parts.containers import MOST_CHUNKS, look

RATE, SECONDS = 16000, 3
SAMPLES = RATE * SECONDS
FORMATS = {"a.wav": ("WAV", "PCM_16"), "b.wav": ("WAV", "FLOAT"), "long.wav": ("RF64", "PCM_16"), "a.aiff": ("AIFF", "PCM_16"),
           "a.au": ("AU", "PCM_16"), "a.caf": ("CAF", "PCM_16"), "alac.caf": ("CAF", "ALAC_16"), "a.w64": ("W64", "PCM_16"),
           "a.flac": ("FLAC", "PCM_16"), "a.ogg": ("OGG", "VORBIS"), "a.opus": ("OGG", "OPUS"), "a.mp3": ("MP3", "MPEG_LAYER_III")}


def sound(seed=0, samples=SAMPLES):
    noise = np.random.default_rng(seed).standard_normal(samples)
    return (0.2 * np.sin(np.arange(samples) * 0.05) + 0.02 * noise).astype("float32")


def encoded(name, wave=None, rate=RATE, **more):
    out = io.BytesIO()
    kind, subtype = FORMATS[name]
    soundfile.write(out, sound() if wave is None else wave, rate, format=kind, subtype=subtype, **more)
    return out.getvalue()


def put(folder, name, data):
    (folder / name).write_bytes(data)
    return look(folder / name)


def decoded(found):
    """Samples in the parts that libsndfile should read."""
    return sum(len(soundfile.read(io.BytesIO(part))[0]) for part in found.parts)


@pytest.mark.parametrize("name", FORMATS)
def test_a_whole_file_is_left_as_it_is(tmp_path, name):
    found = put(tmp_path, name, encoded(name))
    assert not found.problem and not found.parts
    found = put(tmp_path, "junk." + name.split(".")[1], encoded(name) + b"\0" * 333)
    assert not found.problem


@pytest.mark.parametrize("share", (0.02, 0.3, 0.5, 0.8, 0.99))
@pytest.mark.parametrize("name", FORMATS)
def test_a_cut_file_is_noticed_whatever_the_cut(tmp_path, name, share):
    data = encoded(name)
    found = put(tmp_path, name, data[: int(len(data) * share)])
    assert found.problem or not readable(tmp_path / name), "a cut file passes"


def readable(path):
    try:
        return len(soundfile.read(str(path))[0]) > 0
    except soundfile.LibsndfileError:
        return False


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_without_its_last_bytes_is_cut(tmp_path, name):
    for missing in (2, 7, 100):
        found = put(tmp_path, name, encoded(name)[:-missing])
        assert "cut off" in found.problem or name == "a.flac" and not readable(tmp_path / name), missing


@pytest.mark.parametrize("stated", (0, 0x7FFFFFFF, 0x7FFFF000, 0xFFFFFFFF))
@pytest.mark.parametrize("riff", (0, 0x7FFFF024, 0xFFFFFFFF))
def test_a_wav_from_a_pipe_is_read_whole(tmp_path, stated, riff):
    data = bytearray(encoded("a.wav"))
    data[4:8], data[40:44] = struct.pack("<I", riff), struct.pack("<I", stated)
    found = put(tmp_path, "a.wav", data)
    assert not found.problem
    assert (decoded(found) if found.parts else soundfile.info(str(tmp_path / "a.wav")).frames) == SAMPLES


def test_an_empty_wav_with_something_behind_is_no_sound_from_a_pipe(tmp_path):
    data = bytearray(encoded("a.wav", sound()[:0]))
    data += b"LIST" + struct.pack("<I", 4) + b"INFO"
    data[4:8] = struct.pack("<I", len(data) - 8)
    assert not put(tmp_path, "a.wav", data).parts


def test_chunks_of_odd_length_are_padded(tmp_path):
    data = encoded("a.wav")
    odd = data[:36] + b"note" + struct.pack("<I", 3) + b"abc\0" + data[36:]
    assert not put(tmp_path, "a.wav", odd).problem
    assert "cut off: its header promises 10 bytes" in put(tmp_path, "b.wav", odd[:-10]).problem


@pytest.mark.parametrize("head", (b"RIFF", b"RF64", b"BW64"))
def test_empty_chunks_end(tmp_path, head):
    two = b"ds64" + bytes(4)
    assert put(tmp_path, "a.wav", head + bytes(4) + b"WAVE" + two + two).problem
    with pytest.raises(Invalid, match=r"b\.wav: more than \d+ chunks"):
        put(tmp_path, "b.wav", head + bytes(4) + b"WAVE" + (b"abcd" + bytes(4)) * (MOST_CHUNKS + 9))


def without_index(data):
    return data[min(k for k in (data.find(mark, 4) for mark in (b"\xff\xf3", b"\xff\xfb")) if k > 0) :]


@pytest.mark.parametrize("rate", (16000, 22050, 44100))
def test_an_mp3_without_an_index_is_read_whole(tmp_path, rate):
    half = rate * 6
    quiet_and_loud = np.concatenate([0.0001 * sound(1, half), sound(2, half), 0.0001 * sound(3, half)])
    data = without_index(encoded("a.mp3", quiet_and_loud, rate, compression_level=0.5, bitrate_mode="VARIABLE"))
    found = put(tmp_path, "a.mp3", data)
    assert not found.problem and 0 <= decoded(found) - 3 * half < 3000
    assert "ends within a frame" in put(tmp_path, "b.mp3", data[:-40]).problem


def test_tags_of_an_mp3_are_no_sound(tmp_path):
    data, tag = encoded("a.mp3"), b"TAG" + b"x" * 125
    front = b"ID3\x04\0\0" + bytes((0, 0, 2, 0)) + b"\xff\xfb\x90\0" * 64
    found = put(tmp_path, "a.mp3", front + data + tag)
    assert not found.problem and not found.parts
    assert "ends within a frame" in put(tmp_path, "b.mp3", without_index(data)[:-40] + tag).problem


def test_joined_recordings_are_read_to_the_end(tmp_path):
    first, second = sound(1), sound(2, RATE)
    for name in ("a.ogg", "a.opus"):
        found = put(tmp_path, name, encoded(name, first) + encoded(name, second))
        assert not found.problem and decoded(found) == SAMPLES + RATE
        assert "cut off" in put(tmp_path, "cut" + name, encoded(name, first) + encoded(name, second)[:-9]).problem
    found = put(tmp_path, "a.mp3", encoded("a.mp3", first) + encoded("a.mp3", second))
    assert not found.problem and 0 <= decoded(found) - SAMPLES - RATE < 5000
    found = put(tmp_path, "a.flac", encoded("a.flac", first) + encoded("a.flac", second))
    assert decoded(found) == SAMPLES + RATE


def test_a_wave64_with_something_behind_its_end_is_read_up_to_there(tmp_path):
    assert decoded(put(tmp_path, "a.w64", encoded("a.w64") + b"x" * 1001)) == SAMPLES


@pytest.mark.parametrize("samples", (SAMPLES, 4096, 4097, 100))
def test_a_flac_of_unknown_length_is_counted(tmp_path, samples):
    data = bytearray(encoded("a.flac", sound(0, samples)))
    data[21], data[22:26], data[26:42] = data[21] & 0xF0, bytes(4), bytes(16)
    assert decoded(put(tmp_path, "a.flac", data)) == samples
    assert "cut off" in put(tmp_path, "b.flac", data[:-3]).problem
    assert "cut off" in put(tmp_path, "c.flac", data[: len(data) // 2]).problem


def test_a_flac_of_2_to_the_36_samples_is_cut(tmp_path):
    data = bytearray(encoded("a.flac"))
    data[21], data[22:26] = data[21] | 0x0F, b"\xff" * 4
    assert "cut off" in put(tmp_path, "a.flac", data).problem


def test_an_unknown_format_is_left_to_libsndfile(tmp_path):
    for data in (b"", b"x", b"not a sound file at all", b"\0" * 5000):
        found = put(tmp_path, "a.xyz", data)
        assert not found.problem and not found.parts
    with pytest.raises(Invalid, match="nowhere"):
        look(tmp_path / "nowhere.wav")


def test_an_ogg_that_ends_between_two_pages_is_cut(tmp_path):
    data = encoded("a.ogg")
    assert "no page ends the stream" in put(tmp_path, "a.ogg", data[: data.rindex(b"OggS")]).problem


def test_frames_of_a_flac_are_told_by_their_checksums_and_long_numbers(tmp_path):
    """From 128 on a frame's number takes two bytes; and noise that looks like a header is none."""
    samples = 140 * 4096
    data = bytearray(encoded("a.flac", sound(0, samples)))
    assert not put(tmp_path, "a.flac", data).problem
    data[21], data[22:26] = data[21] & 0xF0, bytes(4)
    assert decoded(put(tmp_path, "b.flac", data)) == samples
    number = b"\xff\xf8\xc9\x08\x00"  # sync, 4096 samples, 16 bits, frame 0; no checksum is as long as this is wrong
    fake = [number + bytes([crc]) for crc in range(256)]
    headers = [head for head in fake if containers._flac_header(bytearray(head + bytes(8)), 0)]
    assert len(headers) == 1
