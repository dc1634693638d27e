"""Where the memory of a training step goes: predicted from the model's shape, then measured.

    python chapter1-introduction-to-modern-distributed-ai/code/ch01_memory_anatomy.py --plot chapter1-introduction-to-modern-distributed-ai/figures/memory_anatomy.svg

On GPUs:
    python chapter1-introduction-to-modern-distributed-ai/code/ch01_memory_anatomy.py --width 1024 --layers 12 --heads 16 --context 1024 --batch 32 --dtype bf16

Look at the activations: they grow with the batch, the other three parts do not.
Checkpointing gives most of them back, for about one more forward pass of time. Section 1.4.
"""

import argparse
import json
import os
import sys
import time
import weakref
from pathlib import Path
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint


def training_loss(
    model: nn.Module, tokens: torch.Tensor, targets: torch.Tensor, checkpointing: bool
) -> torch.Tensor:
    """ByteLM's loss; checkpointed, each block keeps its input only and runs again in backward."""
    x = model.embed(tokens) + model.position.weight[: tokens.shape[1]]
    for block in model.blocks:
        x = checkpoint(block, x, use_reentrant=False) if checkpointing else block(x)
    return F.cross_entropy(model.head(model.norm(x)).flatten(0, 1), targets.flatten())


def kept_by_block(width: int, heads: int, size: int) -> dict[str, int]:
    """Bytes per token that a block keeps for backward; `size` is the bytes of an element."""
    # A sum keeps nothing. Fused attention makes its [seq, seq] matrix again in backward
    # (FlashAttention, Dao et al., 2022, section 3.1).
    return {
        "inputs of norm1 and norm2": 2 * width * size,
        "their means and 1/deviations": 4 * size,
        "inputs of qkv, out and up": 3 * width * size,
        "q, k, v: views of one tensor": 3 * width * size,
        "log-sum-exp of each head, fp32": heads * 4,
        "inputs of gelu and down": 8 * width * size,
    }


def predict(args: argparse.Namespace, size: int) -> dict[str, int]:
    """Bytes of every part of the step, from the configuration alone.

    The peaks are rougher: what forward kept and the gradients in flight, either at the loss (two of
    [tokens, 256]) or at the last block (of its output and `down`'s input), which may be made again.
    """
    width, tokens = args.width, args.batch * args.context
    # Per block: qkv, out, up and down with biases, two norms; then embeddings, norm and head.
    parameters = args.layers * (12 * width**2 + 13 * width)
    parameters += (256 + args.context) * width + 2 * width + 256 * width + 256
    tensors = 12 * args.layers + 6  # weights and biases; AdamW counts the steps of each in fp32
    block = sum(kept_by_block(width, args.heads, size).values())
    outside = (2 * width + 2 + 256) * size  # inputs of norm and head, statistics, log-softmax
    plain, inputs = args.layers * block, args.layers * width * size
    at_loss, at_block = outside + 2 * 256 * size, 5 * width * size
    again = block - width * size  # the block's input is kept already
    return {
        "parameters": parameters * size,
        "gradients": parameters * size,
        "optimizer state": 2 * parameters * size + 4 * tensors,
        "activations": tokens * (plain + outside),
        "checkpointed": tokens * (inputs + outside),
        "peak": tokens * (plain + max(at_loss, at_block)),
        "peak, checkpointed": tokens * (inputs + max(at_loss, at_block + again)),
    }


def address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors made under it that are still alive, and the most there ever were."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {address(t) for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
        for tensor in tree_leaves(result):
            if torch.is_tensor(tensor) and address(tensor) not in given | self.alive.keys():
                storage = tensor.untyped_storage()
                self.alive[address(tensor)] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, address(tensor))
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


def live_bytes(
    model: nn.Module, batch: tuple[torch.Tensor, ...], checkpointing: bool
) -> tuple[int, int]:
    """Bytes that a forward pass leaves alive, and the peak of forward and backward."""
    training_loss(model, *batch, checkpointing).backward()  # libraries keep what they allocate here
    model.zero_grad()
    with LiveBytes() as live:
        loss = training_loss(model, *batch, checkpointing)
        after_forward = sum(live.alive.values())
        loss.backward()
    return after_forward, live.peak


def seconds_of_pass(
    model: nn.Module, batch: tuple[torch.Tensor, ...], checkpointing: bool
) -> float:
    """Seconds of forward and backward."""
    start = time.perf_counter()
    training_loss(model, *batch, checkpointing).backward()
    synchronize(batch[0].device)
    return time.perf_counter() - start


