"""DDP from scratch: torch's bits for other models and sizes, unused parameters, and mutants."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import book
import checks
import pytest
import torch
import torch.distributed as dist
import warm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

CODE = Path("chapter3-distributed-training-with-pytorch-ddp/code")
SMALL = "ddp_from_scratch.py --width 32 --layers 2 --bucket-mib 0.02"
SHORT = f"{SMALL} --turns 0"
Run = Callable[..., warm.Result]


def torchrun(world_size: int, line: str) -> str:
    return f"torchrun --nproc_per_node={world_size} {CODE}/{line}"


@pytest.mark.parametrize(
    ("world_size", "line"),
    [
        (1, f"{SHORT} --batch 5"),
        (2, f"{SHORT} --batch 7 --seed 1"),
        (2, f"{SHORT} --batch 12 --seed 2 --bucket-mib 25"),
        (3, f"{SHORT} --batch 7 --seed 3"),
        (3, f"{SHORT} --batch 12 --seed 4 --width 20"),
        (4, f"{SHORT} --batch 7 --seed 5"),
    ],
)
def test_every_world_size(run: Run, world_size: int, line: str) -> None:
    """A script's own checks are the test: it compares itself with torch and with one process."""
    command = torchrun(world_size, line)
    parsed, result = book.parse_command(command), run(command)
    problems = checks.evidence(parsed, result)
    assert not problems, checks.report(parsed, result, problems)
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (SHORT, "torchrun --nproc_per_node=2"),
        ("ddp_from_scratch.py --steps 0", "--steps"),
        ("ddp_from_scratch.py --turns -1", "--turns"),
        ("ddp_from_scratch.py --bucket-mib 0", "--bucket-mib"),
        ("ddp_from_scratch.py --bucket-mib nan", "--bucket-mib"),
        ("ddp_from_scratch.py --width 30", "--width 30"),
        ("ddp_from_scratch.py --json no-such-folder/x.json", "no-such-folder"),
        ("ddp_from_scratch.py --no-such-flag", "--help"),
    ],
)
def test_bad_input_gets_one_line(run: Run, line: str, says: str) -> None:
    result = run(f"python {CODE}/{line}")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    assert says in result.stderr


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (f"{SHORT} --batch 2", "type --batch 3 or more"),
        (f"{SHORT} --device abacus", "2 ranks, but 0 abacus devices: type --device cpu"),
    ],
)
def test_bad_input_to_several_ranks(run: Run, line: str, says: str) -> None:
    result = run(torchrun(2, line), timeout=30)
    assert result.returncode not in (0, warm.TIMED_OUT)
    assert {says in line for line in result.stderr.splitlines()} == {True}, result.stderr


@pytest.mark.parametrize(
    ("world_size", "line", "right", "wrong"),
    [
        (2, SHORT, "1 / dist.get_world_size(), out", "1.0, out"),  # a sum for the mean
        # one bucket stays what this rank found: a copy of it is reduced
        (2, SHORT, "all_reduce(bucket.flat, async",
         "all_reduce(bucket.flat.clone() if len(self.works) == 1 else bucket.flat, async"),
        (2, SHORT, "            work.wait()", "            pass"),
        (2, SHORT, "dist.broadcast(tensor.detach(), src=0)", "pass"),
        (2, SHORT, "self.syncs = self.require_sync", "self.syncs = True"),  # no_sync that syncs
        (2, SHORT, "self.syncs = self.require_sync", "self.syncs = False"),
        # nothing starts before the end of backward
        (2, SHORT, "and not self.buckets[len(self.works)].missing:", "and False:"),
        (3, SHORT, "if not self.regrouped:", "if False:"),  # other buckets than torch: other bits
        (2, SHORT, "        if unused:", "        if False:"),
        (2, f"{SMALL} --turns 1", "        for work in self.works:",
         "        time.sleep(0.05)\n        for work in self.works:"),
    ],
)  # fmt: skip
def test_mutants_are_caught(
    run: Run, checkout: Path, world_size: int, line: str, right: str, wrong: str
) -> None:
    """Break the script: its own checks must see it, and its exit code must say so."""
    name, _, flags = line.partition(" ")
    source = (checkout / CODE / name).read_text()
    assert source.count(right) == 1
    mutant = checkout / CODE / f"mutant_{name}"
    mutant.write_text(source.replace(right, wrong))
    result = run(torchrun(world_size, f"{mutant.name} {flags}"), timeout=40)
    mutant.unlink()
    assert result.returncode not in (0, warm.TIMED_OUT), result.stdout
    assert "FAILED" in result.stdout, result.stderr


