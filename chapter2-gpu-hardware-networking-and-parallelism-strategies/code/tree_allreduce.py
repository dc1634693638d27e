"""Tree all-reduce from send and receive: fewer steps than the ring, more bytes at the root, and where they cross.

    torchrun --nproc_per_node=4 chapter2-gpu-hardware-networking-and-parallelism-strategies/code/tree_allreduce.py
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
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LIMIT_S = 5  # on top of the first --repeats, while the fastest times have not settled
Action = tuple[Callable[..., object], tuple, int]  # what, with what, how many in a row


def partner(distance: int) -> tuple[int | None, bool]:
    """Whom this rank meets on the level of `distance`, and whether it is the one further up.

    In each group of 2 x distance ranks, the first meets the one in the middle; where the group is
    cut short by the world's end, it meets nobody.
    """
    rank, place = dist.get_rank(), dist.get_rank() % (2 * distance)
    if place == distance:
        return rank - distance, False
    return (
        rank + distance if place == 0 and rank + distance < dist.get_world_size() else None
    ), True


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

    A binomial tree: up to rank 0, then down again (Thakur, Rabenseifner and Gropp, 2005). Sums are added in the tensor's own dtype. ValueError where it is not contiguous.
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


def messages(rank: int, world_size: int) -> int:
    """How often a rank of the tree sends: once up, unless it is the root, and once to each child."""
    above = [d for d in levels(world_size) if rank % (2 * d) == 0]
    return (rank > 0) + sum(rank + d < world_size for d in above)


def exchange(outgoing: torch.Tensor, incoming: torch.Tensor) -> int:
    """Send to the right-hand neighbour, receive from the left-hand one; return the bytes sent.

    Both at once: if every rank sent first and received later, a ring of them could wait for ever.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    send = dist.P2POp(dist.isend, outgoing, (rank + 1) % world_size)
    receive = dist.P2POp(dist.irecv, incoming, (rank - 1) % world_size)
    pair = [op for op in (send, receive) if op.tensor.numel()]  # a chunk may be empty
    for work in dist.batch_isend_irecv(pair) if pair else ():
        work.wait()
    return outgoing.nbytes


def ring_all_reduce(tensor: torch.Tensor, buffer: torch.Tensor | None = None) -> int:
    """The ring of ring_allreduce.py, to compare with."""
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


def exchange_and_add(outgoing: torch.Tensor, incoming: torch.Tensor) -> None:
    exchange(outgoing, incoming)
    outgoing += incoming


def errors(count: int, dtype: torch.dtype, device: torch.device) -> list[float]:
    """All-reduce `count` random numbers; what is wrong with the sum and with the bytes sent.

    Returns the largest distance from the sum in float64 and from dist.all_reduce, both relative to
    the sum of magnitudes, the largest difference between ranks, the bytes off the formula, sent, and of the tensor.
    """
    tensor = torch.randn(count, device=device).to(dtype)
    exact, magnitude = tensor.double(), tensor.double().abs()
    mine, library = tensor.clone(), tensor.clone()
    sent = tree_all_reduce(mine)
    for reference in (library, exact, magnitude):
        dist.all_reduce(reference)
    first = mine.clone()
    dist.broadcast(first, src=0)
    pairs = [(mine - exact) / magnitude, (mine.double() - library) / magnitude, mine - first]
    off = sent - messages(dist.get_rank(), dist.get_world_size()) * tensor.nbytes
    return [pair.abs().max().item() for pair in pairs] + [abs(off), sent, tensor.nbytes]


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


