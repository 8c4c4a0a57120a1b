"""Settings: defaults < YAML < flags, strict about every key; what users of other tools type means the same here."""
import dataclasses
import importlib
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import configs
from infer import Infer
from merge_lora import Merge
from models.parts import Invalid, opt
from prepare_data import Prepare
from tests import coming_from
from tests.conftest import ROOT
from train import Train
from validate import Validate

SHIPPED = sorted(Path(ROOT, "configs").glob("*.yaml"))
UPSTREAM = """\
pretrained_path: /path/to/VoxCPM2/
train_manifest: /path/to/train.jsonl
val_manifest: {none}
sample_rate: 16000        # a comment
out_sample_rate: 48000
batch_size: 2
grad_accum_steps: 8
num_workers: 8
num_iters: 1000
log_interval: 10
valid_interval: 500
save_interval: 500
learning_rate: {lr}
weight_decay: 0.01
warmup_steps: 100
max_steps: 1000
max_batch_tokens: 8192
max_grad_norm: 1.0
save_path: /path/to/checkpoints/finetune_lora
tensorboard: /path/to/logs/finetune_lora
lambdas:
  loss/diff: 1.0
  loss/stop: 1.0
"""
UPSTREAM_LORA = """
lora:
  enable_lm: true
  enable_dit: true
  enable_proj: false
  r: 32
  alpha: 16
  dropout: 0.0
  target_modules_lm: ["q_proj", "v_proj", "k_proj", "o_proj"]
  target_modules_dit: ["q_proj", "v_proj", "k_proj", "o_proj"]
hf_model_id: "openbmb/VoxCPM2"
distribute: true
"""


def settings_of(script):
    """The dataclass at the top of a script."""
    return {"train": Train, "prepare": Prepare, "infer": Infer, "merge": Merge, "validate": Validate}[script]


@dataclass
class Inner:
    r: int = opt(8, "rank")
    alpha: float = opt(16.0, "scale times r")
    names: list[str] = opt([], "names")


@dataclass
class Toy:
    """A toy."""
    config: str = opt("", "settings file", config=True)
    rate: float = opt(1e-4, "a rate")
    steps: int = opt(10, "a count")
    name: str = opt("", "a name")
    fast: bool = opt(False, "a switch")
    seed: int | None = opt(None, "a seed")
    speaker: int | str | None = opt(None, "a number or a name")
    mode: str = opt("a", "a choice", choices=("a", "b"))
    files: list[str] = opt([], "files")
    layers: list[int] = opt([], "layers")
    lora: Inner | None = None
    weights: dict[str, float] = opt({}, "weights")
    free: dict = opt({}, "anything")
    inputs: list = opt([], "inputs", repeat=True)


def toy(*argv, **more):
    return configs.parse(Toy, argv, script=None, **more)


def wrong(*argv, cls=Toy, script=None):
    with pytest.raises(configs.Usage) as error:
        configs.parse(cls, argv, script=script)
    return str(error.value)


