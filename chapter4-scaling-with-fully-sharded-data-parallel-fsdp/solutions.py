"""The answer to exercises.py, which says what the function must do and cost.

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
