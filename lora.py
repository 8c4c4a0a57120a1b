"""LoRA, the whole of it: wrap linear layers, switch, load, save, merge (arXiv 2106.09685).

    y = W x + scale * B A x        A (r, in) random, B (out, r) zero, scale = alpha / r; only A and B are trained

Wrapping swaps the class of an nn.Linear and adds parameters to it, so every published name stays what it was. The scale
is a buffer: on, off, strength and reset change its value or the parameters in place and never recompile anything.
What is trained in full beside LoRA (embeddings, say) keeps a copy of its base and is switched with the adapter.
"""
import math
import re
from dataclasses import dataclass, field, fields

import torch
import torch.nn.functional as F
from torch import nn

from models.parts import Invalid, adapters, opt


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
    tuned: dict = field(default_factory=dict)  # {name: trained value} while gain is not 1, so that switching loses nothing


def state(model):
    return model.__dict__.setdefault("lora_state", State())


class LoRALinear(nn.Linear):
    """An nn.Linear that holds an adapter. Adapter parameters are float32; the product runs in the activation's dtype."""

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
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
        return (base.float() + self.lora_scale * (self.lora_B @ self.lora_A)).to(base.dtype).detach()


def lora_modules(model):
    """{name: module} of the wrapped layers."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}


def targets(model, s):
    """Names of the nn.Linear modules that settings `s` mean; a word that means nothing is an error."""
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    spelled = {n: {n} | {model.published_name(n + ".weight", naming).removesuffix(".weight") for naming in model.namings} for n in linears}
    words = {f.name: getattr(s, f.name) for f in fields(s) if f.name.startswith(("enable_", "target_")) and f.name != "target_layers"}
    names = []
    for word in s.target_modules:
        hits = [n for n in linears if any(_means(word, spelling) for spelling in spelled[n])]
        if not hits:
            raise Invalid(f"lora.target_modules: {word!r} matches no Linear; this model has names such as {linears[0]!r}, {linears[-1]!r}")
        names += hits
    if not s.target_modules or any(v for k, v in words.items() if k != "target_modules"):
        names += model.lora_targets(s)
    names = sorted(set(names), key=linears.index)
    if s.target_layers:  # 3 is layer 3 of every targeted stack that has one, decoder.3 that of one stack
        layer = {n: m[1] for n in names if (m := re.search(r"\.(\d+)\.", n))}
        asked = {n for n in names if n not in layer}
        for entry in s.target_layers:
            stack, _, index = str(entry).rpartition(".")
            hits = [n for n in layer if layer[n] == index and (not stack or any(_means(stack, spelling) for spelling in spelled[n]))]
            if not hits:
                raise Invalid(f"lora.target_layers: no targeted stack has a layer {entry}; they have 0 to {max(map(int, layer.values()), default=-1)}")
            asked.update(hits)
        names = [n for n in names if n in asked]
    return names


def _means(word, name):
    """A word means a module by its name, its end, any step on the way to it, or as a regex."""
    return name == word or name.endswith("." + word) or (not word.isdigit() and word in name.split(".")) or _matches(word, name)


def _matches(pattern, name):
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as e:
        raise Invalid(f"lora.target_modules: {pattern!r} is no module name and no regex ({e})") from None


def apply_lora_to_model(model, settings):
    """Wrap what the settings name, freeze the rest. settings: LoRAConfig or a dict with the YAML's keys. Returns the names."""
    s = settings if isinstance(settings, LoRAConfig) else LoRAConfig(**settings)
    if s.r < 1 or not 0 <= s.dropout < 1:
        raise Invalid(f"lora: r {s.r} must be at least 1 and dropout {s.dropout} in [0, 1)")
    names = targets(model, s)
    full = _modules_in_full(model, s)
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
    for n in base:
        p = model.get_parameter(n)
        p.data, p.requires_grad = p.data.float(), True  # trained values need float32, as adapters do


def _modules_in_full(model, s):
    patterns = list(s.train_modules) + (list(model.embeddings) if s.train_embeddings else [])
    names = [n for n, m in model.named_modules() if n and any(True for _ in m.parameters())]
    found = []
    for p in patterns:
        hits = [n for n in names if n == p or _matches(p, n)]
        if not hits:
            raise Invalid(f"lora.train_modules: {p!r} matches no module; this model has names such as {names[0]!r}")
        found += hits
    return found


def wrap(module, s, after):
    """Turn an nn.Linear into a LoRALinear with a fresh adapter, which changes nothing yet."""
    device = module.weight.device
    module.__class__ = LoRALinear
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
        for name in ("lora_A", "lora_B", "lora_bias", "lora_scale", "lora_strength"):
            delattr(module, name)
        module.__class__ = nn.Linear
    for name, base in state(model).base.items():
        model.get_parameter(name).data = base
    model.lora_state = State()


