"""LoRA, the whole of it: wrap linear layers, switch, load, save, merge (arXiv 2106.09685).

    y = W x + scale * B A x      W (out, in) frozen, A (r, in) random, B (out, r) zero, scale = alpha / r

Fine-tuning moves a weight in few directions, so a product of two thin matrices can hold the change:
r * (in + out) numbers instead of in * out. Only A and B are trained, so gradients and optimizer state
are small, too. B is zero at first, so training begins at the base.

Wrapping swaps the class of an nn.Linear and adds parameters to it, so every published name stays what it was.
The scale is a buffer: on, off, strength and reset change values in place and never recompile anything. What
is trained in full beside LoRA (embeddings, say) keeps a copy of its base and is switched with the adapter.
Several adapters may be resident at once under names, a row of a batch each: models/parts/slots.py.

Which layers the words of the settings mean is decided in models/parts/targets.py; the file formats of this
and of other tools are in models/parts/adapters.py.
"""
import math
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import nn

from models.parts import Invalid, adapters, checkpoint, opt, quant, slots, targets
from models.parts.plain import as_record, typed


@dataclass
class LoRAConfig:
    r: int = opt(8, "rank; more rank, more capacity and memory")
    alpha: float = opt(16.0, "the update is scaled by alpha / r")
    dropout: float = opt(0.0, "share of values dropped in training")
    dropout_after: bool | None = opt(None, "drop the update after B, not the input before A; empty takes the backbone's habit")
    rslora: bool = opt(False, "scale by alpha / sqrt(r) instead (arXiv 2312.03732)")
    target_modules: list[str] = opt([], "names of modules, parts of names (q_proj, attn, decoder), or regexes, in any published "
                                        "naming; empty takes the words below")
    enable_lm: bool | None = opt(None, "adapt the language model; with no target at all the backbone chooses")
    enable_dit: bool | None = opt(None, "adapt the diffusion transformer")
    enable_proj: bool | None = opt(None, "adapt the projections between the parts")
    target_modules_lm: list[str] = opt([], "last names of the layers meant by enable_lm; empty means q, k, v and o of attention")
    target_modules_dit: list[str] = opt([], "last names of the layers meant by enable_dit")
    target_proj_modules: list[str] = opt([], "names of the projections meant by enable_proj; empty means all of them")
    target_layers: list[int | str] = opt([], "layer numbers to adapt in every targeted stack that has them (3), or in one "
                                             "(decoder.3); empty means all")
    b_lr_ratio: float = opt(1.0, "learning rate of B over that of A (LoRA+, arXiv 2402.12354 advises 16); 1 is off")
    bias: bool = opt(False, "also train a new bias on every wrapped layer")
    train_modules: list[str] = opt([], "regexes of modules that are trained in full beside LoRA")
    train_embeddings: bool = opt(False, "train the embedding tables in full beside LoRA")

    @property
    def scale(self):
        """Division by r lets one learning rate serve every rank, as B A is a sum of r products.

        By the root of r, large ranks keep learning; alpha / r makes their steps ever smaller.
        """
        root = math.sqrt(self.r) if self.rslora else self.r
        return self.alpha / root


@dataclass
class State:
    """What a model remembers of its adapter beside the wrapped layers; `state(model)` finds it."""

    settings: LoRAConfig | None = None
    enabled: bool = True
    strength: float = 1.0
    acting: float = 1.0  # the strength that parameters and buffers have now: 0 when switched off
    base: dict = field(default_factory=dict)  # {name: base value} of what is trained in full beside LoRA
    # {name: trained value} of the same, while the model holds another: at other strengths, or rounded to bf16
    tuned: dict = field(default_factory=dict)
    slots: object = None  # slots.Slots, where several adapters stand side by side


def state(model):
    return model.__dict__.setdefault("lora_state", State())


# ------------------------------------------------------------------------------------------------ wrap


