"""GPT-2 a position at a time, as speaking runs it: a few rows, all at the same column of their caches.

What the modules compute of all positions at once is the truth that GPTSteps must equal; its test compares the
two. On a CPU a step can take no less than reading every weight once, and takes little more here:

- One to three rows are multiplied as W x^T: that reads the weights one and a half to three times as fast as
  x W^T does. Only a single column is slow, so one row is doubled.
- Every product has a fixed place, so that nothing is allocated for it.

R rows, C channels, H heads, D head size, S columns.
"""
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

FEW_ROWS = 3  # that are multiplied as W x^T: from 4 on, wide layers gain nothing


class Products:
    """Linears with biases as functions of (rows, in), each into a place that layers of one shape share."""

    def __init__(self, rows, like):
        """like: a tensor of the dtype and on the device of the weights."""
        self.rows, self.like, self.places = rows, like, {}

    def place(self, what, *shape):
        key = (what, *shape)
        if key not in self.places:
            self.places[key] = self.like.new_empty(shape)
        return self.places[key]

    def of(self, linear):
        """run(x) -> (rows, out), good until the next product of that shape."""
        if hasattr(linear, "lora_A") or hasattr(linear, "code_scale"):
            return linear  # an adapter is on, or the weights are codes
        weight, bias = linear.weight, linear.bias
        width, inputs = weight.shape
        out = self.place("out", self.rows, width)
        # A layer that makes fewer values than it reads is as fast the usual way.
        if weight.device.type != "cpu" or self.rows > FEW_ROWS or inputs > width:
            return lambda x: torch.addmm(bias, x, weight.T, out=out)
        columns = self.place("columns", width, max(self.rows, 2))
        answers = columns.T[: self.rows]
        bias = bias[:, None]
        twins = self.place("twins", 2, inputs)

        def run(x):
            if len(x) == 1:
                x = twins.copy_(x)
            torch.addmm(bias, weight, x.T, out=columns)
            return out.copy_(answers)

        return run


class LayerSteps(NamedTuple):
    """Norms and products of one block."""

    ln_1: Any
    to_qkv: Any
    out: Any
    ln_2: Any
    widen: Any
    narrow: Any


class GPTSteps:
    """The blocks of a GPT-2 for R rows. Needs no gradient."""

    def __init__(self, gpt, R):
        """gpt: a module with blocks h, of the names that GPT-2 has, and ln_f."""
        self.heads, self.ln_f = gpt.h[0].attn.heads, gpt.ln_f
        self.products = Products(R, gpt.ln_f.weight)
        of = self.products.of
        self.layers = []
        for block in gpt.h:
            attention, mlp = block.attn, block.mlp
            self.layers.append(LayerSteps(
                ln_1=block.ln_1,
                to_qkv=of(attention.c_attn),
                out=of(attention.c_proj),
                ln_2=block.ln_2,
                widen=of(mlp.c_fc),
                narrow=of(mlp.c_proj)))

    def __call__(self, x, caches, column, mask):
        """(R, C), which is overwritten, at `column` behind what the caches hold -> (R, C) after the last
        norm. mask: bool (R, 1, 1, column + 1), or None where all is seen."""
        R, C = x.shape
        end = column + 1
        for layer, cache in zip(self.layers, caches):
            qkv = layer.to_qkv(layer.ln_1(x)).view(R, 3, self.heads, 1, -1)
            q, k, v = qkv.unbind(1)  # (R, H, 1, D) each
            cache.k[:, :, column:end], cache.v[:, :, column:end] = k, v
            y = F.scaled_dot_product_attention(q, cache.k[:, :, :end], cache.v[:, :, :end], attn_mask=mask)
            x.add_(layer.out(y.view(R, C)))
            wide = F.gelu(layer.widen(layer.ln_2(x)), approximate="tanh")
            x.add_(layer.narrow(wide))
        return self.ln_f(x)
