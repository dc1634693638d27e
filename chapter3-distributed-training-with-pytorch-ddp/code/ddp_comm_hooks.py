"""Gradients in fewer bytes: four DDP communication hooks, what each saves, loses and costs.

    torchrun --nproc_per_node=2 chapter3-distributed-training-with-pytorch-ddp/code/ddp_comm_hooks.py
    torchrun --nproc_per_node=3 chapter3-distributed-training-with-pytorch-ddp/code/ddp_comm_hooks.py --steps 10 --bucket-mb 0.1 --keep 0.1

On GPUs:
    torchrun --nproc_per_node=8 chapter3-distributed-training-with-pytorch-ddp/code/ddp_comm_hooks.py --width 8192 --layers 4 --context 64 --batch 4096 --steps 200 --lr 3e-4

Read the bytes beside the errors and the loss; then the break-even: above that bandwidth a hook costs
more time than it saves. Section 3.5.
"""

import argparse
import json
import math
import os
import socket
import statistics
import struct
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import torch
import torch._dynamo  # before the group, or gloo's threads outlive it: section 3.8
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.elastic.multiprocessing.errors import record
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

BLOCK = 256  # elements that share a scale
TINY = torch.finfo(torch.float32).tiny


@dataclass
class TopK:
    """What `top_k_hook` keeps: the elements that each parameter's gradient has not sent yet."""

    keep: float  # share of a bucket's elements
    feedback: bool
    group: dist.ProcessGroup | None = None  # None: all ranks
    residual: dict[torch.Tensor, torch.Tensor] = field(default_factory=dict)  # DDP rebuilds buckets


def top_k_hook(state: TopK, bucket: dist.GradBucket) -> Future[torch.Tensor]:
    """Send the largest elements with their places, and add the others to the next gradient.

    Error feedback: Stich et al. 2018, arXiv:1809.07599, algorithm 1. Ranks choose different places,
    so nothing can be reduced on the way: every rank gathers all ranks' choices and adds them.
    """
    gradient = bucket.buffer()
    parts = list(zip(bucket.parameters(), bucket.gradients(), strict=True))
    for parameter, part in parts:
        part += state.residual.get(parameter, 0)
    places = gradient.abs().topk(math.ceil(state.keep * len(gradient)), sorted=False).indices
    message = torch.stack([places.int(), gradient[places].view(torch.int32)])  # [2, k]
    gradient[places] = 0
    if state.feedback:
        state.residual.update((parameter, part.clone()) for parameter, part in parts)
    gathered = [torch.empty_like(message) for _ in range(dist.get_world_size(state.group))]
    work = dist.all_gather(gathered, message, group=state.group, async_op=True)

    def average(_: Future) -> torch.Tensor:
        gradient.zero_()
        for places, values in gathered:  # in the same order on all ranks: the same bits
            gradient.index_add_(0, places, values.view(torch.float32), alpha=1 / len(gathered))
        return gradient

    return work.get_future().then(average)


def quantize(x: torch.Tensor) -> torch.Tensor:
    """[blocks * BLOCK] -> int8 [blocks, BLOCK + 4]: steps of the block's scale, and the scale."""
    blocks = x.view(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True) / 127
    steps = (blocks / scale.clamp(min=TINY)).round()  # off by at most half a step
    return torch.cat([steps.to(torch.int8), scale.view(torch.int8)], 1)


def dequantize(message: torch.Tensor) -> torch.Tensor:
    steps, scale = message.split([BLOCK, 4], 1)
    return (steps * scale.contiguous().view(torch.float32)).flatten()


def int8_hook(group: dist.ProcessGroup | None, bucket: dist.GradBucket) -> Future[torch.Tensor]:
    """Average what is sent in int8: a reduce-scatter, as an all-to-all, then an all-gather.

    An all-reduce would add int8, which overflows, in steps that differ from rank to rank: here each
    rank averages a share in float32. To gather all that n ranks have would cost n/8 of plain DDP.
    """
    n = dist.get_world_size(group)
    gradient = bucket.buffer()
    outgoing = quantize(F.pad(gradient, (0, -len(gradient) % (n * BLOCK))))
    incoming = torch.empty_like(outgoing)
    averaged = torch.empty_like(outgoing)
    dist.all_to_all_single(incoming, outgoing, group=group)  # waits: all ranks issue in one order
    share = dequantize(incoming).view(n, -1).mean(0)  # [padded / n]
    work = dist.all_gather(list(averaged.chunk(n)), quantize(share), group=group, async_op=True)
    return work.get_future().then(lambda _: gradient.copy_(dequantize(averaged)[: len(gradient)]))


