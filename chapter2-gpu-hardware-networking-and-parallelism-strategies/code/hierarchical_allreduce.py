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
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LIMIT_S = 5  # on top of the first --repeats, while the fastest times have not settled
Action = tuple[Callable[..., object], tuple, int]  # what, with what, how many in a row
RING_LATENCY = {"inside": 3.4e-6, "across": 14e-6}  # s; NCCL, src/graph/tuning.cc, hwLat, Simple


def exchange(outgoing: torch.Tensor, incoming: torch.Tensor, ring: list[int]) -> int:
    """Send to the next rank of `ring`, receive from the previous one; return the bytes sent."""
    place = ring.index(dist.get_rank())
    send = dist.P2POp(dist.isend, outgoing, ring[(place + 1) % len(ring)])
    receive = dist.P2POp(dist.irecv, incoming, ring[place - 1])
    pair = [op for op in (send, receive) if op.tensor.numel()]  # a chunk may be empty
    for work in dist.batch_isend_irecv(pair) if pair else ():
        work.wait()
    return outgoing.nbytes


def reduce_scatter(chunks: list[torch.Tensor], ring: list[int], buffer: torch.Tensor) -> int:
    """One trip round the ring: the rank at `place` ends with the sum of chunk place + 1."""
    n, place, sent = len(ring), ring.index(dist.get_rank()), 0
    for step in range(n - 1):
        incoming = chunks[(place - step - 1) % n]
        received = buffer[: incoming.numel()]
        sent += exchange(chunks[(place - step) % n], received, ring)
        incoming += received
    return sent


def all_gather(chunks: list[torch.Tensor], ring: list[int]) -> int:
    """Another trip: the finished chunks, place + 1 at first, are handed on to all."""
    n, place, sent = len(ring), ring.index(dist.get_rank()), 0
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


def bytes_of_ring(tensor: torch.Tensor, place: int, ranks: int) -> int:
    """What a rank of a ring must send: on each trip all chunks but one, 2(n-1)/n if even."""
    sizes = [chunk.nbytes for chunk in tensor.tensor_split(ranks)]
    return 2 * sum(sizes) - sizes[(place + 1) % ranks] - sizes[(place + 2) % ranks]


def bytes_to_send(tensor: torch.Tensor, ranks_per_node: int) -> tuple[int, int]:
    """The formula for (inside, across): a ring with the tensor, and a ring with the own chunk."""
    node, place = divmod(dist.get_rank(), ranks_per_node)
    own = tensor.tensor_split(ranks_per_node)[(place + 1) % ranks_per_node]
    nodes = dist.get_world_size() // ranks_per_node
    return bytes_of_ring(tensor, place, ranks_per_node), bytes_of_ring(own, node, nodes)


def errors(
    ranks_per_node: int, count: int, dtype: torch.dtype, device: torch.device
) -> list[float]:
    """All-reduce `count` random numbers; what is wrong with the sum and with the bytes sent.

    Returns the largest distance from the sum in float64 and from dist.all_reduce, both relative to
    the sum of magnitudes, the largest difference between ranks, and the bytes off the formula.
    """
    tensor = torch.randn(count, device=device).to(dtype)
    exact, magnitude = tensor.double(), tensor.double().abs()
    mine, library = tensor.clone(), tensor.clone()
    sent = hierarchical_all_reduce(mine, ranks_per_node)
    for reference in (library, exact, magnitude):
        dist.all_reduce(reference)
    first = mine.clone()
    dist.broadcast(first, src=0)
    pairs = [(mine - exact) / magnitude, (mine.double() - library) / magnitude, mine - first]
    formula = bytes_to_send(tensor, ranks_per_node)
    off = sum(abs(a - b) for a, b in zip(sent, formula, strict=True))
    return [pair.abs().max().item() for pair in pairs] + [off]


def exchange_and_add(outgoing: torch.Tensor, incoming: torch.Tensor, ring: list[int]) -> None:
    exchange(outgoing, incoming, ring)
    outgoing += incoming


