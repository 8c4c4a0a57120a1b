"""LoRA, the whole of it: wrap linear layers, switch, load, save, merge (arXiv 2106.09685).

    y = W x + scale * B A x        A (r, in) random, B (out, r) zero, scale = alpha / r; only A and B are trained

Wrapping swaps the class of an nn.Linear and adds parameters to it, so every published name stays what it was. The scale
is a buffer: on, off, strength and reset change its value or the parameters in place and never recompile anything.
What is trained in full beside LoRA (embeddings, say) keeps a copy of its base and is switched with the adapter.
"""
import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from models.parts import Invalid, adapters, opt, targets


@dataclass
class LoRAConfig:
    r: int = opt(8, "rank; more rank, more capacity and memory")
    alpha: float = opt(16.0, "the update is scaled by alpha / r")
    dropout: float = opt(0.0, "share of values dropped in training")
    dropout_after: bool | None = opt(None, "drop the update after B instead of the input before A; empty takes the backbone's habit")
    rslora: bool = opt(False, "scale by alpha / sqrt(r) instead (arXiv 2312.03732)")
    target_modules: list[str] = opt([], "names of modules, parts of names (q_proj, attn, decoder), or regexes, in any published naming; empty takes the words below")
    enable_lm: bool | None = opt(None, "adapt the language model; with no target at all the backbone chooses")
    enable_dit: bool | None = opt(None, "adapt the diffusion transformer")
    enable_proj: bool | None = opt(None, "adapt the projections between the parts")
    target_modules_lm: list[str] = opt([], "last names of the layers meant by enable_lm; empty means q, k, v and o of attention")
    target_modules_dit: list[str] = opt([], "last names of the layers meant by enable_dit")
    target_proj_modules: list[str] = opt([], "names of the projections meant by enable_proj; empty means all of them")
    target_layers: list[int | str] = opt([], "layer numbers to adapt in every targeted stack that has them (3), or in one (decoder.3); empty means all")
    bias: bool = opt(False, "also train a new bias on every wrapped layer")
    train_modules: list[str] = opt([], "regexes of modules that are trained in full beside LoRA")
    train_embeddings: bool = opt(False, "train the embedding tables in full beside LoRA")

    @property
    def scale(self):
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)


@dataclass
class State:
    """What a model knows of its adapter, beside the wrapped layers; `state(model)` finds it."""

    settings: LoRAConfig | None = None
    enabled: bool = True
    strength: float = 1.0
    gain: float = 1.0  # what acts now: strength, or 0 when switched off
    base: dict = field(default_factory=dict)  # {name: base value} of parameters trained in full beside LoRA
    tuned: dict = field(default_factory=dict)  # {name: trained value} while gain is not 1 or the model rounds it, so that nothing is lost


def state(model):
    return model.__dict__.setdefault("lora_state", State())


class LoRALinear(nn.Linear):
    """An nn.Linear that holds an adapter. Adapter parameters are float32; the product runs in the activation's dtype."""

    def forward(self, x):
        y = self.lora_plain.forward(self, x)
        z = x if self.lora_after else F.dropout(x, self.lora_dropout, self.training)
        z = F.linear(z, self.lora_A.to(x.dtype)) * self.lora_scale.to(x.dtype)  # scaled where it is narrow
        z = F.linear(z, self.lora_B.to(x.dtype))
        if self.lora_after:
            z = F.dropout(z, self.lora_dropout, self.training)
        y = y + z
        if self.lora_bias is not None:
            y = y + (self.lora_bias * self.lora_strength).to(x.dtype)
        return y

    def merged(self, name):
        """`weight` or `bias` with the adapter added in float32, in the dtype of the base."""
        base = getattr(self, name)
        if name == "bias":
            return base.detach() if self.lora_bias is None else (base.float() + self.lora_bias * self.lora_strength).to(base.dtype).detach()
        out = (base.float() + self.lora_scale * (self.lora_B @ self.lora_A)).to(base.dtype).detach()
        if not out.isfinite().all():
            raise Invalid(f"the adapter makes a weight of {list(out.shape)} infinite or NaN; it cannot be merged")
        return out


