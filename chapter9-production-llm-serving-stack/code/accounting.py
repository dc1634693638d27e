"""What the gateway writes down of a request: one line of log and a few counts, nothing of its text.

A module of ch09_api_gateway.py. Section 9.4.
"""

import contextlib
import json
import logging
import math
import re
import time
import uuid
from collections.abc import Collection, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from backends import Replica
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, math.inf)
log = logging.getLogger("gateway")


@dataclass
class Record:
    """One request. `resources` are given back when it ends, however it ends."""

    route: str
    id: str
    tenant: str = "-"
    replica: str = "-"
    attempts: int = 0
    status: int = 499  # the client left before an answer
    outcome: str = "left"
    first_token_s: float | None = None
    started: float = field(default_factory=time.monotonic)
    resources: AsyncExitStack = field(default_factory=AsyncExitStack)
    attempt: "Attempt | None" = None  # the last one


@dataclass(eq=False)
class Attempt:
    """One request to one backend."""

    labels: tuple[str, str]  # backend, first or retry
    asked: float = field(default_factory=time.monotonic)
    first_token_s: float | None = None


class Metrics:
    def __init__(self, registry: CollectorRegistry, replicas: Sequence[Replica]):
        self.requests = Counter(
            "gateway_requests",
            "Requests that have ended",
            ["tenant", "route", "status", "outcome"],
            registry=registry,
        )
        self.first_tokens = Histogram(
            "gateway_first_token_seconds",
            "From the request to the first token, or to an answer in one piece",
            ["route"],
            buckets=SECONDS,
            registry=registry,
        )
        self.asked = Counter(
            "gateway_backend_asked",
            "Requests to a backend that have begun",
            ["backend", "attempt"],
            registry=registry,
        )
        self.attempts = Counter(
            "gateway_backend_attempts",
            "Requests to a backend that have ended: ok, error, busy, refused, or left by the client",
            ["backend", "attempt", "outcome"],
            registry=registry,
        )
        self.seconds = Histogram(
            "gateway_backend_seconds",
            "Of those that were ok: until their first token, or an answer in one piece",
            ["backend", "attempt"],
            buckets=SECONDS,
            registry=registry,
        )
        up = Gauge(
            "gateway_backend_up",
            "1: its last health check was good",
            ["replica"],
            registry=registry,
        )
        load = Gauge("gateway_backend_load", "Requests at work", ["replica"], registry=registry)
        for replica in replicas:
            up.labels(replica.name).set_function(lambda r=replica: float(r.up))
            load.labels(replica.name).set_function(lambda r=replica: float(r.load))
        self.under_way: set[Attempt] = set()
        registry.register(self)  # calls collect()

    def begin(self, record: Record) -> None:
        """Count that a backend is asked. However the request ends, `record.attempt` will too."""
        backend = record.replica.partition("/")[0]
        labels = (backend, "first" if record.attempts == 1 else "retry")
        record.attempt = Attempt(labels)
        if record.route != "/v1/models":  # that says nothing of the model
            self.asked.labels(*labels).inc()
            self.under_way.add(record.attempt)
        record.resources.callback(self.end, record.attempt, "left")

    def first_token(self, record: Record) -> None:
        now = time.monotonic()
        record.first_token_s = now - record.started
        self.first_tokens.labels(record.route).observe(record.first_token_s)
        if record.attempt is not None:
            record.attempt.first_token_s = now - record.attempt.asked

    def end(self, attempt: "Attempt | None", outcome: str) -> None:
        """How an attempt went, once: the first word counts."""
        if attempt in self.under_way:
            self.under_way.remove(attempt)
            self.attempts.labels(*attempt.labels, outcome).inc()
            if outcome == "ok":
                self.seconds.labels(*attempt.labels).observe(attempt.first_token_s or 0.0)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Those under way, so that a backend that hangs is seen before it has ended anything."""
        now = time.monotonic()
        labels = ["backend", "attempt", "le"]
        late = GaugeMetricFamily(
            "gateway_backend_late", "Under way, and not a token within le seconds", labels=labels
        )
        waiting = GaugeMetricFamily(
            "gateway_backend_waiting", "The same, and still no token", labels=labels
        )
        for key in {attempt.labels for attempt in self.under_way}:
            same = [attempt for attempt in self.under_way if attempt.labels == key]
            for limit in (0.0, *SECONDS[:-1]):
                none = [now - a.asked > limit for a in same if a.first_token_s is None]
                after = [a.first_token_s > limit for a in same if a.first_token_s is not None]
                waiting.add_metric([*key, str(limit)], sum(none))
                late.add_metric([*key, str(limit)], sum(none) + sum(after))
        yield from (late, waiting)

    def ended(self, record: Record) -> None:
        labels = (record.tenant, record.route, str(record.status), record.outcome)
        self.requests.labels(*labels).inc()
        line = {
            "id": record.id,
            "tenant": record.tenant,
            "route": record.route,
            "replica": record.replica,
            "attempts": record.attempts,
            "status": record.status,
            "outcome": record.outcome,
            "first_token_s": record.first_token_s and round(record.first_token_s, 4),
            "seconds": round(time.monotonic() - record.started, 4),
        }
        log.info(json.dumps(line))


class Accounting:
    """ASGI middleware: every request has an id and a record, and what it holds is given back."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: Collection[str]):
        self.app = app
        self.metrics = metrics
        self.paths = paths  # others are counted nowhere: anybody can think of a thousand

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        valid = re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", given)
        record = Record(scope["path"], given if valid else uuid.uuid4().hex)
        scope["record"] = record

        async def note(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", record.id.encode())]
            elif record.outcome == "left" and not message.get("more_body"):
                record.outcome = "ok" if record.status < 400 else "refused"
            await send(message)

        try:
            async with record.resources:
                with contextlib.suppress(ClientDisconnect):
                    await self.app(scope, receive, note)
        except Exception:
            record.status = 500 if record.status == 499 else record.status
            record.outcome = "error"
            raise
        finally:
            if record.route in self.paths:
                self.metrics.ended(record)
