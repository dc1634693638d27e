"""Latency and bandwidth between every two ranks, by ping-pong: two tables that find the slow link.

    torchrun --nproc_per_node=2 chapter2-gpu-hardware-networking-and-parallelism-strategies/code/p2p_latency.py
    torchrun --nproc_per_node=3 chapter2-gpu-hardware-networking-and-parallelism-strategies/code/p2p_latency.py --bytes 256K --repeats 20

On GPUs:
    torchrun --nproc_per_node=8 chapter2-gpu-hardware-networking-and-parallelism-strategies/code/p2p_latency.py --bytes 256M

A table of equal machines and good cables is flat. A cell that stands out is a link to look at, a
row or column that stands out is a machine. Section 2.2.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

SMALL = 8  # bytes: one int64, all latency
Matrix = list[list[float]]  # [from][to], seconds; NaN where nothing was measured


def ping_pong(first: int, second: int, size: int, args: argparse.Namespace) -> tuple[list, int]:
    """Half round trips between two ranks in seconds, timed by the first, and how many came back wrong.

    Half a round trip is the time of one message (OSU's osu_latency, MPI's ping-pong). Each message
    is full of a number that tells its iteration and its ranks, and the second rank only echoes.
    """
    rank, n = dist.get_rank(), dist.get_world_size()
    message = torch.zeros(size // SMALL, dtype=torch.int64, device=args.where)
    answer = torch.zeros_like(message)
    times, wrong = [], 0
    for iteration in range(args.warmup + args.repeats):
        if rank == second:
            dist.recv(answer, first)
            dist.send(answer, first)
            continue
        number = ((iteration + args.seed) * n + first) * n + second + 1  # never 0
        message.fill_(number)
        answer.zero_()
        synchronize(args.where)
        start = time.perf_counter()
        dist.send(message, second)
        dist.recv(answer, second)
        synchronize(args.where)
        times.append((time.perf_counter() - start) / 2)
        wrong += int((answer != number).any())
    return times[args.warmup :], wrong


def measure(size: int, args: argparse.Namespace) -> tuple[Matrix, Matrix, int]:
    """Fastest and median seconds of a message from rank to rank, and the wrong messages of all.

    One pair at a time; the others sleep in the barrier that the pair is late for.
    """
    rank, n = dist.get_rank(), dist.get_world_size()
    errors, (fastest, median) = 0, ([float("nan")] * n for _ in range(2))
    for first in range(n):
        for second in range(n):
            if first != second and rank in (first, second):
                times, wrong = ping_pong(first, second, size, args)
                errors += wrong
                if rank == first:
                    fastest[second], median[second] = min(times), statistics.median(times)
            dist.barrier()
    reports: list = [None] * n
    dist.all_gather_object(reports, (fastest, median, errors))
    fast_rows, median_rows, wrong_counts = zip(*reports, strict=True)
    return list(fast_rows), list(median_rows), sum(wrong_counts)


def between(matrix: Matrix) -> dict[tuple[int, int], float]:
    """The cells off the diagonal, by (from, to)."""
    n = range(len(matrix))
    return {(a, b): matrix[a][b] for a in n for b in n if a != b}


def show(title: str, cells: dict[tuple[int, int], float], n: int, form: str) -> None:
    say(f"{title:<16}" + "".join(f"{f'to {b}':>9}" for b in range(n)))
    for a in range(n):
        row = (format(cells[a, b], form) if a != b else "-" for b in range(n))
        say(f"{f'  from {a}':<16}" + "".join(f"{cell:>9}" for cell in row))


def run(args: argparse.Namespace, device: torch.device) -> bool:
    n, args.where = dist.get_world_size(), device
    large = args.bytes // SMALL * SMALL
    small_fastest, small_median, small_wrong = measure(SMALL, args)
    large_fastest, large_median, large_wrong = measure(large, args)
    short, long = between(small_fastest), between(large_fastest)
    alpha = {pair: short[pair] * 1e6 for pair in short}
    rate = {pair: large / long[pair] / 1e9 for pair in long}
    beta = {p: (large - SMALL) / max(long[p] - short[p], 1e-9) / 1e9 for p in long}

    say(f"{n} ranks on {device.type}: ping-pong by {dist.get_backend()}, fastest of {args.repeats}")
    show("latency (us)", alpha, n, ".0f")
    show("rate (GB/s)", rate, n, ".2f")
    say(f"one message of {SMALL} bytes, and one of {large:,}; t = alpha + S / beta between them:")
    say(f"{'':<16}{'min':>9}{'median':>9}{'max':>9}  slowest")
    for name, cells, worst in (("alpha (us)", alpha, max), ("beta (GB/s)", beta, min)):
        a, b = worst(cells, key=lambda pair: cells[pair])
        values = (min(cells.values()), statistics.median(cells.values()), max(cells.values()))
        columns = "".join(f"{value:>9.{2 * (worst is min)}f}" for value in values)
        ratio = max(cells[a, b], values[1]) / min(cells[a, b], values[1])
        say(f"  {name:<14}{columns}  {a} to {b}, {ratio:.2f} times off the median")
    if dist.get_rank() == 0 and args.json:
        record = {"world_size": n, "device": device.type, "bytes": [SMALL, large]}
        record |= {"fastest_s": [listed(small_fastest), listed(large_fastest)]}
        record |= {"median_s": [listed(small_median), listed(large_median)]}
        pairs = [
            {"from": p[0], "to": p[1], "alpha_us": alpha[p], "beta_gb_per_s": beta[p]} for p in beta
        ]
        args.json.write_text(json.dumps(record | {"pairs": pairs}, indent=1) + "\n")
    if dist.get_rank() == 0 and args.plot:
        plot(small_fastest, large_fastest, large, args.plot)
    measured = sum(t > 0 for t in (*short.values(), *long.values()))
    messages = 2 * len(short) * (args.repeats + args.warmup)
    same = check(f"wrong echoes of {messages:,}", small_wrong + large_wrong, 0)
    return check("cells not measured", 2 * n * (n - 1) - measured, 0) and same


def listed(matrix: Matrix) -> list[list[float | None]]:
    """For JSON, which has no NaN: None on the diagonal."""
    return [[cell if cell == cell else None for cell in row] for row in matrix]


def plot(small: Matrix, large: Matrix, size: int, path: Path) -> None:
    """Two heat maps, [from][to]; dark is slow in both."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "ch02"
    from matplotlib import pyplot

    n = len(small)
    figure, axes = pyplot.subplots(1, 2, figsize=(2.6 + n, 1.6 + n / 2))
    latency = [[1e6 * t for t in row] for row in small]
    rate = [[size / t / 1e9 for t in row] for row in large]
    looks = (("latency (us)", latency, "YlOrRd", ".0f"), ("rate (GB/s)", rate, "YlOrRd_r", ".2f"))
    for axis, (title, cells, colors, form) in zip(axes, looks, strict=True):
        values = [cell for row in cells for cell in row if cell == cell]
        axis.imshow(cells, cmap=colors, vmin=min(values) / 1.5, vmax=max(values) * 1.5)
        for a in range(n):
            for b in range(n):
                text = format(cells[a][b], form) if a != b else ""
                axis.text(b, a, text, ha="center", va="center", fontsize=9)
        axis.set(title=title, xlabel="to", ylabel="from", xticks=range(n), yticks=range(n))
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


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


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


def parse_size(text: str) -> int:
    """Bytes in '64', '16K', '1M' or '2G' (powers of 1024)."""
    power = "KMG".find(text[-1:].upper()) + 1
    return positive(text[:-1] if power else text) * 1024**power


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: stop(f"{message}: --help lists the flags")
    add = parser.add_argument
    add("--bytes", type=parse_size, default="4M", help="of the large message; K, M, G: 1024, ...")
    add("--repeats", type=positive, default=50, help="timed round trips per pair and size")
    add("--warmup", type=positive, default=5, help="untimed round trips before them")
    add("--seed", type=int, default=0, help="shifts the numbers that the messages are full of")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--json", type=Path, help="also write fastest and median seconds to this file")
    add("--plot", type=Path, help="also draw the two tables to this SVG file")
    args = parser.parse_args()
    if args.bytes <= SMALL:
        stop(f"--bytes {args.bytes}: give more than the {SMALL} bytes of the small message")
    if os.environ.get("WORLD_SIZE") == "1":
        stop(f"one rank has no other to talk to: type  torchrun --nproc_per_node=2 {sys.argv[0]}")
    for path in filter(None, (args.json, args.plot)):
        try:
            path.open("ab").close()
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
