"""Plan a training job: try every layout, throw out what does not fit, rank the rest by predicted time.

    python chapter2-gpu-hardware-networking-and-parallelism-strategies/code/parallelism_planner.py --plot chapter2-gpu-hardware-networking-and-parallelism-strategies/figures/planner_frontier.svg
    python chapter2-gpu-hardware-networking-and-parallelism-strategies/code/parallelism_planner.py --published
    python chapter2-gpu-hardware-networking-and-parallelism-strategies/code/parallelism_planner.py --layers 48 --width 6144 --heads 48 --ffn 16384 --gpus 32 --batch 256

A program of three files: planner_cost.py has the formulas, planner_published.py the models and
clusters, and runs whose speed is known, by which --published judges it; this one searches. Look at
what is thrown out, and where the time of the best goes. Section 2.8.
"""

import argparse
import functools
import itertools
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import NoReturn

from planner_cost import (
    Cluster,
    Job,
    Layout,
    Model,
    flops_per_token,
    layer_weights,
    memory_per_device,
    stage_layers,
    stage_weights,
    step_seconds,
)
from planner_published import CLUSTERS, MODELS, judge


@dataclass(frozen=True)
class Plan:
    layout: Layout
    memory: dict[str, float]  # bytes on the fullest GPU
    time: dict[str, float]  # s per step
    seconds: float  # all of them
    mfu: float


