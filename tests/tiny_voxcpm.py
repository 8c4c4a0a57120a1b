"""Tiny random VoxCPM checkpoints in the published format of 0.5B, 1.5 and 2; needs neither the voxcpm package nor our model.

    write(folder, "0.5" | "1.5" | "2", lm_config={"num_hidden_layers": 4}, max_length=64)    # overrides of config.json
    write_adapter(folder, "1.5")                           # lora_weights.safetensors and lora_config.json that fit it

Names and shapes follow from the config by `main_shapes` and `codec_shapes`; values are tests.tiny.fill's times what
`tame` does. A tiny model has other widths in each stack where the published one repeats a width (language model, local
stacks, head size, feed-forward), so that a width taken from the wrong place does not fit.
"""
import copy
import json
import math
import zlib
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests import tiny

VERSIONS = VARIANTS = ("0.5", "1.5", "2")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


# ------------------------------------------------------------------------------------------------ config.json


def config(version, **overrides):
    """config.json of a tiny checkpoint, with every published field. An override None removes the field; dicts are merged."""
    two = version == "2"
    head = 16 if two else 8
    factors = [round(1.0004 + 0.4 * i**1.5, 4) for i in range(head // 2)]
    local = {"hidden_dim": 32, "ffn_dim": 40, "num_heads": 4, "num_layers": 2, **({"kv_channels": head} if two else {})}
    cfm = {"sigma_min": 1e-6, "solver": "euler", "t_scheduler": "log-norm", "inference_cfg_rate": 2.0}
    codec = {  # the published strides; widths just large enough to halve that often
        "0.5": {"encoder_dim": 4, "encoder_rates": [2, 5, 8, 8], "latent_dim": 8, "decoder_dim": 32,
                "decoder_rates": [8, 8, 5, 2], "sample_rate": 16000},
        "1.5": {"encoder_dim": 2, "encoder_rates": [2, 3, 6, 7, 7], "latent_dim": 8, "decoder_dim": 64,
                "decoder_rates": [7, 7, 6, 3, 2], "sample_rate": 44100},
        "2": {"encoder_dim": 4, "encoder_rates": [2, 5, 8, 8], "latent_dim": 8, "decoder_dim": 64,
              "decoder_rates": [8, 6, 5, 2, 2, 2], "sample_rate": 16000, "out_sample_rate": 48000,
              "sr_bin_boundaries": [20000, 30000, 40000]},
    }[version]
    out = {
        "architecture": "voxcpm2" if two else "voxcpm",
        "lm_config": {
            "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 48, "intermediate_size": 72,
            "max_position_embeddings": 32768, "num_attention_heads": 4 if two else 6, "num_hidden_layers": 3,
            "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 10000,
            # Published long and short factors are equal; here they differ, and only the short ones are for use.
            "rope_scaling": {"type": "longrope", "long_factor": [2 * f for f in factors], "short_factor": factors,
                             "original_max_position_embeddings": 32768},
            "vocab_size": 440, "use_mup": False, "scale_emb": 12, "dim_model_base": 256, "scale_depth": 1.4,
            **({"kv_channels": head} if two else {}),
        },
        "patch_size": 2 if version == "0.5" else 4,
        "feat_dim": 8,
        "scalar_quantization_latent_dim": 12,
        "scalar_quantization_scale": 9,
        "residual_lm_num_layers": 2,
        **({"residual_lm_no_rope": True} if two else {}),
        "encoder_config": dict(local),
        "dit_config": {**local, "ffn_dim": 56, "num_layers": 3, **({"mean_mode": False} if two else {}), "cfm_config": cfm},
        "audio_vae_config": codec,
        "max_length": 512,
        "device": "cuda",
        "dtype": "bfloat16",
    }
    return _merge(out, overrides)


def published(version):
    """config.json of the published checkpoint; the factors of its rotary embedding are made up."""
    two = version == "2"
    layers, local = {"0.5": (6, 4), "1.5": (8, 8), "2": (8, 12)}[version]
    head = {"kv_channels": 128} if two else {}
    factors = [1.0 + i for i in range(64 if two else 32)]
    stack = {"hidden_dim": 1024, "ffn_dim": 4096, "num_heads": 16, "num_layers": local, **head}
    return config(
        version, feat_dim=64, residual_lm_num_layers=layers, scalar_quantization_latent_dim=512 if two else 256,
        lm_config={"hidden_size": 2048 if two else 1024, "intermediate_size": 6144 if two else 4096, "vocab_size": 73448,
                   "num_hidden_layers": 28 if two else 24, "num_attention_heads": 16, **head,
                   "rope_scaling": {"short_factor": factors, "long_factor": factors}},
        encoder_config=stack, dit_config=stack, max_length=4096 if version == "0.5" else 8192,
        audio_vae_config={"0.5": None, "1.5": {"encoder_dim": 64, "latent_dim": 64, "decoder_dim": 2048},
                          "2": {"encoder_dim": 128, "latent_dim": 64, "decoder_dim": 2048}}[version])


def _merge(base, changes):
    out = copy.deepcopy(base)
    for key, value in changes.items():
        if value is None:
            out.pop(key, None)
        elif isinstance(value, dict) and isinstance(out.get(key), dict):
            out[key] = _merge(out[key], value)
        else:
            out[key] = value
    return out


# ------------------------------------------------------------------------------------------------ names and shapes


def main_shapes(cfg):
    """{published name: shape} of pytorch_model.bin / model.safetensors."""
    lm, enc, dit = cfg["lm_config"], cfg["encoder_config"], cfg["dit_config"]
    two = cfg.get("architecture") == "voxcpm2"
    wide, feat, latent = lm["hidden_size"], cfg["feat_dim"], cfg["scalar_quantization_latent_dim"]
    kv_heads = lm["num_key_value_heads"]  # in every stack
    out = {"base_lm.embed_tokens.weight": (lm["vocab_size"], wide)}

    def linear(name, n_in, n_out, bias=True):
        out[f"{name}.weight"] = (n_out, n_in)
        if bias:
            out[f"{name}.bias"] = (n_out,)

    def stack(name, width, ffn, heads, layers, head):
        head = head or width // heads
        for i in range(layers):
            block = f"{name}.layers.{i}"
            linear(f"{block}.self_attn.q_proj", width, heads * head, False)
            linear(f"{block}.self_attn.k_proj", width, kv_heads * head, False)
            linear(f"{block}.self_attn.v_proj", width, kv_heads * head, False)
            linear(f"{block}.self_attn.o_proj", heads * head, width, False)
            linear(f"{block}.mlp.gate_proj", width, ffn, False)
            linear(f"{block}.mlp.up_proj", width, ffn, False)
            linear(f"{block}.mlp.down_proj", ffn, width, False)
            out[f"{block}.input_layernorm.weight"] = out[f"{block}.post_attention_layernorm.weight"] = (width,)
        out[f"{name}.norm.weight"] = (width,)

    for name, layers in (("base_lm", lm["num_hidden_layers"]), ("residual_lm", cfg["residual_lm_num_layers"])):
        stack(name, wide, lm["intermediate_size"], lm["num_attention_heads"], layers, lm.get("kv_channels"))
    out["feat_encoder.special_token"] = (1, 1, 1, enc["hidden_dim"])
    linear("feat_encoder.in_proj", feat, enc["hidden_dim"])
    for name, c in (("feat_encoder.encoder", enc), ("feat_decoder.estimator.decoder", dit)):
        stack(name, c["hidden_dim"], c["ffn_dim"], c["num_heads"], c["num_layers"], c.get("kv_channels"))
    for name in ("in_proj", "cond_proj"):
        linear(f"feat_decoder.estimator.{name}", feat, dit["hidden_dim"])
    linear("feat_decoder.estimator.out_proj", dit["hidden_dim"], feat)
    for mlp in ("time_mlp", "delta_time_mlp"):
        for name in ("linear_1", "linear_2"):
            linear(f"feat_decoder.estimator.{mlp}.{name}", dit["hidden_dim"], dit["hidden_dim"])
    linear("fsq_layer.in_proj", wide, latent)
    linear("fsq_layer.out_proj", latent, wide)
    linear("enc_to_lm_proj", enc["hidden_dim"], wide)
    linear("lm_to_dit_proj", wide, dit["hidden_dim"])
    linear("res_to_dit_proj", wide, dit["hidden_dim"])
    if two:
        linear("fusion_concat_proj", 2 * wide, wide)
    linear("stop_proj", wide, wide)
    linear("stop_head", wide, 2, False)
    return out


def codec_config(cfg):
    """audio_vae_config with the published code's defaults for what the file leaves out."""
    if cfg.get("architecture") == "voxcpm2":
        default = {"encoder_dim": 128, "encoder_rates": [2, 5, 8, 8], "latent_dim": 64, "decoder_dim": 2048,
                   "decoder_rates": [8, 6, 5, 2, 2, 2], "sample_rate": 16000, "out_sample_rate": 48000,
                   "sr_bin_boundaries": [20000, 30000, 40000]}
    else:
        default = {"encoder_dim": 128, "encoder_rates": [2, 5, 8, 8], "latent_dim": 64, "decoder_dim": 1536,
                   "decoder_rates": [8, 8, 5, 2], "sample_rate": 16000}
    return {**default, **cfg.get("audio_vae_config", {})}


def codec_shapes(cfg):
    """{published name: shape} of audiovae.pth; every convolution has weight_g and weight_v."""
    c = codec_config(cfg)
    out = {}

    def conv(name, n_in, n_out, kernel, groups=1):
        out[f"{name}.bias"], out[f"{name}.weight_g"] = (n_out,), (n_out, 1, 1)
        out[f"{name}.weight_v"] = (n_out, n_in // groups, kernel)

    def unit(name, width):
        out[f"{name}.block.0.alpha"] = out[f"{name}.block.2.alpha"] = (1, width, 1)
        conv(f"{name}.block.1", width, width, 7, groups=width)
        conv(f"{name}.block.3", width, width, 1)

    width = c["encoder_dim"]
    conv("encoder.block.0", 1, width, 7)
    for i, stride in enumerate(c["encoder_rates"], 1):
        for k in range(3):
            unit(f"encoder.block.{i}.block.{k}", width)
        out[f"encoder.block.{i}.block.3.alpha"] = (1, width, 1)
        conv(f"encoder.block.{i}.block.4", width, 2 * width, 2 * stride)
        width *= 2
    conv("encoder.fc_mu", width, c["latent_dim"], 3)
    conv("encoder.fc_logvar", width, c["latent_dim"], 3)

    width = c["decoder_dim"]
    conv("decoder.model.0", c["latent_dim"], c["latent_dim"], 7, groups=c["latent_dim"])
    conv("decoder.model.1", c["latent_dim"], width, 1)
    for i, stride in enumerate(c["decoder_rates"], 2):
        block = f"decoder.model.{i}.block"
        out[f"{block}.0.alpha"] = (1, width, 1)
        out[f"{block}.1.bias"], out[f"{block}.1.weight_g"] = (width // 2,), (width, 1, 1)
        out[f"{block}.1.weight_v"] = (width, width // 2, 2 * stride)  # a transposed kernel is (in, out, k)
        if "sr_bin_boundaries" in c:
            for table in ("scale_embed", "bias_embed"):
                out[f"decoder.sr_cond_model.{i}.{table}.weight"] = (len(c["sr_bin_boundaries"]) + 1, width)
        width //= 2
        for k in range(2, 5):
            unit(f"{block}.{k}", width)
    last = 2 + len(c["decoder_rates"])
    out[f"decoder.model.{last}.alpha"] = (1, width, 1)
    conv(f"decoder.model.{last + 1}", width, 1, 7)
    if "sr_bin_boundaries" in c:
        out["decoder.sr_bin_boundaries"] = (len(c["sr_bin_boundaries"]),)
    return out


# ------------------------------------------------------------------------------------------------ values


def tame(name, w, cfg):
    """Where the plain rule would let the signal grow, vanish or sit in a tanh: biases around zero instead of one, a small
    branch in the codec's residual units, a transposed convolution that keeps the variance (it adds up 2 / stride of it),
    scale tables around one, quiet last convolutions, snakes with slopes far enough apart to tell the channels."""
    last = f"decoder.model.{3 + len(codec_config(cfg)['decoder_rates'])}.weight_g"
    if name.endswith(".bias"):
        return w - 1 if name.startswith(("encoder.", "decoder.")) else 3 * (w - 1)
    if name.endswith(".alpha"):
        return 1 + 3 * (w - 1)
    if name.endswith("scale_embed.weight"):
        return 1 + w
    if name.endswith("weight_v") and w.numel() == max(w.shape):
        return w - 1  # one channel: the plain rule takes the kernel for a vector and makes it a moving average
    if name.endswith("block.3.weight_g") or name == last:
        return 0.3 * w
    parts = name.split(".")
    if parts[:2] == ["decoder", "model"] and parts[3:] == ["block", "1", "weight_g"]:
        return 0.8 * w * math.sqrt(codec_config(cfg)["decoder_rates"][int(parts[2]) - 2] / 2)
    return w


def main_weights(cfg, dtype=torch.float32):
    return {k: tame(k, v, cfg).to(dtype) for k, v in tiny.fill(main_shapes(cfg)).items()}


def codec_weights(cfg):
    out = {k: tame(k, v, cfg) for k, v in tiny.fill(codec_shapes(cfg)).items()}
    if "decoder.sr_bin_boundaries" in out:
        out["decoder.sr_bin_boundaries"] = torch.tensor(codec_config(cfg)["sr_bin_boundaries"], dtype=torch.int32)
    return out


def probe(name, tensor):
    """Four numbers that stand for a tensor: its norm and three projections on random unit directions drawn from the name."""
    g = torch.Generator().manual_seed(zlib.crc32(f"probe {name}".encode()))
    directions = torch.randn(3, tensor.numel(), generator=g, dtype=torch.float64)
    directions /= directions.norm(dim=1, keepdim=True)
    flat = tensor.detach().double().flatten()
    return torch.cat([flat.norm()[None], directions @ flat]).float()


def wave(n):
    """A tone and noise, (n,), the same numbers everywhere."""
    t = torch.arange(n, dtype=torch.float64)
    noise = torch.randn(n, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return (0.4 * torch.sin(t / 17) * torch.cos(t / 911) + 0.1 * noise).float()


# ------------------------------------------------------------------------------------------------ files


def write(folder, version, stored=torch.float32, main_file=None, codec_file="audiovae.pth", wrapped=("codec",), **overrides):
    """A checkpoint folder of version "0.5", "1.5" or "2"; returns its Path.

    stored: dtype of the main weights (published: bfloat16). wrapped: which pickles, "main" and "codec", hold
    {"state_dict": ...} instead of the bare dictionary. audio_vae_config=None leaves the section out, as the published
    0.5B does, and then the codec has the published widths (300 MB).
    """
    folder, cfg = Path(folder), config(version, **overrides)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(cfg, indent=2), encoding="utf-8")
    main_file = main_file or ("pytorch_model.bin" if version == "0.5" else "model.safetensors")
    for what, name, weights in (("main", main_file, main_weights(cfg, stored)), ("codec", codec_file, codec_weights(cfg))):
        if name.endswith(".safetensors"):
            save_file(weights, folder / name)
        else:
            torch.save({"state_dict": weights} if what in wrapped else weights, folder / name)
    for name, content in tokenizer_files(cfg["lm_config"]["vocab_size"]).items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
    return folder


OF_EVERY_SECTION = {"_name_or_path": "", "architectures": None, "chunk_size_feed_forward": 0, "dtype": None, "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
                    "is_encoder_decoder": False, "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "output_attentions": False, "output_hidden_states": False,
                    "problem_type": None, "return_dict": True}


def transformers_config(cfg):
    """config.json of VoxCPM2 as transformers writes it."""
    lm, dit = dict(cfg["lm_config"]), dict(cfg["dit_config"])
    rope, theta = dict(lm.pop("rope_scaling")), lm.pop("rope_theta")
    rope |= {"rope_type": rope["type"], "rope_theta": theta}
    lm |= {**OF_EVERY_SECTION, "model_type": "voxcpm2_text", "head_dim": lm["kv_channels"], "hidden_act": "silu", "no_rope": False, "pad_token_id": None,
           "tie_word_embeddings": True, "rope_parameters": rope}
    dit |= {**OF_EVERY_SECTION, "model_type": "voxcpm2_dit", "cfm_config": {**OF_EVERY_SECTION, "model_type": "voxcpm2_cfm", **dit["cfm_config"]}}
    codec = {**OF_EVERY_SECTION, "model_type": "voxcpm2_audio_vae", "depthwise": True, "use_noise_block": False, "cond_type": "scale_bias", "cond_dim": 128,
             "cond_out_layer": False, **codec_config(cfg)}
    kept = {key: value for key, value in cfg.items() if key not in ("architecture", "device", "max_length")}
    return {**kept, "architectures": ["VoxCPM2Model"], "model_type": "voxcpm2", "lm_config": lm, "dit_config": dit, "audio_vae_config": codec,
            "encoder_config": {**OF_EVERY_SECTION, "model_type": "voxcpm2_encoder", **cfg["encoder_config"]}, "max_cache_length": cfg["max_length"],
            "sample_rate": codec["out_sample_rate"], "transformers_version": "5.24.0"}


def transformers_weights(cfg, dtype=torch.float32):
    """{name: tensor} of transformers' model.safetensors: the codec in it, its weight norms as torch has named them since 2.0."""
    new = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
    codec = {f"audio_vae.{'.'.join([*name.split('.')[:-1], new.get(name.split('.')[-1], name.split('.')[-1])])}": value for name, value in codec_weights(cfg).items()}
    return {**main_weights(cfg, dtype), **codec}


def transformers_tokenizer(vocab_size=440):
    """tokenizer.json as transformers writes it: no normalizer, the marker put in front by Metaspace, Chinese characters cut apart before merging."""
    steps = [{"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False},
             {"type": "Split", "pattern": {"Regex": "\\p{Han}"}, "behavior": "Isolated", "invert": False}]
    spec = tokenizer_files(vocab_size)["tokenizer.json"]
    return {**spec, "normalizer": None, "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}, "model": {**spec["model"], "unk_token": None}}


def write_transformers(folder, **overrides):
    """A folder of VoxCPM2 as transformers saves it; returns its Path."""
    folder, cfg = Path(folder), config("2", **overrides)
    folder.mkdir(parents=True, exist_ok=True)
    files = {"config.json": transformers_config(cfg), "tokenizer.json": transformers_tokenizer(cfg["lm_config"]["vocab_size"]),
             "tokenizer_config.json": {"tokenizer_class": "VoxCPM2Tokenizer"}, "generation_config.json": {"max_new_tokens": 2000}}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
    save_file(transformers_weights(cfg), folder / "model.safetensors")
    return folder


MERGES = [("t", "h"), ("h", "e"), ("i", "n"), ("e", "r"), ("a", "n"), ("l", "l"), ("th", "e"), ("▁", "the"), ("▁", "a"), ("o", "r"),
          ("▁", "w"), ("he", "ll"), ("hell", "o"), ("▁", "hello"), ("or", "l"), ("▁w", "orl"), ("▁worl", "d"), ("in", "g"),
          ("▁", "▁"), ("1", "2"), ("你", "好"), ("世", "界"), ("▁", "你好"), ("▁", "语"), ("▁语", "音"), ("人", "们"), ("世界", "人们")]


def tokenizer_files(vocab_size=440):
    """tokenizer.json (BPE with byte fallback, marker U+2581, Prepend and Replace) and its two companions, as dictionaries.

    你好, 世界, 人们 and 世界人们 are pieces that the model's wrapper takes apart; ▁语音 exists with the marker only and stays whole.
    """
    pieces = ["<unk>", "<s>", "</s>", "<SEP>", "<CLS>", "▁", *map(chr, range(0x21, 0x7F))]
    pieces += [f"<mark_{i}>" for i in range(len(pieces), 105)]  # 101 to 104 are rows that no text reaches
    pieces += [f"<0x{i:02X}>" for i in range(256)]
    pieces += list("你好世界语音人们中国，。é—")
    pieces += [a + b for a, b in MERGES]
    pieces += [f"<unused_{i}>" for i in range(len(pieces), vocab_size)]
    pieces[-1] = "龍門"  # taken apart by the wrapper although neither character has a row of its own
    assert len(pieces) == len(set(pieces)) == vocab_size, "vocab_size is too small for the tiny tokenizer"
    added = [{"id": i, "content": pieces[i], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": i < 3} for i in (0, 1, 2, vocab_size - 1)]
    template = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                         {"SpecialToken": {"id": "<s>", "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"},
                                                           {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": None,
        "post_processor": template,
        "decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                                                     {"type": "ByteFallback"}, {"type": "Fuse"},
                                                     {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
                  "vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": [f"{a} {b}" for a, b in MERGES]},
    }
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": {"add_bos_token": True, "add_eos_token": False, **names, "clean_up_tokenization_spaces": False,
                                  "legacy": True, "model_max_length": 1000000000000000019884624838656,
                                  "tokenizer_class": "LlamaTokenizerFast", "sp_model_kwargs": {},
                                  "added_tokens_decoder": {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in added}},
        "special_tokens_map.json": names,
    }


# ------------------------------------------------------------------------------------------------ adapter


def adapter_shapes(cfg, r=4, lm=PROJECTIONS, dit=PROJECTIONS, proj=True):
    """{name: shape} of lora_weights.safetensors: what enable_lm, enable_dit and enable_proj wrap for these words."""
    out = {}
    for name, shape in main_shapes(cfg).items():
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or len(shape) != 2:
            continue
        last = module.rpartition(".")[2]
        in_lm = name.startswith(("base_lm.layers", "residual_lm.")) and last in lm
        in_dit = name.startswith("feat_decoder.estimator.") and last in dit
        if in_lm or in_dit or (proj and module in ("enc_to_lm_proj", "lm_to_dit_proj", "res_to_dit_proj", "fusion_concat_proj")):
            out[f"{module}.lora_A"], out[f"{module}.lora_B"] = (r, shape[1]), (shape[0], r)
    return out


def write_adapter(folder, version, r=4, alpha=8, dropout=0.0, lm=PROJECTIONS, dit=PROJECTIONS, proj=True, base="", **overrides):
    """An adapter folder in the published format; returns its Path. B is not zero, so the adapter does something."""
    folder, cfg = Path(folder), config(version, **overrides)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: 0.5 * v for k, v in tiny.fill(adapter_shapes(cfg, r, lm, dit, proj)).items()}
    save_file(weights, folder / "lora_weights.safetensors")
    targets = ["enc_to_lm_proj", "lm_to_dit_proj", "res_to_dit_proj"] + (["fusion_concat_proj"] if version == "2" else [])
    settings = {"enable_lm": bool(lm), "enable_dit": bool(dit), "enable_proj": proj, "r": r, "alpha": alpha, "dropout": dropout,
                "target_modules_lm": list(lm), "target_modules_dit": list(dit), "target_proj_modules": targets}
    (folder / "lora_config.json").write_text(json.dumps({"base_model": str(base), "lora_config": settings}, indent=2))
    return folder
