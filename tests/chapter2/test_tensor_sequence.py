"""Tensor and sequence parallelism: every world size, sizes that do not divide, and broken code."""

from collections.abc import Callable
from pathlib import Path

import book
import checks
import pytest
import warm

CODE = Path("chapter2-gpu-hardware-networking-and-parallelism-strategies/code")
Run = Callable[..., warm.Result]
UNEVEN = "--width 24 --heads 5 --head-dim 4 --ffn 37 --layers 1"
TENSOR = f"tensor_parallel_from_scratch.py {UNEVEN} --batch 2 --seq 7 --vocab 61"
SEQUENCE = f"sequence_parallel_from_scratch.py {UNEVEN} --seq 23"


def torchrun(world_size: int, line: str) -> str:
    return f"torchrun --nproc_per_node={world_size} {CODE}/{line}"


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize(("dtype", "seed"), [("float32", 1), ("float32", 2), ("bfloat16", 2)])
@pytest.mark.parametrize("line", [TENSOR, SEQUENCE], ids=["tensor", "sequence"])
def test_equal_to_one_process(run: Run, line: str, dtype: str, seed: int, world_size: int) -> None:
    """A script's own checks are the test: it compares itself with one process."""
    command = torchrun(world_size, f"{line} --dtype {dtype} --seed {seed}")
    result, parsed = run(command), book.parse_command(command)
    problems = checks.evidence(parsed, result)
    assert not problems, checks.report(parsed, result, problems)
    assert result.stderr == ""


def column(stdout: str, row: str, index: int) -> list[int]:
    found = [line.split()[index] for line in stdout.splitlines() if line.startswith(row)]
    return [int(word.replace(",", "")) for word in found]


def test_one_rank_sends_nothing(run: Run) -> None:
    stdout = run(torchrun(1, TENSOR)).stdout
    assert "in all 0 bytes sent per rank" in stdout
    assert column(run(torchrun(1, SEQUENCE)).stdout, "tensor parallel", 2) == [0]


def test_what_sequence_parallelism_saves(run: Run) -> None:
    """Of 16 numbers kept per token and unit of width, 4, then 2, then none are not divided."""
    stdout = run(torchrun(4, "sequence_parallel_from_scratch.py --seq 64 --heads 8")).stdout
    ways = ("one process", "tensor parallel", "+ sequence", "+ gather again")
    whole, *split = (column(stdout, way, len(way.split()) + 1)[0] for way in ways)
    assert [kept / whole for kept in split] == pytest.approx([7 / 16, 5.5 / 16, 4 / 16], rel=0.1)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (TENSOR, "type  torchrun --nproc_per_node=2"),
        (SEQUENCE, "type  torchrun --nproc_per_node=2"),
        (f"{TENSOR} --width 0", "--width"),
        (f"{SEQUENCE} --seq -3", "--seq"),
        (f"{TENSOR} --heads 1.5", "--heads"),
        (f"{SEQUENCE} --dtype float8", "--dtype"),
        (f"{TENSOR} --no-such-flag", "--help"),
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
        (f"{TENSOR} --vocab 2", "3 ranks: type --heads, --ffn and --vocab of 3 or more"),
        (f"{SEQUENCE} --seq 2", "3 ranks: type --heads, --ffn and --seq of 3 or more"),
        (f"{TENSOR} --device abacus", "3 ranks, but 0 abacus devices: type --device cpu"),
    ],
)
def test_bad_input_to_several_ranks(run: Run, line: str, says: str) -> None:
    result = run(torchrun(3, line), timeout=30)
    assert result.returncode not in (0, warm.TIMED_OUT)
    assert set(result.stderr.splitlines()) == {says}


