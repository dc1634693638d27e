"""Ask PyTorch's profiler where a training step goes: operators, memory, and a trace to look at.

    python chapter1-introduction-to-modern-distributed-ai/code/ch01_profiling.py

On GPUs:
    python chapter1-introduction-to-modern-distributed-ai/code/ch01_profiling.py --width 1024 --layers 12 --heads 16 --context 1024 --batch 32 --dtype bf16

Look at how much of the time goes to operators that do next to no arithmetic, and at how often
they are called. Then open the trace in ui.perfetto.dev, which reads it in the browser. Section 1.3.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import profile, record_function, schedule

PHASES = ("data", "forward", "backward", "optimizer", "wait")
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")


def phases_of(args: argparse.Namespace, device: torch.device) -> dict[str, Callable[[], None]]:
    """The phases of a training step, in order, by the names that they have in the trace."""
    data = read_bytes(args.data, at_least=20 * args.context)
    model = ByteLM(args.width, args.layers, args.heads, args.context).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    dtype = DTYPES[args.dtype]
    now = {}

    def load() -> None:
        windows = draw_batch(data, args.batch, args.context)
        now["tokens"], now["targets"] = (w.to(device) for w in windows)  # two [batch, context]

    def forward() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(now["tokens"])  # [batch, seq, 256]
            now["loss"] = F.cross_entropy(logits.flatten(0, 1), now["targets"].flatten())

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()
        now.clear()  # so that a recorded step frees nothing that an unrecorded one allocated

    def wait() -> None:
        synchronize(device)  # on a GPU, the other phases only launch

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
    args.trace.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(args.trace))
    return profiler, seconds["plain"], seconds["recorded"]


def print_operators(profiler: profile, steps: int, device: torch.device, top: int) -> None:
    """The operators by their own time, without that of the operators they call."""
    place = "cpu" if device.type == "cpu" else "device"
    own, memory = f"self_{place}_time_total", f"self_{place}_memory_usage"
    rows = [r for r in profiler.key_averages() if r.device_type == DeviceType.CPU]
    rows.sort(key=lambda r: getattr(r, own), reverse=True)
    operators = [r for r in rows if not r.is_user_annotation]
    total = sum(getattr(r, own) for r in (rows if place == "cpu" else operators))
    say(f"{'operator':<50} {'calls':>6} {'own ms':>8} {'share':>6} {'own MiB':>8}   per step")
    for r in operators[:top]:
        ms, share = getattr(r, own) / steps / 1e3, getattr(r, own) / total
        mib = round(getattr(r, memory) / steps / 2**20, 1) + 0  # + 0: prints -0.0 as 0.0
        say(f"{r.key[:50]:<50} {r.count / steps:>6.0f} {ms:>8.2f} {share:>6.1%} {mib:>8.1f}")

    def part(chosen: list) -> str:
        return f"{sum(getattr(r, own) for r in chosen) / total:.1%} of the time"

    products = [r for r in operators if r.key in PRODUCTS or "attention" in r.key]
    others = [r for r in operators if r not in products]
    calls = sum(r.count for r in others) / steps
    say(f"products      {part(products)}: matrix products and attention, nearly all the FLOPs")
    say(f"others        {part(others)}, in {calls:,.0f} calls per step")


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


def run(args: argparse.Namespace, device: torch.device) -> list[bool | None]:
    torch.manual_seed(args.seed)
    phases = phases_of(args, device)
    for _ in range(3):  # cold: the optimizer makes its state, the allocator gets its memory
        seconds_of_step(phases)
    profiler, plain, recorded = profiled(phases, args)
    events = json.loads(args.trace.read_text())["traceEvents"]
    ranges = [e for e in events if e.get("cat") == "user_annotation" and "dur" in e]
    named = [e for e in ranges if e["name"] in PHASES]

    say(f"1 process on {device.type}: {len(recorded)} steps recorded, {len(plain)} not, in turns")
    print_operators(profiler, len(recorded), device, args.top)
    peak, phase = peak_of(events, named, device)
    say(f"peak memory   {peak / 2**20:,.1f} MiB above the start of a step, reached in {phase}")
    bare, watched = statistics.median(plain) * 1e3, statistics.median(recorded) * 1e3
    cost = f"{watched:.1f} ms with it, {bare:.1f} ms without"
    say(f"profiler      a step takes {cost}: {watched / bare - 1:+.0%}, medians")
    say(f"trace         {args.trace}, {args.trace.stat().st_size / 1e6:.1f} MB")
    say(f"{'':<13} ui.perfetto.dev > Open trace file; look for the gaps inside ProfilerStep#\n")

    steps = [e["dur"] for e in ranges if e["name"].startswith("ProfilerStep#")]
    counts = [len(steps), *(sum(e["name"] == name for e in named) for name in PHASES)]
    missing = sum(abs(count - args.active) for count in counts)
    outside = 1 - sum(e["dur"] for e in named) / sum(steps)
    return [
        check(f"steps and phases of {args.active} steps missing in the trace", missing, 0),
        expect("share of the steps outside their phases", outside, 0.1, args.strict),
    ]


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, default="resources/corpus.txt", help="text to learn, as bytes"
    )
    parser.add_argument(
        "--trace", type=Path, default="runs/ch01_profiling/trace.json", help="file to write"
    )
    parser.add_argument("--top", type=int, default=8, help="operators in the table")
    parser.add_argument("--cycles", type=int, default=4, help="rounds of steps")
    parser.add_argument("--active", type=int, default=2, help="steps recorded per round")
    parser.add_argument("--batch", type=int, default=8, help="windows of text per step")
    parser.add_argument("--context", type=int, default=128, help="bytes per window")
    parser.add_argument("--width", type=int, default=128, help="size of a token's vector")
    parser.add_argument("--layers", type=int, default=4, help="transformer blocks")
    parser.add_argument("--heads", type=int, default=4, help="attention heads; divides --width")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the matrix products")
    parser.add_argument("--seed", type=int, default=0, help="for weights and batches")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--strict", action="store_true", help="exit 1 if an `expect:` line does not hold"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    sys.exit(conclude(run(args, pick_device(args.device))))


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


# Copied from ch01_single_gpu_baseline.Block
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


# Copied from ch01_single_gpu_baseline.ByteLM
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


# Copied from ch01_single_gpu_baseline.draw_batch
def draw_batch(data: torch.Tensor, batch: int, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random windows of the text, and the same windows one byte later: two [batch, context]."""
    starts = torch.randint(len(data) - context, (batch, 1))
    window = data[starts + torch.arange(context + 1)]
    return window[:, :-1], window[:, 1:]


# Copied from ch01_single_gpu_baseline.synchronize
def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


# Copied from ch01_single_gpu_baseline.read_bytes
def read_bytes(path: Path, at_least: int) -> torch.Tensor:
    """The file's bytes as integers from 0 to 255: [bytes]."""
    try:
        text = path.read_bytes()
    except OSError as error:
        stop(f"cannot read {path} ({error.strerror}): give a text file with --data FILE")
    if len(text) < at_least:
        stop(f"{path} has {len(text)} bytes, this run needs {at_least}: give a longer --data FILE")
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


# Copied from ch01_single_gpu_baseline.pick_device
def pick_device(wanted: str) -> torch.device:
    """The accelerator if there is one, unless told otherwise."""
    found = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if wanted not in ("auto", "cpu", found.type):
        stop(f"--device {wanted}: this machine has {found.type}; type --device {found.type}")
    return torch.device("cpu") if wanted == "cpu" else found


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
