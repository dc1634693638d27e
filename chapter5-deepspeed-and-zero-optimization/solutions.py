"""The answer to exercises.py, which says what the function must do and cost.

pytest tests/chapter5/test_exercises.py
"""

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
