"""Train the book model on any grid of ranks: replicas x shards x tensor parallel, one loss curve.

    torchrun --nproc_per_node=2 chapter8-distributed-ai-training-in-action/code/train.py
    torchrun --nproc_per_node=4 chapter8-distributed-ai-training-in-action/code/train.py --dp-shard 2 --tp 2 --layers 2 --heads 4 --kv-heads 2 --batch 4 --out runs/ch08_grid --save-every 6 --resume

On GPUs:
    torchrun --nproc_per_node=8 chapter8-distributed-ai-training-in-action/code/train.py --dp-shard -1 --compile --width 2048 --layers 16 --heads 16 --kv-heads 8 --hidden 8192 --batch 64 --lr 6e-4

Without flags every rank has the whole model (DDP). --dp-shard -1 shards it over all ranks (FSDP2),
--dp-shard 8 over groups of 8 (hybrid), --tp 2 splits each product. The batch is that of all ranks
together, so the losses do not depend on the layout. SIGTERM or SIGUSR1 at any rank saves and ends
all with 128 + its number: with 0 a scheduler would take the job for finished. --resume goes on, in
any layout. `make book-model` trains checkpoint/ by it. Sections 8.2 to 8.4.
"""

import argparse
import importlib.util
import json
import math
import os
import re
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import NoReturn

import torch
import torch._dynamo  # before the group, or gloo's threads outlive it: section 3.8
import torch.distributed as dist
from checkpoints import newest_checkpoint
from data import shards_of
from launch import check, conclude, join_group, say, stop
from metrics import peak_flops
from model import Config, flops_of_a_token
from optimizer import share_of_peak
from prepare_data import TEXTS
from torch.distributed.elastic.multiprocessing.errors import record
from trainer import DTYPES, SIGNALS, SIZES, Trainer, held_out_loss, update


def train(trainer: Trainer) -> signal.Signals | None:
    """Train to the last step, or until a rank has got a signal, which is returned."""
    args = trainer.args
    flops = flops_of_a_token(trainer.config)
    peak, source = peak_flops(trainer.device, trainer.dtype)
    say(f"peak          {peak / 1e9:,.0f} GFLOP/s: {source}")
    head = f"{'step':>6}{'learning rate':>15}{'gradient norm':>15}{'loss':>8}"
    say(f"{head}{'tokens/s':>10}{'MFU':>8}{'slowest rank':>15}")
    parts: list[torch.Tensor] = []  # since the last line: this rank's parts of the losses
    norms: list[torch.Tensor] = []
    seconds: list[float] = []
    stopped = None
    windows = iter(trainer.loader)
    start = time.perf_counter()
    while trainer.step < args.steps and not stopped:
        begin = time.perf_counter()
        rate = args.lr * share_of_peak(args.schedule, trainer.step, args.warmup, args.steps)
        for group in (group for o in trainer.optimizers for group in o.param_groups):
            group["lr"] = rate
        with trainer.busy():
            window = next(windows).to(trainer.device, non_blocking=True)
        loss, norm = update(
            trainer.model, trainer.optimizers, window, args, trainer.ranks, trainer.busy
        )
        parts.append(loss)
        norms.append(norm)
        seconds.append(time.perf_counter() - begin)
        trainer.step += 1
        saving = args.out and (trainer.step == args.steps or trainer.step % args.save_every == 0)
        if not (saving or trainer.step in (1, args.steps) or trainer.step % args.log_every == 0):
            continue  # without waiting for the device
        losses, counts, busy_s = trainer.pool(parts)
        elapsed_s = time.perf_counter() - start
        tokens_per_s = len(parts) * args.batch * args.context / elapsed_s
        refuse_not_finite(trainer, losses, norms, parts)
        trainer.losses += losses
        mfu = tokens_per_s * flops / peak
        line = f"{trainer.step:>6}{rate:>15.6f}{norm.item():>15.3f}{losses[-1]:>8.3f}"
        slowest_s = max(busy_s)
        slowest = busy_s.index(slowest_s)
        median_s = statistics.median_low(busy_s)
        on_cpu = trainer.device.type == "cpu"  # elsewhere the host is ahead of its device
        step_s = statistics.median(seconds) if on_cpu else elapsed_s / len(parts)
        slow = f"{slowest} ({slowest_s / median_s:.1f}x)"
        say(f"{line}{tokens_per_s:>10,.0f}{mfu:>8.1%}{slow:>15}")
        trainer.log(
            event="step", step=trainer.step, loss=losses[-1], lr=rate, norm=norm.item(),
            tokens_per_s=tokens_per_s, mfu=mfu, step_s=step_s,
            slowest_rank=slowest, slowest_s=slowest_s, median_s=median_s,
        )  # fmt: skip
        for values in (parts, norms, seconds):
            values.clear()
        if any(counts) and trainer.step < args.steps:
            stopped = SIGNALS[counts.index(max(counts))]
        if saving or (stopped and args.out):
            trainer.save(wait=args.sync_save or trainer.step == args.steps or bool(stopped))
        start = time.perf_counter()
    windows.close()  # and with it the loader's processes
    return stopped


