"""Uneven inputs: other sizes and seeds, and mutants; and that Join is needed."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import warm
from mutants import failed_claims

SCRIPT = warm.ROOT / "chapter3-distributed-training-with-pytorch-ddp/code/ddp_uneven_inputs_join.py"
JOIN = "--timeout 0.2"
Run = Callable[..., warm.Result]
MUTANTS = [
    ("with Join([model], **options):", "with Join([model]):"),
    (
        ".mean() for rows in batches) / len(batches)",
        ".mean() for rows in batches) / dist.get_world_size()",
    ),
    ("weight = present * dist", "weight = dist"),  # the borrowed row counts
    ("dist.all_reduce(total)", "pass"),
    ("dist.get_world_size() / total", "1.0 / total"),  # a mean of a sum
    ("plain(model, optimizer, batches[shortest:])", "pass"),  # nobody has to wait
]


@pytest.mark.full
@pytest.mark.parametrize(
    ("world_size", "flags"), [(2, "--seed 20260101 --steps 5"), (3, "--steps 7"), (4, "--seed 3")]
)
def test_every_world_size(world_size: int, flags: str) -> None:
    """A script's own checks are the test: it compares itself with one process."""
    assert failed_claims(SCRIPT, world_size, [(f"{JOIN} {flags}", "", "")]) == [set()]


@pytest.mark.full
def test_mutants_are_caught() -> None:
    found = failed_claims(SCRIPT, 2, [(JOIN, *mutant) for mutant in MUTANTS])
    assert [mutant for mutant, failed in zip(MUTANTS, found, strict=True) if not failed] == []


@pytest.mark.full
def test_join_left_out(run: Run, tmp_path: Path) -> None:
    """The ranks' collectives no longer match: the run stops or hangs, and must not pass."""
    right = "with Join([model], **options):"
    source = SCRIPT.read_text()
    assert source.count(right) == 1
    mutant = tmp_path / SCRIPT.name
    mutant.write_text(source.replace(right, "if True:"))
    result = run(f"torchrun --nproc_per_node=2 {mutant} {JOIN}", timeout=5)
    assert "batches by rank" in result.stdout, result.stderr
    assert result.returncode != 0, result.stdout


@pytest.mark.full
def test_too_few_steps(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--steps", "4"])
    with pytest.raises(SystemExit) as end:
        warm.load("uneven_inputs", SCRIPT).parse_args()
    assert end.value.code == 2
    assert "type 5 or more" in capsys.readouterr().err


@pytest.mark.full
def test_one_rank_gets_one_line(run: Run) -> None:
    result = run(f"torchrun --nproc_per_node=1 {SCRIPT} {JOIN}", timeout=30)
    assert result.returncode == 1  # torchrun's; the rank's is 2
    assert result.stderr.startswith("needs two ranks: type  torchrun --nproc_per_node=2")
