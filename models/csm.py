"""CSM-1B: text in, Mimi codes out, one frame of K codes (80 ms) per step.

Two Llamas share the work. The backbone reads text and earlier frames and predicts codebook 0 of the next
frame; the depth decoder, a small one that starts anew in every frame, turns the backbone's state and the
codes so far into the next codebook, K - 1 times. A frame of K zeros ends the speech and is trained like any
other frame: 0 is also an ordinary code of every codebook.

    row (K + 1 ints)   0 .. K-1   K         what it is         predicted from the row before
    bos                -          128000    begin of text
    "[0]Hi."           -          ids       text, the speaker as a number in front
    eos                -          128001    end of text
    frame 1            codes      -         K table rows       codebook 0 by the backbone, the others by the
    ...                                     summed             decoder: state, c0, c1 .. in; c1, c2 .. out
    end frame          zeros      -         after it the next turn may begin with bos

Blog: sesame.com/research/crossing_the_uncanny_valley_of_voice. Checkpoint: sesame/csm-1b, codec kyutai/mimi.
Others of the same class are read, too: MisoLabs/MisoTTS (8B), whose file comes alone, without a config.json.

What differs from the tools that train it, on purpose:
- loss/acoustic is the mean over codebooks 1 to K-1 and over the frames that were drawn. transformers' Trainer
  multiplies it by 31 in silence (lambdas 1 and 31 do the same here), csm-mlx divides everything by 32 (1/32
  and 31/32).
- Weights are half-split rotary in memory whatever the file is; the other two namings are interleaved and are
  permuted.
- The ids 2048 to 2050, which Mimi does not have, are not sampled (mask_special).

Letters besides the usual: N trained frames in a batch, M those of them that the depth decoder sees, S rows of
text.
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
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from models.codecs import mimi
from models.parts import Invalid, audio, check, checkpoint, opt, slots
from models.parts.checkpoint import Stored
from models.parts.depth_steps import DepthSteps
from models.parts.layers import Context, Layer, LayerSize, Packing, RMSNorm, make_caches, rotary, run_layers
from models.parts.plain import (LARGEST, as_record, checked, layers, need, read_object, shown,
                                written)
from models.parts.rope import LLAMA3, llama3_frequencies, rope_settings
from models.parts.sampling import LeftPadded, Speaking, chunks, generator, takes
from models.parts.textfiles import refuse_blank
from models.parts.tokenizer import Tokenizer

LAMBDAS = {"loss/semantic": 1.0, "loss/acoustic": 1.0}
PARTS = {"codec": "", "tokenizer": ""}  # what may lie elsewhere; as published both come with the weights
# frames: speech takes two to four per token of text, and a short word has a tail
LEAST_ROOM, ROOM_PER_TOKEN = 25, 4

# -------------------------------------------------------------------------------------------- settings


@dataclass
class TowerConfig:
    """Numbers of one of the two Llamas, under transformers' names."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int = layers()
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_scaling: dict | None = None  # the four numbers of LLAMA3
    max_position_embeddings: int = 2048


@dataclass
class Config:
    """What config.json says under transformers' names; the original ones only name each tower's flavour."""

    backbone: TowerConfig
    depth_decoder_config: TowerConfig
    text_vocab_size: int
    vocab_size: int  # of one codebook, three special ids included
    num_codebooks: int
    codec_config: dict
    speaker_blank: bool = False  # "[0] Hi." in place of "[0]Hi."


FLAVORS = {
    "llama-1B": TowerConfig(2048, 8192, 16, 32, 8, 64, rope_scaling=LLAMA3),
    "llama-100M": TowerConfig(1024, 8192, 4, 8, 2, 128, rope_scaling=LLAMA3),
    "llama-8B": TowerConfig(4096, 14336, 32, 32, 8, 128, rope_scaling=LLAMA3),
    "llama-300M": TowerConfig(1536, 6912, 8, 24, 6, 64, rope_scaling=LLAMA3),
}
USUAL = {"backbone": "llama-1B", "decoder": "llama-100M"}
WITH_BLANK = "llama-8B"  # the backbone that was trained with a blank behind the speaker
TINY = Config(
    backbone=TowerConfig(32, 48, 2, 4, 2, 8, rope_scaling=LLAMA3, max_position_embeddings=512),
    depth_decoder_config=TowerConfig(16, 40, 1, 2, 1, 8, rope_scaling=LLAMA3),
    text_vocab_size=300, vocab_size=19, num_codebooks=8, codec_config={})
FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}  # in every published CSM


def read_config(raw, shapes, where):
    """Config of the dictionary in config.json; widths that it does not state are read off the weights.

    shapes: {name in the mlx naming: shape}, {} where nothing is known. where: what errors call the file.
    """
    raw = checked(Config, as_record(raw, where))
    if raw.get("tie_codebooks_embeddings") is False:
        raise Invalid(f"{where}: tie_codebooks_embeddings is false; "
                      "backbone and depth decoder of CSM share one audio table")
    towers = []
    for prefix, section in (("backbone", raw), ("decoder", need(raw, "depth_decoder_config", dict, {}))):
        base = base_of(section, raw.get(f"{prefix}_flavor"), shapes, prefix, where)
        towers.append(read_tower(section, base, shapes, prefix, where))
    backbone, decoder = towers

    def rows(name, default):
        return shapes.get(name, (default,))[0]

    def number(name, default):
        return need(raw, name, int, default, at_least=1, at_most=LARGEST)

    vocab = raw.get("vocab_size") or number("audio_vocab_size", rows("codebook0_head.weight", 2051))
    codebooks = rows("audio_embeddings.weight", 32 * vocab) // vocab
    return Config(
        backbone, decoder,
        text_vocab_size=raw.get("text_vocab_size") or rows("text_embeddings.weight", 128256),
        vocab_size=vocab,
        num_codebooks=raw.get("num_codebooks") or number("audio_num_codebooks", codebooks),
        codec_config=raw.get("codec_config") or {},
        speaker_blank=(raw.get("backbone_flavor") or flavor_of(backbone)) == WITH_BLANK)


def flavor(name, where):
    """The published tower of a name in the original config.json."""
    if not isinstance(name, str) or name not in FLAVORS:
        raise Invalid(f"{where}: flavour {shown(repr(name))} is not known; known are {', '.join(FLAVORS)}")
    return FLAVORS[name]


def flavor_of(tower):
    """The name of the published tower that has these sizes; None if it is another one."""
    def sizes(t):
        return (t.hidden_size, t.intermediate_size, t.num_hidden_layers,
                t.num_attention_heads, t.num_key_value_heads, t.head_dim)

    return next((name for name, t in FLAVORS.items() if sizes(t) == sizes(tower)), None)