def written(tmp_path, text, name="x.yaml"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8") if isinstance(text, str) else path.write_bytes(text)
    return str(path)


# ------------------------------------------------------------------------------------------------ order and types


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    file = written(tmp_path, "rate: 1e-3\nsteps: 20\nweights: {a: 1, b: 2}\nlora:\n  r: 4\n")
    cfg = toy(file, "--rate", "5e-5", "--weights.b", "7", "--lora.alpha=3")
    assert (cfg.rate, cfg.steps, cfg.name, cfg.weights) == (5e-5, 20, "", {"a": 1.0, "b": 7.0})
    assert cfg.lora == Inner(r=4, alpha=3.0)
    assert toy("--rate", "2", "--config", file).rate == 2.0 and toy("--config=" + file).config == file


@pytest.mark.parametrize("text, name, value", [
    ("rate: 1e-4", "rate", 1e-4), ("rate: '3e-4'", "rate", 3e-4), ("rate: 1", "rate", 1.0),
    ("steps: '5'", "steps", 5),
    ("fast: False", "fast", False), ("fast: 'false'", "fast", False), ("fast: yes", "fast", True),
    ("name: 007", "name", "007"), ("name: 2024-01-01", "name", "2024-01-01"), ("name: null", "name", ""),
    ("name:", "name", ""),
    ("seed: null", "seed", None), ("seed:", "seed", None), ("seed: 3", "seed", 3),
    ("speaker: 3", "speaker", 3), ("speaker: '3'", "speaker", "3"), ("speaker: Ann", "speaker", "Ann"),
    ("files: a,b.jsonl", "files", ["a,b.jsonl"]), ("files: null", "files", []), ("files: ''", "files", []),
    ("files: [a, 'b']", "files", ["a", "b"]), ("layers: [1, 2]", "layers", [1, 2]), ("layers: 1,2", "layers", [1, 2]),
    ("weights: {loss/x: 1e-1}", "weights", {"loss/x": 0.1}), ("weights:", "weights", {}),
   
    ("free: {a: 1e-4, b: '1', c: [x, 2, true], d: {e: null}}", "free",
     {"a": 1e-4, "b": "1", "c": ["x", 2, True], "d": {"e": None}}),
    ("lora:", "lora", Inner()), ("lora: null", "lora", None), ("lora: {}", "lora", Inner()),
    ("lora: {r: 2}", "lora", Inner(r=2)),
])
def test_the_declared_type_decides_what_a_text_means(tmp_path, text, name, value):
    found = getattr(toy(written(tmp_path, text)), name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("argv, name, value", [
    (["--rate", "1e-4"], "rate", 1e-4), (["--rate=-1"], "rate", -1.0), (["--rate", "-1"], "rate", -1.0),
    (["rate=2"], "rate", 2.0),
    (["--fast"], "fast", True), (["--fast", "False"], "fast", False), (["fast=no"], "fast", False),
    (["--fast", "--rate", "1"], "fast", True),
    (["--name", "a=b"], "name", "a=b"), (["--name", "- well"], "name", "- well"), (["--name=--x"], "name", "--x"),
    (["--name", ""], "name", ""),
    (["--name", "null"], "name", "null"), (["--seed", "null"], "seed", None), (["--speaker", "7"], "speaker", 7),
    (["--files", "a", "b"], "files", ["a", "b"]), (["--files", "a,b"], "files", ["a", "b"]),
    (["files=[a, b]"], "files", ["a", "b"]),
    (["--files", "[qk]_proj"], "files", ["[qk]_proj"]), (["--files="], "files", []),
    (["--layers", "0", "1"], "layers", [0, 1]),
    (["--inputs", "a,1", "b", "--inputs", "c"], "inputs", ["a,1", "b", "c"]), (["inputs=a:0.5"], "inputs", ["a:0.5"]),
    (["--lora"], "lora", Inner()), (["--lora-r", "2"], "lora", None), (["lora.r=2"], "lora", Inner(r=2)),
    (["--lora.names", "a", "b", "rate=1"], "lora", Inner(names=["a", "b"])),
    (["weights.loss/diff=2.5"], "weights", {"loss/diff": 2.5}),
    (["--weights", "{a: 1, b: 2e-1}"], "weights", {"a": 1.0, "b": 0.2}),
    (["--lora", "{r: 3, names: [a]}"], "lora", Inner(3, names=["a"])),
    (["--weights.a.b-c", "1"], "weights", {"a.b-c": 1.0}), (["--free.x", "1e-2"], "free", {"x": 0.01}),
])
def test_flags_in_every_spelling(argv, name, value):
    if argv[0] == "--lora-r":                           # a section's key is written with a dot, or by an alias
        assert "unknown" in wrong(*argv)
    else:
        found = getattr(toy(*argv), name)
        assert found == value and type(found) is type(value)


def test_a_section_can_be_switched_off_by_a_flag(tmp_path):
    file = written(tmp_path, "lora:\n  r: 4\n")
    assert toy(file, "--lora", "null").lora is None and toy(file, "--lora").lora.r == 4
    assert toy(written(tmp_path, "lora: null"), "--lora.r", "5").lora == Inner(r=5)


def test_the_settings_file_is_found_behind_a_list(tmp_path):
    file = written(tmp_path, "steps: 3")
    assert toy("--files", "a", "b", file).steps == 3 and toy("--fast", file).fast is True


def test_unknown_flags_are_handed_over_when_asked_for():
    cfg, extra = toy("--temperature", "0.8", "--mask-special", "--rate", "1", "top_k=5", extra=True)
    assert cfg.rate == 1.0 and extra == {"temperature": "0.8", "mask_special": "true", "top_k": "5"}

    @dataclass
    class Sampling:
        temperature: float = opt(1.0, "t")
        top_k: int = opt(50, "k")
        mask_special: bool = opt(False, "m")
        emo_vector: list[float] = opt([], "v")

    flags = {**extra, "emo_vector": configs.Plain("0,0.5,-1e-1")}
    assert configs.build(Sampling, flags) == Sampling(0.8, 5, True, [0.0, 0.5, -0.1])
    with pytest.raises(configs.Usage, match="sampling.top_q: unknown; the nearest known name is top_k"):
        configs.build(Sampling, {"top_q": 1}, "sampling")
    with pytest.raises(configs.Usage, match="top_k: 1.5 is not a whole number"):
        configs.build(Sampling, {"top_k": 1.5})
    with pytest.raises(configs.Usage, match="temperature: True is not a number"):
        configs.build(Sampling, {"temperature": True})
    assert configs.build(Sampling, {"temperature": 1}).temperature == 1.0


def test_defaults_are_not_shared():
    toy().files.append("x")
    toy().weights["x"] = 1
    assert toy().files == [] and toy().weights == {}


# ------------------------------------------------------------------------------------------------ errors


def test_every_wrong_key_of_a_file_is_named_at_once_with_its_line(tmp_path):
    file = written(tmp_path, "rat: 1\nsteps: 1.5\nfast: maybe\nlora:\n  rr: 1\n  r: x\nmode: c\nlayers: [1, b]\nrate: nan\n"
                             "weights:\n  a: b\n")
    text = wrong(file, "--stepz", "3", "--rate", "fast")
    for part in (f"{file} line 1: rat: unknown; the nearest known name is rate",
                 "line 2: steps: '1.5' is not a whole number",
                 "line 3: fast: 'maybe' is not true or false",
                 "line 5: lora.rr: unknown; the nearest known name is lora.r",
                 "line 6: lora.r: 'x' is not a whole number",
                 "line 7: mode: 'c' is not one of a, b",
                 "line 8: layers: ['1', 'b'] is not a list in which each value is a whole number",
                 "line 9: rate: 'nan' is not a number",
                 "line 11: weights.a: 'b' is not a number",
                 "--stepz: unknown; the nearest known name is steps",
                 "--rate: 'fast' is not a number"):
        assert part in text, (part, text)
    assert len(text.splitlines()) == 11


@pytest.mark.parametrize("text, part", [
    ("rate: 1\nsteps: 2\nrate: 3\n", "line 3: rate: already given by {file} line 1: rate"),
    ("lora:\n  r: 1\n  r: 2\n", "line 3: r: already given by {file} line 2: r"),
    ("steps: !!python/object/apply:os.system ['true']\n", "line 1: the tag python/object/apply:os.system is refused"),
    ("a: &a [x]\nb: *a\n", "line 2: anchors"), ("rate: [1\n", "line 2"), ("- rate\n", "holds no map"),
    ("rate\n", "holds no map"),
    ("steps: [1]\n", "line 1: steps: ['1'] is not a whole number"), ("rate: {a: 1}\n", "is not a number"),
    ("lora: 8\n", "is not"),
    ("lora: [r]\n", "line 1: lora: ['r'] is not"), ("? [a]\n: 1\n", "unknown"),
    ("config: y.yaml\n", "line 1: config: a settings file names no other"),
    ("rate: 1\n---\nrate: 2\n", "line 2"), ("weights: 3\n", "is not a map"),
    ("<<: {rate: 1}\n", "line 1: <<: unknown"),
    ("a: " + "[" * 1500, "nested too deeply"), (b"rate: \xff\xfe\n", "is it YAML?"), ("#" * (2**20 + 1), "too long"),
    ("".join(f"k{i}: 1\n" for i in range(600)), "600 keys"),
])
def test_a_file_that_is_no_settings_file(tmp_path, text, part):
    file = written(tmp_path, text)
    assert part.format(file=file) in wrong(file)


def test_a_tag_runs_nothing(tmp_path):
    wrong(written(tmp_path, f"name: !!python/object/apply:os.mkdir ['{tmp_path}/made']\n"))
    assert not (tmp_path / "made").exists()


def test_a_missing_file_and_wrong_flags_say_what_to_do(tmp_path):
    assert "no.yaml: No such file or directory; expected a YAML file of settings" in wrong("no.yaml")
    assert "is no file" in wrong(str(tmp_path))
    assert "--rate: needs a value" in wrong("--rate")
    assert "write --name=--fast" in wrong("--name", "--fast")
    assert "'y.yaml': unexpected" in wrong(written(tmp_path, "rate: 1"), "y.yaml")
    assert "--rate: already given by --rate" in wrong("--rate", "1", "rate=2")
    assert "--no_fast: unknown; the nearest known name is fast" in wrong("--no_fast")
    assert "--rat: unknown" in wrong("--rat", "1")              # no abbreviations
    assert "--weights: '3' is not a map" in wrong("--weights", "3")
    assert "--lora: '{r: 1' is not" in wrong("--lora", "{r: 1")
    assert "already given" in wrong("--weights", "{a: 1, a: 2}") and "refused" in wrong("--weights", "{a: !x 1}")


def test_bom_and_unicode_are_read(tmp_path):
    assert toy(written(tmp_path, "\ufeffname: 声 é\nrate: 2\n")).name == "声 é"


def test_exit_codes(tmp_path, capsys):
    def raises(error):
        def main():
            raise error
        with pytest.raises(SystemExit) as ended:
            configs.run(main)
        return ended.value.code, capsys.readouterr().err

    assert raises(configs.Usage("wrong flag")) == (2, "wrong flag\n")
    assert raises(Invalid("wrong file")) == (1, "wrong file\n")
    assert raises(KeyboardInterrupt())[0] == 130
    assert raises(SystemExit(7))[0] == 7
    configs.run(lambda: None)
    with pytest.raises(SystemExit):
        configs.run(lambda: 1)
    with pytest.raises(ZeroDivisionError):
        configs.run(lambda: 1 / 0)


def test_help_shows_every_sentence_default_and_other_name(capsys):
    with pytest.raises(SystemExit) as ended:
        configs.parse(Train, ["--help"])
    text = capsys.readouterr().out
    assert not ended.value.code and Train.__doc__.strip().splitlines()[0] in text
    for f in dataclasses.fields(Train):
        assert f"--{f.name}" in text and f.metadata.get("help", "") in text
    assert "--lora.r" in text and "--lora_rank" in text and "--gradient_accumulation_steps" in text


# ------------------------------------------------------------------------------------------------ resolved settings


def test_resolved_settings_are_an_argument_again(tmp_path):
    file = written(tmp_path, "rate: 1e-5\nname: '1e-5'\nspeaker: '3'\nlora:\n  names: ['null', a]\n")
    odd = ["--lora", "null", "--name", "a: #b\n 声 \U0001f600", "--weights.x", "1", "--seed", "4", "--free.y", "'z"]
    for argv in ([], [file], [file, *odd]):
        cfg = toy(*argv)
        configs.dump(cfg, tmp_path / "config.yaml")
        assert toy(str(tmp_path / "config.yaml")) == cfg
        assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".tmp")] == []


