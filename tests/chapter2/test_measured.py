"""Chapter 2's measurements: right at every world size, broken on purpose, killed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import checks
import psutil
import pytest
import warm
from mutants import failed_claims

CODE = Path("chapter2-gpu-hardware-networking-and-parallelism-strategies/code")
BENCH = warm.ROOT / CODE / "allreduce_microbench.py"
P2P = warm.ROOT / CODE / "p2p_latency.py"
SIZES = "--min-bytes 1001 --max-bytes 5K --factor 4 --repeats 2 --iters 2"
PAIRS = "--bytes 1001 --repeats 3 --warmup 1"
Run = Callable[..., warm.Result]


def torchrun(world_size: int, line: str) -> str:
    return f"torchrun --nproc_per_node={world_size} {CODE}/{line}"


def test_every_collective_is_right() -> None:
    """On three ranks, with a size that they do not divide."""
    assert failed_claims(BENCH, 3, [(f"{SIZES} --op all", "", "")]) == [set()]


@pytest.mark.full
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_every_collective_in_every_dtype(world_size: int) -> None:
    dtypes = ("bfloat16", "float16", "float64", "int32", "int64")
    cases = [(f"{SIZES} --op all --dtype {dtype}", "", "") for dtype in dtypes]
    assert failed_claims(BENCH, world_size, cases) == [set()] * len(cases)


@pytest.mark.full
def test_the_table_by_hand(run: Run, tmp_path: Path) -> None:
    """Sizes are rounded down to equal chunks, and the rates are nccl-tests' definition."""
    path = tmp_path / "bench.json"
    line = f"allreduce_microbench.py {SIZES} --op reduce_scatter --repeats 7 --json {path}"
    result = run(torchrun(3, line))
    assert result.returncode == 0, result.stderr
    (found,) = json.loads(path.read_text())["collectives"]
    assert found["factor"] == pytest.approx(2 / 3)
    printed = result.stdout.splitlines()
    for row, size in zip(found["sizes"], (996, 3996), strict=True):
        assert row["bytes"] == size
        assert row["wrong"] == 0
        assert len(row["seconds"]) == 7
        assert row["fastest_s"] == min(row["seconds"])
        rate = size / row["fastest_s"] / 1e9
        (line,) = (text for text in printed if text.split()[:1] == [f"{size:,}"])
        assert line.split()[4:6] == [f"{rate:.3f}", f"{found['factor'] * rate:.3f}"]


def test_fit() -> None:
    """A line is found again whatever its scale; neither parameter goes below zero."""
    fit = warm.load("allreduce_microbench", BENCH).fit
    points = [(2.0**k, 3e-5 + 2.0**k * 7e-10) for k in range(12, 25, 2)]
    assert fit(points) == pytest.approx((3e-5, 7e-10))
    outlier = [*points, (2.0**26, 2 * (3e-5 + 2.0**26 * 7e-10))]
    assert 3e-5 < fit(outlier)[0] + 2.0**26 * fit(outlier)[1] < 2 * (3e-5 + 2.0**26 * 7e-10)
    assert fit([(1.0, 2.0), (2.0, 1.0)])[1] == 0.0
    assert fit([(1.0, 1.0), (10.0, 100.0)])[0] == 0.0


@pytest.mark.full
@pytest.mark.parametrize("world_size", [2, 4])
def test_ping_pong_of_every_pair(run: Run, tmp_path: Path, world_size: int) -> None:
    path, picture = tmp_path / "p2p.json", tmp_path / "p2p.svg"
    line = f"p2p_latency.py {PAIRS} --seed 20260101 --json {path} --plot {picture}"
    result = run(torchrun(world_size, line))
    assert result.returncode == 0, result.stderr
    assert f"check: wrong echoes of {2 * world_size * (world_size - 1) * 4} = 0" in result.stdout
    assert not checks.drawn(picture)
    found = json.loads(path.read_text())
    assert found["bytes"] == [8, 1000]
    for matrix in (*found["fastest_s"], *found["median_s"]):
        for a, row in enumerate(matrix):
            assert [cell is None for cell in row] == [a == b for b in range(world_size)]
    assert len(found["pairs"]) == world_size * (world_size - 1)


