"""Where does a step of DDP go? Every rank's trace, merged on one clock, and read: who waits for whom?

    torchrun --nproc_per_node=2 chapter3-distributed-training-with-pytorch-ddp/code/profile_ddp.py
    torchrun --nproc_per_node=2 chapter3-distributed-training-with-pytorch-ddp/code/profile_ddp.py --straggler 1 60 --plot chapter3-distributed-training-with-pytorch-ddp/figures/profile_ddp.svg

On GPUs:
    torchrun --nproc_per_node=8 chapter3-distributed-training-with-pytorch-ddp/code/profile_ddp.py --width 1024 --layers 12 --context 1024 --batch 32

With a straggler, look at where the lost time shows: idle on the one that is late, exposed
communication on all the others. Then open merged.json.gz in ui.perfetto.dev: a process per rank.
Section 3.4.
"""

import argparse
import gzip
import json
import os
import sys
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler says when it starts and stops
import torch
import torch._dynamo  # before the group, or gloo's threads outlive it: section 3.8
import torch.distributed as dist
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import profile, record_function

ROWS = (  # of the figure: color, place above the rank's, label
    ("#5e3c99", -0.38, "computes"),
    ("#fdb863", 0.02, "all-reduce, hidden"),
    ("#e66101", 0.02, "all-reduce, exposed"),
)
GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")  # what a trace says that a GPU does
PARTS = ("step", "compute", "hidden", "exposed", "waiting", "idle")
Spans = list[tuple[int, int]]  # (begin, end) in ns
Timeline = dict[str, Spans]  # a rank's steps, its computation, and its all-reduces in their order


def union(spans: Spans) -> Spans:
    """The same time in order, and none of it twice."""
    joined: Spans = []
    for begin, end in sorted(spans):
        if joined and begin <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((begin, end))
    return joined


def clip(spans: Spans, begin: int, end: int) -> Spans:
    """The part of the spans from begin to end, in order, and none of it twice."""
    return union([(max(a, begin), min(b, end)) for a, b in spans if a < end and b > begin])


def gaps(spans: Spans, begin: int, end: int) -> Spans:
    """What sorted, disjoint spans leave of the time from begin to end."""
    edges = [begin, *(edge for span in spans for edge in span), end]
    return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]


def length(spans: Spans) -> int:
    return sum(end - begin for begin, end in spans)


def read_timeline(events: list[dict], device: torch.device) -> Timeline:
    """Read a trace. On a CPU, computation is an operator of the main thread, and an all-reduce goes
    on from its call there until gloo's thread is done with it. On a GPU, both are its own work.
    """
    timed = sorted((e for e in events if e["ph"] == "X"), key=lambda e: e["ts"])
    steps = [e for e in timed if e["name"] == "step" and e["cat"] == "user_annotation"]
    if device.type == "cpu":
        calls = [span(e)[0] for e in timed if e["name"] == "c10d::allreduce_"]
        ends = [span(e)[1] for e in timed if e["name"] == "gloo:all_reduce"]
        sends = list(zip(calls, ends, strict=True))  # gloo takes them up in the order of the calls
        works = [span(e) for e in timed if e["cat"] == "cpu_op" and e["tid"] == steps[0]["tid"]]
    else:
        kernels = [(span(e), "nccl" in e["name"].lower()) for e in timed if e["cat"] in GPU_WORK]
        sends, works = ([s for s, nccl in kernels if nccl is wanted] for wanted in (True, False))
    return {"steps": [span(e) for e in steps], "works": works, "sends": sends}


def span(event: dict) -> tuple[int, int]:
    return round(event["ts"] * 1e3), round((event["ts"] + event["dur"]) * 1e3)


