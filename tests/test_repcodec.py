"""RepCodec against Amphion's own code (golden tensors), its layout, and its properties."""
import json
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.codecs import repcodec
from models.parts import Invalid, checkpoint
from tests import tiny
from tests.test_higgs_codec import rounded_convolutions

GOLDEN = load_file(Path(__file__).parent / "golden" / "repcodec.safetensors")
LAYOUT = (239, 1434212269)  # tensors, and the checksum over names and shapes, of amphion/MaskGCT's semantic codec


def shapes(bins=64, channels=20, latent=5, width=12, inner=28, layers=3):
    """Every tensor of a published semantic codec."""
    out = {}
    for half in ("encoder", "decoder"):
        out[f"{half}.0.embed.weight"] = [width, channels, 7]
        for name in ("embed.bias", "norm.weight", "norm.bias", "final_layer_norm.weight", "final_layer_norm.bias"):
            out[f"{half}.0.{name}"] = [width]
        for i in range(layers):
            block = {"gamma": [width], "dwconv.weight": [width, 1, 7], "dwconv.bias": [width], "norm.weight": [width],
                     "norm.bias": [width], "pwconv1.weight": [inner, width], "pwconv1.bias": [inner],
                     "pwconv2.weight": [width, inner], "pwconv2.bias": [width]}
            out.update({f"{half}.0.convnext.{i}.{k}": v for k, v in block.items()})
        out.update({f"{half}.1.weight": [channels, width], f"{half}.1.bias": [channels]})
    quantizer = {"in_project.bias": [latent], "in_project.weight_g": [latent, 1, 1], "in_project.weight_v": [latent, channels, 1],
                 "out_project.bias": [channels], "out_project.weight_g": [channels, 1, 1],
                 "out_project.weight_v": [channels, latent, 1], "codebook.weight": [bins, latent]}
    return {**out, **{f"quantizer.quantizers.0.{k}": v for k, v in quantizer.items()}}


def checksum(shapes):
    return len(shapes), zlib.crc32(json.dumps(sorted((k, list(v)) for k, v in shapes.items())).encode())


def tensors(**sizes):
    """The weights of the script that made the golden tensors."""
    return {k: v - 1 if k.endswith("bias") else v for k, v in tiny.fill(shapes(**sizes)).items()}


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    path = tmp_path_factory.mktemp("repcodec") / "semantic_codec_model.safetensors"
    save_file(tensors(), path)
    return repcodec.load(path)


