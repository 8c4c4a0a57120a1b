"""The audio tokenizer of Higgs Audio v2: 24 kHz audio to 25 frames per second of 8 codes, and back.

    wav (n,) ──DAC encoder, strides 8 5 4 2 3───────────────────────▶ (256, T) ┐
         └─16 kHz─▶ HuBERT, mean of 13 states, every 2nd ─▶ convs ──▶ (768, T) ┴─fc─▶ 8 codebooks ─▶ codes (8, T)
    codes (8, T) ─▶ sum of the codebook rows ─fc2─▶ (256, T) ──DAC decoder──▶ wav (960 T,)

DAC is arXiv 2306.06546, HuBERT arXiv 2106.07447; the two together are those of X-Codec (arXiv 2408.17175).
Checkpoint: bosonai/higgs-audio-v2-tokenizer, either as model.pth in its original naming or as transformers writes it.
Attributes bear the names of the transformers layout; ORIGINAL renames the other one. Always float32: a code is the
nearest of 1024 rows, eight times in a row, and rounding to bfloat16 would pick others.

B batch, n samples, T frames of 25 Hz, F frames of 50 Hz, C channels, K codebooks. Convolutions work on (B, C, 1, n).
"""
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from models.parts import Invalid, audio, checkpoint
from models.parts.layers import FeatureProjection, FeedForward, exact
from models.parts.plain import LARGEST, LAYERS, as_record, fixed, need, shown

# Never read by encode or decode, in either naming.
UNUSED = {
    r"semantic_model\.masked_spec_embed": "stands for masked frames while HuBERT is trained",
    r"decoder_semantic\..*": "rebuilds HuBERT's features; a loss of the codec's own training",
    r"fc1\..*|fc_post1\..*": "feeds decoder_semantic",
    r"quantizer\..*\.(cluster_size|embed_avg|inited)": "running averages by which training moves the codebooks",
}
SEMANTIC_PAD = 160  # zeros at both ends of what HuBERT hears
WINDOW = 500  # frames (20 s) that are decoded at once; bounds memory, not the result
PIECE = 48000  # samples that pass the layers at full rate at once, so that they stay in the processor's cache


def out_length(n, conv):
    """How many samples a convolution gives for n; it may be a Conv1d of any stride, padding and dilation."""
    return (n + 2 * conv.padding[0] - conv.dilation[0] * (conv.kernel_size[0] - 1) - 1) // conv.stride[0] + 1


def valid_mask(lengths, size, device):
    """1 where a row of the batch still has sound, (B, 1, 1, size); None where all rows are full."""
    if all(n == size for n in lengths):
        return None
    return (torch.arange(size, device=device) < torch.tensor(lengths, device=device)[:, None]).float()[:, None, None]


def lay_out(x):
    """Channels-last on the CPU: a 1x1 convolution is then a plain matrix product, seven times faster at 24 kHz."""
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x


def in_pieces(f, x, mask, size, reach, down=1, up=1):
    """f(x, mask) along a long last axis, piece by piece and yet exact. f gives `up` columns for each `down` columns.

    reach: how many columns further f looks to either side. size and reach are multiples of `down`.
    """
    parts, n = [], x.shape[-1]
    for first in range(0, n, size):
        start, end = max(0, first - reach), min(n, first + size + reach)
        part = f(x[..., start:end], None if mask is None else mask[..., start:end])
        skip = (first - start) // down * up
        parts.append(part[..., skip : skip + size // down * up])
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


class Conv(nn.Conv1d):
    """A one-dimensional convolution computed as a flat picture, since only pictures can lie channels-last in memory.

    mask: zeroes the input beyond the end of each row, where a clip that is encoded alone sees zero padding.
    """

    def forward(self, x, mask=None):
        x = x if mask is None else x * mask
        weight, stride, padding, dilation = self.weight[:, :, None], self.stride[0], self.padding[0], self.dilation[0]
        return F.conv2d(x, weight, self.bias, (1, stride), (0, padding), (1, dilation), self.groups)


# ------------------------------------------------------------------------------------------------ DAC


class Snake(nn.Module):
    """x + sin²(αx) / (α + 1e-9), one α per channel (arXiv 2006.08195)."""

    def __init__(self, channels):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1))

    def forward(self, x):
        alpha = self.alpha[..., None]
        return torch.addcmul(x, (x * alpha).sin_().square_(), 1 / (alpha + 1e-9))


REACH = 3 * (1 + 3 + 9)  # samples to either side that the three residual units of a block see