@pytest.mark.parametrize(
    ("line", "right", "wrong"),
    [
        # every rank adds the bias
        (TENSOR, 'total + weights[f"{name}.bias"]', 'total + dist.get_world_size() * weights[f"{name}.bias"]'),
        # f: the gradient of a column-parallel layer's input is not summed
        (TENSOR, "return all_reduce(gradient, ctx.where, backward=True), None", "return gradient, None"),
        # g: a row-parallel layer's output is not summed; its gradient is
        (TENSOR, "return all_reduce(x, where)", "return x.clone()"),
        (TENSOR, "        return gradient, None", "        return all_reduce(gradient, '', backward=True), None"),
        # the loss normalised per shard, with the shard's maximum, with other shards' targets
        (TENSOR, 'exponentials = ReduceFromTensorParallel.apply(exponentials, "cross-entropy")', "pass"),
        (TENSOR, 'all_reduce(logits.detach().amax(-1), "cross-entropy", op=dist.ReduceOp.MAX)', "logits.detach().amax(-1)"),
        (TENSOR, ".squeeze(-1) * mine", ".squeeze(-1)"),
        (TENSOR, "(exponentials.log() +", "(exponentials.log() * float('nan') +"),
        (TENSOR, "F.embedding(rows, table) * mine[..., None]", "F.embedding(rows, table)"),
        # a head cut in two
        (TENSOR, '"qkv.weight": 1, "qkv.bias": 1', '"qkv.weight": 2, "qkv.bias": 2'),
        (SEQUENCE, '"qkv.weight": 1, "qkv.bias": 1', '"qkv.weight": 2, "qkv.bias": 2'),
        # gradients from this rank's tokens only: of the norms, of the biases
        (SEQUENCE, 'not in CUT:', 'not in CUT and "norm" not in name:'),
        (SEQUENCE, 'not in CUT:', 'not in CUT and "norm" in name:'),
        (SEQUENCE, 'LEAVE[mode], seq) + weights', 'LEAVE[mode], seq) + (1 if mode == "whole" else dist.get_world_size()) * weights'),
        # scatter without reduce: in both passes, and where the tokens are gathered again
        (SEQUENCE, '"sequence": (all_gather, reduce_scatter)', '"sequence": (all_gather, lambda x, seq: shard("input", x, "sequence"))'),
        (SEQUENCE, "reduce_scatter(gradient @ weight, ctx.seq)", 'shard("input", gradient @ weight, "sequence")'),
        (SEQUENCE, '"tensor": (identity, all_reduce)', '"tensor": (identity, identity)'),
    ],
)  # fmt: skip
def test_mutants_are_caught(run: Run, checkout: Path, line: str, right: str, wrong: str) -> None:
    """Break the script: the comparison with one process must see it, whatever else does."""
    assert any("error" in claim for claim in failed_claims(run, checkout, line, right, wrong))


@pytest.mark.parametrize(
    ("line", "right", "wrong", "claim"),
    [
        (TENSOR, "total.nbytes] += 1", "total.nbytes] += 2", "bytes counted"),
        (SEQUENCE, 'payload["gather"] += whole.nbytes', 'payload["gather"] += x.nbytes', "bytes sent"),
        # all tokens are kept although they are gathered again
        (SEQUENCE, "GatherLinear.apply(x, weight, bias, seq)", 'F.linear(Communicate.apply(x, ENTER["sequence"], seq), weight, bias)', "bytes kept"),
    ],
)  # fmt: skip
def test_wrong_accounts_are_caught(
    run: Run, checkout: Path, line: str, right: str, wrong: str, claim: str
) -> None:
    """The numbers stay right here, and their cost is not what the script says."""
    failed = failed_claims(run, checkout, line, right, wrong)
    assert any(claim in row for row in failed)
    assert not any("error" in row for row in failed)


def failed_claims(run: Run, checkout: Path, line: str, right: str, wrong: str) -> list[str]:
    name, _, flags = line.partition(" ")
    source = (checkout / CODE / name).read_text()
    assert source.count(right) == 1
    mutant = checkout / CODE / f"mutant_{name}"
    mutant.write_text(source.replace(right, wrong))
    result = run(torchrun(2, f"{mutant.name} {flags} --heads 6"), timeout=40)
    mutant.unlink()
    assert result.returncode == 1
    return [row for row in result.stdout.splitlines() if row.endswith("FAILED")]
