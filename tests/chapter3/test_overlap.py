"""Buckets and overlap: the arithmetic of intervals, other world sizes, traces of GPUs, broken scripts."""

import functools
import gzip
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import book
import checks
import pytest
import torch
import warm
from hypothesis import given, settings
from hypothesis import strategies as st

CODE = Path("chapter3-distributed-training-with-pytorch-ddp/code")
Run = Callable[..., warm.Result]
Spans = list[tuple[int, int]]
# 6 layers of 4 KiB: backward takes 24 ms, the stand-in's link 3 ms a message and 12 ms for all bytes
BUCKETS = (
    "ddp_bucketing_overlap.py --layers 6 --width 32 --rows 8 --bucket-kib 4 10 24"
    " --rounds 3 --pace 4 --latency 3 --slow-link 0.002"
)
PROFILE = (
    "profile_ddp.py --steps 2 --cycles 1 --batch 2 --context 48 --width 24 --layers 1 --heads 3"
)
PROFILE += " --data README.md"  # a fixed text


def torchrun(world_size: int, line: str) -> str:
    return f"torchrun --nproc_per_node={world_size} {CODE}/{line}"


@pytest.mark.parametrize(
    ("world_size", "line"),
    [
        *((n, f"{BUCKETS} --seed {n}") for n in (1, 3, 4)),
        (2, f"{BUCKETS} --slow-link 0"),  # the real link alone
        *((n, f"{PROFILE} --seed {n}") for n in (1, 4)),
        (2, f"{PROFILE} --straggler 0 25"),
        (3, f"{PROFILE} --straggler 1 25 --cycles 2"),
    ],
)
def test_every_world_size(run: Run, line: str, world_size: int) -> None:
    """A script's own checks are the test: it compares itself with one process."""
    command = torchrun(world_size, line)
    result = run(command)
    parsed = book.parse_command(command)
    problems = checks.evidence(parsed, result)
    assert not problems, checks.report(parsed, result, problems)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (BUCKETS, "torchrun --nproc_per_node=2"),
        (PROFILE, "torchrun --nproc_per_node=2"),
        (f"{BUCKETS} --bucket-kib 0", "--bucket-kib"),
        (f"{BUCKETS} --latency -1", "--latency"),
        (f"{BUCKETS} --slow-link nan", "--slow-link"),
        (f"{BUCKETS} --plot /dev/null/x.svg", "/dev/null/x.svg"),
        (f"{PROFILE} --straggler 2 10", "a rank below 2"),
        (f"{PROFILE} --straggler 0.5 10", "a rank below 2"),
        (f"{PROFILE} --straggler 1 0", "more than 0 ms"),
        (f"{PROFILE} --out /dev/null/x", "/dev/null/x"),
        (f"{PROFILE} --json no-such-folder/x.json", "no-such-folder"),
        (f"{PROFILE} --width 25", "--heads 3"),
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
        (1, f"{PROFILE} --straggler 0 10", "nobody would wait"),
        (2, f"{PROFILE} --data no-such-file", "give a text file with --data FILE"),
        (2, f"{BUCKETS} --device abacus", "2 ranks, but 0 abacus devices: type --device cpu"),
    ],
)
def test_bad_input_to_several_ranks(run: Run, world_size: int, line: str, says: str) -> None:
    """Each rank says the one line; none hangs, none prints a traceback."""
    result = run(torchrun(world_size, line), timeout=30)
    assert result.returncode not in (0, warm.TIMED_OUT)
    assert {says in line for line in result.stderr.splitlines()} == {True}, result.stderr


def run_changed(run: Run, checkout: Path, line: str, *changes: tuple[str, str]) -> warm.Result:
    """Run a script of two ranks after some changes to its text."""
    name, _, flags = line.partition(" ")
    source = (checkout / CODE / name).read_text()
    for right, wrong in changes:
        assert source.count(right) == 1, right
        source = source.replace(right, wrong)
    mutant = checkout / CODE / f"mutant_{name}"
    mutant.write_text(source)
    result = run(torchrun(2, f"{mutant.name} {flags}"), timeout=40)
    mutant.unlink()
    return result


REAL = f"{BUCKETS} --slow-link 0"
LATE = f"{PROFILE} --straggler 1 25"


