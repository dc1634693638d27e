"""Shards kept in bfloat16 instead of float32: at which learning rate an update still arrives.

    torchrun --nproc_per_node=2 chapter4-scaling-with-fully-sharded-data-parallel-fsdp/code/master_weights.py

On GPUs:
    torchrun --nproc_per_node=8 chapter4-scaling-with-fully-sharded-data-parallel-fsdp/code/master_weights.py --width 1024 --layers 8 --batch 32 --context 256

Products are in float32 in both, so nothing differs but the type of the shards, which is the
optimizer's too. Look at the row of the smallest rate: half the memory, and no training. Section 4.5.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

RATES = (3e-3, 3e-4, 3e-5)


def build(args: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The same numbers in both types: those that bfloat16 can hold. Gathers are cast to float32."""
    torch.manual_seed(args.seed)
    model = ResidualModel(args.width, args.layers).bfloat16().to(device, dtype)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def shards(model: nn.Module) -> torch.Tensor:
    """This rank's numbers of all parameters: [parameters / ranks]."""
    return torch.cat([p.detach().to_local().flatten() for p in model.parameters()])


def too_small(weights: torch.Tensor, update: float) -> torch.Tensor:
    """Where an update is less than half the distance to the next bfloat16 number.

    A bfloat16 number has 8 significant bits: between 2**e and 2**(e+1) they lie 2**(e-7) apart, and
    what is rounded to the nearest moves by nothing if it is moved by less than 2**(e-8).
    """
    exponent = torch.frexp(weights.float()).exponent - 1  # of |weight| = 1.m * 2**exponent
    return update < torch.ldexp(torch.ones_like(exponent, dtype=torch.float), exponent - 8)


def train(
    args: argparse.Namespace, dtype: torch.dtype, rate: float, tokens: torch.Tensor
) -> tuple[float, float, float]:
    """How far the first batch's loss falls; of the first step's updates the share lost, predicted, counted."""
    model = build(args, dtype, tokens.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0)
    losses = []
    for step, batch in enumerate(tokens):
        loss = part_of_loss(model, batch)
        (loss * dist.get_world_size()).backward()
        if step == 0:
            before = shards(model)
            moves = torch.cat([p.grad.to_local().flatten() for p in model.parameters()]) != 0
        optimizer.step()  # AdamW's first step moves each weight by the rate, whatever its gradient
        optimizer.zero_grad()
        if step == 0:
            same = (shards(model) == before)[moves].sum()
            small = too_small(before, rate)[moves].sum() * (dtype == torch.bfloat16)
            counts = torch.stack([small, same, moves.sum()]).double()
            dist.all_reduce(counts)
            losses.append(loss.detach())
    with torch.no_grad():
        losses.append(part_of_loss(model, tokens[0]))
    fall = losses[0] - losses[1]
    dist.all_reduce(fall)
    predicted, counted = (counts[:2] / counts[2]).tolist()
    return fall.item(), predicted, counted


def run(args: argparse.Namespace, device: torch.device) -> list[bool | None]:
    n = dist.get_world_size()
    data = read_bytes(args.data, at_least=args.context * args.batch * args.steps + 1)
    tokens = data.unfold(0, args.context + 1, args.context)[: args.batch * args.steps]
    tokens = tokens.unflatten(0, (args.steps, args.batch)).to(device)  # [steps, batch, context + 1]
    with torch.device("meta"):
        parameters = sum(p.numel() for p in ResidualModel(args.width, args.layers).parameters())
    say(f"{n} rank{'s' * (n > 1)} on {device.type}: {parameters:,} parameters, {args.steps} steps")
    say(f"{'':<15}{'updates lost in the first step':>31}{'loss on the first batch falls by':>36}")
    say(f"{'learning rate':<15}{'predicted':>20}{'counted':>11}{'float32':>18}{'bfloat16':>18}")
    off = []
    ratios = {}
    for rate in RATES:
        right, _, _ = train(args, torch.float32, rate, tokens)
        fall, predicted, counted = train(args, torch.bfloat16, rate, tokens)
        say(f"{rate:<15.0e}{predicted:>20.1%}{counted:>11.1%}{right:>18.3f}{fall:>18.3f}")
        off.append(abs(predicted - counted))
        ratios[rate] = fall / right
    return [
        check("share of updates lost, |counted - predicted|", max(off), 0.02),
        check(f"at {RATES[0]:.0e}, fall in bfloat16 / in float32", ratios[RATES[0]], 0.8, True),
        check(f"at {RATES[-1]:.0e}, fall in bfloat16 / in float32", ratios[RATES[-1]], 0.4),
    ]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, default="resources/corpus.txt", help="text to learn, as bytes")
    add("--context", type=int, default=64, help="bytes per window")
    add("--batch", type=int, default=12, help="windows per step, of all ranks")
    add("--width", type=int, default=64, help="size of a token's vector")
    add("--layers", type=int, default=3, help="blocks")
    add("--steps", type=int, default=40, help="optimizer steps at each rate")
    add("--seed", type=int, default=0, help="for weights")
    add("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args()
    if args.batch < int(os.environ.get("WORLD_SIZE", 1)):
        stop(f"every rank wants a window: type --batch {os.environ['WORLD_SIZE']}")
    return args


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


# Copied from fsdp_strategies.part_of_loss
def part_of_loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """This rank's part of the batch's mean loss: [batch, context + 1], of which every n-th is its own."""
    window = tokens[dist.get_rank() :: dist.get_world_size()]
    logits = model(window[:, :-1])
    loss = F.cross_entropy(logits, window[:, 1:].flatten(), reduction="sum")
    return loss / tokens[:, 1:].numel()


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
