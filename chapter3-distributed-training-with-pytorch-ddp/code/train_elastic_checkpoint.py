"""A worker is killed, torchrun starts all of them again, and the run ends, bit for bit, as if undisturbed.

    torchrun --nproc_per_node=2 --max-restarts=3 chapter3-distributed-training-with-pytorch-ddp/code/train_elastic_checkpoint.py

On GPUs:
    torchrun --nproc_per_node=8 --max-restarts=3 chapter3-distributed-training-with-pytorch-ddp/code/train_elastic_checkpoint.py --width 1024 --layers 12 --heads 16 --context 512 --steps 200

Look at the step from which the second start goes on, and at the checks: they compare with a run that
nothing disturbed. Without --max-restarts a kill ends the run, and the same command again resumes it.
Try --kill-at 13 27 --kill-rank 0 1 --kill-during-save 30, or kill -9 a rank yourself. Section 3.7.
"""

import argparse
import fcntl
import gc
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
from typing import Any

import torch
import torch._dynamo  # DDP's; before there is a group: section 3.8
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Sampler

MUST_MATCH = ("width", "layers", "heads", "context", "dropout", "batch", "steps", "lr", "seed")
PLAIN = ("step", "epoch", "done", "history", "places", "restarts", "flags")  # saved as they are


class Block(nn.Module):
    """Llama's: rotary attention, then SwiGLU, each behind an RMSNorm and added to what comes in."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, hidden = heads, 8 * width // 3
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


class ByteLM(nn.Module):
    """A small decoder-only transformer of Llama's shape (arXiv:2302.13971) whose tokens are bytes."""

    def __init__(self, width: int, layers: int, heads: int, context: int, dropout: float = 0.0):
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
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


class Training:
    """All that a step reads and changes. What `state` leaves out, a restart loses."""

    def __init__(self, args: argparse.Namespace, data: torch.Tensor, device: torch.device):
        self.args, self.device = args, device
        self.rank, self.world_size = rank, n = dist.get_rank(), dist.get_world_size()
        torch.manual_seed(args.seed)
        model = ByteLM(args.width, args.layers, args.heads, args.context, args.dropout)
        self.model = DistributedDataParallel(model.to(device))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=args.lr)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: min(1, (step + 1) / 5) * (1 + math.cos(math.pi * step / args.steps)) / 2,
        )
        windows = data.unfold(0, args.context + 1, args.context)  # [windows, context + 1]
        self.sampler = ShareOfBatch(len(windows), args.batch, rank, n, args.seed)
        # A loader draws a seed whenever it starts, and must not draw it where dropout draws.
        own = torch.Generator()
        self.loader = DataLoader(windows, batch_size=None, sampler=self.sampler, generator=own)
        self.batches = self.walk()
        self.step = self.epoch = self.done = 0
        self.history: list[list[float]] = []  # of each step: loss, sum of the batch's bytes
        self.places = [f"{n} rank{'s' * (n > 1)} on {device.type}"]  # where it was trained
        self.restarts: dict[str, list[float]] = {}  # of each kill: steps done again, seconds lost
        self.flags = {name: getattr(args, name) for name in MUST_MATCH}
        self.flags["data"] = hashlib.sha256(data.numpy()).hexdigest()[:12]
        self.told_to_stop = False
        self.step_seconds: list[float] = []
        self.save_seconds: list[float] = []
        on_gpu = [torch.get_device_module(device)] if device.type != "cpu" else []
        self.generators = [torch, *on_gpu]  # dropout on a GPU draws from the GPU's
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

    def walk(self) -> Iterator[torch.Tensor]:
        """The batches from (epoch, done) on, for ever."""
        while True:
            self.sampler.set_epoch(self.epoch, self.done)
            for windows in self.loader:
                self.done += 1
                yield windows
            self.epoch, self.done = self.epoch + 1, 0

    def train_step(self) -> bool:
        """One update. Returns whether a rank was told to stop: all learn of it in the same step."""
        windows = next(self.batches).to(self.device)  # [share of batch, context + 1]
        logits = self.model(windows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="sum")
        loss = loss / (self.args.batch * self.args.context)
        (loss * self.world_size).backward()  # DDP divides by it
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        tally = [loss.item(), windows.sum().item(), self.told_to_stop]
        tally = torch.tensor(tally, dtype=torch.double, device=self.device)
        dist.all_reduce(tally)
        *record, told = tally.tolist()
        self.history.append(record)
        self.step += 1
        return told > 0

    def digest(self) -> str:
        """SHA-256 over every bit of this rank's weights and optimizer state."""
        states = self.optimizer.state_dict()["state"]
        tensors = [states[i][name] for i in sorted(states) for name in sorted(states[i])]
        sha = hashlib.sha256()
        for tensor in (*self.model.parameters(), *tensors):
            sha.update(tensor.detach().cpu().numpy())
        return sha.hexdigest()


