"""check, expect, conclude, say and stop, which every script copies: what holds, and who says it."""

import math
import subprocess
from collections.abc import Callable
from pathlib import Path

import book
import pytest
import warm
from listing import source_of

CODE = warm.ROOT / book.CHAPTERS[0] / "code"
HOME = CODE / "ch01_single_gpu_baseline.py"
Write = Callable[[str], Path]

home = warm.load("claims_home", HOME)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a script of the five functions and of the lines given."""

    def write(lines: str) -> Path:
        names = ("check", "expect", "conclude", "say", "stop")
        parts = ["import os", "import sys", "from typing import NoReturn"]
        parts += [source_of(HOME, name) for name in names]
        script = tmp_path / "script.py"
        script.write_text("\n\n".join([*parts, lines]) + "\n")
        return script

    return write


@pytest.mark.parametrize("at_least", [False, True])
@pytest.mark.parametrize("value", [0.5, 1.0, 1.5, math.nan])
def test_a_bound_is_kept_or_not(
    value: float, at_least: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is no number keeps no bound. An expectation is judged only when --strict asks for it."""
    held = value in ({1.0, 1.5} if at_least else {0.5, 1.0})
    assert home.check("this", value, 1, at_least) is held
    assert home.expect("that", value, 1, True, at_least) is held
    assert home.expect("that", value, 1, False, at_least) is None
    bound = f"= {value:.3g} {'>=' if at_least else '<='} 1"
    assert capsys.readouterr().out.splitlines() == [
        f"check: this {bound}  {'ok' if held else 'FAILED on rank 0'}",
        *[f"expect: that {bound}  {'ok' if held else 'not here'}"] * 2,
    ]


def test_the_last_line_counts_what_was_judged(capsys: pytest.CaptureFixture[str]) -> None:
    assert home.conclude([True, None, True]) == 0
    assert home.conclude([True, None, False, False]) == 1
    assert capsys.readouterr().out == "all 2 checks ok\n2 of 3 checks FAILED\n"


def test_a_rank_that_fails_says_so_and_fails_the_run(write: Write, tmp_path: Path) -> None:
    script = write("sys.exit(conclude([check('rank', int(os.environ['RANK']), 1)]))")
    result = warm.run(f"torchrun --nproc_per_node=3 {script}", tmp_path)
    assert result.returncode == 1
    assert sorted(result.stdout.splitlines()) == [
        "all 1 checks ok",  # of rank 0
        "check: rank = 0 <= 1  ok",
        "check: rank = 2 <= 1  FAILED on rank 2",
    ]


def test_the_last_line_is_of_the_rank_where_most_failed(write: Write, tmp_path: Path) -> None:
    """Rank 0 prints it, and may have kept all its own bounds."""
    ranks = CODE / "ch01_multi_gpu_ddp.py"
    lines = [
        "import argparse\nimport torch\nimport torch.distributed as dist",
        "from torch.distributed.elastic.multiprocessing.errors import record",
        source_of(ranks, "join_group"),
        "parse_args = lambda: argparse.Namespace(device='cpu')",
        "run = lambda args, device: [check('rank', dist.get_rank(), most) for most in (2, 1, 0)]",
        source_of(ranks, "main"),
        "main()",
    ]
    script = write("\n\n".join(lines))
    result = warm.run(f"torchrun --nproc_per_node=3 {script}", tmp_path)
    assert result.returncode == 1
    assert "2 of 3 checks FAILED\n" in result.stdout, result.stderr


def test_stop_says_one_line_and_ends_with_2(write: Write, tmp_path: Path) -> None:
    result = warm.run(f"python {write('stop(sys.argv[0])')}", tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"{tmp_path}/script.py\n"


@pytest.mark.parametrize("launcher", ["python", "torchrun --nproc_per_node=2"])
def test_a_reader_who_has_seen_enough_ends_nothing(
    write: Write, tmp_path: Path, launcher: str
) -> None:
    """`| head -1` closes the pipe; the script goes on, in silence, and ends with its own code."""
    script = write(
        "for line in range(30_000):\n    say(f'{line}')\n"
        "open(f'done-{os.environ.get(\"RANK\", 0)}', 'w').close()\nsys.exit(conclude([True]))"
    )
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {launcher} {script} | head -1"],
        cwd=tmp_path,
        env=warm.environment() | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")
    assert len(list(tmp_path.glob("done-*"))) == (1 if launcher == "python" else 2)
