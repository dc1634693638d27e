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
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LIMIT_S = 5  # on top of the first --repeats, while the fastest times have not settled
Action = tuple[Callable[..., object], tuple, int]  # what, with what, how many in a row


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


def bytes_to_send(tensor: torch.Tensor) -> int:
    """What this rank must send: on each trip all chunks but one. 2(n-1)/n of the tensor if even."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    sizes = [chunk.nbytes for chunk in tensor.tensor_split(world_size)]
    return 2 * sum(sizes) - sizes[(rank + 1) % world_size] - sizes[(rank + 2) % world_size]


def errors(count: int, dtype: torch.dtype, device: torch.device) -> list[float]:
    """All-reduce `count` random numbers; what is wrong with the sum and with the bytes sent.

    Returns the largest distance from the sum in float64 and from dist.all_reduce, both relative to
    the sum of magnitudes, the largest difference between ranks, and the bytes off the formula.
    """
    tensor = torch.randn(count, device=device).to(dtype)
    exact, magnitude = tensor.double(), tensor.double().abs()
    mine, library = tensor.clone(), tensor.clone()
    sent = ring_all_reduce(mine)
    for reference in (library, exact, magnitude):
        dist.all_reduce(reference)
    first = mine.clone()
    dist.broadcast(first, src=0)
    pairs = [(mine - exact) / magnitude, (mine.double() - library) / magnitude, mine - first]
    return [pair.abs().max().item() for pair in pairs] + [abs(sent - bytes_to_send(tensor))]


def exchange_and_add(outgoing: torch.Tensor, incoming: torch.Tensor) -> None:
    exchange(outgoing, incoming)
    outgoing += incoming


def plan(sizes: list[int], dtype: torch.dtype, device: torch.device) -> dict[str, Action]:
    """What to time on each size: the ring, dist.all_reduce, and the two kinds of step by themselves.

    Steps run as many in a row as in the ring, so that both pay only once for ranks that start
    unevenly. Zeros, which stay zeros however often they are summed.
    """
    world_size, actions = dist.get_world_size(), {}
    for size in sizes:
        tensor = torch.zeros(size // dtype.itemsize, dtype=dtype, device=device)
        pair = tuple(torch.zeros_like(tensor.tensor_split(world_size)[0]).repeat(2, 1))
        actions[f"passes {size}"] = (exchange, pair, 2 * world_size - 2)
        actions[f"adds {size}"] = (exchange_and_add, pair, 2 * world_size - 2)
        actions[f"ring {size}"] = (ring_all_reduce, (tensor, pair[1]), 1)
        actions[f"library {size}"] = (dist.all_reduce, (tensor,), 1)
    return actions


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
    awkward = [1, world_size - 1, 2 * world_size + 1]  # chunks that are empty, or longer by one
    counts = awkward + [size // dtype.itemsize for size in sizes]
    wrong = torch.tensor([errors(count, dtype, device) for count in counts], dtype=torch.float64)
    to_exact, to_library, spread, miscounted = wrong.amax(0).tolist()  # amax keeps a NaN

    times = measure(plan(sizes, dtype, device), args.repeats, device)
    steps, traffic = world_size - 1, 2 * (world_size - 1) / world_size
    say(f"{world_size} ranks on {device.type}: {steps} steps that add, {steps} that only pass on")
    say(f"{'':12}{'one step alone, us':>22}{'all-reduce, ms':>19}")
    say(f"{'bytes':>12}{'adds':>11}{'passes on':>11}{'predicted':>11}{'fastest':>8}{'error':>7}"
        f"{'median':>8}{'library':>8}{'busbw GB/s':>11}")  # fmt: skip
    rows = []
    for size in sizes:
        # In one step each rank moves one chunk: the ring is as many such steps as it has.
        adds, passes, fastest, library = (
            min(times[f"{name} {size}"]) for name in ("adds", "passes", "ring", "library")
        )
        predicted, median = steps * (adds + passes), statistics.median(times[f"ring {size}"])
        rows.append((size, predicted, fastest, median, library))
        say(f"{size:>12,}{adds * 1e6:>11.0f}{passes * 1e6:>11.0f}{predicted * 1e3:>11.2f}"
            f"{fastest * 1e3:>8.2f}{predicted / fastest - 1:>+7.0%}{median * 1e3:>8.2f}"
            f"{library * 1e3:>8.2f}{traffic * size / fastest / 1e9:>11.2f}")  # fmt: skip
    if dist.get_rank() == 0:
        save(args, rows)

    # A sum of n numbers in any order is within (n-1)u/(1-(n-1)u) of exact, relative to the sum of
    # magnitudes, u being half of eps (Higham, Accuracy and Stability, section 4.2).
    rounding = steps * torch.finfo(dtype).eps / 2
    rounding /= 1 - rounding
    held = [
        check("max |ring - float64 sum| / sum of |x|", to_exact, rounding),
        check("max |ring - all_reduce| / sum of |x|", to_library, 2 * rounding),
        check("max difference between ranks", spread, 0),
        check("bytes sent, off the formula", miscounted, 0),
    ]
    misses = [abs(row[1] / row[2] - 1) for row in rows if row[0] >= 2**16]
    if misses:
        bound = tolerance([times[f"ring {row[0]}"] for row in rows if row[0] >= 2**16])
        held.append(
            check("median error of predictions from 64 KiB", statistics.median(misses), bound)
        )
    if sizes[-1] >= 2**24:
        held.append(check("ring / library at the largest", rows[-1][2] / rows[-1][4], 1 / 0.7))
    return all(held)


def save(args: argparse.Namespace, rows: list[tuple[int, float, float, float, float]]) -> None:
    """Write the table's rows, times in seconds, as JSON and as a picture, where asked for."""
    names = ("bytes", "predicted", "fastest", "median", "all_reduce")
    if args.json:
        record = [dict(zip(names, row, strict=True)) for row in rows]
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    if not args.plot:
        return
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "ring_allreduce"
    from matplotlib import pyplot

    size, *columns = zip(*rows, strict=True)
    figure, axis = pyplot.subplots(figsize=(6.4, 4))
    styles = {"predicted": "k--", "fastest": "o-", "median": "o:", "all_reduce": "s-"}
    for name, seconds in zip(names[1:], columns, strict=True):
        axis.loglog(size, [s * 1e3 for s in seconds], styles[name], label=name, base=2)
    axis.set(xlabel="bytes", ylabel="ms", title=f"Ring all-reduce, {dist.get_world_size()} ranks")
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
        stop(f"one rank has no ring: type  torchrun --nproc_per_node=2 {sys.argv[0]}")
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
    add("--min-bytes", type=size_in_bytes, default="4K", help="smallest tensor; K, M, G: 1024s")
    add("--max-bytes", type=size_in_bytes, default="16M", help="largest tensor; K, M, G: 1024s")
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
