"""One function to fill in, of about 25 lines; its docstring says what it must do and cost.

    pytest tests/chapter11/test_exercises.py --mine

grades this file, and without --mine the answer in solutions.py. Import what you need: PyTorch is
enough.
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
    """1. The server's average when some clients lie. Section 11.4.

    Client i sends `changes[i]`, a float tensor, and says that it comes from `examples[i]` examples.
    `shape` is what the model has, [parameters]. Leave out a client that has sent nothing (None),
    another shape, a number that is not finite anywhere, or fewer than 1 example.

    Up to `byzantine` of the clients that are left may have sent anything at all. So for each
    parameter by itself throw away the `byzantine` largest and the `byzantine` smallest numbers, and
    average the others, each weighted by its client's examples: a coordinate-wise trimmed mean
    (Yin et al. 2018, arXiv:1803.01498, definition 2, there without weights). With `byzantine` 0
    it is FedAvg's average. Whatever the liars send, and however many examples they claim, the
    result then lies between the smallest and the largest number of an honest client.

    Raise ValueError if fewer than 2 byzantine + 1 clients are left.

    Return [parameters], of the dtype of the first change that counts, summed in float64. What was
    sent is not changed.

    Cost: models are large, and there are many clients. Beside the result, and what was sent, you
    make no tensor of more than `scratch` elements, or of more than there are clients if that is
    more: go through the parameters in blocks.
    """
    raise NotImplementedError
