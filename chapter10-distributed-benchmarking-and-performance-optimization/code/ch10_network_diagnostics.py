"""Which link is slow, which rank, and is it the settings? Every pair timed, and a verdict by name.

    torchrun --nproc_per_node=4 chapter10-distributed-benchmarking-and-performance-optimization/code/ch10_network_diagnostics.py \
        --slow-link 1-3 --plot chapter10-distributed-benchmarking-and-performance-optimization/figures/network.svg
    NCCL_IB_DISABEL=1 torchrun --nproc_per_node=3 chapter10-distributed-benchmarking-and-performance-optimization/code/ch10_network_diagnostics.py --slow-rank 2

On GPUs:
    torchrun --nproc_per_node=8 chapter10-distributed-benchmarking-and-performance-optimization/code/ch10_network_diagnostics.py --bytes 64M --sweep-bytes 1G

--slow-link and --slow-rank make a fault, by a delay where this script sends; the verdict knows nothing
of them. The variable in the second command is misspelled on purpose: see what is said of it, and think
who else would have told you. Section 10.3.
"""

import argparse
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from tqdm import tqdm

SMALL = 8  # bytes: one int64, all latency
PASSES = 3  # over all pairs: a slow moment of the machine hits one of them
Pair = tuple[int, int]  # the lower rank first
Times = dict[Pair, float]  # seconds of one message between two ranks

# What is worth knowing of a variable, and the value (or any) that is set by mistake more often than
# not. From NCCL's user guide (env.html) and PyTorch's documentation of torch.distributed.
SETTINGS = {
    "NCCL_ALGO": ("any", "forces an algorithm: leave the choice to NCCL"),
    "NCCL_BUFFSIZE": ("", "bytes of the buffer between two GPUs; 4 MiB unless set"),
    "NCCL_CROSS_NIC": ("", "whether rings may change rails between nodes"),
    "NCCL_DEBUG": ("", "what NCCL logs: INFO names the network and the graph that it chose"),
    "NCCL_DEBUG_SUBSYS": ("", "which parts of NCCL log: INIT,NET,GRAPH for set-up"),
    "NCCL_IB_DISABLE": ("1", "1: no InfiniBand and no RoCE, all traffic on TCP"),
    "NCCL_IB_GID_INDEX": ("", "RoCE's address: a wrong one connects to nothing, or slowly"),
    "NCCL_IB_HCA": ("", "the cards that may be used; `=` in front of an exact name"),
    "NCCL_IB_TIMEOUT": ("", "of a lost packet: raised, it hides a bad cable"),
    "NCCL_NET_GDR_LEVEL": ("", "how far a card may be from a GPU to read its memory directly"),
    "NCCL_P2P_DISABLE": ("1", "1: no NVLink, no PCIe between GPUs, all through host memory"),
    "NCCL_P2P_LEVEL": ("", "how far apart two GPUs may be to write to each other directly"),
    "NCCL_PROTO": ("any", "forces a protocol: leave the choice to NCCL"),
    "NCCL_SHM_DISABLE": ("1", "1: ranks of one node talk through the network"),
    "NCCL_SOCKET_IFNAME": ("lo", "interfaces for set-up, and for all traffic without RDMA"),
    "NCCL_TOPO_FILE": ("", "the machine's topology from a file, for virtual machines"),
    "GLOO_SOCKET_IFNAME": ("", "gloo's interface; the one of the host's name unless set"),
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": ("0", "0: a rank whose collective failed waits for ever"),
    "TORCH_NCCL_BLOCKING_WAIT": ("1", "1: every wait blocks the host, so nothing overlaps"),
    "TORCH_DISTRIBUTED_DEBUG": ("DETAIL", "DETAIL: each collective is checked by others"),
    "CUDA_LAUNCH_BLOCKING": ("1", "1: every kernel is waited for: for debugging only"),
    "CUDA_DEVICE_MAX_CONNECTIONS": ("", "1: kernels in order, as Megatron's overlap wants it"),
}
OF_TORCHRUN = ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")  # it sets this for every rank
WATCHED = re.compile(r"(NCCL|GLOO|TORCH_NCCL|TORCH_DISTRIBUTED)_|CUDA_LAUNCH_B|CUDA_DEVICE_MAX")


