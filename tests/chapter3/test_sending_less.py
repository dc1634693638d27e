"""Compression hooks and local steps: other world sizes and sizes, faults, and the wire itself."""

import contextlib
import os
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import book
import checks
import pytest
import torch
import torch.distributed as dist
import warm
from torch import nn

CODE = Path("chapter3-distributed-training-with-pytorch-ddp/code")
Run = Callable[..., warm.Result]
SMALL = "--width 24 --heads 3 --context 16 --data README.md"
# A long latency: the times are then the stand-in's, whatever else this machine does.
HOOKS = f"ddp_comm_hooks.py {SMALL} --steps 5 --keep 0.1 --repeats 1 --latency-us 5000"
LOCAL = f"local_sgd.py {SMALL} --steps 4 --seeds 1 --every 1 4 --diloco 2"


def torchrun(world_size: int, line: str) -> str:
    return f"torchrun --nproc_per_node={world_size} {CODE}/{line}"


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "line",
    [
        f"{HOOKS} --bucket-mb 0.02 --seed 1",  # several buckets, rebuilt after the first step
        f"{LOCAL} --seed 2",
    ],
)
def test_every_world_size(run: Run, line: str, world_size: int) -> None:
    """A script's own checks are the test: it compares itself with exact averages, and with DDP."""
    command = torchrun(world_size, line)
    result = run(command)
    parsed = book.parse_command(command)
    problems = checks.evidence(parsed, result)
    assert not problems, checks.report(parsed, result, problems)
    assert result.stderr == ""


def test_plots_and_json(run: Run, tmp_path: Path) -> None:
    for line, word in ((f"{HOOKS} --matrix-rank 30 --warm-up 3", "powerSGD"),
                       (f"{LOCAL} --outer-momentum 0 --outer-lr 1", "DiLoCo")):  # fmt: skip
        picture, record = tmp_path / f"{word}.svg", tmp_path / f"{word}.json"
        result = run(torchrun(2, f"{line} --plot {picture} --json {record}"))
        assert result.returncode == 0, result.stdout + result.stderr
        assert not checks.drawn(picture)
        assert f'"{word}"' in record.read_text()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (HOOKS, "torchrun --nproc_per_node=2"),
        (LOCAL, "torchrun --nproc_per_node=2"),
        (f"{HOOKS} --keep 1.5", "--keep 1.5"),
        (f"{HOOKS} --gbit nan", "--gbit"),
        (f"{HOOKS} --warm-up 1", "type 2 or more"),
        (f"{HOOKS} --width 25", "--width 25"),
        (f"{HOOKS} --json no-such-folder/x.json", "no-such-folder"),
        (f"{LOCAL} --every 3", "--steps 4 is no multiple of H = 3"),
        (f"{LOCAL} --outer-momentum 1", "--outer-momentum 1"),
        (f"{LOCAL} --outer-lr -1", "--outer-lr"),
        (f"{LOCAL} --plot /dev/null/x.svg", "/dev/null/x.svg"),
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
        (f"{HOOKS} --data no-such-file", "give a text file with --data FILE"),
        (f"{LOCAL} --device abacus", "2 ranks, but 0 abacus devices: type --device cpu"),
    ],
)
def test_bad_input_to_several_ranks(run: Run, line: str, says: str) -> None:
    """Each rank says the one line; none hangs, none prints a traceback."""
    result = run(torchrun(2, line), timeout=30)
    assert result.returncode not in (0, warm.TIMED_OUT)
    assert {says in line for line in result.stderr.splitlines()} == {True}, result.stderr


