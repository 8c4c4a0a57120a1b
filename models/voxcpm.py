"""VoxCPM 0.5B, 1.5 and 2: text in, continuous audio latents out, one patch of P latent frames per step.

Four transformers of one kind share the work. The base LM reads text and earlier patches, a quantiser keeps the coarse
part of its state (audio positions only), the residual LM adds the fine part; from both a small diffusion transformer
(DiT) draws the next patch by flow matching, and a head says whether it was the last. A local encoder turns each patch
into one vector for the LMs. There are no audio tokens and there is no sampling over a vocabulary.

    position      0 ... S-2   S-1     S    ...   S+A-1            S text tokens with the 101, A patches
    base LM in    text        101     patch 1 .. patch A          reference first where there is one: 103 ref 104 text
    DiT predicts              patch 1 patch 2 .. (after A: stop)  position t is drawn from the state at t - 1

Papers: arXiv 2509.24650 (VoxCPM), 2606.06928 (VoxCPM2). Checkpoints: openbmb/VoxCPM-0.5B, VoxCPM1.5, VoxCPM2.

What differs from the original code, on purpose:
- Losses are sums over target patches; local encoder and DiT see audio patches and target patches only. The original
  runs both on every position and masks afterwards: the same loss for more than twice the work.
- The token 102 that the original appends in training is counted in `length` but not fed: it stands after everything
  that is predicted, so no loss and no gradient depends on it.
- Rotary tables and the flow's running sample stay float32 in every dtype.
- Streaming keeps the codec's state for both generations (the original re-decodes three patches in 0.5B and 1.5, and
  only the first three come out exact); continuation cuts exactly the prompt patches that it decoded in front.
- The length cap counts generated patches against the tokens of the target text only.
- Truncation never removes the stop label: rows that are too long are the caller's to drop.

Letters besides the usual: P latent frames per patch, D latent channels, A patches of a clip, M audio patches in a
batch, N target patches in a batch.
"""
import dataclasses
import hashlib
import math
import re
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from models.codecs import audiovae
from models.parts import Invalid, audio, check, checkpoint, opt
from models.parts.layers import Context, Layer, LayerSize, Packing, RMSNorm, make_caches, rotary, rotary_frequencies, run_layers
from models.parts.sampling import LeftPadded, Speaking, chunks, generator, takes
from models.parts.tokenizer import Tokenizer

AUDIO_START, REF_START, REF_END = 101, 103, 104  # rows of the embedding; 102 would end the audio, see above
LAMBDAS = {"loss/diff": 1.0, "loss/stop": 1.0}

# ------------------------------------------------------------------------------------------------ settings


@dataclass
class LMConfig:
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
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
    hidden_dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    kv_channels: int | None = None


@dataclass
class Config:
    """config.json under its published names; entries that no code path here reads are left out."""

    lm_config: LMConfig
    encoder_config: LocalConfig
    dit_config: LocalConfig
    architecture: str = "voxcpm"
    patch_size: int = 2
    feat_dim: int = 64
    residual_lm_num_layers: int = 6
    residual_lm_no_rope: bool = False
    scalar_quantization_latent_dim: int = 256
    scalar_quantization_scale: int = 9
    max_length: int = 4096
    t_scheduler: str = "log-norm"  # of dit_config.cfm_config
    audio_vae_config: dict | None = None

    @property
    def fused(self):  # what "voxcpm2" does: two conditioning tokens, a concatenating residual input, reference audio
        return self.architecture == "voxcpm2"