def send(message: torch.Tensor, to: int, args: argparse.Namespace) -> None:
    """Send, after the delay of the fault that was asked for."""
    rank = dist.get_rank()
    if rank == args.slow_rank or (min(rank, to), max(rank, to)) == args.slow_link:
        time.sleep(args.delay_ms / 1e3)
    dist.send(message, to)


def fastest_message(
    pair: Pair, size: int, args: argparse.Namespace, device: torch.device
) -> tuple[float, int]:
    """Half of a pair's fastest round trip in seconds, and the messages that came back wrong."""
    first, second = pair
    message = torch.zeros(size // SMALL, dtype=torch.int64, device=device)
    seconds = []
    wrong = 0
    for number in range(args.repeats + 1):  # the first one connects the two
        synchronize(device)
        start = time.perf_counter()
        if dist.get_rank() == first:
            send(message.fill_(number), second, args)
            dist.recv(message, second)
        else:
            dist.recv(message, first)
            send(message.add_(1), first, args)  # so that an answer is not what was sent
        synchronize(device)
        seconds.append((time.perf_counter() - start) / 2)
        if dist.get_rank() == first:
            wrong += int((message != number + 1).any())
    return min(seconds[1:]), wrong


def time_all(size: int, args: argparse.Namespace, device: torch.device) -> tuple[list[Times], int]:
    """The times of all pairs in each pass, and the wrong messages. One pair at a time; others wait."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    pairs = [(a, b) for a in range(world_size) for b in range(a + 1, world_size)]
    seconds = torch.zeros(PASSES, len(pairs), device=device)
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    for repeat in range(PASSES):
        for column, pair in enumerate(pairs):
            if rank in pair:
                fastest, errors = fastest_message(pair, size, args, device)
                wrong += errors
                if rank == pair[0]:  # its round trips begin and end here
                    seconds[repeat, column] = fastest
            dist.barrier()
    dist.all_reduce(seconds)
    dist.all_reduce(wrong)
    return [dict(zip(pairs, row, strict=True)) for row in seconds.tolist()], int(wrong)


def slow_parts(
    passes: list[Times], world_size: int, ranks_per_node: int, factor: float
) -> tuple[list[int], list[Pair], Times]:
    """Slow ranks, slow links of other ranks, and each pair's time over that of a good pair.

    A pair counts with its fastest pass. It is slow at `factor` times the good pairs of its kind
    (inside a node, or between two); good is the fastest quarter, which holds unless most are slow.
    A rank is slow if all its links are and it has more than one: then these links are explained.
    """
    fastest = {pair: min(times[pair] for times in passes) for pair in passes[0]}
    ratios = {}
    for inside in (True, False):
        kind = [p for p in fastest if (p[0] // ranks_per_node == p[1] // ranks_per_node) == inside]
        ordered = sorted(fastest[pair] for pair in kind)
        for pair in kind:
            ratios[pair] = fastest[pair] / statistics.median(ordered[: (len(ordered) + 3) // 4])
    slow = {pair for pair, ratio in ratios.items() if ratio >= factor}
    ranks = []
    for rank in range(world_size if world_size > 2 else 0):
        if all(pair in slow for pair in ratios if rank in pair):
            ranks.append(rank)
    links = sorted(pair for pair in slow if not set(pair) & set(ranks))
    return ranks, links, ratios


def verdicts(ranks: list[int], links: list[Pair], world_size: int) -> list[str]:
    """What to do, a line for each finding."""
    lines = [
        f"rank {rank} is slow, all its {world_size - 1} links are: "
        "run without its node, then look at its card, slot and driver"
        for rank in ranks
    ]
    lines += [
        f"link {a}-{b} is slow, other links of {a} and {b} are not: "
        "change cable or port, run again, see whether it moves"
        for a, b in links
    ]
    if world_size < 3:
        lines.append("fewer than three ranks: no other link to compare with")
    return lines or ["no rank and no link stands out"]


def settings_of_all() -> list[tuple[str, str]]:
    """The variables that NCCL, gloo and PyTorch may read, with what is to be said of each.

    The ranks compare theirs: where two differ, one node in a hundred falls back to TCP, or hangs.
    """
    here = {
        name: value
        for name, value in os.environ.items()
        if WATCHED.match(name) and (name, value) != OF_TORCHRUN
    }
    everywhere: list = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, here)
    lines = []
    for name in sorted({name for variables in everywhere for name in variables}):
        values = [variables.get(name, "(unset)") for variables in everywhere]
        bad, said = SETTINGS.get(name, ("any", "not known here: is it spelled right?"))
        if values[0] == bad or bad == "any":
            said = f"! {said}"
        if len(set(values)) > 1:
            rank = min(range(len(values)), key=lambda rank: values.count(values[rank]))
            said = f"! not the same everywhere: {values[rank]} on rank {rank}"
        lines.append((f"{name}={values[0]}", said))
    for file in (Path("/etc/nccl.conf"), Path.home() / ".nccl.conf"):
        if file.is_file():
            lines.append((str(file), "! NCCL reads more settings in this file"))
    return lines or [("settings", "none of NCCL's, gloo's or PyTorch's is set")]


def sweep(args: argparse.Namespace, device: torch.device) -> tuple[list[tuple], float, float]:
    """All-reduce over sizes: rows of bytes and fastest, median, predicted seconds; alpha, 1/beta.

    What is predicted for a size is from a line through the others.
    """
    sizes = [4096]
    while 4 * sizes[-1] <= args.sweep_bytes:
        sizes.append(4 * sizes[-1])
    works: list[Callable[[], object]] = [
        partial(dist.all_reduce, torch.zeros(size // 4, device=device)) for size in sizes
    ]
    times = time_batches(works, args.batches, 20, "all-reduce", device)
    points = [(float(size), min(seconds)) for size, seconds in zip(sizes, times, strict=True)]
    rows = []
    for i, (size, fastest) in enumerate(points):
        alpha, slope = fit(points[:i] + points[i + 1 :] or points)
        rows.append((int(size), fastest, statistics.median(times[i]), alpha + slope * size))
    return rows, *fit(points)


def show_pairs(title: str, passes: list[Times], unit: float) -> None:
    ranks = range(dist.get_world_size())
    say(f"{title:<28}" + "".join(f"{f'to {b}':>9}" for b in ranks))
    for a in ranks:
        cells = []
        for b in ranks:
            times = [t[min(a, b), max(a, b)] for t in passes if a != b]
            cells.append(f"{unit * min(times):>9.2f}" if times else f"{'-':>9}")
        say(f"{f'  from {a}':<28}" + "".join(cells))


def run(args: argparse.Namespace, device: torch.device) -> list[bool | None]:
    world_size = dist.get_world_size()
    ranks_per_node = int(os.environ["LOCAL_WORLD_SIZE"])
    large = args.bytes // SMALL * SMALL
    settings = settings_of_all()
    by_size = {size: time_all(size, args, device) for size in (SMALL, large)}
    rows, alpha, slope = sweep(args, device)

    say(f"{world_size} rank{'s' * (world_size > 1)} on {device.type}, {dist.get_backend()}: "
        f"fastest of {PASSES} x {args.repeats} round trips of each pair, halved")  # fmt: skip
    show_pairs(f"{SMALL} bytes (us)", by_size[SMALL][0], 1e6)
    show_pairs(f"{large:,} bytes (ms)", by_size[large][0], 1e3)
    say("all-reduce (bytes)  fastest (us)  median  predicted  error (%)")
    for size, fastest, median, predicted in rows:
        times = f"{1e6 * fastest:>14.0f}{1e6 * median:>8.0f}{1e6 * predicted:>11.0f}"
        say(f"{size:>18,}{times}{100 * (predicted / fastest - 1):>+11.0f}")
    beta = f"{1e-9 / slope:.2f}" if slope else "?"
    say(f"t = alpha + S / beta: alpha {1e6 * alpha:.0f} us, beta {beta} GB/s")
    for setting, said in settings:
        say(f"{setting:<27} {said}")

    ranks: set[int] = set()
    links: set[Pair] = set()
    for passes, _ in by_size.values():
        found = slow_parts(passes, world_size, ranks_per_node, args.factor)
        ranks |= set(found[0])
        links |= set(found[1])
    links = {link for link in links if not ranks & set(link)}
    for line in verdicts(sorted(ranks), sorted(links), world_size):
        say(f"verdict: {line}")
    if dist.get_rank() == 0 and args.json:
        result = {
            "world_size": world_size,
            "slow_ranks": sorted(ranks),
            "slow_links": sorted(links),
        }
        result["fastest_s"] = {
            str(size): {f"{a}-{b}": min(times[a, b] for times in passes) for a, b in passes[0]}
            for size, (passes, _) in by_size.items()
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if dist.get_rank() == 0 and args.plot:
        plot(by_size[SMALL][0], world_size, ranks_per_node, args)

    all_times = [t for passes, _ in by_size.values() for times in passes for t in times.values()]
    claims: list[bool | None] = [
        check("messages that came back wrong", sum(wrong for _, wrong in by_size.values()), 0),
        check("pairs without a time, in any pass", sum(t <= 0 for t in all_times), 0),
    ]
    bad_ranks = {args.slow_rank} - {None}
    bad_links = {args.slow_link} - {None}
    if bad_ranks or bad_links:
        missed = len(bad_ranks - ranks) + len(bad_links - links)
        claims.append(check("injected faults that were not named", missed, 0))
    others = len(ranks - bad_ranks) + len(links - bad_links)
    claims.append(expect("other ranks and links that were named", others, 0, args.strict))
    errors = [abs(predicted / fastest - 1) for size, fastest, _, predicted in rows if size >= 2**16]
    if len(errors) > 2 and world_size > 1:
        claim = "all-reduce: median |error| at held-out sizes from 64 KiB"
        claims.append(expect(claim, statistics.median(errors), 0.2, args.strict))
    return claims


def plot(
    passes: list[Times], world_size: int, ranks_per_node: int, args: argparse.Namespace
) -> None:
    """Each pair's latency over that of a good pair, as a map; what is over the bound is bold."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "ch10"
    from matplotlib import pyplot

    ratios = slow_parts(passes, world_size, ranks_per_node, args.factor)[2]
    cells = [[float("nan")] * world_size for _ in range(world_size)]
    figure, axis = pyplot.subplots(figsize=(2.4 + 0.6 * world_size, 1.6 + 0.5 * world_size))
    for (a, b), ratio in ratios.items():
        for x, y in ((a, b), (b, a)):
            cells[y][x] = ratio
            weight, color = ("bold", "white") if ratio >= args.factor else ("normal", "black")
            axis.text(x, y, f"{ratio:.1f}", ha="center", va="center", weight=weight, color=color)
    axis.imshow(cells, cmap="YlOrRd", vmin=1, vmax=1.5 * args.factor, aspect="auto")
    ticks = range(world_size)
    axis.set(xlabel="rank", ylabel="rank", xticks=ticks, yticks=ticks)
    axis.set_title(f"latency over a good pair's\nbold: {args.factor:g} times or more", fontsize=10)
    figure.tight_layout()
    figure.savefig(args.plot, format="svg", facecolor="white", metadata={"Date": None})


def parse_link(text: str) -> Pair:
    """Two different ranks in '1-3', the lower one first."""
    a, b = sorted(int(rank) for rank in text.split("-"))
    if a == b:
        raise ValueError
    return a, b


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--bytes", type=parse_size, default="1M", help="of the large message; K, M, G: 1024, ...")
    add("--sweep-bytes", type=parse_size, default="4M", help="of the largest all-reduce")
    add("--repeats", type=int, default=30, help="timed round trips per pair, size and pass")
    add("--batches", type=int, default=10, help="batches of all-reduces per size")
    add("--factor", type=float, default=2.0, help="a pair is slow at this many times a good one")
    add("--slow-rank", type=int, metavar="R", help="make a fault: all that R sends comes late")
    add("--slow-link", type=parse_link, metavar="A-B", help="make a fault: A to B and back is late")
    add("--delay-ms", type=float, default=5, help="how late, in ms")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--json", type=Path, help="also write times and findings to this file")
    add("--plot", type=Path, help="also draw the pairs' latencies to this SVG file")
    add("--strict", action="store_true", help="exit 1 if an `expect:` line does not hold")
    args = parser.parse_args()
    world_size = int(os.environ.get("WORLD_SIZE", 4))
    named = [rank for rank in (args.slow_rank, *(args.slow_link or ())) if rank is not None]
    if any(not 0 <= rank < world_size for rank in named):
        stop(f"rank {max(named)} is not one of {world_size} ranks")
    if args.slow_rank is not None and world_size < 3:
        stop("with two ranks a slow rank is a slow link: type  torchrun --nproc_per_node=3 ...")
    if args.bytes < 2 * SMALL or args.sweep_bytes < 4096 or args.repeats < 1:
        stop(f"give --bytes {2 * SMALL} or more, --sweep-bytes 4K or more, --repeats 1 or more")
    return args


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


# Copied from allreduce_microbench.batch_seconds
def batch_seconds(work: Callable[[], object], calls: int, device: torch.device) -> float:
    """Seconds per call of one batch: after one more that all ranks start from, calls back to back,
    synchronized once, at the end.
    """
    work()
    synchronize(device)
    dist.barrier()
    start = time.perf_counter()
    for _ in range(calls):
        work()
    synchronize(device)
    return (time.perf_counter() - start) / calls


# Copied from allreduce_microbench.slowest_rank
def slowest_rank(seconds: list, device: torch.device) -> torch.Tensor:
    tensor = torch.tensor(seconds, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.cpu()


# Copied from allreduce_microbench.time_batches
def time_batches(
    works: list[Callable[[], object]], repeats: int, most: int, what: str, device: torch.device
) -> list[list[float]]:
    """Seconds per call of each work, in each of `repeats` batches, on the batch's slowest rank.

    The works take turns, so that a slow moment of the machine hits them all. A batch is `most`
    calls, or fewer that take 20 ms, so that ranks that start unevenly pay for it only once.
    """
    first = slowest_rank([batch_seconds(work, 5, device) for work in works], device)
    counts = [max(2, min(most, int(0.02 / s))) for s in first.tolist()]
    seconds = []
    quiet = True if dist.get_rank() else None  # None: a bar on a terminal only
    for _ in tqdm(range(repeats), what, leave=False, disable=quiet):
        turns = zip(works, counts, strict=True)
        seconds.append([batch_seconds(work, count, device) for work, count in turns])
    return slowest_rank(seconds, device).T.tolist()


# Copied from allreduce_microbench.fit
def fit(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Intercept (s, alpha) and slope (s per byte, 1/beta) of a line through (bytes, seconds).

    Least squares of the relative error: 4 KiB counts as much as 16 MiB. Neither is negative.
    """
    weight = sum(1 / t**2 for _, t in points)
    x0, t0 = (sum(p[axis] / p[1] ** 2 for p in points) / weight for axis in (0, 1))
    spread = sum(((x - x0) / t) ** 2 for x, t in points)
    slope = sum((x - x0) * (t - t0) / t**2 for x, t in points) / spread if spread else 0.0
    if slope * x0 > t0:
        return 0.0, sum(x / t for x, t in points) / sum((x / t) ** 2 for x, t in points)
    return t0 - max(0.0, slope) * x0, max(0.0, slope)


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
