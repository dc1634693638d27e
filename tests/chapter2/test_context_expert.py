"""Context and expert parallelism: at every world size, with bad input, and broken on purpose."""

from pathlib import Path

import pytest
import warm
from mutants import failed_claims

CODE = warm.ROOT / "chapter2-gpu-hardware-networking-and-parallelism-strategies/code"
CONTEXT = CODE / "context_parallel_from_scratch.py"
EXPERT = CODE / "expert_parallel_from_scratch.py"
SHORT = "--seq 96 --heads 3 --head-dim 8 --repeats 1"
SMALL = "--tokens 50 --experts 5 --width 16 --hidden 24 --capacity 0 1"
VARIANTS = {
    CONTEXT: (f"{SHORT} --seed 20260101 --seq 101", f"{SHORT} --seed 2 --seq 59 --dtype bfloat16"),
    EXPERT: (f"{SMALL} --seed 20260101", f"{SMALL} --experts 7 --top-k 3 --dtype bfloat16"),
}


@pytest.mark.full
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("script", VARIANTS, ids=lambda script: script.stem)
def test_every_world_size(script: Path, world_size: int) -> None:
    """A script's own checks are the test: it compares itself with one process."""
    cases = [(flags, "", "") for flags in VARIANTS[script]]
    assert failed_claims(script, world_size, cases) == [set()] * len(cases)


@pytest.mark.full
@pytest.mark.parametrize(
    ("script", "flags", "says"),
    [
        (CONTEXT, "--seq 5", "5 tokens do not make 6 chunks: type --seq 6 or more"),
        (EXPERT, "--experts 2", "2 experts: type --experts 3 or more, one per rank and choice"),
        (EXPERT, "--top-k 9", "8 experts: type --experts 9 or more, one per rank and choice"),
    ],
)
def test_refusals(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    script: Path,
    flags: str,
    says: str,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr("sys.argv", [str(script), *flags.split()])
    with pytest.raises(SystemExit) as ended:
        warm.load(script.stem, script).parse_args()
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"{says}\n"


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
]  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize(
    ("script", "flags", "mutants"),
    [(CONTEXT, SHORT, CONTEXT_MUTANTS), (EXPERT, SMALL, EXPERT_MUTANTS)],
    ids=["context", "expert"],
)
def test_mutants_are_caught(script: Path, flags: str, mutants: list[tuple[str, str]]) -> None:
    """Break the script: its own checks must see it."""
    cases = [(flags, right, wrong) for right, wrong in mutants]
    for mutant, failed in zip(mutants, failed_claims(script, 2, cases), strict=True):
        assert failed, mutant


@pytest.mark.full
def test_backward_with_unswapped_splits_does_not_run() -> None:
    """The gradient of what came in does not fit the splits of what went out."""
    right = "send_rows(d_received, incoming, outgoing, "
    wrong = "send_rows(d_received, outgoing, incoming, "
    with pytest.raises(warm.RankError):
        failed_claims(EXPERT, 2, [(SMALL, right, wrong)])


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_every_position_has_one_owner(order: str) -> None:
    script = warm.load(CONTEXT.stem, CONTEXT)
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
def test_capacity(tokens: int, experts: int, k: int, factor: float, rows: int) -> None:
    """By hand; 2 x 50 x 1.1 / 5 is 22 and a rounding error, and must not become 23."""
    script = warm.load(EXPERT.stem, EXPERT)
    assert script.capacity_of(tokens, experts, k, factor) == rows
