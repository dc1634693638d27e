"""Models, clusters, and training runs whose speed was published, with their sources.

parallelism_planner.py plans for the first two; with --published the runs judge what it predicts.
"""

import functools
import itertools
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

from planner_cost import Cluster, Job, Model, flops_per_token

# Peak, memory, HBM rate: data sheets of the A100 80 GB and H100 SXM; 10 % of the 80 GiB held back.
# matmul: best of a search over shapes (MAMF: ml-engineering, compute/accelerator).
# flash: FlashAttention-2 (arXiv 2307.08691), 73 and 63 % of the A100's peak; 335 TFLOP/s on H100.
# inside, ring bus bandwidth: 8 A100s 232 of 300 GB/s (nccl-tests #175), 8 H200s, whose NVLink is
# the H100's, 363 of 450 (ml-engineering, network). across: 25 and 50 GB/s, of which 91 % are reached (nccl-tests #100).
# alpha: Calculon, systems/a100_80g.json. H800, an H100 with less NVLink: DeepSeek-V3, 3.2.2.
A100 = Cluster(312e12, 271.2e12, 204e12, 2.039e12, 72 * 2**30, 232e9, 22.7e9, 8, 108, (256, 128))
H100 = Cluster(989e12, 794.5e12, 335e12, 3.35e12, 72 * 2**30, 363e9, 45.5e9, 8, 132, (256, 128))
H800 = replace(H100, inside=160e9, across=50e9)
CLUSTERS = {"a100": A100, "h100": H100, "h800": H800}
MODELS = {
    "llama3-8b": Model(32, 4096, 32, 8, 14336, 128_256),
    "llama3-70b": Model(80, 8192, 64, 8, 28672, 128_256),
    "llama3-405b": Model(126, 16384, 128, 8, 53248, 128_256),
    # DeepSeek-V3, section 4.2; head_dim is the mean of 192 for q and k and of 128 for v.
    "deepseek-v3": Model(61, 7168, 128, 128, 18432, 129_280, 160, projections=187_105_280,
                         experts=256, active=8, expert_ffn=2048, dense_layers=3, nodes_per_token=4),
    "tiny": Model(4, 128, 4, 4, 512, 256, head_dim=32, matrices=2),
}  # fmt: skip


@dataclass(frozen=True)
class Published:
    """A run whose speed is known."""

    name: str
    job: Job
    software: dict  # what its software left no choice of
    chosen: dict  # what its authors chose; what they do not say, the planner chooses
    tflops: float  # per second and GPU, as the authors count
    recomputed: bool = False  # they count recomputation too, and the masked half of attention


