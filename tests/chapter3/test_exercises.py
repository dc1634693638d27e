"""Graders of chapter 3's exercises, and the proof that they turn wrong answers down.

pytest tests/chapter3/test_exercises.py            grades solutions.py
pytest tests/chapter3/test_exercises.py --mine     grades your exercises.py
"""

import contextlib
import hashlib
import itertools
import math
import os
import random
import re
import resource
import shutil
import signal
import stat
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import warm
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from traffic import Address, Answer, Call, Traffic, on_ranks, watched

WORLD_SIZES = (1, 2, 3, 4)
Record = tuple[int, str, tuple[int, ...], str]


# --- 1. exposed_seconds ------------------------------------------------------------------------

MIB = 2**20


def ddp_buckets(sizes: Sequence[int], first_bytes: int, cap_bytes: int) -> list[list[int]]:
    """PyTorch's own assignment, of gradients that got ready in this order."""
    gradients = [torch.empty(size, dtype=torch.uint8, device="meta") for size in sizes]
    limits, order = [first_bytes, cap_bytes], list(range(len(sizes)))
    return dist._compute_bucket_assignment_by_size(gradients, limits, [], order)[0]


def end_of_last(
    sizes: Sequence[int],
    ready: Sequence[float],
    buckets: Sequence[Sequence[int]],
    latency: float,
    bandwidth: float,
) -> float:
    """When the last bucket has arrived: some bucket was waited for, and all behind it followed."""
    seconds = [latency + sum(sizes[i] for i in bucket) / bandwidth for bucket in buckets]
    starts = [max(ready[i] for i in bucket) for bucket in buckets]
    return max(start + sum(seconds[place:]) for place, start in enumerate(starts))


def grade_exposed_seconds(answer: Answer) -> None:
    draw = random.Random(0)
    some = [draw.randrange(1, 60) for _ in range(40)]
    cases = [  # what, sizes, first and cap
        ("one gradient", [5], 8, 20),
        ("a small first bucket", [4, 4, 4, 4, 4, 4], 4, 12),
        ("exact fits", [8, 12, 8, 12, 8, 20], 8, 20),
        ("larger than the cap", [3, 2, 100, 1, 1, 1, 50], 8, 20),
        ("larger than the cap at once", [100, 1, 1, 1, 50], 8, 20),
        ("larger first limit", [3, 9, 4, 1, 7, 2], 10, 5),
        *((f"{count} of many sizes", some[:count], 16, 100) for count in (7, 20, 40)),
        ("each alone", some, 1, 1),
        ("all in one", some, 10**6, 10**6),
    ]
    for what, sizes, first, cap in cases:
        best = ddp_buckets(sizes, first, cap)
        inorder = list(itertools.accumulate(draw.uniform(0, 1) for _ in sizes))
        swapped = [t + draw.uniform(0, 3) for t in inorder]
        for order, ready in (("in order", inorder), ("out of order", swapped)):
            for latency, bandwidth in ((0.0, 40.0), (0.3, 400.0), (2.0, 1e6), (1e-6, 1e9)):
                given = list(sizes), list(ready)
                buckets, exposed = answer(sizes, ready, first, cap, latency, bandwidth)
                at = f"{what}, ready {order}, {latency:g} s + bytes at {bandwidth:g}/s"
                assert (sizes, ready) == given, f"{at}: the arguments were changed"
                buckets = [list(bucket) for bucket in buckets]
                assert buckets == best, f"{at}: {sizes} as {buckets}, DDP makes it {best}"
                right = end_of_last(sizes, ready, best, latency, bandwidth) - max(ready)
                close = math.isclose(exposed, right, rel_tol=1e-9, abs_tol=1e-9)
                assert close, f"{at}: {exposed:.6g} s stick out, and it is {right:.6g}"


def filled(sizes: Sequence[int], first_bytes: int, cap_bytes: int) -> list[list[int]]:
    buckets: list[list[int]] = [[]]
    limits = itertools.chain([first_bytes], itertools.repeat(cap_bytes))
    limit = next(limits)
    for i in range(len(sizes)):
        if sum(sizes[j] for j in buckets[-1]) >= limit:
            buckets.append([])
            limit = next(limits)
        buckets[-1].append(i)
    return buckets


def sent_one_by_one(
    sizes: Sequence[int], starts: Sequence[float], buckets: Any, latency: float, bandwidth: float
) -> float:
    arrived = 0.0
    for start, bucket in zip(starts, buckets, strict=True):
        arrived = max(arrived, start) + latency + sum(sizes[i] for i in bucket) / bandwidth
    return arrived


def never_over_the_limit(sizes: Any, ready: Any, first: int, cap: int, a: float, b: float) -> Any:
    """Chapter 1's packing: a new bucket where the next gradient does not fit."""
    buckets: list[list[int]] = []
    free = 0
    for i, size in enumerate(sizes):
        if size > free:
            free = cap if buckets else first
            buckets.append([])
        buckets[-1].append(i)
        free -= size
    return buckets, end_of_last(sizes, ready, buckets, a, b) - max(ready)


def no_first_limit(sizes: Any, ready: Any, first: int, cap: int, a: float, b: float) -> Any:
    buckets = filled(sizes, cap, cap)
    return buckets, end_of_last(sizes, ready, buckets, a, b) - max(ready)


def from_the_last_one(sizes: Any, ready: Any, first: int, cap: int, a: float, b: float) -> Any:
    last = len(sizes) - 1
    buckets = [[last - i for i in bucket] for bucket in filled(sizes[::-1], first, cap)]
    return buckets, end_of_last(sizes, ready, buckets, a, b) - max(ready)


def all_at_once(sizes: Any, ready: Any, first: int, cap: int, a: float, b: float) -> Any:
    buckets = filled(sizes, first, cap)
    ends = (max(ready[i] for i in c) + a + sum(sizes[i] for i in c) / b for c in buckets)
    return buckets, max(ends) - max(ready)


def after_backward(sizes: Any, ready: Any, first: int, cap: int, a: float, b: float) -> Any:
    buckets = filled(sizes, first, cap)
    return buckets, len(buckets) * a + sum(sizes) / b


def with_its_first_gradient(
    sizes: Any, ready: Any, first: int, cap: int, a: float, b: float
) -> Any:
    buckets = filled(sizes, first, cap)
    starts = [min(ready[i] for i in bucket) for bucket in buckets]
    return buckets, max(0.0, sent_one_by_one(sizes, starts, buckets, a, b) - max(ready))


def with_its_last_number(sizes: Any, ready: Any, first: int, cap: int, a: float, b: float) -> Any:
    """Right as long as gradients are ready in the order of their numbers."""
    buckets = filled(sizes, first, cap)
    starts = [ready[bucket[-1]] for bucket in buckets]
    return buckets, sent_one_by_one(sizes, starts, buckets, a, b) - max(ready)


def whoever_is_ready(sizes: Any, ready: Any, first: int, cap: int, a: float, b: float) -> Any:
    buckets = filled(sizes, first, cap)
    order = sorted(buckets, key=lambda bucket: max(ready[i] for i in bucket))
    starts = [max(ready[i] for i in bucket) for bucket in order]
    return buckets, sent_one_by_one(sizes, starts, order, a, b) - max(ready)


CAPS = (None, 0.005, 1e-6)  # MiB; None: PyTorch's own


