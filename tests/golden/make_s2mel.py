"""IndexTTS2's semantic-to-mel model and CAM++ by their own code: python tests/golden/make_s2mel.py INDEX_TTS_FOLDER

INDEX_TTS_FOLDER is a checkout of index-tts/index-tts at ee40fa7. Weights are filled from a hash of each name; stored
are inputs and outputs. Writes s2mel.safetensors and campplus.safetensors beside this script.
"""
import json
import sys
import types
from pathlib import Path

import torch
from munch import munchify
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
sys.path[:0] = [sys.argv[1], str(HERE.parent.parent)]
codec = types.ModuleType("indextts.s2mel.dac.nn.quantize")  # imported by the regulator, used in none of the published settings
codec.VectorQuantize = None
for name in ("indextts.s2mel.dac", "indextts.s2mel.dac.nn", codec.__name__):
    sys.modules[name] = codec
from indextts.s2mel.modules.campplus.DTDNN import CAMPPlus  # noqa: E402
from indextts.s2mel.modules.flow_matching import CFM  # noqa: E402
from indextts.s2mel.modules.length_regulator import InterpolateRegulator  # noqa: E402

from tests import tiny  # noqa: E402

SECTION = {
    "dit_type": "DiT", "reg_loss_type": "l1", "style_encoder": {"dim": 6},
    "DiT": dict(hidden_dim=32, num_heads=2, depth=5, class_dropout_prob=0.1, block_size=8192, in_channels=8, style_condition=True,
                final_layer_type="wavenet", content_dim=12, content_codebook_size=10, content_type="discrete", is_causal=False,
                long_skip_connection=True, zero_prompt_speech_token=False, time_as_token=False, style_as_token=False,
                uvit_skip_connection=True),
    "wavenet": dict(hidden_dim=32, num_layers=3, kernel_size=5, dilation_rate=1, p_dropout=0.2, style_condition=True)}
REGULATOR = dict(channels=12, sampling_ratios=[1, 1, 1, 1], is_discrete=False, in_channels=10, codebook_size=9)
CENTRED = ("bias", "running_mean")


def fill(modules):
    """Fill the modules from their names; what computes itself (frequencies, positions, counters) stays."""
    shapes = {}
    for prefix, module in modules.items():
        own = {n: list(t.shape) for n, t in module.state_dict().items()
               if t.is_floating_point() and not n.endswith("freqs")}
        values = tiny.fill({prefix + n: s for n, s in own.items()})
        values = {n: t - 1 if n.endswith(CENTRED) else t / 2 if n.endswith("running_var") else t for n, t in values.items()}
        module.load_state_dict({n: values[prefix + n] for n in own}, strict=False)
        module.eval()
        shapes.update({prefix + n: [list(t.shape), str(t.dtype).removeprefix("torch.")] for n, t in module.state_dict().items()})
    return shapes


@torch.no_grad()
def make_s2mel():
    cfm, regulator = CFM(munchify(SECTION)), InterpolateRegulator(**REGULATOR)
    gpt_layer = torch.nn.Sequential(torch.nn.Linear(14, 7), torch.nn.Linear(7, 5), torch.nn.Linear(5, 10))
    cfm.estimator.setup_caches(max_batch_size=1, max_seq_length=64)
    shapes = fill({"cfm.": cfm, "length_regulator.": regulator, "gpt_layer.": gpt_layer})
    shape = {"vectors": (1, 50, 10), "states": (1, 50, 14), "x": (1, 8, 31), "prompt": (1, 8, 11), "style": (1, 6)}
    out = {name: torch.randn(s) for name, s in shape.items()}
    vectors, states, x, prompt, style = out.values()
    out["gpt_layer"] = gpt_layer(states)
    for n, frames in ((9, 15), (50, 86), (7, 31)):
        out[f"regulated.{n}.{frames}"] = regulator(vectors[:, :n] + gpt_layer(states[:, :n]), ylens=torch.tensor([frames]), n_quantizers=3)[0]
    content, lengths = out["regulated.7.31"], torch.tensor([31])
    padded = torch.nn.functional.pad(prompt, (0, 20))
    out["flow"] = cfm.estimator(x, padded, lengths, torch.tensor([0.37]), style, content)
    for steps, rate in ((4, 0.7), (25, 0.7), (3, 0.0)):
        times = torch.linspace(0, 1, steps + 1)
        out[f"mel.{steps}.{rate}"] = cfm.solve_euler(x.clone(), lengths, prompt, content, style, None, times, rate)
    freqs = {"cfm.estimator.t_embedder.freqs": cfm.estimator.t_embedder.freqs}
    save_file({k: v.contiguous() for k, v in {**out, **freqs}.items()}, HERE / "s2mel.safetensors",
              {"shapes": json.dumps(shapes), "section": json.dumps(SECTION)})
    print({k: tuple(v.shape) for k, v in out.items()}, {k: float(v.std()) for k, v in out.items()})


@torch.no_grad()
def make_campplus():
    model = CAMPPlus(feat_dim=16, embedding_size=6, growth_rate=4, bn_size=4, init_channels=10)
    shapes = fill({"": model})
    features = torch.randn(1, 263, 16) + torch.linspace(-1, 1, 263)[:, None]
    out = {f"style.{T}": model(features[:, :T]) for T in (263, 200, 3)}
    save_file({"features": features, **out}, HERE / "campplus.safetensors", {"shapes": json.dumps(shapes)})
    print(out)


torch.manual_seed(0)
make_s2mel()
make_campplus()
