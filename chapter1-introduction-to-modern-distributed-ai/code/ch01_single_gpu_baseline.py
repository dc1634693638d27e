"""Train a small byte-level language model on one device, and account for its time and memory.

    python chapter1-introduction-to-modern-distributed-ai/code/ch01_single_gpu_baseline.py

On GPUs:
    python chapter1-introduction-to-modern-distributed-ai/code/ch01_single_gpu_baseline.py --width 1024 --layers 12 --heads 16 --context 1024 --batch 32 --steps 60 --lr 3e-4 --dtype bf16

Look at the MFU: how much of the device's measured peak the training step turns into useful FLOPs.
The text at the end is what the model has learned in those seconds. Section 1.3.
"""

import argparse
import json
import math
import os
import resource
import sys
import time
from pathlib import Path
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm


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


def flops_per_token(width: int, layers: int, context: int) -> int:
    """FLOPs to train on one token: 6 for each weight in a matrix product, and attention's own.

    Each weight is used in one multiply-add forward and two backward (2 + 4 FLOPs); attention
    multiplies queries with `context` keys and weights with `context` values (PaLM, appendix B,
    which counts the masked half too).
    """
    weights = layers * 12 * width**2 + 256 * width
    attention = layers * 2 * context * width
    return 6 * (weights + attention)


def counted_flops_per_token(args: argparse.Namespace) -> float:
    """PyTorch's own count for one window, on the meta device: shapes without memory or work."""
    with torch.device("meta"):
        model = ByteLM(args.width, args.layers, args.heads, args.context)
        tokens = torch.zeros(1, args.context, dtype=torch.long)
    # The counter knows attention as matrix products only, not the fused kernels that train.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss_of(model, tokens, tokens).backward()
    return counter.get_total_flops() / args.context