@pytest.mark.parametrize(
    ("world_size", "line", "right", "wrong"),
    [
        # sums that nobody divides
        (2, HOOKS, "alpha=1 / len(gathered)", "alpha=1"),
        (2, HOOKS, "view(n, -1).mean(0)", "view(n, -1).sum(0)"),
        # what is not sent is lost, in all parameters but one
        (2, HOOKS, "for parameter, part in parts:\n        part", "for parameter, part in parts[:1]:"
         "\n        part"),
        # what is sent stays behind as well, and is sent again
        (2, HOOKS, "    gradient[places] = 0\n", ""),
        # every rank adds in an order of its own, and gets weights of its own
        (3, HOOKS, "for places, values in gathered:", "for places, values in gathered["
         "dist.get_rank():] + gathered[: dist.get_rank()]:"),
        # steps without their scale; steps that are cut off, not rounded
        (2, HOOKS, "(steps * scale.contiguous().view(torch.float32)).flatten()",
         "steps.float().flatten()"),
        (2, HOOKS, "scale.clamp(min=TINY)).round()", "scale.clamp(min=TINY)).trunc()"),
        # indices that are not counted
        (2, HOOKS, "inputs[0].nbytes)", "inputs[0].nbytes / 2)"),
        # a slow link that is not slow
        (2, HOOKS, "time.sleep(max(0.0, due - time.perf_counter()))", "pass"),
        # ranks that never meet, or meet after the first step and not at the end
        (2, LOCAL, "self.sync = lambda: averager.average_parameters(model.parameters())", "pass"),
        (2, LOCAL, "PeriodicModelAverager(every, every - 1,", "PeriodicModelAverager(every, 0,"),
        # DiLoCo: away from where the ranks went; their sum; a start that moves with the weights
        (2, LOCAL, "self.common - parameters_to_vector(self.model.parameters())",
         "parameters_to_vector(self.model.parameters()) - self.common"),
        (2, LOCAL, "moved / self.group.size()", "moved"),
        (2, LOCAL, "self.common.clone(), self", "self.common, self"),
        (3, LOCAL, "2 * (n - 1) * tensor.nbytes / n", "tensor.nbytes"),
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


# --- the hooks and the optimizer alone ---------------------------------------------------------


def script(name: str) -> ModuleType:
    return warm.load(name, warm.ROOT / CODE / f"{name}.py")


class Bucket:
    """What a hook uses of dist.GradBucket, which only DDP can make."""

    def __init__(self, index: int, gradients: dict[nn.Parameter, torch.Tensor]):
        self.index = lambda: index
        self.is_last = lambda: True
        self.parameters = lambda: list(gradients)
        flat = torch.cat([gradient.flatten() for gradient in gradients.values()])
        parts = flat.split([gradient.numel() for gradient in gradients.values()])
        views = [part.view(p.shape) for part, p in zip(parts, gradients, strict=True)]
        self.buffer = lambda: flat
        self.gradients = lambda: views


def rebuilt_in_rank() -> float:
    """Steps whose buckets change, as DDP's do: |sent + residual - gradients| / |gradients|."""
    hooks, n = script("ddp_comm_hooks"), dist.get_world_size()
    state = hooks.TopK(hooks.Link(torch.device("cpu")), keep=0.1, feedback=True)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((7, 9), (9, 7), (63,))]
    draw = torch.Generator().manual_seed(dist.get_rank())
    gradients = torch.zeros(3, 63, dtype=torch.double)
    sent = torch.zeros(3, 63, dtype=torch.double)
    a, b, c = range(3)
    for step, buckets in enumerate([[[a, b], [c]], [[c], [b, a]], [[b, c, a]]] * 3):
        for index, members in enumerate(buckets):
            local = {parameters[i]: torch.randn(parameters[i].shape, generator=draw) * 2**step
                     for i in members}  # fmt: skip
            for i in members:
                gradients[i] += local[parameters[i]].flatten()
            average = hooks.top_k_hook(state, Bucket(index, local)).wait()
            for i, part in zip(members, average.split(63), strict=True):
                sent[i] += part
    residual = torch.stack([state.residual[p].flatten().double() for p in parameters])
    total = torch.stack([gradients, residual])
    dist.all_reduce(total)
    gradients, residual = total / n
    return ((sent + residual - gradients).norm() / gradients.norm()).item()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_residual_follows_its_parameter(world_size: int) -> None:
    assert max(warm.fork_ranks(rebuilt_in_rank, world_size)) < 1e-6


@pytest.mark.parametrize("seed", range(5))
def test_int8_is_off_by_half_a_step_at_most(seed: int) -> None:
    hooks = script("ddp_comm_hooks")
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(40, hooks.BLOCK, generator=draw)
    x *= 10.0 ** torch.randint(-30, 30, (40, 1), generator=draw)  # scales that differ by block
    x[3], x[5, 1:], x[7, 9] = 0.0, 0.0, 1e4 * x[7].abs().max()  # nothing; one value; an outlier
    back = hooks.dequantize(hooks.quantize(x.flatten())).view_as(x)
    scale = x.double().abs().amax(1, keepdim=True) / 127
    assert ((x - back).double().abs() <= scale * 0.50001).all()
    assert torch.equal(back[3], x[3])
    assert hooks.quantize(x.flatten()).numel() == 40 * (hooks.BLOCK + 4)  # a byte, and scales


def received() -> int:
    """Bytes that this process's TCP connections have received: of gloo's pairs, headers too."""
    total = 0
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the folder's own descriptor, or not of TCP
            if os.readlink(path).startswith("socket:"):
                with socket.socket(fileno=os.dup(int(path.name))) as pair:
                    info = pair.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                total += struct.unpack_from("Q", info, 128)[0]  # tcpi_bytes_received, Linux 4.1
    return total


def counted_in_rank() -> list[tuple[str, int, float, int]]:
    """By hook: bytes that came over TCP, bytes the link counted, collectives."""
    hooks = script("ddp_comm_hooks")
    link = hooks.Link(torch.device("cpu"))
    power = hooks.powerSGD_hook.PowerSGDState(link, 4, start_powerSGD_iter=2)
    table = [
        ("none", link, hooks.default_hooks.allreduce_hook),
        ("fp16", link, hooks.default_hooks.fp16_compress_hook),
        ("int8", link, hooks.int8_hook),
        ("top-k", hooks.TopK(link, 0.03, True), hooks.top_k_hook),
        ("powerSGD", power, hooks.powerSGD_hook.powerSGD_hook),
    ]
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((500, 303), (1001,))]
    rows = []
    for name, state, hook in table:
        for _ in range(3):  # the last one is after powerSGD's warm-up
            bucket = Bucket(0, {p: torch.randn(p.shape) for p in parameters})
            link.sent = link.calls = 0
            dist.barrier()
            before = received()
            hook(state, bucket).wait()
            came = received() - before
        rows.append((name, came, link.sent, link.calls))
    return rows