class Observer:
    """A hook's state and the hook, and what is seen of it in a step."""

    def __init__(self, state: object, hook: Callable):
        self.state = state
        self.hook = hook
        self.begin_step()

    def begin_step(self) -> None:
        self.local: dict[torch.Tensor, torch.Tensor] = {}  # gradients before they are averaged
        self.lengths: list[int] = []  # of the buckets
        self.sent = 0  # bytes
        self.seconds = 0.0


def observe(observer: Observer, bucket: dist.GradBucket) -> Future[torch.Tensor]:
    """Run the hook, one bucket at a time: on gloo torch's powerSGD_hook hangs with two."""
    parts = zip(bucket.parameters(), bucket.gradients(), strict=True)
    observer.local.update((parameter, part.clone()) for parameter, part in parts)
    observer.lengths.append(len(bucket.buffer()))
    dist.barrier()  # from here on nobody waits for a rank that is late
    sent_before = bytes_sent()
    start = time.perf_counter()
    future = observer.hook(observer.state, bucket)
    future.wait()
    synchronize(bucket.buffer().device)
    observer.seconds += time.perf_counter() - start
    observer.sent += bytes_sent() - sent_before
    return future


def train(
    observer: Observer, data: torch.Tensor, held_out: torch.Tensor, args: argparse.Namespace
) -> dict[str, float]:
    """Train with one hook; return what it sent, how far it was from the average, and the loss."""
    rank = dist.get_rank()
    n = dist.get_world_size()
    model = byte_mlp(args, args.seed).to(data.device)
    parameters = list(model.parameters())
    ddp_model = DistributedDataParallel(model, bucket_cap_mb=args.bucket_mb)
    ddp_model.register_comm_hook(observer, observe)
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, fused=True)
    errors, seconds = [], []
    average_sum = missing_sum = 0  # over the steps
    for step in tqdm(range(args.steps), disable=None if rank == 0 else True):
        windows = draw_windows(data, n * args.batch, args.context, step, args.seed)[rank::n]
        observer.begin_step()
        optimizer.zero_grad()
        next_byte_loss(ddp_model, windows).backward()
        optimizer.step()
        seconds.append(observer.seconds)
        average = mean_over_ranks(flat(observer.local[p] for p in parameters))
        missing = average - flat(p.grad for p in parameters)
        errors.append(missing.norm() / average.norm())
        average_sum = average_sum + average
        missing_sum = missing_sum + missing
    unsent = missing_sum
    if isinstance(observer.state, TopK) and observer.state.feedback:
        residual = flat(observer.state.residual[p] for p in parameters)
        unsent = missing_sum - mean_over_ranks(residual)
    with torch.no_grad():
        loss = next_byte_loss(model, held_out).item()
    slowest = average.new_tensor(statistics.median(seconds[args.warm_up :]))
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return {
        "sent": mean_over_ranks(average.new_tensor(observer.sent)).item(),  # bytes, last step
        "error": torch.stack(errors[args.warm_up :]).mean().item(),  # of one step
        "sum_error": (missing_sum.norm() / average_sum.norm()).item(),
        "lost": (unsent.norm() / average_sum.norm()).item(),  # neither sent nor kept
        "spread": max_spread(model),
        "loss": loss,
        "seconds": slowest.item(),  # in the hook and on this machine's wire
    }


def predicted_bytes(
    lengths: list[int], shapes: list[torch.Size], args: argparse.Namespace
) -> dict[str, float]:
    """What a rank sends per step with each hook, from the lengths of buckets and the shapes."""
    n = dist.get_world_size()
    reduced = 2 * (n - 1) / n  # of each byte, by an all-reduce, or an all-to-all and an all-gather
    blocks = sum(n * math.ceil(length / (n * BLOCK)) for length in lengths)
    places = sum(math.ceil(args.keep * length) for length in lengths)
    low_rank = 0
    for rows, columns in (shape if len(shape) == 2 else (*shape, 1) for shape in shapes):
        factors = min(rows, columns, args.matrix_rank) * (rows + columns)
        full = rows * columns
        low_rank += factors if 2 * factors < full else full  # torch's choice
    return {
        "none": reduced * 4 * sum(lengths),
        "fp16": reduced * 2 * sum(lengths),
        "int8": reduced * (BLOCK + 4) * blocks,
        "powerSGD": reduced * 4 * low_rank,
        "top-k": (n - 1) * (4 + 4) * places,
        "no feedback": (n - 1) * (4 + 4) * places,
    }


