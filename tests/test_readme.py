"""The README's commands, links and Python run as they stand there; only paths are filled and runs are kept short.

A command that names a checkpoint, a folder of recordings or an adapter finds a tiny one at that path.
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

import configs
import models
from models.parts import audio
from tests import tiny_csm
from tests import tiny_voxcpm as tiny
from tests.conftest import ROOT
from tests.tiny import fill
from tests.running import start

ROOT = Path(ROOT)
README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8") if README.is_file() else ""
pytestmark = pytest.mark.skipif(not TEXT, reason="no README.md yet")

FEW = {"train": {"num_iters": 2, "val_samples": 0}, "infer": {"max_len": 8}}
# Programs that a README may name and that are not run here: installation, places, watching.
OTHERS = {"git", "cd", "pip", "tensorboard", "hf", "source", ".", "apt-get", "export", "pytest", "nvidia-smi"}


def blocks(language, text=TEXT):
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def commands(block):
    """[words] of each command of a bash block: comments, continued lines, && and ; resolved, variables in front taken off."""
    out = []
    for line in block.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = [[]]
        for word in lexer:
            words.append([]) if word in ("&&", ";", "||", "&") else words[-1].append(word)
        for command in words:
            while command and re.match(r"\w+=", command[0]):
                command = command[1:]
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
        tiny_csm.write(path) if "csm" in path else tiny.write(path, version, codec_file="audiovae.safetensors")


def tiny_adapter(path, csm):
    """An adapter that does something: VoxCPM's folder, or the folder or single file of csm-mlx's names."""
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
    code = re.sub(r"(['\"])(cuda(:\d)?|mps|auto)\1", '"cpu"', code).replace("torch.bfloat16", "torch.float32")
    for call in (n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Call)):
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        texts = [n.value for n in ast.walk(call) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        if name == "load" and getattr(call.func.value, "id", "") == "models":
            tiny_checkpoint(texts[0])
        elif name == "load_lora_weights":
            for path in texts:
                if not Path(path).exists():
                    tiny_adapter(path, csm="csm" in code)
        for path in texts:
            if path.endswith((".wav", ".flac")) and not Path(path).exists() and name not in ("write", "save"):
                tone(path, 1.0, 200)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        exec(compile(code, "README.md", "exec"), names)


def slug(heading):
    """What a heading is called behind # in a link."""
    return re.sub(r"[^\w\- ]", "", re.sub(r"`|\*|\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()).replace(" ", "-")


def test_every_relative_link_leads_somewhere():
    prose = re.sub(r"^```.*?^```", "", TEXT, flags=re.M | re.S)
    links = re.findall(r"\]\(\s*<?([^)\s>]+)", prose) + re.findall(r"(?:href|src)=\"([^\"]+)\"", prose) + re.findall(r"^\[[^\]]+\]:\s*(\S+)", prose, re.M)
    anchors = {slug(h) for h in re.findall(r"^#+ (.*)$", prose, re.M)} | set(re.findall(r"(?:id|name)=\"([^\"]+)\"", prose))
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        assert (ROOT / path).exists(), f"{link}: there is no {path}"
        if anchor and not path:
            assert anchor in anchors, f"{link}: no such heading"
        elif m := re.fullmatch(r"L(\d+)(?:-L\d+)?", anchor):
            assert int(m[1]) <= len((ROOT / path).read_text(encoding="utf-8").splitlines()), link


def test_the_settings_named_in_configs_are_where_the_readme_says(workplace):
    """Each shipped YAML file is named, so that a reader finds the one for a checkpoint."""
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        family = re.sub(r"_(lora|full)$", "", path.stem)
        assert path.name in TEXT or family in TEXT, f"{path.name} is not mentioned"
        assert yaml.safe_load(path.read_text(encoding="utf-8")), path