def base_of(section, name, shapes, prefix, where):
    """The published tower that lends a section of config.json what it does not say: by its name, else by the
    tensors, else the usual one.

    Tensors show widths, not numbers of heads: where no published widths are found, several flavours may fit.
    """
    layer = f"{prefix}.layers.0.self_attn."
    names = f"{prefix}.norm.weight", layer + "q_proj.weight", layer + "k_proj.weight"
    if section.get("num_attention_heads") is None and all(n in shapes for n in names):
        width, queries, keys = (shapes[n][0] for n in names)
        seen = f"its tensors ({width} wide, {queries} rows of q, {keys} of k)"
        fits = fitting(width, queries, keys)
        exact = fits[0] if len(fits) == 1 else None
        if name is None and exact is None:
            found = " and ".join(fits) or "none"
            raise Invalid(f"{where} does not say {prefix}_flavor, and {seen} fit the heads of {found}. Write "
                          "a config.json there with backbone_flavor and decoder_flavor; known are "
                          f"{', '.join(FLAVORS)}.")
        published = exact and FLAVORS[exact].hidden_size == width
        if name in FLAVORS and published and exact != name:
            raise Invalid(f"{where}: {prefix}_flavor is {name}, but {seen} are those of {exact}")
        name = name or exact
    return flavor(name or USUAL[prefix], where)


def fitting(width, queries, keys):
    """Names of flavours with these numbers of rows: the one of all these sizes, else those whose heads fit,
    one for each number of heads."""
    fits = {}  # {(heads, groups): flavour}
    for name, t in FLAVORS.items():
        heads, groups = t.num_attention_heads, t.num_key_value_heads
        if (width, queries, keys) == (t.hidden_size, heads * t.head_dim, groups * t.head_dim):
            return [name]
        size = queries // heads
        if (queries, keys) == (heads * size, groups * size):
            fits.setdefault((heads, groups), name)
    return list(fits.values())


def read_tower(section, base, shapes, prefix, where):
    """TowerConfig of a section of config.json: as stated, else as the shapes say, else as `base` has it."""
    checked(TowerConfig, section)
    for key, value in FIXED.items():
        if section.get(key, value) != value:
            found = shown(written(section[key]))
            raise Invalid(f"{where}: {key} is {found}; every published CSM has {value!r}, "
                          "and nothing else is read")
    layer = f"{prefix}.layers.0."
    query_shape = shapes.get(layer + "self_attn.q_proj.weight")
    key_shape = shapes.get(layer + "self_attn.k_proj.weight")

    def stated(key, name=None):
        if section.get(key) is not None:
            return section[key]
        return shapes[name][0] if name in shapes else getattr(base, key)

    heads = stated("num_attention_heads")
    size = section.get("head_dim") or head_size(section, base, query_shape, heads)
    if size is None:
        raise Invalid(f"{where}: {layer}self_attn.q_proj has {query_shape[0]} rows, which are not {heads} "
                      "heads; config.json must state num_attention_heads and head_dim where they are not the "
                      "published ones")
    groups = section.get("num_key_value_heads")
    if groups is None:
        groups = key_shape[0] // size if key_shape else base.num_key_value_heads
    numbers = {m[1] for name in shapes if (m := re.match(rf"{prefix}\.layers\.(\d+)\.", name))}
    theta, scaling = rope_settings(section, base.rope_theta, base.rope_scaling, where)
    return TowerConfig(
        hidden_size=stated("hidden_size", f"{prefix}.norm.weight"),
        intermediate_size=stated("intermediate_size", layer + "mlp.gate_proj.weight"),
        num_hidden_layers=section.get("num_hidden_layers") or len(numbers) or base.num_hidden_layers,
        num_attention_heads=heads, num_key_value_heads=groups, head_dim=size,
        rms_norm_eps=stated("rms_norm_eps"), rope_theta=theta, rope_scaling=scaling,
        max_position_embeddings=stated("max_position_embeddings"))


def head_size(section, base, shape, heads):
    """Width of a head where it is not stated, from the shape of q_proj; None: that is no whole number."""
    if shape is not None:
        return None if shape[0] % heads else shape[0] // heads
    if "hidden_size" in section:
        return section["hidden_size"] // heads
    return base.head_dim


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
        check(self, temperature=0, top_k=0, depth_temperature=0, depth_top_k=0)
        check(self, min_len=0, max_len=1, retries=0, chunk_frames=1)


# -------------------------------------------------------------------------------------------- modules


class Tower(nn.Module):
    """A Llama without embeddings: backbone or depth decoder. (B, L, C) -> (B, L, C), final norm included."""

    def __init__(self, c):
        super().__init__()
        size = LayerSize(width=c.hidden_size, hidden=c.intermediate_size, heads=c.num_attention_heads,
                         kv_heads=c.num_key_value_heads, head_size=c.head_dim, eps=c.rms_norm_eps)
        self.layers = nn.ModuleList(Layer(size) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.register_buffer("frequencies", None, persistent=False)
        self.config = c
        self.recompute = False

    def make_rotary(self, device):
        """After loading and casting: frequencies stay float32, and the meta device holds no numbers."""
        c = self.config
        self.frequencies = llama3_frequencies(c.head_dim, c.rope_theta, c.rope_scaling).to(device)

    def rope(self, positions):
        return rotary(positions, self.frequencies)

    def forward(self, x, context, caches=None):
        x = run_layers(self.layers, x, context, caches, self.training and self.recompute)
        return self.norm(x)


class Codebooks(nn.Module):
    """The heads of codebooks 1 .. K - 1, used as h @ weight[j - 1]: not transposed like a Linear's."""

    def __init__(self, codebooks, width, vocab):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(codebooks - 1, width, vocab))


