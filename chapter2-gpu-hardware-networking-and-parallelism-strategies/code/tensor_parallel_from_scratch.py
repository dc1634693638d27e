"""Tensor parallelism as in Megatron-LM: each rank computes with its part of every large matrix.

    torchrun --nproc_per_node=2 chapter2-gpu-hardware-networking-and-parallelism-strategies/code/tensor_parallel_from_scratch.py
    torchrun --nproc_per_node=3 chapter2-gpu-hardware-networking-and-parallelism-strategies/code/tensor_parallel_from_scratch.py --heads 5 --ffn 37 --seq 16 --dtype bfloat16

On GPUs:
    torchrun --nproc_per_node=8 chapter2-gpu-hardware-networking-and-parallelism-strategies/code/tensor_parallel_from_scratch.py --width 1024 --heads 64 --ffn 4096 --seq 1024 --dtype bfloat16

Compare the last two columns of the first table: what one process loses to rounding, and what the
ranks lose. Then the second: four all-reduces per block, each of all the activations. Section 2.6.
"""

import argparse
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.elastic.multiprocessing.errors import record

CUT = {"embed.weight": 0, "qkv.weight": 1, "qkv.bias": 1, "out.weight": 1}  # by dimension
CUT |= {"up.weight": 0, "up.bias": 0, "down.weight": 1, "head.weight": 0, "head.bias": 0}
Parts = tuple[Callable[..., torch.Tensor], ...]  # embedding, column, row, cross-entropy
Shapes = tuple[tuple[int, ...], tuple[int, ...]]  # of a weight and its bias
Weights = dict[str, torch.Tensor]  # by "embed.weight", "0.qkv.bias", ... "head.bias"
reduced: Counter[tuple[str, str, int]] = Counter()  # (where, pass, payload in bytes) of all-reduces


def all_reduce(tensor: torch.Tensor, where: str, *, op=dist.ReduceOp.SUM, backward: bool = False):
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, op)
    reduced[where, "backward" if backward else "forward", total.nbytes] += 1
    return total


class CopyToTensorParallel(torch.autograd.Function):
    """f of the paper (arXiv:1909.08053, section 3): x as it is; the ranks' gradients are summed."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, where: str) -> torch.Tensor:
        ctx.where = where
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return all_reduce(gradient, ctx.where, backward=True), None


class ReduceFromTensorParallel(torch.autograd.Function):
    """g of the paper: the ranks' x are summed; the gradient as it is."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, where: str) -> torch.Tensor:
        return all_reduce(x, where)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


def whole_linear(x: torch.Tensor, weights: Weights, name: str, where: str) -> torch.Tensor:
    weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]  # those of qkv: by head
    return F.linear(x, weight.reshape(bias.numel(), -1), bias.flatten())


def column_parallel(x: torch.Tensor, weights: Weights, name: str, where: str) -> torch.Tensor:
    """Linear layer whose outputs are cut: [..., width] -> this rank's part of [..., outputs].

    In PyTorch: parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    from torch.distributed.tensor.parallel.
    """
    return whole_linear(CopyToTensorParallel.apply(x, where), weights, name, where)


def row_parallel(x: torch.Tensor, weights: Weights, name: str, where: str) -> torch.Tensor:
    """Linear layer whose inputs are cut: this rank's part of [..., inputs] -> [..., width]."""
    total = ReduceFromTensorParallel.apply(F.linear(x, weights[f"{name}.weight"].flatten(1)), where)
    return total + weights[f"{name}.bias"]  # after the sum, or it would be added by every rank


