"""The finder of culprits: its tools on evidence made by hand, every world size, and mutants."""

import sys
from collections.abc import Callable
from pathlib import Path

import book
import checks
import pytest
import warm

SCRIPT = warm.ROOT / "chapter3-distributed-training-with-pytorch-ddp/code/ddp_debugging.py"
Run = Callable[..., warm.Result]

debugging = warm.load("chapter3_debugging", SCRIPT)
Rank = debugging.Rank


# --- the tools, on evidence made by hand -------------------------------------------------------


def test_odd_ones_are_those_against_the_majority() -> None:
    assert debugging.odd_ones(["a", "a", "b"]) == [2]
    assert debugging.odd_ones(["b", "a", "a", "a"]) == [0]
    assert debugging.odd_ones(["a", "a"]) == []
    assert debugging.odd_ones(["a", "b"]) == [0, 1], "two ranks are a tie"
    assert debugging.odd_ones(["a", "a", "b", "b"]) == [0, 1, 2, 3]


def test_recorder_names_the_first_number_where_ranks_part() -> None:
    same = {1: "all_reduce [[4]]", 2: "broadcast [[4]]"}
    ranks = [Rank(calls=same), Rank(calls=same), Rank(calls={1: "all_reduce [[4]]"})]
    assert debugging.recorder(ranks)[0] == [2]
    ranks[0] = Rank(calls=same | {1: "all_gather [[4]]"})
    assert debugging.recorder(ranks)[0] == [0], "what comes later is a consequence"
    assert debugging.recorder([ranks[1], ranks[1]])[0] == []


def test_heartbeat_tells_dead_from_stuck_from_slow() -> None:
    well = Rank(came=3, waits=[0.2, 0.2, 0.2])
    assert debugging.heartbeat([well, Rank(died="SIGKILL")])[0] == [1]
    assert debugging.heartbeat([Rank(came=2, waits=[0.2]), well])[1].startswith("stuck")
    ranks, answer = debugging.heartbeat([well, Rank(came=3, waits=[0.0, 0.0, 0.0])])
    assert (ranks, answer.startswith("slow")) == ([1], True)


def test_checksum_names_the_first_parameter_that_differs() -> None:
    sums = [{"a": 1, "b": 2}, {"a": 1, "b": 2}, {"a": 1, "b": 3}]
    ranks = [Rank(sums=s) for s in sums]
    assert debugging.checksum(ranks) == ([2], "the first parameter that differs is b")
    assert debugging.checksum(ranks[:2])[0] == []


# --- the script --------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize(
    ("world_size", "flags"),
    [(2, "--culprit 0"), (3, "--culprit 2 --seed 20260101"), (4, "--culprit 1 --seed 2")],
)
def test_every_tool_names_whom_it_should(run: Run, world_size: int, flags: str) -> None:
    """The script knows who is guilty and which tool can tell; it fails if one does not."""
    command = f"torchrun --nproc_per_node={world_size} {SCRIPT} {flags}"
    result = run(command)
    parsed = book.parse_command(command)
    problems = checks.evidence(parsed, result)
    assert not problems, checks.report(parsed, result, problems)


@pytest.mark.full
@pytest.mark.parametrize(
    ("fault", "right", "wrong"),
    [
        # the culprit's neighbour is named
        (
            "absent",
            'return odd, ", ".join(f"rank {r}: {call}"',
            'return [r + 1 for r in odd], ", ".join(f"rank {r}: {call}"',
        ),
        ("reset", "rank.sums = checksums(model.module)", "rank.sums = {}"),
        ("slow", "min(range(len(ranks)), key=", "max(range(len(ranks)), key="),
        ("dead", "os.kill(os.getpid(), signal.SIGKILL)", "watched_all_reduce(rank, x)"),
        ("late", 'model.module.add_module("adapter", nn.Linear(25, 25))', "pass"),
    ],
)
def test_mutants_are_caught(run: Run, tmp_path: Path, fault: str, right: str, wrong: str) -> None:
    """A tool that names another rank, or a fault that is none, must not pass."""
    source = SCRIPT.read_text()
    assert source.count(right) == 1
    mutant = tmp_path / SCRIPT.name
    mutant.write_text(source.replace(right, wrong))
    result = run(f"torchrun --nproc_per_node=3 {mutant} --only {fault} --timeout 0.5", timeout=60)
    assert result.returncode == 1
    assert "check: answers that are not as predicted = 1 <= 0  FAILED" in result.stdout


@pytest.mark.full
@pytest.mark.parametrize(
    ("world_size", "flags", "says"),
    [
        (0, [], "needs two ranks: type  torchrun --nproc_per_node=2"),
        (2, ["--culprit", "2"], "--culprit 2: the ranks are 0 to 1"),
    ],
)
def test_bad_input_gets_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    world_size: int,
    flags: list[str],
    says: str,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    monkeypatch.setattr(sys, "argv", ["x", *flags])
    with pytest.raises(SystemExit) as end:
        debugging.parse_args()
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(says)


WRAPPED = """
import torch, torch._dynamo
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
dist.init_process_group("gloo")
DistributedDataParallel(torch.nn.Linear(2, 2))(torch.ones(1, 2)).sum().backward()
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.full
@pytest.mark.parametrize(("level", "code"), [("INFO", 0), ("DETAIL", 1)])
def test_ddp_under_detail_crashes_on_gloo(tmp_path: Path, level: str, code: int) -> None:
    """As section 3.8 says of torch 2.13; a release in which this fails is a reason to edit it."""
    (tmp_path / "wrapped.py").write_text(WRAPPED)
    command = f"TORCH_DISTRIBUTED_DEBUG={level} torchrun --nproc_per_node=2 wrapped.py"
    result = warm.run_cold(warm.parse_command(command), tmp_path, 60)
    assert result.returncode == code, result.stderr
    assert ("SIGSEGV" in result.stderr) is (code == 1)