def read_config(raw, where):
    """Config from the dictionary in config.json; a value that the published models never had is refused."""
    def section(cls, values, name):
        known = {f.name for f in dataclasses.fields(cls)}
        missing = [f.name for f in dataclasses.fields(cls) if f.name not in values
                   and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
        if missing:
            raise Invalid(f"{where}: {name} lacks {', '.join(missing)}")
        return cls(**{k: v for k, v in values.items() if k in known})

    dit = raw.get("dit_config", {})
    flow = dit.get("cfm_config", {})
    if dit.get("dit_mean_mode") or dit.get("mean_mode"):
        raise Invalid(f"{where}: dit_config asks for mean mode, which no published checkpoint uses and which is not built")
    for key, known in (("solver", ("euler",)), ("t_scheduler", ("log-norm", "uniform"))):
        if flow.get(key, known[0]) not in known:
            raise Invalid(f"{where}: cfm_config.{key} is {flow[key]!r}; known are {', '.join(known)}")
    if raw.get("architecture", "voxcpm") not in ("voxcpm", "voxcpm2"):
        raise Invalid(f"{where}: architecture is {raw['architecture']!r}; known are voxcpm and voxcpm2")
    values = dict(raw, lm_config=section(LMConfig, raw.get("lm_config", {}), "lm_config"),
                  encoder_config=section(LocalConfig, raw.get("encoder_config", {}), "encoder_config"),
                  dit_config=section(LocalConfig, dit, "dit_config"), t_scheduler=flow.get("t_scheduler", "log-norm"))
    return section(Config, values, "config.json")


TINY = Config(
    LMConfig(32, 64, 2, 4, 2, 128, use_mup=False), LocalConfig(32, 64, 4, 1), LocalConfig(32, 64, 4, 1),
    residual_lm_num_layers=1, scalar_quantization_latent_dim=8, feat_dim=8, max_length=512)


@dataclass
class Training:
    """The `backbone:` section of a training config."""

    training_cfg_rate: float = opt(0.1, "share of target patches that are trained without their condition; guidance needs it")
    float32_time: bool = opt(False, "compute the embedding of flow time in float32 even where the weights are bf16")
    guess_weight: float = opt(0.0, "weight of a linear guess of each patch beside the flow, for models trained from scratch; 0 is off")
    history_noise: float = opt(0.0, "most noise on the patches that a clip hears of its own past, in their standard deviations; 0 is off")

    def __post_init__(self):
        check(self, training_cfg_rate=0, guess_weight=0, history_noise=0)


@dataclass
class Sampling:
    """What `generate` takes besides text, prompts, seed and noise."""

    cfg_value: float = opt(2.0, "strength of classifier-free guidance; 1 to 3 is the usual range")
    inference_timesteps: int = opt(10, "steps of the flow-matching solver; 4 to 30 is the usual range")
    noise_scale: float = opt(1.0, "factor of the noise that the solver starts from; less is steadier and less varied")
    min_len: int = opt(2, "patches after which the stop head is first asked")
    max_len: int = opt(4096, "patches at most")
    length_ratio: float = opt(6.0, "at most this many patches per token of the target text, plus ten")
    retries: int = opt(0, "tries with the next seed when a take reaches length_ratio; needs the take to end first")

    def __post_init__(self):
        check(self, inference_timesteps=1, noise_scale=0, min_len=0, max_len=1, length_ratio=0, retries=0)


# ------------------------------------------------------------------------------------------------ modules


class Stack(nn.Module):
    """MiniCPM4 layers with a final norm: both LMs, the local encoder and the DiT. (B, L, C) -> (B, L, C)."""

    def __init__(self, lm, width, hidden, heads, head_size, num_layers, vocab_size=0, use_rope=True):
        super().__init__()
        branch = lm.scale_depth / math.sqrt(num_layers) if lm.use_mup else 1.0
        if vocab_size:
            self.embed_tokens = nn.Embedding.from_pretrained(torch.randn(vocab_size, width), freeze=False)  # as nn.Embedding, whose draw imports a compiler on meta
        size = LayerSize(width, hidden, heads, lm.num_key_value_heads, head_size, lm.rms_norm_eps, branch)
        self.layers = nn.ModuleList(Layer(size) for _ in range(num_layers))
        self.norm = RMSNorm(width, lm.rms_norm_eps)
        self.lm, self.head_size, self.use_rope = lm, head_size, use_rope
        self.recompute = False
        self.register_buffer("frequencies", None, persistent=False)  # make_rotary computes them, in float32 whatever the weights are
        self.rope_scale, self.ropes = 1.0, {}  # (length, device) -> what `rotary` makes of the positions 0, 1, ...

    def make_rotary(self, device):
        """Frequencies are divided by LongRoPE's factors at every length; 'long' ones only past the original length."""
        scaling, factors, self.rope_scale = self.lm.rope_scaling, None, 1.0
        if scaling:
            original = scaling.get("original_max_position_embeddings", self.lm.max_position_embeddings)
            ratio = self.lm.max_position_embeddings / original
            factors = scaling["long_factor" if ratio > 1 else "short_factor"]
            self.rope_scale = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
            if len(factors) != self.head_size // 2:
                raise Invalid(f"rope_scaling has {len(factors)} factors for heads of {self.head_size}; expected {self.head_size // 2}")
        frequencies = rotary_frequencies(self.head_size, self.lm.rope_theta, factors)
        self.frequencies, self.ropes = frequencies.to(device), {}

    def rope(self, positions):
        return rotary(positions, self.frequencies, self.rope_scale) if self.use_rope else None

    def forward(self, x, context, caches=None):
        return self.norm(run_layers(self.layers, x, context, caches, self.recompute and self.training))

    def local(self, x, keep):
        """Without a cache, of positions 0, 1, ..; all see all, and those in `keep` come out."""
        key = x.shape[1], x.device
        if key not in self.ropes:  # always the same few lengths
            with torch.inference_mode(False):  # it may be kept for a training step
                self.ropes[key] = self.rope(torch.arange(x.shape[1], device=x.device))
        return self.forward(x, Context(self.ropes[key], keep=keep))


class LocalEncoder(nn.Module):
    """One vector per patch: a special token in front of its P frames, then what stands at that token. (M, P, D) -> (M, C)."""

    def __init__(self, lm, c, feat_dim):
        super().__init__()
        self.special_token = nn.Parameter(torch.zeros(1, 1, 1, c.hidden_dim))
        self.in_proj = nn.Linear(feat_dim, c.hidden_dim)
        self.encoder = Stack(lm, c.hidden_dim, c.ffn_dim, c.num_heads, c.kv_channels or c.hidden_dim // c.num_heads, c.num_layers)

    def forward(self, patches):
        x = self.in_proj(patches)
        x = torch.cat([self.special_token[0].expand(len(x), 1, -1), x], 1)  # (M, P + 1, C)
        return self.encoder.local(x, keep=slice(0, 1))[:, 0]


class TimeMLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return self.linear_2(F.silu(self.linear_1(x)))


def sinusoid(t, size):
    """Embedding of flow time, (N,) -> (N, size), sines before cosines, in the dtype of t.

    In bf16 the phases are coarse (near 1 the angle moves in steps of 4). The published models were most likely trained
    so, hence it is what happens with bf16 weights unless float32_time says otherwise.
    """
    half = size // 2
    k = torch.arange(half, dtype=t.dtype, device=t.device)
    angle = 1000 * t[:, None] * torch.exp(k * (-math.log(10000) / (half - 1)))
    return torch.cat([angle.sin(), angle.cos()], -1)


class DiT(nn.Module):
    """Velocity of the flow for one patch: [condition and time] [previous patch] [noisy patch] -> last P positions."""

    def __init__(self, lm, c, feat_dim, fused):
        super().__init__()
        self.in_proj, self.cond_proj = nn.Linear(feat_dim, c.hidden_dim), nn.Linear(feat_dim, c.hidden_dim)
        self.out_proj = nn.Linear(c.hidden_dim, feat_dim)
        self.time_mlp, self.delta_time_mlp = TimeMLP(c.hidden_dim), TimeMLP(c.hidden_dim)
        self.decoder = Stack(lm, c.hidden_dim, c.ffn_dim, c.num_heads, c.kv_channels or c.hidden_dim // c.num_heads, c.num_layers)
        self.width, self.fused, self.float32_time = c.hidden_dim, fused, False

    def embed_time(self, t, dtype):
        """Times (N,) float32 in [0, 1], 1 is noise -> (N, C)."""
        t = t if self.float32_time else t.to(dtype)
        time = self.time_mlp(sinusoid(t, self.width).to(dtype))
        # The step size is always given as zero, yet what its MLP makes of a zero was trained and is added.
        return time + self.delta_time_mlp(sinusoid(torch.zeros_like(t[:1]), self.width).to(dtype))

    def forward(self, x, mu, t, cond):
        """x and cond (N, P, D), mu (N, C) or (N, 2C), t (N,) -> (N, P, D)."""
        return self.velocity(self.in_proj(x), mu, self.embed_time(t, x.dtype), self.cond_proj(cond))

    def velocity(self, x, mu, time, cond):
        """The same of embedded x, cond (N, P, C) and time (N, C) or (1, C): generation embeds once what its branches and steps share."""
        P = x.shape[1]
        if self.fused:
            head = torch.cat([mu.view(len(mu), 2, self.width), time[:, None].expand(len(mu), 1, -1)], 1)  # (N, 3, C)
        else:
            head = (mu + time)[:, None]  # (N, 1, C)
        return self.out_proj(self.decoder.local(torch.cat([head, cond, x], 1), keep=slice(-P, None)))


class Flow(nn.Module):
    """Holds the DiT under its published name and integrates its velocity from noise (time 1) to data (time 0)."""

    def __init__(self, estimator):
        super().__init__()
        self.estimator = estimator

    def grid(self, steps, dtype, device):
        """Times from 1 to 0, denser near 1 ("sway" with coefficient one), rounded as the original rounds them."""
        t = torch.linspace(1, 0, steps + 1, device=device, dtype=dtype)
        return (t + (torch.cos(torch.pi / 2 * t) - 1 + t)).float()

    def solve(self, z, mu, cond, steps, cfg_value):
        """Euler steps with guidance. z (B, P, D) float32 noise, mu (B, .), cond (B, P, D) -> (B, P, D) float32.

        The condition `cond` stays in both branches, only mu is zeroed. The branch without mu is first rescaled to fit
        the other ("CFG-Zero*", arXiv 2503.18886), and the first 4 % of the steps, at least one, do nothing.
        """
        t, dit = self.grid(steps, mu.dtype, z.device), self.estimator
        times = dit.embed_time(t, mu.dtype)
        mu, cond = torch.cat([mu, torch.zeros_like(mu)]), dit.cond_proj(cond).repeat(2, 1, 1)
        x = z
        for i in range(max(1, int((steps + 1) * 0.04)), steps):
            noisy = dit.in_proj(x.to(mu.dtype)).repeat(2, 1, 1)
            with_mu, without = dit.velocity(noisy, mu, times[i:i + 1], cond).float().chunk(2)
            a, b = with_mu.flatten(1), without.flatten(1)
            scale = ((a * b).sum(1) / (b.square().sum(1) + 1e-8))[:, None, None]
            velocity = torch.add(scale * without * (1 - cfg_value), with_mu, alpha=cfg_value)
            x = x - (t[i] - t[i + 1]) * velocity
        return x


class Quantizer(nn.Module):
    """Finite scalar quantisation: 2 x 9 + 1 levels per channel, straight-through in training. (.., C) -> (.., C)."""

    def __init__(self, width, latent, levels):
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(width, latent), nn.Linear(latent, width)
        self.levels = levels

    def forward(self, x):
        y = torch.tanh(self.in_proj(x))
        q = torch.round(y * self.levels) / self.levels
        return self.out_proj(y + (q - y).detach() if self.training else q)


def blur(latents, most, generator):
    """Latents (A, P, D) with noise of a strength that is drawn for the clip, up to `most` of each channel's deviation in it.

    Speaking freely, a model hears its own patches, never true ones; who has heard only true ones is lost after a few.
    """
    strength = most * torch.rand(1, generator=generator)
    deviation = latents.std((0, 1), correction=0)
    return latents + strength * deviation * torch.randn(latents.shape, generator=generator)


class VoxCPM(nn.Module):
    backbone = "voxcpm"
    namings = ("published",)
    speaker_input = False
    lora_dropout_after = True  # the original drops out the update, not its input
    native_adapter = "voxcpm"
    adapter_namings = {"voxcpm": "published", "peft": "published"}

    def __init__(self, config):
        super().__init__()
        c, lm = config, config.lm_config
        self.config = c
        H, W = lm.hidden_size, c.dit_config.hidden_dim

        def stack(layers, vocab_size=0, use_rope=True):
            return Stack(lm, H, lm.intermediate_size, lm.num_attention_heads, lm.head_size, layers, vocab_size, use_rope)

        self.base_lm = stack(lm.num_hidden_layers, lm.vocab_size)
        self.residual_lm = stack(c.residual_lm_num_layers, use_rope=not c.residual_lm_no_rope)
        self.feat_encoder = LocalEncoder(lm, c.encoder_config, c.feat_dim)
        self.feat_decoder = Flow(DiT(lm, c.dit_config, c.feat_dim, c.fused))
        self.fsq_layer = Quantizer(H, c.scalar_quantization_latent_dim, c.scalar_quantization_scale)
        self.enc_to_lm_proj = nn.Linear(c.encoder_config.hidden_dim, H)
        self.lm_to_dit_proj, self.res_to_dit_proj = nn.Linear(H, W), nn.Linear(H, W)
        self.fusion_concat_proj = nn.Linear(2 * H, H) if c.fused else None
        self.stop_proj, self.stop_head = nn.Linear(H, H), nn.Linear(H, 2, bias=False)
        self.max_length = c.max_length  # train.py may ask for less
        self.speakers = {}  # named by the training data, kept in adapters; nobody here reads them
        self.finish = []
        self.path = self.fingerprint = ""
        self.left_unused = []
        self._frozen, self.tokenizer, self.files, self.training_options = [], None, {}, Training()
        self.sample_rate = self.out_sample_rate = 0
        self.split_pieces, self.tokenizer_crc, self._codec_key = set(), 0, None

    def equip(self, codec, tokenizer, files, options):
        """Give the model what does not come with its weights: codec, tokenizer, {role: path} of what `save` copies, and
        Training's options. With it, what is computed from them. `load` and `blank` call this."""
        self._frozen, self.tokenizer, self.files = [codec], tokenizer, files
        self.sample_rate, self.out_sample_rate = codec.sample_rate, codec.out_sample_rate
        self.split_pieces = {p for p in tokenizer.vocab if len(p) >= 2 and all("一" <= ch <= "鿿" for ch in p)}
        self.tokenizer_crc = zlib.crc32(files["tokenizer"].read_bytes()) if "tokenizer" in files else 0
        for stack in self.stacks():
            stack.make_rotary(self.device)
        self.training_options = Training(**options)
        self.feat_decoder.estimator.float32_time = self.training_options.float32_time

    # ---------------------------------------------------------------------------------- data: text, audio, batches

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
            raise Invalid(f"speaker {speaker!r}: this backbone has no speaker input; train one adapter per speaker"
                          + (", or give a reference clip" if self.config.fused else ""))
        text = re.sub(r"\s+", " ", text.replace("\n", " "))
        pieces = []
        for piece in self.tokenizer.pieces(text):
            bare = piece.replace("▁", "")
            pieces += list(bare) if bare in self.split_pieces else [piece]  # the marker goes with the split
        return [self.tokenizer.vocab.get(p, 0) for p in pieces]  # 0 is <unk>

    def encode_audio(self, source, start=None, end=None):
        """Latents (T, D) of a path or of (n,) samples at `sample_rate`, padded with zeros to a whole number of patches."""
        wave = source if torch.is_tensor(source) else audio.read(source, self.sample_rate, start, end)[0]
        return self.encode_audio_batch([wave])[0]

    def encode_audio_batch(self, waves):
        """What encode_audio makes of each of several clips (n,), in one pass of the codec."""
        whole = self.config.patch_size * self.codec.hop
        return [z.cpu() for z in self.codec.encode_batch([F.pad(w, (0, -len(w) % whole)) for w in waves])]

    def _patches(self, source, start=None, end=None, left=False):
        """(A, P, D) patches of a path, of samples (n,) or of latents (T, D). Audio is padded to whole patches: on the right
        in training and for a reference, on the left for a prompt to be continued; latents lose their odd frames there."""
        P, D = self.config.patch_size, self.config.feat_dim
        if torch.is_tensor(source) and source.ndim == 2:
            T = len(source) - len(source) % P
            if T == 0 or source.shape[1] != D:
                raise Invalid(f"latents of shape {list(source.shape)}: expected (T, {D}) with at least {P} frames")
            return (source[-T:] if left else source[:T]).float().cpu().view(-1, P, D)
        wave = source if torch.is_tensor(source) else audio.read(source, self.sample_rate, start, end)[0]
        if left:
            wave = F.pad(wave, (-len(wave) % (P * self.codec.hop), 0))
        return self.encode_audio(wave).view(-1, P, D)

    def encode(self, row):
        """{text (S,) with 101 last, latents (A, P, D), ref_latents (R, P, D) if any} of a row with text and audio."""
        if row.get("turns"):
            raise Invalid("this row has turns; this backbone trains on single sentences, so give rows with audio and text")
        ids = self.encode_text(row["text"])
        if not ids:
            raise Invalid(f"text {row['text']!r} has no tokens")
        example = {"text": torch.tensor(ids + [AUDIO_START]),
                   "latents": self._patches(row["audio"], row.get("start"), row.get("end"))}
        if row.get("ref_audio") is not None:
            self._check_reference()
            example["ref_latents"] = self._patches(row["ref_audio"])
        return example

    def _check_reference(self):
        if not self.config.fused:
            raise Invalid("reference audio: this checkpoint (architecture voxcpm) has no place for it; use VoxCPM2, or give "
                          "the clip together with its transcript as a prompt to be continued")

    def length(self, example):
        """Positions of the LMs, as the original counts them: text with 101, patches, 102, and the reference with its two marks."""
        reference = len(example["ref_latents"]) + 2 if "ref_latents" in example else 0
        return len(example["text"]) + len(example["latents"]) + 1 + reference

    def collate(self, examples, seeds=None):
        """Batch and counts. Draws per row, from its own seed: noise, time, keep. seeds=None: fixed by content, all kept."""
        c = self.config
        P, D = c.patch_size, c.feat_dim
        tokens, patches, place, target, cond, noise, time, keep = [], [], [], [], [], [], [], []
        history = []  # what the model is told of the patches: themselves, with history_noise blurred
        at, M = 0, 0  # positions and patches so far
        for b, e in enumerate(examples):
            text, latents, ref = e["text"], e["latents"].float(), e.get("ref_latents")
            if ref is not None:
                tokens += [torch.tensor([REF_START]), torch.zeros(len(ref), dtype=torch.long), torch.tensor([REF_END])]
                patches.append(ref.float())
                history.append(ref.float())
                place.append(at + 1 + torch.arange(len(ref)))
                at, M = at + len(ref) + 2, M + len(ref)
            A = len(latents)
            tokens += [text, torch.zeros(A, dtype=torch.long)]
            patches.append(latents)
            place.append(at + len(text) + torch.arange(A))
            target.append(M + torch.arange(A))
            at, M = at + len(text) + A, M + A
            fixed = seeds is None
            g = torch.Generator().manual_seed(zlib.crc32(text.numpy().tobytes()) if fixed else seeds[b])
            noise.append(torch.randn(A, P, D, generator=g))
            u = torch.randn(A, generator=g) if c.t_scheduler == "log-norm" else torch.rand(A, generator=g)
            time.append(torch.sigmoid(u - 0.4) if c.t_scheduler == "log-norm" else u)
            dropped = torch.rand(A, generator=g) <= self.training_options.training_cfg_rate
            keep.append(torch.ones(A, dtype=torch.bool) if fixed else ~dropped)
            past = latents
            if self.training_options.history_noise and not fixed:
                past = blur(latents, self.training_options.history_noise, g)
            history.append(past)
            cond.append(torch.cat([torch.zeros(1, P, D), past[:-1]]))
        ends = torch.tensor([len(e["latents"]) for e in examples])
        place, target = torch.cat(place), torch.cat(target)
        stop = torch.zeros(len(target), dtype=torch.long)
        stop[ends.cumsum(0) - 1] = 1  # the last patch of a clip, not the position after it
        sizes = torch.tensor([self.length(e) - 1 for e in examples])  # without the 102, see above
        L = int(sizes.max())
        positions = torch.cat([torch.arange(n) for n in sizes])
        batch = {"tokens": torch.cat(tokens), "positions": positions, "B": len(examples), "L": L,
                 "real": torch.arange(len(examples)).repeat_interleave(sizes) * L + positions,
                 "patches": torch.cat(patches), "history": torch.cat(history), "place": place, "target": target, "before": place[target] - 1,
                 "cond": torch.cat(cond), "stop": stop, "row": torch.arange(len(examples)).repeat_interleave(ends),
                 "step": torch.cat([torch.arange(n) for n in ends]), "ends": ends,
                 "noise": torch.cat(noise), "time": torch.cat(time), "keep": torch.cat(keep)}
        return batch, self.counts(batch)

    def counts(self, batch):
        N, P = len(batch["target"]), self.config.patch_size
        out = {"loss/diff": N * P, "loss/stop": N, "metric/stop_accuracy": N, "metric/stop_frame_error": len(batch["ends"])}
        if self.training_options.guess_weight:
            out["metric/guess"] = N * P
        return out

    # ---------------------------------------------------------------------------------- training

    def forward(self, batch):
        """Sums of the losses over target patches (loss/diff: also over their P frames), float32."""
        dtype = self.dtype
        place, before = batch["place"], batch["before"]  # of the packed positions: a row after the other, without padding
        embed = self.enc_to_lm_proj(self.feat_encoder(batch["history"].to(dtype)))  # (M, H)
        x = self._embed(batch["tokens"]).index_copy(0, place, embed)[None]  # (1, positions, H)
        context = Context(mask=Packing(batch["real"], batch["B"], batch["L"]))
        e, r = self._language_models(x, embed, place, self._contexts(batch["positions"], context))
        lm_h, res_h = e[0, before], r[0, before]  # (N, H): a patch is predicted from the position before it

        clean = batch["patches"][batch["target"]]  # (N, P, D) float32
        t = batch["time"][:, None, None]
        noisy = (1 - t) * clean + t * batch["noise"]
        mu = self._condition(lm_h, res_h) * batch["keep"][:, None].to(dtype)
        velocity = self.feat_decoder.estimator(noisy.to(dtype), mu, batch["time"], batch["cond"].to(dtype))
        diff = (velocity.float() - (batch["noise"] - clean)).square().mean(-1).sum()

        logits = self._stop_logits(lm_h).float()
        out = {"loss/diff": diff, "loss/stop": F.cross_entropy(logits, batch["stop"], reduction="sum")}
        weight = self.training_options.guess_weight
        if weight:
            guess = self._guess(lm_h, res_h).view_as(clean)
            wrong = (guess - clean).square().mean(-1).sum()
            out["metric/guess"] = wrong.detach()
            if self.training:  # validation stays comparable with runs that guess nothing
                out["loss/diff"] = diff + weight * wrong
        with torch.no_grad():
            says = logits.argmax(-1)
            out["metric/stop_accuracy"] = (says == batch["stop"]).float().sum()
            first = torch.where(says == 1, batch["step"], batch["ends"][batch["row"]])  # where it would stop, or never
            stops = batch["ends"].scatter_reduce(0, batch["row"], first, "amin")
            out["metric/stop_frame_error"] = (stops - (batch["ends"] - 1)).abs().float().sum()
        return out

    def _embed(self, tokens):
        x = self.base_lm.embed_tokens(tokens)
        return x * self.config.lm_config.scale_emb if self.config.lm_config.use_mup else x

    def _contexts(self, positions, context):
        """The context for either LM: only one of them may have rotary positions."""
        return [context._replace(rope=lm.rope(positions)) for lm in (self.base_lm, self.residual_lm)]

    def _language_models(self, x, embed, place, contexts, caches=(None, None)):
        """Base LM, quantiser at the audio positions `place` (flat), residual LM. x (B, L, H), embed (M, H) at `place`."""
        e = self.base_lm(x, contexts[0], caches[0])
        flat = e.flatten(0, 1)
        e = flat.index_copy(0, place, self.fsq_layer(flat[place]).to(flat.dtype)).view_as(e)
        spoken = torch.zeros_like(flat).index_copy(0, place, embed).view_as(e)  # zero on text
        r = self.fusion_concat_proj(torch.cat([e, spoken], -1)) if self.config.fused else e + spoken
        return e, self.residual_lm(r, contexts[1], caches[1])

    def _condition(self, lm_h, res_h):
        a, b = self.lm_to_dit_proj(lm_h), self.res_to_dit_proj(res_h)
        return torch.cat([a, b], -1) if self.config.fused else a + b

    def _guess(self, lm_h, res_h):
        """What a fixed matrix reads off the two states that condition the DiT, (N, P * D) float32.

        The flow teaches a model drawn at random how a patch goes on long before it teaches which patch the text wants:
        its gradient reaches the text through noise, and the quantiser rounds small differences away. The guess is a
        short way. Its matrix is drawn, not trained, so that it is no part of the model and of no file; the states turn
        towards it.
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

    def set_recompute(self, on):
        """Activation checkpointing of every layer: a fifth to a third more time for most of the activation memory."""
        for stack in self.stacks():
            stack.recompute = on

    def stacks(self):
        return [m for m in self.modules() if isinstance(m, Stack)]

    def blocks(self):
        """The modules that torch.compile takes one by one."""
        return [m for m in self.modules() if isinstance(m, Layer)]

    def lora_targets(self, settings):
        """Module names for the words enable_lm, enable_dit, enable_proj and their lists. With none of them: both LMs and the DiT.

        The local encoder is never among them: no other tool could read such an adapter. `target_modules` reaches it.
        """
        s = settings
        lm, dit = s.enable_lm, s.enable_dit
        if not (lm or dit or s.enable_proj) and (lm, dit, s.enable_proj) == (None, None, None):
            lm = dit = True
        attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
        projections = ["enc_to_lm_proj", "lm_to_dit_proj", "res_to_dit_proj"] + ["fusion_concat_proj"] * self.config.fused
        wanted = [("target_modules_lm", ("base_lm.", "residual_lm."), s.target_modules_lm or attention)] if lm else []
        wanted += [("target_modules_dit", ("feat_decoder.estimator.",), s.target_modules_dit or attention)] if dit else []
        wanted += [("target_proj_modules", ("",), s.target_proj_modules or projections)] if s.enable_proj else []
        linears = [n for n, m in self.named_modules() if isinstance(m, nn.Linear)]
        names = []
        for key, roots, words in wanted:
            for word in words:
                hits = [n for n in linears if n.split(".")[-1] == word and n.startswith(roots) and (roots != ("",) or "." not in n)]
                if not hits:
                    known = sorted({n.split(".")[-1] for n in linears if n.startswith(roots) and (roots != ("",) or "." not in n)})
                    raise Invalid(f"lora.{key}: {word!r} matches no Linear there; known are {', '.join(known)}")
                names += hits
        return names

    embeddings = ("base_lm.embed_tokens",)  # what lora.train_embeddings trains

    def adapter_words(self, modules, values):
        """lora_config.json's words for wrapped modules: the original builds its layers from these, then fills them by name."""
        def last(*roots):
            return sorted({m.split(".")[-1] for m in modules if m.startswith(roots)})

        lm, dit, proj = last("base_lm.", "residual_lm."), last("feat_decoder.estimator."), sorted(m for m in modules if "." not in m)
        return {"enable_lm": bool(lm), "enable_dit": bool(dit), "enable_proj": bool(proj), **values,
                "target_modules_lm": lm, "target_modules_dit": dit, "target_proj_modules": proj}

    # ---------------------------------------------------------------------------------- generation

    def _request(self, text, prompts=(), speaker=None, seed=None, noise=None):
        """Token ids (-1 where a patch stands), patches and cap of one request."""
        ids_of, patches, ids, spoken = self.encode_text, [], [], ""
        references = [p for p in prompts if p[0] is None]
        turns = [p for p in prompts if p[0] is not None]
        if len(references) > 1:
            raise Invalid(f"{len(references)} reference clips: this backbone takes one")
        for prompt in references:
            self._check_reference()
            patches.append(self._patches(prompt[1]))
            ids += [REF_START] + [-1] * len(patches[-1]) + [REF_END]
        for prompt in turns:
            spoken += prompt[0]
        target = ids_of(text, speaker)
        if not target:
            raise Invalid(f"text {text!r} has no tokens")
        ids += ids_of(spoken + text) + [AUDIO_START]
        context = [self._patches(prompt[1], left=True) for prompt in turns]
        ids += [-1] * sum(len(p) for p in context)
        prefix = torch.cat(context) if context else torch.zeros(0, self.config.patch_size, self.config.feat_dim)
        if noise is not None and noise.shape[1:] != prefix.shape[1:]:
            raise Invalid(f"noise has shape {list(noise.shape)}, expected (patches, {prefix.shape[1]}, {prefix.shape[2]})")
        return dict(ids=ids, patches=torch.cat(patches + [prefix]), warm=prefix[-(3 if self.config.fused else 2):],
                    tokens=len(target), seed=seed, noise=noise)

    def _cap(self, request, s):
        """Patches at most: by the text's length, by max_len, by what fits the model."""
        cap = min(int(s.length_ratio * request["tokens"] + 10), s.max_len, self.config.max_length - len(request["ids"]))
        if cap < 1:
            raise Invalid(f"prompt and text take {len(request['ids'])} positions, the model has {self.config.max_length}")
        return cap

    @torch.no_grad()
    def _run(self, requests, s):
        """Yields (i, patch (P, D)) of every request, one forward per step for all that still speak; sets self.finish."""
        c, device, dtype = self.config, self.device, self.dtype
        caps = [self._cap(r, s) for r in requests]
        batch, speaking = LeftPadded([len(r["ids"]) for r in requests], max(caps), device), Speaking(caps)
        self.finish = speaking.finish  # of this run, should another begin before it ends
        tokens = batch.stack([torch.tensor(r["ids"]) for r in requests])
        place = (tokens.flatten() == -1).nonzero().flatten().to(device)
        patches = torch.cat([r["patches"] for r in requests]).to(device, dtype)
        cond = torch.stack([r["patches"][-1] if r["ids"][-1] == -1 else torch.zeros(c.patch_size, c.feat_dim) for r in requests])
        cond = cond.to(device, dtype)
        draws = [generator(r["seed"]) for r in requests]

        embed = self.enc_to_lm_proj(self.feat_encoder(patches))
        x = self._embed(tokens.clamp(min=0).to(device)).flatten(0, 1).index_copy(0, place, embed).view(*tokens.shape, -1)
        caches = [make_caches(lm.layers, len(requests), batch.columns, x) for lm in (self.base_lm, self.residual_lm)]
        e, r = self._language_models(x, embed, place, self._contexts_at(batch.prompt()), caches)
        lm_h, res_h = e[:, -1], r[:, -1]

        for n in range(max(caps)):
            z = s.noise_scale * torch.stack([self._noise(requests[i], n, draws[i]) for i in speaking.requests]).to(device)
            patch = self.feat_decoder.solve(z, self._condition(lm_h, res_h), cond, s.inference_timesteps, s.cfg_value)
            spoken = speaking.requests
            ended = self._stop_logits(lm_h).argmax(-1).tolist() if n > s.min_len else [0] * len(spoken)
            left = speaking.after(n, ended)
            yield from ((i, patch[k]) for k, i in enumerate(spoken))  # the last one, too
            if not speaking.requests:
                break
            if left is not None:
                keep = torch.tensor(left, device=device)
                patch = patch[keep]
                for part in [batch, *caches[0], *caches[1]]:
                    part.keep(keep)
            cond = patch.to(dtype)
            lm_h, res_h = self._step(cond, batch.step(n), caches)
        self.finish = speaking.finish

    def _contexts_at(self, place):
        return self._contexts(place.positions, Context(mask=place.mask, column=place.column))

    def _step(self, patch, place, caches):
        """The newest patch (B, P, D) of every row goes in at its place, the states that predict the next come out."""
        contexts = self._contexts_at(place)
        x = self.enc_to_lm_proj(self.feat_encoder(patch))[:, None]  # (B, 1, H)
        e = self.fsq_layer(self.base_lm(x, contexts[0], caches[0]))
        r = self.fusion_concat_proj(torch.cat([e, x], -1)) if self.config.fused else e + x
        return e[:, 0], self.residual_lm(r, contexts[1], caches[1])[:, 0]

    def _noise(self, request, n, generator):
        if request["noise"] is None:
            return torch.randn(self.config.patch_size, self.config.feat_dim, generator=generator)
        if n >= len(request["noise"]):
            raise Invalid(f"noise holds {len(request['noise'])} patches and patch {n} is asked for; give more, or set max_len")
        return request["noise"][n].float().cpu()

    def _takes(self, requests, s):
        """_run, and again with the next seed for requests whose take reached its length_ratio."""
        return takes(self, requests, s, lambda request, patches, finish: len(patches) >= s.length_ratio * request["tokens"])

    def frames(self, text, prompts=(), speaker=None, seed=None, noise=None, **sampling):
        """Latent patches (P, D) float32, one by one, before the codec; self.finish is then ["end"] or ["cap"]."""
        s = Sampling(**sampling)
        for _, patch in self._takes([self._request(text, prompts, speaker, seed, noise)], s):
            yield patch.cpu()

    def generate(self, text, prompts=(), speaker=None, seed=None, noise=None, **sampling):
        """Audio in chunks (n,) at `out_sample_rate`; joined they are the whole."""
        for _, chunk in self.generate_batch([dict(text=text, prompts=prompts, speaker=speaker, seed=seed, noise=noise)], **sampling):
            yield chunk

    @torch.no_grad()
    def generate_batch(self, requests, **sampling):
        """Yields (i, chunk), the chunks of a request of 1, 2, 4 .. 16 patches."""
        s = Sampling(**sampling)
        requests = [self._request(**r) for r in requests]
        codec = self.codec.to(self.device)
        streams = [codec.stream() for _ in requests]
        for stream, r in zip(streams, requests):
            if len(r["warm"]):  # the codec remembers: the last patches of the prompt are decoded first and cut off
                stream.decode(r["warm"].flatten(0, 1).to(self.device))
        yield from chunks(self._takes(requests, s), streams, torch.cat, 16)

    # ---------------------------------------------------------------------------------- names and files

    def published_name(self, parameter, naming=None):
        """The name of a parameter in the published file: here its own."""
        return parameter

    def published_rows(self, parameter, naming=None):
        """Row order of the published weight, None where it is ours."""
        return None

    def published_state_dict(self, naming=None, merged=False):
        """{published name: tensor}. merged adds the adapters, tensor by tensor, in float32."""
        return checkpoint.weights(self, merged)

    def save(self, folder, naming=None, merged=False):
        """Write a folder in the published layout: model.safetensors, config.json, the codec and the tokenizer as they were read."""
        if not merged and any(".lora_" in n for n, _ in self.named_parameters()):
            raise Invalid("the model has adapters on: save(merged=True) adds them to the weights, lora.save_lora_weights keeps them apart")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.save_tensors(folder / "model.safetensors", self.published_state_dict(naming, merged))
        for path in self.files.values():
            if path.parent.resolve() != folder.resolve():
                shutil.copyfile(path, folder / path.name)
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


# ------------------------------------------------------------------------------------------------ files


COMPANIONS = ("config.json", "tokenizer_config.json", "special_tokens_map.json", "tokenization_voxcpm2.py")


def recognizes(config):
    return {"lm_config", "encoder_config", "dit_config", "patch_size"} <= set(config)


def load(folder, device="cpu", dtype=torch.float32, options=None, extra=None, weights=None, allow_unused=False):
    """The model in eval mode from a published folder. extra: paths of codec and tokenizer kept elsewhere.

    dtype None keeps the file's. weights names the file to read where several stand side by side; "scratch" draws them.
    """
    folder, extra = Path(folder), extra or {}
    config = read_config(checkpoint.read_json(folder / "config.json"), folder / "config.json")
    codec_path = _first(folder, extra.get("codec"), ("audiovae.safetensors", "audiovae.pth"), "the codec")
    tokenizer_path = _first(folder, extra.get("tokenizer"), ("tokenizer.json",), "the tokenizer")
    if weights != "scratch":
        path = _first(folder, folder / weights if weights else None, ("model.safetensors", "pytorch_model.bin"), "the model's weights")
    with torch.device("meta"):
        model = VoxCPM(config)
    if weights == "scratch":
        model.to_empty(device="cpu")
        draw(model)
        model.to(device, dtype or torch.float32)
    else:
        stored = checkpoint.read(path)
        dtype = dtype or checkpoint.main_dtype(stored)
        model.left_unused = checkpoint.fill(model, stored, dtype=dtype, device=device, allow_unused=allow_unused, what=str(path))
    codec = audiovae.load(codec_path, config.audio_vae_config, audiovae.V2 if config.fused else audiovae.V1)
    if codec.latent_dim != config.feat_dim:
        raise Invalid(f"{codec_path} makes {codec.latent_dim} latent channels, config.json says feat_dim {config.feat_dim}")
    files = {"codec": codec_path, "tokenizer": tokenizer_path, **{n: folder / n for n in COMPANIONS if (folder / n).is_file()}}
    model.equip(codec, Tokenizer(tokenizer_path), files, options or {})
    return model.eval()


def _first(folder, given, names, what):
    for path in [Path(given)] if given else [folder / n for n in names]:
        if path.is_file():
            return path
    raise Invalid(f"{what}: no file at {given}" if given else f"{folder} has no {' or '.join(names)}, so {what} cannot be loaded")


def draw(model):
    """Weights as PyTorch draws them, which is how the original starts; the special token is standard normal."""
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
    nn.init.normal_(model.feat_encoder.special_token)


# ------------------------------------------------------------------------------------------------ shapes for measuring

# LM layers, width, feed-forward, head size, local layers, residual layers, patch, quantiser
SHAPES = {"1.5": (24, 1024, 4096, None, 8, 8, 4, 256), "0.5": (24, 1024, 4096, None, 4, 6, 2, 256), "2": (28, 2048, 6144, 128, 12, 8, 4, 512)}


def shape(size, version):
    """(Config, arguments of the codec) of a version in its published size, or smaller in the same proportions."""
    if (version or "1.5") not in SHAPES:
        raise Invalid(f"version {version!r} is not known; there are {', '.join(SHAPES)}")
    version = version or "1.5"
    layers, H, ffn, head, local, residual, P, latent = SHAPES[version]
    heads, groups, W, local_ffn, vocab, limit = 16, 2, 1024, 4096, 73448, 8192
    codec = dict(audiovae.V2 if version == "2" else audiovae.V1)
    if version == "1.5":
        codec |= dict(encoder_dim=64, encoder_rates=[2, 3, 6, 7, 7], decoder_dim=2048, decoder_rates=[7, 7, 6, 3, 2], sample_rate=44100)
    if size == "tiny":
        layers, H, ffn, head, local, residual, latent = 2, 64, 128, head and 16, 1, 1, 16
        heads, W, local_ffn, vocab, limit = 4, 64, 128, 300, 512
        codec |= dict(encoder_dim=8, decoder_dim=64)
    elif size == "mid":
        local, residual, layers = round(6 * local / layers), round(6 * residual / layers), 6
        H, ffn, head, latent, W, local_ffn, heads, groups, vocab = (512, 512 * ffn // H, head and 64, 512 * latent // H, 512 * W // H,
                                                                    512 * local_ffn // H, 8, 1, 4096)
        codec |= dict(encoder_dim=codec["encoder_dim"] // 4, decoder_dim=codec["decoder_dim"] // 4)
    factors = [1.0] * ((head or H // heads) // 2)
    scaling = {"long_factor": factors, "short_factor": factors, "original_max_position_embeddings": 32768}
    lm = LMConfig(H, ffn, layers, heads, groups, vocab, rope_scaling=scaling, kv_channels=head, use_mup=False)
    stack = LocalConfig(W, local_ffn, heads, local, head)
    two = version == "2"
    return Config(lm, stack, stack, "voxcpm2" if two else "voxcpm", P, 64, residual, two, latent, max_length=limit), codec


def blank(size, version, device, dtype, options=None):
    """A model of a known shape with drawn weights and a tokenizer of single letters, for measuring only. options: Training's."""
    config, codec = shape(size, version)
    with torch.device("meta"):
        model = VoxCPM(config)
    model.to_empty(device=device)
    draw(model)
    model.to(dtype)
    vocab = {"<unk>": 0, **{ch: i + 3 for i, ch in enumerate("abcdefghijklmnopqrstuvwxyz ")}}
    tokenizer = Tokenizer({"model": {"type": "BPE", "vocab": vocab, "merges": [], "unk_token": "<unk>"}})
    model.equip(audiovae.AudioVAE(**codec).eval().requires_grad_(False), tokenizer, {}, options or {})
    return model.eval()
