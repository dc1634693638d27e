"""What the suite asks of the book; each check returns its complaints, and no complaint is a pass.

The tests call these on the repository, and test_machinery.py calls them on small broken ones.
"""

import ast
import functools
import itertools
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import book
import listing
import pytest
import warm
from book import where

LIMIT_S = 300  # for the slowest machine; none should take a tenth of it on an idle one
GPU_LIMIT_S = 600
Start = Callable[[book.Command, Path, float], warm.Result]
LAUNCHERS = ("torchrun", "deepspeed")


def expect_none(problems: list[str]) -> None:
    """Fail with the complaints and nothing else: they say what to do."""
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)


# --- commands ----------------------------------------------------------------------------------


def run_command(
    command: book.Command,
    root: Path,
    start: Start = warm.run,
    timeout: float = LIMIT_S,
) -> list[str]:
    """Run a command in a checkout and say what it did not do that the book says it does."""
    if command.session and shutil.which("curl") is None:
        pytest.skip("needs curl, a system package")
    pictures = [root / name for name in plots(command)]
    for picture in pictures:
        picture.unlink(missing_ok=True)  # so that it is there only if the command made it
    result = start(command, root, timeout)
    skip_without_engine(result)
    problems = evidence(command, result)
    for path in book.texts(root):
        for block in book.blocks(path):
            if book.parse_command(block.command).text == command.text and compares(block):
                problems += stale(block, result.stdout, root)
    problems += [p for picture in pictures for p in drawn(picture)]
    return [report(command, result, problems)] if problems else []


def skip_without_engine(result: warm.Result) -> None:
    """An engine's environment is the one thing that a reader may leave out."""
    missing = re.search(r"^needs (vLLM|SGLang): make (vllm|sglang)$", result.stderr, re.M)
    if result.returncode == 2 and missing and not engine(missing[2]).exists():
        pytest.skip(missing[0])


def engine(name: str) -> Path:
    """The Python of vLLM's or SGLang's environment, whether it is there or not."""
    return Path(__file__).resolve().parent.parent / f".venv-{name}" / "bin" / "python"


def evidence(command: book.Command, result: warm.Result) -> list[str]:
    """A command must have done its work: an exit code of 0 alone proves nothing."""
    problems = []
    if result.returncode == warm.TIMED_OUT:
        problems.append(f"did not end in {result.seconds:.0f} s")
    elif result.returncode:
        problems.append(f"ended with {result.returncode}")
    if "FAILED" in result.stdout + result.stderr:
        problems.append("printed FAILED")
    if command.session:
        return problems if result.stdout.strip() else [*problems, "printed nothing"]
    if not re.search(r"^check: .*\bok$", result.stdout, re.M):
        problems.append("printed no line `check: ... ok`, so nothing shows that it did its work")
    if not re.search(r"^all [1-9]\d* checks ok$", result.stdout, re.M):
        problems.append("did not end with `all N checks ok`")
    ranks = rf"^{command.world_size} ranks?\b"
    if command.launcher in LAUNCHERS and not re.search(ranks, result.stdout, re.M):
        problems.append(f"no line starts with `{command.world_size} ranks`: which ranks ran?")
    return problems


def report(command: book.Command, result: warm.Result, problems: list[str]) -> str:
    printed = "\n".join(result.stdout.splitlines()[-30:])
    complaints = "\n".join(result.stderr.splitlines()[-30:])
    return (
        "\n".join(problems)
        + f"\n\npaste: {command.text}\nprinted in: {', '.join(command.sources)}"
        + f"\n--- its output ends with\n{printed}\n--- and its errors with\n{complaints}"
    )


def stale(block: book.Block, stdout: str, root: Path) -> list[str]:
    difference = book.matches(list(block.lines), stdout.splitlines())
    if difference is None:
        return []
    here = where(block.path, root, block.line)
    number = re.findall(r"^chapter(\d+)", here)
    args = f'ARGS="--chapter {number[0]}"' if number else ""
    return [
        f"{here}: stale output block\n{difference}\nto rewrite it: make outputs {args}".rstrip()
    ]


def compares(block: book.Block) -> bool:
    """A block recorded on named hardware is compared only there."""
    return block.device is None or any(block.device in name for name in gpu_names())


@functools.cache
def gpu_names() -> tuple[str, ...]:
    """The GPUs that torch sees here; asked in another process, for ours must not touch them."""
    if shutil.which("nvidia-smi") is None and not Path("/dev/kfd").exists():
        return ()
    ask = "import torch.cuda as c\nfor i in range(c.device_count()): print(c.get_device_name(i))"
    answer = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
    return tuple(answer.stdout.splitlines())