@pytest.mark.parametrize("world_size", [2, 3])
def test_counted_bytes_are_on_the_wire(world_size: int) -> None:
    """The kernel's counters of this group's own connections: no other program's bytes."""
    ranks = warm.fork_ranks(counted_in_rank, world_size)
    for rows in zip(*ranks, strict=True):
        came, counted = sum(row[1] for row in rows), sum(row[2] for row in rows)
        headers = 1000 * world_size * (world_size - 1) * rows[0][3]
        assert 0 <= came - counted <= headers, rows
        assert headers < counted, rows


def slow_in_rank() -> tuple[float, float, float]:
    """Seconds of two all-reduces on a slow link that are under way together, and of the CPU."""
    hooks = script("ddp_comm_hooks")
    link = hooks.Link(torch.device("cpu"))
    link.bandwidth, link.latency = 1e6, 0.05
    tensors = torch.ones(2, 25_000)  # 100 kB each
    dist.barrier()
    start, cpu = time.perf_counter(), time.process_time()
    works = [dist.all_reduce(tensor, group=link, async_op=True) for tensor in tensors]
    works[0].wait()
    first = time.perf_counter() - start
    works[1].wait()
    second = time.perf_counter() - start
    assert torch.equal(tensors, torch.full_like(tensors, dist.get_world_size()))
    return first, second, time.process_time() - cpu


def test_slow_link_takes_its_time_and_no_cpu() -> None:
    for first, second, cpu in warm.fork_ranks(slow_in_rank, 2):
        assert first >= 0.05 + 0.1
        assert second >= 2 * (0.05 + 0.1)
        assert cpu < 0.1


def diloco_in_rank() -> float:
    """The outer optimizer against its formula: v = m v + g, weights -= lr (g + m v)."""
    rank, n = dist.get_rank(), dist.get_world_size()
    module = script("local_sgd")
    model = nn.Linear(3, 2).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    diloco = module.DiLoCo(model, every=2, lr=0.7, momentum=0.9, group=module.Meter())
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


@pytest.mark.parametrize("world_size", [1, 3])
def test_diloco_is_nesterov_on_what_ranks_moved(world_size: int) -> None:
    assert max(warm.fork_ranks(diloco_in_rank, world_size)) < 1e-12


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


@pytest.mark.parametrize(("mib", "ends"), [(25, True), (0.05, False)])
def test_torchs_power_sgd_on_gloo_wants_one_bucket(
    run: Run, tmp_path: Path, mib: float, ends: bool
) -> None:
    """As section 3.5 says of torch 2.13; a release in which this fails is a reason to edit it."""
    path = tmp_path / "power.py"
    path.write_text(POWER.replace("BUCKET", f"{mib}"))
    result = run(f"torchrun --nproc_per_node=2 {path}", timeout=10)
    assert (result.returncode == 0) is ends, result.stderr
