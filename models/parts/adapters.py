"""Adapter files of this project and of others: read them all onto one model, write those that their tools load.

    format   files                                                    keys
    voxcpm   lora_weights.safetensors or .ckpt, lora_config.json      <module>.lora_A (r, in), <module>.lora_B (out, r)
    peft     adapter_model.safetensors or .bin, adapter_config.json   base_model.model.<module>.lora_A.weight, .lora_B.weight
    mlx      adapters.safetensors, adapter_config.json                <module>.lora_a (in, r), <module>.lora_b (r, out)
    moshi    lora.safetensors, config.json                            <module>.lora_A.weight, .lora_B.weight

<module> is a published module name in any naming of the backbone; B's rows follow the weight's. What was trained in full
beside LoRA stands in the same file under its parameter's name. Each file that is written here also records backbone,
base, a fingerprint of the base and the settings in the safetensors header, where other tools look past it.
"""
import dataclasses
import json
import math
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from models.parts import Invalid, checkpoint

FILES = {"voxcpm": ("lora_weights.safetensors", "lora_weights.ckpt"), "peft": ("adapter_model.safetensors", "adapter_model.bin"),
         "mlx": ("adapters.safetensors",), "moshi": ("lora.safetensors",)}
CONFIGS = {"voxcpm": "lora_config.json", "peft": "adapter_config.json", "mlx": "adapter_config.json", "moshi": "config.json"}
REFUSED = {r".*lora_magnitude_vector.*": "DoRA magnitudes: not supported", r".*lora_embedding_[AB].*": "LoRA on an embedding table: not supported",
           r".*embeddings\.lora_[ab]": "LoRA on an embedding table: not supported",
           r".*\.base_layer\.bias": "biases of the base (bias: lora_only): not supported"}


@dataclass
class Adapter:
    path: Path
    settings: dict  # keyword arguments of LoRAConfig
    record: dict  # what the header says of backbone, base and speakers
    pairs: dict = field(default_factory=dict)  # {own module name: (A (r, in), B (out, r), scale)}
    bias: dict = field(default_factory=dict)  # {own module name: (out,)}
    full: dict = field(default_factory=dict)  # {own parameter name: tensor} trained in full
    loaded: list = field(default_factory=list)  # names in the file
    skipped: list = field(default_factory=list)


def locate(path):
    """(weights file, config file or None, format) of an adapter folder or file."""
    path = Path(path)
    for kind, names in FILES.items():
        for name in names:
            if path.name == name and path.is_file() or (path / name).is_file():
                weights = path if path.is_file() else path / name
                config = weights.parent / CONFIGS[kind]
                return weights, config if config.is_file() else None, kind
    if path.is_file() and path.suffix == ".safetensors":  # one file of any name: what csm-mlx once wrote, and what `voxcpm` writes renamed
        config = path.parent / CONFIGS["voxcpm"]
        return path, config if config.is_file() else None, "voxcpm"
    raise Invalid(f"no adapter at {path}; expected a folder with one of {', '.join(n for f in FILES.values() for n in f)}")


def read_record(path):
    """The record in the header of an adapter: {} from another tool, else backbone, base, fingerprint, settings, speakers."""
    weights, _, _ = locate(path)
    raw = checkpoint.read_metadata(weights).get("adapter_record") if weights.suffix == ".safetensors" else None
    return json.loads(raw) if raw else {}


