"""VoxCPM 0.5B, 1.5 and 2: text in, continuous audio latents out, one patch of P latent frames per step.

Four transformers of one kind share the work. The base LM reads text and earlier patches, a quantiser keeps
the coarse part of its state (audio positions only), the residual LM adds the fine part; from both a small
diffusion transformer (DiT) draws the next patch by flow matching, and a head says whether it was the last. A
local encoder turns each patch into one vector for the LMs. There are no audio tokens and there is no sampling
over a vocabulary.

    position      0 ... S-2   S-1     S    ...   S+A-1       S text tokens with the 101, A patches
    base LM in    text        101     patch 1 .. patch A     a reference comes first: 103 patches 104 text
    DiT predicts              patch 1 patch 2 .. (stop)      position t is drawn from the state at t - 1

Papers: arXiv 2509.24650 (VoxCPM), 2606.06928 (VoxCPM2). Checkpoints: openbmb/VoxCPM-0.5B, VoxCPM1.5, VoxCPM2.
VoxCPM2 is also read and written in transformers' form: one file, which holds the codec, too.

What differs from the original code, on purpose:
- Losses are sums over target patches; local encoder and DiT see audio patches and target patches only. The
  original runs both on every position and masks afterwards: the same loss for more than twice the work.
- The token 102 that the original appends in training is counted in `length` but not fed: it stands after
  everything that is predicted, so no loss and no gradient depends on it.
- Rotary tables and the flow's running sample stay float32 in every dtype.
- Streaming keeps the codec's state for both generations (the original re-decodes three patches in 0.5B and
  1.5, and only the first three come out exact); continuation cuts exactly the prompt patches that it decoded
  in front.
- The length cap counts generated patches against the tokens of the target text only.
- Truncation never removes the stop label: rows that are too long are the caller's to drop.

Letters besides the usual: P latent frames per patch, D latent channels, A patches of a clip, M audio patches
in a batch, N target patches in a batch.
"""
import dataclasses
import hashlib
import json
import math
import re
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from models.codecs import audiovae
from models.parts import Invalid, audio, check, checkpoint, opt, slots
from models.parts.layers import (Context, Layer, LayerSize, Packing, RMSNorm, make_caches, rotary,
                                 rotary_frequencies, run_layers)
from models.parts.plain import alike, as_record, layers, need, read_object, shown, sized
from models.parts.sampling import LeftPadded, Speaking, chunks, generator, takes
from models.parts.textfiles import refuse_blank
from models.parts.tokenizer import Tokenizer

AUDIO_START, REF_START, REF_END = 101, 103, 104  # rows of the embedding; 102 would end the audio, see above
PATCH = -1  # stands among token ids where a patch of audio stands in the sequence
LAMBDAS = {"loss/diff": 1.0, "loss/stop": 1.0}
PARTS = {"codec": "", "tokenizer": ""}  # what may lie elsewhere; as published both come with the weights
TIME_SHIFT = -0.4  # mean of the logit of flow time in training: a little more data than noise
# of the solver's steps, at its noisy end, in which guidance is not to be trusted (CFG-Zero*)
IDLE_SHARE = 0.04
MORE_PATCHES = 10  # that a take may have over length_ratio, for texts of a word or two
CHUNK = 16  # patches per chunk of audio at most
# Last patches of a prompt that the codec decodes in front of its continuation, so that there is no seam.
WARM_PATCHES, WARM_PATCHES_FUSED = 2, 3

# -------------------------------------------------------------------------------------------- settings


@dataclass
class LMConfig:
    """Numbers of the base LM, whose kind all four transformers are."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int = layers()
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    max_position_embeddings: int = 32768
    kv_channels: int | None = None  # head size; hidden / heads where absent
    use_mup: bool = True  # the class default of the original; every published config says false
    scale_emb: float = 1.0
    scale_depth: float = 1.0

    @property
    def head_size(self):
        return self.kv_channels or self.hidden_size // self.num_attention_heads


@dataclass
class LocalConfig:
    """Numbers of the local encoder or of the DiT; the others are the base LM's."""

    hidden_dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int = layers()
    kv_channels: int | None = None

    @property
    def head_size(self):
        return self.kv_channels or self.hidden_dim // self.num_heads


@dataclass
class Config:
    """config.json under its published names; entries that no code path here reads are left out."""

    lm_config: LMConfig
    encoder_config: LocalConfig
    dit_config: LocalConfig
    architecture: str = "voxcpm"
    patch_size: int = 2
    feat_dim: int = 64
    residual_lm_num_layers: int = layers(default=6)
    residual_lm_no_rope: bool = False
    scalar_quantization_latent_dim: int = 256
    scalar_quantization_scale: int = 9
    max_length: int = 4096
    t_scheduler: str = "log-norm"  # of dit_config.cfm_config
    audio_vae_config: dict | None = None

    @property
    def fused(self):
        """What "voxcpm2" does: two conditioning tokens, a concatenating residual input, reference audio."""
        return self.architecture == "voxcpm2"


def read_config(raw):
    """Config from the record in config.json; a value that the published models never had is refused."""
    where = raw.where
    dit = need(raw, "dit_config", dict)
    flow = need(dit, "cfm_config", dict, {})
    mean_mode = dit.get("dit_mean_mode") or dit.get("mean_mode")
    if mean_mode:
        raise Invalid(f"{where}: dit_config asks for mean mode, which no published checkpoint uses "
                      "and which is not built")
    for key, choices in (("solver", ("euler",)), ("t_scheduler", ("log-norm", "uniform"))):
        found = need(flow, key, str, choices[0])
        if found not in choices:
            known = ", ".join(choices)
            raise Invalid(f"{where}: cfm_config.{key} is {shown(found)}; known are {known}")
    found = need(raw, "architecture", str, "voxcpm")
    if found not in ("voxcpm", "voxcpm2"):
        raise Invalid(f"{where}: architecture is {shown(found)}; known are voxcpm and voxcpm2")
    alike(need(raw, "audio_vae_config", dict, {}), audiovae.V2)
    section = need(raw, "lm_config", dict)
    lm = sized(LMConfig, section)
    scaling = need(section, "rope_scaling", dict, {})
    for key in ("short_factor", "long_factor") if scaling else ():
        need(scaling, key, list[float])
    need(scaling, "original_max_position_embeddings", int, None, at_least=2)
    encoder = sized(LocalConfig, need(raw, "encoder_config", dict))
    scheduler = need(flow, "t_scheduler", str, "log-norm")
    sections = dict(lm_config=lm, encoder_config=encoder, dit_config=sized(LocalConfig, dit))
    return sized(Config, raw, t_scheduler=scheduler, **sections)


TINY = Config(
    LMConfig(32, 64, 2, 4, 2, 128, use_mup=False), LocalConfig(32, 64, 4, 1), LocalConfig(32, 64, 4, 1),
    residual_lm_num_layers=1, scalar_quantization_latent_dim=8, feat_dim=8, max_length=512)


@dataclass
class Training:
    """The `backbone:` section of a training config."""

    training_cfg_rate: float = opt(0.1, "share of target patches that are trained without their condition; guidance needs it")
    float32_time: bool = opt(False, "compute the embedding of flow time in float32 even where the weights are bf16")
    guess_weight: float = opt(0.0, "weight of a linear guess of each patch beside the flow, to learn from scratch; 0 is off")
    history_noise: float = opt(0.0, "most noise on the past that a clip hears of itself, in its deviations; 0 is off")

    def __post_init__(self):
        check(self, training_cfg_rate=0, guess_weight=0, history_noise=0)