def measure(actions: dict[str, Action], repeats: int, device: torch.device) -> dict[str, list]:
    """Seconds per call of each action, until its slowest rank is done, `repeats` times or more.

    All in turn, so that a slow moment of the machine hits all; and on, up to LIMIT_S, while the
    fastest times still fall by 2 % from one block to the next.
    """
    counts = torch.tensor([[in_a_row] for _, _, in_a_row in actions.values()])
    fastest, blocks, spent, settled = torch.full((len(actions),), torch.inf), [], 0.0, False
    while len(blocks) < 2 or not (settled or spent > LIMIT_S):
        block = torch.zeros(len(actions), -(-repeats // 2), dtype=torch.float64)
        for turn in range(block.shape[1]):
            for row, (action, arguments, in_a_row) in zip(block, actions.values(), strict=True):
                dist.barrier()
                start = time.perf_counter()
                for _ in range(in_a_row):
                    action(*arguments)
                synchronize(device)
                row[turn] = time.perf_counter() - start
        block = block.to(device)
        dist.all_reduce(block, op=dist.ReduceOp.MAX)  # so all ranks stop after the same block
        blocks.append(block.cpu())
        spent += blocks[-1].sum().item()
        before, fastest = fastest, torch.minimum(fastest, blocks[-1].amin(1))
        settled = (fastest / before).mean().item() > 0.98
    seconds = torch.cat(blocks, 1) / counts
    return dict(zip(actions, seconds.tolist(), strict=True))


def plan(
    sizes: list[int], ranks_per_node: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Action]:
    """What to time on each size: the whole, the flat ring, and the steps by themselves.

    Steps run as many in a row as in the whole, so that both pay only once for ranks that start
    unevenly. Zeros, which stay zeros however often they are summed.
    """
    actions: dict[str, Action] = {}
    for size in sizes:
        tensor, buffer = torch.zeros(2, size // dtype.itemsize, dtype=dtype, device=device)
        parts = 1
        for name, ring in zip(("inside", "across"), rings(ranks_per_node), strict=True):
            parts *= len(ring)
            pair = [tensor.tensor_split(parts)[0], buffer.tensor_split(parts)[0], ring]
            for step in (exchange, exchange_and_add) if len(ring) > 1 else ():
                actions[f"{name} {step.__name__} {size}"] = (step, pair, 2 * len(ring) - 2)
        actions[f"whole {size}"] = (hierarchical_all_reduce, (tensor, ranks_per_node, buffer), 1)
        flat = (tensor, dist.get_world_size(), buffer)
        actions[f"flat {size}"] = (hierarchical_all_reduce, flat, 1)
        actions[f"library {size}"] = (dist.all_reduce, (tensor,), 1)
    return actions


def tolerance(samples: list[list[float]]) -> float:
    """20 %, or more where the machine is too noisy to tell: twice the median disagreement between
    the fastest of the odd and of the even repeats of one and the same thing.
    """
    pairs = [(min(times[::2]), min(times[1::2])) for times in samples if len(times) > 1]
    scatter = [abs(odd / even - 1) for odd, even in pairs]
    return max(0.2, 2 * statistics.median(scatter or [0.0]))


def run(args: argparse.Namespace, device: torch.device) -> bool:
    world_size, dtype, per_node = dist.get_world_size(), DTYPES[args.dtype], args.ranks_per_node
    nodes = world_size // per_node
    torch.manual_seed(args.seed + dist.get_rank())
    sizes = [max(args.min_bytes // dtype.itemsize, 1) * dtype.itemsize]
    while sizes[-1] * args.factor <= args.max_bytes:
        sizes.append(sizes[-1] * args.factor)
    awkward = [1, world_size - 1, 2 * world_size + 1]  # chunks that are empty, or longer by one
    counts = awkward + [size // dtype.itemsize for size in sizes]
    wrong = [errors(per_node, count, dtype, device) for count in counts]
    worst = torch.tensor(wrong, dtype=torch.float64).amax(0).tolist()  # amax keeps a NaN

    times = measure(plan(sizes, per_node, dtype, device), args.repeats, device)
    say(f"{world_size} ranks on {device.type}: {nodes} x {per_node} (nodes x ranks in each)")
    say(
        f"{'bytes':>12}{'predicted ms':>14}{'fastest':>9}{'error':>7}{'median':>9}{'flat ring':>11}{'library':>9}"
    )
    rows = []
    for size in sizes:
        # There and back, each ring takes as many steps that add as steps that only pass on.
        rounds = {"inside": per_node - 1, "across": nodes - 1}
        kinds = ("exchange", "exchange_and_add")
        predicted = sum(
            count * min(times[f"{name} {kind} {size}"])
            for name, count in rounds.items() if count for kind in kinds
        )  # fmt: skip
        fastest, flat, library = (
            min(times[f"{name} {size}"]) for name in ("whole", "flat", "library")
        )
        median = statistics.median(times[f"whole {size}"])
        rows.append((size, predicted, fastest, median, flat, library))
        say(f"{size:>12,}{predicted * 1e3:>14.2f}{fastest * 1e3:>9.2f}{predicted / fastest - 1:>+7.0%}"
            f"{median * 1e3:>9.2f}{flat * 1e3:>11.2f}{library * 1e3:>9.2f}")  # fmt: skip
    if dist.get_rank() == 0 and args.json:
        names = ("bytes", "predicted", "fastest", "median", "flat", "library")
        record = [dict(zip(names, row, strict=True)) for row in rows]
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    less = count_bytes(sizes[-1], per_node, dtype, device)
    cluster(args)

    # A sum of n numbers in any order is within (n-1)u/(1-(n-1)u) of exact, relative to the sum of
    # magnitudes, u being half of eps (Higham, Accuracy and Stability, section 4.2).
    rounding = (world_size - 1) * torch.finfo(dtype).eps / 2
    rounding /= 1 - rounding
    held = [
        check("max |sum - float64 sum| / sum of |x|", worst[0], rounding),
        check("max |sum - all_reduce| / sum of |x|", worst[1], 2 * rounding),
        check("max difference between ranks", worst[2], 0),
        check("bytes sent inside and across, off the formula", worst[3], 0),
        check("busiest link across nodes, against the flat ring's", less, 1),
    ]
    misses = [abs(row[1] / row[2] - 1) for row in rows if row[0] >= 2**16]
    if misses:
        bound = tolerance([times[f"whole {row[0]}"] for row in rows if row[0] >= 2**16])
        held.append(
            check("median error of predictions from 64 KiB", statistics.median(misses), bound)
        )
    return all(held)


def count_bytes(size: int, per_node: int, dtype: torch.dtype, device: torch.device) -> float:
    """Print what ranks send inside and across; return the busiest across, relative to the flat ring.

    In the flat ring, the last rank of each node sends all that it sends to the next node.
    """
    world_size = dist.get_world_size()
    tensor = torch.zeros(max(size // dtype.itemsize, world_size), dtype=dtype, device=device)
    sent_flat, _ = hierarchical_all_reduce(tensor, world_size)
    crosses = per_node < world_size and (dist.get_rank() + 1) % per_node == 0
    flat = (sent_flat * (not crosses), sent_flat * crosses)
    counts = torch.tensor([flat, hierarchical_all_reduce(tensor, per_node)], device=device)
    most = counts.clone()  # [flat or not, inside or across]
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    dist.all_reduce(counts)
    nodes = world_size // per_node
    say(f"sent for {size:,} bytes {'busiest rank inside':>23}{'across':>12}{'a node across':>16}")
    for name, busiest, total in zip(("flat ring", "hierarchical"), most, counts, strict=True):
        say(f"  {name:<20}{busiest[0]:>23,}{busiest[1]:>12,}{total[1] // nodes:>16,}")
    return (most[1, 1] / max(most[0, 1], 1)).item()


def cluster(args: argparse.Namespace) -> None:
    """Print the alpha-beta model's times for 1 GB on nodes of 8 GPUs, each with a card of its own."""
    inside, across = args.inside_gbps * 1e9, args.across_gbps * 1e9  # bytes/s per GPU and direction
    say(
        f"predicted, not measured: 1 GB, 8 GPUs a node, {args.inside_gbps:g} GB/s inside, {args.across_gbps:g} across"
    )
    say(f"{'GPUs':>12}{'one flat ring, ms':>20}{'hierarchical, ms':>19}")
    for gpus in (8, 64, 512):
        link, kind = (inside, "inside") if gpus == 8 else (across, "across")
        flat = (
            2 * (gpus - 1) * (RING_LATENCY[kind] + 1e9 / gpus / link)
        )  # as slow as its slowest link
        node = 2 * 7 * (RING_LATENCY["inside"] + 1e9 / 8 / inside)
        between = 2 * (gpus // 8 - 1) * (RING_LATENCY["across"] + 1e9 / gpus / across)
        say(f"{gpus:>12}{flat * 1e3:>20.1f}{(node + between) * 1e3:>19.1f}")


def check(claim: str, value: float, bound: float) -> bool:
    """Print whether the worst rank keeps `value` within `bound`; all ranks get the same answer."""
    values = [0.0] * dist.get_world_size()
    dist.all_gather_object(values, value)
    held = all(v <= bound for v in values)  # a NaN is not
    worst = max(values, key=lambda v: (v != v, v))  # a NaN, which differs from itself, is worst
    say(f"check: {claim} = {worst:.3g} <= {bound:.3g}  {'ok' if held else 'FAILED'}")
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
    if os.environ["WORLD_SIZE"] == "1":
        stop(f"one rank has nobody to send to: type  torchrun --nproc_per_node=2 {sys.argv[0]}")
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


def size_in_bytes(text: str) -> int:
    """'64', '16K', '1M' or '2G': powers of 1024."""
    unit = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:].upper(), 1)
    return positive(text if unit == 1 else text[:-1]) * unit


def positive_number(text: str) -> float:
    """A finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: stop(f"{message}: --help lists the flags")
    add = parser.add_argument
    add("--min-bytes", type=size_in_bytes, default="8K", help="smallest tensor; K, M, G: 1024s")
    add("--max-bytes", type=size_in_bytes, default="4M", help="largest tensor; K, M, G: 1024s")
    add("--factor", type=positive, default=8, help="each size is so many times the one before")
    add("--repeats", type=positive, default=30, help="timed calls for each size, at least")
    add("--ranks-per-node", type=positive, help="divides the ranks; default: near their root")
    add("--inside-gbps", type=positive_number, default=450, help="GB/s per GPU; NVLink 4")
    add("--across-gbps", type=positive_number, default=50, help="GB/s per GPU; NDR InfiniBand")
    add("--dtype", choices=DTYPES, default="float32", help="of the tensor, and of the additions")
    add("--seed", type=int, default=0, help="rank r draws its numbers with seed + r")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--json", type=Path, help="also write the table, times in seconds, to this file")
    args = parser.parse_args()
    if args.factor < 2 or args.max_bytes < args.min_bytes:
        stop("no sizes to try: type --factor 2 or more, and --max-bytes not below --min-bytes")
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if args.ranks_per_node is None:
        args.ranks_per_node = max(
            r for r in range(1, ranks + 1) if ranks % r == 0 and r * r <= ranks
        )
    if ranks % args.ranks_per_node:
        stop(
            f"--ranks-per-node {args.ranks_per_node} does not divide {ranks} ranks: give a divisor"
        )
    try:
        if args.json:
            args.json.open("ab").close()
    except OSError as error:
        stop(f"cannot write {args.json} ({error.strerror}): give another file")
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
