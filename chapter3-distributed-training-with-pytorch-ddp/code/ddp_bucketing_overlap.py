"""How large should DDP's buckets be? Each size timed, its overlap read from a trace, both predicted.

    torchrun --nproc_per_node=2 chapter3-distributed-training-with-pytorch-ddp/code/ddp_bucketing_overlap.py
    torchrun --nproc_per_node=3 chapter3-distributed-training-with-pytorch-ddp/code/ddp_bucketing_overlap.py --rounds 3 --layers 5 --width 64 --bucket-kib 16 40 80

On GPUs:
    torchrun --nproc_per_node=8 chapter3-distributed-training-with-pytorch-ddp/code/ddp_bucketing_overlap.py --width 4096 --layers 24 --rows 8192 --bucket-kib 65536 131072 262144 524288 1572864

Small buckets pay the latency often, large ones leave the link idle: look for the minimum between
them. Two tables: a stand-in for a device and a slow link of its own, where both sleep instead of
working, and this machine as it is. On GPUs there is only the second. Section 3.4.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from queue import SimpleQueue

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler says when it starts and stops
import torch
import torch._dynamo  # DDP's; before there is a group: section 3.8
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import profile, record_function

Spans = list[tuple[int, int]]  # (begin, end) in ns
Pair = tuple[float, float]
PARTS = ("compute", "communication", "hidden", "exposed")
STEP = "step of "  # what a step is called in the trace
ROW = "{:>5}{:>8}{:>10}{:>8}{:>7}{:>7}{:>15} |{:>8}{:>7}{:>7}{:>8}{:>6}"
# gloo's thread ends its record of an all-reduce a moment after the main thread has gone on with
# the sum: time for the last one, before the profiler stops.
SETTLE_S = 0.3
GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")  # what a trace says that a GPU does
BOUND = 0.2  # error of a predicted step on the stand-in


class SlowLink:
    """A stand-in for a slower network: an all-reduce that ends no sooner than it would over there.

    Messages go one at a time, each for `latency` (s) + bytes / `rate` (bytes/s). A thread waits for
    that, and waiting takes no core from the backward pass.
    """

    def __init__(self, latency: float, rate: float):
        self.latency, self.rate, self.free = latency, rate, 0.0
        self.carried: Spans = []  # each message from its call to its arrival, in ns since 1970
        self.sent: SimpleQueue = SimpleQueue()
        self.thread = threading.Thread(target=self.deliver, daemon=True)
        self.thread.start()

    def average(self, tensor: torch.Tensor) -> Future[torch.Tensor]:
        """Average over the ranks in place; the future is done when the slow link would be."""
        called, arrived = time.time_ns(), Future()
        self.free = max(time.monotonic(), self.free) + self.latency + tensor.nbytes / self.rate
        work = dist.all_reduce(tensor.div_(dist.get_world_size()), async_op=True)
        self.sent.put((work, tensor, called, self.free, arrived))
        return arrived

    def deliver(self) -> None:
        for work, tensor, called, due, arrived in iter(self.sent.get, None):
            work.wait()
            time.sleep(max(0.0, due - time.monotonic()))
            self.carried.append((called, time.time_ns()))
            arrived.set_result(tensor)

    def close(self) -> None:
        self.sent.put(None)
        self.thread.join()


def send_bucket(link: SlowLink, bucket: dist.GradBucket) -> Future[torch.Tensor]:
    """DDP's communication hook: called for each bucket as soon as its last gradient is there."""
    return link.average(bucket.buffer())


def build(args: argparse.Namespace, pace: float, like: torch.Tensor) -> nn.Module:
    """Equal layers, whose backward passes last `pace` seconds longer than this machine takes."""
    torch.manual_seed(args.seed)
    layers = []
    for _ in range(args.layers):
        linear = nn.Linear(args.width, args.width, bias=False)
        if pace:
            linear.register_full_backward_pre_hook(lambda *_: time.sleep(pace))
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers).to(like)


