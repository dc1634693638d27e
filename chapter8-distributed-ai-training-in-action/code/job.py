"""One run of train.py as its launcher sees it: ranks, their logs, their ends. A module of chaos.py.

A rank is a fork of this process, which has imported torch and used no device and no thread: it
starts in a second where torchrun starts Python anew. What runs in it is train.py's main, unchanged.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
import train
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

TINY = "--width 64 --layers 2 --heads 4 --kv-heads 2 --hidden 128 --context 64 --batch 8"
DEADLINE_S = 120  # nothing here waits longer


class Job:
    """A run through its faults, in a folder of its own; `start` again goes on where it was."""

    def __init__(self, name: str, args: argparse.Namespace):
        self.args = args
        self.folder = args.out / name
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.draw = random.Random(f"{name} {args.seed}")
        self.rank = self.draw.randrange(args.ranks)  # whom the fault strikes
        first = 2 * args.save_every + 1  # a checkpoint is whole by then
        self.step = self.draw.randrange(first, args.steps - 3)  # and when
        self.strikes: list[tuple[float, int]] = []  # of each fault: time.time(), step
        self.pids: list[int] = []
        self.codes: dict[int, int] = {}  # of ranks that have ended; negative: by that signal
        self.logs = [self.folder / f"rank-{rank}.log" for rank in range(args.ranks)]
        self.log = self.folder / "log.jsonl"
        self.begins: dict[Path, int] = {}  # where in each log the latest start begins
        self.reached_before = 0  # steps that are done, by any start
        self.lost: list[int] = []  # by each resume: steps to do again
        self.astray = 0  # resumes that did not go on from the newest checkpoint
        self.left = 0  # processes that outlived their rank: loader workers

    def start(self, *flags: str, before: Callable[[int], None] | None = None) -> None:
        """Start all ranks, at the newest checkpoint if there is one. `before` runs in each."""
        args = self.args
        again = bool(self.pids)
        newest = max((int(path.name[5:]) for path in self.checkpoints()), default=0)
        self.begins = {p: p.stat().st_size for p in (*self.logs, self.log) if p.exists()}
        argv = f"{TINY} --steps {args.steps} --save-every {args.save_every} --log-every 1 --resume"
        argv += f" --out {self.folder} --data {args.data}"
        command = ["train.py", *argv.split(), "--device", args.device, *args.more, *flags]
        port = free_port()
        self.codes = {}
        self.pids = [
            fork_rank(rank, args.ranks, port, command, log, before)
            for rank, log in enumerate(self.logs)
        ]
        self.until(lambda: self.events("start"))
        if again and (started := self.events("start")):
            self.lost.append(self.reached_before - started[0]["step"])
            self.astray += started[0]["step"] != newest

    def checkpoints(self) -> list[Path]:
        return [p for p in self.folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name)]

    def text(self, log: Path) -> str:
        """What the latest start has written to a log."""
        if not log.exists():
            return ""
        return log.read_bytes()[self.begins.get(log, 0) :].decode(errors="replace")

    def events(self, kind: str) -> list[dict]:
        whole_lines = self.text(self.log).split("\n")[:-1]
        events = [json.loads(line) for line in whole_lines if line]
        return [event for event in events if event["event"] == kind]

    def reached(self) -> int:
        """The last step that the latest start has logged; where it started if it has none."""
        return max((e["step"] for e in self.events("start") + self.events("step")), default=0)

    def reap(self) -> list[int]:
        """Collect exit codes; returns the ranks that still run."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return [rank for rank in range(len(self.pids)) if rank not in self.codes]

    def until(self, condition: Callable[[], object], patience_s: float = DEADLINE_S) -> float:
        """Seconds until a condition holds, all ranks have ended or patience has."""
        begin = time.monotonic()
        while not condition() and self.reap() and time.monotonic() < begin + patience_s:
            time.sleep(0.002)
        return time.monotonic() - begin

    def until_step(self, step: int) -> None:
        self.until(lambda: self.reached() >= step)

    def strike(self) -> None:
        """Note that a fault happens now."""
        self.strikes.append((time.time(), self.reached()))

    def signal(self, number: int, *ranks: int, groups: bool = False) -> None:
        """Send a signal to ranks that still run, or to all that each of them has started."""
        for rank in set(ranks) & set(self.reap()):
            (os.killpg if groups else os.kill)(self.pids[rank], number)

    def noticed(self, pattern: str) -> tuple[float, str]:
        """Seconds from now until a rank's log says it, and that line ("" if none ever does)."""
        seconds = self.until(lambda: self.said(pattern))
        return seconds, self.said(pattern)

    def said(self, pattern: str) -> str:
        for rank, log in enumerate(self.logs):
            for line in self.text(log).splitlines():
                if re.search(pattern, line):
                    line = re.sub(r"\[/\S+\] ", "", line.strip())  # a source file of PyTorch's
                    line = line.replace(f"{self.folder}/", "").partition(". ")[0]
                    return line if line.startswith("rank ") else f"rank {rank}: {line}"
        return ""

    def wait(self) -> str:
        """As torchrun does: once a rank fails the others get SIGTERM, then SIGKILL. Exit codes."""
        self.until(lambda: any(self.codes.values()))
        self.signal(signal.SIGTERM, *self.reap())
        self.until(lambda: False, patience_s=2)
        self.kill()
        self.reached_before = max(self.reached_before, self.reached())
        self.left += still_there(self.pids)
        return " ".join(str(self.codes[rank]) for rank in range(len(self.pids)))

    def kill(self) -> None:
        for rank in self.reap():
            os.kill(self.pids[rank], signal.SIGKILL)
            self.codes[rank] = os.waitstatus_to_exitcode(os.waitpid(self.pids[rank], 0)[1])

    def final(self) -> dict[str, torch.Tensor]:
        """Every tensor of the last step's checkpoint, whole: weights and moments."""
        path = self.folder / f"step-{self.args.steps:06}"
        if not path.is_dir():
            return {}
        entries = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        state = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # yes, there is no process group
            dcp.load(state, checkpoint_id=path, no_dist=True)
        return state


def fork_rank(
    rank: int,
    ranks: int,
    port: int,
    command: list[str],
    log: Path,
    before: Callable[[int], None] | None,
) -> int:
    """Run train.py's main as one rank, all that it prints into `log`; returns the process id."""
    pid = os.fork()
    if pid:
        return pid
    code: object = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.setsid()  # so that all it starts can be signalled, and counted
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        os.environ.update({name: str(value) for name, value in place.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        sys.argv = command
        if before:
            before(rank)
        train.main()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code if isinstance(code, int) else 1)


def still_there(groups: list[int], patience_s: float = 10) -> int:
    """Groups in which something outlives its rank by that: loader workers look every 5 s."""
    begin = time.monotonic()
    while any(map(group_lives, groups)) and time.monotonic() < begin + patience_s:
        time.sleep(0.01)
    return sum(map(group_lives, groups))


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


# Copied from vllm_server.free_port
def free_port() -> int:
    """A port of 127.0.0.1 that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
