"""The README's commands, links and Python run as they stand there; only paths are filled and runs are kept short.

A command that names a checkpoint, a folder of recordings or an adapter finds a tiny one at that path. What else can be
checked is: settings, sizes, the path for readers, and that a claim of speed names the script that prints it.
"""
import ast
import contextlib
import dataclasses
import importlib
import io
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

import bench
import configs
import lora
import models
import train
from models.parts import audio
from tests import coming_from, tiny_csm, tiny_higgs, tiny_indextts2
from tests import tiny_voxcpm as tiny
from tests.coming_from import slug
from tests.conftest import ROOT
from tests.peers import turns
from tests.running import start
from tests.tiny import fill

ROOT = Path(ROOT)
README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8") if README.is_file() else ""
COMING_FROM = ROOT / "configs" / "COMING_FROM.md"
PROSE = re.sub(r"^```.*?^```", "", TEXT, flags=re.M | re.S)
pytestmark = pytest.mark.skipif(not TEXT, reason="no README.md yet")

FEW = {"train": {"num_iters": 2, "epochs": 0, "val_samples": 0}, "infer": {"max_len": 8}}
# Programs that a README may name and that are not run here: installation, places, watching.
OTHERS = {"git", "cd", "pip", "tensorboard", "hf", "source", ".", "apt-get", "export", "pytest", "nvidia-smi", "aplay"}


def blocks(language, text=TEXT):
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def commands(block):
    """[words] of each command of a bash block: comments, continued lines, && and ; resolved, variables in front taken off,
    and what srun starts instead of srun."""
    out = []
    for line in block.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = [[]]
        for word in lexer:
            words.append([]) if word in ("&&", ";", "||", "&", "|") else words[-1].append(word)
        for command in words:
            while command and re.match(r"\w+=", command[0]):
                command = command[1:]
            if command and command[0] == "srun":
                command = command[command.index("torchrun") :]
            if command:
                out.append(command)
    return out


def script_of(command):
    """(script, its arguments) of `python x.py ...` or `torchrun --flags x.py ...`, else (None, None)."""
    if not re.fullmatch(r"(\S*/)?(python3?|torchrun)", command[0]):
        return None, None
    at = next((i for i, word in enumerate(command) if word.endswith(".py")), None)
    return (None, None) if at is None else (command[at].removesuffix(".py"), command[at + 1:])


def after(mark):
    """The first bash block behind a mark or heading."""
    found = re.search(rf"{mark}.*?^```(?:bash|sh)\n(.*?)^```", TEXT, re.M | re.S | re.I)
    return found[1] if found else None


