"""Measure what this machine gives each rank while all ranks work, and write it down for predictions.

    torchrun --nproc_per_node=2 chapter2-gpu-hardware-networking-and-parallelism-strategies/code/calibrate.py
    torchrun --nproc_per_node=1 chapter2-gpu-hardware-networking-and-parallelism-strategies/code/calibrate.py --quick --json runs/one_rank.json

On GPUs:
    torchrun --nproc_per_node=8 chapter2-gpu-hardware-networking-and-parallelism-strategies/code/calibrate.py

The file, calibration.json, is what later chapters read with --calibration. Its fields:
    schema                  1: the version of this list
    machine, torch, device, backend, date   where it was measured; device: cpu, cuda, ...
    world_size, threads_per_rank            ranks, and threads of each rank
    matmul_flops_per_s      dtype -> floating-point operations per second of one rank
    bf16_flops              the same for bfloat16, with which a GPU trains
    memory_bytes_per_s      triad beyond the caches: bytes read and written per second of one rank
    memory_bytes            bytes of one device's memory; only on GPUs
    point_to_point          alpha_s (s), beta_bytes_per_s (B/s), median_error (a fraction) of
                            send_recv: a rank sends to its right neighbour and receives from its left;
                            null for one rank
    collectives             name -> the same three, for t = alpha + factor S / beta with nccl-tests'
                            factor and S (allreduce_microbench.py); empty for one rank
median_error is the fit's, at sizes that it was not fitted to. Section 2.2.
"""

import argparse
import datetime
import json
import math
import os
import platform
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

# torch 2.13 renamed these two
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all")
SMALL = 256  # a product of this size takes 30 ms where a 16-bit dtype is emulated, at 1 GFLOP/s
Model = dict[str, float]  # alpha_s, beta_bytes_per_s, median_error


def matmul_rate(k: int, dtype: torch.dtype, repeats: int, device: torch.device) -> float:
    """FLOP/s of one rank: 2 k^3 operations in a product of two k x k matrices."""
    a, b = (torch.randn(k, k, device=device).to(dtype) for _ in range(2))
    (seconds,) = time_batches([lambda: a @ b], repeats, 20, str(dtype), device)
    return 2 * k**3 / min(seconds)


