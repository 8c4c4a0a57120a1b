"""Adapter files of this project and of others: read any of them onto a model, write those that tools load.

    format   weights                            config               keys
    voxcpm   lora_weights.safetensors or .ckpt  lora_config.json     <module>.lora_A (r, in), .lora_B (out, r)
    peft     adapter_model.safetensors or .bin  adapter_config.json  base_model.model.<module>.lora_A.weight
    mlx      adapters.safetensors               adapter_config.json  <module>.lora_a (in, r), .lora_b (r, out)
    moshi    lora.safetensors                   config.json          <module>.lora_A.weight, .lora_B.weight

<module> is a published module name in any naming of the backbone; B's rows follow the weight's. What was
trained in full beside LoRA stands in the same file under its parameter's name. Each file that is written here
also records backbone, base, a fingerprint of the base and the settings in the safetensors header, where other
tools look past it.
"""
import dataclasses
import functools
import json
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from models.parts import Invalid, checkpoint, targets
from models.parts.plain import LARGEST, an_object, need, parse, pattern_of, read_object, shown

FILES = {"voxcpm": ("lora_weights.safetensors", "lora_weights.ckpt"),
         "peft": ("adapter_model.safetensors", "adapter_model.bin"),
         "mlx": ("adapters.safetensors",),
         "moshi": ("lora.safetensors",)}
CONFIGS = {"voxcpm": "lora_config.json", "peft": "adapter_config.json",
           "mlx": "adapter_config.json", "moshi": "config.json"}
REFUSED = {  # {pattern of a key: what it is}
    r".*lora_magnitude_vector.*": "DoRA magnitudes: not supported",
    r".*lora_embedding_[AB].*": "LoRA on an embedding table: not supported",
    r".*embeddings\.lora_[ab]": "LoRA on an embedding table: not supported",
    r".*\.base_layer\.bias": "biases of the base (bias: lora_only): not supported",
}
NAMED = 6  # tensors in a message: enough to see the pattern, few enough to read


class Pair(NamedTuple):
    A: torch.Tensor  # (r, in)
    B: torch.Tensor  # (out, r)
    scale: float


@dataclass
class Adapter:
    """One file, or several stacked, in the names and the row order of the model that it was read for."""

    path: Path
    settings: dict  # values of LoRAConfig, not yet of its types
    record: dict  # what the header says of backbone, base and speakers
    pairs: dict = field(default_factory=dict)  # {module: Pair}
    bias: dict = field(default_factory=dict)  # {module: (out,)}
    full: dict = field(default_factory=dict)  # {parameter: tensor} trained in full
    loaded: list = field(default_factory=list)  # names in the file
    skipped: list = field(default_factory=list)


def locate(path):
    """(weights file, config file or None, format) of an adapter folder or file."""
    path = checkpoint.follow(path)
    for kind, names in FILES.items():
        for name in names:
            if path.name == name and path.is_file():
                return path, _config_beside(path, kind), kind
            if (path / name).is_file():
                return path / name, _config_beside(path / name, kind), kind
    # One file of any name: what csm-mlx once wrote, and what `voxcpm` writes renamed.
    if path.is_file() and path.suffix == ".safetensors":
        return path, _config_beside(path, "voxcpm"), "voxcpm"
    names = ", ".join(sum(FILES.values(), ()))
    steps = [path / "latest"] if os.path.lexists(path / "latest") else checkpoint.steps(path)
    hint = f"; this is a run, give {steps[0]}" if steps else ""
    raise Invalid(f"no adapter at {path}; expected a folder with one of {names}{hint}")


def _config_beside(weights, kind):
    config = weights.parent / CONFIGS[kind]
    return config if config.is_file() else None


def read_record(path):
    """What the header records: backbone, base, fingerprint, settings, speakers; {} from another tool."""
    weights, _, _ = locate(path)
    if weights.suffix != ".safetensors":
        return {}
    text = checkpoint.read_metadata(weights).get("adapter_record") or "{}"
    where = f"the record in {weights}"
    return an_object(parse(text, where), where)


