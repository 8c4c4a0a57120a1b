"""Higgs Audio v2: text in, eight codes per frame (40 ms) out, by a Llama with two feed-forwards per layer.

Text tokens and audio columns stand in one sequence. Attention is common to them; norms and feed-forward of a
layer exist twice, and a position takes those of its kind. A column is read as the sum of eight table rows and
predicted by one head, eight codes at a time. Codebook k comes k columns late, so that it follows the codes of
its own frame that lie before it. B begins a stream, E ends it; T frames take T + 9 columns.

    position     .. <audio_out_bos>  0   1   2   3  ..  T+1 .. T+8  <audio_eos> <eot>
    codebook 0                       B   a1  a2  a3 ..  E   .. E                 labels  -  a1 a2 .. aT E -
    codebook 1                       B   B   b1  b2 ..  bT  .. E                 labels  -  -  b1 .. bT E -
    codebook 7                       B   B   B   B  ..      .. E                 labels  ..     h1 .. hT E
    kind         text    text        audio                          text       text

What stands at a position is predicted from the position before it, text by one head and codes by the other.
Labels stand where the inputs stand; the loss compares the output at t with the label at t + 1.

Where trainers for this model go wrong, which tests here would catch: the guide's snippet has no shift, so
that each position learns to repeat its own input; the forks train without the delay that speaking uses, and
learn the reference and the B columns; transformers' processor masks every E, so that nothing learns to stop.

Checkpoint: bosonai/higgs-audio-v2-generation-3B-base with bosonai/higgs-audio-v2-tokenizer; two layouts each.

Letters besides the usual: P positions that a batch really has, K codebooks, V ids of one codebook.
"""
import dataclasses
import json
import math
import re
import shutil
import warnings
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint as recomputed

from models.codecs import higgs_codec
from models.parts import Invalid, audio, check, checkpoint, opt, slots
from models.parts.checkpoint import Stored
from models.parts.layer_steps import Acting, StackSteps
from models.parts.layers import (Attention, Context, Linear, Packing, RMSNorm, SwiGLU, cross_entropy,
                                 make_caches, recomputes, rotary)
from models.parts.plain import LARGEST, LAYERS, as_record, checked, layers, need, shown, written
from models.parts.rope import LLAMA3, llama3_frequencies, rope_settings
from models.parts.sampling import LeftPadded, generator, takes
from models.parts.textfiles import refuse_blank
from models.parts.tokenizer import Tokenizer

LAMBDAS = {"loss/text": 1.0, "loss/audio": 1.0}
PARTS = {"codec": "bosonai/higgs-audio-v2-tokenizer", "tokenizer": ""}  # what may lie elsewhere: its hub id
NONE = -100  # label of a position that is not trained

# ------------------------------------------------------------------------------------------------ settings


