"""Sequence parallelism: between a tensor-parallel block's matrices, each rank keeps some tokens.

    torchrun --nproc_per_node=2 chapter2-gpu-hardware-networking-and-parallelism-strategies/code/sequence_parallel_from_scratch.py
    torchrun --nproc_per_node=3 chapter2-gpu-hardware-networking-and-parallelism-strategies/code/sequence_parallel_from_scratch.py --seq 101 --heads 5 --dtype bfloat16

On GPUs:
    torchrun --nproc_per_node=8 chapter2-gpu-hardware-networking-and-parallelism-strategies/code/sequence_parallel_from_scratch.py --width 1024 --heads 64 --seq 4096 --dtype bfloat16

Compare three ways to run the same blocks: bytes sent, and bytes kept for the backward pass. The
first step to less memory is free; the second costs a quarter more traffic. Section 2.6.
"""

import argparse
import os
import sys
from collections import Counter
from typing import NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.elastic.multiprocessing.errors import record

Shapes = tuple[tuple[int, ...], tuple[int, ...]]  # of a weight and its bias
Weights = dict[str, torch.Tensor]  # by "0.norm1.weight", "0.qkv.bias", ...
CUT = {"qkv.weight": 1, "qkv.bias": 1, "out.weight": 1}  # parameter: the dimension that is cut
CUT |= {"up.weight": 0, "up.bias": 0, "down.weight": 1}  # every rank holds the whole of the others
payload: Counter[str] = Counter()  # bytes of the whole tensor at each call, by collective


def identity(x: torch.Tensor, seq: int) -> torch.Tensor:
    return x.view_as(x)


def all_reduce(x: torch.Tensor, seq: int, counter: str = "all-reduce") -> torch.Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    payload[counter] += total.nbytes
    return total


def reduce_scatter(x: torch.Tensor, seq: int) -> torch.Tensor:
    """Sum over the ranks, then this rank's tokens: [seq, width] -> [part of seq, width]."""
    parts = list(x.contiguous().tensor_split(dist.get_world_size()))  # may be unequal
    part = torch.empty_like(parts[dist.get_rank()])
    dist.reduce_scatter(part, parts)
    payload["scatter"] += x.nbytes
    return part


def all_gather(x: torch.Tensor, seq: int) -> torch.Tensor:
    """All ranks' tokens: [part of seq, width] -> [seq, width].

    A broadcast by each rank, which is how NCCL gathers unequal parts; gloo only gathers equal ones.
    """
    whole = x.new_empty(seq, x.shape[-1])
    parts = whole.tensor_split(dist.get_world_size())
    parts[dist.get_rank()].copy_(x)
    for source, part in enumerate(parts):
        dist.broadcast(part, source)
    payload["gather"] += whole.nbytes
    return whole


# What happens before a column-parallel layer and after a row-parallel one, each as (forward,
# backward): f and g of arXiv:1909.08053, section 3; g and g-bar of arXiv:2205.05198, section 4.2.2
ENTER = {"whole": (identity, identity), "tensor": (identity, all_reduce)}
ENTER |= {"sequence": (all_gather, reduce_scatter)}
LEAVE = {mode: (backward, forward) for mode, (forward, backward) in ENTER.items()}
LEAVE |= {"regather": LEAVE["sequence"]}
NAMES = {
    "whole": "one process",
    "tensor": "tensor parallel",
    "sequence": "+ sequence",
    "regather": "+ gather again",
}


class Communicate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, operators: tuple, seq: int) -> torch.Tensor:
        ctx.operators, ctx.seq = operators, seq
        return operators[0](x, seq)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.operators[1](gradient, ctx.seq), None, None


