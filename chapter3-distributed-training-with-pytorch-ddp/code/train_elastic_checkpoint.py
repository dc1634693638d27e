"""A worker is killed, torchrun starts all of them again, and the run ends, bit for bit, as if undisturbed.

    torchrun --nproc_per_node=2 --max-restarts=3 chapter3-distributed-training-with-pytorch-ddp/code/train_elastic_checkpoint.py

On GPUs:
    torchrun --nproc_per_node=8 --max-restarts=3 chapter3-distributed-training-with-pytorch-ddp/code/train_elastic_checkpoint.py --width 1024 --layers 12 --heads 16 --context 512 --lr 3e-4 --steps 200

Look at the step from which the second start goes on, and at the checks: they compare with a run that
nothing disturbed. Without --max-restarts a kill ends the run, and the same command again resumes it.
Try --kill-at 13 27 --kill-rank 0 1 --kill-during-save 30, or kill -9 a rank yourself. Section 3.7.
"""

import argparse
import fcntl
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch._dynamo  # before the group, or gloo's threads outlive it: section 3.8
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Sampler

MUST_MATCH = ("width", "layers", "heads", "context", "dropout", "batch", "steps", "lr", "seed")
PLAIN = ("step", "history", "places", "restarts", "flags")  # saved as they are


class Training:
    """All that a step reads and changes. What `state` leaves out, a restart loses."""

    def __init__(self, args: argparse.Namespace, windows: torch.Tensor, device: torch.device):
        self.args = args
        self.device = device
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        torch.manual_seed(args.seed)
        model = ByteLlama(args.width, args.layers, args.heads, args.context, args.dropout)
        self.model = DistributedDataParallel(model.to(device), forward_sync_buffers=False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=args.lr)
        steps = args.steps
        self.scheduler = LambdaLR(self.optimizer, lambda step: learning_rate(step, 5, steps))
        self.sampler = ShareOfBatch(len(windows), args.batch, self.rank, self.world_size, args.seed)
        # A loader draws a seed whenever it starts, and must not draw it where dropout draws.
        generator = torch.Generator()
        self.loader = DataLoader(
            windows, batch_size=None, sampler=self.sampler, generator=generator
        )
        self.step = 0
        self.history: list[list[float]] = []  # of each step: loss, sum of the batch's bytes
        ranks = f"{self.world_size} rank{'s' * (self.world_size > 1)}"
        self.places = [f"{ranks} on {device.type}"]  # where it was trained
        self.restarts: dict[str, list[float]] = {}  # of each kill: steps done again, seconds lost
        self.flags = {name: getattr(args, name) for name in MUST_MATCH}
        self.flags["data"] = hashlib.sha256(args.data.read_bytes()).hexdigest()[:12]
        self.unpooled: list[torch.Tensor] = []  # of the latest steps: this rank's part of history
        self.told_to_stop = False
        self.step_seconds: list[float] = []
        self.save_seconds: list[float] = []
        gpu = [torch.get_device_module(device)] if device.type != "cpu" else []
        self.generators = [torch, *gpu]  # dropout on a GPU draws from the GPU's
        # DDP orders its buckets anew after its first backward pass, and with them the sums of three
        # ranks or more. Behind the first step, a resumed run would add up in another order.
        self.model(windows[:1, :-1].to(device)).sum().backward()
        self.optimizer.zero_grad()
        self.reseed()

    def state(self) -> dict:
        """What a checkpoint holds. Every rank has to call this, for its random state."""
        rng: list = [None] * self.world_size
        dist.all_gather_object(rng, [source.get_rng_state() for source in self.generators])
        return {
            "model": self.model.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "rng": rng,
            **{name: getattr(self, name) for name in PLAIN},
        }

    def restore(self, state: dict) -> None:
        """Go on where `state` was taken; with other ranks than then, from new random states."""
        here = self.places[-1]
        self.model.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        for name in PLAIN:
            setattr(self, name, state[name])
        if self.places[-1] == here:
            for source, saved in zip(self.generators, state["rng"][self.rank], strict=True):
                source.set_rng_state(saved)
        else:
            say(f"saved by {self.places[-1]}: dropout goes on from seed, step and rank")
            self.places.append(here)
            self.reseed()

    def reseed(self) -> None:
        mixed = (self.args.seed * 1_000_003 + self.step) * 1_000_003 + self.rank
        torch.manual_seed(mixed % 2**63)  # all generators

    def batches(self) -> Iterator[torch.Tensor]:
        """This rank's windows, [share of batch, context + 1], of the steps that are left."""
        return batches(self.loader, self.sampler, self.step, self.args.steps)

    def train_step(self, window: torch.Tensor) -> None:
        window = window.to(self.device)
        loss, _ = train_step(self.model, self.optimizer, window, self.args.batch, clip=1.0)
        self.scheduler.step()
        self.unpooled.append(torch.stack([loss.double(), window.sum().double()]))
        self.step += 1

    def pool(self) -> bool:
        """Add the latest steps to the history; returns whether any rank was told to stop."""
        told = torch.tensor([self.told_to_stop, 0], dtype=torch.double, device=self.device)
        tally = torch.stack([*self.unpooled, told])
        dist.all_reduce(tally)
        *latest, (told_ranks, _) = tally.tolist()  # waits for the device
        self.history += latest
        self.unpooled.clear()
        return told_ranks > 0

    def digest(self) -> str:
        """SHA-256 over every bit of this rank's weights and optimizer state."""
        states = self.optimizer.state_dict()["state"]
        tensors = [states[i][name] for i in sorted(states) for name in sorted(states[i])]
        sha = hashlib.sha256()
        for tensor in (*self.model.parameters(), *tensors):
            sha.update(tensor.detach().cpu().numpy())
        return sha.hexdigest()


