"""What training takes of a device's memory, by arithmetic: on the meta device, where nothing is allocated.

    weights       as they are stored, codes of few bits with their scales
    copies        float32 ones of trained bf16 weights, and their average
    gradients     of all that is trained, or of the largest tensor where each is stepped at once
    moments       of the optimizer
    activations   what forward keeps for backward

CUDA itself, scratch, fragments and the codec come on top: LEAVE. tests/test_cards.py holds the first four
against what training has really allocated, and the fifth against what autograd keeps.
"""
import copy
from itertools import combinations
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from models.parts.lean import BLOCK, padded
from models.parts.quant import BLOCK as QUANT_BLOCK
from models.parts.run import all_memory
from models.parts.shards import BUCKET

LEAVE = 2e9  # bytes for what is not counted here
FLOAT32 = 4  # bytes
MOMENTS = {"adamw": 2 * FLOAT32, "adam": 2 * FLOAT32, "sgd": 0, "adamw8bit": 2 + 2 * FLOAT32 / BLOCK}


class Plan(NamedTuple):
    """The settings that decide, under their names in train.py."""

    base_bits: int = 16
    optimizer: str = "adamw"
    master: str = "float32"
    fused_backward: bool = False
    checkpointing: int = 0
    batch_size: int = 1
    accumulates: bool = False  # over micro-batches
    ranks: int = 1  # that share out states
    ema: bool = False


class Use(NamedTuple):
    """Bytes."""

    weights: float
    copies: float
    gradients: float
    moments: float
    activations: float

    @property
    def total(self):
        return sum(self)

    def __str__(self):
        parts = [f"{name} {spoken(size)}" for name, size in zip(self._fields, self) if size]
        return f"{spoken(self.total)} ({', '.join(parts)})"


def spoken(size):
    """4.6 GB, 12.3 MB"""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def weight_bytes(model, bits):
    """Of parameters and buffers; bits: of the frozen Linears in the model's blocks, 16 as they are stored."""
    coded = {}
    for block in model.blocks():
        for module in block.modules():
            if isinstance(module, nn.Linear) and not module.weight.requires_grad:
                coded[module.weight] = coded_bytes(module, bits, model.dtype.itemsize)
    coded_now = {module.code_scale for module in model.modules() if hasattr(module, "code_scale")}
    buffers = [buffer for buffer in model.buffers() if buffer not in coded_now]
    sizes = [coded.get(p, p.numel() * p.element_size()) for p in model.parameters()]
    return sum(sizes) + sum(buffer.numel() * buffer.element_size() for buffer in buffers)


