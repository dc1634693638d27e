"""A pipeline from send and receive: GPipe and 1F1B, their bubble, and what they keep in memory.

    torchrun --nproc_per_node=2 chapter2-gpu-hardware-networking-and-parallelism-strategies/code/pipeline_parallel_from_scratch.py
    torchrun --nproc_per_node=3 chapter2-gpu-hardware-networking-and-parallelism-strategies/code/pipeline_parallel_from_scratch.py --batch 13 --micro-batches 4

On GPUs:
    torchrun --nproc_per_node=8 chapter2-gpu-hardware-networking-and-parallelism-strategies/code/pipeline_parallel_from_scratch.py --layers 32 --width 4096 --batch 64 --seq 512 --pace 0

Both schedules idle for the predicted (p-1)/(m+p-1) of a step, but 1F1B holds p micro-batches at most
where GPipe holds all m. A sleep stands in for a device per stage; `--pace 0` shows this machine's own
speed. In production use torch.distributed.pipelining: ScheduleGPipe, Schedule1F1B. Section 2.6.
"""

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

BOUNDS = {"float32": 1e-5, "bfloat16": 3e-2}  # relative errors against float64
IDLE_BOUND = 0.08
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


def build(args: argparse.Namespace, stage: int, stages: int) -> nn.Sequential:
    """One stage of the model; all ranks draw the same weights, in float64, from the same seed."""
    torch.manual_seed(args.seed)
    layers = [Residual(args.width) for _ in range(args.layers)]
    model = nn.Sequential(nn.Embedding(256, args.width), *layers, nn.Linear(args.width, 256))
    first, end = (1 + args.layers * s // stages for s in (stage, stage + 1))
    return model.double()[first if stage else 0 : end if stage < stages - 1 else None]


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
    model: nn.Sequential, order: Order, tokens: tuple, targets: tuple, args: argparse.Namespace
) -> dict:
    """Run one stage's schedule over micro-batches [micro_batch, seq]; gradients add up in .grad.

    A send must not wait: in 1F1B a stage sends activations on while the next one sends gradients
    back, and if each first waited for the other to receive, both would wait for ever. So `isend`,
    and a process group for each direction: NCCL runs one group's sends and receives in order.
    """
    rank, last, device = dist.get_rank(), dist.get_world_size() - 1, targets[0].device
    count, weight = sum(t.numel() for t in targets), next(model.parameters())
    stash, sending, step = {}, [], {"events": [], "loss": 0.0, "sent": 0, "in_flight": 0, "kept": 0}
    for kind, i in order:
        source, to = (rank - 1, rank + 1) if kind == "F" else (rank + 1, rank - 1)
        arrived = tokens[i]
        if 0 <= source <= last:
            arrived = weight.new_empty(*tokens[i].shape, args.width)  # [micro_batch, seq, width]
            dist.recv(arrived, source, group=args.groups[kind])
        synchronize(device)
        start = time.perf_counter()
        if kind == "F":
            x = arrived.requires_grad_(rank > 0)
            out, kept = forward(model, x)
            if rank == last:  # over the whole batch's size: micro-batches may differ in theirs
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
            sending.append((dist.isend(out, to, group=args.groups[kind]), out))
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


def reference(
    args: argparse.Namespace, tokens: torch.Tensor, targets: torch.Tensor
) -> tuple[float, list[torch.Tensor]]:
    """One process, whole batch, float64: the loss, and the gradients of all parameters in order."""
    model = build(args, 0, 1).to(tokens.device)
    loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    return loss.item(), list(torch.autograd.grad(loss, list(model.parameters())))


