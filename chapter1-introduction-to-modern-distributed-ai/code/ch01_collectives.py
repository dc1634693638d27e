"""The eight collectives on tensors small enough to read: what each rank holds before and after.

    torchrun --nproc_per_node=2 chapter1-introduction-to-modern-distributed-ai/code/ch01_collectives.py
    torchrun --nproc_per_node=3 chapter1-introduction-to-modern-distributed-ai/code/ch01_collectives.py --op all_reduce

On GPUs:
    torchrun --nproc_per_node=8 chapter1-introduction-to-modern-distributed-ai/code/ch01_collectives.py

A digit says which chunk a number came from, its place says which rank: 200 is chunk 1 of rank 2.
So 222 is the sum of chunk 1 over three ranks. Dots hold nothing; ? is left undefined. Section 1.6.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

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
ROOT_HOLDS_ALL, EACH_HOLDS_ITS_OWN = ("broadcast", "scatter"), ("gather", "all_gather")
Table = list[list[int | None]]  # [ranks][chunks]; 0 is nothing, None is undefined


def collect(op: str, tensor: torch.Tensor) -> torch.Tensor:
    """Run one collective on this rank's chunks, [n] -> [n]; rank 0 is the root."""
    rank, after = dist.get_rank(), torch.zeros_like(tensor)
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
    if op in EACH_HOLDS_ITS_OWN:
        return [[x * (c == r) for c, x in enumerate(row)] for r, row in enumerate(rows)]
    return rows


def expected(op: str, start: Table) -> Table:
    """What each rank must end with, by the definition (MPI 4.1, chapter 6) and plain arithmetic."""
    ranks = len(start)
    sums = [sum(column) for column in zip(*start, strict=True)]
    nothing, undefined = [0] * ranks, [None] * ranks
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


def run(args: argparse.Namespace, device: torch.device) -> bool:
    rank, n = dist.get_rank(), dist.get_world_size()
    ops = [args.op] if args.op else list(COLLECTIVES)
    width = len(str(sum(mark(r, n - 1, n) for r in range(n)))) + 1
    ranks = f"{n} rank{'s' * (n > 1)}"
    say(f"{ranks} on {device.type}: {n} chunk{'s' * (n > 1)} on each rank")
    pictures, wrong = {}, {}
    for op in ops:
        start = before(op, n)
        tensor = torch.tensor(start[rank], device=device)  # [ranks] int64
        got, want = collect(op, tensor).tolist(), expected(op, start)[rank]
        errors = sum(w is not None and g != w for g, w in zip(got, want, strict=True))
        got = [None if w is None else g for g, w in zip(got, want, strict=True)]
        reports = [None] * n
        dist.all_gather_object(reports, (tensor.tolist(), got, errors))
        starts, ends, counts = zip(*reports, strict=True)
        pictures[op], wrong[op] = (starts, ends), sum(counts)
        say(f"{op:<15}{'before':<{n * width + 3}}after")
        for r in range(n):
            say(f"  rank {r:<7}{written(starts[r], width)}   {written(ends[r], width)}")

    size = n * torch.int64.itemsize
    say(f"\nS = {size} bytes on each rank; the busiest rank must send, or receive, at least:")
    say(f"{'collective':<15}{'of S':<9}{'bytes':>6}  who uses it")
    for op in ops:
        part, formula, user = COLLECTIVES[op]
        say(f"{op:<15}{formula:<9}{part(n) * size:>6.0f}  {user}")
    if args.plot and rank == 0:
        plot(pictures, args.plot)
    held = []
    for op in ops:
        defined = sum(x is not None for row in expected(op, before(op, n)) for x in row)
        held.append(check(f"{op} on {ranks}: wrong elements of {defined}", wrong[op], 0))
    return all(held)


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


def check(claim: str, value: float, bound: float) -> bool:
    """Print whether the worst rank keeps `value` within `bound`; every rank gets the same answer."""
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


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: stop(f"{message}: --help lists the flags")
    parser.add_argument(
        "--op", choices=COLLECTIVES, help="this collective only; default: all eight"
    )
    parser.add_argument("--plot", type=Path, help="also draw the tensors to this SVG file")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args()
    try:
        if args.plot:
            args.plot.open("ab").close()
    except OSError as error:
        stop(f"cannot write {args.plot} ({error.strerror}): give another file with --plot FILE")
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
