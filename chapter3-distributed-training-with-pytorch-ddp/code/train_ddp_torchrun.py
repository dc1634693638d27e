"""The trainer to copy: a byte-level language model, the same training on any number of ranks.

    torchrun --nproc_per_node=2 chapter3-distributed-training-with-pytorch-ddp/code/train_ddp_torchrun.py
    torchrun --nproc_per_node=2 chapter3-distributed-training-with-pytorch-ddp/code/train_ddp_torchrun.py --steps 20 --out runs/ch03_train --save-every 5 --resume
    torchrun --nproc_per_node=3 chapter3-distributed-training-with-pytorch-ddp/code/train_ddp_torchrun.py --compare chapter3-distributed-training-with-pytorch-ddp/code/golden.json

On GPUs:
    torchrun --nproc_per_node=8 chapter3-distributed-training-with-pytorch-ddp/code/train_ddp_torchrun.py --width 1024 --layers 12 --heads 16 --context 1024 --batch 24 --steps 100 --lr 3e-4

The batch is that of all ranks together, so losses do not depend on how many there are. --compare
takes its flags from a file with the losses of an earlier run, and holds the new run against them.
Section 3.2.
"""

import argparse
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import torch
import torch._dynamo  # before the group, or gloo's threads outlive it: section 3.8
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm

# What must not differ between a run and the one that it goes on from, or is compared with.
RECIPE = ["width", "layers", "heads", "context", "batch", "dropout", "seed"]
RECIPE += ["steps", "warmup", "lr", "clip"]


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


def rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Turn each pair (x[i], x[i + d/2]) by its position's angle: RoPE (arXiv:2104.09864)."""
    cos, sin = rotation
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


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


def read_windows(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows to train on and, from the last tenth, to hold out: two [windows, context + 1].

    A window's last byte is the next one's first.
    """
    data = read_bytes(args.data, at_least=2 * (args.batch + 5) * args.context)
    split = len(data) * 9 // 10
    size = args.context + 1
    return data[:split].unfold(0, size, args.context), data[split:].unfold(0, size, args.context)


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


@torch.no_grad()
def evaluate(
    model: nn.Module, windows: torch.Tensor, device: torch.device, batch: int
) -> tuple[float, int]:
    """Mean loss over [windows, context + 1], and the tokens counted: each once, none twice."""
    model.eval()
    pooled = torch.zeros(2, dtype=torch.double, device=device)  # sum of losses, tokens
    share = windows[dist.get_rank() :: dist.get_world_size()]  # sizes may differ, or be 0
    for window in share.split(batch):
        window = window.to(device)
        logits = model(window[:, :-1])
        targets = window[:, 1:].flatten()
        pooled[0] += F.cross_entropy(logits.flatten(0, 1), targets, reduction="sum")
        pooled[1] += targets.numel()
    dist.all_reduce(pooled)  # sums, not means: a mean of means is wrong where shares differ
    model.train()
    loss, tokens = pooled.tolist()
    return loss / tokens, int(tokens)


def learning_rate(step: int, warmup: int, steps: int) -> float:
    """Share of the peak: a line up, then half a cosine down to a tenth (arXiv:1608.03983)."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(steps - warmup, 1))


def save(state: dict, path: Path) -> None:
    """Write a checkpoint so that its name always leads to a whole one, old or new."""
    draft = path.with_suffix(".draft")
    with draft.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())  # on the disk before the name changes
    draft.replace(path)


def restore(path: Path, recipe: dict, device: torch.device) -> dict:
    """The checkpoint's state, if it is one of this very run."""
    state = torch.load(path, map_location=device, weights_only=True)
    for name, value in recipe.items():
        saved = state["recipe"].get(name)
        if saved != value:
            stop(f"{path} has {name} {saved}, this run {value}: type another --out")
    return state


