"""How dense the code reads: python -m tests.density [FILE ...]. Prints a table, and every place that is over a limit.

Tokens per line of code (without comments and docstrings), the share of prose (lines of comment or docstring), lines that
are too wide, conditional expressions inside another, functions that are long, deeply nested or take many arguments.
"""
import ast
import io
import sys
import tokenize
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WIDTH, SETTING_WIDTH = 110, 130  # a setting stands in one line with its sentence
LENGTH, MAIN_LENGTH = 60, 200  # lines of a function; of a script's main, which is one story told in order
DEPTH = 4  # blocks inside each other
ARGUMENTS = 5  # besides self; more travel in a small dataclass
SCRIPTS = ("train.py", "infer.py", "prepare_data.py", "merge_lora.py", "validate.py", "bench.py", "lora.py")
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
BLOCKS = (ast.For, ast.While, ast.If, ast.With, ast.Try)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass
class Density:
    name: str
    lines: int
    tokens: float  # per line of code
    prose: float  # share of the lines that are not blank
    places: list  # texts: what is over a limit, and where

    @property
    def limit(self):
        return 10.0 if self.name in SCRIPTS else 11.5


def docstring_lines(tree):
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)) and ast.get_docstring(node, clean=False) is not None:
            lines |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def depth(node, level=0):
    """How many blocks stand inside each other below a node; `elif` is no deeper than its `if`."""
    deepest = level
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, FUNCTIONS):
                continue
            follows = name == "orelse" and isinstance(node, ast.If) and isinstance(child, ast.If) and len(value) == 1
            deepest = max(deepest, depth(child, level + (isinstance(child, BLOCKS) and not follows)))
    return deepest


def over_the_limits(name, text, tree):
    """Texts that say what is too wide, too long, too deep, or asks for too much."""
    places = []
    for number, line in enumerate(text.split("\n"), 1):
        if len(line) > (SETTING_WIDTH if "opt(" in line else WIDTH):
            places.append(f"{name}:{number}: {len(line)} characters")
    for node in ast.walk(tree):
        if isinstance(node, ast.IfExp):
            if any(isinstance(inner, ast.IfExp) and inner is not node for inner in ast.walk(node)):
                places.append(f"{name}:{node.lineno}: a conditional expression inside another")
        if not isinstance(node, FUNCTIONS):
            continue
        length = node.end_lineno - node.lineno + 1
        if length > (MAIN_LENGTH if node.name == "main" else LENGTH):
            places.append(f"{name}:{node.lineno}: {node.name} has {length} lines")
        if depth(node) > DEPTH:
            places.append(f"{name}:{node.lineno}: {node.name} nests {depth(node)} deep")
        arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        if len([a for a in arguments if a not in ("self", "cls")]) > ARGUMENTS:
            places.append(f"{name}:{node.lineno}: {node.name} takes {len(arguments)} arguments")
    return places


def measure(path):
    """Density of one file."""
    text, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()
    tree = ast.parse(text)
    docs, code, comments, tokens = docstring_lines(tree), set(), set(), 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            comments.add(token.start[0])
        elif token.type not in NO_CODE and token.start[0] not in docs:
            code |= set(range(token.start[0], token.end[0] + 1))
            tokens += 1
    prose = docs | (comments - code)
    return Density(name, len(code), tokens / max(1, len(code)), len(prose) / max(1, len(prose | code)), over_the_limits(name, text, tree))


def product():
    """The files whose density counts: not the frozen codecs, which are seldom read."""
    files = [ROOT / name for name in SCRIPTS] + sorted(ROOT.glob("models/*.py")) + sorted(ROOT.glob("models/parts/*.py"))
    return [path for path in [*files, *sorted(ROOT.glob("configs/*.py"))] if path.exists()]


def main():
    paths = [Path(name).resolve() for name in sys.argv[1:]] or product()
    print("tokens per line  prose  lines of code")
    for d in map(measure, paths):
        print(f"{d.tokens:8.1f} {'over' if d.tokens > d.limit else '    '}   {100 * d.prose:4.0f} %  {d.lines:6d}  {d.name}")
        for place in d.places:
            print(f"                                {place}")


if __name__ == "__main__":
    main()
