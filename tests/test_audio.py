"""Sound files, resampling and spectral features: torchaudio and IndexTTS2 by golden tensors, transformers live, bad files by name."""
import math
import os
import resource
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

from models.parts import Invalid, audio
from tests.conftest import ROOT

SPEECH = Path(ROOT).parent / "shared/audio"
GOLDEN = load_file(Path(__file__).parent / "golden/audio.safetensors")


def tone(hertz, seconds, rate, level=0.5):
    return (level * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "good.wav"
    soundfile.write(path, tone(440, 1, 24000), 24000, subtype="PCM_16")
    return path


# ------------------------------------------------------------------------------------------------ files


def test_info_reads_the_header(good):
    assert audio.info(good) == audio.Info(24000, 24000, 1.0, 1, "WAV", "PCM_16")


@pytest.mark.parametrize("name, subtype, step", [
    ("a.wav", "PCM_U8", 1 / 128), ("a.wav", "PCM_16", 1 / 32768), ("a.wav", "PCM_24", 2.0**-23), ("a.wav", "PCM_32", 2.0**-24),
    ("a.wav", "FLOAT", 2.0**-24), ("a.wav", "DOUBLE", 2.0**-24), ("a.wav", "ULAW", 1 / 40), ("a.flac", "PCM_16", 1 / 32768),
    ("a.flac", "PCM_24", 2.0**-23), ("a.ogg", "VORBIS", 0.05), ("a.mp3", "MPEG_LAYER_III", 0.05), ("a.aiff", "PCM_16", 1 / 32768)])
def test_every_format_gives_the_same_signal(tmp_path, name, subtype, step):
    wave = tone(440, 0.5, 24000)
    soundfile.write(tmp_path / name, wave, 24000, subtype=subtype)
    got, rate = audio.read(tmp_path / name)
    assert rate == 24000 and got.dtype == torch.float32 and got.shape == (len(wave),)
    inner = slice(2000, -2000) if name.endswith(("ogg", "mp3")) else slice(None)
    assert np.abs(got.numpy() - wave)[inner].max() <= step


def test_channels_are_averaged(tmp_path):
    left, right = tone(440, 0.1, 16000), tone(300, 0.1, 16000, 0.2)
    soundfile.write(tmp_path / "s.wav", np.stack([left, right], 1), 16000, subtype="FLOAT")
    got, _ = audio.read(tmp_path / "s.wav")
    assert got.shape == (1600,) and np.allclose(got, (left + right) / 2, atol=1e-7)


def test_start_and_end_cut_in_seconds_of_the_file(good):
    whole, _ = audio.read(good)
    assert torch.equal(audio.read(good, start=0.25, end=0.5)[0], whole[6000:12000])
    assert torch.equal(audio.read(good, end=1.04)[0], whole)  # a rounded length in a manifest
    wave, rate = audio.read(good, rate=16000, start=0.25, end=0.5)
    assert rate == 16000 and wave.shape == (4000,)
    for start, end in [(-1, None), (2, None), (0.5, 0.25), (0.5, 0.5), (0, 2)]:
        with pytest.raises(Invalid, match="good.wav: start .* 1.000 s.*rate 24000, 24000 samples"):
            audio.read(good, start=start, end=end)


def cut(path, part):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])


@pytest.mark.parametrize("part", [0.1, 0.25, 0.5, 0.9, 0.99])
def test_a_cut_wav_is_refused(good, part):
    cut(good, part)
    for ask in (audio.info, audio.read):
        with pytest.raises(Invalid, match=r"good.wav: cut off.*\d+ bytes more"):
            ask(good)


def test_a_wav_cut_within_its_header_is_refused(good):
    cut(good, 20 / 48044)
    with pytest.raises(Invalid, match="good.wav"):
        audio.read(good)


def test_a_wav_that_claims_two_gigabytes_is_refused(good):
    data = bytearray(good.read_bytes())
    data[40:44] = struct.pack("<I", 2**31)
    good.write_bytes(data)
    with pytest.raises(Invalid, match="good.wav: cut off"):
        audio.read(good)