def run(args: argparse.Namespace, device: torch.device) -> bool:
    rank, p = dist.get_rank(), dist.get_world_size()
    args.groups = {"F": dist.new_group(), "B": dist.new_group()}
    draw = torch.Generator().manual_seed(args.seed)
    batch = torch.randint(256, (2, args.batch, args.seq), generator=draw).to(device)
    loss, gradients = reference(args, *batch)
    model = build(args, rank, p).to(device, getattr(torch, args.dtype))
    before = sum(len(list(build(args, stage, p).parameters())) for stage in range(rank))
    boundary = args.batch * args.seq * args.width * getattr(torch, args.dtype).itemsize  # bytes
    must_send = boundary * ((rank > 0) + (rank < p - 1))

    ranks = f"{p} rank{'s' * (p > 1)}"
    say(f"{ranks} on {device.type}: {args.layers} layers in {p} stages, {args.dtype}")
    say(f"every F takes at least {args.pace:g} ms and every B twice that, as if on its own device")
    say("{:>7}{:>25}{:>18}{:>15}{:>18}".format("micro-", *HEADS))
    say(ROW.format("batches", "predicted", *["GPipe", "1F1B"] * 4))
    off = {"loss": [], "gradients": [], "sent": [], "in_flight": [], "bubble": []}
    record = []
    for m in args.micro_batches:
        best, predicted = {}, (p - 1) / (m + p - 1)
        for repeat in range(2 * args.repeats):
            name = ("GPipe", "1F1B")[repeat % 2]
            model.zero_grad()
            dist.barrier()
            order = schedule(name, rank, p, m)
            step = run_step(model, order, *(whole.tensor_split(m) for whole in batch), args)
            timeline = [None] * p
            dist.all_gather_object(timeline, step["events"])
            idle, seconds = bubble(timeline)
            if name not in best or seconds < best[name]["seconds"]:
                best[name] = {**step, "idle": idle, "seconds": seconds, "timeline": timeline}
            pairs = zip(model.parameters(), gradients[before:], strict=False)
            off["gradients"] += [((w.grad - g).norm() / g.norm()).item() for w, g in pairs]
            off["loss"].append(abs(step["loss"] / loss - 1) if rank == p - 1 else 0.0)
            off["sent"].append(abs(step["sent"] - must_send))
            in_flight = m if name == "GPipe" else min(m, p - rank)
            off["in_flight"].append(abs(step["in_flight"] - in_flight))
        steps = list(best.values())
        off["bubble"] += [abs(step["idle"] - predicted) for step in steps]
        shares = [f"{share:.3f}" for share in (predicted, *(step["idle"] for step in steps))]
        times = [f"{step['seconds'] * 1e3:.1f}" for step in steps]
        kept = [f"{step['kept'] / 1e6:.3f}" for step in steps]
        say(ROW.format(m, *shares, *times, *(step["in_flight"] for step in steps), *kept))
        record.append({"micro_batches": m, "predicted": predicted, **best})
    say("in flight, kept: at most, on stage 0: micro-batches, and what their backward passes need")
    if rank == 0 and args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    if rank == 0 and args.plot:
        plot(record[-1], args.plot)
    bound, off = BOUNDS[args.dtype], {name: worst(values) for name, values in off.items()}
    held = [
        check("loss, off one process's", off["loss"], bound),
        check("gradient of any parameter, off one process's", off["gradients"], bound),
        check("in flight, off m (GPipe) and min(m, p - stage) (1F1B)", off["in_flight"], 0),
        check("bytes sent, off the formula", off["sent"], 0),
    ]
    if args.pace:
        held.append(check("idle share, off (p-1)/(m+p-1)", off["bubble"], IDLE_BOUND))
    return all(held)


def plot(record: dict, path: Path) -> None:
    """Draw the fastest step of each schedule as it ran: a row per stage."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "ch02"
    from matplotlib import pyplot

    stages = len(record["GPipe"]["timeline"])
    size = (10, 1.6 + 0.8 * stages)
    figure, axes = pyplot.subplots(2, 1, figsize=size, sharex=True, layout="constrained")
    for axis, name in zip(axes, ("GPipe", "1F1B"), strict=True):
        timeline = record[name]["timeline"]
        zero = timeline[0][0][2]
        for stage, events in enumerate(timeline):
            for kind, i, start, end in events:
                left, width = (start - zero) * 1e3, (end - start) * 1e3
                axis.barh(stage, width, 0.9, left, color=COLORS[kind], edgecolor="white")
                axis.text(left + width / 2, stage, i + 1, ha="center", va="center", size=8)
        title = f"{name}: idle {record[name]['idle']:.0%}, predicted {record['predicted']:.0%}"
        axis.set_title(title, loc="left", weight="bold", size=11)
        axis.set_yticks(range(stages), [f"stage {stage}" for stage in range(stages)])
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(left=False)
        axis.invert_yaxis()
    axes[1].set_xlabel("ms (blue: forward, orange: backward, of the micro-batch with that number)")
    figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None})


def worst(values: list[float]) -> float:
    """The largest; NaN if one is NaN, which Python's max() can pass over."""
    return math.nan if any(map(math.isnan, values)) else max(values)


def check(claim: str, value: float, bound: float) -> bool:
    """Print whether the worst rank keeps `value` within `bound`; all ranks get the same answer."""
    values = [0.0] * dist.get_world_size()
    dist.all_gather_object(values, value)
    held = worst(values) <= bound  # not so for NaN
    say(f"check: {claim} = {worst(values):.3g} <= {bound:.3g}  {'ok' if held else 'FAILED'}")
    return held


def say(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


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


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: stop(f"{message}: --help lists the flags")
    add = parser.add_argument
    add("--micro-batches", type=positive, nargs="+", default=[2, 4, 8], help="per step; several")
    add("--batch", type=positive, default=32, help="sequences per step")
    add("--seq", type=positive, default=16, help="bytes per sequence")
    add("--width", type=positive, default=64, help="size of a byte's vector")
    add("--layers", type=positive, default=7, help="residual MLPs, dealt out to the stages")
    add(
        "--pace", type=float, default=20.0, help="least ms of an F, half those of a B; 0: no pacing"
    )
    add("--repeats", type=positive, default=3, help="steps of each; the fastest counts")
    add("--dtype", choices=BOUNDS, default="float32", help="of weights and activations")
    add("--seed", type=int, default=0, help="for weights and data")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--plot", type=Path, help="also draw the last row's two schedules to this SVG file")
    add("--json", type=Path, help="also write timelines and bytes to this file")
    args = parser.parse_args()
    most, stages = max(args.micro_batches), int(os.environ.get("WORLD_SIZE", 1))
    if args.batch < most:
        stop(f"--batch {args.batch} for {most} micro-batches: type --batch {most} or more")
    if args.layers < stages:
        stop(f"--layers {args.layers} for {stages} stages: type --layers {stages} or more")
    if not 0 <= args.pace < 1e4:
        stop(f"--pace {args.pace}: type a number of milliseconds, or 0 for none")
    for path in filter(None, (args.plot, args.json)):
        try:
            path.open("ab").close()
        except OSError as error:
            stop(f"cannot write {path} ({error.strerror}): give another file")
    return args


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
