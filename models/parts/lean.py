"""Optimizer steps in little memory: moments in 8 bits, bf16 weights without float32 copies, any tensor alone.

    optimizer = Lean(parameters, Rule("adamw", bits=8))
    optimizer.step()                 # all that have a gradient
    optimizer.step_one(parameter)    # or one of them, as soon as its gradient is there

Per weight AdamW keeps two moments: 8 bytes in float32, 2.03 here. A block of 256 values shares a float32
scale, its largest magnitude, and each value is one of 127 (first moment, with sign) or 255 (second) levels
that stand in equal ratios, so that a value thousands of times smaller than the scale has the same precision:

    value = scale * 2 ** ((code - highest code) / LEVELS_PER_OCTAVE), and code 0 is zero

Between two levels it is drawn which one is taken, the nearer the likelier, so that in the mean nothing is
lost: the second moment changes by a thousandth per step, and the nearest level would hold it for ever. The
same holds for a bf16 weight and a step smaller than its last digit (stochastic rounding, arXiv 2010.06192).

A draw is a function of seed, number of updates and place in the model. So a restart, another number of
ranks, and a step taken tensor by tensor draw the same.
"""
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

BLOCK = 256  # values that share a scale (arXiv 2110.02861 has 2048; a lone large value then spoils fewer)
HIGHEST = {torch.int8: 127, torch.uint8: 255}  # the code of the scale itself
LEVELS_PER_OCTAVE = 10  # levels 7 % apart, down to 1/6000 (first moment) and 1/4e7 (second) of the scale
PIECE = 2**22  # values worked on at once: scratch of some 200 MB at most, whatever the size of a table
DRAWN = ("weight", "exp_avg", "exp_avg_sq")  # what is rounded by draws of its own
TINIEST = torch.finfo(torch.float32).tiny  # scale of a block of zeros: nothing is divided by zero


class Rule(NamedTuple):
    """How a step is made; names and values as in torch.optim."""

    name: str  # adamw, adam or sgd
    bits: int = 32  # of each moment: 32 or 8
    weight_decay: float = 0.01
    seed: int = 0
    betas: tuple = (0.9, 0.999)
    eps: float = 1e-8


class Bare:
    """What Lean steps on in place of a bf16 parameter: its values, and a gradient that may be float32."""

    def __init__(self, parameter):
        self.data, self.grad = parameter.detach(), None


