"""Three functions to fill in, of 10 to 20 lines each; a docstring says what each must do and cost.

    pytest tests/chapter5/test_exercises.py --mine

grades this file, and without --mine the answers in solutions.py. Import what you need: PyTorch is
enough. Where a function communicates, the process group exists when it is called, all ranks call it
at the same time, and any world size from 1 up must work.
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


def close_triangle(
    batch: int | None, micro: int | None, accumulation: int | None, ranks: int
) -> tuple[int, int, int]:
    """2. Fill in the batch sizes of a configuration, or say what to type instead. Section 5.1.

    `batch` is train_batch_size, of all ranks and a whole step; `micro` is
    train_micro_batch_size_per_gpu; `accumulation` is gradient_accumulation_steps. None means that
    the file does not have the key; numbers are 1 or more.

    Return (batch, micro, accumulation) as DeepSpeed fills them in: batch = micro x accumulation x
    ranks, what is given stays, and an accumulation that nothing else decides is 1.

    Where that is impossible raise ValueError, and let its `args` be the values of `batch` to type
    instead, in ascending order: the nearest one below and the nearest one above the given batch
    with which everything else that was given can stay. What is below 1 is none, and is left out. If
    neither `batch` nor `micro` is given, nothing can be computed: a ValueError with no args.

    Cost: arithmetic. A batch of 10**12 takes no longer than one of 12.
    """
    raise NotImplementedError


def cheapest_plan(
    parameters: int,
    weight_bytes: int,
    ranks: int,
    windows: int,
    window_bytes: int,
    memory: int,
) -> tuple[int, int] | None:
    """3. Which stage, and how many micro batches? The least traffic that fits. Section 5.2.

    A step trains on `windows` windows of text, on all `ranks` together. A rank works on its
    windows / (ranks x accumulation) at a time, and keeps `window_bytes` of activations for each.
    Weights and gradients have `weight_bytes` bytes, 2 (bf16) or 4 (fp32). Beside the activations a
    rank holds what the table at the head of the chapter says, for this stage and for this
    accumulation; leave out the layers that stage 3 has whole for a moment. What a rank sends in a
    step is in the table's last row but one.

    Return (stage, accumulation) of a plan that holds no more than `memory` bytes on a rank; of those
    the one that sends least; of those the lowest stage; of those the smallest accumulation. None if
    no plan fits. An accumulation must cut each rank's windows into equal micro batches, without a
    rest; `windows` is a multiple of `ranks`. Let parts of parameters be exact fractions: no padding.
    A single rank sends nothing.
    """
    raise NotImplementedError
