"""Ring, tree and hierarchical all-reduce: at every world size, with bad input, and broken on purpose."""

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
import torch
import warm

CODE = Path("chapter2-gpu-hardware-networking-and-parallelism-strategies/code")
Run = Callable[..., warm.Result]
SMALL = "--min-bytes 2K --max-bytes 8K --factor 4 --repeats 1"
RING = f"ring_allreduce.py {SMALL}"
TREE = f"tree_allreduce.py {SMALL}"
HIERARCHICAL = f"hierarchical_allreduce.py {SMALL}"
ALL = (RING, TREE, HIERARCHICAL)
# (source line, what it becomes): each breaks the sum or the bytes
RING_MUTANTS = [
    # the first trip, then the second, takes a step too few
    ("        received = buffer[", "        if step == world_size - 2: continue\n        received = buffer["),
    ("        sent += exchange(chunks[(rank - step + 1) % world_size], incoming)", "        if step < world_size - 2: sent += exchange(chunks[(rank - step + 1) % world_size], incoming)"),
    ("        incoming += received", "        pass"),
    ("chunks = tensor.view(-1).tensor", "chunks = tensor.view(-1)[1:].tensor"),
    ("        incoming += received", "        incoming += received * float('nan')"),
    ("return outgoing.nbytes", "return outgoing.nbytes + 1"),
]  # fmt: skip
TREE_MUTANTS = [
    ("        tensor += buffer\n        return 0", "        return 0"),
    # a tree for the largest power of two forgets the odd rank
    ("range((world_size - 1).bit_length())", "range(world_size.bit_length() - 1)"),
    ("    return sent + sum(broadcast_level(tensor, distance) for distance in reversed(up))", "    return sent"),
    ("    dist.send(tensor, peer)\n    return tensor.nbytes\n\n\ndef broadcast", "    dist.send(tensor, peer)\n    return 0\n\n\ndef broadcast"),
]  # fmt: skip
HIERARCHICAL_MUTANTS = [
    ("    sent_across = reduce_scatter(pieces, across, buffer)\n    sent_across += all_gather(pieces, across)", "    sent_across = 0"),
    ("    sent_across += all_gather(pieces, across)", "    pass"),
    ("    sent_inside += all_gather(chunks, inside)", "    pass"),
    ("    own = chunks[(dist.get_rank() + 1) % ranks_per_node]", "    own = chunks[dist.get_rank() % ranks_per_node]"),
    ("        incoming += received", "        pass"),
    # every rank of a node sends the whole tensor across
    ("    pieces = own.tensor_split(len(across))", "    pieces = tensor.tensor_split(len(across))\n    buffer = torch.empty_like(tensor)"),
]  # fmt: skip


def torchrun(world_size: int, line: str) -> str:
    return f"torchrun --nproc_per_node={world_size} {CODE}/{line}"


@pytest.mark.parametrize(
    ("world_size", "flags"),
    [
        *((n, "--seed 1") for n in (1, 2, 3, 4)),
        *((n, "--seed 2 --dtype bfloat16") for n in (2, 3)),
    ],
)
@pytest.mark.parametrize("line", ALL)
def test_every_world_size(run: Run, line: str, flags: str, world_size: int) -> None:
    """A script's own checks are the test: float64, dist.all_reduce, every rank alike, bytes."""
    command = torchrun(world_size, f"{line} {flags}")
    result = run(command)
    if world_size == 1:
        assert result.returncode != 0
        assert result.stdout == ""
        assert result.stderr.count("\n") == 1, result.stderr
        assert "type  torchrun --nproc_per_node=2" in result.stderr
        return
    parsed = book.parse_command(command)
    problems = checks.evidence(parsed, result)
    assert not problems, checks.report(parsed, result, problems)
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("world_size", "line"),
    [
        *((5, line) for line in ALL),
        *((3, f"{line} --min-bytes 1 --max-bytes 1") for line in ALL),
        (4, f"{RING} --min-bytes 1028 --max-bytes 10000 --factor 3"),  # does not divide by 4
        (4, f"{TREE} --min-bytes 1028 --max-bytes 10000 --factor 3"),
        (4, f"{HIERARCHICAL} --min-bytes 1028 --max-bytes 10000 --factor 3"),
        *((4, f"{HIERARCHICAL} --ranks-per-node {r} --seed {r}") for r in (1, 4)),
        (6, f"{HIERARCHICAL} --ranks-per-node 3 --max-bytes 2K"),
    ],
)
def test_awkward_sizes(run: Run, line: str, world_size: int) -> None:
    command = torchrun(world_size, line)
    result = run(command)
    parsed = book.parse_command(command)
    problems = checks.evidence(parsed, result)
    assert not problems, checks.report(parsed, result, problems)


