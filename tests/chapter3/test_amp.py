"""Mixed precision: every world size, an overflow on one rank, bad input, and what must not pass."""

from collections.abc import Callable
from pathlib import Path

import book
import checks
import pytest
import torch
import warm

CODE = Path("chapter3-distributed-training-with-pytorch-ddp/code")
ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., warm.Result]
NAME = "amp_ddp_example.py"
AMP = f"{NAME} --data LICENSE --steps 6 --overflow-step 3 --context 16 --width 32 --layers 1"

amp = warm.load("chapter3_amp", ROOT / CODE / NAME)


def torchrun(world_size: int, line: str) -> str:
    return f"torchrun --nproc_per_node={world_size} {CODE}/{line}"


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("flags", ["--seed 1 --batch 7", "--seed 2 --batch 4 --scale 512"])
def test_every_world_size(run: Run, flags: str, world_size: int) -> None:
    """Seven windows do not divide by two, three or four."""
    command = torchrun(world_size, f"{AMP} {flags}")
    result, parsed = run(command), book.parse_command(command)
    problems = checks.evidence(parsed, result)
    assert not problems, checks.report(parsed, result, problems)
    assert "the scale is 0.5 of what it was" in result.stdout


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (AMP, "torchrun --nproc_per_node=2"),
        (f"{AMP} --steps 2", "type --steps 5 or more"),
        (f"{AMP} --heads 3", "--width 32 is no multiple of 2 x --heads 3"),
        (f"{AMP} --precision int8", "--precision"),
        (f"{AMP} --scale 0", "0 is not a number above 0"),
        (f"{AMP} --json no-such-folder/x.json", "no-such-folder"),
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
        (f"{AMP} --data no-such-file", "give a text file with --data FILE"),
        (f"{AMP} --batch 1", "type --batch 2 or more"),
        (f"{AMP} --batch 99", "give a longer --data FILE"),
    ],
)
def test_bad_input_to_several_ranks(run: Run, line: str, says: str) -> None:
    result = run(torchrun(2, line), timeout=30)
    assert result.returncode not in (0, warm.TIMED_OUT)
    assert {says in line for line in result.stderr.splitlines()} == {True}, result.stderr


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        # the gradients that are compared are still scaled
        ("(run.gradient() - truth)", "(run.gradient() * run.scaler.get_scale() - truth)"),
        # a step is taken in spite of the overflow
        ("self.scaler.step(self.optimizer)", "self.optimizer.step()"),
        # the scale never falls
        ("        self.scaler.update()\n        self.optimizer.zero_grad()\n        if",
         "        self.scaler.update(2.0**14)\n        self.optimizer.zero_grad()\n        if"),
        # no gradient is averaged
        ("self.model = DistributedDataParallel(model)", "self.model = model"),
        # a sum for a mean
        ("self.scaler.scale(loss * dist.get_world_size())", "self.scaler.scale(loss * 4)"),
        # autocast left out: nothing is saved in 16 bits
        ('enabled=self.precision != "fp32"', "enabled=False"),
        # products in bf16 where fp32 was asked for
        ('enabled=self.precision != "fp32"', "enabled=True"),
    ],
)  # fmt: skip
def test_mutants_are_caught(run: Run, checkout: Path, right: str, wrong: str) -> None:
    source = (checkout / CODE / NAME).read_text()
    assert source.count(right) == 1
    broken = source.replace(right, wrong)
    if wrong == "enabled=True":  # autocast does not know fp32
        broken = broken.replace("dtype = DTYPES[self.precision]", "dtype = torch.bfloat16")
    mutant = checkout / CODE / f"mutant_{NAME}"
    mutant.write_text(broken)
    result = run(torchrun(2, f"mutant_{AMP} --batch 4"), timeout=60)
    mutant.unlink()
    assert result.returncode not in (0, warm.TIMED_OUT)
    assert "FAILED" in result.stdout, result.stderr


def test_formats_have_the_digits_and_the_range_that_the_chapter_says() -> None:
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
