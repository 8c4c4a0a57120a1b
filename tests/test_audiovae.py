"""The VoxCPM codec: published layouts fit, pieces equal the whole, nothing looks ahead, lengths, files."""
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from models.codecs import audiovae
from models.parts import Invalid, checkpoint
from tests import conftest, tiny

LAYOUTS = Path(conftest.ROOT).parent / "shared/layouts"
CONFIGS = {  # audio_vae_config as published
    "0.5b": (None, audiovae.V1),
    "1.5": (dict(encoder_dim=64, encoder_rates=[2, 3, 6, 7, 7], latent_dim=64, decoder_dim=2048,
                 decoder_rates=[7, 7, 6, 3, 2], sample_rate=44100), audiovae.V1),
    "2": (dict(encoder_dim=128, encoder_rates=[2, 5, 8, 8], latent_dim=64, decoder_dim=2048, decoder_rates=[8, 6, 5, 2, 2, 2],
               sample_rate=16000, out_sample_rate=48000, sr_bin_boundaries=[20000, 30000, 40000]), audiovae.V2),
}
SMALL = dict(encoder_dim=4, encoder_rates=[2, 5, 3], latent_dim=6, decoder_dim=32, decoder_rates=[3, 5, 2], sample_rate=1600)
SMALL2 = dict(SMALL, decoder_rates=[6, 5, 3], out_sample_rate=4800)


def tiny_codec(small=SMALL, defaults=audiovae.V1):
    codec = tiny.fill_by_name(audiovae.AudioVAE(**audiovae.settings(small, defaults)))
    if codec.boundaries:
        assert codec.decoder.sr_bin_boundaries.tolist() == codec.boundaries
    codec.eval().requires_grad_(False)
    for name, p in codec.named_parameters():  # or the tanh saturates, and sin(a x) turns rounding into noise
        p.mul_(0.5 if p.ndim == 3 and name.endswith("weight") and "fc_" not in name else 1)
    return codec


both = pytest.mark.parametrize("codec", [tiny_codec(), tiny_codec(SMALL2, audiovae.V2)], ids=["v1", "v2"])


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.skipif(not LAYOUTS.is_dir(), reason="the published layouts are not here")
@pytest.mark.parametrize("version", CONFIGS)
def test_every_published_tensor_has_its_place(version):
    layout = json.loads((LAYOUTS / f"voxcpm-{version}-audiovae.json").read_text())
    dtypes = {"float32": torch.float32, "int32": torch.int32}
    stored = {k: checkpoint.Stored(shape, dtypes[d], lambda s=shape, d=d: torch.ones(s, dtype=dtypes[d], device="meta"))
              for k, (shape, d) in layout.items()}
    config, defaults = CONFIGS[version]
    with torch.device("meta"):
        codec = audiovae.AudioVAE(**audiovae.settings(config, defaults))
    assert checkpoint.fill(codec, checkpoint.fold_weight_norm(stored), device="meta") == []
    assert (codec.hop, codec.out_hop) == {"0.5b": (640, 640), "1.5": (1764, 1764), "2": (640, 1920)}[version]
    back = {k: [list(v.shape), str(v.dtype).removeprefix("torch.")] for k, v in published_shapes(codec).items()}
    assert back == layout


def published_shapes(codec):
    """published_state_dict without its arithmetic: the device is meta."""
    out = {}
    for name, t in codec.state_dict().items():
        if name.endswith(".weight") and t.ndim == 3:
            out[name + "_g"], out[name + "_v"] = t.new_empty(len(t), 1, 1), t
        else:
            out[name] = t
    return out


@both
def test_pieces_joined_equal_the_whole(codec):
    z = noise(23, 6)
    whole = codec.decode(z)
    assert whole.shape == (23 * codec.out_hop,) and whole.abs().max() < 1 and whole.std() > 0.01
    stream, pieces = codec.stream(), []
    for a, b in ((0, 1), (1, 2), (2, 2), (2, 9), (9, 10), (10, 23)):
        pieces.append(stream.decode(z[a:b]))
        assert len(pieces[-1]) == (b - a) * codec.out_hop
    assert (torch.cat(pieces) - whole).abs().max() < 2e-6


