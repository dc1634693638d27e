"""Context and expert parallelism: at every world size, with bad input, and broken on purpose."""

from collections.abc import Callable
from pathlib import Path

import book
import checks
import pytest
import warm

CODE = Path("chapter2-gpu-hardware-networking-and-parallelism-strategies/code")
CONTEXT, EXPERT = "context_parallel_from_scratch.py", "expert_parallel_from_scratch.py"
SHORT = f"{CONTEXT} --seq 101 --heads 3 --head-dim 8 --repeats 1"
SMALL = f"{EXPERT} --tokens 50 --experts 5 --width 16 --hidden 24 --capacity 0 1"
Run = Callable[..., warm.Result]


def torchrun(world_size: int, line: str) -> str:
    return f"torchrun --nproc_per_node={world_size} {CODE}/{line}"


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "line",
    [
        f"{SHORT} --seed 1",
        f"{SHORT} --seed 2 --seq 59 --dtype bfloat16",
        f"{SMALL} --seed 1",
        f"{SMALL} --seed 2 --experts 7 --top-k 3 --dtype bfloat16",
    ],
)
def test_every_world_size(run: Run, line: str, world_size: int) -> None:
    """A script's own checks are the test: it compares itself with one process."""
    command = torchrun(world_size, line)
    parsed, result = book.parse_command(command), run(command)
    problems = checks.evidence(parsed, result)
    assert not problems, checks.report(parsed, result, problems)
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (SHORT, "torchrun --nproc_per_node=2"),
        (SMALL, "torchrun --nproc_per_node=2"),
        (f"{SHORT} --seq 0", "--seq"),
        (f"{SHORT} --heads -1", "--heads"),
        (f"{SHORT} --order spiral", "--order"),
        (f"{SHORT} --dtype int8", "--dtype"),
        (f"{SHORT} --json no-such-folder/x.json", "no-such-folder"),
        (f"{SMALL} --tokens 0", "--tokens"),
        (f"{SMALL} --capacity -1", "--capacity"),
        (f"{SMALL} --capacity nan", "--capacity"),
        (f"{SMALL} --dtype int8", "--dtype"),
        (f"{SMALL} --top-k 6", "type --experts 6 or more"),
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
        (f"{SHORT} --seq 5", "type --seq 6 or more"),
        (f"{SHORT} --device abacus", "type --device cpu"),
        (f"{SMALL} --experts 2", "type --experts 3 or more"),
    ],
)
def test_bad_input_to_several_ranks(run: Run, line: str, says: str) -> None:
    """Each rank says the one line; none hangs, none prints a traceback."""
    result = run(torchrun(3, line), timeout=30)
    assert result.returncode not in (0, warm.TIMED_OUT)
    assert {says in line for line in result.stderr.splitlines()} == {True}, result.stderr