def parse(script, argv):
    """The settings that a command of a script stands for; Usage where a flag is wrong."""
    module = importlib.import_module(script)
    cls, name, extra = next((getattr(module, m[1]), m[2] or "train", "extra=True" in m[0]) for m in
                            re.finditer(r'configs\.parse\((\w+)(?:, argv)?(?:, script="(\w+)")?[^)]*\)', Path(module.__file__).read_text()))
    if not extra:
        return configs.parse(cls, argv, name)
    cfg, rest = configs.parse(cls, argv, name, extra=True)
    known = {f.name for b in models.backbones().values() for f in dataclasses.fields(b.Sampling)}
    assert set(rest) <= known, f"no backbone has {set(rest) - known}"
    return cfg


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with what the repository has in it, where runs may be written."""
    for name in ("configs", "demo"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def short(script, argv):
    """The same command for a few steps: what it says of a length gives way."""
    argv = list(argv)
    for key, value in FEW.get(script, {}).items():
        at = next((i for i, a in enumerate(argv) if re.match(f"(--)?{key.replace('_', '[-_]')}(=|$)", a)), None)
        if at is not None:
            del argv[at : at + 1 + ("=" not in argv[at])]
        argv += [f"--{key}", str(value)]
    return argv


def run(script, argv, folder):
    process = start(script, short(script, argv), folder)
    assert process.wait() == 0 and "Traceback" not in process.said, f"{script} {argv}\n{process.said}"
    return process.said


def tiny_checkpoint(path, version="1.5"):
    if path and not Path(path).exists():
        assert not Path(path).is_absolute(), f"{path}: a path of one machine"
        if "csm" in path:
            tiny_csm.write(path)
        elif "higgs" in path:
            tiny_higgs.write(path)
        elif "IndexTTS" in path:
            tiny_indextts2.write(path)
        else:
            tiny.write(path, version, codec_file="audiovae.safetensors")


def tiny_adapter(path, csm, base=""):
    """An adapter that does something: VoxCPM's folder, the folder or single file of csm-mlx's names, or that of the base."""
    if "higgs" in base or "IndexTTS" in base:
        model = models.load(base)
        lora.apply_lora_to_model(model, {"r": 2, "alpha": 4.0})
        for module in lora.lora_modules(model).values():
            torch.nn.init.normal_(module.lora_B, std=0.1)
        return lora.save_lora_weights(model, path, base=base)
    if not csm:
        return tiny.write_adapter(path, "1.5")
    file = Path(path) if path.endswith(".safetensors") else Path(path) / "lora_weights.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    module = "backbone.layers.0.self_attn.v_proj"
    save_file(fill({f"{module}.lora_A": (4, 48), f"{module}.lora_B": (32, 4)}), file)
    (file.parent / "lora_config.json").write_text('{"r": 4, "alpha": 8}')


def tone(path, seconds, pitch, rate=22050):
    t = torch.arange(int(seconds * rate)) / rate
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    audio.write(path, 0.3 * torch.sin(6.2832 * pitch * t) * (1 + 0.3 * torch.sin(40 * t)), rate)


def recordings(path):
    """Six tones with their texts beside them, or in the table that is named."""
    path = Path(path)
    folder, table = (path.parent, path) if path.suffix else (path, None)
    lines = []
    for i in range(6):
        tone((folder / "wavs" if table else folder) / f"a{i}.wav", 0.5 + 0.1 * i, 150 + 40 * i)
        text = f"hello there world, clip {i}"
        lines.append(f"a{i}|{text}" if path.suffix == ".csv" else f'{{"audio": "wavs/a{i}.wav", "text": "{text}"}}')
        if not table:
            (folder / f"a{i}.txt").write_text(text)
    if table:
        table.write_text("\n".join(lines) + "\n")


def test_every_bash_block_parses():
    found = blocks("bash") + blocks("sh")
    assert found
    for block in found:
        done = subprocess.run(["bash", "-n", "-c", block], capture_output=True, text=True)
        assert done.returncode == 0, f"{block}\n{done.stderr}"


def test_every_command_of_a_script_is_understood(workplace):
    seen = set()
    for command in (c for block in blocks("bash") + blocks("sh") for c in commands(block)):
        script, argv = script_of(command)
        if script is None:
            assert command[0].rpartition("/")[2] in OTHERS | {"python", "python3", "torchrun"}, f"what is {shlex.join(command)}?"
            continue
        assert (ROOT / f"{script}.py").is_file(), shlex.join(command)
        if "/" not in script and not {"--help", "-h"} & set(argv):
            seen.add(script)
            try:
                parse(script, argv)
            except configs.Usage as e:
                written = [a for a in argv if a.endswith((".yaml", ".yml")) and not Path(a).exists()]
                assert written and str(e).startswith(written[0]), f"{shlex.join(command)}: {e}"  # a file that a run writes
    assert {"train", "infer", "prepare_data", "merge_lora"} <= seen


def test_command_1_runs(workplace):
    if not (ROOT / "demo/base/model.safetensors").is_file():
        pytest.skip("no demo/base yet")
    block = after("<!-- command 1 -->")
    assert block, "the README has no command 1"
    ran = []
    for command in commands(block):
        script, argv = script_of(command)
        if script is None:
            continue
        ran.append(script)
        run(script, argv, workplace)
        if script == "infer" and "--output" in argv:
            assert Path(argv[argv.index("--output") + 1]).stat().st_size > 1000
    assert "train" in ran and "infer" in ran
    assert list(Path("runs").rglob("events.out.tfevents*")), "no TensorBoard log"


def test_your_own_voice_in_four_commands(workplace):
    """On six tones and a tiny checkpoint at the places that the block names; then the README's Python in the same folder."""
    block = after(r"^#+ [^\n]*four commands")
    assert block, "the README has no section on four commands"
    steps = [(s, a) for s, a in map(script_of, commands(block)) if s]
    assert [s for s, _ in steps][:3] == ["prepare_data", "train", "infer"] and len(steps) <= 4
    for script, argv in steps:
        cfg = parse(script, argv)
        version = next((v for v in tiny.VERSIONS for a in argv if re.search(rf"voxcpm-?{v}", a, re.I)), "1.5")
        if script == "prepare_data":
            for path in cfg.input:
                recordings(path)
            for path in cfg.ckpt_dir if isinstance(cfg.ckpt_dir, list) else [cfg.ckpt_dir]:
                tiny_checkpoint(path, version)
        elif script == "train":
            tiny_checkpoint(cfg.pretrained_path, version)
        elif cfg.ckpt_dir:
            tiny_checkpoint(cfg.ckpt_dir, version)
        for path in (getattr(cfg, k, "") for k in ("prompt_audio", "reference_audio")):
            if path and not Path(path).exists():
                tone(path, 1.0, 200)
        said = run(script, argv, workplace)
        for path in re.findall(r"^(\S+\.wav)$", said, re.M):
            assert Path(path).stat().st_size > 1000
    snippets = blocks("python")
    assert snippets, "the README has no Python"
    names = {}
    for code in snippets:
        python(code, names)
        for path in re.findall(r'audio\.write\("([^"]+)"', code):
            assert Path(path).stat().st_size > 1000
    assert any(torch.is_tensor(v) and v.ndim == 1 and len(v) > 1000 for v in names.values()), "no sound came out of the README's Python"