def plan(sizes: list[int], dtype: torch.dtype, device: torch.device) -> dict[str, Action]:
    """What to time on each size: both algorithms, and each of their steps by itself.

    Steps run as many in a row as in the algorithm, so that both pay only once for ranks that start
    unevenly. Zeros, which stay zeros however often they are summed.
    """
    world_size, actions = dist.get_world_size(), {}
    for size in sizes:
        tensor, buffer = torch.zeros(2, size // dtype.itemsize, dtype=dtype, device=device)
        mine, theirs = torch.zeros_like(tensor.tensor_split(world_size)[0]).repeat(2, 1)
        for step in (exchange, exchange_and_add):
            actions[f"{step.__name__} {size}"] = (step, (mine, theirs), 2 * world_size - 2)
        for distance in levels(world_size):
            arguments = (tensor, buffer, distance)
            actions[f"level {distance} {size}"] = (
                there_and_back,
                arguments,
                len(levels(world_size)),
            )
        actions[f"ring {size}"] = (ring_all_reduce, (tensor, theirs), 1)
        actions[f"tree {size}"] = (tree_all_reduce, (tensor, buffer), 1)
    return actions


def faster_up_to(rows: list[tuple], tree: int, ring: int) -> int:
    """The size up to which the tree's column is below the ring's; 0 if it never is."""
    size = 0
    for row in rows:
        if row[tree] >= row[ring]:
            break
        size = row[0]
    return size


def predict_crossing(world_size: int, latency: float, bandwidth: float) -> None:
    """Print where 2(n-1) steps of 1/n of the tensor cost as much as 2 log2(n) steps of all of it.

    A step costs `latency` seconds and its bytes over `bandwidth`, in bytes/s; additions are left out.
    """
    say("predicted, not measured: ranks that have a core and such a link each to itself")
    say(f"{'ranks':>12}{'ring steps':>12}{'tree steps':>12}{'they cross at':>15}")
    for ranks in sorted({world_size, 8, 64, 1024}):
        ring, tree = 2 * (ranks - 1), 2 * len(levels(ranks))
        crossing = (ring - tree) * latency * bandwidth / (tree - ring / ranks)
        say(f"{ranks:>12,}{ring:>12,}{tree:>12}{crossing / 2**20:>11.2f} MiB")


def tolerance(samples: list[list[float]]) -> float:
    """20 %, or more where the machine is too noisy to tell: twice the median disagreement between
    the fastest of the odd and of the even repeats of one and the same thing.
    """
    pairs = [(min(times[::2]), min(times[1::2])) for times in samples if len(times) > 1]
    scatter = [abs(odd / even - 1) for odd, even in pairs]
    return max(0.2, 2 * statistics.median(scatter or [0.0]))


def run(args: argparse.Namespace, device: torch.device) -> bool:
    world_size, dtype = dist.get_world_size(), DTYPES[args.dtype]
    torch.manual_seed(args.seed + dist.get_rank())
    sizes = [max(args.min_bytes // dtype.itemsize, 1) * dtype.itemsize]
    while sizes[-1] * args.factor <= args.max_bytes:
        sizes.append(sizes[-1] * args.factor)
    counts = [1, 2 * world_size + 1] + [size // dtype.itemsize for size in sizes]
    wrong = torch.tensor([errors(count, dtype, device) for count in counts], dtype=torch.float64)
    to_exact, to_library, spread, miscounted, _, _ = wrong.amax(0).tolist()  # amax keeps a NaN
    everyone = wrong[:, 4].contiguous().to(device)
    dist.all_reduce(everyone)
    total = (everyone.cpu() - 2 * (world_size - 1) * wrong[:, 5]).abs().max().item()

    times = measure(plan(sizes, dtype, device), args.repeats, device)
    deep, steps = len(levels(world_size)), world_size - 1
    say(
        f"{world_size} ranks on {device.type}: the ring takes {2 * steps} steps, the tree {2 * deep}"
    )
    say(f"{'':12}{'ring, ms':>27}{'tree, ms':>27}")
    say(f"{'bytes':>12}" + 2 * f"{'predicted':>12}{'fastest':>8}{'error':>7}")
    rows = []
    for size in sizes:
        kinds = ("exchange", "exchange_and_add")
        ring = steps * sum(min(times[f"{kind} {size}"]) for kind in kinds)
        tree = sum(min(times[f"level {distance} {size}"]) for distance in levels(world_size))
        row = (size, ring, min(times[f"ring {size}"]), tree, min(times[f"tree {size}"]))
        rows.append(
            (*row, *(statistics.median(times[f"{name} {size}"]) for name in ("ring", "tree")))
        )
        halves = (row[1:3], row[3:5])
        say(
            f"{size:>12,}"
            + "".join(f"{p * 1e3:>12.2f}{f * 1e3:>8.2f}{p / f - 1:>+7.0%}" for p, f in halves)
        )
    measured, predicted = faster_up_to(rows, 4, 2), faster_up_to(rows, 3, 1)
    say(f"the tree is faster up to {predicted:,} bytes as predicted, {measured:,} as measured")
    busiest = f"{deep} x the tensor, each way"
    say(
        f"rank 0 of the tree sends and receives {busiest}; a rank of the ring {2 * steps / world_size:.3g} x"
    )

    if sizes[-1] >= 2**20:  # smaller ones show a latency, but no bandwidth
        first, last = (min(times[f"exchange {size}"]) for size in (sizes[0], sizes[-1]))
        predict_crossing(world_size, first, (sizes[-1] - sizes[0]) / world_size / (last - first))
    if dist.get_rank() == 0:
        save(args, rows)

    # A sum of n numbers in any order is within (n-1)u/(1-(n-1)u) of exact, relative to the sum of
    # magnitudes, u being half of eps (Higham, Accuracy and Stability, section 4.2).
    rounding = (world_size - 1) * torch.finfo(dtype).eps / 2
    rounding /= 1 - rounding
    held = [
        check("max |tree - float64 sum| / sum of |x|", to_exact, rounding),
        check("max |tree - all_reduce| / sum of |x|", to_library, 2 * rounding),
        check("max difference between ranks", spread, 0),
        check("bytes sent by each rank, off the formula", miscounted, 0),
        check("bytes sent by all, off 2(n-1) tensors", total, 0),
    ]
    misses = [abs(row[i] / row[i + 1] - 1) for row in rows if row[0] >= 2**16 for i in (1, 3)]
    if misses:
        large = [row[0] for row in rows if row[0] >= 2**16]
        bound = tolerance([times[f"{name} {size}"] for size in large for name in ("ring", "tree")])
        held.append(
            check("median error of predictions from 64 KiB", statistics.median(misses), bound)
        )
    return all(held)


def save(args: argparse.Namespace, rows: list[tuple]) -> None:
    """Write the sizes and their times in seconds as JSON and as a picture, where asked for."""
    names = ("ring predicted", "ring", "tree predicted", "tree", "ring median", "tree median")
    if args.json:
        record = [dict(zip(("bytes", *names), row, strict=True)) for row in rows]
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    if not args.plot:
        return
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "tree_allreduce"
    from matplotlib import pyplot

    size, *columns = zip(*rows, strict=True)
    figure, axis = pyplot.subplots(figsize=(6.4, 4))
    for name, style, seconds in zip(names, ("C0--", "C0o-", "C1--", "C1s-"), columns, strict=False):
        axis.loglog(size, [s * 1e3 for s in seconds], style, label=name, base=2)
    axis.set(
        xlabel="bytes", ylabel="ms, fastest", title=f"All-reduce by {dist.get_world_size()} ranks"
    )
    axis.set_yscale("log")  # powers of 10, unlike the sizes
    axis.legend()
    figure.tight_layout()
    figure.savefig(args.plot, format="svg", facecolor="white", metadata={"Date": None})


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
        stop(f"one rank has no tree: type  torchrun --nproc_per_node=2 {sys.argv[0]}")
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
    add("--dtype", choices=DTYPES, default="float32", help="of the tensor, and of the additions")
    add("--seed", type=int, default=0, help="rank r draws its numbers with seed + r")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--json", type=Path, help="also write the table, times in seconds, to this file")
    add("--plot", type=Path, help="also draw the times, ms over bytes, to this SVG file")
    args = parser.parse_args()
    if args.factor < 2 or args.max_bytes < args.min_bytes:
        stop("no sizes to try: type --factor 2 or more, and --max-bytes not below --min-bytes")
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
