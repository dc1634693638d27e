"""Six functions to fill in. Each is 5 to 20 lines; its docstring says what it must do and cost.

    pytest tests/chapter1/test_exercises.py --mine

grades this file (add `-k shard` for one function), and without --mine the answers in solutions.py.
Import what you need: the standard library and PyTorch are enough. In 3, 4 and 5 the process group
exists when your function is called, all ranks call it at the same time, and any world size from 1
up must work.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn


def time_call(
    function: Callable[[], object], synchronize: Callable[[], None], warmup: int, repeats: int
) -> tuple[float, float, float]:
    """1. Time a function on a device that works behind your back. Section 1.3, about 10 lines.

    `function()` only queues work and returns at once, as a CUDA kernel launch does;
    `synchronize()` returns when all work queued so far is done. Work that somebody else queued
    may still be running when you are called, and the first `warmup` calls may be slow.

    Return the first quartile, the median and the third quartile, in seconds, of `repeats` calls
    (3 or more), each from an idle device to an idle device. Any usual definition of a quartile
    will do. `function` is called exactly `warmup + repeats` times.
    """
    raise NotImplementedError


def shard(length: int, rank: int, world_size: int, epoch: int, seed: int) -> torch.Tensor:
    """2. Deal a shuffled data set out to the ranks. Section 1.8, about 4 lines.

    Return the indices of this rank's samples in this epoch: int64, [count]. All ranks' together
    are a shuffle of 0 .. length - 1: nothing missing and nothing twice, also where `length` is
    smaller than `world_size` or 0. Counts differ by at most one between ranks. Every pair
    (seed, epoch) gives another shuffle of the whole data set, so a rank sees other samples in
    each epoch, and the same pair always gives the same one.

    No communication: the arguments tell each rank enough. The global random state of PyTorch
    stays as it is, since the model's dropout draws from it. Mind what seed 0 does in epoch 1 and
    seed 1 in epoch 0: torch's DistributedSampler gives them the same shuffle.
    """
    raise NotImplementedError


def global_mean(values: torch.Tensor) -> float:
    """3. The mean of a metric over all samples of all ranks. Section 1.8, about 6 lines.

    `values` is float32, [count]; counts differ between ranks, and some ranks may have none.
    Return the mean over all values of all ranks, the same on every rank, right to 9 digits: so
    add up in float64. If no rank has a value, raise ValueError, on every rank.

    Cost: exactly one collective, with a message of a few bytes. A mean of the ranks' means is
    not the mean. A rank that leaves before the collective lets the others wait for ever.
    """
    raise NotImplementedError


def average_gradients(model: nn.Module, bucket_bytes: int) -> int:
    """4. What DDP does after backward, by hand. Section 1.6, about 20 lines.

    Replace every parameter's gradient by its mean over the ranks. A parameter has a gradient on
    all ranks or on none; where it is None it stays None. All gradients have one dtype and one
    device; they need not be contiguous. With equal shares of a batch, the result is the gradient
    of one process on the whole batch.

    Pack the gradients into flat buckets of at most `bucket_bytes`, and call all_reduce once per
    bucket; a gradient that is larger than that is a bucket of its own. Use no other collective.
    Return the number of all-reduces.

    Cost: at most as many all-reduces as greedy packing needs, which walks through the parameters
    and starts a new bucket when the next gradient does not fit. Every gradient is sent once.
    """
    raise NotImplementedError


def broadcast(tensor: torch.Tensor, source: int) -> int:
    """5. A broadcast that doubles its audience in each round. Section 1.6, about 15 lines.

    `tensor` is contiguous, and has the same shape and dtype on every rank. Overwrite it on every
    rank with what it holds on rank `source`, through a binomial tree: in the first round the
    source sends to one rank, in the next these two send to two more, then four to four. Return
    the number of rounds, the same on every rank: ceil(log2(world_size)).

    Use dist.send and dist.recv (or isend and irecv) with the other rank's number, and no
    collective. Cost: every rank but the source receives exactly once, the source never, and no
    rank waits for more than that number of sends in a row, its own and those before it.
    Hint: number the ranks from the source on, round the circle.
    """
    raise NotImplementedError


def longest_first(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """6. Share requests of known lengths out to ranks. Section 1.7, about 8 lines.

    `lengths[i]` is the cost of request i in tokens, 0 or more. Return one list per rank, `ranks`
    in all, that hold the indices of its requests; every request is in exactly one list, and a
    list may be empty.

    Cost: the largest sum of lengths on a rank (the makespan) is at most 4/3 - 1/(3 ranks) times
    the best that any assignment reaches, which is what "the longest request that is left goes to
    the rank with the least to do" guarantees (Graham, 1969). Round robin does not.
    """
    raise NotImplementedError
