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

import torch
import torch.distributed as dist
import torch.nn.functional as F

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
    mine = torch.empty_like(parts[dist.get_rank()])
    dist.reduce_scatter(mine, parts)
    payload["scatter"] += x.nbytes
    return mine


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


def make_weights(args: argparse.Namespace) -> Weights:
    """The whole weights in float64; no bias is zero, since a zero hides being added twice."""
    width, heads = args.width, (args.heads, args.head_dim)
    block = {"norm1": ((width,), (width,)), "qkv": ((3, *heads, width), (3, *heads))}
    block |= {"out": ((width, *heads), (width,)), "norm2": ((width,), (width,))}
    block |= {"up": ((args.ffn, width), (args.ffn,)), "down": ((width, args.ffn), (width,))}
    weights = {}
    for name in (f"{b}.{layer}" for b in range(args.layers) for layer in block):
        weight, bias = (torch.randn(s, dtype=torch.float64) for s in block[name.split(".")[1]])
        inputs = weight.numel() // bias.numel()
        weights[f"{name}.weight"] = 1 + weight / 4 if "norm" in name else weight / inputs**0.5
        weights[f"{name}.bias"] = bias / 4
    return weights


def shard(name: str, tensor: torch.Tensor, mode: str) -> torch.Tensor:
    """This rank's part of a weight, of the tokens, or of a gradient; parts may be unequal."""
    if mode == "whole":
        return tensor
    by_token = {"input": 0, "output": 0} if mode != "tensor" else {}
    dimension = (CUT | by_token).get(name.partition(".")[2] or name)
    if dimension is None:
        return tensor
    return tensor.tensor_split(dist.get_world_size(), dimension)[dist.get_rank()].contiguous()


