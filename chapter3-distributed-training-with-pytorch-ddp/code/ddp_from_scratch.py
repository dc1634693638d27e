"""DDP in a hundred lines: to the bit what torch's computes, and about as fast.

    torchrun --nproc_per_node=2 chapter3-distributed-training-with-pytorch-ddp/code/ddp_from_scratch.py
    torchrun --nproc_per_node=3 chapter3-distributed-training-with-pytorch-ddp/code/ddp_from_scratch.py --turns 0

On GPUs:
    torchrun --nproc_per_node=8 chapter3-distributed-training-with-pytorch-ddp/code/ddp_from_scratch.py --width 1024 --layers 12 --batch 256 --bucket-mib 25

Look at the first table: all buckets but the last leave while backward still works on gradients. Then
at the second: "one by one" is what you would write first, and "one bucket" overlaps nothing. Section 3.3.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch._dynamo  # before the group, or gloo's threads outlive it: section 3.8
import torch.distributed as dist
from torch import nn
from torch.autograd import Variable
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel

METHODS = ("torch's DDP", "ours", "ours, one bucket", "one by one", "no all-reduce")


class Bucket:
    """Gradients that travel together: one flat buffer, and a view of it for each."""

    def __init__(self, parameters: list[nn.Parameter]):
        sizes = [p.numel() for p in parameters]
        self.flat = parameters[0].new_zeros(sum(sizes))
        parts = zip(parameters, self.flat.split(sizes), strict=True)
        self.views = {p: part.as_strided(p.shape, p.stride()) for p, part in parts}
        self.missing = len(parameters)


class DDP(nn.Module):
    """Data parallelism in the manner of torch's (Li et al. 2020, arXiv:2006.15704, section 3.2).

    Each backward pass must reach every parameter, or it ends in a RuntimeError that names the rest.
    """

    def __init__(self, module: nn.Module, bucket_bytes: int = 25 * 2**20):
        super().__init__()
        self.module = module
        self.bucket_bytes = bucket_bytes
        self.require_sync = True
        self.regrouped = False
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.detach(), src=0)
        self.trained = [p for p in module.parameters() if p.requires_grad]
        if len({(p.dtype, p.device) for p in self.trained}) != 1:
            raise ValueError("the parameters must have one dtype and be on one device")
        for p in self.trained:
            p.register_post_accumulate_grad_hook(self.on_gradient)
        self.group(self.trained[::-1])  # a first guess: backward comes to the last layer first
        self.begin()

    def group(self, order: list[nn.Parameter]) -> None:
        """Fill buckets in this order; a bucket is full once it has reached its size."""
        self.buckets = []
        waiting = []
        for p in order:
            waiting.append(p)
            if sum(q.nbytes for q in waiting) >= self.bucket_bytes or p is order[-1]:
                self.buckets.append(Bucket(waiting))
                waiting = []
        self.bucket_of = {p: bucket for bucket in self.buckets for p in bucket.views}

    def begin(self) -> None:
        """Forget the backward pass before."""
        self.arrived = []
        self.works = []
        for bucket in self.buckets:
            bucket.missing = len(bucket.views)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients of a forward pass in here add up on this rank, and nothing is sent."""
        before = self.require_sync
        self.require_sync = False
        try:
            yield
        finally:
            self.require_sync = before

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.syncs = self.require_sync  # read here, not in backward: torch does so too
        return self.module(*args, **kwargs)

    def on_gradient(self, p: nn.Parameter) -> None:
        """Autograd calls this when p.grad is complete, then goes on with the layers before."""
        if not self.syncs:
            return
        if not self.arrived:
            Variable._execution_engine.queue_callback(self.finish)
        self.arrived.append(p)
        bucket = self.bucket_of[p]
        p.grad = torch.mul(p.grad, 1 / dist.get_world_size(), out=bucket.views[p])
        bucket.missing -= 1
        # In order, whichever is full first: each rank's next all-reduce must be the same one.
        while len(self.works) < len(self.buckets) and not self.buckets[len(self.works)].missing:
            self.launch()

    def launch(self) -> None:
        """Start the all-reduce of the next bucket, and do not wait for it."""
        bucket = self.buckets[len(self.works)]
        self.works.append(dist.all_reduce(bucket.flat, async_op=True))

    def finish(self) -> None:
        """Autograd calls this at the end of backward."""
        unused = self.bucket_of.keys() - set(self.arrived)
        for p in unused:
            self.bucket_of[p].views[p].zero_()
        while len(self.works) < len(self.buckets):
            self.launch()  # the other ranks wait for it, gradients or not
        for work in self.works:
            work.wait()
        if not self.regrouped:
            self.regroup([*self.arrived, *unused])
        self.begin()
        if unused:
            names = [name for name, p in self.module.named_parameters() if p in unused]
            raise RuntimeError(f"backward left no gradient in {', '.join(names)}")

    def regroup(self, arrived: list[nn.Parameter]) -> None:
        """Once, after the first backward: buckets in the order of the gradients on rank 0."""
        number = {p: i for i, p in enumerate(self.trained)}
        order = torch.tensor([number[p] for p in arrived], device=arrived[0].device)
        dist.broadcast(order, src=0)
        old = self.bucket_of
        self.regrouped = True
        self.group([self.trained[i] for i in order.tolist()])
        for p, bucket in self.bucket_of.items():
            p.grad = bucket.views[p].copy_(old[p].views[p])


