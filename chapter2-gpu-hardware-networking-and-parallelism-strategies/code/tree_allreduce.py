"""Tree all-reduce from send and receive: fewer steps than the ring, more bytes at the root, and where they cross.

    torchrun --nproc_per_node=4 chapter2-gpu-hardware-networking-and-parallelism-strategies/code/tree_allreduce.py --plot chapter2-gpu-hardware-networking-and-parallelism-strategies/figures/tree.svg
    torchrun --nproc_per_node=3 chapter2-gpu-hardware-networking-and-parallelism-strategies/code/tree_allreduce.py --dtype bfloat16 --max-bytes 8K

On GPUs:
    torchrun --nproc_per_node=8 chapter2-gpu-hardware-networking-and-parallelism-strategies/code/tree_allreduce.py --max-bytes 256M --repeats 100

Up to which size does the tree win? Compare the prediction, from levels and steps timed one by one,
with the measurement; then see how the crossing moves with the number of ranks. Section 2.4.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Works = dict[str, tuple[Callable[[], object], int]]  # what to time, and how many in a row


def partner(distance: int) -> tuple[int | None, bool]:
    """Whom this rank meets on the level of `distance`, and whether it is the one further up.

    In each group of 2 x distance ranks, the first meets the one in the middle; where the group is
    cut short by the world's end, it meets nobody.
    """
    rank = dist.get_rank()
    place = rank % (2 * distance)
    if place == distance:
        return rank - distance, False
    is_met = place == 0 and rank + distance < dist.get_world_size()
    return rank + distance if is_met else None, True


def reduce_level(tensor: torch.Tensor, buffer: torch.Tensor, distance: int) -> int:
    """Send the sum so far one level up, where it is added; return the bytes sent."""
    peer, upper = partner(distance)
    if peer is None:
        return 0
    if upper:
        dist.recv(buffer, peer)
        tensor += buffer
        return 0
    dist.send(tensor, peer)
    return tensor.nbytes


def broadcast_level(tensor: torch.Tensor, distance: int) -> int:
    """Send the finished sum one level down; return the bytes sent."""
    peer, upper = partner(distance)
    if peer is None:
        return 0
    if not upper:
        dist.recv(tensor, peer)
        return 0
    dist.send(tensor, peer)
    return tensor.nbytes


def levels(world_size: int) -> list[int]:
    """The distances between partners, bottom up: 1, 2, 4, ... as many as log2(n), rounded up."""
    return [2**k for k in range((world_size - 1).bit_length())]


def tree_all_reduce(tensor: torch.Tensor, buffer: torch.Tensor | None = None) -> int:
    """Sum a contiguous tensor over all ranks, in place; return the bytes that this rank sent.

    A binomial tree: up to rank 0, then down again (Thakur, Rabenseifner and Gropp, 2005). Sums are
    added in the tensor's own dtype. ValueError where it is not contiguous.
    """
    if not tensor.is_contiguous():
        raise ValueError("the tree needs a contiguous tensor: call .contiguous() first")
    buffer = torch.empty_like(tensor) if buffer is None else buffer
    up = levels(dist.get_world_size())
    sent = sum(reduce_level(tensor, buffer, distance) for distance in up)
    return sent + sum(broadcast_level(tensor, distance) for distance in reversed(up))


def there_and_back(tensor: torch.Tensor, buffer: torch.Tensor, distance: int) -> None:
    reduce_level(tensor, buffer, distance)
    broadcast_level(tensor, distance)


def plan(sizes: list[int], dtype: torch.dtype, device: torch.device) -> Works:
    """What to time on each size: both algorithms, and each of their steps by itself.

    Steps run as many in a row as in the algorithm, so that both pay only once for ranks that start
    unevenly. Zeros, which stay zeros however often they are summed.
    """
    n = dist.get_world_size()
    works: Works = {}
    for size in sizes:
        tensor, buffer = torch.zeros(2, size // dtype.itemsize, dtype=dtype, device=device)
        chunk, received = torch.zeros_like(tensor.tensor_split(n)[0]).repeat(2, 1)
        works[f"passes {size}"] = (partial(exchange, chunk, received), 2 * n - 2)
        works[f"adds {size}"] = (partial(exchange_and_add, chunk, received), 2 * n - 2)
        for distance in levels(n):
            level = partial(there_and_back, tensor, buffer, distance)
            works[f"level {distance} {size}"] = (level, len(levels(n)))
        works[f"ring {size}"] = (partial(ring_all_reduce, tensor, received), 1)
        works[f"tree {size}"] = (partial(tree_all_reduce, tensor, buffer), 1)
    return works


def faster_up_to(rows: list[dict], tree: str, ring: str) -> int:
    """The size up to which the tree's column is below the ring's; 0 if it never is."""
    size = 0
    for row in rows:
        if row[tree] >= row[ring]:
            break
        size = row["bytes"]
    return size


def predict_crossing(n: int, latency: float, slope: float) -> None:
    """Print where 2(n-1) steps of 1/n of the tensor cost as much as 2 log2(n) steps of all of it.

    A step costs `latency` seconds, and `slope` for each byte; additions are left out.
    """
    say("predicted, not measured: ranks that have a core and such a link each to itself")
    say(f"{'ranks':>12}{'ring steps':>12}{'tree steps':>12}{'they cross at':>15}")
    for ranks in sorted({n, 8, 64, 1024}):
        ring = 2 * (ranks - 1)
        tree = 2 * len(levels(ranks))
        crossing = (ring - tree) * latency / slope / (tree - ring / ranks)
        say(f"{ranks:>12,}{ring:>12,}{tree:>12}{crossing / 2**20:>11.2f} MiB")


def run(args: argparse.Namespace, device: torch.device) -> list[bool | None]:
    n = dist.get_world_size()
    dtype = DTYPES[args.dtype]
    if n == 1:
        stop(f"one rank has no tree: type  torchrun --nproc_per_node=2 {sys.argv[0]}")
    sizes = tensor_sizes(args, dtype)
    times = time_works(plan(sizes, dtype, device), args.repeats, device)
    steps = n - 1
    deep = len(levels(n))
    say(f"{n} ranks on {device.type}: the ring takes {2 * steps} steps, the tree {2 * deep}")
    say(f"{'':12}{'ring, ms':>27}{'tree, ms':>27}")
    say(f"{'bytes':>12}" + 2 * f"{'predicted':>12}{'fastest':>8}{'error':>7}")
    rows = []
    for size in sizes:
        ring = steps * sum(min(times[f"{kind} {size}"]) for kind in ("passes", "adds"))
        tree = sum(min(times[f"level {distance} {size}"]) for distance in levels(n))
        row = {"bytes": size}
        cells = ""
        for name, predicted in (("ring", ring), ("tree", tree)):
            fastest = min(times[f"{name} {size}"])
            row |= {name: fastest, f"{name} predicted": predicted}
            row[f"{name} median"] = statistics.median(times[f"{name} {size}"])
            error = predicted / fastest - 1
            cells += f"{predicted * 1e3:>12.2f}{fastest * 1e3:>8.2f}{error:>+7.0%}"
        rows.append(row)
        say(f"{size:>12,}{cells}")
    predicted = faster_up_to(rows, "tree predicted", "ring predicted")
    measured = faster_up_to(rows, "tree", "ring")
    say(f"the tree is faster up to {predicted:,} bytes as predicted, {measured:,} as measured")
    say(f"rank 0 of the tree sends and receives {deep} x the tensor, each way; "
        f"a rank of the ring {2 * steps / n:.3g} x")  # fmt: skip
    latency, slope = fit([(size / n, min(times[f"passes {size}"])) for size in sizes])
    if sizes[-1] >= 2**20 and slope:  # smaller ones show a latency, but no bandwidth
        predict_crossing(n, latency, slope)
    if dist.get_rank() == 0 and args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    if dist.get_rank() == 0 and args.plot:
        plot(rows, args.plot)

    torch.manual_seed(args.seed + dist.get_rank())
    counts = [1, 2 * n + 1] + [size // dtype.itemsize for size in sizes]
    claims, sent = check_sums("tree", tree_all_reduce, counts, dtype, device)
    sent_by_all = torch.tensor(sent, device=device)
    dist.all_reduce(sent_by_all)
    tensors = torch.tensor(counts, device=device) * dtype.itemsize
    missed = (sent_by_all - 2 * (n - 1) * tensors).abs().max().item()
    claims.append(check("max |bytes sent by all - 2(n-1) tensors|", missed, 0))
    large = [row for row in rows if row["bytes"] >= 2**16]
    if large:
        pairs = [(row[f"{k} predicted"], row[k]) for row in large for k in ("ring", "tree")]
        error = statistics.median(abs(predicted / fastest - 1) for predicted, fastest in pairs)
        claim = "median |error| of predictions from 64 KiB"
        claims.append(expect(claim, error, 0.2, args.strict))
    return claims


def plot(rows: list[dict], path: Path) -> None:
    """The fastest of both algorithms over the size, and what was predicted."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "tree_allreduce"
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6.4, 4))
    styles = {"ring predicted": "C0--", "ring": "C0o-", "tree predicted": "C1--", "tree": "C1s-"}
    for name, style in styles.items():
        milliseconds = [row[name] * 1e3 for row in rows]
        axis.loglog([row["bytes"] for row in rows], milliseconds, style, label=name, base=2)
    title = f"All-reduce by {dist.get_world_size()} ranks"
    axis.set(xlabel="bytes", ylabel="ms, fastest", title=title)
    axis.set_yscale("log")  # powers of 10, unlike the sizes
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None})


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--min-bytes", type=parse_size, default="8K", help="smallest tensor; K, M, G: 1024s")
    add("--max-bytes", type=parse_size, default="4M", help="largest tensor; K, M, G: 1024s")
    add("--factor", type=int, default=8, help="each size is so many times the one before")
    add("--repeats", type=int, default=15, help="timed batches of each size and step")
    add("--dtype", choices=DTYPES, default="float32", help="of the tensor, and of the additions")
    add("--seed", type=int, default=0, help="rank r draws its numbers with seed + r")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--json", type=Path, help="also write the table, times in seconds, to this file")
    add("--plot", type=Path, help="also draw the times, ms over bytes, to this SVG file")
    add("--strict", action="store_true", help="exit 1 if an `expect:` line does not hold")
    return parser.parse_args()


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


