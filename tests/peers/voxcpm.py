"""VoxCPM beside the voxcpm package with its own LoRA, in turns, on random weights of one shape.

    python -m tests.peers.voxcpm --venv .venv-voxcpm --size mid --lengths 2,3,5,8,12 --threads 2

Without more, latents are given to both; --as_used has the package encode the audio in its step, as its
trainer does. Speaking is --task generate --batch 1 --seconds 3. --version 0.5, 1.5 or 2.

To install: nothing by hand. --venv makes the environment that it names, with the versions of
requirements_voxcpm.txt and voxcpm 2.0.3; a second run finds it there. The last line that is printed says how
long each takes and the ratio. As in its own trainer the package keeps float32 weights, under bfloat16
autocast on a GPU; on a GPU its generate() is compiled.
"""
import contextlib
import importlib.machinery
import io
import sys
import types
from typing import NamedTuple

import torch

import configs
from models import voxcpm
from tests.peers import turns

FILES_ONLY = ("torchaudio", "librosa")  # the package imports these at the start and uses them to read files


def package():
    """The package's modules for versions 1 (0.5B, 1.5) and 2, and its codec."""
    for name in FILES_ONLY:
        try:
            __import__(name)
        except (ImportError, OSError):  # absent, or a compiled part that fits another torch
            stand_in = types.ModuleType(name)
            stand_in.__spec__ = importlib.machinery.ModuleSpec(name, None)
            sys.modules[name] = stand_in
    with quiet():
        from voxcpm.model import voxcpm as first  # only where the peer runs
        from voxcpm.model import voxcpm2 as second
        from voxcpm.modules import audiovae
    return first, second, audiovae


@contextlib.contextmanager
def quiet():
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


class Letters:
    """A tokenizer that makes one token of each letter, as bench.py's does."""

    vocab = {}

    def __call__(self, text, **_):
        return [7] * len(text)

    def tokenize(self, text, **_):
        return list(text)

    def convert_tokens_to_ids(self, pieces):
        return [7] * len(pieces)


LM = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
      "vocab_size", "rms_norm_eps", "rope_theta", "max_position_embeddings", "use_mup")
LOCAL = ("hidden_dim", "ffn_dim", "num_heads", "num_layers")
WHOLE = ("patch_size", "feat_dim", "residual_lm_num_layers", "scalar_quantization_latent_dim", "max_length")
# Asked for by the package, and without effect where use_mup is off.
ASIDE = {"bos_token_id": 1, "eos_token_id": 2, "scale_emb": 12, "dim_model_base": 256, "scale_depth": 1.4}
FLOW = {"sigma_min": 1e-6, "solver": "euler", "t_scheduler": "log-norm", "inference_cfg_rate": 2.0}


def settings_of(config, device, dtype):
    """A Config of models/voxcpm.py as the package's config.json has it."""
    lm = {**ASIDE, **{name: getattr(config.lm_config, name) for name in LM}}
    lm["rope_scaling"] = {"type": "longrope", **config.lm_config.rope_scaling}
    local = {name: getattr(config.encoder_config, name) for name in LOCAL}
    if config.lm_config.kv_channels:
        lm["kv_channels"] = local["kv_channels"] = config.lm_config.kv_channels
    whole = {name: getattr(config, name) for name in WHOLE}
    if config.fused:
        whole["residual_lm_no_rope"] = config.residual_lm_no_rope
    whole["lm_config"], whole["encoder_config"] = lm, local
    whole["dit_config"] = {**local, "cfm_config": FLOW}
    whole["device"], whole["dtype"] = device.type, str(dtype).removeprefix("torch.")
    return whole


def model_of(cfg, device, dtype, lora):
    """The package's model in the shape that bench.py builds for the same flags, and that shape."""
    first, second, audiovae = package()
    config, codec = voxcpm.shape(cfg.size, cfg.version)
    module = second if config.fused else first
    make = second.VoxCPM2Model if config.fused else first.VoxCPMModel
    adapter = module.LoRAConfig(enable_lm=True, enable_dit=True, r=cfg.rank, alpha=cfg.rank) if lora else None
    settings = module.VoxCPMConfig(**settings_of(config, device, dtype))
    with quiet():
        vae = codec_of(audiovae, codec, config.fused)
        return make(settings, Letters(), vae, adapter, device=device.type), config