# ----------------------------------------------------------------------------------------- settings in a file


class Meaning(NamedTuple):
    """What a config file says, in our words."""

    settings: dict  # values of LoRAConfig
    scale: Callable  # of a module's published name
    mixed_ranks: bool = False  # whether modules may have another rank than r


def _read_settings(config, record, kind, weights):
    """The Meaning of the config file, or of the record where that file is gone."""
    if config:
        return SETTINGS[kind](read_object(config))
    if "settings" in record:
        return _recorded_settings(need(record, "settings", dict))
    raise Invalid(f"{weights} comes without {CONFIGS[kind]}, so its alpha is unknown and its "
                  "strength would be a guess; put the file beside the weights, or write it with what it "
                  "was trained with, such "
                  'as {"r": 8, "alpha": 16}')


def _rank(raw, key):
    return need(raw, key, int, at_least=1, at_most=LARGEST)


def _dropout(raw, key):
    return need(raw, key, float, 0.0, at_least=0, at_most=1)


def _recorded_settings(raw):
    scale = need(raw, "scale", float)
    return Meaning({**raw, "r": _rank(raw, "r")}, lambda module: scale)


VOXCPM_WORDS = ("enable_lm", "enable_dit", "enable_proj",
                "target_modules_lm", "target_modules_dit", "target_proj_modules")


def _either(raw, key, other):
    """Which of two keys a file has; the first, which a message then asks for, where it has neither."""
    return other if other in raw and key not in raw else key


def _voxcpm_settings(raw):
    raw = need(raw, "lora_config", dict, raw)
    r = _rank(raw, _either(raw, "r", "rank"))
    alpha = need(raw, _either(raw, "alpha", "lora_alpha"), float)
    settings = dict(r=r, alpha=alpha, dropout=_dropout(raw, "dropout"))
    for key in VOXCPM_WORDS:
        if raw.get(key) is not None:
            settings[key] = raw[key]
    return Meaning(settings, lambda module: alpha / r)


# Initialisations that change the base weights: the adapter's file alone does not say what it was added to.
MOVED_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")


def _peft_settings(raw):
    if raw.get("use_dora"):
        raise Invalid(f"{raw.where} is a DoRA adapter (use_dora), which is not supported; train it as plain "
                      "LoRA")
    kind = need(raw, "peft_type", str, "LORA")
    if kind != "LORA":
        raise Invalid(f"{raw.where} is of type {shown(kind)}; only LORA is supported")
    start = shown(raw.get("init_lora_weights", True)).lower()
    moved = start.startswith(MOVED_BASES)
    why = f"was started by {start}, which moves the base weights" if moved else ""
    if raw.get("alora_invocation_tokens"):
        why = "works from certain tokens on (aLoRA)"
    if why:
        raise Invalid(f"{raw.where}: this adapter {why}; that is not supported. PEFT can save it as plain "
                      "LoRA (path_initial_model_for_weight_conversion).")
    r, alpha = _rank(raw, "r"), need(raw, "lora_alpha", float)
    rslora = need(raw, "use_rslora", bool, False)
    rank_of = _by_pattern(raw, "rank_pattern", int, r)
    alpha_of = _by_pattern(raw, "alpha_pattern", float, alpha)

    def scale(module):
        rank = rank_of(module)
        return alpha_of(module) / (math.sqrt(rank) if rslora else rank)

    dropout = _dropout(raw, "lora_dropout")
    settings = dict(r=r, alpha=alpha, dropout=dropout, rslora=rslora, dropout_after=False)
    return Meaning(settings, scale, mixed_ranks=bool(raw.get("rank_pattern")))


MOST_PATTERNS = 1000  # each is tried on each module


