"""BigVGAN against its own code by golden tensors, its windows against the whole, and bad folders."""
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from models.codecs import bigvgan
from models.parts import Invalid, checkpoint
from tests import tiny
from tests.conftest import ROOT

PATH = Path(__file__).parent / "golden/bigvgan.safetensors"
GOLDEN = load_file(PATH)
with safe_open(PATH, "pt") as f:
    SHAPES, CONFIG = json.loads(f.metadata()["shapes"]), json.loads(f.metadata()["config"])
LAYOUT = Path(ROOT).parent / "shared/layouts/indextts2-bigvgan-22khz-80band-256x.json"
PUBLISHED = {
    "resblock": "1", "upsample_rates": [4, 4, 2, 2, 2, 2], "upsample_kernel_sizes": [8, 8, 4, 4, 4, 4],
    "upsample_initial_channel": 1536, "resblock_kernel_sizes": [3, 7, 11], "resblock_dilation_sizes": [[1, 3, 5]] * 3,
    "use_tanh_at_final": False, "use_bias_at_final": False, "activation": "snakebeta", "snake_logscale": True,
    "num_mels": 80, "sampling_rate": 22050}


def weights(bias=False):
    """The tensors that the golden script filled in, under their published names."""
    shapes = {**SHAPES, **({"conv_post.bias": [1]} if bias else {})}
    values = tiny.fill({n: s for n, s in shapes.items() if not n.endswith("filter")})
    values = {n: t - 1 if n.endswith(("bias", "alpha", "beta")) else t for n, t in values.items()}
    values["conv_post.weight_g"] *= 0.2
    return {**values, **{n: GOLDEN["filter"].clone() for n in shapes if n.endswith("filter")}}


def published(folder, state=None, **changes):
    folder.mkdir(exist_ok=True)
    config = {**CONFIG, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    torch.save({"generator": weights(config["use_bias_at_final"]) if state is None else state}, folder / "bigvgan_generator.pt")
    return folder


@pytest.fixture
def model(tmp_path):
    return bigvgan.load(published(tmp_path / "vocoder"))


def test_samples_equal_the_original(model, tmp_path):
    assert (model(GOLDEN["mel"]) - GOLDEN["clamp"]).abs().max() < 1e-5
    assert 0 < (GOLDEN["clamp"].abs() == 1).sum() < 0.2 * GOLDEN["clamp"].numel()  # the clamp is at work, and not everywhere
    other = bigvgan.load(published(tmp_path / "tanh", use_tanh_at_final=True, use_bias_at_final=True) / "bigvgan_generator.pt")
    assert (other(GOLDEN["mel"]) - GOLDEN["tanh"]).abs().max() < 1e-5
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_the_filter_is_the_kaiser_sinc_of_the_paper():
    half = torch.tensor([0.002029, 0.009389, -0.025543, -0.057657, 0.128573, 0.443210])
    assert (GOLDEN["filter"].flatten() - torch.cat([half, half.flip(0)])).abs().max() < 1e-6


def test_windows_with_context_equal_the_whole(model):
    mel = torch.randn(1, 6, 150, generator=torch.Generator().manual_seed(1))
    whole, context = model(mel), model.context()
    assert model.hop == 16 and whole.shape == (1, 2400) and context < 50
    for frames in (7, 64, 150, 1000):
        chunks = list(model.chunks(mel, frames))
        assert [c.shape[1] for c in chunks] == [16 * min(frames, 150 - i) for i in range(0, 150, frames)]
        assert (torch.cat(chunks, 1) - whole).abs().max() < 2e-6


def test_the_context_is_as_wide_as_it_must_be(model):
    """A gradient says it: nothing beyond the context reaches a frame's samples, and its last frame but one does."""
    mel = torch.randn(1, 6, 120, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    wave = type(model).forward.__wrapped__(model.double(), mel)
    wave[0, 60 * 16 : 61 * 16].sum().backward()
    reached = mel.grad[0].abs().amax(0).nonzero()
    assert model.context() - 1 <= 60 - int(reached.min()) <= model.context() >= int(reached.max()) - 60


def test_every_tensor_changes_the_samples(tmp_path):
    state, mel = weights(), GOLDEN["mel"][:1, :, :6]
    before = bigvgan.load(published(tmp_path / "a", state))(mel)
    noise = torch.Generator().manual_seed(2)
    model = bigvgan.load(tmp_path / "a")
    for name, value in model.state_dict(keep_vars=True).items():
        kept = value.data.clone()
        value.data.add_(0.1 * torch.randn(kept.shape, generator=noise))
        assert not torch.equal(model(mel), before), name
        value.data.copy_(kept)
    assert len(model.state_dict()) == len(state) - sum(n.endswith("weight_g") for n in state)
    folded = checkpoint.fold_weight_norm({n: checkpoint.Stored(t.shape, t.dtype, lambda t=t: t) for n, t in state.items()})
    assert {bigvgan.rename(n) for n in folded} == set(model.state_dict())


def test_the_published_layout_fits():
    if not LAYOUT.is_file():
        pytest.skip(f"no layout at {LAYOUT}")
    layout = {n.removeprefix("generator."): checkpoint.Stored(s, torch.float32, None) for n, (s, _) in json.loads(LAYOUT.read_text()).items()}
    config = bigvgan.Config(**{k: v for k, v in PUBLISHED.items() if k not in bigvgan.FIXED})
    with torch.device("meta"):
        model = bigvgan.BigVGAN(config)
    wanted = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    assert wanted == {bigvgan.rename(n): s.shape for n, s in checkpoint.fold_weight_norm(layout).items()}
    assert model.hop == 256 and 35 < model.context() < 50


def test_bad_folders_are_refused(tmp_path):
    good = published(tmp_path / "good")
    for change, says in [({"resblock": "2"}, "resblock is '2'"), ({"activation": "snake"}, "activation is 'snake'"),
                         ({"snake_logscale": False}, "snake_logscale is False"), ({"num_mels": 7}, "conv_pre.weight")]:
        with pytest.raises(Invalid, match=says):
            bigvgan.load(published(tmp_path / "bad", **change))
    state = weights()
    del state["ups.1.0.weight_g"], state["resblocks.2.activations.1.act.beta"]
    with pytest.raises(Invalid, match="missing .*resblocks.2.activations.1.beta"):
        bigvgan.load(published(tmp_path / "bad", state))
    with pytest.raises(Invalid, match="unexpected extra"):
        bigvgan.load(published(tmp_path / "bad", {**weights(), "extra": torch.zeros(1)}))
    assert bigvgan.load(tmp_path / "bad", allow_unused=True).hop == 16
    (good / "config.json").write_text('{"num_mels": 6}')
    with pytest.raises(Invalid, match="does not say upsample_rates"):
        bigvgan.load(good)
    (good / "config.json").unlink()
    with pytest.raises(Invalid, match="no config.json"):
        bigvgan.load(good)
