"""A small causal decoder position by position, as speaking runs it: a dozen or more steps for every frame of
audio.

What a module computes of all positions at once (the model's own `_depth`) is the truth that DepthSteps must
equal; its test compares the two. Here the calls cost more than the arithmetic, so this makes a third of those
that a module makes:

- q, k and v are one matrix, gate and up another.
- The weight w of an RMSNorm goes into the matrix behind it, and eps into a column more. With C channels

      w x / sqrt(mean(x^2) + eps)  =  sqrt(C) w  *  x / sqrt(sum(x^2) + C eps)
                                   =  sqrt(C) w  *  x / |(x, sqrt(C eps))|

  so a norm is one length and one division, and sqrt(C) w is multiplied into the matrix beforehand.
- The pairs of q and k lie side by side (attention does not mind their order), so that one complex product
  rotates all heads. It rotates v by an angle of zero and divides q by sqrt(D).
- Every result has a fixed place, of which the views that a step needs are made once.

Rotation and attention are in float32. Letters: B rows, K positions, C channels, H heads, G groups, D head
size.
"""
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

# Columns of the stream behind its C channels: the last holds sqrt(C eps), the others zeros, which keep rows
# aligned.
MORE_COLUMNS = 8


def joined(*linears, scale=None, rows=None, add=False):
    """Linears that read the same input, as one function run(x, out) of x (N, C).

    out (N, all outputs side by side, in the order `rows`) is overwritten or, with `add`, added to. x is
    multiplied by `scale` (C,) first.
    """
    if any(hasattr(m, "lora_A") or hasattr(m, "code_scale") for m in linears):
        # An adapter is on, or the weights are codes: each runs by itself.
        return one_by_one(linears, scale, rows, add)
    weight = linears[0].weight
    if len(linears) > 1:
        weight = torch.cat([m.weight for m in linears])
    if scale is not None:
        weight = weight * scale
    if rows is not None:
        weight = weight[rows]
    weight = weight.T
    if len(linears) > 1 and weight.device.type == "cpu":
        weight = weight.contiguous()  # one vector times a tall matrix is faster column by column
    return lambda x, out: out.addmm_(x, weight, beta=int(add))


def one_by_one(linears, scale, rows, add):
    """What `joined` returns, of modules that do more than multiply by their weight."""
    def run(x, out):
        x = x if scale is None else x * scale
        y = torch.cat([m(x) for m in linears], -1)
        y = y if rows is None else y[:, rows]
        return out.add_(y) if add else out.copy_(y)

    return run


def order_of_rows(H, G, D):
    """Where the rows of the joined matrix come from: by group its queries, key, value; pairs side by side."""
    rows = torch.arange((H + 2 * G) * D).view(-1, D)
    q, k, v = rows.split((H, G, G))
    q, k = (side_by_side(part) for part in (q, k))
    return torch.cat([q.view(G, -1, D), k[:, None], v[:, None]], 1).flatten()


def side_by_side(rows):
    """(heads, D) rows of half-split pairs -> the same with the two of each pair next to each other."""
    return rows.unflatten(1, (2, -1)).mT.flatten(1)


class LayerSteps(NamedTuple):
    """The four products of a layer, as `joined` makes them."""

    to_qkv: Any
    out: Any
    to_gate_up: Any
    down: Any


class Memory(NamedTuple):
    """Keys and values of one layer at one position: where the new ones go, and all so far."""

    new: torch.Tensor  # (B, G, 2, D)
    keys: torch.Tensor  # (B * G, D, positions)
    values: torch.Tensor  # (B * G, positions, D)


class Heads(NamedTuple):
    """Views of one position's part of qkv and of what attention makes of it."""

    pairs: torch.Tensor  # (B, all heads * D / 2) complex
    kv: torch.Tensor  # (B, G, 2, D)
    q: torch.Tensor  # (B * G, H / G, D)
    y: torch.Tensor  # (B * G, H / G, D)


@dataclass
class Places:
    """Where the results of a step of n positions go, (n * B, ..): one position's rows under the other's."""

    stream: torch.Tensor  # C + MORE_COLUMNS wide
    x: torch.Tensor  # its first C columns
    normed: torch.Tensor
    last: torch.Tensor  # of `normed`, the B rows of the last position
    qkv: torch.Tensor
    qkv32: torch.Tensor  # the same in float32; itself where it is float32
    heads: list[Heads]  # of qkv32 and mixed32, one for each position
    mixed32: torch.Tensor
    mixed: torch.Tensor  # what attention makes, in the dtype of the weights
    gate_up: torch.Tensor
    gate: torch.Tensor  # halves of gate_up
    up: torch.Tensor


