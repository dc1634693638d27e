"""The grader of chapter 4's exercise, and the proof that it turns wrong answers down.

pytest tests/chapter4/test_exercises.py            grades solutions.py
pytest tests/chapter4/test_exercises.py --mine     grades your exercises.py
"""

import gc
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


GRADERS: dict[str, Callable[[Answer], None]] = {"sharded_gradient": grade_sharded_gradient}
MUTANTS = [  # a wrong answer, and what the grader must hold against it
    (sums_up, "off one process's gradient"),
    (pads_in_front, "off one process's gradient"),
    (reduces_all, "not one gather and one scatter"),
    (gathers_twice, "not one gather and one scatter"),
    (keeps_the_whole, "as large as the whole is alive"),
]


def stub(*args: object) -> None:
    raise NotImplementedError


@pytest.mark.parametrize("name", GRADERS)
def test_answer(name: str, exercises: Callable[[int], ModuleType]) -> None:
    GRADERS[name](getattr(exercises(4), name))


def test_stub_is_turned_down() -> None:
    with pytest.raises(warm.RankError) as caught:
        grade_sharded_gradient(stub)
    assert isinstance(caught.value.error, NotImplementedError)


@pytest.mark.parametrize(("wrong", "because"), MUTANTS, ids=[m.__name__ for m, _ in MUTANTS])
def test_wrong_answer_is_turned_down(wrong: Answer, because: str) -> None:
    with pytest.raises(AssertionError, match=because):
        grade_sharded_gradient(wrong)