def save_checkpoint(folder: Path, state: dict, keep: int) -> int:
    """Put a checkpoint on the disk for good, then delete all but the `keep` newest; returns bytes.

    SIGKILL or a full disk (OSError) may end it anywhere: every checkpoint in the folder is whole.
    """
    stream = io.BytesIO()
    torch.save(state, stream)
    content = stream.getvalue()
    partial = folder / "partial"
    shutil.rmtree(partial, ignore_errors=True)  # what a killed save has left
    partial.mkdir()
    (partial / "state.pt").write_bytes(content)
    (partial / "SHA256SUMS").write_bytes(sums(content))
    for path in (partial / "state.pt", partial / "SHA256SUMS", partial):
        sync(path)
    partial.rename(folder / f"step-{state['step']:06}")
    sync(folder)  # now a power cut cannot take it back
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old.rename(partial))
    return len(content)


def sync(path: Path) -> None:
    """Wait until a file's bytes, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sums(content: bytes) -> bytes:
    """As sha256sum writes it, so that `sha256sum -c SHA256SUMS` checks a checkpoint by hand."""
    return f"{hashlib.sha256(content).hexdigest()}  state.pt\n".encode()


def checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(folder.glob("step-*"), key=lambda path: (len(path.name), path.name))


def load(path: Path) -> dict:
    """What `save_checkpoint` saved; the very bytes that were checked are loaded."""
    content = (path / "state.pt").read_bytes()
    if (path / "SHA256SUMS").read_bytes() != sums(content):
        raise ValueError("state.pt is not what SHA256SUMS says")
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def newest_sound(folder: Path) -> tuple[dict | None, dict[Path, str]]:
    """The newest checkpoint that is bit for bit what was saved, and what ails each newer one."""
    unsound = {}
    for path in reversed(checkpoints(folder)):
        try:
            return load(path), unsound
        except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            unsound[path] = f"{error}".partition("\n")[0]
    return None, unsound


def find_start(args: argparse.Namespace, flags: dict) -> Path | None:
    """On rank 0: the checkpoint to start from, None if there is none. Stops sooner than lose any."""
    folder = args.dir
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)  # open, and so locked, while we live
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stop(f"another run is at work in {folder}: give another --dir")
    fresh = args.fresh and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    earlier = [path for name in ("step-*", "killed-*", "finished") for path in folder.glob(name)]
    if earlier and (fresh or (folder / "finished").exists()):
        say(f"{folder}: the run that was there is now in {set_aside(folder, earlier).name}")
    state, unsound = newest_sound(folder)
    ailing = [f"{path.name} is not sound ({why})" for path, why in unsound.items()]
    if unsound and state is None:
        stop(f"{folder}: {ailing[0]}, nor is any other; --fresh starts again from step 0")
    if state is None:
        return None
    saved = state["flags"]
    other = [f"{k} {saved.get(k)}, not {flags[k]}" for k in flags if saved.get(k) != flags[k]]
    if other:
        stop(f"{folder} has a run with {'; '.join(other)}: give another --dir, or --fresh")
    if unsound:
        set_aside(folder, [*unsound])
        say("\n".join(f"{line}: back to step {state['step']}" for line in ailing))
    return checkpoints(folder)[-1]


def set_aside(folder: Path, paths: list[Path]) -> Path:
    """Move into a new subfolder. Only checkpoints that newer ones have replaced are ever deleted."""
    aside = next(p for n in itertools.count(1) if not (p := folder / f"aside-{n}").exists())
    aside.mkdir()
    for path in paths:
        path.rename(aside / path.name)
    return aside


def from_rank_0(work: Callable[[], Any]) -> Any:
    """What `work` returns on rank 0, on every rank; if it stops there, all ranks do."""
    answer = [None, 0]
    if dist.get_rank() == 0:
        try:
            answer[0] = work()
        except SystemExit as end:
            answer[1] = end.code
    dist.broadcast_object_list(answer)
    if answer[1]:
        sys.exit(answer[1])
    return answer[0]


def train(job: Training, args: argparse.Namespace) -> bool:
    """Train and save, until the last step or SIGTERM; returns whether it was SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: setattr(job, "told_to_stop", True))
    stopping = False
    start = time.perf_counter()
    for window in job.batches():
        inject_kill(job, args)
        job.train_step(window)
        saving = job.step == args.steps or job.step % args.every == 0
        if not (saving or job.step % args.log_every == 0):
            continue
        steps = len(job.unpooled)
        stopping = job.pool()
        job.step_seconds.append((time.perf_counter() - start) / steps)
        if saving or stopping:
            save_or_go_on(job, args)
        if stopping:
            break
        start = time.perf_counter()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return stopping


