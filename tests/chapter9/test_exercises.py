"""The grader of chapter 9's exercise, and the proof that it turns wrong answers down.

pytest tests/chapter9/test_exercises.py            grades solutions.py
pytest tests/chapter9/test_exercises.py --mine     grades your exercises.py
"""

import contextlib
import math
import random
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from fractions import Fraction
from types import FrameType, ModuleType
from typing import Any

import pytest
import warm
from book import CHAPTERS

ROOT = warm.ROOT
CLOSE = 1e-6  # tokens


class Clock:
    def __init__(self, now: float = 1000.0):
        self.now = now

    def __call__(self) -> float:
        return self.now


class Exact:
    """The right level, in fractions."""

    def __init__(self, rate: float, capacity: float, now: float):
        self.rate, self.capacity = Fraction(rate), Fraction(capacity)
        self.level, self.latest = self.capacity, Fraction(now)

    def at(self, now: float) -> Fraction:
        came_in = (Fraction(now) - self.latest) * self.rate
        self.level = min(self.level + came_in, self.capacity)
        self.latest = Fraction(now)
        return self.level


def grade_answers(budget: Any) -> None:
    """Thousands of calls at odd times, each compared with the exact level."""
    draw = random.Random(0)
    for rate, capacity in ((10.0, 100.0), (0.3, 7.0), (1e5, 2e5), (1 / 3, 1.0)):
        clock = Clock()
        bucket = budget(rate, capacity, clock)
        exact = Exact(rate, capacity, clock.now)
        taken: float = 0
        for call in range(3000):
            pause = draw.choice([0.0, 1e-5, 0.01, 0.3]) * capacity / rate * draw.random()
            clock.now += pause
            level = exact.at(clock.now)
            if draw.random() < 0.2 and taken:
                back = taken * draw.random()
                taken = 0
                bucket.give_back(back)
                exact.level = min(level + Fraction(back), exact.capacity)
                continue
            tokens = capacity * draw.random() ** 2
            answer = bucket.take(tokens)
            at = f"call {call}, {float(level):.6g} of {capacity:g} tokens there"
            if tokens <= level - CLOSE:
                assert answer == 0, f"{at}: {tokens:.6g} were wanted and refused"
            if tokens >= level + CLOSE:
                assert answer != 0, f"{at}: {tokens:.6g} were handed out"
            if answer:
                right = float((Fraction(tokens) - level) / exact.rate)
                close = math.isclose(answer, right, rel_tol=1e-6, abs_tol=CLOSE / rate)
                assert close, f"{at}: {answer:.6g} seconds to wait, and it is {right:.6g}"
            else:
                exact.level = max(level - Fraction(tokens), Fraction(0))
                taken += tokens


def grade_waiting(budget: Any) -> None:
    """Who waits as long as told gets the tokens; who comes earlier does not."""
    draw = random.Random(1)
    for _ in range(500):
        rate = 10 ** draw.uniform(-2, 5)
        capacity = rate * draw.uniform(0.5, 60)
        clock = Clock(draw.choice([0.0, draw.uniform(0, 1e6)]))
        bucket = budget(rate, capacity, clock)
        bucket.take(capacity * draw.uniform(0.9, 1))
        tokens = capacity * draw.uniform(0.2, 1)
        wait_s = bucket.take(tokens)
        start = clock.now
        clock.now = start + 0.99 * wait_s
        assert bucket.take(tokens), "tokens were handed out before their time"
        clock.now = start + wait_s
        if clock.now - start >= wait_s:  # not lost in the clock's last digit
            again = bucket.take(tokens)
            assert again == 0, f"waited as told, and then told to wait {again:.3g} s"
    bucket = budget(1.0, 10.0, Clock())
    assert bucket.take(10.001) == math.inf, "more than the capacity, and it says when"
    assert bucket.take(10) == 0, "a call that can never be met took tokens"
    with pytest.raises(ValueError, match=r"."):
        bucket.take(-1)


class Slow(float):
    """A number that gives other threads their turn whenever it is used."""

    def _slow(name: str) -> Callable[..., Any]:  # type: ignore[misc]
        def operation(self: float, *others: Any) -> Any:
            time.sleep(0.0005)
            return getattr(float, name)(self, *others)

        return operation

    for _name in ("lt", "le", "gt", "ge", "eq", "add", "radd", "sub", "rsub", "neg"):
        locals()[f"__{_name}__"] = _slow(f"__{_name}__")
    __hash__ = float.__hash__


