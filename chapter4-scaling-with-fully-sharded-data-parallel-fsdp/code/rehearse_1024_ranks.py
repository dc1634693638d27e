"""A step of a Llama on 1,024 ranks, rehearsed in one process: who holds what, and what travels.

    python chapter4-scaling-with-fully-sharded-data-parallel-fsdp/code/rehearse_1024_ranks.py
    torchrun --nproc_per_node=4 chapter4-scaling-with-fully-sharded-data-parallel-fsdp/code/rehearse_1024_ranks.py

The first has tensors without numbers and a process group without ranks, but PyTorch's own FSDP2 and
tensor parallelism: what it counts is what a cluster would do. Try --model 405B, which takes a minute.
The second runs a small step on real ranks and counts the same. Section 4.7.
"""

import argparse
import os
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

GIB = 2**30
MIXED = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
# Memory of a GPU that torchtitan reports for the 8B, GiB, by number of GPUs; section 4.10 has the source.
TITAN = {8: 82.4, 128: 67.0}


@dataclass(frozen=True)
class Shape:
    """Of a Llama: sizes of its vectors and heads (arXiv:2407.21783, table 3)."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    hidden: int
    vocabulary: int


MODELS = {
    "tiny": Shape(24, 3, 4, 2, 40, 257),
    "8B": Shape(4096, 32, 32, 8, 14_336, 128_256),
    "70B": Shape(8192, 80, 64, 8, 28_672, 128_256),
    "405B": Shape(16_384, 126, 128, 8, 53_248, 128_256),
}


@dataclass(frozen=True)
class Layout:
    """How many ranks hold a copy of the weights, are one shard, and split each product."""

    replicas: int
    shards: int
    tensor: int

    @property
    def ranks(self) -> int:
        return self.replicas * self.shards * self.tensor

    @property
    def name(self) -> str:
        kind = "HSDP" if self.replicas > 1 else "FSDP"
        over = f"{self.replicas}x{self.shards}" if self.replicas > 1 else f"{self.shards}"
        return f"{kind} {over}" + (f", TP {self.tensor}" if self.tensor > 1 else "")


class Attention(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.head_dim = shape.width // shape.heads
        narrow = shape.kv_heads * self.head_dim
        self.q = nn.Linear(shape.width, shape.width, bias=False)
        self.k = nn.Linear(shape.width, narrow, bias=False)
        self.v = nn.Linear(shape.width, narrow, bias=False)
        self.out = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [batch, seq, width]
        parts = (layer(x).unflatten(-1, (-1, self.head_dim)) for layer in (self.q, self.k, self.v))
        q, k, v = (part.transpose(1, 2) for part in parts)  # [batch, heads here, seq, head_dim]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.gate = nn.Linear(shape.width, shape.hidden, bias=False)
        self.up = nn.Linear(shape.width, shape.hidden, bias=False)
        self.down = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class LlamaLayer(nn.Module):
    """Without rotary embeddings, which have no parameters and send nothing."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.norm1, self.attention = nn.RMSNorm(shape.width), Attention(shape)
        self.norm2, self.feed_forward = nn.RMSNorm(shape.width), FeedForward(shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))


class Llama(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.embed = nn.Embedding(shape.vocabulary, shape.width)
        self.blocks = nn.ModuleList(LlamaLayer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def sharded(shape: Shape, layout: Layout) -> nn.Module:
    """On the meta device: tensor parallel within a block, then FSDP2 block by block."""
    sizes = (layout.replicas, layout.shards, layout.tensor)
    # Named after the backend: DTensor remembers by mesh, and a rehearsal's must not be a real one's.
    replicas, shards, tensor = (
        f"{dist.get_backend()} {kind}" for kind in ("replicas", "shards", "tensor")
    )
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=(replicas, shards, tensor))
    with torch.device("meta"):
        model = Llama(shape)
    whole = PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Replicate())
    columns, rows = ColwiseParallel(), RowwiseParallel()
    plan: dict[str, Any] = {"attention": whole, "attention.out": rows}
    plan |= {f"attention.{name}": columns for name in ("q", "k", "v")}
    plan |= {"feed_forward": whole, "feed_forward.down": rows}
    plan |= {f"feed_forward.{name}": columns for name in ("gate", "up")}
    data = mesh[replicas, shards] if layout.replicas > 1 else mesh[shards]
    for block in model.blocks:
        if layout.tensor > 1:
            parallelize_module(block, mesh[tensor], plan)
        fully_shard(block, mesh=data, mp_policy=MIXED)
    fully_shard(model, mesh=data, mp_policy=MIXED)
    return model


