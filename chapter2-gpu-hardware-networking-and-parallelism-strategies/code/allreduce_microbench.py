"""Any collective, timed over sizes by nccl-tests' method: results checked, times predicted.

    torchrun --nproc_per_node=2 chapter2-gpu-hardware-networking-and-parallelism-strategies/code/allreduce_microbench.py
    torchrun --nproc_per_node=3 chapter2-gpu-hardware-networking-and-parallelism-strategies/code/allreduce_microbench.py --op all_to_all --max-bytes 32K

On GPUs:
    torchrun --nproc_per_node=8 chapter2-gpu-hardware-networking-and-parallelism-strategies/code/allreduce_microbench.py --op all --max-bytes 1G
    torchrun --nproc_per_node=8 chapter2-gpu-hardware-networking-and-parallelism-strategies/code/allreduce_microbench.py --max-bytes 1G --bare

The columns have nccl-tests' names, so that one table can be laid beside the other. A row's
"predicted" knows nothing of that row: it is from a line through all the other sizes. Section 2.3.
"""

import argparse
import json
import os
import statistics
import sys
import time
import timeit
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from tqdm import tqdm

# torch 2.13 renamed these two
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

CALLS = {  # on the tensors of `prepare`; rank 0 is the root
    "all_reduce": lambda t: dist.all_reduce(t.whole),
    "reduce_scatter": lambda t: reduce_scatter_single(t.slot, t.whole),
    "all_gather": lambda t: all_gather_single(t.other, t.chunk),
    "broadcast": lambda t: dist.broadcast(t.whole, 0),
    "reduce": lambda t: dist.reduce(t.whole, 0),
    "gather": lambda t: dist.gather(t.chunk, t.slots, 0),
    "scatter": lambda t: dist.scatter(t.slot, t.chunks, 0),
    "all_to_all": lambda t: dist.all_to_all_single(t.other, t.whole),
    "send_recv": lambda t: [work.wait() for work in dist.batch_isend_irecv(t.ring)],
}
BARE = {  # the same, as statements for --bare to put into a loop
    "all_reduce": "dist.all_reduce(whole)",
    "reduce_scatter": "reduce_scatter_single(slot, whole)",
    "all_gather": "all_gather_single(other, chunk)",
    "broadcast": "dist.broadcast(whole, 0)",
    "reduce": "dist.reduce(whole, 0)",
    "gather": "dist.gather(chunk, slots, 0)",
    "scatter": "dist.scatter(slot, chunks, 0)",
    "all_to_all": "dist.all_to_all_single(other, whole)",
    "send_recv": "[work.wait() for work in dist.batch_isend_irecv(ring)]",
}
SUMS = ("all_reduce", "reduce", "reduce_scatter")
ROOTED = ("broadcast", "reduce", "gather", "scatter")
BATCH_S = 0.04  # seconds
JUDGED_FROM = 64 * 2**10  # bytes; below, latency is nearly all there is to predict
Record = dict[str, object]  # what --json writes about one collective


def bus_factor(op: str, n: int) -> float:
    """The part of S that each link must carry at best (nccl-tests, doc/PERFORMANCE.md and src/)."""
    if op in ("broadcast", "reduce", "send_recv"):
        return 1.0
    return (2 if op == "all_reduce" else 1) * (n - 1) / n


def prepare(whole: torch.Tensor, other: torch.Tensor) -> SimpleNamespace:
    """Two tensors of S bytes, their n equal chunks and slots, and an exchange round the ring."""
    rank, n = dist.get_rank(), dist.get_world_size()
    chunks, slots = list(whole.chunk(n)), list(other.chunk(n))
    chunk, slot = chunks[rank], slots[rank]
    if rank > 0:
        chunks = slots = None  # only the root has a list to scatter, or to gather into
    ring = [dist.P2POp(dist.isend, whole, (rank + 1) % n)]
    ring.append(dist.P2POp(dist.irecv, other, (rank - 1) % n))
    return SimpleNamespace(**locals())