class Observed(DDP):
    """Notes how many gradients there were at each launch."""

    def launch(self) -> None:
        self.noted.append(len(self.arrived))
        super().launch()


def build(args: argparse.Namespace, device: torch.device) -> nn.Sequential:
    """Transformer layers, [batch, seq, width] to the same; each rank draws other weights."""
    torch.manual_seed(args.seed * 1_000_003 + dist.get_rank())
    sizes = (args.width, 4, 4 * args.width, 0.0)  # model, heads, feed-forward, dropout
    options = {"batch_first": True, "norm_first": True}
    layers = (nn.TransformerEncoderLayer(*sizes, **options) for _ in range(args.layers))
    return nn.Sequential(*layers).to(device)


def backward(model: nn.Module, batch: torch.Tensor) -> None:
    """Gradients of a mean over the batch: at once in one process, in two parts on each rank."""
    if not hasattr(model, "no_sync"):
        model(batch).square().mean().backward()
        return
    n = dist.get_world_size()  # DDP divides by it; shares differ in size, so the loss is a sum
    share = batch.tensor_split(n)[dist.get_rank()]
    with model.no_sync():
        (model(share[:1]).square().sum() * n / batch.numel()).backward()
    (model(share[1:]).square().sum() * n / batch.numel()).backward()


def compare(ours: Observed, reference: nn.Module, args: argparse.Namespace) -> list[float]:
    """Train both. How far apart are the gradients of each step, and at the end the weights?"""
    models = (ours, reference)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in models]
    draw = torch.Generator().manual_seed(args.seed)  # the same on all ranks
    differences = []
    for step in range(4):
        batch = torch.randn(args.batch + 1, 32, args.width, generator=draw)  # + 1: uneven shares
        ours.noted = []
        for model in models:
            if dist.get_rank() == 0:
                time.sleep(0.01)  # late, so that the others cannot read sums without waiting
            backward(model, batch.to(next(ours.parameters())))
        differences.append(difference(flat(ours, "grad"), flat(reference, "grad")))
        for optimizer in optimizers:
            if step > 0:  # torch has all of its first gradients in one bucket, and rounds otherwise
                optimizer.step()
            optimizer.zero_grad()
    return [*differences, difference(flat(ours, "data"), flat(reference, "data"))]


def flat(model: nn.Module, what: str) -> torch.Tensor:
    """A copy of all gradients ("grad") or all weights ("data")."""
    return torch.cat([getattr(p, what).flatten() for p in model.parameters()])


