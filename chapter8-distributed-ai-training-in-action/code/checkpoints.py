"""Checkpoints of sharded training: saved behind its back, whole or not there. A module of train.py.

A save copies this rank's shards, and training goes on; a thread writes them. The folder is called
step-000012.draft until every file of every rank is on the disk, then step-000012. A newest one
that is torn all the same (a disk's fault, a copy that broke off) is refused in one line that names
it: moving it away, and going back to the one before, is yours to decide. Section 8.4.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from launch import say, stop
from torch import nn
from torch.distributed.checkpoint import state_dict

FLAT = state_dict.StateDictOptions(flatten_optimizer_state_dict=True)
Optimizers = list[torch.optim.Optimizer]


def state_of(model: nn.Module, optimizers: Optimizers) -> dict[str, dict[str, Any]]:
    """All that training changes, by name: of each tensor this rank's shard, as a DTensor."""
    weights, moments = state_dict.get_state_dict(model, optimizers, options=FLAT)
    return {"model": weights, "optimizer": moments}


class Checkpoints:
    """Those of one run. At most one is being written; `settle` waits for it."""

    def __init__(self, folder: Path, keep: int, log: Callable[..., None], timeout: timedelta):
        self.folder = folder
        self.keep = keep
        self.log = log
        self.group = dist.new_group(backend="gloo", timeout=timeout)  # the thread's own: no mix-up
        self.thread = ThreadPoolExecutor(1)
        self.pending: Future | None = None

    def save(self, model: nn.Module, optimizers: Optimizers, notes: dict, wait: bool) -> None:
        """Begin to save `notes["step"]`; returns when the shards are copied, or all is done."""
        self.settle()
        start = time.perf_counter()
        draft = self.folder / f"step-{notes['step']:06}.draft"
        if dist.get_rank() == 0:
            shutil.rmtree(draft, ignore_errors=True)
        dist.barrier(self.group)
        state = state_of(model, optimizers)
        upload = dcp.async_save(state, checkpoint_id=draft, process_group=self.group)
        blocked_s = None if wait else time.perf_counter() - start
        self.pending = self.thread.submit(self.finish, upload, draft, notes, start, blocked_s)
        if wait:
            self.settle()

    def finish(
        self, upload: Future, draft: Path, notes: dict, start: float, blocked_s: float | None
    ) -> None:
        """In the thread: when all ranks have written, give the folder its name."""
        try:
            upload.result()
            if dist.get_rank() > 0:
                return
            notes["files"] = {p.name: p.stat().st_size for p in draft.iterdir()}
            (draft / "notes.json").write_text(json.dumps(notes))
            sync(draft / "notes.json")
            sync(draft)
            shutil.rmtree(draft.with_suffix(""), ignore_errors=True)
            draft.rename(draft.with_suffix(""))
            sync(self.folder)
            for old in all_checkpoints(self.folder)[: -self.keep]:
                shutil.rmtree(old.rename(old.with_suffix(".draft")))
        except (OSError, dcp.CheckpointException) as error:
            self.give_up(draft, notes["step"], error)
        else:
            done_s = time.perf_counter() - start
            blocked_s = done_s if blocked_s is None else blocked_s
            self.log(event="save", step=notes["step"], blocked_s=blocked_s, done_s=done_s)

    def give_up(self, draft: Path, step: int, error: Exception) -> None:
        """A full disk costs a checkpoint, not the run."""
        shutil.rmtree(draft, ignore_errors=True)
        if isinstance(error, dcp.CheckpointException):
            error = next(iter(error.failures.values()))[0]
        reason = str(error).partition("\n")[0]
        newest = newest_checkpoint(self.folder)
        say(f"{step:>6}  not saved ({reason}); the newest is {newest.name if newest else 'none'}")
        self.log(event="save failed", step=step, reason=reason)

    def settle(self) -> None:
        """Wait until nothing is being written."""
        if self.pending:
            self.pending.result()
            self.pending = None


def all_checkpoints(folder: Path) -> list[Path]:
    """Oldest first; a draft is none."""
    found = [p for p in folder.glob("step-*") if re.fullmatch(r"step-\d{6,}", p.name)]
    return sorted(found, key=lambda p: int(p.name[5:]))


def newest_checkpoint(folder: Path) -> Path | None:
    return next(reversed(all_checkpoints(folder)), None)


def find_start(folder: Path, recipe: dict) -> tuple[Path, dict] | None:
    """On rank 0: the newest checkpoint and its notes, if it is whole and of the same run."""
    for draft in folder.glob("step-*.draft"):
        shutil.rmtree(draft)  # what a killed save has left
    path = newest_checkpoint(folder)
    if path is None:
        return None
    try:
        notes = json.loads((path / "notes.json").read_text())
        for name, size in notes.get("files", {}).items():
            found = (path / name).stat().st_size
            if found != size:
                raise ValueError(f"{name} has {found} of {size} bytes")
    except (OSError, ValueError) as error:
        before = [p.name for p in all_checkpoints(folder)[:-1]] or ["step 0"]
        stop(f"{path} is torn ({error}): move it away, and {before[-1]} is next")
    for name, value in recipe.items():
        saved = notes["recipe"].get(name, value)
        if saved != value:
            stop(f"{path} has {name} {saved}, this run {value}: another --out?")
    return path, notes


def load(path: Path, model: nn.Module, optimizers: Optimizers) -> None:
    """Put a checkpoint, of any number of ranks and any layout, into model and optimizers."""
    state = state_of(model, optimizers)
    try:
        dcp.load(state, checkpoint_id=path)  # each rank reads what overlaps with its shards
    except dcp.CheckpointException as error:  # on all ranks, if on one
        cause = str(next(iter(error.failures.values()))[0]).partition("\n")[0]
        stop(f"cannot load {path} ({cause}): move it away, and the one before it is next")
    parts = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
    state_dict.set_state_dict(model, optimizers, **parts, options=FLAT)


def make_folder(folder: Path, parameters: int) -> None:
    """Of checkpoints: one has to fit, weights and two moments of four bytes each."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "log.jsonl").open("a").close()
    except OSError as error:
        stop(f"cannot write in {folder} ({error.strerror}): type another --out")
    needed = 12 * parameters
    free = shutil.disk_usage(folder).free
    if free < needed:
        stop(f"{folder} has {free / 1e6:,.0f} MB free, a checkpoint takes {needed / 1e6:,.0f}")


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


# Copied from train_elastic_checkpoint.sync
def sync(path: Path) -> None:
    """Wait until a file's bytes, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
