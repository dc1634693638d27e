"""Buckets and overlap: the arithmetic of intervals, traces of GPUs, clocks that differ, mutants."""

import functools
import gzip
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import checks
import pytest
import torch
import torch.distributed as dist
import warm
from hypothesis import given, settings
from hypothesis import strategies as st
from mutants import failed_claims

CODE = Path("chapter3-distributed-training-with-pytorch-ddp/code")
BUCKETS = warm.ROOT / CODE / "ddp_bucketing_overlap.py"
PROFILE = warm.ROOT / CODE / "profile_ddp.py"
# 6 layers of 4 KiB: backward takes 24 ms, the stand-in's link 3 ms a message and 12 ms for all bytes
SIX_LAYERS = "--layers 6 --width 32 --rows 8 --rounds 3 --pace 4 --latency 3 --slow-link 0.002"
ONE_LAYER = "--steps 2 --batch 2 --context 48 --width 24 --layers 1"
Run = Callable[..., warm.Result]
Spans = list[tuple[int, int]]


@functools.cache
def scripts() -> tuple[Any, Any]:
    return warm.load(BUCKETS.stem, BUCKETS), warm.load(PROFILE.stem, PROFILE)


# --- arithmetic --------------------------------------------------------------------------------


def points(spans: Spans) -> set[int]:
    return {moment for begin, end in spans for moment in range(begin, end)}


spans_of_any_kind = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 15)).map(lambda span: (span[0], sum(span))),
    max_size=8,
)


@given(a=spans_of_any_kind, b=spans_of_any_kind, begin=st.integers(0, 30), size=st.integers(1, 30))
@settings(max_examples=200, deadline=None)
def test_intervals(a: Spans, b: Spans, begin: int, size: int) -> None:
    """Against sets of moments, which nobody can count twice."""
    _, script = scripts()
    end = begin + size
    joined, other = script.union(a), script.union(b)
    assert points(joined) == points(a)
    assert script.length(joined) == len(points(a))
    assert all(x[1] < y[0] for x, y in itertools.pairwise(joined))
    assert script.overlap(joined, other) == len(points(a) & points(b))
    window = set(range(begin, end))
    inside = script.clip(a, begin, end)
    assert points(inside) == points(a) & window
    rest = script.gaps(inside, begin, end)
    assert points(rest) == window - points(a)
    in_window = len(points(b) & window)
    assert script.overlap(other, inside) + script.overlap(other, rest) == in_window


@given(
    count=st.integers(1, 40),
    backward=st.floats(0.001, 1),
    alpha=st.floats(0, 0.1),
    transfer=st.floats(0, 1),
)
@settings(max_examples=200, deadline=None)
def test_prediction(count: int, backward: float, alpha: float, transfer: float) -> None:
    """Equal buckets: either all but the last are hidden, or the link is busy from the first on."""
    script, _ = scripts()
    size = 1000
    message = alpha + transfer / count
    step = script.predict([size] * count, (0.5, backward), (alpha, transfer / count / size))
    hidden, busy = backward + message, backward / count + count * message
    assert step == pytest.approx(0.5 + max(hidden, busy))


@given(backward=st.floats(0.02, 1), alpha=st.floats(0.001, 0.02), transfer=st.floats(0.001, 2))
@settings(max_examples=100, deadline=None)
def test_best_number_of_buckets(backward: float, alpha: float, transfer: float) -> None:
    """No whole number of buckets is better than the better of the formula's two neighbours."""
    script, _ = scripts()

    def step(count: int) -> float:  # what test_prediction finds
        busy = backward / count + count * alpha + transfer
        return max(backward + alpha + transfer / count, busy)

    best = script.best_number(1, backward, (alpha, transfer))
    near = min(step(max(1, int(best))), step(int(best) + 1))
    assert near <= min(map(step, range(1, 2 * int(best) + 10))) * (1 + 1e-9)


def event(name: str, begin: float, end: float, cat: str, tid: int) -> dict[str, Any]:
    """As in a trace: in microseconds."""
    times = {"ts": begin, "dur": end - begin}
    return {"ph": "X", "name": name, "cat": cat, "tid": tid, "pid": 0} | times


def gpu_step(late: float = 0.0) -> list[dict[str, Any]]:
    """A step of 100 us: kernels until 60, two all-reduces, each with an NCCL kernel on its stream."""
    return [
        event("step", 0, 100, "user_annotation", 1),
        event("step", 5, 95, "gpu_user_annotation", 7),
        event("aten::mm", 0, 99, "cpu_op", 1),
        event("c10d::allreduce_", 20, 21, "cpu_op", 2),
        event("sgemm", 10 + late, 40 + late, "kernel", 7),
        event("sgemm", 40 + late, 60 + late, "kernel", 7),
        event("ncclDevKernel_AllReduce_Sum_f32_RING_LL(x)", 30 + late, 50 + late, "kernel", 20),
        event("ncclDevKernel_AllReduce_Sum_f32_RING_LL(x)", 60 + late, 90, "kernel", 20),
    ]


