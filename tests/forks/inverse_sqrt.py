"""A rate that falls with the root of the steps and needs no length, beside the schedules that stand."""
from tests.forks import goes_on, run


def main():
    goes_on("voxcpm")
    lengths = ("--num_iters", 10, "--max_steps", 10, "--warmup_steps", 4)
    lines = run("voxcpm.yaml", "--save_path", "root", "--schedule", "inverse_sqrt", *lengths)
    rates = [line["lr"] / 0.01 for line in lines]
    expected = [0, 0.25, 0.5, 0.75, 1, (4 / 5) ** 0.5, (4 / 6) ** 0.5, (4 / 7) ** 0.5, 0.5**0.5, 2 / 3]
    assert all(abs(rate - share) < 1e-9 for rate, share in zip(rates, expected, strict=True)), rates


if __name__ == "__main__":
    main()
