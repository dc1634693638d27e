"""What it takes to train a published model: from its shape, beside what its authors reported.

    python chapter1-introduction-to-modern-distributed-ai/code/ch01_compute_budget.py
    python chapter1-introduction-to-modern-distributed-ai/code/ch01_compute_budget.py --params 13e9 --tokens 2e12 --device-tflops 989 --mfu 0.4 --devices 64

Look at the years on one device, then at the devices that are needed before the first step.
The MFU implied by the reported hours is lower than the MFU in the papers. Section 1.1.
"""

import argparse
import math
import os
import sys
from dataclasses import dataclass
from typing import NoReturn


@dataclass(frozen=True)
class LatentAttention:  # q, k and v come from low-rank products (DeepSeek-V2, section 2.1)
    q_rank: int
    kv_rank: int
    rope_dim: int  # part of a query's and a key's head that carries the position


@dataclass(frozen=True)
class Experts:
    routed: int
    shared: int
    active: int  # routed experts per token
    ffn: int  # inner width of one expert
    dense_layers: int  # first layers that have one FFN and no experts


@dataclass(frozen=True)
class Model:
    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    context: int  # of the main stage of pre-training
    tokens: float
    device: str
    peak: float  # dense FLOP/s in 16 bit, from NVIDIA's data sheets
    reported_params: float
    gpt: bool = False  # GPT-2's block: biases, two FFN matrices, learned positions, tied embedding
    latent: LatentAttention | None = None
    experts: Experts | None = None
    reported_active: float | None = None
    reported_flops: float | None = None
    flops_with_attention: bool = False  # how the authors counted
    reported_hours: float | None = None
    reported_mfu: str = "-"


H100 = 989.4e12  # H100 SXM and H800 alike; with FP8 twice that
HERD = {"kv_heads": 8, "head_dim": 128, "vocab": 128_256, "context": 8192, "device": "H100"}
MODELS = [
    # Brown et al., 2020 (arXiv 2005.14165): table 2.1 for the shape, table D.1 for the rest.
    Model("GPT-3 175B", 96, 12288, 96, 96, 128, 4 * 12288, 50257, 2048, 300e9, "V100", 125e12,
          174.6e9, gpt=True, reported_flops=3.14e23),
    # The Llama 3 Herd of Models (arXiv 2407.21783): table 3 for the shapes, section 1 for 15.6T
    # tokens and 3.8e25 FLOPs, table 4 for the MFU. Hours, and 15T+ tokens: Llama 3.1 model card.
    Model("Llama 3.1 8B", 32, 4096, 32, ffn=14336, tokens=15e12, peak=H100, reported_params=8e9,
          reported_hours=1.46e6, **HERD),
    Model("Llama 3.1 70B", 80, 8192, 64, ffn=28672, tokens=15e12, peak=H100, reported_params=70e9,
          reported_hours=7.0e6, **HERD),
    Model("Llama 3.1 405B", 126, 16384, 128, ffn=53248, tokens=15.6e12, peak=H100,
          reported_params=405e9, reported_flops=3.8e25, reported_hours=30.84e6,
          reported_mfu="38-43%", **HERD),
    # DeepSeek-V3 (arXiv 2412.19437): section 4.2 for the shape, table 1 for the hours of
    # pre-training. 250 GFLOP per token and the MFU (causal, of the bf16 peak): Insights into
    # DeepSeek-V3 (arXiv 2505.09343), tables 2 and 4.
    Model("DeepSeek-V3", 61, 7168, 128, 128, 128, 18432, 129_280, 4096, 14.8e12, "H800", H100,
          671e9, latent=LatentAttention(1536, 512, 64), experts=Experts(256, 1, 8, 2048, 3),
          reported_active=37e9, reported_flops=250e9 * 14.8e12, flops_with_attention=True,
          reported_hours=2.664e6, reported_mfu="39%"),
]  # fmt: skip


