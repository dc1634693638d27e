"""Context parallelism from scratch: exact causal attention over a sequence that no rank holds whole.

    torchrun --nproc_per_node=2 chapter2-gpu-hardware-networking-and-parallelism-strategies/code/context_parallel_from_scratch.py
    torchrun --nproc_per_node=3 chapter2-gpu-hardware-networking-and-parallelism-strategies/code/context_parallel_from_scratch.py --seq 301 --dtype bfloat16 --repeats 3

On GPUs:
    torchrun --nproc_per_node=8 chapter2-gpu-hardware-networking-and-parallelism-strategies/code/context_parallel_from_scratch.py --seq 32768 --heads 32 --head-dim 128 --dtype bfloat16

Compare the orders: as many tokens on each rank, but who computes how many pairs? With more tokens
per rank than "hides at", an exchange is shorter than the work that it hides behind: this script's
work, whose products are in float32 beside the tensor cores. Flash attention does it in a tenth of
the time, so on GPUs it hides an exchange only from ten times as many tokens on. Section 2.7.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record

Shards = list[list[range]]  # for each rank, the chunks of the sequence that it holds
tally: Counter[str] = Counter()  # what this rank did, counted where it is done


def cut(seq: int, world_size: int, order: str) -> Shards:
    """Zigzag: chunks r and 2n-1-r of 2n on rank r (Llama 3, arXiv:2407.21783, section 3.3.2)."""
    count = world_size if order == "contiguous" else 2 * world_size
    chunks = [range(seq * i // count, seq * (i + 1) // count) for i in range(count)]
    if order == "contiguous":
        return [[chunk] for chunk in chunks]
    return [[chunks[rank], chunks[-1 - rank]] for rank in range(world_size)]


def nth(tensors: list[torch.Tensor], chunks: list[range], i: int) -> list[torch.Tensor]:
    return [t.split([len(chunk) for chunk in chunks], dim=-2)[i] for t in tensors]  # views


def blocks(queries: list[range], keys: list[range], by_query: list, by_key: list) -> Iterator[list]:
    """Yield each block of scores that the causal mask leaves: its queries, its keys, and their
    slices of the tensors [..., tokens, any]. A chunk of keys after all queries is not computed.
    """
    for i, rows in enumerate(queries):
        for j, columns in enumerate(keys):
            if columns.start < rows.stop:
                yield [rows, columns, *nth(by_query, queries, i), *nth(by_key, keys, j)]


def scores_of(q: torch.Tensor, k: torch.Tensor, rows: range, columns: range) -> torch.Tensor:
    """Scaled scores of a block in float32; -inf where the key comes after the query."""
    tally["pairs"] += len(rows) * len(columns)
    tally["largest"] = max(tally["largest"], len(rows) * len(columns))
    scores = q.float() @ k.float().mT * q.shape[-1] ** -0.5  # [heads, rows, columns]
    if columns.stop <= rows.start + 1:  # no key is hidden
        return scores
    query, key = (torch.arange(r.start, r.stop, device=q.device) for r in (rows, columns))
    return scores.masked_fill_(key > query[:, None], -math.inf)


def merge(out: torch.Tensor, lse: torch.Tensor, scores: torch.Tensor, v: torch.Tensor) -> None:
    """Add a block of keys to attention that is exact for the keys seen so far, in place.

    All it must know of them is lse [heads, rows, 1], the logarithm of the softmax's sum
    (Milakov and Gimelshein, arXiv:1805.02867). out: [heads, rows, head_dim].
    """
    new_lse = torch.logaddexp(lse, scores.logsumexp(dim=-1, keepdim=True))
    out *= (lse - new_lse).exp()
    out += (scores - new_lse).exp() @ v.float()
    lse.copy_(new_lse)


def pass_on(shard: torch.Tensor, chunks: list[range], what: str) -> tuple[torch.Tensor, list]:
    """Start to send to the right; returns what will come from the left, and what to wait for."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    incoming = shard.new_empty(*shard.shape[:-2], sum(map(len, chunks)), shard.shape[-1])
    tally[what] += shard.nbytes
    send = dist.P2POp(dist.isend, shard, (rank + 1) % world_size)
    receive = dist.P2POp(dist.irecv, incoming, (rank - 1) % world_size)
    return incoming, dist.batch_isend_irecv([send, receive])


