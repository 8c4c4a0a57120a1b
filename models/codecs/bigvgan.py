"""BigVGAN v2 (arXiv 2206.04658): a mel spectrogram to samples.

    (B, 80, T) -> convolution to 1536 channels -> six times: upsample, halve the channels, mean of three residual blocks
      -> snake, convolution to one channel, clamp to [-1, 1] -> (B, 256 T)

Every activation runs at twice the rate between two low-pass filters, so that it makes no aliases. Reads
bigvgan_generator.pt and config.json of nvidia/bigvgan_v2_22khz_80band_256x; weight norm is folded on load. Frozen.
"""
import math
import operator
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

    Both filters are stored with each activation: 12 taps of a Kaiser-windowed sinc at half the band. At the ends the
    signal is continued with its last value.
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
        x = F.conv_transpose1d(x, 2 * self.up.expand(C, 1, taps), stride=2, groups=C)
        x = x[..., 2 * pad + (taps - 2) // 2 :][..., : 2 * n]
        x = x + (x * self.alpha.exp()[:, None]).sin().square() / (self.beta.exp()[:, None] + 1e-9)
        x = F.pad(x, (pad, pad + 1), mode="replicate")
        return F.conv1d(x, self.down.expand(C, 1, taps), stride=2, groups=C)


class ResBlock(nn.Module):
    def __init__(self, channels, kernel, dilations):
        super().__init__()
        self.convs1 = nn.ModuleList([nn.Conv1d(channels, channels, kernel, padding="same", dilation=d) for d in dilations])
        self.convs2 = nn.ModuleList([nn.Conv1d(channels, channels, kernel, padding="same") for _ in dilations])
        # in turn before one of convs1 and one of convs2
        self.activations = nn.ModuleList([Activation(channels) for _ in range(2 * len(dilations))])

    def forward(self, x):
        for i, (dilated, plain) in enumerate(zip(self.convs1, self.convs2)):
            x = x + plain(self.activations[2 * i + 1](dilated(self.activations[2 * i](x))))
        return x


class BigVGAN(nn.Module):
    def __init__(self, config):
        super().__init__()
        c, self.config = config, config
        channels = [c.upsample_initial_channel // 2**i for i in range(len(c.upsample_rates) + 1)]
        self.conv_pre = nn.Conv1d(c.num_mels, channels[0], 7, padding=3)
        self.ups = nn.ModuleList([
            nn.ConvTranspose1d(a, b, kernel, rate, padding=(kernel - rate) // 2)
            for a, b, rate, kernel in zip(channels, channels[1:], c.upsample_rates, c.upsample_kernel_sizes)])
        self.resblocks = nn.ModuleList([
            ResBlock(b, kernel, dilations) for b in channels[1:]
            for kernel, dilations in zip(c.resblock_kernel_sizes, c.resblock_dilation_sizes)])
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
            x = sum(block(x) for block in self.resblocks[i * each : (i + 1) * each]) / each
        x = self.conv_post(self.activation_post(x))[:, 0]
        return x.tanh() if self.config.use_tanh_at_final else x.clamp(-1, 1)

    def chunks(self, mel, frames=256):
        """The same in bounded memory: yields (B, hop * frames) pieces that joined are the whole."""
        context, T = self.context(), mel.shape[-1]
        for start in range(0, T, frames):
            end, left = min(start + frames, T), min(context, start)
            wave = self(mel[..., start - left : end + context])
            yield wave[..., left * self.hop :][..., : (end - start) * self.hop]

    def context(self):
        """How many mel frames to each side a sample depends on; 40 for the published model."""
        def reach(kernel, dilation=1):
            return (kernel - 1) // 2 * dilation

        activation = self.activation_post.up.shape[-1] // 2 - 1  # both filters together, at the lower rate
        blocks = zip(self.config.resblock_kernel_sizes, self.config.resblock_dilation_sizes)
        block = max(sum(reach(k, d) + reach(k) + 2 * activation for d in dilations) for k, dilations in blocks)
        samples = reach(7) + activation  # at the output's rate, then backwards through the stages
        for rate, kernel in zip(reversed(self.config.upsample_rates), reversed(self.config.upsample_kernel_sizes)):
            samples = math.ceil((samples + block + (kernel + rate) // 2 - 1) / rate)
        return samples + reach(7)


# ------------------------------------------------------------------------------------------------ loading


def rename(name):
    name = re.sub(r"^ups\.(\d+)\.0\.", r"ups.\1.", name)
    return name.replace(".act.", ".").replace(".upsample.filter", ".up").replace(".downsample.lowpass.filter", ".down")


MOST_SIZES = 16  # in a list of the config: published ones have six at most
LARGEST_SIZE = 1000  # of a kernel, a rate or a dilation: published ones have sixteen at most


def check_lists(c, where):
    """Invalid where lists of a Config are not as long as each other, or hold what is no size."""
    pairs = (c.upsample_rates, c.upsample_kernel_sizes), (c.resblock_kernel_sizes, c.resblock_dilation_sizes)
    sizes = [*c.upsample_rates, *c.upsample_kernel_sizes, *c.resblock_kernel_sizes, *sum(c.resblock_dilation_sizes, [])]
    fit = all(len(one) == len(other) and 0 < len(one) <= MOST_SIZES for one, other in pairs)
    fit = fit and all(1 <= size <= LARGEST_SIZE for size in sizes) and all(map(operator.le, *pairs[0]))
    if not fit or c.upsample_initial_channel % 2 ** len(c.upsample_rates):
        raise Invalid(f"{where}: the rates, kernels, dilations and channels do not make a BigVGAN. Copy the file again from where it "
                      "came from.")


def load(path, device="cpu", allow_unused=False):
    """The vocoder in a folder with config.json and bigvgan_generator.pt, or in such a file, frozen, float32."""
    path = checkpoint.find(path, ("bigvgan_generator.pt",), "BigVGAN as nvidia publishes it")
    folder = path.parent
    if not (folder / "config.json").is_file():
        raise Invalid(f"{folder} has no config.json, which says at what rates BigVGAN upsamples")
    published = read_object(folder / "config.json")
    fixed(published, FIXED)
    config = sized(Config, published)
    check_lists(config, published.where)
    stored = {name.removeprefix("generator."): value for name, value in checkpoint.read(path).items()}
    with torch.device("meta"):
        model = BigVGAN(config)
    checkpoint.fill(model, checkpoint.fold_weight_norm(stored), rename, device=device, allow_unused=allow_unused, what=str(path))
    return model.eval().requires_grad_(False)
