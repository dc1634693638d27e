"""Measure how fast memory moves bytes, from the smallest cache to main memory or HBM.

    python chapter2-gpu-hardware-networking-and-parallelism-strategies/code/bandwidth_test.py --plot chapter2-gpu-hardware-networking-and-parallelism-strategies/figures/bandwidth.svg
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
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NoReturn

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
        synchronize(device)
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
    high, median, low = (moved / s / 1e9 for s in quartiles(seconds))
    fastest = moved / seconds[0] / 1e9
    row = {"kernel": kernel, "bytes": size, "seconds": seconds[0], "fastest": fastest}
    return row | {"median": median, "quartiles": [low, high]}


def worst_error(result: torch.Tensor, *sources: torch.Tensor) -> float:
    """Largest error of a + 3b, or of a copy, over the rounding that the two operations may do."""
    stride = max(1, len(result) // 2**20)
    terms = [factor * part[::stride].double() for factor, part in zip((1, 3), sources)]  # noqa: B905
    allowed = torch.finfo(result.dtype).eps * sum(term.abs() for term in terms)
    missed = (result[::stride].double() - sum(terms)).abs() / allowed.clamp(min=1e-30)
    return missed.nan_to_num(torch.inf).max().item()


def sweep(pool: torch.Tensor, sizes: list[int], repeats: int) -> Iterator[dict]:
    """Every kernel on every working set: a row each, with the error of what it computed."""
    for size in sizes:
        for kernel, (count, work) in KERNELS.items():
            operands = arrays(pool, size, count)
            operands[0].zero_()
            seconds = time_calls(partial(work, *operands), pool.device, repeats)
            row = rates(kernel, size, sum(part.nbytes for part in operands), seconds)
            yield row | {"error": worst_error(*operands)}


def transfers(size: int, device: torch.device, repeats: int) -> Iterator[dict]:
    """Between host and device, each way, from pinned and pageable memory; bytes counted once."""
    there = torch.ones(size, dtype=torch.uint8, device=device)
    for memory in ("pinned", "pageable"):
        here = torch.ones(size, dtype=torch.uint8, pin_memory=memory == "pinned")
        for way, pair in (("to device", (there, here)), ("to host", (here, there))):
            seconds = time_calls(partial(torch.Tensor.copy_, *pair, True), device, repeats)
            yield rates(f"{way}, {memory}", size, size, seconds)


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


def working_sets(args: argparse.Namespace, caches: dict[str, int], on_gpu: bool) -> list[int]:
    """The sizes to measure, in bytes; by default well beyond the largest cache."""
    free = torch.cuda.mem_get_info()[0] if on_gpu else psutil.virtual_memory().available
    top = max(4 * max(caches.values(), default=0), 2**31 if on_gpu else 2**29)
    top = args.max_bytes or min(top, free // 2)
    if not args.min_bytes <= top <= 0.8 * free:
        stop(f"--max-bytes {top} is not between --min-bytes and 80 % of the {free} bytes free")
    sizes = [args.min_bytes]
    while sizes[-1] < top:
        sizes.append(min(sizes[-1] * args.factor, top))
    return sizes


def run(args: argparse.Namespace, device: torch.device) -> list[bool | None]:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    on_gpu = device.type == "cuda"
    caches = cache_sizes(device, args.threads)
    sizes = working_sets(args, caches, on_gpu)
    noise = torch.rand(2**20).to(device, args.dtype)
    pool = noise.repeat(-(-sizes[-1] // noise.nbytes))
    threads = "1 stream" if on_gpu else f"{args.threads} threads"
    known = ", ".join(f"{level} {size / 2**10:,.0f} KiB" for level, size in caches.items())
    say(f"1 process on {device.type}: {threads}, caches {known or 'not visible'}")

    call_seconds = {}  # of one element: what a call takes that has nothing to move
    for kernel, (count, work) in KERNELS.items():
        one = partial(work, *(part[:1] for part in arrays(pool, sizes[0], count)))
        call_seconds[kernel] = time_calls(one, device, args.repeats)[0]
    say(f"{'bytes':>14}  {'kernel':<20} fastest   median GB/s, quartiles   call  level")
    rows = []
    for row in sweep(pool, sizes, args.repeats):
        row["call"] = min(1.0, call_seconds[row["kernel"]] / row["seconds"])
        fits = [level for level, size in caches.items() if row["bytes"] <= size]
        row["level"] = fits[0] if fits else "memory"
        rows.append(row)
        number = [*caches, "memory"].index(row["level"]) + 1
        say(f"{columns(row)} {row['call']:>5.0%}  {number:>5}")
    for row in transfers(min(sizes[-1], 2**28), device, args.repeats) if on_gpu else ():
        rows.append(row)
        say(columns(row))
    say("level: of the cache that the working set fits in; past the last cache, memory")
    say("call: what a call with one element takes, over the row's fastest")
    calls = ", ".join(f"{kernel} {s * 1e6:.1f} us" for kernel, s in call_seconds.items())
    say(f"one element: {calls}")
    if not on_gpu:
        say("host to device, and the memory's peak: no GPU, not measured here")

    rows_of = {kernel: [row for row in rows if row["kernel"] == kernel] for kernel in KERNELS}
    largest = max(found[-1]["fastest"] for found in rows_of.values())
    best = max(row["fastest"] for found in rows_of.values() for row in found)
    peak = peak_of_memory(device)
    if args.json:
        record = {"threads": args.threads, "caches": caches, "peak": peak, "rows": rows}
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    if args.plot:
        plot(rows_of, caches, args.plot)
    copied, added = (max(row["error"] for row in found) for found in rows_of.values())
    claims: list[bool | None] = [
        check("elements of the copies that differ, worst error", copied, 0),
        check("triad's worst error, over what rounding may do", added, 1),
        expect("rate of the largest working set, over the best of all", largest / best, 0.8, args.strict),
    ]  # fmt: skip
    if peak:
        claim = f"fraction of the memory's {peak:,.0f} GB/s, NVML's clock x width"
        claims.append(expect(claim, largest / peak, 0.8, args.strict, at_least=True))
    return claims


def columns(row: dict) -> str:
    low, high = row["quartiles"]
    middle = f"{row['fastest']:>7.1f}  {row['median']:>7.1f}  {low:>7.1f} .. {high:<7.1f}"
    return f"{row['bytes']:>14,}  {row['kernel']:<20} {middle}"


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


def parse_size(text: str) -> int:
    """Bytes in '64', '16K', '1M' or '2G' (powers of 1024)."""
    power = "KMG".find(text[-1:].upper()) + 1
    return int(text[:-1] if power else text) * 1024**power


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--min-bytes", type=parse_size, default="16K", help="smallest working set, K, M or G")
    add("--max-bytes", type=parse_size, help="largest working set; default: 4 x the largest cache")
    add("--factor", type=int, default=4, help="a working set is so many times the one before")
    add("--repeats", type=int, default=10, help="timings per row")
    add("--threads", type=int, default=torch.get_num_threads(), help="threads on a CPU")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of an element")
    add("--seed", type=int, default=0, help="for the numbers that are moved")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--json", type=Path, help="also write the result to this file")
    add("--plot", type=Path, help="also draw bandwidth over working set to this SVG file")
    add("--strict", action="store_true", help="exit 1 if an `expect:` line does not hold")
    args = parser.parse_args()
    args.dtype = getattr(torch, args.dtype)
    if args.min_bytes < 1024 or args.factor < 2:
        stop("--min-bytes is 1K or more, --factor 2 or more")
    return args


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


# Copied from ch01_single_gpu_baseline.main
def main() -> None:
    args = parse_args()
    sys.exit(conclude(run(args, pick_device(args.device))))


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


# Copied from ch01_single_gpu_baseline.quartiles
def quartiles(values: list[float]) -> list[float]:
    """First quartile, median and third quartile."""
    return torch.tensor(values).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()


# Copied from ch01_single_gpu_baseline.synchronize
def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


# Copied from ch01_single_gpu_baseline.pick_device
def pick_device(wanted: str) -> torch.device:
    """The accelerator if there is one, unless told otherwise."""
    found = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if wanted not in ("auto", "cpu", found.type):
        stop(f"--device {wanted}: this machine has {found.type}; type --device {found.type}")
    return torch.device("cpu") if wanted == "cpu" else found


# Copied from ch01_single_gpu_baseline.stop
def stop(message: str) -> NoReturn:
    """End with one line and exit code 2: the command was wrong, not the program."""
    sys.stderr.write(message + "\n")  # in one piece: other ranks write too
    sys.exit(2)


if __name__ == "__main__":
    main()