def padded(size):
    """The places that so many values take: whole blocks, so that no block is of two tensors."""
    return -(-size // BLOCK) * BLOCK


def hashed(start, size, seed, device):
    """(size,) int64, 32 random bits for each of the places start, start + 1, ...

    Multiply and shift (constants of Wellons's "hash prospector"); products stay below 2^63.
    """
    x = torch.arange(start, start + size, device=device)
    x = (x ^ (x >> 32) ^ seed) & 0xFFFFFFFF
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        x ^= x >> shift
        x = x.mul_(factor).bitwise_and_(0xFFFFFFFF)
    return x.bitwise_xor_(x >> 15)


def rounded(values, bits):
    """float32 -> bf16: up with the probability that its distance asks for. bits: random, 16 of each count."""
    raw = values.contiguous().view(torch.int32) + (bits & 0xFFFF).to(torch.int32)
    return (raw & -0x10000).view(torch.float32).to(torch.bfloat16)  # bf16 is the upper half of a float32


def levels(dtype, device):
    """What each code stands for in shares of its scale."""
    highest = HIGHEST[dtype]
    codes = torch.arange(highest + 2, device=device)  # one above the highest, which no draw takes
    values = torch.exp2((codes - highest) / LEVELS_PER_OCTAVE)
    values[0] = 0
    return values


def to_codes(values, dtype, draws):
    """float32 (n,) of whole blocks -> codes (n,), scales (n / BLOCK,). draws: uniform in [0, 1), (n,).

    int8 has a sign; uint8 is for values of at least 0, and of those only zero becomes zero: the step is
    divided by their root.
    """
    highest, table = HIGHEST[dtype], levels(dtype, values.device)
    size = values.abs().view(-1, BLOCK)
    scale = size.amax(1).clamp(min=TINIEST)
    share = (size / scale[:, None]).flatten()
    below = (highest + LEVELS_PER_OCTAVE * share.log2()).floor().clamp(0, highest).int()
    low = table[below]
    codes = below + (draws * (table[below + 1] - low) < share - low)
    if dtype == torch.uint8:
        codes = torch.where(share > 0, codes.clamp(min=1), 0)
    return (codes * values.sign()).to(dtype), scale


def from_codes(codes, scale):
    """What to_codes was given, but for its rounding: float32 (n,)."""
    sizes = levels(codes.dtype, codes.device)[codes.abs().int()] * codes.sign()
    return (sizes.view(-1, BLOCK) * scale[:, None]).flatten()


class Lean:
    """adamw, adam and sgd as torch.optim has them, with the same `param_groups` and `state`.

    A parameter is anything with `data`, `grad` and `start`, its first place in the model.
    """

    def __init__(self, parameters, rule, lr):
        groups = [dict(group) for group in parameters if isinstance(group, dict)]
        self.param_groups = groups or [{"params": list(parameters)}]
        self.rule, self.state = rule, {}
        self.group_of = {}
        for group in self.param_groups:
            group.setdefault("lr", lr)
            self.group_of |= {p: group for p in group["params"]}

    @torch.no_grad()
    def step(self):
        for p in self.group_of:
            if p.grad is not None:
                self.step_one(p)

    def zero_grad(self, set_to_none=True):
        for p in self.group_of:
            p.grad = None

    @torch.no_grad()
    def step_one(self, p):
        """Values and moments of one parameter, piece by piece."""
        values, gradient = p.data.view(-1), p.grad.reshape(-1)
        state = self.state.get(p)
        if state is None:
            state = self.state[p] = self.fresh(values)
        state["step"] += 1
        for begin in range(0, len(values), PIECE):
            end = min(begin + PIECE, len(values))
            rate, where = self.group_of[p]["lr"], slice(begin, end)
            part = Part(self, state, rate, p.start + begin, where)
            part.move(values[where], gradient[where])

    def fresh(self, values):
        """The state of a parameter before its first update."""
        state = {"step": torch.zeros(())}
        if self.rule.name == "sgd":
            return state
        size = padded(len(values))
        for name, dtype in (("exp_avg", torch.int8), ("exp_avg_sq", torch.uint8)):
            if self.rule.bits == 32:
                state[name] = torch.zeros(len(values), device=values.device)
            else:
                state[name] = torch.zeros(size, dtype=dtype, device=values.device)
                state[name + "_scale"] = torch.zeros(size // BLOCK, device=values.device)
        return state

    def state_dict(self):
        """As torch.optim has it: moments in 32 bits have the shape of their parameter."""
        numbers, groups = {}, []
        for group in self.param_groups:
            numbers |= {p: len(numbers) + i for i, p in enumerate(group["params"])}
            settings = dict(group)
            settings["params"] = [numbers[p] for p in group["params"]]
            groups.append(settings)
        states = {}
        for p, state in self.state.items():
            moments = {name: value for name, value in state.items() if name != "step"}
            if self.rule.bits == 32:
                moments = {name: value.view(p.data.shape) for name, value in moments.items()}
            states[numbers[p]] = {"step": state["step"], **moments}
        return {"state": dict(sorted(states.items())), "param_groups": groups}

    def load_state_dict(self, saved):
        """The counterpart, also of what torch.optim has saved."""
        order = list(self.group_of)
        for number, state in saved["state"].items():
            p = order[number]
            fresh = self.fresh(p.data.view(-1))
            for name, value in fresh.items():
                value.copy_(state[name].reshape(value.shape))
            self.state[p] = fresh


class Part(NamedTuple):
    """A piece of a parameter, and all that a step has to know of it."""

    optimizer: Lean
    state: dict[str, Any]
    rate: float
    start: int  # place in the model
    where: slice  # in the parameter

    def move(self, values, gradient):
        rule = self.optimizer.rule
        weight, gradient = values.float(), gradient.float()  # float32 is not copied
        if rule.name != "adamw" and rule.weight_decay:
            gradient = gradient.add(weight, alpha=rule.weight_decay)
        if rule.name == "adamw":
            weight = weight * (1 - self.rate * rule.weight_decay)
        if rule.name == "sgd":
            weight = weight.sub(gradient, alpha=self.rate)
        else:
            weight = weight - self.adam(gradient)
        if values.dtype == torch.bfloat16:
            weight = rounded(weight, self.draws("weight", values))
        values.copy_(weight)

    def adam(self, gradient):
        """What Adam takes off the weights; the moments go on."""
        rule, step = self.optimizer.rule, self.state["step"].item()
        b1, b2 = rule.betas
        m, v = self.moment("exp_avg", len(gradient)), self.moment("exp_avg_sq", len(gradient))
        m = m.lerp(gradient, 1 - b1)
        v = (v * b2).addcmul_(gradient, gradient, value=1 - b2)
        self.keep("exp_avg", m)
        self.keep("exp_avg_sq", v)
        root = v.sqrt_().div_((1 - b2**step) ** 0.5).add_(rule.eps)
        return m.mul_(self.rate / (1 - b1**step)).div_(root)

    def moment(self, name, size):
        """float32 (size,), from its codes where it has codes."""
        if self.optimizer.rule.bits == 32:
            return self.state[name][self.where]
        codes, scale = self.coded(name, size)
        return from_codes(codes, scale)[:size]

    def keep(self, name, values):
        if self.optimizer.rule.bits == 32:
            self.state[name][self.where] = values
            return
        codes, scale = self.coded(name, len(values))
        whole = F.pad(values, (0, len(codes) - len(values)))
        draws = self.draws(name, codes).float().mul_(2.0**-32)
        new, new_scale = to_codes(whole, codes.dtype, draws)
        codes.copy_(new)
        scale.copy_(new_scale)

    def coded(self, name, size):
        """The codes and scales of this piece, which begins a block."""
        begin = self.where.start
        blocks = slice(begin // BLOCK, (begin + padded(size)) // BLOCK)
        return self.state[name][begin : begin + padded(size)], self.state[name + "_scale"][blocks]

    def draws(self, what, like):
        """32 random bits for each value, others for weights than for either moment."""
        updates = int(self.state["step"].item())
        seed = hashed(DRAWN.index(what) + len(DRAWN) * updates, 1, self.optimizer.rule.seed, "cpu").item()
        return hashed(self.start, len(like), seed, like.device)


class InBackward:
    """Steps each parameter as soon as backward has its gradient, and forgets the gradient."""

    def __init__(self, optimizer):
        self.optimizer, self.norms = optimizer, []

    def follow(self, parameter, master):
        """master: what the optimizer has in its place, the parameter itself or a copy."""
        parameter.register_post_accumulate_grad_hook(lambda p: self._step(p, master))

    @torch.no_grad()
    def _step(self, parameter, master):
        norm = torch.linalg.vector_norm(master.grad, dtype=torch.float32)
        self.norms.append(norm)
        # The others have moved, or will: only this one is spared what cannot be undone.
        if norm.isfinite():
            self.optimizer.step_one(master)
            if master is not parameter:
                parameter.copy_(master.data)
        master.grad = None

    def norm(self):
        """The length of the gradients since it was last asked."""
        norms, self.norms = self.norms, []
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
