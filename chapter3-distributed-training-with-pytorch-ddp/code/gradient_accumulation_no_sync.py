"""Gradient accumulation: what no_sync saves, where it must stand, and what to divide by.

    torchrun --nproc_per_node=2 chapter3-distributed-training-with-pytorch-ddp/code/gradient_accumulation_no_sync.py
    torchrun --nproc_per_node=3 chapter3-distributed-training-with-pytorch-ddp/code/gradient_accumulation_no_sync.py --micro-batches 6 --turns 0

On GPUs:
    torchrun --nproc_per_node=8 chapter3-distributed-training-with-pytorch-ddp/code/gradient_accumulation_no_sync.py --width 8192 --layers 8 --bucket-mib 25

The first two rows have the same gradient, at k times the bytes or once. Of the three mistakes below
them, one costs the savings and two the gradient. Section 3.5.
"""

import argparse
import json
import os
import socket
import struct
import sys
import time
from pathlib import Path

import torch
import torch._dynamo  # DDP's; before there is a group: section 3.8
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

CONTEXT = 8  # bytes that predict the next one
Share = list[tuple[torch.Tensor, float]]  # micro-batches [tokens, CONTEXT + 1], each with a weight


def weighted_loss(model: nn.Module, windows: torch.Tensor, weight: float) -> torch.Tensor:
    return weight * F.cross_entropy(model(windows[:, :-1]), windows[:, -1], reduction="sum")


def every_time(model: DistributedDataParallel, share: Share) -> None:
    """Right, for a sum of averages is the average of the sums; and k times the bytes."""
    for micro_batch in share:
        weighted_loss(model, *micro_batch).backward()


def last_only(model: DistributedDataParallel, share: Share) -> None:
    """All but the last micro-batch in no_sync, forward and backward."""
    *early, last = share
    with model.no_sync():
        for micro_batch in early:
            weighted_loss(model, *micro_batch).backward()
    weighted_loss(model, *last).backward()


def backward_only(model: DistributedDataParallel, share: Share) -> None:
    """Too late: it is in forward that DDP looks whether it is to synchronize."""
    *early, last = share
    for micro_batch in early:
        loss = weighted_loss(model, *micro_batch)
        with model.no_sync():
            loss.backward()
    weighted_loss(model, *last).backward()


def last_inside(model: DistributedDataParallel, share: Share) -> None:
    """No rank ever hears of the others, and no error says so."""
    with model.no_sync():
        every_time(model, share)


def cut(documents: list[torch.Tensor], k: int) -> tuple[Share, Share]:
    """This rank's k micro-batches: weighted by the tokens of all ranks, and as loss.mean() / k."""
    n, mine = dist.get_world_size(), documents[dist.get_rank() :: dist.get_world_size()]
    micro_batches = [torch.cat(mine[i::k]) for i in range(k)]
    tokens = torch.tensor(sum(map(len, micro_batches)), device=mine[0].device)
    dist.all_reduce(tokens)  # a rank knows only its own
    right = [(windows, n / tokens.item()) for windows in micro_batches]  # DDP divides by n
    return right, [(windows, 1 / len(windows) / k) for windows in micro_batches]


class Traffic(TorchDispatchMode):
    """Counts this process's all-reduces, also those that DDP starts from C++."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += operator.name() == "c10d::allreduce_"
        return operator(*args, **(kwargs or {}))


def bytes_on_wire() -> int:
    """Bytes that Linux has sent, each once, over this process's TCP connections."""
    total = 0
    if sys.platform != "linux":
        return total
    for link in Path("/proc/self/fd").iterdir():
        if link.is_socket():
            with socket.socket(fileno=os.dup(int(link.name))) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6):
                    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 216)
                    sent, again = struct.unpack_from(
                        "2Q", info, 200
                    )  # struct tcp_info, linux/tcp.h
                    total += sent - again
    return total


def buckets(model: nn.Module, mib: float) -> int:
    """How many of DDP's buckets there should be: the last layer's gradients fill the first."""
    count = size = 0
    for p in reversed(list(model.parameters())):
        size += p.nbytes
        if size >= mib * 2**20:
            count, size = count + 1, 0
    return count + (size > 0)


