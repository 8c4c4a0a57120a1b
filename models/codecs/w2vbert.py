"""w2v-BERT 2.0: 16 kHz speech as 50 vectors per second, read from the middle of a conformer.

    features (T, 160) ─LayerNorm, Linear─▶ state 0 ─layer 0─▶ state 1 ─ ... ─layer 16─▶ state 17 (T, 1024)

The features are those of audio.w2vbert_features. IndexTTS2 takes hidden state 17 of 24, so the layers behind
it are not even built. A layer is half a feed-forward, attention, convolution, half a feed-forward, each added
to its input, and a norm. Attention knows positions only by a learned vector for each distance, at most 64
back and 8 ahead; the convolution sees no later frame. Papers: arXiv 2108.06209 and 2312.05187; checkpoint:
facebook/w2v-bert-2.0. Attributes bear the published names.

Letters: B batch, T frames of 50 Hz, C channels, H heads, D head size.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from models.parts import Invalid, checkpoint
from models.parts.layers import FeatureProjection, FeedForward, exact
from models.parts.plain import as_record, fixed, need

# What the arithmetic below is; config.json may state these keys with no other value.
FIXED = dict(hidden_act=("swish", "silu"), position_embeddings_type="relative_key", add_adapter=False)


class LayerSize(NamedTuple):
    """The comments are the published values."""

    width: int  # 1024
    inner: int  # 4096
    heads: int  # 16
    left: int  # 64, the distances that attention tells apart
    right: int  # 8
    kernel: int  # 31
    eps: float  # 1e-5


class Attention(nn.Module):
    """scores = (q·k + q·E[distance]) / sqrt(D), where distance = key - query clamped to [-left, right]."""

    def __init__(self, width, heads, left, right):
        super().__init__()
        self.heads = heads
        self.left = left
        self.right = right
        self.linear_q = nn.Linear(width, width)
        self.linear_k = nn.Linear(width, width)
        self.linear_v = nn.Linear(width, width)
        self.linear_out = nn.Linear(width, width)
        # from_pretrained of nothing: an nn.Embedding's own draw imports a compiler on the meta device.
        distances = torch.empty(left + right + 1, width // heads)
        self.distance_embedding = nn.Embedding.from_pretrained(distances, freeze=False)

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, T, D)

    def forward(self, x, rows, mask):
        """rows: (T, T), of the embedding for each query and key. mask: (B, T) bool over keys, or None."""
        q = self.split(self.linear_q(x))
        k = self.split(self.linear_k(x))
        v = self.split(self.linear_v(x))
        scale = q.shape[-1] ** -0.5
        by_distance = q @ self.distance_embedding.weight.T * scale  # (B, H, T, left + right + 1)
        bias = by_distance.gather(-1, rows.expand(*q.shape[:2], -1, -1))  # (B, H, T, T)
        if mask is not None:
            bias = bias.masked_fill_(~mask[:, None, None], float("-inf"))
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.linear_out(x.transpose(1, 2).flatten(2))


class ConvModule(nn.Module):
    """Padded on the left only, so that no frame sees a later one. Nothing has a bias but the norms."""

    def __init__(self, width, kernel, eps):
        super().__init__()
        self.layer_norm = nn.LayerNorm(width, eps)
        self.pointwise_conv1 = nn.Conv1d(width, 2 * width, 1, bias=False)
        self.depthwise_conv = nn.Conv1d(width, width, kernel, groups=width, bias=False)
        self.depthwise_layer_norm = nn.LayerNorm(width, eps)
        self.pointwise_conv2 = nn.Conv1d(width, width, 1, bias=False)

    def forward(self, x, mask):
        x = self.layer_norm(x)
        if mask is not None:
            x = x * mask[..., None]
        x = F.linear(x, self.pointwise_conv1.weight[..., 0])  # a kernel of 1 is a Linear
        x = F.glu(x, -1)
        past = self.depthwise_conv.kernel_size[0] - 1
        x = F.pad(x.transpose(1, 2), (past, 0))
        x = self.depthwise_conv(x).transpose(1, 2)
        x = F.silu(self.depthwise_layer_norm(x))
        return F.linear(x, self.pointwise_conv2.weight[..., 0])


class Layer(nn.Module):
    def __init__(self, size):
        super().__init__()
        width, eps = size.width, size.eps
        self.ffn1_layer_norm = nn.LayerNorm(width, eps)
        self.ffn1 = FeedForward(width, size.inner, F.silu)
        self.self_attn_layer_norm = nn.LayerNorm(width, eps)
        self.self_attn = Attention(width, size.heads, size.left, size.right)
        self.conv_module = ConvModule(width, size.kernel, eps)
        self.ffn2_layer_norm = nn.LayerNorm(width, eps)
        self.ffn2 = FeedForward(width, size.inner, F.silu)
        self.final_layer_norm = nn.LayerNorm(width, eps)

    def forward(self, x, rows, mask):
        x = x + 0.5 * self.ffn1(self.ffn1_layer_norm(x))
        x = x + self.self_attn(self.self_attn_layer_norm(x), rows, mask)
        x = x + self.conv_module(x, mask)
        x = x + 0.5 * self.ffn2(self.ffn2_layer_norm(x))
        return self.final_layer_norm(x)


class Encoder(nn.Module):
    def __init__(self, layers, size):
        super().__init__()
        self.layers = nn.ModuleList(Layer(size) for _ in range(layers))


class W2vBert(nn.Module):
    """features (B, T, 160) -> hidden state `layers`, (B, T, C). sizes: those of LayerSize"""

    def __init__(self, features, layers, **sizes):
        super().__init__()
        size = LayerSize(**sizes)
        self.feature_projection = FeatureProjection(features, size.width, size.eps)
        self.encoder = Encoder(layers, size)
        self.left = size.left
        self.right = size.right

    @property
    def device(self):
        return self.feature_projection.projection.weight.device

    @torch.no_grad()
    def forward(self, features, lengths=None):
        """lengths: how many frames of each row attention may look at (audio.w2vbert_valid); all without it.

        A row comes out as it would alone. Frames behind its length are computed as well: of an odd number of
        filter bank frames the last row is such a one, and IndexTTS2 keeps it.
        """
        x = self.feature_projection(features.to(self.device, torch.float32))
        T = x.shape[1]
        at = torch.arange(T, device=self.device)
        mask = None
        if lengths is not None and min(lengths) < T:
            ends = torch.as_tensor(lengths, device=self.device)[:, None]
            mask = at < ends  # (B, T)
            x = x * mask[..., None]
        rows = at - at[:, None]  # from a query to a key
        rows = rows.clamp(-self.left, self.right) + self.left
        with exact(self.device):
            for layer in self.encoder.layers:
                x = layer(x, rows, mask)
        return x


def build(stored, config, layers, what):
    """A model on the meta device with the widths of the stored tensors and `layers` layers.

    config.json need only say what shapes cannot tell: 64 distances back, 8 ahead and eps 1e-5 are assumed
    without it.
    """
    def size(name, axis):
        if name not in stored:
            begin = ", ".join(sorted(stored)[:3])
            raise Invalid(f"{what}: no tensor {name}. Is this facebook/w2v-bert-2.0? "
                          f"Its names begin with {begin}.")
        return stored[name].shape[axis]

    config = as_record(config, f"{what}, its config.json")
    fixed(config, FIXED)
    first = "encoder.layers.0."
    width = size(first + "self_attn.linear_q.weight", 0)
    distances = size(first + "self_attn.distance_embedding.weight", 0)
    head_size = size(first + "self_attn.distance_embedding.weight", 1)
    left = need(config, "left_max_position_embeddings", int, 64, at_least=0)
    right = need(config, "right_max_position_embeddings", int, 8, at_least=0)
    held = 0
    while f"encoder.layers.{held}.ffn1_layer_norm.weight" in stored:
        held += 1
    if held < layers:
        raise Invalid(f"{what} has {held} layers, hidden state {layers} is wanted; "
                      "facebook/w2v-bert-2.0 has 24")
    if left + right + 1 != distances:
        raise Invalid(f"{what}: {distances} distances are stored, "
                      f"config.json speaks of {left} back and {right} ahead")
    with torch.device("meta"):
        return W2vBert(
            size("feature_projection.layer_norm.weight", 0), layers,
            width=width,
            left=left,
            right=right,
            inner=size(first + "ffn1.intermediate_dense.weight", 0),
            eps=need(config, "layer_norm_eps", float, 1e-5, at_least=0),
            heads=width // head_size,
            kernel=size(first + "conv_module.depthwise_conv.weight", 2))


def unused(stored, layers):
    """Names that nobody reads when the model stops at hidden state `layers`, with the reasons."""
    held = {int(name.split(".")[2]) for name in stored if name.startswith("encoder.layers.")}
    reasons = {"masked_spec_embed": "stands for masked frames in training"}
    for i in held:
        if i >= layers:
            reasons[rf"encoder\.layers\.{i}\..*"] = f"lies behind hidden state {layers}"
    return reasons


def load(path, layers=17, device="cpu", allow_unused=False):
    """w2v-BERT up to hidden state `layers`, from its folder or weight file; config.json may lie beside it."""
    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    path = checkpoint.find(path, names, "a copy of facebook/w2v-bert-2.0")
    beside = path.parent / "config.json"
    config = checkpoint.read_object(beside) if beside.is_file() else {}
    stored = checkpoint.read(path)
    model = build(stored, config, layers, str(path))
    known = unused(stored, layers)
    checkpoint.fill(model, stored, None, known, device=device, allow_unused=allow_unused, what=str(path))
    return model.requires_grad_(False).eval()
