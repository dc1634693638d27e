"""The grader of chapter 7's exercise, and the proof that it turns wrong answers down.

pytest tests/chapter7/test_exercises.py            grades solutions.py
pytest tests/chapter7/test_exercises.py --mine     grades your exercises.py
"""

import random
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, ClassVar

import pytest
import warm
from book import CHAPTERS

ROOT = warm.ROOT


class Token(int):
    """A token that counts how often any was hashed or compared."""

    looks: ClassVar[int] = 0

    def __hash__(self) -> int:
        Token.looks += 1
        return int.__hash__(self)

    def __eq__(self, other: object) -> bool:
        Token.looks += 1
        return int.__eq__(self, other)


def fresh(tokens: Sequence[int]) -> tuple[Token, ...]:
    """The same tokens as other objects, as a new request's are."""
    return tuple(Token(t) for t in tokens)


class Plain:
    """The same rules without a tree: every stored prefix, and when it was last used."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used: dict[tuple[int, ...], int] = {}
        self.clock = 0

    def match(self, tokens: Sequence[int]) -> int:
        self.clock += 1
        found = 0
        while found < len(tokens) and tuple(tokens[: found + 1]) in self.used:
            found += 1
            self.use(tuple(tokens[:found]))
        return found

    def use(self, prefix: tuple[int, ...]) -> None:
        self.used[prefix] = self.clock

    def insert(self, tokens: Sequence[int]) -> int:
        tokens = tuple(tokens[: self.capacity])
        found = self.match(tokens)
        self.make_room(len(tokens) - found)
        for length in range(found + 1, len(tokens) + 1):
            self.used[tokens[:length]] = self.clock
        return len(tokens) - found

    def make_room(self, count: int) -> None:
        while len(self.used) + count > self.capacity:
            followed = {prefix[:-1] for prefix in self.used}
            ends = [prefix for prefix in self.used if prefix not in followed]
            del self.used[min(ends, key=lambda prefix: self.used[prefix])]

    def size(self) -> int:
        return len(self.used)

    def nodes(self) -> int:
        return len(self.used)


def grade_radix_cache(kind: Callable[[int], Any]) -> None:
    draw = random.Random(7)
    for capacity in (1, 6, 13, 40):
        cache, plain = kind(capacity), Plain(capacity)
        said: list[str] = []
        for _ in range(400):
            tokens = [draw.randrange(3) for _ in range(draw.randrange(9))]
            call = draw.choice(("match", "insert"))
            answer, expected = (getattr(c, call)(tokens) for c in (cache, plain))
            said.append(f"{call}({tokens}) = {answer}")
            assert answer == expected, f"{capacity=}: {'; '.join(said[-6:])}, not {expected}"
            assert cache.size() == plain.size(), f"{cache.size()} tokens, not {plain.size()}"
    cache = kind(10**6)
    shared = [draw.randrange(50) for _ in range(60)]
    sequences = [shared[: draw.randrange(60)] + [n % 50] * 20 for n in range(300)]
    for number, sequence in enumerate(sequences, 1):
        Token.looks = 0
        cache.insert(fresh(sequence))
        limit = 3 * len(sequence) + 8
        assert Token.looks <= limit, f"insert looked at {Token.looks} tokens, not {limit}"
        if number % 50 == 0:
            assert cache.nodes() <= 2 * number, f"{cache.nodes()} nodes after {number} calls"
    for sequence in sequences[::30]:
        Token.looks = 0
        assert cache.match(fresh(sequence)) == len(sequence)
        limit = 3 * len(sequence) + 8
        assert Token.looks <= limit, f"match looked at {Token.looks} tokens, not {limit}"


def test_radix_cache(exercises: Callable[[int], ModuleType]) -> None:
    grade_radix_cache(exercises(7).RadixCache)


# --- wrong answers -------------------------------------------------------------------------------


class ForgetsToUse(Plain):
    """First in, first out: a match changes nothing."""

    def use(self, prefix: tuple[int, ...]) -> None:
        pass


class DropsAll(Plain):
    """Makes more room than is needed."""

    def make_room(self, count: int) -> None:
        if len(self.used) + count > self.capacity:
            keep = {p: t for p, t in self.used.items() if t == self.clock}
            self.used = keep


class DropsInnerTokens(Plain):
    """The least recently used token goes, whatever follows it."""

    def match(self, tokens: Sequence[int]) -> int:
        self.clock += 1
        found = [n for n in range(1, len(tokens) + 1) if tuple(tokens[:n]) in self.used]
        if found:
            self.use(tuple(tokens[: found[-1]]))
        return max(found, default=0)

    def make_room(self, count: int) -> None:
        while len(self.used) + count > self.capacity:
            del self.used[min(self.used, key=lambda prefix: self.used[prefix])]


class Scans:
    """Right, and looks at every sequence that there is."""

    def __init__(self, capacity: int) -> None:
        self.plain = Plain(capacity)
        self.sequences: list[Sequence[int]] = []

    def match(self, tokens: Sequence[int]) -> int:
        for sequence in self.sequences:
            all(a == b for a, b in zip(sequence, tokens, strict=False))
        return self.plain.match([int(t) for t in tokens])

    def insert(self, tokens: Sequence[int]) -> int:
        self.match([])
        for sequence in self.sequences:
            all(a == b for a, b in zip(sequence, tokens, strict=False))
        self.plain.clock -= 1
        self.sequences.append(tokens)
        return self.plain.insert([int(t) for t in tokens])

    def size(self) -> int:
        return self.plain.size()

    def nodes(self) -> int:
        return 0


class OneTokenANode(Plain):
    """Right and quick, with a node for each token."""

    def match(self, tokens: Sequence[int]) -> int:
        return super().match([int(t) for t in tokens])

    def insert(self, tokens: Sequence[int]) -> int:
        return super().insert([int(t) for t in tokens])


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (ForgetsToUse, "not"),
        (DropsAll, "tokens, not|= "),
        (DropsInnerTokens, "not"),
        (Scans, "insert looked at"),
        (OneTokenANode, "nodes after"),
    ],
)
def test_wrong_answers_are_turned_down(answer: Any, complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        grade_radix_cache(answer)


def test_the_stub_is_turned_down() -> None:
    stubs = warm.load("chapter7_stubs", ROOT / CHAPTERS[6] / "exercises.py")
    with pytest.raises(NotImplementedError):
        grade_radix_cache(stubs.RadixCache)