def run(args: argparse.Namespace, device: torch.device) -> list[bool | None]:
    torch.manual_seed(args.seed)
    dtype = DTYPES[args.dtype]
    model = ByteLM(args.width, args.layers, args.heads, args.context).to(device, dtype)
    # Any bytes will do: neither memory nor time depends on what the text says.
    batch = torch.randint(256, (2, args.batch, args.context), device=device).unbind()

    predicted = predict(args, dtype.itemsize)
    measured = {}
    measured["activations"], measured["peak"] = live_bytes(model, batch, False)
    gradients = [p.grad.clone() for p in model.parameters()]
    measured["checkpointed"], measured["peak, checkpointed"] = live_bytes(model, batch, True)
    pairs = zip(gradients, (p.grad for p in model.parameters()), strict=True)
    difference = max(((a - b).abs().max() / a.abs().max()).item() for a, b in pairs)
    plain, again = [], []
    for _ in range(PAIRS):
        plain.append(seconds_of_pass(model, batch, checkpointing=False))
        again.append(seconds_of_pass(model, batch, checkpointing=True))
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    states = optimizer.state.values()
    measured["parameters"] = sum(p.nbytes for p in model.parameters())
    measured["gradients"] = sum(p.grad.nbytes for p in model.parameters())
    measured["optimizer state"] = sum(t.nbytes for state in states for t in state.values())

    count = sum(p.numel() for p in model.parameters())
    tokens = args.batch * args.context
    say(f"1 process on {device.type}: {count:,} parameters, {args.dtype}, {tokens:,} tokens")
    say(f"{'part':<19}{'predicted MiB':>14}{'measured MiB':>14}{'error':>8}")
    errors = {part: measured[part] / predicted[part] - 1 for part in predicted}
    for part, error in errors.items():
        sizes = f"{predicted[part] / 2**20:14.2f}{measured[part] / 2**20:14.2f}"
        say(f"{part:<19}{sizes}{error:8.2%}")
    kept = kept_by_block(args.width, args.heads, dtype.itemsize)
    say("\nWhat one block keeps for backward, bytes per token")
    for tensor, size in [*kept.items(), ("sum", sum(kept.values()))]:
        say(f"{tensor:<36}{size:>7,}")

    blocks = args.layers * (12 * args.width**2 + 2 * args.context * args.width)
    expected = 1 + blocks / (blocks + 256 * args.width) / 3  # forward is a third of a step
    low, median, high = quartiles([b / a for a, b in zip(plain, again, strict=True)])
    spread = f"median {median:.2f} [{low:.2f} .. {high:.2f}], {PAIRS} pairs"
    say("\ntime with checkpointing, as a multiple of the plain forward and backward:")
    say(f"  fastest {min(again) / min(plain):.2f}, predicted {expected:.2f}; {spread}")
    state = sum(measured[part] for part in STATE) / count
    say(f"state of this model     {state:.2f} bytes per parameter")
    llama = 8_030_261_248 / 2**30  # parameters: ch01_compute_budget.py
    say(f"Llama 3 8B              {2 * llama:.0f} GiB of bf16 weights, state {16 * llama:.0f} GiB")
    if device.type != "cpu":
        allocated = torch.accelerator.max_memory_allocated() / 2**20
        say(f"allocator's peak        {allocated:,.0f} MiB, of all that this run did")
    if args.plot:
        draw(measured, args.plot)
    if args.json:
        result = {"predicted": predicted, "measured": measured}
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    worst = max(abs(errors[part]) for part in (*STATE, "activations", "checkpointed"))
    bound = 1e-5 if args.dtype == "fp32" else 2e-2
    peaks = measured["peak, checkpointed"] / 2**20, measured["peak"] / 2**20
    return [
        check("worst error of the first five parts", worst, 0.05),
        check("max relative |gradient - checkpointed|", difference, bound),
        check("MiB at the peak, checkpointed and plain", *peaks),
    ]


def draw(measured: dict[str, int], path: Path) -> None:
    """Stacked bars of the four parts, without and with checkpointing; the same file every time."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "ch01"
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes, bottoms = figure.subplots(), [0.0, 0.0]
    for part in (*STATE, "activations"):
        other = "checkpointed" if part == "activations" else part
        heights = [measured[part] / 2**20, measured[other] / 2**20]
        axes.bar(["plain", "checkpointed"], heights, 0.5, bottoms, label=part)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    axes.set_ylabel("MiB after forward")
    axes.legend()
    figure.savefig(path, format="svg", metadata={"Date": None})


PAIRS = 4  # of passes, without and with checkpointing
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STATE = ("parameters", "gradients", "optimizer state")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=16, help="windows of text per step")
    parser.add_argument("--context", type=int, default=128, help="bytes per window")
    parser.add_argument("--width", type=int, default=128, help="size of a token's vector")
    parser.add_argument("--layers", type=int, default=4, help="transformer blocks")
    parser.add_argument("--heads", type=int, default=4, help="attention heads; divides --width")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of all tensors")
    parser.add_argument("--seed", type=int, default=0, help="for weights and the batch")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--plot", type=Path, help="draw the parts into this SVG file")
    parser.add_argument("--json", type=Path, help="also write all bytes to this file")
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


# Copied from ch01_single_gpu_baseline.quartiles
def quartiles(values: list[float]) -> list[float]:
    """First quartile, median and third quartile."""
    return torch.tensor(values).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()


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