@pytest.mark.parametrize("file", SHIPPED, ids=lambda p: p.stem)
def test_shipped_files_parse_with_a_comment_on_every_key(file, tmp_path):
    cfg = configs.parse(Train, [str(file)])
    assert (cfg.lora is not None) == file.stem.endswith("_lora")
    for line in file.read_text().splitlines():
        assert not line or line.startswith("#") or "# " in line, line
    configs.dump(cfg, tmp_path / "config.yaml")
    assert configs.parse(Train, [str(tmp_path / "config.yaml")]) == cfg


def test_shipped_voxcpm_files_are_upstreams_recipes():
    """But for the length of the LoRA runs: 2000 steps on a few clips know them by heart, so it follows the data."""
    def recipe(name):
        cfg = configs.parse(Train, [str(Path(ROOT, "configs", name + ".yaml"))])
        adapter = [getattr(cfg.lora, k) for k in ("r", "alpha", "enable_lm", "enable_dit", "enable_proj")] if cfg.lora else []
        return [cfg.sample_rate, cfg.learning_rate, cfg.warmup_steps, cfg.num_iters, cfg.max_steps, cfg.batch_size,
                cfg.grad_accum_steps, cfg.max_batch_tokens, cfg.max_grad_norm, cfg.weight_decay, cfg.lambdas["loss/diff"],
                cfg.lambdas["loss/stop"], *adapter]

    for name, rate in (("voxcpm0.5b", 16000), ("voxcpm1.5", 44100)):
        v1 = [100, 2000, 2000, 16, 1, 8192, 0.0, 0.01, 1.0, 1.0]
        assert recipe(f"{name}_lora") == [rate, 1e-4, 100, 0, 0, *v1[3:], 8, 16.0, True, True, False]
        assert recipe(f"{name}_full") == [rate, 1e-5, *v1]
    v2 = [100, 1000, 1000, 2, 8, 8192, 1.0, 0.01, 1.0, 1.0]
    assert recipe("voxcpm2_lora") == [16000, 1e-4, 100, 0, 0, *v2[3:], 32, 32.0, True, True, False]
    assert recipe("voxcpm2_full") == [16000, 1e-5, *v2]