def refusal(job: Job, lay: Layout) -> str | None:
    """Why a layout cannot be built or is not worth a try; None if only memory can speak against it."""
    m, t, cp, sequences = job.model, lay.tensor, lay.context, lay.data * lay.micro_batch
    node = job.cluster.node
    groups = (t * cp, t * cp * lay.expert)  # of neighbours: parts of a node, or whole nodes
    reasons = {
        "TP does not divide a node": node % t,
        "TP x CP (x EP) straddles nodes": any(node % n and n % node for n in groups),
        "heads do not divide by TP": m.heads % t or max(m.kv_heads, t) % min(m.kv_heads, t),
        "sequence does not divide by 2 x CP": cp > 1 and job.context % (2 * cp),  # zigzag
        # the embedding and the head count as a layer each
        "fewer layers than pipeline chunks": lay.pipeline * lay.chunks > m.layers + 2,
        "batch does not divide by DP x micro-batch": job.batch % sequences,
        "fewer micro-batches than stages": lay.chunks > 1 and job.batch // sequences < lay.pipeline,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def layouts(job: Job, fixed: dict) -> Iterator[Layout]:
    """Every layout that uses all GPUs; `fixed` pins some of its fields."""
    for t, cp, p in itertools.product(*[divisors(job.gpus)] * 3):
        d, rest = divmod(job.gpus, t * cp * p)
        here = {"tensor": t, "context": cp, "pipeline": p, "data": d}
        if rest or here | fixed != fixed | here:
            continue
        parts = [e for e in divisors(d) if job.model.experts % e == 0] if job.model.experts else [1]
        options = {"expert": parts, "zero": [0, 1, 2, 3] if d * cp > 1 else [0]}
        options |= {"micro_batch": [1, 2, 4, 8], "chunks": [1, 2, 4, 8] if p > 1 else [1]}
        options |= {"recompute": ["none", "selective", "full"]}
        options |= {name: [fixed[name]] for name in options if name in fixed}
        for values in itertools.product(*options.values()):
            yield Layout(**here, **dict(zip(options, values, strict=True)))


@functools.cache
def first_of_each_kind(m: Model, stages: int) -> set[int]:
    """Stages among which the fullest is: of equal ones, the first has most micro-batches in flight."""
    layers = stage_layers(m.layers, stages)
    kinds = [(stage_weights(m, stages, i), len(layers[i])) for i in range(stages)]
    return {kinds.index(kind) for kind in kinds} | {stages - 1}  # the last has the logits


def search(job: Job, fixed: dict) -> tuple[list[Plan], Counter]:
    """The plans that fit, the fastest first, and how many layouts were thrown out for what."""
    plans: list[Plan] = []
    thrown_out: Counter[str] = Counter()
    ideal = flops_per_token(job.model, job.context) * job.batch * job.context / job.gpus
    ideal /= job.cluster.peak
    for lay in layouts(job, fixed):
        reason = refusal(job, lay)
        stages = () if reason else first_of_each_kind(job.model, lay.pipeline)
        held = [memory_per_device(job, lay, i) for i in stages]
        memory = max(held, key=lambda kinds: sum(kinds.values()), default={})
        if sum(memory.values()) > job.cluster.memory:
            reason = "memory"
        if reason:
            thrown_out[reason] += 1
            continue
        time = step_seconds(job, lay)
        seconds = sum(time.values())
        plans.append(Plan(lay, memory, time, seconds, ideal / seconds))
    return sorted(plans, key=lambda plan: float(f"{plan.seconds:.9g}")), thrown_out


def explain(plans: list[Plan]) -> None:
    """For each choice of the best plan: the best plan that chooses otherwise, and what it costs."""
    best = plans[0]
    for name, value in asdict(best.layout).items():
        others = [plan for plan in plans if getattr(plan.layout, name) != value]
        if others and name != "data":
            longer = others[0].seconds / best.seconds - 1
            label = f"  {name.replace('_', ' ')} {value}:"
            say(f"{label:<23}otherwise {longer:.1%} slower, with {others[0].layout}")


def run(args: argparse.Namespace, job: Job) -> list[tuple[str, float, float]]:
    """Search, print the reasons and the best plan of each shape; return what is to be checked."""
    m = job.model
    weights = sum(sum(layer_weights(m, i)) for i in range(m.layers)) + 2 * m.vocab * m.width
    say(f"1 process on cpu: {weights / 1e9:,.4g} billion parameters on {job.gpus:,} devices")
    plans, thrown_out = search(job, {})
    say(f"{job.batch:,} sequences of {job.context:,} tokens per step")
    say(f"{len(plans) + thrown_out.total():>9,}  layouts; thrown out:")
    for reason, count in thrown_out.most_common():
        say(f"{count:>9,}  {reason}")
    units = "GiB per device (kept: activations), % of a step"
    say(f"{len(plans):>9,}  left; the fastest of each shape, {units}:")
    if not plans:
        stop("no layout fits: type more --gpus, or a smaller --batch or --context")
    shapes: dict[tuple, Plan] = {}
    for plan in plans:
        shapes.setdefault(astuple(plan.layout)[:5], plan)
    shown = list(shapes.values())[: args.top]
    kinds = [kind for kind in shown[0].time if any(plan.time[kind] for plan in shown)]
    table = {"": (*shown[0].memory, "s/step", *kinds, "MFU")}
    for plan in shown:
        shares = [*(plan.time[kind] / plan.seconds for kind in kinds), plan.mfu]
        held = [f"{count / 2**30:.1f}" for count in plan.memory.values()]
        times = [f"{plan.seconds:.4g}", *(f"{100 * share:.1f}" for share in shares)]
        table[str(plan.layout)] = (*held, *times)
    for label, texts in table.items():
        say(f"{label:<34}" + "".join(f"{text:>9}" for text in texts))
    say("why the first:")
    explain(plans)
    if args.plot:
        plot(plans, args.plot)
    if args.json:
        args.json.write_text(json.dumps([asdict(plan) for plan in shown], indent=1) + "\n")
    wrong = 0
    missing = 0.0
    for lay in (plan.layout for plan in shapes.values()):
        sharded = [memory_per_device(job, replace(lay, zero=2), i) for i in range(lay.pipeline)]
        held = sum(stage["grads"] for stage in sharded) * job.gpus / lay.pipeline
        missing = max(missing, abs(held / job.cluster.item / weights - 1))
        used = lay.tensor * lay.context * lay.pipeline * lay.data
        most = max(sum(memory_per_device(job, lay, i).values()) for i in range(lay.pipeline))
        wrong += used != job.gpus or most > job.cluster.memory
    return [
        ("shards of all devices, off the model's parameters by", missing, 1e-9),
        ("layouts that leave a device idle or overfill one", wrong, 0),
    ]


def plot(plans: list[Plan], path: Path) -> None:
    """Memory and time of every plan; those that no other plan beats in both are joined."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "planner"
    from matplotlib import pyplot

    points = {}
    for plan in plans:
        gib = round(sum(plan.memory.values()) / 2**30, 1)
        points[gib, float(f"{plan.seconds:.3g}")] = plan.layout.tensor
    frontier = []
    for gib, seconds in sorted(points):
        if not frontier or seconds < frontier[-1][1]:
            frontier.append((gib, seconds))
    figure, axis = pyplot.subplots(figsize=(7, 4.2))
    for t in sorted(set(points.values())):
        dots = [point for point, tensor in points.items() if tensor == t]
        axis.scatter(*zip(*dots, strict=True), s=7, alpha=0.6, linewidths=0, label=f"TP {t}")
    axis.plot(*zip(*frontier, strict=True), color="black", linewidth=1, label="frontier")
    axis.scatter(*frontier[-1], marker="*", s=130, color="black", zorder=3, label="the choice")
    axis.set(xlabel="GiB on the fullest device", ylabel="predicted s per step")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None})


def calibrated(path: Path) -> Cluster:
    """This machine as one node, by calibrate.py; its all-reduce stands for all collectives."""
    unused = {"alpha_s": 0.0, "beta_bytes_per_s": 1.0}  # by one rank
    try:
        found = json.loads(path.read_text())
        ranks = found["world_size"]
        line = found["collectives"]["all_reduce"] if ranks > 1 else unused
        memory_rate = found["memory_bytes_per_s"]
        if found["device"] == "cpu":
            rate, item = found["matmul_flops_per_s"]["float32"], 4
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks
        else:
            rate, item = found["bf16_flops"], 2
            memory = found["memory_bytes"]
    except (OSError, ValueError, KeyError) as error:
        reason = f"{type(error).__name__} {error}"
        stop(f"--calibration {path}: {reason}: make the file with calibrate.py")
    alpha, beta = line["alpha_s"] / 2, line["beta_bytes_per_s"]  # two collectives in one
    links = {"inside": beta, "across": beta, "node": ranks, "alpha": (alpha, alpha)}
    return Cluster(rate, rate, rate, memory_rate, 0.9 * memory, **links, item=item)


FIELDS = {
    "layers": "transformer blocks", "width": "size of a token's vector", "heads": "attention heads",
    "kv_heads": "heads of keys and values", "ffn": "inner width of an FFN", "vocab": "tokens",
    "experts": "routed experts per layer", "active": "of them, per token",
    "expert_ffn": "inner width of an expert",
}  # fmt: skip


def make_job(args: argparse.Namespace) -> Job:
    """The job that the flags describe."""
    cluster = calibrated(args.calibration) if args.calibration else CLUSTERS[args.cluster]
    model = MODELS[args.model or ("tiny" if args.calibration else "llama3-70b")]
    given = {name: getattr(args, name) for name in FIELDS if getattr(args, name)}
    if "experts" in given:
        given = {"active": 2, "expert_ffn": given.get("ffn", model.ffn)} | given
    model = replace(model, **given)
    width, heads, kv = model.width, model.heads, model.kv_heads
    if width % heads or heads % kv:
        stop(f"--kv-heads {kv} must divide --heads {heads}, and that --width {width}")
    if model.active > model.experts:
        stop(f"--active {model.active} is more than --experts {model.experts}: give --experts")
    if {"width", "heads"} & given.keys():
        model = replace(model, head_dim=width // heads, projections=0)
    gpus, context = (cluster.node, 128) if args.calibration else (64, 8192)
    gpus = args.gpus or gpus
    cluster = replace(cluster, node=min(cluster.node, gpus))
    return Job(model, cluster, gpus, args.batch, args.context or context)


def parse_args() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--published", action="store_true", help="predict published runs instead")
    add("--model", choices=MODELS, help="default: llama3-70b")
    for name, what in FIELDS.items():
        add(f"--{name.replace('_', '-')}", type=int, help=f"{what}; default: as in --model")
    add("--cluster", choices=CLUSTERS, default="h100", help="its GPU, 8 in a node")
    add("--calibration", type=Path, help="plan for this machine: calibrate.py's file")
    add("--gpus", type=int, help="devices; default: 64, or the calibrated ranks")
    add("--batch", type=int, default=512, help="sequences per step")
    add("--context", type=int, help="tokens per sequence; default: 8192, or 128")
    add("--top", type=int, default=6, help="layouts to print")
    add("--plot", type=Path, help="also draw memory and time to this SVG file")
    add("--json", type=Path, help="also write the printed plans to this file")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    claims = judge(search) if args.published else run(args, make_job(args))
    sys.exit(conclude([check(*claim) for claim in claims]))


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


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
