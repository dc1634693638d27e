"""Gradients in fewer bytes: four DDP communication hooks, what each saves, loses and costs.

    torchrun --nproc_per_node=2 chapter3-distributed-training-with-pytorch-ddp/code/ddp_comm_hooks.py
    torchrun --nproc_per_node=3 chapter3-distributed-training-with-pytorch-ddp/code/ddp_comm_hooks.py --steps 20 --bucket-mb 0.1 --keep 0.1

On GPUs:
    torchrun --nproc_per_node=8 chapter3-distributed-training-with-pytorch-ddp/code/ddp_comm_hooks.py --width 1024 --layers 12 --heads 16 --context 1024 --batch 8 --steps 200 --gbit 100 10

Read the bytes beside the errors and the loss; then the break-even: above that bandwidth a hook costs
more than it saves. Buckets go one at a time here: no wire hides behind compute. Section 3.5.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch._dynamo  # DDP's; before there is a group: section 3.8
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

BLOCK = 256  # elements that share a scale
NAMES = ("none", "fp16", "int8", "powerSGD", "top-k", "no feedback")
OFF = 0.35  # of the predicted times, at most
TINY = torch.finfo(torch.float32).tiny


class Link:
    """The process group as hooks see it, with a meter, and with a slower wire if told so.

    A stand-in for a network: a collective is done no sooner than latency + bytes / bandwidth after
    the one before it, and who waits for it sleeps.
    """

    def __init__(self, device: torch.device):
        self.rank, self.size, self.device = dist.get_rank, dist.get_world_size, device
        self.bandwidth, self.latency = math.inf, 0.0  # bytes/s, s
        self.sent = self.calls = 0  # bytes that this rank has sent, collectives
        self.seconds = self.free_at = 0.0  # in collectives as they are; when the wire is free

    def carry(self, issue: Callable[[], dist.Work], nbytes: float) -> SimpleNamespace:
        synchronize(self.device)  # GPUs: the host waits, as it does on the stand-in
        start = time.perf_counter()
        due = self.free_at = max(start, self.free_at) + self.latency + nbytes / self.bandwidth
        self.sent, self.calls = self.sent + nbytes, self.calls + 1

        def arrive(future: Future) -> list[torch.Tensor]:
            synchronize(self.device)
            self.seconds += time.perf_counter() - start
            time.sleep(max(0.0, due - time.perf_counter()))
            return future.value()

        late = issue().get_future().then(arrive)
        return SimpleNamespace(wait=late.wait, get_future=lambda: late)

    def allreduce(self, tensors: list[torch.Tensor], options: object) -> SimpleNamespace:
        n, (tensor,) = self.size(), tensors
        work = partial(dist.all_reduce, tensor, async_op=True)
        return self.carry(work, 2 * (n - 1) * tensor.nbytes / n)

    def allgather(self, outputs: list, inputs: list, options: object) -> SimpleNamespace:
        work = partial(dist.all_gather, outputs[0], inputs[0], async_op=True)
        return self.carry(work, (self.size() - 1) * inputs[0].nbytes)

    def alltoall_base(self, output: torch.Tensor, input: torch.Tensor, *_) -> SimpleNamespace:
        n, work = self.size(), partial(dist.all_to_all_single, output, input, async_op=True)
        return self.carry(work, (n - 1) * input.nbytes / n)

    all_to_all_single = alltoall_base  # newer releases call it so


class TopK:
    """What `top_k_hook` keeps: the elements that each parameter's gradient has not sent yet."""

    def __init__(self, link: Link, keep: float, feedback: bool):
        self.link, self.keep, self.feedback = link, keep, feedback
        self.residual: dict[torch.Tensor, torch.Tensor] = {}  # not by bucket: DDP rebuilds buckets