# Copied from ring_allreduce.exchange
def exchange(
    outgoing: torch.Tensor, incoming: torch.Tensor, ring: Sequence[int] | None = None
) -> int:
    """Send to the next rank of a ring, receive from the previous one; return the bytes sent.

    The ring is all ranks, or those given. Both at once: if every rank sent first and received
    later, a ring of them could wait for ever.
    """
    ring = ring or range(dist.get_world_size())
    place = ring.index(dist.get_rank())
    send = dist.P2POp(dist.isend, outgoing, ring[(place + 1) % len(ring)])
    receive = dist.P2POp(dist.irecv, incoming, ring[place - 1])
    pair = [op for op in (send, receive) if op.tensor.numel()]  # a chunk may be empty
    for work in dist.batch_isend_irecv(pair) if pair else ():
        work.wait()
    return outgoing.nbytes


# Copied from ring_allreduce.ring_all_reduce
def ring_all_reduce(tensor: torch.Tensor, buffer: torch.Tensor | None = None) -> int:
    """Sum a contiguous tensor over all ranks, in place; return the bytes that this rank sent.

    Two trips round the ring (Patarasuk and Yuan, 2009). On the first, each chunk collects
    its sum, added in the tensor's own dtype (reduce-scatter); on the second, the finished chunks are
    handed on (all-gather). ValueError where the tensor is not contiguous.
    """
    if not tensor.is_contiguous():
        raise ValueError("the ring needs a contiguous tensor: call .contiguous() first")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    chunks = tensor.view(-1).tensor_split(world_size)  # sizes may differ by one element
    buffer = torch.empty_like(chunks[0]) if buffer is None else buffer  # one serves all steps
    sent = 0
    for step in range(world_size - 1):
        incoming = chunks[(rank - step - 1) % world_size]
        received = buffer[: incoming.numel()]
        sent += exchange(chunks[(rank - step) % world_size], received)
        incoming += received
    for step in range(world_size - 1):
        incoming = chunks[(rank - step) % world_size]
        sent += exchange(chunks[(rank - step + 1) % world_size], incoming)
    return sent


