"""The chapter's trainer beside Hugging Face Accelerate: same model, same batches, a step each in turn.

    torchrun --nproc_per_node=2 chapter3-distributed-training-with-pytorch-ddp/code/ddp_vs_accelerate.py

On GPUs:
    torchrun --nproc_per_node=8 chapter3-distributed-training-with-pytorch-ddp/code/ddp_vs_accelerate.py --width 1024 --layers 12 --heads 16 --context 1024 --batch 24 --lr 3e-4 --steps 100

Accelerate wraps the same DistributedDataParallel. So look at the first claim: both train the same
weights. Then for its own cost in the last column. Section 3.2.
"""

import argparse
import json
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import torch
import torch._dynamo  # before the group, or gloo's threads outlive it: section 3.8
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Sampler


def build(
    args: argparse.Namespace, device: torch.device
) -> tuple[nn.Module, torch.optim.Optimizer, LambdaLR]:
    torch.manual_seed(args.seed)
    model = ByteLlama(args.width, args.layers, args.heads, args.context).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95))
    return model, optimizer, LambdaLR(optimizer, lambda s: learning_rate(s, 5, args.steps))


def by_hand(
    args: argparse.Namespace, train: torch.Tensor, device: torch.device
) -> Iterator[nn.Module]:
    """Train as train_ddp_torchrun.py does, one step for each `next`."""
    model, optimizer, schedule = build(args, device)
    ddp_model = DistributedDataParallel(
        model, forward_sync_buffers=False, gradient_as_bucket_view=True
    )
    sampler = ShareOfBatch(
        len(train), args.batch, dist.get_rank(), dist.get_world_size(), args.seed
    )
    on_gpu = device.type != "cpu"
    loader = DataLoader(train, batch_size=None, sampler=sampler, pin_memory=on_gpu)
    for window in batches(loader, sampler, 0, args.steps):
        window = window.to(device, non_blocking=True)
        train_step(ddp_model, optimizer, window, args.batch, args.clip)
        schedule.step()
        yield model


