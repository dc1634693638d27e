"""Token files as windows: shuffled by a seed, cut to a rank's share, resumable. A module of train.py.

The order of windows is a function of seed and epoch alone. A place in it is two numbers, epoch and
batch, and means the same to any number of ranks and of loader processes. Section 8.2.
"""

import json
import signal
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import torch
from launch import stop
from prepare_data import digest
from safetensors import SafetensorError, safe_open
from torch.utils.data import DataLoader, Dataset


def read_meta(folder: Path) -> dict:
    """What prepare_data.py wrote beside the tokens."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
    except FileNotFoundError:
        name = "prepare_data.py's folder, or a new name"
        stop(f"cannot read {folder}/meta.json, there is none: type --data with {name}")
    except (OSError, ValueError) as error:
        stop(f"cannot read {folder}/meta.json ({error}): delete {folder}, and it is made again")
    if "shards" not in meta.get("train", {}):
        stop(f"{folder} was made by an older prepare_data.py: delete it, and it is made again")
    return meta


def shards_of(meta: dict, part: str) -> list[dict]:
    """The files of "train" or "held_out": each {"file", "tokens", "digest"} and more."""
    return meta[part]["shards"]


class Tokens(Dataset):
    """Some shards as one row of tokens, and that as windows of context + 1.

    A window's last token is the first of the next. Files are mapped: only what is read is loaded.
    """

    def __init__(self, folder: Path, shards: list[dict], context: int):
        self.paths = [folder / shard["file"] for shard in shards]
        self.starts = [0, *accumulate(shard["tokens"] for shard in shards)]
        self.context = context
        self.files: dict[int, safe_open] = {}

    def __getstate__(self) -> dict:
        return self.__dict__ | {"files": {}}  # each process opens its own

    def __len__(self) -> int:
        return max(0, (self.starts[-1] - 1) // self.context)

    def __getitem__(self, windows: list[int]) -> torch.Tensor:  # [windows, context + 1]
        return torch.stack([self.read(w * self.context, self.context + 1) for w in windows])

    def read(self, start: int, count: int) -> torch.Tensor:
        """Tokens from `start` on, out of as many shards as they lie in."""
        parts = []
        while count:
            number = bisect_right(self.starts, start) - 1
            if number not in self.files:
                self.files[number] = safe_open(self.paths[number], "pt")
            stop_at = min(start + count, self.starts[number + 1])
            first = start - self.starts[number]
            tokens = self.files[number].get_slice("tokens")
            parts.append(tokens[first : first + stop_at - start].long())
            count -= stop_at - start
            start = stop_at
        return torch.cat(parts)


class Loader:
    """This rank's windows of one global batch after another, without end.

    `state_dict` is the place in the order: it belongs into the checkpoint, one for all ranks.
    """

    def __init__(
        self,
        windows: Tokens,
        batch: int,
        rank: int,
        size: int,
        seed: int,
        workers: int = 0,
        pin_memory: bool = False,
    ):
        self.windows = windows
        self.batch = batch
        self.rank = rank
        self.size = size
        self.seed = seed
        self.workers = workers
        self.pin_memory = pin_memory
        self.per_epoch = len(windows) // batch  # what is left over waits for the next shuffle
        self.epoch = 0
        self.batches = 0  # handed out in this epoch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "batch": self.batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch = state["epoch"]
        self.batches = state["batch"]

    def __iter__(self) -> Iterator[torch.Tensor]:
        loader = DataLoader(
            self.windows,
            batch_size=None,
            sampler=self.shares(),
            num_workers=self.workers,
            pin_memory=self.pin_memory,
            worker_init_fn=outlive_signals,
        )
        for window in loader:  # workers are ahead: what counts is what has been handed out
            self.batches += 1
            if self.batches == self.per_epoch:
                self.epoch += 1
                self.batches = 0
            yield window

    def shares(self) -> Iterator[list[int]]:
        """Which windows this rank reads, batch by batch; sizes may differ by one between ranks."""
        epoch = self.epoch
        done = self.batches
        while True:
            draw = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
            order = torch.randperm(len(self.windows), generator=draw)  # equal on all ranks
            for whole in order.split(self.batch)[done : self.per_epoch]:
                yield whole[self.rank :: self.size].tolist()
            epoch += 1
            done = 0


def outlive_signals(_: int) -> None:
    """A scheduler tells every process to end; a loader's has to serve until its rank has saved."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def refuse_damage(folder: Path, shards: list[dict]) -> None:
    """Read shards to the end and hold them against their digests in meta.json."""
    for shard in shards:
        path = folder / shard["file"]
        try:
            with safe_open(path, "pt") as file:
                found = digest(file.get_tensor("tokens"))
        except (OSError, SafetensorError) as error:
            found = str(error).partition("\n")[0]
        if found != shard["digest"]:
            what = f"{found}, and meta.json says {shard['digest']}"
            stop(f"{path} is damaged ({what}): delete {folder}, and it is made again")