def wrong_elements(op: str, t: SimpleNamespace) -> int:
    """Elements, over all ranks, that one call leaves different from what arithmetic says.

    Element i of rank r starts as (i + r) % 7: small integers, whose sums every dtype holds exactly
    (bfloat16 on up to 42 ranks). The tensors are zeros afterwards, and so are all timed sums.
    """
    rank, n, k = t.rank, t.n, len(t.slot)
    i = torch.arange(n * k, device=t.whole.device)
    own = slice(rank * k, (rank + 1) * k)
    total = sum((i + r) % 7 for r in range(n)) if op in SUMS else i
    result, expected = {
        "all_reduce": (t.whole, total),
        "reduce_scatter": (t.slot, total[own]),
        "all_gather": (t.other, (i + i // k) % 7),
        "broadcast": (t.whole, i % 7),
        "reduce": (t.whole, total),
        "gather": (t.other, (i + i // k) % 7),
        "scatter": (t.slot, i[own] % 7),
        "all_to_all": (t.other, (rank * k + i % k + i // k) % 7),
        "send_recv": (t.other, (i + (rank - 1) % n) % 7),
    }[op]
    t.whole.copy_((i + rank) % 7)
    CALLS[op](t)
    wrong = (result.double() != expected.double()).sum()
    if rank > 0 and op in ("reduce", "gather"):
        wrong.zero_()  # only the root has a result
    dist.all_reduce(wrong)
    t.whole.zero_(), t.other.zero_()
    return int(wrong)


def batch_seconds(op: str, t: SimpleNamespace, bare: bool, calls: int) -> float:
    """Seconds per call of one batch: calls back to back, synchronized once, at the end."""
    timer = timeit.Timer(BARE[op], globals=globals() | vars(t)) if bare else None
    CALLS[op](t)
    synchronize(t.whole.device)
    dist.barrier()
    start = time.perf_counter()
    if timer:
        timer.timeit(calls)
    else:
        for _ in range(calls):
            CALLS[op](t)
    synchronize(t.whole.device)
    return (time.perf_counter() - start) / calls


def slowest_rank(seconds: list, device: torch.device) -> torch.Tensor:
    tensor = torch.tensor(seconds, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.cpu()


def sample(op: str, sizes: list[SimpleNamespace], args: argparse.Namespace) -> list[torch.Tensor]:
    """Seconds per call, for each size [1, batches], or with --bare [2, batches].

    A batch takes as long as on its slowest rank. Sizes and loops take turns, so that a slow moment
    hits all. After --repeats rounds only what is not `settled` goes on, up to 4 times as long (8 times
    with --bare).
    """
    device = sizes[0].whole.device
    warm = slowest_rank([batch_seconds(op, t, False, args.warmup) for t in sizes], device)
    # A batch hides that ranks start unevenly; one of BATCH_S seconds is long enough for that.
    calls = [max(2, min(args.iters, int(BATCH_S / s))) for s in warm.tolist()]
    times = [torch.empty(1 + args.bare, 0)] * len(sizes)
    unsettled = list(range(len(sizes)))
    quiet = True if dist.get_rank() else None  # None: a bar on a terminal only
    for done in tqdm(range(1, (8 if args.bare else 4) * args.repeats + 1), op, disable=quiet):
        loops = range(1 + args.bare)
        new = [[batch_seconds(op, sizes[i], bool(b), calls[i]) for b in loops] for i in unsettled]
        for i, row in zip(unsettled, slowest_rank(new, device), strict=True):
            times[i] = torch.cat([times[i], row[:, None]], 1)
        if done >= args.repeats:
            best = [
                s[0].min().item() for s in times
            ]  # a size slower than a larger one can do better
            unsettled = [i for i in unsettled if not settled(times[i]) or best[i] > min(best[i:])]
        if not unsettled:
            break
    return times


def settled(times: torch.Tensor) -> bool:
    """To 5 %: the later half of the batches was no faster, and neither loop beats the other."""
    fastest, before = times.amin(1), times[:, : times.shape[1] // 2 + 1].amin(1)
    return bool(before[0] <= 1.05 * fastest[0] and fastest.max() <= 1.05 * fastest.min())


def tolerance(samples: list[list[float]]) -> float:
    """20 %, or more where the machine is too noisy to tell: twice the median disagreement between
    the fastest of the odd and of the even repeats of one and the same thing.
    """
    pairs = [(min(times[::2]), min(times[1::2])) for times in samples if len(times) > 1]
    scatter = [abs(odd / even - 1) for odd, even in pairs]
    return max(0.2, 2 * statistics.median(scatter or [0.0]))


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


def measure(op: str, args: argparse.Namespace, device: torch.device) -> tuple[Record, bool]:
    """Run one collective over the sizes and print its table: its record, and if its claims held."""
    n, dtype, factor = dist.get_world_size(), getattr(torch, args.dtype), bus_factor(op, args.ranks)
    shape = args.max_bytes // dtype.itemsize
    whole, other = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
    counts, size = [], args.min_bytes
    while size <= args.max_bytes:
        counts.append(size // (n * dtype.itemsize) * n)  # rounded down to n equal chunks
        size *= args.factor
    sizes = [prepare(whole[:count], other[:count]) for count in counts]
    wrong = [wrong_elements(op, t) for t in sizes]
    times = sample(op, sizes, args)

    points = [
        (factor * t.whole.nbytes, s[0].min().item()) for t, s in zip(sizes, times, strict=True)
    ]
    form = "{:>11} {:>11} {:>9} {:>9} {:>7} {:>7} {:>10} {:>6} {:>6}" + " {:>9}" * args.bare
    root = 0 if op in ROOTED else -1
    say(f"{op}: type {args.dtype}, redop {'sum' if op in SUMS else 'none'}, root {root}")
    names = "size count fastest median algbw busbw predicted error #wrong bare"
    say(form.format(*names.split()))
    say(
        form.format(
            "(B)", "(elements)", *["(us)"] * 2, *["(GB/s)"] * 2, "(us)", "(%)", "(all)", "(us)"
        )
    )
    rows = []
    for i, (t, seconds) in enumerate(zip(sizes, times, strict=True)):
        size, best, median = t.whole.nbytes, points[i][1], seconds[0].median().item()
        alpha, slope = fit(points[:i] + points[i + 1 :] or points)
        predicted = alpha + slope * points[i][0]
        row = {"bytes": size, "fastest_s": best, "median_s": median, "predicted_s": predicted}
        rows.append(row | {"wrong": wrong[i], "seconds": seconds.tolist()})
        rates = [f"{size / best / 1e9:.3f}", f"{points[i][0] / best / 1e9:.3f}"]
        micro = [f"{s * 1e6:.0f}" for s in (best, median, predicted, seconds[-1].min().item())]
        error = f"{100 * (predicted / best - 1):+.0f}"
        cells = (f"{size:,}", f"{size // dtype.itemsize:,}", *micro[:2], *rates, micro[2], error)
        say(form.format(*cells, wrong[i], micro[3]))
    alpha, slope = fit(points)
    beta = 1 / slope if slope else None  # None: too small a range of sizes to tell
    rate = f"{beta / 1e9:.2f}" if beta else "?"
    say(f"t = alpha + {factor:.2f} S / beta: alpha {alpha * 1e6:.0f} us, beta {rate} GB/s")
    batches = [s.shape[1] for s in times]
    say(f"{min(batches)} to {max(batches)} batches at each size, of up to {args.iters} calls")
    right = check(f"{op}: wrong elements at any size", sum(wrong), 0)
    judged = [row for row in rows if row["bytes"] >= JUDGED_FROM]
    errors = [abs(row["predicted_s"] / row["fastest_s"] - 1) for row in judged]
    if errors and len(rows) > 2:
        claim = f"{op}: median |error| at held-out sizes from 64 KiB"
        bound = tolerance([s[0].tolist() for s in times[-len(judged) :]])
        right = check(claim, statistics.median(errors), bound) and right
    if args.bare and judged:
        late = times[-len(judged) :]
        off = max((s[0].min() / s[1].min() - 1).abs().item() for s in late)
        noise = max((s[1, ::2].min() / s[1, 1::2].min() - 1).abs().item() for s in late)
        say(f"the bare loop's odd batches differ from its even ones by {noise:.1%}")
        claim = f"{op}: worst from 64 KiB, |ours / bare - 1|"
        right = check(claim, off, max(0.05, 2 * noise)) and right
    record = {"op": op, "factor": factor, "alpha_s": alpha, "beta_bytes_per_s": beta, "sizes": rows}
    return record, right


def run(args: argparse.Namespace, device: torch.device) -> bool:
    say(
        f"{args.ranks} ranks on {device.type}: by {dist.get_backend()}, a batch is as slow as its slowest rank"
    )
    results = [measure(op, args, device) for op in (CALLS if args.op == "all" else [args.op])]
    records = [record for record, _ in results]
    if args.json and dist.get_rank() == 0:
        header = {"world_size": args.ranks, "device": device.type, "dtype": args.dtype}
        args.json.write_text(json.dumps(header | {"collectives": records}, indent=1) + "\n")
    if args.plot and dist.get_rank() == 0:
        plot(records, args.plot)
    return all(right for _, right in results)


def plot(records: list[Record], path: Path) -> None:
    """Bus bandwidth over size: fastest (dots) and median (rings) batches, and the fitted lines."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "ch02"
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4))
    for number, record in enumerate(records):
        rows, factor, beta = record["sizes"], record["factor"], record["beta_bytes_per_s"]
        sizes, color = [row["bytes"] for row in rows], f"C{number}"
        fastest, median = (
            [factor * row["bytes"] / row[key] / 1e9 for row in rows]
            for key in ("fastest_s", "median_s")
        )
        line = [record["alpha_s"] + (factor * size / beta if beta else 0) for size in sizes]
        fitted = [factor * size / t / 1e9 for size, t in zip(sizes, line, strict=True)]
        axis.plot(sizes, fitted, color=color, label=f"{record['op']}: alpha + S x factor / beta")
        axis.plot(sizes, fastest, "o", color=color, label="fastest batch")
        axis.plot(sizes, median, "o", color=color, fillstyle="none", label="median batch")
    axis.set(xlabel="S (bytes)", ylabel="bus bandwidth (GB/s)", ylim=(0, None))
    axis.set_xscale("log", base=2)
    axis.legend(fontsize=8, frameon=False)
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
    add("--op", choices=(*CALLS, "all"), default="all_reduce", help="collective; all: each in turn")
    add("--min-bytes", type=parse_size, default="4K", help="smallest S; K, M, G are 1024, ...")
    add("--max-bytes", type=parse_size, default="16M", help="largest S in bytes")
    add("--factor", type=positive, default=4, help="each S is this many times the one before")
    add("--iters", type=positive, default=20, help="calls per batch, fewer where they take long")
    add("--warmup", type=positive, default=5, help="calls at each size before the first batch")
    add("--repeats", type=positive, default=30, help="batches per size, at least")
    dtypes = ("float32", "float64", "float16", "bfloat16", "int32", "int64")
    add("--dtype", choices=dtypes, default="float32", help="of the elements")
    add("--bare", action="store_true", help="also time a loop of nothing but the calls")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--json", type=Path, help="also write every batch's seconds to this file")
    add("--plot", type=Path, help="also draw bus bandwidth over size to this SVG file")
    args = parser.parse_args()
    args.ranks = int(os.environ.get("WORLD_SIZE", 2))
    least = args.ranks * getattr(torch, args.dtype).itemsize
    if args.ranks == 1:
        stop(f"one rank has no other to talk to: type  torchrun --nproc_per_node=2 {sys.argv[0]}")
    if not least <= args.min_bytes <= args.max_bytes:
        stop(f"give {least} <= --min-bytes <= --max-bytes: one element for each rank, or more")
    if args.factor == 1:
        stop("--factor 1 would never end: give 2 or more")
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
