"""AudioVAE, the codec of every VoxCPM: 16 or 44.1 kHz audio to 25 latent frames a second, and back.

    wav (n,) --encoder, strides 2 5 8 8--> mu (T, D), T = ceil(n / hop), D = 64
    mu (T, D) --decoder, strides 8 8 5 2--> wav (T * out_hop,)

Every convolution is causal: a latent frame sees no later sample, an output sample no later frame. So right
padding changes nothing before it, unequal clips share a batch exactly, and decoding piece by piece equals
decoding at once when each layer keeps its last inputs. Latents are the mean of the posterior, neither sampled
nor scaled. Float32 always: the published codec runs so, and on the latents all else is trained.

The layout is that of the Descript Audio Codec (arXiv 2306.06546) with depthwise convolutions. The published
files hold weight_g and weight_v; they are multiplied out on loading (arXiv 1602.07868), so a module holds a
plain `weight`.
Checkpoints: openbmb/VoxCPM-0.5B, openbmb/VoxCPM1.5, openbmb/VoxCPM2, file audiovae.pth.

B batch, n samples, T latent frames, D latent channels, C channels of a layer.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

from models.parts import Invalid, checkpoint

# What the published classes assume where config.json says nothing. VoxCPM-0.5B's says nothing at all.
V1 = dict(
    encoder_dim=128, encoder_rates=[2, 5, 8, 8], latent_dim=64,
    decoder_dim=1536, decoder_rates=[8, 8, 5, 2], depthwise=True,
    sample_rate=16000, out_sample_rate=None,
    sr_bin_boundaries=None, odd_stride_extra_pad=True)
V2 = dict(
    V1, decoder_dim=2048, decoder_rates=[8, 6, 5, 2, 2, 2],
    out_sample_rate=48000, sr_bin_boundaries=[20000, 30000, 40000],
    odd_stride_extra_pad=False)
# Keys that may stand in audio_vae_config and have one possible value here: other values were never published.
# cond_dim belongs to a kind of conditioning that no checkpoint has; scale_bias has the widths of the layers.
FIXED = dict(use_noise_block=False, cond_type="scale_bias", cond_out_layer=False)

# In every published file; only the sampling of training the codec reads it, so no latent and no audio
# depends on it.
UNUSED = {r"encoder\.fc_logvar\..*": "the posterior's variance, used only while the codec itself is trained"}

# Long audio goes through in pieces of so many frames; exact, since each layer keeps its last inputs. A CPU
# is three times as fast with pieces of two seconds, whose layers fit its caches; a GPU wants few large ones.
CHUNK_FRAMES = {"cpu": 32, "cuda": 500}


class Conv(nn.Conv1d):
    """Convolution that sees no later sample. (B, C, n) -> (B, C', n / stride).

    options: stride, dilation and groups of nn.Conv1d. `past`, {layer: its last inputs}, goes from piece to
    piece.
    """

    def __init__(self, c_in, c_out, kernel, left=None, **options):
        super().__init__(c_in, c_out, kernel, **options)
        reach = (kernel - 1) * self.dilation[0]
        self.left = reach if left is None else left  # zeros before the first sample

    def forward(self, x, past=None):
        past = {} if past is None else past
        if self.left:
            before = past.get(self)
            if before is None:
                before = x.new_zeros(*x.shape[:2], self.left)
            x = torch.cat([before, x], dim=2)
            past[self] = x[:, :, -self.left:]
        return F.conv1d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Upsample(nn.ConvTranspose1d):
    """Transposed convolution without its look-ahead. (B, C, T) -> (B, C', T * stride).

    A kernel of two strides: each input reaches its own stride of output and the next one; what the last input
    would add after the end is dropped. So the only memory is one input, and all of it is one product of
    matrices and a sum, which takes half to two thirds of the time that conv_transpose1d takes on a CPU.
    """

    def __init__(self, c_in, c_out, stride):
        super().__init__(c_in, c_out, 2 * stride, stride=stride)

    def forward(self, x, past=None):
        past = {} if past is None else past
        B, C, T = x.shape
        before = past.get(self)
        if before is None:
            before = x.new_zeros(B, C, 1)
        past[self] = x[:, :, -1:]
        taps = self.weight.flatten(1).t() @ torch.cat([before, x], dim=2)  # (B, C' * 2 * stride, T + 1)
        taps = taps.view(B, self.out_channels, 2, self.stride[0], T + 1)
        y = taps[:, :, 0, :, 1:] + taps[:, :, 1, :, :-1]  # (B, C', stride, T)
        y = y.transpose(2, 3).reshape(B, self.out_channels, -1)
        return y + self.bias[:, None]


class Snake(nn.Module):
    """x + sin(a x)^2 / (a + 1e-9), one a per channel (arXiv 2006.08195)."""

    def __init__(self, channels):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1))

    def forward(self, x, past=None):
        squares = (self.alpha * x).sin_().square_()  # in place: long waves make large tensors
        return torch.addcdiv(x, squares, self.alpha + 1e-9)


class Block(nn.Module):
    """Layers in a row, `past` handed to each; with `residual` the input is added at the end."""

    def __init__(self, *layers, residual=False):
        super().__init__()
        self.block = nn.ModuleList(layers)
        self.residual = residual

    def forward(self, x, past=None):
        y = x
        for layer in self.block:
            y = layer(y, past)
        return x + y if self.residual else y


def residual_units(c, depthwise):
    """Three units that see further and further."""
    groups = c if depthwise else 1
    return [residual_unit(c, d, groups) for d in (1, 3, 9)]


def residual_unit(c, dilation, groups):
    """Seven taps within each channel, then a mix across channels."""
    within = Conv(c, c, 7, dilation=dilation, groups=groups)
    across = Conv(c, c, 1)
    return Block(Snake(c), within, Snake(c), across, residual=True)


class Encoder(nn.Module):
    def __init__(self, dim, rates, latent_dim, depthwise, odd_stride_extra_pad):
        super().__init__()
        self.block = nn.ModuleList([Conv(1, dim, 7)])
        for s in rates:
            # Kernel minus stride would be s. The V1 checkpoints were trained with one zero more where s is
            # odd, which shifts everything after by a sample; V2 is the textbook. Each stays with what its
            # weights know.
            left = 2 * math.ceil(s / 2) if odd_stride_extra_pad else s
            units = residual_units(dim, depthwise)
            down = Conv(dim, 2 * dim, 2 * s, left=left, stride=s)
            self.block.append(Block(*units, Snake(dim), down))
            dim *= 2
        self.fc_mu = Conv(dim, latent_dim, 3)
        self.fc_logvar = Conv(dim, latent_dim, 3)

    def forward(self, x, past=None):
        """(B, 1, n), n a multiple of the hop -> hidden (B, C, T); fc_mu makes the latents of it."""
        for layer in self.block:
            x = layer(x, past)
        return x


class RateCondition(nn.Module):
    """A scale and a bias per channel for each bucket of output rates."""

    def __init__(self, buckets, channels):
        super().__init__()
        # nn.Embedding draws so too, but on the meta device by importing a compiler.
        scale = torch.randn(buckets, channels)
        bias = torch.randn(buckets, channels)
        self.scale_embed = nn.Embedding.from_pretrained(scale, freeze=False)
        self.bias_embed = nn.Embedding.from_pretrained(bias, freeze=False)

    def forward(self, x, bucket):
        scale = self.scale_embed.weight[bucket, :, None]
        bias = self.bias_embed.weight[bucket, :, None]
        return x * scale + bias


class Decoder(nn.Module):
    def __init__(self, dim, rates, latent_dim, depthwise, boundaries):
        super().__init__()
        if depthwise:
            layers = [Conv(latent_dim, latent_dim, 7, groups=latent_dim), Conv(latent_dim, dim, 1)]
        else:
            layers = [Conv(latent_dim, dim, 7)]
        conditions = {}  # {index of the layer that it stands before, as text: RateCondition}
        for s in rates:
            if boundaries:
                conditions[str(len(layers))] = RateCondition(len(boundaries) + 1, dim)
            half = dim // 2
            up = Upsample(dim, half, s)
            layers.append(Block(Snake(dim), up, *residual_units(half, depthwise)))
            dim = half
        self.model = nn.ModuleList([*layers, Snake(dim), Conv(dim, 1, 7)])
        if boundaries:
            self.sr_cond_model = nn.ModuleDict(conditions)
            self.register_buffer("sr_bin_boundaries", torch.tensor(boundaries, dtype=torch.int32))

    def forward(self, z, bucket=None, past=None):
        """(B, D, T) -> (B, 1, T * out_hop)."""
        for i, layer in enumerate(self.model):
            if bucket is not None and str(i) in self.sr_cond_model:
                z = self.sr_cond_model[str(i)](z, bucket)
            z = layer(z, past)
        return torch.tanh(z)


class AudioVAE(nn.Module):
    """The codec. With sr_bin_boundaries (Hz) the decoder knows the wanted output bandwidth, as in VoxCPM2."""

    def __init__(self, encoder_dim, encoder_rates, latent_dim, decoder_dim, decoder_rates, depthwise,
                 sample_rate, out_sample_rate=None, sr_bin_boundaries=None, odd_stride_extra_pad=True):
        super().__init__()
        self.sample_rate = sample_rate
        self.out_sample_rate = out_sample_rate or sample_rate
        self.hop = math.prod(encoder_rates)  # samples per latent frame, and what the decoder makes of one
        self.out_hop = math.prod(decoder_rates)
        self.latent_dim = latent_dim
        self.boundaries = sr_bin_boundaries
        # {published name: Stored} where it came with the model's weights, for saving it again
        self.stored = {}
        self.encoder = Encoder(encoder_dim, encoder_rates, latent_dim, depthwise, odd_stride_extra_pad)
        self.decoder = Decoder(decoder_dim, decoder_rates, latent_dim, depthwise, sr_bin_boundaries)

    @property
    def device(self):
        return self.encoder.fc_mu.weight.device

    @property
    def chunk_frames(self):
        return CHUNK_FRAMES.get(self.device.type, 500)

    @torch.no_grad()
    def encode(self, wav):
        """(n,) -> (T, D), or (B, n) -> (B, T, D); zeros are added on the right up to a whole frame."""
        wav = torch.as_tensor(wav, dtype=torch.float32).to(self.device)
        n = wav.shape[-1]
        if n == 0:
            return wav.new_zeros(*wav.shape[:-1], 0, self.latent_dim)
        x = wav.reshape(-1, 1, n)
        x = F.pad(x, (0, -n % self.hop))
        past = {}
        chunks = x.split(self.chunk_frames * self.hop, dim=2)
        mu = [self.encoder.fc_mu(self.encoder(chunk, past), past) for chunk in chunks]
        mu = torch.cat(mu, dim=2)  # (B, D, T)
        return mu.transpose(1, 2).reshape(*wav.shape[:-1], -1, self.latent_dim).contiguous()

    def encode_batch(self, wavs):
        """[(n_i,), ...] -> [(T_i, D), ...] in one pass; padding reaches no frame of a shorter one."""
        if not wavs:
            return []
        wavs = [torch.as_tensor(wav, dtype=torch.float32) for wav in wavs]
        mu = self.encode(nn.utils.rnn.pad_sequence(wavs, batch_first=True))
        frames = [math.ceil(len(wav) / self.hop) for wav in wavs]
        return [row[:count].clone() for row, count in zip(mu, frames)]

    @torch.no_grad()
    def decode(self, latents, rate=None):
        """(T, D) -> (T * out_hop,), or (B, T, D) -> (B, T * out_hop)."""
        return self._decode(latents, self._bucket(rate), None)

    def stream(self, rate=None):
        """Decoder that takes the latents piece by piece; the joined pieces equal decode of the whole."""
        return Stream(self, self._bucket(rate))

    def _decode(self, latents, bucket, past):
        z = torch.as_tensor(latents, dtype=torch.float32).to(self.device)
        if z.shape[-1] != self.latent_dim:
            raise Invalid(f"latents of shape {list(z.shape)}: the codec expects (T, {self.latent_dim}) "
                          f"or (B, T, {self.latent_dim})")
        if z.shape[-2] == 0:
            return z.new_zeros(*z.shape[:-2], 0)
        past = {} if past is None else past
        x = z.reshape(-1, *z.shape[-2:]).transpose(1, 2)  # (B, D, T)
        waves = [self.decoder(piece, bucket, past) for piece in x.split(self.chunk_frames, dim=2)]
        return torch.cat(waves, dim=2).reshape(*z.shape[:-2], -1)

    def _bucket(self, rate):
        """Index of the condition for a wanted output rate; None where the decoder has no conditions."""
        if self.boundaries is None:
            if rate not in (None, self.out_sample_rate):
                raise Invalid(f"this codec decodes to {self.out_sample_rate} Hz only, not to {rate}; "
                              "resample its output")
            return None
        return sum((rate or self.out_sample_rate) > edge for edge in self.boundaries)

    def published_state_dict(self):
        """{published name: CPU tensor}: each weight as direction weight_v and length weight_g again."""
        out = {}
        for name, tensor in self.state_dict().items():
            tensor = tensor.detach().cpu()
            # Transposed convolutions keep their input axis: it is axis 0 of their weight, like any other's
            # output axis.
            if name.endswith(".weight") and tensor.ndim == 3:
                out[name + "_g"] = tensor.flatten(1).norm(dim=1)[:, None, None]
                out[name + "_v"] = tensor.clone()
            else:
                out[name] = tensor.clone()
        return out


class Stream:
    """What each layer of the decoder still remembers, between pieces; it does not grow with their number."""

    def __init__(self, codec, bucket):
        self.codec, self.bucket = codec, bucket
        self.past = {}  # {layer: its last inputs}

    @torch.no_grad()
    def decode(self, latents):
        """(t, D) -> (t * out_hop,), the audio that follows the pieces before."""
        y = self.codec._decode(latents, self.bucket, self.past)
        # A view would keep its whole piece alive.
        self.past = {layer: tail.clone() for layer, tail in self.past.items()}
        return y


def settings(config, defaults):
    """The arguments of AudioVAE from an `audio_vae_config` (or None) and the class defaults V1 or V2."""
    config = config or {}
    for key, value in FIXED.items():
        if config.get(key, value) != value:
            raise Invalid(f"audio_vae_config: {key} is {config[key]!r}; "
                          f"only {value!r} was ever published and is supported")
    known = set(defaults) - {"odd_stride_extra_pad"}
    unknown = sorted(set(config) - known - set(FIXED) - {"cond_dim"})
    if unknown:
        raise Invalid(f"audio_vae_config has the unknown keys {', '.join(unknown)}; "
                      f"known are {', '.join(sorted(known))}")
    stated = {key: value for key, value in config.items() if key in known}
    return {**defaults, **stated}


def load(path, config=None, defaults=V1, device="cpu"):
    """The codec of a file or folder (audiovae.safetensors, else audiovae.pth), frozen, eval mode, float32."""
    path = checkpoint.find(path, ("audiovae.safetensors", "audiovae.pth"), "the codec of VoxCPM")
    stored = checkpoint.read(path)
    return build(stored, settings(config, defaults), str(path), device)


def build(stored, numbers, what, device="cpu"):
    """The codec of {published name: Stored}. numbers: what `settings` gives; what: the file, for errors."""
    with torch.device("meta"):
        codec = AudioVAE(**numbers)
    weights = checkpoint.fold_weight_norm(stored)
    checkpoint.fill(codec, weights, dtype=torch.float32, device=device, what=what)
    if codec.boundaries:
        trained = codec.decoder.sr_bin_boundaries.tolist()
        stated = list(codec.boundaries)
        if trained != stated:
            raise Invalid(f"{what} was made with the rate boundaries {trained}, "
                          f"but config.json says {stated}")
    return codec.eval().requires_grad_(False)
