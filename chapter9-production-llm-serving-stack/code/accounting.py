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
from collections.abc import Collection, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from backends import Replica
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
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
        self.attempts = Counter(
            "gateway_backend_attempts",
            "Requests to a backend; one that the client left is not counted",
            ["backend", "attempt", "outcome"],
            registry=registry,
        )
        self.seconds = Histogram(
            "gateway_backend_seconds",
            "From a request to a backend to its first token, or to an answer in one piece",
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

    def first_token(self, record: Record, asked: float) -> None:
        now = time.monotonic()
        record.first_token_s = now - record.started
        self.first_tokens.labels(record.route).observe(record.first_token_s)
        self.seconds.labels(*attempt_of(record)).observe(now - asked)

    def count(self, record: Record, outcome: str) -> None:
        """How an attempt went: ok, error, or busy (it has said that it is full)."""
        self.attempts.labels(*attempt_of(record), outcome).inc()

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


def attempt_of(record: Record) -> tuple[str, str]:
    backend = record.replica.partition("/")[0]
    return backend, "first" if record.attempts == 1 else "retry"


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
        finally:
            if record.route in self.paths:
                self.metrics.ended(record)
