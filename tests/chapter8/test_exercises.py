"""The grader of chapter 8's exercise, and the proof that it turns wrong answers down.

pytest tests/chapter8/test_exercises.py            grades solutions.py
pytest tests/chapter8/test_exercises.py --mine     grades your exercises.py
"""

import random
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import warm
from book import CHAPTERS

Share = Callable[[int, int, int, int, int, int], list[int]]
ROOT = warm.ROOT


def whole(share: Share, samples: int, batch: int, seed: int, step: int, n: int) -> list[int]:
    """The global batch, put together from the ranks' shares."""
    shares = [share(samples, batch, seed, step, rank, n) for rank in range(n)]
    return [shares[i % n][i // n] for i in range(sum(map(len, shares)))]


def epoch_of(share: Share, samples: int, batch: int, seed: int, epoch: int) -> list[int]:
    steps = samples // batch
    found = [whole(share, samples, batch, seed, epoch * steps + s, 1) for s in range(steps)]
    return [sample for step in found for sample in step]


def grade_share_of_step(share: Share) -> None:
    for samples, batch in ((40, 8), (43, 7), (5, 5)):
        for step in (0, 3, 11):
            alone = whole(share, samples, batch, 1, step, 1)
            assert len(alone) == batch, f"{len(alone)} samples in a batch of {batch}"
            for n in range(2, min(5, batch) + 1):
                together = whole(share, samples, batch, 1, step, n)
                assert together == alone, f"step {step} on {n} ranks: {together}, alone {alone}"
        first = epoch_of(share, samples, batch, 1, 0)
        assert len(set(first)) == samples // batch * batch, "an epoch visits a sample twice"
        assert set(first) <= set(range(samples)), "there is no such sample"
    orders = {
        (seed, epoch): tuple(epoch_of(share, 40, 8, seed, epoch))
        for seed in range(3)
        for epoch in range(3)
    }
    for one, order in orders.items():
        same = [other for other in orders if other != one and orders[other] == order]
        assert not same, f"the order of (seed, epoch) {one} is that of {same}"
    left_over = {
        s for epoch in range(9) for s in set(range(43)) - set(epoch_of(share, 43, 7, 0, epoch))
    }
    assert len(left_over) > 1, "the same sample is dropped in every epoch"
    assert share(40, 8, 0, 7, 0, 2) == share(40, 8, 0, 7, 0, 2), "another answer the second time"
    start = time.process_time()
    assert len(share(40, 8, 20260101, 10**9, 1, 2)) == 4
    assert time.process_time() - start < 1, "it counts up to the step"
    for wrong in ((4, 8, 0, 0, 0, 1), (40, 2, 0, 0, 0, 3)):
        with pytest.raises(ValueError, match=r"."):
            share(*wrong)


def test_share_of_step(exercises: Callable[[int], ModuleType]) -> None:
    grade_share_of_step(exercises(8).share_of_step)


# --- wrong answers -------------------------------------------------------------------------------


def order_of(samples: int, seed: int) -> list[int]:
    return random.Random(seed).sample(range(samples), samples)


def adds_seed_and_epoch(
    samples: int, batch: int, seed: int, step: int, rank: int, n: int
) -> list[int]:
    epoch, number = divmod(step, samples // batch)
    order = order_of(samples, seed + epoch)
    return order[number * batch : (number + 1) * batch][rank::n]


def never_shuffles_again(
    samples: int, batch: int, seed: int, step: int, rank: int, n: int
) -> list[int]:
    number = step % (samples // batch)
    return order_of(samples, seed)[number * batch : (number + 1) * batch][rank::n]


def deals_first_and_batches_then(
    samples: int, batch: int, seed: int, step: int, rank: int, n: int
) -> list[int]:
    epoch, number = divmod(step, samples // batch)
    own = order_of(samples, seed * 1_000_003 + epoch)[rank::n]
    return own[number * batch // n : (number + 1) * batch // n]


def counts_up(samples: int, batch: int, seed: int, step: int, rank: int, n: int) -> list[int]:
    if not n <= batch <= samples:
        raise ValueError("sizes")
    epoch = number = 0
    end = time.process_time() + 2
    for _ in range(step):
        number += 1
        if number == samples // batch:
            epoch, number = epoch + 1, 0
        if time.process_time() > end:
            break
    order = order_of(samples, seed * 1_000_003 + epoch)
    return order[number * batch : (number + 1) * batch][rank::n]


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (adds_seed_and_epoch, "is that of"),
        (never_shuffles_again, "is that of"),
        (deals_first_and_batches_then, "ranks: "),
        (counts_up, "counts up"),
    ],
)
def test_wrong_answers_are_turned_down(answer: Any, complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        grade_share_of_step(answer)


def test_the_stub_is_turned_down() -> None:
    stubs = warm.load("chapter8_stubs", ROOT / CHAPTERS[7] / "exercises.py")
    with pytest.raises(NotImplementedError):
        grade_share_of_step(stubs.share_of_step)
