"""BigVGAN v2 by its own code: python tests/golden/make_bigvgan.py BIGVGAN_FOLDER

BIGVGAN_FOLDER is a checkout of NVIDIA/BigVGAN at 7d2b454. Weights are filled from a hash of each name, the filters
are those that BigVGAN computes; stored are one filter, the mel and the samples. Writes bigvgan.safetensors.
"""
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
sys.path[:0] = [sys.argv[1], str(HERE.parent.parent)]
from bigvgan import BigVGAN  # noqa: E402
from env import AttrDict  # noqa: E402

from tests import tiny  # noqa: E402

CONFIG = {
    "resblock": "1", "upsample_rates": [4, 2, 2], "upsample_kernel_sizes": [8, 4, 4], "upsample_initial_channel": 24,
    "resblock_kernel_sizes": [3, 7], "resblock_dilation_sizes": [[1, 3, 5], [1, 2]], "use_tanh_at_final": False,
    "use_bias_at_final": False, "activation": "snakebeta", "snake_logscale": True, "num_mels": 6, "sampling_rate": 22050}
CENTRED = ("bias", "alpha", "beta")


@torch.no_grad()
def main():
    torch.manual_seed(0)
    mel = torch.randn(2, 6, 40)
    out = {"mel": mel}
    for name, change in (("clamp", {}), ("tanh", {"use_tanh_at_final": True, "use_bias_at_final": True})):
        model = BigVGAN(AttrDict({**CONFIG, **change})).eval()
        own = {n: list(t.shape) for n, t in model.state_dict().items()}
        values = tiny.fill({n: s for n, s in own.items() if not n.endswith("filter")})
        values = {n: t - 1 if n.endswith(CENTRED) else t for n, t in values.items()}
        values["conv_post.weight_g"] = values["conv_post.weight_g"] * 0.2  # else most samples are clamped
        model.load_state_dict(values, strict=False)
        if name == "clamp":
            shapes, out["filter"] = own, model.activation_post.upsample.filter
        out[name] = model(mel)[:, 0]
    save_file({k: v.contiguous() for k, v in out.items()}, HERE / "bigvgan.safetensors",
              {"shapes": json.dumps(shapes), "config": json.dumps(CONFIG)})
    print({k: (tuple(v.shape), float(v.std())) for k, v in out.items()}, float((out["clamp"].abs() == 1).float().mean()), out["filter"])


main()
