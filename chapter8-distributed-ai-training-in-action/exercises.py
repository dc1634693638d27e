"""Chapter 8's exercises. Fill in the functions, then grade yourself:

pytest tests/chapter8/test_exercises.py --mine
"""

from pathlib import Path


def share_of_step(
    samples: int, batch: int, seed: int, step: int, rank: int, world_size: int
) -> list[int]:
    """Return the numbers of the samples that `rank` trains on in a global step, counted from 0.

    An epoch visits `samples // batch * batch` of the samples 0 .. samples - 1, each once, in an
    order of its own that depends on the seed and the epoch; what is left over is dropped. Step s
    is the batch number s % (samples // batch) of the epoch s // (samples // batch).

    - The batch of a step, all ranks together, is the same for every world size, in the same order
      when rank 0's share comes first in each turn: sample i of the batch belongs to rank
      i % world_size. So shares differ in size by one at most.
    - Epochs differ in their order, and so do seeds; (seed 0, epoch 1) is not (seed 1, epoch 0).
    - Any step can be asked for, without asking for those before it: a run that resumes at step
      1,000,000,000 does not count up to it.

    Raises ValueError if a batch is larger than `samples`, or smaller than `world_size`.
    """
    raise NotImplementedError


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint that a run can go on from, and the names of newer, torn ones.

    A checkpoint of step N is a folder `step-N` in `folder`, with N in six digits or more. It is
    whole if its `notes.json` is JSON and has "files", from a file's name to its bytes, with
    ".metadata" among them, and if each of these files is there in exactly that size. If none is
    whole the path is None. Torn ones are named newest first; those older than the answer are not.

    - Other entries (`step-000012.draft`, `step-12`, a file of such a name) are no checkpoints.
    - Newest is the largest N: `step-1000000` is newer than `step-999999`, whatever their dates.
    - Of what is older than the answer nothing is opened, and no shard ever is: it may have a
      terabyte, and its size says enough. Nothing on the disk is changed.
    """
    raise NotImplementedError


def place_in_mesh(
    rank: int, dp_replicate: int, dp_shard: int, tp: int, batch: int
) -> dict[str, list[int]]:
    """Return which windows of a batch a rank reads, and which ranks it works with.

    All ranks, from 0, form a grid of dp_replicate x dp_shard x tp. Ranks of one "tp" group are
    neighbours, because they talk several times in every layer; "dp_replicate" is farthest apart.

    - "tp", "dp_shard", "dp_replicate": the ranks that differ from `rank` in this coordinate alone,
      and itself, in ascending order.
    - "windows": the numbers, from 0, of those windows that it reads, in ascending order. Ranks of
      one "tp" group read the same. All others read different ones: window i belongs to place
      i % (dp_replicate * dp_shard), and places count as ranks do, without "tp". A place may have
      none.

    Raises ValueError if a size is below 1, or there is no such rank.
    """
    raise NotImplementedError
