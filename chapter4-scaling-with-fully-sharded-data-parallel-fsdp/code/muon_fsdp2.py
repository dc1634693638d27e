"""An optimizer that needs whole matrices, on weights of which each rank has some rows: what it costs.

    torchrun --nproc_per_node=4 chapter4-scaling-with-fully-sharded-data-parallel-fsdp/code/muon_fsdp2.py

On GPUs:
    torchrun --nproc_per_node=8 chapter4-scaling-with-fully-sharded-data-parallel-fsdp/code/muon_fsdp2.py --width 1024 --layers 8 --batch 16 --context 256

AdamW updates each number by itself, so shards are enough. Muon multiplies a matrix with itself. Look
at the bytes: one owner for each matrix sends 2/n of what gathering it everywhere does. Section 4.8.
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable
from typing import NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

MIB = 2**20
MOMENTUM = 0.95
Direction = Callable[[list[nn.Parameter], list[torch.Tensor]], list[torch.Tensor]]


def newton_schulz(update: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The nearest matrix whose singular values are about 1: [rows, columns] to the same.

    Jordan et al. 2024, kellerjordan.github.io/posts/muon. torch.optim.Muon does it in bfloat16; here
    it is in the update's own type, so that a comparison means something.
    """
    x = update if update.shape[0] <= update.shape[1] else update.T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x if update.shape[0] <= update.shape[1] else x.T


def in_one_process(_: list[nn.Parameter], updates: list[torch.Tensor]) -> list[torch.Tensor]:
    return [newton_schulz(update) for update in updates]


