"""How large should DDP's buckets be? Each size predicted, timed, and what of its sending was hidden.

    torchrun --nproc_per_node=2 chapter3-distributed-training-with-pytorch-ddp/code/ddp_bucketing_overlap.py --plot chapter3-distributed-training-with-pytorch-ddp/figures/ddp_bucketing_overlap.svg
    torchrun --nproc_per_node=2 chapter3-distributed-training-with-pytorch-ddp/code/ddp_bucketing_overlap.py --real

On GPUs:
    torchrun --nproc_per_node=8 chapter3-distributed-training-with-pytorch-ddp/code/ddp_bucketing_overlap.py --width 4096 --layers 24 --rows 256 --bucket-kib 65536 131072 262144 524288 1572864

Small buckets pay the latency often, large ones leave the link idle: look for the minimum between
them. On a CPU, device and link are stand-ins, which sleep for as long as real ones would work. They
obey the model by construction, so they show that DDP starts its buckets in order and that the
arithmetic is right, and nothing about networks. --real times this machine as it is, as on GPUs.
Section 3.4.
"""

import argparse
import json
import math
import os
import statistics
import sys
import threading
import time
from pathlib import Path
from queue import SimpleQueue
from typing import NoReturn

import torch
import torch._dynamo  # before the group, or gloo's threads outlive it: section 3.8
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.distributed.elastic.multiprocessing.errors import record
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

Spans = list[tuple[int, int]]  # (begin, end) in ns
PARTS = ("compute", "communication", "hidden", "exposed")


class SlowLink:
    """A stand-in for a slower network: an all-reduce that ends no sooner than it would over there.

    Messages go one at a time, each for `latency` (s) + bytes / `rate` (bytes/s). A thread waits for
    that, and waiting takes no core from the backward pass.
    """

    def __init__(self, latency: float, rate: float):
        self.latency = latency
        self.rate = rate
        self.free = 0.0
        self.order: list[int] = []  # the numbers of the buckets, as DDP starts them
        self.last_start = 0  # when it started the last one, in ns
        self.carried: Spans = []  # while a message is on its way
        self.sent: SimpleQueue = SimpleQueue()
        self.thread = threading.Thread(target=self.deliver, daemon=True)
        self.thread.start()

    def average(self, tensor: torch.Tensor) -> Future[torch.Tensor]:
        """Average over the ranks in place; the future is done when the slow link would be."""
        called = time.perf_counter_ns()
        arrived = Future()
        self.free = max(time.monotonic(), self.free) + self.latency + tensor.nbytes / self.rate
        work = dist.all_reduce(tensor.div_(dist.get_world_size()), async_op=True)
        self.sent.put((work, tensor, called, self.free, arrived))
        return arrived

    def deliver(self) -> None:
        for work, tensor, called, due, arrived in iter(self.sent.get, None):
            work.wait()
            time.sleep(max(0.0, due - time.monotonic()))
            before = self.carried[-1][1] if self.carried else 0
            self.carried.append((max(called, before), time.perf_counter_ns()))
            arrived.set_result(tensor)

    def close(self) -> None:
        self.sent.put(None)
        self.thread.join()


def send_bucket(link: SlowLink, bucket: dist.GradBucket) -> Future[torch.Tensor]:
    """DDP's communication hook: called for each bucket as soon as its last gradient is there."""
    link.order.append(bucket.index())
    link.last_start = time.perf_counter_ns()
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


def predict(buckets: list[int], passes: tuple[float, float], link: tuple[float, float]) -> float:
    """Seconds of a step that sends its buckets (bytes) while the backward pass goes on.

    A bucket is ready when its share of the backward pass is done, and goes when the one before is
    gone. The last is ready only at the end, and nothing is left that could hide it.
    """
    forward, backward = passes  # in seconds, without sending
    alpha, slope = link  # of an all-reduce, in seconds and in seconds per byte
    ready = gone = 0.0
    for size in buckets:
        ready += backward * size / sum(buckets)
        gone = max(gone, ready) + alpha + slope * size
    return forward + gone


def best_number(total: int, backward: float, link: tuple[float, float]) -> float:
    """Into how many equal buckets `total` bytes must be cut for the shortest predicted step."""
    alpha, slope = link
    return max((backward - slope * total) / alpha, math.sqrt(backward / alpha))


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


def step(model: nn.Module, rows: torch.Tensor, link: SlowLink | None) -> dict:
    """ns of a step and of its passes; on the stand-in also of what its link did meanwhile."""
    if link:
        link.order.clear()
        link.carried.clear()
    model.zero_grad()
    begin = time.perf_counter_ns()
    loss = model(rows).square().mean()
    synchronize(rows.device)
    middle = time.perf_counter_ns()
    loss.backward()
    synchronize(rows.device)
    end = time.perf_counter_ns()
    times = {"step": end - begin, "forward": middle - begin, "backward": end - middle}
    if link and link.order:
        computes = begin, link.last_start  # the last bucket is full when backward ends
        hidden = overlap(link.carried, [computes])
        communication = sum(b - a for a, b in link.carried)
        times |= {"compute": link.last_start - begin, "communication": communication}
        times |= {"hidden": hidden, "exposed": communication - hidden, "order": list(link.order)}
    return times