def pick(logits, u, temperature, top_k):
    """One id per row: logits (B, V), which are overwritten, u (B, 1) uniform in (0, 1] -> (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    if 0 < top_k < logits.shape[1]:
        least = logits.topk(top_k)[0][:, -1:]
        logits.masked_fill_(logits < least, -math.inf)  # ties with the k-th stay
    heap = logits.float().div_(temperature).softmax(-1).cumsum(-1)
    return torch.searchsorted(heap, u * heap[:, -1:])[:, 0]


def speaker_of(turn):
    """The number that the data set gave a named speaker, or what the row says."""
    return turn.get("speaker_id", turn.get("speaker"))


class Segment(NamedTuple):
    """One turn as the backbone reads it: its text, then, if it is spoken, its frames and the end frame."""

    rows: torch.Tensor  # (L, K + 1) int64
    mask: torch.Tensor  # (L, K + 1) bool: which of the entries mean something
    is_audio: torch.Tensor  # (L,) bool


class Prompt(NamedTuple):
    """What one request puts in front of its speech."""

    rows: torch.Tensor  # (L, K + 1)
    mask: torch.Tensor  # (L, K + 1)
    cap: int  # frames that it may speak


class Depth(NamedTuple):
    """What codebooks 1 .. K - 1 are sampled with, for the rows of one run."""

    steps: DepthSteps
    tables: tuple  # K of (V, H): the rows of the audio table of each codebook
    heads: tuple  # K - 1 of (D, allowed)
    allowed: int  # ids that may be sampled, from 0

    def keep(self, rows):
        self.steps.keep(rows)


class CSM(nn.Module):
    """Backbone, depth decoder, and tables and heads between them; the codec is none of its parameters."""

    backbone = "csm"
    namings = ("transformers", "original", "mlx")
    adapter_namings = {
        "peft": "transformers",
        "mlx": "mlx",
        "voxcpm": "mlx",  # one file, tables inside, as csm-mlx had it
    }
    native_adapter = "peft"
    lora_dropout_after = False
    speaker_input = True
    embeddings = ("embed_text_tokens", "backbone_model.embed_tokens")
    # Plain suffix lists in PEFT also wrap the codec, which runs without gradients: those pairs were never
    # trained.
    harmless_adapter_keys = (r"codec_model\..*",)
    refused_adapter_keys = {
        r"layers\.\d+\..*": "without the name of its tower: the trainer that wrote this file let the "
                            "decoder's layers 0 to 3 overwrite the backbone's, so what is left fits neither",
    }

    def __init__(self, config, naming="transformers", raw_config=None):
        """naming and raw_config (config.json) are those of the folder that was read: `save` keeps them."""
        super().__init__()
        H, D = config.backbone.hidden_size, config.depth_decoder_config.hidden_size
        K, V = config.num_codebooks, config.vocab_size
        # from_pretrained of nothing: an nn.Embedding's own draw imports a compiler on the meta device.
        words = torch.empty(config.text_vocab_size, H)
        self.embed_text_tokens = nn.Embedding.from_pretrained(words, freeze=False)
        table = nn.Embedding.from_pretrained(torch.empty(K * V, H), freeze=False)  # row: code + V * codebook
        self.backbone_model = Tower(config.backbone)
        self.backbone_model.embed_tokens = nn.Module()
        self.backbone_model.embed_tokens.embed_audio_tokens = table  # both towers read it
        # codebook 0; the published name misleads, it is no text head
        self.lm_head = nn.Linear(H, V, bias=False)
        self.depth_decoder = nn.Module()
        self.depth_decoder.model = Tower(config.depth_decoder_config)
        self.depth_decoder.model.inputs_embeds_projector = nn.Linear(H, D, bias=False)
        self.depth_decoder.codebooks_head = Codebooks(K, D, V)
        # (K,) first row of each codebook in the table
        self.register_buffer("offsets", None, persistent=False)
        self.config = config
        self.naming = naming
        self.raw_config = raw_config or {}

        # What may be set from outside, and what `equip` fills.
        self.path = self.fingerprint = ""
        self.left_unused, self.finish = [], []
        # {name: number} as the training data had them
        self.speakers = dict(self.raw_config.get("speakers") or {})
        self.max_length = config.backbone.max_position_embeddings
        self._frozen, self.tokenizer, self.files = [], None, {}
        self.sample_rate = self.out_sample_rate = 0
        self.bos = self.eos = None
        self.tokenizer_crc = 0
        self._codec_key = None
        self.training_options = Training()

    def equip(self, codec, tokenizer, files, options):
        """Give the model what does not come with its weights, and compute what hangs on it; by `load` and
        `blank`.

        files: {role: path} of what `save` copies. options: values of Training.
        """
        self._frozen = [codec]
        self.tokenizer, self.files = tokenizer, files
        self.sample_rate = self.out_sample_rate = codec.config.sampling_rate
        self.bos, self.eos = tokenizer.id("<|begin_of_text|>"), tokenizer.id("<|end_of_text|>")
        if self.bos is None or self.eos is None:
            raise Invalid(f"{tokenizer.name} has no <|begin_of_text|> and <|end_of_text|>; "
                          "it is not CSM's tokenizer")
        if "tokenizer" in files:
            self.tokenizer_crc = zlib.crc32(files["tokenizer"].read_bytes())
        for tower in self.stacks():
            tower.make_rotary(self.device)
        codebooks = torch.arange(self.config.num_codebooks, device=self.device)
        self.offsets = codebooks * self.config.vocab_size
        self.training_options = Training(**options)
        self.freeze()

    # -------------------------------------------------------------------------- data: text, audio, batches

    @property
    def codec(self):
        return self._frozen[0]  # in a list, so that it is neither trained nor saved nor cast with the model

    @property
    def device(self):
        return self.lm_head.weight.device

    @property
    def dtype(self):
        return self.lm_head.weight.dtype

    @property
    def audio_table(self):
        return self.backbone_model.embed_tokens.embed_audio_tokens

    def encode_text(self, text, speaker=None):
        """Ids of bos "[speaker]text" eos; no speaker is 0. Markup of special tokens stays plain text."""
        if speaker is None:
            speaker = 0
        elif isinstance(speaker, str):
            speaker = self.speakers.get(speaker, speaker)
        if isinstance(speaker, bool) or not re.fullmatch(r"\d+", str(speaker)):
            names = f", and these names: {', '.join(self.speakers)}" if self.speakers else ""
            raise Invalid(f"speaker {speaker!r}: this backbone knows speakers by whole numbers, "
                          f"0 and up{names}")
        refuse_blank(text)
        if self.config.speaker_blank:
            text = f" {text}"
        ids = self.tokenizer.encode(f"[{speaker}]{text}")
        return [self.bos, *ids, self.eos]

    def encode_audio(self, source, start=None, end=None):
        """Codes (K, T) int16 of a path or of (n,) samples at `sample_rate`; any length."""
        wave = source
        if not torch.is_tensor(source):
            wave, _ = audio.read(source, self.sample_rate, start, end)
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
        codes, size = source.long().cpu(), self.config.vocab_size
        if codes.numel():
            least, most = int(codes.min()), int(codes.max())
            if least < 0 or most >= size:
                raise Invalid(f"codes from {least} to {most}; this model has 0 to {size - 1}")
        return codes

    def _segment(self, turn):
        """The Segment of a turn: text, and what the other keys of a row say of its audio."""
        K = self.config.num_codebooks
        ids = self.encode_text(turn.get("text") or "", speaker_of(turn))
        S, codes = len(ids), torch.zeros(K, 0, dtype=torch.long)
        if turn.get("audio") is not None:
            codes = self._codes(turn["audio"], turn.get("start"), turn.get("end"))
            codes = F.pad(codes, (0, 1))  # the end frame
        rows = torch.zeros(S + codes.shape[1], K + 1, dtype=torch.long)
        rows[:S, K] = torch.tensor(ids)
        rows[S:, :K] = codes.T
        is_audio = torch.arange(len(rows)) >= S
        mask = is_audio[:, None].repeat(1, K + 1)
        mask[:, K] = ~is_audio
        return Segment(rows, mask, is_audio)

    def encode(self, row):
        """{rows (L, K + 1), mask (L, K + 1), train (L,)} of a row with text and audio, or with turns in
        order.

        Turns in front of the first trained one are kept as far as context_turns says. A row of more than
        max_length positions loses turns behind the last trained one, then from the left, never the end of a
        turn.
        """
        turns = row.get("turns") or [row]
        spoken = [i for i, turn in enumerate(turns) if turn.get("audio") is not None]
        if not spoken:
            raise Invalid("this row has no audio, so there is nothing to train")
        trained = [False] * len(turns)
        for i in spoken:
            trained[i] = self._is_trained(turns[i], last=i == spoken[-1])
        first_trained = trained.index(True) if any(trained) else spoken[-1]
        first = max(0, first_trained - self.training_options.context_turns)
        segments, trained = self._cut([self._segment(turn) for turn in turns[first:]], trained[first:])
        train = [segment.is_audio & yes for segment, yes in zip(segments, trained)]
        return {"rows": torch.cat([segment.rows for segment in segments]),
                "mask": torch.cat([segment.mask for segment in segments]),
                "train": torch.cat(train)}

    def _is_trained(self, turn, last):
        """Does a spoken turn count in the loss? last: no spoken one follows."""
        if not turn.get("train", True):
            return False
        if self.training_options.train_on == "last" and not last:
            return False
        names = {str(turn.get("speaker") or 0), str(speaker_of(turn) or 0)}
        return not self._silent() & names

    def _cut(self, segments, trained):
        """As many of the segments as fit max_length, and which of them are trained."""
        while sum(len(segment.rows) for segment in segments) > self.max_length:
            # what stands behind the last trained turn is context of nothing
            if any(trained) and not trained[-1]:
                segments, trained = segments[:-1], trained[:-1]
            elif any(trained[1:]):
                segments, trained = segments[1:], trained[1:]
            else:
                break
        return segments, trained

    def _silent(self):
        """Names and numbers, as texts, of the speakers that are never trained."""
        asked = set(map(str, self.training_options.mask_speakers))
        numbers = set(map(str, self.speakers.values()))
        unknown = asked - self.speakers.keys() - numbers - {"0"}  # a row that names no speaker is 0
        if unknown and self.speakers:
            names = [name if name == str(n) else f"{name} ({n})" for name, n in self.speakers.items()]
            raise Invalid(f"backbone.mask_speakers: nobody is called {', '.join(sorted(unknown))}; "
                          f"the rows name {', '.join(names)}")
        return asked | {str(self.speakers[name]) for name in asked & self.speakers.keys()}

    def blank_example(self, seconds, tokens):
        """What `encode` makes of a clip, without content: for counting memory."""
        rows, K = tokens + round(self.frame_rate * seconds) + 1, self.config.num_codebooks
        sound = torch.arange(rows) >= tokens
        mask = torch.cat([sound[:, None].expand(-1, K), ~sound[:, None]], 1)
        return {"rows": torch.zeros(rows, K + 1, dtype=torch.long), "mask": mask, "train": sound}

    def length(self, example):
        """Rows of the backbone; 0 where none of them is trained."""
        return len(example["rows"]) if example["train"].any() else 0

    def collate(self, examples, seeds=None):
        """Batch and counts. Drawn per row, from its own seed: which trained frames the depth decoder sees.

        `frames` are numbers in the list of all trained frames of the batch. seeds=None: fixed by the row's
        content.
        """
        B, L = len(examples), max(len(e["rows"]) for e in examples)
        rows = torch.zeros(B, L, self.config.num_codebooks + 1, dtype=torch.long)
        mask = torch.zeros(rows.shape, dtype=torch.bool)
        train = torch.zeros(B, L, dtype=torch.bool)
        frames, before = [], 0  # trained frames of the rows so far
        for b, e in enumerate(examples):
            n, count = len(e["rows"]), int(e["train"].sum())
            rows[b, :n], mask[b, :n], train[b, :n] = e["rows"], e["mask"], e["train"]
            seed = zlib.crc32(e["rows"].numpy().tobytes()) if seeds is None else seeds[b]
            frames.append(before + self._drawn(count, seed))
            before += count
        trained = train.flatten().nonzero().flatten()
        # The backbone reads the real rows only, each row's last one excepted: nothing is predicted from it.
        inner = mask.any(-1)
        inner[torch.arange(B), inner.sum(1) - 1] = False
        place = inner.flatten().nonzero().flatten()
        kind = mask.flatten(0, 1)[place]
        batch = {
            "rows": rows, "place": place, "trained": trained, "frames": torch.cat(frames),
            "text": kind[:, -1].nonzero().flatten(),  # of the places, those of text and those of audio
            "audio": kind[:, 0].nonzero().flatten(),
            # of the places, what each trained frame is predicted from
            "before": torch.searchsorted(place, trained - 1),
        }
        return batch, self.counts(batch)

    def _drawn(self, count, seed):
        """Which of `count` trained frames of a row the depth decoder sees: a share, at least one."""
        drawn = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        share = max(1, count // self.training_options.amortize)
        return drawn[:share].sort().values

    def counts(self, batch):
        N, M, K = len(batch["trained"]), len(batch["frames"]), self.config.num_codebooks
        others = {f"metric/codebook_{k:02d}": M for k in range(1, K)}
        return {"loss/semantic": N, "loss/acoustic": M * (K - 1), "metric/codebook_00": N, **others}

    # -------------------------------------------------------------------------- training

    def forward(self, batch):
        """Sums of cross-entropies: codebook 0 over all trained frames, the others over the drawn ones."""
        B, L, _ = batch["rows"].shape
        rows, place = batch["rows"].flatten(0, 1), batch["place"]
        x = self._embed(rows[place], batch["text"], batch["audio"])[None]  # (1, P, H), P real rows
        context = Context(self.backbone_model.rope(place % L), mask=Packing(place, B, L))
        h = self.backbone_model(x, context)[0, batch["before"]]  # (N, H)
        codes = rows[batch["trained"]][:, :-1]  # (N, K)
        first = F.cross_entropy(self.lm_head(h).float(), codes[:, 0], reduction="sum")
        h, codes = h[batch["frames"]], codes[batch["frames"]]  # M of them
        logits = self._depth(h, codes)
        others = F.cross_entropy(logits.flatten(0, 1).float(), codes[:, 1:].T.flatten(), reduction="none")
        others = others.view(logits.shape[:2]).sum(1)  # (K - 1,)
        out = {"loss/semantic": first, "loss/acoustic": others.sum(), "metric/codebook_00": first.detach()}
        for k, value in enumerate(others.detach(), 1):
            out[f"metric/codebook_{k:02d}"] = value
        return out

    def _embed(self, rows, text, audio):
        """(P, K + 1) -> (P, H). text, audio: places of rows of that kind; the rest is padding, zero."""
        spoken = self._frames(rows[audio][:, :-1])
        x = spoken.new_zeros(len(rows), spoken.shape[1]).index_copy(0, audio, spoken)
        words = self.embed_text_tokens(rows[text][:, -1]).to(x.dtype)
        return x.index_copy(0, text, words)

    def _frames(self, codes):
        """(N, K) -> (N, H), the sum of a frame's table rows."""
        x = F.embedding_bag(codes + self.offsets, self.audio_table.weight, mode="sum")
        return x.to(self.dtype)

    def _depth(self, h, codes):
        """Logits (K - 1, M, V) of codebooks 1 .. K - 1. h (M, H), codes (M, K).

        Position 0 reads the state, position j code j - 1; what stands at j predicts codebook j, at 0 nothing.
        """
        decoder = self.depth_decoder.model
        x = self.audio_table(codes[:, :-1] + self.offsets[:-1]).to(h.dtype)  # (M, K - 1, H)
        # Projected one by one: where table and projection are frozen, autograd keeps nothing for all but the
        # state.
        state = decoder.inputs_embeds_projector(h[:, None])
        x = torch.cat([state, decoder.inputs_embeds_projector(x)], 1)  # (M, K, D)
        rope = decoder.rope(torch.arange(x.shape[1], device=x.device))
        y = decoder(x, Context(rope, causal=True))[:, 1:]
        return torch.bmm(y.transpose(0, 1), self.depth_decoder.codebooks_head.weight)

    def sample_request(self, row):
        """What a validation sample of a row is conditioned on; an untrained model seldom ends by itself."""
        speaker = speaker_of(row)
        return {"speaker": speaker, "max_len": room_for(self.encode_text(row["text"], speaker))}

    @property
    def frame_rate(self):
        """Frames per second of audio."""
        return self.sample_rate / self.codec.config.frame

    def set_recompute(self, every):
        """Activation checkpointing of every n-th layer, 0 of none. Of all: up to a third more time for most
        activation memory."""
        for tower in self.stacks():
            tower.recompute = every

    def stacks(self):
        return [self.backbone_model, self.depth_decoder.model]

    def blocks(self):
        """The modules that torch.compile takes one by one."""
        return [m for m in self.modules() if isinstance(m, Layer)]

    def lora_targets(self, settings):
        """With no word given: attention and feed-forward of both towers."""
        for key in ("enable_lm", "enable_dit", "enable_proj"):
            if getattr(settings, key) is not None:
                raise Invalid(f"lora.{key}: this backbone is chosen by lora.target_modules: attn, mlp, "
                              "q_proj, v_proj .., codebook0_head, projection; backbone or decoder for all "
                              "layers of one tower")
        return [name for name, m in self.named_modules() if isinstance(m, nn.Linear) and ".layers." in name]

    def freeze(self):
        """What training_options.freeze names keeps its weights: requires_grad of every parameter is set."""
        for name, p in self.named_parameters():
            part = "decoder" if name.startswith("depth_decoder.") else "backbone"
            p.requires_grad = self.training_options.freeze != part

    # -------------------------------------------------------------------------- generation

    def _request(self, text, prompts=(), speaker=None, seed=None, noise=None):
        """The turns so far and the text to speak."""
        if noise is not None:
            raise Invalid("noise: this backbone samples codes and takes a seed, no noise")
        turns = []
        for transcript, clip, who in prompts:
            if transcript is None:
                raise Invalid("a voice prompt without its transcript: this backbone hears a clip as an "
                              "earlier turn, so give its text")
            turns.append({"text": transcript, "audio": clip, "speaker": who})
        turns.append({"text": text, "speaker": speaker})
        return {"turns": [self._segment(turn) for turn in turns], "seed": seed}

    def _fit(self, request, s):
        """The Prompt of a request: old turns are dropped where prompt and speech would not fit the model."""
        turns, room = request["turns"], self.config.backbone.max_position_embeddings
        wanted = min(s.max_len, room_for(turns[-1].rows))
        kept = list(turns)
        while len(kept) > 1 and sum(len(turn.rows) for turn in kept) + wanted > room:
            kept = kept[1:]
        rows = torch.cat([turn.rows for turn in kept])
        mask = torch.cat([turn.mask for turn in kept])
        cap = min(s.max_len, room - len(rows))
        if cap < 1:
            raise Invalid(f"the text takes {len(rows)} positions and max_len is {s.max_len}; "
                          f"the model has {room} positions; split it, as --max_chars_per_piece does")
        if len(kept) < len(turns):
            warnings.warn(f"{len(turns) - len(kept)} of {len(turns) - 1} earlier turns were left out: "
                          f"the model has {room} positions")
        return Prompt(rows, mask, cap)

    @torch.no_grad()
    def _run(self, requests, s):
        """Yields (i, frame (K,)) of every request, one backbone step for all that still speak; sets
        self.finish.

        Between two frames the host waits once, for the frame itself; within a frame it never does.
        """
        prompts = [self._fit(request, s) for request in requests]
        caps = [prompt.cap for prompt in prompts]
        most = max(caps)
        batch = LeftPadded([len(prompt.rows) for prompt in prompts], most, self.device)
        speaking = Speaking(caps)
        self.finish = speaking.finish  # of this run, should another begin before it ends
        draws = self._draws(requests)[:, :most].to(self.device)
        x = self._embed_prompts(batch, prompts)
        caches = make_caches(self.backbone_model.layers, len(requests), batch.columns, x)
        depth = self._depth_of(len(requests), s)
        places = [request.get("slot") for request in requests]  # of their adapters, where there are several
        with slots.acting(self, places):
            h = self._read(x, batch.prompt(), caches)
        for n in range(most):
            with slots.acting(self, [places[i] for i in speaking.requests]):
                frame = self._frame(h, draws[:, n], s, n, depth)  # (B, K)
            shown = frame.cpu().clone()  # outside of inference mode, so that a caller may train on it
            ended = ~shown.numpy().any(1)
            numbers = speaking.requests
            going = speaking.after(n, ended)
            for row, i in enumerate(numbers):
                if not ended[row]:
                    yield i, shown[row]
            if not speaking.requests:
                break
            if going is not None:
                going = torch.tensor(going, device=self.device)
                frame, draws = frame[going], draws[going]
                for part in [batch, depth, *caches]:
                    part.keep(going)
            with slots.acting(self, [places[i] for i in speaking.requests]):
                h = self._step(frame, batch.step(n), caches)
        self.finish = speaking.finish

    def _draws(self, requests):
        """(B, frames, K) numbers in (0, 1] from each request's seed: 0 would hit an id of probability 0.

        All at once and always as many, so that no cap changes a draw.
        """
        most, K = self.config.backbone.max_position_embeddings, self.config.num_codebooks
        draws = [torch.empty(most, K).uniform_(generator=generator(request["seed"])) for request in requests]
        return 1 - torch.stack(draws)

    def _embed_prompts(self, batch, prompts):
        """(B, L, H) of all prompts, padded on the left."""
        rows = batch.stack([prompt.rows for prompt in prompts]).flatten(0, 1)
        mask = batch.stack([prompt.mask for prompt in prompts]).flatten(0, 1)
        text = mask[:, -1].nonzero().flatten()
        audio = mask[:, 0].nonzero().flatten()
        x = self._embed(rows.to(self.device), text.to(self.device), audio.to(self.device))
        return x.view(len(prompts), batch.width, -1)

    def _depth_of(self, B, s):
        """The Depth of a run of B rows."""
        c = self.config
        allowed = c.vocab_size
        if s.mask_special:
            allowed = min(allowed, self.codec.config.codebook_size)
        tables = self.audio_table.weight.unflatten(0, (c.num_codebooks, -1)).unbind()
        heads = self.depth_decoder.codebooks_head.weight[:, :, :allowed].unbind()
        return Depth(DepthSteps(self.depth_decoder.model, B, c.num_codebooks), tables, heads, allowed)

    def _read(self, x, place, caches):
        """Embedded positions (B, L, H) go in at their place; the state that predicts the next comes out."""
        rope = self.backbone_model.rope(place.positions)
        context = Context(rope, mask=place.mask, column=place.column)
        return self.backbone_model(x, context, caches)[:, -1]

    @torch.inference_mode()
    def _step(self, frame, place, caches):
        """The newest frame of every row (B, K) goes in; the state that predicts the next comes out (B, H)."""
        return self._read(self._frames(frame)[:, None], place, caches)

    @torch.inference_mode()  # a quarter less time than no_grad: most of it goes into calls
    def _frame(self, h, u, s, n, depth):
        """Frame n (B, K) from the backbone's state (B, H) and numbers (B, K), uniform in (0, 1]."""
        temperature = s.temperature if s.depth_temperature is None else s.depth_temperature
        top_k = s.top_k if s.depth_top_k is None else s.depth_top_k
        logits = self.lm_head(h)[:, : depth.allowed]
        if n < s.min_len:  # the end frame begins with 0
            zero = torch.zeros(1, dtype=torch.long, device=h.device)
            logits = logits.index_fill(1, zero, -math.inf)
        u = u.split(1, 1)
        codes = [pick(logits, u[0], s.temperature, s.top_k)]
        for j in range(1, self.config.num_codebooks):
            x = depth.tables[j - 1].index_select(0, codes[-1]).to(h.dtype)
            if j == 1:
                y = depth.steps(torch.cat([h, x]), 0)  # the state and the first code
            else:
                y = depth.steps(x, j)
            codes.append(pick(y @ depth.heads[j - 1], u[j], temperature, top_k))
        return torch.stack(codes, 1)

    def _takes(self, requests, s):
        """_run, and again with the next seed for requests whose take was empty or met its cap."""
        def failed(request, frames, finish):
            return finish == "cap" or not frames

        return takes(self, requests, s, failed)

    def frames(self, text, prompts=(), speaker=None, seed=None, noise=None, **sampling):
        """Frames (K,) int64, one by one, without the end frame; self.finish is then ["end"] or ["cap"]."""
        s = Sampling(**sampling)
        request = self._request(text, prompts, speaker, seed, noise)
        for _, frame in self._takes([request], s):
            yield frame

    def generate(self, text, prompts=(), speaker=None, seed=None, noise=None, **sampling):
        """Audio in chunks (n,) at `out_sample_rate`; joined they are the whole."""
        request = dict(text=text, prompts=prompts, speaker=speaker, seed=seed, noise=noise)
        for _, chunk in self.generate_batch([request], **sampling):
            yield chunk

    @torch.no_grad()
    def generate_batch(self, requests, **sampling):
        """Yields (i, chunk), the chunks of a request of 1, 2, 4 .. chunk_frames frames."""
        s = Sampling(**sampling)
        named = slots.named(self, requests)
        requests = [dict(self._request(**r), slot=slot) for r, slot in named]
        codec = self.codec.to(self.device)
        streams = [codec.stream() for _ in requests]
        silent = set(range(len(requests)))
        frames = self._takes(requests, s)
        for i, chunk in chunks(frames, streams, lambda some: torch.stack(some, 1), s.chunk_frames):
            silent.discard(i)
            yield i, chunk
        for i in sorted(silent):
            warnings.warn(f"request {i}: the first frame was the end, so there is only silence; "
                          "try another seed, or retries")
            yield i, torch.zeros(codec.config.frame)

    # -------------------------------------------------------------------------- names and files

    def published_name(self, parameter, naming=None):
        """The name of a parameter in a published file; of the audio table the first of its two."""
        return renamed(parameter, naming or self.naming)

    def published_copies(self, parameter, naming=None):
        """Further names of the same tensor in that naming."""
        twin = (naming or self.naming) == "transformers" and parameter == TIED[0]
        return TIED[1:] if twin else ()

    def adapter_words(self, modules, values):
        """lora_config.json of the single-file form."""
        leaves = {renamed(name + ".weight", "mlx").split(".")[-2] for name in modules}
        return {**values, "target_modules": sorted(leaves)}

    def published_rows(self, parameter, naming=None):
        """Row order of the published weight (published = ours[rows]), None where it is ours."""
        if (naming or self.naming) == "transformers":
            return None
        return pair_order(self.config, parameter)

    def published_state_dict(self, naming=None, merged=False):
        """{published name: tensor}; merged adds the adapters, in float32. transformers' has the codec."""
        naming, out = naming or self.naming, {}
        for name, w in checkpoint.weights(self, merged).items():
            rows = self.published_rows(name, naming)
            out[self.published_name(name, naming)] = w if rows is None else w[rows.to(w.device)]
        if naming == "transformers":
            out[TIED[1]] = out[TIED[0]].clone()  # a copy: safetensors refuses two names for one memory
            out |= {CODEC_PREFIX + name: w for name, w in mimi.published(self.codec).items()}
        return out

    def save(self, folder, naming=None, merged=False):
        """Write a folder in a published layout: weights, config.json, tokenizer and codec."""
        naming = naming or self.naming
        if naming not in self.namings:
            raise Invalid(f"naming {naming!r}: known are {', '.join(self.namings)}")
        if not merged and any(".lora_" in name for name, _ in self.named_parameters()):
            raise Invalid("the model has adapters on: save(merged=True) adds them to the weights, "
                          "lora.save_lora_weights keeps them apart")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        file = "ckpt.safetensors" if naming == "mlx" else "model.safetensors"
        checkpoint.save_tensors(folder / file, self.published_state_dict(naming, merged))
        if naming != "transformers":  # upstream keeps the codec elsewhere; here the folder is whole
            k = self.codec.config
            # of heads, which moshi's naming does not know
            groups = k.kv_width != k.num_attention_heads * k.head_dim
            codec = mimi.published(self.codec, "transformers" if groups else "moshi")
            checkpoint.save_tensors(folder / CODEC_FILE, codec)
        text = json.dumps(self._published_config(), indent=2) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")
        for path in self.files.values():
            if path.parent.resolve() != folder.resolve():
                shutil.copyfile(path, folder / path.name)
        return folder

    def _published_config(self):
        """config.json with both vocabularies of fields, as sesame/csm-1b has it; what was read wins."""
        c, raw = self.config, dict(self.raw_config)
        # the published folder's pointer to shards; here the default name is used
        raw.pop("transformers_weights", None)
        ids = {key: self.tokenizer.id(token) for key, token in AUDIO_TOKENS.items()}
        whole = {
            **published_tower(c.backbone, raw),
            "model_type": "csm",
            "architectures": ["CsmForConditionalGeneration"],
            "num_codebooks": c.num_codebooks,
            "vocab_size": c.vocab_size,
            "text_vocab_size": c.text_vocab_size,
            "bos_token_id": self.bos,
            "tie_codebooks_embeddings": True,
            **{key: number for key, number in ids.items() if number is not None},
            "codebook_eos_token_id": 0,
            "codebook_pad_token_id": c.vocab_size - 1,
            "audio_vocab_size": c.vocab_size,
            "audio_num_codebooks": c.num_codebooks,
            "backbone_flavor": flavor_of(c.backbone) or USUAL["backbone"],
            "decoder_flavor": flavor_of(c.depth_decoder_config) or USUAL["decoder"],
            **raw,
        }
        if self.speakers:  # nobody else reads this key
            whole["speakers"] = self.speakers
        depth = raw.get("depth_decoder_config") or {}
        whole["depth_decoder_config"] = {
            **published_tower(c.depth_decoder_config, depth),
            "model_type": "csm_depth_decoder_model",
            "num_codebooks": c.num_codebooks,
            "vocab_size": c.vocab_size,
            "backbone_hidden_size": c.backbone.hidden_size,
            **depth,
        }
        whole["codec_config"] = {**(raw.get("codec_config") or {}), **mimi.settings_of(self.codec.config)}
        return whole

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
        settings = (self.tokenizer_crc, self.bos, self.eos, self.max_length, o.context_turns, o.train_on,
                    sorted(self._silent()))
        if self.config.speaker_blank:
            settings += ("blank",)
        return f"{self.codec_key}-{zlib.crc32(repr(settings).encode()):08x}"