def arriving(kv: torch.Tensor, shards: Shards, what: str) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield every rank's K and V after its owner, the own ones first. While the caller works on
    one shard, the next is on its way (Ring Attention, arXiv:2310.01889, section 3).
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for step in range(world_size - 1):
        owner = (rank - step) % world_size
        incoming, works = pass_on(kv, shards[owner - 1], what)
        yield owner, kv
        for work in works:
            work.wait()
        kv = incoming
    yield (rank + 1) % world_size, kv


class RingAttention(torch.autograd.Function):
    """Causal attention of this rank's queries to all ranks' keys: [heads, tokens, head_dim]."""

    @staticmethod
    def forward(ctx, q, k, v, shards: Shards) -> torch.Tensor:
        out = torch.zeros_like(q, dtype=torch.float32)
        lse = torch.full_like(out[..., :1], -math.inf)
        queries = shards[dist.get_rank()]
        for owner, kv in arriving(torch.stack([k, v]), shards, "forward"):
            for block in blocks(queries, shards[owner], [q, out, lse], [kv]):
                rows, columns, q_i, out_i, lse_i, (k_j, v_j) = block
                merge(out_i, lse_i, scores_of(q_i, k_j, rows, columns), v_j)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.shards = shards
        return out.to(q.dtype)

    @staticmethod
    def backward(ctx, d_out: torch.Tensor):
        """FlashAttention-2's (arXiv:2307.08691, algorithm 2): probabilities come back from lse.

        dK and dV travel with their K and V, take a share from every rank, and one hop more: home.
        """
        q, k, v, out, lse = ctx.saved_tensors
        shards = ctx.shards
        queries = shards[dist.get_rank()]
        d_out = d_out.float()
        d_q = torch.zeros_like(out)
        d_kv = out.new_zeros(2, *k.shape)  # float32: every rank adds to it
        delta = (d_out * out).sum(dim=-1, keepdim=True)
        by_query = [q.float(), lse, delta, d_out, d_q]
        for owner, kv in arriving(torch.stack([k, v]), shards, "backward"):
            for block in blocks(queries, shards[owner], by_query, [kv.float(), d_kv]):
                rows, columns, q_i, lse_i, delta_i, d_out_i, d_q_i, (k_j, v_j), d_kv_j = block
                probabilities = (scores_of(q_i, k_j, rows, columns) - lse_i).exp()
                d_scores = probabilities * (d_out_i @ v_j.mT - delta_i) * q.shape[-1] ** -0.5
                d_q_i += d_scores @ k_j
                d_kv_j += torch.stack([d_scores.mT @ q_i, probabilities.mT @ d_out_i])
            if len(shards) > 1:
                incoming, works = pass_on(d_kv, shards[owner - 1], "backward")
                for work in works:
                    work.wait()
                d_kv = incoming
        return d_q.to(q.dtype), d_kv[0].to(k.dtype), d_kv[1].to(v.dtype), None


def layer(project: nn.Linear, x: torch.Tensor, d_out: torch.Tensor, attend: Callable) -> list:
    """Projection with bias, then attention: the output, dQ, dK, dV, the gradients of weight and
    bias. d_out: [tokens, heads, head_dim].
    """
    project.zero_grad()
    qkv = project(x)  # [tokens, 3 x heads x head_dim]
    qkv.retain_grad()
    out = attend(*qkv.unflatten(-1, (3, *d_out.shape[1:])).permute(1, 2, 0, 3)).transpose(0, 1)
    (out * d_out).sum().backward()
    return [out.detach(), *qkv.grad.chunk(3, dim=-1), project.weight.grad, project.bias.grad]


