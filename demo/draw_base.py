"""Draw demo/base: a very small VoxCPM in the published layout with random weights, so that every command has a checkpoint to run on.

    python demo/draw_base.py

It cannot speak: what comes out is noise. The same model trained (demo/base.yaml) is to take its place.
"""
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from models import voxcpm
from models.codecs import audiovae

SMALLER = {"lm_config": {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4},
           "encoder_config": {"hidden_dim": 64, "ffn_dim": 128, "num_heads": 4, "num_layers": 1},
           "dit_config": {"hidden_dim": 64, "ffn_dim": 128, "num_heads": 4, "num_layers": 2},
           "audio_vae_config": {"encoder_dim": 4, "encoder_rates": [2, 5, 8, 8], "decoder_dim": 64, "decoder_rates": [8, 8, 5, 2], "depthwise": True}}


def main(folder=HERE / "base"):
    torch.manual_seed(0)
    config = json.loads((HERE / "recipe" / "config.json").read_text())
    for section, values in SMALLER.items():
        config[section].update(values)
    # The local stacks have heads of 16, the language models of 24: no shared rotary factors, so none are given.
    model = voxcpm.VoxCPM(voxcpm.read_config(config, "demo/recipe/config.json"))
    voxcpm.draw(model)
    codec = audiovae.AudioVAE(**audiovae.settings(config["audio_vae_config"], audiovae.V1))
    folder.mkdir(exist_ok=True)
    save_file({k: v.to(torch.bfloat16) for k, v in model.state_dict().items()}, folder / "model.safetensors", {"format": "pt"})
    save_file({k: v.contiguous() for k, v in codec.published_state_dict().items()}, folder / "audiovae.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(HERE / "recipe" / name, folder / name)


if __name__ == "__main__":
    main()
