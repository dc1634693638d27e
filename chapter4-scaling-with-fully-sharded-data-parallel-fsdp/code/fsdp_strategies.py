r"""DDP, hybrid and full sharding on one model in one run: what a rank holds, what travels, how long.

    torchrun --nproc_per_node=4 chapter4-scaling-with-fully-sharded-data-parallel-fsdp/code/fsdp_strategies.py \
        --plot chapter4-scaling-with-fully-sharded-data-parallel-fsdp/figures/strategies.svg

On GPUs:
    torchrun --nproc_per_node=8 chapter4-scaling-with-fully-sharded-data-parallel-fsdp/code/fsdp_strategies.py \
        --width 2048 --layers 12 --context 256 --batch 32

Each strategy pays for memory with traffic, and the losses are the same. The times are those of ranks
that share two cores and no network: read the other columns. Section 4.3.
"""

import argparse
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import NoReturn

import torch
import torch._dynamo  # before the group, or gloo's threads outlive it: section 3.8
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

MIB = 2**20


def build(args: argparse.Namespace, device: torch.device) -> nn.Module:
    torch.manual_seed(args.seed)
    return ResidualModel(args.width, args.layers).to(device)


def sharded(
    args: argparse.Namespace, device: torch.device, replicas: int, reshard: bool
) -> nn.Module:
    """FSDP2 on a mesh of replicas x shards; with one replica everybody has another shard."""
    n = dist.get_world_size()
    mesh = init_device_mesh(
        device.type, (replicas, n // replicas), mesh_dim_names=("replicas", "shards")
    )
    mesh = mesh if replicas > 1 else mesh["shards"]
    model = build(args, device)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    return fully_shard(model, mesh=mesh)


def strategies(
    args: argparse.Namespace, device: torch.device
) -> dict[str, Callable[[], nn.Module]]:
    n = dist.get_world_size()
    found = {
        "DDP": lambda: DistributedDataParallel(build(args, device), gradient_as_bucket_view=True)
    }
    replicas = next((d for d in range(2, n) if n % d == 0), 0)
    if replicas:
        name = f"HSDP {replicas}x{n // replicas}"
        found[name] = lambda: sharded(args, device, replicas, True)
    found["FSDP, no reshard"] = lambda: sharded(args, device, 1, False)
    found["FSDP"] = lambda: sharded(args, device, 1, True)
    return found


def predict(
    name: str, parameters: list[nn.Parameter], layers: int, in_blocks: int
) -> tuple[float, float, Counter, float]:
    """From the sizes of the tensors alone, of rank 0: bytes of state, of weights between forward and
    backward; calls; bytes received by a ring's cost."""
    n = dist.get_world_size()
    whole = [4 * p.numel() for p in parameters]  # fp32; blocks first, then the root's
    block, root = sum(whole[:in_blocks]), sum(whole[in_blocks:])
    if name == "DDP":
        return 4 * (block + root), block + root, Counter(), 2 * (n - 1) / n * (block + root)
    replicas = int(name.split()[1].split("x")[0]) if name.startswith("HSDP") else 1
    shards = n // replicas
    parts = [4 * -(-len(p) // shards) * p[0].numel() for p in parameters]  # of the fullest rank
    block_part, root_part = sum(parts[:in_blocks]), sum(parts[in_blocks:])
    gathers = 1 if name.endswith("no reshard") else 2
    held = (block if gathers == 1 else block_part) + root
    travels = (shards - 1) * (gathers * block_part + root_part + block_part + root_part)
    travels += 2 * (replicas - 1) / replicas * (block_part + root_part)
    calls = Counter({"all-gather": gathers * layers + 1, "reduce-scatter": layers + 1})
    if n == 1:
        calls = Counter()
    elif replicas > 1:
        calls["all-reduce"] = layers + 1
    return 4 * (block_part + root_part), held, calls, travels


def part_of_loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """This rank's part of the batch's mean loss: [batch, context + 1], of which every n-th is its own."""
    window = tokens[dist.get_rank() :: dist.get_world_size()]
    logits = model(window[:, :-1])
    loss = F.cross_entropy(logits, window[:, 1:].flatten(), reduction="sum")
    return loss / tokens[:, 1:].numel()


def update(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    """One optimizer step; the norm of the gradients, which AdamW would hide a wrong factor of."""
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
    optimizer.step()
    optimizer.zero_grad()
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def account(
    model: nn.Module, optimizer: torch.optim.Optimizer, tokens: torch.Tensor
) -> tuple[float, float, TorchDispatchMode, int]:
    """State, weights between forward and backward, traffic, and CommDebugMode's number of calls."""
    # CommDebugMode raises IndexError where forward calls a module twice, as DDP's does its own.
    debug = nullcontext() if isinstance(model, DistributedDataParallel) else CommDebugMode()
    with Wire() as wire, debug, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of CommDebugMode's own hooks
        loss = part_of_loss(model, tokens)
        held = sum(here(p) for p in model.parameters())
        loss.backward()
    state = sum(here(p) + here(p.grad) for p in model.parameters())
    state += sum(
        here(t) for kept in optimizer.state.values() for t in kept.values() if t.numel() > 1
    )
    optimizer.zero_grad()
    calls = (
        debug.get_total_counts() if isinstance(debug, CommDebugMode) else sum(wire.calls.values())
    )
    return state, held, wire, calls


def single_process(args: argparse.Namespace, tokens: torch.Tensor, device: torch.device) -> list:
    """Loss and gradient norm of the same steps by one process on whole batches."""
    model = build(args, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    steps = []
    for batch in tokens:
        logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits, batch[:, 1:].flatten())
        loss.backward()
        steps.append(torch.stack([loss.detach(), update(model, optimizer)]))
    return steps


def run(args: argparse.Namespace, device: torch.device) -> list[bool | None]:
    n = dist.get_world_size()
    data = read_bytes(args.data, at_least=args.context * args.batch * (args.steps + 2))
    tokens = data.unfold(0, args.context + 1, args.context)[: args.batch * args.steps]
    tokens = tokens.unflatten(0, (args.steps, args.batch)).to(device)  # [steps, batch, context + 1]
    reference = single_process(args, tokens, device)
    plain = build(args, torch.device("cpu"))
    blocks = [p for block in plain.blocks for p in block.parameters()]
    rest = [p for p in plain.parameters() if all(p is not q for q in blocks)]

    made = {name: make() for name, make in strategies(args, device).items()}
    optimizers = {m: torch.optim.AdamW(made[m].parameters(), lr=args.lr) for m in made}
    steps = {name: [] for name in made}
    seconds = {name: [] for name in made}
    for batch in tokens:
        for name, model in made.items():  # in turn, so that a slow moment hits all alike
            dist.barrier()
            start = time.perf_counter()
            loss = part_of_loss(model, batch)
            (loss * n).backward()  # gradients come out as a mean over the ranks
            norm = update(model, optimizers[name])
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
            dist.all_reduce(loss.detach_())
            steps[name].append(torch.stack([loss, norm]))

    parameters = sum(p.numel() for p in plain.parameters())
    say(f"{n} rank{'s' * (n > 1)} on {device.type}: {parameters:,} parameters")
    parts = "".join(f"{part:>20}" for part in ("state, MiB", "whole in between", "received, MiB"))
    say(f"{'':<17}{parts}{'calls':>7}{'ms of a step':>15}")
    say(f"{'strategy':<17}" + f"{'predicted':>11}{'counted':>9}" * 3 + f"{'median':>15}  quartiles")
    off = Counter()
    apart = []
    table = {}
    for name, model in made.items():
        state, held, wire, debugged = account(model, optimizers[name], tokens[0])
        expected = predict(name, [*blocks, *rest], args.layers, len(blocks))
        received = sum(wire.bytes.values())
        if name == "DDP":  # buckets, whose number is DDP's own affair
            expected[2]["all-reduce"] = wire.calls["all-reduce"]
        times = torch.tensor(seconds[name][2:])
        low, median, high = (1e3 * times.quantile(torch.tensor([0.25, 0.5, 0.75]))).tolist()
        cells = [(expected[0], state), (expected[1], held), (expected[3], received)]
        row = "".join(f"{a / MIB:>11.3f}{b / MIB:>9.3f}" for a, b in cells)
        say(f"{name:<17}{row}{sum(wire.calls.values()):>7}{median:>8.1f}  {low:.1f}-{high:.1f}")
        off["calls"] += wire.calls != expected[2]
        off["debug"] += abs(debugged - sum(wire.calls.values()))
        off["bytes"] += abs(received - expected[3]) > 1
        of_rank_0 = dist.get_rank() == 0
        off["state"] += of_rank_0 and (state, held) != expected[:2]
        apart += [(a / b - 1).abs() for a, b in zip(steps[name], reference, strict=True)]
        table[name] = (state / MIB, held / MIB, received / MIB)
    if args.plot and dist.get_rank() == 0:
        draw(table, args.plot)
    worst = torch.stack(apart).max(0).values.tolist()
    return [
        check("losses, max |ours / one process's - 1|", worst[0], 1e-5),
        check("gradient norms, max |ours / one process's - 1|", worst[1], 1e-4),
        check("strategies with other bytes on rank 0 than predicted", off["state"], 0),
        check("strategies with other calls than predicted", off["calls"], 0),
        check("calls that CommDebugMode counts otherwise", off["debug"], 0),
        check("strategies with other traffic than predicted", off["bytes"], 0),
    ]


def draw(table: dict[str, tuple[float, float, float]], path: Path) -> None:
    """Of each strategy what a rank holds and what it receives."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "strategies"  # else its names differ from run to run
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    places = torch.arange(len(table))
    labels = ("state", "weights between forward and backward", "received in a step")
    for i, label in enumerate(labels):
        axes.bar(places + (i - 1) / 4, [row[i] for row in table.values()], 0.25, label=label)
    axes.set_xticks(places, list(table))
    axes.set_ylabel("MiB on rank 0")
    axes.legend()
    figure.savefig(path, format="svg", metadata={"Date": None})


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, default="resources/corpus.txt", help="text to learn, as bytes")
    add("--context", type=int, default=64, help="bytes per window")
    add("--batch", type=int, default=9, help="windows per step, of all ranks")
    add("--width", type=int, default=160, help="size of a token's vector")
    add("--layers", type=int, default=3, help="blocks")
    add("--steps", type=int, default=8, help="optimizer steps of each strategy")
    add("--lr", type=float, default=1e-3, help="AdamW's learning rate")
    add("--seed", type=int, default=0, help="for weights")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--plot", type=Path, help="draw the table into this SVG file")
    args = parser.parse_args()
    if args.batch < int(os.environ.get("WORLD_SIZE", 1)):
        stop(f"every rank wants a window: type --batch {os.environ['WORLD_SIZE']}")
    return args


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


# Copied from rehearse_1024_ranks.Wire
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


# Copied from fsdp2_basic.here
def here(p: torch.Tensor) -> int:
    """Bytes of a parameter on this rank: of its share, or of all of it while it is whole."""
    return p.to_local().nbytes if isinstance(p, DTensor) else p.nbytes


# Copied from fsdp_from_scratch.ResidualModel
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


# Copied from fsdp_from_scratch.ResidualBlock
class ResidualBlock(nn.Module):
    """x + down(relu(up(x))): [tokens, width] to the same."""

    def __init__(self, width: int):
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu())


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


# Copied from ch01_single_gpu_baseline.synchronize
def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


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
