"""ZeRO by hand: other world sizes, sizes that do not divide, and broken ideas."""

import pytest
import warm
from book import CHAPTERS
from mutants import failed_claims

SCRIPT = warm.ROOT / CHAPTERS[4] / "code" / "zero_from_scratch.py"
SMALL = "--width 22 --context 8 --layers 2 --bucket 1500"
MUTANTS = [  # a piece of the source, what it becomes, and a word of the claim that must fail
    ("        dist.all_reduce(self.gradients)\n", "", "gradient"),
    ("        dist.reduce_scatter_single(total, self.gradients)\n", "        total.copy_(self.part_of(self.gradients))\n", "gradient"),
    ("        dist.all_gather_single(self.weights, self.part)\n", "        pass\n", "weight"),
    ("                dist.reduce(piece, dst=owner)", "                dist.reduce(piece, dst=0)", "gradient"),
    ("        self.empty_bucket()\n        return", "        return", "gradient"),  # the last bucket
    ("(owner + 1) * size)\n            if low", "(owner + 1) * size - 1)\n            if low", "gradient"),
    (" * size] += piece", " * size] = piece", "gradient"),  # the last micro batch only
    ("        cut.gradients += total\n", "        cut.gradients.copy_(total)\n", "gradient"),
    ("            module.register_forward_hook(self.free_all)\n", "", "held"),
    ("        self.gradients = torch.zeros_like(self.part)\n        self.bucket", "        self.gradients = torch.zeros_like(self.weights)[: len(self.part)]\n        self.bucket", "held"),
    ("self.part.float() if self.part.itemsize == 2 else self.part", "self.part", "held"),
    ("3: micro_batches * 3 * unit", "3: (micro_batches + 2) * unit", "sent"),
    ("2: micro_batches * (total - in_part) + unit", "2: 2 * unit", "sent"),
]  # fmt: skip


def test_three_ranks_give_one_processs_numbers_at_every_stage() -> None:
    """Nothing divides by three: parameters, batch, micro batches."""
    assert failed_claims(SCRIPT, 3, [(SMALL, "", "")]) == [set()]


@pytest.mark.full
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_claims_hold_at_any_world_size(world_size: int) -> None:
    """Seeds, more micro batches than windows, a bucket of one number and one of everything."""
    flags = ("--batch 3", "--seed 3 --batch 4", "--bucket 1", "--bucket 99999")
    cases = [(f"{SMALL} {flag}", "", "") for flag in flags]
    assert failed_claims(SCRIPT, world_size, cases) == [set()] * len(cases)


@pytest.mark.full
def test_mutants_are_caught() -> None:
    cases = [(SMALL, right, wrong) for right, wrong, _ in MUTANTS]
    found = failed_claims(SCRIPT, 3, cases)
    for (right, _, claim), failed in zip(MUTANTS, found, strict=True):
        assert any(claim in line for line in failed), f"{right}: {failed}"