def step(model: nn.Module, rows: torch.Tensor) -> tuple[float, float]:
    """Seconds of the forward and of the backward pass; under DDP, the latter with all-reduces."""
    model.zero_grad()
    start = time.perf_counter()
    loss = model(rows).square().mean()
    synchronize(rows.device)
    middle = time.perf_counter()
    loss.backward()
    synchronize(rows.device)
    return middle - start, time.perf_counter() - middle


def predict(buckets: list[int], alone: Pair, link: Pair) -> float:
    """Seconds of a step that sends its buckets (bytes) while the backward pass goes on.

    A bucket is ready when its share of the backward pass is done, and goes when the one before is
    gone. The last is ready only at the end, and nothing is left that could hide it.
    """
    (forward, backward), (alpha, slope) = alone, link
    ready = gone = 0.0
    for size in buckets:
        ready += backward * size / sum(buckets)
        gone = max(gone, ready) + alpha + slope * size
    return forward + gone


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


def clip(spans: Spans, begin: int, end: int) -> Spans:
    """The part of the spans from begin to end, in order, and none of it twice."""
    return union([(max(a, begin), min(b, end)) for a, b in spans if a < end and b > begin])


def length(spans: Spans) -> int:
    return sum(end - begin for begin, end in spans)


def read_trace(trace: dict, carried: Spans, device: torch.device) -> dict[str, list[dict]]:
    """What the trace says of each step, in ns, by the step's name.

    On a CPU, computation is an operator of the main thread; an all-reduce goes on from its call
    there until gloo's thread is done, or until the stand-in says so. On a GPU, both are its own work.
    """
    timed = sorted((e for e in trace["traceEvents"] if e["ph"] == "X"), key=lambda e: e["ts"])
    steps = [e for e in timed if e["name"].startswith(STEP) and e["cat"] == "user_annotation"]
    if device.type == "cpu":
        calls = [span(e)[0] for e in timed if e["name"] == "c10d::allreduce_"]
        ends = [span(e)[1] for e in timed if e["name"] == "gloo:all_reduce"]
        sends = list(zip(calls, ends, strict=True))  # gloo takes them up in the order of the calls
        works = [span(e) for e in timed if e["cat"] == "cpu_op" and e["tid"] == steps[0]["tid"]]
    else:
        kernels = [(span(e), "nccl" in e["name"].lower()) for e in timed if e["cat"] in GPU_WORK]
        sends, works = ([s for s, nccl in kernels if nccl is wanted] for wanted in (True, False))
    zero = trace["baseTimeNanoseconds"]  # of the trace's clock
    works, carried = union(works), [(begin - zero, end - zero) for begin, end in carried]
    read: dict[str, list[dict]] = {}
    for event in steps:
        begin, end = span(event)
        core, link = clip(works, begin, end), clip(sends + carried, begin, end)
        record = {
            "step": end - begin,
            "compute": length(core),
            "communication": length(link),
            "hidden": overlap(link, core),
            "exposed": overlap(link, gaps(core, begin, end)),
            "all_reduces": sum(begin <= call < end for call, _ in sends),
        }
        read.setdefault(event["name"], []).append(record)
    return read


def span(event: dict) -> tuple[int, int]:
    return round(event["ts"] * 1e3), round((event["ts"] + event["dur"]) * 1e3)


