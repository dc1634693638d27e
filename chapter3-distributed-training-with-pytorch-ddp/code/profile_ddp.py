"""Where does a step of DDP go? Every rank's trace, merged on one clock, and read: who waits for whom?

    torchrun --nproc_per_node=2 chapter3-distributed-training-with-pytorch-ddp/code/profile_ddp.py
    torchrun --nproc_per_node=2 chapter3-distributed-training-with-pytorch-ddp/code/profile_ddp.py --straggler 1 60
    torchrun --nproc_per_node=3 chapter3-distributed-training-with-pytorch-ddp/code/profile_ddp.py --straggler 0 40 --layers 1 --width 64 --batch 2

On GPUs:
    torchrun --nproc_per_node=8 chapter3-distributed-training-with-pytorch-ddp/code/profile_ddp.py --width 1024 --layers 12 --heads 16 --context 1024 --batch 32

With a straggler, look at where the lost time shows: idle on the one that is late, exposed
communication on all the others. Then open merged.json.gz in ui.perfetto.dev: a process per rank.
Section 3.4.
"""

import argparse
import gzip
import json
import os
import statistics
import sys
import time
from itertools import chain
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler says when it starts and stops
import torch
import torch._dynamo  # DDP's; before there is a group: section 3.8
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import profile, record_function, schedule

COLORS = {"#5e3c99": "computes", "#fdb863": "all-reduce, hidden", "#e66101": "all-reduce, exposed"}
# gloo's thread ends its record of an all-reduce a moment after the main thread has gone on with
# the sum: time for the last one, before the profiler stops.
SETTLE_S = 0.3
GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")  # what a trace says that a GPU does
PARTS = ("compute", "hidden", "exposed", "waiting")
ROW = "{:>5}{:>5} |{:>7}{:>9}{:>8}{:>9}{:>9}{:>7} |{:>9}{:>9}{:>7}"
Spans = list[tuple[int, int]]  # (begin, end) in ns
Timeline = dict[str, Spans]  # a rank's steps, its computation, and its all-reduces in their order


class Block(nn.Module):
    """Llama's: rotary attention, then SwiGLU, each behind an RMSNorm and added to what comes in."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, hidden = heads, 8 * width // 3
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))  # x: [batch, seq, width]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [batch, heads, seq, head_dim]
        q, k = rotate(q, rotation), rotate(k, rotation)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.out(mixed.transpose(1, 2).flatten(2)))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return x + self.dropout(self.down(F.silu(gate) * up))


class ByteLM(nn.Module):
    """A small decoder-only transformer of Llama's shape (arXiv:2302.13971) whose tokens are bytes."""

    def __init__(self, width: int, layers: int, heads: int, context: int, dropout: float = 0.0):
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, 256, bias=False)
        frequency = 10_000.0 ** -torch.arange(0, 1, 2 * heads / width)  # [head_dim / 2]
        angle = torch.outer(torch.arange(context), frequency)
        self.register_buffer("rotation", torch.stack([angle.cos(), angle.sin()]), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:  # [batch, seq] -> [batch, seq, 256]
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, self.rotation[:, : tokens.shape[1]])
        return self.head(self.norm(x))


def rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Turn each pair (x[i], x[i + d/2]) by its position's angle: RoPE (arXiv:2104.09864)."""
    (cos, sin), (a, b) = rotation, x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def union(spans: Spans) -> Spans:
    """The same time in order, and none of it twice."""
    joined: Spans = []
    for begin, end in sorted(spans):
        if joined and begin <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((begin, end))
    return joined


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


def gaps(spans: Spans, begin: int, end: int) -> Spans:
    """What sorted, disjoint spans leave of the time from begin to end."""
    edges = [begin, *(edge for span in spans for edge in span), end]
    return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]


def timeline(events: list[dict], device: torch.device) -> Timeline:
    """Read a trace. On a CPU, computation is an operator of the main thread, and an all-reduce goes
    on from its call there until gloo's thread is done with it. On a GPU, both are its own work.
    """
    timed = sorted((e for e in events if e["ph"] == "X"), key=lambda e: e["ts"])
    notes = (e for e in timed if e["cat"] == "user_annotation")
    steps = [e for e in notes if e["name"].startswith("ProfilerStep#")][:-1]  # the last one rests
    if device.type == "cpu":
        calls = [span(e)[0] for e in timed if e["name"] == "c10d::allreduce_"]
        ends = [span(e)[1] for e in timed if e["name"] == "gloo:all_reduce"]
        sends = list(zip(calls, ends, strict=True))
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
            core, link = clip(rank["works"], *step), clip(rank["sends"], *step)
            free = gaps(core, *step)
            part = {"step": step[1] - step[0], "compute": length(core)}
            part |= {"hidden": overlap(link, core), "exposed": overlap(link, free)}
            part |= {"waits": [overlap(clip(wait, *step), free) for wait in waits]}
            part |= {"waiting": sum(part["waits"])}
            row.append(part | {"idle": length(gaps(union(core + link), *step))})
    return table


