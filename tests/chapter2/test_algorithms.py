"""Ring, tree and hierarchical all-reduce: at every world size, with bad input, and broken on purpose."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import psutil
import pytest
import torch
import warm
from mutants import failed_claims

CODE = Path("chapter2-gpu-hardware-networking-and-parallelism-strategies/code")
Run = Callable[..., warm.Result]
ALGORITHMS = ("ring", "tree", "hierarchical")
SMALL = "--min-bytes 2K --max-bytes 8K --factor 4 --repeats 1"


def script(name: str) -> Path:
    return warm.ROOT / CODE / f"{name}_allreduce.py"


def load(name: str) -> ModuleType:
    return warm.load(f"chapter2_{name}", script(name))


def test_where_ring_and_tree_cross(capsys: pytest.CaptureFixture[str]) -> None:
    """At the size that the script predicts, both cost the same by section 2.4's formulas."""
    latency, slope = 2e-4, 1e-9
    load("tree").predict_crossing(4, latency, slope)
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "MiB" in line]
    for ranks, ring_steps, tree_steps, mebibytes, _ in rows:
        n, size = int(ranks.replace(",", "")), float(mebibytes) * 2**20
        ring = int(ring_steps.replace(",", "")) * (latency + size / n * slope)
        assert int(tree_steps) * (latency + size * slope) == pytest.approx(ring, rel=0.02), n


def test_the_tree_wins_up_to_a_size() -> None:
    rows = [{"bytes": 2**k, "ring": 9.0, "tree": float(k)} for k in range(20)]
    assert load("tree").faster_up_to(rows, "tree", "ring") == 2**8
    assert load("tree").faster_up_to(rows, "ring", "tree") == 0


def test_what_the_hierarchy_is_worth(capsys: pytest.CaptureFixture[str]) -> None:
    """For 1 GB over 8 nodes of 8: bytes over rates, and a latency for each step of each kind."""
    load("hierarchical").cluster(argparse.Namespace(inside_gbps=450, across_gbps=50))
    _, flat, hierarchical = capsys.readouterr().out.splitlines()[3].split()
    assert float(flat) == pytest.approx(2 * 63 / 64 / 0.05 + 14 * 0.014 + 112 * 0.0034, abs=0.06)
    inside, across = 14 * (0.0034 + 1 / 8 / 0.45), 14 * (0.014 + 1 / 64 / 0.05)
    assert float(hierarchical) == pytest.approx(inside + across, abs=0.06)


