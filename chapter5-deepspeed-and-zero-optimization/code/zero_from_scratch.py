"""ZeRO 1, 2 and 3 by hand around AdamW: one process's numbers, the paper's bytes, and what accumulation costs.

    torchrun --nproc_per_node=2 chapter5-deepspeed-and-zero-optimization/code/zero_from_scratch.py

On GPUs:
    torchrun --nproc_per_node=8 chapter5-deepspeed-and-zero-optimization/code/zero_from_scratch.py --width 1024 --layers 8 --batch 64 --context 256 --bucket 10000000

Look at the rows of bytes per parameter beside the paper's formulas, and at the rows of what is sent:
more micro batches in a step cost ZeRO 1 nothing, ZeRO 2 one unit each, ZeRO 3 three. Section 5.3.
"""

import argparse
import functools
import os
import sys
import warnings
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.utils._python_dispatch import TorchDispatchMode


class Stage0:
    """DDP without overlap, on flat tensors: weights, gradients, AdamW's state whole on each rank.

    Here and below a gradient is a sum over ranks, and a loss a rank's part of the whole batch's mean.
    The stages: Rajbhandari et al. 2020 (arXiv:1910.02054), section 5.
    """

    def __init__(self, model: nn.Module, bucket: int):
        self.n = dist.get_world_size()
        self.rank = dist.get_rank()
        self.parameters = list(model.parameters())
        self.sizes = [p.numel() for p in self.parameters]
        self.passing = 0  # most bytes that were whole for a moment only
        self.shard(model, bucket)
        # In 16 bits the optimizer has weights of its own, in fp32: K = 12 in the paper.
        self.master = self.part.float() if self.part.itemsize == 2 else self.part
        self.optimizer = torch.optim.AdamW([self.master], lr=1e-2)

    def shard(self, model: nn.Module, bucket: int) -> None:
        """Make the parameters views of one flat tensor, and choose the part that this rank updates."""
        self.weights = self.flatten([p.detach() for p in self.parameters])  # [padded]
        for p, view in zip(self.parameters, self.views(self.weights), strict=True):
            p.data = view
        self.part = self.part_of(self.weights)
        self.keep_gradients(bucket)

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        parts = flat[: sum(self.sizes)].split(self.sizes)
        return [part.view(p.shape) for part, p in zip(parts, self.parameters, strict=True)]

    def flatten(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        flat = torch.cat([t.flatten() for t in tensors])
        return F.pad(flat, (0, -len(flat) % self.n))

    def part_of(self, flat: torch.Tensor) -> torch.Tensor:
        return flat

    def share_of(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """This rank's part of tensors of the parameters' shapes."""
        return self.part_of(self.flatten(tensors))

    def keep_gradients(self, bucket: int) -> None:
        self.gradients = torch.zeros_like(self.weights)
        for p, view in zip(self.parameters, self.views(self.gradients), strict=True):
            p.grad = view  # backward adds to it

    def reduce(self) -> torch.Tensor:
        """After a step's last backward: the whole batch's gradient of this rank's part."""
        dist.all_reduce(self.gradients)
        return self.gradients

    def update(self, gradient: torch.Tensor) -> None:
        self.master.grad = gradient.to(self.master.dtype)
        self.optimizer.step()
        self.master.grad = None
        if self.master is not self.part:
            self.part.copy_(self.master)
        self.gradients.zero_()
        self.share_weights()

    def share_weights(self) -> None:
        pass  # each rank has updated them all


class Stage1(Stage0):
    """P_os: a rank updates its part of the weights, and has the optimizer's state for that alone."""

    def part_of(self, flat: torch.Tensor) -> torch.Tensor:
        return flat.chunk(self.n)[self.rank]

    def reduce(self) -> torch.Tensor:
        total = torch.empty_like(self.part)
        dist.reduce_scatter_single(total, self.gradients)
        return total

    def share_weights(self) -> None:
        dist.all_gather_single(self.weights, self.part)


class Stage2(Stage1):
    """P_os+g: gradients go to their owners while backward runs, a bucket at a time, and are freed."""

    def keep_gradients(self, bucket: int) -> None:
        self.gradients = torch.zeros_like(self.part)
        self.bucket = self.weights.new_empty(max(bucket, *self.sizes))
        self.first = self.last = 0  # the bucket's place in the flat gradient; it fills from its end
        start = 0
        for p in self.parameters:
            p.register_post_accumulate_grad_hook(functools.partial(self.on_gradient, start))
            start += p.numel()

    def on_gradient(self, start: int, p: nn.Parameter) -> None:
        """Autograd calls this when a gradient is complete: mostly the one before the last one."""
        end = start + p.numel()
        whole = self.bucket.nbytes + sum(
            q.grad.nbytes for q in self.parameters if q.grad is not None
        )
        self.passing = max(self.passing, whole)
        if end != self.first or self.last - start > len(self.bucket):
            self.empty_bucket()
            self.last = end
        self.first = start
        offset = len(self.bucket) - self.last
        self.bucket[offset + start : offset + end] = p.grad.flatten()
        p.grad = None

    def empty_bucket(self) -> None:
        """Cut it where parts begin, and add each piece up at its owner."""
        size = len(self.part)
        offset = len(self.bucket) - self.last
        for owner in range(self.n):
            low = max(self.first, owner * size)
            high = min(self.last, (owner + 1) * size)
            if low < high:
                piece = self.bucket[offset + low : offset + high]
                dist.reduce(piece, dst=owner)
                if owner == self.rank:
                    self.gradients[low - owner * size : high - owner * size] += piece
        self.first = self.last = 0

    def reduce(self) -> torch.Tensor:
        self.empty_bucket()
        return self.gradients


@dataclass
class Cut:
    """A parameter at stage 3: whole, [padded], while it is needed; of it this rank's part."""

    whole: torch.Tensor
    weights: torch.Tensor  # [padded / ranks]
    gradients: torch.Tensor  # [padded / ranks]


class Stage3(Stage0):
    """P_os+g+p: a module's weights are whole while it computes; each parameter is cut by itself.

    Section 4.2 has the same with larger units and with prefetch, and says why the storage may vanish.
    """

    def shard(self, model: nn.Module, bucket: int) -> None:
        self.part = self.share_of([p.detach() for p in self.parameters])
        self.gradients = torch.zeros_like(self.part)
        counts = [-(-size // self.n) for size in self.sizes]
        parts = zip(self.part.split(counts), self.gradients.split(counts), strict=True)
        self.cut = {}
        for p, (weights, gradients) in zip(self.parameters, parts, strict=True):
            whole = weights.new_empty(len(weights) * self.n)
            p.data = whole[: p.numel()].view(p.shape)
            self.cut[p] = Cut(whole, weights, gradients)
            self.free(p)
            p.register_post_accumulate_grad_hook(self.on_gradient)
        for module in model.modules():
            module.register_forward_pre_hook(self.gather)
            module.register_forward_hook(self.free_all)
            module.register_full_backward_pre_hook(self.gather)

    def share_of(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        padded = [self.flatten([t]) for t in tensors]
        return torch.cat([t.chunk(self.n)[self.rank] for t in padded])

    def gather(self, module: nn.Module, *_: object) -> None:
        for p in module.parameters(recurse=False):
            cut = self.cut[p]
            cut.whole.untyped_storage().resize_(cut.whole.nbytes)
            dist.all_gather_single(cut.whole, cut.weights)

    def free(self, p: nn.Parameter) -> None:
        self.cut[p].whole.untyped_storage().resize_(0)

    def free_all(self, module: nn.Module, *_: object) -> None:
        for p in module.parameters(recurse=False):
            self.free(p)

    def on_gradient(self, p: nn.Parameter) -> None:
        """Its gradient is there, so backward reads the weight no more."""
        whole = sum(cut.whole.untyped_storage().nbytes() for cut in self.cut.values())
        self.passing = max(self.passing, whole + p.grad.nbytes)
        self.free(p)
        cut = self.cut[p]
        total = torch.empty_like(cut.gradients)
        dist.reduce_scatter_single(total, self.flatten([p.grad]))
        cut.gradients += total
        p.grad = None

    def reduce(self) -> torch.Tensor:
        return self.gradients


STAGES = (Stage0, Stage1, Stage2, Stage3)


class BytesSent(TorchDispatchMode):
    """Adds up what leaves this rank, if collectives run on a ring and a reduction along a line."""

    def __init__(self):
        super().__init__()
        self.nbytes = 0
        self.calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            n = dist.get_world_size()
            name = function.name().partition("::")[2]
            if name == "allreduce_":
                self.nbytes += 2 * (n - 1) * args[0][0].nbytes // n
            elif name == "_reduce_scatter_base_":
                self.nbytes += (n - 1) * args[0].nbytes
            elif name == "_allgather_base_":
                self.nbytes += (n - 1) * args[1].nbytes
            elif name == "reduce_" and args[3] != dist.get_rank():  # the owner sends nothing
                self.nbytes += args[0][0].nbytes
            self.calls += 1
        return function(*args, **(kwargs or {}))


def backward(
    model: nn.Module, windows: torch.Tensor, micro_batches: int, tokens: int
) -> torch.Tensor:
    """Gradients of a mean over the whole batch's tokens, from these windows; their part of the loss."""
    losses = []
    for part in windows.tensor_split(micro_batches):  # may be empty: then its gradients are zeros
        logits = model(part[:, :-1])
        loss = F.cross_entropy(logits, part[:, 1:].flatten(), reduction="sum") / tokens
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()


def train(
    number: int,
    micro_batches: int,
    dtype: torch.dtype,
    args: argparse.Namespace,
    device: torch.device,
) -> tuple[list[float], dict[str, int]]:
    """Three steps at a stage, and in one process: how far losses, gradients and weights are apart.

    And what this rank holds between backward and update, and sends, in the last step.
    """
    torch.manual_seed(args.seed)
    reference = ResidualModel(args.width, args.layers).to(device, dtype)
    model = deepcopy(reference)
    stage = STAGES[number](model, args.bucket)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2)
    draw = torch.Generator().manual_seed(args.seed)  # the same on all ranks
    losses, gradients = [], []
    for _ in range(3):
        batch = torch.randint(257, (args.batch, args.context + 1), generator=draw).to(device)
        tokens = batch[:, 1:].numel()
        right = backward(reference, batch, 1, tokens)
        with BytesSent() as sent:
            loss = backward(model, batch.tensor_split(stage.n)[stage.rank], micro_batches, tokens)
            gradient = stage.reduce()
            counted = held(stage)
            expected = stage.share_of([p.grad for p in reference.parameters()])
            gradients.append(relative(gradient, expected))
            stage.update(gradient)
        dist.all_reduce(loss)
        losses.append((loss - right).abs())
        optimizer.step()
        optimizer.zero_grad()
    for module in model.modules() if number == 3 else ():
        stage.gather(module)
    both = zip(model.parameters(), reference.parameters(), strict=True)
    weights = [relative(p.detach(), q.detach()) for p, q in both]
    worst = [torch.stack(found).max().item() for found in (losses, gradients, weights)]
    return worst, counted | {"sent": sent.nbytes, "collectives": sent.calls}


def relative(ours: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The largest difference, relative to the largest element."""
    return (ours - right).abs().max() / right.abs().max()


def held(stage: Stage0) -> dict[str, int]:
    """Bytes on this rank, each storage once."""
    moments = [t for state in stage.optimizer.state.values() for t in state.values() if t.dim()]
    master = [] if stage.master is stage.part else [stage.master]
    gradients = [p.grad for p in stage.parameters]
    kept = {
        "weights": [*stage.parameters, stage.part],
        "gradients": [*gradients, stage.gradients],
        "optimizer state": [*moments, *master],
    }
    counted = {what: sum(storages(tensors).values()) for what, tensors in kept.items()}
    return counted | {"whole for a moment": stage.passing}


def predict(
    number: int, micro_batches: int, dtype: torch.dtype, sizes: list[int], bucket: int
) -> dict[str, int]:
    """The same from the sizes of the parameters alone: the paper's formulas, with the padding."""
    n = dist.get_world_size()
    rank = dist.get_rank()
    total = sum(sizes)
    largest = max(sizes)
    part = sum(-(-size // n) for size in sizes) if number == 3 else -(-total // n)
    padded = part * n
    in_part = min(total, (rank + 1) * part) - min(total, rank * part)  # not padding
    unit = (n - 1) * part  # (n - 1) / n of the weights
    sent = {  # an all-reduce is a reduce-scatter and an all-gather
        0: 2 * unit,
        1: 2 * unit,
        2: micro_batches * (total - in_part) + unit,
        3: micro_batches * 3 * unit,
    }
    passing = {2: max(bucket, largest) + largest, 3: largest + -largest % n + largest}
    size = dtype.itemsize
    state = 12 if size == 2 else 2 * size  # two moments, and fp32 weights beside 16 bits
    return {
        "weights": size * (part if number == 3 else padded),
        "gradients": size * (part if number >= 2 else padded),
        "optimizer state": state * (part if number >= 1 else padded),
        "whole for a moment": size * passing.get(number, 0),
        "sent": size * sent[number],
    }


def run(args: argparse.Namespace, device: torch.device) -> list[bool | None]:
    n = dist.get_world_size()
    warnings.filterwarnings("ignore", "Full backward hook is firing")  # the embedding's
    with torch.device("meta"):
        sizes = [p.numel() for p in ResidualModel(args.width, args.layers).parameters()]
    total = sum(sizes)
    say(f"{n} rank{'s' * (n > 1)} on {device.type}: {total:,} parameters")
    say(f"{'rank 0':<28}" + "".join(f"{f'ZeRO {number}':>17}" for number in range(4)))
    say(f"{'bytes per parameter':<28}" + f"{'formula':>9}{'counted':>8}" * 4)
    errors, missed_held, missed_sent = [], [], []

    def print_row(label: str, what: str, scale: float) -> list[int]:
        pairs = [(e[what], c[what]) for e, c in zip(expected, counted, strict=True)]
        say(f"{label:<28}" + "".join(f"{e / scale:>9.3f}{c / scale:>8.3f}" for e, c in pairs))
        return [abs(e - c) for e, c in pairs]

    for dtype in (torch.float32, torch.bfloat16):
        expected = [predict(number, 1, dtype, sizes, args.bucket) for number in range(4)]
        counted = [train(number, 1, dtype, args, device)[1] for number in range(4)]
        for what in ("weights", "gradients", "optimizer state", "whole for a moment"):
            label = f"{str(dtype).partition('.')[2]:<9} {what}"
            missed_held += print_row(label, what, total)
    say("sent in a step, in (n-1)/n of the weights' bytes")
    for micro_batches in (1, 2, 4):
        expected = [predict(k, micro_batches, torch.float64, sizes, args.bucket) for k in range(4)]
        trained = [train(k, micro_batches, torch.float64, args, device) for k in range(4)]
        errors += [error for error, _ in trained]
        counted = [counts for _, counts in trained]
        unit = 8 * total * max(n - 1, 1) / n  # alone, a rank sends nothing
        missed_sent += print_row(f"micro batches: {micro_batches}", "sent", unit)
    calls = "".join(f"{counts['collectives']:>17}" for counts in counted)
    say(f"{'collectives of that step':<28}" + calls)
    losses, gradients, weights = zip(*errors, strict=True)
    return [
        check("in float64, max |loss - one process's|", max(losses), 1e-9),
        check("in float64, max |gradient - one process's|", max(gradients), 1e-9),
        check("in float64 after 3 steps, max |weight - one process's|", max(weights), 1e-9),
        check("bytes held, |counted - formula|", max(missed_held), 0),
        check("bytes sent, |counted - formula|", max(missed_sent), 0),
    ]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=96, help="of a token's vector")
    parser.add_argument("--layers", type=int, default=4, help="blocks")
    parser.add_argument("--batch", type=int, default=7, help="sequences per step, of all ranks")
    parser.add_argument("--context", type=int, default=16, help="tokens per sequence")
    parser.add_argument("--bucket", type=int, default=50_000, help="numbers in ZeRO 2's bucket")
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


# Copied from train.storages
def storages(tensors: Iterable[torch.Tensor | None]) -> dict[int, int]:
    """Bytes by address of what the tensors keep alive, each storage once."""
    found = {}
    for tensor in tensors:
        if tensor is not None and tensor.numel():
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


# Copied from ch01_multi_gpu_ddp.main
@record  # so that torchrun's summary names the error
def main() -> None:
    args = parse_args()
    device = join_group(args.device)
    claims_of = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(claims_of, run(args, device))  # nobody leaves while another is at work
    dist.destroy_process_group()  # not in a `finally`: section 3.1
    sys.exit(conclude(max(claims_of, key=lambda claims: claims.count(False))))  # the worst rank's


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