def save(folder: Path, state: dict, keep: int) -> int:
    """Put a checkpoint on the disk for good, then delete all but the `keep` newest; returns bytes.

    SIGKILL or a full disk (OSError) may end it anywhere: every checkpoint in the folder is whole.
    """
    stream = io.BytesIO()
    torch.save(state, stream)
    content, partial = stream.getvalue(), folder / "partial"
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
    """What `save` saved; the very bytes that were checked are loaded."""
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


def find_start(args: argparse.Namespace, flags: dict) -> dict | None:
    """On rank 0: the state to start from; None if nothing was saved yet. Exits sooner than lose any."""
    folder = args.dir
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)  # open, and so locked, while we live
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"another run is at work in {folder}: give another --dir")
    fresh = args.fresh and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    ours = [path for name in ("step-*", "killed-*", "finished") for path in folder.glob(name)]
    if ours and (fresh or (folder / "finished").exists()):
        say(f"{folder}: the run that was there is now in {set_aside(folder, ours).name}")
    state, unsound = newest_sound(folder)
    ailing = [f"{path.name} is not sound ({why})" for path, why in unsound.items()]
    if unsound and state is None:
        sys.exit(f"{folder}: {ailing[0]}, nor is any other; --fresh starts again from step 0")
    was = state.get("flags", {}) if state else flags
    other = [f"{k} {was.get(k)}, not {flags[k]}" for k in flags if was.get(k) != flags[k]]
    if other:
        sys.exit(f"{folder} has a run with {'; '.join(other)}: give another --dir, or --fresh")
    if unsound:
        set_aside(folder, [*unsound])
        say("\n".join(f"{line}: back to step {state['step']}" for line in ailing))
    return state


def set_aside(folder: Path, paths: list[Path]) -> Path:
    """Move into a new subfolder. Only checkpoints that newer ones have replaced are ever deleted."""
    aside = next(p for n in itertools.count(1) if not (p := folder / f"aside-{n}").exists())
    aside.mkdir()
    for path in paths:
        path.rename(aside / path.name)
    return aside


def from_rank_0(work: Callable[[], Any]) -> Any:
    """What `work` returns on rank 0, on every rank; if it exits there, all ranks do."""
    answer = [None, ""]
    if dist.get_rank() == 0:
        try:
            answer[0] = work()
        except (SystemExit, OSError) as error:
            answer[1] = f"{error}"
            sys.stderr.write(f"{error}\n")
    dist.broadcast_object_list(answer)
    if answer[1]:
        sys.exit(2)
    return answer[0]


