"""Fully sharded data parallel in a hundred lines: one process's numbers, from a share of each tensor.

    torchrun --nproc_per_node=2 chapter4-scaling-with-fully-sharded-data-parallel-fsdp/code/fsdp_from_scratch.py

On GPUs:
    torchrun --nproc_per_node=8 chapter4-scaling-with-fully-sharded-data-parallel-fsdp/code/fsdp_from_scratch.py --width 1024 --layers 8 --batch 16 --context 256

Look at the peak: two blocks are whole at a time, never the model. And at the bytes: a block travels
three times in a step, half as much again as under DDP. Section 4.2.
"""

import argparse
import os
import sys
from collections import Counter
from copy import deepcopy
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.elastic.multiprocessing.errors import record
from torch.utils._python_dispatch import TorchDispatchMode

MIB = 2**20


class Unit:
    """Parameters that travel together: a flat share on each rank, and the whole while it is needed.

    The parameters stay views of one storage, `whole`. Given back, that storage has no bytes; the
    views, and what autograd has saved of them, are right again once it is gathered anew.
    """

    def __init__(self, parameters: list[nn.Parameter]):
        n = dist.get_world_size()
        self.parameters = parameters
        flat = torch.cat([p.detach().flatten() for p in parameters])
        padded = F.pad(flat, (0, -len(flat) % n))  # so that all ranks have equally many numbers
        self.share = nn.Parameter(padded.chunk(n)[dist.get_rank()].clone())
        self.whole = torch.empty_like(padded)
        self.bytes = padded.nbytes
        parts = self.whole[: len(flat)].split([p.numel() for p in parameters])
        for p, part in zip(parameters, parts, strict=True):
            p.data = part.view(p.shape)
            p.register_post_accumulate_grad_hook(self.on_gradient)
        self.work = None
        self.is_whole = True
        self.give_back()

    def ask(self) -> None:
        """Start the all-gather, and do not wait for it."""
        if not self.is_whole and self.work is None:
            self.whole.untyped_storage().resize_(self.bytes)
            share = self.share.detach()
            self.work = dist.all_gather_single(self.whole, share, async_op=True)

    def gather(self) -> None:
        self.ask()
        if self.work is not None:
            self.work.wait()
            self.work = None
        self.is_whole = True
        self.missing = len(self.parameters)

    def give_back(self) -> None:
        if self.is_whole:
            self.whole.untyped_storage().resize_(0)
        self.is_whole = False

    def on_gradient(self, _: nn.Parameter) -> None:
        """Autograd calls this when a gradient is complete; the unit's last one sends them all."""
        self.missing -= 1
        if self.missing:
            return
        self.give_back()
        flat = torch.cat([p.grad.flatten() for p in self.parameters])
        for p in self.parameters:
            p.grad = None
        n = dist.get_world_size()
        flat = F.pad(flat, (0, -len(flat) % n)).div_(n)  # a mean over the ranks, as DDP's
        mine = torch.empty_like(self.share)
        dist.reduce_scatter_single(mine, flat)
        self.share.grad = mine if self.share.grad is None else self.share.grad + mine


class FSDP(nn.Module):
    """Stage 3 of ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054) in the manner of torch's FSDP2.

    Each of `blocks` is a unit; all other parameters are one more, the root, which stays whole from
    the forward pass to the end of the backward pass. Every forward must be followed by a backward.
    """

    def __init__(self, module: nn.Module, blocks: nn.ModuleList):
        super().__init__()
        self.module = module
        within = {p for block in blocks for p in block.parameters()}
        self.root = Unit([p for p in module.parameters() if p not in within])
        self.units = [Unit(list(block.parameters())) for block in blocks]
        for i, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda *_, i=i: self.enter(i, i + 1))
            block.register_forward_hook(lambda *_, i=i: self.units[i].give_back())
            block.register_full_backward_pre_hook(lambda *_, i=i: self.enter(i, i - 1))

    def enter(self, i: int, after: int) -> None:
        """Have block i whole, and the one that comes after it on its way."""
        self.units[i].gather()
        if 0 <= after < len(self.units):
            self.units[after].ask()

    def forward(self, *args: Any) -> Any:
        self.root.gather()
        return self.module(*args)

    def shares(self) -> list[nn.Parameter]:
        """What an optimizer updates: this rank's share of each unit."""
        return [unit.share for unit in (self.root, *self.units)]


class ResidualBlock(nn.Module):
    """x + down(relu(up(x))): [tokens, width] to the same."""

    def __init__(self, width: int):
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu())