def own_rows(ids: torch.Tensor, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row of each id in this rank's part of the vocabulary (0 if elsewhere), and if it is there."""
    part = torch.arange(vocab).tensor_split(dist.get_world_size())[dist.get_rank()]
    is_here = (ids >= part[0]) & (ids <= part[-1])
    return (ids - part[0]).where(is_here, 0), is_here


def parallel_embedding(tokens: torch.Tensor, table: torch.Tensor, vocab: int) -> torch.Tensor:
    """[batch, seq] -> [batch, seq, width]; a rank adds zeros for tokens that it has no row of."""
    rows, is_here = own_rows(tokens, vocab)
    part = F.embedding(rows, table) * is_here[..., None]
    return ReduceFromTensorParallel.apply(part, "embedding")


def parallel_cross_entropy(logits: torch.Tensor, targets: torch.Tensor, vocab: int) -> torch.Tensor:
    """Mean loss from this rank's logits, [batch, seq, part]; no rank ever holds all of them.

    Three numbers per token are reduced: the highest logit, the sum of the exponentials, and the
    target's logit (the fused loss at the end of the paper's section 3).
    """
    logits = logits.float()
    rows, is_here = own_rows(targets, vocab)
    highest = all_reduce(logits.detach().amax(-1), "cross-entropy", op=dist.ReduceOp.MAX)
    exponentials = (logits - highest[..., None]).exp().sum(-1)  # [batch, seq]
    exponentials = ReduceFromTensorParallel.apply(exponentials, "cross-entropy")
    target = logits.gather(-1, rows[..., None]).squeeze(-1) * is_here
    target = ReduceFromTensorParallel.apply(target, "cross-entropy")
    return (exponentials.log() + highest - target).mean()


def whole_cross_entropy(logits: torch.Tensor, targets: torch.Tensor, vocab: int) -> torch.Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


PARALLEL = (parallel_embedding, column_parallel, row_parallel, parallel_cross_entropy)
WHOLE = (lambda ids, table, _: table[ids], whole_linear, whole_linear, whole_cross_entropy)


def model(
    parts: Parts, weights: Weights, batch: torch.Tensor, args: argparse.Namespace
) -> tuple[torch.Tensor, torch.Tensor]:
    """Input of the first block, [batch, seq, width], and loss; only the four parts differ."""
    embedding, column, row, cross_entropy = parts

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    first = x = embedding(batch[:, :-1], weights["embed.weight"], args.vocab)
    for b in range(args.layers):
        qkv = column(norm(x, f"{b}.norm1"), weights, f"{b}.qkv", "attention")
        q, k, v = qkv.unflatten(-1, (3, -1, args.head_dim)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # this rank's heads
        x = x + row(mixed.transpose(1, 2).flatten(2), weights, f"{b}.out", "attention")
        hidden = F.gelu(column(norm(x, f"{b}.norm2"), weights, f"{b}.up", "MLP"))
        x = x + row(hidden, weights, f"{b}.down", "MLP")
    logits = column(norm(x, "norm"), weights, "head", "head")
    return first, cross_entropy(logits, batch[:, 1:], args.vocab)


def block_shapes(args: argparse.Namespace) -> dict[str, Shapes]:
    """Of the weight and the bias of each layer of the blocks, by "0.norm1", "0.qkv", ..."""
    width = args.width
    heads = (args.heads, args.head_dim)
    block = {"norm1": ((width,), (width,)), "qkv": ((3, *heads, width), (3, *heads))}
    block |= {"out": ((width, *heads), (width,)), "norm2": ((width,), (width,))}
    block |= {"up": ((args.ffn, width), (args.ffn,)), "down": ((width, args.ffn), (width,))}
    return {f"{b}.{name}": pair for b in range(args.layers) for name, pair in block.items()}


def make_weights(shapes: dict[str, Shapes]) -> Weights:
    """The whole weights in float64; no bias is zero, since a zero hides being added twice."""
    weights = {}
    for name, pair in shapes.items():
        weight, bias = (torch.randn(shape, dtype=torch.float64) for shape in pair)
        inputs = weight.numel() // bias.numel()
        weights[f"{name}.weight"] = 1 + weight / 4 if "norm" in name else weight / inputs**0.5
        weights[f"{name}.bias"] = bias / 4
    return weights


def shard(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a weight or of its gradient; parts may be unequal."""
    dimension = CUT.get(".".join(name.split(".")[-2:]))
    if dimension is None:
        return tensor
    return tensor.tensor_split(dist.get_world_size(), dimension)[dist.get_rank()].contiguous()


def sgd_step(
    parts: Parts, weights: Weights, batch: torch.Tensor, args: argparse.Namespace
) -> Weights:
    """One step of SGD at learning rate 1: the loss, the gradients and the new weights, by name."""
    leaves = {name: w.clone().requires_grad_() for name, w in weights.items()}
    first, loss = model(parts, leaves, batch, args)
    of_input, *of_weights = torch.autograd.grad(loss, [first, *leaves.values()])
    gradients = dict(zip(leaves, of_weights, strict=True))
    updated = {f"new.{name}": w - gradients[name] for name, w in weights.items()}
    return {"loss.value": loss.detach(), "input.gradient": of_input} | gradients | updated


def errors(results: Weights, exact: Weights, parts: Parts) -> dict[str, float]:
    """Largest relative error by layer. Results of PARALLEL are this rank's shards."""
    found = defaultdict(list)
    for name, value in exact.items():
        expected = shard(name, value) if parts is PARALLEL else value
        error = relative_rms(results[name].double() - expected, value)
        found[name.split(".")[-2]].append(error)
    return {layer: torch.tensor(values).max().item() for layer, values in found.items()}


def run(args: argparse.Namespace, device: torch.device) -> list[bool | None]:
    n = dist.get_world_size()
    dtype = DTYPES[args.dtype]
    if min(args.heads, args.ffn, args.vocab) < n:
        stop(f"{n} ranks: type --heads, --ffn and --vocab of {n} or more")
    torch.manual_seed(args.seed)
    batch = torch.randint(args.vocab, (args.batch, args.seq + 1)).to(device)
    width = args.width
    shapes = block_shapes(args)
    shapes |= {"norm": ((width,), (width,)), "head": ((args.vocab, width), (args.vocab,))}
    weights = {"embed.weight": torch.randn(args.vocab, width, dtype=torch.float64)}
    weights |= make_weights(shapes)
    # in the dtype of the run, then back: the reference starts from exactly the same weights
    whole = {name: w.to(device, dtype) for name, w in weights.items()}
    exact = sgd_step(WHOLE, {name: w.double() for name, w in whole.items()}, batch, args)
    one_process = errors(sgd_step(WHOLE, whole, batch, args), exact, WHOLE)
    shards = {name: shard(name, w) for name, w in whole.items()}
    parallel = errors(sgd_step(PARALLEL, shards, batch, args), exact, PARALLEL)

    say(f"{n} rank{'s' * (n > 1)} on {device.type}: {args.dtype}")
    say("layer   whole weight        on rank 0          error: one process  parallel")
    for layer in parallel:
        name = f"{layer}.weight" if f"{layer}.weight" in whole else f"0.{layer}.weight"
        sizes = [str(list(w[name].shape)) if name in w else "" for w in (whole, shards)]
        of_layer = (one_process[layer], parallel[layer])
        say("{:7} {:19} {:19} {:17.1e} {:9.1e}".format(layer, *sizes, *of_layer))
    numbers = [sum(w.numel() for w in weights.values()) for weights in (whole, shards)]
    say("all     {:<19,} {:<19,} parameters".format(*numbers))

    share = 2 * (n - 1) / n
    say("all-reduce of  pass      times  payload bytes  bytes sent per rank")
    for (where, direction, payload), times in reduced.items():
        sent = times * payload * share
        say(f"{where:14} {direction:9} {times:5} {payload:14,} {sent:20,.0f}")
    counted = sum(payload * times for (_, _, payload), times in reduced.items())
    tokens = args.batch * args.seq
    activations = tokens * args.width * dtype.itemsize
    predicted = (4 * args.layers + 2) * activations + 3 * tokens * 4
    say(f"in all {counted * share:,.0f} bytes sent per rank")
    say(f"by the formula {predicted * share:,.0f}: (4 x blocks + 2) x activations + loss")

    worst, worst_of_one = (
        torch.tensor([*e.values()]).max().item() for e in (parallel, one_process)
    )
    return [
        check("worst error, at most twice one process's", worst, 2 * worst_of_one),
        check("|bytes counted - formula|", abs(counted - predicted), 0),
    ]


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=4, help="sequences, on every rank the same")
    parser.add_argument("--seq", type=int, default=64, help="tokens per sequence")
    parser.add_argument("--vocab", type=int, default=257, help="tokens: 256 bytes and an end")
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
