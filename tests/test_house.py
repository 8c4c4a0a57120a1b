"""The rules of the house that a reader relies on and that nobody would notice breaking."""
import ast
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

ROOT = Path(ROOT)
TOP = {"README.md", "train.py", "infer.py", "prepare_data.py", "merge_lora.py", "validate.py", "bench.py", "lora.py",
       "models", "configs", "demo", "tests", "requirements.txt", "requirements-dev.txt", "LICENSE", ".ci",
       ".gitignore"}
PACKAGES = {"torch", "numpy", "safetensors", "soundfile", "yaml", "tensorboard"}
DEV = {"pytest", "transformers", "peft", "tokenizers", "sentencepiece"}
OWN = {"configs", "lora", "models", "tests", "demo"} | {p.stem for p in ROOT.glob("*.py")}
SCRIPTS = sorted(p for p in ROOT.glob("*.py") if p.name != "lora.py")
PRODUCT = sorted(p for glob in ("*.py", "models/**/*.py", "configs/*.py", "demo/*.py") for p in ROOT.glob(glob))
GOLDEN = sorted(p for glob in ("golden", "peers") for p in ROOT.glob(f"tests/{glob}/*.py"))    # import other packages
TESTS = sorted(p for p in ROOT.glob("tests/**/*.py") if p not in GOLDEN)
TEXTS = {p: p.read_text(encoding="utf-8") for p in PRODUCT + TESTS + GOLDEN}
TREES = {p: ast.parse(text, str(p), feature_version=(3, 10)) for p, text in TEXTS.items()}      # Python 3.10 reads it


LATE = {"from torch.utils.tensorboard import SummaryWriter"}    # takes longer to import than all the rest of train.py


def name(path):
    return path.relative_to(ROOT).as_posix()


def module(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path):
    """Dotted names of what a file imports, `from a import b` as a.b."""
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name(path)} line {node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_top_level_holds_only_what_the_design_lists():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    found = {line.split("/")[0] for line in listed if line} or TOP
    assert found <= TOP, f"not in the house: {sorted(found - TOP)}"


def test_scripts_lora_and_layers_know_no_backbone():
    for path in [*SCRIPTS, ROOT / "lora.py", ROOT / "models/parts/layers.py"]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            found = re.search("voxcpm|csm|higgs|indextts", line, re.I)
            assert not found, f"{name(path)} line {number}: {line.strip()}"


def test_only_six_packages_are_imported():
    known = sys.stdlib_module_names | OWN | PACKAGES
    for path in PRODUCT + TESTS:
        allowed = known if path in PRODUCT else known | DEV
        foreign = {full.split(".")[0] for full in imported(path)} - allowed
        assert not foreign, f"{name(path)} imports {sorted(foreign)}"
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = {re.split(r"[<>=!~ ]", line)[0] for line in lines if line and not line.startswith("#")}
    assert required == PACKAGES - {"yaml"} | {"pyyaml"}


def test_imports_point_one_way():
    for path in PRODUCT:
        for full in imported(path):
            head, own = full.split(".")[0], name(path)
            if head not in OWN:
                continue
            assert head != "tests", f"{own} imports {full}"
            if own.startswith("models/parts/"):
                assert full.startswith("models.parts"), f"{own} imports {full}: a part knows only other parts"
            elif own.startswith("models/codecs/"):
                assert full.startswith(("models.parts", "models.codecs")), f"{own} imports {full}: a codec knows no backbone"
            elif own.startswith("models/"):
                assert head == "models", f"{own} imports {full}: models know no script"
            elif own.startswith("configs/"):
                assert full.startswith(("models.parts.", "configs.aliases.")), f"{own} imports {full}"
            elif own == "lora.py":
                assert head in ("models", "configs"), f"{own} imports {full}"
            elif full.startswith("models.codecs") and own == "validate.py":
                assert full == "models.codecs.campplus", f"{own} imports {full}: it hears voices with one frozen model"
            elif head == "models" and path in SCRIPTS:
                assert full == "models" or full.startswith("models.parts"), f"{own} imports {full}: models.find does that"
    backbones = {p.stem for p in ROOT.glob("models/*.py")} - {"__init__"}
    for path in ROOT.glob("models/*.py"):
        for full in imported(path):
            other = full.split(".")[1:2] and full.split(".")[1]
            assert full.split(".")[0] != "models" or other not in backbones - {path.stem}, f"{name(path)} imports {full}"


def test_nothing_is_imported_late():
    for path in PRODUCT:
        for outer in ast.walk(TREES[path]):
            if isinstance(outer, (ast.FunctionDef, ast.AsyncFunctionDef)):
                late = [n for n in ast.walk(outer) if isinstance(n, (ast.Import, ast.ImportFrom))]
                late = [n for n in late if ast.unparse(n) not in LATE]
                assert not late, f"{name(path)} line {late[0].lineno}: an import inside {outer.name}"


def test_pickles_are_read_with_weights_only():
    unsafe = ("pickle.load", "pickle.loads", "eval", "exec", "yaml.load", "yaml.unsafe_load")
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            what, where = ast.unparse(node.func), f"{name(path)} line {node.lineno}"
            if what == "torch.load":
                safe = [k.value for k in node.keywords if k.arg == "weights_only"]
                assert safe and ast.unparse(safe[0]) == "True", f"{where}: torch.load without weights_only=True"
            assert path not in PRODUCT or what not in unsafe, f"{where}: {what}"


def test_nothing_is_half_done():
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Name):
                assert node.id != "NotImplementedError", f"{name(path)} line {node.lineno}: an unfinished branch"
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{name(path)} line {node.lineno}: a bare except"
        note = re.search(r"\b(TODO|FIXME|XXX)\b", TEXTS[path])
        assert not note or path.name == "test_house.py", f"{name(path)}: a note to finish something"


