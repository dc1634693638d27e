"""The finder of culprits: every world size and culprit, bad input, and tools that name the wrong one."""

from collections.abc import Callable
from pathlib import Path

import book
import checks
import pytest
import warm

CODE = Path("chapter3-distributed-training-with-pytorch-ddp/code")
ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., warm.Result]
NAME = "ddp_debugging.py"

debugging = warm.load("chapter3_debugging", ROOT / CODE / NAME)
Rank = debugging.Rank


def torchrun(world_size: int, line: str) -> str:
    return f"torchrun --nproc_per_node={world_size} {CODE}/{line}"


@pytest.mark.parametrize(
    ("world_size", "flags"),
    [(2, "--culprit 0"), (3, "--culprit 2 --seed 1"), (4, "--culprit 1 --seed 2")],
)
def test_every_tool_names_whom_it_should(run: Run, world_size: int, flags: str) -> None:
    """The script knows who is guilty and which tool can tell; it fails if one does not."""
    command = torchrun(world_size, f"{NAME} {flags}")
    result, parsed = run(command), book.parse_command(command)
    problems = checks.evidence(parsed, result)
    assert not problems, checks.report(parsed, result, problems)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (NAME, "torchrun --nproc_per_node=2"),
        (f"{NAME} --only nothing", "--only"),
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
        (f"{NAME} --culprit 2", "--culprit 2: the ranks are 0 to 1"),
        (f"{NAME} --timeout 0", "give 0.2 to 20 seconds"),
    ],
)
def test_bad_input_to_several_ranks(run: Run, line: str, says: str) -> None:
    result = run(torchrun(2, line), timeout=30)
    assert result.returncode not in (0, warm.TIMED_OUT)
    assert {says in line for line in result.stderr.splitlines()} == {True}, result.stderr


@pytest.mark.parametrize(
    ("fault", "right", "wrong"),
    [
        # the culprit's neighbour is named
        ("absent", "return odd, \", \".join(f\"rank {r}: {call}\"", "return [r + 1 for r in odd], \", \".join(f\"rank {r}: {call}\""),
        ("reset", "rank.sums = checksums(model.module)", "rank.sums = {}"),
        ("slow", "min(range(len(ranks)), key=", "max(range(len(ranks)), key="),
        ("dead", "os.kill(os.getpid(), signal.SIGKILL)", "watched_all_reduce(rank, x)"),
        ("late", 'model.module.add_module("adapter", nn.Linear(25, 25))', "pass"),
    ],
)  # fmt: skip
def test_mutants_are_caught(run: Run, checkout: Path, fault: str, right: str, wrong: str) -> None:
    """A tool that names another rank, or a fault that is none, must not pass."""
    source = (checkout / CODE / NAME).read_text()
    assert source.count(right) == 1
    mutant = checkout / CODE / f"mutant_{NAME}"
    mutant.write_text(source.replace(right, wrong))
    result = run(torchrun(3, f"mutant_{NAME} --only {fault} --timeout 0.5"), timeout=60)
    mutant.unlink()
    assert result.returncode not in (0, warm.TIMED_OUT)
    assert "FAILED" in result.stdout, result.stderr


WRAPPED = """
import torch, torch._dynamo
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
dist.init_process_group("gloo")
DistributedDataParallel(torch.nn.Linear(2, 2))(torch.ones(1, 2)).sum().backward()
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize(("level", "code"), [("INFO", 0), ("DETAIL", 1)])
def test_ddp_under_detail_crashes_on_gloo(tmp_path: Path, level: str, code: int) -> None:
    """As section 3.8 says of torch 2.13; a release in which this fails is a reason to edit it."""
    (tmp_path / "wrapped.py").write_text(WRAPPED)
    command = f"TORCH_DISTRIBUTED_DEBUG={level} torchrun --nproc_per_node=2 wrapped.py"
    result = warm.run_cold(warm.parse_command(command), tmp_path, 60)
    assert result.returncode == code, result.stderr
    assert ("SIGSEGV" in result.stderr) is (code == 1)


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
    ranks, said = debugging.heartbeat([well, Rank(came=3, waits=[0.0, 0.0, 0.0])])
    assert (ranks, said.startswith("slow")) == ([1], True)


def test_checksum_names_the_first_parameter_that_differs() -> None:
    sums = [{"a": 1, "b": 2}, {"a": 1, "b": 2}, {"a": 1, "b": 3}]
    ranks = [Rank(sums=s) for s in sums]
    assert debugging.checksum(ranks) == ([2], "the first parameter that differs is b")
    assert debugging.checksum(ranks[:2])[0] == []
