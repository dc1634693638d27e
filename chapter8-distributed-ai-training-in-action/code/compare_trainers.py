"""How fast train.py is: its step beside Hugging Face's Trainer and a plain loop, in turns.

    torchrun --nproc_per_node=2 chapter8-distributed-ai-training-in-action/code/compare_trainers.py --plot chapter8-distributed-ai-training-in-action/figures/trainers.svg

On GPUs:
    torchrun --nproc_per_node=8 chapter8-distributed-ai-training-in-action/code/compare_trainers.py --width 2048 --layers 12 --heads 16 --kv-heads 8 --hidden 8192 --batch 64 --dtype bfloat16

All three start from the same weights and train on the same windows, so their losses must be equal.
What a trainer adds to a step does not grow with the model: look at steps of some milliseconds, at
those of the flags' model, and at what the first predict of the second. Section 8.5.
"""

import argparse
import json
import os
import time
from argparse import Namespace
from pathlib import Path

import torch
import torch._dynamo  # before the group, or gloo's threads outlive it: section 3.8
import torch.distributed as dist
from baselines import (
    CLIP,
    DTYPES,
    Race,
    hf_trainer,
    loader_of,
    mean_loss,
    model_of_train_py,
    plain_loop,
    train_py,
    windows_of,
)
from data import read_meta
from launch import check, conclude, from_rank_0, join_group, say, stop
from model import Config, Llama
from prepare_data import TEXTS, prepare
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record

SIZES = ("width", "layers", "heads", "kv_heads", "hidden", "context")
TRAINERS = ("HF Trainer", "plain loop", "train.py")


