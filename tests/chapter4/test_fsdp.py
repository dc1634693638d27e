"""FSDP2 with activation checkpointing: one process's training, exact accounts, first mistakes."""

import datetime
import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import book
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import warm
from mutants import failed_claims
from torch import nn
from torch.distributed import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

CODE = Path("chapter4-scaling-with-fully-sharded-data-parallel-fsdp/code")
NAME = "fsdp_checkpointing.py"
SCRIPT = warm.ROOT / CODE / NAME
GOLDEN = "--compare chapter3-distributed-training-with-pytorch-ddp/code/golden.json"
Run = Callable[..., warm.Result]

script = warm.load("chapter4_script", SCRIPT)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A single rank would take all cores, and wait for the ones that others use."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


# --- the same training as one process ----------------------------------------------------------

SHAPE: dict[str, float] = {"width": 24, "layers": 3, "heads": 2, "context": 16}
SHAPE |= {"batch": 7, "dropout": 0.0, "seed": 3}


def gradients_in_rank(mode: str) -> float:
    """Largest difference of a gradient from one process's on the whole batch, relative to it."""
    args: Any = SimpleNamespace(**SHAPE)
    draw = torch.Generator().manual_seed(0)
    window = torch.randint(256, (args.batch, args.context + 1), generator=draw)

    def backward(model: nn.Module, window: torch.Tensor, scale: int) -> None:
        logits = model(window[:, :-1]).flatten(0, 1)
        loss = F.cross_entropy(logits, window[:, 1:].flatten(), reduction="sum")
        (loss * scale / (args.batch * args.context)).backward()

    model = script.build_sharded(args, mode, torch.device("cpu"))
    backward(model, window[dist.get_rank() :: dist.get_world_size()], dist.get_world_size())
    torch.manual_seed(args.seed)
    reference = script.ByteLlama(args.width, args.layers, args.heads, args.context)
    backward(reference, window, 1)
    pairs = zip(model.parameters(), reference.parameters(), strict=True)
    found = [(p.grad.full_tensor(), q.grad) for p, q in pairs]
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in found)


@pytest.mark.parametrize(
    "world_size", [2, *(pytest.param(n, marks=pytest.mark.full) for n in (1, 3, 4))]
)
def test_gradients_are_one_processs_mean(world_size: int) -> None:
    """Seven windows: on two, three and four ranks the shares differ. A sum would be n times off."""
    for mode in script.MODES:
        assert max(warm.fork_ranks(gradients_in_rank, world_size, mode)) < 1e-5


@pytest.mark.full
@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_accounts_hold_for_other_shapes(world_size: int) -> None:
    """Rows that do not divide, a rank with one window, dropout, one block; and the golden losses."""
    cases = [
        (
            "--data LICENSE --width 60 --layers 3 --heads 6 --context 40 --batch 7 --dropout 0.5 --steps 2",
            "",
            "",
        ),
        ("--data LICENSE --width 24 --layers 1 --heads 2 --context 24 --batch 4", "", ""),
        (f"{GOLDEN} --seed 20260101 --width 24 --layers 2 --heads 2 --context 24", "", ""),
    ]
    assert failed_claims(SCRIPT, world_size, cases) == [set()] * len(cases)


MUTANTS = [  # flags; a piece of the source, what it becomes; the claim that must fail
    # other masks when a block runs again: no error, another gradient
    ("--dropout 0.1", "checkpoint_wrapper(block)",
     "checkpoint_wrapper(block, preserve_rng_state=False)", "max |gradient"),
    # a product is made again, or more is kept than was chosen
    ("", "aten.mm.default,", "", "error of the FLOPs"),
    ("", "aten.mm.default,", "aten.mm.default, aten.silu.default,", "error of the activations"),
    # blocks that keep their weights, or are no groups of their own
    ("", "fully_shard(model.blocks[number], mesh=mesh)",
     "fully_shard(model.blocks[number], mesh=mesh, reshard_after_forward=False)", "error of weights"),
    ("", "        fully_shard(model.blocks[number], mesh=mesh)", "        pass", "error of weights"),
    # each of these is a mistake in the model that predicts
    ("", "-(-len(p) // world_size)", "len(p) // world_size", "error of weights"),
    ("", "(0 if args.dropout else 2 * width * hidden)", "0", "error of the FLOPs"),
    ("", "floats = 2 * (3 * width + 1)", "floats = 2 * (2 * width + 1)",
     "error of the activations"),
]  # fmt: skip


