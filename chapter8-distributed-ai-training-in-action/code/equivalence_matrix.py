r"""One training in ten layouts: how far its losses, gradients and weights are from one process's.

    python chapter8-distributed-ai-training-in-action/code/equivalence_matrix.py \
        --plot chapter8-distributed-ai-training-in-action/figures/equivalence_matrix.svg

On GPUs:
    python chapter8-distributed-ai-training-in-action/code/equivalence_matrix.py --width 320 --hidden 1024 --context 256

Every layout is a group of fresh processes that cut the trainer's model with the trainer's functions.
Look at the last three rows, mistakes made on purpose: which column shows each of them? Section 8.3.
"""

import argparse
import os
import socket
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import parallel
import torch
import torch._dynamo  # before the group, or gloo's threads outlive it: section 3.8
import torch.distributed as dist
import torch.nn.functional as F
from launch import check, conclude, join_group, say, stop
from model import Config, Llama
from optimizer import make_optimizers
from torch import nn
from torch.distributed.tensor import DTensor

if torch.accelerator.device_count() == 0:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed says what it has not found
try:
    import deepspeed
    import deepspeed.runtime.zero.muon.muon_optimizer  # here once, or each rank would, for a second
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
except ImportError:  # it is for Linux
    deepspeed = None

BOUND = 1e-5
CLIP = 0.1  # below every gradient's norm, so that each step is clipped
COLUMNS = ("loss", "gradients", "weights")


@dataclass(frozen=True)
class Layout:
    """Ranks of each kind; ZeRO's stage instead of the trainer's own sharding; a mistake to make."""

    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1
    sequence_parallel: bool = True
    zero: int = 0
    mistake: str = ""
    shows_in: str = ""  # the column in which the mistake has to show

    @property
    def ranks(self) -> int:
        return self.dp_replicate * self.dp_shard * self.tp


LAYOUTS = {
    "DDP": Layout(dp_replicate=3),
    "FSDP2": Layout(dp_shard=3),
    "hybrid": Layout(dp_replicate=2, dp_shard=2),
    "TP": Layout(tp=2, sequence_parallel=False),
    "TP with SP": Layout(tp=2),
    "FSDP2 x TP": Layout(dp_shard=2, tp=2),
    "hybrid x TP": Layout(dp_replicate=2, dp_shard=2, tp=2),
    "ZeRO 1": Layout(dp_shard=2, zero=1),
    "ZeRO 2": Layout(dp_shard=2, zero=2),
    "ZeRO 3": Layout(dp_shard=2, zero=3),
    "sum for mean": Layout(dp_replicate=2, mistake="sum", shows_in="gradients"),
    "same windows": Layout(dp_replicate=2, mistake="windows", shows_in="loss"),
    "norms apart": Layout(tp=2, mistake="norms", shows_in="gradients"),
}
Tensors = dict[str, torch.Tensor]


class TorchTrainer:
    """The trainer's model in one layout, its optimizer, and its clipping."""

    def __init__(self, layout: Layout, args: argparse.Namespace, device: torch.device):
        if layout.mistake == "norms":  # each rank keeps what its own part of the sequence gives
            parallel.SequenceParallel = lambda **_: parallel.Replicated()
        mesh = parallel.make_mesh(device.type, layout.dp_replicate, layout.dp_shard, layout.tp)
        self.rank, self.size = parallel.data_parallel(mesh)
        if layout.ranks == 1:
            self.model = plain_model(args, device)
        else:
            with torch.device("meta"):
                model = Llama(sizes(args))
            self.model = parallel.parallelize(model, mesh, layout.sequence_parallel, seed=args.seed)
        (self.optimizer,) = make_optimizers(self.model, "adamw", args.lr)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> torch.Tensor:
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return whole(norm)

    def gradient(self, p: nn.Parameter) -> torch.Tensor:
        return whole(p.grad).clone()

    def weight(self, p: nn.Parameter) -> torch.Tensor:
        return whole(p.detach())