def room_for(tokens):
    """Frames that speech of a text takes at most."""
    return LEAST_ROOM + ROOM_PER_TOKEN * len(tokens)


# -------------------------------------------------------------------------------------------- files

COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
              "preprocessor_config.json", "processor_config.json", "chat_template.jinja")
CODEC_PREFIX = "codec_model."  # of the codec's tensors in transformers' file
CODEC_FILE = "tokenizer-e351c8d8-checkpoint125.safetensors"  # the name it has at kyutai/moshiko-pytorch-bf16
AUDIO_TOKENS = {
    "audio_token_id": "<|AUDIO|>",
    "audio_eos_token_id": "<|audio_eos|>",
    "pad_token_id": "<|AUDIO|>",
}
TIED = ("backbone_model.embed_tokens.embed_audio_tokens.weight", "depth_decoder.model.embed_tokens.weight")
WEIGHT_FILES = ("model.safetensors.index.json", "model.safetensors", "transformers.safetensors.index.json",
                "ckpt.safetensors", "ckpt.pt")

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
# Ends of names: (ours and mlx's, original).
LEAVES = (
    (".self_attn.o_proj.", ".attn.output_proj."),
    (".self_attn.", ".attn."),
    (".mlp.gate_proj.", ".mlp.w1."),
    (".mlp.down_proj.", ".mlp.w2."),
    (".mlp.up_proj.", ".mlp.w3."),
    (".input_layernorm.weight", ".sa_norm.scale"),
    (".post_attention_layernorm.weight", ".mlp_norm.scale"),
)


