"""What the book prints, as data: its files, commands, output blocks, figures and fences.

Nothing here runs or judges anything (warm.py and checks.py do), and everything takes the root of a
repository, so that test_machinery.py can feed it small broken ones.
"""

import ast
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

CHAPTERS = (
    "chapter1-introduction-to-modern-distributed-ai",
    "chapter2-gpu-hardware-networking-and-parallelism-strategies",
    "chapter3-distributed-training-with-pytorch-ddp",
    "chapter4-scaling-with-fully-sharded-data-parallel-fsdp",
    "chapter5-deepspeed-and-zero-optimization",
    "chapter6-distributed-inference-fundamentals-and-vllm",
    "chapter7-sglang-and-advanced-inference-architectures",
    "chapter8-distributed-ai-training-in-action",
    "chapter9-production-llm-serving-stack",
    "chapter10-distributed-benchmarking-and-performance-optimization",
    "chapter11-trends-and-future-of-distributed-ai",
)
RUNS = re.compile(r"(?:[A-Z_][A-Z0-9_]*=\S* +)*(?:python|torchrun|deepspeed) ")
MARKER = re.compile(r"<!-- (output(?: on (?P<device>[^:]+))?|figure|not run): *(?P<text>.*?) *-->$")
SHELL = {"|", "||", "&", "&&", ";", ">", ">>", "<", "2>", "2>&1"}


@dataclass(frozen=True)
class Command:
    """A command that the reader is told to type."""

    text: str  # as printed, continued lines joined
    sources: tuple[str, ...] = ()  # "file:line", one for each place that prints it
    gpus: bool = False  # stands only where GPUs are asked for
    env: tuple[tuple[str, str], ...] = ()
    argv: tuple[str, ...] = ()

    @property
    def session(self) -> bool:
        """Whether it is a server with what the reader types against it, several lines for a shell."""
        return self.argv[0] == "bash"

    @property
    def launcher(self) -> str:
        return Path(self.argv[0]).name

    @property
    def world_size(self) -> int:
        """Ranks that the launcher is told to start."""
        named = {"torchrun": r"nproc[-_]per[-_]node", "deepspeed": r"num[-_](?:gpus|accelerators)"}
        named["python"] = r"ranks"  # of a script that starts them itself
        if self.launcher not in named:
            return 1
        ranks = re.search(rf"--{named[self.launcher]}[= ](\d+)", self.text)
        nodes = re.search(r"--n?nodes[= ](\d+)|--num_nodes[= ](\d+)", self.text)
        size = int(ranks[1]) if ranks else 1
        return size * int(nodes[1] or nodes[2]) if nodes else size

    @property
    def script(self) -> str | None:
        """The chapter's script that the command runs, as it names it."""
        return next((a for a in self.argv if re.match(r"(\./)?chapter\d+-.*\.py$", a)), None)


@dataclass(frozen=True)
class Fence:
    """A fenced block of a Markdown file; line numbers start at 1."""

    path: Path
    line: int  # of the opening fence
    language: str
    lines: tuple[str, ...]
    above: str  # the line directly above the fence
    closed: bool = True

    @property
    def marker(self) -> re.Match[str] | None:
        return MARKER.match(self.above.strip())


@dataclass(frozen=True)
class Block:
    """An output block: what a command printed on a machine."""

    command: str
    path: Path
    line: int  # of the opening fence
    lines: tuple[str, ...]
    device: str | None = None  # set: compare only where that device is


@dataclass(frozen=True)
class Figure:
    command: str
    path: Path
    line: int


@dataclass
class Printed:
    """All that the bash fences hold; `unknown` are the lines that are of no known kind."""

    commands: list[Command] = field(default_factory=list)
    make: dict[str, str] = field(default_factory=dict)  # target: where
    pytest: dict[str, str] = field(default_factory=dict)  # command: where
    unknown: list[str] = field(default_factory=list)


def chapters(root: Path) -> list[Path]:
    return sorted(
        (p for p in root.glob("chapter[0-9]*-*") if p.is_dir()),
        key=lambda p: int(re.findall(r"\d+", p.name)[0]),
    )


