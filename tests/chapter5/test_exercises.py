"""The grader of chapter 5's exercise, and the proof that it turns wrong answers down.

pytest tests/chapter5/test_exercises.py            grades solutions.py
pytest tests/chapter5/test_exercises.py --mine     grades your exercises.py
"""

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import warm
from torch import nn
from traffic import Address, Answer, Call, on_ranks, watched

WORLD_SIZES = (1, 2, 3, 4)
STEPS = 4
LR = 0.1
# Numbers, the norm to clip to, and the type. Ten on four ranks: the last part is shorter; three: empty.
CASES = [
    (count, max_norm, dtype)
    for count in (10, 3)
    for max_norm in (0.5, 1e6)
    for dtype in (torch.float64, torch.float32)
]


def gradient_of(count: int, rank: int, step: int, dtype: torch.dtype) -> torch.Tensor:
    draw = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(count, generator=draw, dtype=torch.float64).to(dtype)


def first_weights(count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.linspace(-1, 1, count, dtype=torch.float64).to(dtype)


def reference(
    count: int, max_norm: float, dtype: torch.dtype, world_size: int
) -> tuple[list[float], torch.Tensor]:
    """One process's norms of each step, and its last weights."""
    weights = nn.Parameter(first_weights(count, dtype))
    optimizer = torch.optim.Adam([weights], lr=LR, betas=(0.9, 0.95))
    norms = []
    for step in range(STEPS):
        of_ranks = [gradient_of(count, rank, step, dtype) for rank in range(world_size)]
        weights.grad = torch.stack(of_ranks).mean(0)
        norms.append(nn.utils.clip_grad_norm_([weights], max_norm).item())
        optimizer.step()
    return norms, weights.detach()


Result = tuple[list[float], torch.Tensor, list[list[Call]], int, list[str]]


def steps_in_rank(at: Address) -> list[Result]:
    """For each of CASES: norms, last weights, the calls of each step, numbers in state, what is wrong."""
    done = []
    for count, max_norm, dtype in CASES:
        weights = first_weights(count, dtype)
        state: dict[str, torch.Tensor] = {}
        norms, calls, wrong = [], [], []
        for step in range(STEPS):
            gradient = gradient_of(count, dist.get_rank(), step, dtype)
            before = gradient.clone()
            norm, of_step = watched(at, weights, gradient, state, LR, max_norm)
            norms.append(float(norm))
            calls.append(of_step)
            if not torch.equal(gradient, before):
                wrong.append("the gradient was changed")
        kept = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in state.values()}
        numbers = sum(storage.nbytes() for storage in kept.values()) // dtype.itemsize
        done.append((norms, weights.clone(), calls, numbers, wrong))
    return done


def grade_zero1_step(answer: Answer) -> None:
    for world_size in WORLD_SIZES:
        ranks = on_ranks(steps_in_rank, world_size, answer)
        for (count, max_norm, dtype), results in zip(CASES, zip(*ranks, strict=True), strict=True):
            right_norms, right_weights = reference(count, max_norm, dtype, world_size)
            part = math.ceil(count / world_size)
            bound = 1e-12 if dtype == torch.float64 else 1e-5
            for rank, (norms, weights, calls, numbers, wrong) in enumerate(results):
                at = f"{count} of {dtype}, clipped to {max_norm:g}, rank {rank} of {world_size}"
                pairs = zip(norms, right_norms, strict=True)
                off = max(abs(norm - right) for norm, right in pairs)
                assert off <= 10 * bound, f"{at}: the norm is {off:.2g} off one process's"
                off = (weights - right_weights).abs().max().item()
                assert off <= bound, f"{at}: the weights are {off:.2g} off one process's"
                assert torch.equal(weights, results[0][1]), f"{at}: not the weights of rank 0"
                for of_step in calls:
                    expect_three(of_step, part * world_size * dtype.itemsize, dtype.itemsize, at)
                assert numbers <= 2 * part + 10, f"{at}: {numbers} numbers in state, for {part}"
                assert not wrong, f"{at}: {wrong[0]}"


