"""models/parts/quant.py: levels and scales as published, errors within their bounds, and training on top of it."""
import importlib

import pytest
import torch
from torch import nn

import lora
import models
from models.parts import Invalid, quant


def layer(bits, out=48, width=80, bias=True, seed=0):
    """(quantised layer, the layer that it was)."""
    torch.manual_seed(seed)
    plain = nn.Linear(width, out, bias)
    holder = nn.Module()
    holder.layer = nn.Linear(width, out, bias)
    holder.layer.load_state_dict(plain.state_dict())
    holder.blocks = lambda: [holder]
    quant.quantise(holder, bits)
    return holder.layer, plain


def test_the_levels_are_quantiles_of_a_normal_distribution():
    """Eight positive and seven negative levels between 0.5 and an offset of 1/2 (1/32 + 1/30) below 1, and zero."""
    offset = 1 - (1 / 32 + 1 / 30) / 2
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))
    positive = normal.icdf(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -normal.icdf(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([negative, torch.zeros(1, dtype=torch.float64), positive]).sort().values
    assert torch.allclose(levels / levels.max(), torch.tensor(quant.LEVELS, dtype=torch.float64), atol=2e-5)


def test_codes_and_scales_of_a_block_by_hand():
    weight = torch.zeros(1, 64)
    weight[0, :4] = torch.tensor([2.0, -2.0, 1.0, 0.1])
    codes, scale = quant.nf4_codes(weight)
    assert codes.shape == (1, 32) and scale.item() == 2.0
    # 1.0 / 2 lies between 0.4407 and 0.5626, nearer to the first: 0.5017 is their middle; 0.05 is nearer to 0.0796 than to 0
    assert codes[0, :2].tolist() == [15 << 4 | 0, 12 << 4 | 8]
    codes, scale = quant.int8_codes(torch.tensor([[1.0, -0.5, 0.004], [0.0, 0.0, 0.0]]))
    assert codes.tolist() == [[127, -64, 1], [0, 0, 0]] and scale[0].item() == pytest.approx(1 / 127)


@pytest.mark.parametrize("shape", ((48, 80), (7, 9), (64, 64), (1, 3)))
@pytest.mark.parametrize("bits", (4, 8))
def test_the_round_trip_stays_within_half_a_step(bits, shape):
    quantised, plain = layer(bits, *shape)
    error = (quant.weight_of(quantised, torch.float32) - plain.weight).abs()
    if bits == 8:
        assert (error <= plain.weight.abs().amax(1, keepdim=True) / 127 / 2 + 1e-7).all()
    else:
        widest = max(b - a for a, b in zip(quant.LEVELS, quant.LEVELS[1:]))
        blocks = [torch.nn.functional.pad(w.flatten(), (0, -w.numel() % 64)).view(-1, 64) for w in (error, plain.weight.abs())]
        assert (blocks[0].amax(1) <= blocks[1].amax(1) * widest / 2 + 1e-7).all()  # by the largest value of its own block
    assert error.max() > 0


@pytest.mark.parametrize("bits", (4, 8))
def test_forward_and_backward_are_those_of_the_rounded_weight(bits):
    quantised, plain = layer(bits)
    plain.weight.data = quant.weight_of(quantised, torch.float32)
    x = torch.randn(5, 80, requires_grad=True)
    z = x.detach().clone().requires_grad_()
    y, w = quantised(x), plain(z)
    assert torch.allclose(y, w, atol=1e-6)
    y.square().sum().backward()
    w.square().sum().backward()
    assert torch.allclose(x.grad, z.grad, rtol=1e-5, atol=1e-5)
    low = quantised(x.bfloat16())
    assert low.dtype == torch.bfloat16 and torch.allclose(low.float(), y, atol=0.05)


@pytest.mark.parametrize("bits", (4, 8))
def test_backward_keeps_no_weight(bits):
    quantised, _ = layer(bits, 512, 512, bias=False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        quantised(torch.randn(2, 512, requires_grad=True))
    assert sum(kept) < 512 * 512 / 8


@pytest.fixture(scope="module", params=sorted(models.backbones()))
def folder(request, tmp_path_factory):
    tiny = importlib.import_module(f"tests.tiny_{request.param}")
    path = tmp_path_factory.mktemp("quant") / "base"
    tiny.write(path, list(tiny.VARIANTS)[0])
    return path


@pytest.mark.parametrize("bits", (4, 8))
def test_an_adapter_trains_on_a_small_base_and_it_speaks(folder, bits):
    model, whole = models.load(folder), models.load(folder)
    names = quant.quantise(model, bits)
    assert names and quant.is_quantised(model) and not quant.is_quantised(whole)
    assert sum(p.numel() * p.element_size() for p in model.parameters()) < sum(p.numel() * p.element_size() for p in whole.parameters())

    wave = 0.3 * torch.sin(torch.arange(model.sample_rate) / 20)
    example = model.encode({"audio": model.encode_audio(wave), "text": "Hello there."})
    batch, counts = model.collate([example])
    near, far = (sum(v.item() for k, v in m(batch).items() if k.startswith("loss/")) for m in (model, whole))
    assert near != far and abs(near - far) < 0.3 * abs(far)

    lora.apply_lora_to_model(model, {"r": 4, "alpha": 8.0})
    assert quant.is_quantised(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 for p in trained)
    optimizer, losses = torch.optim.Adam(trained, 3e-3), []
    model.train()
    for _ in range(6):
        loss = sum(v / max(counts[k], 1) for k, v in model(batch).items() if k.startswith("loss/"))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    tiny = importlib.import_module(f"tests.tiny_{model.backbone}")
    prompts = tiny.prompts(model) if hasattr(tiny, "prompts") else ()  # some take the voice from a clip
    frames = list(model.frames("Hello.", prompts, seed=1, min_len=2, max_len=3))
    assert sum(len(frame) for frame in frames) >= 2


def test_other_numbers_of_bits_are_refused(folder):
    with pytest.raises(Invalid, match="expected 8 or 4"):
        quant.quantise(models.load(folder), 3)
