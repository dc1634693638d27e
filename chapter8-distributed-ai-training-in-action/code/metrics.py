"""What a run says of itself: a log in JSON lines, time outside of collectives, MFU. For train.py.

A slow rank makes all ranks slow, since they wait for it: their step times are equal. What differs is
how long each of them is busy by itself. Section 8.2.
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Dense bfloat16 FLOP/s of data sheets.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}


class Log:
    """Lines of JSON at the end of a file, each in one piece."""

    def __init__(self, folder: Path | None, tensorboard: Path | None):
        self.file = None
        self.writer = None
        if folder:
            path = folder / "log.jsonl"
            self.file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
            size = os.fstat(self.file).st_size
            if dist.get_rank() == 0 and size and os.pread(self.file, 1, size - 1) != b"\n":
                os.write(self.file, b"\n")  # after half a line of a run that was killed
        if dist.get_rank() == 0 and tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(tensorboard)

    def of_any_rank(self, **fields: Any) -> None:
        if self.file is not None:
            line = json.dumps(fields | {"time": round(time.time(), 3)}) + "\n"
            with suppress(OSError):  # a full disk costs lines, not the run
                os.write(self.file, line.encode())

    def __call__(self, **fields: Any) -> None:
        """Of rank 0 only."""
        if dist.get_rank() == 0:
            self.of_any_rank(**fields)
        if self.writer and fields["event"] == "step":
            for name in fields.keys() - {"event", "step"}:
                self.writer.add_scalar(name, fields[name], fields["step"])
            self.writer.flush()


class Busy:
    """Seconds that this rank computes where no collective is: it cannot be waiting for another.

    On a GPU by events, which nobody waits for until the log line does.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.spans: list[tuple[Any, Any]] = []

    @contextmanager
    def __call__(self) -> Iterator[None]:
        start = self.now()
        yield
        self.spans.append((start, self.now()))

    def now(self) -> Any:
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.Event(self.device, enable_timing=True)
        event.record()
        return event

    def seconds(self) -> float:
        """Of all spans since the last call."""
        on_cpu = self.device.type == "cpu"
        found = [b - a if on_cpu else a.elapsed_time(b) / 1e3 for a, b in self.spans]
        self.spans.clear()
        return sum(found)


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s that all ranks' devices could do at most, and where the number comes from."""
    n = dist.get_world_size()
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for part, peak in PEAKS.items():
            if part in name:
                return n * peak, f"{peak / 1e12:.0f} TFLOP/s of a data sheet, {name}"
    size = 768 if device.type == "cpu" else 8192
    a = torch.ones(size, size, device=device, dtype=dtype)
    dist.barrier()  # all at once: they may share cores
    best_s = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best_s = min(best_s, time.perf_counter() - start)
    total = torch.tensor(2 * size**3 / best_s, dtype=torch.double, device=device)
    dist.all_reduce(total)
    return total.item(), f"what a product of {size} x {size} reaches here"