def files(root: Path) -> list[Path]:
    """What git would commit; every file where there is no git."""
    listed = subprocess.run(
        ["git", "ls-files", "-coz", "--exclude-standard"], cwd=root, capture_output=True, text=True
    )
    is_git = listed.returncode == 0 and (root / ".git").exists()
    names = listed.stdout.split("\0")[:-1]
    found = [root / name for name in names] if is_git else list(root.rglob("*"))
    hidden = re.compile(r"\.git$|\.venv|__pycache__$|\..*_cache$")
    return sorted(
        p
        for p in set(found)
        if p.is_file() and not any(hidden.match(part) for part in p.relative_to(root).parts)
    )


def scripts(root: Path) -> list[Path]:
    return [
        p
        for c in chapters(root)
        for p in files(root)
        if p.suffix == ".py" and c / "code" in p.parents
    ]


def texts(root: Path) -> list[Path]:
    """The Markdown files whose commands a reader types."""
    named = [root / "README.md", root / "CONTRIBUTING.md"]
    return [p for p in [*named, *(c / "main.md" for c in chapters(root))] if p.is_file()]


def documents(root: Path) -> list[Path]:
    return texts(root) + [p for c in chapters(root) if (p := c / "paper" / "README.md").is_file()]


def is_program(script: Path) -> bool:
    """Whether a file does something when run; the others are modules of a program."""
    return re.search(r"^if __name__ == ['\"]__main__['\"]:", script.read_text(), re.M) is not None


def where(path: Path, root: Path, line: int) -> str:
    return f"{path.relative_to(root)}:{line}"


# --- commands ----------------------------------------------------------------------------------