class ResidualModel(nn.Module):
    """A vocabulary of 257, which no number of ranks above one divides, and biases that are not zero."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        self.embed = nn.Embedding(257, width)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(layers))
        self.head = nn.Linear(width, 257)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:  # [batch, seq] -> [batch x seq, 257]
        x = self.embed(tokens.flatten())
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Traffic(TorchDispatchMode):
    """Counts what a rank receives in collectives: the parts of the others, in bytes, and the calls."""

    def __init__(self):
        super().__init__()
        self.bytes = 0
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            n = dist.get_world_size()
            self.bytes += max(t.nbytes for t in args[:2]) * (n - 1) // n
            self.calls[function.name()] += 1
        return function(*args, **(kwargs or {}))


def backward(model: nn.Module, tokens: torch.Tensor, rank: int, n: int) -> torch.Tensor:
    """Gradients of a mean over all tokens, from this rank's sequences; its part of the loss."""
    window = tokens.tensor_split(n)[rank]  # ranks may differ by a sequence, or have none
    logits = model(window[:, :-1])
    loss = F.cross_entropy(logits, window[:, 1:].flatten(), reduction="sum")
    loss = loss / tokens[:, 1:].numel()
    (loss * n).backward()
    return loss.detach()


def compare(args: argparse.Namespace, device: torch.device) -> tuple[float, float, float]:
    """Train by shares and in one process: how far apart are losses, gradients and, at the end, weights?"""
    rank = dist.get_rank()
    n = dist.get_world_size()
    torch.manual_seed(args.seed)
    reference = ResidualModel(args.width, args.layers).to(device, torch.float64)
    copy = deepcopy(reference)
    ours = FSDP(copy, copy.blocks)
    optimizers = [
        torch.optim.AdamW(parameters, lr=1e-2)
        for parameters in (ours.shares(), reference.parameters())
    ]
    draw = torch.Generator().manual_seed(args.seed)  # the same on all ranks
    losses, gradients = [], []
    for _ in range(3):
        tokens = torch.randint(257, (args.batch, args.context + 1), generator=draw).to(device)
        loss = backward(ours, tokens, rank, n)
        dist.all_reduce(loss)
        losses.append((loss - backward(reference, tokens, 0, 1)).abs())
        gradients.append(difference(ours, reference, "grad"))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    worst = [torch.stack(found).max().item() for found in (losses, gradients)]
    return worst[0], worst[1], difference(ours, reference, "data").item()


def difference(ours: FSDP, reference: nn.Module, what: str) -> torch.Tensor:
    """The largest over this rank's shares, relative to the reference's largest element."""
    n = dist.get_world_size()
    names = {p: name for name, p in ours.module.named_parameters()}
    whole = dict(reference.named_parameters())
    apart = []
    for unit in (ours.root, *ours.units):
        flat = torch.cat([getattr(whole[names[p]], what).flatten() for p in unit.parameters])
        share = F.pad(flat, (0, -len(flat) % n)).chunk(n)[dist.get_rank()]
        apart.append((getattr(unit.share, what) - share).abs().max() / flat.abs().max())
    return torch.stack(apart).max()