def attention_params(m: Model) -> int:
    """Weights of q, k, v and out in one layer."""
    inner = m.heads * m.head_dim
    if m.latent is None:
        biases = 2 * inner + 2 * m.kv_heads * m.head_dim if m.gpt else 0
        return 2 * m.width * (inner + m.kv_heads * m.head_dim) + biases
    low = m.latent
    queries = m.width * low.q_rank + low.q_rank * m.heads * (m.head_dim + low.rope_dim)
    keys_values = m.width * (low.kv_rank + low.rope_dim) + low.kv_rank * 2 * inner
    return queries + keys_values + inner * m.width + low.q_rank + low.kv_rank  # two inner norms


def parameters(m: Model, per_token: bool = False) -> int:
    """All, embeddings included; or those that work on one token: of the routed experts, its own."""
    per_layer = attention_params(m) + (4 if m.gpt else 2) * m.width  # norms: weight, GPT also bias
    if m.gpt:
        ffn = m.layers * (2 * m.width * m.ffn + m.ffn + m.width)
        outside = (m.vocab + m.context) * m.width + 2 * m.width  # the head is the embedding
    else:
        ffn = m.layers * 3 * m.width * m.ffn
        outside = 2 * m.vocab * m.width + m.width
    if m.experts:
        e = m.experts
        router = e.routed * m.width + e.routed  # a score and a balancing bias per expert
        working = e.shared + (e.active if per_token else e.routed)
        one_layer = working * 3 * m.width * e.ffn + router
        ffn = e.dense_layers * 3 * m.width * m.ffn + (m.layers - e.dense_layers) * one_layer
    return m.layers * per_layer + ffn + outside


def flops_6nd(m: Model) -> float:
    """6 FLOPs per parameter and token: 2 forward, 4 backward (Kaplan et al., 2020, section 2.1)."""
    return 6.0 * parameters(m, per_token=True) * m.tokens


def attention_flops(m: Model) -> float:
    """Queries times keys and scores times values, forward and backward, causal: half the square."""
    both = m.heads * (2 * m.head_dim + (m.latent.rope_dim if m.latent else 0))
    return 3 * 2 * m.layers * both * m.context / 2 * m.tokens


def flops_with_attention(m: Model) -> float:
    """The products alone: an embedding is a look-up, unless it is the head's matrix as well."""
    lookup = m.context * m.width if m.gpt else m.vocab * m.width
    return 6.0 * (parameters(m, per_token=True) - lookup) * m.tokens + attention_flops(m)


def device_hours(flops: float, peak: float, mfu: float) -> float:
    return flops / (peak * mfu) / 3600


def published(mfu: float) -> list[bool | None]:
    """The published models: computed beside reported."""
    say(f"1 process on cpu: {len(MODELS)} published models, by arithmetic alone")
    say(f"{'parameters':<16}{'computed':>12}{'reported':>12}{'error':>8}")
    worst = 0.0
    for m in MODELS:
        rows = [(m.name, parameters(m), m.reported_params)]
        if m.reported_active:
            rows.append(("  per token", parameters(m, per_token=True), m.reported_active))
        for name, computed, reported in rows:
            error = computed / reported - 1
            worst = max(worst, abs(error))
            say(f"{name:<16}{computed / 1e9:10.2f} B{reported / 1e9:10.2f} B{error:+8.1%}")
    say(f"\n{'training FLOPs':<16}{'6ND':>12}{'+ attention':>12}{'reported':>12}{'6ND off':>9}")
    for m in MODELS:
        line = f"{m.name:<16}{flops_6nd(m):12.2e}{attention_flops(m) / flops_6nd(m):+12.1%}"
        if m.reported_flops:
            line += f"{m.reported_flops:12.2e}{flops_6nd(m) / m.reported_flops - 1:+9.1%}"
        say(line)
    say(f"\n{'device-hours':<16}{'device':>7}{f'at {mfu:.0%} MFU':>12}{'reported':>12}{'implied MFU':>13}"
          f"{'+ attention':>13}{'paper':>8}")  # fmt: skip
    for m in MODELS:
        line = f"{m.name:<16}{m.device:>7}{device_hours(flops_6nd(m), m.peak, mfu) / 1e6:10.2f} M"
        if m.reported_hours:
            line += f"{m.reported_hours / 1e6:10.2f} M"
            for flops in (flops_6nd(m), flops_with_attention(m)):
                line += f"{device_hours(flops, m.peak, 1.0) / m.reported_hours:13.1%}"
            line += f"{m.reported_mfu:>8}"
        say(line)
    say(f"\n{'memory, time':<16}{'bf16 weights':>14}{'state, 16 B':>14}{'state, 18 B':>14}"
          f"{'80 GB devices':>15}{'years on one':>14}")  # fmt: skip
    for m in MODELS:
        sizes = [f"{parameters(m) * size / 2**30:10,.0f} GiB" for size in (2, 16, 18)]
        years = device_hours(flops_6nd(m), m.peak, mfu) / (365.25 * 24)
        devices = math.ceil(parameters(m) * 16 / 80e9)
        say(f"{m.name:<16}{''.join(sizes)}{devices:15,}{years:14,.0f}")
    say(NOTES)
    counted = check("worst error of the parameter counts", worst, 0.02)
    return [counted, *(check_flops(m) for m in MODELS if m.reported_flops)]


