"""Make the demo's codec: an AudioVAE whose weights are set, not trained, so that it is a linear transform.

    python demo/make_codec.py    # after make_speech.py; base.yaml starts from what it makes, runs/demo/blank

Blocks of 80 ms of the robots' speech lie near a plane (demo/robot.py says why). Principal components find
it, and the layers of the published class can be made to say nothing but that: the snakes so flat that they
are nearly linear, the residual units without their sum, the first strides as polyphase components, and the
last stride as the product with the components. So it is a codec for these robots and for nothing else;
other sounds come out as the nearest robot.

    wav --first strides: 64 samples become 64 channels--> --last stride: components--> latents, 12.5 a second
"""
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import configs
from demo.robot import BLOCK
from models.codecs import audiovae
from models.parts import Invalid, audio, opt

HERE = Path(__file__).resolve().parent
FLAT = 1e-4  # alpha of the snakes: x + sin(ax)^2 / a is x + a x^2 for small a
TINY = 1e-5  # a row of zeros has no direction, and the published file holds direction and length of each row


@dataclass
class MakeCodec:
    """Set the weights of the demo's codec."""
    speech: list[str] = opt(["runs/demo/speech/base.jsonl", "demo/voice/voice.jsonl"], "manifests of robots' speech")
    target_share: float = opt(0.25, "weight of the last manifest, the target voice, among all")
    clips: int = opt(600, "clips of each manifest at most")
    recipe: str = opt("demo/base", "folder of config.json and tokenizer")
    output_dir: str = opt("runs/demo/blank", "folder for the codec, beside copies of config.json and tokenizer")


# ------------------------------------------------------------------------------------------------ components


