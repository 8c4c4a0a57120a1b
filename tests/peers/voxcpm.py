"""VoxCPM beside the voxcpm package with its own LoRA, in turns, on random weights of one shape.

    python -m tests.peers.voxcpm --venv .venv-voxcpm --size mid --lengths 2,3,5,8,12 --threads 2             # latents given to both
    python -m tests.peers.voxcpm --venv .venv-voxcpm --size mid --lengths 2,3,5,8,12 --threads 2 --as_used   # it encodes in its step
    python -m tests.peers.voxcpm --venv .venv-voxcpm --size mid --task generate --batch 1 --seconds 3 --threads 2

To install: nothing by hand. --venv makes the environment that it names, with the versions of requirements_voxcpm.txt and
voxcpm 2.0.3; a second run finds it there. The last line says how long each takes and the ratio. As its own trainer has it,
the package keeps float32 weights, under bfloat16 autocast on a GPU, and its generate() is compiled on one.
"""
import contextlib
import importlib.machinery
import io
import sys
import types

import torch

import configs
from models import voxcpm
from tests.peers import turns

FILES_ONLY = ("torchaudio", "librosa")  # the package imports these at the start and uses them to read files


def package():
    """The package's modules for versions 1 (0.5B, 1.5) and 2, with its messages kept from stdout and stderr."""
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


def model_of(cfg, device, dtype, lora):
    """The package's model in the shape that bench.py builds for the same --size and --version."""
    first, second, audiovae = package()
    config, codec = voxcpm.shape(cfg.size, cfg.version)
    two = cfg.version == "2"
    lm, local = config.lm_config, config.encoder_config
    given = {"bos_token_id": 1, "eos_token_id": 2, "scale_emb": 12, "dim_model_base": 256, "scale_depth": 1.4, "use_mup": lm.use_mup,
             "rms_norm_eps": lm.rms_norm_eps, "rope_theta": lm.rope_theta, "max_position_embeddings": lm.max_position_embeddings,
             "rope_scaling": {"type": "longrope", **lm.rope_scaling}}
    given |= {name: getattr(lm, name) for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                                                   "num_key_value_heads", "vocab_size")}
    part = {name: getattr(local, name) for name in ("hidden_dim", "ffn_dim", "num_heads", "num_layers")}
    if lm.kv_channels:
        given["kv_channels"] = part["kv_channels"] = lm.kv_channels
    flow = {"sigma_min": 1e-6, "solver": "euler", "t_scheduler": config.t_scheduler, "inference_cfg_rate": 2.0}
    whole = {"lm_config": given, "encoder_config": part, "dit_config": {**part, "cfm_config": flow}, "patch_size": config.patch_size,
             "feat_dim": config.feat_dim, "residual_lm_num_layers": config.residual_lm_num_layers, "max_length": config.max_length,
             "scalar_quantization_latent_dim": config.scalar_quantization_latent_dim, "device": device.type,
             "dtype": str(dtype).removeprefix("torch.")}
    if two:
        whole["residual_lm_no_rope"] = config.residual_lm_no_rope
    module, make = (second, "VoxCPM2Model") if two else (first, "VoxCPMModel")
    settings = module.LoRAConfig(enable_lm=True, enable_dit=True, r=cfg.rank, alpha=cfg.rank) if lora else None
    vae = codec_of(audiovae, codec, two)
    with quiet():
        return getattr(module, make)(module.VoxCPMConfig(**whole), Letters(), vae, settings, device=device.type), config


def codec_of(audiovae, arguments, two):
    settings, make = (audiovae.AudioVAEConfigV2, audiovae.AudioVAEV2) if two else (audiovae.AudioVAEConfig, audiovae.AudioVAE)
    known = {name: value for name, value in arguments.items() if name in settings.model_fields}
    with quiet():
        return make(config=settings(**known))


def train(cfg, device, dtype):
    """A step on a batch that is padded on the right: text with its 101, patches, 102."""
    model, config = model_of(cfg, device, dtype, lora=not cfg.full)
    codec = model.audio_vae
    del model.audio_vae  # as the trainer does: it is not trained
    for name, p in model.named_parameters():
        p.requires_grad_(cfg.full or "lora_" in name)
    model.to(device).train()
    P, D, hop = config.patch_size, config.feat_dim, codec.hop_length
    rows = [(max(1, round(seconds * codec.sample_rate / hop / P)), text + 1) for seconds, text in turns.clips(cfg)]
    width = max(patches + text for patches, text in rows) + 1
    tokens, ends = torch.zeros(2, cfg.batch, width, dtype=torch.long)
    spoken, written = torch.zeros(2, cfg.batch, width)
    for row, (patches, text) in enumerate(rows):
        spoken[row, text : text + patches] = 1
        written[row, :text] = written[row, text + patches] = 1
        tokens[row, :text] = torch.randint(3, 250, (text,))
        ends[row, text + patches - 1] = 1
    latents = torch.randn(cfg.batch, width, P, D) * spoken[..., None, None]
    tokens, ends, spoken, written, latents = (t.to(device) for t in (tokens, ends, spoken, written, latents))
    waves = [0.1 * torch.randn(1, 1, patches * P * hop, device=device) for patches, _ in rows] if cfg.as_used else []

    def loss():
        with torch.no_grad():
            for wave in waves:  # one by one, as its packer does
                codec.encode(wave, codec.sample_rate)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = model(tokens, written, latents, spoken, spoken, ends, ends)
        return out["loss/diff"] + out["loss/stop"]

    return turns.training(cfg, (p for p in model.parameters() if p.requires_grad), loss, device)


def generate(cfg, device, dtype):
    """The package's generate(), as many patches as bench.py speaks; one request, for it takes no more."""
    if cfg.batch != 1:
        raise configs.Usage(f"--batch {cfg.batch}: the package speaks one text at a time; compare with --batch 1")
    model, config = model_of(cfg, device, dtype, lora=False)
    codec = model.audio_vae.to(torch.float32)
    rate = codec.sample_rate / codec.hop_length / config.patch_size
    patches = max(4, round(cfg.seconds * rate))
    with quiet():
        model = model.to(device, dtype).eval().optimize(disable=device.type != "cuda")
    codec.to(torch.float32)
    (_, text), steps = turns.clips(cfg)[0], cfg.timesteps or voxcpm.Sampling.inference_timesteps

    def step():
        with quiet():
            model.generate(target_text="x" * text, min_len=patches - 2, max_len=patches, inference_timesteps=steps)

    return step


def build(cfg, device, dtype):
    if cfg.task == "encode":
        raise configs.Usage("--task encode: this script compares training and speaking")
    return train(cfg, device, dtype) if cfg.task == "train" else generate(cfg, device, dtype)


if __name__ == "__main__":
    bare = ("voxcpm==2.0.3",)
    sys.exit(configs.run(lambda: turns.compare("voxcpm", "tests.peers.voxcpm", build, "requirements_voxcpm.txt", bare)))
