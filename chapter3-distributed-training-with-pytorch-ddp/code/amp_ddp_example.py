"""Mixed precision under DDP: one training in fp32, bf16 and fp16, a step each in turn.

    torchrun --nproc_per_node=2 chapter3-distributed-training-with-pytorch-ddp/code/amp_ddp_example.py
    torchrun --nproc_per_node=3 chapter3-distributed-training-with-pytorch-ddp/code/amp_ddp_example.py --precision fp32 fp16 --overflow-step 4

On GPUs:
    torchrun --nproc_per_node=8 chapter3-distributed-training-with-pytorch-ddp/code/amp_ddp_example.py --width 1024 --layers 12 --heads 16 --context 1024 --batch 64 --steps 200

Look at the losses, which agree, and at the gradients on the wire, which are fp32 in all three: autocast
casts the products, not the weights. Then at what one rank's overflow does to the others. Section 3.6.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch._dynamo  # DDP's; before there is a group: section 3.8
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Sampler

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Products of numbers with so many significant bits are off by 2^-bits each; see section 3.6.
BITS = {"fp32": 24, "bf16": 8, "fp16": 11}


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


class ShareOfBatch(Sampler[list[int]]):
    """This rank's share of each global batch; the batches are the same at any world size."""

    def __init__(self, samples: int, batch: int, rank: int, world_size: int, seed: int):
        self.samples, self.batch, self.rank, self.world_size = samples, batch, rank, world_size
        self.seed, self.epoch, self.done = seed, 0, 0

    def set_epoch(self, epoch: int, done: int = 0) -> None:
        """Choose the epoch's shuffle; `done` batches of it are skipped, for a resumed run."""
        self.epoch, self.done = epoch, done

    def __len__(self) -> int:
        return self.samples // self.batch - self.done

    def __iter__(self) -> Iterator[list[int]]:
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.samples, generator=draw)  # equal on all ranks
        for step in range(self.done, self.samples // self.batch):
            whole = order[step * self.batch : (step + 1) * self.batch]
            yield whole[self.rank :: self.world_size].tolist()  # sizes may differ by one


class Run:
    """One training: what a step in its precision reads and changes, and what it measured."""

    def __init__(self, precision: str, args: argparse.Namespace, device: torch.device):
        self.precision, self.args, self.device = precision, args, device
        torch.manual_seed(args.seed)
        model = ByteLM(args.width, args.layers, args.heads, args.context).to(device)
        self.model = DistributedDataParallel(model)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95))
        self.schedule = LambdaLR(self.optimizer, lambda step: rate(step, args.steps))
        # Only fp16 needs it; switched off, all of its methods do nothing but what they wrap.
        self.scaler = torch.amp.GradScaler(
            device.type, init_scale=args.scale, growth_interval=10, enabled=precision == "fp16"
        )
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.skipped = 0

    def train_step(self, window: torch.Tensor, overflow: bool = False) -> None:
        """One update from this rank's share, [share, context + 1]; `overflow` makes its loss inf."""
        loss = self.backward(window, overflow)
        self.scaler.unscale_(self.optimizer)  # before clipping: the norm must be the true one
        nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)  # not where a gradient is inf or nan; then the scale falls
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.scaler.get_scale() < scale:
            self.skipped += 1
        else:
            self.schedule.step()
        dist.all_reduce(loss)
        self.losses.append(loss.item())

    def backward(self, window: torch.Tensor, overflow: bool = False) -> torch.Tensor:
        """Leave the scaled gradient of the global batch's mean loss; return this rank's part of it."""
        dtype = DTYPES[self.precision]
        # The backward pass stays outside: autograd runs each operator's in the dtype of its forward.
        with torch.autocast(self.device.type, dtype=dtype, enabled=self.precision != "fp32"):
            logits = self.model(window[:, :-1])
        targets = window[:, 1:].flatten()
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets, reduction="sum")
        loss = loss / (self.args.batch * self.args.context)
        scaled = self.scaler.scale(loss * dist.get_world_size())  # DDP divides by it
        (scaled * math.inf if overflow else scaled).backward()
        return loss.detach()

    def kept(self, window: torch.Tensor) -> tuple[int, int]:
        """Bytes that forward keeps for backward: activations, and 16-bit copies of the weights."""
        weights = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        kept: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            self.backward(window)
        self.optimizer.zero_grad()
        linear = [m.weight for m in self.model.modules() if isinstance(m, nn.Linear)]
        copies = 0 if self.precision == "fp32" else 2 * sum(w.numel() for w in linear)
        return sum(kept.values()) - copies, copies

    def gradient(self) -> torch.Tensor:
        return torch.cat([p.grad.flatten() for p in self.model.parameters()])

    def weights(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


def rate(step: int, steps: int) -> float:
    """Share of the peak learning rate: five steps up, then half a cosine down to a tenth."""
    return min((step + 1) / 5, 0.55 + 0.45 * math.cos(math.pi * max(step - 5, 0) / steps))


def first_gradients(runs: dict[str, Run], windows: torch.Tensor) -> dict[str, float]:
    """Relative distance of each precision's first gradient from that of one process in fp64."""
    args, errors = next(iter(runs.values())).args, {}
    torch.manual_seed(args.seed)
    alone = ByteLM(args.width, args.layers, args.heads, args.context).to(windows.device).double()
    logits = alone(windows[:, :-1])
    F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).backward()
    truth = torch.cat([p.grad.flatten() for p in alone.parameters()])
    for name, run in runs.items():
        run.backward(windows[dist.get_rank() :: dist.get_world_size()])
        run.scaler.unscale_(run.optimizer)
        errors[name] = ((run.gradient() - truth).norm() / truth.norm()).item()
        run.scaler.update()
        run.optimizer.zero_grad()
    return errors