def byte_mlp(args: argparse.Namespace, seed: int) -> nn.Sequential:
    """Scores the byte that comes after `context` bytes: [batch, context] -> [batch, 256]."""
    torch.manual_seed(seed)
    layers = [nn.Embedding(256, 16), nn.Flatten(), nn.Linear(16 * args.context, args.width)]
    for _ in range(args.layers):
        layers += [nn.LayerNorm(args.width), nn.GELU(), nn.Linear(args.width, args.width)]
    return nn.Sequential(*layers, nn.GELU(), nn.Linear(args.width, 256))


def next_byte_loss(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Mean over windows [batch, context + 1] of the last byte's, in nats."""
    return F.cross_entropy(model(windows[:, :-1]), windows[:, -1])


def draw_windows(
    data: torch.Tensor, batch: int, context: int, step: int, seed: int
) -> torch.Tensor:
    """A step's windows of text, the same on all ranks: [batch, context + 1]."""
    draw = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    starts = torch.randint(len(data) - context, (batch, 1), generator=draw)
    return data[starts + torch.arange(context + 1)]


def bytes_sent() -> int:
    """By this process so far, as Linux counts; 0 where it cannot, as with NCCL."""
    over_tcp = dist.get_backend() == "gloo" and sys.platform == "linux"
    return bytes_on_wire() if over_tcp else 0


def flat(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors]).double()


def mean_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(tensor)
    return tensor / dist.get_world_size()


