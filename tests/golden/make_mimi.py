"""Golden tensors of Mimi from the package of its authors: pip install -r tests/golden/requirements_mimi.txt, then

    python tests/golden/make_mimi.py

Every tensor of the file is filled from a hash of its name; stored are the wave, the codes and what they decode to.
"""
import json
import sys
import tempfile
from pathlib import Path

import torch
from moshi.models import loaders
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
from tests import tiny  # noqa: E402

WIDTH, HEADS, WINDOW, CODEBOOKS = 32, 2, 20, 6
CONFIG = {
    "sample_rate": 1200,
    "channels": 1,
    "frame_rate": 100,
    "seanet": dict(loaders._seanet_kwargs, dimension=WIDTH, n_filters=4, ratios=[3, 2]),
    "quantizer": dict(dimension=8, n_q=CODEBOOKS, bins=32, input_dimension=WIDTH, output_dimension=WIDTH),
    "transformer": dict(loaders._transformer_kwargs, d_model=WIDTH, num_heads=HEADS, num_layers=2, context=WINDOW,
                        dim_feedforward=48, input_dimension=WIDTH, output_dimensions=[WIDTH]),
}


def main():
    torch.manual_seed(0)
    mimi = loaders.get_mimi(None, CONFIG, num_codebooks=CODEBOOKS)
    in_file = {n: n.replace("in_projs.0.weight", "in_proj_weight").replace("out_projs.0.weight", "out_proj.weight")
               for n in mimi.state_dict()}
    shapes = {in_file[n]: list(t.shape) for n, t in mimi.state_dict().items()}
    with tempfile.TemporaryDirectory() as tmp:
        path = Path(tmp) / "mimi.safetensors"
        weights = {n: t - 1 if n.endswith("bias") else t for n, t in tiny.fill(shapes).items()}  # biases around 0
        save_file(weights, path)
        mimi = loaders.get_mimi(path, CONFIG, num_codebooks=CODEBOOKS)
    wav = torch.randn(12 * 60)
    with torch.no_grad():
        codes = mimi.encode(wav[None, None])[0]
        decoded = mimi.decode(codes[None])[0, 0]
        mimi.set_num_codebooks(3)
        decoded_3 = mimi.decode(mimi.encode(wav[None, None]))[0, 0]
    tensors = dict(wav=wav, codes=codes.to(torch.int16), decoded=decoded, decoded_3=decoded_3)
    settings = {"num_attention_heads": HEADS, "sliding_window": WINDOW}
    save_file({k: v.contiguous() for k, v in tensors.items()}, HERE / "mimi.safetensors",
              {"shapes": json.dumps(shapes), "settings": json.dumps(settings)})
    print({k: tuple(v.shape) for k, v in tensors.items()}, "codes in use:", len(codes.unique()))


main()