def train_step(
    mode: str, x: torch.Tensor, push: torch.Tensor, weights: Weights, head_dim: int
) -> tuple[Weights, int]:
    """The output, and the gradients for push, the output's gradient; bytes kept for backward.

    Bytes kept are those of the distinct storages that autograd saves, weights left out.
    """
    leaves = {name: shard(name, w, mode).clone() for name, w in {"input": x, **weights}.items()}
    mine = {name: leaf.requires_grad_() for name, leaf in leaves.items() if name != "input"}
    known = {w.untyped_storage().data_ptr() for w in mine.values()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = blocks(mode, leaves["input"].requires_grad_(), len(x), mine, head_dim)
    gradients = torch.autograd.grad(output, leaves.values(), shard("output", push, mode))
    results = dict(zip(leaves, gradients, strict=True)) | {"output": output.detach()}
    if mode in ("sequence", "regather"):
        for name in mine:  # what every rank holds whole has met only this rank's tokens
            if name.partition(".")[2] not in CUT:
                results[name] = all_reduce(results[name], len(x), "gradients")
    return results, sum(kept.values())


def worst_error(results: Weights, exact: Weights, mode: str) -> float:
    """Largest over the tensors: root mean square of the error over that of the exact values."""
    relative = []
    for name, value in exact.items():
        error = results[name].double() - shard(name, value, mode)
        relative.append((error.square().mean() / value.square().mean()).sqrt())
    return torch.stack(relative).max().item()  # NaN if any is NaN


def kept_by_formula(mode: str, args: argparse.Namespace, itemsize: int) -> int:
    """Bytes that this rank's blocks keep: the inputs of norms, matrices, attention and GELU.

    Besides these, two numbers per token and norm, and one float32 per token and head (attention
    keeps the normalizer, not the scores).
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    sizes = torch.tensor([args.seq, args.heads, args.ffn])
    if mode != "whole":
        sizes = sizes // world_size + (rank < sizes % world_size)
    part, heads, ffn = sizes.tolist()
    normed = part if mode in ("sequence", "regather") else args.seq  # tokens at a norm
    entering = part if mode == "regather" else args.seq  # kept tokens at a column-parallel layer
    inside = args.seq * (4 * heads * args.head_dim + 2 * ffn)
    elements = 2 * args.width * (normed + entering) + inside + 4 * normed
    return args.layers * (elements * itemsize + args.seq * heads * 4)


def run(args: argparse.Namespace, device: torch.device) -> bool:
    world_size, dtype = dist.get_world_size(), DTYPES[args.dtype]
    if min(args.heads, args.ffn, args.seq) < world_size:
        stop(f"{world_size} ranks: type --heads, --ffn and --seq of {world_size} or more")
    torch.manual_seed(args.seed)
    x, push = torch.randn(2, args.seq, args.width).to(device, dtype)
    # in the dtype of the run, then back: the reference starts from exactly the same weights
    weights = {name: w.to(device, dtype) for name, w in make_weights(args).items()}
    double = {name: w.double() for name, w in weights.items()}
    exact, _ = train_step("whole", x.double(), push.double(), double, args.head_dim)

    say(f"{world_size} rank{'s' * (world_size > 1)} on {device.type}: {args.dtype}, rank 0's share")
    say("                   bytes sent   bytes kept   by formula   share  paper    error")
    # The paper, sections 4.2.1 and 4.2.2, 16-bit, with dropout, without attention's scores: of 34
    # bytes per token and unit of width 10 are cut by tokens only; 4 of them enter column layers
    n, errors, off, alone, weighted = world_size, {}, [], 0, {}
    paper = {"whole": 34, "tensor": 10 + 24 / n, "sequence": 4 + 30 / n, "regather": 34 / n}
    for mode, name in NAMES.items():
        payload.clear()
        results, kept = train_step(mode, x, push, weights, args.head_dim)
        errors[mode], alone = worst_error(results, exact, mode), alone or kept
        weighted[mode] = 2 * payload["all-reduce"] + payload["scatter"] + payload["gather"]
        formula = kept_by_formula(mode, args, dtype.itemsize)
        off.append(abs(kept / formula - 1))
        counts = f"{weighted[mode] * (n - 1) / n:12,.0f} {kept:12,} {formula:12,}"
        shares = f"{kept / alone:7.3f} {paper[mode] / 34:6.3f} {errors[mode]:8.1e}"
        say(f"{name:16} {counts} {shares}")
    once = args.layers * args.seq * args.width * dtype.itemsize  # all activations between layers
    predicted = {"whole": 0, "tensor": 8 * once, "sequence": 8 * once, "regather": 10 * once}
    say(f"bytes sent by formula: 8 (n-1)/n x blocks x activations = {8 * once * (n - 1) / n:,.0f}")
    say(f"and 10 (n-1)/n to gather again = {10 * once * (n - 1) / n:,.0f}")
    say(
        f"once per step: {payload['gradients']:,} bytes of gradients (norms, biases of out and down)"
    )

    missed = max(abs(weighted[mode] - predicted[mode]) for mode in NAMES)
    of_whole = args.layers * 6 * args.width * dtype.itemsize  # 2 norms of 2 vectors, 2 biases
    missed = max(missed, abs(payload["gradients"] - of_whole))
    equal = check(
        "bytes sent, |+ sequence - tensor|", abs(weighted["sequence"] - weighted["tensor"]), 0
    )
    counted = check("bytes sent, |counted - formula|", missed, 0)
    kept_right = check("bytes kept, |measured / formula - 1|", max(off), 0.01)
    bound = 2 * errors.pop("whole")
    worst = torch.tensor(list(errors.values())).max().item()
    exactly = check("worst error, at most twice one process's", worst, bound)
    return equal and counted and kept_right and exactly


def check(claim: str, value: float, bound: float) -> bool:
    """Print whether the worst rank keeps `value` within `bound`; all ranks get the same answer."""
    values = [0.0] * dist.get_world_size()
    dist.all_gather_object(values, value)
    worst = torch.tensor(values, dtype=torch.float64).max().item()  # NaN if any is NaN
    say(f"check: {claim} = {worst:.3g} <= {bound:.3g}  {'ok' if worst <= bound else 'FAILED'}")
    return worst <= bound


def say(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)


def join_group(wanted: str) -> torch.device:
    """Join the process group; return this rank's device: its own GPU where each rank has one."""
    if "RANK" not in os.environ:
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
    dist.init_process_group("gloo" if device.type == "cpu" else None)  # None: PyTorch chooses
    return device


def stop(message: str) -> None:
    sys.stderr.write(message + "\n")  # in one piece: other ranks write too
    sys.exit(2)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: stop(f"{message}: --help lists the flags")
    parser.add_argument("--seq", type=positive, default=501, help="tokens of the one sequence")
    parser.add_argument("--width", type=positive, default=96, help="size of a token's vector")
    parser.add_argument("--heads", type=positive, default=6, help="attention heads")
    parser.add_argument("--head-dim", type=positive, default=16, help="size of a head's vectors")
    parser.add_argument("--ffn", type=positive, default=384, help="hidden size of the MLP")
    parser.add_argument("--layers", type=positive, default=2, help="transformer blocks")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of all tensors")
    parser.add_argument("--seed", type=int, default=0, help="for weights and tokens")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    return parser.parse_args()


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
