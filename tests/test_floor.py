"""The arithmetic and the memory of a training step at the published shapes, counted on the meta device: no GPU, no patience.

The floor counts every real position once: 4 FLOPs per weight and position where something below is trained (forward and
input gradient), 2 where nothing is; and for backward per layer and position 8 C + 2 (q + 2 kv) + 2 q + 6 F bytes in bf16.
On the meta device attention is taken apart into its float32 matrices per head; fused kernels keep none of those, so they
are not counted (a fused kernel's own q, k, v and output are in the bound).
"""
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import lora
from models import higgs, indextts2, voxcpm


def on_meta(make, equip):
    """A model at its published shape, in bf16 and without values; equip(model) makes the tables that `load` would compute."""
    with torch.device("meta"):
        model = make()
    model.to(torch.bfloat16)
    equip(model)
    return model.train()


def weights(module):
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, torch.nn.Linear))


def bytes_per_layer(width, q, kv, hidden):
    return 8 * width + 2 * (q + 2 * kv) + 2 * q + 6 * hidden


# ------------------------------------------------------------------------------------------------ VoxCPM 1.5


def voxcpm_model():
    def equip(model):
        for stack in model.stacks():
            stack.make_rotary("meta")

    return on_meta(lambda: voxcpm.VoxCPM(voxcpm.shape("real", "1.5")[0]), equip)


def voxcpm_example(model, patches, tokens):
    c = model.config
    return {"text": torch.ones(tokens, dtype=torch.long), "latents": torch.zeros(patches, c.patch_size, c.feat_dim)}


def voxcpm_groups(model, clips):
    """First axes of the float32 matrices inside attention."""
    c = model.config.lm_config
    return {len(clips) * c.num_attention_heads, sum(a for a, _ in clips) * c.num_key_value_heads}


def voxcpm_floor(model, clips, full):
    c = model.config
    patches, positions = sum(a for a, _ in clips), sum(a + t for a, t in clips)
    lm, dit = weights(model.base_lm) + weights(model.residual_lm), weights(model.feat_decoder)
    trained = 6 if full else 4
    encoder = weights(model.feat_encoder) * patches * (c.patch_size + 1) * (6 if full else 2)
    tokens = patches * (2 * c.patch_size + 1)
    adapted = 0 if full else 6 * adapter_size(model) / (lm + dit)  # adapters are trained: 6 FLOPs per weight
    flops = encoder + (trained + adapted) * (lm * positions + dit * tokens)
    s = c.lm_config
    q, kv = (n * s.head_size for n in (s.num_attention_heads, s.num_key_value_heads))
    layers = positions * (s.num_hidden_layers + c.residual_lm_num_layers) + tokens * c.dit_config.num_layers
    return flops, bytes_per_layer(s.hidden_size, q, kv, s.intermediate_size) * layers


# ------------------------------------------------------------------------------------------------ Higgs Audio v2