def difference(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest, relative to the reference's largest element."""
    return ((ours - reference).abs().max() / reference.abs().max()).item()


def race(args: argparse.Namespace, device: torch.device) -> torch.Tensor:
    """Seconds of forward and backward on the slowest rank, by turn and method: [turns, 5]."""
    world_size = dist.get_world_size()
    plain = build(args, device)
    options = {"bucket_cap_mb": args.bucket_mib, "gradient_as_bucket_view": True}
    torch_ddp = DistributedDataParallel(deepcopy(plain), **options)
    ours = DDP(deepcopy(plain), int(args.bucket_mib * 2**20))
    one_bucket = DDP(deepcopy(plain), sys.maxsize)
    models = (torch_ddp, ours, one_bucket, plain, plain)
    share = torch.randn(-(-args.batch // world_size), 32, args.width, device=device)
    seconds = torch.zeros(args.turns, len(METHODS), device=device)
    for turn in seconds:
        for i, (method, model) in enumerate(zip(METHODS, models, strict=True)):
            model.zero_grad()
            dist.barrier()
            start = time.perf_counter()
            model(share).square().mean().backward()
            if method == "one by one":
                for p in model.parameters():
                    dist.all_reduce(p.grad.div_(world_size))
            synchronize(device)
            turn[i] = time.perf_counter() - start
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return seconds.cpu()


def run(args: argparse.Namespace, device: torch.device) -> list[bool | None]:
    world_size = dist.get_world_size()
    size = int(args.bucket_mib * 2**20)
    torch.backends.cuda.enable_mem_efficient_sdp(False)  # it adds in another order each time
    torch_ddp = DistributedDataParallel(build(args, device), bucket_cap_mb=args.bucket_mib)
    ours = Observed(build(args, device), size)
    _, *from_torch = compare(ours, torch_ddp, args)
    double = Observed(build(args, device).double(), size)
    from_one_process = compare(double, deepcopy(double.module), args)

    total = len(ours.trained)
    mib = sum(p.nbytes for p in ours.trained) / 2**20
    ranks = f"{world_size} rank{'s' * (world_size > 1)} on {device.type}"
    say(f"{ranks}: {total} gradients, {mib:.1f} MiB")
    say(f"{'bucket':>6}{'MiB':>7}{'gradients':>11}   its all-reduce starts when")
    for i, (bucket, there) in enumerate(zip(ours.buckets, ours.noted, strict=False)):
        row = f"{i:>6}{bucket.flat.nbytes / 2**20:>7.2f}{len(bucket.views):>11}"
        say(f"{row}   {there} of {total} gradients are there")
    early = sum(there < total for there in ours.noted)
    buckets = len(ours.buckets)
    claims = [
        check("gradients and weights, max |ours - torch's DDP|", max(from_torch), 0),
        check("in float64, max |ours - one process|", max(from_one_process), 1e-12),
        check("buckets that leave before the last gradient", early, buckets - 1, at_least=True),
        check("all-reduces per bucket, for two micro-batches", len(ours.noted) / buckets, 1),
    ]
    if not args.turns:
        return claims

    seconds = race(args, device)
    fastest = seconds.min(0).values
    quartiles = 1e3 * seconds.quantile(torch.tensor([0.25, 0.5, 0.75]), 0).T
    say(f"ms of {args.turns} turns        fastest  quartiles   median  fastest over torch's")
    for name, least, (low, median, high) in zip(METHODS, fastest, quartiles, strict=True):
        row = f"{name:<18}{1e3 * least:>8.1f}{low:>7.1f}-{high:<5.1f}{median:>6.1f}"
        say(f"{row}{least / fastest[0]:>10.2f}")
    if args.json and dist.get_rank() == 0:
        result = dict(zip(METHODS, seconds.T.tolist(), strict=True))
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    ratio = (fastest[1] / fastest[0]).item()
    return [*claims, expect("our fastest step over torch's", ratio, 1.1, args.strict)]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=16, help="sequences per step, all ranks")
    parser.add_argument("--width", type=int, default=128, help="of a layer; a multiple of 4")
    parser.add_argument("--layers", type=int, default=4, help="transformer layers")
    parser.add_argument("--bucket-mib", type=float, default=0.5, help="MiB that make one full")
    parser.add_argument("--turns", type=int, default=12, help="timed steps per method; 0: none")
    parser.add_argument("--seed", type=int, default=0, help="for weights and batches")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--json", type=Path, help="also write the seconds to this file")
    parser.add_argument(
        "--strict", action="store_true", help="exit 1 if an `expect:` line does not hold"
    )
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


# Copied from ch01_single_gpu_baseline.synchronize
def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


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


# Copied from ch01_single_gpu_baseline.expect
def expect(
    claim: str, value: float, bound: float, strict: bool, at_least: bool = False
) -> bool | None:
    """Print whether a value that depends on the machine keeps its bound; judge it if `strict`."""
    held = bool(value >= bound if at_least else value <= bound)
    verdict = "ok" if held else "not here"
    say(f"expect: {claim} = {value:.3g} {'>=' if at_least else '<='} {bound:.3g}  {verdict}")
    return held if strict else None


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