class DepthSteps:
    """The decoder for B rows and at most K positions; the first step reads two of them. Needs no gradient."""

    def __init__(self, decoder, B, K):
        """decoder: a module with inputs_embeds_projector, layers, norm and (rotary) frequencies."""
        first = decoder.layers[0]
        weight = decoder.norm.weight
        self.H = first.self_attn.heads
        self.G = first.self_attn.kv_heads
        self.D = first.self_attn.head_size
        self.C = len(weight)
        self.hidden = first.mlp.gate_proj.out_features
        self.eps = decoder.norm.eps
        self.dtype = weight.dtype
        self.device = weight.device
        self.length_dtype = torch.promote_types(self.dtype, torch.float32)
        root = math.sqrt(self.C)
        order = order_of_rows(self.H, self.G, self.D).to(self.device)
        self.project = joined(decoder.inputs_embeds_projector)
        self.layers = [layer_steps(layer, root, order) for layer in decoder.layers]
        self.scale = root * weight
        self.ropes = self.make_ropes(decoder.frequencies, K)
        self.place(torch.zeros(len(self.layers), B, self.G, 2, K, self.D, device=self.device))

    def make_ropes(self, frequencies, K):
        """K complex (all heads * D / 2,): what the pairs of a position are multiplied by."""
        queries = self.H // self.G  # of a group
        angle = torch.arange(K)[:, None, None].float() * frequencies.cpu()
        angle = torch.cat([angle.expand(-1, queries + 1, -1), 0 * angle], 1)  # (K, heads of a group, D / 2)
        size = torch.tensor([self.D**-0.5] * queries + [1.0, 1.0])
        ropes = torch.polar(size[:, None].expand_as(angle), angle)
        return ropes.repeat(1, self.G, 1).flatten(1).to(self.device).unbind()

    def place(self, cache):
        """Make all places anew. cache (layers, B, G, 2, K, D): keys and values."""
        self.cache = cache
        _, B, G, _, K, D = cache.shape
        flat = cache.view(-1, B * G, 2, K, D)
        self.memory = []  # [position][layer]
        for j in range(K):
            so_far = flat[:, :, :, : j + 1]
            keys = so_far[:, :, 0].mT
            values = so_far[:, :, 1]
            self.memory.append([Memory(*views) for views in zip(cache[..., j, :], keys, values)])
        self.places = {n * B: self.make_places(B, n) for n in (1, 2)}

    def make_places(self, B, n):
        """Places for a step of n positions."""
        def make(width):
            return torch.zeros(n * B, width, dtype=self.dtype, device=self.device)

        stream = make(self.C + MORE_COLUMNS)
        stream[:, -1] = math.sqrt(self.C * self.eps)
        normed = make(self.C)
        qkv = make((self.H + 2 * self.G) * self.D)
        mixed = make(self.H * self.D)
        gate_up = make(2 * self.hidden)
        qkv32 = qkv.float()
        mixed32 = mixed.float()
        heads = [self.make_heads(B, *parts) for parts in zip(qkv32.chunk(n), mixed32.chunk(n))]
        gate, up = gate_up.chunk(2, 1)
        return Places(
            stream=stream,
            x=stream[:, : self.C],
            normed=normed,
            last=normed[-B:],
            qkv=qkv,
            qkv32=qkv32,
            heads=heads,
            mixed32=mixed32,
            mixed=mixed,
            gate_up=gate_up,
            gate=gate,
            up=up)

    def make_heads(self, B, qkv, mixed):
        """Views of the part of one position."""
        groups = qkv.view(B, self.G, -1, self.D)
        pairs = qkv.view(torch.complex64)
        kv = groups[:, :, -2:]
        q = groups.flatten(0, 1)[:, :-2]
        y = mixed.view(B * self.G, -1, self.D)
        return Heads(pairs, kv, q, y)

    def keep(self, rows):
        """Only these rows stay. rows: (R,) int64."""
        self.place(self.cache[:, rows])

    def __call__(self, inputs, j):
        """What comes out at the last of the positions j, .. that are read, after all before them.

        inputs: what the decoder reads before its projector, (B, ..), or two positions of that, one under the
        other. -> (B, C)
        """
        p = self.places[len(inputs)]
        self.project(inputs, p.x)
        for i, layer in enumerate(self.layers):
            layer.to_qkv(self.norm(p), p.qkv)
            if p.qkv32 is not p.qkv:  # in low precision
                p.qkv32.copy_(p.qkv)
            for position, heads in enumerate(p.heads, j):
                self.attend(heads, position, self.memory[position][i])
            if p.mixed32 is not p.mixed:
                p.mixed.copy_(p.mixed32)
            layer.out(p.mixed, p.x)
            layer.to_gate_up(self.norm(p), p.gate_up)
            layer.down(F.silu(p.gate, inplace=True).mul_(p.up), p.x)
        self.norm(p)
        return p.last * self.scale

    def norm(self, p):
        """x / |(x, sqrt(C eps))|: RMSNorm without its weight and over sqrt(C)."""
        length = torch.linalg.vector_norm(p.stream, dim=1, keepdim=True, dtype=self.length_dtype)
        return torch.div(p.x, length, out=p.normed)

    def attend(self, heads, position, memory):
        """Rotate, remember, and mix the values so far into heads.y."""
        heads.pairs.mul_(self.ropes[position])
        memory.new.copy_(heads.kv)
        weights = torch.bmm(heads.q, memory.keys).softmax(-1)
        torch.bmm(weights, memory.values, out=heads.y)


def layer_steps(layer, root, order):
    """LayerSteps of a Layer; root: sqrt(C), order: of the rows of q, k and v."""
    attention, mlp = layer.self_attn, layer.mlp
    qkv = attention.q_proj, attention.k_proj, attention.v_proj
    return LayerSteps(
        to_qkv=joined(*qkv, scale=root * layer.input_layernorm.weight, rows=order),
        out=joined(attention.o_proj, add=True),
        to_gate_up=joined(mlp.gate_proj, mlp.up_proj, scale=root * layer.post_attention_layernorm.weight),
        down=joined(mlp.down_proj, add=True))
