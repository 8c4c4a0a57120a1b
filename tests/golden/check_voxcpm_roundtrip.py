"""Load what our tools wrote in the voxcpm package, and hold its losses and its generated latents against ours.

    python tests/golden/check_voxcpm_roundtrip.py --base DIR --adapter DIR --merged DIR --full DIR --inputs FILE.safetensors

Needs the package (requirements_voxcpm.txt); FILE comes from make_voxcpm_roundtrip.py, which describes it. base, merged and
full are folders in the published layout, adapter holds lora_weights.safetensors and lora_config.json. Each is loaded
twice: as it stands, which must generate finite audio, and in float32 with our noise, where means of the losses must
agree to 1e-5 and latents to 1e-4 (merged against adapter: 1e-5, or 3e-2 where the merged folder is bfloat16). Prints
one line per comparison; exit 1 if any failed.
"""
import argparse
import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent))

import make_voxcpm as golden  # noqa: E402


def float32_copy(folder, scratch):
    """The folder by links, with a config.json that asks for float32 on the CPU."""
    copy = Path(tempfile.mkdtemp(dir=scratch))
    for path in folder.resolve().iterdir():
        if path.name != "config.json" and path.is_file():
            (copy / path.name).symlink_to(path)
    config = json.loads((folder / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "dtype": "float32", "device": "cpu"}))
    return copy, "2" if config.get("architecture") == "voxcpm2" else "1"


@contextlib.contextmanager
def drawn(draws, target):
    """The package's seven draws in their order, with ours at the target positions."""
    def everywhere(values, fill):
        out = torch.full((len(target), *values.shape[1:]), fill)
        out[target] = values.float()
        return out

    nothing = torch.zeros(1)
    queue = [everywhere(draws["keep"], 0.0), nothing, nothing, torch.zeros(len(target)),
             everywhere(torch.logit(draws["time"].double()).float() + 0.4, 0.0), torch.ones(len(target)),
             everywhere(draws["noise"].transpose(1, 2), 0.0)]
    names = ("rand", "randn", "randn_like")
    originals = [getattr(torch, n) for n in names]
    for n in names:
        setattr(torch, n, lambda *args, **kwargs: queue.pop(0))
    try:
        yield
    finally:
        for n, original in zip(names, originals):
            setattr(torch, n, original)


def in_package(folder, scratch, inputs, text, adapter=None):
    """(losses (2,), latents) of the package with our draws, after it has generated once from the folder as it stands."""
    copy, version = float32_copy(folder, scratch)
    cls = golden.VoxCPM2Model if version == "2" else golden.VoxCPMModel
    settings = adapter and (golden.LoRAConfig2 if version == "2" else golden.LoRAConfig)(
        **json.loads((adapter / "lora_config.json").read_text())["lora_config"])
    with contextlib.redirect_stderr(io.StringIO()):
        published = cls.from_local(str(folder), optimize=False, device="cpu", lora_config=settings)
        if adapter:
            published.load_lora_weights(str(adapter))
        wave = published.generate(target_text=text, max_len=4)
    assert wave.numel() and wave.isfinite().all(), f"{folder}: the package makes no sound of it"

    model = golden.load(copy, version, adapter)
    tensors = {k: v for k, v in model.state_dict().items() if not k.startswith("audio_vae.") and "lora_" not in k}
    path = next(folder / n for n in ("model.safetensors", "pytorch_model.bin") if (folder / n).is_file())
    stored = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    stored = stored.get("state_dict", stored)
    assert stored.keys() == tensors.keys(), f"{path}: {sorted(stored.keys() ^ tensors.keys())[:4]}"  # the package would not say

    count = sum(k.startswith("rows/") and k.endswith("/text") for k in inputs)
    examples = [{k: inputs[f"rows/{i}/{k}"] for k in ("text", "latents")} for i in range(count)]
    batch = golden.packed(model, examples)
    with torch.no_grad(), drawn({k: inputs[f"draws/{k}"] for k in ("noise", "time", "keep")}, batch["loss_mask"].flatten().bool()):
        out = model(**batch)
    noise = inputs["noise"]
    latents, _, margin, _ = golden.generate(model.eval(), {"text": text, "length": len(noise)}, noise, None, None)
    return torch.stack([out["loss/diff"], out["loss/stop"]]), latents, margin


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("base", "adapter", "merged", "full", "inputs"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    inputs = load_file(args.inputs)
    with safe_open(args.inputs, "pt") as f:
        text = f.metadata()["text"]
    failed, seen = False, {}

    def compare(what, theirs, ours, tolerance, note=""):
        nonlocal failed
        off = ((theirs - ours).abs() / ours.abs().clamp(min=1)).max().item()
        failed |= not off <= tolerance
        print(f"{'ok' if off <= tolerance else 'FAILED'}  {what}: off by {off:.1e}, allowed {tolerance:.0e}{note}")

    with tempfile.TemporaryDirectory() as scratch:
        for kind, folder, adapter in (("base", args.base, None), ("adapter", args.base, args.adapter),
                                      ("merged", args.merged, None), ("full", args.full, None)):
            losses, latents, margin = in_package(folder, scratch, inputs, text, adapter)
            seen[kind] = losses
            compare(f"{kind} losses", losses, inputs[f"{kind}/losses"], 1e-5)
            compare(f"{kind} latents", latents, inputs[f"{kind}/latents"], 1e-4, f" (nearest quantiser border {margin:.0e})")
    half = next(iter(load_file(args.merged / "model.safetensors").values())).dtype == torch.bfloat16
    compare("merged against adapter", seen["merged"], seen["adapter"], 3e-2 if half else 1e-5)
    for kind in ("adapter", "full"):
        moved = (seen[kind] - seen["base"]).abs().max().item()
        failed |= moved < 1e-3
        print(f"{'ok' if moved >= 1e-3 else 'FAILED'}  {kind} changes the losses by {moved:.1e}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