def _by_pattern(raw, key, kind, default):
    """module -> the value of the first pattern in raw[key] that means it."""
    entries = need(raw, key, dict[str, kind], {})
    if len(entries) > MOST_PATTERNS:
        raise Invalid(f"{raw.where}: {key} has {len(entries)} entries, at most {MOST_PATTERNS} are read")
    known = []
    for text in entries:
        number = _rank(entries, text) if kind is int else need(entries, text, kind)
        known.append((text, pattern_of(text, f"{raw.where}: {key}"), number))

    def value(module):
        ends = [module[dot + 1:] for dot, char in enumerate(module) if char == "."]
        for text, pattern, number in known:
            if module == text or any(pattern.fullmatch(end) for end in [module, *ends]):
                return number
        return default

    return value


def _mlx_settings(raw):
    kind = need(raw, "fine_tune_type", str, "lora")
    if kind != "lora":
        raise Invalid(f"{raw.where}: fine_tune_type is {shown(repr(kind))}; only lora is supported")
    p = need(raw, "lora_parameters", dict)
    return _settings_of_scale(_rank(p, "rank"), need(p, "scale", float), dropout=_dropout(p, "dropout"))


def _moshi_settings(raw):
    return _settings_of_scale(_rank(raw, "lora_rank"), need(raw, "lora_scaling", float))


def _settings_of_scale(r, scale, **more):
    """Formats that state the scale: it is applied as it stands there, and alpha follows from it."""
    return Meaning(dict(r=r, alpha=scale * r, **more), lambda module: scale)


SETTINGS = {"voxcpm": _voxcpm_settings, "peft": _peft_settings,
            "mlx": _mlx_settings, "moshi": _moshi_settings}


# ------------------------------------------------------------------------------------------------ reading


def read(path, model, ignore_base=False) -> Adapter:
    """An adapter brought onto `model`: own names, own row order, checked shapes. The model is not changed."""
    weights, config, kind = locate(path)
    damage = checkpoint.check_file(weights)
    if damage:
        raise Invalid(damage)
    stored, record = checkpoint.read(weights), read_record(path)
    _refuse(weights, stored, model)  # before what its settings say: no file beside it would make it fit
    meaning = _read_settings(config, record, kind, weights)
    _check_base(weights, record, model, ignore_base)
    adapter = Adapter(weights, meaning.settings, record)
    wrong = _Fitting(adapter, model, stored, kind, meaning).run()
    if wrong:
        more = f"; and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        raise Invalid(f"{weights}: {len(wrong)} of {len(stored)} tensors do not fit this {model.backbone} "
                      f"model: {'; '.join(wrong[:NAMED])}{more}")
    if not adapter.pairs and not adapter.full:
        raise Invalid(f"{weights} holds no adapter tensors")
    _check_numbers(adapter)
    return adapter


def _refuse(weights, stored, model):
    patterns = REFUSED | getattr(model, "refused_adapter_keys", {})
    refused = []
    for name in stored:
        whys = [why for pattern, why in patterns.items() if re.fullmatch(pattern, name)]
        if whys:
            refused.append(f"{name} ({whys[-1]})")
    if refused:
        raise Invalid(f"{weights}: {len(refused)} of {len(stored)} tensors cannot be used: "
                      f"{'; '.join(refused[:NAMED])}")


def _check_base(path, record, model, ignore_base):
    if not record:
        print(f"{path} does not record its base (another tool wrote it); taken on trust", file=sys.stderr)
        return
    backbone, fingerprint = need(record, "backbone", str), need(record, "fingerprint", str)
    if backbone != model.backbone:
        raise Invalid(f"{path} is an adapter for {shown(backbone)}, the model is {model.backbone}")
    if fingerprint != model.fingerprint and not ignore_base:
        theirs = shown(f"{need(record, 'base', str, '')}, fingerprint {fingerprint}", 200)
        raise Invalid(f"{path} was trained on another base ({theirs}) than {model.path} (fingerprint "
                      f"{model.fingerprint}). If you want that, say --ignore_base.")


def _check_numbers(adapter):
    bad = []
    for module, (A, B, scale) in adapter.pairs.items():
        if not (A.isfinite().all() and B.isfinite().all() and math.isfinite(scale)):
            bad.append(module)
    for name, tensor in [*adapter.full.items(), *adapter.bias.items()]:
        if not tensor.isfinite().all() and name not in bad:
            bad.append(name)
    if bad:
        raise Invalid(f"{adapter.path}: {bad[0]} and {len(bad) - 1} more modules hold NaN or infinity; "
                      "the training had diverged")