def refuse_not_finite(
    trainer: Trainer, losses: list[float], norms: list[torch.Tensor], parts: list[torch.Tensor]
) -> None:
    """End before anything is saved that is not a number; the last checkpoint stays."""
    pairs = list(zip(losses, torch.stack(norms).tolist(), strict=True))
    wrong = [i for i, pair in enumerate(pairs) if not all(map(math.isfinite, pair))]
    if not wrong:
        return
    own = [math.isfinite(part) for part in torch.stack(parts).tolist()]
    finite = [None] * dist.get_world_size()
    dist.all_gather_object(finite, own[wrong[0]])
    step = trainer.step - len(parts) + wrong[0] + 1
    _, norm = pairs[wrong[0]]
    reason = f"step {step}: the gradient's norm is {norm}, and the loss of each rank is finite"
    if not all(finite):
        reason = f"step {step}: the loss of rank {finite.index(False)} is not finite"
    if trainer.checkpoints:
        trainer.checkpoints.settle()
    if dist.get_rank() > 0:
        os._exit(1)
    leave(trainer, reason)


def leave(trainer: Trainer, reason: str) -> NoReturn:
    """End this rank with one line and with its checkpoints as they are; another may be dead."""
    trainer.log.of_any_rank(event="stopped", reason=reason, step=trainer.step)
    sys.stderr.write(reason + "\n")
    os._exit(1)


def lost(error: RuntimeError) -> str | None:
    """What gloo or NCCL say when a collective waits for a rank that is dead, frozen or cut off."""
    text = str(error)
    words = r"Connection \w+ by peer|Timed out waiting \d+ms|Broken pipe|Socket closed"
    found = re.search(rf"{words}|Application timeout", text)
    if found:
        return found[0]
    return text.partition("\n")[0] if isinstance(error, dist.DistError) else None


def leave_when_told(
    trainer: Trainer, stopped: signal.Signals, claims: list[bool | None]
) -> NoReturn:
    """All ranks have saved; they end together, as chapter 3's do."""
    trainer.log(event="stopped", reason=stopped.name, step=trainer.step)
    say(f"stopped by {stopped.name} at step {trainer.step}")
    dist.barrier()
    os._exit(128 + stopped if all(claims) else 1)