def python(code, names):
    """Run a snippet on the CPU in float32; checkpoints, adapters and recordings that it names are made where there are none.

    What has csm in its path is a CSM, and so is every adapter of a snippet that names one.
    """
    base = ""
    code = re.sub(r"(['\"])(cuda(:\d)?|mps|auto)\1", '"cpu"', code).replace("torch.bfloat16", "torch.float32")
    for call in (n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Call)):
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        texts = [n.value for n in ast.walk(call) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        if name == "load" and getattr(call.func.value, "id", "") == "models":
            base = texts[0]
            tiny_checkpoint(base)
        elif name == "load_lora_weights":
            for path in texts:
                if not Path(path).exists():
                    tiny_adapter(path, csm="csm" in code, base=base)
        for path in texts:
            if path.endswith((".wav", ".flac")) and not Path(path).exists() and name not in ("write", "save"):
                tone(path, 1.0, 200)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        exec(compile(code, "README.md", "exec"), names)


def anchors_of(text):
    """What a link into a page may name behind #."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return {slug(h) for h in re.findall(r"^#+ (.*)$", prose, re.M)} | set(re.findall(r"(?:id|name)=\"([^\"]+)\"", prose))


@pytest.mark.parametrize("page", [README, COMING_FROM], ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page):
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    links = re.findall(r"\]\(\s*<?([^)\s>]+)", prose) + re.findall(r"(?:href|src)=\"([^\"]+)\"", prose)
    links += re.findall(r"^\[[^\]]+\]:\s*(\S+)", prose, re.M)
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{link}: there is no {path}"
        if m := re.fullmatch(r"L(\d+)(?:-L\d+)?", anchor):
            assert int(m[1]) <= len(target.read_text(encoding="utf-8").splitlines()), link
        elif anchor:
            assert anchor in anchors_of(target.read_text(encoding="utf-8")), f"{link}: no such heading"


def test_every_script_that_is_named_is_there():
    paths = set(re.findall(r"(?<![\w<>/.-])[\w/]+\.py\b", TEXT))
    paths |= {f"{name.replace('.', '/')}.py" for name in re.findall(r"\btests\.[\w.]*\w", PROSE) if not name.endswith(".py")}
    assert {"train.py", "tests/peers/csm.py", "tests/peers/voxcpm.py"} <= paths
    missing = [path for path in sorted(paths) if not (ROOT / path).exists() and not (ROOT / path).with_suffix("").is_dir()]
    assert not missing, missing


def test_the_settings_named_in_configs_are_where_the_readme_says(workplace):
    """Each shipped YAML file is named, so that a reader finds the one for a checkpoint."""
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        family = re.sub(r"_(lora|full)$", "", path.stem)
        assert path.name in TEXT or family in TEXT, f"{path.name} is not mentioned"
        assert yaml.safe_load(path.read_text(encoding="utf-8")), path


def tables(heading, text=TEXT):
    """[cells of a row] of the first table behind a heading, without its head."""
    found = re.search(rf"^#+ {re.escape(heading)}\n.*?^\|[^\n]*\n\|[-| ]+\n(.*?)^(?!\|)", text, re.M | re.S)
    assert found, f"no table behind {heading!r}"
    return [[cell.strip() for cell in row.strip().strip("|").split("|")] for row in found[1].splitlines()]


def test_settings_lie_where_the_commands_put_things():
    """hf download, prepare_data.py and the YAML files speak of the same folders, and each checkpoint's hub id is in the table."""
    hub = {cell.split(",")[0] for _, cell, *_ in tables("Choose a checkpoint")}
    local = {name.rpartition("/")[2] for name in hub}
    assert "hf download openbmb/VoxCPM1.5 --local-dir checkpoints/VoxCPM1.5" in TEXT
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        folder, _, name = settings["pretrained_path"].rpartition("/")
        assert folder == "checkpoints" and name in local, f"{path.name}: {settings['pretrained_path']}"
        assert any(f"its hub id is {name}" in path.read_text(encoding="utf-8") for name in hub), path.name
        assert (settings["train_manifest"], settings["val_manifest"]) == ("data/train.jsonl", "data/val.jsonl"), path.name
        assert settings["save_path"] == f"runs/{path.stem}", path.name


def test_a_checkpoint_that_is_not_there_is_no_reason_to_invent_a_hub_id(tmp_path, monkeypatch):
    """The folder of a YAML file looks like org/name; what is advised is the README, which has the true ids."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    (tmp_path / "mine").mkdir()
    for path in ("checkpoints/VoxCPM1.5", "checkpoints/csm-1b", "mine/voice"):
        with pytest.raises(models.Invalid) as error:
            models.folder_of(path)
        assert "hf download" not in str(error.value), error.value
        assert "README.md has the hub id of each" in str(error.value) and path in str(error.value)
    with pytest.raises(models.Invalid, match="hf download openbmb/VoxCPM2 --local-dir checkpoints/VoxCPM2"):
        models.folder_of("openbmb/VoxCPM2")
    assert "| hub id |" in TEXT


def test_the_table_of_settings_names_settings_and_has_the_numbers_of_the_yaml_files():
    index = configs.names(train.Train, "train")
    options = {f"backbone.{f.name}" for b in models.backbones().values() for f in dataclasses.fields(b.Training)}
    rows = {cells[0]: cells[1:] for cells in tables("Settings")}
    for first in rows:
        for name in re.findall(r"`([^`]+)`", first):
            assert name in index or name in options, f"{name} is no setting"
    few, hours, full, _ = rows["`learning_rate`"]
    assert few == hours
    for path in (ROOT / "configs").glob("*.yaml"):
        rate = yaml.safe_load(path.read_text(encoding="utf-8"))["learning_rate"]
        said = full if path.stem.endswith("_full") else hours
        assert rate in [float(number) for number in re.findall(r"\d+e-\d", said)], f"{path.name}: {rate}, the table has {said}"


# ------------------------------------------------------------------------------------------------ the path for readers


def defined(path):
    """Functions and classes of a file, methods as Class.method."""
    out = set()
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            out.add(node.name)
        if isinstance(node, ast.ClassDef):
            out |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return out


@pytest.mark.parametrize("row", tables("How it works: a reading path"), ids=lambda row: row[3].strip("`").partition(" -k ")[2])
def test_what_the_reading_path_names_is_there(row):
    """Files with their functions, the line to break, and the test that notices (which is what tests/mutants prove)."""
    read, _, broken, command = row
    files = re.findall(r"\[([\w/.]+)\]\([^)]*\)(?:: ([^\[]*))?", read)
    for path, names in files:
        for name in re.findall(r"`([\w.]+)`", names):
            assert name in defined(path), f"{path} has no {name}"
    old, new = re.fullmatch(r"`([^`]+)` to `([^`]+)`", broken).groups()
    texts = [(ROOT / path).read_text(encoding="utf-8") for path, _ in files]
    assert sum(text.count(old) for text in texts) == 1 and old != new, f"{old} is not there once"
    file, _, word = command.strip("`").partition(" -k ")
    found = re.findall(r"def (test_\w+)", (ROOT / file).read_text(encoding="utf-8"))
    assert any(word in name for name in found), f"{file} has no test with {word!r} in its name"


# ------------------------------------------------------------------------------------------------ other tools


def test_each_tool_has_its_line():
    assert coming_from.readme() in TEXT, "paste the output of: python -m tests.coming_from readme"


def test_the_python_for_people_from_other_tools_runs(workplace):
    snippets = blocks("python", COMING_FROM.read_text(encoding="utf-8"))
    assert snippets
    names = {}
    for code in snippets:
        python(code, names)
        for path in re.findall(r'audio\.write\("([^"]+)"', code):
            assert Path(path).stat().st_size > 1000


# ------------------------------------------------------------------------------------------------ sizes


PUBLISHED = {"VoxCPM1.5": ("voxcpm", "1.5"), "VoxCPM-0.5B": ("voxcpm", "0.5"), "VoxCPM2": ("voxcpm", "2"), "CSM-1B": ("csm", ""),
             "Higgs Audio v2": ("higgs", ""), "IndexTTS-2": ("indextts2", "")}
CARDS = {name: cells for name, *cells in tables("Which card")}


@pytest.mark.parametrize("row", tables("Choose a checkpoint"), ids=lambda row: row[0].partition(",")[0])
def test_what_training_takes_is_what_the_shapes_give(row):
    """By the command that the README names, for one checkpoint: on the meta device, at the published shapes."""
    name = row[0].partition(",")[0]
    cfg = configs.parse(bench.Bench, re.search(r"python bench\.py (--memory[^`]*)`", TEXT)[1].split(), "bench")
    cfg.backbone, cfg.version = PUBLISHED[name]
    bench.check(cfg)
    uses = bench.counted(cfg, [*bench.WAYS, bench.SHARDED])
    by_name = {way.short: use.total / 1e9 for way, use in uses.items()}
    assert f"{by_name['LoRA']:.1f}, {by_name['LoRA c']:.1f}, {by_name['full']:.1f} GB" == row[5]
    assert name != "Higgs Audio v2" or f"{by_name['']:.0f} GB on each of four" in TEXT
    del uses[bench.SHARDED]
    assert [bench.fitting(uses, card) for card in bench.CARDS] == CARDS[name]


# ------------------------------------------------------------------------------------------------ speed


CLAIM = re.compile(r"\d ms\b|times as (?:fast|long)|\bfaster\b|\bslower\b|\bfastest\b|real-time factor", re.I)
PROOF = re.compile(r"tests[/.]peers[/.]\w+|tests[/.]bench_parts|bench\.py|tests/test_floor\.py")


def unnamed(text):
    """Paragraphs, list items and rows of tables that claim a speed and name no script that measures it."""
    parts = re.split(r"\n\s*\n|\n(?=\||- |\d+\. )", text)
    return [part for part in parts if CLAIM.search(part) and not PROOF.search(part)]


def test_every_claim_of_speed_names_a_script():
    assert unnamed("fine\n\nA step is 3 times as fast.") and unnamed("| a step | 12 ms |") and not unnamed("12 ms by bench.py")
    assert not unnamed(PROSE)


def peers_named():
    """The command lines of tests/peers in the README and in the scripts themselves."""
    texts = [TEXT, *(path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests" / "peers").glob("*.py")))]
    for text in texts:
        for name, words in re.findall(r"tests\.peers\.(\w+)((?: +--?[\w.]+(?: [\w.,-]+)?)+)", text):
            yield name, shlex.split(words)


def test_the_commands_that_measure_speed_are_understood():
    named = list(peers_named())
    assert {name for name, _ in named} >= {"csm", "voxcpm"}
    for name, words in named:
        cfg = configs.parse(turns.Turns, words, "bench")
        cfg.backbone = name
        bench.check(cfg)


def test_flags_of_a_peer_are_those_of_the_bench():
    cfg = configs.parse(turns.Turns, shlex.split("--lengths 2,3.5 --threads 2 --options.amortize 1 --rounds 1 --backbone csm"), "bench")
    here = configs.parse(bench.Bench, turns.flags(cfg), "bench")
    assert dataclasses.asdict(here) == {f.name: getattr(cfg, f.name) for f in dataclasses.fields(bench.Bench)}
    assert turns.ratio([{"step_ms_median": n, "step_cpu_ms_median": n, "peak_mem_mib": 1} for n in (9.0, 6.0, 7.0)],
                       [{"step_ms_median": 2.0, "step_cpu_ms_median": 1.0, "peak_mem_mib": 1}])["ratio"] == 3.5


@pytest.mark.parametrize("flags", ["", "--as_used", "--options.amortize 1", "--task generate"])
def test_the_csm_peer_takes_a_step(flags):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from tests.peers import csm

    cfg = configs.parse(turns.Turns, shlex.split(f"--batch 2 --seconds 0.4 --backbone csm {flags}"), "bench")
    loss = csm.build(cfg, torch.device("cpu"), torch.float32)()
    # two cross-entropies over 2051 codes that nothing has been learned of
    assert loss is None if cfg.task == "generate" else abs(loss.item() - 2 * 7.63) < 0.6


def test_the_voxcpm_peer_takes_a_step():
    pytest.importorskip("voxcpm", reason="its own environment, see tests/peers/voxcpm.py")
    from tests.peers import voxcpm

    cfg = configs.parse(turns.Turns, shlex.split("--batch 2 --seconds 0.4 --backbone voxcpm"), "bench")
    assert torch.isfinite(voxcpm.build(cfg, torch.device("cpu"), torch.float32)())