@dataclass
class Config:
    """What config.json says, under transformers' names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    audio_ffn_intermediate_size: int
    num_hidden_layers: int = layers()
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_codebooks: int
    codebook_size: int  # of one codebook, with the two ids that begin and end a stream
    audio_stream_bos_id: int
    audio_stream_eos_id: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_scaling: dict | None = None  # the four numbers of LLAMA3
    max_position_embeddings: int = 131072


PUBLISHED = Config(128256, 3072, 8192, 8192, 28, 24, 8, 128, 8, 1026, 1024, 1025, rope_scaling=LLAMA3)
TINY = Config(320, 32, 48, 48, 2, 4, 2, 8, 8, 34, 32, 33, rope_scaling=LLAMA3, max_position_embeddings=512)

PLACES = ("assistant", "user", "system")  # turns that a reference recording can stand in


@dataclass
class Training:
    """The `backbone:` section of a training config: how rows of audio and text are written as a
    conversation."""

    reference_in: str = opt("assistant", "turn that ref_audio stands in", choices=PLACES)
    system: str = opt("", "text of the system turn; empty takes Boson's, and none where a reference comes without a scene")
    scene: str = opt("", "where it is spoken, such as 'Audio is recorded from a quiet room.'; stands in the system turn")

    def __post_init__(self):
        check(self)


UNSET = -1  # of the two below: 7 and 2, which Boson recommends, or no such sampling where temperature is 0


@dataclass
class Sampling:
    """What `generate` takes besides text, prompts, speaker and seed.

    The defaults of temperature, top_k and top_p are those of Boson's quick start.
    """

    temperature: float = opt(0.3, "randomness; 0 takes the likeliest code")
    top_k: int = opt(50, "sample among so many likeliest codes; 0: all")
    top_p: float = opt(0.95, "and among the likeliest that have this share of the probability together; 1: all")
    ras_win_len: int | None = opt(UNSET, "frames in which a code may repeat; -1: 7, or none at temperature 0; null: do not look")
    ras_max_repeat: int = opt(UNSET, "a code that is in them so often is drawn anew, from all codes; -1: 2")
    force_audio: bool = opt(True, "speak at once; false lets the model write first and choose when it speaks, and how often")
    reference_in: str = opt("assistant", "turn that the prompts' recordings stand in: assistant, user or system", choices=PLACES)
    system: str = opt("", "text of the system turn; empty takes Boson's, and none where a prompt comes without a scene")
    scene: str = opt("", "where it is spoken, such as 'Audio is recorded from a quiet room.'")
    piece_words: int = opt(100, "longer texts are spoken in pieces of at most so many words; 0: never")
    keep_pieces: int = opt(2, "pieces spoken before that stay as context beside the prompts")
    min_len: int = opt(0, "frames (40 ms) before which the speech cannot end")
    max_len: int = opt(7500, "frames at most; 7500 are five minutes. The length of the text sets a limit of its own")
    retries: int = opt(0, "tries with the next seed when a take is empty or does not end by itself")
    chunk_frames: int = opt(16, "frames per chunk of audio at most; the first chunks are 1, 2, 4 .. frames")

    def __post_init__(self):
        least = dict(temperature=0, top_k=0, piece_words=0, keep_pieces=0, min_len=0, max_len=1, retries=0)
        check(self, **least, chunk_frames=1)
        if not 0 < self.top_p <= 1:
            raise Invalid(f"top_p is {self.top_p}, expected more than 0 and at most 1")
        asked = self.ras_win_len != UNSET or self.ras_max_repeat != UNSET
        if self.ras_win_len == UNSET:
            self.ras_win_len = 7 if asked or self.temperature else None
        self.ras_max_repeat = 2 if self.ras_max_repeat == UNSET else self.ras_max_repeat
        check(self, ras_win_len=1, ras_max_repeat=1)


# What a config.json may ask for that no published checkpoint has.
# {key: (the only values that are read, what another would mean)}
ONLY = {
    "encode_whisper_embed": ((False,), "a reference read by Whisper, of which nobody published weights"),
    "encode_audio_in_tokens": ((True,), "a reference that is not read as codes"),
    "audio_adapter_type": (("dual_ffn", "dual_ffn_fast_forward"), "another way for audio through the layers"),
    "audio_embed_avg": ((False,), "the mean of a column's table rows instead of their sum"),
    "use_delay_pattern": ((True,), "codebooks without delay"),
    "use_audio_out_embed_projector": ((False,), "a projection of audio embeddings"),
    "use_audio_out_self_attention": ((0, False), "an attention of their own for audio positions"),
    "use_rq_transformer": ((False,), "a second transformer over the codebooks"),
    "audio_decoder_proj_num_layers": ((0,), "layers in front of the heads"),
    "hidden_act": (("silu",), "another activation"),
    "attention_bias": ((False,), "biases in attention"),
    "mlp_bias": ((False,), "biases in the feed-forward"),
}


def check_config(raw, where):
    """Invalid where config.json asks for something that no published checkpoint has."""
    raw = as_record(raw, where)
    text = need(raw, "text_config", dict, {})
    for section in (raw, text):
        for key, (values, meaning) in ONLY.items():
            if section.get(key, values[0]) not in values:
                stated = shown(written(section[key]))
                raise Invalid(f"{where}: {key} is {stated}, expected {values[0]!r}: it would mean "
                              f"{meaning}, which is not supported. Use the published checkpoint, or one "
                              "trained from it.")
    layers = need(raw, "audio_dual_ffn_layers", list[int], None)
    count = need(text, "num_hidden_layers", int, None, at_least=1, at_most=LAYERS)
    if layers is not None and count is not None and sorted(layers) != list(range(count)):
        raise Invalid(f"{where}: audio_dual_ffn_layers names {len(layers)} of {count} layers; "
                      "only checkpoints with all of them are supported")


def read_config(raw, shapes, where):
    """Config from either config.json. Widths that it does not state are read from `shapes`: {name here:
    shape}."""
    check_config(raw, where)
    raw = checked(Config, as_record(raw, where))
    llama = checked(Config, need(raw, "text_config", dict, raw))

    def size(key, name, axis=0):
        if llama.get(key) is not None:
            return llama[key]
        return shapes[name][axis] if name in shapes else getattr(PUBLISHED, key)

    heads = llama.get("num_attention_heads") or PUBLISHED.num_attention_heads
    q, k = (shapes.get(f"layers.0.self_attn.{letter}_proj.weight") for letter in "qk")
    if llama.get("head_dim") is None and q and q[0] % heads:
        raise Invalid(f"{where}: q_proj has {q[0]} rows, which are not {heads} heads; "
                      "config.json must state num_attention_heads")
    width = size("hidden_size", "norm.weight")
    head_dim = llama.get("head_dim") or (q[0] // heads if q else width // heads)
    groups = llama.get("num_key_value_heads") or (k[0] // head_dim if k else PUBLISHED.num_key_value_heads)
    numbers = [int(found[1]) for name in shapes if (found := re.match(r"layers\.(\d+)\.", name))]
    layers = llama.get("num_hidden_layers") or max(numbers, default=PUBLISHED.num_hidden_layers - 1) + 1
    hidden = size("intermediate_size", "layers.0.mlp.gate_proj.weight")
    audio_gate = shapes.get("layers.0.audio_mlp.gate_proj.weight")
    audio_hidden = audio_gate[0] if audio_gate else raw.get("audio_ffn_intermediate_size") or hidden
    codebooks = raw.get("num_codebooks") or number(raw, "audio_num_codebooks", PUBLISHED.num_codebooks)
    ids = read_stream_ids(raw, shapes.get("audio_codebook_embeddings.weight"), codebooks, where)
    theta, scaling = rope_settings(llama, PUBLISHED.rope_theta, LLAMA3, where)
    vocab = size("vocab_size", "embed_tokens.weight")
    eps = llama.get("rms_norm_eps") or PUBLISHED.rms_norm_eps
    positions = llama.get("max_position_embeddings") or PUBLISHED.max_position_embeddings
    return Config(vocab, width, hidden, audio_hidden, layers, heads, groups, head_dim, codebooks, *ids,
                  eps, theta, scaling, positions)


def number(raw, key, usual):
    """A size or an id in config.json."""
    return need(raw, key, int, usual, at_least=1, at_most=LARGEST)


def read_stream_ids(raw, table, codebooks, where):
    """(ids of a codebook, begin, end).

    The table decides: one config counts the ids of begin and end, one does not, and transformers' class
    default is wrong.
    """
    begin, end = (number(raw, f"audio_stream_{name}_id", None) for name in ("bos", "eos"))
    if table and table[0] % codebooks:
        raise Invalid(f"{where}: the audio table has {table[0]} rows, which are not {codebooks} codebooks")
    counted = number(raw, "codebook_size", PUBLISHED.codebook_size)
    if raw.get("audio_codebook_size"):
        counted = number(raw, "audio_codebook_size", None) + 2
    size = table[0] // codebooks if table else max(counted, (end or 0) + 1)
    begin, end = size - 2 if begin is None else begin, size - 1 if end is None else end
    if not 0 < begin < size or not 0 < end < size or begin == end:
        raise Invalid(f"{where}: audio_stream_bos_id {begin} and audio_stream_eos_id {end} must be two of "
                      f"the {size} ids of a codebook")
    return size, begin, end


# ------------------------------------------------------------------------------------------------ modules


class Asked(NamedTuple):
    """The positions whose output is wanted from the last layer; the others only serve as keys."""

    places: torch.Tensor
    texts: int  # how many of them, the first ones, are text


def by_kind(x, texts, text, sound):
    """text(x) at positions of text and sound(x) at those of audio.

    x: (B, L, C); in training (1, P, C) with the texts in front.
    """
    if torch.is_tensor(texts):  # some rows write while others speak: both for all, which is seldom and short
        return torch.where(texts, text(x), sound(x))
    if texts == 0:
        return sound(x)
    if texts == x.shape[1]:
        return text(x)
    return torch.cat([text(x[:, :texts]), sound(x[:, texts:])], 1)


class DualLayer(nn.Module):
    """A layer with one attention and two feed-forwards. It looks nothing up: positions are sorted
    beforehand."""

    def __init__(self, c):
        super().__init__()
        H, eps = c.hidden_size, c.rms_norm_eps
        self.input_layernorm, self.audio_input_layernorm = RMSNorm(H, eps), RMSNorm(H, eps)
        self.self_attn = Attention(H, c.num_attention_heads, c.num_key_value_heads, c.head_dim)
        self.post_attention_layernorm, self.audio_post_attention_layernorm = RMSNorm(H, eps), RMSNorm(H, eps)
        self.mlp = SwiGLU(H, c.intermediate_size)
        self.audio_mlp = SwiGLU(H, c.audio_ffn_intermediate_size)

    def forward(self, x, context, texts, cache=None, asked=None):
        """texts: the first so many positions are text, the others audio; or (B, 1, 1), True for rows that
        write."""
        normed = by_kind(x, texts, self.input_layernorm, self.audio_input_layernorm)
        x = x + self.self_attn(normed, context, cache)
        if asked is not None:
            x, texts = x[:, asked.places], asked.texts
        return x + by_kind(x, texts, self._of_text, self._of_audio)

    def _of_text(self, x):
        return self.mlp(self.post_attention_layernorm(x))

    def _of_audio(self, x):
        return self.audio_mlp(self.audio_post_attention_layernorm(x))


class PromptCache:
    """A cache as the layers see it while they read prompts: keys come packed, and get their padding here."""

    def __init__(self, cache, packing):
        self.cache, self.packing = cache, packing

    def write(self, column, k, v):
        self.cache.write(column, self.packing.unpack(k), self.packing.unpack(v))


# ------------------------------------------------------------------------------------------------ rows


def delayed(codes, config):
    """(columns, labels), both (T + K + 1, K), of the codes (K, T) of a clip.

    Codebook k is moved k columns on. Each is taught one E; the other E, which only fill up, and all B are
    not trained.
    """
    (K, T), begin, end = codes.shape, config.audio_stream_bos_id, config.audio_stream_eos_id
    columns = torch.full((T + K + 1, K), end)
    labels = torch.full((T + K + 1, K), NONE)
    for k in range(K):
        columns[: k + 1, k] = begin
        columns[k + 1 : k + 1 + T, k] = codes[k]
        labels[k + 1 : k + 2 + T, k] = columns[k + 1 : k + 2 + T, k]
    return columns, labels


class Draft:
    """A row while it is written: ids and labels of its positions, and the columns of its clips."""

    def __init__(self, codebooks):
        self.codebooks = codebooks
        self.ids, self.labels, self.clips = [], [], []

    def write(self, ids, trained=False):
        self.ids += ids
        self.labels += ids if trained else [NONE] * len(ids)

    def speak(self, mark, columns, labels=None):
        self.clips.append((len(self.ids), columns, labels))
        self.write([mark] * len(columns))

    def example(self):
        L, K = len(self.ids), self.codebooks
        codes, labels = torch.zeros(L, K, dtype=torch.long), torch.full((L, K), NONE)
        is_audio = torch.zeros(L, dtype=torch.bool)
        for first, columns, targets in self.clips:
            place = slice(first, first + len(columns))
            codes[place], is_audio[place] = columns, True
            if targets is not None:
                labels[place] = targets
        return {"ids": torch.tensor(self.ids), "codes": codes, "audio": is_audio,
                "text_labels": torch.tensor(self.labels), "audio_labels": labels}


# Boson's own words, which the base was trained on; the scene marks are special tokens.
SYSTEM = "Generate audio following instruction."
SEVERAL = ("You are an AI assistant designed to convert text into speech.\n"
           "If the user's message includes a [SPEAKER*] tag, do not read out the tag and generate speech "
           "for the "
           "following text, using the specified voice.\n"
           "If no speaker tag is present, select a suitable voice on your own.")
SCENE = ("<|scene_desc_start|>", "<|scene_desc_end|>")


class Reference(NamedTuple):
    """A recording whose voice is taken. number: of its speaker, None where there is only one."""

    text: str | None
    codes: torch.Tensor
    number: int | None


def text_part(text):
    return {"type": "text", "text": text}


def audio_part(codes):
    return {"type": "audio", "audio": codes}


def message(role, *parts, train=False):
    return {"role": role, "train": train, "content": list(parts)}


def tagged(text, number):
    return text if number is None else f"[SPEAKER{number}] {text}"


def system_turn(style, references, several=False):
    """[] or the system turn. style: Training or Sampling, whose system and scene count.

    References that stand in it follow the scene.
    """
    voices = references if style.reference_in == "system" else []
    text = style.system
    if not text and not references:
        text = SEVERAL if several else SYSTEM
    if not text and (style.scene or voices):
        text = SYSTEM
    if not style.scene and not voices:
        return [message("system", text_part(text))] if text else []
    text += f"\n\n{SCENE[0]}\n{style.scene}"
    parts = []
    for number, voice in enumerate(voices):
        gap = "\n" if number else ""
        if style.scene and not number:
            gap = "\n\n"
        parts += [text_part(f"{text}{gap}SPEAKER{number}: "), audio_part(voice.codes)]
        text = ""
    return [message("system", *parts, text_part(f"{text}\n{SCENE[1]}"))]


def reference_turns(style, references):
    """(turns, parts of the user turn to come) of the references that do not stand in the system turn."""
    if style.reference_in == "system":
        return [], []
    turns, parts = [], []
    for text, codes, number in references:
        if style.reference_in == "user":
            said = [] if text is None else [text_part(tagged(text, number))]
            parts += [*said, audio_part(codes)]
        elif text is None:
            raise Invalid("a reference recording without its transcript: in the assistant's turn it must "
                          "follow its text "
                          "(ref_text or prompt_text); without one use reference_in: system or user")
        else:
            turns.append(message("user", text_part(tagged(text, number))))
            turns.append(message("assistant", audio_part(codes)))
    return turns, parts


def check_messages(messages):
    """Messages with content as a list of parts; Invalid with everything that is wrong in them."""
    wrong, out = [], []
    for number, raw in enumerate(messages, 1):
        role, content = raw.get("role"), raw.get("content")
        content = [text_part(content)] if isinstance(content, str) else content
        here = f"message {number} ({role})"
        if role not in PLACES:
            wrong.append(f"message {number} has the role {role!r}, expected {', '.join(PLACES)}")
        if raw.get("train") and role != "assistant":
            wrong.append(f"{here} says train, but only what the assistant says has a place to be learnt")
        if not isinstance(content, list) or not content:
            wrong.append(f"{here} has no content; expected a text or a list of parts")
            content = []
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind not in ("text", "audio"):
                wrong.append(f"{here} has a part of type {kind!r}, expected text or audio")
            elif part.get(kind) is None:
                wrong.append(f"{here} has a part of type {kind} without {kind}")
        out.append({"role": role, "train": raw.get("train"), "content": content})
    if not wrong and not any(speaks(m) for m in out):
        wrong.append("no assistant message has audio, so there is no speech to learn; "
                     "add a part of type audio to the one that answers")
    if wrong:
        raise Invalid("messages: " + "; ".join(wrong))
    return out


def speaks(turn):
    return turn["role"] == "assistant" and any(part["type"] == "audio" for part in turn["content"])


def choose_trained(messages):
    """Set train of every message: as it is marked, else only the last assistant turn that speaks.

    Those before are prompts.
    """
    last = max(i for i, m in enumerate(messages) if speaks(m))
    for i, m in enumerate(messages):
        m["train"] = i == last if m["train"] is None else bool(m["train"])
    return messages


# ---------------------------------------------------------------------------------------- the host's side


class Prompt(NamedTuple):
    """What is read before the first column of an answer."""

    example: dict
    frames: int  # at most
    letters: int  # tokens of text that may be written, 0 where speech is forced
    seed: int | None
    slot: int | None  # of its adapter, where there are several


class Reply:
    """One answer while it is made: whether it writes or speaks, which frames are complete, and how it ended.

    Frame t has its last code in column t + K. The first E, of codebook k in column e, leaves e - 1 - k
    frames.
    """

    def __init__(self, number, prompt, model, forced):
        self.number, self.prompt, self.forced = number, prompt, forced
        self.marks, self.config = model.marks, model.config
        self.mode = "speak" if forced else "write"  # or "open": <|audio_out_bos|> is read, B comes next
        self.columns, self.length = [None], None  # of the stream; column 0 is B
        self.total, self.letters = 0, prompt.letters
        self.letter, self.finish = 0, None  # the token to read next; "end" or "cap"

    def take(self, column, left, letter):
        """The frames that become complete by a column (K,) and what is `left` of the ending; or a letter is
        written."""
        if self.mode == "open":
            self.mode, self.columns, self.length = "speak", [None], None
        elif self.mode == "write":
            self._write(letter)
        else:
            yield from self._speak(column, left)

    def _write(self, letter):
        self.letter, self.letters = letter, self.letters - 1
        if letter in (self.marks["<|eot_id|>"], self.marks.get("<|end_of_text|>")):
            self.finish = "end"
        elif letter == self.marks["<|audio_out_bos|>"]:
            self.mode = "open"
        elif self.letters <= 0:
            self.finish = "cap"

    def _speak(self, column, left):
        K = self.config.num_codebooks
        self.columns.append(column)
        newest = len(self.columns) - 1
        if self.length is None and left < K:
            self.length = newest - K + left
        frame = newest - K
        if frame >= 0 and (self.length is None or frame < self.length):
            self.total += 1
            codes = torch.stack([self.columns[frame + 1 + k][k] for k in range(K)])
            yield codes.clamp(max=self.config.audio_stream_bos_id - 1)
        done = self.length is not None and frame + 1 >= self.length
        if done and self.forced:
            self.finish = "end"
        elif self.total >= self.prompt.frames:
            self.finish = "cap"
        elif left == 0:
            self.mode, self.letter = "write", self.marks["<|audio_eos|>"]


class Wanted(NamedTuple):
    """A request as generate gets it."""

    text: str
    prompts: tuple = ()  # (text, audio, speaker) each
    speaker: str | int | None = None
    seed: int | None = None
    noise: None = None


@dataclass
class Request:
    """What is asked for, and what has been spoken of it."""

    references: list
    pieces: list  # texts, spoken one after the other
    number: int | None  # of the speaker, where the references have several
    seed: int | None
    spoken: list = field(default_factory=list)  # (text, codes) of the pieces that are done
    frames: int = 0
    slot: int | None = None  # of its adapter, where there are several


# A word, or where words are not spaced a character, with the punctuation that follows it.
CJK = "\\u3040-\\u30ff\\u3400-\\u9fff\\uf900-\\ufaff"
WORD = re.compile(rf"[{CJK}][^\w\s]*|[^\s{CJK}]+")
SENTENCE = re.compile(r"(?<=[.!?…؟])\s+|(?<=[。！？])|\n+")


def cut(text, most):
    """A text in pieces of at most `most` words, cut where a sentence ends if there is such a place."""
    if not most or len(WORD.findall(text)) <= most:
        return [text]
    pieces, size = [], 0
    for sentence in filter(None, SENTENCE.split(text)):
        words = [found.span() for found in WORD.finditer(sentence)]
        for first in range(0, len(words), most):
            some = words[first : first + most]
            part = sentence[some[0][0] : some[-1][1]]
            if pieces and size + len(some) <= most:
                pieces[-1], size = f"{pieces[-1]} {part}", size + len(some)
            else:
                pieces, size = [*pieces, part], len(some)
    return pieces


# ---------------------------------------------------------------------------------------- the device's side


def pick(logits, u, s):
    """One id per row of logits (.., V) float32. u (..) is uniform in (0, 1]; s: temperature, top_k and
    top_p."""
    if s.temperature == 0:
        return logits.argmax(-1)
    size = logits.shape[-1]
    values, ids = logits.topk(min(s.top_k or size, size), sorted=True)
    shares = (values / s.temperature).softmax(-1)
    heap = shares.cumsum(-1)
    # those before were not enough; the likeliest always stays
    kept = torch.where(heap - shares < s.top_p, shares, 0)
    heap = kept.cumsum(-1)
    place = torch.searchsorted(heap, u[..., None] * heap[..., -1:])
    return ids.gather(-1, place)[..., 0]


def pick_any(logits, u):
    """One id per row from the whole distribution at temperature 1."""
    heap = logits.softmax(-1).cumsum(-1)
    return torch.searchsorted(heap, u[..., None] * heap[..., -1:])[..., 0]


# A take that does not end by itself is cut off: at a second per token and ten more, which no speech needs.
FRAMES, FRAMES_PER_TOKEN = 250, 25
LETTERS = 64  # tokens that may be written beside the text itself, where the model writes before it speaks
DRAWS = 128  # steps whose random numbers are drawn at once: always as many, so that no length changes a draw


class Speech:
    """The answers of a batch that go on, on the device: caches, random numbers, where each stream stands."""

    def __init__(self, model, prompts, s):
        c, device, B = model.config, model.device, len(prompts)
        self.model, self.s, self.K = model, s, c.num_codebooks
        steps = max(p.frames + p.letters for p in prompts) + self.K + 2
        self.batch = LeftPadded([len(p.example["ids"]) for p in prompts], steps, device)
        self.caches = make_caches(model.layers, B, self.batch.columns, model.norm.weight)
        self.steps = StackSteps(model.speaking(), model.norm, model.frequencies, self.batch.columns)
        self.generators = [generator(p.seed) for p in prompts]
        self.places = [p.slot for p in prompts]
        self.draws = torch.zeros(B, 1, 2 * self.K, device=device)
        self.order = torch.arange(self.K, device=device)
        self.column = torch.zeros(B, self.K, dtype=torch.long, device=device)
        self.letter = torch.zeros(B, dtype=torch.long, device=device)
        self.number = torch.ones(B, 1, dtype=torch.long, device=device)  # of the column that is sampled next
        self.left = torch.full((B, 1), self.K, device=device)  # columns of the ending; K: it has not begun
        # frames of earlier streams of the answer
        self.said = torch.zeros(B, 1, dtype=torch.long, device=device)
        self.recent = torch.full((B, s.ras_win_len or 0, self.K), -1, device=device)

    def keep(self, going):
        """Go on with the rows of these numbers."""
        rows = torch.tensor(going, device=self.order.device)
        for name in ("draws", "column", "letter", "number", "left", "said", "recent"):
            setattr(self, name, getattr(self, name)[rows])
        self.generators = [self.generators[i] for i in going]
        self.places = [self.places[i] for i in going]
        for part in (self.batch, *self.caches):
            part.keep(rows)

    @torch.inference_mode()
    def read(self, prompts):
        """The states (B, H) at the ends of the prompts, whose keys are then in the caches."""
        model, L, B = self.model, self.batch.width, len(prompts)
        examples = [p.example for p in prompts]
        lengths = [len(e["ids"]) for e in examples]
        ids, codes, kind = (pad_sequence([e[name] for e in examples], batch_first=True)
                            for name in ("ids", "codes", "audio"))
        real = torch.arange(L)[None] < torch.tensor(lengths)[:, None]
        order = sort_by_kind(real, kind)
        last = torch.tensor([b * L + n - 1 for b, n in enumerate(lengths)])
        ends = order.numbers(last).to(model.device)
        texts, sounds = order.place[: order.texts], order.place[order.texts :]
        x = model._embed(ids.flatten()[texts].to(model.device), codes.flatten(0, 1)[sounds].to(model.device))
        place = order.place.to(model.device)
        padded = place + self.batch.pad[place // L]  # the same positions with the padding in front
        rope, column = rotary(place % L, model.frequencies), self.batch.numbers[:L]
        context = Context(rope, mask=Packing(place, B, L), column=column)
        caches = [PromptCache(cache, Packing(padded, B, L)) for cache in self.caches]
        texts = order.texts
        if slots.mixed(model):  # the layers see all positions, as each has its own adapter
            texts = (torch.arange(len(place)) < texts).to(model.device)[None, :, None]
        with slots.picked(model, place, L):
            if slots.of(model) is not None:
                return model._transform(x, context, texts, caches)[0, ends]
            asked = Asked(ends, 0 if self.s.force_audio else B)  # B columns, or the ends of headers
            return model._transform(x, context, texts, caches, asked)[0]

    def random(self, n):
        """(B, 2 K) numbers of step n, in (0, 1]: 0 would hit an id of probability 0."""
        if n % DRAWS == 0:
            fresh = [torch.rand(DRAWS, 2 * self.K, generator=g) for g in self.generators]
            self.draws = 1 - torch.stack(fresh).to(self.order.device)
        return self.draws[:, n % DRAWS]

    @torch.inference_mode()
    def sample(self, h, n, writing):
        """What every row says in step n after the state h (B, H): column, left of its ending, letter; (B, K
        + 2)."""
        u = None if self.s.temperature == 0 and self.s.ras_win_len is None else self.random(n)
        if writing:
            letters = self.model.audio_decoder_proj.text_lm_head(h).float()
            self.letter = pick(letters, None if u is None else u[:, 0], self.s)
        self.column, self.left = self._ending(self._column(h, u))
        if self.s.ras_win_len is not None:
            c = self.model.config
            code = (self.column != c.audio_stream_bos_id) & (self.column != c.audio_stream_eos_id)
            self.recent = torch.cat([self.recent[:, 1:], torch.where(code, self.column, -1)[:, None]], 1)
        self.number = self.number + 1
        return torch.cat([self.column, self.left, self.letter[:, None]], 1)

    def _column(self, h, u):
        """Codes (B, K), B where codebook k has not begun yet, before the ending is laid over them."""
        c, s, K = self.model.config, self.s, self.K
        logits = self.model.audio_decoder_proj.audio_lm_head(h).float().unflatten(-1, (K, -1))
        if s.min_len:
            # E of codebook k in column e leaves e - 1 - k frames
            early = self.number + self.said <= s.min_len + self.order
            ends = logits[..., c.audio_stream_eos_id].masked_fill(early, -math.inf)
            logits[..., c.audio_stream_eos_id] = ends
        column = pick(logits, None if u is None else u[:, :K], s)
        if s.ras_win_len is not None:
            often = (self.recent == column[:, None]).sum(1) >= s.ras_max_repeat
            column = torch.where(often, pick_any(logits, u[:, K:]), column)
        return torch.where(self.order < self.number, column, c.audio_stream_bos_id)

    def _ending(self, column):
        """(column, left) with the ending laid over the column.

        The first E, of codebook k, ends all below it; then the ending climbs a codebook per column, as
        upstream's does.
        """
        K, end = self.K, self.model.config.audio_stream_eos_id
        lowest = torch.where(column == end, self.order, K).amin(1, keepdim=True)  # K: none
        running = self.left < K
        filled = torch.where(running, K - self.left, lowest.masked_fill(lowest == K, 0))
        begun = (K - 1 - lowest).masked_fill(lowest == K, K)
        left = torch.where(running, self.left - 1, begun)
        return torch.where(self.order < filled, end, column), left

    @torch.inference_mode()
    def step(self, replies, n):
        """Read what the rows said last; the states (B, H) that predict what comes next."""
        model, device = self.model, self.order.device
        fresh = [r.mode == "speak" and len(r.columns) == 1 for r in replies]
        if any(fresh):
            said = torch.tensor([r.total for r in replies], device=device)
            self._begin(torch.tensor(fresh, device=device)[:, None], said[:, None])
        x = model._columns(self.column)
        if all(r.mode == "speak" for r in replies):
            return self.steps(x, *self.batch.next(n), self.caches)
        letters = torch.tensor([r.letter for r in replies], device=device)
        texts = torch.tensor([r.mode != "speak" for r in replies], device=device)[:, None, None]
        x = torch.where(texts, model._letters(letters)[:, None], x[:, None])
        place = self.batch.step(n)
        context = Context(rotary(place.positions, model.frequencies), mask=place.mask, column=place.column)
        return model._transform(x, context, texts, self.caches)[:, 0]

    def _begin(self, fresh, said):
        """A new stream in the rows that are fresh (B, 1)."""
        self.column = torch.where(fresh, self.model.config.audio_stream_bos_id, self.column)
        self.number, self.left = torch.where(fresh, 1, self.number), torch.where(fresh, self.K, self.left)
        self.said = torch.where(fresh, said, self.said)
        self.recent = torch.where(fresh[..., None], -1, self.recent)


class Sound:
    """Frames to audio in chunks of 1, 2, 4 .. `most` frames.

    A frame can be heard once those are known that the codec looks ahead to.
    """

    def __init__(self, codec, most):
        self.stream, self.ahead, self.hop, self.most = codec.stream(), codec.context[1], codec.hop, most
        self.waiting, self.frames, self.done, self.size = [], 0, 0, 1

    def add(self, frame):
        """The next chunk (n,), or None."""
        self.waiting.append(frame)
        self.frames += 1
        if self.frames - self.ahead - self.done < self.size:
            return None
        return self._decode()

    def _decode(self):
        chunk = self.stream.decode(torch.stack(self.waiting, 1)).cpu()
        self.waiting, self.size = [], min(2 * self.size, self.most)
        self.done += len(chunk) // self.hop
        return chunk

    def flush(self):
        """All that is left, (n,), maybe nothing."""
        rest = [self._decode()] if self.waiting else []
        return torch.cat([*rest, self.stream.flush().cpu()])


class Order(NamedTuple):
    """The positions of a batch that are read, those of text first."""

    place: torch.Tensor  # (P,) flat positions in B * L
    texts: int
    size: int  # B * L

    def numbers(self, flat):
        """Where flat positions stand in the order."""
        inverse = torch.full((self.size,), -1)
        inverse[self.place] = torch.arange(len(self.place))
        return inverse[flat]


def sort_by_kind(wanted, is_audio):
    """Order of the positions (B, L) that are wanted; made on the CPU, once per batch, so that no layer looks
    for them."""
    texts, sounds = ((wanted & kind).flatten().nonzero().flatten() for kind in (~is_audio, is_audio))
    return Order(torch.cat([texts, sounds]), len(texts), wanted.numel())


# ------------------------------------------------------------------------------------------------ the model


class Higgs(nn.Module):
    backbone = "higgs"
    namings = ("original", "transformers")
    native_adapter = "peft"
    lora_dropout_after = False
    speaker_input = False  # who speaks is heard in the reference
    embeddings = ("audio_codebook_embeddings",)  # what lora.train_embeddings trains

    def __init__(self, config, naming="original", raw_config=None):
        """naming and raw_config (config.json) are of the folder that was read: what is saved is as it was."""
        super().__init__()
        c = self.config = config
        H, rows = c.hidden_size, c.num_codebooks * c.codebook_size
        # from_pretrained of nothing: an nn.Embedding's own draw imports a compiler on the meta device.
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(c.vocab_size, H), freeze=False)
        # row: code + V * codebook
        self.audio_codebook_embeddings = nn.Embedding.from_pretrained(torch.empty(rows, H), freeze=False)
        self.layers = nn.ModuleList(DualLayer(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(H, c.rms_norm_eps)
        self.audio_decoder_proj = nn.Module()
        # A head of its own, although the published config says that the table is one with it.
        self.audio_decoder_proj.text_lm_head = nn.Linear(H, c.vocab_size, bias=False)
        self.audio_decoder_proj.audio_lm_head = Linear(H, rows, bias=False)
        # (K,) first row of each codebook in the audio table
        self.register_buffer("offsets", None, persistent=False)
        self.register_buffer("frequencies", None, persistent=False)  # of the rotary pairs, always float32
        self.naming, self.raw_config = naming, raw_config or {}
        self.adapter_namings = {"peft": naming}  # what is written is named as what was read
        self.speakers = {}
        self.max_length = c.max_position_embeddings  # positions of a row; train.py may ask for less
        self.recompute, self.finish, self.left_unused = False, [], []
        self.path = self.fingerprint = ""
        self._frozen, self.tokenizer, self.files, self.training_options = [], None, {}, Training()
        self.marks, self.tokenizer_crc, self._codec_key = {}, 0, None
        self.sample_rate = self.out_sample_rate = 0

    def equip(self, codec, tokenizer, files, options):
        """Give the model what does not come with its weights, and what is computed.

        files: {role: path} of what `save` copies; options: Training's. `load` and `blank` call this.
        """
        c, device = self.config, self.device
        if codec.codebooks != c.num_codebooks or codec.bins > c.audio_stream_bos_id:
            raise Invalid(f"the audio tokenizer has {codec.codebooks} codebooks of {codec.bins} codes, "
                          f"the model {c.num_codebooks} of {c.audio_stream_bos_id}. They belong to "
                          "different checkpoints.")
        self._frozen, self.tokenizer, self.files = [codec], tokenizer, files
        self.sample_rate = self.out_sample_rate = codec.sample_rate
        self.offsets = torch.arange(c.num_codebooks, device=device) * c.codebook_size
        self.frequencies = llama3_frequencies(c.head_dim, c.rope_theta, c.rope_scaling).to(device)
        self.marks = read_marks(tokenizer, self.raw_config)
        self.tokenizer_crc = zlib.crc32(files["tokenizer"].read_bytes()) if "tokenizer" in files else 0
        self.training_options = Training(**options)

    # ---------------------------------------------------------------------------------- data: rows, batches

    @property
    def codec(self):
        return self._frozen[0]  # in a list, so that it is neither trained nor saved nor cast with the model

    @property
    def device(self):
        return self.norm.weight.device

    @property
    def dtype(self):
        return self.norm.weight.dtype

    @property
    def frame_rate(self):
        """Frames per second of audio."""
        return self.sample_rate / self.codec.hop

    def encode_text(self, text, speaker=None):
        """Ids of a text, behind the tag of a speaker where a number is given. What looks like a special
        token is text."""
        if speaker is not None and not re.fullmatch(r"\d+", str(speaker)):
            raise Invalid(f"speaker {speaker!r}: this model knows speakers by the numbers of their "
                          "references, 0 and up; "
                          "whose voice it is, a reference recording says")
        refuse_blank(text)
        return self.tokenizer.encode(tagged(text, speaker))

    def encode_audio(self, source, start=None, end=None):
        """Codes (K, T) int16 of a path or of (n,) samples at `sample_rate`."""
        wave = source if torch.is_tensor(source) else audio.read(source, self.sample_rate, start, end)[0]
        return self.encode_audio_batch([wave])[0]

    def encode_audio_batch(self, waves):
        """What encode_audio makes of each of several clips (n,), in one pass of the codec."""
        return [codes.to("cpu", torch.int16) for codes in self.codec.encode_batch(waves)]

    def _codes(self, source, start=None, end=None):
        """(K, T) int64 codes of a path, samples (n,) or codes (K, T)."""
        if not (torch.is_tensor(source) and source.ndim == 2):
            return self.encode_audio(source, start, end).long()
        K, size = self.config.num_codebooks, self.config.audio_stream_bos_id
        if len(source) != K:
            raise Invalid(f"codes of {len(source)} codebooks; expected {K}, as the audio tokenizer of this "
                          "model "
                          "gives them")
        if not source.shape[1]:
            raise Invalid("a clip of no frames: there is nothing to hear in it")
        source = source.long().cpu()
        least, most = int(source.min()), int(source.max())
        if least < 0 or most >= size:
            raise Invalid(f"codes from {least} to {most}; expected 0 to {size - 1}, without delay and "
                          "without the ids "
                          "that begin and end a stream")
        return source

    def encode(self, row):
        """Tensors of a row: ids (L,), codes (L, K), audio (L,), text_labels (L,), audio_labels (L, K).

        audio is True at columns of audio; labels are -100 where nothing is trained.

        A row has messages (ChatML), turns, or one audio and text, which are written as Boson's prompts are.
        """
        if row.get("messages"):
            messages = choose_trained(check_messages(row["messages"]))
        elif row.get("turns"):
            messages = self._of_turns(row)
        else:
            messages = self._of_clip(row)
        return self._render(messages).example()

    def _of_clip(self, row):
        """Messages of a row with one audio and text, and maybe a reference."""
        if row.get("audio") is None:
            raise Invalid("this row has no audio, so there is nothing to train")
        self.encode_text(row.get("text") or "")
        style, references = self.training_options, self._row_reference(row)
        turns, parts = reference_turns(style, references)
        codes = self._codes(row["audio"], row.get("start"), row.get("end"))
        answer = message("assistant", audio_part(codes), train=True)
        asked = message("user", *parts, text_part(row["text"]))
        return [*system_turn(style, references), *turns, asked, answer]

    def _row_reference(self, row):
        if row.get("ref_audio") is None:
            return []
        return [Reference(row.get("ref_text"), self._codes(row["ref_audio"]), None)]

    def _of_turns(self, row):
        """Messages of a conversation: a turn is a text of the user and its audio as the answer, trained
        unless it says no."""
        turns = row["turns"]
        if not any(t.get("audio") is not None for t in turns):
            raise Invalid("no turn of this row has audio, so there is nothing to train")
        names = list(dict.fromkeys(str(t.get("speaker")) for t in turns))
        style, references = self.training_options, self._row_reference(row)
        earlier, parts = reference_turns(style, references)
        messages = [*system_turn(style, references, len(names) > 1), *earlier]
        for turn in turns:
            number = names.index(str(turn.get("speaker"))) if len(names) > 1 else None
            self.encode_text(turn.get("text") or "")
            messages.append(message("user", *parts, text_part(tagged(turn["text"], number))))
            parts = []
            if turn.get("audio") is not None:
                codes = self._codes(turn["audio"], turn.get("start"), turn.get("end"))
                trained = turn.get("train") is None or bool(turn["train"])
                messages.append(message("assistant", audio_part(codes), train=trained))
        return messages

    def _render(self, messages):
        """A Draft of messages, token by token as Boson writes them: every part is encoded by itself."""
        draft, marks = Draft(self.config.num_codebooks), self.marks
        draft.write([marks["<|begin_of_text|>"]])
        for i, turn in enumerate(messages):
            draft.write(self._header(turn["role"]))
            for part in turn["content"]:
                if part["type"] == "text":
                    draft.write(self._words(part["text"], turn["role"]), turn["train"])
                else:
                    self._write_clip(draft, part["audio"], turn)
            follows = [m["role"] for m in messages[i : i + 2]] == ["assistant", "assistant"]
            draft.write([self._mark("<|eom_id|>") if follows else marks["<|eot_id|>"]], turn["train"])
        return draft

    def _write_clip(self, draft, source, turn):
        """The columns of a clip between their marks; only what the assistant says can be trained."""
        answers = turn["role"] == "assistant"
        columns, labels = delayed(self._codes(source), self.config)
        first, place = ("<|audio_out_bos|>", "<|AUDIO_OUT|>") if answers else ("<|audio_bos|>", "<|AUDIO|>")
        draft.write([self.marks[first]], turn["train"])
        draft.speak(self.marks[place], columns, labels if turn["train"] else None)
        draft.write([self.marks["<|audio_eos|>"]], turn["train"])

    def _header(self, role):
        encode = self.tokenizer.encode
        begin, end = self.marks["<|start_header_id|>"], self.marks["<|end_header_id|>"]
        return [begin, *encode(role), end, *encode("\n\n")]

    def _words(self, text, role):
        """Ids of a text part. In a system turn the marks of the scene are tokens; all else of that form is
        text."""
        if role != "system":
            return self.tokenizer.encode(text)
        ids = []
        for piece in re.split("|".join(f"({re.escape(mark)})" for mark in SCENE), text):
            if piece:
                ids += [self._mark(piece)] if piece in SCENE else self.tokenizer.encode(piece)
        return ids

    def _mark(self, name):
        """Id of a special token that not every row needs."""
        if name not in self.marks:
            raise Invalid(f"{self.tokenizer.name} has no {name}; this row cannot be written without it. "
                          "Is it the checkpoint's own tokenizer?")
        return self.marks[name]

    def blank_example(self, seconds, tokens):
        """What `encode` makes of a clip, without content: for counting memory."""
        K = self.config.num_codebooks
        columns = round(self.frame_rate * seconds) + K + 1  # of the delay pattern, with both ends
        size = tokens + columns
        sound = torch.arange(size) >= tokens
        codes = torch.zeros(size, K, dtype=torch.long)
        return {"ids": torch.ones(size, dtype=torch.long), "codes": codes, "audio": sound,
                "text_labels": torch.full((size,), NONE),
                "audio_labels": torch.where(sound[:, None], codes, NONE)}

    def length(self, example):
        """Positions, each column of audio being one; 0 where nothing is trained."""
        trained = (example["text_labels"] != NONE).any() or (example["audio_labels"] != NONE).any()
        return len(example["ids"]) if trained else 0

    def collate(self, examples, seeds=None):
        """Batch and counts. Nothing is drawn; which positions are text or audio or predict something is told
        here."""
        def stacked(name, padding):
            return pad_sequence([e[name] for e in examples], batch_first=True, padding_value=padding)

        batch = {"ids": stacked("ids", 0), "codes": stacked("codes", 0), "audio": stacked("audio", False),
                 "text_labels": stacked("text_labels", NONE), "audio_labels": stacked("audio_labels", NONE)}
        # True where the next position has a label: it is predicted from here.
        text = F.pad(batch["text_labels"][:, 1:] != NONE, (0, 1))
        sound = F.pad((batch["audio_labels"][:, 1:] != NONE).any(-1), (0, 1))
        asked = text | sound
        # Attention looks back only, so what stands behind the last position that is asked need not be read.
        wanted = asked.flip(1).cumsum(1).flip(1) > 0
        wanted[:, 0] = True  # of a row without labels, too
        order, answers = sort_by_kind(wanted, batch["audio"]), sort_by_kind(asked, batch["audio"])
        text_at, sound_at = (where.flatten().nonzero().flatten() for where in (text, sound))
        batch |= {"place": order.place, "texts": order.texts,
                  "asked": order.numbers(answers.place), "asked_texts": answers.texts,
                  "text_from": answers.numbers(text_at), "text_to": text_at + 1,
                  "audio_from": answers.numbers(sound_at), "audio_to": sound_at + 1}
        return batch, self.counts(batch)

    def counts(self, batch):
        text = int((batch["text_labels"].flatten()[batch["text_to"]] != NONE).sum())
        codes = (batch["audio_labels"].flatten(0, 1)[batch["audio_to"]] != NONE).sum(0).tolist()
        books = {f"metric/codebook_{k:02d}": n for k, n in enumerate(codes)}
        return {"loss/text": text, "loss/audio": sum(codes), **books}

    # ---------------------------------------------------------------------------------- training

    def forward(self, batch):
        """Sums of the cross-entropies over labelled tokens, and over labelled codes of all codebooks
        alike."""
        h = self.states(batch)
        heads = self.audio_decoder_proj
        labels = batch["text_labels"].flatten()[batch["text_to"]]
        text = cross_entropy(heads.text_lm_head, h[batch["text_from"]], labels, NONE)
        labels = batch["audio_labels"].flatten(0, 1)[batch["audio_to"]]  # (N, K)
        logits = heads.audio_lm_head(h[batch["audio_from"]]).float()
        logits = logits.view(labels.numel(), self.config.codebook_size)  # (N K, V)
        each = F.cross_entropy(logits, labels.flatten(), ignore_index=NONE, reduction="none")
        each = each.view(labels.shape).sum(0)  # (K,)
        books = {f"metric/codebook_{k:02d}": x for k, x in enumerate(each.detach())}
        return {"loss/text": text, "loss/audio": each.sum(), **books}

    def states(self, batch):
        """The final states (A, H) of the positions of a batch that predict something."""
        (B, L), place, texts = batch["ids"].shape, batch["place"], batch["texts"]
        x = self._embed(batch["ids"].flatten()[place[:texts]], batch["codes"].flatten(0, 1)[place[texts:]])
        context = Context(rotary(place % L, self.frequencies), mask=Packing(place, B, L))
        asked = Asked(batch["asked"], batch["asked_texts"])
        return self._transform(x, context, texts, asked=asked)[0]

    def _embed(self, ids, codes):
        """(S,) and (N, K) -> (1, S + N, H)"""
        return torch.cat([self._letters(ids), self._columns(codes)])[None]

    def _letters(self, ids):
        return self.embed_tokens(ids).to(self.dtype)

    def _columns(self, codes):
        """(N, K) -> (N, H), the sum of a column's table rows."""
        table = self.audio_codebook_embeddings.weight
        return F.embedding_bag(codes + self.offsets, table, mode="sum").to(self.dtype)

    def _transform(self, x, context, texts, caches=None, asked=None):
        """Layers and final norm. asked: what the last layer computes, None for all positions."""
        every = self.training and self.recompute
        for i, layer in enumerate(self.layers):
            cache = caches[i] if caches else None
            wanted = asked if i == len(self.layers) - 1 else None
            if recomputes(i, every):
                x = recomputed(layer, x, context, texts, cache, wanted, use_reentrant=False)
            else:
                x = layer(x, context, texts, cache, wanted)
        return self.norm(x)

    def speaking(self):
        """What acts in every layer where a column of audio stands."""
        return [Acting(layer.audio_input_layernorm, layer.self_attn, layer.audio_post_attention_layernorm,
                       layer.audio_mlp) for layer in self.layers]

    def set_recompute(self, every):
        """Activation checkpointing of every n-th layer, 0 of none. Of all: a third more time for most of the
        activation memory."""
        self.recompute = every

    def blocks(self):
        """The modules that torch.compile takes one by one."""
        return list(self.layers)

    def lora_targets(self, settings):
        """With no word given: attention and the feed-forward of audio; that of text acts at text positions
        only."""
        for key in ("enable_lm", "enable_dit", "enable_proj"):
            if getattr(settings, key) is not None:
                raise Invalid(f"lora.{key}: this backbone is chosen by lora.target_modules: attn, mlp, "
                              "audio_mlp, q_proj, "
                              "audio_mlp.gate_proj ..")
        names = [n for n, m in self.named_modules() if isinstance(m, nn.Linear)]
        return [n for n in names if ".self_attn." in n or ".audio_mlp." in n]

    def sample_request(self, row):
        """What a validation sample of a row is conditioned on, besides its text."""
        o = self.training_options
        style = {"reference_in": o.reference_in, "system": o.system, "scene": o.scene}
        if row.get("messages"):
            roles = [m["role"] for m in row["messages"] for p in m["content"] if p["type"] == "audio"]
            style["reference_in"] = roles[0]
        prompts = [(row.get("ref_text"), row["ref_audio"], None)] if row.get("ref_audio") is not None else []
        longest = 25 + 8 * len(self.encode_text(row["text"]))  # an untrained model seldom ends by itself
        return {**style, "prompts": prompts, "max_len": longest}

    # ---------------------------------------------------------------------------------- generation

    def _request(self, s, wanted):
        """A Request of what generate is given. Speakers are numbered where the prompts have more than one."""
        text, prompts, speaker, seed, noise = wanted
        if noise is not None:
            raise Invalid("noise: this backbone samples codes and takes a seed, no noise")
        self.encode_text(text)
        names = list(dict.fromkeys(str(who) for _, _, who in prompts))
        if speaker is not None and str(speaker) not in names and prompts:
            raise Invalid(f"speaker {speaker!r}: the prompts have {', '.join(names)}")
        several = len(names) > 1
        references = []
        for said, sound, who in prompts:
            number = names.index(str(who)) if several else None
            references.append(Reference(said, self._codes(sound), number))
        reference_turns(s, references)  # what does not fit in there is said before anything is spoken
        number = None
        if speaker is not None and not prompts:
            self.encode_text(text, speaker)  # a number, or it says what is wrong
            number = int(speaker)
        elif speaker is not None and several:
            number = names.index(str(speaker))
        return Request(references, cut(text, s.piece_words), number, seed)

    def _prompt(self, piece, s):
        """What is read before the answer. piece: {"request", "text", "seed"}.

        Pieces that were spoken earlier are left out, the oldest first, where they do not fit.
        """
        request = piece["request"]
        text = tagged(piece["text"], request.number)
        tokens = len(self.tokenizer.encode(text))
        letters = 0 if s.force_audio else tokens + LETTERS
        frames = min(s.max_len - request.frames, max(FRAMES + FRAMES_PER_TOKEN * tokens, s.min_len))
        room = self.config.max_position_embeddings - letters - self.config.num_codebooks - 2
        turns, parts = reference_turns(s, request.references)
        spoken = request.spoken[-s.keep_pieces :] if s.keep_pieces else []
        while True:
            earlier = []
            for said, codes in spoken:
                earlier += [message("user", text_part(said)), message("assistant", audio_part(codes))]
            asked = message("user", *parts, text_part(text))
            draft = self._render([*system_turn(s, request.references), *turns, *earlier, asked])
            self._open(draft, s.force_audio)
            if len(draft.ids) + frames <= room or not spoken:
                break
            spoken = spoken[1:]
        if len(draft.ids) >= room:
            raise Invalid(f"text and reference take {len(draft.ids)} positions; the model has "
                          f"{self.config.max_position_embeddings}, of which speech needs some. "
                          "Split the text, as --max_chars_per_piece does, or give a shorter reference.")
        frames = min(frames, room - len(draft.ids))
        return Prompt(draft.example(), frames, letters, piece["seed"], request.slot)

    def _open(self, draft, forced):
        """The beginning of the answer, up to the B column where speech is forced."""
        draft.write(self._header("assistant"))
        if forced:
            draft.write([self.marks["<|audio_out_bos|>"]])
            begin = torch.full((1, self.config.num_codebooks), self.config.audio_stream_bos_id)
            draft.speak(self.marks["<|AUDIO_OUT|>"], begin)

    @torch.no_grad()
    def _run(self, requests, s):
        """Yields (i, frame (K,)) of every piece of `_takes`, one step for all that go on; sets self.finish.

        Between two frames the host waits once, for what was sampled.
        """
        prompts = [self._prompt(piece, s) for piece in requests]
        replies = [Reply(i, prompt, self, s.force_audio) for i, prompt in enumerate(prompts)]
        finish = self.finish = ["cap"] * len(prompts)  # of this run, should another begin before it ends
        speech, n = Speech(self, prompts, s), 0
        with slots.acting(self, speech.places):
            h = speech.read(prompts)
        while replies:
            writing = any(reply.mode == "write" for reply in replies)
            # Cloned outside of inference mode, so that a caller may train on it.
            with slots.acting(self, speech.places):
                shown = speech.sample(h, n, writing).cpu().clone()
            numbers = shown.numpy()
            going = []
            for k, reply in enumerate(replies):
                left, letter = numbers[k, -2:]
                for frame in reply.take(shown[k, :-2], int(left), int(letter)):
                    yield reply.number, frame
                if reply.finish:
                    finish[reply.number] = reply.finish
                else:
                    going.append(k)
            if len(going) < len(replies):
                replies = [replies[k] for k in going]
                if replies:
                    speech.keep(going)
            if replies:
                with slots.acting(self, speech.places):
                    h, n = speech.step(replies, n), n + 1
        self.finish = finish

    def _takes(self, requests, s):
        """Frames of all requests, piece by piece, with further tries.

        Each piece has the references and the pieces spoken before as its context.
        """
        ends = ["end"] * len(requests)
        for number in range(max(len(r.pieces) for r in requests)):
            active = [i for i, r in enumerate(requests) if number < len(r.pieces) and r.frames < s.max_len]
            pieces = []
            for request in (requests[i] for i in active):
                pieces.append({"request": request, "text": request.pieces[number], "seed": request.seed})
            frames = [[] for _ in active]
            for k, frame in takes(self, pieces, s, lambda piece, made, finish: finish == "cap" or not made):
                frames[k].append(frame)
                yield active[k], frame
            for i, piece, made, finish in zip(active, pieces, frames, self.finish):
                ends[i] = "cap" if "cap" in (ends[i], finish) else "end"
                requests[i].frames += len(made)
                if made:
                    text = tagged(piece["text"], requests[i].number)
                    requests[i].spoken.append((text, torch.stack(made, 1)))
        self.finish = ends

    def frames(self, text, prompts=(), speaker=None, seed=None, noise=None, **sampling):
        """Frames (K,) int64, one by one, the delay undone; self.finish is then ["end"] or ["cap"]."""
        s = Sampling(**sampling)
        request = self._request(s, Wanted(text, prompts, speaker, seed, noise))
        for _, frame in self._takes([request], s):
            yield frame

    def generate(self, text, prompts=(), speaker=None, seed=None, noise=None, **sampling):
        """Audio in chunks (n,) at `out_sample_rate`; joined they are the whole."""
        request = dict(text=text, prompts=prompts, speaker=speaker, seed=seed, noise=noise)
        for _, chunk in self.generate_batch([request], **sampling):
            yield chunk

    @torch.no_grad()
    def generate_batch(self, requests, **sampling):
        """Yields (i, chunk). A chunk comes as soon as those frames are known that the codec looks ahead
        to."""
        s = Sampling(**sampling)
        named = slots.named(self, requests)
        requests = [replace(self._request(s, Wanted(**r)), slot=slot) for r, slot in named]
        codec = self.codec.to(self.device)
        sounds = [Sound(codec, s.chunk_frames) for _ in requests]
        for i, frame in self._takes(requests, s):
            chunk = sounds[i].add(frame)
            if chunk is not None:
                yield i, chunk
        for i, sound in enumerate(sounds):
            rest = sound.flush()
            if not sound.frames:
                warnings.warn(f"request {i}: the answer ended without a frame, so there is only silence; "
                              "try another seed, or retries")
                rest = torch.zeros(codec.hop)
            if len(rest):
                yield i, rest

    # ---------------------------------------------------------------------------------- names and files

    def published_name(self, parameter, naming=None):
        """The name of a parameter in a published file."""
        return renamed(parameter, naming or self.naming)

    def published_rows(self, parameter, naming=None):
        """Both layouts have the rows that are in memory."""
        return None

    def adapter_words(self, modules, values):
        """lora_config.json of the single-file form, which no tool of this backbone reads."""
        return {**values, "target_modules": sorted(modules)}

    def published_state_dict(self, naming=None, merged=False):
        """{published name: tensor}. merged adds the adapters, tensor by tensor, in float32."""
        return {self.published_name(name, naming): w for name, w in checkpoint.weights(self, merged).items()}

    def save(self, folder, naming=None, merged=False):
        """Write a folder in a published layout: weights, config.json, tokenizer, and the codec as it was
        read."""
        naming = naming or self.naming
        if naming not in self.namings:
            raise Invalid(f"naming {naming!r}: expected {' or '.join(self.namings)}")
        if not merged and any(".lora_" in n for n, _ in self.named_parameters()):
            raise Invalid("the model has adapters on: save(merged=True) adds them to the weights, "
                          "lora.save_lora_weights keeps them apart")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.save_tensors(folder / "model.safetensors", self.published_state_dict(naming, merged))
        write_json(folder / "config.json", self._published_config(naming))
        # Boson's end of text and transformers' end of turn stop different loops, so each layout has its own.
        write_json(folder / "generation_config.json", self._generation_config(naming))
        if naming == "transformers":  # its processor; a folder that was read so has its own, which is copied
            write_json(folder / "processor_config.json", self._processor_config())
            (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
        for role, path in self.files.items():
            if role == "generation_config.json":
                continue
            target = (folder / CODEC_FOLDER if role.startswith("codec/") else folder) / path.name
            target.parent.mkdir(exist_ok=True)
            if path.resolve() != target.resolve():
                shutil.copyfile(path, target)
        return folder

    def _generation_config(self, naming):
        file = self.files.get("generation_config.json")
        raw = checkpoint.read_object(file) if file and naming == self.naming else {}
        end = self.marks.get("<|end_of_text|>", self.marks["<|eot_id|>"])
        ids = {"bos_token_id": self.marks["<|begin_of_text|>"], "eos_token_id": end, "pad_token_id": end}
        if naming == "transformers":
            ids |= {"eos_token_id": self.marks["<|eot_id|>"], "use_text_head": True,
                    "ras_win_len": 7, "ras_win_max_num_repeat": 2}
        return {**ids, **raw}

    def _processor_config(self):
        """processor_config.json: how transformers makes inputs of conversations. It names the codec by its id
        on the hub, since it cannot say that one lies inside the folder."""
        c = self.config
        features = {"feature_extractor_type": "DacFeatureExtractor", "feature_size": 1,
                    "padding_side": "right", "padding_value": 0.0, "sampling_rate": self.sample_rate,
                    "hop_length": self.codec.hop}
        codec = {"audio_tokenizer_class": "HiggsAudioV2TokenizerModel",
                 "audio_tokenizer_name_or_path": PARTS["codec"]}
        return {"processor_class": "HiggsAudioV2Processor", "feature_extractor": features,
                "audio_tokenizer": codec, "audio_token": "<|AUDIO_OUT|>", "audio_delay_token": DELAY,
                "audio_bos_token": "<|audio_out_bos|>", "audio_eos_token": "<|audio_eos|>",
                "audio_stream_bos_id": c.audio_stream_bos_id, "audio_stream_eos_id": c.audio_stream_eos_id}

    def _published_config(self, naming):
        """config.json of a layout: what was read where it is the same one, completed from what is known."""
        raw = dict(self.raw_config) if naming == self.naming else {}
        widths = dataclasses.asdict(self.config)
        llama = {key: widths[key] for key in LLAMA_KEYS}
        llama |= {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
                  "tie_word_embeddings": False}
        make = self._transformers_config if naming == "transformers" else self._original_config
        return make(llama, raw)

    def _ids(self):
        """Ids that both layouts state under the same keys."""
        c, marks = self.config, self.marks
        return {"audio_stream_bos_id": c.audio_stream_bos_id, "audio_stream_eos_id": c.audio_stream_eos_id,
                "pad_token_id": marks.get("<|end_of_text|>", marks["<|eot_id|>"])}

    def _transformers_config(self, llama, raw):
        c, marks = self.config, self.marks
        known = {**llama, **self._ids(), "model_type": "higgs_audio_v2", "dtype": str(self.dtype)[6:],
                 "architectures": ["HiggsAudioV2ForConditionalGeneration"], "num_codebooks": c.num_codebooks,
                 "audio_token_id": marks["<|AUDIO_OUT|>"], "audio_bos_token_id": marks["<|audio_out_bos|>"],
                 "audio_delay_token_id": marks.get(DELAY, marks["<|AUDIO|>"]),
                 "bos_token_id": marks["<|begin_of_text|>"], "eos_token_id": marks["<|eot_id|>"],
                 "rope_parameters": rope_block(c)}
        return {**known, **raw, "codebook_size": c.codebook_size}

    def _original_config(self, llama, raw):
        c, marks, ids = self.config, self.marks, self._ids()
        text = {**llama, "model_type": "llama", "rope_theta": c.rope_theta, "rope_scaling": original_rope(c),
                "bos_token_id": marks["<|begin_of_text|>"], "eos_token_id": ids["pad_token_id"]}
        asked = {key: values[0] for key, (values, _) in ONLY.items() if key not in llama}
        known = {**asked, **ids, "model_type": "higgs_audio", "torch_dtype": str(self.dtype)[6:],
                 "architectures": ["HiggsAudioModel"], "skip_audio_tower": True,
                 "audio_adapter_type": "dual_ffn_fast_forward",
                 "audio_dual_ffn_layers": list(range(c.num_hidden_layers)),
                 "audio_ffn_hidden_size": c.hidden_size,
                 "audio_ffn_intermediate_size": c.audio_ffn_intermediate_size,
                 "audio_num_codebooks": c.num_codebooks, "audio_codebook_size": c.codebook_size - 2,
                 "audio_in_token_idx": marks["<|AUDIO|>"], "audio_out_token_idx": marks["<|AUDIO_OUT|>"],
                 "audio_out_bos_token_id": marks["<|audio_out_bos|>"], "audio_eos_token_id":
                 marks["<|audio_eos|>"]}
        return {**known, **raw, "text_config": {**text, **(raw.get("text_config") or {})}}

    @property
    def codec_key(self):
        """Names the frozen codec: cached codes with another key are of another codec."""
        if self._codec_key is None:
            self._codec_key = f"higgs-{checkpoint.fingerprint(self.codec)}"
        return self._codec_key

    @property
    def encode_key(self):
        """Names everything else that `encode` reads."""
        o = self.training_options
        read = self.tokenizer_crc, sorted(self.marks.items()), o.reference_in, o.system, o.scene
        return f"{self.codec_key}-{zlib.crc32(repr(read).encode()):08x}"


# ------------------------------------------------------------------------------------------------ files

LLAMA_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
              "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings")
