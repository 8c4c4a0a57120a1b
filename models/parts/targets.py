"""Which modules the words of LoRA settings mean: names, parts of names, regexes, layer numbers."""
import functools
import re
from dataclasses import fields

from torch import nn

from models.parts import Invalid
from models.parts.plain import pattern_of


def linears(model, s):
    """Names of the nn.Linear modules that settings `s` mean. A word that means nothing is an error."""
    linear_names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    spellings = {name: published(model, name) for name in linear_names}
    names = []
    for word in s.target_modules:
        hits = [name for name in linear_names if any(means(word, spelling) for spelling in spellings[name])]
        if not hits:
            examples = f"this model has names such as {linear_names[0]!r}, {linear_names[-1]!r}"
            raise Invalid(f"lora.target_modules: {word!r} matches no Linear; {examples}")
        names += hits
    if not s.target_modules or has_words(s):  # the backbone reads its own words, or chooses without any
        names += model.lora_targets(s)
    if s.target_layers:
        names = in_layers(s.target_layers, names, spellings)
    return sorted(set(names), key=linear_names.index)


def published(model, name):
    """Every spelling of a module's name: ours, and that of each published naming, since users know those."""
    out = {name}
    for naming in model.namings:
        weight = model.published_name(name + ".weight", naming)
        out.add(weight.removesuffix(".weight"))
    return out


def has_words(s):
    """Whether the settings use enable_lm, target_modules_lm and the like, which a backbone reads itself."""
    others = ("target_modules", "target_layers")
    keys = [f.name for f in fields(s) if f.name.startswith(("enable_", "target_")) and f.name not in others]
    return any(getattr(s, key) for key in keys)


def in_layers(entries, names, spellings):
    """Those of `names` that lie in the layers asked for, and those in no layer, which no number could mean.

    3 is layer 3 of every targeted stack that has one, decoder.3 that of one stack.
    """
    layer = {}
    for name in names:
        number = re.search(r"\.(\d+)\.", name)
        if number:
            layer[name] = number[1]
    asked = set(names) - set(layer)
    for entry in entries:
        stack, _, index = str(entry).rpartition(".")
        hits = [name for name in layer if layer[name] == index]
        if stack:
            hits = [name for name in hits if any(means(stack, spelling) for spelling in spellings[name])]
        if not hits:
            last = max(map(int, layer.values()), default=-1)
            raise Invalid(f"lora.target_layers: no targeted stack has a layer {entry}; they have 0 to {last}")
        asked.update(hits)
    return asked


def means(word, name):
    """A word means a module by its name, its end, any step on the way to it, or as a pattern."""
    if name == word or name.endswith("." + word):
        return True
    # A bare number is no step: target_layers asks for layers, and 3 would mean whatever else is counted, too.
    steps = name.split(".")
    step = not word.isdigit() and (word in steps or f"self_{word}" in steps)  # attn, whatever the naming
    return step or matches(word, name)


@functools.cache
def compiled(pattern):
    return pattern_of(as_regex(pattern), "lora.target_modules")


def matches(pattern, name):
    """Whether a regex, or a pattern with a wildcard and braces, is the whole name."""
    return compiled(pattern).fullmatch(name) is not None


BRACES = re.compile(r"\{([a-zA-Z]\w*(?:,\w+)+)\}")  # {gate,up}; what a regex has there are numbers


def as_regex(pattern):
    """A pattern as people write it for names, *.mlp.{gate,up}_proj, as a regex. A regex stays itself."""
    spelled = BRACES.sub(lambda braces: "(" + braces[1].replace(",", "|") + ")", pattern)
    if pattern.startswith("*"):  # which no regex can
        return spelled.replace(".", r"\.").replace("*", ".*")
    if spelled != pattern:
        return r"(.*\.)?" + spelled  # the end of a name, as a word without braces would be
    return pattern


def in_full(model, s):
    """Names of the modules that are trained in full beside LoRA."""
    patterns = list(s.train_modules)
    if s.train_embeddings:
        patterns += model.embeddings
    names = [name for name, module in model.named_modules() if name and has_parameters(module)]
    out = []
    for pattern in patterns:
        hits = [name for name in names if name == pattern or matches(pattern, name)]
        if not hits:
            example = f"this model has names such as {names[0]!r}"
            raise Invalid(f"lora.train_modules: {pattern!r} matches no module; {example}")
        out += hits
    return out


def has_parameters(module):
    return next(module.parameters(), None) is not None
