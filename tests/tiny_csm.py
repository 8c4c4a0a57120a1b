"""Tiny random CSM checkpoints in the published formats; needs neither transformers nor our model.

    write(folder, "original" | "transformers" | "mlx", codec="moshi" | "transformers" | "inside" | "none", num_codebooks=32)

Names and shapes follow from the config; values are tests.tiny.fill's for transformers' names, and the other namings are
the same function: q and k permuted head by head, which `interleave` does in a loop of its own.
"""
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests import tiny

NAMINGS = ("original", "transformers", "mlx")
VARIANTS = NAMINGS  # what tests/test_backbones.py and tests/test_journey.py go through


def config(**overrides):
    """config.json with both vocabularies of fields. Overrides depth={...}, codec={...} go into those sections."""
    depth, codec = overrides.pop("depth", {}), overrides.pop("codec_settings", {})
    c = {
        "architectures": ["CsmForConditionalGeneration"], "model_type": "csm", "hidden_size": 48, "intermediate_size": 80,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256, "num_codebooks": 8, "vocab_size": 35, "text_vocab_size": 320, "hidden_act": "silu",
        "attention_bias": False, "mlp_bias": False, "tie_codebooks_embeddings": True, "tie_word_embeddings": False,
        "bos_token_id": 310, "eos_token_id": None, "pad_token_id": 312, "audio_token_id": 312, "audio_eos_token_id": 313,
        "codebook_eos_token_id": 0, "codebook_pad_token_id": 34, "rope_theta": 500000.0,
        # As published: equal to factor 32, low 1, high 4, old context 8192, written so that it stays below the positions.
        "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "high_freq_factor": 0.0625, "low_freq_factor": 0.015625,
                         "original_max_position_embeddings": 128},
        "backbone_flavor": "llama-1B", "decoder_flavor": "llama-100M", "audio_vocab_size": 35, "audio_num_codebooks": 8,
        "transformers_weights": "transformers.safetensors.index.json",
        "depth_decoder_config": {
            "model_type": "csm_depth_decoder_model", "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 24, "rms_norm_eps": 1e-5, "backbone_hidden_size": 48,
            "max_position_embeddings": 33, "num_codebooks": 8, "vocab_size": 35, "rope_theta": 500000.0,
            "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "high_freq_factor": 0.0078125,
                             "low_freq_factor": 0.001953125, "original_max_position_embeddings": 16}},
        "codec_config": {
            "model_type": "mimi", "num_filters": 4, "hidden_size": 32, "upsampling_ratios": [8, 6, 5, 4], "codebook_size": 32,
            "codebook_dim": 8, "vector_quantization_hidden_dimension": 8, "num_quantizers": 8, "upsample_groups": 32,
            "num_hidden_layers": 2, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8,
            "sliding_window": 24, "sampling_rate": 24000, "norm_eps": 1e-5, "rope_theta": 10000.0},
    }
    c.update(overrides)
    c["depth_decoder_config"].update(depth)
    c["codec_config"].update(codec)
    for other in (c["depth_decoder_config"], c):
        other["num_codebooks"], other["vocab_size"] = c["num_codebooks"], c["vocab_size"]
    c["codec_config"]["num_quantizers"] = max(c["num_codebooks"], c["codec_config"]["num_quantizers"])
    c["depth_decoder_config"]["backbone_hidden_size"] = c["hidden_size"]
    c["audio_num_codebooks"], c["audio_vocab_size"] = c["num_codebooks"], c["vocab_size"]
    return c


# ------------------------------------------------------------------------------------------------ names and shapes