def test_traces_of_gpus() -> None:
    """No GPU is needed to read a trace of one: there, only kernels count."""
    _, profile = scripts()
    ranks = [
        profile.read_timeline(gpu_step(late), torch.device("cuda", i))
        for i, late in enumerate((0.0, 15.0))
    ]
    ((early, late),) = profile.account(ranks)
    assert (early["step"], early["compute"], early["hidden"]) == (100_000, 50_000, 20_000)
    # rank 0 waits for rank 1 from 60 to 75; from 30 to 45 it waits too, but has work to do
    assert early["waits"] == [0, 15_000]
    assert late["waits"] == [0, 0]
    assert (early["exposed"], early["idle"]) == (30_000, 20_000)
    assert (late["exposed"], late["idle"]) == (15_000, 35_000)


def test_who_is_waited_for() -> None:
    """Three ranks, two all-reduces: a different one is last in each."""
    _, profile = scripts()
    calls = ([10, 60], [30, 50], [20, 80])  # ends at 40 and 90
    ranks = [
        {
            "steps": [(0, 100)],
            "works": [(0, begin), (40, second)],
            "sends": [(begin, 40), (second, 90)],
        }
        for begin, second in calls
    ]
    ((a, b, c),) = profile.account(ranks)
    assert [rank["waits"] for rank in (a, b, c)] == [[0, 20, 20], [0, 0, 30], [0, 10, 0]]
    assert [rank["compute"] + rank["exposed"] + rank["idle"] for rank in (a, b, c)] == [100] * 3


# --- clocks ------------------------------------------------------------------------------------

AHEAD = 80_000_000  # ns by which each rank's clock is ahead of that of the rank before it


def offset_of_skewed_clock() -> tuple[int, int]:
    _, profile = scripts()
    profile.now = lambda: time.time_ns() + AHEAD * dist.get_rank()
    offset, doubt = profile.clock_offset(dist.group.WORLD)
    return offset - AHEAD * dist.get_rank(), doubt


def test_pings_find_the_offset() -> None:
    """As exactly as they say, however slow the machine is."""
    for error, doubt in warm.fork_ranks(offset_of_skewed_clock, 3):
        assert abs(error) <= doubt + 1


def run_on_skewed_clocks(out: str) -> list[tuple[str, bool]]:
    """In a rank: whether all checks hold where the profiler's clocks differ, with and without pings."""
    _, profile = scripts()
    ahead = AHEAD * dist.get_rank()

    def loads(text: bytes) -> dict[str, Any]:
        trace = json.loads(text)
        return trace | {"baseTimeNanoseconds": trace["baseTimeNanoseconds"] + ahead}

    profile.json = SimpleNamespace(loads=loads, dumps=json.dumps)
    profile.say = lambda line: None
    profile.sys.argv[:] = ["x", *ONE_LAYER.split(), "--out", out]
    found = []
    for what, late in (("measured", ahead), ("taken for equal", 0)):
        profile.now = lambda late=late: time.time_ns() + late
        claims = profile.run(profile.parse_args(), torch.device("cpu"))
        found.append((what, False not in claims))
    return found


@pytest.mark.full
def test_clocks_that_differ(tmp_path: Path) -> None:
    """Where they are taken for equal, an all-reduce ends before the last rank has called it."""
    for found in warm.fork_ranks(run_on_skewed_clocks, 2, str(tmp_path)):
        assert found == [("measured", True), ("taken for equal", False)]


# --- the scripts -------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_every_world_size(tmp_path: Path, world_size: int) -> None:
    """A script's own checks are the test."""
    flags = f"{SIX_LAYERS} --bucket-kib 4 10 24"
    cases = [(f"{flags} --seed 20260101", "", ""), (f"{flags} --real", "", "")]
    assert failed_claims(BUCKETS, world_size, cases) == [set(), set()]
    flags = f"{ONE_LAYER} --out {tmp_path}"
    cases = [(f"{flags} --seed 20260101", "", ""), (f"{flags} --straggler 0 25", "", "")]
    assert failed_claims(PROFILE, world_size, cases) == [set(), set()]


