"""The state of a training: data, model, optimizers, checkpoints; and one step. A module of train.py.

Sections 8.2 and 8.4.
"""

import argparse
import dataclasses
import hashlib
import os
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta

import torch
import torch._dynamo  # before the group, or gloo's threads outlive it: section 3.8
import torch.distributed as dist
import torch.nn.functional as F
from checkpoints import Checkpoints, find_start, load, make_folder
from data import Loader, Tokens, read_meta, refuse_damage, shards_of
from launch import from_rank_0, say, stop
from metrics import Busy, Log
from model import Config, Llama
from optimizer import make_optimizers
from parallel import data_parallel, make_mesh, parallelize
from prepare_data import prepare
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

SIZES = ("width", "layers", "heads", "kv_heads", "hidden", "context")
# What must not differ between a run and the one that it goes on from; the layout may.
RECIPE = (*SIZES, "batch", "steps", "warmup", "lr", "clip", "weight_decay", "seed")
RECIPE += ("schedule", "optimizer")
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


def update(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    window: torch.Tensor,
    args: argparse.Namespace,
    ranks: int,
    busy: Busy,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step, in which the host never waits for a GPU; this rank's part of the loss, and the norm.

    `ranks` read different windows: DDP and FSDP2 both divide the gradients' sum by their number.
    """
    parts = window.tensor_split(args.accumulate)
    ddp = isinstance(model, DistributedDataParallel)
    losses = []
    for number, part in enumerate(parts, 1):
        last = number == len(parts)
        if not ddp:
            model.set_requires_gradient_sync(last)
        with model.no_sync() if ddp and not last else nullcontext():
            with busy() if ddp else nullcontext():  # elsewhere ranks meet in every layer
                logits = model(part[:, :-1])  # [windows, context, vocabulary]
            with busy():
                loss = sum_of_losses(logits, part) / (args.batch * args.context)
            (loss * ranks).backward()
        losses.append(loss.detach())
    norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    with busy() if args.optimizer == "adamw" else nullcontext():
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return torch.stack(losses).sum(), norm


def sum_of_losses(logits: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten(), reduction="sum")


class Trainer:
    """What a training reads and changes, and what a checkpoint of it holds."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.args = args
        self.device = device
        self.mesh = make_mesh(device.type, args.dp_replicate, args.dp_shard, args.tp)
        self.rank, self.ranks = data_parallel(self.mesh)
        self.layout = f"{self.mesh.size(0)} x {self.mesh.size(1)} x {self.mesh.size(2)}"
        if args.batch < self.ranks * args.accumulate:
            least = f"type --batch {self.ranks * args.accumulate} or more"
            stop(f"--batch {args.batch} for {self.ranks} ranks x {args.accumulate} parts: {least}")
        self.told: list[int] = []  # signals
        for number in SIGNALS:
            signal.signal(number, lambda received, _: self.told.append(received))
        self.read_data()  # may take rank 0 minutes
        limit = timedelta(seconds=args.timeout)
        for group in {dist.group.WORLD, *self.mesh.get_all_groups()}:
            dist.distributed_c10d._set_pg_timeout(limit, group)
        self.dtype = DTYPES[args.dtype] or (
            torch.float32 if device.type == "cpu" else torch.bfloat16
        )
        self.config = Config(
            self.meta["vocabulary"], **{name: getattr(args, name) for name in SIZES}
        )
        with torch.device("meta"):
            model = Llama(self.config)
        self.parameters = sum(p.numel() for p in model.parameters())
        if args.out:
            from_rank_0(lambda: make_folder(args.out, self.parameters))
        self.model = parallelize(
            model,
            self.mesh,
            not args.no_sequence_parallel,
            args.checkpoint_activations,
            args.compile,
            None if self.dtype == torch.float32 else self.dtype,
            args.seed,
        )
        self.optimizers = make_optimizers(self.model, args.optimizer, args.lr, args.weight_decay)
        self.busy = Busy(device)
        self.log = Log(args.out, args.tensorboard)
        self.checkpoints = Checkpoints(args.out, args.keep, self.log, limit) if args.out else None
        self.step = 0
        self.losses: list[float] = []

    def read_data(self) -> None:
        args = self.args
        if not from_rank_0(args.data.is_dir):
            from_rank_0(lambda: prepare(args.corpus, args.data, args.vocabulary))
        self.meta = read_meta(args.data)
        train = shards_of(self.meta, "train")
        held_out = shards_of(self.meta, "held_out")
        stop_together(lambda: refuse_damage(args.data, share_of_node([*train, *held_out])))
        windows = Tokens(args.data, train, args.context)
        if len(windows) < args.batch:
            stop(f"--batch {args.batch}, but there are {len(windows)} windows: type a smaller one")
        self.held_out = {
            shard.get("kind", "text"): Tokens(args.data, [shard], args.context)
            for shard in held_out
        }
        if not all(map(len, self.held_out.values())):
            stop(f"{args.data} has too few held-out tokens: type a smaller --context")
        pin = self.device.type != "cpu"
        self.loader = Loader(
            windows, args.batch, self.rank, self.ranks, args.seed, args.workers, pin
        )
        tokenizer = hashlib.sha256((args.data / "tokenizer.json").read_bytes()).hexdigest()[:16]
        self.recipe = {name: getattr(args, name) for name in RECIPE}
        self.recipe |= {"data": self.meta["train"]["digest"], "tokenizer": tokenizer}
        if args.schedule == "wsd":
            del self.recipe["steps"]  # a run may be made longer

    def find_start(self) -> None:
        """Go on from the newest checkpoint, if there is one."""
        found = from_rank_0(lambda: find_start(self.args.out, self.recipe))
        if found:
            path, notes = found
            if notes["step"] > self.args.steps:
                stop(f"{path} is beyond --steps {self.args.steps}: type {notes['step']} or more")
            load(path, self.model, [] if notes.get("imported") else self.optimizers)
            self.loader.load_state_dict(notes["loader"])
            self.step = notes["step"]
            self.losses = notes["losses"]
        say(f"resuming      at step {self.step}" + ("" if found else ": no checkpoint yet"))

    def save(self, wait: bool) -> None:
        notes = {"step": self.step, "losses": [*self.losses], "loader": self.loader.state_dict()}
        notes |= {"recipe": self.recipe, "config": dataclasses.asdict(self.config)}
        notes |= {"layout": self.layout, "world_size": dist.get_world_size()}
        self.checkpoints.save(self.model, self.optimizers, notes, wait)

    def pool(self, parts: list[torch.Tensor]) -> tuple[list[float], ...]:
        """Of all ranks: each step's loss, signals received (a count of each), seconds busy."""
        n = dist.get_world_size()
        counts = [self.told.count(number) for number in SIGNALS]
        busy_s = [0.0] * n
        busy_s[dist.get_rank()] = self.busy.seconds() / len(parts)
        rest = torch.tensor(counts + busy_s, dtype=torch.double, device=self.device)
        pooled = torch.cat([torch.stack(parts).double() / self.mesh.size(2), rest])
        dist.all_reduce(pooled)  # this waits for the device
        losses, counts, busy_s = pooled.cpu().split([len(parts), len(SIGNALS), n])
        return losses.tolist(), counts.tolist(), busy_s.tolist()


def share_of_node(shards: list[dict]) -> list[dict]:
    """Each node reads all files once: its ranks some of them each."""
    return shards[int(os.environ["LOCAL_RANK"]) :: int(os.environ["LOCAL_WORLD_SIZE"])]


def stop_together(work: Callable[[], None]) -> None:
    """Where one rank stops, all do, and none complains that another is gone."""
    codes = [0] * dist.get_world_size()
    code = 0
    try:
        work()
    except SystemExit as end:
        code = end.code
    dist.all_gather_object(codes, code)
    if any(codes):
        sys.exit(max(codes))


@torch.no_grad()
def held_out_loss(trainer: Trainer, tokens: Tokens) -> float:
    """Mean loss in nats a token; all ranks run equally many batches of 8, some on one they repeat."""
    pooled = torch.zeros(2, dtype=torch.double, device=trainer.device)  # sum of losses, tokens
    wanted = trainer.args.held_out
    windows = min(len(tokens), wanted) if wanted > 0 else len(tokens)
    for start in range(0, windows, 8 * trainer.ranks):
        share = range(start, min(start + 8 * trainer.ranks, windows))[trainer.rank :: trainer.ranks]
        window = tokens[list(share) or [start]].to(trainer.device)
        loss = sum_of_losses(trainer.model(window[:, :-1]), window)
        if share:
            pooled += torch.stack([loss.double(), pooled.new_tensor(window[:, 1:].numel())])
    dist.all_reduce(pooled)  # of the ranks of a tensor-parallel group each counts: a ratio stays
    return (pooled[0] / pooled[1]).item()
