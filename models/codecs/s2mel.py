"""IndexTTS2's semantic-to-mel model: 50 Hz codes and the language model's states in, an 86 Hz mel out.

    S = codebook vectors (B, n, 1024) + gpt_layer(states (B, n, 1280))
      -> length regulator: stretched to floor(1.72 n) frames, four convolutions              (B, T, 512)
      -> behind the prompt's condition; a diffusion transformer predicts the flow from noise
         to mel, 25 Euler steps, each with and without the condition (guidance)              (B, 80, T)

Reads s2mel.pth of IndexTeam/IndexTTS-2: only its weights, none of the optimizer state that makes up two
thirds of the file. Flow matching: arXiv 2210.02747. Frozen here; nothing trains it.
"""
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from models.parts import Invalid, checkpoint
from models.parts.layers import RMSNorm, rotary, rotary_frequencies, rotate
from models.parts.plain import LARGEST, an_object, fixed, need, shown, written


@dataclass
class Config:
    """Read off the tensors, but for the first; the comments are the published values."""

    heads: int  # 8
    mels: int  # 80
    content: int  # 512, the regulator's output
    style: int  # 192, the speaker embedding
    width: int  # 512
    hidden: int  # 1536
    depth: int  # 13
    frequencies: int  # 128, of the time embedding
    wavenet: int  # 512
    wavenet_layers: int  # 8
    wavenet_kernel: int  # 5
    semantic: int  # 1024, what enters the regulator
    regulator: int  # 512
    regulator_convs: int  # 4
    gpt_layer: tuple  # (1280, 256, 128, 1024)


# ------------------------------------------------------------------------------------ length regulator


class Regulator(nn.Module):
    """Stretches a sequence to a number of frames and smooths it. (B, n, semantic) -> (B, frames, content)"""

    def __init__(self, config):
        super().__init__()
        width = config.regulator
        self.content_in_proj = nn.Linear(config.semantic, width)
        stages = []
        for _ in range(config.regulator_convs):
            stages.append(nn.Conv1d(width, width, 3, padding=1))
            stages.append(nn.GroupNorm(1, width))
            stages.append(nn.Mish())
        self.model = nn.Sequential(*stages, nn.Conv1d(width, config.content, 1))

    def forward(self, x, frames):
        x = self.content_in_proj(x).transpose(1, 2)
        x = F.interpolate(x, size=frames, mode="nearest")
        return self.model(x).transpose(1, 2)


def frames_for(codes, ratio=1.72):
    """How many mel frames codes become. 22050 / 256 / 50 would be 1.7227; the published code says 1.72."""
    return int(codes * ratio)


# ------------------------------------------------------------------------------------ diffusion transformer