def ddp_in_rank() -> list[tuple[list[int], list[int]]]:
    """For each cap: bytes of a model's gradients in the order of the first backward, and of DDP's
    messages."""
    found = []
    for cap_mib in CAPS:
        torch.manual_seed(0)
        width = 256 if cap_mib is None else 32  # 8 layers have 2 MiB or 33 KiB
        model = DistributedDataParallel(
            nn.Sequential(*(nn.Linear(width, width) for _ in range(8))), bucket_cap_mb=cap_mib
        )
        order: list[int] = []
        hooks = [
            p.register_post_accumulate_grad_hook(lambda p, order=order: order.append(p.nbytes))
            for p in model.parameters()
        ]
        for _ in range(2):  # the buckets are rebuilt after the first backward
            with Traffic() as traffic:
                model(torch.ones(1, width)).sum().backward()
            while hooks:
                hooks.pop().remove()
        found.append((order, [nbytes for name, nbytes, _ in traffic.calls if name == "allreduce_"]))
    return found


def test_ddp_fills_its_buckets_so() -> None:
    """The rule of exercise 1 is what DDP does: the messages of a real step have these sizes."""
    limits = [(MIB, 25 * MIB), (5242, 5242), (1, 1)]  # of the first bucket, and of the others
    for found in warm.fork_ranks(ddp_in_rank, 2):
        for (sizes, sent), (first, cap) in zip(found, limits, strict=True):
            assert len(sizes) == 16
            buckets = ddp_buckets(sizes, first, cap)
            assert sent == [sum(sizes[i] for i in bucket) for bucket in buckets]


# --- 2. accumulate -----------------------------------------------------------------------------

VOCABULARY, IGNORED, SMALL = 13, -100, 64  # SMALL: bytes that the other collective may send
Couple = tuple[torch.Tensor, torch.Tensor]


class TinyLM(nn.Module):
    """Notes each forward ("F") and, when its gradient comes, each backward ("B")."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []
        self.embed = nn.Embedding(VOCABULARY, 6)
        self.hidden, self.head = nn.Linear(6, 12), nn.Linear(12, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:  # -> [batch, seq, vocabulary]
        logits = self.head(torch.tanh(self.hidden(self.embed(tokens))))
        self.events.append("F")
        logits.register_hook(lambda _: self.events.append("B"))
        return logits


def couples(numbers: Sequence[int], padding: bool) -> list[list[Couple]]:
    """Each rank's micro-batches: all of one size, or of other sizes and padded, one throughout."""
    draw = torch.Generator().manual_seed(0)
    ranks = []
    for rank, number in enumerate(numbers):
        own = []
        for i in range(number):
            shape = (1 + (rank + i) % 3, 3 + (2 * rank + i) % 4) if padding else (2, 5)
            tokens = torch.randint(VOCABULARY, shape, generator=draw)
            targets = torch.randint(VOCABULARY, shape, generator=draw)
            if padding:
                gaps = torch.rand(shape, generator=draw) < 0.1 + 0.2 * ((rank + i) % 4)
                targets[gaps if rank + i != 1 else gaps | True] = IGNORED
            own.append((tokens, targets))
        ranks.append(own)
    return ranks


Accumulated = tuple[float, float, float, list[Call], list[Call], str]


def accumulated_in_rank(at: Address, cases: list[tuple[list[int], bool]]) -> list[Accumulated]:
    """Returned and right mean, max difference of a gradient, calls, a plain step's calls, events."""
    done = []
    for numbers, padding in cases:
        torch.manual_seed(0)
        reference, inner = TinyLM().double(), TinyLM().double()
        inner.load_state_dict(reference.state_dict())
        model = DistributedDataParallel(inner, bucket_cap_mb=0.0005)
        ranks = couples(numbers, padding)
        for _ in range(2):  # DDP rebuilds its buckets after the first
            with Traffic() as usual:
                model(ranks[0][0][0]).sum().backward()
        model.zero_grad()
        inner.events.clear()
        returned, calls = watched(at, model, ranks[dist.get_rank()])

        everything = list(itertools.chain(*ranks))
        logits = torch.cat([reference(tokens).flatten(0, 1) for tokens, _ in everything])
        targets = torch.cat([targets.flatten() for _, targets in everything])
        mean = F.cross_entropy(logits, targets, ignore_index=IGNORED)
        mean.backward()
        pairs: Any = zip(inner.parameters(), reference.parameters(), strict=True)
        difference = max((p.grad - q.grad).abs().max().item() for p, q in pairs)
        own = [call for call in usual.calls if call[0] == "allreduce_"]
        done.append((returned, mean.item(), difference, calls, own, "".join(inner.events)))
    return done


def grade_accumulate(answer: Answer) -> None:
    # Equal numbers come first: whoever synchronizes too often is caught there, and does not hang.
    expect_accumulated(answer, [([3, 3], False), ([3, 3], True)])
    for uneven in ([3, 1], [4], [3, 1, 4], [3, 1, 4, 2]):
        expect_accumulated(answer, [([2] * len(uneven), True), (uneven, True)])


def expect_accumulated(answer: Answer, cases: list[tuple[list[int], bool]]) -> None:
    world_size = len(cases[0][0])
    ranks = on_ranks(accumulated_in_rank, world_size, answer, cases)
    for rank, runs in enumerate(ranks):
        for (numbers, padding), results in zip(cases, runs, strict=True):
            returned, mean, difference, calls, usual, events = results
            of = "padded " if padding else ""
            at = f"{world_size} ranks, {numbers} {of}micro-batches: rank {rank}"
            needed = sorted(nbytes for _, nbytes, _ in usual)
            assert needed[0] > SMALL
            buckets = sorted(n for name, n, _ in calls if name == "allreduce_" and n > SMALL)
            assert buckets == needed, (
                f"{at}: {len(buckets)} all-reduces of gradients, one step makes {len(needed)}"
            )
            others = len(calls) - len(buckets)
            assert others <= 1, f"{at}: {others} further collectives, one is enough"
            largest = max((n for name, n, _ in calls if name != "allreduce_"), default=0)
            assert largest <= SMALL, f"{at}: a message of {largest} bytes"
            assert events == "FB" * numbers[rank], f"{at}: in the order {events}, not FBFB..."
            assert difference <= 1e-12, f"{at}: {difference:.2g} off one process's gradient"
            assert isinstance(returned, float), f"{at}: {returned!r} is not a float"
            close = math.isclose(returned, mean, rel_tol=1e-9)
            assert close, f"{at}: returned {returned:.6g}, the mean is {mean:.6g}"


def loss_of(model: nn.Module, couple: Couple) -> torch.Tensor:
    logits, targets = model(couple[0]).flatten(0, 1), couple[1].flatten()
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


def summed_up(
    model: DistributedDataParallel, micro_batches: Sequence[Couple], parts: Sequence[float] = ()
) -> torch.Tensor:
    """All-reduces in the last backward; this rank's loss, each divided by its part, and count."""
    totals = torch.zeros(2, dtype=torch.float64)
    for i, couple in enumerate(micro_batches):
        with contextlib.nullcontext() if i == len(micro_batches) - 1 else model.no_sync():
            loss = loss_of(model, couple) / (parts[i] if parts else 1)
            loss.backward()
        totals += torch.stack([loss.detach(), (couple[1] != IGNORED).sum()])
    return totals


def scale(model: nn.Module, by: float) -> None:
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad *= by