def run(args: argparse.Namespace, device: torch.device) -> list[bool | None]:
    n = dist.get_world_size()
    text = read_bytes(args.data, at_least=20 * args.context).to(device)
    split = len(text) * 9 // 10
    held_out = text[split:].unfold(0, args.context + 1, 1)[:8192]
    power_state = powerSGD_hook.PowerSGDState(None, args.matrix_rank, args.warm_up)
    observers = {
        "none": Observer(None, default_hooks.allreduce_hook),
        "fp16": Observer(None, default_hooks.fp16_compress_hook),
        "int8": Observer(None, int8_hook),
        "powerSGD": Observer(power_state, powerSGD_hook.powerSGD_hook),
        "top-k": Observer(TopK(args.keep, feedback=True), top_k_hook),
        "no feedback": Observer(TopK(args.keep, feedback=False), top_k_hook),
    }
    rows = {name: train(o, text[:split], held_out, args) for name, o in observers.items()}
    shapes = [p.shape for p in observers["none"].local]
    predicted = predicted_bytes(observers["none"].lengths, shapes, args)

    say(f"{n} rank{'s' * (n > 1)} on {device.type}: {args.steps} steps with each hook, one seed")
    say(
        "               MB sent per step   relative error of     loss held out     ms in  pays below"
    )
    say(
        "hook          on wire predicted  one step their sum     nats  - plain  the hook      Gbit/s"
    )
    plain = rows["none"]
    for name, row in rows.items():
        row["predicted"] = predicted[name]
        row["above_plain"] = row["loss"] - plain["loss"]
        row["pays_below"] = (predicted["none"] - predicted[name]) * 8e-9 / row["seconds"]
        say(f"{name:<12}{row['sent'] / 1e6:>9.4f}{predicted[name] / 1e6:>10.4f}"
            f"{row['error']:>10.2g}{row['sum_error']:>10.2g}{row['loss']:>9.4f}"
            f"{row['above_plain']:>+9.4f}{1e3 * row['seconds']:>10.2f}"
            f"{row['pays_below']:>12.2g}")  # fmt: skip
    if dist.get_rank() == 0 and args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")

    fp16, int8, power, top_k, no_feedback = list(rows.values())[1:]
    spreads = torch.tensor([row["spread"] for row in rows.values()])
    feedback = top_k["sum_error"] / no_feedback["sum_error"]
    rounded = max(abs(fp16["above_plain"]), abs(int8["above_plain"]))
    left_out = max(power["above_plain"], top_k["above_plain"])
    break_even = min(row["pays_below"] for row in (fp16, int8, power, top_k))
    claims = [
        check("spread of weights over ranks, with any hook", spreads.max().item(), 0),
        check("fp16: relative error of a step", fp16["error"], 0.01),
        check("int8: relative error of a step", int8["error"], 0.05),
        check("top-k: gradient neither sent nor kept, of the sum", top_k["lost"], 1e-5),
        check("top-k: error of the sum, over that without feedback", feedback, 0.9),
        check("fp16 and int8: |loss - plain|", rounded, 0.1),
        expect("powerSGD and top-k: loss above plain", left_out, 0.5, args.strict),
        expect("every hook pays below, Gbit/s", break_even, 0.2, args.strict, at_least=True),
    ]
    if plain["sent"]:
        headers = max(abs(row["sent"] - row["predicted"]) for row in rows.values())
        per_bucket = headers / len(observers["none"].lengths)
        claims.append(check("bytes per bucket beyond the prediction", per_bucket, 1500 * n))
    return claims


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, default="resources/corpus.txt", help="text to learn, as bytes")
    add("--steps", type=int, default=80, help="optimizer steps with each hook, more than --warm-up")
    add("--batch", type=int, default=128, help="windows of text per step and rank")
    add("--context", type=int, default=8, help="bytes that predict the next")
    add("--width", type=int, default=128, help="of the hidden layers")
    add("--layers", type=int, default=1, help="hidden layers after the first")
    add("--lr", type=float, default=0.01, help="AdamW's learning rate")
    add("--bucket-mb", type=float, default=25, help="MiB of gradients that travel together")
    add("--keep", type=float, default=0.02, help="share of a bucket that top-k sends, up to 1")
    add("--matrix-rank", type=int, default=2, help="rank of powerSGD's matrices")
    add("--warm-up", type=int, default=8, help="plain steps before powerSGD starts, 2 or more")
    add("--seed", type=int, default=0, help="for weights and batches")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--json", type=Path, help="also write bytes, errors, losses and seconds to this file")
    add("--strict", action="store_true", help="exit 1 if an `expect:` line does not hold")
    return parser.parse_args()


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


# Copied from ch01_multi_gpu_ddp.main
@record  # so that torchrun's summary names the error
def main() -> None:
    args = parse_args()
    device = join_group(args.device)
    claims_of = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(claims_of, run(args, device))  # nobody leaves while another is at work
    dist.destroy_process_group()  # not in a `finally`: section 3.1
    sys.exit(conclude(max(claims_of, key=lambda claims: claims.count(False))))  # the worst rank's


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


# Copied from ch01_multi_gpu_ddp.max_spread
def max_spread(model: nn.Module) -> float:
    """Largest difference between any two ranks' copies of any weight."""
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    low, high = flat.clone(), flat.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    dist.all_reduce(high, op=dist.ReduceOp.MAX)
    return (high - low + 0 * flat).max().item()  # 0 * flat: MIN and MAX on gloo drop a NaN


# Copied from gradient_accumulation_no_sync.bytes_on_wire
def bytes_on_wire() -> int:
    """Bytes that this process has given to its TCP connections: sent once, or about to be."""
    total = 0
    for link in Path("/proc/self/fd").iterdir():
        if link.is_socket():
            with socket.socket(fileno=os.dup(int(link.name))) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6):
                    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 216)
                    sent, again = struct.unpack_from("2Q", info, 200)  # as in linux/tcp.h
                    (waiting,) = struct.unpack_from("I", info, 144)  # tcpi_notsent_bytes
                    total += sent - again + waiting
    return total


# Copied from ch01_single_gpu_baseline.read_bytes
def read_bytes(path: Path, at_least: int) -> torch.Tensor:
    """The file's bytes as integers from 0 to 255: [bytes]."""
    try:
        text = path.read_bytes()
    except OSError as error:
        stop(f"cannot read {path} ({error.strerror}): give a text file with --data FILE")
    if len(text) < at_least:
        stop(f"{path} has {len(text)} bytes, this run needs {at_least}: give a longer --data FILE")
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


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