class LoRALinear(nn.Linear):
    """An nn.Linear that holds an adapter: float32 parameters, of which the activation's dtype gets a copy."""

    added = ("lora_A", "lora_B", "lora_bias")  # no published file has them: see checkpoint.published
    lora_slots = None  # what says which of several adapters a row takes

    def forward(self, x):
        y = self.lora_plain.forward(self, x)
        if self.lora_slots is not None:
            return slots.added(self, x, y)
        # A first, then B: both steps are thin. The product B A would be as large as W, and its gradient, too.
        A, B = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        z = x if self.lora_after else self.drop(x)
        z = F.linear(z, A) * self.lora_scale.to(x.dtype)  # scaled while it is only r wide
        z = F.linear(z, B)
        y = y + (self.drop(z) if self.lora_after else z)
        if self.lora_bias is not None:
            bias = self.lora_bias * self.lora_strength
            y = y + bias.to(x.dtype)
        return y

    def drop(self, x):
        return F.dropout(x, self.lora_dropout, self.training)

    def merged(self, leaf):
        """`weight` or `bias` with the adapter added in float32, in the dtype of the base."""
        refuse(self.lora_slots)
        if self.lora_bias is not None and self.bias is None:
            raise Invalid(f"lora.bias cannot be merged: {self.lora_name} has no bias in the published layout")
        base = getattr(self, leaf).detach()
        if leaf == "weight":
            update = self.lora_scale * (self.lora_B @ self.lora_A)
        elif self.lora_bias is not None:
            update = self.lora_bias * self.lora_strength
        else:
            return base
        value = (base.float() + update).to(base.dtype)  # rounded once, after the sum
        if not value.isfinite().all():
            shape = list(value.shape)
            raise Invalid(f"the adapter makes a {leaf} of {shape} infinite or NaN; it cannot be merged")
        return value.detach()


