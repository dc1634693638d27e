"""Chapter 8's exercise. Fill in the function, then grade yourself:

pytest tests/chapter8/test_exercises.py --mine
"""


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
