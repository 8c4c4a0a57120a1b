"""CAM++ speaker embedding (arXiv 2303.00332): one vector for the voice in a clip.

    16 kHz wave -> 80 Kaldi mel bins minus their mean over time (B, T, 80)
      -> convolutions over time and frequency (B, 320, T) -> densely connected TDNN layers at half the frame rate,
      each gated by its context -> mean and standard deviation over time -> (B, 192)

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
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=1e-5)


class ResBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut; the stride goes over frequency only."""

    def __init__(self, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, (stride, 1), 1, bias=False)
        self.bn1 = Norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = Norm(channels)
        down = [nn.Conv2d(channels, channels, 1, (stride, 1), bias=False), Norm(channels)] if stride > 1 else []
        self.shortcut = nn.Sequential(*down)

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class Head(nn.Module):
    """(B, mels, T) -> (B, channels * mels / 8, T)"""

    def __init__(self, channels, blocks):
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels, 3, 1, 1, bias=False)
        self.bn1 = Norm(channels)
        self.layer1 = nn.Sequential(*[ResBlock(channels, 1 if i else 2) for i in range(blocks[0])])
        self.layer2 = nn.Sequential(*[ResBlock(channels, 1 if i else 2) for i in range(blocks[1])])
        self.conv2 = nn.Conv2d(channels, channels, 3, (2, 1), 1, bias=False)
        self.bn2 = Norm(channels)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x[:, None])))
        x = F.relu(self.bn2(self.conv2(self.layer2(self.layer1(x)))))
        return x.flatten(1, 2)  # channels outer, frequency rows inner


class Cam(nn.Module):
    """A convolution whose output channels are weighed by the context: mean of the clip plus mean of the segment."""

    def __init__(self, channels, growth, dilation):
        super().__init__()
        self.linear_local = nn.Conv1d(channels, growth, 3, padding=dilation, dilation=dilation, bias=False)
        self.linear1 = nn.Conv1d(channels, channels // 2, 1)
        self.linear2 = nn.Conv1d(channels // 2, growth, 1)

    def forward(self, x):
        T = x.shape[-1]
        segments = F.avg_pool1d(x, SEGMENT, SEGMENT, ceil_mode=True)  # the last one is averaged over what there is of it
        context = x.mean(-1, keepdim=True) + segments.repeat_interleave(SEGMENT, -1)[..., :T]
        return self.linear_local(x) * torch.sigmoid(self.linear2(F.relu(self.linear1(context))))


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
        self.xvector["tdnn"] = nn.ModuleDict({
            "linear": nn.Conv1d(c.head * c.rows, c.width, 5, 2, 2, bias=False), "norm": Norm(c.width)})
        width = c.width
        for i, layers in enumerate(c.layers):
            block = [DenseLayer(width + j * c.growth, c.bottleneck, c.growth, DILATIONS[i]) for j in range(layers)]
            self.xvector[f"block{i + 1}"] = nn.ModuleDict({f"tdnnd{j + 1}": layer for j, layer in enumerate(block)})
            width += layers * c.growth
            transit = {"norm": Norm(width), "linear": nn.Conv1d(width, width // 2, 1, bias=False)}
            self.xvector[f"transit{i + 1}"] = nn.ModuleDict(transit)
            width //= 2
        self.xvector["out_norm"] = Norm(width)
        self.xvector["dense"] = nn.ModuleDict({
            "linear": nn.Conv1d(2 * width, c.size, 1, bias=False), "norm": Norm(c.size, affine=False)})

    def forward(self, x):
        """(B, T, mels) -> (B, size). Clips of one batch have the same length: the statistics run over all of T."""
        part = self.xvector
        x = self.head(x.transpose(1, 2))
        x = F.relu(part["tdnn"]["norm"](part["tdnn"]["linear"](x)))  # (B, width, T / 2)
        for i in range(len(self.config.layers)):
            for layer in part[f"block{i + 1}"].values():
                x = torch.cat([x, layer(x)], 1)
            transit = part[f"transit{i + 1}"]
            x = transit["linear"](F.relu(transit["norm"](x)))
        x = F.relu(part["out_norm"](x))
        x = torch.cat([x.mean(-1), x.std(-1, unbiased=True)], -1)[..., None]  # (B, 2C, 1)
        return part["dense"]["norm"](part["dense"]["linear"](x))[..., 0]

    @torch.no_grad()
    def embed(self, wave):
        """The voice of a 16 kHz clip in [-1, 1]. (n,) -> (size,). The filter bank is not on the 16-bit scale here."""
        if wave.shape[-1] < 720:  # three frames, two after the stride: fewer have no standard deviation
            raise Invalid(f"a speaker embedding needs at least 720 samples at 16 kHz, the audio has {wave.shape[-1]}")
        features = audio.kaldi_fbank(wave, n_mels=8 * self.config.rows)
        features = features - features.mean(0, keepdim=True)
        return self(features[None].to(self.head.conv1.weight.device))[0]


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
        return len({m[1] for m in (re.match(pattern, name) for name in stored) if m})

    blocks = count(r"xvector\.block(\d+)\.")
    if blocks > len(DILATIONS):
        raise Invalid(f"{what} has {blocks} dense blocks; CAM++ as it was published has {len(DILATIONS)}")
    head, tdnn = shape("head.conv1.weight")[0], shape("xvector.tdnn.linear.weight")
    return Config(
        rows=tdnn[1] // head, head=head, head_blocks=tuple(count(rf"head\.layer{i}\.(\d+)\.") for i in (1, 2)), width=tdnn[0],
        layers=tuple(count(rf"xvector\.block{i + 1}\.tdnnd(\d+)\.") for i in range(blocks)),
        growth=shape("xvector.block1.tdnnd1.cam_layer.linear_local.weight")[0],
        bottleneck=shape("xvector.block1.tdnnd1.linear1.weight")[0], size=shape("xvector.dense.linear.weight")[0])


def load(path, device="cpu", allow_unused=False):
    """The speaker encoder in a file, frozen, float32."""
    stored = checkpoint.read(path)
    with torch.device("meta"):
        model = CAMPPlus(config_of(stored, path))
    checkpoint.fill(model, stored, rename, UNUSED, device=device, allow_unused=allow_unused, what=str(path))
    return model.eval().requires_grad_(False)
