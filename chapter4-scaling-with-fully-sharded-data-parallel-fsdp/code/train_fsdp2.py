r"""The trainer of this chapter, chapter 3's on shards: accumulation, bfloat16, offload, checkpoints in shards.

    torchrun --nproc_per_node=2 chapter4-scaling-with-fully-sharded-data-parallel-fsdp/code/train_fsdp2.py \
        --compare chapter3-distributed-training-with-pytorch-ddp/code/golden.json --accumulate 3 --reduce last
    torchrun --nproc_per_node=2 chapter4-scaling-with-fully-sharded-data-parallel-fsdp/code/train_fsdp2.py \
        --compare chapter3-distributed-training-with-pytorch-ddp/code/golden.json \
        --checkpoint-activations every --out runs/ch04_fsdp --save-every 4 --stop-at 12 --resume
    torchrun --nproc_per_node=3 chapter4-scaling-with-fully-sharded-data-parallel-fsdp/code/train_fsdp2.py \
        --compare chapter3-distributed-training-with-pytorch-ddp/code/golden.json \
        --checkpoint-activations second --out runs/ch04_fsdp --resume

On GPUs:
    torchrun --nproc_per_node=8 chapter4-scaling-with-fully-sharded-data-parallel-fsdp/code/train_fsdp2.py \
        --width 2048 --layers 24 --heads 16 --context 2048 --batch 48 --accumulate 2 --steps 20 \
        --lr 3e-4 --dtype bf16 --checkpoint-activations second --compile

All train to chapter 3's losses. The first counts what micro-batches cost; of the others, two ranks
begin and three go on. SIGTERM saves and ends with exit code 0. Sections 4.5 and 4.6.
"""

import argparse
import gc
import hashlib
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint import state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from torch.utils.data import DataLoader, Sampler

# What must not differ between a run and the one that it goes on from, or is compared with.
RECIPE = ["width", "layers", "heads", "context", "batch", "dropout", "seed"]
RECIPE += ["steps", "warmup", "lr", "clip"]
MIB = 2**20
FLAT = state_dict.StateDictOptions(flatten_optimizer_state_dict=True)


def shard_model(args: argparse.Namespace, device: torch.device) -> nn.Module:
    """Chapter 3's model with its first weights; each rank keeps a share of every tensor."""
    options: dict[str, Any] = {}
    backend = {}
    if args.dtype == "bf16":  # the shards, and so the optimizer, stay in float32
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)
    if args.offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
        if device.type == "cuda":  # the norm of gradients that lie in host memory is gloo's to sum
            backend = {"backend_override": {0: "cpu:gloo,cuda:nccl"}}
    options["mesh"] = init_device_mesh(device.type, (dist.get_world_size(),), **backend)
    torch.manual_seed(args.seed)
    model = ByteLlama(args.width, args.layers, args.heads, args.context, args.dropout)
    for number, block in enumerate(model.blocks):
        model.blocks[number] = run_again(block, number, args.checkpoint_activations)
        if args.compile:
            model.blocks[number].compile()
        fully_shard(model.blocks[number], **options)
    return fully_shard(model, **options)  # a group of what is left: embed, norm and head


def micro_batches(
    model: nn.Module, window: torch.Tensor, args: argparse.Namespace
) -> Iterator[torch.Tensor]:
    """Forward and backward of each micro-batch; yields its part of the batch's mean loss."""
    parts = window.tensor_split(args.accumulate)  # equally many on all ranks, some perhaps empty
    for number, part in enumerate(parts, 1):
        if args.reduce == "last":
            model.set_requires_gradient_sync(number == len(parts))
        loss = sum_of_losses(model, part) / (args.batch * args.context)
        (loss * dist.get_world_size()).backward()  # FSDP divides the ranks' sum by their number
        yield loss.detach()


def sum_of_losses(model: nn.Module, window: torch.Tensor) -> torch.Tensor:
    """Over a window's tokens; when it returns nobody holds the logits but autograd."""
    logits = model(window[:, :-1]).float()
    return F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten(), reduction="sum")