def expect_three(calls: list[Call], whole: int, one: int, at: str) -> None:
    names = sorted(name for name, _, _ in calls)
    scatters = [name for name in names if "reduce_scatter" in name]
    gathers = [name for name in names if "allgather" in name or "all_gather" in name]
    sums = [nbytes for name, nbytes, _ in calls if name == "allreduce_"]
    kinds = (len(scatters), len(sums), len(gathers), len(names))
    assert kinds == (1, 1, 1, 3), f"{at}: {names}, not one scatter, one sum and one gather"
    assert sums[0] <= max(one, 8), f"{at}: an all-reduce of {sums[0]} bytes, not of one number"
    largest = max(nbytes for _, nbytes, _ in calls)
    assert largest <= whole, f"{at}: a message of {largest} bytes, the whole has {whole}"


# --- wrong answers -----------------------------------------------------------------------------


def step_of(
    flaw: str,
    weights: torch.Tensor,
    gradient: torch.Tensor,
    state: Any,
    lr: float,
    max_norm: float,
) -> float:
    """A right step, but for one flaw."""
    world_size, rank = dist.get_world_size(), dist.get_rank()
    part = -(-len(weights) // world_size)
    padded = F.pad(gradient, (0, part * world_size - len(weights)))
    own = gradient.new_empty(part)
    if flaw == "reduces all":
        dist.all_reduce(padded)
        own.copy_(padded.chunk(world_size)[rank])
    else:
        dist.reduce_scatter(own, list(padded.chunk(world_size)))
    if flaw != "sums up":
        own /= world_size
    square = (gradient if flaw == "norm before the mean" else own).square().sum()
    dist.all_reduce(square.clone() if flaw == "norm of its part" else square)
    norm = square.sqrt().item()
    own *= min(1.0, max_norm / (norm + 1e-6))
    count = part * world_size if flaw == "whole state" else part
    if not state:
        state |= {"n": torch.zeros(()), "m": own.new_zeros(count), "v": own.new_zeros(count)}
    mean, squares = (state[key][:part] for key in "mv")
    state["n"] += 1
    mean.lerp_(own, 0.1)
    squares.mul_(0.95).addcmul_(own, own, value=0.05)
    n = 1 if flaw == "forgets the steps" else state["n"].item()
    update = mean / (1 - 0.9**n) / ((squares / (1 - 0.95**n)).sqrt() + 1e-8)
    whole = F.pad(weights, (0, part * world_size - len(weights)))
    dist.all_gather(list(whole.chunk(world_size)), whole.chunk(world_size)[rank] - lr * update)
    weights.copy_(whole[: len(weights)])
    return norm


def sums_up(*args: Any) -> float:
    return step_of("sums up", *args)


def clips_by_its_own_part(*args: Any) -> float:
    """No error and no complaint: ranks shrink their parts by different factors."""
    return step_of("norm of its part", *args)


def takes_the_norm_too_early(*args: Any) -> float:
    return step_of("norm before the mean", *args)


def reduces_all(*args: Any) -> float:
    """Right, and sends as much for the gradient as DDP: what DeepSpeed does by default."""
    return step_of("reduces all", *args)


def keeps_the_whole_state(*args: Any) -> float:
    return step_of("whole state", *args)


def forgets_the_steps(*args: Any) -> float:
    return step_of("forgets the steps", *args)


GRADERS: dict[str, Callable[[Answer], None]] = {"zero1_step": grade_zero1_step}
MUTANTS = [  # a wrong answer, and what the grader must hold against it
    (sums_up, "off one process's"),
    (clips_by_its_own_part, "off one process's"),
    (takes_the_norm_too_early, "off one process's"),
    (forgets_the_steps, "off one process's"),
    (reduces_all, "not one scatter, one sum and one gather"),
    (keeps_the_whole_state, "numbers in state"),
]


def stub(*args: object) -> None:
    raise NotImplementedError


@pytest.mark.parametrize("name", GRADERS)
def test_answer(name: str, exercises: Callable[[int], ModuleType]) -> None:
    GRADERS[name](getattr(exercises(5), name))


def test_stub_is_turned_down() -> None:
    with pytest.raises(warm.RankError) as caught:
        grade_zero1_step(stub)
    assert isinstance(caught.value.error, NotImplementedError)


@pytest.mark.parametrize(("wrong", "because"), MUTANTS, ids=[m.__name__ for m, _ in MUTANTS])
def test_wrong_answer_is_turned_down(wrong: Answer, because: str) -> None:
    with pytest.raises(AssertionError, match=because):
        grade_zero1_step(wrong)
