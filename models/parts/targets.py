"""Which modules the words of LoRA settings mean: names, parts of names, regexes, layer numbers."""
import re
from dataclasses import fields

from torch import nn

from models.parts import Invalid


def linears(model, s):
    """Names of the nn.Linear modules that settings `s` mean; a word that means nothing is an error."""
    known = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    spelled = {n: {n} | {model.published_name(n + ".weight", naming).removesuffix(".weight") for naming in model.namings} for n in known}
    words = {f.name: getattr(s, f.name) for f in fields(s) if f.name.startswith(("enable_", "target_")) and f.name != "target_layers"}
    names = []
    for word in s.target_modules:
        hits = [n for n in known if any(means(word, spelling) for spelling in spelled[n])]
        if not hits:
            raise Invalid(f"lora.target_modules: {word!r} matches no Linear; this model has names such as {known[0]!r}, {known[-1]!r}")
        names += hits
    if not s.target_modules or any(v for k, v in words.items() if k != "target_modules"):
        names += model.lora_targets(s)
    names = sorted(set(names), key=known.index)
    if s.target_layers:  # 3 is layer 3 of every targeted stack that has one, decoder.3 that of one stack
        layer = {n: m[1] for n in names if (m := re.search(r"\.(\d+)\.", n))}
        asked = {n for n in names if n not in layer}
        for entry in s.target_layers:
            stack, _, index = str(entry).rpartition(".")
            hits = [n for n in layer if layer[n] == index and (not stack or any(means(stack, spelling) for spelling in spelled[n]))]
            if not hits:
                raise Invalid(f"lora.target_layers: no targeted stack has a layer {entry}; they have 0 to {max(map(int, layer.values()), default=-1)}")
            asked.update(hits)
        names = [n for n in names if n in asked]
    return names


def means(word, name):
    """A word means a module by its name, its end, any step on the way to it (attn also self_attn), or as a pattern."""
    steps = name.split(".")
    step = not word.isdigit() and (word in steps or f"self_{word}" in steps)
    return name == word or name.endswith("." + word) or step or matches(word, name)


def matches(pattern, name):
    """Whether a regex, or a pattern with wildcards and braces such as *.mlp.{gate,up}_proj, is the whole name."""
    try:
        return re.fullmatch(as_regex(pattern), name) is not None
    except re.error as e:
        raise Invalid(f"lora.target_modules: {pattern!r} is no module name, no pattern and no regex ({e})") from None


BRACES = re.compile(r"\{([a-zA-Z]\w*(?:,\w+)+)\}")  # {gate,up}; a regex has numbers there


def as_regex(pattern):
    """A pattern as people write it for module names, as a regex: *.mlp.{gate,up}_proj. A regex stays what it is."""
    spelled = BRACES.sub(lambda braces: "(" + braces[1].replace(",", "|") + ")", pattern)
    if pattern.startswith("*"):  # which no regex can
        return spelled.replace(".", r"\.").replace("*", ".*")
    return pattern if spelled == pattern else r"(.*\.)?" + spelled


def in_full(model, s):
    patterns = list(s.train_modules) + (list(model.embeddings) if s.train_embeddings else [])
    names = [n for n, m in model.named_modules() if n and any(True for _ in m.parameters())]
    found = []
    for p in patterns:
        hits = [n for n in names if n == p or matches(p, n)]
        if not hits:
            raise Invalid(f"lora.train_modules: {p!r} matches no module; this model has names such as {names[0]!r}")
        found += hits
    return found