def by_accelerate(
    args: argparse.Namespace, train: torch.Tensor, device: torch.device
) -> Iterator[nn.Module]:
    """The same in Accelerate's words. Without split_batches it would take a batch for each rank,
    and step the schedule as often.
    """
    config = DataLoaderConfiguration(split_batches=True)
    accelerator = Accelerator(cpu=device.type == "cpu", dataloader_config=config)
    sampler = ShareOfBatch(len(train), args.batch, 0, 1, args.seed)  # whole batches, for it to cut
    sampler.batch_size = args.batch
    sampler.drop_last = True
    model, optimizer, schedule = build(args, device)
    loader = DataLoader(train, batch_sampler=sampler)
    ddp_model, optimizer, schedule, loader = accelerator.prepare(model, optimizer, schedule, loader)
    for window in batches(loader, sampler, 0, args.steps):
        logits = ddp_model(window[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(ddp_model.parameters(), args.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield model


def run(args: argparse.Namespace, device: torch.device) -> list[bool | None]:
    world_size = dist.get_world_size()
    train, _ = read_windows(args)
    runs = {"by hand": by_hand(args, train, device)}
    runs["accelerate"] = by_accelerate(args, train, device)
    models = {}
    times = torch.zeros(len(runs), args.steps)  # seconds
    for step in range(args.steps):
        for row in (0, 1) if step % 2 else (1, 0):  # who goes first takes turns too
            name = list(runs)[row]
            dist.barrier()
            start = time.perf_counter()
            models[name] = next(runs[name])
            synchronize(device)
            times[row, step] = time.perf_counter() - start
    pairs = zip(*(model.parameters() for model in models.values()), strict=True)
    difference = max((a - b).abs().max().item() for a, b in pairs)

    times = times.to(device)
    dist.all_reduce(times, op=dist.ReduceOp.MAX)  # a step takes as long as on the slowest rank
    seconds = dict(zip(runs, times.tolist(), strict=True))
    warm = min(5, args.steps - 1)
    tokens = args.batch * args.context
    ranks = f"{world_size} rank{'s' * (world_size > 1)}"
    say(f"{ranks} on {device.type}: {args.steps} steps each, the first {warm} to warm up")
    say(f"{'':<12}{'tokens/s':>10}   quartiles{'':<10}{'ms per step':>12}")
    for name, row in seconds.items():
        low, median, high = quartiles(row[warm:])
        spread = f"[{tokens / high:,.0f} .. {tokens / low:,.0f}]"
        say(f"{name:<12}{tokens / median:>10,.0f}   {spread:<19}{median * 1e3:>12.1f}")
    ratios = (times[1] / times[0])[warm:].tolist()
    ratio = statistics.median(ratios)
    draw = random.Random(args.seed)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(1000))
    spread = f"[{medians[25]:.3f} .. {medians[974]:.3f}], 95 % of a bootstrap"
    say(f"accelerate / by hand, time of a step: {ratio:.3f}  {spread}")
    if args.json and dist.get_rank() == 0:
        args.json.write_text(json.dumps(seconds, indent=1) + "\n")
    return [
        check("max |weight - Accelerate's| after the last step", difference, 1e-4),
        expect("part of a step that Accelerate adds", ratio - 1, 0.05, args.strict),
    ]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, default="resources/corpus.txt", help="text to learn, as bytes"
    )
    parser.add_argument("--steps", type=int, default=25, help="optimizer steps of each")
    parser.add_argument("--batch", type=int, default=12, help="windows per step, of all ranks")
    parser.add_argument("--context", type=int, default=128, help="bytes per window")
    parser.add_argument("--width", type=int, default=128, help="size of a token's vector")
    parser.add_argument("--layers", type=int, default=2, help="transformer blocks")
    parser.add_argument("--heads", type=int, default=4, help="attention heads")
    parser.add_argument("--lr", type=float, default=1e-3, help="AdamW's peak learning rate")
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of a gradient")
    parser.add_argument("--seed", type=int, default=0, help="for weights and shuffling")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--json", type=Path, help="write the seconds of all steps to this file")
    parser.add_argument(
        "--strict", action="store_true", help="exit 1 if an `expect:` line does not hold"
    )
    return parser.parse_args()


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


# Copied from train_ddp_torchrun.LlamaBlock
class LlamaBlock(nn.Module):
    """Llama's: rotary attention, then SwiGLU, each behind an RMSNorm and added to what comes in."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        hidden = (8 * width // 3 + 7) // 8 * 8  # 16-bit matrix units want multiples of 8
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))  # x: [batch, seq, width]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [batch, heads, seq, head_dim]
        q, k = rotate(q, rotation), rotate(k, rotation)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.out(mixed.transpose(1, 2).flatten(2)))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return x + self.dropout(self.down(F.silu(gate) * up))


# Copied from train_ddp_torchrun.ByteLlama
class ByteLlama(nn.Module):
    """A small decoder-only transformer of Llama's shape (arXiv:2302.13971) whose tokens are bytes."""

    def __init__(self, width: int, layers: int, heads: int, context: int, dropout: float = 0.0):
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.blocks = nn.ModuleList(LlamaBlock(width, heads, dropout) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, 256, bias=False)
        pairs = width // heads // 2  # of a head's dimensions; each turns at its own speed
        angle = torch.outer(torch.arange(context), 10_000.0 ** -(torch.arange(pairs) / pairs))
        self.register_buffer("rotation", torch.stack([angle.cos(), angle.sin()]), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:  # [batch, seq] -> [batch, seq, 256]
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, self.rotation[:, : tokens.shape[1]])
        return self.head(self.norm(x))


# Copied from train_ddp_torchrun.rotate
def rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Turn each pair (x[i], x[i + d/2]) by its position's angle: RoPE (arXiv:2104.09864)."""
    cos, sin = rotation
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


# Copied from train_ddp_torchrun.ShareOfBatch
class ShareOfBatch(Sampler[list[int]]):
    """This rank's share of each global batch; the batches are the same at any world size."""

    def __init__(self, samples: int, batch: int, rank: int, world_size: int, seed: int):
        self.samples = samples
        self.batch = batch
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int, done: int = 0) -> None:
        """Choose the epoch's shuffle; `done` batches of it are skipped, for a resumed run."""
        self.epoch = epoch
        self.done = done

    def __len__(self) -> int:
        return self.samples // self.batch - self.done

    def __iter__(self) -> Iterator[list[int]]:
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.samples, generator=draw)  # equal on all ranks
        for step in range(self.done, self.samples // self.batch):
            whole = order[step * self.batch : (step + 1) * self.batch]
            yield whole[self.rank :: self.world_size].tolist()  # sizes may differ by one


# Copied from train_ddp_torchrun.batches
def batches(
    loader: DataLoader, sampler: ShareOfBatch, step: int, steps: int
) -> Iterator[torch.Tensor]:
    """This rank's windows of each step, [share, context + 1], from `step` on, over the epochs."""
    per_epoch = sampler.samples // sampler.batch
    while step < steps:
        sampler.set_epoch(step // per_epoch, done=step % per_epoch)
        for window in loader:
            yield window
            step += 1
            if step == steps:
                return


# Copied from train_ddp_torchrun.read_windows
def read_windows(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows to train on and, from the last tenth, to hold out: two [windows, context + 1].

    A window's last byte is the next one's first.
    """
    data = read_bytes(args.data, at_least=2 * (args.batch + 5) * args.context)
    split = len(data) * 9 // 10
    size = args.context + 1
    return data[:split].unfold(0, size, args.context), data[split:].unfold(0, size, args.context)


# Copied from train_ddp_torchrun.train_step
def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    window: torch.Tensor,
    batch: int,
    clip: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One update; returns this rank's part of the batch's mean loss, and the gradient's norm."""
    logits = model(window[:, :-1])  # [share, context, 256]
    total = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten(), reduction="sum")
    loss = total / (batch * logits.shape[1])  # over the tokens of the whole batch
    (loss * dist.get_world_size()).backward()  # as DDP divides the ranks' sum by their number
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip)  # averaged by now: equal on all ranks
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach(), norm


# Copied from train_ddp_torchrun.learning_rate
def learning_rate(step: int, warmup: int, steps: int) -> float:
    """Share of the peak: a line up, then half a cosine down to a tenth (arXiv:1608.03983)."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(steps - warmup, 1))


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


# Copied from ch01_single_gpu_baseline.quartiles
def quartiles(values: list[float]) -> list[float]:
    """First quartile, median and third quartile."""
    return torch.tensor(values).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()


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