# ------------------------------------------------------------------------------------------------ coming from elsewhere


@pytest.mark.parametrize("none", ['""', "null"])
def test_upstreams_yaml_runs_unchanged(tmp_path, none):
    full = configs.parse(Train, [written(tmp_path, UPSTREAM.format(none=none, lr="0.00001   # smaller"))])
    assert full.lora is None and full.learning_rate == 1e-5
    assert full.val_manifest == [] and full.train_manifest == ["/path/to/train.jsonl"]
    file = written(tmp_path, UPSTREAM.format(none=none, lr="1e-4") + UPSTREAM_LORA)
    cfg = configs.parse(Train, ["--config_path", file])
    assert (cfg.lora.r, cfg.lora.alpha) == (32, 16.0)
    assert cfg.lora.target_modules_dit == ["q_proj", "v_proj", "k_proj", "o_proj"]
    assert cfg.hf_model_id == "openbmb/VoxCPM2" and cfg.distribute is True and cfg.out_sample_rate == 48000


SAMPLES = {bool: "true", int: "77", float: "0.77", str: "words", list: "77", dict: "{}", object: "77"}


def resolved(cls, script, argv):
    out = configs.parse(cls, argv, script=script, extra=script == "infer")
    return dataclasses.asdict(out[0] if script == "infer" else out)


