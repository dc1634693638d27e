"""Mixed precision: the formats, every world size, an overflow on one rank, and what must not pass."""

import pytest
import torch
import warm
from mutants import failed_claims

SCRIPT = warm.ROOT / "chapter3-distributed-training-with-pytorch-ddp/code/amp_ddp_example.py"
SMALL = "--steps 6 --width 32 --layers 1"


def test_formats_have_the_digits_and_the_range_that_the_chapter_says() -> None:
    amp = warm.load("chapter3_amp", SCRIPT)
    for name, dtype in amp.DTYPES.items():
        assert torch.finfo(dtype).eps == 2.0 ** (1 - amp.BITS[name])
    assert torch.finfo(torch.float16).max == 65504
    assert torch.finfo(torch.float16).tiny == pytest.approx(6.1e-5, rel=0.01)
    one = torch.tensor(1.0, dtype=torch.bfloat16)
    assert one + 0.003 == one
    half = torch.tensor(1.0, dtype=torch.float16)
    assert half + 0.0003 == half
    assert half - 0.0003 != half
    assert torch.tensor(1e-8).half() == 0


@pytest.mark.full
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_world_size(world_size: int) -> None:
    """Seven windows divide by neither two nor four."""
    lines = [
        f"{SMALL} --seed 20260101 --batch 7",
        f"{SMALL} --seed 2 --batch 64 --scale 512 --precision fp16",
    ]
    assert failed_claims(SCRIPT, world_size, [(line, "", "") for line in lines]) == [set()] * 2


MUTANTS = [
    # a step is taken in spite of the overflow
    ("self.scaler.step(self.optimizer)", "self.optimizer.step()"),
    # the scale never falls
    (
        "self.scaler.update()\n        self.optimizer.zero_grad()\n        self.losses",
        "self.scaler.update(2.0**14)\n        self.optimizer.zero_grad()\n        self.losses",
    ),
    # no gradient is averaged
    ("DistributedDataParallel(byte_mlp(args, args.seed).to(device))", "byte_mlp(args, args.seed)"),
    # a sum for a mean
    ("self.scaler.scale(loss * dist.get_world_size())", "self.scaler.scale(loss * 4)"),
    # autocast left out: nothing is saved in 16 bits
    ('enabled=self.precision != "fp32"', "enabled=False"),
    # products in bf16 where fp32 was asked for
    ('dtype=dtype, enabled=self.precision != "fp32"', "dtype=torch.bfloat16"),
]


@pytest.mark.full
def test_mutants_are_caught() -> None:
    found = failed_claims(SCRIPT, 2, [(SMALL, *mutant) for mutant in MUTANTS])
    assert [mutant for mutant, failed in zip(MUTANTS, found, strict=True) if not failed] == []
