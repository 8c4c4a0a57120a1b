"""What turns the features of a clip into a few vectors: a conformer that halves the rate, then a resampler.

    features (B, T, F) ─convolution, Linear─▶ (B, (T - 1) // 2, C) ─conformer blocks─▶ (B, T', C)
    n learned latents ─attend to the frames and to themselves, twice─▶ (B, n, D)

The conformer is WeNet's (arXiv 2102.01547) with LayerNorm inside the convolution and one full feed-forward
per block; the resampler is a Perceiver (arXiv 2204.14198). Attributes bear the names under which IndexTTS2
published them. The convolutions of kernel 1 are Linears here, so that an adapter finds them; in the files
their weights have a third axis.

Letters: B batch, T frames, F features, C width of the conformer, D width of the latents, H heads.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

HEAD_SIZE = 64  # of the resampler's attention, whatever its width
SMALLEST = 3  # frames: the kernel of the first convolution


def halved(lengths):
    """How many frames are left of each clip after the first convolution."""
    return (lengths - 1) // 2


class ConformerSize(NamedTuple):
    """The comments are IndexTTS2's values for the voice."""

    features: int  # 1024
    width: int  # 512
    inner: int  # 2048
    heads: int  # 8
    blocks: int  # 6
    kernel: int  # 15
    rows: int  # 5000, of the table of positions


class ResamplerSize(NamedTuple):
    context: int  # 512, the width of what is attended to
    width: int  # 1280
    latents: int  # 32
    heads: int  # 8
    inner: int  # 1706
    layers: int  # 2


class Positions(nn.Module):
    """A stored table. It is a sinusoid, but rounded in a published file, so it is never computed here."""

    def __init__(self, rows, width):
        super().__init__()
        self.register_buffer("pe", torch.empty(1, rows, width))


class Subsampling(nn.Module):
    """(B, T, F) -> (B, (T - 1) // 2, C), times sqrt(C). No position is added: attention takes the table."""

    def __init__(self, features, width, rows):
        super().__init__()
        columns = width * halved(features)
        self.conv = nn.Sequential(nn.Conv2d(1, width, 3, 2), nn.ReLU())
        self.out = nn.Sequential(nn.Linear(columns, width))
        self.pos_enc = Positions(rows, width)

    def forward(self, x):
        x = self.conv(x[:, None])  # (B, C, T', F')
        x = self.out(x.transpose(1, 2).flatten(2))  # channels outer, features inner
        return x * math.sqrt(x.shape[-1])


