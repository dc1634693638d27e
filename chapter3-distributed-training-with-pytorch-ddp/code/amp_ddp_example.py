"""Mixed precision under DDP: one training in fp32, bf16 and fp16, a few steps of each in turn.

    torchrun --nproc_per_node=2 chapter3-distributed-training-with-pytorch-ddp/code/amp_ddp_example.py
    torchrun --nproc_per_node=3 chapter3-distributed-training-with-pytorch-ddp/code/amp_ddp_example.py --precision fp32 fp16 --steps 8 --batch 100

On GPUs:
    torchrun --nproc_per_node=8 chapter3-distributed-training-with-pytorch-ddp/code/amp_ddp_example.py --width 8192 --layers 8 --batch 65536 --steps 100 --lr 3e-4

Look at the losses, which agree, and at the gradients on the wire, which are fp32 in all three: autocast
casts the products, not the weights. Then at what one rank's overflow does to the others. Section 3.6.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import NoReturn

import torch
import torch._dynamo  # before the group, or gloo's threads outlive it: section 3.8
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Products of numbers with so many significant bits are off by 2^-bits each; see section 3.6.
BITS = {"fp32": 24, "bf16": 8, "fp16": 11}
TURN = 4  # steps of one precision before the next one has its turn


class Training:
    """One training: what a step in its precision reads and changes, and what it measured."""

    def __init__(self, precision: str, args: argparse.Namespace, device: torch.device):
        self.precision = precision
        self.args = args
        self.device = device
        self.model = DistributedDataParallel(byte_mlp(args, args.seed).to(device))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=args.lr, fused=True)
        # Only fp16 needs it; switched off, all of its methods do nothing but what they wrap.
        self.scaler = torch.amp.GradScaler(
            device.type, init_scale=args.scale, growth_interval=10, enabled=precision == "fp16"
        )
        self.losses: list[torch.Tensor] = []  # this rank's parts of each step's
        self.seconds: list[float] = []  # per step, one value for each turn

    def train_step(self, windows: torch.Tensor, overflow: bool = False) -> None:
        """One update from this rank's share, [share, context + 1]; `overflow` makes its loss inf."""
        loss = self.backward(windows, overflow)
        self.scaler.unscale_(self.optimizer)  # before clipping: the norm must be the true one
        nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip)
        self.scaler.step(self.optimizer)  # not where a gradient is inf or nan; then the scale falls
        self.scaler.update()
        self.optimizer.zero_grad()
        self.losses.append(loss)  # a tensor: `loss.item()` would wait for the GPU in every step

    def backward(self, windows: torch.Tensor, overflow: bool = False) -> torch.Tensor:
        """Leave the scaled gradient of the global batch's mean loss; return this rank's part of it."""
        dtype = DTYPES[self.precision]
        # The backward pass stays outside: autograd runs each operator's in the dtype of its forward.
        with torch.autocast(self.device.type, dtype=dtype, enabled=self.precision != "fp32"):
            logits = self.model(windows[:, :-1])
        loss = F.cross_entropy(logits.float(), windows[:, -1], reduction="sum") / self.args.batch
        scaled = self.scaler.scale(loss * dist.get_world_size())  # DDP divides by it
        (scaled * math.inf if overflow else scaled).backward()
        return loss.detach()

    def unscaled_gradient(self, windows: torch.Tensor) -> tuple[torch.Tensor, float]:
        """The first gradient, flat, and the factor by which its norm falls in `unscale_`."""
        self.backward(windows)
        norm_before = nn.utils.get_total_norm([p.grad for p in self.model.parameters()])
        self.scaler.unscale_(self.optimizer)
        gradient = torch.cat([p.grad.flatten() for p in self.model.parameters()])
        self.scaler.update()
        self.optimizer.zero_grad()
        return gradient, (norm_before / gradient.norm()).item()

    def kept_for_backward(self, windows: torch.Tensor) -> tuple[int, int, int]:
        """Bytes of activations, of 16-bit copies of the weights, and of gradients on the wire."""
        weights = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        kept: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            self.backward(windows)
        wire = sum(p.grad.nbytes for p in self.model.parameters())
        self.optimizer.zero_grad()
        linear = [m.weight for m in self.model.modules() if isinstance(m, nn.Linear)]
        copies = 0 if self.precision == "fp32" else 2 * sum(w.numel() for w in linear)
        return sum(kept.values()) - copies, copies, wire

    def overflow(self, windows: torch.Tensor) -> tuple[float, float]:
        """A step in which the last rank's loss is inf: |weights moved|, and the scale's new share."""
        before = torch.cat([p.detach().flatten() for p in self.model.parameters()])
        scale = self.scaler.get_scale()
        self.train_step(windows, overflow=dist.get_rank() == dist.get_world_size() - 1)
        after = torch.cat([p.detach().flatten() for p in self.model.parameters()])
        return (after - before).abs().max().item(), self.scaler.get_scale() / scale

    def skipped(self) -> int:
        """Steps that moved no weight, as the optimizer counts: asked once, not in every step."""
        return len(self.losses) - int(next(iter(self.optimizer.state.values()))["step"].item())