def higgs_model():
    def equip(model):
        c = model.config
        model.offsets = torch.zeros(c.num_codebooks, dtype=torch.long, device="meta")
        model.frequencies = torch.zeros(c.head_dim // 2, device="meta")

    return on_meta(lambda: higgs.Higgs(higgs.PUBLISHED), equip)


def higgs_example(model, frames, tokens):
    """A clip of so many columns behind so much text; the last token ends the turn."""
    c, L = model.config, tokens + frames
    audio = torch.arange(L) >= tokens
    audio[-1] = False
    labels = torch.where(audio[:, None], 1, higgs.NONE).expand(L, c.num_codebooks).clone()
    labels[tokens] = higgs.NONE  # the column that begins the stream
    text = torch.full((L,), higgs.NONE)
    text[-1] = 1
    return {"ids": torch.ones(L, dtype=torch.long), "codes": torch.zeros(L, c.num_codebooks, dtype=torch.long), "audio": audio,
            "text_labels": text, "audio_labels": labels}


def higgs_groups(model, clips):
    return {len(clips) * model.config.num_attention_heads}


def higgs_floor(model, clips, full):
    """Attention at all positions, of the two feed-forwards that of the position's kind, heads where something is predicted."""
    c = model.config
    text, audio, rows = sum(t for _, t in clips), sum(a for a, _ in clips), len(clips)
    layer, heads = model.layers[0], model.audio_decoder_proj
    sizes = weights(layer.self_attn), weights(layer.mlp), weights(layer.audio_mlp)
    each = sizes[0] * (text + audio) + sizes[1] * text + sizes[2] * audio
    predicted = weights(heads.text_lm_head) * rows + weights(heads.audio_lm_head) * audio
    total = each * c.num_hidden_layers + predicted
    adapted = 0 if full else 6 * adapter_size(model) / (sum(sizes) * c.num_hidden_layers) * each * c.num_hidden_layers
    q, kv = (n * c.head_dim for n in (c.num_attention_heads, c.num_key_value_heads))
    logits = 4 * c.num_codebooks * c.codebook_size * audio + 4 * c.vocab_size * rows  # float32, for the cross-entropy
    kept = bytes_per_layer(c.hidden_size, q, kv, c.intermediate_size) * (text + audio) * c.num_hidden_layers
    return (6 if full else 4) * total + adapted, kept + logits + 2 * adapter_size(model)  # adapters act in bf16


class Case(NamedTuple):
    """How the step of a backbone is made and bounded; clips are (steps of audio, tokens of text)."""

    model: Callable
    example: Callable
    groups: Callable
    floor: Callable
    settings: dict
    reference: list  # ten seconds
    padded: list  # clips of very unequal length, with more text than audio


CASES = {
    "voxcpm": Case(voxcpm_model, voxcpm_example, voxcpm_groups, voxcpm_floor, {"r": 32, "alpha": 32.0},
                   [(63, 30)], [(63, 30), (13, 200), (25, 120), (50, 80)]),
    "higgs": Case(higgs_model, higgs_example, higgs_groups, higgs_floor, {"r": 16, "target_modules": ["attn", "mlp", "audio_mlp"]},
                  [(259, 30)], [(259, 30), (59, 400), (110, 300), (209, 200)]),
}


def adapter_size(model):
    return sum(p.numel() for n, p in model.named_parameters() if ".lora_" in n)


def step(case, clips, full):
    """(model, FLOPs of matrix products and convolutions, bytes kept for backward) of one training step."""
    model = case.model()
    if not full:
        lora.apply_lora_to_model(model, case.settings)
    batch, _ = model.collate([case.example(model, *clip) for clip in clips], list(range(len(clips))))
    batch = {k: v.to("meta") if torch.is_tensor(v) else v for k, v in batch.items()}
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    groups, saved = case.groups(model, clips), {}

    def keep(t):
        by_head = t.ndim == 3 and t.shape[0] in groups or t.ndim == 4 and t.shape[2] == t.shape[3]
        inside_attention = t.dtype == torch.float32 and by_head
        if t.untyped_storage()._cdata not in parameters and not inside_attention:
            saved[t.untyped_storage()._cdata] = (t.untyped_storage().nbytes(), t)
        return t

    with FlopCounterMode(display=False) as flops:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            out = model(batch)
        sum(v for k, v in out.items() if k.startswith("loss/")).backward()
    by_kind = flops.get_flop_counts()["Global"]
    products = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.convolution)
    return model, sum(v for k, v in by_kind.items() if k in products), sum(n for n, _ in saved.values())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["reference", "padded"])
def test_a_lora_step_does_no_more_than_it_must(name, kind):
    case = CASES[name]
    clips = getattr(case, kind)
    model, flops, saved = step(case, clips, full=False)
    most, bytes_kept = case.floor(model, clips, full=False)
    assert flops <= 1.03 * most, f"{flops / most:.3f} of the floor"
    assert saved <= 1.4 * bytes_kept, f"{saved / bytes_kept:.3f} of the bytes"


@pytest.mark.parametrize("name, per_second", [("voxcpm", 52.2e9), ("higgs", 336.0e9)])
def test_the_reference_sample_costs_what_the_table_says(name, per_second):
    """FLOPs per second of audio for LoRA with text skipped; the last layers, which compute only what is asked for, save some."""
    _, flops, _ = step(CASES[name], CASES[name].reference, full=False)
    assert 0.9 * per_second < flops / 10 <= 1.06 * per_second, f"{flops / 10 / per_second:.3f}"


@pytest.mark.parametrize("name", CASES)
def test_a_full_step_does_no_more_than_it_must(name):
    case = CASES[name]
    model, flops, _ = step(case, case.padded, full=True)
    assert flops <= 1.03 * case.floor(model, case.padded, full=True)[0]


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
