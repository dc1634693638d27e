"""The graders of chapter 4's exercises, and the proof that they turn wrong answers down.

pytest tests/chapter4/test_exercises.py            grades solutions.py
pytest tests/chapter4/test_exercises.py --mine     grades your exercises.py
"""

import gc
import sys
import time
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import warm
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from traffic import Address, Answer, Call, on_ranks, watched

WORLD_SIZES = (1, 2, 3, 4)


class Tied(nn.Module):
    """An embedding that is the head too, so that it is one parameter, and a scale of one number."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:  # [batch] -> [batch, 7]
        return self.head(torch.tanh(self.embed(tokens) * self.scale))


MODELS: dict[str, Callable[[], nn.Module]] = {  # 32 numbers, 3, and 29
    "two layers": lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)),
    "three numbers": lambda: nn.Linear(2, 1),
    "tied weights": Tied,
}
CASES = [(what, dtype) for what in MODELS for dtype in (torch.float64, torch.float32)]


def inputs_of(what: str, rank: int, dtype: torch.dtype) -> torch.Tensor:
    """Other shapes on other ranks."""
    draw = torch.Generator().manual_seed(10 + rank)
    if what == "tied weights":
        return torch.randint(7, (2 + rank,), generator=draw)
    width = {"two layers": 3, "three numbers": 2}[what]
    return torch.randn(2 + rank, width, generator=draw, dtype=torch.float64).to(dtype)


def loss_of(outputs: torch.Tensor) -> torch.Tensor:
    return F.softplus(3 * outputs).mean()


def reference(what: str, dtype: torch.dtype, world_size: int) -> tuple[Any, ...]:
    """The flat parameter, each rank's loss, and the gradient of their mean; padded, in one process."""
    model = MODELS[what]()
    count = sum(p.numel() for p in model.parameters())
    draw = torch.Generator().manual_seed(0)
    flat = torch.randn(count, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    parts = flat.split([p.numel() for p in model.parameters()])
    weights = {
        n: t.view(p.shape) for (n, p), t in zip(model.named_parameters(), parts, strict=True)
    }
    losses = [
        loss_of(functional_call(model, weights, (inputs_of(what, rank, dtype),)))
        for rank in range(world_size)
    ]
    (gradient,) = torch.autograd.grad(torch.stack(losses).mean(), flat)
    padding = (0, -count % world_size)
    return F.pad(flat.detach(), padding), torch.stack(losses).detach(), F.pad(gradient, padding)


class Large(TorchDispatchMode):
    """Remembers the storages that are made under it and have so many bytes or more."""

    def __init__(self, nbytes: int) -> None:
        super().__init__()
        self.nbytes = nbytes
        self.storages: list[Any] = []

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if torch.is_tensor(tensor) and tensor.untyped_storage().nbytes() >= self.nbytes:
                self.storages.append(weakref.ref(tensor.untyped_storage()))
        return result


Result = tuple[torch.Tensor, torch.Tensor, list[Call], list[str]]


def gradients_in_rank(at: Address) -> list[Result]:
    """For each of CASES: the loss, the part of the gradient, the calls, and what else is wrong."""
    world_size, rank = dist.get_world_size(), dist.get_rank()
    done = []
    for what, dtype in CASES:
        whole, _, _ = reference(what, dtype, world_size)
        shard = whole.chunk(world_size)[rank].clone()
        with torch.device("meta"):
            model = MODELS[what]().to(dtype)
        before = dict(model.named_parameters())
        inputs = inputs_of(what, rank, dtype)
        with Large(whole.nbytes) as large:
            (loss, part), calls = watched(at, model, shard, inputs, loss_of)
        gc.collect()
        wrong = []
        if loss.requires_grad or part.requires_grad:
            wrong.append("a result that is not detached")
        deadline = time.monotonic() + 1.5  # gloo's threads let go of a tensor a moment later
        while (
            world_size > 1
            and any(s() is not None for s in large.storages)
            and time.monotonic() < deadline
        ):
            time.sleep(0.01)
        if world_size > 1 and any(storage() is not None for storage in large.storages):
            wrong.append("something as large as the whole is alive")
        if not torch.equal(shard, whole.chunk(world_size)[rank]) or shard.requires_grad:
            wrong.append("the shard was changed")
        after = dict(model.named_parameters())
        if any(after[n] is not p or p.grad is not None for n, p in before.items()):
            wrong.append("the model was changed")
        done.append((loss, part.clone(), calls, wrong))
    return done


def grade_sharded_gradient(answer: Answer) -> None:
    for world_size in WORLD_SIZES:
        ranks = on_ranks(gradients_in_rank, world_size, answer)
        for (what, dtype), results in zip(CASES, zip(*ranks, strict=True), strict=True):
            whole, losses, gradient = reference(what, dtype, world_size)
            for rank, (loss, part, calls, wrong) in enumerate(results):
                at = f"{what}, {dtype}, rank {rank} of {world_size}"
                right = gradient.chunk(world_size)[rank]
                assert part.shape == right.shape, f"{at}: {tuple(part.shape)}, not {right.shape}"
                assert part.dtype == dtype, f"{at}: a gradient in {part.dtype}"
                bound = 1e-12 if dtype == torch.float64 else 1e-5
                off = (part - right).abs().max().item()
                assert off <= bound, f"{at}: {off:.2g} off one process's gradient"
                off = abs(loss - losses[rank]).item()
                assert off <= bound, f"{at}: the loss is {off:.2g} off"
                expect_two(calls, whole.nbytes, at)
                assert not wrong, f"{at}: {', '.join(wrong)}"


def expect_two(calls: list[Call], whole: int, at: str) -> None:
    names = sorted(name for name, _, _ in calls)
    scatters = [name for name in names if "reduce_scatter" in name]
    gathers = [name for name in names if "allgather" in name or "all_gather" in name]
    assert len(scatters) == len(gathers) == 1, f"{at}: {names}, not one gather and one scatter"
    assert len(names) == 2, f"{at}: {names}, two collectives are enough"
    largest = max(nbytes for _, nbytes, _ in calls)
    assert largest <= whole, f"{at}: a message of {largest} bytes, the whole has {whole}"


# --- clipping ----------------------------------------------------------------------------------

ODD = (float("nan"), float("inf"), -float("inf"))


def shards_of(case: str, rank: int, world_size: int) -> list[torch.Tensor]:
    """This rank's shards; the cases differ in who has what."""
    draw = torch.Generator().manual_seed(5)
    whole = torch.randn(7, 3, generator=draw), torch.randn(2, generator=draw)  # 2: not for all
    shards = [t.tensor_split(world_size)[rank].clone() for t in whole]
    if case == "a rank without tensors" and rank == world_size - 1 > 0:
        return []
    if case == "float64":
        return [t.double() for t in shards]
    if case == "zeros":
        return [t.zero_() for t in shards]
    if case in ("nan", "inf", "-inf") and rank == 0:
        shards[0][0, 0] = float(case)
    if case == "two million":
        return [torch.full((2_000_000 // world_size,), 0.1)]
    return shards


CLIPPED: tuple[str, ...] = (
    "ordinary",
    "a rank without tensors",
    "float64",
    "zeros",
    "nan",
    "inf",
    "-inf",
)
CLIPPED += ("two million",)
Clipped = tuple[torch.Tensor, list[torch.Tensor], list[Call]]


def clipped_in_rank(at: Address, max_norm: float) -> list[Clipped]:
    done = []
    for case in CLIPPED:
        shards = shards_of(case, dist.get_rank(), dist.get_world_size())
        norm, calls = watched(at, shards, max_norm)
        done.append((norm, [t[:4] for t in shards], calls))  # of the long ones a few are enough
    return done


def grade_clip_sharded(answer: Answer) -> None:
    for world_size, max_norm in ((1, 1.0), (2, 1e6), (3, 1.0), (4, 0.5)):
        ranks = on_ranks(clipped_in_rank, world_size, answer, max_norm)
        for case, results in zip(CLIPPED, zip(*ranks, strict=True), strict=True):
            at = f"{case}, {world_size} ranks, max_norm {max_norm:g}"
            before = [shards_of(case, rank, world_size) for rank in range(world_size)]
            true = torch.cat([t.double().flatten() for of in before for t in of]).norm()
            for norm, _, calls in results:
                assert norm.shape == (), f"{at}: the norm has shape {tuple(norm.shape)}"
                assert norm.dtype == torch.float64, f"{at}: a norm in {norm.dtype}"
                same = torch.equal(norm, results[0][0]) or (norm.isnan() and true.isnan())
                assert same, f"{at}: the ranks have {norm} and {results[0][0]}"
                right = torch.isclose(norm, true, rtol=1e-6, atol=0, equal_nan=True)
                assert right, f"{at}: a norm of {norm:.7g}, not {true:.7g}"
                assert len(calls) == 1, f"{at}: {[c[0] for c in calls]}, one all-reduce is enough"
                assert calls[0][1] <= 8, f"{at}: {calls[0][1]} bytes sent, one number is enough"
            factor = max_norm / true.item() if max_norm < true < float("inf") else 1.0
            for (_, after, _), shards in zip(results, before, strict=True):
                for new, old in zip(after, shards, strict=True):
                    if factor == 1.0:
                        kept = torch.equal(new.nan_to_num(7), old[:4].nan_to_num(7))
                        assert kept, f"{at}: changed, although there was nothing to clip"
                    else:
                        off = (new - old[:4] * factor).abs().max().item() if new.numel() else 0
                        assert off <= 1e-6, f"{at}: {off:.2g} off what clipping leaves"


# --- reading -----------------------------------------------------------------------------------


def chunk(rows: int, ranks: int, rank: int) -> range:
    size = -(-rows // ranks)
    return range(min(rank * size, rows), min((rank + 1) * size, rows))


def grade_reads(answer: Answer) -> None:
    for rows in (1, 2, 7, 12, 257):
        for saved_by, loaded_by in ((1, 1), (2, 3), (3, 2), (4, 1), (1, 5), (8, 8), (5, 12)):
            for rank in range(loaded_by):
                at = f"{rows} rows, {saved_by} to {loaded_by} ranks, rank {rank}"
                pieces = answer(rows, saved_by, loaded_by, rank)
                found: list[int] = []
                for file, start, stop in pieces:
                    held = chunk(rows, saved_by, file)
                    assert 0 <= start < stop <= len(held), (
                        f"{at}: {(file, start, stop)} is not there"
                    )
                    found += held[start:stop]
                assert found == list(chunk(rows, loaded_by, rank)), f"{at}: {pieces} are other rows"
                files = [file for file, _, _ in pieces]
                assert len(files) == len(set(files)), f"{at}: a file is read twice"
    rows = 10**12
    lines = lines_run(answer, rows, 100_000, 99_999, 50_000)
    assert lines <= 100, f"{lines} lines run to plan two reads"


def lines_run(answer: Answer, *args: object) -> int:
    """How many lines of Python the answer runs."""
    count = 0

    def tracer(frame: Any, event: str, _: object) -> Any:
        nonlocal count
        count += event == "line"
        return tracer

    sys.settrace(tracer)
    try:
        answer(*args)
    finally:
        sys.settrace(None)
    return count


# --- wrong answers -----------------------------------------------------------------------------


def gathered(shard: torch.Tensor) -> torch.Tensor:
    flat = shard.new_empty(dist.get_world_size() * shard.numel())
    dist.all_gather(list(flat.chunk(dist.get_world_size())), shard)
    return flat.requires_grad_()


def backward(
    model: nn.Module, flat: torch.Tensor, inputs: torch.Tensor, loss_of: Any, first: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    weights = {}
    for name, parameter in model.named_parameters():
        weights[name] = flat[first : first + parameter.numel()].view(parameter.shape)
        first += parameter.numel()
    loss = loss_of(functional_call(model, weights, (inputs,)))
    return loss.detach(), torch.autograd.grad(loss, flat)[0]


def scattered(gradient: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
    dist.reduce_scatter(into, list(gradient.chunk(dist.get_world_size())))
    return into


def sums_up(model: Any, shard: torch.Tensor, inputs: Any, loss_of: Any) -> Any:
    loss, gradient = backward(model, gathered(shard), inputs, loss_of)
    return loss, scattered(gradient, torch.empty_like(shard))


def pads_in_front(model: Any, shard: torch.Tensor, inputs: Any, loss_of: Any) -> Any:
    flat = gathered(shard)
    padding = flat.numel() - sum(p.numel() for p in model.parameters())
    loss, gradient = backward(model, flat, inputs, loss_of, first=padding)
    return loss, scattered(gradient, torch.empty_like(shard)) / dist.get_world_size()


def reduces_all(model: Any, shard: torch.Tensor, inputs: Any, loss_of: Any) -> Any:
    loss, gradient = backward(model, gathered(shard), inputs, loss_of)
    dist.all_reduce(gradient)
    mean = gradient / dist.get_world_size()
    return loss, mean.chunk(dist.get_world_size())[dist.get_rank()].clone()


def gathers_twice(model: Any, shard: torch.Tensor, inputs: Any, loss_of: Any) -> Any:
    """As FSDP does by default, which gives the weights back in between."""
    gathered(shard)
    loss, gradient = backward(model, gathered(shard), inputs, loss_of)
    return loss, scattered(gradient, torch.empty_like(shard)) / dist.get_world_size()


def keeps_the_whole(model: Any, shard: torch.Tensor, inputs: Any, loss_of: Any) -> Any:
    """Right, and no smaller than before: the part is a view."""
    loss, gradient = backward(model, gathered(shard), inputs, loss_of)
    part = torch.empty_like(gradient).chunk(dist.get_world_size())[dist.get_rank()]
    return loss, scattered(gradient, part).div_(dist.get_world_size())


def norm_of_this_rank(gradients: list[torch.Tensor], max_norm: float) -> torch.Tensor:
    """Each rank clips by its own norm."""
    dist.all_reduce(torch.zeros(()))
    return clipped(gradients, max_norm, sum_of_squares(gradients).sqrt())


def norms_added(gradients: list[torch.Tensor], max_norm: float) -> torch.Tensor:
    norm = sum_of_squares(gradients).sqrt()
    dist.all_reduce(norm)
    return clipped(gradients, max_norm, norm)


def one_call_a_tensor(gradients: list[torch.Tensor], max_norm: float) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for gradient in gradients:
        square = gradient.double().square().sum()
        total += square
    dist.all_reduce(total)
    dist.all_reduce(torch.zeros(()))
    return clipped(gradients, max_norm, total.sqrt())


def scales_up_too(gradients: list[torch.Tensor], max_norm: float) -> torch.Tensor:
    total = sum_of_squares(gradients)
    dist.all_reduce(total)
    norm = total.sqrt()
    for gradient in gradients:
        gradient.mul_(max_norm / norm)
    return norm


def spreads_the_nan(gradients: list[torch.Tensor], max_norm: float) -> torch.Tensor:
    """Right but for infinities: every number becomes zero, or NaN."""
    total = sum_of_squares(gradients)
    dist.all_reduce(total)
    norm = total.sqrt()
    if not norm <= max_norm:
        for gradient in gradients:
            gradient.mul_(max_norm / norm)
    return norm


def sum_of_squares(gradients: list[torch.Tensor]) -> torch.Tensor:
    squares = [gradient.double().square().sum() for gradient in gradients]
    return torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64)


def clipped(gradients: list[torch.Tensor], max_norm: float, norm: torch.Tensor) -> torch.Tensor:
    if max_norm < norm < float("inf"):
        for gradient in gradients:
            gradient.mul_(max_norm / norm.to(gradient.dtype))
    return norm


def even_chunks(rows: int, saved_by: int, loaded_by: int, rank: int) -> list[tuple[int, int, int]]:
    """As if floor(rows / ranks) were a chunk."""
    sizes = max(rows // saved_by, 1), max(rows // loaded_by, 1)
    return pieces_of(rows, sizes, rank)


def from_the_tensors_start(
    rows: int, saved_by: int, loaded_by: int, rank: int
) -> list[tuple[int, int, int]]:
    sizes = -(-rows // saved_by), -(-rows // loaded_by)
    return [(f, f * sizes[0] + a, f * sizes[0] + b) for f, a, b in pieces_of(rows, sizes, rank)]


def asks_every_file(
    rows: int, saved_by: int, loaded_by: int, rank: int
) -> list[tuple[int, int, int]]:
    mine = chunk(rows, loaded_by, rank)
    pieces = []
    for file in range(saved_by):
        held = chunk(rows, saved_by, file)
        start, stop = max(mine.start, held.start), min(mine.stop, held.stop)
        if start < stop:
            pieces.append((file, start - held.start, stop - held.start))
    return pieces


def pieces_of(rows: int, sizes: tuple[int, int], rank: int) -> list[tuple[int, int, int]]:
    start, stop = min(rank * sizes[1], rows), min((rank + 1) * sizes[1], rows)
    pieces = []
    while start < stop:
        file = start // sizes[0]
        end = min(stop, (file + 1) * sizes[0])
        pieces.append((file, start - file * sizes[0], end - file * sizes[0]))
        start = end
    return pieces


GRADERS: dict[str, Callable[[Answer], None]] = {
    "sharded_gradient": grade_sharded_gradient,
    "clip_sharded": grade_clip_sharded,
    "reads": grade_reads,
}
MUTANTS = [  # a wrong answer, of which exercise, and what the grader must hold against it
    (sums_up, "sharded_gradient", "off one process's gradient"),
    (pads_in_front, "sharded_gradient", "off one process's gradient"),
    (reduces_all, "sharded_gradient", "not one gather and one scatter"),
    (gathers_twice, "sharded_gradient", "not one gather and one scatter"),
    (keeps_the_whole, "sharded_gradient", "as large as the whole is alive"),
    (norm_of_this_rank, "clip_sharded", "the ranks have|a norm of"),
    (norms_added, "clip_sharded", "a norm of"),
    (one_call_a_tensor, "clip_sharded", "one all-reduce is enough"),
    (scales_up_too, "clip_sharded", "nothing to clip"),
    (spreads_the_nan, "clip_sharded", "nothing to clip"),
    (even_chunks, "reads", "is not there|are other rows"),
    (from_the_tensors_start, "reads", "is not there"),
    (asks_every_file, "reads", "lines run"),
]


def stub(*args: object) -> None:
    raise NotImplementedError


@pytest.mark.parametrize("name", GRADERS)
def test_answer(name: str, exercises: Callable[[int], ModuleType]) -> None:
    GRADERS[name](getattr(exercises(4), name))


@pytest.mark.parametrize("name", GRADERS)
def test_stub_is_turned_down(name: str) -> None:
    with pytest.raises((warm.RankError, NotImplementedError)) as caught:
        GRADERS[name](stub)
    error = caught.value
    assert isinstance(getattr(error, "error", error), NotImplementedError)


@pytest.mark.parametrize(
    ("wrong", "name", "because"), MUTANTS, ids=[m.__name__ for m, _, _ in MUTANTS]
)
def test_wrong_answer_is_turned_down(wrong: Answer, name: str, because: str) -> None:
    with pytest.raises(AssertionError, match=because):
        GRADERS[name](wrong)
