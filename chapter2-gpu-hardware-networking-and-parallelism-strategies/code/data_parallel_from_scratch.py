"""Data parallelism four ways, from DDP's replicas to ZeRO-3's shards: same weights, other bytes.

    torchrun --nproc_per_node=2 chapter2-gpu-hardware-networking-and-parallelism-strategies/code/data_parallel_from_scratch.py
    torchrun --nproc_per_node=3 chapter2-gpu-hardware-networking-and-parallelism-strategies/code/data_parallel_from_scratch.py --batch 7 --width 50 --steps 6

On GPUs:
    torchrun --nproc_per_node=8 chapter2-gpu-hardware-networking-and-parallelism-strategies/code/data_parallel_from_scratch.py --width 4096 --layers 4 --batch 4096

Read "sent" beside "held": ZeRO-1 and ZeRO-2 save memory for no extra byte on the wire, ZeRO-3 saves
the rest for half as many again. Bytes are a ring's, as NCCL sends them; gloo's reduce-scatter is an
all-reduce inside and sends twice its share, so time the last columns on GPUs. Section 2.5.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record

CONTEXT = 8  # bytes that predict the next one
LEARNING_RATE = 3e-3
# Relative errors against float64: of a gradient, and of weights, where AdamW magnifies them.
BOUNDS = {"float64": (1e-12, 1e-9), "float32": (1e-5, 1e-4), "bfloat16": (2e-2, 5e-2)}
ROW = "{:<10}{:>9}{:>9}{:>9}{:>10}{:>8}{:>8}{:>9}{:>9}{:>9}"
# Bytes sent, in (n-1)/n of the weights; then what is sharded: weights, gradients, optimizer state.
SCHEMES = {
    "replicate": (2, False, False, False),
    "zero1": (2, False, False, True),
    "zero2": (2, False, True, True),
    "zero3": (3, True, True, True),
}


def build(args: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> nn.Sequential:
    """Scores the next byte, [batch, CONTEXT] -> [batch, 256]; same seed, same weights."""
    torch.manual_seed(args.seed)
    enter = nn.Sequential(nn.Embedding(256, 16), nn.Flatten(), nn.Linear(16 * CONTEXT, args.width))
    width = args.width
    layers = [nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(args.layers)]
    return nn.Sequential(enter, *layers, nn.Linear(width, 256)).to(device, dtype)


class Unit:
    """Weights that travel together: one buffer, which the module's parameters are views of."""

    def __init__(self, module: nn.Module, shard_weights: bool, shard_state: bool):
        n = dist.get_world_size()
        self.module = module
        self.parameters = list(module.parameters())
        flat = torch.cat([p.detach().flatten() for p in self.parameters])
        self.flat = F.pad(flat, (0, -len(flat) % n))  # [padded], a multiple of n
        self.view_as_parameters(self.flat, "data")
        shard = self.flat.chunk(n)[dist.get_rank()]  # [padded / n]
        self.owned = shard if shard_state else self.flat  # what this rank updates
        if shard_weights:
            self.owned = shard.clone()
            self.free()

    def view_as_parameters(self, flat: torch.Tensor, attribute: str) -> None:
        """Let .data or .grad of each parameter be its part of a buffer [padded]."""
        offset = 0
        for p in self.parameters:
            setattr(p, attribute, flat[offset : offset + p.numel()].view(p.shape))
            offset += p.numel()

    def free(self) -> None:
        """Give the memory back; the views, autograd's too, stay and wait for the next gather."""
        self.flat.untyped_storage().resize_(0)