def test_no_file_names_a_place_on_one_machine():
    for path in [*TEXTS, *(p for glob in ("*.md", "*/*.md", "*/*.yaml", "*.txt") for p in ROOT.glob(glob))]:
        found = re.search(r"(?<![\w.])/(work|tmp|opt|root|home|Users)/\S*", path.read_text(encoding="utf-8"))
        assert not found, f"{name(path)}: {found[0]}"


# What takes seconds to import, and is wanted by few who import a file of this project.
HEAVY = ("tensorboard", "torch.utils.tensorboard", "torch._dynamo", "torch._inductor", "torch.distributed.run", "numba", "scipy",
         "librosa", "transformers", "peft")
PROBE = r"""
import json, os, signal, sys
import torch
def state():
    return (dict(os.environ), os.getcwd(), torch.get_rng_state().tolist(), torch.get_default_dtype(), torch.get_num_threads(),
            torch.is_grad_enabled(), str(signal.getsignal(signal.SIGTERM)), str(signal.getsignal(signal.SIGINT)))
heavy, covered = sys.argv[1].split(","), set()
before = set(sys.modules)
for module in sys.argv[2:]:
    if module in covered:                       # it was part of an import that changed nothing
        continue
    read, write = os.pipe()
    child = os.fork()                           # each try starts from a process that has imported nothing but torch
    if not child:
        start = state()
        try:
            __import__(module)
            late = [name for name in heavy if name in sys.modules and name not in before]
            answer = list(sys.modules)
            if state() != start:
                answer = "importing it changes the process"
            elif late:
                answer = "importing it imports " + ", ".join(late)
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        with os.fdopen(write, "w") as pipe:
            json.dump(answer, pipe)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        answer = json.load(pipe)
    os.waitpid(child, 0)
    if isinstance(answer, str):
        sys.exit(f"{module}: {answer}")
    covered |= set(answer)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork to start each import from the same process")
def test_importing_changes_nothing_and_brings_nothing_heavy():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    widest_first = sorted(map(module, PRODUCT), key=lambda m: (m.count("."), m in ("models", "configs", "lora")))
    command = [sys.executable, "-c", PROBE, ",".join(HEAVY), *widest_first]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert not done.stdout, f"an import prints: {done.stdout[:200]}"


def test_every_mutant_still_finds_its_line():
    for path in sorted((ROOT / "tests" / "mutants").glob("[!_]*.py")):
        for item, file, old, new, _ in importlib.import_module(f"tests.mutants.{path.stem}").MUTANTS:
            assert (ROOT / file).read_text(encoding="utf-8").count(old) == 1 and old != new, f"{path.stem} {item}: {file} has {old!r} not once"
