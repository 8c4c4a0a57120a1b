"""CSM with a z-loss, off by default: it is what the formula says, it is weighed, and it pulls the logits'
sums to one."""
import models
from tests.forks import goes_on, run


def main():
    goes_on("csm")
    model = models.load("csm_base").train()
    example = model.encode({"audio": "a0.wav", "text": "hello"})
    batch, counts = model.collate([example])
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, out: seen.append(out.detach()))
    out = model(batch)
    by_hand = seen[0].double().exp().sum(-1).log().square().sum()
    assert abs(out["loss/z"].item() - by_hand.item()) < 1e-4 * by_hand.item()
    assert counts["loss/z"] == counts["loss/semantic"] == len(seen[0])
    lengths = ("--max_steps", 20, "--num_iters", 6)
    lines = run("csm.yaml", "--save_path", "z", "--lambdas.loss/z", 5, "--learning_rate", 0.05, *lengths)
    weighed = lines[0]["loss/semantic"] + lines[0]["loss/acoustic"] + 5 * lines[0]["loss/z"]
    assert abs(lines[0]["loss/total"] - weighed) < 1e-3
    assert lines[-1]["loss/z"] < 0.9 * lines[0]["loss/z"], [line["loss/z"] for line in lines]


if __name__ == "__main__":
    main()