def matmul_rates(args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """FLOP/s by dtype; on a CPU, what has no unit for a dtype is not asked for more than once."""
    on_gpu = device.type != "cpu"
    k = args.matmul or (8192 if on_gpu else 1024)
    small = matmul_rate(SMALL, torch.float32, 1, device)
    rates = {}
    for name in ("float32", "bfloat16", "float64") + ("float16",) * on_gpu:
        dtype = getattr(torch, name)
        rates[name] = matmul_rate(SMALL, dtype, 1, device)
        emulated = not on_gpu and rates[name] < 0.1 * small
        if not emulated:
            rates[name] = matmul_rate(k, dtype, args.repeats, device)
        note = f", emulated: no unit for it here, measured at {SMALL}" * emulated
        say(f"matmul {name:<16}{rates[name] / 1e9:>10,.1f} GFLOP/s{note}")
    return rates


def memory_rate(args: argparse.Namespace, device: torch.device) -> float:
    """Bytes/s of a = b + 3 c, two reads and a write (STREAM's triad, and its way to count)."""
    a, b, c = (torch.ones(args.memory_mib * 2**18, device=device) for _ in range(3))
    triad = partial(torch.add, b, c, alpha=3, out=a)
    (seconds,) = time_batches([triad], args.repeats, 20, "memory", device)
    return 3 * a.nbytes / min(seconds)


def communication(op: str, args: argparse.Namespace, device: torch.device) -> Model:
    """alpha, beta and held-out error of a collective: fitted to powers of 4, tried in between.

    A GPU's plateau begins where a CPU's messages end, so its sizes go on to 1 GiB.
    """
    world_size = dist.get_world_size()
    top = 2**22 if device.type == "cpu" else 2**30
    top = top // 4 if args.quick else top
    sizes = [2**power for power in range(12, top.bit_length())]
    whole, other = (torch.zeros(top // 4, device=device) for _ in range(2))
    counts = [size // 4 // world_size * world_size for size in sizes]  # n equal chunks
    works = [partial(call, op, Buffers(whole[:count], other[:count])) for count in counts]
    times = time_batches(works, args.repeats, 20, op, device)
    moved = [bus_factor(op, world_size) * 4 * count for count in counts]
    points = list(zip(moved, map(min, times), strict=True))
    alpha, slope = fit(points[::2])
    error = statistics.median(abs((alpha + slope * x) / t - 1) for x, t in points[1::2])
    largest, seconds = points[-1]  # where noise hides the slope, the largest size's rate
    beta = 1 / slope if slope else largest / seconds
    return {"alpha_s": alpha, "beta_bytes_per_s": beta, "median_error": error}


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores"


def run(args: argparse.Namespace, device: torch.device) -> list[bool | None]:
    torch.manual_seed(args.seed)
    world_size = dist.get_world_size()
    alone = "" if world_size > 1 else "; no other rank, so no communication is measured"
    plural = "s" * (world_size > 1)
    say(f"{world_size} rank{plural} on {device.type}: rates of one rank while all work{alone}")
    rates = matmul_rates(args, device)
    memory = memory_rate(args, device)
    say(f"memory, triad          {memory / 1e9:>10,.1f} GB/s")
    result = {
        "schema": 1,
        "machine": machine(device),
        "torch": torch.__version__,
        "device": device.type,
        "backend": dist.get_backend(),
        "world_size": world_size,
        "threads_per_rank": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
        "matmul_flops_per_s": rates,
        "bf16_flops": rates["bfloat16"],
        "memory_bytes_per_s": memory,
    }
    if device.type != "cpu":
        result["memory_bytes"] = torch.accelerator.get_memory_info()[1]
    models = {}
    if world_size > 1:
        say(f"{'':<23}{'alpha (us)':>10} {'beta (GB/s)':>12} {'held-out error (%)':>19}")
    for op in (*COLLECTIVES, "send_recv") if world_size > 1 else ():
        models[op] = communication(op, args, device)
        alpha, beta, error = models[op].values()
        say(f"{op:<23}{alpha * 1e6:>10.0f} {beta / 1e9:>12.2f} {error * 100:>19.0f}")
    result["point_to_point"] = models.get("send_recv")
    result["collectives"] = {op: models[op] for op in COLLECTIVES if op in models}

    if dist.get_rank() == 0:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        draft = args.json.with_name(args.json.name + ".tmp")
        draft.write_text(json.dumps(result, indent=1) + "\n")
        draft.replace(args.json)  # a reader finds the old file or the new one
    say(f"written to {args.json}")
    numbers = [*rates.values(), memory, *(model["beta_bytes_per_s"] for model in models.values())]
    bad = sum(not 0 < x < math.inf for x in numbers)
    claims: list[bool | None] = [check("rates that are not finite and above 0", bad, 0)]
    if models:
        claim = "median |error| at held-out sizes, median over the collectives"
        error = statistics.median(model["median_error"] for model in models.values())
        claims.append(expect(claim, error, 0.3, args.strict))
    return claims


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="messages up to a quarter as long: 1 MiB on a CPU")
    add("--repeats", type=int, default=4, help="batches of each measurement")
    add("--matmul", type=int, help="rows of the matrices; default: 1024, on a GPU 8192")
    add("--memory-mib", type=int, default=128, help="MiB of each of the triad's 3 arrays")
    add("--seed", type=int, default=0, help="for the matrices")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--json", type=Path, default="calibration.json", help="the file to write")
    add("--strict", action="store_true", help="exit 1 if an `expect:` line does not hold")
    return parser.parse_args()


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


# Copied from allreduce_microbench.Buffers
class Buffers:
    """Two tensors of S bytes, this rank's part of each, and an exchange round the ring of ranks."""

    def __init__(self, whole: torch.Tensor, other: torch.Tensor):
        rank, world_size = dist.get_rank(), dist.get_world_size()
        self.whole = whole
        self.other = other
        self.chunk = whole.chunk(world_size)[rank]
        self.slot = other.chunk(world_size)[rank]
        send = dist.P2POp(dist.isend, whole, (rank + 1) % world_size)
        receive = dist.P2POp(dist.irecv, other, (rank - 1) % world_size)
        self.ring = [send, receive]


# Copied from allreduce_microbench.call
def call(op: str, buffers: Buffers) -> None:
    """One call of a collective; rank 0 is the root."""
    match op:
        case "all_reduce":
            dist.all_reduce(buffers.whole)
        case "reduce_scatter":
            reduce_scatter_single(buffers.slot, buffers.whole)
        case "all_gather":
            all_gather_single(buffers.other, buffers.chunk)
        case "broadcast":
            dist.broadcast(buffers.whole, 0)
        case "reduce":
            dist.reduce(buffers.whole, 0)
        case "all_to_all":
            dist.all_to_all_single(buffers.other, buffers.whole)
        case "send_recv":  # to the right neighbour, and from the left
            for work in dist.batch_isend_irecv(buffers.ring):
                work.wait()


# Copied from allreduce_microbench.bus_factor
def bus_factor(op: str, n: int) -> float:
    """The part of S that each link must carry at best (nccl-tests, doc/PERFORMANCE.md and src/)."""
    if op in ("broadcast", "reduce", "send_recv"):
        return 1.0
    return (2 if op == "all_reduce" else 1) * (n - 1) / n


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