def main_shapes(c):
    """{transformers name: shape}, without the codec and with both names of the tied table."""
    d, K, V = c["depth_decoder_config"], c["num_codebooks"], c["vocab_size"]
    table = (K * V, c["hidden_size"])
    out = {"lm_head.weight": (V, c["hidden_size"]), "embed_text_tokens.weight": (c["text_vocab_size"], c["hidden_size"]),
           "backbone_model.embed_tokens.embed_audio_tokens.weight": table, "depth_decoder.model.embed_tokens.weight": table,
           "depth_decoder.model.inputs_embeds_projector.weight": (d["hidden_size"], c["hidden_size"]),
           "depth_decoder.codebooks_head.weight": (K - 1, d["hidden_size"], V)}
    for prefix, t in (("backbone_model", c), ("depth_decoder.model", d)):
        wide, q, kv = t["hidden_size"], t["num_attention_heads"] * t["head_dim"], t["num_key_value_heads"] * t["head_dim"]
        out[f"{prefix}.norm.weight"] = (wide,)
        for i in range(t["num_hidden_layers"]):
            layer = f"{prefix}.layers.{i}"
            for name, shape in (("q_proj", (q, wide)), ("k_proj", (kv, wide)), ("v_proj", (kv, wide)), ("o_proj", (wide, q))):
                out[f"{layer}.self_attn.{name}.weight"] = shape
            for name, shape in (("gate_proj", (t["intermediate_size"], wide)), ("up_proj", (t["intermediate_size"], wide)),
                                ("down_proj", (wide, t["intermediate_size"]))):
                out[f"{layer}.mlp.{name}.weight"] = shape
            out[f"{layer}.input_layernorm.weight"] = out[f"{layer}.post_attention_layernorm.weight"] = (wide,)
    return out


