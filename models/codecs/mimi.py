"""Mimi: 24 kHz speech as 12.5 frames per second of up to 32 codes, and back. Causal, so it also streams.

    wav (n,) ─pad to whole frames─▶ SEANet ─▶ (512, 2T) ─▶ transformer ─▶ halve ─▶ (512, T)
    (512, T) ─▶ split residual VQ ─▶ codes (K, T)
    codes (K, T) ─▶ centroids, summed ─▶ (512, T) ─▶ double ─▶ transformer ─▶ SEANet ─▶ wav (1920 T,)

Paper: arXiv 2410.00037. Weights: kyutai/mimi (transformers naming, which is ours) and the
tokenizer-*.safetensors file of kyutai/moshiko-pytorch-bf16 (moshi naming, interleaved rotary, q, k and v in
one matrix).

Every causal layer takes `state`, a dict from module to what it has to remember. A whole clip is one chunk
with a fresh dict, so streaming and batch are the same arithmetic.

Letters: B batch, C channels, t steps of a chunk, T frames, K codebooks, n samples.
"""
import math
import re
import zlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.parts import Invalid
from models.parts.checkpoint import Stored, fill
from models.parts.layers import exact, rotary, rotary_frequencies, rotate
from models.parts.plain import LARGEST, as_record, fixed, need

QUERY_BLOCK = 1024  # steps that attend at once: a long clip must not build a t x t mask


@dataclass
class Config:
    """Widths, kernels and counts come from tensor shapes (`config_of`); the rest shapes do not tell."""

    channels: list  # of the encoder's residual blocks, outermost first: 64, 128, 256, 512
    ratios: list  # of the encoder's strided convolutions, outermost first: 4, 5, 6, 8
    compress: int  # a residual block is this much narrower inside
    residual_layers: int
    kernels: tuple  # first, residual, last
    hidden: int
    ffn: int
    layers: int
    kv_width: int
    stride: int  # between SEANet and codes
    upsample_groups: int
    codebook_size: int
    codebook_dim: int
    projected: bool
    semantic: int
    acoustic: int
    num_attention_heads: int = 8
    head_dim: int = 64
    sliding_window: int = 250
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    dilation_growth_rate: int = 2
    sampling_rate: int = 24000

    @property
    def frame(self):  # samples per frame: 1920 = 4 * 5 * 6 * 8 * 2
        return math.prod(self.ratios) * self.stride

    @property
    def codebooks(self):
        return self.semantic + self.acoustic


# ------------------------------------------------------------------------------------ layers with a memory


class CausalConv(nn.Module):
    """Convolution that sees only the past: its memory is the last `left` inputs, zeros before a clip."""

    def __init__(self, conv, repeat=False):
        """conv: nn.Conv1d without padding."""
        super().__init__()
        self.conv = conv
        reach = (conv.kernel_size[0] - 1) * conv.dilation[0] + 1
        self.left = reach - conv.stride[0]
        self.repeat = repeat  # the one layer that starts with its first input repeated, not with zeros

    def forward(self, x, state):  # (B, C, t) -> (B, C', t / stride)
        past = state.get(self)
        if past is None and self.repeat:
            past = x[..., :1].expand(-1, -1, self.left)
        elif past is None:
            past = x.new_zeros(*x.shape[:2], self.left)
        x = torch.cat([past, x], -1)
        state[self] = x[..., x.shape[-1] - self.left :]
        return self.conv(x)


class CausalConvTranspose(nn.Module):
    """Its memory is the tail of its output that later inputs still add to, without the bias."""

    def __init__(self, conv):
        """conv: nn.ConvTranspose1d without padding."""
        super().__init__()
        self.conv = conv
        self.stride = conv.stride[0]

    def forward(self, x, state):  # (B, C, t) -> (B, C', t * stride)
        y = self.conv(x)
        done = x.shape[-1] * self.stride
        past = state.get(self)
        if past is not None:
            overlap = min(past.shape[-1], y.shape[-1])
            y = torch.cat([y[..., :overlap] + past, y[..., overlap:]], -1)
        tail = y[..., done:]
        bias = self.conv.bias
        state[self] = tail if bias is None else tail - bias[:, None]
        return y[..., :done]


