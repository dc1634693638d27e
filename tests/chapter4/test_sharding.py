"""Sharding by hand and by fully_shard, strategies and rehearsals: other world sizes, broken ideas."""

import pytest
import warm
from book import CHAPTERS
from mutants import failed_claims

CODE = warm.ROOT / CHAPTERS[3] / "code"
FLAGS = {
    "fsdp_from_scratch": "--width 48 --context 8",
    "fsdp2_basic": "--width 22 --context 8 --layers 2",
    "fsdp_strategies": "--width 22 --context 8 --layers 2 --steps 3",
    "muon_fsdp2": "--width 22 --context 8 --layers 3",
    "master_weights": "--width 22 --context 32 --layers 2",
}
MUTANTS = {
    "fsdp_from_scratch": [
        (".div_(n)  # a mean", "  # a mean"),  # a sum over the ranks
        ("self.share.grad = mine if", "self.share.grad = flat.chunk(n)[0] if"),  # nobody's sum
        ("[unit.share for unit in (self.root, *self.units)]", "[u.share for u in self.units]"),
        ("received = (2 * root + 3 * sum(blocks))", "received = (2 * root + 2 * sum(blocks))"),
    ],
    "fsdp2_basic": [
        ("(loss * dist.get_world_size()).backward()", "loss.backward()"),
        ("chunk = -(-rows // n)", "chunk = rows // n"),
        ("len(model.blocks) + 1) + (0 if kept", "len(model.blocks) + 1) + (1 if kept"),
    ],
    "fsdp_strategies": [
        ("(loss * n).backward()  # grad", "loss.backward()  # grad"),
        ("tokens[dist.get_rank() :: dist", "tokens[0 :: dist"),  # all train on the same windows
        ("gathers = 1 if name", "gathers = 2 if name"),
    ],
    "muon_fsdp2": [
        ("newton_schulz(update.full_tensor())", "update.full_tensor()"),
        ("whole[rank * chunk : (rank + 1) * chunk]", "whole[:chunk][: len(shard)]"),
        ("newton_schulz(whole.view(own.shape))", "newton_schulz(whole.view(own.shape[::-1]))"),
        ("return sum((n - 1) *", "return sum(n *"),
    ],
    "master_weights": [
        (
            "exponent, dtype=torch.float), exponent - 8)",
            "exponent, dtype=torch.float), exponent - 7)",
        ),
        (".exponent - 1  # of", ".exponent  # of"),
        ("(args, torch.bfloat16, rate", "(args, torch.float32, rate"),  # no such loss
        ("small, same, moves.sum()]", "small, same * 2, moves.sum()]"),
    ],
}


@pytest.mark.full
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", FLAGS)
def test_claims_hold_at_any_world_size(name: str, world_size: int) -> None:
    cases = [(f"{FLAGS[name]} --seed {seed} --batch {4 + seed}", "", "") for seed in (0, 3)]
    assert failed_claims(CODE / f"{name}.py", world_size, cases) == [set(), set()]


@pytest.mark.full
@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str) -> None:
    cases = [(FLAGS[name], *mutant) for mutant in MUTANTS[name]]
    for mutant, failed in zip(
        MUTANTS[name], failed_claims(CODE / f"{name}.py", 3, cases), strict=True
    ):
        assert failed, mutant


@pytest.mark.full
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_rehearsal_counts_what_real_ranks_do(world_size: int) -> None:
    script = CODE / "rehearse_1024_ranks.py"
    result = warm.run(f"torchrun --nproc_per_node={world_size} {script}")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "layouts whose rehearsal counts otherwise = 0 <= 0  ok" in result.stdout