def predict(args: argparse.Namespace, itemsize: int, sequences: int) -> tuple[int, float]:
    """Bytes that a rank receives in a step, and its peak, from the model's shape alone."""
    n = dist.get_world_size()
    width, layers = args.width, args.layers
    sizes = [2 * 257 * width + 257, *[8 * width**2 + 5 * width] * layers]
    root, *blocks = [(size + -size % n) * itemsize for size in sizes]  # padded
    received = (2 * root + 3 * sum(blocks)) * (n - 1) // n

    # Numbers per token: a block keeps its input and what comes out of relu; the head its input.
    token = sequences * args.context * itemsize
    kept = 5 * width * token
    logits = 257 * token
    state = 3 * (root + sum(blocks)) // n  # weights and AdamW's moments; gradients come in backward
    always = state + root + logits + width * token
    # Where backward begins: log-softmax, and the gradients of both its ends.
    peaks = [always + layers * kept + 3 * logits]
    head = (257 * width + 257) * itemsize  # its gradient waits for the embedding's
    for i in range(layers):
        before = blocks[i - 1] if i else 0  # on its way
        later = sum(blocks[i + 1 :]) // n  # gradients, reduced and scattered
        # At relu: the block is whole, half of its gradients are there.
        peaks.append(always + head + later + before + 1.5 * blocks[i])
        peaks[-1] += (i + 1) * kept + 9 * width * token
        # At its end: the block is given back, its gradients lie there one by one and flat.
        peaks.append(always + head + later + before + 2 * blocks[i] + blocks[i] // n)
        peaks[-1] += i * kept + 3 * width * token
    peaks.append(always + 2 * root + root // n + sum(blocks) // n)  # the root's end
    return received, max(peaks)


def measure(args: argparse.Namespace, device: torch.device) -> tuple[int, int, Counter, int]:
    """The same, counted in one step: and the calls, and this rank's number of sequences."""
    rank = dist.get_rank()
    n = dist.get_world_size()
    dtype = getattr(torch, args.dtype)
    torch.manual_seed(args.seed)
    module = ResidualModel(args.width, args.layers).to(device, dtype)
    model = FSDP(module, module.blocks)
    optimizer = torch.optim.AdamW(model.shares())
    tokens = torch.randint(257, (args.batch, args.context + 1), device=device)
    backward(model, tokens, rank, n)
    optimizer.step()  # makes the moments
    optimizer.zero_grad()
    with Traffic() as traffic:
        backward(model, tokens, rank, n)
    optimizer.zero_grad()
    tracker = MemTracker()
    moments = [t for state in optimizer.state.values() for t in state.values()]
    tracker.track_external(*model.shares(), *moments, tokens)
    with tracker:
        backward(model, tokens, rank, n)
    peak = tracker.get_tracker_snapshot("peak")[torch.device(device)]["Total"]
    return traffic.bytes, peak, traffic.calls, len(tokens.tensor_split(n)[rank])


def run(args: argparse.Namespace, device: torch.device) -> list[bool | None]:
    n = dist.get_world_size()
    loss, gradient, weight = compare(args, device)
    received, peak, calls, sequences = measure(args, device)
    itemsize = getattr(torch, args.dtype).itemsize
    expected_bytes, expected_peak = predict(args, itemsize, sequences)
    parameters = sum(p.numel() for p in ResidualModel(args.width, args.layers).parameters())
    whole = parameters * itemsize / MIB
    say(f"{n} rank{'s' * (n > 1)} on {device.type}: {parameters:,} parameters, {whole:.2f} MiB")
    say(f"{'on rank 0, MiB':<22}{'predicted':>10}{'counted':>10}{'under DDP':>11}")
    ddp = 2 * parameters * itemsize * (n - 1) / n / MIB
    for name, expected, counted, other in (
        ("received in a step", expected_bytes, received, f"{ddp:>11.3f}"),
        ("peak of a step", expected_peak, peak, ""),
    ):
        say(f"{name:<22}{expected / MIB:>10.3f}{counted / MIB:>10.3f}{other}")
    gathers = calls["c10d::_allgather_base_"]
    return [
        check("in float64, max |loss - one process's|", loss, 1e-9),
        check("in float64, max |gradient - one process's|", gradient, 1e-9),
        check("in float64 after 3 steps, max |weight - one process's|", weight, 1e-9),
        check("bytes received, |counted - predicted|", abs(received - expected_bytes), 0),
        check("all-gathers, |counted - 2 per block and 1|", abs(gathers - 2 * args.layers - 1), 0),
        # gloo's threads may hold a buffer a moment longer than the ranks need it.
        expect("error of the peak", abs(peak / expected_peak - 1), 0.05, args.strict),
    ]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=192, help="of a token's vector")
    parser.add_argument("--layers", type=int, default=4, help="blocks")
    parser.add_argument("--batch", type=int, default=7, help="sequences per step, of all ranks")
    parser.add_argument("--context", type=int, default=32, help="tokens per sequence")
    parser.add_argument(
        "--dtype", choices=("float32", "float64"), default="float32", help="where memory is counted"
    )
    parser.add_argument("--seed", type=int, default=0, help="for weights and tokens")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--strict", action="store_true", help="exit 1 if an `expect:` line does not hold"
    )
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


# Copied from fsdp_checkpointing.main
@record  # so that torchrun's summary names the error
def main() -> None:
    args = parse_args()
    device = join_group(args.device)
    claims_of = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(claims_of, run(args, device))  # nobody leaves while another is at work
    dist.destroy_process_group()  # not in a `finally`: section 3.1
    # DTensor's caches keep the mesh, and that the group: gloo's threads would abort Python's own end.
    os._exit(conclude(max(claims_of, key=lambda claims: claims.count(False))))


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
