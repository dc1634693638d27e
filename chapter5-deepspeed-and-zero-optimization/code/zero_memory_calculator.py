r"""Will it fit, and if not, what first? Memory of a device at each ZeRO stage, from a model's shape.

    python chapter5-deepspeed-and-zero-optimization/code/zero_memory_calculator.py \
        --plot chapter5-deepspeed-and-zero-optimization/figures/zero_memory.svg
    python chapter5-deepspeed-and-zero-optimization/code/zero_memory_calculator.py --parameters 13e9 --layers 40 --width 5120 --devices 16 --context 4096

The first table is one model, part by part, beside DeepSpeed's own estimators; the second says for
Llama 3.1 on 80 GB devices what to change first. No tensor of that size is made. Section 5.4.
"""

import argparse
import itertools
import math
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import torch
import torch.nn.functional as F
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from torch import nn

GB = 1e9
PER_NODE = 8  # devices that share a host
SUB_GROUP = 10**9  # DeepSpeed's default: ZeRO 3 updates so many numbers at a time
# Bytes per parameter on a device, GB for 7.5 billion (arXiv:1910.02054, table 1): stages 1, 2, 3.
PAPER = {
    1: (120, 120, 120),
    4: (52.5, 41.3, 30),
    16: (35.6, 21.6, 7.5),
    64: (31.4, 16.6, 1.88),
    256: (30.4, 15.4, 0.47),
    1024: (30.1, 15.1, 0.12),
}


@dataclass(frozen=True)
class Transformer:
    """Of Llama's kind; sizes in numbers."""

    parameters: int
    layers: int
    width: int
    kv_width: int  # of all key heads together
    hidden: int
    vocabulary: int

    @property
    def largest(self) -> int:
        """Parameters of the largest module, which ZeRO 3 gathers in one piece: embedding or matrix."""
        return self.width * max(self.vocabulary, self.hidden)


def llama(
    layers: int, width: int, kv_width: int, hidden: int, vocabulary: int = 128_256
) -> Transformer:
    """Embedding and head are two matrices; a layer has seven, and two norms (arXiv:2407.21783)."""
    layer = 2 * width**2 + 2 * width * kv_width + 3 * width * hidden + 2 * width
    parameters = 2 * vocabulary * width + layers * layer + width
    return Transformer(parameters, layers, width, kv_width, hidden, vocabulary)


MODELS = {
    "8B": llama(32, 4096, 1024, 14_336),
    "70B": llama(80, 8192, 1024, 28_672),
    "405B": llama(126, 16_384, 1024, 53_248),
}
# As the checkpoints' index files on Hugging Face have them: bytes in bf16, halved.
PUBLISHED = {"8B": 8_030_261_248, "70B": 70_553_706_496, "405B": 405_853_388_800}


@dataclass(frozen=True)
class Plan:
    """How a model is trained."""

    devices: int
    stage: int = 0
    recompute: bool = False  # keep a layer's input only (activation checkpointing)
    offload_optimizer: bool = False  # to the host; ZeRO 2 and 3
    offload_weights: bool = False  # ZeRO 3
    bf16: bool = True
    accumulate: int = 1  # micro batches in a step
    tokens: int = 8192  # in a micro batch of a device
    bucket: int = 5 * 10**8  # numbers; this and the next are DeepSpeed's defaults
    live: int = 10**9  # numbers that ZeRO 3 may have gathered

    @property
    def name(self) -> str:
        parts = [f"ZeRO {self.stage}"] if self.stage else []
        parts += ["recompute"] if self.recompute else []
        offload = "offload both" if self.offload_weights else "offload optimizer"
        parts += [offload] if self.offload_optimizer else []
        return " + ".join(parts) or "as it is"


def need(model: Transformer, plan: Plan) -> dict[str, float]:
    """Bytes on a device where backward is, part by part; and on its share of the host.

    DeepSpeed 0.19.8's parts, as train.py counts them, here without padding.
    """
    total = model.parameters
    part = total / plan.devices
    size = 2 if plan.bf16 else 4
    whole_gradients = plan.stage == 0 or (plan.stage == 1 and plan.accumulate > 1)
    weights = size * (part if plan.stage == 3 else total)
    gradients = size * (total if whole_gradients else part)
    # Two moments in fp32, and weights in fp32: from ZeRO 1 on also beside weights in fp32.
    state = (12 if plan.bf16 or plan.stage else 8) * (part if plan.stage else total)
    gathered = size * max(model.largest, min(total, plan.live)) if plan.stage == 3 else 0
    host = 0.0
    if plan.offload_optimizer:
        host += state + 4 * part  # gradients in fp32, which the update there reads
        state = 0
        host += size * part  # ZeRO 3: gradients; ZeRO 2: the new weights on their way back
        gradients = 0  # each goes there as soon as it is reduced
    if plan.offload_weights:
        host += weights
        weights = 0
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer state": state,
        "gathered weights": gathered,
        "bucket": size * plan.bucket if plan.stage else 0,
        "activations": activations(model, size, plan.tokens, plan.recompute),
        "host": host,
    }