class ZeroTrainer:
    """The same model, optimizer and clipping in DeepSpeed's engine, at one stage."""

    def __init__(self, layout: Layout, args: argparse.Namespace, device: torch.device):
        # Else DeepSpeed compiles C++ of its own on a CPU, and a build that is killed blocks the next.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.utils.logger.setLevel("ERROR")
        warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # of its calls
        config = {
            "train_micro_batch_size_per_gpu": 1,  # it wants one; a rank gives as many as it has
            "gradient_clipping": CLIP,
            "zero_optimization": {"stage": layout.zero, "stage3_param_persistence_threshold": 0},
        }
        model = plain_model(args, device)
        (optimizer,) = make_optimizers(model, "adamw", args.lr)
        made = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        self.model = made[0]  # the engine
        self.backward = self.model.backward
        self.gradient = safe_get_full_grad
        self.weight = safe_get_full_fp32_param
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def step(self) -> torch.Tensor:
        self.model.step()
        return torch.as_tensor(self.model.get_global_grad_norm())


def sizes(args: argparse.Namespace) -> Config:
    """259 tokens, which no two or three ranks divide; two layers, four heads, two for keys."""
    return Config(259, args.width, 2, 4, 2, args.hidden, args.context)


def plain_model(args: argparse.Namespace, device: torch.device) -> Llama:
    """The whole model on one rank, with the weights of every layout."""
    model = Llama(sizes(args)).to(device)
    parallel.init_weights(model, args.seed)
    return model


def named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters by the model's own names: DDP and DeepSpeed put `module.` before them."""
    return [(name.removeprefix("module."), p) for name, p in model.named_parameters()]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(layout: Layout, args: argparse.Namespace, device: torch.device) -> list[Tensors]:
    """Each step's loss; each step's gradients and their norm; the weights after all steps."""
    trainer = (ZeroTrainer if layout.zero else TorchTrainer)(layout, args, device)
    n = trainer.size
    first = 0 if layout.mistake == "windows" else trainer.rank
    factor = n * n if layout.mistake == "sum" else n  # the layouts divide by n
    losses = {}
    gradients = {}
    text = read_bytes(args.data, at_least=args.steps * args.batch * args.context + 1).to(device)
    windows = text.unfold(0, args.context + 1, args.context)  # each of context + 1 bytes
    for step, batch in enumerate(windows.split(args.batch)[: args.steps]):
        window = batch[first::n]  # [share, context + 1]: of five windows three, two or one
        logits = trainer.model(window[:, :-1])  # [share, context, vocabulary]
        total = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten(), reduction="sum")
        loss = total / batch[:, 1:].numel()  # this rank's part of the mean over all tokens
        trainer.backward(factor * loss)
        gradients |= {f"{name} {step}": trainer.gradient(p) for name, p in named(trainer.model)}
        gradients[f"norm {step}"] = trainer.step()
        parts = loss.detach()
        dist.all_reduce(parts)
        losses[f"{step}"] = parts / layout.tp  # the ranks of a TP group had the same part
    return [losses, gradients, {name: trainer.weight(p) for name, p in named(trainer.model)}]


