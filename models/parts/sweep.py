"""A search over settings: a random value of each, a run for each draw of them, and a table of what came out.

    learning_rate: {log_uniform: [1e-5, 1e-3]}    # a file of ranges; both ends may come
    lora.r: {choice: [4, 8, 16]}
    lora.dropout: {uniform: [0.0, 0.1]}           # two whole numbers give whole numbers
    rank_by: loss/total                           # of the validation lines in metrics.jsonl; lowest is best

What trial 7 draws is a function of ranges, seed and 7: more trials later leave the first as they are.
Nothing here trains. Each trial is a process of its own with a run folder of its own, which anybody could have
started by hand; sweep.json holds what has come of them, so that one which has ended is not run again.
"""
import json
import math
import random
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from models.parts import Invalid
from models.parts.plain import as_record, need, parse, read_object, read_yaml, shown, typed, write_file

RESULTS, TABLE = "sweep.json", "sweep.md"
RANKED_BY = "loss/total"
DIGITS = 3  # of a number that is drawn: as many as anybody would type, and the table stays narrow
KINDS = "uniform, log_uniform or choice"
ENDED = (0, 1)  # exit codes of a run that went to its end, and of one that failed in it


class Range(NamedTuple):
    """Where the values of a setting come from."""

    kind: str
    values: list

    def draw(self, chance):
        if self.kind == "choice":
            return chance.choice(self.values)
        low, high = self.values
        whole = isinstance(low, int) and isinstance(high, int)
        if self.kind == "uniform":
            value = chance.uniform(low, high)
        else:
            value = math.exp(chance.uniform(math.log(low), math.log(high)))
        if whole:
            return round(value)
        return min(max(float(f"{value:.{DIGITS}g}"), low), high)


@dataclass
class Trial:
    """One run: what it was told, and how it ended."""

    number: int
    values: dict = field(default_factory=dict)
    code: int = -1  # of its process; -1: not yet run to an end
    best: float | None = None  # the lowest of the number that ranks
    step: int = 0  # that had it
    seconds: float = 0.0

    @property
    def name(self):
        return f"trial_{self.number:02d}"

    @property
    def flags(self):
        """The values as words of a command line."""
        return [f"--{key}={text_of(value)}" for key, value in self.values.items()]


@dataclass
class Plan:
    """What is to be run."""

    rank_by: str
    trials: list[Trial]


def text_of(value):
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# ------------------------------------------------------------------------------------------------ the plan


def read_plan(path, trials, seed) -> Plan:
    """The trials that a file of ranges means."""
    ranges = read_yaml(path)
    rank_by = need(ranges, "rank_by", str, RANKED_BY)
    ranges.pop("rank_by", None)
    if not ranges:
        raise Invalid(f"{path} holds no setting; expected such as lora.dropout: {{uniform: [0.0, 0.1]}}")
    ranges = {key: range_of(f"{path}: {key}", value) for key, value in ranges.items()}
    planned = []
    for number in range(1, trials + 1):
        values = {}
        for key, source in ranges.items():  # each by its own seed: one more setting changes no other
            values[key] = source.draw(random.Random(f"{seed} {number} {key}"))
        planned.append(Trial(number, values))
    return Plan(rank_by, planned)


def range_of(where, given):
    """{log_uniform: [1e-5, 1e-3]} as a Range."""
    if not isinstance(given, dict) or len(given) != 1:
        raise Invalid(f"{where} is {shown(given)}, expected one of {KINDS}, as {{uniform: [0.0, 0.1]}}")
    [(kind, values)] = given.items()
    if kind not in ("uniform", "log_uniform", "choice"):
        raise Invalid(f"{where}: {shown(kind)} is not {KINDS}")
    if not isinstance(values, list) or not values:
        raise Invalid(f"{where}: {shown(values)} is no list; a choice lists its values, the others two ends")
    if kind == "choice":
        return Range(kind, values)
    try:
        low, high = map(number_of, values)
    except (ValueError, TypeError):
        raise Invalid(f"{where}: {shown(values)}, expected two numbers, the lower one first") from None
    if not low < high or kind == "log_uniform" and low <= 0:
        raise Invalid(f"{where}: {low:g} to {high:g} is no range; the lower end comes first, and that of "
                      "log_uniform is above 0")
    return Range(kind, [low, high])


