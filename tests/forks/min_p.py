"""Min-p in CSM: codes far less likely than the likeliest are not sampled; 0 changes nothing, 1 leaves the
likeliest alone."""
import torch

import models
from models.csm import pick
from tests.forks import goes_on


def said(model, **sampling):
    return torch.stack(list(model.frames("hello there", seed=3, min_len=5, max_len=6, **sampling)))


def main():
    goes_on("csm")
    u = torch.linspace(0.001, 1.0, 1000)[:, None]
    wanted = torch.tensor([0.5, 0.3, 0.15, 0.05])
    heat = 2.0  # of the draw: what is left out counts after it

    def share(*least):
        drawn = pick(heat * wanted.log().repeat(len(u), 1), u, heat, 0, *least)
        return torch.bincount(drawn, minlength=4) / len(u)

    assert torch.allclose(share(), wanted, atol=2e-3)
    assert torch.equal(share(), share(0.0))
    for least, left in ((0.2, 3), (0.5, 2)):
        expected = torch.where(torch.arange(4) < left, wanted, 0.0)
        assert torch.allclose(share(least), expected / expected.sum(), atol=2e-3)
    model = models.load("csm_base")
    plain = said(model)
    assert torch.equal(said(model, min_p=0.0), plain) and not torch.equal(said(model, min_p=1.0), plain)
    assert torch.equal(said(model, min_p=1.0), said(model, temperature=0.0))


if __name__ == "__main__":
    main()
