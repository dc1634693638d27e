"""The grader of chapter 6's exercise, and the proof that it turns wrong answers down.

pytest tests/chapter6/test_exercises.py            grades solutions.py
pytest tests/chapter6/test_exercises.py --mine     grades your exercises.py
"""

import random
import time
from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import warm
from book import CHAPTERS

ROOT = warm.ROOT


class Memory:
    """The cache itself, written to as the manager says; and what each sequence has to read."""

    def __init__(self, kind: Any, blocks: int, block_size: int):
        self.manager = kind(blocks, block_size)
        self.blocks = blocks
        self.block_size = block_size
        self.content: dict[tuple[int, int], int] = {}
        self.texts: dict[int, list[int]] = {}
        self.number = 0

    def write(self, sequence: int) -> None:
        """A new token at the end of a sequence."""
        self.number += 1
        text = self.texts[sequence]
        table = self.manager.table(sequence)
        place = len(text)
        assert place // self.block_size < len(table), f"no block for token {place}: {table}"
        text.append(self.number)
        self.content[table[place // self.block_size], place % self.block_size] = self.number

    def allocate(self, sequence: int, tokens: int) -> None:
        table = self.manager.allocate(sequence, tokens)
        assert table == self.manager.table(sequence), "allocate returns the table"
        self.texts[sequence] = []
        for _ in range(tokens):
            self.write(sequence)

    def append(self, sequence: int) -> None:
        before = self.manager.table(sequence)
        copy = self.manager.append(sequence)
        if copy is not None:
            old, new = copy
            assert (before[-1], self.manager.table(sequence)[-1]) == (old, new), f"copied {copy}"
            for place in range(self.block_size):
                if (old, place) in self.content:
                    self.content[new, place] = self.content[old, place]
        self.write(sequence)

    def fork(self, parent: int, child: int) -> None:
        self.manager.fork(parent, child)
        self.texts[child] = list(self.texts[parent])

    def free(self, sequence: int) -> None:
        self.manager.free(sequence)
        del self.texts[sequence]

    def judge(self) -> None:
        """Each sequence reads what it wrote, no block is lost, and none is taken in vain."""
        used: Counter[int] = Counter()
        for sequence, text in self.texts.items():
            table = self.manager.table(sequence)
            used.update(table)
            assert len(set(table)) == len(table), f"a block twice in one table: {table}"
            needed = -(-len(text) // self.block_size)
            assert len(table) == needed, f"waste: {len(table)} blocks where {needed} do"
            read = [
                self.content[table[i // self.block_size], i % self.block_size]
                for i in range(len(text))
            ]
            assert read == text, f"sequence {sequence} reads what another has written"
        assert set(used) <= set(range(self.blocks)), "there is no such block"
        free = self.blocks - len(used)
        found = self.manager.free_blocks()
        assert found == free, f"{free} blocks are in no table, free_blocks says {found}"


def grade_behaviour(kind: Any) -> None:
    """10,000 random steps, with and without memory left."""
    rng = random.Random(0)
    memory = Memory(kind, blocks=24, block_size=4)
    refused = 0
    for step in range(10_000):
        known = list(memory.texts)
        before = {s: memory.manager.table(s) for s in known}, memory.manager.free_blocks()
        try:
            match rng.choices(("allocate", "append", "fork", "free"), (2, 12, 2, 2))[0]:
                case "allocate":
                    memory.allocate(step, rng.randint(1, 20))
                case "append" if known:
                    memory.append(rng.choice(known))
                case "fork" if known:
                    memory.fork(rng.choice(known), step)
                case "free" if known:
                    memory.free(rng.choice(known))
        except MemoryError:
            refused += 1
            after = {s: memory.manager.table(s) for s in known}, memory.manager.free_blocks()
            assert after == before, "a refusal changed something"
            if known and rng.random() < 0.5:
                memory.free(rng.choice(known))
        memory.judge()
    assert refused > 100, "MemoryError hardly ever: where do the blocks come from?"
    for sequence in list(memory.texts):
        memory.free(sequence)
    assert memory.manager.free_blocks() == 24, "blocks are lost"


def grade_refusals(kind: Any) -> None:
    manager = kind(4, 4)
    manager.allocate(1, 3)
    for error, call in (
        (ValueError, lambda: manager.allocate(1, 3)),
        (ValueError, lambda: manager.allocate(2, 0)),
        (MemoryError, lambda: manager.allocate(2, 13)),
        (KeyError, lambda: manager.append(2)),
        (KeyError, lambda: manager.fork(2, 3)),
        (ValueError, lambda: manager.fork(1, 1)),
        (KeyError, lambda: manager.free(2)),
    ):
        with pytest.raises(error, match=r"."):
            call()
        assert (manager.free_blocks(), len(manager.table(1))) == (3, 1), (
            "a refusal changed something"
        )


def grade_cost(kind: Any) -> None:
    """An append costs the same at 200 tokens and at 200,000."""
    manager = kind(200_000, 1)
    manager.allocate(1, 100_000)
    start = time.process_time()
    for _ in range(2_000):
        manager.append(1)
        manager.free_blocks()
        spent = time.process_time() - start
        assert spent < 0.5, "an append, or free_blocks, looks through all blocks"


def grade(kind: Any) -> None:
    grade_refusals(kind)
    grade_behaviour(kind)
    grade_cost(kind)


def test_block_manager(exercises: Callable[[int], ModuleType]) -> None:
    grade(exercises(6).BlockManager)


# --- wrong answers -------------------------------------------------------------------------------

solution: Any = warm.load("chapter6_right", ROOT / CHAPTERS[5] / "solutions.py").BlockManager


class NeverCopies(solution):
    references: list[int]

    def append(self, sequence: int) -> tuple[int, int] | None:
        kept = self.references
        self.references = [min(count, 1) for count in kept]
        try:
            return super().append(sequence)
        finally:
            for block in self.tables[sequence]:
                kept[block] = max(kept[block], 1)
            self.references = kept


class FreesWhatOthersHave(solution):
    def free(self, sequence: int) -> None:
        self.unused += self.tables.pop(sequence)
        del self.lengths[sequence]


class TakesOneMore(solution):
    def allocate(self, sequence: int, tokens: int) -> list[int]:
        table = super().allocate(sequence, tokens)
        if tokens % self.block_size == 0 and self.unused:
            self.tables[sequence].append(self._take())  # the next token will want it
        return self.tables[sequence] if tokens else table


class LosesOnRefusal(solution):
    def append(self, sequence: int) -> tuple[int, int] | None:
        table = self.tables[sequence]
        self.lengths[sequence] += 1
        if self.lengths[sequence] % self.block_size == 1 % self.block_size:
            self.tables[sequence] = [*table, -1]
            if not self.unused:
                raise MemoryError("no block is free")
            self.tables[sequence] = [*table, self._take()]
            return None
        self.lengths[sequence] -= 1
        return super().append(sequence)


class CountsBlocks(solution):
    def free_blocks(self) -> int:
        return sum(count == 0 for count in self.references)


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (NeverCopies, "another has written"),
        (FreesWhatOthersHave, "another has written|twice in one table|says"),
        (TakesOneMore, "waste"),
        (LosesOnRefusal, "a refusal changed something"),
        (CountsBlocks, "looks through all blocks"),
    ],
)
def test_wrong_answers_are_turned_down(answer: Any, complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        grade(answer)


def test_the_stub_is_turned_down() -> None:
    stubs = warm.load("chapter6_stubs", ROOT / CHAPTERS[5] / "exercises.py")
    with pytest.raises(NotImplementedError):
        grade(stubs.BlockManager)