def codec_shapes(m):
    """{transformers name: shape} of Mimi."""
    F, H, out = m["num_filters"], m["hidden_size"], {}

    def conv(name, n_out, n_in, kernel, bias=None):
        out[f"{name}.conv.weight"] = (n_out, n_in, kernel)
        if bias:
            out[f"{name}.conv.bias"] = (bias,)

    def residual(name, width):
        conv(f"{name}.block.1", width // 2, width, 3, width // 2)
        conv(f"{name}.block.3", width, width // 2, 1, width)

    conv("encoder.layers.0", F, 1, 7, F)
    at, width = 1, F
    for ratio in reversed(m["upsampling_ratios"]):
        residual(f"encoder.layers.{at}", width)
        conv(f"encoder.layers.{at + 2}", 2 * width, width, 2 * ratio, 2 * width)
        at, width = at + 3, 2 * width
    conv(f"encoder.layers.{at + 1}", H, width, 3, H)
    conv("decoder.layers.0", width, H, 7, width)
    at = 2
    for ratio in m["upsampling_ratios"]:
        conv(f"decoder.layers.{at}", width, width // 2, 2 * ratio, width // 2)  # transposed: (in, out, kernel)
        width //= 2
        residual(f"decoder.layers.{at + 1}", width)
        at += 3
    conv(f"decoder.layers.{at}", 1, F, 3, 1)
    conv("downsample", H, H, 4)
    conv("upsample", H, H // m["upsample_groups"], 4)
    for side in ("encoder", "decoder"):
        for i in range(m["num_hidden_layers"]):
            layer = f"{side}_transformer.layers.{i}"
            for p in "qkvo":
                out[f"{layer}.self_attn.{p}_proj.weight"] = (H, H)
            out[f"{layer}.mlp.fc1.weight"], out[f"{layer}.mlp.fc2.weight"] = (m["intermediate_size"], H), (H, m["intermediate_size"])
            for norm in ("input_layernorm", "post_attention_layernorm"):
                out[f"{layer}.{norm}.weight"] = out[f"{layer}.{norm}.bias"] = (H,)
            out[f"{layer}.self_attn_layer_scale.scale"] = out[f"{layer}.mlp_layer_scale.scale"] = (H,)
    for kind, count in (("semantic", 1), ("acoustic", m["num_quantizers"] - 1)):
        q = f"quantizer.{kind}_residual_vector_quantizer"
        out[f"{q}.input_proj.weight"], out[f"{q}.output_proj.weight"] = (m["codebook_dim"], H, 1), (H, m["codebook_dim"], 1)
        for i in range(count):
            book = f"{q}.layers.{i}.codebook"
            out[f"{book}.initialized"], out[f"{book}.cluster_usage"] = (1,), (m["codebook_size"],)
            out[f"{book}.embed_sum"] = (m["codebook_size"], m["codebook_dim"])
    return out


def main_weights(c):
    """Of std 1/sqrt(fan in): large enough that no mistake of the arithmetic hides below a tolerance."""
    out = tiny.fill(main_shapes(c))
    out["depth_decoder.model.embed_tokens.weight"] = out["backbone_model.embed_tokens.embed_audio_tokens.weight"].clone()
    for name in ("embed_text_tokens.weight", "backbone_model.embed_tokens.embed_audio_tokens.weight", "depth_decoder.model.embed_tokens.weight"):
        out[name] = out[name] * 3
    out["depth_decoder.codebooks_head.weight"] = out["depth_decoder.codebooks_head.weight"] * c["vocab_size"] ** 0.5
    return out


def codec_weights(c):
    return {n: t - 1 if n.endswith("bias") else t for n, t in tiny.fill(codec_shapes(c["codec_config"])).items()}


# ------------------------------------------------------------------------------------------------ other namings


def interleave(w, head_dim):
    """Half-split rows to interleaved ones, one at a time: pair i of a head was (i, i + half) and becomes (2 i, 2 i + 1)."""
    out = torch.empty_like(w)
    for row in range(len(w)):
        head, i = divmod(row, head_dim)
        out[head * head_dim + (2 * i if i < head_dim // 2 else 2 * (i - head_dim // 2) + 1)] = w[row]
    return out


def other_naming(weights, c, naming):
    """transformers' tensors under the names of "original" or "mlx"."""
    whole = {"lm_head.weight": "codebook0_head.weight", "embed_text_tokens.weight": "text_embeddings.weight",
             "backbone_model.embed_tokens.embed_audio_tokens.weight": "audio_embeddings.weight",
             "depth_decoder.model.inputs_embeds_projector.weight": "projection.weight",
             "depth_decoder.codebooks_head.weight": "audio_head"}
    parts = {"self_attn.q_proj.weight": "attn.q_proj.weight", "self_attn.k_proj.weight": "attn.k_proj.weight",
             "self_attn.v_proj.weight": "attn.v_proj.weight", "self_attn.o_proj.weight": "attn.output_proj.weight",
             "mlp.gate_proj.weight": "mlp.w1.weight", "mlp.down_proj.weight": "mlp.w2.weight", "mlp.up_proj.weight": "mlp.w3.weight",
             "input_layernorm.weight": "sa_norm.scale", "post_attention_layernorm.weight": "mlp_norm.scale"}
    out = {}
    for name, w in weights.items():
        if name == "depth_decoder.model.embed_tokens.weight":
            continue
        if name in whole:
            out[whole[name]] = w
            continue
        t = c if name.startswith("backbone_model") else c["depth_decoder_config"]
        tower = "backbone" if t is c else "decoder"
        if ".layers." not in name:
            out[f"{tower}.norm." + ("scale" if naming == "original" else "weight")] = w
            continue
        index, _, part = name.split(".layers.")[1].partition(".")
        if part[10:] in ("q_proj.weight", "k_proj.weight"):
            w = interleave(w, t["head_dim"])
        out[f"{tower}.layers.{index}." + (parts[part] if naming == "original" else part)] = w
    return out


def moshi_names(weights, m):
    """Mimi's transformers tensors as moshi's file has them."""
    out, last = {}, 1 + 3 * len(m["upsampling_ratios"]) + 1
    for name, w in weights.items():
        p = name.split(".")
        if p[0] in ("encoder", "decoder") and "block" in p:
            name = f"{p[0]}.model.{p[2]}.block.{p[4]}.conv.conv.{p[-1]}"
        elif p[0] in ("encoder", "decoder"):
            kind = "convtr" if p[0] == "decoder" and 0 < int(p[2]) < last else "conv"
            name = f"{p[0]}.model.{p[2]}.{kind}.{kind}.{p[-1]}"
        elif p[0] == "downsample":
            name = "downsample.conv.conv.conv.weight"
        elif p[0] == "upsample":
            name = "upsample.convtr.convtr.convtr.weight"
        elif p[0] == "quantizer":
            chain = "rvq_first" if p[1].startswith("semantic") else "rvq_rest"
            leaf = {"initialized": "_initialized", "embed_sum": "embedding_sum"}.get(p[-1], p[-1])
            name = f"quantizer.{chain}.{p[2]}.weight" if p[2] != "layers" else f"quantizer.{chain}.vq.layers.{p[3]}._codebook.{leaf}"
        else:
            layer, part = f"{p[0]}.transformer.layers.{p[2]}.", ".".join(p[3:])
            if part in ("self_attn.k_proj.weight", "self_attn.v_proj.weight"):
                continue
            if part == "self_attn.q_proj.weight":
                k, v = (weights[name.replace("q_proj", f"{x}_proj")] for x in "kv")
                w = torch.cat([interleave(w, m["head_dim"]), interleave(k, m["head_dim"]), v])
            name = layer + {"self_attn.q_proj.weight": "self_attn.in_proj_weight", "self_attn.o_proj.weight": "self_attn.out_proj.weight",
                            "mlp.fc1.weight": "linear1.weight", "mlp.fc2.weight": "linear2.weight",
                            "input_layernorm.weight": "norm1.weight", "input_layernorm.bias": "norm1.bias",
                            "post_attention_layernorm.weight": "norm2.weight", "post_attention_layernorm.bias": "norm2.bias",
                            "self_attn_layer_scale.scale": "layer_scale_1.scale", "mlp_layer_scale.scale": "layer_scale_2.scale"}[part]
        out[name] = w
    return out


# ------------------------------------------------------------------------------------------------ files

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
SPECIAL = {310: "<|begin_of_text|>", 311: "<|end_of_text|>", 312: "<|AUDIO|>", 313: "<|audio_eos|>"}


def tokenizer():
    """tokenizer.json: byte-level BPE with Llama 3's pattern, a few merges, two specials renamed as in sesame/csm-1b."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in visible]
    alphabet = [chr(b) for b in visible] + [chr(256 + i) for i in range(len(hidden))]
    merges = [("h", "e"), ("Ġ", "t"), ("Ġt", "he"), ("i", "n"), ("Ġ", "a"), ("e", "r"), ("o", "u"), ("l", "l")]
    vocab = {piece: i for i, piece in enumerate(alphabet + [a + b for a, b in merges])}
    added = [{"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
             for i, t in SPECIAL.items()]
    template = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": SPECIAL[310], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                                                         {"SpecialToken": {"id": SPECIAL[311], "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {SPECIAL[i]: {"id": SPECIAL[i], "ids": [i], "tokens": [SPECIAL[i]]} for i in (310, 311)}}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]},
        "post_processor": {"type": "Sequence", "processors": [
            {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}, template]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False, "ignore_merges": True, "vocab": vocab,
                  "merges": [f"{a} {b}" for a, b in merges]},
    }


def write(folder, naming="transformers", codec="", shards=1, tied="both", stated=True, **overrides):
    """A checkpoint folder; returns its Path.

    codec: where Mimi lies: "moshi" or "transformers" in a file of that naming, "inside" the model's file, "none" nowhere;
    empty takes what is published with the naming. shards: files of the transformers naming.
    tied: which of the two names of the audio table are stored, "both", "backbone" or "depth". stated: config.json states
    the widths; without, only the original's five fields, and then the towers must have the published numbers of heads.
    """
    folder, c = Path(folder), config(**overrides)
    folder.mkdir(parents=True, exist_ok=True)
    weights, mimi = main_weights(c), codec_weights(c)
    codec = codec or {"original": "moshi", "transformers": "inside", "mlx": "transformers"}[naming]
    if naming == "transformers":
        drop = {"both": None, "backbone": "depth_decoder.model.embed_tokens.weight",
                "depth": "backbone_model.embed_tokens.embed_audio_tokens.weight"}[tied]
        weights.pop(drop, None)
        if codec == "inside":
            weights |= {f"codec_model.{n}": w for n, w in mimi.items()}
        names = sorted(weights)
        files = {f"transformers-{i + 1:05d}-of-{shards:05d}.safetensors": names[i::shards] for i in range(shards)}
        for file, part in files.items():
            save_file({n: weights[n] for n in part}, folder / file, {"format": "pt"})
        index = {"metadata": {}, "weight_map": {n: file for file, part in files.items() for n in part}}
        (folder / "transformers.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(other_naming(weights, c, naming), folder / ("model.safetensors" if naming == "original" else "ckpt.safetensors"))
    if codec == "moshi":
        save_file(moshi_names(mimi, c["codec_config"]), folder / "tokenizer-e351c8d8-checkpoint125.safetensors")
    elif codec == "transformers":
        save_file(mimi, folder / "mimi.safetensors")
    if naming != "transformers":
        c.pop("transformers_weights")
    if not stated:
        c = {k: c[k] for k in ("backbone_flavor", "decoder_flavor", "text_vocab_size", "audio_vocab_size", "audio_num_codebooks")}
    (folder / "config.json").write_text(json.dumps(c, indent=1))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer(), ensure_ascii=False))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIAL[310],
                                                              "eos_token": SPECIAL[311], "pad_token": SPECIAL[311]}))
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.9, "top_k": 50, "max_new_tokens": 125,
                                                               "depth_decoder_do_sample": True, "depth_decoder_temperature": 0.9,
                                                               "depth_decoder_top_k": 50}))
    return folder
