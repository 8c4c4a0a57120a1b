"""CAM++ speaker embedding (arXiv 2303.00332): one vector for the voice in a clip.

    16 kHz wave -> 80 Kaldi mel bins minus their mean over time                             (B, T, 80)
      -> convolutions over time and frequency                                               (B, 320, T)
      -> densely connected TDNN layers at half the frame rate, each gated by its context
      -> mean and standard deviation over time                                              (B, 192)

Reads campplus_cn_common.bin (funasr/campplus). Frozen: normalisation always uses the stored statistics.
"""
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from models.parts import Invalid, audio, checkpoint

DILATIONS = (1, 2, 2)  # one per dense block; nothing in the file says so
SEGMENT = 100  # frames that share one local context
SHORTEST = 720  # samples: three frames, two after the stride; fewer have no standard deviation


@dataclass
class Config:
    """Read off the tensors; the comments are the published values."""

    rows: int  # 10, frequency rows left after three halvings
    head: int  # 32, channels of the 2-d convolutions
    head_blocks: tuple  # (2, 2)
    width: int  # 128, channels after the first TDNN layer
    layers: tuple  # (12, 24, 16), TDNN layers per dense block
    growth: int  # 32, channels that each of them adds
    bottleneck: int  # 128
    size: int  # 192, the embedding


class Norm(nn.Module):
    """Batch normalisation by the stored statistics: there is no training mode that could be left on."""

    def __init__(self, channels, affine=True):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x):
        mean, variance = self.running_mean, self.running_var
        return F.batch_norm(x, mean, variance, self.weight, self.bias, eps=1e-5)


class ResBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut; the stride goes over frequency only."""

    def __init__(self, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, (stride, 1), 1, bias=False)
        self.bn1 = Norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = Norm(channels)
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut.append(nn.Conv2d(channels, channels, 1, (stride, 1), bias=False))
            self.shortcut.append(Norm(channels))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


def halving(channels, blocks):
    """Residual blocks, the first of which halves the rows of frequency."""
    strides = [1 if i else 2 for i in range(blocks)]
    return nn.Sequential(*[ResBlock(channels, stride) for stride in strides])


class Head(nn.Module):
    """(B, mels, T) -> (B, channels * mels / 8, T)"""

    def __init__(self, channels, blocks):
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels, 3, 1, 1, bias=False)
        self.bn1 = Norm(channels)
        self.layer1 = halving(channels, blocks[0])
        self.layer2 = halving(channels, blocks[1])
        self.conv2 = nn.Conv2d(channels, channels, 3, (2, 1), 1, bias=False)
        self.bn2 = Norm(channels)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x[:, None])))
        x = self.layer2(self.layer1(x))
        x = F.relu(self.bn2(self.conv2(x)))
        return x.flatten(1, 2)  # channels outer, frequency rows inner


class Cam(nn.Module):
    """A convolution with channels weighed by the context: the mean of the clip plus that of the segment."""

    def __init__(self, channels, growth, dilation):
        super().__init__()
        self.linear_local = nn.Conv1d(channels, growth, 3, padding=dilation, dilation=dilation, bias=False)
        self.linear1 = nn.Conv1d(channels, channels // 2, 1)
        self.linear2 = nn.Conv1d(channels // 2, growth, 1)

    def forward(self, x):
        T = x.shape[-1]
        # The last segment is averaged over what there is of it.
        segments = F.avg_pool1d(x, SEGMENT, SEGMENT, ceil_mode=True)
        segments = segments.repeat_interleave(SEGMENT, -1)[..., :T]
        context = x.mean(-1, keepdim=True) + segments
        gate = self.linear2(F.relu(self.linear1(context)))
        return self.linear_local(x) * torch.sigmoid(gate)


class DenseLayer(nn.Module):
    def __init__(self, channels, bottleneck, growth, dilation):
        super().__init__()
        self.norm1 = Norm(channels)
        self.linear1 = nn.Conv1d(channels, bottleneck, 1, bias=False)
        self.norm2 = Norm(bottleneck)
        self.cam_layer = Cam(bottleneck, growth, dilation)

    def forward(self, x):
        x = self.linear1(F.relu(self.norm1(x)))
        return self.cam_layer(F.relu(self.norm2(x)))


class CAMPPlus(nn.Module):
    def __init__(self, config):
        super().__init__()
        c, self.config = config, config
        self.head = Head(c.head, c.head_blocks)
        self.xvector = nn.ModuleDict()  # published names: tdnn, block1, transit1, ..., out_nonlinear, dense
        width = c.width
        first = nn.Conv1d(c.head * c.rows, width, 5, 2, 2, bias=False)
        self.xvector["tdnn"] = nn.ModuleDict({"linear": first, "norm": Norm(width)})
        for i, layers in enumerate(c.layers):
            block = nn.ModuleDict()
            for j in range(layers):  # each sees the outputs of all before it
                block[f"tdnnd{j + 1}"] = DenseLayer(width, c.bottleneck, c.growth, DILATIONS[i])
                width += c.growth
            self.xvector[f"block{i + 1}"] = block
            narrow = nn.Conv1d(width, width // 2, 1, bias=False)
            self.xvector[f"transit{i + 1}"] = nn.ModuleDict({"norm": Norm(width), "linear": narrow})
            width //= 2
        self.xvector["out_norm"] = Norm(width)
        last = nn.Conv1d(2 * width, c.size, 1, bias=False)
        self.xvector["dense"] = nn.ModuleDict({"linear": last, "norm": Norm(c.size, affine=False)})

    def forward(self, x):
        """(B, T, mels) -> (B, size). Clips of a batch have the same length: statistics run over all of T."""
        part = self.xvector
        x = self.head(x.transpose(1, 2))
        x = part["tdnn"]["linear"](x)  # (B, width, T / 2)
        x = F.relu(part["tdnn"]["norm"](x))
        for i in range(len(self.config.layers)):
            for layer in part[f"block{i + 1}"].values():
                x = torch.cat([x, layer(x)], 1)
            transit = part[f"transit{i + 1}"]
            x = transit["linear"](F.relu(transit["norm"](x)))
        x = F.relu(part["out_norm"](x))
        mean, deviation = x.mean(-1), x.std(-1, unbiased=True)
        x = torch.cat([mean, deviation], -1)[..., None]  # (B, 2C, 1)
        x = part["dense"]["linear"](x)
        return part["dense"]["norm"](x)[..., 0]

    @torch.no_grad()
    def embed(self, wave):
        """The voice of a 16 kHz clip in [-1, 1], not on the 16-bit scale. (n,) -> (size,)"""
        samples = wave.shape[-1]
        if samples < SHORTEST:
            raise Invalid(f"a speaker embedding needs at least {SHORTEST} samples at 16 kHz, "
                          f"the audio has {samples}")
        features = audio.kaldi_fbank(wave, n_mels=8 * self.config.rows)
        features = features - features.mean(0, keepdim=True)
        device = self.head.conv1.weight.device
        return self(features[None].to(device))[0]


UNUSED = {r".*\.num_batches_tracked": "counts training steps"}


def rename(name):
    return re.sub(r"nonlinear(\d?)\.batchnorm", r"norm\1", name)


def config_of(stored, what="checkpoint"):
    """The widths of a checkpoint, from the shapes of its tensors."""
    def shape(name):
        if name not in stored:
            raise Invalid(f"{what} has no tensor {name}. Is this campplus_cn_common.bin?")
        return stored[name].shape

    def count(pattern):
        return len({m[1] for name in stored if (m := re.match(pattern, name))})

    blocks = count(r"xvector\.block(\d+)\.")
    if blocks > len(DILATIONS):
        raise Invalid(f"{what} has {blocks} dense blocks; CAM++ as it was published has {len(DILATIONS)}")
    head = shape("head.conv1.weight")[0]
    tdnn = shape("xvector.tdnn.linear.weight")
    layer = "xvector.block1.tdnnd1."
    return Config(
        rows=tdnn[1] // head,
        head=head,
        head_blocks=tuple(count(rf"head\.layer{i}\.(\d+)\.") for i in (1, 2)),
        width=tdnn[0],
        layers=tuple(count(rf"xvector\.block{i + 1}\.tdnnd(\d+)\.") for i in range(blocks)),
        growth=shape(layer + "cam_layer.linear_local.weight")[0],
        bottleneck=shape(layer + "linear1.weight")[0],
        size=shape("xvector.dense.linear.weight")[0])


def load(path, device="cpu", allow_unused=False):
    """The speaker encoder in a file, frozen, float32."""
    stored = checkpoint.read(path)
    with torch.device("meta"):
        model = CAMPPlus(config_of(stored, path))
    checkpoint.fill(model, stored, rename, UNUSED, device=device, allow_unused=allow_unused, what=str(path))
    return model.eval().requires_grad_(False)
