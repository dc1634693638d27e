"""Gradient accumulation: what no_sync saves, where it must stand, and what to divide by.

    torchrun --nproc_per_node=2 chapter3-distributed-training-with-pytorch-ddp/code/gradient_accumulation_no_sync.py

On GPUs:
    torchrun --nproc_per_node=8 chapter3-distributed-training-with-pytorch-ddp/code/gradient_accumulation_no_sync.py --width 8192 --layers 8 --bucket-mib 25

The first two rows have the same gradient, at k times the bytes or once. Of the three mistakes below
them, one costs the savings and two the gradient. Section 3.5.
"""

import argparse
import json
import math
import os
import socket
import struct
import sys
import time
from pathlib import Path
from typing import NoReturn

import torch
import torch._dynamo  # before the group, or gloo's threads outlive it: section 3.8
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
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
    world_size = dist.get_world_size()
    own = documents[dist.get_rank() :: world_size]
    micro_batches = [torch.cat(own[i::k]) for i in range(k)]
    tokens = torch.tensor(sum(map(len, micro_batches)), device=own[0].device)
    dist.all_reduce(tokens)  # a rank knows only its own
    weight = world_size / tokens.item()  # DDP divides by the number of ranks
    right = [(windows, weight) for windows in micro_batches]
    means = [(windows, 1 / len(windows) / k) for windows in micro_batches]
    return right, means