class Attention(nn.Module):
    """scores = ((q + u) k + (q + v) p) / sqrt(D).

    p belongs to the key's place in the clip, not to a distance: nothing is shifted, unlike in Transformer-XL,
    from which u and v come.
    """

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.linear_q = nn.Linear(width, width)
        self.linear_k = nn.Linear(width, width)
        self.linear_v = nn.Linear(width, width)
        self.linear_out = nn.Linear(width, width)
        self.linear_pos = nn.Linear(width, width, bias=False)
        self.pos_bias_u = nn.Parameter(torch.zeros(heads, width // heads))
        self.pos_bias_v = nn.Parameter(torch.zeros(heads, width // heads))

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, T, D)

    def forward(self, x, table, mask):
        """x (B, T, C), table (1, T, C), mask (B, T) bool over keys."""
        q = self.split(self.linear_q(x))
        k = self.split(self.linear_k(x))
        v = self.split(self.linear_v(x))
        p = self.split(self.linear_pos(table))
        # Written out: where the bias is trained, the fused kernel is another one with other last bits.
        by_content = (q + self.pos_bias_u[:, None]) @ k.transpose(-1, -2)
        by_place = (q + self.pos_bias_v[:, None]) @ p.transpose(-1, -2)
        scores = (by_content + by_place) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~mask[:, None, None], -math.inf)
        y = scores.softmax(-1) @ v  # (B, H, T, D)
        y = y.transpose(1, 2).flatten(2)
        return self.linear_out(y)


class ConvModule(nn.Module):
    def __init__(self, width, kernel):
        super().__init__()
        self.pointwise_conv1 = nn.Linear(width, 2 * width)
        self.depthwise_conv = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.pointwise_conv2 = nn.Linear(width, width)

    def forward(self, x, mask):
        x = F.glu(self.pointwise_conv1(x * mask[..., None]), -1)
        # Behind the end of a clip stands a bias by now, and the wide kernel would carry it into the clip. The
        # original lets that happen in a padded batch; zeroed again, a clip comes out as the original computes
        # it alone.
        x = self.depthwise_conv((x * mask[..., None]).transpose(1, 2)).transpose(1, 2)
        x = self.pointwise_conv2(F.silu(self.norm(x)))
        return x * mask[..., None]


class FeedForward(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.w_1 = nn.Linear(width, inner)
        self.w_2 = nn.Linear(inner, width)

    def forward(self, x):
        return self.w_2(F.silu(self.w_1(x)))


class Block(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.norm_mha = nn.LayerNorm(size.width)
        self.self_attn = Attention(size.width, size.heads)
        self.norm_conv = nn.LayerNorm(size.width)
        self.conv_module = ConvModule(size.width, size.kernel)
        self.norm_ff = nn.LayerNorm(size.width)
        self.feed_forward = FeedForward(size.width, size.inner)
        self.norm_final = nn.LayerNorm(size.width)

    def forward(self, x, table, mask):
        x = x + self.self_attn(self.norm_mha(x), table, mask)
        x = x + self.conv_module(self.norm_conv(x), mask)
        x = x + self.feed_forward(self.norm_ff(x))
        return self.norm_final(x)


class Conformer(nn.Module):
    """features (B, T, F) and lengths (B,) -> (B, T', C) and which of its frames are real (B, T').

    A clip comes out the same alone and beside longer ones.
    """

    def __init__(self, size):
        super().__init__()
        self.embed = Subsampling(size.features, size.width, size.rows)
        self.encoders = nn.ModuleList([Block(size) for _ in range(size.blocks)])
        self.after_norm = nn.LayerNorm(size.width)

    def forward(self, x, lengths):
        x = self.embed(x)
        frames = torch.arange(x.shape[1], device=x.device)
        mask = frames < halved(lengths)[:, None]
        table = self.embed.pos_enc.pe[:, : x.shape[1]]
        for block in self.encoders:
            x = block(x, table, mask)
        return self.after_norm(x), mask


# ------------------------------------------------------------------------------------------------ resampler


class CrossAttention(nn.Module):
    """Latents attend to themselves and to the frames, which stand behind them."""

    def __init__(self, width, heads):
        super().__init__()
        self.to_q = nn.Linear(width, heads * HEAD_SIZE, bias=False)
        self.to_kv = nn.Linear(width, 2 * heads * HEAD_SIZE, bias=False)
        self.to_out = nn.Linear(heads * HEAD_SIZE, width, bias=False)

    def split(self, x):
        return x.unflatten(-1, (-1, HEAD_SIZE)).transpose(1, 2)  # (B, H, L, HEAD_SIZE)

    def forward(self, latents, frames, mask):
        both = torch.cat([latents, frames], 1)
        keys, values = self.to_kv(both).chunk(2, -1)
        q = self.split(self.to_q(latents))
        k = self.split(keys)
        v = self.split(values)
        mask = F.pad(mask, (latents.shape[1], 0), value=True)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        y = y.transpose(1, 2).flatten(2)
        return self.to_out(y)


class Gate(nn.Module):
    """The second half, through an exact GELU, weighs the first."""

    def forward(self, x):
        value, gate = x.chunk(2, -1)
        return value * F.gelu(gate)


class RootNorm(nn.Module):
    """x / |x| * sqrt(D) * gamma: an RMSNorm without eps inside the root."""

    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return F.normalize(x, dim=-1) * math.sqrt(x.shape[-1]) * self.gamma


class Resampler(nn.Module):
    """frames (B, T, C), mask (B, T) -> (B, n, D). No norm stands in front of attention or feed-forward."""

    def __init__(self, size):
        super().__init__()
        self.proj_context = nn.Linear(size.context, size.width)
        self.latents = nn.Parameter(torch.zeros(size.latents, size.width))
        self.layers = nn.ModuleList()
        for _ in range(size.layers):
            widen = nn.Linear(size.width, 2 * size.inner)
            narrow = nn.Linear(size.inner, size.width)
            attention = CrossAttention(size.width, size.heads)
            feed_forward = nn.Sequential(widen, Gate(), narrow)
            self.layers.append(nn.ModuleList([attention, feed_forward]))
        self.norm = RootNorm(size.width)

    def forward(self, frames, mask):
        frames = self.proj_context(frames)
        x = self.latents.expand(len(frames), -1, -1)
        for attention, feed_forward in self.layers:
            x = x + attention(x, frames, mask)
            x = x + feed_forward(x)
        return self.norm(x)


# ----------------------------------------------------------------------------------------- widths from a file


def conformer_size(shapes, prefix):
    """ConformerSize, read off {name: shape} of a published file."""
    first = prefix + "encoders.0."
    width, columns = shapes[prefix + "embed.out.0.weight"]
    features = 2 * (columns // width) + 2  # one less would give as many columns, but widths are even
    return ConformerSize(
        features=features,
        width=width,
        inner=shapes[first + "feed_forward.w_1.weight"][0],
        heads=shapes[first + "self_attn.pos_bias_u"][0],
        blocks=count(shapes, prefix + "encoders."),
        kernel=shapes[first + "conv_module.depthwise_conv.weight"][2],
        rows=shapes[prefix + "embed.pos_enc.pe"][1])


def count(shapes, stack):
    """How many layers a stack has."""
    below = [name.removeprefix(stack) for name in shapes if name.startswith(stack)]
    return len({name.split(".")[0] for name in below})


def resampler_size(shapes, prefix):
    """ResamplerSize, read off {name: shape} of a published file."""
    latents, width = shapes[prefix + "latents"]
    return ResamplerSize(
        context=shapes[prefix + "proj_context.weight"][1],
        width=width,
        latents=latents,
        heads=shapes[prefix + "layers.0.0.to_q.weight"][0] // HEAD_SIZE,
        inner=shapes[prefix + "layers.0.1.2.weight"][1],
        layers=count(shapes, prefix + "layers."))
