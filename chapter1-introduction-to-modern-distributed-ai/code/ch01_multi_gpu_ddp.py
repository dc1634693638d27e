"""The first run of several processes: the baseline's training, by several ranks as if by one.

    torchrun --nproc_per_node=2 chapter1-introduction-to-modern-distributed-ai/code/ch01_multi_gpu_ddp.py
    torchrun --nproc_per_node=3 chapter1-introduction-to-modern-distributed-ai/code/ch01_multi_gpu_ddp.py --steps 6 --batch 2

On GPUs:
    torchrun --nproc_per_node=8 chapter1-introduction-to-modern-distributed-ai/code/ch01_multi_gpu_ddp.py --width 1024 --layers 12 --heads 16 --context 1024 --batch 32 --lr 3e-4 --dtype bf16

Look at the first check: the ranks' update is the update of one process that saw every window.
Then at the efficiency, and at the line below it, which says what it is worth. Section 1.6.
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
from tqdm import tqdm


def draw_global_batch(
    data: torch.Tensor, step: int, batch: int, args: argparse.Namespace
) -> tuple[torch.Tensor, torch.Tensor]:
    """The batch of all ranks, from the seed and the step alone: windows of the text, and the same
    windows one byte later, two [ranks, batch, context].
    """
    draw = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    shape = (dist.get_world_size(), batch, 1)
    starts = torch.randint(len(data) - args.context, shape, generator=draw)
    window = data[starts + torch.arange(args.context + 1)]
    return window[..., :-1], window[..., 1:]


def one_update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tokens: torch.Tensor,
    targets: torch.Tensor,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Train on a batch; under DDP, `backward` averages the gradients. Returns this rank's loss."""
    device = next(model.parameters()).device
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        logits = model(tokens.to(device))  # [batch, seq, 256]
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten().to(device))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def build(args: argparse.Namespace, device: torch.device) -> nn.Module:
    """The same model on every rank, by the same seed; DDP broadcasts rank 0's all the same."""
    torch.manual_seed(args.seed)
    return ByteLM(args.width, args.layers, args.heads, args.context).to(device)


def distance_from_one_process(
    args: argparse.Namespace, data: torch.Tensor, device: torch.device
) -> float:
    """Train a few steps by all ranks, and by each alone on the whole batch: max |difference|.

    In double precision, so that a wrong sum cannot hide behind the rounding of a right one.
    """
    rank = dist.get_rank()
    ddp_model = DistributedDataParallel(build(args, device).double())
    reference = build(args, device).double()
    ddp_optimizer = torch.optim.SGD(ddp_model.parameters(), lr=0.1, momentum=0.9)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)
    for step in range(2):
        tokens, targets = draw_global_batch(data, step, 2, args)  # a few windows show a wrong sum
        one_update(ddp_model, ddp_optimizer, tokens[rank], targets[rank])
        one_update(reference, optimizer, tokens.flatten(0, 1), targets.flatten(0, 1))
    pairs = zip(ddp_model.parameters(), reference.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def seconds_of_one_rank(
    args: argparse.Namespace, data: torch.Tensor, device: torch.device
) -> float:
    """Median seconds per step of this process by itself, on the batch of one rank."""
    model = build(args, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    seconds = []
    for step in range(6):
        start = time.perf_counter()
        tokens, targets = draw_global_batch(data, step, args.batch, args)
        one_update(model, optimizer, tokens[0], targets[0], DTYPES[args.dtype])
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])  # the first one warms up


def seconds_to_reduce(model: nn.Module) -> float:
    """Median seconds of one all-reduce of as many bytes as the model's gradients have."""
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    seconds = []
    for _ in range(10):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(flat)
        synchronize(flat.device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[3:])


