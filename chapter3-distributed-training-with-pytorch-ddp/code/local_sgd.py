"""Fewer synchronizations: average the weights now and then, or DiLoCo, beside DDP's every step.

    torchrun --nproc_per_node=2 chapter3-distributed-training-with-pytorch-ddp/code/local_sgd.py --plot chapter3-distributed-training-with-pytorch-ddp/figures/local_sgd.svg
    torchrun --nproc_per_node=3 chapter3-distributed-training-with-pytorch-ddp/code/local_sgd.py --every 1 8 --seeds 1 --outer-momentum 0.3

On GPUs:
    torchrun --nproc_per_node=8 chapter3-distributed-training-with-pytorch-ddp/code/local_sgd.py --width 4096 --layers 4 --context 64 --lr 3e-4 --steps 2048 --every 1 16 128 --diloco 16 --seeds 1

Read "MB sent" beside the loss: the bytes fall as 1/H, the loss hardly moves. All methods take the same
steps on the same windows. Differences are small, so they are over several seeds. Section 3.5.
"""

import argparse
import json
import math
import os
import socket
import struct
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import NoReturn

import torch
import torch._dynamo  # before the group, or gloo's threads outlive it: section 3.8
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim import SGD, AdamW
from tqdm import tqdm


class DiLoCo:
    """An optimizer of optimizers: SGD with Nesterov momentum on how far the ranks came on average.

    Douillard et al. 2023, arXiv:2311.08105, algorithm 1; there lr is 0.7, momentum 0.9, H 500.
    """

    def __init__(self, model: nn.Module, every: int, lr: float, momentum: float):
        self.model = model
        self.every = every
        self.steps = 0
        self.common = parameters_to_vector(model.parameters()).detach().clone()  # at the last sync
        self.outer = SGD([self.common], lr, momentum, nesterov=momentum > 0)

    @torch.no_grad()
    def step(self) -> None:
        """After each inner step; every H-th one synchronizes."""
        self.steps += 1
        if self.steps % self.every == 0:
            moved = self.common - parameters_to_vector(self.model.parameters())
            dist.all_reduce(moved)
            self.common.grad = (
                moved / dist.get_world_size()
            )  # downhill is minus this, as for a loss
            self.outer.step()
            vector_to_parameters(self.common.clone(), self.model.parameters())  # they become views


@dataclass(frozen=True)
class Method:
    name: str  # DDP, averaging or DiLoCo
    every: int  # H, the steps from one synchronization to the next
    outer_lr: float = 1.0  # of DiLoCo; this and no momentum is averaging
    outer_momentum: float = 0.0

    def __str__(self) -> str:
        return f"DiLoCo {self.outer_momentum:g}" if self.name == "DiLoCo" else self.name


def train(
    method: Method,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[torch.Tensor],
) -> tuple[int, list[torch.Tensor], list[float]]:
    """Train; return the bytes that this rank sent by Linux's count, its losses, and its drifts."""
    ddp_model = DistributedDataParallel(model) if method.name == "DDP" else model
    diloco = DiLoCo(model, method.every, method.outer_lr, method.outer_momentum)
    averager = PeriodicModelAverager(method.every, method.every - 1)  # first after H steps
    sent, losses, drifts = 0, [], []
    for step, windows in enumerate(batches, 1):
        optimizer.zero_grad()
        loss = next_byte_loss(ddp_model, windows)
        sent_before = bytes_sent()
        loss.backward()
        optimizer.step()
        weights = parameters_to_vector(model.parameters()).detach()
        match method.name:
            case "averaging":  # before zero_grad: it leaves out weights without a gradient
                averager.average_parameters(model.parameters())
            case "DiLoCo":
                diloco.step()
        sent += bytes_sent() - sent_before
        losses.append(loss.detach())
        if step % method.every == 0:
            drifts.append(drift(weights))
    return sent, losses, drifts


def drift(weights: torch.Tensor) -> float:
    """How far this rank's weights are from the ranks' mean, as a share of it."""
    mean = mean_over_ranks(weights.clone())
    return ((weights - mean).norm() / mean.norm()).item()


def batches_of_rank(
    data: torch.Tensor, seed: int, steps: int, args: argparse.Namespace
) -> Iterator[torch.Tensor]:
    """This rank's windows of each step, the same for all methods: [batch, context + 1]."""
    n = dist.get_world_size()
    for step in range(steps):
        yield draw_windows(data, n * args.batch, args.context, step, seed)[dist.get_rank() :: n]


def train_seeds(
    method: Method, data: torch.Tensor, held_out: torch.Tensor, args: argparse.Namespace
) -> dict:
    """Train by one method on every seed; return lists of what each seed showed."""
    row: dict = {"method": str(method), "H": method.every}
    row |= {"sent": 0, "train": [], "held_out": [], "drift": [], "spread": []}
    for seed in range(args.seed, args.seed + args.seeds):
        model = byte_mlp(args, seed).to(data.device)
        optimizer = AdamW(model.parameters(), lr=args.lr, fused=True)
        batches = batches_of_rank(data, seed, args.steps, args)
        sent, losses, drifts = train(method, model, optimizer, batches)
        row["sent"] = mean_over_ranks(losses[0].new_tensor(sent).double()).item()
        last = torch.stack(losses[-math.ceil(args.steps / 10) :]).mean()
        row["train"].append(mean_over_ranks(last).item())  # a rank knows its own windows only
        row["drift"].append(fmean(drifts))
        row["spread"].append(max_spread(model))
        with torch.no_grad():
            row["held_out"].append(next_byte_loss(model, held_out).item())
    return row


