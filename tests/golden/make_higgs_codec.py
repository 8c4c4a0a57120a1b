"""Make higgs_codec.safetensors with Boson AI's own audio tokenizer (PyPI boson_multimodal 0.1.1).

Its constructor fixes every width and downloads HuBERT, so the object is put together here from its own modules at
tiny widths, with the numbers that the constructor would have worked out, and with the HubertModel of transformers,
which is what it loads too. The encode and decode that run are its own, untouched. Only `gap` is computed here, from
its layers: it says which codes are a matter of rounding.

    pip install -r tests/golden/requirements_higgs_codec.txt; python tests/golden/make_higgs_codec.py
"""
import math
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import HubertConfig, HubertModel

from boson_multimodal.audio_processing import higgs_audio_tokenizer as boson

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tiny import fill_by_name  # noqa: E402

RATIOS, D, WIDTH, SEMANTIC = [8, 5, 4, 2, 3], 6, 4, 24
LENGTHS = [2880, 2998, 2999, 3511, 3512, 3700]  # remainders 0, 118, 119, 631, 632, 820 of 960: both sides of the repair


def tokenizer():
    t = boson.HiggsAudioTokenizer.__new__(boson.HiggsAudioTokenizer)
    nn.Module.__init__(t)
    t.hop_length, t.frame_rate, t.n_q, t.device = math.prod(RATIOS), 25, 8, "cpu"
    t.sample_rate, t.semantic_sample_rate, t.semantic_downsample_factor = 24000, 16000, 2
    t.semantic_techer, t.last_layer_semantic, t.downsample_mode, t.quantizer_type = "hubert_base_general", True, "step_down", "RVQ"
    t.encoder = boson.dac2.Encoder(WIDTH, RATIOS, D)
    t.decoder_2 = boson.dac2.Decoder(D, 64, RATIOS)
    t.semantic_model = HubertModel(HubertConfig(hidden_size=SEMANTIC, num_hidden_layers=3, num_attention_heads=12, intermediate_size=32,
                                                conv_dim=(8,) * 7, num_conv_pos_embedding_groups=4))
    t.encoder_semantic = boson.Encoder(input_channels=SEMANTIC, encode_channels=SEMANTIC)
    t.decoder_semantic = boson.Decoder(code_dim=SEMANTIC, output_channels=SEMANTIC, decode_channels=SEMANTIC)
    t.quantizer = boson.ResidualVectorQuantizer(dimension=D + SEMANTIC, codebook_dim=5, n_q=8, bins=32)
    t.fc_prior = nn.Linear(D + SEMANTIC, D + SEMANTIC)
    t.fc_post1 = nn.Linear(D + SEMANTIC, SEMANTIC)
    t.fc_post2 = nn.Linear(D + SEMANTIC, D)
    t.audio_tokenizer_feature_extractor = boson.HiggsAudioFeatureExtractor(sampling_rate=24000)
    fill_by_name(t)
    with torch.no_grad():
        for name, p in t.named_parameters():  # calmer: a deep stack of sin² of large numbers is chaos, not a comparison
            if name.endswith("bias"):
                p -= 1
            if name.endswith("weight_g"):
                p *= 0.7
    return t.eval()


def main():
    t = tokenizer()
    at = torch.arange(max(LENGTHS)) / 24000
    g = torch.Generator().manual_seed(0)
    wave = (torch.sin(2 * math.pi * (150 * at + 900 * at**2)) + 0.5 * torch.sin(2 * math.pi * 2300 * at)) * 0.2
    wave = wave * (0.6 + 0.4 * torch.sin(2 * math.pi * 11 * at)) + 0.02 * torch.randn(len(at), generator=g)
    out, before = {"wave": wave}, {}
    t.fc_prior.register_forward_hook(lambda m, i, o: before.update(x=o))
    with torch.no_grad():
        for n in LENGTHS:
            out[f"codes.{n}"] = t.encode(wave[:n].numpy(), sr=24000)
            out[f"features.{n}"] = before["x"][0]
            out[f"sound.{n}"] = torch.from_numpy(t.decode(out[f"codes.{n}"][None]))[0, 0, :2000]
            x, gaps = before["x"].transpose(1, 2), []  # how far the best row is ahead of the second, per stage and frame
            for layer in t.quantizer.vq.layers:
                distance = torch.cdist(layer.project_in(x.transpose(1, 2)), layer.codebook[None]) ** 2
                best = distance.sort(-1).values[0]
                gaps.append(best[:, 1] - best[:, 0])
                x = x - layer.decode(layer.encode(x))
            out[f"gap.{n}"] = torch.stack(gaps)
        # Quiet: the normalisation of HuBERT's first layer must show its eps.
        t.encode(0.003 * wave[:2880].numpy(), sr=24000)
        out["features.quiet"] = before["x"][0]
    state = {"names": torch.tensor([len(t.state_dict())])}
    save_file({k: v.contiguous() for k, v in {**out, **state}.items()}, Path(__file__).with_name("higgs_codec.safetensors"))
    print({k: list(v.shape) for k, v in out.items()}, min(float(v.min()) for k, v in out.items() if k.startswith("gap")))


if __name__ == "__main__":
    main()
