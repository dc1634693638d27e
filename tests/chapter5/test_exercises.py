"""The graders of chapter 5's exercises, and the proof that they turn wrong answers down.

pytest tests/chapter5/test_exercises.py            grades solutions.py
pytest tests/chapter5/test_exercises.py --mine     grades your exercises.py
"""

import itertools
import math
import sys
from collections.abc import Callable
from fractions import Fraction
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


Sizes = tuple[int | None, int | None, int | None]


def outcome(answer: Answer, *args: Any) -> Any:
    """What an answer returns, or the args of the ValueError that it raises."""
    try:
        return answer(*args)
    except ValueError as error:
        return ("ValueError", *error.args)


def triangle(sizes: Sizes, ranks: int) -> tuple[int, int, int] | None:
    """What DeepSpeed's rules make of the sizes, by trial; None if it refuses."""
    batch, micro, accumulation = sizes
    if batch is None and micro is None:
        return None
    if batch is None:
        assert micro is not None
        return micro * (accumulation or 1) * ranks, micro, accumulation or 1
    for a in [accumulation] if accumulation else range(1, batch + 1) if micro else [1]:
        for m in [micro] if micro else range(1, batch + 1):
            if m * a * ranks == batch:
                return batch, m, a
    return None


def right_outcome(sizes: Sizes, ranks: int) -> Any:
    found = triangle(sizes, ranks)
    batch, micro, accumulation = sizes
    if found or (batch is None and micro is None):
        return found or ("ValueError",)
    assert batch is not None
    close = [b for b in range(1, 300) if triangle((b, micro, accumulation), ranks)]
    below = [b for b in close if b < batch][-1:]
    return ("ValueError", *below, *[b for b in close if b > batch][:1])


def grade_close_triangle(answer: Answer) -> None:
    some = (None, 1, 2, 3, 5)
    for ranks in (1, 2, 3, 8):
        for sizes in itertools.product((None, 1, 6, 12, 64), some, some):
            found = outcome(answer, *sizes, ranks)
            right = right_outcome(sizes, ranks)
            assert found == right, f"{sizes} on {ranks} ranks: {found}, not {right}"
    large = 10**12
    lines = lines_run(answer, large + 1, None, None, 8)
    assert lines <= 100, f"{lines} lines run for a batch of 10**12 + 1"


def lines_run(answer: Answer, *args: object) -> int:
    """How many lines of Python the answer runs; it stops at 10,000."""
    count = 0

    def tracer(frame: Any, event: str, _: object) -> Any:
        nonlocal count
        count += event == "line"
        if count > 10_000:
            raise OverflowError
        return tracer

    sys.settrace(tracer)
    try:
        answer(*args)
    except (ValueError, OverflowError):
        pass
    finally:
        sys.settrace(None)
    return count


# Parameters, bytes of a weight, ranks, windows, bytes of a window, bytes of memory.
PLANS = [
    (8 * 10**9, 2, 8, 64, 10**9, 80 * 10**9),  # ZeRO 1, by accumulation
    (13 * 10**9, 2, 8, 16, 10**9, 80 * 10**9),
    (
        13 * 10**9,
        2,
        8,
        128,
        2 * 10**9,
        80 * 10**9,
    ),  # a micro batch of 4 at stage 3, or more traffic
    (1000, 4, 1, 4, 10, 16_040),  # one rank: stage 1 would need 20 bytes per parameter
    (1000, 4, 2, 2, 1, 14_001),
    (1000, 2, 4, 12, 100, 16_300),
    (1000, 2, 4, 12, 100, 16_299),
    (
        1000,
        2,
        4,
        48,
        100,
        7_100,
    ),  # stage 1 fits when it does not keep all gradients, and never does
    (1000, 2, 3, 3, 1, 7_000),
    (1000, 2, 8, 8, 1, 1_000),  # nothing fits
    *(
        (parameters, size, ranks, ranks * 12, 400, memory)
        for parameters in (600, 1200)
        for size in (2, 4)
        for ranks in (1, 2, 3, 8)
        for memory in range(1_000, 26_000, 500)
    ),
]


