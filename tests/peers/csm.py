"""CSM beside transformers' CsmForConditionalGeneration with peft's LoRA, in turns, on random weights of one
shape.

    python -m tests.peers.csm --size mid --lengths 2,3,5,8,12 --threads 2

Without more, codes are given to both and the depth decoders learn from one frame in 16; --options.amortize 1
shows them all frames. --as_used has Mimi in the peer's step and all frames in its depth decoder, as recipes
for it do. Speaking is --task generate --batch 1 --seconds 3; the peer ends at the codes, which is to its
favour, and bench.py at audio.

To install: transformers and peft, which requirements-dev.txt names. --venv DIR makes an environment with the
versions of requirements_csm.txt instead. The last line that is printed says how long each takes and the
ratio.
"""
import sys
from typing import NamedTuple

import torch

import configs
from models import csm
from tests.peers import turns

LINEARS = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
FRAME_RATE, FRAME = 12.5, 1920  # Mimi's frames per second and samples of one, at 24 kHz
IGNORE = -100  # a label that no loss looks at
BACKBONE_ONLY = -101  # transformers' label of a frame that the depth decoder does not learn from
SPECIAL = 4  # ids at the end of the text table that model_of gives a meaning


TOWER = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
         "head_dim")


def tower(config):
    return {name: getattr(config, name) for name in TOWER}


def mimi(codec, codebooks):
    """Mimi's settings under transformers' names."""
    return {
        "model_type": "mimi",
        "hidden_size": codec.hidden,
        "intermediate_size": codec.ffn,
        "num_hidden_layers": codec.layers,
        "num_attention_heads": codec.num_attention_heads,
        "num_key_value_heads": codec.num_attention_heads,
        "head_dim": codec.head_dim,
        "num_filters": codec.channels[0],
        "codebook_dim": codec.codebook_dim,
        "vector_quantization_hidden_dimension": codec.codebook_dim,
        "upsample_groups": codec.upsample_groups,
        "num_quantizers": codebooks,
    }


def model_of(cfg, device, dtype):
    """transformers' model in the shape that bench.py builds for the same --size."""
    import transformers  # only where the peer runs: the process that compares need not have it

    config, codec = csm.shape(cfg.size)
    codes = {"num_codebooks": config.num_codebooks, "vocab_size": config.vocab_size}
    width = config.backbone.hidden_size
    depth = {**tower(config.depth_decoder_config), **codes, "backbone_hidden_size": width}
    last = config.text_vocab_size - 1
    special = {"audio_token_id": last, "audio_eos_token_id": last - 1}
    special |= {"pad_token_id": last - 2, "bos_token_id": last - 3}
    settings = transformers.CsmConfig(
        **tower(config.backbone), **codes, **special, text_vocab_size=config.text_vocab_size,
        depth_decoder_config=depth, codec_config=mimi(codec, config.num_codebooks))
    settings._attn_implementation = "sdpa"
    return transformers.CsmForConditionalGeneration(settings).to(device, dtype)


class Rows(NamedTuple):
    """Text, one id per frame, one for the end: padded on the left, as their processor pads it."""

    ids: torch.Tensor  # (B, L)
    attention: torch.Tensor  # (B, L), 0 in the padding
    labels: torch.Tensor  # (B, L)
    frames: list  # of each row


def rows_of(cfg, c):
    frames = [round(seconds * FRAME_RATE) for seconds, _ in turns.clips(cfg)]
    texts = [text for _, text in turns.clips(cfg)]
    width = max(text + n for text, n in zip(texts, frames)) + 1
    ids = torch.full((cfg.batch, width), c.pad_token_id)
    attention = torch.zeros_like(ids)
    for row, (text, n) in enumerate(zip(texts, frames)):
        first = width - 1 - n
        ids[row, first - text : first] = torch.randint(3, c.text_vocab_size - SPECIAL, (text,))
        ids[row, first:-1] = c.audio_token_id
        attention[row, first - text :] = 1
    ids[:, -1] = c.audio_eos_token_id
    spoken = ids == c.audio_token_id
    labels = torch.full_like(ids, IGNORE)
    labels[spoken] = c.audio_token_id
    labels[:, -1] = c.audio_eos_token_id
    amortize = 1 if cfg.as_used else cfg.options.get("amortize", csm.Training.amortize)
    labels[spoken & (torch.rand(ids.shape) >= 1 / amortize)] = BACKBONE_ONLY
    return Rows(ids, attention, labels, frames)