def one_rank(rank: int, layout: Layout, args: argparse.Namespace, port: int, path: str) -> None:
    """What a launcher and a script do; rank 0 leaves what it found in a file."""
    n = str(layout.ranks)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": n}
    os.environ |= {"LOCAL_WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    found = train(layout, args, join_group(args.device))
    if rank == 0:
        torch.save(found, path)
    dist.barrier()
    dist.destroy_process_group()


def in_processes(layout: Layout, args: argparse.Namespace) -> list[Tensors]:
    """Train in fresh processes, which a fork makes at once: it has torch. CUDA does not survive one."""
    forks = sys.platform == "linux" and torch.accelerator.device_count() == 0
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/found.pt"
        work = (layout, args, free_port(), path)
        method = "fork" if forks else "spawn"
        torch.multiprocessing.start_processes(one_rank, work, layout.ranks, start_method=method)
        return torch.load(path, map_location="cpu", weights_only=True)


def largest(found: Tensors, reference: Tensors) -> float:
    """The largest difference of any number; NaN where there is one."""
    differences = [(found[name] - right).abs().max() for name, right in reference.items()]
    return torch.stack(differences).max().item()


def run(args: argparse.Namespace) -> list[bool | None]:
    reference = in_processes(Layout(), args)
    scale = [torch.stack([t.abs().max() for t in part.values()]).max() for part in reference]
    titles = "".join(f"{column:>11} " for column in COLUMNS)
    say(f"{args.steps} steps of {args.batch} windows on {args.device}, float32")
    say(f"{'largest difference in':<22}ranks{titles}")
    say(f"{'(largest value)':<22}{1:>5}{''.join(f'{value:>11.2f} ' for value in scale)}")
    table = {}
    for name in args.layouts:
        layout = LAYOUTS[name]
        found = in_processes(layout, args)
        table[name] = [largest(*pair) for pair in zip(found, reference, strict=True)]
        cells = "".join(f"{v:>11.1e}{' ' if v <= BOUND else '!'}" for v in table[name])
        say(f"{name:<22}{layout.ranks:>5}{cells}")
    if args.plot:
        draw(table, args.plot)
    claims = []
    right = torch.tensor([row for name, row in table.items() if not LAYOUTS[name].mistake])
    for column, values in zip(COLUMNS, right.T, strict=True) if len(right) else ():
        worst = values.max().item()
        claims.append(check(f"{column}, largest difference in {len(right)} layouts", worst, BOUND))
    for name, row in table.items():
        if column := LAYOUTS[name].shows_in:
            value = row[COLUMNS.index(column)]
            claims.append(check(f"{name}: shows in {column}", value, 100 * BOUND, at_least=True))
    return claims


def draw(table: dict[str, list[float]], path: Path) -> None:
    """A row for each layout, a mark for each column."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "equivalence"  # else its names differ from run to run
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for i, column in enumerate(COLUMNS):
        values = [max(row[i], 1e-9) for row in table.values()]  # a zero has no place on a log scale
        axes.plot(values, list(table), "o^s"[i], label=column, alpha=0.8)
    axes.axvline(BOUND, color="grey", linestyle="--", label=f"bound, {BOUND:g}")
    axes.set_xscale("log")
    axes.set_xlabel("largest difference from one process")
    axes.invert_yaxis()
    axes.legend(loc="upper right")
    figure.savefig(path, format="svg", metadata={"Date": None})


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="rows of the table")
    add("--data", type=Path, default="resources/corpus.txt", help="text to learn, as bytes")
    add("--context", type=int, default=18, help="bytes per window")
    add("--batch", type=int, default=5, help="windows per step, of all ranks")
    add("--width", type=int, default=40, help="size of a token's vector")
    add("--hidden", type=int, default=54, help="units between the two products of SwiGLU")
    add("--steps", type=int, default=3, help="optimizer steps")
    add("--lr", type=float, default=1e-3, help="AdamW's learning rate")
    add("--seed", type=int, default=0, help="for weights")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--plot", type=Path, help="draw the table into this SVG file")
    args = parser.parse_args()
    for name in ("context", "batch", "width", "hidden", "steps"):
        if getattr(args, name) < 1:
            stop(f"--{name} {getattr(args, name)}: type 1 or more")
    if args.width % 8 or args.hidden % 2 or args.context % 2:  # four heads on two ranks, in pairs
        stop("--width has to divide by 8, --hidden and --context by 2")
    if not deepspeed:
        args.layouts = [name for name in args.layouts if not LAYOUTS[name].zero]
    ranks = max(LAYOUTS[name].ranks for name in args.layouts)
    gpus = torch.accelerator.device_count()
    if args.device == "auto":  # the same for all rows
        args.device = "cpu" if gpus < ranks else torch.accelerator.current_accelerator().type
    if args.device != "cpu" and gpus < ranks:
        stop(f"{ranks} ranks, but {gpus} GPUs here: type --device cpu, or fewer --layouts")
    return args


def main() -> None:
    args = parse_args()
    try:
        sys.exit(conclude(run(args)))
    except torch.multiprocessing.ProcessExitedException as error:
        sys.exit(2 if error.exit_code == 2 else 1)  # a rank has said why


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


# Copied from vllm_server.free_port
def free_port() -> int:
    """A port of 127.0.0.1 that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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


if __name__ == "__main__":
    main()