def plots(command: book.Command) -> list[str]:
    """The files that a command is told to draw."""
    words = [*command.argv, ""]
    named = [b for a, b in itertools.pairwise(words) if a == "--plot"]
    return named + [a.partition("=")[2] for a in words if a.startswith("--plot=")]


def drawn(picture: Path) -> list[str]:
    if not picture.is_file():
        return [f"did not write {picture.name}"]
    try:
        tag = ElementTree.parse(picture).getroot().tag
    except ElementTree.ParseError as error:
        return [f"{picture.name} is no XML: {error}"]
    return [] if tag.endswith("svg") else [f"{picture.name} is no SVG but <{tag}>"]


def measures(root: Path) -> list[book.Command]:
    """The commands whose scripts have claims about the machine: those that take --strict."""
    return [
        command
        for command in book.commands(root)
        if command.script
        and (root / command.script).is_file()
        and "--strict" in (root / command.script).read_text(encoding="utf-8")
    ]


def uncovered_scripts(root: Path) -> list[str]:
    """Every script is run by a command; a module is imported by a script beside it."""
    run = {str(Path(c.script)) for c in book.commands(root) if c.script}
    problems = []
    for script in book.scripts(root):
        name = str(script.relative_to(root))
        if book.is_program(script):
            if name not in run:
                problems.append(f"{name}: no command in its docstring, README or a chapter runs it")
        elif not any(
            re.search(rf"^\s*(?:import|from) +{script.stem}\b", other.read_text(), re.M)
            for other in script.parent.glob("*.py")
            if other != script
        ):
            problems.append(f"{name}: cannot be run, and no script beside it imports it")
    return problems


def missing_scripts(root: Path) -> list[str]:
    return [
        f"{', '.join(command.sources)}: no such script: {command.script}"
        for command in book.commands(root)
        if command.script and not (root / command.script).is_file()
    ]


def unknown_lines(root: Path) -> list[str]:
    return [line for path in book.texts(root) for line in book.printed(path, root).unknown]


def make_targets(root: Path) -> list[str]:
    problems = []
    for path in book.texts(root):
        for word, here in book.printed(path, root).make.items():
            if "=" in word or word.startswith("-"):
                continue
            dry = _run(["make", "-n", word], root)
            if dry.returncode:
                problems.append(f"{here}: make {word}: {dry.stderr.strip()}")
    return problems


def pytest_lines(root: Path) -> list[str]:
    problems = []
    for path in book.texts(root):
        for text, here in book.printed(path, root).pytest.items():
            argv = book.parse_command(text).argv[1:]
            named = [a.partition("::")[0] for a in argv if a.startswith("tests/")]
            problems += [f"{here}: no such file: {n}" for n in named if not (root / n).exists()]
            if all((root / n).exists() for n in named):
                dry = _run([sys.executable, "-m", "pytest", "--collect-only", "-q", *argv], root)
                if dry.returncode:
                    problems.append(f"{here}: {text}\n{dry.stdout[-2000:]}{dry.stderr[-2000:]}")
    return problems


# --- layout ------------------------------------------------------------------------------------


def layout(root: Path) -> list[str]:
    problems = []
    for chapter in book.chapters(root):
        if chapter.name not in book.CHAPTERS:
            problems.append(f"{chapter.name}: not one of the eleven names in the design")
        for name in ("main.md", "exercises.py", "solutions.py", "paper/README.md"):
            if not (chapter / name).is_file():
                problems.append(f"{chapter.name}: no {name}")
        for name in ("code", "figures"):
            if not (chapter / name).is_dir():
                problems.append(f"{chapter.name}: no {name}/")
    return problems


def readme_table(root: Path) -> list[str]:
    """The front door lists the chapters that there are, and no other."""
    lines = (root / "README.md").read_text(encoding="utf-8").splitlines()
    table = [line for line in lines if line.lstrip().startswith("|")]
    linked = set(re.findall(r"\]\((?:\./)?(chapter\d+-[^/)]+)", "\n".join(table)))
    there = {chapter.name for chapter in book.chapters(root)}
    problems = [f"README.md: its table lacks {name}" for name in sorted(there - linked)]
    return problems + [f"README.md: lists {name}, which is not there" for name in linked - there]


def script_form(root: Path) -> list[str]:
    problems = []
    for script in book.scripts(root):
        name, tree = script.relative_to(root), ast.parse(script.read_text())
        if not ast.get_docstring(tree):
            problems.append(f"{name}: no docstring")
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        if book.is_program(script) and "main" not in functions:
            problems.append(f"{name}: no main()")
    return problems


