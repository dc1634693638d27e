"""The cost model of the planner: a layout's bytes per GPU and its seconds per step.

parallelism_planner.py runs it. Layers, collectives and memory are added up; nothing is simulated.
"""

import functools
import itertools
import math
from dataclasses import astuple, dataclass, replace


@dataclass(frozen=True, eq=False)  # eq=False: a quick key for the caches
class Model:
    """A decoder without its norms and biases, which are under 0.1 % of the weights."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    head_dim: int = 128
    matrices: int = 3  # in an FFN: 3 where it is gated, 2 in GPT
    projections: int = 0  # weights of q, k, v and out in a layer, where they are of low rank
    experts: int = 0  # routed, in every layer after the dense ones, beside a shared one
    active: int = 0  # of them, per token
    expert_ffn: int = 0
    dense_layers: int = 0
    nodes_per_token: int = 99  # that a token's experts are on (DeepSeek-V3, section 2.1.2)


@dataclass(frozen=True)
class Cluster:
    """What one GPU reaches: FLOP/s, and bytes/s in each direction."""

    peak: float  # of the data sheet: what MFU is a share of
    matmul: float
    flash: float  # fused attention, forward and backward
    memory_rate: float
    memory: float  # bytes that a job may fill
    inside: float  # to the other GPUs of the node
    across: float  # to other nodes
    node: int = 8  # GPUs
    processors: int = 1  # that compute the tiles of a matrix product
    tile: tuple[int, int] = (1, 1)
    alpha: tuple[float, float] = (1e-5, 2e-5)  # s per collective, inside and across
    item: int = 2  # bytes of a number


@dataclass(frozen=True, eq=False)
class Job:
    model: Model
    cluster: Cluster
    gpus: int
    batch: int  # sequences per step
    context: int  # tokens per sequence
    of_2021: bool = False  # no flash attention or sequence parallelism, gradients not overlapped


@dataclass(frozen=True)
class Layout:
    """One way to spread a job; the ranks are numbered in the order of the first five fields."""

    tensor: int = 1
    context: int = 1
    expert: int = 1  # a part of data
    pipeline: int = 1
    data: int = 1
    zero: int = 0  # ZeRO stage
    micro_batch: int = 1  # sequences
    chunks: int = 1  # per stage, in the interleaved schedule
    recompute: str = "none"

    def __str__(self) -> str:
        names = ("TP", "CP", "EP", "PP", "DP", "ZeRO", "b", "v")
        values = zip(names, astuple(self)[:8], strict=True)
        shown = [f"{name} {value}" for name, value in values if value > 1 or name in ("DP", "b")]
        return " ".join(shown + [self.recompute] * (self.recompute != "none"))


def layer_weights(m: Model, layer: int) -> tuple[int, int]:
    """Weights of a layer: those that each copy of it has, and those of its routed experts."""
    attention = m.projections or 2 * m.width * (m.heads + m.kv_heads) * m.head_dim
    if layer < m.dense_layers or not m.experts:
        return attention + m.matrices * m.width * m.ffn, 0
    expert = m.matrices * m.width * m.expert_ffn
    return attention + m.experts * m.width + expert, m.experts * expert


@functools.cache
def stage_layers(layers: int, stages: int) -> list[range]:
    """Layers of each stage. Those that do not divide go to the middle: the ends have the tables.

    Llama 3 405B has its 126 on 16 stages so (arXiv 2407.21783, 3.3.2), BLOOM its 70 on 12.
    """
    middle_first = sorted(range(stages), key=lambda i: abs(2 * i - stages + 1))
    counts = [layers // stages + (middle_first.index(i) < layers % stages) for i in range(stages)]
    ends = itertools.accumulate(counts)
    return [range(end - n, end) for n, end in zip(counts, ends, strict=True)]


@functools.cache
def stage_weights(m: Model, stages: int, stage: int) -> tuple[int, int]:
    """As layer_weights; the first stage has the embedding too, the last the head."""
    layers = [layer_weights(m, layer) for layer in stage_layers(m.layers, stages)[stage]]
    tables = m.vocab * m.width * ((stage == 0) + (stage == stages - 1))
    return sum(w for w, _ in layers) + tables, sum(e for _, e in layers)


def activation_bytes(job: Job, recompute: str) -> float:
    """Bytes that a layer keeps per token until its backward, over all TP ranks.

    Korthikanti et al., 2022 (arXiv 2205.05198), equation 1, less the masks of the dropout after a
    product: 32 h for GPT, and 5 a s where attention is not fused. "selective" makes anew what norms and activation function gave,
    unfused attention (their section 5), q, k and v of low rank (DeepSeek-V3, 3.2.3); "full" all.
    """
    m, item = job.model, job.cluster.item
    inner, kv = m.heads * m.head_dim, m.kv_heads * m.head_dim
    ffn = (1 + m.active) * m.expert_ffn if m.experts else m.ffn
    kept = item * (2 * m.width + 2 * inner + 2 * kv + (m.matrices - 1) * ffn)
    if recompute == "full":
        return item * m.width
    if recompute == "selective":
        return kept - item * (inner + 2 * kv) * (m.projections > 0)
    return kept + item * (2 * m.width + ffn) + 2.5 * item * m.heads * job.context * job.of_2021


def memory_per_device(job: Job, lay: Layout, stage: int) -> dict[str, float]:
    """Bytes on a GPU of a stage: 16 per parameter, and what 1F1B keeps of micro-batches in flight.

    ZeRO (arXiv 1910.02054) divides among the copies: Adam's state (stage 1), gradients (2), weights
    (3). In flight: p - stage, interleaved (p-1)/v more (Korthikanti et al., section 4.2.3).
    """
    m, item, p = job.model, job.cluster.item, lay.pipeline
    shared, routed = (w / lay.tensor for w in stage_weights(m, p, stage))
    held = {}
    for kind, size, zero in ("weights", item, 3), ("grads", item, 2), ("Adam", 16 - 2 * item, 1):
        parts = lay.data * lay.context if lay.zero >= zero else 1
        held[kind] = size * (shared / parts + routed / max(lay.expert, parts))
    if lay.zero == 3:  # one layer is whole, with its gradients, while the next one arrives
        whole, experts = layer_weights(m, m.layers - 1)
        held["weights"] += 3 * item * (whole + experts / lay.expert) / lay.tensor
    micro_batches = job.batch // (lay.data * lay.micro_batch)
    flying = min(micro_batches, p - stage + (lay.chunks > 1) * (p - 1) / lay.chunks)
    layers = flying * len(stage_layers(m.layers, p)[stage])
    whole = lay.tensor if job.of_2021 and lay.recompute == "full" else 1  # inputs are not divided
    per_token = layers * activation_bytes(job, lay.recompute) * whole
    per_token += activation_bytes(job, "none") * (lay.recompute != "none")  # of the layer at work
    per_token += (item + 4) * m.vocab * (stage == p - 1)  # logits, and their softmax in float32
    held["kept"] = per_token * lay.micro_batch * job.context / lay.context / lay.tensor
    return held


def product_seconds(c: Cluster, m: int, n: int, k: int) -> float:
    """[m, k] x [k, n]: whole waves of whole tiles, or the bytes, whichever takes longer.

    A wave that is not full costs as much as one that is (NVIDIA, Matrix Multiplication Background).
    """
    waves = math.ceil(math.ceil(m / c.tile[0]) * math.ceil(n / c.tile[1]) / c.processors)
    flops = 2 * waves * c.processors * c.tile[0] * c.tile[1] * k
    return max(flops / c.matmul, c.item * (m * k + k * n + m * n) / c.memory_rate)


def linear_seconds(c: Cluster, tokens: float, inputs: float, outputs: float) -> tuple[float, float]:
    """Forward, and the two products of backward."""
    t, i, o = math.ceil(tokens), math.ceil(inputs), math.ceil(outputs)
    return product_seconds(c, t, o, i), product_seconds(c, t, i, o) + product_seconds(c, i, o, t)


def in_a_node(c: Cluster, size: int, stride: int) -> bool:
    """Whether groups of `size` ranks `stride` apart stay within nodes."""
    return c.node % (stride * size) == 0


def collective_seconds(c: Cluster, size: int, stride: int, count: float) -> float:
    """All-gather, reduce-scatter or all-to-all of `count` bytes S: alpha + (n-1)/n S / bandwidth.

    A group that leaves the node goes over the network cards of all its ranks in it.
    """
    bandwidth, alpha = c.inside, c.alpha[0]
    if not in_a_node(c, size, stride):
        bandwidth, alpha = min(c.inside, max(1, c.node // stride) * c.across), c.alpha[1]
    return (alpha + (size - 1) / size * count / bandwidth) * (size > 1)


def hop_seconds(c: Cluster, size: int, stride: int, count: float) -> float:
    """From each rank to the next; the slowest hop sets the pace, and leaves a node by one card."""
    if in_a_node(c, size, stride):
        return c.alpha[0] + count / c.inside
    return c.alpha[1] + count / c.across


def attention_seconds(job: Job, t: int, tokens: float) -> tuple[float, float]:
    """Scores and weighted sums, 4 s d FLOPs per head and token; forward, backward.

    Flash attention skips the masked half; its backward has five products for forward's two. In 2021
    the square was whole, and scores, softmax and dropout went through memory (13 bytes an element).
    """
    m, c = job.model, job.cluster
    elements = m.heads * job.context * tokens / t
    if not job.of_2021:
        return 2 * elements * m.head_dim / c.flash, 5 * elements * m.head_dim / c.flash
    seconds = 4 * elements * m.head_dim / c.matmul + 13 * elements / c.memory_rate
    return seconds, 2 * seconds


def layer_seconds(job: Job, lay: Layout, tokens: float, moe: bool) -> dict[str, float]:
    """Forward and backward of one layer for one micro-batch: computing, and waiting for others.

    TP gathers and scatters twice a pass and cannot hide it (Narayanan et al., 2021, 3.2). A hop of
    CP's ring, K and V forward and their gradients too backward, hides behind 1/CP of attention: with
    zigzag, by bytes alone, from 2 flash / bandwidth x kv_heads / heads tokens per part on. EP's
    all-to-alls hide behind the layer (DeepSeek-V3, 3.2.1).
    """
    m, c, t = job.model, job.cluster, lay.tensor
    inner, kv, ffn = m.heads * m.head_dim, m.kv_heads * m.head_dim, m.expert_ffn if moe else m.ffn
    mlp = [(m.width, (m.matrices - 1) * ffn / t), (ffn / t, m.width)]
    attention = [(m.width, (inner + 2 * kv) / t), (inner / t, m.width)]
    if m.projections:
        attention = [(m.width, m.projections / m.width / t)]
    projected = [linear_seconds(c, tokens, *shape) for shape in attention]
    products = projected + [linear_seconds(c, tokens, *shape) for shape in mlp]
    if moe:  # this GPU's experts, each with its share of the tokens
        here = m.experts // lay.expert
        products += here * [linear_seconds(c, tokens * m.active / here, *shape) for shape in mlp]
    core = attention_seconds(job, t, tokens)
    # Elements moved: norms 4 h, residual sums 6 h (in 2021 by each TP rank), rotation, activation
    # function, routing.
    moved = 10 * m.width / (1 if job.of_2021 else t) + 2 * (inner + kv) / t
    moved += m.matrices * ffn * (1 + m.active * moe) / t + 4 * m.active * m.width * moe
    elementwise = moved * tokens * c.item / c.memory_rate
    forward = sum(f for f, _ in products) + core[0] + elementwise
    again = {"none": 0.0, "full": forward, "selective": elementwise + core[0] * job.of_2021}
    again["selective"] += sum(f for f, _ in projected) * (m.projections > 0)
    compute = forward + again[lay.recompute]
    compute += sum(b for _, b in products) + core[1] + 2 * elementwise
    passes = 3 if lay.recompute == "full" else 2
    vector = tokens * m.width * c.item
    hop = hop_seconds(c, lay.context, t, tokens * 2 * kv / t * c.item)
    exposed = (passes - 1) * max(0.0, hop - core[0] / lay.context)
    exposed += max(0.0, 2 * hop - core[1] / lay.context)
    inside = in_a_node(c, lay.expert, t * lay.context)
    sent = vector / t * (m.active if inside else min(m.active, m.nodes_per_token))
    routing = 2 * passes * moe * collective_seconds(c, lay.expert, t * lay.context, sent)
    waiting = {"tensor": passes * 4 * collective_seconds(c, t, 1, vector)}
    waiting |= {"context": (lay.context - 1) * exposed, "expert": max(0.0, routing - compute)}
    return {"compute": compute} | waiting


@functools.cache
def micro_batch_seconds(job: Job, lay: Layout) -> dict[str, float]:
    """One micro-batch on the busiest stage, by what the time goes to; the last one has the head."""
    m, c, tokens = job.model, job.cluster, lay.micro_batch * job.context / lay.context
    dense, moe = (layer_seconds(job, lay, tokens, routed) for routed in (False, m.experts > 0))
    stages = []
    for layers in stage_layers(m.layers, lay.pipeline):
        n = sum(layer >= m.dense_layers for layer in layers) if m.experts else 0
        stages.append({kind: (len(layers) - n) * dense[kind] + n * moe[kind] for kind in dense})
    stages[-1]["compute"] += sum(linear_seconds(c, tokens, m.width, m.vocab / lay.tensor))
    stages[-1]["compute"] += 12 * tokens * m.vocab / lay.tensor / c.memory_rate  # softmax, float32
    return max(stages, key=lambda stage: sum(stage.values()))


def data_parallel_seconds(job: Job, lay: Layout, compute: float) -> float:
    """Gradient traffic that the `compute` s of one micro-batch, a third of it forward, do not hide.

    A step scatters gradients and gathers weights (an all-reduce is both); ZeRO-2 scatters every
    micro-batch, ZeRO-3 gathers twice as well (arXiv 1910.02054, section 7).
    """
    c, p = job.cluster, lay.pipeline
    shared, routed = (c.item * w / lay.tensor for w in stage_weights(job.model, p, p // 2))
    far = lay.tensor * lay.context * lay.expert * p
    # of a group, in a node: they share its network cards
    near = min(lay.context * lay.expert, max(1, c.node // lay.tensor)) * max(1, c.node // far)
    once = collective_seconds(c, lay.data * lay.context, c.node // near, shared)
    once += collective_seconds(c, lay.data // lay.expert, far, routed / lay.expert)
    if job.of_2021:
        return 2 * once
    micro_batches = job.batch // (lay.data * lay.micro_batch)
    scatter, gather = max(0.0, once - compute * 2 / 3), max(0.0, once - compute / 3)
    if lay.zero == 3:
        return micro_batches * (gather + max(0.0, 2 * once - compute * 2 / 3))
    return gather + scatter * (micro_batches if lay.zero == 2 else 1)


def step_seconds(job: Job, lay: Layout) -> dict[str, float]:
    """Where the seconds of one step go.

    The bubble is (p-1)/(v m) of the busy time (Narayanan et al., 2021, section 2.2).
    """
    c, p, micro_batches = job.cluster, lay.pipeline, job.batch // (lay.data * lay.micro_batch)
    each = micro_batch_seconds(job, replace(lay, data=1, zero=0, chunks=1))  # as they do not matter
    time = {kind: micro_batches * seconds for kind, seconds in each.items()}
    bubble = sum(time.values()) * ((p - 1) / (lay.chunks * micro_batches))
    vector = lay.micro_batch * job.context / lay.context * job.model.width * c.item / lay.tensor
    hop = hop_seconds(c, p, lay.tensor * lay.context * lay.expert, vector)
    sends = 2 * micro_batches * lay.chunks * hop * (p > 1)
    adam = memory_per_device(job, lay, p // 2)["Adam"] * 28 / 12 / c.memory_rate
    data = data_parallel_seconds(job, lay, each["compute"])
    return time | {"bubble": bubble, "sends": sends, "data": data, "Adam": adam}


def flops_per_token(m: Model, context: int, recomputed: bool = False) -> float:
    """FLOPs to train on one token: 6 per weight that it meets in a product, and causal attention's.

    `recomputed`: 8 per weight, the head's 6, and all of the square (Narayanan et al., equation 3).
    """
    layers = [layer_weights(m, layer) for layer in range(m.layers)]
    weights = sum(w + e * m.active // max(1, m.experts) for w, e in layers)
    square, head = 2 * m.layers * m.heads * m.head_dim * context, m.vocab * m.width
    return 8 * (weights + square) + 6 * head if recomputed else 6 * (weights + head + square / 2)