def kept_of_layer(model: Transformer) -> int:
    """Numbers per token that a layer's backward wants, if attention and norms are fused kernels.

    Inputs of both norms and what comes out of them; q, k, v and attention's output; gate, up, silu and
    product. Dropout is off. Counted as in Korthikanti et al. 2022 (arXiv:2205.05198), section 4.
    """
    return 6 * model.width + 2 * model.kv_width + 4 * model.hidden


def activations(model: Transformer, size: int, tokens: int, recompute: bool) -> float:
    """Bytes: all layers, or their inputs and one whole layer; and logits, twice more in fp32."""
    layer = size * kept_of_layer(model)
    layers = size * model.width * model.layers + layer if recompute else layer * model.layers
    return tokens * (layers + (size + 8) * model.vocabulary)


def on_device(parts: dict[str, float]) -> float:
    return sum(parts.values()) - parts["host"]


def at_update(model: Transformer, plan: Plan, parts: dict[str, float]) -> float:
    """Bytes when the optimizer runs: activations are gone, gradients are there in fp32 too.

    So it is with DeepSpeed's fused Adam; PyTorch's AdamW needs temporaries of its own.
    """
    updated = model.parameters / (plan.devices if plan.stage else 1)
    if plan.stage == 3:
        updated = min(updated, SUB_GROUP)
    copy = 4 * updated if plan.bf16 and not plan.offload_optimizer else 0
    return parts["weights"] + parts["gradients"] + parts["optimizer state"] + copy


def peak(model: Transformer, plan: Plan) -> float:
    parts = need(model, plan)
    return max(on_device(parts), at_update(model, plan, parts) + parts["bucket"])


def estimate(model: Transformer, plan: Plan) -> float:
    """Bytes on a device by DeepSpeed's own estimators: bf16, without activations and buckets."""
    if plan.stage == 2:
        found = estimate_zero2_model_states_mem_needs(
            model.parameters, plan.devices, 1, plan.offload_optimizer
        )
    elif plan.stage == 3:
        found = estimate_zero3_model_states_mem_needs(
            model.parameters,
            model.largest,
            plan.devices,
            1,
            plan.offload_optimizer,
            plan.offload_weights,
        )
    else:
        return math.nan
    return found[1]


def remedies(plan: Plan) -> dict[str, Plan]:
    """For each part of memory what makes it smaller next; offload comes when nothing else is left."""
    found = {}
    sharded = plan.devices > 1
    if sharded and plan.stage < 1:
        found["optimizer state"] = replace(plan, stage=1)
    if sharded and plan.stage < 2:
        found["gradients"] = replace(plan, stage=2)
    if sharded and plan.stage < 3:
        found["weights"] = replace(plan, stage=3)
    if not plan.recompute:
        found["activations"] = replace(plan, recompute=True)
    if found:
        return found
    if not plan.offload_optimizer:
        return {"optimizer state": replace(plan, stage=max(plan.stage, 2), offload_optimizer=True)}
    if not plan.offload_weights:
        return {"weights": replace(plan, stage=3, offload_weights=True)}
    return {}


def what_first(model: Transformer, plan: Plan, capacity: float) -> list[Plan]:
    """Plans, each with one remedy more for the largest part that has one, until it fits."""
    plans = [plan]
    while peak(model, plans[-1]) > capacity:
        parts = need(model, plans[-1])
        choices = remedies(plans[-1])
        if not choices:
            break
        plans.append(choices[max(choices, key=lambda part: parts[part])])
    return plans


