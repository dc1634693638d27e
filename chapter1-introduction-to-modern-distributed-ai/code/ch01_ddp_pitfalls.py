"""Seven mistakes of data-parallel training: each made on purpose, measured and cured.

    torchrun --nproc_per_node=2 chapter1-introduction-to-modern-distributed-ai/code/ch01_ddp_pitfalls.py

On GPUs:
    torchrun --nproc_per_node=8 chapter1-introduction-to-modern-distributed-ai/code/ch01_ddp_pitfalls.py

Compare the columns "wrong" and "cured". Only the last mistake, uneven shares, stops a run. The
others let it end with numbers that look fine. Section 1.8.
"""

import argparse
import io
import os
import sys
import tempfile
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch._dynamo  # before the group, or gloo's threads outlive it: section 3.8
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DistributedSampler


@dataclass
class Finding:
    """One symptom: measured with the mistake (at least `shows`) and cured (at most `holds`)."""

    symptom: str
    wrong: float | None
    shows: float
    cured: float
    holds: float


def epochs(args: argparse.Namespace, device: torch.device) -> list[Finding]:
    """DistributedSampler shuffles by seed + epoch, and the epoch is 0 until set_epoch says more."""
    sampler = DistributedSampler(range(1000), seed=args.seed)
    batches = BatchSampler(sampler, batch_size=10, drop_last=False)
    first = list(batches)
    second = list(batches)  # an epoch later, as far as the loop knows
    wrong = sum(batch in first for batch in second) / len(first)
    sampler.set_epoch(1)
    second = list(batches)
    cured = sum(batch in first for batch in second) / len(first)
    return [Finding("share of epoch 0's batches back in epoch 1", wrong, 1, cured, 0)]


