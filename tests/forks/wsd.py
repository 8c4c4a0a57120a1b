"""A schedule of warm-up, a stable rate and a decay over the last fifth, beside the cosine."""
from tests.forks import goes_on, run


def main():
    goes_on("voxcpm")
    lengths = ("--num_iters", 10, "--max_steps", 10, "--warmup_steps", 2)
    lines = run("voxcpm.yaml", "--save_path", "wsd", "--schedule", "wsd", *lengths)
    rates = [line["lr"] / 0.01 for line in lines]
    expected = [0, 0.5, 1, 1, 1, 1, 1, 1, 1, 0.5]
    assert all(abs(rate - share) < 1e-9 for rate, share in zip(rates, expected, strict=True)), rates


if __name__ == "__main__":
    main()
