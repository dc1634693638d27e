"""Chapter 10's exercise, filled in."""

import heapq
from itertools import pairwise


def latencies_from_send_and_schedule(
    schedule: list[float], service: list[float], connections: int
) -> tuple[list[float], list[float]]:
    """Return what a load generator says of its requests, and what their users have felt. Section 10.1."""
    if len(schedule) != len(service) or connections < 1:
        raise ValueError(f"{len(schedule)} due, {len(service)} times, {connections} connections")
    if any(later < earlier for earlier, later in pairwise(schedule)):
        raise ValueError("the schedule falls")
    busy_until: list[float] = []  # a heap: the connection that comes free first is on top
    from_send = []
    from_schedule = []
    for due, seconds in zip(schedule, service, strict=True):
        send = due
        if len(busy_until) == connections:
            send = max(due, heapq.heappop(busy_until))
        heapq.heappush(busy_until, send + seconds)
        from_send.append(seconds)
        from_schedule.append(send + seconds - due)
    return from_send, from_schedule
