"""Mimi against transformers' MimiModel, and against golden tensors from the package of its authors."""
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from models.codecs import mimi
from models.parts import Invalid
from models.parts.checkpoint import Stored
from tests import conftest, tiny, tiny_csm

GOLDEN = Path(__file__).parent / "golden" / "mimi.safetensors"
LAYOUTS = Path(conftest.ROOT).parent / "shared/layouts"
SPEECH = Path(conftest.ROOT).parent / "shared/audio"


def stored(weights):
    return {n: Stored(w.shape, w.dtype, lambda w=w: w) for n, w in weights.items()}


def noise(n, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)) * 0.5


def settings(**more):
    return {**tiny_csm.config()["codec_config"], **more}


def weights(s):
    return tiny_csm.codec_weights({"codec_config": s})


def reference(s):
    transformers = pytest.importorskip("transformers")
    codec = transformers.MimiModel(transformers.MimiConfig(**{k: v for k, v in s.items() if k != "model_type"})).eval()
    own = {n.replace("encoder.encoder_seanet.", "encoder.").replace("decoder.decoder_seanet.", "decoder.")
           .replace("encoder.encoder_transformer.", "encoder_transformer.").replace("decoder.decoder_transformer.", "decoder_transformer.")
           .replace("encoder.downsample.", "downsample.").replace("decoder.upsample.", "upsample.")
           .replace("encoder.quantizer.", "quantizer.").replace("decoder.quantizer.", "quantizer."): n for n in codec.state_dict()}
    w = weights(s)
    assert set(own) == set(w)
    codec.load_state_dict({n: w[o] for o, n in own.items()})
    return codec


