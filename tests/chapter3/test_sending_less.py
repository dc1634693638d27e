"""Compression hooks and local steps: each alone, other world sizes and seeds, and mutants."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
import warm
from mutants import failed_claims
from torch import nn

CODE = warm.ROOT / "chapter3-distributed-training-with-pytorch-ddp/code"
HOOKS = CODE / "ddp_comm_hooks.py"
LOCAL = CODE / "local_sgd.py"
FEW_STEPS = "--steps 10 --width 32 --keep 0.1"
FEW_ROUNDS = "--steps 4 --seeds 1 --width 16 --every 1 4 --diloco 2"
Run = Callable[..., warm.Result]


def script(path: Path) -> ModuleType:
    return warm.load(path.stem, path)


class Bucket:
    """What a hook uses of dist.GradBucket, which only DDP can make."""

    def __init__(self, gradients: dict[nn.Parameter, torch.Tensor]):
        self.parameters = lambda: list(gradients)
        flat = torch.cat([gradient.flatten() for gradient in gradients.values()])
        parts = flat.split([gradient.numel() for gradient in gradients.values()])
        views = [part.view(p.shape) for part, p in zip(parts, gradients, strict=True)]
        self.buffer = lambda: flat
        self.gradients = lambda: views


def rebuilt_in_rank() -> float:
    """Steps whose buckets change, as DDP's do: |sent + residual - gradients| / |gradients|."""
    hooks = script(HOOKS)
    state = hooks.TopK(keep=0.1, feedback=True)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((7, 9), (9, 7), (63,))]
    draw = torch.Generator().manual_seed(dist.get_rank())
    gradients = torch.zeros(3, 63, dtype=torch.double)
    sent = torch.zeros(3, 63, dtype=torch.double)
    a, b, c = range(3)
    for step, buckets in enumerate([[[a, b], [c]], [[c], [b, a]], [[b, c, a]]] * 3):
        for members in buckets:
            local = {
                parameters[i]: torch.randn(parameters[i].shape, generator=draw) * 2**step
                for i in members
            }
            for i in members:
                gradients[i] += local[parameters[i]].flatten()
            average = hooks.top_k_hook(state, Bucket(local)).wait()
            for i, part in zip(members, average.split(63), strict=True):
                sent[i] += part
    residual = torch.stack([state.residual[p].flatten().double() for p in parameters])
    total = torch.stack([gradients, residual])
    dist.all_reduce(total)
    gradients, residual = total / dist.get_world_size()
    return ((sent + residual - gradients).norm() / gradients.norm()).item()


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.full)])
def test_residual_follows_its_parameter(world_size: int) -> None:
    assert max(warm.fork_ranks(rebuilt_in_rank, world_size)) < 1e-6


def test_int8_is_off_by_half_a_step_at_most() -> None:
    hooks = script(HOOKS)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(40, hooks.BLOCK, generator=draw)
    x *= 10.0 ** torch.randint(-30, 30, (40, 1), generator=draw)  # scales that differ by block
    x[3] = 0.0
    x[5, 1:] = 0.0  # one value
    x[7, 9] = 1e4 * x[7].abs().max()  # an outlier
    back = hooks.dequantize(hooks.quantize(x.flatten())).view_as(x)
    scale = x.double().abs().amax(1, keepdim=True) / 127
    assert ((x - back).double().abs() <= scale * 0.50001).all()
    assert torch.equal(back[3], x[3])
    assert hooks.quantize(x.flatten()).numel() == 40 * (hooks.BLOCK + 4)  # a byte, and scales


def diloco_in_rank() -> float:
    """The outer optimizer against its formula: v = m v + g, weights -= lr (g + m v)."""
    rank = dist.get_rank()
    n = dist.get_world_size()
    model = nn.Linear(3, 2).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    diloco = script(LOCAL).DiLoCo(model, every=2, lr=0.7, momentum=0.9)
    expected, velocity = 1.0, 0.0
    for outer in range(4):
        for inner in range(2):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.sub_(0.1 * (rank + 1) * (outer + 1) + inner)  # this rank's own way
            diloco.step()
        gradient = 2 * 0.1 * (outer + 1) * sum(range(1, n + 1)) / n + 1
        velocity = 0.9 * velocity + gradient
        expected -= 0.7 * (gradient + 0.9 * velocity)
    return max((parameter - expected).abs().max().item() for parameter in model.parameters())


def test_diloco_is_nesterov_on_what_ranks_moved() -> None:
    assert max(warm.fork_ranks(diloco_in_rank, 3)) < 1e-12


