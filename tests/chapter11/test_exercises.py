"""The grader of chapter 11's exercise, and the proof that it turns wrong answers down.

pytest tests/chapter11/test_exercises.py            grades solutions.py
pytest tests/chapter11/test_exercises.py --mine     grades your exercises.py
"""

import random
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Answer = Callable[..., Any]
Changes = list[torch.Tensor | None]
SIZES = [(1, 0), (3, 1), (4, 0), (5, 2), (9, 2)]  # clients, and how many of them may lie


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that is made under it; a view is no new tensor."""

    def __init__(self, known: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.storages = {t.untyped_storage()._cdata for t in known}
        self.alive: list[Any] = []  # so that no storage's number is given twice
        self.made: list[int] = []

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if torch.is_tensor(tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.storages:
                    self.storages.add(storage._cdata)
                    self.alive.append(storage)
                    self.made.append(storage.nbytes() // tensor.element_size())
        return result


def honest(clients: int, parameters: int, dtype: torch.dtype, seed: int) -> Changes:
    draw = torch.Generator().manual_seed(seed)
    whole = torch.randn(clients, parameters, generator=draw, dtype=torch.float64).to(dtype)
    return [row.clone() for row in whole]


def counts(clients: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.choice([1, 7, 300, 5000]) for _ in range(clients)]


def by_hand(changes: Changes, examples: Sequence[int], byzantine: int) -> torch.Tensor:
    """One parameter after the other, in Python's floats."""
    rows = [change.tolist() for change in changes if change is not None]
    means = []
    for column in zip(*rows, strict=True):
        pairs = sorted(zip(column, examples, strict=True))[byzantine : len(rows) - byzantine]
        total = sum(count for _, count in pairs)
        means.append(sum(value * count for value, count in pairs) / total)
    return torch.tensor(means, dtype=torch.float64)


def compare(found: Any, right: torch.Tensor, dtype: torch.dtype, at: str) -> None:
    assert found.shape == right.shape, f"{at}: {tuple(found.shape)}, not {tuple(right.shape)}"
    assert found.dtype == dtype, f"{at}: {found.dtype}, not {dtype}"
    off = (found.double() - right).abs().max().item()
    bound = 1e-12 if dtype == torch.float64 else 1e-6
    assert off <= bound, f"{at}: {off:.2g} off the trimmed mean"


def grade_equality(answer: Answer) -> None:
    for clients, byzantine in SIZES:
        for dtype in (torch.float64, torch.float32):
            for scratch in (1, 7, 64, 1 << 20):
                changes = honest(clients, 23, dtype, seed=clients)
                before = [change.clone() for change in changes if change is not None]
                examples = counts(clients, clients)
                at = f"{clients} clients, {byzantine} liars, {dtype}, scratch {scratch}"
                found = answer(changes, examples, torch.Size([23]), byzantine, scratch)
                compare(found, by_hand(changes, examples, byzantine), dtype, at)
                pairs = zip(before, changes, strict=True)
                assert all(torch.equal(a, b) for a, b in pairs if b is not None), (
                    f"{at}: what was sent is changed"
                )


def grade_failures(answer: Answer) -> None:
    """Each way to fail, first, in the middle and last; the result is that of the others."""
    nan, inf = honest(2, 23, torch.float64, 99)
    assert nan is not None
    assert inf is not None
    nan[11] = torch.nan
    inf[22] = -torch.inf
    failures: list[tuple[str, torch.Tensor | None, int]] = [
        ("nothing", None, 5),
        ("NaN", nan, 5),
        ("-inf", inf, 5),
        ("another shape", torch.ones(22, dtype=torch.float64), 5),
        ("one number", torch.ones(1, dtype=torch.float64), 5),
        ("a matrix", torch.ones(23, 1, dtype=torch.float64), 5),
        ("no examples", torch.ones(23, dtype=torch.float64), 0),
        ("minus examples", torch.ones(23, dtype=torch.float64), -4),
    ]
    changes, examples = honest(5, 23, torch.float64, 5), counts(5, 5)
    for what, change, count in failures:
        for place in (0, 3, 5):
            found = answer(
                [*changes[:place], change, *changes[place:]],
                [*examples[:place], count, *examples[place:]],
                torch.Size([23]),
                1,
                40,
            )
            compare(found, by_hand(changes, examples, 1), torch.float64, f"{what} at {place}")
    for byzantine in (2, 3):
        try:
            answer([*changes[:4], nan], examples, torch.Size([23]), byzantine, 40)
        except ValueError:
            continue
        raise AssertionError(f"4 clients that count, {byzantine} liars: no ValueError")


def grade_liars(answer: Answer) -> None:
    """Between the honest clients' numbers, whatever two liars send and claim."""
    changes = honest(7, 50, torch.float64, 7)
    stacked = torch.stack([change for change in changes if change is not None])
    low, high = stacked.amin(0), stacked.amax(0)
    lies = [torch.full((50,), x, dtype=torch.float64) for x in (1e300, -1e300, 5.0, 0.1)]
    for one in lies:
        for other in lies:
            found = answer([one, *changes, other], [10**15] * 9, torch.Size([50]), 2, 1 << 20)
            assert bool(((low <= found) & (found <= high)).all()), "liars moved it out of the range"


