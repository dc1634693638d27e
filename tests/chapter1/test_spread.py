"""A NaN in one rank's weights is a difference, whichever rank has it, though MIN and MAX drop it."""

import math

import pytest
import torch
import torch.distributed as dist
import warm
from book import CHAPTERS
from torch import nn

SCRIPT = str(warm.ROOT / CHAPTERS[0] / "code/ch01_multi_gpu_ddp.py")


def spread_in_rank(weights: list[float]) -> bool:
    """In a rank: whether the check of the spread holds for a model with this one weight."""
    script = warm.load("ch01_multi_gpu_ddp", SCRIPT)
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(weights[dist.get_rank()])
    return script.check("spread", script.max_spread(model), 0)


@pytest.mark.parametrize(
    ("weights", "equal"),
    [([1.0, 1.0], True), ([1.0, 1.5], False), ([math.nan, 1.0], False), ([1.0, math.nan], False)],
)
def test_spread(weights: list[float], equal: bool) -> None:
    assert all(warm.fork_ranks(spread_in_rank, 2, weights)) is equal