def number_of(value):
    """A number; to YAML 1e-5 is a text."""
    if isinstance(value, bool) or not math.isfinite(float(value)):
        raise ValueError
    return value if isinstance(value, int) else float(value)


def recall(root, plan):
    """Put into the plan what has come of trials in an earlier process."""
    path = Path(root) / RESULTS
    if not path.is_file():
        return
    found = read_object(path)
    for raw in need(found, "trials", list):
        past = typed(Trial, as_record(raw, path))
        if past.number > len(plan.trials) or past.code not in ENDED:
            continue
        trial = plan.trials[past.number - 1]
        rank_by = need(found, "rank_by", str)
        if trial.values != past.values or rank_by != plan.rank_by:
            raise Invalid(f"{path}: {past.name} was made with {past.values} and ranked by {rank_by}, the "
                          f"ranges now give {trial.values} and {plan.rank_by}. Choose another save_path, or "
                          "take the ranges and the seed that it was begun with.")
        plan.trials[past.number - 1] = past


# ------------------------------------------------------------------------------------------------ running


def run(root, plan, command, say) -> int:
    """Run what has not been run, one after the other, and write the table after each. -> exit code

    command: the words that start a run, to which the folder and the values of a trial are added.
    """
    root = Path(root)
    for trial in plan.trials:
        if trial.code == 0:
            continue
        say(f"{trial.name} of {len(plan.trials)}: {' '.join(trial.flags)}")
        began = time.perf_counter()
        folder = root / trial.name
        trial.code = wait_for([*command, f"--save_path={folder}", *trial.flags])
        trial.seconds = round(time.perf_counter() - began, 1)
        if trial.code not in ENDED:  # refused, told to stop or killed: so would the others be
            say(f"{trial.name} ended with exit code {trial.code}; the same command goes on with it")
            return trial.code if trial.code > 0 else 128 - trial.code
        if trial.code == 0:
            trial.best, trial.step = lowest(folder / "metrics.jsonl", plan.rank_by)
        keep(root, plan)
    return max(trial.code for trial in plan.trials)


def wait_for(command):
    """The exit code of a process. Who ends this one ends that one, which saves and goes on next time."""
    process = subprocess.Popen(command)
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise


def lowest(path, name):
    """The lowest value of a number in the validations of a run, and its step. Step 0 is the base's."""
    values, names = {}, {}
    for text in path.read_text(encoding="utf-8").splitlines():
        line = parse(text, path)
        if line["split"] == "val" and line["step"]:
            names |= line
            values[line["step"]] = line.get(name)
    if name not in names:
        known = ", ".join(key for key in names if "/" in key)
        raise Invalid(f"rank_by is {name}, which no validation in {path} has; they have {known}")
    values = {step: value for step, value in values.items() if value is not None}  # NaN
    if not values:
        return None, 0
    step = min(values, key=values.get)
    return values[step], step


def keep(root, plan):
    """Write what has come of the trials so far, and the table."""
    values = json.dumps(asdict(plan), ensure_ascii=False, indent=1)
    write_file(root / RESULTS, values.encode())
    write_file(root / TABLE, table(plan).encode())


# ------------------------------------------------------------------------------------------------ the table


def ranked(plan) -> list[Trial]:
    """Those that have a number, the best first, then those that failed."""
    done = [trial for trial in plan.trials if trial.code in ENDED]
    return sorted(done, key=lambda trial: (trial.best is None, trial.best or 0.0, trial.number))


def table(plan):
    """The trials in Markdown, which reads well in a terminal, too."""
    keys = list(plan.trials[0].values)
    rows = [["rank", "trial", *keys, plan.rank_by, "at step", "seconds"]]
    for place, trial in enumerate(ranked(plan), 1):
        cells = [text_of(trial.values[key]) for key in keys]
        found = ["failed", "-"]
        if trial.best is not None:
            found = [f"{trial.best:.4f}", str(trial.step)]
        rows.append([str(place), trial.name, *cells, *found, f"{trial.seconds:.0f}"])
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        lines.append("| " + " | ".join(cells) + " |\n")
    return "".join(lines)