# Copied from ring_allreduce.exchange_and_add
def exchange_and_add(
    outgoing: torch.Tensor, incoming: torch.Tensor, ring: Sequence[int] | None = None
) -> None:
    exchange(outgoing, incoming, ring)
    outgoing += incoming


# Copied from ring_allreduce.check_sums
def check_sums(
    name: str, all_reduce: Callable, counts: list[int], dtype: torch.dtype, device: torch.device
) -> tuple[list[bool | None], list]:
    """Check all-reduces of random numbers; return also what each call returned.

    A sum of n numbers in any order is within (n-1)u/(1-(n-1)u) of exact, relative to the sum of
    magnitudes, u being half of eps (Higham, Accuracy and Stability, section 4.2).
    """
    rounding = (dist.get_world_size() - 1) * torch.finfo(dtype).eps / 2
    rounding /= 1 - rounding
    distances, returned = [], []
    for count in counts:
        tensor = torch.randn(count, device=device).to(dtype)
        exact, magnitude = tensor.double(), tensor.double().abs()
        result, library = tensor.clone(), tensor.clone()
        returned.append(all_reduce(result))
        for reference in (library, exact, magnitude):
            dist.all_reduce(reference)
        first = result.clone()
        dist.broadcast(first, src=0)
        to_exact = (result - exact) / magnitude
        to_library = (result.double() - library) / magnitude
        distances.append([d.abs().max().item() for d in (to_exact, to_library, result - first)])
    worst = torch.tensor(distances, dtype=torch.float64).amax(0).tolist()  # amax keeps a NaN
    claims = [
        check(f"max |{name} - float64 sum| / sum of |x|", worst[0], rounding),
        check(f"max |{name} - all_reduce| / sum of |x|", worst[1], 2 * rounding),
        check("max difference between ranks", worst[2], 0),
    ]
    return claims, returned


