"""Take a training step apart: time and work of each phase, and how a careless clock misleads.

    python chapter1-introduction-to-modern-distributed-ai/code/ch01_measure_components.py

On GPUs:
    python chapter1-introduction-to-modern-distributed-ai/code/ch01_measure_components.py --width 1024 --layers 12 --heads 16 --context 1024 --batch 32 --dtype bf16

Look at the last column: a clock that does not wait for the device gets the total right and the
split wrong. On a CPU, a thread with a queue stands in for a CUDA stream. Section 1.3.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import nn


class Stream:
    """Does work in the order of its launch while the caller goes on, as a CUDA stream does."""

    def __init__(self, device: torch.device):
        # on a CPU, one thread with a queue stands in; on a GPU, every operation is a launch already
        self.thread = ThreadPoolExecutor(1) if device.type == "cpu" else None
        self.pending: list[Future] = []

    def launch(self, work: Callable[[], None]) -> None:
        if self.thread:
            self.pending.append(self.thread.submit(work))
        else:
            work()

    def synchronize(self) -> None:
        while self.pending:
            self.pending.pop(0).result()  # waits until it is done; raises what it raised
        if not self.thread:
            torch.accelerator.synchronize()


class Step:
    """A training step, cut into phases that can be timed one by one."""

    def __init__(self, args: argparse.Namespace, device: torch.device, data: torch.Tensor):
        self.args, self.device, self.data = args, device, data
        self.stream = Stream(device)
        self.model = ByteLM(args.width, args.layers, args.heads, args.context).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3)
        self.losses: list[float] = []

    def load(self) -> None:
        windows = draw_batch(self.data, self.args.batch, self.args.context)
        self.tokens, self.targets = (w.to(self.device) for w in windows)  # two [batch, context]

    def forward(self) -> None:
        dtype = DTYPES[self.args.dtype]
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            logits = self.model(self.tokens)  # [batch, seq, 256]
            self.loss = F.cross_entropy(logits.flatten(0, 1), self.targets.flatten())

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def read_loss(self) -> None:
        self.stream.synchronize()  # `item` itself waits for a CUDA stream, but not for the thread
        self.losses.append(self.loss.item())

    def timed(self, synchronize: bool) -> dict[str, float]:
        """Seconds by the host's clock, read when the device has done a phase, or at once."""
        launch = self.stream.launch
        phases = {
            "data": self.load,  # the host's own work: it has nothing to wait for
            "forward": lambda: launch(self.forward),
            "backward": lambda: launch(lambda: self.loss.backward()),
            "optimizer": lambda: launch(self.update),
            "read loss": self.read_loss,
        }
        seconds = {}
        begin = time.perf_counter()
        for name, phase in phases.items():
            start = time.perf_counter()
            phase()
            if synchronize:
                self.stream.synchronize()
            seconds[name] = time.perf_counter() - start
        return seconds | {"whole step": time.perf_counter() - begin}


def least_work(args: argparse.Namespace, parameters: int) -> dict[str, tuple[float, str]]:
    """What a phase has to do at least; its rate is this by its time. FLOPs: PaLM, appendix B."""
    weights = args.layers * 12 * args.width**2 + 256 * args.width
    attention = args.layers * 2 * args.context * args.width  # the masked half too
    flops = 2 * (weights + attention) * args.batch * args.context
    moved = 28 * parameters  # AdamW reads weight, gradient, two moments; writes all but gradient
    return {"forward": (flops, "FLOP"), "backward": (2 * flops, "FLOP"), "optimizer": (moved, "B")}


def run(args: argparse.Namespace, device: torch.device) -> list[bool | None]:
    torch.manual_seed(args.seed)
    step = Step(args, device, read_bytes(args.data, at_least=20 * args.context))
    for _ in range(3):  # cold: the optimizer makes its state, the allocator gets its memory
        step.timed(synchronize=True)
    right, wrong = [], []
    for _ in range(args.repeats):  # in turns, so that a busy moment hits both
        right.append(step.timed(synchronize=True))
        wrong.append(step.timed(synchronize=False))
    if args.json:
        result = {"synchronized_s": right, "unsynchronized_s": wrong}
        args.json.write_text(json.dumps(result, indent=1) + "\n")

    parameters = sum(p.numel() for p in step.model.parameters())
    say(f"1 process on {device.type}: {parameters:,} parameters, {args.repeats} steps each way")
    if step.stream.thread:
        step.stream.thread.shutdown()
        say("A thread with a queue stands in for a CUDA stream: a launch returns at once.")
    say(f"{'phase':<10} {'ms':>8}  {'quartiles':<18} {'rate':>13}  {'unsynchronized ms':>17}")
    work = least_work(args, parameters)
    medians, careless = {}, {}
    for phase in right[0]:
        low, medians[phase], high = quartiles([seconds[phase] for seconds in right])
        careless[phase] = statistics.median(seconds[phase] for seconds in wrong)
        amount, unit = work.get(phase, (0, ""))
        rate = f"{amount / medians[phase] / 1e9:,.1f} G{unit}/s" if amount else ""
        spread = f"[{low * 1e3:.2f} .. {high * 1e3:.2f}]"
        line = f"{phase:<10} {medians[phase] * 1e3:>8.2f}  {spread:<18} {rate:>13}"
        say(f"{line}  {careless[phase] * 1e3:>17.2f}")
    ratio = medians["backward"] / medians["forward"]
    say(f"backward / forward: predicted 2.00, measured {ratio:.2f}, off by {ratio / 2 - 1:+.0%}")

    # the values of `seconds` are the phases and the whole step
    between = statistics.median(
        2 - sum(seconds.values()) / seconds["whole step"] for seconds in right
    )
    seen = careless["forward"] / medians["forward"]
    return [
        check("loss of the last step, and of the first", step.losses[-1], step.losses[0]),
        expect("share of the step between its phases", between, 0.05, args.strict),
        expect("share of forward's time that is seen unsynchronized", seen, 0.5, args.strict),
    ]


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, default="resources/corpus.txt", help="text to learn, as bytes"
    )
    parser.add_argument("--repeats", type=int, default=10, help="timed steps each way")
    parser.add_argument("--batch", type=int, default=8, help="windows of text per step")
    parser.add_argument("--context", type=int, default=128, help="bytes per window")
    parser.add_argument("--width", type=int, default=128, help="size of a token's vector")
    parser.add_argument("--layers", type=int, default=4, help="transformer blocks")
    parser.add_argument("--heads", type=int, default=4, help="attention heads; divides --width")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the matrix products")
    parser.add_argument("--seed", type=int, default=0, help="for weights and batches")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--json", type=Path, help="also write every timing, in s, to this file")
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


# Copied from ch01_single_gpu_baseline.quartiles
def quartiles(values: list[float]) -> list[float]:
    """First quartile, median and third quartile."""
    return torch.tensor(values).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()


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
