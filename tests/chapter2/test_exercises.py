"""Graders of chapter 2's exercises, and the proof that they turn wrong answers down.

pytest tests/chapter2/test_exercises.py            grades solutions.py
pytest tests/chapter2/test_exercises.py --mine     grades your exercises.py
"""

import itertools
import math
import sys
from collections.abc import Callable, Sequence
from types import FrameType, ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import warm
from torch.utils._python_dispatch import TorchDispatchMode
from traffic import Address, Answer, Call, on_ranks, watched

WORLD_SIZES = (1, 2, 3, 4)
Half = tuple[str, int]  # ("F" or "B", micro-batch)


# --- 1. ring_all_reduce ------------------------------------------------------------------------

SHAPES = ((8, 6), (11,), (2, 5), (3,), (1,))


def terms(shape: tuple[int, ...], dtype: torch.dtype, world_size: int) -> list[torch.Tensor]:
    """What each rank holds at first."""
    draw = torch.Generator().manual_seed(math.prod(shape))
    return [(100 * torch.randn(shape, generator=draw)).to(dtype) for _ in range(world_size)]


Reduced = tuple[Any, torch.Tensor, list[Call]]
TERMS = list(itertools.product((torch.float32, torch.int64), SHAPES))


def reduced_in_rank(at: Address) -> list[Reduced]:
    """For each of TERMS: what was returned, the tensor afterwards, the calls."""
    done = []
    for dtype, shape in TERMS:
        tensor = terms(shape, dtype, dist.get_world_size())[dist.get_rank()]
        returned, calls = watched(at, tensor)
        done.append((returned, tensor, calls))
    return done


def grade_ring_all_reduce(answer: Answer) -> None:
    for world_size in WORLD_SIZES:
        ranks = on_ranks(reduced_in_rank, world_size, answer)
        for (dtype, shape), runs in zip(TERMS, zip(*ranks, strict=True), strict=True):
            at = f"{world_size} ranks, {dtype}, shape {shape}"
            exact = torch.stack(terms(shape, dtype, world_size)).double().sum(0)
            chunk = math.ceil(exact.numel() / world_size) * runs[0][1].itemsize
            for rank, (returned, tensor, _) in enumerate(runs):
                assert returned is None, f"{at}: returned {returned!r}"
                error = (tensor.double() - exact).abs().max().item()
                bound = 0 if dtype == torch.int64 else 1e-4  # of numbers around 100
                assert error <= bound, f"{at}: rank {rank} is {error:.2g} off the sum"
                assert torch.equal(tensor, runs[0][1]), f"{at}: rank {rank} has other bits than 0"
            for rank, (_, _, calls) in enumerate(runs):
                expect_ring(calls, rank, world_size, chunk, at)


def expect_ring(calls: list[Call], rank: int, world_size: int, chunk: int, at: str) -> None:
    names = [name for name, _, _ in calls]
    assert {*names} <= {"send", "recv_"}, f"{at}: {names}, not send and recv alone"
    longest = max((nbytes for _, nbytes, _ in calls), default=0)
    assert longest <= chunk, f"{at}: a message of {longest} bytes, a chunk has {chunk}"
    for name, neighbour in (("send", rank + 1), ("recv_", rank - 1)):
        peers = [peer for kind, _, peer in calls if kind == name]
        most = 2 * (world_size - 1)
        assert len(peers) <= most, f"{at}: {len(peers)} x {name}, {most} are enough"
        assert {*peers} <= {neighbour % world_size}, f"{at}: {name}, but with ranks {peers}"


def exchange(outgoing: torch.Tensor, incoming: torch.Tensor) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    send = dist.P2POp(dist.isend, outgoing, (rank + 1) % world_size)
    receive = dist.P2POp(dist.irecv, incoming, (rank - 1) % world_size)
    for work in dist.batch_isend_irecv([send, receive]):
        work.wait()


def collect(chunks: Sequence[torch.Tensor]) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for step in range(world_size - 1):
        target = chunks[(rank - step - 1) % world_size]
        received = torch.empty_like(target)
        exchange(chunks[(rank - step) % world_size], received)
        target.add_(received)


def hand_on(chunks: Sequence[torch.Tensor]) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for step in range(world_size - 1):
        exchange(chunks[(rank - step + 1) % world_size], chunks[(rank - step) % world_size])


def stops_half_way(tensor: torch.Tensor) -> None:
    collect(tensor.view(-1).tensor_split(dist.get_world_size()))


def forgets_the_rest(tensor: torch.Tensor) -> None:
    even = tensor.numel() // dist.get_world_size()
    chunks = tensor.view(-1)[: even * dist.get_world_size()].tensor_split(dist.get_world_size())
    collect(chunks)
    hand_on(chunks)


def whole_tensors_round(tensor: torch.Tensor) -> None:
    outgoing = tensor.clone()
    for _ in range(dist.get_world_size() - 1):
        received = torch.empty_like(tensor)
        exchange(outgoing, received)
        tensor += received
        outgoing = received


