"""IndexTTS2: text and a voice in, semantic codes of 50 Hz out of a GPT-2, which frozen models turn into
sound.

Only the file gpt.pth is trained here: the GPT with its embeddings and heads, and the two conditioning
encoders in front of it. The frozen chain around it (models/codecs/speech_chain.py) hears the prompt, makes
the codes that training predicts, and turns generated codes, together with the GPT's states at them, into a
mel and sound.

    position (L)      what it is                                            predicted from it
    32                voice: latents of the prompt, each + emovec           -
    2                 speed: row 1, then row 0 of a small table             -
    1 + Lt + 1        0, text ids, 1                  + text position       the next text id, 1 at the end
    1 + Lm            8192, codes                     + mel position        the next code, 8193 at the end

Paper: arXiv 2506.21619. Checkpoint: IndexTeam/IndexTTS-2 (version 2.0), under the Bilibili IndexTTS licence.

What differs from the tools that train it, on purpose:
- No position attends to padding: rows are packed. The forks pad text with stop tokens in front of the codes.
- The prompt may be another clip of the speaker (`ref_audio`), since a prompt that is the target itself leaks
  words.
- Speaking from upstream feeds the codes with mel positions 0, 2, 3, ..., although 0, 1, 2, ... were trained.
A published checkpoint is spoken with as upstream does; one that was tuned here with the positions it was
trained on. Two clips that were learned by heart come back code by code with the trained positions, and with
upstream's they do not (see test_two_clips_come_back_with_the_trained_positions). `mel_positions` overrides
either.
- A batch is spoken in one forward per step, and the conditioning encoders are told the true number of frames.

Letters besides the usual: N latents of a voice, Lt text ids and Lm codes of a row, P positions of a packed
batch, R rows that speak (beams of all texts).
"""
import math
import os
import re
import shutil
import sys
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torch import nn
from torch.utils.checkpoint import checkpoint as recomputed

from models.codecs import speech_chain
from models.codecs.s2mel import frames_for
from models.codecs.speech_chain import PROMPT_SECONDS, Chain, Places
from models.parts import Invalid, audio, beam, check, checkpoint, front, opt, slots
from models.parts.checkpoint import Stored
from models.parts.conformer import (SMALLEST, Conformer, ConformerSize, Resampler, ResamplerSize,
                                    conformer_size, resampler_size)
from models.parts.gpt_steps import GPTSteps
from models.parts.layers import Cache, Packing, recomputes
from models.parts.plain import LARGEST, LAYERS, as_record, need, read_yaml, shown, written
from models.parts.sampling import LeftPadded, takes
from models.parts.sentencepiece import SentencePiece
from models.parts.textfiles import is_file, refuse_blank

PARTS = {"tokenizer": "", **speech_chain.PARTS}  # what may lie elsewhere
LAMBDAS = {"loss/text": 0.2, "loss/mel": 0.8}
EMOTIONS = ("happy", "angry", "sad", "afraid", "disgusted", "melancholic", "surprised", "calm")
# What the published interface multiplies a vector by, since some emotions change the voice, and the largest
# sum it allows.
EMOTION_BIAS = (0.9375, 0.875, 1.0, 1.0, 0.9375, 0.9375, 0.6875, 0.5625)
EMOTION_SUM = 0.8
MOST_CODES = 1500  # of a segment, as published: 30 s
STRETCH = 1.72  # mel frames per code

# ------------------------------------------------------------------------------------------------ settings


@dataclass
class Config:
    """The `gpt:` section of config.yaml under its names, and sizes that only the tensors tell."""

    model_dim: int
    layers: int
    heads: int
    max_mel_tokens: int
    max_text_tokens: int
    number_text_tokens: int
    number_mel_codes: int
    start_text_token: int
    stop_text_token: int
    start_mel_token: int
    stop_mel_token: int
    conditioning_encoder: ConformerSize
    perceiver_encoder: ResamplerSize
    emo_conditioning_encoder: ConformerSize
    emo_perceiver_encoder: ResamplerSize
    text_rows: int
    mel_rows: int  # of the table of positions: start, codes, stop and one more
    text_positions: int
    inner: int  # of the GPT's feed-forward

    @property
    def latents(self):
        return self.perceiver_encoder.latents

    @property
    def most_codes(self):
        """Codes that speaking may make: upstream feeds code k with position k + 2, and the last one is not
        fed."""
        return self.mel_rows - 1


_EMBED = ConformerSize(features=12, width=16, inner=24, heads=2, blocks=1, kernel=15, rows=200)
_VOICE = ResamplerSize(context=16, width=32, latents=4, heads=2, inner=42, layers=2)
_EMOTION = ResamplerSize(context=16, width=24, latents=1, heads=2, inner=32, layers=2)
TINY = Config(32, 2, 4, 60, 40, 60, 66, 0, 1, 64, 65, _EMBED, _VOICE, _EMBED, _EMOTION, 61, 63, 42, 128)


@dataclass
class Training:
    """The `backbone:` section of a training config."""

    condition: str = opt("other", "the prompt of a row: the same clip, another one (ref_audio) where the row names one, mixed",
                         choices=("same", "other", "mixed"))
    mixed_ratio: float = opt(0.5, "with condition mixed: share of rows, drawn anew each time, whose prompt is the same clip")
    dropout: float | None = opt(None, "share of values that the GPT drops; none: 0.1 in full tuning, 0 with adapters")
    duration_rows: float = opt(0.0, "share of rows whose two speed rows tell the number of codes instead; 0: off")
    freeze: str = opt("", "in full fine-tuning: conditioning keeps the encoders of voice and emotion as they are",
                      choices=("", "conditioning"))

    def __post_init__(self):
        check(self, mixed_ratio=0, dropout=0, duration_rows=0)
        for name in ("mixed_ratio", "dropout", "duration_rows"):
            if (getattr(self, name) or 0) > 1:
                raise Invalid(f"{name} is {getattr(self, name)}, expected a share from 0 to 1")


