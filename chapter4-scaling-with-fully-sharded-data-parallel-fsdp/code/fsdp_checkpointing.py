r"""Activations computed again instead of kept: what each choice saves and costs.

    torchrun --nproc_per_node=2 chapter4-scaling-with-fully-sharded-data-parallel-fsdp/code/fsdp_checkpointing.py \
        --compare chapter3-distributed-training-with-pytorch-ddp/code/golden.json \
        --plot chapter4-scaling-with-fully-sharded-data-parallel-fsdp/figures/activation_checkpointing.svg

On GPUs:
    torchrun --nproc_per_node=8 chapter4-scaling-with-fully-sharded-data-parallel-fsdp/code/fsdp_checkpointing.py \
        --width 2048 --layers 24 --heads 16 --context 2048 --batch 24 --lr 3e-4

Look at the table: what a rank holds of chapter 3's model under FSDP2, and what computing again saves
and costs. Then each choice trains, on chapter 3's flags with --compare: to the same losses.
Section 4.4.
"""

import argparse
import hashlib
import json
import math
import os
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from torch.utils.data import DataLoader, Sampler
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

MODES = ("none", "every", "second", "selective")  # what runs again in backward
RECIPE = ["width", "layers", "heads", "context", "batch", "dropout", "seed"]  # of the file's run
RECIPE += ["steps", "warmup", "lr", "clip"]
MIB = 2**20
FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
CPU_ATTENTION = {  # the GPUs' kernels FlopCounterMode knows, these it does not
    FUSED: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    FUSED_BACKWARD: lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v),
}
Counts = dict[str, float]  # of one step on this rank, by the names that the table has


def build_sharded(args: argparse.Namespace, mode: str, device: torch.device) -> nn.Module:
    """Chapter 3's model with its first weights; each rank keeps a share of every tensor."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    torch.manual_seed(args.seed)
    model = ByteLlama(args.width, args.layers, args.heads, args.context, args.dropout)
    for number, block in enumerate(model.blocks):
        model.blocks[number] = run_again(block, number, mode)
        fully_shard(model.blocks[number], mesh=mesh)  # moves it to the device and shards it
    fully_shard(model, mesh=mesh)  # a group of what is left: embed, norm and head
    return model


def run_again(block: nn.Module, number: int, mode: str) -> nn.Module:
    """The block; one that runs again in backward keeps its input, and what `selective` names."""
    if mode == "selective":
        kept = partial(create_selective_checkpoint_contexts, products())
        return checkpoint_wrapper(block, context_fn=kept)
    if mode == "every" or (mode == "second" and number % 2 == 0):  # spares the last of each two
        return checkpoint_wrapper(block)
    return block


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


def predict_step(args: argparse.Namespace, mode: str, windows: int) -> Counts:
    """What a step on this rank's windows takes in fp32, from the model's shape alone."""
    with torch.device("meta"):
        model = ByteLlama(args.width, args.layers, args.heads, args.context)
    rank = dist.get_rank()
    world_size = dist.get_world_size()
    width = args.width
    hidden = model.blocks[0].down.in_features
    tokens = windows * args.context
    shard = 0
    for p in model.parameters():  # rows are dealt in equal chunks: the last ranks may get fewer
        chunk = -(-len(p) // world_size)
        shard += 4 * max(0, min(chunk, len(p) - rank * chunk)) * p[0].numel()
    moments = 2 * shard + 4 * len(list(model.parameters()))  # and each tensor's number of steps
    block = sum(p.nbytes for p in model.blocks[0].parameters())
    root = sum(p.nbytes for p in model.parameters()) - args.layers * block

    # Floats that a block keeps per token, on a CPU. Each norm: input, normed, output, 1/rms.
    # Attention: qkv, q and k turned, output in two orders, log-sum-exp. Gate and up, silu, product.
    floats = 2 * (3 * width + 1) + 7 * width + args.heads + 4 * hidden
    floats += 2 * width if args.dropout else 0  # two masks
    # Selective: the input, and the results of qkv, attention, out, gate_up and down.
    chosen = width + 3 * width + width + args.heads + width + 2 * hidden + width
    again = [mode == "every" or (mode == "second" and i % 2 == 0) for i in range(args.layers)]
    kept = [4 * tokens * (width if drops else floats) for drops in again]
    if mode == "selective":
        kept = [4 * tokens * chosen] * args.layers
    # Around the blocks: the last norm, log-softmax; windows and, copied out of two or more, targets
    # (int64); the rotation.
    around = 4 * tokens * (3 * width + 1 + 256) + 8 * windows * (args.context + 1)
    around += (8 * tokens if windows > 1 else 0) + 8 * args.context * (width // args.heads // 2) + 4
    # At the loss: the logits twice. At a block: what those before it keep and all of its own, the
    # gradients in flight in it, the later blocks' gradients, sharded, and one that is on its way.
    peaks = [sum(kept) + around + 2 * 4 * tokens * 256]
    for i in range(args.layers):
        later = args.layers - 1 - i
        own = 4 * tokens * (floats + width + 3 * hidden)
        own += 4 * tokens * width if mode == "selective" else 0  # of `down`, which nothing asks for
        peaks.append(sum(kept[:i]) + own + later * block // world_size + block * min(later, 1))

    # FLOPs of products per token. Fused attention computes its scores again in backward. A block that
    # runs again stops when backward has what it wants: before `down`, unless dropout comes behind it.
    matrices = 4 * width**2 + 3 * width * hidden
    forward = 2 * matrices + 4 * args.context * width
    backward = 4 * matrices + 10 * args.context * width
    rerun = forward - (0 if args.dropout else 2 * width * hidden)
    flops = args.layers * (forward + backward) + sum(again) * rerun + 6 * 256 * width
    return {
        "parameters, MiB": shard / MIB,
        "gradients, MiB": shard / MIB,
        "optimizer state, MiB": moments / MIB,
        "gathered weights, MiB": root / MIB,
        "activations, MiB": (sum(kept) + around) / MIB,
        "peak, MiB": (shard + moments + root + 2 * block + max(peaks)) / MIB,  # the next block too
        "compute, GFLOP": tokens * flops / 1e9,
        "all-gathers": 2 * args.layers + 1 if world_size > 1 else 0,
    }


class Collectives(TorchDispatchMode):
    """Counts the calls to the process group, by name."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self.calls[function.name()] += 1
        return function(*args, **(kwargs or {}))