def gpt(heads: int, width: int, layers: int, vocab: int = 51200) -> Model:
    return Model(layers, width, heads, heads, 4 * width, vocab, width // heads, matrices=2)


def megatron(
    name: str, shape: tuple, t: int, p: int, gpus: int, batch: int, tflops: int
) -> Published:
    """A row of table 1 of Narayanan et al., 2021 (arXiv 2104.04473); `shape` as in gpt()."""
    job = Job(gpt(*shape), A100, gpus, batch, 2048, of_2021=True)
    software = {"context": 1, "zero": 0, "recompute": "full"}
    chosen = {"tensor": t, "pipeline": p}
    return Published(f"Megatron {name}", job, software, chosen, tflops, recomputed=True)


def llama(name: str, gpus: int, cp: int, batch: int, context: int, tflops: int) -> Published:
    """A row of table 4 of the Llama 3 paper (arXiv 2407.21783), its attention taken as causal."""
    job = Job(MODELS["llama3-405b"], H100, gpus, batch, context)
    chosen = {"tensor": 8, "pipeline": 16, "context": cp}
    return Published(f"Llama 3 {name}", job, {}, chosen, tflops)


PUBLISHED = [
    megatron("1.7B", (24, 2304, 24), 1, 1, 32, 512, 137),
    megatron("3.6B", (32, 3072, 30), 2, 1, 64, 512, 138),
    megatron("7.5B", (32, 4096, 36), 4, 1, 128, 512, 142),
    megatron("18.4B", (48, 6144, 40), 8, 1, 256, 1024, 135),
    megatron("39.1B", (64, 8192, 48), 8, 2, 512, 1536, 138),
    megatron("76.1B", (80, 10240, 60), 8, 4, 1024, 1792, 140),
    megatron("145.6B", (96, 12288, 80), 8, 8, 1536, 2304, 148),
    megatron("310.1B", (128, 16384, 96), 8, 16, 1920, 2160, 155),
    megatron("529.6B", (128, 20480, 105), 8, 35, 2520, 2520, 163),
    megatron("1008B", (160, 25600, 128), 8, 64, 3072, 3072, 163),
    # BLOOM (arXiv 2211.05100; bigscience, tr11-176B-ml.slurm; about 150 TFLOP/s by its authors'
    # notes): four cards of 100 Gbit/s a
    # node, and CUDA_LAUNCH_BLOCKING=1, which costs time that the planner does not know of.
    Published("BLOOM 176B", Job(gpt(112, 14336, 70, 250_880), replace(A100, across=0.91 * 6.25e9),
                                384, 2048, 2048, of_2021=True),
              {"context": 1, "zero": 1, "chunks": 1, "recompute": "full"},
              {"tensor": 4, "pipeline": 12, "micro_batch": 2}, 150, recomputed=True),
    llama("8K", 8192, 1, 2048, 8192, 430),
    llama("8K", 16384, 1, 2048, 8192, 400),
    llama("128K", 16384, 16, 128, 131072, 380),
    # DeepSeek-V3 (arXiv 2412.19437, 3.2 and 4.2); 385: arXiv 2505.09343, table 4. Products in FP8
    # (MAMF: 1402.6 TFLOP/s), on the 112 processors that communication leaves.
    Published("DeepSeek-V3", Job(MODELS["deepseek-v3"],
                                 replace(H800, matmul=1402.6e12 * 112 / 132, processors=112),
                                 2048, 15360, 4096),
              {"context": 1, "zero": 1}, {"tensor": 1, "pipeline": 16, "expert": 64,
                                          "recompute": "selective"}, 385),
]  # fmt: skip


def judge(search: Callable) -> list[tuple[str, float, float]]:
    """Predict the published runs, and rank what their authors chose among what they could have.

    Prints the table; returns what is to be checked: what was compared, its value, its bound.
    """
    say(f"1 process on cpu: {len(PUBLISHED)} published runs; no constant was fitted to them")
    say("published: MFU in %, as its authors count; the others: of model FLOPs, causal.")
    say("scaled: the error that is left after one factor, the median of the other systems'.")
    columns = ["GPUs", "published", "same", "predicted", "error", "scaled", "GiB", "rank", "of"]
    say(f"{'':<16}" + "".join(f"{x:>10}" for x in (*columns, "behind")) + "  best of all")
    rows = []
    ratios: dict[str, list[float]] = {}  # of predicted and published, by system
    for run in PUBLISHED:
        plans, _ = search(run.job, run.software | run.chosen)
        if plans:
            count = functools.partial(flops_per_token, run.job.model, run.job.context)
            mfu = run.tflops * 1e12 / run.job.cluster.peak
            same = mfu * count() / count(run.recomputed)
            system, ratio = run.name.split()[0], plans[0].mfu / same
            rows.append((run, plans[0], mfu, same, system, ratio))
            ratios.setdefault(system, []).append(ratio)
    errors = []
    scaled = []
    for run, plan, mfu, same, system, ratio in rows:
        others = itertools.chain(*(x for name, x in ratios.items() if name != system))
        errors.append(ratio - 1)
        scaled.append(ratio / statistics.median(others) - 1)
        every, _ = search(run.job, run.software)
        rank = 1 + sum(other.seconds < plan.seconds for other in every)
        texts = [f"{run.job.gpus:,}", *(f"{100 * x:.1f}" for x in (mfu, same, plan.mfu))]
        texts += [f"{errors[-1]:+.0%}", f"{scaled[-1]:+.0%}"]
        texts += [f"{sum(plan.memory.values()) / 2**30:.1f}", f"{rank:,}", f"{len(every):,}"]
        texts += [f"{plan.seconds / every[0].seconds - 1:.1%}"]
        say(f"{run.name:<16}" + "".join(f"{x:>10}" for x in texts) + f"  {every[0].layout}")
    off, left = (statistics.median(map(abs, x)) for x in (errors, scaled))
    return [
        ("published layouts that do not fit in memory", len(PUBLISHED) - len(rows), 0),
        ("median |error| of the predicted MFU", off, 0.25),
        ("median |error| after one factor from other systems", left, 0.15),
    ]


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


# Copied from ch01_single_gpu_baseline.say
def say(line: str) -> None:
    """Print on rank 0. A reader who has seen enough (`| head`) does not end the run."""
    if os.environ.get("RANK", "0") == "0":
        try:
            print(line, flush=True)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
