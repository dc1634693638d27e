"""The source text of one part of a script, for the listings in the chapters.

Cog calls `listing` when `make listings` fills the chapters in.
"""

import ast
import importlib
import re
import textwrap
from pathlib import Path


def listing(path: str, name: str) -> None:
    """Print a fence with a part of a script; the path starts at the folder of the text."""
    cog = importlib.import_module("cog")  # there only while cog runs
    script = Path(cog.inFile).resolve().parent / path
    cog.outl(f"```python\n{source_of(script, name)}\n```")


def source_of(path: Path, name: str) -> str:
    """The text of a function, a class, `Class.method`, or a region of a script.

    A region stands between `# region: NAME` and `# endregion`. Decorators are part of a function.
    Raises ValueError if the file has no such part.
    """
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    region = re.compile(rf"\s*# region: {re.escape(name)}\s*$")
    for start, line in enumerate(lines):
        if region.match(line):
            ends = (n for n in range(start + 1, len(lines)) if lines[n].strip() == "# endregion")
            end = next(ends, None)
            if end is None:
                raise ValueError(f"{path}: region {name} has no `# endregion`")
            return _tidy(lines[start + 1 : end])
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
