"""The answers to exercises.py, which says what each function must do and cost.

pytest tests/chapter4/test_exercises.py
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.func import functional_call


def sharded_gradient(
    model: nn.Module,
    shard: torch.Tensor,
    inputs: torch.Tensor,
    loss_of: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the gathered tensor are the weights, so autograd writes a flat gradient."""
    world_size = dist.get_world_size()
    flat = shard.new_empty(world_size * shard.numel())
    dist.all_gather(list(flat.chunk(world_size)), shard)
    flat.requires_grad_()
    weights = {}
    start = 0
    for name, parameter in model.named_parameters():
        end = start + parameter.numel()
        weights[name] = flat[start:end].view(parameter.shape)
        start = end
    loss = loss_of(functional_call(model, weights, (inputs,)))
    (gradient,) = torch.autograd.grad(loss, flat)  # the padding is used by nothing: zeros
    part = torch.empty_like(shard)
    dist.reduce_scatter(part, list(gradient.chunk(world_size)))
    return loss.detach(), part / world_size


def clip_sharded(gradients: list[torch.Tensor], max_norm: float) -> torch.Tensor:
    """The squares of all ranks add up; each rank then has the same number, and decides alike."""
    device = gradients[0].device if gradients else None
    total = torch.zeros((), dtype=torch.float64, device=device)
    for gradient in gradients:
        total += gradient.double().square().sum()
    dist.all_reduce(total)
    norm = total.sqrt()
    if max_norm < norm < float("inf"):
        for gradient in gradients:
            gradient.mul_(max_norm / norm.to(gradient.dtype))
    return norm


def reads(rows: int, saved_by: int, loaded_by: int, rank: int) -> list[tuple[int, int, int]]:
    """The rank's rows, cut where the saving ranks' chunks end."""
    saved_chunk = -(-rows // saved_by)
    loaded_chunk = -(-rows // loaded_by)
    start = min(rank * loaded_chunk, rows)
    stop = min(start + loaded_chunk, rows)
    pieces = []
    while start < stop:
        file = start // saved_chunk
        end = min(stop, (file + 1) * saved_chunk)
        pieces.append((file, start - file * saved_chunk, end - file * saved_chunk))
        start = end
    return pieces
