"""Expert parallelism from scratch: a mixture of experts whose tokens travel to the experts and back.

    torchrun --nproc_per_node=2 chapter2-gpu-hardware-networking-and-parallelism-strategies/code/expert_parallel_from_scratch.py
    torchrun --nproc_per_node=3 chapter2-gpu-hardware-networking-and-parallelism-strategies/code/expert_parallel_from_scratch.py --experts 5 --tokens 50 --dtype bfloat16

On GPUs:
    torchrun --nproc_per_node=8 chapter2-gpu-hardware-networking-and-parallelism-strategies/code/expert_parallel_from_scratch.py --experts 64 --top-k 6 --tokens 4096 --width 1024 --dtype bfloat16

Compare the columns: a larger capacity drops fewer tokens and pads more; without one ("none")
nothing is dropped, and the busiest rank sets the pace. Section 2.7.
"""

import argparse
import copy
import math
import os
import sys
from collections import Counter
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record

sent: Counter[str] = Counter()  # bytes of token rows that left this rank, counted at the call


@dataclass(frozen=True)
class Routing:
    chosen: torch.Tensor  # [tokens, k] experts, best first
    gates: torch.Tensor  # [tokens, k] their weights, which add up to 1
    kept: torch.Tensor  # [tokens, k] whether the expert had room
    auxiliary: torch.Tensor  # scalar: 1 when the load is even


def capacity_of(tokens: int, experts: int, k: int, factor: float) -> int:
    """Rows that one expert takes from one rank (GShard, arXiv:2006.16668, section 2.2); 0: all."""
    return math.ceil(round(k * tokens * factor / experts, 6)) if factor else k * tokens


def route(x: torch.Tensor, router: nn.Linear, k: int, factor: float) -> Routing:
    """Choose k experts per token, in float32 whatever the dtype of x [tokens, width]: one bit
    decides where a token goes (Switch Transformer, arXiv:2101.03961, section 2.4).
    """
    logits = router(x.float())  # [tokens, experts]
    best, chosen = logits.topk(k, dim=-1)
    gates = best.softmax(dim=-1)  # the softmax over all experts, renormalised over these
    experts = logits.shape[-1]
    wanted = F.one_hot(chosen.T.flatten(), experts)  # all first choices, then all second ones
    place = (wanted.cumsum(dim=0) * wanted).sum(dim=-1) - 1  # in the expert's queue
    kept = (place < capacity_of(len(x), experts, k, factor)).unflatten(0, (k, -1)).T
    share = wanted.float().mean(dim=0)  # of the choices; has no gradient
    auxiliary = experts * (share * logits.softmax(dim=-1).mean(dim=0)).sum()  # Switch, equation 4
    return Routing(chosen, gates, kept, auxiliary)


def send_rows(rows: torch.Tensor, outgoing: list[int], incoming: list[int], what: str):
    """Send the first outgoing[0] rows to rank 0, and so on; receive incoming[r] from rank r."""
    received = rows.new_empty(sum(incoming), rows.shape[1])
    sent[what] += (len(rows) - outgoing[dist.get_rank()]) * rows.shape[1] * rows.itemsize
    dist.all_to_all_single(received, rows.contiguous(), incoming, outgoing)
    return received


class AllToAll(torch.autograd.Function):
    """An all-to-all whose backward is the way back: the same all-to-all with its splits swapped."""

    @staticmethod
    def forward(ctx, rows, outgoing: list[int], incoming: list[int]) -> torch.Tensor:
        ctx.splits = outgoing, incoming
        return send_rows(rows, outgoing, incoming, "forward")

    @staticmethod
    def backward(ctx, d_received: torch.Tensor):
        outgoing, incoming = ctx.splits
        return send_rows(d_received, incoming, outgoing, "backward"), None, None


