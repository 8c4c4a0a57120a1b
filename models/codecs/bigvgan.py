"""BigVGAN v2 (arXiv 2206.04658): a mel spectrogram to samples.

    (B, 80, T) -> convolution to 1536 channels
      -> six times: upsample, halve the channels, mean of three residual blocks
      -> snake, convolution to one channel, clamp to [-1, 1]                           (B, 256 T)

Every activation runs at twice the rate between two low-pass filters, so that it makes no aliases. Reads
bigvgan_generator.pt and config.json of nvidia/bigvgan_v2_22khz_80band_256x; weight norm is folded on load.
Frozen.
"""
import math
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from models.parts import Invalid, checkpoint
from models.parts.plain import fixed, read_object, sized


@dataclass
class Config:
    """Names as in config.json; defaults are what BigVGAN takes where a key is missing."""

    upsample_rates: list[int]
    upsample_kernel_sizes: list[int]
    upsample_initial_channel: int
    resblock_kernel_sizes: list[int]
    resblock_dilation_sizes: list[list[int]]
    num_mels: int
    sampling_rate: int
    use_tanh_at_final: bool = True
    use_bias_at_final: bool = True


FIXED = {"resblock": "1", "activation": "snakebeta", "snake_logscale": True}


class Activation(nn.Module):
    """x + sin²(x·e^alpha) / e^beta at twice the rate. (B, C, n) -> (B, C, n)

    Both filters are stored with each activation: 12 taps of a Kaiser-windowed sinc at half the band. At the
    ends the signal is continued with its last value.
    """

    def __init__(self, channels, taps=12):
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))
        self.register_buffer("up", torch.empty(1, 1, taps))
        self.register_buffer("down", torch.empty(1, 1, taps))

    def forward(self, x):
        B, C, n = x.shape
        taps = self.up.shape[-1]
        pad = taps // 2 - 1
        x = F.pad(x, (pad, pad), mode="replicate")
        up = 2 * self.up.expand(C, 1, taps)  # the zeros between the samples halve the level
        x = F.conv_transpose1d(x, up, stride=2, groups=C)
        first = 2 * pad + (taps - 2) // 2  # the padding, and half of what the filter adds
        x = x[..., first : first + 2 * n]
        alpha = self.alpha.exp()[:, None]
        beta = self.beta.exp()[:, None]
        x = x + (x * alpha).sin().square() / (beta + 1e-9)
        x = F.pad(x, (pad, pad + 1), mode="replicate")
        return F.conv1d(x, self.down.expand(C, 1, taps), stride=2, groups=C)


class ResBlock(nn.Module):
    def __init__(self, channels, kernel, dilations):
        super().__init__()

        def conv(dilation=1):
            return nn.Conv1d(channels, channels, kernel, padding="same", dilation=dilation)

        self.convs1 = nn.ModuleList([conv(d) for d in dilations])
        self.convs2 = nn.ModuleList([conv() for _ in dilations])
        # in turn before one of convs1 and one of convs2
        self.activations = nn.ModuleList([Activation(channels) for _ in range(2 * len(dilations))])

    def forward(self, x):
        for i, (dilated, plain) in enumerate(zip(self.convs1, self.convs2)):
            first = self.activations[2 * i]
            second = self.activations[2 * i + 1]
            x = x + plain(second(dilated(first(x))))
        return x