@pytest.mark.parametrize(
    "world_size",
    [1, pytest.param(2, marks=pytest.mark.full), pytest.param(3, marks=pytest.mark.full)],
)
def test_calibration_file(run: Run, tmp_path: Path, world_size: int) -> None:
    """Its fields are those that the docstring documents, and it is written in one piece."""
    path = tmp_path / "made" / "quick.json"
    flags = f"--quick --repeats 2 --matmul 64 --memory-mib 1 --seed 20260101 --json {path}"
    result = run(torchrun(world_size, f"calibrate.py {flags}"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert list(path.parent.iterdir()) == [path]
    found = json.loads(path.read_text())
    documented = (warm.ROOT / CODE / "calibrate.py").read_text().partition('"""\n')[0]
    assert all(field in documented for field in found)
    assert found["schema"] == 1
    assert found["world_size"] == world_size
    assert {"float32", "bfloat16", "float64"} <= set(found["matmul_flops_per_s"])
    assert found["bf16_flops"] == found["matmul_flops_per_s"]["bfloat16"]
    assert ("memory_bytes" in found) == (found["device"] != "cpu")
    if world_size == 1:
        assert found["collectives"] == {}
        assert found["point_to_point"] is None
        return
    ops = {"all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all"}
    assert set(found["collectives"]) == ops
    for model in (*found["collectives"].values(), found["point_to_point"]):
        assert list(model) == ["alpha_s", "beta_bytes_per_s", "median_error"]


@pytest.mark.full
@pytest.mark.parametrize(
    ("world_size", "line", "says"),
    [
        (1, "allreduce_microbench.py", "type  torchrun --nproc_per_node=2"),
        (1, "p2p_latency.py", "type  torchrun --nproc_per_node=2"),
        (3, "allreduce_microbench.py --min-bytes 8", "12 <= --min-bytes <= --max-bytes"),
        (2, "allreduce_microbench.py --factor 1", "--factor 2 or more"),
        (2, "p2p_latency.py --bytes 8", "more than the 8 bytes"),
    ],
)
def test_bad_input_to_several_ranks(run: Run, world_size: int, line: str, says: str) -> None:
    result = run(torchrun(world_size, line), timeout=30)
    assert result.returncode not in (0, warm.TIMED_OUT)
    assert {says in line for line in result.stderr.splitlines()} == {True}, result.stderr


@pytest.mark.full
@pytest.mark.parametrize(
    ("script", "mutants"),
    [
        (
            BENCH,
            [
                (f"{SIZES} --op all_reduce", "dist.all_reduce(buffers.whole)", "pass"),
                (
                    f"{SIZES} --op all_reduce",
                    "dist.all_reduce(buffers.whole)",
                    "dist.all_reduce(buffers.whole[1:])",
                ),
                # the ranks' chunks change places
                (
                    f"{SIZES} --op all_gather",
                    "whole.chunk(world_size)[rank]",
                    "whole.chunk(world_size)[1 - rank]",
                ),
                # the average, not the sum
                (
                    f"{SIZES} --op reduce",
                    "dist.reduce(buffers.whole, 0)",
                    "dist.reduce(buffers.whole.div_(2), 0)",
                ),
                (
                    f"{SIZES} --op send_recv",
                    "dist.P2POp(dist.isend, whole,",
                    "dist.P2POp(dist.isend, whole + 1,",
                ),
            ],
        ),
        (
            P2P,
            [
                # the echo is another message
                (PAIRS, "dist.send(answer, first)", "dist.send(answer + 1, first)"),
                # one direction only
                (PAIRS, "if first != second and", "if first < second and"),
            ],
        ),
    ],
)
def test_mutants_are_caught(script: Path, mutants: list[tuple[str, str, str]]) -> None:
    failed = failed_claims(script, 2, mutants)
    assert [bool(lines) for lines in failed] == [True] * len(mutants), failed


@pytest.mark.full
def test_a_rank_that_dies_ends_the_run_and_is_named(checkout: Path) -> None:
    """torchrun's own launcher: it ends the others, and its summary says which rank it was."""
    script = str(CODE / "allreduce_microbench.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = subprocess.Popen(
        [*launcher, script, "--max-bytes", "64K", "--repeats", "1000000"],
        cwd=checkout,
        env=warm.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout
        while not (line := process.stdout.readline()).startswith("2 ranks"):
            assert line, "it ended before it began"
        killed = time.monotonic()
        os.kill(pid_of_rank(process.pid, 1), signal.SIGKILL)
        rest, _ = process.communicate(timeout=30)
    finally:
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
        process.kill()
    assert process.returncode == 1
    assert time.monotonic() - killed < 30
    assert "rank      : 1 (local_rank: 1)" in rest, rest
    assert "exitcode  : -9" in rest


def pid_of_rank(launcher: int, rank: int) -> int:
    for child in psutil.Process(launcher).children(recursive=True):
        if child.environ().get("RANK") == str(rank):
            return child.pid
    raise ProcessLookupError(rank)