def run_race(
    race: Race, args: Namespace, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Seconds of a step, [trainers, rounds], and the losses, [trainers, steps].

    The Trainer has the loop. Between its steps the others make as many of theirs.
    """
    windows = windows_of(race, args)
    others = {
        "plain loop": plain_loop(race, windows, args, device),
        "train.py": train_py(race, args, device),
    }
    seconds: dict[str, list[float]] = {name: [] for name in TRAINERS}
    losses: dict[str, list[torch.Tensor]] = {name: [] for name in TRAINERS}
    start = 0.0

    def take_turns(step: int) -> None:
        nonlocal start
        if step and step % race.burst == 0:
            seconds["HF Trainer"].append(seconds_since(start, device))
            for name, steps in others.items():
                start = start_together(device)
                losses[name] += [next(steps) for _ in range(race.burst)]
                seconds[name].append(seconds_since(start, device))
        if step % race.burst == 0:
            start = start_together(device)

    losses["HF Trainer"] = hf_trainer(race, windows, args, device, take_turns)
    timed = torch.tensor([seconds[name][1:] for name in TRAINERS], device=device) / race.burst
    dist.all_reduce(timed, op=dist.ReduceOp.MAX)  # a step is over when its slowest rank is
    pooled = torch.stack([torch.stack(losses[name]) for name in TRAINERS])
    dist.all_reduce(pooled)
    return timed.cpu(), pooled.cpu()


def where_time_goes(race: Race, args: Namespace, device: torch.device) -> dict[str, float]:
    """Median seconds of a step's parts. Each is waited for, so that they can be told apart."""
    ddp_model, (optimizer,) = model_of_train_py(race, args, device)
    times = []
    for window in windows_of(race, args)[: race.rounds, dist.get_rank()].to(device):
        start = start_together(device)
        loss = mean_loss(ddp_model, window, args)
        forward = seconds_since(start, device)
        start = start_together(device)
        loss.backward()
        reduced = seconds_since(start, device)
        start = start_together(device)
        nn.utils.clip_grad_norm_(ddp_model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        stepped = seconds_since(start, device)
        with ddp_model.no_sync():  # nothing is sent: a rank's own work
            loss = mean_loss(ddp_model, window, args)
            start = start_together(device)
            loss.backward()
            backward = seconds_since(start, device)
        optimizer.zero_grad()
        times.append([forward, backward, reduced - backward, stepped])
    medians = torch.tensor(times, device=device).median(0).values
    dist.all_reduce(medians, op=dist.ReduceOp.MAX)
    parts = ("forward", "backward", "all-reduce in the open", "clipping and AdamW")
    return dict(zip(parts, medians.clamp(min=0).tolist(), strict=True))


def start_together(device: torch.device) -> float:
    synchronize(device)
    dist.barrier()
    return time.perf_counter()


def seconds_since(start: float, device: torch.device) -> float:
    synchronize(device)
    return time.perf_counter() - start


def report(race: Race, seconds: torch.Tensor, parts: dict[str, float]) -> None:
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Llama(race.config).parameters())
    say(f"{race.name}: {parameters:,} parameters, {race.tokens:,} tokens a step of all ranks")
    say(f"{'':<12}{'ms of a step':>13}  {'quartiles':<14}{'tokens/s':>9}")
    for name, times in zip(TRAINERS, seconds, strict=True):
        low, median, high = quartiles((1e3 * times).tolist())
        spread = f"{low:.1f}-{high:.1f}"
        say(f"{name:<12}{median:>13.1f}  {spread:<14}{1e3 * race.tokens / median:>9,.0f}")
    total = sum(parts.values())
    say("a step: " + ", ".join(f"{name} {s / total:.0%}" for name, s in parts.items()))


def ratios(seconds: torch.Tensor) -> list[float]:
    """How many times each trainer's tokens/s train.py has: the median over the rounds."""
    return (seconds / seconds[-1]).quantile(0.5, dim=1).tolist()


def predict(short: torch.Tensor, long: torch.Tensor) -> tuple[list[float], list[float]]:
    """Seconds that each trainer adds to a short step of train.py, and what long ones should take."""
    added = (short - short[-1]).quantile(0.5, dim=1)
    return added.tolist(), (1 + added / long[-1].quantile(0.5)).tolist()


def run(args: Namespace, device: torch.device) -> list[bool | None]:
    n = dist.get_world_size()
    if args.batch % n:
        stop(f"--batch {args.batch} does not divide by {n} ranks: the Trainer wants equal shares")
    if not from_rank_0(args.data.is_dir):
        from_rank_0(lambda: prepare(TEXTS, args.data, 2048))
    vocabulary = read_meta(args.data)["vocabulary"]
    config = Config(vocabulary, **{name: getattr(args, name) for name in SIZES})
    # The draft model: what a trainer does around the model shows.
    draft = Config(vocabulary, width=64, layers=3, heads=2, kv_heads=2, hidden=176, context=64)
    races = [
        Race("short steps", draft, batch=n, rounds=8, burst=10),
        Race("long steps", config, args.batch, args.rounds, args.burst),
    ]
    for race in races:
        loader_of(race, args, rank=0)  # stops if there are too few windows
    say(f"{n} rank{'s' * (n > 1)} on {device.type}, {args.dtype}; the three take turns")
    measured, parts = {}, {}
    away = torch.zeros(len(TRAINERS))
    for race in races:
        measured[race.name], losses = run_race(race, args, device)
        parts[race.name] = where_time_goes(race, args, device)
        report(race, measured[race.name], parts[race.name])
        away = away.maximum((losses - losses[-1]).abs().amax(1))
    short, long = measured.values()
    added, predicted = predict(short, long)
    found = ratios(long)
    say(f"{'':<12}{'adds to a short step':>22}{'a long step, train.py = 1':>28}")
    say(f"{'':<12}{'':>22}{'predicted':>18}{'measured':>10}")
    for i, name in enumerate(TRAINERS[:-1]):
        say(f"{name:<12}{1e3 * added[i]:>19.1f} ms{predicted[i]:>18.3f}{found[i]:>10.3f}")
    if dist.get_rank() == 0 and args.json:
        seconds = {
            name: dict(zip(TRAINERS, s.tolist(), strict=True)) for name, s in measured.items()
        }
        args.json.write_text(json.dumps({"seconds": seconds, "parts": parts}, indent=1) + "\n")
    if dist.get_rank() == 0 and args.plot:
        draw(measured, parts, args.plot)
    bound = 1e-5 if args.dtype == "float32" else 0.05
    astray = max(abs(a - b) for a, b in zip(found, predicted, strict=True))
    of_trainer, of_loop, _ = ratios(short)
    times = "short steps: tokens/s of train.py / of the"
    return [
        check("max |loss - train.py's|, HF Trainer", away[0].item(), bound),
        check("max |loss - train.py's|, plain loop", away[1].item(), bound),
        expect(f"{times} HF Trainer", of_trainer, 1.2, args.strict, at_least=True),
        expect(f"{times} plain loop", of_loop, 1, args.strict, at_least=True),
        expect("long steps: |ratio - predicted|, the larger", astray, 0.05, args.strict),
    ]


def draw(measured: dict[str, torch.Tensor], parts: dict[str, dict], path: Path) -> None:
    """A step of each trainer beside train.py's, and the parts of that."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "trainers"  # else its names differ from run to run
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, (name, seconds) in enumerate(measured.items()):
        low, median, high = (seconds / seconds[-1]).quantile(torch.tensor([0.25, 0.5, 0.75]), dim=1)
        spread = torch.stack([median - low, high - median])
        left.bar(torch.arange(3) + 0.4 * i, median, 0.38, yerr=spread, capsize=3, label=name)
        start = 0.0
        for j, share in enumerate(parts[name].values()):
            width = 100 * share / sum(parts[name].values())
            right.barh(name, width, left=start, color=f"C{j + 2}")
            start += width
    left.set_xticks(torch.arange(3) + 0.2, TRAINERS)
    left.set_title("time of a step, train.py's = 1", fontsize=10)
    left.legend(fontsize=8, loc="upper right")
    right.set_title("parts of a step, %", fontsize=10)
    right.legend(list(parts["short steps"]), fontsize=7, ncols=2, loc="upper center")
    right.set_ylim(-0.6, 2.3)
    figure.savefig(path, format="svg", metadata={"Date": None})


def parse_args() -> Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, default="runs/ch08_data", help="prepare_data.py's folder")
    for name in SIZES:
        default = getattr(Config, name)
        add(f"--{name.replace('_', '-')}", type=int, default=default, help=f"default: {default}")
    add("--batch", type=int, default=4, help="windows per long step, of all ranks")
    add("--rounds", type=int, default=6, help="turns of each trainer in long steps, after one more")
    add("--burst", type=int, default=1, help="long steps in a turn")
    add("--lr", type=float, default=3e-4, help="AdamW's learning rate")
    add("--dtype", choices=DTYPES, default="float32", help="of the products")
    add("--seed", type=int, default=0, help="for weights and shuffling")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--json", type=Path, help="also write the seconds to this file")
    add("--plot", type=Path, help="draw the result into this SVG file")
    add("--strict", action="store_true", help="exit 1 if an `expect:` line does not hold")
    args = parser.parse_args()
    for name in (*SIZES, "batch", "rounds", "burst"):
        if getattr(args, name) < 1:
            stop(f"--{name.replace('_', '-')} {getattr(args, name)}: type 1 or more")
    if args.width % (2 * args.heads) or args.heads % args.kv_heads:
        stop(f"--width must divide by 2 x --heads, and --heads by --kv-heads {args.kv_heads}")
    return args


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


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


# Copied from ch01_single_gpu_baseline.expect
def expect(
    claim: str, value: float, bound: float, strict: bool, at_least: bool = False
) -> bool | None:
    """Print whether a value that depends on the machine keeps its bound; judge it if `strict`."""
    held = bool(value >= bound if at_least else value <= bound)
    verdict = "ok" if held else "not here"
    say(f"expect: {claim} = {value:.3g} {'>=' if at_least else '<='} {bound:.3g}  {verdict}")
    return held if strict else None


if __name__ == "__main__":
    main()
