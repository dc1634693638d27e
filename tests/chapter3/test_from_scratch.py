"""DDP from scratch: torch's bits for other models and sizes, unused parameters, and mutants."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import warm
from mutants import failed_claims
from torch import nn
from torch.nn.parallel import DistributedDataParallel

CODE = Path("chapter3-distributed-training-with-pytorch-ddp/code")
SCRIPT = warm.ROOT / CODE / "ddp_from_scratch.py"
SMALL = "--width 32 --layers 2 --bucket-mib 0.02 --turns 0"


@pytest.mark.full
@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_every_world_size(world_size: int) -> None:
    """A script's own checks are the test: it compares itself with torch and with one process."""
    lines = [
        f"{SMALL} --batch 7 --seed 20260101",
        f"{SMALL} --batch 12 --seed 2 --bucket-mib 25",
        f"{SMALL} --batch 12 --seed 3 --width 20",
        f"{SMALL} --batch 2",  # fewer sequences than ranks
    ]
    cases = [(line, "", "") for line in lines]
    assert failed_claims(SCRIPT, world_size, cases) == [set()] * len(lines)


MUTANTS = [
    ("1 / dist.get_world_size(), out", "1.0, out"),  # a sum for the mean
    # one bucket stays what this rank found: a copy of it is reduced
    (
        "all_reduce(bucket.flat, async",
        "all_reduce(bucket.flat.clone() if len(self.works) == 1 else bucket.flat, async",
    ),
    ("            work.wait()", "            pass"),
    ("dist.broadcast(tensor.detach(), src=0)", "pass"),
    ("self.syncs = self.require_sync", "self.syncs = True"),  # no_sync that syncs
    ("self.syncs = self.require_sync", "self.syncs = False"),
    # nothing starts before the end of backward
    ("and not self.buckets[len(self.works)].missing:", "and False:"),
    ("if not self.regrouped:", "if False:"),  # other buckets than torch: other bits
]


@pytest.mark.full
def test_mutants_are_caught() -> None:
    """On three ranks, where the order of additions counts."""
    found = failed_claims(SCRIPT, 3, [(SMALL, *mutant) for mutant in MUTANTS])
    assert [mutant for mutant, failed in zip(MUTANTS, found, strict=True) if not failed] == []


# --- the class alone ---------------------------------------------------------------------------


def ddp() -> type[Any]:
    return warm.load("ddp_from_scratch", SCRIPT).DDP


class Tied(nn.Module):
    """Registered in another order than used, one weight used twice, one frozen, one buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.embed = nn.Linear(24, 40, bias=False), nn.Embedding(40, 24)
        self.middle = nn.Sequential(nn.Linear(24, 56), nn.ReLU(), nn.Linear(56, 24))
        self.last.weight, self.norm = self.embed.weight, nn.LayerNorm(24)
        self.norm.bias.requires_grad_(False)
        self.register_buffer("shift", torch.randn(24))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.middle(self.embed(tokens) + self.shift)))


def convolutions() -> nn.Module:
    convolve = (nn.Conv2d(3, 20, 3), nn.GELU(), nn.Conv2d(20, 20, 3))
    model = nn.Sequential(*convolve, nn.Flatten(), nn.Linear(20 * 4 * 4, 9))
    for p in model.parameters():
        if p.dim() == 4:
            p.data = p.data.contiguous(memory_format=torch.channels_last)
    return model


def train_beside_torch(seed: int) -> list[tuple[float, float, bool]]:
    """In a rank: of each model max |ours - torch's| over gradients and weights; equal buckets?"""
    found = []
    for kind in ("tied", "convolutions"):
        for as_view in (False, True):
            torch.manual_seed(seed * 100 + dist.get_rank())  # the same model on no two ranks
            model = Tied() if kind == "tied" else convolutions()
            torch_ddp = DistributedDataParallel(
                deepcopy(model), bucket_cap_mb=0.004, gradient_as_bucket_view=as_view
            )
            ours = ddp()(model, int(0.004 * 2**20))
            gradients, weights = differences(ours, torch_ddp, tied=kind == "tied")
            sizes = torch_ddp._get_ddp_logging_data()["rebuilt_bucket_sizes"]
            own = [bucket.flat.nbytes for bucket in ours.buckets]
            assert len(own) > 1
            found.append((gradients, weights, sizes == ", ".join(map(str, own))))
    return found


def differences(
    ours: nn.Module, reference: DistributedDataParallel, tied: bool
) -> tuple[float, float]:
    """Of any gradient from the second step on, and of the weights after four."""
    models: tuple[Any, Any] = (ours, reference)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in models]
    worst = 0.0
    for step in range(4):
        x = torch.randint(40, (3, 5)) if tied else torch.randn(2, 3, 8, 8)
        for m in models:
            with m.no_sync():
                m(x).square().mean().backward()
            m(x[:1]).square().mean().backward()
        for a, b in zip(*(m.parameters() for m in models), strict=True):
            if step > 0 and a.grad is not None:  # torch's first has another grouping
                worst = max(worst, (a.grad - b.grad).abs().max().item())
        for optimizer in optimizers:
            if step > 0:
                optimizer.step()
            optimizer.zero_grad()
    tensors = (m.module.state_dict().values() for m in models)
    return worst, max((a - b).abs().max().item() for a, b in zip(*tensors, strict=True))


@pytest.mark.full
@pytest.mark.parametrize("world_size", [2, 3])
def test_other_models(world_size: int) -> None:
    """Tied, frozen and channels-last weights; the same buckets as torch's, so the same bits."""
    for found in warm.fork_ranks(train_beside_torch, world_size, world_size):
        assert found == [(0.0, 0.0, True)] * 4


class Detour(nn.Module):
    """The ranks in `lazy` leave the second layer out."""

    def __init__(self, lazy: tuple[int, ...]) -> None:
        super().__init__()
        self.first, self.second, self.lazy = nn.Linear(4, 4), nn.Linear(4, 4), lazy

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) if dist.get_rank() in self.lazy else self.second(self.first(x))


def take_detours() -> list[tuple[str, float]]:
    """In a rank, for ranks 0, 1 or both that take it: the error of the step, and by how much the
    gradients of a step without a detour are wrong after it.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    found = []
    for lazy in ((0,), (1,), (0, 1)):
        torch.manual_seed(0)
        model = ddp()(Detour(lazy), 1)  # one bucket per parameter
        message = ""
        try:
            model(torch.ones(2, 4)).sum().backward()
        except RuntimeError as error:
            message = str(error)
        model.module.lazy = ()
        model.zero_grad()
        model(torch.full((2, 4), 1.0 + rank)).sum().backward()
        reference = deepcopy(model.module)
        reference.zero_grad()
        mean = (1 + world_size) / 2
        reference(torch.full((2, 4), mean)).sum().backward()  # linear: the mean over the ranks
        pairs = zip(model.parameters(), reference.parameters(), strict=True)
        worst = max((a.grad - b.grad).abs().max().item() for a, b in pairs)
        found.append((message, worst))
    return found


def test_unused_parameters() -> None:
    """The rank that lacks gradients names them; the other one does not hang, and both go on."""
    named = "backward left no gradient in second.weight, second.bias"
    first, second = warm.fork_ranks(take_detours, 2)
    assert [message for message, _ in first] == [named, "", named]
    assert [message for message, _ in second] == ["", named, named]
    assert max(worst for _, worst in [*first, *second]) < 1e-5


def refuse() -> str:
    try:
        ddp()(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double()))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.full
def test_mixed_dtypes_are_refused() -> None:
    assert "one dtype" in warm.fork_ranks(refuse, 1)[0]