def renamed(name, naming, back=False):
    """Our name in another naming, or with `back` the other way round; what no table has stays as it is."""
    if naming == "transformers":
        return name
    column = {"original": 1, "mlx": 2}[naming]
    for entry in NAMES:
        old, new = entry[0], entry[column]
        if back:
            old, new = new, old
        if name.startswith(old):
            name = new + name[len(old):]
            break
    if naming == "original":
        for ours, theirs in LEAVES:
            name = name.replace(theirs, ours) if back else name.replace(ours, theirs)
    return name


def naming_of(names):
    """Which of the three namings these tensor names are, told by them alone; None for none."""
    if any(name.startswith("backbone_model.layers.") for name in names):
        return "transformers"
    layers = [name for name in names if name.startswith("backbone.layers.")]
    if any(".attn." in name for name in layers):
        return "original"
    return "mlx" if any(".self_attn." in name for name in layers) else None


def pair_order(config, name):
    """Where the interleaved namings take the rows of a q or k weight from, None for every other parameter."""
    pattern = r"(backbone_model|depth_decoder\.model)\.layers\.\d+\.self_attn\.([qk])_proj\.weight"
    m = re.fullmatch(pattern, name)
    if not m:
        return None
    c = config.backbone if m[1] == "backbone_model" else config.depth_decoder_config
    heads = c.num_attention_heads if m[2] == "q" else c.num_key_value_heads
    return mimi.interleaved(torch.arange(heads * c.head_dim), heads)


