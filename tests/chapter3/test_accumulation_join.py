"""Gradient accumulation and uneven inputs: other sizes, seeds, bad input, real traffic, mutants."""

import time
from collections.abc import Callable
from pathlib import Path

import book
import checks
import pytest
import torch
import torch.distributed as dist
import warm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

CODE = Path("chapter3-distributed-training-with-pytorch-ddp/code")
ACCUMULATE = "gradient_accumulation_no_sync.py --data README.md --width 90 --layers 2 --turns 0"
SMALL = f"{ACCUMULATE} --micro-batches 2 --bucket-mib 0.1"
SCRIPT = "ddp_uneven_inputs_join.py"
JOIN = f"{SCRIPT} --timeout 0.2"
Run = Callable[..., warm.Result]


def torchrun(world_size: int, line: str) -> str:
    return f"torchrun --nproc_per_node={world_size} {CODE}/{line}"


@pytest.mark.parametrize(
    ("world_size", "line"),
    [
        (1, f"{SMALL} --seed 1"),
        (2, f"{SMALL} --seed 2 --longest 17 --documents 2"),
        (2, f"{ACCUMULATE} --micro-batches 5 --bucket-mib 0.03"),
        (3, f"{SMALL} --seed 3"),
        (4, f"{SMALL} --seed 4 --longest 30"),
        (2, f"{JOIN} --seed 1 --steps 5"),
        (3, f"{JOIN} --seed 2 --steps 7"),
        (4, f"{JOIN} --seed 3"),
    ],
)
def test_every_world_size(run: Run, world_size: int, line: str) -> None:
    """A script's own checks are the test: it compares itself with one process."""
    command = torchrun(world_size, line)
    parsed, result = book.parse_command(command), run(command)
    problems = checks.evidence(parsed, result)
    assert not problems, checks.report(parsed, result, problems)
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (SMALL, "torchrun --nproc_per_node=2"),
        (JOIN, "torchrun --nproc_per_node=2"),
        (f"{ACCUMULATE} --micro-batches 1", "type 2 or more"),
        (f"{ACCUMULATE} --micro-batches 0", "--micro-batches"),
        (f"{ACCUMULATE} --bucket-mib -1", "--bucket-mib"),
        (f"{ACCUMULATE} --turns -1", "--turns"),
        (f"{ACCUMULATE} --json no-such-folder/x.json", "no-such-folder"),
        (f"{JOIN} --steps 4", "type 5 or more"),
        (f"{JOIN} --steps many", "--steps"),
        (f"{JOIN} --timeout 0", "--timeout"),
        (f"{JOIN} --timeout nan", "--timeout"),
    ],
)
def test_bad_input_gets_one_line(run: Run, line: str, says: str) -> None:
    result = run(f"python {CODE}/{line}")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    assert says in result.stderr


@pytest.mark.parametrize(
    ("world_size", "line", "says"),
    [
        (2, f"{SMALL} --data no-such-file", "give a text file with --data FILE"),
        (2, f"{SMALL} --data /dev/null", "has 0 paragraphs of 5"),
        (2, f"{JOIN} --device abacus", "2 ranks, but 0 abacus devices: type --device cpu"),
        (1, JOIN, "type  torchrun --nproc_per_node=2"),
    ],
)
def test_bad_input_to_several_ranks(run: Run, world_size: int, line: str, says: str) -> None:
    """Each rank says the one line; none hangs, none prints a traceback."""
    result = run(torchrun(world_size, line), timeout=30)
    assert result.returncode not in (0, warm.TIMED_OUT)
    assert {says in line for line in result.stderr.splitlines()} == {True}, result.stderr


@pytest.mark.parametrize(
    ("line", "right", "wrong"),
    [
        # micro-batches weigh the same, however many tokens they have
        (SMALL, "n / tokens.item()) for", "1 / len(windows) / k) for"),
        (SMALL, "n / tokens.item()) for", "1 / tokens.item()) for"),  # DDP divides once more
        (SMALL, "dist.all_reduce(tokens)", "pass"),
        (SMALL, "*early, last = share\n    with model.no_sync():",
         "*early, last = share\n    if True:"),
        # the last micro-batch's gradient only
        (SMALL, "in early:\n            weighted_loss(model, *micro_batch).backward()",
         "in early:\n            weighted_loss(model, *micro_batch)"),
        # the trap is gone: forward moved into the context
        (SMALL, "        loss = weighted_loss(model, *micro_batch)\n        with model.no_sync():\n"
         "            loss.backward()",
         "        with model.no_sync():\n            weighted_loss(model, *micro_batch).backward()"),
        (SMALL, "        every_time(model, share)", "        pass\n    every_time(model, share)"),
        (SMALL, "self.count += operator", "self.count += 0 and operator"),
        (SMALL, "times * size * 2 * (n - 1) / n", "times * size * (n - 1) / n"),
        (JOIN, "with Join([model], **options):", "with Join([model]):"),
        (JOIN, "self.count += operator", "self.count += 0 and operator"),
        (JOIN, ".mean() for rows in batches) / len(batches)",
         ".mean() for rows in batches) / dist.get_world_size()"),
        (JOIN, "weight = present * dist", "weight = dist"),  # the borrowed row counts
        (JOIN, "dist.all_reduce(total)", "pass"),
        (JOIN, "dist.get_world_size() / total", "1.0 / total"),  # a mean of a sum
        (JOIN, "plain(model, optimizer, batches[shortest:])", "pass"),  # nobody has to wait
    ],
)  # fmt: skip
def test_mutants_are_caught(run: Run, checkout: Path, line: str, right: str, wrong: str) -> None:
    """Break the script: its own checks must see it, and its exit code must say so."""
    name, _, flags = line.partition(" ")
    source = (checkout / CODE / name).read_text()
    assert source.count(right) == 1
    mutant = checkout / CODE / f"mutant_{name}"
    mutant.write_text(source.replace(right, wrong))
    result = run(torchrun(2, f"{mutant.name} {flags}"), timeout=40)
    mutant.unlink()
    assert result.returncode not in (0, warm.TIMED_OUT), result.stdout
    assert "FAILED" in result.stdout, result.stderr