@pytest.mark.parametrize(
    ("line", "right", "wrong", "fails"),
    [
        # the first bucket stays what this rank found
        (REAL, "return link.average(bucket.buffer())",
         "return link.average(bucket.buffer()) if bucket.index() else noop_hook(None, bucket)",
         "gradient at any size"),
        # a sum for a mean
        (REAL, "tensor.div_(dist.get_world_size())", "tensor", "gradient at any size"),
        # an all-reduce that the trace's reader loses
        (REAL, "sends = list(zip(calls, ends, strict=True))", "sends = list(zip(calls, ends))[1:]",
         "all-reduces in the traces"),
        # an operator within an operator counts twice
        (REAL, "joined[-1] = joined[-1][0], max(end, joined[-1][1])", "joined.append((begin, end))",
         "hidden + exposed"),
        # backward goes on only when the bucket has arrived
        (BUCKETS, "return link.average(bucket.buffer())",
         "sent = link.average(bucket.buffer()); sent.wait(); return sent", "predicted step"),
        # buckets that are sent before there is a gradient in them
        (BUCKETS, "gone = max(gone, ready) +", "gone = gone +", "predicted step"),
        (PROFILE, "joined[-1] = joined[-1][0], max(end, joined[-1][1])",
         "joined.append((begin, end))", "compute + exposed + idle"),
        # the first to call is blamed, not the last
        (LATE, "waits[call.index(max(call))]", "waits[call.index(min(call))]", "rank found late"),
        # computing in an all-reduce is taken for waiting, and waiting for nothing
        (LATE, "free = gaps(core, *step)", "free = core", "compute + exposed + idle"),
        (PROFILE, '{"name": f"rank {rank}"}', '{"name": "rank"}', "merged.json.gz"),
        (PROFILE, 'event["ts"] + shift / 1e3', 'event["ts"] / 2', "off the loop's clock"),
    ],
)  # fmt: skip
def test_mutants_are_caught(
    run: Run, checkout: Path, line: str, right: str, wrong: str, fails: str
) -> None:
    """Break the script: its own checks must see it, and its exit code must say so."""
    result = run_changed(run, checkout, line, (right, wrong))
    assert result.returncode not in (0, warm.TIMED_OUT), result.stdout
    failed = [line for line in result.stdout.splitlines() if line.endswith("FAILED")]
    assert any(fails in line for line in failed), result.stdout + result.stderr


SKEW = (  # rank 1's clock is 80 ms ahead, that of its profiler too
    ("return time.time_ns()", "return time.time_ns() + 80_000_000 * dist.get_rank()"),
    ('found["trace"]["baseTimeNanoseconds"]',
     'found["trace"]["baseTimeNanoseconds"] + 80_000_000 * rank'),
)  # fmt: skip


@pytest.mark.parametrize("align", [True, False])
def test_clocks_that_differ(run: Run, checkout: Path, align: bool) -> None:
    """Pings find the offset. Without it the wrong rank is late, and all-reduces end too early."""
    changes = SKEW if align else (*SKEW, (" - (ahead if abs(ahead) > doubt else 0)", ""))
    result = run_changed(run, checkout, f"{PROFILE} --straggler 0 25", *changes)
    failed = [line for line in result.stdout.splitlines() if line.endswith("FAILED")]
    offset = re.search(r"^clocks +(\S+) us", result.stdout, re.M)
    assert offset, result.stdout + result.stderr
    assert abs(int(offset[1]) - 80_000) < 1_000
    assert any("one machine's clocks" in line for line in failed), result.stdout
    assert any("ends before its last call" in line for line in failed) is not align
    assert any("rank found late" in line for line in failed) is not align
    if align:
        assert len(failed) == 1, result.stdout


