r"""DDP, FSDP2 and ZeRO 1 to 3 train one model in one run: same losses; what each holds, sends and takes.

    torchrun --nproc_per_node=2 chapter5-deepspeed-and-zero-optimization/code/benchmark_zero_vs_fsdp.py \
        --plot chapter5-deepspeed-and-zero-optimization/figures/zero_vs_fsdp.svg

On GPUs:
    torchrun --nproc_per_node=8 chapter5-deepspeed-and-zero-optimization/code/benchmark_zero_vs_fsdp.py \
        --width 2048 --layers 12 --context 256 --batch 32 --steps 50 --json zero_vs_fsdp.json

Look at what a rank holds and sends, and at the calls in which it sends that. The times are those of
ranks that share two cores and no network: they tell of calls and Python, not of links. Section 5.8.
"""

import argparse
import json
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

import deepspeed
import torch
import torch._dynamo  # before the group, or gloo's threads outlive it: section 3.8
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

CLIP = 1.0
WARM_UP = 3  # steps: ZeRO 3 learns in the first ones in which order the weights come
MIB = 2**20
# Made for billions of parameters: else a small model stays whole, or is gathered at once (section 5.3).
THRESHOLDS = ["param_persistence_threshold", "max_live_parameters", "max_reuse_distance"]
THRESHOLDS += ["prefetch_bucket_size"]


class TorchTrainer:
    """Model and AdamW, in the way of an engine."""

    def __init__(self, model: nn.Module, lr: float):
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def update(self) -> torch.Tensor:
        """Change the weights; the norm of the gradients before they were clipped."""
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def gradients(self) -> int:
        return held([p.grad for p in self.model.parameters()])

    def state(self) -> int:
        moments = [t for state in self.optimizer.state.values() for t in state.values()]
        return held([*self.model.parameters(), *moments])


class ZeroTrainer:
    """DeepSpeed's engine, at one stage."""

    def __init__(self, model: nn.Module, args: argparse.Namespace, stage: int):
        zero = {"stage": stage, "reduce_bucket_size": 5_000_000}
        config = {
            "train_batch_size": args.batch,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": CLIP,
            "optimizer": {"type": "AdamW", "params": {"lr": args.lr, "torch_adam": True}},
            "zero_optimization": zero | {f"stage3_{name}": 0 for name in THRESHOLDS},
        }
        parameters = list(model.parameters())
        made = deepspeed.initialize(model=model, model_parameters=parameters, config=config)
        self.model = made[0]  # the engine

    def backward(self, loss: torch.Tensor) -> None:
        self.model.backward(loss)

    def update(self) -> torch.Tensor:
        self.model.step()
        return torch.as_tensor(self.model.get_global_grad_norm())

    def gradients(self) -> int:
        return gradients_held(self.model)

    def state(self) -> int:
        return sum(state_held(self.model))


Trainer = TorchTrainer | ZeroTrainer


def held(tensors: list[torch.Tensor]) -> int:
    """Bytes that these tensors, or this rank's shards of them, keep alive."""
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum(storages(local).values())


def seeded_model(args: argparse.Namespace, device: torch.device) -> nn.Module:
    torch.manual_seed(args.seed)
    return ResidualModel(args.width, args.layers).to(device)