def padding(args: argparse.Namespace, device: torch.device) -> list[Finding]:
    """DistributedSampler repeats samples until the ranks have equally many; a stride does not."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dataset = range(10 * world_size + 1)
    padded = list(DistributedSampler(dataset, shuffle=False))
    strided = dataset[rank::world_size]
    wrong, cured = (sum(of_all_ranks(len(x))) - len(dataset) for x in (padded, strided))
    return [Finding("samples that an evaluation counts twice", wrong, world_size - 1, cured, 0)]


def seeds(args: argparse.Namespace, device: torch.device) -> list[Finding]:
    """Seeded alike, ranks drop the same units; seeded apart too soon, they start apart."""

    def start(first_seed: int, later_seed: int) -> tuple[float, float]:
        torch.manual_seed(first_seed)
        weights = torch.stack(of_all_ranks(nn.Linear(64, 64).weight.detach()))
        torch.manual_seed(later_seed)
        kept = torch.stack(of_all_ranks(F.dropout(torch.ones(100, 64), 0.1) > 0))
        equal = (kept[1:] == kept[0]).all(2).double().mean()  # [ranks - 1, masks, units]
        return equal.item(), (weights[1:] - weights[0]).abs().max().item()

    rank_seed = args.seed + dist.get_rank()
    same_masks, _ = start(args.seed, args.seed)
    _, apart = start(rank_seed, rank_seed)
    same_masks_cured, apart_cured = start(args.seed, rank_seed)
    return [
        Finding("share of dropout masks equal to rank 0's", same_masks, 1, same_masks_cured, 0),
        Finding("first weights apart (no DDP to broadcast)", apart, 0.01, apart_cured, 0),
    ]


def metrics(args: argparse.Namespace, device: torch.device) -> list[Finding]:
    """Accuracy over a test set sorted from easy to hard, cut into shards of 1 : 2 : ... : n."""
    rank, n = dist.get_rank(), dist.get_world_size()
    draw = torch.Generator().manual_seed(args.seed)
    right = torch.rand(2000, generator=draw) < torch.linspace(0.95, 0.35, 2000)  # [answers]
    cuts = [2000 * r * (r + 1) // (n * (n + 1)) for r in range(n + 1)]
    shard = right[cuts[rank] : cuts[rank + 1]]

    means = of_all_ranks(shard.double().mean().item())
    mean_of_means = sum(means) / n
    pooled = sum(of_all_ranks(shard.sum().item())) / sum(of_all_ranks(len(shard)))
    say(f"accuracy: rank 0 {means[0]:.3f}, mean of means {mean_of_means:.3f}, pooled {pooled:.3f}")
    truth = right.double().mean().item()
    error = abs(pooled - truth)
    return [
        Finding("error of rank 0's accuracy", abs(means[0] - truth), 0.05, error, 0),
        Finding("error of the ranks' mean accuracy", abs(mean_of_means - truth), 0.02, error, 0),
    ]


def saving(args: argparse.Namespace, device: torch.device) -> list[Finding]:
    """All ranks save to one path; the barriers force an order that chance would bring."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    buffer = io.BytesIO()
    torch.save({"weight": torch.full((10_000,), float(rank))}, buffer)
    payload = buffer.getvalue()
    halves = payload[: len(payload) // 2], payload[len(payload) // 2 :]
    folder = tempfile.TemporaryDirectory() if rank == 0 else None
    path = Path(of_all_ranks(folder and folder.name)[0], "checkpoint.pt")

    def ranks_in_file() -> int:
        """How many ranks' weights the checkpoint holds; 0 if it cannot be loaded."""
        try:
            return len(torch.load(path, weights_only=True)["weight"].unique())
        except (RuntimeError, EOFError, OSError):
            return 0

    def save(target: Path, writers: list[int]) -> tuple[float, float]:
        """Write in two halves, load between them: files' worth written, share of loads failed."""
        written = 0
        with target.open("wb") if rank in writers else nullcontext() as file:
            for half, order in zip(halves, (writers, writers[::-1]), strict=True):
                failed = ranks_in_file() == 0  # what counts is the second time: half is written
                dist.barrier()
                for writer in order:
                    if rank == writer:
                        written += file.write(half)
                        file.flush()
                        os.fsync(file.fileno())  # on the disk before the name changes
                    dist.barrier()
        return sum(of_all_ranks(written)) / len(payload), sum(of_all_ranks(failed)) / world_size

    copies, failed = save(path, list(range(world_size)))
    mixed = ranks_in_file()
    draft = path.with_suffix(".draft")  # same folder: a rename is atomic within one file system
    copies_cured, failed_cured = save(draft, [0])  # meanwhile the checkpoint before it is there
    if rank == 0:
        draft.replace(path)
    dist.barrier()
    mixed_cured = ranks_in_file()
    dist.barrier()
    if folder:
        folder.cleanup()
    return [
        Finding("files' worth of bytes written", copies, world_size, copies_cured, 1),
        Finding("share of loads that fail during the save", failed, 1, failed_cured, 0),
        Finding("ranks whose weights are in the file", mixed, 2, mixed_cured, 1),
    ]


class SumOverRanks(torch.autograd.Function):
    """All-reduce whose gradient is an all-reduce: each rank's sum feeds every rank's loss."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor) -> torch.Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return SumOverRanks.forward(ctx, gradient.contiguous())


class GlobalBatchNorm(nn.BatchNorm1d):
    """What nn.SyncBatchNorm does on GPUs: mean and variance of all ranks' rows. [rows, features]"""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        rows = torch.full_like(x[:1], len(x))
        count, total, squares = SumOverRanks.apply(
            torch.cat([rows, x.sum(0, keepdim=True), (x * x).sum(0, keepdim=True)])
        )
        mean = total / count
        variance = squares / count - mean**2  # loses digits where |mean| >> spread
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        return (x - mean) / (variance + self.eps).sqrt() * self.weight + self.bias


def batchnorm(args: argparse.Namespace, device: torch.device) -> list[Finding]:
    """BatchNorm sees its rank's rows only, and DDP hands on rank 0's running statistics."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    rows = 8  # of each rank
    torch.manual_seed(args.seed)
    batches = torch.randn(20, world_size * rows, 16, dtype=torch.double, device=device)
    targets = torch.randn(world_size * rows, 16, dtype=torch.double, device=device)

    def train(norm: nn.Module, share: slice, ddp: bool) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(args.seed)
        model = nn.Sequential(nn.Linear(16, 16), norm).to(device, torch.double)
        trained = DistributedDataParallel(model) if ddp else model
        for batch in batches:
            F.mse_loss(trained(batch[share]), targets[share]).backward()
        return norm.running_var, model[0].weight.grad

    reference = train(nn.BatchNorm1d(16), slice(None), ddp=False)  # one process, the whole batch
    share = slice(rank * rows, (rank + 1) * rows)
    by_rank = train(nn.BatchNorm1d(16), share, ddp=True)
    by_batch = train(GlobalBatchNorm(16), share, ddp=True)
    findings = []
    names = ("running variance", "gradient")
    for name, right, *trained in zip(names, reference, by_rank, by_batch, strict=True):
        errors = [((x - right).abs().max() / right.abs().max()).item() for x in trained]
        wrong, cured = (sum(of_all_ranks(error)) / world_size for error in errors)
        findings.append(Finding(f"{name}, mean error over ranks", wrong, 0.01, cured, 1e-9))
    return findings


def uneven(args: argparse.Namespace, device: torch.device) -> list[Finding]:
    """The last rank has one batch fewer: the others wait in an all-reduce that it never enters."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(args.seed)
    batches = torch.randn(4, world_size, 8, 16, dtype=torch.double, device=device)
    share = batches[: 4 - (rank == world_size - 1), rank, None]  # [steps, 1, rows, 16]
    # NCCL's watchdog ends the process at its timeout; gloo raises an error that can be caught.
    doomed = dist.new_group(backend="gloo")  # with the long timeout, for ranks that come late
    dist.barrier()
    _set_pg_timeout(timedelta(seconds=1), doomed)
    stuck = 0
    try:
        if len(share) == len(batches):
            dist.all_reduce(torch.ones(1), group=doomed)
    except RuntimeError:
        stuck = 1

    def train(model: nn.Module, steps: list[torch.Tensor], divisor: int) -> int:
        """One update for each of `steps`, each [ranks present, rows, 16]; returns how many."""
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for batch in steps:
            (model(batch).square().mean((1, 2)).sum() / divisor).backward()
            optimizer.step()
            optimizer.zero_grad()
        return len(steps)

    reference = nn.Linear(16, 1, bias=False, dtype=torch.double).to(device)
    ddp_model = DistributedDataParallel(deepcopy(reference))
    with Join([ddp_model]):  # a rank that is done takes part in the others' collectives
        trained = train(ddp_model, list(share), divisor=1)
    # Join divides by all the ranks to the end.
    train(reference, [*batches[:3], batches[3, :-1]], divisor=world_size)
    error = (ddp_model.module.weight - reference.weight).abs().max().item()
    stuck = sum(of_all_ranks(stuck))
    missed = 4 * world_size - 1 - sum(of_all_ranks(trained))
    return [
        Finding("batches that the others never finish", stuck, world_size - 1, missed, 0),
        Finding("weights under Join, against one process", None, 0, error, 1e-12),
    ]


def of_all_ranks(value: object) -> list:
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def run(args: argparse.Namespace, device: torch.device) -> list[bool | None]:
    world_size = dist.get_world_size()
    if world_size == 1:
        stop(f"needs two ranks: type  torchrun --nproc_per_node=2 {sys.argv[0]}")
    say(f"{world_size} ranks on {device.type}")
    names = [args.only] if args.only else PITFALLS
    found = [(name, finding) for name in names for finding in PITFALLS[name](args, device)]
    say(f"{'mistake':<11}{'symptom':<46}{'wrong':>9}{'cured':>10}")
    for name, finding in found:
        wrong = "-" if finding.wrong is None else f"{finding.wrong:.3g}"
        say(f"{name:<11}{finding.symptom:<46}{wrong:>9}{finding.cured:>10.2g}")
    hidden = [name for name, f in found if f.wrong is not None and not f.wrong >= f.shows]
    uncured = [name for name, f in found if not f.cured <= f.holds]
    return [
        check(" ".join(["mistakes that do not show", *hidden]), len(hidden), 0),
        check(" ".join(["cures that do not cure", *uncured]), len(uncured), 0),
    ]


PITFALLS = {f.__name__: f for f in (epochs, padding, seeds, metrics, saving, batchnorm, uneven)}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=PITFALLS, help="this mistake only; default: all")
    parser.add_argument("--seed", type=int, default=0, help="for data, weights and shuffling")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    return parser.parse_args()


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
