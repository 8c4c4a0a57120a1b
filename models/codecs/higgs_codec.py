"""The audio tokenizer of Higgs Audio v2: 24 kHz audio to 25 frames per second of 8 codes, and back.

    wav (n,) ──DAC encoder, strides 8 5 4 2 3────────────────────▶ (256, T) ┐
         └─16 kHz─▶ HuBERT, mean of 13 states, every 2nd─▶ convs─▶ (768, T) ┴─fc─▶ 8 codebooks ─▶ codes (8, T)
    codes (8, T) ─▶ sum of the codebook rows ─fc2─▶ (256, T) ──DAC decoder──▶ wav (960 T,)

DAC is arXiv 2306.06546, HuBERT arXiv 2106.07447; the two together are those of X-Codec (arXiv 2408.17175).
Checkpoint: bosonai/higgs-audio-v2-tokenizer, either as model.pth in its original naming or as transformers
writes it. Attributes bear the names of the transformers layout; ORIGINAL renames the other one. Always
float32: a code is the nearest of 1024 rows, eight times in a row, and rounding to bfloat16 would pick others.

Letters: B batch, n samples, T frames of 25 Hz, F frames of 50 Hz, C channels, K codebooks. Convolutions work
on (B, C, 1, n).
"""
import math
import re
from pathlib import Path
from typing import NamedTuple

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
    r"quantizer\..*\.(cluster_size|embed_avg|inited)":
        "running averages by which training moves the codebooks",
}
SEMANTIC_PAD = 160  # zeros at both ends of what HuBERT hears
WINDOW = 500  # frames (20 s) that are decoded at once; bounds memory, not the result
PIECE = 48000  # samples at once in the layers of full rate, so that they stay in the processor's cache

# ---------------------------------------------------------------------------------------- sizes


class DacSize(NamedTuple):
    """Of DAC's encoder or decoder. The comments here and below are the published encoder's values."""

    widths: list  # 64, 128, ... 2048: channels before, between and after the blocks
    strides: list  # 8, 5, 4, 2, 3, of the blocks
    latent: int  # 256


class HubertSize(NamedTuple):
    feature_widths: list  # seven times 512, of the convolutions in front
    kernels: list  # 10, 3, 3, 3, 3, 2, 2
    strides: list  # 5, 2, 2, 2, 2, 2, 2
    width: int  # 768
    inner: int  # 3072
    layers: int  # 12
    heads: int  # 12
    pos_kernel: int  # 128
    pos_groups: int  # 16
    eps: float  # 1e-5


class SemanticSize(NamedTuple):
    widths: list  # 768, 768, 768: before, between and after the blocks
    kernel: int  # 3
    unit_kernel: int  # 3
    dilations: list  # 1, 1, of the units in a block


class QuantizerSize(NamedTuple):
    stages: int  # 8
    width: int  # 1024, of what is quantised
    bins: int  # 1024
    size: int  # 64, of a row of a codebook


class Config(NamedTuple):
    """Sizes, most of them read off the stored tensors, and three numbers of the published config.json."""

    encoder: DacSize
    decoder: DacSize
    hubert: HubertSize
    semantic: SemanticSize
    quantizer: QuantizerSize
    sample_rate: int  # 24000
    semantic_sample_rate: int  # 16000
    downsample_factor: int  # 320, samples from one HuBERT frame to the next


# ---------------------------------------------------------------------------------------- convolutions


def out_length(n, conv):
    """How many samples a convolution gives for n; a Conv1d of any stride, padding and dilation."""
    span = conv.dilation[0] * (conv.kernel_size[0] - 1)
    return (n + 2 * conv.padding[0] - span - 1) // conv.stride[0] + 1


def valid_mask(lengths, size, device):
    """1 where a row of the batch still has sound, (B, 1, 1, size); None where all rows are full."""
    if all(n == size for n in lengths):
        return None
    ends = torch.tensor(lengths, device=device)[:, None]
    mask = torch.arange(size, device=device) < ends
    return mask.float()[:, None, None]


def lay_out(x):
    """Channels-last on the CPU: a 1x1 convolution is then a matrix product, seven times faster at 24 kHz."""
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x


class Pieces(NamedTuple):
    """How `in_pieces` cuts what goes through a function. size and reach are multiples of `down`."""

    size: int  # columns in a piece
    reach: int  # how many columns further the function looks to either side
    down: int = 1  # the function gives `up` columns for each `down` columns
    up: int = 1


