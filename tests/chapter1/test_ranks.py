"""Chapter 1's scripts of several ranks: at other world sizes, with bad input, broken on purpose."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import warm
from mutants import Case, failed_claims

pytestmark = pytest.mark.full
CODE = warm.ROOT / "chapter1-introduction-to-modern-distributed-ai" / "code"
DDP, COLLECTIVES, PITFALLS, INFERENCE = (
    CODE / f"ch01_{name}.py"
    for name in ("multi_gpu_ddp", "collectives", "ddp_pitfalls", "distributed_inference")
)
SMALL_DDP = "--steps 2 --batch 3 --context 48 --width 24 --layers 1 --heads 3"
SMALL_INFERENCE = "--requests 7 --longest 20 --repeats 1 --width 16"


@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_other_world_sizes(world_size: int) -> None:
    """A script's own checks are the test: it compares itself with one process."""
    seeds = [f"{SMALL_DDP} --seed {seed}" for seed in (1, 20260101)]
    assert failed_claims(DDP, world_size, [(flags, "", "") for flags in seeds]) == [set(), set()]
    assert failed_claims(COLLECTIVES, world_size, [("", "", "")]) == [set()]
    inference = (f"{SMALL_INFERENCE} --seed 20260101", "", "")
    assert failed_claims(INFERENCE, world_size, [inference]) == [set()]
    if world_size > 1:
        assert failed_claims(PITFALLS, world_size, [("--seed 20260101", "", "")]) == [set()]


MUTANTS: dict[Path, list[Case]] = {
    DDP: [
        # no gradient is averaged: in the comparison, and in the run
        (SMALL_DDP, "DistributedDataParallel(build(args, device).double())", "build(args, device).double()"),
        (SMALL_DDP, "model = DistributedDataParallel(build(args, device))", "model = build(args, device)"),
        # every rank trains on the share of rank 0
        (SMALL_DDP, "ddp_optimizer, tokens[rank], targets[rank])", "ddp_optimizer, tokens[0], targets[0])"),
    ],
    COLLECTIVES: [
        ("", "dist.all_reduce(after.copy_(tensor))", "after.copy_(tensor)"),
        ("", "dist.all_to_all_single(after, tensor)", "dist.reduce_scatter(slots[rank], chunks)"),
    ],
    PITFALLS: [
        ("--only epochs", "sampler.set_epoch(1)", "pass"),
        ("--only padding", "strided = dataset[rank::world_size]", "strided = padded"),
        ("--only seeds", "start(args.seed, rank_seed)", "start(args.seed, args.seed)"),
        ("--only metrics", "error = abs(pooled - truth)", "error = abs(mean_of_means - truth)"),
        ("--only saving", 'draft = path.with_suffix(".draft")', "draft = path"),
        # the sum's gradient stays on its rank
        ("--only batchnorm", "return SumOverRanks.forward(ctx, gradient.contiguous())", "return gradient"),
        # Join would divide by the ranks that are still there
        ("--only uneven", "divisor=world_size)", "divisor=1)"),
    ],
    # two ranks draw the same ticket
    INFERENCE: [(SMALL_INFERENCE, "store.add(name, 1) - 1", "store.add(f'{name} {dist.get_rank()}', 1) - 1")],
}  # fmt: skip


@pytest.mark.parametrize("script", MUTANTS, ids=lambda script: script.stem)
def test_mutants_are_caught(script: Path) -> None:
    """Break the script: its own checks must see it."""
    found = failed_claims(script, 2, MUTANTS[script])
    for (flags, right, _), failed in zip(MUTANTS[script], found, strict=True):
        assert failed, f"{flags}: {right}"


def test_a_group_wants_a_launcher_and_a_device_for_each_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = warm.load("refusing", DDP)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    ranks = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4"}
    cases: list[tuple[str, dict[str, str], str]] = [
        ("auto", {}, "no launcher: type  torchrun --nproc_per_node=2"),
        ("cuda", ranks, "2 ranks, but 0 GPUs here: type --device cpu"),
        ("auto", ranks, "several nodes may differ: type --device cuda"),
    ]
    for wanted, environment, says in cases:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit, match="2"):
            module.join_group(wanted)
        assert capsys.readouterr().err.startswith(says)


@pytest.mark.parametrize(
    ("world_size", "line", "says"),
    [
        (2, "ch01_multi_gpu_ddp.py --data no-such-file", "give a text file with --data FILE"),
        (1, "ch01_ddp_pitfalls.py", "needs two ranks: type  torchrun --nproc_per_node=2"),
    ],
)
def test_each_rank_says_one_line(
    run: Callable[..., warm.Result], world_size: int, line: str, says: str
) -> None:
    """None hangs, none prints a traceback."""
    code = CODE.relative_to(warm.ROOT)
    result = run(f"torchrun --nproc_per_node={world_size} {code}/{line}")
    assert result.returncode not in (0, warm.TIMED_OUT)
    assert {says in line for line in result.stderr.splitlines()} == {True}, result.stderr
