"""fully_shard block by block: what each rank holds, when a block is whole, and what comes out as a gradient.

    torchrun --nproc_per_node=4 chapter4-scaling-with-fully-sharded-data-parallel-fsdp/code/fsdp2_basic.py

On GPUs:
    torchrun --nproc_per_node=8 chapter4-scaling-with-fully-sharded-data-parallel-fsdp/code/fsdp2_basic.py --width 1024 --layers 8 --batch 16 --context 256

The first table is who has which rows; no rank ever has all. The second is the one choice that
fully_shard leaves to you: what stays whole between forward and backward. Section 4.1.
"""

import argparse
import os
import sys
from collections import Counter
from typing import NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

MIB = 2**20


def build(args: argparse.Namespace, reshard: bool | int | None, device: torch.device) -> nn.Module:
    """The model made of nothing (meta), sharded, and only then filled: no rank ever holds it whole."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    with torch.device("meta"):
        model = ResidualModel(args.width, args.layers).double()
    for block in model.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    for_root = reshard if isinstance(reshard, bool) else None
    fully_shard(model, mesh=mesh, reshard_after_forward=for_root)
    model.to_empty(device=device)
    for number, p in enumerate(model.parameters()):
        whole = first_weights(p.shape, args.seed + number).to(device)
        p.data.copy_(distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None))
    return model


def first_weights(shape: torch.Size, seed: int) -> torch.Tensor:
    """A tensor's first values, the same on every rank; biases too, for a zero would hide mistakes."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw, dtype=torch.float64) / shape[-1] ** 0.5


def reference(args: argparse.Namespace, device: torch.device) -> nn.Module:
    model = ResidualModel(args.width, args.layers).double()
    for number, p in enumerate(model.parameters()):
        p.data.copy_(first_weights(p.shape, args.seed + number))
    return model.to(device)


def rows_of_each_rank(model: nn.Module) -> list[list[int]]:
    """Of each parameter the number of rows that each rank has."""
    rows = [p.to_local().shape[0] for p in model.parameters()]
    of_ranks = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_ranks, rows)
    return [list(of_parameter) for of_parameter in zip(*of_ranks, strict=True)]


