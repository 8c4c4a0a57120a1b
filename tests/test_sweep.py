"""train.py --sweep: what is drawn, that nothing is run twice, and the table."""
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from models.parts import Invalid, sweep
from tests.running import free_locks, here, start
from tests.test_train import home  # noqa: F401  (a base and rows)

RANGES = """\
learning_rate: {log_uniform: [1e-4, 1e-2]}
lora.r: {choice: [2, 4]}
lora.dropout: {uniform: [0.0, 0.2]}
warmup_steps: {uniform: [0, 2]}
"""
FLAGS = ("lora.yaml", "--sweep", "ranges.yaml", "--num_iters", 2, "--max_steps", 2, "--val_manifest", "val.jsonl", "--valid_interval", 1)


@pytest.fixture
def go(home, tmp_path, monkeypatch):  # noqa: F811
    """go(trials, stop=n, flags) -> (exit code, stdout, stderr, names of the runs that were started)."""
    monkeypatch.chdir(home)
    Path("ranges.yaml").write_text(RANGES)
    before = signal.getsignal(signal.SIGTERM)

    def call(trials, *flags, stop=0):
        started = []

        def wait_for(command):
            started.append(next(word for word in command if word.startswith("--save_path")).rpartition("/")[2])
            if len(started) == stop:
                raise KeyboardInterrupt
            assert command[:2] == [sys.executable, str(Path(sweep.__file__).parents[2] / "train.py")]
            return start("train", command[2:], home).wait()

        monkeypatch.setattr(sweep, "wait_for", wait_for)
        code, out, said = here("train", [*FLAGS, "--save_path", tmp_path / "sweep", "--trials", trials, *flags])
        free_locks()
        return code, out.decode(), said, started

    yield call
    signal.signal(signal.SIGTERM, before)


def test_a_sweep_that_was_stopped_goes_on_and_ranks_what_it_has(go, tmp_path):
    """One of two trials, then Ctrl-C in the second; the first is not run again, nor are both a third time; a third is added."""
    code, _, said, started = go(2, stop=2)
    assert (code, started) == (130, ["trial_01", "trial_02"]) and "trial_02 of 2: --learning_rate=" in said
    code, out, said, started = go(2)
    assert (code, started) == (0, ["trial_02"]), said
    assert out == (tmp_path / "sweep/sweep.md").read_text() and len(out.splitlines()) == 4
    assert go(2)[3] == [] and go(3)[3] == ["trial_03"]
    trials = json.loads((tmp_path / "sweep/sweep.json").read_text())["trials"]
    found = []
    for trial in trials:
        run = tmp_path / "sweep" / f"trial_{trial['number']:02d}"
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses = {line["step"]: line["loss/total"] for line in lines if line["split"] == "val" and line["step"]}
        assert trial["best"] == min(losses.values()) == losses[trial["step"]]
        found.append(trial["best"])
        settings = (run / "config.yaml").read_text()
        r = trial["values"]["lora.r"]
        assert f"  r: {r}\n  alpha: {2.0 * r}\n" in settings  # a rank that is drawn keeps the scale
        assert f"warmup_steps: {trial['values']['warmup_steps']}\n" in settings
    table = [line.split("|")[2].strip() for line in (tmp_path / "sweep/sweep.md").read_text().splitlines()[2:]]
    assert table == [f"trial_{1 + found.index(best):02d}" for best in sorted(found)]
    # In a folder of other settings, or of other ranges, nothing goes on.
    code, _, said, started = go(3, "--batch_size", 3)
    assert (code, started) == (2, []) and "holds a sweep with other settings: batch_size: 2 there, 3 here" in said
    Path("ranges.yaml").write_text(RANGES.replace("1e-2", "1e-1"))
    code, _, said, started = go(3)
    assert (code, started) == (1, []) and "trial_01 was made with {'learning_rate'" in said


def test_what_no_trial_would_accept_is_told_before_the_first(go):
    for line, code, words in (
        ("learning_ratee: {uniform: [0.0, 1.0]}", 2, "--learning_ratee: unknown; the nearest known name is learning_rate"),
        ("ema: {choice: [0.5, 1.5]}", 2, "ema is 1.5"),
        ("lora.r: {uniform: [0.1, 0.9]}", 2, "is not a whole number"),
        ("rank_by: loss/total", 1, "holds no setting"),
        ("ema: {normal: [0.0, 1.0]}", 1, "ranges.yaml: ema: normal is not uniform, log_uniform or choice"),
        ("ema: 0.5", 1, "ranges.yaml: ema is 0.5, expected one of uniform"),
        ("ema: {uniform: [1.0, 0.5]}", 1, "1 to 0.5 is no range"),
        ("ema: {log_uniform: [0, 1]}", 1, "above 0"),
        ("ema: {uniform: [low, high]}", 1, "expected two numbers"),
        ("ema: {choice: []}", 1, "is no list"),
    ):
        Path("ranges.yaml").write_text(line + "\n")
        got, _, said, started = go(12)
        assert (got, started) == (code, []) and words in said, (line, said)
    for flags, words in ((("--overwrite",), "without overwrite"), (("--dry_run",), "without dry_run"),
                         (("--val_manifest=",), "give val_manifest")):
        code, _, said, started = go(2, *flags) if flags[0] != "--val_manifest=" else no_validation()
        assert code == 2 and words in said and not started


