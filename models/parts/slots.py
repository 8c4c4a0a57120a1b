"""Several adapters resident under names; every row of a batch may take another one, in the same forward.

    lora.load_lora_slots(model, {"anna": "runs/anna/latest", "ben": "runs/ben/latest"})
    model.generate_batch([dict(text="Hi.", lora="anna"), dict(text="Hi.", lora="ben"), dict(text="Hi.")])

A wrapped layer holds them on top of each other, A (S, r, in) and B (S, out, r); thinner ones are filled up
with zeros, and a layer that an adapter leaves alone has zeros for it. A forward goes through the adapters
that its rows ask for, and each row keeps the result of its own:

    y = W x
    y = where(row takes s, y + scale_s B_s A_s x, y)      for each adapter s that is asked for

W is read once for all rows. What one adapter adds is computed as if it stood alone, so that no row depends on
its neighbours, not even in the last bit. Which rows take what is said by tensors: another choice copies no
weights and compiles nothing anew.
"""
import contextlib
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from models.parts import Invalid

KEPT = 32  # choices whose tensors are kept: the steps of a batch ask for the same few again and again


class Share(NamedTuple):
    """The rows of a forward that take one adapter."""

    place: torch.Tensor  # (1,) int64, in the stacks
    rows: torch.Tensor | None  # (n,) bool; None: all


@dataclass
class Slots:
    """The named adapters of a model. All its wrapped layers hold the same object."""

    names: dict  # {name: place in the stacks}
    shares: list = field(default_factory=list)  # of the forward that goes on
    made: dict = field(default_factory=dict)  # {(places, device): shares} of forwards before

    def shares_of(self, places, device):
        """[Share] of rows that take the adapters at these places, None the base alone."""
        key = (tuple(places), device)
        if key not in self.made:
            if len(self.made) >= KEPT:
                self.made.clear()
            with torch.inference_mode(False):  # they are used outside of it, too
                self.made[key] = make_shares(places, device)
        return self.made[key]


def make_shares(places, device):
    shares = []
    for place in sorted(set(places) - {None}):
        rows = [other == place for other in places]
        mask = None if all(rows) else torch.tensor(rows, device=device)
        number = torch.tensor([place], device=device)
        shares.append(Share(number, mask))
    return shares


def of(model):
    """The Slots of a model, or None."""
    state = vars(model).get("lora_state")
    return state and state.slots


def named(model, requests):
    """[(request without its `lora`, place of the adapter of that name or None)]"""
    slots, out = of(model), []
    for request in requests:
        rest = dict(request)
        name = rest.pop("lora", None)
        if name and (slots is None or name not in slots.names):
            known = ", ".join(slots.names) if slots else "none; lora.load_lora_slots loads some"
            raise Invalid(f"lora {name!r}: no adapter is loaded under this name; there are {known}")
        out.append((rest, slots.names[name] if name else None))
    return out


def mixed(model):
    """Whether the rows of the forward that goes on differ in their adapters."""
    slots = of(model)
    return slots is not None and any(share.rows is not None for share in slots.shares)


def hold(*modules):
    """Whether any layer inside is wrapped and holds several adapters."""
    layers = [layer for module in modules for layer in module.modules()]
    return any(getattr(layer, "lora_slots", None) for layer in layers)


@contextlib.contextmanager
def acting(model, places):
    """In here row i of what the wrapped layers read takes the adapter at places[i], None the base alone.

    Rows are the first dimension. Twice as many rows (both branches of guidance, two positions under each
    other) are the same rows once more; a single place is for whatever is read.
    """
    slots = of(model)
    if slots is None:
        yield
        return
    before = slots.shares
    slots.shares = slots.shares_of(places, model.device)
    try:
        yield
    finally:
        slots.shares = before


@contextlib.contextmanager
def picked(model, flat, L):
    """In here only some positions are read, each a row: (N, ..) or (1, N, ..).

    flat: (N,) int64, where they stand in (B, L).
    """
    slots = of(model)
    if slots is None:
        yield
        return
    before = slots.shares
    inside = []
    for place, rows in before:
        inside.append(Share(place, rows if rows is None else rows[flat // L]))
    slots.shares = inside
    try:
        yield
    finally:
        slots.shares = before


def added(layer, x, y):
    """The output y (.., out) of a wrapped layer at x (.., in), with the adapter of each row."""
    for place, rows in layer.lora_slots.shares:
        # By a tensor: an index that is a number would be a part of compiled code.
        A, B, scale = (t.index_select(0, place)[0].to(x.dtype)
                       for t in (layer.lora_A, layer.lora_B, layer.lora_scale))
        z = y + F.linear(F.linear(x, A) * scale, B)
        y = z if rows is None else torch.where(beside(rows, x), z, y)
    return y


def beside(rows, x):
    """rows (n,) as a mask that stretches over x (.., in); see `acting` and `picked`."""
    times, rest = divmod(x.shape[0], max(1, len(rows)))
    if rest == 0:
        return rows.repeat(times).view(x.shape[0], *[1] * (x.dim() - 1))
    assert x.shape[:2] == (1, len(rows))
    return rows.view(1, -1, *[1] * (x.dim() - 2))


def ranks(files):
    """{module: largest rank} of all that the adapters [(Adapter, strength)] adapt."""
    out = {}
    for a, _ in files:
        if a.full or a.bias:
            raise Invalid(f"{a.path} holds more than LoRA pairs, which cannot differ from row to row; speak "
                          "with it alone, or merge it")
        for module, pair in a.pairs.items():
            out[module] = max(len(pair.A), out.get(module, 0))
    return out


@torch.no_grad()
def fill(modules, files):
    """Put {name: (Adapter, strength)} into the wrapped layers {name: module}. Returns their Slots."""
    slots = Slots({name: place for place, name in enumerate(files)})
    for name, layer in modules.items():
        A = torch.zeros(len(files), *layer.lora_A.shape)
        B = torch.zeros(len(files), *layer.lora_B.shape)
        scale = torch.zeros(len(files))
        for place, (a, strength) in enumerate(files.values()):
            pair = a.pairs.get(name)
            if pair is not None:
                r = len(pair.A)
                A[place, :r] = pair.A
                B[place, :, :r] = pair.B
                scale[place] = pair.scale * strength
        device = layer.weight.device
        layer.lora_A = nn.Parameter(A.to(device), requires_grad=False)
        layer.lora_B = nn.Parameter(B.to(device), requires_grad=False)
        layer.lora_scale = scale.to(device)
        layer.lora_slots = slots
    return slots