def account(ranks: list[Timeline]) -> list[list[dict]]:
    """Where each step of each rank went, in ns, and for whom the rank waited: [steps][ranks].

    No rank leaves an all-reduce before the last one has called it. What a rank spends in it until
    then, with nothing to compute, it waits for that one.
    """
    calls = list(zip(*([begin for begin, _ in rank["sends"]] for rank in ranks), strict=True))
    table: list[list[dict]] = [[] for _ in ranks[0]["steps"]]
    for r, rank in enumerate(ranks):
        waits: list[Spans] = [[] for _ in ranks]  # by the rank that is waited for
        for call in calls:
            waits[call.index(max(call))].append((call[r], max(call)))
        for row, step in zip(table, rank["steps"], strict=True):
            computes = clip(rank["works"], *step)
            communicates = clip(rank["sends"], *step)
            free = gaps(computes, *step)
            waited = [overlap(clip(wait, *step), free) for wait in waits]
            row.append(
                {
                    "step": step[1] - step[0],
                    "compute": length(computes),
                    "hidden": overlap(communicates, computes),
                    "exposed": overlap(communicates, free),
                    "waiting": sum(waited),
                    "idle": length(gaps(union(computes + communicates), *step)),
                    "waits": waited,
                }
            )
    return table


def clock_offset(group: dist.ProcessGroup, rounds: int = 100) -> tuple[int, int]:
    """ns by which this rank's clock is ahead of rank 0's, and by how much that may be wrong.

    Rank 0 answers a ping with its time. It wrote the answer between our sending and receiving, so
    the middle of the two is wrong by half the round trip at most; the fastest trip counts
    (Cristian, Probabilistic clock synchronization, 1989).
    """
    rank = dist.get_rank()
    ping = torch.zeros(1, dtype=torch.int64)
    trips = [(0, 0)] if rank == 0 else []
    for other in range(1, dist.get_world_size()):
        for _ in range(rounds if rank in (0, other) else 0):
            if rank == 0:
                dist.recv(ping, other, group)
                dist.send(ping.fill_(now()), other, group)
            else:
                sent = now()
                dist.send(ping, 0, group)
                dist.recv(ping, 0, group)
                received = now()
                trips.append((received - sent, (sent + received) // 2 - int(ping)))
        dist.barrier(group)
    trip, ahead = min(trips)
    return ahead, trip // 2


def now() -> int:
    """The clock that the profiler's times are on, in ns since 1970."""
    return time.time_ns()


def aligned(trace: dict, rank: int, shift: int) -> list[dict]:
    """A rank's events as those of a process called "rank 0", ..., moved by `shift` ns; threads stay."""
    row = {"ph": "M", "pid": rank, "tid": 0, "ts": 0}
    events = [row | {"name": "process_name", "args": {"name": f"rank {rank}"}}]
    events.append(row | {"name": "process_sort_index", "args": {"sort_index": rank}})
    named = set()
    for event in trace["traceEvents"]:
        if event["ph"] == "M" and event["name"] == "thread_name" and event["tid"] not in named:
            named.add(event["tid"])
            events.append(event | {"pid": rank, "ts": 0})
        elif event["ph"] in "Xsf" and event.get("cat") != "Trace":  # spans, and arrows between them
            event |= {"pid": rank, "ts": event["ts"] + shift / 1e3}
            if "id" in event:
                event["id"] = f"{rank}.{event['id']}"  # ranks number their arrows alike
            events.append(event)
    return events


def training_step(args: argparse.Namespace, device: torch.device) -> Callable[[], None]:
    """A model's next step, named in its parts for the trace; the straggler's data come late."""
    torch.manual_seed(args.seed)
    sizes = (args.width, 4, 4 * args.width, 0.0)  # model, heads, feed-forward, dropout
    layers = (nn.TransformerEncoderLayer(*sizes, batch_first=True) for _ in range(args.layers))
    model = DistributedDataParallel(nn.Sequential(*layers).to(device))
    optimizer = torch.optim.AdamW(model.parameters())
    rank = dist.get_rank()

    def step() -> None:
        with record_function("data"):
            if args.straggler and args.straggler[0] == rank:
                time.sleep(args.straggler[1] / 1e3)
            batch = torch.randn(args.batch, args.context, args.width, device=device)
        with record_function("forward"):
            loss = model(batch).square().mean()
        with record_function("backward"):
            loss.backward()
        with record_function("optimizer"):
            optimizer.step()
            optimizer.zero_grad()
            synchronize(device)  # so that a GPU's kernels end inside their step

    return step


def report(table: list[list[dict]]) -> list[float]:
    """Print the table; for each rank, the ms per step that each of the others waits for it."""
    say(f"{'':>10} | {'ms':<47} | % of the step")
    row = "{:>5}{:>5} |{:>7}{:>9}{:>8}{:>9}{:>9}{:>7} |{:>9}{:>9}{:>7}"
    say(row.format("step", "rank", *PARTS, "compute", "exposed", "idle"))
    for number, ranks in enumerate(table):
        for rank, part in enumerate(ranks):
            ms = [f"{part[key] / 1e6:.1f}" for key in PARTS]
            shares = [f"{part[key] / part['step']:.1%}" for key in ("compute", "exposed", "idle")]
            say(row.format(number, rank, *ms, *shares))
    others = max(1, len(table[0]) - 1)
    waits = torch.tensor([[part["waits"] for part in ranks] for ranks in table]) / 1e6
    return (waits.sum(1).mean(0) / others).tolist()  # [steps, ranks, late rank] -> [late rank]


def run(args: argparse.Namespace, device: torch.device) -> list[bool | None]:
    rank = dist.get_rank()
    world_size = dist.get_world_size()
    if args.straggler and args.straggler[0] not in range(world_size):
        stop(f"--straggler {args.straggler[0]:g}: type a rank below {world_size}")
    args.out.mkdir(parents=True, exist_ok=True)
    group = dist.new_group(backend="gloo")  # for pings and events, whatever the training uses
    ranks = f"{world_size} rank{'s' * (world_size > 1)} on {device.type}"
    say(f"{ranks}: {args.steps} steps recorded on each")

    step = training_step(args, device)
    for _ in range(3):  # cold; and DDP forms its buckets anew after the first
        step()
    with profile() as profiler:
        step()  # the profiler is cold too
        for _ in range(args.steps):
            with record_function("step"):
                step()
        time.sleep(0.3)  # gloo's thread ends its record of an all-reduce after the step is over
    path = args.out / f"rank{rank}.json.gz"
    profiler.export_chrome_trace(str(path))
    trace = json.loads(gzip.decompress(path.read_bytes()))

    ahead, doubt = clock_offset(group)
    zeros = gathered(trace["baseTimeNanoseconds"], group)
    shift = zeros[rank] - zeros[0] - (ahead if abs(ahead) > doubt else 0)  # else it is noise
    events = aligned(trace, rank, shift)
    timelines = gathered(read_timeline(events, device), group)
    table = account(timelines)
    waited = report(table)
    late = max(range(world_size), key=lambda r: waited[r])
    others = f"each of the others waits {waited[late]:.1f} ms per step for it"
    say(f"late          rank {late}: {others}")
    clocks = gathered((ahead, doubt), group)
    offset, unsure = max(clocks, key=lambda clock: abs(clock[0]))
    doubts = f"by pings that may be {unsure / 1e3:.0f} us wrong"
    say(f"clocks        {offset / 1e3:+.0f} us from rank 0's at most, {doubts}")
    merge(args.out / "merged.json.gz", events, group)
    if rank == 0 and args.json:
        args.json.write_text(json.dumps({"table": table, "waited_ms": waited}, indent=1) + "\n")
    if rank == 0 and args.plot:
        plot(timelines, args.plot)

    parts = [sum(p[k] for k in ("compute", "exposed", "idle")) / p["step"] for p in chain(*table)]
    calls = zip(*(timeline["sends"] for timeline in timelines), strict=True)
    early = [max(begin for begin, _ in call) - min(end for _, end in call) for call in calls]
    # Clocks of two machines are known to half a ping each; those of one machine are the same.
    blur = sum(sorted(d for a, d in clocks if abs(a) > d)[-2:]) / 1e3
    claims = [
        check("|compute + exposed + idle - step|, of a step", max(abs(1 - p) for p in parts), 0.01),
        check("us that an all-reduce ends before its last call", max(early, default=0) / 1e3, blur),
    ]
    if args.straggler:
        asleep = int(args.straggler[0])
        ms = args.straggler[1]
        wait = waited[asleep]
        free = min(row[asleep]["step"] - row[asleep]["compute"] for row in table) / 1e6
        claims += [
            check("straggler's time without computing, ms", free, 0.99 * ms, at_least=True),
            expect(
                "the others' wait for it, ms per step", wait, ms / 2, args.strict, at_least=True
            ),
        ]
    return claims


def gathered(value: Any, group: dist.ProcessGroup) -> list:
    """Every rank's value, by rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group)
    return values


def merge(path: Path, events: list[dict], group: dist.ProcessGroup) -> None:
    """Rank 0 writes the events of all ranks to one file, whose time begins with the first."""
    traces = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(events, traces, 0, group)
    if traces:
        zero = min(event["ts"] for event in chain(*traces) if event["ph"] != "M")
        merged = [event | {"ts": max(0.0, event["ts"] - zero)} for event in chain(*traces)]
        draft = path.with_suffix(".tmp")
        draft.write_bytes(gzip.compress(json.dumps({"traceEvents": merged}).encode(), 1))
        draft.replace(path)
        say(f"trace         {path}, {path.stat().st_size / 1e6:.1f} MB, for ui.perfetto.dev\n")


def plot(timelines: list[Timeline], path: Path) -> None:
    """Draw the last step as it ran: two rows per rank."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "ch03"
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(10, 1.2 + 0.9 * len(timelines)), layout="constrained")
    zero = min(timeline["steps"][-1][0] for timeline in timelines)
    for rank, timeline in enumerate(timelines):
        step = timeline["steps"][-1]
        computes = clip(timeline["works"], *step)
        communicates = clip(timeline["sends"], *step)
        exposed = [part for gap in gaps(computes, *step) for part in clip(communicates, *gap)]
        for (color, y, label), spans in zip(ROWS, (computes, communicates, exposed), strict=True):
            wide = union([(begin, end + 50_000) for begin, end in spans])  # finer gaps do not show
            bars = [((begin - zero) / 1e6, (end - begin) / 1e6) for begin, end in wide]
            label = label if rank == 0 else None
            axis.broken_barh(bars, (rank + y, 0.36), color=color, linewidth=0, label=label)
    axis.set_yticks(range(len(timelines)), [f"rank {rank}" for rank in range(len(timelines))])
    axis.invert_yaxis()
    axis.set_xlabel("ms of the last recorded step")
    axis.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None})


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--straggler", type=float, nargs=2, metavar=("RANK", "MS"), help="whose data come late")
    add("--out", type=Path, default="runs/ch03_profile_ddp", help="folder for the traces")
    add("--steps", type=int, default=4, help="recorded steps")
    add("--batch", type=int, default=4, help="sequences per step and rank")
    add("--context", type=int, default=128, help="tokens per sequence")
    add("--width", type=int, default=128, help="size of a token's vector")
    add("--layers", type=int, default=4, help="transformer layers")
    add("--seed", type=int, default=0, help="for weights and batches")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--strict", action="store_true", help="exit 1 if an `expect:` line does not hold")
    add("--json", type=Path, help="also write the table, in ns, to this file")
    add("--plot", type=Path, help="also draw the last recorded step to this SVG file")
    return parser.parse_args()


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


# Copied from ddp_bucketing_overlap.overlap
def overlap(a: Spans, b: Spans) -> int:
    """Time that is both in a span of `a` and in one of `b`; each list sorted and disjoint."""
    i = j = total = 0
    while i < len(a) and j < len(b):
        total += max(0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return total


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
