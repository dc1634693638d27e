"""One function to fill in, of about 15 lines; its docstring says what it must do and cost.

    pytest tests/chapter4/test_exercises.py --mine

grades this file, and without --mine the answer in solutions.py. Import what you need: PyTorch is
enough. The process group exists when your function is called, all ranks call it at the same time,
and any world size from 1 up must work.
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
    """1. Forward and backward on weights of which each rank holds a part. Section 4.1.

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