MUTANTS = {
    BUCKETS: [
        # the first bucket stays what this rank found
        (
            "return link.average(bucket.buffer())",
            "return link.average(bucket.buffer()) if bucket.index() else noop_hook(None, bucket)",
        ),
        ("tensor.div_(dist.get_world_size())", "tensor"),  # a sum for a mean
        ("order.append(bucket.index())", "order.insert(0, bucket.index())"),  # the last one first
    ],
    PROFILE: [
        # an operator within an operator counts twice
        ("joined[-1] = joined[-1][0], max(end, joined[-1][1])", "joined.append((begin, end))"),
        # computing in an all-reduce is taken for waiting, and waiting for nothing
        ("free = gaps(computes, *step)", "free = computes"),
        # a sleeper computes
        ('e["cat"] == "cpu_op" and', 'e["cat"] in ("cpu_op", "user_annotation") and'),
    ],
}


@pytest.mark.full
def test_mutants_are_caught(tmp_path: Path) -> None:
    for script, flags in (
        (BUCKETS, f"{SIX_LAYERS} --bucket-kib 4 10"),
        (PROFILE, f"{ONE_LAYER} --straggler 1 25 --out {tmp_path}"),
    ):
        found = failed_claims(script, 2, [(flags, *mutant) for mutant in MUTANTS[script]])
        assert all(found), list(zip(MUTANTS[script], found, strict=True))


@pytest.mark.full
def test_merged_trace(run: Run, tmp_path: Path) -> None:
    """One file with all that the ranks' files have, the ranks as processes; the table as JSON."""
    out, table, picture = tmp_path / "traces", tmp_path / "table.json", tmp_path / "step.svg"
    flags = f"{ONE_LAYER} --out {out} --json {table} --plot {picture}"
    result = run(f"torchrun --nproc_per_node=3 {CODE}/{PROFILE.name} {flags}")
    assert result.returncode == 0, result.stdout + result.stderr
    assert not checks.drawn(picture)
    names = ["merged.json.gz", "rank0.json.gz", "rank1.json.gz", "rank2.json.gz"]
    assert sorted(path.name for path in out.iterdir()) == names
    merged, *ranks = (
        json.loads(gzip.decompress((out / name).read_bytes()))["traceEvents"] for name in names
    )
    assert all({"ph", "ts", "pid", "tid", "name"} <= event.keys() for event in merged)
    labels = {e["pid"]: e["args"]["name"] for e in merged if e["name"] == "process_name"}
    assert labels == {0: "rank 0", 1: "rank 1", 2: "rank 2"}
    assert min(event["ts"] for event in merged) == 0
    for rank, events in enumerate(ranks):
        of_rank = [event for event in merged if event["pid"] == rank]
        for phase in "sf":
            assert sum(e["ph"] == phase for e in of_rank) == sum(e["ph"] == phase for e in events)
        spans = sorted(
            (e["name"], e["dur"]) for e in events if e["ph"] == "X" and e["cat"] != "Trace"
        )
        assert spans == sorted((e["name"], e["dur"]) for e in of_rank if e["ph"] == "X")
        named = {event["tid"] for event in of_rank if event["name"] == "thread_name"}
        assert {event["tid"] for event in of_rank if event["ph"] == "X"} <= named
    arrows = [event["id"] for event in merged if event["ph"] == "s"]
    assert len(arrows) == len(set(arrows))
    assert [len(row) for row in json.loads(table.read_text())["table"]] == [3, 3]


@pytest.mark.full
def test_record_of_the_buckets(tmp_path: Path) -> None:
    record, picture = tmp_path / "buckets.json", tmp_path / "buckets.svg"
    flags = f"{SIX_LAYERS} --bucket-kib 4 10 24 --json {record} --plot {picture}"
    assert failed_claims(BUCKETS, 2, [(flags, "", "")]) == [set()]
    assert not checks.drawn(picture)
    sizes = json.loads(record.read_text())["sizes"].values()
    assert [len(size["buckets"]) for size in sizes] == [6, 2, 1]  # 10 KiB are full at 12
    for size in sizes:
        for step in size["steps"]:
            assert step["hidden"] + step["exposed"] == step["communication"]
            assert step["exposed"] >= 3_000_000, "the last bucket takes 3 ms, and nothing hides it"
            assert step["compute"] >= 6 * 4_000_000, "six layers sleep for 4 ms each"


@pytest.mark.full
def test_a_straggler_that_is_not_there(run: Run) -> None:
    result = run(f"torchrun --nproc_per_node=2 {CODE}/{PROFILE.name} --straggler 2 10")
    assert result.returncode == 1
    assert {"type a rank below 2" in line for line in result.stderr.splitlines()} == {True}