MODEL = "bosonai/higgs-audio-v2-generation-3B-base"
COMPANIONS = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json",
              "preprocessor_config.json", "processor_config.json", "chat_template.jinja")
CODEC_FOLDER = PARTS["codec"].split("/")[1]
DELAY = "<|reserved_special_token_6|>"  # stands at the last seven columns of a clip in transformers' ids
# What `_render` writes, for transformers, which knows only one placeholder. Its processor repeats that.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|begin_of_text|>' if loop.first else '' -}}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' -}}
    {%- set text = [{'type': 'text', 'text': message.content}] -%}
    {%- for part in (text if message.content is string else message.content) -%}
        {%- if part.type == 'audio' -%}
            {{- '<|audio_out_bos|>' if message.role == 'assistant' else '<|audio_bos|>' -}}
            {{- '<|AUDIO_OUT|><|audio_eos|>' -}}
        {%- else -%}
            {{- part.text -}}
        {%- endif -%}
    {%- endfor -%}
    {{- '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n<|audio_out_bos|>' -}}
{%- endif -%}
"""
# Special tokens, and the keys of config.json that give their ids where the tokenizer does not name them.
MARKS = {"<|begin_of_text|>": (), "<|start_header_id|>": (), "<|end_header_id|>": (), "<|eot_id|>": (),
         "<|audio_bos|>": (), "<|audio_eos|>": ("audio_eos_token_id",),
         "<|audio_out_bos|>": ("audio_out_bos_token_id", "audio_bos_token_id"),
         "<|AUDIO|>": ("audio_in_token_idx",), "<|AUDIO_OUT|>": ("audio_out_token_idx", "audio_token_id")}
SELDOM = ("<|eom_id|>", "<|end_of_text|>", DELAY, *SCENE)  # wanted where a row or a file has them

# Parameters bear the original names here; (original, transformers). Any other gets "model." in front.
NAMES = (("audio_codebook_embeddings.", "model.embed_audio_tokens.embed_audio_tokens."),
         ("audio_decoder_proj.", ""))
# Tables of which Boson's trainer kept some rows frozen: the trained ones follow.
SPLIT = {"embed_tokens.embedding_{}.weight": "embed_tokens.weight",
         "audio_decoder_proj.text_lm_head.linear_{}.weight": "audio_decoder_proj.text_lm_head.weight"}


def renamed(name, naming, back=False):
    """The name here in another naming, or with `back` the other way round."""
    if naming == "original":
        return name
    if back:
        audio, heads = NAMES
        if name.startswith(audio[1]):
            return audio[0] + name.removeprefix(audio[1])
        return name.removeprefix("model.") if name.startswith("model.") else heads[0] + name
    for original, other in NAMES:
        if name.startswith(original):
            return other + name.removeprefix(original)
    return f"model.{name}"


def naming_of(names):
    """Which of the two namings these tensor names are; None for neither."""
    if "model.embed_audio_tokens.embed_audio_tokens.weight" in names and "audio_lm_head.weight" in names:
        return "transformers"
    if "audio_codebook_embeddings.weight" in names and "audio_decoder_proj.audio_lm_head.weight" in names:
        return "original"
    return None


def is_codec(config):
    """Whether a config.json, or the names of tensors, are those of the audio tokenizer."""
    names = config.get("tensors", ())
    if names:
        first = ("quantizer.quantizers.0.codebook.embed", "quantizer.vq.layers.0._codebook.embed")
        return any(name in names for name in first)
    original = {"n_filters", "ratios", "semantic_techer"} <= set(config)
    return original or config.get("model_type") == "higgs_audio_v2_tokenizer"


def recognizes(config):
    """Also the audio tokenizer, so that `load` can say what it is."""
    if is_codec(config):
        return True
    if config.get("tensors"):
        return naming_of(config["tensors"]) is not None
    original = {"text_config", "audio_num_codebooks", "audio_codebook_size"} <= set(config)
    other = {"num_codebooks", "codebook_size", "audio_delay_token_id", "audio_stream_bos_id"} <= set(config)
    return original or other


def joined(stored):
    """Stored tensors with the frozen and trained halves of a table as one."""
    out = dict(stored)
    for pattern, name in SPLIT.items():
        names = [pattern.format(half) for half in ("frozen", "trainable")]
        halves = [out.pop(half) for half in names if half in out]
        if halves:
            shape = (sum(h.shape[0] for h in halves), *halves[0].shape[1:])

            def load(halves=halves):
                return torch.cat([half.load() for half in halves])

            out[name] = Stored(shape, halves[0].dtype, load)
    return out


def rope_block(c):
    """rope_parameters for transformers, where the old context may not exceed the positions: equal
    frequencies."""
    if c.rope_scaling is None:
        return {"rope_type": "default", "rope_theta": c.rope_theta}
    shrink = 1
    while c.rope_scaling["original_max_position_embeddings"] / shrink >= c.max_position_embeddings:
        shrink *= 2
    return {"rope_type": "llama3", "rope_theta": c.rope_theta, **rescaled(c.rope_scaling, 1 / shrink)}


def original_rope(c):
    """rope_scaling of the original layout, with the low factor 1 as it is there."""
    if c.rope_scaling is None:
        return None
    return {"rope_type": "llama3", **rescaled(c.rope_scaling, 1 / c.rope_scaling["low_freq_factor"])}


def rescaled(scaling, by):
    """The same stretching in other numbers: only the old context over the two factors counts."""
    return {"factor": scaling["factor"], "low_freq_factor": scaling["low_freq_factor"] * by,
            "high_freq_factor": scaling["high_freq_factor"] * by,
            "original_max_position_embeddings": round(scaling["original_max_position_embeddings"] * by)}


def write_json(path, values):
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def load(folder, device="cpu", dtype=torch.float32, options=None, extra=None, weights=None,
         allow_unused=False):
    """The model in eval mode from a published folder or file. extra: paths of codec and tokenizer kept
    elsewhere.

    weights picks a naming or a file where several lie side by side; "scratch" draws those of what
    config.json says.
    """
    path, extra = Path(folder), extra or {}
    folder = path if path.is_dir() else path.parent
    where = folder / "config.json"
    raw = checkpoint.read_object(where) if where.is_file() else {}
    if weights == "scratch":
        stored, naming, source = {}, "original" if "text_config" in raw else "transformers", path
    else:
        source, stored, naming = _find_weights(path, raw, weights)
    stored = joined({renamed(n, naming, back=True): t for n, t in stored.items()})
    if naming == "transformers" and stored and "audio_decoder_proj.text_lm_head.weight" not in stored:
        raise Invalid(f"{source}: no text_lm_head.weight. transformers leaves it out of what it saves "
                      "unless the model was "
                      "loaded with use_text_head=True; save it again so, or copy that tensor from the base.")
    config = read_config(raw, {n: t.shape for n, t in stored.items()}, str(where))
    with torch.device("meta"):
        model = Higgs(config, naming, raw)
    if weights == "scratch":
        model.to_empty(device="cpu")
        draw(model)
        model.to(device, dtype)
    else:
        model.left_unused = checkpoint.fill(model, stored, dtype=dtype, device=device,
        allow_unused=allow_unused,
                                            what=str(source))
    tokenizer = Path(extra.get("tokenizer") or folder)
    tokenizer = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
    if not tokenizer.is_file():
        raise Invalid(f"no tokenizer.json at {tokenizer}; the text tokenizer lies beside the weights of "
                      f"{MODEL}. Copy it into the folder, or say --extra.tokenizer")
    codec, files = _load_codec(folder, extra.get("codec"))
    files["tokenizer"] = tokenizer
    files |= {name: folder / name for name in COMPANIONS if (folder / name).is_file()}
    model.equip(codec, Tokenizer(tokenizer, config.vocab_size), files, options or {})
    return model.eval()


def read_marks(tokenizer, raw):
    """{special token: id}: those that every row needs, and others that are there. raw: config.json, which
    has some."""
    marks = {}
    for name in (*MARKS, *SELDOM):
        number = tokenizer.id(name)
        for key in MARKS.get(name, ()):
            number = raw.get(key) if number is None else number
        if number is None and name in MARKS:
            raise Invalid(f"{tokenizer.name} has no {name}; it is not the tokenizer of Higgs Audio v2, "
                          "which names its "
                          "special tokens so")
        if number is not None:
            marks[name] = number
    return marks


def _find_weights(path, raw, wanted):
    """(file, {published name: Stored}, naming): the file given, or the first in the folder of the wanted
    naming."""
    if path.is_dir() and is_codec(raw):
        raise Invalid(f"{path} is the audio tokenizer, not the language model. Give the folder of {MODEL} "
                      "as the checkpoint "
                      f"and this one as --extra.codec {path}")
    if path.is_dir() and wanted and (path / wanted).is_file():
        path = path / wanted
    names = ("model.safetensors.index.json", "model.safetensors",
             "pytorch_model.bin.index.json", "pytorch_model.bin")
    files = [path] if path.is_file() else [path / n for n in names if (path / n).is_file()]
    if path.is_dir():  # a file of another name, but no single shard
        more = sorted(p for p in path.glob("*.safetensors") if "-of-" not in p.name)
        files += [p for p in more if p not in files]
    seen = []
    for file in files:
        stored = checkpoint.read(file)
        naming = naming_of(stored)
        if naming and wanted in (None, naming, file.name):
            return file, stored, naming
        kind = "the audio tokenizer" if is_codec({"tensors": list(stored)}) else naming or "no Higgs Audio"
        seen.append(f"{file.name} ({kind})")
    asked = f" in naming {wanted!r}" if wanted else ""
    found = f", found {', '.join(seen)}" if seen else ""
    raise Invalid(f"{path}: no weights of Higgs Audio{asked}; looked for {', '.join(names)}{found}")


def _load_codec(folder, given):
    """(codec, {role: path} of its files) from `given` (file or folder), or from inside the model's folder."""
    place = Path(given) if given is not None else _codec_inside(folder)
    if place is None:
        beside = folder.parent / CODEC_FOLDER
        hub = PARTS["codec"]
        raise Invalid(f"{folder} comes without its audio tokenizer, the codec. Expected it in "
                      f"{folder / CODEC_FOLDER}, in {beside}, or as {hub} in the local hub cache. Run\n"
                      f"    hf download {hub} --local-dir {beside}\nor give --extra.codec DIR")
    if not place.exists():
        raise Invalid(f"the codec: nothing at {place}")
    file = _codec_file(place)
    names = set(checkpoint.read(file))
    if naming_of(names):
        raise Invalid(f"{place} is the language model, not the audio tokenizer (codec). Expected the folder "
                      f"of {PARTS['codec']}, or its model.pth or model.safetensors")
    beside = [file.parent / name for name in ("config.json", "preprocessor_config.json")]
    files = [file, *(path for path in beside if path.is_file())]
    return higgs_codec.load(file), {f"codec/{path.name}": path for path in files}