def print_parts(model: Transformer, plan: Plan, capacity: float) -> dict[str, dict[str, float]]:
    """The table of one model: what each stage keeps on a device, in GB."""
    plans = {f"ZeRO {stage}": replace(plan, stage=stage) for stage in range(4)}
    plans["2, offload"] = replace(plan, stage=2, offload_optimizer=True)
    plans["3, offload"] = replace(plan, stage=3, offload_optimizer=True, offload_weights=True)
    table = {name: need(model, of_name) for name, of_name in plans.items()}
    say(f"{'GB on a device':<28}" + "".join(f"{name:>12}" for name in plans))
    for part in next(iter(table.values())):
        label = "on its share of the host" if part == "host" else part
        say(f"{label:<28}" + "".join(f"{parts[part] / GB:>12.2f}" for parts in table.values()))
    rows = {
        "in backward": [on_device(parts) for parts in table.values()],
        "states at the update": [at_update(model, plans[n], table[n]) for n in plans],
    }
    if plan.bf16:
        rows["DeepSpeed's estimate of it"] = [estimate(model, p) for p in plans.values()]
    for label, values in rows.items():
        cells = "".join(f"{value / GB:>12.2f}" for value in values)
        say(f"{label:<28}" + cells.replace("nan", "  -"))
    fits = ["yes" if peak(model, p) <= capacity else "no" for p in plans.values()]
    say(f"{f'fits into {capacity / GB:.0f} GB':<28}" + "".join(f"{word:>12}" for word in fits))
    return table


def print_answers(plan: Plan, capacity: float) -> None:
    """The table of published models: what to change first, until it fits."""
    say("")
    heads = f"{'Llama':<6}{'devices':>8}{'ZeRO 0, GB':>12}{'largest part':>17}"
    say(f"{heads}  {'what fits':<40}{'GB':>4}{'host, GB':>10}")
    for name, model in MODELS.items():
        for devices in (1, 8, 64, 512):
            plans = what_first(model, replace(plan, devices=devices), capacity)
            first, last = plans[0], plans[-1]
            parts = need(model, first)
            largest = max(parts, key=lambda part: parts[part])
            found = peak(model, last)
            host = need(model, last)["host"] * min(devices, PER_NODE)
            heads = f"{name:<6}{devices:>8}{peak(model, first) / GB:>12.0f}{largest:>17}"
            answer = last.name if found <= capacity else "nothing: more devices"
            say(f"{heads}  {answer:<40}{found / GB:>4.0f}{host / GB:>10.0f}")


