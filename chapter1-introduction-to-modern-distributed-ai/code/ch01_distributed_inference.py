"""Requests of very different lengths on several ranks: fixed shares against one queue for all.

    torchrun --nproc_per_node=2 chapter1-introduction-to-modern-distributed-ai/code/ch01_distributed_inference.py
    torchrun --nproc_per_node=3 chapter1-introduction-to-modern-distributed-ai/code/ch01_distributed_inference.py --requests 9 --repeats 1

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

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


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
def generate(model: ByteLM, prompt: torch.Tensor, count: int) -> bytes:
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
    model: ByteLM, prompts: torch.Tensor, lengths: list[int], mine: Iterator[int]
) -> tuple[list[Answer], float]:
    """Answer what `mine` yields; return the answers, and the time when nothing was left."""
    answers, start = [], time.time()
    for request in mine:
        written = generate(model, prompts[request], lengths[request])
        end = time.time()
        answers.append(Answer(request, dist.get_rank(), start, end, written))
        start = end  # so the time to draw the next ticket counts as the next request's
    return answers, time.time()


def measure(answers: list[Answer], finished: list[float], ranks: int) -> dict:
    """Makespan and more of one run, in seconds; `bound`: no schedule of the same work is faster."""
    seconds = [a.end - a.start for a in answers]
    first, last = min(a.start for a in answers), max(a.end for a in answers)
    return {
        "makespan": last - first,
        "busy": [sum(a.end - a.start for a in answers if a.rank == r) for r in range(ranks)],
        "idle": 1 - sum(seconds) / (ranks * (last - first)),
        "bound": max(sum(seconds) / ranks, max(seconds)),  # shared evenly, or the longest request
        "wait": last - min(finished),
        "longest": max(seconds),
        "answers": answers,
    }


def run(args: argparse.Namespace, device: torch.device) -> bool:
    rank, n = dist.get_rank(), dist.get_world_size()
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
            shared = tickets(store, f"{name} {repeat}", order)
            mine = iter(order[rank::n]) if name == "fixed shares" else shared
            dist.barrier()
            reports = [None] * n
            dist.all_gather_object(reports, serve(model, prompts, lengths, mine))
            answers = [answer for answered, _ in reports for answer in answered]
            runs[name].append(measure(answers, [finished for _, finished in reports], n))

    total, median = sum(lengths), statistics.median(lengths)
    say(f"{n} rank{'s' * (n > 1)} on {device.type}: {args.requests} requests for {total:,} bytes")
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
    if rank == 0 and args.plot:
        plot(shown, args.plot)
    if rank == 0 and args.json:
        keys = ("makespan", "bound", "busy", "idle")
        record = {
            name: [{k: run[k] for k in keys} for run in found] for name, found in runs.items()
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")

    everything = [run for repeats in runs.values() for run in repeats]
    missed = sum(sorted(a.request for a in run["answers"]) != arrival for run in everything)
    first = {a.request: a.written for a in everything[0]["answers"]}
    changed = sum(a.written != first[a.request] for run in everything for a in run["answers"])
    some = arrival[:4] if rank == 0 else []  # alone, while the others wait
    wrong = sum(generate(model, prompts[r], lengths[r]) != first[r] for r in some)
    wait = max(
        0.0, *(run["wait"] / run["longest"] for run in runs["queue"] + runs["longest first"])
    )
    return all(
        [
            check(f"runs of {len(everything)} that miss or repeat a request", missed, 0),
            check("answers that depend on the schedule", changed, 0),
            check("answers that differ from rank 0 alone", wrong, 0),
            check("queue: longest wait at the end / longest request", wait, 1),
        ]
    )


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


def check(claim: str, value: float, bound: float) -> bool:
    """Print whether the worst rank keeps `value` within `bound`; all ranks get the same answer."""
    values = [0.0] * dist.get_world_size()
    dist.all_gather_object(values, value)
    held = all(v <= bound for v in values)  # false for NaN
    say(f"check: {claim} = {max(values):.3g} <= {bound:.3g}  {'ok' if held else 'FAILED'}")
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


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: stop(f"{message}: --help lists the flags")
    parser.add_argument("--requests", type=positive, default=24, help="requests to answer")
    parser.add_argument("--median", type=positive, default=10, help="median bytes to write")
    parser.add_argument("--longest", type=positive, default=500, help="most bytes to write")
    parser.add_argument("--repeats", type=positive, default=3, help="runs of each schedule")
    parser.add_argument("--context", type=positive, default=64, help="bytes per prompt and window")
    parser.add_argument("--width", type=positive, default=64, help="size of a token's vector")
    parser.add_argument("--layers", type=positive, default=2, help="transformer blocks")
    parser.add_argument("--heads", type=positive, default=4, help="attention heads")
    parser.add_argument("--seed", type=int, default=0, help="for weights, prompts and lengths")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--plot", type=Path, help="also draw the schedules to this SVG file")
    parser.add_argument("--json", type=Path, help="also write each run's seconds to this file")
    args = parser.parse_args()
    if args.width % args.heads:
        stop(f"--heads {args.heads} does not divide --width {args.width}")
    for path in filter(None, (args.plot, args.json)):
        try:
            path.open("a").close()  # or it would fail after the work
        except OSError as error:
            stop(f"cannot write {path} ({error.strerror}): give another file")
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
