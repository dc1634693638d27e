"""Uneven inputs: the hang, Join in three variants, and equal steps with empty shares instead.

    torchrun --nproc_per_node=2 chapter3-distributed-training-with-pytorch-ddp/code/ddp_uneven_inputs_join.py
    torchrun --nproc_per_node=3 chapter3-distributed-training-with-pytorch-ddp/code/ddp_uneven_inputs_join.py --steps 5 --seed 1

On GPUs:
    torchrun --nproc_per_node=8 chapter3-distributed-training-with-pytorch-ddp/code/ddp_uneven_inputs_join.py --steps 20

Each way equals one process, though not the same one: they weigh the last batches differently. Then
the last columns, for what Join leaves behind: it stays switched on, and it makes the ranks' weights
equal but not their optimizers. Section 3.8.
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from itertools import pairwise
from typing import NoReturn

import torch
import torch._dynamo  # before the group, or gloo's threads outlive it: section 3.8
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

WIDTH = 16
HIDDEN = 64
BUCKETS = 2  # for a bucket is full at one weight matrix of float64:
DDP = partial(DistributedDataParallel, bucket_cap_mb=WIDTH * HIDDEN * 8 / 2**20)
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
INITIAL = "divide_by_initial_world_size"  # options of Join
THROW = "throw_on_early_termination"
Rows = torch.Tensor  # a rank's batch: [rows, WIDTH]


def row_losses(model: nn.Module, rows: Rows) -> torch.Tensor:
    """How far the model is from returning its input: [rows]."""
    return (model(rows) - rows).square().mean(1)


def plain(model: nn.Module, optimizer: Optimizer, batches: list[Rows]) -> None:
    for rows in batches:
        row_losses(model, rows).mean().backward()
        update(optimizer)


def with_join(model: nn.Module, optimizer: Optimizer, batches: list[Rows], **options: bool) -> None:
    """A rank that is done answers the others' all-reduces with zeros, until all are done."""
    with Join([model], **options):
        plain(model, optimizer, batches)


def with_empty_shares(model: nn.Module, optimizer: Optimizer, batches: list[Rows]) -> None:
    """All ranks take as many steps as the longest; one out of rows borrows a row and weighs it 0."""
    steps = batches[0].new_tensor(len(batches))
    dist.all_reduce(steps, op=dist.ReduceOp.MAX)
    for step in range(int(steps)):
        present = step < len(batches)
        rows = batches[step] if present else batches[0][:1]
        total = rows.new_tensor(present * len(rows))
        dist.all_reduce(total)
        weight = present * dist.get_world_size() / total  # DDP divides by the world size
        (weight * row_losses(model, rows).sum()).backward()
        update(optimizer)


def update(optimizer: Optimizer) -> None:
    optimizer.step()
    optimizer.zero_grad()


def over_all(model: nn.Module, batches: list[Rows]) -> torch.Tensor:
    return sum(row_losses(model, rows).mean() for rows in batches) / dist.get_world_size()


def over_present(model: nn.Module, batches: list[Rows]) -> torch.Tensor:
    return sum(row_losses(model, rows).mean() for rows in batches) / len(batches)


def over_rows(model: nn.Module, batches: list[Rows]) -> torch.Tensor:
    return row_losses(model, torch.cat(batches)).mean()


@dataclass
class Way:
    """A way to train on uneven inputs, and what it should do."""

    name: str
    train: Callable[..., None]
    collectives: int  # of each step
    loss: Callable[[nn.Module, list[Rows]], torch.Tensor]  # of the one process that it equals
    options: dict[str, bool] = field(default_factory=dict)


WAYS = [
    Way("Join", with_join, BUCKETS + 2, over_all),
    Way("Join, ranks left", with_join, BUCKETS + 2, over_present, {INITIAL: False}),
    Way("Join, throw", with_join, BUCKETS + 3, over_all, {THROW: True}),
    Way("empty shares", with_empty_shares, BUCKETS + 1, over_rows),
]


def one_process(start: nn.Module, steps: list[list[Rows]], loss: Callable) -> nn.Module:
    """Trained on what all ranks have together."""
    model = deepcopy(start)
    optimizer = SGD(model.parameters())
    for batches in steps:
        loss(model, batches).backward()
        update(optimizer)
    return model


def draw_steps(args: argparse.Namespace, device: torch.device) -> list[list[Rows]]:
    """Each step's batches by rank, of 2 to 4 rows; rank 1 has one step fewer, those behind two."""
    draw = torch.Generator().manual_seed(args.seed)
    steps = []
    for step in range(args.steps):
        present = [r for r in range(dist.get_world_size()) if step < args.steps - min(r, 2)]
        shapes = [(2 + (step + 2 * r) % 3, WIDTH) for r in present]
        batches = (torch.randn(s, generator=draw, dtype=torch.float64) for s in shapes)
        steps.append([rows.to(device) for rows in batches])
    return steps