def test_vectors_and_codes_are_those_of_the_original(codec):
    codes, vectors = codec.quantize(GOLDEN["x"])
    torch.testing.assert_close(codec.encode(GOLDEN["x"]), GOLDEN["before"], rtol=1e-4, atol=1e-5)
    assert GOLDEN["gap"].min() > 1e-3 and torch.equal(codes, GOLDEN["codes"]) and codes.dtype == torch.int64
    torch.testing.assert_close(vectors, GOLDEN["vectors"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(codec.vectors(torch.arange(64)[None])[0], GOLDEN["embedded"], rtol=1e-4, atol=1e-5)


def test_vectors_of_codes_are_those_of_quantize_for_every_row(codec):
    codes, vectors = codec.quantize(GOLDEN["x"])
    assert torch.equal(codec.vectors(codes), vectors) and not torch.equal(vectors[0], vectors[1])


def test_a_row_of_a_padded_batch_comes_out_as_alone(codec):
    x, lengths = GOLDEN["x"].clone(), [30, 17]
    alone = codec.encode(x[1:, :17])
    x[1, 17:] = 7.0
    torch.testing.assert_close(codec.encode(x, lengths)[1:, :17], alone, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(codec.encode(x, lengths)[0], GOLDEN["before"][0], rtol=1e-4, atol=1e-5)
    assert torch.equal(codec.quantize(x, lengths)[0][1, :17], codec.quantize(x[1:, :17])[0][0])
    assert not torch.allclose(codec.encode(x)[1:, :17], alone, atol=1e-3)


def test_no_convolution_is_rounded_on_a_gpu(codec, monkeypatch):
    outside, inside = rounded_convolutions(repcodec, codec, lambda: codec.quantize(GOLDEN["x"]), monkeypatch)
    assert not outside and len(inside) == 4


def test_the_published_layout_fits_and_every_tensor_of_it_has_a_place():
    real = shapes(bins=8192, channels=1024, latent=8, width=384, inner=2048, layers=12)
    assert checksum(real) == LAYOUT
    stored = checkpoint.fold_weight_norm({k: checkpoint.Stored(s, torch.float32, lambda s=s: torch.empty(s, device="meta"))
                                          for k, s in real.items()})
    model = repcodec.build(stored, "layout")
    left = checkpoint.fill(model, stored, None, repcodec.UNUSED, device="meta")
    assert len(left) == 116 and all(k.startswith("decoder.") for k in left)
    assert len(stored) - len(left) == len(list(model.parameters()))


def test_noise_on_any_tensor_changes_codes_or_vectors(codec):
    def noise(x):
        return x + 0.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))

    before = codec.encode(GOLDEN["x"]), *codec.quantize(GOLDEN["x"])
    for name, p in codec.named_parameters():
        kept = p.data
        p.data = noise(kept)
        after = codec.encode(GOLDEN["x"]), *codec.quantize(GOLDEN["x"])
        assert any((a - b).abs().max() > 1e-3 for a, b in zip(before, after)), name
        p.data = kept
    for project in ("in_project", "out_project"):  # in the file these are two tensors each
        pair = {k: v for k, v in tensors().items() if project in k and "weight" in k}
        for name in pair:
            folded = [checkpoint.fold_weight_norm({k: checkpoint.Stored(v.shape, v.dtype, lambda v=v: v) for k, v in weights.items()})
                      for weights in (pair, {**pair, name: noise(pair[name])})]
            weight = f"quantizer.quantizers.0.{project}.weight"
            assert (folded[0][weight].load() - folded[1][weight].load()).abs().max() > 1e-2


@pytest.mark.parametrize("sizes", [dict(bins=7, channels=6, latent=3, width=10, inner=9, layers=1), dict(latent=2, layers=4)])
def test_widths_come_from_the_tensors(tmp_path, sizes):
    save_file(tensors(**sizes), tmp_path / "semantic_codec_model.safetensors")
    codec = repcodec.load(tmp_path)
    codes, vectors = codec.quantize(torch.randn(1, 9, sizes.get("channels", 20)))
    assert codes.shape == (1, 9) and vectors.shape == (1, 9, sizes.get("channels", 20)) and int(codes.max()) < sizes.get("bins", 64)


def test_what_does_not_fit_is_said(tmp_path, codec):
    with pytest.raises(Invalid, match="semantic_codec_model.safetensors"):
        repcodec.load(tmp_path)
    weights = tensors()
    save_file({k: v for k, v in weights.items() if k != "encoder.0.norm.bias"}, tmp_path / "a.safetensors")
    with pytest.raises(Invalid, match="missing encoder.0.norm.bias"):
        repcodec.load(tmp_path / "a.safetensors")
    save_file({**weights, "encoder.2.weight": torch.ones(1)}, tmp_path / "b.safetensors")
    with pytest.raises(Invalid, match="unexpected encoder.2.weight"):
        repcodec.load(tmp_path / "b.safetensors")
    repcodec.load(tmp_path / "b.safetensors", allow_unused=True)
    save_file({"layers.0.weight": torch.ones(1)}, tmp_path / "c.safetensors")
    with pytest.raises(Invalid, match="amphion/MaskGCT"):
        repcodec.load(tmp_path / "c.safetensors")
    with pytest.raises(Invalid, match="0 ... 63, got 0 ... 64"):
        codec.vectors(torch.tensor([[0, 64]]))
    assert not any(p.requires_grad for p in codec.parameters()) and not codec.training
