"""Bricks of more than one backbone: RMSNorm, rotary embedding, attention, SwiGLU, a K/V cache; exact
convolutions.

Letters: B batch, L positions, S keys, H query heads, G key/value heads, D head size, C width.
"""
import contextlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# A product of so many rows, and of so many numbers in them, is faster as W x^T in float32 on a CPU: measured
# with rows of 64 to 5504 numbers, 1.3 to 3 times below these bounds, and slower above.
FEW_ROWS, FEW_NUMBERS = 8, 4096


class RMSNorm(nn.Module):
    """x / rms(x) in float32, cast back, then times the weight: in the order of the published models."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        # the fused kernel is float32 inside
        return F.rms_norm(x, self.weight.shape, None, self.eps) * self.weight


def rotary_frequencies(size, theta, factors=None):
    """Angular frequency of each pair, (D/2,) float32. factors divide them (LongRoPE, arXiv 2402.13753)."""
    exponents = -torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / size
    frequencies = theta**exponents
    if factors is not None:
        frequencies = frequencies / torch.tensor(factors, dtype=torch.float32, device="cpu")
    return frequencies


def rotary(positions, frequencies, scale=1.0):
    """cos and signed sin of positions (L,) or (B, 1, L), for the half-split layout. Each (..., D) float32."""
    angle = positions[..., None].float() * frequencies
    cos = angle.cos() * scale
    sin = angle.sin() * scale
    cos = torch.cat([cos, cos], -1)
    sin = torch.cat([-sin, sin], -1)
    return cos, sin


def rotate(x, cos, sin):
    """Rotate the pairs (x[i], x[i + D/2]) in float32 and cast back. x: (B, H, L, D)."""
    y = x.float()
    partner = y.roll(y.shape[-1] // 2, -1)
    return torch.addcmul(y * cos, partner, sin).to(x.dtype)


def exact(device):
    """No TF32 in convolutions on CUDA: ten bits of mantissa change codes. cuDNN uses it by itself."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


class Packing(NamedTuple):
    """Given as `mask`: x is (1, P, C), the P real positions of a causal (B, L) batch without its padding."""

    place: torch.Tensor  # (P,) flat positions in B * L
    B: int
    L: int

    def unpack(self, x):  # (1, H, P, D) -> (B, H, L, D), zero in the padding
        heads, size = x.shape[1], x.shape[3]
        out = x.new_zeros(self.B * self.L, heads, size)
        out = out.index_copy(0, self.place, x[0].transpose(0, 1))
        return out.unflatten(0, (self.B, self.L)).transpose(1, 2)

    def pack(self, x):  # (B, H, L, D) -> (1, H, P, D)
        rows = x.transpose(1, 2).flatten(0, 1)
        return rows[self.place].transpose(0, 1)[None]