def update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    window: torch.Tensor,
    args: argparse.Namespace,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step, in which the host never waits; returns this rank's part of the loss, and the norm."""
    loss = torch.stack(list(micro_batches(model, window, args))).sum()
    norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip)
    optimizer.step()
    optimizer.zero_grad()
    return loss, norm.full_tensor()  # a DTensor, as the gradients are


def count_step(
    model: nn.Module, window: torch.Tensor, args: argparse.Namespace
) -> list[bool | None]:
    """Say how often a step gathers and reduces, and what whole gradients wait between micro-batches."""
    gc.collect()
    before = whole_gradients()
    with Collectives() as collectives:
        whole = max(whole_gradients() - before for _ in micro_batches(model, window, args))
    model.zero_grad()
    gathers = collectives.calls["c10d::_allgather_base_"]
    scatters = collectives.calls["c10d::_reduce_scatter_base_"]
    waits = args.reduce == "last" and args.accumulate > 1
    several = dist.get_world_size() > 1
    groups = args.layers + 1
    gathers_predicted = several * args.accumulate * (2 * groups - 1)  # the root once, blocks twice
    scatters_predicted = several * groups * (1 if waits else args.accumulate)
    whole_predicted = waits * sum(4 * p.numel() for p in model.parameters())
    say(f"{'of a step':<26}{'predicted':>10}{'counted':>10}")
    say(f"{'all-gathers':<26}{gathers_predicted:>10}{gathers:>10}")
    say(f"{'reduce-scatters':<26}{scatters_predicted:>10}{scatters:>10}")
    if args.dtype == "fp32":  # else they wait in float32 where this count does not find them
        both = f"{whole_predicted / MIB:>10.3f}{whole / MIB:>10.3f}"
        say(f"{'whole gradients wait, MiB':<26}{both}")
    off = abs(gathers - gathers_predicted) + abs(scatters - scatters_predicted)
    claims = [check("collectives of a step, other than predicted", off, 0)]
    if args.dtype == "fp32":
        apart = abs(whole - whole_predicted)
        claims.append(check("whole gradients that wait, bytes off", apart, 0))
    return claims


def whole_gradients() -> int:
    """Bytes of the gradients of all parameters here that are no shards: a shard is a DTensor."""
    plain = [p for p in gc.get_objects() if type(p) is nn.Parameter]
    return sum(p.grad.nbytes for p in plain if p.grad is not None)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """All that training changes, by name: of each tensor this rank's shard, as a DTensor."""
    weights, moments = state_dict.get_state_dict(model, optimizer, options=FLAT)
    return {"model": weights, "optimizer": moments}


def digests(state: dict[str, dict[str, Any]]) -> dict[str, str]:
    """SHA-256 of each tensor, gathered whole, one at a time: the same on any number of ranks."""
    found = {}
    for part, values in state.items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                whole = value.full_tensor() if isinstance(value, DTensor) else value
                found[f"{part}.{name}"] = hashlib.sha256(whole.cpu().numpy()).hexdigest()
    return found


def save_sharded(folder: Path, state: dict[str, dict[str, Any]], notes: dict) -> None:
    """Each rank writes its shards. A name step-... appears when all of them are on the disk."""
    draft = folder / "draft"
    notes["digests"] = digests(state)
    if dist.get_rank() == 0:
        shutil.rmtree(draft, ignore_errors=True)  # what a killed save has left
    dist.barrier()
    said = [""]
    try:
        dcp.save(state, checkpoint_id=draft)  # waits for the disk; `.metadata` comes last
        if dist.get_rank() == 0:
            (draft / "notes.json").write_text(json.dumps(notes, indent=1))
            sync(draft / "notes.json")
            sync(draft)
            target = folder / f"step-{notes['step']:06}"
            shutil.rmtree(target, ignore_errors=True)  # incomplete, or this run had begun there
            draft.rename(target)
            sync(folder)
            for old in complete(folder)[:-2]:
                shutil.rmtree(old.rename(draft))
    except dcp.CheckpointException as error:  # on all ranks, if on one
        rank, (cause, _) = next(iter(error.failures.items()))
        said = [f"rank {rank}: {cause}"]
    except OSError as error:
        said = [f"rank 0: {error}"]
    dist.broadcast_object_list(said)  # nobody goes on to die beside half a checkpoint
    if said[0]:
        kept = f"{complete(folder)[-1].name} is whole" if complete(folder) else "there is none yet"
        stop(f"cannot save to {folder} ({said[0]}); {kept}")


