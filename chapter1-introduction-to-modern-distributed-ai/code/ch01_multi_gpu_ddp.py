"""The first run of several processes: the baseline's training, by several ranks as if by one.

    torchrun --nproc_per_node=2 chapter1-introduction-to-modern-distributed-ai/code/ch01_multi_gpu_ddp.py
    torchrun --nproc_per_node=3 chapter1-introduction-to-modern-distributed-ai/code/ch01_multi_gpu_ddp.py --steps 6 --batch 2

On GPUs:
    torchrun --nproc_per_node=8 chapter1-introduction-to-modern-distributed-ai/code/ch01_multi_gpu_ddp.py --width 1024 --layers 12 --heads 16 --context 1024 --batch 32 --steps 500

Look at the first check: the ranks' update is the update of one process that saw every window.
Then at the efficiency, and at the line below it, which says what it is worth. Section 1.6.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torch._dynamo  # DDP's; before there is a group: section 3.8
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm


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


def draw_batch(
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


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, tokens: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """One update; under DDP, `backward` averages the gradients over the ranks. Returns the loss."""
    device = next(model.parameters()).device
    logits = model(tokens.to(device))  # [batch, seq, 256]
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten().to(device))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def build(args: argparse.Namespace, device: torch.device) -> ByteLM:
    """The same model on every rank, by the same seed; DDP broadcasts rank 0's all the same."""
    torch.manual_seed(args.seed)
    return ByteLM(args.width, args.layers, args.heads, args.context).to(device)