@dataclass
class Sampling:
    """What `generate` takes besides text, prompts, seed and noise."""

    cfg_value: float = opt(2.0, "strength of classifier-free guidance; 1 to 3 is the usual range")
    inference_timesteps: int = opt(10, "steps of the flow-matching solver; 4 to 30 is the usual range", most=1000)
    noise_scale: float = opt(1.0, "factor of the noise that the solver starts from; less is steadier and less varied")
    min_len: int = opt(2, "patches after which the stop head is first asked")
    max_len: int = opt(4096, "patches at most")
    length_ratio: float = opt(6.0, "at most this many patches per token of the target text, plus ten")
    retries: int = opt(0, "tries with the next seed when a take reaches length_ratio; needs the take to end first")

    def __post_init__(self):
        check(self, inference_timesteps=1, noise_scale=0, min_len=0, max_len=1, length_ratio=0, retries=0)


# -------------------------------------------------------------------------------------------- modules


class Stack(nn.Module):
    """MiniCPM4 layers with a final norm: both LMs, the local encoder and the DiT. (B, L, C) -> (B, L, C)."""

    def __init__(self, lm, size, num_layers, vocab_size=0, use_rope=True):
        """lm: LMConfig, for what all stacks share. size: LayerSize, whose `branch` is set here."""
        super().__init__()
        if lm.use_mup:
            size = size._replace(branch=lm.scale_depth / math.sqrt(num_layers))
        if vocab_size:  # drawn as nn.Embedding draws, whose own draw imports a compiler on the meta device
            table = torch.randn(vocab_size, size.width)
            self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        self.layers = nn.ModuleList(Layer(size) for _ in range(num_layers))
        self.norm = RMSNorm(size.width, lm.rms_norm_eps)
        self.register_buffer("frequencies", None, persistent=False)
        self.rope_scale = 1.0
        self.ropes = {}  # (length, device) -> what `rope` makes of positions 0, 1, ..
        self.lm, self.head_size, self.use_rope = lm, size.head_size, use_rope
        self.recompute = False

    def make_rotary(self, device):
        """After loading and casting: frequencies stay float32, and the meta device holds no numbers.

        They are divided by LongRoPE's factors at every length; 'long' ones only past the original length.
        """
        scaling, limit, factors = self.lm.rope_scaling, self.lm.max_position_embeddings, None
        self.rope_scale, self.ropes = 1.0, {}
        if scaling:
            original = scaling.get("original_max_position_embeddings") or limit
            ratio = limit / original
            factors = scaling["long_factor" if ratio > 1 else "short_factor"]
            if ratio > 1:
                self.rope_scale = math.sqrt(1 + math.log(ratio) / math.log(original))
            if len(factors) != self.head_size // 2:
                raise Invalid(f"rope_scaling has {len(factors)} factors for heads of {self.head_size}; "
                              f"expected {self.head_size // 2}")
        frequencies = rotary_frequencies(self.head_size, self.lm.rope_theta, factors)
        self.frequencies = frequencies.to(device)

    def rope(self, positions):
        """The rotary pair of positions; None where this stack has none."""
        return rotary(positions, self.frequencies, self.rope_scale) if self.use_rope else None

    def forward(self, x, context, caches=None):
        x = run_layers(self.layers, x, context, caches, self.training and self.recompute)
        return self.norm(x)

    def local(self, x, keep):
        """Of a few positions that all see each other: what comes out at those in `keep`."""
        key = x.shape[1], x.device
        if key not in self.ropes:  # always the same few lengths
            with torch.inference_mode(False):  # it may be kept for a training step
                self.ropes[key] = self.rope(torch.arange(x.shape[1], device=x.device))
        return self.forward(x, Context(self.ropes[key], keep=keep))


def local_stack(lm, c):
    """The Stack of a LocalConfig."""
    size = LayerSize(width=c.hidden_dim, hidden=c.ffn_dim, heads=c.num_heads,
                     kv_heads=lm.num_key_value_heads, head_size=c.head_size, eps=lm.rms_norm_eps)
    return Stack(lm, size, c.num_layers)


class LocalEncoder(nn.Module):
    """(M, P, D) -> (M, C): a special token in front of the P frames of a patch, and what comes out at it."""

    def __init__(self, lm, c, feat_dim):
        super().__init__()
        self.special_token = nn.Parameter(torch.zeros(1, 1, 1, c.hidden_dim))
        self.in_proj = nn.Linear(feat_dim, c.hidden_dim)
        self.encoder = local_stack(lm, c)

    def forward(self, patches):
        x = self.in_proj(patches)
        first = self.special_token[0].expand(len(x), 1, -1)
        x = torch.cat([first, x], 1)  # (M, P + 1, C)
        return self.encoder.local(x, keep=slice(0, 1))[:, 0]


class TimeMLP(nn.Module):
    """Two layers over an embedding of flow time. (N, C) -> (N, C)."""

    def __init__(self, width):
        super().__init__()
        self.linear_1 = nn.Linear(width, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x):
        return self.linear_2(F.silu(self.linear_1(x)))


def sinusoid(t, size):
    """Embedding of flow time, (N,) -> (N, size), sines before cosines, in the dtype of t.

    In bf16 the phases are coarse (near 1 the angle moves in steps of 4). The published models were most
    likely trained so, hence it is what happens with bf16 weights unless float32_time says otherwise.
    """
    half = size // 2
    k = torch.arange(half, dtype=t.dtype, device=t.device)
    angle = 1000 * t[:, None] * torch.exp(k * (-math.log(10000) / (half - 1)))
    return torch.cat([angle.sin(), angle.cos()], -1)