def complete(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first. One without .metadata was never finished."""
    return sorted(path for path in folder.glob("step-*") if (path / ".metadata").is_file())


def refuse_small_disk(folder: Path, nbytes: int) -> None:
    """Stop before training where a checkpoint of so many bytes, and two that are kept, have no room."""
    wanted = (3 - len(list(folder.glob("step-*")))) * nbytes
    free = shutil.disk_usage(folder).free
    if free < wanted:
        stop(f"--out {folder} has {free / MIB:,.0f} MiB free, checkpoints want {wanted / MIB:,.0f}")


def load_sharded(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, recipe: dict
) -> dict:
    """Go on from a checkpoint that any number of ranks have saved; returns the notes beside it."""
    notes = json.loads((path / "notes.json").read_text())
    for name, value in recipe.items():
        saved = notes["recipe"].get(name)
        if saved != value:
            stop(f"{path} has {name} {saved}, this run {value}: type another --out")
    state = state_of(model, optimizer)
    try:
        dcp.load(state, checkpoint_id=path)  # each rank reads what overlaps with its shards
    except dcp.CheckpointException as error:  # on all ranks, if on one
        cause = str(next(iter(error.failures.values()))[0]).partition(". ")[0]
        stop(f"cannot load {path} ({cause}): move it away, and the one before it is next")
    parts = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
    state_dict.set_state_dict(model, optimizer, **parts, options=FLAT)
    return notes


def newest_of_all(args: argparse.Namespace) -> Path | None:
    """The checkpoint to go on from, if there is one; all ranks must see the same."""
    found = complete(args.out) if args.resume else []
    newest = [""] * dist.get_world_size()
    dist.all_gather_object(newest, found[-1].name if found else "none")
    if len(set(newest)) > 1:
        stop(f"ranks would go on from {sorted(set(newest))}: type an --out that all nodes share")
    return found[-1] if found else None


@torch.no_grad()
def evaluate_sharded(
    model: nn.Module, windows: torch.Tensor, device: torch.device, batch: int
) -> tuple[float, int]:
    """Chapter 3's, but each forward gathers weights: all ranks run equally many, some on nothing."""
    model.eval()
    pooled = torch.zeros(2, dtype=torch.double, device=device)  # sum of losses, tokens
    for whole in windows.split(batch):
        window = whole[dist.get_rank() :: dist.get_world_size()].to(device)  # may be [0, ...]
        pooled[0] += sum_of_losses(model, window)
        pooled[1] += window[:, 1:].numel()
    dist.all_reduce(pooled)
    model.train()
    loss, tokens = pooled.tolist()
    return loss / tokens, int(tokens)


def run(args: argparse.Namespace, device: torch.device) -> list[bool | None]:
    rank = dist.get_rank()
    world_size = dist.get_world_size()
    if not (args.compare or device.type == "cpu"):
        torch.set_float32_matmul_precision("high")  # TF32: too coarse to compare with a file
    train, held_out = read_windows(args)
    model = shard_model(args, device)
    ranks = f"{world_size} rank{'s' * (world_size > 1)}"
    parameters = sum(p.numel() for p in model.parameters())
    say(f"{ranks} on {device.type}: {parameters:,} parameters, products in {args.dtype}")
    if args.out:
        refuse_small_disk(args.out, 12 * parameters)
    optimizer = torch.optim.AdamW(  # after fully_shard: of the shards
        model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1
    )
    sampler = ShareOfBatch(len(train), args.batch, rank, world_size, args.seed)
    loader = DataLoader(train, batch_size=None, sampler=sampler, pin_memory=device.type != "cpu")
    recipe = {name: getattr(args, name) for name in RECIPE}
    recipe["data"] = hashlib.sha256(args.data.read_bytes()).hexdigest()
    step = 0
    losses, norms = [], []
    claims: list[bool | None] = []
    path = newest_of_all(args)
    if path:
        notes = load_sharded(path, model, optimizer, recipe)
        step = notes["step"]
        losses, norms = notes["losses"], notes["norms"]
        say(f"resuming      at step {step}, saved by {notes['ranks']}")
        loaded = digests(state_of(model, optimizer))
        damaged = [name for name in loaded if loaded[name] != notes["digests"].get(name)]
        claims.append(check("tensors with other bits than were saved", len(damaged), 0))
        if damaged:
            stop(f"{path} is damaged, in {damaged[0]}: move it away")
    elif args.resume:
        say("resuming      at step 0: there is no checkpoint yet")
    if args.accumulate > 1 and not args.compile:  # compiled code would hide its calls
        claims += count_step(model, train[next(iter(sampler))].to(device), args)
    # Dropout masks of this rank's own, and after a resume others than at the start.
    torch.manual_seed(((args.seed * 1_000_003 + step) * 1_000_003 + rank) % 2**63)
    before, _ = evaluate_sharded(model, held_out, device, args.batch)

    last = min(args.steps, args.stop_at or args.steps)
    new_losses, new_norms = [], []  # since the last line; the losses are this rank's parts
    told_to_stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: told_to_stop.append(number))
    say(f"{'step':>6}{'learning rate':>15}{'gradient norm':>15}{'loss':>8}{'tokens/s':>10}")
    start = time.perf_counter()
    for window in batches(loader, sampler, step, last):
        rate = args.lr * learning_rate(step, args.warmup, args.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss, norm = update(model, optimizer, window.to(device, non_blocking=True), args)
        new_losses.append(loss)
        new_norms.append(norm)
        step += 1
        saving = step == last or (args.save_every and step % args.save_every == 0)
        if not (saving or step % args.log_every == 0):
            continue  # without waiting for the device: its queue stays full
        told = loss.new_tensor(len(told_to_stop))
        pooled = torch.stack([*new_losses, told]).double()
        dist.all_reduce(pooled)
        *latest, told_ranks = pooled.tolist()  # this does wait
        losses += latest
        norms += torch.stack(new_norms).tolist()
        tokens = len(latest) * args.batch * args.context
        speed = tokens / (time.perf_counter() - start)
        say(f"{step:>6}{rate:>15.6f}{norms[-1]:>15.3f}{losses[-1]:>8.3f}{speed:>10,.0f}")
        new_losses.clear()
        new_norms.clear()
        if args.out and (saving or told_ranks):
            notes = {"step": step, "ranks": ranks, "recipe": recipe}
            notes |= {"losses": losses, "norms": norms}
            save_sharded(args.out, state_of(model, optimizer), notes)
        if told_ranks:
            say(f"told to stop  after step {step}" + (", saved" if args.out else ""))
            break
        start = time.perf_counter()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    peaks = [0] * world_size
    dist.all_gather_object(peaks, peak_memory(device))
    say(f"memory        {min(peaks) / MIB:,.0f} .. {max(peaks) / MIB:,.0f} MiB a rank at its peak")
    after, counted = evaluate_sharded(model, held_out, device, args.batch)
    say(f"held out      {before:.3f} -> {after:.3f} nats per byte, {counted:,} tokens")
    claims += [
        check("held-out loss after training, and before", after, before),
        check("held-out tokens missed or seen twice", abs(held_out[:, 1:].numel() - counted), 0),
    ]
    if args.compare:
        bound = 1e-5 if args.dtype == "fp32" else 0.02
        claims += compare_with_file(args.compare, recipe, losses, norms, bound)
    return claims


def compare_with_file(
    path: Path, recipe: dict, losses: list[float], norms: list[float], bound: float
) -> list[bool]:
    """Hold losses and gradient norms against those that chapter 3's trainer wrote by --json."""
    golden = json.loads(path.read_text())
    if golden["recipe"] != recipe:
        stop(f"{path} comes from other flags or data: make it anew with --json")
    count = len(losses)  # fewer than the file's after --stop-at
    apart = torch.tensor(losses) - torch.tensor(golden["losses"][:count])
    ratio = torch.tensor(norms) / torch.tensor(golden["norms"][:count])
    return [
        check("max |loss - the file's|", apart.abs().max().item(), bound),
        check("max |norm / the file's - 1|", (ratio - 1).abs().max().item(), 10 * bound),
    ]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="of gathered weights and products"
    )
    add("--accumulate", type=int, default=1, help="micro-batches per step")
    add("--reduce", choices=("each", "last"), default="each", help="micro-batches to reduce after")
    modes = ("none", "every", "second", "selective")
    add("--checkpoint-activations", choices=modes, default="none", help="blocks that run again")
    add("--offload", action="store_true", help="keep shards and optimizer state in host memory")
    add("--compile", action="store_true", help="compile each block")
    add("--data", type=Path, default="resources/corpus.txt", help="text to learn, as bytes")
    add("--context", type=int, default=128, help="bytes per window")
    add("--batch", type=int, default=12, help="windows per step, of all ranks and micro-batches")
    add("--width", type=int, default=128, help="size of a token's vector")
    add("--layers", type=int, default=4, help="transformer blocks")
    add("--heads", type=int, default=4, help="attention heads; 2 x heads divides --width")
    add("--dropout", type=float, default=0.0, help="share of units dropped")
    add("--steps", type=int, default=20, help="optimizer steps")
    add("--warmup", type=int, default=10, help="steps to the peak rate")
    add("--lr", type=float, default=3e-3, help="AdamW's peak learning rate")
    add("--clip", type=float, default=1.0, help="largest norm of a gradient")
    add("--seed", type=int, default=0, help="for weights, shuffling and dropout")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--log-every", type=int, default=10, help="steps between two lines and looks at SIGTERM")
    add("--out", type=Path, help="folder for checkpoints; default: save nothing")
    add("--save-every", type=int, default=0, help="steps; 0: only at the end")
    add("--resume", action="store_true", help="go on from the newest in --out, if there is one")
    add("--stop-at", type=int, help="leave after this step; --steps stays")
    add("--compare", type=Path, help="a --json file of chapter 3's trainer: its flags and losses")
    args = parser.parse_args()
    if args.compare:
        golden = json.loads(args.compare.read_text())
        vars(args).update((name, golden["recipe"][name]) for name in RECIPE)
        args.data = Path(golden["file"])
    if args.width % (2 * args.heads):
        stop(f"--width {args.width} is no multiple of 2 x --heads {args.heads}")
    if args.out is None and (args.resume or args.save_every):
        stop("--resume and --save-every want a folder: type --out DIR")
    if args.out and complete(args.out) and not args.resume:
        stop(f"{complete(args.out)[-1]} is there: type --resume to go on, or another --out")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    return args


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


