"""Load an adapter of ours with PeftModel of the installed peft, and hold its losses against ours.

    pip install -r tests/golden/requirements_peft13.txt; python tests/golden/check_higgs_adapter.py

The tests do this with a current peft. This script is for the oldest that is promised, which does not run with a
transformers that knows Higgs Audio: so the adapter is laid over plain modules that have the published names, in
either naming. Prints one line per naming; exit 1 if a loss differs by more than 1e-5 of itself.
"""
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import peft  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

import lora  # noqa: E402
import models  # noqa: E402
from tests import test_higgs, tiny_higgs  # noqa: E402

HEAD = "audio_decoder_proj.audio_lm_head"
CLOSE = 1e-5  # relative; float32 sums in another order


def as_published(model, naming):
    """A plain module whose parts are those of the model, under the names of a naming."""
    root = nn.Module()
    for name in ["embed_tokens", "audio_codebook_embeddings", "layers", "norm", "audio_decoder_proj.text_lm_head", HEAD]:
        *path, leaf = model.published_name(f"{name}.weight", naming).removesuffix(".weight").split(".")
        place = root
        for step in path:
            if not hasattr(place, step):
                place.add_module(step, nn.Module())
            place = getattr(place, step)
        place.add_module(leaf, model.get_submodule(name))
    return root


def main():
    torch.manual_seed(0)
    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        base = tiny_higgs.write(Path(scratch) / "base", "original")
        plain, ours = models.load(base), models.load(base)
        lora.apply_lora_to_model(ours, {"r": 2, "alpha": 4, "target_modules": ["attn", "mlp", "audio_mlp"], "train_modules": [HEAD]})
        test_higgs.randomize(ours)
        with torch.no_grad():
            ours.get_submodule(HEAD).weight.mul_(1.1)
        wanted, before = test_higgs.mean_losses(ours), test_higgs.mean_losses(plain)
        for naming in ours.namings:
            folder = Path(scratch) / naming
            lora.save_lora_weights(ours, folder, naming=naming)
            theirs = models.load(base)
            root = as_published(theirs, naming)
            loaded = peft.PeftModel.from_pretrained(root, folder)
            # The head that was trained in full is a copy beside the old one, so it has to be put back in place.
            head = ours.published_name(f"{HEAD}.weight", naming).removesuffix(".weight")
            theirs.audio_decoder_proj.audio_lm_head = loaded.base_model.model.get_submodule(head)
            found = test_higgs.mean_losses(theirs)
            apart = max(abs(a - b) / b for a, b in zip(found, wanted))
            moved = max(abs(a - b) / b for a, b in zip(before, wanted))
            fields = len(json.loads((folder / "adapter_config.json").read_text()))
            print(f"peft {peft.__version__}, naming {naming}, {fields} fields: losses {found} and {wanted} differ by {apart:.1e}, from the base by {moved:.2f}")
            wrong += not apart < CLOSE < 100 * CLOSE < moved
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