def test_merged_trace(run: Run, checkout: Path, tmp_path: Path) -> None:
    """One file with all that the ranks' files have, the ranks as processes; the table as JSON."""
    out, record, picture = tmp_path / "traces", tmp_path / "table.json", tmp_path / "step.svg"
    flags = f"--out {out} --json {record} --plot {picture}"
    result = run(torchrun(3, f"{PROFILE} {flags}"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert not checks.drawn(picture)
    names = ["merged.json.gz", "rank0.json.gz", "rank1.json.gz", "rank2.json.gz"]
    assert sorted(path.name for path in out.iterdir()) == names
    merged, *ranks = (
        json.loads(gzip.decompress((out / name).read_bytes()))["traceEvents"] for name in names
    )
    for rank, events in enumerate(ranks):
        mine = [event for event in merged if event["pid"] == rank]
        for phase in "sf":
            assert sum(e["ph"] == phase for e in mine) == sum(e["ph"] == phase for e in events)
        spans = sorted(
            (e["name"], e["dur"]) for e in events if e["ph"] == "X" and e["cat"] != "Trace"
        )
        assert spans == sorted((e["name"], e["dur"]) for e in mine if e["ph"] == "X")
        named = {event["tid"] for event in mine if event["name"] == "thread_name"}
        assert {event["tid"] for event in mine if event["ph"] == "X"} <= named
    arrows = [event["id"] for event in merged if event["ph"] == "s"]
    assert len(arrows) == len(set(arrows))
    table = json.loads(record.read_text())["table"]
    assert [len(row) for row in table] == [3, 3]


def test_plot_and_json(run: Run, checkout: Path, tmp_path: Path) -> None:
    picture, record = tmp_path / "buckets.svg", tmp_path / "buckets.json"
    result = run(torchrun(2, f"{BUCKETS} --plot {picture} --json {record}"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "worst error of a predicted step" in result.stdout
    assert not checks.drawn(picture)
    found = json.loads(record.read_text())
    assert list(found) == ["stand-in", "gloo"]
    buckets = [len(row["buckets"]) for row in found["stand-in"]["sizes"].values()]
    assert buckets == [6, 2, 1]  # a bucket closes when it has 10 KiB or more: 12 KiB


# --- the arithmetic alone ----------------------------------------------------------------------


@functools.cache
def scripts() -> tuple[ModuleType, ModuleType]:
    names = ("ddp_bucketing_overlap", "profile_ddp")
    first, second = (warm.load(name, warm.ROOT / CODE / f"{name}.py") for name in names)
    return first, second


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
    end = begin + size
    for script in scripts():
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
        assert script.overlap(other, inside) + script.overlap(other, rest) == len(
            points(b) & window
        )


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


def event(name: str, begin: float, end: float, cat: str, tid: int) -> dict[str, Any]:
    """As in a trace: in microseconds."""
    return {
        "ph": "X",
        "name": name,
        "cat": cat,
        "tid": tid,
        "pid": 0,
        "ts": begin,
        "dur": end - begin,
    }


def gpu_step(name: str, late: float = 0.0) -> list[dict[str, Any]]:
    """A step of 100 us: kernels until 60, two all-reduces, each with an NCCL kernel on its stream."""
    return [
        event(name, 0, 100, "user_annotation", 1),
        event(name, 5, 95, "gpu_user_annotation", 7),
        event("aten::mm", 0, 99, "cpu_op", 1),
        event("c10d::allreduce_", 20, 21, "cpu_op", 2),
        event("sgemm", 10 + late, 40 + late, "kernel", 7),
        event("sgemm", 40 + late, 60 + late, "kernel", 7),
        event("ncclDevKernel_AllReduce_Sum_f32_RING_LL(x)", 30 + late, 50 + late, "kernel", 20),
        event("ncclDevKernel_AllReduce_Sum_f32_RING_LL(x)", 60 + late, 90, "kernel", 20),
    ]


def test_traces_of_gpus() -> None:
    """No GPU is needed to read a trace of one: there, only kernels count."""
    buckets, profile = scripts()
    cuda = torch.device("cuda")
    trace = {"traceEvents": gpu_step(f"{buckets.STEP}x"), "baseTimeNanoseconds": 0}
    (step,) = buckets.read_trace(trace, [], cuda)[f"{buckets.STEP}x"]
    expected = {"step": 100, "compute": 50, "communication": 50, "hidden": 20, "exposed": 30}
    assert step == {key: 1000 * us for key, us in expected.items()} | {"all_reduces": 2}

    rest = event("ProfilerStep#4", 200, 300, "user_annotation", 1)
    ranks = [
        profile.timeline([*gpu_step("ProfilerStep#3", late), rest], cuda) for late in (0.0, 15.0)
    ]
    ((early, late),) = profile.account(ranks)
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
