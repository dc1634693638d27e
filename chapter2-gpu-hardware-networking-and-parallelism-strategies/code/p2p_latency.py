"""Latency and bandwidth between every two ranks, by ping-pong: two tables that find the slow link.

    torchrun --nproc_per_node=3 chapter2-gpu-hardware-networking-and-parallelism-strategies/code/p2p_latency.py
    torchrun --nproc_per_node=2 chapter2-gpu-hardware-networking-and-parallelism-strategies/code/p2p_latency.py --bytes 256K --repeats 20

On GPUs:
    torchrun --nproc_per_node=8 chapter2-gpu-hardware-networking-and-parallelism-strategies/code/p2p_latency.py --bytes 256M

A table of equal machines and good cables is flat. A cell that stands out is a link to look at, a
row or column that stands out is a machine. Between GPUs, the latency is mostly that of two calls
from Python. Section 2.2.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

SMALL = 8  # bytes: one int64, all latency
Matrix = list[list[float]]  # [from][to], seconds; NaN where nothing was measured
Cells = dict[tuple[int, int], float]  # the same off the diagonal, by (from, to)


def ping_pong(
    first: int, second: int, size: int, args: argparse.Namespace, device: torch.device
) -> tuple[list[float], int]:
    """Half round trips between two ranks in seconds, timed by the first, and how many came back wrong.

    Half a round trip is the time of one message (OSU's osu_latency, MPI's ping-pong). Each message
    is full of a number that tells its iteration and its ranks, and the second rank only echoes.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    message = torch.zeros(size // SMALL, dtype=torch.int64, device=device)
    answer = torch.zeros_like(message)
    times = []
    wrong = 0
    for iteration in range(args.warmup + args.repeats):
        if rank == second:
            dist.recv(answer, first)
            dist.send(answer, first)
            continue
        number = ((iteration + args.seed) * world_size + first) * world_size + second + 1  # never 0
        message.fill_(number)
        answer.zero_()
        synchronize(device)
        start = time.perf_counter()
        dist.send(message, second)
        dist.recv(answer, second)
        synchronize(device)
        times.append((time.perf_counter() - start) / 2)
        wrong += int((answer != number).any())
    return times[args.warmup :], wrong


def time_pairs(
    size: int, args: argparse.Namespace, device: torch.device
) -> tuple[Matrix, Matrix, int]:
    """Fastest and median seconds of a message from rank to rank, and the wrong messages of all.

    One pair at a time; the others sleep in the barrier that the pair is late for.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    fastest = [float("nan")] * world_size
    median = [float("nan")] * world_size
    errors = 0
    for first in range(world_size):
        for second in range(world_size):
            if first != second and rank in (first, second):
                times, wrong = ping_pong(first, second, size, args, device)
                errors += wrong
                if rank == first:
                    fastest[second] = min(times)
                    median[second] = statistics.median(times)
            dist.barrier()
    reports: list = [None] * world_size
    dist.all_gather_object(reports, (fastest, median, errors))
    fast_rows, median_rows, wrong_counts = zip(*reports, strict=True)
    return list(fast_rows), list(median_rows), sum(wrong_counts)


def between(matrix: Matrix) -> Cells:
    ranks = range(len(matrix))
    return {(a, b): matrix[a][b] for a in ranks for b in ranks if a != b}


def show(title: str, cells: Cells, form: str) -> None:
    ranks = range(dist.get_world_size())
    say(f"{title:<16}" + "".join(f"{f'to {b}':>9}" for b in ranks))
    for a in ranks:
        row = (format(cells[a, b], form) if a != b else "-" for b in ranks)
        say(f"{f'  from {a}':<16}" + "".join(f"{cell:>9}" for cell in row))


def summary(title: str, cells: Cells, slowest: tuple[int, int], form: str) -> float:
    """Print the range of the cells and the slowest pair; return how far that is off the median."""
    values = sorted(cells.values())
    median = statistics.median(values)
    ratio = max(cells[slowest], median) / min(cells[slowest], median)
    columns = "".join(f"{value:>9{form}}" for value in (values[0], median, values[-1]))
    a, b = slowest
    say(f"  {title:<14}{columns}  {a} to {b}, {ratio:.2f} times off the median")
    return ratio


def run(args: argparse.Namespace, device: torch.device) -> list[bool | None]:
    world_size = dist.get_world_size()
    large = args.bytes // SMALL * SMALL
    small_fastest, small_median, small_wrong = time_pairs(SMALL, args, device)
    large_fastest, large_median, large_wrong = time_pairs(large, args, device)
    short = between(small_fastest)
    long = between(large_fastest)
    alpha = {pair: short[pair] * 1e6 for pair in short}
    rate = {pair: large / long[pair] / 1e9 for pair in long}
    more = {p: long[p] - short[p] for p in long}  # seconds; noise can take all of it
    beta = {
        p: (large - SMALL) / s / 1e9 if s > 0.1 * long[p] else math.inf for p, s in more.items()
    }

    backend = dist.get_backend()
    say(f"{world_size} ranks on {device.type}: ping-pong by {backend}, fastest of {args.repeats}")
    show("latency (us)", alpha, ".0f")
    show("rate (GB/s)", rate, ".2f")
    say(f"one message of {SMALL} bytes, and one of {large:,}; t = alpha + S / beta between them:")
    say(f"{'':<16}{'min':>9}{'median':>9}{'max':>9}  slowest")
    late = summary("alpha (us)", alpha, max(alpha, key=lambda pair: alpha[pair]), ".0f")
    slow = summary("beta (GB/s)", beta, min(beta, key=lambda pair: beta[pair]), ".2f")
    if dist.get_rank() == 0 and args.json:
        result = {"world_size": world_size, "device": device.type, "bytes": [SMALL, large]}
        result |= {"fastest_s": [listed(small_fastest), listed(large_fastest)]}
        result |= {"median_s": [listed(small_median), listed(large_median)]}
        result["pairs"] = [
            {"from": p[0], "to": p[1], "alpha_us": alpha[p], "beta_gb_per_s": beta[p]} for p in beta
        ]
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if dist.get_rank() == 0 and args.plot:
        plot(small_fastest, large_fastest, large, args.plot)
    timed = sum(t > 0 for t in (*short.values(), *long.values()))
    messages = 2 * len(short) * (args.repeats + args.warmup)
    return [
        check(f"wrong echoes of {messages:,}", small_wrong + large_wrong, 0),
        check("pairs without a time, in either direction", 2 * len(short) - timed, 0),
        expect("slowest pair's latency over the median", late, 1.5, args.strict),
        expect("median bandwidth over the slowest pair's", slow, 1.5, args.strict),
    ]


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


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--bytes", type=parse_size, default="4M", help="of the large message; K, M, G: 1024, ...")
    add("--repeats", type=int, default=50, help="timed round trips per pair and size")
    add("--warmup", type=int, default=5, help="untimed round trips before them")
    add("--seed", type=int, default=0, help="shifts the numbers that the messages are full of")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--json", type=Path, help="also write fastest and median seconds to this file")
    add("--plot", type=Path, help="also draw the two tables to this SVG file")
    add("--strict", action="store_true", help="exit 1 if an `expect:` line does not hold")
    args = parser.parse_args()
    if args.bytes < 2 * SMALL:
        stop(f"--bytes {args.bytes}: give more than the {SMALL} bytes of the small message")
    if os.environ.get("WORLD_SIZE") == "1":
        stop(f"one rank has no other to talk to: type  torchrun --nproc_per_node=2 {sys.argv[0]}")
    return args


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


# Copied from bandwidth_test.parse_size
def parse_size(text: str) -> int:
    """Bytes in '64', '16K', '1M' or '2G' (powers of 1024)."""
    power = "KMG".find(text[-1:].upper()) + 1
    return int(text[:-1] if power else text) * 1024**power


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


# Copied from ch01_single_gpu_baseline.synchronize
def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


# Copied from ch01_single_gpu_baseline.stop
def stop(message: str) -> NoReturn:
    """End with one line and exit code 2: the command was wrong, not the program."""
    sys.stderr.write(message + "\n")  # in one piece: other ranks write too
    sys.exit(2)


if __name__ == "__main__":
    main()
