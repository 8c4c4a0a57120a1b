"""Frozen weights in 8 or 4 bits: a smaller base under an adapter (QLoRA, arXiv 2305.14314).

    quantise(model, 4)      # the Linears of its layers; norms, heads, tables and the codec stay as they are

    8 bits   each output row is divided by its largest value / 127 and rounded
             weight = code * scale
    4 bits   each block of 64 values is divided by its largest value, and the nearest of sixteen levels is
             taken that are equally likely in a normal distribution (NF4)
             weight = LEVELS[code] * scale

A quantised layer is still an nn.Linear, wrapped by LoRA like any other: only its class is swapped, and
`weight` holds the codes. Each product makes the weight anew, in the activation's dtype, and forgets it:
backward makes it once more. Rounded weights are never merged and never saved; merge_lora.py starts from the
original.
"""
import torch
import torch.nn.functional as F
from torch import nn

from models.parts import Invalid

BLOCK = 64  # values that share a scale in 4 bits, as published: 0.5 bits per value go to scales in float32
BITS = (4, 8)

# The levels of NF4 (arXiv 2305.14314, appendix E): quantiles of a normal distribution, zero among them.
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)


TINIEST = torch.finfo(torch.float32).tiny  # scale of a row or block of zeros: nothing is divided by zero


def int8_codes(weight):
    """(out, in) float32 -> codes int8 (out, in), scale float32 (out, 1)."""
    scale = (weight.abs().amax(1, keepdim=True) / 127).clamp(min=TINIEST)
    return (weight / scale).round().to(torch.int8), scale


def nf4_codes(weight):
    """(out, in) float32 -> codes uint8 (blocks, 32), two in a byte, the first above; scale (blocks, 1)."""
    flat = F.pad(weight.flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    scale = flat.abs().amax(1, keepdim=True).clamp(min=TINIEST)
    levels = torch.tensor(LEVELS, device=weight.device)
    borders = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(flat / scale, borders).to(torch.uint8)
    return codes[:, 0::2] << 4 | codes[:, 1::2], scale


def weight_of(layer, dtype):
    """The weight (out, in) that a layer multiplies by, made from its codes where it has codes."""
    codes = layer.weight
    if codes.dtype == torch.int8:
        return (codes * layer.code_scale).to(dtype)
    if codes.dtype != torch.uint8:
        return codes.to(dtype)
    levels = torch.tensor(LEVELS, device=codes.device)
    pairs = torch.stack([codes >> 4, codes & 15], 2)
    flat = (levels[pairs.flatten(1).int()] * layer.code_scale).flatten()
    weight = flat[: layer.in_features * layer.out_features]  # the last block may have been filled up
    return weight.view(layer.out_features, layer.in_features).to(dtype)


class Product(torch.autograd.Function):
    """x W^T for a layer that makes W from codes. Only the layer is kept for backward, not W: autograd would
    hold the weights of all layers at once, which is what the codes are there to avoid."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return F.linear(x, weight_of(layer, x.dtype))

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ weight_of(ctx.layer, gradient.dtype), None


class QuantLinear(nn.Linear):
    """An nn.Linear whose `weight` holds codes and whose buffer `code_scale` says how large they are."""

    def forward(self, x):
        y = Product.apply(x, self)
        return y if self.bias is None else y + self.bias.to(x.dtype)


@torch.no_grad()
def quantise(model, bits):
    """Replace the weights of all Linears in model.blocks() by codes of 8 or 4 bits. Returns their names."""
    if bits not in BITS:
        raise Invalid(f"base_bits is {bits}, expected 8 or 4 (16 leaves the base as it is)")
    to_codes = int8_codes if bits == 8 else nf4_codes
    inside = {module for block in model.blocks() for module in block.modules()}
    linears = {module for module in inside if isinstance(module, nn.Linear)}
    names = [name for name, module in model.named_modules() if module in linears]
    for name in names:
        layer = model.get_submodule(name)
        codes, scale = to_codes(layer.weight.detach().float())
        layer.__class__ = QuantLinear
        layer.weight = nn.Parameter(codes, requires_grad=False)
        layer.register_buffer("code_scale", scale, persistent=False)
    return names


def is_quantised(model):
    """Whether any weight is codes, which no file of weights may hold."""
    return any(hasattr(module, "code_scale") for module in model.modules())