def hang(
    start: nn.Module, batches: list[Rows], shortest: int, timeout: float
) -> tuple[bool, float, str, int]:
    """No Join: is this rank stuck, for how many seconds, its error; collectives of a step before."""
    # NCCL's watchdog ends the process at its timeout; gloo raises an error that can be caught.
    doomed = dist.new_group(backend="gloo")  # with the long timeout, for ranks that come late
    model = DDP(deepcopy(start).cpu(), process_group=doomed)
    batches = [rows.cpu() for rows in batches]
    optimizer = SGD(model.parameters())
    plain(model, optimizer, batches[: shortest - 1])
    with Traffic() as traffic:
        plain(model, optimizer, batches[shortest - 1 : shortest])
    dist.barrier()
    _set_pg_timeout(timedelta(seconds=timeout), doomed)
    begin = time.perf_counter()
    try:
        plain(model, optimizer, batches[shortest:])
    except RuntimeError as error:
        said = re.sub(r"^\[.*?\] ", "", str(error).splitlines()[0])  # without its line of C++
        return True, time.perf_counter() - begin, said, traffic.count
    return False, 0.0, "", traffic.count


class Traffic(TorchDispatchMode):
    """Counts this process's collectives, also those that DDP starts from C++."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += operator.namespace == "c10d"
        return operator(*args, **(kwargs or {}))


@dataclass
class Outcome:
    """What a way did; `error` and `spread` are the worst rank's."""

    collectives: list[int]  # of each step
    after: int  # in one ordinary step more
    error: float  # of the weights, from one process's
    spread: float  # of the weights from rank 0's, after the step more
    messages: list[str]  # what each rank raised


def try_out(way: Way, start: nn.Module, batches: list[Rows], reference: nn.Module) -> Outcome:
    model = DDP(deepcopy(start))
    optimizer = SGD(model.parameters())
    ends = [0]  # of each step: the collectives so far
    message = ""
    with Traffic() as traffic:
        optimizer.register_step_post_hook(lambda *_: ends.append(traffic.count))
        try:
            way.train(model, optimizer, batches, **way.options)
        except RuntimeError as raised:
            message = str(raised)
        error = difference(model.module, reference)
        before = traffic.count
        plain(model, optimizer, batches[:1])
        after = traffic.count - before
    rank_0s = deepcopy(model.module)
    for p in rank_0s.parameters():
        dist.broadcast(p.detach(), src=0)
    found = error, difference(model.module, rank_0s), message
    errors, spreads, messages = zip(*of_all_ranks(found), strict=True)
    counts = [b - a for a, b in pairwise(ends[:-1])]
    return Outcome(counts, after, max(errors), max(spreads), messages)


def difference(model: nn.Module, reference: nn.Module) -> float:
    """max |model - reference| / max |reference| of the weights; infinite if one is NaN."""
    a, b = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (model, reference))
    return ((a - b).abs().max() / b.abs().max()).nan_to_num(torch.inf).item()


def of_all_ranks(value: object) -> list:
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def run(args: argparse.Namespace, device: torch.device) -> list[bool | None]:
    n = dist.get_world_size()
    rank = dist.get_rank()
    if n == 1:
        stop(f"needs two ranks: type  torchrun --nproc_per_node=2 {sys.argv[0]}")
    steps = draw_steps(args, device)
    share = [batches[rank] for batches in steps if rank < len(batches)]
    together = [batches for batches in steps if len(batches) == n]  # before any rank is done
    torch.manual_seed(args.seed)
    layers = (nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))
    start = nn.Sequential(*layers).to(device, torch.float64)

    lengths = of_all_ranks(len(share))
    say(f"{n} ranks on {device.type}; batches by rank: {', '.join(map(str, lengths))}")
    caught = of_all_ranks(hang(start, share, len(together), args.timeout))
    stuck, seconds, errors, counts_before = zip(*caught, strict=True)
    say(f"{'':<18}{'':<8}{'':>5}{'collectives a step':>24}{'error of':>10}{'spread a':>12}")
    heads = f"{'ends?':<8}{'steps':>5}{'predicted':>11}{'seen':>6}{'after':>7}"
    say(f"{'':<18}{heads}{'weights':>10}{'step later':>12}")
    row = f"{'no Join':<18}{'hangs' if any(stuck) else 'yes':<8}{len(together):>5}"
    say(f"{row}{BUCKETS:>11}{counts_before[0]:>6}")
    outcomes = []
    miscounted = abs(counts_before[0] - BUCKETS)
    wrong = 0  # ranks that raise and should not, or the reverse
    for way in WAYS:
        reference = one_process(start, together if THROW in way.options else steps, way.loss)
        outcome = try_out(way, start, share, reference)
        outcomes.append(outcome)
        counts = outcome.collectives
        ends = "raises" if outcome.messages[0] else "yes"
        row = f"{way.name:<18}{ends:<8}{len(counts):>5}{way.collectives:>11}{counts[-1]:>6}"
        say(f"{row}{outcome.after:>7}{outcome.error:>10.2g}{outcome.spread:>12.2g}")
        # In step 2 DDP regroups its buckets.
        miscounted = max(miscounted, *(abs(count - way.collectives) for count in counts[2:]))
        wrong += sum(bool(message) != (THROW in way.options) for message in outcome.messages)
    join, _, throwing, empty = outcomes
    say(
        f"no Join: {sum(stuck)} of {n} ranks wait; after {max(seconds):.1f} s gloo says: {max(errors)}"
    )
    say(f"throwing, rank 0: {throwing.messages[0]}")
    say(f"throwing, rank {n - 1}: {throwing.messages[-1]}")
    longer = sum(length > len(together) for length in lengths)
    worst = max(outcome.error for outcome in outcomes)
    return [
        check("no Join: ranks that have more batches and do not hang", longer - sum(stuck), 0),
        check("each way: weights' difference from its one process", worst, 1e-12),
        check("collectives of a step, predicted or not", miscounted, 0),
        check("ranks that should raise and do not, or the reverse", wrong, 0),
        check("Join: spread of the weights a step later", join.spread, 1e-6, at_least=True),
        check("empty shares: spread of the weights a step later", empty.spread, 0),
    ]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=6, help="batches of rank 0; 5 or more")
    parser.add_argument("--timeout", type=float, default=1.0, help="seconds until the hang ends")
    parser.add_argument("--seed", type=int, default=0, help="for data and weights")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args()
    if args.steps < 5:
        stop(f"--steps {args.steps} is too few to see a steady step: type 5 or more")
    return args


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