# Copied from fsdp_checkpointing.run_again
def run_again(block: nn.Module, number: int, mode: str) -> nn.Module:
    """The block; one that runs again in backward keeps its input, and what `selective` names."""
    if mode == "selective":
        kept = partial(create_selective_checkpoint_contexts, products())
        return checkpoint_wrapper(block, context_fn=kept)
    if mode == "every" or (mode == "second" and number % 2 == 0):  # spares the last of each two
        return checkpoint_wrapper(block)
    return block


# Copied from fsdp_checkpointing.products
def products() -> list[torch._ops.OpOverload]:
    """Operators whose results take long to make again: matrix products and fused attention."""
    aten = torch.ops.aten
    return [
        aten.mm.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
    ]


# Copied from fsdp_checkpointing.Collectives
class Collectives(TorchDispatchMode):
    """Counts the calls to the process group, by name."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self.calls[function.name()] += 1
        return function(*args, **(kwargs or {}))


# Copied from train_ddp_torchrun.learning_rate
def learning_rate(step: int, warmup: int, steps: int) -> float:
    """Share of the peak: a line up, then half a cosine down to a tenth (arXiv:1608.03983)."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(steps - warmup, 1))


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


# Copied from train_ddp_torchrun.rotate
def rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Turn each pair (x[i], x[i + d/2]) by its position's angle: RoPE (arXiv:2104.09864)."""
    cos, sin = rotation
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


# Copied from train_elastic_checkpoint.sync
def sync(path: Path) -> None:
    """Wait until a file's bytes, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


# Copied from ch01_single_gpu_baseline.peak_memory
def peak_memory(device: torch.device) -> int:
    """Bytes at the worst moment so far: the allocator's on a GPU, the whole process's on a CPU."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


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