def test_an_rf64_file_is_read_and_its_cut_is_noticed(tmp_path):
    path, wave = tmp_path / "long.wav", tone(440, 1, 16000)
    soundfile.write(path, wave, 16000, format="RF64", subtype="FLOAT")
    assert np.array_equal(audio.read(path)[0], wave)
    cut(path, 0.5)
    with pytest.raises(Invalid, match="long.wav: cut off"):
        audio.read(path)


def test_chunks_around_the_data_and_a_streamed_header_are_no_cut(good):
    data = good.read_bytes()
    extra = data[:36] + b"junk" + struct.pack("<I", 3) + b"abc\0" + data[36:] + b"LIST" + struct.pack("<I", 4) + b"abcd"
    good.write_bytes(extra)
    assert audio.read(good)[0].shape == (24000,)
    good.write_bytes(data[:40] + b"\xff" * 4 + data[44:])  # what comes out of a pipe
    assert audio.read(good)[0].shape == (24000,)


@pytest.mark.parametrize("name, content, says", [
    ("empty.wav", b"", r"empty \(0 bytes\)"), ("notes.wav", b"this is not sound\n" * 40, "not a sound file"),
    ("notes.raw", b"1234" * 40, "not a sound file"), ("short.flac", b"fLaC", "not a sound file")])
def test_a_file_that_is_no_sound_is_refused(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    for ask in (audio.info, audio.read):
        with pytest.raises(Invalid, match=f"{name}.*{says}"):
            ask(tmp_path / name)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path, says in [(tmp_path / "nowhere.wav", "no such file"), (tmp_path, "folder"), (tmp_path / ("a" * 5000), "aaa"),
                       ("https://example.org/a.wav", "no such file"), ("a\0b.wav", "a")]:
        with pytest.raises(Invalid, match=says):
            audio.read(path)


def test_a_file_without_samples_is_refused(tmp_path):
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 24000, subtype="PCM_16")
    with pytest.raises(Invalid, match="none.wav: holds no samples .rate 24000, 0 samples found"):
        audio.read(tmp_path / "none.wav")