# Copied from ch01_multi_gpu_ddp.join_group
def join_group(wanted: str) -> torch.device:
    """Join the process group that the launcher describes; return this rank's device."""
    if "LOCAL_WORLD_SIZE" not in os.environ:
        stop(f"no launcher: type  torchrun --nproc_per_node=2 {sys.argv[0]}")
    local_rank, ranks_here = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    gpu = torch.accelerator.current_accelerator(check_available=True)
    gpus = torch.accelerator.device_count() if gpu and gpu.type != "mps" else 0
    if wanted == "auto":
        if ranks_here < int(os.environ["WORLD_SIZE"]):
            stop("several nodes may differ: type --device cuda, or --device cpu")
        wanted = gpu.type if gpu and gpus >= ranks_here else "cpu"
        if wanted == "cpu" and gpus and local_rank == 0:
            print(f"{ranks_here} ranks, but {gpus} GPUs: running on the CPU", file=sys.stderr)
    if wanted != "cpu" and gpus < ranks_here:
        stop(f"{ranks_here} ranks, but {gpus} GPUs here: type --device cpu, or start fewer ranks")
    if wanted == "cpu":
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    else:
        device = torch.device(wanted, local_rank)
        torch.accelerator.set_device_index(local_rank)
        dist.init_process_group(device_id=device)  # PyTorch chooses the backend: NCCL for cuda
    dist.barrier()  # all are here before one may leave
    return device


# Copied from ch01_multi_gpu_ddp.main
@record  # so that torchrun's summary names the error
def main() -> None:
    args = parse_args()
    device = join_group(args.device)
    claims_of = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(claims_of, run(args, device))  # nobody leaves while another is at work
    dist.destroy_process_group()  # not in a `finally`: section 3.1
    sys.exit(conclude(max(claims_of, key=lambda claims: claims.count(False))))  # the worst rank's


# Copied from ch01_single_gpu_baseline.check
def check(claim: str, value: float, bound: float, at_least: bool = False) -> bool:
    """Print whether a value keeps its bound, as it must anywhere; a rank where it does not speaks."""
    held = bool(value >= bound if at_least else value <= bound)  # False for NaN
    line = f"check: {claim} = {value:.3g} {'>=' if at_least else '<='} {bound:.3g}"
    if held:
        say(f"{line}  ok")
    else:
        print(f"{line}  FAILED on rank {os.environ.get('RANK', '0')}", flush=True)
    return held


# Copied from ch01_single_gpu_baseline.conclude
def conclude(claims: list[bool | None]) -> int:
    """Print the last line of a run, and return its exit code; an `expect` that is None is no check."""
    judged = [held for held in claims if held is not None]
    failed = judged.count(False)
    say(f"{failed} of {len(judged)} checks FAILED" if failed else f"all {len(judged)} checks ok")
    return int(failed > 0)


# Copied from ch01_single_gpu_baseline.say
def say(line: str) -> None:
    """Print on rank 0. A reader who has seen enough (`| head`) does not end the run."""
    if os.environ.get("RANK", "0") == "0":
        try:
            print(line, flush=True)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# Copied from ch01_single_gpu_baseline.stop
def stop(message: str) -> NoReturn:
    """End with one line and exit code 2: the command was wrong, not the program."""
    sys.stderr.write(message + "\n")  # in one piece: other ranks write too
    sys.exit(2)


if __name__ == "__main__":
    main()
