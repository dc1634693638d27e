"""Chapter 8's exercise, filled in."""

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