def run(args: argparse.Namespace, device: torch.device) -> list[bool | None]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    data = read_bytes(args.data, at_least=20 * args.context)
    difference = distance_from_one_process(args, data, device)

    model = DistributedDataParallel(build(args, device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    losses, seconds = [], []
    for step in tqdm(range(args.steps), desc="training", disable=None if rank == 0 else True):
        start = time.perf_counter()
        tokens, targets = draw_global_batch(data, step, args.batch, args)
        loss = one_update(model, optimizer, tokens[rank], targets[rank], DTYPES[args.dtype])
        synchronize(device)
        seconds.append(time.perf_counter() - start)
        losses.append(loss)
    losses = torch.stack(losses)
    dist.all_reduce(losses, op=dist.ReduceOp.AVG)  # a rank knows only the loss of its own share
    together = statistics.median(seconds[min(3, args.steps - 1) :])
    reduce = seconds_to_reduce(model)
    dist.barrier()
    single = seconds_of_one_rank(args, data, device) if rank == 0 else math.nan
    dist.barrier()  # the others wait, so that rank 0 has the machine to itself

    count = args.batch * args.context  # tokens per step and rank
    size = sum(p.nbytes for p in model.parameters())
    say(f"{world_size} rank{'s' * (world_size > 1)} on {device.type}: {args.steps} steps")
    say(f"loss          {losses[0]:.2f} -> {losses[-1]:.2f} nats per byte, the mean over ranks")
    say(f"per step      {world_size} x {count:,} tokens in {together * 1e3:.0f} ms")
    say(f"together      {world_size * count / together:,.0f} tokens/s")
    say(f"rank 0 alone  {count / single:,.0f} tokens/s")
    say(f"all-reduce    {size / 2**20:.1f} MiB of gradients in {reduce * 1e3:.1f} ms")
    say(f"efficiency    {single / together:.0%} of {world_size} times rank 0 alone")
    predicted = single / (single + reduce)
    say(f"  predicted   {predicted:.0%}, if the all-reduce were all that DDP costs")
    cores = os.cpu_count()
    if device.type == "cpu":
        say(f"{cores} cores for {world_size} ranks: this shows that DDP is right, not fast")
    if args.json and rank == 0:
        result = {"losses": losses.tolist(), "seconds": seconds}
        result |= {"rank_0_alone": single, "all_reduce": reduce}
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return [
        check("max |DDP - one process|", difference, 1e-9),
        check("max spread of weights over ranks", max_spread(model), 0),
    ]


def max_spread(model: nn.Module) -> float:
    """Largest difference between any two ranks' copies of any weight."""
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    low, high = flat.clone(), flat.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    dist.all_reduce(high, op=dist.ReduceOp.MAX)
    return (high - low + 0 * flat).max().item()  # 0 * flat: MIN and MAX on gloo drop a NaN


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


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, default="resources/corpus.txt", help="text to learn, as bytes"
    )
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=8, help="windows of text per step and rank")
    parser.add_argument("--context", type=int, default=128, help="bytes per window")
    parser.add_argument("--width", type=int, default=128, help="size of a token's vector")
    parser.add_argument("--layers", type=int, default=4, help="transformer blocks")
    parser.add_argument("--heads", type=int, default=4, help="attention heads; divides --width")
    parser.add_argument("--lr", type=float, default=3e-3, help="AdamW's learning rate")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the matrix products")
    parser.add_argument("--seed", type=int, default=0, help="for weights and batches")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--json", type=Path, help="also write losses and seconds to this file")
    args = parser.parse_args()
    if args.width % args.heads:
        stop(f"--heads {args.heads} does not divide --width {args.width}")
    return args


@record  # so that torchrun's summary names the error
def main() -> None:
    args = parse_args()
    device = join_group(args.device)
    claims_of = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(claims_of, run(args, device))  # nobody leaves while another is at work
    dist.destroy_process_group()  # not in a `finally`: section 3.1
    sys.exit(conclude(max(claims_of, key=lambda claims: claims.count(False))))  # the worst rank's


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


# Copied from ch01_single_gpu_baseline.Block
class Block(nn.Module):
    """Attention, then a two-layer MLP, each added to what comes in."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [batch, seq, width]
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [batch, heads, seq, head_dim]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


# Copied from ch01_single_gpu_baseline.ByteLM
class ByteLM(nn.Module):
    """A decoder-only transformer (GPT-2's shape) whose tokens are bytes."""

    def __init__(self, width: int, layers: int, heads: int, context: int):
        super().__init__()
        self.context = context
        self.embed, self.position = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:  # [batch, seq] -> [batch, seq, 256]
        x = self.embed(tokens) + self.position.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


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