def predicted_rows(rows: int, n: int) -> list[int]:
    """Chunks of equal size as long as there are rows: the last ranks may get fewer, or none."""
    chunk = -(-rows // n)
    return [max(0, min(chunk, rows - rank * chunk)) for rank in range(n)]


def one_step(
    model: nn.Module, tokens: torch.Tensor, of_batch: int
) -> tuple[Counter, Counter, int, torch.Tensor]:
    """Collectives of forward and of backward; bytes of weights here in between; the loss's part."""
    with Collectives() as forward:
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum")
        loss = loss / of_batch  # of the whole batch's mean
    held = sum(here(p) for p in model.parameters())
    with Collectives() as backward:
        (loss * dist.get_world_size()).backward()  # FSDP averages; this wants the sum
    return forward.calls, backward.calls, held, loss.detach()


def here(p: torch.Tensor) -> int:
    """Bytes of a parameter on this rank: of its share, or of all of it while it is whole."""
    return p.to_local().nbytes if isinstance(p, DTensor) else p.nbytes


def choices(n: int) -> list[bool | int | None]:
    """None is the default. A number is a divisor of n, neither 1 nor n: so many ranks share a copy."""
    between = [d for d in range(2, n) if n % d == 0]
    return [None, True, *between[:1], False]


def run(args: argparse.Namespace, device: torch.device) -> list[bool | None]:
    rank = dist.get_rank()
    n = dist.get_world_size()
    model = build(args, None, device)
    parameters = sum(p.numel() for p in model.parameters())
    say(f"{n} rank{'s' * (n > 1)} on {device.type}: {parameters:,} parameters")
    say(f"{'parameter':<20}{'shape':>14}   rows on each rank")
    wrong = 0
    for (name, p), rows in zip(model.named_parameters(), rows_of_each_rank(model), strict=True):
        wrong += rows != predicted_rows(len(p), n)
        if name.startswith(("embed", "head", "blocks.0")):
            say(f"{name:<20}{'x'.join(map(str, p.shape)):>14}   {', '.join(map(str, rows))}")

    draw = torch.Generator().manual_seed(args.seed)
    tokens = torch.randint(257, (args.batch, args.context + 1), generator=draw).to(device)
    of_batch = tokens[:, 1:].numel()
    single = reference(args, device)
    logits = single(tokens[:, :-1])
    true_loss = F.cross_entropy(logits, tokens[:, 1:].flatten())
    true_loss.backward()

    say(f"{'':<22}{'weights here in between, MiB':^30}{'all-gathers':>13}{'reduce-':>10}")
    say(f"{'reshard_after_forward':<22}{'predicted':>15}{'counted':>15}{'':>13}{'scatters':>10}")
    apart, from_loss, wrong_bytes, wrong_calls = [], [], 0, 0
    share = tokens.tensor_split(n)[rank]
    for reshard in choices(n):
        model = build(args, reshard, device)
        forward, backward, held, loss = one_step(model, share, of_batch)
        again = backward["c10d::_allgather_base_"]
        gathers = forward["c10d::_allgather_base_"] + again
        scatters = backward["c10d::_reduce_scatter_base_"]
        blocks = [p for block in single.blocks for p in block.parameters()]
        rest = [p for p in single.parameters() if all(p is not q for q in blocks)]
        expected = predict(reshard, blocks, rest, rank, n)
        row = f"{reshard!s:<22}{expected / MIB:>15.3f}{held / MIB:>15.3f}"
        say(f"{row}{gathers:>13}{scatters:>10}")
        wrong_bytes += abs(held - expected)
        kept = reshard is False
        expected_calls = (len(model.blocks) + 1) + (0 if kept else len(model.blocks))
        expected_calls += reshard is True  # then the root is gathered again too
        wrong_calls += abs(gathers - expected_calls * (n > 1))
        dist.all_reduce(loss)
        from_loss.append((loss - true_loss).abs())
        for p, q in zip(model.parameters(), single.parameters(), strict=True):
            mine = distribute_tensor(q.grad, p.device_mesh, p.placements, src_data_rank=None)
            if p.grad.to_local().numel():
                difference = (p.grad.to_local() - mine.to_local()).abs().max()
                apart.append(difference / q.grad.abs().max())
    return [
        check("parameters whose rows lie otherwise than predicted", wrong, 0),
        check("weights in between, bytes off", wrong_bytes, 0),
        check("all-gathers, off in all", wrong_calls, 0),
        check("in float64, max |loss - one process's|", max(from_loss).item(), 1e-12),
        check("in float64, max |gradient - one process's|", max(apart).item(), 1e-12),
    ]


def predict(reshard: bool | int | None, blocks: list, rest: list, rank: int, n: int) -> int:
    """Bytes of weights on this rank between forward and backward."""

    def shared(parameters: list, by: int) -> int:
        return sum(predicted_rows(len(p), by)[rank % by] * p[0].nbytes for p in parameters)

    in_blocks = {False: 1, None: n, True: n}.get(reshard, reshard)
    return shared(blocks, in_blocks) + shared(rest, n if reshard is True else 1)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=66, help="of a token's vector")
    parser.add_argument("--layers", type=int, default=3, help="blocks")
    parser.add_argument("--batch", type=int, default=9, help="sequences per step, of all ranks")
    parser.add_argument("--context", type=int, default=32, help="tokens per sequence")
    parser.add_argument("--seed", type=int, default=0, help="for weights and tokens")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    return parser.parse_args()


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


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


# Copied from fsdp_checkpointing.Collectives
class Collectives(TorchDispatchMode):
    """Counts the calls to the process group, by name."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self.calls[function.name()] += 1
        return function(*args, **(kwargs or {}))


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