def held_and_sent(
    plan: tuple[int, ...], stage: int, accumulation: int
) -> tuple[Fraction, int]:  # bytes; times (ranks - 1) / ranks of the weights' bytes
    """The chapter's table."""
    parameters, size, ranks, windows, window_bytes, _ = plan
    gradients_cut = stage >= 2 or (stage == 1 and accumulation == 1)
    of_one = Fraction(size, ranks if stage == 3 else 1)
    of_one += Fraction(size, ranks if gradients_cut else 1)
    of_one += Fraction(12, ranks) if stage else 12 if size == 2 else 8
    held = parameters * of_one + windows // (ranks * accumulation) * window_bytes
    return held, {0: 2, 1: 3, 2: 2 * accumulation + 1, 3: 3 * accumulation}[stage] * (ranks > 1)


def grade_cheapest_plan(answer: Answer) -> None:
    for plan in PLANS:
        of_rank, memory = plan[3] // plan[2], plan[5]
        fits = []
        for stage in range(4):
            for accumulation in (a for a in range(1, of_rank + 1) if of_rank % a == 0):
                held, sent = held_and_sent(plan, stage, accumulation)
                if held <= memory:
                    fits.append((sent, stage, accumulation))
        found = answer(*plan)
        if not fits:
            assert found is None, f"{plan}: nothing fits, not even {found}"
            continue
        assert found is not None, f"{plan}: there is a plan that fits: {min(fits)[1:]}"
        assert of_rank % found[1] == 0, f"{plan}: {found} does not cut {of_rank} windows evenly"
        held, sent = held_and_sent(plan, *found)
        assert held <= memory, f"{plan}: {found} needs {float(held):.0f} bytes"
        least = min(fits)
        assert sent == least[0], f"{plan}: {found} sends {sent}, {least[1:]} only {least[0]}"
        assert tuple(found) == least[1:], f"{plan}: {found}, not {least[1:]}"


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


