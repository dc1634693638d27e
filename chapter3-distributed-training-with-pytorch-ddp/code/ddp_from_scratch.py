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
from typing import Any

import torch
import torch._dynamo  # DDP's; before there is a group: section 3.8
import torch.distributed as dist
from torch import nn
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel

ALLOWED = 1.1  # our time per step over that of torch's DDP
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
        self.module, self.bucket_bytes = module, bucket_bytes
        self.require_sync, self.regrouped = True, False
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
        self.buckets, waiting = [], []
        for p in order:
            waiting.append(p)
            if sum(q.nbytes for q in waiting) >= self.bucket_bytes or p is order[-1]:
                self.buckets.append(Bucket(waiting))
                waiting = []
        self.bucket_of = {p: bucket for bucket in self.buckets for p in bucket.views}

    def begin(self) -> None:
        """Forget the backward pass before."""
        self.arrived, self.works = [], []
        for bucket in self.buckets:
            bucket.missing = len(bucket.views)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients of a forward pass in here add up on this rank, and nothing is sent."""
        before, self.require_sync = self.require_sync, False
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
        old, self.regrouped = self.bucket_of, True
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
        return model(batch).square().mean().backward()
    n = dist.get_world_size()  # DDP divides by it; shares differ in size, so the loss is a sum
    share = batch.tensor_split(n)[dist.get_rank()]
    with model.no_sync():
        (model(share[:1]).square().sum() * n / batch.numel()).backward()
    (model(share[1:]).square().sum() * n / batch.numel()).backward()


def compare(ours: Observed, other: nn.Module, args: argparse.Namespace) -> tuple[float, ...]:
    """Train both; how far apart are the first gradients, any later ones, and the last weights?"""
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (ours, other)]
    draw, off = torch.Generator().manual_seed(args.seed), []  # the same on all ranks
    for step in range(args.steps + 1):
        batch = torch.randn(args.batch + 1, 32, args.width, generator=draw)  # + 1: uneven shares
        ours.noted, gradients = [], []
        for model in (ours, other):
            if dist.get_rank() == 0:
                time.sleep(0.01)  # late, so that the others cannot read sums without waiting
            backward(model, batch.to(next(ours.parameters())))
            gradients.append(flat(model, "grad"))
        off.append(apart(*gradients))
        for optimizer in optimizers:
            if step > 0:  # torch has all of its first gradients in one bucket, and rounds otherwise
                optimizer.step()
            optimizer.zero_grad()
    return off[0], max(off[1:]), apart(flat(ours, "data"), flat(other, "data"))


def flat(model: nn.Module, what: str) -> torch.Tensor:
    """A copy of all gradients ("grad") or all weights ("data")."""
    return torch.cat([getattr(p, what).flatten() for p in model.parameters()])


def apart(mine: torch.Tensor, other: torch.Tensor) -> float:
    difference = (mine - other).abs().max() / other.abs().max()
    return difference.item()


def unnamed(args: argparse.Namespace, device: torch.device) -> bool:
    """Whether the error about a parameter that the loss has no use for fails to name it."""
    model = build(args, device)
    model.register_parameter("idle", nn.Parameter(torch.zeros(3, device=device)))
    try:
        DDP(model)(torch.ones(1, 32, args.width, device=device)).sum().backward()
    except RuntimeError as error:
        say(f"with an unused parameter: RuntimeError: {error}")
        return "idle" not in str(error)
    return True


def race(args: argparse.Namespace, device: torch.device) -> torch.Tensor:
    """Seconds of forward and backward on the slowest rank, by turn and method: [turns, 5]."""
    n, alone, turns = dist.get_world_size(), build(args, device), []
    options = {"bucket_cap_mb": args.bucket_mib, "gradient_as_bucket_view": True}
    torchs = DistributedDataParallel(deepcopy(alone), **options)
    ours = DDP(deepcopy(alone), int(args.bucket_mib * 2**20))
    models = (torchs, ours, DDP(deepcopy(alone), sys.maxsize), alone, alone)
    share = torch.randn(-(-args.batch // n), 32, args.width, device=device)
    # Wait for a quiet moment, though not for ever: code that is slow is slow then too.
    while len(turns) < args.turns or (ratio(turns) > ALLOWED and len(turns) < 6 * args.turns):
        times = []
        for method, model in zip(METHODS, models, strict=True):
            model.zero_grad()
            dist.barrier()
            start = time.perf_counter()
            model(share).square().mean().backward()
            for p in model.parameters() if method == "one by one" else ():
                dist.all_reduce(p.grad.div_(n))
            if device.type != "cpu":
                torch.accelerator.synchronize()
            times.append(time.perf_counter() - start)
        turns.append(torch.tensor(times, device=device))
        dist.all_reduce(turns[-1], op=dist.ReduceOp.MAX)
    return torch.stack(turns).cpu()


def ratio(turns: list[torch.Tensor]) -> float:
    """Our time over torch's: of the fastest steps, or the median over the turns if that is less."""
    torchs, ours = torch.stack(turns)[:, :2].T
    return min(ours.min() / torchs.min(), (ours / torchs).median()).item()


