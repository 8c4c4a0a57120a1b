"""Tiny random checkpoints in the published formats: the weights are a function of each tensor's name.

So a golden tensor needs no stored weights: the script that made it and the test that reads it fill the same names
with the same numbers.
"""
import math
import zlib

import torch


def fill(shapes, dtype=torch.float32):
    """{name: shape} -> {name: tensor}. Matrices and kernels have std 1/sqrt(fan in), vectors (norms, biases, alphas) lie near one."""
    out = {}
    for name, shape in shapes.items():
        g = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        w = torch.randn(*shape, generator=g, dtype=torch.float64)
        flat = w.numel() == max(w.shape, default=1)
        out[name] = (1 + 0.1 * w if flat else w / math.sqrt(w[0].numel())).to(dtype)
    return out


def fill_by_name(model):
    """The same for a module in place: every floating parameter and persistent buffer."""
    state = {k: v for k, v in model.state_dict().items() if v.is_floating_point()}
    values = fill({k: tuple(v.shape) for k, v in state.items()})
    with torch.no_grad():
        for k, v in state.items():
            v.copy_(values[k])
    return model
