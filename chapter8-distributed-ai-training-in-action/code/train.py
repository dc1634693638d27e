"""Train the book model on any number of ranks, whole on each (DDP) or sharded over them (FSDP2).

    torchrun --nproc_per_node=2 chapter8-distributed-ai-training-in-action/code/train.py
    torchrun --nproc_per_node=2 chapter8-distributed-ai-training-in-action/code/train.py --strategy fsdp --steps 12 --out runs/ch08_fsdp --save-every 6 --resume

On GPUs:
    torchrun --nproc_per_node=8 chapter8-distributed-ai-training-in-action/code/train.py --strategy fsdp --width 1024 --layers 12 --heads 16 --kv-heads 4 --hidden 2816 --batch 256 --lr 6e-4

The batch is that of all ranks together, so the losses do not depend on how many there are, nor on
the strategy. `make book-model` runs it for the model in checkpoint/. Section 8.2.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import torch
import torch._dynamo  # before the group, or gloo's threads outlive it: section 3.8
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from model import Config, Llama, flops_of_a_token
from prepare_data import prepare
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm

SIZES = ("width", "layers", "heads", "kv_heads", "hidden", "context")
RECIPE = (*SIZES, "batch", "steps", "warmup", "lr", "clip", "seed")


def parallel(model: Llama, strategy: str) -> nn.Module:
    """Every rank has made the same whole model; DDP keeps it, FSDP2 keeps a share of each tensor."""
    if strategy == "ddp":
        return DistributedDataParallel(
            model, forward_sync_buffers=False, gradient_as_bucket_view=True
        )
    for layer in model.layers:
        fully_shard(layer)  # gathered before use and freed after, one layer at a time
    return fully_shard(model)


def make_optimizer(model: nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW; matrices decay, norms do not."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))


def update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    window: torch.Tensor,
    args: argparse.Namespace,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step; returns this rank's part of the batch's mean loss, and the gradient's norm."""
    logits = model(window[:, :-1])  # [share, context, vocabulary]
    total = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten(), reduction="sum")
    loss = total / (args.batch * args.context)
    (loss * dist.get_world_size()).backward()  # both strategies divide by it
    norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach(), norm.full_tensor() if isinstance(norm, DTensor) else norm


@torch.no_grad()
def held_out_loss(model: nn.Module, windows: torch.Tensor, device: torch.device) -> float:
    """Mean loss in nats a token over [windows, context + 1]; all ranks run equally many batches."""
    pooled = torch.zeros(2, dtype=torch.double, device=device)  # sum of losses, tokens
    n = dist.get_world_size()
    for start in range(0, len(windows), 8 * n):  # a rank that has none left still has to gather
        some = windows[start : start + 8 * n]
        share = some[dist.get_rank() :: n]
        window = (share if len(share) else some[:1]).to(device)
        logits = model(window[:, :-1])
        targets = window[:, 1:].flatten()
        loss = F.cross_entropy(logits.flatten(0, 1), targets, reduction="sum")
        if len(share):
            pooled += torch.stack([loss.double(), pooled.new_tensor(targets.numel())])
    dist.all_reduce(pooled)
    return (pooled[0] / pooled[1]).item()


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, notes: dict
) -> None:
    """Each rank writes its own shards; the folder gets its name when all of them are on the disk."""
    draft = folder / f"step-{step:06}.draft"
    if dist.get_rank() == 0:
        shutil.rmtree(draft, ignore_errors=True)  # a run that was killed here before
    dist.barrier()
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=draft)
    if dist.get_rank() == 0:
        (draft / "notes.json").write_text(json.dumps(notes | {"step": step}))
        draft.rename(draft.with_suffix(""))
    dist.barrier()


def newest_checkpoint(folder: Path) -> Path | None:
    """The whole checkpoint of the latest step; a draft is none."""
    found = [p for p in folder.glob("step-*") if re.fullmatch(r"step-\d{6,}", p.name)]
    return max(found, default=None)


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, recipe: dict
) -> dict:
    """Put a checkpoint, of any number of ranks and either strategy, into the model; its notes."""
    notes = json.loads((path / "notes.json").read_text())
    for name, value in recipe.items():
        if notes["recipe"].get(name) != value:
            stop(f"{path} has {name} {notes['recipe'].get(name)}, this run {value}: another --out?")
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=path)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    return notes


def read_tokens(folder: Path, name: str, context: int) -> torch.Tensor:
    """Windows of context + 1 tokens; the last token of one is the first of the next."""
    tokens = load_file(folder / f"{name}.safetensors")["tokens"].long()
    if len(tokens) <= context:
        stop(f"{folder}/{name} has {len(tokens)} tokens: type a smaller --context")
    return tokens.unfold(0, context + 1, context)