def build(args: argparse.Namespace, device: torch.device) -> nn.Sequential:
    """Scores the next byte: [tokens, CONTEXT] -> [tokens, 256]."""
    torch.manual_seed(args.seed)
    width, hidden = args.width, []
    for _ in range(args.layers):
        hidden += [nn.Linear(width, width), nn.GELU()]
    enter = (nn.Embedding(256, 16), nn.Flatten(), nn.Linear(16 * CONTEXT, width), nn.GELU())
    return nn.Sequential(*enter, *hidden, nn.Linear(width, 256)).to(device)


def read_documents(args: argparse.Namespace, device: torch.device) -> list[torch.Tensor]:
    """Paragraphs, each as its windows [bytes, CONTEXT + 1]: as many tokens as it has bytes."""
    try:
        paragraphs = [p[: args.longest] for p in args.data.read_bytes().split(b"\n\n") if p]
    except OSError as error:
        stop(f"cannot read {args.data} ({error.strerror}): give a text file with --data FILE")
    wanted = args.documents * args.micro_batches * dist.get_world_size() + 1  # + 1: uneven shares
    if len(paragraphs) < wanted:
        stop(f"{args.data} has {len(paragraphs)} paragraphs of {wanted}: give a longer --data FILE")
    draw = torch.Generator().manual_seed(args.seed)
    chosen = torch.randperm(len(paragraphs), generator=draw)[:wanted].tolist()
    tokens = (torch.tensor(list(paragraphs[i]), device=device) for i in chosen)
    return [F.pad(t, (CONTEXT, 0)).unfold(0, CONTEXT + 1, 1) for t in tokens]


def race(model: DistributedDataParallel, share: Share, turns: int) -> torch.Tensor:
    """Seconds of a step on the slowest rank: [turns, 3], every_time, last_only and last_inside."""
    seconds = []
    while len(seconds) < turns or (ratio(seconds) > 1 and len(seconds) < 6 * turns):
        times = []
        for method in (every_time, last_only, last_inside):
            model.zero_grad()
            dist.barrier()
            start = time.perf_counter()
            method(model, share)
            if model.device.type != "cpu":
                torch.accelerator.synchronize()
            times.append(time.perf_counter() - start)
        seconds.append(torch.tensor(times, device=model.device))
        dist.all_reduce(seconds[-1], op=dist.ReduceOp.MAX)
    return torch.stack(seconds).cpu()


def ratio(seconds: list[torch.Tensor]) -> float:
    """last_only over every_time: of the fastest, or the median over the turns if that is less."""
    every, last = torch.stack(seconds)[:, :2].T
    return min(last.min() / every.min(), (last / every).median()).item()


