"""How much faster do more ranks train, and how many will be too many? Measured, fitted, predicted.

    python chapter10-distributed-benchmarking-and-performance-optimization/code/ch10_scaling_efficiency.py \
        --plot chapter10-distributed-benchmarking-and-performance-optimization/figures/scaling.svg

On GPUs:
    torchrun --nproc_per_node=8 chapter10-distributed-benchmarking-and-performance-optimization/code/ch10_scaling_efficiency.py \
        --ranks 1 2 4 8 --width 1024 --layers 16 --heads 16 --context 1024 --batch 16 --dtype bf16

It starts its own ranks, as many as the largest of --ranks; under torchrun it takes those that are
there. Smaller numbers of ranks are groups inside them, and all take turns, so that a slow minute of
the machine hits all. Look at the prediction for the largest number, and at what it did not know. Section 10.2.
"""

import argparse
import json
import math
import os
import random
import socket
import statistics
import sys
import time
from pathlib import Path
from typing import NoReturn

import torch
import torch._dynamo  # before the group, or gloo's threads outlive it: section 3.8
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel

Seconds = dict[int, list[float]]  # of a step, by the number of ranks

# Megatron-LM's README, "Training Speed and Scalability": GPT-3, slightly more than 175 billion parameters
# on H100, 1,152 sequences a batch whatever the number of GPUs. GPUs: model FLOPs utilization.
MEGATRON = {96: 0.47, 4608: 0.42}


# --- three laws ----------------------------------------------------------------------------------


def fit_amdahl(relative: dict[int, float]) -> float:
    """The serial share s of T(n) / T(1) = s + (1 - s) / n, by least squares, from 0 to 1.

    Amdahl 1967: the same work on more ranks, of which a share does not divide.
    """
    pairs = [(1 - 1 / n, t - 1 / n) for n, t in relative.items() if n > 1]
    return min(1.0, max(0.0, sum(x * y for x, y in pairs) / sum(x * x for x, _ in pairs)))


def fit_gustafson(speedup: dict[int, float]) -> float:
    """The serial share s of S(n) = n - s (n - 1), by least squares, from 0 to 1.

    Gustafson 1988: work that grows with the ranks. S is the work done in the time of one.
    """
    pairs = [(n - 1, n - s) for n, s in speedup.items() if n > 1]
    return min(1.0, max(0.0, sum(x * y for x, y in pairs) / sum(x * x for x, _ in pairs)))


def fit_usl(speedup: dict[int, float]) -> tuple[float, float]:
    """Contention and coherency of S(n) = n / (1 + a (n - 1) + b n (n - 1)), by least squares, not below 0.

    Gunther's universal scalability law: Amdahl's share, and a cost for each pair of ranks that have
    to agree, by which S has a peak. With two points it goes through both.
    """
    points = [(n - 1, n * (n - 1), n / s - 1) for n, s in speedup.items() if n > 1]
    xx, xy, yy = (sum(p[i] * p[j] for p in points) for i, j in ((0, 0), (0, 1), (1, 1)))
    xz, yz = (sum(p[i] * p[2] for p in points) for i in (0, 1))
    determinant = xx * yy - xy * xy
    if determinant > 1e-12 * xx * yy:
        a = (xz * yy - yz * xy) / determinant
        b = (yz * xx - xz * xy) / determinant
        if a >= 0 and b >= 0:
            return a, b
    alone = (max(0.0, xz / xx), 0.0), (0.0, max(0.0, yz / yy))  # the best on the edge
    return min(alone, key=lambda ab: sum((ab[0] * x + ab[1] * y - z) ** 2 for x, y, z in points))


def amdahl(n: float, s: float) -> float:
    return 1 / (s + (1 - s) / n)


def usl(n: float, a: float, b: float) -> float:
    return n / (1 + a * (n - 1) + b * n * (n - 1))


def usl_peak(a: float, b: float) -> float:
    """The number of ranks beyond which more of them are slower."""
    return math.sqrt((1 - a) / b) if b > 0 and a < 1 else math.inf


