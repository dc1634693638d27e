"""Four ways to choose a worker for a request. Copy them into a router of yours.

Each has one method, `choose(keys, loads)`. `keys` are `prefix_keys(tokens)` of the prompt; `loads` has
the open requests of each healthy worker, and at least one worker. Section 7.2.
"""

import itertools
import random
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from typing import Protocol

PAGE = 64  # tokens that are matched as one


def prefix_keys(tokens: Sequence[int]) -> list[int]:
    """A key for each full page of tokens. It stands for the page and for all that precedes it."""
    keys, key = [], 0
    for start in range(0, len(tokens) // PAGE * PAGE, PAGE):
        key = hash((key, *tokens[start : start + PAGE]))  # of ints: the same anywhere
        keys.append(key)
    return keys


class Policy(Protocol):
    def choose(self, keys: list[int], loads: dict[str, int]) -> str:
        """The worker for a prompt with these keys; `loads` are the healthy ones' open requests."""
        ...


class RoundRobin:
    def __init__(self) -> None:
        self.turn = itertools.count()

    def choose(self, keys: list[int], loads: dict[str, int]) -> str:
        return sorted(loads)[next(self.turn) % len(loads)]


class LeastLoaded:
    def __init__(self, draw: random.Random) -> None:
        self.draw = draw

    def choose(self, keys: list[int], loads: dict[str, int]) -> str:
        return min(sorted(loads), key=lambda w: (loads[w], self.draw.random()))  # ties by lot


class PowerOfTwo:
    """Two at random, the less loaded of them (Mitzenmacher 2001)."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw

    def choose(self, keys: list[int], loads: dict[str, int]) -> str:
        pair = self.draw.sample(sorted(loads), min(2, len(loads)))
        return min(pair, key=lambda w: loads[w])


class PrefixAffinity:
    """The worker that was sent the longest prefix of this prompt before, unless it has too much.

    Too much is `bound` times the mean load, this request counted (bounded loads, arXiv:1608.01350).
    A bound of 1 or more leaves at least one worker; among equals the least loaded is taken.
    """

    def __init__(self, draw: random.Random, bound: float, pages: int) -> None:
        self.bound = bound
        self.pages = pages  # to remember for each worker: as many as its cache has
        self.sent: defaultdict[str, OrderedDict[int, None]] = defaultdict(OrderedDict)
        self.least = LeastLoaded(draw)

    def matched(self, worker: str, keys: list[int]) -> int:
        sent = self.sent[worker]
        return next((i for i, key in enumerate(keys) if key not in sent), len(keys))

    def choose(self, keys: list[int], loads: dict[str, int]) -> str:
        limit = self.bound * (sum(loads.values()) + 1) / len(loads)
        matches = {w: self.matched(w, keys) for w, load in loads.items() if load < limit}
        best = max(matches.values())
        worker = self.least.choose(keys, {w: loads[w] for w, m in matches.items() if m == best})
        sent = self.sent[worker]
        for key in reversed(keys):  # the first page is the last to be forgotten
            sent[key] = None
            sent.move_to_end(key)
        while len(sent) > self.pages:
            sent.popitem(last=False)
        return worker
