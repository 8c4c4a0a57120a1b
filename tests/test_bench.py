"""bench.py: one JSON line per run, with the fields that the peers print."""
import json
import math

import pytest
import torch

import models
from models.parts import Invalid
from tests.running import here

# Every case: what it is and where, time, speed, memory, sizes.
FIELDS = {"task", "size", "device", "dtype", "batch", "lengths", "fill", "texts", "threads", "shapes", "optimizer", "clip", "rank", "full", "ckpt",
          "compile", "steps", "step_ms_median", "step_ms_min", "step_cpu_ms_median", "samples_per_s", "audio_s_per_s", "rtf", "peak_mem_mib",
          "peak_mem_kind", "params", "adapter_params", "torch", "gpu", "backbone", "version"}
FAST = {"--device": "cpu", "--steps": 1, "--warmup": 0, "--seconds": 0.7}


def bench(*flags):
    code, out, err = here("bench", [*flags, *(word for flag in FAST if flag not in flags for word in (flag, FAST[flag]))])
    lines = out.decode().splitlines()
    assert code == 0 and len(lines) == 1, err
    said = json.loads(lines[0], parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert FIELDS <= said.keys(), FIELDS - said.keys()
    audio = sum(said["lengths"]) if "frames" not in said else None
    assert said["step_ms_min"] <= said["step_ms_median"] and said["peak_mem_mib"] > 10 and said["gpu"] is None
    assert math.isclose(said["samples_per_s"], said["batch"] / said["step_ms_median"] * 1e3, rel_tol=0.01)
    assert audio is None or math.isclose(said["audio_s_per_s"], audio / said["step_ms_median"] * 1e3, rel_tol=0.01)
    assert math.isclose(said["rtf"] * said["audio_s_per_s"], 1, rel_tol=0.05)
    return said


def versions(name):
    """The published versions of a backbone, as its message names them."""
    with pytest.raises(Invalid) as refused:
        models.BACKBONES[name].blank("tiny", "no such version", torch.device("cpu"), torch.float32)
    return str(refused.value).rpartition("there are ")[2].rstrip(".").split(", ")


@pytest.mark.parametrize("backbone", sorted(models.backbones()))
def test_each_task_prints_one_line_with_the_peers_fields(backbone):
    train = bench("--backbone", backbone, "--batch", "2", "--lengths", "0.4,0.8")
    assert (train["task"], train["clip"], train["lengths"], train["texts"], train["fill"]) == ("train", 1.0, [0.4, 0.8], [4, 4], 0.75)
    assert train["optimizer"].startswith("AdamW") and 0 < train["adapter_params"] < train["params"]
    assert train["forward_loss"] == train["last_loss"] > 0
    generate = bench("--backbone", backbone, "--task", "generate", "--batch", "1")
    assert (generate["task"], generate["clip"], generate["optimizer"], generate["adapter_params"]) == ("generate", None, None, 0)
    assert generate["frames"] >= 4 and "forward_loss" not in generate
    encode = bench("--backbone", backbone, "--task", "encode", "--batch", "1")
    assert (encode["task"], encode["lengths"], encode["adapter_params"]) == ("encode", [0.7], 0)


def test_every_version_has_its_shapes():
    seen = set()
    for version in versions("voxcpm"):
        said = bench("--backbone", "voxcpm", "--version", version, "--task", "encode", "--batch", "1", "--seconds", "0.1")
        assert said["version"] == version
        seen.add(json.dumps(said["shapes"]))
    assert len(seen) == 3


def test_steps_train_and_full_trains_everything():
    said = bench("--backbone", "voxcpm", "--steps", "4", "--warmup", "1", "--full", "--ckpt", "--batch", "1")
    assert said["last_loss"] < said["forward_loss"] and said["adapter_params"] == said["params"] and said["rank"] == 0
    again = bench("--backbone", "voxcpm", "--steps", "1", "--warmup", "0", "--full", "--batch", "1")
    assert again["forward_loss"] == said["forward_loss"], "recomputing activations changes nothing, and the seed decides"


@pytest.mark.parametrize("backbone, option", [("csm", "amortize=1"), ("voxcpm", "training_cfg_rate=1.0")])
def test_options_of_the_backbone_act(backbone, option):
    flags = ("--backbone", backbone, "--batch", "1", "--seconds", "3")
    plain, said = bench(*flags), bench(*flags, f"--options.{option}")
    assert plain["options"] == {} and list(said["options"]) == [option.partition("=")[0]]
    assert said["forward_loss"] != plain["forward_loss"]


def test_generation_with_an_adapter_on_or_merged():
    flags = ("--backbone", "voxcpm", "--task", "generate", "--batch", "2", "--timesteps", "2", "--rank", "4")
    on, merged = bench(*flags, "--adapter", "on"), bench(*flags, "--adapter", "merged")
    assert on["adapter_params"] > 0 and merged["adapter_params"] == 0 and on["params"] == merged["params"] + on["adapter_params"]


@pytest.mark.parametrize("flags, words", [
    ((), "--backbone '': known are"),
    (("--backbone", "nemo"), "--backbone 'nemo': known are"),
    (("--backbone", "voxcpm", "--version", "9"), "version '9' is not known; there are 1.5, 0.5, 2"),
    (("--backbone", "voxcpm", "--size", "huge"), "--size: 'huge' is not one of tiny, mid, real"),
    (("--backbone", "voxcpm", "--task", "dance"), "--task: 'dance' is not one of"),
    (("--backbone", "voxcpm", "--steps", "0", "--batch", "0"), "--batch 0: expected at least 1\n--steps 0: expected at least 1"),
    (("--backbone", "voxcpm", "--lengths", "1,0"), "expected more than 0, got 0.0"),
    (("--backbone", "voxcpm", "--lengths", "1,two"), "--lengths: "),
    (("--backbone", "voxcpm", "--task", "generate", "--lengths", "1,2"), "--lengths does not go with --task generate"),
    (("--backbone", "voxcpm", "--adapter", "on"), "--adapter does not go with --task train"),
    (("--backbone", "voxcpm", "--task", "encode", "--full"), "--full does not go with --task encode"),
    (("--memory", "--full", "--steps", "9"), "--full does not go with --memory, whose tables have all ways to train\n--steps does not"),
    (("--memory", "--version", "2"), "--backbone '': known are"),
    (("--backbone", "voxcpm", "--wramup", "1"), "--wramup: unknown; the nearest known name is warmup"),
    (("--backbone", "csm", "--task", "generate", "--timesteps", "4"), "--timesteps: csm has no solver"),
    (("--backbone", "csm", "--task", "generate", "--options.amortize", "4"), "--options does not go with --task generate"),
    (("--backbone", "csm", "--options.amortise", "4", "--steps", "0"), "options.amortise: unknown; the nearest known name is amortize"),
])
def test_wrong_flags_exit_2(flags, words):
    code, out, err = here("bench", flags)
    assert (code, out) == (2, b"") and words in err and "Traceback" not in err, err


def test_too_little_text_for_the_audio_is_said():
    code, out, err = here("bench", ("--backbone", "voxcpm", "--task", "generate", "--text", "1", "--batch", "1", "--seconds", "4"))
    assert (code, out) == (1, b"") and "Give more with --text" in err
