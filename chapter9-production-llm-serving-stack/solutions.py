"""Chapter 9's exercise, filled in."""

import math
import threading
from collections.abc import Callable


class TokenBudget:
    """A tenant's budget of model tokens, from which threads take, and to which they give back."""

    def __init__(self, rate: float, capacity: float, clock: Callable[[], float]):
        self.rate = rate
        self.capacity = capacity
        self.clock = clock
        self.level = capacity
        self.counted_s = clock()  # the time up to which tokens have come in
        self.lock = threading.Lock()

    def take(self, tokens: float) -> float:
        """0.0 if the tokens are taken, or else the seconds until there are as many."""
        if tokens < 0:
            raise ValueError(f"{tokens} tokens")
        if tokens > self.capacity:
            return math.inf
        with self.lock:
            self._fill()
            missing = tokens - self.level
            if missing > 1e-7:  # less is a rounding error of somebody who has waited
                return missing / self.rate
            self.level = max(self.level - tokens, 0.0)
            return 0.0

    def give_back(self, tokens: float) -> None:
        with self.lock:
            self._fill()
            self.level = min(self.level + tokens, self.capacity)

    def _fill(self) -> None:
        now = self.clock()
        came_in = (now - self.counted_s) * self.rate
        self.level = min(self.level + came_in, self.capacity)
        self.counted_s = now