def deep(values, key):
    """The value at 'lora.r' or 'lambdas.loss/diff'; None when there is none."""
    head, dot, rest = key.partition(".")
    return values.get(head) if not dot else (values.get(head) or {}).get(rest)


@pytest.mark.parametrize("script", ["train", "prepare", "infer", "merge"])
def test_every_alias_changes_the_resolved_settings(script, tmp_path):
    cls = settings_of(script)
    for canonical, aliases in configs.ALIASES[script].items():
        setting = configs.find(canonical, configs.names(cls, script))
        assert setting, f"{script} has no {canonical}"
        kind = next(k for k in configs.members(setting.kind) if k is not type(None))
        value = SAMPLES[getattr(kind, "__origin__", kind)]
        default = deep(dataclasses.asdict(cls()), canonical)
        value = next((str(c) for c in setting.meta.get("choices", ()) if c != default), value)
        value = written(tmp_path, "seed: 7\n") if setting.meta.get("config") else value
        for alias in aliases:
            for flag in (f"--{alias}", f"--{alias.replace('_', '-')}"):
                before, after = resolved(cls, script, []), resolved(cls, script, [flag, value])
                assert deep(before, canonical) != deep(after, canonical), (script, flag, canonical)
            if not setting.meta.get("repeat"):
                with pytest.raises(configs.Usage, match="already given"):
                    configs.parse(cls, [f"--{alias}={value}", f"--{canonical}={value}"], script=script)
            if script == "train" and canonical != "config":
                file = written(tmp_path, f"{alias}: {value}\n", "alias.yaml")
                assert deep(resolved(cls, script, [file]), canonical) == deep(after, canonical)