def top_k_hook(state: TopK, bucket: dist.GradBucket) -> Future[torch.Tensor]:
    """Send the largest elements with their places, and add the others to the next gradient.

    Error feedback: Stich et al. 2018, arXiv:1809.07599, algorithm 1. Ranks choose different places,
    so nothing can be reduced on the way: every rank gathers all ranks' choices and adds them.
    """
    gradient = bucket.buffer()
    parts = list(zip(bucket.parameters(), bucket.gradients(), strict=True))
    for parameter, part in parts:
        part += state.residual.get(parameter, 0)
    places = gradient.abs().topk(math.ceil(state.keep * len(gradient)), sorted=False).indices
    message = torch.stack([places.int(), gradient[places].view(torch.int32)])  # [2, k]
    gradient[places] = 0
    if state.feedback:
        state.residual.update((parameter, part.clone()) for parameter, part in parts)
    gathered = [torch.empty_like(message) for _ in range(state.link.size())]
    work = dist.all_gather(gathered, message, group=state.link, async_op=True)

    def average(_: Future) -> torch.Tensor:
        gradient.zero_()
        for places, values in gathered:  # in the same order on all ranks: the same bits
            gradient.index_add_(0, places, values.view(torch.float32), alpha=1 / len(gathered))
        return gradient

    return work.get_future().then(average)


def quantize(x: torch.Tensor) -> torch.Tensor:
    """[blocks * BLOCK] -> int8 [blocks, BLOCK + 4]: steps of the block's scale, and the scale."""
    blocks = x.view(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True) / 127
    steps = (blocks / scale.clamp(min=TINY)).round()  # off by at most half a step
    return torch.cat([steps.to(torch.int8), scale.view(torch.int8)], 1)


def dequantize(message: torch.Tensor) -> torch.Tensor:
    steps, scale = message.split([BLOCK, 4], 1)
    return (steps * scale.contiguous().view(torch.float32)).flatten()


def int8_hook(link: Link, bucket: dist.GradBucket) -> Future[torch.Tensor]:
    """Average what is sent in int8: a reduce-scatter, as an all-to-all, then an all-gather.

    An all-reduce would add int8, which overflows, in steps that differ from rank to rank: here each
    rank averages a share in float32. To gather all that n ranks have would cost n/8 of plain DDP.
    """
    n, gradient = link.size(), bucket.buffer()
    outgoing = quantize(F.pad(gradient, (0, -len(gradient) % (n * BLOCK))))
    incoming, averaged = torch.empty_like(outgoing), torch.empty_like(outgoing)
    dist.all_to_all_single(incoming, outgoing, group=link)  # waits: all ranks issue in one order
    share = dequantize(incoming).view(n, -1).mean(0)  # [padded / n]
    work = dist.all_gather(list(averaged.chunk(n)), quantize(share), group=link, async_op=True)
    return work.get_future().then(lambda _: gradient.copy_(dequantize(averaged)[: len(gradient)]))


class Block(nn.Module):
    """Llama's: rotary attention, then SwiGLU, each behind an RMSNorm and added to what comes in."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, hidden = heads, 8 * width // 3
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))  # x: [batch, seq, width]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [batch, heads, seq, head_dim]
        q, k = rotate(q, rotation), rotate(k, rotation)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class ByteLM(nn.Module):
    """A small decoder-only transformer of Llama's shape (arXiv:2302.13971) whose tokens are bytes."""

    def __init__(self, width: int, layers: int, heads: int, context: int):
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, 256, bias=False)
        frequency = 10_000.0 ** -torch.arange(0, 1, 2 * heads / width)  # [head_dim / 2]
        angle = torch.outer(torch.arange(context), frequency)
        self.register_buffer("rotation", torch.stack([angle.cos(), angle.sin()]), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:  # [batch, seq] -> [batch, seq, 256]
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, self.rotation[:, : tokens.shape[1]])
        return self.head(self.norm(x))


def rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Turn each pair (x[i], x[i + d/2]) by its position's angle: RoPE (arXiv:2104.09864)."""
    (cos, sin), (a, b) = rotation, x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Trial:
    """A replica that is trained with one hook, and what is seen of the hook."""

    def __init__(self, name: str, args: argparse.Namespace, device: torch.device):
        self.name, self.link, self.audited, self.seconds = name, Link(device), True, 0.0
        power = powerSGD_hook.PowerSGDState(self.link, args.matrix_rank, args.warm_up)
        self.state, self.hook = {
            "none": (self.link, default_hooks.allreduce_hook),
            "fp16": (self.link, default_hooks.fp16_compress_hook),
            "int8": (self.link, int8_hook),
            "powerSGD": (power, powerSGD_hook.powerSGD_hook),
            "top-k": (TopK(self.link, args.keep, feedback=True), top_k_hook),
            "no feedback": (TopK(self.link, args.keep, feedback=False), top_k_hook),
        }[name]
        torch.manual_seed(args.seed)
        self.model = ByteLM(args.width, args.layers, args.heads, args.context).to(device)
        self.replica = DistributedDataParallel(self.model, bucket_cap_mb=args.bucket_mb)
        self.replica.register_comm_hook(self, observe)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=args.lr, fused=True)
        self.local: dict[torch.Tensor, torch.Tensor] = {}  # gradients before they are averaged
        self.buckets: list[int] = []  # their lengths, of all audited steps
        self.errors: list[float] = []  # |average - update| / |average|, by step
        self.wanted = self.missing = 0.0  # sums over the steps of average, and average - update

    def train_step(self, window: torch.Tensor) -> None:
        """One update from this rank's windows of text: [batch, context + 1]."""
        self.optimizer.zero_grad()
        logits = self.replica(window[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten()).backward()
        self.optimizer.step()
        if self.audited:
            average = mean_over_ranks(self.flat(self.local))
            missing = average - self.flat({p: p.grad for p in self.model.parameters()})
            self.errors.append((missing.norm() / average.norm()).item())
            self.wanted, self.missing = self.wanted + average, self.missing + missing

    def timed_step(self, window: torch.Tensor, bandwidth: float, latency: float) -> list[float]:
        """Seconds of compute, of compression and of the whole step, on a link of this speed."""
        self.link.bandwidth, self.link.latency = bandwidth, latency
        self.audited = False
        self.seconds = self.link.seconds = self.link.sent = self.link.calls = 0
        dist.barrier()
        start = time.perf_counter()
        self.train_step(window)
        synchronize(window.device)
        whole = time.perf_counter() - start
        return [whole - self.seconds, self.seconds - self.link.seconds, whole]

    def flat(self, tensors: dict[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """In the order of the parameters, which is not that of the buckets: [weights]."""
        return torch.cat([tensors[p].flatten() for p in self.model.parameters()]).double()


def observe(trial: Trial, bucket: dist.GradBucket) -> Future[torch.Tensor]:
    """Run the trial's hook, one bucket at a time, and note its seconds."""
    if trial.audited:
        parts = zip(bucket.parameters(), bucket.gradients(), strict=True)
        trial.local.update((parameter, part.clone()) for parameter, part in parts)
        trial.buckets.append(len(bucket.buffer()))
    synchronize(bucket.buffer().device)
    start = time.perf_counter()
    future = trial.hook(trial.state, bucket)
    future.wait()  # torch's powerSGD_hook hangs on gloo if a second bucket is on its way
    synchronize(bucket.buffer().device)
    trial.seconds += time.perf_counter() - start
    return future


def bytes_by_formula(trial: Trial, args: argparse.Namespace) -> float:
    """What a rank should send per audited step, from the sizes alone."""
    n, low_rank = dist.get_world_size(), 0
    for p in trial.model.parameters():
        rows, columns = p.shape if p.dim() == 2 else (len(p), 1)
        factors = min(rows, columns, args.matrix_rank) * (rows + columns)
        low_rank += factors if 2 * factors < p.numel() else p.numel()  # torch's choice
    size, warm = sum(p.numel() for p in trial.model.parameters()), min(1, args.warm_up / args.steps)
    blocks = sum(n * math.ceil(length / (n * BLOCK)) for length in trial.buckets) / args.steps
    places = sum(math.ceil(args.keep * length) for length in trial.buckets) / args.steps
    gathered, reduced = n - 1, 2 * (n - 1) / n
    return {
        "none": reduced * 4 * size,
        "fp16": reduced * 2 * size,
        "int8": reduced * (BLOCK + 4) * blocks,
        "powerSGD": reduced * 4 * (warm * size + (1 - warm) * low_rank),
    }.get(trial.name, gathered * (4 + 4) * places)


def draw_batch(data: torch.Tensor, step: int, args: argparse.Namespace) -> torch.Tensor:
    """This rank's windows of text in a step, the same for all hooks: [batch, context + 1]."""
    draw = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    shape = (dist.get_world_size(), args.batch, 1)
    starts = torch.randint(len(data) - args.context, shape, generator=draw)
    return data[starts[dist.get_rank()] + torch.arange(args.context + 1)]


def mean_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(tensor)
    return tensor / dist.get_world_size()


def report(trials: dict[str, Trial], held_out: torch.Tensor, args: argparse.Namespace) -> bool:
    """Print what each hook sent and lost; return True if every claim about it held."""
    say(f"{'':<12}{'MB sent per step':>18}{'relative error of':>20}{'loss held out':>20}")
    say("hook          counted  formula  one step their sum      nats   - plain")
    row, off_formula = "{:<12}{:>9.4f}{:>9.4f}{:>10.2g}{:>10.2g}{:>10.4f}{:>+10.4f}", []
    for name, trial in trials.items():
        with torch.no_grad():
            logits = trial.model(held_out[:, :-1])
        trial.loss = F.cross_entropy(logits.flatten(0, 1), held_out[:, 1:].flatten()).item()
        trial.sum_error = (trial.missing.norm() / trial.wanted.norm()).item()
        one_step = statistics.fmean(trial.errors[args.warm_up :] or trial.errors)
        sent, formula = trial.link.sent / args.steps, bytes_by_formula(trial, args)
        off_formula.append(abs(sent - formula))
        losses = trial.loss, trial.loss - trials["none"].loss
        say(row.format(name, sent / 1e6, formula / 1e6, one_step, trial.sum_error, *losses))

    none, fp16, int8, power, top_k, forgetful = trials.values()
    blocks = F.pad(int8.flat(int8.local).float(), (0, -int8.wanted.numel() % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True).clamp(min=TINY) / 127
    rounding = (dequantize(quantize(blocks)).view_as(blocks) - blocks) / scale
    residual = mean_over_ranks(top_k.flat(top_k.state.residual))
    lost = (top_k.missing - residual).norm() / top_k.wanted.norm()
    fed = top_k.sum_error / max(forgetful.sum_error, TINY)
    judged = [power, top_k] if args.steps * args.keep >= 1 else [power]  # every element had a turn
    far = worst(trial.loss - none.loss for trial in judged)
    close = worst(abs(trial.loss - none.loss) for trial in (fp16, int8))
    held = [
        check("bytes per step, off the formula", worst(off_formula), 0.01),
        check(
            "spread of weights over ranks", worst(max_spread(t.model) for t in trials.values()), 0
        ),
        check("none: relative error of a step", worst(none.errors), 1e-6),
        check("fp16: relative error of a step", worst(fp16.errors), 0.01),
        check("int8: relative error of a step", worst(int8.errors), 0.05),
        check("int8: rounding, in steps of the scale", rounding.abs().max().item(), 0.5001),
        check("top-k: sent + residual, off the gradients' sum", lost.item(), 1e-5),
        check("top-k: error of the sum / without feedback", fed, 0.9),
        check("fp16, int8: loss off plain", close, 0.05),
        check("powerSGD, top-k: loss above plain", far, 0.5),
    ]
    return all(held)


def time_steps(trials: list[Trial], data: torch.Tensor, args: argparse.Namespace) -> bool:
    """Step on the link as it is and on the slow one, in turn; print predicted beside measured."""
    crowded = data.device.type == "cpu" and dist.get_world_size() > (os.cpu_count() or 1)
    bandwidth, latency = args.gbit * 1e9 / 8, args.latency_us / 1e6
    rows, off = [], math.inf
    while not rows or (off > OFF and len(rows) < 4 * args.repeats and not crowded):
        for _ in range(args.repeats):
            window = draw_batch(data, args.steps + len(rows), args)
            speeds = ((math.inf, 0.0), (bandwidth, latency))
            rows.append([trial.timed_step(window, *speed) for trial in trials for speed in speeds])
        seconds = torch.tensor(rows, device=data.device)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)  # the slowest rank's
        seconds = seconds.view(len(rows), len(trials), 2, 3).cpu()
        fastest, median = seconds.amin(0), seconds.median(0).values  # [trials, links, 3]
        compute, compression = fastest[0, 0, 0], fastest[:, 0, 1]
        wire = [trial.link.calls * latency + trial.link.sent / bandwidth for trial in trials]
        off_the_wire = seconds[:, :, 0, :2].sum(2).amin(0)  # of one step on the link as it is
        predicted = off_the_wire + torch.tensor(wire)
        off = (predicted / fastest[:, 1, 2] - 1).abs().max().item()

    say(f"ms per step, {len(rows)} rounds: {compute * 1e3:.1f} of compute, and")
    say(f"{'':<22}{'as it is':>18}{f'stand-in for {args.gbit:g} Gbit/s':>31}{'pays below':>12}")
    say("hook       compression   fastest  median predicted fastest median   off      Gbit/s")
    for i, trial in enumerate(trials):
        more_calls = trial.link.calls - trials[0].link.calls
        extra = compression[i] - compression[0] + more_calls * latency
        saved = (trials[0].link.sent - trial.link.sent) * 8e-9  # Gbit
        trial.pays_below = saved / extra.item() if extra > 0 else None  # at any bandwidth
        trial.predicted, trial.fastest = predicted[i].item(), fastest[i, 1, 2].item()
        times = [compression[i], fastest[i, 0, 2], median[i, 0, 2], predicted[i], fastest[i, 1, 2]]
        times = [f"{t * 1e3:.2f}" for t in (*times, median[i, 1, 2])]
        off_here = f"{trial.predicted / trial.fastest - 1:+.0%}"
        below = "any" if trial.pays_below is None else f"{trial.pays_below:.2g}"
        row = "{:<9}{:>13}{:>10}{:>8}{:>10}{:>8}{:>7}{:>6}{:>12}"
        say(row.format(trial.name, *times, off_here, below if i else ""))
    if crowded:
        say(f"{os.cpu_count()} cores for {dist.get_world_size()} ranks: the times are not judged")
        return True
    return check("predicted time on the stand-in, off the fastest", off, OFF)


def plot(trials: list[Trial], args: argparse.Namespace) -> None:
    """Time of a step over bandwidth: lines as predicted, dots as measured on the stand-in."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "ch03"
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    bandwidths = [args.gbit * 10 ** (x / 20) for x in range(-20, 41)]  # Gbit/s
    for trial in trials:
        gbit = trial.link.sent * 8e-9
        line = [trial.predicted + gbit * (1 / x - 1 / args.gbit) for x in bandwidths]
        label = f"{trial.name}: {trial.link.sent / 1e6:.3f} MB, loss {trial.loss:.2f}"
        (drawn,) = axis.plot(bandwidths, [1e3 * y for y in line], label=label)
        axis.plot(args.gbit, 1e3 * trial.fastest, "o", color=drawn.get_color())
    axis.set(xlabel="bandwidth (Gbit/s)", ylabel="ms per step", xscale="log", yscale="log")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter("{x:g}")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(args.plot, format="svg", facecolor="white", metadata={"Date": None})


def run(args: argparse.Namespace, device: torch.device) -> bool:
    n = dist.get_world_size()
    text = read_bytes(args.data, at_least=20 * args.context).to(device)
    data, held_out = text.split([len(text) * 9 // 10, len(text) - len(text) * 9 // 10])
    trials = {name: Trial(name, args, device) for name in NAMES}
    quiet = None if dist.get_rank() == 0 else True
    for step in tqdm(range(args.steps), desc="training", disable=quiet):
        window = draw_batch(data, step, args)
        for trial in trials.values():
            trial.train_step(window)

    size, buckets = sum(p.nbytes for p in trials["none"].model.parameters()), trials["none"].buckets
    say(
        f"{n} rank{'s' * (n > 1)} on {device.type}: {args.steps} steps, {size / 1e6:.3f} MB of "
        f"gradients, buckets per step: {len(buckets) / args.steps:.3g}, powerSGD's warm-up: "
        f"{args.warm_up} steps"
    )
    held = report(trials, held_out.unfold(0, args.context + 1, args.context)[:512], args)
    timed = [trials[name] for name in NAMES[:-1]]  # forgetting saves no time worth a row
    held = time_steps(timed, data, args) and held
    if dist.get_rank() == 0 and args.json:
        keys = ("errors", "sum_error", "loss", "predicted", "fastest", "pays_below")
        record = {name: {key: getattr(t, key, None) for key in keys} for name, t in trials.items()}
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    if dist.get_rank() == 0 and args.plot:
        plot(timed, args)
    for trial in trials.values():
        del trial.replica  # it holds its hook's state in C++, that is the trial: neither would go
    return held


def worst(values: Iterable[float]) -> float:
    """Their largest, and NaN if one of them is."""
    return torch.tensor([*values]).max().item()


def max_spread(model: nn.Module) -> float:
    """Largest difference of any weight from rank 0's."""
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    rank_0s = flat.clone()
    dist.broadcast(rank_0s, src=0)
    return (flat - rank_0s).abs().max().item()


def check(claim: str, value: float, bound: float) -> bool:
    """Print whether the worst rank keeps `value` within `bound`; every rank gets the same answer."""
    values = [0.0] * dist.get_world_size()
    dist.all_gather_object(values, value)
    held = all(v <= bound for v in values)  # not so for NaN
    say(f"check: {claim} = {max(values):.3g} <= {bound:.3g}  {'ok' if held else 'FAILED'}")
    return held


def say(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)


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


def join_group(wanted: str) -> torch.device:
    """Join the process group; return this rank's device: its own GPU where each rank has one."""
    if "LOCAL_WORLD_SIZE" not in os.environ:
        stop(f"no launcher: type  torchrun --nproc_per_node=2 {sys.argv[0]}")
    local_rank, ranks_here = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    devices = 0 if device.type in ("cpu", "mps") else torch.accelerator.device_count()
    if wanted not in ("auto", "cpu") and (wanted != device.type or devices < ranks_here):
        stop(f"{ranks_here} ranks, but {devices} {wanted} devices: type --device cpu")
    if wanted == "cpu" or devices < ranks_here:
        if devices and wanted == "auto" and local_rank == 0:
            print(f"{ranks_here} ranks, but {devices} GPUs: running on the CPU", file=sys.stderr)
        device = torch.device("cpu")
    else:
        torch.accelerator.set_device_index(local_rank)
        device = torch.device(device.type, local_rank)
    backend, bound = ("gloo", None) if device.type == "cpu" else (None, device)  # None: PyTorch's
    dist.init_process_group(backend, device_id=bound)
    dist.barrier()  # all are here, before one may leave for what it is given
    return device


def stop(message: str) -> None:
    sys.stderr.write(message + "\n")  # in one piece: other ranks write too
    sys.exit(2)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def above_zero(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: stop(f"{message}: --help lists the flags")
    chapter = Path(__file__).resolve().parents[1]
    add = parser.add_argument
    add("--data", type=Path, default=chapter / "main.md", help="text; default: the chapter")
    add("--steps", type=positive, default=80, help="optimizer steps with each hook")
    add("--batch", type=positive, default=2, help="windows of text per step and rank")
    add("--context", type=positive, default=64, help="bytes per window")
    add("--width", type=positive, default=64, help="size of a token's vector")
    add("--layers", type=positive, default=1, help="transformer blocks")
    add("--heads", type=positive, default=4, help="attention heads; 2 x heads divides --width")
    add("--lr", type=above_zero, default=0.01, help="AdamW's learning rate")
    add("--bucket-mb", type=above_zero, default=25, help="MiB of gradients that travel together")
    add("--keep", type=above_zero, default=0.02, help="share of a bucket that top-k sends, up to 1")
    add("--matrix-rank", type=positive, default=2, help="rank of powerSGD's matrices")
    add("--warm-up", type=positive, help="steps before powerSGD starts; default: a tenth, from 2")
    add("--gbit", type=above_zero, default=0.2, help="bandwidth of the stand-in, Gbit/s")
    add("--latency-us", type=above_zero, default=100, help="its latency, microseconds")
    add("--repeats", type=positive, default=10, help="rounds of timing, a step of each hook")
    add("--seed", type=int, default=0, help="for weights and batches")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--json", type=Path, help="also write bytes, errors, losses and seconds to this file")
    add("--plot", type=Path, help="also draw time over bandwidth into this SVG file")
    args = parser.parse_args()
    args.warm_up = args.warm_up or max(2, args.steps // 10)
    if args.width % (2 * args.heads):
        stop(f"--width {args.width} is no multiple of 2 x --heads {args.heads}")
    if args.keep > 1:
        stop(f"--keep {args.keep} is more than all: type a share from 0 to 1")
    if args.warm_up < 2:
        stop("--warm-up 1: DDP rebuilds its buckets after the first step, type 2 or more")
    for flag in ("json", "plot"):
        path = getattr(args, flag)
        if path and not path.parent.is_dir():
            stop(f"--{flag} {path}: there is no folder {path.parent}")
    return args


def main() -> None:
    args = parse_args()
    device = join_group(args.device)
    try:
        held = run(args, device)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    sys.exit(not held)


if __name__ == "__main__":
    main()
