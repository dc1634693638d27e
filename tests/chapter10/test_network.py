"""A slow rank and a slow link are named rightly, and nothing is named where nothing is slow."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import warm
from book import CHAPTERS

CODE = f"{CHAPTERS[9]}/code"
SCRIPT = warm.ROOT / CODE / "ch10_network_diagnostics.py"
FAST = "--repeats 3 --batches 2 --bytes 64K --sweep-bytes 64K"
Run = Callable[..., warm.Result]
Pair = tuple[int, int]

script = warm.load("ch10_network_diagnostics", SCRIPT)


def simulated(
    draw: random.Random, n: int, per_node: int, ranks: set[int], links: set[Pair]
) -> list[dict[Pair, float]]:
    """Three passes over the pairs of n ranks: links between nodes take ten times as long as inside;
    noise of 10 %; three pairs in a hundred hit by a slow moment; slow parts by 3 to 10 times.
    """
    pairs = [(a, b) for a in range(n) for b in range(a + 1, n)]
    slower = {part: draw.uniform(3, 10) for part in [*ranks, *links]}
    passes = []
    for _ in range(script.PASSES):
        times = {}
        for pair in pairs:
            seconds = 5e-6 if pair[0] // per_node == pair[1] // per_node else 50e-6
            for part in (pair[0], pair[1], pair):
                seconds *= slower.get(part, 1.0)
            seconds *= draw.lognormvariate(0, 0.1)
            times[pair] = seconds * (draw.uniform(2, 20) if draw.random() < 0.03 else 1.0)
        passes.append(times)
    return passes


def verdicts_of(module: Any, seeds: int) -> dict[str, float]:
    """Shares of right answers over seeded clusters: with a slow rank, a slow link, and neither."""
    right = dict.fromkeys(("rank", "link", "neither", "both"), 0)
    for fault in right:
        for seed in range(seeds):
            draw = random.Random(f"{fault} {seed}")
            n = draw.choice([4, 5, 8, 16, 24])
            per_node = draw.choice([n, 8, 4])
            ranks = {draw.randrange(n)} if fault in ("rank", "both") else set()
            others = [rank for rank in range(n) if rank not in ranks]
            a, b = sorted(draw.sample(others, 2))
            links = {(a, b)} if fault in ("link", "both") else set()
            if per_node < n and n % per_node == 1:  # a node of one rank: see below
                per_node = n
            found = module.slow_parts(simulated(draw, n, per_node, ranks, links), n, per_node, 2.0)
            right[fault] += set(found[0]) == ranks and set(found[1]) == links
    return {fault: count / seeds for fault, count in right.items()}


def test_slow_ranks_and_links_are_named_rightly() -> None:
    """At least 95 % right, and at most 2 % false alarms where nothing is slow."""
    right = verdicts_of(script, 200)
    assert min(right["rank"], right["link"], right["both"]) >= 0.95, right
    assert right["neither"] >= 0.98, right


MUTANTS = {
    "a slow link makes a slow rank": ("if all(pair in slow", "if any(pair in slow"),
    "the slowest pass counts": ("min(times[pair] for times", "max(times[pair] for times"),
    "one kind of link": ("for inside in (True, False)", "for inside in (True,)"),
    "compared with the average": ("ordered[: (len(ordered) + 3) // 4]", "ordered"),
    "links of a slow rank are slow too": ("if not set(pair) & set(ranks))", ")"),
}


@pytest.mark.full
@pytest.mark.parametrize("name", MUTANTS)
def test_mutants(name: str) -> None:
    source = SCRIPT.read_text()
    right, wrong = MUTANTS[name]
    assert source.count(right) == 1
    source = source.replace(right, wrong)
    if name == "one kind of link":
        same = "(p[0] // ranks_per_node == p[1] // ranks_per_node) == inside"
        assert source.count(same) == 1
        source = source.replace(same, "p")
    module = ModuleType("mutant")
    exec(compile(source, str(SCRIPT), "exec"), module.__dict__)  # noqa: S102 - the book's own
    right_share = verdicts_of(module, 60)
    assert min(right_share.values()) < 0.9, right_share


def test_three_ranks_tell_a_rank_from_a_link() -> None:
    """A slow rank of three leaves one good pair, and that is enough. Two ranks have nothing else."""
    good, bad = 1e-6, 5e-6
    of_rank_1 = {(0, 1): bad, (0, 2): good, (1, 2): bad}
    assert script.slow_parts([of_rank_1], 3, 3, 2.0)[:2] == ([1], [])
    of_link = {(0, 1): bad, (0, 2): good, (1, 2): good}
    assert script.slow_parts([of_link], 3, 3, 2.0)[:2] == ([], [(0, 1)])
    assert script.slow_parts([{(0, 1): bad}], 2, 2, 2.0)[:2] == ([], [])
    assert script.slow_parts([{}], 1, 1, 2.0)[:2] == ([], [])
    assert "fewer than three ranks" in script.verdicts([], [], 2)[0]


def settings_in_rank(by_rank: list[dict[str, str]]) -> dict[str, str]:
    import os

    import torch.distributed as dist

    os.environ |= by_rank[dist.get_rank()]
    return dict(script.settings_of_all())


def test_settings_are_explained_and_compared() -> None:
    same = {"NCCL_IB_DISABLE": "1", "NCCL_IB_DISABEL": "1", "NCCL_P2P_DISABLE": "0"}
    same |= {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"}
    by_rank = [same | {"NCCL_IB_HCA": card} for card in ("mlx5_0", "mlx5_0", "mlx5_3")]
    for lines in warm.fork_ranks(settings_in_rank, 3, by_rank):
        assert lines["NCCL_IB_DISABLE=1"].startswith("! 1: no InfiniBand")
        assert "is it spelled right?" in lines["NCCL_IB_DISABEL=1"]
        assert lines["NCCL_P2P_DISABLE=0"].startswith("1: no NVLink"), "no warning of what is off"
        assert lines["NCCL_IB_HCA=mlx5_0"] == "! not the same everywhere: mlx5_3 on rank 2"
        assert not any("ASYNC" in name for name in lines), "torchrun sets it"


@pytest.mark.full
@pytest.mark.parametrize(
    ("ranks", "flags", "says"),
    [
        (1, "", "fewer than three ranks"),
        (2, "", "fewer than three ranks"),
        (3, "--slow-rank 0", "rank 0 is slow, all its 2 links are"),
        (5, "--slow-link 4-2", "link 2-4 is slow"),
    ],
)
def test_on_any_number_of_ranks(
    run: Run, tmp_path: Path, ranks: int, flags: str, says: str
) -> None:
    result = run(
        f"torchrun --nproc_per_node={ranks} {CODE}/{SCRIPT.name} {FAST} {flags} "
        f"--delay-ms 20 --json {tmp_path}/a.json"
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"verdict: {says}" in result.stdout
    content = json.loads((tmp_path / "a.json").read_text())
    assert len(content["fastest_s"]["8"]) == ranks * (ranks - 1) // 2


def messages_in_rank(wrong: bool) -> int:
    import torch
    import torch.distributed as dist

    args = SimpleNamespace(slow_rank=None, slow_link=None, delay_ms=0, repeats=3)
    if wrong and dist.get_rank() == 1:  # an echo of what came in
        patched: Any = torch.Tensor
        patched.add_ = lambda message, _: message
    return script.time_all(8, args, torch.device("cpu"))[1]


@pytest.mark.full
def test_wrong_messages_are_counted() -> None:
    assert warm.fork_ranks(messages_in_rank, 3, False) == [0, 0, 0]
    assert warm.fork_ranks(messages_in_rank, 3, True)[0] > 0


@pytest.mark.full
@pytest.mark.parametrize(
    ("ranks", "flags", "says"),
    [
        (2, "--slow-rank 1", "with two ranks a slow rank is a slow link"),
        (4, "--slow-rank 4", "rank 4 is not one of 4 ranks"),
        (4, "--slow-link 1-1", "invalid parse_link value: '1-1'"),
        (4, "--slow-link 1", "invalid parse_link value: '1'"),
        (2, "--bytes 8", "give --bytes 16 or more"),
    ],
)
def test_bad_input(run: Run, ranks: int, flags: str, says: str) -> None:
    result = run(f"torchrun --nproc_per_node={ranks} {CODE}/{SCRIPT.name} {flags}", timeout=60)
    assert result.returncode not in (0, warm.TIMED_OUT)
    assert "Traceback" not in result.stderr
    assert says in result.stderr
