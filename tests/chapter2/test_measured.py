"""Chapter 2's measurements: right at every world size, with bad input, broken on purpose, killed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import book
import checks
import psutil
import pytest
import warm

CODE = Path("chapter2-gpu-hardware-networking-and-parallelism-strategies/code")
Run = Callable[..., warm.Result]
BENCH = "allreduce_microbench.py --min-bytes 1001 --max-bytes 5K --factor 4 --repeats 2 --iters 1"
P2P = "p2p_latency.py --bytes 1001 --repeats 3 --warmup 1"
CALIBRATE = "calibrate.py --quick --repeats 3 --matmul 64 --memory-mib 1 --json made/x/quick.json"
OPS = (
    "all_reduce",
    "reduce_scatter",
    "all_gather",
    "broadcast",
    "reduce",
    "gather",
    "scatter",
    "all_to_all",
    "send_recv",
)


def torchrun(world_size: int, line: str) -> str:
    return f"torchrun --nproc_per_node={world_size} {CODE}/{line}"


def run_well(run: Run, command: str) -> str:
    result = run(command)
    parsed = book.parse_command(command)
    problems = checks.evidence(parsed, result)
    assert not problems, checks.report(parsed, result, problems)
    assert result.stderr == ""
    return result.stdout


@pytest.mark.parametrize(
    ("world_size", "dtype"),
    [(n, dtype) for n in (2, 3, 4) for dtype in ("float32", "bfloat16")]
    + [(3, dtype) for dtype in ("float16", "float64", "int32", "int64")],
)
def test_every_collective_is_right(run: Run, world_size: int, dtype: str) -> None:
    """Sizes that the ranks do not divide are rounded down, and the table says to what."""
    stdout = run_well(run, torchrun(world_size, f"{BENCH} --op all --dtype {dtype}"))
    bytes_each = int(dtype.lstrip("bfloatin")) // 8
    for op in OPS:
        table = stdout.partition(f"{op}: type {dtype}")[2].splitlines()
        sizes = [int(line.split()[0].replace(",", "")) for line in table[3:5]]
        whole = world_size * bytes_each
        assert sizes == [1001 // whole * whole, 4004 // whole * whole]
        assert f"check: {op}: wrong elements at any size = 0 <= 0  ok" in stdout


def test_bench_by_hand(run: Run, checkout: Path, tmp_path: Path) -> None:
    """The printed rates are nccl-tests' definition, and the fit is the one in the record."""
    path, picture = tmp_path / "bench.json", tmp_path / "bench.svg"
    files = f"--json {path} --plot {picture}"
    run_well(run, torchrun(3, f"{BENCH} --op reduce_scatter --iters 3 --repeats 7 {files}"))
    assert not checks.drawn(picture)
    (record,) = json.loads(path.read_text())["collectives"]
    assert record["factor"] == pytest.approx(2 / 3)
    for row in record["sizes"]:
        assert len(row["seconds"][0]) in range(7, 29)
        assert row["fastest_s"] == min(row["seconds"][0])


def test_fit() -> None:
    """A line is found again whatever its scale; neither parameter goes below zero."""
    for name in ("allreduce_microbench", "calibrate"):
        fit = warm.load(f"chapter2_{name}", warm.ROOT / CODE / f"{name}.py").fit
        points = [(2.0**k, 3e-5 + 2.0**k * 7e-10) for k in range(12, 25, 2)]
        assert fit(points) == pytest.approx((3e-5, 7e-10))
        outlier = [*points, (2.0**26, 2 * (3e-5 + 2.0**26 * 7e-10))]
        assert 3e-5 < fit(outlier)[0] + 2.0**26 * fit(outlier)[1] < 2 * (3e-5 + 2.0**26 * 7e-10)
        assert fit([(1.0, 2.0), (2.0, 1.0)])[1] == 0.0
        assert fit([(1.0, 1.0), (10.0, 100.0)])[0] == 0.0


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("seed", [1, 2])
def test_ping_pong_of_every_pair(run: Run, tmp_path: Path, world_size: int, seed: int) -> None:
    path, picture = tmp_path / "p2p.json", tmp_path / "p2p.svg"
    line = f"{P2P} --seed {seed} --json {path} --plot {picture}"
    stdout = run_well(run, torchrun(world_size, line))
    assert f"check: wrong echoes of {2 * world_size * (world_size - 1) * 4} = 0" in stdout
    assert not checks.drawn(picture)
    record = json.loads(path.read_text())
    assert record["bytes"] == [8, 1000]
    for matrix in (*record["fastest_s"], *record["median_s"]):
        for a, row in enumerate(matrix):
            assert [cell is None for cell in row] == [a == b for b in range(world_size)]
    assert len(record["pairs"]) == world_size * (world_size - 1)