def clip(spans: Spans, begin: int, end: int) -> Spans:
    """The part of the spans from begin to end, in order, and none of it twice."""
    return union([(max(a, begin), min(b, end)) for a, b in spans if a < end and b > begin])


def length(spans: Spans) -> int:
    return sum(end - begin for begin, end in spans)


def clock_offset(group: dist.ProcessGroup, rounds: int = 100) -> tuple[int, int]:
    """ns by which this rank's clock is ahead of rank 0's, and by how much that may be wrong.

    Rank 0 answers a ping with its time. It wrote the answer between our sending and receiving, so
    the middle of the two is wrong by half the round trip at most; the fastest trip counts
    (Cristian, Probabilistic clock synchronization, 1989).
    """
    rank, ping = dist.get_rank(), torch.zeros(1, dtype=torch.int64)
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


def faults(path: Path, ranks: int) -> int:
    """What a reader of the trace event format would stumble over in a file."""
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    bad = sum(not {"ph", "ts", "pid", "tid", "name"} <= event.keys() for event in events)
    bad += sum(event.get("dur", -1) < 0 for event in events if event["ph"] == "X")
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    rows = {*range(ranks), *(event["pid"] for event in events)}
    return bad + sum(names.get(r) != f"rank {r}" for r in rows)


def train(args: argparse.Namespace, device: torch.device) -> dict:
    """Cycles of plain, warm-up and recorded steps of one training; a rank's trace of the last."""
    rank, data = dist.get_rank(), read_bytes(args.data, at_least=20 * args.context)
    torch.manual_seed(args.seed)
    model = ByteLM(args.width, args.layers, args.heads, args.context).to(device)
    model = DistributedDataParallel(model)
    model.broadcast_buffers = False  # by default, each forward sends them: here, a constant
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    draw = torch.Generator().manual_seed(args.seed * 1_000_003 + rank)

    def step() -> None:
        with record_function("data"):
            if args.straggler and args.straggler[0] == rank:
                time.sleep(args.straggler[1] / 1e3)
            starts = torch.randint(len(data) - args.context, (args.batch, 1), generator=draw)
            windows = data[starts + torch.arange(args.context + 1)].to(device)
        with record_function("forward"):
            logits = model(windows[:, :-1])  # [batch, seq, 256]
            loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        with record_function("backward"):
            loss.backward()
        with record_function("optimizer"):
            optimizer.step()
            optimizer.zero_grad()
            synchronize(device)  # so that a GPU's kernels end inside their step

    for _ in range(3):  # cold; and DDP forms its buckets anew after the first step
        step()
    cycle = ["plain"] * args.steps + ["warm-up"] + ["recorded"] * args.steps
    seconds, begun = {kind: [] for kind in cycle}, []
    plan = schedule(wait=args.steps, warmup=1, active=args.steps + 1)
    for _ in range(args.cycles):  # so that steps with and without take turns
        dist.barrier()
        with profile(schedule=plan) as profiler:
            for kind in cycle:
                begun.append(now())
                start = time.perf_counter()
                step()
                seconds[kind].append(time.perf_counter() - start)
                profiler.step()
            time.sleep(SETTLE_S)
    path = args.out / f"rank{rank}.json.gz"
    profiler.export_chrome_trace(str(path))
    trace = json.loads(gzip.decompress(path.read_bytes()))
    return {"trace": trace, "seconds": seconds, "begun": begun[-args.steps :]}


def report(table: list[list[dict]]) -> list[float]:
    """Print the table; for each rank, the ms per step that each of the others waits for it."""
    waited = [0.0] * len(table[0])
    say(f"{'':>10} | {'ms':<47} | % of the step")
    say(ROW.format("step", "rank", "step", *PARTS, "idle", "compute", "exposed", "idle"))
    for number, row in enumerate(table):
        for rank, part in enumerate(row):
            ms = [f"{part[key] / 1e6:.1f}" for key in ("step", *PARTS, "idle")]
            shares = [f"{part[key] / part['step']:.1%}" for key in ("compute", "exposed", "idle")]
            say(ROW.format(number, rank, *ms, *shares))
            for late, ns in enumerate(part["waits"]):
                waited[late] += ns / 1e6 / len(table) / max(1, len(row) - 1)
    return waited


