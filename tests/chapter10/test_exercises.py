"""The grader of chapter 10's exercise, and the proof that it turns wrong answers down.

pytest tests/chapter10/test_exercises.py            grades solutions.py
pytest tests/chapter10/test_exercises.py --mine     grades your exercises.py
"""

import random
import statistics
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import warm
from book import CHAPTERS

Answer = tuple[list[float], list[float]]
Latencies = Callable[[list[float], list[float], int], Answer]
ROOT = warm.ROOT


def slow_but_right(schedule: list[float], service: list[float], connections: int) -> Answer:
    """By looking at all requests that are under way."""
    sends: list[float] = []
    for i, due in enumerate(schedule):
        ends = sorted((sends[j] + service[j] for j in range(i)), reverse=True)
        free = ends[connections - 1] if i >= connections else due
        sends.append(max(due, free))
    ends = [send + seconds for send, seconds in zip(sends, service, strict=True)]
    return (
        [end - send for end, send in zip(ends, sends, strict=True)],
        [end - due for end, due in zip(ends, schedule, strict=True)],
    )


def the_stall() -> tuple[list[float], list[float]]:
    """The example of section 10.1: 100 requests a second for 20 s, 5 ms each, one takes 2 s."""
    return [i / 100 for i in range(2000)], [2.0 if i == 500 else 0.005 for i in range(2000)]


def close(one: list[float], other: list[float]) -> bool:
    return len(one) == len(other) and all(
        abs(a - b) < 1e-9 for a, b in zip(one, other, strict=True)
    )


def grade(latencies: Latencies) -> None:
    draw = random.Random(10)
    cases: list[tuple[list[float], list[float], int]] = [
        ([], [], 1),
        ([0.0, 0.0, 0.0], [3.0, 1.0, 1.0], 2),  # the second connection comes free first
        ([0.0, 5.0], [1.0, 1.0], 1),
        (*the_stall(), 1),
    ]
    for connections in (1, 2, 3, 8):
        schedule = sorted(draw.uniform(0, 10) for _ in range(60))
        cases.append((schedule, [draw.expovariate(2) for _ in schedule], connections))
    for schedule, service, connections in cases:
        given = list(schedule), list(service)
        from_send, from_schedule = latencies(schedule, service, connections)
        assert (schedule, service) == given, "it changes its arguments"
        right_send, right_schedule = slow_but_right(schedule, service, connections)
        assert close(from_send, right_send), (
            f"from the send, {connections} connections: {from_send[:5]}"
        )
        assert close(from_schedule, right_schedule), (
            f"from the schedule, {connections} connections: {from_schedule[:5]}, "
            f"not {right_schedule[:5]}"
        )
    for wrong in (([0.0], [], 1), ([0.0], [1.0], 0), ([1.0, 0.0], [1.0, 1.0], 1)):
        with pytest.raises(ValueError, match=r"."):
            latencies(*wrong)
    many = 150_000
    service = [draw.expovariate(1) for _ in range(many)]
    start = time.process_time()
    latencies([i / 1000 for i in range(many)], service, 1000)
    assert time.process_time() - start < 2, "it looks through all connections for each request"


def test_latencies(exercises: Callable[[int], ModuleType]) -> None:
    grade(exercises(10).latencies_from_send_and_schedule)


def test_the_example_of_the_text() -> None:
    """One stall of 2 s: the generator's p99 is 5 ms, and the users' is 1.9 s."""
    solutions = warm.load("chapter10_solutions", ROOT / CHAPTERS[9] / "solutions.py")
    schedule, service = the_stall()
    from_send, from_schedule = solutions.latencies_from_send_and_schedule(schedule, service, 1)
    assert sum(t > 0.006 for t in from_send) == 1
    assert sorted(from_send)[1979] == 0.005  # p99
    assert round(sorted(from_schedule)[1979], 1) == 1.9
    late = [t for t in from_schedule if t > 0.006]
    assert len(late) == 399
    assert round(statistics.fmean(late), 1) == 1.0


# --- wrong answers -------------------------------------------------------------------------------


def sends_when_it_is_due(schedule: list[float], service: list[float], connections: int) -> Answer:
    return list(service), list(service)


def takes_connections_in_turn(
    schedule: list[float], service: list[float], connections: int
) -> Answer:
    if len(schedule) != len(service) or connections < 1 or sorted(schedule) != schedule:
        raise ValueError("no")
    ends = [0.0] * connections
    from_schedule = []
    for i, (due, seconds) in enumerate(zip(schedule, service, strict=True)):
        ends[i % connections] = max(due, ends[i % connections]) + seconds
        from_schedule.append(ends[i % connections] - due)
    return list(service), from_schedule


def counts_the_wait_twice(schedule: list[float], service: list[float], connections: int) -> Answer:
    from_schedule = slow_but_right(schedule, service, connections)[1]
    return from_schedule, from_schedule


def looks_through_all(schedule: list[float], service: list[float], connections: int) -> Answer:
    if len(schedule) != len(service) or connections < 1 or sorted(schedule) != schedule:
        raise ValueError("no")
    ends = [0.0] * connections
    from_schedule = []
    stop = time.process_time() + 2.5
    for due, seconds in zip(schedule, service, strict=True):
        place = min(range(connections), key=lambda j: ends[j])
        ends[place] = max(due, ends[place]) + seconds
        from_schedule.append(ends[place] - due)
        if time.process_time() > stop:
            break
    return list(service), from_schedule


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (sends_when_it_is_due, "from the schedule, 2"),
        (takes_connections_in_turn, "from the schedule, 2"),
        (counts_the_wait_twice, "from the send, 2"),
        (looks_through_all, "looks through all"),
    ],
)
def test_wrong_answers_are_turned_down(answer: Any, complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        grade(answer)


def test_the_stub_is_turned_down() -> None:
    stubs = warm.load("chapter10_stubs", ROOT / CHAPTERS[9] / "exercises.py")
    with pytest.raises(NotImplementedError):
        grade(stubs.latencies_from_send_and_schedule)
