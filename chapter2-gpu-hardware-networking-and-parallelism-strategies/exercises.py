"""Six functions to fill in. Each is 5 to 25 lines; its docstring says what it must do and cost.

    pytest tests/chapter2/test_exercises.py --mine

grades this file (add `-k ring` for one function), and without --mine the answers in solutions.py.
Import what you need: the standard library and PyTorch are enough. In 1 and 5 the process group
exists when your function is called, all ranks call it at the same time, and any world size from 1
up must work. The others need no process group.
"""

from collections.abc import Sequence

import torch


def ring_all_reduce(tensor: torch.Tensor) -> None:
    """1. Sum a tensor over all ranks, and send as little as possible. Section 2.4, about 20 lines.

    `tensor` is contiguous, and has the same shape and dtype on every rank. Overwrite it on every
    rank with the sum over the ranks: bit for bit the same on all of them, so that models that add
    it to their weights stay equal. Its number of elements need not be a multiple of the world
    size, and may be smaller than that.

    Use dist.batch_isend_irecv (or isend and irecv) and no collective; send only to the next rank,
    receive only from the one before, round the circle. Nothing needs to be sent on one rank.
    Cost, with n ranks: every rank sends at most 2(n - 1) messages and receives as many, and none
    is longer than a chunk of ceil(elements / n).
    """
    raise NotImplementedError


def fit_alpha_beta(sizes: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """2. Latency and bandwidth from measured times. Section 2.3, about 15 lines.

    Message i has `sizes[i]` bytes, 0 or more, and took `seconds[i]`, more than 0. Return alpha in
    seconds and beta in bytes per second, for which the sum of the squared relative errors

        ((alpha + size / beta) / seconds - 1) ** 2

    is as small as it can be with alpha >= 0 and beta > 0, to 6 digits. Where even the best slope
    would be negative, beta is math.inf. If all sizes are equal, nothing can be told apart: raise
    ValueError.

    A fit of absolute errors would see the largest messages alone, since they take the longest.
    Mind that the best alpha for data with alpha < 0 is 0, but with another beta.
    """
    raise NotImplementedError


def pipeline_schedule(stage: int, stages: int, micro_batches: int) -> list[tuple[str, int]]:
    """3. The 1F1B schedule of one pipeline stage. Section 2.6, about 10 lines.

    Return what this stage (0 is the first) does, in order: ("F", i) for the forward of
    micro-batch i and ("B", i) for its backward, each once for every i from 0 to
    micro_batches - 1. Forwards are in the order of i, and so are backwards. `micro_batches` may
    be smaller than `stages`.

    A forward waits for the same micro-batch's forward on the stage before; a backward waits for
    its backward on the stage after, and for its own forward. All stages follow your schedules at
    the same time. Cost, with p stages and m micro-batches, sending being free:

    - the step takes (m + p - 1) times as long as one forward and one backward together;
    - the micro-batches whose forward is done on this stage, and their backward is not, are never
      more than min(m, p - stage): that many sets of activations it has to keep.
    """
    raise NotImplementedError


def merge_attention(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """4. Attention over two sets of keys, from attention over each. Section 2.7, about 10 lines.

    For each query, `out_a` is softmax(scores) @ values over the keys of part a, [..., head_dim],
    and `lse_a` the logarithm of the sum of exp(scores), [...]; `out_b` and `lse_b` are the same
    for part b, which has other keys. Return `out` and `lse` over the keys of both.

    A query that may see no key of a part has an lse of -inf there, and zeros in `out`; if it sees
    none in either part, so does the result. Gradients are those of one attention over all keys;
    nothing is NaN or infinite, neither in the result (but for that lse) nor in any gradient,
    whether the lse are 10,000, -10,000 or -inf. `out` has the dtype of `out_a`, which may be
    bfloat16, and `lse` that of `lse_a`, in which the work is done. The arguments stay as they are.
    """
    raise NotImplementedError


def vocab_parallel_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, first: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """5. The loss, where each rank has the logits of some tokens. Section 2.6, about 20 lines.

    `logits` is this rank's slice of the vocabulary, [tokens, shard], float32: column j belongs to
    the vocabulary's entry `first + j`. Slices differ in width, which is 1 or more. `targets` is
    the right entry of each token, int64, [tokens], the same on every rank; all of them, some or
    none lie in this rank's slice.

    Return the cross-entropy of each token, [tokens], the same on every rank, and the gradient of
    its mean over the tokens with respect to `logits`, [tokens, shard]. Both are right to 5 digits,
    also where all logits of a token lie near 10,000. `logits` stays as it is.

    Cost: at most three all-reduces and no other collective, and in all of them together at most
    three numbers per token. The logits themselves, which are tokens x vocabulary, stay at home.
    """
    raise NotImplementedError


def assign_slots(expert_ids: torch.Tensor, experts: int, capacity: int) -> torch.Tensor:
    """6. Seat tokens at experts that have few seats. Section 2.7, about 10 lines.

    Token t's choices are the experts `expert_ids[t, 0]`, `expert_ids[t, 1]`, ..., int64,
    [tokens, k]. Every expert has `capacity` slots, numbered from 0, which it gives out in this
    order: to the first choices of all tokens, in the order of the tokens, then to the second
    choices of all tokens, and so on (GShard). Return the slot of each choice, int64, [tokens, k],
    and -1 for a choice that came when its expert was full.

    Cost: no Python loop over the tokens (one over the experts will do), and no tensor of more
    than tokens x k x experts elements. There may be no tokens, and experts that nobody chose.
    """
    raise NotImplementedError
