"""Measure how fast memory moves bytes, from the smallest cache to main memory or HBM.

    python chapter2-gpu-hardware-networking-and-parallelism-strategies/code/bandwidth_test.py
    python chapter2-gpu-hardware-networking-and-parallelism-strategies/code/bandwidth_test.py --max-bytes 16M --dtype bfloat16 --threads 1

On GPUs:
    python chapter2-gpu-hardware-networking-and-parallelism-strategies/code/bandwidth_test.py --min-bytes 1M --max-bytes 8G

Bytes are those that a kernel asks to read and to write (STREAM's convention). Look at where the
rate falls as the working set outgrows a cache, and at the last row: no program streams its weights
from memory faster than that. Where "call" is large, the clock saw Python, not memory. Section 2.1.
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path

import psutil
import torch

# arrays per kernel, each read or written once per call (McCalpin, STREAM: COPY and TRIAD)
KERNELS: dict[str, tuple[int, Callable[..., torch.Tensor]]] = {
    "copy": (2, lambda a, b: a.copy_(b)),
    "triad": (3, lambda a, b, c: torch.add(b, c, alpha=3.0, out=a)),
}


def time_calls(work: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Seconds per call, sorted; each timing is a loop long enough to drown the clock's own cost."""

    def loop(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            work()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        return (time.perf_counter() - start) / calls

    loop(1)  # warm-up: page faults, thread pool, clocks
    long_enough = 1e-3 if device.type == "cpu" else 2e-2
    calls = max(1, int(long_enough / loop(1)))
    return sorted(loop(calls) for _ in range(repeats))


def arrays(pool: torch.Tensor, size: int, count: int) -> list[torch.Tensor]:
    """`count` arrays that fill `size` bytes together, or a little less: whole cache lines."""
    length = size // pool.itemsize // (32 * count) * 32
    return [pool[i * length : (i + 1) * length] for i in range(count)]


def rates(kernel: str, size: int, moved: int, seconds: list[float]) -> dict:
    """A row of the table, in GB/s; `seconds` are sorted."""
    points = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    slow = torch.tensor(seconds, dtype=torch.float64).quantile(points).tolist()
    fastest, high, median, low = (moved / s / 1e9 for s in (seconds[0], *slow))
    row = {"kernel": kernel, "bytes": size, "fastest": fastest}
    return row | {"median": median, "quartiles": [low, high]}


def error(result: torch.Tensor, *sources: torch.Tensor) -> float:
    """Largest error of a + 3b, or of a copy, over the rounding that the two operations may do."""
    stride = max(1, len(result) // 2**20)
    terms = [factor * part[::stride].double() for factor, part in zip((1, 3), sources)]  # noqa: B905
    allowed = torch.finfo(result.dtype).eps * sum(term.abs() for term in terms)
    missed = (result[::stride].double() - sum(terms)).abs() / allowed.clamp(min=1e-30)
    return missed.nan_to_num(torch.inf).max().item()


def transfers(size: int, device: torch.device, repeats: int) -> Iterator[dict]:
    """Between host and device, each way, from pinned and pageable memory; bytes counted once."""
    there = torch.ones(size, dtype=torch.uint8, device=device)
    for memory in ("pinned", "pageable"):
        here = torch.ones(size, dtype=torch.uint8, pin_memory=memory == "pinned")
        for way, pair in (("to device", (there, here)), ("to host", (here, there))):
            seconds = time_calls(partial(torch.Tensor.copy_, *pair, True), device, repeats)
            yield rates(f"{way}, {memory}", size, size, seconds) | {"call": 0.0, "level": "link"}


def cache_sizes(device: torch.device, threads: int) -> dict[str, int]:
    """Bytes of each cache that all threads have together, from sysfs; {} if it does not tell."""
    if device.type == "cuda":
        return {"L2": torch.cuda.get_device_properties(device).L2_cache_size}
    found: dict[tuple[str, str], int] = {}
    for cpu in range(threads):
        for index in Path(f"/sys/devices/system/cpu/cpu{cpu}/cache").glob("index*"):
            with contextlib.suppress(OSError):
                names = ("level", "type", "size", "shared_cpu_list")
                level, kind, size, sharers = ((index / n).read_text().strip() for n in names)
                if kind != "Instruction":
                    found[f"L{level}", sharers] = parse_size(size)
    levels = sorted({level for level, _ in found})
    return {level: sum(found[key] for key in found if level in key) for level in levels}


def peak_of_memory(device: torch.device) -> float | None:
    """GB/s of the device's memory by its clock and width, as NVML tells; None if it does not."""
    with contextlib.suppress(Exception):  # a CPU, no library, no driver, or another vendor
        import pynvml as nvml

        nvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(device).uuid  # NVML counts GPUs in its own order
        gpu = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        bits = 2 * nvml.nvmlDeviceGetMemoryBusWidth(gpu)  # per clock: data on both of its edges
        return nvml.nvmlDeviceGetMaxClockInfo(gpu, nvml.NVML_CLOCK_MEM) * 1e6 * bits / 8e9
    return None


def sweep(pool: torch.Tensor, sizes: list[int], caches: dict, repeats: int) -> Iterator[dict]:
    """Every kernel on every working set: a row each, with the error of what it computed."""
    for size in sizes:
        level = next((cache for cache, held in caches.items() if size <= held), "memory")
        for kernel, (count, work) in KERNELS.items():
            operands = arrays(pool, size, count)
            operands[0].zero_()
            seconds = time_calls(partial(work, *operands), pool.device, repeats)
            one = time_calls(partial(work, *(x[:1] for x in operands)), pool.device, repeats)
            row = rates(kernel, size, sum(part.nbytes for part in operands), seconds)
            row |= {"call": min(1.0, one[0] / seconds[0]), "call_s": one[0], "level": level}
            yield row | {"error": error(*operands)}


def run(args: argparse.Namespace, device: torch.device) -> bool:
    caches, on_gpu = cache_sizes(device, args.threads), device.type == "cuda"
    top = args.max_bytes or max(4 * max(caches.values(), default=0), 2**31 if on_gpu else 2**29)
    free = torch.cuda.mem_get_info()[0] if on_gpu else psutil.virtual_memory().available
    if not args.min_bytes <= top <= 0.8 * free:
        stop(f"--max-bytes {top} is not between --min-bytes and 80 % of the {free} bytes free")
    sizes = [args.min_bytes]
    while sizes[-1] < top:
        sizes.append(min(sizes[-1] * args.factor, top))
    torch.manual_seed(args.seed)
    noise = torch.rand(2**20).to(device, args.dtype)
    pool = noise.repeat(-(-top // noise.nbytes))
    threads = "1 stream" if on_gpu else f"{args.threads} threads"
    known = ", ".join(f"{level} {size / 2**10:,.0f} KiB" for level, size in caches.items())
    print(f"1 process on {device.type}: {threads}, caches {known or 'not visible'}")
    print(f"{'bytes':>14}  {'kernel':<20} fastest   median GB/s, quartiles   call  level")
    rows, link = [], transfers(min(top, 2**28), device, args.repeats) if on_gpu else ()
    for row in chain(sweep(pool, sizes, caches, args.repeats), link):
        rows.append(row)
        numbers = (row["fastest"], row["median"], *row["quartiles"], row["call"])
        columns = "{:>7.1f}  {:>7.1f}  {:>7.1f} .. {:<7.1f} {:>5.0%}".format(*numbers)
        level = [*caches, "memory", "link"].index(row["level"]) + 1
        print(f"{row['bytes']:>14,}  {row['kernel']:<20} {columns}  {level:>5}")
    print("level: of the cache that the working set fits in; past the last cache, memory")
    print("call: what a call with one element takes, over the row's fastest")

    rows_of = {kernel: [row for row in rows if row["kernel"] == kernel] for kernel in KERNELS}
    last = [mine[-1] for mine in rows_of.values()]  # what is only just too large is half cached
    beyond = max(row["fastest"] * (row["level"] == "memory") for row in last)
    within = max((row["fastest"] for row in rows if row["level"] in caches), default=0.0)
    peak = peak_of_memory(device)
    calls = [min(row["call_s"] for row in mine) * 1e6 for mine in rows_of.values()]
    print("one element: copy {:.1f} us, triad {:.1f} us".format(*calls))
    if not on_gpu:
        print("host to device: no GPU, not measured here; the memory's peak: not visible")
    if peak:
        print(f"fraction of peak: {beyond / peak:.0%} of {peak:,.0f} GB/s, NVML's clock x width")
    if args.json:
        record = {"threads": args.threads, "caches": caches, "peak": peak, "rows": rows}
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    if args.plot:
        plot(rows_of, caches, args.plot)
    copied, added = (max(row["error"] for row in mine) for mine in rows_of.values())
    held = [check("copy, error", copied, 0), check("triad, error over rounding's", added, 1)]
    if beyond and within and not on_gpu:  # on a GPU, a small kernel shows its launch
        held.append(check("memory over the fastest cache", beyond / within, 1))
    if beyond and peak:
        held.append(check("memory over its peak", beyond / peak, 1))
    return all(held)


def plot(rows_of: dict[str, list[dict]], caches: dict[str, int], path: Path) -> None:
    """Draw the fastest rate over the working set, the quartiles, and the sizes of the caches."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "ch02"
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7.5, 3.8), layout="tight")
    for kernel, rows in rows_of.items():
        sizes = [row["bytes"] / 2**10 for row in rows]
        (line,) = axis.plot(sizes, [row["fastest"] for row in rows], "o-", ms=4, label=kernel)
        low, high = zip(*(row["quartiles"] for row in rows), strict=True)
        axis.fill_between(sizes, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axis.set(xlabel="KiB in use", ylabel="GB/s, read and written", ylim=(0, None), xscale="log")
    axis.set_xticks(sizes, [f"{size:,.0f}" for size in sizes], rotation=30)
    for level, size in caches.items():
        axis.axvline(size / 2**10, color="#777", linestyle="--", linewidth=1)
        axis.text(size / 2**10, axis.get_ylim()[1], level, ha="center", va="bottom")
    axis.legend(frameon=False)
    figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None})


def check(claim: str, value: float, bound: float) -> bool:
    print(f"check: {claim} = {value:.3g} <= {bound:.3g}  {'ok' if value <= bound else 'FAILED'}")
    return value <= bound


def pick_device(wanted: str) -> torch.device:
    """The accelerator if there is one, unless told otherwise."""
    found = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if wanted not in ("auto", "cpu", found.type):
        stop(f"--device {wanted}: this machine has {found.type}; type --device {found.type}")
    return torch.device("cpu") if wanted == "cpu" else found


def stop(message: str) -> None:
    print(message, file=sys.stderr)
    sys.exit(2)


def parse_size(text: str) -> int:
    """'64', '16K', '1M' or '2G' (powers of 1024) as a whole number above 0."""
    unit = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:].upper(), 1)
    digits = text if unit == 1 else text[:-1]
    if not digits.isdecimal() or int(digits) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(digits) * unit


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.error = lambda message: stop(f"{message}: --help lists the flags")
    add = parser.add_argument
    add("--min-bytes", type=parse_size, default="16K", help="smallest working set, K, M or G")
    add("--max-bytes", type=parse_size, help="largest working set; default: 4 x the largest cache")
    add(
        "--factor", type=parse_size, default=4, help="a working set is so many times the one before"
    )
    add("--repeats", type=parse_size, default=20, help="timings per row")
    add("--threads", type=parse_size, default=torch.get_num_threads(), help="threads on a CPU")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of an element")
    add("--seed", type=int, default=0, help="for the numbers that are moved")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--json", type=Path, help="also write the result to this file")
    add("--plot", type=Path, help="also draw bandwidth over working set to this SVG file")
    args = parser.parse_args()
    args.dtype = getattr(torch, args.dtype)
    if args.min_bytes < 1024 or args.factor < 2:
        stop("--min-bytes is 1K or more, --factor 2 or more")
    for path in filter(None, (args.json, args.plot)):
        try:
            path.open("ab").close()  # or it would fail after the work
        except OSError as error:
            stop(f"cannot write {path} ({error.strerror}): give another file")
    torch.set_num_threads(args.threads)
    return args


def main() -> None:
    args = parse_args()
    sys.exit(not run(args, pick_device(args.device)))


if __name__ == "__main__":
    main()