def run(args: argparse.Namespace, device: torch.device) -> bool:
    rank, n = dist.get_rank(), dist.get_world_size()
    group = dist.new_group(backend="gloo")  # for pings and events, whatever the training uses
    say(f"{n} rank{'s' * (n > 1)} on {device.type}: {args.steps} steps recorded on each")
    found = train(args, device)
    ahead, doubt = clock_offset(group)
    bases = [0] * n
    dist.all_gather_object(bases, found["trace"]["baseTimeNanoseconds"], group)
    shift = bases[rank] - bases[0] - (ahead if abs(ahead) > doubt else 0)  # else it is noise
    events = aligned(found["trace"], rank, shift)
    own = timeline(events, device)
    ranks, traces = [own] * n, [events] * n if rank == 0 else None
    dist.all_gather_object(ranks, own, group)
    dist.gather_object(events, traces, 0, group)
    shapes = {(len(r["steps"]), len(r["sends"])) for r in ranks}
    same = "ranks whose trace has other steps or all-reduces", len(shapes) - 1, 0
    if len(shapes) > 1:
        return check(*same)  # no table could be made of that
    table = account(ranks)
    waited = report(table)
    late = max(range(n), key=lambda r: waited[r])
    others = "each of the others waits" if n > 1 else "nobody waits"
    say(f"late          rank {late}: {others} {waited[late]:.1f} ms per step for it")
    plain, watched = (statistics.median(found["seconds"][k]) * 1e3 for k in ("plain", "recorded"))
    cost = f"{watched:.1f} ms with it, {plain:.1f} ms without"
    say(f"profiler      a step takes {cost}: {watched / plain - 1:+.0%}, medians")
    clocks = [(0, 0)] * n
    dist.all_gather_object(clocks, (ahead, doubt), group)
    apart, unsure = max(clocks, key=lambda clock: abs(clock[0]))
    doubts = f"by pings that may be {unsure / 1e3:.0f} us wrong"
    say(f"clocks        {apart / 1e3:+.0f} us from rank 0's at most, {doubts}")
    merged = args.out / "merged.json.gz"
    if traces:
        zero = min(rank["steps"][0][0] for rank in ranks) / 1e3
        write(merged, [e | {"ts": max(0.0, e["ts"] - zero)} for e in chain(*traces)])
        say(f"trace         {merged}, {merged.stat().st_size / 1e6:.1f} MB, for ui.perfetto.dev\n")

    parts = [sum(p[k] for k in ("compute", "exposed", "idle")) / p["step"] for p in chain(*table)]
    calls = zip(*(r["sends"] for r in ranks), strict=True)
    early = [max(begin for begin, _ in call) - min(end for _, end in call) for call in calls]
    begun = zip(own["steps"], found["begun"], strict=True)
    off = min(abs(bases[rank] + begin - shift - at) for (begin, _), at in begun)
    # Clocks of two machines are known to half a ping each; those of one machine are the same.
    blur = sum(sorted(d for a, d in clocks if abs(a) > d)[-2:]) / 1e3
    held = [
        check(*same),
        check("compute + exposed + idle, off the step", max(abs(1 - p) for p in parts), 0.01),
        check("steps in the trace, off the loop's clock (ms)", off / 1e6, 1),
        check("an all-reduce ends before its last call (us)", max(early, default=0) / 1e3, blur),
        check("merged.json.gz, events or ranks amiss", faults(merged, n) if traces else 0, 0),
    ]
    if os.environ["LOCAL_WORLD_SIZE"] == str(n):
        beyond = max(0, abs(ahead) - doubt) / 1e3
        held.append(
            check("one machine's clocks, apart by more than a ping can tell (us)", beyond, 0)
        )
    if args.straggler:
        asleep, ms = args.straggler
        free = min(row[asleep]["step"] - row[asleep]["compute"] for row in table) / 1e6
        held.append(check(f"ms of its {ms:g} in which it seems to compute", ms - free, 0.1))
        held.append(check("rank found late, off the one that slept", abs(late - asleep), 0))
        unseen = 1 - waited[asleep] / ms
        held.append(check(f"share of its {ms:g} ms for which nobody waited", unseen, 0.5))
    if rank == 0 and args.json:
        args.json.write_text(json.dumps({"table": table, "waited_ms": waited}, indent=1) + "\n")
    if rank == 0 and args.plot:
        plot(ranks, args.plot)
    return all(held)


