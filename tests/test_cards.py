"""Options that save memory: the same training in fewer bytes, to a stated distance, and resumed to the bit."""
import contextlib
import functools
import importlib
import math
import os
import re
import signal
import socket

import pytest
import torch
import torch.distributed as dist

import bench
import configs
import lora
import models
import train
from models.parts import layers, lean, memory, quant, shards
from tests.conftest import ROOT
from tests.running import SERVER, free_locks, here, ranks
from tests.test_train import contents, differing, dying, go, home, numbers, step, steps_in  # noqa: F401  (home is a fixture)


@contextlib.contextmanager
def in_folder(path):
    """A script may change signals and folder locks of this process: both are as before, afterwards."""
    before, handlers = os.getcwd(), {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        free_locks()


def trained(home, save, *flags, config="full", code=0):
    """train.py in this process. Returns its run folder, or what it said where another exit code is expected."""
    with in_folder(home):
        ended, _, said = here("train", [f"{config}.yaml", "--save_path", save, *flags])
    assert ended == code, said
    return said if code else home / save


# ------------------------------------------------------------------------------------------------ the optimizer


def toy(make, steps, dtype=torch.float32):
    """Least squares in noise, of weights near 4; returns the loss at the end and the weights."""
    torch.manual_seed(1)
    inputs, start = torch.randn(256, 32), torch.full((32, 8), 4.5)
    right = inputs @ (4 + torch.randn(32, 8))
    weight = torch.nn.Parameter(start.to(dtype))
    optimizer, held = make(weight)
    for i in range(steps):
        rows = torch.randint(0, 256, (16,), generator=torch.Generator().manual_seed(i))
        (inputs[rows].to(dtype) @ weight - right[rows].to(dtype)).float().square().mean().backward()
        if held is not weight:
            held.grad, weight.grad = weight.grad, None
        optimizer.step()
        optimizer.zero_grad()
    weight = weight.detach().float()
    return (inputs @ weight - right).square().mean().item(), weight


def plain(kind=torch.optim.AdamW, lr=0.01):
    return lambda weight: (kind([weight], lr, weight_decay=0.01), weight)


def small(bits=32, slot=False, name="adamw", lr=0.01):
    def make(weight):
        held = lean.Bare(weight) if slot else weight
        held.start = 0
        return lean.Lean([held], lean.Rule(name, bits, seed=3), lr), held
    return make


def apart(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_in_float32_a_step_is_that_of_torch():
    for name, kind in train.OPTIMIZERS.items():
        (_, a), (_, b) = toy(small(name=name), 20), toy(plain(kind), 20)
        assert torch.equal(a, b), name


def test_adamw8bit_stays_near_adamw():
    """5 % of the weights' length after 400 noisy steps, and as good a loss; a state of 2.04 bytes per weight."""
    (near, a), (loss, b) = toy(small(8), 400), toy(plain(), 400)
    assert 0 < apart(a, b) < 0.05 and near < 1.1 * loss
    optimizer, held = small(8)(torch.nn.Parameter(torch.zeros(1024, 64)))
    held.grad = torch.randn(1024, 64)
    optimizer.step()
    state = optimizer.state_dict()["state"][0]
    assert sum(t.numel() * t.element_size() for t in state.values()) < 2.04 * 1024 * 64


def test_plain_bf16_stalls_where_random_rounding_learns():
    """Steps of 0.005 on weights near 4 are less than half of bf16's last digit, 0.016 to 0.03."""
    whole = toy(plain(lr=5e-3), 500)[0]
    stalled = toy(plain(lr=5e-3), 500, torch.bfloat16)[0]
    for bits in (32, 8):
        assert toy(small(bits, slot=True, lr=5e-3), 500, torch.bfloat16)[0] < 1.15 * whole < stalled / 5


@pytest.mark.parametrize("dtype, least", [(torch.int8, 2.0**-12.6), (torch.uint8, 2.0**-25.4)])
def test_codes_are_within_a_level_and_right_in_the_mean(dtype, least):
    torch.manual_seed(0)
    values = torch.randn(8 * lean.BLOCK).pow(3)
    values = values if dtype == torch.int8 else values.square()
    found = []
    for _ in range(200):
        codes, scale = lean.to_codes(values, dtype, torch.rand(len(values)))
        found.append(lean.from_codes(codes, scale))
    found = torch.stack(found)
    largest = values.abs().view(-1, lean.BLOCK).amax(1)
    assert codes.dtype == dtype and torch.equal(scale, largest)
    fine = values.abs() > least * largest.repeat_interleave(lean.BLOCK)
    assert fine.float().mean() > 0.8 and ((found - values).abs() <= 0.0719 * values.abs() * 1.001)[:, fine].all()  # 2^(1/10) - 1
    assert ((found.mean(0) - values) / values)[fine].mean().abs() < 1e-3
    if dtype == torch.uint8:
        assert (found > 0).all(), "the step is divided by its root"
    codes, scale = lean.to_codes(torch.zeros(lean.BLOCK), dtype, torch.rand(lean.BLOCK))
    assert not codes.any() and not lean.from_codes(codes, scale).any()


def test_draws_belong_to_places():
    whole = lean.hashed(0, 4096, 7, "cpu")
    assert torch.equal(lean.hashed(1024, 100, 7, "cpu"), whole[1024:1124]) and not torch.equal(lean.hashed(0, 4096, 8, "cpu"), whole)
    share = lean.hashed(0, 2**18, 7, "cpu").double() / 2**32
    assert abs(share.mean() - 0.5) < 0.003 and abs(share.var() * 12 - 1) < 0.02
    values = torch.full((2**16,), 1.001)
    rounded = lean.rounded(values, lean.hashed(0, 2**16, 7, "cpu")).float()
    assert rounded.unique().tolist() == [1.0, 1.0078125] and abs(rounded.mean() - 1.001) < 1e-4
    assert torch.equal(lean.rounded(-values, lean.hashed(0, 2**16, 7, "cpu")).float(), -rounded)


def test_pieces_change_nothing(monkeypatch):
    """A table is stepped in pieces, so that scratch is bounded."""
    monkeypatch.setattr(lean, "BLOCK", 64)
    whole = toy(small(8, slot=True), 5, torch.bfloat16)[1]
    monkeypatch.setattr(lean, "PIECE", 64)
    assert torch.equal(toy(small(8, slot=True), 5, torch.bfloat16)[1], whole)


# ------------------------------------------------------------------------------------------------ train.py

BF16 = ("--dtype", "bfloat16")
FORMS = {
    "8 bits": ("--optimizer", "adamw8bit"),
    "no copies": (*BF16, "--master", "none"),
    "all": (*BF16, "--master", "none", "--optimizer", "adamw8bit", "--fused_backward"),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_run_in_few_bytes_resumes_to_the_bit(home, form):
    flags = ("--max_steps", 8, *FORMS[form], "--num_iters")
    whole = trained(home, f"{form} whole", *flags, 8)
    trained(home, f"{form} half", *flags, 5)
    half = trained(home, f"{form} half", *flags, 8)
    assert not differing(step(whole, 8), step(half, 8))
    assert numbers(whole)[-1]["loss/total"] == numbers(half)[-1]["loss/total"] < numbers(whole)[0]["loss/total"]
    saved = contents(step(whole, 8))
    moments = [t.dtype for name, t in saved.items() if name.endswith("exp_avg")]
    assert moments == [torch.float32 if form == "no copies" else torch.int8] * len(moments)
    assert not any(name.startswith("master") for name in saved), "the files of the model hold all that there is"


@pytest.mark.parametrize("flags", [(), BF16], ids=["float32", "copies"])
def test_stepping_in_backward_changes_nothing(home, flags):
    kind, flags = len(flags), ("--max_steps", 8, *flags, "--num_iters")
    after = trained(home, f"after {kind}", *flags, 4)
    within = trained(home, f"within {kind}", *flags, 4, "--fused_backward")
    assert not differing(step(after, 4), step(within, 4))
    assert [line["grad_norm"] for line in numbers(within)] == pytest.approx([line["grad_norm"] for line in numbers(after)], rel=1e-5)
    # what was saved one way goes on in the other
    trained(home, after.name, *flags, 6, "--fused_backward")
    trained(home, within.name, *flags, 6)
    assert not differing(step(after, 6), step(within, 6))


@pytest.mark.parametrize("flags, words", [
    (("--fused_backward", "--grad_accum_steps", 2), "grad_accum_steps above 1 needs them"),
    (("--fused_backward", "--max_grad_norm", 1), "max_grad_norm needs them"),
    (("--master", "none"), "master none is for full tuning in bf16"),
    (("--master", "none", *BF16, "--shard"), "choose one"),
    (("--master", "none", *BF16, "--ema", 0.9), "ema averages float32 values"),
    (("--shard", "--ema", 0.9), "ema needs all values on each rank"),
    (("--master", "half"), "'half' is not one of float32, none"),
])
def test_what_does_not_go_together_is_refused(home, flags, words):
    assert words in trained(home, "refused", *flags, code=2)
    assert "master none is for full tuning" in trained(home, "refused", *BF16, "--master", "none", config="lora", code=2)


def test_what_is_not_finite_moves_nothing_in_backward_either():
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    other = torch.nn.Parameter(torch.ones(3))
    masters = train.Masters({"weight": weight, "other": other})
    masters.step_in_backward(lean.Lean(masters.parameters, lean.Rule("sgd", weight_decay=0.0), 0.5))
    masters.backward((weight.sum() + other.sum()) * math.inf)
    assert torch.equal(weight.float(), torch.ones(3)) and masters.norm() == 0
    masters.backward((weight.float() - 1).sqrt().sum() + other.sum())  # sqrt is steep at zero
    assert torch.equal(weight.float(), torch.ones(3)) and other.tolist() == [0.5] * 3, "one gradient alone is infinite"
    assert not masters.norm().isfinite() and weight.grad is None and masters.parameters[0].grad is None


def test_without_copies_gradients_still_add_up_in_float32():
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    masters = train.Masters({"weight": weight}, "none")
    for _ in range(2):
        (256 * weight).sum().backward()
    (weight + 0).sum().backward()
    assert masters.parameters[0].grad.tolist() == [513.0] and weight.grad is None  # 512 in bf16


# ------------------------------------------------------------------------------------------------ shards

STEPS, PER_STEP = 20, 4  # micro-batches of a step, over all ranks


def network():
    """Sizes that fill no block, a tensor larger than a bucket, one that only some micro-batches need, bf16 between float32."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(13, 70), torch.nn.Tanh(), torch.nn.Linear(70, 31), torch.nn.Tanh(), torch.nn.Linear(31, 5))
    net.seldom = torch.nn.Parameter(torch.ones(5))
    return net


def learned(rank, world, bits, begin, state=None, steps=STEPS):
    """Train with states shared out, or on one rank as train.py does. Returns (values, state) on rank 0."""
    net = network()
    named = dict(net.named_parameters())
    masters = shards.Shards(named, str, bucket=1000) if world > 1 else train.Masters(named)
    rule = lean.Rule("adamw", bits, seed=1)
    optimizer = lean.Lean(masters.parameters, rule, 1e-3) if bits == 8 else torch.optim.AdamW(masters.parameters, 1e-3)
    if state:
        masters.set(state["values"])
        masters.load_state(optimizer, state["optimizer"])
    for i in range(begin, begin + steps):
        for number in range(rank, PER_STEP, world):
            x = torch.randn(6, 13, generator=torch.Generator().manual_seed(PER_STEP * i + number))
            y = net(x) * net.seldom if number == 1 else net(x)
            masters.backward((y - x[:, :5].sin()).square().sum() / 24)
        masters.reduce()
        norm = masters.norm()
        optimizer.step()
        masters.publish()
        optimizer.zero_grad()
    return {"values": masters.values(), "optimizer": masters.state(optimizer), "norm": norm.item(),
            "published": {name: p.detach() for name, p in named.items()}}


def rank_of(port, rank, world, path, cannot):
    """In a process of its own: two ranks go half way and to the end, four go on from there."""
    torch.set_num_threads(1)
    if cannot:
        def scatter(*_):
            raise RuntimeError("not there")
        shards.scatter = scatter
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    out = {}
    for bits in (32, 8):
        if world == 2:
            out[f"half {bits}"] = learned(rank, world, bits, 0, None, STEPS // 2)
            out[f"whole {bits}"] = learned(rank, world, bits, 0)
        else:
            earlier = torch.load(path / "2 ranks.pt", weights_only=True)[f"half {bits}"]
            out[f"rest {bits}"] = learned(rank, world, bits, STEPS // 2, earlier, STEPS // 2)
    if rank == 0:
        torch.save(out, path / f"{world} ranks.pt")
    dist.destroy_process_group()


def start_ranks(world, path, cannot=False):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    os.environ["PYTHONPATH"] = str(ROOT)
    processes = [SERVER.Process(target=rank_of, args=(port, rank, world, path, cannot), daemon=True) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    return torch.load(path / f"{world} ranks.pt", weights_only=True)


def test_shards_train_like_one_rank_and_any_number_goes_on(tmp_path):
    """20 steps on 2 ranks, and 10 that 2 have saved with 10 more on 1 and on 4. The 4 have no reduce_scatter."""
    two, four = start_ranks(2, tmp_path), start_ranks(4, tmp_path, cannot=True)
    for bits in (32, 8):
        one = learned(0, 1, bits, 0)
        rest = learned(0, 1, bits, STEPS // 2, two[f"half {bits}"], STEPS // 2)
        assert apart(one["values"]["0.weight"], network()[0].weight) > 0.01, "it has learned something"
        for run in (two[f"whole {bits}"], four[f"rest {bits}"], rest):
            assert run["norm"] == pytest.approx(one["norm"], rel=1e-4)
            for name, value in one["values"].items():
                assert torch.allclose(run["values"][name], value, rtol=0, atol=1e-6), (bits, name)
                assert torch.equal(run["values"][name], run["published"][name])
            for i, state in one["optimizer"]["state"].items():
                assert state.keys() == run["optimizer"]["state"][i].keys()
                assert all(value.shape == run["optimizer"]["state"][i][key].shape for key, value in state.items())


@pytest.mark.parametrize("config, flags", [("lora", ()), ("full", BF16)], ids=["lora", "full"])
def test_a_sharded_run_saves_what_one_rank_would(home, config, flags):
    """Two ranks of one micro-batch against one rank of two; what the two have saved goes on in one process."""
    flags = ("--max_steps", 8, *flags, "--num_iters")
    one = trained(home, f"{config} one", *flags, 6, "--grad_accum_steps", 2, config=config)
    if config == "lora":  # killed in the middle of a save: nothing is there, and the same command starts over
        argv = ["lora.yaml", "--save_path", "lora shards", *flags, 4, "--shard"]
        codes = [run.wait() for run in ranks(2, "train", argv, home, functools.partial(dying, 9))]
        assert codes[0] == -9 and codes[1] and not steps_in(home / "lora shards"), codes
    go(home, f"{config} shards", *flags, 4, "--shard", config=config, world=2)
    two = trained(home, f"{config} shards", *flags, 6, config=config)
    a, b = contents(step(one, 6)), contents(step(two, 6))
    assert a.keys() == b.keys()
    far = {name: (a[name].float() - b[name].float()).abs().max().item() for name in a}
    assert max(value for name, value in far.items() if a[name].dtype != torch.bfloat16) < 1e-6, far


# ------------------------------------------------------------------------------------------------ activations


class Counted(torch.nn.Linear):
    calls = 0

    def forward(self, x, *_):
        self.calls += 1
        return super().forward(x).tanh()


@pytest.mark.parametrize("every, calls", [(0, [1, 1, 1, 1, 1]), (1, [2, 2, 2, 2, 2]), (2, [2, 1, 2, 1, 2]), (3, [2, 1, 1, 2, 1])])
def test_every_nth_layer_is_computed_again(every, calls):
    stack = [Counted(4, 4) for _ in calls]
    layers.run_layers(stack, torch.randn(2, 4), layers.Context(), recompute=every).sum().backward()
    assert [layer.calls for layer in stack] == calls
    for words, value in ((("--checkpointing",), True), (("--checkpointing", every), every), (("--checkpointing", "false"), 0)):
        assert int(configs.parse(train.Train, [*map(str, words)]).checkpointing) == value


def kept_by(loss):
    """(number of values that forward keeps for backward, the loss); the gradients are made."""
    sizes = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.update({t.untyped_storage()._cdata: t.numel()}) or t, lambda t: t):
        total = loss()
    total.backward()
    return sum(sizes.values()), total.item()


def test_many_logits_are_never_there_at_once(monkeypatch):
    torch.manual_seed(0)
    head, h, labels = torch.nn.Linear(8, 1000, bias=False), torch.randn(50, 8, requires_grad=True), torch.randint(0, 1000, (50,))
    labels[7] = -100
    found = []
    for at_once in (50_000, 4_000):
        monkeypatch.setattr(layers, "LOGITS", at_once)
        h.grad = head.weight.grad = None
        kept, loss = kept_by(lambda: layers.cross_entropy(head, h, labels, -100))
        found.append((kept, loss, h.grad, head.weight.grad))
        assert not layers.cross_entropy(head, h[:0], labels[:0], -100)
    (much, a, *whole), (little, b, *pieces) = found
    assert a == pytest.approx(b, rel=1e-6) and all(torch.allclose(x, y, atol=1e-6) for x, y in zip(whole, pieces))
    assert much > 50_000 and little < 10_000, "the weight and the states alone"


# ------------------------------------------------------------------------------------------------ arithmetic

WAYS = [
    ("lora", torch.bfloat16, {"base_bits": 4}), ("lora", torch.float32, {"base_bits": 8, "optimizer": "adamw8bit"}),
    ("full", torch.float32, {"optimizer": "sgd"}), ("full", torch.bfloat16, {}),
    ("full", torch.bfloat16, {"master": "none", "optimizer": "adamw8bit"}),
]


def held(tensors):
    """Bytes of tensors, each storage once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("kind, dtype, settings", WAYS, ids=lambda value: str(value))
def test_the_bytes_that_are_computed_are_those_that_training_holds(kind, dtype, settings):
    cfg = bench.Bench(backbone="csm", full=kind == "full")
    torch.manual_seed(0)
    model = bench.blank(cfg, torch.device("cpu"), dtype)
    if kind == "lora":
        if "base_bits" in settings:
            quant.quantise(model, settings["base_bits"])
        bench.add_adapter(cfg, model)
    examples = [model.blank_example(1, 5), model.blank_example(2, 9)]
    plan = memory.Plan(batch_size=2, **settings)
    computed = memory.use(memory.on_meta(model), examples, plan)
    assert held([*model.parameters(), *model.buffers()]) == pytest.approx(computed.weights, rel=1e-3)  # an empty storage has an address, too

    masters = train.Masters({name: p for name, p in model.named_parameters() if p.requires_grad}, plan.master)
    optimizer = train.make_optimizer(train.Train(optimizer=plan.optimizer, master=plan.master), masters, model.device)
    model.train()
    batch, _ = model.collate(examples, [0, 1])
    weights, kept = {p.untyped_storage()._cdata for p in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept.update({} if storage._cdata in weights else {storage._cdata: (storage.nbytes(), tensor)})
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = sum(value for name, value in model(batch).items() if name.startswith("loss/"))
    kept_now = sum(size for size, _ in kept.values())  # the fused norm and attention of a CPU keep a little less
    assert (0.95 if dtype == torch.float32 else 0.87) * computed.activations < kept_now < 1.001 * computed.activations
    kept.clear()
    masters.backward(loss)
    assert held([p.grad for p in masters.parameters]) == pytest.approx(computed.gradients, rel=1e-3)
    optimizer.step()
    state = optimizer.state.values()
    moments = [value for each in state for name, value in each.items() if name != "step" and torch.is_tensor(value)]
    assert held(moments) == pytest.approx(computed.moments, rel=1e-3)
    copies = [p for p in masters.copies.values() if isinstance(p, torch.nn.Parameter)]
    assert held(copies) == pytest.approx(computed.copies, rel=1e-3)
    assert computed.total == sum(computed) and (kind == "full" or computed.copies == 0)


@pytest.mark.parametrize("name", sorted(models.backbones()))
def test_an_example_without_content_is_as_long_as_one_with(name, tmp_path):
    """The same tensors; a second of sound has as many positions, but for the edges of a codec, and an id has one."""
    tiny = importlib.import_module(f"tests.tiny_{name}")
    tiny.write(tmp_path / "base", list(tiny.VARIANTS)[0])
    model = models.load(tmp_path / "base")
    lora.apply_lora_to_model(model, {"r": 2, "alpha": 4.0})
    short, long = (model.encode({"audio": 0.1 * torch.randn(n * model.sample_rate), "text": "hello there"}) for n in (1, 2))
    blank, longer, more = model.blank_example(1.0, 9), model.blank_example(2.0, 9), model.blank_example(1.0, 16)
    assert blank.keys() == short.keys() and all(blank[key].dtype == short[key].dtype for key in blank)
    assert model.length(more) - model.length(blank) == 7
    assert model.length(longer) - model.length(blank) == pytest.approx(model.length(long) - model.length(short), abs=2)
    whole, part = (memory.kept(memory.on_meta(model), [blank, blank], every) for every in (0, 1))
    assert 0 < part < whole and model.device.type == "cpu", "the copy alone is on the meta device"


def plan_settings(**values):
    return train.Train(**{"train_manifest": ["x"], **values})


def test_what_would_have_been_enough_is_enough():
    model = bench.blank(bench.Bench(backbone="csm"), torch.device("cpu"), torch.bfloat16)
    examples = [model.blank_example(4, 9)] * 4
    cfg = plan_settings(batch_size=4)
    plan, blank = memory.plan_of(cfg, 4), memory.on_meta(model)
    changes = memory.savings(cfg, plan, low=True)
    names = ["--checkpointing", "--batch_size 2 --grad_accum_steps 2", "--optimizer adamw8bit", "--fused_backward", "--master none"]
    assert [change.flags for change in changes] == names
    now = memory.use(blank, examples, plan).total
    for share in (0.95, 0.4):
        ways = memory.enough(blank, examples, plan, changes, share * now)
        assert 1 <= len(ways) <= 2 and all(use.total <= share * now for _, use in ways), share
        singles = [c.flags for c in changes if memory.use(blank, examples, plan._replace(**c.fields)).total <= share * now]
        assert [flags for flags, _ in ways][: len(singles)] == singles[:2], "one setting, where one is enough"
    assert not memory.enough(blank, examples, plan, changes, 0.01 * now)
    lone = memory.savings(plan_settings(lora=lora.LoRAConfig(), base_bits=8, checkpointing=True, optimizer="sgd"), memory.Plan(8, "sgd", checkpointing=1), low=False)
    assert [change.flags for change in lone] == ["--base_bits 4"]


def test_out_of_memory_says_what_would_have_been_enough(home, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore")

    monkeypatch.setattr(train, "to_device", full)
    said = trained(home, "oom", "--num_iters", 2, code=1)
    assert re.search(r"By arithmetic a step takes \d+\.\d MB \(.*\), and the device has \d+\.\d GB\. Enough would have been --checkpointing", said), said
    said = trained(home, "oom", "--num_iters", 2, "--dry_run", config="lora", code=1)
    assert re.search("Enough would have been --.* MB[)]", said) and "step 1: micro-batches of [2] clips" in said, said


def test_a_dry_run_says_what_it_takes_by_arithmetic(home):
    with in_folder(home):
        ended, _, said = here("train", ["full.yaml", "--save_path", "dry", "--dry_run"])
    assert ended == 0 and re.search(r"by arithmetic a step on it takes \d\.\d MB \(weights .* MB, gradients .*, moments .*\)", said), said


def test_the_table_of_memory_says_what_leaves_room():
    code, out, err = here("bench", ["--memory", "--backbone", "csm", "--size", "tiny", "--seconds", 2])
    lines = [line for line in out.decode().splitlines() if line.startswith("|")]
    assert code == 0 and len(lines) == 2 + len(bench.WAYS) + 1 + 3, err
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:-3]]
    assert all(float(row[-1]) == pytest.approx(sum(map(float, row[2:-1])), abs=0.03) for row in rows)
    assert lines[-1] == "| csm | " + " | ".join(["full, LoRA"] * 5) + " |"
    big, small, least = (memory.Use(size * 1e9, 0, 0, 0, 0) for size in (30, 9, 5))
    uses = dict(zip(bench.WAYS, (big, small, big, least, least, least)))
    assert [bench.fitting(uses, card) for card in (6, 8, 12, 80)] == ["-", "LoRA c", "full in few bytes, LoRA c", "full, LoRA"]
