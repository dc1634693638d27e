"""Chapter 1's scripts of several ranks: at every world size, with bad input, and broken on purpose."""

from collections.abc import Callable
from pathlib import Path

import book
import checks
import pytest
import warm

CODE = Path("chapter1-introduction-to-modern-distributed-ai/code")
Run = Callable[..., warm.Result]
DDP = "ch01_multi_gpu_ddp.py --steps 2 --batch 3 --context 48 --width 24 --layers 1 --heads 3"
INFERENCE = "ch01_distributed_inference.py --requests 7 --longest 20 --repeats 1 --width 16"
SINGLE = (
    "ch01_single_gpu_baseline.py --steps 2",
    "ch01_measure_components.py",
    "ch01_profiling.py",
    "ch01_memory_anatomy.py",
    "ch01_train_vs_serve.py",
)


def torchrun(world_size: int, line: str) -> str:
    return f"torchrun --nproc_per_node={world_size} {CODE}/{line}"


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "line",
    [
        "ch01_collectives.py",
        f"{DDP} --seed 1",
        f"{DDP} --seed 2",
        INFERENCE,
        "ch01_ddp_pitfalls.py --seed 3",
    ],
)
def test_every_world_size(run: Run, line: str, world_size: int) -> None:
    """A script's own checks are the test: it compares itself with one process."""
    command = torchrun(world_size, line)
    result = run(command)
    if world_size == 1 and "pitfalls" in line:
        assert "type  torchrun --nproc_per_node=2" in result.stderr
        assert result.returncode != 0
        return
    parsed = book.parse_command(command)
    problems = checks.evidence(parsed, result)
    assert not problems, checks.report(parsed, result, problems)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (DDP, "torchrun --nproc_per_node=2"),
        (INFERENCE, "torchrun --nproc_per_node=2"),
        ("ch01_collectives.py", "torchrun --nproc_per_node=2"),
        ("ch01_ddp_pitfalls.py", "torchrun --nproc_per_node=2"),
        (f"{DDP} --steps 0", "--steps"),
        ("ch01_collectives.py --op sum", "--op"),
        *((f"{line} --device abacus", "--device") for line in SINGLE),
        *((f"{line} --no-such-flag", "--help") for line in SINGLE),
        ("ch01_single_gpu_baseline.py --data no-such-file", "--data FILE"),
        ("ch01_single_gpu_baseline.py --data /dev/null", "--data FILE"),
        ("ch01_compute_budget.py --params 0 --tokens 1e9", "--params"),
        ("ch01_memory_anatomy.py --plot /dev/null/x.svg", "/dev/null/x.svg"),
    ],
)
def test_bad_input_gets_one_line(run: Run, line: str, says: str) -> None:
    result = run(f"python {CODE}/{line}")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    assert says in result.stderr


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (f"{DDP} --data no-such-file", "give a text file with --data FILE"),
        (f"{DDP} --data /dev/null", "0 bytes"),
        (f"{DDP} --device abacus", "2 ranks, but 0 abacus devices: type --device cpu"),
        (f"{INFERENCE} --heads 3", "--heads 3 does not divide --width 16"),
    ],
)
def test_bad_input_to_several_ranks(run: Run, line: str, says: str) -> None:
    """Each rank says the one line; none hangs, none prints a traceback."""
    result = run(torchrun(2, line), timeout=30)
    assert result.returncode not in (0, warm.TIMED_OUT)
    assert {says in line for line in result.stderr.splitlines()} == {True}, result.stderr


@pytest.mark.parametrize(
    ("line", "right", "wrong"),
    [
        # no gradient is averaged
        (DDP, "ranked = DistributedDataParallel(ranked)", "pass"),
        # the training run itself, not the comparison: every rank goes its own way
        (DDP, "model = DistributedDataParallel(build(args, device))", "model = build(args, device)"),
        # every rank trains on the share of rank 0
        (DDP, "tokens[dist.get_rank()], targets[dist.get_rank()]", "tokens[0], targets[0]"),
        ("ch01_collectives.py", "dist.all_reduce(after.copy_(tensor))", "pass"),
        ("ch01_ddp_pitfalls.py --only epochs", "sampler.set_epoch(1)", "pass"),
        # two ranks draw the same ticket
        (INFERENCE, "store.add(name, 1) - 1", "store.add(f'{name} {dist.get_rank()}', 1) - 1"),
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
    assert result.returncode not in (0, warm.TIMED_OUT)
    assert "FAILED" in result.stdout