# --- the scripts -------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_hooks_at_every_world_size(world_size: int) -> None:
    """The script compares itself with exact averages, and its bytes with the kernel's count."""
    buckets = "--bucket-mb 0.02 --seed 20260101"  # several, rebuilt after the first step
    lines = [f"{FEW_STEPS} {buckets}", f"{FEW_STEPS} --matrix-rank 30 --warm-up 3"]
    assert failed_claims(HOOKS, world_size, [(line, "", "") for line in lines]) == [set()] * 2


@pytest.mark.full
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_local_steps_at_every_world_size(world_size: int) -> None:
    lines = [f"{FEW_ROUNDS} --seed 20260101", f"{FEW_ROUNDS} --outer-momentum 0 --outer-lr 1"]
    assert failed_claims(LOCAL, world_size, [(line, "", "") for line in lines]) == [set()] * 2


MUTANTS_OF_HOOKS = [
    # sums that nobody divides
    ("alpha=1 / len(gathered)", "alpha=1"),
    ("view(n, -1).mean(0)", "view(n, -1).sum(0)"),
    # what is not sent is lost, in all parameters but one
    (
        "for parameter, part in parts:\n        part",
        "for parameter, part in parts[:1]:\n        part",
    ),
    # what is sent stays behind as well, and is sent again
    ("    gradient[places] = 0\n", ""),
    # every rank adds in an order of its own, and gets weights of its own
    (
        "for places, values in gathered:",
        "for places, values in gathered[dist.get_rank():] + gathered[: dist.get_rank()]:",
    ),
    # steps without their scale
    ("(steps * scale.contiguous().view(torch.float32)).flatten()", "steps.float().flatten()"),
    # indices that are not counted
    ('"top-k": (n - 1) * (4 + 4)', '"top-k": (n - 1) * 4'),
]
MUTANTS_OF_LOCAL_STEPS = [
    # ranks that never meet, or meet after the first step and not at the end
    ("averager.average_parameters(model.parameters())", "pass"),
    ("PeriodicModelAverager(method.every, method.every - 1)", "PeriodicModelAverager(2, 0)"),
    # DiLoCo: away from where the ranks went; their sum; a start that moves with the weights
    (
        "self.common - parameters_to_vector(self.model.parameters())",
        "parameters_to_vector(self.model.parameters()) - self.common",
    ),
    ("moved / dist.get_world_size()", "moved"),
    ("self.common.clone(), self", "self.common, self"),
    ("2 * (n - 1) / n * size", "size"),
]


@pytest.mark.full
@pytest.mark.parametrize(
    ("path", "flags", "mutants"),
    [(HOOKS, FEW_STEPS, MUTANTS_OF_HOOKS), (LOCAL, FEW_ROUNDS, MUTANTS_OF_LOCAL_STEPS)],
    ids=["hooks", "local steps"],
)
def test_mutants_are_caught(path: Path, flags: str, mutants: list[tuple[str, str]]) -> None:
    found = failed_claims(path, 3, [(flags, *mutant) for mutant in mutants])
    assert [mutant for mutant, failed in zip(mutants, found, strict=True) if not failed] == []


@pytest.mark.full
def test_a_run_must_end_in_a_synchronization(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--steps", "4", "--every", "3"])
    with pytest.raises(SystemExit) as end:
        script(LOCAL).parse_args()
    assert end.value.code == 2
    assert "--steps 4 is no multiple of H = 3" in capsys.readouterr().err


POWER = """
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
dist.init_process_group("gloo")
layers = nn.Sequential(*(nn.Linear(128, 128) for _ in range(8)))
model = DistributedDataParallel(layers, bucket_cap_mb=BUCKET)
model.register_comm_hook(powerSGD_hook.PowerSGDState(None, 2, 2), powerSGD_hook.powerSGD_hook)
for _ in range(40):
    model(torch.randn(2, 128)).sum().backward()
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.full
@pytest.mark.parametrize(("mib", "ends"), [(25, True), (0.05, False)])
def test_torchs_power_sgd_on_gloo_wants_one_bucket(
    run: Run, tmp_path: Path, mib: float, ends: bool
) -> None:
    """As section 3.5 says of torch 2.13; a release in which this fails is a reason to edit it."""
    path = tmp_path / "power.py"
    path.write_text(POWER.replace("BUCKET", f"{mib}"))
    result = run(f"torchrun --nproc_per_node=2 {path}", timeout=10)
    assert (result.returncode == 0) is ends, result.stderr
