"""Break one line at a time and see a test go red: python -m tests.mutants [SUBJECT ...] [--jobs N].

Each file beside this one holds MUTANTS, a list of (item, file, old, new, test): the numbered item of the model's
sheet, the file, the text to replace (it must occur exactly once), what stands there instead, and the pytest
arguments that must fail. The mutant is made in a copy of the working tree. Exit 1 if fewer than 95 % are killed.
"""
import argparse
import concurrent.futures
import importlib
import os
import pkgutil
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def run(mutant):
    item, file, old, new, test = mutant
    text = (ROOT / file).read_text()
    if text.count(old) != 1:
        return f"the text occurs {text.count(old)} times"
    with tempfile.TemporaryDirectory() as tmp:
        tree = Path(tmp) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv", ".carry", "__pycache__", ".pytest_cache", "*.pyc", "runs"))
        (tree / file).write_text(text.replace(old, new))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *test.split()]
        done = subprocess.run(command, cwd=tree, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode == 1:
        return "killed"
    return "survived" if done.returncode == 0 else f"pytest ended with {done.returncode}: {(done.stdout + done.stderr)[-300:]}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("subjects", nargs="*", help="files of tests/mutants; all of them without one")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    names = args.subjects or [m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)]) if m.name != "__main__"]
    killed = total = 0
    for name in names:
        mutants = importlib.import_module(f"tests.mutants.{name}").MUTANTS
        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            for mutant, verdict in zip(mutants, pool.map(run, mutants)):
                killed, total = killed + (verdict == "killed"), total + 1
                print(f"{name} {mutant[0]}: {verdict}: {mutant[1]}: {mutant[2].strip()[:70]!r} -> {mutant[3].strip()[:70]!r}", flush=True)
    print(f"{killed} of {total} mutants killed")
    sys.exit(0 if killed >= 0.95 * total else 1)


if __name__ == "__main__":
    main()