def no_validation():
    code, _, said = here("train", ["lora.yaml", "--sweep", "ranges.yaml", "--save_path", "nowhere"])
    return code, "", said, []


def test_ranges_are_met_and_more_trials_or_settings_change_no_other(tmp_path):
    file = tmp_path / "ranges.yaml"
    file.write_text(RANGES)
    plan = sweep.read_plan(file, 400, 42)
    rates, ranks, drops, steps = ([trial.values[key] for trial in plan.trials] for key in plan.trials[0].values)
    assert 1e-4 <= min(rates) < 1.2e-4 and 0.8e-2 < max(rates) <= 1e-2
    assert 150 < sum(rate < 1e-3 for rate in rates) < 250  # as many in each decade
    assert set(ranks) == {2, 4} and set(steps) == {0, 1, 2} and all(isinstance(n, int) for n in steps)
    assert 0 <= min(drops) < 0.01 and 0.19 < max(drops) <= 0.2 and 0.08 < sum(drops) / 400 < 0.12
    file.write_text("seed: {choice: [1, 2]}\n" + RANGES)
    more = sweep.read_plan(file, 500, 42)
    assert all(a.values == {k: v for k, v in b.values.items() if k != "seed"} for a, b in zip(plan.trials, more.trials))
    assert sweep.read_plan(file, 1, 43).trials[0].values != more.trials[0].values
    assert sweep.Trial(1, {"a": True, "b": None, "c": ["q", "v"], "d": 3e-5, "e": "wsd"}).flags == [
        "--a=true", "--b=null", '--c=["q", "v"]', "--d=3e-05", "--e=wsd"]


def test_a_failed_trial_ranks_last_is_tried_again_and_a_wrong_number_is_named(tmp_path, monkeypatch):
    file = tmp_path / "ranges.yaml"
    file.write_text("seed: {choice: [1, 2, 3]}\nrank_by: replay/loss/total\n")
    codes, losses, heard = [1, 0, 0], iter([(5.0, 3.0), (4.0, None)]), []

    def wait_for(command):
        folder = Path(command[1].partition("=")[2])
        folder.mkdir(parents=True)
        code = codes.pop(0)
        values = (1.0, *next(losses)) if code == 0 else ()
        folder.joinpath("metrics.jsonl").write_text("".join(
            json.dumps({"step": n, "split": "val", "replay/loss/total": value}) + "\n" for n, value in enumerate(values)))
        return code

    monkeypatch.setattr(sweep, "wait_for", wait_for)
    plan = sweep.read_plan(file, 3, 0)
    assert sweep.run(tmp_path, plan, ["train"], heard.append) == 1
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (tmp_path / sweep.TABLE).read_text().splitlines()]
    assert [line[1] for line in lines[2:]] == ["trial_02", "trial_03", "trial_01"]
    assert [line[3:5] for line in lines[2:]] == [["3.0000", "2"], ["4.0000", "1"], ["failed", "-"]]  # not the 1.0 of the base
    again = sweep.read_plan(file, 3, 0)
    sweep.recall(tmp_path, again)
    assert [trial.code for trial in again.trials] == [1, 0, 0]
    (tmp_path / "m.jsonl").write_text('{"step": 1, "split": "val", "loss/total": 1.0, "loss/diff": 1.0}\n')
    with pytest.raises(Invalid, match="rank_by is loss/x, .* they have loss/total, loss/diff"):
        sweep.lowest(tmp_path / "m.jsonl", "loss/x")


def test_who_ends_the_sweep_ends_the_run_which_may_save(tmp_path):
    """The child says that it listens by sending SIGINT to its parent; it must get SIGTERM and be waited for."""
    child = ("import os, signal, sys, time\n"
             "def save(*_):\n    open(sys.argv[1], 'w').write('saved')\n    sys.exit(143)\n"
             "signal.signal(signal.SIGTERM, save)\nos.kill(os.getppid(), signal.SIGINT)\n"
             # not pause(): a signal that came just before it would wait for the next one
             "while True:\n    time.sleep(0.01)\n")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what it sends to the background deaf to it
    try:
        with pytest.raises(KeyboardInterrupt):
            sweep.wait_for([sys.executable, "-c", child, str(tmp_path / "said")])
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "said").read_text() == "saved"
    assert sweep.wait_for([sys.executable, "-c", "raise SystemExit(3)"]) == 3
