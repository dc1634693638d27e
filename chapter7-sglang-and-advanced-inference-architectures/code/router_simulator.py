"""A router in front of simulated workers, in virtual time: every run of it gives the same numbers.

A stand-in, and no measurement: `Worker` is the whole model of what an engine does and costs. Its
three costs are those that a roofline gives Llama 3.1 8B in 16 bits on a GPU with 3.35 TB/s and 989
TFLOP/s, of which it reaches 70 and 40 %: 16 GB of weights read in a step, 16 GFLOP a prompt token,
and 128 KiB of keys and values for each of some 2,000 tokens of a running request. Section 7.2.
"""

import argparse
import heapq
import itertools
import math
import random
from collections import Counter, OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from routing_policies import PAGE, Policy, prefix_keys

STEP_US = 7_000  # of a step, whatever is in it
PREFILL_US = 40  # more for each prompt token that is computed
DECODE_US = 100  # more for each running request
PREFILL_TOKENS = 8_192  # no more prompts are admitted to a step that computes so many
PROBE_US = 250_000  # between two looks at each worker's health
PROBES = 4  # without an answer, in a row: the worker is taken out
SECOND = 1_000_000


@dataclass(eq=False)
class Request:
    at: int  # µs
    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    @cached_property
    def keys(self) -> list[int]:
        return prefix_keys(self.prompt + self.answer)

    @property
    def prompt_keys(self) -> list[int]:
        return self.keys[: len(self.prompt) // PAGE]


def trace(args: argparse.Namespace, hot: float = 0.0) -> list[Request]:
    """Chats of 1 to 6 turns; each turn repeats all that was said before and adds to it.

    Every chat begins with one of `--prefixes` shared texts: the first of them in a share of `hot`,
    else by Zipf's law. Turns come by the clock, so that all policies see the same requests.
    """
    draw = random.Random(args.seed)

    def text(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw.randrange(2**17) for _ in range(draw.randint(low, high)))

    prefixes = [text(args.prefix_tokens, args.prefix_tokens) for _ in range(args.prefixes)]
    weights = [1 / rank for rank in range(1, args.prefixes + 1)]
    requests: list[Request] = []
    begins = -20.0  # seconds: at 0 there are chats in all stages
    while begins < args.seconds:
        begins += draw.expovariate(args.rate / 3.5)  # a chat has 3.5 turns on average
        said = prefixes[0] if draw.random() < hot else draw.choices(prefixes, weights)[0]
        at = begins
        for _ in range(draw.randint(1, 6)):
            prompt = said + text(32, 192)
            answer = text(32, 96)
            if 0 <= at < args.seconds:
                requests.append(Request(int(at * SECOND), prompt, answer))
            said = prompt + answer
            at += 2 + draw.expovariate(1 / 2)  # seconds to read the answer and to write
    return sorted(requests, key=lambda r: r.at)


def predicted_hits(requests: list[Request], workers: int) -> float:
    """Hit rate if each request went to a worker at random and no cache were ever full.

    A page that m earlier requests had is on this request's worker with 1 - (1 - 1/n)**m.
    """
    seen: Counter[int] = Counter()
    hits = total = 0.0
    for request in requests:
        usable = request.keys[: (len(request.prompt) - 1) // PAGE]
        hits += sum(PAGE * (1 - (1 - 1 / workers) ** seen[key]) for key in usable)
        total += len(request.prompt)
        seen.update(request.keys)
    return hits / total


# --- the stand-in for an engine ------------------------------------------------------------------


@dataclass(eq=False)
class Attempt:
    """A request at a worker. A retry is another attempt."""

    request: Request
    worker: str
    written: int = 0  # tokens
    first_at: int = 0  # µs

    @property
    def private(self) -> int:
        """Pages that no other request can share while this one runs: the answer's."""
        tokens = len(self.request.prompt) + len(self.request.answer)
        return math.ceil(tokens / PAGE) - len(self.request.prompt_keys)


class Worker:
    """Continuous batching with whole prefills, and a cache of `pages` pages with prefix reuse.

    A step admits what fits, computes the uncached part of the new prompts, and writes one token for
    every running request. Room for the whole answer is taken at admission, so nothing is preempted.
    """

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.slowdown = 1.0  # inf: it is silent
        self.stepping = False
        self.held = False  # a step that is done, but nobody has heard of it
        self.waiting: deque[Attempt] = deque()
        self.running: list[Attempt] = []
        self.users: dict[int, int] = {}  # page's key: running requests that share it
        self.idle: OrderedDict[int, None] = OrderedDict()  # pages to evict, the oldest first
        self.private = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0

    def start_step(self) -> int:
        """Admit requests; the microseconds that the step will take."""
        computed = 0
        while self.waiting and computed < PREFILL_TOKENS and self.admits(self.waiting[0]):
            attempt = self.waiting.popleft()
            computed += self.admit(attempt)
            self.running.append(attempt)
        work = STEP_US + PREFILL_US * computed + DECODE_US * len(self.running)
        return int(work * self.slowdown)

    def end_step(self, now: int) -> list[Attempt]:
        """Write a token for each running request; return those that are done."""
        for attempt in self.running:
            attempt.written += 1
            attempt.first_at = attempt.first_at or now
        done = [a for a in self.running if a.written == len(a.request.answer)]
        self.running = [a for a in self.running if a.written < len(a.request.answer)]
        for attempt in done:
            self.release(attempt)
        return done

    def admits(self, attempt: Attempt) -> bool:
        new = sum(key not in self.users for key in attempt.request.prompt_keys)
        return len(self.users) + self.private + new + attempt.private <= self.pages

    def admit(self, attempt: Attempt) -> int:
        """Take the pages of a request; the tokens of its prompt that have to be computed."""
        prompt, keys = attempt.request.prompt, attempt.request.prompt_keys
        usable = keys[: (len(prompt) - 1) // PAGE]  # the last token is computed in any case
        there = itertools.takewhile(lambda key: key in self.users or key in self.idle, usable)
        cached = PAGE * sum(1 for _ in there)
        for key in keys:
            self.users[key] = self.users.get(key, 0) + 1
            self.idle.pop(key, None)
        self.private += attempt.private
        self.evict()
        self.prompt_tokens += len(prompt)
        self.cached_tokens += cached
        return len(prompt) - cached

    def release(self, attempt: Attempt) -> None:
        """Keep the pages of prompt and answer for others."""
        self.private -= attempt.private
        for key in attempt.request.prompt_keys:
            self.users[key] -= 1
            if not self.users[key]:
                del self.users[key]
        for key in reversed(attempt.request.keys):  # the end of a text is evicted first
            if key not in self.users:
                self.idle[key] = None
                self.idle.move_to_end(key)
        self.evict()

    def evict(self) -> None:
        while len(self.users) + self.private + len(self.idle) > self.pages:
            self.idle.popitem(last=False)


# --- the router ----------------------------------------------------------------------------------


class Router:
    """Sends requests, watches the workers, sends what a lost one had to others, answers once."""

    def __init__(self, policy: Policy, workers: dict[str, Worker], report_us: int) -> None:
        self.policy = policy
        self.workers = workers
        self.report_us = report_us  # age that a load may have; 0: this router counts by itself
        self.reported_at = 0
        self.loads: dict[str, int] = {}
        self.missed = dict.fromkeys(workers, 0)  # probes in a row
        self.current: dict[Request, Attempt] = {}  # whose answer counts
        self.parked: list[Request] = []  # while no worker is healthy
        self.answers: Counter[Request] = Counter()  # that clients got
        self.first_token_ms: list[float] = []
        self.retried = 0
        self.late = 0  # answers that came when a retry had taken over

    def open_requests(self) -> dict[str, int]:
        """Of each healthy worker."""
        counted = Counter(attempt.worker for attempt in self.current.values())
        return {w: counted[w] for w, missed in self.missed.items() if missed < PROBES}

    def send(self, request: Request, now: int) -> None:
        loads = self.open_requests()
        if loads.keys() != self.loads.keys() or now >= self.reported_at + self.report_us:
            self.loads = loads
            self.reported_at = now
        if not loads:
            self.parked.append(request)
            return
        attempt = Attempt(request, self.policy.choose(request.prompt_keys, self.loads))
        self.current[request] = attempt
        self.workers[attempt.worker].waiting.append(attempt)

    def receive(self, attempt: Attempt) -> None:
        """Hand an answer to the client, unless another attempt has been made since."""
        if self.current.get(attempt.request) is not attempt:
            self.late += 1
            return
        del self.current[attempt.request]
        self.answers[attempt.request] += 1
        self.first_token_ms.append((attempt.first_at - attempt.request.at) / 1000)

    def probe(self, now: int) -> None:
        for name, worker in self.workers.items():
            self.missed[name] = self.missed[name] + 1 if math.isinf(worker.slowdown) else 0
            if self.missed[name] == PROBES:
                lost = [r for r, attempt in self.current.items() if attempt.worker == name]
                self.retried += len(lost)
                for request in lost:
                    self.send(request, now)
        if self.open_requests():
            parked, self.parked = self.parked, []
            for request in parked:
                self.send(request, now)


Change = tuple[float, int, float]  # at second, of worker number, its slowdown from then on


@dataclass
class Result:
    hit_rate: float
    tokens_per_s: float
    first_token_ms: list[float]  # of each answered request, sorted
    lost: int
    twice: int
    retried: int
    late: int
    busiest: list[int]  # open requests of the worker that has most, every quarter of a second

    def percentile(self, share: float) -> float:
        return self.first_token_ms[math.ceil(share * len(self.first_token_ms)) - 1]


def simulate(
    requests: list[Request],
    policy: Policy,
    count: int,
    pages: int,
    changes: Sequence[Change] = (),
    report_us: int = 0,
) -> Result:
    """Play the trace in virtual time: always the event that comes next."""
    workers = {f"worker {i}": Worker(pages) for i in range(count)}
    router = Router(policy, workers, report_us)
    events: list[tuple[int, int, str, Any]] = []
    number = itertools.count()  # of equal times the one that was pushed first

    def push(at: int, kind: str, what: Any) -> None:
        heapq.heappush(events, (at, next(number), kind, what))

    for request in requests:
        push(request.at, "request", request)
    for second, index, slowdown in changes:
        push(int(second * SECOND), "change", (workers[f"worker {index}"], slowdown))
    push(PROBE_US, "probe", None)
    busiest = []
    now = 0
    while len(router.answers) < len(requests) and now < requests[-1].at + 600 * SECOND:
        now, _, kind, what = heapq.heappop(events)
        if kind == "request":
            router.send(what, now)
        elif kind == "probe":
            router.probe(now)
            busiest.append(max(router.open_requests().values(), default=0))
            push(now + PROBE_US, "probe", None)
        elif kind == "change":
            what[0].slowdown = what[1]
            if what[0].held and not math.isinf(what[1]):
                push(now, "step", what[0])
        elif math.isinf(what.slowdown):
            what.held = True
        else:
            what.held = what.stepping = False
            for attempt in what.end_step(now):
                router.receive(attempt)
        for worker in workers.values():
            idle = not (worker.stepping or math.isinf(worker.slowdown))
            if idle and (worker.waiting or worker.running):
                worker.stepping = True
                push(now + worker.start_step(), "step", worker)
    written = sum(len(r.answer) for r in router.answers)
    return Result(
        hit_rate=sum(w.cached_tokens for w in workers.values())
        / sum(w.prompt_tokens for w in workers.values()),
        tokens_per_s=written / (now / SECOND),
        first_token_ms=sorted(router.first_token_ms),
        lost=len(requests) - len(router.answers),
        twice=sum(n > 1 for n in router.answers.values()),
        retried=router.retried,
        late=router.late,
        busiest=busiest,
    )
