"""The answers to exercises.py, which says what each function must do and cost.

pytest tests/chapter5/test_exercises.py
"""

import math
from fractions import Fraction

import torch
import torch.distributed as dist
import torch.nn.functional as F


def zero1_step(
    weights: torch.Tensor,
    gradient: torch.Tensor,
    state: dict[str, torch.Tensor],
    lr: float,
    max_norm: float,
) -> float:
    """Squares of parts add up to the square of the whole: one number is enough for the norm."""
    world_size = dist.get_world_size()
    part = -(-len(weights) // world_size)
    padding = (0, part * world_size - len(weights))
    mine = gradient.new_empty(part)
    dist.reduce_scatter(mine, list(F.pad(gradient, padding).chunk(world_size)))
    mine /= world_size
    square = mine.square().sum()
    dist.all_reduce(square)
    norm = square.sqrt().item()
    mine *= min(1.0, max_norm / (norm + 1e-6))

    if not state:
        state |= {"steps": torch.zeros(())}
        state |= {name: torch.zeros_like(mine) for name in ("mean", "mean_of_squares")}
    state["steps"] += 1
    steps = state["steps"].item()
    state["mean"].lerp_(mine, 1 - 0.9)
    state["mean_of_squares"].mul_(0.95).addcmul_(mine, mine, value=1 - 0.95)
    denominator = (state["mean_of_squares"] / (1 - 0.95**steps)).sqrt() + 1e-8
    update = state["mean"] / (1 - 0.9**steps) / denominator

    whole = F.pad(weights, padding)
    new = whole.chunk(world_size)[dist.get_rank()] - lr * update
    dist.all_gather(list(whole.chunk(world_size)), new)
    weights.copy_(whole[: len(weights)])
    return norm


def close_triangle(
    batch: int | None, micro: int | None, accumulation: int | None, ranks: int
) -> tuple[int, int, int]:
    """What is given besides the batch, times the ranks, has to divide the batch."""
    if batch is None and micro is None:
        raise ValueError
    unit = (micro or 1) * (accumulation or 1) * ranks
    if batch is None:
        return unit, micro or 1, accumulation or 1
    given = micro is not None and accumulation is not None
    if batch % unit or (given and batch != unit):
        below = unit if given else batch // unit * unit
        above = unit if given else below + unit
        raise ValueError(*sorted({size for size in (below, above) if size > 0}))
    if micro is None:
        return batch, batch // unit, accumulation or 1
    return batch, micro, batch // (micro * ranks)


def cheapest_plan(
    parameters: int,
    weight_bytes: int,
    ranks: int,
    windows: int,
    window_bytes: int,
    memory: int,
) -> tuple[int, int] | None:
    """All stages with all divisors: sent bytes, stage and accumulation compare as a tuple does."""
    of_rank = windows // ranks
    small = [a for a in range(1, math.isqrt(of_rank) + 1) if of_rank % a == 0]
    plans = []
    for accumulation in {*small, *(of_rank // a for a in small)}:
        micro = of_rank // accumulation
        master = 12 if weight_bytes == 2 else 8
        part = Fraction(weight_bytes, ranks)
        gradients = [weight_bytes, weight_bytes if accumulation > 1 else part, part, part]
        weights = [weight_bytes, weight_bytes, weight_bytes, part]
        sends = [2, 3, 2 * accumulation + 1, 3 * accumulation]
        for stage in range(4):
            state = Fraction(12, ranks) if stage else master
            held = parameters * (weights[stage] + gradients[stage] + state)
            if held + micro * window_bytes <= memory:
                sent = sends[stage] if ranks > 1 else 0
                plans.append((sent, stage, accumulation))
    return min(plans)[1:] if plans else None