def attend(q, k, v, causal=False, mask=None):
    """Grouped-query attention. q (B, H, L, D), k and v (B, G, S, D); mask as in Context."""
    if isinstance(mask, Packing):
        # Only attention needs to know which positions are of one row; all else skips the padding.
        q, k, v = map(mask.unpack, (q, k, v))
        y = attend(q, k, v, causal=True)
        return mask.pack(y)
    B, H, L, D = q.shape
    G = k.shape[1]
    if not causal and (mask is None or mask.shape[2] == 1):
        # Every query sees the same keys, so the heads of a group stand in line as more queries of one head.
        q = q.reshape(B, G, H // G * L, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return y.reshape(B, H, L, D)
    k = k.repeat_interleave(H // G, 1)
    v = v.repeat_interleave(H // G, 1)
    causal = causal and mask is None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


class Cache:
    """Keys and values of one layer, (B, G, S, D) each, allocated once; rows share the column they write."""

    def __init__(self, shape, like):
        """like: a tensor of the dtype and on the device that the cache gets."""
        self.k = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.v = torch.zeros(shape, dtype=like.dtype, device=like.device)

    def write(self, column, k, v):
        """column: (L,) int64, where the L new positions go."""
        self.k.index_copy_(2, column, k)
        self.v.index_copy_(2, column, v)

    def keep(self, rows):
        self.k = self.k[rows]
        self.v = self.v[rows]


def make_caches(layers, B, S, like):
    """One empty Cache for each of the layers, for B rows of S columns."""
    attention = layers[0].self_attn
    shape = (B, attention.kv_heads, S, attention.head_size)
    return [Cache(shape, like) for _ in layers]


class Context(NamedTuple):
    """What all layers of one forward pass are told besides their input."""

    rope: tuple | None = None  # (cos, sin) of the positions, as `rotary` makes them; None: no position
    causal: bool = False  # a position sees itself and those before it
    mask: torch.Tensor | Packing | None = None  # bool, True where a key is seen: (B, 1, 1, S) or (B, 1, L, S)
    column: torch.Tensor | None = None  # (L,) int64: where the new keys go in the caches
    # the positions that are asked for; the others only serve as keys (no mask, no cache)
    keep: slice | None = None


def few(W, rows):
    """Whether so many rows are multiplied by W (out, in) with `multiply_few`."""
    narrow = 0 < rows <= FEW_ROWS and rows * W.shape[1] <= FEW_NUMBERS
    return narrow and W.dtype == torch.float32 and W.device.type == "cpu"


def multiply_few(W, x):
    """x W^T of few rows x (rows, in) as W x^T. A single row meets W in two halves: the library multiplies
    several matrices by a vector as fast as memory gives them, but one at half that speed."""
    columns = x.contiguous().t()  # numbers of a row side by side: the other way round takes a slow kernel
    if len(x) == 1 and len(W) % 2 == 0:
        halves = W.view(2, -1, W.shape[1])
        twice = columns.expand(2, -1, -1)
        return torch.bmm(halves, twice).view(1, -1)
    return torch.mm(W, columns).t()


class Linear(nn.Linear):
    """nn.Linear that is quicker with few rows. Generation is made of such products."""

    def forward(self, x):
        rows = x.shape[:-1].numel()
        if self.bias is None and few(self.weight, rows):
            y = multiply_few(self.weight, x.reshape(rows, -1))
            return y.unflatten(0, x.shape[:-1])
        return F.linear(x, self.weight, self.bias)


class LayerSize(NamedTuple):
    """The numbers that a transformer layer is built from."""

    width: int
    hidden: int  # of the feed-forward
    heads: int
    kv_heads: int
    head_size: int
    eps: float
    branch: float = 1.0  # weight with which each branch is added; 1 unless the model is mu-parametrised


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and without biases. (B, L, C) -> (B, L, C)."""

    def __init__(self, width, heads, kv_heads, head_size):
        super().__init__()
        self.heads = heads
        self.kv_heads = kv_heads
        self.head_size = head_size
        self.q_proj = Linear(width, heads * head_size, bias=False)
        self.k_proj = Linear(width, kv_heads * head_size, bias=False)
        self.v_proj = Linear(width, kv_heads * head_size, bias=False)
        self.o_proj = Linear(heads * head_size, width, bias=False)

    def forward(self, x, context, cache=None):
        """With a cache, keys are written to it; then a single position attends to the whole cache under the
        mask, several attend to each other."""
        # A strided input would take another kernel when weights are frozen, which has other last bits.
        asked = x if context.keep is None else x[:, context.keep].contiguous()
        q = self.split(self.q_proj(asked), self.heads)  # (B, H, A, D), A positions are asked for
        k = self.split(self.k_proj(x), self.kv_heads)  # (B, G, L, D)
        v = self.split(self.v_proj(x), self.kv_heads)
        if context.rope is not None:
            cos, sin = context.rope
            k = rotate(k, cos, sin)
            if context.keep is not None:
                cos = cos[..., context.keep, :]
                sin = sin[..., context.keep, :]
            q = rotate(q, cos, sin)
        if cache is not None:
            cache.write(context.column, k, v)
            if x.shape[1] == 1:
                k, v = cache.k, cache.v
        y = attend(q, k, v, context.causal, context.mask)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def split(self, y, heads):
        """(B, L, heads * D) -> (B, heads, L, D)."""
        B, L, _ = y.shape
        return y.view(B, L, heads, self.head_size).transpose(1, 2)


class SwiGLU(nn.Module):
    """The feed-forward of Llama and its kin."""

    def __init__(self, width, hidden):
        super().__init__()
        self.gate_proj = Linear(width, hidden, bias=False)
        self.up_proj = Linear(width, hidden, bias=False)
        self.down_proj = Linear(hidden, width, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class FeatureProjection(nn.Module):
    """How HuBERT and w2v-BERT take in their features."""

    def __init__(self, features, width, eps):
        super().__init__()
        self.layer_norm = nn.LayerNorm(features, eps)
        self.projection = nn.Linear(features, width)

    def forward(self, x):
        return self.projection(self.layer_norm(x))


class FeedForward(nn.Module):
    """The two Linears of HuBERT's and w2v-BERT's layers."""

    def __init__(self, width, inner, activation):
        super().__init__()
        self.intermediate_dense = nn.Linear(width, inner)
        self.output_dense = nn.Linear(inner, width)
        self.activation = activation

    def forward(self, x):
        return self.output_dense(self.activation(self.intermediate_dense(x)))


class Layer(nn.Module):
    """Pre-norm transformer layer, as Llama has it. size: LayerSize."""

    def __init__(self, size):
        super().__init__()
        self.input_layernorm = RMSNorm(size.width, size.eps)
        self.self_attn = Attention(size.width, size.heads, size.kv_heads, size.head_size)
        self.post_attention_layernorm = RMSNorm(size.width, size.eps)
        self.mlp = SwiGLU(size.width, size.hidden)
        self.branch = size.branch

    def forward(self, x, context, cache=None):
        y = self.self_attn(self.input_layernorm(x), context, cache)
        if context.keep is not None:
            x = x[:, context.keep]
        x = torch.add(x, y, alpha=self.branch)
        y = self.mlp(self.post_attention_layernorm(x))
        return torch.add(x, y, alpha=self.branch)


def recomputes(i, every):
    """Whether the activations of layer i are made again in backward; every: 1 means of all, 0 of none."""
    return bool(every) and i % every == 0 and torch.is_grad_enabled()


LOGITS = 2**24  # held at once, 64 MB in float32: 128 rows of 128k entries


def cross_entropy(head, h, labels, ignore):
    """Sum of the cross-entropies of head(h) against labels. h (N, C), labels (N,).

    Many rows of a large vocabulary are computed in pieces, and again in backward: their logits, and the
    gradients of those, are never there at once.
    """
    def part(h, labels):
        return F.cross_entropy(head(h).float(), labels, ignore_index=ignore, reduction="sum")

    rows = max(1, LOGITS // head.out_features)
    if len(h) <= rows:
        return part(h, labels)
    parts = zip(h.split(rows), labels.split(rows))
    return sum(checkpoint(part, *pair, use_reentrant=False) for pair in parts)


def run_layers(layers, x, context, caches=None, recompute=False):
    """Apply layers in turn; the last one computes only what context.keep asks for.

    recompute: of every n-th layer keep only the input for backward (activation checkpointing); 0: of none.
    """
    whole = context._replace(keep=None)
    for i, layer in enumerate(layers):
        asked = context if i == len(layers) - 1 else whole
        if recomputes(i, recompute):
            x = checkpoint(layer, x, asked, use_reentrant=False)
        else:
            x = layer(x, asked, caches[i] if caches else None)
    return x
