"""Tensor and sequence parallelism: every world size, sizes that do not divide, and broken code."""

from collections.abc import Callable
from pathlib import Path

import pytest
import warm
from mutants import failed_claims

pytestmark = pytest.mark.full
CODE = Path("chapter2-gpu-hardware-networking-and-parallelism-strategies/code")
Run = Callable[..., warm.Result]
UNEVEN = "--width 24 --heads 5 --head-dim 4 --ffn 37 --layers 1"
FLAGS = {
    "tensor_parallel_from_scratch.py": f"{UNEVEN} --batch 2 --seq 7 --vocab 61",
    "sequence_parallel_from_scratch.py": f"{UNEVEN} --seq 23",
}
TENSOR, SEQUENCE = FLAGS


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("script", FLAGS)
def test_equal_to_one_process(script: str, world_size: int) -> None:
    """A script's own checks are the test: it compares itself with one process."""
    variants = ("--seed 1", "--seed 20260101", "--seed 2 --dtype bfloat16")
    cases = [(f"{FLAGS[script]} {more}", "", "") for more in variants]
    assert failed_claims(warm.ROOT / CODE / script, world_size, cases) == [set()] * len(cases)


def column(stdout: str, row: str, index: int) -> list[int]:
    found = [line.split()[index] for line in stdout.splitlines() if line.startswith(row)]
    return [int(word.replace(",", "")) for word in found]


def test_one_rank_sends_nothing(run: Run) -> None:
    torchrun = f"torchrun --nproc_per_node=1 {CODE}"
    assert "in all 0 bytes sent per rank" in run(f"{torchrun}/{TENSOR} {FLAGS[TENSOR]}").stdout
    stdout = run(f"{torchrun}/{SEQUENCE} {FLAGS[SEQUENCE]}").stdout
    assert column(stdout, "tensor parallel", 2) == [0]


def test_what_sequence_parallelism_saves(run: Run) -> None:
    """Of 16 numbers kept per token and unit of width, 4, then 2, then none are not divided."""
    stdout = run(f"torchrun --nproc_per_node=4 {CODE}/{SEQUENCE} --seq 64 --heads 8").stdout
    ways = ("one process", "tensor parallel", "+ sequence", "+ gather again")
    whole, *split = (column(stdout, way, len(way.split()) + 1)[0] for way in ways)
    assert [kept / whole for kept in split] == pytest.approx([7 / 16, 5.5 / 16, 4 / 16], rel=0.1)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (f"{TENSOR} --vocab 2", "3 ranks: type --heads, --ffn and --vocab of 3 or more"),
        (f"{SEQUENCE} --seq 2", "3 ranks: type --heads, --ffn and --seq of 3 or more"),
    ],
)
def test_bad_input_to_several_ranks(run: Run, line: str, says: str) -> None:
    result = run(f"torchrun --nproc_per_node=3 {CODE}/{line}")
    assert result.returncode not in (0, warm.TIMED_OUT)
    assert set(result.stderr.splitlines()) == {says}


MUTANTS = {
    TENSOR: [
        # every rank adds the bias
        ('total + weights[f"{name}.bias"]', 'total + dist.get_world_size() * weights[f"{name}.bias"]'),
        # f: the gradient of a column-parallel layer's input is not summed
        ("return all_reduce(gradient, ctx.where, backward=True), None", "return gradient, None"),
        # g: a row-parallel layer's output is not summed; its gradient is
        ("return all_reduce(x, where)", "return x.clone()"),
        ("        return gradient, None", "        return all_reduce(gradient, '', backward=True), None"),
        # the loss normalised per shard, with the shard's maximum, with other shards' targets
        ('exponentials = ReduceFromTensorParallel.apply(exponentials, "cross-entropy")', "pass"),
        ('all_reduce(logits.detach().amax(-1), "cross-entropy", op=dist.ReduceOp.MAX)', "logits.detach().amax(-1)"),
        (".squeeze(-1) * is_here", ".squeeze(-1)"),
        # rows of tokens that are elsewhere
        ("F.embedding(rows, table) * is_here[..., None]", "F.embedding(rows, table)"),
        # a head cut in two
        ('"qkv.weight": 1, "qkv.bias": 1', '"qkv.weight": 2, "qkv.bias": 2'),
    ],
    SEQUENCE: [
        ('"qkv.weight": 1, "qkv.bias": 1', '"qkv.weight": 2, "qkv.bias": 2'),
        # gradients from this rank's tokens only: of the norms, of the biases
        ("not in CUT:", 'not in CUT and "norm" not in name:'),
        ("not in CUT:", 'not in CUT and "norm" in name:'),
        ("LEAVE[mode], seq) + weights", 'LEAVE[mode], seq) + (1 if mode == "whole" else dist.get_world_size()) * weights'),
        # scatter without reduce: in both passes, and where the tokens are gathered again
        ('"sequence": (all_gather, reduce_scatter)', '"sequence": (all_gather, lambda x, seq: own_part("sequence", "input", x))'),
        ("reduce_scatter(gradient @ weight, ctx.seq)", 'own_part("sequence", "input", gradient @ weight)'),
        ('"tensor": (identity, all_reduce)', '"tensor": (identity, identity)'),
    ],
}  # fmt: skip


@pytest.mark.parametrize("script", MUTANTS)
def test_mutants_are_caught(script: str) -> None:
    """Break the script: the comparison with one process must see it, whatever else does."""
    cases = [(f"{FLAGS[script]} --heads 6", *mutant) for mutant in MUTANTS[script]]
    found = failed_claims(warm.ROOT / CODE / script, 2, cases)
    for (_, right, _), failed in zip(cases, found, strict=True):
        assert any("worst error" in line for line in failed), right


def test_tokens_that_are_kept_are_seen() -> None:
    """Gathered again and kept all the same: the numbers stay right, the memory does not."""
    right = "GatherLinear.apply(x, weight, bias, seq)"
    wrong = 'F.linear(Communicate.apply(x, ENTER["sequence"], seq), weight, bias)'
    case = (f"{FLAGS[SEQUENCE]} --heads 6", right, wrong)
    (failed,) = failed_claims(warm.ROOT / CODE / SEQUENCE, 2, [case])
    assert any("bytes kept" in line for line in failed)
    assert not any("error" in line for line in failed)