class Wire(TorchDispatchMode):
    """Counts collectives by kind, and what a rank receives in each by a ring's cost (section 2.3)."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()
        self.bytes = Counter()

    def note(self, kind: str, of_whole: float, ranks: int) -> None:
        if ranks > 1:
            self.calls[kind] += 1
            self.bytes[kind] += of_whole * (ranks - 1) / ranks

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        if name == "c10d::_allgather_base_":
            self.note("all-gather", args[0].nbytes, args[0].numel() // args[1].numel())
        elif name == "c10d::_reduce_scatter_base_":
            self.note("reduce-scatter", args[1].nbytes, args[1].numel() // args[0].numel())
        elif name == "c10d::allreduce_":
            ranks = dist.ProcessGroup.unbox(args[1]).size()
            self.note("all-reduce", 2 * sum(t.nbytes for t in args[0]), ranks)
        elif name == "_c10d_functional::all_reduce":
            self.note("all-reduce", 2 * args[0].nbytes, _resolve_process_group(args[2]).size())
        return function(*args, **(kwargs or {}))


def one_step(model: nn.Module, batch: int, context: int) -> Wire:
    with Wire() as wire:
        tokens = torch.zeros(batch, context + 1, dtype=torch.long)
        logits = model(tokens[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    return wire


def state_bytes(model: nn.Module) -> int:
    """fp32 weights, their gradients and AdamW's two moments, of this rank's shards."""
    shards = 0
    for p in model.parameters():
        shards += p.to_local().numel()
    return 16 * shards


def rehearse(
    shape: Shape, layout: Layout, args: argparse.Namespace, rank: int = 0
) -> tuple[int, Wire]:
    """State and traffic of a rank, from a step of fake tensors in a fake process group."""
    dist.init_process_group("fake", rank=rank, world_size=layout.ranks, store=FakeStore())
    model = sharded(shape, layout)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        wire = one_step(model, args.batch, args.context)
    held = state_bytes(model)
    dist.destroy_process_group()
    return held, wire


def predict(
    shape: Shape, layout: Layout, args: argparse.Namespace, rank: int
) -> tuple[int, Counter, Counter]:
    """State of a rank, calls and bytes by kind, from the shapes of the tensors alone."""
    n, tp = layout.shards, layout.tensor
    width, hidden, layers = shape.width, shape.hidden, shape.layers
    narrow = width // shape.heads * shape.kv_heads
    # (rows, columns) on this rank before FSDP cuts the rows into n chunks of equal size
    block = [(width, 1), (width, 1), (width // tp, width), (width, width // tp)]
    block += [(narrow // tp, width)] * 2 + [(hidden // tp, width)] * 2 + [(width, hidden // tp)]
    root = [(shape.vocabulary, width), (width, 1), (shape.vocabulary, width)]
    chunks = [sum(-(-rows // n) * columns for rows, columns in group) for group in (block, root)]
    shard = rank // tp % n  # the last ones may have fewer rows of a tensor, or none
    held = [
        sum(
            max(0, min(-(-rows // n), rows - shard * -(-rows // n))) * columns
            for rows, columns in g
        )
        for g in (block, root)
    ]
    state = 16 * (layers * held[0] + held[1])

    sent = (n - 1) * (2 * layers * chunks[0] + chunks[1]) * 2  # gathered in bfloat16
    scattered = (n - 1) * (layers * chunks[0] + chunks[1]) * 4  # reduced in float32
    calls = Counter({"all-gather": 2 * layers + 1, "reduce-scatter": layers + 1} if n > 1 else {})
    received = Counter({"all-gather": sent, "reduce-scatter": scattered} if n > 1 else {})
    if layout.replicas > 1:  # gradients of a shard
        part = 2 * (layout.replicas - 1) / layout.replicas
        calls["all-reduce"] += layers + 1
        received["all-reduce"] += part * 4 * (layers * chunks[0] + chunks[1])
    if tp > 1:  # activations: twice forward, twice backward in each block (arXiv:1909.08053)
        calls["all-reduce"] += 4 * layers
        part = 2 * (tp - 1) / tp * 4 * layers
        received["all-reduce"] += part * args.batch * args.context * width * 2
    return state, calls, received


def judge(
    found: list[tuple[Shape, Layout, int, Wire]], args: argparse.Namespace, rank: int = 0
) -> list[bool | None]:
    """Print a line for each layout, beside what the shapes say; and whether they agree."""
    say(
        f"{'':<20}{'state of a rank':>16}{'all-gathers':>13}{'reduce-scatters':>17}{'all-reduces':>14}"
    )
    say(f"{'layout':<20}{'GiB':>16}" + f"{'GB':>13}" + f"{'GB':>17}" + f"{'GB':>14}")
    off = Counter()
    for shape, layout, held, wire in found:
        state, calls, received = predict(shape, layout, args, rank)
        cells = [
            f"{wire.calls[kind]:>{width}} {wire.bytes[kind] / 1e9:>8.3g}"
            for kind, width in (("all-gather", 4), ("reduce-scatter", 8), ("all-reduce", 5))
        ]
        say(f"{layout.name:<20}{held / GIB:>16.3g}" + "".join(cells))
        off["state"] += abs(held - state)
        off["calls"] += sum(((wire.calls - calls) + (calls - wire.calls)).values())
        kinds = received.keys() | wire.bytes.keys()
        off["bytes"] += sum(abs(wire.bytes[kind] - received[kind]) > 1 for kind in kinds)
    return [
        check("state of a rank, bytes off", off["state"], 0),
        check("collectives, calls off", off["calls"], 0),
        check("collectives, kinds with other bytes than predicted", off["bytes"], 0),
    ]


def on_paper(args: argparse.Namespace) -> list[bool | None]:
    shape = MODELS[args.model]
    layouts = [Layout(1, 8, 1), Layout(1, 128, 1), Layout(1, 1024, 1), Layout(128, 8, 1)]
    layouts.append(Layout(1, 128, 8))
    parameters = sum(p.numel() for p in on_meta(shape).parameters())
    say(
        f"Llama {args.model}: {parameters / 1e9:.2f} billion parameters; no rank exists, nothing is sent"
    )
    found = [(shape, layout, *rehearse(shape, layout, args)) for layout in layouts]
    claims = judge(found, args)
    if args.model == "8B":
        ours = (found[0][2] - found[1][2]) / GIB
        theirs = TITAN[8] - TITAN[128]
        say(f"from 8 GPUs to 128: {ours:.1f} GiB less a GPU; torchtitan reports {theirs:.1f}")
        claims.append(check("error of that", abs(ours / theirs - 1), 0.1))
    return claims


def on_meta(shape: Shape) -> nn.Module:
    with torch.device("meta"):
        return Llama(shape)


def on_ranks(args: argparse.Namespace) -> list[bool | None]:
    """The small model on real ranks, beside its rehearsal."""
    join_group("cpu")
    rank, n = dist.get_rank(), dist.get_world_size()
    pairs = [d for d in (2,) if n % 2 == 0 and n > 2]
    layouts = [Layout(1, n, 1), *(Layout(n // d, d, 1) for d in pairs)]
    layouts += [Layout(1, n // 2, 2)] if n % 2 == 0 else []
    shape = MODELS["tiny"]
    real = []
    for layout in layouts:
        model = sharded(shape, layout).to_empty(device="cpu")
        for p in model.parameters():
            nn.init.normal_(p.to_local(), std=0.02)
        real.append((state_bytes(model), one_step(model, args.batch, args.context)))
    dist.barrier()
    dist.destroy_process_group()
    parameters = sum(p.numel() for p in on_meta(shape).parameters())
    say(f"{n} rank{'s' * (n > 1)} on cpu: a step of {parameters:,} parameters")
    counted = [(shape, layout, *of_step) for layout, of_step in zip(layouts, real, strict=True)]
    claims = judge(counted, args, rank)
    differ = 0
    for layout, (held, wire) in zip(layouts, real, strict=True):
        fake_held, fake = rehearse(shape, layout, args, rank)
        differ += held != fake_held or wire.calls != fake.calls or wire.bytes != fake.bytes
    return [*claims, check("layouts whose rehearsal counts otherwise", differ, 0)]


@record  # so that torchrun's summary names the error
def main() -> None:
    args = parse_args()
    claims = on_ranks(args) if "LOCAL_WORLD_SIZE" in os.environ else on_paper(args)
    sys.stdout.flush()
    os._exit(conclude(claims))  # as fsdp_checkpointing.py does, and why


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=[*MODELS], default="8B", help="whose shape to rehearse")
    parser.add_argument("--batch", type=int, default=1, help="sequences on a rank")
    parser.add_argument("--context", type=int, default=64, help="tokens per sequence")
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