@dataclass
class Sampling:
    """What `generate` takes besides text, prompts, speaker and seed."""

    temperature: float = opt(0.8, "randomness of the codes; 0 takes the likeliest ones")
    top_k: int = opt(30, "sample among so many likeliest codes; 0: all")
    top_p: float = opt(0.8, "sample among the likeliest codes that together have this probability; 1: all")
    num_beams: int = opt(3, "beams of the search; 1: none")
    repetition_penalty: float | None = opt(None, "how much less likely used codes are; none: 10, and 1 with temperature 0")
    length_penalty: float = opt(0.0, "a beam's score is divided by its length to this power; 0: the sum counts")
    mel_positions: str = opt("", "of codes: upstream 0, 2, 3 .., training 0, 1, 2 ..; empty: training once tuned",
                             choices=("", "upstream", "training"))
    diffusion_steps: int = opt(25, "Euler steps from noise to mel", most=1000)
    cfg_rate: float = opt(0.7, "weight of the guidance by prompt and content; 0: none, in half the time")
    duration_factor: float = opt(1.0, "1.1 speaks a tenth slower: 1.72 mel frames per code times this")
    max_text_tokens_per_segment: int = opt(120, "longer texts are cut at sentence ends into segments of so many pieces")
    interval_silence: int = opt(200, "milliseconds of silence between segments")
    emo_audio: str = opt("", "clip whose emotion is taken instead of the prompt's")
    emo_vector: list[float] = opt([], "emotion as 8 numbers: happy, angry, sad, afraid, disgusted, melancholic, surprised, calm")
    emo_alpha: float = opt(1.0, "how much of the emotion: between the prompt's own, 0, and that of clip or numbers, 1")
    emo_normalize: bool = opt(False, "weigh emo_vector as the published interface does: some emotions less, the sum at most 0.8")
    emo_text: str = opt("", "emotion in words: not possible here, say it with emo_vector")
    use_random: bool = opt(False, "with emo_vector: any voice of the stored emotions instead of the most similar one")
    low_vram: bool = opt(False, "only one of the models is on the GPU at a time: slower, and sound comes at the end")
    min_len: int = opt(0, "codes (20 ms) before which a segment cannot end")
    max_len: int | None = opt(None, "codes of a segment at most; none: 1500, or what the table of positions holds")
    retries: int = opt(0, "tries with the next seed when a take is empty or does not end by itself")

    def __post_init__(self):
        check(self, temperature=0, top_k=0, top_p=0, num_beams=1, diffusion_steps=1, cfg_rate=0)
        check(self, max_text_tokens_per_segment=2, interval_silence=0, emo_alpha=0)
        check(self, min_len=0, max_len=1, retries=0)
        wrong = []
        for name in ("top_p", "repetition_penalty", "duration_factor"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                wrong.append(f"{name} is {value}, expected more than 0")
        if self.emo_text:
            wrong.append("emo_text: emotion in words needs a language model of its own "
                         "(qwen0.6bemo4-merge), which is not read here; say it with "
                         f"emo_vector, 8 numbers for {', '.join(EMOTIONS)}")
        if wrong:
            raise Invalid("; ".join(wrong))

    @property
    def penalty(self):
        if self.repetition_penalty is not None:
            return self.repetition_penalty
        return 10.0 if self.temperature > 0 else 1.0


def check_vector(vector, name="emo_vector"):
    """8 weights of the emotions, at least 0 and together at most 1; what is left is the prompt's own."""
    if len(vector) != len(EMOTIONS):
        raise Invalid(f"{name} has {len(vector)} numbers, expected {len(EMOTIONS)}: {', '.join(EMOTIONS)}")
    values = [float(x) for x in vector]
    total = sum(values)
    if not all(math.isfinite(x) and x >= 0 for x in values):
        raise Invalid(f"{name} is {values}; expected numbers of at least 0")
    if total > 1 + 1e-6:
        raise Invalid(f"{name} adds up to {total:g}, expected at most 1, of which the published interface "
                      f"allows {EMOTION_SUM}. "
                      "Make the numbers smaller, or let emo_normalize do it")
    return values


def normalized(vector):
    """The published interface's weighing of an emotion vector."""
    values = [x * bias for x, bias in zip(vector, EMOTION_BIAS)]
    total = sum(values)
    return [x * EMOTION_SUM / total for x in values] if total > EMOTION_SUM else values


# ------------------------------------------------------------------------------------------------ modules


class Attention(nn.Module):
    """q, k and v from one layer. In the file both weights are stored the other way round, [in, out]."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def forward(self, x, mask, dropout=0.0, cache=None):
        """mask: a Packing, or bool (B, 1, L, L). A cache is given the keys and values of x."""
        B, L, C = x.shape
        q, k, v = self.c_attn(x).view(B, L, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (B, H, L, D) each
        if isinstance(mask, Packing):
            q, k, v = (mask.unpack(t) for t in (q, k, v))
            y = mask.pack(F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True))
        else:
            if cache is not None:
                cache.k[:, :, :L], cache.v[:, :, :L] = k, v
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.c_proj(y.transpose(1, 2).reshape(B, L, C))


class FeedForward(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.c_fc = nn.Linear(width, inner)
        self.c_proj = nn.Linear(inner, width)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """A block of GPT-2."""

    def __init__(self, config):
        super().__init__()
        C = config.model_dim
        self.ln_1 = nn.LayerNorm(C)
        self.attn = Attention(C, config.heads)
        self.ln_2 = nn.LayerNorm(C)
        self.mlp = FeedForward(C, config.inner)

    def forward(self, x, mask, dropout=0.0, cache=None):
        x = x + F.dropout(self.attn(self.ln_1(x), mask, dropout, cache), dropout)
        return x + F.dropout(self.mlp(self.ln_2(x)), dropout)


class GPT(nn.Module):
    """GPT-2 without embeddings. (B, L, C) -> (B, L, C), after its own last norm; IndexTTS2 puts a second one
    behind."""

    def __init__(self, config):
        super().__init__()
        self.h = nn.ModuleList([Block(config) for _ in range(config.layers)])
        self.ln_f = nn.LayerNorm(config.model_dim)
        self.config, self.recompute = config, False

    def forward(self, x, mask, dropout=0.0, caches=None):
        x = F.dropout(x, dropout)
        for i, block in enumerate(self.h):
            if recomputes(i, self.training and self.recompute):
                x = recomputed(block, x, mask, dropout, use_reentrant=False)
            else:
                x = block(x, mask, dropout, caches[i] if caches else None)
        return self.ln_f(x)

    def caches(self, rows, columns, like):
        c = self.config
        return [Cache((rows, c.heads, columns, c.model_dim // c.heads), like) for _ in self.h]


class PositionTable(nn.Module):
    def __init__(self, rows, width):
        super().__init__()
        self.emb = table(rows, width)


def table(rows, width):
    """An nn.Embedding that draws nothing: its own draw imports a compiler on the meta device."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


CONDITIONING = ("conditioning_encoder", "perceiver_encoder",  # of the voice
                "emo_conditioning_encoder", "emo_perceiver_encoder", "emovec_layer", "emo_layer")


class Draw(NamedTuple):
    """What collate draws for a row."""

    same: bool  # its prompt is the clip itself
    timed: bool  # its speed rows tell how many codes it has


class Request(NamedTuple):
    """What a call of generate asks for, heard and cut."""

    segments: list  # text ids of each
    reference: speech_chain.Reference
    conds: torch.Tensor  # (N + 2, D), the positions in front of every text
    noise: list | None


class Job(NamedTuple):
    """One segment to speak."""

    prefix: torch.Tensor  # (positions, D): conds and text
    generator: torch.Generator
    cap: int  # codes at most
    rule: str = "upstream"  # of the positions of its codes, see positions_rule
    slot: int | None = None  # of its adapter, where there are several


class IndexTTS2(nn.Module):
    backbone = "indextts2"
    namings = ("indextts2",)
    adapter_namings = {"peft": "indextts2"}
    native_adapter = "peft"
    lora_dropout_after = False
    speaker_input = False
    naming = "indextts2"
    embeddings = ("text_embedding", "mel_embedding")  # what lora.train_embeddings trains

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        C = c.model_dim
        self.conditioning_encoder = Conformer(c.conditioning_encoder)
        self.perceiver_encoder = Resampler(c.perceiver_encoder)
        self.speed_emb = table(2, C)
        self.emo_conditioning_encoder = Conformer(c.emo_conditioning_encoder)
        self.emo_perceiver_encoder = Resampler(c.emo_perceiver_encoder)
        self.text_embedding = table(c.text_rows, C)
        self.emo_layer = nn.Linear(C, C)
        self.emovec_layer = nn.Linear(c.emo_perceiver_encoder.width, C)
        self.mel_embedding = table(c.number_mel_codes, C)
        self.gpt = GPT(c)
        self.mel_pos_embedding = PositionTable(c.mel_rows, C)
        self.text_pos_embedding = PositionTable(c.text_positions, C)
        self.final_norm = nn.LayerNorm(C)
        self.text_head = nn.Linear(C, c.text_rows)
        self.mel_head = nn.Linear(C, c.number_mel_codes)
        # What a bias adds to every key alike, the softmax takes off again.
        names = [name for name, _ in self.named_parameters()]
        self.idle_in_losses = tuple(name for name in names if name.endswith("self_attn.linear_k.bias"))
        self.max_length = c.latents + 2 + c.text_positions + c.mel_rows - 1
        self.finish, self.speakers = [], {}
        self.path = self.fingerprint = ""
        self.left_unused = []
        self._frozen, self.tokenizer, self.files, self.training_options = [], None, {}, Training()
        self.sample_rate = self.out_sample_rate = 0
        self.terms = {}  # the folder's glossary
        self.tuned = False  # as config.yaml says: then speaking takes the trained positions
        self.tokenizer_crc, self._codec_key, self._tables = 0, None, None

    def equip(self, codec, tokenizer, files, options):
        """Give the model what does not come with its weights: the frozen chain, the tokenizer, {role: path}
        of what `save`
        copies, and Training's options. `load` and `blank` call this."""
        self._frozen, self.tokenizer, self.files = [codec], tokenizer, files
        self.sample_rate = self.out_sample_rate = codec.sample_rate
        self.tuned = bool(codec.places.config.get("tuned"))
        for role in ("tokenizer", "glossary"):
            if role in files:
                self.tokenizer_crc = zlib.crc32(files[role].read_bytes(), self.tokenizer_crc)
        if "glossary" in files:
            self.terms = yaml.safe_load(files["glossary"].read_text(encoding="utf-8")) or {}
        if len(tokenizer) > self.config.text_rows:
            raise Invalid(f"{tokenizer.name} has {len(tokenizer)} pieces, the weights have "
                          f"{self.config.text_rows} rows of text; "
                          "they belong to different checkpoints")
        self.training_options = Training(**options)
        self.freeze()

    # ----------------------------------------------------------------------------- data: text, audio, batches

    @property
    def codec(self):
        return self._frozen[0]  # in a list, so that it is neither trained nor saved nor cast with the model

    @property
    def device(self):
        return self.mel_head.weight.device

    @property
    def dtype(self):
        return self.mel_head.weight.dtype

    def encode_text(self, text, speaker=None):
        """Ids of the whole text, upper case, marks simplified. Numbers stay digits. Who speaks is no part of
        it."""
        refuse_blank(text)
        return self.tokenizer.encode(front.prepare(text, self.terms))

    def segments(self, text, most):
        """Ids of each segment of a text, of at most `most` pieces."""
        pieces = self.tokenizer.pieces(front.prepare(text, self.terms)) if text else []
        return [[self.tokenizer.id(piece) for piece in segment] for segment in front.segments(pieces, most)]

    def check_known(self, text, ids):
        """A text of which the vocabulary knows nothing is an error, a part that it does not know is said."""
        unknown = self.tokenizer.unk_id
        self.check_any_known(text, ids)
        if unknown in ids:
            spelled = set(front.prepare(text, self.terms)) - {" "}
            odd = sorted(ch for ch in spelled if unknown in self.tokenizer.encode(ch + ch))
            warnings.warn(f"text {text!r}: the vocabulary has no piece for {' '.join(odd) or 'a part of it'}")

    def check_any_known(self, text, ids):
        says_nothing = (self.tokenizer.unk_id, self.tokenizer.vocab.get("▁"))
        if all(i in says_nothing for i in ids):
            raise Invalid(f"text {text!r} has no piece that the vocabulary of {self.tokenizer.name} knows")

    def encode_audio(self, source, start=None, end=None):
        """{codes (T,) int16, features (T, F), style (S,)} of a path or of (n,) samples at `sample_rate`. The
        features are
        those that it has as a prompt: of a longer clip, those of its first 15 s."""
        wave = source if torch.is_tensor(source) else audio.read(source, self.sample_rate, start, end)[0]
        chain = self.codec
        low = chain.low_rate(wave)
        features = chain.features(low)
        codes = chain.codes(features)
        if len(wave) > PROMPT_SECONDS * self.sample_rate:
            low = chain.low_rate(wave[: PROMPT_SECONDS * self.sample_rate])
            features = chain.features(low)
        with chain.on("campplus") as model:
            style = model.embed(low).cpu()
        return {"codes": codes.to(torch.int16), "features": features, "style": style}

    def _clip(self, source, start=None, end=None):
        """What encode_audio gives, of a path, samples, or what it gave."""
        if isinstance(source, dict):
            return source
        if torch.is_tensor(source) and source.ndim == 2:
            raise Invalid("codes alone: this backbone also needs what the voice is taken from. Give the "
                          "path or the samples, "
                          "or what encode_audio makes of them")
        return self.encode_audio(source, start, end)

    def encode(self, row):
        """{text (Lt,), codes (Lm,)} of a row, and what its voice and emotion are taken from.

        Where encoders are trained that is `features` (T, F) and `emo_features`, else what they make of them:
        `spk` (N, D)
        and `emovec` (D,). With condition mixed, self_features or self_spk besides.
        """
        if row.get("turns"):
            raise Invalid("conversations: this backbone learns single clips; cut the turns into rows")
        if "codes" in row:
            return self._prepared(row)
        clip = self._clip(row["audio"], row.get("start"), row.get("end"))
        text = row.get("text") or ""
        ids = self.encode_text(text)
        self._check_row(text, ids, clip["codes"])
        other = self._clip(row["ref_audio"]) if is_given(row.get("ref_audio")) else None
        condition = self.training_options.condition
        prompt = clip if other is None or condition == "same" else other
        example = {"text": torch.tensor(ids), "codes": clip["codes"].long(), "features": prompt["features"]}
        example |= self._emotion(row.get("emotion"), clip, prompt)
        if condition == "mixed" and other is not None:
            example["self_features"] = clip["features"]
        return example if self.live else self.conditioned(example)

    def _prepared(self, row):
        """The example of a row that another trainer encoded into .npy files: text ids, codes, latents of the
        voice, emotion."""
        missing = [key for key in ("text_ids", "codes", "condition", "emo_vec") if key not in row]
        if missing:
            raise Invalid(f"a row with codes_path lacks {', '.join(key + '_path' for key in missing)}")
        c = self.config
        arrays = {key: read_array(row[key]) for key in ("text_ids", "codes", "condition", "emo_vec")}
        shapes = {"condition": (c.latents, c.model_dim), "emo_vec": (c.model_dim,)}
        for key, shape in shapes.items():
            if tuple(arrays[key].shape) != shape:
                raise Invalid(f"{row[key]} is {list(arrays[key].shape)}, this model needs {list(shape)}; "
                              "was it made with another checkpoint?")
        text, codes = (arrays[key].flatten().long() for key in ("text_ids", "codes"))
        for key, ids, most in (("text_ids", text, c.text_rows), ("codes", codes, c.start_mel_token)):
            if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < most:
                raise Invalid(f"{row[key]} holds {int(ids.min())} to {int(ids.max())}, expected 0 to "
                              f"{most - 1}, without start and stop")
        self._check_lengths(text, codes)
        voice = {"spk": arrays["condition"].float(), "emovec": arrays["emo_vec"].float()}
        return {"text": text, "codes": codes, **voice}

    def _check_row(self, text, ids, codes):
        if not ids:
            raise Invalid(f"text {text!r} is empty")
        self.check_any_known(text, ids)
        self._check_lengths(ids, codes)

    def _check_lengths(self, ids, codes):
        c = self.config
        if len(ids) > c.text_positions - 2:
            raise Invalid(f"the text has {len(ids)} pieces, the table of positions holds "
                          f"{c.text_positions - 2}; cut the row in two")
        if len(codes) > c.mel_rows - 2:
            raise Invalid(f"the clip has {len(codes)} codes "
                          f"({len(codes) / speech_chain.CODES_PER_SECOND:.1f} s), the table of positions "
                          "holds "
                          f"{c.mel_rows - 2}; cut it (prepare_data.py --slice)")

    def _emotion(self, emotion, clip, prompt):
        """What the emotion of a row is taken from: its own clip, another file, or 8 numbers of the stored
        emotions."""
        if emotion is None:
            return {"emo_features": clip["features"]}
        if isinstance(emotion, str):
            return {"emo_features": self.codec.emotion(emotion)}
        vector = check_vector(emotion)
        stored = self.stored_emotion(vector, prompt["style"])
        share = torch.tensor([1 - sum(vector)])
        return {"emo_features": prompt["features"], "emo_add": stored, "emo_share": share}

    def stored_emotion(self, vector, style, generator=None):
        """sum of w_e x row_e, (D,): of each emotion the stored row whose voice is most like `style`, or any
        with a generator."""
        voices, rows = self.emotion_tables()
        total = torch.zeros(rows[0].shape[1])
        for weight, voice, row in zip(vector, voices, rows):
            if generator is None:
                i = int(F.cosine_similarity(style[None].float(), voice, dim=1).argmax())
            else:
                i = int(torch.randint(len(row), (1,), generator=generator))
            total += weight * row[i]
        return total

    def emotion_tables(self):
        """(voices, emotions): for each of the 8 emotions the stored voices (n, S) and what the GPT reads (n,
        D)."""
        if self._tables is None:
            places = self.codec.places
            parts = []
            for key, default in (("spk_matrix", "feat1.pt"), ("emo_matrix", "feat2.pt")):
                path = places.file(key, default)
                values = checkpoint.read_pickle(path)
                numbers = need(places.config, "emo_num", list[int], [])
                counted = len(numbers) == len(EMOTIONS) and min(numbers) >= 0
                if not torch.is_tensor(values) or not counted or sum(numbers) != len(values):
                    raise Invalid(f"{path}: expected a table whose rows are the emo_num of config.yaml, "
                                  f"which is {numbers}")
                parts.append(values.float().split(numbers))
            self._tables = parts
        return self._tables

    def blank_example(self, seconds, tokens):
        """What `encode` makes of a clip, without content: for counting memory."""
        c, codes = self.config, round(self.frame_rate * seconds)
        example = {"text": torch.ones(tokens, dtype=torch.long),
                   "codes": torch.zeros(codes, dtype=torch.long)}
        if self.live:  # a frame for each code
            features = torch.zeros(codes, c.conditioning_encoder.features)
            return example | {"features": features, "emo_features": features}
        return example | {"spk": torch.zeros(c.latents, c.model_dim), "emovec": torch.zeros(c.model_dim)}

    def length(self, example):
        """Positions of the GPT as upstream counts them: voice, two speed rows, text and codes with their
        marks."""
        return self.config.latents + 2 + len(example["text"]) + 2 + len(example["codes"]) + 2

    def collate(self, examples, seeds=None):
        """Batch and counts. Drawn per row, from its own seed: with condition mixed, whether the prompt is
        the clip itself
        (`same`); with duration_rows, whether the speed rows tell the length. seeds=None: fixed by content,
        the first no.
        """
        c = self.config
        start_text, stop_text = torch.tensor([c.start_text_token]), torch.tensor([c.stop_text_token])
        start_mel, stop_mel = torch.tensor([c.start_mel_token]), torch.tensor([c.stop_mel_token])
        parts = {"text": [], "text_pos": [], "text_labels": [], "codes": [], "mel_pos": [], "mel_labels": []}
        for e in examples:
            text, codes = e["text"], e["codes"]
            parts["text"].append(torch.cat([start_text, text, stop_text]))
            parts["text_pos"].append(torch.arange(len(text) + 2))
            parts["text_labels"].append(torch.cat([text, stop_text]))
            parts["codes"].append(torch.cat([start_mel, codes]))  # the stop code is predicted, not read
            parts["mel_pos"].append(torch.arange(len(codes) + 1))
            parts["mel_labels"].append(torch.cat([codes, stop_mel]))
        batch = {name: torch.cat(rows) for name, rows in parts.items()}
        batch |= self._places(examples)
        batch |= self._voices(examples)
        draws = [self._draw(None if seeds is None else seeds[b]) for b in range(len(examples))]
        if "self_spk" in batch or "self_features" in batch:
            batch["same"] = torch.tensor([draw.same for draw in draws])
        if self.training_options.duration_rows:
            lengths = torch.tensor([len(e["codes"]) for e in examples])
            batch["duration"] = lengths * torch.tensor([draw.timed for draw in draws])
        return batch, self.counts(batch)

    def _draw(self, seed):
        """What is drawn for one row."""
        o = self.training_options
        if seed is None:
            return Draw(False, False)
        same, timed = torch.rand(2, generator=torch.Generator().manual_seed(seed)).tolist()
        return Draw(same < o.mixed_ratio, timed < o.duration_rows)

    def _places(self, examples):
        """Where each embedding stands among the packed positions, and which positions predict text and codes.

        The embeddings come as all conds, all texts, all codes; `order` brings them into rows, one by one.
        """
        heads = self.config.latents + 2
        texts = [len(e["text"]) + 2 for e in examples]
        codes = [len(e["codes"]) + 1 for e in examples]
        first_text = len(examples) * heads
        first_code = first_text + sum(texts)
        order, text_rows, mel_rows, at = [], [], [], 0
        for b, (n_text, n_codes) in enumerate(zip(texts, codes)):
            order.append(torch.arange(heads) + b * heads)
            order.append(torch.arange(n_text) + first_text)
            order.append(torch.arange(n_codes) + first_code)
            text_rows.append(torch.arange(n_text - 1) + at + heads)
            mel_rows.append(torch.arange(n_codes) + at + heads + n_text)
            first_text += n_text
            first_code += n_codes
            at += heads + n_text + n_codes
        sizes = [heads + n_text + n_codes for n_text, n_codes in zip(texts, codes)]
        L = max(sizes)
        place = torch.cat([b * L + torch.arange(size) for b, size in enumerate(sizes)])
        rows = {"text_rows": torch.cat(text_rows), "mel_rows": torch.cat(mel_rows)}
        return {"order": torch.cat(order), "place": place, **rows, "B": len(examples), "L": L}

    def _voices(self, examples):
        """Voice and emotion of each row: what the encoders made of them, or features padded to the longest,
        with their lengths."""
        out = {}
        for cached, fresh in (("spk", "features"), ("emovec", "emo_features"), ("self_spk", "self_features")):
            kind = self._kind(examples, cached, fresh)
            if kind == cached:
                # a row that names no other clip has its own as the prompt already
                fallback = cached.removeprefix("self_")
                out[cached] = torch.stack([e[cached] if cached in e else e[fallback] for e in examples])
            elif kind == fresh:
                clips = [e[fresh] if fresh in e else e["features"] for e in examples]
                out[fresh] = nn.utils.rnn.pad_sequence(clips, batch_first=True)
                out[fresh + "_lengths"] = torch.tensor([len(clip) for clip in clips])
        if any("emo_add" in e for e in examples):
            nothing = torch.zeros(self.config.model_dim)
            out["emo_add"] = torch.stack([e.get("emo_add", nothing) for e in examples])
            out["emo_share"] = torch.stack([e.get("emo_share", torch.ones(1)) for e in examples])
        return out

    def _kind(self, examples, cached, fresh):
        """Which of the two names these examples hold; None where a row need not have either."""
        has = {name for e in examples for name in (cached, fresh) if name in e}
        if len(has) > 1:
            raise Invalid(f"some rows of a batch hold {cached} and others {fresh}; encode all of them with "
                          "the same model")
        if cached in has and self.adapted:
            raise Invalid("the adapter reaches into the conditioning encoders, but these rows hold "
                          f"{cached}, which the encoders made "
                          "before: it would never be trained. Encode the rows again from their recordings, "
                          "or leave the encoders out "
                          "of lora.target_modules")
        if not has and not cached.startswith("self_"):
            raise Invalid(f"a row has neither {cached} nor {fresh}; encode makes them from the recording")
        return has.pop() if has else None

    def conditioning(self):
        """The modules whose output is cached unless they are trained."""
        return [getattr(self, name) for name in CONDITIONING]

    @property
    def live(self):
        """Whether the conditioning encoders are trained, in full or by an adapter, and so must run in every
        step."""
        return any(p.requires_grad for module in self.conditioning() for p in module.parameters())

    @property
    def adapted(self):
        return any(hasattr(m, "lora_A") for module in self.conditioning() for m in module.modules())

    def counts(self, batch):
        text, mel = len(batch["text_labels"]), len(batch["mel_labels"])
        return {"loss/text": text, "loss/mel": mel, "metric/mel_accuracy": mel}

    # ---------------------------------------------------------------------------------- conditioning

    def voice_latents(self, features, lengths):
        """(B, T, F) -> (B, N, D)"""
        frames, mask = self.conditioning_encoder(features.to(self.dtype), lengths)
        return self.perceiver_encoder(frames, mask)

    def emotion_vector(self, features, lengths):
        """(B, T, F) -> (B, D). No activation stands between the two layers."""
        frames, mask = self.emo_conditioning_encoder(features.to(self.dtype), lengths)
        latent = self.emo_perceiver_encoder(frames, mask)[:, 0]
        return self.emo_layer(self.emovec_layer(latent))

    def _alone(self, encoder, features):
        """What an encoder makes of one clip (T, F)."""
        if len(features) < SMALLEST:
            raise Invalid(f"a prompt of {len(features)} frames of 20 ms; the encoders need {SMALLEST}")
        return encoder(features[None].to(self.device), torch.tensor([len(features)], device=self.device))[0]

    @torch.no_grad()
    def conditioned(self, example):
        """An example with the encoders' output in the place of what they read."""
        out = {k: v for k, v in example.items() if not k.endswith("features") and not k.startswith("emo_")}
        out["spk"] = self._alone(self.voice_latents, example["features"]).float().cpu()
        if "self_features" in example:
            out["self_spk"] = self._alone(self.voice_latents, example["self_features"]).float().cpu()
        emovec = self._alone(self.emotion_vector, example["emo_features"]).float().cpu()
        if "emo_add" in example:
            emovec = example["emo_add"] + example["emo_share"] * emovec
        return out | {"emovec": emovec}

    def _conds(self, batch):
        """(B, N + 2, D): voice with the emotion added to each latent, then two rows for the speed, the
        second one first."""
        def voice(prefix=""):
            if prefix + "spk" in batch:
                return batch[prefix + "spk"].to(self.dtype)
            return self.voice_latents(batch[prefix + "features"], batch[prefix + "features_lengths"])

        spk = voice()
        if "same" in batch:
            spk = torch.where(batch["same"][:, None, None], voice("self_"), spk)
        if "emovec" in batch:
            emovec = batch["emovec"].to(self.dtype)
        else:
            emovec = self.emotion_vector(batch["emo_features"], batch["emo_features_lengths"])
        if "emo_add" in batch:
            emovec = batch["emo_add"].to(self.dtype) + batch["emo_share"].to(self.dtype) * emovec
        return torch.cat([spk + emovec[:, None], self._speed(batch, len(spk))], 1)

    def _speed(self, batch, B):
        """(B, 2, D). With duration rows, half of the codes and all of them, as the table of mel positions
        has them."""
        speed = self.speed_emb.weight.flip(0).to(self.dtype).expand(B, -1, -1)
        if "duration" not in batch:
            return speed
        codes = batch["duration"]
        rows = self.mel_pos_embedding.emb(torch.stack([codes // 2, codes], 1)).to(self.dtype)
        return torch.where((codes > 0)[:, None, None], rows, speed)

    # ---------------------------------------------------------------------------------- training

    def forward(self, batch):
        """Sums of the cross-entropies of the next text id and of the next code, over their positions."""
        conds = self._conds(batch).flatten(0, 1)
        text = self._text(batch["text"], batch["text_pos"])
        codes = self._codes(batch["codes"], batch["mel_pos"])
        x = torch.cat([conds, text, codes])[batch["order"]][None]  # (1, P, D)
        packing = Packing(batch["place"], batch["B"], batch["L"])
        h = self.gpt(x, packing, self._dropout())[0]
        text = self.text_head(self.final_norm(h[batch["text_rows"]])).float()
        mel = self.mel_head(self.final_norm(h[batch["mel_rows"]])).float()
        right = mel.detach().argmax(-1) == batch["mel_labels"]
        return {"loss/text": F.cross_entropy(text, batch["text_labels"], reduction="sum"),
                "loss/mel": F.cross_entropy(mel, batch["mel_labels"], reduction="sum"),
                "metric/mel_accuracy": right.float().sum()}

    def _text(self, ids, positions):
        return (self.text_embedding(ids) + self.text_pos_embedding.emb(positions)).to(self.dtype)

    def _codes(self, codes, positions):
        return (self.mel_embedding(codes) + self.mel_pos_embedding.emb(positions)).to(self.dtype)

    def _dropout(self):
        """What the GPT drops now. GPT-2's own 0.1 is for full tuning; an adapter has a dropout of its own."""
        if not self.training:
            return 0.0
        if self.training_options.dropout is not None:
            return self.training_options.dropout
        return 0.0 if any(hasattr(m, "lora_A") for m in self.modules()) else 0.1

    def sample_request(self, row):
        """What a validation sample of a row is conditioned on, besides its text."""
        request = {"prompts": [(None, row.get("ref_audio") or row.get("audio"), None)]}
        if isinstance(row.get("emotion"), str):
            request["emo_audio"] = row["emotion"]
        elif row.get("emotion"):
            request["emo_vector"] = row["emotion"]
        return request

    @property
    def frame_rate(self):
        """Codes per second of sound, as speaking stretches them: 50.08 for a rate of 50."""
        settings = self.codec.settings
        return settings["rate"] / settings["hop"] / STRETCH

    def set_recompute(self, every):
        """Activation checkpointing of every n-th layer, 0 of none. Of all: a fifth to a third more time for
        most of the activation memory."""
        self.gpt.recompute = every

    def stacks(self):
        return [self.gpt]

    def blocks(self):
        """The modules that torch.compile takes one by one."""
        return list(self.gpt.h)

    def lora_targets(self, settings):
        """With no word given: attention and feed-forward of the GPT."""
        for key in ("enable_lm", "enable_dit", "enable_proj"):
            if getattr(settings, key) is not None:
                raise Invalid(f"lora.{key}: this backbone is chosen by lora.target_modules: c_attn, c_proj, "
                              "c_fc, text_head, mel_head, and, in the "
                              "encoders, linear_q .., w_1, w_2, pointwise_conv1, to_q .., proj_context, "
                              "emo_layer, emovec_layer")
        return [n for n, m in self.named_modules() if isinstance(m, nn.Linear) and n.startswith("gpt.h.")]

    def freeze(self):
        """What training_options.freeze names keeps its weights: requires_grad of every parameter is set."""
        for name, p in self.named_parameters():
            conditioning = name.startswith(CONDITIONING)
            p.requires_grad = not (conditioning and self.training_options.freeze == "conditioning")

    # ---------------------------------------------------------------------------------- generation

    def positions_rule(self, s, slot=None):
        """upstream or training: as asked, else by whether this is still the published checkpoint."""
        if s.mel_positions:
            return s.mel_positions
        state = self.__dict__.get("lora_state")
        adapted = state is not None and state.settings is not None and state.acting != 0
        if slots.of(self):
            adapted = slot is not None
        changed = self.tuned or adapted or checkpoint.fingerprint(self) != self.fingerprint
        return "training" if changed else "upstream"

    def _prompt(self, prompts):
        """The one recording whose voice is taken."""
        if self.codec.drawn and not prompts:
            prompts = [(None, self.codec.noise(), None)]
        if len(prompts) != 1:
            raise Invalid(f"{len(prompts)} prompts: this backbone takes the voice from exactly one "
                          "recording, without a transcript: "
                          "prompts=[(None, audio, None)], or --reference_audio")
        text, source, _ = prompts[0]
        if text is not None:
            raise Invalid("a prompt with a transcript: this backbone does not continue a recording, it "
                          "takes the voice of one; "
                          "leave the text out, give None, or use --reference_audio")
        if source is None:
            raise Invalid("the prompt has no audio; expected a path, or samples (n,) at sample_rate")
        return source

    def _request(self, text, prompts=(), speaker=None, seed=None, noise=None, s=None, **emotion):
        """What one call asks for. emotion: emo_audio, emo_vector, emo_alpha; those not given are taken from
        `s`."""
        s = s or Sampling()
        unknown = set(emotion) - {"emo_audio", "emo_vector", "emo_alpha"}
        if unknown:
            raise Invalid(f"unknown in a request: {', '.join(sorted(unknown))}")
        source = self._prompt(prompts)
        segments = self._spoken(text, s)
        if s.max_len is not None and s.max_len > self.config.most_codes:
            raise Invalid(f"max_len is {s.max_len}; the table of positions of this checkpoint holds "
                          f"{self.config.most_codes} codes")
        seconds = self.codec.too_long(source)
        if seconds:
            warnings.warn(f"the prompt lasts {seconds:.1f} s; only its first {PROMPT_SECONDS} s are used, "
                          "as in training")
        seed = int.from_bytes(os.urandom(6), "little") if seed is None else seed
        self.codec.to(self.device)
        reference = self.codec.reference(source)
        spk = self._alone(self.voice_latents, reference.features)
        emovec = self._spoken_emotion(reference, seed, s, emotion)
        speed = self.speed_emb.weight.flip(0).to(self.dtype)
        conds = torch.cat([spk + emovec.to(spk.dtype), speed])
        return dict(segments=segments, reference=reference, conds=conds, seed=seed, noise=noise)

    def _slotted(self, s, wanted, slot):
        """A _request that is heard and spoken by the adapter of this slot, where there are several."""
        with slots.acting(self, [slot]):
            return dict(self._request(s=s, **wanted), slot=slot)

    def _spoken(self, text, s):
        """Text ids of each segment."""
        refuse_blank(text)
        segments = self.segments(text, min(s.max_text_tokens_per_segment, self.config.text_positions - 2))
        self.check_known(text, [i for segment in segments for i in segment])
        return segments

    def _spoken_emotion(self, reference, seed, s, given):
        """(D,) float32. A vector goes before a clip; without either the prompt speaks for itself."""
        vector = given.get("emo_vector")
        alpha = given.get("emo_alpha", s.emo_alpha)
        clip = given.get("emo_audio")
        by_vector = vector is not None
        base = self._alone(self.emotion_vector, reference.features).float()
        if by_vector or clip is None:
            other, weight = reference.emotion, 1.0
        else:
            other, weight = self.codec.emotion(clip), alpha
        emovec = base + weight * (self._alone(self.emotion_vector, other).float() - base)
        if not by_vector:
            return emovec
        vector = [float(x) for x in vector]
        if len(vector) == len(EMOTIONS) and s.emo_normalize:
            vector = normalized(vector)
        scale = min(alpha, 1.0)
        if scale != 1.0:
            vector = [int(x * scale * 10000) / 10000 for x in vector]  # cut to four places, as published
        vector = check_vector(vector)
        generator = torch.Generator().manual_seed(seed_of(seed, 0, "emotion")) if s.use_random else None
        stored = self.stored_emotion(vector, reference.style, generator).to(emovec.device)
        return stored + (1 - sum(vector)) * emovec

    def _prefix(self, request, segment):
        """What stands in front of the codes: (N + 2 + Lt + 2, D)."""
        c = self.config
        ids = torch.tensor([c.start_text_token, *segment, c.stop_text_token], device=self.device)
        text = self._text(ids, torch.arange(len(ids), device=self.device))
        return torch.cat([request["conds"].to(text), text])

    @torch.no_grad()
    def _run(self, requests, s):
        """Yields (i, codes (n,)) of every request segment by segment, the k-th segments of all in one batch;
        sets self.finish."""
        finish = self.finish = ["end"] * len(requests)
        places = [request.get("slot") for request in requests]
        rules = {place: self.positions_rule(s, place) for place in set(places)}
        most = min(MOST_CODES, self.config.most_codes) if s.max_len is None else s.max_len
        for k in range(max(len(r["segments"]) for r in requests)):
            rows = [i for i, r in enumerate(requests) if k < len(r["segments"])]
            jobs = []
            for i in rows:
                generator = torch.Generator().manual_seed(seed_of(requests[i]["seed"], k, "codes"))
                prefix = self._prefix(requests[i], requests[i]["segments"][k])
                jobs.append(Job(prefix, generator, most, rules[places[i]], places[i]))
            for i, ending in zip(rows, self._search(jobs, s)):
                if not ending.by_itself:
                    finish[i] = "cap"
                    warnings.warn(f"request {i}: segment {k + 1} reached {most} codes without ending by "
                                  "itself")
                yield i, torch.tensor(ending.codes, dtype=torch.long)
        self.finish = finish

    @torch.inference_mode()
    def _search(self, jobs, s):
        """An Ending for each of the segments that are spoken together."""
        W, cap, c = s.num_beams, max(job.cap for job in jobs), self.config
        speech = Speech(self, [job.prefix for job in jobs], W, cap)
        with slots.acting(self, [job.slot for job in jobs]):
            logits = speech.start()
        beams = [beam.Beams(W, c.stop_mel_token, s.length_penalty) for _ in jobs]
        used = torch.zeros(len(logits), c.number_mel_codes, dtype=torch.bool, device=self.device)
        # Upstream fills the place of voice and text with ones: code 1 and the start code count as used from
        # the start.
        used[:, [1, c.start_mel_token]] = True
        going = list(range(len(jobs)))
        for n in range(cap):
            if n < s.min_len:
                logits[:, c.stop_mel_token] = -math.inf
            scores = self._scores(logits.float(), used, s)
            chosen = []
            kept = self._choose(scores, [(beams[j], jobs[j].generator) for j in going], s)
            for k, j in enumerate(going):
                if not beams[j].done:
                    chosen += [(W * k + parent, code) for parent, code in kept[k]]
            going = [j for j in going if not beams[j].done]
            if not going or n + 1 == cap:
                break
            parents, codes = (list(column) for column in zip(*chosen))
            used = used[parents]
            used[range(len(codes)), codes] = True
            rows = [jobs[j] for j in going for _ in range(W)]
            rules = [job.rule for job in rows]
            positions = [n + (2 if rule == "upstream" else 1) for rule in rules]
            with slots.acting(self, [job.slot for job in rows]):
                logits = speech.step(codes, parents, positions)
        return [b.best() for b in beams]

    def _scores(self, logits, used, s):
        """(R, V) logits, W rows for each text, as what candidates are ranked by before the beams' own scores
        are added."""
        scores = logits if s.num_beams == 1 else logits.log_softmax(-1)
        if s.penalty != 1:
            scores = beam.penalise(scores, used, s.penalty)
        scores[:, self.config.start_mel_token] = -math.inf  # no codec has it, and upstream would fail
        if s.temperature > 0:
            scores = beam.narrow(scores, s.temperature, s.top_k, s.top_p, least=min(2, s.num_beams))
        return scores

    def _choose(self, scores, texts, s):
        """For each of the texts (beams, generator) the (parent, code) of the beams that run on."""
        W, V = s.num_beams, scores.shape[-1]
        total = scores.view(len(texts), W, V)
        if W > 1:
            running = torch.tensor([beams.scores for beams, _ in texts], device=scores.device)
            total = total + running[..., None]
        total = total.flatten(1)
        ranked = total
        if s.temperature > 0:
            noise = torch.stack([beam.gumbel(W * V, generator) for _, generator in texts])
            ranked = total + noise.to(total.device)
        places = ranked.topk(2 * W)[1] if W > 1 else ranked.argmax(1, keepdim=True)
        values, order = total.gather(1, places).sort(1, descending=True)
        places = places.gather(1, order).tolist()
        out = []
        for (beams, _), best, row in zip(texts, values.tolist(), places):
            codes, parents = [p % V for p in row], [p // V for p in row]
            out.append(beams.choose(best, codes, parents))
        return out

    @torch.no_grad()
    def _latents(self, request, segment, codes):
        """(n, D): the state that predicts each of the codes, with the positions that were trained. This
        second pass is
        what S2Mel reads: generation itself may have run on other positions."""
        read = torch.cat([torch.tensor([self.config.start_mel_token]), codes[:-1]]).to(self.device)
        prefix = self._prefix(request, segment)
        x = torch.cat([prefix, self._codes(read, torch.arange(len(read), device=self.device))])
        packing = Packing(torch.arange(len(x), device=self.device), 1, len(x))
        return self.final_norm(self.gpt(x[None], packing)[0, len(prefix) :])

    def _takes(self, requests, s):
        """_run, and again with the next seed for requests with a take that was empty or met its cap."""
        def failed(request, frames, finish):
            return finish == "cap" or not all(len(codes) for codes in frames)

        return takes(self, requests, s, failed)

    def frames(self, text, prompts=(), speaker=None, seed=None, noise=None, **sampling):
        """Codes (n,) int64 of each segment, without the stop code; self.finish is then ["end"] or ["cap"]."""
        s, emotion = self._sampling(sampling)
        for _, codes in self._takes([self._request(text, prompts, speaker, seed, noise, s, **emotion)], s):
            yield codes

    @staticmethod
    def _sampling(values):
        """(Sampling, what of its fields may also be given to one request alone)."""
        plain = {k: v for k, v in values.items() if k not in ("emo_audio", "emo_vector")}
        emotion = {k: values[k] for k in ("emo_audio", "emo_vector") if is_given(values.get(k))}
        return Sampling(**plain), emotion

    def generate(self, text, prompts=(), speaker=None, seed=None, noise=None, **sampling):
        """Audio in chunks (n,) at `out_sample_rate`; joined they are the whole, silence between segments
        with it."""
        request = dict(text=text, prompts=prompts, speaker=speaker, seed=seed, noise=noise)
        for _, chunk in self.generate_batch([request], **sampling):
            yield chunk

    @torch.no_grad()
    def generate_batch(self, requests, **sampling):
        """Yields (i, chunk), segment by segment; a segment comes in chunks of 8, then 256 mel frames."""
        s, emotion = self._sampling(sampling)
        self.codec.low_vram = s.low_vram
        requests = [self._slotted(s, {**emotion, **r}, slot) for r, slot in slots.named(self, requests)]
        spoken = [0] * len(requests)
        pause = torch.zeros(int(self.out_sample_rate * s.interval_silence / 1000))
        for i, codes, states in self._spoken_segments(requests, s):
            k = spoken[i]
            if k and len(pause):
                yield i, pause
            spoken[i] = k + 1
            if len(codes):
                mel = self._mel(requests[i], k, (codes, states), s)
                yield from ((i, chunk) for chunk in self.codec.sound(mel))
            else:
                warnings.warn(f"request {i}: segment {k + 1} ended before its first code, so there is only "
                              "silence; try another seed, or retries")
                yield i, torch.zeros(self.codec.settings["hop"])

    def _spoken_segments(self, requests, s):
        """Yields (i, codes, states) of every segment. With low_vram all of them first, and then the GPT
        leaves the device."""
        def state(i, codes, k):
            with slots.acting(self, [requests[i].get("slot")]):
                return self._latents(requests[i], requests[i]["segments"][k], codes) if len(codes) else None

        counts = [0] * len(requests)
        home, out = self.device, []
        for i, codes in self._takes(requests, s):
            segment = (i, codes, state(i, codes, counts[i]))
            counts[i] += 1
            if s.low_vram and home.type != "cpu":
                out.append(segment)
            else:
                yield segment
        if out:
            self.to("cpu")
            yield from out
            self.to(home)

    def _mel(self, request, k, segment, s):
        """(1, M, frames) of the k-th segment, without the prompt's frames."""
        codes, states = segment
        frames = frames_for(len(codes), STRETCH * s.duration_factor)
        shape = (self.codec.settings["n_mels"], request["reference"].mel.shape[-1] + frames)
        noise = request["noise"]
        if noise is None:
            generator = torch.Generator().manual_seed(seed_of(request["seed"], k, "mel"))
            noise = torch.randn(shape, generator=generator)
        elif k >= len(noise):
            raise Invalid(f"noise holds {len(noise)} segments and segment {k + 1} is asked for; give one "
                          f"({shape[0]}, frames) for each")
        else:
            noise = noise[k]
        if tuple(noise.shape) != shape:
            raise Invalid(f"noise of segment {k + 1} is {list(noise.shape)}, expected {list(shape)}: prompt "
                          "and target frames")
        solver = dict(steps=s.diffusion_steps, cfg_rate=s.cfg_rate)
        return self.codec.mel(speech_chain.Spoken(codes, states, frames), request["reference"], noise, solver)

    # ---------------------------------------------------------------------------------- names and files

    def published_name(self, parameter, naming=None):
        """The name of a parameter in gpt.pth: here its own."""
        return parameter

    def published_rows(self, parameter, naming=None):
        """Row order of the published weight, None where it is ours."""
        return None

    def published_axes(self, parameter):
        """turned for GPT-2's layers, which are stored [in, out]; kernel for convolutions of kernel 1."""
        if transposed(parameter):
            return "turned"
        return "kernel" if kernel_of_one(parameter) else ""

    def adapter_key(self, name):
        """Adapters of trainers for 1.5 are wrapped around upstream's class for generating, which calls the
        GPT transformer."""
        return re.sub(r"^(inference_model\.)?transformer\.", "gpt.", name)

    def adapter_words(self, modules, values):
        """The native adapter is PEFT's, which names modules and needs no words."""
        return values

    def published_state_dict(self, naming=None, merged=False):
        """{published name: tensor} of gpt.pth, in its order of axes. merged adds the adapters, tensor by
        tensor, in float32."""
        out = {name: stored_axes(name, w) for name, w in checkpoint.weights(self, merged).items()}
        for name, buffer in self.named_buffers():
            if name.endswith("pos_enc.pe"):
                out[name] = buffer
        return out

    def save(self, folder, naming=None, merged=False):
        """Write a folder in the published layout. The frozen models are linked where the file system can,
        else copied."""
        if not merged and any(".lora_" in n for n, _ in self.named_parameters()):
            raise Invalid("the model has adapters on: save(merged=True) adds them to the weights, "
                          "lora.save_lora_weights keeps them apart")
        folder, places = Path(folder), self.codec.places
        folder.mkdir(parents=True, exist_ok=True)
        config = dict(places.config)
        if self.positions_rule(Sampling()) == "training":
            config["tuned"] = True  # read here only: speaking takes the positions that were trained
        state = self.published_state_dict(naming, merged)
        state = {name: w.detach().cpu().contiguous() for name, w in state.items()}
        for source, name in places.saved():
            link(source, folder / name)
        save_pickle(folder / places.gpt, state)
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        (folder / "config.yaml").write_text(text, encoding="utf-8")
        return folder

    @property
    def codec_key(self):
        """Names the frozen models and how they are used: cached codes with another key are of others."""
        if self._codec_key is None:
            self._codec_key = f"repcodec-{self.codec.fingerprint()}-{self.sample_rate}"
        return self._codec_key

    @property
    def encode_key(self):
        """Names everything else that `encode` reads: text, whose clip is the prompt, and the encoders where
        their output is kept."""
        encoders = "live"
        if not self.live:
            parts = nn.ModuleDict(zip(CONDITIONING, self.conditioning()))
            encoders = checkpoint.fingerprint(parts)
        return f"{self.codec_key}-{self.tokenizer_crc:08x}-{self.training_options.condition}-{encoders}"


class Speech:
    """The GPT as speaking runs it, a code at a time, for W beams of each text side by side. R = W x texts
    that go on."""

    def __init__(self, model, prefixes, W, steps):
        self.model, self.W = model, W
        start = torch.tensor([model.config.start_mel_token], device=model.device)
        first = model._codes(start, torch.zeros_like(start))
        self.rows = [torch.cat([prefix, first]) for prefix in prefixes]
        lengths = [len(row) for row in self.rows]
        self.batch = LeftPadded(lengths, steps, model.device)
        self.even = len(set(lengths)) == 1
        self.column = self.batch.width

    def start(self):
        """Reads voice, text and the start code. -> logits of the first code (R, V), equal for all beams of a
        text."""
        L, model = self.batch.width, self.model
        x = torch.stack([F.pad(row, (0, 0, L - len(row), 0)) for row in self.rows])
        self.caches = model.gpt.caches(len(x), L, x)
        h = model.gpt(x, self.batch.prompt().mask, caches=self.caches)[:, -1]
        beams = torch.arange(len(x), device=x.device).repeat_interleave(self.W)
        for part in (self.batch, *self.caches):
            part.keep(beams)
        self.make_steps(len(beams))
        return model.mel_head(model.final_norm(h))[beams]

    def make_steps(self, R):
        """What a step of R rows is made of."""
        self.gpt = GPTSteps(self.model.gpt, R)
        self.head = self.gpt.products.of(self.model.mel_head)

    def step(self, codes, parents, positions):
        """codes of the rows that go on, each behind row parents[r] of the step before. -> logits (R, V)"""
        device, n = self.model.device, self.column - self.batch.width
        self.follow(parents, torch.tensor(parents, device=device))
        codes, positions = torch.tensor([codes, positions], device=device)
        x = self.model._codes(codes, positions)
        mask = None if self.even else self.batch.step(n).mask[..., : self.column + 1]
        h = self.gpt(x, self.caches, self.column, mask)
        self.column += 1
        return self.head(self.model.final_norm(h))

    def follow(self, parents, rows):
        """Bring the caches to the rows that go on. Beams of one text share its prefix, so only what was
        spoken moves."""
        before = len(self.batch.pad)
        fewer = len(parents) < before
        moved = parents != list(range(before))
        full = self.column == self.caches[0].k.shape[2]
        if fewer:
            self.batch.keep(rows)
            self.make_steps(len(parents))
        for cache in self.caches:
            if fewer:
                cache.keep(rows)
            elif moved:
                for t in (cache.k, cache.v):
                    spoken = t[:, :, self.batch.width : self.column]
                    spoken.copy_(spoken[rows])
            if full:
                cache.k, cache.v = (F.pad(t, (0, 0, 0, GROWTH)) for t in (cache.k, cache.v))


GROWTH = 256  # columns that a cache grows by: the length of a text in codes is not known before


def is_given(value):
    """Not none, and no empty text or list."""
    return value is not None and (not hasattr(value, "__len__") or len(value) > 0)


def read_array(path):
    """The tensor in a .npy file."""
    try:
        return torch.from_numpy(np.load(path, allow_pickle=False))
    except (OSError, ValueError, TypeError) as e:
        raise Invalid(f"{path} cannot be read as a .npy file of numbers ({e})") from None


def seed_of(seed, segment, what):
    """A seed for each kind of draw of each segment."""
    return zlib.crc32(f"{seed} {segment} {what}".encode())


# ------------------------------------------------------------------------------------------------ files

UNUSED = {  # what trainers leave in gpt.pth
    r"inference_model\..*": "the GPT once more, as upstream's class holds it to generate",
    r"gpt\.wte\.weight": "the table of codes once more, as upstream's class holds it to generate",
    r".*\.lora_.*": "an adapter beside the weights: load it from its folder"}
SECTION = ("model_dim", "layers", "heads", "max_mel_tokens", "max_text_tokens", "number_text_tokens",
           "number_mel_codes", "start_text_token", "stop_text_token", "start_mel_token", "stop_mel_token")
FIXED = {"condition_type": "conformer_perceiver",
         "use_mel_codes_as_input": True,
         "train_solo_embeddings": False}


def stored_axes(name, weight):
    """A weight as the file has it: GPT-2's layers [in, out], the convolutions of kernel 1 with a third axis.
    Its own inverse for GPT-2."""
    if transposed(name):
        return weight.T
    return weight[..., None] if kernel_of_one(name) else weight


def transposed(name):
    return name.startswith("gpt.h.") and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))


def kernel_of_one(name):
    return name.endswith(("pointwise_conv1.weight", "pointwise_conv2.weight"))


def held_axes(name, tensor):
    """A stored tensor as the model holds it."""
    if transposed(name) and len(tensor.shape) == 2:
        return Stored(tensor.shape[::-1], tensor.dtype, lambda: tensor.load().T)
    if kernel_of_one(name) and tensor.shape[2:] == (1,):
        return Stored(tensor.shape[:2], tensor.dtype, lambda: tensor.load()[..., 0])
    return tensor


def recognizes(config):
    """Any IndexTTS, so that load can say which version is read."""
    if config.get("tensors"):
        return {"text_head.weight", "mel_head.weight"} <= set(config["tensors"])
    section = config.get("gpt")
    return isinstance(section, dict) and {"number_mel_codes", "start_mel_token"} <= set(section)


def check_version(config, where):
    """2.0 or an error that says what it is."""
    section, version = config["gpt"], str(config.get("version", ""))
    if version.startswith("2.5") or section.get("spk_cond_mode") == "campplus":
        found = "IndexTTS 2.5: another vocabulary, 25 Hz codes and a voice of one vector"
    elif not {"s2mel", "semantic_codec"} <= set(config):
        found = f"IndexTTS {version or '1.0 or 1.5'}: mel conditioning and a generator of its own, no emotion"
    else:
        wrong = []
        for key, value in FIXED.items():
            if section.get(key, value) != value:
                wrong.append(f"{key} {shown(written(section[key]))}")
        if not wrong:
            return
        found = f"a form of IndexTTS2 that was never published ({', '.join(wrong)})"
    raise Invalid(f"{where} is of {found}. Only IndexTTS 2.0 is read here: IndexTeam/IndexTTS-2.")


def read_config(config, shapes, where):
    """Config from config.yaml and {name: shape} of gpt.pth."""
    section = need(as_record(config, where), "gpt", dict)
    values = {key: need(section, key, int, at_least=0, at_most=LARGEST) for key in SECTION}
    need(section, "layers", int, at_most=LAYERS)
    try:
        for part in ("conditioning_encoder", "emo_conditioning_encoder"):
            values[part] = conformer_size(shapes, part + ".")
        for part in ("perceiver_encoder", "emo_perceiver_encoder"):
            values[part] = resampler_size(shapes, part + ".")
        values["text_rows"] = shapes["text_embedding.weight"][0]
        values["mel_rows"] = shapes["mel_pos_embedding.emb.weight"][0]
        values["text_positions"] = shapes["text_pos_embedding.emb.weight"][0]
        values["inner"] = shapes["gpt.h.0.mlp.c_fc.weight"][1]
        return Config(**values)
    except KeyError as e:
        raise Invalid(f"{where}: the weights have no tensor {e.args[0]}. Is this gpt.pth of "
                      "IndexTTS-2?") from None


def tidy(stored, where):
    """The tensors of gpt.pth without what trainers leave in it; what is left out is said."""
    out, odd = {}, []
    for name, tensor in stored.items():
        plain = name.replace(".base_layer.", ".")
        if plain != name:
            odd.append(name)
        out[plain] = held_axes(plain, tensor)
    if odd:
        print(f"{where}: {len(odd)} names such as {odd[0]} were saved while an adapter was on; read without "
              "it", file=sys.stderr)
    return out


def load(folder, device="cpu", dtype=torch.float32, options=None, extra=None, weights=None,
         allow_unused=False):
    """The model in eval mode from a published folder; the frozen models around it are read when they are
    needed.

    extra: paths of w2v_bert, semantic_codec, campplus and bigvgan, those that were found. weights: another
    file in the place of gpt.pth.
    """
    path = Path(folder)
    folder = path if path.is_dir() else path.parent
    where = folder / "config.yaml"
    if not where.is_file():
        raise Invalid(f"{folder} has no config.yaml, which says what the weights are. Run\n"
                      f"    hf download IndexTeam/IndexTTS-2 --local-dir {folder}")
    config = read_yaml(where)
    check_version(config, where)
    if weights == "scratch":
        raise Invalid("from_scratch: nobody published how IndexTTS2 is trained from nothing; start from "
                      "IndexTeam/IndexTTS-2")
    places = IndexPlaces(folder, config, dict(extra or {}))
    file = path if path.is_file() else folder / (weights or places.gpt)
    if not file.is_file():
        raise Invalid(f"{folder} has no {file.name}, which holds the weights. Run\n    hf download "
                      f"IndexTeam/IndexTTS-2 {file.name} --local-dir {folder}")
    stored = tidy(checkpoint.read(file), file)
    with torch.device("meta"):
        model = IndexTTS2(read_config(config, {n: stored_shape(n, t) for n, t in stored.items()}, where))
    model.left_unused = checkpoint.fill(model, stored, None, UNUSED, dtype=dtype, device=device,
                                        allow_unused=allow_unused, what=str(file))
    if model.left_unused:
        print(f"{file}: {len(model.left_unused)} tensors are left out, such as {model.left_unused[0]}: "
              "copies that trainers leave, or unknown names that were allowed", file=sys.stderr)
    files = places.files()
    model.equip(Chain(places), SentencePiece(files["tokenizer"]), files, options or {})
    return model.eval()


def stored_shape(name, tensor):
    """The shape in the file of a tensor that held_axes may have turned."""
    return tensor.shape[::-1] if transposed(name) else tensor.shape


# Files of the folder besides config.yaml and the weights: role, key in config.yaml, usual name.
OWN_FILES = (("s2mel", "s2mel_checkpoint", "s2mel.pth"), ("statistics", "w2v_stat", "wav2vec2bert_stats.pt"),
             ("voices", "spk_matrix", "feat1.pt"), ("emotions", "emo_matrix", "feat2.pt"),
             ("pinyin", "", "pinyin.vocab"), ("glossary", "", "glossary.yaml"))


class IndexPlaces(Places):
    """Where the files of one checkpoint lie."""

    @property
    def gpt(self):
        return need(self.config, "gpt_checkpoint", str, "gpt.pth")

    @property
    def vocabulary(self):
        return need(need(self.config, "dataset", dict, {}), "bpe_model", str, "bpe.model")

    def files(self):
        """{role: path} of what belongs to the folder and is there. The vocabulary must be."""
        name = self.vocabulary
        path = Path(self.extra.get("tokenizer") or self.folder / name)
        path = path / name if os.path.isdir(path) else path
        if not is_file(path):
            raise Invalid(f"no {shown(name)} at {path.parent}, which cuts text into pieces. Run\n"
                          f"    hf download IndexTeam/IndexTTS-2 {shown(name)} --local-dir {self.folder}")
        found = {"tokenizer": path}
        for role, key, usual in OWN_FILES:
            path = self.folder / need(self.config, key, str, usual)
            if is_file(path):
                found[role] = path
        return found

    def saved(self):
        """[(file or folder, its name in a saved checkpoint)] of everything that is there but config.yaml and
        the weights."""
        own = self.files()
        pairs = [(own.pop("tokenizer"), self.vocabulary), *((path, path.name) for path in own.values())]
        for key, part in speech_chain.PARTS.items():
            if key in self.extra:  # a checkpoint without it is saved without it
                pairs.append((self.extra[key], f"hf_cache/{part.names[0]}"))
        return pairs


def link(source, target):
    """A second name for a file, or for all files of a folder; a copy where the file system has no links."""
    source = Path(source).resolve()  # a hub cache holds links to its files
    if target.exists() and target.samefile(source):
        return
    if source.is_dir():
        for path in sorted(source.iterdir()):
            link(path, target / path.name)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def save_pickle(path, state):
    """A state dict as upstream reads it, under a temporary name first."""
    temporary = path.with_name(path.name + ".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


# --------------------------------------------------------------------------------------- shapes for measuring

# width, layers, heads, rows of text, codes; features; conformers: width, feed-forward, blocks; of the frozen
# models: width, layers
SHAPES = {"tiny": (64, 2, 4, 101, 82, 32, (16, 32, 1), (64, 2)),
          "mid": (512, 6, 8, 4096, 8194, 256, (128, 512, 2), (128, 4)),
          "real": (1280, 24, 20, 12001, 8194, 1024, (512, 2048, 6), (512, 13))}


def shape(size, version=""):
    """(Config, Widths of the frozen models) in the published size, or smaller in nearly the same
    proportions."""
    if version:
        raise Invalid(f"version {version!r}: only IndexTTS2 2.0 is known; leave version out")
    C, layers, heads, text, mel, features, (width, inner, blocks), (part, depth) = SHAPES[size]
    speaker = ConformerSize(features, width, inner, max(1, width // 64), blocks, kernel=15, rows=5000)
    emotion = speaker._replace(heads=max(1, width // 128), blocks=max(1, blocks - 2), inner=inner // 2)
    voice = ResamplerSize(width, C, latents=32, heads=speaker.heads, inner=C * 4 // 3, layers=2)
    mood = voice._replace(width=features, latents=1, heads=emotion.heads, inner=features * 4 // 3)
    config = Config(
        model_dim=C, layers=layers, heads=heads, max_mel_tokens=1815, max_text_tokens=600,
        number_text_tokens=text - 1, number_mel_codes=mel, start_text_token=0, stop_text_token=1,
        start_mel_token=mel - 2, stop_mel_token=mel - 1,
        conditioning_encoder=speaker, perceiver_encoder=voice, emo_conditioning_encoder=emotion,
        emo_perceiver_encoder=mood, text_rows=text, mel_rows=1818, text_positions=602, inner=4 * C)
    return config, speech_chain.Widths(features, mel - 2, C, part, depth)


def draw(model):
    """Random weights: upstream's normal 0.02 for tables and layers, norms one, tables of the encoders
    sinusoids in name only."""
    for name, p in (*model.named_parameters(), *model.named_buffers()):
        if p.ndim > 1:
            nn.init.normal_(p, std=0.02)
        else:
            nn.init.constant_(p, float(not name.endswith("bias")))


def letters():
    """A vocabulary of single letters, as the bytes of a SentencePiece model."""
    pieces = [("<s>", 3), ("</s>", 3), ("<unk>", 2), *((ch, 1) for ch in "▁ABCDEFGHIJKLMNOPQRSTUVWXYZ.")]
    out = b""
    for piece, kind in pieces:
        spelled = piece.encode()
        message = bytes([1 << 3 | 2, len(spelled)]) + spelled + bytes([3 << 3, kind])
        out += bytes([1 << 3 | 2, len(message)]) + message
    return out


def blank(size, version, device, dtype, options=None):
    """A model of a known shape with drawn weights, for measuring only. Its conditioning is frozen, so that
    rows hold what the encoders made, as in a LoRA run; requests without a prompt get noise for one."""
    config, widths = shape(size, version)
    with torch.device("meta"):
        model = IndexTTS2(config)
    model.to_empty(device=device)
    draw(model)
    model.to(dtype)
    options = {"freeze": "conditioning", **(options or {})}
    model.equip(speech_chain.blank(widths), SentencePiece(letters()), {}, options)
    return model.eval()