# --- the class alone ---------------------------------------------------------------------------


def ddp() -> type[Any]:
    return warm.load("ddp_from_scratch", warm.ROOT / CODE / "ddp_from_scratch.py").DDP


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
            shape = (3, 5) if kind == "tied" else (2, 3, 8, 8)
            torchs = DistributedDataParallel(
                deepcopy(model), bucket_cap_mb=0.004, gradient_as_bucket_view=as_view
            )
            pair = (ddp()(model, int(0.004 * 2**20)), torchs)
            optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in pair]
            off = 0.0
            for step in range(4):
                x = torch.randint(40, shape) if kind == "tied" else torch.randn(shape)
                for m in pair:
                    with m.no_sync():
                        m(x).square().mean().backward()
                    m(x[:1]).square().mean().backward()
                for a, b in zip(*(m.parameters() for m in pair), strict=True):
                    if step > 0 and a.grad is not None:  # torch's first has another grouping
                        off = max(off, (a.grad - b.grad).abs().max().item())
                for optimizer in optimizers:
                    if step > 0:
                        optimizer.step()
                    optimizer.zero_grad()
            tensors = (m.module.state_dict().values() for m in pair)
            apart = max((a - b).abs().max().item() for a, b in zip(*tensors, strict=True))
            sizes = torchs._get_ddp_logging_data()["rebuilt_bucket_sizes"]
            ours = [bucket.flat.nbytes for bucket in pair[0].buckets]
            assert len(ours) > 1
            found.append((off, apart, sizes == ", ".join(map(str, ours))))
    return found


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


def take_detour(lazy: tuple[int, ...]) -> tuple[str, float]:
    """In a rank: the error of a step, and how a step without a detour goes after it."""
    torch.manual_seed(0)
    model = ddp()(Detour(lazy), 1)  # one bucket per parameter
    said = ""
    try:
        model(torch.ones(2, 4)).sum().backward()
    except RuntimeError as error:
        said = str(error)
    model.module.lazy = ()
    model.zero_grad()
    model(torch.full((2, 4), 1.0 + dist.get_rank())).sum().backward()
    alone = deepcopy(model.module)
    alone.zero_grad()
    n = dist.get_world_size()
    alone(torch.full((2, 4), (1 + n) / 2)).sum().backward()  # linear: the mean over the ranks
    pairs = zip(model.parameters(), alone.parameters(), strict=True)
    return said, max((a.grad - b.grad).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize("lazy", [(0,), (1,), (0, 1)])
def test_unused_parameters(lazy: tuple[int, ...]) -> None:
    """The rank that lacks gradients names them; the other one does not hang, and both go on."""
    for rank, (said, off) in enumerate(warm.fork_ranks(take_detour, 2, lazy, timeout=20)):
        named = "backward left no gradient in second.weight, second.bias"
        assert said == (named if rank in lazy else "")
        assert off < 1e-5


def refuse(_: int) -> str:
    try:
        ddp()(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double()))
    except ValueError as error:
        return str(error)
    return ""


def test_mixed_dtypes_are_refused() -> None:
    assert "one dtype" in warm.fork_ranks(refuse, 1, 0)[0]