def _settings(config, record, kind, path):
    """(keyword arguments of LoRAConfig, scale of a module) from the config file, or from the record where that is gone."""
    if config is None and "settings" not in record:
        raise Invalid(f"{path} comes without {CONFIGS[kind]}, so its alpha is unknown and its strength would be a guess; "
                      f'put the file beside the weights, or write it with what it was trained with, such as {{"r": 8, "alpha": 16}}')
    raw = checkpoint.read_json(config) if config else {}
    if not isinstance(raw, dict) or not all(isinstance(raw.get(k, {}), dict) for k in ("lora_config", "lora_parameters")):
        raise Invalid(f"{config}: expected a map of settings")
    if kind == "voxcpm":
        raw = raw.get("lora_config", raw) if config else dict(record["settings"], alpha=record["settings"]["scale"] * record["settings"]["r"])
        r, alpha, out = raw.get("r", raw.get("rank")), raw.get("alpha", raw.get("lora_alpha")), {}
        for key in ("enable_lm", "enable_dit", "enable_proj", "target_modules_lm", "target_modules_dit", "target_proj_modules"):
            if raw.get(key) is not None:
                out[key] = raw[key]
        out |= dict(r=r, alpha=alpha, dropout=raw.get("dropout", 0.0))
        scale = None if r is None or alpha is None else lambda name: alpha / r
    elif kind == "peft":
        raw = raw or {"r": record["settings"]["r"], "lora_alpha": record["settings"]["scale"] * record["settings"]["r"]}
        if raw.get("use_dora"):
            raise Invalid(f"{config} is a DoRA adapter (use_dora), which is not supported; train it as plain LoRA")
        if raw.get("peft_type", "LORA") != "LORA":
            raise Invalid(f"{config} is of type {raw['peft_type']}; only LORA is supported")
        r, alpha = raw.get("r"), raw.get("lora_alpha")
        start = str(raw.get("init_lora_weights", True)).lower()
        if start.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")) or raw.get("alora_invocation_tokens"):
            why = "works from certain tokens on (aLoRA)" if raw.get("alora_invocation_tokens") else f"was started by {start}, which moves the base weights"
            raise Invalid(f"{config}: this adapter {why}; that is not supported. PEFT can save it as plain LoRA (path_initial_model_for_weight_conversion).")
        root = raw.get("use_rslora", False)
        out = dict(r=r, alpha=alpha, dropout=raw.get("lora_dropout", 0.0), rslora=root, dropout_after=False)
        ranks, alphas = raw.get("rank_pattern") or {}, raw.get("alpha_pattern") or {}

        def scale(name):
            n, a = _by_pattern(ranks, name, r), _by_pattern(alphas, name, alpha)
            return a / (math.sqrt(n) if root else n)
    elif kind == "mlx":
        if raw.get("fine_tune_type", "lora") != "lora":
            raise Invalid(f"{config}: fine_tune_type is {raw['fine_tune_type']!r}; only lora is supported")
        p = raw.get("lora_parameters", {})
        r, alpha = p.get("rank"), None if p.get("scale") is None or p.get("rank") is None else p["scale"] * p["rank"]
        out, scale = dict(r=r, alpha=alpha, dropout=p.get("dropout", 0.0)), lambda name: p["scale"]  # applied as it stands there
    else:
        r, factor = raw.get("lora_rank"), raw.get("lora_scaling")
        alpha = None if r is None or factor is None else factor * r
        out, scale = dict(r=r, alpha=alpha), lambda name: factor
    if type(r) is not int or r < 1 or type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise Invalid(f"{config} does not say {'alpha' if type(r) is int and r > 0 else 'r'}, without which the adapter's strength is unknown")
    return out, scale


def _by_pattern(patterns, name, default):
    return next((v for k, v in patterns.items() if name == k or re.fullmatch(rf"(.*\.)?({k})", name)), default)