def draw_batch(data: torch.Tensor, batch: int, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random windows of the text, and the same windows one byte later: two [batch, context]."""
    starts = torch.randint(len(data) - context, (batch, 1))
    window = data[starts + torch.arange(context + 1)]
    return window[:, :-1], window[:, 1:]


def loss_of(model: nn.Module, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of 20 square matrix products: what the device does reach."""
    size = 1024 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(20):
        start = time.perf_counter()
        a @ b
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def train(model: nn.Module, data: torch.Tensor, args: argparse.Namespace) -> dict:
    """Run the steps; return the losses and the seconds of each."""
    device, dtype = next(model.parameters()).device, DTYPES[args.dtype]
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    losses, seconds = [], []
    for _ in tqdm(range(args.steps), desc="training", unit="step", disable=None):
        start = time.perf_counter()
        tokens, targets = (t.to(device) for t in draw_batch(data, args.batch, args.context))
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = loss_of(model, tokens, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)  # or the clock stops before the work does
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    return {"losses": losses, "seconds": seconds[min(3, args.steps - 1) :]}  # first ones warm up


@torch.no_grad()
def held_out_loss(model: nn.Module, data: torch.Tensor, context: int) -> float:
    """Mean loss in nats per byte over the held-out text, cut into windows."""
    device = next(model.parameters()).device
    windows = data[: (len(data) - 1) // context * context + 1].unfold(0, context + 1, context)
    total = 0.0
    for window in windows.split(32):
        total += loss_of(model, window[:, :-1].to(device), window[:, 1:].to(device)) * len(window)
    return float(total) / len(windows)


@torch.no_grad()
def write(model: ByteLM, prompt: bytes, count: int) -> str:
    """Sample `count` bytes after the prompt; every byte runs the whole window again."""
    device = next(model.parameters()).device
    tokens = torch.tensor([list(prompt)], device=device)
    for _ in range(count):
        logits = model(tokens[:, -model.context :])[0, -1].float() / 0.7
        tokens = torch.cat([tokens, torch.multinomial(logits.softmax(-1), 1)[None]], dim=1)
    return bytes(tokens[0].tolist()).decode(errors="replace").replace("\n", " ")


def byte_entropy(train: torch.Tensor, test: torch.Tensor) -> float:
    """Loss in nats per byte of a guess that knows how frequent each byte is, and nothing else."""
    frequency = (torch.bincount(train, minlength=256) + 1.0) / (len(train) + 256)
    return -frequency.log()[test].mean().item()


def run(args: argparse.Namespace, device: torch.device) -> list[bool | None]:
    torch.manual_seed(args.seed)
    data = read_bytes(args.data, at_least=20 * args.context)
    split = len(data) * 9 // 10
    model = ByteLM(args.width, args.layers, args.heads, args.context).to(device)
    parameters = sum(p.numel() for p in model.parameters())

    per_token = flops_per_token(args.width, args.layers, args.context)
    counted = counted_flops_per_token(args)

    result = train(model, data[:split], args)
    memory = peak_memory(device)  # before anything else than training takes some
    peak = measured_peak(device, DTYPES[args.dtype])
    tokens_per_step = args.batch * args.context
    low, median, high = quartiles([tokens_per_step / t for t in result["seconds"]])
    loss = held_out_loss(model, data[split:], args.context)
    guess = byte_entropy(data[:split], data[split:])

    say(f"1 process on {device.type}: {parameters:,} parameters, {args.dtype}")
    say(f"data          {len(data):,} bytes of {args.data.name}, the last tenth held out")
    say(f"steps         {args.steps} x {tokens_per_step:,} tokens")
    say(f"loss          {result['losses'][0]:.2f} -> {result['losses'][-1]:.2f} nats per byte")
    say(f"held out      {loss:.2f} nats = {loss / math.log(2):.2f} bits per byte")
    spread = f"[{low:,.0f} .. {high:,.0f}], {len(result['seconds'])} steps"
    say(f"throughput    {median:,.0f} tokens/s  {spread}")
    say(f"FLOPs         {per_token / 1e6:.2f} MFLOP per token, forward and backward")
    say(f"achieved      {median * per_token / 1e9:,.1f} GFLOP/s")
    say(f"peak          {peak / 1e9:,.1f} GFLOP/s, the fastest matrix product measured")
    say(f"MFU           {median * per_token / peak:.1%} of that peak, not of a data sheet's")
    what = "of the process, PyTorch included" if device.type == "cpu" else "on the device"
    say(f"peak memory   {memory / 2**20:,.0f} MiB {what}")
    text = write(model, b"The ", 176)
    say(f"~ {text[:90]}\n~ {text[90:]}")

    if args.json:
        record = {"parameters": parameters, "tokens_per_s": median, "tokens_per_s_iqr": [low, high]}
        record |= {"mfu": median * per_token / peak, "peak_flops": peak, "held_out_loss": loss}
        args.json.write_text(json.dumps(record | result, indent=1) + "\n")
    return [
        check("FLOPs per token, off PyTorch's own count", abs(per_token / counted - 1), 0.01),
        check("held-out loss, and that of byte frequencies alone", loss, guess),
    ]


def check(claim: str, value: float, bound: float, at_least: bool = False) -> bool:
    """Print whether a value keeps its bound, as it must anywhere; a rank where it does not speaks."""
    held = bool(value >= bound if at_least else value <= bound)  # False for NaN
    line = f"check: {claim} = {value:.3g} {'>=' if at_least else '<='} {bound:.3g}"
    if held:
        say(f"{line}  ok")
    else:
        print(f"{line}  FAILED on rank {os.environ.get('RANK', '0')}", flush=True)
    return held


def expect(
    claim: str, value: float, bound: float, strict: bool, at_least: bool = False
) -> bool | None:
    """Print whether a value that depends on the machine keeps its bound; judge it if `strict`."""
    held = bool(value >= bound if at_least else value <= bound)
    verdict = "ok" if held else "not here"
    say(f"expect: {claim} = {value:.3g} {'>=' if at_least else '<='} {bound:.3g}  {verdict}")
    return held if strict else None


def conclude(claims: list[bool | None]) -> int:
    """Print the last line of a run, and return its exit code; an `expect` that is None is no check."""
    judged = [held for held in claims if held is not None]
    failed = judged.count(False)
    say(f"{failed} of {len(judged)} checks FAILED" if failed else f"all {len(judged)} checks ok")
    return int(failed > 0)


def say(line: str) -> None:
    """Print on rank 0. A reader who has seen enough (`| head`) does not end the run."""
    if os.environ.get("RANK", "0") == "0":
        try:
            print(line, flush=True)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def quartiles(values: list[float]) -> list[float]:
    """First quartile, median and third quartile."""
    return torch.tensor(values).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()


def peak_memory(device: torch.device) -> int:
    """Bytes at the worst moment so far: the allocator's on a GPU, the whole process's on a CPU."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


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


def pick_device(wanted: str) -> torch.device:
    """The accelerator if there is one, unless told otherwise."""
    found = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if wanted not in ("auto", "cpu", found.type):
        stop(f"--device {wanted}: this machine has {found.type}; type --device {found.type}")
    return torch.device("cpu") if wanted == "cpu" else found


def stop(message: str) -> NoReturn:
    """End with one line and exit code 2: the command was wrong, not the program."""
    sys.stderr.write(message + "\n")  # in one piece: other ranks write too
    sys.exit(2)


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, default="resources/corpus.txt", help="text to learn, as bytes"
    )
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=16, help="windows of text per step")
    parser.add_argument("--context", type=int, default=128, help="bytes per window")
    parser.add_argument("--width", type=int, default=128, help="size of a token's vector")
    parser.add_argument("--layers", type=int, default=4, help="transformer blocks")
    parser.add_argument("--heads", type=int, default=4, help="attention heads; divides --width")
    parser.add_argument("--lr", type=float, default=3e-3, help="AdamW's learning rate")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the matrix products")
    parser.add_argument("--seed", type=int, default=0, help="for weights, batches and the text")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    args = parser.parse_args()
    if args.width % args.heads:
        stop(f"--heads {args.heads} does not divide --width {args.width}")
    return args


def main() -> None:
    args = parse_args()
    sys.exit(conclude(run(args, pick_device(args.device))))


if __name__ == "__main__":
    main()