def distance_from_one_process(
    args: argparse.Namespace, data: torch.Tensor, device: torch.device
) -> float:
    """Train a few steps by all ranks, and by each alone on the whole batch: max |difference|.

    In double precision, so that a wrong sum cannot hide behind the rounding of a right one.
    """
    ranked, alone = build(args, device).double(), build(args, device).double()
    ranked = DistributedDataParallel(ranked)
    ranked_optimizer = torch.optim.SGD(ranked.parameters(), lr=0.1, momentum=0.9)
    alone_optimizer = torch.optim.SGD(alone.parameters(), lr=0.1, momentum=0.9)
    for step in range(2):
        tokens, targets = draw_batch(data, step, 2, args)  # a wrong sum shows on a few windows
        train_step(ranked, ranked_optimizer, tokens[dist.get_rank()], targets[dist.get_rank()])
        train_step(alone, alone_optimizer, tokens.flatten(0, 1), targets.flatten(0, 1))
    pairs = zip(ranked.parameters(), alone.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def seconds_alone(args: argparse.Namespace, data: torch.Tensor, device: torch.device) -> float:
    """Median seconds per step of this process by itself, on the batch of one rank."""
    model = build(args, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    seconds = []
    for step in range(6):
        start = time.perf_counter()
        tokens, targets = draw_batch(data, step, args.batch, args)
        train_step(model, optimizer, tokens[0], targets[0])
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


def run(args: argparse.Namespace, device: torch.device) -> bool:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    data = read_bytes(args.data, at_least=20 * args.context)
    difference = distance_from_one_process(args, data, device)

    model = DistributedDataParallel(build(args, device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    losses, seconds = [], []
    for step in tqdm(range(args.steps), desc="training", disable=None if rank == 0 else True):
        start = time.perf_counter()
        tokens, targets = draw_batch(data, step, args.batch, args)
        loss = train_step(model, optimizer, tokens[rank], targets[rank])
        synchronize(device)
        seconds.append(time.perf_counter() - start)
        losses.append(loss)
    losses = torch.stack(losses)
    dist.all_reduce(losses, op=dist.ReduceOp.AVG)  # a rank knows only the loss of its own share
    reduce = seconds_to_reduce(model)
    size = sum(p.nbytes for p in model.parameters())
    dist.barrier()
    if rank == 0:
        alone = seconds_alone(args, data, device)
    dist.barrier()  # the others wait, so that rank 0 has the machine to itself

    together = statistics.median(seconds[min(3, args.steps - 1) :])
    count = args.batch * args.context  # tokens per step and rank
    say(f"{world_size} rank{'s' * (world_size > 1)} on {device.type}: {args.steps} steps")
    say(f"loss          {losses[0]:.2f} -> {losses[-1]:.2f} nats per byte, the mean over ranks")
    say(f"per step      {world_size} x {count:,} tokens in {together * 1e3:.0f} ms")
    say(f"together      {world_size * count / together:,.0f} tokens/s")
    if rank == 0:
        say(f"rank 0 alone  {count / alone:,.0f} tokens/s")
        say(f"all-reduce    {size / 2**20:.1f} MiB of gradients in {reduce * 1e3:.1f} ms")
        say(f"efficiency    {alone / together:.0%} of {world_size} times rank 0 alone")
        say(
            f"  predicted   {alone / (alone + reduce):.0%}, if the all-reduce were all that DDP costs"
        )
        if args.json:
            record = {
                "losses": losses.tolist(),
                "seconds": seconds,
                "alone": alone,
                "all_reduce": reduce,
            }
            args.json.write_text(json.dumps(record, indent=1) + "\n")
    if device.type == "cpu":
        say(
            f"{os.cpu_count()} cores for {world_size} ranks: this shows that DDP is right, not fast"
        )

    same = check("max |DDP - one process|", difference, 1e-9)
    spread = max_spread(model)
    return check("max spread of weights over ranks", spread, 0.0) and same


def max_spread(model: nn.Module) -> float:
    """Largest difference between any two ranks' copies of any weight."""
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    low, high = flat.clone(), flat.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    dist.all_reduce(high, op=dist.ReduceOp.MAX)
    return (high - low).max().item()


def check(claim: str, value: float, bound: float) -> bool:
    """Print whether the worst rank keeps `value` within `bound`; all ranks get the same answer."""
    values = [0.0] * dist.get_world_size()
    dist.all_gather_object(values, value)
    held = all(v <= bound for v in values)  # false for NaN
    say(f"check: {claim} = {max(values):.3g} <= {bound:.3g}  {'ok' if held else 'FAILED'}")
    return held


def say(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def read_bytes(path: Path, at_least: int) -> torch.Tensor:
    """The file's bytes as integers from 0 to 255: [bytes]."""
    try:
        text = path.read_bytes()
    except OSError as error:
        stop(f"cannot read {path} ({error.strerror}): give a text file with --data FILE")
    if len(text) < at_least:
        stop(f"{path} has {len(text)} bytes, this run needs {at_least}: give a longer --data FILE")
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def join_group(wanted: str) -> torch.device:
    """Join the process group; return this rank's device: its own GPU where each rank has one."""
    if "RANK" not in os.environ:
        stop(f"no launcher: type  torchrun --nproc_per_node=2 {sys.argv[0]}")
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


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: stop(f"{message}: --help lists the flags")
    chapter = Path(__file__).resolve().parents[1]
    parser.add_argument(
        "--data", type=Path, default=chapter / "main.md", help="text to learn; default: the chapter"
    )
    parser.add_argument("--steps", type=positive, default=40, help="optimizer steps")
    parser.add_argument(
        "--batch", type=positive, default=8, help="windows of text per step and rank"
    )
    parser.add_argument("--context", type=positive, default=128, help="bytes per window")
    parser.add_argument("--width", type=positive, default=128, help="size of a token's vector")
    parser.add_argument("--layers", type=positive, default=4, help="transformer blocks")
    parser.add_argument(
        "--heads", type=positive, default=4, help="attention heads; divides --width"
    )
    parser.add_argument("--lr", type=float, default=3e-3, help="AdamW's learning rate")
    parser.add_argument("--seed", type=int, default=0, help="for weights and batches")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--json", type=Path, help="also write losses and seconds to this file")
    args = parser.parse_args()
    if args.width % args.heads:
        stop(f"--heads {args.heads} does not divide --width {args.width}")
    if args.json and not args.json.parent.is_dir():
        stop(f"--json {args.json}: there is no folder {args.json.parent}")
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