def read(path, model, ignore_base=False) -> Adapter:
    """An adapter brought onto `model`: own names, own row order, checked shapes. Raises Invalid before anything is used."""
    weights, config, kind = locate(path)
    damaged = checkpoint.check_file(weights)
    if damaged:
        raise Invalid(damaged)
    stored, record = checkpoint.read(weights), read_record(path)
    refused = {name: why for p, why in (REFUSED | getattr(model, "refused_adapter_keys", {})).items() for name in stored if re.fullmatch(p, name)}
    if refused:  # before what its settings say: no file beside it would make it fit
        raise Invalid(f"{weights}: {len(refused)} of {len(stored)} tensors cannot be used: " + "; ".join(f"{n} ({why})" for n, why in [*refused.items()][:6]))
    settings, scale = _settings(config, record, kind, weights)
    _check_base(weights, record, model, ignore_base)
    settings |= {k: v for k, v in record.get("settings", {}).items() if k not in ("scale",)} if not config else {}
    a = Adapter(weights, settings, record)
    homes = _homes(model)
    halves, wrong = {}, []
    for name, tensor in stored.items():
        plain = re.sub(r"^(base_model\.model\.|module\.|model\.(?=.*lora_))", "", name).replace(".modules_to_save.", ".")
        plain = re.sub(r"\.lora_B(\.default)?\.bias$", ".lora_bias", plain)  # PEFT's lora_bias: scaled there, as it stands here
        m = re.fullmatch(r"(.*)\.(lora_[AaBb]|lora_bias)(?:\.default)?(?:\.weight)?", plain)
        frozen = plain.replace(".base_layer.weight", ".weight")  # PEFT stores an output head once more when it is a target
        if frozen != plain and frozen in homes:
            own, rows = homes[frozen]
            base, there = model.get_parameter(own).detach().float().cpu(), _own_rows(tensor.load().float(), rows)
            if base.shape != there.shape or not torch.allclose(base, there, rtol=1e-2, atol=1e-6):
                wrong.append(f"{name} is not this base's {frozen}")
            a.skipped.append(name)
        elif any(re.fullmatch(p, plain) for p in getattr(model, "harmless_adapter_keys", ())):
            a.skipped.append(name)
        elif m and m[1] + ".weight" in homes:
            halves.setdefault(m[1], {})[m[2]] = name
        elif not m and plain in homes:
            own, rows = homes[plain]
            value = _own_rows(tensor.load().float(), rows)
            if own in a.full and not torch.equal(a.full[own], value):
                wrong.append(f"{name} differs from its other copy, but the model has one tensor for both")
            a.full[own] = value
            a.loaded.append(name)
            if a.full[own].shape != model.get_parameter(own).shape:
                wrong.append(f"{name} is {list(tensor.shape)}, the model has {list(model.get_parameter(own).shape)}")
        else:
            wrong.append(f"{name} (no such module in this model)")
    names = {re.sub(r"^base_model\.model\.", "", n).replace(".modules_to_save.", ".").replace(".default.", ".") for n in stored}
    for own in a.full if kind == "peft" else ():  # transformers ties its tables, PEFT trains a copy of each by itself
        for naming in model.namings:
            known = {model.published_name(own, naming), *_copies(model, own, naming)}
            there = known & names
            if there and there != known:
                wrong.append(f"{', '.join(sorted(there))} was trained apart from {', '.join(sorted(known - there))}, but this model has one table for both")
    for module, half in halves.items():
        own, rows = homes[module + ".weight"]
        own = own.removesuffix(".weight")
        transposed = "lora_a" in half
        A, B = half.get("lora_a" if transposed else "lora_A"), half.get("lora_b" if transposed else "lora_B")
        if A is None or B is None:
            wrong.append(f"{module} has only one of lora_A and lora_B")
            continue
        A, B = (stored[n].load().float() for n in (A, B))
        A, B = (A.T.contiguous(), B.T.contiguous()) if transposed else (A, B)
        base = model.get_submodule(own)
        if not isinstance(base, torch.nn.Linear):
            wrong.append(f"{module} is no linear layer in this model")
        elif A.shape[0] != B.shape[1] or A.shape[1] != base.in_features or B.shape[0] != base.out_features:
            wrong.append(f"{module} has A {list(A.shape)} and B {list(B.shape)}, the layer is {base.out_features} x {base.in_features}")
        elif not _by_rank(A, settings, kind, config):
            wrong.append(f"{module} has rank {A.shape[0]}, {config.name if config else 'the record'} says {settings['r']}")
        else:
            a.pairs[own] = (A, _own_rows(B, rows), scale(module))
            if "lora_bias" in half:
                a.bias[own] = _own_rows(stored[half["lora_bias"]].load().float(), rows) * (scale(module) if kind == "peft" else 1)
            a.loaded += list(half.values())
    if wrong:
        raise Invalid(f"{weights}: {len(wrong)} of {len(stored)} tensors do not fit this {model.backbone} model: "
                      + "; ".join(wrong[:6]) + (f"; and {len(wrong) - 6} more" if len(wrong) > 6 else ""))
    if not a.pairs and not a.full:
        raise Invalid(f"{weights} holds no adapter tensors")
    parts = [(n, t) for n, (A, B, s) in a.pairs.items() for t in (A, B, torch.tensor(s))] + [*a.full.items(), *a.bias.items()]
    bad = list(dict.fromkeys(n for n, t in parts if not t.isfinite().all()))
    if bad:
        raise Invalid(f"{weights}: {bad[0]} and {len(bad) - 1} more modules hold NaN or infinity; the training had diverged")
    return a


def stack(read) -> Adapter:
    """[(Adapter, strength), ...] -> one whose update is the sum of theirs: A's on top of each other, B's side by side."""
    for a, _ in read:
        if a.full or a.bias:
            raise Invalid(f"{a.path} holds more than LoRA pairs and cannot be stacked with others; merge them one after the other")
    out = Adapter(read[0][0].path, read[0][0].settings, {})
    parts = {}
    for a, strength in read:
        for name, (A, B, scale) in a.pairs.items():
            parts.setdefault(name, []).append((A, B * scale * strength))
        out.loaded, out.skipped = out.loaded + a.loaded, out.skipped + a.skipped
    out.pairs = {name: (torch.cat([A for A, _ in p]), torch.cat([B for _, B in p], 1), 1.0) for name, p in parts.items()}
    return out


def _by_rank(A, settings, kind, config):
    patterns = kind == "peft" and config and checkpoint.read_json(config).get("rank_pattern")
    return bool(patterns) or A.shape[0] == settings["r"]


def _own_rows(tensor, rows):
    if rows is None:
        return tensor
    out = torch.empty_like(tensor)
    out[rows] = tensor
    return out


def _homes(model):
    """{published parameter name in any naming: (own name, published row order or None)}"""
    out = {}
    for naming in reversed(model.namings):
        for own, _ in model.named_parameters():
            if ".lora_" not in own:
                for published in (model.published_name(own, naming), *_copies(model, own, naming)):
                    out[published] = (own, model.published_rows(own, naming))
    return out


