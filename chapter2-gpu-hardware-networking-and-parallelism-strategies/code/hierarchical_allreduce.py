"""Hierarchical all-reduce: a ring inside each node and one across, and what each sends over the slow links.

    torchrun --nproc_per_node=4 chapter2-gpu-hardware-networking-and-parallelism-strategies/code/hierarchical_allreduce.py
    torchrun --nproc_per_node=3 chapter2-gpu-hardware-networking-and-parallelism-strategies/code/hierarchical_allreduce.py --dtype bfloat16 --max-bytes 8K

On GPUs:
    torchrun --nproc_per_node=8 chapter2-gpu-hardware-networking-and-parallelism-strategies/code/hierarchical_allreduce.py --ranks-per-node 4 --max-bytes 1G

Here the nodes are groups of ranks on one machine: the bytes are real, and that the links are alike
says the time. The last table is for links that are not. Section 2.4.
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
LATENCY_INSIDE, LATENCY_ACROSS = 3.4e-6, 14e-6  # s a step; NCCL, src/graph/tuning.cc, hwLat, Simple


def reduce_scatter(chunks: list[torch.Tensor], ring: list[int], buffer: torch.Tensor) -> int:
    """One trip round the ring: the rank at `place` ends with the sum of chunk place + 1."""
    n = len(ring)
    place = ring.index(dist.get_rank())
    sent = 0
    for step in range(n - 1):
        incoming = chunks[(place - step - 1) % n]
        received = buffer[: incoming.numel()]
        sent += exchange(chunks[(place - step) % n], received, ring)
        incoming += received
    return sent


def all_gather(chunks: list[torch.Tensor], ring: list[int]) -> int:
    """Another trip: the finished chunks, place + 1 at first, are handed on to all."""
    n = len(ring)
    place = ring.index(dist.get_rank())
    sent = 0
    for step in range(n - 1):
        sent += exchange(chunks[(place - step + 1) % n], chunks[(place - step) % n], ring)
    return sent


def rings(ranks_per_node: int) -> tuple[list[int], list[int]]:
    """The ranks of this rank's node, and the ranks at its own place in every node."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    first = rank - rank % ranks_per_node
    inside = list(range(first, first + ranks_per_node))
    return inside, list(range(rank % ranks_per_node, world_size, ranks_per_node))


def hierarchical_all_reduce(
    tensor: torch.Tensor, ranks_per_node: int, buffer: torch.Tensor | None = None
) -> tuple[int, int]:
    """Sum a contiguous tensor over all ranks, in place; return this rank's bytes (inside, across).

    Reduce-scatter inside the node, all-reduce of the own chunk across nodes, all-gather inside
    (Cho et al., BlueConnect, 2019). Sums are added in the tensor's own dtype. With one
    node it is the flat ring. ValueError where the tensor is not contiguous.
    """
    if not tensor.is_contiguous():
        raise ValueError("the rings need a contiguous tensor: call .contiguous() first")
    inside, across = rings(ranks_per_node)
    chunks = tensor.view(-1).tensor_split(ranks_per_node)  # sizes may differ by one element
    buffer = torch.empty_like(chunks[0]) if buffer is None else buffer  # the largest that arrives
    own = chunks[(dist.get_rank() + 1) % ranks_per_node]
    pieces = own.tensor_split(len(across))
    sent_inside = reduce_scatter(chunks, inside, buffer)
    sent_across = reduce_scatter(pieces, across, buffer)
    sent_across += all_gather(pieces, across)
    sent_inside += all_gather(chunks, inside)
    return sent_inside, sent_across


def bytes_by_formula(tensor: torch.Tensor, ranks_per_node: int) -> tuple[int, int]:
    """Bytes to send (inside, across): a ring with the tensor, and a ring with the own chunk."""
    node, place = divmod(dist.get_rank(), ranks_per_node)
    own = tensor.tensor_split(ranks_per_node)[(place + 1) % ranks_per_node]
    nodes = dist.get_world_size() // ranks_per_node
    return bytes_to_send(tensor, place, ranks_per_node), bytes_to_send(own, node, nodes)


