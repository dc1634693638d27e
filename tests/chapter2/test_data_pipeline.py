"""Data and pipeline parallelism: other world sizes, seeds, dtypes, uneven sizes; faults; schedules."""

import functools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import book
import checks
import pytest
import warm
from hypothesis import given, settings
from hypothesis import strategies as st

CODE = Path("chapter2-gpu-hardware-networking-and-parallelism-strategies/code")
Run = Callable[..., warm.Result]
DATA = "data_parallel_from_scratch.py --data README.md --steps 3 --width 33 --layers 2"
PIPELINE = "pipeline_parallel_from_scratch.py --pace 0 --repeats 1 --width 12 --seq 5"


def torchrun(world_size: int, line: str) -> str:
    return f"torchrun --nproc_per_node={world_size} {CODE}/{line}"


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "line",
    [
        f"{DATA} --batch 7 --seed 1",
        f"{DATA} --batch 2 --seed 2 --dtype float64",  # a rank of three has no window at all
        f"{DATA} --batch 9 --dtype bfloat16",
        f"{PIPELINE} --batch 13 --micro-batches 4 1 13 --seed 1",
        f"{PIPELINE} --batch 8 --micro-batches 2 3 --layers 4 --seed 2 --dtype bfloat16",
    ],
)
def test_every_world_size(run: Run, line: str, world_size: int) -> None:
    """A script's own checks are the test: it compares itself with one process."""
    command = torchrun(world_size, line)
    result = run(command)
    parsed = book.parse_command(command)
    problems = checks.evidence(parsed, result)
    assert not problems, checks.report(parsed, result, problems)
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (DATA, "torchrun --nproc_per_node=2"),
        (PIPELINE, "torchrun --nproc_per_node=2"),
        (f"{DATA} --batch 0", "--batch"),
        (f"{DATA} --dtype int8", "--dtype"),
        (f"{DATA} --json no-such-folder/x.json", "no-such-folder"),
        (f"{PIPELINE} --micro-batches 0", "--micro-batches"),
        (f"{PIPELINE} --batch 3 --micro-batches 2 4", "type --batch 4 or more"),
        (f"{PIPELINE} --pace -1", "milliseconds"),
        (f"{PIPELINE} --pace nan", "milliseconds"),
        (f"{PIPELINE} --plot /dev/null/x.svg", "/dev/null/x.svg"),
        (f"{PIPELINE} --dtype float16", "--dtype"),
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
        (f"{DATA} --data no-such-file", "give a text file with --data FILE"),
        (f"{DATA} --device abacus", "2 ranks, but 0 abacus devices: type --device cpu"),
        (f"{PIPELINE} --layers 1", "type --layers 2 or more"),
    ],
)
def test_bad_input_to_several_ranks(run: Run, line: str, says: str) -> None:
    """Each rank says the one line; none hangs, none prints a traceback."""
    result = run(torchrun(2, line), timeout=30)
    assert result.returncode not in (0, warm.TIMED_OUT)
    assert {says in line for line in result.stderr.splitlines()} == {True}, result.stderr


UNEVEN = f"{PIPELINE} --batch 7 --micro-batches 4"


