"""Pipeline parallelism: the schedules; other world sizes, seeds, dtypes, uneven sizes; broken code."""

from pathlib import Path

import checks
import pytest
import warm
from hypothesis import given, settings
from hypothesis import strategies as st
from mutants import failed_claims

CODE = warm.ROOT / "chapter2-gpu-hardware-networking-and-parallelism-strategies/code"
PIPELINE = CODE / "pipeline_parallel_from_scratch.py"
FLAGS = "--pace 0 --repeats 1 --width 12 --seq 5"
UNEVEN = f"{FLAGS} --batch 7 --micro-batches 4"


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
    schedule = warm.load(PIPELINE.stem, PIPELINE).schedule
    orders = [schedule(name, stage, stages, micro_batches) for stage in range(stages)]
    for stage, order in enumerate(orders):
        for kind in "FB":
            assert [i for k, i in order if k == kind] == list(range(micro_batches))
        assert all(order.index(("F", i)) < order.index(("B", i)) for i in range(micro_batches))
        levels = [sum(1 if k == "F" else -1 for k, _ in order[: n + 1]) for n in range(len(order))]
        most = micro_batches if name == "GPipe" else min(micro_batches, stages - stage)
        assert max(levels) == most
    steps = micro_batches + stages - 1
    assert simulate(orders, {"F": forward, "B": backward}) == steps * (forward + backward)


@pytest.mark.full
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_world_size(world_size: int) -> None:
    """The script's own checks are the test: it compares itself with one process."""
    variants = (
        "--batch 13 --micro-batches 4 1 13 --seed 20260101",
        "--batch 8 --micro-batches 2 3 --layers 4 --seed 2 --dtype bfloat16",
    )
    cases = [(f"{FLAGS} {more}", "", "") for more in variants]
    assert failed_claims(PIPELINE, world_size, cases) == [set()] * len(cases)


@pytest.mark.full
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--batch 3 --micro-batches 2 4", "--batch 3 for 4 micro-batches: type --batch 4 or more"),
        ("--layers 1", "--layers 1 for 2 stages: type --layers 2 or more"),
    ],
)
def test_refusals(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: str, says: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("sys.argv", [str(PIPELINE), *flags.split()])
    with pytest.raises(SystemExit) as ended:
        warm.load(PIPELINE.stem, PIPELINE).parse_args()
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"{says}\n"


MUTANTS = [
    # every micro-batch forgets the ones before
    ("x, y, _ = stash.pop(i)", "x, y, _ = stash.pop(i); model.zero_grad()"),
    # micro-batches of 2, 2, 2 and 1 weigh the same
    ('targets[i].flatten(), reduction="sum") / count', "targets[i].flatten()) / len(targets)"),
    # no gradient reaches the stage before
    ("out = x.grad\n", "out = x.grad if rank == 0 else torch.zeros_like(x)\n"),
    ("warm_up = min(stages - stage - 1, micro_batches)",
     "warm_up = min(stages - stage, micro_batches)"),
    # GPipe under the name of 1F1B
    ('if name == "1F1B":', 'if name == "no such schedule":'),
    # the next micro-batch begins when the last has come back
    ("order = schedule(name, rank, p, m)",
     'order = [(kind, i) for i in range(m) for kind in "FB"]'),
]  # fmt: skip


@pytest.mark.full
def test_mutants_are_caught() -> None:
    """Break the script: its own checks must see it."""
    cases = [(UNEVEN, right, wrong) for right, wrong in MUTANTS]
    for mutant, failed in zip(MUTANTS, failed_claims(PIPELINE, 2, cases), strict=True):
        assert failed, mutant


@pytest.mark.full
def test_plot_and_json(tmp_path: Path) -> None:
    picture, record = tmp_path / "pipeline.svg", tmp_path / "pipeline.json"
    assert not any(
        failed_claims(PIPELINE, 3, [(f"{UNEVEN} --plot {picture} --json {record}", "", "")])
    )
    assert not checks.drawn(picture)
    assert '"1F1B"' in record.read_text()