def run(args: argparse.Namespace, device: torch.device) -> bool:
    n, size = dist.get_world_size(), int(args.bucket_mib * 2**20)
    if args.batch + 1 < 2 * n:
        stop(f"--batch {args.batch} is too small for {n} ranks: type --batch {2 * n - 1} or more")
    torch.backends.cuda.enable_mem_efficient_sdp(
        False
    )  # it adds in any order: other bits each time
    torchs = DistributedDataParallel(build(args, device), bucket_cap_mb=args.bucket_mib)
    ours, exact = Observed(build(args, device), size), Observed(build(args, device).double(), size)
    first, gradients, weights = compare(ours, torchs, args)
    errors = compare(exact, deepcopy(exact.module), args)

    total, mib = len(ours.trained), sum(p.nbytes for p in ours.trained) / 2**20
    say(f"{n} rank{'s' * (n > 1)} on {device.type}: {total} gradients, {mib:.1f} MiB")
    say(f"{'bucket':>6}{'MiB':>7}{'gradients':>11}   its all-reduce starts when")
    for i, (bucket, had) in enumerate(zip(ours.buckets, ours.noted, strict=False)):
        row = f"{i:>6}{bucket.flat.nbytes / 2**20:>7.2f}{len(bucket.views):>11}"
        say(f"{row}   {had} of {total} gradients are there")
    say(f"in the first backward, where torch has one bucket: gradients off torch's by {first:.2g}")
    early, buckets = sum(had < total for had in ours.noted), len(ours.buckets)
    claims = [
        check("gradients, off torch's", gradients, 0),
        check("weights, off torch's", weights, 0),
        check("float64 gradients, off one process's", max(errors[:2]), 1e-12),
        check("float64 weights, off one process's", errors[2], 1e-12),
        check("buckets that leave before the last gradient", early, buckets - 1, at_least=True),
        check("all-reduces per bucket, for two micro-batches", len(ours.noted) / buckets, 1),
        check("unused parameters that the error does not name", unnamed(args, device), 0),
    ]
    if args.turns:
        seconds = race(args, device)
        milliseconds = 1e3 * seconds.quantile(torch.tensor([0, 0.25, 0.5, 0.75]), 0).T
        over = (seconds / seconds[:, :1]).median(0).values
        say(
            f"ms of {len(seconds):>2} turns      fastest  quartiles   median  over torch's, by turn"
        )
        for name, (least, low, middle, high), x in zip(METHODS, milliseconds, over, strict=True):
            say(f"{name:<18}{least:>8.1f}{low:>7.1f}-{high:<5.1f}{middle:>6.1f}{x:>10.2f}")
        claims.append(check("our time over torch's", ratio(list(seconds)), ALLOWED))
        if args.json and dist.get_rank() == 0:
            record = dict(zip(METHODS, seconds.T.tolist(), strict=True))
            args.json.write_text(json.dumps(record, indent=1) + "\n")
    return all(claims)


def check(claim: str, value: float, bound: float, at_least: bool = False) -> bool:
    """Print whether the worst rank keeps `value` within `bound`; every rank gets the same answer."""
    values = [0.0] * dist.get_world_size()
    dist.all_gather_object(values, value)
    worst = min(values) if at_least else max(values)
    held = all(v >= bound if at_least else v <= bound for v in values)  # false for NaN
    sign, verdict = ">=" if at_least else "<=", "ok" if held else "FAILED"
    say(f"check: {claim} = {worst:.3g} {sign} {bound:.3g}  {verdict}")
    return held


def say(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)


def join_group(wanted: str) -> torch.device:
    """Join the process group; return this rank's device: its own GPU where each rank has one."""
    if "LOCAL_WORLD_SIZE" not in os.environ:
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
        device = torch.device(device.type, local_rank)
    backend, bound = ("gloo", None) if device.type == "cpu" else (None, device)  # None: PyTorch's
    dist.init_process_group(backend, device_id=bound)
    dist.barrier()  # all are here, before one may leave for what it is given
    return device


def stop(message: str) -> None:
    sys.stderr.write(message + "\n")  # in one piece: other ranks write too
    sys.exit(2)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: stop(f"{message}: --help lists the flags")
    parser.add_argument("--batch", type=positive, default=16, help="sequences per step, all ranks")
    parser.add_argument("--width", type=positive, default=128, help="of a layer; a multiple of 4")
    parser.add_argument("--layers", type=positive, default=4, help="transformer layers")
    parser.add_argument("--bucket-mib", type=float, default=0.5, help="MiB that make one full")
    parser.add_argument("--steps", type=positive, default=3, help="updates that are compared")
    parser.add_argument("--turns", type=int, default=8, help="timed steps per method; 0: none")
    parser.add_argument("--seed", type=int, default=0, help="for weights and batches")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--json", type=Path, help="also write the seconds to this file")
    args = parser.parse_args()
    if args.width % 4:
        stop(f"--width {args.width} is no multiple of 4")
    if not 0 < args.bucket_mib < 2**20 or args.turns < 0:
        stop("--bucket-mib must be above 0, and --turns not below it")
    if args.json and not args.json.parent.is_dir():
        stop(f"--json {args.json}: there is no folder {args.json.parent}")
    return args


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