def published_tower(t, given):
    """A TowerConfig as transformers writes it; rotary numbers only where `given` does not have them."""
    section = dataclasses.asdict(t)
    del section["rope_theta"], section["rope_scaling"]
    if "rope_parameters" not in given and "rope_scaling" not in given:
        section["rope_parameters"] = rope_block(t)
    return section


def rope_block(c):
    """rope_parameters for transformers, where the old context is below the positions: same table."""
    if c.rope_scaling is None:
        return {"rope_type": "default", "rope_theta": c.rope_theta}
    scaling, shrink = dict(c.rope_scaling), 1
    while scaling["original_max_position_embeddings"] / shrink >= c.max_position_embeddings:
        shrink *= 2
    for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"):
        kind = type(scaling[key])  # an int stays one
        scaling[key] = kind(scaling[key] / shrink)
    return {"rope_type": "llama3", "rope_theta": c.rope_theta, **scaling}


def recognizes(config):
    names = config.get("tensors", ())
    if names:
        head = "audio_head" in names or "depth_decoder.codebooks_head.weight" in names
        return head and naming_of(names) is not None
    transformers = config.get("model_type") == "csm" and "depth_decoder_config" in config
    return transformers or {"backbone_flavor", "decoder_flavor"} <= set(config)


class Weights(NamedTuple):
    """The tensors of a CSM as a file holds them."""

    file: Path
    stored: dict  # {published name: Stored}
    naming: str