def rounds_down(batch: int | None, micro: int | None, accumulation: int | None, ranks: int) -> Any:
    """Trains on another batch than the file says."""
    if batch is None and micro is None:
        raise ValueError
    if batch is None:
        return (micro or 1) * (accumulation or 1) * ranks, micro, accumulation or 1
    accumulation = accumulation or (max(batch // (micro * ranks), 1) if micro else 1)
    micro = micro or max(batch // (accumulation * ranks), 1)
    return micro * accumulation * ranks, micro, accumulation


def nearest_multiples_of(unit: int, batch: int) -> ValueError:
    below = batch // unit * unit
    return ValueError(*[size for size in (below, below + unit) if size > 0])


def forgets_what_else_is_given(
    batch: int | None, micro: int | None, accumulation: int | None, ranks: int
) -> Any:
    """Says to type a multiple of the ranks."""
    found = triangle((batch, micro, accumulation), ranks)
    if found is None:
        raise nearest_multiples_of(ranks, batch) if batch else ValueError
    return found


def offers_zero(batch: int | None, micro: int | None, accumulation: int | None, ranks: int) -> Any:
    found = triangle((batch, micro, accumulation), ranks)
    if found is None and batch:
        right = right_outcome((batch, micro, accumulation), ranks)[1:]
        raise ValueError(*(right if len(right) > 1 else (0, *right)))
    return found or outcome(stub_without_batch)


def stub_without_batch() -> None:
    raise ValueError


def tries_each_size(
    batch: int | None, micro: int | None, accumulation: int | None, ranks: int
) -> Any:
    """Right, and it walks to the nearest size one by one."""
    if batch and batch > 10**9:
        for _ in range(20_000):
            batch -= 1
    found = right_outcome((batch, micro, accumulation), ranks)
    if found[0] == "ValueError":
        raise ValueError(*found[1:])
    return found


def plan_of(flaw: str, *plan: int) -> tuple[int, int] | None:
    """A right plan, but for one flaw."""
    parameters, size, ranks, windows, window_bytes, memory = plan
    of_rank = windows // ranks
    fits = []
    for stage in range(4):
        for accumulation in (a for a in range(1, min(of_rank, 100) + 1) if of_rank % a == 0):
            held, sent = held_and_sent(plan, stage, accumulation)
            if flaw == "gradients" and stage == 1 and accumulation > 1:
                held -= parameters * (size - Fraction(size, ranks))
            if flaw == "paper" and stage and size == 4:
                held -= parameters * Fraction(4, ranks)  # 16 / ranks in all, as FSDP2 has
            if flaw == "activations":
                held += (of_rank - of_rank // accumulation) * window_bytes
            if held <= memory:
                lowest = (stage, accumulation, sent)
                fits.append(lowest if flaw == "lowest" else (sent, stage, accumulation))
    if not fits:
        return None
    best = min(fits)
    return best[:2] if flaw == "lowest" else best[1:]


def forgets_that_stage_1_keeps_gradients(*plan: int) -> Any:
    return plan_of("gradients", *plan)


def counts_as_the_paper_does(*plan: int) -> Any:
    """16 bytes per parameter in fp32 too, without the copy of the weights."""
    return plan_of("paper", *plan)


def takes_the_lowest_stage(*plan: int) -> Any:
    """And accumulates until it fits, whatever that sends."""
    return plan_of("lowest", *plan)


def keeps_all_activations(*plan: int) -> Any:
    return plan_of("activations", *plan)


GRADERS: dict[str, Callable[[Answer], None]] = {
    "zero1_step": grade_zero1_step,
    "close_triangle": grade_close_triangle,
    "cheapest_plan": grade_cheapest_plan,
}
MUTANTS = [  # a wrong answer, of which exercise, and what the grader must hold against it
    (sums_up, "zero1_step", "off one process's"),
    (clips_by_its_own_part, "zero1_step", "off one process's"),
    (takes_the_norm_too_early, "zero1_step", "off one process's"),
    (forgets_the_steps, "zero1_step", "off one process's"),
    (reduces_all, "zero1_step", "not one scatter, one sum and one gather"),
    (keeps_the_whole_state, "zero1_step", "numbers in state"),
    (rounds_down, "close_triangle", "not \\('ValueError'"),
    (forgets_what_else_is_given, "close_triangle", "not \\('ValueError'"),
    (offers_zero, "close_triangle", "'ValueError', 0|not \\('ValueError'"),
    (tries_each_size, "close_triangle", "lines run"),
    (forgets_that_stage_1_keeps_gradients, "cheapest_plan", "needs .* bytes"),
    (counts_as_the_paper_does, "cheapest_plan", "needs .* bytes|nothing fits"),
    (takes_the_lowest_stage, "cheapest_plan", "only"),
    (keeps_all_activations, "cheapest_plan", r"only|there is a plan that fits|not \("),
]


def stub(*args: object) -> None:
    raise NotImplementedError


@pytest.mark.parametrize("name", GRADERS)
def test_answer(name: str, exercises: Callable[[int], ModuleType]) -> None:
    GRADERS[name](getattr(exercises(5), name))


@pytest.mark.parametrize("name", GRADERS)
def test_stub_is_turned_down(name: str) -> None:
    with pytest.raises((warm.RankError, NotImplementedError)) as caught:
        GRADERS[name](stub)
    error = caught.value
    assert isinstance(getattr(error, "error", error), NotImplementedError)


@pytest.mark.parametrize(
    ("wrong", "name", "because"), MUTANTS, ids=[m.__name__ for m, _, _ in MUTANTS]
)
def test_wrong_answer_is_turned_down(wrong: Answer, name: str, because: str) -> None:
    with pytest.raises(AssertionError, match=because):
        GRADERS[name](wrong)


def test_the_grader_of_the_triangle_agrees_with_deepspeed() -> None:
    config = pytest.importorskip("deepspeed.runtime.config", reason="needs DeepSpeed, for Linux")
    some = (None, 1, 2, 3, 5)
    for ranks in (1, 2, 3, 8):
        for sizes in itertools.product((None, 1, 6, 12, 64), some, some):
            parsed = config.DeepSpeedConfig.__new__(config.DeepSpeedConfig)
            names = [
                *("train_batch_size", "train_micro_batch_size_per_gpu"),
                "gradient_accumulation_steps",
            ]
            vars(parsed).update(zip(names, sizes, strict=True), world_size=ranks)
            try:
                parsed._configure_train_batch_size()
                found = tuple(getattr(parsed, name) for name in names)
            except (AssertionError, TypeError):
                found = None
            assert found == triangle(sizes, ranks), f"{sizes} on {ranks} ranks"