@pytest.mark.parametrize(
    ("line", "right", "wrong"),
    [
        # a sum for a mean: AdamW all but hides it, the gradient does not
        (DATA, 'reduction="sum") / batch', 'reduction="sum") / len(tokens)'),
        # the mean of the shares' means, though one has 4 windows and the other 3
        (f"{DATA} --batch 7", 'F.cross_entropy(x, targets, reduction="sum") / batch',
         "F.cross_entropy(x, targets) / dist.get_world_size()"),
        (DATA, "dist.all_reduce(gradient)", "pass"),
        # one unit's gradient stays what this rank found
        (DATA, "dist.reduce_scatter(total, shards)", "dist.reduce_scatter(total, shards) "
         "if unit is not self.units[1] else total.copy_(shards[rank])"),
        # each rank goes on with what it updated itself
        (DATA, "for unit in self.units if self.shard_state and not self.shard_weights else ():",
         "for unit in ():"),
        # NaN is no small error
        (DATA, "gradient = torch.zeros_like(unit.flat)", "gradient = unit.flat * math.nan"),
        (DATA, "parameter.grad = None", "pass"),  # ZeRO-2 in name only
        # weights that are never given back while the forward pass goes on
        (DATA, "            x = passed[-1][1]\n            if self.shard_weights:\n"
         "                unit.free()\n", "            x = passed[-1][1]\n"),
        # every micro-batch forgets the ones before
        (UNEVEN, "x, y, _ = stash.pop(i)", "x, y, _ = stash.pop(i); model.zero_grad()"),
        # micro-batches of 2, 2, 2 and 1 weigh the same
        (UNEVEN, 'targets[i].flatten(), reduction="sum") / count',
         "targets[i].flatten()) / len(targets)"),
        (UNEVEN, "out = x.grad\n", "out = x.grad if rank == 0 else torch.zeros_like(x)\n"),
        (UNEVEN, "warm_up = min(stages - stage - 1, micro_batches)",
         "warm_up = min(stages - stage, micro_batches)"),
        # GPipe under the name of 1F1B
        (UNEVEN, 'if name == "1F1B":', 'if name == "no such schedule":'),
        (UNEVEN, 'step["sent"] += out.nbytes', 'step["sent"] += out.numel()'),
        # the next micro-batch begins when the last has come back
        (f"{UNEVEN} --pace 3", "order = schedule(name, rank, p, m)",
         'order = [(kind, i) for i in range(m) for kind in "FB"]'),
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


def test_plot_and_json(run: Run, checkout: Path, tmp_path: Path) -> None:
    picture, record = tmp_path / "pipeline.svg", tmp_path / "pipeline.json"
    result = run(torchrun(3, f"{UNEVEN} --plot {picture} --json {record}"))
    assert result.returncode == 0, result.stderr
    assert not checks.drawn(picture)
    assert '"1F1B"' in record.read_text()


# --- the schedules alone -----------------------------------------------------------------------


@functools.cache
def pipeline() -> ModuleType:
    return warm.load("pipeline", warm.ROOT / CODE / "pipeline_parallel_from_scratch.py")


def simulate(orders: list[list[tuple[str, int]]], cost: dict[str, int]) -> int:
    """Time at which the last stage ends, where messages take no time; a deadlock is an error."""
    last, done = len(orders) - 1, dict[tuple[int, str, int], int]()
    clock, cursor = [0] * len(orders), [0] * len(orders)
    while any(at < len(order) for at, order in zip(cursor, orders, strict=True)):
        moved = False
        for stage, order in enumerate(orders):
            while cursor[stage] < len(order):
                kind, i = order[cursor[stage]]
                source = stage - 1 if kind == "F" else stage + 1
                ready = done.get((source, kind, i)) if 0 <= source <= last else 0
                if kind == "B" and stage == last:
                    ready = done.get((stage, "F", i))
                if ready is None:
                    break
                clock[stage] = max(clock[stage], ready) + cost[kind]
                done[stage, kind, i] = clock[stage]
                cursor[stage] += 1
                moved = True
        assert moved, "deadlock"
    return max(clock)


@given(
    name=st.sampled_from(["GPipe", "1F1B"]),
    stages=st.integers(1, 9),
    micro_batches=st.integers(1, 20),
    forward=st.integers(1, 5),
    backward=st.integers(1, 9),
)
@settings(max_examples=60, deadline=None)
def test_schedule(name: str, stages: int, micro_batches: int, forward: int, backward: int) -> None:
    """Each pass once and in order, few enough in flight, and the step as long as predicted."""
    orders = [pipeline().schedule(name, s, stages, micro_batches) for s in range(stages)]
    for stage, order in enumerate(orders):
        for kind in "FB":
            assert [i for k, i in order if k == kind] == list(range(micro_batches))
        assert all(order.index(("F", i)) < order.index(("B", i)) for i in range(micro_batches))
        levels = [sum(1 if k == "F" else -1 for k, _ in order[: n + 1]) for n in range(len(order))]
        most = micro_batches if name == "GPipe" else min(micro_batches, stages - stage)
        assert max(levels) == most
    steps = micro_batches + stages - 1
    assert simulate(orders, {"F": forward, "B": backward}) == steps * (forward + backward)