def committed(root: Path) -> list[str]:
    """No binaries but the model, no logs, no path of somebody's machine."""
    problems = []
    home = re.compile(rb"/(?:home|Users)/[A-Za-z]\w*/|" + re.escape(str(root).encode()) + rb"\b")
    for path in book.files(root):
        name, content = path.relative_to(root), path.read_bytes()
        if path.suffix in (".log", ".pyc", ".whl", ".so", ".pdf", ".ipynb"):
            problems.append(f"{name}: does not belong into the repository")
        elif path.suffix != ".safetensors" and b"\0" in content:
            problems.append(f"{name}: binary")
        elif match := home.search(content):
            problems.append(f"{name}: has the path {match[0].decode()}")
    return problems


# --- Markdown ----------------------------------------------------------------------------------

_LINK = re.compile(
    r"(!?)\[(?:[^\[\]]|\[[^\]]*\])*\]\(<?([^()\s>]+(?:\([^()]*\))?)>?(?: +\"[^\"]*\")?\)"
)
_DEFINITION = re.compile(r"^ {0,3}\[[^\]]+\]: +(\S+)")
_TAG = re.compile(r"</?([A-Za-z][A-Za-z0-9-]*)(?:\s[^<>]*)?/?>")


def slugs(path: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a file."""
    found: dict[str, int] = {}
    result = set()
    inside = {n for f in book.fences(path) for n in range(f.line, f.line + len(f.lines) + 2)}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        heading = re.match(r" {0,3}#{1,6} +(.*?)(?: +#+)? *$", line)
        if heading is None or number in inside:
            continue
        text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading[1])
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        count = found.get(slug, 0)
        found[slug] = count + 1
        result.add(f"{slug}-{count}" if count else slug)
    return result


def links(root: Path) -> list[str]:
    """Relative links and anchors lead somewhere that is committed; images are local."""
    there = set(book.files(root))
    folders = {folder for path in there for folder in path.parents}
    folders |= {root / name for name in submodules(root)}
    problems = []
    for path in book.documents(root):
        for number, line in book.prose(path):
            found = [(bool(image), target) for image, target in _LINK.findall(line)]
            found += [(False, target) for target in _DEFINITION.findall(line)]
            for image, target in found:
                here = where(path, root, number)
                if re.match(r"[a-z][a-z0-9+.-]*:", target):
                    if image:
                        problems.append(f"{here}: image from elsewhere: {target}")
                    continue
                name, _, anchor = target.partition("#")
                goal = Path(os.path.normpath(path.parent / name)) if name else path
                if goal not in there and goal not in folders:
                    problems.append(f"{here}: dead link: {target}")
                elif anchor and goal.suffix == ".md" and anchor not in slugs(goal):
                    problems.append(f"{here}: dead anchor: {target}")
    return problems


def submodules(root: Path) -> list[str]:
    modules = root / ".gitmodules"
    return re.findall(r"path = (\S+)", modules.read_text()) if modules.is_file() else []


def markdown(root: Path) -> list[str]:
    """Fences closed and named, no HTML that GitHub may drop, no marker that does nothing."""
    problems = []
    for path in book.documents(root):
        used = set()
        for fence in book.fences(path):
            here = where(path, root, fence.line)
            if not fence.closed:
                problems.append(f"{here}: fence never closed")
            if not fence.language:
                problems.append(f"{here}: fence without a language")
            used |= {fence.line - 1, *range(fence.line, fence.line + len(fence.lines) + 2)}
            marked = fence.marker
            if marked and marked[1].startswith("output") and fence.language != "text":
                problems.append(f"{here}: an output block is a fence of text")
        used |= {figure.line - 1 for figure in book.figures(path)}
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if re.match(r"\s*<!-- *(output|figure|not run|on GPUs)\b", line) and number not in used:
                problems.append(f"{where(path, root, number)}: marker with nothing below it")
        for number, line in book.prose(path):
            for tag in _TAG.findall(line):
                if tag not in ("details", "summary"):
                    problems.append(f"{where(path, root, number)}: HTML: <{tag}>")
    return problems


def pictures(root: Path) -> list[str]:
    """Each figure is drawn by a command above it, and each one that is there is used."""
    problems = []
    for chapter in book.chapters(root):
        path = chapter / "main.md"
        if not path.is_file():
            continue
        lines = path.read_text(encoding="utf-8").splitlines()
        drawn_here: set[Path] = set()
        for figure in book.figures(path):
            here = where(path, root, figure.line)
            command = book.parse_command(figure.command)
            files = {root / name for name in plots(command)}
            drawn_here |= files
            below = lines[figure.line - 1] if figure.line <= len(lines) else ""
            shown = {
                Path(os.path.normpath(chapter / target))
                for image, target in _LINK.findall(below)
                if image
            }
            if not files:
                problems.append(f"{here}: the figure's command has no --plot")
            for file in sorted(files - shown):
                problems.append(f"{here}: the image below the marker is not {file.name}")
            problems += [
                f"{here}: missing figure {f.name}: make figures" for f in files if not f.exists()
            ]
        for svg in sorted((chapter / "figures").glob("*")):
            if svg not in drawn_here:
                problems.append(f"{svg.relative_to(root)}: no `<!-- figure: COMMAND -->` draws it")
    return problems


def listings(root: Path) -> list[str]:
    """The chapters' listings are what their scripts say now."""
    paths = [
        str(p.relative_to(root)) for c in book.chapters(root) if (p := c / "main.md").is_file()
    ]
    if not paths:
        return []
    tests = str(Path(__file__).resolve().parent)
    cog = [sys.executable, "-m", "cogapp", "--check", "--diff", "-I", tests]
    done = _run([*cog, "-p", "from listing import listing", *paths], root)
    if done.returncode == 0:
        return []
    return [
        f"{done.stdout}{done.stderr}\nlistings drifted from their scripts; to fix: make listings"
    ]


def pasted_code(root: Path) -> list[str]:
    """Code in a chapter is a listing that cog keeps, or says why it is none."""
    return [
        f"{where(fence.path, root, fence.line)}: {fence.language} without `[[[cog listing(...) ]]]`"
        for chapter in book.chapters(root)
        if (chapter / "main.md").is_file()
        for fence in book.fences(chapter / "main.md")
        if fence.language in listing.LANGUAGES.values()
        and "[[[cog" not in fence.above
        and not (fence.marker and fence.marker[1] == "not run" and fence.marker["text"])
    ]


# --- exercises ---------------------------------------------------------------------------------


def exercise_stubs(chapter: Path) -> list[str]:
    """Stubs raise NotImplementedError, say what to build, and are shaped as the solutions are."""
    if not all((chapter / name).is_file() for name in ("exercises.py", "solutions.py")):
        return []
    stubs, solutions = (_public(chapter / f"{n}.py") for n in ("exercises", "solutions"))
    at = chapter.name
    problems = [
        f"{at}: solutions.py lacks {name}" for name in sorted(stubs.keys() - solutions.keys())
    ]
    problems += [
        f"{at}: exercises.py lacks {name}" for name in sorted(solutions.keys() - stubs.keys())
    ]
    for name, stub in stubs.items():
        if name in solutions and _signature(stub) != _signature(solutions[name]):
            problems.append(f"{at}: {name}: {_signature(stub)} != {_signature(solutions[name])}")
        if not ast.get_docstring(stub) and not name.endswith("__init__"):
            problems.append(f"{at}: exercises.py: {name} has no docstring")
        last = ast.unparse(stub.body[-1])
        if not last.startswith("raise NotImplementedError") or len(stub.body) > 2:
            problems.append(f"{at}: exercises.py: {name} does more than raise NotImplementedError")
    return problems


def changed(path: Path) -> bool:
    """Whether a file differs from what is committed."""
    if not (path.parent.parent / ".git").exists():
        return False
    return bool(_run(["git", "status", "--porcelain", "--", path.name], path.parent).stdout)


def _public(path: Path) -> dict[str, ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions and methods by name; a leading underscore makes one a helper."""
    found = {}
    for node in ast.parse(path.read_text()).body:
        for part in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef):
                hidden = part.name.startswith("_") and not part.name.startswith("__")
                if not hidden:
                    name = (
                        f"{node.name}.{part.name}" if isinstance(node, ast.ClassDef) else part.name
                    )
                    found[name] = part
    return found


def _signature(function: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    returns = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    return f"({ast.unparse(function.args)}){returns}"


# --- tools -------------------------------------------------------------------------------------


def tool(root: Path, *argv: str) -> list[str]:
    """Run a Python tool (ruff, mypy, codespell) with the settings in pyproject.toml."""
    done = _run([sys.executable, "-m", *argv], root)
    said = f"{done.stdout}{done.stderr}".strip()
    return [f"{said}\n\npaste: python -m {' '.join(argv)}"] if done.returncode else []


def spelling(root: Path) -> list[str]:
    words = [
        str(p.relative_to(root)) for p in book.files(root) if p.suffix in (".md", ".py", ".toml")
    ]
    return tool(root, "codespell_lib", *words)


def _run(argv: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = warm.environment()
    return subprocess.run(
        argv, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
