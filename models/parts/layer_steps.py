"""A stack of layers position by position, as speaking runs it: once for every frame of audio.

What the modules of the layers compute is the truth that StackSteps must equal; its test compares the two.
The products take as long as memory needs to give the weights. All that stands between them is small, and
there calls cost more than arithmetic, so this makes a third of those that the modules make:

- Modules and weights are looked up once. No weight is copied.
- A norm is a length, a quotient and a product; see depth_steps for eps in a column of its own.
- Queries and keys are turned together, by one small matrix for the position.
- Attention reads the columns that are filled. A mask is needed only where prompts were padded.

Letters: B rows, C channels, H heads, G groups, D head size, S columns of the caches.
"""
import math
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from models.parts.layers import few, multiply_few, rotary

# Of the stream behind its channels: the last holds sqrt(C eps), the others zeros, which keep rows aligned.
MORE_COLUMNS = 8


class Acting(NamedTuple):
    """The modules of a layer that act at the positions that are stepped through."""

    input_norm: nn.Module
    attention: nn.Module
    norm: nn.Module
    mlp: nn.Module


class LayerStep(NamedTuple):
    """What a step needs of a layer: the scales of its norms and its products, functions of (B, ..)."""

    input_scale: torch.Tensor
    q: Any
    k: Any
    v: Any
    out: Any
    scale: torch.Tensor
    gate: Any
    up: Any
    down: Any


def product(linear, rows):
    """What a Linear does to x (rows, C), with its weight looked up once."""
    W = linear.weight
    changed = hasattr(linear, "lora_A") or hasattr(linear, "code_scale")  # an adapter is on, or W holds codes
    if changed or linear.bias is not None:
        return linear
    if few(W, rows):
        return partial(multiply_few, W)
    return partial(F.linear, weight=W)


def layer_step(acting, rows):
    """LayerStep of an Acting, for so many rows."""
    attention = acting.attention
    mlp = acting.mlp
    return LayerStep(
        input_scale=scale_of(acting.input_norm),
        q=product(attention.q_proj, rows),
        k=product(attention.k_proj, rows),
        v=product(attention.v_proj, rows),
        out=product(attention.o_proj, rows),
        scale=scale_of(acting.norm),
        gate=product(mlp.gate_proj, rows),
        up=product(mlp.up_proj, rows),
        down=product(mlp.down_proj, rows))


def scale_of(norm):
    """sqrt(C) w in float32, or what the weight is in if that is more."""
    w = norm.weight.detach()
    w = w.to(torch.promote_types(w.dtype, torch.float32))
    return math.sqrt(len(w)) * w


class StackSteps:
    """The layers for B rows, whose keys lie in caches that their prompts have filled. Needs no gradient."""

    def __init__(self, layers, norm, frequencies, S):
        """layers: Acting of each; norm: the final one; frequencies: of the rotary pairs."""
        self.acting, self.last_norm = layers, norm
        attention = layers[0].attention
        self.H = attention.heads
        self.G = attention.kv_heads
        self.D = attention.head_size
        positions = torch.arange(S, device=frequencies.device)
        self.rope = torch.stack(rotary(positions, frequencies), 1)  # (S, 2, D)
        self.same = torch.eye(self.D, device=frequencies.device)
        self.partner = self.same.roll(self.D // 2, 0)
        self.rows = 0

    def place(self, B):
        """Look everything up for B rows."""
        self.rows = B
        weight = self.last_norm.weight
        C = len(weight)
        self.stream = weight.new_zeros(B, C + MORE_COLUMNS)
        self.stream[:, -1] = math.sqrt(C * self.last_norm.eps)
        self.x = self.stream[:, :C]
        self.scale = scale_of(self.last_norm)
        self.layers = [layer_step(acting, B) for acting in self.acting]

    def __call__(self, x, positions, column, mask, caches):
        """The final states (B, C) of x (B, C), which stand at `positions` (B,) and whose keys go to `column`.

        mask: which of the columns up to there are seen, (B, 1, 1, column + 1), or None for all.
        """
        if len(x) != self.rows:
            self.place(len(x))
        cos, sin = self.rope[positions][:, :, None].unbind(1)  # (B, 1, D) each
        turn = torch.addcmul(self.same * cos, self.partner, sin)  # (B, D, D): x cos + partner(x) sin
        self.x.copy_(x)
        for layer, cache in zip(self.layers, caches):
            normed = self.normed(layer.input_scale)
            mixed = self.attend(layer, normed, turn, (cache, column, mask))
            self.x.add_(layer.out(mixed))
            normed = self.normed(layer.scale)
            gate = F.silu(layer.gate(normed))
            self.x.add_(layer.down(gate.mul_(layer.up(normed))))
        return self.normed(self.scale)

    def normed(self, scale):
        """RMSNorm of the stream: x / |(x, sqrt(C eps))| times sqrt(C) w."""
        length = torch.linalg.vector_norm(self.stream, dim=1, keepdim=True, dtype=scale.dtype)
        return torch.div(self.x, length).mul_(scale).to(self.x.dtype)

    def attend(self, layer, normed, turn, memory):
        """Turn, remember, and mix the values so far. -> (B, H * D)"""
        cache, column, mask = memory
        B = len(normed)
        qk = torch.cat([layer.q(normed), layer.k(normed)], 1)
        qk = qk.view(B, -1, self.D).float()
        turned = torch.bmm(qk, turn).to(normed.dtype)
        q, k = turned.split((self.H, self.G), 1)
        v = layer.v(normed).view(B, self.G, self.D)
        cache.k[:, :, column].copy_(k)
        cache.v[:, :, column].copy_(v)
        q = q.view(B, self.G, -1, self.D)
        seen = slice(column + 1)
        y = F.scaled_dot_product_attention(q, cache.k[:, :, seen], cache.v[:, :, seen], attn_mask=mask)
        return y.reshape(B, -1)