# ------------------------------------------------------------------------------------------------ names


class Home(NamedTuple):
    """Where a published tensor lives in the model."""

    name: str
    rows: torch.Tensor | None  # published = ours[rows]; None: the same order
    axes: str = ""  # see published_axes in models/__init__.py

    def held(self, tensor):
        """A published weight as the model holds it."""
        if self.axes == "turned":
            tensor = tensor.T
        elif self.axes == "kernel":
            tensor = tensor[..., 0]
        return _own_rows(tensor, self.rows)


def _homes(model):
    """{published parameter name in any naming: Home}"""
    homes = {}
    for naming in reversed(model.namings):  # the first naming has the last word where two use one name
        for parameter, _, _, _ in checkpoint.published(model):
            home = Home(parameter, model.published_rows(parameter, naming), _axes(model, parameter))
            homes |= dict.fromkeys(_spellings(model, parameter, naming), home)
    return homes


def _spellings(model, parameter, naming):
    """The published names of a parameter in one naming: several where tables are tied and stored twice."""
    copies = model.published_copies(parameter, naming) if hasattr(model, "published_copies") else ()
    return (model.published_name(parameter, naming), *copies)


def _axes(model, parameter):
    return model.published_axes(parameter) if hasattr(model, "published_axes") else ""


def _own_rows(tensor, rows):
    if rows is None:
        return tensor
    out = torch.empty_like(tensor)
    out[rows] = tensor
    return out


def _plain(name):
    """A key without what PEFT, DataParallel and older files of csm-mlx put around it."""
    name = re.sub(r"^(base_model\.model\.|module\.|model\.(?=.*lora_))", "", name)
    name = name.replace(".modules_to_save.", ".")
    return re.sub(r"\.lora_B(\.default)?\.bias$", ".lora_bias", name)


HALF = r"(.*)\.(lora_[AaBb]|lora_bias)(?:\.default)?(?:\.weight)?"  # (module, which part of its adapter)