class TimeEmbedding(nn.Module):
    """(B,) in [0, 1] -> (B, width). cos comes before sin."""

    def __init__(self, frequencies, width):
        super().__init__()
        self.register_buffer("freqs", torch.empty(frequencies))
        self.mlp = nn.Sequential(nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        angle = 1000 * t[:, None] * self.freqs
        return self.mlp(torch.cat([angle.cos(), angle.sin()], -1))


class AdaptiveNorm(nn.Module):
    """RMSNorm whose result is multiplied by w (not by 1 + w) and shifted, both from the time embedding."""

    def __init__(self, width):
        super().__init__()
        self.project_layer = nn.Linear(width, 2 * width)
        self.norm = RMSNorm(width, 1e-5)

    def forward(self, x, time):
        weight, bias = self.project_layer(time)[:, None].chunk(2, -1)
        return weight * self.norm(x) + bias


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        # q | k | v; q and k in half-split order after loading
        self.wqkv = nn.Linear(width, 3 * width, bias=False)
        self.wo = nn.Linear(width, width, bias=False)

    def forward(self, x, rope, mask):
        B, T, C = x.shape
        qkv = self.wqkv(x).view(B, T, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        q = rotate(q, *rope)
        k = rotate(k, *rope)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.wo(y.transpose(1, 2).reshape(B, T, C))


class FeedForward(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, config, receives):
        super().__init__()
        width = config.width
        self.skip_in_linear = nn.Linear(2 * width, width) if receives else None
        self.attention_norm = AdaptiveNorm(width)
        self.attention = Attention(width, config.heads)
        self.ffn_norm = AdaptiveNorm(width)
        self.feed_forward = FeedForward(width, config.hidden)

    def forward(self, x, time, rope, mask):
        x = x + self.attention(self.attention_norm(x, time), rope, mask)
        return x + self.feed_forward(self.ffn_norm(x, time))


class Transformer(nn.Module):
    """Full attention; the first half of the blocks hands its outputs to the second, last out first in."""

    def __init__(self, config):
        super().__init__()
        half = config.depth // 2
        self.layers = nn.ModuleList([Block(config, receives=i > half) for i in range(config.depth)])
        self.norm = AdaptiveNorm(config.width)

    def forward(self, x, time, rope, mask):
        half = len(self.layers) // 2
        handed = []
        for i, block in enumerate(self.layers):
            if block.skip_in_linear is not None:
                x = block.skip_in_linear(torch.cat([x, handed.pop()], -1))
            x = block(x, time, rope, mask)
            if i < half:
                handed.append(x)
        return self.norm(x, time)


class WaveNet(nn.Module):
    """Gated convolutions (arXiv 1609.03499), reflected at both ends. (B, C, T) -> (B, C, T)

    Only the time conditions it; the speaker does not, although the published config has a flag that says so.
    """

    def __init__(self, config):
        super().__init__()
        C, n, kernel = config.wavenet, config.wavenet_layers, config.wavenet_kernel
        self.reach = kernel // 2
        self.cond_layer = nn.Conv1d(C, 2 * C * n, 1)
        self.in_layers = nn.ModuleList([nn.Conv1d(C, 2 * C, kernel) for _ in range(n)])
        outs = [2 * C] * (n - 1) + [C]  # residual and skip; the last layer has no residual
        self.res_skip_layers = nn.ModuleList([nn.Conv1d(C, out, 1) for out in outs])

    def forward(self, x, time, lengths):
        conditions = self.cond_layer(time[..., None]).chunk(len(self.in_layers), 1)
        last = len(self.in_layers) - 1
        skipped = 0
        layers = zip(self.in_layers, self.res_skip_layers, conditions)
        for i, (conv, out, condition) in enumerate(layers):
            both = conv(self.reflect(x, lengths)) + condition
            a, b = both.chunk(2, 1)
            y = out(torch.tanh(a) * torch.sigmoid(b))
            if i < last:
                residual, y = y.chunk(2, 1)
                x = x + residual
            skipped = skipped + y
        return skipped

    def reflect(self, x, lengths):
        """Reflect each row at its own ends, so that a row comes out the same alone and beside longer ones."""
        at = torch.arange(-self.reach, x.shape[-1] + self.reach, device=x.device).abs()
        last = lengths[:, None] - 1
        at = (last - (last - at).abs()).abs()  # beyond the reflection lies padding, and nobody reads it
        return x.gather(2, at[:, None].expand(-1, x.shape[1], -1))


class FinalLayer(nn.Module):
    def __init__(self, width, time_width):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(time_width, 2 * width))

    def forward(self, x, time):
        shift, scale = self.adaLN_modulation(time)[:, None].chunk(2, -1)
        x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        return self.linear(x * (1 + scale) + shift)


class DiT(nn.Module):
    """The flow at time t: from a noisy mel, the prompt's mel, the speaker and the content to its velocity."""

    def __init__(self, config):
        super().__init__()
        c, self.config = config, config
        self.cond_projection = nn.Linear(c.content, c.width)
        self.cond_x_merge_linear = nn.Linear(2 * c.mels + c.width + c.style, c.width)
        self.t_embedder = TimeEmbedding(c.frequencies, c.width)
        self.transformer = Transformer(c)
        self.skip_linear = nn.Linear(c.width + c.mels, c.width)
        self.conv1 = nn.Linear(c.width, c.wavenet)  # a convolution by name only
        self.t_embedder2 = TimeEmbedding(c.frequencies, c.wavenet)
        self.wavenet = WaveNet(c)
        self.res_projection = nn.Linear(c.width, c.wavenet)
        self.final_layer = FinalLayer(c.wavenet, c.width)
        self.conv2 = nn.Conv1d(c.wavenet, c.mels, 1)

    def forward(self, x, prompt, lengths, t, style, content):
        """x, prompt (B, M, T), lengths (B,), t (B,), style (B, S), content (B, T, C) -> (B, M, T)"""
        T, device = x.shape[-1], x.device
        frames = torch.arange(T, device=device)
        mask = None  # whole rows need none, and attention is faster without
        if not (lengths == T).all():
            mask = (frames < lengths[:, None])[:, None, None]  # (B, 1, 1, T)
        frequencies = rotary_frequencies(self.config.width // self.config.heads, 10000.0)
        rope = rotary(frames, frequencies.to(device))
        time = self.t_embedder(t)
        x = x.transpose(1, 2)
        speaker = style[:, None].expand(-1, T, -1)
        inputs = [x, prompt.transpose(1, 2), self.cond_projection(content), speaker]
        h = self.cond_x_merge_linear(torch.cat(inputs, -1))
        h = self.transformer(h, time, rope, mask)
        h = self.skip_linear(torch.cat([h, x], -1))
        y = self.conv1(h).transpose(1, 2)
        y = self.wavenet(y, self.t_embedder2(t), lengths)
        y = y.transpose(1, 2) + self.res_projection(h)
        y = self.final_layer(y, time)
        return self.conv2(y.transpose(1, 2))


# ------------------------------------------------------------------------------------ the whole


class S2Mel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        # no activation between them
        sizes = zip(config.gpt_layer, config.gpt_layer[1:])
        self.gpt_layer = nn.Sequential(*[nn.Linear(a, b) for a, b in sizes])
        self.length_regulator = Regulator(config)
        self.cfm = nn.ModuleDict({"estimator": DiT(config)})

    @torch.no_grad()
    def content(self, vectors, states=None, frames=None):
        """Codebook vectors (B, n, semantic), with states (B, n, gpt) if generated -> (B, frames, content).

        Rows have equal length. For a prompt: no states, and as many frames as its mel has.
        """
        if states is not None:
            vectors = vectors + self.gpt_layer(states)
        return self.length_regulator(vectors, frames or frames_for(vectors.shape[1]))

    @torch.no_grad()
    def solve(self, content, prompt, style, noise, lengths=None, prompt_lengths=None, steps=25, cfg_rate=0.7):
        """The mel (B, M, T) that the noise flows to, prompt and target together; cut the prompt's frames off.

        content (B, T, C): the prompt's first, then the target's; prompt (B, M, Tp); style (B, S); noise
        (B, M, T), standard normal. lengths, prompt_lengths (B,): frames of each row where they differ. A row
        comes out the same alone and in a batch. The prompt's columns are zero at the start and after every
        step: the model sees the prompt as a condition, not in x. cfg_rate 0 asks for no guidance and half the
        work.
        """
        B, T = content.shape[:2]
        estimator, device = self.cfm["estimator"], content.device
        self.check_noise(noise, content, prompt)
        if lengths is None:
            lengths = [T] * B
        if prompt_lengths is None:
            prompt_lengths = [prompt.shape[-1]] * B
        lengths = torch.as_tensor(lengths, device=device)
        self.check_lengths(lengths)
        ends = torch.as_tensor(prompt_lengths, device=device)
        frames = torch.arange(T, device=device)
        own = frames >= ends[:, None, None]  # (B, 1, T), False within the prompt
        inside = frames < lengths[:, None, None]  # False in the padding
        prompt = F.pad(prompt, (0, T - prompt.shape[-1])) * ~own
        x = noise * own
        guided = cfg_rate > 0
        if guided:  # the second half sees no prompt, speaker or content, only zeros
            conditions = (style, content, prompt)
            style, content, prompt = (torch.cat([v, torch.zeros_like(v)]) for v in conditions)
            lengths = lengths.repeat(2)
        times = torch.linspace(0, 1, steps + 1, device=device)
        t = times[0]
        for i in range(steps):
            step = times[i + 1] - times[i]
            rows = torch.cat([x, x]) if guided else x
            flow = estimator(rows, prompt, lengths, t.expand(len(rows)), style, content)
            if guided:
                given, free = flow.chunk(2)
                flow = (1 + cfg_rate) * given - cfg_rate * free
            x = (x + step * flow) * own
            t = t + step
        return x * inside

    def check_noise(self, noise, content, prompt):
        B, T = content.shape[:2]
        mels = self.config.mels
        if noise.shape != (B, mels, T):
            raise Invalid(f"noise is {list(noise.shape)}, expected [{B}, {mels}, {T}]: one column for each "
                          f"of the {prompt.shape[-1]} prompt frames and of the target frames")

    def check_lengths(self, lengths):
        shortest = int(lengths.min())
        least = self.cfm["estimator"].wavenet.reach + 1  # an edge and what is reflected at it
        if shortest < least:
            raise Invalid(f"prompt and target have {shortest} mel frames together, "
                          f"at least {least} are needed")


# ------------------------------------------------------------------------------------ loading

FIXED = {  # what the published config says and this file computes
    "dit_type": "DiT",
    "length_regulator.is_discrete": False,
    "length_regulator.vector_quantize": False,
    "length_regulator.f0_condition": False,
    "length_regulator.n_codebooks": 1,
    "DiT.style_condition": True,
    "DiT.final_layer_type": "wavenet",
    "DiT.is_causal": False,
    "DiT.long_skip_connection": True,
    "DiT.uvit_skip_connection": True,
    "DiT.time_as_token": False,
    "DiT.style_as_token": False,
    "DiT.zero_prompt_speech_token": False,
    "wavenet.style_condition": True,
    "wavenet.dilation_rate": 1,
}


def mel_settings(config):
    """Arguments for audio.mel_spectrogram from the `s2mel:` section of config.yaml.

    No upper limit is the text "None" there.
    """
    numbers = need(an_object(config, "config.yaml: s2mel"), "preprocess_params", dict)
    spect = need(numbers, "spect_params", dict)
    fixed(spect, {"fmax": ("None", None)})

    def size(record, key):
        return need(record, key, int, at_least=1, at_most=LARGEST)

    return dict(
        rate=size(numbers, "sr"),
        n_fft=size(spect, "n_fft"),
        hop=size(spect, "hop_length"),
        win=size(spect, "win_length"),
        n_mels=size(spect, "n_mels"),
        fmin=need(spect, "fmin", float, 0.0, at_least=0))


def config_of(stored, section, what="checkpoint"):
    """The widths from the shapes of the tensors, the heads from `section`: `s2mel:` of config.yaml."""
    def shape(name):
        if name not in stored:
            raise Invalid(f"{what} has no tensor {name}. Is this s2mel.pth of IndexTTS-2?")
        return stored[name].shape

    def count(pattern):
        return len({m[1] for name in stored if (m := re.match(pattern, name))})

    check_published(section)
    dit = need(an_object(section, "config.yaml: s2mel"), "DiT", dict)
    heads = need(dit, "num_heads", int, at_least=1)
    estimator = "cfm.estimator."
    block = estimator + "transformer.layers.0."
    width = shape(block + "attention.wqkv.weight")[1]
    mels = shape(estimator + "conv2.weight")[0]
    if width % (2 * heads):
        raise Invalid(f"config.yaml: s2mel.DiT.num_heads is {shown(written(heads))}, which does not divide "
                      f"the width {width} of {what}")
    # each convolution has a norm beside it but for the last, which Config does not count
    convs = count(r"length_regulator\.model\.(\d+)\.weight") // 2
    linears = [shape(f"gpt_layer.{i}.weight") for i in range(count(r"gpt_layer\.(\d+)\."))]
    regulator_in = "length_regulator.content_in_proj.weight"
    return Config(
        heads=heads,
        mels=mels,
        content=shape(estimator + "cond_projection.weight")[1],
        style=shape(estimator + "cond_x_merge_linear.weight")[1] - 2 * mels - width,
        width=width,
        hidden=shape(block + "feed_forward.w1.weight")[0],
        depth=count(r"cfm\.estimator\.transformer\.layers\.(\d+)\."),
        frequencies=shape(estimator + "t_embedder.freqs")[0],
        wavenet=shape(estimator + "conv1.weight")[0],
        wavenet_layers=count(r"cfm\.estimator\.wavenet\.in_layers\.(\d+)\."),
        wavenet_kernel=shape(estimator + "wavenet.in_layers.0.conv.conv.weight")[2],
        semantic=shape(regulator_in)[1],
        regulator=shape(regulator_in)[0],
        regulator_convs=convs,
        gpt_layer=(shape("gpt_layer.0.weight")[1], *(s[0] for s in linears)))


def check_published(section):
    """Invalid where the `s2mel:` section of config.yaml states another value than FIXED does."""
    for path, value in FIXED.items():
        stated = section
        for key in path.split("."):
            stated = stated.get(key) if isinstance(stated, dict) else None
        if stated not in (None, value):
            raise Invalid(f"config.yaml: s2mel.{path} is {shown(written(stated))}; only {value!r} was ever "
                          "published and is supported")


def unused(depth):
    """Published tensors that no output depends on."""
    estimator = r"cfm\.estimator\."
    early = "|".join(str(i) for i in range(depth // 2 + 1))
    skip = rf"transformer\.layers\.({early})\.skip_in_linear\..*"
    return {
        estimator + r"input_pos": "the positions 0 to 16383, counted here when they are needed",
        estimator + r"x_embedder\..*": "the noisy mel enters through cond_x_merge_linear",
        estimator + r"cond_embedder\..*": "for codes instead of vectors",
        estimator + r"content_mask_embedder\..*": "left over from an earlier form of condition dropping",
        estimator + skip: "only the later blocks receive a skip",
        r"length_regulator\.embedding\..*": "for codes instead of vectors",
        r"length_regulator\.mask_token": "for codes instead of vectors",
    }


def rename(name):
    return name.replace(".conv.conv.", ".")


def half_split(weight, heads):
    """Rows of the published q | k | v, whose rotary pairs are neighbours, in the order of layers.rotate."""
    def halves(rows):
        pairs = rows.unflatten(0, (heads, -1, 2))
        return pairs.transpose(1, 2).flatten(0, 2)

    q, k, v = weight.chunk(3)
    return torch.cat([halves(q), halves(k), v])


def half_split_later(published, heads):
    """The same of a published tensor when it will be read."""
    def load():
        return half_split(published.load(), heads)

    return checkpoint.Stored(published.shape, published.dtype, load)


def load(path, section, device="cpu", allow_unused=False):
    """The model in s2mel.pth, frozen, float32. section: `s2mel:` of config.yaml."""
    stored = {name.removeprefix("net."): value for name, value in checkpoint.read(path).items()}
    stored = checkpoint.fold_weight_norm(stored)
    config = config_of(stored, section, path)
    for name, value in stored.items():
        if name.endswith("attention.wqkv.weight"):
            stored[name] = half_split_later(value, config.heads)
    with torch.device("meta"):
        model = S2Mel(config)
    listed = unused(config.depth)
    checkpoint.fill(model, stored, rename, listed, device=device, allow_unused=allow_unused, what=str(path))
    return model.eval().requires_grad_(False)
