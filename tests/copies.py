"""Keep what scripts share equal: each `# Copied from SCRIPT.NAME` equals its original.

    python tests/copies.py
    python tests/copies.py --check

A mark stands directly above a function or class. SCRIPT is the file that the text explains it in,
without `.py`: beside the copy, or in any chapter where its name is the book's only one.
"""

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import book
from listing import source_of

ROOT = Path(__file__).resolve().parent.parent
MARK = re.compile(r"# Copied from (\w+)\.(\w+)$")
RULE = "# --- copied from other scripts; `make copies` keeps it equal to them ".ljust(100, "-")
OF_EACH_SCRIPT = {"main", "run", "parse_args"}  # the same name for what each does in its own way
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def definitions(text: str) -> list[tuple[int, Definition]]:
    """The functions and classes of a file, each with the line of its first decorator, from 1."""
    return [
        (min([node.lineno, *(d.lineno for d in node.decorator_list)]), node)
        for node in ast.parse(text).body
        if isinstance(node, Definition)
    ]


def marks(text: str) -> Iterator[tuple[int, re.Match[str]]]:
    """The marks of a file, each with its line, from 1."""
    for number, line in enumerate(text.splitlines(), 1):
        if match := MARK.match(line):
            yield number, match


def original(script: Path, scripts: list[Path], name: str) -> Path:
    """The file that a mark in `script` names; ValueError if there is none, or more than one."""
    beside = script.with_name(f"{name}.py")
    found = [beside] if beside.is_file() else [p for p in scripts if p.stem == name]
    if len(found) != 1:
        raise ValueError(f"{len(found)} scripts are named {name}.py")
    return found[0]


def refreshed(script: Path, scripts: list[Path]) -> str:
    """The script's text with every marked definition as its original has it now."""
    text = script.read_text(encoding="utf-8")
    lines = text.splitlines()
    parts = dict(definitions(text))
    for number, mark in reversed(list(marks(text))):  # from below, so that numbers stay right
        here = f"{script.name}:{number}"
        if number + 1 not in parts:
            raise ValueError(f"{here}: no function or class below the mark")
        if parts[number + 1].name != mark[2]:
            raise ValueError(f"{here}: the mark is of {mark[2]}, not {parts[number + 1].name}")
        try:
            copied = source_of(original(script, scripts, mark[1]), mark[2])
        except ValueError as error:
            raise ValueError(f"{here}: {error}") from None
        lines[number : parts[number + 1].end_lineno] = copied.splitlines()
    return "\n".join(lines) + "\n"


def problems(root: Path) -> list[str]:
    """What is wrong with the copies of a book, and how to mend it."""
    found: list[str] = []
    homes: defaultdict[str, set[Path]] = defaultdict(set)  # of each name that is copied
    defined: defaultdict[str, set[Path]] = defaultdict(set)  # each name without a mark
    scripts = book.scripts(root)
    for script in scripts:
        here, text = script.relative_to(root), script.read_text(encoding="utf-8")
        try:
            if refreshed(script, scripts) != text:
                found.append(f"{here}: a copy differs from its original; to mend it: make copies")
        except ValueError as error:
            found.append(str(error))
            continue
        marked = {number + 1 for number, _ in marks(text)}
        for _, mark in marks(text):
            homes[mark[2]].add(original(script, scripts, mark[1]))
        parts = definitions(text)
        for number, node in parts:
            if number not in marked:
                defined[node.name].add(script)
        rule = text.splitlines().index(RULE) + 1 if RULE in text.splitlines() else 0
        if marked and not rule:
            found.append(f"{here}: no rule line above its copies: {RULE}")
        for number, node in parts if rule else []:
            if (number in marked) != (number > rule):
                where = "above" if number in marked else "below"
                found.append(f"{here}:{number}: {node.name} stands {where} the rule line")
        first = [number for number, _ in marks(text)]
        if len({mark[0] for _, mark in marks(text)}) != len(first):
            found.append(f"{here}: copies the same thing twice")
    for name, places in sorted(defined.items()):
        others = places - homes[name]
        if name not in OF_EACH_SCRIPT and homes[name] and others:
            found += [
                f"{other.relative_to(root)}: its own {name}, which is copied elsewhere: mark it as "
                "a copy, or give it a name that says how it differs"
                for other in sorted(others)
            ]
        if name not in OF_EACH_SCRIPT and len(homes[name]) > 1:
            found.append(f"{name} has {len(homes[name])} homes: {sorted(map(str, homes[name]))}")
    return found


def main() -> None:
    if "--check" in sys.argv:
        found = problems(ROOT)
        sys.exit("\n".join(found) if found else 0)
    wrong = []
    scripts = book.scripts(ROOT)
    for script in scripts:
        try:
            text = refreshed(script, scripts)
        except ValueError as error:
            wrong.append(str(error))
            continue
        if text != script.read_text(encoding="utf-8"):
            print(script.relative_to(ROOT))
            script.write_text(text, encoding="utf-8")
    sys.exit("\n".join(wrong) if wrong else 0)


if __name__ == "__main__":
    main()