def test_keys_that_say_another_key_in_other_words(tmp_path):
    assert configs.parse(Train, ["--scaling", "2", "--lora.r", "8"]).lora.alpha == 16.0
    file = written(tmp_path, "lora:\n  scaling: 0.5\n  r: 32\n")
    assert configs.parse(Train, [file]).lora.alpha == 16.0
    assert configs.parse(Train, [file, "--lora.r", "4"]).lora.alpha == 2.0
    assert configs.parse(Train, [file, "--lora.alpha", "3"]).lora.alpha == 3.0
    assert type(configs.parse(Train, [file]).lora.alpha) is float
    assert "already given" in wrong("--scaling", "2", "--lora_alpha", "3", cls=Train, script="train")
    assert configs.parse(Train, ["--amp"]).dtype == "bfloat16"
    assert configs.parse(Train, ["--amp", "false"]).dtype == "float32"
    assert configs.parse(Train, ["--generate-samples"]).val_samples > 0
    assert configs.parse(Train, ["--generate-samples", "false"]).val_samples == 0


ENTRIES = list(coming_from.entries())


@pytest.mark.parametrize("entry", [e for e in ENTRIES if "key" in e], ids=lambda e: f"{e['tool']} {e['theirs']}")
def test_a_flag_of_another_tool_changes_the_resolved_settings(entry, tmp_path):
    cls, script = settings_of(entry["script"]), entry["script"]
    value = entry["value"].replace("{yaml}", written(tmp_path, "seed: 7\n"))
    values = value.split() if entry["key"].startswith("lora.target") else [value] if value else []
    before, after = resolved(cls, script, []), resolved(cls, script, [entry["theirs"], *values])
    assert deep(before, entry["key"]) != deep(after, entry["key"])


@pytest.mark.parametrize("entry", [e for e in ENTRIES if "script" in e and "key" not in e], ids=lambda e: e["theirs"][:30])
def test_a_command_of_another_tool_is_understood(entry):
    resolved(settings_of(entry["script"]), entry["script"], coming_from.arguments(entry["theirs"]))


def test_the_page_for_other_tools_is_what_the_table_gives():
    page = Path(ROOT, "configs", "COMING_FROM.md").read_text(encoding="utf-8")
    assert page == coming_from.page(), "run: python -m tests.coming_from > configs/COMING_FROM.md"


@pytest.mark.parametrize("script", ["train", "prepare_data", "infer", "merge_lora"])
def test_wrong_use_exits_2_before_anything_is_loaded(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--seed", "x", "--output_dri=y"])
    with pytest.raises(SystemExit) as ended:
        configs.run(importlib.import_module(script).main)
    shown = capsys.readouterr()
    assert ended.value.code == 2 and not shown.out
    assert "--seed: 'x' is not a whole number" in shown.err or "--seed: unknown; the nearest known name is" in shown.err


def test_a_script_ends_with_the_exit_code_and_no_traceback():
    command = [sys.executable, str(Path(ROOT, "train.py")), "--learning_rat", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "--learning_rat: unknown; the nearest known name is learning_rate\n"