def run(args: argparse.Namespace, device: torch.device) -> list[bool | None]:
    rank = dist.get_rank()
    world_size = dist.get_world_size()
    if not (args.compare or device.type == "cpu"):
        torch.set_float32_matmul_precision("high")  # TF32: too coarse to compare with a file
    train, held_out = read_windows(args)

    torch.manual_seed(args.seed)  # the same first weights everywhere, and DDP broadcasts rank 0's
    model = ByteLlama(args.width, args.layers, args.heads, args.context, args.dropout).to(device)
    ddp_model = DistributedDataParallel(
        model, forward_sync_buffers=False, gradient_as_bucket_view=True
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1
    )
    schedule = LambdaLR(optimizer, lambda step: learning_rate(step, args.warmup, args.steps))
    sampler = ShareOfBatch(len(train), args.batch, rank, world_size, args.seed)
    on_gpu = device.type != "cpu"
    loader = DataLoader(train, batch_size=None, sampler=sampler, pin_memory=on_gpu)

    recipe = {name: getattr(args, name) for name in RECIPE}
    recipe["data"] = hashlib.sha256(args.data.read_bytes()).hexdigest()
    checkpoint = args.out / "checkpoint.pt" if args.out else None
    step = 0
    losses, norms = [], []
    if args.resume and checkpoint.is_file():
        state = restore(checkpoint, recipe, device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        step = state["step"]
        losses, norms = state["losses"], state["norms"]
    steps = [step] * world_size
    dist.all_gather_object(steps, step)
    if len(set(steps)) > 1:
        stop(f"ranks go on from steps {sorted(set(steps))}: type an --out that all nodes share")
    # Dropout masks of this rank's own, and after a resume others than at the start.
    torch.manual_seed(((args.seed * 1_000_003 + step) * 1_000_003 + rank) % 2**63)
    parameters = sum(p.numel() for p in model.parameters())
    say(f"{world_size} rank{'s' * (world_size > 1)} on {device.type}: {parameters:,} parameters")
    say(f"batch         {args.batch} x {args.context} tokens for all ranks together")
    say(f"epoch         {len(train)} windows, {len(train) // args.batch} steps")
    if args.resume:
        say(f"resuming      at step {step}" + ("" if step else ": there is no checkpoint yet"))
    before, _ = evaluate(model, held_out, device, args.batch)

    last = min(args.steps, args.stop_at or args.steps)
    new_losses, new_norms = [], []  # since the last line; the losses are this rank's parts
    rates = []  # tokens per second of each interval between two lines
    say(f"{'step':>6}{'epoch':>7}{'learning rate':>15}{'gradient norm':>15}{'loss':>8}")
    bar = tqdm(total=last, initial=step, desc="training", disable=None if rank == 0 else True)
    start = time.perf_counter()
    for window in batches(loader, sampler, step, last):
        rate = schedule.get_last_lr()[0]
        window = window.to(device, non_blocking=True)
        loss, norm = train_step(ddp_model, optimizer, window, args.batch, args.clip)
        schedule.step()
        new_losses.append(loss)
        new_norms.append(norm)
        step += 1
        bar.update()
        saving = checkpoint and (step == last or (args.save_every and step % args.save_every == 0))
        if not (saving or step == last or step % args.log_every == 0):
            continue  # without waiting for the device: its queue stays full
        pooled = torch.stack(new_losses).double()
        dist.all_reduce(pooled)
        losses += pooled.tolist()  # this does wait
        norms += torch.stack(new_norms).tolist()
        tokens = len(new_losses) * args.batch * args.context
        rates.append(tokens / (time.perf_counter() - start))
        epoch = (step - 1) // (len(train) // args.batch)
        say(f"{step:>6}{epoch:>7}{rate:>15.6f}{norms[-1]:>15.3f}{losses[-1]:>8.3f}")
        new_losses.clear()
        new_norms.clear()
        if saving:
            if rank == 0:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                state |= {"schedule": schedule.state_dict(), "recipe": recipe, "step": step}
                save(state | {"losses": losses, "norms": norms}, checkpoint)
            dist.barrier()  # so that no rank goes on to die beside a checkpoint that is half written
        start = time.perf_counter()
    bar.close()

    after, counted = evaluate(model, held_out, device, args.batch)
    if losses:
        say(f"loss          {losses[0]:.3f} -> {losses[-1]:.3f} nats per byte")
    say(f"held out      {before:.3f} -> {after:.3f} nats per byte, {counted:,} tokens")
    if len(rates) > 2:
        low, median, high = quartiles(rates[1:])  # the first steps warm up
        spread = f"[{low:,.0f} .. {high:,.0f}], {len(rates) - 1} intervals"
        say(f"throughput    {median:,.0f} tokens/s  {spread}")
    if args.json and rank == 0:
        found = {"file": str(args.data), "recipe": recipe, "losses": losses, "norms": norms}
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    claims = [
        check("held-out loss after training, and before", after, before),
        check("held-out tokens missed or doubled", abs(held_out[:, 1:].numel() - counted), 0),
        check("max spread of weights over ranks", max_spread(model), 0),
    ]
    if args.compare:
        claims += compare(args.compare, recipe, losses, norms)
    return claims


def compare(path: Path, recipe: dict, losses: list[float], norms: list[float]) -> list[bool]:
    """Hold this run's losses and gradient norms against those that another run wrote by --json."""
    golden = json.loads(path.read_text())
    if golden["recipe"] != recipe:
        stop(f"{path} comes from other flags or data: make it anew with --json")
    count = len(losses)  # fewer than the file's after --stop-at
    loss_difference = torch.tensor(losses) - torch.tensor(golden["losses"][:count])
    norm_ratio = torch.tensor(norms) / torch.tensor(golden["norms"][:count])
    return [
        check("max |loss - the file's|", loss_difference.abs().max().item(), 1e-5),
        check("max |norm / the file's - 1|", (norm_ratio - 1).abs().max().item(), 1e-4),
    ]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", type=Path, default="resources/corpus.txt", help="text to learn, as bytes"
    )
    data.add_argument("--context", type=int, default=128, help="bytes per window")
    data.add_argument("--batch", type=int, default=12, help="windows per step, of all ranks")
    model = parser.add_argument_group("model")
    model.add_argument("--width", type=int, default=128, help="size of a token's vector")
    model.add_argument("--layers", type=int, default=4, help="transformer blocks")
    model.add_argument("--heads", type=int, default=4, help="attention heads")
    model.add_argument("--dropout", type=float, default=0.0, help="share of units dropped")
    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=int, default=40, help="optimizer steps")
    training.add_argument("--warmup", type=int, default=10, help="steps to the peak rate")
    training.add_argument("--lr", type=float, default=3e-3, help="AdamW's peak learning rate")
    training.add_argument("--clip", type=float, default=1.0, help="largest norm of a gradient")
    training.add_argument("--seed", type=int, default=0, help="for weights, shuffling and dropout")
    training.add_argument("--device", default="auto", help="auto, cpu or cuda")
    files = parser.add_argument_group("output")
    files.add_argument("--log-every", type=int, default=10, help="steps between two lines")
    files.add_argument("--out", type=Path, help="folder for checkpoint.pt; default: save nothing")
    files.add_argument("--save-every", type=int, default=0, help="steps; 0: only at the end")
    files.add_argument("--resume", action="store_true", help="go on from --out, if there is one")
    files.add_argument("--stop-at", type=int, help="leave after this step; --steps stays")
    files.add_argument("--json", type=Path, help="write losses and norms to this file")
    files.add_argument("--compare", type=Path, help="a --json file, whose flags and losses to take")
    args = parser.parse_args()
    if args.compare:
        golden = json.loads(args.compare.read_text())
        vars(args).update((name, golden["recipe"][name]) for name in RECIPE)
        args.data = Path(golden["file"])
    if args.width % (2 * args.heads):
        stop(f"--width {args.width} is no multiple of 2 x --heads {args.heads}")
    if args.out is None and (args.resume or args.save_every):
        stop("--resume and --save-every want a folder: type --out DIR")
    if args.out and (args.out / "checkpoint.pt").exists() and not args.resume:
        stop(f"{args.out}/checkpoint.pt is there: type --resume to go on, or another --out")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    return args


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


# Copied from ch01_multi_gpu_ddp.main
@record  # so that torchrun's summary names the error
def main() -> None:
    args = parse_args()
    device = join_group(args.device)
    claims_of = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(claims_of, run(args, device))  # nobody leaves while another is at work
    dist.destroy_process_group()  # not in a `finally`: section 3.1
    sys.exit(conclude(max(claims_of, key=lambda claims: claims.count(False))))  # the worst rank's


# Copied from ch01_multi_gpu_ddp.max_spread
def max_spread(model: nn.Module) -> float:
    """Largest difference between any two ranks' copies of any weight."""
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    low, high = flat.clone(), flat.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    dist.all_reduce(high, op=dist.ReduceOp.MAX)
    return (high - low + 0 * flat).max().item()  # 0 * flat: MIN and MAX on gloo drop a NaN


# Copied from ch01_single_gpu_baseline.quartiles
def quartiles(values: list[float]) -> list[float]:
    """First quartile, median and third quartile."""
    return torch.tensor(values).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()


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
