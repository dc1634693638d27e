"""The trainer to copy: a byte-level language model, the same training on any number of ranks.

    torchrun --nproc_per_node=2 chapter3-distributed-training-with-pytorch-ddp/code/train_ddp_torchrun.py
    torchrun --nproc_per_node=2 chapter3-distributed-training-with-pytorch-ddp/code/train_ddp_torchrun.py --steps 20 --out runs/ch03_train --save-every 5 --resume
    torchrun --nproc_per_node=1 chapter3-distributed-training-with-pytorch-ddp/code/train_ddp_torchrun.py --compare chapter3-distributed-training-with-pytorch-ddp/code/golden.json
    torchrun --nproc_per_node=3 chapter3-distributed-training-with-pytorch-ddp/code/train_ddp_torchrun.py --compare chapter3-distributed-training-with-pytorch-ddp/code/golden.json

On GPUs:
    torchrun --nproc_per_node=8 chapter3-distributed-training-with-pytorch-ddp/code/train_ddp_torchrun.py --width 1024 --layers 12 --heads 16 --context 1024 --batch 24 --steps 500

The batch is that of all ranks together, so losses do not depend on how many there are. --compare
takes its flags from a file with the losses of an earlier run, and holds the new run against them.
Section 3.2.
"""

import argparse
import hashlib
import json
import math
import os
import statistics
import sys
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
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm

# What must not differ between a run and the one that it goes on from, or is compared with.
RECIPE = ["width", "layers", "heads", "context", "batch", "dropout", "seed"]
RECIPE += ["steps", "warmup", "lr", "clip"]


class Block(nn.Module):
    """Llama's: rotary attention, then SwiGLU, each behind an RMSNorm and added to what comes in."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, hidden = heads, 8 * width // 3
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


class ByteLM(nn.Module):
    """A small decoder-only transformer of Llama's shape (arXiv:2302.13971) whose tokens are bytes."""

    def __init__(self, width: int, layers: int, heads: int, context: int, dropout: float = 0.0):
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, 256, bias=False)
        frequency = 10_000.0 ** -torch.arange(0, 1, 2 * heads / width)  # [head_dim / 2]
        angle = torch.outer(torch.arange(context), frequency)
        self.register_buffer("rotation", torch.stack([angle.cos(), angle.sin()]), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:  # [batch, seq] -> [batch, seq, 256]
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, self.rotation[:, : tokens.shape[1]])
        return self.head(self.norm(x))


def rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Turn each pair (x[i], x[i + d/2]) by its position's angle: RoPE (arXiv:2104.09864)."""
    (cos, sin), (a, b) = rotation, x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class ShareOfBatch(Sampler[list[int]]):
    """This rank's share of each global batch; the batches are the same at any world size."""

    def __init__(self, samples: int, batch: int, rank: int, world_size: int, seed: int):
        self.samples, self.batch, self.rank, self.world_size = samples, batch, rank, world_size
        self.seed, self.epoch, self.done = seed, 0, 0

    def set_epoch(self, epoch: int, done: int = 0) -> None:
        """Choose the epoch's shuffle; `done` batches of it are skipped, for a resumed run."""
        self.epoch, self.done = epoch, done

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