def verify(args: argparse.Namespace, device: torch.device, shards: Shards) -> torch.Tensor:
    """Errors of the layer's six results, of the ring and of one process, each relative to one
    process in float64: [2, 6].
    """
    width = args.heads * args.head_dim
    seq = sum(len(chunk) for shard in shards for chunk in shard)
    torch.manual_seed(args.seed)
    project, x = nn.Linear(width, 3 * width), torch.randn(seq, width)
    d_out = torch.randn(seq, args.heads, args.head_dim)
    dtype = getattr(torch, args.dtype)
    project, x, d_out = (thing.to(device, dtype) for thing in (project, x, d_out))
    held = torch.cat([torch.arange(c.start, c.stop) for c in shards[dist.get_rank()]])
    ring = layer(project, x[held], d_out[held], lambda *qkv: RingAttention.apply(*qkv, shards))
    causal = partial(F.scaled_dot_product_attention, is_causal=True)
    one_process = layer(project, x, d_out, causal)
    exact = layer(project.double(), x.double(), d_out.double(), causal)
    joined = [torch.zeros_like(tensor) for tensor in exact]
    for i, (whole, part) in enumerate(zip(joined, ring, strict=True)):
        whole[held if i < 4 else slice(None)] = part.double()
        dist.all_reduce(whole)  # joins the ranks' rows, and sums their weight gradients
    pairs = [zip(found, exact, strict=True) for found in (joined, one_process)]
    return torch.tensor([[((a - b).norm() / b.norm()).item() for a, b in pair] for pair in pairs])


def timed(action: Callable, args: argparse.Namespace, device: torch.device) -> list[float]:
    """Sorted seconds of the repeats, after two to warm up; all ranks start together."""
    seconds = []
    for _ in range(args.repeats + 2):
        dist.barrier()
        start = time.perf_counter()
        action()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return sorted(seconds[2:])


