"""Fewer synchronizations: average the weights now and then, or DiLoCo, beside DDP's every step.

    torchrun --nproc_per_node=2 chapter3-distributed-training-with-pytorch-ddp/code/local_sgd.py
    torchrun --nproc_per_node=3 chapter3-distributed-training-with-pytorch-ddp/code/local_sgd.py --every 1 2 8 --seeds 2 --outer-momentum 0.3

On GPUs:
    torchrun --nproc_per_node=8 chapter3-distributed-training-with-pytorch-ddp/code/local_sgd.py --width 512 --layers 8 --heads 8 --context 512 --batch 16 --steps 2048 --every 1 16 128 512

Read "MB sent" beside the loss: the bytes fall as 1/H, the loss hardly moves. All methods take the same
steps on the same windows. Differences are small, so they are over several seeds. Section 3.5.
"""

import argparse
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

import torch
import torch._dynamo  # DDP's; before there is a group: section 3.8
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm import tqdm


class Meter:
    """The process group, as collectives see one, with a count of what this rank sends."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank, dist.get_world_size
        self.sent = self.calls = 0  # bytes, all-reduces

    def allreduce(self, tensors: list[torch.Tensor], options: object) -> dist.Work:
        n, (tensor,) = self.size(), tensors
        self.sent, self.calls = self.sent + 2 * (n - 1) * tensor.nbytes / n, self.calls + 1
        return dist.all_reduce(tensor, async_op=True)


class DiLoCo:
    """An optimizer of optimizers: SGD with Nesterov momentum on how far the ranks came on average.

    Douillard et al. 2023, arXiv:2311.08105, algorithm 1; there lr is 0.7, momentum 0.9, H 500.
    """

    def __init__(self, model: nn.Module, every: int, lr: float, momentum: float, group: Meter):
        self.model, self.every, self.group, self.steps = model, every, group, 0
        self.common = parameters_to_vector(model.parameters()).detach().clone()  # at the last sync
        self.outer = torch.optim.SGD([self.common], lr, momentum, nesterov=momentum > 0)

    @torch.no_grad()
    def step(self) -> None:
        """After each inner step; every H-th one synchronizes."""
        self.steps += 1
        if self.steps % self.every == 0:
            moved = self.common - parameters_to_vector(self.model.parameters())
            dist.all_reduce(moved, group=self.group)
            self.common.grad = moved / self.group.size()  # downhill is minus this, as for any loss
            self.outer.step()
            vector_to_parameters(self.common.clone(), self.model.parameters())  # they become views


class Block(nn.Module):
    """Llama's: rotary attention, then SwiGLU, each behind an RMSNorm and added to what comes in."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, hidden = heads, 8 * width // 3
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))  # x: [batch, seq, width]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [batch, heads, seq, head_dim]
        q, k = rotate(q, rotation), rotate(k, rotation)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class ByteLM(nn.Module):
    """A small decoder-only transformer of Llama's shape (arXiv:2302.13971) whose tokens are bytes."""

    def __init__(self, width: int, layers: int, heads: int, context: int):
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, 256, bias=False)
        frequency = 10_000.0 ** -torch.arange(0, 1, 2 * heads / width)  # [head_dim / 2]
        angle = torch.outer(torch.arange(context), frequency)
        self.register_buffer("rotation", torch.stack([angle.cos(), angle.sin()]), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:  # [batch, seq] -> [batch, seq, 256]
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, self.rotation[:, : tokens.shape[1]])
        return self.head(self.norm(x))


def rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Turn each pair (x[i], x[i + d/2]) by its position's angle: RoPE (arXiv:2104.09864)."""
    (cos, sin), (a, b) = rotation, x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def build(args: argparse.Namespace, seed: int, device: torch.device) -> ByteLM:
    torch.manual_seed(seed)
    return ByteLM(args.width, args.layers, args.heads, args.context).to(device)


def draw_batch(data: torch.Tensor, step: int, seed: int, args: argparse.Namespace) -> torch.Tensor:
    """This rank's windows of text in a step, the same for all methods: [batch, context + 1]."""
    draw = torch.Generator().manual_seed(seed * 1_000_003 + step)
    shape = (dist.get_world_size(), args.batch, 1)
    starts = torch.randint(len(data) - args.context, shape, generator=draw)
    return data[starts[dist.get_rank()] + torch.arange(args.context + 1)]