def blocks_of(manifest, most):
    """(blocks, BLOCK) samples of the clips of a manifest."""
    folder, blocks = Path(manifest).parent, []
    if not Path(manifest).is_file():
        raise Invalid(f"no file at {manifest}; demo/make_speech.py makes it")
    for line in Path(manifest).read_text(encoding="utf-8").splitlines()[:most]:
        wave = audio.read(folder / json.loads(line)["audio"])[0].numpy()
        blocks.append(wave[:len(wave) // BLOCK * BLOCK].reshape(-1, BLOCK).astype(np.float64))
    return np.concatenate(blocks)


def components(parts, shares):
    """Variances and directions of the parts' blocks, each part weighted by its share; largest first."""
    mean = sum(share * blocks.T @ blocks / len(blocks) for blocks, share in zip(parts, shares))
    variances, directions = np.linalg.eigh(mean)
    variances, directions = variances[::-1], directions[:, ::-1]
    largest = np.abs(directions).argmax(0)
    signs = np.sign(directions[largest, np.arange(len(largest))])  # else the sign is the library's whim
    return variances, directions * signs


# ------------------------------------------------------------------------------------------------ weights


def set_weights(codec, variances, directions):
    """Make the codec the transform onto its first components.

    Each latent is scaled so that its deviation falls with the fourth root of its variance, mean square 1: a
    model that predicts latents should see that some matter more, but not by as much as they do.
    """
    D = codec.latent_dim
    deviation = np.sqrt(variances[:D])
    wanted = np.sqrt(deviation)
    wanted = wanted / np.sqrt((wanted**2).mean())
    plane = torch.tensor(directions[:, :D].T.copy())  # (D, BLOCK)
    scale = torch.tensor(wanted / deviation)[:, None]
    analysis, synthesis = (plane * scale).float(), (plane / scale).float()
    with torch.no_grad():
        for name, parameter in codec.named_parameters():
            if name.endswith("alpha"):
                parameter.fill_(FLAT)
            else:
                parameter.zero_()
        set_encoder(codec.encoder, analysis)
        set_decoder(codec.decoder.model, synthesis)
        for layer in codec.modules():
            if isinstance(layer, (nn.Conv1d, nn.ConvTranspose1d)):
                fill_rows_of_zeros(layer.weight)
    return codec


def set_encoder(encoder, analysis):
    D = len(analysis)
    encoder.block[0].weight[0, 0, -1] = 1  # the newest sample, in channel 0
    carried = 1  # channels that hold samples side by side
    for stage in encoder.block[1:-1]:
        carried = gather(stage.block[-1], carried)
    last = encoder.block[-1].block[-1]
    stride = last.stride[0]
    # Of a kernel of two strides, the newer half is the block itself.
    last.weight[:D, :carried, stride:] = analysis.view(D, stride, carried).transpose(1, 2)
    encoder.fc_mu.weight[range(D), range(D), -1] = 1


def gather(layer, carried):
    """A stride as polyphase: its samples side by side in as many times more channels. Returns how many
    those are.
    """
    stride = layer.stride[0]
    for step in range(stride):
        for channel in range(carried):
            layer.weight[step * carried + channel, channel, stride + step] = 1
    return carried * stride


def set_decoder(layers, synthesis):
    D = len(synthesis)
    layers[0].weight[:, 0, -1] = 1
    layers[1].weight[range(D), range(D), 0] = 1
    first, *stages = [layer.block[1] for layer in layers[2:-2]]
    carried = BLOCK // first.stride[0]
    # Of the two strides that an input reaches, it speaks in the first only.
    first.weight[:D, :carried, :first.stride[0]] = synthesis.view(D, first.stride[0], carried).transpose(1, 2)
    for stage in stages:
        carried = spread(stage, carried)
    layers[-1].weight[0, 0, -1] = 1


def spread(layer, carried):
    """The mirror of gather: channels become samples."""
    rest = carried // layer.stride[0]
    for step in range(layer.stride[0]):
        for channel in range(rest):
            layer.weight[step * rest + channel, channel, step] = 1
    return rest


def fill_rows_of_zeros(weight):
    """Zeros would be divided by their length of zero when the file is read; so little noise cannot be
    heard.
    """
    rows = weight.flatten(1)
    empty = rows.norm(dim=1) == 0
    drawn = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
    rows[empty] = TINY * drawn[empty]


# --------------------------------------------------------------------------------------------- command line


def signal_to_noise(codec, blocks):
    """dB, over what the codec makes of some blocks in a row."""
    wave = torch.tensor(blocks[:300].reshape(-1), dtype=torch.float32)
    noise = codec.decode(codec.encode(wave)) - wave
    return float(10 * torch.log10(wave.square().sum() / noise.square().sum()))


def main():
    cfg = configs.parse(MakeCodec)
    folder, recipe = Path(cfg.output_dir), Path(cfg.recipe)
    config = json.loads((recipe / "config.json").read_text(encoding="utf-8"))
    numbers = audiovae.settings(config["audio_vae_config"], audiovae.V1)
    codec = audiovae.AudioVAE(**numbers).requires_grad_(False)
    if codec.hop != BLOCK:
        where = recipe / "config.json"
        raise Invalid(f"{where}: the codec's frames are {codec.hop} samples, the robots' blocks {BLOCK}")
    parts = [blocks_of(manifest, cfg.clips) for manifest in cfg.speech]
    others = (1 - cfg.target_share) / max(1, len(parts) - 1)
    shares = [others] * (len(parts) - 1) + [cfg.target_share]
    set_weights(codec, *components(parts, shares))
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(recipe / name, folder / name)
    weights = {name: tensor.contiguous() for name, tensor in codec.published_state_dict().items()}
    save_file(weights, folder / "audiovae.safetensors", {"format": "pt"})
    codec = audiovae.load(folder, config["audio_vae_config"])
    for manifest, blocks in zip(cfg.speech, parts):
        print(f"{manifest}: {signal_to_noise(codec, blocks):.1f} dB through the codec")
    size = sum(parameter.numel() for parameter in codec.parameters())
    print(f"{size / 1e6:.2f} million weights in {folder / 'audiovae.safetensors'}")


if __name__ == "__main__":
    configs.run(main)