class _Fitting:
    """The tensors of one file on their way into an Adapter for one model."""

    def __init__(self, adapter, model, stored, kind, meaning):
        self.adapter, self.model, self.stored = adapter, model, stored
        self.kind, self.meaning = kind, meaning
        self.homes = _homes(model)
        self.halves = {}  # {module as the file spells it: {"lora_A": name in the file}}
        self.wrong = []  # texts

    def run(self):
        """Fill the adapter; returns what is wrong."""
        for name in self.stored:
            self.sort(name)
        if self.kind == "peft":
            self.check_twins()
        for module, names in self.halves.items():
            self.pair(module, names)
        return self.wrong

    def load(self, name):
        return self.stored[name].load().float()

    def sort(self, name):
        plain = _plain(name)
        if hasattr(self.model, "adapter_key"):
            plain = self.model.adapter_key(plain)
        half = re.fullmatch(HALF, plain)
        frozen = plain.replace(".base_layer.weight", ".weight")
        harmless = getattr(self.model, "harmless_adapter_keys", ())
        if frozen != plain and frozen in self.homes:
            self.check_frozen(name, frozen)
        elif any(re.fullmatch(pattern, plain) for pattern in harmless):
            self.adapter.skipped.append(name)
        elif half and half[1] + ".weight" in self.homes:
            self.halves.setdefault(half[1], {})[half[2]] = name
        elif not half and plain in self.homes:
            self.take_in_full(name, plain)
        else:
            self.wrong.append(f"{name} (no such module in this model)")

    def check_frozen(self, name, published):
        """PEFT stores an output head once more when it is a target; it must be the head of this base."""
        home = self.homes[published]
        base = self.model.get_parameter(home.name).detach().float().cpu()
        copy = home.held(self.load(name))
        # The copy may have been stored in bf16, which keeps two digits and a half.
        if base.shape != copy.shape or not torch.allclose(base, copy, rtol=1e-2, atol=1e-6):
            self.wrong.append(f"{name} is not this base's {published}")
        self.adapter.skipped.append(name)

    def take_in_full(self, name, published):
        home = self.homes[published]
        parameter = home.name
        value, shape = home.held(self.load(name)), self.model.get_parameter(parameter).shape
        twin = self.adapter.full.get(parameter)
        if twin is not None and not torch.equal(twin, value):
            self.wrong.append(f"{name} differs from its other copy, but the model has one tensor for both")
        if value.shape != shape:
            self.wrong.append(f"{name} is {list(value.shape)}, the model has {list(shape)}")
        self.adapter.full[parameter] = value
        self.adapter.loaded.append(name)

    def check_twins(self):
        """transformers ties its tables, PEFT trains a copy of each: one alone is half an adapter."""
        names = {_plain(name).replace(".default.", ".") for name in self.stored}
        for parameter in self.adapter.full:
            for naming in self.model.namings:
                twins = set(_spellings(self.model, parameter, naming))
                present, absent = twins & names, twins - names
                if present and absent:
                    apart = f"{', '.join(sorted(present))} was trained apart from {', '.join(sorted(absent))}"
                    self.wrong.append(f"{apart}, but this model has one table for both")

    def pair(self, module, names):
        """lora_A and lora_B of one module; lora_a and lora_b are mlx's, the other way round."""
        transposed = "lora_a" in names
        keys = ("lora_a", "lora_b") if transposed else ("lora_A", "lora_B")
        if not names.keys() >= set(keys):
            self.wrong.append(f"{module} has only one of lora_A and lora_B")
            return
        A, B = (self.load(names[key]) for key in keys)
        if transposed:
            A, B = A.T.contiguous(), B.T.contiguous()
        weight, rows, axes = self.homes[module + ".weight"]
        ours = weight.removesuffix(".weight")
        if axes == "kernel" and A.ndim == B.ndim == 3:  # PEFT adapts a convolution of kernel 1 by two more
            A, B = A[..., 0], B[..., 0]
        wrong = self.misfit(self.model.get_submodule(ours), A, B)
        if wrong:
            self.wrong.append(f"{module} {wrong}")
            return
        scale = self.meaning.scale(module)
        self.adapter.pairs[ours] = Pair(A, _own_rows(B, rows), scale)
        if "lora_bias" in names:
            bias = _own_rows(self.load(names["lora_bias"]), rows)
            self.adapter.bias[ours] = bias * scale if self.kind == "peft" else bias  # PEFT scales it, too
        self.adapter.loaded += names.values()

    def misfit(self, base, A, B):
        """What is wrong with a pair for the module `base`, or None."""
        if not isinstance(base, torch.nn.Linear):
            return "is no linear layer in this model"
        shape = (base.out_features, base.in_features)
        if A.shape[0] != B.shape[1] or (B.shape[0], A.shape[1]) != shape:
            return f"has A {list(A.shape)} and B {list(B.shape)}, the layer is {shape[0]} x {shape[1]}"
        r = self.meaning.settings["r"]
        if A.shape[0] != r and not self.meaning.mixed_ranks:
            config = _config_beside(self.adapter.path, self.kind)
            return f"has rank {A.shape[0]}, {config.name if config else 'the record'} says {r}"
        return None


def stack(adapters) -> Adapter:
    """[(Adapter, strength), ...] -> one whose update is the sum of theirs.

    A's on top of each other and B's side by side: [B1 B2] [A1; A2] = B1 A1 + B2 A2, scales and strengths
    inside B.
    """
    for a, _ in adapters:
        if a.full or a.bias:
            raise Invalid(f"{a.path} holds more than LoRA pairs and cannot be stacked with others; "
                          "merge them one after the other")
    first = adapters[0][0]
    out = Adapter(first.path, first.settings, {})
    As, Bs = {}, {}
    for a, strength in adapters:
        for module, pair in a.pairs.items():
            As.setdefault(module, []).append(pair.A)
            Bs.setdefault(module, []).append(pair.B * pair.scale * strength)
        out.loaded += a.loaded
        out.skipped += a.skipped
    for module in As:
        out.pairs[module] = Pair(torch.cat(As[module]), torch.cat(Bs[module], 1), 1.0)
    return out