@pytest.mark.parametrize("world_size", [0, 1, 2, 3])
def test_calibration_file(run: Run, checkout: Path, world_size: int) -> None:
    """Its fields are those that the docstring documents; a fit on 3 repeats may be a bad one."""
    command = torchrun(world_size, CALIBRATE) if world_size else f"python {CODE}/{CALIBRATE}"
    result = run(command)
    failed = [line for line in result.stdout.splitlines() if line.endswith("FAILED")]
    assert all("held-out" in line for line in failed), result.stdout
    assert result.returncode == int(bool(failed))
    record = json.loads((checkout / "made/x/quick.json").read_text())
    assert not list((checkout / "made/x").glob("*.tmp"))
    documented = (checkout / CODE / "calibrate.py").read_text().partition('"""\n')[0]
    assert all(field in documented for field in record)
    assert record["schema"] == 1
    assert record["world_size"] == max(world_size, 1)
    assert set(record["matmul_flops_per_s"]) == {"float32", "bfloat16", "float64"}
    if world_size > 1:
        ops = {"all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all"}
        assert set(record["collectives"]) == ops
        models = [*record["collectives"].values(), record["point_to_point"]]
        for model in models:
            assert list(model) == ["alpha_s", "beta_bytes_per_s", "median_error"]
    else:
        assert record["collectives"] == {}
        assert record["point_to_point"] is None


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (BENCH, "torchrun --nproc_per_node=2"),
        (P2P, "torchrun --nproc_per_node=2"),
        (f"{BENCH} --min-bytes 0", "--min-bytes"),
        (f"{BENCH} --min-bytes -4", "--min-bytes"),
        (f"{BENCH} --min-bytes 1X", "--min-bytes"),
        (f"{BENCH} --min-bytes 8K", "--min-bytes <= --max-bytes"),
        (f"{BENCH} --min-bytes 4", "give 8 <= --min-bytes"),
        (f"{BENCH} --factor 1", "--factor"),
        (f"{BENCH} --factor 0", "--factor"),
        (f"{BENCH} --op sum", "--op"),
        (f"{BENCH} --dtype float8", "--dtype"),
        (f"{BENCH} --plot /dev/null/x.svg", "/dev/null/x.svg"),
        (f"{P2P} --bytes 8", "more than the 8 bytes"),
        (f"{P2P} --bytes 0", "--bytes"),
        (f"{P2P} --json /dev/null/x.json", "/dev/null/x.json"),
        ("calibrate.py --repeats 0", "--repeats"),
        ("calibrate.py --device abacus", "--device"),
        ("calibrate.py --json /dev/null/x.json", "--json FILE"),
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
        (1, BENCH, "type  torchrun --nproc_per_node=2"),
        (1, P2P, "type  torchrun --nproc_per_node=2"),
        (3, f"{BENCH} --min-bytes 8", "give 12 <= --min-bytes"),
        (2, f"{BENCH} --device abacus", "type --device cpu"),
        (2, f"{P2P} --device abacus", "type --device cpu"),
        (2, f"{CALIBRATE} --device abacus", "type --device cpu"),
    ],
)
def test_bad_input_to_several_ranks(run: Run, world_size: int, line: str, says: str) -> None:
    result = run(torchrun(world_size, line), timeout=30)
    assert result.returncode not in (0, warm.TIMED_OUT)
    assert {says in line for line in result.stderr.splitlines()} == {True}, result.stderr


@pytest.mark.parametrize(
    ("line", "right", "wrong"),
    [
        (f"{BENCH} --op all_reduce", "lambda t: dist.all_reduce(t.whole)", "lambda t: None"),
        (f"{BENCH} --op all_reduce", "dist.all_reduce(t.whole)", "dist.all_reduce(t.whole[1:])"),
        (f"{BENCH} --op all_gather", "all_gather_single(t.other, t.chunk)", "None"),
        (f"{BENCH} --op scatter", "dist.scatter(t.slot, t.chunks, 0)", "None"),
        # the ranks' chunks change places
        (f"{BENCH} --op all_gather", "chunks[rank], slots[rank]", "chunks[1 - rank], slots[rank]"),
        # the average, not the sum
        (f"{BENCH} --op reduce", "dist.reduce(t.whole, 0)", "dist.reduce(t.whole.div_(2), 0)"),
        # the echo is another message
        (P2P, "dist.send(answer, first)", "dist.send(answer + 1, first)"),
        # one direction only
        (P2P, "if first != second and", "if first < second and"),
        # the file is torn
        (CALIBRATE, "draft.write_text(json.dumps(record", "draft.write_text(json.dumps({}"),
        (CALIBRATE, "return 3 * a.nbytes / seconds[0]", "return float('nan')"),
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
    assert result.returncode == 1, result.stderr
    assert "FAILED" in result.stdout


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
