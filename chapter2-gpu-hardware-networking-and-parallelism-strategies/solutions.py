"""Answers to exercises.py, which says what each function must do and cost.

pytest tests/chapter2/test_exercises.py
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist


def ring_all_reduce(tensor: torch.Tensor) -> None:
    """Two trips round the ring: chunks collect their sums, then the sums are handed on."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    chunks = tensor.view(-1).tensor_split(world_size)  # sizes differ by one element at most

    def exchange(outgoing: torch.Tensor, incoming: torch.Tensor) -> None:
        send = dist.P2POp(dist.isend, outgoing, (rank + 1) % world_size)
        receive = dist.P2POp(dist.irecv, incoming, (rank - 1) % world_size)
        for work in dist.batch_isend_irecv([send, receive]):
            work.wait()

    for step in range(world_size - 1):
        target = chunks[(rank - step - 1) % world_size]
        received = torch.empty_like(target)
        exchange(chunks[(rank - step) % world_size], received)
        target += received
    for step in range(world_size - 1):  # each sum was made by one rank, so all get the same bits
        exchange(chunks[(rank - step + 1) % world_size], chunks[(rank - step) % world_size])


def fit_alpha_beta(sizes: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """The relative error is linear in alpha and 1 / beta: two normal equations."""
    if len(set(sizes)) < 2:
        raise ValueError("the sizes are all equal")
    # Every row says alpha * u + slope * v = 1.
    rows = [(1 / t, size / t) for size, t in zip(sizes, seconds, strict=True)]
    u, v = (math.fsum(column) for column in zip(*rows, strict=True))
    uu, uv, vv = (math.fsum(row[i] * row[j] for row in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    determinant = uu * vv - uv * uv
    alpha, slope = (u * vv - v * uv) / determinant, (v * uu - u * uv) / determinant
    if alpha < 0:
        alpha, slope = 0.0, v / vv  # the best on the border, not the other half of the pair
    elif slope <= 0:
        alpha, slope = u / uu, 0.0
    return alpha, 1 / slope if slope else math.inf


def pipeline_schedule(stage: int, stages: int, micro_batches: int) -> list[tuple[str, int]]:
    """Run ahead by one forward for each later stage, then alternate, then drain."""
    warm_up = min(stages - stage - 1, micro_batches)
    steady = micro_batches - warm_up
    return [
        *(("F", i) for i in range(warm_up)),
        *(half for i in range(steady) for half in (("F", warm_up + i), ("B", i))),
        *(("B", i) for i in range(steady, micro_batches)),
    ]


def merge_attention(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weigh each part by its share of the sum of exponentials, relative to the larger one."""
    peak = torch.maximum(lse_a, lse_b).detach()  # any constant gives the same result
    peak = peak.masked_fill(peak.isinf(), 0)  # -inf - -inf would be NaN
    weight_a, weight_b = (lse_a - peak).exp(), (lse_b - peak).exp()  # [...]
    total = weight_a + weight_b
    empty = total == 0
    total = total.masked_fill(empty, 1)  # neither log(0) nor 0 / 0, and no gradient through it
    out = (weight_a / total).unsqueeze(-1) * out_a + (weight_b / total).unsqueeze(-1) * out_b
    return out.to(out_a.dtype), (total.log() + peak).masked_fill(empty, -math.inf)


def vocab_parallel_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, first: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A maximum, then two sums in one message: of exp(logit), and of the target's logit."""
    tokens, shard = logits.shape
    peak = logits.amax(dim=-1)  # [tokens]
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    shifted = logits - peak.unsqueeze(-1)  # before the target is picked: small numbers stay exact
    exponentials = shifted.exp()
    column = targets - first
    mine = (column >= 0) & (column < shard)
    rows, columns = torch.arange(tokens, device=logits.device)[mine], column[mine]
    target = torch.zeros_like(peak)
    target[rows] = shifted[rows, columns]  # zero wherever another rank has it
    sums = torch.stack([exponentials.sum(dim=-1), target])  # [2, tokens]
    dist.all_reduce(sums)
    gradient = exponentials / sums[0].unsqueeze(-1)
    gradient[rows, columns] -= 1
    return sums[0].log() - sums[1], gradient / tokens


def assign_slots(expert_ids: torch.Tensor, experts: int, capacity: int) -> torch.Tensor:
    """Sort the choices by expert; a slot is the distance from the expert's first choice."""
    tokens, k = expert_ids.shape
    queue = expert_ids.t().reshape(-1)  # [k * tokens]: all first choices, then all second ones
    order = queue.argsort(stable=True)  # stable: first come, first served
    counts = queue.bincount(minlength=experts)
    starts = counts.cumsum(0) - counts
    slots = torch.empty_like(queue)
    slots[order] = torch.arange(k * tokens, device=queue.device) - starts[queue[order]]
    return slots.masked_fill(slots >= capacity, -1).view(k, tokens).t()
