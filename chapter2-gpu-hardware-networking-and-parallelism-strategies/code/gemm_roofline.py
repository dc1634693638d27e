"""Put matrix products on the roofline: which does the memory hold back, and which the arithmetic?

    python chapter2-gpu-hardware-networking-and-parallelism-strategies/code/gemm_roofline.py
    python chapter2-gpu-hardware-networking-and-parallelism-strategies/code/gemm_roofline.py --dtypes float64 --width 768

On GPUs:
    python chapter2-gpu-hardware-networking-and-parallelism-strategies/code/gemm_roofline.py --width 8192 --dtypes float32 float16 bfloat16

The sloping roofs are measured apart from the products, the flat one is the fastest product of all.
Look at the decode rows: one token reads every weight for two FLOPs of work, and no arithmetic unit
can help it. Section 2.1.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path

import torch

DTYPES = ("float32", "bfloat16", "float16", "float64")
NOISE = 1.5  # of a shared machine: its memory may be so much faster at another moment


def shapes(width: int) -> list[tuple[str, int, int, int]]:
    """Names and m, k, n of the products [m, k] x [k, n]; `width` is the model's hidden size."""
    squares = [
        ("square", size, size, size) for size in (2**i for i in range(6, 13)) if size < width
    ]
    decode = [("decode", sequences, width, width) for sequences in (1, 8, 64)]
    training = [("scores", width, 64, width), ("training", width, width, width)]
    odd = [("odd", size, size, size) for size in (width - 1, width + 1)]
    return squares + decode + training + odd