# ------------------------------------------------------------------------------------------------ writing


@dataclass
class Place:
    """Where an adapter goes, in which format, with which published names; None takes the format's own."""

    folder: Path
    format: str = "native"
    naming: str | None = None


@dataclass
class Draft:
    """What the files of an adapter are to say, in one format and naming."""

    kind: str
    naming: str
    base: str
    r: int
    scale: float
    dropout: float
    modules: dict  # {own name: published name} of the wrapped modules
    full: list  # published names of the parameters trained in full
    biased: bool

    @property
    def alpha(self):
        """10 instead of 9.999999999: scale is alpha / r rounded, and tools should read alpha as given."""
        alpha = self.scale * self.r
        return round(alpha) if abs(alpha - round(alpha)) < 1e-6 else alpha


def write(model, tensors, settings, place, record):
    """Write {own name: tensor} as an adapter folder. settings: its LoRAConfig; record: for its header."""
    kind = model.native_adapter if place.format == "native" else place.format
    if kind not in WRITERS:
        raise Invalid(f"adapter format {place.format!r}: known are native, voxcpm, peft and mlx")
    if kind not in model.adapter_namings:
        formats = " or ".join(model.adapter_namings)
        raise Invalid(f"adapter format {kind!r}: no tool for {model.backbone} reads it; use {formats}")
    folder = Path(place.folder)
    folder.mkdir(parents=True, exist_ok=True)
    draft = _draft(model, tensors, settings, kind, place.naming or model.adapter_namings[kind])
    draft.base = record.get("base") or getattr(model, "path", "")
    _say_what_is_refused(model, settings, draft)
    out = {}
    for name, value in tensors.items():
        for key, published in _published(model, draft, name, value).items():
            out[key] = published.float().clone()
    header = {"backbone": model.backbone, "base": draft.base, "fingerprint": model.fingerprint,
              "settings": {**dataclasses.asdict(settings), "r": draft.r, "scale": draft.scale}}
    header |= {key: value for key, value in record.items() if key != "base"}
    checkpoint.save_tensors(folder / FILES[kind][0], out, {"adapter_record": json.dumps(header)})
    config = json.dumps(WRITERS[kind](model, draft), indent=2, ensure_ascii=False)
    (folder / CONFIGS[kind]).write_text(config + "\n", encoding="utf-8")
    return folder


def unfilled(model, settings, kind, modules):
    """Modules that the words of the settings file mean beyond `modules`, and those that it cannot mean.

    Tools of the voxcpm format build their layers from these words, which name kinds of layers, not layers.
    """
    if kind != "voxcpm":
        return [], []
    words = model.adapter_words(list(modules), {})
    meant = targets.linears(model, type(settings)(**words))
    return [name for name in meant if name not in modules], [name for name in modules if name not in meant]


def _say_what_is_refused(model, settings, draft):
    """Some servers want every pair that the settings mean, and nothing besides pairs."""
    missing, beyond = unfilled(model, settings, draft.kind, draft.modules)
    told = []
    if missing:
        told.append(f"no pair for {len(missing)} layers that its settings mean, {missing[0]} among them "
                    "(merge_lora.py --zero_fill writes zeros)")
    if beyond:
        told.append(f"pairs of {len(beyond)} layers that its settings cannot name, such as {beyond[0]}")
    if draft.biased:
        told.append("biases (lora.bias)")
    if draft.full:
        told.append(f"{len(draft.full)} tensors trained in full, such as {draft.full[0]}")
    if told:
        _say_once(f"strict servers refuse this adapter: it has {'; '.join(told)}. Merged into its base it "
                  "loads.")