class GatherLinear(torch.autograd.Function):
    """Gather, then a linear layer: keeps only this rank's tokens and gathers them once more.

    The weight's gradient needs all tokens of x. The paper (section 4.2.2) gathers them again in
    the backward pass rather than keep them, hidden behind the product that gives x's gradient.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, seq: int):
        ctx.save_for_backward(x, weight)
        ctx.seq = seq
        return F.linear(all_gather(x, seq), weight, bias)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):  # [seq, this rank's outputs]
        x, weight = ctx.saved_tensors
        of_weight = gradient.T @ all_gather(x, ctx.seq)
        return reduce_scatter(gradient @ weight, ctx.seq), of_weight, gradient.sum(0), None


def blocks(mode: str, x: torch.Tensor, seq: int, weights: Weights, head_dim: int) -> torch.Tensor:
    """Transformer blocks on one sequence; x and the result are [tokens, width].

    The tokens are all of `seq`, or this rank's in modes "sequence" and "regather". Mode "whole" is
    the reference: one process and whole weights.
    """

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    def column(x: torch.Tensor, name: str) -> torch.Tensor:  # -> [seq, this rank's outputs]
        weight, bias = weights[f"{name}.weight"].flatten(0, -2), weights[f"{name}.bias"].flatten()
        if mode == "regather":
            return GatherLinear.apply(x, weight, bias, seq)
        return F.linear(Communicate.apply(x, ENTER[mode], seq), weight, bias)

    def row(x: torch.Tensor, name: str) -> torch.Tensor:  # [seq, this rank's inputs] ->
        partial = F.linear(x, weights[f"{name}.weight"].flatten(1))
        return Communicate.apply(partial, LEAVE[mode], seq) + weights[f"{name}.bias"]

    for b in range(len(weights) // 12):
        qkv = column(norm(x, f"{b}.norm1"), f"{b}.qkv").unflatten(-1, (3, 1, -1, head_dim))
        q, k, v = qkv.permute(1, 2, 3, 0, 4)  # each [1, this rank's heads, seq, head_dim]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + row(mixed[0].transpose(0, 1).flatten(1), f"{b}.out")
        x = x + row(F.gelu(column(norm(x, f"{b}.norm2"), f"{b}.up")), f"{b}.down")
    return x


def own_part(mode: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a weight, of the tokens, or of a gradient; parts may be unequal."""
    if mode == "whole":
        return tensor
    if name in ("input", "output") and mode != "tensor":
        return tensor.tensor_split(dist.get_world_size())[dist.get_rank()]
    return shard(name, tensor)