def share_between(first: tuple[int, float], second: tuple[int, float]) -> float:
    """Amdahl's serial share from the efficiencies at two numbers of ranks, neither of them 1.

    Efficiency at n is 1 / (1 + s (n - 1)), so the ratio of two of them has one unknown.
    """
    (n, e), (m, f) = first, second
    return (e - f) / (f * (m - 1) - e * (n - 1))


def interval(
    one: list[float], many: list[float], scale: float, seed: int, draws: int = 1000
) -> tuple[float, float, float]:
    """`scale` times the median of one over that of many, with a 95 % bootstrap interval."""
    draw = random.Random(seed)
    ratios = sorted(
        statistics.median(draw.choices(one, k=len(one)))
        / statistics.median(draw.choices(many, k=len(many)))
        for _ in range(draws)
    )
    low, high = ratios[int(0.025 * draws)], ratios[int(0.975 * draws)]
    return scale * statistics.median(one) / statistics.median(many), scale * low, scale * high


# --- one step, by the first n ranks --------------------------------------------------------------


class Team:
    """The first n ranks, with a model that they train together; on other ranks without a model."""

    def __init__(
        self,
        size: int,
        args: argparse.Namespace,
        device: torch.device,
        weights: torch.dtype = torch.float32,
    ):
        self.size = size
        self.device = device
        self.group = dist.new_group(list(range(size)))  # all ranks must call this
        self.model: nn.Module | None = None
        if dist.get_rank() < size:
            torch.manual_seed(args.seed)
            model = ByteLlama(args.width, args.layers, args.heads, args.context)
            model.to(device, weights)
            self.model = DistributedDataParallel(model, process_group=self.group)

    def step(self, windows: torch.Tensor, dtype: torch.dtype, lr: float = 1e-3) -> float:
        """One update by SGD on this rank's share of the windows; the mean loss over all of them."""
        assert self.model is not None
        share = windows[dist.get_rank() :: self.size].to(self.device)  # sizes may differ by one
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            logits = self.model(share[:, :-1])  # [share, context, 256]
        targets = share[:, 1:].flatten()
        total = F.cross_entropy(logits.flatten(0, 1), targets, reduction="sum")
        loss = total / windows[:, 1:].numel()
        (loss * self.size).backward()  # as DDP divides the ranks' sum by their number
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter -= lr * parameter.grad
                parameter.grad = None
        loss = loss.detach()
        dist.all_reduce(loss, group=self.group)
        return loss.item()

    def seconds(self, windows: torch.Tensor, dtype: torch.dtype) -> float:
        """Seconds of one step, on its slowest rank."""
        dist.barrier(self.group)
        synchronize(self.device)
        start = time.perf_counter()
        self.step(windows, dtype)
        synchronize(self.device)
        taken = torch.tensor(time.perf_counter() - start, device=self.device)
        dist.all_reduce(taken, dist.ReduceOp.MAX, group=self.group)
        return taken.item()