# Copied from ring_allreduce.time_works
def time_works(works: Works, repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds per call of each work, until its slowest rank is done, `repeats` times.

    All in turn, so that a slow moment of the machine hits all.
    """
    seconds = []
    for _ in range(repeats):
        seconds.append([batch_seconds(work, calls, device) for work, calls in works.values()])
    return dict(zip(works, slowest_rank(seconds, device).T.tolist(), strict=True))


# Copied from ring_allreduce.tensor_sizes
def tensor_sizes(args: argparse.Namespace, dtype: torch.dtype) -> list[int]:
    """Bytes of whole elements: --min-bytes, then --factor times as many, up to --max-bytes."""
    if args.factor < 2:
        stop(f"--factor {args.factor} never gets to --max-bytes: type --factor 2 or more")
    sizes = [max(args.min_bytes // dtype.itemsize, 1) * dtype.itemsize]
    while sizes[-1] * args.factor <= args.max_bytes:
        sizes.append(sizes[-1] * args.factor)
    return sizes


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


# Copied from bandwidth_test.parse_size
def parse_size(text: str) -> int:
    """Bytes in '64', '16K', '1M' or '2G' (powers of 1024)."""
    power = "KMG".find(text[-1:].upper()) + 1
    return int(text[:-1] if power else text) * 1024**power


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


# Copied from ch01_multi_gpu_ddp.main
@record  # so that torchrun's summary names the error
def main() -> None:
    args = parse_args()
    device = join_group(args.device)
    claims_of = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(claims_of, run(args, device))  # nobody leaves while another is at work
    dist.destroy_process_group()  # not in a `finally`: section 3.1
    sys.exit(conclude(max(claims_of, key=lambda claims: claims.count(False))))  # the worst rank's


# Copied from ch01_single_gpu_baseline.synchronize
def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


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


# Copied from ch01_single_gpu_baseline.stop
def stop(message: str) -> NoReturn:
    """End with one line and exit code 2: the command was wrong, not the program."""
    sys.stderr.write(message + "\n")  # in one piece: other ranks write too
    sys.exit(2)


if __name__ == "__main__":
    main()
