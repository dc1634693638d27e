"""The eight collectives on tensors small enough to read: what each rank holds before and after.

    torchrun --nproc_per_node=3 chapter1-introduction-to-modern-distributed-ai/code/ch01_collectives.py --plot chapter1-introduction-to-modern-distributed-ai/figures/collectives.svg

On GPUs:
    torchrun --nproc_per_node=8 chapter1-introduction-to-modern-distributed-ai/code/ch01_collectives.py

A digit says which chunk a number came from, its place says which rank: 200 is chunk 1 of rank 2.
So 222 is the sum of chunk 1 over three ranks. Dots hold nothing; ? is left undefined. Section 1.6.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

# Who calls it, and the part of a whole tensor that the busiest of n ranks must send or receive
# (bus bandwidth divides by the same factors: nccl-tests, doc/PERFORMANCE.md and src/).
COLLECTIVES = {
    "broadcast": (lambda n: float(n > 1), "1", "DDP: the first weights, later the buffers"),
    "reduce": (lambda n: float(n > 1), "1", "metrics that only rank 0 reports"),
    "all_reduce": (lambda n: 2 * (n - 1) / n, "2(n-1)/n", "DDP and tensor parallelism"),
    "gather": (lambda n: (n - 1) / n, "(n-1)/n", "results and metrics, to rank 0"),
    "all_gather": (lambda n: (n - 1) / n, "(n-1)/n", "FSDP, ZeRO: weights before use"),
    "scatter": (lambda n: (n - 1) / n, "(n-1)/n", "work or data, from rank 0"),
    "reduce_scatter": (lambda n: (n - 1) / n, "(n-1)/n", "FSDP, ZeRO: gradients"),
    "all_to_all": (lambda n: (n - 1) / n, "(n-1)/n", "MoE: tokens to experts and back"),
}
ROOT_HOLDS_ALL = ("broadcast", "scatter")
EACH_HOLDS_ONE_CHUNK = ("gather", "all_gather")
Table = list[list[int | None]]  # [ranks][chunks]; 0 is nothing, None is undefined


def collect(op: str, tensor: torch.Tensor) -> torch.Tensor:
    """Run one collective on this rank's chunks, [n] -> [n]; rank 0 is the root."""
    rank = dist.get_rank()
    after = torch.zeros_like(tensor)
    chunks, slots = list(tensor.split(1)), list(after.split(1))  # views: one chunk for each rank
    match op:
        case "broadcast":
            dist.broadcast(after.copy_(tensor), src=0)
        case "reduce":
            dist.reduce(after.copy_(tensor), dst=0)
        case "all_reduce":
            dist.all_reduce(after.copy_(tensor))
        case "gather":
            dist.gather(chunks[rank], slots if rank == 0 else None, dst=0)
        case "all_gather":
            dist.all_gather(slots, chunks[rank])
        case "scatter":
            dist.scatter(slots[rank], chunks if rank == 0 else None, src=0)
        case "reduce_scatter":
            dist.reduce_scatter(slots[rank], chunks)
        case "all_to_all":
            dist.all_to_all_single(after, tensor)
    return after


def mark(rank: int, chunk: int, ranks: int) -> int:
    """A number that tells its rank and chunk: by place and digit, or 100s and 1s on many ranks."""
    return (chunk + 1) * 10**rank if ranks <= 6 else 100 * (rank + 1) + chunk


def before(op: str, ranks: int) -> Table:
    """What each rank starts with."""
    rows = [[mark(rank, chunk, ranks) for chunk in range(ranks)] for rank in range(ranks)]
    if op in ROOT_HOLDS_ALL:
        return rows[:1] + [[0] * ranks for _ in rows[1:]]
    if op in EACH_HOLDS_ONE_CHUNK:
        return [[x * (c == r) for c, x in enumerate(row)] for r, row in enumerate(rows)]
    return rows


def expected(op: str, start: Table) -> Table:
    """What each rank must end with, by the definition (MPI 4.1, chapter 6) and plain arithmetic."""
    ranks = len(start)
    sums = [sum(column) for column in zip(*start, strict=True)]
    nothing = [0] * ranks
    undefined = [None] * ranks
    match op:
        case "broadcast":
            return [start[0]] * ranks
        case "reduce":
            return [sums] + [undefined] * (ranks - 1)
        case "all_reduce":
            return [sums] * ranks
        case "gather":
            return [[start[r][r] for r in range(ranks)]] + [nothing] * (ranks - 1)
        case "all_gather":
            return [[start[r][r] for r in range(ranks)]] * ranks
        case "scatter":
            return [[start[0][c] * (c == r) for c in range(ranks)] for r in range(ranks)]
        case "reduce_scatter":
            return [[sums[c] * (c == r) for c in range(ranks)] for r in range(ranks)]
        case "all_to_all":
            return [list(column) for column in zip(*start, strict=True)]
    raise ValueError(op)


