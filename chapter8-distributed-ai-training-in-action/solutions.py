"""Chapter 8's exercises, filled in."""

import json
import re
from pathlib import Path

import torch


def share_of_step(
    samples: int, batch: int, seed: int, step: int, rank: int, world_size: int
) -> list[int]:
    """Return the numbers of the samples that `rank` trains on in a global step, counted from 0."""
    if not world_size <= batch <= samples:
        raise ValueError(f"{world_size} ranks, a batch of {batch}, {samples} samples")
    epoch, number = divmod(step, samples // batch)
    draw = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order = torch.randperm(samples, generator=draw)
    return order[number * batch : (number + 1) * batch][rank::world_size].tolist()


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint that a run can go on from, and the names of newer, torn ones."""
    found = [p for p in folder.iterdir() if re.fullmatch(r"step-\d{6,}", p.name) and p.is_dir()]
    torn = []
    for path in sorted(found, key=lambda p: int(p.name[5:]), reverse=True):
        try:
            files = json.loads((path / "notes.json").read_text())["files"]
            sizes = {name: (path / name).stat().st_size for name in files}
            if sizes == files and ".metadata" in files:
                return path, torn
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass  # no notes, half of them, or a file that is not there
        torn.append(path.name)
    return None, torn


def place_in_mesh(
    rank: int, dp_replicate: int, dp_shard: int, tp: int, batch: int
) -> dict[str, list[int]]:
    """Return which windows of a batch a rank reads, and which ranks it works with."""
    n = dp_replicate * dp_shard * tp
    if min(dp_replicate, dp_shard, tp) < 1 or not 0 <= rank < n:
        raise ValueError(f"rank {rank} of {dp_replicate} x {dp_shard} x {tp}")
    place, column = divmod(rank, tp)
    first = place // dp_shard * dp_shard * tp  # of this replica's ranks
    return {
        "windows": list(range(place, batch, dp_replicate * dp_shard)),
        "tp": list(range(place * tp, (place + 1) * tp)),
        "dp_shard": list(range(first + column, first + dp_shard * tp, tp)),
        "dp_replicate": list(range(rank % (dp_shard * tp), n, dp_shard * tp)),
    }