def expert_parallel(
    x: torch.Tensor, routing: Routing, experts: list[nn.Module], owned: list[int]
) -> torch.Tensor:
    """x plus the gated outputs of the chosen experts, [tokens, width]; rank r owns owned[r] of the
    experts, in order, and `experts` are this rank's.
    """
    world_size, local = dist.get_world_size(), len(experts)
    token, choice = routing.kept.nonzero(as_tuple=True)  # [rows]: who travels, and why
    order = routing.chosen[token, choice].argsort(stable=True)  # by expert, and so by rank
    token, choice = token[order], choice[order]
    counts = routing.chosen[token, choice].bincount(minlength=sum(owned))  # rows for each expert
    arriving = counts.new_empty(world_size * local)  # rows for this rank's experts, by source
    dist.all_to_all_single(arriving, counts, [local] * world_size, owned)
    arriving = arriving.view(world_size, local)
    outgoing = [part.sum().item() for part in counts.split(owned)]
    incoming = arriving.sum(dim=1).tolist()

    rows = AllToAll.apply(x[token], outgoing, incoming)  # dispatch: sorted by source, then expert
    runs = torch.arange(local, device=x.device).repeat(world_size)  # the expert of each run of rows
    by_expert = runs.repeat_interleave(arriving.flatten()).argsort(stable=True)
    parts = rows[by_expert].split(arriving.sum(dim=0).tolist())
    done = torch.cat([expert(part) for expert, part in zip(experts, parts, strict=True)])
    done = done[by_expert.argsort()]  # sorted by source again
    returned = AllToAll.apply(done, incoming, outgoing)  # combine
    weighted = returned * routing.gates[token, choice, None]  # in float32
    return x.float().index_add(0, token, weighted).to(x.dtype)