def time_link(link: SlowLink | None, total: int, device: torch.device) -> tuple[float, float]:
    """alpha (s) and slope (s per byte) of an all-reduce, by the fastest of four sizes."""
    sizes = [total // 4**k for k in range(4)]
    seconds = torch.zeros(4, 8 if link else 50, device=device)
    for size, row in zip(sizes, seconds, strict=True):
        message = torch.zeros(max(size // 4, 1), device=device)
        for i in range(len(row)):
            start = time.perf_counter()
            (link.average(message) if link else dist.all_reduce(message, async_op=True)).wait()
            synchronize(device)
            row[i] = time.perf_counter() - start
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)  # it takes as long as on its slowest rank
    fastest = seconds[:, 1:].min(1).values.tolist()
    alpha, slope = fit(list(zip(sizes, fastest, strict=True)))
    return max(alpha, 1e-9), max(slope, 1e-15)


def measure(args: argparse.Namespace, link: SlowLink | None, device: torch.device) -> dict:
    """The link's alpha and slope, the passes without it, and the steps of each bucket size."""
    torch.manual_seed(args.seed + 1 + dist.get_rank())
    rows = torch.randn(args.rows, args.width, device=device, requires_grad=True)
    pace = args.pace / 1e3 if link else 0.0
    silent = DistributedDataParallel(build(args, pace, rows))
    silent.register_comm_hook(None, noop_hook)  # all that DDP does, but send
    models = [silent]
    for kib in args.bucket_kib:
        model = DistributedDataParallel(build(args, pace, rows), bucket_cap_mb=kib / 1024)
        if link:
            model.register_comm_hook(link, send_bucket)
        models.append(model)
    steps: list[list[dict]] = [[] for _ in models]
    for number in range(args.rounds + 2):  # two to warm up: DDP forms its buckets anew
        for model, done in zip(models, steps, strict=True):  # in turns: a slow moment hits all
            dist.barrier()
            times = step(model, rows, link)
            if number >= 2:
                done.append(times)
    keys = ("step", "forward", "backward")
    fastest = torch.tensor([[min(s[key] for s in done) / 1e9 for key in keys] for done in steps])
    fastest = fastest.to(device)
    dist.all_reduce(fastest, op=dist.ReduceOp.MAX)  # of the slowest rank, and equal on all
    passes = tuple(fastest[0, 1:].tolist())
    alpha_slope = time_link(link, sum(p.nbytes for p in silent.parameters()), device)
    sizes = {}
    for i, kib in enumerate(args.bucket_kib, 1):
        log = models[i]._get_ddp_logging_data()  # DDP's own: bytes, in the order of sending
        buckets = [int(size) for size in str(log["rebuilt_bucket_sizes"]).split(",")]
        size = {"buckets": buckets, "predicted": predict(buckets, passes, alpha_slope)}
        sizes[kib] = size | {"fastest": fastest[i, 0].item(), "steps": steps[i]}
    error = gradient_error(silent, models[1:])
    return {"link": alpha_slope, "passes": passes, "sizes": sizes, "gradient_error": error}


def gradient_error(silent: nn.Module, models: list[nn.Module]) -> float:
    """Largest relative difference from the mean over the ranks of the gradients that each found."""
    mean, *others = (
        torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (silent, *models)
    )
    dist.all_reduce(mean.div_(dist.get_world_size()))
    return max(((other - mean).norm() / mean.norm()).item() for other in others)


def report(found: dict) -> None:
    alpha, slope = found["link"]
    forward, backward = found["passes"]
    say(f"an all-reduce takes {alpha * 1e3:.2f} ms + bytes / {1e-9 / slope:.3f} GB/s")
    say(f"without any, forward takes {forward * 1e3:.1f} and backward {backward * 1e3:.1f} ms")
    heads = "  KiB buckets predicted fastest  error median      quartiles"
    say(heads + " | compute  comm. hidden exposed  last" * found["stand_in"])
    for kib, size in found["sizes"].items():
        low, middle, high = quartiles([s["step"] / 1e6 for s in size["steps"]])
        predicted = size["predicted"] * 1e3
        fastest = size["fastest"] * 1e3
        row = f"{kib:>5}{len(size['buckets']):>8}{predicted:>10.1f}{fastest:>8.1f}"
        row += f"{predicted / fastest - 1:>+7.0%}{middle:>7.1f}{f'{low:.1f} .. {high:.1f}':>15}"
        if found["stand_in"]:
            row += " |{:>8.1f}{:>7.1f}{:>7.1f}{:>8.1f}".format(*(median_ms(size, p) for p in PARTS))
            row += f"{1e3 * (alpha + slope * size['buckets'][-1]):>6.1f}"
        say(row)


def median_ms(size: dict, part: str) -> float:
    return statistics.median(s[part] for s in size["steps"]) / 1e6


def run(args: argparse.Namespace, device: torch.device) -> list[bool | None]:
    world_size = dist.get_world_size()
    stand_in = device.type == "cpu" and not args.real
    link = SlowLink(args.latency / 1e3, args.slow_link * 1e9) if stand_in else None
    ranks = f"{world_size} rank{'s' * (world_size > 1)} on {device.type}"
    say(f"{ranks}: {args.layers} layers of {args.width} x {args.width}, {args.rounds} steps a size")
    say("times in ms; predicted and fastest: on the slowest rank; the others: on rank 0")
    found = measure(args, link, device) | {"stand_in": stand_in}
    report(found)
    sizes = found["sizes"]
    chosen, best = (min(sizes, key=lambda kib: sizes[kib][key]) for key in ("predicted", "fastest"))
    number = best_number(sum(sizes[best]["buckets"]), found["passes"][1], found["link"])
    say(f"best: {chosen} KiB predicted, {best} KiB measured; by the formula, {number:.1f} buckets")
    if dist.get_rank() == 0 and args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    if dist.get_rank() == 0 and args.plot:
        plot(found, args.plot)
    claims = [check("gradient at any size, relative error", found["gradient_error"], 1e-5)]
    if link:
        link.close()
        say("the stand-in obeys the model: this tests order and arithmetic, not a network")
        orders = [
            (s["order"], len(size["buckets"])) for size in sizes.values() for s in size["steps"]
        ]
        wrong = sum(order != list(range(count)) for order, count in orders)
        errors = [abs(size["predicted"] / size["fastest"] - 1) for size in sizes.values()]
        lost = sizes[chosen]["fastest"] / sizes[best]["fastest"] - 1
        claims += [
            check("steps whose buckets did not leave once each and in order", wrong, 0),
            expect("worst error of a predicted step", max(errors), 0.1, args.strict),
            expect("lost by trusting the predicted best", lost, 0.1, args.strict),
        ]
    return claims


def plot(found: dict, path: Path) -> None:
    """Step time over bucket size, measured and predicted, and what of it is communication."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "ch03"
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    rows = found["sizes"].values()
    names = [f"{kib}\n({len(row['buckets'])})" for kib, row in found["sizes"].items()]
    if found["stand_in"]:
        exposed, hidden = ([median_ms(row, part) for row in rows] for part in ("exposed", "hidden"))
        axis.bar(names, exposed, 0.6, color="#e66101", label="communication, exposed")
        axis.bar(names, hidden, 0.6, exposed, color="#fdb863", label="communication, hidden")
    axis.plot(
        names, [median_ms(row, "step") for row in rows], "o-", color="#5e3c99", label="median step"
    )
    axis.plot(names, [row["fastest"] * 1e3 for row in rows], "kx", label="fastest step")
    axis.plot(names, [row["predicted"] * 1e3 for row in rows], "k--", label="predicted step")
    axis.set(xlabel="KiB per bucket (number of buckets)", ylabel="ms", ylim=(0, None))
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None})


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    sizes = [256, 512, 768, 1536, 3072]
    add("--bucket-kib", type=int, nargs="+", default=sizes, help="KiB per bucket; several")
    add("--rounds", type=int, default=6, help="steps of each size")
    add("--real", action="store_true", help="this machine's own link and cores, no stand-ins")
    add("--slow-link", type=float, default=0.125, help="the stand-in's GB/s")
    add("--latency", type=float, default=3.0, help="ms of each all-reduce on the stand-in")
    add("--pace", type=float, default=3.0, help="ms more for a layer's backward on the stand-in")
    add("--layers", type=int, default=12, help="equal layers, without biases")
    add("--width", type=int, default=256, help="features; a layer has width^2 float32 weights")
    add("--rows", type=int, default=64, help="rows of the batch per rank")
    add("--seed", type=int, default=0, help="for weights and data")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--strict", action="store_true", help="exit 1 if an `expect:` line does not hold")
    add("--json", type=Path, help="also write every step's times to this file")
    add("--plot", type=Path, help="also draw the table to this SVG file")
    return parser.parse_args()


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


# Copied from allreduce_microbench.fit
def fit(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Intercept (s, alpha) and slope (s per byte, 1/beta) of a line through (bytes, seconds).

    Least squares of the relative error: 4 KiB counts as much as 16 MiB. Neither is negative.
    """
    weight = sum(1 / t**2 for _, t in points)
    x0, t0 = (sum(p[axis] / p[1] ** 2 for p in points) / weight for axis in (0, 1))
    spread = sum(((x - x0) / t) ** 2 for x, t in points)
    slope = sum((x - x0) * (t - t0) / t**2 for x, t in points) / spread if spread else 0.0
    if slope * x0 > t0:
        return 0.0, sum(x / t for x, t in points) / sum((x / t) ** 2 for x, t in points)
    return t0 - max(0.0, slope) * x0, max(0.0, slope)


# Copied from ch01_single_gpu_baseline.synchronize
def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


# Copied from ch01_single_gpu_baseline.quartiles
def quartiles(values: list[float]) -> list[float]:
    """First quartile, median and third quartile."""
    return torch.tensor(values).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()


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