# ------------------------------------------------------------------------------------------------ switches


def set_lora_strength(model, strength):
    """How much of the adapter acts: 1 as trained, 0 none, in between or beyond as you like."""
    state(model).strength = float(strength)
    _follow(model)


def set_lora_enabled(model, enabled):
    """Switch the adapter on or off without touching what it learned."""
    state(model).enabled = bool(enabled)
    _follow(model)


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
        st.tuned = {n: model.get_parameter(n).detach().clone() for n in st.base}
    for n, base in st.base.items():
        base, tuned = base.float(), st.tuned[n]
        model.get_parameter(n).copy_(tuned if new == 1.0 else base + new * (tuned - base))
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
    st = state(model)
    out = {n: p.detach().clone() for n, p in model.named_parameters() if ".lora_" in n}
    return out | {n: (model.get_parameter(n).detach() if st.gain == 1.0 else st.tuned[n]).clone() for n in st.base}


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
    read = [(adapters.read(path, model, ignore_base), float(strength)) for path, strength in several]
    pairs, full, bias, loaded, skipped = {}, {}, {}, [], []
    for a, strength in read:
        for name, (A, B, scale) in a.pairs.items():
            pairs.setdefault(name, []).append((A, B, scale, strength))
        if (a.full or a.bias) and len(read) > 1:
            raise Invalid(f"{a.path} holds more than LoRA pairs and cannot be stacked with others; merge them one after the other")
        full, bias = a.full, a.bias
        loaded, skipped = loaded + a.loaded, skipped + a.skipped
    one = len(read) == 1
    s = LoRAConfig(**{**read[0][0].settings, "target_layers": [], "bias": bool(bias)})
    stacked = {}
    for name, parts in pairs.items():
        A = torch.cat([A for A, _, _, _ in parts])
        scale = parts[0][2] if one else 1.0
        B = parts[0][1] if one else torch.cat([B * scale * strength for _, B, scale, strength in parts], 1)
        stacked[name] = (A, B, scale)
    here = lora_modules(model)
    same = (set(here) == set(stacked) and not full and not state(model).base
            and all(here[n].lora_A.shape == A.shape and (here[n].lora_bias is not None) == bool(bias) for n, (A, _, _) in stacked.items()))
    if not same:
        remove_lora(model)
        model.requires_grad_(False)
        for name, (A, _, _) in stacked.items():
            shape = LoRAConfig(r=len(A), dropout=s.dropout, bias=s.bias)
            wrap(model.get_submodule(name), shape, model.lora_dropout_after if s.dropout_after is None else s.dropout_after)
        base = {n: model.get_parameter(n).detach().clone() for n in full}
        _train_in_full(model, base)
        model.lora_state = State(base=base)
    st = state(model)
    st.settings, st.enabled, st.strength, st.gain = s, True, 1.0, 1.0
    for name, (A, B, scale) in stacked.items():
        module = model.get_submodule(name)
        module.lora_A.data.copy_(A)
        module.lora_B.data.copy_(B)
        module.lora_full_scale = scale
        module.lora_scale.fill_(scale)
        module.lora_strength.fill_(1.0)
        if bias:
            module.lora_bias.data.copy_(bias.get(name, torch.zeros_like(module.lora_bias)))
    for name, value in full.items():
        model.get_parameter(name).data.copy_(value)
    if one and several[0][1] != 1.0:
        set_lora_strength(model, several[0][1])
    return loaded, skipped


@torch.no_grad()
def restore_lora_weights(model, path, ignore_base=False):
    """Put saved values into the adapter that stands, structure untouched; everything must be in the file and fit."""
    a = adapters.read(path, model, ignore_base)
    here = lora_modules(model)
    biased = {n for n, m in here.items() if m.lora_bias is not None}
    if set(a.pairs) != set(here) or set(a.full) != set(state(model).base) or set(a.bias) != biased:
        raise Invalid(f"{a.path} holds {len(a.pairs)} modules, the run has {len(here)}, or other modules trained in full")
    for name, (A, B, _) in a.pairs.items():
        here[name].lora_A.copy_(A)
        here[name].lora_B.copy_(B)
    for name, value in a.bias.items():
        here[name].lora_bias.copy_(value)
    for name, value in a.full.items():
        model.get_parameter(name).copy_(value)


def save_lora_weights(model, folder, format="native", naming=None, **record):
    """Write the adapter as a folder that its ecosystem loads, with a record of base and settings in the header."""
    adapters.write(model, get_lora_state_dict(model), state(model).settings, folder, format, naming, record)