def exact_gradient(args: argparse.Namespace, windows: torch.Tensor) -> torch.Tensor:
    """What one process gets in fp64 from the same first weights: [weights]."""
    model = byte_mlp(args, args.seed).to(windows.device, torch.float64)
    loss = F.cross_entropy(model(windows[:, :-1]), windows[:, -1], reduction="sum") / args.batch
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def train(trainings: dict[str, Training], data: torch.Tensor, args: argparse.Namespace) -> None:
    """All steps, the precisions in turn; the clock stops at the end of a turn, not of a step."""
    for first in range(0, args.steps, TURN):
        steps = range(first, min(first + TURN, args.steps))
        for training in trainings.values():
            dist.barrier()
            start = time.perf_counter()
            for step in steps:
                windows = draw_windows(data, args.batch, args.context, step, args.seed)
                training.train_step(windows[dist.get_rank() :: dist.get_world_size()])
            synchronize(training.device)
            training.seconds.append((time.perf_counter() - start) / len(steps))


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product, small enough for a processor that emulates the dtype."""
    size = 256 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device).to(dtype)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        a @ a
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds[1:])


def run(args: argparse.Namespace, device: torch.device) -> list[bool | None]:
    rank = dist.get_rank()
    n = dist.get_world_size()
    data = read_bytes(args.data, at_least=20 * args.context).to(device)
    trainings = {name: Training(name, args, device) for name in args.precision}
    few = draw_windows(data, 64, args.context, 0, args.seed)  # fp64 is slow and large
    truth = exact_gradient(args, few)
    share = draw_windows(data, args.batch, args.context, 0, args.seed)[rank::n]
    errors, factors, kept = {}, {}, {}
    for name, training in trainings.items():
        gradient, factors[name] = training.unscaled_gradient(few[rank::n])
        errors[name] = ((gradient - truth).norm() / truth.norm()).item()
        kept[name] = training.kept_for_backward(share)
    train(trainings, data, args)
    losses = {}
    for name, training in trainings.items():
        last = torch.stack(training.losses[-5:]).mean()  # one step's is noisy
        dist.all_reduce(last)
        losses[name] = last.item()
    if "fp16" in trainings:
        moved, fell = trainings["fp16"].overflow(share)

    say(f"{n} rank{'s' * (n > 1)} on {device.type}: {args.steps} steps in each precision, one seed")
    products = (f"{name} {product_rate(device, DTYPES[name]) / 1e9:,.1f}" for name in trainings)
    say(f"GFLOP/s of a product on one rank: {', '.join(products)}")
    say(f"{'':<6}{'windows/s':>9}{'quartiles':>18}{'MiB kept':>10}{'+ copies':>10}{'on the wire':>13}"
        f"{'gradient error':>16}{'skipped':>9}{'loss':>7}")  # fmt: skip
    for name, training in trainings.items():
        rates = [args.batch / seconds for seconds in training.seconds[1:] or training.seconds]
        low, median, high = quartiles(rates)  # the first turn warms up
        spread = f"{low:,.0f} .. {high:,.0f}"
        activations, copies, wire = (size / 2**20 for size in kept[name])
        say(f"{name:<6}{median:>9,.0f}{spread:>18}{activations:>10.2f}{copies:>10.2f}{wire:>13.2f}"
            f"{errors[name]:>16.2g}{training.skipped():>9}{losses[name]:>7.3f}")  # fmt: skip
    if args.json and rank == 0:
        rows = {name: {"loss": losses[name], "seconds": t.seconds} for name, t in trainings.items()}
        args.json.write_text(json.dumps(rows, indent=1) + "\n")

    claims = []
    for name, training in trainings.items():
        claim = f"{name}: first gradient's error, in units of 2^-{BITS[name]}"
        claims.append(check(claim, errors[name] * 2 ** BITS[name], 32))
        spread = max_spread(training.model)
        claims.append(check(f"{name}: spread of weights over ranks", spread, 0))
        if name != "fp32" and "fp32" in trainings:
            difference = abs(losses[name] - losses["fp32"])
            claims.append(check(f"{name}: |loss - fp32's|, last five steps", difference, 0.1))
            activations = kept[name][0] / kept["fp32"][0]
            claims.append(check(f"{name}: activations kept, of fp32's", activations, 0.9))
    if "fp16" in trainings:
        factor = abs(factors["fp16"] / args.scale - 1)
        say(f"overflow on rank {n - 1}: the scale is {fell:g} of what it was")
        claims += [
            check("fp16: norm before unscale_ is the scale too large, off by", factor, 1e-3),
            check("fp16: weights moved by the overflow, on any rank", moved, 0),
            check("fp16: scale after it, of before, on any rank", fell, 0.5),
        ]
    return claims


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, default="resources/corpus.txt", help="text to learn, as bytes")
    add("--precision", choices=DTYPES, nargs="+", default=[*DTYPES], help="which; default: all")
    add("--steps", type=int, default=24, help="optimizer steps in each precision")
    add("--scale", type=float, default=2.0**14, help="factor that fp16's loss begins with")
    add("--batch", type=int, default=512, help="windows per step, all ranks together")
    add("--context", type=int, default=8, help="bytes that predict the next")
    add("--width", type=int, default=128, help="of the hidden layers")
    add("--layers", type=int, default=3, help="hidden layers after the first")
    add("--lr", type=float, default=3e-3, help="AdamW's learning rate")
    add("--clip", type=float, default=1.0, help="largest norm of a gradient")
    add("--seed", type=int, default=0, help="for weights and batches")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--json", type=Path, help="also write losses and seconds to this file")
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


# Copied from ddp_comm_hooks.byte_mlp
def byte_mlp(args: argparse.Namespace, seed: int) -> nn.Sequential:
    """Scores the byte that comes after `context` bytes: [batch, context] -> [batch, 256]."""
    torch.manual_seed(seed)
    layers = [nn.Embedding(256, 16), nn.Flatten(), nn.Linear(16 * args.context, args.width)]
    for _ in range(args.layers):
        layers += [nn.LayerNorm(args.width), nn.GELU(), nn.Linear(args.width, args.width)]
    return nn.Sequential(*layers, nn.GELU(), nn.Linear(args.width, 256))


# Copied from ddp_comm_hooks.draw_windows
def draw_windows(
    data: torch.Tensor, batch: int, context: int, step: int, seed: int
) -> torch.Tensor:
    """A step's windows of text, the same on all ranks: [batch, context + 1]."""
    draw = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    starts = torch.randint(len(data) - context, (batch, 1), generator=draw)
    return data[starts + torch.arange(context + 1)]


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


# Copied from ch01_single_gpu_baseline.quartiles
def quartiles(values: list[float]) -> list[float]:
    """First quartile, median and third quartile."""
    return torch.tensor(values).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()


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