def one_process(
    x: torch.Tensor, router: nn.Linear, experts: list[nn.Module], k: int, factor: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same layer the plain way, for one rank's tokens: every expert sees every token.

    Returns the output, the auxiliary loss, and the rows that each expert takes.
    """
    probabilities = router(x.float()).softmax(dim=-1)
    chosen = probabilities.argsort(dim=-1, descending=True)[:, :k]
    capacity = capacity_of(len(x), len(experts), k, factor)
    load = [0] * len(experts)
    kept = torch.zeros(chosen.shape, dtype=torch.bool)
    for choice, column in enumerate(chosen.T.tolist()):
        for token, expert in enumerate(column):
            kept[token, choice] = load[expert] < capacity
            load[expert] += load[expert] < capacity
    best = probabilities.gather(1, chosen)
    gates = best / best.sum(dim=-1, keepdim=True) * kept.to(x.device)
    y = x.float()
    share = []
    for i, expert in enumerate(experts):
        y = y + (gates * (chosen == i)).sum(dim=-1, keepdim=True) * expert(x)
        share.append((chosen == i).float().mean() * probabilities[:, i].mean())
    return y.to(x.dtype), len(experts) * sum(share), torch.tensor(load)


def build(args: argparse.Namespace, device: torch.device) -> tuple[nn.Linear, list, list]:
    """Router in float32, experts, and for each rank its tokens and their targets: all on all."""
    torch.manual_seed(args.seed)
    width, dtype = args.width, getattr(torch, args.dtype)
    router = nn.Linear(width, args.experts).to(device)
    nn.init.normal_(router.bias, std=args.skew)  # some experts are more popular
    experts = [
        nn.Sequential(nn.Linear(width, args.hidden), nn.GELU(), nn.Linear(args.hidden, width))
        for _ in range(args.experts)
    ]
    sizes = [args.tokens + r for r in range(dist.get_world_size())]
    data = [torch.randn(2, size, width).to(device, dtype) for size in sizes]
    return router, [expert.to(device, dtype) for expert in experts], data


def loss_share(y: torch.Tensor, target: torch.Tensor, auxiliary: torch.Tensor, data: list, args):
    """A rank's share of the loss: squared error over all elements, and its own balance."""
    elements = sum(target.numel() for _, target in data)
    return (y - target).float().square().sum() / elements + args.balance * auxiliary / len(data)


def flat_gradients(experts: list[nn.Module]) -> torch.Tensor:
    return torch.cat([p.grad.flatten().float() for expert in experts for p in expert.parameters()])


def by_all_ranks(args: argparse.Namespace, model: tuple, owned: list[int], factor: float):
    """This rank's results: output, auxiliary loss, loss, gradients of its tokens, of the router
    and of its experts; and its rows per expert.
    """
    rank = dist.get_rank()
    router, experts, data = copy.deepcopy(model)
    local = experts[sum(owned[:rank]) : sum(owned[: rank + 1])]
    x, target = data[rank][0].requires_grad_(), data[rank][1]
    routing = route(x, router, args.top_k, factor)
    y = expert_parallel(x, routing, local, owned)
    loss = loss_share(y, target, routing.auxiliary, data, args)
    loss.backward()
    loss = loss.detach()
    d_router = flat_gradients([router])
    for tensor in (loss, d_router):
        dist.all_reduce(tensor)  # the experts need none: each has seen the tokens of all ranks
    results = (y, routing.auxiliary, loss, x.grad, d_router, flat_gradients(local))
    load = routing.chosen[routing.kept].bincount(minlength=len(experts))
    return results, load.cpu()


def by_one_process(args: argparse.Namespace, model: tuple, owned: list[int], factor: float, dtype):
    """For each rank the results that it must have, and its rows per expert [ranks, experts]."""
    router, experts, data = copy.deepcopy(model)
    experts = [expert.to(dtype) for expert in experts]
    data = [pair.to(dtype) for pair in data]
    xs = [x.clone().requires_grad_() for x, _ in data]
    layers = [one_process(x, router, experts, args.top_k, factor) for x in xs]
    loss = sum(
        loss_share(y, t, a, data, args) for (y, a, _), (_, t) in zip(layers, data, strict=True)
    )
    loss.backward()
    edges = [sum(owned[:r]) for r in range(len(owned) + 1)]
    results = [
        (y, auxiliary, loss, x.grad, flat_gradients([router]), flat_gradients(experts[low:high]))
        for (y, auxiliary, _), x, low, high in zip(layers, xs, edges, edges[1:], strict=False)
    ]
    return results, torch.stack([load for *_, load in layers])


def flat(results: list[tuple]) -> list[torch.Tensor]:
    """For each of the six results, the numbers of all ranks in a row, in float64."""
    columns = zip(*results, strict=True)
    return [torch.cat([t.detach().double().flatten() for t in column]) for column in columns]


def distances(found: list, exact: list, scales: list) -> list[float]:
    triples = zip(found, exact, scales, strict=True)
    return [((a - b).norm() / scale.norm()).item() for a, b, scale in triples]


def bytes_of(load: torch.Tensor, owner: torch.Tensor, row: int) -> int:
    """Bytes that leave this rank in a forward pass, and again in a backward one, if rank s has
    load[s, e] rows for expert e: its own rows go out, and the others' go back.
    """
    ranks = torch.arange(len(load))[:, None]
    here = ranks == dist.get_rank()
    travels = (ranks != owner) & (here | (owner == dist.get_rank()))
    return round((load * travels).sum().item() * row)


def run(args: argparse.Namespace, device: torch.device) -> list[bool | None]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    owned = [len(part) for part in torch.arange(args.experts).tensor_split(world_size)]
    owner = torch.arange(world_size).repeat_interleave(torch.tensor(owned))  # [experts]
    model, dtype = build(args, device), getattr(torch, args.dtype)
    tokens = torch.tensor([[pair.shape[1]] for pair in model[2]])  # [ranks, 1]
    even = tokens * args.top_k / args.experts  # rows of each expert from each rank, if even
    columns = []
    errors = []
    bounds = []
    wrong_rows = 0
    wrong_bytes = 0
    for factor in args.capacity:
        sent.clear()
        results, load = by_all_ranks(args, model, owned, factor)
        exact, loads = by_one_process(args, model, owned, factor, torch.float32)
        rounded, _ = by_one_process(args, model, owned, factor, dtype)
        errors.append(distances(flat([results]), flat([exact[rank]]), flat(exact)))
        bounds.append(distances(flat(rounded), flat(exact), flat(exact)))
        wrong_rows += (load - loads[rank]).abs().sum().item()
        formula = bytes_of(loads, owner, args.width * dtype.itemsize)
        wrong_bytes += abs(sent["forward"] - formula) + abs(sent["backward"] - formula)

        rows = loads.sum(dim=0)  # [experts]
        by_rank = torch.stack([part.sum() for part in rows.split(owned)]).double()
        room = sum(capacity_of(int(t), args.experts, args.top_k, factor) for t in tokens)
        names = [f"rows of expert {e}, on rank {r}" for e, r in enumerate(owner.tolist())]
        column = {"capacity factor": f"{factor:g}" if factor else "none"}
        column |= {name: f"{row:,}" for name, row in zip(names, rows.tolist(), strict=True)}
        column["choices dropped"] = f"{1 - rows.sum() / (args.top_k * tokens.sum()):.1%}"
        empty = f"{1 - rows.sum() / (args.experts * room):.1%}"
        column["buffer slots left empty"] = empty if factor else "-"
        column["busiest rank / mean"] = f"{by_rank.max() / by_rank.mean():.2f}"
        column["auxiliary loss, rank 0"] = f"{exact[rank][1].item():.2f}"
        column["KiB sent by rank 0, forward"] = f"{sent['forward'] / 2**10:,.1f}"
        column["  by the routing table"] = f"{formula / 2**10:,.1f}"
        uniform = bytes_of(even, owner, args.width * dtype.itemsize)
        column["  if the routing were even"] = f"{uniform / 2**10:,.1f}"
        columns.append(column)

    shape = f"{args.experts} experts of {args.width} x {args.hidden}, top {args.top_k}"
    say(f"{world_size} rank{'s' * (world_size > 1)} on {device.type}: {shape}, {args.dtype}")
    for name in columns[0]:
        say(f"{name:<28}" + "".join(f"{column[name]:>10}" for column in columns))
    worst = torch.tensor(errors).amax(dim=0)  # [results]
    rounding = 1e-5 if args.dtype == "float32" else 2**-9
    allowed = (2 * torch.tensor(bounds).amax(dim=0)).clamp(min=rounding)
    return [
        check("rows per expert, off one process's", wrong_rows, 0),
        check("bytes sent, off the routing table's", wrong_bytes, 0),
        check(
            "relative error of output and losses", worst[:3].max().item(), allowed[:3].max().item()
        ),
        check(
            "largest relative error of a gradient", worst[3:].max().item(), allowed[3:].max().item()
        ),
    ]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tokens", type=int, default=256, help="tokens on rank 0; rank r has r more")
    add("--experts", type=int, default=8, help="experts, spread over the ranks")
    add("--top-k", type=int, default=2, help="experts per token")
    add("--width", type=int, default=64, help="numbers per token")
    add("--hidden", type=int, default=128, help="width inside an expert")
    add(
        "--capacity",
        type=float,
        nargs="+",
        default=[0, 1.0, 1.25, 2.0],
        help="rows that an expert takes from a rank, in shares of an even load; 0: all",
    )
    add("--skew", type=float, default=0.25, help="deviation of the router's biases")
    add("--balance", type=float, default=0.01, help="weight of the auxiliary loss")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of all but the router")
    add("--seed", type=int, default=0, help="for weights and tokens")
    add("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args()
    least = max(args.top_k, int(os.environ.get("WORLD_SIZE", 1)))
    if args.experts < least:
        stop(f"{args.experts} experts: type --experts {least} or more, one per rank and choice")
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