def plan(sizes: list[int], ranks_per_node: int, dtype: torch.dtype, device: torch.device) -> Works:
    """What to time on each size: the whole, the flat ring, and the steps by themselves.

    Steps run as many in a row as in the whole, so that both pay only once for ranks that start
    unevenly. Zeros, which stay zeros however often they are summed.
    """
    works: Works = {}
    for size in sizes:
        tensor, buffer = torch.zeros(2, size // dtype.itemsize, dtype=dtype, device=device)
        parts = 1
        for name, ring in zip(("inside", "across"), rings(ranks_per_node), strict=True):
            parts *= len(ring)
            pair = [tensor.tensor_split(parts)[0], buffer.tensor_split(parts)[0], ring]
            if len(ring) > 1:
                works[f"{name} passes {size}"] = (partial(exchange, *pair), 2 * len(ring) - 2)
                works[f"{name} adds {size}"] = (partial(exchange_and_add, *pair), 2 * len(ring) - 2)
        hierarchical = partial(hierarchical_all_reduce, tensor, ranks_per_node, buffer)
        flat = partial(hierarchical_all_reduce, tensor, dist.get_world_size(), buffer)
        works[f"hierarchical {size}"] = (hierarchical, 1)
        works[f"flat {size}"] = (flat, 1)
        works[f"library {size}"] = (partial(dist.all_reduce, tensor), 1)
    return works


def count_bytes(size: int, per_node: int, dtype: torch.dtype, device: torch.device) -> float:
    """Print what ranks send inside and across; return the busiest across, relative to the flat ring.

    In the flat ring, the last rank of each node sends all that it sends to the next node.
    """
    n = dist.get_world_size()
    tensor = torch.zeros(max(size // dtype.itemsize, n), dtype=dtype, device=device)
    sent_flat, _ = hierarchical_all_reduce(tensor, n)
    crosses = per_node < n and (dist.get_rank() + 1) % per_node == 0
    flat = (sent_flat * (not crosses), sent_flat * crosses)
    total = torch.tensor([flat, hierarchical_all_reduce(tensor, per_node)], device=device)
    most = total.clone()  # [flat or not, inside or across]
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    dist.all_reduce(total)
    nodes = n // per_node
    say(f"sent for {size:,} bytes {'busiest rank inside':>23}{'across':>12}{'a node across':>16}")
    for i, name in enumerate(("flat ring", "hierarchical")):
        say(f"  {name:<20}{most[i, 0]:>23,}{most[i, 1]:>12,}{total[i, 1] // nodes:>16,}")
    return (most[1, 1] / max(most[0, 1], 1)).item()


def cluster(args: argparse.Namespace) -> None:
    """Print the alpha-beta model's times for 1 GB on nodes of 8 GPUs, each with a card of its own.

    The flat ring moves at the rate of its slowest link; of its steps, 2(nodes-1) have the latency
    of the network (NCCL, src/graph/tuning.cc, nInterSteps).
    """
    inside, across = args.inside_gbps * 1e9, args.across_gbps * 1e9  # bytes/s per GPU and direction
    say(f"predicted, not measured: 1 GB, 8 GPUs a node, {args.inside_gbps:g} GB/s inside, "
        f"{args.across_gbps:g} across")  # fmt: skip
    say(f"{'GPUs':>12}{'one flat ring, ms':>20}{'hierarchical, ms':>19}")
    for gpus in (8, 64, 512):
        nodes = gpus // 8
        rate = inside if nodes == 1 else across
        latencies = 2 * (nodes - 1) * LATENCY_ACROSS + 2 * (gpus - nodes) * LATENCY_INSIDE
        flat = 2 * (gpus - 1) * 1e9 / gpus / rate + latencies
        node = 2 * 7 * (LATENCY_INSIDE + 1e9 / 8 / inside)
        between = 2 * (nodes - 1) * (LATENCY_ACROSS + 1e9 / gpus / across)
        say(f"{gpus:>12}{flat * 1e3:>20.1f}{(node + between) * 1e3:>19.1f}")


def run(args: argparse.Namespace, device: torch.device) -> list[bool | None]:
    n = dist.get_world_size()
    dtype = DTYPES[args.dtype]
    if n == 1:
        stop(f"one rank has nobody to send to: type  torchrun --nproc_per_node=2 {sys.argv[0]}")
    divisors = [r for r in range(1, n + 1) if n % r == 0]
    per_node = args.ranks_per_node or max(r for r in divisors if r * r <= n)
    if per_node not in divisors:
        stop(f"--ranks-per-node {per_node} does not divide {n} ranks: type one of {divisors}")
    sizes = tensor_sizes(args, dtype)
    times = time_works(plan(sizes, per_node, dtype, device), args.repeats, device)
    nodes = n // per_node
    say(f"{n} ranks on {device.type}: {nodes} x {per_node} (nodes x ranks in each)")
    say(f"{'bytes':>12}{'predicted ms':>14}{'fastest':>9}{'error':>7}{'median':>9}{'flat ring':>11}"
        f"{'library':>9}")  # fmt: skip
    rows = []
    for size in sizes:
        predicted = 0.0
        # There and back, each ring takes as many steps that add as steps that only pass on.
        for name, steps in (("inside", per_node - 1), ("across", nodes - 1)):
            for kind in ("passes", "adds") if steps else ():
                predicted += steps * min(times[f"{name} {kind} {size}"])
        fastest, flat, library = (
            min(times[f"{name} {size}"]) for name in ("hierarchical", "flat", "library")
        )
        median = statistics.median(times[f"hierarchical {size}"])
        row = {"bytes": size, "predicted": predicted, "fastest": fastest, "median": median}
        rows.append(row | {"flat": flat, "library": library})
        say(f"{size:>12,}{predicted * 1e3:>14.2f}{fastest * 1e3:>9.2f}{predicted / fastest - 1:>+7.0%}"
            f"{median * 1e3:>9.2f}{flat * 1e3:>11.2f}{library * 1e3:>9.2f}")  # fmt: skip
    if args.json and dist.get_rank() == 0:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    share = count_bytes(sizes[-1], per_node, dtype, device)
    cluster(args)

    torch.manual_seed(args.seed + dist.get_rank())
    awkward = [1, n - 1, 2 * n + 1]  # chunks that are empty, or longer by one
    counts = awkward + [size // dtype.itemsize for size in sizes]
    all_reduce = partial(hierarchical_all_reduce, ranks_per_node=per_node)
    claims, sent = check_sums("hierarchy", all_reduce, counts, dtype, device)
    expected = [bytes_by_formula(torch.empty(count, dtype=dtype), per_node) for count in counts]
    missed = (torch.tensor(sent) - torch.tensor(expected)).abs().max().item()
    claims.append(check("max |bytes sent inside or across - formula|", missed, 0))
    claims.append(check("busiest rank across nodes, share of the flat ring's bytes", share, 1))
    large = [row for row in rows if row["bytes"] >= 2**16]
    if large:
        error = statistics.median(abs(row["predicted"] / row["fastest"] - 1) for row in large)
        claim = "median |error| of predictions from 64 KiB"
        claims.append(expect(claim, error, 0.2, args.strict))
    return claims


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--min-bytes", type=parse_size, default="8K", help="smallest tensor; K, M, G: 1024s")
    add("--max-bytes", type=parse_size, default="4M", help="largest tensor; K, M, G: 1024s")
    add("--factor", type=int, default=8, help="each size is so many times the one before")
    add("--repeats", type=int, default=15, help="timed batches of each size and step")
    add("--ranks-per-node", type=int, help="divides the ranks; default: near their root")
    add("--inside-gbps", type=float, default=450, help="GB/s per GPU; NVLink 4")
    add("--across-gbps", type=float, default=50, help="GB/s per GPU; NDR InfiniBand")
    add("--dtype", choices=DTYPES, default="float32", help="of the tensor, and of the additions")
    add("--seed", type=int, default=0, help="rank r draws its numbers with seed + r")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--json", type=Path, help="also write the table, times in seconds, to this file")
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


# Copied from ring_allreduce.exchange_and_add
def exchange_and_add(
    outgoing: torch.Tensor, incoming: torch.Tensor, ring: Sequence[int] | None = None
) -> None:
    exchange(outgoing, incoming, ring)
    outgoing += incoming


# Copied from ring_allreduce.bytes_to_send
def bytes_to_send(tensor: torch.Tensor, place: int, ranks: int) -> int:
    """What a rank of a ring must send: on each trip all chunks but one, 2(n-1)/n if even."""
    sizes = [chunk.nbytes for chunk in tensor.tensor_split(ranks)]
    return 2 * sum(sizes) - sizes[(place + 1) % ranks] - sizes[(place + 2) % ranks]


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
