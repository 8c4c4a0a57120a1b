"""RepCodec, the semantic codec of MaskGCT and IndexTTS2: w2v-BERT vectors to one code per frame, and back.

    normalised features (B, T, 1024) ─conv, 12 ConvNeXt blocks, Linear─▶ (B, T, 1024) ─in_project─▶ (B, T, 8)
    (B, T, 8) ─nearest of 8192─▶ codes (B, T) ─▶ codebook rows (B, T, 8) ─out_project─▶ vectors (B, T, 1024)

Nearest means nearest in direction: the rows are normalised for the search alone, those that go on are the
raw ones (arXiv 2110.04627).
Paper: arXiv 2409.00750. Checkpoint: amphion/MaskGCT, semantic_codec/model.safetensors.
Attributes bear the published names. Always float32, as every codec here.
"""
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from models.parts import Invalid, checkpoint
from models.parts.layers import exact

UNUSED = {r"decoder\..*": "rebuilds w2v-BERT's vectors; IndexTTS2 2.0 goes on from the codebook's"}
EPS = 1e-6  # of every LayerNorm


def masked(x, mask):
    return x if mask is None else x * mask


class ConvNext(nn.Module):
    """ConvNeXt block (arXiv 2201.03545) in one dimension. (B, C, T) -> (B, C, T)

    mask: (B, 1, T), zero behind the end of a row.
    """

    def __init__(self, width, inner, kernel):
        super().__init__()
        self.dwconv = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.norm = nn.LayerNorm(width, EPS)
        self.pwconv1 = nn.Linear(width, inner)
        self.pwconv2 = nn.Linear(inner, width)
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x, mask):
        y = self.norm(self.dwconv(masked(x, mask)).transpose(1, 2))
        y = self.gamma * self.pwconv2(F.gelu(self.pwconv1(y)))
        return x + y.transpose(1, 2)


@dataclass
class BackboneSize:
    """What the shapes of a checkpoint tell of its Backbone."""

    channels: int  # of the features
    width: int
    inner: int  # width inside a block
    layers: int
    kernel: int  # of the convolution in front of the blocks
    block_kernel: int


class Backbone(nn.Module):
    """(B, T, C) -> (B, T, width)"""

    def __init__(self, size):
        super().__init__()
        width = size.width
        self.embed = nn.Conv1d(size.channels, width, size.kernel, padding=size.kernel // 2)
        self.norm = nn.LayerNorm(width, EPS)
        self.convnext = nn.ModuleList(
            ConvNext(width, size.inner, size.block_kernel) for _ in range(size.layers))
        self.final_layer_norm = nn.LayerNorm(width, EPS)

    def forward(self, x, mask):
        x = self.embed(masked(x.transpose(1, 2), mask))
        x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        for block in self.convnext:
            x = block(x, mask)
        return self.final_layer_norm(x.transpose(1, 2))


class Quantizer(nn.Module):
    def __init__(self, channels, bins, size):
        super().__init__()
        self.in_project = nn.Conv1d(channels, size, 1)
        # from_pretrained of nothing: an nn.Embedding's own draw imports a compiler on the meta device.
        self.codebook = nn.Embedding.from_pretrained(torch.empty(bins, size), freeze=False)
        self.out_project = nn.Conv1d(size, channels, 1)

    def encode(self, x):
        """(B, T, C) -> (B, T). Nearest in direction is the largest product; |z| scales all of them alike."""
        z = F.linear(x, self.in_project.weight[..., 0], self.in_project.bias)
        directions = F.normalize(self.codebook.weight, dim=-1)
        return (z @ directions.T).argmax(-1)

    def decode(self, codes):
        """(B, T) -> (B, T, C)"""
        rows = self.codebook(codes)
        return F.linear(rows, self.out_project.weight[..., 0], self.out_project.bias)


class Quantizers(nn.Module):  # the published names have one more level
    def __init__(self, *sizes):
        super().__init__()
        self.quantizers = nn.ModuleList([Quantizer(*sizes)])


class RepCodec(nn.Module):
    """quantize: (B, T, C) -> codes (B, T) int64 and vectors (B, T, C). vectors: codes (B, T) -> (B, T, C)."""

    def __init__(self, backbone, channels, bins, size):
        """backbone: the fields of BackboneSize as a dict. size: width of a row of the codebook."""
        super().__init__()
        backbone = BackboneSize(**backbone)
        self.encoder = nn.Sequential(Backbone(backbone), nn.Linear(backbone.width, channels))
        self.quantizer = Quantizers(channels, bins, size)
        self.bins = bins

    @property
    def device(self):
        return self.encoder[1].weight.device

    @torch.no_grad()
    def encode(self, features, lengths=None):
        """The vectors that are quantised. lengths: frames of each row; a row comes out as it would alone."""
        x = features.to(self.device, torch.float32)
        mask = None
        if lengths is not None and min(lengths) < x.shape[1]:
            lengths = torch.as_tensor(lengths, device=self.device)
            frames = torch.arange(x.shape[1], device=self.device)
            mask = (frames < lengths[:, None])[:, None]  # (B, 1, T)
        backbone, out = self.encoder
        with exact(self.device):
            return out(backbone(x, mask))

    def quantize(self, features, lengths=None):
        codes = self.quantizer.quantizers[0].encode(self.encode(features, lengths))
        return codes, self.vectors(codes)

    @torch.no_grad()
    def vectors(self, codes):
        """What upstream calls vq2emb, for any batch; upstream's call answers only for the first row."""
        if codes.numel():
            lowest, highest = int(codes.min()), int(codes.max())
            if lowest < 0 or highest >= self.bins:
                raise Invalid(f"semantic codes must lie in 0 ... {self.bins - 1}, "
                              f"got {lowest} ... {highest}. Cut at the stop code first.")
        return self.quantizer.quantizers[0].decode(codes.to(self.device))


def build(stored, what):
    """A codec on the meta device with the widths of the stored tensors."""
    def shape(name):
        if name not in stored:
            raise Invalid(f"{what}: no tensor {name}. Is this semantic_codec/model.safetensors of "
                          f"amphion/MaskGCT? Its names begin with {', '.join(sorted(stored)[:3])}.")
        return stored[name].shape

    embed = shape("encoder.0.embed.weight")
    blocks = [name for name in stored if re.fullmatch(r"encoder\.0\.convnext\.\d+\.gamma", name)]
    backbone = dict(
        channels=embed[1],
        width=embed[0],
        inner=shape("encoder.0.convnext.0.pwconv1.weight")[0],
        layers=len(blocks),
        kernel=embed[2],
        block_kernel=shape("encoder.0.convnext.0.dwconv.weight")[2])
    codebook = shape("quantizer.quantizers.0.codebook.weight")
    channels = shape("encoder.1.weight")[0]
    with torch.device("meta"):
        return RepCodec(backbone, channels, bins=codebook[0], size=codebook[1])


def load(path, device="cpu", allow_unused=False):
    """The codec from its weight file, or from a folder that holds it under one of its usual names."""
    names = ("semantic_codec_model.safetensors", "semantic_codec/model.safetensors", "model.safetensors")
    path = checkpoint.find(path, names, "the semantic codec of amphion/MaskGCT")
    stored = checkpoint.fold_weight_norm(checkpoint.read(path))
    codec = build(stored, str(path))
    checkpoint.fill(codec, stored, None, UNUSED, device=device, allow_unused=allow_unused, what=str(path))
    return codec.requires_grad_(False).eval()
