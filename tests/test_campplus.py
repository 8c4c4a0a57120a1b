"""CAM++ against its own code by golden tensors, its front end, its tensors, and bad files."""
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from models.codecs import campplus
from models.parts import Invalid, audio, checkpoint
from tests import tiny
from tests.conftest import ROOT

PATH = Path(__file__).parent / "golden/campplus.safetensors"
GOLDEN = load_file(PATH)
with safe_open(PATH, "pt") as f:
    SHAPES = json.loads(f.metadata()["shapes"])
LAYOUT = Path(ROOT).parent / "shared/layouts/indextts2-campplus.json"


def weights(shapes=SHAPES):
    """The tensors that the golden script filled in, under their published names."""
    values = tiny.fill({n: s for n, (s, dtype) in shapes.items() if dtype == "float32"})
    values = {n: t - 1 if n.endswith(("bias", "running_mean")) else t / 2 if n.endswith("running_var") else t for n, t in values.items()}
    return {**values, **{n: torch.tensor(7) for n in shapes if n.endswith("num_batches_tracked")}}


def published(path, state=None):
    torch.save(weights() if state is None else state, path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return campplus.load(published(tmp_path_factory.mktemp("campplus") / "campplus_cn_common.bin"))


@pytest.mark.parametrize("T", [263, 200, 3])
def test_the_embedding_equals_the_original(model, T):
    assert (model(GOLDEN["features"][:, :T]) - GOLDEN[f"style.{T}"]).abs().max() < 1e-5


def test_a_batch_equals_its_rows_and_nothing_is_trained(model):
    x = GOLDEN["features"]
    both = model(torch.cat([x[:, :120], x[:, 120:240]]))
    assert (both - torch.cat([model(x[:, :120]), model(x[:, 120:240])])).abs().max() < 1e-5
    assert torch.equal(model.train()(x[:, :120]), model.eval()(x[:, :120]))
    assert not any(p.requires_grad for p in model.parameters())


def test_a_wave_becomes_a_filter_bank_without_its_mean(model):
    wave = 0.1 * torch.randn(8000, generator=torch.Generator().manual_seed(0))
    assert (model.embed(3 * wave) - model.embed(wave)).abs().max() < 1e-4  # a level is a shift of the logarithm
    wave[4000:] *= 1e-5  # but for what lies below the floor
    features = audio.kaldi_fbank(wave, n_mels=16)
    assert (model.embed(wave) - model((features - features.mean(0))[None])[0]).abs().max() < 1e-5
    assert (model(features[None])[0] - model.embed(wave)).abs().max() > 0.1
    assert model.embed(wave[:720]).isfinite().all()
    with pytest.raises(Invalid, match="at least 720 samples"):
        model.embed(wave[:719])


def test_every_tensor_changes_the_embedding(model):
    """By gradients, 550 forward passes being slow; a stored mean moves what its bias moves, a variance what its weight moves."""
    x = GOLDEN["features"][:, :40]
    model.requires_grad_(True)
    (model(x) * torch.arange(1, 7)).sum().backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    model.zero_grad(set_to_none=True)
    model.requires_grad_(False)
    assert not dead
    before = model(x)
    buffers = dict(model.named_buffers())
    assert len(buffers) == 2 * sum(isinstance(m, campplus.Norm) for m in model.modules())
    for name in [n for n in buffers if re.search(r"bn1|shortcut|tdnnd7|transit2|out_norm|dense", n)]:
        kept = buffers[name].clone()
        buffers[name].mul_(1.1).add_(0.1)
        assert not torch.equal(model(x), before), name
        buffers[name].copy_(kept)
    assert len(model.state_dict()) == len(SHAPES) - sum(n.endswith("num_batches_tracked") for n in SHAPES)


def test_the_published_layout_fits():
    if not LAYOUT.is_file():
        pytest.skip(f"no layout at {LAYOUT}")
    layout = {n: checkpoint.Stored(s, getattr(torch, d), None) for n, (s, d) in json.loads(LAYOUT.read_text()).items()}
    config = campplus.config_of(layout)
    assert config == campplus.Config(10, 32, (2, 2), 128, (12, 24, 16), 32, 128, 192)
    with torch.device("meta"):
        model = campplus.CAMPPlus(config)
    used = {campplus.rename(n): s.shape for n, s in layout.items() if not n.endswith("num_batches_tracked")}
    assert used == {n: tuple(t.shape) for n, t in model.state_dict().items()}
    assert sum(p.numel() for p in model.parameters()) == 6848544


def test_bad_files_are_refused(tmp_path):
    path = tmp_path / "speaker.bin"
    state = weights()
    del state["xvector.block2.tdnnd3.cam_layer.linear1.bias"]
    with pytest.raises(Invalid, match="missing xvector.block2.tdnnd3.cam_layer.linear1.bias"):
        campplus.load(published(path, state))
    with pytest.raises(Invalid, match="unexpected extra"):
        campplus.load(published(path, {**weights(), "extra": torch.zeros(1)}))
    assert campplus.load(path, allow_unused=True).config.size == 6
    with pytest.raises(Invalid, match="speaker.bin has no tensor head.conv1.weight"):
        campplus.load(published(path, {"a": torch.zeros(1)}))
    with pytest.raises(Invalid, match="4 dense blocks"):
        campplus.load(published(path, {**weights(), "xvector.block4.tdnnd1.linear1.weight": torch.zeros(1)}))
