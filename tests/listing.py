"""The source text of a script or of one part of it, for the listings in the chapters.

Cog calls `listing` when `make listings` fills the chapters in.
"""

import ast
import importlib
import re
import textwrap
from pathlib import Path

# By a file's suffix; GitHub colours each. "bash" stays what a reader types, and the suite runs.
LANGUAGES = {".py": "python", ".sh": "shell-script", ".sbatch": "shell-script", ".yaml": "yaml"}
LANGUAGES |= {".json": "json"}


def listing(path: str, name: str | None = None) -> None:
    """Print a fence with a script, or a part of it; the path starts at the folder of the text."""
    cog = importlib.import_module("cog")  # there only while cog runs
    script = Path(cog.inFile).resolve().parent / path
    cog.outl(f"```{LANGUAGES[script.suffix]}\n{source_of(script, name)}\n```")


def source_of(path: Path, name: str | None = None) -> str:
    """The text of a script, or of a function, a class, `Class.method`, or a region of it.

    A region stands between `# region: NAME` and `# endregion`; a file that is not Python has no
    other parts. Decorators are part of a function. Raises ValueError if the file has no such part.
    """
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    if name is None:
        return _tidy(lines)
    region = re.compile(rf"\s*# region: {re.escape(name)}\s*$")
    for start, line in enumerate(lines):
        if region.match(line):
            ends = (n for n in range(start + 1, len(lines)) if lines[n].strip() == "# endregion")
            end = next(ends, None)
            if end is None:
                raise ValueError(f"{path}: region {name} has no `# endregion`")
            return _tidy(lines[start + 1 : end])
    if path.suffix != ".py":
        raise ValueError(f"{path}: no region named {name}")
    scope: ast.AST = ast.parse(text)
    for part in name.split("."):
        found = [
            node
            for node in ast.iter_child_nodes(scope)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            and node.name == part
        ]
        if not found:
            raise ValueError(f"{path}: no function, class or region named {name}")
        scope = found[0]
    assert isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    first = min([scope.lineno, *(d.lineno for d in scope.decorator_list)])
    return _tidy(lines[first - 1 : scope.end_lineno])


def _tidy(lines: list[str]) -> str:
    return textwrap.dedent("\n".join(lines)).strip("\n").rstrip()