def read_windows(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Windows to train on and, from the last tenth, to hold out, two [samples, context + 1]; and
    the text's digest. A window's last byte is the next one's first.
    """
    try:
        text = args.data.read_bytes()
    except OSError as error:
        stop(f"cannot read {args.data} ({error.strerror}): give a text file with --data FILE")
    needed = 10 * max((args.batch * args.context + 10) // 9, args.context + 1)
    if len(text) < needed:
        stop(f"{args.data} has {len(text)} bytes, one batch needs {needed}: give a longer --data")
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    parts = data.split([len(data) * 9 // 10, len(data) - len(data) * 9 // 10])
    train, held_out = (part.unfold(0, args.context + 1, args.context) for part in parts)
    return train, held_out, hashlib.sha256(text).hexdigest()


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
    pooled = torch.zeros(2, dtype=torch.double)
    mine = windows[dist.get_rank() :: dist.get_world_size()]  # shares may differ, or be empty
    for window in mine.split(batch):
        logits = model(window[:, :-1].to(device))
        targets = window[:, 1:].flatten().to(device)
        loss = F.cross_entropy(logits.flatten(0, 1), targets, reduction="sum")
        pooled += torch.tensor([loss.item(), targets.numel()], dtype=torch.double)
    pooled = pooled.to(device)
    dist.all_reduce(pooled)  # sums, not means: a mean of means is wrong where shares differ
    model.train()
    return (pooled[0] / pooled[1]).item(), int(pooled[1])


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
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        theirs = state["recipe"]
    except Exception as error:  # what a torn file raises depends on where it is torn
        stop(f"cannot load {path} ({type(error).__name__}): type another --out, or remove it")
    for name, mine in recipe.items():
        if theirs.get(name) != mine:
            stop(f"{path} has {name} {theirs.get(name)}, this run {mine}: type another --out")
    return state


def run(args: argparse.Namespace, device: torch.device) -> bool:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if args.batch < world_size:
        stop(f"{world_size} ranks, but --batch {args.batch}: type --batch {world_size} or more")
    train, held_out, digest = read_windows(args)

    torch.manual_seed(args.seed)  # the same first weights everywhere, and DDP broadcasts rank 0's
    model = ByteLM(args.width, args.layers, args.heads, args.context, args.dropout).to(device)
    ranked = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1
    )
    schedule = LambdaLR(optimizer, lambda step: learning_rate(step, args.warmup, args.steps))
    sampler = ShareOfBatch(len(train), args.batch, rank, world_size, args.seed)
    loader = DataLoader(train, batch_sampler=sampler, pin_memory=device.type != "cpu")

    recipe = {name: getattr(args, name) for name in RECIPE} | {"data": digest}
    checkpoint = args.out / "checkpoint.pt" if args.out else None
    step, losses, norms = 0, [], []
    if args.resume and checkpoint.is_file():
        state = restore(checkpoint, recipe, device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        step, losses, norms = state["step"], state["losses"], state["norms"]
    steps = [step] * world_size
    dist.all_gather_object(steps, step)
    if len(set(steps)) > 1:
        stop(f"ranks go on from steps {sorted(set(steps))}: type an --out that all nodes share")
    # Dropout masks of this rank's own, and after a resume others than at the start.
    torch.manual_seed((args.seed * 1_000_003 + step) * 1_000_003 + rank)
    parameters = sum(p.numel() for p in model.parameters())
    say(f"{world_size} rank{'s' * (world_size > 1)} on {device.type}: {parameters:,} parameters")
    say(f"batch         {args.batch} x {args.context} tokens for all ranks together")
    say(f"epoch         {len(train)} windows, {len(train) // args.batch} steps")
    if args.resume:
        say(f"resuming      at step {step}" + ("" if step else ": there is no checkpoint yet"))
    before, _ = evaluate(model, held_out, device, args.batch)

    last = min(args.steps, args.stop_at or args.steps)
    seconds, mine = [], []  # the second is this rank's share of the losses not yet pooled
    say(f"{'step':>6}{'epoch':>7}{'learning rate':>15}{'gradient norm':>15}{'loss':>8}")
    bar = tqdm(total=last, initial=step, desc="training", disable=None if rank == 0 else True)
    start = time.perf_counter()
    for window in batches(loader, sampler, step, last):
        rate = schedule.get_last_lr()[0]
        loss, norm = train_step(
            ranked, optimizer, window.to(device, non_blocking=True), args.batch, args.clip
        )
        schedule.step()
        mine.append(loss)
        norms.append(norm)
        step += 1
        saving = checkpoint and (step == last or (args.save_every and step % args.save_every == 0))
        if step % args.log_every == 0 or step == last or saving:
            pooled = torch.stack(mine).double()
            dist.all_reduce(pooled)
            losses += pooled.tolist()
            norms = [float(n) for n in norms]
            epoch = (step - 1) // (len(train) // args.batch)
            say(f"{step:>6}{epoch:>7}{rate:>15.6f}{norms[-1]:>15.3f}{losses[-1]:>8.3f}")
            mine.clear()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
        if saving:
            if rank == 0:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                state |= {"schedule": schedule.state_dict(), "recipe": recipe, "step": step}
                save(state | {"losses": losses, "norms": norms}, checkpoint)
            dist.barrier()  # so that no rank goes on to die beside a checkpoint that is half written
        bar.update()
        start = time.perf_counter()
    bar.close()

    after, counted = evaluate(model, held_out, device, args.batch)
    if losses:
        say(f"loss          {losses[0]:.3f} -> {losses[-1]:.3f} nats per byte")
    say(f"held out      {before:.3f} -> {after:.3f} nats per byte, {counted:,} tokens")
    if len(seconds) > 5:
        low, middle, high = statistics.quantiles(seconds[2:], n=4)  # two steps warm up
        tokens = args.batch * args.context
        say(
            f"throughput    {tokens / middle:,.0f} tokens/s  "
            f"[{tokens / high:,.0f} .. {tokens / low:,.0f}], {len(seconds) - 2} steps"
        )
    if args.json and rank == 0:
        record = {"file": str(args.data), "recipe": recipe, "losses": losses, "norms": norms}
        record["seconds"] = seconds
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    held = check("held-out loss after training, and before", after, before)
    held &= check("held-out tokens counted, off by", abs(counted - held_out[:, 1:].numel()), 0)
    held &= check("max spread of weights over ranks", max_spread(model), 0)
    if args.compare:
        held &= compare(args.compare, recipe, losses, norms)
    return held


def compare(path: Path, recipe: dict, losses: list[float], norms: list[float]) -> bool:
    """Hold this run's losses and gradient norms against those that another run wrote by --json."""
    golden = json.loads(path.read_text())
    if golden["recipe"] != recipe or len(golden["losses"]) < len(losses):
        stop(f"{path} comes from other flags or data: make it anew with --json")
    mine, its = (torch.tensor(x, dtype=torch.double) for x in (losses, golden["losses"]))
    held = check("max |loss - the file's|", (mine - its[: len(mine)]).abs().max().item(), 1e-5)
    mine, its = (torch.tensor(x, dtype=torch.double) for x in (norms, golden["norms"]))
    off = (mine / its[: len(mine)] - 1).abs().max().item()
    return check("max |norm / the file's - 1|", off, 1e-4) and held


def max_spread(model: nn.Module) -> float:
    """Largest difference of any weight from rank 0's."""
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    rank_0s = flat.clone()
    dist.broadcast(rank_0s, src=0)
    return (flat - rank_0s).abs().max().item()


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


def join_group(wanted: str) -> torch.device:
    """Join the process group; return this rank's device: its own GPU where each rank has one."""
    if "LOCAL_WORLD_SIZE" not in os.environ:
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
        device = torch.device(device.type, local_rank)
    backend, bound = ("gloo", None) if device.type == "cpu" else (None, device)  # None: PyTorch's
    dist.init_process_group(backend, device_id=bound)
    dist.barrier()  # all are here, before one may leave for what it is given
    return device


def stop(message: str) -> None:
    sys.stderr.write(message + "\n")  # in one piece: other ranks write too
    sys.exit(2)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def above_zero(text: str) -> float:
    if not 0 < (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: stop(f"{message}: --help lists the flags")
    chapter = Path(__file__).resolve().parents[1]
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", type=Path, default=chapter / "main.md", help="text to learn; default: the chapter"
    )
    data.add_argument("--context", type=positive, default=128, help="bytes per window")
    data.add_argument("--batch", type=positive, default=12, help="windows per step, of all ranks")
    model = parser.add_argument_group("model")
    model.add_argument("--width", type=positive, default=128, help="size of a token's vector")
    model.add_argument("--layers", type=positive, default=4, help="transformer blocks")
    model.add_argument("--heads", type=positive, default=4, help="attention heads")
    model.add_argument("--dropout", type=float, default=0.0, help="share of units dropped")
    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=positive, default=60, help="optimizer steps")
    training.add_argument("--warmup", type=positive, default=10, help="steps to the peak rate")
    training.add_argument("--lr", type=above_zero, default=3e-3, help="AdamW's peak learning rate")
    training.add_argument("--clip", type=float, default=1.0, help="largest norm of a gradient")
    training.add_argument("--seed", type=int, default=0, help="for weights, shuffling and dropout")
    training.add_argument("--device", default="auto", help="auto, cpu or cuda")
    files = parser.add_argument_group("output")
    files.add_argument("--log-every", type=positive, default=10, help="steps between two lines")
    files.add_argument("--out", type=Path, help="folder for checkpoint.pt; default: save nothing")
    files.add_argument("--save-every", type=int, default=0, help="steps; 0: only at the end")
    files.add_argument("--resume", action="store_true", help="go on from --out, if there is one")
    files.add_argument("--stop-at", type=positive, help="leave after this step; --steps stays")
    files.add_argument("--json", type=Path, help="write losses, norms and seconds to this file")
    files.add_argument("--compare", type=Path, help="a --json file, whose flags and losses to take")
    args = parser.parse_args()
    if args.compare:
        try:
            golden = json.loads(args.compare.read_text())
            vars(args).update((name, golden["recipe"][name]) for name in RECIPE)
            args.data = Path(golden.get("file", args.data))
        except (OSError, ValueError, KeyError) as error:
            stop(f"--compare {args.compare}: no losses of an earlier run ({error})")
    if args.width % (2 * args.heads):
        stop(f"--width {args.width} is no multiple of 2 x --heads {args.heads}")
    if not 0 <= args.dropout < 1:
        stop(f"--dropout {args.dropout:g}: give 0 or more, and less than 1")
    if args.json and not args.json.parent.is_dir():
        stop(f"--json {args.json}: there is no folder {args.json.parent}")
    if args.out is None and (args.resume or args.save_every):
        stop("--resume and --save-every want a folder: type --out DIR")
    if args.out and (args.out / "checkpoint.pt").exists() and not args.resume:
        stop(f"{args.out}/checkpoint.pt is there: type --resume to go on, or another --out")
    if args.out:
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            stop(f"--out {args.out}: {error.strerror}")
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