@pytest.mark.parametrize("line", [RING, TREE])
def test_files(run: Run, line: str, tmp_path: Path) -> None:
    result = run(torchrun(2, f"{line} --json {tmp_path}/t.json --plot {tmp_path}/t.svg"))
    assert result.returncode == 0, result.stderr
    assert '"bytes": 8192' in (tmp_path / "t.json").read_text()
    assert not checks.drawn(tmp_path / "t.svg")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        *((line, "torchrun --nproc_per_node=2") for line in ALL),
        *((f"{line} --repeats 0", "--repeats") for line in ALL),
        *((f"{line} --max-bytes -4", "--max-bytes") for line in ALL),
        *((f"{line} --max-bytes many", "--max-bytes") for line in ALL),
        *((f"{line} --dtype int3", "--dtype") for line in ALL),
        *((f"{line} --factor 1", "--factor") for line in ALL),
        *((f"{line} --json /dev/null/x", "/dev/null/x") for line in ALL),
        (f"{RING} --plot /dev/null/x.svg", "/dev/null/x.svg"),
        (f"{TREE} --max-bytes 512", "--max-bytes"),
        (f"{HIERARCHICAL} --ranks-per-node 0", "--ranks-per-node"),
        (f"{HIERARCHICAL} --across-gbps 0", "--across-gbps"),
        (f"{HIERARCHICAL} --inside-gbps nan", "--inside-gbps"),
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
        (f"{RING} --device abacus", "2 ranks, but 0 abacus devices: type --device cpu"),
        (f"{HIERARCHICAL} --ranks-per-node 3", "--ranks-per-node 3 does not divide 2 ranks"),
    ],
)
def test_bad_input_to_several_ranks(run: Run, line: str, says: str) -> None:
    result = run(torchrun(2, line), timeout=30)
    assert result.returncode not in (0, warm.TIMED_OUT)
    assert {says in line for line in result.stderr.splitlines()} == {True}, result.stderr


@pytest.mark.parametrize("name", ["ring", "tree", "hierarchical"])
def test_refuses_a_tensor_that_is_not_contiguous(name: str) -> None:
    module = warm.load(f"chapter2_{name}", warm.ROOT / CODE / f"{name}_allreduce.py")
    columns = torch.zeros(4, 4).T
    arguments = (columns, 2) if name == "hierarchical" else (columns,)
    with pytest.raises(ValueError, match="contiguous"):
        getattr(module, f"{name}_all_reduce")(*arguments)


@pytest.mark.parametrize(
    ("world_size", "line", "right", "wrong"),
    [
        *((3, RING, *mutant) for mutant in RING_MUTANTS),
        *((3, TREE, *mutant) for mutant in TREE_MUTANTS),
        *((4, HIERARCHICAL, *mutant) for mutant in HIERARCHICAL_MUTANTS),
    ],
)
def test_mutants_are_caught(
    run: Run, checkout: Path, world_size: int, line: str, right: str, wrong: str
) -> None:
    """Break the script: its own checks must see it, and its exit code must say so."""
    name, _, flags = line.partition(" ")
    source = (checkout / CODE / name).read_text()
    assert source.count(right) == 1
    mutant = checkout / CODE / f"mutant_{name}"
    mutant.write_text(source.replace(right, wrong))
    result = run(torchrun(world_size, f"{mutant.name} {flags}"), timeout=40)
    mutant.unlink()
    assert result.returncode not in (0, warm.TIMED_OUT)
    assert "FAILED" in result.stdout


def test_a_killed_rank_ends_the_run(tmp_path: Path) -> None:
    """torchrun names the rank that died, and no other waits for it for ever."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = [str(warm.ROOT / CODE / "ring_allreduce.py"), "--repeats", "100000"]
    errors = tmp_path / "errors"
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            [*torchrun, *script], stdout=subprocess.DEVNULL, stderr=stderr, env=warm.environment()
        )
        try:
            victim = rank_one(process.pid, deadline=time.monotonic() + 40)
            os.kill(victim, signal.SIGKILL)
            assert process.wait(20) != 0
        finally:
            for child in psutil.Process(process.pid).children() if process.poll() is None else ():
                child.kill()
            process.kill()
            process.wait()
    root_cause = errors.read_text().partition("Root Cause")[2]
    assert "rank      : 1" in root_cause
    assert "-9" in root_cause


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