class ResidualBlock(nn.Module):
    def __init__(self, width, inner, kernel, dilation):
        super().__init__()
        narrow = CausalConv(nn.Conv1d(width, inner, kernel, dilation=dilation))
        widen = CausalConv(nn.Conv1d(inner, width, 1))
        self.block = nn.ModuleList([nn.ELU(), narrow, nn.ELU(), widen])

    def forward(self, x, state):
        y = self.block[1](F.elu(x), state)
        return x + self.block[3](F.elu(y), state)


class SEANet(nn.Module):
    """A chain of the layers above. ELU is an entry of its own between them: the published names count it."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x, state):
        for layer in self.layers:
            x = layer(x) if isinstance(layer, nn.ELU) else layer(x, state)
        return x


def seanet_encoder(c):
    first, _, last = c.kernels
    layers = [CausalConv(nn.Conv1d(1, c.channels[0], first))]
    for width, ratio in zip(c.channels, c.ratios):
        layers += residual_blocks(c, width)
        down = CausalConv(nn.Conv1d(width, 2 * width, 2 * ratio, ratio))
        layers += [nn.ELU(), down]
    out = CausalConv(nn.Conv1d(2 * c.channels[-1], c.hidden, last))
    return SEANet([*layers, nn.ELU(), out])


def seanet_decoder(c):
    first, _, last = c.kernels
    layers = [CausalConv(nn.Conv1d(c.hidden, 2 * c.channels[-1], first))]
    for width, ratio in zip(reversed(c.channels), reversed(c.ratios)):
        up = CausalConvTranspose(nn.ConvTranspose1d(2 * width, width, 2 * ratio, ratio))
        layers += [nn.ELU(), up]
        layers += residual_blocks(c, width)
    out = CausalConv(nn.Conv1d(c.channels[0], 1, last))
    return SEANet([*layers, nn.ELU(), out])


def residual_blocks(c, width):
    """Blocks of which each sees further than the one before."""
    inner, kernel = width // c.compress, c.kernels[1]
    dilations = [c.dilation_growth_rate**i for i in range(c.residual_layers)]
    return [ResidualBlock(width, inner, kernel, dilation) for dilation in dilations]


class LayerScale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(width))

    def forward(self, x):
        return self.scale * x


class Attention(nn.Module):
    """Each step sees itself and the `window - 1` steps before it; that many keys are the memory.

    One key fewer would be overwritten by the second step of a frame before the first has read it (moshi's
    ring of 250 entries does that: past ten seconds its stream drifts away from its own batch result).
    """

    def __init__(self, c):
        super().__init__()
        self.head_dim, self.window = c.head_dim, c.sliding_window
        inner = c.num_attention_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden, inner, bias=False)
        self.k_proj = nn.Linear(c.hidden, c.kv_width, bias=False)
        self.v_proj = nn.Linear(c.hidden, c.kv_width, bias=False)
        self.o_proj = nn.Linear(inner, c.hidden, bias=False)

    def forward(self, x, rope, state):  # (B, t, C) -> (B, t, C)
        q = rotate(self.heads(self.q_proj(x)), *rope)
        k = rotate(self.heads(self.k_proj(x)), *rope)
        v = self.heads(self.v_proj(x))
        if self in state:
            past_k, past_v = state[self]
            k = torch.cat([past_k, k], 2)
            v = torch.cat([past_v, v], 2)
        first = max(0, k.shape[2] - (self.window - 1))
        state[self] = k[:, :, first:], v[:, :, first:]
        if q.shape[1] != k.shape[1]:
            group = q.shape[1] // k.shape[1]  # heads of q that share one of k
            k = k.repeat_interleave(group, 1)
            v = v.repeat_interleave(group, 1)
        out = self.attend(q, k, v)  # (B, H, t, D)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def heads(self, x):  # (B, t, H * D) -> (B, H, t, D)
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def attend(self, q, k, v):
        """q holds the last t of the steps that k and v hold; each (B, H, steps, D). -> (B, H, t, D)"""
        t = q.shape[2]
        past = k.shape[2] - t
        out = []
        for start in range(0, t, QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, t)
            # Only the keys that some query of the block sees.
            low, high = max(0, past + start - self.window + 1), past + stop
            i = torch.arange(past + start, high, device=q.device)[:, None]
            j = torch.arange(low, high, device=q.device)[None]
            near = (i - j >= 0) & (i - j < self.window)
            keys, values = k[:, :, low:high], v[:, :, low:high]
            y = F.scaled_dot_product_attention(q[:, :, start:stop], keys, values, attn_mask=near)
            out.append(y)
        return torch.cat(out, 2)


class FeedForward(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.fc1 = nn.Linear(c.hidden, c.ffn, bias=False)
        self.fc2 = nn.Linear(c.ffn, c.hidden, bias=False)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.self_attn = Attention(c)
        self.mlp = FeedForward(c)
        self.input_layernorm = nn.LayerNorm(c.hidden, eps=c.norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(c.hidden, eps=c.norm_eps)
        self.self_attn_layer_scale = LayerScale(c.hidden)
        self.mlp_layer_scale = LayerScale(c.hidden)

    def forward(self, x, rope, state):
        x = x + self.self_attn_layer_scale(self.self_attn(self.input_layernorm(x), rope, state))
        return x + self.mlp_layer_scale(self.mlp(self.post_attention_layernorm(x)))


class Transformer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.layers))
        # Made in load: a meta buffer holds no numbers.
        self.register_buffer("frequencies", None, persistent=False)

    def forward(self, x, state):  # (B, C, t) -> (B, C, t)
        x = x.transpose(1, 2)
        start = state.get(self, 0)
        stop = start + x.shape[1]
        state[self] = stop
        rope = rotary(torch.arange(start, stop, device=x.device), self.frequencies)
        for layer in self.layers:
            x = layer(x, rope, state)
        return x.transpose(1, 2)


# ------------------------------------------------------------------------------------ quantizer


class Codebook(nn.Module):
    """The file holds running sums and counts of a moving average; the centroids are their quotient."""

    def __init__(self, c):
        super().__init__()
        self.register_buffer("cluster_usage", torch.empty(c.codebook_size))
        self.register_buffer("embed_sum", torch.empty(c.codebook_size, c.codebook_dim))
        self.register_buffer("centroids", None, persistent=False)  # these two are made in load
        self.register_buffer("half_norm", None, persistent=False)

    def nearest(self, x):  # (B, T, D) -> (B, T); |x - c|^2 without the part that is the same for every c
        return (x @ self.centroids.T - self.half_norm).argmax(-1)


class Entry(nn.Module):  # the published names have one more level
    def __init__(self, c):
        super().__init__()
        self.codebook = Codebook(c)


class ResidualQuantizer(nn.Module):
    def __init__(self, c, codebooks):
        super().__init__()
        self.layers = nn.ModuleList(Entry(c) for _ in range(codebooks))
        if c.projected:
            self.input_proj = nn.Conv1d(c.hidden, c.codebook_dim, 1, bias=False)
            self.output_proj = nn.Conv1d(c.codebook_dim, c.hidden, 1, bias=False)
        else:
            self.input_proj = nn.Identity()
            self.output_proj = nn.Identity()

    def encode(self, x, codebooks):  # (B, C, T) -> (B, codebooks, T)
        rest = self.input_proj(x).transpose(1, 2)
        codes = []
        for layer in self.layers[:codebooks]:
            nearest = layer.codebook.nearest(rest)
            rest = rest - layer.codebook.centroids[nearest]
            codes.append(nearest)
        return torch.stack(codes, 1)

    def decode(self, codes):  # (B, codebooks, T) -> (B, C, T)
        total = sum(layer.codebook.centroids[c] for layer, c in zip(self.layers, codes.unbind(1)))
        return self.output_proj(total.transpose(1, 2))


class SplitQuantizer(nn.Module):
    """Codebook 0 carries meaning, the others sound.

    Both chains start from the same latent; their outputs are added.
    """

    def __init__(self, c):
        super().__init__()
        self.semantic_residual_vector_quantizer = ResidualQuantizer(c, c.semantic)
        self.acoustic_residual_vector_quantizer = ResidualQuantizer(c, c.acoustic)
        self.semantic = c.semantic

    def encode(self, x, codebooks):
        codes = [self.semantic_residual_vector_quantizer.encode(x, self.semantic)]
        if codebooks > self.semantic:
            codes.append(self.acoustic_residual_vector_quantizer.encode(x, codebooks - self.semantic))
        return torch.cat(codes, 1)

    def decode(self, codes):
        x = self.semantic_residual_vector_quantizer.decode(codes[:, : self.semantic])
        if codes.shape[1] > self.semantic:
            x = x + self.acoustic_residual_vector_quantizer.decode(codes[:, self.semantic :])
        return x


# ------------------------------------------------------------------------------------ the codec


class Mimi(nn.Module):
    def __init__(self, config, codebooks=None):
        super().__init__()
        c = self.config = config
        self.codebooks = codebooks or c.codebooks  # that encode gives; decode takes this many or fewer
        self.encoder = seanet_encoder(c)
        self.decoder = seanet_decoder(c)
        self.encoder_transformer = Transformer(c)
        self.decoder_transformer = Transformer(c)
        kernel = 2 * c.stride
        down = nn.Conv1d(c.hidden, c.hidden, kernel, c.stride, bias=False)
        up = nn.ConvTranspose1d(c.hidden, c.hidden, kernel, c.stride, groups=c.upsample_groups, bias=False)
        self.downsample = CausalConv(down, repeat=True)
        self.upsample = CausalConvTranspose(up)
        self.quantizer = SplitQuantizer(c)

    @property
    def device(self):
        return self.downsample.conv.weight.device

    @torch.no_grad()
    def encode(self, wav: Tensor) -> Tensor:
        """(n,) -> (K, ceil(n / 1920)) int64."""
        return self.encode_batch([wav])[0]

    @torch.no_grad()
    def encode_batch(self, wavs) -> list[Tensor]:
        """[(n_i,), ...] -> [(K, ceil(n_i / 1920)), ...] in one pass.

        Nothing looks ahead, so zeros behind a clip reach none of its frames. The wave is padded with zeros to
        whole frames first. Upstream versions that pad inside each convolution instead disagree with each
        other in the codes of the last frame; on whole frames all of them agree.
        """
        c = self.config
        for wav in wavs:
            if wav.dim() != 1 or not len(wav):
                raise Invalid("Mimi encodes mono audio (n,) with at least one sample, "
                              f"got shape {list(wav.shape)}")
        x = [wav.to(self.device, torch.float32) for wav in wavs]
        x = nn.utils.rnn.pad_sequence(x, batch_first=True)
        x = F.pad(x, (0, -x.shape[1] % c.frame))[:, None]
        with exact(x.device):
            x = self.encoder_transformer(self.encoder(x, {}), {})
            codes = self.quantizer.encode(self.downsample(x, {}), self.codebooks)  # (B, K, T)
        return [row[:, : -(-len(w) // c.frame)] for row, w in zip(codes, wavs)]

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """(K, T) -> (1920 T,), not clipped."""
        return self.stream().decode(codes)

    def stream(self):
        """Its decode takes a clip in chunks of any number of frames; the outputs joined are the whole."""
        return Stream(self)

    def fingerprint(self):
        """A number that changes with any weight or setting, and not with the naming of the file."""
        crc = zlib.crc32(repr((self.config, self.codebooks)).encode())
        for name, x in sorted(self.state_dict().items()):
            crc = zlib.crc32(name.encode(), crc)
            crc = zlib.crc32(x.cpu().contiguous().numpy(), crc)
        return f"{crc:08x}"


class Stream:
    def __init__(self, codec):
        self.codec = codec
        self.state = {}  # {layer: what it has to remember}

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """(K, T) -> (1920 T,), or (B, K, T) -> (B, 1920 T)."""
        codec, state = self.codec, self.state
        most, size = codec.config.codebooks, codec.config.codebook_size
        if codes.dim() not in (2, 3) or not 1 <= codes.shape[-2] <= most:
            raise Invalid(f"Mimi decodes codes (K, T) with 1 to {most} codebooks, "
                          f"got shape {list(codes.shape)}")
        x = codes.to(codec.device, torch.int64)
        if not x.shape[-1]:
            return torch.zeros(*x.shape[:-2], 0, device=x.device)
        x = x.reshape(-1, *x.shape[-2:])
        lowest, highest = int(x.min()), int(x.max())
        if lowest < 0 or highest >= size:
            raise Invalid(f"Mimi has the codes 0 to {size - 1}, got {lowest} to {highest}; ids above are "
                          "special ids of the language model, which sampling leaves out with mask_special on")
        with exact(x.device):
            x = codec.upsample(codec.quantizer.decode(x), state)
            x = codec.decoder_transformer(x, state)
            x = codec.decoder(x, state)
        return x.reshape(*codes.shape[:-2], -1)


# ------------------------------------------------------------------------------------ files

SEMANTIC = "quantizer.semantic_residual_vector_quantizer."
ACOUSTIC = "quantizer.acoustic_residual_vector_quantizer."
# moshi's names and ours, # for a number. A decoder layer's convolution is `convtr` in moshi where it is
# transposed.
MOSHI = (
    ("encoder.model.#.conv.conv.", "encoder.layers.#.conv."),
    ("encoder.model.#.block.#.conv.conv.", "encoder.layers.#.block.#.conv."),
    ("decoder.model.#.conv.conv.", "decoder.layers.#.conv."),
    ("decoder.model.#.convtr.convtr.", "decoder.layers.#.conv."),
    ("decoder.model.#.block.#.conv.conv.", "decoder.layers.#.block.#.conv."),
    ("downsample.conv.conv.conv.", "downsample.conv."),
    ("upsample.convtr.convtr.convtr.", "upsample.conv."),
    ("encoder_transformer.transformer.layers.", "encoder_transformer.layers."),
    ("decoder_transformer.transformer.layers.", "decoder_transformer.layers."),
    ("quantizer.rvq_first.vq.layers.#._codebook.", f"{SEMANTIC}layers.#.codebook."),
    ("quantizer.rvq_rest.vq.layers.#._codebook.", f"{ACOUSTIC}layers.#.codebook."),
    ("quantizer.rvq_first.", SEMANTIC),
    ("quantizer.rvq_rest.", ACOUSTIC),
)
MOSHI_LEAVES = (
    (".out_proj.", ".o_proj."),
    (".linear1.", ".mlp.fc1."),
    (".linear2.", ".mlp.fc2."),
    (".norm1.", ".input_layernorm."),
    (".norm2.", ".post_attention_layernorm."),
    (".layer_scale_1.", ".self_attn_layer_scale."),
    (".layer_scale_2.", ".mlp_layer_scale."),
    ("._initialized", ".initialized"),
    (".embedding_sum", ".embed_sum"),
)
OLDER = (  # both namings had these once
    (".inited", ".initialized"),
    (".cluster_size", ".cluster_usage"),
    (".embed_avg", ".embed_sum"),
)
UNUSED = {r".*\.initialized": "a flag of codebook training"}


def half_split(w, heads):
    """Rows of a q or k matrix (or LoRA B), (heads * D, ...), from interleaved to half-split rotary order."""
    return w.reshape(heads, -1, 2, *w.shape[1:]).transpose(1, 2).reshape(w.shape)


def interleaved(w, heads):
    """The way back."""
    return w.reshape(heads, 2, -1, *w.shape[1:]).transpose(1, 2).reshape(w.shape)


def naming_of(names):
    """"moshi", "transformers" or None, told by the keys alone."""
    if any(n.startswith("encoder.model.") for n in names):
        return "moshi"
    return "transformers" if any(n.startswith("encoder.layers.") for n in names) else None


def renamed(name, table):
    """The name with the first beginning in the table, pairs (old, new), replaced; a # keeps its number."""
    for old, new in table:
        pattern = re.escape(old).replace(r"\#", r"(\d+)")
        m = re.match(pattern, name)
        if m:
            numbers = iter(m.groups())
            return re.sub("#", lambda _: next(numbers), new) + name[m.end() :]
    return name