def test_join_left_out(run: Run, checkout: Path) -> None:
    """The ranks' collectives no longer match: the run stops or hangs, and must not pass."""
    source = (checkout / CODE / SCRIPT).read_text()
    right = "with Join([model], **options):"
    assert source.count(right) == 1
    mutant = checkout / CODE / f"mutant_{SCRIPT}"
    mutant.write_text(source.replace(right, "if True:"))
    result = run(torchrun(2, f"{mutant.name} --timeout 0.2"), timeout=8)
    mutant.unlink()
    assert "batches by rank" in result.stdout, result.stderr
    assert result.returncode != 0, result.stdout


# --- does the counter see what is sent? --------------------------------------------------------


def loopback_bytes() -> int:
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split()[9]) for line in lines if line.strip().startswith("lo:"))


def observe_traffic(name: str, path: str) -> list[tuple[int, float, float]]:
    """In a rank, after each of four steps of which two in no_sync: all-reduces, MB by the kernel's
    count of this process's connections, MB over the loopback device by everybody."""
    script = warm.load(name, path)
    model = DistributedDataParallel(nn.Linear(1024, 1024, bias=False), bucket_cap_mb=1)
    rows, found = torch.ones(2, 1024), []
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


@pytest.mark.parametrize("world_size", [2, 3])
def test_counters_agree_with_the_kernel(world_size: int) -> None:
    """What is counted as an all-reduce sends 2(n-1)/n of its bytes; in no_sync nothing is sent."""
    path = str(warm.ROOT / CODE / "gradient_accumulation_no_sync.py")
    by_rank = warm.fork_ranks(observe_traffic, world_size, "accumulation", path)
    predicted = 2 * (world_size - 1) / world_size
    for found in by_rank:
        for (count, own, everybody), quiet in zip(found, (True, False, True, False), strict=True):
            assert count == (not quiet)
            assert own == pytest.approx(0 if quiet else predicted, abs=0.02)
            # others may use the loopback device too, so it can only say that as much was sent
            assert everybody >= 0.98 * world_size * predicted * (not quiet)


def race_of_sleepers() -> list[list[float]]:
    """In a rank: the three methods' times where each takes one that is known."""
    script = warm.load("accumulation", warm.ROOT / CODE / "gradient_accumulation_no_sync.py")
    for name, late in {"every_time": 0.06, "last_only": 0.03, "last_inside": 0.0}.items():
        setattr(script, name, lambda *_, late=late: time.sleep(late * (1 + dist.get_rank())))
    model = DistributedDataParallel(nn.Linear(2, 2))
    return script.race(model, [], turns=2).tolist()


def test_race_times_the_slowest_rank() -> None:
    for turns in warm.fork_ranks(race_of_sleepers, 2):
        for every, last, never in turns:
            assert every >= 0.12
            assert 0.06 <= last < every
            assert never < last


@pytest.mark.parametrize(
    ("turns", "over"),
    [
        ([[4, 2, 1], [6, 3, 1]], 0.5),
        ([[4, 2, 1], [4, 2, 1], [4, 9, 1]], 0.5),  # one turn was disturbed
        ([[4, 8, 1], [4, 8, 1], [2, 1, 1]], 0.5),  # the fastest is taken of each
        ([[2, 4, 1], [3, 6, 1]], 2),
    ],
)
def test_ratio_of_times(turns: list[list[float]], over: float) -> None:
    script = warm.load("accumulation", warm.ROOT / CODE / "gradient_accumulation_no_sync.py")
    assert script.ratio([torch.tensor(turn, dtype=torch.float64) for turn in turns]) == over


def test_json(run: Run, tmp_path: Path) -> None:
    record = tmp_path / "accumulation.json"
    result = run(torchrun(2, f"{SMALL} --width 400 --turns 2 --json {record}"))
    assert result.returncode == 0, result.stderr
    assert '"last only"' in record.read_text()