def gathered(matrices: list[nn.Parameter], shards: list[torch.Tensor]) -> list[torch.Tensor]:
    """Each matrix whole on every rank, and every rank computes it."""
    n, rank = dist.get_world_size(), dist.get_rank()
    found = []
    for p, shard in zip(matrices, shards, strict=True):
        update = DTensor.from_local(
            shard, p.device_mesh, p.placements, shape=p.shape, stride=p.stride()
        )
        whole = newton_schulz(update.full_tensor())
        chunk = -(-len(whole) // n)
        found.append(whole[rank * chunk : (rank + 1) * chunk])
    return found


def owned(matrices: list[nn.Parameter], shards: list[torch.Tensor]) -> list[torch.Tensor]:
    """The i-th of each n matrices is whole on rank i alone, which computes it for all."""
    n = dist.get_world_size()
    rank = dist.get_rank()
    found = []
    for start in range(0, len(matrices), n):
        group = matrices[start : start + n]
        mine = shards[start : start + n]
        own = group[rank] if rank < len(group) else None
        rows = [] if own is None else [chunk_of(own.shape[0], r) for r in range(n)]
        arriving = [size * own.shape[1] for size in rows] or [0] * n
        leaving = [shard.numel() for shard in mine] + [0] * (n - len(group))
        whole = mine[0].new_empty(sum(arriving))
        dist.all_to_all_single(whole, torch.cat([s.flatten() for s in mine]), arriving, leaving)
        if own is not None:
            whole = newton_schulz(whole.view(own.shape)).contiguous().flatten()
        back = mine[0].new_empty(sum(leaving))
        dist.all_to_all_single(back, whole, leaving, arriving)
        parts = back.split(leaving)
        found += [part.view(shard.shape) for part, shard in zip(parts, mine, strict=False)]
    return found


def chunk_of(rows: int, rank: int) -> int:
    """The number of rows that a rank has, as FSDP2 cuts them."""
    chunk = -(-rows // dist.get_world_size())
    return max(0, min(chunk, rows - rank * chunk))


def step(
    matrices: list[nn.Parameter],
    momenta: dict[nn.Parameter, torch.Tensor],
    direction: Direction,
    lr: float,
) -> None:
    """Muon's update with Nesterov momentum; momenta are sharded as the weights are."""
    updates = []
    for p in matrices:
        gradient = local_part(p.grad)
        momentum = momenta.setdefault(p, torch.zeros_like(gradient))
        momentum.lerp_(gradient, 1 - MOMENTUM)
        updates.append(gradient.lerp(momentum, MOMENTUM))
    for p, update in zip(matrices, direction(matrices, updates), strict=True):
        scale = 0.2 * max(p.shape) ** 0.5  # as large as AdamW's updates (arXiv:2502.16982)
        local_part(p.detach()).add_(update, alpha=-lr * scale)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def build(args: argparse.Namespace, device: torch.device, shard: bool) -> nn.Module:
    torch.manual_seed(args.seed)
    model = ResidualModel(args.width, args.layers).to(device)
    if shard:
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def matrices_of(model: nn.Module) -> list[nn.Parameter]:
    return [p for block in model.blocks for p in block.parameters() if p.ndim == 2]


class Exchanged(TorchDispatchMode):
    """Calls of collectives by kind, and the bytes that a rank receives in all of them."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if DTensor in types:  # let DTensor do it: what it sends comes back here
            return NotImplemented
        name, n = function.name(), dist.get_world_size()
        if name == "c10d::alltoall_base_":
            self.calls["all-to-all"] += 1
            self.bytes += args[0].nbytes - args[3][dist.get_rank()] * args[0].element_size()
        elif name == "_c10d_functional::all_gather_into_tensor":
            self.calls["all-gather"] += 1
            self.bytes += args[0].nbytes * (n - 1)
        elif name == "_c10d_functional::all_reduce":
            self.calls["all-reduce"] += 1
            self.bytes += 2 * args[0].nbytes * (n - 1) // n
        return function(*args, **(kwargs or {}))


def predict(name: str, matrices: list[nn.Parameter]) -> int:
    """Bytes that this rank receives in a step, from the shapes alone."""
    n, rank = dist.get_world_size(), dist.get_rank()
    if name == "gathered by all":
        return sum((n - 1) * -(-p.shape[0] // n) * p.shape[1] * 4 for p in matrices)
    total = 0
    for i, p in enumerate(matrices):
        share = chunk_of(p.shape[0], rank)
        total += (p.shape[0] - share if i % n == rank else share) * p.shape[1] * 4
    return total


def train(
    args: argparse.Namespace, device: torch.device, direction: Direction | None
) -> tuple[nn.Module, Exchanged]:
    """Three steps of Muon for the matrices and AdamW for the rest; None: torch's own Muon."""
    shard = direction is not in_one_process
    rank, n = (dist.get_rank(), dist.get_world_size()) if shard else (0, 1)
    model = build(args, device, shard)
    matrices = matrices_of(model)
    rest = [p for p in model.parameters() if all(p is not q for q in matrices)]
    adamw = torch.optim.AdamW(rest, lr=args.lr)
    muon = torch.optim.Muon(matrices, lr=args.lr, weight_decay=0, adjust_lr_fn="match_rms_adamw")
    momenta: dict[nn.Parameter, torch.Tensor] = {}
    draw = torch.Generator().manual_seed(args.seed)
    for _ in range(3):
        tokens = torch.randint(257, (args.batch, args.context + 1), generator=draw).to(device)
        window = tokens.tensor_split(n)[rank]
        logits = model(window[:, :-1])
        loss = F.cross_entropy(logits, window[:, 1:].flatten(), reduction="sum")
        (loss * n / tokens[:, 1:].numel()).backward()
        with Exchanged() as exchanged:
            if direction is None:
                muon.step()
            else:
                step(matrices, momenta, direction, args.lr)
        adamw.step()
        model.zero_grad()
    return model, exchanged


def difference(model: nn.Module, reference: nn.Module) -> float:
    """Largest of a weight on this rank, relative to the largest weight of its matrix."""
    apart = []
    for p, q in zip(matrices_of(model), matrices_of(reference), strict=True):
        part = distribute_tensor(q.detach(), p.device_mesh, p.placements, src_data_rank=None)
        if local_part(p).numel():
            apart.append((local_part(p.detach()) - local_part(part)).abs().max() / q.abs().max())
    return torch.stack(apart).max().item() if apart else 0.0


def run(args: argparse.Namespace, device: torch.device) -> list[bool | None]:
    n = dist.get_world_size()
    reference, _ = train(args, device, in_one_process)
    matrices = matrices_of(reference)
    whole = sum(p.nbytes for p in matrices)
    ranks = f"{n} rank{'s' * (n > 1)} on {device.type}"
    say(f"{ranks}: {len(matrices)} matrices, {whole / MIB:.2f} MiB; AdamW would exchange nothing")
    say(
        f"{'a step of Muon':<18}{'calls':>7}{'MiB received':>15}{'predicted':>11}{'off one process':>18}"
    )
    ways: dict[str, Direction | None] = {
        "torch.optim.Muon": None,
        "gathered by all": gathered,
        "one owner each": owned,
    }
    off_bytes, apart = 0, 0.0
    for name, direction in ways.items():
        model, exchanged = train(args, device, direction)
        difference_here = torch.tensor(difference(model, reference), device=device)
        dist.all_reduce(difference_here, op=dist.ReduceOp.MAX)
        expected = "" if direction is None else f"{predict(name, matrices) / MIB:.3f}"
        row = f"{name:<18}{sum(exchanged.calls.values()):>7}{exchanged.bytes / MIB:>15.3f}"
        say(f"{row}{expected:>11}{difference_here.item():>18.1e}")
        if direction is not None:
            off_bytes += abs(exchanged.bytes - predict(name, matrices))
            apart = max(apart, difference_here.item())
    return [
        check("max |weight - one process's| of our two", apart, 1e-4),
        check("bytes of our two, off what is predicted", off_bytes, 0),
    ]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=66, help="of a token's vector")
    parser.add_argument("--layers", type=int, default=4, help="blocks")
    parser.add_argument("--batch", type=int, default=9, help="sequences per step, of all ranks")
    parser.add_argument("--context", type=int, default=16, help="tokens per sequence")
    parser.add_argument("--lr", type=float, default=5e-3, help="learning rate of both optimizers")
    parser.add_argument("--seed", type=int, default=0, help="for weights and tokens")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    return parser.parse_args()


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


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
