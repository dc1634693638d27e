"""Answers to exercises.py, which says what each function must do and cost.

pytest tests/chapter3/test_exercises.py
"""

import contextlib
import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

Record = tuple[int, str, tuple[int, ...], str]  # number, operation, shape, state: see exercise 6


def exposed_seconds(
    sizes: Sequence[int],
    ready: Sequence[float],
    first_bytes: int,
    cap_bytes: int,
    latency: float,
    bandwidth: float,
) -> tuple[list[list[int]], float]:
    """A bucket is closed by what makes it full; it starts when it is full and the line is free."""
    buckets: list[list[int]] = [[]]
    held, limit = 0, first_bytes
    for i, size in enumerate(sizes):
        if held >= limit:  # asked before there is something to put in: no bucket stays empty
            buckets.append([])
            held, limit = 0, cap_bytes
        buckets[-1].append(i)
        held += size
    arrived = 0.0
    for bucket in buckets:
        start = max(arrived, *(ready[i] for i in bucket))
        arrived = start + latency + sum(sizes[i] for i in bucket) / bandwidth
    return buckets, arrived - max(ready)


def accumulate(
    model: DistributedDataParallel, micro_batches: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> float:
    """Add gradients of sums up; divide by the number of targets when everybody's is known."""
    totals = torch.zeros(2, dtype=torch.float64, device=micro_batches[0][0].device)
    for i, (tokens, targets) in enumerate(micro_batches):
        last = i == len(micro_batches) - 1
        with contextlib.nullcontext() if last else model.no_sync():  # forward must be inside too
            logits = model(tokens).flatten(0, 1)  # [batch * seq, vocabulary]
            loss = F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="sum")
            loss.backward()
        totals += torch.stack([loss.detach().double(), (targets != -100).sum()])
    dist.all_reduce(totals)
    loss_sum, count = totals.tolist()
    for parameter in model.parameters():
        parameter.grad *= dist.get_world_size() / count  # DDP has divided the sum by the ranks
    return loss_sum / count


def average_top_k(gradient: torch.Tensor, residual: torch.Tensor, k: int) -> torch.Tensor:
    """All ranks gather all ranks' values and indices, and add them up in the same order."""
    residual += gradient
    indices = residual.abs().topk(k).indices.to(torch.int32)
    values = residual[indices]
    residual[indices] = 0
    all_indices, all_values = (
        [torch.empty_like(mine) for _ in range(dist.get_world_size())] for mine in (indices, values)
    )
    dist.all_gather(all_indices, indices)
    dist.all_gather(all_values, values)
    total = torch.zeros_like(gradient)
    for places, sent in zip(all_indices, all_values, strict=True):
        total[places] += sent  # one rank's indices are all different
    return total / dist.get_world_size()


def save_checkpoint(state: bytes, folder: Path, step: int) -> None:
    """Write under another name, make that last, rename, make the name last."""
    path = folder / f"step-{step:08}.ckpt"
    draft = path.with_suffix(".tmp")
    try:
        with draft.open("wb") as file:  # also over what a killed process has left
            file.write(hashlib.sha256(state).digest())
            file.write(state)
            file.flush()  # from Python's buffer to the kernel's, and from there to the disk
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def newest_sound(folder: Path) -> tuple[int, bytes] | None:
    """Highest step first, as a number: as text, 99999999 comes behind 100000000."""
    names = ((re.fullmatch(r"step-(\d{8,})\.ckpt", p.name), p) for p in folder.glob("*"))
    for step, path in sorted(((int(m[1]), p) for m, p in names if m), reverse=True):
        with contextlib.suppress(OSError):
            content = path.read_bytes()
            if hashlib.sha256(content[32:]).digest() == content[:32]:
                return step, content[32:]
    return None


def find_culprits(traces: Sequence[Sequence[Record]]) -> tuple[int, list[int]] | None:
    """At each number in turn: who is missing, who does something else, whose device is late."""
    calls = [{record[0]: record for record in trace} for trace in traces]  # by rank and number
    latest = [max(own, default=-1) for own in calls]
    first = min((min(own, default=0) for own in calls), default=0)  # all before is complete
    for number in range(first, max(latest, default=-1) + 1):
        records = {rank: own[number] for rank, own in enumerate(calls) if number in own}
        missing = [rank for rank, last in enumerate(latest) if last < number]
        counts = Counter(record[1:3] for record in records.values()).most_common()
        tied = len(counts) > 1 and counts[0][1] == counts[1][1]
        odd = [rank for rank, record in records.items() if tied or record[1:3] != counts[0][0]]
        if missing or odd:
            return number, sorted(missing + odd)
        states = {record[3] for record in records.values()}
        if states - {"completed"}:
            late = [rank for rank, record in records.items() if record[3] == "scheduled"]
            return number, late if len(states) > 1 else []
    return None