def measure_pass(args: argparse.Namespace, device: torch.device, order: str) -> dict[str, float]:
    """Count and time forward passes; time a block and a hop, and predict the pass from them."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    shards = cut(args.seq, world_size, order)
    chunk = shards[rank][0]
    tokens = sum(map(len, shards[rank]))
    qkv = torch.randn(3, args.heads, tokens, args.head_dim).to(device, getattr(torch, args.dtype))
    later = range(chunk.stop, chunk.stop + len(chunk))  # queries from which no key is hidden
    q, k, v = qkv[:, :, : len(chunk)]
    out, lse = torch.zeros_like(q).float(), torch.zeros_like(q[..., :1]).float()

    def hop() -> None:
        for work in pass_on(qkv[1:], shards[rank - 1], "hop")[1]:
            work.wait()

    # The blocks that this rank has in a pass: those on the diagonal need a mask, the rest do not.
    plain, diagonal = (rank, 1) if order == "contiguous" else (2 * world_size - 1, 2)

    def work_of_a_pass() -> None:
        for queries in [chunk] * diagonal + [later] * plain:
            merge(out, lse, scores_of(q, k, queries, chunk), v)

    work = timed(work_of_a_pass, args, device)[0]
    per_hop = timed(hop, args, device)[0] if world_size > 1 else 0.0
    tally.clear()
    seconds = timed(lambda: RingAttention.apply(*qkv, shards), args, device)
    reports = [(0, 0.0)] * world_size
    dist.all_gather_object(reports, (tally["pairs"] // (args.repeats + 2), work))
    pairs, works = zip(*reports, strict=True)
    passing = (world_size - 1) * per_hop
    per_pair = max(works) / max(pairs)
    share = 1.0 if order == "contiguous" else 0.5  # of a later step's c x c pairs, for c tokens
    return {
        "imbalance": max(pairs) * world_size / sum(pairs),
        "largest": tally["largest"] / args.seq**2,
        "work": max(works) * 1e3,
        "passing": passing * 1e3,
        "predicted": max(*works, passing) * 1e3,
        "fastest": seconds[0] * 1e3,
        "median": statistics.median(seconds) * 1e3,
        "hides_at": per_hop / tokens / (share * per_pair),  # c x per_token = share x c^2 x per_pair
    }


def run(args: argparse.Namespace, device: torch.device) -> list[bool | None]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    shape = f"{args.seq:,} tokens, {args.heads} heads of {args.head_dim}, {args.dtype}"
    say(f"{world_size} rank{'s' * (world_size > 1)} on {device.type}: {shape}")
    say("forward     busiest  largest    work  passing  predicted  fastest  median  hides at")
    say("            of mean   scores      ms       ms         ms       ms      ms    tokens")
    row = "{:<11}{:>8.3f}{:>9.2%}{:>8.2f}{:>9.2f}{:>11.2f}{:>9.2f}{:>8.2f}{:>10,.0f}"
    records = {order: measure_pass(args, device, order) for order in ("contiguous", "zigzag")}
    for order, measured in records.items():
        say(row.format(order, *measured.values()))
    if args.json and rank == 0:
        args.json.write_text(json.dumps(records, indent=1) + "\n")

    seq = min(args.seq, 2048)  # one process holds seq x seq scores in float64
    say(f"rank 0, {seq:,} tokens    bytes sent forward   by formula   backward   by formula")
    miscounted = 0
    errors = []
    for order in records:
        shards = cut(seq, world_size, order)
        tally.clear()
        errors.append(verify(args, device, shards))
        element = 2 * args.heads * args.head_dim  # K and V of one token
        others = seq - sum(map(len, shards[(rank + 1) % world_size]))  # that shard comes last
        forward = others * element * getattr(torch, args.dtype).itemsize
        backward = forward + (world_size > 1) * seq * element * 4  # float32, and home again
        sent = (tally["forward"], forward, tally["backward"], backward)
        say("{:<22}{:>20,}{:>13,}{:>11,}{:>13,}".format(order, *sent))
        miscounted += abs(sent[0] - sent[1]) + abs(sent[2] - sent[3])
    ring, one_process = torch.stack(errors).amax(dim=0)  # each [results]
    bounds = torch.full_like(ring, 1e-5) if args.dtype == "float32" else 2 * one_process
    small = args.seq // (2 * world_size)  # tokens of a chunk, or one more
    most = 1.0 if args.seq % (2 * world_size) == 0 else ((small + 1) / small) ** 2
    gradients, bound = ring[1:].max().item(), bounds[1:].max().item()
    return [
        check("bytes sent, off the formula", miscounted, 0),
        check("relative error of the output", ring[0].item(), bounds[0].item()),
        check("largest relative error of a gradient", gradients, bound),
        check(
            "zigzag: pairs of the busiest rank, of the mean", records["zigzag"]["imbalance"], most
        ),
    ]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seq", type=int, default=1024, help="tokens of the whole sequence")
    add("--heads", type=int, default=4, help="attention heads")
    add("--head-dim", type=int, default=32, help="numbers per head and token")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of q, k and v")
    add("--repeats", type=int, default=10, help="timed repeats")
    add("--seed", type=int, default=0, help="for weights and tokens")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--json", type=Path, help="also write the table to this file, in seconds")
    args = parser.parse_args()
    least = 2 * int(os.environ.get("WORLD_SIZE", 1))
    if args.seq < least:
        stop(f"{args.seq} tokens do not make {least} chunks: type --seq {least} or more")
    return args


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


# Copied from ch01_multi_gpu_ddp.main
@record  # so that torchrun's summary names the error
def main() -> None:
    args = parse_args()
    device = join_group(args.device)
    claims_of = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(claims_of, run(args, device))  # nobody leaves while another is at work
    dist.destroy_process_group()  # not in a `finally`: section 3.1
    sys.exit(conclude(max(claims_of, key=lambda claims: claims.count(False))))  # the worst rank's


# Copied from ch01_single_gpu_baseline.synchronize
def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


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
