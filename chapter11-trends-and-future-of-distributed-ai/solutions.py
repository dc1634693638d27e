"""The answer to exercises.py, which says what the function must do and cost.

pytest tests/chapter11/test_exercises.py
"""

from collections.abc import Sequence

import torch


def robust_average(
    changes: Sequence[torch.Tensor | None],
    examples: Sequence[int],
    shape: torch.Size,
    byzantine: int,
    scratch: int = 1 << 20,
) -> torch.Tensor:
    """Sort each block of parameters over the clients, and take the weights along."""
    kept = [
        (change, count)
        for change, count in zip(changes, examples, strict=True)
        if change is not None and change.shape == shape and count >= 1
        if all(part.isfinite().all() for part in change.split(scratch))
    ]
    if len(kept) < 2 * byzantine + 1:
        raise ValueError(f"{len(kept)} clients are left, {byzantine} liars need more to outvote")
    first = kept[0][0]
    weights = torch.tensor([count for _, count in kept], dtype=torch.float64, device=first.device)
    result = torch.empty_like(first)
    block = max(1, scratch // len(kept))
    for start in range(0, len(result), block):
        part = slice(start, start + block)
        values = torch.stack([change[part].double() for change, _ in kept])  # [clients, block]
        values, order = values.sort(dim=0)
        middle = slice(byzantine, len(kept) - byzantine)
        shares = weights[order[middle]]
        result[part] = (values[middle] * shares).sum(0) / shares.sum(0)
    return result