class ResidualUnit(nn.Module):
    def __init__(self, channels, dilation):
        super().__init__()
        self.snake1 = Snake(channels)
        self.conv1 = Conv(channels, channels, 7, padding=3 * dilation, dilation=dilation)
        self.snake2 = Snake(channels)
        self.conv2 = Conv(channels, channels, 1)

    def forward(self, x, mask=None):
        return self.conv2(self.snake2(self.conv1(self.snake1(x), mask))).add_(x)


class EncoderBlock(nn.Module):
    def __init__(self, channels, out_channels, stride):
        super().__init__()
        self.res_unit1 = ResidualUnit(channels, 1)
        self.res_unit2 = ResidualUnit(channels, 3)
        self.res_unit3 = ResidualUnit(channels, 9)
        self.snake1 = Snake(channels)
        self.conv1 = Conv(channels, out_channels, 2 * stride, stride, padding=math.ceil(stride / 2))

    def forward(self, x, mask):
        for unit in (self.res_unit1, self.res_unit2, self.res_unit3):
            x = unit(x, mask)
        return self.conv1(self.snake1(x), mask)


class Encoder(nn.Module):
    """DAC's encoder. widths: channels before, between and after the blocks. (B, 1, 1, n) -> (B, latent, 1, T)"""

    def __init__(self, widths, strides, latent):
        super().__init__()
        self.conv1 = Conv(1, widths[0], 7, padding=3)
        self.block = nn.ModuleList([EncoderBlock(*wide, s) for *wide, s in zip(widths, widths[1:], strides)])
        self.snake1 = Snake(widths[-1])
        self.conv2 = Conv(widths[-1], latent, 3, padding=1)

    def lengths(self, n):
        """Samples at the input of each block, then frames."""
        sizes = [n]
        for block in self.block:
            sizes.append(out_length(sizes[-1], block.conv1))
        return sizes

    def forward(self, x, lengths):
        sizes = list(zip(*map(self.lengths, lengths)))  # per level, of each row
        stride = self.block[0].conv1.stride[0]
        reach = math.ceil((3 + REACH + 2 * stride) / stride) * stride
        mask = valid_mask(sizes[0], x.shape[-1], x.device)

        def head(x, mask):
            return self.block[0](lay_out(self.conv1(x)), mask)

        x = in_pieces(head, x, mask, PIECE // stride * stride, reach, stride)
        for block, size in zip(self.block[1:], sizes[1:]):
            x = block(x, valid_mask(size, x.shape[-1], x.device))
        return self.conv2(self.snake1(x), valid_mask(sizes[-1], x.shape[-1], x.device))


class Upsample(nn.ConvTranspose1d):
    """Transposed convolution, exactly n -> n * stride: an odd stride needs one sample of output padding."""

    def __init__(self, channels, out_channels, stride):
        super().__init__(channels, out_channels, 2 * stride, stride, math.ceil(stride / 2), output_padding=stride % 2)

    def forward(self, x):
        stride, padding, extra = self.stride[0], self.padding[0], self.output_padding[0]
        return F.conv_transpose2d(x, self.weight[:, :, None], self.bias, (1, stride), (0, padding), (0, extra))


class DecoderBlock(nn.Module):
    def __init__(self, channels, out_channels, stride):
        super().__init__()
        self.snake1 = Snake(channels)
        self.conv_t1 = Upsample(channels, out_channels, stride)
        self.res_unit1 = ResidualUnit(out_channels, 1)
        self.res_unit2 = ResidualUnit(out_channels, 3)
        self.res_unit3 = ResidualUnit(out_channels, 9)

    def forward(self, x):
        return self.res_unit3(self.res_unit2(self.res_unit1(self.conv_t1(self.snake1(x)))))


class Decoder(nn.Module):
    """DAC's decoder without the tanh at its end, so that nothing is clipped. (B, latent, 1, T) -> (B, 1, 1, n)"""

    def __init__(self, latent, widths, strides):
        super().__init__()
        self.conv1 = Conv(latent, widths[0], 7, padding=3)
        self.block = nn.ModuleList([DecoderBlock(*wide, s) for *wide, s in zip(widths, widths[1:], strides)])
        self.snake1 = Snake(widths[-1])
        self.conv2 = Conv(widths[-1], 1, 7, padding=3)

    def forward(self, x):
        x = lay_out(self.conv1(x))
        for block in self.block[:-1]:
            x = block(x)
        stride = self.block[-1].conv_t1.stride[0]
        reach = math.ceil((3 + REACH) / stride) + 2

        def tail(x, _):
            return self.conv2(self.snake1(self.block[-1](x)))

        return in_pieces(tail, x, None, math.ceil(PIECE / stride), reach, up=stride)

    def context(self):
        """How many frames before and after itself a frame of sound depends on, found by walking backwards."""
        first, last = 0, math.prod(block.conv_t1.stride[0] for block in self.block) - 1  # the samples of frame 0
        first, last = first - 3, last + 3
        for block in reversed(self.block):
            stride, padding = block.conv_t1.stride[0], block.conv_t1.padding[0]
            # Input i reaches the outputs i·stride - padding ... i·stride - padding + 2·stride - 1.
            first = -(-(first - REACH + padding - 2 * stride + 1) // stride)
            last = (last + REACH + padding) // stride
        return 3 - first, last + 3


# ------------------------------------------------------------------------------------------------ HuBERT


class FeatureLayer(nn.Module):
    """Convolution, in the first layer a norm of each channel over time (a GroupNorm of one-channel groups), GELU."""

    def __init__(self, channels, out_channels, kernel, stride, norm):
        super().__init__()
        self.conv = nn.Conv1d(channels, out_channels, kernel, stride, bias=False)
        if norm:
            self.layer_norm = nn.GroupNorm(out_channels, out_channels)
        self.norm = norm

    def forward(self, x, lengths):
        x = self.conv(x)  # (B, C, n)
        if self.norm:
            if all(n == x.shape[-1] for n in lengths):
                x = self.layer_norm(x)
            else:  # the statistics must not see what lies behind the end of a row
                for i, n in enumerate(lengths):
                    x[i, :, :n] = self.layer_norm(x[i : i + 1, :, :n])[0]
        return F.gelu(x)


class FeatureExtractor(nn.Module):
    """No layer pads, so that a valid output comes from valid input only. (B, n) -> (B, C, F)"""

    def __init__(self, widths, kernels, strides):
        super().__init__()
        sizes = zip([1, *widths], widths, kernels, strides)
        self.conv_layers = nn.ModuleList([FeatureLayer(*size, norm=i == 0) for i, size in enumerate(sizes)])

    def forward(self, x, lengths):
        x = x[:, None]
        for layer in self.conv_layers:
            lengths = [out_length(n, layer.conv) for n in lengths]
            x = layer(x, lengths)
        return x, lengths


class PositionalConv(nn.Module):
    """Tells HuBERT where it is: a wide grouped convolution. An even kernel gives a frame too many, the last."""

    def __init__(self, width, kernel, groups):
        super().__init__()
        self.conv = Conv(width, width, kernel, padding=kernel // 2, groups=groups)

    def forward(self, x, mask):
        return F.gelu(self.conv(x, mask)[..., : x.shape[-1]])


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x, mask):
        parts = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)  # (B, H, F, D)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Transformer layer that normalises after each sum."""

    def __init__(self, width, inner, heads, eps):
        super().__init__()
        self.attention = Attention(width, heads)
        self.layer_norm = nn.LayerNorm(width, eps)
        self.feed_forward = FeedForward(width, inner, F.gelu)
        self.final_layer_norm = nn.LayerNorm(width, eps)

    def forward(self, x, mask):
        x = self.layer_norm(x + self.attention(x, mask))
        return self.final_layer_norm(x + self.feed_forward(x))


class Transformer(nn.Module):
    def __init__(self, width, inner, layers, heads, kernel, groups, eps):
        super().__init__()
        self.pos_conv_embed = PositionalConv(width, kernel, groups)
        self.layer_norm = nn.LayerNorm(width, eps)
        self.layers = nn.ModuleList([Layer(width, inner, heads, eps) for _ in range(layers)])


class Hubert(nn.Module):
    """HuBERT base. (B, n) at 16 kHz -> mean of all hidden states at every `step`-th frame, (B, ceil(F / step), C)

    The hidden states are the input of the first layer and the output of each: 13 of them for 12 layers. Nothing
    normalises the waveform. lengths: samples of each row; returns frames of each row, after the step.
    """

    def __init__(self, feature_widths, kernels, strides, width, inner, layers, heads, pos_kernel, pos_groups, eps):
        super().__init__()
        self.feature_extractor = FeatureExtractor(feature_widths, kernels, strides)
        self.feature_projection = FeatureProjection(feature_widths[-1], width, eps)
        self.encoder = Transformer(width, inner, layers, heads, pos_kernel, pos_groups, eps)

    def lengths(self, n):
        for layer in self.feature_extractor.conv_layers:
            n = out_length(n, layer.conv)
        return n

    def forward(self, x, lengths, step=1):
        x, lengths = self.feature_extractor(x, lengths)
        x = self.feature_projection(x.transpose(1, 2))  # (B, F, C)
        mask = valid_mask(lengths, x.shape[1], x.device)
        x = x + self.encoder.pos_conv_embed(x.transpose(1, 2)[:, :, None], mask)[:, :, 0].transpose(1, 2)
        x = self.encoder.layer_norm(x)
        keys = None if mask is None else mask.bool()
        total = x[:, ::step].clone()
        for layer in self.encoder.layers:
            x = layer(x, keys)
            total += x[:, ::step]
        return total / (len(self.encoder.layers) + 1), [-(-n // step) for n in lengths]


# ------------------------------------------------------------------------------------------------ semantic branch


class SemanticUnit(nn.Module):
    def __init__(self, width, kernel, dilation):
        super().__init__()
        self.conv1 = Conv(width, width, kernel, padding=(kernel - 1) // 2 * dilation, dilation=dilation, bias=False)
        self.conv2 = Conv(width, width, 1, bias=False)

    def forward(self, x, mask):
        return self.conv2(F.elu(self.conv1(F.elu(x), mask))) + x


class SemanticBlock(nn.Module):
    def __init__(self, width, out_width, kernel, dilations):
        super().__init__()
        self.res_units = nn.ModuleList([SemanticUnit(width, kernel, d) for d in dilations])
        self.conv = Conv(width, out_width, 3, padding=1)

    def forward(self, x, mask):
        for unit in self.res_units:
            x = unit(x, mask)
        return self.conv(x, mask)


class SemanticEncoder(nn.Module):
    """(B, C, 1, T) -> (B, C', 1, T)"""

    def __init__(self, widths, kernel, unit_kernel, dilations):
        super().__init__()
        self.conv = Conv(widths[0], widths[0], kernel, padding=kernel // 2, bias=False)
        blocks = [SemanticBlock(*pair, unit_kernel, dilations) for pair in zip(widths, widths[1:])]
        self.conv_blocks = nn.ModuleList(blocks)

    def forward(self, x, mask):
        x = self.conv(x, mask)
        for block in self.conv_blocks:
            x = block(x, mask)
        return x


# ------------------------------------------------------------------------------------------------ quantiser


class Codebook(nn.Module):
    def __init__(self, bins, size):
        super().__init__()
        self.embed = nn.Parameter(torch.empty(bins, size))


class Quantizer(nn.Module):
    """One stage: the row of the codebook nearest to the projected vector, by plain Euclidean distance."""

    def __init__(self, width, bins, size):
        super().__init__()
        self.project_in = nn.Linear(width, size)
        self.codebook = Codebook(bins, size)
        self.project_out = nn.Linear(size, width)

    def encode(self, x):
        """(B, T, C) -> (B, T). |x|² is the same for every row and left out of the distance."""
        rows = self.codebook.embed
        return (rows.square().sum(1) - 2 * self.project_in(x) @ rows.T).argmin(-1)

    def decode(self, codes):
        return self.project_out(F.embedding(codes, self.codebook.embed))


class ResidualQuantizer(nn.Module):
    """Each stage codes what the ones before it left over (arXiv 2107.03312)."""

    def __init__(self, stages, width, bins, size):
        super().__init__()
        self.quantizers = nn.ModuleList([Quantizer(width, bins, size) for _ in range(stages)])

    def encode(self, x):
        """(B, T, C) -> (B, K, T)"""
        codes = []
        for stage in self.quantizers:
            codes.append(stage.encode(x))
            x = x - stage.decode(codes[-1])
        return torch.stack(codes, 1)

    def decode(self, codes):
        """(B, K, T) -> (B, T, C)"""
        return sum(stage.decode(codes[:, k]) for k, stage in enumerate(self.quantizers))


# ------------------------------------------------------------------------------------------------ the codec


class HiggsCodec(nn.Module):
    """wav (n,) <-> codes (K, T) int64, T = floor(n / 960) + (1 if n mod 960 >= 119) with the published strides."""

    def __init__(self, acoustic, decoder, hubert, semantic, quantizer,
                 sample_rate, semantic_sample_rate, semantic_hop):
        super().__init__()
        self.acoustic_encoder = Encoder(**acoustic)
        self.acoustic_decoder = Decoder(**decoder)
        self.semantic_model = Hubert(**hubert)
        self.encoder_semantic = SemanticEncoder(**semantic)
        self.quantizer = ResidualQuantizer(**quantizer)
        self.fc = nn.Linear(acoustic["latent"] + semantic["widths"][-1], quantizer["width"])
        self.fc2 = nn.Linear(quantizer["width"], decoder["latent"])
        self.sample_rate, self.semantic_sample_rate = sample_rate, semantic_sample_rate
        self.hop = math.prod(acoustic["strides"])
        ratio = self.hop * semantic_sample_rate // (sample_rate * semantic_hop)  # HuBERT frames per code frame: 2
        self.step = max(1, ratio)  # at a hop so short that ratio is 0, every HuBERT frame is kept, as in the original
        self.repair = SEMANTIC_PAD * ratio  # zeros at both ends of the waveform where the branches disagree by a frame: 320
        self.codebooks, self.bins = quantizer["stages"], quantizer["bins"]
        self.context = self.acoustic_decoder.context()

    @property
    def device(self):
        return self.fc.weight.device

    def _heard(self, n):
        """Samples that n samples become at HuBERT's rate."""
        return -(-n * self.semantic_sample_rate // self.sample_rate)

    def _plan(self, n):
        """Frames of an n-sample clip, and the zeros that its waveform needs at both ends, known before anything runs.

        For some n the DAC encoder gives a frame less than the semantic branch. The published code notices afterwards
        and runs the encoder once more on a padded waveform. (transformers pads by half a hop, 480, which gives other
        codes; the language model was trained with 320.) If one branch is still longer, it is cut.
        """
        semantic = -(-self.semantic_model.lengths(self._heard(n) + 2 * SEMANTIC_PAD) // self.step)
        pad = 0 if self.acoustic_encoder.lengths(n)[-1] == semantic else self.repair
        return min(self.acoustic_encoder.lengths(n + 2 * pad)[-1], semantic), pad

    def features(self, wavs):
        """What the quantiser quantises, for a list of (n,) clips. -> (B, T, C), frames of each row

        Rows of unequal length share a batch: statistics, convolutions and attention see only their own row's sound.
        """
        sizes = [len(w) for w in wavs]
        frames, pads = zip(*map(self._plan, sizes))
        shifted_sizes = [n + 2 * pad for n, pad in zip(sizes, pads)]
        x = torch.zeros(len(wavs), max(sizes), device=self.device)
        shifted = torch.zeros(len(wavs), 1, 1, max(shifted_sizes), device=self.device)
        for i, (w, n, pad) in enumerate(zip(wavs, sizes, pads)):
            x[i, :n] = w
            shifted[i, 0, 0, pad : pad + n] = x[i, :n]

        heard = audio.resample(x, self.sample_rate, self.semantic_sample_rate)
        heard_sizes = [self._heard(n) for n in sizes]
        mask = valid_mask(heard_sizes, heard.shape[1], self.device)
        heard = heard if mask is None else heard * mask[:, 0, 0]  # the filter rings on beyond the end of a row
        heard = F.pad(heard, (SEMANTIC_PAD, SEMANTIC_PAD))
        with exact(self.device):
            semantic, semantic_frames = self.semantic_model(heard, [n + 2 * SEMANTIC_PAD for n in heard_sizes], self.step)
            mask = valid_mask(semantic_frames, semantic.shape[1], self.device)
            semantic = self.encoder_semantic(semantic.transpose(1, 2)[:, :, None], mask)  # (B, C, 1, T)
            acoustic, T = self.acoustic_encoder(shifted, shifted_sizes), max(frames)
        both = torch.cat([acoustic[..., :T], semantic[..., :T]], 1)[:, :, 0].transpose(1, 2)
        return self.fc(both), frames

    @torch.no_grad()
    def encode_batch(self, wavs):
        """Codes of several clips in one pass, each as if it were alone. [(n,), ...] -> [(K, T), ...] int64"""
        wavs = [torch.as_tensor(w, dtype=torch.float32, device=self.device) for w in wavs]
        for w in wavs:
            if w.ndim != 1 or self._plan(len(w))[0] < 1:
                raise Invalid(f"the codec takes mono audio (n,) of at least {self._shortest()} samples at "
                              f"{self.sample_rate} Hz, got {list(w.shape)}")
        x, frames = self.features(wavs)
        return [codes[:, :t] for codes, t in zip(self.quantizer.encode(x), frames)]

    def encode(self, wav):
        """(n,) samples at sample_rate -> (K, T) int64. No loudness normalisation. Invalid if less than a frame."""
        return self.encode_batch([wav])[0]

    def _shortest(self):
        return next(n for n in range(1, 100 * self.hop) if self._plan(n)[0] >= 1)

    @torch.no_grad()
    def _decode(self, codes, first, last):
        """The sound of frames first...last-1 of codes (K, T), from those frames and all that they depend on."""
        start, end = max(0, first - self.context[0]), min(codes.shape[1], last + self.context[1])
        x = self.fc2(self.quantizer.decode(codes[None, :, start:end]))
        with exact(self.device):
            wav = self.acoustic_decoder(x.transpose(1, 2)[:, :, None])[0, 0, 0]
        return wav[(first - start) * self.hop : (last - start) * self.hop]

    def _checked(self, codes):
        codes = torch.as_tensor(codes, device=self.device)
        if codes.ndim != 2 or len(codes) != self.codebooks or codes.dtype.is_floating_point:
            raise Invalid(f"codes must be integers ({self.codebooks}, T), got {codes.dtype} {list(codes.shape)}")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.bins:
            raise Invalid(f"codes must lie in 0 ... {self.bins - 1}, got {int(codes.min())} ... {int(codes.max())}. "
                          "Take off the delay and the stream's begin and end marks first.")
        return codes.long()

    def decode(self, codes):
        """(K, T) int64 -> (hop * T,) float32, in windows that overlap by all that a frame depends on."""
        codes = self._checked(codes)
        T = codes.shape[1]
        parts = [self._decode(codes, i, min(i + WINDOW, T)) for i in range(0, T, WINDOW)]
        return torch.cat(parts) if parts else torch.zeros(0, device=self.device)

    def stream(self):
        return Stream(self)


class Stream:
    """Decodes as codes arrive: decode(chunk) (K, t) -> the samples that are final by now, flush() -> the rest.

    A frame is final when `codec.context[1]` (10) later frames are known, so the sound lags by that much. Each call
    decodes its new frames and the context again: chunks of ten frames or more waste less than half.
    """

    def __init__(self, codec):
        self.codec, self.codes, self.done = codec, None, 0

    def decode(self, chunk):
        chunk = self.codec._checked(chunk)
        self.codes = chunk if self.codes is None else torch.cat([self.codes, chunk], 1)
        return self._until(self.codes.shape[1] - self.codec.context[1])

    def flush(self):
        return self._until(0 if self.codes is None else self.codes.shape[1])

    def _until(self, last):
        first, self.done = self.done, max(self.done, last)
        if first == self.done:
            return torch.zeros(0, device=self.codec.device)
        return self.codec._decode(self.codes, first, self.done)


# ------------------------------------------------------------------------------------------------ loading


UNIT = ("snake1", "conv1", "snake2", "conv2")
ORIGINAL = [  # patterns over the original naming, in order -> the name here
    (r"encoder\.block\.0\.(.*)", lambda m: f"acoustic_encoder.conv1.{m[1]}"),
    (r"encoder\.block\.(\d+)\.block\.([012])\.block\.(\d)\.(.*)",
     lambda m: f"acoustic_encoder.block.{int(m[1]) - 1}.res_unit{int(m[2]) + 1}.{UNIT[int(m[3])]}.{m[4]}"),
    (r"encoder\.block\.(\d+)\.block\.3\.(.*)", lambda m: f"acoustic_encoder.block.{int(m[1]) - 1}.snake1.{m[2]}"),
    (r"encoder\.block\.(\d+)\.block\.4\.(.*)", lambda m: f"acoustic_encoder.block.{int(m[1]) - 1}.conv1.{m[2]}"),
    (r"encoder\.block\.\d+\.alpha", lambda m: "acoustic_encoder.snake1.alpha"),
    (r"encoder\.block\.\d+\.(weight.*|bias)", lambda m: f"acoustic_encoder.conv2.{m[1]}"),
    (r"decoder_2\.model\.0\.(.*)", lambda m: f"acoustic_decoder.conv1.{m[1]}"),
    (r"decoder_2\.model\.(\d+)\.block\.([234])\.block\.(\d)\.(.*)",
     lambda m: f"acoustic_decoder.block.{int(m[1]) - 1}.res_unit{int(m[2]) - 1}.{UNIT[int(m[3])]}.{m[4]}"),
    (r"decoder_2\.model\.(\d+)\.block\.0\.(.*)", lambda m: f"acoustic_decoder.block.{int(m[1]) - 1}.snake1.{m[2]}"),
    (r"decoder_2\.model\.(\d+)\.block\.1\.(.*)", lambda m: f"acoustic_decoder.block.{int(m[1]) - 1}.conv_t1.{m[2]}"),
    (r"decoder_2\.model\.\d+\.alpha", lambda m: "acoustic_decoder.snake1.alpha"),
    (r"decoder_2\.model\.\d+\.(weight.*|bias)", lambda m: f"acoustic_decoder.conv2.{m[1]}"),
    (r"quantizer\.vq\.layers\.(\d+)\._codebook\.(.*)", lambda m: f"quantizer.quantizers.{m[1]}.codebook.{m[2]}"),
    (r"quantizer\.vq\.layers\.(\d+)\.(.*)", lambda m: f"quantizer.quantizers.{m[1]}.{m[2]}"),
    (r"fc_prior\.(.*)", lambda m: f"fc.{m[1]}"),
    (r"fc_post([12])\.(.*)", lambda m: f"fc{m[1]}.{m[2]}"),
    (r"((?:en|de)coder_semantic\..*conv[12]?)\.conv\.(.*)", lambda m: f"{m[1]}.{m[2]}"),
]


def rename(name):
    """Name of a tensor of either layout in this module; that of the transformers layout is its own."""
    for pattern, to in ORIGINAL:
        if m := re.fullmatch(pattern, name):
            return to(m)
    return name


HUBERT = dict(hidden_act="gelu", feat_extract_activation="gelu", feat_extract_norm="group", do_stable_layer_norm=False,
              conv_pos_batch_norm=False)


def build(stored, config, what):
    """A codec on the meta device whose widths are those of the stored tensors.

    What shapes cannot tell comes from config.json of either layout, or is HuBERT base's: 12 heads, the extractor's
    strides, eps 1e-5. Invalid where a tensor is missing or config.json contradicts the shapes.
    """
    shapes = {rename(name): tensor.shape for name, tensor in stored.items()}

    def shape(name):
        if name not in shapes:
            raise Invalid(f"{what}: no tensor {name}. Is this the audio tokenizer (model.pth or model.safetensors of "
                          f"bosonai/higgs-audio-v2-tokenizer)? Its names begin with {', '.join(sorted(shapes)[:3])}.")
        return shapes[name]

    def number(key, usual):
        return need(config, key, int, usual, at_least=1, at_most=LARGEST)

    def numbered(name):
        """The shapes of name with {} = 0, 1, 2, ... as far as they go."""
        return [shape(name.format(i)) for i in range(len(shapes)) if name.format(i) in shapes]

    down = numbered("acoustic_encoder.block.{}.conv1.weight")  # (out, in, 2 * stride)
    up = numbered("acoustic_decoder.block.{}.conv_t1.weight")  # (in, out, 2 * stride)
    acoustic = dict(widths=[shape("acoustic_encoder.conv1.weight")[0], *(s[0] for s in down)],
                    strides=[s[2] // 2 for s in down], latent=shape("acoustic_encoder.conv2.weight")[0])
    dac_decoder = dict(latent=shape("acoustic_decoder.conv1.weight")[1], strides=[s[2] // 2 for s in up],
                       widths=[shape("acoustic_decoder.conv1.weight")[0], *(s[1] for s in up)])
    config = as_record(config, f"{what}, its config.json")
    said = need(config, "acoustic_model_config", dict, {})
    for section, name, strides in ((config, "ratios", acoustic["strides"]), (said, "downsampling_ratios", acoustic["strides"]),
                                   (said, "upsampling_ratios", dac_decoder["strides"])):
        ratios = need(section, name, list[int], strides)
        if ratios != strides:
            raise Invalid(f"{what}: config.json says {name} {shown(ratios)}, the kernels are those of {strides}. "
                          "They belong to two different checkpoints.")

    told = need(config, "semantic_model_config", dict, {})
    fixed(told, HUBERT)
    kernels = numbered("semantic_model.feature_extractor.conv_layers.{}.conv.weight")  # (out, in, kernel)
    strides = need(told, "conv_stride", list[int], STRIDES)
    heads = need(told, "num_attention_heads", int, 12, at_least=1)
    width, group, pos_kernel = shape("semantic_model.encoder.pos_conv_embed.conv.weight")
    if width % heads or len(strides) != len(kernels) or min(strides) < 1:
        raise Invalid(f"{what}: HuBERT is {width} wide with {len(kernels)} convolutions, but {heads} heads and the strides "
                      f"{strides} are assumed. State num_attention_heads and conv_stride in config.json, under "
                      "semantic_model_config.")
    hubert = dict(feature_widths=[s[0] for s in kernels], kernels=[s[2] for s in kernels], strides=strides,
                  width=width, inner=shape("semantic_model.encoder.layers.0.feed_forward.intermediate_dense.weight")[0],
                  layers=len(numbered("semantic_model.encoder.layers.{}.layer_norm.weight")), heads=heads,
                  pos_kernel=pos_kernel, pos_groups=width // group, eps=need(told, "layer_norm_eps", float, 1e-5, at_least=0))

    if set(need(config, "strides", list[int], [1])) != {1}:
        raise Invalid(f"{what}: strides {shown(config['strides'])} of the semantic encoder; only 1 was ever published")
    units = numbered("encoder_semantic.conv_blocks.0.res_units.{}.conv1.weight")
    dilations = need(config, "block_dilations", list[int], [1] * len(units))
    if len(dilations) != len(units) or not all(1 <= dilation <= LAYERS for dilation in dilations):
        raise Invalid(f"{what}: config.json says block_dilations {shown(dilations)}, expected {len(units)} numbers of at least 1")
    semantic = dict(widths=[width, *(s[0] for s in numbered("encoder_semantic.conv_blocks.{}.conv.weight"))],
                    kernel=shape("encoder_semantic.conv.weight")[2],
                    unit_kernel=shape("encoder_semantic.conv_blocks.0.res_units.0.conv1.weight")[2],
                    dilations=dilations)
    bins, size = shape("quantizer.quantizers.0.codebook.embed")
    quantizer = dict(stages=len(numbered("quantizer.quantizers.{}.codebook.embed")), width=shape("fc.weight")[0],
                     bins=bins, size=size)
    with torch.device("meta"):
        return HiggsCodec(acoustic, dac_decoder, hubert, semantic, quantizer, number("sample_rate", 24000),
                          number("semantic_sample_rate", 16000), number("downsample_factor", 320))


def load(path, device="cpu", weights=None, allow_unused=False):
    """The codec from its folder or its weight file, in either published naming; config.json is looked for beside it.

    weights: which file of the folder, where model.safetensors and model.pth lie side by side.
    """
    path = Path(path)
    if path.is_dir():
        names = [weights] if weights else ["model.safetensors", "model.pth"]
        found = [name for name in names if (path / name).is_file()]
        if not found:
            raise Invalid(f"{path} does not hold {' or '.join(names)}. Expected bosonai/higgs-audio-v2-tokenizer.")
        if len(found) > 1:
            raise Invalid(f"{path} holds both {' and '.join(names)}; say which with weights=")
        path = path / found[0]
    config = checkpoint.read_object(path.parent / "config.json") if (path.parent / "config.json").is_file() else {}
    stored = checkpoint.fold_weight_norm(checkpoint.read(path))
    codec = build(stored, config, str(path))
    checkpoint.fill(codec, stored, rename, UNUSED, device=device, allow_unused=allow_unused, what=str(path))
    for module in codec.modules():
        if isinstance(module, (Conv, Upsample)):
            module.weight.data = lay_out(module.weight[:, :, None].detach())[:, :, 0]  # once, not at every call
    return codec.requires_grad_(False).eval()


# HuBERT base: kernels and strides of its feature extractor, and of its positional convolution the kernel and the groups.
KERNELS, STRIDES, POSITIONAL = [10, 3, 3, 3, 3, 2, 2], [5, 2, 2, 2, 2, 2, 2], (128, 16)
RATIOS = [8, 5, 4, 2, 3]  # strides of DAC's blocks, in this order on both sides


def blank(filters, width, layers):
    """A codec of the published structure with drawn weights, for measuring. filters: of DAC's first convolution; width, layers: of HuBERT.

    64, 768 and 12 are the published sizes.
    """
    channels = [filters * 2**i for i in range(len(RATIOS) + 1)]
    latent, wide = 4 * filters, 16 * filters
    hubert = dict(feature_widths=[2 * width // 3] * len(KERNELS), kernels=KERNELS, strides=STRIDES, width=width, inner=4 * width, layers=layers,
                  heads=max(1, width // 64), pos_kernel=POSITIONAL[0], pos_groups=POSITIONAL[1], eps=1e-5)
    codec = HiggsCodec(dict(widths=channels, strides=RATIOS, latent=latent),
                       dict(latent=latent, widths=[wide // 2**i for i in range(len(RATIOS) + 1)], strides=RATIOS),
                       hubert, dict(widths=[width] * 3, kernel=3, unit_kernel=3, dilations=[1, 1]),
                       dict(stages=8, width=latent + width, bins=1024, size=latent // 4), 24000, 16000, 320)
    for name, p in codec.named_parameters():
        if name.endswith("embed"):
            nn.init.normal_(p)
    return codec.requires_grad_(False).eval()