def train(job: Training, args: argparse.Namespace) -> bool:
    """Train and save, until the last step or SIGTERM; returns whether it was SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: setattr(job, "told_to_stop", True))
    start, stopping = job.step, False
    while job.step < args.steps and not stopping:
        inject(job, args)
        began = time.perf_counter()
        stopping = job.train_step()
        job.step_seconds.append(time.perf_counter() - began)
        if job.step == start + 1:
            note_restarts(job, start)
        if stopping or job.step == args.steps or job.step % args.every == 0:
            save_or_go_on(job, args)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return stopping


def save_or_go_on(job: Training, args: argparse.Namespace) -> None:
    """A full disk costs a checkpoint, not the run."""
    began = time.perf_counter()
    state = job.state()
    if job.rank > 0:
        return  # and wait for rank 0 in the next all-reduce
    try:
        size = save(args.dir, state, args.keep)
    except OSError as error:
        shutil.rmtree(args.dir / "partial", ignore_errors=True)
        newest = [path.name for path in checkpoints(args.dir)] or ["none"]
        say(f"step {job.step}: saving failed ({error.strerror}), the newest is {newest[-1]}")
        return
    seconds, loss = time.perf_counter() - began, job.history[-1][0]
    job.save_seconds.append(seconds)
    took = f"{size / 1e6:.2f} MB saved in {seconds * 1e3:.0f} ms"
    say(f"step {job.step:>6}: loss {loss:.3f}, {took}")


def inject(job: Training, args: argparse.Namespace) -> None:
    """Die in the coming step, or in the save after it, if told to: once in the life of a run."""
    step, ranks = job.step + 1, itertools.cycle(args.kill_rank or [job.world_size - 1])
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


def note_restarts(job: Training, start: int) -> None:
    """After the first new step: what the kills since the last note have cost."""
    for marker in job.args.dir.glob("killed-*"):
        done, when = int(marker.name.split("-")[2]), marker.stat().st_mtime
        job.restarts.setdefault(marker.name, [done - start, time.time() - when])


def report(job: Training, args: argparse.Namespace) -> dict:
    """What the kills have cost beside what to expect, and how often to save (Young, 1974)."""
    found: dict[str, Any] = {"restarts": job.restarts}
    if job.restarts:
        again, wait = (statistics.mean(x) for x in zip(*job.restarts.values(), strict=True))
        expected = f"{args.every / 2:.1f} predicted on average"
        say(f"per kill: {again:.1f} steps done again ({expected}), the next after {wait:.1f} s")
    if job.save_seconds and job.step_seconds[1:]:
        save_s, step_s = (statistics.median(x) for x in (job.save_seconds, job.step_seconds[1:]))
        best = math.sqrt(2 * save_s * args.mtbf * 3600)
        share, least = save_s / (args.every * step_s), save_s / best
        every = f"{args.every} steps of {step_s * 1e3:.1f} ms"
        say(f"saving: {save_s * 1e3:.1f} ms every {every}, {share:.1%} of the time")
        every = f"{best / step_s:,.0f} steps ({best:.1f} s)"
        say(
            f"best at a failure in {args.mtbf:g} h: every {every}, {least:.2%} and as much done again"
        )
        found |= {"save_s": save_s, "step_s": step_s, "best_interval_s": best}
    return found


def compare(job: Training, reference: Training, args: argparse.Namespace) -> bool:
    """Whether the run has ended as the undisturbed one; on other ranks, but for the dropout."""
    moved = len(set(job.places)) > 1
    expected = from_rank_0(job.digest) if moved else reference.digest()
    whose = "rank 0's" if moved else "the undisturbed run's"
    pairs = list(zip(job.history, reference.history, strict=True))
    batches = sum(mine[1] != its[1] for mine, its in pairs)
    apart = torch.tensor([abs(mine[0] - its[0]) for mine, its in pairs]).max().item()
    held = [
        check(f"digests of weights and optimizer other than {whose}", job.digest() != expected, 0),
        check("steps with another batch than undisturbed", batches, 0),
    ]
    if not moved or args.dropout == 0:
        held.append(check("max |loss - loss undisturbed|", apart, 1e-5 if moved else 0))
    saved = from_rank_0(lambda: (newest_sound(args.dir)[0] or {"step": 0})["step"])
    held.append(check("steps that the newest checkpoint lacks", args.steps - saved, 0))
    return all(held)


def run(args: argparse.Namespace, device: torch.device) -> bool:
    rank, n = dist.get_rank(), dist.get_world_size()
    if max([0, *args.kill_rank]) >= n:
        stop(f"--kill-rank {max(args.kill_rank)}: there are ranks 0 to {n - 1}")
    if device.type != "cpu":  # sums in the same order every time
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    data = read_bytes(args.data, at_least=args.batch * args.context + 1)
    job = Training(args, data, device)
    here, state = job.places[0], from_rank_0(lambda: find_start(args, job.flags))
    if state:
        job.restore(state)
    found = f"epoch {job.epoch}, {job.done} batches done" if state else "nothing saved yet"
    say(f"{here}, from step {job.step} ({found}) to {args.steps}, saved in {args.dir}")
    if train(job, args):
        say(f"told to stop: ends after step {job.step}, the same command goes on")
        dist.barrier()
        sys.exit(143)  # 128 + SIGTERM; with 0 a scheduler would take the job for finished
    found = report(job, args)
    reference = Training(args, data, device)
    while reference.step < args.steps:
        reference.train_step()
    held = compare(job, reference, args)
    if rank == 0 and held:
        (args.dir / "finished").touch()
    if rank == 0 and args.json:
        found |= {"digest": job.digest(), "history": job.history, "flags": job.flags}
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return held


def check(claim: str, value: float, bound: float) -> bool:
    """Print whether the worst rank keeps `value` within `bound`; every rank gets the same answer."""
    values = [0.0] * dist.get_world_size()
    dist.all_gather_object(values, value)
    held = all(v <= bound for v in values)  # false for NaN
    say(f"check: {claim} = {max(values):.3g} <= {bound:.3g}  {'ok' if held else 'FAILED'}")
    return held


def say(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)


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
    # torchrun keeps its store through all restarts, with the addresses of the dead in it: a prefix
    # hides them. Several nodes count restarts each for itself; give them
    # TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, and each start has a new store.
    store, rank, world_size = next(dist.rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    backend, bound = ("gloo", None) if device.type == "cpu" else (None, device)  # None: PyTorch's
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, device_id=bound)
    dist.barrier()  # all are here, before one may leave for what it is given
    return device


def stop(message: str) -> None:
    sys.stderr.write(message + "\n")  # in one piece: other ranks write too
    sys.exit(2)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: stop(f"{message}: --help lists the flags")
    chapter, runs = Path(__file__).resolve().parents[1], Path("runs")
    add = parser.add_argument
    add("--data", type=Path, default=chapter / "main.md", help="text; default: the chapter")
    add("--dir", type=Path, default=runs / "ch03_elastic", help="folder of the checkpoints")
    add("--fresh", action="store_true", help="start from step 0; a run in --dir is set aside")
    add("--every", type=positive, default=10, help="steps between checkpoints")
    add("--keep", type=positive, default=2, help="checkpoints to keep, the newest")
    add("--kill-at", type=int, nargs="+", default=[27], help="steps to kill in; 0: never")
    add("--kill-rank", type=int, nargs="+", default=[], help="who, for each; default: the last")
    add("--kill-during-save", type=int, nargs="+", default=[], help="kill rank 0 saving these")
    add("--mtbf", type=float, default=3, help="hours between failures; Llama 3: 3, 16,384 GPUs")
    add("--steps", type=positive, default=40, help="updates")
    add("--batch", type=positive, default=16, help="windows per step, all ranks together")
    add("--lr", type=float, default=3e-3, help="learning rate at its peak")
    add("--dropout", type=float, default=0.1, help="share of values set to zero")
    add("--context", type=positive, default=64, help="bytes per window")
    add("--width", type=positive, default=64, help="size of a token's vector")
    add("--layers", type=positive, default=2, help="transformer blocks")
    add("--heads", type=positive, default=4, help="attention heads; 2 x heads divides --width")
    add("--seed", type=int, default=0, help="for weights, batches and dropout")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--json", type=Path, help="also write losses, seconds and the digest to this file")
    args = parser.parse_args()
    if args.width % (2 * args.heads):
        stop(f"--width {args.width} is no multiple of 2 x --heads {args.heads}")
    if args.json and not args.json.parent.is_dir():
        stop(f"--json {args.json}: there is no folder {args.json.parent}")
    if not (0 <= args.dropout < 1 and args.mtbf > 0):
        stop("--dropout is 0 or more and below 1, --mtbf above 0 hours")
    return args


def main() -> None:
    args = parse_args()
    device = join_group(args.device)
    try:
        held = run(args, device)
        dist.barrier()
    except RuntimeError as error:
        if "by peer" not in str(error):  # gloo's words for it
            raise
        sys.exit(f"rank {dist.get_rank()}: connection closed by another rank, which is gone")
    finally:
        gc.collect()  # a trainer and its batches hold each other, and with DDP the group
        dist.destroy_process_group()
    sys.exit(not held)


if __name__ == "__main__":
    main()
