"""Ask PyTorch's profiler where a training step goes: operators, memory, and a trace to look at.

    python chapter1-introduction-to-modern-distributed-ai/code/ch01_profiling.py
    python chapter1-introduction-to-modern-distributed-ai/code/ch01_profiling.py --width 64 --batch 4 --top 5 --cycles 1

On GPUs:
    python chapter1-introduction-to-modern-distributed-ai/code/ch01_profiling.py --width 1024 --layers 12 --heads 16 --context 1024 --batch 32

Look at how much of the time goes to operators that do next to no arithmetic, and at how often
they are called. Then open the trace in ui.perfetto.dev, which reads it in the browser. Section 1.3.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import profile, record_function, schedule

PHASES = ("data", "forward", "backward", "optimizer", "wait")
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")


class Block(nn.Module):
    """Attention, then a two-layer MLP, each added to what comes in."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [batch, seq, width]
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [batch, heads, seq, head_dim]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ByteLM(nn.Module):
    """A decoder-only transformer (GPT-2's shape) whose tokens are bytes."""

    def __init__(self, width: int, layers: int, heads: int, context: int):
        super().__init__()
        self.context = context
        self.embed, self.position = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:  # [batch, seq] -> [batch, seq, 256]
        x = self.embed(tokens) + self.position.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def phases_of(args: argparse.Namespace, device: torch.device) -> dict[str, Callable[[], None]]:
    """The phases of a training step, in order, by the names that they have in the trace."""
    data = read_bytes(args.data, at_least=20 * args.context)
    model = ByteLM(args.width, args.layers, args.heads, args.context).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    now = {}

    def load() -> None:
        starts = torch.randint(len(data) - args.context, (args.batch, 1))
        windows = data[starts + torch.arange(args.context + 1)].to(device)
        now["tokens"], now["targets"] = windows[:, :-1], windows[:, 1:]  # two [batch, context]

    def forward() -> None:
        logits = model(now["tokens"])  # [batch, seq, 256]
        now["loss"] = F.cross_entropy(logits.flatten(0, 1), now["targets"].flatten())

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()
        now.clear()  # so that a recorded step frees nothing that an unrecorded one allocated

    # on a GPU, the other phases only launch
    wait = (lambda: None) if device.type == "cpu" else torch.accelerator.synchronize
    phases = (load, forward, lambda: now["loss"].backward(), update, wait)
    return dict(zip(PHASES, phases, strict=True))


def seconds_of_step(phases: dict[str, Callable[[], None]]) -> float:
    start = time.perf_counter()
    for name, phase in phases.items():
        with record_function(name):
            phase()
    return time.perf_counter() - start


def profiled(phases: dict[str, Callable[[], None]], args: argparse.Namespace) -> tuple:
    """Run cycles of plain, warm-up and recorded steps; write the last cycle's trace to the file."""
    cycle = ["plain"] * args.active + ["warm-up"] + ["recorded"] * args.active
    seconds = {kind: [] for kind in cycle}
    plan = schedule(wait=args.active, warmup=1, active=args.active, repeat=args.cycles)
    with profile(schedule=plan, profile_memory=True, acc_events=True) as profiler:
        for kind in cycle * args.cycles:
            seconds[kind].append(seconds_of_step(phases))
            profiler.step()
    partial = args.trace.with_suffix(".partial")
    profiler.export_chrome_trace(str(partial))
    partial.replace(args.trace)
    return profiler, seconds["plain"], seconds["recorded"]


def print_operators(profiler: profile, steps: int, device: torch.device, top: int) -> None:
    """The operators by their own time, without that of the operators they call."""
    place = "cpu" if device.type == "cpu" else "device"
    own, memory = f"self_{place}_time_total", f"self_{place}_memory_usage"
    rows = [r for r in profiler.key_averages() if r.device_type == DeviceType.CPU]
    rows.sort(key=lambda r: getattr(r, own), reverse=True)
    operators = [r for r in rows if not r.is_user_annotation]
    total = sum(getattr(r, own) for r in (rows if place == "cpu" else operators))
    print(f"{'operator':<50} {'calls':>6} {'own ms':>8} {'share':>6} {'own MiB':>8}   per step")
    for r in operators[:top]:
        ms, share = getattr(r, own) / steps / 1e3, getattr(r, own) / total
        mib = round(getattr(r, memory) / steps / 2**20, 1) + 0  # + 0: prints -0.0 as 0.0
        print(f"{r.key[:50]:<50} {r.count / steps:>6.0f} {ms:>8.2f} {share:>6.1%} {mib:>8.1f}")

    def part(chosen: list) -> str:
        return f"{sum(getattr(r, own) for r in chosen) / total:.1%} of the time"

    products = [r for r in operators if r.key in PRODUCTS or "attention" in r.key]
    others = [r for r in operators if r not in products]
    calls = sum(r.count for r in others) / steps
    print(f"products      {part(products)}: matrix products and attention, nearly all the FLOPs")
    print(f"others        {part(others)}, in {calls:,.0f} calls per step")