def save_or_go_on(job: Training, args: argparse.Namespace) -> None:
    """A full disk costs a checkpoint, not the run."""
    start = time.perf_counter()
    state = job.state()
    if job.rank > 0:
        return  # and wait for rank 0 in the next all-reduce
    try:
        size = save_checkpoint(args.dir, state, args.keep)
    except OSError as error:
        shutil.rmtree(args.dir / "partial", ignore_errors=True)
        newest = [path.name for path in checkpoints(args.dir)] or ["none"]
        say(f"step {job.step}: saving failed ({error.strerror}), the newest is {newest[-1]}")
        return
    seconds = time.perf_counter() - start
    job.save_seconds.append(seconds)
    saved = f"{size / 1e6:.2f} MB saved in {seconds * 1e3:.0f} ms"
    say(f"step {job.step:>6}: loss {job.history[-1][0]:.3f}, {saved}")


def inject_kill(job: Training, args: argparse.Namespace) -> None:
    """Die in the coming step, or in the save after it, if told to: once in the life of a run."""
    step = job.step + 1
    ranks = itertools.cycle(args.kill_rank or [job.world_size - 1])
    in_step = args.dir / f"killed-step-{job.step}-rank-{job.rank}"
    in_save = args.dir / f"killed-save-{step}-rank-{job.rank}"

    def die(marker: Path) -> None:
        marker.touch()
        print(f"rank {job.rank}: SIGKILL after step {marker.name.split('-')[2]}", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    def half_written(descriptor: int) -> None:
        newest = max(args.dir.glob("*/state.pt"), key=os.path.getmtime)
        os.truncate(newest, newest.stat().st_size // 2)
        die(in_save)

    if (step, job.rank) in zip(args.kill_at, ranks, strict=False) and not in_step.exists():
        die(in_step)
    if step in args.kill_during_save and job.rank == 0 and not in_save.exists():
        os.fsync = half_written


def note_restarts(job: Training) -> None:
    """Before the first new step: what the kills since the last note have cost."""
    for marker in job.args.dir.glob("killed-*"):
        done = int(marker.name.split("-")[2])
        seconds = time.time() - marker.stat().st_mtime
        job.restarts.setdefault(marker.name, [done - job.step, seconds])


def report(job: Training, args: argparse.Namespace) -> dict:
    """What the kills have cost beside what to expect, and how often to save (Young, 1974)."""
    found: dict[str, Any] = {"restarts": job.restarts}
    if job.restarts:
        again, wait = (statistics.mean(x) for x in zip(*job.restarts.values(), strict=True))
        expected = f"{args.every / 2:.1f} predicted on average"
        say(f"per kill: {again:.1f} steps done again ({expected}), going on after {wait:.1f} s")
    if job.save_seconds and job.step_seconds[1:]:
        save_s = statistics.median(job.save_seconds)
        step_s = statistics.median(job.step_seconds[1:])  # the first steps warm up
        best = math.sqrt(2 * save_s * args.mtbf * 3600)
        share = save_s / (args.every * step_s)
        every = f"{args.every} steps of {step_s * 1e3:.1f} ms"
        say(f"saving: {save_s * 1e3:.1f} ms every {every}, {share:.1%} of the time")
        every = f"every {best / step_s:,.0f} steps ({best:.1f} s)"
        lost = f"{save_s / best:.2%} and as much done again"
        say(f"best at a failure in {args.mtbf:g} h: {every}, {lost}")
        found |= {"save_s": save_s, "step_s": step_s, "best_interval_s": best}
    return found


def compare(job: Training, reference: Training, args: argparse.Namespace) -> list[bool | None]:
    """Whether the run has ended as the undisturbed one; on other ranks, but for the dropout."""
    moved = len(set(job.places)) > 1
    expected = from_rank_0(job.digest) if moved else reference.digest()
    whose = "rank 0's" if moved else "the undisturbed run's"
    pairs = list(zip(job.history, reference.history, strict=True))
    other_batches = sum(ours[1] != undisturbed[1] for ours, undisturbed in pairs)
    differences = torch.tensor([abs(ours[0] - undisturbed[0]) for ours, undisturbed in pairs])
    claims = [
        check(f"digests of weights and optimizer other than {whose}", job.digest() != expected, 0),
        check("steps with another batch than undisturbed", other_batches, 0),
    ]
    if not moved or args.dropout == 0:
        bound = 1e-5 if moved else 0
        claims.append(check("max |loss - loss undisturbed|", differences.max().item(), bound))
    state, _ = newest_sound(args.dir)
    saved = state["step"] if state else 0
    claims.append(check("steps that the newest checkpoint lacks", args.steps - saved, 0))
    return claims


def run(args: argparse.Namespace, device: torch.device) -> list[bool | None]:
    if device.type != "cpu":  # sums in the same order every time
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    windows, _ = read_windows(args)
    job = Training(args, windows, device)
    here = job.places[0]
    path = from_rank_0(lambda: find_start(args, job.flags))
    if path:
        job.restore(load(path))  # each rank reads for itself: only the name goes over the network
    epoch, done = divmod(job.step, len(windows) // args.batch)
    found = f"epoch {epoch}, {done} batches done" if path else "nothing saved yet"
    say(f"{here}, from step {job.step} ({found}) to {args.steps}, saved in {args.dir}")
    note_restarts(job)
    if train(job, args):
        say(f"told to stop: ends after step {job.step}, the same command goes on")
        dist.barrier()
        dist.destroy_process_group()
        sys.exit(143)  # 128 + SIGTERM; with 0 a scheduler would take the job for finished
    found = report(job, args)
    reference = Training(args, windows, device)
    for window in reference.batches():
        reference.train_step(window)
    reference.pool()
    claims = compare(job, reference, args)
    if job.rank == 0 and all(claims):
        (args.dir / "finished").touch()
    if job.rank == 0 and args.json:
        found |= {"digest": job.digest(), "history": job.history, "flags": job.flags}
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return claims


def join_new_group(wanted: str) -> torch.device:
    """Chapter 1's join_group, but with a store in which there is nothing of an earlier start.

    torchrun keeps its store through all restarts, with the addresses of the dead in it: a prefix
    hides them. Several nodes count restarts each for itself; give them
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, and each start has a new store.
    """
    if "LOCAL_WORLD_SIZE" not in os.environ:
        stop(f"no launcher: type  torchrun --nproc_per_node=2 {sys.argv[0]}")
    store, rank, world_size = next(dist.rendezvous("env://"))
    ranks_here = int(os.environ["LOCAL_WORLD_SIZE"])
    if ranks_here == world_size:
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    if wanted == "auto":
        if ranks_here < world_size:
            stop("several nodes may differ: type --device cuda, or --device cpu")
        wanted = "cuda" if torch.cuda.device_count() >= ranks_here else "cpu"
    if wanted == "cpu":
        device = torch.device("cpu")
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    else:
        device = torch.device(wanted, int(os.environ["LOCAL_RANK"]))
        torch.accelerator.set_device_index(device.index)
        dist.init_process_group(store=store, rank=rank, world_size=world_size, device_id=device)
    dist.barrier()  # all are here before one may leave
    return device


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, default="resources/corpus.txt", help="text to learn, as bytes")
    add("--dir", type=Path, default="runs/ch03_elastic", help="folder of the checkpoints")
    add("--fresh", action="store_true", help="start from step 0; a run in --dir is set aside")
    add("--every", type=int, default=10, help="steps between checkpoints")
    add("--keep", type=int, default=2, help="checkpoints to keep, the newest")
    add("--kill-at", type=int, nargs="+", default=[27], help="steps to kill in; 0: never")
    add("--kill-rank", type=int, nargs="+", default=[], help="who, for each; default: the last")
    add("--kill-during-save", type=int, nargs="+", default=[], help="kill rank 0 saving these")
    add("--mtbf", type=float, default=3, help="hours between failures; Llama 3: 3, 16,384 GPUs")
    add("--steps", type=int, default=40, help="updates")
    add("--log-every", type=int, default=5, help="steps between two looks at loss and SIGTERM")
    add("--batch", type=int, default=16, help="windows per step, all ranks together")
    add("--lr", type=float, default=3e-3, help="learning rate at its peak")
    add("--dropout", type=float, default=0.1, help="share of values set to zero")
    add("--context", type=int, default=64, help="bytes per window")
    add("--width", type=int, default=64, help="size of a token's vector")
    add("--layers", type=int, default=2, help="transformer blocks")
    add("--heads", type=int, default=4, help="attention heads; 2 x heads divides --width")
    add("--seed", type=int, default=0, help="for weights, batches and dropout")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--json", type=Path, help="also write losses, seconds and the digest to this file")
    args = parser.parse_args()
    if args.width % (2 * args.heads):
        stop(f"--width {args.width} is no multiple of 2 x --heads {args.heads}")
    return args


@record  # so that torchrun's summary names the error
def main() -> None:
    args = parse_args()
    device = join_new_group(args.device)
    claims = run(args, device)
    dist.barrier()  # nobody leaves while another is at work
    dist.destroy_process_group()  # not in a `finally`: section 3.1
    sys.exit(conclude(claims))


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


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


# Copied from train_ddp_torchrun.rotate
def rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Turn each pair (x[i], x[i + d/2]) by its position's angle: RoPE (arXiv:2104.09864)."""
    cos, sin = rotation
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


# Copied from train_ddp_torchrun.ShareOfBatch
class ShareOfBatch(Sampler[list[int]]):
    """This rank's share of each global batch; the batches are the same at any world size."""

    def __init__(self, samples: int, batch: int, rank: int, world_size: int, seed: int):
        self.samples = samples
        self.batch = batch
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int, done: int = 0) -> None:
        """Choose the epoch's shuffle; `done` batches of it are skipped, for a resumed run."""
        self.epoch = epoch
        self.done = done

    def __len__(self) -> int:
        return self.samples // self.batch - self.done

    def __iter__(self) -> Iterator[list[int]]:
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.samples, generator=draw)  # equal on all ranks
        for step in range(self.done, self.samples // self.batch):
            whole = order[step * self.batch : (step + 1) * self.batch]
            yield whole[self.rank :: self.world_size].tolist()  # sizes may differ by one


# Copied from train_ddp_torchrun.batches
def batches(
    loader: DataLoader, sampler: ShareOfBatch, step: int, steps: int
) -> Iterator[torch.Tensor]:
    """This rank's windows of each step, [share, context + 1], from `step` on, over the epochs."""
    per_epoch = sampler.samples // sampler.batch
    while step < steps:
        sampler.set_epoch(step // per_epoch, done=step % per_epoch)
        for window in loader:
            yield window
            step += 1
            if step == steps:
                return


# Copied from train_ddp_torchrun.read_windows
def read_windows(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows to train on and, from the last tenth, to hold out: two [windows, context + 1].

    A window's last byte is the next one's first.
    """
    data = read_bytes(args.data, at_least=2 * (args.batch + 5) * args.context)
    split = len(data) * 9 // 10
    size = args.context + 1
    return data[:split].unfold(0, size, args.context), data[split:].unfold(0, size, args.context)


# Copied from train_ddp_torchrun.train_step
def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    window: torch.Tensor,
    batch: int,
    clip: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One update; returns this rank's part of the batch's mean loss, and the gradient's norm."""
    logits = model(window[:, :-1])  # [share, context, 256]
    total = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten(), reduction="sum")
    loss = total / (batch * logits.shape[1])  # over the tokens of the whole batch
    (loss * dist.get_world_size()).backward()  # as DDP divides the ranks' sum by their number
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip)  # averaged by now: equal on all ranks
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach(), norm


# Copied from train_ddp_torchrun.learning_rate
def learning_rate(step: int, warmup: int, steps: int) -> float:
    """Share of the peak: a line up, then half a cosine down to a tenth (arXiv:1608.03983)."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(steps - warmup, 1))


# Copied from ch01_single_gpu_baseline.read_bytes
def read_bytes(path: Path, at_least: int) -> torch.Tensor:
    """The file's bytes as integers from 0 to 255: [bytes]."""
    try:
        text = path.read_bytes()
    except OSError as error:
        stop(f"cannot read {path} ({error.strerror}): give a text file with --data FILE")
    if len(text) < at_least:
        stop(f"{path} has {len(text)} bytes, this run needs {at_least}: give a longer --data FILE")
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


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
