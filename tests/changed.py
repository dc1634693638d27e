"""Which tests of the full tier a change needs: prints an expression for pytest's -m.

    python tests/changed.py

A change is what the last three hours of history before HEAD touched. A chapter's folder or tests
ask for that chapter's full tier, the suite's own files for the machinery's, a pinned version that
moved for all; so does a history that cannot be told. A new package comes with the files that want it.
"""

import re
import subprocess
from pathlib import Path

HOURS = 3


def git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return done.stdout.strip() if done.returncode == 0 else ""


def parts(files: list[str]) -> set[str]:
    """The marks of the parts of the book that these files belong to."""
    found = set()
    for file in files:
        if re.match(r"chapter\d+-[^/]+/(main\.md|figures/|paper/)", file):
            continue  # `make test` holds texts to what they print
        chapter = re.match(r"(?:tests/)?(chapter\d+)\b", file)
        found.add(chapter[1] if chapter else "machinery")
    return found


def expression(files: list[str] | None) -> str:
    """For pytest's -m; None stands for a history that is not known."""
    if files is None or "pyproject.toml" in files:
        return "full"
    wanted = sorted(parts(files)) or ["machinery"]
    return f"full and ({' or '.join(wanted)})"


def changed_files() -> list[str] | None:
    now = git("show", "-s", "--format=%ct", "HEAD")
    base = git("rev-list", "-1", f"--before={int(now) - HOURS * 3600}", "HEAD") if now else ""
    if not base:
        return None
    rows = [row.split("\t") for row in git("diff", "--numstat", base, "HEAD").splitlines()]
    return [file for added, removed, file in rows if (file, removed) != ("pyproject.toml", "0")]


if __name__ == "__main__":
    print(expression(changed_files()))