def loss_of_audio(model, rows, device, dtype):
    """The loss of waveforms, which the model encodes each time."""
    samples = [n * FRAME for n in rows.frames]
    waves = 0.1 * torch.randn(len(samples), 1, max(samples), device=device, dtype=dtype)
    cutoffs = torch.tensor(samples, device=device)[:, None]
    ids, attention, labels = (t.to(device) for t in rows[:3])

    def loss():
        return model(ids, waves, attention, cutoffs, labels=labels).loss

    return loss


def loss_of_codes(model, inner, rows, device):
    """The loss of codes that were made earlier, embedded here: the model itself starts from waveforms."""
    c = inner.config
    ids, attention, labels = (t.to(device) for t in rows[:3])
    spoken = ids == c.audio_token_id
    codes = torch.randint(1, 2048, (int(spoken.sum()), c.num_codebooks), device=device)
    targets = labels[..., None].repeat(1, 1, c.num_codebooks)
    targets[spoken] = codes
    targets[:, -1] = 0
    backbone_only = labels == BACKBONE_ONLY
    targets[..., 1:][backbone_only] = IGNORE

    def loss():
        embedded = inner.embed_text_tokens(ids).clone()
        embedded[spoken] = inner.backbone_model.embed_tokens(codes[None])[0]
        return model(inputs_embeds=embedded, labels=targets, attention_mask=attention).loss

    return loss


def train(cfg, device, dtype):
    """A step of training, LoRA on all linear layers of both towers unless --full."""
    import peft  # see above

    model = inner = model_of(cfg, device, dtype)
    if not cfg.full:
        targets = rf"(backbone_model|depth_decoder)\..*\.({LINEARS})"
        settings = peft.LoraConfig(r=cfg.rank, lora_alpha=cfg.rank, target_modules=targets)
        model = peft.get_peft_model(model, settings)
    inner.codec_model.requires_grad_(False)
    model.train()
    inner.codec_model.eval()
    rows = rows_of(cfg, inner.config)
    if cfg.as_used:
        loss = loss_of_audio(model, rows, device, dtype)
    else:
        loss = loss_of_codes(model, inner, rows, device)
    return turns.training((p for p in model.parameters() if p.requires_grad), loss, device)


def generate(cfg, device, dtype):
    """transformers' generate() up to the codes, as many frames as bench.py speaks."""
    model = model_of(cfg, device, dtype).eval()
    model.depth_decoder.generation_config.do_sample = True
    _, text = turns.clips(cfg)[0]
    frames = max(4, round(cfg.seconds * FRAME_RATE))
    ids = torch.randint(3, model.config.text_vocab_size - SPECIAL, (cfg.batch, text), device=device)
    how = {"max_new_tokens": frames, "do_sample": True, "output_audio": False}

    def step():
        with torch.no_grad():
            codes = model.generate(ids, attention_mask=torch.ones_like(ids), **how)
        if codes.shape[1] != frames:
            sys.exit(f"the peer made {codes.shape[1]} frames, expected {frames}; try another --seed")

    return step


def build(cfg, device, dtype):
    if cfg.task == "encode":
        raise configs.Usage("--task encode: this script compares training and speaking")
    return train(cfg, device, dtype) if cfg.task == "train" else generate(cfg, device, dtype)


PEER = turns.Peer("csm", "tests.peers.csm", build, "requirements_csm.txt")

if __name__ == "__main__":
    sys.exit(configs.run(lambda: turns.compare(PEER)))
