"""Answers to exercises.py, which says what each function must do and cost.

pytest tests/chapter1/test_exercises.py
"""

import heapq
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import nn


def time_call(
    function: Callable[[], object], synchronize: Callable[[], None], warmup: int, repeats: int
) -> tuple[float, float, float]:
    """Quartiles of the seconds from an idle device to an idle device."""
    for _ in range(warmup):
        function()
    seconds = []
    for _ in range(repeats):
        synchronize()  # the warm-up and what others have queued must not be on the clock
        start = time.perf_counter()
        function()
        synchronize()  # and what the function has queued must be
        seconds.append(time.perf_counter() - start)
    first, median, third = statistics.quantiles(seconds, n=4)
    return first, median, third


def shard(length: int, rank: int, world_size: int, epoch: int, seed: int) -> torch.Tensor:
    """Every rank shuffles all indices alike, and takes each `world_size`-th."""
    # The CPU generator reads only the low 32 bits of a seed, so `seed << 32 | epoch` would not do.
    draw = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(length, generator=draw)[rank::world_size]


def global_mean(values: torch.Tensor) -> float:
    """Sum and count travel in one message."""
    total = torch.stack([values.double().sum(), values.new_tensor(len(values)).double()])
    dist.all_reduce(total)
    if total[1] == 0:  # known to all ranks only after the collective
        raise ValueError("no rank has a value")
    return (total[0] / total[1]).item()


def average_gradients(model: nn.Module, bucket_bytes: int) -> int:
    """Greedy packing, last layer first: the order in which backward finishes them."""
    gradients = [p.grad for p in reversed(list(model.parameters())) if p.grad is not None]
    buckets: list[list[torch.Tensor]] = []
    free = 0
    for gradient in gradients:
        if not buckets or gradient.nbytes > free:
            buckets.append([])
            free = bucket_bytes
        buckets[-1].append(gradient)
        free -= gradient.nbytes
    for bucket in buckets:
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        means = flat.split([gradient.numel() for gradient in bucket])
        for gradient, mean in zip(bucket, means, strict=True):
            gradient.copy_(mean.view(gradient.shape))
    return len(buckets)


def broadcast(tensor: torch.Tensor, source: int) -> int:
    """In each round, every rank that has the tensor sends it `reach` ranks further on."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    place = (rank - source) % world_size  # of this rank, counted from the source
    rounds, reach = 0, 1
    while reach < world_size:
        if place < reach and place + reach < world_size:
            dist.send(tensor, (rank + reach) % world_size)
        elif reach <= place < 2 * reach:
            dist.recv(tensor, (rank - reach) % world_size)
        rounds, reach = rounds + 1, 2 * reach
    return rounds


def longest_first(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """The longest request left goes to the rank with the least to do (Graham, 1969)."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0, rank) for rank in range(ranks)]  # a heap: the least loaded rank comes first
    for request in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        load, rank = loads[0]
        shares[rank].append(request)
        heapq.heapreplace(loads, (load + lengths[request], rank))
    return shares