@pytest.mark.full
def test_mutants_are_caught() -> None:
    """Three ranks, so that rows do not divide."""
    small = "--data LICENSE --width 64 --layers 2 --heads 2 --context 16 --batch 6 --steps 1"
    cases = [(f"{flags} {small}", right, wrong) for flags, right, wrong, _ in MUTANTS]
    found = failed_claims(SCRIPT, 3, cases)
    for (_, right, _, claim), failed in zip(MUTANTS, found, strict=True):
        assert any(claim in line for line in failed), f"{right}: {failed}"


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("python SCRIPT", "no launcher: type  torchrun --nproc_per_node=2"),
        ("python SCRIPT --heads 3", "--width 128 is no multiple of 2 x --heads 3"),
        ("torchrun --nproc_per_node=2 SCRIPT --data no-such-file", "text file with --data FILE"),
        ("torchrun --nproc_per_node=2 SCRIPT --batch 1", "type --batch 2"),
    ],
)
def test_bad_input_gets_one_line(run: Run, command: str, says: str) -> None:
    result = run(command.replace("SCRIPT", f"{CODE}/{NAME}"), timeout=30)
    assert result.returncode not in (0, warm.TIMED_OUT)
    assert result.stdout == ""
    assert {says in line for line in result.stderr.splitlines()} == {True}, result.stderr


# --- what comes wrong first (section 4.5) ------------------------------------------------------


def mistakes_in_rank() -> dict[str, Any]:
    """What the mistakes of section 4.5 print, or do without a word."""
    args: Any = SimpleNamespace(**SHAPE)
    device = torch.device("cpu")
    tokens = torch.randint(256, (2, args.context), generator=torch.Generator().manual_seed(0))

    def said(mistake: Callable[[], object]) -> str:
        try:
            mistake()
        except (RuntimeError, TypeError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    found: dict[str, Any] = {}
    torch.manual_seed(0)
    model = script.ByteLlama(args.width, args.layers, args.heads, args.context)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)  # too early
    fully_shard(model)
    losses = []
    for _ in range(2):
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    found["optimizer first"] = losses

    model = script.build_sharded(args, "none", device)
    F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    found["a norm"] = said(lambda: f"{norm:.3f}")
    found["outside forward"] = said(lambda: model.embed(tokens))
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    found["saved"] = len(stream.getvalue()) / sum(4 * p.numel() for p in model.parameters())
    with torch.no_grad():
        model(tokens)
    found["plain after forward"] = [
        name for name, p in model.named_parameters() if not isinstance(p, DTensor)
    ]
    return found


def uneven_in_rank() -> str:
    """Rank 1 evaluates one batch less than rank 0, then adds its losses up."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=3))
    mesh = DeviceMesh.from_group(group, "cpu")
    model: Any = nn.Linear(64, 64)
    fully_shard(model, mesh=mesh)
    try:
        with torch.no_grad():
            for _ in range(3 - dist.get_rank()):
                model(torch.ones(4, 64))
                model.reshard()
        dist.all_reduce(torch.zeros(2), group=group)
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.full
def test_an_uneven_evaluation_hangs_until_the_timeout() -> None:
    for said in warm.fork_ranks(uneven_in_rank, 2):
        assert "Timed out waiting 3000ms for" in said or "Connection closed by peer" in said


def test_the_mistakes_of_the_text_do_what_it_says() -> None:
    for found in warm.fork_ranks(mistakes_in_rank, 2):
        first, second = found["optimizer first"]
        assert first == second, "it trains"
        assert found["a norm"] == (
            "TypeError: unsupported format string passed to DTensor.__format__"
        )
        assert found["outside forward"] == (
            "RuntimeError: aten.embedding.default got mixed torch.Tensor and DTensor, need to "
            "convert all torch.Tensor to DTensor before calling distributed operators!"
        )
        assert 0.5 <= found["saved"] < 0.7, "not half of it"
        assert found["plain after forward"] == ["embed.weight", "norm.weight", "head.weight"]


LEFT = """
import sys, torch
import torch.distributed as dist
from pathlib import Path
from torch import nn
from torch.distributed.fsdp import fully_shard

def train():
    model = nn.Linear(4, 4)
    if sys.argv[1] == "sharded":
        fully_shard(model)
    model(torch.ones(1, 4)).sum().backward()

dist.init_process_group("gloo")
train()
dist.barrier()
rank = dist.get_rank()
dist.destroy_process_group()
names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
if rank == 0:
    print(sum("gloo" in name for name in names), "threads of gloo")
"""


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux to list threads")
@pytest.mark.parametrize("how", ["plain", "sharded"])
def test_after_fsdp_threads_of_gloo_outlive_the_group(tmp_path: Path, how: str) -> None:
    """So `main` leaves by os._exit. When this fails for "sharded", chapter 1's main will do again."""
    (tmp_path / "left.py").write_text(LEFT)
    command = book.parse_command(f"torchrun --standalone --nproc_per_node=2 left.py {how}")
    result = warm.run_cold(command, tmp_path, 120)
    assert ("0 threads of gloo" in result.stdout) is (how == "plain"), result
