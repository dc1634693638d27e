"""Ring all-reduce from send and receive: equal to dist.all_reduce, optimal in bytes, its time predicted.

    torchrun --nproc_per_node=2 chapter2-gpu-hardware-networking-and-parallelism-strategies/code/ring_allreduce.py
    torchrun --nproc_per_node=3 chapter2-gpu-hardware-networking-and-parallelism-strategies/code/ring_allreduce.py --dtype bfloat16 --max-bytes 16K

On GPUs:
    torchrun --nproc_per_node=8 chapter2-gpu-hardware-networking-and-parallelism-strategies/code/ring_allreduce.py --max-bytes 1G

Compare "predicted" with "fastest": the model has timed single steps, exchanges with and without an
addition, and has never seen the ring. "library" is dist.all_reduce. Section 2.4.
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


def bytes_to_send(tensor: torch.Tensor, place: int, ranks: int) -> int:
    """What a rank of a ring must send: on each trip all chunks but one, 2(n-1)/n if even."""
    sizes = [chunk.nbytes for chunk in tensor.tensor_split(ranks)]
    return 2 * sum(sizes) - sizes[(place + 1) % ranks] - sizes[(place + 2) % ranks]


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


def exchange_and_add(
    outgoing: torch.Tensor, incoming: torch.Tensor, ring: Sequence[int] | None = None
) -> None:
    exchange(outgoing, incoming, ring)
    outgoing += incoming


def plan(sizes: list[int], dtype: torch.dtype, device: torch.device) -> Works:
    """What to time on each size: the ring, dist.all_reduce, and the two kinds of step by themselves.

    Steps run as many in a row as in the ring, so that both pay only once for ranks that start
    unevenly. Zeros, which stay zeros however often they are summed.
    """
    n = dist.get_world_size()
    works: Works = {}
    for size in sizes:
        tensor = torch.zeros(size // dtype.itemsize, dtype=dtype, device=device)
        chunk, buffer = torch.zeros_like(tensor.tensor_split(n)[0]).repeat(2, 1)
        works[f"passes {size}"] = (partial(exchange, chunk, buffer), 2 * n - 2)
        works[f"adds {size}"] = (partial(exchange_and_add, chunk, buffer), 2 * n - 2)
        works[f"ring {size}"] = (partial(ring_all_reduce, tensor, buffer), 1)
        works[f"library {size}"] = (partial(dist.all_reduce, tensor), 1)
    return works


def time_works(works: Works, repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds per call of each work, until its slowest rank is done, `repeats` times.

    All in turn, so that a slow moment of the machine hits all.
    """
    seconds = []
    for _ in range(repeats):
        seconds.append([batch_seconds(work, calls, device) for work, calls in works.values()])
    return dict(zip(works, slowest_rank(seconds, device).T.tolist(), strict=True))


def tensor_sizes(args: argparse.Namespace, dtype: torch.dtype) -> list[int]:
    """Bytes of whole elements: --min-bytes, then --factor times as many, up to --max-bytes."""
    if args.factor < 2:
        stop(f"--factor {args.factor} never gets to --max-bytes: type --factor 2 or more")
    sizes = [max(args.min_bytes // dtype.itemsize, 1) * dtype.itemsize]
    while sizes[-1] * args.factor <= args.max_bytes:
        sizes.append(sizes[-1] * args.factor)
    return sizes


def run(args: argparse.Namespace, device: torch.device) -> list[bool | None]:
    n = dist.get_world_size()
    dtype = DTYPES[args.dtype]
    if n == 1:
        stop(f"one rank has no ring: type  torchrun --nproc_per_node=2 {sys.argv[0]}")
    sizes = tensor_sizes(args, dtype)
    times = time_works(plan(sizes, dtype, device), args.repeats, device)
    steps = n - 1
    say(f"{n} ranks on {device.type}: {steps} steps that add, {steps} that only pass on")
    say(f"{'':12}{'one step alone, us':>22}{'all-reduce, ms':>19}")
    say(f"{'bytes':>12}{'adds':>11}{'passes on':>11}{'predicted':>11}{'fastest':>8}{'error':>7}"
        f"{'median':>8}{'library':>8}{'busbw GB/s':>11}")  # fmt: skip
    rows = []
    for size in sizes:
        # In one step each rank moves one chunk: the ring is as many such steps as it has.
        adds, passes, fastest, library = (
            min(times[f"{name} {size}"]) for name in ("adds", "passes", "ring", "library")
        )
        predicted = steps * (adds + passes)
        median = statistics.median(times[f"ring {size}"])
        row = {"bytes": size, "predicted": predicted, "fastest": fastest, "median": median}
        rows.append(row | {"all_reduce": library})
        bandwidth = 2 * steps / n * size / fastest
        say(f"{size:>12,}{adds * 1e6:>11.0f}{passes * 1e6:>11.0f}{predicted * 1e3:>11.2f}"
            f"{fastest * 1e3:>8.2f}{predicted / fastest - 1:>+7.0%}{median * 1e3:>8.2f}"
            f"{library * 1e3:>8.2f}{bandwidth / 1e9:>11.2f}")  # fmt: skip
    if args.json and dist.get_rank() == 0:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")

    torch.manual_seed(args.seed + dist.get_rank())
    awkward = [1, n - 1, 2 * n + 1]  # chunks that are empty, or longer by one
    counts = awkward + [size // dtype.itemsize for size in sizes]
    claims, sent = check_sums("ring", ring_all_reduce, counts, dtype, device)
    tensors = [torch.empty(count, dtype=dtype) for count in counts]
    formula = [bytes_to_send(tensor, dist.get_rank(), n) for tensor in tensors]
    missed = max(abs(a - b) for a, b in zip(sent, formula, strict=True))
    claims.append(check("max |bytes sent - formula|", missed, 0))
    large = [row for row in rows if row["bytes"] >= 2**16]
    if large:
        error = statistics.median(abs(row["predicted"] / row["fastest"] - 1) for row in large)
        claim = "median |error| of predictions from 64 KiB"
        claims.append(expect(claim, error, 0.2, args.strict))
    if sizes[-1] >= 2**24:
        claim = f"ring's time over all_reduce's at {sizes[-1]:,} bytes"
        ratio = rows[-1]["fastest"] / rows[-1]["all_reduce"]
        claims.append(expect(claim, ratio, 1.5, args.strict))
    return claims


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--min-bytes", type=parse_size, default="4K", help="smallest tensor; K, M, G: 1024s")
    add("--max-bytes", type=parse_size, default="16M", help="largest tensor; K, M, G: 1024s")
    add("--factor", type=int, default=8, help="each size is so many times the one before")
    add("--repeats", type=int, default=20, help="timed batches of each size and step")
    add("--dtype", choices=DTYPES, default="float32", help="of the tensor, and of the additions")
    add("--seed", type=int, default=0, help="rank r draws its numbers with seed + r")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--json", type=Path, help="also write the table, times in seconds, to this file")
    add("--strict", action="store_true", help="exit 1 if an `expect:` line does not hold")
    return parser.parse_args()


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
