"""Which tests of the full tier a change needs: prints an expression for pytest's -m.

    python tests/changed.py

A change is what the last four hours of history before HEAD touched. A chapter's folder or tests
ask for that chapter's full tier, the suite's own files for the machinery's, the pinned versions for
all; so does a history that cannot be told.
"""

import re
import subprocess
from pathlib import Path

HOURS = 4


def git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return done.stdout.strip() if done.returncode == 0 else ""


def parts(files: list[str]) -> set[str]:
    """The marks of the parts of the book that these files belong to."""
    found = set()
    for file in files:
        chapter = re.match(r"(?:tests/)?(chapter\d+)\b", file)
        found.add(chapter[1] if chapter else "machinery")
    return found


def expression(files: list[str] | None) -> str:
    """For pytest's -m; None stands for a history that is not known."""
    if files is None or "pyproject.toml" in files:
        return "full"
    return f"full and ({' or '.join(sorted(parts(files)))})" if files else "full and machinery"


def changed_files() -> list[str] | None:
    now = git("show", "-s", "--format=%ct", "HEAD")
    base = git("rev-list", "-1", f"--before={int(now) - HOURS * 3600}", "HEAD") if now else ""
    return git("diff", "--name-only", base, "HEAD").splitlines() if base else None


if __name__ == "__main__":
    print(expression(changed_files()))