def load(folder, device="cpu", dtype=torch.float32, options=None, extra=None, weights=None,
         allow_unused=False):
    """The model in eval mode from a published folder or file. extra: paths of codec and tokenizer kept
    elsewhere.

    weights picks a naming or a file where several lie side by side; "scratch" draws the weights of
    config.json's model.
    """
    path, extra = Path(folder), extra or {}
    folder = path if path.is_dir() else path.parent
    file = folder / "config.json"
    raw = read_object(file) if file.is_file() else {}
    if weights == "scratch":
        original = "backbone_flavor" in raw and "hidden_size" not in raw
        source = Weights(path, {}, "original" if original else "transformers")
    else:
        source = find_weights(path, weights)
    codec, stored = checkpoint.split(source.stored, CODEC_PREFIX)
    stored = in_our_names(stored, source)
    config = read_config(raw, {renamed(name, "mlx"): t.shape for name, t in stored.items()}, str(file))
    with torch.device("meta"):
        model = CSM(config, source.naming, raw)
    if weights == "scratch":
        model.to_empty(device="cpu")
        draw(model)
        model.to(device, dtype)
    else:
        if source.naming != "transformers":
            stored = {name: half_split(t, pair_order(config, name)) for name, t in stored.items()}
        model.left_unused = checkpoint.fill(model, stored, dtype=dtype, device=device,
                                            allow_unused=allow_unused, what=str(source.file))
    codec = load_codec(folder, extra.get("codec"), codec, config)
    tokenizer = find_tokenizer(folder, extra.get("tokenizer"))
    files = {name: folder / name for name in COMPANIONS if (folder / name).is_file()}
    files["tokenizer"] = tokenizer
    model.equip(codec, Tokenizer(tokenizer, config.text_vocab_size), files, options or {})
    return model.eval()


