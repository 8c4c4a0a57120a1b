"""Tiny random IndexTTS2 checkpoints in the published layout, with all the frozen models; needs neither of them nor ours.

    write(folder, variant="flat", **changes)          # "flat": hf_cache as upstream fills it; "hub": as a hub cache
    model.generate("Hello.", prompts(model))

Names and shapes are the published ones; values are tests.tiny.fill's for each name.
"""
import json
import math
import struct
from pathlib import Path

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

from tests import tiny

ROOT = Path(__file__).resolve().parent.parent

VARIANTS = ("flat",)  # what tests/test_backbones.py and tests/test_journey.py go through
FEATURES = 40  # width of w2v-BERT, whose layer 17 the features are
CODES = 64
WIDTH = 32
EMOTION = 24  # width of the emotion's resampler
STYLE = 6
MELS = 80
TEXT = " '!,-.?…ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
WORDS = ["HE", "TH", "▁THE", "IN", "ER", "LL", "▁A", "▁HELLO", "▁好", "好", "你", "XVAN4", "▁XVAN4", "▁.", "▁?", "▁,", "▁'", "▁…"]
MERGED = {"HE": -4.0, "TH": -4.1, "▁THE": -4.2, "IN": -4.3, "ER": -4.4, "LL": -4.5, "▁A": -4.6, "▁HELLO": -3.0}
EMOTIONS = [2, 3, 1, 1, 2, 1, 2, 1]


def config(**changes):
    """config.yaml. changes: values of its `gpt:` section."""
    pieces = len(vocabulary())
    gpt = dict(model_dim=WIDTH, max_mel_tokens=640, max_text_tokens=150, heads=2, use_mel_codes_as_input=True, mel_length_compression=1024,
               layers=2, number_text_tokens=pieces, number_mel_codes=CODES + 2, start_mel_token=CODES, stop_mel_token=CODES + 1,
               start_text_token=0, stop_text_token=1, train_solo_embeddings=False, condition_type="conformer_perceiver",
               condition_module=dict(output_size=16, linear_units=24, attention_heads=2, num_blocks=2, input_layer="conv2d2", perceiver_mult=2),
               emo_condition_module=dict(output_size=12, linear_units=20, attention_heads=1, num_blocks=1, input_layer="conv2d2",
                                         perceiver_mult=2))
    return {
        "dataset": {"bpe_model": "bpe.model", "sample_rate": 24000, "squeeze": False},
        "gpt": {**gpt, **changes},
        "semantic_codec": dict(codebook_size=CODES, hidden_size=FEATURES, codebook_dim=5, vocos_dim=12, vocos_intermediate_dim=28, vocos_num_layers=3),
        "s2mel": {
            "preprocess_params": {"sr": 22050, "spect_params": dict(n_fft=1024, win_length=1024, hop_length=256, n_mels=MELS, fmin=0, fmax="None")},
            "dit_type": "DiT", "reg_loss_type": "l1", "style_encoder": {"dim": STYLE},
            "length_regulator": dict(channels=12, is_discrete=False, in_channels=FEATURES, content_codebook_size=9, sampling_ratios=[1, 1, 1, 1],
                                     vector_quantize=False, n_codebooks=1, quantizer_dropout=0.0, f0_condition=False, n_f0_bins=512),
            "DiT": dict(hidden_dim=32, num_heads=2, depth=5, class_dropout_prob=0.1, block_size=8192, in_channels=MELS, style_condition=True,
                        final_layer_type="wavenet", target="mel", content_dim=12, content_codebook_size=10, content_type="discrete",
                        f0_condition=False, n_f0_bins=512, is_causal=False, long_skip_connection=True, zero_prompt_speech_token=False,
                        time_as_token=False, style_as_token=False, uvit_skip_connection=True, add_resblock_in_transformer=False),
            "wavenet": dict(hidden_dim=32, num_layers=3, kernel_size=5, dilation_rate=1, p_dropout=0.2, style_condition=True)},
        "gpt_checkpoint": "gpt.pth", "w2v_stat": "wav2vec2bert_stats.pt", "s2mel_checkpoint": "s2mel.pth", "emo_matrix": "feat2.pt",
        "spk_matrix": "feat1.pt", "emo_num": EMOTIONS, "qwen_emo_path": "qwen0.6bemo4-merge/",
        "vocoder": {"type": "bigvgan", "name": "nvidia/bigvgan_v2_22khz_80band_256x"}, "version": 2.0}


