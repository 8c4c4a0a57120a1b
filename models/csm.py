"""CSM-1B: text in, Mimi codes out, one frame of K codes (80 ms) per step.

Two Llamas share the work. The backbone reads text and earlier frames and predicts codebook 0 of the next frame; the
depth decoder, a small one that starts anew in every frame, turns the backbone's state and the codes so far into the
next codebook, K - 1 times. A frame of K zeros ends the speech and is trained like any other frame: 0 is also an
ordinary code of every codebook.

    row (K + 1 ints)   0 .. K-1   K           what it is         predicted from the row before
    bos                -          128000      begin of text
    "[0]Hi."           -          ids         text, the speaker as a number in front
    eos                -          128001      end of text
    frame 1            codes      -           sum of K table rows   codebook 0 by the backbone, the others by the
    ...                                                             decoder: state, c0, c1 .. in; c1, c2 .. out
    end frame          zeros      -           after it the next turn may begin with bos

Blog: sesame.com/research/crossing_the_uncanny_valley_of_voice. Checkpoint: sesame/csm-1b, codec kyutai/mimi.

What differs from the tools that train it, on purpose:
- loss/acoustic is the mean over codebooks 1 to K-1 and over the frames that were drawn. transformers' Trainer multiplies
  it by 31 in silence (lambdas 1 and 31 do the same here), csm-mlx divides everything by 32 (1/32 and 31/32).
- Weights are half-split rotary in memory whatever the file is; the other two namings are interleaved and are permuted.
- The ids 2048 to 2050, which Mimi does not have, are not sampled (mask_special).

Letters besides the usual: N trained frames in a batch, M those of them that the depth decoder sees, S rows of text.
"""
import dataclasses
import json
import math
import re
import shutil
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from models.codecs import mimi
from models.parts import Invalid, audio, check, checkpoint, opt
from models.parts.checkpoint import Stored
from models.parts.layers import Context, Layer, LayerSize, Packing, RMSNorm, make_caches, rotary, run_layers
from models.parts.sampling import LeftPadded, Speaking, chunks, generator, takes
from models.parts.tokenizer import Tokenizer

LAMBDAS = {"loss/semantic": 1.0, "loss/acoustic": 1.0}

# ------------------------------------------------------------------------------------------------ settings


@dataclass
class TowerConfig:
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_scaling: dict | None = None  # factor, low_freq_factor, high_freq_factor, original_max_position_embeddings
    max_position_embeddings: int = 2048


@dataclass
class Config:
    """What config.json says under transformers' names; the original names only say which flavour each tower is."""

    backbone: TowerConfig
    depth_decoder_config: TowerConfig
    text_vocab_size: int
    vocab_size: int  # of one codebook, three special ids included
    num_codebooks: int
    codec_config: dict


LLAMA3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
FLAVORS = {"llama-1B": TowerConfig(2048, 8192, 16, 32, 8, 64, rope_scaling=LLAMA3),
           "llama-100M": TowerConfig(1024, 8192, 4, 8, 2, 128, rope_scaling=LLAMA3)}
TINY = Config(TowerConfig(32, 48, 2, 4, 2, 8, rope_scaling=LLAMA3, max_position_embeddings=512),
              TowerConfig(16, 40, 1, 2, 1, 8, rope_scaling=LLAMA3), 300, 19, 8, {})