def peak_of(events: list[dict], phases: list[dict], device: torch.device) -> tuple[int, str]:
    """Most bytes above the start of the recorded steps, and the phase in which they were held."""
    held = peak = moment = 0
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"]):
        if (event["args"]["Device Type"] == 0) == (device.type == "cpu"):
            held += event["args"]["Bytes"]  # negative where memory is given back
            if held > peak:
                peak, moment = held, event["ts"]
    inside = (e["name"] for e in phases if e["ts"] <= moment <= e["ts"] + e["dur"])
    return peak, next(inside, "between phases")


def run(args: argparse.Namespace, device: torch.device) -> bool:
    torch.manual_seed(args.seed)
    phases = phases_of(args, device)
    for _ in range(3):  # cold: the optimizer makes its state, the allocator gets its memory
        seconds_of_step(phases)
    profiler, plain, recorded = profiled(phases, args)
    events = json.loads(args.trace.read_text())["traceEvents"]
    ranges = [e for e in events if e.get("cat") == "user_annotation" and "dur" in e]
    named = [e for e in ranges if e["name"] in PHASES]

    print(f"1 process on {device.type}: {len(recorded)} steps recorded, {len(plain)} not, in turns")
    print_operators(profiler, len(recorded), device, args.top)
    peak, phase = peak_of(events, named, device)
    print(f"peak memory   {peak / 2**20:,.1f} MiB above the start of a step, reached in {phase}")
    bare, watched = statistics.median(plain) * 1e3, statistics.median(recorded) * 1e3
    cost = f"{watched:.1f} ms with it, {bare:.1f} ms without"
    print(f"profiler      a step takes {cost}: {watched / bare - 1:+.0%}, medians")
    print(f"trace         {args.trace}, {args.trace.stat().st_size / 1e6:.1f} MB")
    print(f"{'':<13} ui.perfetto.dev > Open trace file; look for the gaps inside ProfilerStep#\n")

    steps = [e["dur"] for e in ranges if e["name"].startswith("ProfilerStep#")]
    counts = [len(steps), *(sum(e["name"] == name for e in named) for name in PHASES)]
    missing = sum(abs(count - args.active) for count in counts)
    whole = check(f"trace of {args.active} steps and their phases, ranges amiss", missing, 0)
    uncovered = abs(1 - sum(e["dur"] for e in named) / sum(steps)) if steps else 1.0
    return check(f"time of the steps outside the phases {uncovered:.1%}", uncovered, 0.1) and whole


def check(claim: str, value: float, bound: float) -> bool:
    print(f"check: {claim}: {value:.3g} <= {bound:.3g}  {'ok' if value <= bound else 'FAILED'}")
    return value <= bound


def read_bytes(path: Path, at_least: int) -> torch.Tensor:
    """The file's bytes as integers from 0 to 255: [bytes]."""
    try:
        text = path.read_bytes()
    except OSError as error:
        stop(f"cannot read {path} ({error.strerror}): give a text file with --data FILE")
    if len(text) < at_least:
        stop(f"{path} has {len(text)} bytes, this run needs {at_least}: give a longer --data FILE")
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def pick_device(wanted: str) -> torch.device:
    """The accelerator if there is one, unless told otherwise."""
    found = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if wanted not in ("auto", "cpu", found.type):
        stop(f"--device {wanted}: this machine has {found.type}; type --device {found.type}")
    return torch.device("cpu") if wanted == "cpu" else found


def stop(message: str) -> None:
    print(message, file=sys.stderr)
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
    text = Path(__file__).resolve().parents[1] / "main.md"
    parser.add_argument("--data", type=Path, default=text, help="to learn; default: the chapter")
    trace = Path("runs/ch01_profiling/trace.json")
    parser.add_argument("--trace", type=Path, default=trace, help=f"to write; default: {trace}")
    parser.add_argument("--top", type=positive, default=8, help="operators in the table")
    parser.add_argument("--cycles", type=positive, default=4, help="rounds of steps")
    parser.add_argument("--active", type=positive, default=2, help="steps recorded per round")
    parser.add_argument("--batch", type=positive, default=8, help="windows of text per step")
    parser.add_argument("--context", type=positive, default=128, help="bytes per window")
    parser.add_argument("--width", type=positive, default=128, help="size of a token's vector")
    parser.add_argument("--layers", type=positive, default=4, help="transformer blocks")
    parser.add_argument("--heads", type=positive, default=4, help="of attention; divide --width")
    parser.add_argument("--seed", type=int, default=0, help="for weights and batches")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args()
    if args.width % args.heads:
        stop(f"--heads {args.heads} does not divide --width {args.width}")
    try:
        args.trace.parent.mkdir(parents=True, exist_ok=True)
        args.trace.open("a").close()  # or it would fail after the work
    except OSError as error:
        stop(f"cannot write {args.trace} ({error.strerror}): give another file with --trace FILE")
    return args


def main() -> None:
    args = parse_args()
    sys.exit(not run(args, pick_device(args.device)))


if __name__ == "__main__":
    main()