def distance_after_4_steps(
    a: Method,
    b: Method,
    optimizer: type[torch.optim.Optimizer],
    data: torch.Tensor,
    args: argparse.Namespace,
) -> float:
    """max |difference| of the weights that two methods reach in float64, so as to see a wrong sum."""
    weights = []
    for method in (a, b):
        model = byte_mlp(args, args.seed).to(data.device).double()
        batches = batches_of_rank(data, args.seed, 4, args)
        train(method, model, optimizer(model.parameters(), lr=args.lr), batches)
        weights.append(parameters_to_vector(model.parameters()))
    return (weights[0] - weights[1]).abs().max().item()


def plot(rows: list[dict], path: Path) -> None:
    """Held-out loss over bytes sent: the mean of the seeds, with their differences' range."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "ch03"
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for method in dict.fromkeys(row["method"] for row in rows):
        points = [row for row in rows if row["method"] == method]
        means = [fmean(row["above"]) for row in points]
        low = [mean - min(row["above"]) for row, mean in zip(points, means, strict=True)]
        high = [max(row["above"]) - mean for row, mean in zip(points, means, strict=True)]
        sent = [row["predicted"] / 1e6 for row in points]
        axis.errorbar(sent, means, [low, high], marker="o", capsize=3, label=method)
    axis.set(xlabel="MB sent per rank", ylabel="held-out loss above DDP's (nats)", xscale="log")
    labels = {
        row["predicted"] / 1e6: f"{row['predicted'] / 1e6:.1f} (H {row['H']})" for row in rows
    }
    axis.set_xticks(list(labels), labels.values())
    axis.minorticks_off()
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None})


def run(args: argparse.Namespace, device: torch.device) -> list[bool | None]:
    n = dist.get_world_size()
    text = read_bytes(args.data, at_least=20 * args.context).to(device)
    split = len(text) * 9 // 10
    data = text[:split]
    held_out = text[split:].unfold(0, args.context + 1, 1)[:8192]
    ddp = Method("DDP", 1)
    averaging = [Method("averaging", every) for every in args.every]
    diloco = [
        Method("DiLoCo", every, args.outer_lr, momentum)
        for momentum in args.outer_momentum
        for every in args.diloco
    ]
    warnings.filterwarnings("ignore", "When period is 1")  # it is here to be compared
    methods = tqdm([ddp, *averaging, *diloco], disable=None if dist.get_rank() == 0 else True)
    rows = [train_seeds(method, data, held_out, args) for method in methods]

    ranks = f"{n} rank{'s' * (n > 1)} on {device.type}"
    say(f"{ranks}: {args.steps} steps of AdamW, {args.seeds} seed{'s' * (args.seeds > 1)}")
    say("                       MB sent per rank    train   held out, and above DDP's")
    say("method        H rounds  on wire predicted   loss     mean    mean (least to most)  drift")
    size = 4 * sum(p.numel() for p in byte_mlp(args, 0).parameters())
    for row in rows:
        rounds = args.steps // row["H"]
        row["predicted"] = rounds * 2 * (n - 1) / n * size
        row["above"] = [a - b for a, b in zip(row["held_out"], rows[0]["held_out"], strict=True)]
        say(f"{row['method']:<11}{row['H']:>4}{rounds:>7}{row['sent'] / 1e6:>9.3f}"
            f"{row['predicted'] / 1e6:>10.3f}{fmean(row['train']):>7.3f}"
            f"{fmean(row['held_out']):>9.3f}{fmean(row['above']):>+8.3f}"
            f" ({min(row['above']):+.3f} to {max(row['above']):+.3f})"
            f"{fmean(row['drift']):>7.4f}")  # fmt: skip
    if dist.get_rank() == 0 and args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    if dist.get_rank() == 0 and args.plot:
        plot(rows, args.plot)

    spreads = torch.tensor([row["spread"] for row in rows])
    by_sgd = distance_after_4_steps(ddp, Method("averaging", 1), SGD, data, args)
    as_averaging = distance_after_4_steps(
        Method("averaging", 2), Method("DiLoCo", 2), SGD, data, args
    )
    by_adamw = distance_after_4_steps(ddp, Method("averaging", 1), AdamW, data, args)
    claims = [
        check("SGD, H 1: max |averaging - DDP|", by_sgd, 1e-12),
        check("SGD, H 2: max |DiLoCo(1, 0) - averaging|", as_averaging, 1e-12),
        check("spread of weights over ranks after the last sync", spreads.max().item(), 0),
    ]
    if n > 1:  # or there is nothing to average
        claims.append(check("AdamW, H 1: max |averaging - DDP|", by_adamw, 1e-4, at_least=True))
    if rows[0]["sent"]:
        headers = [abs(row["sent"] - row["predicted"]) * row["H"] / args.steps for row in rows]
        claims.append(check("bytes per round beyond the prediction", max(headers), 1500 * n))

    averaged, first, last = (
        [fmean(row["above"]) for row in rows if row["method"] == str(method)]
        for method in (averaging[0], diloco[0], diloco[-1])
    )
    cost = max(averaged) - min(averaged)
    claims += [
        expect("averaging: loss that a larger H costs", cost, 0.1, args.strict),
        expect(
            f"{diloco[-1]}: loss above averaging's", max(last) - max(averaged), 0.1, args.strict
        ),
    ]
    if len(args.outer_momentum) > 1:
        overshoot = min(a - b for a, b in zip(first, last, strict=True))
        claim = f"{diloco[0]}: loss above {diloco[-1]}'s"
        claims.append(expect(claim, overshoot, 0.05, args.strict, at_least=True))
    return claims


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, default="resources/corpus.txt", help="text to learn, as bytes")
    add("--steps", type=int, default=48, help="inner optimizer steps of every method")
    add("--every", type=int, nargs="+", default=[1, 4, 16], help="H, local steps per sync")
    add("--diloco", type=int, nargs="+", default=[4, 16], help="H of DiLoCo")
    add("--batch", type=int, default=128, help="windows of text per step and rank")
    add("--context", type=int, default=8, help="bytes that predict the next")
    add("--width", type=int, default=64, help="of the hidden layers")
    add("--layers", type=int, default=1, help="hidden layers after the first")
    add("--lr", type=float, default=0.01, help="learning rate of AdamW, the inner optimizer")
    add("--outer-lr", type=float, default=0.7, help="DiLoCo's outer learning rate")
    add("--outer-momentum", type=float, nargs="+", default=[0.9, 0.3], help="Nesterov's, below 1")
    add("--seeds", type=int, default=3, help="runs per method, over which losses are averaged")
    add("--seed", type=int, default=0, help="the first one, for weights and batches")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--json", type=Path, help="also write the rows to this file")
    add("--plot", type=Path, help="also draw loss over bytes into this SVG file")
    add("--strict", action="store_true", help="exit 1 if an `expect:` line does not hold")
    args = parser.parse_args()
    for every in (*args.every, *args.diloco):
        if args.steps % every:
            stop(f"--steps {args.steps} is no multiple of H = {every}: a run must end in a sync")
    return args


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


# Copied from ch01_multi_gpu_ddp.main
@record  # so that torchrun's summary names the error
def main() -> None:
    args = parse_args()
    device = join_group(args.device)
    claims_of = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(claims_of, run(args, device))  # nobody leaves while another is at work
    dist.destroy_process_group()  # not in a `finally`: section 3.1
    sys.exit(conclude(max(claims_of, key=lambda claims: claims.count(False))))  # the worst rank's


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


# Copied from ch01_multi_gpu_ddp.max_spread
def max_spread(model: nn.Module) -> float:
    """Largest difference between any two ranks' copies of any weight."""
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    low, high = flat.clone(), flat.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    dist.all_reduce(high, op=dist.ReduceOp.MAX)
    return (high - low + 0 * flat).max().item()  # 0 * flat: MIN and MAX on gloo drop a NaN