# Other widths, depths and strides than the published ones, each of them once.
CONFIGS = {
    "tiny": {},
    "other widths": dict(num_filters=6, hidden_size=48, upsampling_ratios=[4, 3, 2], codebook_size=16, codebook_dim=12,
                         vector_quantization_hidden_dimension=12, num_quantizers=5, upsample_groups=48, num_hidden_layers=3,
                         intermediate_size=56, num_attention_heads=2, num_key_value_heads=2, head_dim=24, sliding_window=9),
    "ungrouped": dict(num_quantizers=10, upsample_groups=1, rope_theta=500.0, norm_eps=1e-3),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_codes_and_audio_equal_transformers(name):
    s = settings(**CONFIGS[name])
    theirs, ours = reference(s), mimi.load(stored(weights(s)), s)
    frame, T = ours.config.frame, 40
    assert frame == 2 * torch.tensor(s["upsampling_ratios"]).prod()
    wav = 3 * noise(frame * T)
    with torch.no_grad():
        codes = theirs.encode(wav[None, None]).audio_codes[0]
        decoded = theirs.decode(codes[None]).audio_values[0, 0]
    assert codes.shape == (s["num_quantizers"], T) and all(len(c.unique()) > 3 for c in codes)
    got = ours.encode(wav)
    assert got.dtype == torch.int64 and torch.equal(got, codes)
    torch.testing.assert_close(ours.decode(codes), decoded, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("moshi", [True, False])
def test_golden_tensors_of_the_authors_package(moshi):
    with safe_open(GOLDEN, "pt") as f:
        golden, said = {k: f.get_tensor(k) for k in f.keys()}, {k: json.loads(v) for k, v in f.metadata().items() if k != "format"}
    w = {n: t - 1 if n.endswith("bias") else t for n, t in tiny.fill(said["shapes"]).items()}
    if not moshi:  # through our own converter and back
        w = mimi.published(mimi.load(stored(w), said["settings"]))
    codec = mimi.load(stored(w), said["settings"])
    assert torch.equal(codec.encode(golden["wav"]), golden["codes"].long())
    torch.testing.assert_close(codec.decode(golden["codes"]), golden["decoded"], rtol=1e-4, atol=1e-5)
    fewer = mimi.load(stored(w), said["settings"], codebooks=3)
    assert torch.equal(fewer.encode(golden["wav"]), golden["codes"][:3].long())
    torch.testing.assert_close(fewer.decode(golden["codes"][:3]), golden["decoded_3"], rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not LAYOUTS.exists(), reason="the lists of published tensors are not here")
@pytest.mark.parametrize("naming", ["original", "transformers"])
def test_every_published_tensor_has_its_place_at_real_shapes(naming):
    layout = json.loads((LAYOUTS / f"mimi-{naming}.json").read_text())
    file = {n: Stored(shape, torch.float32, lambda shape=shape: torch.empty(shape, device="meta")) for n, (shape, _) in layout.items()}
    codec = mimi.load(file, device="meta")
    assert (codec.codebooks, codec.config.frame, codec.config.head_dim) == (32, 1920, 64)
    written = mimi.published(codec, "moshi" if naming == "original" else naming)
    assert {n: list(w.shape) for n, w in written.items()} == {n: shape for n, (shape, _) in layout.items()}


def test_both_namings_are_one_codec_and_are_written_back_exactly():
    s = settings()
    w = weights(s)
    theirs = tiny_csm.moshi_names(w, s)
    a, b = mimi.load(stored(w), s), mimi.load(stored(theirs), s)
    assert a.fingerprint() == b.fingerprint() != mimi.load(stored(w), s, codebooks=4).fingerprint()
    for naming, file in (("moshi", theirs), ("transformers", w)):
        back = mimi.published(b, naming)
        assert back.keys() == file.keys() and all(torch.equal(x, back[n]) for n, x in file.items() if not n.endswith("initialized"))
    older = {n.replace("_initialized", "inited").replace("cluster_usage", "cluster_size").replace("embedding_sum", "embed_avg"): x
             for n, x in theirs.items()}
    newer = {n.replace("in_proj_weight", "in_projs.0.weight").replace("out_proj.weight", "out_projs.0.weight"): x for n, x in theirs.items()}
    assert a.fingerprint() == mimi.load(stored(older), s).fingerprint() == mimi.load(stored(newer), s).fingerprint()


@pytest.fixture(scope="module")
def codec():
    s = settings(sliding_window=250)
    return mimi.load(stored(weights(s)), s)


@pytest.mark.parametrize("sizes", [[1] * 135, [7] * 19 + [2], [130, 1, 4], [0, 126, 9]])
def test_streaming_equals_batch_past_the_window(codec, sizes):
    """270 steps of the transformer, window 250: one frame at a time, odd pieces, one piece that crosses the border."""
    codes = torch.randint(0, 32, (8, 135), generator=torch.Generator().manual_seed(1))
    whole, stream, parts, at = codec.decode(codes), codec.stream(), [], 0
    for size in sizes:
        parts.append(stream.decode(codes[:, at : at + size]))
        assert parts[-1].shape == (1920 * size,)
        at += size
    assert at == 135
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=2e-6 * float(whole.abs().max()))
    assert all(x.shape[2] <= 249 for pair in stream.state.values() if isinstance(pair, tuple) for x in pair)


def test_the_window_matters_and_is_exact(codec):
    """A frame 126 frames back no longer reaches the attention of the newest one, through one layer; 124 back it does."""
    attention, g = codec.decoder_transformer.layers[0].self_attn, torch.Generator().manual_seed(0)
    x = torch.randn(1, 260, 32, generator=g)
    rope = mimi.rotary(torch.arange(260), codec.decoder_transformer.frequencies)
    before = attention(x, rope, {})
    for back, seen in ((249, True), (250, False)):
        y = x.clone()
        y[0, 259 - back] += 1
        assert bool((attention(y, rope, {})[0, 259] != before[0, 259]).any()) == seen


def test_long_clips_are_attended_in_blocks(codec):
    attention, x = codec.encoder_transformer.layers[0].self_attn, torch.randn(1, 1100, 32, generator=torch.Generator().manual_seed(0))
    rope = mimi.rotary(torch.arange(1100), codec.encoder_transformer.frequencies)
    state, whole = {}, attention(x, rope, {})
    parts = [attention(x[:, a : a + 550], tuple(t[a : a + 550] for t in rope), state) for a in (0, 550)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)


def test_a_batch_of_clips_decodes_as_each_alone(codec):
    codes = torch.randint(0, 32, (3, 8, 20), generator=torch.Generator().manual_seed(1))
    stream = codec.stream()
    both = torch.cat([stream.decode(codes[:, :, :12]), stream.decode(codes[:, :, 12:])], 1)
    for row, alone in zip(both, codes):
        torch.testing.assert_close(row, codec.decode(alone), rtol=0, atol=1e-5)


@pytest.mark.parametrize("n", [1, 1919, 1920, 1921, 5000])
def test_waves_are_padded_with_zeros_to_whole_frames(codec, n):
    wav = noise(n)
    T = -(-n // 1920)
    codes = codec.encode(wav)
    assert codes.shape == (8, T) and codec.decode(codes).shape == (1920 * T,)
    assert torch.equal(codes, codec.encode(torch.cat([wav, torch.zeros(1920 * T - n)])))


def test_codes_of_a_prefix_are_the_prefix_of_the_codes(codec):
    wav = noise(1920 * 12)
    assert torch.equal(codec.encode(wav)[:, :7], codec.encode(wav[: 1920 * 7]))


@pytest.mark.parametrize("k", [1, 3, 7])
def test_fewer_codebooks_are_a_prefix_on_both_sides(codec, k):
    s = settings(sliding_window=250)
    wav = noise(1920 * 3)
    whole = codec.encode(wav)
    if k > 1:
        assert torch.equal(mimi.load(stored(weights(s)), s, codebooks=k).encode(wav), whole[:k])
    zeroed = mimi.load(stored({n: x * (not n.endswith("embed_sum") or "semantic" in n or int(n.split(".")[3]) < k - 1)
                               for n, x in weights(s).items()}), s)
    torch.testing.assert_close(codec.decode(whole[:k]), zeroed.decode(whole), rtol=1e-5, atol=1e-5)


def test_a_centroid_that_was_never_used_stays_unused():
    s = settings()
    w = weights(s)
    name = "quantizer.semantic_residual_vector_quantizer.layers.0.codebook"
    w[f"{name}.cluster_usage"][5] = 0
    codec, theirs = mimi.load(stored(w), s), reference(s)
    books = [m for n, m in theirs.named_modules() if n.endswith("semantic_residual_vector_quantizer.layers.0.codebook")]
    for book in books:
        book.cluster_usage[5], book._embed = 0, None
    own = codec.quantizer.semantic_residual_vector_quantizer.layers[0].codebook
    torch.testing.assert_close(own.centroids, books[0].embed)
    wav = noise(1920 * 20)
    assert own.centroids[5].abs().max() > 1e3 and not (codec.encode(wav)[0] == 5).any()
    with torch.no_grad():
        assert torch.equal(codec.encode(wav), theirs.encode(wav[None, None]).audio_codes[0])


def test_every_tensor_does_something():
    s = settings(num_quantizers=3, upsampling_ratios=[3, 2], num_hidden_layers=1)
    w = weights(s)
    codec, wav = mimi.load(stored(w), s), noise(12 * 30)
    codes, audio = codec.encode(wav), codec.decode(codec.encode(wav))
    for name, x in w.items():
        if name.endswith("initialized"):
            continue
        changed = {**w, name: x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))}
        other = mimi.load(stored(changed), s)
        assert not torch.equal(other.encode(wav), codes) or not torch.equal(other.decode(codes), audio), name


