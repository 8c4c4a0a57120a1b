"""IndexTTS2's semantic-to-mel model against its own code by golden tensors, its batches, its tensors, and bad files."""
import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from models.codecs import s2mel
from models.parts import Invalid, checkpoint
from tests import tiny
from tests.conftest import ROOT

PATH = Path(__file__).parent / "golden/s2mel.safetensors"
GOLDEN = load_file(PATH)
with safe_open(PATH, "pt") as f:
    SHAPES, SECTION = json.loads(f.metadata()["shapes"]), json.loads(f.metadata()["section"])
LAYOUT = Path(ROOT).parent / "shared/layouts/indextts2-s2mel.json"


def weights():
    """The tensors that the golden script filled in, under their published names."""
    values = tiny.fill({n: s for n, (s, dtype) in SHAPES.items() if dtype == "float32"})
    values = {n: t - 1 if n.endswith("bias") else t for n, t in values.items()}
    values["cfm.estimator.input_pos"] = torch.arange(16384)
    return {n: GOLDEN["cfm.estimator.t_embedder.freqs"].clone() if n.endswith("freqs") else t for n, t in values.items()}


def published(path, state=None, prefix="", **more):
    parts = {"cfm": {}, "length_regulator": {}, "gpt_layer": {}}
    for name, value in (weights() if state is None else state).items():
        part, _, rest = name.partition(".")
        parts[part][prefix + rest] = value
    torch.save({"net": parts, **more}, path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return s2mel.load(published(tmp_path_factory.mktemp("s2mel") / "s2mel.pth"), SECTION)


def solve(model, steps=4, rate=0.7, **change):
    given = {"content": GOLDEN["regulated.7.31"], "prompt": GOLDEN["prompt"], "style": GOLDEN["style"], "noise": GOLDEN["x"], **change}
    return model.solve(**given, steps=steps, cfg_rate=rate)


@pytest.mark.parametrize("n, frames", [(9, 15), (50, 86), (7, 31)])
def test_the_content_equals_the_original(model, n, frames):
    assert (model.gpt_layer(GOLDEN["states"]) - GOLDEN["gpt_layer"]).abs().max() < 1e-5
    got = model.content(GOLDEN["vectors"][:, :n], GOLDEN["states"][:, :n], frames if frames == 31 else None)
    assert got.shape == GOLDEN[f"regulated.{n}.{frames}"].shape
    assert (got - GOLDEN[f"regulated.{n}.{frames}"]).abs().max() < 1e-5
    vectors = GOLDEN["vectors"][:, :n] + GOLDEN["gpt_layer"][:, :n]
    assert torch.allclose(model.content(vectors, frames=frames), got, atol=1e-5)  # a prompt comes without states


def test_frames_are_counted_like_the_original():
    codes = torch.arange(1, 2000)
    assert [s2mel.frames_for(n) for n in codes.tolist()] == (codes * 1.72).long().tolist()


def test_the_flow_equals_the_original(model):
    prompt = torch.nn.functional.pad(GOLDEN["prompt"], (0, 20))
    got = model.cfm["estimator"](GOLDEN["x"], prompt, torch.tensor([31]), torch.tensor([0.37]), GOLDEN["style"], GOLDEN["regulated.7.31"])
    assert (got - GOLDEN["flow"]).abs().max() < 1e-5


@pytest.mark.parametrize("steps, rate", [(4, 0.7), (25, 0.7), (3, 0.0)])
def test_the_mel_equals_the_original(model, steps, rate):
    want, noise = GOLDEN[f"mel.{steps}.{rate}"], GOLDEN["x"].clone()
    got = solve(model, steps, rate, noise=noise)
    assert (got - want)[..., 11:].abs().max() < 2e-5 and got[..., :11].abs().max() == 0
    assert torch.equal(noise, GOLDEN["x"])  # the caller's noise can be replayed
    assert (got - GOLDEN["mel.4.0.7"])[..., 11:].abs().max() > 0.01 or (steps, rate) == (4, 0.7)


def test_a_row_comes_out_the_same_alone_and_in_a_batch(model):
    content, prompt, noise = GOLDEN["regulated.7.31"], GOLDEN["prompt"], GOLDEN["x"]
    long = solve(model)
    short = solve(model, content=content[:, :17], prompt=prompt[..., :6], noise=noise[..., :17])
    rubbish = torch.full((1, 14, 12), 9.0)
    both = solve(model, content=torch.cat([content, torch.cat([content[:, :17], rubbish], 1)]), prompt=prompt.repeat(2, 1, 1),
                 style=GOLDEN["style"].repeat(2, 1), noise=noise.repeat(2, 1, 1), lengths=[31, 17], prompt_lengths=[11, 6])
    assert (both[:1] - long).abs().max() < 1e-5
    assert (both[1:, :, :17] - short).abs().max() < 1e-5 and both[1, :, 17:].abs().max() == 0


def test_every_tensor_changes_the_mel_and_the_others_are_listed(model):
    vectors, states = GOLDEN["vectors"][:, :12], GOLDEN["states"][:, :12]

    def run():
        return solve(model, 2, content=model.content(vectors, states, 31))

    before, noise = run(), torch.Generator().manual_seed(2)
    for name, value in model.state_dict(keep_vars=True).items():
        kept = value.data.clone()
        value.data.add_(0.1 * torch.randn(kept.shape, generator=noise))
        assert not torch.equal(run(), before), name
        value.data.copy_(kept)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    stored = checkpoint.fold_weight_norm({n: checkpoint.Stored(t.shape, t.dtype, lambda t=t: t) for n, t in weights().items()})
    left = set(stored) - {n for n in stored if s2mel.rename(n) in model.state_dict()}
    assert sorted({n.removeprefix("cfm.estimator.") for n in left}) == sorted([
        "input_pos", "x_embedder.bias", "x_embedder.weight", "cond_embedder.weight", "content_mask_embedder.weight",
        "length_regulator.embedding.weight", "length_regulator.mask_token",
        *(f"transformer.layers.{i}.skip_in_linear.{p}" for i in range(3) for p in ("weight", "bias"))])


@pytest.mark.parametrize("name, says", [
    ("cfm.estimator.transformer.layers.3.skip_in_linear.bias", "transformer.layers.3.skip_in_linear.bias"),
    ("cfm.estimator.conv2.weight", "no tensor cfm.estimator.conv2.weight"), ("gpt_layer.1.bias", "missing gpt_layer.1.bias"),
    ("gpt_layer.0.weight", "no tensor gpt_layer.0.weight")])
def test_a_missing_tensor_is_refused(tmp_path, name, says):
    state = weights()
    del state[name]
    with pytest.raises(Invalid, match=says):
        s2mel.load(published(tmp_path / "s2mel.pth", state), SECTION)


def test_only_the_weights_are_read_from_a_training_checkpoint(tmp_path, model):
    moments = {"state": {0: {"exp_avg": torch.zeros(4)}}, "param_groups": [{"lr": 1e-4}]}
    path = published(tmp_path / "s2mel.pth", prefix="module.", optimizer={"cfm": moments}, scheduler={}, epoch=3, iters=100)
    other = s2mel.load(path, SECTION)
    assert all(torch.equal(t, other.state_dict()[n]) for n, t in model.state_dict().items())
    save_file({f"net.{n}": t for n, t in weights().items()}, tmp_path / "s2mel.safetensors")
    assert torch.equal(solve(s2mel.load(tmp_path / "s2mel.safetensors", SECTION), 1), solve(model, 1))
    state = {**weights(), "cfm.estimator.extra": torch.zeros(1)}
    with pytest.raises(Invalid, match="unexpected cfm.estimator.extra"):
        s2mel.load(published(path, state), SECTION)
    assert s2mel.load(path, SECTION, allow_unused=True).config.heads == 2


def test_settings_that_were_never_published_are_refused(tmp_path):
    path = published(tmp_path / "s2mel.pth")
    for part, key, value in [("DiT", "is_causal", True), ("DiT", "style_as_token", True), ("wavenet", "dilation_rate", 2)]:
        section = copy.deepcopy(SECTION)
        section[part][key] = value
        with pytest.raises(Invalid, match=rf"s2mel.{part}.{key} is {value}; only"):
            s2mel.load(path, section)
    section = copy.deepcopy(SECTION)
    section["DiT"]["num_heads"] = 3
    with pytest.raises(Invalid, match="s2mel.DiT.num_heads is 3, which does not divide the width 32"):
        s2mel.load(path, section)
    del section["DiT"]["num_heads"]
    with pytest.raises(Invalid, match="s2mel: DiT does not say num_heads"):
        s2mel.load(path, section)


def test_wrong_noise_and_too_few_frames_are_refused(model):
    with pytest.raises(Invalid, match=r"noise is \[1, 8, 30\], expected \[1, 8, 31\].*11 prompt frames"):
        solve(model, noise=GOLDEN["x"][..., :30])
    with pytest.raises(Invalid, match="2 mel frames together, at least 3"):
        solve(model, content=GOLDEN["regulated.7.31"][:, :2], prompt=GOLDEN["prompt"][..., :1], noise=GOLDEN["x"][..., :2])


def test_the_published_layout_fits():
    if not LAYOUT.is_file():
        pytest.skip(f"no layout at {LAYOUT}")
    layout = {n.removeprefix("net."): checkpoint.Stored(s, getattr(torch, d), None) for n, (s, d) in json.loads(LAYOUT.read_text()).items()}
    stored = checkpoint.fold_weight_norm(layout)
    config = s2mel.config_of(stored, {"DiT": {"num_heads": 8}})
    assert config == s2mel.Config(8, 80, 512, 192, 512, 1536, 13, 128, 512, 8, 5, 1024, 512, 4, (1280, 256, 128, 1024))
    with torch.device("meta"):
        model = s2mel.S2Mel(config)
    wanted, patterns = {n: tuple(t.shape) for n, t in model.state_dict().items()}, s2mel.unused(config.depth)
    used = {s2mel.rename(n): s.shape for n, s in stored.items() if not any(s2mel.re.fullmatch(p, n) for p in patterns)}
    assert used == wanted


def test_the_mel_settings_of_the_published_config():
    section = {"preprocess_params": {"sr": 22050, "spect_params": {
        "n_fft": 1024, "win_length": 1024, "hop_length": 256, "n_mels": 80, "fmin": 0, "fmax": "None"}}}
    assert s2mel.mel_settings(section) == dict(rate=22050, n_fft=1024, hop=256, win=1024, n_mels=80, fmin=0.0)
    section["preprocess_params"]["spect_params"]["fmax"] = 8000
    with pytest.raises(Invalid, match="fmax is 8000"):
        s2mel.mel_settings(section)