@pytest.mark.parametrize("part", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("name", ["half.flac", "half.mp3"])
def test_half_a_compressed_file_is_refused(tmp_path, name, part):
    path = tmp_path / name
    soundfile.write(path, tone(440, 1, 24000) + random(24000).numpy() * 0.01, 24000)
    cut(path, part)
    with pytest.raises(Invalid, match=f"{name}: (damaged or )?cut off"):
        audio.read(path)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused_with_their_index(tmp_path, value):
    wave = np.stack([tone(440, 0.5, 24000)] * 2, 1)
    wave[7000:7002, 1] = value
    soundfile.write(tmp_path / "bad.wav", wave, 24000, subtype="FLOAT")
    with pytest.raises(Invalid, match=f"bad.wav: sample 7000 is {value}.*rate 24000, 12000 samples"):
        audio.read(tmp_path / "bad.wav")
    with pytest.raises(Invalid, match="sample 7000 "):
        audio.read(tmp_path / "bad.wav", start=0.25)
    assert audio.read(tmp_path / "bad.wav", end=0.25)[0].shape == (6000,)


def test_an_hour_in_a_small_flac_is_refused_before_decoding(tmp_path, monkeypatch):
    path = tmp_path / "hour.flac"
    with soundfile.SoundFile(path, "w", 8000, 1, "PCM_16") as f:
        for _ in range(60):
            f.write(np.zeros(8000 * 60, dtype=np.int16))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with monkeypatch.context() as patch:
        patch.setattr(audio.soundfile, "read", lambda *_, **__: pytest.fail("it was decoded"))
        with pytest.raises(Invalid, match="hour.flac: 3600.0 s are wanted, the limit is 60 s"):
            audio.read(path, max_seconds=60)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20000  # kB
    assert audio.read(path, start=1800, end=1801, max_seconds=60)[0].shape == (8000,)


def test_written_samples_come_back_and_clipping_is_counted(tmp_path):
    wave = torch.from_numpy(tone(440, 0.1, 24000))
    for name in ("out.wav", "out.flac"):
        assert audio.write(tmp_path / name, wave, 24000) == 0
        assert audio.info(tmp_path / name).subtype == "PCM_16"
        got, rate = audio.read(tmp_path / name)
        assert rate == 24000 and (got - wave).abs().max() <= 0.5001 / 32768
        audio.write(tmp_path / "again.wav", got, rate)
        assert torch.equal(audio.read(tmp_path / "again.wav")[0], got)
    assert audio.write(tmp_path / "loud.wav", torch.tensor([0.0, 1.5, -2.0, 1.0, -1.0]), 24000) == 2
    assert torch.equal(audio.read(tmp_path / "loud.wav")[0], torch.tensor([0, 32767, -32768, 32767, -32768]) / 32768)


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path, wave = tmp_path / "out.wav", torch.zeros(100)
    audio.write(path, wave, 24000)
    before = path.read_bytes()
    with pytest.raises(Invalid, match="out.wav: not written, sample 3 is nan"):
        audio.write(path, torch.tensor([0, 0, 0, math.nan]), 24000)
    with pytest.raises(Invalid, match="out.xyz.*as .wav or .flac"):
        audio.write(tmp_path / "out.xyz", wave, 24000)
    with pytest.raises(Invalid, match="cannot be written"):
        audio.write(tmp_path / "nowhere" / "out.wav", wave, 24000)
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(Invalid, match="out.wav: cannot be written .disk full"):
        audio.write(path, wave + 0.5, 24000)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["out.wav"]


# ------------------------------------------------------------------------------------------------ resampling


@pytest.mark.parametrize("name", [k for k in GOLDEN if k.startswith("resample")])
def test_resampling_equals_torchaudio(name):
    _, rate, new_rate = name.split(".")
    got = audio.resample(GOLDEN["x"][:1501], int(rate), int(new_rate))
    assert got.shape == GOLDEN[name].shape
    assert (got - GOLDEN[name]).abs().max() < 1e-6


@pytest.mark.parametrize("rate, new_rate, n", [(441, 160, 1), (441, 160, 500), (3, 2, 50), (2, 3, 49), (1, 7, 20), (101, 100, 333)])
def test_resampling_is_the_windowed_sinc_sum(rate, new_rate, n):
    x = random(2, n)
    base = min(rate, new_rate) * 0.99
    j, i = torch.arange(-(-n * new_rate // rate), dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    t = ((i / rate - j / new_rate) * base).clamp(-6, 6)
    want = x @ (torch.sinc(t) * torch.cos(math.pi * t / 12) ** 2 * base / rate).T
    assert torch.allclose(audio.resample(x, rate, new_rate), want, atol=1e-12)


def test_resampling_keeps_pitch_level_and_batch():
    for rate in (8000, 22050, 24000, 44100, 48000):
        wave = audio.resample(torch.from_numpy(tone(440, 1, rate)), rate, 16000)
        assert wave.shape == (16000,)
        spectrum = torch.fft.rfft(wave * torch.hann_window(16000)).abs()
        assert abs(int(spectrum.argmax()) - 440) <= 1 and abs(float(wave[2000:-2000].abs().max()) - 0.5) < 2e-3
    x = random(2, 3, 700).float()
    assert torch.equal(audio.resample(x, 16000, 16000), x)
    assert torch.allclose(audio.resample(x, 24000, 16000)[1, 2], audio.resample(x[1, 2], 24000, 16000), atol=1e-6)


@pytest.mark.parametrize("hertz, decibels", [(10000, -45), (12000, -53), (14000, -58)])
def test_what_lies_above_the_new_nyquist_frequency_is_weak(hertz, decibels):
    alias = audio.resample(torch.from_numpy(tone(hertz, 1, 44100)), 44100, 16000)[1000:-1000]
    assert 20 * math.log10(float(alias.square().mean().sqrt()) * 2**0.5 / 0.5) < decibels


def test_rates_without_a_common_factor_take_no_gigabytes():
    x = torch.from_numpy(tone(440, 1, 44101))
    assert audio.resample(x, 44101, 16000).shape == (16000,)
    assert sum(k.numel() for _, k in audio._sinc_kernels(44101, 16000, torch.float32)[1]) < 4e6
    with pytest.raises(Invalid, match="positive"):
        audio.resample(x, 0, 16000)


# ------------------------------------------------------------------------------------------------ features


def test_the_mel_spectrogram_equals_indextts2():
    got = audio.mel_spectrogram(GOLDEN["x"])
    assert got.shape == GOLDEN["mel"].shape and (got - GOLDEN["mel"]).abs().max() < 1e-4
    quiet = audio.mel_spectrogram(GOLDEN["x"] * 1e-4)
    assert (quiet - GOLDEN["mel.quiet"]).abs().max() < 1e-4 and 0.1 < (quiet < -11.5).float().mean() < 0.9
    assert audio.mel_spectrogram(torch.zeros(2, 2560)).shape == (2, 80, 10)
    with pytest.raises(Invalid, match="more than 384 samples"):
        audio.mel_spectrogram(torch.zeros(384))


@pytest.mark.parametrize("scale", [1, 32768])
def test_the_filter_bank_equals_kaldi(scale):
    got = audio.kaldi_fbank(GOLDEN["x"] * scale)
    assert got.shape == GOLDEN[f"fbank.{scale}"].shape and (got - GOLDEN[f"fbank.{scale}"]).abs().max() < 1e-4
    assert torch.equal(audio.kaldi_fbank(torch.stack([GOLDEN["x"]] * 2) * scale)[1], got)
    assert (audio.kaldi_fbank(torch.zeros(400)) - math.log(2.0**-23)).abs().max() < 1e-6
    with pytest.raises(Invalid, match="at least 400 samples"):
        audio.kaldi_fbank(torch.zeros(399))


@pytest.mark.parametrize("samples", [880, 2600, 16000, 16160, 40123])
def test_w2vbert_features_equal_transformers(samples):
    transformers = pytest.importorskip("transformers")
    wave = (random(samples, seed=samples) * 0.1 * torch.linspace(0.001, 1, samples)).float()
    extractor = transformers.SeamlessM4TFeatureExtractor(
        feature_size=80, num_mel_bins=80, sampling_rate=16000, padding_value=1.0, stride=2)
    want = extractor(wave.numpy(), sampling_rate=16000, return_tensors="pt")
    got = audio.w2vbert_features(wave)
    assert got.shape == want["input_features"][0].shape
    assert (got - want["input_features"][0]).abs().max() < 1e-4
    assert audio.w2vbert_valid(samples) == int(want["attention_mask"].sum())
    assert audio.w2vbert_features(wave[:560]).shape == (1, 160)
    with pytest.raises(Invalid, match="560 samples"):
        audio.w2vbert_features(wave[:559])


def test_features_of_real_speech_are_sane():
    if not SPEECH.is_dir():
        pytest.skip(f"no recordings at {SPEECH}")
    wave, rate = audio.read(SPEECH / "jfk.flac", rate=22050)
    assert abs(len(wave) / rate - 11) < 0.1
    mel = audio.mel_spectrogram(wave)
    assert mel.shape == (80, len(wave) // 256) and mel.isfinite().all() and -11.52 < mel.min() < mel.max() < 3
    features = audio.w2vbert_features(audio.resample(wave, 22050, 16000))
    assert abs(len(features) - 50 * 11) < 3 and abs(float(features.mean())) < 1e-3


# ------------------------------------------------------------------------------------------------ pictures


def test_a_tone_is_one_line_in_the_picture():
    low, high = (audio.mel_picture(torch.from_numpy(tone(f, 1, 24000)), 24000) for f in (300, 6000))
    assert low.shape[:2] == (1, 80) and 80 < low.shape[2] < 92 and 0 <= low.min() and low.max() == 1
    assert low[0].mean(1).argmax() > 60 and high[0].mean(1).argmax() < 25  # row 0 is the top of the picture
    assert audio.mel_picture(torch.zeros(10), 48000).isfinite().all()


def test_what_a_header_hides_is_read_whole(tmp_path):
    """An mp3 without an index, joined Ogg files, a FLAC of unknown length: any span of them is that of the whole sound."""
    loud = 0.3 * np.sin(np.arange(6 * 22050) * 0.05)
    whole = np.concatenate([0.001 * loud, loud]).astype("float32")
    soundfile.write(tmp_path / "a.mp3", whole, 22050, format="MP3", bitrate_mode="VARIABLE", compression_level=0.5)
    data = (tmp_path / "a.mp3").read_bytes()
    (tmp_path / "a.mp3").write_bytes(data[data.find(b"\xff\xf3", 4) :])
    assert audio.info(tmp_path / "a.mp3").seconds == pytest.approx(12, abs=0.1)
    wave, rate = audio.read(tmp_path / "a.mp3")
    assert len(wave) / rate == pytest.approx(12, abs=0.1) and wave[-rate:].abs().max() > 0.2

    for name in ("one", "two"):
        soundfile.write(tmp_path / f"{name}.ogg", loud if name == "one" else 0.5 * loud, 22050, format="OGG")
    (tmp_path / "both.ogg").write_bytes((tmp_path / "one.ogg").read_bytes() + (tmp_path / "two.ogg").read_bytes())
    assert audio.info(tmp_path / "both.ogg").frames == 2 * len(loud)
    one, two, both = (audio.read(tmp_path / f"{name}.ogg")[0] for name in ("one", "two", "both"))
    assert torch.equal(both, torch.cat([one, two]))
    assert torch.equal(audio.read(tmp_path / "both.ogg", start=5.0, end=7.0)[0], both[5 * 22050 : 7 * 22050])

    soundfile.write(tmp_path / "a.flac", loud, 22050)
    data = bytearray((tmp_path / "a.flac").read_bytes())
    expected = audio.read(tmp_path / "a.flac")[0]
    data[21], data[22:26] = data[21] & 0xF0, bytes(4)
    (tmp_path / "b.flac").write_bytes(data)
    assert torch.equal(audio.read(tmp_path / "b.flac")[0], expected)


def test_joined_recordings_of_two_rates_are_refused(tmp_path):
    for rate in (16000, 22050):
        soundfile.write(tmp_path / f"{rate}.ogg", 0.1 * np.sin(np.arange(rate) * 0.05), rate, format="OGG")
    (tmp_path / "both.ogg").write_bytes((tmp_path / "16000.ogg").read_bytes() + (tmp_path / "22050.ogg").read_bytes())
    with pytest.raises(Invalid, match="both.ogg: recordings of 16000 Hz with 1 channels and 22050 Hz"):
        audio.info(tmp_path / "both.ogg")


@pytest.mark.parametrize("kind", ("ogg", "aiff", "mp3"))
def test_half_a_file_is_called_cut_off(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    soundfile.write(path, 0.3 * np.sin(np.arange(3 * 16000) * 0.05), 16000, format=kind.upper())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(Invalid, match=f"a.{kind}: cut off"):
        audio.read(path)


def test_a_decoder_that_gives_less_than_its_container_holds_is_called_damaged(good, monkeypatch):
    # A flipped bit in a frame: the container is whole, libsndfile skips what it cannot decode.
    decode = audio._decode
    monkeypatch.setattr(audio, "_decode", lambda *place: decode(*place)[:-1000])
    with pytest.raises(Invalid, match="23000 of 24000 samples could be decoded"):
        audio.read(good)