def ours(stored, heads):
    """{published name: Stored} of either naming -> the same under our names, with q and k half-split."""
    moshi = naming_of(stored) == "moshi"
    leaves = OLDER + MOSHI_LEAVES if moshi else OLDER
    out = {}
    for name, tensor in stored.items():
        for old, new in leaves:
            name = name.replace(old, new)
        if moshi:
            name = renamed(name, MOSHI)
        m = re.fullmatch(r"(.*\.self_attn\.)(?:in_proj_weight|in_proj\.weight|in_projs\.0\.weight)", name)
        if moshi and m:
            for i, part in enumerate("qkv"):
                out[f"{m[1]}{part}_proj.weight"] = third(tensor, i, heads)
        else:
            out[re.sub(r"\.out_projs\.0\.", ".o_proj.", name)] = tensor
    return out


def third(tensor, i, heads):
    """Stored q, k or v (i is 0, 1 or 2) of the one that holds the rows of all three; q and k half-split."""
    rows = tensor.shape[0] // 3

    def load():
        w = tensor.load()[i * rows : (i + 1) * rows]
        return w if i == 2 else half_split(w, heads)

    return Stored((rows, *tensor.shape[1:]), tensor.dtype, load)


def published(codec, naming="transformers"):
    """{name: tensor} as the published file of that naming has it."""
    state = codec.state_dict()
    for name in [n for n in state if n.endswith(".cluster_usage")]:
        state[name.replace("cluster_usage", "initialized")] = torch.ones(1)
    if naming == "transformers":
        return state
    heads, last = codec.config.num_attention_heads, len(codec.decoder.layers) - 1
    table = [(own, theirs) for theirs, own in MOSHI]
    transposed = [(own, theirs) for own, theirs in table if "decoder.model.#.convtr." in theirs]
    out = {}
    for name, w in state.items():
        m = re.fullmatch(r"(.*\.self_attn\.)([qkv])_proj\.weight", name)
        if m and m[2] != "q":
            continue  # written with q
        if m:
            name = m[1] + "in_proj_weight"
            q, k, v = (state[f"{m[1]}{part}_proj.weight"] for part in "qkv")
            w = torch.cat([interleaved(q, heads), interleaved(k, heads), v])
        # Between the decoder's first and last layer a convolution outside of the blocks is a transposed one.
        m = re.match(r"decoder\.layers\.(\d+)\.conv\.", name)
        inside = m and 0 < int(m[1]) < last
        name = renamed(name, transposed if inside else table)
        for theirs, own in MOSHI_LEAVES:
            name = name.replace(own, theirs)
        out[name] = w
    return out


