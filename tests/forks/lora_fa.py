"""LoRA-FA: A stays as it was drawn, B is trained; the adapter holds both and speaks like any other."""
import torch
from safetensors.torch import load_file

import lora
import models
from tests.forks import goes_on, run


def main():
    goes_on("voxcpm")
    run("voxcpm.yaml", "--save_path", "fa", "--lora.freeze_a", "--num_iters", 3, "--save_interval", 1)
    first, last = (load_file(f"fa/step_{n:07d}/lora_weights.safetensors") for n in (1, 3))
    for name in first:
        assert torch.equal(first[name], last[name]) == name.endswith("lora_A"), name
    saved = torch.load("fa/latest/optimizer.pth", weights_only=True)["optimizer"]["param_groups"][0]["params"]
    assert len(saved) == sum(name.endswith("lora_B") for name in first)
    model = models.load("voxcpm_base")
    loaded, skipped = lora.load_lora_weights(model, "fa/latest")
    assert len(loaded) == len(first) and not skipped


if __name__ == "__main__":
    main()
