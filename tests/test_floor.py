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
from models import indextts2, voxcpm

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


# ------------------------------------------------------------------------------------------------ IndexTTS2's GPT

SPOKEN = [(500, 30)]  # codes, pieces of text: ten seconds
UNEVEN = [(500, 30), (100, 200), (200, 120), (400, 80)]


def gpt_step(clips, full):
    """The model, FLOPs of linear layers, bytes saved for backward. Voice and emotion come from the cache, as in a LoRA run."""
    config, _ = indextts2.shape("real")
    with torch.device("meta"):
        model = indextts2.IndexTTS2(config)
    model.to(torch.bfloat16).train()
    model.training_options.dropout = 0.0
    if not full:
        lora.apply_lora_to_model(model, {"r": 8, "alpha": 16.0})
    voice = {"spk": torch.zeros(config.latents, config.model_dim), "emovec": torch.zeros(config.model_dim)}
    examples = [{"text": torch.ones(t, dtype=torch.long), "codes": torch.ones(n, dtype=torch.long), **voice} for n, t in clips]
    batch, _ = model.collate(examples, list(range(len(clips))))
    batch = {k: v.to("meta") if torch.is_tensor(v) else v for k, v in batch.items()}
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    saved, heads = {}, len(clips) * config.heads

    def keep(t):
        # taken apart on the meta device, as above: one matrix per head, and its weights of every pair of positions
        inside_attention = t.ndim == 3 and t.shape[0] == heads or t.ndim == 4 and t.shape[2] == t.shape[3]
        if t.untyped_storage()._cdata not in weights and not inside_attention:
            saved[t.untyped_storage()._cdata] = (t.untyped_storage().nbytes(), t)
        return t

    with FlopCounterMode(display=False) as flops:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            out = model(batch)
        (out["loss/text"] + out["loss/mel"]).backward()
    by_kind = flops.get_flop_counts()["Global"]
    linear = sum(v for k, v in by_kind.items() if k in (torch.ops.aten.mm, torch.ops.aten.addmm))
    return model, linear, sum(n for n, _ in saved.values())


def gpt_floor(model, clips, full):
    c = model.config
    positions = sum(c.latents + 2 + t + 2 + n + 1 for n, t in clips)
    text, codes = sum(t + 1 for _, t in clips), sum(n + 1 for n, _ in clips)
    blocks = c.layers * 12 * c.model_dim**2
    heads = c.text_rows * c.model_dim * text + c.number_mel_codes * c.model_dim * codes
    adapters = sum(p.numel() for n, p in model.named_parameters() if ".lora_" in n)
    flops = (6 if full else 4) * (blocks * positions + heads) + 6 * adapters * positions
    # per layer and position as above, with F = 4 C; and the logits in bf16 and float32, with what the loss keeps of them
    kept = 40 * c.model_dim * c.layers * positions + 12 * (c.text_rows * text + c.number_mel_codes * codes)
    return flops, kept


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("clips", [SPOKEN, UNEVEN], ids=["reference", "padded"])
def test_a_step_of_the_gpt_does_no_more_than_it_must(clips, full):
    model, flops, saved = gpt_step(clips, full)
    most, bytes_kept = gpt_floor(model, clips, full)
    assert flops <= 1.03 * most, f"{flops / most:.3f} of the floor"
    assert saved <= 1.4 * bytes_kept, f"{saved / bytes_kept:.3f} of the bytes"
    assert flops >= 0.97 * most