def read_config(raw, shapes, where):
    """Config from config.json; widths that it does not state are read from `shapes` ({own name: shape}, {} for none)."""
    def tower(section, flavor, prefix):
        for key, known in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
            if section.get(key, known) != known:
                raise Invalid(f"{where}: {key} is {section[key]!r}; every published CSM has {known!r}, and nothing else is read")
        if flavor not in FLAVORS:
            raise Invalid(f"{where}: flavour {flavor!r} is not known; known are {', '.join(FLAVORS)}")
        base = FLAVORS[flavor]

        def value(key, name=None, axis=0):
            if section.get(key) is not None:
                return section[key]
            return shapes[name][axis] if name in shapes else getattr(base, key)

        layer = f"{prefix}.layers.0."
        heads = value("num_attention_heads")
        size = section.get("head_dim")
        if size is None and layer + "self_attn.q_proj.weight" in shapes:
            rows = shapes[layer + "self_attn.q_proj.weight"][0]
            if rows % heads:
                raise Invalid(f"{where}: {layer}self_attn.q_proj has {rows} rows, which are not {heads} heads; "
                              "config.json must state num_attention_heads and head_dim where they are not the published ones")
            size = rows // heads
        size = size or (section["hidden_size"] // heads if "hidden_size" in section else base.head_dim)
        kv = section.get("num_key_value_heads")
        if kv is None:
            k = shapes.get(layer + "self_attn.k_proj.weight")
            kv = k[0] // size if k else base.num_key_value_heads
        count = len({m[1] for n in shapes if (m := re.match(rf"{prefix}\.layers\.(\d+)\.", n))})
        theta, scaling = rope_settings(section, base, where)
        return TowerConfig(
            value("hidden_size", f"{prefix}.norm.weight"), value("intermediate_size", layer + "mlp.gate_proj.weight"),
            section.get("num_hidden_layers") or count or base.num_hidden_layers, heads, kv, size,
            value("rms_norm_eps"), theta, scaling, value("max_position_embeddings"))

    if raw.get("tie_codebooks_embeddings") is False:
        raise Invalid(f"{where}: tie_codebooks_embeddings is false; backbone and depth decoder of CSM share one audio table")
    vocab = raw.get("vocab_size") or raw.get("audio_vocab_size") or shapes.get("codebook0_head.weight", (2051,))[0]
    table = shapes.get("audio_embeddings.weight")
    return Config(
        tower(raw, raw.get("backbone_flavor", "llama-1B"), "backbone"),
        tower(raw.get("depth_decoder_config") or {}, raw.get("decoder_flavor", "llama-100M"), "decoder"),
        raw.get("text_vocab_size") or shapes.get("text_embeddings.weight", (128256,))[0], vocab,
        raw.get("num_codebooks") or raw.get("audio_num_codebooks") or (table[0] // vocab if table else 32),
        raw.get("codec_config") or {})


def rope_settings(section, base, where):
    """(theta, llama3 numbers or None) of a config section in its older or newer spelling."""
    given = section.get("rope_parameters") or section.get("rope_scaling")
    if given is None:
        return section.get("rope_theta", base.rope_theta), None if "hidden_size" in section else base.rope_scaling
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise Invalid(f"{where}: rope_type is {kind!r}; known are default and llama3")
    theta = given.get("rope_theta", section.get("rope_theta", base.rope_theta))
    missing = [k for k in LLAMA3 if kind == "llama3" and k not in given]
    if missing:
        raise Invalid(f"{where}: the rope settings lack {', '.join(missing)}")
    return theta, {k: given[k] for k in LLAMA3} if kind == "llama3" else None


@dataclass
class Training:
    """The `backbone:` section of a training config."""

    amortize: int = opt(16, "the depth decoder sees one in so many frames of each row, at least one; 1: all of them")
    context_turns: int = opt(2, "in a row with turns: how many are kept in front of the first one that is trained")
    train_on: str = opt("all", "which turns of a row count in the loss: all or last; `train: false` in a turn leaves it out, too",
                        choices=("all", "last"))
    mask_speakers: list[int | str] = opt([], "speakers whose turns are heard as context but never trained, by number or name")
    freeze: str = opt("", "with full fine-tuning: backbone (train the depth decoder only) or decoder (train all but it)",
                      choices=("", "backbone", "decoder"))

    def __post_init__(self):
        check(self, amortize=1, context_turns=0)


@dataclass
class Sampling:
    """What `generate` takes besides text, prompts, speaker and seed."""

    temperature: float = opt(0.9, "randomness of codebook 0; 0 takes the likeliest code, which tends to loop")
    top_k: int = opt(50, "sample among so many likeliest codes; 0: all")
    depth_temperature: float | None = opt(None, "randomness of the other codebooks; none: as codebook 0")
    depth_top_k: int | None = opt(None, "likeliest codes of the other codebooks; none: as codebook 0")
    mask_special: bool = opt(True, "never sample ids that the codec does not have")
    min_len: int = opt(0, "frames (80 ms) before which the speech cannot end")
    max_len: int = opt(1125, "frames at most; 1125 are 90 seconds")
    retries: int = opt(0, "tries with the next seed when a take is empty or does not end by itself")
    chunk_frames: int = opt(16, "frames per chunk of audio at most; the first chunks are 1, 2, 4 .. frames. 1: frame by frame")

    def __post_init__(self):
        check(self, temperature=0, top_k=0, depth_temperature=0, depth_top_k=0, min_len=0, max_len=1, retries=0, chunk_frames=1)


# ------------------------------------------------------------------------------------------------ modules


def frequencies(c):
    """Angular frequency of each pair, (D/2,) float32, with Llama 3's stretching of the slow ones where the config asks.

    Only original/low and original/high enter, so transformers' "equivalent" numbers give the same table to the bit.
    """
    f = 1.0 / c.rope_theta ** (torch.arange(0, c.head_dim, 2, dtype=torch.float32, device="cpu") / c.head_dim)
    if c.rope_scaling is None:
        return f
    factor, low, high, old = (c.rope_scaling[k] for k in LLAMA3)
    wave = 2 * math.pi / f
    s = (old / wave - low) / (high - low)
    stretched = torch.where(wave > old / low, f / factor, (1 - s) * f / factor + s * f)
    return torch.where(wave < old / high, f, stretched)


class Tower(nn.Module):
    """A Llama without embeddings: backbone and depth decoder. (B, L, C) -> (B, L, C), after the final norm."""

    def __init__(self, c):
        super().__init__()
        size = LayerSize(c.hidden_size, c.intermediate_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.rms_norm_eps)
        self.layers = nn.ModuleList(Layer(size) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.register_buffer("frequencies", None, persistent=False)  # make_rotary computes them, in float32 whatever the weights are
        self.config, self.recompute = c, False

    def make_rotary(self, device):
        self.frequencies = frequencies(self.config).to(device)

    def rope(self, positions):
        return rotary(positions, self.frequencies)

    def forward(self, x, context, caches=None):
        return self.norm(run_layers(self.layers, x, context, caches, self.recompute and self.training))


def pick(logits, u, temperature, top_k):
    """One id per row: logits (B, V), which are overwritten, u (B, 1) uniform in (0, 1] -> (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    if 0 < top_k < logits.shape[1]:
        logits.masked_fill_(logits < logits.topk(top_k)[0][:, -1:], -math.inf)  # ties with the k-th stay
    heap = logits.float().div_(temperature).softmax(-1).cumsum(-1)
    return torch.searchsorted(heap, u * heap[:, -1:])[:, 0]


def _speaker(turn):
    """The number that the data set gave a named speaker, or what the row says."""
    return turn.get("speaker_id", turn.get("speaker"))


def joined(*linears, scale=None, rows=None, add=False):
    """Linears that read the same input, as one function of x (N, C) and out (N, all outputs side by side, in the order
    `rows`), which is overwritten or, with `add`, added to. x is multiplied by `scale` (C,) first."""
    if any(hasattr(m, "lora_A") for m in linears):  # an adapter is on: each runs by itself
        def run(x, out):
            y = torch.cat([m(x if scale is None else x * scale) for m in linears], -1)
            y = y if rows is None else y[:, rows]
            return out.add_(y) if add else out.copy_(y)
        return run
    weight = torch.cat([m.weight for m in linears]) if len(linears) > 1 else linears[0].weight
    weight = weight if scale is None else weight * scale
    weight = (weight if rows is None else weight[rows]).T
    if len(linears) > 1 and weight.device.type == "cpu":
        weight = weight.contiguous()  # one vector times a tall matrix is faster column by column
    return lambda x, out: out.addmm_(x, weight, beta=int(add))


class DepthSteps:
    """The depth decoder position by position, as speaking runs it: K - 1 small steps for every frame, the first of two positions.

    The calls cost more than the arithmetic here, so this makes a third of those that training makes. q, k and v are one
    matrix, gate and up another, each with the weight of the norm in front of it. The pairs of q and k lie side by side
    (attention does not mind their order), so that one complex product turns all heads; it turns v by an angle of zero and
    divides q by sqrt(D). Every result has a fixed place, of which the views that a step needs are made once. The stream has
    a column more, whose square is what eps adds to the sum of squares, and seven of zeros, which keep its rows aligned.
    Rotation and attention are in float32.
    """

    def __init__(self, model, B, allowed):
        decoder, table = model.depth_decoder.model, model.backbone_model.embed_tokens.embed_audio_tokens.weight
        c, K, device = decoder.config, model.config.num_codebooks, model.device
        H, G, D, root = c.num_attention_heads, c.num_key_value_heads, c.head_dim, math.sqrt(c.hidden_size)
        order = torch.arange((H + 2 * G) * D)
        order[: (H + G) * D] = mimi.interleaved(order[: (H + G) * D], H + G)
        q, k, v = order.view(-1, D).split((H, G, G))
        order = torch.cat([q.view(G, -1, D), k[:, None], v[:, None]], 1).flatten().to(device)  # group by group: queries, key, value
        self.layers = [(joined(m.self_attn.q_proj, m.self_attn.k_proj, m.self_attn.v_proj, scale=root * m.input_layernorm.weight, rows=order),
                        joined(m.self_attn.o_proj, add=True),
                        joined(m.mlp.gate_proj, m.mlp.up_proj, scale=root * m.post_attention_layernorm.weight),
                        joined(m.mlp.down_proj, add=True)) for m in decoder.layers]
        self.project, self.scale = joined(decoder.inputs_embeds_projector), root * decoder.norm.weight
        self.allowed, self.tables = allowed, table.unflatten(0, (K, -1)).unbind()
        self.heads = model.depth_decoder.codebooks_head.weight[:, :, :allowed].unbind()
        angle = torch.arange(K)[:, None, None].float() * decoder.frequencies.cpu()
        angle = torch.cat([angle.expand(-1, H // G + 1, -1), 0 * angle], 1)  # (K, heads of a group, D / 2)
        size = torch.tensor([D**-0.5] * (H // G) + [1.0, 1.0])[:, None].expand_as(angle)
        self.ropes = torch.polar(size, angle).repeat(1, G, 1).flatten(1).to(device).unbind()  # K of (all heads * D / 2,)
        self.config, self.dtype = c, model.dtype
        self.place(torch.zeros(len(self.layers), B, G, 2, K, D, device=device))

    def place(self, cache):
        """Places for the results of a step of one position and of two. cache (layers, B, G, 2, K, D): keys and values."""
        self.cache, (_, B, G, _, K, D) = cache, cache.shape
        seen = cache.view(-1, B * G, 2, K, D)
        self.seen = [[(slot[..., j, :], old[:, 0, : j + 1].mT, old[:, 1, : j + 1]) for slot, old in zip(cache, seen)] for j in range(K)]
        self.places = {n * B: self.places_of(B, n) for n in (1, 2)}

    def places_of(self, B, n):
        """Places for n positions, one (B, ..) under the other, and views of each position's part."""
        c, device = self.config, self.cache.device
        H, G, D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        widths = c.hidden_size + 8, c.hidden_size, (H + 2 * G) * D, H * D, 2 * c.intermediate_size
        stream, normed, qkv, heard, gate_up = (torch.zeros(n * B, w, dtype=self.dtype, device=device) for w in widths)
        stream[:, -1] = math.sqrt(c.hidden_size * c.rms_norm_eps)
        turned, mixed = (qkv, heard) if self.dtype == torch.float32 else (qkv.float(), heard.float())
        parts = [(t.view(torch.complex64), t.view(B, G, -1, D)[:, :, -2:], t.view(B * G, -1, D)[:, :-2], m.view(B * G, -1, D))
                 for t, m in zip(turned.chunk(n), mixed.chunk(n))]
        return stream, stream[:, : c.hidden_size], normed, normed[-B:], qkv, turned, parts, mixed, heard, gate_up, *gate_up.chunk(2, 1)

    def keep(self, rows):
        self.place(self.cache[:, rows])

    def __call__(self, inputs, j):
        """What comes out at the last of the positions j, .. that are read, after all before them.

        inputs: states or rows of a table, (B, H) or those of two positions one under the other. -> (B, C)
        """
        exact = torch.promote_types(self.dtype, torch.float32)
        stream, x, normed, last, qkv, turned, parts, mixed, heard, gate_up, gate, up = self.places[len(inputs)]

        def norm():
            """RMSNorm without its weight and over sqrt(C)."""
            return torch.div(x, torch.linalg.vector_norm(stream, dim=1, keepdim=True, dtype=exact), out=normed)

        self.project(inputs, x)
        for i, (to_qkv, out, to_gate_up, down) in enumerate(self.layers):
            to_qkv(norm(), qkv)
            if turned is not qkv:  # in low precision
                turned.copy_(qkv)
            for n, (pairs, kv, q, y) in enumerate(parts, j):
                slot, keys, values = self.seen[n][i]
                pairs.mul_(self.ropes[n])
                slot.copy_(kv)
                torch.bmm(torch.bmm(q, keys).softmax(-1), values, out=y)
            if mixed is not heard:
                heard.copy_(mixed)
            out(heard, x)
            to_gate_up(norm(), gate_up)
            down(F.silu(gate, inplace=True).mul_(up), x)
        norm()
        return last * self.scale


class Codebooks(nn.Module):
    """The heads of codebooks 1 .. K - 1, one matrix each, used as h @ weight[j - 1]: not transposed like a Linear's."""

    def __init__(self, codebooks, width, vocab):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(codebooks - 1, width, vocab))


class CSM(nn.Module):
    backbone = "csm"
    namings = ("transformers", "original", "mlx")
    adapter_namings = {"peft": "transformers", "mlx": "mlx", "voxcpm": "mlx"}  # the last: one file, tables inside, as csm-mlx had it
    native_adapter = "peft"
    lora_dropout_after = False
    speaker_input = True
    embeddings = ("embed_text_tokens", "backbone_model.embed_tokens")  # what lora.train_embeddings trains
    # Plain suffix lists in PEFT also wrap the codec, which runs without gradients: those pairs were never trained.
    harmless_adapter_keys = (r"codec_model\..*",)
    refused_adapter_keys = {r"layers\.\d+\..*": "without the name of its tower: the trainer that wrote this file let the decoder's layers 0 to 3 "
                                                  "overwrite the backbone's, so what is left fits neither"}

    def __init__(self, config, naming="transformers", raw_config=None):
        """naming and raw_config (config.json) are of the folder that was read: what is saved is as it was."""
        super().__init__()
        c = self.config = config
        H, D, K, V = c.backbone.hidden_size, c.depth_decoder_config.hidden_size, c.num_codebooks, c.vocab_size
        # from_pretrained of nothing: an nn.Embedding's own draw imports a compiler on the meta device.
        self.embed_text_tokens = nn.Embedding.from_pretrained(torch.empty(c.text_vocab_size, H), freeze=False)
        self.backbone_model = Tower(c.backbone)
        self.backbone_model.embed_tokens = nn.Module()
        table = nn.Embedding.from_pretrained(torch.empty(K * V, H), freeze=False)  # row: code + V * codebook
        self.backbone_model.embed_tokens.embed_audio_tokens = table  # both towers read it
        self.lm_head = nn.Linear(H, V, bias=False)  # codebook 0; the published name is misleading, it is no text head
        self.depth_decoder = nn.Module()
        self.depth_decoder.model = Tower(c.depth_decoder_config)
        self.depth_decoder.model.inputs_embeds_projector = nn.Linear(H, D, bias=False)
        self.depth_decoder.codebooks_head = Codebooks(K, D, V)
        self.register_buffer("offsets", None, persistent=False)  # (K,) the first row of each codebook in the audio table
        self.naming, self.raw_config = naming, raw_config or {}
        self.speakers = dict(self.raw_config.get("speakers") or {})  # {name: number} as the training data had them
        self.max_length = c.backbone.max_position_embeddings  # positions of a row; train.py may ask for less
        self.finish = []
        self.path = self.fingerprint = ""
        self.left_unused = []
        self._frozen, self.tokenizer, self.files, self.training_options = [], None, {}, Training()
        self.sample_rate = self.out_sample_rate = 0
        self.bos = self.eos = None
        self.tokenizer_crc, self._codec_key = 0, None

    def equip(self, codec, tokenizer, files, options):
        """Give the model what does not come with its weights: codec, tokenizer, {role: path} of what `save` copies, and
        Training's options. With it, what is computed from them. `load` and `blank` call this."""
        self._frozen, self.tokenizer, self.files = [codec], tokenizer, files
        self.sample_rate = self.out_sample_rate = codec.config.sampling_rate
        self.bos, self.eos = tokenizer.id("<|begin_of_text|>"), tokenizer.id("<|end_of_text|>")
        if self.bos is None or self.eos is None:
            raise Invalid(f"{tokenizer.name} has no <|begin_of_text|> and <|end_of_text|>; it is not CSM's tokenizer")
        self.tokenizer_crc = zlib.crc32(files["tokenizer"].read_bytes()) if "tokenizer" in files else 0
        for tower in self.stacks():
            tower.make_rotary(self.device)
        self.offsets = torch.arange(self.config.num_codebooks, device=self.device) * self.config.vocab_size
        self.training_options = Training(**options)
        self.freeze()

    # ---------------------------------------------------------------------------------- data: text, audio, batches

    @property
    def codec(self):
        return self._frozen[0]  # in a list, so that it is neither trained nor saved nor cast with the model

    @property
    def device(self):
        return self.lm_head.weight.device

    @property
    def dtype(self):
        return self.lm_head.weight.dtype

    def encode_text(self, text, speaker=None):
        """Ids of bos "[speaker]text" eos; without a speaker it is 0. Markup of special tokens in the text stays plain text."""
        speaker = self.speakers.get(speaker, speaker) if isinstance(speaker, str) else 0 if speaker is None else speaker
        if isinstance(speaker, bool) or not re.fullmatch(r"\d+", str(speaker)):
            raise Invalid(f"speaker {speaker!r}: this backbone knows speakers by whole numbers, 0 and up"
                          + (f", and these names: {', '.join(self.speakers)}" if self.speakers else ""))
        if not text.strip():
            raise Invalid(f"text {text!r} is empty")
        return [self.bos, *self.tokenizer.encode(f"[{speaker}]{text}"), self.eos]

    def encode_audio(self, source, start=None, end=None):
        """Codes (K, T) int16 of a path or of (n,) samples at `sample_rate`; any length."""
        wave = source if torch.is_tensor(source) else audio.read(source, self.sample_rate, start, end)[0]
        return self.encode_audio_batch([wave])[0]

    def encode_audio_batch(self, waves):
        """What encode_audio makes of each of several clips (n,), in one pass of the codec."""
        return [codes.to("cpu", torch.int16) for codes in self.codec.encode_batch(waves)]

    def _codes(self, source, start=None, end=None):
        """(K, T) int64 codes of a path, samples (n,) or codes (K, T)."""
        if not (torch.is_tensor(source) and source.ndim == 2):
            return self.encode_audio(source, start, end).long()
        if len(source) != self.config.num_codebooks:
            raise Invalid(f"codes of {len(source)} codebooks; this model has {self.config.num_codebooks}")
        source, size = source.long().cpu(), self.config.vocab_size
        if source.numel() and not 0 <= int(source.min()) <= int(source.max()) < size:
            raise Invalid(f"codes from {int(source.min())} to {int(source.max())}; this model has 0 to {size - 1}")
        return source

    def _segment(self, text, audio, speaker, start=None, end=None):
        """(rows, mask, is audio) of one turn: its text, then, if it is spoken, its frames and the end frame."""
        ids = self.encode_text(text, speaker)
        K, S = self.config.num_codebooks, len(ids)
        codes = torch.zeros(K, 0, dtype=torch.long) if audio is None else F.pad(self._codes(audio, start, end), (0, 1))
        rows = torch.zeros(S + codes.shape[1], K + 1, dtype=torch.long)
        rows[:S, K], rows[S:, :K] = torch.tensor(ids), codes.T
        heard = torch.arange(len(rows)) >= S
        mask = heard[:, None].repeat(1, K + 1)
        mask[:, K] = ~heard
        return rows, mask, heard

    def encode(self, row):
        """{rows (L, K + 1), mask (L, K + 1), train (L,)} of a row with text and audio, or with turns, spoken in order.

        Turns in front of the first trained one are kept as far as context_turns says. A row of more than max_length
        positions loses turns behind the last trained one, then from the left, never the end of a turn.
        """
        o = self.training_options
        turns = row.get("turns") or [row]
        silent = self._silent()
        spoken = [t.get("audio") is not None for t in turns]
        if not any(spoken):
            raise Invalid("this row has no audio, so there is nothing to train")
        last = max(i for i, s in enumerate(spoken) if s)
        trained = [s and t.get("train", True) and (o.train_on == "all" or i == last)
                   and not silent & {str(t.get("speaker") or 0), str(_speaker(t) or 0)} for i, (s, t) in enumerate(zip(spoken, turns))]
        first = max(0, (trained.index(True) if any(trained) else last) - o.context_turns)
        segments = [self._segment(t.get("text") or "", t.get("audio"), _speaker(t), t.get("start"), t.get("end")) for t in turns[first:]]
        trained, room = trained[first:], self.max_length
        while sum(len(s[0]) for s in segments) > room:
            if any(trained) and not trained[-1]:  # what stands behind the last trained turn is context of nothing
                segments, trained = segments[:-1], trained[:-1]
            elif any(trained[1:]):
                segments, trained = segments[1:], trained[1:]
            else:
                break
        return {"rows": torch.cat([s[0] for s in segments]), "mask": torch.cat([s[1] for s in segments]),
                "train": torch.cat([s[2] & t for s, t in zip(segments, trained)])}

    def _silent(self):
        """Names and numbers, as texts, of the speakers that are never trained."""
        asked = set(map(str, self.training_options.mask_speakers))
        unknown = asked - self.speakers.keys() - set(map(str, self.speakers.values())) - {"0"}  # a row that names no speaker is 0
        if unknown and self.speakers:
            raise Invalid(f"backbone.mask_speakers: nobody is called {', '.join(sorted(unknown))}; the rows name "
                          + ", ".join(f"{name} ({n})" if name != str(n) else name for name, n in self.speakers.items()))
        return asked | {str(self.speakers[name]) for name in asked & self.speakers.keys()}

    def length(self, example):
        """Rows of the backbone; 0 where none of them is trained."""
        return len(example["rows"]) if example["train"].any() else 0

    def collate(self, examples, seeds=None):
        """Batch and counts. Drawn per row, from its own seed: which trained frames the depth decoder sees.

        `frames` are numbers in the list of all trained frames of the batch. seeds=None: fixed by the row's content.
        """
        B, L = len(examples), max(len(e["rows"]) for e in examples)
        rows = torch.zeros(B, L, self.config.num_codebooks + 1, dtype=torch.long)
        mask, train = torch.zeros(rows.shape, dtype=torch.bool), torch.zeros(B, L, dtype=torch.bool)
        frames, seen = [], 0
        for b, e in enumerate(examples):
            n = len(e["rows"])
            rows[b, :n], mask[b, :n], train[b, :n] = e["rows"], e["mask"], e["train"]
            count = int(e["train"].sum())
            seed = zlib.crc32(e["rows"].numpy().tobytes()) if seeds is None else seeds[b]
            drawn = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
            drawn = drawn[: max(1, count // self.training_options.amortize)].sort().values
            frames.append(seen + drawn)
            seen += count
        trained = train.flatten().nonzero().flatten()
        # The backbone reads the real rows only, each row's last one excepted: nothing is predicted from it.
        inner = mask.any(-1)
        inner[torch.arange(B), inner.sum(1) - 1] = False
        place = inner.flatten().nonzero().flatten()
        kind = mask.flatten(0, 1)[place]
        batch = {"rows": rows, "place": place, "text": kind[:, -1].nonzero().flatten(), "audio": kind[:, 0].nonzero().flatten(),
                 "trained": trained, "before": torch.searchsorted(place, trained - 1), "frames": torch.cat(frames)}
        return batch, self.counts(batch)

    def counts(self, batch):
        N, M, K = len(batch["trained"]), len(batch["frames"]), self.config.num_codebooks
        return {"loss/semantic": N, "loss/acoustic": M * (K - 1), "metric/codebook_00": N,
                **{f"metric/codebook_{k:02d}": M for k in range(1, K)}}

    # ---------------------------------------------------------------------------------- training

    def forward(self, batch):
        """Sums of the cross-entropies: codebook 0 over all trained frames, the others over the frames that were drawn."""
        B, L = batch["rows"].shape[:2]
        rows, place = batch["rows"].flatten(0, 1), batch["place"]
        x = self._embed(rows[place], batch["text"], batch["audio"])[None]  # (1, P, H), P real rows
        h = self.backbone_model(x, Context(self.backbone_model.rope(place % L), mask=Packing(place, B, L)))[0, batch["before"]]  # (N, H)
        codes = rows[batch["trained"]][:, :-1]  # (N, K)
        first = F.cross_entropy(self.lm_head(h).float(), codes[:, 0], reduction="sum")
        h, codes = h[batch["frames"]], codes[batch["frames"]]
        logits = self._depth(h, codes)
        rest = F.cross_entropy(logits.flatten(0, 1).float(), codes[:, 1:].T.flatten(), reduction="none").view(logits.shape[:2]).sum(1)
        out = {"loss/semantic": first, "loss/acoustic": rest.sum(), "metric/codebook_00": first.detach()}
        return out | {f"metric/codebook_{k:02d}": x for k, x in enumerate(rest.detach(), 1)}

    def _embed(self, rows, text, audio):
        """(P, K + 1) -> (P, H). text, audio: places of rows of that kind; all others are padding and become zero."""
        spoken = self._frames(rows[audio][:, :-1])
        x = spoken.new_zeros(len(rows), spoken.shape[1]).index_copy(0, audio, spoken)
        return x.index_copy(0, text, self.embed_text_tokens(rows[text][:, -1]).to(x.dtype))

    def _frames(self, codes):
        """(N, K) -> (N, H), the sum of a frame's table rows."""
        table = self.backbone_model.embed_tokens.embed_audio_tokens.weight
        return F.embedding_bag(codes + self.offsets, table, mode="sum").to(self.dtype)

    def _depth(self, h, codes):
        """Logits (K - 1, M, V) of codebooks 1 .. K - 1: position j reads the state, then codes 0 .. j - 1. h (M, H), codes (M, K)."""
        decoder = self.depth_decoder.model
        table = self.backbone_model.embed_tokens.embed_audio_tokens
        x = table(codes[:, :-1] + self.offsets[:-1]).to(h.dtype)  # (M, K - 1, H)
        # Projected one by one: where table and projection are frozen, autograd has nothing to keep for all but the state.
        x = torch.cat([decoder.inputs_embeds_projector(h[:, None]), decoder.inputs_embeds_projector(x)], 1)  # (M, K, D)
        rope = decoder.rope(torch.arange(x.shape[1], device=x.device))
        y = decoder(x, Context(rope, causal=True))[:, 1:]  # what stands at position 0 predicts nothing
        return torch.bmm(y.transpose(0, 1), self.depth_decoder.codebooks_head.weight)

    def sample_request(self, row):
        """What a validation sample of a row is conditioned on, besides its text."""
        tokens = len(self.encode_text(row["text"], _speaker(row)))
        return {"speaker": _speaker(row), "max_len": 25 + 4 * tokens}  # an untrained model seldom ends by itself

    @property
    def frame_rate(self):
        """Frames per second of audio."""
        return self.sample_rate / self.codec.config.frame

    def set_recompute(self, on):
        """Activation checkpointing of every layer: a fifth to a third more time for most of the activation memory."""
        for tower in self.stacks():
            tower.recompute = on

    def stacks(self):
        return [self.backbone_model, self.depth_decoder.model]

    def blocks(self):
        """The modules that torch.compile takes one by one."""
        return [m for m in self.modules() if isinstance(m, Layer)]

    def lora_targets(self, settings):
        """With no word given: attention and feed-forward of both towers."""
        for key in ("enable_lm", "enable_dit", "enable_proj"):
            if getattr(settings, key) is not None:
                raise Invalid(f"lora.{key}: this backbone is chosen by lora.target_modules: attn, mlp, q_proj, v_proj .., "
                              "codebook0_head, projection; backbone or decoder for all layers of one tower")
        return [n for n, m in self.named_modules() if isinstance(m, nn.Linear) and ".layers." in n]

    def freeze(self):
        """What training_options.freeze names keeps its weights: requires_grad of every parameter is set."""
        for name, p in self.named_parameters():
            depth = name.startswith("depth_decoder.")
            p.requires_grad = self.training_options.freeze != ("decoder" if depth else "backbone")

    # ---------------------------------------------------------------------------------- generation

    def _request(self, text, prompts=(), speaker=None, seed=None, noise=None):
        """Rows and mask of the turns so far and of the text to speak."""
        if noise is not None:
            raise Invalid("noise: this backbone samples codes and takes a seed, no noise")
        turns = []
        for said, heard, who in prompts:
            if said is None:
                raise Invalid("a voice prompt without its transcript: this backbone hears a clip as an earlier turn, so give its text")
            turns.append(self._segment(said, heard, who))
        turns.append(self._segment(text, None, speaker))
        return dict(turns=turns, seed=seed)

    def _fit(self, request, s):
        """(rows, mask, cap): old turns are dropped where prompt and speech would not fit the model."""
        turns, room = request["turns"], self.config.backbone.max_position_embeddings
        wanted = min(s.max_len, 25 + 4 * len(turns[-1][0]))  # speech takes two to four frames per token
        kept = list(turns)
        while len(kept) > 1 and sum(len(t[0]) for t in kept) + wanted > room:
            kept = kept[1:]
        rows, mask = torch.cat([t[0] for t in kept]), torch.cat([t[1] for t in kept])
        cap = min(s.max_len, room - len(rows))
        if cap < 1:
            raise Invalid(f"the text takes {len(rows)} positions and max_len is {s.max_len}; the model has {room} positions")
        if len(kept) < len(turns):
            warnings.warn(f"{len(turns) - len(kept)} of {len(turns) - 1} earlier turns were left out: the model has {room} positions")
        return rows, mask, cap

    @torch.no_grad()
    def _run(self, requests, s):
        """Yields (i, frame (K,)) of every request, one backbone step for all that still speak; sets self.finish.

        Between two frames the host waits once, for the frame itself; within a frame it never does.
        """
        c, device = self.config, self.device
        prompts = [self._fit(r, s) for r in requests]
        caps = [cap for _, _, cap in prompts]
        K, most = c.num_codebooks, c.backbone.max_position_embeddings
        batch, speaking = LeftPadded([len(rows) for rows, _, _ in prompts], max(caps), device), Speaking(caps)
        self.finish = speaking.finish  # of this run, should another begin before it ends
        # All numbers at once and always as many, so that no cap changes a draw; in (0, 1], for 0 would hit an id of probability 0.
        draws = torch.stack([torch.empty(most, K).uniform_(generator=generator(r["seed"])) for r in requests])
        draws = 1 - draws[:, : max(caps)].to(device)
        rows, mask = batch.stack([rows for rows, _, _ in prompts]), batch.stack([mask for _, mask, _ in prompts])
        text, audio = (mask.flatten(0, 1)[:, k].nonzero().flatten().to(device) for k in (K, 0))
        allowed = min(c.vocab_size, self.codec.config.codebook_size) if s.mask_special else c.vocab_size
        x = self._embed(rows.flatten(0, 1).to(device), text, audio).view(len(rows), batch.width, -1)
        caches, steps = make_caches(self.backbone_model.layers, len(rows), batch.columns, x), DepthSteps(self, len(rows), allowed)
        h = self._read(x, batch.prompt(), caches)

        for n in range(max(caps)):
            frame = self._frame(h, draws[:, n], s, n, steps)  # (B, K)
            shown = frame.cpu().clone()  # outside of inference mode, so that a caller may train on it
            ended, requests = ~shown.numpy().any(1), speaking.requests
            left = speaking.after(n, ended)
            yield from ((i, shown[k]) for k, i in enumerate(requests) if not ended[k])
            if not speaking.requests:
                break
            if left is not None:
                keep = torch.tensor(left, device=device)
                frame, draws = frame[keep], draws[keep]
                for part in [batch, steps, *caches]:
                    part.keep(keep)
            h = self._step(frame, batch.step(n), caches)
        self.finish = speaking.finish

    def _read(self, x, place, caches):
        """Embedded positions (B, L, H) go in at their place, the state that predicts the next comes out (B, H)."""
        rope = self.backbone_model.rope(place.positions)
        return self.backbone_model(x, Context(rope, mask=place.mask, column=place.column), caches)[:, -1]

    @torch.inference_mode()
    def _step(self, frame, place, caches):
        """The newest frame (B, K) goes in, the state that predicts the next comes out (B, H)."""
        return self._read(self._frames(frame)[:, None], place, caches)

    @torch.inference_mode()  # a quarter less time than no_grad: most of it goes into calls
    def _frame(self, h, u, s, n, steps):
        """One frame (B, K) from the backbone's state (B, H) and numbers (B, K), uniform in (0, 1]."""
        depth = s.temperature if s.depth_temperature is None else s.depth_temperature, s.top_k if s.depth_top_k is None else s.depth_top_k
        logits = self.lm_head(h)[:, : steps.allowed]
        if n < s.min_len:
            logits = logits.index_fill(1, torch.zeros(1, dtype=torch.long, device=h.device), -math.inf)  # the end frame begins with 0
        u = u.split(1, 1)
        codes = [pick(logits, u[0], s.temperature, s.top_k)]
        for j in range(1, self.config.num_codebooks):
            x = steps.tables[j - 1].index_select(0, codes[-1]).to(h.dtype)
            y = steps(x, j) if j > 1 else steps(torch.cat([h, x]), 0)
            codes.append(pick(y @ steps.heads[j - 1], u[j], *depth))
        return torch.stack(codes, 1)

    def _takes(self, requests, s):
        """_run, and again with the next seed for requests whose take was empty or met its cap."""
        return takes(self, requests, s, lambda request, frames, finish: finish == "cap" or not frames)

    def frames(self, text, prompts=(), speaker=None, seed=None, noise=None, **sampling):
        """Frames (K,) int64, one by one, without the end frame; self.finish is then ["end"] or ["cap"]."""
        s = Sampling(**sampling)
        for _, frame in self._takes([self._request(text, prompts, speaker, seed, noise)], s):
            yield frame

    def generate(self, text, prompts=(), speaker=None, seed=None, noise=None, **sampling):
        """Audio in chunks (n,) at `out_sample_rate`; joined they are the whole."""
        for _, chunk in self.generate_batch([dict(text=text, prompts=prompts, speaker=speaker, seed=seed, noise=noise)], **sampling):
            yield chunk

    @torch.no_grad()
    def generate_batch(self, requests, **sampling):
        """Yields (i, chunk), the chunks of a request of 1, 2, 4 .. chunk_frames frames."""
        s = Sampling(**sampling)
        requests = [self._request(**r) for r in requests]
        codec, silent = self.codec.to(self.device), set(range(len(requests)))
        streams = [codec.stream() for _ in requests]
        for i, chunk in chunks(self._takes(requests, s), streams, lambda frames: torch.stack(frames, 1), s.chunk_frames):
            silent.discard(i)
            yield i, chunk
        for i in sorted(silent):
            warnings.warn(f"request {i}: the first frame was the end, so there is only silence; try another seed, or retries")
            yield i, torch.zeros(codec.config.frame)

    # ---------------------------------------------------------------------------------- names and files

    def published_name(self, parameter, naming=None):
        """The name of a parameter in a published file; the shared audio table has a second one in transformers'."""
        return renamed(parameter, naming or self.naming)

    def published_copies(self, parameter, naming=None):
        """Further names of the same tensor in that naming."""
        return TIED[1:] if (naming or self.naming) == "transformers" and parameter == TIED[0] else ()

    def adapter_words(self, modules, values):
        """lora_config.json of the single-file form."""
        return {**values, "target_modules": sorted({renamed(m + ".weight", "mlx").split(".")[-2] for m in modules})}

    def published_rows(self, parameter, naming=None):
        """Row order of the published weight (published = ours[rows]), None where it is ours."""
        return pair_order(self.config, parameter) if (naming or self.naming) != "transformers" else None

    def published_state_dict(self, naming=None, merged=False):
        """{published name: tensor}. merged adds the adapters, tensor by tensor, in float32. transformers' holds the codec, too."""
        naming, out = naming or self.naming, {}
        for name, w in checkpoint.weights(self, merged).items():
            rows = self.published_rows(name, naming)
            out[self.published_name(name, naming)] = w if rows is None else w[rows.to(w.device)]
        if naming == "transformers":
            out[TIED[1]] = out[TIED[0]].clone()  # a copy: safetensors refuses two names for one memory
            out |= {f"codec_model.{n}": w for n, w in mimi.published(self.codec).items()}
        return out

    def save(self, folder, naming=None, merged=False):
        """Write a folder in a published layout: weights, config.json, the tokenizer's files, and the codec."""
        naming = naming or self.naming
        if naming not in self.namings:
            raise Invalid(f"naming {naming!r}: known are {', '.join(self.namings)}")
        if not merged and any(".lora_" in n for n, _ in self.named_parameters()):
            raise Invalid("the model has adapters on: save(merged=True) adds them to the weights, lora.save_lora_weights keeps them apart")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.save_tensors(folder / ("ckpt.safetensors" if naming == "mlx" else "model.safetensors"),
                                self.published_state_dict(naming, merged))
        if naming != "transformers":  # upstream keeps the codec elsewhere; here the folder is whole
            k = self.codec.config
            checkpoint.save_tensors(folder / CODEC_FILE, mimi.published(
                self.codec, "moshi" if k.kv_width == k.num_attention_heads * k.head_dim else "transformers"))  # moshi knows no groups of heads
        text = json.dumps(self._published_config(), indent=2) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")
        for path in self.files.values():
            if path.parent.resolve() != folder.resolve():
                shutil.copyfile(path, folder / path.name)
        return folder

    def _published_config(self):
        """config.json with both vocabularies of fields, as sesame/csm-1b has it: what was read, completed from what is known."""
        c, raw = self.config, dict(self.raw_config)

        def tower(t, given, **more):
            known = {k: v for k, v in dataclasses.asdict(t).items() if k not in ("rope_theta", "rope_scaling")}
            if "rope_parameters" not in given and "rope_scaling" not in given:
                known["rope_parameters"] = rope_block(t)
            return {**known, **more, **given}

        raw.pop("transformers_weights", None)  # the published folder's pointer to shards; here the default name is used
        depth = tower(c.depth_decoder_config, raw.get("depth_decoder_config") or {}, model_type="csm_depth_decoder_model",
                      num_codebooks=c.num_codebooks, vocab_size=c.vocab_size, backbone_hidden_size=c.backbone.hidden_size)
        raw = tower(c.backbone, raw, model_type="csm", architectures=["CsmForConditionalGeneration"], num_codebooks=c.num_codebooks,
                    vocab_size=c.vocab_size, text_vocab_size=c.text_vocab_size, bos_token_id=self.bos, tie_codebooks_embeddings=True,
                    **{k: self.tokenizer.id(t) for k, t in AUDIO_TOKENS.items() if self.tokenizer.id(t) is not None},
                    codebook_eos_token_id=0, codebook_pad_token_id=c.vocab_size - 1, audio_vocab_size=c.vocab_size,
                    audio_num_codebooks=c.num_codebooks, backbone_flavor="llama-1B", decoder_flavor="llama-100M")
        if self.speakers:  # nobody else reads this key
            raw["speakers"] = self.speakers
        return {**raw, "depth_decoder_config": depth, "codec_config": {**(raw.get("codec_config") or {}), **mimi.settings_of(self.codec.config)}}

    @property
    def codec_key(self):
        """Names the frozen codec and how it is used: cached codes with another key are of another codec."""
        if self._codec_key is None:
            self._codec_key = f"mimi-{self.codec.fingerprint()}-{self.config.num_codebooks}"
        return self._codec_key

    @property
    def encode_key(self):
        """Names everything else that `encode` reads."""
        o = self.training_options
        told = self.tokenizer_crc, self.bos, self.eos, self.max_length, o.context_turns, o.train_on, sorted(self._silent())
        return f"{self.codec_key}-{zlib.crc32(repr(told).encode()):08x}"


# ------------------------------------------------------------------------------------------------ files

COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "preprocessor_config.json",
              "processor_config.json", "chat_template.jinja")
CODEC_FILE = "tokenizer-e351c8d8-checkpoint125.safetensors"  # the name it has at kyutai/moshiko-pytorch-bf16
AUDIO_TOKENS = {"audio_token_id": "<|AUDIO|>", "audio_eos_token_id": "<|audio_eos|>", "pad_token_id": "<|AUDIO|>"}
TIED = ("backbone_model.embed_tokens.embed_audio_tokens.weight", "depth_decoder.model.embed_tokens.weight")

# Ours are transformers' names. (ours, original, mlx); a pair that is a prefix ends in a dot.
NAMES = (
    ("backbone_model.layers.", "backbone.layers.", "backbone.layers."),
    ("depth_decoder.model.layers.", "decoder.layers.", "decoder.layers."),
    ("backbone_model.norm.weight", "backbone.norm.scale", "backbone.norm.weight"),
    ("depth_decoder.model.norm.weight", "decoder.norm.scale", "decoder.norm.weight"),
    ("embed_text_tokens.", "text_embeddings.", "text_embeddings."),
    ("backbone_model.embed_tokens.embed_audio_tokens.", "audio_embeddings.", "audio_embeddings."),
    ("depth_decoder.model.inputs_embeds_projector.", "projection.", "projection."),
    ("lm_head.", "codebook0_head.", "codebook0_head."),
    ("depth_decoder.codebooks_head.weight", "audio_head", "audio_head"),
)
LEAVES = ((".self_attn.o_proj.", ".attn.output_proj."), (".self_attn.", ".attn."), (".mlp.gate_proj.", ".mlp.w1."),
          (".mlp.down_proj.", ".mlp.w2."), (".mlp.up_proj.", ".mlp.w3."), (".input_layernorm.weight", ".sa_norm.scale"),
          (".post_attention_layernorm.weight", ".mlp_norm.scale"))


def renamed(name, naming, back=False):
    """Our name in another naming, or with `back` the other way round; a name that is in no table stays what it is."""
    if naming == "transformers":
        return name
    column = {"original": 1, "mlx": 2}[naming]
    for entry in NAMES:
        old, new = (entry[column], entry[0]) if back else (entry[0], entry[column])
        if name.startswith(old):
            name = new + name[len(old):]
            break
    for own, theirs in LEAVES if naming == "original" else ():
        name = name.replace(*((theirs, own) if back else (own, theirs)))
    return name


def naming_of(names):
    """Which of the three namings these tensor names are, told by them alone; None for none."""
    if any(n.startswith("backbone_model.layers.") for n in names):
        return "transformers"
    if any(n.startswith("backbone.layers.") and ".attn." in n for n in names):
        return "original"
    return "mlx" if any(n.startswith("backbone.layers.") and ".self_attn." in n for n in names) else None


def pair_order(config, name):
    """Where the interleaved namings take the rows of a q or k weight from, None for every other parameter."""
    m = re.fullmatch(r"(backbone_model|depth_decoder\.model)\.layers\.\d+\.self_attn\.([qk])_proj\.weight", name)
    if not m:
        return None
    c = config.backbone if m[1] == "backbone_model" else config.depth_decoder_config
    heads = c.num_attention_heads if m[2] == "q" else c.num_key_value_heads
    return mimi.interleaved(torch.arange(heads * c.head_dim), heads)


def rope_block(c):
    """rope_parameters for transformers, in which the old context may not exceed the positions: equal numbers, other scale."""
    if c.rope_scaling is None:
        return {"rope_type": "default", "rope_theta": c.rope_theta}
    s, shrink = dict(c.rope_scaling), 1
    while s["original_max_position_embeddings"] / shrink >= c.max_position_embeddings:
        shrink *= 2
    for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"):
        s[key] = type(c.rope_scaling[key])(s[key] / shrink)
    return {"rope_type": "llama3", "rope_theta": c.rope_theta, **s}


def recognizes(config):
    names = config.get("tensors", ())
    if names:
        return naming_of(names) is not None and any(n in names for n in ("audio_head", "depth_decoder.codebooks_head.weight"))
    return (config.get("model_type") == "csm" and "depth_decoder_config" in config) or {"backbone_flavor", "decoder_flavor"} <= set(config)


def load(folder, device="cpu", dtype=torch.float32, options=None, extra=None, weights=None, allow_unused=False):
    """The model in eval mode from a published folder or file. extra: paths of codec and tokenizer kept elsewhere.

    weights picks a naming or a file where several lie side by side; "scratch" draws the weights of what config.json says.
    """
    path, extra = Path(folder), extra or {}
    folder = path if path.is_dir() else path.parent
    raw = checkpoint.read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    where = str(folder / "config.json")
    if weights == "scratch":
        stored, naming, source = {}, "original" if "backbone_flavor" in raw and "hidden_size" not in raw else "transformers", path
    else:
        source, stored, naming = _find_weights(path, weights)
    parts = {n.removeprefix("codec_model."): stored.pop(n) for n in list(stored) if n.startswith("codec_model.")}
    if naming != "transformers":  # mlx files that were saved while wrapped have one level more
        stored = {renamed(n.replace(".linear.weight", ".weight"), naming, back=True): t for n, t in stored.items()}
    tied = [stored[n] for n in TIED if n in stored]
    if len(tied) == 2 and not torch.equal(tied[0].load(), tied[1].load()):
        raise Invalid(f"{source}: {TIED[0]} and {TIED[1]} differ, but the two towers share one table; were they trained apart?")
    if tied:
        stored = {n: t for n, t in stored.items() if n not in TIED} | {TIED[0]: tied[0]}
    config = read_config(raw, {renamed(n, "mlx"): t.shape for n, t in stored.items()}, where)
    if naming != "transformers":
        stored = {n: t if (rows := pair_order(config, n)) is None else _half_split(t, rows) for n, t in stored.items()}
    with torch.device("meta"):
        model = CSM(config, naming, raw)
    if weights == "scratch":
        model.to_empty(device="cpu")
        draw(model)
        model.to(device, dtype)
    else:
        model.left_unused = checkpoint.fill(model, stored, dtype=dtype, device=device, allow_unused=allow_unused, what=str(source))
    tokenizer = Path(extra.get("tokenizer") or folder / "tokenizer.json")
    tokenizer = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
    if not tokenizer.is_file():
        raise Invalid(f"no tokenizer.json at {tokenizer}; it lies in sesame/csm-1b, or put Llama 3.2's into the folder (in Python: extra={{'tokenizer': path}})")
    files = {"tokenizer": tokenizer, **{n: folder / n for n in COMPANIONS if (folder / n).is_file()}}
    model.equip(_load_codec(folder, extra.get("codec"), parts, config), Tokenizer(tokenizer), files, options or {})
    return model.eval()


def _half_split(tensor, rows):
    def load():
        out = torch.empty_like(w := tensor.load())
        out[rows] = w
        return out
    return Stored(tensor.shape, tensor.dtype, load)


def _find_weights(path, wanted):
    """(file, {published name: Stored}, naming): the file given, or the first in the folder that holds a CSM of the wanted naming."""
    if path.is_dir() and wanted and (path / wanted).is_file():
        path = path / wanted
    names = ("model.safetensors.index.json", "model.safetensors", "transformers.safetensors.index.json", "ckpt.safetensors", "ckpt.pt")
    files = [path] if path.is_file() else [path / n for n in names if (path / n).is_file()]
    seen = []
    for file in files:
        stored = checkpoint.read(file)
        naming = naming_of(stored)
        if naming and wanted in (None, naming, file.name):
            return file, stored, naming
        seen.append(f"{file.name} ({naming or 'no CSM'})")
    raise Invalid(f"{path}: no CSM weights" + (f" in naming {wanted!r}" if wanted else "") + f"; looked for {', '.join(names)}"
                  + (f", found {', '.join(seen)}" if seen else ""))


def _load_codec(folder, given, parts, config):
    """Mimi from `given` (file or folder), from the model's own file, or from a file beside it."""
    K = config.num_codebooks
    if given is None and parts:
        return mimi.load(parts, config.codec_config, K, what=f"the codec in {folder}")
    if given is not None and not Path(given).exists():
        raise Invalid(f"the codec: nothing at {given}")
    place = Path(given) if given is not None else folder
    files = [place] if place.is_file() else [*sorted(place.glob("tokenizer-*.safetensors")), *sorted(place.glob("mimi*.safetensors")),
                                             *sorted(place.glob("*.index.json")), *sorted(place.glob("*.safetensors"))]
    for file in files:
        stored = checkpoint.read(file)
        inside = {n.removeprefix("codec_model."): t for n, t in stored.items() if n.startswith("codec_model.")}
        stored = inside or stored
        if mimi.naming_of(stored):
            settings = config.codec_config
            if given is not None and (file.parent / "config.json").is_file() and not inside:
                beside = checkpoint.read_json(file.parent / "config.json")
                settings = beside.get("codec_config", beside if beside.get("model_type") == "mimi" else {})
            return mimi.load(stored, settings, K, what=str(file))
    raise Invalid(f"{place} holds no Mimi codec. It comes with transformers' files of sesame/csm-1b (codec_model.*), as kyutai/mimi, or as "
                  f"{CODEC_FILE} of kyutai/moshiko-pytorch-bf16; put it into the folder (in Python: extra={{'codec': path}})")


def draw(model):
    """Random weights; upstream's own start is not known, this is transformers': normal 0.02, norms one."""
    for name, p in model.named_parameters():
        nn.init.ones_(p) if name.endswith("norm.weight") else nn.init.normal_(p, std=0.02)


# ------------------------------------------------------------------------------------------------ shapes for measuring

# backbone: width, feed-forward, layers, heads, groups; decoder: the same; head sizes; text vocabulary; of the codec: filters, width, layers
SHAPES = {"tiny": ((64, 128, 2, 4, 2), (32, 64, 1, 2, 1), (16, 16), 300, (4, 32, 1)),
          "mid": ((512, 2048, 6, 8, 2), (256, 1024, 2, 4, 1), (64, 64), 4096, (16, 128, 8)),
          "real": ((2048, 8192, 16, 32, 8), (1024, 8192, 4, 8, 2), (64, 128), 128256, (64, 512, 8))}


def shape(size, version=""):
    """(Config, Config of the codec) in the published size, or smaller in nearly the same proportions; there is one version."""
    if version:
        raise Invalid(f"version {version!r}: there is only one CSM; leave version out")
    backbone, decoder, heads, text, (filters, width, layers) = SHAPES[size]
    towers = [TowerConfig(*t, size, rope_scaling=LLAMA3) for t, size in zip((backbone, decoder), heads)]
    codec = mimi.Config(channels=[filters, 2 * filters, 4 * filters, 8 * filters], ratios=[4, 5, 6, 8], compress=2, residual_layers=1,
                        kernels=(7, 3, 3), hidden=width, ffn=4 * width, layers=layers, kv_width=width, stride=2, upsample_groups=width,
                        codebook_size=2048, codebook_dim=width // 2, projected=True, semantic=1, acoustic=31,
                        num_attention_heads=max(2, width // 64), head_dim=min(64, width // 2))
    return Config(*towers, text, 2051, 32, {}), codec


def blank(size, version, device, dtype, options=None):
    """A model of a known shape with drawn weights and a tokenizer of single letters, for measuring only. options: Training's."""
    config, codec = shape(size, version)
    with torch.device("meta"):
        model = CSM(config)
    model.to_empty(device=device)
    draw(model)
    model.to(dtype)
    vocab = {p: i for i, p in enumerate(["<unk>", "<|begin_of_text|>", "<|end_of_text|>", *"[]0abcdefghijklmnopqrstuvwxyz "])}
    tokenizer = Tokenizer({"model": {"type": "BPE", "vocab": vocab, "merges": [], "unk_token": "<unk>"}})
    model.equip(mimi.blank(codec), tokenizer, {}, options or {})
    return model.eval()