def _codec_file(place):
    """The weight file of a codec's folder; of two namings side by side the folded one: both are the same."""
    names = ("model.safetensors", "model.safetensors.index.json", "model.pth", "pytorch_model.bin")
    return checkpoint.find(place, names, f"{PARTS['codec']}, the audio tokenizer (codec)")


def _codec_inside(folder):
    """The place of a codec in a folder, by what it holds; None if there is none."""
    for path in sorted(p for p in folder.iterdir() if p.is_dir()):
        config = path / "config.json"
        if config.is_file() and is_codec(checkpoint.read_object(config)):
            return path
    file = folder / "model.pth"
    if file.is_file() and is_codec({"tensors": list(checkpoint.read(file))}):
        return file
    return None


def draw(model):
    """Random weights as upstream's classes start: normal 0.02, norms one."""
    for name, p in model.named_parameters():
        nn.init.ones_(p) if name.endswith("norm.weight") else nn.init.normal_(p, std=0.02)


# ------------------------------------------------------------------------------------------------ measuring

# vocabulary, width, both feed-forwards, layers, heads, groups, head size; the codec's filters, width and
# layers
SHAPES = {"tiny": ((300, 64, 128, 128, 2, 4, 2, 16), (4, 48, 1)),
          "mid": ((4096, 512, 1368, 1368, 4, 8, 2, 64), (16, 192, 2)),
          "real": ((128256, 3072, 8192, 8192, 28, 24, 8, 128), (64, 768, 12))}


def shape(size, version=""):
    """(Config, sizes of the codec) as published, or smaller in nearly the same proportions."""
    if version:
        raise Invalid(f"version {version!r}: there is only one Higgs Audio v2; leave version out")
    widths, codec = SHAPES[size]
    return Config(*widths, 8, 1026, 1024, 1025, rope_scaling=LLAMA3), codec


def blank(size, version, device, dtype, options=None):
    """A model of a known shape with drawn weights and a tokenizer of single letters, for measuring only."""
    config, codec = shape(size, version)
    with torch.device("meta"):
        model = Higgs(config)
    model.to_empty(device=device)
    draw(model)
    model.to(dtype)
    letters = "abcdefghijklmnopqrstuvwxyz \n.:,"
    vocab = {piece: i for i, piece in enumerate(["<unk>", *MARKS, *SELDOM, *letters])}
    tokenizer = Tokenizer({"model": {"type": "BPE", "vocab": vocab, "merges": [], "unk_token": "<unk>"}})
    model.equip(higgs_codec.blank(*codec), tokenizer, {}, options or {})
    return model.eval()
