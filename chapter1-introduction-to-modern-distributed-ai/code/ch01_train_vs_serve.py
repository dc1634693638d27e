"""One model trained, prefilled and decoded: FLOPs and bytes say which of the two each waits for.

    python chapter1-introduction-to-modern-distributed-ai/code/ch01_train_vs_serve.py --plot chapter1-introduction-to-modern-distributed-ai/figures/roofline.svg

On GPUs:
    python chapter1-introduction-to-modern-distributed-ai/code/ch01_train_vs_serve.py --width 4096 --layers 16 --heads 32 --context 1024 --batch 4 --dtype bf16 --decode-batches 1 16 64

Look at the FLOPs per byte: prefill lies above the ridge point, and so does training with tokens
enough; decoding one lies far below. And at the tokens per second as more sequences decode
together. Section 1.5.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import nn


class CachedBlock(nn.Module):
    """The baseline's block; with a cache it sees the keys and values of earlier tokens too."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor, cache=None, past: int = 0) -> torch.Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv = qkv.permute(2, 0, 3, 1, 4)  # each [batch, heads, seq, head_dim]
        if cache is not None:  # [2, batch, heads, context, head_dim]
            now = past + x.shape[1]
            cache[..., past:now, :] = qkv[1:]
            k, v = cache[..., :now, :]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=past == 0)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class CachedLM(nn.Module):
    """The baseline's model; with caches it reads a prompt once and then one token after another."""

    def __init__(self, width: int, layers: int, heads: int, context: int):
        super().__init__()
        self.context = context
        self.embed, self.position = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(CachedBlock(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, tokens: torch.Tensor, caches=None, past: int = 0) -> torch.Tensor:
        """[batch, seq] -> [batch, seq, 256]; after `past` cached tokens, seq is 1."""
        x = self.embed(tokens) + self.position.weight[past : past + tokens.shape[1]]
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            x = block(x, cache, past)
        return self.head(self.norm(x))

    def empty_caches(self, batch: int) -> list[torch.Tensor]:
        """Per block, keys and values: [2, batch, heads, context, head_dim]."""
        weight, heads = self.position.weight, self.blocks[0].heads
        shape = (2, batch, heads, self.context, weight.shape[1] // heads)
        return [torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in self.blocks]


@dataclass
class Work:
    """One thing to time: what it computes and what it must move, at the least."""

    name: str
    run: Callable[[], object]
    flops: float = 0.0
    moved: float = 0.0  # bytes
    tokens: int = 0
    seconds: list[float] = field(default_factory=list)


def costs(args: argparse.Namespace, size: int) -> dict[str, float]:
    """FLOPs per token of a forward pass, and bytes: of the weights, of a sequence's KV cache, ...

    Training reads the weights forward and backward and writes the gradients; AdamW reads weights,
    gradients and both moments and writes all but the gradients: ten passes over the weights. What
    forward keeps for backward (section 1.4) is written and read once.
    """
    weights = args.layers * 12 * args.width**2 + 256 * args.width
    attention = args.layers * 2 * args.context * args.width
    kept = args.layers * 16 * args.width + 2 * args.width + 256  # elements per token
    return {
        "flops": 2 * (weights + attention),
        "weights": weights * size,
        "cache": args.layers * 2 * args.context * args.width * size,
        "training": 10 * weights * size + 2 * args.batch * args.context * kept * size,
    }


def works(args: argparse.Namespace, model: CachedLM) -> list[Work]:
    """Training, prefill of one prompt, and decoding one token for several sequences at once."""
    device = model.head.weight.device
    cost = costs(args, model.head.weight.element_size())
    flops, weights, cache = cost["flops"], cost["weights"], cost["cache"]
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)  # one pass, not a dozen
    # Any bytes will do: the time does not depend on what the text says.
    tokens, targets = torch.randint(256, (2, args.batch, args.context), device=device)
    prompt, prompt_caches = tokens[:1], model.empty_caches(1)

    def train() -> None:
        F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    def decode(batch: int) -> Callable[[], object]:
        caches = model.empty_caches(batch)
        newest = tokens[:1, -1:].repeat(batch, 1)
        return torch.no_grad()(lambda: model(newest, caches, args.context - 1))

    prefill = torch.no_grad()(lambda: model(prompt, prompt_caches))
    count = tokens.numel()
    found = [
        Work("training", train, 3 * count * flops, cost["training"], count),
        Work("prefill", prefill, args.context * flops, weights + cache, args.context),
    ]
    for n in args.decode_batches:
        found.append(Work(f"decode, {n}", decode(n), n * flops, weights + n * cache, n))
    return found


def ceilings(device: torch.device, dtype: torch.dtype) -> tuple[Work, list[Work]]:
    """A square matrix product for the peak; a copy and a dot product for the bandwidth."""
    # On a CPU the two tensors are together twice what the largest cache holds.
    edge, count = (1024, last_level_cache() // 4) if device.type == "cpu" else (8192, 2**28)
    a, b = (torch.randn(edge, edge, device=device, dtype=dtype) for _ in range(2))
    source, target = (torch.ones(count, device=device) for _ in range(2))
    return Work("matmul", lambda: a @ b, flops=2 * edge**3), [
        Work("copy", lambda: target.copy_(source), moved=2 * source.nbytes),  # read and written
        Work("dot", lambda: source @ target, moved=2 * source.nbytes),  # two reads
    ]


def last_level_cache() -> int:
    """Bytes of the CPU's largest cache as Linux lists it; 64 MiB where it does not."""
    sizes = [path.read_text() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("*/size")]
    return max((int(size.strip()[:-1]) * 1024 for size in sizes), default=2**26)


def time_in_turns(all_works: list[Work], device: torch.device, rounds: int) -> None:
    """Each work for 0.05 s or once, round after round, so that all meet the same machine."""
    for turn in range(rounds + 1):
        for work in all_works:
            start = now = time.perf_counter()
            while now == start or (turn and now < start + 0.05):  # round 0 warms up, once each
                before = now
                work.run()
                synchronize(device)
                now = time.perf_counter()
                if turn:
                    work.seconds.append(now - before)


@torch.no_grad()
def cache_error(model: CachedLM, tokens: torch.Tensor) -> float:
    """Largest difference of the last logits: prefill and one decode, or the whole window."""
    caches = model.empty_caches(len(tokens))
    model(tokens[:, :-1], caches)
    cached = model(tokens[:, -1:], caches, tokens.shape[1] - 1)[:, -1]
    return (cached - model(tokens)[:, -1]).abs().max().item()


def run(args: argparse.Namespace, device: torch.device) -> list[bool | None]:
    torch.manual_seed(args.seed)
    dtype = DTYPES[args.dtype]
    model = CachedLM(args.width, args.layers, args.heads, args.context).to(device, dtype)
    error = cache_error(model, torch.randint(256, (1, min(args.context, 32)), device=device))
    matmul, streams = ceilings(device, dtype)
    measured = works(args, model)
    time_in_turns([matmul, *streams, *measured], device, args.rounds)

    peak = matmul.flops / min(matmul.seconds)
    bandwidth = max(stream.moved / min(stream.seconds) for stream in streams)
    ridge = peak / bandwidth
    weights = costs(args, dtype.itemsize)["weights"]
    say(f"1 process on {device.type}: {weights / 2**20:,.0f} MiB of weights, {args.dtype}")
    say(f"peak             {peak / 1e9:,.0f} GFLOP/s, the fastest matrix product")
    say(f"bandwidth        {bandwidth / 1e9:,.1f} GB/s, the fastest copy or dot product")
    say(f"ridge point      {ridge:.1f} FLOPs per byte")
    if device.type == "cpu":
        say(f"largest cache    {last_level_cache() / 2**20:,.0f} MiB")
    say(f"\n{'':<11}{'tokens':>7}{'GFLOP':>9}{'MB moved':>10}{'FLOP/byte':>10}{'over ridge':>11}"
        f"{'predicted':>11}{'fastest':>9}{'median ms':>10}{'tokens/s':>10}")  # fmt: skip
    factors = {}
    for work in measured:
        predicted = max(work.flops / peak, work.moved / bandwidth)
        fastest, median = min(work.seconds), statistics.median(work.seconds)
        factors[work.name] = fastest / predicted
        intensity = work.flops / work.moved
        say(f"{work.name:<11}{work.tokens:7,}{work.flops / 1e9:9.2f}{work.moved / 1e6:10,.0f}"
            f"{intensity:10.1f}{intensity / ridge:11.2f}{predicted * 1e3:11.1f}"
            f"{fastest * 1e3:9.1f}{median * 1e3:10.1f}{work.tokens / median:10,.0f}")  # fmt: skip
    if args.plot:
        draw(measured, peak, bandwidth, args.plot)
    if args.json:
        result = {w.name: [w.flops, w.moved, w.seconds] for w in (matmul, *streams, *measured)}
        args.json.write_text(json.dumps(result, indent=1) + "\n")

    prefill, decode = measured[1:3]
    below, above = decode.flops / decode.moved, prefill.flops / prefill.moved
    per_token = [1e3 * min(work.seconds) / work.tokens for work in (prefill, decode)]
    middle = statistics.median(factors.values())
    strict = args.strict
    return [
        check("max |logits with KV cache - whole window|", error, TOLERANCE[args.dtype]),
        expect("FLOPs per byte of decoding one, and the ridge point", below, ridge, strict),
        expect("ridge point, and FLOPs per byte of prefill", ridge, above, strict),
        expect("ms per token of prefill, and of decoding one", *per_token, strict),
        expect("time of decoding one over its prediction", factors[decode.name], 1.5, strict),
        expect("time over its prediction, the median of all rows", middle, 3, strict),
    ]


def draw(measured: list[Work], peak: float, bandwidth: float, path: Path) -> None:
    """The roofline and what was reached under it, both axes logarithmic."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "ch01"
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes, ridge = figure.subplots(), peak / bandwidth
    intensities = [work.flops / work.moved for work in measured]
    corners = [min(intensities) / 2, ridge, 2 * max(*intensities, ridge)]
    axes.loglog(corners, [min(peak, x * bandwidth) / 1e9 for x in corners], color="0.4")
    for work, intensity in zip(measured, intensities, strict=True):
        reached = work.flops / min(work.seconds) / 1e9
        axes.plot(intensity, reached, "o", color=f"C{'pd'.find(work.name[0]) + 1}")
        axes.annotate(work.name, (intensity, reached), (6, -11), textcoords="offset points")
    axes.text(corners[2], peak / 1e9, "peak", ha="right", va="bottom", color="0.4")
    axes.text(ridge / 3, peak / 3e9, "memory bandwidth ", ha="right", va="bottom", color="0.4")
    axes.set_xlabel("FLOPs per byte")
    axes.set_ylabel("GFLOP/s")
    figure.savefig(path, format="svg", metadata={"Date": None})


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-4, "bf16": 0.1}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=1, help="windows per training step")
    parser.add_argument("--context", type=int, default=128, help="bytes per window and prompt")
    parser.add_argument("--width", type=int, default=1024, help="size of a token's vector")
    parser.add_argument("--layers", type=int, default=3, help="transformer blocks")
    parser.add_argument("--heads", type=int, default=16, help="attention heads; divides --width")
    parser.add_argument(
        "--decode-batches", type=int, nargs="+", default=[1, 4, 16, 64], metavar="N",
        help="sequences that decode one token together; the first is compared with the ridge point",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of all tensors")
    parser.add_argument("--rounds", type=int, default=2, help="each work: 0.05 s or once")
    parser.add_argument("--seed", type=int, default=0, help="for weights and tokens")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--plot", type=Path, help="draw the roofline into this SVG file")
    parser.add_argument("--json", type=Path, help="also write FLOPs, bytes, seconds to this file")
    parser.add_argument(
        "--strict", action="store_true", help="exit 1 if an `expect:` line does not hold"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    sys.exit(conclude(run(args, pick_device(args.device))))


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


# Copied from ch01_single_gpu_baseline.synchronize
def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


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