def saved_bytes(layers: int, args: argparse.Namespace) -> int:
    """What autograd keeps of chapter 3's model on this machine, counted storage by storage."""
    model = ByteLlama(128, layers, 4, 64)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    window = torch.randint(256, (2, 65), generator=torch.Generator().manual_seed(args.seed))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logits = model(window[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
    return sum(storage.nbytes() for at, storage in saved.items() if at not in weights)


def check_model(args: argparse.Namespace) -> list[bool | None]:
    """Hold the calculator against published numbers, DeepSpeed's estimators, and this machine."""
    counts = [abs(MODELS[name].parameters - right) for name, right in PUBLISHED.items()]
    of_paper = []
    model = Transformer(7_500_000_000, 1, 1, 1, 1, 1)
    for devices, row in PAPER.items():
        for stage, right in enumerate(row, 1):
            parts = need(model, Plan(devices, stage, accumulate=2))
            held = parts["weights"] + parts["gradients"] + parts["optimizer state"]
            of_paper.append(abs(held / GB / right - 1))
    of_estimator = []
    for model in MODELS.values():
        for devices, offload in itertools.product((8, 64, 512), (False, True)):
            plan = Plan(devices, stage=2, offload_optimizer=offload)
            ours = at_update(model, plan, need(model, plan))
            of_estimator.append(abs(ours / estimate(model, plan) - 1))
    # Per layer on a CPU: norms are not fused (2 widths more), v is a view of q, k and v together (2
    # more), attention's output is there in two orders (1 more).
    small = Transformer(0, 2, 128, 128, 344, 256)
    predicted = 2 * 64 * 4 * 2 * (kept_of_layer(small) + 5 * small.width)  # tokens, bytes, layers
    measured = saved_bytes(4, args) - saved_bytes(2, args)
    return [
        check("parameters of Llama 3.1, |formula - published|", max(counts), 0),
        check("error against the ZeRO paper's table 1", max(of_paper), 0.05),
        check("error against DeepSpeed's estimator of ZeRO 2", max(of_estimator), 0.05),
        check(
            "error of two layers' activations, counted here", abs(predicted / measured - 1), 0.05
        ),
    ]


def draw(table: dict[str, dict[str, float]], capacity: float, path: Path) -> None:
    """Parts of a device's memory at each stage; a line where it is full."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "ch05"
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    below = [0.0] * len(table)
    for part in next(iter(table.values())):
        if part != "host":
            heights = [parts[part] / GB for parts in table.values()]
            axes.bar(list(table), heights, 0.6, below, label=part)
            below = [low + high for low, high in zip(below, heights, strict=True)]
    axes.axhline(capacity / GB, color="black", lw=1)
    axes.set_ylabel("GB on a device")
    axes.legend(fontsize=8)
    figure.savefig(path, format="svg", metadata={"Date": None})


def chosen_model(args: argparse.Namespace) -> tuple[str, Transformer]:
    """A published shape, or one from three numbers: what attention leaves is feed-forward."""
    if not args.parameters:
        return f"Llama 3.1 {args.model}", MODELS[args.model]
    if not (args.layers and args.width):
        stop("--parameters wants the shape too: type --layers and --width")
    per_layer = (args.parameters - 2 * args.vocabulary * args.width) / args.layers
    hidden = round((per_layer - 4 * args.width**2) / (3 * args.width))
    if hidden < 1:
        stop(
            f"{args.layers} layers of width {args.width} and a vocabulary of {args.vocabulary} have "
            f"more than {args.parameters:.3g} parameters before any feed-forward"
        )
    sizes = (args.layers, args.width, args.width, hidden, args.vocabulary)
    return "the model", Transformer(int(args.parameters), *sizes)


def main() -> None:
    args = parse_args()
    name, model = chosen_model(args)
    capacity = args.memory * GB * (1 - args.headroom)
    tokens = args.micro_batch * args.context
    plan = Plan(
        args.devices,
        recompute=args.recompute,
        bf16=args.precision == "bf16",
        accumulate=args.accumulate,
        tokens=tokens,
        bucket=int(args.bucket),
        live=int(args.live),
    )
    say(
        f"{name}: {model.parameters / 1e9:.2f} billion parameters in {args.precision}, "
        f"{args.devices} devices, {tokens:,} tokens on each"
    )
    table = print_parts(model, plan, capacity)
    if args.plot:
        draw(table, capacity, args.plot)
    if not args.parameters:
        print_answers(plan, capacity)
    sys.exit(conclude(check_model(args)))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", choices=MODELS, default="8B", help="a Llama 3.1")
    add("--parameters", type=float, help="of a model of your own, as 13e9; with the next three")
    add("--layers", type=int, help="transformer blocks")
    add("--width", type=int, help="size of a token's vector")
    add("--vocabulary", type=int, default=32_000, help="tokens that there are")
    add("--devices", type=int, default=8, help="data-parallel ranks")
    add("--memory", type=float, default=80, help="of a device, GB")
    add("--headroom", type=float, default=0.1, help="share of it for CUDA, NCCL, fragmentation")
    add("--precision", choices=("bf16", "fp32"), default="bf16", help="of weights and activations")
    add("--micro-batch", type=int, default=1, help="sequences at a time on a device")
    add("--context", type=int, default=8192, help="tokens per sequence")
    add("--accumulate", type=int, default=1, help="micro batches in a step")
    add("--recompute", action="store_true", help="checkpoint activations at every layer")
    add("--bucket", type=float, default=5e8, help="reduce_bucket_size, numbers")
    add("--live", type=float, default=1e9, help="stage3_max_live_parameters, numbers")
    add("--plot", type=Path, help="draw the first table into this SVG file")
    add("--seed", type=int, default=0, help="for the tokens of the measurement")
    args = parser.parse_args()
    for flag in ("devices", "memory", "micro_batch", "context", "accumulate"):
        if getattr(args, flag) <= 0:
            stop(f"--{flag.replace('_', '-')} {getattr(args, flag)}: type a number above 0")
    if not 0 <= args.headroom < 1:
        stop(f"--headroom {args.headroom}: type a share, such as 0.1")
    return args


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


# Copied from train_ddp_torchrun.ByteLlama
class ByteLlama(nn.Module):
    """A small decoder-only transformer of Llama's shape (arXiv:2302.13971) whose tokens are bytes."""

    def __init__(self, width: int, layers: int, heads: int, context: int, dropout: float = 0.0):
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.blocks = nn.ModuleList(LlamaBlock(width, heads, dropout) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, 256, bias=False)
        pairs = width // heads // 2  # of a head's dimensions; each turns at its own speed
        angle = torch.outer(torch.arange(context), 10_000.0 ** -(torch.arange(pairs) / pairs))
        self.register_buffer("rotation", torch.stack([angle.cos(), angle.sin()]), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:  # [batch, seq] -> [batch, seq, 256]
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, self.rotation[:, : tokens.shape[1]])
        return self.head(self.norm(x))


# Copied from train_ddp_torchrun.LlamaBlock
class LlamaBlock(nn.Module):
    """Llama's: rotary attention, then SwiGLU, each behind an RMSNorm and added to what comes in."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        hidden = (8 * width // 3 + 7) // 8 * 8  # 16-bit matrix units want multiples of 8
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


# Copied from train_ddp_torchrun.rotate
def rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Turn each pair (x[i], x[i + d/2]) by its position's angle: RoPE (arXiv:2104.09864)."""
    cos, sin = rotation
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


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