class BigVGAN(nn.Module):
    def __init__(self, config):
        super().__init__()
        c, self.config = config, config
        channels = [c.upsample_initial_channel // 2**i for i in range(len(c.upsample_rates) + 1)]
        self.conv_pre = nn.Conv1d(c.num_mels, channels[0], 7, padding=3)
        self.ups = nn.ModuleList()
        stages = zip(channels, channels[1:], c.upsample_rates, c.upsample_kernel_sizes)
        for wide, narrow, rate, kernel in stages:
            up = nn.ConvTranspose1d(wide, narrow, kernel, rate, padding=(kernel - rate) // 2)
            self.ups.append(up)
        self.resblocks = nn.ModuleList()
        for narrow in channels[1:]:
            for kernel, dilations in zip(c.resblock_kernel_sizes, c.resblock_dilation_sizes):
                self.resblocks.append(ResBlock(narrow, kernel, dilations))
        self.activation_post = Activation(channels[-1])
        self.conv_post = nn.Conv1d(channels[-1], 1, 7, padding=3, bias=c.use_bias_at_final)

    @property
    def hop(self):
        """Samples per mel frame."""
        return math.prod(self.config.upsample_rates)

    @torch.no_grad()
    def forward(self, mel):
        """(B, M, T) -> (B, hop * T) in [-1, 1]"""
        x = self.conv_pre(mel)
        each = len(self.config.resblock_kernel_sizes)
        for i, up in enumerate(self.ups):
            x = up(x)
            blocks = self.resblocks[i * each : (i + 1) * each]
            x = sum(block(x) for block in blocks) / each
        x = self.activation_post(x)
        x = self.conv_post(x)[:, 0]
        return x.tanh() if self.config.use_tanh_at_final else x.clamp(-1, 1)

    def chunks(self, mel, frames=256):
        """The same in bounded memory: yields (B, hop * frames) pieces that joined are the whole."""
        context, hop, T = self.context(), self.hop, mel.shape[-1]
        for start in range(0, T, frames):
            end = min(start + frames, T)
            left = min(context, start)
            wave = self(mel[..., start - left : end + context])
            yield wave[..., left * hop :][..., : (end - start) * hop]

    def context(self):
        """How many mel frames to each side a sample depends on; 40 for the published model."""
        c = self.config
        activation = self.activation_post.up.shape[-1] // 2 - 1  # both filters together, at the lower rate
        block = 0  # of the residual blocks beside each other the one that looks farthest
        for kernel, dilations in zip(c.resblock_kernel_sizes, c.resblock_dilation_sizes):
            own = sum(reach(kernel, d) + reach(kernel) + 2 * activation for d in dilations)
            block = max(block, own)
        samples = reach(7) + activation  # at the output's rate, then backwards through the stages
        stages = list(zip(c.upsample_rates, c.upsample_kernel_sizes))
        for rate, kernel in reversed(stages):
            upsampler = (kernel + rate) // 2 - 1
            samples = math.ceil((samples + block + upsampler) / rate)
        return samples + reach(7)


def reach(kernel, dilation=1):
    """How many samples to each side a convolution sees."""
    return (kernel - 1) // 2 * dilation


# -------------------------------------------------------------------------------------------- loading


def rename(name):
    """A published tensor name as it is here."""
    name = re.sub(r"^ups\.(\d+)\.0\.", r"ups.\1.", name)
    name = name.replace(".act.", ".")
    name = name.replace(".upsample.filter", ".up")
    return name.replace(".downsample.lowpass.filter", ".down")


MOST_SIZES = 16  # in a list of the config: published ones have six at most
LARGEST_SIZE = 1000  # of a kernel, a rate or a dilation: published ones have sixteen at most


def check_lists(c, where):
    """Invalid where lists of a Config are not as long as each other, or hold what is no size."""
    if not fit_together(c):
        raise Invalid(f"{where}: the rates, kernels, dilations and channels do not make a BigVGAN. "
                      "Copy the file again from where it came from.")


def fit_together(c):
    """Whether the lists of a Config are those of a BigVGAN that can be built."""
    rates, kernels = c.upsample_rates, c.upsample_kernel_sizes
    pairs = ((rates, kernels), (c.resblock_kernel_sizes, c.resblock_dilation_sizes))
    for one, other in pairs:
        if len(one) != len(other) or not 0 < len(one) <= MOST_SIZES:
            return False
    sizes = [*rates, *kernels, *c.resblock_kernel_sizes]
    for dilations in c.resblock_dilation_sizes:
        sizes += dilations
    if not all(1 <= size <= LARGEST_SIZE for size in sizes):
        return False
    if any(kernel < rate for rate, kernel in zip(rates, kernels)):
        return False
    return c.upsample_initial_channel % 2 ** len(rates) == 0


def load(path, device="cpu", allow_unused=False):
    """The vocoder in a folder with config.json and bigvgan_generator.pt, or in that file. Frozen, float32."""
    path = checkpoint.find(path, ("bigvgan_generator.pt",), "BigVGAN as nvidia publishes it")
    settings = path.parent / "config.json"
    if not settings.is_file():
        raise Invalid(f"{path.parent} has no config.json, which says at what rates BigVGAN upsamples")
    published = read_object(settings)
    fixed(published, FIXED)
    config = sized(Config, published)
    check_lists(config, published.where)
    stored = {name.removeprefix("generator."): value for name, value in checkpoint.read(path).items()}
    stored = checkpoint.fold_weight_norm(stored)
    with torch.device("meta"):
        model = BigVGAN(config)
    checkpoint.fill(model, stored, rename, device=device, allow_unused=allow_unused, what=str(path))
    return model.eval().requires_grad_(False)