def run(args: argparse.Namespace, device: torch.device) -> list[bool | None]:
    trainer = Trainer(args, device)
    n = dist.get_world_size()
    ranks = f"{n} rank{'s' * (n > 1)} on {device.type}"
    say(f"{ranks}, {trainer.layout}: {trainer.parameters:,} parameters, {trainer.dtype}")
    say(f"batch         {args.batch} x {args.context} tokens for all ranks together")
    say(f"epoch         {len(trainer.loader.windows)} windows, {trainer.loader.per_epoch} steps")
    if args.resume:
        trainer.find_start()
    pids = [0] * n
    dist.all_gather_object(pids, os.getpid())
    trainer.log(event="start", step=trainer.step, world_size=n, pids=pids, layout=trainer.layout)
    try:
        stopped = train(trainer)
        if trainer.checkpoints:
            trainer.checkpoints.settle()
    except RuntimeError as error:
        why = lost(error)
        if why is None:
            raise
        leave(trainer, f"rank {dist.get_rank()}: lost another at step {trainer.step + 1} ({why})")
    missing = 0
    if args.out and dist.get_rank() == 0:
        newest = newest_checkpoint(args.out)
        missing = trainer.step - (int(newest.name[5:]) if newest else 0)
    claims = [check("steps that the newest checkpoint lacks", missing, 0)] if args.out else []
    if stopped:
        leave_when_told(trainer, stopped, claims)
    trainer.log(event="end", reason="last step", step=trainer.step)
    held_out = {kind: held_out_loss(trainer, tokens) for kind, tokens in trainer.held_out.items()}
    shards = {shard.get("kind", "text"): shard for shard in shards_of(trainer.meta, "held_out")}
    for kind, loss in held_out.items():
        bits = loss / math.log(2) * shards[kind]["tokens"] / shards[kind]["bytes"]
        say(f"held out      {loss:.3f} nats per token, {bits:.2f} bits per byte of {kind}")
    tokens = sum(shard["tokens"] for shard in shards.values())
    mean = sum(loss * shards[kind]["tokens"] / tokens for kind, loss in held_out.items())
    if args.json and dist.get_rank() == 0:
        found = {"losses": trainer.losses, "held_out": mean, "held_out_of": held_out}
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    guess = math.log(trainer.config.vocabulary)
    if args.steps > args.warmup:  # else it has learned hardly anything
        claims += [
            check("loss of the last step, and that of guessing", trainer.losses[-1], guess),
            check("held-out loss, and that of guessing", mean, guess),
        ]
    return [*claims, check("steps without a loss", abs(args.steps - len(trainer.losses)), 0)]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("data").add_argument
    add("--data", type=Path, default="runs/ch08_data", help="prepare_data.py's folder")
    add("--corpus", type=Path, nargs="+", default=TEXTS, help="texts, if there is no --data")
    add("--vocabulary", type=int, default=2048, help="tokens, if there is no --data")
    add("--batch", type=int, default=8, help="windows per step, of all ranks")
    add("--held-out", type=int, default=8, help="windows of each kind to measure on; 0: all")
    add("--workers", type=int, default=0, help="processes of each rank that read ahead")
    add = parser.add_argument_group("model").add_argument
    for name in SIZES:
        default = getattr(Config, name)
        add(f"--{name.replace('_', '-')}", type=int, default=default, help=f"default: {default}")
    add = parser.add_argument_group("layout: the three make the number of ranks").add_argument
    add("--dp-replicate", type=int, default=-1, help="copies of the model; -1: what is left")
    add("--dp-shard", type=int, default=1, help="ranks that share a copy's tensors (FSDP2)")
    add("--tp", type=int, default=1, help="ranks that share each product, beside each other")
    add("--no-sequence-parallel", action="store_true", help="with --tp: norms whole on each")
    add("--dtype", choices=DTYPES, default="auto", help="of products; auto: bfloat16 on a GPU")
    add("--compile", action="store_true", help="compile each layer")
    add("--checkpoint-activations", action="store_true", help="run each layer again in backward")
    add("--accumulate", type=int, default=1, help="parts of a rank's share, one after the other")
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=int, default=12, help="optimizer steps")
    add("--optimizer", choices=("adamw", "muon"), default="adamw", help="muon: for the matrices")
    add("--schedule", choices=("cosine", "wsd"), default="cosine", help="of the learning rate")
    add("--warmup", type=int, default=4, help="steps to the peak rate")
    add("--lr", type=float, default=3e-3, help="peak learning rate")
    add("--clip", type=float, default=1.0, help="largest norm of a gradient")
    add("--weight-decay", type=float, default=0.1, help="of matrices, times the learning rate")
    add("--seed", type=int, default=0, help="for weights and shuffling")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--timeout", type=float, default=300, help="seconds that a collective may wait")
    add = parser.add_argument_group("output").add_argument
    add("--log-every", type=int, default=4, help="steps between two lines, and looks at signals")
    add("--out", type=Path, help="folder for checkpoints and log.jsonl; default: save nothing")
    add("--save-every", type=int, default=100, help="steps between checkpoints")
    add("--sync-save", action="store_true", help="wait for the disk at each checkpoint")
    add("--keep", type=int, default=3, help="checkpoints to keep, the newest")
    add("--resume", action="store_true", help="go on from --out, if there is a checkpoint")
    add("--json", type=Path, help="write the losses to this file")
    add("--tensorboard", type=Path, help="folder for TensorBoard; needs the package")
    args = parser.parse_args()
    for name in (*SIZES, "batch", "accumulate", "steps", "log_every", "save_every", "keep"):
        if getattr(args, name) < 1:
            stop(f"--{name.replace('_', '-')} {getattr(args, name)}: type 1 or more")
    if args.width % (2 * args.heads) or args.heads % args.kv_heads:
        stop(f"--width must divide by 2 x --heads, and --heads by --kv-heads {args.kv_heads}")
    lacking = [path for path in args.corpus if not path.is_file()]
    if not args.data.is_dir() and lacking:
        stop(f"neither --data {args.data} nor --corpus {lacking[0]} is there")
    if args.resume and not args.out:
        stop("--resume wants a folder: type --out DIR")
    if args.out and newest_checkpoint(args.out) and not args.resume:
        stop(f"{args.out} has a checkpoint: type --resume to go on, or another --out")
    if args.compile and args.tp != 1:  # seen with torch 2.13: right losses, other gradients
        stop("--compile beside --tp gives wrong gradients in PyTorch 2.13: leave one out")
    if args.tensorboard and not importlib.util.find_spec("tensorboard"):
        stop("--tensorboard needs a package: pip install tensorboard")
    return args


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


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


if __name__ == "__main__":
    main()
