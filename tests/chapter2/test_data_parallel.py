"""Data parallelism and ZeRO: other world sizes, seeds and dtypes, uneven shares, and broken code."""

from pathlib import Path

import pytest
import warm
from mutants import failed_claims

pytestmark = pytest.mark.full
CODE = Path("chapter2-gpu-hardware-networking-and-parallelism-strategies/code")
DATA = warm.ROOT / CODE / "data_parallel_from_scratch.py"
FLAGS = f"--data {warm.ROOT}/README.md --steps 3 --width 33 --layers 2"


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_world_size(world_size: int) -> None:
    """A script's own checks are the test: it compares itself with one process."""
    variants = (
        "--batch 7 --seed 20260101",
        "--batch 2 --seed 2 --dtype float64",  # a rank of three has no window at all
        "--batch 9 --dtype bfloat16",
    )
    cases = [(f"{FLAGS} {more}", "", "") for more in variants]
    assert failed_claims(DATA, world_size, cases) == [set()] * len(cases)


MUTANTS = [  # a piece of the source, what it becomes, and the claim that must fail
    # a sum for a mean: AdamW all but hides it, the gradient does not
    ('reduction="sum") / batch', 'reduction="sum") / len(tokens)', "first gradient"),
    # the mean of the shares' means, though one has 4 windows and the other 3
    ('F.cross_entropy(x, targets, reduction="sum") / batch',
     "F.cross_entropy(x, targets) / dist.get_world_size()", "first gradient"),
    ("dist.all_reduce(gradient)", "pass", "first gradient"),
    # one unit's gradient stays what this rank found
    ("dist.reduce_scatter(total, shards)", "dist.reduce_scatter(total, shards) "
     "if unit is not self.units[1] else total.copy_(shards[rank])", "first gradient"),
    # each rank goes on with what it updated itself
    ("for unit in self.units if self.shard_state and not self.shard_weights else ():",
     "for unit in ():", "weights after"),
    # ZeRO-2 in name only
    ("parameter.grad = None", "pass", "bytes held"),
    # weights that are never given back while the forward pass goes on
    ("            x = y\n            if self.shard_weights:\n                unit.free()\n",
     "            x = y\n", "beyond one unit"),
]  # fmt: skip


def test_mutants_are_caught() -> None:
    cases = [(f"{FLAGS} --batch 7", right, wrong) for right, wrong, _ in MUTANTS]
    for (right, _, claim), failed in zip(MUTANTS, failed_claims(DATA, 2, cases), strict=True):
        assert any(claim in line for line in failed), right