def clipped_too_soon(run: Run, window: torch.Tensor) -> float:
    """What the norm is if it is taken before unscale_, over what it is afterwards."""
    run.backward(window)
    before = nn.utils.get_total_norm(run.gradient())
    run.scaler.unscale_(run.optimizer)
    after = nn.utils.get_total_norm(run.gradient())
    run.scaler.update()
    run.optimizer.zero_grad()
    return (before / after).item()


def train(runs: dict[str, Run], windows: torch.Tensor, args: argparse.Namespace) -> list[float]:
    """All steps, the precisions in turn; what the overflow did to fp16: |weights moved|, scale."""
    rank, n, found = dist.get_rank(), dist.get_world_size(), []
    sampler = ShareOfBatch(len(windows), args.batch, rank, n, args.seed)
    loader, step = DataLoader(windows, batch_sampler=sampler), 0
    while step < args.steps:
        sampler.set_epoch(step // (len(windows) // args.batch))
        for window in loader:
            if step == args.steps:
                break
            step += 1
            for name, run in runs.items():
                overflow = name == "fp16" and step == args.overflow_step
                before, scale = run.weights() if overflow else None, run.scaler.get_scale()
                dist.barrier()
                start = time.perf_counter()
                run.train_step(window.to(run.device), overflow and rank == n - 1)
                synchronize(run.device)
                run.seconds.append(time.perf_counter() - start)
                if overflow:
                    moved = (run.weights() - before).abs().max().item()
                    found = [moved, run.scaler.get_scale() / scale]
    return found


def run_all(args: argparse.Namespace, device: torch.device) -> bool:
    rank, n = dist.get_rank(), dist.get_world_size()
    if args.batch < n:
        stop(f"{n} ranks, but --batch {args.batch}: type --batch {n} or more")
    data = read_bytes(args.data, at_least=args.batch * args.context + 1)
    windows = data.unfold(0, args.context + 1, args.context)  # [samples, context + 1]
    runs = {name: Run(name, args, device) for name in args.precision}
    whole = windows[: args.batch].to(device)
    share = whole[rank::n]
    errors = first_gradients(runs, whole)
    kept = {name: run.kept(share) for name, run in runs.items()}
    early = clipped_too_soon(runs["fp16"], share) if "fp16" in runs else None
    scale = runs["fp16"].scaler.get_scale() if "fp16" in runs else 1
    found = train(runs, windows, args)

    say(f"{n} rank{'s' * (n > 1)} on {device.type}: {args.steps} steps in each precision, in turn")
    if device.type == "cpu":
        units = {"AVX512_BF16": torch.cpu._is_avx512_bf16_supported()}
        units |= {"AMX": torch.cpu._is_amx_tile_supported()}
        said = ", ".join(f"{name} {'yes' if there else 'no'}" for name, there in units.items())
        say(f"16-bit matrix units: {said}")
    say(f"{'':<6}{'tokens/s':>9}{'quartiles':>18}{'MiB kept':>10}{'+ copies':>10}{'on the wire':>13}"
        f"{'gradient off':>14}{'skipped':>9}{'loss':>7}")  # fmt: skip
    tokens = args.batch * args.context
    for name, run in runs.items():
        low, middle, high = statistics.quantiles(run.seconds[2:], n=4)
        between = f"{tokens / high:,.0f} .. {tokens / low:,.0f}"
        wire = sum(p.nbytes for p in run.model.parameters())  # a gradient has its weight's dtype
        activations, copies, sent = (size / 2**20 for size in (*kept[name], wire))
        mib = f"{activations:>10.2f}{copies:>10.2f}{sent:>13.2f}"
        say(f"{name:<6}{tokens / middle:>9,.0f}{between:>18}{mib}"
            f"{errors[name]:>14.2g}{run.skipped:>9}{tail(run):>7.3f}")  # fmt: skip
    held = []
    for name, error in errors.items():
        claim, units = (
            f"{name}: first gradient's error, in units of 2^-{BITS[name]}",
            2 ** BITS[name],
        )
        held.append(check(claim, error * units, 8))
        if name != "fp32":  # or nothing was computed in 16 bits
            held.append(check(claim, error * units, 0.02, at_least=True))
    for name, run in runs.items():
        if name != "fp32" and "fp32" in runs:
            apart = abs(tail(run) - tail(runs["fp32"]))
            allowed = 0.05 + 0.1 * run.skipped  # an update fewer is behind
            held.append(check(f"{name}: |loss - fp32's|, mean of the last five", apart, allowed))
            less = kept[name][0] / kept["fp32"][0]
            held.append(check(f"{name}: activations kept, of fp32's", less, 0.9))
        weights = run.weights()
        rank_0s = weights.clone()
        dist.broadcast(rank_0s, src=0)
        spread = (weights - rank_0s).abs().max().item()
        held.append(check(f"{name}: spread of weights over ranks", spread, 0))
    if early is not None:
        off = abs(early / scale - 1)
        held.append(check(f"fp16: norm before unscale_ is {scale:g} times, off by", off, 1e-3))
    if found:
        moved, fell = found
        say(
            f"overflow on rank {n - 1} in step {args.overflow_step}: the scale is {fell:g} of what it was"
        )
        held.append(check("fp16: weights moved by that step, on any rank", moved, 0))
        held.append(check("fp16: scale after it, of before, on any rank", fell, 0.5))
        held.append(
            check("fp16: steps skipped, and overflows, differ by", abs(runs["fp16"].skipped - 1), 0)
        )
    if args.json and rank == 0:
        record = {name: {"losses": r.losses, "seconds": r.seconds} for name, r in runs.items()}
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return all(held)


def tail(run: Run) -> float:
    """Mean loss of the last five steps: one step's is noisy."""
    return statistics.mean(run.losses[-5:])


def check(claim: str, value: float, bound: float, at_least: bool = False) -> bool:
    """Print whether the worst rank keeps `value` within `bound`; every rank gets the same answer."""
    values = [0.0] * dist.get_world_size()
    dist.all_gather_object(values, value)
    worst = min(values) if at_least else max(values)
    held = all(v >= bound if at_least else v <= bound for v in values)  # false for NaN
    sign, verdict = ">=" if at_least else "<=", "ok" if held else "FAILED"
    say(f"check: {claim} = {worst:.3g} {sign} {bound:.3g}  {verdict}")
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
    if not 0 < (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: stop(f"{message}: --help lists the flags")
    chapter = Path(__file__).resolve().parents[1]
    add = parser.add_argument
    add("--data", type=Path, default=chapter / "main.md", help="text; default: the chapter")
    add("--precision", choices=DTYPES, nargs="+", default=[*DTYPES], help="which; default: all")
    add("--steps", type=positive, default=24, help="optimizer steps in each precision")
    add("--overflow-step", type=int, default=12, help="fp16: the last rank's is inf; 0: none")
    add("--scale", type=above_zero, default=2.0**14, help="factor that fp16's loss begins with")
    add("--batch", type=positive, default=12, help="windows per step, all ranks together")
    add("--context", type=positive, default=64, help="bytes per window")
    add("--width", type=positive, default=128, help="size of a token's vector")
    add("--layers", type=positive, default=2, help="transformer blocks")
    add("--heads", type=positive, default=4, help="attention heads; 2 x heads divides --width")
    add("--lr", type=above_zero, default=3e-3, help="AdamW's peak learning rate")
    add("--clip", type=float, default=1.0, help="largest norm of a gradient")
    add("--seed", type=int, default=0, help="for weights and shuffling")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--json", type=Path, help="also write losses and seconds to this file")
    args = parser.parse_args()
    if args.width % (2 * args.heads):
        stop(f"--width {args.width} is no multiple of 2 x --heads {args.heads}")
    if args.steps < 5:
        stop(f"--steps {args.steps}: type --steps 5 or more")
    if args.json and not args.json.parent.is_dir():
        stop(f"--json {args.json}: there is no folder {args.json.parent}")
    return args


def main() -> None:
    args = parse_args()
    device = join_group(args.device)
    try:
        held = run_all(args, device)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    sys.exit(not held)


if __name__ == "__main__":
    main()