def write(path: Path, events: list[dict]) -> None:
    draft = path.with_name(path.name + ".tmp")
    draft.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode(), 1))
    draft.replace(path)


def plot(ranks: list[Timeline], path: Path) -> None:
    """Draw the last step as it ran: two rows per rank."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "ch03"
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(10, 1.2 + 0.9 * len(ranks)), layout="constrained")
    zero = min(rank["steps"][-1][0] for rank in ranks)
    for r, rank in enumerate(ranks):
        step = rank["steps"][-1]
        core, link = clip(rank["works"], *step), clip(rank["sends"], *step)
        exposed = [span for gap in gaps(core, *step) for span in clip(link, *gap)]
        for y, spans, color in zip((-0.2, 0.2, 0.2), (core, link, exposed), COLORS, strict=True):
            wide = union([(begin, end + 50_000) for begin, end in spans])  # finer gaps do not show
            bars = [((begin - zero) / 1e6, (end - 50_000 - begin) / 1e6) for begin, end in wide]
            label = COLORS[color] if r == 0 else None
            axis.broken_barh(bars, (r + y - 0.18, 0.36), color=color, linewidth=0, label=label)
    axis.set_yticks(range(len(ranks)), [f"rank {r}" for r in range(len(ranks))])
    axis.invert_yaxis()
    axis.set_xlabel("ms of the last recorded step")
    axis.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None})


def check(claim: str, value: float, bound: float) -> bool:
    """Print whether the worst rank keeps `value` within `bound`; every rank gets the same answer."""
    values = [0.0] * dist.get_world_size()
    dist.all_gather_object(values, value)
    held = all(v <= bound for v in values)  # false for NaN
    say(f"check: {claim} = {max(values):.3g} <= {bound:.3g}  {'ok' if held else 'FAILED'}")
    return held


def say(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def read_bytes(path: Path, at_least: int) -> torch.Tensor:
    """The file's bytes as integers from 0 to 255: [bytes]."""
    try:
        text = path.read_bytes()
    except OSError as error:
        stop(f"cannot read {path} ({error.strerror}): give a text file with --data FILE")
    if len(text) < at_least:
        stop(f"{path} has {len(text)} bytes, this run needs {at_least}: give a longer --data FILE")
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def join_group(wanted: str) -> torch.device:
    """Join the process group; return this rank's device: its own GPU where each rank has one."""
    if "LOCAL_WORLD_SIZE" not in os.environ:
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
        device = torch.device(device.type, local_rank)
    backend, bound = ("gloo", None) if device.type == "cpu" else (None, device)  # None: PyTorch's
    dist.init_process_group(backend, device_id=bound)
    dist.barrier()  # all are here, before one may leave for what it is given
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
    add, chapter = parser.add_argument, Path(__file__).resolve().parents[1]
    add("--straggler", type=float, nargs=2, metavar=("RANK", "MS"), help="whose data come late")
    add("--out", type=Path, default="runs/ch03_profile_ddp", help="folder for the traces")
    add("--steps", type=positive, default=4, help="recorded per cycle, and as many that are not")
    add("--cycles", type=positive, default=3, help="of steps; the last one's trace is kept")
    add("--data", type=Path, default=chapter / "main.md", help="text; default: the chapter")
    add("--batch", type=positive, default=4, help="windows of text per step and rank")
    add("--context", type=positive, default=128, help="bytes per window")
    add("--width", type=positive, default=128, help="size of a token's vector")
    add("--layers", type=positive, default=4, help="transformer blocks")
    add("--heads", type=positive, default=4, help="attention heads; 2 x heads divides --width")
    add("--seed", type=int, default=0, help="for weights and batches")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--json", type=Path, help="also write the table, in ns, to this file")
    add("--plot", type=Path, help="also draw the last recorded step to this SVG file")
    args = parser.parse_args()
    if args.width % (2 * args.heads):
        stop(f"--width {args.width} is no multiple of 2 x --heads {args.heads}")
    ranks = int(os.environ.get("WORLD_SIZE", 2))
    if args.straggler:
        asleep, ms = args.straggler
        if ranks == 1:
            stop(f"nobody would wait: type  torchrun --nproc_per_node=2 {sys.argv[0]}")
        if asleep not in range(ranks) or not 0 < ms < 1e6:
            stop(f"--straggler: type a rank below {ranks}, and more than 0 ms")
        args.straggler = int(asleep), ms
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        for path in filter(None, (args.out / "merged.json.gz", args.plot, args.json)):
            path.open("ab").close()
    except OSError as error:
        stop(f"cannot write {error.filename} ({error.strerror}): give another place")
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