class Replica:
    """A model trained by one of the schemes, as this rank holds it.

    DDP: Li et al. 2020, arXiv:2006.15704, here without overlap. ZeRO: Rajbhandari et al. 2019,
    arXiv:1910.02054, section 5. Gathering by unit: Zhao et al. 2023 (FSDP), arXiv:2304.11277.
    """

    def __init__(self, scheme: str, model: nn.Sequential):
        _, self.shard_weights, self.shard_gradients, self.shard_state = SCHEMES[scheme]
        self.units = [Unit(module, self.shard_weights, self.shard_state) for module in model]
        self.optimizer = torch.optim.AdamW([u.owned for u in self.units], lr=LEARNING_RATE)
        self.sent = 0  # bytes
        self.whole = 0  # most bytes of whole units in memory at once
        self.seconds: list[float] = []

    def all_gather(self, unit: Unit) -> None:
        """Fill the buffer from all ranks' shards. In a ring, a rank hands on n-1 of the n."""
        n = dist.get_world_size()
        unit.flat.untyped_storage().resize_(unit.flat.nbytes)
        dist.all_gather(list(unit.flat.chunk(n)), unit.owned)
        self.sent += (n - 1) * unit.owned.nbytes
        self.whole = max(self.whole, nbytes(u.flat for u in self.units))

    def reduce(self, unit: Unit, gradient: torch.Tensor) -> None:
        """Sum a unit's gradient [padded] over the ranks, and keep of it what the scheme keeps."""
        n = dist.get_world_size()
        rank = dist.get_rank()
        shards = list(gradient.chunk(n))
        if not self.shard_state:
            dist.all_reduce(gradient)
            self.sent += 2 * (n - 1) * shards[rank].nbytes  # a reduce-scatter and an all-gather
            unit.owned.grad = gradient
            return
        total = torch.empty_like(shards[rank])
        dist.reduce_scatter(total, shards)
        self.sent += (n - 1) * total.nbytes
        unit.owned.grad = total if self.shard_gradients else shards[rank].copy_(total)
        for parameter in unit.parameters if self.shard_gradients else ():
            parameter.grad = None  # the last reference to the buffer

    def train_step(self, tokens: torch.Tensor, targets: torch.Tensor, batch: int) -> None:
        """One update from this rank's share of a batch: [share, CONTEXT] and [share]."""
        x = tokens
        passed = []  # each unit's input and output
        for unit in self.units:
            if self.shard_weights:
                self.all_gather(unit)
            x = x.detach().requires_grad_(x.is_floating_point())  # a unit's backward ends here
            y = unit.module(x)
            passed.append((x, y))
            x = y
            if self.shard_weights:
                unit.free()
        # Over the whole batch's size: shares differ, and the mean of their means is not the mean.
        loss = F.cross_entropy(x, targets, reduction="sum") / batch
        (upstream,) = torch.autograd.grad(loss, x)
        for unit, (x, y) in zip(reversed(self.units), reversed(passed), strict=True):
            if self.shard_weights:
                self.all_gather(unit)
            gradient = torch.zeros_like(unit.flat)
            unit.view_as_parameters(gradient, "grad")
            torch.autograd.backward(y, upstream)
            upstream = x.grad
            self.reduce(unit, gradient)
            if self.shard_weights:
                unit.free()
        self.optimizer.step()
        self.held = self.bytes_held()
        for unit in self.units if self.shard_state and not self.shard_weights else ():
            self.all_gather(unit)

    def bytes_held(self) -> tuple[int, int, int]:
        """Weights, gradients and optimizer state that are in memory after backward."""
        weights = [p for unit in self.units for p in (unit.owned, *unit.parameters)]
        moments = [t for state in self.optimizer.state.values() for t in state.values() if t.dim()]
        return nbytes(weights), nbytes(p.grad for p in weights), nbytes(moments)


def nbytes(tensors: Iterable[torch.Tensor | None]) -> int:
    """Bytes of memory behind the tensors, each piece once, however many views there are of it."""
    storages = [t.untyped_storage() for t in tensors if t is not None]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def one_process(model: nn.Sequential, windows: torch.Tensor) -> list[list[torch.Tensor]]:
    """Plain PyTorch on whole batches: per unit, the first batch's gradient and the last weights."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    gradients = []
    for window in windows:
        optimizer.zero_grad()
        F.cross_entropy(model(window[:, :-1]), window[:, -1]).backward()
        if not gradients:
            gradients = [torch.cat([p.grad.flatten() for p in u.parameters()]) for u in model]
        optimizer.step()
    weights = [torch.cat([p.detach().flatten() for p in u.parameters()]) for u in model]
    return [gradients, weights]


def relative_rms(error: torch.Tensor, exact: torch.Tensor) -> float:
    """Root mean square of the error, over that of the exact values."""
    return (error.square().mean() / exact.square().mean()).sqrt().item()


def error_of_units(parts: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """Relative error over all units: of the whole ones, or of this rank's shards of them."""
    n = dist.get_world_size()
    expected = []
    for part, whole in zip(parts, exact, strict=True):
        padded = F.pad(whole, (0, -len(whole) % n))
        is_whole = len(part) == len(padded)
        expected.append(padded if is_whole else padded.chunk(n)[dist.get_rank()])
    return relative_rms(torch.cat(parts).double() - torch.cat(expected), torch.cat(exact))