def trainers(args: argparse.Namespace, device: torch.device) -> dict[str, Trainer]:
    """Five models with the same first weights."""
    ddp_model = DistributedDataParallel(seeded_model(args, device), gradient_as_bucket_view=True)
    fsdp_model = seeded_model(args, device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in fsdp_model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(fsdp_model, mesh=mesh)
    found = {"DDP": TorchTrainer(ddp_model, args.lr), "FSDP2": TorchTrainer(fsdp_model, args.lr)}
    for stage in (1, 2, 3):
        found[f"ZeRO {stage}"] = ZeroTrainer(seeded_model(args, device), args, stage)
    return found


def predict(name: str, args: argparse.Namespace) -> tuple[float, float]:
    """Bytes that this rank holds, and sends in a step on a ring, in fp32, from the model's shapes."""
    n, rank = dist.get_world_size(), dist.get_rank()
    with torch.device("meta"):
        named = list(ResidualModel(args.width, args.layers).named_parameters())
    sizes = [p.numel() for _, p in named]
    total = sum(sizes)
    whole = 4 * (n - 1) / n  # a reduce-scatter or an all-gather sends it for each number
    steps = 4 * len(sizes)  # bytes: AdamW counts the steps of each tensor
    if name == "DDP":
        return 16 * total + steps, 2 * whole * total
    if name == "FSDP2":  # rows are cut; weights and gradients are padded, moments are not
        padded, moments, travels = 0, 0, 0.0
        for key, p in named:
            chunk = -(-len(p) // n)
            row = p.numel() // len(p)
            padded += chunk * row
            moments += 2 * max(0, min(chunk, len(p) - rank * chunk)) * row
            # Blocks are gathered twice, the root is kept from forward to backward.
            travels += (3 if key.startswith("blocks.") else 2) * chunk * row * n
        return 8 * padded + 4 * moments + steps, whole * travels
    if name == "ZeRO 3":  # each tensor is cut; 4 bytes more than FSDP2 for a copy of the weights
        part = sum(-(-size // n) for size in sizes)
        return 20 * part + 4, 3 * whole * part * n
    part = 2 * -(-total // (2 * n))  # of one flat parameter
    first = rank * part
    gradients = max(0, min(part, first + part - total))  # padding
    start = 0
    for size in sizes:  # the gradient of a tensor that is cut is kept whole
        gradients += size if start < first + part and start + size > first else 0
        start += size
    return 4 * part * n + 4 * gradients + 12 * part + 4, whole * (2 * total + part * n)


def one_process(
    args: argparse.Namespace, tokens: torch.Tensor, device: torch.device
) -> torch.Tensor:
    """Losses and gradient norms of the same steps by one process on whole batches: [2, 1, steps]."""
    reference = TorchTrainer(seeded_model(args, device), args.lr)
    steps = []
    for batch in tokens:
        loss = F.cross_entropy(reference.model(batch[:, :-1]), batch[:, 1:].flatten())
        loss.backward()
        steps.append([loss.item(), reference.update().item()])
    return torch.tensor(steps).T.unsqueeze(1)


def account(trainer: Trainer, batch: torch.Tensor) -> tuple[int, float, int]:
    """Bytes of weights, gradients and optimizer state on this rank; bytes sent, and in how many calls."""
    with Wire() as wire:
        loss = part_of_loss(trainer.model, batch)
        trainer.backward(loss * dist.get_world_size())
        gradients = trainer.gradients()
        trainer.update()
    sent = sum(wire.bytes.values())
    return gradients + trainer.state(), sent, sum(wire.calls.values())


def take_turns(made: dict[str, Trainer], tokens: torch.Tensor) -> torch.Tensor:
    """Train all of them; losses, gradient norms and seconds: [3, trainers, steps]."""
    n = dist.get_world_size()
    losses, norms, seconds = torch.zeros(3, len(made), len(tokens), device=tokens.device)
    for step, batch in enumerate(tokens):
        for i in range(len(made)):  # in turn, so that a slow moment hits all alike,
            which = (i + step) % len(made)  # and each is the first one now and then
            trainer = list(made.values())[which]
            dist.barrier()
            start = time.perf_counter()
            loss = part_of_loss(trainer.model, batch)
            trainer.backward(loss * n)  # gradients come out as a mean over the ranks
            norms[which, step] = trainer.update()
            synchronize(tokens.device)
            seconds[which, step] = time.perf_counter() - start
            losses[which, step] = loss.detach()
    dist.all_reduce(losses)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)  # a step is over when its slowest rank is
    return torch.stack([losses, norms, seconds]).cpu()


def run(args: argparse.Namespace, device: torch.device) -> list[bool | None]:
    # Else DeepSpeed compiles C++ of its own on a CPU, and a build that is killed blocks the next.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("ERROR")
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # of DeepSpeed's calls
    data = read_bytes(args.data, at_least=args.context * args.batch * (args.steps + 1))
    tokens = data.unfold(0, args.context + 1, args.context)[: args.batch * args.steps]
    tokens = tokens.unflatten(0, (args.steps, args.batch)).to(device)  # [steps, batch, context + 1]
    made = trainers(args, device)
    *found, seconds = take_turns(made, tokens)
    away = (torch.stack(found) / one_process(args, tokens, device) - 1).abs().amax((1, 2))

    n = dist.get_world_size()
    parameters = sum(p.numel() for p in seeded_model(args, torch.device("meta")).parameters())
    say(f"{n} rank{'s' * (n > 1)} on {device.type}: {parameters:,} parameters, {args.steps} steps")
    say(f"{'':<8}{'held, MiB':>20}{'sent in a step, MiB':>23}{'':>7}{'ms of a step':>14}")
    counts = f"{'predicted':>11}{'counted':>9}"
    say(f"{'':<8}{counts}{'predicted':>14}{'counted':>9}{'calls':>7}{'median':>8}  quartiles")
    table, held_off, sent_off = {}, 0.0, 0.0
    for (name, trainer), times in zip(made.items(), 1e3 * seconds, strict=True):
        state, sent, calls = account(trainer, tokens[0])
        held_guess, sent_guess = predict(name, args)
        low, median, high = quartiles(times[WARM_UP:].tolist())
        cells = f"{held_guess / MIB:>11.3f}{state / MIB:>9.3f}{sent_guess / MIB:>14.3f}"
        cells += f"{sent / MIB:>9.3f}{calls:>7}{median:>8.1f}"
        say(f"{name:<8}{cells}  {low:.1f}-{high:.1f}")
        table[name] = {"held": state, "sent": sent, "calls": calls, "ms": [low, median, high]}
        held_off = max(held_off, abs(state - held_guess))
        sent_off = max(sent_off, abs(sent - sent_guess))
    if dist.get_rank() == 0 and args.json:
        args.json.write_text(json.dumps({"ranks": n, "parameters": parameters, **table}, indent=1))
    if dist.get_rank() == 0 and args.plot:
        draw(table, args.plot)
    sharded = min(table[name]["ms"][1] for name in ("FSDP2", "ZeRO 3"))
    ratio = sharded / table["DDP"]["ms"][1]
    return [
        check("max |loss / one process's - 1|", away[0], 1e-5),
        check("max |gradient norm / one process's - 1|", away[1], 1e-4),
        check("error of what a rank holds, bytes", held_off, 0),
        check("error of what a rank sends, bytes", sent_off, 100),  # norms and flags
        expect("a step of FSDP2 or ZeRO 3 / of DDP", ratio, 1, args.strict, at_least=True),
    ]


def draw(table: dict[str, dict], path: Path) -> None:
    """What a rank holds, what it sends, and how long a step lasts."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "zero_vs_fsdp"  # else its names differ from run to run
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    axes = figure.subplots(1, 3)
    axes[0].bar(list(table), [row["held"] / MIB for row in table.values()], 0.6)
    axes[1].bar(list(table), [row["sent"] / MIB for row in table.values()], 0.6)
    low, median, high = torch.tensor([row["ms"] for row in table.values()]).T
    spread = torch.stack([median - low, high - median])
    axes[2].errorbar(list(table), median, spread, fmt="o", capsize=4)
    axes[2].set_ylim(0)
    titles = ("held, MiB", "sent in a step, MiB", "a step, ms: median, quartiles")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.tick_params(axis="x", rotation=30, labelsize=8)
    figure.savefig(path, format="svg", metadata={"Date": None})


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, default="resources/corpus.txt", help="text to learn, as bytes")
    add("--context", type=int, default=64, help="bytes per window")
    add("--batch", type=int, default=12, help="windows per step, of all ranks")
    add("--width", type=int, default=160, help="size of a token's vector")
    add("--layers", type=int, default=3, help="blocks")
    add("--steps", type=int, default=13, help=f"optimizer steps; the first {WARM_UP} are not timed")
    add("--lr", type=float, default=1e-3, help="AdamW's learning rate")
    add("--seed", type=int, default=0, help="for weights")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--json", type=Path, help="also write the table to this file")
    add("--plot", type=Path, help="draw the table into this SVG file")
    add("--strict", action="store_true", help="exit 1 if an `expect:` line does not hold")
    args = parser.parse_args()
    n = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch % n:
        stop(f"{n} ranks do not divide --batch {args.batch}: start another number of ranks")
    if args.steps <= WARM_UP:
        stop(f"the first {WARM_UP} steps are not timed: type --steps {WARM_UP + 1} or more")
    return args


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


# Copied from train.storages
def storages(tensors: Iterable[torch.Tensor | None]) -> dict[int, int]:
    """Bytes by address of what the tensors keep alive, each storage once."""
    found = {}
    for tensor in tensors:
        if tensor is not None and tensor.numel():
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


# Copied from train.gradients_held
def gradients_held(engine: deepspeed.DeepSpeedEngine) -> int:
    """Bytes of gradients on this rank, in whichever form this stage has them."""
    optimizer = engine.optimizer
    tensors = [p.grad for p in engine.module.parameters()]
    if engine.zero_optimization_stage() == 3:
        tensors.append(optimizer.grad_partitions_flat_buffer)
    elif engine.zero_optimization_stage() > 0:
        for groups in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
            tensors += [t for group in groups.values() for t in group or ()]
    return sum(storages(tensors).values())


# Copied from train.state_held
def state_held(engine: deepspeed.DeepSpeedEngine) -> tuple[int, int]:
    """Bytes of weights, and of optimizer state with the weights' fp32 copy, between two steps."""
    parameters = list(engine.module.parameters())
    weights = storages([getattr(p, "ds_tensor", p) for p in parameters])
    optimizer = engine.optimizer
    base = getattr(optimizer, "optimizer", optimizer)  # PyTorch's, inside DeepSpeed's
    states = [t for state in base.state.values() for t in state.values() if torch.is_tensor(t)]
    states += [p for group in base.param_groups for p in group["params"]]
    states += getattr(optimizer, "fp32_partitioned_groups_flat", [])
    both = storages(states) | weights
    return sum(weights.values()), sum(both.values()) - sum(weights.values())


# Copied from rehearse_1024_ranks.Wire
class Wire(TorchDispatchMode):
    """Counts collectives by kind, and what a rank receives in each by a ring's cost (section 2.3)."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()
        self.bytes = Counter()

    def note(self, kind: str, of_whole: float, ranks: int) -> None:
        if ranks > 1:
            self.calls[kind] += 1
            self.bytes[kind] += of_whole * (ranks - 1) / ranks

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        if name == "c10d::_allgather_base_":
            self.note("all-gather", args[0].nbytes, args[0].numel() // args[1].numel())
        elif name == "c10d::_reduce_scatter_base_":
            self.note("reduce-scatter", args[1].nbytes, args[1].numel() // args[0].numel())
        elif name == "c10d::allreduce_":
            ranks = dist.ProcessGroup.unbox(args[1]).size()
            self.note("all-reduce", 2 * sum(t.nbytes for t in args[0]), ranks)
        elif name == "_c10d_functional::all_reduce":
            self.note("all-reduce", 2 * args[0].nbytes, _resolve_process_group(args[2]).size())
        return function(*args, **(kwargs or {}))


# Copied from fsdp_strategies.part_of_loss
def part_of_loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """This rank's part of the batch's mean loss: [batch, context + 1], of which every n-th is its own."""
    window = tokens[dist.get_rank() :: dist.get_world_size()]
    logits = model(window[:, :-1])
    loss = F.cross_entropy(logits, window[:, 1:].flatten(), reduction="sum")
    return loss / tokens[:, 1:].numel()


# Copied from fsdp_from_scratch.ResidualModel
class ResidualModel(nn.Module):
    """A vocabulary of 257, which no number of ranks above one divides, and biases that are not zero."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        self.embed = nn.Embedding(257, width)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(layers))
        self.head = nn.Linear(width, 257)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:  # [batch, seq] -> [batch x seq, 257]
        x = self.embed(tokens.flatten())
        for block in self.blocks:
            x = block(x)
        return self.head(x)


# Copied from fsdp_from_scratch.ResidualBlock
class ResidualBlock(nn.Module):
    """x + down(relu(up(x))): [tokens, width] to the same."""

    def __init__(self, width: int):
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu())


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


# Copied from ch01_single_gpu_baseline.synchronize
def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


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
