"""The chapter's trainer beside Hugging Face Accelerate: same model, same batches, a step each in turn.

    torchrun --nproc_per_node=2 chapter3-distributed-training-with-pytorch-ddp/code/ddp_vs_accelerate.py

On GPUs:
    torchrun --nproc_per_node=8 chapter3-distributed-training-with-pytorch-ddp/code/ddp_vs_accelerate.py --width 1024 --layers 12 --heads 16 --context 1024 --batch 24 --steps 200

Accelerate wraps the same DistributedDataParallel, so look for its own cost in the last column, and
at the first check: both train the same weights. Model and step come from train_ddp_torchrun.py
beside it. Section 3.2.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch._dynamo  # DDP's; before there is a group: section 3.8
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from train_ddp_torchrun import (
    ByteLM,
    ShareOfBatch,
    above_zero,
    batches,
    check,
    join_group,
    learning_rate,
    positive,
    read_windows,
    say,
    stop,
    synchronize,
    train_step,
)


def build(
    args: argparse.Namespace, device: torch.device
) -> tuple[ByteLM, torch.optim.Optimizer, LambdaLR]:
    torch.manual_seed(args.seed)
    model = ByteLM(args.width, args.layers, args.heads, args.context).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95))
    return model, optimizer, LambdaLR(optimizer, lambda s: learning_rate(s, 5, args.steps))


def ours(
    args: argparse.Namespace, train: torch.Tensor, device: torch.device
) -> Iterator[nn.Module]:
    """Train as train_ddp_torchrun.py does, one step for each `next`."""
    model, optimizer, schedule = build(args, device)
    ranked = DistributedDataParallel(model, gradient_as_bucket_view=True)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    sampler = ShareOfBatch(len(train), args.batch, rank, world_size, args.seed)
    loader = DataLoader(train, batch_sampler=sampler, pin_memory=device.type != "cpu")
    for window in batches(loader, sampler, 0, args.steps):
        train_step(ranked, optimizer, window.to(device, non_blocking=True), args.batch, args.clip)
        schedule.step()
        yield model


def accelerated(
    args: argparse.Namespace, train: torch.Tensor, device: torch.device
) -> Iterator[nn.Module]:
    """The same in Accelerate's words. Left alone, it would step the schedule once for every rank."""
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    accelerator = Accelerator(
        cpu=device.type == "cpu",
        step_scheduler_with_optimizer=False,
        dataloader_config=DataLoaderConfiguration(split_batches=True),
    )
    sampler = ShareOfBatch(len(train), args.batch, 0, 1, args.seed)  # whole batches, for it to cut
    sampler.batch_size, sampler.drop_last = args.batch, True
    model, *rest = build(args, device)
    loader = DataLoader(train, batch_sampler=sampler)
    ranked, optimizer, schedule, loader = accelerator.prepare(model, *rest, loader)
    for window in batches(loader, sampler, 0, args.steps):
        logits = ranked(window[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(ranked.parameters(), args.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield model


def run(args: argparse.Namespace, device: torch.device) -> bool:
    world_size = dist.get_world_size()
    if args.batch % world_size:
        stop(
            f"{world_size} ranks, and Accelerate deals equal shares: type --batch {world_size * 6}"
        )
    train, _, _ = read_windows(args)
    runs = {"ours": ours(args, train, device), "accelerate": accelerated(args, train, device)}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    models = {}
    for step in range(args.steps):
        for name in list(runs)[:: 1 if step % 2 else -1]:  # who goes first takes turns too
            dist.barrier()
            start = time.perf_counter()
            models[name] = next(runs[name])
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    pairs = zip(*(model.parameters() for model in models.values()), strict=True)
    apart = torch.stack([(a - b).abs().max() for a, b in pairs]).max().item()

    tokens, warm = args.batch * args.context, min(5, args.steps - 1)
    ranks = f"{world_size} rank{'s' * (world_size > 1)}"
    say(f"{ranks} on {device.type}: {args.steps} steps each, the first {warm} to warm up")
    say(f"{'':<12}{'tokens/s':>10}   quartiles{'':<10}{'ms per step':>12}")
    for name, times in seconds.items():
        low, middle, high = statistics.quantiles(times[warm:], n=4)
        between = f"[{tokens / high:,.0f} .. {tokens / low:,.0f}]"
        say(f"{name:<12}{tokens / middle:>10,.0f}   {between:<19}{middle * 1e3:>12.1f}")
    ratios = [b / a for a, b in zip(*(times[warm:] for times in seconds.values()), strict=True)]
    draw = random.Random(args.seed)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(1000))
    low, high = medians[25], medians[974]
    say(
        f"accelerate / ours, time of a step: {statistics.median(ratios):.3f}  [{low:.3f} .. {high:.3f}]"
    )
    if args.json and dist.get_rank() == 0:
        args.json.write_text(json.dumps(seconds, indent=1) + "\n")
    held = check("max |weight - Accelerate's| after the last step", apart, 1e-4)
    return check("our time over its, lower end of the 95 % interval", 1 / high, 1) and held


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: stop(f"{message}: --help lists the flags")
    chapter = Path(__file__).resolve().parents[1]
    parser.add_argument(
        "--data", type=Path, default=chapter / "main.md", help="text to learn; default: the chapter"
    )
    parser.add_argument("--steps", type=positive, default=40, help="optimizer steps of each")
    parser.add_argument("--batch", type=positive, default=12, help="windows per step, of all ranks")
    parser.add_argument("--context", type=positive, default=128, help="bytes per window")
    parser.add_argument("--width", type=positive, default=128, help="size of a token's vector")
    parser.add_argument("--layers", type=positive, default=2, help="transformer blocks")
    parser.add_argument("--heads", type=positive, default=4, help="attention heads")
    parser.add_argument("--lr", type=above_zero, default=1e-3, help="AdamW's peak learning rate")
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of a gradient")
    parser.add_argument("--seed", type=int, default=0, help="for weights and shuffling")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--json", type=Path, help="write the seconds of all steps to this file")
    args = parser.parse_args()
    if args.width % (2 * args.heads):
        stop(f"--width {args.width} is no multiple of 2 x --heads {args.heads}")
    if args.steps < 7:
        stop(f"--steps {args.steps}: type --steps 7 or more")
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
    raise SystemExit(not held)


if __name__ == "__main__":
    main()
