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
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch  # noqa: F401  here, so that no mutant has to wait for it: each is a fork of this process
import transformers  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent.parent
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", ".carry", "__pycache__", ".pytest_cache", "*.pyc", "runs")
OWN = {"tests", "models", "configs", "demo", *(path.stem for path in ROOT.glob("*.py"))}


def run(mutant):
    item, file, old, new, test = mutant
    text = (ROOT / file).read_text()
    if text.count(old) != 1:
        return f"the text occurs {text.count(old)} times"
    with tempfile.TemporaryDirectory() as tmp:
        tree, log = Path(tmp) / "tree", Path(tmp) / "log"
        shutil.copytree(ROOT, tree, ignore=LEFT_OUT)
        (tree / file).write_text(text.replace(old, new))
        child = os.fork()
        if not child:
            os._exit(pytest_in(tree, test, log))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == pytest.ExitCode.TESTS_FAILED:
            return "killed"
        return "survived" if code == 0 else f"pytest ended with {code}: {log.read_text()[-300:]}"


def pytest_in(tree, test, log):
    """In a fork: run pytest in a copy of the tree, as if nothing of this one had been imported. Its exit status."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.chdir(tree)
    sys.path[:] = [str(tree)] + [path for path in sys.path if Path(path).resolve() != ROOT]
    for name in list(sys.modules):
        if name.partition(".")[0] in OWN:
            del sys.modules[name]
    try:
        return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *shlex.split(test)]))
    except BaseException as error:
        os.write(2, repr(error).encode())
        return 70


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("subjects", nargs="*", help="files of tests/mutants; all of them without one")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
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