def own(args: argparse.Namespace) -> list[bool | None]:
    """Days and memory of the reader's model, and the same arithmetic where the answer is known."""
    flops = 6 * args.params * args.tokens
    hours = device_hours(flops, args.device_tflops * 1e12, args.mfu)
    gib = args.params * 16 / 2**30
    say("1 process on cpu: your model, by arithmetic alone, if nothing fails")
    say(f"your model       {args.params:.3g} parameters, {args.tokens:.3g} tokens")
    say(f"FLOPs            {flops:.2e}")
    say(f"device-hours     {hours:,.0f} at {args.mfu:.0%} of {args.device_tflops:g} TFLOP/s")
    say(f"time             {hours / 24 / args.devices:,.1f} days on {args.devices:,} devices")
    say(f"state            {gib:,.0f} GiB at 16 bytes, {gib / args.devices:,.1f} GiB per device")
    say(f"fewest devices   {math.ceil(args.params * 16 / 80e9):,} of 80 GB, for the state alone")
    return [check_flops(MODELS[0])]


def check_flops(m: Model) -> bool:
    """The FLOPs, counted as the authors did, against the FLOPs that they report."""
    way = "6ND and attention" if m.flops_with_attention else "6ND"
    flops = flops_with_attention(m) if m.flops_with_attention else flops_6nd(m)
    return check(f"error of {way} for {m.name}", abs(flops / m.reported_flops - 1), 0.02)


NOTES = """\
state: 16 bytes per parameter in mixed precision (ZeRO, section 3.1), 18 with gradients in fp32.
The devices hold the state at 16 bytes and nothing else.
6ND leaves attention out; OpenAI and Meta counted so, DeepSeek counted attention too.
Implied MFU: 6ND over the reported hours. A paper's MFU is that of a step that goes well;
hours also count what else the devices did. 15T+ tokens are 15T here: that lowers it too.
DeepSeek-V3 multiplies mostly in FP8; its MFU, here and in the paper, is of the 16-bit peak.
"""


def run(args: argparse.Namespace) -> list[bool | None]:
    return published(args.mfu) if args.params is None else own(args)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--params", type=float, help="parameters of your model, such as 13e9")
    parser.add_argument("--tokens", type=float, help="tokens to train it on, such as 2e12")
    parser.add_argument("--device-tflops", type=float, default=989.4, help="its peak, TFLOP/s")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the peak, 0 to 1")
    parser.add_argument("--devices", type=int, default=64, help="devices that train it")
    args = parser.parse_args()
    if (args.params is None) != (args.tokens is None):
        stop("a budget needs both: type  --params 13e9 --tokens 2e12")
    if args.mfu > 1:
        stop(f"--mfu {args.mfu:g}: give a share of the peak, such as 0.4")
    return args


def main() -> None:
    sys.exit(conclude(run(parse_args())))


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


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
