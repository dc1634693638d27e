"""Requests of very different lengths on several ranks: fixed shares against one queue for all.

    torchrun --nproc_per_node=2 chapter1-introduction-to-modern-distributed-ai/code/ch01_distributed_inference.py --plot chapter1-introduction-to-modern-distributed-ai/figures/schedules.svg

On GPUs:
    torchrun --nproc_per_node=8 chapter1-introduction-to-modern-distributed-ai/code/ch01_distributed_inference.py --requests 256 --longest 2000 --width 1024 --layers 12 --heads 16

Look at the idle time: with fixed shares, ranks wait for the one that drew the long requests.
And at the bound: no schedule ends before the longest request does, or before all the work shared
evenly. The weights are random: a byte costs the same whatever it says. Section 1.7.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record


@dataclass
class Answer:
    """What one rank wrote for one request, and when, in seconds on the wall clock."""

    request: int
    rank: int
    start: float
    end: float
    written: bytes


def draw_lengths(args: argparse.Namespace) -> list[int]:
    """Bytes to write per request: log-normal, sigma 1.5, so a few are far longer than the rest."""
    draw = torch.Generator().manual_seed(args.seed)
    normal = torch.randn(args.requests, generator=draw)
    lengths = (args.median * (1.5 * normal).exp()).round().clamp(1, args.longest)
    return [int(length) for length in lengths]


@torch.no_grad()
def generate(model: nn.Module, prompt: torch.Tensor, count: int) -> bytes:
    """Greedy decoding; every byte runs the whole window again, so all bytes cost the same."""
    tokens = prompt.to(next(model.parameters()).device)[None]  # [1, context]
    for _ in range(count):
        best = model(tokens[:, -model.context :])[:, -1:].argmax(-1)  # [1, 1]
        tokens = torch.cat([tokens, best], dim=1)
    return bytes(tokens[0, len(prompt) :].tolist())


def tickets(store: dist.TCPStore, name: str, order: list[int]) -> Iterator[int]:
    """The next request that no rank has taken: `add` counts up by one, for one rank at a time."""
    while (ticket := store.add(name, 1) - 1) < len(order):
        yield order[ticket]


def serve(
    model: nn.Module, prompts: torch.Tensor, lengths: list[int], requests: Iterator[int]
) -> tuple[list[Answer], float]:
    """Answer what `requests` yields; return the answers, and the time when nothing was left."""
    answers = []
    start = time.time()
    for request in requests:
        written = generate(model, prompts[request], lengths[request])
        end = time.time()
        answers.append(Answer(request, dist.get_rank(), start, end, written))
        start = end  # so the time to draw the next ticket counts as the next request's
    return answers, time.time()


def times_of_run(answers: list[Answer], finished: list[float], ranks: int) -> dict:
    """Makespan and more of one run, in seconds; `bound`: no schedule of the same work is faster."""
    seconds = [a.end - a.start for a in answers]
    first = min(a.start for a in answers)
    last = max(a.end for a in answers)
    return {
        "makespan": last - first,
        "busy": [sum(a.end - a.start for a in answers if a.rank == r) for r in range(ranks)],
        "idle": 1 - sum(seconds) / (ranks * (last - first)),
        "bound": max(sum(seconds) / ranks, max(seconds)),  # shared evenly, or the longest request
        "wait": last - min(finished),
        "longest": max(seconds),
        "answers": answers,
    }


def run(args: argparse.Namespace, device: torch.device) -> list[bool | None]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(1)  # torchrun sets this for several ranks only
    lengths = draw_lengths(args)
    torch.manual_seed(args.seed)
    prompts = torch.randint(256, (args.requests, args.context))
    model = ByteLM(args.width, args.layers, args.heads, args.context).to(device).eval()
    # The store where the ranks met: at the address that torchrun told them.
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False)

    arrival = list(range(args.requests))
    longest_first = sorted(arrival, key=lambda request: -lengths[request])
    orders = {"fixed shares": arrival, "queue": arrival, "longest first": longest_first}
    runs = {name: [] for name in orders}
    generate(model, prompts[0], 10)  # warm up
    for repeat in range(args.repeats):
        for name, order in orders.items():
            requests = tickets(store, f"{name} {repeat}", order)
            if name == "fixed shares":
                requests = iter(order[rank::world_size])
            dist.barrier()
            reports = [None] * world_size
            dist.all_gather_object(reports, serve(model, prompts, lengths, requests))
            answers = [answer for answered, _ in reports for answer in answered]
            runs[name].append(
                times_of_run(answers, [finished for _, finished in reports], world_size)
            )

    total = sum(lengths)
    plural = "s" * (world_size > 1)
    say(f"{world_size} rank{plural} on {device.type}: {args.requests} requests for {total:,} bytes")
    median = statistics.median(lengths)
    say(f"length        {min(lengths)} to {max(lengths)} bytes, median {median:g}")
    columns = ("makespan s", "spread", "bound s", "busy s", "idle", "bytes/s")
    say("{:<15}{:>10}{:>8}{:>9}{:>16}{:>6}{:>9}".format("schedule", *columns))
    shown = {}
    for name, repeats in runs.items():
        repeats.sort(key=lambda run: run["makespan"])
        shown[name] = middle = repeats[(args.repeats - 1) // 2]
        spread = repeats[-1]["makespan"] / repeats[0]["makespan"]
        busy = f"{min(middle['busy']):.2f} .. {max(middle['busy']):.2f}"
        say(
            f"{name:<15}{middle['makespan']:>10.2f}{spread:>8.2f}{middle['bound']:>9.2f}"
            f"{busy:>16}{middle['idle']:>6.0%}{total / middle['makespan']:>9,.0f}"
        )
    say(f"median of {args.repeats} runs; spread: the slowest over the fastest")
    if args.plot and rank == 0:
        plot(shown, args.plot)
    if args.json and rank == 0:
        keys = ("makespan", "bound", "busy", "idle")
        result = {name: [{k: run[k] for k in keys} for run in rs] for name, rs in runs.items()}
        args.json.write_text(json.dumps(result, indent=1) + "\n")

    everything = [run for repeats in runs.values() for run in repeats]
    missed = sum(sorted(a.request for a in run["answers"]) != arrival for run in everything)
    first = {a.request: a.written for a in everything[0]["answers"]}
    changed = sum(a.written != first[a.request] for run in everything for a in run["answers"])
    some = arrival[:4] if rank == 0 else []  # by itself, while the others wait
    wrong = sum(generate(model, prompts[r], lengths[r]) != first[r] for r in some)
    queued = runs["queue"] + runs["longest first"]
    wait = max(run["wait"] / run["longest"] for run in queued)
    return [
        check(f"runs of {len(everything)} that miss or repeat a request", missed, 0),
        check("answers that depend on the schedule", changed, 0),
        check("answers that differ from those of rank 0 alone", wrong, 0),
        expect("longest wait at a queue's end / longest request", wait, 1, args.strict),
    ]


def plot(shown: dict[str, dict], path: Path) -> None:
    """Draw who answered which request when, one panel per schedule; a bar's number is its bytes."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "ch01"
    from matplotlib import pyplot

    n = len(shown["queue"]["busy"])
    size = (8.5, len(shown) * (0.55 + 0.33 * n) + 0.5)
    figure, axes = pyplot.subplots(len(shown), 1, figsize=size, sharex=True)
    for axis, (name, run) in zip(axes, shown.items(), strict=True):
        origin = min(a.start for a in run["answers"])
        longest = max(len(a.written) for a in run["answers"])
        for a in run["answers"]:
            share = len(a.written) / longest
            shade = pyplot.get_cmap("Blues")(0.2 + 0.4 * share)
            bar = axis.barh(a.rank, a.end - a.start, left=a.start - origin, color=shade, ec="white")
            if share > 0.3:
                axis.bar_label(bar, [len(a.written)], label_type="center", size=8)
        axis.axvline(run["bound"], color="#c0392b", linestyle="--", linewidth=1.2)
        axis.set_title(f"{name}: {run['makespan']:.2f} s, {run['idle']:.0%} idle", loc="left")
        axis.set_yticks(range(n), [f"rank {rank}" for rank in range(n)])
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("seconds; a bar is a request, its number the bytes; dashed: the bound")
    figure.tight_layout()
    figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None})


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=24, help="requests to answer")
    parser.add_argument("--median", type=int, default=10, help="median bytes to write")
    parser.add_argument("--longest", type=int, default=500, help="most bytes to write")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each schedule")
    parser.add_argument("--context", type=int, default=64, help="bytes per prompt and window")
    parser.add_argument("--width", type=int, default=64, help="size of a token's vector")
    parser.add_argument("--layers", type=int, default=2, help="transformer blocks")
    parser.add_argument("--heads", type=int, default=4, help="attention heads; divides --width")
    parser.add_argument("--seed", type=int, default=0, help="for weights, prompts and lengths")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--plot", type=Path, help="also draw the schedules to this SVG file")
    parser.add_argument("--json", type=Path, help="also write each run's seconds to this file")
    parser.add_argument(
        "--strict", action="store_true", help="exit 1 if an `expect:` line does not hold"
    )
    return parser.parse_args()


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


# Copied from ch01_single_gpu_baseline.Block
class Block(nn.Module):
    """Attention, then a two-layer MLP, each added to what comes in."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [batch, seq, width]
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [batch, heads, seq, head_dim]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


# Copied from ch01_single_gpu_baseline.ByteLM
class ByteLM(nn.Module):
    """A decoder-only transformer (GPT-2's shape) whose tokens are bytes."""

    def __init__(self, width: int, layers: int, heads: int, context: int):
        super().__init__()
        self.context = context
        self.embed, self.position = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:  # [batch, seq] -> [batch, seq, 256]
        x = self.embed(tokens) + self.position.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


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