def measure(
    teams: list[Team], data: torch.Tensor, args: argparse.Namespace
) -> tuple[Seconds, Seconds]:
    """Seconds of each round, with the batch of --batch (strong) and with a share of it for each rank
    of a team (weak): two tables that rank 0 fills. The teams take turns.
    """
    strong: Seconds = {team.size: [] for team in teams}
    weak: Seconds = {team.size: [] for team in teams}
    per_rank = max(1, args.batch // max(strong))
    for number in range(args.rounds + 1):
        for team in teams:
            for table, batch in ((strong, args.batch), (weak, per_rank * team.size)):
                if team.model is not None:
                    seconds = team.seconds(windows_of_round(data, number, batch, args), args.dtype)
                    if number > 0:  # the first round warms up
                        table[team.size].append(seconds)
                dist.barrier()  # the ranks outside the team sleep here
    return strong, weak


def windows_of_round(
    data: torch.Tensor, number: int, batch: int, args: argparse.Namespace
) -> torch.Tensor:
    """The windows of a round, [batch, context + 1], the same on every rank."""
    draw = torch.Generator().manual_seed((args.seed * 1_000_003 + number) % 2**63)
    starts = torch.randint(len(data) - args.context, (batch, 1), generator=draw)
    return data[starts + torch.arange(args.context + 1)]


def differences(
    args: argparse.Namespace, data: torch.Tensor, device: torch.device
) -> tuple[float, float]:
    """Two updates in double precision by each number of ranks: the largest differences of a loss and
    of a weight from one rank's. Equal weights after an update by SGD are equal gradients.
    """
    small = argparse.Namespace(**{**vars(args), "width": 32, "layers": 2, "heads": 4})
    small.context = min(args.context, 32)
    losses, weights = [], []
    for size in args.ranks:
        team = Team(size, small, device, torch.float64)
        if team.model is not None:
            batches = [windows_of_round(data, number, 7, small) for number in range(2)]
            losses.append([team.step(windows, torch.float32, 1.0) for windows in batches])
            weights.append(torch.cat([p.detach().flatten() for p in team.model.parameters()]))
        dist.barrier()
    loss = max(abs(a - b) for others in losses for a, b in zip(losses[0], others, strict=True))
    weight = max((w - weights[0]).abs().max().item() for w in weights)
    return loss, weight


# --- the report ----------------------------------------------------------------------------------


def run(args: argparse.Namespace, device: torch.device) -> list[bool | None]:
    if args.ranks[-1] > dist.get_world_size():
        stop(f"--ranks {args.ranks[-1]}, but there are {dist.get_world_size()}")
    if device.type == "cpu":
        torch.set_num_threads(1)  # one rank, one core: or one rank would have all of them
    args.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    data = read_bytes(args.data, at_least=20 * args.context)
    loss_error, weight_error = differences(args, data, device)
    teams = [Team(size, args, device) for size in args.ranks]
    parameters = sum(p.numel() for p in teams[-1].model.parameters()) if teams[-1].model else 0
    strong, weak = measure(teams, data, args)

    claims: list[bool | None] = [
        check("largest difference of a loss from one rank's", loss_error, 1e-9),
        check("largest difference of a weight from one rank's", weight_error, 1e-9),
    ]
    if dist.get_rank() > 0:
        return claims
    most = max(args.ranks)
    workers = torch.accelerator.device_count() if device.type != "cpu" else len(cores())
    say(f"{parameters:,} parameters on {device.type}: median of {args.rounds} steps, "
        "95 % interval of the efficiency")  # fmt: skip
    for title, table, scale in (("strong", strong, 1), ("weak", weak, 0)):
        count = args.batch if scale else args.batch // most
        say(f"{title + ',':<8}{count} windows {'in all' if scale else 'a rank'}")
        say("  ranks  ms a step  efficiency    interval")
        for n in args.ranks:
            middle, low, high = interval(table[1], table[n], 1 / n if scale else 1.0, args.seed)
            say(f"{n:>7}{1e3 * statistics.median(table[n]):>11.1f}{middle:>11.0%} "
                f"{low:>6.0%} to {high:.0%}")  # fmt: skip
    if most > workers:
        say(f"{most} ranks share {workers} core{'s' * (workers > 1)}: from {workers + 1} on a rank "
            "adds work and no worker")  # fmt: skip

    best = {n: min(strong[n]) for n in args.ranks}
    speedup = {n: best[1] / best[n] for n in args.ranks}
    scaled = {n: n * min(weak[1]) / min(weak[n]) for n in args.ranks}
    if most > 1:
        claims += predict(speedup, scaled, args)
    if args.json:
        content = {"ranks": args.ranks, "strong_s": strong, "weak_s": weak, "speedup": speedup}
        args.json.write_text(json.dumps(content, indent=1) + "\n")
    if args.plot:
        plot(speedup, args.plot)
    return claims


def predict(
    speedup: dict[int, float], scaled: dict[int, float], args: argparse.Namespace
) -> list[bool | None]:
    """Print the three laws' fits to the fastest steps, and what they say about more ranks."""
    most = max(speedup)
    fewer = {n: s for n, s in speedup.items() if n < most}
    s = fit_amdahl({n: 1 / value for n, value in speedup.items()})
    a, b = fit_usl(speedup)
    say(
        f"Amdahl      serial share {s:.3f}: never more than {1 / s if s else math.inf:.1f} times as fast"
    )
    say(f"Gustafson   serial share {fit_gustafson(scaled):.3f}, of work that grows with the ranks")
    say(
        f"USL         contention {a:.3f}, coherency {b:.4f}: fastest with {usl_peak(a, b):.1f} ranks"
    )
    claims: list[bool | None] = []
    if len(fewer) > 1:
        guess = amdahl(most, fit_amdahl({n: 1 / value for n, value in fewer.items()}))
        say(f"{most} ranks     {guess:.2f} times as fast by Amdahl from fewer ranks, "
            f"measured {speedup[most]:.2f}")  # fmt: skip
        claim = f"error of the prediction for {most} ranks from fewer"
        claims.append(expect(claim, abs(guess / speedup[most] - 1), 0.15, args.strict))
    for n in (2 * most, 8 * most):
        say(f"{n:>2} ranks    Amdahl {amdahl(n, s):.2f}, USL {usl(n, a, b):.2f} times as fast")
    published(s)
    return claims


def published(here: float) -> None:
    """Say what two published points of a large strong scaling come to, by the same law."""
    (few, before), (many, after) = MEGATRON.items()
    s = share_between((few, before), (many, after))
    kept = (1 + here * (few - 1)) / (1 + here * (many - 1))
    say(f"Megatron    {few} to {many:,} GPUs: MFU {before:.0%} to {after:.0%}, {after / before:.0%} kept; "
        f"with the share above {kept:.0%} would be")  # fmt: skip
    say(f"            serial share {1e6 * s:.0f} in a million; half of the efficiency on "
        f"{1 + 1 / s:,.0f} GPUs")  # fmt: skip


def cores() -> list[int]:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def plot(speedup: dict[int, float], path: Path) -> None:
    """Speed-ups with the fitted laws, drawn on to more ranks; beside it the published efficiency."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "ch10"
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6))
    most = max(speedup)
    ranks = [1 + (4 * most - 1) * i / 100 for i in range(101)]
    s = fit_amdahl({n: 1 / value for n, value in speedup.items()}) if most > 1 else 0.0
    a, b = fit_usl(speedup) if most > 1 else (0.0, 0.0)
    left.plot(ranks, ranks, color="0.8", label="perfect")
    left.plot(ranks, [amdahl(n, s) for n in ranks], label="Amdahl, fitted to all")
    left.plot(ranks, [usl(n, a, b) for n in ranks], label="USL, fitted to all")
    fewer = {n: 1 / value for n, value in speedup.items() if n < most}
    if len(fewer) > 1:
        guess = fit_amdahl(fewer)
        left.plot(
            ranks, [amdahl(n, guess) for n in ranks], "--", label="Amdahl, without the largest"
        )
    left.plot(list(speedup), list(speedup.values()), "ko", label="measured (fastest steps)")
    left.set(xlabel="ranks", ylabel="times as fast as one rank", ylim=(0, 1.8 * most))
    left.legend(fontsize=8, frameon=False, loc="upper right")
    few, many = MEGATRON
    share = share_between(*MEGATRON.items())
    gpus = [10 ** (i / 25) for i in range(40, 126)]
    scale = MEGATRON[few] * (1 + share * (few - 1))
    right.plot(
        gpus, [100 * scale / (1 + share * (n - 1)) for n in gpus], label="Amdahl through both"
    )
    right.plot([few, many], [100 * MEGATRON[few], 100 * MEGATRON[many]], "ko", label="Megatron-LM")
    right.set(xlabel="H100 GPUs, one batch size", ylabel="MFU (%)", xscale="log", ylim=(0, 50))
    right.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None})


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--ranks", type=int, nargs="+", help="numbers of ranks; 1, 2 and 4, or those that are there"
    )
    add("--data", type=Path, default="resources/corpus.txt", help="text to learn, as bytes")
    add("--rounds", type=int, default=9, help="timed steps of each number of ranks")
    add("--batch", type=int, default=8, help="windows a step, for all ranks together (strong)")
    add("--context", type=int, default=128, help="bytes per window")
    add("--width", type=int, default=128, help="size of a token's vector")
    add("--layers", type=int, default=3, help="transformer blocks")
    add("--heads", type=int, default=4, help="attention heads")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the matrix products")
    add("--seed", type=int, default=0, help="for weights, batches and intervals")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--json", type=Path, help="also write every step's seconds to this file")
    add("--plot", type=Path, help="also draw speed-ups and fits to this SVG file")
    add("--strict", action="store_true", help="exit 1 if an `expect:` line does not hold")
    args = parser.parse_args()
    there = int(os.environ.get("WORLD_SIZE", 4))
    args.ranks = sorted({1, *(args.ranks or [*(n for n in (1, 2, 4) if n < there), there])})
    if args.width % (2 * args.heads):
        stop(f"--width {args.width} is no multiple of 2 x --heads {args.heads}")
    if args.ranks[0] < 1 or args.ranks[-1] > args.batch:
        stop(f"--ranks {args.ranks[-1]}: give 1 or more, and a window in --batch for each")
    if args.rounds < 2:
        stop("give --rounds 2 or more: an interval wants more than one step")
    return args


def one_rank(rank: int, world_size: int, port: int) -> None:
    """What torchrun does for a rank, and then the rank."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    as_rank()


@record
def as_rank() -> None:
    """The `main` of this book's scripts of several ranks."""
    args = parse_args()
    device = join_group(args.device)
    claims = run(args, device)
    dist.barrier()  # nobody leaves while another is at work
    dist.destroy_process_group()  # not in a `finally`: section 3.1
    sys.exit(conclude(claims))


def main() -> None:
    """Start the ranks, unless a launcher has."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        as_rank()
        return
    world_size = max(parse_args().ranks)
    method = "fork" if sys.platform == "linux" else "spawn"  # a fork has torch already
    try:
        torch.multiprocessing.start_processes(
            one_rank, (world_size, free_port()), world_size, start_method=method
        )
    except torch.multiprocessing.ProcessExitedException as error:
        sys.exit(error.exit_code)


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


# Copied from train_ddp_torchrun.LlamaBlock
class LlamaBlock(nn.Module):
    """Llama's: rotary attention, then SwiGLU, each behind an RMSNorm and added to what comes in."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        hidden = (8 * width // 3 + 7) // 8 * 8  # 16-bit matrix units want multiples of 8
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))  # x: [batch, seq, width]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [batch, heads, seq, head_dim]
        q, k = rotate(q, rotation), rotate(k, rotation)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.out(mixed.transpose(1, 2).flatten(2)))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return x + self.dropout(self.down(F.silu(gate) * up))


# Copied from train_ddp_torchrun.ByteLlama
class ByteLlama(nn.Module):
    """A small decoder-only transformer of Llama's shape (arXiv:2302.13971) whose tokens are bytes."""

    def __init__(self, width: int, layers: int, heads: int, context: int, dropout: float = 0.0):
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.blocks = nn.ModuleList(LlamaBlock(width, heads, dropout) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, 256, bias=False)
        pairs = width // heads // 2  # of a head's dimensions; each turns at its own speed
        angle = torch.outer(torch.arange(context), 10_000.0 ** -(torch.arange(pairs) / pairs))
        self.register_buffer("rotation", torch.stack([angle.cos(), angle.sin()]), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:  # [batch, seq] -> [batch, seq, 256]
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, self.rotation[:, : tokens.shape[1]])
        return self.head(self.norm(x))


# Copied from train_ddp_torchrun.rotate
def rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Turn each pair (x[i], x[i + d/2]) by its position's angle: RoPE (arXiv:2104.09864)."""
    cos, sin = rotation
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


# Copied from vllm_server.free_port
def free_port() -> int:
    """A port of 127.0.0.1 that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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