# Copied from gradient_accumulation_no_sync.bytes_on_wire
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


# Copied from ddp_comm_hooks.bytes_sent
def bytes_sent() -> int:
    """By this process so far, as Linux counts; 0 where it cannot, as with NCCL."""
    over_tcp = dist.get_backend() == "gloo" and sys.platform == "linux"
    return bytes_on_wire() if over_tcp else 0


# Copied from ddp_comm_hooks.byte_mlp
def byte_mlp(args: argparse.Namespace, seed: int) -> nn.Sequential:
    """Scores the byte that comes after `context` bytes: [batch, context] -> [batch, 256]."""
    torch.manual_seed(seed)
    layers = [nn.Embedding(256, 16), nn.Flatten(), nn.Linear(16 * args.context, args.width)]
    for _ in range(args.layers):
        layers += [nn.LayerNorm(args.width), nn.GELU(), nn.Linear(args.width, args.width)]
    return nn.Sequential(*layers, nn.GELU(), nn.Linear(args.width, 256))


# Copied from ddp_comm_hooks.next_byte_loss
def next_byte_loss(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Mean over windows [batch, context + 1] of the last byte's, in nats."""
    return F.cross_entropy(model(windows[:, :-1]), windows[:, -1])


# Copied from ddp_comm_hooks.draw_windows
def draw_windows(
    data: torch.Tensor, batch: int, context: int, step: int, seed: int
) -> torch.Tensor:
    """A step's windows of text, the same on all ranks: [batch, context + 1]."""
    draw = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    starts = torch.randint(len(data) - context, (batch, 1), generator=draw)
    return data[starts + torch.arange(context + 1)]


# Copied from ddp_comm_hooks.mean_over_ranks
def mean_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(tensor)
    return tensor / dist.get_world_size()


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