@pytest.mark.full
@pytest.mark.parametrize("world_size", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_world_size(name: str, world_size: int) -> None:
    """A script's own checks are the test: float64, dist.all_reduce, every rank alike, bytes."""
    variants = [
        f"{SMALL} --seed 20260101",
        f"{SMALL} --seed 2 --dtype bfloat16",
        f"{SMALL} --min-bytes 1 --max-bytes 1",
        f"{SMALL} --min-bytes 1028 --max-bytes 10000 --factor 3",  # n need not divide it
    ]
    if name == "hierarchical":
        per_node = [r for r in range(1, world_size + 1) if world_size % r == 0]
        variants += [f"{SMALL} --ranks-per-node {r}" for r in per_node]
    cases = [(flags, "", "") for flags in variants]
    assert failed_claims(script(name), world_size, cases) == [set()] * len(cases)


@pytest.mark.full
@pytest.mark.parametrize("name", ALGORITHMS)
def test_json(run: Run, name: str, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    result = run(f"torchrun --nproc_per_node=2 {CODE}/{name}_allreduce.py {SMALL} --json {path}")
    assert result.returncode == 0, result.stderr
    assert [row["bytes"] for row in json.loads(path.read_text())] == [2048, 8192]


@pytest.mark.full
@pytest.mark.parametrize(
    ("ranks", "line", "says"),
    [
        *((1, f"{name}_allreduce.py", "type  torchrun --nproc_per_node=2") for name in ALGORITHMS),
        (2, "ring_allreduce.py --factor 1", "type --factor 2 or more"),
        (2, "hierarchical_allreduce.py --ranks-per-node 3", "type one of [1, 2]"),
    ],
)
def test_bad_input_gets_one_line(run: Run, ranks: int, line: str, says: str) -> None:
    """A line from each rank, and nothing else."""
    result = run(f"torchrun --nproc_per_node={ranks} {CODE}/{line}")
    assert result.returncode not in (0, warm.TIMED_OUT)
    assert result.stdout == ""
    assert {says in line for line in result.stderr.splitlines()} == {True}, result.stderr


@pytest.mark.full
@pytest.mark.parametrize("name", ALGORITHMS)
def test_refuses_a_tensor_that_is_not_contiguous(name: str) -> None:
    columns = torch.zeros(4, 4).T
    arguments = (columns, 2) if name == "hierarchical" else (columns,)
    with pytest.raises(ValueError, match="contiguous"):
        getattr(load(name), f"{name}_all_reduce")(*arguments)


MUTANTS = {  # world size; a piece of the source, and what it becomes: each breaks sum or bytes
    "ring": (3, [
        # the first trip, then the second, takes a step too few
        ("        received = buffer[", "        if step == world_size - 2: continue\n        received = buffer["),
        ("        sent += exchange(chunks[(rank - step + 1) % world_size], incoming)", "        if step < world_size - 2: sent += exchange(chunks[(rank - step + 1) % world_size], incoming)"),
        ("        incoming += received", "        pass"),
        ("chunks = tensor.view(-1).tensor", "chunks = tensor.view(-1)[1:].tensor"),
    ]),
    "tree": (5, [
        ("        tensor += buffer\n        return 0", "        return 0"),
        # a tree for the largest power of two forgets the odd rank
        ("range((world_size - 1).bit_length())", "range(world_size.bit_length() - 1)"),
        ("    return sent + sum(broadcast_level(tensor, distance) for distance in reversed(up))", "    return sent"),
        # down in the order of the way up: some send on what they have not got yet
        ("for distance in reversed(up))", "for distance in up)"),
    ]),
    "hierarchical": (4, [
        ("    sent_across = reduce_scatter(pieces, across, buffer)\n    sent_across += all_gather(pieces, across)", "    sent_across = 0"),
        ("    sent_across += all_gather(pieces, across)", "    pass"),
        ("    sent_inside += all_gather(chunks, inside)", "    pass"),
        ("    own = chunks[(dist.get_rank() + 1) % ranks_per_node]", "    own = chunks[dist.get_rank() % ranks_per_node]"),
        ("        incoming += received", "        pass"),
        # every rank of a node sends the whole tensor across
        ("    pieces = own.tensor_split(len(across))", "    pieces = tensor.tensor_split(len(across))\n    buffer = torch.empty_like(tensor)"),
    ]),
}  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("name", ALGORITHMS)
def test_mutants_are_caught(name: str) -> None:
    world_size, mutants = MUTANTS[name]
    found = failed_claims(script(name), world_size, [(SMALL, *mutant) for mutant in mutants])
    for (_, wrong), failed in zip(mutants, found, strict=True):
        assert failed, wrong


@pytest.mark.full
def test_a_killed_rank_ends_the_run(tmp_path: Path) -> None:
    """torchrun names the rank that died, and no other waits for it for ever."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    errors = tmp_path / "errors"
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            [*torchrun, str(script("ring")), "--repeats", "100000"],
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env=warm.environment(),
        )
        try:
            victim = rank_one(process.pid, deadline=time.monotonic() + 100)
            os.kill(victim, signal.SIGKILL)
            assert process.wait(60) != 0
        finally:
            for child in psutil.Process(process.pid).children() if process.poll() is None else ():
                child.kill()
            process.kill()
            process.wait()
    # Which failure it calls the root cause depends on who wrote down the time first.
    named = re.search(r"rank +: 1 .*\n +exitcode +: -9", errors.read_text())
    assert named, errors.read_text()[-2000:]


def rank_one(launcher: int, deadline: float) -> int:
    """The process of rank 1, once it exchanges: it then holds sockets to rank 0 and burns time."""
    while time.monotonic() < deadline:
        for child in psutil.Process(launcher).children():
            try:
                if child.environ().get("RANK") == "1" and child.cpu_times().user > 3:
                    return child.pid
            except psutil.Error:
                continue
        time.sleep(0.1)
    raise TimeoutError("rank 1 did not start")
