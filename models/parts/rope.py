"""Llama 3's rotary embedding: its numbers in a config, and the frequencies that they mean."""
import math

import torch

from models.parts import Invalid
from models.parts.plain import as_record, need, shown, written

# What the published checkpoints have; transformers writes equivalent numbers, of which only the ratios count.
LLAMA3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}


def rope_settings(section, theta, scaling, where):
    """(theta, llama3 numbers or None) of a config section in its older or newer spelling.

    theta, scaling: where the section does not say; one that states its widths and no scaling has none.
    """
    section = as_record(section, where)
    given = need(section, "rope_parameters", dict, need(section, "rope_scaling", dict, None))
    theta = need(section, "rope_theta", float, theta, at_least=1)
    if given is None:
        return theta, None if "hidden_size" in section else scaling
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise Invalid(f"{where}: rope_type is {shown(written(kind))}; known are default and llama3")
    theta = need(given, "rope_theta", float, theta, at_least=1)
    if kind == "default":
        return theta, None
    return theta, {key: need(given, key, float, at_least=0) for key in LLAMA3}


def llama3_frequencies(size, theta, scaling):
    """Angular frequency of each pair, (size / 2,) float32; scaling makes the slow ones `factor` times slower.

    Only original/low and original/high enter, so transformers' "equivalent" numbers give the same table to
    the bit.
    """
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / size
    plain = 1.0 / theta**exponents
    if scaling is None:
        return plain
    factor, low, high, old = (scaling[key] for key in LLAMA3)
    wave = 2 * math.pi / plain
    share = (old / wave - low) / (high - low)  # 0 for slow pairs, 1 for quick ones
    between = (1 - share) * plain / factor + share * plain
    stretched = torch.where(wave > old / low, plain / factor, between)
    return torch.where(wave < old / high, plain, stretched)