def run(args: argparse.Namespace, device: torch.device) -> bool:
    n, k, documents = dist.get_world_size(), args.micro_batches, read_documents(args, device)
    right, means = cut(documents, k)
    alone = build(args, device).double()
    windows = torch.cat(documents)
    weighted_loss(alone, windows, 1 / len(windows)).backward()
    model, exact = (
        DistributedDataParallel(build(args, device).to(dtype), bucket_cap_mb=args.bucket_mib)
        for dtype in (torch.float32, torch.float64)
    )
    for _ in range(2):  # in the second forward pass DDP regroups its buckets
        every_time(model, right)
        every_time(exact, right)
    size, number = sum(p.nbytes for p in model.parameters()), buckets(model, args.bucket_mib)

    say(f"{n} rank{'s' * (n > 1)} on {device.type}: {len(windows):,} tokens, k = {k}")
    say("rank 0 has " + ", ".join(str(len(w)) for w, _ in right) + " tokens in its micro-batches")
    say(f"{size / 1e6:.2f} MB of gradients; buckets: {number}")
    say(f"{'':<18}{'all-reduces':>18}{'MB sent by a rank':>22}{'gradient':>12}")
    say(f"{'':<18}{'predicted':>10}{'seen':>8}{'predicted':>13}{'seen':>9}{'error':>12}")
    errors, off_count, off_wire = {}, 0.0, 0.0
    for name, method, share, times in (
        ("every time", every_time, right, k),
        ("last only", last_only, right, 1),
        ("backward only", backward_only, right, k),
        ("last inside", last_inside, right, 0),
        ("loss.mean() / k", last_only, means, 1),
    ):
        exact.zero_grad()
        method(exact, share)
        errors[name] = relative_error(exact.module, alone)
        dist.barrier()
        before = bytes_on_wire()
        with Traffic() as traffic:
            method(model, share)
        sent, predicted = bytes_on_wire() - before, times * size * 2 * (n - 1) / n
        off_count = max(off_count, abs(traffic.count - times * number))
        off_wire = max(off_wire, abs(sent - predicted) / max(predicted, size))
        row = f"{name:<18}{times * number:>10}{traffic.count:>8}{predicted / 1e6:>13.2f}"
        say(f"{row}{sent / 1e6:>9.2f}{errors[name]:>12.2g}")
    kept = max(errors[name] for name in ("every time", "last only", "backward only"))
    claims = [
        check("all-reduces, off the prediction", off_count, 0),
        check("gradient of the first three, off one process's", kept, 1e-12),
        check("gradient of loss.mean() / k, off", errors["loss.mean() / k"], 1e-3, at_least=True),
    ]
    if n > 1:
        off = errors["last inside"]
        claims.append(check("gradient with the last inside, off", off, 1e-3, at_least=True))
    if dist.get_backend() == "gloo" and sys.platform == "linux":  # others may go round TCP
        claims.append(check("bytes on the wire, relative error", off_wire, 0.02))
    if args.turns and n > 1:
        claims.append(report_times(args, race(model, right, args.turns)))
    return all(claims)


def report_times(args: argparse.Namespace, seconds: torch.Tensor) -> bool:
    k, milliseconds = args.micro_batches, 1e3 * seconds  # [turns, 3]
    say(f"ms of {len(seconds)} turns     fastest   quartiles    median")
    quantiles = milliseconds.quantile(torch.tensor([0, 0.25, 0.5, 0.75]), 0).T
    names = ("every time", "last only", "never")
    for name, (least, low, middle, high) in zip(names, quantiles, strict=True):
        say(f"{name:<18}{least:>7.1f}{low:>8.1f}-{high:<6.1f}{middle:>7.1f}")
    every, last, never = quantiles[:, 2].tolist()
    predicted = never + (every - never) / k
    say(f"last only, if all k cost the same: {predicted:.1f} ms, seen {last / predicted - 1:+.0%}")
    if args.json and dist.get_rank() == 0:
        record = dict(zip(names, seconds.T.tolist(), strict=True))
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return check("time of last only over every time", ratio(list(seconds)), 1)


def relative_error(mine: nn.Module, truth: nn.Module) -> float:
    a, b = (torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (mine, truth))
    return ((a - b).norm() / b.norm()).item()


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
    text = Path(__file__).resolve().parents[1] / "main.md"
    parser.add_argument("--data", type=Path, default=text, help="text to learn; default: main.md")
    parser.add_argument("--micro-batches", type=positive, default=4, help="k, per rank and step")
    parser.add_argument("--documents", type=positive, default=1, help="paragraphs in a micro-batch")
    parser.add_argument("--longest", type=positive, default=100, help="bytes kept of a paragraph")
    parser.add_argument("--width", type=positive, default=512, help="outputs of a hidden layer")
    parser.add_argument("--layers", type=positive, default=3, help="hidden layers")
    parser.add_argument("--bucket-mib", type=float, default=1.0, help="MiB that fill a bucket")
    parser.add_argument("--turns", type=int, default=8, help="timed steps per method; 0: none")
    parser.add_argument("--seed", type=int, default=0, help="for weights and paragraphs")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--json", type=Path, help="also write the seconds to this file")
    args = parser.parse_args()
    if args.micro_batches == 1:
        stop("--micro-batches 1 accumulates nothing: type 2 or more")
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
