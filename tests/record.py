"""Re-run commands of the book on a quiet machine, for what they print, draw or measure.

    python tests/record.py outputs --chapter 1
    python tests/record.py figures --only ring_allreduce
    python tests/record.py measure --chapter 2

Outputs come from the launchers that a reader uses, in a copy of the tree; below each block stands
the machine. What `...` omits stays omitted as long as the block's other lines still match.
Figures are drawn in the tree itself. A command that fails changes nothing, and the exit code is 1.
`measure` runs each command that has `expect:` lines with --strict, alone, and says which of them hold.
"""

import argparse
import os
import platform
import re
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import book
import checks
import psutil
import warm
from conftest import copy_tree

ROOT = Path(__file__).resolve().parent.parent


def refreshed(old: list[str], output: list[str]) -> tuple[list[str], str | None]:
    """The block's new lines: what it showed before, as it is now; all of it if that is gone."""
    new = [line.rstrip() for line in output]
    while new and not new[-1]:
        new.pop()
    if not old:
        return new, None
    shown = book.align(old, new)
    if isinstance(shown, str):
        return new, shown
    lines = zip(old, shown, strict=False)  # the block may end in empty lines
    return [was if n is None else shortened(was, new[n]) for was, n in lines], None


def shortened(was: str, line: str) -> str:
    """The line, cut after as many words as the block showed of it if the rest was left out."""
    if not was.endswith(" ..."):
        return line
    words = len(was.split()) - 1
    start = re.match(rf"\s*(?:\S+\s+){{{words - 1}}}\S+", line) if words else None
    return f"{start[0] if start else ''} ..."


def replaced(text: str, block: book.Block, lines: list[str], machine: str) -> str:
    """The file's text with a block's lines and the machine below it replaced."""
    old = text.split("\n")
    end = block.line + len(block.lines)  # index of the closing fence
    below = end + 2 if end + 1 < len(old) and re.match(r"\*\(.*\)\*$", old[end + 1]) else end + 1
    blank = [""] if below < len(old) and old[below].strip() else []
    return "\n".join([*old[: block.line], *lines, old[end], machine, *blank, *old[below:]])


def machine_line() -> str:
    """The machine in a line: processor, cores, memory, how its ranks talk, torch."""
    return f"*({', '.join([_processor(), *_size(), _fabric(), f'torch {_torch()}'])})*"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", info.read_text() if info.exists() else "", re.M)
    name = names[0] if names else platform.processor() or platform.machine()
    return re.sub(r"\((?:R|TM|r|tm)\)|\bCPU\b|@.*$", "", name).replace("  ", " ").strip()


def _size() -> list[str]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [f"{usable} cores", f"{psutil.virtual_memory().total / 2**30:.0f} GiB"]


def _fabric() -> str:
    gpus = checks.gpu_names()
    return f"{len(gpus)} x {gpus[0]}, nccl" if gpus else "gloo"


def _torch() -> str:
    return metadata.version("torch").partition("+")[0]


def record_outputs(root: Path, chapter: int | None, only: str, timeout: float) -> int:
    """Rewrite the output blocks; the number of commands that failed."""
    failed: set[str] = set()
    ran: dict[str, warm.Result] = {}
    with tempfile.TemporaryDirectory(prefix="book-") as folder:
        copy_tree(root, Path(folder))
        for path in wanted(root, chapter):
            for number, block in enumerate(book.blocks(path)):
                if only not in block.command or not checks.compares(block):
                    continue
                command = book.parse_command(block.command, book.where(path, root, block.line))
                if command.text not in ran:
                    print(command.text, flush=True)
                    ran[command.text] = warm.run_cold(command, Path(folder), timeout)
                result = ran[command.text]
                problems = checks.evidence(command, result)
                if problems:
                    failed.add(command.text)
                    print(checks.report(command, result, problems), file=sys.stderr)
                    continue
                block = book.blocks(path)[number]  # the lines above may have moved it
                lines, gone = refreshed(list(block.lines), result.stdout.splitlines())
                if gone:
                    print(
                        f"{command.sources[0]}: changed, written in full:\n{gone}", file=sys.stderr
                    )
                write(path, replaced(path.read_text(), block, lines, machine_line()))
    return len(failed)


def draw_figures(root: Path, chapter: int | None, only: str, timeout: float) -> int:
    """Run the figures' commands in the tree; the number that failed."""
    failed = 0
    for path in wanted(root, chapter):
        for text in dict.fromkeys(figure.command for figure in book.figures(path)):
            if only not in text:
                continue
            print(text, flush=True)
            command = book.parse_command(text, str(path.relative_to(root)))
            result = warm.run_cold(command, root, timeout)
            problems = checks.evidence(command, result)
            problems += [p for name in checks.plots(command) for p in checks.drawn(root / name)]
            if problems:
                failed += 1
                print(checks.report(command, result, problems), file=sys.stderr)
    return failed


def measure(root: Path, chapter: int | None, only: str, timeout: float) -> int:
    """Run what has claims about the machine, strictly; the number of commands that failed."""
    failed = held = missed = 0
    with tempfile.TemporaryDirectory(prefix="book-") as folder:
        copy_tree(root, Path(folder))
        for printed in checks.measures(root):
            own = chapter is None or f"chapter{chapter}-" in printed.text
            if not own or only not in printed.text or printed.gpus:
                continue
            command = book.parse_command(f"{printed.text} --strict")
            print(command.text, flush=True)
            result = warm.run_cold(command, Path(folder), timeout)
            lines = re.findall(r"^expect: .*|^check: .* FAILED.*", result.stdout, re.M)
            print("\n".join(f"    {line}" for line in lines), flush=True)
            held += sum(line.endswith("ok") for line in lines)
            missed += sum(line.endswith("not here") for line in lines)
            if result.returncode:
                failed += 1
                if not lines or all(line.endswith("ok") for line in lines):
                    print(checks.report(command, result, [f"ended with {result.returncode}"]))
    print(f"{held} expectations hold, {missed} do not; {machine_line()}")
    return failed


def wanted(root: Path, chapter: int | None) -> list[Path]:
    name = f"chapter{chapter}-"
    return [p for p in book.texts(root) if chapter is None or p.parent.name.startswith(name)]


def write(path: Path, text: str) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_text(text)
    temporary.replace(path)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["outputs", "figures", "measure"], help="what for")
    parser.add_argument("--chapter", type=int, help="its number (default: README and all chapters)")
    parser.add_argument("--only", default="", help="only commands that contain this text")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for each command")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    record = {"outputs": record_outputs, "figures": draw_figures, "measure": measure}[args.what]
    failed = record(ROOT, args.chapter, args.only, args.timeout)
    sys.exit(f"{failed} commands failed" if failed else 0)


if __name__ == "__main__":
    main()