class Results(TorchDispatchMode):
    """The storages of those products' results that somebody still holds."""

    def __init__(self):
        super().__init__()
        self.alive = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        if function in products():
            for result in results if isinstance(results, tuple) else [results]:
                if isinstance(result, torch.Tensor):
                    self.alive.add(result.untyped_storage())
        return results


def count_step(
    args: argparse.Namespace, mode: str, window: torch.Tensor, device: torch.device
) -> tuple[Counts, list[torch.Tensor]]:
    """The same, counted; and this rank's loss and its shards of the gradients."""
    model = build_sharded(args, mode, device)
    saved = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage  # once, however many views of it are saved
        return tensor

    torch.manual_seed(args.seed + dist.get_rank())  # for dropout
    flops = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
    with flops, Collectives() as collectives:
        with Results() as results, torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            logits = model(window[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
            del logits
        saved |= {storage.data_ptr(): storage for storage in results.alive}  # by `selective`
        root = [p for p in model.parameters() if not isinstance(p, DTensor)]  # still gathered
        gathered = {p.untyped_storage().data_ptr(): p.nbytes for p in root}
        # A block's weights are among what is saved too, but freed: their storage has 0 bytes.
        activations = sum(t.nbytes() for at, t in saved.items() if at not in gathered)
        saved.clear()
        loss.backward()
    gradients = [p.grad.to_local().clone() for p in model.parameters()]

    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.zero_grad()
    tracker = FSDPMemTracker(model, optimizer)
    tracker.track_inputs((window,))
    with tracker:
        train_step(model, optimizer, window, args.batch, args.clip)  # makes AdamW's moments
        tracker.reset_mod_stats()
        train_step(model, optimizer, window, args.batch, args.clip)
    peak = max(parts["Total"] for parts in tracker.get_tracker_snapshot("peak").values())
    moments = [t for state in optimizer.state.values() for t in state.values()]
    counts = {
        "parameters, MiB": sum(local(p).nbytes for p in model.parameters()) / MIB,
        "gradients, MiB": sum(g.nbytes for g in gradients) / MIB,
        "optimizer state, MiB": sum(local(t).nbytes for t in moments) / MIB,
        "gathered weights, MiB": sum(gathered.values()) / MIB,
        "activations, MiB": activations / MIB,
        "peak, MiB": peak / MIB,
        "compute, GFLOP": flops.get_total_flops() / 1e9,
        "all-gathers": collectives.calls["c10d::_allgather_base_"],
    }
    return counts, [loss.detach(), *gradients]


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def account(
    args: argparse.Namespace, train: torch.Tensor, device: torch.device
) -> list[bool | None]:
    """Print what a step takes with each choice of blocks, predicted and counted, and judge it."""
    world_size = dist.get_world_size()
    sampler = ShareOfBatch(len(train), args.batch, dist.get_rank(), world_size, args.seed)
    window = train[next(iter(sampler))].to(device)
    predicted = {mode: predict_step(args, mode, len(window)) for mode in MODES}
    counted, results = {}, {}
    for mode in MODES:
        counted[mode], results[mode] = count_step(args, mode, window, device)
    say(f"{'runs again in backward':<22}" + "".join(f"{mode:>18}" for mode in MODES))
    say(f"{'on rank 0':<22}" + f"{'predicted':>10}{'counted':>8}" * len(MODES))
    for part in predicted["none"]:
        digits = 0 if part == "all-gathers" or predicted["none"][part] >= 1000 else 3
        pairs = [
            f"{predicted[m][part]:>10.{digits}f}{counted[m][part]:>8.{digits}f}" for m in MODES
        ]
        say(f"{part:<22}" + "".join(pairs))
    if args.plot and dist.get_rank() == 0:
        draw(counted, args.plot)

    def error(*parts: str) -> float:
        pairs = [(counted[mode][part], predicted[mode][part]) for mode in MODES for part in parts]
        return max(abs(found / expected - 1) if expected else found for found, expected in pairs)

    on_cpu = device.type == "cpu"  # a GPU's kernels keep less, and some add in no fixed order
    exact = ["parameters, MiB", "gradients, MiB", "optimizer state, MiB", "gathered weights, MiB"]
    losses = torch.stack([loss for loss, *_ in results.values()])
    pairs = [pair for r in results.values() for pair in zip(results["none"], r, strict=True)]
    apart = torch.stack([(a - b).abs().max() for a, b in pairs if a.numel()]).max().item()
    return [
        check("error of weights, gradients, optimizer state", error(*exact, "all-gathers"), 0),
        check("error of the activations", error("activations, MiB"), 0 if on_cpu else 0.25),
        check("error of the FLOPs", error("compute, GFLOP"), 1e-12 if on_cpu else 0.05),
        # What is in flight at the worst moment, gradients on their way, depends on who is late.
        expect("error of the peak", error("peak, MiB"), 0.1 if on_cpu else 0.25, args.strict),
        check("max |loss - the one with none|", (losses - losses[0]).abs().max().item(), 0),
        check("max |gradient - the one with none|", apart, 0 if on_cpu else 1e-4),
    ]


def train_with(
    args: argparse.Namespace, mode: str, windows: torch.Tensor, device: torch.device
) -> tuple[list[float], list[float]]:
    """Train from the first weights on; returns the losses and gradient norms of all steps."""
    rank = dist.get_rank()
    model = build_sharded(args, mode, device)
    optimizer = torch.optim.AdamW(  # after fully_shard: of the shards
        model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1
    )
    sampler = ShareOfBatch(len(windows), args.batch, rank, dist.get_world_size(), args.seed)
    loader = DataLoader(windows, batch_size=None, sampler=sampler, pin_memory=device.type != "cpu")
    torch.manual_seed(args.seed + rank)  # for dropout
    losses, norms = [], []
    for step, window in enumerate(batches(loader, sampler, 0, args.steps)):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * learning_rate(step, args.warmup, args.steps)
        loss, norm = train_step(model, optimizer, window.to(device), args.batch, args.clip)
        losses.append(loss)
        norms.append(norm.full_tensor())  # a DTensor, as the gradients are
    pooled = torch.stack(losses).double()
    dist.all_reduce(pooled)
    return pooled.tolist(), torch.stack(norms).tolist()


def run(args: argparse.Namespace, device: torch.device) -> list[bool | None]:
    world_size = dist.get_world_size()
    train, _ = read_windows(args)
    with torch.device("meta"):
        model = ByteLlama(args.width, args.layers, args.heads, args.context)
    parameters = sum(p.numel() for p in model.parameters())
    say(f"{world_size} rank{'s' * (world_size > 1)} on {device.type}: {parameters:,} parameters")
    claims = account(args, train, device)

    recipe_args = argparse.Namespace(**vars(args))
    if args.compare:
        golden = json.loads(args.compare.read_text())
        vars(recipe_args).update((name, golden["recipe"][name]) for name in RECIPE)
        recipe_args.data = Path(golden["file"])
    windows, _ = read_windows(recipe_args)
    curves = {}
    say(f"{f'{recipe_args.steps} steps':<22}{'first loss':>18}{'last loss':>18}")
    for mode in MODES:
        losses, norms = train_with(recipe_args, mode, windows, device)
        curves[mode] = losses
        say(f"{mode:<22}{losses[0]:>18.6f}{losses[-1]:>18.6f}")
    apart = max(abs(a - b) for c in curves.values() for a, b in zip(curves["none"], c, strict=True))
    bound = 0 if device.type == "cpu" else 1e-3
    claims.append(check("in all steps, max |loss - the one with none|", apart, bound))
    if args.compare:
        recipe = {name: getattr(recipe_args, name) for name in RECIPE}
        recipe["data"] = hashlib.sha256(recipe_args.data.read_bytes()).hexdigest()
        claims += compare_with_file(args.compare, recipe, losses, norms, 1e-5)
    return claims


def draw(counted: dict[str, Counts], path: Path) -> None:
    """A bar for each choice: what a rank keeps, and has at the peak; the same file every time."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "ch04"
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    labels = [f"{mode}\n{counted[mode]['compute, GFLOP']:.2f} GFLOP" for mode in MODES]
    below = torch.zeros(len(MODES))
    for part in ("parameters", "optimizer state", "gathered weights", "activations", "peak"):
        heights = torch.tensor([counted[mode][f"{part}, MiB"] for mode in MODES])
        if part == "peak":  # gradients, the block that runs again, and what is on its way
            heights -= below
        axes.bar(labels, heights, 0.5, below, label=part.replace("peak", "more at the peak"))
        below += heights
    axes.set_ylabel("MiB on rank 0")
    axes.legend(loc="upper right", ncols=2)
    figure.savefig(path, format="svg", metadata={"Date": None})


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, default="resources/corpus.txt", help="text to learn, as bytes")
    add("--context", type=int, default=128, help="bytes per window")
    add("--batch", type=int, default=12, help="windows per step, of all ranks")
    add("--width", type=int, default=128, help="size of a token's vector")
    add("--layers", type=int, default=4, help="transformer blocks")
    add("--heads", type=int, default=4, help="attention heads; 2 x heads divides --width")
    add("--dropout", type=float, default=0.0, help="share of units dropped")
    add("--steps", type=int, default=4, help="optimizer steps with each choice")
    add("--warmup", type=int, default=10, help="steps to the peak rate")
    add("--lr", type=float, default=3e-3, help="AdamW's peak learning rate")
    add("--clip", type=float, default=1.0, help="largest norm of a gradient")
    add("--seed", type=int, default=0, help="for weights, shuffling and dropout")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--compare", type=Path, help="a --json file of chapter 3's trainer: train by its flags")
    add("--plot", type=Path, help="draw the memory of each choice into this SVG file")
    add("--strict", action="store_true", help="exit 1 if an `expect:` line does not hold")
    args = parser.parse_args()
    if args.width % (2 * args.heads):
        stop(f"--width {args.width} is no multiple of 2 x --heads {args.heads}")
    if args.batch < int(os.environ.get("WORLD_SIZE", 1)):
        stop(f"each rank wants a window: type --batch {os.environ['WORLD_SIZE']}")
    return args


@record  # so that torchrun's summary names the error
def main() -> None:
    args = parse_args()
    device = join_group(args.device)
    claims_of = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(claims_of, run(args, device))  # nobody leaves while another is at work
    dist.destroy_process_group()  # not in a `finally`: section 3.1
    # DTensor's caches keep the mesh, and that the group: gloo's threads would abort Python's own end.
    os._exit(conclude(max(claims_of, key=lambda claims: claims.count(False))))


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


# Copied from train_fsdp2.compare_with_file
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