def grade_threads(budget: Any) -> None:
    """Six threads at once want one of three tokens each."""
    for _ in range(5):
        bucket = budget(1e-9, 3.0, Clock())
        start = threading.Barrier(6)
        answers: list[float] = []

        def client(bucket: Any = bucket, start: Any = start, answers: Any = answers) -> None:
            start.wait()
            answers.append(bucket.take(Slow(1)))

        threads = [threading.Thread(target=client) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        given = sum(answer == 0 for answer in answers)
        assert len(answers) == 6, "a call has failed"
        assert given == 3, f"{given} threads got one of three tokens at the same time"


def grade_cost(budget: Any) -> None:
    """Lines of Python in a call, memory and threads: the same after any time and any calls."""
    clock = Clock()
    before = threading.active_count()
    bucket = budget(10.0, 100.0, clock)
    first = lines_of(lambda: bucket.take(1))
    clock.now += 1e5
    late = lines_of(lambda: bucket.take(1))
    assert late <= first + 20, f"{late} lines after a long pause, {first} at first"
    tracemalloc.start()
    try:
        bytes_before = tracemalloc.get_traced_memory()[0]
        for _ in range(3000):
            clock.now += 0.01
            bucket.take(1)
        grown = tracemalloc.get_traced_memory()[0] - bytes_before
    finally:
        tracemalloc.stop()
    assert grown < 4000, f"{grown:,} bytes more after 3,000 calls"
    assert lines_of(lambda: bucket.take(1)) <= first + 20, "a call takes longer after many others"
    assert threading.active_count() == before, "a thread of its own"


def lines_of(call: Callable[[], object]) -> int:
    """Lines of Python that a call executes; it stops counting, and the call, at 10,000."""
    count = 0

    def trace(frame: FrameType, event: str, value: object) -> Any:
        nonlocal count
        count += event == "line"
        if count > 10_000:
            raise AssertionError("10,000 lines of Python in one call")
        return trace

    old = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(old)
    return count


def grade_token_budget(budget: Any) -> None:
    grade_answers(budget)
    grade_waiting(budget)
    grade_threads(budget)
    grade_cost(budget)


def test_token_budget(exercises: Callable[[int], ModuleType]) -> None:
    grade_token_budget(exercises(9).TokenBudget)


# --- wrong answers -------------------------------------------------------------------------------


def solution() -> Any:
    return warm.load("chapter9_right", ROOT / CHAPTERS[8] / "solutions.py").TokenBudget


Wrong = Callable[[], Any]


def windowed() -> type:
    """So many in each window of the clock, and all of them again in the next."""

    class Windowed(solution()):  # type: ignore[misc]
        def _fill(self: Any) -> None:
            span = self.capacity / self.rate
            if self.clock() // span > self.counted_s // span:
                self.level = self.capacity
                self.counted_s = self.clock()

    return Windowed


def unlocked() -> type:
    class Unlocked(solution()):  # type: ignore[misc]
        def __init__(self, *args: Any):
            super().__init__(*args)
            self.lock: Any = contextlib.nullcontext()

    return Unlocked


def forgets_what_is_there() -> type:
    class Forgetful(solution()):  # type: ignore[misc]
        def take(self: Any, tokens: float) -> float:
            return tokens / self.rate if super().take(tokens) else 0.0

    return Forgetful


def overflows() -> type:
    class Overflowing(solution()):  # type: ignore[misc]
        def give_back(self: Any, tokens: float) -> None:
            with self.lock:
                self._fill()
                self.level += tokens

        def _fill(self: Any) -> None:
            now = self.clock()
            if now > self.counted_s:
                came_in = (now - self.counted_s) * self.rate
                self.level = max(min(self.level + came_in, self.capacity), self.level)
                self.counted_s = now

    return Overflowing


def to_the_bit() -> type:
    """No allowance for rounding: who has waited is told to wait again."""

    class ToTheBit(solution()):  # type: ignore[misc]
        def take(self: Any, tokens: float) -> float:
            answer: float = super().take(tokens)
            if answer == 0 and tokens > self.before:
                return 1e-12
            return answer

        def _fill(self: Any) -> None:
            super()._fill()
            self.before = self.level

    return ToTheBit


def drop_by_drop() -> type:
    class Dripping(solution()):  # type: ignore[misc]
        def _fill(self: Any) -> None:
            drop_s = 0.001 * self.capacity / self.rate
            end_s = self.counted_s
            while end_s + drop_s < self.clock():
                end_s += drop_s
            super()._fill()

    return Dripping


def remembers_all() -> type:
    class Remembering(solution()):  # type: ignore[misc]
        def take(self: Any, tokens: float) -> float:
            self.calls = [*getattr(self, "calls", ()), (self.clock(), tokens)]
            return super().take(tokens)

    return Remembering


def rounds_down() -> type:
    """Whole tokens only: what is left of a short pause is lost."""

    class Rounding(solution()):  # type: ignore[misc]
        def _fill(self: Any) -> None:
            now = self.clock()
            if now > self.counted_s:
                came_in = int((now - self.counted_s) * self.rate)
                self.level = min(self.level + came_in, self.capacity)
                self.counted_s = now

    return Rounding


WRONG = [
    (windowed, "seconds to wait|refused"),
    (unlocked, "at the same time"),
    (forgets_what_is_there, "seconds to wait"),
    (overflows, "handed out"),
    (to_the_bit, "told to wait"),
    (drop_by_drop, "10,000 lines"),
    (remembers_all, "bytes more"),
    (rounds_down, "seconds to wait|refused"),
]


@pytest.mark.parametrize(("answer", "complaint"), WRONG, ids=[a.__name__ for a, _ in WRONG])
def test_wrong_answers_are_turned_down(answer: Wrong, complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        grade_token_budget(answer())


def test_the_stub_is_turned_down() -> None:
    stubs = warm.load("chapter9_stubs", ROOT / CHAPTERS[8] / "exercises.py")
    with pytest.raises(NotImplementedError):
        grade_token_budget(stubs.TokenBudget)