def finished(model: nn.Module, totals: torch.Tensor) -> float:
    dist.all_reduce(totals)
    scale(model, dist.get_world_size() / totals[1].item())
    return (totals[0] / totals[1]).item()


def syncs_every_time(model: DistributedDataParallel, micro_batches: Sequence[Couple]) -> float:
    totals = sum(summed_up(model, [couple]) for couple in micro_batches)
    assert isinstance(totals, torch.Tensor)
    return finished(model, totals)


def forward_outside(model: DistributedDataParallel, micro_batches: Sequence[Couple]) -> float:
    totals = torch.zeros(2, dtype=torch.float64)
    for i, couple in enumerate(micro_batches):
        loss = loss_of(model, couple)
        with contextlib.nullcontext() if i == len(micro_batches) - 1 else model.no_sync():
            loss.backward()
        totals += torch.stack([loss.detach(), (couple[1] != IGNORED).sum()])
    return finished(model, totals)


def one_large_graph(model: DistributedDataParallel, micro_batches: Sequence[Couple]) -> float:
    losses = []
    for i, couple in enumerate(micro_batches):
        with contextlib.nullcontext() if i == len(micro_batches) - 1 else model.no_sync():
            losses.append(loss_of(model, couple))
    loss = torch.stack(losses).sum()
    loss.backward()
    count = sum((targets != IGNORED).sum() for _, targets in micro_batches)
    assert isinstance(count, torch.Tensor)
    return finished(model, torch.stack([loss.detach(), count]))


def mean_over_ranks(loss: torch.Tensor) -> float:
    dist.all_reduce(loss)
    return loss.item() / dist.get_world_size()


def mean_of_means(model: DistributedDataParallel, micro_batches: Sequence[Couple]) -> float:
    """What most training loops do: each micro-batch's mean, divided by their number."""
    counts = [max((targets != IGNORED).sum().item(), 1) for _, targets in micro_batches]
    parts = [len(counts) * count for count in counts]
    return mean_over_ranks(summed_up(model, micro_batches, parts)[0])


def own_count(model: DistributedDataParallel, micro_batches: Sequence[Couple]) -> float:
    """Each rank divides by its own targets, and DDP averages over the ranks."""
    count = sum((targets != IGNORED).sum().item() for _, targets in micro_batches)
    parts = [max(count, 1)] * len(micro_batches)
    return mean_over_ranks(summed_up(model, micro_batches, parts)[0])


def forgets_what_ddp_divides(
    model: DistributedDataParallel, micro_batches: Sequence[Couple]
) -> float:
    mean = finished(model, summed_up(model, micro_batches))
    scale(model, 1 / dist.get_world_size())
    return mean


def counts_padding(model: DistributedDataParallel, micro_batches: Sequence[Couple]) -> float:
    totals = summed_up(model, micro_batches)
    totals[1] = sum(targets.numel() for _, targets in micro_batches)
    return finished(model, totals)


def asks_twice(model: DistributedDataParallel, micro_batches: Sequence[Couple]) -> float:
    loss, count = summed_up(model, micro_batches)
    dist.all_reduce(loss)
    dist.all_reduce(count)
    scale(model, dist.get_world_size() / count.item())
    return (loss / count).item()


def its_own_loss(model: DistributedDataParallel, micro_batches: Sequence[Couple]) -> float:
    totals = summed_up(model, micro_batches)
    own = totals[0].item() / totals[1].item()
    finished(model, totals)
    return own


# --- 3. average_top_k --------------------------------------------------------------------------


class Given(TorchDispatchMode):
    """Names of the collectives, and the bytes that this rank contributes to each."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = operator.name().split("::")[1].split(".")[0]
        if "c10d" in operator.namespace and "wait" not in name and "wrap" not in name:
            into = operator.namespace == "c10d" and ("gather" in name or "scatter" in name)
            given = args[1] if into else args[0]  # where the result comes first, it comes second
            tensors = given if isinstance(given, list | tuple) else [given]
            self.calls.append((name, sum(t.nbytes for t in tensors if hasattr(t, "nbytes"))))
        return operator(*args, **(kwargs or {}))


TOP_K = [  # elements, k, whole numbers
    *((count, k, True) for count, k in ((1, 1), (7, 1), (7, 3), (7, 7), (40, 5), (300, 31))),
    *((count, k, False) for count, k in ((40, 5), (300, 31))),
]
STEPS = 3


def gradient_of(rank: int, step: int, count: int, whole: bool) -> torch.Tensor:
    """Whole multiples of 12, whose sums and means over 1 to 4 ranks are exact; or normal ones."""
    draw = torch.Generator().manual_seed(1000 * step + 10 * count + rank)
    normal = torch.randn(count, generator=draw)
    return (100 * normal).round() * 12 if whole else normal


Sent = tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool, list[tuple[str, int]]]


def top_k_in_rank(at: Address) -> list[list[Sent]]:
    """For each of TOP_K and each step: the mean; residual and gradient before it, the residual
    after it; whether the gradient was changed; the calls."""
    module, path, name = at
    answer = getattr(warm.load(module, path), name)
    done = []
    for count, k, whole in TOP_K:
        residual, steps = torch.zeros(count), []
        for step in range(STEPS):
            gradient = gradient_of(dist.get_rank(), step, count, whole)
            given, before = gradient.clone(), residual + gradient
            with Given() as traffic:
                mean = answer(gradient, residual, k)
            changed = not torch.equal(gradient, given)
            steps.append((mean.clone(), before, residual.clone(), changed, traffic.calls))
        done.append(steps)
    return done


def grade_average_top_k(answer: Answer) -> None:
    for world_size in (2, 3, 4, 1):
        ranks = on_ranks(top_k_in_rank, world_size, answer)
        for (count, k, whole), cases in zip(TOP_K, zip(*ranks, strict=True), strict=True):
            for step, runs in enumerate(zip(*cases, strict=True)):
                at = f"{world_size} ranks, {k} of {count}, step {step}"
                expect_sparse(runs, count, k, whole, at)


def expect_sparse(runs: Sequence[Sent], count: int, k: int, whole: bool, at: str) -> None:
    for rank, (mean, _, _, changed, calls) in enumerate(runs):
        assert not changed, f"{at}: the gradient was changed"
        names = [name for name, _ in calls]
        assert all("gather" in name for name in names), f"{at}: {names}, not all-gathers alone"
        assert len(calls) <= 2, f"{at}: {len(calls)} all-gathers, two are enough"
        nbytes = sum(nbytes for _, nbytes in calls)
        assert nbytes <= 8 * k, f"{at}: {nbytes} bytes, {8 * k} are enough"
        assert mean.shape == (count,), f"{at}: a mean of shape {tuple(mean.shape)}"
        assert mean.dtype == torch.float32, f"{at}: a mean in {mean.dtype}"
        assert torch.equal(mean, runs[0][0]), f"{at}: rank {rank} has other bits than rank 0"
    for rank, (_, before, after, _, _) in enumerate(runs):
        left = after == before
        assert (left | (after == 0)).all(), f"{at}: rank {rank}'s residual is neither sent nor left"
        sent = before - after
        number = int((sent != 0).sum())
        assert number <= k, f"{at}: rank {rank} forgets {number} elements and sends {k}"
        least = sent[sent != 0].abs().min().item() if number else math.inf
        most = after.abs().max().item()
        assert least >= most, f"{at}: rank {rank} sent {least:g} and kept {most:g}"
        due = min(k, int((before != 0).sum()))
        assert number == due, f"{at}: rank {rank} sent {number} elements, {due} are due"
    right = torch.stack([before - after for _, before, after, _, _ in runs]).double().mean(0)
    error = (runs[0][0].double() - right).abs().max().item()
    bound = 0 if whole else 1e-5
    assert error <= bound, f"{at}: {error:.2g} off the mean of what was sent"


def picked(residual: torch.Tensor, of: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Takes the k largest of `of` out of the residual: indices (int32) and values."""
    indices = of.topk(k).indices.to(torch.int32)
    values = residual[indices]
    residual[indices] = 0
    return indices, values