def test_what_a_stream_remembers_does_not_grow():
    codec = tiny_codec()
    stream = codec.stream()
    stream.decode(noise(30, 6))
    first = sum(t.untyped_storage().nbytes() for t in stream.past.values())
    stream.decode(noise(90, 6))
    assert first == sum(t.untyped_storage().nbytes() for t in stream.past.values()) < 40_000


@both
def test_nothing_looks_ahead(codec):
    z, wav = noise(12, 6), 0.1 * noise(12 * codec.hop)
    later = z.clone()
    later[7:] += 1
    assert torch.equal(codec.decode(later)[:7 * codec.out_hop], codec.decode(z)[:7 * codec.out_hop])
    assert not torch.equal(codec.decode(later)[7 * codec.out_hop:], codec.decode(z)[7 * codec.out_hop:])
    changed = wav.clone()
    changed[7 * codec.hop:] += 1
    assert torch.equal(codec.encode(changed)[:7], codec.encode(wav)[:7])


@both
@pytest.mark.parametrize("samples", [0, 1, 29, 30, 31, 90])
def test_frames_are_the_samples_over_the_hop_rounded_up(codec, samples):
    latents = codec.encode(noise(samples))
    assert latents.shape == (math.ceil(samples / 30), 6) and latents.dtype == torch.float32
    assert codec.decode(latents).shape == (len(latents) * codec.out_hop,)


@both
def test_unequal_clips_in_one_batch_change_nothing(codec):
    wavs = [0.1 * noise(n, seed=n) for n in (95, 30, 301)]
    for wav, latents in zip(wavs, codec.encode_batch(wavs)):
        alone = codec.encode(wav)
        assert latents.shape == alone.shape and (latents - alone).abs().max() < 1e-5
    both = torch.stack([wavs[2], wavs[2].flip(0)])
    assert (codec.encode(both)[1] - codec.encode(both[1])).abs().max() < 1e-5
    assert (codec.decode(codec.encode(both))[1] - codec.decode(codec.encode(both[1]))).abs().max() < 1e-5


@both
def test_long_audio_is_encoded_in_pieces_without_a_trace(codec, monkeypatch):
    wav = 0.1 * noise(30 * 40 + 7)
    whole = codec.encode(wav)
    monkeypatch.setitem(audiovae.CHUNK_FRAMES, "cpu", 8)
    assert (codec.encode(wav) - whole).abs().max() < 1e-5


def test_odd_strides_pad_one_sample_more_in_v1_only():
    odd, even = [{m.stride[0]: m.left for m in tiny_codec(SMALL, d).encoder.modules() if isinstance(m, audiovae.Conv) and m.stride[0] > 1}
                 for d in (audiovae.V1, dict(audiovae.V1, odd_stride_extra_pad=False))]
    assert odd == {2: 2, 5: 6, 3: 4} and even == {2: 2, 5: 5, 3: 3}


def test_snake_adds_its_epsilon_to_alpha():
    snake = audiovae.Snake(2)
    snake.alpha.data = torch.tensor([[[0.0], [2.0]]])
    x = noise(1, 2, 5)
    assert torch.allclose(snake(x)[:, 0], x[:, 0])  # 0/0 without the epsilon
    assert torch.allclose(snake(x)[:, 1], x[:, 1] + torch.sin(2 * x[:, 1]) ** 2 / 2)


