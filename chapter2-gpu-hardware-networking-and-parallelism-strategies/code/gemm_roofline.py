"""Put matrix products on the roofline: which does the memory hold back, and which the arithmetic?

    python chapter2-gpu-hardware-networking-and-parallelism-strategies/code/gemm_roofline.py --plot chapter2-gpu-hardware-networking-and-parallelism-strategies/figures/gemm_roofline.svg

On GPUs:
    python chapter2-gpu-hardware-networking-and-parallelism-strategies/code/gemm_roofline.py --width 8192 --dtypes float32 float16 bfloat16

The sloping roofs are measured apart from the products, the flat one is the fastest product of all.
Look at the decode rows: one token reads every weight for two FLOPs of work, and no arithmetic unit
can help it. Section 2.1.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import NoReturn

import torch

DTYPES = ("float32", "bfloat16", "float16", "float64")
SMALL = 256  # a product of this size takes 30 ms where a 16-bit dtype is emulated, at 1 GFLOP/s


def shapes(width: int) -> list[tuple[str, int, int, int]]:
    """Names and m, k, n of the products [m, k] x [k, n]; `width` is the model's hidden size."""
    squares = [("square", *[width // share] * 3) for share in (32, 16, 8, 4, 2)]
    decode = [("decode", sequences, width, width) for sequences in (1, 8, 64)]
    training = [("scores", width, 64, width), ("training", width, width, width)]
    odd = [("odd", size, size, size) for size in (width - 1, width + 1)]
    return squares + decode + training + odd


def small_rate(name: str, device: torch.device) -> float:
    """FLOP/s of a small square product: tells what a dtype costs before it is asked for more.

    By one thread: where the cores are busy, several would wait for each other, whatever the dtype.
    """
    square = torch.randn(SMALL, SMALL, device=device).to(getattr(torch, name))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rate = 2 * SMALL**3 / time_calls(partial(torch.mm, square, square), device, 3)[0]
    torch.set_num_threads(threads)
    return rate


def cache_range(device: torch.device) -> tuple[int, int]:
    """Bytes that fit in a cache and move for longer than it takes to start a kernel."""
    return (2**20, 2**22) if device.type == "cpu" else (2**24, 2**25)


def bandwidths(pool: torch.Tensor, repeats: int) -> dict[str, float]:
    """Bytes/s from memory and from cache: the fastest triad, or dot product, which only reads."""
    found = {"memory": 0.0, "cache": 0.0}
    low, high = cache_range(pool.device)
    for level, size in (("memory", pool.nbytes), ("cache", low), ("cache", high)):
        part = pool[: size // 24 * 6]  # splits into thirds and into halves
        a, b, c = part.chunk(3)
        triad = partial(torch.add, b, c, alpha=3.0, out=a)
        for work in (triad, partial(torch.dot, *part.chunk(2))):
            rate = part.nbytes / time_calls(work, pool.device, repeats)[0]
            found[level] = max(found[level], rate)
    return found


def peak(source: torch.Tensor, width: int, repeats: int) -> float:
    """FLOP/s of the fastest of two large squares, neither of which is in the table."""
    rates = []
    for size in (max(1280, width * 5 // 8), max(896, width * 7 // 8)):
        work = partial(torch.mm, *source[:, :size, :size].contiguous())
        rates.append(2 * size**3 / time_calls(work, source.device, repeats)[0])
    return max(rates)


def time_product(name: str, a: torch.Tensor, weights: torch.Tensor, repeats: int) -> dict:
    """A row of the table: a [m, k] times each of `weights` [count, k, n] in turn, in FLOP/s.

    Decode comes back to a weight only after all others, so it finds none of them in a cache. The
    other products are repeated on what the caches hold.
    """
    m, k = a.shape
    n = weights.shape[-1]
    out = a.new_zeros(m, n)
    turn = cycle(weights)  # equal ones, if there are several
    seconds = time_calls(lambda: torch.mm(a, next(turn), out=out), a.device, repeats)
    flop = 2 * m * k * n
    moved = (m * k + k * n + m * n) * a.itemsize
    row = {"name": name, "shape": [m, k, n], "dtype": str(a.dtype).removeprefix("torch.")}
    row |= {"flop": flop, "intensity": flop / moved, "fastest": flop / seconds[0]}
    row["median"] = flop / statistics.median(seconds)
    return row | {"error": product_error(a, weights[0], out)}


def product_error(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> float:
    """Largest |out - ab| over what rounding may do: to sums of k terms, and then to each sum.

    That is eps_out + k eps_sum, times |a||b|: twice the bound of Higham, Accuracy and Stability of
    Numerical Algorithms, section 3.5. The reference is computed in float64.
    """
    sums = torch.float64 if a.dtype == torch.float64 else torch.float32
    allowed = torch.finfo(a.dtype).eps + len(b) * torch.finfo(sums).eps
    rows = torch.linspace(0, len(a) - 1, min(len(a), 16)).long()  # of a large product, 16 rows
    a = a[rows].double()
    b = b.double()
    out = out[rows].double()
    missed = (out - a @ b).abs() / (allowed * (a.abs() @ b.abs()))
    return missed.nan_to_num(torch.inf).max().item()


def roof(row: dict, rates: dict[str, float]) -> float:
    """FLOP/s that the machine allows this row: by its arithmetic, or by its memory or cache."""
    level = "memory" if row["name"] == "decode" else "cache"
    return min(rates[row["dtype"]], row["intensity"] * rates[level])


def run(args: argparse.Namespace, device: torch.device) -> list[bool | None]:
    torch.manual_seed(args.seed)
    noise = torch.rand(2**20, device=device)
    pool = noise.repeat(-(-args.stream // noise.nbytes))
    rates = bandwidths(pool, args.repeats)  # bytes/s by level, and FLOP/s by dtype
    reference = small_rate("float32", device)
    model_width = args.width or (2048 if 2 * 2048**3 / reference < 0.4 else 1024)
    numbers = torch.randn(2, *[max(1280, model_width + 1)] * 2, device=device)
    say(f"1 process on {device.type}: the roofs, each the fastest of its kind")
    say(f"memory {rates['memory'] / 1e9:>10,.1f} GB/s, beyond the caches")
    low, high = cache_range(device)
    say(f"cache  {rates['cache'] / 1e9:>10,.1f} GB/s, {low >> 20} to {high >> 20} MiB in use")

    rows: list[dict] = []
    for name in args.dtypes:
        # A CPU without a unit for a dtype emulates it, tens of times slower: once, and small.
        emulated = device.type == "cpu" and small_rate(name, device) < 0.1 * reference
        width = SMALL if emulated else model_width
        repeats = 1 if emulated else args.repeats
        source = numbers.to(getattr(torch, name))
        weight = source[:1, :width, :width]
        streamed = weight.repeat(max(2, args.stream // weight.nbytes), 1, 1)  # [count, k, n]
        table = []
        for what, m, k, n in shapes(width):
            a = source[0, :m, :k].contiguous()
            weights = streamed if what == "decode" else source[1:, :k, :n].contiguous()
            table.append(time_product(what, a, weights, repeats))
        rates[name] = max(row["fastest"] for row in table)
        if not emulated:  # a processor's best is what it was ever seen to do
            rates[name] = max(rates[name], peak(source, width, repeats))
        for row in table:
            row["roof"] = roof(row, rates)
            row["share"] = row["fastest"] / row["roof"]
        rows += table
        ridge = rates[name] / rates["memory"]
        line = f"{name:<9} {rates[name] / 1e9:>7,.0f} GFLOP/s; memory-bound below {ridge:.0f} FLOP/byte"
        say(line + f"; no unit for it here: emulated, so only up to {width}" * emulated)

    say("name      dtype        m     k     n     MFLOP  FLOP/B  GFLOP/s  median   roof  share")
    for row in rows:
        shape = "{:>5} {:>5} {:>5}".format(*row["shape"])
        work = f"{row['flop'] / 1e6:>9,.1f} {row['intensity']:>7.1f}"
        speed = " ".join(f"{row[key] / 1e9:>7,.1f}" for key in ("fastest", "median", "roof"))
        say(f"{row['name']:<9} {row['dtype']:<9} {shape} {work}  {speed} {row['share']:>6.0%}")
    if args.json:
        args.json.write_text(json.dumps({"rates": rates, "rows": rows}, indent=1) + "\n")
    if args.plot:
        plot(rows, rates, args.plot)
    one = [row for row in rows if row["name"] == "decode" and row["shape"][0] == 1]
    full = [row for row in rows if row["name"] == "training"]
    per_number = max(r["intensity"] * getattr(torch, r["dtype"]).itemsize / 2 for r in one)
    slower = one[0]["fastest"] / full[0]["fastest"]
    what = f"decode of one in {args.dtypes[0]}"
    return [
        check("worst error, over what rounding may do", max(row["error"] for row in rows), 1),
        check("multiply-adds per number that decode of one moves", per_number, 1),
        expect(f"{what}, share of its roof", one[0]["share"], 0.4, args.strict, at_least=True),
        expect(f"{what}, GFLOP/s over training's", slower, 0.25, args.strict),
    ]


def plot(rows: list[dict], rates: dict[str, float], path: Path) -> None:
    """Draw the products under their roofs, both axes logarithmic: a colour per dtype."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "ch02"
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7.5, 4.4), layout="tight")
    intensities = [row["intensity"] for row in rows]
    left = min(intensities) / 2
    right = max(intensities) * 2
    for name in dict.fromkeys(row["dtype"] for row in rows):
        color = f"C{DTYPES.index(name)}"
        for level, style in (("memory", "-"), ("cache", "--")):
            x = [left, max(rates[name] / rates[level], left), right]
            y = [min(rates[name], v * rates[level]) / 1e9 for v in x]
            axis.plot(x, y, style, color=color, lw=1, label=f"{name}, data in {level}")
        for row in (row for row in rows if row["dtype"] == name):
            marker = "^" if row["name"] == "decode" else "o"
            axis.plot(row["intensity"], row["fastest"] / 1e9, marker, color=color, ms=5)
    axis.set(xscale="log", yscale="log", xlabel="FLOP per byte")
    axis.set_ylabel("GFLOP/s (triangles: decode)")
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None})


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--width",
        type=int,
        help="hidden size; default: 2048, or 1024 where that takes a thread 0.4 s",
    )
    add("--stream", type=parse_size, default="256M", help="bytes, more than a cache holds")
    add("--dtypes", nargs="+", choices=DTYPES, default=DTYPES[:2], help="of the matrices")
    add("--repeats", type=int, default=5, help="timings of each product")
    add("--seed", type=int, default=0, help="for the matrices")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--json", type=Path, help="also write the result to this file, in FLOP/s and bytes/s")
    add("--plot", type=Path, help="also draw the roofline to this SVG file")
    add("--strict", action="store_true", help="exit 1 if an `expect:` line does not hold")
    args = parser.parse_args()
    if args.width is not None and args.width < 32:
        stop(f"--width {args.width}: the smallest square is a 32nd of it, give 32 or more")
    return args


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


# Copied from bandwidth_test.time_calls
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


# Copied from bandwidth_test.parse_size
def parse_size(text: str) -> int:
    """Bytes in '64', '16K', '1M' or '2G' (powers of 1024)."""
    power = "KMG".find(text[-1:].upper()) + 1
    return int(text[:-1] if power else text) * 1024**power


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
