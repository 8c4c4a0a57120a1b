"""w2v-BERT live against transformers, its layout, and its properties."""
import json
import zlib

import pytest
import torch
from safetensors.torch import save_file

from models.codecs import w2vbert
from models.parts import Invalid, audio, checkpoint
from tests import tiny
from tests.test_higgs_codec import rounded_convolutions

LAYOUT = (773, 1915553377)  # tensors, and the checksum over names and shapes, of facebook/w2v-bert-2.0
SMALL = dict(features=12, width=24, inner=20, layers=4, heads=3, left=5, right=2, kernel=7)
CONFIG = {"left_max_position_embeddings": 5, "right_max_position_embeddings": 2}


def shapes(features, width, inner, layers, heads, left, right, kernel):
    """Every tensor of a published w2v-BERT 2.0."""
    def norm(name):
        return {f"{name}.weight": [width], f"{name}.bias": [width]}

    out = {"masked_spec_embed": [width], "feature_projection.layer_norm.weight": [features],
           "feature_projection.layer_norm.bias": [features], "feature_projection.projection.weight": [width, features],
           "feature_projection.projection.bias": [width]}
    layer = {**norm("ffn1_layer_norm"), **norm("self_attn_layer_norm"), **norm("conv_module.layer_norm"),
             **norm("conv_module.depthwise_layer_norm"), **norm("ffn2_layer_norm"), **norm("final_layer_norm"),
             "self_attn.distance_embedding.weight": [left + right + 1, width // heads],
             "conv_module.pointwise_conv1.weight": [2 * width, width, 1], "conv_module.depthwise_conv.weight": [width, 1, kernel],
             "conv_module.pointwise_conv2.weight": [width, width, 1]}
    for f in ("ffn1", "ffn2"):
        layer.update({f"{f}.intermediate_dense.weight": [inner, width], f"{f}.intermediate_dense.bias": [inner],
                      f"{f}.output_dense.weight": [width, inner], f"{f}.output_dense.bias": [width]})
    for p in "qkv", ["out"]:
        for name in p:
            layer.update({f"self_attn.linear_{name}.weight": [width, width], f"self_attn.linear_{name}.bias": [width]})
    for i in range(layers):
        out.update({f"encoder.layers.{i}.{k}": v for k, v in layer.items()})
    return out


def folder(path, config=CONFIG, **sizes):
    path.mkdir(exist_ok=True)
    save_file(tiny.fill(shapes(**{**SMALL, **sizes})), path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return w2vbert.load(folder(tmp_path_factory.mktemp("w2v") / "small"), layers=3)


def features(B=2, T=21, size=12):
    return torch.randn(B, T, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_hidden_states_are_those_of_transformers(tmp_path, attention):
    transformers = pytest.importorskip("transformers")
    config = transformers.Wav2Vec2BertConfig(
        hidden_size=24, num_hidden_layers=4, num_attention_heads=3, intermediate_size=20, feature_projection_input_dim=12,
        left_max_position_embeddings=5, right_max_position_embeddings=2, conv_depthwise_kernel_size=7, attn_implementation=attention)
    reference = tiny.fill_by_name(transformers.Wav2Vec2BertModel(config)).eval()
    reference.save_pretrained(tmp_path)
    x, lengths = features(3), [21, 20, 9]  # an odd number of filter bank frames leaves one masked row at the end
    x[0, 3:9] *= 1e-3  # quiet: the eps of the norms must show
    mask = (torch.arange(21) < torch.tensor(lengths)[:, None]).long()
    with torch.no_grad():
        wanted = reference(x, attention_mask=mask, output_hidden_states=True).hidden_states
        whole = reference(x[:1], output_hidden_states=True).hidden_states
    for layers in (1, 3):
        ours = w2vbert.load(tmp_path, layers=layers)
        torch.testing.assert_close(ours(x, lengths), wanted[layers], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours(x[:1]), whole[layers], rtol=1e-4, atol=1e-5)


def test_eps_comes_from_the_config_and_is_1e_5_without(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.Wav2Vec2BertConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20,
                                             feature_projection_input_dim=12, conv_depthwise_kernel_size=7, layer_norm_eps=0.02)
    reference = tiny.fill_by_name(transformers.Wav2Vec2BertModel(config)).eval()
    reference.save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = reference(features(), output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(w2vbert.load(tmp_path, layers=2)(features()), wanted, rtol=1e-4, atol=1e-5)
    (tmp_path / "config.json").unlink()
    assert {m.eps for m in w2vbert.load(tmp_path, layers=2).modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-5}


def test_a_row_of_a_padded_batch_comes_out_as_alone(model):
    x, lengths = features(), [21, 13]
    x[1, 14:] = 9.0  # row 1: 13 valid frames, frame 13 is masked yet kept, the rest belongs to the batch
    out = model(x, lengths)
    torch.testing.assert_close(out[1:, :14], model(x[1:, :14], [13]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out[:1], model(x[:1]), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(out[1:, :13], model(x)[1:, :13], atol=1e-2)


def test_attention_tells_distances_apart_up_to_their_bounds(model):
    """A late frame reaches an early one through attention, whose position term ends at left and right."""
    attention = model.encoder.layers[0].self_attn
    q = attention.linear_q(features(1, 21, 24)).unflatten(-1, (3, 8)).transpose(1, 2)
    k = attention.linear_k(features(1, 21, 24)).unflatten(-1, (3, 8)).transpose(1, 2)
    v = attention.linear_v(features(1, 21, 24)).unflatten(-1, (3, 8)).transpose(1, 2)
    out = torch.zeros(1, 3, 21, 8)
    for i in range(21):
        near = attention.distance_embedding.weight[[max(-5, min(2, j - i)) + 5 for j in range(21)]]  # (21, D)
        scores = (q[:, :, i : i + 1] @ k.transpose(-1, -2) + (q[:, :, i : i + 1] @ near.T)) / 8**0.5
        out[:, :, i : i + 1] = scores.softmax(-1) @ v
    at = torch.arange(21)
    ours = attention(features(1, 21, 24), (at - at[:, None]).clamp(-5, 2) + 5, None)
    torch.testing.assert_close(ours, attention.linear_out(out.transpose(1, 2).flatten(2)), rtol=1e-4, atol=1e-5)


def test_no_convolution_is_rounded_on_a_gpu(model, monkeypatch):
    outside, inside = rounded_convolutions(w2vbert, model, lambda: model(features()), monkeypatch)
    assert not outside and len(inside) == 3


def test_the_convolution_sees_no_later_frame(model):
    x, changed = features(1, 21, 24), features(1, 21, 24)
    changed[:, 12] = changed[:, 11]
    a, b = (model.encoder.layers[0].conv_module(v, None) for v in (x, changed))
    assert torch.equal(a[:, :12], b[:, :12])
    assert ((a - b).abs().amax((0, 2)) > 1e-4).nonzero()[:, 0].tolist() == list(range(12, 19))  # the kernel's 7 frames


def test_the_published_layout_fits_and_every_tensor_of_it_has_a_place():
    real = shapes(features=160, width=1024, inner=4096, layers=24, heads=16, left=64, right=8, kernel=31)
    assert (len(real), zlib.crc32(json.dumps(sorted((k, list(v)) for k, v in real.items())).encode())) == LAYOUT
    stored = {k: checkpoint.Stored(s, torch.float32, lambda s=s: torch.empty(s, device="meta")) for k, s in real.items()}
    model = w2vbert.build(stored, {}, 17, "layout")
    left = checkpoint.fill(model, stored, None, w2vbert.unused(stored, 17), device="meta")
    assert sorted({k.rsplit("layers.")[-1].split(".")[0] for k in left}) == ["17", "18", "19", "20", "21", "22", "23", "masked_spec_embed"]
    assert len(left) == 1 + 7 * 32 and len(real) - len(left) == len(list(model.parameters()))
    assert len(model.encoder.layers) == 17 and model.encoder.layers[0].self_attn.heads == 16


def test_noise_on_any_tensor_changes_the_hidden_state(model):
    x = features()
    before = model(x)
    for name, p in model.named_parameters():
        kept = p.data
        p.data = kept + torch.randn(kept.shape, generator=torch.Generator().manual_seed(1))
        change = (model(x) - before).abs().max()
        # A bias of the keys adds the same to all scores of a query, which softmax does not see.
        assert (change > 1e-3) != name.endswith("linear_k.bias"), (name, change)
        p.data = kept


@pytest.mark.parametrize("sizes", [dict(features=8, width=16, inner=6, heads=4, kernel=3), dict(width=30, heads=5, layers=3, kernel=11)])
def test_widths_come_from_the_tensors(tmp_path, sizes):
    model = w2vbert.load(folder(tmp_path / "w", **sizes), layers=3)
    x = features(1, 9, sizes.get("features", 12))
    assert model(x).shape == (1, 9, sizes["width"]) and model.encoder.layers[0].self_attn.heads == sizes["heads"]


def test_features_of_a_clip_go_in_as_they_come(tmp_path):
    model = w2vbert.load(folder(tmp_path / "w", features=160), layers=3)
    wave = torch.randn(16000, generator=torch.Generator().manual_seed(0)) * 0.1
    x = audio.w2vbert_features(wave)
    assert model(x[None], [audio.w2vbert_valid(16000)]).shape == (1, len(x), 24)


def test_what_does_not_fit_is_said(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(Invalid, match="facebook/w2v-bert-2.0"):
        w2vbert.load(tmp_path / "empty")
    small = folder(tmp_path / "small")
    with pytest.raises(Invalid, match="has 4 layers, hidden state 17 is wanted"):
        w2vbert.load(small)
    with pytest.raises(Invalid, match="8 distances are stored, config.json speaks of 64 back and 8 ahead"):
        w2vbert.load(folder(tmp_path / "distances", config={}), layers=3)
    with pytest.raises(Invalid, match="position_embeddings_type is 'rotary'"):
        w2vbert.load(folder(tmp_path / "rotary", config={**CONFIG, "position_embeddings_type": "rotary"}), layers=3)
    with pytest.raises(Invalid, match="hidden_act is 'gelu'"):
        w2vbert.load(folder(tmp_path / "act", config={**CONFIG, "hidden_act": "gelu"}), layers=3)
    weights = tiny.fill(shapes(**SMALL))
    del weights["encoder.layers.1.ffn1.output_dense.bias"]
    save_file(weights, small / "model.safetensors")
    with pytest.raises(Invalid, match="missing encoder.layers.1.ffn1.output_dense.bias"):
        w2vbert.load(small, layers=3)
    save_file({**tiny.fill(shapes(**SMALL)), "lm_head.weight": torch.ones(2)}, small / "model.safetensors")
    with pytest.raises(Invalid, match="unexpected lm_head.weight"):
        w2vbert.load(small, layers=3)
    assert len(w2vbert.load(small, layers=3, allow_unused=True).encoder.layers) == 3
