"""Three functions to fill in, of 10 to 20 lines each; a docstring says what each must do and cost.

    pytest tests/chapter4/test_exercises.py --mine

grades this file, and without --mine the answers in solutions.py. Import what you need: PyTorch is
enough. Where a function communicates, the process group exists when it is called, all ranks call it
at the same time, and any world size from 1 up must work.
"""

from collections.abc import Callable

import torch
from torch import nn


def sharded_gradient(
    model: nn.Module,
    shard: torch.Tensor,
    inputs: torch.Tensor,
    loss_of: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """1. Forward and backward on weights of which each rank holds a part. Section 4.2.

    `model` is on the meta device: it has names and shapes, and no numbers. Those are in the flat
    parameter, which is: all of `model.parameters()`, in this order, each flattened, one behind the
    other, and then as few zeros as make its length a multiple of the world size. It is cut into
    equal parts, and `shard`, float, [count], is this rank's. So the number of weights need not
    divide, a weight may be cut in two, and a rank may hold zeros alone.

    `loss_of(model(inputs))` is this rank's loss, a scalar; `inputs` differ from rank to rank, their
    shape too. torch.func.functional_call runs a model on weights that you hand over by name.

    Return this rank's loss, detached, and this rank's part of the gradient of the mean of all
    ranks' losses: [count], of the shard's dtype, with zeros where the padding is. Neither the shard
    nor the model is changed.

    Cost: one all-gather, to which a rank contributes its shard, and one reduce-scatter, from which
    it gets its shard; no other collective. When you return, nothing is alive that you have made and
    that is as large as the whole flat parameter: neither weights nor gradient, nor a view of one.
    Hint: a gathered tensor that requires a gradient gets a flat one.
    """
    raise NotImplementedError


def clip_sharded(gradients: list[torch.Tensor], max_norm: float) -> torch.Tensor:
    """2. Clip gradients of which each rank holds a part. Section 4.5.

    `gradients` are this rank's shards, float tensors of any shapes; on this rank there may be fewer
    rows than on others, or none, or no tensors at all. All ranks' shards together are one gradient,
    and every number of it is on one rank only.

    Return the 2-norm of the whole gradient before clipping, a float64 tensor of shape [], equal on
    all ranks to the bit. If it is above `max_norm`, scale every shard in place by max_norm / norm;
    if not, change nothing, to the bit. A NaN or an infinity anywhere must show in the norm on all
    ranks, and then the shards stay as they are: it is the caller who skips the step.

    Cost: one all-reduce of one number. Squares are added in float64: of ten million float32 numbers
    the norm must be right to 1e-6.
    """
    raise NotImplementedError


def reads(rows: int, saved_by: int, loaded_by: int, rank: int) -> list[tuple[int, int, int]]:
    """3. What a rank reads of a checkpoint that another number of ranks has saved. Section 4.6.

    A tensor of `rows` rows was saved by `saved_by` ranks and is loaded by `loaded_by`. Both cut it
    as FSDP2 does: chunks of ceil(rows / ranks) rows, as long as there are rows, so that the last
    ranks may have fewer, or none.

    Return what `rank` of the loading ranks has to read, in the order of the rows: a list of (file,
    start, stop), where `file` is the number of the rank that saved and the rows are counted from the
    beginning of that file's chunk. No empty reads, and of each file one piece at most.

    Cost: no more steps than there are pieces to return, and a few: a checkpoint of 100,000 ranks is
    planned without looking at each of them.
    """
    raise NotImplementedError