def grade_cost(answer: Answer) -> None:
    for clients, parameters, scratch in ((8, 5000, 1000), (40, 300, 16)):
        changes = honest(clients, parameters, torch.float32, 1)
        known = [change for change in changes if change is not None]
        with Largest(known) as largest:
            answer(changes, [3] * clients, torch.Size([parameters]), 2, scratch)
        made = sorted(largest.made)
        result = made.pop()  # it may be the result itself: one of them is allowed
        bound = max(scratch, clients)
        assert result <= parameters, f"a tensor of {result} elements, the result has {parameters}"
        assert made[-1] <= bound, f"a tensor of {made[-1]} elements beside the result, not {bound}"


def grade_robust_average(answer: Answer) -> None:
    grade_equality(answer)
    grade_failures(answer)
    grade_liars(answer)
    grade_cost(answer)


# --- wrong answers -----------------------------------------------------------------------------


def fit(changes: Any, examples: Any, shape: Any) -> list[tuple[torch.Tensor, int]]:
    pairs = zip(changes, examples, strict=True)
    sane = [(c, e) for c, e in pairs if c is not None and c.shape == shape and e >= 1]
    return [(c, e) for c, e in sane if bool(c.isfinite().all())]


def trimmed(kept: Any, k: int, along: bool = True) -> torch.Tensor:
    if len(kept) < 2 * k + 1:
        raise ValueError
    values, order = torch.stack([c.double() for c, _ in kept]).sort(dim=0)
    weights = torch.tensor([e for _, e in kept], dtype=torch.float64)
    middle = slice(k, len(kept) - k)
    shares = weights[order[middle]] if along else weights[middle, None].expand_as(values[middle])
    return ((values[middle] * shares).sum(0) / shares.sum(0)).to(kept[0][0].dtype)


def stacks_everything(
    changes: Any, examples: Any, shape: Any, byzantine: int, scratch: int = 0
) -> Any:
    """Right, and needs the memory of all clients' models once more."""
    return trimmed(fit(changes, examples, shape), byzantine)


def forgets_the_order(
    changes: Any, examples: Any, shape: Any, byzantine: int, scratch: int = 0
) -> Any:
    """Sorts the numbers, and leaves the weights where they were."""
    return trimmed(fit(changes, examples, shape), byzantine, along=False)


def makes_nan_zero(
    changes: Any, examples: Any, shape: Any, byzantine: int, scratch: int = 0
) -> Any:
    """A client that sent NaN has no opinion: here it votes for zero."""
    pairs = zip(changes, examples, strict=True)
    sane = [(c, e) for c, e in pairs if c is not None and c.shape == shape and e >= 1]
    return trimmed([(c.nan_to_num(0.0, 0.0, 0.0), e) for c, e in sane], byzantine)


def does_not_trim(changes: Any, examples: Any, shape: Any, byzantine: int, scratch: int = 0) -> Any:
    return trimmed(fit(changes, examples, shape), 0)


def drops_whole_clients(
    changes: Any, examples: Any, shape: Any, byzantine: int, scratch: int = 0
) -> Any:
    """Throws away the clients with the longest changes: a lie of the usual length passes."""
    kept = sorted(fit(changes, examples, shape), key=lambda pair: float(pair[0].norm()))
    if len(kept) < 2 * byzantine + 1:
        raise ValueError
    return trimmed(kept[: len(kept) - 2 * byzantine], 0)


def counts_those_who_failed(
    changes: Any, examples: Any, shape: Any, byzantine: int, scratch: int = 0
) -> Any:
    """Takes a client that has failed for a liar, and trims so many less."""
    kept = fit(changes, examples, shape)
    return trimmed(kept, max(0, byzantine - (len(changes) - len(kept))))


MUTANTS = [  # a wrong answer, and what the grader must hold against it
    (stacks_everything, "elements"),
    (forgets_the_order, "off the trimmed mean"),
    (makes_nan_zero, "off the trimmed mean"),
    (does_not_trim, "off the trimmed mean"),
    (drops_whole_clients, "off the trimmed mean"),
    (counts_those_who_failed, "off the trimmed mean"),
]


def test_answer(exercises: Callable[[int], ModuleType]) -> None:
    grade_robust_average(exercises(11).robust_average)


def test_stub_is_turned_down() -> None:
    def stub(*args: object) -> None:
        raise NotImplementedError

    with pytest.raises(NotImplementedError):
        grade_robust_average(stub)


@pytest.mark.parametrize(("wrong", "because"), MUTANTS, ids=[m.__name__ for m, _ in MUTANTS])
def test_wrong_answer_is_turned_down(wrong: Answer, because: str) -> None:
    with pytest.raises(AssertionError, match=because):
        grade_robust_average(wrong)