def test_the_wanted_rate_chooses_its_bucket():
    codec, z = tiny_codec(SMALL2, audiovae.V2), noise(5, 6)
    assert [codec._bucket(r) for r in (8000, 20000, 20001, 30000, 40001, 48000)] == [0, 0, 1, 1, 3, 3]
    codec.out_sample_rate = 48000
    assert torch.equal(codec.decode(z), codec.decode(z, rate=48000)) and not torch.equal(codec.decode(z), codec.decode(z, rate=16000))
    assert torch.equal(codec.stream(16000).decode(z), codec.decode(z, rate=16000))
    with pytest.raises(Invalid, match="1600 Hz only, not to 8000"):
        tiny_codec().decode(z, rate=8000)


@both
def test_published_file_comes_back(codec, tmp_path):
    config, defaults = (SMALL2, audiovae.V2) if codec.boundaries else (SMALL, audiovae.V1)
    state = codec.published_state_dict()
    assert not any(k.endswith("weight") for k in state if "sr_cond" not in k)
    torch.save({"state_dict": state}, tmp_path / "audiovae.pth")
    save_file(state, tmp_path / "other.safetensors")
    wav = 0.1 * noise(95)
    for path in (tmp_path, tmp_path / "other.safetensors"):
        loaded = audiovae.load(path, config, defaults)
        assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
        assert (loaded.encode(wav) - codec.encode(wav)).abs().max() < 1e-5
        assert (loaded.decode(codec.encode(wav)) - codec.decode(codec.encode(wav))).abs().max() < 1e-5


def test_weight_norm_of_an_upsampling_layer_keeps_the_input_axis():
    reference = torch.nn.utils.parametrizations.weight_norm(torch.nn.ConvTranspose1d(6, 4, 10, stride=5))
    stored = {{"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}.get(k, k):
              checkpoint.Stored(v.shape, v.dtype, lambda v=v: 1.5 * v) for k, v in reference.state_dict().items()}
    layer = audiovae.Upsample(6, 4, 5)
    checkpoint.fill(layer, checkpoint.fold_weight_norm(stored))
    x = noise(1, 6, 7)
    expected = 1.5 * F.conv_transpose1d(x, reference.weight, reference.bias, 5)[:, :, :35]
    assert torch.allclose(layer(x), expected, atol=1e-6)


def test_noise_on_any_tensor_but_the_variance_is_heard():
    codec = tiny_codec(SMALL2, audiovae.V2)
    codec.out_sample_rate = 48000
    wav, z = 0.1 * noise(95), noise(5, 6)
    latents, audio = codec.encode(wav), codec.decode(z)
    for name, p in codec.named_parameters():
        kept = p.clone()
        p.add_(0.1 * noise(*p.shape))
        same = torch.equal(codec.encode(wav), latents) and torch.equal(codec.decode(z), audio)
        assert same == ("fc_logvar" in name), name
        p.copy_(kept)


def test_errors_say_what_is_wrong(tmp_path):
    with pytest.raises(Invalid, match="none of audiovae.safetensors, audiovae.pth. Expected the codec"):
        audiovae.load(tmp_path)
    with pytest.raises(Invalid, match="use_noise_block is True"):
        audiovae.settings({"use_noise_block": True}, audiovae.V1)
    with pytest.raises(Invalid, match="unknown keys encoder_dims"):
        audiovae.settings({"encoder_dims": 3}, audiovae.V1)
    with pytest.raises(Invalid, match=r"latents of shape \[3, 5\]"):
        tiny_codec().decode(noise(3, 5))
    state = tiny_codec().published_state_dict()
    del state["encoder.fc_mu.bias"]
    save_file(state, tmp_path / "audiovae.safetensors")
    with pytest.raises(Invalid, match="missing encoder.fc_mu.bias"):
        audiovae.load(tmp_path, SMALL)
    other = tiny_codec(SMALL2, audiovae.V2).published_state_dict()
    save_file(other, tmp_path / "audiovae.safetensors")
    with pytest.raises(Invalid, match="rate boundaries"):
        audiovae.load(tmp_path, dict(SMALL2, sr_bin_boundaries=[1, 2, 3]), audiovae.V2)
