"""The arithmetic and the memory of a training step at the published shapes, counted on the meta device: no GPU, no patience.

The floor counts every real position once: 4 FLOPs per weight and position where something below is trained (forward and
input gradient), 2 where nothing is; and for backward per layer and position 8 C + 2 (q + 2 kv) + 2 q + 6 F bytes in bf16.
On the meta device attention is taken apart into its float32 matrices per head; fused kernels keep none of those, so they
are not counted (a fused kernel's own q, k, v and output are in the bound).
"""
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import lora
from models import voxcpm

REFERENCE = [(63, 30)]  # patches, text tokens: ten seconds
PADDED = [(63, 30), (13, 200), (25, 120), (50, 80)]  # of very unequal length and with more text than audio


def step(clips, full):
    config, _ = voxcpm.shape("real", "1.5")
    with torch.device("meta"):
        model = voxcpm.VoxCPM(config)
    model.to(torch.bfloat16)
    for stack in model.stacks():
        stack.make_rotary("meta")
    if not full:
        lora.apply_lora_to_model(model, {"r": 32, "alpha": 32.0})
    model.train()
    P, D = config.patch_size, config.feat_dim
    examples = [{"text": torch.ones(t, dtype=torch.long), "latents": torch.zeros(a, P, D)} for a, t in clips]
    batch, _ = model.collate(examples, list(range(len(clips))))
    batch = {k: v.to("meta") if torch.is_tensor(v) else v for k, v in batch.items()}
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    saved = {}

    heads = config.lm_config.num_attention_heads
    groups = {len(clips) * heads} | {n * config.lm_config.num_key_value_heads for n in (sum(a for a, _ in clips),)}

    def keep(t):
        inside_attention = t.dtype == torch.float32 and t.ndim == 3 and t.shape[0] in groups
        if t.untyped_storage()._cdata not in weights and not inside_attention:
            saved[t.untyped_storage()._cdata] = (t.untyped_storage().nbytes(), t)
        return t

    with FlopCounterMode(display=False) as flops:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            out = model(batch)
        (out["loss/diff"] + out["loss/stop"]).backward()
    by_kind = flops.get_flop_counts()["Global"]
    linear = sum(v for k, v in by_kind.items() if k in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.convolution))
    return model, linear, sum(n for n, _ in saved.values())


def floor(model, clips, full):
    def weights(module):
        return sum(m.weight.numel() for m in module.modules() if isinstance(m, torch.nn.Linear))

    c = model.config
    patches, positions = sum(a for a, _ in clips), sum(a + t for a, t in clips)
    adapters = sum(p.numel() for n, p in model.named_parameters() if ".lora_" in n)
    lm, dit = weights(model.base_lm) + weights(model.residual_lm), weights(model.feat_decoder)
    trained = 6 if full else 4
    encoder = weights(model.feat_encoder) * patches * (c.patch_size + 1) * (6 if full else 2)
    tokens = patches * (2 * c.patch_size + 1)
    adapted = 0 if full else 6 * adapters / (lm + dit)  # adapters are trained: 6 FLOPs per weight
    flops = encoder + (trained + adapted) * (lm * positions + dit * tokens)
    s = c.lm_config
    per_layer = 8 * s.hidden_size + 4 * s.num_attention_heads * s.head_size + 4 * s.num_key_value_heads * s.head_size + 6 * s.intermediate_size
    layers = positions * (s.num_hidden_layers + c.residual_lm_num_layers) + tokens * c.dit_config.num_layers
    return flops, per_layer * layers


@pytest.mark.parametrize("clips", [REFERENCE, PADDED], ids=["reference", "padded"])
def test_a_lora_step_does_no_more_than_it_must(clips):
    model, flops, saved = step(clips, full=False)
    most, bytes_kept = floor(model, clips, full=False)
    assert flops <= 1.03 * most, f"{flops / most:.3f} of the floor"
    assert saved <= 1.4 * bytes_kept, f"{saved / bytes_kept:.3f} of the bytes"


def test_the_reference_sample_costs_what_the_table_says():
    """52.2 GFLOP per second of audio for LoRA with text skipped; the last layers, which compute only what is asked for, save some."""
    _, flops, _ = step(REFERENCE, full=False)
    assert 0.95 * 52.2e9 < flops / 10 <= 1.03 * 52.2e9


def test_a_full_step_does_no_more_than_it_must():
    model, flops, _ = step(PADDED, full=True)
    assert flops <= 1.03 * floor(model, PADDED, full=True)[0]