def fit(link: SlowLink | None, total: int, device: torch.device) -> Pair:
    """alpha (s) and slope (s per byte) of an all-reduce: a line through the fastest of each size.

    Least squares of the relative error, so that a small message counts as much as a large one.
    """
    sizes, fastest = [total // 4**k for k in range(4)], []
    for size in sizes:
        message, seconds = torch.zeros(max(size // 4, 1), device=device), []
        for _ in range(8 if link else 50):
            start = time.perf_counter()
            (link.average(message) if link else dist.all_reduce(message, async_op=True)).wait()
            synchronize(device)
            seconds.append(time.perf_counter() - start)
        slowest = torch.tensor(seconds, dtype=torch.double, device=device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)  # it takes as long as on its slowest rank
        fastest.append(slowest[1:].min().cpu())
    t = torch.stack(fastest)[:, None]
    line = torch.tensor([[1.0, size] for size in sizes], dtype=torch.double)
    alpha, slope = torch.linalg.lstsq(line / t, t / t).solution.flatten().tolist()
    return max(alpha, 0.0), max(slope, 0.0)


def buckets_of(model: DistributedDataParallel) -> list[int]:
    """Bytes of each bucket, in the order of sending, by DDP's own log."""
    log = model._get_ddp_logging_data()
    sizes = log.get("rebuilt_bucket_sizes") or log["bucket_sizes"]
    return [int(size) for size in str(sizes).split(",")]


def wrap(model: nn.Module, kib: int, link: SlowLink | None) -> DistributedDataParallel:
    wrapped = DistributedDataParallel(model, bucket_cap_mb=kib / 1024)
    if link:
        wrapped.register_comm_hook(link, send_bucket)
    return wrapped


def gradient_error(args: argparse.Namespace, link: SlowLink | None, device: torch.device) -> float:
    """Largest relative difference of a gradient from one process's, over all bucket sizes.

    In double precision, so that a bucket left out cannot pass for rounding.
    """
    torch.manual_seed(args.seed)
    rank, n, errors = dist.get_rank(), dist.get_world_size(), []
    rows = torch.randn(n, 4, args.width, dtype=torch.double, device=device, requires_grad=True)
    alone = build(args, 0, rows)
    step(alone, rows.flatten(0, 1))
    for kib in args.bucket_kib:
        model = wrap(build(args, 0, rows), kib, link)
        for _ in range(2):  # DDP forms its buckets anew after the first step
            step(model, rows[rank])
        for a, b in zip(model.parameters(), alone.parameters(), strict=True):
            errors.append((a.grad - b.grad).norm() / b.grad.norm())
    return torch.stack(errors).max().item()


def measure(args: argparse.Namespace, device: torch.device) -> dict[str, dict]:
    """For each link: its model, the passes without it, and the steps of every bucket size."""
    torch.manual_seed(args.seed + 1 + dist.get_rank())
    rows = torch.randn(args.rows, args.width, device=device, requires_grad=True)
    links = {dist.get_backend(): None}
    if device.type == "cpu" and args.slow_link and dist.get_world_size() > 1:
        links = {"stand-in": SlowLink(args.latency / 1e3, args.slow_link * 1e9)} | links
    found, models, seconds = {}, {}, {}
    for name, link in links.items():
        pace = args.pace / 1e3 if link else 0.0
        models[name, 0] = DistributedDataParallel(build(args, pace, rows))
        models[name, 0].register_comm_hook(None, noop_hook)  # all that DDP does, but send
        total = sum(p.nbytes for p in models[name, 0].parameters())
        found[name] = {"link": fit(link, total, device), "sizes": {}}
        for kib in args.bucket_kib:
            models[name, kib] = wrap(build(args, pace, rows), kib, link)
    for model in models.values():
        step(model, rows), step(model, rows)  # warm, and with the buckets that will stay
    with profile() as profiler:
        for _ in range(args.rounds):  # sizes take turns, so that a slow moment hits all
            for key, model in models.items():
                dist.barrier()
                with record_function(f"{STEP}{key}"):
                    seconds.setdefault(key, []).append(step(model, rows))
        time.sleep(SETTLE_S)
    carried: Spans = []
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        for link in filter(None, links.values()):
            link.close()
            carried += link.carried
        read = read_trace(json.loads(trace.read_text()), carried, device)
    for name, record in found.items():
        record["alone"] = [min(passes) for passes in zip(*seconds[name, 0], strict=True)]
        for kib in args.bucket_kib:
            steps = read[f"{STEP}{name, kib}"]
            record["sizes"][kib] = {"buckets": buckets_of(models[name, kib]), "steps": steps}
    return found


def worst_error(record: dict) -> float:
    """Of a link's predicted steps beside the fastest ones, on any rank and of any bucket size."""
    sizes, link, alone = record["sizes"].values(), record["link"], record["alone"]
    fastest = torch.tensor([min(s["step"] for s in row["steps"]) / 1e9 for row in sizes])
    predicted = torch.tensor([predict(row["buckets"], alone, link) for row in sizes])
    worst = (predicted / fastest - 1).abs().max()
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return worst.item()


def report(name: str, record: dict) -> float:
    """Print a link's table; return what trusting the predicted best costs, as a share of a step."""
    (alpha, slope), (forward, backward), rows = record["link"], record["alone"], record["sizes"]
    rate = f"{1e-9 / slope:.3f}" if slope else "?"
    say(f"{name}: an all-reduce takes {alpha * 1e3:.2f} ms + bytes / {rate} GB/s")
    say(f"without any, forward takes {forward * 1e3:.1f} and backward {backward * 1e3:.1f} ms")
    heads = "KiB buckets predicted fastest error median quartiles compute comm. hidden exposed last"
    say(ROW.format(*heads.split()))
    for kib, row in rows.items():
        steps = sorted(row["steps"], key=lambda s: s["step"])
        ms = [s["step"] / 1e6 for s in steps]
        low, middle, high = (len(ms) * quarter // 4 for quarter in (1, 2, 3))
        row["predicted"] = 1e3 * predict(row["buckets"], record["alone"], record["link"])
        row |= {"fastest": ms[0], "quartiles": (ms[low], ms[middle], ms[high])}
        row["parts"] = {part: steps[middle][part] / 1e6 for part in PARTS}  # of the median step
        error = f"{row['predicted'] / ms[0] - 1:+.0%}"
        quartiles = "{:.1f} .. {:.1f}".format(*row["quartiles"][::2])
        times = [f"{row['predicted']:.1f}", f"{ms[0]:.1f}", error, f"{ms[middle]:.1f}", quartiles]
        last = 1e3 * (alpha + slope * row["buckets"][-1])
        parts = [f"{part:.1f}" for part in (*row["parts"].values(), last)]
        say(ROW.format(kib, len(row["buckets"]), *times, *parts))
    chosen, best = (min(rows, key=lambda kib: rows[kib][key]) for key in ("predicted", "fastest"))
    say(f"best: {chosen} KiB predicted, {best} KiB measured")
    return rows[chosen]["fastest"] / rows[best]["fastest"] - 1


def run(args: argparse.Namespace, device: torch.device) -> bool:
    n, cores = dist.get_world_size(), os.cpu_count() or 1
    layers = f"{args.layers} layers of {args.width} x {args.width}"
    say(
        f"{n} rank{'s' * (n > 1)} on {device.type}: {layers}, {args.rounds} steps of each bucket size"
    )
    say("times in ms, on rank 0; last: the last bucket by itself, which nothing can hide\n")
    found, held = measure(args, device), []
    for _ in range(2):  # on a busy machine, look again, though not for ever
        if n <= cores and "stand-in" in found and worst_error(found["stand-in"]) > BOUND:
            found = measure(args, device)
    for name, record in found.items():
        loss = report(name, record)
        if name == "stand-in":
            say("device and link sleep where real ones would work, so neither needs a core of ours")
            if n <= cores:  # else ranks wait for cores, which is not in the model
                held.append(
                    check("stand-in: worst error of a predicted step", worst_error(record), BOUND)
                )
                held.append(check("stand-in: lost by trusting the predicted best", loss, BOUND))
            say("")
        elif device.type == "cpu" and n > 1:
            say(
                f"{cores} cores for {n} backward passes and for gloo, which slow each other down: the"
            )
            say("prediction lets them go on side by side, and is too hopeful\n")
    rows = [row for record in found.values() for row in record["sizes"].values()]
    sends = n > 1 or device.type == "cpu"  # NCCL has no kernel for a rank that is alone
    steps = [(len(row["buckets"]) * sends, s) for row in rows for s in row["steps"]]
    amiss = sum(abs(s["all_reduces"] - buckets) for buckets, s in steps)
    apart = max(abs(s["hidden"] + s["exposed"] - s["communication"]) for _, s in steps)
    links = [None, SlowLink(0, math.inf)] if device.type == "cpu" else [None]
    off = torch.tensor([gradient_error(args, link, device) for link in links]).max().item()
    for link in filter(None, links):
        link.close()
    held += [
        check("all-reduces in the traces, off the number of buckets", amiss, 0),
        check("hidden + exposed, off communication (us)", apart / 1e3, 1),
        check("gradient at any size, off one process's", off, 1e-12),
    ]
    if dist.get_rank() == 0 and args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    if dist.get_rank() == 0 and args.plot:
        plot(found, args.plot)
    return all(held)


def plot(found: dict[str, dict], path: Path) -> None:
    """Step time over bucket size, measured and predicted, and what of it is communication."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "ch03"
    from matplotlib import pyplot

    size = (5 * len(found), 4.2)
    figure, axes = pyplot.subplots(1, len(found), figsize=size, layout="constrained", squeeze=False)
    for axis, (name, record) in zip(axes[0], found.items(), strict=True):
        rows, x = list(record["sizes"].values()), range(len(record["sizes"]))
        exposed, hidden = ([row["parts"][part] for row in rows] for part in ("exposed", "hidden"))
        low, median, high = zip(*(row["quartiles"] for row in rows), strict=True)
        axis.bar(x, exposed, 0.6, color="#e66101", label="communication, exposed")
        axis.bar(x, hidden, 0.6, exposed, color="#fdb863", label="communication, hidden")
        axis.fill_between(x, low, high, color="#5e3c99", alpha=0.2, linewidth=0)
        axis.plot(x, median, "o-", color="#5e3c99", label="step, median and quartiles")
        axis.plot(x, [row["fastest"] for row in rows], "kx", label="step, fastest")
        axis.plot(x, [row["predicted"] for row in rows], "k--", label="step, predicted")
        axis.set_xticks(x, [f"{kib}\n({len(r['buckets'])})" for kib, r in record["sizes"].items()])
        title = name if name == "stand-in" else f"{name}, on this machine"
        axis.set_title(title, loc="left", weight="bold", size=11)
        axis.set(xlabel="KiB per bucket (number of buckets)", ylabel="ms", ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
    legend = axes[0][0].get_legend_handles_labels()
    figure.legend(*legend, loc="outside lower center", ncols=3, frameon=False)
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
    add = parser.add_argument
    sizes = [256, 512, 768, 1536, 3072]
    add("--bucket-kib", type=positive, nargs="+", default=sizes, help="KiB per bucket; several")
    add("--rounds", type=positive, default=6, help="steps of each size")
    add("--slow-link", type=float, default=0.125, help="the stand-in's GB/s; 0: no stand-in")
    add("--latency", type=float, default=3.0, help="ms of each all-reduce on the stand-in")
    add("--pace", type=float, default=3.0, help="ms more for a layer's backward on the stand-in")
    add("--layers", type=positive, default=12, help="equal layers, without biases")
    add("--width", type=positive, default=256, help="features; a layer has width^2 float32 weights")
    add("--rows", type=positive, default=64, help="rows of the batch per rank")
    add("--seed", type=int, default=0, help="for weights and data")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--json", type=Path, help="also write every step's times to this file")
    add("--plot", type=Path, help="also draw the tables to this SVG file")
    args = parser.parse_args()
    if not all(0 <= x < math.inf for x in (args.slow_link, args.latency, args.pace)):
        stop("--slow-link, --latency and --pace: type numbers from 0")
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