def lora_modules(model):
    """{name: module} of the wrapped layers."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def apply_lora_to_model(model, settings):
    """Wrap what the settings name and freeze the rest. Returns the names.

    settings: LoRAConfig or a dict with the keys of the YAML's lora section.
    """
    s = settings if isinstance(settings, LoRAConfig) else LoRAConfig(**settings)
    if s.r < 1 or not 0 <= s.dropout < 1:
        raise Invalid(f"lora: r {s.r} must be at least 1 and dropout {s.dropout} in [0, 1)")
    names = targets.linears(model, s)
    # A layer both trained in full and wrapped would hold its change twice, and no file says which is which.
    inside = tuple(module + "." for module in targets.in_full(model, s))
    for name in names:
        if (name + ".").startswith(inside):
            raise Invalid(f"lora: {name} is both a LoRA target and trained in full; choose one")
    full = [name for name, _ in model.named_parameters() if name.startswith(inside)]
    ranks = dict.fromkeys(names, s.r)
    build(model, s, ranks, full)
    return names


def build(model, s, ranks, full):
    """Wrap the modules of {name: rank}, let the parameters in `full` train as they are, freeze all others."""
    remove_lora(model)
    model.requires_grad_(False)
    for name, r in ranks.items():
        wrap(model, name, replace(s, r=r))
    model.lora_state = State(s)
    for name in full:
        p = model.get_parameter(name)
        model.lora_state.base[name] = p.detach().clone()
        train_in_full(model, name)


def dropout_after(model, s):
    return model.lora_dropout_after if s.dropout_after is None else s.dropout_after


def wrap(model, name, s):
    """Turn an nn.Linear into a LoRALinear with a fresh adapter, which changes nothing yet.

    A and B are float32 whatever the base is: the steps of training are too small for bf16. Buffers that are
    not persistent stay out of the state dict, whose names are the published ones.
    """
    module = model.get_submodule(name)
    module.lora_plain = type(module)  # may be a subclass that computes the same in another way
    module.__class__ = LoRALinear
    module.lora_name = name  # for messages
    device = module.weight.device
    A = torch.empty(s.r, module.in_features, device=device)
    B = torch.zeros(module.out_features, s.r, device=device)
    bias = torch.zeros(module.out_features, device=device)
    scale = torch.tensor(s.scale, device=device)
    strength = torch.tensor(1.0, device=device)
    module.lora_A = nn.Parameter(A)
    module.lora_B = nn.Parameter(B)
    module.lora_bias = nn.Parameter(bias) if s.bias else None
    module.register_buffer("lora_scale", scale, persistent=False)
    module.register_buffer("lora_strength", strength, persistent=False)
    module.lora_full_scale = s.scale  # lora_scale at strength 1
    module.lora_dropout = s.dropout
    module.lora_after = dropout_after(model, s)
    draw(module)


def draw(module):
    """A is drawn as nn.Linear draws its weight. Were A zero beside B, neither would ever get a gradient."""
    nn.init.kaiming_uniform_(module.lora_A, a=math.sqrt(5))


def train_in_full(model, name):
    """A table becomes float32, as adapters are: a lookup works in any dtype.

    What multiplies activations keeps their dtype; train.py steps on a float32 copy of it.
    """
    p = model.get_parameter(name)
    p.published_dtype = p.dtype  # in which models/parts/checkpoint.py writes it
    holder, _ = checkpoint.holder(model, name)
    if isinstance(holder, nn.Embedding):
        p.data = p.data.float()
    p.requires_grad = True


def remove_lora(model):
    """Back to plain layers; what was trained in full gets its base values again."""
    for module in lora_modules(model).values():
        module.__class__ = module.lora_plain
        names = [*vars(module), *module._parameters, *module._buffers]
        for name in names:
            if name.startswith("lora_"):
                delattr(module, name)
    for name, base in state(model).base.items():
        p = model.get_parameter(name)
        p.data = base
        vars(p).pop("published_dtype", None)
    model.lora_state = State()


# ------------------------------------------------------------------------------------------------ switch


def set_lora_strength(model, strength):
    """How much of the adapter acts: 1 as trained, 0 none, in between or beyond as you like."""
    state(model).strength = finite(strength)
    act(model)


def set_lora_enabled(model, enabled):
    """Switch the adapter on or off without touching what it learned."""
    state(model).enabled = bool(enabled)
    act(model)


def finite(strength):
    if not math.isfinite(strength):
        raise Invalid(f"strength {strength}: expected a number, 1 as trained")
    return float(strength)


def refuse(several):
    """What is done to one adapter cannot be meant where several stand side by side."""
    if several is not None:
        names = ", ".join(several.names)
        raise Invalid(f"the model holds several adapters side by side ({names}); load the one that is meant "
                      "by load_lora_weights")


@torch.no_grad()
def act(model):
    """Make buffers and what is trained in full agree with `enabled` and `strength`."""
    st = state(model)
    refuse(st.slots)
    if not lora_modules(model) and not st.base:
        raise Invalid("the model has no adapter to switch; load or apply one first")
    new = st.strength if st.enabled else 0.0
    for module in lora_modules(model).values():
        module.lora_scale.fill_(module.lora_full_scale * new)
        module.lora_strength.fill_(new)
    if new == st.acting:
        return
    st.tuned = tuned(model)  # before the parameters take other values
    for name, base in st.base.items():
        base, value = base.float(), st.tuned[name].float()
        if new != 1.0:  # at 1 the sum would miss the trained value by a rounding
            value = base + new * (value - base)
        model.get_parameter(name).copy_(value)
    st.acting = new


def tuned(model):
    """{name: trained value} of what is trained in full, whatever strength acts now."""
    st = state(model)
    if st.acting != 1.0:
        return st.tuned
    out = {}
    for name in st.base:
        p = model.get_parameter(name).detach()
        out[name] = p.clone()
        # A file's float32 value says more than its bf16 image in the model, until training moves that.
        exact = st.tuned.get(name)
        if exact is not None and torch.equal(exact.to(p), p):
            out[name] = exact
    return out


@torch.no_grad()
def reset_lora_weights(model):
    """A as if fresh, B zero, what is trained in full back at its base: the model is its base again.

    Unlike remove_lora it leaves the layers wrapped: a compiled model goes on, and training can begin anew.
    """
    refuse(state(model).slots)
    for module in lora_modules(model).values():
        draw(module)
        module.lora_B.zero_()
        if module.lora_bias is not None:
            module.lora_bias.zero_()
    st = state(model)
    for name, base in st.base.items():
        model.get_parameter(name).copy_(base)
        st.tuned[name] = base.float()


# ------------------------------------------------------------------------------------------------ load


def load_lora_weights(model, adapter, ignore_base=False):
    """Load a folder or file, or [(path, strength), ...] stacked along r. Returns (loaded, skipped) names.

    The structure comes from the adapter's own settings; whatever another adapter had left is gone. Names or
    shapes that do not fit are an error before anything is changed; `skipped` holds only keys that are known
    to do nothing.
    """
    a, strength = read(model, adapter, ignore_base)
    settings = {**a.settings, "target_layers": [], "bias": bool(a.bias)}
    s = typed(LoRAConfig, as_record(settings, a.path))
    if has_shape(model, a):
        model.lora_state = State(s)
    else:  # the layers are built anew, which a compiled model notices once
        ranks = {name: len(pair.A) for name, pair in a.pairs.items()}
        build(model, s, ranks, a.full)
    fill(model, a)
    for name, pair in a.pairs.items():
        module = model.get_submodule(name)
        module.lora_full_scale = pair.scale
        module.lora_dropout = s.dropout
        module.lora_after = dropout_after(model, s)
    set_lora_strength(model, strength)
    return a.loaded, a.skipped


def read(model, adapter, ignore_base):
    """(Adapter, strength) of what load_lora_weights takes."""
    several = adapter if isinstance(adapter, (list, tuple)) else [(adapter, 1.0)]
    files = []
    for path, strength in several:
        files.append((adapters.read(path, model, ignore_base), finite(strength)))
    if len(files) > 1:  # their strengths are in the stacked B
        return adapters.stack(files), 1.0
    return files[0]


def load_lora_slots(model, several, ignore_base=False):
    """Adapters side by side: {name: what load_lora_weights takes}. A request of generate_batch names its own.

    What had been loaded before is gone. Returns {name: (loaded, skipped)}.
    """
    files = {name: read(model, adapter, ignore_base) for name, adapter in several.items()}
    ranks = slots.ranks(files.values())
    settings = LoRAConfig(r=max(ranks.values(), default=1))
    build(model, settings, ranks, [])
    state(model).slots = slots.fill(lora_modules(model), files)
    return {name: (a.loaded, a.skipped) for name, (a, _) in files.items()}


def has_shape(model, a):
    """Whether the layers that stand can take the values of an adapter as they are."""
    have = {name: (m.lora_A.shape, m.lora_bias is not None) for name, m in lora_modules(model).items()}
    need = {name: (pair.A.shape, bool(a.bias)) for name, pair in a.pairs.items()}
    return have == need and not a.full and not state(model).base


@torch.no_grad()
def fill(model, a):
    """Copy the values of an adapter into the layers that stand."""
    for name, pair in a.pairs.items():
        module = model.get_submodule(name)
        module.lora_A.copy_(pair.A)
        module.lora_B.copy_(pair.B)
        if module.lora_bias is not None:
            module.lora_bias.zero_()  # an adapter may have biases on some of its layers only
            if name in a.bias:
                module.lora_bias.copy_(a.bias[name])
    for name, value in a.full.items():
        p = model.get_parameter(name)
        p.copy_(value)
        if p.dtype != value.dtype:  # what it rounds away
            state(model).tuned[name] = value.to(p.device)


def restore_lora_weights(model, path, ignore_base=False):
    """Put saved values into the adapter that stands; everything must be in the file and fit.

    For a run that goes on: its optimizer holds the very parameters that stand, so they may not be built anew.
    """
    a = adapters.read(path, model, ignore_base)
    wrapped = lora_modules(model)
    biased = {name for name, module in wrapped.items() if module.lora_bias is not None}
    same_modules = set(a.pairs) == set(wrapped) and set(a.bias) == biased
    if not same_modules or set(a.full) != set(state(model).base):
        counts = f"{len(a.pairs)} modules, the run has {len(wrapped)}"
        raise Invalid(f"{a.path} holds {counts}, or other modules trained in full")
    fill(model, a)


# --------------------------------------------------------------------------------------------- save and merge


def get_lora_state_dict(model):
    """{name: tensor} of all that the adapter is: lora_A, lora_B, lora_bias, and what is trained in full."""
    refuse(state(model).slots)
    out = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    out.update(tuned(model))
    return {name: value.detach().clone() for name, value in out.items()}


def save_lora_weights(model, folder, format="native", naming=None, **record):
    """Write the adapter as a folder that its ecosystem loads, with a record of its base in the header.

    record: what else the header is to say, such as the speakers of the training data.
    """
    tensors = get_lora_state_dict(model)
    settings = state(model).settings
    place = adapters.Place(folder, format, naming)
    adapters.write(model, tensors, settings, place, record)


@torch.no_grad()
def merge_lora_weights(model):
    """Add the adapter to the base in place and unwrap: original speed, no adapter any more.

    W + scale * B A has the shape of W, so nothing is left to compute beside it. A bf16 base rounds the sum.
    """
    check_mergeable(model)
    for module in lora_modules(model).values():
        module.weight.copy_(module.merged("weight"))
        if module.bias is not None:
            module.bias.copy_(module.merged("bias"))
    st = state(model)
    for name, base in st.base.items():  # what was trained in full becomes the base, at the strength that acts
        p = model.get_parameter(name)
        st.base[name] = p.detach().to(base.dtype)
    remove_lora(model)


def check_mergeable(model):
    """A new bias needs a place in the published layout; said before anything is changed."""
    if quant.is_quantised(model):
        raise Invalid("an adapter is merged into the base as it was published, never into rounded weights; "
                      "load it with 16 bits")
    stuck = []
    for name, module in lora_modules(model).items():
        if module.lora_bias is not None and module.bias is None:
            stuck.append(name)
    if stuck:
        more = f"{stuck[0]} and {len(stuck) - 1} more"
        raise Invalid(f"lora.bias cannot be merged: {more} have no bias in the published layout")
