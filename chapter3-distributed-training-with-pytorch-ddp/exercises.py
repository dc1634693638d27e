"""Six functions to fill in. Each is 5 to 25 lines; its docstring says what it must do and cost.

    pytest tests/chapter3/test_exercises.py --mine

grades this file (add `-k top_k` for one function), and without --mine the answers in solutions.py.
Import what you need: the standard library and PyTorch are enough. In 2 and 3 the process group
exists when your function is called, all ranks call it at the same time, and any world size from 1
up must work. The others need no process group.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

Record = tuple[int, str, tuple[int, ...], str]  # number, operation, shape, state: see exercise 6


def exposed_seconds(
    sizes: Sequence[int],
    ready: Sequence[float],
    first_bytes: int,
    cap_bytes: int,
    latency: float,
    bandwidth: float,
) -> tuple[list[list[int]], float]:
    """1. Fill DDP's buckets, and say what they cannot hide. Section 3.4, about 12 lines.

    Gradient i has `sizes[i]` bytes, 1 or more. Gradients are numbered in the order in which they
    got ready in the first backward, after which DDP fixes its buckets: it takes them in this
    order, puts each into the open bucket, and closes a bucket as soon as that holds its limit or
    more. The limit is `first_bytes` for the first bucket and `cap_bytes` for all others. So a
    bucket may be much larger than its limit; what is open at the end is the last bucket, and no
    bucket is empty.

    In a later step gradient i is ready `ready[i]` seconds after backward began, which need not be
    in that order; backward ends when the last one is. A bucket is sent when all its gradients are
    ready and the bucket before it has arrived: one all-reduce at a time, always in the order of
    the buckets. Each takes `latency + bytes / bandwidth` seconds.

    Return the buckets, as lists of the gradients' numbers, and the seconds from the end of
    backward to the end of the last all-reduce.
    """
    raise NotImplementedError


def accumulate(
    model: DistributedDataParallel, micro_batches: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> float:
    """2. Many micro-batches, one synchronization. Section 3.5, about 15 lines.

    `micro_batches` is this rank's part of the global batch: one or more pairs (tokens, targets),
    both int64, [batch, seq]. `model(tokens)` returns logits, [batch, seq, vocabulary]. A target of
    -100 is padding, and does not count. Micro-batches differ in size and in padding, some may be
    all padding, and ranks may have different numbers of them. At least one target on some rank
    counts. All gradients are None when you are called, and every parameter takes part.

    Return the mean cross-entropy over all targets of all ranks that count, the same on every rank,
    and leave the gradient of that mean in the parameters: what one process would get from the
    whole batch at once.

    Cost: DDP all-reduces each bucket once. Besides that, one collective, with a message of at most
    64 bytes. One micro-batch's backward comes before the next one's forward, so that no two sets
    of activations are in memory together. Hint: who says that you must divide before you add?
    """
    raise NotImplementedError


def average_top_k(gradient: torch.Tensor, residual: torch.Tensor, k: int) -> torch.Tensor:
    """3. Send what is large, and remember the rest. Section 3.5, about 12 lines.

    `gradient` and `residual` are float32, [count], with other values on every rank; count and
    `k`, from 1 to count, are the same on all. Add the gradient to the residual, send the k
    elements of the sum that have the largest magnitude (any of those that are equal), and leave
    in `residual`, in place, what was not sent. `gradient` stays as it is.

    Return the mean over the ranks of what they sent, float32, [count], where an element that a
    rank has not sent counts as 0: bit for bit the same on every rank, so that the models stay
    equal. Nothing is lost: what is not in the mean is in some rank's residual, and goes out later
    (error feedback).

    Cost: at most two all-gathers and no other collective, and in all of them together a rank
    contributes 8 k bytes: k values and k indices of 4 bytes each.
    """
    raise NotImplementedError


def save_checkpoint(state: bytes, folder: Path, step: int) -> None:
    """4. A checkpoint that is there whole, or not at all. Section 3.7, about 15 lines.

    Write `folder`/step-00000042.ckpt, for step 42: the SHA-256 digest of the state, 32 bytes, and
    then the state. The folder exists. The process may be killed between any two lines, yours or
    the library's: whoever looks into the folder then finds, under names of this form, whole files
    only; all earlier ones as they were; and if there was one of the same step, either that or the
    new one. Work in a file of another name in the same folder, since a rename from another file
    system is a copy. What a killed process has left there must not hinder the next call.

    When you return, the checkpoint survives a power cut: its bytes were on the disk (os.fsync)
    before it got its name, and the folder, which is what holds the name, was written after that
    (os.fsync of a descriptor of the folder). If writing fails, because the disk is full, say, the
    OSError is passed on, and the folder is what it was before.
    """
    raise NotImplementedError


def newest_sound(folder: Path) -> tuple[int, bytes] | None:
    """5. Resume from what can be trusted. Section 3.7, about 8 lines.

    `folder` holds checkpoints as exercise 4 writes them: step-00000042.ckpt, with eight digits or,
    from step 100,000,000 on, nine or more. Disks, copies and bugs have done some of them harm: cut
    off anywhere, empty, a bit flipped, bytes added. Return the step and the state of the one with
    the highest step whose digest is right, and None if there is no such file, or no such folder.

    Whatever has another name is no checkpoint. A name that cannot be read (a folder, a link to
    nothing) is no reason to stop. Times of modification mean nothing, since copying changes them.
    Nothing is changed or removed.

    Cost: files of lower steps than the one returned are not opened.
    """
    raise NotImplementedError


def find_culprits(traces: Sequence[Sequence[Record]]) -> tuple[int, list[int]] | None:
    """6. Everybody waits: for whom? Section 3.8, about 20 lines.

    `traces[rank]` is what a rank's flight recorder held when the job hung: a record (number,
    operation, shape, state) for each collective that the rank has called, in order, such as
    (41, "all_reduce", (1024,), "started"). Numbers count up from 0 without gaps. A recorder keeps
    the last records only, so a trace may begin at any number: what came before was called by this
    rank, is complete, and nobody knows what it was. An empty trace means: nothing called yet. The
    state is "scheduled" (called, but the device has not come to it), "started" or "completed".

    Go through the numbers from 0 to the largest in any trace. At the first one where ranks
    disagree, return it with these ranks, in order: those that have not called it; and those whose
    operation or shape is not what most of the ranks that recorded it have. If two or more
    operations with their shapes are equally frequent there, all ranks that recorded it.

    If they agree on a number, but it is not "completed" in all traces that hold it, return it with
    the ranks where it is "scheduled" while it is further elsewhere: their devices are late. That
    list is empty if all have started, which speaks for the network, or none has. Whichever comes
    first counts; what comes behind it is a consequence. Return None if all is well.
    """
    raise NotImplementedError
