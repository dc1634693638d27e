"""The form of the book: layout, links, listings, figures, exercises, spelling, lint and types."""

from collections.abc import Callable
from pathlib import Path

import book
import checks
import copies
import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    "check",
    [
        checks.layout,
        checks.readme_table,
        checks.script_form,
        checks.committed,
        checks.links,
        checks.markdown,
        checks.pictures,
        checks.listings,
        checks.pasted_code,
        checks.spelling,
        copies.problems,
    ],
    ids=lambda check: f"{check.__module__}.{check.__name__}",
)
def test_text(check: Callable[[Path], list[str]]) -> None:
    checks.expect_none(check(ROOT))


@pytest.mark.parametrize("chapter", book.chapters(ROOT), ids=lambda chapter: chapter.name)
def test_exercises_are_stubs_of_the_solutions(chapter: Path) -> None:
    if not checks.changed(chapter / "exercises.py"):  # else a reader is at work, and may be
        checks.expect_none(checks.exercise_stubs(chapter))


WORKFLOWS = "check_jsonschema --builtin-schema vendor.github-workflows .github/workflows/test.yml"


@pytest.mark.parametrize("command", ["ruff check .", "ruff format --check .", "mypy", WORKFLOWS])
def test_tools_find_nothing(command: str) -> None:
    checks.expect_none(checks.tool(ROOT, *command.split()))
