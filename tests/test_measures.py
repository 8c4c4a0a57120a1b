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


@pytest.mark.parametrize("wanted, got, count", (("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("abc", "abc", 0)))
def test_edit_distance(wanted, got, count):
    assert measures.errors(wanted, got) == count


def test_word_errors_ignore_case_and_punctuation():
    assert measures.word_error_rate("Don't stop, now!", "don't stop now") == 0
    assert measures.word_error_rate("one two three four", "one too three") == 0.5
    assert measures.character_error_rate("\u0645\u0631\u062d\u0628\u0627", "\u0645\u0631\u062d\u0628") == pytest.approx(0.2)