FIXED = {
    "use_causal_conv": True,
    "use_conv_shortcut": False,
    "hidden_act": "gelu",
    "pad_mode": "constant",
    "trim_right_ratio": 1.0,
    "attention_bias": False,
    "audio_channels": 1,
}
# Whole numbers that no shape tells, and what they are without.
SIZES = {"sliding_window": 250, "sampling_rate": 24000}


def config_of(stored, settings):
    """Config of a file with our names: shapes first, then `settings` (a transformers codec_config, or {})."""
    def shape(name):
        if name not in stored:
            some = ", ".join(list(stored)[:3])
            raise Invalid(f"not a Mimi codec: no tensor {name}; it has names such as {some}")
        return stored[name].shape

    def count(pattern):
        """How many numbers the names have in the place of the pattern's group."""
        found = [re.match(pattern, name) for name in stored]
        return len({m[1] for m in found if m})

    fixed(settings, FIXED)
    plain = [i for i in range(200) if f"encoder.layers.{i}.conv.weight" in stored]
    first = shape(f"encoder.layers.{plain[0] if plain else 0}.conv.weight")
    block = shape("encoder.layers.1.block.1.conv.weight")
    down = shape("downsample.conv.weight")
    q = shape("encoder_transformer.layers.0.self_attn.q_proj.weight")
    heads = heads_of(settings)
    if q[0] % (2 * heads):
        raise Invalid(f"{settings.where}: {heads} heads do not divide the {q[0]} rows of q_proj into pairs")
    theta = need(settings, "rope_theta", float, 10000.0, at_least=1)
    known = {}
    for key, usual in SIZES.items():
        known[key] = need(settings, key, int, usual, at_least=1, at_most=LARGEST)
    strided = [shape(f"encoder.layers.{i}.conv.weight") for i in plain[1:-1]]  # each (out, in, kernel)
    residual_layers = count(r"encoder\.layers\.(\d+)\.block\.") // len(strided)
    last = shape(f"encoder.layers.{plain[-1]}.conv.weight")
    fc1 = shape("encoder_transformer.layers.0.mlp.fc1.weight")
    k = shape("encoder_transformer.layers.0.self_attn.k_proj.weight")
    up = shape("upsample.conv.weight")
    codebook = shape(f"{SEMANTIC}layers.0.codebook.embed_sum")
    eps = need(settings, "norm_eps", float, 1e-5, at_least=0)
    rope = need(settings, "rope_parameters", dict, {})
    theta = need(rope, "rope_theta", float, theta, at_least=1)  # before the one outside, if there are both
    growth = need(settings, "dilation_growth_rate", int, 2, at_least=1, at_most=8)
    return Config(
        channels=[s[1] for s in strided], ratios=[s[2] // 2 for s in strided],
        compress=block[1] // block[0], residual_layers=residual_layers,
        kernels=(first[2], block[2], last[2]),
        hidden=q[1], ffn=fc1[0], kv_width=k[0],
        layers=count(r"encoder_transformer\.layers\.(\d+)\."),
        stride=down[2] // 2, upsample_groups=q[1] // up[1],
        codebook_size=codebook[0], codebook_dim=codebook[1],
        projected=f"{SEMANTIC}input_proj.weight" in stored,
        semantic=count(SEMANTIC + r"layers\.(\d+)\."),
        acoustic=count(ACOUSTIC + r"layers\.(\d+)\."),
        num_attention_heads=heads, head_dim=q[0] // heads, norm_eps=eps, rope_theta=theta,
        dilation_growth_rate=growth, **known)


def heads_of(settings):
    return need(settings, "num_attention_heads", int, 8, at_least=1, at_most=LARGEST)


def settings_of(c):
    """The transformers codec_config of a Config."""
    first, residual, last = c.kernels
    return {
        "model_type": "mimi",
        "num_filters": c.channels[0],
        "upsampling_ratios": list(reversed(c.ratios)),
        "compress": c.compress,
        "num_residual_layers": c.residual_layers,
        "kernel_size": first,
        "residual_kernel_size": residual,
        "last_kernel_size": last,
        "hidden_size": c.hidden,
        "intermediate_size": c.ffn,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.kv_width // c.head_dim,
        "head_dim": c.head_dim,
        "upsample_groups": c.upsample_groups,
        "codebook_size": c.codebook_size,
        "codebook_dim": c.codebook_dim,
        "vector_quantization_hidden_dimension": c.codebook_dim,
        "num_quantizers": c.codebooks,
        "num_semantic_quantizers": c.semantic,
        "sliding_window": c.sliding_window,
        "norm_eps": c.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "sampling_rate": c.sampling_rate,
        "dilation_growth_rate": c.dilation_growth_rate,
        "frame_rate": c.sampling_rate / c.frame,
    }


def load(stored, settings=None, codebooks=None, device="cpu", allow_unused=False, what="Mimi"):
    """A frozen float32 codec from {published name: Stored} of either naming.

    settings: a transformers codec_config.
    """
    settings = as_record(settings or {}, getattr(settings, "where", "codec_config"))
    stored = ours(stored, heads_of(settings))
    config = config_of(stored, settings)
    if codebooks and not config.semantic < codebooks <= config.codebooks:
        raise Invalid(f"{what} has {config.codebooks} codebooks, but {codebooks} are wanted")
    with torch.device("meta"):
        codec = Mimi(config, codebooks)
    fill(codec, stored, unused=UNUSED, device=device, allow_unused=allow_unused, what=what)
    return _finish(codec, device)


def blank(config):
    """A codec with drawn weights, for measuring only."""
    codec = Mimi(config)
    for p in (*codec.parameters(), *codec.buffers()):
        if p.ndim > 1:
            nn.init.normal_(p, std=p[0].numel() ** -0.5)
        else:
            nn.init.ones_(p)
    return _finish(codec, "cpu")


def _finish(codec, device):
    """What is computed from the weights and settings; frozen, and never in training mode."""
    c = codec.config
    for module in codec.modules():
        if isinstance(module, Codebook):
            # The clamp is upstream's divisor: a centroid that was never used becomes huge, and stays unused.
            usage = module.cluster_usage.clamp(min=1e-5)[:, None]
            module.centroids = module.embed_sum / usage
            module.half_norm = module.centroids.square().sum(-1) / 2
        if isinstance(module, Transformer):
            module.frequencies = rotary_frequencies(c.head_dim, c.rope_theta).to(device)
    return codec.eval().requires_grad_(False)
