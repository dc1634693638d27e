"""A pipeline from send and receive: GPipe and 1F1B, their bubble, and what they keep in memory.

    torchrun --nproc_per_node=4 chapter2-gpu-hardware-networking-and-parallelism-strategies/code/pipeline_parallel_from_scratch.py \
        --plot chapter2-gpu-hardware-networking-and-parallelism-strategies/figures/pipeline.svg
    torchrun --nproc_per_node=3 chapter2-gpu-hardware-networking-and-parallelism-strategies/code/pipeline_parallel_from_scratch.py --batch 13 --micro-batches 4

On GPUs:
    torchrun --nproc_per_node=8 chapter2-gpu-hardware-networking-and-parallelism-strategies/code/pipeline_parallel_from_scratch.py --layers 32 --width 2048 --batch 64 --seq 512 --pace 0

Both schedules idle for the predicted (p-1)/(m+p-1) of a step, but 1F1B holds p micro-batches at most
where GPipe holds all m. A sleep stands in for a device per stage; `--pace 0` shows this machine's own
speed. In production use torch.distributed.pipelining: ScheduleGPipe, Schedule1F1B. Section 2.6.
"""

import argparse
import copy
import json
import os
import sys
import time
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record

BOUNDS = {"float32": 1e-5, "bfloat16": 3e-2}  # relative errors against float64
ROW = "{:>7}{:>11}{:>7}{:>7}{:>9}{:>9}{:>9}{:>6}{:>9}{:>9}"
HEADS = ("idle share of a step", "fastest, ms", "in flight", "kept, MB")
COLORS = {"F": "#8db6e2", "B": "#f2b36b"}
Order = list[tuple[str, int]]  # ("F" or "B", micro-batch), one after the other


def schedule(name: str, stage: int, stages: int, micro_batches: int) -> Order:
    """What a stage does in one step: forward passes "F" and backward passes "B" of micro-batches.

    GPipe: Huang et al. 2019, arXiv:1811.06965, section 2. 1F1B: Narayanan et al. 2021,
    arXiv:2104.04473, section 2.2 (PipeDream-flush).
    """
    warm_up = micro_batches  # GPipe: every forward pass comes before the first backward pass
    if name == "1F1B":  # the micro-batches that the stages after this one can have in hand
        warm_up = min(stages - stage - 1, micro_batches)
    order = [("F", i) for i in range(warm_up)]
    for i in range(micro_batches - warm_up):
        order += [("F", warm_up + i), ("B", i)]
    return order + [("B", i) for i in range(micro_batches - warm_up, micro_batches)]


class Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [batch, seq, width]
        return x + self.down(F.gelu(self.up(x)))


def build(args: argparse.Namespace, device: torch.device) -> nn.Sequential:
    """The whole model in float64; all ranks draw the same weights, by the same seed."""
    torch.manual_seed(args.seed)
    with device:
        layers = [Residual(args.width) for _ in range(args.layers)]
        embedding, head = nn.Embedding(256, args.width), nn.Linear(args.width, 256)
    return nn.Sequential(embedding, *layers, head).double()


