"""configs/COMING_FROM.md and the README's lines that lead to it, both from tests/coming_from.yaml.

    python -m tests.coming_from > configs/COMING_FROM.md
    python -m tests.coming_from readme                      # one line per tool, for the README's table
"""
import re
import shlex
import sys
from pathlib import Path

import yaml

SCRIPTS = {"train": "train.py", "prepare": "prepare_data.py", "infer": "infer.py", "merge": "merge_lora.py",
           "validate": "validate.py"}

INTRO = """# Coming from another tool

What you typed there, and what you type here. Made from tests/coming_from.yaml by `python -m tests.coming_from`; tests run every
flag, every command and all of the Python. Flags are taken with `-` or `_`. VoxCPM's YAML files run as they are; of the other
tools only the flags below are taken, not their files of settings.
"""


def tools():
    return yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


def entries():
    """One dict per row: tool, backbone, theirs, ours; script where the row runs here, with key and value for a flag."""
    for tool in tools():
        about = {"tool": tool["tool"], "backbone": tool["backbone"]}
        for row in tool["names"]:
            yield {**about, **row}
        for flag, script, key, value in tool["flags"]:
            yield {**about, "theirs": flag, "ours": f"--{key}", "script": script, "key": key, "value": value}


def arguments(command):
    """What follows the program's name in a printed command."""
    words = shlex.split(command)
    return words[next(i for i, word in enumerate(words) if word.startswith("--")):]


def rows(pairs, quote=""):
    """A Markdown table's lines of [(there, here)]; quote goes around what stands there."""
    cells = [[" ".join(text.split()).replace("|", "\\|") for text in pair] for pair in pairs]
    return ["|---|---|", *(f"| {quote}{there}{quote} | {here} |" for there, here in cells)]


def slug(heading):
    """What a heading is called behind # in a link."""
    plain = re.sub(r"`|\*|\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


def readme():
    """The rows of the README's table, one per tool."""
    lines = []
    for tool in tools():
        comes = f"; needs the {tool['backbone']} backbone, which is to come" if tool.get("to_come") else ""
        lines.append(f"| [{tool['tool']}](configs/COMING_FROM.md#{slug(tool['tool'])}) | {tool['home']} | {tool['line']}{comes} |")
    return "\n".join(lines)


def page():
    """configs/COMING_FROM.md."""
    return INTRO + "\n" + table().rstrip() + "\n"


def table():
    """Markdown: per tool its commands, files and names, the flags that are accepted as they are, its faults, its Python in ours."""
    lines = []
    for tool in tools():
        comes = f" These rows need the {tool['backbone']} backbone, which is to come." if tool.get("to_come") else ""
        lines += [f"## {tool['tool']}", "", f"{tool['home']}, with the {tool['backbone']} backbone.{comes}", ""]
        lines += ["| there | here |", *rows([(row["theirs"], row["ours"]) for row in tool["names"]], "`")]
        for script in SCRIPTS:
            flags = [(flag, key) for flag, where, key, _ in tool["flags"] if where == script]
            if flags:
                names = [f"`{flag}`" + (f" (`{key}`)" if flag[2:].replace("-", "_") != key else "") for flag, key in flags]
                lines.append(f"| flags that {SCRIPTS[script]} takes as they are | {', '.join(names)} |")
        lines.append("")
        if tool.get("wrong"):
            lines += ["| what went wrong there | here |", *rows([(row["theirs"], row["ours"]) for row in tool["wrong"]]), ""]
        for code in tool.get("python", ()):
            lines += ["```python", code.rstrip(), "```", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    print(readme() if sys.argv[1:] == ["readme"] else page(), end="")