def gathered(own: torch.Tensor) -> list[torch.Tensor]:
    all_of_it = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(all_of_it, own)
    return all_of_it


def spread_out(count: int, indices: Any, values: Any) -> torch.Tensor:
    total = torch.zeros(count)
    for places, sent in zip(indices, values, strict=True):
        total[places] += sent
    return total


def chosen(gradient: torch.Tensor, residual: torch.Tensor, k: int) -> tuple[Any, Any]:
    residual += gradient
    return picked(residual, residual.abs(), k)


def mean_of(count: int, indices: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    total = spread_out(count, gathered(indices), gathered(values))
    return total / dist.get_world_size()


def no_memory(gradient: torch.Tensor, residual: torch.Tensor, k: int) -> torch.Tensor:
    return mean_of(len(gradient), *picked(gradient.clone(), gradient.abs(), k))


def remembers_everything(gradient: torch.Tensor, residual: torch.Tensor, k: int) -> torch.Tensor:
    residual += gradient
    return mean_of(len(gradient), *picked(residual.clone(), residual.abs(), k))


def largest_gradients(gradient: torch.Tensor, residual: torch.Tensor, k: int) -> torch.Tensor:
    residual += gradient
    return mean_of(len(gradient), *picked(residual, gradient.abs(), k))


def largest_with_sign(gradient: torch.Tensor, residual: torch.Tensor, k: int) -> torch.Tensor:
    residual += gradient
    return mean_of(len(gradient), *picked(residual, residual, k))


def sums(gradient: torch.Tensor, residual: torch.Tensor, k: int) -> torch.Tensor:
    mean = mean_of(len(gradient), *chosen(gradient, residual, k))
    return mean * dist.get_world_size()


def divides_by_senders(gradient: torch.Tensor, residual: torch.Tensor, k: int) -> torch.Tensor:
    indices, values = map(gathered, chosen(gradient, residual, k))
    senders = spread_out(len(gradient), indices, [torch.ones(k)] * len(indices))
    return spread_out(len(gradient), indices, values) / senders.clamp(min=1)


def last_one_wins(gradient: torch.Tensor, residual: torch.Tensor, k: int) -> torch.Tensor:
    """Also what `total[torch.cat(indices)] += torch.cat(values)` does where two ranks meet."""
    indices, values = map(gathered, chosen(gradient, residual, k))
    total = torch.zeros(len(gradient))
    for places, sent in zip(indices, values, strict=True):
        total[places] = sent
    return total / dist.get_world_size()


def rank_0_chooses(gradient: torch.Tensor, residual: torch.Tensor, k: int) -> torch.Tensor:
    residual += gradient
    chosen = gathered(residual.abs().topk(k).indices.to(torch.int32))[0]
    values = residual[chosen]
    residual[chosen] = 0
    total = spread_out(len(gradient), [chosen], [torch.stack(gathered(values)).sum(0)])
    return total / dist.get_world_size()


def its_own_first(gradient: torch.Tensor, residual: torch.Tensor, k: int) -> torch.Tensor:
    indices, values = map(gathered, chosen(gradient, residual, k))
    rank = dist.get_rank()
    turned = indices[rank:] + indices[:rank], values[rank:] + values[:rank]
    return spread_out(len(gradient), *turned) / dist.get_world_size()


def long_indices(gradient: torch.Tensor, residual: torch.Tensor, k: int) -> torch.Tensor:
    indices, values = chosen(gradient, residual, k)
    return mean_of(len(gradient), indices.long(), values)


def dense(gradient: torch.Tensor, residual: torch.Tensor, k: int) -> torch.Tensor:
    total = spread_out(len(gradient), *([part] for part in chosen(gradient, residual, k)))
    dist.all_reduce(total)
    return total / dist.get_world_size()


def into_the_gradient(gradient: torch.Tensor, residual: torch.Tensor, k: int) -> torch.Tensor:
    gradient += residual
    residual.copy_(gradient)
    return mean_of(len(gradient), *picked(residual, residual.abs(), k))


# --- 4. save_checkpoint ------------------------------------------------------------------------

CHECKPOINT = re.compile(r"step-\d{8,}\.ckpt")
View = dict[str, bytes]


def contents(folder: Path) -> View:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def sealed(state: bytes) -> bytes:
    return hashlib.sha256(state).digest() + state


def bytes_like(seed: int, count: int) -> bytes:
    return random.Random(seed).randbytes(count)


def line_by_line(function: Callable[[], object], inspect: Callable[[], None]) -> None:
    """Call a function, and `inspect` before each line of Python that it runs, the library's too.

    What is in a folder at that moment is what a process that is killed there leaves.
    """

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        inspect()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    inspect()


def views_while(function: Callable[[], object], folder: Path) -> list[View]:
    """All that there was to see in the folder while the function ran, in order."""
    views = [contents(folder)]

    def look() -> None:
        now = contents(folder)
        if now != views[-1]:
            views.append(now)

    line_by_line(function, look)
    return views


Synced = tuple[int, int, int]  # inode, bytes, and the inode that had the checkpoint's name then


@contextlib.contextmanager
def syncs(answer: Answer, path: Path) -> Iterator[list[Synced]]:
    """Calls of os.fsync and os.fdatasync, under whichever name the answer has them."""
    calls: list[Synced] = []

    def noting(real: Callable[[int], None]) -> Callable[[int], None]:
        def sync(descriptor: Any) -> None:
            number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
            status = os.fstat(number)
            named = path.stat().st_ino if path.exists() else -1
            size = -1 if stat.S_ISDIR(status.st_mode) else status.st_size
            calls.append((status.st_ino, size, named))
            real(descriptor)

        return sync

    with contextlib.ExitStack() as stack:
        for real in {os.fsync, getattr(os, "fdatasync", os.fsync)}:  # macOS has only the first
            for module in (vars(os), getattr(answer, "__globals__", {})):
                names = [name for name, value in module.items() if value is real]
                stack.enter_context(mock.patch.dict(module, dict.fromkeys(names, noting(real))))
        yield calls


def killed_in_rank(at: Address, folder: Path, state: bytes, step: int) -> None:
    """Die as soon as some of the draft is on the disk."""
    module, path, name = at
    answer = getattr(warm.load(module, path), name)

    def look() -> None:
        if any(len(v) for n, v in contents(folder).items() if not CHECKPOINT.fullmatch(n)):
            os.kill(os.getpid(), signal.SIGKILL)

    line_by_line(lambda: answer(state, folder, step), look)


@contextlib.contextmanager
def full_disk(after: int) -> Iterator[None]:
    """No file may grow beyond this number of bytes: writing fails half-way, with an OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (after, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def grade_save_checkpoint(answer: Answer) -> None:
    with tempfile.TemporaryDirectory() as name:
        grade_in(Path(name), answer)


def grade_in(folder: Path, answer: Answer) -> None:
    right: View = {}
    for step, count in ((7, 100_000), (42, 0), (123_456_789, 5)):
        state = bytes_like(step, count)
        returned = answer(state, folder, step)
        right[f"step-{step:08}.ckpt"] = sealed(state)
        assert returned is None, f"returned {returned!r}"
        expect_contents(folder, right, f"after saving step {step}")

    for what, seed, count in (("a new step", 1, 200_000), ("the same step again", 2, 150_000)):
        state, path = bytes_like(seed, count), folder / "step-00000043.ckpt"
        with syncs(answer, path) as calls:
            views = views_while(lambda s=state: answer(s, folder, 43), folder)  # type: ignore[misc]
        for view in views:
            expect_whole(view, right, path.name, sealed(state), what)
        drafts = {name for view in views for name in view if not CHECKPOINT.fullmatch(name)}
        assert drafts, f"{what}: no file of another name was seen in the folder"
        right[path.name] = sealed(state)
        expect_contents(folder, right, f"after saving {what}")
        expect_synced(calls, folder, path, what)

    state = bytes_like(3, 400_000)
    for what, step in (("a new step", 44), ("the same step again", 43)):
        failed = False
        try:
            with full_disk(after=50_000):
                answer(state, folder, step)
        except OSError:
            failed = True
        assert failed, f"disk full, {what}: no OSError"
        expect_contents(folder, right, f"disk full, {what}")

    with pytest.raises(warm.RankError, match="-9"):
        on_ranks(killed_in_rank, 1, answer, folder, state, 44)
    view = contents(folder)
    for name, content in right.items():
        assert view.get(name) == content, f"killed by a signal: {name} is gone or changed"
    state = bytes_like(4, 1000)  # shorter than what the killed one has left
    try:
        answer(state, folder, 44)
    except OSError as error:
        raise AssertionError(f"what a killed process has left hinders the next: {error}") from error
    right["step-00000044.ckpt"] = sealed(state)
    view = {name: c for name, c in contents(folder).items() if CHECKPOINT.fullmatch(name)}
    assert view == right, f"after a killed process: {described(view)}, not {described(right)}"


def described(view: View) -> str:
    return ", ".join(f"{name} ({len(content)} bytes)" for name, content in sorted(view.items()))


def expect_contents(folder: Path, right: View, when: str) -> None:
    there = contents(folder)
    changed = sorted(name for name in right if there.get(name, right[name]) != right[name])
    assert there.keys() == right.keys(), f"{when}: {described(there)}, not {described(right)}"
    assert not changed, f"{when}: other bytes in {changed} than they should have"


def expect_whole(view: View, before: View, name: str, new: bytes, what: str) -> None:
    for other, content in before.items():
        if other != name:
            assert view.get(other) == content, f"{what}: {other} was touched"
    if name in before:
        assert name in view, f"{what}: killed half-way, {name} is gone"
    if name in view:
        whole = view[name] in (before.get(name), new)
        assert whole, f"{what}: killed half-way, {name} has {len(view[name])} of {len(new)} bytes"


def expect_synced(calls: Sequence[Synced], folder: Path, path: Path, what: str) -> None:
    inode, size = path.stat().st_ino, path.stat().st_size
    own = [(nbytes, named) for file, nbytes, named in calls if file == inode]
    assert own, f"{what}: the file was never synced"
    whole = [named for nbytes, named in own if nbytes == size]
    assert whole, f"{what}: synced at {own[-1][0]} bytes of {size}: the rest was in a buffer"
    assert any(named != inode for named in whole), f"{what}: synced when it had its name already"
    at = folder.stat().st_ino
    after = [file for file, _, named in calls if file == at and named == inode]
    assert after, f"{what}: the folder was not synced after the file had got its name"


def draft_of(folder: Path, step: int) -> tuple[Path, Path]:
    path = folder / f"step-{step:08}.ckpt"
    return path, path.with_suffix(".tmp")


def written(path: Path, state: bytes, mode: str = "wb") -> None:
    with path.open(mode) as file:
        file.write(sealed(state))
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def straight_to_its_name(state: bytes, folder: Path, step: int) -> None:
    written(draft_of(folder, step)[0], state)
    sync_folder(folder)


def never_synced(state: bytes, folder: Path, step: int) -> None:
    path, draft = draft_of(folder, step)
    draft.write_bytes(sealed(state))
    draft.replace(path)
    sync_folder(folder)


def still_in_the_buffer(state: bytes, folder: Path, step: int) -> None:
    path, draft = draft_of(folder, step)
    with draft.open("wb", buffering=2**20) as file:
        file.write(sealed(state))
        os.fsync(file.fileno())
    draft.replace(path)
    sync_folder(folder)


def synced_too_late(state: bytes, folder: Path, step: int) -> None:
    path, draft = draft_of(folder, step)
    draft.write_bytes(sealed(state))
    draft.replace(path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    sync_folder(folder)


def name_not_synced(state: bytes, folder: Path, step: int) -> None:
    path, draft = draft_of(folder, step)
    written(draft, state)
    draft.replace(path)


def folder_too_early(state: bytes, folder: Path, step: int) -> None:
    path, draft = draft_of(folder, step)
    written(draft, state)
    sync_folder(folder)
    draft.replace(path)


def old_one_first(state: bytes, folder: Path, step: int) -> None:
    path, draft = draft_of(folder, step)
    written(draft, state)
    path.unlink(missing_ok=True)
    draft.replace(path)
    sync_folder(folder)


def room_first(state: bytes, folder: Path, step: int) -> None:
    """Makes room by removing the oldest one, when there are three."""
    path, draft = draft_of(folder, step)
    there = sorted(folder.glob("step-*.ckpt"))
    if len(there) > 2:
        there[0].unlink()
    written(draft, state)
    draft.replace(path)
    sync_folder(folder)


def copied(state: bytes, folder: Path, step: int) -> None:
    path, draft = draft_of(folder, step)
    written(draft, state)
    shutil.copyfile(draft, path)
    draft.unlink()
    sync_folder(folder)


def draft_elsewhere(state: bytes, folder: Path, step: int) -> None:
    draft = folder.parent / f"{folder.name}.tmp"
    written(draft, state)
    draft.replace(draft_of(folder, step)[0])
    sync_folder(folder)


def leaves_its_draft(state: bytes, folder: Path, step: int) -> None:
    path, draft = draft_of(folder, step)
    written(draft, state)
    draft.replace(path)
    sync_folder(folder)


def says_nothing(state: bytes, folder: Path, step: int) -> None:
    path, draft = draft_of(folder, step)
    try:
        written(draft, state)
        draft.replace(path)
        sync_folder(folder)
    except OSError:
        draft.unlink()


def insists_on_a_new_draft(state: bytes, folder: Path, step: int) -> None:
    path, draft = draft_of(folder, step)
    with draft.open("xb"):
        pass
    try:
        written(draft, state)
        draft.replace(path)
    except OSError:
        draft.unlink()
        raise
    sync_folder(folder)


# --- 5. newest_sound ---------------------------------------------------------------------------


def newest_case(damage: dict[int, bytes | None]) -> View:
    """Three checkpoints, of which some are replaced (None: taken away)."""
    view = {step: sealed(bytes_like(step, 1000 + step)) for step in (8, 9, 10)} | damage
    return {f"step-{step:08}.ckpt": c for step, c in view.items() if c is not None}


def grade_newest_sound(answer: Answer) -> None:
    whole = {step: bytes_like(step, 1000 + step) for step in (8, 9, 10)}
    seal = sealed(whole[10])
    harmed = {
        "empty": b"",
        "cut off in the digest": seal[:31],
        "cut off behind the digest": seal[:32],
        "cut off half-way": seal[:500],
        "cut off by one byte": seal[:-1],
        "a byte added": seal + b"\0",
        "the digest alone missing": seal[32:],
        "a bit of the state flipped": seal[:-1] + bytes([seal[-1] ^ 1]),
        "a bit of the digest flipped": bytes([seal[0] ^ 128]) + seal[1:],
        "zeros": bytes(len(seal)),
    }
    cases: list[tuple[str, View, int | None]] = [
        ("no files", {}, None),
        ("three sound ones", newest_case({}), 10),
        *((f"the newest: {what}", newest_case({10: c}), 9) for what, c in harmed.items()),
        ("the newest two broken", newest_case({10: seal[:-1], 9: b""}), 8),
        ("all broken", newest_case(dict.fromkeys((8, 9, 10), b"broken")), None),
        ("nine digits", newest_case({99_999_999: sealed(b"a"), 100_000_000: sealed(b"b")}), 10**8),
        ("an empty state", newest_case({11: sealed(b"")}), 11),
        (
            "files of other names",
            newest_case({})
            | {
                name: sealed(b"no checkpoint")
                for name in (
                    "step-00000011.tmp",
                    "step-00000011.ckpt.tmp",
                    "step-00000011.ckpt~",
                    ".step-00000011.ckpt",
                    "my-step-00000011.ckpt",
                    "step-latest.ckpt",
                    "README",
                )
            },
            10,
        ),
    ]
    states = whole | {99_999_999: b"a", 10**8: b"b", 11: b""}
    with tempfile.TemporaryDirectory() as name:
        assert found(answer, Path(name, "none"), "no such folder") is None, "no such folder"
        for number, (what, view, step) in enumerate(cases):
            folder = Path(name, str(number))
            folder.mkdir()
            for age, (file, content) in enumerate(view.items()):
                (folder / file).write_bytes(content)
                os.utime(folder / file, (10**9 - age, 10**9 - age))  # the first is the latest
            expect_newest(answer, folder, None if step is None else (step, states[step]), what)

        folder = Path(name, "unreadable")
        folder.mkdir()
        for file, content in newest_case({}).items():
            (folder / file).write_bytes(content)
        (folder / "step-00000011.ckpt").mkdir()
        (folder / "step-00000012.ckpt").symlink_to(folder / "nothing")
        expect_newest(answer, folder, (10, whole[10]), "names that cannot be read")


def found(answer: Answer, folder: Path, what: str) -> Any:
    try:
        return answer(folder)
    except (OSError, ValueError, IndexError, TypeError) as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error


def expect_newest(answer: Answer, folder: Path, right: Any, what: str) -> None:
    opened: list[str] = []

    def noting(real: Any) -> Any:
        def open_it(file: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(file, str | os.PathLike):
                opened.append(Path(file).name)
            return real(file, *args, **kwargs)

        return open_it

    files = {path: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
    names = sorted(folder.iterdir())
    with (
        mock.patch("builtins.open", noting(open)),
        mock.patch("io.open", noting(open)),
        mock.patch("os.open", noting(os.open)),
    ):
        got = found(answer, folder, what)
    if got is None or right is None:
        answered = got if got is None else f"step {got[0]}"
        assert got == right, f"{what}: {answered}, not {right if right is None else right[0]}"
    else:
        assert got[0] == right[0], f"{what}: step {got[0]}, not {right[0]}"
        assert got[1] == right[1], f"{what}: step {got[0]}, but other bytes than were saved"
        older = [n for n in opened if CHECKPOINT.fullmatch(n) and int(n[5:-5]) < right[0]]
        assert not older, f"{what}: {older[0]} was opened"
    assert sorted(folder.iterdir()) == names, f"{what}: the folder was changed"
    assert all(p.read_bytes() == c for p, c in files.items()), f"{what}: a file was changed"


def opened_sound(path: Path) -> bytes | None:
    with contextlib.suppress(OSError):
        content = path.read_bytes()
        if sealed(content[32:]) == content:
            return content[32:]
    return None


def step_of(path: Path) -> int:
    return int(path.name[5:-5])


def checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*") if CHECKPOINT.fullmatch(path.name)]


def first_sound(paths: Sequence[Path]) -> tuple[int, bytes] | None:
    for path in paths:
        if (state := opened_sound(path)) is not None:
            return step_of(path), state
    return None


def newest_by_time(folder: Path) -> Any:
    there = [path for path in checkpoints(folder) if path.exists()]
    return first_sound(sorted(there, key=lambda path: -path.stat().st_mtime))


def newest_by_name(folder: Path) -> Any:
    return first_sound(sorted(checkpoints(folder), reverse=True))


def trusts_it(folder: Path) -> Any:
    paths = sorted(checkpoints(folder), key=step_of)
    return (step_of(paths[-1]), paths[-1].read_bytes()[32:]) if paths else None


def trusts_its_length(folder: Path) -> Any:
    for path in sorted(checkpoints(folder), key=step_of, reverse=True):
        if path.is_file() and path.stat().st_size > 32:
            return step_of(path), path.read_bytes()[32:]
    return None


def the_newest_or_nothing(folder: Path) -> Any:
    return first_sound(sorted(checkpoints(folder), key=step_of)[-1:])


def any_name(folder: Path) -> Any:
    paths = [path for path in folder.glob("*") if re.search(r"step-\d+", path.name)]
    number = {path: int(re.findall(r"\d+", path.name)[0]) for path in paths}
    for path in sorted(paths, key=lambda path: number[path], reverse=True):
        if (state := opened_sound(path)) is not None:
            return number[path], state
    return None


def stumbles(folder: Path) -> Any:
    for path in sorted(checkpoints(folder), key=step_of, reverse=True):
        content = path.read_bytes()
        if sealed(content[32:]) == content:
            return step_of(path), content[32:]
    return None


def needs_a_folder(folder: Path) -> Any:
    os.listdir(folder)
    return first_sound(sorted(checkpoints(folder), key=step_of, reverse=True))


def reads_them_all(folder: Path) -> Any:
    states = {step_of(path): opened_sound(path) for path in checkpoints(folder)}
    sound = [(step, state) for step, state in states.items() if state is not None]
    return max(sound, default=None)


def cleans_up(folder: Path) -> Any:
    for path in sorted(checkpoints(folder), key=step_of, reverse=True):
        if (state := opened_sound(path)) is not None:
            return step_of(path), state
        if path.is_file():
            path.unlink()
    return None


# --- 6. find_culprits --------------------------------------------------------------------------

OPERATIONS = ("all_reduce", "broadcast", "all_gather", "reduce_scatter")
Operation = tuple[str, tuple[int, ...]]
Traces = list[list[Record]]


def normal(number: int) -> Operation:
    """What a healthy program calls at this number."""
    return OPERATIONS[number % 3], (100 + number % 7, 8)


def trace(
    last: int, first: int = 0, odd: dict[int, Operation] | None = None, at: int = -1, now: str = ""
) -> list[Record]:
    """A rank's records from `first` to `last`; from number `at` on, their state is `now`."""
    calls = [(odd or {}).get(number, normal(number)) for number in range(last + 1)]
    states = [now if now and number >= at else "completed" for number in range(last + 1)]
    return [(n, *calls[n], states[n]) for n in range(first, last + 1)]


def culprit_cases() -> list[tuple[str, Traces, tuple[int, list[int]] | None]]:
    """What happened, what the recorders held, and who it was."""

    def other(*operation: Any, last: int = 9, state: str = "") -> list[Record]:
        return trace(last, odd={8: operation}, at=8, now=state)

    well, behind, twenty = trace(9), trace(7), trace(20, first=9)
    hung, late = trace(9, at=6, now="started"), trace(9, at=6, now="scheduled")
    a, b, c = other("broadcast", (101, 8)), other("all_reduce", (7, 7)), other("barrier", ())
    shape, operation = other("all_gather", (9,)), other("reduce_scatter", normal(8)[1])
    shifted = {6: ("all_reduce", (1,))} | {n: normal(n - 1) for n in range(7, 12)}
    on_time = trace(9, at=8, now="started")
    return [
        ("no ranks", [], None),
        ("nothing called", [[], [], []], None),
        ("all well", [well] * 4, None),
        ("all well, of other lengths", [trace(9, first) for first in (0, 3, 9)], None),
        ("one is behind", [hung, hung, trace(5)], (6, [2])),
        ("rank 0 is behind", [trace(5), hung, hung], (6, [0])),
        ("behind, each at its number", [well, trace(3), well, trace(5)], (4, [1])),
        ("all but one behind", [hung, trace(5), trace(5), trace(5)], (6, [1, 2, 3])),
        ("one never began", [trace(9, at=0, now="started"), [], trace(4)], (0, [1])),
        ("an operation", [well, well, operation, well], (8, [2])),
        ("a shape", [well, well, well, shape], (8, [3])),
        ("rank 0 calls one more", [trace(11, odd=shifted), *[trace(10)] * 3], (6, [0])),
        ("two ranks differ", [well, shape], (8, [0, 1])),
        ("two against two", [well, shape, well, shape], (8, [0, 1, 2, 3])),
        ("two, two and one", [a, b, a, b, c], (8, [0, 1, 2, 3, 4])),
        ("most, though not half", [c, a, b, a, well], (8, [0, 2, 4])),
        ("a tie, and one behind", [well, shape, behind], (8, [0, 1, 2])),
        ("one differs, two are behind", [behind, well, shape, well, behind], (8, [0, 2, 4])),
        ("first a shape, then behind", [trace(9, odd={3: a[8][1:3]}), well, trace(5)], (3, [0])),
        ("overwritten", [trace(99, 60), trace(99, 95), trace(99, 99)], None),
        ("overwritten, and one behind", [trace(99, 60), trace(41, 2), trace(99, 90)], (42, [1])),
        ("overwritten, and one empty", [trace(99, 90), [], trace(99, 95)], (0, [1])),
        ("one has forgotten it", [twenty, other("x", (), last=20), *[trace(20)] * 2], (8, [1])),
        ("only two remember", [twenty, other("x", (), last=20), twenty, trace(20)], (8, [1, 3])),
        ("a device is late", [hung, hung, late], (6, [2])),
        ("a late device, and one behind it", [hung, late, trace(8, at=6, now="started")], (6, [1])),
        ("late where others are done", [late, trace(9, at=7, now="started"), late], (6, [0, 2])),
        ("the network", [hung, hung, hung], (6, [])),
        ("the network, for some", [well, hung], (6, [])),
        ("the network, one behind it", [hung, trace(7, at=6, now="started")], (6, [])),
        ("no device has begun", [late, late, late], (6, [])),
        (
            "a late device, but another shape",
            [on_time, trace(9, at=8, now="scheduled"), other("x", (), state="started"), on_time],
            (8, [2]),
        ),
    ]


def planted(draw: random.Random) -> tuple[str, Traces, tuple[int, list[int]]]:
    """A healthy run, one fault at one number, and any consequences behind it."""
    world_size, number = draw.randrange(3, 9), draw.randrange(5, 60)
    culprits = sorted(draw.sample(range(world_size), draw.randrange(1, (world_size + 1) // 2)))
    kind = draw.choice(["behind", "odd", "late"])
    traces = []
    for rank in range(world_size):
        guilty = rank in culprits
        last = number - 1 if guilty and kind == "behind" else number + draw.randrange(4)
        odd: dict[int, Operation] = {number + 1: ("broadcast", (draw.randrange(2),))}
        if guilty and kind == "odd":
            odd[number] = ("barrier", (rank,))  # each its own
        state = "scheduled" if guilty and kind == "late" else "started"
        traces.append(trace(last, draw.randrange(number), odd, number, state))
    return f"{kind} at {number} of {world_size} ranks", traces, (number, culprits)


def grade_find_culprits(answer: Answer) -> None:
    draw = random.Random(0)
    for what, traces, right in [*culprit_cases(), *(planted(draw) for _ in range(200))]:
        found = answer(traces)
        assert found == right, f"{what}: {found}, but it was {right}"


def diagnosed(
    traces: Traces,
    numbers: Callable[[int], Sequence[int]] = range,
    call: Callable[[Record], object] = lambda record: record[1:3],
    suspects: Callable[[dict[int, object]], list[int]] | None = None,
    forgotten: Callable[[int, int], bool] = lambda number, first: number < first,
    late: Callable[[dict[int, str]], list[int] | None] | None = None,
) -> tuple[int, list[int]] | None:
    """The right answer, in parts that can be exchanged."""
    longest = max((t[-1][0] for t in traces if t), default=-1)
    for number in numbers(longest + 1):
        records = {r: rec for r, t in enumerate(traces) for rec in t if rec[0] == number}
        missing = [
            rank
            for rank, own in enumerate(traces)
            if rank not in records and not (own and forgotten(number, own[0][0]))
        ]
        calls = {rank: call(record) for rank, record in records.items()}
        wrong = missing + (suspects or not_the_most)(calls)
        if wrong:
            return number, sorted(wrong)
        waiting = (late or not_begun)({rank: record[3] for rank, record in records.items()})
        if waiting is not None:
            return number, waiting
    return None


def not_the_most(calls: dict[int, object]) -> list[int]:
    counts = sorted(Counter(calls.values()).values(), reverse=True)
    most = [call for call, count in Counter(calls.values()).items() if count == counts[0]]
    return [rank for rank, call in calls.items() if len(most) > 1 or call != most[0]]


def not_begun(states: dict[int, str]) -> list[int] | None:
    if {*states.values()} <= {"completed"}:
        return None
    waiting = [rank for rank, state in states.items() if state == "scheduled"]
    return waiting if len({*states.values()}) > 1 else []


def the_shortest_trace(traces: Traces) -> Any:
    latest = [trace[-1][0] if trace else -1 for trace in traces]
    if len({*latest}) < 2:
        return None
    return min(latest) + 1, [rank for rank, last in enumerate(latest) if last == min(latest)]


def from_the_end(traces: Traces) -> Any:
    return diagnosed(traces, numbers=lambda stop: range(stop)[::-1])


def shape_does_not_matter(traces: Traces) -> Any:
    return diagnosed(traces, call=lambda record: record[1])


def operation_does_not_matter(traces: Traces) -> Any:
    return diagnosed(traces, call=lambda record: record[2])


def rank_0_is_right(traces: Traces) -> Any:
    def suspects(calls: dict[int, object]) -> list[int]:
        return [rank for rank, call in calls.items() if call != calls[min(calls)]]

    return diagnosed(traces, suspects=suspects)


def somebody_wins_a_tie(traces: Traces) -> Any:
    def suspects(calls: dict[int, object]) -> list[int]:
        most = Counter(calls.values()).most_common(1)
        return [rank for rank, call in calls.items() if call != most[0][0]]

    return diagnosed(traces, suspects=suspects)


def more_than_half(traces: Traces) -> Any:
    def suspects(calls: dict[int, object]) -> list[int]:
        counts = Counter(calls.values())
        wins = [call for call in counts if 2 * counts[call] > len(calls)]
        return [rank for rank, call in calls.items() if call not in wins]

    return diagnosed(traces, suspects=suspects)


def forgotten_is_missing(traces: Traces) -> Any:
    return diagnosed(traces, forgotten=lambda number, first: False)


def no_states(traces: Traces) -> Any:
    return diagnosed(traces, late=lambda states: None)


def states_at_last(traces: Traces) -> Any:
    return no_states(traces) or diagnosed(traces)


def scheduled_is_late(traces: Traces) -> Any:
    def late(states: dict[int, str]) -> list[int] | None:
        if {*states.values()} <= {"completed"}:
            return None
        return [rank for rank, state in states.items() if state == "scheduled"]

    return diagnosed(traces, late=late)


def started_is_well(traces: Traces) -> Any:
    return diagnosed(traces, late=lambda states: not_begun(states) or None)


# --- the tests ---------------------------------------------------------------------------------

GRADERS = {
    "exposed_seconds": grade_exposed_seconds,
    "accumulate": grade_accumulate,
    "average_top_k": grade_average_top_k,
    "save_checkpoint": grade_save_checkpoint,
    "newest_sound": grade_newest_sound,
    "find_culprits": grade_find_culprits,
}

MUTANTS = [  # an exercise, a wrong answer, and what its grader must hold against it
    ("exposed_seconds", never_over_the_limit, "DDP makes it"),
    ("exposed_seconds", no_first_limit, "DDP makes it"),
    ("exposed_seconds", from_the_last_one, "DDP makes it"),
    ("exposed_seconds", all_at_once, "stick out"),
    ("exposed_seconds", after_backward, "stick out"),
    ("exposed_seconds", with_its_first_gradient, "stick out"),
    ("exposed_seconds", with_its_last_number, "out of order.* stick out"),
    ("exposed_seconds", whoever_is_ready, "out of order.* stick out"),
    ("accumulate", syncs_every_time, "all-reduces of gradients"),
    ("accumulate", forward_outside, "all-reduces of gradients"),
    ("accumulate", one_large_graph, "in the order FFFB"),
    ("accumulate", mean_of_means, "padded.* off one process's gradient"),
    ("accumulate", own_count, "padded.* off one process's gradient"),
    ("accumulate", forgets_what_ddp_divides, "off one process's gradient"),
    ("accumulate", counts_padding, "padded.* off one process's gradient"),
    ("accumulate", asks_twice, "2 further collectives"),
    ("accumulate", its_own_loss, "the mean is"),
    ("average_top_k", no_memory, "forgets"),
    ("average_top_k", remembers_everything, "are due"),
    ("average_top_k", largest_gradients, "and kept"),
    ("average_top_k", largest_with_sign, "and kept"),
    ("average_top_k", sums, "off the mean"),
    ("average_top_k", divides_by_senders, "off the mean"),
    ("average_top_k", last_one_wins, "off the mean"),
    ("average_top_k", rank_0_chooses, "and kept"),
    ("average_top_k", its_own_first, "other bits"),
    ("average_top_k", long_indices, "are enough"),
    ("average_top_k", dense, "not all-gathers alone"),
    ("average_top_k", into_the_gradient, "the gradient was changed"),
    ("save_checkpoint", straight_to_its_name, "a new step: killed half-way"),
    ("save_checkpoint", never_synced, "never synced"),
    ("save_checkpoint", still_in_the_buffer, "in a buffer"),
    ("save_checkpoint", synced_too_late, "had its name already"),
    ("save_checkpoint", name_not_synced, "folder was not synced"),
    ("save_checkpoint", folder_too_early, "folder was not synced"),
    ("save_checkpoint", old_one_first, "same step again: killed half-way, .* is gone"),
    ("save_checkpoint", room_first, "was touched"),
    ("save_checkpoint", copied, "killed half-way"),
    ("save_checkpoint", draft_elsewhere, "no file of another name"),
    ("save_checkpoint", leaves_its_draft, "disk full, a new step: .*tmp"),
    ("save_checkpoint", says_nothing, "no OSError"),
    ("save_checkpoint", insists_on_a_new_draft, "hinders the next"),
    ("newest_sound", newest_by_time, "three sound ones"),
    ("newest_sound", newest_by_name, "nine digits"),
    ("newest_sound", trusts_it, "the newest"),
    ("newest_sound", trusts_its_length, "the newest"),
    ("newest_sound", the_newest_or_nothing, "the newest: empty: None"),
    ("newest_sound", any_name, "other names"),
    ("newest_sound", stumbles, "cannot be read: FileNotFoundError"),
    ("newest_sound", needs_a_folder, "no such folder"),
    ("newest_sound", reads_them_all, "was opened"),
    ("newest_sound", cleans_up, "the folder was changed"),
    ("find_culprits", the_shortest_trace, "an operation: None"),
    ("find_culprits", from_the_end, "one is behind"),
    ("find_culprits", shape_does_not_matter, "a shape: None"),
    ("find_culprits", operation_does_not_matter, "an operation: None"),
    ("find_culprits", rank_0_is_right, "rank 0 calls one more"),
    ("find_culprits", somebody_wins_a_tie, "two ranks differ"),
    ("find_culprits", more_than_half, "most, though not half"),
    ("find_culprits", forgotten_is_missing, "of other lengths"),
    ("find_culprits", no_states, "a device is late"),
    ("find_culprits", states_at_last, "one behind it"),
    ("find_culprits", scheduled_is_late, "no device has begun"),
    ("find_culprits", started_is_well, "the network"),
]


def stub(*args: object) -> None:
    raise NotImplementedError


@pytest.mark.parametrize("name", GRADERS)
def test_answer(name: str, exercises: Callable[[int], ModuleType]) -> None:
    GRADERS[name](getattr(exercises(3), name))


@pytest.mark.full
@pytest.mark.parametrize("name", GRADERS)
def test_stub_is_turned_down(name: str) -> None:
    with pytest.raises((NotImplementedError, warm.RankError)) as caught:
        GRADERS[name](stub)
    error = getattr(caught.value, "error", caught.value)  # a rank's exception comes wrapped
    assert isinstance(error, NotImplementedError)


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "wrong", "because"), MUTANTS, ids=[f"{name}-{m.__name__}" for name, m, _ in MUTANTS]
)
def test_wrong_answer_is_turned_down(name: str, wrong: Answer, because: str) -> None:
    with pytest.raises(AssertionError, match=because):
        GRADERS[name](wrong)