def part_of(model: nn.Sequential, stage: int, stages: int) -> nn.Sequential:
    """One stage: its share of the layers; the first has the embedding too, the last the head."""
    first, end = (1 + (len(model) - 2) * s // stages for s in (stage, stage + 1))
    return model[first if stage else 0 : end if stage < stages - 1 else None]


def forward(model: nn.Sequential, x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Output, and the bytes that autograd keeps for the backward pass, weights not counted."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    return y, sum(size for pointer, size in kept.items() if pointer not in weights)


def run_step(
    model: nn.Sequential,
    order: Order,
    tokens: tuple,
    targets: tuple,
    groups: dict,
    args: argparse.Namespace,
) -> dict:
    """Run one stage's schedule over micro-batches [micro_batch, seq]; gradients add up in .grad.

    A send must not wait: in 1F1B a stage sends activations on while the next one sends gradients
    back, and if each first waited for the other to receive, both would wait for ever. So `isend`,
    and a process group for each direction: NCCL runs one group's sends and receives in order.
    """
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    device = targets[0].device
    count = sum(t.numel() for t in targets)  # bytes of the whole batch: the loss is their mean
    weight = next(model.parameters())
    stash = {}  # of the micro-batches in flight
    sending = []
    step = {"events": [], "loss": 0.0, "sent": 0, "in_flight": 0, "kept": 0}
    for kind, i in order:
        source, to = (rank - 1, rank + 1) if kind == "F" else (rank + 1, rank - 1)
        arrived = tokens[i]
        if 0 <= source <= last:
            arrived = weight.new_empty(*tokens[i].shape, args.width)  # [micro_batch, seq, width]
            dist.recv(arrived, source, group=groups[kind])
        synchronize(device)  # on a GPU for sends under way too, which adds to the idle time
        start = time.perf_counter()
        if kind == "F":
            x = arrived.requires_grad_(rank > 0)
            out, kept = forward(model, x)
            if rank == last:  # over the whole batch: micro-batches may differ in size
                logits = out.float().flatten(0, 1)
                out = F.cross_entropy(logits, targets[i].flatten(), reduction="sum") / count
                step["loss"] += out.item()
            stash[i] = (x, out, kept)
            step["in_flight"] = max(step["in_flight"], len(stash))
            step["kept"] = max(step["kept"], sum(kept for _, _, kept in stash.values()))
        else:
            x, y, _ = stash.pop(i)
            y.backward(None if rank == last else arrived)
            out = x.grad
        synchronize(device)
        seconds = args.pace / 1e3 * (1 if kind == "F" else 2)
        time.sleep(max(0.0, start + seconds - time.perf_counter()))
        step["events"].append((kind, i, start, time.perf_counter()))
        if 0 <= to <= last:
            out = out.detach()
            sending.append((dist.isend(out, to, group=groups[kind]), out))
            step["sent"] += out.nbytes
        if len(sending) > 2 * (last + 1):  # the oldest arrived long ago: let go of its tensor
            sending.pop(0)[0].wait()
    for work, _ in sending:
        work.wait()
    return step


def bubble(timeline: list[list]) -> tuple[float, float]:
    """Share of the step in which stages idle, and the step's seconds; a list of events per stage.

    perf_counter is CLOCK_MONOTONIC on Linux, one clock for all processes of a machine.
    """
    events = [event for stage in timeline for event in stage]
    seconds = max(end for *_, end in events) - min(start for *_, start, _ in events)
    busy = sum(end - start for *_, start, end in events)
    return 1 - busy / (len(timeline) * seconds), seconds


def reference(model: nn.Sequential, tokens: torch.Tensor, targets: torch.Tensor) -> float:
    """The loss of one process, whose gradients add up in .grad: a sequence at a time, to fit."""
    total = 0.0
    for sequence, target in zip(tokens, targets, strict=True):
        loss = F.cross_entropy(model(sequence), target, reduction="sum") / targets.numel()
        loss.backward()
        total += loss.item()
    return total


def run(args: argparse.Namespace, device: torch.device) -> list[bool | None]:
    rank, p = dist.get_rank(), dist.get_world_size()
    dtype = getattr(torch, args.dtype)
    groups = {"F": dist.new_group(), "B": dist.new_group()}
    draw = torch.Generator().manual_seed(args.seed)
    batch = torch.randint(256, (2, args.batch, args.seq), generator=draw).to(device)
    whole = build(args, device)
    model = copy.deepcopy(part_of(whole, rank, p)).to(dtype)
    loss = reference(whole, *batch)
    gradients = [w.grad for w in part_of(whole, rank, p).parameters()]
    del whole
    boundary = args.batch * args.seq * args.width * dtype.itemsize  # bytes
    must_send = boundary * ((rank > 0) + (rank < p - 1))

    ranks = f"{p} rank{'s' * (p > 1)}"
    say(f"{ranks} on {device.type}: {args.layers} layers in {p} stages, {args.dtype}")
    say(f"every F takes at least {args.pace:g} ms and every B twice that, as if on its own device")
    say("{:>7}{:>25}{:>18}{:>15}{:>18}".format("micro-", *HEADS))
    say(ROW.format("batches", "predicted", *["GPipe", "1F1B"] * 4))
    errors = {"loss": [], "gradients": [], "sent": [], "in_flight": [], "idle": []}
    rows = []
    for m in args.micro_batches:
        predicted = (p - 1) / (m + p - 1)
        fastest = {}
        for repeat in range(2 * args.repeats):
            name = ("GPipe", "1F1B")[repeat % 2]
            model.zero_grad()
            dist.barrier()
            order = schedule(name, rank, p, m)
            parts = (tensor.tensor_split(m) for tensor in batch)
            step = run_step(model, order, *parts, groups, args)
            reports = [None] * p
            dist.all_gather_object(reports, (step["events"], step["loss"]))
            timeline, losses = zip(*reports, strict=True)
            idle, seconds = bubble(timeline)
            if name not in fastest or seconds < fastest[name]["seconds"]:
                fastest[name] = {**step, "idle": idle, "seconds": seconds, "timeline": timeline}
            pairs = zip(model.parameters(), gradients, strict=True)
            errors["gradients"] += [((w.grad - g).norm() / g.norm()).item() for w, g in pairs]
            errors["loss"].append(abs(sum(losses) / loss - 1))
            errors["sent"].append(abs(step["sent"] - must_send))
            in_flight = m if name == "GPipe" else min(m, p - rank)
            errors["in_flight"].append(abs(step["in_flight"] - in_flight))
        steps = list(fastest.values())
        errors["idle"] += [abs(step["idle"] - predicted) for step in steps]
        shares = [f"{share:.3f}" for share in (predicted, *(step["idle"] for step in steps))]
        times = [f"{step['seconds'] * 1e3:.1f}" for step in steps]
        kept = [f"{step['kept'] / 1e6:.3f}" for step in steps]
        say(ROW.format(m, *shares, *times, *(step["in_flight"] for step in steps), *kept))
        rows.append({"micro_batches": m, "predicted": predicted, **fastest})
    say("in flight, kept: at most, on stage 0: micro-batches, and what their backward passes need")
    if rank == 0 and args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    if rank == 0 and args.plot:
        plot(rows[-1], args.plot)
    worst = {name: torch.tensor(values).max().item() for name, values in errors.items()}
    claims = [
        check("loss, off one process's", worst["loss"], BOUNDS[args.dtype]),
        check(
            "gradient of any parameter, off one process's", worst["gradients"], BOUNDS[args.dtype]
        ),
        check("in flight, off m (GPipe) and min(m, p - stage) (1F1B)", worst["in_flight"], 0),
        check("bytes sent, off the formula", worst["sent"], 0),
    ]
    if args.pace:
        claims.append(expect("idle share, off (p-1)/(m+p-1)", worst["idle"], 0.05, args.strict))
    return claims


def plot(row: dict, path: Path) -> None:
    """Draw the fastest step of each schedule as it ran: a row per stage."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "ch02"
    from matplotlib import pyplot

    stages = len(row["GPipe"]["timeline"])
    size = (10, 1.6 + 0.8 * stages)
    figure, axes = pyplot.subplots(2, 1, figsize=size, sharex=True, layout="constrained")
    for axis, name in zip(axes, ("GPipe", "1F1B"), strict=True):
        timeline = row[name]["timeline"]
        zero = timeline[0][0][2]
        for stage, events in enumerate(timeline):
            for kind, i, start, end in events:
                left, width = (start - zero) * 1e3, (end - start) * 1e3
                axis.barh(stage, width, 0.9, left, color=COLORS[kind], edgecolor="white")
                axis.text(left + width / 2, stage, i + 1, ha="center", va="center", size=8)
        title = f"{name}: idle {row[name]['idle']:.0%}, predicted {row['predicted']:.0%}"
        axis.set_title(title, loc="left", weight="bold", size=11)
        axis.set_yticks(range(stages), [f"stage {stage}" for stage in range(stages)])
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(left=False)
        axis.invert_yaxis()
    axes[1].set_xlabel("ms (blue: forward, orange: backward, of the micro-batch with that number)")
    figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None})


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--micro-batches", type=int, nargs="+", default=[2, 4, 8], help="per step; several")
    add("--batch", type=int, default=32, help="sequences per step")
    add("--seq", type=int, default=16, help="bytes per sequence")
    add("--width", type=int, default=64, help="size of a byte's vector")
    add("--layers", type=int, default=7, help="residual MLPs, dealt out to the stages")
    add(
        "--pace", type=float, default=15.0, help="least ms of an F, half those of a B; 0: no pacing"
    )
    add("--repeats", type=int, default=2, help="steps of each; the fastest counts")
    add("--dtype", choices=BOUNDS, default="float32", help="of weights and activations")
    add("--seed", type=int, default=0, help="for weights and data")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--plot", type=Path, help="also draw the last row's two schedules to this SVG file")
    add("--json", type=Path, help="also write timelines and bytes to this file")
    add("--strict", action="store_true", help="exit 1 if an `expect:` line does not hold")
    args = parser.parse_args()
    most, stages = max(args.micro_batches), int(os.environ.get("WORLD_SIZE", 1))
    if args.batch < most:
        stop(f"--batch {args.batch} for {most} micro-batches: type --batch {most} or more")
    if args.layers < stages:
        stop(f"--layers {args.layers} for {stages} stages: type --layers {stages} or more")
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