def coded_bytes(linear, bits, whole):
    """Of the weight of a Linear with its scales; whole: bytes of a value that is not rounded."""
    size = linear.in_features * linear.out_features
    if bits == 8:
        return size + FLOAT32 * linear.out_features
    if bits == 4:
        blocks = -(-size // QUANT_BLOCK)
        return blocks * (QUANT_BLOCK // 2 + FLOAT32)
    return size * whole


def state_bytes(trained, plan):
    """(copies, gradients, moments) of trained parameters on one rank."""
    low = [p for p in trained if p.dtype != torch.float32]
    size = sum(p.numel() for p in trained)
    largest = max(p.numel() for p in trained)
    moments = MOMENTS[plan.optimizer] * size / plan.ranks
    if plan.optimizer == "adamw8bit":
        moments = MOMENTS[plan.optimizer] * sum(padded(p.numel()) for p in trained) / plan.ranks
    if plan.ranks > 1:
        # Shards has a copy of its slice whatever the dtype, and a bucket on its way.
        share, bucket = size / plan.ranks, max(largest, min(size, BUCKET))
        return FLOAT32 * share, FLOAT32 * (share + bucket), moments
    low_size = sum(p.numel() for p in low)
    copies = FLOAT32 * low_size if plan.master == "float32" else 0
    copies += FLOAT32 * size * plan.ema
    gradients = FLOAT32 * size
    if plan.master == "none" and not plan.accumulates:
        gradients -= (FLOAT32 - 2) * low_size
    if plan.fused_backward:
        gradients = FLOAT32 * largest
    return copies, gradients, moments


def on_meta(model):
    """A copy of a model on the meta device, which takes no memory; what is no tensor or module is shared."""
    memo = {}
    for module in model.modules():
        own = [*module._parameters.values(), *module._buffers.values()]
        own += [value for value in vars(module).values() if torch.is_tensor(value)]
        for tensor in own:
            if tensor is not None:
                memo[id(tensor)] = meta(tensor)
        if getattr(module, "_compiled_call_impl", None):
            memo[id(module._compiled_call_impl)] = None
    for name in vars(model).keys() - vars(nn.Module()).keys():
        value = vars(model)[name]
        memo.setdefault(id(value), value)
    return copy.deepcopy(model, memo)


def meta(tensor):
    empty = torch.empty_like(tensor, device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty


def kept(model, examples, every=0):
    """Bytes that a training step's forward keeps for backward, weights aside. model: on the meta device.

    every: recompute the activations of every n-th layer. One layer that is made again is scratch.
    """
    model.train()
    model.set_recompute(every)
    batch, _ = model.collate(examples, list(range(len(examples))))
    moved = {name: value.to("meta") if torch.is_tensor(value) else value for name, value in batch.items()}
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = (storage.nbytes(), tensor)  # held, or another would get its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(moved)
    return sum(size for size, _ in saved.values())


def use(model, examples, plan, known=None):
    """What a step takes on the first batch_size of these examples at once. model: on the meta device.

    known: a dictionary that keeps activations from call to call, for the same model and examples.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    known, key = {} if known is None else known, (plan.batch_size, plan.checkpointing)
    if key not in known:
        known[key] = kept(model, examples[: plan.batch_size], plan.checkpointing)
    return Use(weight_bytes(model, plan.base_bits), *state_bytes(trained, plan), known[key])


# ------------------------------------------------------------------------------------------------ of a run


def ranks():
    return dist.get_world_size() if dist.is_initialized() else 1


def plan_of(cfg, clips):
    """The Plan of train.py's settings, for a step on so many clips."""
    accumulates = cfg.grad_accum_steps > 1 or ranks() > 1
    return Plan(cfg.base_bits, cfg.optimizer, cfg.master, cfg.fused_backward, int(cfg.checkpointing), clips,
                accumulates, ranks() if cfg.shard else 1, bool(cfg.ema))


class Change(NamedTuple):
    """Flags of train.py, and what they make of a plan."""

    flags: str
    fields: dict


def savings(cfg, plan, low):
    """The changes that save memory and are not made yet, those first that cost the least. low: in bf16."""
    half, full = plan.batch_size // 2, not cfg.lora
    out = []
    if ranks() > 1 and not cfg.shard and cfg.master != "none":
        out.append(Change("--shard", {"ranks": ranks()}))
    if not plan.checkpointing:
        out.append(Change("--checkpointing", {"checkpointing": 1}))
    if half and not cfg.batch_tokens and not cfg.fused_backward:
        flags = f"--batch_size {half} --grad_accum_steps {2 * cfg.grad_accum_steps}"
        out.append(Change(flags, {"batch_size": half, "accumulates": True}))
    if cfg.optimizer == "adamw":
        out.append(Change("--optimizer adamw8bit", {"optimizer": "adamw8bit"}))
    if cfg.lora and cfg.save_mode == "lora":
        smaller = [bits for bits in (8, 4) if bits < plan.base_bits]
        out += [Change(f"--base_bits {bits}", {"base_bits": bits}) for bits in smaller]
    if full and not (plan.accumulates or cfg.max_grad_norm or cfg.fused_backward):
        out.append(Change("--fused_backward", {"fused_backward": True}))
    if full and low and cfg.master != "none" and not cfg.shard:
        out.append(Change("--master none", {"master": "none"}))
    return out


def enough(model, examples, plan, changes, room):
    """[(flags, Use)]: the first two ways below `room` bytes, of one change if one is enough, else of two."""
    found, activations = [], {}
    for several in [*combinations(changes, 1), *combinations(changes, 2)]:
        names = {change.flags for change in several}
        fields = {}
        for change in several:
            fields |= change.fields
        other = plan._replace(**fields)
        doubled = len(fields) < sum(len(change.fields) for change in several)
        known = any(set(flags) <= names for flags, _ in found)  # more than enough says nothing new
        if doubled or known or (other.fused_backward and other.accumulates):
            continue
        taken = use(model, examples, other, activations)
        if taken.total <= room:
            found.append((sorted(names), taken))
        if len(found) == 2:
            break
    return [(" with ".join(flags), taken) for flags, taken in found]


def advice(cfg, model, examples):
    """After memory has run out: what a step on these examples takes, and with which settings it fits."""
    plan, blank = plan_of(cfg, len(examples)), on_meta(model)
    now, whole = use(blank, examples, plan), all_memory(model.device)
    room = whole - LEAVE
    if now.total <= room:  # it should have fitted: others are on the device, or scratch is large
        room = now.total * 3 / 4
    changes = savings(cfg, plan, model.dtype == torch.bfloat16)
    ways = enough(blank, examples, plan, changes, room)
    said = ", or ".join(f"{flags} ({spoken(taken.total)})" for flags, taken in ways)
    said = said or "no two settings for this run; LoRA takes the least"
    return (f"By arithmetic a step takes {now}, and the device has {spoken(whole)}. Enough would have "
            f"been {said}.")
