"""Five changes that people ask for, as patches; tests/test_forks.py applies each to a copy of the tree and
throws it away.

NAME.patch is the change. NAME.py says what must hold in the changed tree, in a folder with tiny checkpoints,
rows, and runs that were made before the change:  python -m tests.forks.NAME  (with the changed tree in
PYTHONPATH)
"""
import json
import sys
from pathlib import Path

import configs
import train


def run(settings, *flags):
    """train.py in this process, to its end. Returns what metrics.jsonl says of its training steps."""
    sys.argv = ["train.py", settings, *map(str, flags)]
    configs.run(train.main)
    return steps(flags[flags.index("--save_path") + 1])


def steps(folder):
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == "train"]


def goes_on(backbone):
    """A run of two steps from before the change goes on, with the numbers that an unchanged tree gives."""
    after = run(f"{backbone}.yaml", "--save_path", f"{backbone}_before", "--num_iters", 4)
    unchanged = steps(f"{backbone}_whole")
    assert [line["step"] for line in after] == [1, 2, 3, 4]
    for line, expected in zip(after, unchanged, strict=True):
        differ = {key: (value, line[key]) for key, value in expected.items() if line[key] != value}
        assert not differ, differ
