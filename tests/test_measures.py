"""models/parts/measures.py against sounds and texts of which the answer is known."""
import math

import numpy as np
import pytest
import torch

from models.parts import measures


def buzz(hertz, seconds=1.0, rate=16000):
    """A voice-like tone: twelve harmonics that fall off."""
    t = torch.arange(int(seconds * rate)) / rate
    return 0.1 * sum(torch.sin(2 * math.pi * hertz * k * t + k) / k for k in range(1, 13)).float()


@pytest.mark.parametrize("rate", (16000, 22050, 48000))
@pytest.mark.parametrize("hertz", (70.0, 100.0, 123.4, 200.0, 220.0, 310.0, 450.0))
def test_pitch_of_a_known_tone(hertz, rate):
    median, spread = measures.pitch_facts(buzz(hertz, rate=rate), rate)
    assert median == pytest.approx(hertz, rel=0.005) and spread < 0.2


def test_a_pure_low_tone_is_not_heard_as_a_high_one():
    """Its difference at short lags is small, too; only against the mean of all shorter lags is the true period alone."""
    wave = torch.sin(2 * math.pi * 62 * torch.arange(16000) / 16000)
    assert measures.pitch_facts(wave, 16000)[0] == pytest.approx(62, rel=0.005)


def test_noise_and_silence_have_no_pitch():
    noise = torch.randn(16000, generator=torch.Generator().manual_seed(0)) * 0.1
    assert len(measures.pitch(noise, 16000)) < 3
    assert math.isnan(measures.pitch_facts(torch.zeros(16000), 16000)[0])
    assert math.isnan(measures.pitch_facts(torch.zeros(10), 16000)[0])


def test_the_spread_of_a_glide_is_in_semitones():
    wave = torch.cat([buzz(100.0), buzz(200.0)])
    assert measures.pitch_facts(wave, 16000)[1] == pytest.approx(12, abs=0.1)


def test_silence_at_the_end_is_counted_from_the_last_sound():
    wave = torch.cat([buzz(100.0), torch.zeros(8000)])
    assert measures.silence_at_end(wave, 16000) == pytest.approx(0.5, abs=0.02)
    assert measures.silence_at_end(buzz(100.0), 16000) == pytest.approx(0, abs=0.02)
    assert measures.silence_at_end(torch.zeros(0), 16000) == 0


NOISES = {
    "hiss": lambda n, t: torch.randn(n, generator=torch.Generator().manual_seed(1)),
    "rumble": lambda n, t: torch.nn.functional.avg_pool1d(torch.randn(1, 1, n + 499, generator=torch.Generator().manual_seed(1)), 500, 1)[0, 0],
    "hum": lambda n, t: sum(torch.sin(2 * math.pi * 50 * k * t) for k in range(1, 8)),
    "tone": lambda n, t: torch.sin(2 * math.pi * 440 * t),
    "silence": lambda n, t: torch.zeros(n),
}


def speech_like(rate):
    """Syllables of a fifth of a second with a rise and a fall, and a short hiss at the end, as in `types`."""
    n = rate // 5
    rise = torch.sin(math.pi * torch.arange(n) / n)
    syllables = torch.cat([buzz(hertz, 0.2, rate)[:n] * rise for hertz in (120, 150, 130, 110)])
    return torch.cat([syllables, 0.05 * torch.randn(rate // 5, generator=torch.Generator().manual_seed(2))])


@pytest.mark.parametrize("rate", (16000, 24000, 44100))
@pytest.mark.parametrize("name", NOISES)
def test_speech_ends_where_only_noise_follows(name, rate):
    speech = speech_like(rate)
    n = int(1.97 * rate)  # so that it sets in within a block
    noise = NOISES[name](n, torch.arange(n) / rate)
    noise = noise / noise.std().clamp(min=1e-9)
    seconds = len(speech) / rate
    for gap in (0, rate // 5, rate // 3):
        for level in (0.005, 0.03):
            wave = torch.cat([speech, torch.zeros(gap), level * noise])
            assert measures.end_of_speech(wave, rate) == pytest.approx(seconds, abs=0.1), (gap, level)
    click = torch.zeros(rate)
    click[rate // 2 : rate // 2 + rate // 100] = 0.3
    assert measures.end_of_speech(torch.cat([speech, click]), rate) == pytest.approx(seconds, abs=0.1)
    assert measures.end_of_speech(speech, rate) == pytest.approx(seconds, abs=0.051)
    assert measures.end_of_speech(noise, rate) == n / rate, "without any speech nothing can be behind it"


def test_the_end_of_speech_of_next_to_nothing():
    for n in (0, 1, 2, 100):
        assert measures.end_of_speech(torch.ones(n), 16000) == n / 16000


def test_level():
    assert measures.level(torch.ones(100)) == 0 and measures.level(torch.full((9,), 0.1)) == pytest.approx(-20, abs=1e-4)
    assert measures.level(torch.zeros(5)) == measures.level(torch.zeros(0)) == -120


def test_time_alignment_equals_the_plain_recursion():
    costs = np.random.default_rng(0).random((17, 23))
    best = np.full((17, 23), np.inf)
    length = np.zeros((17, 23))
    for i in range(17):
        for j in range(23):
            options = [(best[a, b], length[a, b]) for a, b in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if min(a, b) >= 0]
            before, steps = min(options, key=lambda o: o[0], default=(0.0, 0))
            best[i, j], length[i, j] = before + costs[i, j], steps + 1
    assert measures.aligned(costs) == pytest.approx(best[-1, -1] / length[-1, -1])


def test_the_cepstral_distance_ignores_level_and_pace_and_sees_another_sound():
    wave = torch.cat([buzz(100.0), buzz(250.0)])
    assert measures.mel_cepstral_distance(wave, 16000, wave, 16000) == pytest.approx(0, abs=1e-6)
    slow = torch.cat([buzz(100.0, 1.5), buzz(250.0, 0.7)])
    other = torch.randn(32000, generator=torch.Generator().manual_seed(0)) * 0.1
    near, far = (measures.mel_cepstral_distance(wave, 16000, w, 16000) for w in (slow, other))
    assert near < far / 3
    assert measures.mel_cepstral_distance(wave, 16000, 0.5 * wave, 16000) < 0.3


def test_the_cepstral_distance_is_in_decibels_of_the_envelope(monkeypatch):
    """Two envelopes that differ by cosines over the mel bands lie apart by the root mean square of that difference."""
    bands = (torch.arange(80) + 0.5) / 80
    flat, ripple = torch.zeros(80), 0.3 * torch.cos(3 * math.pi * bands) - 0.2 * torch.cos(7 * math.pi * bands)
    monkeypatch.setattr(measures.audio, "mel_spectrogram", lambda wave: (ripple if wave[0] else flat)[:, None].expand(80, 5))
    found = measures.mel_cepstral_distance(torch.zeros(100), 22050, torch.ones(100), 22050)
    decibels = 20 / math.log(10) * ripple.square().mean().sqrt()
    assert found == pytest.approx(decibels.item(), rel=1e-5)


@pytest.mark.parametrize("wanted, got, count", (("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("abc", "abc", 0)))
def test_edit_distance(wanted, got, count):
    assert measures.errors(wanted, got) == count


def test_word_errors_ignore_case_and_punctuation():
    assert measures.word_error_rate("Don't stop, now!", "don't stop now") == 0
    assert measures.word_error_rate("one two three four", "one too three") == 0.5
    assert measures.character_error_rate("\u0645\u0631\u062d\u0628\u0627", "\u0645\u0631\u062d\u0628") == pytest.approx(0.2)