def lora_modules(model):
    """{name: module} of the wrapped layers."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}


def apply_lora_to_model(model, settings):
    """Wrap what the settings name, freeze the rest. settings: LoRAConfig or a dict with the YAML's keys. Returns the names."""
    s = settings if isinstance(settings, LoRAConfig) else LoRAConfig(**settings)
    if s.r < 1 or not 0 <= s.dropout < 1:
        raise Invalid(f"lora: r {s.r} must be at least 1 and dropout {s.dropout} in [0, 1)")
    names = targets.linears(model, s)
    full = targets.in_full(model, s)
    for name in names:
        if any(name == f or name.startswith(f + ".") for f in full):
            raise Invalid(f"lora: {name} is both a LoRA target and trained in full; choose one")
    remove_lora(model)
    model.requires_grad_(False)
    for name in names:
        wrap(model.get_submodule(name), s, model.lora_dropout_after if s.dropout_after is None else s.dropout_after)
    base = {n: p.detach().clone() for f in full for n, p in model.named_parameters() if n.startswith(f + ".")}
    _train_in_full(model, base)
    model.lora_state = State(s, base=base)
    return names


def _train_in_full(model, base):
    """Tables become float32, as adapters are; what multiplies activations keeps their dtype (train.py steps on float32 copies)."""
    for n in base:
        p, holder = model.get_parameter(n), model.get_submodule(n.rpartition(".")[0])
        p.data, p.requires_grad = p.data.float() if isinstance(holder, nn.Embedding) else p.data, True


def wrap(module, s, after):
    """Turn an nn.Linear into a LoRALinear with a fresh adapter, which changes nothing yet."""
    device = module.weight.device
    module.lora_plain, module.__class__ = type(module), LoRALinear
    module.lora_A = nn.Parameter(torch.empty(s.r, module.in_features, device=device))
    module.lora_B = nn.Parameter(torch.zeros(module.out_features, s.r, device=device))
    module.lora_bias = nn.Parameter(torch.zeros(module.out_features, device=device)) if s.bias else None
    module.register_buffer("lora_scale", torch.tensor(s.scale, device=device), persistent=False)
    module.register_buffer("lora_strength", torch.tensor(1.0, device=device), persistent=False)
    module.lora_full_scale, module.lora_dropout, module.lora_after = s.scale, s.dropout, after
    nn.init.kaiming_uniform_(module.lora_A, a=math.sqrt(5))


def remove_lora(model):
    """Back to plain layers; what an adapter had changed in full gets its base values again."""
    for module in lora_modules(model).values():
        module.__class__ = module.lora_plain
        for name in [n for n in (*vars(module), *module._parameters, *module._buffers) if n.startswith("lora_")]:
            delattr(module, name)
    for name, base in state(model).base.items():
        model.get_parameter(name).data = base
    model.lora_state = State()


# ------------------------------------------------------------------------------------------------ switches


def set_lora_strength(model, strength):
    """How much of the adapter acts: 1 as trained, 0 none, in between or beyond as you like."""
    state(model).strength = finite(strength)
    _follow(model)


def set_lora_enabled(model, enabled):
    """Switch the adapter on or off without touching what it learned."""
    state(model).enabled = bool(enabled)
    _follow(model)


def finite(strength):
    if not math.isfinite(strength):
        raise Invalid(f"strength {strength}: expected a number, 1 as trained")
    return float(strength)


def tuned(model):
    """{name: trained value} of what is trained in full; where bf16 rounds it, as the file said while no step has changed it."""
    st = state(model)
    if st.gain != 1.0:
        return st.tuned
    now, known = {n: model.get_parameter(n).detach() for n in st.base}, st.tuned
    return {n: known[n] if n in known and torch.equal(known[n].to(p), p) else p.clone() for n, p in now.items()}


@torch.no_grad()
def _follow(model):
    """Make buffers and fully trained parameters agree with `enabled` and `strength`."""
    st = state(model)
    if not lora_modules(model) and not st.base:
        raise Invalid("the model has no adapter to switch; load or apply one first")
    new = st.strength if st.enabled else 0.0
    for module in lora_modules(model).values():
        module.lora_scale.fill_(module.lora_full_scale * new)
        module.lora_strength.fill_(new)
    if st.gain == 1.0:
        st.tuned = tuned(model)
    for n, base in st.base.items():
        base, value = base.float(), st.tuned[n].float()
        model.get_parameter(n).copy_(value if new == 1.0 else base + new * (value - base))
    st.gain = new


@torch.no_grad()
def reset_lora_weights(model):
    """A as if fresh, B zero, what is trained in full back at its base: the model is its base again."""
    for module in lora_modules(model).values():
        nn.init.kaiming_uniform_(module.lora_A, a=math.sqrt(5))
        module.lora_B.zero_()
        if module.lora_bias is not None:
            module.lora_bias.zero_()
    st = state(model)
    for n, base in st.base.items():
        model.get_parameter(n).copy_(base)
        st.tuned[n] = base.float()


