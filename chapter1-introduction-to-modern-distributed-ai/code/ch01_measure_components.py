"""Take a training step apart: time and work of each phase, and how a careless clock misleads.

    python chapter1-introduction-to-modern-distributed-ai/code/ch01_measure_components.py
    python chapter1-introduction-to-modern-distributed-ai/code/ch01_measure_components.py --width 64 --batch 4

On GPUs:
    python chapter1-introduction-to-modern-distributed-ai/code/ch01_measure_components.py --width 1024 --layers 12 --heads 16 --context 1024 --batch 32

Look at the last column: a clock that does not wait for the device gets the total right and the
split wrong. On a CPU, a thread with a queue stands in for a CUDA stream. Section 1.3.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


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

    def load(self) -> None:
        starts = torch.randint(len(self.data) - self.args.context, (self.args.batch, 1))
        windows = self.data[starts + torch.arange(self.args.context + 1)].to(self.device)
        self.tokens, self.targets = windows[:, :-1], windows[:, 1:]  # two [batch, context]

    def forward(self) -> None:
        logits = self.model(self.tokens)  # [batch, seq, 256]
        self.loss = F.cross_entropy(logits.flatten(0, 1), self.targets.flatten())

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def read_loss(self) -> None:
        self.stream.synchronize()  # `item` itself waits for a CUDA stream, but not for the thread
        self.loss.item()

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
        seconds, begin = {}, time.perf_counter()
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


def run(args: argparse.Namespace, device: torch.device) -> bool:
    torch.manual_seed(args.seed)
    step = Step(args, device, read_bytes(args.data, at_least=20 * args.context))
    for _ in range(3):  # cold: the optimizer makes its state, the allocator gets its memory
        step.timed(synchronize=True)
    right, wrong = [], []
    for _ in range(args.repeats):  # in turns, so that a busy moment hits both
        right.append(step.timed(synchronize=True))
        wrong.append(step.timed(synchronize=False))
    if args.json:
        record = {"synchronized_s": right, "unsynchronized_s": wrong}
        args.json.write_text(json.dumps(record, indent=1) + "\n")

    parameters = sum(p.numel() for p in step.model.parameters())
    print(f"1 process on {device.type}: {parameters:,} parameters, {args.repeats} steps each way")
    if step.stream.thread:
        step.stream.thread.shutdown()
        print("A thread with a queue stands in for a CUDA stream: a launch returns at once.")
    print(f"{'phase':<10} {'ms':>8}  {'quartiles':<18} {'rate':>13}  {'unsynchronized ms':>17}")
    medians, work = {}, least_work(args, parameters)
    for phase in right[0]:
        low, median, high = statistics.quantiles((r[phase] for r in right), n=4, method="inclusive")
        careless = statistics.median(r[phase] for r in wrong)
        medians[phase] = median, careless
        amount, unit = work.get(phase, (0, ""))
        rate = f"{amount / median / 1e9:,.1f} G{unit}/s" if amount else ""
        print(
            f"{phase:<10} {median * 1e3:>8.2f}  {f'[{low * 1e3:.2f} .. {high * 1e3:.2f}]':<18} "
            f"{rate:>13}  {careless * 1e3:>17.2f}"
        )
    forward, careless = medians["forward"]
    ratio = medians["backward"][0] / forward
    print(f"backward / forward: predicted 2.00, measured {ratio:.2f}, off by {ratio / 2 - 1:+.0%}")

    # the values of `r` are the phases and the whole step
    apart = statistics.median(abs(sum(r.values()) / r["whole step"] - 2) for r in right)
    adds_up = check(f"phases add up to the whole step, off by {apart:.2%}", apart, 0.05)
    seen = careless / forward
    return check(f"unsynchronized, the forward reads {seen:.1%} of its time", seen, 0.5) and adds_up


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
    parser.add_argument("--repeats", type=positive, default=10, help="timed steps, 3 or more")
    parser.add_argument("--batch", type=positive, help="windows of text; default: 8, on a GPU 512")
    parser.add_argument("--context", type=positive, default=128, help="bytes per window")
    parser.add_argument("--width", type=positive, default=128, help="size of a token's vector")
    parser.add_argument("--layers", type=positive, default=4, help="transformer blocks")
    parser.add_argument("--heads", type=positive, default=4, help="of attention; divide --width")
    parser.add_argument("--seed", type=int, default=0, help="for weights and batches")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--json", type=Path, help="also write every timing, in s, to this file")
    args = parser.parse_args()
    try:
        if args.json:
            args.json.open("a").close()  # or it would fail after the work
    except OSError as error:
        stop(f"cannot write {args.json} ({error.strerror}): give another file with --json FILE")
    if args.repeats < 3:
        stop(f"--repeats {args.repeats} gives no quartiles: type --repeats 3 or more")
    if args.width % args.heads:
        stop(f"--heads {args.heads} does not divide --width {args.width}")
    return args


def main() -> None:
    args = parse_args()
    device = pick_device(args.device)
    args.batch = args.batch or (8 if device.type == "cpu" else 512)
    sys.exit(not run(args, device))


if __name__ == "__main__":
    main()
