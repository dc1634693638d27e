"""Measure what this machine gives each rank while all ranks work, and write it down for predictions.

    torchrun --nproc_per_node=2 chapter2-gpu-hardware-networking-and-parallelism-strategies/code/calibrate.py
    python chapter2-gpu-hardware-networking-and-parallelism-strategies/code/calibrate.py --quick --json runs/one_process.json

On GPUs:
    torchrun --nproc_per_node=8 chapter2-gpu-hardware-networking-and-parallelism-strategies/code/calibrate.py

The file, calibration.json, is what later chapters read with --calibration. Its fields:
    schema                  1: the version of this list
    machine, torch, device, backend, date   where it was measured (backend: null for one process)
    world_size, threads_per_rank            ranks, and threads of each rank
    matmul_flops_per_s      dtype -> floating-point operations per second of one rank
    memory_bytes_per_s      triad beyond the caches: bytes read and written per second of one rank
    point_to_point          alpha_s (s), beta_bytes_per_s (B/s), median_error (a fraction): a rank sends
                            to its right neighbour and receives from its left; null for one process
    collectives             name -> the same three, for t = alpha + factor S / beta with nccl-tests'
                            factor and S (allreduce_microbench.py); empty for one process
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
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

# torch 2.13 renamed these two
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

# bus factor of n ranks (nccl-tests, doc/PERFORMANCE.md), and the call on two tensors of S bytes
COLLECTIVES = {
    "all_reduce": (lambda n: 2 * (n - 1) / n, lambda a, b: dist.all_reduce(a)),
    "all_gather": (lambda n: (n - 1) / n, lambda a, b: all_gather_single(b, own(a))),
    "reduce_scatter": (lambda n: (n - 1) / n, lambda a, b: reduce_scatter_single(own(b), a)),
    "broadcast": (lambda n: 1.0, lambda a, b: dist.broadcast(a, 0)),
    "all_to_all": (lambda n: (n - 1) / n, lambda a, b: dist.all_to_all_single(b, a)),
    "point_to_point": (lambda n: 1.0, lambda a, b: exchange(a, b)),
}
Model = dict[str, float]
BATCH_S = 0.02  # seconds


def own(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.chunk(dist.get_world_size())[dist.get_rank()]


def exchange(outgoing: torch.Tensor, incoming: torch.Tensor) -> None:
    """Send to the right neighbour and receive from the left one, both at once."""
    rank, n = dist.get_rank(), dist.get_world_size()
    send = dist.P2POp(dist.isend, outgoing, (rank + 1) % n)
    receive = dist.P2POp(dist.irecv, incoming, (rank - 1) % n)
    for work in dist.batch_isend_irecv([send, receive]):
        work.wait()


def slowest_rank(seconds: list[float], device: torch.device) -> torch.Tensor:
    tensor = torch.tensor(seconds, device=device)
    if dist.is_initialized():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.cpu()


def batch_seconds(call: Callable[[], object], count: int, device: torch.device) -> float:
    """Seconds per call of `count` calls back to back, after one more that all ranks start from."""
    call()
    synchronize(device)
    if dist.is_initialized():
        dist.barrier()
    start = time.perf_counter()
    for _ in range(count):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / count


def fastest(
    calls: list[Callable[[], object]], rounds: int, what: str, device: torch.device
) -> list[float]:
    """Fastest seconds of each call over the rounds; a call takes as long as on its slowest rank.

    The calls take turns, so that a slow moment of the machine hits them all. Each turn is a batch of
    up to 20 calls or BATCH_S seconds, so that ranks that start unevenly pay for it only once.
    """
    first = slowest_rank([batch_seconds(call, 1, device) for call in calls], device)
    counts = [max(1, min(20, int(BATCH_S / s))) for s in first.tolist()]
    best = torch.full((len(calls),), math.inf)
    for _ in tqdm(range(rounds), what, leave=False, disable=None if is_first() else True):
        turns = zip(calls, counts, strict=True)
        seconds = [batch_seconds(call, count, device) for call, count in turns]
        best = torch.minimum(best, slowest_rank(seconds, device))
    return best.tolist()


def matmul_rates(args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """FLOP/s by dtype: 2 k^3 operations in a product of two k x k matrices."""
    k = args.matmul or (8192 if device.type != "cpu" else 1024)
    rates = {}
    for name in ("float32", "bfloat16", "float16", "float64"):
        if name == "float16" and device.type == "cpu":
            continue  # a GPU's format
        a, b = (torch.randn(k, k, device=device).to(getattr(torch, name)) for _ in range(2))
        seconds = fastest([lambda a=a, b=b: a @ b], args.rounds, name, device)
        rates[name] = 2 * k**3 / seconds[0]
    return rates


def memory_rate(args: argparse.Namespace, device: torch.device) -> float:
    """Bytes/s of a = b + 3 c, two reads and a write (STREAM's triad, and its way to count)."""
    count = args.memory_bytes // 4
    a, b, c = (torch.ones(count, device=device) for _ in range(3))
    seconds = fastest([lambda: torch.add(b, c, alpha=3, out=a)], args.rounds, "memory", device)
    return 3 * a.nbytes / seconds[0]


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


def communication(args: argparse.Namespace, device: torch.device) -> dict[str, Model]:
    """alpha, beta and held-out error of each collective: fitted to powers of 4, tried in between."""
    n = dist.get_world_size()
    top = 2**20 if args.quick else 2**22
    sizes = [4096 * 2**k for k in range(20) if 4096 * 2**k <= top]
    whole, other = (torch.zeros(top // 4, device=device) for _ in range(2))
    models = {}
    for op, (factor, call) in COLLECTIVES.items():
        counts = [size // 4 // n * n for size in sizes]  # n equal chunks
        calls = [lambda c=c, call=call: call(whole[:c], other[:c]) for c in counts]
        seconds = fastest(calls, args.rounds, op, device)
        points = [(factor(n) * 4 * c, t) for c, t in zip(counts, seconds, strict=True)]
        alpha, slope = fit(points[::2])
        errors = [abs((alpha + slope * x) / t - 1) for x, t in points[1::2]]
        top_bytes, top_seconds = points[-1]  # where noise hides the slope, the largest size's rate
        beta = 1 / slope if slope else top_bytes / top_seconds
        error = statistics.median(errors)
        models[op] = {"alpha_s": alpha, "beta_bytes_per_s": beta, "median_error": error}
    return models


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores"


def run(args: argparse.Namespace, device: torch.device) -> bool:
    torch.manual_seed(args.seed)
    n = dist.get_world_size() if dist.is_initialized() else 1
    launched = f"{n} rank{'s' * (n > 1)}" if dist.is_initialized() else "1 process"
    alone = "" if n > 1 else "; no other rank, so no communication is measured"
    say(f"{launched} on {device.type}: rates of one rank while all work{alone}")
    record = {
        "schema": 1,
        "machine": machine(device),
        "torch": torch.__version__,
        "device": device.type,
        "backend": dist.get_backend() if dist.is_initialized() else None,
        "world_size": n,
        "threads_per_rank": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
        "matmul_flops_per_s": matmul_rates(args, device),
        "memory_bytes_per_s": memory_rate(args, device),
    }
    models = communication(args, device) if n > 1 else {}
    record |= {"point_to_point": models.get("point_to_point")}
    record |= {"collectives": {op: m for op, m in models.items() if op != "point_to_point"}}

    for dtype, rate in record["matmul_flops_per_s"].items():
        say(f"matmul {dtype:<16}{rate / 1e9:>10,.1f} GFLOP/s")
    say(f"memory, triad          {record['memory_bytes_per_s'] / 1e9:>10,.1f} GB/s")
    if models:
        say(f"{'':<23}{'alpha (us)':>10} {'beta (GB/s)':>12} {'held-out error (%)':>19}")
    for op, model in models.items():
        alpha, beta, error = model.values()
        say(f"{op:<23}{alpha * 1e6:>10.0f} {beta / 1e9:>12.2f} {error * 100:>19.0f}")
    torn = is_first() and written(record, args.json) != record
    say(f"written to {args.json}")
    numbers = [*record["matmul_flops_per_s"].values(), record["memory_bytes_per_s"]]
    numbers += [x for m in models.values() for x in (m["alpha_s"], m["beta_bytes_per_s"])]
    bad = sum(not 0 < x < math.inf for x in numbers)
    held = check("numbers not finite and above 0", bad, 0)
    held = check("differs from the file when read back", float(torn), 0) and held
    if models:
        errors = [model["median_error"] for model in models.values()]
        claim = "median |error| at held-out sizes, median over the collectives"
        held = check(claim, statistics.median(errors), 0.3) and held
    return held


def written(record: dict, path: Path) -> dict:
    """Write the file in one piece and read it back."""
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(json.dumps(record, indent=1) + "\n")
    draft.replace(path)
    return json.loads(path.read_text())


def check(claim: str, value: float, bound: float) -> bool:
    """Print whether the worst rank keeps `value` within `bound`; all ranks get the same answer."""
    values = [value]
    if dist.is_initialized():
        values *= dist.get_world_size()
        dist.all_gather_object(values, value)
    held = all(v <= bound for v in values)  # false for NaN
    say(f"check: {claim} = {max(values):.3g} <= {bound:.3g}  {'ok' if held else 'FAILED'}")
    return held


def is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def say(line: str) -> None:
    if is_first():
        print(line, flush=True)


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def pick_device(wanted: str) -> torch.device:
    """The accelerator if there is one, unless told otherwise."""
    found = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if wanted not in ("auto", "cpu", found.type):
        stop(f"--device {wanted}: this machine has {found.type}; type --device {found.type}")
    return torch.device("cpu") if wanted == "cpu" else found


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


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: stop(f"{message}: --help lists the flags")
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer repeats, and messages up to 1 MiB, not 4")
    add("--repeats", type=positive, help="of each measurement; default: 8, or 4 with --quick")
    add("--matmul", type=positive, help="rows of the matrices; default: 1024, on a GPU 8192")
    add("--memory-mib", type=positive, default=128, help="MiB of each of the triad's 3 arrays")
    add("--seed", type=int, default=0, help="for the matrices")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--json", type=Path, default="calibration.json", help="the file to write")
    args = parser.parse_args()
    args.rounds = args.repeats or (4 if args.quick else 8)
    args.memory_bytes = args.memory_mib * 2**20
    try:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.open("ab").close()
    except OSError as error:
        stop(f"cannot write {args.json} ({error.strerror}): give another file with --json FILE")
    return args


def main() -> None:
    args = parse_args()
    if "RANK" not in os.environ:
        sys.exit(not run(args, pick_device(args.device)))
    device = join_group(args.device)
    try:
        held = run(args, device)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    sys.exit(not held)


if __name__ == "__main__":
    main()