def everything_in_chunks(tensor: torch.Tensor) -> list[torch.Tensor]:
    """What each rank held, by rank, from messages that are short enough but too many."""
    world_size, rank = dist.get_world_size(), dist.get_rank()
    held = [tensor.clone() for _ in range(world_size)]
    for step in range(world_size - 1):
        couple = held[(rank - step) % world_size], held[(rank - step - 1) % world_size]
        chunks = [whole.view(-1).tensor_split(world_size) for whole in couple]
        for outgoing, incoming in zip(*chunks, strict=True):
            exchange(outgoing, incoming)
    return held


def all_chunks_round(tensor: torch.Tensor) -> None:
    tensor.copy_(torch.stack(everything_in_chunks(tensor)).sum(0))


def an_order_of_its_own(tensor: torch.Tensor) -> None:
    held, rank = everything_in_chunks(tensor), dist.get_rank()
    tensor.copy_(torch.stack(held[rank:] + held[:rank]).sum(0))


def through_rank_0(tensor: torch.Tensor) -> None:
    for chunk in tensor.view(-1).tensor_split(dist.get_world_size()):
        if dist.get_rank():
            dist.send(chunk, 0)
            dist.recv(chunk, 0)
            continue
        others = range(1, dist.get_world_size())
        for rank in others:
            received = torch.empty_like(chunk)
            dist.recv(received, rank)
            chunk += received
        for rank in others:
            dist.send(chunk, rank)


def the_library_does_it(tensor: torch.Tensor) -> None:
    dist.all_reduce(tensor)


# --- 2. fit_alpha_beta -------------------------------------------------------------------------


