"""Seven mistakes of data-parallel training: each made on purpose, measured and cured.

    torchrun --nproc_per_node=2 chapter1-introduction-to-modern-distributed-ai/code/ch01_ddp_pitfalls.py
    torchrun --nproc_per_node=3 chapter1-introduction-to-modern-distributed-ai/code/ch01_ddp_pitfalls.py --only uneven

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

import torch
import torch._dynamo  # DDP's; before there is a group: section 3.8
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.distributed.distributed_c10d import _set_pg_timeout
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
    first, forgotten = list(batches), list(batches)
    sampler.set_epoch(1)
    told = list(batches)
    wrong, cured = (
        sum(batch in first for batch in later) / len(first) for later in (forgotten, told)
    )
    return [Finding("share of epoch 0's batches back in epoch 1", wrong, 1, cured, 0)]


def padding(args: argparse.Namespace, device: torch.device) -> list[Finding]:
    """DistributedSampler repeats samples until the ranks have equally many; a stride does not."""
    rank, n = dist.get_rank(), dist.get_world_size()
    dataset = range(10 * n + 1)
    padded, strided = list(DistributedSampler(dataset, shuffle=False)), dataset[rank::n]
    wrong, cured = (sum(of_all_ranks(len(x))) - len(dataset) for x in (padded, strided))
    return [Finding("samples that an evaluation counts twice", wrong, n - 1, cured, 0)]


def seeds(args: argparse.Namespace, device: torch.device) -> list[Finding]:
    """Seeded alike, ranks drop the same units; seeded apart too soon, they start apart."""

    def start(first_seed: int, later_seed: int) -> tuple[float, float]:
        torch.manual_seed(first_seed)
        weights = torch.stack(of_all_ranks(nn.Linear(64, 64).weight.detach()))
        torch.manual_seed(later_seed)
        kept = torch.stack(of_all_ranks(F.dropout(torch.ones(100, 64), 0.1) > 0))
        equal = (kept[1:] == kept[0]).all(2).double().mean()  # [ranks - 1, masks, units]
        return equal.item(), (weights[1:] - weights[0]).abs().max().item()

    own = args.seed + dist.get_rank()
    alike, apart, cured = start(args.seed, args.seed), start(own, own), start(args.seed, own)
    return [
        Finding("share of dropout masks equal to rank 0's", alike[0], 1, cured[0], 0),
        Finding("first weights apart (no DDP to broadcast)", apart[1], 0.01, cured[1], 0),
    ]


def metrics(args: argparse.Namespace, device: torch.device) -> list[Finding]:
    """Accuracy over a test set sorted from easy to hard, cut into shards of 1 : 2 : ... : n."""
    rank, n = dist.get_rank(), dist.get_world_size()
    draw = torch.Generator().manual_seed(args.seed)
    right = torch.rand(2000, generator=draw) < torch.linspace(0.95, 0.35, 2000)  # answers
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
    rank, n = dist.get_rank(), dist.get_world_size()
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
        return sum(of_all_ranks(written)) / len(payload), sum(of_all_ranks(failed)) / n

    copies, failed = save(path, list(range(n)))
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
        Finding("files' worth of bytes written", copies, n, copies_cured, 1),
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
    rank, n, rows = dist.get_rank(), dist.get_world_size(), 8
    torch.manual_seed(args.seed)
    batches = torch.randn(20, n * rows, 16, dtype=torch.double, device=device)
    targets = torch.randn(n * rows, 16, dtype=torch.double, device=device)

    def train(norm: nn.Module, share: slice, ranks: bool) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(args.seed)
        model = nn.Sequential(nn.Linear(16, 16), norm).to(device, torch.double)
        wrapped = DistributedDataParallel(model) if ranks else model
        for batch in batches:
            F.mse_loss(wrapped(batch[share]), targets[share]).backward()
        return norm.running_var, model[0].weight.grad

    alone = train(nn.BatchNorm1d(16), slice(None), ranks=False)  # one process, the whole batch
    share = slice(rank * rows, (rank + 1) * rows)
    each = train(nn.BatchNorm1d(16), share, ranks=True)
    together = train(GlobalBatchNorm(16), share, ranks=True)
    findings = []
    names = ("running variance", "gradient")
    for name, right, *trained in zip(names, alone, each, together, strict=True):
        errors = [((x - right).abs().max() / right.abs().max()).item() for x in trained]
        wrong, cured = (sum(of_all_ranks(error)) / n for error in errors)
        findings.append(Finding(f"{name}, mean error over ranks", wrong, 0.01, cured, 1e-9))
    return findings


def uneven(args: argparse.Namespace, device: torch.device) -> list[Finding]:
    """The last rank has one batch fewer: the others wait in an all-reduce that it never enters."""
    rank, n = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(args.seed)
    batches = torch.randn(4, n, 8, 16, dtype=torch.double, device=device)  # [step, rank, rows, 16]
    mine = batches[: 4 - (rank == n - 1), rank, None]
    # NCCL's watchdog ends the process at its timeout; gloo raises an error that can be caught.
    doomed = dist.new_group(backend="gloo")  # with the long timeout, for ranks that come late
    dist.barrier()
    _set_pg_timeout(timedelta(seconds=1), doomed)
    stuck = 0
    try:
        if len(mine) == len(batches):
            dist.all_reduce(torch.ones(1), group=doomed)
    except RuntimeError:
        stuck = 1

    def train(model: nn.Module, steps: list[torch.Tensor], ranks: int) -> int:
        """One update for each of `steps`, each [ranks present, rows, 16]; returns how many."""
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for batch in steps:
            (model(batch).square().mean((1, 2)).sum() / ranks).backward()
            optimizer.step()
            optimizer.zero_grad()
        return len(steps)

    model = nn.Linear(16, 1, bias=False, dtype=torch.double).to(device)
    alone, wrapped = deepcopy(model), DistributedDataParallel(model)
    with Join([wrapped]):  # a rank that is done takes part in the others' collectives
        trained = train(wrapped, list(mine), ranks=1)
    train(alone, [*batches[:3], batches[3, :-1]], ranks=n)  # Join divides by n to the end
    off = (model.weight - alone.weight).abs().max().item()
    missed = 4 * n - 1 - sum(of_all_ranks(trained))
    return [
        Finding("batches that the others never finish", sum(of_all_ranks(stuck)), n - 1, missed, 0),
        Finding("weights under Join, against one process", None, 0, off, 1e-12),
    ]


def of_all_ranks(value: object) -> list:
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def run(args: argparse.Namespace, device: torch.device) -> bool:
    n = dist.get_world_size()
    if n == 1:
        stop(f"needs two ranks: type  torchrun --nproc_per_node=2 {sys.argv[0]}")
    say(f"{n} ranks on {device.type}")
    names = [args.only] if args.only else PITFALLS
    found = [(name, finding) for name in names for finding in PITFALLS[name](args, device)]
    say(f"{'mistake':<11}{'symptom':<46}{'wrong':>9}{'cured':>10}")
    for name, finding in found:
        wrong = "-" if finding.wrong is None else f"{finding.wrong:.3g}"
        say(f"{name:<11}{finding.symptom:<46}{wrong:>9}{finding.cured:>10.2g}")
    held = []
    for name, finding in found:
        if finding.wrong is not None:
            claim = f"{name}, wrong: {finding.symptom}"
            held.append(check(claim, finding.wrong, finding.shows, at_least=True))
        held.append(check(f"{name}, cured: {finding.symptom}", finding.cured, finding.holds))
    return all(held)


def check(claim: str, value: float, bound: float, at_least: bool = False) -> bool:
    """Print whether the worst rank keeps `value` within `bound`; every rank gets the same answer."""
    worst = min(of_all_ranks(value)) if at_least else max(of_all_ranks(value))
    held = worst >= bound if at_least else worst <= bound
    sign, verdict = ">=" if at_least else "<=", "ok" if held else "FAILED"
    say(f"check: {claim} = {worst:.3g} {sign} {bound:.3g}  {verdict}")
    return held


def say(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)


def join_group(wanted: str) -> torch.device:
    """Join the process group; return this rank's device: its own GPU where each rank has one."""
    if "RANK" not in os.environ:
        stop(f"no launcher: type  torchrun --nproc_per_node=2 {sys.argv[0]}")
    local_rank, ranks_here = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    devices = 0 if device.type in ("cpu", "mps") else torch.accelerator.device_count()
    if wanted not in ("auto", "cpu") and (wanted != device.type or devices < ranks_here):
        stop(f"{ranks_here} ranks, but {devices} {wanted} devices: type --device cpu")
    if wanted == "cpu" or devices < ranks_here:
        if devices and wanted == "auto" and local_rank == 0:
            print(f"{ranks_here} ranks, but {devices} GPUs: running on the CPU", file=sys.stderr)
        device = torch.device("cpu")
    else:
        torch.accelerator.set_device_index(local_rank)
    dist.init_process_group("gloo" if device.type == "cpu" else None)  # None: PyTorch chooses
    return device


def stop(message: str) -> None:
    sys.stderr.write(message + "\n")  # in one piece: other ranks write too
    sys.exit(2)


PITFALLS = {f.__name__: f for f in (epochs, padding, seeds, metrics, saving, batchnorm, uneven)}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: stop(f"{message}: --help lists the flags")
    parser.add_argument("--only", choices=PITFALLS, help="this mistake only; default: all")
    parser.add_argument("--seed", type=int, default=0, help="for data, weights and shuffling")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    device = join_group(args.device)
    try:
        held = run(args, device)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    sys.exit(not held)


if __name__ == "__main__":
    main()