def run(args: argparse.Namespace, device: torch.device) -> list[bool | None]:
    rank = dist.get_rank()
    world_size = dist.get_world_size()
    if args.batch < world_size:
        stop(f"{world_size} ranks, but --batch {args.batch}: type --batch {world_size} or more")
    if rank == 0 and not args.data.is_dir():
        prepare(args.corpus, args.data, args.vocabulary)
    dist.barrier()
    meta = json.loads((args.data / "meta.json").read_text())
    train = read_tokens(args.data, "train", args.context)
    held_out = read_tokens(args.data, "held_out", args.context)
    if len(train) < args.batch:
        stop(f"--batch {args.batch}, but there are {len(train)} windows: type a smaller one")

    torch.manual_seed(args.seed)  # the same first weights on every rank
    config = Config(meta["vocabulary"], **{name: getattr(args, name) for name in SIZES})
    model = parallel(Llama(config).to(device), args.strategy)
    optimizer = make_optimizer(model, args.lr)
    parameters = sum(p.numel() for p in model.parameters())
    recipe = {name: getattr(args, name) for name in RECIPE} | {"data": meta["train"]["digest"]}
    step = 0
    losses: list[float] = []
    checkpoint = newest_checkpoint(args.out) if args.out and args.resume else None
    if checkpoint:
        notes = load_checkpoint(checkpoint, model, optimizer, recipe)
        step = notes["step"]
        losses = notes["losses"]
    say(
        f"{world_size} rank{'s' * (world_size > 1)} on {device.type}, {args.strategy}: {parameters:,} parameters"
    )
    say(f"batch         {args.batch} x {args.context} tokens for all ranks together")
    say(f"epoch         {len(train)} windows, {len(train) // args.batch} steps")
    if args.resume:
        say(f"resuming      at step {step}" + ("" if step else ": there is no checkpoint yet"))
    before = held_out_loss(model, held_out, device)

    sampler = ShareOfBatch(len(train), args.batch, rank, world_size, args.seed)
    loader = DataLoader(train, batch_size=None, sampler=sampler, pin_memory=device.type != "cpu")
    parts: list[torch.Tensor] = []  # this rank's parts of the losses since the last line
    rates: list[float] = []
    say(f"{'step':>6}{'learning rate':>15}{'gradient norm':>15}{'loss':>8}{'tokens/s':>10}")
    bar = tqdm(total=args.steps, initial=step, disable=None if rank == 0 else True)
    start = time.perf_counter()
    for window in batches(loader, sampler, step, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * learning_rate(step, args.warmup, args.steps)
        loss, norm = update(model, optimizer, window.to(device, non_blocking=True), args)
        parts.append(loss)
        step += 1
        bar.update()
        saving = args.out and (step == args.steps or step % args.save_every == 0)
        if not (saving or step in (1, args.steps) or step % args.log_every == 0):
            continue  # without waiting for the device
        pooled = torch.stack(parts).double()
        dist.all_reduce(pooled)
        losses += pooled.tolist()
        rates.append(len(parts) * args.batch * args.context / (time.perf_counter() - start))
        rate = optimizer.param_groups[0]["lr"]
        say(f"{step:>6}{rate:>15.6f}{norm.item():>15.3f}{losses[-1]:>8.3f}{rates[-1]:>10,.0f}")
        parts.clear()
        if saving:
            notes = {"losses": losses, "recipe": recipe, "config": dataclasses.asdict(config)}
            save_checkpoint(args.out, step, model, optimizer, notes)
        start = time.perf_counter()
    bar.close()

    after = held_out_loss(model, held_out, device)
    bytes_per_token = meta["held_out"]["bytes"] / meta["held_out"]["tokens"]
    bits = after / math.log(2) / bytes_per_token
    say(f"held out      {before:.3f} -> {after:.3f} nats per token, {bits:.2f} bits per byte")
    flops = flops_of_a_token(config)
    if rates:
        say(
            f"achieved      {max(rates) * flops / 1e9:.1f} GFLOP/s at {flops / 1e6:.1f} MFLOP a token"
        )
    if args.json and rank == 0:
        args.json.write_text(json.dumps({"losses": losses, "held_out": after}, indent=1) + "\n")
    return [
        check(
            "loss of the last step, and that of guessing", losses[-1], math.log(config.vocabulary)
        ),
        check("held-out loss after training, and before", after, before),
        check("steps without a loss", args.steps - len(losses), 0),
    ]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", type=Path, default="runs/ch08_data", help="prepare_data.py's folder"
    )
    data.add_argument(
        "--corpus", type=Path, default="resources/corpus.txt", help="if there is none"
    )
    data.add_argument("--vocabulary", type=int, default=2048, help="tokens, if there is none")
    data.add_argument("--batch", type=int, default=8, help="windows per step, of all ranks")
    sizes = parser.add_argument_group("model")
    for name in SIZES:
        default = getattr(Config, name)
        flag = f"--{name.replace('_', '-')}"
        sizes.add_argument(flag, type=int, default=default, help=f"default: {default}")
    training = parser.add_argument_group("training")
    training.add_argument(
        "--strategy", choices=["ddp", "fsdp"], default="ddp", help="who keeps what"
    )
    training.add_argument("--steps", type=int, default=24, help="optimizer steps")
    training.add_argument("--warmup", type=int, default=10, help="steps to the peak rate")
    training.add_argument("--lr", type=float, default=3e-3, help="AdamW's peak learning rate")
    training.add_argument("--clip", type=float, default=1.0, help="largest norm of a gradient")
    training.add_argument("--seed", type=int, default=0, help="for weights and shuffling")
    training.add_argument("--device", default="auto", help="auto, cpu or cuda")
    files = parser.add_argument_group("output")
    files.add_argument("--log-every", type=int, default=6, help="steps between two lines")
    files.add_argument("--out", type=Path, help="folder for checkpoints; default: save nothing")
    files.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    files.add_argument("--resume", action="store_true", help="go on from --out, if there is one")
    files.add_argument("--json", type=Path, help="write the losses to this file")
    args = parser.parse_args()
    if args.width % (2 * args.heads) or args.heads % args.kv_heads:
        stop(f"--width must divide by 2 x --heads, and --heads by --kv-heads {args.kv_heads}")
    if not args.data.is_dir() and not args.corpus.is_file():
        stop(f"neither --data {args.data} nor --corpus {args.corpus} is there")
    if args.resume and not args.out:
        stop("--resume wants a folder: type --out DIR")
    if args.out and newest_checkpoint(args.out) and not args.resume:
        stop(f"{args.out} has a checkpoint: type --resume to go on, or another --out")
    return args


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


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