class Traffic(TorchDispatchMode):
    """Counts this process's all-reduces, also those that DDP starts from C++."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += operator.name() == "c10d::allreduce_"
        return operator(*args, **(kwargs or {}))


def bytes_on_wire() -> int:
    """Bytes that this process has given to its TCP connections: sent once, or about to be."""
    total = 0
    for link in Path("/proc/self/fd").iterdir():
        if link.is_socket():
            with socket.socket(fileno=os.dup(int(link.name))) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6):
                    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 216)
                    sent, again = struct.unpack_from("2Q", info, 200)  # as in linux/tcp.h
                    (waiting,) = struct.unpack_from("I", info, 144)  # tcpi_notsent_bytes
                    total += sent - again + waiting
    return total


def buckets(model: nn.Module, mib: float) -> int:
    """How many of DDP's buckets there should be: the last layer's gradients fill the first."""
    count = size = 0
    for p in reversed(list(model.parameters())):
        size += p.nbytes
        if size >= mib * 2**20:
            count += 1
            size = 0
    return count + (size > 0)


def build(args: argparse.Namespace, device: torch.device) -> nn.Sequential:
    """Scores the next byte: [tokens, CONTEXT] -> [tokens, 256]."""
    torch.manual_seed(args.seed)
    width = args.width
    layers = [nn.Embedding(256, 16), nn.Flatten(), nn.Linear(16 * CONTEXT, width), nn.GELU()]
    for _ in range(args.layers):
        layers += [nn.Linear(width, width), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(width, 256)).to(device)


def read_documents(args: argparse.Namespace, device: torch.device) -> list[torch.Tensor]:
    """Paragraphs, each as its windows [bytes, CONTEXT + 1]: as many tokens as it has bytes."""
    text = bytes(read_bytes(args.data, at_least=1).tolist())
    paragraphs = [p[: args.longest] for p in text.split(b"\n\n") if p]
    wanted = args.documents * args.micro_batches * dist.get_world_size() + 1  # + 1: uneven shares
    if len(paragraphs) < wanted:
        stop(f"{args.data} has {len(paragraphs)} paragraphs of {wanted}: give a longer --data FILE")
    draw = torch.Generator().manual_seed(args.seed)
    chosen = torch.randperm(len(paragraphs), generator=draw)[:wanted].tolist()
    tokens = (torch.tensor(list(paragraphs[i]), device=device) for i in chosen)
    return [F.pad(t, (CONTEXT, 0)).unfold(0, CONTEXT + 1, 1) for t in tokens]


def race(model: DistributedDataParallel, share: Share, turns: int) -> torch.Tensor:
    """Seconds of a step on the slowest rank: [turns, 3], every_time, last_only and last_inside."""
    seconds = torch.zeros(turns, 3, device=model.device)
    for turn in seconds:
        for i, method in enumerate((every_time, last_only, last_inside)):
            model.zero_grad()
            dist.barrier()
            start = time.perf_counter()
            method(model, share)
            synchronize(model.device)
            turn[i] = time.perf_counter() - start
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return seconds.cpu()


def relative_error(model: nn.Module, reference: nn.Module) -> float:
    """Of all gradients together."""
    a, b = (torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (model, reference))
    return ((a - b).norm() / b.norm()).item()


def run(args: argparse.Namespace, device: torch.device) -> list[bool | None]:
    world_size = dist.get_world_size()
    k = args.micro_batches
    documents = read_documents(args, device)
    right, means = cut(documents, k)
    reference = build(args, device).double()
    windows = torch.cat(documents)
    weighted_loss(reference, windows, 1 / len(windows)).backward()
    model = DistributedDataParallel(build(args, device), bucket_cap_mb=args.bucket_mib)
    double = DistributedDataParallel(build(args, device).double(), bucket_cap_mb=args.bucket_mib)
    for _ in range(2):  # in the second forward pass DDP regroups its buckets
        every_time(model, right)
        every_time(double, right)
    size = sum(p.nbytes for p in model.parameters())
    number = buckets(model, args.bucket_mib)
    over_tcp = dist.get_backend() == "gloo" and sys.platform == "linux"  # else nothing to count

    ranks = f"{world_size} rank{'s' * (world_size > 1)} on {device.type}"
    say(f"{ranks}: {len(windows):,} tokens, k = {k}")
    say("rank 0 has " + ", ".join(str(len(w)) for w, _ in right) + " tokens in its micro-batches")
    say(f"{size / 1e6:.2f} MB of gradients; buckets: {number}")
    say(f"{'':<18}{'all-reduces':>18}{'MB sent by a rank':>22}{'gradient':>12}")
    say(f"{'':<18}{'predicted':>10}{'seen':>8}{'predicted':>13}{'seen':>9}{'error':>12}")
    errors = {}
    count_error = bytes_error = 0.0
    for name, method, share, times in (
        ("every time", every_time, right, k),
        ("last only", last_only, right, 1),
        ("backward only", backward_only, right, k),
        ("last inside", last_inside, right, 0),
        ("loss.mean() / k", last_only, means, 1),
    ):
        double.zero_grad()
        method(double, share)
        errors[name] = relative_error(double, reference)
        predicted = times * size * 2 * (world_size - 1) / world_size
        dist.barrier()
        before = bytes_on_wire() if over_tcp else 0
        with Traffic() as traffic:
            method(model, share)
        sent = bytes_on_wire() - before if over_tcp else math.nan
        count_error = max(count_error, abs(traffic.count - times * number))
        bytes_error = max(bytes_error, abs(sent - predicted) / max(predicted, size))
        row = f"{name:<18}{times * number:>10}{traffic.count:>8}{predicted / 1e6:>13.2f}"
        say(f"{row}{sent / 1e6:>9.2f}{errors[name]:>12.2g}")
    same = max(errors[name] for name in ("every time", "last only", "backward only"))
    claims = [
        check("all-reduces, max |seen - predicted|", count_error, 0),
        check("gradient error of the first three rows", same, 1e-12),
        check("gradient error of loss.mean() / k", errors["loss.mean() / k"], 1e-3, at_least=True),
    ]
    if world_size > 1:
        inside = errors["last inside"]
        claims.append(check("gradient error of last inside", inside, 1e-3, at_least=True))
    if over_tcp:
        claims.append(check("bytes on the wire, relative error", bytes_error, 0.02))
    if args.turns and world_size > 1:
        claims.append(report_times(args, race(model, right, args.turns)))
    return claims


def report_times(args: argparse.Namespace, seconds: torch.Tensor) -> bool | None:
    fastest = 1e3 * seconds.min(0).values
    quartiles = 1e3 * seconds.quantile(torch.tensor([0.25, 0.5, 0.75]), 0).T
    names = ("every time", "last only", "never")
    say(f"ms of {args.turns} turns     fastest   quartiles    median")
    for name, least, (low, median, high) in zip(names, fastest, quartiles, strict=True):
        say(f"{name:<18}{least:>7.1f}{low:>8.1f}-{high:<6.1f}{median:>7.1f}")
    every, last, never = fastest.tolist()
    predicted = never + (every - never) / args.micro_batches
    say(f"last only, if all k cost the same: {predicted:.1f} ms, seen {last / predicted - 1:+.0%}")
    if args.json and dist.get_rank() == 0:
        result = dict(zip(names, seconds.T.tolist(), strict=True))
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return expect("fastest step of last only over every time", last / every, 1, args.strict)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, default="resources/corpus.txt", help="text to learn, as bytes"
    )
    parser.add_argument("--micro-batches", type=int, default=4, help="k, per rank and step")
    parser.add_argument("--documents", type=int, default=1, help="paragraphs in a micro-batch")
    parser.add_argument("--longest", type=int, default=100, help="bytes kept of a paragraph")
    parser.add_argument("--width", type=int, default=512, help="outputs of a hidden layer")
    parser.add_argument("--layers", type=int, default=3, help="hidden layers")
    parser.add_argument("--bucket-mib", type=float, default=1.0, help="MiB that fill a bucket")
    parser.add_argument("--turns", type=int, default=12, help="timed steps per method; 0: none")
    parser.add_argument("--seed", type=int, default=0, help="for weights and paragraphs")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--json", type=Path, help="also write the seconds to this file")
    parser.add_argument(
        "--strict", action="store_true", help="exit 1 if an `expect:` line does not hold"
    )
    args = parser.parse_args()
    if args.micro_batches < 2:
        stop(f"--micro-batches {args.micro_batches} accumulates nothing: type 2 or more")
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


# Copied from ch01_single_gpu_baseline.synchronize
def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


# Copied from ch01_single_gpu_baseline.read_bytes
def read_bytes(path: Path, at_least: int) -> torch.Tensor:
    """The file's bytes as integers from 0 to 255: [bytes]."""
    try:
        text = path.read_bytes()
    except OSError as error:
        stop(f"cannot read {path} ({error.strerror}): give a text file with --data FILE")
    if len(text) < at_least:
        stop(f"{path} has {len(text)} bytes, this run needs {at_least}: give a longer --data FILE")
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


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