def in_pieces(f, x, mask, pieces):
    """f(x, mask) along a long last axis, piece by piece and yet exact."""
    n = x.shape[-1]
    kept = pieces.size // pieces.down * pieces.up
    parts = []
    for first in range(0, n, pieces.size):
        start = max(0, first - pieces.reach)
        end = min(n, first + pieces.size + pieces.reach)
        part = f(x[..., start:end], None if mask is None else mask[..., start:end])
        skip = (first - start) // pieces.down * pieces.up
        parts.append(part[..., skip : skip + kept])
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


class Conv(nn.Conv1d):
    """A convolution computed as one of a flat picture, since only pictures can lie channels-last in memory.

    mask: zeroes the input beyond the end of each row, where a clip that is encoded alone sees zero padding.
    """

    def forward(self, x, mask=None):
        x = x if mask is None else x * mask
        weight = self.weight[:, :, None]
        stride, padding, dilation = self.stride[0], self.padding[0], self.dilation[0]
        return F.conv2d(x, weight, self.bias, (1, stride), (0, padding), (1, dilation), self.groups)


# ---------------------------------------------------------------------------------------- DAC


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
        y = self.conv1(self.snake1(x), mask)
        y = self.snake2(y)
        return self.conv2(y).add_(x)


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
    """DAC's encoder. (B, 1, 1, n) -> (B, latent, 1, T)"""

    def __init__(self, size):
        super().__init__()
        first, last = size.widths[0], size.widths[-1]
        blocks = zip(size.widths, size.widths[1:], size.strides)
        self.conv1 = Conv(1, first, 7, padding=3)
        self.block = nn.ModuleList(EncoderBlock(*block) for block in blocks)
        self.snake1 = Snake(last)
        self.conv2 = Conv(last, size.latent, 3, padding=1)

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

        pieces = Pieces(PIECE // stride * stride, reach, down=stride)
        x = in_pieces(head, x, mask, pieces)
        for block, size in zip(self.block[1:], sizes[1:]):
            x = block(x, valid_mask(size, x.shape[-1], x.device))
        mask = valid_mask(sizes[-1], x.shape[-1], x.device)
        return self.conv2(self.snake1(x), mask)


class Upsample(nn.ConvTranspose1d):
    """Transposed convolution, exactly n -> n * stride: an odd stride needs one sample of output padding."""

    def __init__(self, channels, out_channels, stride):
        padding = math.ceil(stride / 2)
        super().__init__(channels, out_channels, 2 * stride, stride, padding, output_padding=stride % 2)

    def forward(self, x):
        weight = self.weight[:, :, None]
        stride, padding, extra = self.stride[0], self.padding[0], self.output_padding[0]
        return F.conv_transpose2d(x, weight, self.bias, (1, stride), (0, padding), (0, extra))


class DecoderBlock(nn.Module):
    def __init__(self, channels, out_channels, stride):
        super().__init__()
        self.snake1 = Snake(channels)
        self.conv_t1 = Upsample(channels, out_channels, stride)
        self.res_unit1 = ResidualUnit(out_channels, 1)
        self.res_unit2 = ResidualUnit(out_channels, 3)
        self.res_unit3 = ResidualUnit(out_channels, 9)

    def forward(self, x):
        x = self.conv_t1(self.snake1(x))
        for unit in (self.res_unit1, self.res_unit2, self.res_unit3):
            x = unit(x)
        return x


class Decoder(nn.Module):
    """DAC's decoder without the tanh at its end: nothing is clipped. (B, latent, 1, T) -> (B, 1, 1, n)"""

    def __init__(self, size):
        super().__init__()
        first, last = size.widths[0], size.widths[-1]
        blocks = zip(size.widths, size.widths[1:], size.strides)
        self.conv1 = Conv(size.latent, first, 7, padding=3)
        self.block = nn.ModuleList(DecoderBlock(*block) for block in blocks)
        self.snake1 = Snake(last)
        self.conv2 = Conv(last, 1, 7, padding=3)

    def forward(self, x):
        x = lay_out(self.conv1(x))
        for block in self.block[:-1]:
            x = block(x)
        stride = self.block[-1].conv_t1.stride[0]
        reach = math.ceil((3 + REACH) / stride) + 2

        def tail(x, _):
            return self.conv2(self.snake1(self.block[-1](x)))

        pieces = Pieces(math.ceil(PIECE / stride), reach, up=stride)
        return in_pieces(tail, x, None, pieces)

    def context(self):
        """How many frames before and after itself a frame of sound depends on, found by walking backwards."""
        samples = math.prod(block.conv_t1.stride[0] for block in self.block)
        first, last = 0, samples - 1  # the samples of frame 0
        first, last = first - 3, last + 3  # what conv2 sees for them
        for block in reversed(self.block):
            stride, padding = block.conv_t1.stride[0], block.conv_t1.padding[0]
            # Input i reaches the outputs i·stride - padding ... i·stride - padding + 2·stride - 1.
            first = first - REACH + padding - 2 * stride + 1
            first = -(-first // stride)
            last = (last + REACH + padding) // stride
        return 3 - first, last + 3


# ---------------------------------------------------------------------------------------- HuBERT


class FeatureLayer(nn.Module):
    """Convolution and GELU; the first layer has a norm of each channel over time between them."""

    def __init__(self, channels, out_channels, kernel, stride, norm):
        super().__init__()
        self.conv = nn.Conv1d(channels, out_channels, kernel, stride, bias=False)
        if norm:
            self.layer_norm = nn.GroupNorm(out_channels, out_channels)  # a channel is a group
        self.norm = norm

    def forward(self, x, lengths):
        x = self.conv(x)  # (B, C, n)
        full = all(n == x.shape[-1] for n in lengths)
        if self.norm and full:
            x = self.layer_norm(x)
        elif self.norm:  # the statistics must not see what lies behind the end of a row
            for i, n in enumerate(lengths):
                row = x[i : i + 1, :, :n]
                x[i, :, :n] = self.layer_norm(row)[0]
        return F.gelu(x)


class FeatureExtractor(nn.Module):
    """No layer pads, so that a valid output comes from valid input only. (B, n) -> (B, C, F)"""

    def __init__(self, widths, kernels, strides):
        super().__init__()
        sizes = zip([1, *widths], widths, kernels, strides)
        layers = [FeatureLayer(*size, norm=i == 0) for i, size in enumerate(sizes)]
        self.conv_layers = nn.ModuleList(layers)

    def forward(self, x, lengths):
        x = x[:, None]
        for layer in self.conv_layers:
            lengths = [out_length(n, layer.conv) for n in lengths]
            x = layer(x, lengths)
        return x, lengths


class PositionalConv(nn.Module):
    """Tells HuBERT where it is by a wide grouped convolution. (B, F, C) -> (B, F, C)"""

    def __init__(self, width, kernel, groups):
        super().__init__()
        self.conv = Conv(width, width, kernel, padding=kernel // 2, groups=groups)

    def forward(self, x, mask):
        x = x.transpose(1, 2)[:, :, None]  # (B, C, 1, F)
        y = self.conv(x, mask)[..., : x.shape[-1]]  # an even kernel gives a frame too many, the last
        y = F.gelu(y)
        return y[:, :, 0].transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, F, D)

    def forward(self, x, mask):
        q = self.split(self.q_proj(x))
        k = self.split(self.k_proj(x))
        v = self.split(self.v_proj(x))
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
    def __init__(self, size):
        super().__init__()
        self.pos_conv_embed = PositionalConv(size.width, size.pos_kernel, size.pos_groups)
        self.layer_norm = nn.LayerNorm(size.width, size.eps)
        layers = [Layer(size.width, size.inner, size.heads, size.eps) for _ in range(size.layers)]
        self.layers = nn.ModuleList(layers)


class Hubert(nn.Module):
    """HuBERT base. (B, n) at 16 kHz -> (B, ceil(F / step), C), the mean of all hidden states.

    The hidden states are the input of the first layer and the output of each: 13 of them for 12 layers. Every
    `step`-th frame is kept. Nothing normalises the waveform. lengths: samples of each row; returns frames of
    each row, after the step.
    """

    def __init__(self, size):
        super().__init__()
        features = size.feature_widths
        self.feature_extractor = FeatureExtractor(features, size.kernels, size.strides)
        self.feature_projection = FeatureProjection(features[-1], size.width, size.eps)
        self.encoder = Transformer(size)

    def lengths(self, n):
        for layer in self.feature_extractor.conv_layers:
            n = out_length(n, layer.conv)
        return n

    def forward(self, x, lengths, step=1):
        x, lengths = self.feature_extractor(x, lengths)
        x = self.feature_projection(x.transpose(1, 2))  # (B, F, C)
        mask = valid_mask(lengths, x.shape[1], x.device)
        x = x + self.encoder.pos_conv_embed(x, mask)
        x = self.encoder.layer_norm(x)
        keys = None if mask is None else mask.bool()
        total = x[:, ::step].clone()
        for layer in self.encoder.layers:
            x = layer(x, keys)
            total += x[:, ::step]
        mean = total / (len(self.encoder.layers) + 1)
        return mean, [-(-n // step) for n in lengths]


# ---------------------------------------------------------------------------------------- semantic branch


class SemanticUnit(nn.Module):
    def __init__(self, width, kernel, dilation):
        super().__init__()
        padding = (kernel - 1) // 2 * dilation
        self.conv1 = Conv(width, width, kernel, padding=padding, dilation=dilation, bias=False)
        self.conv2 = Conv(width, width, 1, bias=False)

    def forward(self, x, mask):
        y = self.conv1(F.elu(x), mask)
        return self.conv2(F.elu(y)) + x


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

    def __init__(self, size):
        super().__init__()
        first = size.widths[0]
        self.conv = Conv(first, first, size.kernel, padding=size.kernel // 2, bias=False)
        pairs = zip(size.widths, size.widths[1:])
        blocks = [SemanticBlock(*pair, size.unit_kernel, size.dilations) for pair in pairs]
        self.conv_blocks = nn.ModuleList(blocks)

    def forward(self, x, mask):
        x = self.conv(x, mask)
        for block in self.conv_blocks:
            x = block(x, mask)
        return x


# ---------------------------------------------------------------------------------------- quantiser


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
        products = 2 * self.project_in(x) @ rows.T
        distances = rows.square().sum(1) - products
        return distances.argmin(-1)

    def decode(self, codes):
        return self.project_out(F.embedding(codes, self.codebook.embed))


class ResidualQuantizer(nn.Module):
    """Each stage codes what the ones before it left over (arXiv 2107.03312)."""

    def __init__(self, stages, width, bins, size):
        super().__init__()
        self.quantizers = nn.ModuleList(Quantizer(width, bins, size) for _ in range(stages))

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


# ---------------------------------------------------------------------------------------- the codec


class HiggsCodec(nn.Module):
    """wav (n,) <-> codes (K, T) int64, T = floor(n / 960) + (1 if n mod 960 >= 119) as published."""

    def __init__(self, config):
        super().__init__()
        c = config
        self.acoustic_encoder = Encoder(c.encoder)
        self.acoustic_decoder = Decoder(c.decoder)
        self.semantic_model = Hubert(c.hubert)
        self.encoder_semantic = SemanticEncoder(c.semantic)
        self.quantizer = ResidualQuantizer(*c.quantizer)
        both = c.encoder.latent + c.semantic.widths[-1]
        self.fc = nn.Linear(both, c.quantizer.width)
        self.fc2 = nn.Linear(c.quantizer.width, c.decoder.latent)
        self.sample_rate = c.sample_rate
        self.semantic_sample_rate = c.semantic_sample_rate
        self.hop = math.prod(c.encoder.strides)
        # HuBERT frames per code frame: 2. At a hop so short that it is 0, every HuBERT frame is kept, as in
        # the original.
        ratio = self.hop * c.semantic_sample_rate // (c.sample_rate * c.downsample_factor)
        self.step = max(1, ratio)
        # zeros at both ends of the waveform where the branches disagree by a frame: 320
        self.repair = SEMANTIC_PAD * ratio
        self.codebooks = c.quantizer.stages
        self.bins = c.quantizer.bins
        self.context = self.acoustic_decoder.context()

    @property
    def device(self):
        return self.fc.weight.device

    def _heard(self, n):
        """Samples that n samples become at HuBERT's rate."""
        return -(-n * self.semantic_sample_rate // self.sample_rate)

    def _plan(self, n):
        """Frames of an n-sample clip, and how many zeros its waveform needs at both ends.

        Known before anything runs. For some n the DAC encoder gives a frame less than the semantic branch.
        The published code notices afterwards and runs the encoder once more on a padded waveform.
        (transformers pads by half a hop, 480, which gives other codes; the language model was trained with
        320.) If one branch is still longer, it is cut.
        """
        states = self.semantic_model.lengths(self._heard(n) + 2 * SEMANTIC_PAD)
        semantic = -(-states // self.step)
        agree = self.acoustic_encoder.lengths(n)[-1] == semantic
        pad = 0 if agree else self.repair
        acoustic = self.acoustic_encoder.lengths(n + 2 * pad)[-1]
        return min(acoustic, semantic), pad

    def features(self, wavs):
        """What the quantiser quantises, for a list of (n,) clips. -> (B, T, C), frames of each row

        Rows of unequal length share a batch: statistics, convolutions and attention see only their own row's
        sound.
        """
        sizes = [len(w) for w in wavs]
        frames, pads = zip(*map(self._plan, sizes))
        x = torch.zeros(len(wavs), max(sizes), device=self.device)
        for i, (w, n) in enumerate(zip(wavs, sizes)):
            x[i, :n] = w
        semantic = self._semantic(x, sizes)
        acoustic = self._acoustic(x, sizes, pads)
        T = max(frames)
        both = torch.cat([acoustic[..., :T], semantic[..., :T]], 1)  # (B, C, 1, T)
        both = both[:, :, 0].transpose(1, 2)
        return self.fc(both), frames

    def _semantic(self, x, sizes):
        """The branch of HuBERT. Clips (B, n) and their sizes -> (B, C, 1, T)"""
        heard = audio.resample(x, self.sample_rate, self.semantic_sample_rate)
        sizes = [self._heard(n) for n in sizes]
        mask = valid_mask(sizes, heard.shape[1], self.device)
        if mask is not None:  # the filter rings on beyond the end of a row
            heard = heard * mask[:, 0, 0]
        heard = F.pad(heard, (SEMANTIC_PAD, SEMANTIC_PAD))
        sizes = [n + 2 * SEMANTIC_PAD for n in sizes]
        with exact(self.device):
            states, frames = self.semantic_model(heard, sizes, self.step)
            mask = valid_mask(frames, states.shape[1], self.device)
            return self.encoder_semantic(states.transpose(1, 2)[:, :, None], mask)

    def _acoustic(self, x, sizes, pads):
        """The branch of DAC. Clips (B, n), their sizes and the zeros at both ends of each -> (B, C, 1, T)"""
        padded_sizes = [n + 2 * pad for n, pad in zip(sizes, pads)]
        padded = torch.zeros(len(x), 1, 1, max(padded_sizes), device=self.device)
        for i, (n, pad) in enumerate(zip(sizes, pads)):
            padded[i, 0, 0, pad : pad + n] = x[i, :n]
        with exact(self.device):
            return self.acoustic_encoder(padded, padded_sizes)

    @torch.no_grad()
    def encode_batch(self, wavs):
        """Codes of several clips in one pass, each as if it were alone. [(n,), ...] -> [(K, T), ...] int64"""
        wavs = [torch.as_tensor(w, dtype=torch.float32, device=self.device) for w in wavs]
        for w in wavs:
            if w.ndim != 1 or self._plan(len(w))[0] < 1:
                raise Invalid(f"the codec takes mono audio (n,) of at least {self._shortest()} samples at "
                              f"{self.sample_rate} Hz, got {list(w.shape)}")
        x, frames = self.features(wavs)
        codes = self.quantizer.encode(x)
        return [row[:, :t] for row, t in zip(codes, frames)]

    def encode(self, wav):
        """(n,) samples at sample_rate -> (K, T) int64. No loudness is normalised. Invalid below one frame."""
        return self.encode_batch([wav])[0]

    def _shortest(self):
        return next(n for n in range(1, 100 * self.hop) if self._plan(n)[0] >= 1)

    @torch.no_grad()
    def _decode(self, codes, first, last):
        """The sound of frames first ... last - 1 of codes (K, T), from them and all that they depend on."""
        before, after = self.context
        start = max(0, first - before)
        end = min(codes.shape[1], last + after)
        x = self.fc2(self.quantizer.decode(codes[None, :, start:end]))
        with exact(self.device):
            wav = self.acoustic_decoder(x.transpose(1, 2)[:, :, None])[0, 0, 0]
        return wav[(first - start) * self.hop : (last - start) * self.hop]

    def _checked(self, codes):
        codes = torch.as_tensor(codes, device=self.device)
        if codes.ndim != 2 or len(codes) != self.codebooks or codes.dtype.is_floating_point:
            raise Invalid(f"codes must be integers ({self.codebooks}, T), "
                          f"got {codes.dtype} {list(codes.shape)}")
        if codes.numel():
            low, high = int(codes.min()), int(codes.max())
            if not 0 <= low <= high < self.bins:
                raise Invalid(f"codes must lie in 0 ... {self.bins - 1}, got {low} ... {high}. "
                              "Take off the delay and the stream's begin and end marks first.")
        return codes.long()

    def decode(self, codes):
        """(K, T) int64 -> (hop * T,) float32, in windows that overlap by all that a frame depends on."""
        codes = self._checked(codes)
        T = codes.shape[1]
        if not T:
            return torch.zeros(0, device=self.device)
        windows = [self._decode(codes, i, min(i + WINDOW, T)) for i in range(0, T, WINDOW)]
        return torch.cat(windows)

    def stream(self):
        return Stream(self)


class Stream:
    """Decodes as codes arrive: decode(chunk) (K, t) -> the samples that are final now, flush() -> the rest.

    A frame is final when `codec.context[1]` (10) later frames are known, so the sound lags by that much. Each
    call decodes its new frames and the context again: chunks of ten frames or more waste less than half.
    """

    def __init__(self, codec):
        self.codec = codec
        self.codes = None  # (K, T), all that came so far
        self.done = 0  # frames whose sound is out

    def decode(self, chunk):
        chunk = self.codec._checked(chunk)
        self.codes = chunk if self.codes is None else torch.cat([self.codes, chunk], 1)
        known, after = self.codes.shape[1], self.codec.context[1]
        return self._until(known - after)

    def flush(self):
        return self._until(0 if self.codes is None else self.codes.shape[1])

    def _until(self, last):
        first = self.done
        if last <= first:
            return torch.zeros(0, device=self.codec.device)
        self.done = last
        return self.codec._decode(self.codes, first, last)


# ---------------------------------------------------------------------------------------- loading


UNIT = ("snake1", "conv1", "snake2", "conv2")
ORIGINAL = [  # patterns over the original naming, in order -> the name here
    (r"encoder\.block\.0\.(.*)", lambda m: f"acoustic_encoder.conv1.{m[1]}"),
    (r"encoder\.block\.(\d+)\.block\.([012])\.block\.(\d)\.(.*)",
     lambda m: f"acoustic_encoder.block.{int(m[1]) - 1}.res_unit{int(m[2]) + 1}.{UNIT[int(m[3])]}.{m[4]}"),
    (r"encoder\.block\.(\d+)\.block\.3\.(.*)",
     lambda m: f"acoustic_encoder.block.{int(m[1]) - 1}.snake1.{m[2]}"),
    (r"encoder\.block\.(\d+)\.block\.4\.(.*)",
     lambda m: f"acoustic_encoder.block.{int(m[1]) - 1}.conv1.{m[2]}"),
    (r"encoder\.block\.\d+\.alpha", lambda m: "acoustic_encoder.snake1.alpha"),
    (r"encoder\.block\.\d+\.(weight.*|bias)", lambda m: f"acoustic_encoder.conv2.{m[1]}"),
    (r"decoder_2\.model\.0\.(.*)", lambda m: f"acoustic_decoder.conv1.{m[1]}"),
    (r"decoder_2\.model\.(\d+)\.block\.([234])\.block\.(\d)\.(.*)",
     lambda m: f"acoustic_decoder.block.{int(m[1]) - 1}.res_unit{int(m[2]) - 1}.{UNIT[int(m[3])]}.{m[4]}"),
    (r"decoder_2\.model\.(\d+)\.block\.0\.(.*)",
     lambda m: f"acoustic_decoder.block.{int(m[1]) - 1}.snake1.{m[2]}"),
    (r"decoder_2\.model\.(\d+)\.block\.1\.(.*)",
     lambda m: f"acoustic_decoder.block.{int(m[1]) - 1}.conv_t1.{m[2]}"),
    (r"decoder_2\.model\.\d+\.alpha", lambda m: "acoustic_decoder.snake1.alpha"),
    (r"decoder_2\.model\.\d+\.(weight.*|bias)", lambda m: f"acoustic_decoder.conv2.{m[1]}"),
    (r"quantizer\.vq\.layers\.(\d+)\._codebook\.(.*)",
     lambda m: f"quantizer.quantizers.{m[1]}.codebook.{m[2]}"),
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


# What the arithmetic above is; config.json may state these keys with no other value.
HUBERT = dict(
    hidden_act="gelu", feat_extract_activation="gelu", feat_extract_norm="group",
    do_stable_layer_norm=False, conv_pos_batch_norm=False)


class Shapes(NamedTuple):
    """{name here: shape} of the stored tensors, and what errors call their file."""

    named: dict
    what: str

    def of(self, name):
        if name not in self.named:
            begin = ", ".join(sorted(self.named)[:3])
            raise Invalid(f"{self.what}: no tensor {name}. Is this the audio tokenizer (model.pth or "
                          "model.safetensors of bosonai/higgs-audio-v2-tokenizer)? "
                          f"Its names begin with {begin}.")
        return self.named[name]

    def numbered(self, name):
        """The shapes of name with {} = 0, 1, 2, ... as far as they go."""
        names = [name.format(i) for i in range(len(self.named))]
        return [self.named[n] for n in names if n in self.named]


def build(stored, config, what):
    """A codec on the meta device whose widths are those of the stored tensors.

    What shapes cannot tell comes from config.json of either layout, or is HuBERT base's: 12 heads, the
    extractor's strides, eps 1e-5. Invalid where a tensor is missing or config.json contradicts the shapes.
    """
    shapes = Shapes({rename(name): tensor.shape for name, tensor in stored.items()}, what)
    encoder, decoder = encoder_size(shapes), decoder_size(shapes)
    config = as_record(config, f"{what}, its config.json")
    check_strides(config, encoder, decoder, what)
    hubert = hubert_size(shapes, need(config, "semantic_model_config", dict, {}))
    semantic = semantic_size(shapes, config, hubert.width)
    quantizer = quantizer_size(shapes)

    def number(key, usual):
        return need(config, key, int, usual, at_least=1, at_most=LARGEST)

    whole = Config(
        encoder, decoder, hubert, semantic, quantizer,
        sample_rate=number("sample_rate", 24000),
        semantic_sample_rate=number("semantic_sample_rate", 16000),
        downsample_factor=number("downsample_factor", 320))
    with torch.device("meta"):
        return HiggsCodec(whole)


def encoder_size(shapes):
    blocks = shapes.numbered("acoustic_encoder.block.{}.conv1.weight")  # (out, in, 2 * stride)
    first = shapes.of("acoustic_encoder.conv1.weight")
    return DacSize(
        widths=[first[0], *(shape[0] for shape in blocks)],
        strides=[shape[2] // 2 for shape in blocks],
        latent=shapes.of("acoustic_encoder.conv2.weight")[0])


def decoder_size(shapes):
    blocks = shapes.numbered("acoustic_decoder.block.{}.conv_t1.weight")  # (in, out, 2 * stride)
    first = shapes.of("acoustic_decoder.conv1.weight")
    return DacSize(
        widths=[first[0], *(shape[1] for shape in blocks)],
        strides=[shape[2] // 2 for shape in blocks],
        latent=first[1])


def check_strides(config, encoder, decoder, what):
    """Invalid where config.json, which may state them in three places, has other strides than the kernels."""
    dac = need(config, "acoustic_model_config", dict, {})
    places = (
        (config, "ratios", encoder.strides),
        (dac, "downsampling_ratios", encoder.strides),
        (dac, "upsampling_ratios", decoder.strides))
    for section, name, strides in places:
        ratios = need(section, name, list[int], strides)
        if ratios != strides:
            raise Invalid(f"{what}: config.json says {name} {shown(ratios)}, the kernels are those of "
                          f"{strides}. They belong to two different checkpoints.")


def hubert_size(shapes, told):
    """told: the section of config.json about HuBERT."""
    fixed(told, HUBERT)
    # (out, in, kernel) of each
    features = shapes.numbered("semantic_model.feature_extractor.conv_layers.{}.conv.weight")
    strides = need(told, "conv_stride", list[int], STRIDES)
    heads = need(told, "num_attention_heads", int, 12, at_least=1)
    width, group, pos_kernel = shapes.of("semantic_model.encoder.pos_conv_embed.conv.weight")
    if width % heads or len(strides) != len(features) or min(strides) < 1:
        raise Invalid(f"{shapes.what}: HuBERT is {width} wide with {len(features)} convolutions, but {heads} "
                      f"heads and the strides {strides} are assumed. State num_attention_heads and "
                      "conv_stride in config.json, under semantic_model_config.")
    first = "semantic_model.encoder.layers.0."
    return HubertSize(
        feature_widths=[shape[0] for shape in features],
        kernels=[shape[2] for shape in features],
        strides=strides,
        width=width,
        inner=shapes.of(first + "feed_forward.intermediate_dense.weight")[0],
        layers=len(shapes.numbered("semantic_model.encoder.layers.{}.layer_norm.weight")),
        heads=heads,
        pos_kernel=pos_kernel,
        pos_groups=width // group,
        eps=need(told, "layer_norm_eps", float, 1e-5, at_least=0))


def semantic_size(shapes, config, width):
    what = shapes.what
    if set(need(config, "strides", list[int], [1])) != {1}:
        stated = shown(config["strides"])
        raise Invalid(f"{what}: strides {stated} of the semantic encoder; only 1 was ever published")
    units = shapes.numbered("encoder_semantic.conv_blocks.0.res_units.{}.conv1.weight")
    dilations = need(config, "block_dilations", list[int], [1] * len(units))
    if len(dilations) != len(units) or not all(1 <= dilation <= LAYERS for dilation in dilations):
        raise Invalid(f"{what}: config.json says block_dilations {shown(dilations)}, "
                      f"expected {len(units)} numbers of at least 1")
    blocks = shapes.numbered("encoder_semantic.conv_blocks.{}.conv.weight")
    return SemanticSize(
        widths=[width, *(shape[0] for shape in blocks)],
        kernel=shapes.of("encoder_semantic.conv.weight")[2],
        unit_kernel=shapes.of("encoder_semantic.conv_blocks.0.res_units.0.conv1.weight")[2],
        dilations=dilations)


def quantizer_size(shapes):
    bins, size = shapes.of("quantizer.quantizers.0.codebook.embed")
    stages = shapes.numbered("quantizer.quantizers.{}.codebook.embed")
    width = shapes.of("fc.weight")[0]
    return QuantizerSize(len(stages), width, bins, size)


def load(path, device="cpu", weights=None, allow_unused=False):
    """The codec from its folder or its weight file, in either published naming.

    config.json is looked for beside the file. weights: which file of the folder, where model.safetensors and
    model.pth lie side by side.
    """
    path = Path(path)
    if path.is_dir():
        names = [weights] if weights else ["model.safetensors", "model.pth"]
        found = [name for name in names if (path / name).is_file()]
        if not found:
            raise Invalid(f"{path} does not hold {' or '.join(names)}. "
                          "Expected bosonai/higgs-audio-v2-tokenizer.")
        if len(found) > 1:
            raise Invalid(f"{path} holds both {' and '.join(names)}; say which with weights=")
        path = path / found[0]
    beside = path.parent / "config.json"
    config = checkpoint.read_object(beside) if beside.is_file() else {}
    stored = checkpoint.fold_weight_norm(checkpoint.read(path))
    codec = build(stored, config, str(path))
    checkpoint.fill(codec, stored, rename, UNUSED, device=device, allow_unused=allow_unused, what=str(path))
    for module in codec.modules():
        if isinstance(module, (Conv, Upsample)):
            picture = module.weight[:, :, None].detach()
            module.weight.data = lay_out(picture)[:, :, 0]  # once, not at every call
    return codec.requires_grad_(False).eval()


KERNELS = [10, 3, 3, 3, 3, 2, 2]  # of HuBERT base's feature extractor
STRIDES = [5, 2, 2, 2, 2, 2, 2]
POSITIONAL = (128, 16)  # kernel and groups of its positional convolution
RATIOS = [8, 5, 4, 2, 3]  # strides of DAC's blocks, in this order on both sides


def blank(filters, width, layers):
    """A codec of the published structure with drawn weights, for measuring.

    filters: of DAC's first convolution; width, layers: of HuBERT. 64, 768 and 12 are the published sizes.
    """
    blocks = len(RATIOS)
    pos_kernel, pos_groups = POSITIONAL
    latent, wide = 4 * filters, 16 * filters
    encoder = DacSize([filters * 2**i for i in range(blocks + 1)], RATIOS, latent)
    decoder = DacSize([wide // 2**i for i in range(blocks + 1)], RATIOS, latent)
    hubert = HubertSize(
        feature_widths=[2 * width // 3] * len(KERNELS), kernels=KERNELS, strides=STRIDES,
        width=width, inner=4 * width, layers=layers, heads=max(1, width // 64),
        pos_kernel=pos_kernel, pos_groups=pos_groups, eps=1e-5)
    semantic = SemanticSize(widths=[width] * 3, kernel=3, unit_kernel=3, dilations=[1, 1])
    quantizer = QuantizerSize(stages=8, width=latent + width, bins=1024, size=latent // 4)
    config = Config(
        encoder, decoder, hubert, semantic, quantizer,
        sample_rate=24000, semantic_sample_rate=16000, downsample_factor=320)
    codec = HiggsCodec(config)
    for name, p in codec.named_parameters():
        if name.endswith("embed"):
            nn.init.normal_(p)
    return codec.requires_grad_(False).eval()