def forward_backward(
    mode: str, x: torch.Tensor, push: torch.Tensor, weights: Weights, head_dim: int
) -> tuple[Weights, int]:
    """The output, and the gradients for push, the output's gradient; bytes kept for backward.

    Bytes kept are those of the distinct storages that autograd saves, weights left out.
    """
    leaves = {}
    for name, tensor in {"input": x, **weights}.items():
        leaves[name] = own_part(mode, name, tensor).clone().requires_grad_()
    own_weights = {name: leaves[name] for name in weights}
    known = {w.untyped_storage().data_ptr() for w in own_weights.values()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = blocks(mode, leaves["input"], len(x), own_weights, head_dim)
    gradients = torch.autograd.grad(output, leaves.values(), own_part(mode, "output", push))
    results = dict(zip(leaves, gradients, strict=True)) | {"output": output.detach()}
    if mode in ("sequence", "regather"):
        for name in weights:  # what every rank holds whole has met only this rank's tokens
            if name.partition(".")[2] not in CUT:
                results[name] = all_reduce(results[name], len(x), "gradients")
    return results, sum(kept.values())


def worst_error(mode: str, results: Weights, exact: Weights) -> float:
    """Largest relative error of any tensor of this rank; NaN if any is NaN."""
    relative = []
    for name, value in exact.items():
        error = results[name].double() - own_part(mode, name, value)
        relative.append(relative_rms(error, value))
    return torch.tensor(relative).max().item()


def kept_by_formula(mode: str, args: argparse.Namespace, itemsize: int) -> int:
    """Bytes that this rank's blocks keep: the inputs of norms, matrices, attention and GELU.

    Besides these, two numbers per token and norm, and one float32 per token and head (attention
    keeps the normalizer, not the scores).
    """
    rank = dist.get_rank()
    n = dist.get_world_size()
    sizes = torch.tensor([args.seq, args.heads, args.ffn])
    if mode != "whole":
        sizes = sizes // n + (rank < sizes % n)
    part, heads, ffn = sizes.tolist()
    normed = part if mode in ("sequence", "regather") else args.seq  # tokens at a norm
    entering = part if mode == "regather" else args.seq  # kept tokens at a column-parallel layer
    inside = args.seq * (4 * heads * args.head_dim + 2 * ffn)
    elements = 2 * args.width * (normed + entering) + inside + 4 * normed
    return args.layers * (elements * itemsize + args.seq * heads * 4)


def run(args: argparse.Namespace, device: torch.device) -> list[bool | None]:
    n = dist.get_world_size()
    dtype = DTYPES[args.dtype]
    if min(args.heads, args.ffn, args.seq) < n:
        stop(f"{n} ranks: type --heads, --ffn and --seq of {n} or more")
    torch.manual_seed(args.seed)
    x, push = torch.randn(2, args.seq, args.width).to(device, dtype)
    # in the dtype of the run, then back: the reference starts from exactly the same weights
    weights = {name: w.to(device, dtype) for name, w in make_weights(block_shapes(args)).items()}
    double = {name: w.double() for name, w in weights.items()}
    exact, _ = forward_backward("whole", x.double(), push.double(), double, args.head_dim)

    say(f"{n} rank{'s' * (n > 1)} on {device.type}: {args.dtype}, rank 0's share")
    say("                   bytes sent   bytes kept   by formula   share  paper    error")
    # The paper, sections 4.2.1 and 4.2.2, 16-bit, with dropout, without attention's scores: of 34
    # bytes per token and unit of width 10 are cut by tokens only; 4 of them enter column layers
    paper = {"whole": 34, "tensor": 10 + 24 / n, "sequence": 4 + 30 / n, "regather": 34 / n}
    errors, kept_errors, kept, sent = {}, [], {}, {}
    for mode, name in NAMES.items():
        payload.clear()
        results, kept[mode] = forward_backward(mode, x, push, weights, args.head_dim)
        errors[mode] = worst_error(mode, results, exact)
        sent[mode] = 2 * payload["all-reduce"] + payload["scatter"] + payload["gather"]
        formula = kept_by_formula(mode, args, dtype.itemsize)
        kept_errors.append(abs(kept[mode] / formula - 1))
        counts = f"{sent[mode] * (n - 1) / n:12,.0f} {kept[mode]:12,} {formula:12,}"
        shares = f"{kept[mode] / kept['whole']:7.3f} {paper[mode] / 34:6.3f} {errors[mode]:8.1e}"
        say(f"{name:16} {counts} {shares}")
    once = args.layers * args.seq * args.width * dtype.itemsize  # all activations between layers
    predicted = {"whole": 0, "tensor": 8 * once, "sequence": 8 * once, "regather": 10 * once}
    say(f"bytes sent by formula: 8 (n-1)/n x blocks x activations = {8 * once * (n - 1) / n:,.0f}")
    say(f"and 10 (n-1)/n to gather again = {10 * once * (n - 1) / n:,.0f}")
    of_whole = payload["gradients"]  # of what every rank holds whole
    say(f"once per step: {of_whole:,} bytes of gradients (norms, biases of out and down)")

    # 2 norms of 2 vectors and 2 biases in each block
    missed = [abs(of_whole - args.layers * 6 * args.width * dtype.itemsize)]
    missed += [abs(sent[mode] - predicted[mode]) for mode in NAMES]
    bound = 2 * errors.pop("whole")
    worst = torch.tensor(list(errors.values())).max().item()
    return [
        check("bytes sent, |+ sequence - tensor|", abs(sent["sequence"] - sent["tensor"]), 0),
        check("bytes sent, |counted - formula|", max(missed), 0),
        check("bytes kept, |measured / formula - 1|", max(kept_errors), 0.01),
        check("worst error, at most twice one process's", worst, bound),
    ]


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seq", type=int, default=501, help="tokens of the one sequence")
    parser.add_argument("--width", type=int, default=96, help="size of a token's vector")
    parser.add_argument("--heads", type=int, default=6, help="attention heads")
    parser.add_argument("--head-dim", type=int, default=16, help="size of a head's vectors")
    parser.add_argument("--ffn", type=int, default=384, help="hidden size of the MLP")
    parser.add_argument("--layers", type=int, default=2, help="transformer blocks")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of all tensors")
    parser.add_argument("--seed", type=int, default=0, help="for weights and tokens")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    return parser.parse_args()


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


# Copied from tensor_parallel_from_scratch.block_shapes
def block_shapes(args: argparse.Namespace) -> dict[str, Shapes]:
    """Of the weight and the bias of each layer of the blocks, by "0.norm1", "0.qkv", ..."""
    width = args.width
    heads = (args.heads, args.head_dim)
    block = {"norm1": ((width,), (width,)), "qkv": ((3, *heads, width), (3, *heads))}
    block |= {"out": ((width, *heads), (width,)), "norm2": ((width,), (width,))}
    block |= {"up": ((args.ffn, width), (args.ffn,)), "down": ((width, args.ffn), (width,))}
    return {f"{b}.{name}": pair for b in range(args.layers) for name, pair in block.items()}


# Copied from tensor_parallel_from_scratch.make_weights
def make_weights(shapes: dict[str, Shapes]) -> Weights:
    """The whole weights in float64; no bias is zero, since a zero hides being added twice."""
    weights = {}
    for name, pair in shapes.items():
        weight, bias = (torch.randn(shape, dtype=torch.float64) for shape in pair)
        inputs = weight.numel() // bias.numel()
        weights[f"{name}.weight"] = 1 + weight / 4 if "norm" in name else weight / inputs**0.5
        weights[f"{name}.bias"] = bias / 4
    return weights


# Copied from tensor_parallel_from_scratch.shard
def shard(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a weight or of its gradient; parts may be unequal."""
    dimension = CUT.get(".".join(name.split(".")[-2:]))
    if dimension is None:
        return tensor
    return tensor.tensor_split(dist.get_world_size(), dimension)[dist.get_rank()].contiguous()


# Copied from data_parallel_from_scratch.relative_rms
def relative_rms(error: torch.Tensor, exact: torch.Tensor) -> float:
    """Root mean square of the error, over that of the exact values."""
    return (error.square().mean() / exact.square().mean()).sqrt().item()


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