def parse_command(text: str, source: str = "", gpus: bool = False) -> Command:
    """Split a printed command as a shell would; ValueError where only a shell could run it.

    Lines of which one ends in `&` are a session: a server, and what the reader types against it.
    """
    if re.search(r" &$", text, re.M):
        lines = [line.strip() for line in re.sub(r"\\\n\s*", " ", text).strip().splitlines()]
        server = shlex.split(lines[0].removesuffix("&"))
        sources = (source,) if source else ()
        return Command("\n".join(lines), sources, gpus, (), ("bash", *server))
    text = " ".join(re.sub(r"\s+#.*$", "", text.strip()).split())
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"{source}: {error}: {text}") from None
    lexer = shlex.shlex(text, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    if SHELL & set(lexer) or re.search(r"\$\(|`|\$\w", text):
        raise ValueError(f"{source}: needs a shell: {text}")
    env = []
    while words and re.match(r"[A-Za-z_]\w*=", words[0]):
        name, _, value = words.pop(0).partition("=")
        env.append((name, value))
    if not words:
        raise ValueError(f"{source}: no command: {text}")
    sources = (source,) if source else ()
    return Command(text, sources, gpus, tuple(env), tuple(words))


def commands(root: Path) -> list[Command]:
    """Each distinct command that docstrings, fences and markers print, with all its places.

    A command printed both under "On GPUs:" and elsewhere is one that everybody can run.
    """
    found: dict[str, Command] = {}
    recorded: list[Command] = []
    for script in scripts(root):
        _merge(found, docstring_commands(script, root))
    for path in texts(root):
        _merge(found, printed(path, root).commands)
        marks: list[Block | Figure] = [*blocks(path), *figures(path)]
        for mark in marks:
            command = parse_command(mark.command, where(path, root, mark.line - 1))
            if isinstance(mark, Block) and mark.device:
                recorded.append(command)
            else:
                _merge(found, [command])
    for command in recorded:  # on other hardware: says nothing about who can run it
        known = found.get(command.text)
        _merge(found, [Command(**{**vars(command), "gpus": known is not None and known.gpus})])
    return list(found.values())


def _merge(found: dict[str, Command], new: list[Command]) -> None:
    for command in new:
        old = found.get(command.text, command)
        sources = tuple(dict.fromkeys(old.sources + command.sources))
        gpus = old.gpus and command.gpus
        found[command.text] = Command(command.text, sources, gpus, command.env, command.argv)


def docstring_commands(script: Path, root: Path) -> list[Command]:
    tree = ast.parse(script.read_text())
    text = ast.get_docstring(tree, clean=False) or ""
    first = tree.body[0].lineno if tree.body else 1
    found, gpus = [], False
    session: list[str] = []  # its lines so far
    for number, line in joined([*text.splitlines(), ""], first):
        if session and line.strip():
            session.append(line.strip())
        elif session:
            here = where(script, root, number - len(session))
            found.append(parse_command("\n".join(session), here, gpus))
            session = []
        elif line.strip() and not line.startswith((" ", "\t")):
            gpus = line.strip() == "On GPUs:"
        elif line.endswith(" &"):
            session = [line.strip()]
        elif RUNS.match(line.strip() + " "):
            found.append(parse_command(line, where(script, root, number), gpus))
    return found


def joined(lines: list[str], first: int) -> Iterator[tuple[int, str]]:
    """Number the lines, with those that end in a backslash joined to their next."""
    start, waiting = first, ""
    for number, line in enumerate(lines, first):
        if not waiting:
            start = number
        waiting = f"{waiting.rstrip()} {line.strip()}" if waiting else line
        if waiting.rstrip().endswith("\\"):
            waiting = waiting.rstrip()[:-1]
        else:
            yield start, waiting
            waiting = ""
    if waiting:
        yield start, waiting


def printed(path: Path, root: Path) -> Printed:
    """Sort the lines of a file's bash fences by kind.

    `<!-- not run: REASON -->` above a fence exempts it. `<!-- on GPUs -->` says that its commands
    need them, as "On GPUs:" does in a docstring.
    """
    result = Printed()
    for fence in fences(path):
        if fence.language not in ("bash", "sh", "shell", "console"):
            continue
        here = where(path, root, fence.line)
        if fence.language != "bash":
            result.unknown.append(f"{here}: a fence of commands is marked bash")
        if fence.marker and fence.marker[1] == "not run":
            if not fence.marker["text"]:
                result.unknown.append(f"{here}: `not run:` wants a reason")
            continue
        gpus = fence.above.strip() == "<!-- on GPUs -->"
        if is_session(fence):
            result.commands.append(parse_command("\n".join(fence.lines), here, gpus))
            continue
        for number, line in joined(list(fence.lines), fence.line + 1):
            _sort(line.strip(), where(path, root, number), gpus, result)
    return result


def is_session(fence: Fence) -> bool:
    """Whether a fence starts a server and talks to it: it is run as a whole, by a shell."""
    return fence.language == "bash" and any(line.endswith(" &") for line in fence.lines)


def _sort(line: str, here: str, gpus: bool, result: Printed) -> None:
    if not line or line.startswith("#"):
        return
    try:
        command = parse_command(line, here, gpus)
    except ValueError as error:
        result.unknown.append(str(error))
        return
    if command.launcher == "make" and not command.env:
        for target in command.argv[1:]:
            result.make.setdefault(target, here)
    elif command.launcher == "pytest" and not command.env:
        result.pytest.setdefault(command.text, here)
    elif RUNS.match(line + " "):
        result.commands.append(command)
    else:
        result.unknown.append(
            f"{here}: neither python, torchrun, deepspeed, make nor pytest: {line}"
        )


# --- Markdown ----------------------------------------------------------------------------------


def fences(path: Path) -> list[Fence]:
    found: list[Fence] = []
    lines = path.read_text(encoding="utf-8").splitlines()
    opened: tuple[int, str, str] | None = None
    body: list[str] = []
    for number, line in enumerate(lines, 1):
        match = re.match(r"\s*(```+|~~~+)\s*(\S*)", line)
        if opened is None and match:
            opened, body = (number, match[1], match[2]), []
        elif opened and match and match[1].startswith(opened[1]) and not match[2]:
            above = lines[opened[0] - 2] if opened[0] > 1 else ""
            found.append(Fence(path, opened[0], opened[2], tuple(body), above))
            opened = None
        elif opened:
            body.append(line)
    if opened:
        above = lines[opened[0] - 2] if opened[0] > 1 else ""
        found.append(Fence(path, opened[0], opened[2], tuple(body), above, closed=False))
    return found


def prose(path: Path) -> list[tuple[int, str]]:
    """The numbered lines outside fences and comments, without code spans and formulas."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    for fence in fences(path):
        for number in range(fence.line - 1, min(fence.line + len(fence.lines) + 1, len(lines))):
            lines[number] = ""
    blank = "\n".join(lines)
    for pattern in (r"<!--.*?-->", r"(`+)(?!`).+?(?<!`)\1(?!`)", r"\$\$.+?\$\$", r"\$[^$\n]+\$"):
        blank = re.sub(pattern, lambda m: "\n" * m[0].count("\n"), blank, flags=re.S)
    return list(enumerate(blank.split("\n"), 1))


def blocks(path: Path) -> list[Block]:
    """The output blocks: a marker directly above a fence of text.

    `<!-- output: session -->` stands for the session in the nearest fence above.
    """
    found = []
    session = ""
    for fence in fences(path):
        if is_session(fence):
            session = "\n".join(fence.lines)
        marker = fence.marker
        if marker and marker[1].startswith("output"):
            device = marker["device"]
            text = session if marker["text"] == "session" else marker["text"]
            found.append(Block(text, path, fence.line, fence.lines, device))
    return found


def figures(path: Path) -> list[Figure]:
    """The figure markers; each stands directly above its image."""
    found = []
    inside = {n for f in fences(path) for n in range(f.line, f.line + len(f.lines) + 2)}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        marker = MARKER.match(line.strip())
        if marker and marker[1] == "figure" and number not in inside:
            found.append(Figure(marker["text"], path, number + 1))
    return found


# --- comparing outputs -------------------------------------------------------------------------

_BARS = re.compile(r"[\u2580-\u259f]+")
_RULES = re.compile(r"([-=─━_#*~+])\1+")
_DEVICE = re.compile(r"\b(?:cpu|cuda|gloo|nccl)(?::\d+)?\b")
_NUMBER = re.compile(
    r"(?<![A-Za-z_])[-+]?(?:\d+(?:,\d{3})+(?:\.\d+)?|\d*\.?\d+)(?:[eE][-+]?\d+)?%?"
    r"|[-+]?\b(?:inf|nan)\b%?"
)


def masked(line: str) -> str:
    """A line with all that may differ between two runs and two machines made equal.

    A number that is part of a name (fp32, H100) stays. What a model has written stands behind "~ "
    and may be anything; an `expect:` may hold or not.
    """
    if line.startswith("~ "):
        return "~"
    if line.startswith("expect: "):
        line = re.sub(r"\b(ok|not here)$", "VERDICT", line.rstrip())
    line = _RULES.sub(r"\1", _BARS.sub("", line))
    line = _DEVICE.sub("DEVICE", line)
    return " ".join(_NUMBER.sub("#", line).split())


def align(block: list[str], output: list[str]) -> list[int | None] | str:
    """For each line of a block the number of the output's line that it shows (None for `...`).

    `...` stands for any number of lines, or at a line's end for its rest. If the two differ, says how they first do.
    """
    expected, actual = _trimmed(block), _trimmed(output)
    masks = [masked(line) for line in actual]
    parts: list[list[str]] = [[]]
    for line in expected:
        if line.strip() == "...":
            parts.append([])
        else:
            parts[-1].append(line)
    result: list[int | None] = []
    position = 0
    for number, part in enumerate(parts):
        if number:
            result.append(None)
        wanted = [masked(line) for line in part]
        last = number == len(parts) - 1
        if not number:
            starts = [0]
        elif last:
            starts = [len(masks) - len(wanted)]
            starts = [s for s in starts if s >= position] or [position]
        else:
            starts = list(range(position, max(len(masks) - len(wanted), position) + 1))
        agreed = {s: _agreement(wanted, masks[s:]) for s in starts}
        start = max(starts, key=lambda s: agreed[s])  # the leftmost of the best
        found = agreed[start]
        if found < len(wanted):
            said = actual[start + found] if start + found < len(actual) else "(nothing more)"
            return f"the block says:  {part[found].rstrip()}\nit prints:       {said.rstrip()}"
        result += range(start, start + len(wanted))
        position = start + len(wanted)
    if len(parts) == 1 and position < len(actual):
        return f"the block says:  (nothing more)\nit prints:       {actual[position].rstrip()}"
    return result


def matches(block: list[str], output: list[str]) -> str | None:
    """The first difference between an output block and an output, numbers aside."""
    answer = align(block, output)
    return answer if isinstance(answer, str) else None


def _agreement(wanted: list[str], lines: list[str]) -> int:
    """How many lines agree before the first that does not."""
    count = 0
    while count < min(len(wanted), len(lines)) and _shows(wanted[count], lines[count]):
        count += 1
    return count


def _shows(wanted: str, line: str) -> bool:
    """Whether a masked line of a block shows a masked line; ` ...` at its end stands for any."""
    return line.startswith(wanted[:-4]) if wanted.endswith(" ...") else wanted == line


def _trimmed(lines: list[str]) -> list[str]:
    end = len(lines)
    while end and not lines[end - 1].strip():
        end -= 1
    return list(lines[:end])
