"""Make repcodec.safetensors with Amphion's own RepCodec at tiny widths; the oracle is its quantize, untouched.

    git clone https://github.com/open-mmlab/Amphion && git -C Amphion checkout d3de90f02e7f1c7dbc24b04d52fe1b8ef438effe
    pip install -r tests/golden/requirements_repcodec.txt; python tests/golden/make_repcodec.py Amphion
"""
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, sys.argv[1])
sys.path.append(str(Path(__file__).resolve().parent.parent))
from models.codec.kmeans.repcodec_model import RepCodec  # noqa: E402
from tiny import fill_by_name  # noqa: E402


def main():
    codec = RepCodec(codebook_size=64, hidden_size=20, codebook_dim=5, vocos_dim=12, vocos_intermediate_dim=28, vocos_num_layers=3)
    fill_by_name(codec).eval()
    with torch.no_grad():
        for name, p in codec.named_parameters():
            if name.endswith("bias"):
                p -= 1  # near zero: biases near one leave the latents no direction to go
    x = torch.randn(2, 30, 20, generator=torch.Generator().manual_seed(0))
    x[:, ::3] *= 1e-3  # the eps of the norms must show
    with torch.no_grad():
        before = codec.encoder(x.transpose(1, 2))
        codes, vectors = codec.quantize(x)
        distance = (-codec.quantizer.quantizers[0].latent2dist(codec.quantizer.quantizers[0].in_project(before.transpose(1, 2)))[0])
        best = distance.sort(-1).values
        embedded = codec.quantizer.vq2emb(torch.arange(64)[None, None])[0]
    out = {"x": x, "before": before, "codes": codes, "vectors": vectors,
           "gap": best[..., 1] - best[..., 0], "embedded": embedded.T}
    save_file({k: v.contiguous() for k, v in out.items()}, Path(__file__).with_name("repcodec.safetensors"))
    print({k: list(v.shape) for k, v in out.items()}, float(out["gap"].min()), len(set(codes.flatten().tolist())), len(codec.state_dict()))


if __name__ == "__main__":
    main()