def seconds_of(work: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Seconds per call, sorted; each timing is a loop long enough to drown the clock's own cost."""

    def loop(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            work()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        return (time.perf_counter() - start) / calls

    loop(1)  # warm-up
    first, long_enough = loop(1), 1e-3 if device.type == "cpu" else 1e-2
    calls = max(1, int(long_enough / first))
    if calls == 1:
        return sorted([first, *(loop(1) for _ in range(repeats - 1))])
    return sorted(loop(calls) for _ in range(4 * repeats))  # short ones are cheap to repeat


def bandwidths(pool: torch.Tensor, repeats: int) -> dict[str, float]:
    """Bytes/s from memory and from cache: the fastest triad, or dot product, which only reads."""
    found = {"memory": 0.0, "cache": 0.0}
    for level, size in (("memory", pool.nbytes), ("cache", 2**20), ("cache", 2**22)):
        part = pool[: size // 24 * 6]  # splits into thirds and into halves
        a, b, c = part.chunk(3)
        for work in (
            partial(torch.add, b, c, alpha=3.0, out=a),
            partial(torch.dot, *part.chunk(2)),
        ):
            rate = part.nbytes / seconds_of(work, pool.device, repeats)[0]
            found[level] = max(found[level], rate)
    return found


def peak(source: torch.Tensor, width: int, repeats: int) -> float:
    """FLOP/s of the fastest of two large squares, neither of which is in the table."""
    rates = []
    for size in (max(1280, width * 5 // 8), max(896, width * 7 // 8)):
        work = partial(torch.mm, *source[:, :size, :size].contiguous())
        rates.append(2 * size**3 / seconds_of(work, source.device, repeats)[0])
    return max(rates)


def measure(name: str, a: torch.Tensor, weights: torch.Tensor, repeats: int) -> dict:
    """A row of the table: a [m, k] times each of `weights` [count, k, n] in turn, in FLOP/s.

    Decode comes back to a weight only after all others, so it finds none of them in a cache. The
    other products are repeated on what the caches hold.
    """
    (m, k), n = a.shape, weights.shape[-1]
    out, turn = a.new_empty(m, n), cycle(weights)
    seconds = seconds_of(lambda: torch.mm(a, next(turn), out=out), a.device, repeats)
    flop, moved = 2 * m * k * n, (m * k + k * n + m * n) * a.itemsize
    row = {"name": name, "shape": [m, k, n], "dtype": str(a.dtype).removeprefix("torch.")}
    row |= {"flop": flop, "intensity": flop / moved, "fastest": flop / seconds[0]}
    row["median"] = flop / statistics.median(seconds)
    return row | {"error": error(a, weights[0], torch.mm(a, weights[0], out=out))}


def error(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> float:
    """Largest |out - ab| over what rounding may do: to sums of k terms, and then to each sum.

    That is eps_out + k eps_sum, times |a||b|: twice the bound of Higham, Accuracy and Stability of
    Numerical Algorithms, section 3.5. The reference is computed in float64.
    """
    sums = torch.float64 if a.dtype == torch.float64 else torch.float32
    allowed = torch.finfo(a.dtype).eps + len(b) * torch.finfo(sums).eps
    rows = torch.linspace(0, len(a) - 1, min(len(a), 16)).long()  # of a large product, 16 rows
    a, b, out = a[rows].double(), b.double(), out[rows].double()
    return (
        ((out - a @ b).abs() / (allowed * (a.abs() @ b.abs()))).nan_to_num(torch.inf).max().item()
    )


def roof(row: dict, rates: dict[str, float]) -> tuple[float, str]:
    """FLOP/s that the machine allows this row, and what it is that allows no more."""
    level = "memory" if row["name"] == "decode" else "cache"
    return min((rates[row["dtype"]], "arithmetic"), (row["intensity"] * rates[level], level))


def run(args: argparse.Namespace, device: torch.device) -> bool:
    torch.manual_seed(args.seed)
    noise = torch.rand(2**20, device=device)
    pool = noise.repeat(-(-args.stream // noise.nbytes))
    numbers = torch.randn(2, *[max(1280, args.width + 1)] * 2, device=device)
    rates, rows = bandwidths(pool, args.repeats), []  # bytes/s by level, FLOP/s by dtype

    def update(new: dict[str, float]) -> None:
        rates.update({name: max(rate, rates.get(name, 0.0)) for name, rate in new.items()})

    for name in args.dtypes:
        source = numbers.to(getattr(torch, name))
        update({name: peak(source, args.width, args.repeats)})
        weight = source[:1, : args.width, : args.width]
        streamed = weight.repeat(max(2, args.stream // weight.nbytes), 1, 1)  # [count, k, n]
        for what, m, k, n in shapes(args.width):
            a, b = source[0, :m, :k].contiguous(), source[1:, :k, :n].contiguous()
            weights = streamed if what == "decode" else b  # [count, k, n]
            rows.append(measure(what, a, weights, args.repeats))
        # A processor's best is what it was ever seen to do: in the squares, or in a row.
        update({name: max(row["fastest"] for row in rows if row["dtype"] == name)})
    update(bandwidths(pool, args.repeats))

    print(f"1 process on {device.type}: the roofs, each the fastest of its kind")
    print(f"memory {rates['memory'] / 1e9:>10,.1f} GB/s, beyond the caches")
    print(f"cache  {rates['cache'] / 1e9:>10,.1f} GB/s, 1 to 4 MiB in use")
    for name in args.dtypes:
        ridge = rates[name] / rates["memory"]
        print(
            f"{name:<9} {rates[name] / 1e9:>7,.0f} GFLOP/s; memory-bound below {ridge:.0f} FLOP/byte"
        )
    print("name      dtype        m     k     n     MFLOP  FLOP/B  GFLOP/s  median   roof  share")
    for row in rows:
        row["roof"], row["limit"] = roof(row, rates)
        row["share"] = row["fastest"] / row["roof"]
        shape = "{:>5} {:>5} {:>5}".format(*row["shape"])
        work = f"{row['flop'] / 1e6:>9,.1f} {row['intensity']:>7.1f}"
        speed = " ".join(f"{row[key] / 1e9:>7,.1f}" for key in ("fastest", "median", "roof"))
        print(f"{row['name']:<9} {row['dtype']:<9} {shape} {work}  {speed} {row['share']:>6.0%}")
    if args.json:
        args.json.write_text(json.dumps({"rates": rates, "rows": rows}, indent=1) + "\n")
    if args.plot:
        plot(rows, rates, args.plot)
    one = [row for row in rows if row["name"] == "decode" and row["shape"][0] == 1]
    full = [row for row in rows if row["name"] == "training"]
    per_weight = max(r["intensity"] * getattr(torch, r["dtype"]).itemsize / 2 for r in one)
    slower = max(a["fastest"] / b["fastest"] for a, b in zip(one, full, strict=True))
    held = [check("error over rounding's", max(row["error"] for row in rows), 1)]
    held.append(check("decode of 1: GFLOP/s over the roof", max(r["share"] for r in one), NOISE))
    held.append(check("decode of 1: multiply-adds per number moved", per_weight, 1))
    return check("decode of 1: GFLOP/s over training's", slower, 1) and all(held)


def plot(rows: list[dict], rates: dict[str, float], path: Path) -> None:
    """Draw the products under their roofs, both axes logarithmic: a colour per dtype."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "ch02"
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7.5, 4.4), layout="tight")
    intensities = [row["intensity"] for row in rows]
    ends = min(intensities) / 2, max(intensities) * 2
    for name in dict.fromkeys(row["dtype"] for row in rows):
        color = f"C{DTYPES.index(name)}"
        for level, style in (("memory", "-"), ("cache", "--")):
            ridge = rates[name] / rates[level]
            x = [ends[0], max(ridge, ends[0]), ends[1]]
            y = [min(rates[name], v * rates[level]) / 1e9 for v in x]
            axis.plot(x, y, style, color=color, lw=1, label=f"{name}, data in {level}")
        for row in (row for row in rows if row["dtype"] == name):
            marker = "^" if row["name"] == "decode" else "o"
            axis.plot(row["intensity"], row["fastest"] / 1e9, marker, color=color, ms=5)
    axis.set(
        xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="GFLOP/s (triangles: decode)"
    )
    axis.legend(frameon=False, fontsize=8)
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
    add("--width", type=parse_size, default=2048, help="hidden size of the model")
    add(
        "--stream", type=parse_size, default="256M", help="bytes of memory, more than a cache holds"
    )
    add("--dtypes", nargs="+", choices=DTYPES, default=DTYPES[:2], help="of the matrices")
    add(
        "--repeats", type=parse_size, default=3, help="timings of a long product; of a short one 4x"
    )
    add("--seed", type=int, default=0, help="for the matrices")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--json", type=Path, help="also write the result to this file, in FLOP/s and bytes/s")
    add("--plot", type=Path, help="also draw the roofline to this SVG file")
    args = parser.parse_args()
    if args.width < 128 or args.stream < 2**23:
        stop("too small to measure: give --width 128 or more, --stream 8M or more")
    for path in filter(None, (args.json, args.plot)):
        try:
            path.open("ab").close()  # or it would fail after the work
        except OSError as error:
            stop(f"cannot write {path} ({error.strerror}): give another file")
    return args


def main() -> None:
    args = parse_args()
    sys.exit(not run(args, pick_device(args.device)))


if __name__ == "__main__":
    main()