def find_weights(path, wanted):
    """The Weights of a file, or of the first in a folder that holds a CSM of the wanted naming or name."""
    if path.is_dir() and wanted and (path / wanted).is_file():
        path = path / wanted
    files = [path]
    if path.is_dir():
        files = [path / name for name in WEIGHT_FILES if (path / name).is_file()]
    others = []
    for file in files:
        stored = checkpoint.read(file)
        naming = naming_of(stored)
        if naming and wanted in (None, naming, file.name):
            return Weights(file, stored, naming)
        others.append(f"{file.name} ({naming or 'no CSM'})")
    what = f" in naming {wanted!r}" if wanted else ""
    found = f", found {', '.join(others)}" if others else ""
    raise Invalid(f"{path}: no CSM weights{what}; looked for {', '.join(WEIGHT_FILES)}{found}")


def in_our_names(stored, source):
    """{our name: Stored}; of the two names of the audio table one is left."""
    if source.naming != "transformers":  # mlx files that were saved while wrapped have one level more
        plain = {name.replace(".linear.weight", ".weight"): t for name, t in stored.items()}
        stored = {renamed(name, source.naming, back=True): t for name, t in plain.items()}
    tied = [stored[name] for name in TIED if name in stored]
    if len(tied) == 2 and not torch.equal(tied[0].load(), tied[1].load()):
        raise Invalid(f"{source.file}: {TIED[0]} and {TIED[1]} differ, but the two towers share one table; "
                      "were they trained apart?")
    others = {name: t for name, t in stored.items() if name not in TIED}
    return {**others, TIED[0]: tied[0]} if tied else others


def half_split(tensor, rows):
    """The Stored of a weight whose rows lie interleaved; rows: what pair_order says."""
    if rows is None:
        return tensor

    def load():
        published = tensor.load()
        ours = torch.empty_like(published)
        ours[rows] = published
        return ours

    return Stored(tensor.shape, tensor.dtype, load)


def find_tokenizer(folder, given):
    """tokenizer.json of the folder, or the file or folder that was given."""
    path = Path(given or folder / "tokenizer.json")
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise Invalid(f"no tokenizer.json at {path}; it lies in sesame/csm-1b, or put Llama 3.2's into the "
                      "folder (in Python: extra={'tokenizer': path})")
    return path


def load_codec(folder, given, stored, config):
    """Mimi from `given` (file or folder), from the tensors beside the model's, or from the folder."""
    K, settings = config.num_codebooks, config.codec_config
    if given is None and stored:
        return mimi.load(stored, settings, K, what=f"the codec in {folder}")
    place = folder if given is None else Path(given)
    if not place.exists():
        raise Invalid(f"the codec: nothing at {given}")
    for file in codec_files(place):
        inside, stored = checkpoint.split(checkpoint.read(file), CODEC_PREFIX)
        stored = inside or stored
        if not mimi.naming_of(stored):
            continue
        beside = file.parent / "config.json"
        if given is not None and beside.is_file() and not inside:
            settings = read_object(beside)
            only_mimi = settings if settings.get("model_type") == "mimi" else {}
            settings = settings.get("codec_config", only_mimi)
        return mimi.load(stored, settings, K, what=str(file))
    raise Invalid(f"{place} holds no Mimi codec. It comes with transformers' files of sesame/csm-1b "
                  f"(codec_model.*), as kyutai/mimi, or as {CODEC_FILE} of kyutai/moshiko-pytorch-bf16; "
                  "put it into the folder (in Python: extra={'codec': path})")


def codec_files(place):
    """Files that may hold Mimi, the likeliest first."""
    if place.is_file():
        return [place]
    patterns = ("tokenizer-*.safetensors", "mimi*.safetensors", "*.index.json", "*.safetensors")
    return [file for pattern in patterns for file in sorted(place.glob(pattern))]


def draw(model):
    """Random weights; upstream's own start is not known, this is transformers': normal 0.02, norms one."""
    for name, p in model.named_parameters():
        if name.endswith("norm.weight"):
            nn.init.ones_(p)
        else:
            nn.init.normal_(p, std=0.02)


# -------------------------------------------------------------------------------------------- shapes for
# measuring


class Shape(NamedTuple):
    """Numbers of a size; of the towers: width, feed-forward, layers, heads, groups, head size."""

    backbone: tuple
    decoder: tuple
    text_vocab: int
    filters: int  # of the codec
    codec_width: int
    codec_layers: int


SHAPES = {
    "tiny": Shape((64, 128, 2, 4, 2, 16), (32, 64, 1, 2, 1, 16), 300, 4, 32, 1),
    "mid": Shape((512, 2048, 6, 8, 2, 64), (256, 1024, 2, 4, 1, 64), 4096, 16, 128, 8),
    "real": Shape((2048, 8192, 16, 32, 8, 64), (1024, 8192, 4, 8, 2, 128), 128256, 64, 512, 8),
}


def shape(size, version=""):
    """(Config, Config of the codec) in the published size, or smaller in nearly the same proportions."""
    if version:
        raise Invalid(f"version {version!r}: there is only one CSM; leave version out")
    s = SHAPES[size]
    towers = [TowerConfig(*numbers, rope_scaling=LLAMA3) for numbers in (s.backbone, s.decoder)]
    width = s.codec_width
    codec = mimi.Config(
        channels=[s.filters, 2 * s.filters, 4 * s.filters, 8 * s.filters], ratios=[4, 5, 6, 8], compress=2,
        residual_layers=1, kernels=(7, 3, 3), hidden=width, ffn=4 * width, layers=s.codec_layers,
        kv_width=width, stride=2, upsample_groups=width, codebook_size=2048, codebook_dim=width // 2,
        projected=True, semantic=1, acoustic=31, num_attention_heads=max(2, width // 64),
        head_dim=min(64, width // 2))
    return Config(*towers, s.text_vocab, vocab_size=2051, num_codebooks=32, codec_config={}), codec


def blank(size, version, device, dtype, options=None):
    """A model of a known shape with drawn weights and a tokenizer of single letters, for measuring only."""
    config, codec = shape(size, version)
    with torch.device("meta"):
        model = CSM(config)
    model.to_empty(device=device)
    draw(model)
    model.to(dtype)
    pieces = ["<unk>", "<|begin_of_text|>", "<|end_of_text|>", *"[]0abcdefghijklmnopqrstuvwxyz "]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer({"model": {"type": "BPE", "vocab": vocab, "merges": [], "unk_token": "<unk>"}})
    model.equip(mimi.blank(codec), tokenizer, {}, options or {})
    return model.eval()