@functools.cache
def _say_once(text):
    """To stderr, once in a process: a run saves the same adapter many times."""
    print(text, file=sys.stderr)


def _draft(model, tensors, settings, kind, naming):
    wrapped = sorted(name.removesuffix(".lora_A") for name in tensors if name.endswith(".lora_A"))
    biased = any(name.endswith(".lora_bias") for name in tensors)
    if biased and kind == "mlx":
        raise Invalid("lora.bias: the mlx format has no place for new biases; keep the native format")
    ranks = {tensors[module + ".lora_A"].shape[0] for module in wrapped} or {settings.r}
    scales = {round(model.get_submodule(module).lora_full_scale, 9) for module in wrapped} or {settings.scale}
    if len(ranks) > 1 or len(scales) > 1:
        raise Invalid(f"the adapter has ranks {sorted(ranks)} and scales {sorted(scales)}; a file holds one "
                      "of each. Merge it instead.")
    modules, full = {}, []
    for module in wrapped:
        modules[module] = model.published_name(module + ".weight", naming).removesuffix(".weight")
    for name in tensors:
        if ".lora_" not in name:
            full += _spellings(model, name, naming)
    return Draft(kind, naming, "", ranks.pop(), scales.pop(), settings.dropout, modules, full, biased)


# {format: {part of an adapter: its key}}; mlx has no biases.
KEYS = {"voxcpm": {"lora_A": "lora_A", "lora_B": "lora_B", "lora_bias": "lora_bias"},
        "peft": {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_bias": "lora_B.bias"},
        "mlx": {"lora_A": "lora_a", "lora_B": "lora_b"}}


def _published(model, draft, name, value):
    """{key in the file: tensor} of one tensor of an adapter."""
    prefix = "base_model.model." if draft.kind == "peft" else ""
    half = re.fullmatch(r"(.*)\.(lora_A|lora_B|lora_bias)", name)
    weight = half[1] + ".weight" if half else name
    rows = model.published_rows(weight, draft.naming)
    if rows is not None and not name.endswith(".lora_A"):  # A meets the input, whose order is the same in all
        value = value[rows]
    axes = _axes(model, weight)
    if axes == "kernel" and not name.endswith(".lora_bias"):
        value = value[..., None]
    if not half:
        value = value.T if axes == "turned" else value
        return {prefix + spelling: value for spelling in _spellings(model, name, draft.naming)}
    module, part = half.groups()
    if draft.kind == "peft" and part == "lora_bias":
        value = value / draft.scale  # PEFT scales it with the rest
    if draft.kind == "mlx":
        value = value.T
    return {f"{prefix}{draft.modules[module]}.{KEYS[draft.kind][part]}": value}


def _voxcpm_config(model, draft):
    values = dict(r=draft.r, alpha=draft.alpha, dropout=draft.dropout)
    return {"base_model": draft.base, "lora_config": model.adapter_words(list(draft.modules), values)}


def _peft_config(model, draft):
    modules_to_save = sorted({name.rpartition(".")[0] for name in draft.full})
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": draft.base,
        "r": draft.r,
        "lora_alpha": draft.alpha,
        "use_rslora": False,  # alpha / r is the scale, whatever it came from
        "target_modules": sorted(draft.modules.values()),
        "lora_dropout": draft.dropout,
        "bias": "none",
        "task_type": None,
        # PEFT asks the layer, too; a reader that asks only here wants to know how the weights are stored.
        "fan_in_fan_out": all(_axes(model, module + ".weight") == "turned" for module in draft.modules),
        "inference_mode": True,
        "modules_to_save": modules_to_save or None,
    }
    if draft.biased:
        config["lora_bias"] = True
    return config


def _mlx_config(model, draft):
    keys = sorted(draft.modules.values())
    parameters = {"rank": draft.r, "scale": draft.scale, "dropout": draft.dropout, "keys": keys}
    return {"fine_tune_type": "lora", "base_model": draft.base, "lora_parameters": parameters}


WRITERS = {"voxcpm": _voxcpm_config, "peft": _peft_config, "mlx": _mlx_config}