def best_fit(sizes: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """By trying what may hold: both free, no latency, no slope. In units of the mean."""
    size, second = max(sizes), sum(seconds) / len(seconds)
    t = torch.tensor(seconds, dtype=torch.float64) / second
    columns = torch.stack([1 / t, torch.tensor(sizes, dtype=torch.float64) / size / t], dim=1)
    ones = torch.ones(len(t), 1, dtype=torch.float64)
    found = []
    for kept in ([0, 1], [0], [1]):
        solution = torch.zeros(2, 1, dtype=torch.float64)
        solution[kept] = torch.linalg.lstsq(columns[:, kept], ones).solution
        if (solution >= 0).all():
            found.append((((columns @ solution - 1) ** 2).sum().item(), solution.flatten()))
    alpha, slope = min(found, key=lambda pair: pair[0])[1].tolist()
    return alpha * second, size / (slope * second) if slope else math.inf


def expect_fit(answer: Answer, sizes: list[int], seconds: list[float], what: str) -> None:
    right = best_fit(sizes, seconds)
    given = list(sizes), list(seconds)
    fit = answer(sizes, seconds)
    assert (sizes, seconds) == given, "the arguments were changed"
    for name, ours, best in zip(("alpha", "beta"), fit, right, strict=True):
        close = math.isclose(ours, best, rel_tol=1e-6, abs_tol=1e-15 if name == "alpha" else 0)
        assert close, f"{what}: {name} is {ours:.6g}, the best is {best:.6g}"


def grade_fit_alpha_beta(answer: Answer) -> None:
    sizes = [4**power for power in range(16)]  # bytes, up to 1 GiB
    for alpha, beta in itertools.product((1e-6, 3e-4, 0.02), (1e6, 2.5e9, 4e11)):
        for some in (sizes, [0, *sizes], sizes[::-1], sizes[::15], sizes[4:8] * 3):
            seconds = [alpha + size / beta for size in some]
            fit = answer(some, seconds)
            for ours, right in zip(fit, (alpha, beta), strict=True):
                off = abs(ours / right - 1)
                assert off <= 1e-6, f"exact data: {fit}, made with {(alpha, beta)}"
    noisy = [1.1, 0.9, 1.02, 1.15, 0.93, 0.97, 1.2, 0.88, 1.04, 1.0, 0.9, 1.3, 0.95, 1.06, 0.91, 1]
    seconds = [(2e-5 + size / 1e9) * by for size, by in zip(sizes, noisy, strict=True)]
    for unit in (1, 1e-3, 60):  # any unit of time gives the same fit
        expect_fit(answer, sizes, [t * unit for t in seconds], "noisy data")
    bent = [size / 1e9 * (1.5 if size < 2**20 else 1) for size in sizes]
    expect_fit(answer, sizes, bent, "no latency but a bend")
    negative = [size / 1e9 * (0.6 if size < 2**20 else 1) for size in sizes]
    expect_fit(answer, sizes[8:], negative[8:], "data of a negative alpha")
    expect_fit(answer, [1000, 3000], [1e-3, 4e-3], "two points of a negative alpha")
    expect_fit(answer, [1000, 3000, 9000], [4e-3, 3e-3, 2e-3], "falling times")
    with pytest.raises(ValueError):  # noqa: PT011 - the words are the reader's
        answer([4096, 4096], [1e-3, 1.1e-3])


def weighted(
    sizes: Sequence[int], seconds: Sequence[float], power: float
) -> tuple[float, float, list[list[float]]]:
    """Latency, slope, and the weighted columns [u, v, w] of alpha * u + slope * v = w."""
    if len(set(sizes)) < 2:
        raise ValueError
    rows = [[t**power, s * t**power, t * t**power] for s, t in zip(sizes, seconds, strict=True)]
    uu, uv, vv, uw, vw = (
        math.fsum(row[i] * row[j] for row in rows)
        for i, j in ((0, 0), (0, 1), (1, 1), (0, 2), (1, 2))
    )
    determinant = uu * vv - uv * uv
    return (uw * vv - vw * uv) / determinant, (vw * uu - uw * uv) / determinant, rows


def absolute_errors(sizes: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    alpha, slope, _ = weighted(sizes, seconds, power=0)
    return alpha, 1 / slope


def both_ends(sizes: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    (least, first), (most, last) = min(zip(sizes, seconds)), max(zip(sizes, seconds))  # noqa: B905
    beta = (most - least) / (last - first)
    return first - least / beta, beta


def below_zero(sizes: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    alpha, slope, _ = weighted(sizes, seconds, power=-1)
    return alpha, 1 / slope


def keeps_the_other_half(sizes: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    alpha, slope, _ = weighted(sizes, seconds, power=-1)
    return max(alpha, 0.0), 1 / slope


def negative_bandwidth(sizes: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    alpha, slope, rows = weighted(sizes, seconds, power=-1)
    if alpha < 0:
        alpha, slope = 0.0, sum(v for _, v, _ in rows) / sum(v * v for _, v, _ in rows)
    return alpha, 1 / slope


# --- 3. pipeline_schedule ----------------------------------------------------------------------


def makespan(schedules: Sequence[Sequence[Half]], forward: int, backward: int) -> int:
    """Time until the last stage is done, when each does its list in order as soon as it can."""
    done: dict[tuple[int, str, int], int] = {}  # (stage, "F" or "B", micro-batch): when
    clocks, places = [0] * len(schedules), [0] * len(schedules)
    while any(place < len(s) for place, s in zip(places, schedules, strict=True)):
        before = sum(places)
        for stage, schedule in enumerate(schedules):
            if places[stage] == len(schedule):
                continue
            kind, i = schedule[places[stage]]
            needs = [(stage - 1, "F", i)] if kind == "F" else [(stage, "F", i), (stage + 1, "B", i)]
            needs = [need for need in needs if 0 <= need[0] < len(schedules)]
            if all(need in done for need in needs):
                start = max([clocks[stage], *(done[need] for need in needs)])
                clocks[stage] = start + (forward if kind == "F" else backward)
                done[stage, kind, i] = clocks[stage]
                places[stage] += 1
        assert sum(places) > before, f"stages wait for each other for ever, at {places}"
    return max(clocks)


def grade_pipeline_schedule(answer: Answer) -> None:
    for stages, micro_batches in itertools.product((1, 2, 3, 4, 7), (1, 2, 3, 4, 5, 8, 13)):
        at = f"{stages} stages, {micro_batches} micro-batches"
        schedules = [list(answer(stage, stages, micro_batches)) for stage in range(stages)]
        every = [(kind, i) for kind in "BF" for i in range(micro_batches)]
        for stage, schedule in enumerate(schedules):
            assert sorted(schedule) == every, f"{at}: stage {stage} does not do each half once"
            for kind in "FB":
                order = [i for which, i in schedule if which == kind]
                assert order == sorted(order), f"{at}: stage {stage}, {kind} in the order {order}"
        for forward, backward in ((1, 1), (1, 2), (2, 3)):
            took = makespan(schedules, forward, backward)
            best = (micro_batches + stages - 1) * (forward + backward)
            assert took == best, (
                f"{at}: takes {took}, not {best}, at {forward} and {backward} a half"
            )
        for stage, schedule in enumerate(schedules):
            held = itertools.accumulate(1 if kind == "F" else -1 for kind, _ in schedule)
            most, limit = max(held), min(micro_batches, stages - stage)
            assert most <= limit, f"{at}: stage {stage} has {most} in flight, {limit} are enough"


def warmed_up(micro_batches: int, ahead: int) -> list[Half]:
    ahead = max(0, min(ahead, micro_batches))
    schedule: list[Half] = [("F", i) for i in range(ahead)]
    for i in range(micro_batches):
        if ahead + i < micro_batches:
            schedule.append(("F", ahead + i))
        schedule.append(("B", i))
    return schedule


def gpipe(stage: int, stages: int, micro_batches: int) -> list[Half]:
    return warmed_up(micro_batches, micro_batches)


def last_in_first_out(stage: int, stages: int, micro_batches: int) -> list[Half]:
    halves = [("F", i) for i in range(micro_batches)]
    return halves + [("B", i) for i in reversed(range(micro_batches))]


def one_too_many(stage: int, stages: int, micro_batches: int) -> list[Half]:
    return warmed_up(micro_batches, stages - stage)


def one_too_few(stage: int, stages: int, micro_batches: int) -> list[Half]:
    return warmed_up(micro_batches, stages - stage - 2)


def all_stages_alike(stage: int, stages: int, micro_batches: int) -> list[Half]:
    return warmed_up(micro_batches, stages - 1)


def counts_from_the_wrong_end(stage: int, stages: int, micro_batches: int) -> list[Half]:
    return warmed_up(micro_batches, stage)


def does_not_drain(stage: int, stages: int, micro_batches: int) -> list[Half]:
    schedule = warmed_up(micro_batches, stages - stage - 1)
    return schedule[: len(schedule) - (stages - stage - 1)]


def backward_first(stage: int, stages: int, micro_batches: int) -> list[Half]:
    return [half for i in range(micro_batches) for half in (("B", i), ("F", i))]


# --- 4. merge_attention ------------------------------------------------------------------------


def attention(scores: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[batch, queries, keys] and [batch, keys, head_dim] to the `out` and `lse` of the exercise."""
    return scores.softmax(-1) @ values, scores.logsumexp(-1)


def loss_of(out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """Any number that depends on all of both."""
    weights = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view(out.shape)
    return (weights * out).sum() + (weights[..., 0] * lse).sum()


def grade_merge_attention(answer: Answer) -> None:
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    # Three parts of different sizes in any order, as they come round a ring; keys far apart.
    values = [random(2, keys, 8).requires_grad_() for keys in (7, 1, 4)]
    for shifts in ((0, 0, 0), (1e4, 1e4 - 2, 1e4), (-1e4, -1e4, 1 - 1e4), (1e4, 0, -1e4)):
        scores = [(random(2, 5, v.shape[1]) + by) for v, by in zip(values, shifts, strict=True)]
        leaves = [*(s.requires_grad_() for s in scores), *values]
        whole = attention(torch.cat(scores, dim=-1), torch.cat(values, dim=1))
        right = torch.autograd.grad(loss_of(*whole), leaves)
        for order in itertools.permutations(range(3)):
            at = f"scores around {shifts}, in the order {order}"
            x, y, z = (attention(scores[part], values[part]) for part in order)
            merged = answer(*answer(*x, *y), *z)
            for name, ours, best in zip(("out", "lse"), merged, whole, strict=True):
                assert ours.shape == best.shape, f"{at}: {name} is {tuple(ours.shape)}"
                error = (ours - best).abs().max().item()
                assert error <= 1e-9, f"{at}: {name} is {error:.2g} off one attention"
            ours = torch.autograd.grad(loss_of(*merged), leaves, allow_unused=True)
            for gradient, best in zip(ours, right, strict=True):
                assert gradient is not None, f"{at}: a gradient is missing"
                error = (gradient - best).abs().max().item()
                assert error <= 1e-9, f"{at}: a gradient is {error:.2g} off one attention's"

    # Query 0 sees a alone, 1 sees b alone, 2 sees neither, 3 sees both.
    empty_a, empty_b = torch.tensor([0, 1, 1, 0]).bool(), torch.tensor([0, 0, 1, 0]).bool()
    empty_b[0] = True
    parts = []
    for empty in (empty_a, empty_b):
        parts.append(random(2, 4, 8).masked_fill(empty[:, None], 0).requires_grad_())
        parts.append(random(2, 4).masked_fill(empty, -math.inf).requires_grad_())
    copies = [part.detach().clone() for part in parts]
    out, lse = answer(*parts)
    assert all(map(torch.equal, parts, copies)), "the arguments were changed"
    both = empty_a & empty_b
    for query, part in ((0, 0), (1, 2)):
        error = (out[:, query] - parts[part][:, query]).abs().max().item()
        assert error <= 1e-12, f"one part empty: out is {error:.2g} off the other part's"
        error = (lse[:, query] - parts[part + 1][:, query]).abs().max().item()
        assert error <= 1e-12, f"one part empty: lse is {error:.2g} off the other part's"
    assert (out[:, both] == 0).all(), f"both parts empty: out is {out[0, 2].tolist()}, not 0"
    assert (lse[:, both] == -math.inf).all(), f"both parts empty: lse is {lse[0, 2]}, not -inf"
    loss = out.square().sum() + lse[:, ~both].square().sum()
    loss = loss + lse[:, both].exp().sum()  # whoever merges the result with a third part does this
    for gradient in torch.autograd.grad(loss, parts, allow_unused=True):
        assert gradient is not None, "a gradient is missing"
        assert gradient.isfinite().all(), "an empty part: a gradient is NaN or infinite"
        assert (gradient[:, both] == 0).all(), "both parts empty: a gradient is not 0"

    out_a, out_b = torch.full((1, 8), 1.0).bfloat16(), torch.full((1, 8), 2.0).bfloat16()
    out, lse = answer(out_a, torch.tensor([0.0]), out_b, torch.tensor([-4.1]))
    assert out.dtype == torch.bfloat16, f"out is {out.dtype}, and out_a bfloat16"
    assert lse.dtype == torch.float32, f"lse is {lse.dtype}, and lse_a float32"
    error = abs(lse.item() - math.log1p(math.exp(-4.1)))
    assert error <= 1e-6, f"bfloat16 out, float32 lse: lse is {error:.2g} off"


Parts = torch.Tensor  # four of them: out_a, lse_a, out_b, lse_b
Merged = tuple[torch.Tensor, torch.Tensor]


def shared(out_a: torch.Tensor, out_b: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Part a's share of the weight is [...], and that of `out_a` [..., head_dim]."""
    return share.unsqueeze(-1) * out_a + (1 - share).unsqueeze(-1) * out_b


def half_each(*parts: Parts) -> Merged:
    out_a, lse_a, out_b, lse_b = parts
    return (out_a + out_b) / 2, torch.logaddexp(lse_a, lse_b)


def no_peak(*parts: Parts) -> Merged:
    out_a, lse_a, out_b, lse_b = parts
    total = lse_a.exp() + lse_b.exp()
    return shared(out_a, out_b, lse_a.exp() / total), total.log()


def the_larger_lse(*parts: Parts) -> Merged:
    out_a, lse_a, out_b, lse_b = parts
    return shared(out_a, out_b, torch.sigmoid(lse_a - lse_b)), torch.maximum(lse_a, lse_b)


def not_divided(*parts: Parts) -> Merged:
    out_a, lse_a, out_b, lse_b = parts
    peak = torch.maximum(lse_a, lse_b)
    weight_a, weight_b = ((lse - peak).exp().unsqueeze(-1) for lse in (lse_a, lse_b))
    return weight_a * out_a + weight_b * out_b, torch.logaddexp(lse_a, lse_b)


def constant_weights(*parts: Parts) -> Merged:
    out_a, lse_a, out_b, lse_b = parts
    share = torch.sigmoid(lse_a - lse_b).detach()
    return shared(out_a, out_b, share), torch.logaddexp(lse_a, lse_b)


def nothing_is_empty(*parts: Parts) -> Merged:
    out_a, lse_a, out_b, lse_b = parts
    share = torch.sigmoid(lse_a - lse_b)
    return shared(out_a, out_b, share), torch.logaddexp(lse_a, lse_b)


def repaired_afterwards(*parts: Parts) -> Merged:
    """The result is right, but its gradient flows through the NaN that was painted over."""
    out, lse = nothing_is_empty(*parts)
    return out.masked_fill(out.isnan(), 0), lse


def all_in_bfloat16(*parts: Parts) -> Merged:
    """Right wherever `out` has the dtype of `lse`."""
    out_a, lse_a, out_b, lse_b = parts
    peak = torch.maximum(lse_a, lse_b).detach()
    peak = peak.masked_fill(peak.isinf(), 0)
    weight_a, weight_b = ((lse - peak).to(out_a.dtype).exp() for lse in (lse_a, lse_b))
    total = weight_a + weight_b
    empty = total == 0
    total = total.masked_fill(empty, 1)
    out = (weight_a / total).unsqueeze(-1) * out_a + (weight_b / total).unsqueeze(-1) * out_b
    return out, (total.log().to(lse_a.dtype) + peak).masked_fill(empty, -math.inf)


# --- 5. vocab_parallel_cross_entropy -----------------------------------------------------------

WIDTHS = (5, 1, 9, 3)  # of the ranks' slices
TOKENS = 12
Problem = tuple[torch.Tensor, torch.Tensor]


def problems(vocabulary: int) -> dict[str, Problem]:
    """Logits [tokens, vocabulary] and targets by name."""
    draw = torch.Generator().manual_seed(vocabulary)

    def logits(spread: float = 1, around: float = 0) -> torch.Tensor:
        return around + spread * torch.randn(TOKENS, vocabulary, generator=draw)

    def targets(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, (TOKENS,), generator=draw)

    anywhere = targets(0, vocabulary)
    return {
        "targets anywhere": (logits(), anywhere),
        "targets on rank 0": (logits(), targets(0, WIDTHS[0])),
        "targets in the last column": (logits(), torch.full((TOKENS,), vocabulary - 1)),
        "logits around 10,000": (logits(around=1e4), anywhere),
        "logits around -10,000": (logits(around=-1e4), anywhere),
        "logits up to 10,000": (logits(spread=1e4), anywhere),
    }


def losses_in_rank(at: Address) -> dict[str, tuple[Any, Any, bool, list[Call]]]:
    """For each problem: loss, gradient, whether the logits are as they were, the calls."""
    rank, widths = dist.get_rank(), WIDTHS[: dist.get_world_size()]
    first, done = sum(widths[:rank]), {}
    for name, (logits, targets) in problems(sum(widths)).items():
        mine = logits[:, first : first + widths[rank]].clone()
        copy, copied = mine.clone(), targets.clone()
        (loss, gradient), calls = watched(at, mine, targets, first)
        same = torch.equal(mine, copy) and torch.equal(targets, copied)
        done[name] = (loss, gradient, same, calls)
    return done


def grade_vocab_parallel_cross_entropy(answer: Answer) -> None:
    for world_size in WORLD_SIZES:
        widths = WIDTHS[:world_size]
        ranks = on_ranks(losses_in_rank, world_size, answer)
        for name, (logits, targets) in problems(sum(widths)).items():
            whole = logits.double().requires_grad_()
            best = F.cross_entropy(whole, targets, reduction="none")
            slopes = torch.autograd.grad(best.mean(), whole)[0].split(widths, dim=1)
            for rank, done in enumerate(ranks):
                at = f"{world_size} ranks, {name}, rank {rank}"
                loss, gradient, same, calls = done[name]
                assert same, f"{at}: the arguments were changed"
                expect_close(loss, best.detach(), 1, f"{at}: the loss")
                expect_close(gradient, slopes[rank], 1 / TOKENS, f"{at}: the gradient")
                names = [kind for kind, _, _ in calls]
                assert {*names} <= {"allreduce_"}, f"{at}: {names}, not all_reduce alone"
                assert len(calls) <= 3, f"{at}: {len(calls)} all-reduces, three are enough"
                numbers = sum(nbytes for _, nbytes, _ in calls) / 4 / TOKENS
                assert numbers <= 3, f"{at}: {numbers:g} numbers per token, three are enough"


def expect_close(ours: torch.Tensor, right: torch.Tensor, unit: float, what: str) -> None:
    """To 5 digits of the value, or of `unit` where the value is smaller."""
    assert ours.shape == right.shape, f"{what} is {tuple(ours.shape)}"
    off = ((ours.double() - right).abs() / right.abs().clamp(min=unit)).max().item()
    assert off <= 1e-5, f"{what} is {off:.2g} off"


def summed(tensor: torch.Tensor) -> torch.Tensor:
    total = tensor.contiguous().clone()
    dist.all_reduce(total)
    return total


def largest(tensor: torch.Tensor) -> torch.Tensor:
    most = tensor.clone()
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return most


def right_entries(logits: torch.Tensor, targets: torch.Tensor, first: int) -> torch.Tensor:
    """1 where a column is its token's target: [tokens, shard]."""
    columns = torch.arange(first, first + logits.shape[1])
    return (targets.unsqueeze(1) == columns).to(logits.dtype)


def three_reductions(
    shifted: torch.Tensor, right: torch.Tensor, peak: torch.Tensor | float = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient from logits less `peak`, and the target entries."""
    total = summed(shifted.exp().sum(1))
    loss = (total.log() + peak) - (summed((shifted * right).sum(1)) + peak)
    return loss, (shifted.exp() / total.unsqueeze(1) - right) / len(shifted)


def gathers_the_logits(logits: torch.Tensor, targets: torch.Tensor, first: int) -> Any:
    width = summed(torch.tensor([logits.shape[1]]))
    whole = torch.zeros(len(logits), int(width))
    whole[:, first : first + logits.shape[1]] = logits
    whole = summed(whole)
    loss = F.cross_entropy(whole, targets, reduction="none")
    slope = (whole.softmax(1) - right_entries(whole, targets, 0)) / len(logits)
    return loss, slope[:, first : first + logits.shape[1]]


def no_maximum(logits: torch.Tensor, targets: torch.Tensor, first: int) -> Any:
    return three_reductions(logits, right_entries(logits, targets, first))


def a_maximum_of_its_own(logits: torch.Tensor, targets: torch.Tensor, first: int) -> Any:
    shifted = logits - logits.amax(1, keepdim=True)
    return three_reductions(shifted, right_entries(logits, targets, first))


def its_own_sum(logits: torch.Tensor, targets: torch.Tensor, first: int) -> Any:
    right = right_entries(logits, targets, first)
    shifted = logits - largest(logits.amax(1)).unsqueeze(1)
    loss = shifted.exp().sum(1).log() - summed((shifted * right).sum(1))
    return loss, (shifted.softmax(1) - right) / len(logits)


def nearest_column(logits: torch.Tensor, targets: torch.Tensor, first: int) -> Any:
    """Whoever has not got the target takes the column that is nearest to it."""
    nearest = targets.clamp(first, first + logits.shape[1] - 1)
    shifted = logits - largest(logits.amax(1)).unsqueeze(1)
    return three_reductions(shifted, right_entries(logits, nearest, first))


def one_column_further(logits: torch.Tensor, targets: torch.Tensor, first: int) -> Any:
    shifted = logits - largest(logits.amax(1)).unsqueeze(1)
    return three_reductions(shifted, right_entries(logits, targets, first + 1))


def gradient_of_the_sum(logits: torch.Tensor, targets: torch.Tensor, first: int) -> Any:
    shifted = logits - largest(logits.amax(1)).unsqueeze(1)
    loss, gradient = three_reductions(shifted, right_entries(logits, targets, first))
    return loss, gradient * len(logits)


def softmax_for_a_gradient(logits: torch.Tensor, targets: torch.Tensor, first: int) -> Any:
    shifted = logits - largest(logits.amax(1)).unsqueeze(1)
    right = right_entries(logits, targets, first)
    loss, gradient = three_reductions(shifted, right)
    return loss, gradient + right / len(logits)


def adds_the_maximum_again(logits: torch.Tensor, targets: torch.Tensor, first: int) -> Any:
    """Right on paper; the loss, around 1, is then the difference of two numbers of 10,000."""
    peak = largest(logits.amax(1))
    right = right_entries(logits, targets, first)
    return three_reductions(logits - peak.unsqueeze(1), right, peak)


def in_place(logits: torch.Tensor, targets: torch.Tensor, first: int) -> Any:
    logits -= largest(logits.amax(1)).unsqueeze(1)
    return three_reductions(logits, right_entries(logits, targets, first))


def one_more_reduction(logits: torch.Tensor, targets: torch.Tensor, first: int) -> Any:
    dist.all_reduce(torch.zeros(1))
    shifted = logits - largest(logits.amax(1)).unsqueeze(1)
    return three_reductions(shifted, right_entries(logits, targets, first))


# --- 6. assign_slots ---------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = operator(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def lines_run(function: Callable[[], object]) -> int:
    """Lines of Python that a call executes, in whichever functions."""
    lines, before = 0, sys.gettrace()

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal lines
        lines += event == "line"
        return trace

    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return lines


def seated(choices: list[list[int]], experts: int, capacity: int) -> list[list[int]]:
    """The same by the book: a queue of people at doors."""
    taken = [0] * experts
    slots = [[-1] * len(own) for own in choices]
    for j in range(len(choices[0]) if choices else 0):
        for token, own in enumerate(choices):
            if taken[own[j]] < capacity:
                slots[token][j] = taken[own[j]]
                taken[own[j]] += 1
    return slots


def grade_assign_slots(answer: Answer) -> None:
    draw = torch.Generator().manual_seed(0)

    def choices(tokens: int, k: int, experts: int, crowd: float = 0) -> torch.Tensor:
        """k different experts for each token; with `crowd` more of them want the low numbers."""
        wish = torch.rand(tokens, experts, generator=draw) - crowd * torch.arange(experts) / experts
        return wish.argsort(dim=1, descending=True)[:, :k].contiguous()

    for tokens, (k, experts), crowd, capacity in itertools.product(
        (0, 1, 17, 60), ((1, 1), (1, 4), (2, 3), (4, 8)), (0, 1.5), (0, 1, 5, 100)
    ):
        given = choices(tokens, k, experts, crowd)
        copy, slots = given.clone(), answer(given, experts, capacity)
        at = f"{tokens} tokens, {k} of {experts} experts, capacity {capacity}"
        assert torch.equal(given, copy), f"{at}: the argument was changed"
        assert slots.dtype == torch.int64, f"{at}: {slots.dtype}, not int64"
        assert slots.shape == given.shape, f"{at}: {tuple(slots.shape)}, not {tuple(given.shape)}"
        best = torch.tensor(seated(given.tolist(), experts, capacity)).view(tokens, k)
        kept = slots >= 0
        assert (slots < capacity).all(), f"{at}: slot {slots.max()} was given out"
        places = (given * (capacity + 1) + slots)[kept]
        assert len(places) == len(places.unique()), f"{at}: two choices in one slot"
        assert kept.sum() == (best >= 0).sum(), f"{at}: {kept.sum()} kept of {(best >= 0).sum()}"
        assert torch.equal(slots, best), f"{at}: somebody jumped the queue"

    tokens, k, experts = 3000, 2, 16
    given = choices(tokens, k, experts)
    with Largest() as largest_seen:
        answer(given, experts, 400)
    limit = tokens * k * experts
    assert largest_seen.elements <= limit, (
        f"a tensor of {largest_seen.elements:,} elements, {limit:,} are enough"
    )
    lines = lines_run(lambda: answer(given, experts, 400))
    assert lines < tokens // 2, f"{lines:,} lines of Python for {tokens:,} tokens: a loop over them"


def cumulated(queue: torch.Tensor, experts: int) -> torch.Tensor:
    """The place in its expert's queue of each of some choices, from 0."""
    return (F.one_hot(queue, experts).cumsum(0) - 1).gather(1, queue.unsqueeze(1)).squeeze(1)


def cut(slots: torch.Tensor, capacity: int) -> torch.Tensor:
    return slots.masked_fill(slots >= capacity, -1)


def token_by_token(expert_ids: torch.Tensor, experts: int, capacity: int) -> torch.Tensor:
    return cut(cumulated(expert_ids.reshape(-1), experts).view_as(expert_ids), capacity)


def a_room_per_choice(expert_ids: torch.Tensor, experts: int, capacity: int) -> torch.Tensor:
    each = [cumulated(column, experts) for column in expert_ids.t()]
    return cut(torch.stack(each, dim=1), capacity)


def last_come(expert_ids: torch.Tensor, experts: int, capacity: int) -> torch.Tensor:
    queue = expert_ids.t().reshape(-1).flip(0)
    return cut(cumulated(queue, experts).flip(0).view_as(expert_ids.t()).t(), capacity)


def one_seat_more(expert_ids: torch.Tensor, experts: int, capacity: int) -> torch.Tensor:
    slots = cumulated(expert_ids.t().reshape(-1), experts).view_as(expert_ids.t()).t()
    return slots.masked_fill(slots > capacity, -1)


def one_seat_less(expert_ids: torch.Tensor, experts: int, capacity: int) -> torch.Tensor:
    slots = cumulated(expert_ids.t().reshape(-1), experts).view_as(expert_ids.t()).t()
    return cut(slots, max(capacity - 1, 0))


def everyone_in_slot_0(expert_ids: torch.Tensor, experts: int, capacity: int) -> torch.Tensor:
    slots = cumulated(expert_ids.t().reshape(-1), experts).view_as(expert_ids.t()).t()
    return cut(slots, capacity).clamp(max=0)


def a_loop_over_tokens(expert_ids: torch.Tensor, experts: int, capacity: int) -> torch.Tensor:
    slots = seated(expert_ids.tolist(), experts, capacity)
    return torch.tensor(slots, dtype=torch.int64).view_as(expert_ids)


def everybody_compares(expert_ids: torch.Tensor, experts: int, capacity: int) -> torch.Tensor:
    queue = expert_ids.t().reshape(-1)
    ahead = (queue.unsqueeze(0) == queue.unsqueeze(1)).tril(-1).sum(1)
    return cut(ahead.view_as(expert_ids.t()).t(), capacity)


# --- the tests ---------------------------------------------------------------------------------

GRADERS = {
    "ring_all_reduce": grade_ring_all_reduce,
    "fit_alpha_beta": grade_fit_alpha_beta,
    "pipeline_schedule": grade_pipeline_schedule,
    "merge_attention": grade_merge_attention,
    "vocab_parallel_cross_entropy": grade_vocab_parallel_cross_entropy,
    "assign_slots": grade_assign_slots,
}

MUTANTS = [  # an exercise, a wrong answer, and what its grader must hold against it
    ("ring_all_reduce", stops_half_way, "off the sum"),
    ("ring_all_reduce", forgets_the_rest, "off the sum"),
    ("ring_all_reduce", whole_tensors_round, "a message of"),
    ("ring_all_reduce", all_chunks_round, "are enough"),
    ("ring_all_reduce", an_order_of_its_own, "other bits"),
    ("ring_all_reduce", through_rank_0, "are enough"),
    ("ring_all_reduce", the_library_does_it, "not send and recv alone"),
    ("fit_alpha_beta", absolute_errors, "alpha is"),
    ("fit_alpha_beta", both_ends, "noisy data"),
    ("fit_alpha_beta", below_zero, "negative alpha: alpha is"),
    ("fit_alpha_beta", keeps_the_other_half, "negative alpha: beta is"),
    ("fit_alpha_beta", negative_bandwidth, "falling times"),
    ("pipeline_schedule", gpipe, "in flight"),
    ("pipeline_schedule", last_in_first_out, "in the order"),
    ("pipeline_schedule", one_too_many, "in flight"),
    ("pipeline_schedule", one_too_few, "takes"),
    ("pipeline_schedule", all_stages_alike, "in flight"),
    ("pipeline_schedule", counts_from_the_wrong_end, "for ever"),
    ("pipeline_schedule", does_not_drain, "each half once"),
    ("pipeline_schedule", backward_first, "for ever"),
    ("merge_attention", half_each, "out is .* off one attention"),
    ("merge_attention", no_peak, "is nan off"),
    ("merge_attention", the_larger_lse, "off one attention"),
    ("merge_attention", not_divided, "out is .* off one attention"),
    ("merge_attention", constant_weights, "gradient is .* off"),
    ("merge_attention", nothing_is_empty, "both parts empty: out is"),
    ("merge_attention", repaired_afterwards, "a gradient is NaN"),
    ("merge_attention", all_in_bfloat16, "bfloat16 out, float32 lse"),
    ("vocab_parallel_cross_entropy", gathers_the_logits, "numbers per token"),
    ("vocab_parallel_cross_entropy", no_maximum, "around 10,000, .* is (nan|inf) off"),
    ("vocab_parallel_cross_entropy", a_maximum_of_its_own, "the loss is .* off"),
    ("vocab_parallel_cross_entropy", its_own_sum, "the loss is .* off"),
    ("vocab_parallel_cross_entropy", nearest_column, "the loss is .* off"),
    ("vocab_parallel_cross_entropy", one_column_further, "the loss is .* off"),
    ("vocab_parallel_cross_entropy", gradient_of_the_sum, "the gradient is .* off"),
    ("vocab_parallel_cross_entropy", softmax_for_a_gradient, "the gradient is .* off"),
    ("vocab_parallel_cross_entropy", adds_the_maximum_again, "around 10,000, .* loss is .* off"),
    ("vocab_parallel_cross_entropy", in_place, "the arguments were changed"),
    ("vocab_parallel_cross_entropy", one_more_reduction, "4 all-reduces"),
    ("assign_slots", token_by_token, "jumped the queue"),
    ("assign_slots", a_room_per_choice, "two choices in one slot"),
    ("assign_slots", last_come, "jumped the queue"),
    ("assign_slots", one_seat_more, "was given out"),
    ("assign_slots", one_seat_less, "kept of"),
    ("assign_slots", everyone_in_slot_0, "two choices in one slot"),
    ("assign_slots", a_loop_over_tokens, "a loop over them"),
    ("assign_slots", everybody_compares, "elements"),
]


def stub(*args: object) -> None:
    raise NotImplementedError


@pytest.mark.parametrize("name", GRADERS)
def test_answer(name: str, exercises: Callable[[int], ModuleType]) -> None:
    GRADERS[name](getattr(exercises(2), name))


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