def mean_loss(model: nn.Module, window: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())


class Run:
    """A training by one method: "DDP", "averaging" or "DiLoCo", with what is seen of it."""

    def __init__(self, method: str, every: int, model: nn.Module, outer: tuple[float, float]):
        self.method, self.every, self.model, self.meter = method, every, model, Meter()
        self.replica, self.sync = model, lambda: None
        if method == "DDP":
            self.replica = DistributedDataParallel(model)
            self.replica.register_comm_hook(self.meter, allreduce_hook)
        elif method == "averaging":
            warnings.filterwarnings("ignore", "When period is 1")  # it is here to be compared
            averager = PeriodicModelAverager(every, every - 1, self.meter)  # first after H steps
            self.sync = lambda: averager.average_parameters(model.parameters())
        else:
            self.sync = DiLoCo(model, every, *outer, group=self.meter).step
        self.losses: list[torch.Tensor] = []
        self.drifts: list[float] = []  # before each sync
        self.seconds = 0.0

    def train(self, batches: Iterable[torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
        for step, window in enumerate(batches, 1):
            start = time.perf_counter()
            optimizer.zero_grad()
            loss = mean_loss(self.replica, window)
            loss.backward()
            optimizer.step()
            synchronize(window.device)
            self.seconds += time.perf_counter() - start
            self.losses.append(loss.detach())
            if step % self.every == 0:
                self.drifts.append(drift(self.model))
            start = time.perf_counter()
            self.sync()  # before zero_grad: the averager leaves out weights without a gradient
            synchronize(window.device)
            self.seconds += time.perf_counter() - start


def drift(model: nn.Module) -> float:
    """How far this rank's weights are from the ranks' mean, as a share of it."""
    mine = parameters_to_vector(model.parameters()).detach()
    mean = mine.clone()
    dist.all_reduce(mean)
    mean /= dist.get_world_size()
    return ((mine - mean).norm() / mean.norm()).item()


def exact(method: str, every: int, data: torch.Tensor, args: argparse.Namespace) -> torch.Tensor:
    """Weights after 4 steps of plain SGD, in float64, where rounding hides no wrong sum."""
    model = build(args, args.seed, data.device).double()
    batches = [draw_batch(data, step, args.seed, args) for step in range(4)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Run(method, every, model, outer=(1.0, 0.0)).train(batches, optimizer)
    return parameters_to_vector(model.parameters()).detach()


def train_all(
    data: torch.Tensor, held_out: torch.Tensor, args: argparse.Namespace
) -> dict[tuple[str, int], list[Run]]:
    """Every method on every seed: from the same weights, on the same windows."""
    methods = [("DDP", 1), *(("averaging", h) for h in args.every)]
    methods = list(dict.fromkeys([*methods, *(("DiLoCo", h) for h in args.diloco)]))
    runs: dict[tuple[str, int], list[Run]] = {method: [] for method in methods}
    quiet = None if dist.get_rank() == 0 else True
    for seed in tqdm(range(args.seed, args.seed + args.seeds), desc="seeds", disable=quiet):
        for method, every in methods:
            model = build(args, seed, data.device)
            run = Run(method, every, model, (args.outer_lr, args.outer_momentum))
            batches = (draw_batch(data, step, seed, args) for step in range(args.steps))
            optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, fused=True)
            run.train(batches, optimizer)
            with torch.no_grad():
                run.held_out = mean_loss(model, held_out).item()
            last = torch.stack(run.losses[-math.ceil(args.steps / 10) :]).mean()
            dist.all_reduce(last)  # a rank knows the loss of its own windows only
            run.train_loss = last.item() / dist.get_world_size()
            runs[method, every].append(run)
    return runs


def report(runs: dict[tuple[str, int], list[Run]], args: argparse.Namespace) -> list[dict]:
    """Print and return a row per method: means over the seeds, and the range of the differences."""
    say(f"{'':<20}{'MB sent per rank':>18}{'':>8}{'held out, and above DDP':>34}{'ms per':>14}")
    say(
        "method       H syncs  counted  formula   train    mean    mean (least to most)  drift  step"
    )
    rows, n = [], dist.get_world_size()
    size = sum(p.nbytes for p in runs["DDP", 1][0].model.parameters())
    for (method, every), group in runs.items():
        above = [x.held_out - y.held_out for x, y in zip(group, runs["DDP", 1], strict=True)]
        row = {
            "method": method,
            "every": every,
            "syncs": group[0].meter.calls,
            "sent": group[0].meter.sent,
            "formula": 2 * (n - 1) / n * size * (args.steps // every),
            "train": fmean(run.train_loss for run in group),
            "held_out": fmean(run.held_out for run in group),
            "above": above,
            "drift": fmean(drift for run in group for drift in run.drifts),
            "seconds": min(run.seconds for run in group) / args.steps,
        }
        rows.append(row)
        say(
            "{method:<10}{every:>4}{syncs:>6}{sent:>9.3f}{formula:>9.3f}{train:>8.3f}{held_out:>8.3f}"
            "{mean:>+8.3f} ({least:+.3f} to {most:+.3f}){drift:>7.4f}{seconds:>6.1f}".format_map(
                row
                | {"mean": fmean(above), "least": min(above), "most": max(above)}
                | {"sent": row["sent"] / 1e6, "formula": row["formula"] / 1e6}
                | {"seconds": row["seconds"] * 1e3}
            )
        )
    return rows


def plot(rows: list[dict], path: Path) -> None:
    """Held-out loss over bytes sent: the mean of the seeds, with their differences' range."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "ch03"
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for number, method in enumerate(("DDP", "averaging", "DiLoCo")):
        mine = [row for row in rows if row["method"] == method]
        sent, above = [row["sent"] / 1e6 for row in mine], [row["above"] for row in mine]
        mean = [fmean(x) for x in above]
        bars = [[m - min(x), max(x) - m] for m, x in zip(mean, above, strict=True)]
        style = {"marker": "os^"[number], "color": f"C{number}", "capsize": 3, "label": method}
        axis.errorbar(sent, mean, list(zip(*bars, strict=True)), **style)
        for row, x, y in zip(mine, sent, mean, strict=True):
            axis.annotate(
                f"H {row['every']}" * (number > 0),
                (x, y),
                (5, 5),
                textcoords="offset points",
                size=9,
            )
    axis.axhline(0, color="0.8", linewidth=1, zorder=0)
    sent = sorted({row["sent"] / 1e6 for row in rows})
    axis.set(xlabel="MB sent per rank", ylabel="held-out loss above DDP's (nats)", xscale="log")
    axis.set_xticks(sent, [f"{x:.2g}" for x in sent])
    axis.minorticks_off()
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None})


def run(args: argparse.Namespace, device: torch.device) -> bool:
    n, text = dist.get_world_size(), read_bytes(args.data, at_least=20 * args.context).to(device)
    data, held_out = text.split([len(text) * 9 // 10, len(text) - len(text) * 9 // 10])
    if args.plot and n == 1:
        stop("--plot: one rank sends nothing that could be drawn: type --nproc_per_node=2")
    runs = train_all(data, held_out.unfold(0, args.context + 1, args.context)[:512], args)
    say(
        f"{n} rank{'s' * (n > 1)} on {device.type}: {args.steps} steps of AdamW, {args.seeds} seeds"
    )
    rows = report(runs, args)
    if dist.get_rank() == 0 and args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    if dist.get_rank() == 0 and args.plot:
        plot(rows, args.plot)

    ddp, every_step = exact("DDP", 1, data, args), exact("averaging", 1, data, args)
    rarer, diloco = exact("averaging", 2, data, args), exact("DiLoCo", 2, data, args)
    spreads = [max_spread(run.model) for group in runs.values() for run in group]
    off = torch.tensor([abs(row["sent"] - row["formula"]) for row in rows]).max().item()
    above = {
        name: torch.tensor([fmean(row["above"]) for row in rows if row["method"] == name])
        for name in ("averaging", "DiLoCo")
    }
    cost = (above["averaging"].max() - above["averaging"].min()).item()
    held = [
        check("SGD, H 1: max |averaging - DDP|", (every_step - ddp).abs().max().item(), 1e-12),
        check("H 2: max |DiLoCo(1, 0) - averaging|", (diloco - rarer).abs().max().item(), 1e-12),
        check(
            "spread of weights over ranks after the last sync",
            torch.tensor(spreads).max().item(),
            0,
        ),
        check("bytes sent, off the formula", off, 0.5),
        check("averaging: what H costs of held-out loss", cost, 0.1),
        check("DiLoCo: held-out loss above DDP's", above["DiLoCo"].max().item(), 1),
    ]
    if n > 1 and 1 in args.every:  # AdamW's steps are as long for noise as for a gradient
        first = parameters_to_vector(build(args, args.seed, device).parameters())
        mine, theirs = (
            parameters_to_vector(runs[method, 1][0].model.parameters()) - first
            for method in ("averaging", "DDP")
        )
        way, apart = mine.norm() / theirs.norm(), (mine - theirs).norm() / theirs.norm()
        say(f"AdamW, H 1: averaging goes {way:.2f} of DDP's way, and ends {apart:.2f} of it apart")
    return all(held)


def max_spread(model: nn.Module) -> float:
    """Largest difference of any weight from rank 0's."""
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    rank_0s = flat.clone()
    dist.broadcast(rank_0s, src=0)
    return (flat - rank_0s).abs().max().item()


def check(claim: str, value: float, bound: float) -> bool:
    """Print whether the worst rank keeps `value` within `bound`; every rank gets the same answer."""
    values = [0.0] * dist.get_world_size()
    dist.all_gather_object(values, value)
    held = all(v <= bound for v in values)  # not so for NaN
    say(f"check: {claim} = {max(values):.3g} <= {bound:.3g}  {'ok' if held else 'FAILED'}")
    return held


def say(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def read_bytes(path: Path, at_least: int) -> torch.Tensor:
    """The file's bytes as integers from 0 to 255: [bytes]."""
    try:
        text = path.read_bytes()
    except OSError as error:
        stop(f"cannot read {path} ({error.strerror}): give a text file with --data FILE")
    if len(text) < at_least:
        stop(f"{path} has {len(text)} bytes, this run needs {at_least}: give a longer --data FILE")
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


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


def above_zero(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: stop(f"{message}: --help lists the flags")
    chapter = Path(__file__).resolve().parents[1]
    add = parser.add_argument
    add("--data", type=Path, default=chapter / "main.md", help="text; default: the chapter")
    add("--steps", type=positive, default=48, help="inner optimizer steps of every method")
    add(
        "--every",
        type=positive,
        nargs="+",
        default=[1, 2, 4, 8, 16],
        help="H, local steps per sync",
    )
    add("--diloco", type=positive, nargs="+", default=[4, 16], help="H of DiLoCo")
    add("--batch", type=positive, default=4, help="windows of text per step and rank")
    add("--context", type=positive, default=32, help="bytes per window")
    add("--width", type=positive, default=32, help="size of a token's vector")
    add("--layers", type=positive, default=1, help="transformer blocks")
    add("--heads", type=positive, default=4, help="attention heads; 2 x heads divides --width")
    add("--lr", type=above_zero, default=0.01, help="learning rate of AdamW, the inner optimizer")
    add("--outer-lr", type=above_zero, default=0.7, help="DiLoCo's outer learning rate")
    add("--outer-momentum", type=float, default=0.9, help="and Nesterov momentum, from 0 to 1")
    add("--seeds", type=positive, default=3, help="runs per method, over which losses are averaged")
    add("--seed", type=int, default=0, help="the first one, for weights and batches")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--json", type=Path, help="also write the rows to this file")
    add("--plot", type=Path, help="also draw loss over bytes into this SVG file")
    args = parser.parse_args()
    for every in (*args.every, *args.diloco):
        if args.steps % every:
            stop(
                f"--steps {args.steps} is no multiple of H = {every}: every run must end in a sync"
            )
    if not 0 <= args.outer_momentum < 1:
        stop(f"--outer-momentum {args.outer_momentum} is not in [0, 1)")
    if args.width % (2 * args.heads):
        stop(f"--width {args.width} is no multiple of 2 x --heads {args.heads}")
    for flag in ("json", "plot"):
        path = getattr(args, flag)
        if path and not path.parent.is_dir():
            stop(f"--{flag} {path}: there is no folder {path.parent}")
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
