"""Every command that the book prints is run, as printed, and has to show that it did its work."""

import re
from collections.abc import Callable
from pathlib import Path

import book
import checks
import pytest
import warm

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = book.commands(ROOT)


def title(command: book.Command) -> str:
    """The command in short: torchrun-2 chapter1/ch01_x.py --steps 10."""
    text = re.sub(r"(chapter\d+)-\S*/", r"\1/", command.text.partition("\n")[0])
    return re.sub(r"torchrun --nproc[-_]per[-_]node[= ](\d+)", r"torchrun-\1", text)


def first_of_each(kind: Callable[[book.Command], str | None]) -> set[str]:
    """Of the commands that need no GPU, the first one of each kind."""
    first: dict[str | None, str] = {None: ""}
    for command in COMMANDS:
        if not command.gpus:
            first.setdefault(kind(command), command.text)
    return set(first.values())


COLD = first_of_each(lambda command: command.launcher)  # so the launchers themselves run too
MEASURING = {command.text for command in checks.measures(ROOT)}
SAMPLE = COLD | (first_of_each(lambda command: command.script) & MEASURING)


def sampled(command: book.Command) -> list[pytest.MarkDecorator]:
    return [pytest.mark.sample] if command.text in SAMPLE else []


@pytest.mark.parametrize(
    "command", [pytest.param(c, id=title(c), marks=sampled(c)) for c in COMMANDS]
)
def test_command(command: book.Command, checkout: Path) -> None:
    limit = checks.LIMIT_S
    if command.gpus:
        wanted, there = command.world_size, len(checks.gpu_names())
        if there < wanted:
            pytest.skip(f"needs {wanted} GPU{'s' * (wanted > 1)}, with the CUDA build of PyTorch")
        limit = checks.GPU_LIMIT_S
    cold = command.gpus or command.text in COLD
    start: checks.Start = warm.run_cold if cold else warm.run
    checks.expect_none(checks.run_command(command, checkout, start, limit))


def test_every_script_is_covered() -> None:
    checks.expect_none(checks.uncovered_scripts(ROOT))


def test_every_command_names_a_script_that_exists() -> None:
    checks.expect_none(checks.missing_scripts(ROOT))


def test_every_line_of_a_bash_fence_is_of_a_known_kind() -> None:
    checks.expect_none(checks.unknown_lines(ROOT))


def test_make_targets_exist() -> None:
    checks.expect_none(checks.make_targets(ROOT))


def test_pytest_lines_collect() -> None:
    checks.expect_none(checks.pytest_lines(ROOT))