# ------------------------------------------------------------------------------------------------ shapes of gpt.pth


def conformer_shapes(prefix, m):
    C, H = m["output_size"], m["attention_heads"]
    out = {"embed.conv.0.weight": (C, 1, 3, 3), "embed.conv.0.bias": (C,), "embed.out.0.weight": (C, C * ((FEATURES - 1) // 2)),
           "embed.out.0.bias": (C,), "embed.pos_enc.pe": (1, 5000, C), "after_norm.weight": (C,), "after_norm.bias": (C,)}
    for i in range(m["num_blocks"]):
        block = {"self_attn.pos_bias_u": (H, C // H), "self_attn.pos_bias_v": (H, C // H), "self_attn.linear_pos.weight": (C, C),
                 "feed_forward.w_1.weight": (m["linear_units"], C), "feed_forward.w_1.bias": (m["linear_units"],),
                 "feed_forward.w_2.weight": (C, m["linear_units"]), "feed_forward.w_2.bias": (C,),
                 "conv_module.pointwise_conv1.weight": (2 * C, C, 1), "conv_module.pointwise_conv1.bias": (2 * C,),
                 "conv_module.depthwise_conv.weight": (C, 1, 15), "conv_module.depthwise_conv.bias": (C,),
                 "conv_module.pointwise_conv2.weight": (C, C, 1), "conv_module.pointwise_conv2.bias": (C,)}
        for name in ("q", "k", "v", "out"):
            block |= {f"self_attn.linear_{name}.weight": (C, C), f"self_attn.linear_{name}.bias": (C,)}
        for name in ("conv_module.norm", "norm_ff", "norm_mha", "norm_conv", "norm_final"):
            block |= {f"{name}.weight": (C,), f"{name}.bias": (C,)}
        out |= {f"encoders.{i}.{name}": shape for name, shape in block.items()}
    return {prefix + name: shape for name, shape in out.items()}


def resampler_shapes(prefix, m, width, latents):
    C, inner, heads = m["output_size"], int(width * m["perceiver_mult"] * 2 / 3), 64 * m["attention_heads"]
    out = {"latents": (latents, width), "proj_context.weight": (width, C), "proj_context.bias": (width,), "norm.gamma": (width,)}
    for i in range(2):
        out |= {f"layers.{i}.0.to_q.weight": (heads, width), f"layers.{i}.0.to_kv.weight": (2 * heads, width),
                f"layers.{i}.0.to_out.weight": (width, heads), f"layers.{i}.1.0.weight": (2 * inner, width), f"layers.{i}.1.0.bias": (2 * inner,),
                f"layers.{i}.1.2.weight": (width, inner), f"layers.{i}.1.2.bias": (width,)}
    return {prefix + name: shape for name, shape in out.items()}


def gpt_shapes(c):
    """{name: shape} of gpt.pth."""
    g = c["gpt"]
    D, text, mel = g["model_dim"], g["number_text_tokens"] + 1, g["number_mel_codes"]
    out = {**conformer_shapes("conditioning_encoder.", g["condition_module"]), **resampler_shapes("perceiver_encoder.", g["condition_module"], D, 32),
           "speed_emb.weight": (2, D), **conformer_shapes("emo_conditioning_encoder.", g["emo_condition_module"]),
           **resampler_shapes("emo_perceiver_encoder.", g["emo_condition_module"], EMOTION, 1),
           "text_embedding.weight": (text, D), "emo_layer.weight": (D, D), "emo_layer.bias": (D,), "emovec_layer.weight": (D, EMOTION),
           "emovec_layer.bias": (D,), "mel_embedding.weight": (mel, D), "mel_pos_embedding.emb.weight": (g["max_mel_tokens"] + 3, D),
           "text_pos_embedding.emb.weight": (g["max_text_tokens"] + 2, D), "text_head.weight": (text, D), "text_head.bias": (text,),
           "mel_head.weight": (mel, D), "mel_head.bias": (mel,)}
    for i in range(g["layers"]):
        block = {"attn.c_attn.weight": (D, 3 * D), "attn.c_attn.bias": (3 * D,), "attn.c_proj.weight": (D, D), "attn.c_proj.bias": (D,),
                 "mlp.c_fc.weight": (D, 4 * D), "mlp.c_fc.bias": (4 * D,), "mlp.c_proj.weight": (4 * D, D), "mlp.c_proj.bias": (D,)}
        for name in ("ln_1", "ln_2"):
            block |= {f"{name}.weight": (D,), f"{name}.bias": (D,)}
        out |= {f"gpt.h.{i}.{name}": shape for name, shape in block.items()}
    for name in ("gpt.ln_f", "final_norm"):
        out |= {f"{name}.weight": (D,), f"{name}.bias": (D,)}
    return out


def gpt_weights(c):
    """Of std 1/sqrt(fan in); tables of positions of sinusoids rounded to bf16, as one published file has them."""
    out = {}
    for name, w in tiny.fill(gpt_shapes(c)).items():
        if name.endswith("bias") or "pos_bias" in name:
            w = w - 1 if w.ndim == 1 else w
        if ".c_" in name and name.endswith("weight"):  # stored [in, out]: the fan in is the first axis
            w = w * (w.shape[1] / w.shape[0]) ** 0.5
        if "embedding" in name or name.startswith("speed_emb"):
            w = w * WIDTH**0.5 * 0.3
        if name.endswith(".pe"):
            w = sinusoid(*w.shape[1:])
        out[name] = w.contiguous()
    return out


def sinusoid(rows, width):
    angle = torch.arange(rows)[:, None] * torch.exp(torch.arange(0, width, 2) * -(math.log(10000.0) / width))
    table = torch.zeros(1, rows, width)
    table[0, :, 0::2], table[0, :, 1::2] = angle.sin(), angle.cos()
    return table.bfloat16().float()


# ------------------------------------------------------------------------------------------------ the other files


def vocabulary():
    """[(piece, score, type)]: unigram, the three marks first as in the published file."""
    out = [("<s>", 0.0, 3), ("</s>", 0.0, 3), ("<unk>", 0.0, 2)]
    single = [("▁" if ch == " " else ch, -6.0 - 0.01 * i, 1) for i, ch in enumerate(TEXT)]
    words = [(word, MERGED.get(word, -5.0 - 0.01 * i), 1) for i, word in enumerate(WORDS)]
    return out + single + words


def bpe_model():
    """The bytes of a SentencePiece model of type unigram."""
    def varint(n):
        out = bytearray()
        while n > 127:
            out.append(n & 127 | 128)
            n >>= 7
        return bytes(out) + bytes([n])

    def field(number, value):
        if isinstance(value, bytes):
            return varint(number << 3 | 2) + varint(len(value)) + value
        if isinstance(value, float):
            return varint(number << 3 | 5) + struct.pack("<f", value)
        return varint(number << 3) + varint(value)

    out = b""
    for piece, score, kind in vocabulary():
        out += field(1, field(1, piece.encode()) + field(2, score) + field(3, kind))
    trainer = field(3, 1) + field(4, len(vocabulary())) + field(40, 2) + field(41, 0) + field(42, 1) + field(43, (1 << 64) - 1)
    normalizer = field(1, b"identity") + field(3, 1) + field(4, 1) + field(5, 1)
    return out + field(2, trainer) + field(3, normalizer)


def golden_shapes(name):
    """{name: shape} of the tensors that a golden script made, without their dtypes."""
    with safe_open(ROOT / f"tests/golden/{name}.safetensors", "pt") as f:
        return {n: shape for n, (shape, _) in json.loads(f.metadata()["shapes"]).items()}


def s2mel_parts():
    """{part: {name: tensor}} as in s2mel.pth, the tensors that nobody uses with it."""
    shapes = golden_shapes("s2mel")
    e = "cfm.estimator."
    shapes |= {e + "x_embedder.weight_v": [32, MELS], e + "conv2.weight": [MELS, 32, 1], e + "conv2.bias": [MELS],
               e + "skip_linear.weight": [32, 32 + MELS], e + "cond_x_merge_linear.weight": [32, 2 * MELS + 32 + STYLE],
               "length_regulator.content_in_proj.weight": [12, FEATURES], "gpt_layer.0.weight": [7, WIDTH],
               "gpt_layer.2.weight": [FEATURES, 5], "gpt_layer.2.bias": [FEATURES]}
    values = tiny.fill({n: shape for n, shape in shapes.items() if not n.endswith(("input_pos", "freqs"))})
    values = {n: w - 1 if n.endswith("bias") else w for n, w in values.items()}
    values[e + "input_pos"] = torch.arange(16384)
    for name in ("t_embedder", "t_embedder2"):
        values[f"{e}{name}.freqs"] = torch.exp(-math.log(10000) * torch.arange(128) / 128)
    out = {}
    for name, w in values.items():
        part, _, rest = name.partition(".")
        out.setdefault(part, {})[rest] = w
    return out


def campplus_weights():
    shapes = golden_shapes("campplus") | {"xvector.tdnn.linear.weight": [10, 32 * MELS // 8, 5]}
    values = tiny.fill({n: shape for n, shape in shapes.items() if not n.endswith("num_batches_tracked")})
    values = {n: w - 1 if n.endswith(("bias", "running_mean")) else w / 2 if n.endswith("running_var") else w for n, w in values.items()}
    return {**values, **{n: torch.tensor(7) for n in shapes if n.endswith("num_batches_tracked")}}


VOCODER = {"resblock": "1", "upsample_rates": [8, 8, 4], "upsample_kernel_sizes": [16, 16, 8], "upsample_initial_channel": 16,
           "resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1]], "use_tanh_at_final": False, "use_bias_at_final": False,
           "activation": "snakebeta", "snake_logscale": True, "num_mels": MELS, "sampling_rate": 22050}


def bigvgan_weights():
    shapes, channels = {"conv_pre.weight_g": [16, 1, 1], "conv_pre.weight_v": [16, MELS, 7], "conv_pre.bias": [16]}, 16

    def activation(name, size):
        return {f"{name}.act.alpha": [size], f"{name}.act.beta": [size]}

    for i, kernel in enumerate(VOCODER["upsample_kernel_sizes"]):
        shapes |= {f"ups.{i}.0.weight_g": [channels, 1, 1], f"ups.{i}.0.weight_v": [channels, channels // 2, kernel],
                   f"ups.{i}.0.bias": [channels // 2]}
        channels //= 2
        for conv in ("convs1", "convs2"):
            name = f"resblocks.{i}.{conv}.0"
            shapes |= {f"{name}.weight_g": [channels, 1, 1], f"{name}.weight_v": [channels, channels, 3], f"{name}.bias": [channels]}
        shapes |= activation(f"resblocks.{i}.activations.0", channels) | activation(f"resblocks.{i}.activations.1", channels)
    shapes |= activation("activation_post", channels) | {"conv_post.weight_g": [1, 1, 1], "conv_post.weight_v": [1, channels, 7]}
    values = {n: w - 1 if n.endswith(("bias", "alpha", "beta")) else w for n, w in tiny.fill(shapes).items()}
    values["conv_post.weight_g"] *= 0.2
    half = torch.tensor([0.002029, 0.009389, -0.025543, -0.057657, 0.128573, 0.443210])
    for name in [n for n in values if n.endswith("alpha")]:
        for end in (".upsample.filter", ".downsample.lowpass.filter"):
            values[name.removesuffix(".act.alpha") + end] = torch.cat([half, half.flip(0)])[None, None]
    return values


def statistics():
    g = torch.Generator().manual_seed(5)
    return {"mean": 0.3 * torch.randn(FEATURES, generator=g), "var": 0.5 + torch.rand(FEATURES, generator=g)}


def tables():
    """(feat1, feat2): voices and emotions."""
    g = torch.Generator().manual_seed(6)
    return torch.randn(sum(EMOTIONS), STYLE, generator=g), torch.randn(sum(EMOTIONS), WIDTH, generator=g)


# ------------------------------------------------------------------------------------------------ folders


def write(folder, variant="flat", **changes):
    """A checkpoint folder with its frozen models in hf_cache; returns its Path. changes: values of config.yaml's `gpt:`."""
    folder, c = Path(folder), config(**changes)
    extras = folder / "hf_cache"
    extras.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(c, sort_keys=False))
    (folder / "bpe.model").write_bytes(bpe_model())
    torch.save(gpt_weights(c), folder / "gpt.pth")
    torch.save({"net": s2mel_parts(), "iters": 3}, folder / "s2mel.pth")
    torch.save(statistics(), folder / "wav2vec2bert_stats.pt")
    for name, values in zip(("feat1.pt", "feat2.pt"), tables()):
        torch.save(values, folder / name)
    place = {"w2v_bert": "w2v-bert-2.0", "semantic_codec": "semantic_codec_model.safetensors", "campplus": "campplus_cn_common.bin",
             "bigvgan": "bigvgan"}
    if variant == "hub":
        place = {"w2v_bert": hub("facebook/w2v-bert-2.0"), "semantic_codec": hub("amphion/MaskGCT") + "/semantic_codec/model.safetensors",
                 "campplus": hub("funasr/campplus") + "/campplus_cn_common.bin", "bigvgan": hub("nvidia/bigvgan_v2_22khz_80band_256x")}
    write_extras({key: extras / name for key, name in place.items()})
    return folder


def hub(repository):
    return f"models--{repository.replace('/', '--')}/snapshots/0123abc"


def write_extras(place):
    from tests import test_repcodec, test_w2vbert  # here: golden scripts read this file where our own packages are not

    for path in place.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    sizes = dict(features=160, width=FEATURES, inner=24, layers=18, heads=2, left=64, right=8, kernel=7)
    w2v, vocoder = place["w2v_bert"], place["bigvgan"]
    for folder in (w2v, vocoder):
        folder.mkdir(parents=True, exist_ok=True)
    values = tiny.fill(test_w2vbert.shapes(**sizes))
    save_file({n: w - 1 if n.endswith("bias") else w for n, w in values.items()}, w2v / "model.safetensors")
    settings = dict(hidden_size=FEATURES, num_hidden_layers=18, num_attention_heads=2, intermediate_size=24,
                    feature_projection_input_dim=160, conv_depthwise_kernel_size=7)
    (w2v / "config.json").write_text(json.dumps(settings))
    save_file(test_repcodec.tensors(bins=CODES, channels=FEATURES), place["semantic_codec"])
    torch.save(campplus_weights(), place["campplus"])
    (vocoder / "config.json").write_text(json.dumps(VOCODER))
    torch.save({"generator": bigvgan_weights()}, vocoder / "bigvgan_generator.pt")


# ------------------------------------------------------------------------------------------------ what tests say to it


def voice(seconds=0.8, rate=22050, seed=3):
    """A wave with all frequencies in it: resamplers differ where there is nothing."""
    g = torch.Generator().manual_seed(seed)
    n = int(seconds * rate)
    t = torch.arange(n) / rate
    return 0.2 * torch.sin(6.2832 * 200 * t) * (1 + 0.5 * torch.sin(20 * t)) + 0.1 * torch.randn(n, generator=g)


def prompts(model):
    """What every request of this backbone needs."""
    return [(None, voice(rate=model.sample_rate), None)]
