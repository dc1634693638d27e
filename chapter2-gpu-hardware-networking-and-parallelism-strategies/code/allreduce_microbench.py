"""Any collective, timed over sizes by nccl-tests' method: results checked, times predicted.

    torchrun --nproc_per_node=2 chapter2-gpu-hardware-networking-and-parallelism-strategies/code/allreduce_microbench.py \
        --plot chapter2-gpu-hardware-networking-and-parallelism-strategies/figures/busbw.svg
    torchrun --nproc_per_node=3 chapter2-gpu-hardware-networking-and-parallelism-strategies/code/allreduce_microbench.py --op all_to_all --max-bytes 32K

On GPUs:
    torchrun --nproc_per_node=8 chapter2-gpu-hardware-networking-and-parallelism-strategies/code/allreduce_microbench.py --op all --max-bytes 1G

The columns have nccl-tests' names, so that one table can be laid beside the other. On GPUs that
holds from some 256 KiB up: below, it is Python's launching of the calls that is timed. A row's
"predicted" knows nothing of that row: it is from a line through all the other sizes. Section 2.3.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from tqdm import tqdm

# torch 2.13 renamed these two
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

SUMS = ("all_reduce", "reduce_scatter", "reduce")
OPS = (*SUMS, "all_gather", "broadcast", "all_to_all", "send_recv")
Result = dict[str, Any]  # what --json writes about one collective


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


def bus_factor(op: str, n: int) -> float:
    """The part of S that each link must carry at best (nccl-tests, doc/PERFORMANCE.md and src/)."""
    if op in ("broadcast", "reduce", "send_recv"):
        return 1.0
    return (2 if op == "all_reduce" else 1) * (n - 1) / n


def wrong_elements(op: str, buffers: Buffers) -> int:
    """Elements, over all ranks, that one call leaves different from what arithmetic says.

    Element i of rank r starts as (i + r) % 7: small integers, whose sums every dtype holds exactly
    (bfloat16 on up to 42 ranks). The tensors are zeros afterwards, and so are all timed sums.
    """
    rank, n = dist.get_rank(), dist.get_world_size()
    k = len(buffers.slot)
    i = torch.arange(n * k, device=buffers.whole.device)
    part = slice(rank * k, (rank + 1) * k)
    total = sum((i + r) % 7 for r in range(n)) if op in SUMS else i
    result, expected = {
        "all_reduce": (buffers.whole, total),
        "reduce_scatter": (buffers.slot, total[part]),
        "all_gather": (buffers.other, (i + i // k) % 7),
        "broadcast": (buffers.whole, i % 7),
        "reduce": (buffers.whole, total),
        "all_to_all": (buffers.other, (rank * k + i % k + i // k) % 7),
        "send_recv": (buffers.other, (i + (rank - 1) % n) % 7),
    }[op]
    buffers.whole.copy_((i + rank) % 7)
    call(op, buffers)
    wrong = (result.double() != expected.double()).sum()
    if rank > 0 and op == "reduce":
        wrong.zero_()  # only the root has the sum
    dist.all_reduce(wrong)
    buffers.whole.zero_()
    buffers.other.zero_()
    return int(wrong)


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


def slowest_rank(seconds: list, device: torch.device) -> torch.Tensor:
    tensor = torch.tensor(seconds, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.cpu()


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


def measure_collective(op: str, args: argparse.Namespace, device: torch.device) -> Result:
    """Run one collective over the sizes; each size's time is predicted from those of the others."""
    world_size = dist.get_world_size()
    dtype = getattr(torch, args.dtype)
    longest = args.max_bytes // dtype.itemsize
    whole, other = (torch.zeros(longest, dtype=dtype, device=device) for _ in range(2))
    sizes = []
    size = args.min_bytes
    while size <= args.max_bytes:
        count = size // (world_size * dtype.itemsize) * world_size  # rounded down to n equal chunks
        sizes.append(Buffers(whole[:count], other[:count]))
        size *= args.factor
    wrong = [wrong_elements(op, buffers) for buffers in sizes]
    works = [partial(call, op, buffers) for buffers in sizes]
    times = time_batches(works, args.repeats, args.iters, op, device)

    factor = bus_factor(op, world_size)
    points = [
        (factor * buffers.whole.nbytes, min(seconds))
        for buffers, seconds in zip(sizes, times, strict=True)
    ]
    rows = []
    for i, (buffers, seconds) in enumerate(zip(sizes, times, strict=True)):
        moved, fastest = points[i]
        alpha, slope = fit(points[:i] + points[i + 1 :] or points)
        row = {"bytes": buffers.whole.nbytes, "count": len(buffers.whole), "fastest_s": fastest}
        row |= {"median_s": statistics.median(seconds), "predicted_s": alpha + slope * moved}
        rows.append(row | {"wrong": wrong[i], "seconds": seconds})
    alpha, slope = fit(points)
    beta = 1 / slope if slope else None  # None: too small a range of sizes to tell
    return {"op": op, "factor": factor, "alpha_s": alpha, "beta_bytes_per_s": beta, "sizes": rows}