def get_lora_state_dict(model):
    """{name: float32 tensor} of everything the adapter is: lora_A, lora_B, lora_bias, and what is trained in full."""
    out = {n: p.detach().clone() for n, p in model.named_parameters() if ".lora_" in n}
    return out | {n: value.clone() for n, value in tuned(model).items()}


@torch.no_grad()
def merge_lora_weights(model):
    """Add the adapter to the base in place and unwrap: original speed, no adapter any more."""
    check_mergeable(model)
    for module in lora_modules(model).values():
        module.weight.copy_(module.merged("weight"))
        if module.bias is not None:
            module.bias.copy_(module.merged("bias"))
    st = state(model)
    for n, base in st.base.items():  # what was trained in full becomes the base, at the strength that acts
        st.base[n] = model.get_parameter(n).detach().to(base.dtype)
    remove_lora(model)


def check_mergeable(model):
    stuck = [n for n, m in lora_modules(model).items() if m.lora_bias is not None and m.bias is None]
    if stuck:
        raise Invalid(f"lora.bias cannot be merged: {stuck[0]} and {len(stuck) - 1} more have no bias in the published layout")


# ------------------------------------------------------------------------------------------------ files


def load_lora_weights(model, adapter, ignore_base=False):
    """Load a folder or file, or [(path, strength), ...] which are stacked along r. Returns (loaded, skipped) names.

    The structure comes from the adapter's own settings; whatever another adapter had left is gone. Names or shapes that
    do not fit are an error before anything is changed; `skipped` holds only keys that are known to do nothing.
    """
    several = adapter if isinstance(adapter, (list, tuple)) else [(adapter, 1.0)]
    read = [(adapters.read(path, model, ignore_base), finite(strength)) for path, strength in several]
    a = read[0][0] if len(read) == 1 else adapters.stack(read)
    s = LoRAConfig(**{**a.settings, "target_layers": [], "bias": bool(a.bias)})
    here = lora_modules(model)
    same = set(here) == set(a.pairs) and not a.full and not state(model).base and all(
        here[n].lora_A.shape == A.shape and (here[n].lora_bias is not None) == s.bias for n, (A, _, _) in a.pairs.items())
    if not same:  # another shape: build the layers anew, which a compiled model notices once
        remove_lora(model)
        model.requires_grad_(False)
        for name, (A, _, _) in a.pairs.items():
            shape = LoRAConfig(r=len(A), dropout=s.dropout, bias=s.bias)
            wrap(model.get_submodule(name), shape, model.lora_dropout_after if s.dropout_after is None else s.dropout_after)
        base = {n: model.get_parameter(n).detach().clone() for n in a.full}
        _train_in_full(model, base)
        model.lora_state = State(base=base)
    st = state(model)
    st.settings, st.enabled, st.strength, st.gain = s, True, 1.0, 1.0
    _fill(model, a)
    for name, (_, _, scale) in a.pairs.items():
        module = model.get_submodule(name)
        module.lora_full_scale, module.lora_dropout = scale, s.dropout
        module.lora_scale.fill_(scale)
        module.lora_strength.fill_(1.0)
    if len(read) == 1 and read[0][1] != 1.0:
        set_lora_strength(model, read[0][1])
    return a.loaded, a.skipped


@torch.no_grad()
def _fill(model, a):
    """Copy the values of an adapter into the layers that stand."""
    for name, (A, B, _) in a.pairs.items():
        module = model.get_submodule(name)
        module.lora_A.copy_(A)
        module.lora_B.copy_(B)
        if module.lora_bias is not None:
            module.lora_bias.copy_(a.bias.get(name, torch.zeros(len(B))))
    for name, value in a.full.items():
        p = model.get_parameter(name)
        p.copy_(value)
        if p.dtype != value.dtype:  # what it rounds away
            state(model).tuned[name] = value.to(p.device)


def restore_lora_weights(model, path, ignore_base=False):
    """Put saved values into the adapter that stands, structure untouched; everything must be in the file and fit."""
    a = adapters.read(path, model, ignore_base)
    here = lora_modules(model)
    biased = {n for n, m in here.items() if m.lora_bias is not None}
    if set(a.pairs) != set(here) or set(a.full) != set(state(model).base) or set(a.bias) != biased:
        raise Invalid(f"{a.path} holds {len(a.pairs)} modules, the run has {len(here)}, or other modules trained in full")
    _fill(model, a)


def save_lora_weights(model, folder, format="native", naming=None, **record):
    """Write the adapter as a folder that its ecosystem loads, with a record of base and settings in the header."""
    adapters.write(model, get_lora_state_dict(model), state(model).settings, folder, format, naming, record)