CONTEXT_MUTANTS = [
    # every block of keys gets a softmax of its own
    ("out += (scores - new_lse).exp() @ v.float()", "out += scores.softmax(dim=-1) @ v.float()"),
    # what was added under an older sum stays as it was
    ("out *= (lse - new_lse).exp()", "pass"),
    ("key > query[:, None]", "key > query[:, None] + 1"),
    # the first query sees nothing: NaN is no success
    ("key > query[:, None]", "key >= query[:, None]"),
    # the last exchange is left out
    ("for step in range(world_size - 1):", "for step in range(world_size - 2):"),
    # dK and dV stay one hop from home
    ("if len(shards) > 1:", "if owner != (dist.get_rank() + 1) % len(shards):"),
    # backward normalises each block by itself
    ("(scores_of(q_i, k_j, rows, columns) - lse_i).exp()",
     "scores_of(q_i, k_j, rows, columns).softmax(dim=-1)"),
    (" - delta_i)", ")"),
    # each rank keeps the weight gradient of its own tokens
    ("dist.all_reduce(whole)", "dist.all_reduce(whole) if i < 4 else None"),
    # both chunks early or both late: exact, and unbalanced
    ("chunks[rank], chunks[-1 - rank]", "chunks[2 * rank], chunks[2 * rank + 1]"),
]  # fmt: skip
EXPERT_MUTANTS = [
    ("gates = best.softmax(dim=-1)", "gates = best.softmax(dim=-1).detach()"),
    ("gates = best.softmax(dim=-1)", "gates = logits.softmax(dim=-1).gather(1, chosen)"),
    ("(place < capacity_of(", "(place <= capacity_of("),
    # a token over capacity travels all the same
    ("routing.kept.nonzero(", "torch.ones_like(routing.kept).nonzero("),
    ("returned * routing.gates[token, choice, None]", "returned * 1.0"),
    # rows go home in the order of the experts, not of their senders
    ("done = done[by_expert.argsort()]", "pass"),
    # the way back is not taken: no gradient reaches the experts of other ranks
    ('return send_rows(d_received, incoming, outgoing, "backward"), None, None',
     "return d_received.new_zeros(sum(outgoing), d_received.shape[1]), None, None"),
    ("logits.softmax(dim=-1).mean(dim=0)).sum()",
     "logits.detach().softmax(dim=-1).mean(dim=0)).sum()"),
    ("for tensor in (loss, d_router):", "for tensor in (loss,):"),
    # the residual is lost, and with it every dropped token
    ("x.float().index_add(", "torch.zeros_like(x).float().index_add("),
    ("[expert(part) for",
     "[expert[1:](part @ expert[0].weight.T + 0 * expert[0].bias) for"),
    ("(len(rows) - outgoing[dist.get_rank()])", "len(rows)"),
]  # fmt: skip


def run_mutant(run: Run, checkout: Path, line: str, right: str, wrong: str) -> warm.Result:
    name, _, flags = line.partition(" ")
    source = (checkout / CODE / name).read_text()
    assert source.count(right) == 1
    mutant = checkout / CODE / f"mutant_{name}"
    mutant.write_text(source.replace(right, wrong))
    result = run(torchrun(2, f"{mutant.name} {flags}"), timeout=40)
    mutant.unlink()
    return result


@pytest.mark.parametrize(
    ("line", "right", "wrong"),
    [(f"{SHORT} --seq 96", *mutant) for mutant in CONTEXT_MUTANTS]
    + [(SMALL, *mutant) for mutant in EXPERT_MUTANTS],
)
def test_mutants_are_caught(run: Run, checkout: Path, line: str, right: str, wrong: str) -> None:
    """Break the script: its own checks must see it, and its exit code must say so."""
    result = run_mutant(run, checkout, line, right, wrong)
    assert result.returncode == 1
    assert "FAILED" in result.stdout


def test_backward_with_unswapped_splits_does_not_run(run: Run, checkout: Path) -> None:
    """The gradient of what came in does not fit the splits of what went out."""
    right = "send_rows(d_received, incoming, outgoing, "
    result = run_mutant(run, checkout, SMALL, right, "send_rows(d_received, outgoing, incoming, ")
    assert result.returncode not in (0, warm.TIMED_OUT)


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_every_position_has_one_owner(checkout: Path, order: str) -> None:
    script = warm.load("context_parallel", checkout / CODE / CONTEXT)
    for world_size, seq in [(1, 2), (2, 4), (3, 101), (8, 1000)]:
        shards = script.cut(seq, world_size, order)
        held = [position for shard in shards for chunk in shard for position in chunk]
        assert sorted(held) == list(range(seq))
        sizes = {len(chunk) for shard in shards for chunk in shard}
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("tokens", "experts", "k", "factor", "rows"),
    [(50, 5, 2, 1.0, 20), (50, 5, 2, 1.1, 22), (51, 5, 2, 1.0, 21), (7, 8, 1, 1.0, 1), (9, 3, 2, 0, 18)],
)  # fmt: skip
def test_capacity(
    checkout: Path, tokens: int, experts: int, k: int, factor: float, rows: int
) -> None:
    """By hand; 2 x 50 x 1.1 / 5 is 22 and a rounding error, and must not become 23."""
    script = warm.load("expert_parallel", checkout / CODE / EXPERT)
    assert script.capacity_of(tokens, experts, k, factor) == rows