def codec_of(audiovae, arguments, two):
    settings, make = audiovae.AudioVAEConfig, audiovae.AudioVAE
    if two:
        settings, make = audiovae.AudioVAEConfigV2, audiovae.AudioVAEV2
    known = {name: value for name, value in arguments.items() if name in settings.model_fields}
    return make(config=settings(**known))


class Rows(NamedTuple):
    """A batch of the package, padded on the right with zeros: text with its 101, patches, 102."""

    tokens: torch.Tensor  # (B, L)
    written: torch.Tensor  # (B, L), 1 where there is text
    latents: torch.Tensor  # (B, L, P, D)
    spoken: torch.Tensor  # (B, L), 1 where there is a patch
    ends: torch.Tensor  # (B, L), 1 at the last patch


def rows_of(sizes, config):
    """Random rows of [(patches, text with its 101)]."""
    B, width = len(sizes), max(patches + text for patches, text in sizes) + 1
    tokens, ends = torch.zeros(2, B, width, dtype=torch.long)
    spoken, written = torch.zeros(2, B, width)
    for row, (patches, text) in enumerate(sizes):
        tokens[row, :text] = torch.randint(3, 250, (text,))
        written[row, :text] = 1
        written[row, text + patches] = 1
        spoken[row, text : text + patches] = 1
        ends[row, text + patches - 1] = 1
    latents = torch.randn(B, width, config.patch_size, config.feat_dim) * spoken[..., None, None]
    return Rows(tokens, written, latents, spoken, ends)


def train(cfg, device, dtype):
    """A step of the package's training forward, with its LoRA unless --full."""
    model, config = model_of(cfg, device, dtype, lora=not cfg.full)
    codec = model.audio_vae
    del model.audio_vae  # as the trainer does: it is not trained
    for name, p in model.named_parameters():
        p.requires_grad_(cfg.full or "lora_" in name)
    model.to(device).train()
    patch = config.patch_size * codec.hop_length  # samples
    rate = codec.sample_rate / patch
    sizes = [(max(1, round(seconds * rate)), text + 1) for seconds, text in turns.clips(cfg)]
    rows = Rows(*(t.to(device) for t in rows_of(sizes, config)))
    encoded = sizes if cfg.as_used else []
    waves = [0.1 * torch.randn(1, 1, patches * patch, device=device) for patches, _ in encoded]

    def loss():
        with torch.no_grad():
            for wave in waves:  # one by one, as its packer does
                codec.encode(wave, codec.sample_rate)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = model(*rows[:4], rows.spoken, rows.ends, rows.ends)
        return out["loss/diff"] + out["loss/stop"]

    return turns.training((p for p in model.parameters() if p.requires_grad), loss, device)


def generate(cfg, device, dtype):
    """The package's generate(), as many patches as bench.py speaks; one request, for it takes no more."""
    if cfg.batch != 1:
        raise configs.Usage(f"--batch {cfg.batch}: the package speaks one text at a time; say --batch 1")
    model, config = model_of(cfg, device, dtype, lora=False)
    rate = model.audio_vae.sample_rate / model.audio_vae.hop_length / config.patch_size
    patches = max(4, round(cfg.seconds * rate))
    with quiet():
        model = model.to(device, dtype).eval().optimize(disable=device.type != "cuda")
    model.audio_vae.to(torch.float32)  # as the package keeps its codec
    _, text = turns.clips(cfg)[0]
    how = {"min_len": patches - 2, "max_len": patches,
           "inference_timesteps": cfg.timesteps or voxcpm.Sampling.inference_timesteps}

    def step():
        with quiet():
            model.generate(target_text="x" * text, **how)

    return step


def build(cfg, device, dtype):
    if cfg.task == "encode":
        raise configs.Usage("--task encode: this script compares training and speaking")
    return train(cfg, device, dtype) if cfg.task == "train" else generate(cfg, device, dtype)


PEER = turns.Peer("voxcpm", "tests.peers.voxcpm", build, "requirements_voxcpm.txt", ("voxcpm==2.0.3",))

if __name__ == "__main__":
    sys.exit(configs.run(lambda: turns.compare(PEER)))