def run(args: argparse.Namespace, device: torch.device) -> list[bool | None]:
    rank = dist.get_rank()
    n = dist.get_world_size()
    data = read_bytes(args.data, at_least=99)
    draw = torch.Generator().manual_seed(args.seed)
    starts = torch.randint(len(data) - CONTEXT, (args.steps, args.batch, 1), generator=draw)
    windows = data[starts + torch.arange(CONTEXT + 1)].to(device)  # [steps, batch, CONTEXT + 1]
    gradients, weights = one_process(build(args, torch.float64, device), windows)
    dtype = getattr(torch, args.dtype)
    replicas = {scheme: Replica(scheme, build(args, dtype, device)) for scheme in SCHEMES}
    gradient_errors = []
    for step, window in enumerate(windows):
        share = window.tensor_split(n)[rank]  # [share, CONTEXT + 1]; shares may differ by one
        for replica in replicas.values():
            dist.barrier()
            start = time.perf_counter()
            replica.train_step(share[:, :-1], share[:, -1], args.batch)
            synchronize(device)
            replica.seconds.append(time.perf_counter() - start)
            if step == 0:
                owned = [unit.owned.grad for unit in replica.units]
                gradient_errors.append(error_of_units(owned, gradients))

    if args.json and rank == 0:
        keys = ("sent", "held", "seconds")
        result = {scheme: {key: getattr(r, key) for key in keys} for scheme, r in replicas.items()}
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    size = sum(unit.flat.nbytes for unit in replicas["replicate"].units)  # S, with the padding
    ranks = f"{n} rank{'s' * (n > 1)}"
    say(f"{ranks} on {device.type}: {size / 1e6:.3f} MB of weights, {args.dtype}")
    say(f"{'':<10}{'MB sent per step':>18}{'MB held after backward':>44}{'ms per step':>18}")
    heads = "scheme counted formula weights gradients AdamW sum formula fastest median"
    say(ROW.format(*heads.split()))
    missed_sent, missed_held, weight_errors = [], [], []
    for scheme, (factor, *sharded) in SCHEMES.items():
        replica = replicas[scheme]
        seconds = replica.seconds[min(2, args.steps - 1) :]  # the first ones warm up
        sent = factor * (n - 1) * size // n
        held = sum(k * size // (n if s else 1) for k, s in zip((1, 1, 2), sharded, strict=True))
        row = [replica.sent / args.steps, sent, *replica.held, sum(replica.held), held]
        milliseconds = [f"{t * 1e3:.1f}" for t in (min(seconds), statistics.median(seconds))]
        say(ROW.format(scheme, *(f"{x / 1e6:.3f}" for x in row), *milliseconds))
        missed_sent.append(abs(replica.sent - sent * args.steps))
        missed_held.append(abs(sum(replica.held) - held))
        final = [unit.owned if replica.shard_weights else unit.flat for unit in replica.units]
        weight_errors.append(error_of_units(final, weights))

    zero3 = replicas["zero3"]
    beyond = zero3.whole - max(unit.flat.nbytes for unit in zero3.units)
    gradient_error, weight_error = torch.tensor([gradient_errors, weight_errors]).amax(1).tolist()
    gradient_bound, weight_bound = BOUNDS[args.dtype]
    return [
        check("first gradient, relative error", gradient_error, gradient_bound),
        check(f"weights after {args.steps} steps, relative error", weight_error, weight_bound),
        check("max |bytes sent - formula|", max(missed_sent), 0),
        check("max |bytes held - formula|", max(missed_held), 0),
        check("zero3: bytes of weights gathered beyond one unit", beyond, 0),
    ]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, default="resources/corpus.txt", help="text to learn, as bytes"
    )
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps per scheme")
    parser.add_argument("--batch", type=int, default=64, help="windows per step, of all ranks")
    parser.add_argument("--width", type=int, default=320, help="outputs of a hidden layer")
    parser.add_argument("--layers", type=int, default=6, help="hidden layers, a unit each")
    parser.add_argument("--dtype", choices=BOUNDS, default="float32", help="of all tensors")
    parser.add_argument("--seed", type=int, default=0, help="for weights and batches")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--json", type=Path, help="also write bytes and seconds to this file")
    return parser.parse_args()


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


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