def test_it_stays_float32_and_frozen(codec):
    assert all(not p.requires_grad and p.dtype == torch.float32 for p in codec.parameters()) and not codec.training
    assert torch.equal(codec.encode(noise(4000).double()), codec.encode(noise(4000)))


def test_what_a_user_can_get_wrong(codec):
    with pytest.raises(Invalid, match="mono"):
        codec.encode(torch.zeros(2, 1920))
    with pytest.raises(Invalid, match="at least one sample"):
        codec.encode(torch.zeros(0))
    with pytest.raises(Invalid, match="codes 0 to 31.*mask_special"):
        codec.decode(torch.full((8, 2), 32))
    with pytest.raises(Invalid, match="1 to 8 codebooks"):
        codec.decode(torch.zeros(9, 2, dtype=torch.long))
    s = settings()
    with pytest.raises(Invalid, match="8 codebooks, but 32 are wanted"):
        mimi.load(stored(weights(s)), s, codebooks=32)
    with pytest.raises(Invalid, match="unexpected extra.weight"):
        mimi.load(stored({**weights(s), "extra.weight": torch.zeros(1)}), s)
    with pytest.raises(Invalid, match="missing decoder.layers.0.conv.bias"):
        mimi.load(stored({n: x for n, x in weights(s).items() if n != "decoder.layers.0.conv.bias"}), s)
    with pytest.raises(Invalid, match="not a Mimi codec"):
        mimi.load(stored({"a.weight": torch.zeros(1)}), s)
    with pytest.raises(Invalid, match="use_causal_conv"):
        mimi.load(stored(weights(s)), {**s, "use_causal_conv": False})


@pytest.mark.skipif(not SPEECH.exists(), reason="the real speech is not here")
def test_real_speech_gives_the_codes_of_transformers():
    from models.parts import audio

    s = settings(sliding_window=250)
    theirs, ours = reference(s), mimi.load(stored(weights(s)), s)
    wav, _ = audio.read(SPEECH / "jfk.flac", 24000)
    wav = wav[: len(wav) // 1920 * 1920]
    with torch.no_grad():
        assert torch.equal(ours.encode(wav), theirs.encode(wav[None, None]).audio_codes[0])