def run(args: argparse.Namespace, device: torch.device) -> list[bool | None]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    ops = [args.op] if args.op else list(COLLECTIVES)
    plural = "s" * (world_size > 1)
    width = len(str(sum(mark(r, world_size - 1, world_size) for r in range(world_size)))) + 1
    say(f"{world_size} rank{plural} on {device.type}: {world_size} chunk{plural} on each rank")
    pictures = {}
    errors = {}  # elements of this rank that are not what they must be
    for op in ops:
        start = before(op, world_size)
        want = expected(op, start)[rank]
        tensor = torch.tensor(start[rank], device=device)  # [ranks] int64
        got = collect(op, tensor).tolist()
        errors[op] = sum(w is not None and g != w for g, w in zip(got, want, strict=True))
        got = [None if w is None else g for g, w in zip(got, want, strict=True)]
        reports = [None] * world_size
        dist.all_gather_object(reports, (tensor.tolist(), got))
        starts, ends = zip(*reports, strict=True)
        pictures[op] = starts, ends
        say(f"{op:<15}{'before':<{world_size * width + 3}}after")
        for r in range(world_size):
            say(f"  rank {r:<7}{written(starts[r], width)}   {written(ends[r], width)}")

    size = world_size * torch.int64.itemsize
    say(f"\nS = {size} bytes on each rank; the busiest rank must send, or receive, at least:")
    say(f"{'collective':<15}{'of S':<9}{'bytes':>6}  who uses it")
    for op in ops:
        part, formula, user = COLLECTIVES[op]
        say(f"{op:<15}{formula:<9}{part(world_size) * size:>6.0f}  {user}")
    if args.plot and rank == 0:
        plot(pictures, args.plot)
    wrong = [op for op in ops if errors[op]]
    return [check(" ".join(["wrong elements", *wrong]), sum(errors.values()), 0)]


def written(row: list[int | None], width: int) -> str:
    return "".join(f"{'?' if x is None else x or '.':>{width}}" for x in row)


def plot(pictures: dict[str, tuple[Table, Table]], path: Path) -> None:
    """Draw the run's tensors before and after: a colour per rank, all of them under a sum."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "ch01"
    from matplotlib import pyplot
    from matplotlib.patches import Rectangle

    n = len(next(iter(pictures.values()))[0])
    hues = [pyplot.get_cmap("tab10")(r % 10) for r in range(n)]
    hue_of = {mark(r, c, n): hues[r] for r in range(n) for c in range(n)}
    columns = min(4, len(pictures))
    lines = -(-len(pictures) // columns)
    size = (3.3 * columns, lines * (3.3 * (n + 0.6) / (2 * n + 2.2) + 0.5))
    figure, axes = pyplot.subplots(lines, columns, figsize=size, squeeze=False)
    for axis, (op, tables) in zip(axes.flat, pictures.items(), strict=True):
        cells = [
            (left + column, row, number)
            for left, table in zip((0, n + 1.1), tables, strict=True)
            for row, numbers in enumerate(table)
            for column, number in enumerate(numbers)
        ]
        for x, y, number in cells:
            fill = hue_of.get(number, "#30363d") if number else "#f0f0ee"
            axis.add_patch(Rectangle((x + 0.04, y + 0.04), 0.92, 0.92, color=fill, linewidth=0))
            for r in range(n) if number and number not in hue_of else ():
                bar = (x + 0.04 + r * 0.92 / n, y + 0.8)  # who is in the sum
                axis.add_patch(Rectangle(bar, 0.92 / n, 0.16, color=hues[r], linewidth=0))
            text = "?" if number is None else str(number or "")
            ink = {"color": "white" if number else "#8a8a85", "weight": "bold"}
            points = min(11, 68 / n / max(len(text), 3) ** 0.8)
            place = {"ha": "center", "va": "center_baseline"}
            axis.text(x + 0.5, y + 0.47, text, fontsize=points, **ink, **place)
        for r in range(n):
            axis.text(-0.15, r + 0.5, f"rank {r}", ha="right", va="center", color="#444", size=8)
        arrow = {"arrowstyle": "-|>", "color": "#444", "lw": 1.4}
        axis.annotate("", (n + 1.0, n / 2), (n + 0.1, n / 2), arrowprops=arrow)
        below = {"ha": "center", "va": "top", "color": "#444", "size": 8}
        axis.text(n + 0.55, n * 1.05, COLLECTIVES[op][2], **below)
        axis.set_title(op.replace("_", "-"), weight="bold", color="#111", size=11)
        axis.set(xlim=(-1.0, 2 * n + 1.2), ylim=(n + 0.5, -0.1), aspect="equal")
        axis.set_axis_off()
    figure.tight_layout()
    figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None})


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--op", choices=COLLECTIVES, help="this collective only; default: all eight"
    )
    parser.add_argument("--plot", type=Path, help="also draw the tensors to this SVG file")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
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
