"""Resampling, filter banks and mels by torchaudio and by IndexTTS2's own code: python make_audio.py INDEX_TTS_FOLDER

INDEX_TTS_FOLDER is a checkout of index-tts/index-tts at ee40fa7. Writes audio.safetensors beside this script.
"""
import sys
from pathlib import Path

import torch
import torchaudio
from safetensors.torch import save_file

sys.path.insert(0, sys.argv[1])
from indextts.s2mel.modules.audio import mel_spectrogram  # noqa: E402

PAIRS = [(44100, 16000), (24000, 16000), (22050, 16000), (16000, 22050), (48000, 44100), (8000, 24000), (16000, 8000)]

g = torch.Generator().manual_seed(0)
at = torch.arange(2600, dtype=torch.float64)
x = 0.3 * torch.sin(at**2 * 6e-4) + 0.1 * torch.sin(at * 0.11) * torch.linspace(0, 1, 2600) ** 4
x = (x + 0.05 * torch.randn(2600, generator=g, dtype=torch.float64)).float()
out = {"x": x}
for a, b in PAIRS:
    out[f"resample.{a}.{b}"] = torchaudio.functional.resample(x[:1501], a, b)
for name, level in (("mel", 1.0), ("mel.quiet", 1e-4)):  # the quiet one lies about the floor and the epsilon
    out[name] = mel_spectrogram(x[None] * level, 1024, 80, 22050, 256, 1024, 0, None, center=False)[0]
for scale in (1, 32768):
    fbank = torchaudio.compliance.kaldi.fbank(x[None].double() * scale, num_mel_bins=80, dither=0, sample_frequency=16000)
    out[f"fbank.{scale}"] = fbank.float()
save_file(out, str(Path(__file__).with_name("audio.safetensors")))
