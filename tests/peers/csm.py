"""CSM beside transformers' CsmForConditionalGeneration with peft's LoRA, in turns, on random weights of one shape.

    python -m tests.peers.csm --size mid --lengths 2,3,5,8,12 --threads 2              # codes given to both, one frame in 16
    python -m tests.peers.csm --size mid --lengths 2,3,5,8,12 --threads 2 --options.amortize 1       # all frames, in both
    python -m tests.peers.csm --size mid --lengths 2,3,5,8,12 --threads 2 --as_used    # Mimi in the peer's step, all its frames
    python -m tests.peers.csm --size mid --task generate --batch 1 --seconds 3 --threads 2

To install: transformers and peft, which requirements-dev.txt names; --venv DIR makes an environment with the versions of
requirements_csm.txt. The last line says how long each takes and the ratio. Speaking ends at the codes in the peer and at
audio here, which is to the peer's favour.
"""
import sys

import torch

import configs
from models import csm
from tests.peers import turns

LINEARS = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
FRAME_RATE, FRAME = 12.5, 1920  # Mimi's frames per second and samples of one, at 24 kHz
IGNORE = -100  # a label that no loss looks at
BACKBONE_ONLY = -101  # transformers' label of a frame that the depth decoder does not learn from


def tower(config):
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    return {name: getattr(config, name) for name in names}


def model_of(cfg, device, dtype):
    """transformers' model in the shape that bench.py builds for the same --size."""
    import transformers  # only where the peer runs: the process that compares need not have it

    config, codec = csm.shape(cfg.size)
    mimi = {"hidden_size": codec.hidden, "num_filters": codec.channels[0], "intermediate_size": codec.ffn,
            "num_hidden_layers": codec.layers, "num_attention_heads": codec.num_attention_heads,
            "num_key_value_heads": codec.num_attention_heads, "head_dim": codec.head_dim,
            "codebook_dim": codec.codebook_dim, "vector_quantization_hidden_dimension": codec.codebook_dim,
            "upsample_groups": codec.upsample_groups, "num_quantizers": config.num_codebooks}
    depth = {**tower(config.depth_decoder_config), "backbone_hidden_size": config.backbone.hidden_size,
             "num_codebooks": config.num_codebooks, "vocab_size": config.vocab_size}
    last = config.text_vocab_size - 1
    settings = transformers.CsmConfig(
        **tower(config.backbone), num_codebooks=config.num_codebooks, vocab_size=config.vocab_size,
        text_vocab_size=config.text_vocab_size, audio_token_id=last, audio_eos_token_id=last - 1, pad_token_id=last - 2,
        bos_token_id=last - 3, depth_decoder_config=depth, codec_config={"model_type": "mimi", **mimi})
    settings._attn_implementation = "sdpa"
    return transformers.CsmForConditionalGeneration(settings).to(device, dtype)


def train(cfg, device, dtype):
    """A step on a batch that is padded on the left, as their processor pads it."""
    import peft

    model = model_of(cfg, device, dtype)
    if not cfg.full:
        settings = peft.LoraConfig(r=cfg.rank, lora_alpha=cfg.rank, target_modules=rf"(backbone_model|depth_decoder)\..*\.({LINEARS})")
        model = peft.get_peft_model(model, settings)
    inner = model if cfg.full else model.base_model.model
    inner.codec_model.requires_grad_(False)
    model.train()
    inner.codec_model.eval()
    c = inner.config
    frames = [(round(seconds * FRAME_RATE), text) for seconds, text in turns.clips(cfg)]
    width = max(n + text + 1 for n, text in frames)
    ids = torch.full((cfg.batch, width), c.pad_token_id)
    attention = torch.zeros(cfg.batch, width, dtype=torch.long)
    for row, (n, text) in enumerate(frames):
        ids[row, -n - 1 - text : -n - 1] = torch.randint(3, c.text_vocab_size - 8, (text,))
        ids[row, -n - 1 : -1] = c.audio_token_id
        ids[row, -1] = c.audio_eos_token_id
        attention[row, -n - 1 - text :] = 1
    spoken = ids == c.audio_token_id
    labels = torch.full_like(ids, IGNORE)
    labels[spoken], labels[:, -1] = c.audio_token_id, c.audio_eos_token_id
    amortize = 1 if cfg.as_used else cfg.options.get("amortize", csm.Training.amortize)
    labels[spoken & (torch.rand(ids.shape) >= 1 / amortize)] = BACKBONE_ONLY
    if cfg.as_used:
        samples = [n * FRAME for n, _ in frames]
        batch = {"input_ids": ids, "input_values": 0.1 * torch.randn(cfg.batch, 1, max(samples)), "labels": labels,
                 "input_values_cutoffs": torch.tensor(samples)[:, None]}
        batch = {name: value.to(device) for name, value in batch.items()}
        batch["input_values"] = batch["input_values"].to(dtype)

        def loss():
            return model(**batch, attention_mask=attention.to(device)).loss
    else:
        codes = torch.randint(1, 2048, (int(spoken.sum()), c.num_codebooks), device=device)
        targets = labels[..., None].repeat(1, 1, c.num_codebooks).to(device)
        learned, spoken, ids, attention = (labels != BACKBONE_ONLY).to(device), spoken.to(device), ids.to(device), attention.to(device)
        targets[spoken], targets[:, -1] = codes, 0
        targets[~learned, 1:] = IGNORE

        def loss():
            embedded = inner.embed_text_tokens(ids).clone()
            embedded[spoken] = inner.backbone_model.embed_tokens(codes[None])[0]
            return model(inputs_embeds=embedded, labels=targets, attention_mask=attention).loss
    return turns.training(cfg, (p for p in model.parameters() if p.requires_grad), loss, device)


def generate(cfg, device, dtype):
    """transformers' generate() up to the codes, as many frames as bench.py speaks."""
    model = model_of(cfg, device, dtype).eval()
    model.depth_decoder.generation_config.do_sample = True
    _, text = turns.clips(cfg)[0]
    frames = max(4, round(cfg.seconds * FRAME_RATE))
    ids = torch.randint(3, model.config.text_vocab_size - 8, (cfg.batch, text), device=device)

    def step():
        with torch.no_grad():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=frames, do_sample=True, output_audio=False)
        if out.shape[1] != frames:
            sys.exit(f"the peer made {out.shape[1]} frames, expected {frames}; run it again with another --seed")

    return step


def build(cfg, device, dtype):
    if cfg.task == "encode":
        raise configs.Usage("--task encode: this script compares training and speaking")
    return train(cfg, device, dtype) if cfg.task == "train" else generate(cfg, device, dtype)


if __name__ == "__main__":
    sys.exit(configs.run(lambda: turns.compare("csm", "tests.peers.csm", build, "requirements_csm.txt")))
