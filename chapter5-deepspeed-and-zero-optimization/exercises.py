"""One function to fill in, of about 20 lines; its docstring says what it must do and cost.

    pytest tests/chapter5/test_exercises.py --mine

grades this file, and without --mine the answer in solutions.py. Import what you need: PyTorch is
enough. The process group exists when your function is called, all ranks call it at the same time,
and any world size from 1 up must work.
"""

import torch


def zero1_step(
    weights: torch.Tensor,
    gradient: torch.Tensor,
    state: dict[str, torch.Tensor],
    lr: float,
    max_norm: float,
) -> float:
    """1. One step of ZeRO-1: each rank clips and updates its part of the weights. Section 5.2.

    `weights`, float, [count], is the flat parameter, equal on all ranks when you are called and when
    you return: change it in place. `gradient`, [count], is that of this rank's own loss; other
    ranks have others, and it stays as it is. `state` is yours: an empty dictionary before the first
    step, and before each later one as you have left it.

    A part has ceil(count / ranks) numbers, and rank r has the one that begins at r * ceil(count /
    ranks). The last parts may be shorter, or empty. Padding is up to you.

    The step: take the mean of the ranks' gradients; multiply it by max_norm / (norm + 1e-6), but
    never by more than 1, where norm is the length of the whole mean gradient; then Adam with `lr`,
    betas of 0.9 and 0.95 and an eps of 1e-8, without weight decay, as torch.optim.Adam does it.
    Return the norm, before clipping.

    Cost: one reduce-scatter of the gradient, one all-reduce of a single number, one all-gather of
    the weights; no other collective, and none of more than ceil(count / ranks) * ranks numbers.
    `state` has at most two numbers per number of this rank's part, and ten more.
    """
    raise NotImplementedError