def _copies(model, own, naming):
    """Further names under which a naming holds the same tensor (tied tables)."""
    return model.published_copies(own, naming) if hasattr(model, "published_copies") else ()


def _check_base(path, record, model, ignore_base):
    if not record:
        print(f"{path} does not record its base (another tool wrote it); taken on trust", file=sys.stderr)
        return
    if record["backbone"] != model.backbone:
        raise Invalid(f"{path} is an adapter for {record['backbone']}, the model is {model.backbone}")
    if record["fingerprint"] != model.fingerprint and not ignore_base:
        raise Invalid(f"{path} was trained on another base ({record['base']}, fingerprint {record['fingerprint']}) than "
                      f"{model.path} (fingerprint {model.fingerprint}). If you want that, say --ignore_base.")


# ------------------------------------------------------------------------------------------------ writing


def write(model, tensors, settings, folder, format="native", naming=None, record=None):
    """Write {own name: tensor} as an adapter folder. `settings` is the LoRAConfig it was made with; `record` adds to the header."""
    kind = model.native_adapter if format == "native" else format
    naming = naming or model.adapter_namings.get(kind, model.namings[0])
    if kind not in ("voxcpm", "peft", "mlx"):
        raise Invalid(f"adapter format {format!r}: known are native, voxcpm, peft and mlx")
    if kind not in model.adapter_namings:
        raise Invalid(f"adapter format {kind!r}: no tool for {model.backbone} reads it; use {' or '.join(model.adapter_namings)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    modules = sorted({n.removesuffix(".lora_A") for n in tensors if n.endswith(".lora_A")})
    biased = any(n.endswith(".lora_bias") for n in tensors)
    if biased and kind == "mlx":
        raise Invalid("lora.bias: the mlx format has no place for new biases; keep the native format")
    ranks = {tensors[m + ".lora_A"].shape[0] for m in modules}
    scales = {round(model.get_submodule(m).lora_full_scale, 9) for m in modules}
    if len(ranks) > 1 or len(scales) > 1:
        raise Invalid(f"the adapter has ranks {sorted(ranks)} and scales {sorted(scales)}; a file holds one of each. Merge it instead.")
    r, scale = (ranks.pop(), scales.pop()) if modules else (settings.r, settings.scale)
    out, names = {}, {}
    for own, value in tensors.items():
        m = re.fullmatch(r"(.*)\.(lora_A|lora_B|lora_bias)", own)
        base = (m[1] + ".weight") if m else own
        published, rows = model.published_name(base, naming), model.published_rows(base, naming)
        value = value if rows is None or (m and m[2] == "lora_A") else value[rows]
        if m:
            module = names[m[1]] = published.removesuffix(".weight")
            leaf = {"voxcpm": m[2], "peft": "lora_B.bias" if m[2] == "lora_bias" else m[2] + ".weight", "mlx": m[2].lower()}[kind]
            value = value / scale if kind == "peft" and m[2] == "lora_bias" else value
            published, value = f"{module}.{leaf}", value.T if kind == "mlx" else value
        for name in (published, *(() if m else _copies(model, own, naming))):
            out[("base_model.model." if kind == "peft" else "") + name] = value.float().clone()
    base = (record or {}).pop("base", None) or getattr(model, "path", "")
    header = {"backbone": model.backbone, "base": base, "fingerprint": model.fingerprint,
              "settings": {**dataclasses.asdict(settings), "r": r, "scale": scale}, **(record or {})}
    if kind == "voxcpm":
        config = {"base_model": base, "lora_config": model.adapter_words(modules, dict(r=r, alpha=_whole(scale * r), dropout=settings.dropout))}
    elif kind == "peft":
        full = [p for n in sorted(tensors) if ".lora_" not in n for p in (model.published_name(n, naming), *_copies(model, n, naming))]
        config = {"peft_type": "LORA", "base_model_name_or_path": base, "r": r, "lora_alpha": _whole(scale * r), "use_rslora": False,
                  "target_modules": sorted(names.values()), "lora_dropout": settings.dropout, "bias": "none", "task_type": None,
                  "fan_in_fan_out": False, "inference_mode": True,
                  "modules_to_save": sorted({p.rpartition(".")[0] for p in full}) or None, **({"lora_bias": True} if biased else {})}
    else:
        config = {"fine_tune_type": "lora", "base_model": base,
                  "lora_parameters": {"rank": r, "scale": scale, "dropout": settings.dropout, "keys": sorted(names.values())}}
    checkpoint.save_tensors(folder / FILES[kind][0], out, {"adapter_record": json.dumps(header)})
    (folder / CONFIGS[kind]).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return folder


def _whole(x):
    """10 instead of 9.999999999: scale is alpha / r rounded, and alpha as it was given is what other tools should read."""
    return round(x) if abs(x - round(x)) < 1e-6 else x
