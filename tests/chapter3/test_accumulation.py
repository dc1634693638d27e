"""Gradient accumulation: what the kernel says was sent, other sizes and seeds, bad input, mutants."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import warm
from mutants import failed_claims
from torch import nn
from torch.nn.parallel import DistributedDataParallel

CODE = Path("chapter3-distributed-training-with-pytorch-ddp/code")
SCRIPT = warm.ROOT / CODE / "gradient_accumulation_no_sync.py"
SMALL = "--width 90 --layers 2 --turns 0 --micro-batches 2 --bucket-mib 0.1"
Run = Callable[..., warm.Result]
script = warm.load("accumulation", SCRIPT)


# --- does the counter see what is sent? --------------------------------------------------------


def loopback_bytes() -> int:
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split()[9]) for line in lines if line.strip().startswith("lo:"))


def observe_traffic() -> list[tuple[int, float, float]]:
    """In a rank, after each of four steps of which two in no_sync: all-reduces, MB by the kernel's
    count of this process's connections, MB over the loopback device by everybody."""
    script = warm.load("accumulation", SCRIPT)
    model = DistributedDataParallel(nn.Linear(1024, 1024, bias=False), bucket_cap_mb=1)
    rows = torch.ones(2, 1024)
    found = []
    for quiet in (False, False, True, False, True, False):
        dist.barrier()
        over_loopback = loopback_bytes()
        dist.barrier()  # nobody sends before all have looked
        sent = script.bytes_on_wire()
        with script.Traffic() as traffic:
            if quiet:
                with model.no_sync():
                    model(rows).sum().backward()
            else:
                model(rows).sum().backward()
        own = (script.bytes_on_wire() - sent) / model.module.weight.nbytes
        dist.barrier()
        everybody = (loopback_bytes() - over_loopback) / model.module.weight.nbytes
        found.append((traffic.count, own, everybody))
    return found[2:]  # two steps to warm up and regroup


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.full)])
def test_counters_agree_with_the_kernel(world_size: int) -> None:
    """What is counted as an all-reduce sends 2(n-1)/n of its bytes; in no_sync nothing is sent."""
    predicted = 2 * (world_size - 1) / world_size
    for found in warm.fork_ranks(observe_traffic, world_size):
        for (count, own, everybody), quiet in zip(found, (True, False, True, False), strict=True):
            assert count == (not quiet)
            assert own == pytest.approx(0 if quiet else predicted, abs=0.02)
            # others may use the loopback device too, so it can only say that as much was sent
            assert everybody >= 0.98 * world_size * predicted * (not quiet)


def test_fastest_steps_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    args = argparse.Namespace(turns=2, micro_batches=4, json=None, strict=True)
    disturbed = torch.tensor([[0.040, 0.022, 0.016], [0.044, 0.090, 0.020]])
    assert script.report_times(args, disturbed) is True
    printed = capsys.readouterr().out
    assert "if all k cost the same: 22.0 ms, seen +0%" in printed
    assert "last only over every time = 0.55 <= 1  ok" in printed
    assert script.report_times(args, disturbed.flip(1)) is False


# --- the script --------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_every_world_size(tmp_path: Path, world_size: int) -> None:
    """A script's own checks are the test: it compares itself with one process."""
    record = tmp_path / "times.json"
    lines = [
        f"{SMALL} --seed 20260101",
        f"{SMALL} --seed 2 --longest 17 --documents 2",
        f"{SMALL} --seed 3 --micro-batches 5",
        f"{SMALL} --seed 4 --turns 1 --json {record}",
    ]
    cases = [(line, "", "") for line in lines]
    assert failed_claims(SCRIPT, world_size, cases) == [set()] * len(lines)
    if world_size > 1:
        assert list(json.loads(record.read_text())) == ["every time", "last only", "never"]


MUTANTS = [
    # micro-batches weigh the same, however many tokens they have
    ("(windows, weight) for", "(windows, 1 / len(windows) / k) for"),
    ("weight = world_size / tokens", "weight = 1 / tokens"),  # DDP divides once more
    ("dist.all_reduce(tokens)", "pass"),
    (
        "*early, last = share\n    with model.no_sync():",
        "*early, last = share\n    if True:",
    ),
    # the last micro-batch's gradient only
    (
        "in early:\n            weighted_loss(model, *micro_batch).backward()",
        "in early:\n            weighted_loss(model, *micro_batch)",
    ),
    # the trap is gone: forward moved into the context
    (
        "        loss = weighted_loss(model, *micro_batch)\n        with model.no_sync():\n"
        "            loss.backward()",
        "        with model.no_sync():\n            weighted_loss(model, *micro_batch).backward()",
    ),
    ("        every_time(model, share)", "        pass\n    every_time(model, share)"),
    ("times * size * 2 * (world_size", "times * size * (world_size"),
]


@pytest.mark.full
def test_mutants_are_caught() -> None:
    found = failed_claims(SCRIPT, 2, [(SMALL, *mutant) for mutant in MUTANTS])
    assert [mutant for mutant, failed in zip(MUTANTS, found, strict=True) if not failed] == []


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.full
def test_one_micro_batch_accumulates_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--micro-batches", "1"])
    with pytest.raises(SystemExit) as end:
        script.parse_args()
    assert end.value.code == 2
    assert "type 2 or more" in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("no-such-file", "give a text file with --data FILE"),
        (f"{CODE}/golden.json", "paragraphs of 5: give a longer --data FILE"),
    ],
)
def test_texts_that_are_too_short(run: Run, data: str, says: str) -> None:
    """Each rank says the one line; none hangs, none prints a traceback."""
    result = run(f"torchrun --nproc_per_node=2 {SCRIPT} {SMALL} --data {data}")
    assert result.returncode == 1
    assert {says in line for line in result.stderr.splitlines()} == {True}, result.stderr