class DiT(nn.Module):
    """Velocity of the flow for one patch: [condition, time] [previous patch] [noisy patch] -> the last P."""

    def __init__(self, lm, c, feat_dim, fused):
        super().__init__()
        self.in_proj = nn.Linear(feat_dim, c.hidden_dim)
        self.cond_proj = nn.Linear(feat_dim, c.hidden_dim)
        self.out_proj = nn.Linear(c.hidden_dim, feat_dim)
        self.time_mlp = TimeMLP(c.hidden_dim)
        self.delta_time_mlp = TimeMLP(c.hidden_dim)
        self.decoder = local_stack(lm, c)
        self.width, self.fused = c.hidden_dim, fused
        self.float32_time = False

    def embed_time(self, t, dtype, rows=1):
        """Times (N,) float32 in [0, 1], 1 is noise -> (N, C). rows: those of a batch, one after the other."""
        t = t if self.float32_time else t.to(dtype)
        time = self.time_mlp(sinusoid(t, self.width).to(dtype))
        # The step size is always given as zero, yet what its MLP makes of a zero was trained and is added.
        zero = sinusoid(torch.zeros_like(t[:rows]), self.width).to(dtype)
        return time + self.delta_time_mlp(zero).repeat(len(t) // rows, 1)

    def forward(self, x, mu, t, cond):
        """x and cond (N, P, D), mu (N, C) or (N, 2C), t (N,) -> (N, P, D)."""
        return self.velocity(self.in_proj(x), mu, self.embed_time(t, x.dtype), self.cond_proj(cond))

    def velocity(self, x, mu, time, cond):
        """The same of embedded x, cond (N, P, C) and time (N, C) or (1, C).

        Generation embeds once what its branches and steps share.
        """
        P = x.shape[1]
        if self.fused:
            time = time[:, None].expand(len(mu), 1, -1)
            head = torch.cat([mu.view(len(mu), 2, self.width), time], 1)  # (N, 3, C)
        else:
            head = (mu + time)[:, None]  # (N, 1, C)
        y = self.decoder.local(torch.cat([head, cond, x], 1), keep=slice(-P, None))
        return self.out_proj(y)


class Flow(nn.Module):
    """Holds the DiT under its published name and integrates its velocity from noise (1) to data (0)."""

    def __init__(self, estimator):
        super().__init__()
        self.estimator = estimator

    def grid(self, steps, dtype, device):
        """Times from 1 to 0, denser near 1 ("sway", coefficient one), rounded as the original does."""
        t = torch.linspace(1, 0, steps + 1, device=device, dtype=dtype)
        return (t + (torch.cos(torch.pi / 2 * t) - 1 + t)).float()

    def solve(self, z, mu, cond, steps, cfg_value):
        """Euler steps with guidance. z (B, P, D) float32 noise, mu (B, .), cond (B, P, D) -> (B, P, D)
        float32.

        The condition `cond` stays in both branches, only mu is zeroed. The branch without mu is first
        rescaled to fit the other ("CFG-Zero*", arXiv 2503.18886), and the first 4 % of the steps, at least
        one, do nothing.
        """
        t, dit = self.grid(steps, mu.dtype, z.device), self.estimator
        mu = torch.cat([mu, torch.zeros_like(mu)])
        # Of a time all rows make the same, unless each has an adapter of its own there.
        apart = slots.hold(dit.time_mlp, dit.delta_time_mlp)
        rows = len(mu) if apart else 1
        t_rows = t.repeat_interleave(rows)
        times = dit.embed_time(t_rows, mu.dtype, rows).split(rows)
        cond = dit.cond_proj(cond).repeat(2, 1, 1)
        x = z
        idle = max(1, int((steps + 1) * IDLE_SHARE))
        for i in range(idle, steps):
            noisy = dit.in_proj(x.to(mu.dtype)).repeat(2, 1, 1)
            with_mu, without = dit.velocity(noisy, mu, times[i], cond).float().chunk(2)
            a, b = with_mu.flatten(1), without.flatten(1)
            scale = (a * b).sum(1) / (b.square().sum(1) + 1e-8)
            guided = scale[:, None, None] * without * (1 - cfg_value)
            velocity = torch.add(guided, with_mu, alpha=cfg_value)
            x = x - (t[i] - t[i + 1]) * velocity
        return x


class Quantizer(nn.Module):
    """Finite scalar quantisation, 2 x 9 + 1 levels a channel, straight-through in training; (.., C) stays."""

    def __init__(self, width, latent, levels):
        super().__init__()
        self.in_proj = nn.Linear(width, latent)
        self.out_proj = nn.Linear(latent, width)
        self.levels = levels

    def forward(self, x):
        y = torch.tanh(self.in_proj(x))
        q = torch.round(y * self.levels) / self.levels
        return self.out_proj(y + (q - y).detach() if self.training else q)


def blur(latents, most, generator):
    """Latents (A, P, D) with noise of a strength drawn for the clip, up to `most` deviations of each channel.

    Speaking freely, a model hears its own patches, never true ones; after a training on true ones it is soon
    lost. A model that learns from scratch under strong noise (2) takes the words from its text and not from
    the sound before, so that an adapter to a voice unlike all that it knows keeps them.
    """
    strength = most * torch.rand(1, generator=generator)
    deviation = latents.std((0, 1), correction=0)
    noise = torch.randn(latents.shape, generator=generator)
    return latents + strength * deviation * noise


class Part(NamedTuple):
    """A piece of a training sequence: tokens, or a clip."""

    tokens: torch.Tensor  # (n,)
    patches: torch.Tensor  # (n, P, D) of a clip, else (0, P, D)
    target: bool  # are its patches trained?


class VoxCPM(nn.Module):
    """The trained model under its published names; the codec is in no list of parameters."""

    backbone = "voxcpm"
    namings = ("published", "transformers")  # the second for VoxCPM2 alone
    speaker_input = False
    lora_dropout_after = True  # the original drops out the update, not its input
    native_adapter = "voxcpm"
    adapter_namings = {"voxcpm": "published", "peft": "published"}
    embeddings = ("base_lm.embed_tokens",)

    def __init__(self, config, naming="published", raw_config=None):
        """naming and raw_config (config.json) are those of the folder that was read: `save` keeps them."""
        super().__init__()
        c, lm = config, config.lm_config
        H, W = lm.hidden_size, c.dit_config.hidden_dim
        size = LayerSize(width=H, hidden=lm.intermediate_size, heads=lm.num_attention_heads,
                         kv_heads=lm.num_key_value_heads, head_size=lm.head_size, eps=lm.rms_norm_eps)
        self.base_lm = Stack(lm, size, lm.num_hidden_layers, lm.vocab_size)
        self.residual_lm = Stack(lm, size, c.residual_lm_num_layers, use_rope=not c.residual_lm_no_rope)
        self.feat_encoder = LocalEncoder(lm, c.encoder_config, c.feat_dim)
        self.feat_decoder = Flow(DiT(lm, c.dit_config, c.feat_dim, c.fused))
        self.fsq_layer = Quantizer(H, c.scalar_quantization_latent_dim, c.scalar_quantization_scale)
        self.enc_to_lm_proj = nn.Linear(c.encoder_config.hidden_dim, H)
        self.lm_to_dit_proj = nn.Linear(H, W)
        self.res_to_dit_proj = nn.Linear(H, W)
        self.fusion_concat_proj = nn.Linear(2 * H, H) if c.fused else None
        self.stop_proj = nn.Linear(H, H)
        self.stop_head = nn.Linear(H, 2, bias=False)
        self.config = config
        self.naming, self.raw_config = naming, raw_config or {}
        if not c.fused:
            self.namings = ("published",)

        # What may be set from outside, and what `equip` fills.
        self.path = self.fingerprint = ""
        self.left_unused, self.finish = [], []
        self.speakers = {}  # as the training data named them; adapters keep them, nothing here reads them
        self.max_length = c.max_length
        self._frozen, self.tokenizer, self.files = [], None, {}
        self.sample_rate = self.out_sample_rate = 0
        self.split_pieces = set()  # of several Chinese characters, which become single ones
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
        self.sample_rate, self.out_sample_rate = codec.sample_rate, codec.out_sample_rate
        self.split_pieces = {piece for piece in tokenizer.vocab if len(piece) >= 2 and is_chinese(piece)}
        if "tokenizer" in files:
            self.tokenizer_crc = zlib.crc32(files["tokenizer"].read_bytes())
        for stack in self.stacks():
            stack.make_rotary(self.device)
        self.training_options = Training(**options)
        self.feat_decoder.estimator.float32_time = self.training_options.float32_time

    # -------------------------------------------------------------------------- data: text, audio, batches

    @property
    def codec(self):
        return self._frozen[0]  # in a list, so that it is neither trained nor saved nor cast with the model

    @property
    def device(self):
        return self.stop_head.weight.device

    @property
    def dtype(self):
        return self.stop_head.weight.dtype

    def encode_text(self, text, speaker=None):
        """Token ids without BOS, EOS or markers; multi-character Chinese pieces become single characters."""
        if speaker is not None:
            clip = ", or give a reference clip" if self.config.fused else ""
            raise Invalid(f"speaker {speaker!r}: this backbone has no speaker input; "
                          f"train one adapter per speaker{clip}")
        refuse_blank(text)
        text = re.sub(r"\s+", " ", text.replace("\n", " "))
        pieces = []
        for piece in self.tokenizer.pieces(text):
            bare = piece.replace("▁", "")
            pieces += list(bare) if bare in self.split_pieces else [piece]  # the marker goes with the split
        return [self.tokenizer.vocab.get(piece, 0) for piece in pieces]  # 0 is <unk>

    def encode_audio(self, source, start=None, end=None):
        """Latents (T, D) of a path or of (n,) samples at `sample_rate`, zero-padded to whole patches."""
        return self.encode_audio_batch([self._wave(source, start, end)])[0]

    def encode_audio_batch(self, waves):
        """What encode_audio makes of each of several clips (n,), in one pass of the codec."""
        whole = self.config.patch_size * self.codec.hop
        padded = [F.pad(w, (0, -len(w) % whole)) for w in waves]
        return [z.cpu() for z in self.codec.encode_batch(padded)]

    def _wave(self, source, start=None, end=None):
        """(n,) samples of a path, or the samples themselves."""
        if torch.is_tensor(source):
            return source
        wave, _ = audio.read(source, self.sample_rate, start, end)
        return wave

    def _patches(self, source, start=None, end=None, left=False):
        """(A, P, D) patches of a path, of samples (n,) or of latents (T, D).

        Audio is padded to whole patches: on the right in training and for a reference, on the left for a
        prompt to be continued; latents lose their odd frames there.
        """
        P, D = self.config.patch_size, self.config.feat_dim
        if torch.is_tensor(source) and source.ndim == 2:
            T = len(source) - len(source) % P
            if T == 0 or source.shape[1] != D:
                raise Invalid(f"latents of shape {list(source.shape)}: "
                              f"expected (T, {D}) with at least {P} frames")
            kept = source[-T:] if left else source[:T]
            return kept.float().cpu().view(-1, P, D)
        wave = self._wave(source, start, end)
        if left:
            wave = F.pad(wave, (-len(wave) % (P * self.codec.hop), 0))
        return self.encode_audio(wave).view(-1, P, D)

    def encode(self, row):
        """{text (S,) with 101 last, latents (A, P, D), ref_latents (R, P, D) if any} of a row."""
        if row.get("turns"):
            raise Invalid("this row has turns; this backbone trains on single sentences, "
                          "so give rows with audio and text")
        ids = self.encode_text(row["text"])
        if not ids:
            raise Invalid(f"text {row['text']!r} has no tokens")
        latents = self._patches(row["audio"], row.get("start"), row.get("end"))
        example = {"text": torch.tensor(ids + [AUDIO_START]), "latents": latents}
        if row.get("ref_audio") is not None:
            self._check_reference()
            example["ref_latents"] = self._patches(row["ref_audio"])
        return example

    def _check_reference(self):
        if not self.config.fused:
            raise Invalid("reference audio: this checkpoint (architecture voxcpm) has no place for it; "
                          "use VoxCPM2, or give the clip together with its transcript as a prompt to be "
                          "continued")

    def blank_example(self, seconds, tokens):
        """What `encode` makes of a clip, without content: for counting memory."""
        c, patches = self.config, round(self.frame_rate * seconds)
        latents = torch.zeros(patches, c.patch_size, c.feat_dim)
        return {"text": torch.ones(tokens, dtype=torch.long), "latents": latents}

    def length(self, example):
        """Positions of the LMs, as upstream counts: text and 101, patches, 102, a reference and marks."""
        reference = len(example["ref_latents"]) + 2 if "ref_latents" in example else 0
        return len(example["text"]) + len(example["latents"]) + 1 + reference

    def collate(self, examples, seeds=None):
        """Batch and counts. Draws of a row, from its seed: see _draw. seeds=None: fixed, all kept."""
        B = len(examples)
        tokens, patches, is_patch, is_target = [], [], [], []
        for e in examples:
            for part in self._sequence(e):
                tokens.append(part.tokens)
                patches.append(part.patches)
                is_patch.append(torch.full((len(part.tokens),), len(part.patches) > 0))
                is_target.append(torch.full((len(part.patches),), part.target))
        draws = [self._draw(e, None if seeds is None else seeds[b]) for b, e in enumerate(examples)]
        # The patch before each.
        cond = [torch.cat([torch.zeros_like(past[:1]), past[:-1]]) for *_, past in draws]
        noise, time, keep, past = (torch.cat(some) for some in zip(*draws))
        place = torch.cat(is_patch).nonzero().flatten()
        target = torch.cat(is_target).nonzero().flatten()
        patches = torch.cat(patches)
        history = patches.index_copy(0, target, past)
        ends = torch.tensor([len(e["latents"]) for e in examples])
        stop = torch.zeros(len(target), dtype=torch.long)
        stop[ends.cumsum(0) - 1] = 1  # the last patch of a clip, not the position after it
        sizes = torch.tensor([self.length(e) - 1 for e in examples])  # without the 102, see above
        L = int(sizes.max())
        positions = torch.cat([torch.arange(n) for n in sizes])
        rows = torch.arange(B)
        batch = {
            # the sequences one behind the other, and where they stand in (B, L)
            "tokens": torch.cat(tokens), "positions": positions, "B": B, "L": L,
            "real": rows.repeat_interleave(sizes) * L + positions,
            # all patches, their positions among the tokens, which of them are targets, and what predicts
            # those
            "patches": patches, "place": place, "target": target, "before": place[target] - 1,
            # what the model hears of the patches: themselves, or blurred
            "history": history,
            # of each target: the patch before it, its label, its row, its number in the row
            "cond": torch.cat(cond), "stop": stop, "row": rows.repeat_interleave(ends),
            "step": torch.cat([torch.arange(n) for n in ends]), "ends": ends,
            "noise": noise, "time": time, "keep": keep,
        }
        return batch, self.counts(batch)

    def _sequence(self, example):
        """The Parts of an example, as the base LM reads them; token 0 stands where a patch stands."""
        def mark(token):
            return Part(torch.tensor([token]), latents[:0], False)

        def clip(patches, target):
            return Part(torch.zeros(len(patches), dtype=torch.long), patches.float(), target)

        latents = example["latents"].float()
        reference = example.get("ref_latents")
        if reference is not None:
            yield from (mark(REF_START), clip(reference, False), mark(REF_END))
        yield Part(example["text"], latents[:0], False)
        yield clip(latents, True)

    def _draw(self, example, seed):
        """(noise, time, keep, past) of the target patches of a row; seed None: fixed by its text, all kept.

        The past is what the row hears of its own patches.
        """
        past = example["latents"].float()
        A = len(past)
        fixed = zlib.crc32(example["text"].numpy().tobytes()) if seed is None else seed
        g = torch.Generator().manual_seed(fixed)
        noise = torch.randn(A, self.config.patch_size, self.config.feat_dim, generator=g)
        if self.config.t_scheduler == "log-norm":
            time = torch.sigmoid(torch.randn(A, generator=g) + TIME_SHIFT)
        else:
            time = torch.rand(A, generator=g)
        dropped = torch.rand(A, generator=g) <= self.training_options.training_cfg_rate
        keep = torch.ones_like(dropped) if seed is None else ~dropped
        if self.training_options.history_noise and seed is not None:
            past = blur(past, self.training_options.history_noise, g)
        return noise, time, keep, past

    def counts(self, batch):
        N, P = len(batch["target"]), self.config.patch_size
        out = {"loss/diff": N * P, "loss/stop": N,
               "metric/stop_accuracy": N, "metric/stop_frame_error": len(batch["ends"])}
        if self.training_options.guess_weight:
            out["metric/guess"] = N * P
        return out

    # -------------------------------------------------------------------------- training

    def forward(self, batch):
        """Sums of the losses over target patches (loss/diff: also over their P frames), float32."""
        dtype = self.dtype
        # of the packed positions: a row after the other, no padding
        place, before = batch["place"], batch["before"]
        embed = self.enc_to_lm_proj(self.feat_encoder(batch["history"].to(dtype)))  # (M, H)
        x = self._embed(batch["tokens"]).index_copy(0, place, embed)[None]  # (1, positions, H)
        packing = Packing(batch["real"], batch["B"], batch["L"])
        contexts = self._contexts(batch["positions"], Context(mask=packing))
        e, r = self._language_models(x, embed, place, contexts)
        lm_h, res_h = e[0, before], r[0, before]  # (N, H): a patch is predicted from the position before it

        noise, clean = batch["noise"], batch["patches"][batch["target"]]  # (N, P, D) float32
        t = batch["time"][:, None, None]
        noisy = (1 - t) * clean + t * noise
        mu = self._condition(lm_h, res_h) * batch["keep"][:, None].to(dtype)
        velocity = self.feat_decoder.estimator(noisy.to(dtype), mu, batch["time"], batch["cond"].to(dtype))
        diff = (velocity.float() - (noise - clean)).square().mean(-1).sum()

        logits = self._stop_logits(lm_h).float()
        stop = F.cross_entropy(logits, batch["stop"], reduction="sum")
        out = {"loss/diff": diff, "loss/stop": stop, **self._stop_metrics(logits.detach(), batch)}
        weight = self.training_options.guess_weight
        if weight:
            guess = self._guess(lm_h, res_h).view_as(clean)
            wrong = (guess - clean).square().mean(-1).sum()
            out["metric/guess"] = wrong.detach()
            if self.training:  # validation stays comparable with runs that guess nothing
                out["loss/diff"] = diff + weight * wrong
        return out

    def _stop_metrics(self, logits, batch):
        """How often the stop head (N, 2) is right, and how many patches off each clip would end."""
        answer = logits.argmax(-1)
        right = (answer == batch["stop"]).float().sum()
        never = batch["ends"][batch["row"]]
        first = torch.where(answer == 1, batch["step"], never)
        stops = batch["ends"].scatter_reduce(0, batch["row"], first, "amin")
        error = (stops - (batch["ends"] - 1)).abs().float().sum()
        return {"metric/stop_accuracy": right, "metric/stop_frame_error": error}

    def _embed(self, tokens):
        x = self.base_lm.embed_tokens(tokens)
        return x * self.config.lm_config.scale_emb if self.config.lm_config.use_mup else x

    def _contexts(self, positions, context):
        """The context of the base LM and that of the residual LM, which may have no rotary positions."""
        return [context._replace(rope=lm.rope(positions)) for lm in (self.base_lm, self.residual_lm)]

    def _contexts_at(self, place):
        """The same for a Place of generation."""
        return self._contexts(place.positions, Context(mask=place.mask, column=place.column))

    def _language_models(self, x, embed, place, contexts, caches=(None, None)):
        """Base LM, quantiser at the audio positions `place` (flat), residual LM. (B, L, H) each."""
        e = self.base_lm(x, contexts[0], caches[0])
        flat = e.flatten(0, 1)
        with slots.picked(self, place, e.shape[1]):
            coarse = self.fsq_layer(flat[place]).to(flat.dtype)
        e = flat.index_copy(0, place, coarse).view_as(e)
        spoken = torch.zeros_like(flat).index_copy(0, place, embed).view_as(e)  # zero on text
        return e, self.residual_lm(self._residual_input(e, spoken), contexts[1], caches[1])

    def _residual_input(self, e, spoken):
        """(B, L, H) from the quantised state and the embedded patches."""
        return self.fusion_concat_proj(torch.cat([e, spoken], -1)) if self.config.fused else e + spoken

    def _condition(self, lm_h, res_h):
        a, b = self.lm_to_dit_proj(lm_h), self.res_to_dit_proj(res_h)
        return torch.cat([a, b], -1) if self.config.fused else a + b

    def _guess(self, lm_h, res_h):
        """What a fixed matrix reads off the two states that condition the DiT, (N, P * D) float32.

        The flow teaches a model drawn at random how a patch goes on long before it teaches which patch the
        text wants: its gradient reaches the text through noise, and the quantiser rounds small differences
        away. The guess is a short way. Its matrix is drawn, not trained, so that it is no part of the model
        and of no file; the states turn towards it.
        """
        H, size = self.config.lm_config.hidden_size, self.config.patch_size * self.config.feat_dim
        drawn = torch.randn(2 * H, size, generator=torch.Generator().manual_seed(0)) / math.sqrt(2 * H)
        return torch.cat([lm_h, res_h], -1).float() @ drawn.to(lm_h.device)

    def _stop_logits(self, lm_h):
        return self.stop_head(F.silu(self.stop_proj(lm_h)))

    def sample_request(self, row):
        """What a validation sample of a row is conditioned on, besides its text."""
        return {"prompts": [(None, row["ref_audio"], None)]} if row.get("ref_audio") else {}

    @property
    def frame_rate(self):
        """Patches per second of audio."""
        return self.sample_rate / self.codec.hop / self.config.patch_size

    def set_recompute(self, every):
        """Activation checkpointing of every n-th layer, 0 of none. Of all: up to a third more time for most
        activation memory."""
        for stack in self.stacks():
            stack.recompute = every

    def stacks(self):
        return [m for m in self.modules() if isinstance(m, Stack)]

    def blocks(self):
        """The modules that torch.compile takes one by one."""
        return [m for m in self.modules() if isinstance(m, Layer)]

    def lora_targets(self, settings):
        """Module names for the words enable_lm, enable_dit, enable_proj and their lists. Without: both LMs
        and the DiT.

        The local encoder is never among them: no other tool could read such an adapter. `target_modules`
        reaches it.
        """
        s = settings
        lm, dit, proj = s.enable_lm, s.enable_dit, s.enable_proj
        if lm is None and dit is None and proj is None:
            lm = dit = True
        attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
        projections = ["enc_to_lm_proj", "lm_to_dit_proj", "res_to_dit_proj"]
        if self.config.fused:
            projections.append("fusion_concat_proj")
        linears = [name for name, m in self.named_modules() if isinstance(m, nn.Linear)]
        names = []
        if lm:
            inside = [name for name in linears if name.startswith(LM_ROOTS)]
            names += named(inside, s.target_modules_lm or attention, "target_modules_lm")
        if dit:
            inside = [name for name in linears if name.startswith(DIT_ROOT)]
            names += named(inside, s.target_modules_dit or attention, "target_modules_dit")
        if proj:
            outside = [name for name in linears if "." not in name]
            names += named(outside, s.target_proj_modules or projections, "target_proj_modules")
        return names

    def adapter_words(self, modules, values):
        """lora_config.json's words for wrapped modules: the original builds its layers from these."""
        lm = leaves(name for name in modules if name.startswith(LM_ROOTS))
        dit = leaves(name for name in modules if name.startswith(DIT_ROOT))
        proj = sorted(name for name in modules if "." not in name)
        return {"enable_lm": bool(lm), "enable_dit": bool(dit), "enable_proj": bool(proj), **values,
                "target_modules_lm": lm, "target_modules_dit": dit, "target_proj_modules": proj}

    # -------------------------------------------------------------------------- generation

    def _request(self, text, prompts=(), speaker=None, seed=None, noise=None):
        """What a request puts in front of its speech.

        ids: token ids, PATCH where a patch stands; patches (R, P, D): those; warm: the last ones of a prompt
        to be continued, for the codec; tokens: of the target text alone.
        """
        references = [clip for transcript, clip, _ in prompts if transcript is None]
        turns = [(transcript, clip) for transcript, clip, _ in prompts if transcript is not None]
        if len(references) > 1:
            raise Invalid(f"{len(references)} reference clips: this backbone takes one")
        ids, patches = [], []
        for clip in references:
            self._check_reference()
            patches.append(self._patches(clip))
            ids += [REF_START] + [PATCH] * len(patches[-1]) + [REF_END]
        target = self.encode_text(text, speaker)
        if not target:
            raise Invalid(f"text {text!r} has no tokens")
        transcripts = "".join(transcript for transcript, _ in turns)
        ids += self.encode_text(transcripts + text) + [AUDIO_START]
        context = [self._patches(clip, left=True) for _, clip in turns]
        ids += [PATCH] * sum(len(some) for some in context)
        prefix = torch.cat([torch.zeros(0, self.config.patch_size, self.config.feat_dim), *context])
        if noise is not None and noise.shape[1:] != prefix.shape[1:]:
            raise Invalid(f"noise has shape {list(noise.shape)}, "
                          f"expected (patches, {prefix.shape[1]}, {prefix.shape[2]})")
        warm = WARM_PATCHES_FUSED if self.config.fused else WARM_PATCHES
        return dict(ids=ids, patches=torch.cat([*patches, prefix]), warm=prefix[-warm:],
                    tokens=len(target), seed=seed, noise=noise)

    def _cap(self, request, s):
        """Patches at most: by the text's length, by max_len, by what fits the model."""
        by_text = int(s.length_ratio * request["tokens"] + MORE_PATCHES)
        cap = min(by_text, s.max_len, self.config.max_length - len(request["ids"]))
        if cap < 1:
            raise Invalid(f"prompt and text take {len(request['ids'])} positions, "
                          f"the model has {self.config.max_length}; split it, as "
                          "--max_chars_per_piece does, or give a shorter prompt")
        return cap

    @torch.no_grad()
    def _run(self, requests, s):
        """Yields (i, patch (P, D)) of every request, one step for all that still speak; sets self.finish."""
        caps = [self._cap(request, s) for request in requests]
        lengths = [len(request["ids"]) for request in requests]
        batch = LeftPadded(lengths, max(caps), self.device)
        speaking = Speaking(caps)
        self.finish = speaking.finish  # of this run, should another begin before it ends
        draws = [generator(request["seed"]) for request in requests]
        places = [request.get("slot") for request in requests]  # of their adapters, where there are several
        cond = torch.stack([self._last_patch(request) for request in requests])
        cond = cond.to(self.device, self.dtype)
        with slots.acting(self, places):
            caches, lm_h, res_h = self._read(batch, requests)
        for n in range(max(caps)):
            numbers = speaking.requests
            noise = torch.stack([self._noise(requests[i], n, draws[i]) for i in numbers])
            z = s.noise_scale * noise.to(self.device)
            ended = [0] * len(numbers)
            asked = [places[i] for i in numbers]
            with slots.acting(self, asked):
                mu = self._condition(lm_h, res_h)
                patch = self.feat_decoder.solve(z, mu, cond, s.inference_timesteps, s.cfg_value)
                if n > s.min_len:
                    ended = self._stop_logits(lm_h).argmax(-1).tolist()
            going = speaking.after(n, ended)
            for row, i in enumerate(numbers):
                yield i, patch[row]  # the last one belongs to the speech, too
            if not speaking.requests:
                break
            if going is not None:
                going = torch.tensor(going, device=self.device)
                patch = patch[going]
                for part in [batch, *caches[0], *caches[1]]:
                    part.keep(going)
            cond = patch.to(self.dtype)
            asked = [places[i] for i in speaking.requests]
            with slots.acting(self, asked):
                lm_h, res_h = self._step(cond, batch.step(n), caches)
        self.finish = speaking.finish

    def _last_patch(self, request):
        """(P, D): the patch that stands in front of the first one to be drawn; zeros after text."""
        if request["ids"][-1] == PATCH:
            return request["patches"][-1]
        return torch.zeros(self.config.patch_size, self.config.feat_dim)

    def _read(self, batch, requests):
        """All prompts go in: (caches of both LMs, the two states (B, H) that predict the first patches)."""
        tokens = batch.stack([torch.tensor(request["ids"]) for request in requests])
        place = (tokens.flatten() == PATCH).nonzero().flatten()
        place = place.to(self.device)
        patches = torch.cat([request["patches"] for request in requests])
        patches = patches.to(self.device, self.dtype)
        with slots.picked(self, place, batch.width):
            embed = self.enc_to_lm_proj(self.feat_encoder(patches))
        x = self._embed(tokens.clamp(min=0).to(self.device)).flatten(0, 1)
        x = x.index_copy(0, place, embed).view(*tokens.shape, -1)
        both = self.base_lm, self.residual_lm
        caches = [make_caches(lm.layers, len(requests), batch.columns, x) for lm in both]
        e, r = self._language_models(x, embed, place, self._contexts_at(batch.prompt()), caches)
        return caches, e[:, -1], r[:, -1]

    def _step(self, patch, place, caches):
        """The newest patch of every row (B, P, D) goes in; the states that predict the next come out."""
        contexts = self._contexts_at(place)
        x = self.enc_to_lm_proj(self.feat_encoder(patch))[:, None]  # (B, 1, H)
        e = self.fsq_layer(self.base_lm(x, contexts[0], caches[0]))
        r = self.residual_lm(self._residual_input(e, x), contexts[1], caches[1])
        return e[:, 0], r[:, 0]

    def _noise(self, request, n, generator):
        """(P, D) that the flow of patch n starts from."""
        noise = request["noise"]
        if noise is None:
            return torch.randn(self.config.patch_size, self.config.feat_dim, generator=generator)
        if n >= len(noise):
            raise Invalid(f"noise holds {len(noise)} patches and patch {n} is asked for; "
                          "give more, or set max_len")
        return noise[n].float().cpu()

    def _takes(self, requests, s):
        """_run, and again with the next seed for requests whose take reached its length_ratio."""
        def failed(request, patches, finish):
            return len(patches) >= s.length_ratio * request["tokens"]

        return takes(self, requests, s, failed)

    def frames(self, text, prompts=(), speaker=None, seed=None, noise=None, **sampling):
        """Latent patches (P, D) float32, one by one, before the codec; self.finish is then ["end"] or
        ["cap"]."""
        s = Sampling(**sampling)
        request = self._request(text, prompts, speaker, seed, noise)
        for _, patch in self._takes([request], s):
            yield patch.cpu()

    def generate(self, text, prompts=(), speaker=None, seed=None, noise=None, **sampling):
        """Audio in chunks (n,) at `out_sample_rate`; joined they are the whole."""
        request = dict(text=text, prompts=prompts, speaker=speaker, seed=seed, noise=noise)
        for _, chunk in self.generate_batch([request], **sampling):
            yield chunk

    @torch.no_grad()
    def generate_batch(self, requests, **sampling):
        """Yields (i, chunk), the chunks of a request of 1, 2, 4 .. CHUNK patches."""
        s = Sampling(**sampling)
        named = slots.named(self, requests)
        requests = [dict(self._request(**r), slot=slot) for r, slot in named]
        codec = self.codec.to(self.device)
        streams = [codec.stream() for _ in requests]
        for stream, request in zip(streams, requests):
            if len(request["warm"]):  # the codec remembers: these are decoded in front, and not given out
                stream.decode(request["warm"].flatten(0, 1).to(self.device))
        yield from chunks(self._takes(requests, s), streams, torch.cat, CHUNK)

    # -------------------------------------------------------------------------- names and files

    def published_name(self, parameter, naming=None):
        """The name of a parameter in the published file: here its own."""
        return parameter

    def published_rows(self, parameter, naming=None):
        """Row order of the published weight, None where it is ours."""
        return None

    def published_state_dict(self, naming=None, merged=False):
        """{published name: tensor}. merged adds the adapters, tensor by tensor, in float32."""
        out = checkpoint.weights(self, merged)
        if (naming or self.naming) == "transformers":
            for name, tensor in self._codec_tensors().items():
                out[CODEC_PREFIX + norm_name(name, "transformers")] = tensor
        return out

    def _codec_tensors(self):
        """{published name: tensor} of the codec, bit by bit as it was read."""
        stored = checkpoint.read(self.files["codec"]) if "codec" in self.files else self.codec.stored
        if not stored:
            return self.codec.published_state_dict()
        return {name: tensor.load() for name, tensor in stored.items()}

    def save(self, folder, naming=None, merged=False):
        """Write a folder in a published layout; all but the weights is copied as it was read, if it fits."""
        naming = naming or self.naming
        if naming not in self.namings:
            raise Invalid(f"naming {naming!r}: this checkpoint has {', '.join(self.namings)}")
        if not merged and any(".lora_" in name for name, _ in self.named_parameters()):
            raise Invalid("the model has adapters on: save(merged=True) adds them to the weights, "
                          "lora.save_lora_weights keeps them apart")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.save_tensors(folder / "model.safetensors", self.published_state_dict(naming, merged))
        files = dict(self.files)
        if naming == "transformers":
            files.pop("codec", None)
        elif "codec" not in files and self.codec.stored:
            checkpoint.save_tensors(folder / CODEC_FILES[0], self._codec_tensors())
        for path in files.values():
            if path.parent.resolve() != folder.resolve():
                shutil.copyfile(path, folder / path.name)
        if naming != self.naming:
            raw = self.raw_config
            raw = as_transformers(raw) if naming == "transformers" else as_published(raw)
            (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
        return folder

    @property
    def codec_key(self):
        """Names the frozen codec and how it is used: cached latents with another key are of another codec."""
        if self._codec_key is None:
            if "codec" in self.files:
                digest = hashlib.sha256(self.files["codec"].read_bytes()).hexdigest()[:16]
            else:
                digest = checkpoint.fingerprint(self.codec)
            self._codec_key = f"audiovae-{digest}-{self.sample_rate}-{self.config.patch_size}"
        return self._codec_key

    @property
    def encode_key(self):
        """Names everything else that `encode` reads."""
        return f"{self.codec_key}-{self.tokenizer_crc:08x}-{self.config.architecture}"


LM_ROOTS = ("base_lm.", "residual_lm.")
DIT_ROOT = "feat_decoder.estimator."


def named(linears, words, key):
    """Those of the linears whose last name is one of the words; key: the setting that the words are from."""
    names = []
    for word in words:
        hits = [name for name in linears if name.split(".")[-1] == word]
        if not hits:
            known = ", ".join(leaves(linears))
            raise Invalid(f"lora.{key}: {word!r} matches no Linear there; known are {known}")
        names += hits
    return names


def leaves(names):
    """The last names, sorted."""
    return sorted({name.split(".")[-1] for name in names})


def is_chinese(text):
    return all("一" <= ch <= "鿿" for ch in text)


# -------------------------------------------------------------------------------------------- files

COMPANIONS = ("config.json", "tokenizer_config.json", "special_tokens_map.json", "tokenization_voxcpm2.py",
              "generation_config.json", "processor_config.json", "preprocessor_config.json")
CODEC_FILES = ("audiovae.safetensors", "audiovae.pth")
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json",
                "pytorch_model.bin", "pytorch_model.bin.index.json")


CODEC_PREFIX = "audio_vae."  # of the codec's tensors in transformers' file
# Ends of names of a weight that is kept as length and direction: {published: as torch names them since 2.0}
NORMS = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
# What transformers writes into every section of a config, whatever model it is of.
OF_EVERY_SECTION = {"_name_or_path", "architectures", "chunk_size_feed_forward", "dtype", "id2label",
                    "is_encoder_decoder", "label2id", "model_type", "output_attentions",
                    "output_hidden_states", "problem_type", "return_dict", "transformers_version"}
HAN_SPLIT = {"Regex": r"\p{Han}"}


def norm_name(name, naming):
    """A codec tensor's name in one naming, whichever it has."""
    for published, newer in NORMS.items():
        old, new = (published, newer) if naming == "transformers" else (newer, published)
        if name.endswith("." + old):
            return name.removesuffix(old) + new
    return name


def naming_of(raw):
    """Whose config.json it is; the published one names an architecture instead of a model_type."""
    ours = "architecture" in raw or raw.get("model_type") != "voxcpm2"
    return "published" if ours else "transformers"


def as_published(raw):
    """config.json in the published spelling: one of transformers rewritten, the published one as it is."""
    if naming_of(raw) == "published":
        return raw
    out = without(raw, OF_EVERY_SECTION | {"max_cache_length", "sample_rate"})
    lm = as_record(need(out, "lm_config", dict), f"{raw.where}: lm_config")
    rope = need(lm, "rope_parameters", dict)
    kind = need(rope, "rope_type", str)
    if kind not in ("default", "longrope"):
        raise Invalid(f"{rope.where}: rope_type is {shown(kind)}; known are default and longrope")
    factors = without(rope, {"rope_type", "rope_theta"})
    scaling = None if kind == "default" else {**factors, "type": kind}
    lm = {**lm, "rope_theta": need(rope, "rope_theta", float), "rope_scaling": scaling}
    del lm["rope_parameters"]
    length = need(raw, "max_cache_length", int, at_least=1)
    out |= {"architecture": "voxcpm2", "lm_config": lm, "max_length": length}
    out["dtype"] = need(raw, "dtype", str, "bfloat16")
    return as_record(out, raw.where)


def as_transformers(raw):
    """The published config.json of VoxCPM2 in transformers' spelling."""
    out = without(raw, {"architecture", "device", "max_length"})
    lm = without(out["lm_config"], {"rope_theta", "rope_scaling"})
    rope = dict(need(raw["lm_config"], "rope_scaling", dict, {}))
    kind = rope.pop("type", "default")
    theta = need(raw["lm_config"], "rope_theta", float, LMConfig.rope_theta)
    lm["rope_parameters"] = {**rope, "rope_type": kind, "rope_theta": theta}
    codec = audiovae.settings(raw.get("audio_vae_config"), audiovae.V2)
    del codec["odd_stride_extra_pad"]
    return {**out, "model_type": "voxcpm2", "architectures": ["VoxCPM2Model"], "lm_config": lm,
            "audio_vae_config": codec, "sample_rate": codec["out_sample_rate"],
            "max_cache_length": raw.get("max_length", Config.max_length)}


def without(section, keys):
    """A section of a config and all sections in it without some keys."""
    kept = {}
    for key, value in section.items():
        if key not in keys:
            kept[key] = without(value, keys) if isinstance(value, dict) else value
    return kept


def read_tokenizer(path, rows=None):
    """The tokenizer of a file. transformers' cuts Chinese characters apart first, after which their marker
    stands alone; upstream cut them apart after merging, and so the model was trained. encode_text does that.
    """
    raw = read_object(path)
    steps = need(need(raw, "pre_tokenizer", dict, {}), "pretokenizers", list[dict], [])
    kept = [step for step in steps if step.get("pattern") != HAN_SPLIT]
    if len(kept) < len(steps):
        raw["pre_tokenizer"] = {**raw["pre_tokenizer"], "pretokenizers": kept}
    return Tokenizer(raw, rows)


def recognizes(config):
    return {"lm_config", "encoder_config", "dit_config", "patch_size"} <= set(config)


def load(folder, device="cpu", dtype=torch.float32, options=None, extra=None, weights=None,
         allow_unused=False):
    """The model in eval mode from a published folder, or from a file of weights in one. extra: paths of codec
    and tokenizer kept elsewhere.

    dtype None keeps the file's. weights names the file to read where several stand side by side; "scratch"
    draws them.
    """
    folder, extra = Path(folder), extra or {}
    if folder.is_file():
        if folder.name in CODEC_FILES:
            raise Invalid(f"{folder} is the codec of a checkpoint; give the folder of it, "
                          f"here {folder.parent}")
        folder, weights = folder.parent, weights or folder.name
    raw = read_object(folder / "config.json")
    naming, config = naming_of(raw), read_config(as_published(raw))
    tokenizer_path = find_file(folder, extra.get("tokenizer"), ("tokenizer.json",), "the tokenizer")
    scratch = weights == "scratch"
    stored, path = {}, None
    if naming == "transformers" or not scratch:
        named = folder / weights if weights and not scratch else None
        path = find_file(folder, named, WEIGHT_FILES, "the model's weights")
        stored = checkpoint.read(path)
    codec, files = {}, {}
    if naming == "transformers":
        codec, stored = checkpoint.split(stored, CODEC_PREFIX)
    if extra.get("codec") or not codec:
        files["codec"] = find_file(folder, extra.get("codec"), CODEC_FILES, "the codec")
        codec = checkpoint.read(files["codec"])
    with torch.device("meta"):
        model = VoxCPM(config, naming, raw)
    if scratch:
        model.to_empty(device="cpu")
        draw(model)
        model.to(device, dtype or torch.float32)
    else:
        dtype = dtype or checkpoint.main_dtype(stored)
        model.left_unused = checkpoint.fill(model, stored, dtype=dtype, device=device,
                                            allow_unused=allow_unused, what=str(path))
    version = audiovae.V2 if config.fused else audiovae.V1
    numbers = audiovae.settings(config.audio_vae_config, version)
    inside = {norm_name(name, "published"): tensor for name, tensor in codec.items()}
    codec = audiovae.build(codec, numbers, str(files.get("codec", path)))
    if "codec" not in files:
        codec.stored = inside
    if codec.latent_dim != config.feat_dim:
        raise Invalid(f"{files.get('codec', path)} makes {codec.latent_dim} latent channels, "
                      f"config.json says feat_dim {config.feat_dim}")
    files["tokenizer"] = tokenizer_path
    files |= {name: folder / name for name in COMPANIONS if (folder / name).is_file()}
    tokenizer = read_tokenizer(tokenizer_path, config.lm_config.vocab_size)
    model.equip(codec, tokenizer, files, options or {})
    return model.eval()


def find_file(folder, given, names, what):
    """The path of a file that was given, or of the first of the names in the folder."""
    candidates = [Path(given)] if given else [folder / name for name in names]
    for path in candidates:
        if path.is_file():
            return path
    if given:
        raise Invalid(f"{what}: no file at {given}")
    raise Invalid(f"{folder} has no {' or '.join(names)}, so {what} cannot be loaded")


def draw(model):
    """Weights as PyTorch draws them, as the original starts; the special token is standard normal."""
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
    nn.init.normal_(model.feat_encoder.special_token)


# -------------------------------------------------------------------------------------------- shapes for
# measuring


@dataclass
class Shape:
    """Numbers of a version in its published size."""

    layers: int  # of the base LM
    width: int
    hidden: int  # of the feed-forward
    head: int | None
    local: int  # layers of the local encoder and of the DiT
    residual: int  # layers of the residual LM
    patch: int
    latent: int  # of the quantiser
    heads: int = 16
    groups: int = 2
    local_width: int = 1024
    local_hidden: int = 4096
    vocab: int = 73448
    limit: int = 8192


VERSIONS = {
    "1.5": Shape(24, 1024, 4096, None, 8, 8, 4, 256),
    "0.5": Shape(24, 1024, 4096, None, 4, 6, 2, 256),
    "2": Shape(28, 2048, 6144, 128, 12, 8, 4, 512),
}
MID_LAYERS, MID_WIDTH = 6, 512


def tiny(s):
    """A Shape that runs in a blink."""
    return Shape(
        layers=2, width=64, hidden=128, head=s.head and 16, local=1, residual=1, patch=s.patch,
        latent=16, heads=4, local_width=64, local_hidden=128, vocab=300, limit=512)


def mid(s):
    """A Shape in the proportions of s, of six layers and 512 channels."""
    def wide(n):
        return MID_WIDTH * n // s.width

    def deep(n):
        return round(MID_LAYERS * n / s.layers)

    return Shape(
        layers=MID_LAYERS, width=MID_WIDTH, hidden=wide(s.hidden), head=s.head and 64,
        local=deep(s.local), residual=deep(s.residual), patch=s.patch, latent=wide(s.latent),
        heads=8, groups=1, local_width=wide(s.local_width), local_hidden=wide(s.local_hidden), vocab=4096)


def shape(size, version):
    """(Config, arguments of the codec) of a version, in its published size or smaller."""
    version = version or "1.5"
    if version not in VERSIONS:
        raise Invalid(f"version {version!r} is not known; there are {', '.join(VERSIONS)}")
    s = VERSIONS[version]
    codec = dict(audiovae.V2 if version == "2" else audiovae.V1)
    if version == "1.5":
        codec |= dict(encoder_dim=64, encoder_rates=[2, 3, 6, 7, 7], decoder_dim=2048,
                      decoder_rates=[7, 7, 6, 3, 2], sample_rate=44100)
    if size == "tiny":
        s = tiny(s)
        codec |= dict(encoder_dim=8, decoder_dim=64)
    elif size == "mid":
        s = mid(s)
        codec |= dict(encoder_dim=codec["encoder_dim"] // 4, decoder_dim=codec["decoder_dim"] // 4)
    factors = [1.0] * ((s.head or s.width // s.heads) // 2)
    scaling = {"long_factor": factors, "short_factor": factors, "original_max_position_embeddings": 32768}
    lm = LMConfig(s.width, s.hidden, s.layers, s.heads, s.groups, s.vocab, rope_scaling=scaling,
                  kv_channels=s.head, use_mup=False)
    stack = LocalConfig(s.local_width, s.local_hidden, s.heads, s.local, s.head)
    fused = version == "2"
    config = Config(
        lm, stack, stack, architecture="voxcpm2" if fused else "voxcpm", patch_size=s.patch, feat_dim=64,
        residual_lm_num_layers=s.residual, residual_lm_no_rope=fused,
        scalar_quantization_latent_dim=s.latent, max_length=s.limit)
    return config, codec


def blank(size, version, device, dtype, options=None):
    """A model of a known shape with drawn weights and a tokenizer of single letters, for measuring only."""
    config, codec = shape(size, version)
    with torch.device("meta"):
        model = VoxCPM(config)
    model.to_empty(device=device)
    draw(model)
    model.to(dtype)
    vocab = {"<unk>": 0, **{ch: i + 3 for i, ch in enumerate("abcdefghijklmnopqrstuvwxyz ")}}
    tokenizer = Tokenizer({"model": {"type": "BPE", "vocab": vocab, "merges": [], "unk_token": "<unk>"}})
    codec = audiovae.AudioVAE(**codec).eval().requires_grad_(False)
    model.equip(codec, tokenizer, {}, options or {})
    return model.eval()
