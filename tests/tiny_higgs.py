"""Tiny random Higgs Audio checkpoints in both published layouts; needs neither transformers nor our model.

    write(folder, "original" | "transformers", codec="beside" | "inside" | "none", shards=1, split=False)

Names and shapes follow from the config; values are tests.tiny.fill's for the original names.
"""
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests import test_higgs_codec, tiny
from tests.tiny_csm import LLAMA3

VARIANTS = ("original", "transformers")  # what tests/test_backbones.py and tests/test_journey.py go through
CODEC = "higgs-audio-v2-tokenizer"
SPECIAL = dict(enumerate(
    ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|audio_bos|>",
     "<|audio_eos|>", "<|audio_out_bos|>", "<|reserved_special_token_6|>", "<|AUDIO|>", "<|AUDIO_OUT|>", "<|scene_desc_start|>",
     "<|scene_desc_end|>", "<SE>", "</SE>"], start=300))
ID = {piece: number for number, piece in SPECIAL.items()}


def config(naming="original", **overrides):
    """config.json of either layout; overrides go by transformers' names, but for keys that only the original has."""
    flat = {"vocab_size": 320, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    flat.update({k: overrides.pop(k) for k in list(overrides) if k in flat})
    bins = overrides.pop("bins", 32)
    streams = {"audio_stream_bos_id": bins, "audio_stream_eos_id": bins + 1}
    if naming == "transformers":
        return {"architectures": ["HiggsAudioV2ForConditionalGeneration"], "model_type": "higgs_audio_v2", **flat, "num_codebooks": 8,
                "codebook_size": bins + 2, **streams, "audio_token_id": ID["<|AUDIO_OUT|>"], "audio_bos_token_id": ID["<|audio_out_bos|>"],
                "audio_delay_token_id": ID["<|reserved_special_token_6|>"], "pad_token_id": 301, "bos_token_id": 1, "eos_token_id": ID["<|eot_id|>"],
                "max_position_embeddings": 2048, "tie_word_embeddings": False,
                # As published: equal to factor 32, low 1, high 4, old context 8192.
                "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 0.125,
                                    "high_freq_factor": 0.5, "original_max_position_embeddings": 1024}, **overrides}
    text = {**flat, "model_type": "llama", "max_position_embeddings": 2048, "rope_theta": 500000.0, "tie_word_embeddings": True,
            "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                             "original_max_position_embeddings": 8192}, "bos_token_id": 300, "eos_token_id": 301}
    return {"architectures": ["HiggsAudioModel"], "model_type": "higgs_audio", "text_config": text, "audio_adapter_type": "dual_ffn_fast_forward",
            "audio_dual_ffn_layers": list(range(flat["num_hidden_layers"])), "audio_num_codebooks": 8, "audio_codebook_size": bins, **streams,
            "audio_in_token_idx": ID["<|AUDIO|>"], "audio_out_token_idx": ID["<|AUDIO_OUT|>"], "audio_out_bos_token_id": ID["<|audio_out_bos|>"],
            "audio_eos_token_id": ID["<|audio_eos|>"], "pad_token_id": 301, "encode_audio_in_tokens": True, "encode_whisper_embed": False,
            "skip_audio_tower": True, "use_delay_pattern": True, "audio_embed_avg": False, "audio_decoder_proj_num_layers": 0,
            "use_audio_out_embed_projector": False, "use_audio_out_self_attention": False, "use_rq_transformer": False,
            "audio_ffn_hidden_size": flat["hidden_size"], "audio_ffn_intermediate_size": flat["intermediate_size"], **overrides}


def shapes(c):
    """{original name: shape}."""
    t = c.get("text_config", c)
    rows = 8 * (c["audio_codebook_size"] + 2 if "audio_codebook_size" in c else c["codebook_size"])
    H, F = t["hidden_size"], t["intermediate_size"]
    q, kv = t["num_attention_heads"] * t["head_dim"], t["num_key_value_heads"] * t["head_dim"]
    out = {"embed_tokens.weight": (t["vocab_size"], H), "norm.weight": (H,), "audio_codebook_embeddings.weight": (rows, H),
           "audio_decoder_proj.text_lm_head.weight": (t["vocab_size"], H), "audio_decoder_proj.audio_lm_head.weight": (rows, H)}
    for i in range(t["num_hidden_layers"]):
        layer = f"layers.{i}"
        out |= {f"{layer}.self_attn.{n}_proj.weight": s for n, s in (("q", (q, H)), ("k", (kv, H)), ("v", (kv, H)), ("o", (H, q)))}
        for kind in ("", "audio_"):
            out |= {f"{layer}.{kind}mlp.{n}_proj.weight": s for n, s in (("gate", (F, H)), ("up", (F, H)), ("down", (H, F)))}
            out[f"{layer}.{kind}input_layernorm.weight"] = out[f"{layer}.{kind}post_attention_layernorm.weight"] = (H,)
    return out


def weights(c):
    """Of std 1/sqrt(fan in): large enough that no mistake of the arithmetic hides below a tolerance."""
    out = tiny.fill(shapes(c))
    for name in ("embed_tokens.weight", "audio_codebook_embeddings.weight"):
        out[name] = out[name] * 3
    return out


def transformers_name(name):
    if name.startswith("audio_codebook_embeddings."):
        return name.replace("audio_codebook_embeddings.", "model.embed_audio_tokens.embed_audio_tokens.")
    return name.removeprefix("audio_decoder_proj.") if name.startswith("audio_decoder_proj.") else "model." + name


def tokenizer():
    """tokenizer.json: byte-level BPE with Llama 3's pattern, a few merges, the special tokens of Higgs Audio at small numbers."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = [chr(b) for b in visible] + [chr(256 + i) for i in range(256 - len(visible))]
    merges = [("h", "e"), ("Ġ", "t"), ("Ġt", "he"), ("i", "n"), ("Ġ", "a"), ("e", "r"), ("o", "u"), ("l", "l"), ("Ċ", "Ċ")]
    pieces = alphabet + [a + b for a, b in merges]
    pieces += [f"<fill{i}>" for i in range(len(pieces), min(SPECIAL))]  # the tokenizers library knows no gap before the special ones
    added = [{"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
             for i, t in SPECIAL.items()]
    begin = {"SpecialToken": {"id": SPECIAL[300], "type_id": 0}}
    template = {"type": "TemplateProcessing", "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {SPECIAL[300]: {"id": SPECIAL[300], "ids": [300], "tokens": [SPECIAL[300]]}}}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]},
        "post_processor": {"type": "Sequence", "processors": [
            {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}, template]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
                  "vocab": {piece: i for i, piece in enumerate(pieces)},
                  "merges": [f"{a} {b}" for a, b in merges]},
    }


def write_codec(folder, naming="original", **sizes):
    return test_higgs_codec.folder(Path(folder), naming == "original", **sizes)


def write(folder, naming="original", codec="beside", shards=1, split=False, stated=True, **overrides):
    """A checkpoint folder; returns its Path.

    codec: where the audio tokenizer lies, in the model's naming. shards: files of the weights. split: the two tables of
    words as frozen and trained halves. stated: config.json states the widths.
    """
    folder, c = Path(folder), config(naming, **overrides)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = weights(c)
    if naming == "transformers":
        tensors = {transformers_name(n): w for n, w in tensors.items()}
    if split:
        for name, half in (("embed_tokens.weight", "embed_tokens.embedding_{}.weight"),
                           ("audio_decoder_proj.text_lm_head.weight", "audio_decoder_proj.text_lm_head.linear_{}.weight")):
            whole = tensors.pop(name)
            tensors |= {half.format("frozen"): whole[:310].clone(), half.format("trainable"): whole[310:].clone()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    else:
        names = sorted(tensors)
        files = {f"model-{i + 1:05d}-of-{shards:05d}.safetensors": names[i::shards] for i in range(shards)}
        for file, part in files.items():
            save_file({n: tensors[n] for n in part}, folder / file, {"format": "pt"})
        index = {"metadata": {}, "weight_map": {n: file for file, part in files.items() for n in part}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if not stated:
        kept = {k: v for k, v in c["text_config"].items() if k in ("model_type", "num_attention_heads")}
        c = {k: v for k, v in c.items() if not k.startswith("audio_ffn")} | {"text_config": kept}
    (folder / "config.json").write_text(json.dumps(c, indent=1))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer(), ensure_ascii=False))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIAL[300],
                                                              "eos_token": SPECIAL[301], "pad_token": SPECIAL[301]}))
    end = 301 if naming == "original" else ID["<|eot_id|>"]
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 300, "eos_token_id": end, "pad_token_id": 301}))
    if codec != "none":
        place = folder / CODEC if codec == "inside" else folder.parent / CODEC
        shutil.rmtree(place, ignore_errors=True)
        write_codec(place, naming)
    return folder