def report(result: Result, args: argparse.Namespace) -> list[bool | None]:
    """Print a collective's table, as nccl-tests does, and return its claims."""
    op, factor, rows = result["op"], result["factor"], result["sizes"]
    say(f"{op}: type {args.dtype}")
    say("       size       count   fastest    median   algbw   busbw  predicted  error #wrong")
    say("        (B)  (elements)      (us)      (us)  (GB/s)  (GB/s)       (us)    (%)  (all)")
    errors = []
    for row in rows:
        fastest, median, predicted = (
            row[f"{name}_s"] for name in ("fastest", "median", "predicted")
        )
        rate = row["bytes"] / fastest / 1e9
        error = predicted / fastest - 1
        times = f"{fastest * 1e6:>9.0f} {median * 1e6:>9.0f} {rate:>7.3f} {factor * rate:>7.3f}"
        guess = f"{predicted * 1e6:>10.0f} {100 * error:>+6.0f} {row['wrong']:>6}"
        say(f"{row['bytes']:>11,} {row['count']:>11,} {times} {guess}")
        if row["bytes"] >= 2**16:  # below, latency is nearly all there is to predict
            errors.append(abs(error))
    alpha, beta = result["alpha_s"], result["beta_bytes_per_s"]
    rate = f"{beta / 1e9:.2f}" if beta else "?"
    say(f"t = alpha + {factor:.2f} S / beta: alpha {alpha * 1e6:.0f} us, beta {rate} GB/s")
    wrong = sum(row["wrong"] for row in rows)
    claims: list[bool | None] = [check(f"{op}: wrong elements at any size", wrong, 0)]
    if errors and len(rows) > 2:
        claim = f"{op}: median |error| at held-out sizes from 64 KiB"
        claims.append(expect(claim, statistics.median(errors), 0.2, args.strict))
    return claims


def run(args: argparse.Namespace, device: torch.device) -> list[bool | None]:
    say(f"{dist.get_world_size()} ranks on {device.type}: by {dist.get_backend()}, "
        f"{args.repeats} batches at each size, of up to {args.iters} calls")  # fmt: skip
    results = []
    claims = []
    for op in OPS if args.op == "all" else [args.op]:
        results.append(measure_collective(op, args, device))
        claims += report(results[-1], args)
    if args.json and dist.get_rank() == 0:
        header = {"world_size": dist.get_world_size(), "device": device.type, "dtype": args.dtype}
        args.json.write_text(json.dumps(header | {"collectives": results}, indent=1) + "\n")
    if args.plot and dist.get_rank() == 0:
        plot(results, args.plot)
    return claims


def plot(results: list[Result], path: Path) -> None:
    """Bus bandwidth over size: fastest (dots) and median (rings) batches, and the fitted lines."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "ch02"
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4))
    for number, result in enumerate(results):
        rows, factor, beta = result["sizes"], result["factor"], result["beta_bytes_per_s"]
        sizes = [row["bytes"] for row in rows]
        color = f"C{number}"
        fastest, median = (
            [factor * row["bytes"] / row[key] / 1e9 for row in rows]
            for key in ("fastest_s", "median_s")
        )
        line = [result["alpha_s"] + (factor * size / beta if beta else 0) for size in sizes]
        fitted = [factor * size / t / 1e9 for size, t in zip(sizes, line, strict=True)]
        axis.plot(sizes, fitted, color=color, label=f"{result['op']}: alpha + S x factor / beta")
        axis.plot(sizes, fastest, "o", color=color, label="fastest batch")
        axis.plot(sizes, median, "o", color=color, fillstyle="none", label="median batch")
    axis.set(xlabel="S (bytes)", ylabel="bus bandwidth (GB/s)", ylim=(0, None))
    axis.set_xscale("log", base=2)
    axis.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None})


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--op", choices=(*OPS, "all"), default="all_reduce", help="collective; all: each in turn")
    add("--min-bytes", type=parse_size, default="4K", help="smallest S; K, M, G are 1024, ...")
    add("--max-bytes", type=parse_size, default="16M", help="largest S in bytes")
    add("--factor", type=int, default=4, help="each S is this many times the one before")
    add("--iters", type=int, default=20, help="calls per batch, fewer where they take long")
    add("--repeats", type=int, default=20, help="batches per size")
    dtypes = ("float32", "float64", "float16", "bfloat16", "int32", "int64")
    add("--dtype", choices=dtypes, default="float32", help="of the elements")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--json", type=Path, help="also write every batch's seconds to this file")
    add("--plot", type=Path, help="also draw bus bandwidth over size to this SVG file")
    add("--strict", action="store_true", help="exit 1 if an `expect:` line does not hold")
    args = parser.parse_args()
    world_size = int(os.environ.get("WORLD_SIZE", 2))
    least = world_size * getattr(torch, args.dtype).itemsize
    if world_size == 1:
        stop(f"one rank has no other to talk to: type  torchrun --nproc_per_node=2 {sys.argv[0]}")
    if args.factor < 2 or not least <= args.min_bytes <= args.max_bytes:
        stop(f"give --factor 2 or more, and {least} <= --min-bytes <= --max-bytes")
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
